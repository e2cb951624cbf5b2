"""train_uvit.py: parity with the official U-ViT, the [CLS] token, the mask, labels, and runs as its user makes them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import check_equal_steps, check_resumed, distance, launch, load, metrics
from PIL import Image

import probe
import sample
import train_uvit as V

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--size", "tiny", "--batch", "8"]
GRID = V.save_grid


def network(seed=0, **kw):
    """A small U-ViT with no weight left at its initial value."""
    torch.manual_seed(seed)
    net = V.UViT(8, 2, 32, 5, 2, **kw)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def batch(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), 999 * torch.rand(n, generator=g)


def official(name):
    """in_1 -> in_block_0, mid -> mid_block, out_2 -> out_block_1."""
    stage, _, i = name.partition("_")
    return f"{stage}_block" + (f"_{int(i) - 1}" if i else "")


# ---- parity and sizes
@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_class"])
def test_parity(golden, name):
    """Every block's tokens, their pooled means and the output; 10 label rows are 9 classes and the null class."""
    f, blocks = golden(name), {}
    net = V.UViT(16, 2, 64, 5, 4, classes=9 if name == "uvit_class" else 0)
    net.load_state_dict(f.weights())
    net.eval().requires_grad_(False)
    assert sum(p.numel() for p in net.parameters()) == f.param_count
    x, t, y = (f.inputs.get(k) for k in "xty")
    f.check("tokens", net.tokens(x, V.time_sinusoid(t, 64), y, None))
    f.check("final", net.run(x, t, y, None, maps=blocks)[0])
    f.check("final", net(x, t, y))
    assert list(blocks) == net.layers == ["in_1", "in_2", "mid", "out_1", "out_2"]
    for k, h in blocks.items():
        f.check(official(k), h)
    for k, v in net.features(x, t, y).items():
        f.check(f"gap_{official(k)}", v)


def test_full_size_parameter_counts():
    def count(*flags):
        args = V.parse_args(["--dataset", "cifar100", *flags])
        args.classes = [str(i) for i in range(100)]
        with torch.device("meta"):
            return sum(p.numel() for p in V.build(args)[0].parameters())

    assert count() == 44_255_328
    assert count("--cls-token") == 44_255_328 + 2 * 512  # the token and its position
    assert count("--cls-token", "--aug", "0.12") == 44_255_328 + 2 * 512 + 10 * 512  # a linear map of the 9-vector
    assert count("--cond") == 44_255_328 + 102 * 512  # 100 classes, the null class, one more position


# ---- [CLS] and the mask
def block(masked):
    torch.manual_seed(0)
    return V.UViTBlock(32, 4, masked, skip=False), torch.randn(2, 7, 32)


@pytest.mark.parametrize(("changed", "blind"), [(0, 1), (1, 0)])
def test_mask_between_cls_and_augmentation(changed, blind):
    """In one block the two tokens do not reach each other but reach and see all others; without the mask they do."""
    for masked in (True, False):
        module, x = block(masked)
        other = x.clone()
        other[:, changed] += torch.randn(32)
        moved = (module(x) - module(other)).abs().amax(dim=(0, 2)) > 1e-6  # which of the 7 tokens
        want = torch.ones(7, dtype=torch.bool)
        want[blind] = not masked
        assert moved.equal(want)
        other = x.clone()
        other[:, 2:] += torch.randn(5, 32)
        assert ((module(x) - module(other)).abs().amax(dim=(0, 2)) > 1e-6).all()


def test_mask_equals_an_explicit_one():
    """Values and gradients, against one attention over all rows with a full mask."""
    module, x = block(masked=True)
    attn, x = module.attn, x.requires_grad_()
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = False
    q, k, v = attn.qkv(x).view(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
    want = attn.proj((scores.softmax(3) @ v).transpose(1, 2).reshape(2, 7, 32))
    got = attn(x)
    assert torch.allclose(got, want, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), [x, *attn.parameters()]) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_label_reaches_cls_through_the_patches_only():
    """In the network: [CLS] is the same after the first block whatever the label, and differs from the second on."""
    net = network(cls_token=True, aug_dim=9)
    x, t = batch()
    seen = []
    for aug in (None, torch.ones(3, 9)):
        found = {}
        net.run(x, t, None, aug, maps=found)
        seen.append({name: h[:, 0] for name, h in found.items()})
    same = [torch.allclose(seen[0][k], seen[1][k], atol=1e-6) for k in net.layers]
    assert same == [True, False, False, False, False]
    assert not any(b.attn.masked for b in network(cls_token=True).in_blocks)  # nothing to be masked from


def test_cls_gathers_and_redistributes():
    """The image determines [CLS], and [CLS] reaches the output; image tokens keep their places behind it."""
    net = network(cls_token=True, layer="out_1", feat_pool="cls")
    x, t = batch()
    feat, _ = net.encode(x, t)
    assert feat.equal(net.features(x, t, pool="cls")["out_1"]) and not feat[0].allclose(feat[1])
    (grad,) = torch.autograd.grad(net(x, t).square().sum(), net.cls_token)
    assert grad.abs().max() > 0
    plain = network()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("cls")})
    assert net.length == plain.length and not plain(x, t).allclose(net(x, t), atol=1e-4)
    blocks = {}
    net.run(x, t, None, None, maps=blocks)
    assert blocks["mid"].shape == (3, 18, 32)  # [CLS], time, 16 patches
    assert net.features(x, t)["mid"].allclose(blocks["mid"][:, 2:].mean(1), atol=1e-6)
    token = net.features(x, t, pool="token")["mid"]
    assert all((blocks["mid"][i, 2:] == token[i]).all(1).any() for i in range(3))


@pytest.mark.parametrize("target", ["cls", "gap"])
def test_teacher_stops_at_the_layer(target):
    net, calls = network(cls_token=True, aug_dim=9, layer="out_1", feat_pool=target), []
    for b in [*net.in_blocks, net.mid_block, *net.out_blocks]:
        b.register_forward_hook(lambda *_: calls.append(1))
    x, t = batch()
    aug = torch.randn(3, 9)
    out, feat, e_t = net(x, t, aug=aug, with_feat=True)
    assert len(calls) == 5 and feat.shape == e_t.shape == (3, 32) and feat.dtype == torch.float32
    calls.clear()
    assert all(a.equal(b) for a, b in zip(net.encode(x, t, aug=aug), (feat, e_t), strict=True)) and len(calls) == 4
    assert out.equal(net(x, t, aug=aug))


def test_zero_label_equals_no_label():
    net = network(cls_token=True, aug_dim=9)
    x, t = batch()
    assert net(x, t).equal(net(x, t, aug=torch.zeros(3, 9)))
    assert not net(x, t).allclose(net(x, t, aug=torch.ones(3, 9)), atol=1e-3)


def test_null_class():
    x, t = batch()
    net = network(classes=4)
    assert net.label_emb.weight.shape == (5, 32)
    assert net(x, t).equal(net(x, t, torch.full((3,), 4)))
    assert not net(x, t).allclose(net(x, t, torch.tensor([0, 1, 2])), atol=1e-4)
    mixed = net(x, t, torch.tensor([0, -1, 2]))  # -1 is the null class, too
    assert mixed[1].allclose(net(x, t)[1], atol=1e-5) and not mixed[0].allclose(net(x, t)[0], atol=1e-4)


def test_network_refuses_what_it_cannot_take():
    net = network()
    with pytest.raises(ValueError, match="x must be"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="no classes for y"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="no aug_dim for aug"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), aug=torch.zeros(1, 9))
    with pytest.raises(ValueError, match="with --cls-token"):
        net.features(torch.zeros(1, 3, 8, 8), torch.zeros(1), pool="cls")
    with pytest.raises(ValueError, match="there are gap, token"):
        network(cls_token=True).features(torch.zeros(1, 3, 8, 8), torch.zeros(1), pool="mean")
    for kw, says in (({"layer": "out_9"}, "in_1, in_2, mid"), ({"feat_pool": "cls"}, "needs --cls-token")):
        with pytest.raises(ValueError, match=says):
            network(**kw)
    with pytest.raises(ValueError, match="do not divide"):
        V.UViT(16, 3, 32, 5, 2)
    with pytest.raises(ValueError, match="depth 4 must be odd"):
        V.UViT(16, 2, 32, depth=4, heads=2)
    with pytest.raises(ValueError, match="width 36 a multiple of 2 x 8 heads"):
        V.UViT(16, 2, 36, depth=5, heads=8)


# ---- optimiser, defaults
def test_decay_groups():
    """[P]: no decay on biases and position embeddings; everything else decays, [CLS] too."""
    args = V.parse_args([*TINY, "--cls-token", "--cond", "--cl", "0.01"])
    args.classes = V.SHAPES
    objective = V.Objective(*V.build(args), args)
    optimizer = V.make_optimizer(objective, args)
    names = {id(p): name for name, p in objective.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert set(groups) == {0.03, 0.0} and set.union(*groups.values()) == set(names.values())
    first = {"net.mid_block." + k for k in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    decay = {f"{k}.weight" for k in first} | {"net.cls_token", "net.label_emb.weight", "net.aug_emb.weight"}
    decay |= {"net.patch_embed.proj.weight", "net.norm.weight", "net.decoder_pred.weight", "net.final_layer.weight"}
    decay |= {"net.out_blocks.0.skip_linear.weight", "head.predictor.linear.0.weight", "head.projector.time.0.weight"}
    still = {f"{k}.bias" for k in first - {"net.mid_block.attn.qkv"}} | {"net.pos_embed", "net.cls_pos_embed"}
    still |= {"net.patch_embed.proj.bias", "net.norm.bias", "net.decoder_pred.bias", "net.final_layer.bias"}
    still |= {"net.aug_emb.bias", "net.out_blocks.0.skip_linear.bias", "head.projector.norm.0.bias"}
    assert decay <= groups[0.03] and still <= groups[0.0]
    assert all(name.endswith((".bias", "pos_embed")) for name in groups[0.0])
    assert not any(name.endswith((".bias", "pos_embed")) for name in groups[0.03])
    assert all(g["betas"] == (0.99, 0.999) for g in optimizer.param_groups)


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["--dataset", "cifar100", "--cls-token", "--cl", "0.01"],
         {"model": "ddpm", "size": "S", "patch": 2, "layer": "out_2", "cl_t": 11, "cl_target": "cls", "aug": 0.12,
          "batch": 256, "epochs": 2000, "lr": 4e-4, "warmup": 13, "ema": 0.9999, "cond": False, "cooldown": 0}),
        (["--dataset", "tiny-imagenet"], {"patch": 4, "layer": "out_1", "cl_t": 66, "resolution": 64, "aug": 0}),
        (["--cl", "0.01", "--cl-target", "gap", "--cls-token"], {"cl_target": "gap"}),
        (["--cl", "0.01"], {"cl_target": "gap"}),
        (["--dataset", "cifar10", "--epochs", "1000"], {"layer": "out_2", "cl_t": 11, "warmup": 13, "cls_token": 0}),
        (["--patch", "2", "--dataset", "tiny-imagenet"], {"patch": 2}),
    ],
)  # fmt: skip
def test_defaults_are_the_papers(flags, want):
    args = vars(V.parse_args(flags))
    assert {k: args[k] for k in want} == want


def test_ddpm_time_is_below_1000():
    """[P]: the network sees t in [0, 1000); the factor is that of the public weights' training, 999 per unit time."""
    _, diffusion = V.build(V.parse_args(TINY))
    _, t = diffusion.inputs(torch.zeros(2, 3, 16, 16), torch.tensor([1, 1000]), torch.zeros(2, 3, 16, 16))
    assert t.tolist() == pytest.approx([0.999, 999])


def test_labels_of_views():
    """A tenth is told the null class, every image by its own draw; without --cond no label is."""
    labels = torch.arange(2000) % 10
    images = torch.randint(256, (2000, 3, 4, 4), dtype=torch.uint8)
    draws = V.draw_numbers(2000, (3, 4, 4), V.DDPM(0.999), torch.Generator().manual_seed(0))
    view = V.make_view(images[:500], labels[:500], draws, slice(1000, 1500), V.parse_args([*TINY, "--cond"]))
    assert view["level"].equal(draws["level"][1000:1500]) and view["noise"].equal(draws["noise"][1000:1500])
    view = V.make_view(images, labels, draws, slice(None), V.parse_args([*TINY, "--cond"]))
    null = view["y"] == -1
    assert view["y"][~null].equal(labels[~null]) and null.float().mean() == pytest.approx(0.1, abs=0.02)
    mirrored = draws["flip"]
    assert view["x0"].equal(V.to_x0(images, mirrored)) and 0.45 < mirrored.float().mean() < 0.55 and view["aug"] is None
    view = V.make_view(images, labels, draws, slice(None), V.parse_args([*TINY, "--aug", "1"]))
    assert view["y"] is None and view["aug"].shape == (2000, 9)


# ---- runs
def train(out, *flags):
    """Run the script in this process; returns its lines of metrics."""
    V.main(V.parse_args([*TINY, "--out", str(out), *flags]))
    return metrics(out)


def test_resume_repeats_an_unbroken_run_bit_for_bit(tmp_path):
    flags = ["--cls-token", "--cond", "--cl", "0.01", "--epochs", "2"]
    whole = train(tmp_path / "a", *flags, "--max-steps", "10")
    train(tmp_path / "b", *flags, "--max-steps", "7")
    parts = train(tmp_path / "b", *flags, "--max-steps", "10", "--resume")
    check_resumed(tmp_path / "a", tmp_path / "b", whole, parts)


def test_cond_can_be_repeated_on_resume(tmp_path):
    train(tmp_path, "--cond", "--max-steps", "1")
    args = V.parse_args(["--out", str(tmp_path), "--cond", "--resume"])
    assert V.build(args)[0].classes == 10 and args.size == "tiny"
    V.main(V.parse_args([*TINY, "--out", str(tmp_path), "--cond", "--max-steps", "2", "--resume"]))
    assert load(tmp_path)["step"] == 2 and load(tmp_path)["ema"]["label_emb.weight"].shape == (11, 64)


def test_two_ranks_equal_one(tmp_path):
    """The user's own command, small: every step's loss, gradient norm and the weights."""
    flags = [*TINY, "--cls-token", "--cl", "0.01", "--epochs", "200", "--max-steps", "4"]
    for n in (1, 2):
        launch(n, "train_uvit.py", *flags, "--out", str(tmp_path / str(n)))
    check_equal_steps(tmp_path / "1", tmp_path / "2", rel=3e-5)
    assert distance(V, tmp_path / "1", tmp_path / "2") < 5e-3


def test_tools_take_it_through_the_seam(tmp_path, capsys, monkeypatch):
    """Trained with everything on, sampled, probed with all poolings; class-conditional labels are said."""
    monkeypatch.setattr(V, "save_grid", GRID)
    train(tmp_path, "--cls-token", "--cond", "--cl", "0.01", "--max-steps", "2")
    assert Image.open(tmp_path / "samples_last.png").size == (4 * 66 + 2, 4 * 66 + 2)
    capsys.readouterr()
    run = sample.parse_args([str(tmp_path), "--n", "12", "--steps", "2", "--out", str(tmp_path / "s.npz")])
    sample.main(run)
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (12, 16, 16, 3)
    assert "labels balanced" in capsys.readouterr().out
    found = {}
    for pool in ("gap", "token", "cls"):
        flags = [str(tmp_path), "--grid", "--t", "11", "--pool", pool, "--epochs", "1"]
        found[pool] = probe.main(probe.parse_args([*flags, "--subset", "64", "--batch", "32"]))[0]
        cells = found[pool]["cells"]
        assert [c["layer"] for c in cells] == ["in_1", "in_2", "mid", "out_1", "out_2"]
    assert found["cls"]["pools"] == ["cls"]


def test_labels_of_samples():
    assert sample.class_labels(range(8, 13), 10, "balanced", 0).tolist() == [8, 9, 0, 1, 2]
    a = sample.class_labels(range(200), 10, "random", 0)
    assert a[50:60].equal(sample.class_labels(range(50, 60), 10, "random", 0)) and set(a.tolist()) == set(range(10))
    assert not a.equal(sample.class_labels(range(200), 10, "random", 1))


def test_label_decides_what_is_sampled(tmp_path):
    """generate hands each image its own class, in pieces too."""
    train(tmp_path, "--cond", "--max-steps", "1")
    model = sample.load_checkpoint(tmp_path)
    ((_, whole, _),) = sample.generate(model, 6, steps=2)
    ((_, parts, _),) = sample.generate(model, 6, steps=2, batch=4)
    assert (whole.int() - parts.int()).abs().max() <= 1
    seen = []
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[2].tolist()))
    list(sample.generate(model, 12, steps=1, batch=8))
    assert seen[:2] == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 1]]


def test_a_run_is_named_after_the_flags_that_were_given():
    args = V.parse_args("--dataset cifar100 --cls-token --cl 0.01 --save-every 5".split())
    assert args.out == "runs/cifar100-uvit-cls-token-cl-0.01"


def test_init_makes_a_checkpoint_of_public_weights(tmp_path):
    """Official names in, with --max-steps 0 a checkpoint for the tools out, [CLS] added or not."""
    torch.manual_seed(1)
    source, _ = V.build(V.parse_args(TINY))
    torch.save(source.state_dict(), tmp_path / "public.pth")
    for extra in ([], ["--cls-token", "--aug", "0.1"]):
        out = tmp_path / f"run{len(extra)}"
        train(out, "--init", str(tmp_path / "public.pth"), "--max-steps", "0", *extra)
        model = sample.load_checkpoint(out)
        assert model.step == 0
        for k, v in source.state_dict().items():
            assert model.net.state_dict()[k].equal(v), k
    wrong, _ = V.build(V.parse_args([*TINY, "--resolution", "32"]))
    with pytest.raises(SystemExit) as stop:
        V.load_weights(wrong, tmp_path / "public.pth")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--resolution", "17"], "do not divide"), (["--layer", "out_7"], "in_1, in_2"),
        (["--cl-target", "cls"], "needs --cls-token"), (["--patch", "0"], "--patch must be above 0"),
        (["--cl-t", "0.06"], "whole steps"), (["--cl", "0.01", "--batch", "1"], "needs two or more"),
        (["--cls-token", "--resume"], "of another network"), (["--cond", "--resume"], "of another network"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(flags, says, tmp_path, capsys):
    if "--resume" in flags:
        train(tmp_path / "run", "--max-steps", "0")
        capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        V.main(V.parse_args([*TINY, "--out", str(tmp_path / "run"), *flags]))
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(err) == 1 and says in err[0], err


def test_blocks_run_in_bf16_autocast():
    """The feature and the time embedding stay in float32, and nothing strays far."""
    net = network(cls_token=True, aug_dim=9, layer="out_1", feat_pool="cls")
    x, t = batch()
    want, feat, _ = net(x, t, with_feat=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, low, e_t = net(x, t, with_feat=True)
    assert low.dtype == e_t.dtype == torch.float32
    assert F.cosine_similarity(low, feat).min() > 0.999
    assert (out.float() - want).abs().max() < 0.05 * want.abs().max()
