"""fid.py: the Inception and both numbers against the golden data and closed forms; references; the user's mistakes."""

import json
import os
import random
import re
import struct
import subprocess
import sys
import urllib.error
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, Golden
from PIL import Image
from torch import nn

import fid
import sample
import train_dit
import train_unet
import train_uvit


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other on a busy machine: these tests took three times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of random Inception weights, under the official names."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(Golden("inception").weights(), path)
    return str(path)


class FakeInception(nn.Module):
    """Colour means, repeated to 2048 features: what references and ranks do does not depend on the network."""

    sha = "fake"

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        feat = x.mean((2, 3)).repeat(1, 683)[:, :2048]
        return feat, feat[:, :1008].double()


def random_images(n, size=16, seed=0):
    return np.random.RandomState(seed).randint(256, size=(n, size, size, 3), dtype=np.uint8)


def write_npz(path, images):
    np.savez(path, arr_0=images)
    return str(path)


def write_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


def run(*argv):
    sample.run_tool(fid.main, fid.parse_args([*map(str, argv), "--device", "cpu"]))


def error_of(capsys, call, *argv):
    """What a call says that must end with exit status 2 and one line, or raise what becomes that."""
    with pytest.raises((SystemExit, sample.UserError)) as stop:
        call(*argv)
    if stop.type is sample.UserError:
        return str(stop.value)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


# ---- The Inception ---------------------------------------------------------------------------------
def resize_tensorflow1(images):
    """torch-fidelity's preprocessing: output pixel i reads input position i * in / 299, borders clamped."""
    side = images.shape[-1]
    place = torch.arange(299) * (side / 299)
    low = place.long()
    high, w = (low + 1).clamp(max=side - 1), place - low
    x = images.float()
    x = x[:, :, low] * (1 - w)[:, None] + x[:, :, high] * w[:, None]
    return (x[..., low] * (1 - w) + x[..., high] * w - 128) / 128


@torch.no_grad()
def test_inception_equals_both_libraries(golden):
    record = golden("inception")
    inception = fid.Inception().eval()
    assert {name: list(t.shape) for name, t in inception.state_dict().items()} == {
        name: list(shape) for name, shape in record.shapes.items()
    }
    inception.load_state_dict(record.weights())
    taps = {}
    for name, tap in (("maxpool1", "64"), ("maxpool2", "192"), ("Mixed_6e", "768")):
        module = inception.get_submodule(name)
        module.register_forward_hook(lambda _m, _x, out, tap=tap: taps.update({tap: out.mean((2, 3))}))
    small = record.inputs["small_uint8"]
    large = record.inputs["base_uint8"].repeat_interleave(13, 2).repeat_interleave(13, 3)
    for case, images, resize in (
        ("fid_{}_small", small, fid.preprocess),
        ("fid_{}_large", large, fid.preprocess),
        ("fidelity_{}_small", small, resize_tensorflow1),
    ):
        feat, unbiased = inception(resize(images))
        for tap, value in (*taps.items(), ("2048", feat), ("logits", unbiased + inception.fc.bias)):
            record.check(case.format(tap), value)
        if "fidelity" in case:
            record.check(case.format("logits_unbiased"), unbiased)


def test_missing_weights_without_network(capsys, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    message = error_of(capsys, fid.load_inception, None, "cpu")
    where = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    assert fid.WEIGHTS_URL in message and str(where) in message and "--weights" in message
    where.write_text("damaged")
    assert str(where) in error_of(capsys, fid.load_inception, None, "cpu")


def test_wrong_weights(capsys, tmp_path):
    path = tmp_path / "weights.pth"
    assert "does not exist" in error_of(capsys, fid.load_inception, path, "cpu")
    path.write_text("not a checkpoint")
    assert "cannot be read" in error_of(capsys, fid.load_inception, path, "cpu")
    torch.save({"conv.weight": torch.zeros(1)}, path)
    assert "another network" in error_of(capsys, fid.load_inception, path, "cpu")


# ---- Frechet distance and Inception Score ----------------------------------------------------------
def gaussian_of(feat):
    """Mean and covariance by fid.Sums, in uneven pieces."""
    sums = fid.Sums(feat.shape[1], 2)
    for piece in feat.split(max(2, len(feat) // 3)):
        sums.update(piece, torch.zeros(len(piece), 2), torch.zeros(len(piece), dtype=torch.int64))
    return sums.gaussian()


def test_frechet_distance_golden(golden):
    record = golden("metrics")
    a, b, a_few, b_few = (gaussian_of(record.inputs[name]) for name in ("a", "b", "a_few", "b_few"))
    record.check("frechet", fid.frechet_distance(*a, *b))
    assert fid.frechet_distance(*a, *b) == pytest.approx(record.outputs["frechet"], rel=1e-9)
    assert fid.frechet_distance(*b, *a) == pytest.approx(record.outputs["frechet_fidelity"], rel=1e-9)
    record.check("frechet_self", fid.frechet_distance(*a, *a))
    record.check("frechet_few", fid.frechet_distance(*a_few, *b_few))


def test_frechet_distance_closed_forms():
    draw = torch.Generator().manual_seed(0)
    mean_a, mean_b, u, v = (torch.randn(12, generator=draw, dtype=torch.float64) for _ in range(4))
    gap = (mean_a - mean_b).square().sum().item()
    a, b = (torch.cov(torch.randn(12, 40, generator=draw, dtype=torch.float64)) for _ in range(2))
    assert fid.frechet_distance(mean_a, a, mean_b, a) == pytest.approx(gap, rel=1e-12)  # equal covariances

    diagonal = gap + (u.abs() - v.abs()).square().sum().item()
    assert fid.frechet_distance(mean_a, (u * u).diag(), mean_b, (v * v).diag()) == pytest.approx(diagonal, rel=1e-12)

    rank_one = gap + (u @ u + v @ v - 2 * abs(u @ v)).item()  # singular: tr sqrt(u u^T v v^T) = |u v|
    singular = torch.outer(u, u), torch.outer(v, v)
    assert fid.frechet_distance(mean_a, singular[0], mean_b, singular[1]) == pytest.approx(rank_one, rel=1e-6)
    zero = torch.zeros_like(a)
    assert fid.frechet_distance(mean_a, zero, mean_b, b) == pytest.approx(gap + b.trace().item(), rel=1e-12)

    root = scipy.linalg.sqrtm((a @ b).numpy())  # the other way: a Schur decomposition of A B
    general = gap + (a.trace() + b.trace()).item() - 2 * np.trace(root).real
    assert fid.frechet_distance(mean_a, a, mean_b, b) == pytest.approx(general, rel=1e-10)


def test_sums_lose_no_accuracy():
    """Features like Inception's: float32, mean above standard deviation, some of them dead."""
    draw = torch.Generator().manual_seed(0)
    feat = 0.4 + 0.1 * torch.randn(3000, 20, generator=draw)
    feat[:, 3] = 0.25
    mean, cov = gaussian_of(feat)
    want = np.cov(feat.double().numpy(), rowvar=False)
    assert np.abs(mean.numpy() - feat.double().numpy().mean(0)).max() < 1e-13
    assert np.abs(cov.numpy() - want).max() < 1e-12 * want.max()


@pytest.mark.parametrize("kind", ["plain", "shuffled", "one_split"])
def test_inception_score_golden(golden, kind):
    record = golden("metrics")
    logits = record.inputs["logits"]
    n = len(logits)
    shuffled = fid.score_splits(n)
    assert shuffled.bincount().tolist() == [50] * 10
    plain = torch.arange(n) * 10 // n
    split = {"plain": plain, "shuffled": shuffled, "one_split": torch.zeros_like(plain)}[kind]
    sums = fid.Sums(1, logits.shape[1])
    for piece, s in zip(logits.split(70), split.split(70), strict=True):
        sums.update(torch.zeros(len(piece), 1), piece, s)
    mean, std = sums.inception_score()
    record.check(f"is_mean_{kind}", mean)
    record.check(f"is_std_{kind}", std, want=0.0 if kind == "one_split" else None)


def test_inception_score_closed_forms():
    split = torch.arange(40) % 2
    certain = 1000 * torch.eye(20).repeat_interleave(2, 0)  # p(y|x) one-hot, 20 classes in both splits: the score is 20
    for logits, want in ((certain, 20), (torch.zeros(40, 20), 1)):
        sums = fid.Sums(1, 20)
        sums.update(torch.zeros(40, 1), logits, split)
        assert sums.inception_score() == pytest.approx((want, 0), abs=1e-9)


# ---- Images ----------------------------------------------------------------------------------------
def test_folder_and_npz_hold_the_same_images(tmp_path):
    pictures = random_images(5)
    npz = fid.open_images(Path(write_npz(tmp_path / "a.npz", pictures)), 4, 2)
    folder = fid.open_images(write_folder(tmp_path / "a", pictures), 4, 3)
    for images in (npz, folder):
        assert (images.n, images.size) == (4, (16, 16))
        ranks = [list(images.blocks(rank, 2)) for rank in range(2)]
        found = {i: image for blocks in ranks for indices, b in blocks for i, image in zip(indices, b, strict=True)}
        assert all(torch.equal(found[i].permute(1, 2, 0), torch.from_numpy(pictures[i])) for i in range(4))


def test_bad_images(capsys, tmp_path):
    def first(path):
        next(fid.open_images(path, None, 8).blocks(0, 1))

    folder = write_folder(tmp_path / "a", random_images(3))
    Image.new("RGB", (8, 8)).save(folder / "000009.png")
    assert "000009.png is not 16x16" in error_of(capsys, first, folder)
    (folder / "000009.png").write_text("not an image")
    assert "000009.png cannot be read as an image" in error_of(capsys, first, folder)
    (folder / "000009.png").unlink()
    os.mkfifo(folder / "000009.png")
    (folder / "none.png").symlink_to(tmp_path / "none.png")
    (folder / "._000000.png").write_text("not an image")
    assert fid.open_images(folder, None, 8).n == 3  # regular files alone
    (tmp_path / "empty").mkdir()
    assert "no .png" in error_of(capsys, first, tmp_path / "empty")

    npz = tmp_path / "a.npz"
    write_npz(npz, random_images(3))
    whole = npz.read_bytes()
    array = np.array([{"pickled": 1}], dtype=object)
    for content in (whole[:500], b"not an npz", whole[:-100] + b"x" * 100):
        npz.write_bytes(content)
        assert "cannot be read" in error_of(capsys, first, npz)
    write_npz(npz, array)
    assert "cannot be read" in error_of(capsys, first, npz)
    write_npz(npz, random_images(3).astype(np.float32))
    assert "uint8" in error_of(capsys, first, npz)
    np.savez(npz, mu=np.zeros(2048))
    assert "no arr_0" in error_of(capsys, first, npz)


def png(pixels, colour, *chunks):
    """A PNG of raw pixels (H, W, C) in their own depth; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # unfiltered
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_every_kind_of_image(tmp_path):
    """16 bits keep their high byte, transparency is on white, EXIF's orientation is followed."""
    path, rng = tmp_path / "a.png", np.random.RandomState(0)

    def check(want):
        assert np.array_equal(np.asarray(train_unet.open_image(path)), want)

    for channels, colour in ((1, 0), (3, 2)):
        deep = rng.randint(65536, size=(6, 4, channels)).astype(">u2")
        path.write_bytes(png(deep, colour))
        check(np.repeat(deep >> 8, 3 // channels, 2))
    alpha = np.array([0, 255, 51, 204], np.uint8)[rng.randint(4, size=(6, 4, 1))]
    for channels, colour in ((1, 4), (3, 6)):
        pixels = rng.randint(256, size=(6, 4, channels)).astype(np.uint8)
        on_white = pixels * (alpha / 255) + 255 - alpha
        for deep in (False, True):
            raw = np.concatenate([pixels, alpha], 2)
            path.write_bytes(png((raw * np.uint16(257)).astype(">u2") if deep else raw, colour))
            gap = np.asarray(train_unet.open_image(path)) - np.repeat(on_white, 3 // channels, 2)
            assert np.abs(gap).max() <= 1
    pixels = rng.randint(256, size=(6, 4, 3)).astype(np.uint8)
    clear = pixels.copy()
    clear[1, 2] = 255
    path.write_bytes(png(pixels, 2, (b"tRNS", struct.pack(">HHH", *pixels[1, 2]))))  # one colour is transparent
    check(clear)
    palette = Image.fromarray(pixels).quantize(8)
    index, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    for transparency, clear in ((3, index == 3), (bytes([0, 255] * 4), index % 2 == 0)):
        palette.save(path, transparency=transparency)
        check(np.where(clear[..., None], 255, colours))
    turned = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]
    across = pixels.transpose(1, 0, 2)
    turned += [across, np.rot90(pixels, -1), across[::-1, ::-1], np.rot90(pixels)]
    for orientation, want in enumerate(turned, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(path, exif=exif)
        check(want)
    for mode, suffix in (("1", "png"), ("CMYK", "jpeg"), ("RGB", "bmp"), ("RGB", "webp")):
        grey = Image.new("L", (4, 6), 255).convert(mode)
        grey.save(path, format=suffix)
        check(np.full((6, 4, 3), 255))


def test_what_is_no_image(tmp_path):
    """Whatever a file is, it is an image or an exception with a reason; Pillow refuses bombs."""
    path, rng = tmp_path / "a.png", random.Random(0)
    Image.new("1", (30000, 30000)).save(path)
    with pytest.raises(Image.DecompressionBombError):
        train_unet.open_image(path)
    Image.new("RGB", (4, 6)).save(path, format="PPM")  # few formats: for some, Pillow starts other programs
    with pytest.raises(ValueError, match="is a PPM"):
        train_unet.open_image(path)
    ends = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(random_images(1)[0]).save(path, format=kind, **{} if kind == "BMP" else {"exif": exif})
        whole = path.read_bytes()
        for i in range(40):
            data = bytearray(whole[: rng.randrange(1, len(whole))] if i % 4 == 0 else whole)
            for _ in range(rng.choice([1, 1, 5])):
                data[rng.randrange(min(len(data), 200 if i % 2 else 10**6))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ends.append(train_unet.open_image(path).mode)
            except Exception:
                ends.append("refused")
    assert set(ends) == {"RGB", "refused"} and 20 < ends.count("refused") < 150


# ---- References ------------------------------------------------------------------------------------
@pytest.fixture
def training_set(monkeypatch):
    """What load_data returns, to be changed by a test."""
    pictures = torch.from_numpy(random_images(6)).permute(0, 3, 1, 2).contiguous()
    for script in (train_unet, train_uvit, train_dit):
        monkeypatch.setattr(script, "load_data", lambda args, split: (pictures, torch.zeros(6), ["one"]))
    return pictures


def make_reference(tmp_path, *argv, size=16):
    """Mean, covariance, and what they were made from."""
    args = fid.parse_args(["samples.npz", "--data", str(tmp_path), "--allow-few", *argv])
    gaussian, made_from = fid.reference(None, (size, size), FakeInception(), args, 0, 1)
    return *gaussian, made_from


def test_reference_cache(capsys, monkeypatch, tmp_path, training_set):
    """What was measured is found again, under the pixels' and the weights' hash: after a change it is not."""
    measured = []
    monkeypatch.setattr(fid, "measure", lambda *args, measure=fid.measure: measured.append(1) or measure(*args))
    mean, cov, made = make_reference(tmp_path, "--ref", "shapes")
    assert (made["dataset"], made["split"], made["resolution"], made["count"]) == ("shapes", "train", 16, 6)
    file, = (tmp_path / ".fid").iterdir()
    mean2, cov2, made2 = make_reference(tmp_path, "--ref", "shapes")
    assert torch.equal(mean, mean2) and torch.equal(cov, cov2) and made2 == made and len(measured) == 1
    assert torch.equal(make_reference(tmp_path, "--ref", str(file))[1], cov)  # the file serves as --ref, too

    training_set[0] += 1
    mean3, _, made3 = make_reference(tmp_path, "--ref", "shapes")
    assert not torch.equal(mean, mean3) and made3["pixels"] != made["pixels"] and len(measured) == 2
    monkeypatch.setattr(FakeInception, "sha", "other")
    make_reference(tmp_path, "--ref", "shapes")
    assert len(measured) == 3 and len(list((tmp_path / ".fid").iterdir())) == 3
    monkeypatch.setattr(FakeInception, "sha", "fake")
    training_set[0] -= 1
    file.write_bytes(b"damaged")
    assert str(file) in (line := error_of(capsys, make_reference, tmp_path, "--ref", "shapes")) and "anew" in line

    for file in (tmp_path / ".fid").iterdir():
        file.unlink()
    (tmp_path / ".fid").rmdir()
    (tmp_path / ".fid").write_text("in the way")
    make_reference(tmp_path, "--ref", "shapes")
    assert "note:" in capsys.readouterr().err


def test_reference_files_and_mistakes(capsys, tmp_path, training_set):
    folder = write_folder(tmp_path / "folder", random_images(3))
    assert make_reference(tmp_path, "--ref", str(folder))[2] == {"images": str(folder), "resolution": 16, "count": 3}
    assert "--ref is missing" in error_of(capsys, make_reference, tmp_path)
    assert "does not exist" in error_of(capsys, make_reference, tmp_path, "--ref", f"{tmp_path}/none.npz")
    assert "does not exist" in error_of(capsys, make_reference, tmp_path, "--ref", f"{tmp_path}/none")
    small = write_npz(tmp_path / "small.npz", random_images(3, size=8))
    message = error_of(capsys, make_reference, tmp_path, "--ref", small)
    assert "small.npz has 8x8" in message and "compared with 16x16" in message


def test_a_reference_beside_us(capsys, tmp_path, monkeypatch, training_set):
    """A folder or npz is found by every name that it has, in capitals too; a data set's folder is a data set."""
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "REF", random_images(3))
    for file in folder.iterdir():
        file.rename(file.with_suffix(".PNG"))
    write_npz(tmp_path / "x.npz", random_images(3))
    (tmp_path / "x.npz").rename(tmp_path / "X.NPZ")
    (tmp_path / "shapes/train/dog").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    mean, *_ = make_reference(tmp_path, "--ref", str(folder))
    for name in ("REF", "./REF", "X.NPZ", "./X.NPZ", str(tmp_path / "X.NPZ")):
        assert torch.equal(make_reference(tmp_path, "--ref", name)[0], mean), name
    assert make_reference(tmp_path, "--ref", "shapes")[2]["dataset"] == "shapes"
    for name in ("empty", "./empty", "shapes/train"):
        assert "holds no .png files" in error_of(capsys, make_reference, tmp_path, "--ref", name)
    np.save(tmp_path / "a.npy", random_images(3))
    assert "give an npz, a folder of PNGs, or a checkpoint" in error_of(capsys, run, tmp_path / "a.npy")
    assert fid.open_samples("X.NPZ", fid.parse_args(["X.NPZ"]), "cpu")[1].n == 3


@pytest.mark.parametrize("kind", ["16 bits", "transparent", "a GIF"])
def test_pngs_that_would_have_to_be_converted_are_refused(capsys, tmp_path, kind):
    folder = write_folder(tmp_path / "a", random_images(2))
    if kind == "16 bits":
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "000001.png")
    if kind == "transparent":
        Image.new("RGBA", (16, 16)).save(folder / "000001.png")
    if kind == "a GIF":
        Image.new("RGB", (16, 16)).save(folder / "000001.png", format="GIF")
    with pytest.raises(sample.UserError, match="000001.png cannot be read as an image"):
        list(fid.open_images(folder, None, 8).blocks(0, 1))


def test_adm_statistics(capsys, tmp_path):
    path = tmp_path / "adm.npz"
    mu, sigma = np.arange(2048.0), np.eye(2048)
    np.savez(path, arr_0=np.array([{}]), mu=mu, sigma=sigma, mu_s=mu[:9], sigma_s=sigma[:9, :9])  # arr_0: unreadable
    mean, cov, made = make_reference(tmp_path, "--ref", str(path))
    assert np.array_equal(mean, mu) and np.array_equal(cov, sigma) and made == {"statistics": str(path)}
    assert "cannot be checked" in capsys.readouterr().out
    words = np.full(2048, "a")
    for bad in ({"mu": mu[:192], "sigma": sigma[:192, :192]}, {"mu": mu}, {"mu": words, "sigma": sigma}):
        np.savez(path, **bad)
        assert "2048" in error_of(capsys, make_reference, tmp_path, "--ref", str(path))


# ---- The command line ------------------------------------------------------------------------------
def test_mistakes_that_need_no_network(capsys, tmp_path):
    few = write_npz(tmp_path / "few.npz", random_images(3))
    assert "3 images, but FID needs 2048" in error_of(capsys, run, few, "--ref", few)
    assert "does not exist" in error_of(capsys, run, tmp_path / "none")
    for bad in (tmp_path / "none" / "a.json", tmp_path):
        assert str(bad) in error_of(capsys, run, few, "--ref", few, "--json", bad)
    assert "2048" in error_of(capsys, run, few, "--ref", few, "--json", tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is no file" in error_of(capsys, run, pipe)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    assert "last.pt" in error_of(capsys, run, tmp_path / "run")
    assert "--n must be" in error_of(capsys, run, few, "--ref", few, "--n", 0)
    other = write_npz(tmp_path / "other.npz", random_images(3, size=8))
    assert "other.npz has 8x8" in error_of(capsys, run, few, other, "--ref", few, "--allow-few")


def test_ranks_do_not_change_the_result(capsys, tmp_path, weights):
    a = write_npz(tmp_path / "a.npz", random_images(4))
    (tmp_path / "few" / "train").mkdir(parents=True)
    write_folder(tmp_path / "few" / "train" / "class", random_images(3, seed=1))
    argv = [a, "--ref", "few", "--data", str(tmp_path), "--allow-few", "--weights", weights, "--batch", "1"]
    run(*argv, "--json", tmp_path / "one.json")
    cache, = (tmp_path / ".fid").iterdir()
    cache.unlink()  # both measure the reference
    shown = capsys.readouterr()
    assert re.fullmatch(r"FID \d+\.\d\d  IS \d+\.\d\d \+- \d+\.\d\d", shown.out.splitlines()[-1])
    assert "compare with no others" in shown.err and "warning: 4 samples" in shown.err

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "fid.py"), *argv, "--json", str(tmp_path / "two.json"), "--device", "cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("FID ")
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")}
    count = {name: file["reference"]["count"] for name, file in files.items()}
    (one,), (two,) = (file["results"] for file in files.values())
    for key in ("fid", "is_mean", "is_std"):
        assert two.pop(key) == pytest.approx(one.pop(key), rel=1e-5, abs=1e-9)
    assert one == two and one["n"] == 4 and count == {"one": 3, "two": 3} and cache.is_file()


def checkpoint(path, script, flags, epoch=3):
    """An untrained network as a run would leave it."""
    args = script.parse_args(flags)
    args.classes = script.SHAPES
    state = {"script": script.__name__, "args": vars(args), "ema": script.build(args)[0].state_dict()}
    torch.save(state | {"epoch": epoch, "step": 7}, path)
    return path


@pytest.fixture
def quick(monkeypatch):
    """Colour means instead of the Inception, and distances from a list: 2048 eigenvalues take seconds."""
    loaded, distances = [], iter([9.0, 7.14, 8.0])
    monkeypatch.setattr(fid, "load_inception", lambda *args: loaded.append(1) or FakeInception())
    monkeypatch.setattr(fid, "frechet_distance", lambda *gaussians: next(distances))
    return loaded


@pytest.mark.parametrize(
    ("script", "flags"),
    [(train_unet, ["--backbone", "tiny"]), (train_uvit, ["--size", "tiny", "--cls-token"]),
     (train_uvit, ["--size", "tiny", "--cond"]), (train_dit, ["--size", "tiny", "--cond", "--self-cond"])],
)  # fmt: skip
def test_checkpoint_against_its_own_training_set(script, flags, capsys, tmp_path, training_set, quick):
    checkpoint(tmp_path / "last.pt", script, [*flags, "--data", str(tmp_path / "data")])
    run(tmp_path, "--n", 2, "--steps", 2, "--allow-few", "--json", tmp_path / "fid.json")
    out = capsys.readouterr().out
    assert ("labels balanced" in out) == ("--cond" in flags)
    assert "EMA weights of epoch 3" in out and re.fullmatch(r"FID 9\.00  IS .*\d", out.splitlines()[-1])
    assert f"wrote {tmp_path / 'fid.json'}" in out
    file = json.loads((tmp_path / "fid.json").read_text())
    result, = file["results"]
    assert (result["fid"], result["epoch"], result["n"], result["weights"]) == (9, 3, 2, "ema")
    assert file["reference"]["dataset"] == "shapes" and file["reference"]["count"] == 6
    assert len(list((tmp_path / "data" / ".fid").glob("shapes_train_16_*.npz"))) == 1


def test_the_lowest_of_several_checkpoints(capsys, monkeypatch, tmp_path, training_set, quick):
    """One reference and one Inception for all; each is printed, the lowest comes last, the file has all."""
    flags = ["--backbone", "tiny", "--data", str(tmp_path)]
    paths = [checkpoint(tmp_path / f"epoch_{epoch}.pt", train_unet, flags, epoch) for epoch in (200, 400, 600)]
    measured = []
    monkeypatch.setattr(fid, "measure", lambda *args, measure=fid.measure: measured.append(1) or measure(*args))
    run(*paths, "--n", 2, "--steps", 1, "--allow-few", "--json", tmp_path / "fid.json")
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"FID (\S+)  IS \d+\.\d\d \+- \d+\.\d\d \((\S+)\)", line) for line in lines]
    want = [("9.00", paths[0]), ("7.14", paths[1]), ("8.00", paths[2]), ("7.14", paths[1])]
    assert [m.groups() for m in found if m] == [(number, str(path)) for number, path in want]
    assert found[-1] and len(measured) == 4 and len(quick) == 1
    results = json.loads((tmp_path / "fid.json").read_text())["results"]
    assert [(r["epoch"], r["fid"]) for r in results] == [(200, 9), (400, 7.14), (600, 8)]
    other = checkpoint(tmp_path / "other.pt", train_unet, [*flags, "--dataset", "cifar10", "--resolution", "16"])
    assert "give --ref" in error_of(capsys, run, paths[0], other, "--n", 2, "--allow-few")


def test_statistics_leave_the_data_alone(capsys, monkeypatch, tmp_path, quick):
    """As ImageNet at 256 is scored: labels at random, [ADM]'s statistics, and no training image read or hashed."""
    for script in (train_unet, train_uvit, train_dit):
        monkeypatch.setattr(script, "load_data", None)
    path = checkpoint(tmp_path / "last.pt", train_dit, ["--size", "tiny", "--cond", "--data", str(tmp_path / "none")])
    np.savez(tmp_path / "adm.npz", arr_0=np.array([{}]), mu=np.zeros(2048), sigma=np.eye(2048))
    run(path, "--ref", tmp_path / "adm.npz", "--labels", "random", "--n", 2, "--steps", 1, "--allow-few")
    out = capsys.readouterr().out
    assert "labels random" in out and "statistics" in out and out.splitlines()[-1].startswith("FID 9.00")
    assert not (tmp_path / "none").exists()
