"""train_uvit.py: the [CLS] token, the mask, labels, flags, and runs as its user makes them."""

import pytest
import torch
from conftest import check_resumed, load, make_checkpoint, metrics, refused

import sample
import train_uvit as V

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--size", "tiny", "--batch", "8"]

def network(**kw):
    """A small U-ViT with no weight left at its initial value."""
    torch.manual_seed(0)
    net = V.UViT(8, 2, 32, 5, 2, **kw)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net

def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 8, 8, generator=generator), 999 * torch.rand(3, generator=generator)

def build(*flags):
    """The network of these flags, as it is before training, and its diffusion."""
    args = V.parse_args([*TINY, *flags])
    args.classes = V.SHAPES
    return *V.build(args), args

def train(out, *flags):
    """Run the script in this process; returns its lines of metrics."""
    V.main(V.parse_args([*TINY, "--out", str(out), *flags]))
    return metrics(out)

# ---- tokens
def test_cls_and_augmentation_come_before_all_other_tokens():
    """Neither shares the table of positions; the others are as without them (tests/test_golden.py)."""
    net, plain = network(classes=4, aug_dim=9, cls_token=True), network(classes=4)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(("cls_", "aug_"))})
    (x, _), e_t, aug, y = batch(), torch.randn(3, 32), torch.randn(3, 9), torch.tensor([3, 0, 1])
    tokens = net.tokens(x, e_t, y, aug)
    assert tokens.shape == (3, 4 + 16, 32)
    assert torch.allclose(tokens[:, 0], (net.cls_token + net.cls_pos_embed)[0].expand(3, -1), atol=2e-5)
    assert torch.allclose(tokens[:, 1], aug @ net.aug_emb.weight.T + net.aug_emb.bias, atol=2e-5)
    assert torch.allclose(tokens[:, 2:], plain.tokens(x, e_t, y, None), atol=2e-5)

def test_mask_between_cls_and_augmentation():
    """Values and gradients of masked attention, against one over all rows with an explicit mask."""
    torch.manual_seed(0)
    attn, x = V.UViTAttention(32, 4, masked=True), torch.randn(2, 7, 32, requires_grad=True)
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = False
    q, k, v = attn.qkv(x).view(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
    want = attn.proj((scores.softmax(3) @ v).transpose(1, 2).reshape(2, 7, 32))
    got = attn(x)
    assert torch.allclose(got, want, atol=2e-5)
    grads = [torch.autograd.grad(out.square().sum(), [x, *attn.parameters()]) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-5 * b.abs().max().item())

@pytest.mark.parametrize(("flags", "masked"), [
    (["--cls-token"], False), (["--cls-token", "--cl", "1"], True), (["--aug", "0.1"], False)])  # fmt: skip
def test_all_blocks_are_masked_where_there_are_both_tokens(flags, masked):
    """[P] Fig. 2b; --cl brings the augmentation."""
    net, *_ = build(*flags)
    assert {block.attn.masked for block in [*net.in_blocks, net.mid_block, *net.out_blocks]} == {masked}

def test_poolings():
    """[CLS] is token 0, the image's are the last; a random one is of this image. The output depends on [CLS]."""
    net, (x, t), maps = network(cls_token=True), batch(), {}
    net.run(x, t, None, None, maps=maps)
    tokens = maps["mid"]
    assert tokens.shape == (3, 18, 32)  # [CLS], time, 16 patches
    assert net.features(x, t, pool="cls")["mid"].equal(tokens[:, 0])
    assert torch.allclose(net.features(x, t)["mid"], tokens[:, 2:].mean(1), atol=2e-5)
    token = net.features(x, t, pool="token")["mid"]
    assert all((tokens[i, 2:] == token[i]).all(1).any() for i in range(3))
    (grad,) = torch.autograd.grad(net(x, t).square().sum(), net.cls_token)
    assert grad.abs().max() > 0

def test_null_class():
    """It is the last row; -1 and no label at all mean it, too."""
    net, (x, t) = network(classes=4), batch()
    assert net.label_emb.weight.shape == (5, 32)
    null, labelled = net(x, t), net(x, t, torch.tensor([0, 1, 2]))
    assert null.equal(net(x, t, torch.full((3,), 4))) and not null.allclose(labelled, atol=1e-4)
    mixed = net(x, t, torch.tensor([0, -1, 2]))
    assert torch.allclose(mixed[1], null[1], atol=2e-5) and torch.allclose(mixed[[0, 2]], labelled[[0, 2]], atol=2e-5)

# ---- optimiser, flags
def test_decay_groups():
    """[P]: no decay on biases and position embeddings; everything else decays, [CLS] too."""
    net, diffusion, args = build("--cls-token", "--cond", "--cl", "0.01")
    objective = V.Objective(net, diffusion, args)
    optimizer = V.make_optimizer(objective, args)
    names = {id(p): name for name, p in objective.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert groups.keys() == {0.03, 0.0} and set.union(*groups.values()) == set(names.values())
    assert groups[0.0] == {name for name in names.values() if name.endswith((".bias", "pos_embed"))}
    assert {"net.cls_token", "net.label_emb.weight", "head.projector.time.0.weight"} <= groups[0.03]
    assert {"net.pos_embed", "net.cls_pos_embed", "net.aug_emb.bias"} <= groups[0.0]
    assert all(g["betas"] == (0.99, 0.999) for g in optimizer.param_groups)

@pytest.mark.parametrize(("flags", "want"), [
    (["--dataset", "cifar100", "--cls-token", "--cl", "0.01"],
     {"model": "ddpm", "size": "S", "patch": 2, "layer": "out_2", "cl_t": 11, "cl_target": "cls", "aug": 0.12,
      "batch": 256, "epochs": 2000, "lr": 4e-4, "warmup": 13, "ema": 0.9999, "cond": False, "cooldown": 0}),
    (["--dataset", "tiny-imagenet"], {"patch": 4, "layer": "out_1", "cl_t": 66, "resolution": 64, "aug": 0}),
    (["--cl", "0.01", "--cl-target", "gap", "--cls-token"], {"cl_target": "gap"}),
    (["--cl", "0.01"], {"cl_target": "gap"}),
    (["--dataset", "cifar10", "--epochs", "1000"], {"layer": "out_2", "cl_t": 11, "warmup": 13, "cls_token": 0}),
    (["--patch", "2", "--dataset", "tiny-imagenet"], {"patch": 2}),
    (["--dataset", "cifar100", "--cls-token", "--cl", "0.01", "--save-every", "5"],  # named after the flags given
     {"out": "runs/cifar100-uvit-cls-token-cl-0.01"}),
])  # fmt: skip
def test_defaults_are_the_papers(flags, want):
    args = vars(V.parse_args(flags))
    assert {k: args[k] for k in want} == want

@pytest.mark.parametrize(("flags", "says"), [
    (["--resolution", "17"], "do not divide"), (["--layer", "out_7"], "in_1, in_2"),
    (["--cl-target", "cls"], "needs --cls-token"), (["--patch", "0"], "--patch must be above 0"),
    (["--cl-t", "0.06"], "whole steps"), (["--cl", "0.01", "--batch", "1"], "needs two or more"),
    (["--cls-token", "--resume"], "of another network"), (["--cond", "--resume"], "of another network"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(flags, says, tmp_path, capsys):
    if "--resume" in flags:
        train(tmp_path, "--max-steps", "0")
        capsys.readouterr()
    assert says in refused(capsys, train, tmp_path, *flags)

# ---- runs
@pytest.mark.slow
def test_resume_repeats_an_unbroken_run_bit_for_bit(tmp_path):
    """With this script's two groups of parameters."""
    flags = ["--cls-token", "--cond", "--cl", "0.01", "--epochs", "2"]
    whole = train(tmp_path / "a", *flags, "--max-steps", "10")
    train(tmp_path / "b", *flags, "--max-steps", "7")
    parts = train(tmp_path / "b", *flags, "--max-steps", "10", "--resume")
    check_resumed(tmp_path / "a", tmp_path / "b", whole, parts)

def test_cond_can_be_repeated_on_resume(tmp_path):
    train(tmp_path, "--cond", "--max-steps", "1")
    args = V.parse_args(["--out", str(tmp_path), "--cond", "--resume"])
    assert V.build(args)[0].classes == 10 and args.size == "tiny"
    train(tmp_path, "--cond", "--max-steps", "2", "--resume")
    assert load(tmp_path)["step"] == 2 and load(tmp_path)["ema"]["label_emb.weight"].shape == (11, 64)

def test_labels_of_samples(tmp_path):
    """generate hands each image its own class, in pieces too; at random it depends on seed and image alone."""
    model = sample.load_checkpoint(make_checkpoint(tmp_path / "last.pt", V, *TINY, "--cond"))
    seen = []
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[2].tolist()))
    list(sample.generate(model, 12, steps=1, batch=8))
    assert seen[:2] == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 1]]
    ((_, whole, _),) = sample.generate(model, 6, steps=2)
    ((_, parts, _),) = sample.generate(model, 6, steps=2, batch=4)
    assert (whole.int() - parts.int()).abs().max() <= 1
    drawn = sample.class_labels(range(200), 10, "random", 0)
    assert drawn[50:60].equal(sample.class_labels(range(50, 60), 10, "random", 0))
    assert set(drawn.tolist()) == set(range(10)) and not drawn.equal(sample.class_labels(range(200), 10, "random", 1))

def test_init_makes_a_checkpoint_of_public_weights(tmp_path, capsys):
    """Official names in, with --max-steps 0 a checkpoint for the tools out, [CLS] added or not."""
    source, *_ = build()
    torch.save(source.state_dict(), tmp_path / "public.pth")
    for extra in ([], ["--cls-token", "--aug", "0.1"]):
        out = tmp_path / f"run{len(extra)}"
        train(out, "--init", str(tmp_path / "public.pth"), "--max-steps", "0", *extra)
        model = sample.load_checkpoint(out)
        weights = model.net.state_dict()
        assert model.step == 0 and all(weights[k].equal(v) for k, v in source.state_dict().items())
    larger, *_ = build("--resolution", "32")
    assert "does not fit" in refused(capsys, V.load_weights, larger, tmp_path / "public.pth")
