"""Networks and formulations: what the paper or a closed form fixes and no fixture shows."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, spy

import train_dit as D
import train_unet as T
import train_uvit as V


def unet(**kw):
    return T.UNet(16, **T.BACKBONES["tiny"], **kw)

def uvit(**kw):
    return V.UViT(8, 2, 32, 5, 2, **kw)

def dit(**kw):
    return D.DiT(3, 8, 2, 32, 4, 2, **kw)

NETWORKS = {  # a network, and how many of its blocks the teacher runs, of how many
    "unet": (lambda: unet(aug_dim=9, layer="out_3", self_cond="adaptive"), 12, 16),
    "uvit": (lambda: uvit(aug_dim=9, layer="out_1"), 4, 5),
    "uvit-cls": (lambda: uvit(aug_dim=9, layer="out_1", cls_token=True, feat_pool="cls"), 4, 5),
    "dit": (lambda: dit(classes=4, layer="3", self_cond="add"), 3, 4),
}
all_networks = pytest.mark.parametrize("name", NETWORKS)

def shaken(net):
    """The network with every weight moved off its initial value, zeros included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net

def case(name):
    """The network, its input (x, t), what else it is told, and its blocks in their order."""
    torch.manual_seed(0)
    net = shaken(NETWORKS[name][0]())
    told = {"y": torch.tensor([0, 2, 3])} if name == "dit" else {"aug": torch.randn(3, 9)}
    given = torch.randn(3, *net.shape), torch.rand(3)
    if name == "unet":
        return net, given, told, [*net.down, *net.middle.values(), *net.up]
    return net, given, told, net.blocks if name == "dit" else [*net.in_blocks, net.mid_block, *net.out_blocks]

# ---- all networks
@all_networks
def test_one_pass_and_the_teacher_stops_at_the_layer(name):
    """Self-conditioning and the feature cost no second pass: every block runs once, for the teacher some not at all."""
    net, given, told, blocks = case(name)
    _, some, every = NETWORKS[name]
    calls = []
    for block in blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    out, feat, e_t = net(*given, **told, with_feat=True)
    assert len(calls) == every
    assert feat.shape == (3, net.feat_dim) and e_t.shape == (3, net.emb_dim) and feat.dtype == torch.float32
    calls.clear()
    only_feat, only_e_t = net.encode(*given, **told)
    assert len(calls) == some and only_feat.equal(feat) and only_e_t.equal(e_t)
    assert net(*given, **told).equal(out)

@all_networks
def test_every_parameter_takes_part_in_a_pass(name):
    """DDP asks for that."""
    net, given, told, _ = case(name)
    net(*given, **told).square().mean().backward()
    assert [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None] == []

@pytest.mark.parametrize("name", ["unet", "uvit", "uvit-cls"])
def test_augmentation_label(name):
    """Zeros equal none. It does not touch e_t, by which the feature is weighed: that is time alone."""
    net, given, _, _ = case(name)
    zeros, ones = torch.zeros(3, 9), torch.ones(3, 9)
    assert torch.allclose(net(*given), net(*given, aug=zeros), atol=2e-5)
    assert not torch.allclose(net(*given), net(*given, aug=ones), atol=1e-3)
    assert net.encode(*given)[1].equal(net.encode(*given, aug=ones)[1])

@all_networks
def test_autocast_on_a_cpu(name, monkeypatch):
    """Blocks run in bf16, but attention does not, which there takes up to five times as long."""
    net, given, told, _ = case(name)
    want, found = net(*given, **told), []
    spy(monkeypatch, F, "scaled_dot_product_attention",
        lambda q, *_: found.append((q.dtype, torch.is_autocast_enabled("cpu"))))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*given, **told)
    assert set(found) == {(torch.float32, False)} and out.dtype == torch.bfloat16
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()

@pytest.mark.parametrize("make", [uvit, dit])
def test_null_class(make):
    """No label is that of the null class; so is -1, for one image of a batch, too."""
    net = shaken(make(classes=4))
    x, t = torch.randn(3, *net.shape), torch.rand(3)
    null, labelled = net(x, t), net(x, t, torch.tensor([0, 1, 2]))
    assert null.equal(net(x, t, torch.full((3,), 4))) and not torch.allclose(null, labelled, atol=1e-3)
    mixed = net(x, t, torch.tensor([0, -1, 2]))
    assert torch.allclose(mixed, torch.stack([labelled[0], null[1], labelled[2]]), atol=5e-5)

@pytest.mark.parametrize("name", ["uvit-cls", "dit"])
def test_pooled_tokens(name):
    """A random token is one of the image's own 16 patches, any of them; [CLS] is the first token of all."""
    net, (x, t), _, _ = case(name)
    x, t = x.repeat(20, 1, 1, 1), t.repeat(20)
    maps = {}
    net.run(x, t, maps=maps)
    tokens = maps[net.layer]
    drawn = net.features(x, t, pool="token")[net.layer]
    matches = (tokens[:, -16:] == drawn[:, None]).all(2)  # (60, 16)
    assert matches.any(1).all() and matches.any(0).sum() > 10
    assert name == "dit" or net.features(x, t, pool="cls")[net.layer].equal(tokens[:, 0])

T1, AUG, Y = torch.zeros(1), torch.zeros(1, 9), torch.zeros(1, dtype=torch.long)
X16, X8 = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8)

@pytest.mark.parametrize(("call", "says"), [
    (lambda: unet()(X8, T1), "x must be"),
    (lambda: unet()(X16, T1, Y), "no classes for y"),
    (lambda: unet()(X16, T1, aug=AUG), "no aug_dim for aug"),
    (lambda: unet(layer="out_99"), "out_1, out_2"),
    (lambda: T.UNet(16, **T.BACKBONES["tiny"] | {"width": 20}), "divisible"),  # group norm
    (lambda: unet().features(X16, T1, pool="cls"), "no tokens: use --pool gap, not cls"),
    (lambda: uvit()(X16, T1), "x must be"),
    (lambda: uvit()(X8, T1, Y), "no classes for y"),
    (lambda: uvit()(X8, T1, aug=AUG), "no aug_dim for aug"),
    (lambda: uvit().features(X8, T1, pool="cls"), "with --cls-token"),
    (lambda: uvit(cls_token=True).features(X8, T1, pool="mean"), "there are gap, token"),
    (lambda: uvit(layer="out_9"), "in_1, in_2, mid"),
    (lambda: uvit(feat_pool="cls"), "needs --cls-token"),
    (lambda: V.UViT(16, 3, 32, 5, 2), "do not divide"),
    (lambda: V.UViT(16, 2, 32, depth=4, heads=2), "depth 4 must be odd"),
    (lambda: V.UViT(16, 2, 36, depth=5, heads=8), "width 36 even and a multiple of 8 heads"),
    (lambda: dit()(X16, T1), "x must be"),
    (lambda: dit()(X8, T1, Y), "no classes for y"),
    (lambda: dit()(X8, T1, aug=AUG), "aug is given"),
    (lambda: dit().features(X8, T1, pool="cls"), "no .CLS. token"),
    (lambda: dit(layer="5"), "1, 2, 3, 4"),
    (lambda: dit(layer="4", self_cond="add"), "no decoder"),
    (lambda: D.DiT(3, 8, 2, 36, 4, 8), "width 36 is no multiple of 4 x 8"),
])  # fmt: skip
def test_networks_refuse_what_they_cannot_take(call, says):
    with pytest.raises(ValueError, match=says):
        call()

# ---- self-conditioning
@pytest.mark.parametrize("kind", ["adaptive", "add"])
@pytest.mark.parametrize(("make", "layer"), [(unet, "out_3"), (dit, "2")])
def test_self_conditioning_starts_as_the_baseline(make, layer, kind):
    """[P] Sec. 4: the zero-initialised MLP leaves the network's function, and its gradient there, unchanged."""
    base, plus = shaken(make(layer=layer)), make(layer=layer, self_cond=kind)
    plus.load_state_dict(base.state_dict(), strict=False)
    x, t = torch.randn(4, *base.shape), torch.rand(4)
    assert base(x, t).equal(plus(x, t))
    for net in (base, plus):
        net(x, t).square().mean().backward()
    gradients = {name: p.grad for name, p in base.named_parameters() if p.requires_grad}
    largest = max(grad.abs().max().item() for grad in gradients.values())
    for name, grad in gradients.items():
        assert torch.allclose(grad, plus.get_parameter(name).grad, rtol=0, atol=2e-5 * largest), name

@pytest.mark.parametrize("kind", ["adaptive", "add"])
def test_what_self_conditioning_adds(kind):
    """add: MLP(feat); adaptive: that, scaled by s(SiLU(e_t)), where s starts around 1."""
    module = T.SelfConditioning(6, 5, 8, kind)
    assert kind == "add" or module.scale.bias.equal(torch.ones(8))
    shaken(module)
    e, e_t, feat = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 6)
    want = module.mlp(feat)
    if kind == "adaptive":
        want = want * (e_t * torch.sigmoid(e_t) @ module.scale.weight.T + module.scale.bias)
    assert torch.allclose(module(e, e_t, feat) - e, want, atol=2e-5)

@pytest.mark.parametrize("kind", ["adaptive", "add"])
def test_gradients_reach_the_encoder_through_the_condition(kind):
    """The output depends on the pooled feature itself, and that on the encoder: nothing is detached."""
    net = shaken(unet(layer="out_2", self_cond=kind))
    out, feat, _ = net(torch.randn(4, 3, 16, 16), torch.rand(4), with_feat=True)
    (through,) = torch.autograd.grad(out.square().mean(), feat, retain_graph=True)
    (first,) = torch.autograd.grad(feat, net.image_proj.weight, through)
    assert through.abs().max() > 0 and first.abs().max() > 0

@pytest.mark.parametrize(("make", "layer", "later"), [
    (unet, "out_2", ["out_3", "out_4", "out_5", "out_6"]), (dit, "2", ["3", "4"])])  # fmt: skip
def test_only_the_decoder_sees_the_condition(make, layer, later):
    """Changing the condition leaves every layer up to --layer alone and changes every later one."""
    net = shaken(make(layer=layer, self_cond="add"))
    x, t = torch.randn(4, *net.shape), torch.rand(4)
    before = net.features(x, t)
    with torch.no_grad():
        net.self_cond.mlp[2].bias.add_(1)
    after = net.features(x, t)
    assert [k for k in before if not before[k].equal(after[k])] == later

# ---- sizes
LATENTS = "--cache-latents none-yet"

@pytest.mark.parametrize(("script", "flags", "count"), [
    (T, "--backbone ddpm", 35_746_307),
    (T, "--backbone ddpm --self-cond", 35_746_307 + 460_032),  # [P] Sec. 4: 0.460 M
    (T, "--backbone ddpmpp", 56_524_291),
    (T, "--backbone ddpmpp --aug 0.1", 56_525_443),
    (T, "--backbone ddpmpp --aug 0.1 --self-cond", 56_525_443 + 460_032),
    (V, "", 44_255_328),
    (V, "--cls-token", 44_255_328 + 2 * 512),  # the token and its position
    (V, "--cls-token --aug 0.12", 44_255_328 + 2 * 512 + 10 * 512),  # a linear map of the 9-vector
    (V, "--cond", 44_255_328 + 102 * 512),  # 100 classes, the null class, one more position
    (D, LATENTS, 129_787_424),
    (D, LATENTS + " --cond", 129_787_424 + 101 * 768),
    (D, LATENTS + " --self-cond", 129_787_424 + 1_378_304),  # [P]: 1.38 M
    (D, LATENTS + " --qk-norm", 129_787_424 + 12 * 2 * 64),
])  # fmt: skip
def test_full_size_parameter_counts(script, flags, count):
    args = script.parse_args(["--dataset", "cifar100", *flags.split()])
    args.classes, args.latents = [str(i) for i in range(100)], {"mean": [0.0] * 32}
    with torch.device("meta"):
        net, _ = script.build(args)
    assert sum(p.numel() for p in net.parameters()) == count

@pytest.mark.parametrize("resolution", [16, 32, 64])
@pytest.mark.parametrize("backbone", T.BACKBONES)
def test_unets_attend_at_16_pixels_and_in_the_middle(backbone, resolution):
    found, net = [], T.UNet(resolution, **T.BACKBONES[backbone] | {"width": 32})
    for block in [*net.down, *net.up]:
        if isinstance(block, T.UNetBlock):
            block.register_forward_hook(lambda block, _, out: found.append((out.shape[-1], type(block.attn))))
    net(torch.zeros(1, 3, resolution, resolution), torch.zeros(1))
    levels, blocks = len(T.BACKBONES[backbone]["mult"]), T.BACKBONES[backbone]["blocks"]
    assert len(found) == levels * (2 * blocks + 1)
    assert all((kind is T.Attention) == (side == 16) for side, kind in found)
    assert 16 in {side for side, _ in found} and type(net.middle["attn"]) is T.Attention

# ---- public weights
WRAPPINGS = {  # the ways in which files hold weights; trained ones may lie beside the average
    "plain": dict,
    "DDP": lambda weights: {"MODEL": {f"module.net.{k}": v for k, v in weights.items()}},  # [DDAE]
    "module": lambda weights: {"ema": {f"module.{k}": v for k, v in weights.items()}},
    "ema_pytorch": lambda weights: {
        "MODEL": {k: v + 1 for k, v in weights.items()},
        "EMA": {"initted": torch.tensor(True), **{f"online_model.{k}": v + 1 for k, v in weights.items()},
                **{f"ema_model.{k}": v for k, v in weights.items()}}},
}  # fmt: skip

@pytest.mark.parametrize(("script", "public", "ours", "wrapping", "says"), [
    (T, "", "--self-cond --aug 0.1", "DDP", None),  # [P] adds to public weights
    (T, "", "--self-cond --aug 0.1", "ema_pytorch", None),
    (V, "", "--cls-token --aug 0.1", "plain", None),
    (D, "--qk-norm", "--qk-norm --self-cond", "module", None),
    (D, "--self-cond --cond", "--self-cond --cond", "module", None),
    (D, "--qk-norm --cond", "--cond", "module", "unexpected ['blocks.0.attn.q_norm.weight'"),
    (D, "--self-cond", "", "module", "unexpected ['self_cond.mlp.0.weight'"),
    (D, "", "--cond", "module", "missing ['y_embedder.embedding_table.weight']"),
])  # fmt: skip
def test_init_takes_all_weights_or_none(script, public, ours, wrapping, says, tmp_path, capsys):
    nets = []
    for flags in (public, ours):
        args = script.parse_args(["--backbone" if script is T else "--size", "tiny", *flags.split()])
        args.classes = script.SHAPES
        nets.append(script.build(args)[0])
    source = {k: v + 1 for k, v in nets[0].state_dict().items()}
    torch.save(WRAPPINGS[wrapping](source), tmp_path / "public.pt")
    if says:
        assert says in refused(capsys, script.load_weights, nets[1], tmp_path / "public.pt")
    else:
        script.load_weights(nets[1], tmp_path / "public.pt")
        assert all(nets[1].state_dict()[k].equal(v) for k, v in source.items())

# ---- formulations
def test_rk45_follows_the_exact_flow():
    """Of data ~ N(0, s^2): it is linear, x0 = s noise."""
    s, calls = 0.2, []
    noise = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)

    def velocity(x, t, y=None):
        calls.append(1)
        t = t.view(-1, 1, 1, 1)
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    assert (T.RF().sample(velocity, noise) - s * noise).abs().max() < 1e-4
    assert 20 < len(calls) < 400

@pytest.mark.parametrize("good", [0, 5])
def test_rk45_ends_where_the_network_returns_nan(good):
    """From the first evaluation on, or midway: it says so, and does not search for a step size for ever."""
    calls = []

    def net(x, t, y=None):
        calls.append(1)
        return x if len(calls) <= good else x * math.nan

    with pytest.raises(FloatingPointError, match="the network gave NaN"):
        T.RF().sample(net, torch.ones(1, 3, 2, 2))
    assert len(calls) < 100

@pytest.mark.parametrize(("diffusion", "good", "bad", "says"), [
    (T.DDPM(1e-3), (0, 66, 1000), (-1, 1001, math.nan, 0.06), "whole steps from 0 to 1000"),
    (T.EDM(), (0.002, 0.06, 80.0), (0.001, 81.0, math.nan), "sigma from 0.002 to 80.0"),
    (T.RF(), (0, 0.06, 1), (-0.1, 1.1, math.nan), "times from 0 to 1"),
], ids=["ddpm", "edm", "rf"])  # fmt: skip
def test_noise_levels(diffusion, good, bad, says):
    """A level is a number or one of each image; the lowest leaves the image nearly as it is."""
    x0, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    assert torch.allclose(diffusion.add_noise(x0, good[0], noise), x0, atol=0.02)
    assert diffusion.add_noise(x0, good[1], noise).equal(diffusion.add_noise(x0, torch.full((4,), good[1]), noise))
    for level in good:
        diffusion.check_level(level)
    for level in bad:
        with pytest.raises(ValueError, match=says):
            diffusion.check_level(level)
    with pytest.raises(ValueError, match="shape"):
        diffusion.add_noise(x0, torch.full((3,), good[0]), noise)
