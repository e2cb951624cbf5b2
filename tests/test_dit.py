"""train_dit.py: parity with LightningDiT and its VA-VAE, guidance, the cache of latents, and runs by its user."""

import errno
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_equal_steps, check_resumed, launch, load, metrics
from PIL import Image

import probe
import sample
import train_dit as D
import train_unet as T

pytestmark = pytest.mark.usefixtures("fewer_shapes", "no_pictures")
TINY = ["--dataset", "shapes", "--size", "tiny", "--batch", "8"]
GRID = D.save_grid


@pytest.fixture
def no_pictures(monkeypatch):
    """Sample grids take 250 steps each."""
    monkeypatch.setattr(D, "save_grid", lambda *_: None)


def network(seed=0, **kw):
    """A small DiT with no weight left at its initial value."""
    torch.manual_seed(seed)
    net = D.DiT(3, 8, 2, 32, 4, 2, **kw)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def batch(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), torch.rand(n, generator=g)


# ---- parity and sizes
def official(f, config):
    """The fixture's network; what it keeps from its constructor must be what ours computes."""
    net = D.DiT(config["in_channels"], config["input_size"], config["patch_size"], config["hidden_size"],
                config["depth"], config["num_heads"], classes=config["num_classes"])  # fmt: skip
    missing, unexpected = net.load_state_dict(f.weights(), strict=False)
    assert set(missing) == set(f.kept) and not unexpected and set(net.state_dict()) == set(f.shapes)
    return net.eval().requires_grad_(False)


def test_dit(golden):
    f, maps, seen = golden("dit_small"), {}, {}
    net = official(f, f.config)
    net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    assert sum(p.numel() for p in net.parameters()) == f.param_count
    for name, value in f.kept_values.items():
        assert torch.allclose(net.state_dict()[name], value, atol=1e-6), name
    x, t, y = (f.inputs[k] for k in "xty")
    f.check("t_emb", net.t_embedder(t))
    f.check("y_emb", net.y_embedder(y))
    f.check("final", net(x, t, y))
    f.check("tokens", seen["tokens"])
    f.check("final", net.run(x, t, y, None, maps=maps)[0])
    for i, name in enumerate(net.layers):
        f.check(f"block_{i}", maps[name])
        f.check(f"gap_block_{i}", net.features(x, t, y)[name])


def test_guidance(golden):
    f = golden("dit_guidance")
    net, rf = official(f, f.config["network"]), D.LatentRF()
    z, t, y = (f.inputs[k] for k in "zty")
    cfg, interval = f.config["cfg_scale"], (0, 1 - f.config["interval_start"])
    for i, clock in enumerate(t.tolist()):  # their time, their sign
        f.check(f"cond_{i}", -rf.velocity(net, z, 1 - clock, y))
        f.check(f"uncond_{i}", -rf.velocity(net, z, 1 - clock))
        f.check(f"guided_{i}", -rf.velocity(net, z, 1 - clock, y, cfg, interval))
    points, shift = f.config["num_steps"], 1 / f.config["timestep_shift"]
    f.check("euler_sample", rf.sample(net, z, points - 1, y, cfg, interval, shift))


def test_transport(golden, monkeypatch):
    f, rf = golden("transport"), D.LatentRF()
    a, b, points = f.config["a"], f.config["b"], f.config["num_steps"]
    data, noise, start = (f.inputs[k] for k in ("data", "noise", "start"))
    t = 1 - f.inputs["t_ref"]
    f.check("t_our", t)
    f.check("xt_our", rf.add_noise(data, t, noise))
    f.check("target_our", noise - data)

    def net(x, clock, y=None, aug=None, with_feat=False):
        out = a * x + b * clock.view(-1, 1, 1, 1)
        return (out, None, None) if with_feat else out

    for name, shift in (("plain", 1.0), ("shift", 1 / f.config["timestep_shift"])):
        f.check(f"grid_our_{name}", torch.tensor(rf.times(points - 1, shift)))
        f.check(f"sample_{name}", rf.sample(net, start, points - 1, shift=shift))
    mse, cos = f.outputs["loss_per_sample"].mean(), f.outputs["cos_loss_per_sample"].mean()
    f.check("loss_per_sample", rf.loss(net, data, t, noise)[0], mse + cos)
    monkeypatch.setattr(D.F, "normalize", lambda x, dim, eps=0: torch.zeros_like(x))
    f.check("loss_per_sample", rf.loss(net, data, t, noise)[0] - 1, mse)


def test_vae(golden, tmp_path):
    """As the public file wraps it: under state_dict, among the weights of what trained it."""
    f = golden("vavae_small")
    torch.save({"state_dict": f.weights() | {"loss.logvar": torch.zeros(1)}, "epoch": 3}, tmp_path / "vae.pt")
    vae = D.load_vae(tmp_path / "vae.pt", "cpu")
    assert sum(p.numel() for p in vae.parameters()) == f.param_count
    with torch.device("meta"):
        assert sum(p.numel() for p in D.VAE().parameters()) == 69_836_067
    x = f.inputs["image"]
    f.check("encoder", vae.encoder(x))
    f.check("moments", vae.quant_conv(vae.encoder(x)))
    mean, std = vae.encode(x)
    f.check("mean", mean)
    f.check("logvar", 2 * std.log())
    f.check("decoded", vae.decode(mean))


def test_full_size_parameter_counts():
    def count(*flags):
        with torch.device("meta"):
            net, _ = D.build(D.parse_args(["--cache-latents", "none-yet", *flags]))
        assert net.shape == (32, 16, 16)
        return sum(p.numel() for p in net.parameters())

    assert count() == 129_787_424
    assert count("--cond", "1000") == 130_556_192
    assert count("--self-cond") == 129_787_424 + 1_378_304  # [P]: 1.38 M
    assert count("--qk-norm") == 129_787_424 + 12 * 2 * 64


# ---- network
def test_self_conditioning_starts_as_the_baseline_and_reaches_the_decoder_only():
    base, plus = network(), network(self_cond="adaptive", layer="2")
    plus.load_state_dict(base.state_dict(), strict=False)
    for module in (plus.self_cond.mlp[2].weight, plus.self_cond.mlp[2].bias):
        torch.nn.init.zeros_(module)
    x, t = batch()
    assert base(x, t).equal(plus(x, t))
    before = plus.features(x, t)
    torch.nn.init.ones_(plus.self_cond.mlp[2].bias)
    after = plus.features(x, t)
    assert [k for k in before if not before[k].equal(after[k])] == ["3", "4"]


def test_training_starts_at_zero_output_and_the_self_conditioning_mlp_at_zero():
    net, _ = D.build(D.parse_args([*TINY, "--self-cond", "--cond"]))
    x = torch.randn(2, 3, 16, 16)
    assert net(x, torch.rand(2)).abs().max() == 0  # AdaLN-zero
    assert net.self_cond.mlp[2].weight.abs().max() == net.self_cond.mlp[2].bias.abs().max() == 0


def test_the_first_gradient_is_no_giant():
    """The output starts at zero, where a cosine has no direction: fp16 would overflow, Adam remember it."""
    args = D.parse_args(["--size", "tiny"])
    net, rf = D.build(args)
    x0, noise = torch.randn(2, 8, *net.shape)
    rf.loss(net, x0, torch.full((8,), 0.5), noise)[0].backward()
    assert torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm() < 10


def test_teacher_stops_at_the_layer_and_feature_is_the_pooled_block():
    net, calls = network(self_cond="add", layer="3", classes=4), []
    for block in net.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    x, t = batch()
    out, feat, e_t = net(x, t, with_feat=True)
    assert len(calls) == 4 and out.equal(net(x, t)) and feat.allclose(net.features(x, t)["3"], atol=1e-6)
    calls.clear()
    only = net.encode(x, t)
    assert len(calls) == 3 and only[0].equal(feat) and only[1].equal(e_t)


def test_null_class_and_token_pooling():
    net = network(classes=4)
    x, t = batch()
    told = net(x, t, torch.tensor([0, 1, 2]))
    assert net(x, t).equal(net(x, t, torch.full((3,), 4))) and not net(x, t).equal(told)
    mixed = net(x, t, torch.tensor([0, -1, 2]))  # -1 is the null class, too
    assert mixed[1].allclose(net(x, t)[1], atol=1e-5) and mixed[[0, 2]].allclose(told[[0, 2]], atol=1e-5)
    assert not mixed[1].allclose(told[1], atol=1e-3)
    maps = {}
    net.run(x, t, None, None, maps=maps)
    assert all((maps["2"][i] == net.features(x, t, pool="token")["2"][i]).all(1).any() for i in range(3))


def test_qk_norm_bounds_the_logits():
    """Scaling queries and keys changes nothing with --qk-norm, and something without."""
    x, t = batch()
    for qk_norm in (True, False):
        net = network(qk_norm=qk_norm)
        before = net(x, t)
        with torch.no_grad():
            for block in net.blocks:
                block.attn.qkv.weight[:64] *= 3
                block.attn.qkv.bias[:64] *= 3
        assert torch.allclose(net(x, t), before, atol=1e-4) == qk_norm


def test_network_refuses_what_it_cannot_take():
    net = network()
    for kw in ({"y": torch.zeros(3, dtype=torch.long)}, {"aug": torch.zeros(3, 9)}):
        with pytest.raises(ValueError, match="must be"):
            net(*batch(), **kw)
    with pytest.raises(ValueError, match="CLS"):
        net.features(*batch(), pool="cls")
    for kw, says in (({"layer": "5"}, "1, 2, 3, 4"), ({"layer": "4", "self_cond": "add"}, "no decoder")):
        with pytest.raises(ValueError, match=says):
            network(**kw)


# ---- formulation
def test_times_are_lognorm():
    t = D.LatentRF().draw_level(50_000, torch.Generator().manual_seed(0))
    logit = (t / (1 - t)).log()
    assert abs(logit.mean()) < 0.02 and abs(logit.std() - 1) < 0.02


def test_guidance_costs_nothing_outside_its_interval():
    """Inside, one evaluation of twice the batch: with the class and without."""
    calls = []

    def net(x, clock, y=None):
        assert clock.eq(clock[0]).all()
        calls.append((round(1 - clock[0].item(), 4), y if y is None else y.tolist()))
        return torch.zeros_like(x) if y is None else x * (y >= 0).view(-1, 1, 1, 1)

    x, y = torch.ones(2, 1, 2, 2), torch.tensor([0, 3])
    D.LatentRF().sample(net, x, 10, y, cfg_interval=(0.0, 0.89), shift=1.0)
    guided = [t for t, told in calls if told == [0, 3, -1, -1]]
    assert len(calls) == 10 and guided == [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]  # not at 1.0 and 0.9
    assert [t for t, told in calls if told == [0, 3]] == [1.0, 0.9]
    calls.clear()
    D.LatentRF().sample(net, x, 10, y, cfg=1.0)
    assert len(calls) == 10 and all(told == [0, 3] for _, told in calls)
    calls.clear()
    D.LatentRF().sample(net, x)
    assert len(calls) == 250 and all(told is None for _, told in calls)
    one, two = torch.ones(1, 5, 1, 1), torch.zeros(1, dtype=torch.long)
    assert D.LatentRF().velocity(net, one, 0.5, two, cfg=1.5).flatten().tolist() == [-1.5] * 5  # every channel


def test_sampler_follows_the_flow_of_gaussian_data():
    """Data ~ N(0, s^2) have a linear flow, x0 = s noise; Euler halves its error with twice the steps."""
    s, noise = 0.3, torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def net(x, clock, y=None):
        t = (1 - clock).view(-1, 1, 1, 1)
        return -x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    errors = [(D.LatentRF().sample(net, noise, n) - s * noise).abs().max().item() for n in (125, 250)]
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


# ---- runs
def train(out, *flags):
    """Run the script in this process; returns its metrics lines without the header."""
    D.main(D.parse_args([*TINY, "--out", str(out), *flags]))
    return metrics(out)


def test_resume_repeats_an_unbroken_run_bit_for_bit(tmp_path):
    flags = ["--self-cond", "--cond", "--cl", "0.01", "--qk-norm", "--epochs", "2"]
    whole = train(tmp_path / "a", *flags, "--max-steps", "10")
    train(tmp_path / "b", *flags, "--max-steps", "7")
    parts = train(tmp_path / "b", *flags, "--max-steps", "10", "--resume")
    check_resumed(tmp_path / "a", tmp_path / "b", whole, parts)


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], {"patch": 4, "size": "B"}),
        (["--dataset", "cifar100"], {"patch": 2, "cl_t": 0.06, "layer": "8", "epochs": 2000}),
        (["--cache-latents", "x", "--dataset", "imagenet100"],
         {"patch": 1, "resolution": 256, "cl_t": 0.25, "layer": "8", "epochs": 1400, "batch": 1024, "lr": 2e-4,
          "ema": 0.9999, "warmup": 0, "cooldown": 0, "cl_hidden": 4096, "qk_norm": False}),
        (["--cache-latents", "x", "--dataset", "imagenet100", "--cond", "100"], {"layer": "8", "epochs": 1000}),
        (["--cache-latents", "x", "--dataset", "imagenet", "--cond", "1000"],
         {"layer": "10", "epochs": 90}),
        (["--cache-latents", "x", "--dataset", "imagenet", "--cond", "1000", "--size", "L"], {"layer": "20"}),
        (["--cache-latents", "x", "--dataset", "imagenet100", "--size", "XL"], {"layer": "19"}),
    ],
)  # fmt: skip
def test_defaults_are_the_papers(flags, want):
    args = vars(D.parse_args(["--dataset", "elsewhere", *flags]))
    assert {k: args[k] for k in want} == want


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--patch", "5"], "do not divide"), (["--layer", "9"], "1, 2, 3"), (["--cond", "-4"], "out of range"),
        (["--vae", "x.pt"], "--cache-latents DIR"), (["--cache-latents", "x"], "give --vae FILE"),
        (["--cache-latents", "x", "--resolution", "40"], "multiples of 16"), (["--cl-t", "2"], "times from 0.0 to 1.0"),
        (["--cache-latents", "x", "--vae", "none.pt"], "does not exist"), (["--resolution", "0"], "out of range"),
        (["--cache-latents", "x", "--vae", __file__], "no finished latents"), (["--cond", "-3"], "out of range"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        D.main(D.parse_args([*TINY, "--out", "run", *flags]))
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(err) == 1 and says in err[0], err


# ---- latents
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of noise images, 150 train and 20 test, a random small VA-VAE, and the flags that use them."""
    root = tmp_path_factory.mktemp("latents")
    rng = np.random.RandomState(0)
    for split, n in (("train", 150), ("test", 20)):
        for i in range(n):
            path = root / "data/pics" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.randint(0, 256, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    torch.save({"state_dict": D.VAE(32, 4).state_dict()}, root / "vae.pt")
    flags = ["--dataset", "pics", "--data", str(root / "data"), "--resolution", "32", "--vae", str(root / "vae.pt")]
    return root, flags


def cache(pictures, out, *flags):
    return train(out, *pictures[1], "--cache-latents", str(pictures[0] / out.name), *flags)


@pytest.fixture(scope="module")
def cached(pictures, tmp_path_factory):
    """A run on latents, with the cache it made."""
    out = tmp_path_factory.mktemp("whole")
    cache(pictures, out, "--cond", "--self-cond", "--max-steps", "3")
    return out


def test_cache_holds_what_was_promised(pictures, cached):
    """Bytes, both flips, draws from the posterior, normalised, and the way back to pixels."""
    folder = pictures[0] / cached.name
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["meta.json", "test.labels.npy", "test.npy",
                                                              "train.labels.npy", "train.npy"]  # fmt: skip
    assert (folder / "train.npy").stat().st_size == 128 + 2 * 150 * 2 * 4 * 2 * 2  # numpy's header, float16
    args = D.parse_args([*TINY, *pictures[1], "--cache-latents", str(folder)])
    latents, labels, classes = D.load_data(args, "train")
    assert latents.shape == (150, 2, 4, 2, 2) and latents.dtype == torch.float16
    assert labels.bincount().tolist() == [75, 75] and classes == ["a", "b"]
    assert len(D.load_data(args, "test")[0]) == 20
    maps = Path("/proc/self/maps")  # memory-mapped, not read
    assert not maps.exists() or str(folder / "train.npy") in maps.read_text()
    x0, mirrored = (D.to_x0(latents, torch.full((150,), flip)) for flip in (False, True))  # each (150, 4, 2, 2)
    assert x0.dtype == torch.float32 and x0.equal(D.to_x0(latents)) and not x0.equal(mirrored)
    two = D.to_x0(latents[torch.tensor([3, 5])], torch.tensor([True, False]))
    assert two.equal(torch.stack([mirrored[3], x0[5]]))
    both = torch.cat([x0, mirrored])  # the statistics are of the same images, but of other draws: 1 200 numbers
    assert both.mean((0, 2, 3)).abs().max() < 0.15 and (both.std((0, 2, 3)) - 1).abs().max() < 0.1

    # Taken back, either flip is a draw from the posterior of its image: unit normal, once its mean and std are out.
    mean, std = (torch.tensor(args.latents[k]).view(-1, 1, 1) for k in ("mean", "std"))
    vae = D.load_vae(pictures[0] / "vae.pt", "cpu")
    files = [file for file, _ in D.list_images(pictures[0] / "data/pics", "train")[0]]
    pixels = D.to_x0(torch.from_numpy(np.stack([D.load_image(file, 32) for file in files])))
    for x, view in ((x0, pixels), (mirrored, pixels.flip(3))):
        centre, width = vae.encode(view)
        z = (x * std + mean - centre) / width
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.05
    got = D.decoder(args, torch.device("cpu"))(x0[:3])
    assert (got.int() - D.to_uint8(vae.decode(x0[:3] * std + mean)).int()).abs().max() <= 1


def test_statistics_are_of_random_training_images(pictures, cached, tmp_path, monkeypatch):
    """64 of 150 images give other numbers than all of them, near those, and the same ones again."""
    monkeypatch.setattr(D, "STATISTICS", 64)
    found = []
    for name in ("a", "b"):
        args = D.parse_args([*TINY, *pictures[1], "--cache-latents", str(tmp_path / name)])
        D.load_data(args, "train")
        found.append(json.loads((tmp_path / name / "meta.json").read_text()))
    whole = json.loads((pictures[0] / cached.name / "meta.json").read_text())
    assert found[0] == found[1] and found[0]["std"] != whole["std"]
    assert found[0]["std"] == pytest.approx(whole["std"], rel=0.2)


def test_a_killed_cache_goes_on_where_it_was(pictures, cached, tmp_path, monkeypatch):
    """Stopped before the last block: nothing has its final name; resumed, it encodes the rest only; equal files."""
    folder, original, seen = pictures[0] / tmp_path.name, D.load_image, []

    def stop_at(limit):
        def load_image(path, resolution):
            seen.append(path)
            if len(seen) > limit:
                raise KeyboardInterrupt
            return original(path, resolution)

        monkeypatch.setattr(D, "load_image", load_image)

    stop_at(150 + 128 + 10)  # for the statistics, two of three blocks, and a part of the last one
    with pytest.raises(KeyboardInterrupt):
        cache(pictures, tmp_path, "--max-steps", "1")
    assert not (folder / "train.npy").exists() and np.load(folder / "train.done.npy").tolist() == [1, 1, 0]
    seen.clear()
    stop_at(10_000)
    cache(pictures, tmp_path, "--max-steps", "1")
    assert len(seen) == 22 + 20  # the last block and the test split
    whole = pictures[0] / cached.name
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", ["train.part.npy", "train.done.npy"])
def test_a_cache_that_lost_a_file_says_so(pictures, tmp_path, capsys, monkeypatch, name):
    args = D.parse_args([*TINY, *pictures[1], "--cache-latents", str(tmp_path / "c")])
    with monkeypatch.context() as patch:
        patch.setattr(D, "seeded", lambda *numbers: 1 / 0 if numbers == (1, True, 0) else 0)  # the first block
        with pytest.raises(ZeroDivisionError):
            D.load_data(args, "train")
    (tmp_path / "c" / name).unlink()
    with pytest.raises(SystemExit) as stop:
        D.load_data(args, "train")
    assert stop.value.code == 2 and "is damaged" in capsys.readouterr().err


def test_a_full_disk_is_said_at_the_start(pictures, tmp_path, capsys, monkeypatch):
    """Room is taken before the first image is read; what was begun is gone."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    rooms = []
    monkeypatch.setattr(D.os, "posix_fallocate", lambda *room: full() if rooms else rooms.append(room))  # train fits
    monkeypatch.setattr(D, "load_image", None)  # none is read
    args = D.parse_args([*TINY, *pictures[1], "--cache-latents", str(tmp_path / "c")])
    with pytest.raises(SystemExit) as stop:
        D.load_data(args, "train")
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "150 images x 2 flips" in captured.out
    assert captured.err.count("\n") == 1 and "no room for 1.28e-06 GB" in captured.err
    assert not list((tmp_path / "c").glob("*part*")) and not (tmp_path / "c/meta.json").exists()


def test_room_on_disk_is_really_taken(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "encode_images", lambda *_: 1 / 0)  # as if killed right after
    args = D.parse_args([*TINY, *pictures[1], "--resolution", "512", "--cache-latents", str(tmp_path / "c")])
    with pytest.raises(ZeroDivisionError):
        D.load_data(args, "train")
    stat = (tmp_path / "c/train.part.npy").stat()
    assert stat.st_size == 128 + 2 * 150 * 2 * 4 * 32 * 32 and stat.st_blocks * 512 >= stat.st_size


def test_latents_that_are_not_finite_are_refused(pictures, tmp_path, capsys, monkeypatch):
    def encode(vae, pairs, resolution, seed):
        z = torch.zeros(len(pairs), 2, 4, 2, 2)
        z[0, 0, 0, 0, 0] = 1e5  # more than float16 holds
        return z

    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "stats.pt")
    monkeypatch.setattr(D, "encode_images", encode)
    with pytest.raises(SystemExit) as stop:
        cache(pictures, tmp_path, "--latent-stats", str(tmp_path / "stats.pt"), "--max-steps", "1")
    assert stop.value.code == 2 and "infinity or NaN" in capsys.readouterr().err


def test_images_without_classes_become_latents(pictures, tmp_path):
    for file in (pictures[0] / "data/pics").glob("*/*/*.png"):
        split = tmp_path / "flat" / file.parts[-3]
        split.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, split)
    flags = ["--dataset", "flat", "--data", str(tmp_path), *pictures[1][4:], "--cache-latents", str(tmp_path / "cache")]
    assert train(tmp_path / "run", *flags, "--max-steps", "1")[0]["step"] == 1
    assert load(tmp_path / "run")["args"]["classes"] == []


def test_one_job_at_a_time_makes_a_cache(pictures, tmp_path, capsys):
    _lock = D.claim(pictures[0] / tmp_path.name)
    with pytest.raises(SystemExit) as stop:
        cache(pictures, tmp_path, "--max-steps", "1")
    assert stop.value.code == 2 and "another job is writing there" in capsys.readouterr().err


def test_a_cache_may_be_larger_than_memory(cached, pictures, tmp_path):
    """10 GB, nearly all a hole of the file; a limit of what a process may map for writing stands for full memory."""
    folder = tmp_path / "large"
    shutil.copytree(pictures[0] / cached.name, folder)
    large = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float16, (150, 2, 4, 2048, 2048))
    large[149, 1, 3, 2047, 2047], large = 7, None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, before[1]))
    try:
        images, _, _ = D.load_data(D.parse_args([*TINY, *pictures[1], "--cache-latents", str(folder)]), "train")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert images.nbytes > 2**33 and images[149, 1, 3, 2047, 2047] == 7


def test_a_run_goes_on_without_the_vae_whose_work_is_done(cached, pictures, tmp_path):
    flags = [*pictures[1][:-1], str(tmp_path / "vae.pt"), "--cache-latents", str(pictures[0] / cached.name)]
    shutil.copy(pictures[1][-1], tmp_path / "vae.pt")
    train(tmp_path / "a", *flags, "--max-steps", "1")
    (tmp_path / "vae.pt").unlink()
    train(tmp_path / "a", *flags, "--max-steps", "2", "--resume")
    assert metrics(tmp_path / "a")[-1]["step"] == 2


def test_two_ranks_make_the_same_cache_and_the_same_steps(pictures, tmp_path):
    flags = [*pictures[1], "--cond", "--self-cond", "--cl", "0.01", "--max-steps", "3"]
    folders = {n: str(pictures[0] / f"{tmp_path.name}-{n}") for n in (1, 2)}
    for n, folder in folders.items():
        done = launch(n, "train_dit.py", *TINY, *flags, "--cache-latents", folder, "--out", str(tmp_path / str(n)))
        assert done.stdout.count("150 images x 2 flips") == 1
    for name in ("train.npy", "test.npy", "meta.json"):
        one, two = (Path(folder, name).read_bytes() for folder in folders.values())
        assert one == two, name
    check_equal_steps(tmp_path / "1", tmp_path / "2", rel=1e-3)


def test_tools_take_latents_through_the_seam(pictures, cached, tmp_path, capsys):
    sample.main(sample.parse_args([str(cached), "--n", "3", "--steps", "2", "--out", str(tmp_path / "s.npz")]))
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 32, 32, 3)
    flags = [str(cached), "--grid", "--t", "0.25", "--pixels", "--epochs", "2", "--batch", "16"]
    cells = probe.main(probe.parse_args([*flags, "--json", str(tmp_path / "p.json"), "--cache"]))[0]["cells"]
    assert [c["layer"] for c in cells] == ["1", "2", "3", "4", "5", "6", "pixels"]
    other = tmp_path / "other.pt"
    torch.save(D.VAE(32, 4).state_dict(), other)
    for wrong, says in ((["--vae", str(tmp_path / "none.pt")], "does not exist"),
                        (["--vae", str(cached / "last.pt")], "not the file"), (["--vae", str(other)], "not the file")):
        with pytest.raises(SystemExit) as stop:
            sample.main(sample.parse_args([str(cached), "--n", "1", "--steps", "1", *wrong]))
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_sample_grids_of_latents_are_decoded_where_there_is_a_vae(pictures, cached, tmp_path):
    folder = str(pictures[0] / cached.name)
    args = D.parse_args([*TINY, *pictures[1], "--cache-latents", folder, "--out", str(tmp_path)])
    D.load_data(args, "train")
    net, diffusion = D.build(args)
    diffusion.sample = lambda net, noise, y: noise
    GRID(args, net, diffusion, torch.device("cpu"), 7)
    assert Image.open(tmp_path / "samples_0007.png").size == (4 * 34 + 2, 4 * 34 + 2)
    args.vae = None
    GRID(args, net, diffusion, torch.device("cpu"), 8)
    assert not (tmp_path / "samples_0008.png").exists()


def test_a_cache_is_not_mixed_up(pictures, cached, tmp_path, capsys):
    """Another VA-VAE, or other images, are an error; a finished cache needs neither the VA-VAE nor the images."""
    torch.manual_seed(1)
    torch.save(D.VAE(32, 4).state_dict(), tmp_path / "other.pt")
    folder = ["--cache-latents", str(pictures[0] / cached.name), "--resolution", "32", "--max-steps", "1"]
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "a", *pictures[1][:-1], str(tmp_path / "other.pt"), *folder)
    assert stop.value.code == 2 and "another vae" in capsys.readouterr().err
    begun = shutil.copytree(pictures[0] / cached.name, tmp_path / "begun")
    (begun / "test.npy").unlink()  # as if it were under way
    shutil.copytree(pictures[0] / "data/pics", tmp_path / "data/pics")
    (tmp_path / "data/pics/test/a/0.png").rename(tmp_path / "data/pics/test/a/x.png")
    for wrong, says in ((["--vae", str(tmp_path / "other.pt")], "another vae"),
                        (["--data", str(tmp_path / "data")], "another files")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "b", *pictures[1], "--cache-latents", str(begun), *wrong, "--max-steps", "1")
        assert stop.value.code == 2 and says in capsys.readouterr().err
    lines = train(tmp_path / "c", "--dataset", "pics", "--data", str(tmp_path), *folder, "--cond")
    assert len(lines) == 1 and load(tmp_path / "c")["args"]["classes"] == ["a", "b"]
    for wrong, says in ((["--dataset", "other"], "dataset pics"), (["--resolution", "64"], "resolution 32")):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "d", "--dataset", "pics", *folder, *wrong)
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_run_resumes_without_the_vae_and_with_a_moved_cache(pictures, cached, tmp_path, capsys):
    """The probe finds a moved cache by --data; a cache of other latents is refused."""
    moved = shutil.copytree(pictures[0] / cached.name, tmp_path / "moved")
    flags = ["--dataset", "pics", "--resolution", "32", "--cond", "--cache-latents"]
    train(tmp_path / "run", *flags, str(pictures[0] / cached.name), "--max-steps", "1")
    train(tmp_path / "run", *flags, str(moved), "--max-steps", "2", "--resume")
    assert load(tmp_path / "run")["step"] == 2
    probe.main(probe.parse_args([str(cached), "--data", str(moved), "--epochs", "1", "--batch", "16"]))
    meta = json.loads((moved / "meta.json").read_text())
    (moved / "meta.json").write_text(json.dumps(meta | {"vae": "0"}))
    for text, says in ((None, "another vae"), ("{", "damaged"), ('{"vae": "0"}', "damaged")):
        if text:
            (moved / "meta.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            probe.main(probe.parse_args([str(cached), "--data", str(moved), "--epochs", "1"]))
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_public_weights_become_a_checkpoint_without_data(pictures, cached, tmp_path, capsys):
    """Their statistics come in a file of their own and are what normalises, in sampling and on a cache."""
    stats = {"mean": torch.linspace(-1, 1, 4).view(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 3.0)}
    torch.save(stats, tmp_path / "stats.pt")
    torch.manual_seed(3)
    source = D.DiT(4, 2, 1, *D.SIZES["tiny"], classes=2)
    torch.save({"ema": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "public.pt")
    flags = ["--dataset", "pics", "--resolution", "32", "--cond", "2", "--vae", pictures[1][-1], "--max-steps", "0",
             "--latent-stats", str(tmp_path / "stats.pt"), "--init", str(tmp_path / "public.pt")]  # fmt: skip
    train(tmp_path / "run", *flags, "--cache-latents", str(tmp_path / "not-there"))
    model = sample.load_checkpoint(tmp_path / "run")
    assert all(model.net.state_dict()[k].equal(v) for k, v in source.state_dict().items())
    z = torch.randn(2, 4, 2, 2)
    vae = D.load_vae(pictures[0] / "vae.pt", "cpu")
    want = D.to_uint8(vae.decode(z * 3 + stats["mean"]))
    assert (D.decoder(model.args, torch.device("cpu"))(z).int() - want.int()).abs().max() <= 1
    model.args.cache_latents = str(pictures[0] / cached.name)
    with pytest.raises(SystemExit):  # that cache is normalised by its own statistics
        D.load_data(model.args, "train")
    assert "another mean" in capsys.readouterr().err
    model.args.cache_latents, model.args.data = str(tmp_path / "new"), pictures[1][3]
    latents, raw = D.load_data(model.args, "train")[0], np.load(pictures[0] / cached.name / "train.npy")
    old = json.loads((pictures[0] / cached.name / "meta.json").read_text())
    mean, std = (torch.tensor(old[k]).view(-1, 1, 1) for k in ("mean", "std"))
    raw = torch.from_numpy(raw).float() * std + mean
    assert (latents * 3 + stats["mean"].view(-1, 1, 1) - raw).abs().max() < 0.01


@pytest.mark.parametrize("lost", ["--qk-norm", "--self-cond", "--cond"])
def test_init_refuses_what_it_would_drop(tmp_path, capsys, lost):
    flags = ["--qk-norm", "--self-cond", "--cond"]
    source, _ = D.build(D.parse_args([*TINY, *flags]))
    torch.save(source.state_dict(), tmp_path / "public.pt")
    for given in (flags, [flag for flag in flags if flag != lost]):
        net, _ = D.build(D.parse_args([*TINY, *given]))
        if given == flags:
            D.load_weights(net, tmp_path / "public.pt")
            continue
        with pytest.raises(SystemExit) as stop:
            D.load_weights(net, tmp_path / "public.pt")
        assert stop.value.code == 2 and "have no place" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--cfg", "-1"], ["--cfg-interval", "0.9", "0.1"], ["--steps", "0"]])
def test_sampling_flags_that_make_no_sense(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(sample.parse_args([str(tmp_path), *flags]))
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_run_is_made_longer(tmp_path):
    """--epochs may change on --resume, and what follows from it."""
    train(tmp_path, "--epochs", "1")
    train(tmp_path, "--epochs", "2", "--resume")
    assert load(tmp_path)["step"] == 16


def test_guidance_flags_reach_the_sampler_and_nothing_else_takes_them(tmp_path, capsys):
    train(tmp_path / "cond", "--cond", "--max-steps", "1")
    model = sample.load_checkpoint(tmp_path / "cond")
    options, rows = {"steps": 10, "cfg_interval": (0, 0.5), "shift": 1.0}, []
    model.net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for cfg, want in ((1, [2] * 10), (2, [2] * 5 + [4] * 5)):
        next(sample.generate(model, 2, cfg=cfg, **options))
        assert rows == want
        rows.clear()
    args = T.parse_args(["--dataset", "shapes", "--backbone", "tiny"])
    state = {"script": "train_unet", "args": vars(args), "ema": T.build(args)[0].state_dict(), "epoch": 0, "step": 0}
    torch.save(state, tmp_path / "unet.pt")
    train(tmp_path / "plain", "--max-steps", "1")
    for path, flag, says in (("unet.pt", "--cfg", "--cfg: DDPM"), ("plain", "--cfg", "is unconditional")):
        with pytest.raises(SystemExit) as stop:
            sample.main(sample.parse_args([str(tmp_path / path), "--n", "1", "--steps", "1", flag, "2"]))
        assert stop.value.code == 2 and says in capsys.readouterr().err
