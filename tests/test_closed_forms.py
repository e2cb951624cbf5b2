"""What a formula or an identity fixes and the golden fixtures leave open (those of DiT and tools: their own files)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fid
import probe
import train_dit as D
import train_unet as T
import train_uvit as V


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

# ---- formulations
A900 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[899] ** 0.5  # a_t of step 900
UVIT_DDPM = V.build(V.parse_args(["--size", "tiny"]))[1]

@pytest.mark.parametrize(("diffusion", "level", "clock", "signal", "spread"), [
    (T.RF(), 0.25, 0.25, 0.75, 0.25), (D.LatentRF(), 0.25, 0.75, 0.75, 0.25),
    (T.DDPM(1e-3), 900, 0.9, A900, (1 - A900**2) ** 0.5),
    (UVIT_DDPM, 900, 899.1, A900, (1 - A900**2) ** 0.5),  # 999 per unit time, as its public weights were trained
    (T.EDM(), 2.0, math.log(2) / 4, 1 / 4.25**0.5, 2 / 4.25**0.5),
], ids=["rf", "latent-rf", "ddpm", "uvit", "edm"])  # fmt: skip
def test_features_are_those_of_the_noisy_image(diffusion, level, clock, signal, spread):
    """Tools read the network at the level that is asked for, with its noise, its time, the label and the pooling."""
    x0, noise, y = rand(2, 3, 4, 4), rand(2, 3, 4, 4, seed=1), torch.tensor([1, 0])
    net = SimpleNamespace(features=lambda *given: given)
    x, t, label, pool, last = diffusion.features(net, x0, level, noise, y, "token", "mid")
    assert torch.allclose(x, float(signal) * x0 + float(spread) * noise, atol=5e-5)
    assert t.tolist() == pytest.approx([clock] * 2, rel=1e-5) and label is y and (pool, last) == ("token", "mid")

def test_guided_sampling_by_hand():
    """The paper's defaults: shifted times, of two steps 1, 3.3 / 4.3, 0; weight 1.5 up to t = 0.89; 250 steps."""
    seen = []

    def net(x, clock, y):
        seen.append((1 - clock[0].item(), y.tolist()))
        return torch.where(y.view(-1, 1, 1, 1) < 0, -3.0, -2.0).expand_as(x)  # v = 2 with the label, 3 without

    x, y, middle = rand(1, 5, 2, 2), torch.zeros(1, dtype=torch.long), 3.3 / 4.3
    x0 = D.LatentRF().sample(net, x, 2, y)
    assert torch.allclose(x0, x + (middle - 1) * 2 + (0 - middle) * (3 + 1.5 * (2 - 3)), atol=5e-5)
    assert [told for _, told in seen] == [[0], [0, -1]]
    seen.clear()
    D.LatentRF().sample(net, x, y=y)
    times = [3.3 * u / (1 + 2.3 * u) for u in np.linspace(1, 0, 251)[:-1]]
    assert [t for t, _ in seen] == pytest.approx(times, abs=1e-5)
    assert [len(told) for _, told in seen] == [1 + (t <= 0.89) for t in times]

def test_uncertainty_of_the_edm():
    """It starts without weighting, has frozen features 2 pi N(0, 1) and 2 pi U(0, 1), and weighs L / exp(u) + u."""
    torch.manual_seed(0)
    edm, x0, noise = T.EDM(uncertainty=True), rand(4, 3, 8, 8), rand(4, 3, 8, 8, seed=1)
    u = edm.uncertainty
    assert [name for name, _ in u.named_parameters()] == ["linear.weight"] and u(rand(5)).abs().max() == 0
    assert 4 < u.freqs.std() < 9 and 0 <= u.phases.min() < u.phases.max() < 2 * math.pi
    nn.init.eye_(u.linear.weight)  # the first wave alone
    t = torch.tensor([-1.0, 0.0, 0.5])
    assert torch.allclose(u(t), 2**0.5 * torch.cos(t * u.freqs[0] + u.phases[0]), atol=5e-5)
    u.freqs.zero_()
    u.phases.zero_()
    nn.init.constant_(u.linear.weight, 0.7 / (128 * 2**0.5))  # u = 0.7
    loss, plain, _ = edm.loss(lambda x, *_, with_feat: (0 * x, None, None), x0, 0.5, noise)
    assert loss.item() == pytest.approx(plain.item() / math.exp(0.7) + 0.7, rel=1e-5)
    assert plain.item() == pytest.approx((2 * (x0 - noise / 2) ** 2).mean().item(), rel=1e-5)  # D(x) is x / 2

@pytest.mark.parametrize(("flags", "on"), [([], False), (["--cl", "1"], True), (["--aug", "0.1"], True)])
def test_augmentation_brings_uncertainty(flags, on):
    """[P] Tab. 8."""
    _, diffusion = T.build(T.parse_args(["--model", "edm", "--backbone", "tiny", *flags]))
    assert (diffusion.uncertainty is not None) == on

# ---- augmentation, data
def test_gates_of_the_augmentation():
    """Row 0 draws every gate just below p = 0.12, row 1 just above; x-flip and the angle r have odds of their own."""
    flips, angles = torch.tensor([[0.4, 0.4]] * 2), torch.tensor([[7 / 12, 1 / 4]] * 2)  # pi / 6 and -pi / 2
    gates = torch.tensor([[0.119] * 5 + [0.499], [0.121] * 5 + [0.501]])
    normal = torch.tensor([[0.3, 0.4, 0.5, -0.6]] * 2)
    params, label = T.gate_augment(torch.cat([flips, angles, gates], dim=1), normal, 0.12)
    assert params[0].tolist() == pytest.approx([1, 1, 0.3, math.pi / 6, 0.4, -math.pi / 2, 0.5, -0.6], rel=1e-5)
    want = [1, 1, 0.3, 3**0.5 / 2 - 1, 0.5, 0, -0.4, 0.5, -0.6]
    assert label[0].tolist() == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert params[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0] and label[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]

@pytest.mark.parametrize("script", [T, D])
@pytest.mark.parametrize(("split", "colour"), [("train", [1, 2, 3]), ("test", [4, 5, 6])])
def test_splits_of_cifar(script, split, colour, monkeypatch):
    """torchvision is asked for the split that is meant; its (N, H, W, 3) become (N, 3, H, W)."""

    def stored(root, train=True, download=False):
        data = np.zeros((2, 32, 32, 3), np.uint8)
        data[1, 5, 7] = (1, 2, 3) if train else (4, 5, 6)
        return SimpleNamespace(data=data, targets=[1, 0], classes=["a", "b"])

    monkeypatch.setattr(script.datasets, "CIFAR10", stored)
    images, labels, names = script.load_data(script.parse_args(["--dataset", "cifar10"]), split)
    assert images.shape == (2, 3, 32, 32) and images[1, :, 5, 7].tolist() == colour
    assert images.sum() == sum(colour) and labels.tolist() == [1, 0] and names == ["a", "b"]

def test_subset_of_the_probe_keeps_its_labels():
    model = SimpleNamespace(script=T, args=T.parse_args(["--dataset", "shapes"]))
    model.args.cache_latents = None  # as load_checkpoint leaves it
    images, labels, *_ = T.load_data(model.args, "test")
    known = {image.numpy().tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)}
    flags = SimpleNamespace(data=None, dataset=None, subset=50, seed=0)
    split = probe.load_split(model, flags, "test", torch.device("cpu"))
    found = [known[image.numpy().tobytes()] for image in split.images]
    assert found == split.labels.tolist() and len(found) == 50 and found != labels[:50].tolist()

# ---- contrastive head
def test_no_gradient_into_the_key():
    q, k = rand(4, 8).requires_grad_(), rand(4, 8, seed=1).requires_grad_()
    T.moco_loss(q, k).backward()
    assert k.grad is None and q.grad.abs().max() > 0

def test_projector_of_the_paper():
    """Three linear maps and two, no biases; scale -1 and a shift erase the features before the last norm."""
    with torch.device("meta"):
        head = T.MoCoHead(512, 128, True, T.parse_args(["--backbone", "ddpm"]).cl_hidden)
    wide = 4096  # [MoCo]'s sizes for ViTs; a norm has a weight and a bias but for each last one; e_t steers two layers
    sizes = {"projector": 512 * wide + wide * wide + wide * 256 + 4 * wide + 2 * (128 + 1) * 2 * wide,
             "predictor": 256 * wide + wide * 256 + 2 * wide}  # fmt: skip
    assert {name: sum(p.numel() for p in getattr(head, name).parameters()) for name in sizes} == sizes
    small = T.HeadMLP([16, 8, 8, 4], emb_dim=6)
    for layer in small.time:
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor([-1.0] * 8 + [0.7] * 8)
    assert small(rand(5, 16), rand(5, 6)).abs().max() < 1e-2

# ---- networks
@pytest.mark.parametrize(("norm", "eps"), [
    (T.ResBlock(32, 32, 8, 0.0).norm1, 1e-5), (T.ResBlock(32, 32, 8, 0.0).norm2, 1e-5), (T.Attention(32).norm, 1e-5),
    (D.VAEResBlock(32, 32).norm1, 1e-6), (D.VAEResBlock(32, 32).norm2, 1e-6), (D.VAEAttention(32).norm, 1e-6),
    (D.VAE(32, 4).decoder.norm_out, 1e-6), (D.DiTBlock(32, 2, False).norm1, 1e-6),
    (D.DiTBlock(32, 2, False).norm2, 1e-6), (D.DiT(3, 4, 2, 32, 1, 1).final_layer["norm_final"], 1e-6),
    (D.DiTAttention(64, 2, True).q_norm, 1e-6), (D.DiTAttention(64, 2, True).k_norm, 1e-6),
    (V.UViTBlock(32, 2, False, False).norm1, 1e-5), (V.UViTBlock(32, 2, False, False).norm2, 1e-5),
])  # fmt: skip
def test_norms(norm, eps):
    """Of 32 channels, each a group of its own, or of tokens: a signal as weak as sqrt(eps) comes out at 1 / sqrt(2)."""
    groups = isinstance(norm, nn.GroupNorm)
    sign = torch.tensor([1.0, -1.0]).expand(1, 32, 1, 2) if groups else torch.tensor([1.0, -1.0] * 16)
    scale = torch.logspace(0, 3, 32).view(1, 32, 1, 1) if groups else 1.0
    assert torch.allclose(norm(scale * sign), sign, atol=1e-3)
    assert torch.allclose(norm(eps**0.5 * sign), sign / 2**0.5, atol=1e-4)
    kept = (sign + 3) / 10**0.5  # RMSNorm keeps the mean, the others remove it
    assert torch.allclose(norm(sign + 3), kept if isinstance(norm, nn.RMSNorm) else sign, atol=1e-4)

def test_dropout_silences_the_branch():
    """With probability 1 in training, never otherwise."""
    block, x, e = T.ResBlock(32, 32, 8, 1.0), rand(2, 32, 4, 4), rand(2, 8)
    nn.init.ones_(block.conv2[1].weight)
    nn.init.zeros_(block.conv2[1].bias)
    assert block(x, e).equal(x) and not block.eval()(x, e).equal(x)

@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_what_the_condition_is_made_of(kind):
    """Self-conditioning is told e with its label, e_t without, and the pooled feature of its layer."""
    x, t, seen, how = rand(3, 3, 16, 16), torch.rand(3), [], {"layer": "out_2", "self_cond": "adaptive"}
    if kind == "unet":
        net, told = T.UNet(16, **T.BACKBONES["tiny"], **how, aug_dim=9), {"aug": rand(3, 9)}
        time, label = net.time_emb(t), net.time_emb(t, told["aug"]) - net.time_emb(t)
    else:
        net, told = D.DiT(3, 16, 4, 32, 4, 2, **how | {"layer": "2"}, classes=4), {"y": torch.tensor([0, 2, 3])}
        time, label = net.t_embedder(t), net.y_embedder[0].weight[told["y"]]
    net.self_cond.register_forward_pre_hook(lambda _, args: seen.extend(args))
    _, feat, e_t = net(x, t, **told, with_feat=True)
    e, alone, pooled = seen
    assert alone.equal(time) and e_t.equal(time) and pooled.equal(feat)
    assert label.abs().max() > 1e-3 and torch.allclose(e - time, label, atol=2e-5)
    assert net.encode(x, t, **told)[1].equal(time)  # what the head is told

def test_patches_of_a_dit_fold_back():
    """Token (row, column) fills its patch; in it the numbers run over rows, then columns, then channels."""
    net = D.DiT(3, 6, 2, 16, 2, 2)
    net.final_layer["linear"].register_forward_hook(lambda *_: torch.arange(9.0 * 12).view(1, 9, 12))
    out, want = net(rand(1, 3, 6, 6), torch.rand(1)), torch.empty(1, 3, 6, 6)
    for channel, y, x in np.ndindex(3, 6, 6):
        want[0, channel, y, x] = 12 * (y // 2 * 3 + x // 2) + 6 * (y % 2) + 3 * (x % 2) + channel
    assert out.equal(want)

def test_posterior_of_the_vae():
    """Mean first, then the log variance, cut to [-30, 20]."""
    vae = D.VAE(32, 4)
    moments = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 100.0, -100.0]).view(1, 8, 1, 1)
    vae.quant_conv.register_forward_hook(lambda *_: moments)
    mean, std = vae.encode(torch.zeros(1, 3, 16, 16))
    assert mean.flatten().tolist() == [1, 2, 3, 4]
    assert std.flatten().tolist() == pytest.approx([1, math.e, math.exp(10), math.exp(-15)], rel=2e-5)

# ---- fid.py
def test_images_reach_the_inception_without_averages():
    """Three times too large, each third pixel is what is left, from -1 (black) to 1 (white)."""
    large = torch.randint(256, (1, 3, 897, 897), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.allclose(fid.preprocess(large), large[..., 1::3, 1::3] / 127.5 - 1, atol=1e-4)

def test_an_image_is_measured_alone(tmp_path, capsys):
    """The loaded Inception normalises by its stored statistics, not by the batch, and learns nothing."""
    torch.save(fid.Inception().state_dict(), tmp_path / "random.pth")
    net, x = fid.load_inception(tmp_path / "random.pth", "cpu"), rand(3, 3, 35, 35)
    assert torch.allclose(net.Conv2d_1a_3x3(x)[:1], net.Conv2d_1a_3x3(x[:1]), atol=5e-5)
    assert not any(p.requires_grad for p in net.parameters()) and "compare with no others" in capsys.readouterr().err
