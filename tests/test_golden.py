"""Parity of train_unet.py with the official implementations, through numbers recorded from them."""

import math

import pytest
import torch

import train_unet as T


def network(config, f):
    """The fixture's UNet with its regenerated weights, loaded strictly under the official names."""
    net = T.UNet(config["image_shape"][1], config["n_channels"], config["ch_mults"], config["n_blocks"],
                 config["use_res_for_updown"], aug_dim=config["augment_dim"])  # fmt: skip
    net.load_state_dict(f.weights())
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["unet_ddpm", "unet_ddpmpp"])
def test_unet(golden, name):
    f = golden(name)
    net = network(f.config, f)
    assert sum(p.numel() for p in net.parameters()) == f.param_count
    runs = {"": None} | ({"_aug": f.inputs["aug"]} if "aug" in f.inputs else {})
    for suffix, aug in runs.items():
        maps = {}
        net.run(f.inputs["x"], f.inputs["t"], None, aug, maps=maps)
        f.check(f"final{suffix}", net(f.inputs["x"], f.inputs["t"], aug=aug))
        f.check(f"time_emb{suffix}", net.time_emb(f.inputs["t"], aug))
        for k, h in maps.items():
            f.check(f"gap_{k}{suffix}", h.mean((2, 3)))
        assert f"gap_out_{len(maps) + 1}" not in f.outputs
    features = net.features(f.inputs["x"], f.inputs["t"])
    assert list(features) == net.layers
    for k, v in features.items():
        f.check(f"gap_{k}", v)


@pytest.mark.parametrize(
    ("backbone", "aug_dim", "count"), [("ddpm", 0, 35_746_307), ("ddpmpp", 9, 56_525_443), ("ddpmpp", 0, 56_524_291)]
)
def test_full_size_parameter_counts(backbone, aug_dim, count):
    with torch.device("meta"):
        net = T.UNet(32, **T.BACKBONES[backbone], aug_dim=aug_dim)
        plus = T.UNet(32, **T.BACKBONES[backbone], aug_dim=aug_dim, self_cond="adaptive", layer="out_7")
    total = {n: sum(p.numel() for p in m.parameters()) for n, m in (("net", net), ("plus", plus))}
    assert total == {"net": count, "plus": count + 460_032}  # [P] Sec. 4: 0.460 M


@pytest.mark.parametrize(("resolution", "sides"), [(32, {16}), (64, {16}), (16, {16})])
@pytest.mark.parametrize("backbone", list(T.BACKBONES))
def test_attention_is_placed_by_resolution(backbone, resolution, sides):
    """The first decoder block's side follows the depth; attention must sit at side 16 wherever that level is."""
    net = T.UNet(resolution, **T.BACKBONES[backbone] | {"width": 32})
    maps, decoder = {}, [b for b in net.up if isinstance(b, T.UNetBlock)]
    net.run(torch.zeros(1, 3, resolution, resolution), torch.zeros(1), None, None, maps=maps)
    found = zip([h.shape[-1] for h in maps.values()], decoder, strict=True)
    assert {side for side, block in found if isinstance(block.attn, T.Attention)} == sides


def test_ddpm(golden):
    f = golden("diffusion_ddpm")
    net, diffusion = network(f.config["network"], f), T.DDPM(1e-3)
    x0, t, noise = 2 * f.inputs["image"] - 1, f.inputs["t"], f.inputs["noise"]
    f.check("alphabar_train", diffusion.alphabar)
    f.check("alphabar_ddim", diffusion.alphabar_ddim)
    f.check("x_noised", diffusion.add_noise(x0, t, noise))
    f.check("eps", net(*diffusion.inputs(x0, t, noise)))
    f.check("loss", diffusion.loss(net, x0, t, noise)[0])
    features = diffusion.features(net, x0, t, noise)
    for name in net.layers:
        f.check(f"feature_{name}", features[name])


def test_ddim(golden):
    f = golden("diffusion_ddim")
    net, diffusion = network(f.config["network"], f), T.DDPM(1e-3)

    def analytic(x, t, y=None):
        """Optimal noise predictor of Gaussian data with std s."""
        s, u = f.config["analytic_s"], t.double()
        c = torch.exp(-(0.1 * u + 9.95 * u**2)).view(-1, 1, 1, 1)
        return (x.double() * (1 - c).sqrt() / (s**2 * c + 1 - c)).float()

    for steps in (10, 100):
        f.check(f"analytic_sample_{steps}", (diffusion.sample(analytic, f.inputs["noise"], steps) + 1) / 2)
    times, states = [], []

    def recording(x, t, y=None):
        times.append(round(t[0].item() * 1000))
        states.append(x[0])
        return net(x, t)

    f.check("sample_10", (diffusion.sample(recording, f.inputs["noise"], 10) + 1) / 2)
    assert times == f.outputs["times_10"].tolist()
    f.check("states_10", torch.stack(states))


def test_edm(golden):
    f = golden("diffusion_edm")
    net, diffusion = network(f.config["network"], f), T.EDM()
    x0, noise, aug = 2 * f.inputs["image"] - 1, f.inputs["noise"], f.inputs["aug"]
    f.check("schedule_18", diffusion.schedule(18))
    f.check("schedule_50", diffusion.schedule(50))
    sigma = f.outputs["sigma"].flatten()
    x = diffusion.add_noise(x0, sigma, noise)
    f.check("x_noised", x)
    f.check("D_x", diffusion.denoise(net, x, sigma))
    f.check("D_x_aug", diffusion.denoise(lambda x, t, y: net(x, t, y, aug), x, sigma))
    f.check("loss", diffusion.loss(net, x0, sigma, noise)[0])
    f.check("loss_aug", diffusion.loss(net, x0, sigma, noise, aug=aug)[0])
    level = f.outputs["feature_sigmas_18"][f.inputs["feature_t"] - 1].item()
    features = diffusion.features(net, x0, level, noise)
    for name in net.layers:
        f.check(f"feature_{name}", features[name])


def test_edm_training_noise():
    """ln sigma ~ N(-1.2, 1.2^2), drawn from the generator that is given."""
    sigma = T.EDM().draw_level(100_000, torch.Generator().manual_seed(0)).log()
    assert sigma.mean() == pytest.approx(-1.2, abs=0.02) and sigma.std() == pytest.approx(1.2, abs=0.02)


def test_heun(golden):
    f = golden("diffusion_heun")
    net, diffusion, sigmas, states = network(f.config["network"], f), T.EDM(), [], []

    def recording(x, t, y=None):
        sigmas.append(math.exp(4 * t[0].item()))
        states.append(x[0] * (math.exp(8 * t[0].item()) + 0.25) ** 0.5)  # undo c_in
        return net(x, t)

    f.check("sample_18", (diffusion.sample(recording, f.inputs["noise"]) + 1) / 2)
    assert len(sigmas) == 35  # [P] Sec. 2: NFE
    assert torch.tensor(sigmas).allclose(f.outputs["sigmas_18"].float(), rtol=1e-5)
    for step in f.config["keep_states"]:
        want = f.outputs[f"state_18_{step}"]
        assert (states[2 * step] - want).abs().max() <= 4e-5 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["augment_blit", "augment_warp", "augment_gated", "augment_all"])
def test_augmentation(golden, name):
    f = golden(name)
    assert torch.tensor(T.SYM6).equal(f.inputs["sym6"].float())
    for batch, want in f.outputs.items():
        draws, n = f.inputs["draws"][batch], len(want["labels"])
        names = "xflip yflip rotate_u aniso_u gate_yflip gate_scale gate_rotate gate_aniso gate_translate".split()
        uniform = torch.stack([draws[k].float() for k in [*names, "gate_aniso_rotate"]], dim=1)
        uniform[:, :2] = 1 - uniform[:, :2]  # recorded as 1: flipped; here below one half
        normal = torch.stack([draws["scale"], draws["aniso_w"], *draws["translate"]], dim=1)
        p = want.get("p", f.config.get("p")) or (0.4 if batch == "gated" else 1.0)
        (params, label), known = T.gate_augment(uniform, normal, p), want["params"]
        columns = [known[k] for k in ("xflip", "yflip", "scale", "rotate", "aniso", "aniso_angle")]
        f.check(batch, params, torch.stack([*(c.float() for c in columns), *known["translate"]], dim=1))
        f.check(batch, label, want["labels"])
        images, known = T.augment(T.to_x0(f.inputs["images_uint8"][:n]), params), want["images"]
        if batch == "all":  # the reference pads a corner of one image too little; in float64 ours is the exact one
            off = (images - known).abs() > 1e-5
            assert off.nonzero()[:, [0, 2, 3]].unique(dim=0).tolist() == [[2, 31, 31]]
            assert (images - known).abs().max() < 2e-5
            images = torch.where(off, known, images)
        f.check(batch, images, known)


def test_moco_loss(golden):
    f = golden("moco")
    for rank in range(2):
        q = f.inputs["q"][rank].clone().requires_grad_()
        loss = T.moco_loss(q, f.inputs["k"][rank])
        loss.backward()
        f.check("loss_single", loss, f.outputs["loss_single"][rank])
        f.check("grad_single", q.grad, f.outputs["grad_single"][rank])


def moco_rank(rank, inputs, file):
    """One of two ranks of test_moco_loss_over_ranks."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    q = inputs["q"][rank].clone().requires_grad_()
    loss = T.moco_loss(q, inputs["k"][rank])
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": q.grad}, f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def test_moco_loss_over_ranks(golden, tmp_path):
    f = golden("moco")
    torch.multiprocessing.spawn(moco_rank, (f.inputs, tmp_path / "join"), nprocs=2)
    for rank in range(2):
        got = torch.load(f"{tmp_path}/join.{rank}", weights_only=True)
        f.check("loss_gathered", got["loss"], f.outputs["loss_gathered"][rank])
        f.check("grad_gathered", got["grad"], f.outputs["grad_gathered"][rank])
