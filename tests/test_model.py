"""Properties of the networks, formulations and the contrastive head that the paper or a closed form fixes."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_unet as T


def tiny(self_cond=None, layer="out_3", aug_dim=0, seed=0):
    torch.manual_seed(seed)
    return T.UNet(16, **T.BACKBONES["tiny"], layer=layer, self_cond=self_cond, aug_dim=aug_dim)


def batch(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g), torch.rand(n, generator=g)


def shake(net, seed=0):
    """Move every weight off its initial value, zeros included."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return net


# ---- self-conditioning
@pytest.mark.parametrize("kind", ["adaptive", "add"])
def test_self_conditioning_starts_as_the_baseline(kind):
    """[P] Sec. 4: the zero-initialised MLP leaves the network's function, and its gradient there, unchanged."""
    base, plus = shake(tiny()), tiny(kind)
    plus.load_state_dict(base.state_dict(), strict=False)
    x, t = batch()
    assert base(x, t).equal(plus(x, t))
    base(x, t).square().mean().backward()
    plus(x, t).square().mean().backward()
    for name, p in base.named_parameters():
        assert torch.allclose(p.grad, dict(plus.named_parameters())[name].grad, atol=1e-7), name


def test_add_and_adaptive_differ_only_in_the_scale():
    """adaptive with s = 1 is add; otherwise e' - e is multiplied by s(SiLU(e_t))."""
    adaptive, add = shake(tiny("adaptive")), tiny("add")
    assert set(adaptive.state_dict()) - set(add.state_dict()) == {"self_cond.scale.weight", "self_cond.scale.bias"}
    add.load_state_dict({k: v for k, v in adaptive.state_dict().items() if "scale" not in k})
    e, e_t, feat = torch.randn(4, 128), torch.randn(4, 128), torch.randn(4, adaptive.feat_dim)
    gain = adaptive.self_cond.scale(F.silu(e_t))
    got = adaptive.self_cond(e, e_t, feat) - e
    assert torch.allclose(got, gain * (add.self_cond(e, e_t, feat) - e), atol=1e-5)
    with torch.no_grad():
        adaptive.self_cond.scale.weight.zero_()
        adaptive.self_cond.scale.bias.fill_(1)
    x, t = batch()
    assert torch.allclose(adaptive(x, t), add(x, t), atol=1e-5)


@pytest.mark.parametrize("kind", ["adaptive", "add"])
def test_gradients_reach_the_encoder_through_the_condition(kind):
    """With h detached from the decoder's direct path, the encoder still learns by way of the pooled feature."""
    net = shake(tiny(kind, layer="out_2"))
    x, t = batch()
    out, feat, _ = net(x, t, with_feat=True)
    (through,) = torch.autograd.grad(out.square().mean(), feat, retain_graph=True)
    assert through.abs().max() > 0  # the output depends on the pooled feature itself
    (first,) = torch.autograd.grad(feat, net.image_proj.weight, through)
    assert first.abs().max() > 0


def test_only_the_decoder_sees_the_condition():
    """Changing the condition leaves every layer up to --layer alone and changes every later one."""
    net = shake(tiny("add", layer="out_2"))
    x, t = batch()
    before = net.features(x, t)
    with torch.no_grad():
        net.self_cond.mlp[2].bias.add_(1)
    after = net.features(x, t)
    assert [k for k in before if not before[k].equal(after[k])] == ["out_3", "out_4", "out_5", "out_6"]


def test_one_forward_pass():
    """Self-conditioning and the feature cost no second evaluation: every block runs once."""
    net, calls = tiny("adaptive"), []
    for block in [*net.down, *net.middle.values(), *net.up]:
        block.register_forward_hook(lambda *_: calls.append(1))
    net(*batch(), with_feat=True)
    assert len(calls) == len(net.down) + 3 + len(net.up)
    calls.clear()
    net.encode(*batch())  # the teacher stops at out_3: two blocks, an upsampling, one block
    assert len(calls) == len(net.down) + 3 + 4


def test_feature_is_the_pooled_layer_and_tools_see_the_same():
    net = shake(tiny("adaptive"))
    x, t = batch()
    out, feat, e_t = net(x, t, with_feat=True)
    assert out.equal(net(x, t)) and torch.allclose(feat, net.features(x, t)["out_3"], atol=1e-6)
    assert all(a.equal(b) for a, b in zip(net.encode(x, t), (feat, e_t), strict=True))


def test_zero_label_equals_no_label():
    """Nor does the label touch e_t, by which the feature is weighed: that is time alone."""
    net = shake(tiny("adaptive", aug_dim=9))
    x, t = batch()
    assert net.encode(x, t)[1].equal(net.encode(x, t, aug=torch.ones(4, 9))[1])
    assert torch.allclose(net(x, t), net(x, t, aug=torch.zeros(4, 9)), atol=1e-6)
    assert not torch.allclose(net(x, t), net(x, t, aug=torch.ones(4, 9)), atol=1e-3)


def test_network_refuses_what_it_cannot_take():
    net = tiny()
    with pytest.raises(ValueError, match=r"x must be"):
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1))
    with pytest.raises(ValueError, match="no classes for y"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="no aug_dim for aug"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(1), aug=torch.zeros(1, 9))
    with pytest.raises(ValueError, match="out_1, out_2"):
        tiny(layer="out_99")
    with pytest.raises(ValueError, match="divisible"):  # group norm
        T.UNet(16, **T.BACKBONES["tiny"] | {"width": 20})
    for pool in ("cls", "token"):
        with pytest.raises(ValueError, match=f"no tokens: use --pool gap, not {pool}"):
            net.features(torch.zeros(1, 3, 16, 16), torch.zeros(1), pool=pool)


# ---- formulations
def gaussian(s):
    """Exact predictors for data ~ N(0, s^2): what a perfect network would say, per formulation."""

    def eps(x, t, y=None):
        a = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 1001)).log().cumsum(0).exp()])[1:]
        a = a[(t[0] * 1000).round().long()]
        return x * (1 - a).sqrt() / (a * s**2 + 1 - a)

    def edm(c_x, c_noise, y=None):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        sd, total = 0.5, (sigma**2 + 0.25).sqrt()
        x = c_x * total
        return (x * s**2 / (s**2 + sigma**2) - (sd / total) ** 2 * x) / (sigma * sd / total)

    def velocity(x, t, y=None):
        t = t.view(-1, 1, 1, 1)
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    return {"ddpm": eps, "edm": edm, "rf": velocity}


@pytest.mark.parametrize("model", ["ddpm", "edm", "rf"])
def test_samplers_map_noise_to_gaussian_data(model):
    """The exact flow of Gaussian data is linear, x0 = s noise; samplers must follow it to their order."""
    s, noise = 0.2, torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    calls = []
    predictor = gaussian(s)[model]

    def net(*args, **kwargs):
        calls.append(1)
        return predictor(*args, **kwargs)

    diffusion = {"ddpm": T.DDPM(1e-3), "edm": T.EDM(), "rf": T.RF()}[model]
    x0 = diffusion.sample(net, noise)
    error = (x0 - s * noise).abs().max().item()
    assert error < {"ddpm": 0.06, "edm": 0.06, "rf": 1e-4}[model], error
    assert {"ddpm": len(calls) == 100, "edm": len(calls) == 35, "rf": 20 < len(calls) < 400}[model], len(calls)
    if model == "edm":  # second order: a quarter of the step leaves at most a tenth of the error
        assert (diffusion.sample(net, noise, steps=72) - s * noise).abs().max().item() < error / 10


@pytest.mark.parametrize("bad", [0, 5])
def test_rk45_ends_where_the_network_returns_nan(bad):
    """From the first evaluation on, or midway: it says so, and does not search for a step size for ever."""
    calls = []

    def net(x, t, y=None):
        calls.append(1)
        return x if len(calls) <= bad else x * math.nan

    with pytest.raises(FloatingPointError, match="the network gave NaN"):
        T.RF().sample(net, torch.ones(1, 3, 2, 2))
    assert len(calls) < 100


LEVELS = {  # lowest and highest level, and how an error names them
    T.DDPM(1e-3): (0, 1000, "whole steps from 0 to 1000"),
    T.EDM(): (0.002, 80.0, "sigma from 0.002 to 80.0"),
    T.RF(): (0, 1, "times from 0 to 1"),
}


@pytest.mark.parametrize("diffusion", LEVELS, ids=lambda d: type(d).__name__)
def test_noise_levels(diffusion):
    x0, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    low, high, says = LEVELS[diffusion]
    clean = diffusion.add_noise(x0, low, noise)
    assert torch.allclose(clean, x0, atol=0.02)
    levels = diffusion.draw_level(10_000, torch.Generator().manual_seed(0))
    assert levels.shape == (10_000,)
    assert (levels >= (1 if isinstance(diffusion, T.DDPM) else 0)).all()
    assert isinstance(diffusion, T.EDM) or (levels <= high).all()
    middle = 66 if isinstance(diffusion, T.DDPM) else 0.06
    one = diffusion.add_noise(x0, middle, noise)
    many = diffusion.add_noise(x0, torch.full((4,), middle), noise)
    assert one.equal(many)
    for level in (low, middle, high):
        diffusion.check_level(level)
    for level in (low - 1, high + 1, math.nan):
        with pytest.raises(ValueError, match=says):
            diffusion.check_level(level)
    if isinstance(diffusion, T.DDPM):
        with pytest.raises(ValueError, match="whole steps"):
            diffusion.check_level(0.06)
    with pytest.raises(ValueError, match="shape"):
        diffusion.add_noise(x0, torch.full((3,), low), noise)


def test_ddpm_draws_every_step():
    levels = T.DDPM(1e-3).draw_level(100_000, torch.Generator().manual_seed(0))
    assert levels.min() == 1 and levels.max() == 1000 and len(levels.unique()) == 1000


def test_edm_loss_of_a_silent_network():
    """With F = 0 and data of std sigma_data the weighted loss is 1 at every level ([EDM] Tab. 1 is built for that)."""
    x0 = 0.5 * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))

    def silent(x, t, y, aug, with_feat):
        return torch.zeros_like(x), None, None

    for sigma in (0.01, 0.5, 5.0):
        assert T.EDM().loss(silent, x0, sigma, noise)[0] == pytest.approx(1, abs=0.03)
    plain, weighted = T.EDM(), T.EDM(uncertainty=True)
    want = plain.loss(silent, x0, 0.5, noise)[0].item()
    assert weighted.loss(silent, x0, 0.5, noise)[0].item() == pytest.approx(want)  # u starts at 0
    with torch.no_grad():
        weighted.uncertainty.freqs.zero_()
        weighted.uncertainty.phases.zero_()
        weighted.uncertainty.linear.weight.fill_(0.7 / (128 * 2**0.5))  # u = 0.7: L / exp(u) + u
    assert weighted.loss(silent, x0, 0.5, noise)[0].item() == pytest.approx(want / math.exp(0.7) + 0.7)


def test_rf_target_is_the_velocity():
    x0, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)

    def truth(x, t, y, aug, with_feat):
        return noise - x0, "feat", "e_t"

    loss, _, (feat, e_t) = T.RF().loss(truth, x0, torch.rand(4), noise)
    assert loss == 0 and (feat, e_t) == ("feat", "e_t")
    h = 1e-3  # v = dx_t / dt
    step = (T.RF().add_noise(x0, 0.5 + h, noise) - T.RF().add_noise(x0, 0.5 - h, noise)) / (2 * h)
    assert torch.allclose(step, noise - x0, atol=1e-3)


# ---- augmentation
def gated(n, p, seed=0):
    """Parameters and label of n random augmentations."""
    g = torch.Generator().manual_seed(seed)
    return T.gate_augment(torch.rand(n, 10, generator=g), torch.randn(n, 4, generator=g), p)


def test_augmentation_identity_independence_and_label():
    x0 = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    zero = torch.zeros(5, 8)
    assert torch.allclose(T.augment(x0, zero), x0, atol=1e-5)
    closed = T.gate_augment(torch.full((5, 10), 0.9), torch.ones(5, 4), 0.9)  # no gate opens: all zeros, label too
    assert closed[0].equal(zero) and closed[1].equal(torch.zeros(5, 9))
    params, _ = gated(5, 1.0, seed=1)
    both = T.augment(x0, params)
    for i in range(5):
        assert torch.allclose(T.augment(x0[i : i + 1], params[i : i + 1])[0], both[i], atol=1e-6)
    shift = torch.zeros(1, 8)
    shift[0, 6] = 2 / (0.125 * 16)  # two pixels to the right
    assert torch.allclose(T.augment(x0[:1], shift)[..., 4:14], x0[:1, :, :, 2:12], atol=1e-4)


def test_augmentation_rate():
    """Each transform acts with probability p; the flip always is a fair coin."""
    params, _ = gated(20_000, 0.12)
    rate = (params != 0).float().mean(0)
    want = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.5, 0.12, 0.12])
    assert torch.allclose(rate, want, atol=0.015), rate
    assert (gated(8, 0.0)[1][:, 1:] == 0).all()


# ---- contrastive head
def test_moco_loss_by_hand():
    """Against a double loop over queries and keys."""
    q, k = torch.randn(6, 8), torch.randn(6, 8)
    total = 0.0
    for i in range(6):
        scores = [F.cosine_similarity(q[i], k[j], dim=0) / 0.2 for j in range(6)]
        total += torch.logsumexp(torch.stack(scores), 0) - scores[i]
    loss = T.moco_loss(q, k)
    assert loss.item() == pytest.approx(0.4 * total.item() / 6, rel=1e-5)


def test_time_dependent_head_starts_as_mocos():
    torch.manual_seed(0)
    timed = T.MoCoHead(16, 8, time_dependent=True, hidden=32)
    plain = T.MoCoHead(16, 8, time_dependent=False, hidden=32)
    plain.load_state_dict({k: v for k, v in timed.state_dict().items() if ".time." not in k})
    feat, e_t = torch.randn(5, 16), torch.randn(5, 8)
    assert torch.allclose(timed(feat, e_t), plain(feat, e_t), atol=1e-6)
    shake(timed)
    assert not torch.allclose(timed.projector(feat, e_t), timed.projector(feat, -e_t), atol=1e-2)
    spread = timed.projector(feat, e_t).std(0, unbiased=False)
    assert torch.allclose(spread, torch.ones(256), atol=1e-2)  # the last norm has no affine part


def batch_norm_rank(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.save(batch_norm_case(rank), f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def batch_norm_case(rank=None):
    """Output and gradients of the head on all rows, or on one rank's half; the loss sums over all rows."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) + 3
    mine = x if rank is None else x[4 * rank : 4 * rank + 4]
    mine = mine.clone().requires_grad_()
    torch.manual_seed(1)
    norm = shake(T.BatchNorm(16))
    out = norm(mine)
    out.pow(3).sum().backward()
    return {"out": out.detach(), "grad": mine.grad}


def test_batch_norm_over_ranks(tmp_path):
    """Two gloo ranks equal one process and torch's BatchNorm1d, backward included."""
    whole = batch_norm_case()
    torch.multiprocessing.spawn(batch_norm_rank, (tmp_path / "join",), nprocs=2)
    parts = [torch.load(f"{tmp_path}/join.{r}", weights_only=True) for r in range(2)]
    for key, value in whole.items():
        assert torch.allclose(torch.cat([p[key] for p in parts]), value, atol=1e-4), key
    reference = torch.nn.BatchNorm1d(16)
    x = torch.randn(8, 16) + 3
    assert torch.allclose(T.BatchNorm(16)(x), reference(x), atol=1e-5)
