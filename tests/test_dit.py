"""train_dit.py: parity with LightningDiT and its VA-VAE, guidance, the cache of latents, and runs by its user."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, check_equal_steps, launch, load, make_folder, metrics, refused, run, spy
from PIL import Image

import probe
import sample
import train_dit as D

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--size", "tiny", "--batch", "8"]
GRID, SIZES = D.save_grid, (D.SHARD, D.BLOCK, D.STATISTICS)

# ---- parity
def official(f, config):
    """The fixture's network; what it keeps from its constructor must be what ours computes."""
    sizes = ("in_channels", "input_size", "patch_size", "hidden_size", "depth", "num_heads")
    net = D.DiT(*(config[name] for name in sizes), classes=config["num_classes"])
    missing, unexpected = net.load_state_dict(f.weights(), strict=False)
    assert set(missing) == set(f.kept) and not unexpected and not net.pos_embed.requires_grad
    return net.eval().requires_grad_(False)

def test_dit(golden):
    """Every block's tokens, their pooled means and the output."""
    f, maps = golden("dit_small"), {}
    net = official(f, f.config)
    for name, value in f.kept_values.items():
        assert torch.allclose(net.state_dict()[name], value, rtol=2e-5, atol=2e-5), name
    x, t, y = (f.inputs[k] for k in "xty")
    f.check("final", net.run(x, t, y, maps=maps)[0])
    features = net.features(x, t, y)
    for i, name in enumerate(net.layers):
        f.check(f"block_{i}", maps[name])
        f.check(f"gap_block_{i}", features[name])

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

def test_transport(golden):
    f, rf = golden("transport"), D.LatentRF()
    a, b, points = f.config["a"], f.config["b"], f.config["num_steps"]
    data, noise, start = (f.inputs[k] for k in ("data", "noise", "start"))
    t = 1 - f.inputs["t_ref"]
    f.check("xt_our", rf.add_noise(data, t, noise))

    def net(x, clock, y=None, aug=None, with_feat=False):
        out = a * x + b * clock.view(-1, 1, 1, 1)
        return (out, None, None) if with_feat else out

    for name, shift in (("plain", 1.0), ("shift", 1 / f.config["timestep_shift"])):
        f.check(f"grid_our_{name}", torch.tensor(rf.times(points - 1, shift)))
        f.check(f"sample_{name}", rf.sample(net, start, points - 1, shift=shift))
    mse, cos = f.outputs["loss_per_sample"].mean(), f.outputs["cos_loss_per_sample"].mean()
    f.check("loss_per_sample", rf.loss(net, data, t, noise)[0], mse + cos)

def test_vae(golden, tmp_path):
    """As the public file wraps it: under state_dict, among the weights of what trained it."""
    f = golden("vavae_small")
    torch.save({"state_dict": f.weights() | {"loss.logvar": torch.zeros(1)}, "epoch": 3}, tmp_path / "vae.pt")
    vae = D.load_vae(tmp_path / "vae.pt", "cpu")
    mean, std = vae.encode(f.inputs["image"])
    f.check("mean", mean)
    f.check("logvar", 2 * std.log())
    f.check("decoded", vae.decode(mean))
    with torch.device("meta"):
        assert sum(p.numel() for p in D.VAE().parameters()) == 69_836_067

# ---- flags
def train(out, *flags):
    """Run the script in this process; returns its metrics lines without the header."""
    run(D, *TINY, "--out", out, *flags)
    return metrics(Path(out))

@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--patch 5", "do not divide"), ("--cl-t 2", "times from 0 to 1"), ("--cache-latents x", "give --vae FILE"),
        ("--vae x.pt", "--cache-latents DIR"), ("--latent-stats x.pt", "--cache-latents DIR"),
        ("--cache-latents x --vae none.pt", "holds no latents"),
        ("--cache-latents x --resolution 40", "multiples of 16 pixels, not 40"),
        (f"--cache-latents x --vae {__file__}", "shapes/train/<class>/*"),  # nothing to encode
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, train, "run", *flags.split())
    assert not list(tmp_path.iterdir())

# ---- latents
RUN = ["--cond", "--self-cond", "--cl", "0.01", "--max-steps", "3"]

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of 150 and 20 images of noise, two shards and one, a random small VA-VAE, and flags for them."""
    root = tmp_path_factory.mktemp("pictures")
    make_folder(root / "data", "pics", ("train",), "ab", 75, (40, 36))
    make_folder(root / "data", "pics", ("test",), "ab", 10, (40, 36))
    torch.manual_seed(0)
    torch.save({"state_dict": D.VAE(32, 4).state_dict()}, root / "vae.pt")
    flags = ["--dataset", "pics", "--data", str(root / "data"), "--resolution", "32", "--vae", str(root / "vae.pt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(D, "SHARD", 128)
        patch.setattr(D, "STATISTICS", 100)
        yield root, flags

@pytest.fixture(scope="module")
def cached(pictures, tmp_path_factory):
    """A run on latents, and the folder of the latents that it made."""
    home = tmp_path_factory.mktemp("cached")
    train(home / "run", *pictures[1], *RUN, "--cache-latents", home / "latents")
    return home / "run", home / "latents"

def open_cache(folder, *flags, split="train"):
    """Latents, labels and classes of a cache, which is made if it must be, and the flags, args.latents filled in."""
    args = D.parse_args([*TINY, "--cache-latents", *map(str, [folder, *flags])])
    return *D.load_data(args, split), args

def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

def seed(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])

def draws(vae, files, seed):
    """Draws from the posterior of images and their mirror images, (n, 2, 4, 2, 2)."""
    pixels = torch.stack([D.load_image(file, 32) for file in files]) / 127.5 - 1
    both = torch.stack([pixels, pixels.flip(3)], dim=1).flatten(0, 1)
    mean, std = (torch.cat(parts) for parts in zip(*map(vae.encode, both.split(16)), strict=True))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return (mean + std * noise).unflatten(0, (-1, 2))

def test_cache_equals_a_replay_and_needs_neither_images_nor_vae(pictures, cached, tmp_path):
    """Two shards, of 128 images in two blocks and of 22; 100 images for the statistics. The sizes are smaller here."""
    assert SIZES == (4096, 64, 2048)
    folder, vae = cached[1], D.load_vae(pictures[0] / "vae.pt", "cpu")
    images = pictures[0] / "data/pics"
    files = {split: sorted(map(str, images.glob(f"{split}/*/*"))) for split in ("train", "test")}
    some = [files["train"][i] for i in np.random.RandomState(0).permutation(150)[:100]]
    z = torch.cat([draws(vae, some[i : i + 64], seed(0, i)) for i in (0, 64)])
    mean, std = z.mean((0, 1, 3, 4)), z.std((0, 1, 3, 4))
    sha = hashlib.sha256((pictures[0] / "vae.pt").read_bytes()).hexdigest()
    assert torch.load(folder / "meta.pt", weights_only=True) == {
        "dataset": "pics", "resolution": 32, "classes": ["a", "b"], "train": 150, "test": 20, "vae": sha[:16],
        "mean": mean.tolist(), "std": std.tolist(),
    }  # fmt: skip
    assert content(folder).keys() == {"meta.pt", "test_00000.pt", "train_00000.pt", "train_00001.pt"}
    latents = {"train": [], "test": []}
    for split, number, blocks in (("train", 0, [(0, 0), (64, 1)]), ("train", 1, [(128, 2)]), ("test", 0, [(0, 0)])):
        z = torch.cat([draws(vae, files[split][i : i + 64], seed(1, split == "train", n)) for i, n in blocks])
        latents[split].append(((z - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).half())
        part = torch.load(folder / f"{split}_{number:05d}.pt", weights_only=True)
        assert part.keys() == {"latents", "labels"} and part["latents"].equal(latents[split][-1])
    for split in ("train", "test"):
        x0, labels, classes, _ = open_cache(folder, *pictures[1][:-2], "--data", tmp_path, split=split)
        assert [classes[i] for i in labels] == [Path(file).parts[-2] for file in files[split]]
        assert x0[:].equal(torch.cat(latents[split]))
    maps, flip = Path("/proc/self/maps"), torch.arange(20) % 3 == 0
    assert not maps.exists() or f"{folder}/test_00000.pt" in maps.read_text()  # x0 is of the file, not read
    assert D.to_x0(x0[:], flip).equal(x0[:][range(20), flip.int()].float())

def test_shards_are_indexed_as_one_tensor(monkeypatch):
    monkeypatch.setattr(D, "SHARD", 4)
    whole = torch.randn(10, 2, 3, 2, 2).half()
    shards = D.Shards(list(whole.split(4)))
    for rows in (
        torch.tensor([9, 0, 4, 3]), torch.tensor([3, 3, 8, 3]), torch.tensor([-1, -10]), torch.arange(10) % 3 == 0,
        slice(None), slice(2, 9), slice(8, 20), slice(1, None, 4),
    ):  # fmt: skip
        assert shards[rows].shape == whole[rows].shape and shards[rows].equal(whole[rows]), rows
    for name in ("shape", "ndim", "nbytes", "device"):
        assert getattr(shards, name) == getattr(whole, name), name
    assert len(shards) == 10 and shards.to(torch.device("cpu")) is shards

@pytest.mark.slow
def test_a_killed_encoding_goes_on_with_the_missing_shards(pictures, cached, tmp_path, monkeypatch):
    """What is finished is neither read again nor written again, and the end is the same."""
    seen = []

    def stop_in_the_second_shard(path, resolution):
        seen.append(path)
        if len(seen) > 100 + 128 + 10:  # for the statistics, one shard, and a part of the next
            raise KeyboardInterrupt

    def states():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    spy(monkeypatch, D, "load_image", stop_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path, *pictures[1])
    before = states()
    assert sorted(before) == ["meta.pt", "train_00000.pt"]
    for images in (22 + 20, 22, 0):
        seen.clear()
        open_cache(tmp_path, *pictures[1])
        assert len(seen) == images and before.items() <= states().items() and content(tmp_path) == content(cached[1])
        if images > 22:
            (tmp_path / "train_00001.pt").unlink()

@pytest.mark.slow
def test_two_ranks_make_the_same_shards_and_the_same_steps(pictures, cached, tmp_path):
    (tmp_path / "script.py").write_text(f"""import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import conftest, train_dit as D
make_shards = D.make_shards
def report(args, meta, shards, device):
    print("makes", *[shard[0].name for shard in shards])
    make_shards(args, meta, shards, device)
vars(D).update(conftest.shrink(D), SHARD=128, STATISTICS=100, make_shards=report)
D.main(D.parse_args())
""")
    flags = [*pictures[1], *RUN, "--cache-latents", str(tmp_path / "latents"), "--out", str(tmp_path / "run")]
    lines = launch(2, str(tmp_path / "script.py"), *TINY, *flags).stdout.splitlines()
    made = {line for line in lines if line.startswith("makes")}
    assert made == {"makes train_00000.pt test_00000.pt", "makes train_00001.pt"}  # in turn
    assert content(tmp_path / "latents") == content(cached[1])
    check_equal_steps(cached[0], tmp_path / "run", rel=1e-3)

@pytest.mark.slow
def test_images_without_classes_become_latents(pictures, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(pictures[0] / "data/pics" / split / "a", tmp_path / "flat" / split)
    flags = [*pictures[1], "--dataset", "flat", "--data", tmp_path, "--cache-latents", tmp_path / "latents"]
    assert train(tmp_path / "run", *flags, "--max-steps", "1")[0]["step"] == 1
    assert load(tmp_path / "run")["args"]["classes"] == []
    assert "--cond needs classes" in refused(capsys, train, tmp_path / "cond", *flags, "--cond")

def test_a_cache_is_not_mixed_up(pictures, cached, tmp_path, capsys):
    """Nor does one that was begun go on with other images."""
    whole, begun = cached[1], shutil.copytree(cached[1], tmp_path / "begun")
    (begun / "train_00000.pt").unlink()
    before = content(begun)
    images = shutil.copytree(pictures[0] / "data/pics", tmp_path / "data/pics")
    torch.save(D.VAE(32, 4).state_dict(), tmp_path / "other.pt")
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "stats.pt")
    vae = ["--vae", pictures[1][-1]]
    renamed = tmp_path / "renamed/pics"
    shutil.copytree(images, renamed)
    for split in ("train", "test"):
        (renamed / split / "b").rename(renamed / split / "0b")
    for folder, more, lost, says in (
        (whole, ["--vae", tmp_path / "other.pt"], None, "latents of another vae"),
        (whole, ["--latent-stats", tmp_path / "stats.pt"], None, "latents of another mean"),
        (whole, ["--dataset", "other"], None, "latents of another dataset (pics)"),
        (whole, ["--resolution", "64"], None, "latents of another resolution (32)"),
        (begun, ["--vae", tmp_path / "none.pt"], None, "none.pt does not exist"),
        (begun, [], None, "is not complete: give --vae FILE"),
        (begun, [*vae, "--data", tmp_path / "renamed"], None, "there are 150; or classes differ"),
        (begun, vae, "test/a/0.png", "was begun with 20 test images, there are 19"),
        (begun, vae, "train/a/0.png", "was begun with 150 train images, there are 149"),
    ):
        if lost:
            (images / lost).unlink()
        assert says in refused(capsys, open_cache, folder, *pictures[1][:-2], "--data", tmp_path / "data", *more)
    assert content(begun) == before

def test_a_run_goes_on_where_its_latents_have_moved(pictures, cached, tmp_path, capsys):
    """The VA-VAE, whose work is done, may be gone; the probe finds the latents by --data."""
    folder = shutil.copytree(cached[1], tmp_path / "moved")
    shutil.copy(pictures[1][-1], tmp_path / "vae.pt")
    out, flags = tmp_path / "run", [*pictures[1], "--vae", tmp_path / "vae.pt", "--cond", "--cache-latents"]
    train(out, *flags, cached[1], "--max-steps", "1")
    (tmp_path / "vae.pt").unlink()
    assert train(out, *flags, folder, "--max-steps", "2", "--resume")[-1]["step"] == load(out)["step"] == 2
    run(probe, out, "--data", folder, "--epochs", "1", "--batch", "16")
    torch.save(D.VAE(32, 4).state_dict(), tmp_path / "vae.pt")  # another one in its place
    says = refused(capsys, train, out, *flags, tmp_path / "new", "--max-steps", "3", "--resume")
    assert "is not the file that the run's latents were made with" in says and not (tmp_path / "new").exists()

@pytest.mark.slow
def test_public_weights_become_a_checkpoint(pictures, cached, tmp_path):
    """Their statistics come in a file of their own and are what normalises, in sampling and on a cache."""
    mean, std = torch.linspace(-1, 1, 4).view(1, 4, 1, 1), torch.full((1, 4, 1, 1), 3.0)
    torch.save({"mean": mean, "std": std}, tmp_path / "stats.pt")
    torch.manual_seed(3)
    source = D.DiT(4, 2, 1, *D.SIZES["tiny"], classes=2)
    torch.save({"ema": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "public.pt")
    train(tmp_path / "run", *pictures[1], "--cache-latents", tmp_path / "latents", "--cond", "--max-steps", "0",
          "--latent-stats", tmp_path / "stats.pt", "--init", tmp_path / "public.pt")  # fmt: skip
    model = sample.load_checkpoint(tmp_path / "run")
    assert model.step == 0 and all(model.net.state_dict()[k].equal(v) for k, v in source.state_dict().items())
    z, vae = torch.randn(2, 4, 2, 2), D.load_vae(pictures[0] / "vae.pt", "cpu")
    want = D.to_uint8(vae.decode(z * 3 + mean))
    assert (D.decoder(model.args, torch.device("cpu"))(z).int() - want.int()).abs().max() <= 1
    latents = D.load_data(model.args, "train")[0][:]
    others, _, _, args = open_cache(cached[1], *pictures[1])
    others = others[:] * torch.tensor(args.latents["std"]).view(4, 1, 1)
    others += torch.tensor(args.latents["mean"]).view(4, 1, 1)
    assert (latents * 3 + mean - others).abs().max() < 0.01

# ---- tools
def test_tools_take_latents_through_the_seam(cached, tmp_path, capsys):
    run(sample, cached[0], "--n", "3", "--steps", "2", "--out", tmp_path / "s.npz")
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 32, 32, 3)
    flags = "--grid --t 0.25 --pixels --epochs 2 --batch 16 --cache --json".split()
    cells = run(probe, cached[0], *flags, tmp_path / "p.json")[0]["cells"]
    assert [c["layer"] for c in cells] == ["1", "2", "3", "4", "5", "6", "pixels"]
    torch.save(D.VAE(32, 4).state_dict(), tmp_path / "other.pt")
    for wrong, says in ((tmp_path / "none.pt", "No such file"), (cached[0] / "last.pt", "is not the file"),
                        (tmp_path / "other.pt", "is not the file")):  # fmt: skip
        assert says in refused(capsys, run, sample, cached[0], "--n", "1", "--steps", "1", "--vae", wrong)

def test_sample_grids_of_latents_are_decoded_where_there_is_a_vae(pictures, cached, tmp_path):
    *_, args = open_cache(cached[1], *pictures[1], "--out", tmp_path)
    net, diffusion = D.build(args)
    diffusion.sample = lambda net, noise, y: noise
    GRID(args, net, diffusion, torch.device("cpu"), "0007")
    assert Image.open(tmp_path / "samples_0007.png").size == (4 * 66 + 2, 4 * 66 + 2)
    for epoch, vae in ((8, None), (9, str(tmp_path / "none.pt"))):
        args.vae = vae
        GRID(args, net, diffusion, torch.device("cpu"), epoch)
    assert len(list(tmp_path.iterdir())) == 1
