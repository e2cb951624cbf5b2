"""The data rule: class folders, tiny-imagenet's layout, shapes, CIFAR, and what users get wrong."""

import argparse
import hashlib
import os
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_folder
from PIL import Image

import train_unet as T


def args(root, name="mine", resolution=8):
    return argparse.Namespace(dataset=name, data=str(root), resolution=resolution)


def test_class_folders_are_read_and_cached(tmp_path):
    make_folder(tmp_path)
    images, labels, classes = T.load_data(args(tmp_path), "train")
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 8, 8) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert classes == ["cat", "dog"]
    first = np.asarray(Image.open(tmp_path / "mine/train/cat/0.png"))
    assert (images[0].permute(1, 2, 0).numpy() == first).all()  # not resized, not touched
    assert len(list((tmp_path / "mine/.cache").iterdir())) == 1
    again = T.load_data(args(tmp_path), "train")
    assert again[0].equal(images) and again[1].equal(labels) and again[2] == classes
    (tmp_path / "mine/train/cat/0.png").unlink()  # a changed folder is read again
    assert len(T.load_data(args(tmp_path), "train")[0]) == 5


def test_val_stands_in_for_test(tmp_path):
    make_folder(tmp_path, splits=("train", "val"), n=2)
    images, labels, classes = T.load_data(args(tmp_path), "test")
    assert labels.tolist() == [0, 0, 1, 1] and classes == ["cat", "dog"]
    last = np.asarray(Image.open(tmp_path / "mine/val/dog/1.png"))
    assert (images[3].permute(1, 2, 0).numpy() == last).all()


def test_center_crop_and_resize(tmp_path):
    """A wide image keeps its middle; a constant stays constant; aspect ratio is kept."""
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = (200, 100, 50)
    (tmp_path / "mine/train/a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "mine/train/a/0.png")
    images, _, _ = T.load_data(args(tmp_path, resolution=8), "train")
    assert images.shape == (1, 3, 8, 8)
    inner = images[0, :, :, 1:7].flatten(1).float()
    assert (inner - torch.tensor([[200.0], [100.0], [50.0]])).abs().max() <= 12  # bicubic rings a little at the edges


def test_odd_sides_are_halved_downwards(tmp_path):
    """15 pixels become 7, as in ADM: each the mean of those whose centres lie in its 15 / 7."""
    ramp = np.broadcast_to(16 * np.arange(15, dtype=np.uint8)[None, :, None], (15, 15, 3))
    (tmp_path / "mine/train/a").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "mine/train/a/0.png")
    images, _, _ = T.load_data(args(tmp_path, resolution=7), "train")
    want = [np.mean([16 * x for x in range(15) if i * 15 / 7 < x + 0.5 < (i + 1) * 15 / 7]) for i in range(7)]
    assert (images[0].float() - torch.tensor(want)).abs().max() <= 1


def test_tiny_imagenet_layout(tmp_path):
    root = tmp_path / "tiny-imagenet"
    for wnid in ("n01", "n02"):
        (root / "train" / wnid / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(root / "train" / wnid / "images" / "a.JPEG", "JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("a.JPEG\t0\t0\t1\t1")
    (root / "val/images").mkdir(parents=True)
    (root / "test/images").mkdir(parents=True)  # the official folder has a test split without labels
    for i in range(2):
        Image.new("RGB", (64, 64), "blue").save(root / "val/images" / f"val_{i}.JPEG", "JPEG")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n")
    flags = args(tmp_path, "tiny-imagenet", 64)
    assert T.load_data(flags, "train")[1].tolist() == [0, 1]
    assert T.load_data(flags, "test")[1].tolist() == [1, 0]


def paint(path, size=(8, 8), seed=0):
    """A picture of noise; what is written under the same name with another seed differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="BMP")  # all of one size in bytes


FOLDERS = {  # case: (files below mine/, split, number of images or what the error says)
    "both": (["train/cat/0.bmp", "train/dog/0.bmp", "test/cat/1.bmp", "test/dog/1.bmp", "val/x/0.bmp"], "test", 2),
    "ImageNet: unlabelled test/": (["train/cat/0.bmp", "val/cat/0.bmp", "val/cat/1.bmp", "test/0.bmp"], "test", 2),
    "empty test/": (["train/cat/0.bmp", "val/cat/0.bmp", "test/"], "test", 1),
    "flat val/": (["train/cat/0.bmp", "val/0.bmp"], "test", "val/ holds images, but no class folders"),
    "no test images": (["train/cat/0.bmp"], "test", "neither test/ nor val/ has the classes of train/"),
    "more classes": (["train/cat/0.bmp", "test/cat/0.bmp", "test/fish/0.bmp"], "test", "has the classes of train/"),
    "fewer classes": (["train/cat/0.bmp", "train/dog/0.bmp", "test/cat/0.bmp"], "test", "has the classes of train/"),
    "an empty class": (["train/cat/0.bmp", "train/fish/"], "train", "train/fish holds no images"),
    "no images at all": (["train/"], "train", "holds no images"),
    "no folder": ([], "train", "there is no folder"),
    "no classes": (["train/0.bmp", "train/1.bmp"], "train", 2),
    "subfolders of a class": (["train/cat/a/0.bmp", "train/cat/b/0.bmp", "train/cat/1.BMP"], "train", 3),
    "junk": (["train/cat/0.bmp", "train/cat/@eaDir/0.bmp", "train/cat/.x.bmp", "train/.git/0.bmp"], "train", 1),
    "a picture beside the classes": (["train/cat/0.bmp", "train/readme.bmp"], "train", 1),
    "accents in two forms": (["train/caf\u00e9/0.bmp", "test/cafe\u0301/0.bmp"], "test", 1),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case, tmp_path, capsys):
    files, split, result = FOLDERS[case]
    for file in files:
        if file.endswith("/"):
            (tmp_path / "mine" / file).mkdir(parents=True)
        else:
            paint(tmp_path / "mine" / file)
    if isinstance(result, int):
        images, labels, classes = T.load_data(args(tmp_path), split)
        assert len(images) == len(labels) == result and (len(classes) == 0) == (case == "no classes")
        return
    with pytest.raises(SystemExit) as stop:
        T.load_data(args(tmp_path), split)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and result in error


def test_links(tmp_path):
    """A class folder may be a link; a link in it that leads back to it adds nothing."""
    paint(tmp_path / "elsewhere/0.bmp")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/train").mkdir(parents=True)
    (tmp_path / "mine/train/cat").symlink_to(tmp_path / "elsewhere")
    assert len(T.load_data(args(tmp_path), "train")[0]) == 1


def test_annotated_images_that_are_missing(tmp_path, capsys):
    paint(tmp_path / "mine/train/n01/images/0.bmp")
    paint(tmp_path / "mine/val/images/0.bmp")
    (tmp_path / "mine/val/val_annotations.txt").write_text("0.bmp\tn01\t0\n1.bmp\tn01\t0\n")
    with pytest.raises(SystemExit):
        T.load_data(args(tmp_path), "test")
    assert "missing: 1 of 2 images of val_annotations.txt" in capsys.readouterr().err


def test_all_images_that_cannot_be_read_are_named(tmp_path, capsys):
    paint(tmp_path / "mine/train/cat/good.bmp")
    for i in range(12):
        (tmp_path / f"mine/train/cat/{i}.png").write_text("I am not an image")
    with pytest.raises(SystemExit) as stop:
        T.load_data(args(tmp_path), "train")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "12 of 13 images cannot be read" in error
    assert all(f"cat/{i}.png: cannot identify" in error for i in range(12))
    assert not (tmp_path / "mine/.cache").exists()


def test_cached_images_follow_the_files(tmp_path):
    """Other pixels under the same name, of the same size and date, are seen; a moved folder is not decoded again."""
    file = tmp_path / "mine/train/cat/0.bmp"
    paint(file)
    before = T.load_data(args(tmp_path), "train")[0].clone()
    date = os.stat(file)
    paint(file, seed=1)
    os.utime(file, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert os.stat(file).st_size == date.st_size and os.stat(file).st_mtime_ns == date.st_mtime_ns
    after = T.load_data(args(tmp_path), "train")[0].clone()
    assert not after.equal(before) and len(list((tmp_path / "mine/.cache").iterdir())) == 1
    (tmp_path / "mine").rename(tmp_path / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "load_image", None)  # nothing may be decoded
        assert T.load_data(args(tmp_path, "moved"), "train")[0].equal(after)


def test_a_cache_of_another_user_or_a_damaged_one(tmp_path, monkeypatch, capsys):
    """What cannot be read is decoded again; where nothing can be written, a note says so."""
    paint(tmp_path / "mine/train/cat/0.bmp")
    want = T.load_data(args(tmp_path), "train")[0].clone()
    cache = tmp_path / "mine/.cache/train_8.pt"
    cache.write_bytes(cache.read_bytes()[:100])
    assert T.load_data(args(tmp_path), "train")[0].equal(want)
    cache.unlink()

    def denied(*_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(T, "save_checkpoint", denied)
    assert T.load_data(args(tmp_path), "train")[0].equal(want)
    assert "not kept" in capsys.readouterr().out and not cache.exists()


def test_two_jobs_decode_one_data_set(tmp_path, monkeypatch):
    """While one job decodes, another does, too: both have all images, and one intact file is left."""
    for i in range(4):
        paint(tmp_path / f"mine/train/cat/{i}.bmp", seed=i)
    save, results = T.save_checkpoint, []

    def meanwhile(*given):
        monkeypatch.setattr(T, "save_checkpoint", save)
        results.append(T.load_data(args(tmp_path), "train")[0].clone())
        save(*given)

    monkeypatch.setattr(T, "save_checkpoint", meanwhile)
    results.append(T.load_data(args(tmp_path), "train")[0])
    results.append(T.load_data(args(tmp_path), "train")[0])
    assert len(results) == 3 and all(images.equal(results[0]) and images.any() for images in results)
    assert len(list((tmp_path / "mine/.cache").iterdir())) == 1


RED, BLUE, WHITE = (200, 40, 40), (40, 40, 200), (255, 255, 255)
IMAGES = {  # of tests/images: mean colours of the left and right half, turned: of top and bottom; or the error
    "exif_float_for_rational_nan.jpg": ("turned", RED, BLUE),
    "exif_gps_altitude_ascii.jpg": ("turned", RED, BLUE),
    "exif_resunit_bytes.jpg": ("turned", RED, BLUE),
    "exif_width_float.jpg": ("turned", RED, BLUE),
    "exif_width_string.jpg": ("turned", RED, BLUE),
    "exif_ycc_string.jpg": ("turned", RED, BLUE),
    "exif_zero_denominator.jpg": ("turned", RED, BLUE),
    "exif_png6.png": ("turned", RED, BLUE),
    "exif_png_broken.png": ("stored", RED, BLUE),
    "text_2mb.png": ("stored", RED, BLUE),
    "itxt_2mb.png": ("stored", RED, BLUE),
    "gray16_trns.png": ("stored", WHITE, (58, 58, 58)),
    "rgb16_trns.png": ("stored", WHITE, BLUE),
    "rgba16_halfclear.png": ("stored", WHITE, BLUE),
    "bgra32_v5_alpha0.bmp": ("stored", RED, BLUE),
    "bgrx32.bmp": ("stored", RED, BLUE),
    "cmyk.jpg": ("stored", RED, BLUE),
    "animated.webp": ("stored", RED, BLUE),
    "apng.png": ("stored", RED, BLUE),
    "gif_named.jpg": "is a GIF",
    "tiff_named.jpg": "is a TIFF",
    "text_badcrc.png": "cannot identify",
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_the_field(name):
    path, result = ROOT / "tests/images" / name, IMAGES[name]
    if isinstance(result, str):
        with pytest.raises(Exception, match=result):
            T.load_image(path, 16)
        return
    image = T.load_image(path, 16).float()
    if result[0] == "turned":
        image = image.transpose(1, 2)
    halves = image[:, :, :8].mean((1, 2)), image[:, :, 8:].mean((1, 2))
    for half, colour in zip(halves, result[1:], strict=True):
        assert (half - torch.tensor(colour)).abs().max() <= 4, (half, colour)  # JPEG blurs the edge


def test_cifar_without_network(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(T.datasets, "CIFAR10", offline)
    with pytest.raises(SystemExit) as stop:
        T.load_data(args(tmp_path, "cifar10", 32), "train")
    assert stop.value.code == 2 and "train/<class>/" in capsys.readouterr().err


def test_shapes_are_the_same_for_everyone():
    images, labels = T.draw_shapes(500, 0, 16)
    assert images.shape == (500, 3, 16, 16) and labels.bincount().tolist() == [50] * len(T.SHAPES)
    again = T.draw_shapes(500, 0, 16)
    assert again[0].equal(images) and again[1].equal(labels)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "e5fc3b1812f40654"
    assert not T.draw_shapes(500, 1, 16)[0].equal(images)
    large, same = T.draw_shapes(500, 0, 32)  # the same scenes at any side
    assert same.equal(labels) and (F.avg_pool2d(large.float(), 2) - images).abs().max() <= 1


def test_shapes_are_hard_for_raw_pixels():
    """Ridge regression on raw pixels, the closed form of a linear probe: above chance, below a third."""
    (x, y), (x_test, y_test) = T.draw_shapes(6000, 0, 16), T.draw_shapes(2000, 1, 16)
    x, x_test = (torch.cat([T.to_x0(i).flatten(1), torch.ones(len(i), 1)], 1).double() for i in (x, x_test))
    w = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ torch.eye(10, dtype=torch.float64)[y])
    accuracy = ((x_test @ w).argmax(1) == y_test).double().mean().item()
    assert 0.15 < accuracy < 0.32, accuracy


def test_range_and_round_trip():
    images = torch.arange(256).repeat(3).view(1, 3, 16, 16).to(torch.uint8)
    x0 = T.to_x0(images)
    assert x0.min() == -1 and x0.max() == 1 and x0.dtype == torch.float32
    assert T.to_uint8(x0).equal(images)
    assert T.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    pair = T.to_x0(torch.cat([images, images]), flip=torch.tensor([False, True]))
    assert pair[:1].equal(x0) and pair[1:].equal(x0.flip(3)) and not pair[1].equal(pair[0])


@pytest.mark.skipif("DDAE_DATA" not in os.environ, reason="set DDAE_DATA to a folder with cifar10/ and cifar100/")
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar(name, classes):
    flags = args(os.environ["DDAE_DATA"], name, 32)
    images, labels, names = T.load_data(flags, "train")
    assert images.shape == (50_000, 3, 32, 32) and len(names) == classes
    assert labels.bincount().tolist() == [50_000 // classes] * classes
    assert len(T.load_data(flags, "test")[0]) == 10_000
