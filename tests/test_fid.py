"""fid.py: the Inception and both numbers against the golden data and a closed form; references; the user's mistakes.

tests/test_protocols.py replays whole calls.
"""

import email.message
import io
import json
import urllib.error

import numpy as np
import pytest
import torch
from conftest import Golden, launch, make_checkpoint, refused, run
from PIL import Image
from torch import nn

import fid
import train_dit
import train_unet


class FakeInception:
    """Colour means, repeated to 2048 features: what is done with references does not depend on the network."""
    sha, fc = "fake", nn.Linear(1, 1)  # whose device is asked for

    def __call__(self, x):
        feat = x.mean((2, 3)).repeat(1, 683)[:, :2048]
        return feat, feat[:, :1008].double()

def random_images(n, size=16, seed=0):
    return np.random.RandomState(seed).randint(256, size=(n, size, size, 3), dtype=np.uint8)

def write_npz(path, **arrays):
    with open(path, "wb") as file:  # np.savez would change the name
        np.savez(file, **arrays)
    return path

def write_folder(path, images):
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path

# ---- The Inception ---------------------------------------------------------------------------------------------------
def resize_tensorflow1(images):
    """torch-fidelity's preprocessing: output pixel i reads input position i * in / 299, borders clamped."""
    side = images.shape[-1]
    place = (torch.arange(299) * (side / 299)).clamp(max=side - 1)
    w = (1 - (place[:, None] - torch.arange(side)).abs()).clamp(min=0)  # (299, side)
    return (w @ images.float() @ w.T - 128) / 128

@torch.no_grad()
def test_inception_equals_both_libraries():
    record, net, taps = Golden("inception"), fid.Inception().eval(), {}
    assert {name: list(t.shape) for name, t in net.state_dict().items()} == record.shapes
    net.load_state_dict(record.weights())
    for name, tap in (("maxpool1", "64"), ("maxpool2", "192"), ("Mixed_6e", "768")):
        module = net.get_submodule(name)
        module.register_forward_hook(lambda _m, _x, out, tap=tap: taps.update({tap: out.mean((2, 3))}))
    small = record.inputs["small_uint8"]
    large = record.inputs["base_uint8"].repeat_interleave(13, 2).repeat_interleave(13, 3)
    for case, x in (("fid_{}_small", fid.preprocess(small)), ("fid_{}_large", fid.preprocess(large)),
                    ("fidelity_{}_small", resize_tensorflow1(small))):  # fmt: skip
        feat, unbiased = net(x)
        for tap, value in {**taps, "2048": feat, "logits": unbiased + net.fc.bias}.items():
            record.check(case.format(tap), value)
    record.check("fidelity_logits_unbiased_small", unbiased)

def test_weights_that_cannot_be_had(capsys, monkeypatch, tmp_path):
    """Without network the line says what to put where; another network's file is refused with its name."""
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    cached = tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    message = refused(capsys, fid.load_inception, None, "cpu")
    assert fid.WEIGHTS_URL in message and str(cached) in message and "--weights" in message
    response = io.BytesIO(b"another file")
    response.info = email.message.Message
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: response)
    assert "cannot be downloaded (invalid hash value" in refused(capsys, fid.load_inception, None, "cpu")
    other = tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(1)}, other)
    assert f"{other} holds another network" in refused(capsys, fid.load_inception, other, "cpu")

# ---- Frechet distance and Inception Score ----------------------------------------------------------------------------
def gaussian_of(feat):
    """Mean and covariance by fid.Sums, in uneven pieces."""
    sums = fid.Sums(feat.shape[1], 2)
    for piece in feat.split(max(2, len(feat) // 3)):
        sums.update(piece, torch.zeros(len(piece), 2), torch.zeros(len(piece), dtype=torch.int64))
    return sums.gaussian()

def test_frechet_distance_of_singular_covariances():
    """Of rank one: tr sqrt(u u^T v v^T) = |u v|."""
    mean_a, mean_b, u, v = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = (mean_a - mean_b).square().sum() + u @ u + v @ v - 2 * (u @ v).abs()
    assert fid.frechet_distance(mean_a, u.outer(u), mean_b, v.outer(v)) == pytest.approx(want.item(), rel=1e-6)

def test_both_numbers_equal_both_libraries():
    record, sums = Golden("metrics"), fid.Sums(1, 20)
    a, b, a_few, b_few = (gaussian_of(record.inputs[name]) for name in ("a", "b", "a_few", "b_few"))
    assert fid.frechet_distance(*a, *b) == pytest.approx(record.outputs["frechet"], rel=1e-9)
    record.check("frechet_few", fid.frechet_distance(*a_few, *b_few))
    for piece, split in zip(record.inputs["logits"].split(70), fid.assign_splits(500).split(70), strict=True):
        sums.update(torch.zeros(len(piece), 1), piece, split)
    mean, std = sums.inception_score()
    record.check("is_mean_shuffled", mean)
    record.check("is_std_shuffled", std)

# ---- Images ----------------------------------------------------------------------------------------------------------
def test_folder_and_npz_hold_the_same_images(tmp_path):
    """Of five images the first four are read, by two ranks; regular .png files count, hidden ones do not."""
    pictures = random_images(5)
    npz = write_npz(tmp_path / "a.npz", arr_0=pictures)
    folder = write_folder(tmp_path / "a", pictures)
    (folder / "000000a.png").mkdir()
    (folder / "000000b.png").symlink_to(tmp_path / "none.png")
    (folder / "._000000.png").write_text("not an image")
    for path, batch in ((npz, 2), (folder, 3)):
        images, found = fid.open_images(path, 4, batch), {}
        for indices, block in (*images.blocks(0, 2), *images.blocks(1, 2)):
            found.update(zip(indices, block.permute(0, 2, 3, 1), strict=True))
        assert (images.n, images.size) == (4, (16, 16)) and sorted(found) == list(range(4))
        assert all(np.array_equal(found[i], pictures[i]) for i in found)

WHOLE = random_images(3)
BAD = {  # what is done to a/000001.png, of 16x16 pixels, or to a.npz, and what is said
    "another size": (lambda png, npz: Image.new("RGB", (8, 8)).save(png), "is not 16x16"),
    "16 bits": (lambda png, npz: Image.fromarray(np.uint16(WHOLE[0, ..., 0])).save(png), "convert it to RGB of 8 bits"),
    "transparent": (lambda png, npz: Image.new("RGBA", (16, 16)).save(png), "convert it to RGB of 8 bits"),
    "a clear colour": (lambda png, npz: Image.new("L", (16, 16)).save(png, transparency=0), "convert it to RGB of 8"),
    "a GIF": (lambda png, npz: Image.new("RGB", (16, 16)).save(png, format="GIF"), "cannot be read as an image"),
    "cut": (lambda png, npz: npz.write_bytes(write_npz(npz, arr_0=WHOLE).read_bytes()[:500]), "cannot be read"),
    "a pickle": (lambda png, npz: write_npz(npz, arr_0=np.array([{}])), "cannot be read"),
    "float": (lambda png, npz: write_npz(npz, arr_0=np.float32(WHOLE)), "but images are uint8"),
    "empty": (lambda png, npz: write_npz(npz, arr_0=WHOLE[:0]), "but images are uint8"),
    "other names": (lambda png, npz: write_npz(npz, mean=WHOLE), "has no arr_0"),
}

@pytest.mark.parametrize("case", BAD)
def test_images_that_are_not_plain_are_refused(capsys, tmp_path, case):
    """Others than PNGs of 8 bits would have to be converted in some way, and the number would depend on it."""
    make, says = BAD[case]
    png, npz = write_folder(tmp_path / "a", WHOLE) / "000001.png", tmp_path / "a.npz"
    make(png, npz)
    line = refused(capsys, lambda: list(fid.open_images(npz if npz.exists() else png.parent, None, 8).blocks(0, 1)))
    assert str(npz if npz.exists() else png) in line and says in line

# ---- References ------------------------------------------------------------------------------------------------------
@pytest.fixture
def training_set(monkeypatch):
    """What load_data returns, to be changed by a test."""
    pictures = torch.from_numpy(random_images(6)).permute(0, 3, 1, 2).contiguous()
    for script in (train_unet, train_dit):
        monkeypatch.setattr(script, "load_data", lambda args, split: (pictures, torch.zeros(6), ["one"]))
    return pictures

def make_reference(data, *flags):
    """Mean, covariance, and what they were made from, for samples of 16 pixels."""
    args = fid.parse_args(["samples.npz", "--data", str(data), "--allow-few", *map(str, flags)])
    gaussian, made_from = fid.reference(None, (16, 16), FakeInception(), args, 0, 1)
    return *gaussian, made_from

def test_a_reference_is_kept_by_pixels_and_weights(capsys, monkeypatch, tmp_path, training_set):
    """What was measured is found again, under both hashes: after a change it is not."""
    shapes = tmp_path, "--ref", "shapes"
    mean, cov, made = make_reference(*shapes)
    assert (made["dataset"], made["split"], made["resolution"], made["count"]) == ("shapes", "train", 16, 6)
    file, = (tmp_path / ".fid").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(fid, "measure", None)
        for flags in (shapes, (tmp_path, "--ref", file)):  # the file serves as --ref, too
            again = make_reference(*flags)
            assert again[0].equal(mean) and again[1].equal(cov)
    training_set[0] += 1
    other_mean, _, other = make_reference(*shapes)
    assert not other_mean.equal(mean) and other["pixels"] != made["pixels"]
    monkeypatch.setattr(FakeInception, "sha", "other")
    make_reference(*shapes)
    assert len(list((tmp_path / ".fid").iterdir())) == 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.fid").write_text("in the way")
    make_reference(tmp_path / "full", "--ref", "shapes")
    assert "note: the reference is not kept" in capsys.readouterr().err

def test_a_reference_is_found_by_every_name(monkeypatch, tmp_path, training_set):
    """A folder or npz beside us, in capitals too; a data set's folder is a data set."""
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "REF", random_images(3))
    (folder / "000002.png").rename(folder / "000002.PNG")
    write_npz(tmp_path / "X.NPZ", arr_0=random_images(3))
    (tmp_path / "shapes/train/dog").mkdir(parents=True)
    mean, _, made = make_reference(tmp_path, "--ref", folder)
    assert made == {"images": str(folder), "resolution": 16, "count": 3}
    for name in ("REF", "./REF", "X.NPZ", "./X.NPZ", tmp_path / "X.NPZ"):
        assert make_reference(tmp_path, "--ref", name)[0].equal(mean), name
    few = make_reference(tmp_path, "--ref", folder, "--n", "2")  # --n is of the samples
    assert few[0].equal(mean) and few[2]["count"] == 3
    assert make_reference(tmp_path, "--ref", "shapes")[2]["dataset"] == "shapes"
    assert fid.open_samples("X.NPZ", fid.parse_args(["X.NPZ"]), "cpu")[1].n == 3

def test_adm_statistics(capsys, tmp_path):
    """Images in the same file and the data folder stay unread; what is not of 2048 features is refused."""
    mu, sigma, path = np.arange(2048.0), np.eye(2048), tmp_path / "adm.npz"
    write_npz(path, arr_0=np.array([{}]), mu=mu, sigma=sigma, mu_s=mu[:9], sigma_s=sigma[:9, :9])
    mean, cov, made = make_reference(tmp_path, "--ref", path)
    assert np.array_equal(mean, mu) and np.array_equal(cov, sigma) and made == {"statistics": str(path)}
    assert "cannot be checked" in capsys.readouterr().out
    for bad in ({"mu": mu[:192], "sigma": sigma[:192, :192]}, {"mu": mu}):
        write_npz(path, **bad)
        assert "not floats mu (2048,)" in refused(capsys, make_reference, tmp_path, "--ref", path)

# ---- The command line ------------------------------------------------------------------------------------------------
MISTAKES = (  # flags, what is said, and whether it needs the Inception
    ("few.npz --ref few.npz --json new.json", "few.npz: 3 images, but FID needs 2048", False),
    ("few.npz --ref few.npz --json none/a.json", "cannot write none/a.json", False),
    ("few.npz --ref few.npz --n 0", "--n must be at least 1", False),
    ("none", "none does not exist", False),
    ("a.npy", "a.npy: give an npz, a folder of PNGs, or a checkpoint", False),
    ("run", "last.pt does not exist", False),
    ("few.npz small.npz --allow-few", "small.npz has 8x8", False),
    ("a.pt b.pt --n 2 --allow-few", "b.pt was trained on cifar10, a.pt on shapes: give --ref", False),
    ("a.pt --n 2 --allow-few --cfg 2", "--cfg: DDPM, of a.pt, has none; drop it", False),
    ("few.npz --allow-few", "--ref is missing", True),
    ("few.npz --allow-few --ref ./none.npz", "none.npz does not exist", True),
    ("few.npz --allow-few --ref mine/train", "train holds no .png files", True),
    ("few.npz --allow-few --ref small.npz", "small.npz has 8x8 images, compared with 16x16", True),
)

@pytest.mark.parametrize(("flags", "says", "late"), MISTAKES)
def test_mistakes_are_one_line_and_show_early(capsys, monkeypatch, tmp_path, flags, says, late):
    monkeypatch.chdir(tmp_path)
    loaded = []
    monkeypatch.setattr(fid, "load_inception", lambda *_: loaded.append(1) or FakeInception())
    write_npz(tmp_path / "few.npz", arr_0=random_images(3))
    write_npz(tmp_path / "small.npz", arr_0=random_images(3, size=8))
    np.save(tmp_path / "a.npy", random_images(3))
    for folder in ("run", "mine/train/dog"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run/args.json").write_text("{}")
    if "a.pt" in flags:
        make_checkpoint(tmp_path / "a.pt", train_unet, "--backbone", "tiny")
        make_checkpoint(tmp_path / "b.pt", train_unet, "--backbone", "tiny", "--dataset", "cifar10", "--resolution", 16)
    assert says in refused(capsys, run, fid, *flags.split())
    assert bool(loaded) == late and not (tmp_path / "new.json").exists()

@pytest.mark.slow
def test_ranks_do_not_change_the_result(capsys, tmp_path):
    """With the Inception itself, of random weights; two ranks measure the reference again; some splits are empty."""
    torch.save(Golden("inception").weights(), tmp_path / "random.pth")
    samples = write_npz(tmp_path / "a.npz", arr_0=random_images(4))
    write_folder(tmp_path / "few/train/class", random_images(3, seed=1))
    flags = [samples, "--ref", "few", "--data", tmp_path, "--weights", tmp_path / "random.pth", "--allow-few"]
    flags += ["--batch", "1"]
    run(fid, *flags, "--json", tmp_path / "1.json")
    assert "warning: 4 samples" in capsys.readouterr().err
    cache, = (tmp_path / ".fid").iterdir()
    cache.unlink()
    done = launch(2, "fid.py", *map(str, flags), "--json", str(tmp_path / "2.json"), "--device", "cpu")
    assert done.stdout.splitlines()[-1].startswith("FID ") and cache.is_file()
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one["reference"] == two["reference"] and one["reference"]["count"] == 3
    (one,), (two,) = one["results"], two["results"]
    for key in ("fid", "is_mean", "is_std"):
        assert two.pop(key) == pytest.approx(one.pop(key), rel=2e-5, abs=1e-9)
    assert one == two and one["n"] == 4

def test_a_checkpoint_is_scored_against_its_own_training_set(monkeypatch, tmp_path, training_set):
    """The data set and its folder are the checkpoint's; the file has all that the number depends on."""
    monkeypatch.setattr(fid, "load_inception", lambda *_: FakeInception())
    monkeypatch.setattr(fid, "frechet_distance", lambda *_: 9.0)  # 2048 eigenvalues take seconds
    make_checkpoint(tmp_path / "last.pt", train_dit, "--size", "tiny", "--cond", "--data", tmp_path / "data")
    run(fid, tmp_path, tmp_path / "last.pt", "--n", 2, "--steps", 2, "--allow-few", "--json", tmp_path / "fid.json")
    file = json.loads((tmp_path / "fid.json").read_text())
    result, other = file["results"]
    assert result == other | {"samples": str(tmp_path)}
    want = {"fid": 9, "n": 2, "samples": str(tmp_path), "checkpoint": str(tmp_path / "last.pt"), "weights": "ema",
            "epoch": 3, "step": 9, "seed": 0, "amp": "off", "steps": 2, "labels": ["balanced"], "cfg": 1.5}  # fmt: skip
    assert {key: result.get(key) for key in want} == want
    assert (file["resolution"], file["reference"]["dataset"], file["reference"]["count"]) == (16, "shapes", 6)
    assert len(list((tmp_path / "data/.fid").glob("shapes_train_16_*_fake.npz"))) == 1
