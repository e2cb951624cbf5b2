"""How weights start, what stays in float32 under autocast, random tokens, and normalised queries and keys."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import make_checkpoint, make_folder, run
from torch import nn

import probe
import train_dit
import train_unet
import train_uvit

# ---- Float32 under bf16's autocast
NETWORKS = {
    "unet": (train_unet, ["--backbone", "tiny", "--self-cond", "--aug", "0.5"]),
    "uvit": (train_uvit, ["--size", "tiny", "--cls-token", "--cond", "--aug", "0.5"]),
    "dit": (train_dit, ["--size", "tiny", "--self-cond", "--cond", "--qk-norm"]),
}
FORMULATIONS = {"ddpm": train_unet.DDPM(1e-3), "edm": train_unet.EDM(uncertainty=True), "rf": train_unet.RF(),
                "latent": train_dit.LatentRF()}  # fmt: skip

def make_net(name, *flags, shake=0.0):
    """A fresh network, its weights moved by noise of std `shake`, and its formulation."""
    script, words = NETWORKS[name]
    args = script.parse_args([*words, *flags])
    args.classes = ["a", "b", "c"]
    torch.manual_seed(0)
    net, diffusion = script.build(args)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return net, diffusion

@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_time_and_features_are_float32_under_autocast(name):
    """The time embedding is the very same; a feature is the exact mean of a map, of whatever precision."""
    net, _ = make_net(name, shake=0.05)
    x, t, maps = torch.randn(4, *net.shape), torch.tensor([0.011, 0.012, 0.5, 0.9]), {}
    want = net.encode(x, t)[1]
    with torch.autocast("cpu", torch.bfloat16):
        feat, e_t = net.encode(x, t)
        features = net.features(x, t)
        net.run(x, t, maps=maps)
    assert e_t.dtype == torch.float32 and e_t.equal(want)
    assert feat.dtype == torch.float32 and list(features) == list(maps) == net.layers
    for layer, h in maps.items():
        mean = h.double().mean((2, 3)) if name == "unet" else h[:, -64:].double().mean(1)
        assert features[layer].dtype == torch.float32
        assert (features[layer] - mean).abs().max() <= 2e-5 * max(1, mean.abs().max()), layer
        if layer == net.layer:
            assert (feat - (h[:, 0] if name == "uvit" else mean)).abs().max() <= 2e-5 * max(1, mean.abs().max())

@pytest.mark.parametrize("name", FORMULATIONS)
def test_losses_and_samples_are_float32_under_autocast(name):
    """A network that answers in bf16 makes the loss and the samples of one that gives the same numbers in float32."""
    diffusion, draw = FORMULATIONS[name], torch.Generator().manual_seed(0)
    x0, noise, answer = torch.randn(3, 8, 3, 4, 4, generator=draw).unbind()
    level = diffusion.draw_level(8, draw)
    if name == "edm":
        nn.init.constant_(diffusion.uncertainty.linear.weight, 0.05)
    results = []
    for enabled in (False, True):
        dtype = torch.bfloat16 if enabled else torch.float32

        def net(x, t, y=None, aug=None, with_feat=False, dtype=dtype):
            given = (answer[: len(x)] + 0.1 * x).bfloat16().to(dtype)
            return (given, None, None) if with_feat else given

        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            losses = diffusion.loss(net, x0, level, noise)[:2]
            kw = {} if name == "rf" else {"steps": 3}
            results.append([*losses, diffusion.sample(net, noise, **kw)])
    for plain, mixed in zip(*results, strict=True):
        assert mixed.dtype == plain.dtype and mixed.dtype != torch.bfloat16
        assert torch.allclose(mixed, plain, rtol=2e-5, atol=2e-5)

def test_the_head_normalises_and_contrasts_in_float32_under_autocast():
    """In train_unet.py, whose head the others share to the letter."""
    draw = torch.Generator().manual_seed(0)
    x = (5 + torch.randn(8, 16, generator=draw)).bfloat16()
    q, k = torch.randn(2, 8, 256, generator=draw)
    unit_q, unit_k = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (q, k))
    want = 0.4 * F.cross_entropy(unit_q @ unit_k.T / 0.2, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        normed, loss = train_unet.BatchNorm(16)(x), train_unet.moco_loss(q, k)
    x = x.double()
    want_normed = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(normed.double(), want_normed, atol=1e-4)
    assert normed.dtype == loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=2e-5)

# ---- Fresh weights: the first pattern that is found in a name tells how they start
HEAD = [(r"time\..*", "zero"), (r"norm.*weight", "one"), (r"norm.*bias", "zero"), ("linear", "torch")]
SELF_COND = [(r"self_cond\.mlp\.2", "zero"), (r"self_cond\.scale\.bias", "one"), ("self_cond", "torch")]
LAWS = {
    "unet": [*SELF_COND, (r"conv2\.1\.weight|attn\.output\.weight|^final\.weight", "zero"), ("bias", "zero"),
             ("norm", "one"), ("weight", "xavier")],
    "uvit": [("label_emb", "normal 1"), ("patch_embed|final_layer", "torch"), ("bias", "zero"), ("norm", "one"),
             ("", "normal 0.02")],
    "dit": [*SELF_COND, ("pos_embed", "fixed"), ("bias", "zero"), ("norm", "one"),
            ("adaLN_modulation|final_layer.linear", "zero"), ("t_embedder|y_embedder", "normal 0.02"),
            ("weight", "xavier of rows")],
}  # fmt: skip

def check_law(law, name, w, weights):
    if law in ("zero", "one"):
        assert w.eq(float(law == "one")).all(), name
    elif law.startswith("normal"):
        std, spread = float(law.split()[1]), 5 / w.numel() ** 0.5
        assert abs(w.std() / std - 1) < spread and abs(w.mean() / std) < spread, name
        assert 0.62 < (w.abs() < std).float().mean() + spread and (w.abs() < std).float().mean() - spread < 0.75, name
    elif law != "fixed":  # uniform
        shape = weights[name.removesuffix("bias").removesuffix("weight") + "weight"].shape
        fan_in, kernel = math.prod(shape[1:]), 1 if "rows" in law else math.prod(shape[2:])
        bound = fan_in**-0.5 if law == "torch" else (6 / (fan_in + shape[0] * kernel)) ** 0.5
        assert bound * (1 - 12 / w.numel()) < w.abs().max() <= bound * 1.000001, name
        assert abs(w.std() * 3**0.5 / bound - 1) < 4 / w.numel() ** 0.5, name

@pytest.mark.parametrize("name", [*LAWS, "head"])
def test_fresh_weights_follow_their_law(name):
    """U-ViT as [UViT], DiT as [DiT] and LightningDiT start; UNets by Xavier's rule, residual branches in zeros."""
    torch.manual_seed(0)
    module = train_unet.MoCoHead(96, 128, True, 64) if name == "head" else make_net(name)[0]
    weights = dict(module.named_parameters())
    for key, w in weights.items():
        law = next(law for pattern, law in LAWS.get(name, HEAD) if re.search(pattern, key))
        check_law(law, key, w.detach(), weights)

# ---- Random tokens, queries and keys
def test_tokens_of_the_probe_do_not_hang_on_what_ran_before(tmp_path, monkeypatch):
    """--pool token draws from the global state, which each use has to set; no two uses draw the same."""
    path = make_checkpoint(tmp_path / "a.pt", train_uvit, "--size", "tiny")
    make_folder(tmp_path, n=16, size=(16, 16))
    draws, randint = [], torch.randint

    def draw_and_note(*given, **named):
        draws.append(randint(*given, **named))
        return draws[-1]

    monkeypatch.setattr(torch, "randint", draw_and_note)
    for before in (1, 2):
        torch.manual_seed(before)
        flags = "--dataset", "mine", "--data", tmp_path, "--pool", "token", "--epochs", 2, "--batch", 16
        run(probe, path, *flags, "--json", tmp_path / f"{before}.json")
    draws = [tuple(draw.tolist()) for draw in draws if len(draw) > 1]  # without a look at one image, for the widths
    assert len(draws) == 2 * 5 * 5  # the test images and four steps, each for five layers
    assert draws[:25] == draws[25:] and len(set(draws[:25])) == 25

def test_queries_and_keys_are_normalised_by_their_own_weights():
    """q = w q / rms(q), before the rotation: pairs turn by 10000^(-2 i / half) of their row, then of their column."""
    torch.manual_seed(0)
    attn, rotary, x = train_dit.DiTAttention(16, 2, qk_norm=True), train_dit.Rotary(8, 3), torch.randn(2, 9, 16)
    nn.init.uniform_(attn.q_norm.weight, 0.5, 2)
    nn.init.uniform_(attn.k_norm.weight, 2, 4)
    place = torch.stack([torch.arange(9) // 3, torch.arange(9) % 3], dim=1).double()  # row, column
    turn = torch.polar(torch.ones(9, 4).double(), (place[:, :, None] * torch.tensor([1.0, 0.01])).flatten(1))
    q, k, v = attn.qkv(x).double().view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    turned = []
    for part, norm in ((q, attn.q_norm), (k, attn.k_norm)):
        part = norm.weight * part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        turned.append(torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (4, 2))) * turn).flatten(-2))
    h = (turned[0] @ turned[1].transpose(2, 3) / 8**0.5).softmax(-1) @ v
    want = F.linear(h.transpose(1, 2).flatten(2), attn.proj.weight.double(), attn.proj.bias.double())
    assert torch.allclose(attn(x, rotary).double(), want, atol=2e-5)
