"""sample.py: exact count, images that depend on their index only, and refusal of what is no checkpoint."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import sample
import train_unet as T
import train_uvit


def checkpoint(path, model="edm", seed=0):
    """An untrained tiny network as a run would leave it, its zero-initialised layers shaken."""
    args = T.parse_args(["--model", model, "--dataset", "shapes", "--backbone", "tiny"])
    torch.manual_seed(seed)
    net, _ = T.build(args)
    with torch.no_grad():
        net.final.weight.normal_(std=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"script": "train_unet", "args": vars(args), "ema": net.state_dict(), "epoch": 3, "step": 9}, path)
    return path


def conditional(path):
    """An untrained class-conditional network of ten classes."""
    args = train_uvit.parse_args(["--dataset", "shapes", "--size", "tiny", "--cond"])
    net, _ = train_uvit.build(args)
    torch.save({"script": "train_uvit", "args": vars(args), "ema": net.state_dict(), "epoch": 3, "step": 9}, path)
    return path


def run(*flags):
    sample.main(sample.parse_args([str(f) for f in flags]))


def test_image_i_depends_on_its_index_only(tmp_path, monkeypatch):
    """Neither the batch size, nor how many are drawn, nor the number of ranks changes an image."""
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt"))
    monkeypatch.setattr(sample, "BLOCK", 4)

    def draw(n, **kw):
        out = {}
        for indices, images, _ in sample.generate(model, n, steps=3, **kw):
            out.update(zip(indices, images, strict=True))
        return out

    whole = draw(10)
    assert sorted(whole) == list(range(10)) and whole[0].dtype == torch.uint8 and whole[0].shape == (3, 16, 16)
    for other in (draw(10, batch=3), draw(6), draw(10, rank=0, world=2) | draw(10, rank=1, world=2)):
        for i, image in other.items():
            assert (image.int() - whole[i].int()).abs().max() <= 1  # a batch of another size may round once
    assert not any(whole[i].equal(draw(1, seed=1)[0]) for i in range(10))
    assert len({image.numpy().tobytes() for image in whole.values()}) == 10


@pytest.mark.parametrize(("model", "nfe"), [("ddpm", 100), ("edm", 35)])
def test_nfe_is_counted(tmp_path, model, nfe):
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt", model))
    ((_, _, calls),) = sample.generate(model, 2, batch=1)  # two pieces are still one evaluation
    assert calls == nfe


def test_rk45_is_batch_independent_and_counts(tmp_path):
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt", "rf"))
    ((_, a, nfe),) = sample.generate(model, 4, batch=4)
    ((_, b, same),) = sample.generate(model, 4, batch=3)
    assert nfe == same > 6 and (a.int() - b.int()).abs().max() <= 1


def test_folder_npz_and_grid(tmp_path, capsys):
    ckpt = checkpoint(tmp_path / "run/last.pt")
    run(tmp_path / "run", "--n", "5", "--steps", "2", "--out", tmp_path / "png")
    run(ckpt, "--n", "5", "--steps", "2", "--out", tmp_path / "five.npz")
    files = sorted((tmp_path / "png").iterdir())
    arrays = np.load(tmp_path / "five.npz")["arr_0"]
    assert len(files) == 5 and arrays.shape == (5, 16, 16, 3) and arrays.dtype == np.uint8
    assert all((np.asarray(Image.open(f)) == a).all() for f, a in zip(files, arrays, strict=True))
    run(ckpt, "--n", "5", "--steps", "2")
    picture = np.asarray(Image.open(tmp_path / "run/samples.png"))
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 3)  # 16 pixels are enlarged to 64
    assert (picture[2:66, 2:66] == arrays[0].repeat(4, 0).repeat(4, 1)).all()
    assert (picture[68:132, 68:132] == arrays[4].repeat(4, 0).repeat(4, 1)).all()
    said = capsys.readouterr().out
    assert "EMA weights of epoch 3 (step 9)" in said and "NFE 3" in said


def test_rows_share_their_noise_and_have_names(tmp_path):
    a, b = checkpoint(tmp_path / "first/last.pt"), checkpoint(tmp_path / "second/last.pt", seed=1)
    run(a, b, a, "--n", "4", "--steps", "3", "--out", tmp_path / "rows.png")
    picture = np.asarray(Image.open(tmp_path / "rows.png"))
    margin = picture.shape[1] - (4 * 66 + 2)
    assert picture.shape[0] == 3 * 66 + 2 and margin > 50
    rows = [picture[2 + 66 * r : 66 + 66 * r] for r in range(3)]
    names, tiles = [row[:, :margin] for row in rows], [row[:, margin:] for row in rows]
    assert (tiles[0] == tiles[2]).all() and not (tiles[0] == tiles[1]).all()
    assert all((name < 128).sum() > 30 for name in names) and not (names[0] == names[1]).all()


def test_a_column_per_class(tmp_path, capsys, monkeypatch):
    """Ten classes have ten columns; --labels has columns of those; what is no class is one line."""
    path, drawn, draw = conditional(tmp_path / "a.pt"), [], sample.class_labels
    monkeypatch.setattr(sample, "class_labels", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    for flags, columns, rows, labels in (
        ([], 10, 8, list(range(10)) * 8),
        (["--n", "4"], 4, 1, [0, 1, 2, 3]),
        (["--labels", "3", "7", "1"], 3, 8, [3, 7, 1] * 8),
        (["--labels", "3", "--n", "4"], 2, 2, [3] * 4),
    ):
        run(path, "--steps", "1", *flags)
        assert Image.open(tmp_path / "samples.png").size == (columns * 66 + 2, rows * 66 + 2)
        assert drawn.pop().tolist() == labels
    run(path, "--steps", "1", "--labels", "random", "--n", "64")
    assert Image.open(tmp_path / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2) and len(set(drawn.pop().tolist())) > 5
    for bad in (["10"], ["-1"], ["3", "random"], ["cat"]):
        with pytest.raises(SystemExit) as stop:
            run(path, "--steps", "1", "--labels", *bad)
        assert stop.value.code == 2 and "--labels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(checkpoint(tmp_path / "b.pt"), "--labels", "3")
    assert "unconditional" in capsys.readouterr().err and not drawn


def test_features_can_train_a_head(tmp_path):
    """The network is frozen; what it returns is an ordinary tensor that a head can learn from."""
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt"))
    x0 = model.script.to_x0(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    feat = list(model.diffusion.features(model.net, x0, 0.06, torch.randn_like(x0)).values())[0]
    head = torch.nn.Linear(feat.shape[1], 2)
    head(feat).sum().backward()
    assert head.weight.grad.abs().sum() > 0 and not any(p.requires_grad for p in model.net.parameters())


def test_two_ranks_write_what_one_writes(tmp_path):
    ckpt = checkpoint(tmp_path / "a.pt")
    script = str(ROOT / "sample.py")
    flags = [str(ckpt), "--n", "300", "--steps", "1"]  # two blocks
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]  # else torchrun takes --n
    for name, extra in (("1", []), ("2", launch)):
        command = [sys.executable, *extra, script, *flags, "--out", f"{tmp_path}/{name}.npz"]
        subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "12")
    assert one.shape == (300, 16, 16, 3) and abs(one - two).max() <= 1


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("kind", "says"),
    [("missing", "does not exist"), ("cut", "cannot be read"), ("pickle", "cannot be read"), ("text", "cannot be read"),
     ("script", "no checkpoint"), ("keys", "no checkpoint"), ("weights", "final.bias"), ("shape", "final.bias"),
     ("flags", "damaged"), ("epoch", "damaged"), ("bit", "damaged")],
)  # fmt: skip
def test_no_checkpoint(kind, says, tmp_path, capsys):
    path = tmp_path / "x.pt"
    if kind not in ("missing", "pickle", "text", "keys"):
        checkpoint(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
    if kind == "text":
        path.write_text("hello")
    if kind == "keys":
        torch.save({"model": {}}, path)
    if kind == "bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    if kind in ("script", "weights", "shape", "flags", "epoch"):
        state = torch.load(path, weights_only=True)
        if kind == "script":
            state["script"] = "os"
        if kind == "weights":
            state["ema"].pop("final.bias")
        if kind == "shape":
            state["ema"]["final.bias"] = torch.zeros(1)
        if kind == "flags":
            state["args"]["backbone"] = 5
        if kind == "epoch":
            state["epoch"] = [3]
        torch.save(state, path)
    with pytest.raises(SystemExit) as stop:
        run(path)
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([x for x in err if x.startswith("error: ") and says in x]) == 1
    assert not (tmp_path / "boom").exists()


def test_an_old_folder_is_not_mixed(tmp_path, capsys):
    ckpt = checkpoint(tmp_path / "a.pt")
    (tmp_path / "png").mkdir()
    (tmp_path / "png/old.png").touch()
    with pytest.raises(SystemExit) as stop:
        run(ckpt, "--out", tmp_path / "png")
    assert stop.value.code == 2 and "give a new folder" in capsys.readouterr().err
