"""The data rule: class folders, tiny-imagenet's layout, shapes, CIFAR, and what users get wrong."""

import argparse
import hashlib
import math
import os
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_folder, refused
from PIL import Image

import train_unet as T


def load(root, split="train", name="mine", resolution=8):
    """T.load_data; cached images are a view of their file, which tests overwrite."""
    args = argparse.Namespace(dataset=name, data=str(root), resolution=resolution)
    images, labels, classes = T.load_data(args, split)
    return images.clone(), labels, classes

def paint(path, seed=0):
    """A picture of noise; all are of one size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(256, size=(8, 8, 3), dtype=np.uint8)).save(path, "BMP")

def pixels(path):
    """A picture as it is stored, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)

# ---- Folders ---------------------------------------------------------------------------------------------------------
def test_classes_and_their_files_come_in_sorted_order(tmp_path, monkeypatch):
    """Whatever the order of the file system is; pixels of the right size are not touched."""
    def backwards(*args, walk=os.walk, **kw):
        for parent, folders, names in walk(*args, **kw):
            folders.sort(reverse=True)
            yield parent, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    make_folder(tmp_path, classes=("dog", "cat"), n=11)
    images, labels, classes = load(tmp_path)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert classes == ["cat", "dog"] and labels.tolist() == [0] * 11 + [1] * 11
    names = ["0", "1", "10", *map(str, range(2, 10))]
    want = [pixels(tmp_path / f"mine/train/{label}/{name}.png") for label in classes for name in names]
    assert images.equal(torch.stack(want))

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
    if isinstance(result, str):
        assert result in refused(capsys, load, tmp_path, split)
    else:
        images, labels, classes = load(tmp_path, split)
        assert len(images) == len(labels) == result and (len(classes) == 0) == (case == "no classes")
        assert ("beside the class folders" in capsys.readouterr().out) == (case == "a picture beside the classes")

def test_tiny_imagenet_layout(tmp_path, capsys):
    """Its test split is val/, labelled by a table; the official test/ has no labels."""
    root = tmp_path / "mine"
    for i, name in enumerate(("train/n01/images/0", "train/n02/images/0", "val/images/0", "val/images/1", "test/0")):
        paint(root / f"{name}.bmp", seed=i)
    table = "0.bmp\tn02\t0\t0\t1\t1\n1.bmp\tn01\t0\t0\t1\t1\n"
    (root / "val/val_annotations.txt").write_text(table)
    assert load(tmp_path)[1].tolist() == [0, 1]
    images, labels, _ = load(tmp_path, "test")
    assert labels.tolist() == [1, 0] and images[1].equal(pixels(root / "val/images/1.bmp"))
    (root / "val/val_annotations.txt").write_text(table + "2.bmp\tn01\t0\t0\t1\t1\n")
    assert "missing: 1 of 3 images of val_annotations.txt" in refused(capsys, load, tmp_path, "test")

def test_a_class_folder_may_be_a_link(tmp_path):
    """A link in it that leads back to it adds nothing."""
    paint(tmp_path / "elsewhere/0.bmp")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/train").mkdir(parents=True)
    (tmp_path / "mine/train/cat").symlink_to(tmp_path / "elsewhere")
    assert len(load(tmp_path)[0]) == 1

# ---- The cache -------------------------------------------------------------------------------------------------------
def test_cached_images_follow_the_files(tmp_path, monkeypatch):
    """Other pixels under the same name, of the same size and date, are seen; a moved folder is not decoded again."""
    file = tmp_path / "mine/train/cat/0.bmp"
    paint(file)
    before, old = load(tmp_path)[0], os.stat(file)
    while os.stat(file).st_ctime_ns == old.st_ctime_ns:  # the clock of files has ticks
        paint(file, seed=1)
        os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    after = load(tmp_path)[0]
    assert after[0].equal(pixels(file)) and not after.equal(before)
    (tmp_path / "mine").rename(tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(T, "load_image", None)
        assert load(tmp_path, name="moved")[0].equal(after)
    paint(tmp_path / "moved/train/cat/1.bmp")
    assert len(load(tmp_path, name="moved")[0]) == 2 and len(list((tmp_path / "moved/.cache").iterdir())) == 1

DAMAGES = {  # from what the cache holds
    "cut": lambda stored, file: file.write_bytes(file.read_bytes()[:-1]),
    "code": lambda stored, file: torch.save(stored | {"images": os.getcwd}, file),
    "a list": lambda stored, file: torch.save([stored], file),
    "other images": lambda stored, file: torch.save({"key": "?", "images": stored["images"] + 1}, file),
}

@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_cache_is_made_anew_if_it_can_be(case, tmp_path, monkeypatch, capsys):
    paint(tmp_path / "mine/train/cat/0.bmp")
    images, file = load(tmp_path)[0], tmp_path / "mine/.cache/train_8.pt"
    stored = torch.load(file, weights_only=True)
    DAMAGES[case](stored, file)
    assert load(tmp_path)[0].equal(images)
    again = torch.load(file, weights_only=True)
    assert again["key"] == stored["key"] and again["images"].equal(images) and len(list(file.parent.iterdir())) == 1
    assert "error" not in capsys.readouterr().err

    def denied(*_):
        raise PermissionError("Permission denied")

    file.unlink()
    monkeypatch.setattr(T, "save_checkpoint", denied)  # a folder that is full, or another user's
    assert load(tmp_path)[0].equal(images) and "not kept" in capsys.readouterr().out

# ---- Images ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [16, 33])
@pytest.mark.parametrize("size", [(97, 61), (61, 97), (32, 41), (140, 66), (135, 267), (33, 31), (12, 25), (15, 15)])
def test_images_are_resized_and_cropped_as_by_adm(size, side, tmp_path):
    """Halved by BOX (odd sides downwards) while the smaller side is at least twice `side`, BICUBIC, center crop."""
    picture = Image.fromarray(np.random.RandomState(0).randint(256, size=(*size[::-1], 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    for _ in range(int(math.log2(max(1, min(size) / side)))):
        picture = picture.resize([length // 2 for length in picture.size], Image.Resampling.BOX)
    shorter = min(picture.size)
    width, height = (round(length * side / shorter) for length in picture.size)
    array = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    array = array[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    assert np.array_equal(T.load_image(tmp_path / "a.png", side).permute(1, 2, 0), array)

RED, BLUE, GRAY, WHITE = (200, 40, 40), (40, 40, 200), (58, 58, 58), (255, 255, 255)
IMAGES = (  # of tests/images: pattern, what lies at the left, at the right once they are upright; or what is refused
    ("exif_[!p]*.jpg", RED, BLUE), ("exif_png6.png", RED, BLUE), ("exif_png_broken.png", RED, BLUE),
    ("*xt_2mb.png", RED, BLUE), ("gray16_trns.png", WHITE, GRAY), ("rgb16_trns.png", WHITE, BLUE),
    ("rgba16_halfclear.png", WHITE, BLUE), ("bgr*32*.bmp", RED, BLUE), ("cmyk.jpg", RED, BLUE),
    ("animated.webp", RED, BLUE), ("apng.png", RED, BLUE), ("text_badcrc.png", "cannot identify", None),
    ("gif_named.jpg", "is a GIF; read are PNG, JPEG, WebP, BMP", None), ("tiff_named.jpg", "is a TIFF", None),
)  # fmt: skip
FILES = [(path.name, *row[1:]) for row in IMAGES for path in sorted((ROOT / "tests/images").glob(row[0]))]

@pytest.mark.parametrize(("name", "left", "right"), FILES)
def test_images_of_the_field(name, left, right):
    assert len(FILES) == len(list((ROOT / "tests/images").iterdir()))  # each has a row
    if right is None:
        with pytest.raises(Exception, match=left):
            T.load_image(ROOT / "tests/images" / name, 16)
        return
    image = T.load_image(ROOT / "tests/images" / name, 16).float()
    if name.startswith("exif") and name != "exif_png_broken.png":
        image = image.transpose(1, 2)  # stored upright, shown lying
    for half, colour in ((image[:, :, :8], left), (image[:, :, 8:], right)):
        assert (half.mean((1, 2)) - torch.tensor(colour)).abs().max() <= 4  # JPEG blurs the edge

def test_images_are_turned_as_exif_says(tmp_path):
    stored = np.random.RandomState(0).randint(256, size=(6, 4, 3), dtype=np.uint8)
    across = stored.transpose(1, 0, 2)
    upright = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1]]
    upright += [across, np.rot90(stored, -1), across[::-1, ::-1], np.rot90(stored)]
    for orientation, want in enumerate(upright, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(T.open_image(tmp_path / "a.png"), want), orientation

def test_images_lie_on_white_where_they_are_transparent(tmp_path):
    """By a channel, in part; by one colour; in a palette, by one index or by a list. 16 bits keep their high byte."""
    rng = np.random.RandomState(0)
    rgba = rng.randint(256, size=(6, 4, 4), dtype=np.uint8)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    deep = rng.randint(65536, size=(6, 4, 1), dtype=np.uint16)
    palette = Image.fromarray(rgb).quantize(8)
    index, colours = np.asarray(palette)[..., None], np.asarray(palette.convert("RGB"))
    clear_colour = (rgb == rgb[1, 2]).all(2, keepdims=True)
    for name, image, clear, want, error in (
        ("RGBA", Image.fromarray(rgba), None, rgb * (alpha / 255) + 255 - alpha, 1),
        ("LA", Image.fromarray(rgba[..., 2:], "LA"), None, rgba[..., 2:3] * (alpha / 255) + 255 - alpha, 1),
        ("a colour", Image.fromarray(rgb), tuple(map(int, rgb[1, 2])), np.where(clear_colour, 255, rgb), 0),
        ("an index", palette, 3, np.where(index == 3, 255, colours), 0),
        ("a list", palette, bytes([0, 255] * 4), np.where(index % 2 == 0, 255, colours), 0),
        ("16 bits", Image.fromarray(deep[..., 0]), None, deep >> 8, 0),
        ("1 bit", Image.new("1", (4, 6), 1), None, 255, 0),
    ):
        image.save(tmp_path / "a.png", **({} if clear is None else {"transparency": clear}))
        found = np.asarray(T.open_image(tmp_path / "a.png"))
        assert found.shape == (6, 4, 3) and np.abs(found - np.float64(want)).max() <= error, name

# ---- CIFAR, shapes, ranges -------------------------------------------------------------------------------------------
def test_cifar_without_network(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(T.datasets, "CIFAR10", offline)
    assert "train/<class>/" in refused(capsys, load, tmp_path, "train", "cifar10", 32)

FROZEN = (  # sha256 of pixels and labels: benchmark data must never change
    ("train", 10_000, "4feecacb2ae5af488c50e0f9c515f2ddf4c634b302097dde458a05709c61d09e"),
    ("test", 2000, "a6be99c0e48530e6d0966ef060fed66859ba144d753f24aebf8b6c1696f00614"),
)

@pytest.mark.parametrize(("split", "n", "digest"), FROZEN)
def test_shapes_are_frozen(split, n, digest, tmp_path):
    images, labels, classes = load(tmp_path, split, "shapes", 16)
    assert images.shape == (n, 3, 16, 16) and labels.bincount().tolist() == [n // 10] * 10
    assert classes[0] == "solid triangle" and classes[9] == "hollow disc"
    assert hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest() == digest

def test_shapes_are_the_same_scenes_at_any_side():
    (small, labels), (large, same) = T.draw_shapes(100, 0, 16), T.draw_shapes(100, 0, 32)
    assert same.equal(labels) and (F.avg_pool2d(large.float(), 2) - small).abs().max() <= 1

def test_pixels_lie_in_minus_one_to_one_and_come_back():
    images = torch.arange(256).repeat(3).view(1, 3, 16, 16).to(torch.uint8)
    x0 = T.to_x0(images)
    assert x0.min() == -1 and x0.max() == 1 and x0.dtype == torch.float32
    assert T.to_uint8(x0).equal(images)
    assert T.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]

@pytest.mark.slow
@pytest.mark.skipif("DDAE_DATA" not in os.environ, reason="set DDAE_DATA to a folder with cifar10/ and cifar100/")
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar(name, classes):
    images, labels, names = load(os.environ["DDAE_DATA"], "train", name, 32)
    assert images.shape == (50_000, 3, 32, 32) and len(names) == classes
    assert labels.bincount().tolist() == [50_000 // classes] * classes
    assert len(load(os.environ["DDAE_DATA"], "test", name, 32)[0]) == 10_000
