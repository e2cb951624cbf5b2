"""train_uvit.py: the [CLS] token, the mask, labels, flags, and public weights."""

import pytest
import torch
from conftest import make_checkpoint, refused, run

import sample
import train_uvit as V

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--size", "tiny", "--batch", "8"]

def build(*flags):
    """The network of these flags, as it is before training."""
    args = V.parse_args([*TINY, *flags])
    args.classes = V.SHAPES
    return V.build(args)[0]

# ---- tokens
def test_cls_and_augmentation_come_before_all_other_tokens():
    """Neither shares the table of positions; the others are as without them (tests/test_golden.py)."""
    net, plain = V.UViT(8, 2, 32, 5, 2, 4, 9, cls_token=True), V.UViT(8, 2, 32, 5, 2, 4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(("cls_", "aug_"))})
    x, e_t, aug, y = torch.randn(3, 3, 8, 8), torch.randn(3, 32), torch.randn(3, 9), torch.tensor([3, 0, 1])
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
    net = build(*flags)
    assert {block.attn.masked for block in [*net.in_blocks, net.mid_block, *net.out_blocks]} == {masked}

# ---- flags
@pytest.mark.parametrize(("flags", "says"), [
    ("--resolution 17", "do not divide"), ("--layer out_7", "in_1, in_2"), ("--cl-target cls", "needs --cls-token"),
    ("--patch 0", "--patch must be above 0"), ("--cl-t 0.06", "whole steps")])  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(flags, says, tmp_path, capsys):
    assert says in refused(capsys, run, V, *TINY, "--out", tmp_path, *flags.split())

# ---- runs
def test_labels_of_samples_drawn_in_pieces(tmp_path):
    """generate hands each image its own class."""
    model = sample.load_checkpoint(make_checkpoint(tmp_path / "last.pt", V, *TINY, "--cond"))
    seen = []
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[2].tolist()))
    list(sample.generate(model, 12, steps=1, batch=8))
    assert seen == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 1]]
