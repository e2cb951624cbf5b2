"""Damaged, foreign and hostile files, wherever a person may put them: status 2 and one line that says why.

No code of theirs is run, and nothing changes in the folder of the run. What is nobody's work, a cache of images or a
log, is made anew.
"""

import argparse
import io
import json
import pickle
import random
import re
import shutil
import struct
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import load, make_folder, metrics
from PIL import Image

import probe
import sample
import train_unet as T
import train_uvit as V

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--backbone", "tiny", "--batch", "8"]


class Bomb:
    """Unpickling this would make a file."""

    def __reduce__(self):
        return open, ("boom", "w")


def packed(state):
    """The bytes of a checkpoint."""
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def image(form, side=64):
    """The bytes of an image."""
    picture = Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side**2))
    picture.save(file := io.BytesIO(), form)
    return file.getvalue()


def huge_png():
    """A PNG whose header tells of 30 000 x 30 000 pixels."""
    png = image("PNG")
    header = b"IHDR" + struct.pack(">II", 30000, 30000) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, fewer_shapes):
    """A run of two steps: its folder, last.pt as bytes and as a dict; and another script's last.pt."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(T.BACKBONES["tiny"], "mult", (1, 1, 1))
        T.main(T.parse_args([*TINY, "--max-steps", "2", "--out", str(home / "unet")]))
        V.main(V.parse_args(["--size", "tiny", "--max-steps", "0", "--out", str(home / "uvit")]))
        whole, other = ((home / name / "last.pt").read_bytes() for name in ("unet", "uvit"))
        state = torch.load(home / "unet/last.pt", weights_only=True)
        yield SimpleNamespace(folder=home / "unet", whole=whole, state=state, other=other)


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A folder to work in, with a copy of the run."""
    shutil.copytree(runs.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# ---- checkpoints
ENTRIES = {
    "init": lambda: T.main(T.parse_args([*TINY, "--max-steps", "0", "--out", "new", "--init", "run/last.pt"])),
    "resume": lambda: T.main(T.parse_args(["--resume", "--out", "run"])),
    "sample": lambda: sample.run_tool(sample.main, sample.parse_args(["run", "--out", "new.png"])),
    "probe": lambda: sample.run_tool(probe.main, probe.parse_args(["run/last.pt", "--json", "new.json"])),
}
CUT, FOREIGN = "failed finding central directory", "it begins with b"
HEADER = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
WEIGHT = {"final.weight": torch.zeros(3)}
CHECKPOINTS = {  # what last.pt holds, and what is said of it
    "empty": (lambda run: b"", "cannot be read as a checkpoint"),
    "cut early": (lambda run: run.whole[:100], CUT),
    "cut in half": (lambda run: run.whole[: len(run.whole) // 2], CUT),
    "cut at its last byte": (lambda run: run.whole[:-1], CUT),
    "random bytes": (lambda run: random.Random(0).randbytes(2000), FOREIGN),
    "text": (lambda run: b"hello\n", "it begins with b'hello"),
    "a Git-LFS pointer": (lambda run: b"version https://git-lfs.github.com/spec/v1\noid 1\n", "git-lfs"),
    "safetensors": (lambda run: struct.pack("<Q", len(HEADER)) + HEADER + bytes(8), '{"w": {"dtype"'),
    "a pickle with code": (lambda run: pickle.dumps(Bomb(), 2), "(io|__builtin__).open"),
    "code among the args": (lambda run: packed(run.state | {"args": Bomb()}), "(io|__builtin__).open"),
    "an object": (lambda run: packed(run.state | {"args": argparse.Namespace()}), "argparse.Namespace"),
    "a list": (lambda run: packed([1, 2]), "holds a list|is no checkpoint of a train script"),
    "no ema": (lambda run: packed({k: v for k, v in run.state.items() if k != "ema"}), "no 'ema'|missing .*time_emb"),
    "no objective": (lambda run: packed({k: v for k, v in run.state.items() if k != "objective"}), "'objective'"),
    "another shape": (
        lambda run: packed(run.state | {"ema": run.state["ema"] | WEIGHT, "objective": WEIGHT}),
        "size mismatch for final.weight|another network.*final.weight",
    ),
    "another script's": (lambda run: run.other, "does not fit: size mismatch|written by train_uvit.py"),
}
FINE = {("no ema", "resume"), ("another script's", "sample"), ("another script's", "probe"),
        *(("no objective", entry) for entry in ("init", "sample", "probe"))}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "entry"),
    [(case, entry) for case in CHECKPOINTS for entry in ENTRIES if (case, entry) not in FINE],
)
def test_a_file_that_is_no_checkpoint_is_refused(case, entry, runs, here, capsys, recwarn):
    make, says = CHECKPOINTS[case]
    (here / "run/last.pt").write_bytes(make(runs))
    before = contents(here)
    with pytest.raises(SystemExit) as stop:
        ENTRIES[entry]()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and not recwarn.list, lines
    assert lines[0].startswith("error: ") and "run/last.pt" in lines[0] and re.search(says, lines[0]), lines
    assert contents(here) == before  # nothing begun, nothing lost, no code run


def test_nan_is_a_number(runs, here, capsys):
    """It may be loaded; a run diverges, and keeps what it had."""
    nan = {key: torch.full_like(value, torch.nan) for key, value in runs.state["ema"].items()}
    state = runs.state | {"ema": nan, "objective": {f"net.{key}": value for key, value in nan.items()}}
    (here / "run/last.pt").write_bytes(packed(state))
    ENTRIES["init"]()
    assert load(here / "new")["ema"]["final.weight"].isnan().all()
    with pytest.raises(SystemExit) as stop:
        ENTRIES["resume"]()
    assert stop.value.code == 1 and "error: training diverged at step 3" in capsys.readouterr().err
    assert (here / "run/last.pt").read_bytes() == packed(state)


# ---- images
IMAGES = {
    "text.png": (b"I am not an image", "cannot identify image file"),
    "zero.png": (b"", "cannot identify image file"),
    "cut.png": (image("PNG")[:2000], "truncated"),
    "cut.jpg": (image("JPEG")[:2000], "truncated"),
    "gif.jpg": (image("GIF"), "is a GIF; read are PNG, JPEG, WebP, BMP"),
    "tiff.jpg": (image("TIFF"), "is a TIFF; read are PNG, JPEG, WebP, BMP"),
    "huge.png": (huge_png(), "decompression bomb"),
}
FOLDER = [*TINY[2:], "--dataset", "mine", "--data", ".", "--resolution", "16", "--max-steps", "1", "--out", "new"]


def test_all_images_that_cannot_be_read_are_named_at_once(here, capsys):
    make_folder(here, n=4)
    for name, (data, _) in IMAGES.items():
        (here / "mine/train/cat" / name).write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        T.main(T.parse_args(FOLDER))
    said = capsys.readouterr().err
    lines = said[said.index("error: ") :].rstrip().splitlines()  # a bar stands before
    assert stop.value.code == 2 and lines[0] == f"error: {len(IMAGES)} of {8 + len(IMAGES)} images cannot be read:"
    for line, name in zip(lines[1:], sorted(IMAGES), strict=True):
        assert re.match(rf"  \S*/mine/train/cat/{name}: .*{IMAGES[name][1]}", line), line
    assert not (here / "new").exists() and not (here / "mine/.cache").exists()


# ---- what is made anew
CACHES = {  # from what the file holds
    "empty": lambda stored: b"",
    "cut": lambda stored: packed(stored)[:-1],
    "text": lambda stored: b"hello\n",
    "a pickle with code": lambda stored: pickle.dumps(Bomb(), 2),
    "code for images": lambda stored: packed(stored | {"images": Bomb()}),
    "a list": lambda stored: packed([stored]),
    "of other images": lambda stored: packed({"key": "?", "images": torch.zeros_like(stored["images"])}),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_damaged_cache_of_images_is_made_anew(case, here, capsys):
    make_folder(here, n=4)
    T.main(T.parse_args(FOLDER))
    cache = here / "mine/.cache/train_16.pt"
    stored = torch.load(cache, weights_only=True)
    cache.write_bytes(CACHES[case](stored))
    shutil.move(here / "new/last.pt", here / "first.pt")
    T.main(T.parse_args(FOLDER))
    again, first, second = (torch.load(path, weights_only=True) for path in (cache, "first.pt", "new/last.pt"))
    assert again["key"] == stored["key"] and again["images"].equal(stored["images"]) and not (here / "boom").exists()
    assert all(value.equal(second["ema"][key]) for key, value in first["ema"].items())
    assert "error" not in capsys.readouterr().err and len([*cache.parent.iterdir()]) == 1


@pytest.mark.parametrize(("ending", "steps"), [('{"step": 2, "epo', [1, 2, 3]), ("\0" * 99, [1, 2, 3]), (None, [3])])
def test_a_damaged_log_stops_no_run(ending, steps, here):
    """Half a line, zeros after a loss of power, or no file at all."""
    file = here / "run/metrics.jsonl"
    file.write_text(file.read_text() + str(ending))
    if ending is None:
        file.unlink()
    (here / "run/args.json").write_text("{")
    T.main(T.parse_args(["--resume", "--out", "run", "--max-steps", "3"]))
    assert [line["step"] for line in metrics(here / "run")] == steps and load(here / "run")["step"] == 3
    assert json.loads(file.read_text().splitlines()[0])["args"]["batch"] == 8
