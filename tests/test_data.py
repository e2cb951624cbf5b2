"""The data rule: class folders, tiny-imagenet's layout, shapes, CIFAR, and what users get wrong."""

import argparse
import hashlib
import os
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_unet as T


def args(root, name="mine", resolution=8):
    return argparse.Namespace(dataset=name, data=str(root), resolution=resolution)


def make_folder(root, name="mine", splits=("train", "test"), classes=("cat", "dog"), n=3, size=(8, 8), suffix=".png"):
    rng = np.random.RandomState(0)
    for split in splits:
        for c in classes:
            folder = root / name / split / c
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}{suffix}")


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
    (tmp_path / "mine/train/cat/0.png").unlink()  # a changed folder is read anew
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


@pytest.mark.parametrize(
    ("kind", "says"),
    [("unknown", "no folder"), ("empty", "see fish"), ("text", "not an image"), ("no-test", "test/ or val/"),
     ("class-more", "see fish"), ("class-less", "see cat")],
)  # fmt: skip
def test_mistakes(kind, says, tmp_path, capsys):
    flags, split = args(tmp_path), "train"
    if kind != "unknown":
        make_folder(tmp_path, splits=("train",))
    if kind == "empty":
        (tmp_path / "mine/train/fish").mkdir()
    if kind == "text":
        (tmp_path / "mine/train/cat/9.png").write_text("I am not an image")
    if kind == "no-test":
        split = "test"
    if kind.startswith("class"):
        make_folder(tmp_path, splits=("test",), classes=("cat", "dog", "fish") if kind == "class-more" else ("dog",))
        split = "test"
    with pytest.raises(SystemExit) as stop:
        T.load_data(flags, split)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and says in errors[0], errors


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
