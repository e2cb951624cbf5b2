"""What a formula, a small drawing or an identity fixes: a second opinion beside the golden fixtures."""

import math
import shutil
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fid
import probe
import train_dit as D
import train_unet as T
import train_uvit as V


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def say(module, weight=0.0, bias=None):
    """Set a linear layer or convolution: a weight (a number or a tensor), and a bias, which is 0 unless given."""
    with torch.no_grad():
        module.weight.copy_(torch.as_tensor(weight, dtype=torch.float32))
        if module.bias is not None:
            module.bias.copy_(torch.as_tensor(0.0 if bias is None else bias))
    return module


def inputs_of(module):
    """What the module is called with from now on, call by call."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    return seen


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over the last two axes, (.., N, d), with loops over neither heads nor batch."""
    scores = torch.einsum("...nd,...md->...nm", q, k) / math.sqrt(q.shape[-1])
    weight = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("...nm,...md->...nd", weight, v)


# ---- DDPM, DDIM
def test_ddim_clips_and_stays_on_the_line():
    """A network that finds no noise: x0 is clipped to 1 in every step, and the noise that agrees with it is kept.

    Then x_t = a_t + sqrt(1 - a_t^2) e all the way, with e fixed by the first step and the table's entry 0 at the end.
    """
    table, times = np.cumprod(1 - np.linspace(1e-4, 0.02, 1001)), []

    def net(x, t, y):
        times.append(round(1000 * t[0].item()))
        return torch.zeros_like(x)

    for start in (3.0, -3.0):
        x0 = T.DDPM(1e-3).sample(net, torch.full((1, 3, 2, 2), start), steps=4)
        e = (start - math.copysign(table[751] ** 0.5, start)) / (1 - table[751]) ** 0.5
        want = math.copysign(table[0] ** 0.5, start) + (1 - table[0]) ** 0.5 * e
        assert torch.allclose(x0, torch.tensor(want).float(), atol=1e-5)
    assert times == [751, 501, 251, 1] * 2
    times.clear()
    T.DDPM(1e-3).sample(net, torch.zeros(1, 3, 2, 2))
    assert times == list(range(991, 0, -10))


# ---- EDM
def test_edm_schedule():
    """From 80 to 0.002 in equal steps of the seventh root, then 0."""
    sigmas = T.EDM().schedule(18)
    assert len(sigmas) == 19 and sigmas.dtype == torch.float64 and sigmas[-1] == 0
    assert sigmas[0].item() == pytest.approx(80) and sigmas[17].item() == pytest.approx(0.002)
    roots = sigmas[:18] ** (1 / 7)
    assert torch.allclose(roots.diff(), (roots[17] - roots[0]) / 17, rtol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_heun_clips_the_denoiser(sign):
    """D far outside is clipped, so every sample ends at the bound; each slope then points straight at it."""

    def net(c_x, c_noise, y=None, aug=None):
        return torch.full_like(c_x, sign * 1e5)

    assert torch.allclose(T.EDM().sample(net, rand(2, 3, 4, 4)), torch.tensor(sign), atol=1e-6)


# ---- RF of latents, and what tools read
A900 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[899] ** 0.5  # a_t of step 900


@pytest.mark.parametrize(
    ("diffusion", "level", "clock", "signal", "spread"),
    [
        (T.RF(), 0.25, 0.25, 0.75, 0.25), (D.LatentRF(), 0.25, 0.75, 0.75, 0.25),
        (T.DDPM(1e-3), 900, 0.9, A900, (1 - A900**2) ** 0.5),
        (T.EDM(), 2.0, math.log(2) / 4, 1 / 4.25**0.5, 2 / 4.25**0.5),
    ],
)  # fmt: skip
def test_features_are_those_of_the_noisy_image(diffusion, level, clock, signal, spread):
    """Tools read the network at the level that is asked for, with its noise, its time, the label and the pooling."""
    x0, noise, y = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1), torch.tensor([1, 0])

    class Net:
        def features(self, *given):
            return given

    x, t, label, pool, last = diffusion.features(Net(), x0, level, noise, y, "token", "mid")
    assert torch.allclose(x, float(signal) * x0 + float(spread) * noise, atol=1e-5)
    assert t.tolist() == pytest.approx([clock] * 2) and label is y and (pool, last) == ("token", "mid")


def test_guided_sampling_of_two_steps_by_hand():
    """The paper's defaults: shifted times 1, 3.3 / 4.3, 0; weight 1.5 up to t = 0.89, so not in the first step."""
    seen = []

    def net(x, clock, y):
        seen.append((clock[0].item(), y.tolist()))
        return torch.where(y.view(-1, 1, 1, 1) < 0, -3.0, -2.0).expand_as(x)  # v = 2 with the label, 3 without

    x, y, middle = rand(1, 5, 2, 2), torch.zeros(1, dtype=torch.long), 3.3 / 4.3
    x0 = D.LatentRF().sample(net, x, 2, y)
    assert torch.allclose(x0, x + (middle - 1) * 2 + (0 - middle) * (3 + 1.5 * (2 - 3)), atol=1e-5)
    assert [told for _, told in seen] == [[0], [0, -1]]
    assert [t for t, _ in seen] == pytest.approx([0, 1 - middle])
    seen.clear()
    D.LatentRF().sample(net, x, y=y)
    times = [3.3 * u / (1 + 2.3 * u) for u in np.linspace(1, 0, 251)[:-1]]
    assert [1 - t for t, _ in seen] == pytest.approx(times, abs=1e-6)
    assert [len(told) for _, told in seen] == [1 + (t <= 0.89) for t in times]


# ---- Augmentation
SIDE = 32  # pixels; x and y below count from the centre, x to the right and y down


def blob(x, y):
    """A round spot on black, (1, 1, SIDE, SIDE)."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    return torch.exp(-((axis - x) ** 2 + (axis[:, None] - y) ** 2) / 8)[None, None]


def moved(x, y, **changes):
    """Where the augmentation brings the spot, and by how much its area grew."""
    names = ("xflip", "yflip", "scale", "theta", "w", "r", "tx", "ty")
    params = torch.tensor([[float(changes.get(name, 0)) for name in names]])
    before, image = blob(x, y), T.augment(blob(x, y), params)[0, 0]
    axis, mass = torch.arange(SIDE) - (SIDE - 1) / 2, image.sum()
    return (image.sum(0) @ axis / mass).item(), (image.sum(1) @ axis / mass).item(), (mass / before.sum()).item()


GROW, HALF = 2**0.2, math.pi / 2


@pytest.mark.parametrize(
    ("start", "changes", "end", "area"),
    [
        ((6, 2), {"xflip": 1}, (-6, 2), 1),
        ((6, 2), {"yflip": 1}, (6, -2), 1),
        ((6, 2), {"scale": 1}, (6 * GROW, 2 * GROW), GROW**2),
        ((6, 0), {"theta": HALF}, (0, -6), 1),  # counter-clockwise on screen: from the right to the top
        ((6, 4), {"w": 1}, (6 * GROW, 4 / GROW), 1),  # r = 0 stretches x
        ((6, 4), {"w": 1, "r": HALF}, (6 / GROW, 4 * GROW), 1),
        ((5, -5), {"w": 1, "r": HALF / 2}, (5 * GROW, -5 * GROW), 1),  # the axis turns counter-clockwise, too
        ((5, 5), {"w": 1, "r": HALF / 2}, (5 / GROW, 5 / GROW), 1),
        ((0, 0), {"tx": 1}, (SIDE / 8, 0), 1),
        ((0, 0), {"ty": 1}, (0, SIDE / 8), 1),
        ((6, 0), {"xflip": 1, "theta": HALF}, (0, 6), 1),  # flipped first, then turned,
        ((6, 0), {"theta": HALF, "w": 1}, (0, -6 / GROW), 1),  # then stretched,
        ((2, 0), {"scale": -1, "theta": HALF, "tx": 0.5}, (2, -2 / GROW), GROW**-2),  # then moved
    ],
)
def test_augmentation_moves_a_spot(start, changes, end, area):
    """Within a tenth of a pixel: sym6 is not quite symmetric, and what is turned shows it."""
    x, y, grown = moved(*start, **changes)
    assert (x, y) == pytest.approx(end, abs=0.12) and grown == pytest.approx(area, rel=0.02)


def test_augmentation_reflects_at_the_border():
    """A spot at the right border, moved inwards: behind it comes its own mirror image, about the last pixel."""
    at = (SIDE - 1) / 2
    image = T.augment(blob(at, 0), torch.tensor([[0, 0, 0, 0, 0, 0, -1.0, 0]]))
    assert torch.allclose(image[..., -8:], blob(at - SIDE / 8, 0)[..., -8:], atol=0.01)


def test_parameters_and_label_by_hand():
    """Row 0 draws every gate just below p = 0.12, row 1 just above; the angle r has its own odds of one half."""
    flips, angles = torch.tensor([[0.4, 0.4]] * 2), torch.tensor([[7 / 12, 1 / 4]] * 2)  # pi / 6 and -pi / 2
    gates = torch.tensor([[0.119] * 5 + [0.499], [0.121] * 5 + [0.501]])
    normal = torch.tensor([[0.3, 0.4, 0.5, -0.6]] * 2)
    params, label = T.gate_augment(torch.cat([flips, angles, gates], dim=1), normal, 0.12)
    assert params[0].tolist() == pytest.approx([1, 1, 0.3, math.pi / 6, 0.4, -HALF, 0.5, -0.6])
    assert label[0].tolist() == pytest.approx([1, 1, 0.3, 3**0.5 / 2 - 1, 0.5, 0, -0.4, 0.5, -0.6], abs=1e-6)
    assert params[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0] and label[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    normal[:, 0] = 0.0
    _, label = T.gate_augment(torch.tensor([[0.5, 0.5, 0.5, 2 / 3] + [0.0] * 6]), normal[:1], 0.12)  # r = pi / 3
    assert label[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 0.2, 0.4 * 0.75**0.5, 0.5, -0.6], abs=1e-6)


# ---- Data
def test_splits_of_cifar(monkeypatch):
    """torchvision is asked for the split that is meant; its (N, H, W, 3) become (N, 3, H, W)."""

    class Stored:
        classes, targets = ["a", "b"], [1, 0]

        def __init__(self, root, train=True, download=False):
            self.data = np.zeros((2, 32, 32, 3), np.uint8)
            self.data[1, 5, 7] = (1, 2, 3) if train else (4, 5, 6)

    for script in (T, V, D):
        monkeypatch.setattr(script.datasets, "CIFAR10", Stored)
        for split, colour in (("train", [1, 2, 3]), ("test", [4, 5, 6])):
            images, labels, names = script.load_data(script.parse_args(["--dataset", "cifar10"]), split)
            assert images.shape == (2, 3, 32, 32) and images[1, :, 5, 7].tolist() == colour
            assert images.sum() == sum(colour) and labels.tolist() == [1, 0] and names == ["a", "b"]


# ---- The average, the uncertainty
@pytest.mark.parametrize(("script", "decays"), [
    (T, (0, 0.370039, 0.519250, 0.603150)), (V, (0, 0.370039, 0.519250, 0.603150)), (D, (0.9999,) * 4)])  # fmt: skip
def test_decay_of_the_average_warms_up_as_its_ancestor_s(script, decays):
    """ema_pytorch: the first update copies, the n-th after it has 1 - (1 + n)^(-2/3). LightningDiT: constant."""
    args = script.parse_args(["--dataset", "cifar10"])
    assert [script.ema_decay(args, step) for step in (1, 2, 3, 4)] == pytest.approx(decays, abs=1e-6)
    assert script.ema_decay(args, 10**9) == args.ema == 0.9999


def test_uncertainty_starts_without_weighting_and_has_frozen_features():
    torch.manual_seed(0)
    u = T.EDM(uncertainty=True).uncertainty
    assert [name for name, _ in u.named_parameters()] == ["linear.weight"] and u(rand(5)).abs().max() == 0
    say(u.linear, torch.eye(1, 128))
    t = torch.tensor([-1.0, 0.0, 0.5])
    assert torch.allclose(u(t), 2**0.5 * torch.cos(t * u.freqs[0] + u.phases[0]), atol=1e-6)
    assert 4 < u.freqs.std() < 9 and 0 <= u.phases.min() < u.phases.max() < 2 * math.pi  # 2 pi N(0, 1), 2 pi U(0, 1)


# ---- Contrastive head
def test_keys_of_all_ranks_in_their_order(monkeypatch):
    """Two ranks of 3 rows, all keys orthogonal, each query equal to its own key: every logit is 1 / T or 0."""
    rows = torch.eye(6)

    def gather(out, mine):
        for rank in range(2):
            out[rank].copy_(rows[3 * rank :][:3])  # as each rank sends them, normalised

    monkeypatch.setattr(T.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(T.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(T.dist, "all_gather", gather)
    want = 2 * 0.2 * math.log(1 + 5 * math.exp(-1 / 0.2))
    for rank in range(2):
        monkeypatch.setattr(T.dist, "get_rank", lambda rank=rank: rank)
        loss = T.moco_loss(2 * rows[3 * rank :][:3], 3 * rows[3 * rank :][:3])
        assert loss.item() == pytest.approx(want, rel=1e-4)


def test_no_gradient_into_the_key():
    q, k = rand(4, 8).requires_grad_(), rand(4, 8, seed=1).requires_grad_()
    T.moco_loss(q, k).backward()
    assert k.grad is None and q.grad.abs().max() > 0


def test_projector_of_the_paper():
    """Three linear maps and two, no biases; scale -1 and a shift erase the features before the last norm."""
    with torch.device("meta"):
        head = T.MoCoHead(512, 128, True, T.parse_args(["--backbone", "ddpm"]).cl_hidden)
    wide = 4096  # [MoCo]'s sizes for ViTs; a norm has a weight and a bias but for each last one; e_t steers two layers
    sizes = {"projector": 512 * wide + wide * wide + wide * 256 + 4 * wide + 2 * (128 + 1) * 2 * wide}
    sizes["predictor"] = 256 * wide + wide * 256 + 2 * wide
    assert {name: sum(p.numel() for p in getattr(head, name).parameters()) for name in sizes} == sizes
    small = T.HeadMLP([16, 8, 8, 4], emb_dim=6)
    for layer in small.time:
        say(layer, bias=torch.tensor([-1.0] * 8 + [0.7] * 8))
    assert small(rand(5, 16), rand(5, 6)).abs().max() < 1e-2


# ---- Small pieces that all networks have
def test_sinusoids():
    """Order, and the lowest frequency: 1e-4 is the UNet's last, U-ViT's and DiT's next one."""
    embed, t = T.TimeEmbedding(8, 9), torch.tensor([0.0, 0.5])
    seen = inputs_of(embed.lin1)
    embed(t)
    angles = 0.5 * torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    assert torch.allclose(seen[0][0][0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert torch.allclose(seen[0][0][1], torch.cat([angles.sin(), angles.cos()]), atol=1e-6)
    embed(t, torch.eye(9)[:2])
    assert torch.allclose(seen[1][0] - seen[0][0], embed.aug_emb.weight.T[:2], atol=1e-6)

    angles = 500 * torch.tensor([1, 0.1, 0.01, 0.001])
    got = V.time_sinusoid(torch.tensor([0.0, 500.0]), 8)
    assert torch.allclose(got[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert torch.allclose(got[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-4)

    embed = D.DiTTime(32)
    seen = inputs_of(embed.mlp[0])
    embed(t)
    assert seen[0][0][0].tolist() == [1.0] * 128 + [0.0] * 128
    found = seen[0][0][1, [0, 64, 128, 192]]  # frequencies 1 and 0.01, cosine and sine
    assert found.tolist() == pytest.approx([math.cos(0.5), math.cos(0.005), math.sin(0.5), math.sin(0.005)], abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        (T.ResBlock(32, 32, 8, 0.0).norm1, 1e-5), (T.ResBlock(32, 32, 8, 0.0).norm2, 1e-5),
        (T.Attention(32).norm, 1e-5), (D.VAEResBlock(32, 32).norm1, 1e-6), (D.VAEResBlock(32, 32).norm2, 1e-6),
        (D.VAEAttention(32).norm, 1e-6), (D.VAE(32, 4).decoder.norm_out, 1e-6),
    ],
)  # fmt: skip
def test_group_norms_have_32_groups(norm, eps):
    """With as many channels each is normalised alone; a signal as weak as sqrt(eps) comes out at 1 / sqrt(2)."""
    sign = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
    scale = torch.logspace(0, 3, 32).view(1, 32, 1, 1)
    assert torch.allclose(norm(sign * scale), sign.expand(1, 32, 1, 2), atol=1e-3)
    assert torch.allclose(norm(sign * eps**0.5 * torch.ones_like(scale)), sign / 2**0.5, atol=1e-4)


def test_groups_of_last_norms():
    """Means vanish over that share of the channels, not over half of it: 8 groups in the UNet, 32 in the VA-VAE."""
    for norm, channels, groups in (
        (T.UNet(16, **T.BACKBONES["tiny"]).norm, 32, 8), (D.VAE(32, 4).encoder.norm_out, 128, 32),
    ):  # fmt: skip
        out = norm(rand(2, channels, 4, 4) + torch.arange(channels).view(1, -1, 1, 1))
        assert out.view(2, groups, -1).mean(2).abs().max() < 1e-5
        assert out.view(2, 2 * groups, -1).mean(2).abs().min() > 0.1


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        (D.DiTBlock(8, 2, False).norm1, 1e-6), (D.DiTBlock(8, 2, False).norm2, 1e-6),
        (D.DiT(3, 4, 2, 8, 1, 1).final_layer["norm_final"], 1e-6), (D.DiTAttention(16, 2, True).q_norm, 1e-6),
        (D.DiTAttention(16, 2, True).k_norm, 1e-6), (V.UViTBlock(8, 2, False, False).norm1, 1e-5),
        (V.UViTBlock(8, 2, False, False).norm2, 1e-5),
    ],
)  # fmt: skip
def test_token_norms(norm, eps):
    sign = torch.tensor([1.0, -1.0] * 4)
    assert torch.allclose(norm(sign * eps**0.5), sign / 2**0.5, atol=1e-4)
    shifted = norm(sign + 3)  # RMSNorm keeps the mean, LayerNorm removes it
    assert torch.allclose(shifted, sign if isinstance(norm, nn.LayerNorm) else (sign + 3) / 10**0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("net", "side"),
    [(T.UNet(16, **T.BACKBONES["tiny"]), 16), (V.UViT(8, 2, 16, 3, 2), 8), (D.DiT(3, 4, 2, 8, 1, 1), 4)],
    ids=["UNet", "U-ViT", "DiT"],
)
def test_attention_on_a_cpu_is_float32(net, side, monkeypatch):
    """Under autocast, too: the bf16 kernel of a CPU takes up to five times as long."""
    kernel, found = F.scaled_dot_product_attention, []

    def spy(*qkv):
        out = kernel(*qkv)
        found.append(out.dtype)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(rand(2, 3, side, side), torch.zeros(2))
    assert set(found) == {torch.float32} and out.dtype == torch.bfloat16


# ---- UNet
def test_attention_over_pixels():
    """One head over all pixels, q then k then v, scale 1 / sqrt(C), on the normalised input; added to it."""
    x = rand(2, 32, 3, 4)
    for module in (T.Attention(32), D.VAEAttention(32)):
        parts = rand(96, 32, seed=1) * 0.3
        if isinstance(module, T.Attention):
            say(module.projection, parts)
            say(module.output, torch.eye(32))
        else:
            for layer, part in zip((module.q, module.k, module.v), parts.split(32), strict=True):
                say(layer, part[:, :, None, None])
            say(module.proj_out, torch.eye(32)[:, :, None, None])
        tokens = module.norm(x).flatten(2).transpose(1, 2)  # (2, 12, 32), pixels row by row
        want = attend(*(tokens @ part.T for part in parts.split(32)))
        assert torch.allclose(module(x) - x, want.transpose(1, 2).view_as(x), atol=1e-4)


def copy_pixel(conv, row, column):
    """Make a 3x3 convolution copy one pixel of its window: the output then shows where the windows lie."""
    window = F.one_hot(torch.tensor(3 * row + column), 9).view(3, 3)
    return say(conv, torch.eye(conv.in_channels)[:, :, None, None] * window)


def test_resampling():
    """Windows of the UNet are centred on even pixels, the VA-VAE's begin there; doubling repeats pixels."""
    x = rand(1, 32, 6, 6)
    module, stage = T.Resample(32, 8, 0.0, "down", False), D.VAEStage(32, 32, 0, False, "down")
    copy_pixel(module.conv, 1, 1)
    copy_pixel(stage.downsample.conv, 0, 0)
    assert module(x, None).equal(x[..., ::2, ::2]) and stage(x).equal(x[..., ::2, ::2])
    copy_pixel(module.conv, 0, 2)
    copy_pixel(stage.downsample.conv, 0, 2)
    assert module(x, None)[..., 1:, :].equal(x[..., 1:-1:2, 1::2])  # above and to the right
    assert stage(x).equal(F.pad(x, (0, 2))[..., ::2, 2::2])  # two to the right, zeros behind the border

    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    module, stage = T.Resample(32, 8, 0.0, "up", False), D.VAEStage(32, 32, 0, False, "up")
    copy_pixel(module.conv, 1, 1)
    copy_pixel(stage.upsample.conv, 1, 1)
    assert module(x, None).equal(doubled) and stage(x).equal(doubled)

    halved = x.view(1, 32, 3, 2, 3, 2).mean((3, 5))
    for direction, want in (("up", doubled), ("down", halved)):  # BigGAN's block, its branch silent
        block = T.ResBlock(32, 32, 8, 0.0, direction)
        say(block.conv2[1])
        assert torch.allclose(block(x, rand(1, 8)), want, atol=1e-6)


def test_embedding_enters_a_residual_block_between_its_convolutions():
    """With the first convolution silent, the second sees the embedding alone, whatever the image."""
    block, e = T.ResBlock(32, 32, 8, 0.0), rand(2, 8)
    say(block.conv1)
    a, b = (block(x, e) - x for x in (rand(2, 32, 4, 4), rand(2, 32, 4, 4, seed=1)))
    assert torch.allclose(a, b, atol=1e-5)
    say(block.time_emb[1], bias=torch.arange(32) % 2 * 2.0 - 1)
    copy_pixel(block.conv2[1], 1, 1)
    block.norm2 = nn.Identity()
    want = F.silu(torch.arange(32) % 2 * 2.0 - 1)  # the embedding is added as it is, after SiLU and a linear map
    assert torch.allclose(block(torch.zeros(2, 32, 4, 4), e)[0, :, 1, 1], want, atol=1e-5)


def test_dropout_silences_the_branch():
    """With probability 1 in training, never otherwise; networks of the paper have 0.1, EDM's 0.13."""
    block, x, e = T.ResBlock(32, 32, 8, 1.0), rand(2, 32, 4, 4), rand(2, 8)
    say(block.conv2[1], 1.0)
    assert block(x, e).equal(x) and not block.eval()(x, e).equal(x)
    for model, p in (("ddpm", 0.1), ("edm", 0.13), ("rf", 0.1)):
        with torch.device("meta"):
            net, _ = T.build(T.parse_args(["--model", model, "--backbone", "ddpm"]))
        assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {p}


def test_decoder_takes_the_skips_last_in_first_out():
    """Behind what comes from below, each decoder block finds the output of its mirror image in the encoder."""
    net, left, right = T.UNet(16, **T.BACKBONES["tiny"]), [], []
    for module in [net.image_proj, *net.down]:
        module.register_forward_hook(lambda _, __, out: left.append(out))
    below = []
    for module in [net.middle["res2"], *net.up]:
        module.register_forward_hook(lambda _, __, out: below.append(out))
    blocks = [b for b in net.up if isinstance(b, T.UNetBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: right.append((args[0], below[-1])))
    net(rand(1, 3, 16, 16), torch.rand(1))
    assert len(left) == len(right) == 6
    for skip, (taken, h) in zip(reversed(left), right, strict=True):
        assert taken.equal(torch.cat([h, skip], dim=1))


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_encoder_attends_at_16_pixels(resolution):
    net, found = T.UNet(resolution, **T.BACKBONES["tiny"]), []
    blocks = [b for b in net.down if isinstance(b, T.UNetBlock)]
    for block in blocks:
        block.register_forward_hook(lambda block, _, out: found.append((out.shape[-1], type(block.attn))))
    net(rand(1, 3, resolution, resolution), torch.rand(1))
    assert [kind is T.Attention for _, kind in found] == [side == 16 for side, _ in found] and len(found) == 3
    assert type(net.middle["attn"]) is T.Attention


@pytest.mark.parametrize(
    ("model", "backbone", "cifar10", "cifar100", "level"),
    [
        ("ddpm", "ddpm", "out_6", "out_6", 11), ("edm", "ddpm", "out_7", "out_6", 0.06),
        ("rf", "ddpm", "out_7", "out_7", 0.06), ("ddpm", "ddpmpp", "out_7", "out_8", 11),
        ("edm", "ddpmpp", "out_9", "out_8", 0.06), ("rf", "ddpmpp", "out_8", "out_8", 0.06),
    ],
)  # fmt: skip
def test_layers_and_levels_of_the_paper(model, backbone, cifar10, cifar100, level):
    """[P] Tab. 10."""
    for dataset, layer in (("cifar10", cifar10), ("cifar100", cifar100)):
        args = T.parse_args(["--model", model, "--backbone", backbone, "--dataset", dataset])
        assert (args.layer, args.cl_t) == (layer, level)


def test_what_the_condition_is_made_of():
    """Self-conditioning is told e with its label, e_t without, and the pooled feature of its layer."""
    x, t = rand(3, 3, 16, 16), torch.rand(3)
    unet = T.UNet(16, **T.BACKBONES["tiny"], layer="out_2", self_cond="adaptive", aug_dim=9)
    seen, aug = inputs_of(unet.self_cond), rand(3, 9)
    _, feat, e_t = unet(x, t, aug=aug, with_feat=True)
    e, alone, pooled = seen[0]
    assert e.equal(unet.time_emb(t, aug)) and alone.equal(unet.time_emb(t)) and e_t.equal(alone) and pooled.equal(feat)
    assert unet.encode(x, t, aug=aug)[1].equal(e_t)  # what the head is told
    dit = D.DiT(3, 16, 4, 32, 4, 2, layer="2", self_cond="adaptive", classes=4)
    seen, y = inputs_of(dit.self_cond), torch.tensor([0, 2, 3])
    _, feat, e_t = dit(x, t, y, with_feat=True)
    e, alone, pooled = seen[0]
    assert torch.allclose(e - alone, dit.y_embedder[0].weight[y], atol=1e-6) and alone.equal(dit.t_embedder(t))
    assert e_t.equal(alone) and pooled.equal(feat) and dit.encode(x, t, y)[1].equal(e_t)


def test_what_augmentation_brings():
    """[P] Tab. 8: EDM's uncertainty weighting; U-ViT's mask between [CLS] and the augmentation token, in all blocks."""
    flags = ["--model", "edm", "--backbone", "tiny"]
    for more, on in (([], False), (["--cl", "1"], True), (["--aug", "0.1"], True)):
        assert (T.build(T.parse_args([*flags, *more]))[1].uncertainty is not None) == on
    for more, masked in ((["--cls-token"], False), (["--cls-token", "--cl", "1"], True), (["--aug", "0.1"], False)):
        net, _ = V.build(V.parse_args(["--size", "tiny", *more]))
        assert {block.attn.masked for block in [*net.in_blocks, net.mid_block, *net.out_blocks]} == {masked}


# ---- U-ViT
def test_tokens_of_the_uvit():
    """[CLS], augmentation, label, time, then the image row by row; only the last three kinds share pos_embed."""
    net, x = V.UViT(8, 2, 16, 3, 2, classes=4, aug_dim=9, cls_token=True), rand(2, 3, 8, 8)
    e_t, aug, y = rand(2, 16), rand(2, 9), torch.tensor([3, 1])
    say(net.aug_emb, 0.1, bias=rand(16, seed=3))
    tokens = net.tokens(x, e_t, y, aug)
    assert tokens.shape == (2, 4 + 16, 16)
    assert torch.allclose(tokens[:, 0], (net.cls_token + net.cls_pos_embed)[0].expand(2, -1))
    assert torch.allclose(tokens[:, 1], 0.1 * aug.sum(1, keepdim=True) + net.aug_emb.bias, atol=1e-6)
    assert torch.allclose(tokens[:, 2], net.label_emb.weight[y] + net.pos_embed[0, 0], atol=1e-6)
    assert torch.allclose(tokens[:, 3], e_t + net.pos_embed[0, 1], atol=1e-6)
    other = x.clone()
    other[:, :, 2:4, 4:6] += 1  # the patch in the second row, third column of 4
    assert (tokens - net.tokens(other, e_t, y, aug)).abs().amax((0, 2)).nonzero().tolist() == [[4 + 4 + 2]]


def test_block_of_the_uvit():
    """Norms come before, both branches are added, and the long skip is mapped from [x, skip]."""
    block, x, skip = V.UViTBlock(16, 2, False, skip=True), rand(2, 5, 16), rand(2, 5, 16, seed=1)
    say(block.skip_linear, torch.cat([torch.eye(16), -2 * torch.eye(16)], dim=1))
    say(block.attn.proj)
    say(block.mlp.fc2)
    assert torch.allclose(block(x, skip), x - 2 * skip, atol=1e-5)
    block = V.UViTBlock(16, 2, False, skip=False)
    say(block.attn.proj, bias=1.0)
    say(block.mlp.fc2, bias=3.0)
    assert torch.allclose(block(x), x + 4, atol=1e-5)
    for silent in (block.attn.proj, block.mlp.fc2):  # one branch each: it does not see how large x is
        block = V.UViTBlock(16, 2, False, skip=False)
        say(block.attn.proj if silent.out_features == silent.in_features else block.mlp.fc2)
        assert torch.allclose(block(10 * x) - 10 * x, block(1000 * x) - 1000 * x, atol=1e-2)
    assert block.mlp.act(torch.tensor([1.0])).item() == pytest.approx(0.5 * (1 + math.erf(0.5**0.5)), abs=1e-6)
    assert block.mlp.fc1.out_features == 64


def test_long_skips_of_the_uvit():
    """The first block out takes the last block in."""
    net, left, right = V.UViT(8, 2, 16, 5, 2), [], []
    for block in net.in_blocks:
        block.register_forward_hook(lambda _, __, out: left.append(out))
    for block in net.out_blocks:
        block.register_forward_pre_hook(lambda _, args: right.append(args[1]))
    net(rand(1, 3, 8, 8), torch.rand(1))
    assert len(left) == 2 and all(a.equal(b) for a, b in zip(left, reversed(right), strict=True))


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_patches_fold_back(kind):
    """Token (row, column) fills its patch; in it the numbers run over rows, then columns, then channels."""
    if kind == "uvit":
        net = V.UViT(6, 2, 16, 3, 2, cls_token=True)
        last = net.decoder_pred
        copy_pixel(net.final_layer, 1, 1)
    else:
        net = D.DiT(3, 6, 2, 16, 2, 2)
        last = net.final_layer["linear"]
    last.register_forward_hook(lambda *_: torch.arange(9.0 * 12).view(1, 9, 12))
    out, want = net(rand(1, 3, 6, 6), torch.rand(1)), torch.empty(1, 3, 6, 6)
    for channel, y, x in np.ndindex(3, 6, 6):
        want[0, channel, y, x] = 12 * (y // 2 * 3 + x // 2) + 6 * (y % 2) + 3 * (x % 2) + channel
    assert out.equal(want)


# ---- DiT and its VA-VAE
def test_positions_of_the_dit():
    """Fixed table of 3 x 3 tokens, width 8: sines and cosines of the column, then of the row, frequencies 1, 0.01."""
    table = D.grid_positions(8, 3)
    assert table.shape == (1, 9, 8)
    for row, column in np.ndindex(3, 3):
        want = [f(k * place) for place in (column, row) for f in (math.sin, math.cos) for k in (1, 0.01)]
        assert table[0, 3 * row + column].tolist() == pytest.approx(want, abs=1e-6)
    net, x = D.DiT(3, 6, 2, 16, 2, 2), rand(1, 3, 6, 6)
    other = x.clone()
    other[:, :, 2:4, 4:6] += 1
    tokens = inputs_of(net.blocks[0])
    net(x, torch.rand(1)), net(other, torch.rand(1))
    assert (tokens[0][0] - tokens[1][0]).abs().amax((0, 2)).nonzero().tolist() == [[5]]
    say(net.x_embedder.proj)
    net(x, torch.rand(1))
    assert torch.allclose(tokens[2][0], D.grid_positions(16, 3), atol=1e-6) and not net.pos_embed.requires_grad


def test_rotary_turns_pairs_by_row_then_column():
    """Head width 8 on 3 x 3 tokens: pairs turn by row, row / 100, column, column / 100; products see differences."""
    rotary = D.Rotary(8, 3)
    out = rotary(torch.tensor([1.0, 0.0] * 4).expand(1, 1, 9, 8))[0, 0]
    for row, column in np.ndindex(3, 3):
        angles = [row, row / 100, column, column / 100]
        want = [f(a) for a in angles for f in (math.cos, math.sin)]
        assert out[3 * row + column].tolist() == pytest.approx(want, abs=1e-6)
    q, k = (rotary(rand(1, 1, 1, 8, seed=s).expand(1, 1, 9, 8))[0, 0] for s in range(2))
    products = q @ k.T
    assert products[0, 1].item() == pytest.approx(products[7, 8].item(), abs=1e-5)  # one column to the right
    assert products[1, 3].item() == pytest.approx(products[5, 7].item(), abs=1e-5)  # one row down, one column left
    assert abs(products[0, 1] - products[1, 0]) > 1e-3


@pytest.mark.parametrize("script", [V, D], ids=["uvit", "dit"])
def test_attention_over_tokens(script):
    """q, k, v in this order, each head its own slice, scale by the head's width; rotary turns q and k, never v."""
    x, rotary = rand(2, 9, 16), D.Rotary(8, 3)
    module = V.UViTAttention(16, 2, False) if script is V else D.DiTAttention(16, 2, False)
    say(module.qkv, rand(48, 16, seed=1) * 0.3)
    say(module.proj, torch.eye(16))
    q, k, v = (x @ module.qkv.weight[16 * i :][:16].T for i in range(3))
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        if script is V:
            heads.append(attend(q[..., part], k[..., part], v[..., part]))
        else:
            turned = [rotary(z[:, None, :, part])[:, 0] for z in (q, k)]
            heads.append(attend(*turned, v[..., part]))
    got = module(x) if script is V else module(x, rotary)
    assert torch.allclose(got, torch.cat(heads, dim=2), atol=1e-5)


def test_modulation_of_a_dit_block():
    """shift, scale, gate for attention, then for the MLP. A scale of -1 leaves the shift alone to be worked on."""
    x, e, rotary = rand(2, 9, 16), rand(2, 16), D.Rotary(8, 3)

    def block(*vectors):
        module = D.DiTBlock(16, 2, False)
        torch.manual_seed(0)
        for layer in (module.attn.qkv, module.attn.proj, module.mlp["w12"], module.mlp["w3"]):
            nn.init.normal_(layer.weight)
        say(module.adaLN_modulation[1], bias=torch.tensor(vectors).repeat_interleave(16))
        return module

    def swiglu(module, x):  # the first half is the gate
        a, b = module.mlp["w12"](x).split(42, dim=2)  # 8/3 of the width
        return module.mlp["w3"](a / (1 + (-a).exp()) * b)

    assert block(2.0, 3.0, 0.0, 4.0, 5.0, 0.0)(x, e, rotary).equal(x)
    module = block(2.0, -1.0, 0.5, 0.0, 0.0, 0.0)
    assert torch.allclose(module(x, e, rotary), x + 0.5 * module.attn(torch.full_like(x, 2.0), rotary), atol=1e-4)
    module = block(0.0, 0.0, 0.0, 2.0, -1.0, 0.5)
    want = x + 0.5 * swiglu(module, torch.full_like(x, 2.0))
    assert torch.allclose(module(x, e, rotary), want, rtol=1e-4, atol=1e-4)
    module = block(0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    assert torch.allclose(module(x, e, rotary), x + swiglu(module, 2 * module.norm2(x)), rtol=1e-4, atol=1e-4)


def test_last_layer_of_the_dit():
    """shift, then scale, of what SiLU leaves of e; T.UNet ends in silence, too."""
    for kind in ("vectors", "e"):
        net, seen = D.DiT(3, 6, 2, 16, 1, 2), []
        last, linear = net.final_layer["adaLN_modulation"][1], net.final_layer["linear"]
        assert net(rand(1, 3, 6, 6), torch.rand(1)).abs().max() == 0
        weight = torch.cat([torch.eye(16), torch.zeros(16, 16)]) if kind == "e" else 0.0
        say(last, weight, torch.tensor([2.0 if kind == "vectors" else 0.0] * 16 + [-1.0] * 16))
        net.t_embedder.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        tokens = inputs_of(linear)
        net(rand(2, 3, 6, 6), torch.rand(2))
        want = F.silu(seen[0])[:, None].expand(2, 9, 16) if kind == "e" else torch.tensor(2.0)
        assert torch.allclose(tokens[0][0], want, atol=1e-5)
    assert T.UNet(16, **T.BACKBONES["tiny"])(rand(2, 3, 16, 16), torch.rand(2)).abs().max() == 0


def test_posterior_of_the_vae():
    """Mean first, then the log variance, cut to [-30, 20]."""
    vae = D.VAE(32, 4)
    moments = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 100.0, -100.0]).view(1, 8, 1, 1)
    vae.quant_conv.register_forward_hook(lambda *_: moments)
    mean, std = vae.encode(torch.zeros(1, 3, 16, 16))
    assert mean.flatten().tolist() == [1, 2, 3, 4]
    assert std.flatten().tolist() == pytest.approx([1, math.e, math.exp(10), math.exp(-15)])


class Averages:
    """Stands for a VA-VAE: the latent is the mean colour of 16 x 16 pixels, without any spread."""

    post_quant_conv, quant_conv = SimpleNamespace(in_channels=3), nn.Conv2d(1, 1, 1)

    def encode(self, x):
        mean = F.avg_pool2d(x, 16)
        return mean, torch.zeros_like(mean)


def test_cache_holds_an_image_and_its_mirror_image(tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    pictures = rng.randint(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    pictures[:, :, 16:] //= 2  # the right half is darker
    for i, picture in enumerate(pictures):
        path = tmp_path / "data/mine/train/a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    (tmp_path / "vae.pt").touch()
    flags = ["--dataset", "mine", "--data", f"{tmp_path}/data", "--resolution", "32", "--vae", f"{tmp_path}/vae.pt"]
    monkeypatch.setattr(D, "load_vae", lambda *_: Averages())
    monkeypatch.setattr(D, "STATISTICS", 2)
    shutil.copytree(tmp_path / "data/mine/train", tmp_path / "data/mine/test")
    args = D.parse_args([*flags, "--cache-latents", f"{tmp_path}/cache", "--size", "tiny"])
    latents, labels, names = D.load_data(args, "train")
    latents = latents[:]
    want = pictures.reshape(5, 2, 16, 2, 16, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 127.5 - 1  # (5, 3, 2, 2)
    want = np.stack([want, want[..., ::-1]], axis=1)  # (5, 2, 3, 2, 2)
    moments = {pair: (want[list(pair)].mean((0, 1, 3, 4)), want[list(pair)].std((0, 1, 3, 4), ddof=1))
               for pair in combinations(range(5), 2)}
    (pair,) = [pair for pair, found in moments.items() if np.allclose(args.latents["mean"], found[0], atol=1e-5)]
    mean, std = moments[pair]
    assert pair != (0, 1) and np.allclose(args.latents["std"], std, atol=1e-4), "statistics are of random images"
    want = (want - mean[:, None, None]) / std[:, None, None]
    assert latents.dtype == torch.float16 and np.allclose(latents.double(), want, atol=5e-3)
    assert labels.tolist() == [0] * 5 and names == ["a"]
    flip = torch.tensor([True, False, True, False, False])
    assert np.allclose(D.to_x0(latents, flip), want[range(5), flip.int().tolist()], atol=5e-3)
    assert D.to_x0(latents).equal(latents[:, 0].float())


# ---- probe.py
def test_subset_of_the_probe_keeps_its_labels():
    model = SimpleNamespace(script=T, args=T.parse_args(["--dataset", "shapes"]))
    model.args.cache_latents = None  # as load_checkpoint leaves it
    images, labels, *_ = T.load_data(model.args, "test")
    known = {image.numpy().tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)}
    flags = SimpleNamespace(data=None, dataset=None, subset=50, seed=0)
    split = probe.load_split(model, flags, "test", torch.device("cpu"))
    found = [known[image.numpy().tobytes()] for image in split.images]
    assert found == split.labels.tolist() and len(found) == 50 and found != labels[:50].tolist()


# ---- fid.py
def test_images_reach_the_inception_by_half_pixels():
    """A ramp stays a ramp through the resize, from -1 (black) to 1 (white); nothing is averaged on the way down."""
    ramp = torch.arange(0, 256, 17).to(torch.uint8).expand(1, 3, 16, 16)
    place = ((torch.arange(299) + 0.5) * 16 / 299 - 0.5).clamp(0, 15)
    assert torch.allclose(fid.preprocess(ramp), (2 * 17 * place / 255 - 1).expand(1, 3, 299, 299), atol=1e-5)
    large = torch.randint(256, (1, 3, 897, 897), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.allclose(fid.preprocess(large), large[..., 1::3, 1::3] / 127.5 - 1, atol=1e-4)


@torch.no_grad()
def test_oddities_of_the_inception():
    """The averages leave the padding out, the last block takes maxima, batch norms have eps 0.001, fc no bias."""
    net = fid.Inception().eval()
    spot = torch.zeros(1, 1, 5, 5)
    spot[..., 0, 0], spot[..., 3, 3] = 4.0, 9.0
    mean, top = torch.zeros(5, 5), torch.zeros(5, 5)
    mean[:2, :2] = 4 * torch.tensor([[1 / 4, 1 / 6], [1 / 6, 1 / 9]])
    mean[2:, 2:] = 9 * torch.tensor([[1 / 9, 1 / 9, 1 / 6]] * 2 + [[1 / 6, 1 / 6, 1 / 4]])
    top[:2, :2], top[2:, 2:] = 4, 9
    for block, channels, want in (
        (net.Mixed_5b, 192, mean), (net.Mixed_6b, 768, mean), (net.Mixed_7b, 1280, mean), (net.Mixed_7c, 2048, top),
    ):  # fmt: skip
        seen = inputs_of(block.branch_pool.conv)
        block(spot.expand(1, channels, 5, 5))
        assert torch.allclose(seen[0][0][0, 0], want, atol=1e-5)
    conv = net.Mixed_5b.branch1x1
    say(conv.conv, 1 / 192)
    conv.bn.running_var.zero_()
    x = torch.tensor([2.0, -2.0]).view(2, 1, 1, 1).expand(2, 192, 1, 1)
    assert conv(x)[:, 0, 0, 0].tolist() == pytest.approx([2 / 0.001**0.5, 0])
    for name, _ in list(net.named_children()):
        if name != "fc":
            setattr(net, name, nn.Identity())
    feat, logits = net(rand(2, 2048, 3, 3))
    assert torch.allclose(feat, rand(2, 2048, 3, 3).flatten(2).sum(2) / 9, atol=1e-6)
    assert torch.allclose(logits, feat.double() @ net.fc.weight.double().T) and logits.dtype == torch.float64


def test_an_image_is_measured_alone(tmp_path, capsys):
    """The loaded Inception normalises by its stored statistics, not by the batch, and learns nothing."""
    torch.save(fid.Inception().state_dict(), tmp_path / "random.pth")
    net, x = fid.load_inception(tmp_path / "random.pth", "cpu"), rand(3, 3, 35, 35)
    assert torch.allclose(net.Conv2d_1a_3x3(x)[:1], net.Conv2d_1a_3x3(x[:1]), atol=1e-6)
    assert not any(p.requires_grad for p in net.parameters()) and "compare with no others" in capsys.readouterr().err
