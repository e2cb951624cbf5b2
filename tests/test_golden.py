"""Parity with the official implementations, through numbers recorded from them (of DiT and tools: their own files)."""

import math

import pytest
import torch

import train_unet as T
import train_uvit as V


def network(f, config=None):
    """The fixture's UNet with its regenerated weights, loaded strictly under the official names."""
    config = config or f.config["network"]
    net = T.UNet(config["image_shape"][1], config["n_channels"], config["ch_mults"], config["n_blocks"],
                 config["use_res_for_updown"], aug_dim=config["augment_dim"])  # fmt: skip
    net.load_state_dict(f.weights())
    return net.eval().requires_grad_(False)

# ---- networks
@pytest.mark.parametrize("name", ["unet_ddpm", "unet_ddpmpp"])
def test_unet(golden, name):
    f = golden(name)
    net, x, t = network(f, f.config), f.inputs["x"], f.inputs["t"]
    assert sum(p.numel() for p in net.parameters()) == f.param_count
    for suffix, aug in (("", None), ("_aug", f.inputs.get("aug"))):
        if suffix and aug is None:
            continue
        maps = {}
        net.run(x, t, None, aug, maps=maps)
        assert list(maps) == net.layers
        f.check(f"final{suffix}", net(x, t, aug=aug))
        f.check(f"time_emb{suffix}", net.time_emb(t, aug))
        for k, h in maps.items():
            f.check(f"gap_{k}{suffix}", h.mean((2, 3)))
        assert f"gap_out_{len(maps) + 1}" not in f.outputs

@pytest.mark.parametrize("name", ["uvit_uncond", "uvit_class"])
def test_uvit(golden, name):
    """Every block's tokens, their pooled means and the output; 10 label rows are 9 classes and the null class."""
    f, maps = golden(name), {}
    net = V.UViT(16, 2, 64, 5, 4, classes=9 if name == "uvit_class" else 0)
    net.load_state_dict(f.weights())
    net.eval().requires_grad_(False)
    assert sum(p.numel() for p in net.parameters()) == f.param_count
    x, t, y = (f.inputs.get(k) for k in "xty")
    f.check("tokens", net.tokens(x, V.time_sinusoid(t, 64), y, None))
    f.check("final", net.run(x, t, y, None, maps=maps)[0])
    official = {"in_1": "in_block_0", "in_2": "in_block_1", "mid": "mid_block", "out_1": "out_block_0",
                "out_2": "out_block_1"}  # fmt: skip
    assert list(maps) == net.layers == list(official)
    features = net.features(x, t, y)
    for ours, theirs in official.items():
        f.check(theirs, maps[ours])
        f.check(f"gap_{theirs}", features[ours])

# ---- formulations
def test_ddpm(golden):
    f = golden("diffusion_ddpm")
    net, diffusion = network(f), T.DDPM(1e-3)
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
    net, diffusion, noise = network(f), T.DDPM(1e-3), f.inputs["noise"]
    times, states = [], []

    def analytic(x, t, y=None):
        """Optimal noise predictor of Gaussian data with std s."""
        s, u = f.config["analytic_s"], t.double()
        times.append(round(t[0].item() * 1000))
        c = torch.exp(-(0.1 * u + 9.95 * u**2)).view(-1, 1, 1, 1)
        return (x.double() * (1 - c).sqrt() / (s**2 * c + 1 - c)).float()

    def recording(x, t, y=None):
        times.append(round(t[0].item() * 1000))
        states.append(x[0])
        return net(x, t)

    f.check("analytic_sample_100", (diffusion.sample(analytic, noise) + 1) / 2)  # the default
    assert times == f.outputs["times_100"].tolist()
    times.clear()
    f.check("sample_10", (diffusion.sample(recording, noise, 10) + 1) / 2)
    assert times == f.outputs["times_10"].tolist()
    f.check("states_10", torch.stack(states))

def test_edm(golden):
    f = golden("diffusion_edm")
    net, diffusion = network(f), T.EDM()
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

def test_heun(golden):
    f = golden("diffusion_heun")
    net, sigmas, states = network(f), [], []

    def recording(x, t, y=None):
        sigmas.append(math.exp(4 * t[0].item()))
        states.append(x[0] * (math.exp(8 * t[0].item()) + 0.25) ** 0.5)  # undo c_in
        return net(x, t)

    f.check("sample_18", (T.EDM().sample(recording, f.inputs["noise"]) + 1) / 2)
    assert len(sigmas) == 35  # [P] Sec. 2: NFE
    assert torch.tensor(sigmas).allclose(f.outputs["sigmas_18"].float(), rtol=2e-5)
    for step in f.config["keep_states"]:
        f.check(f"state_18_{step}", states[2 * step])

# ---- augmentation
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
        # The reference pads a corner of one image of "all" too little, by 2e-5; in float64 ours is the exact one.
        f.check(batch, T.augment(T.to_x0(f.inputs["images_uint8"][:n]), params), want["images"])

# ---- contrastive head
def check_moco(f, kind, rank, found):
    """Loss and gradient of one rank's queries against the keys of this rank (single) or of both (gathered)."""
    for name, value in found.items():
        f.check(f"{name}_{kind}", value, f.outputs[f"{name}_{kind}"][rank])

def moco_case(inputs, rank):
    q = inputs["q"][rank].clone().requires_grad_()
    loss = T.moco_loss(q, inputs["k"][rank])
    loss.backward()
    return {"loss": loss.detach(), "grad": q.grad}

def batch_norm_case(rows):
    """Output and gradients of those of 8 rows that a rank has; the loss sums over all rows."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) + 3
    x = x[rows].clone().requires_grad_()
    norm = T.BatchNorm(16)
    torch.nn.init.constant_(norm.weight, 0.7)
    torch.nn.init.constant_(norm.bias, 0.2)
    out = norm(x)
    out.pow(3).sum().backward()
    return {"out": out.detach(), "grad": x.grad}

def one_of_two_ranks(rank, inputs, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    state = {"moco": moco_case(inputs, rank), "norm": batch_norm_case(slice(4 * rank, 4 * rank + 4))}
    torch.save(state, f"{file}.{rank}")
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize("rank", [0, 1])
def test_moco_loss(golden, rank):
    f = golden("moco")
    check_moco(f, "single", rank, moco_case(f.inputs, rank))

@pytest.mark.slow
def test_head_over_ranks(golden, tmp_path):
    """Two gloo ranks: the loss has the keys of both, in their order; batch norm equals that of one process."""
    f = golden("moco")
    torch.multiprocessing.spawn(one_of_two_ranks, (f.inputs, tmp_path / "join"), nprocs=2)
    parts = [torch.load(f"{tmp_path}/join.{rank}", weights_only=True) for rank in range(2)]
    for rank in range(2):
        check_moco(f, "gathered", rank, parts[rank]["moco"])
    for key, value in batch_norm_case(slice(None)).items():
        assert torch.allclose(torch.cat([part["norm"][key] for part in parts]), value, atol=1e-4), key
