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


def checkpoint(path, model="edm", seed=0, flags=()):
    """An untrained tiny network as a run would leave it, its zero-initialised layers shaken."""
    args = T.parse_args(["--model", model, "--dataset", "shapes", "--backbone", "tiny", *flags])
    torch.manual_seed(seed)
    net, _ = T.build(args)
    with torch.no_grad():
        net.final.weight.normal_(std=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"script": "train_unet", "args": vars(args), "ema": net.state_dict(), "epoch": 3, "step": 9}, path)
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
    run(ckpt, "--n", "4", "--steps", "2")
    assert Image.open(tmp_path / "run/samples.png").size == (2 * 18 + 2, 2 * 18 + 2)
    said = capsys.readouterr().out
    assert "EMA weights of epoch 3 (step 9)" in said and "NFE 3" in said


def test_rows_share_their_noise(tmp_path):
    a, b = checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", seed=1)
    run(a, b, a, "--n", "4", "--steps", "3", "--out", tmp_path / "rows.png")
    picture = np.asarray(Image.open(tmp_path / "rows.png"))
    assert picture.shape == (3 * 18 + 2, 4 * 18 + 2, 3)
    rows = [picture[2 + 18 * r : 18 + 18 * r] for r in range(3)]
    assert (rows[0] == rows[2]).all() and not (rows[0] == rows[1]).all()


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
     ("script", "written by 'os'"), ("keys", "no checkpoint"), ("weights", "do not fit")],
)  # fmt: skip
def test_no_checkpoint(kind, says, tmp_path, capsys):
    path = tmp_path / "x.pt"
    if kind in ("cut", "script", "weights"):
        checkpoint(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
    if kind == "text":
        path.write_text("hello")
    if kind == "keys":
        torch.save({"model": {}}, path)
    if kind in ("script", "weights"):
        state = torch.load(path, weights_only=True)
        state["script"] = "os" if kind == "script" else state["script"]
        state["ema"].pop("final.bias")
        torch.save(state, path)
    with pytest.raises(SystemExit) as stop:
        run(path)
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([x for x in err if x.startswith("error: ") and says in x]) == 1
    assert not (tmp_path / "boom").exists()


def test_a_filled_folder_is_not_mixed(tmp_path, capsys):
    ckpt = checkpoint(tmp_path / "a.pt")
    (tmp_path / "png").mkdir()
    (tmp_path / "png/old.png").touch()
    with pytest.raises(SystemExit) as stop:
        run(ckpt, "--out", tmp_path / "png")
    assert stop.value.code == 2 and "not an empty folder" in capsys.readouterr().err
