"""Damaged, foreign and hostile files, wherever a person may put them: status 2 and one line that says why.

No code of theirs is run, and nothing changes in the folder of the run. A damaged log is mended.
"""

import io
import json
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import load, make_folder, metrics, run
from PIL import Image

import probe
import sample
import train_unet as T

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--backbone", "tiny", "--batch", "8"]

class Code:
    """Unpickling this would make a file."""

    def __reduce__(self):
        return open, ("boom", "w")

def packed(state):
    """The bytes of a checkpoint."""
    torch.save(state, file := io.BytesIO())
    return file.getvalue()

@pytest.fixture(scope="module")
def runs(tmp_path_factory, fewer_shapes):
    """A run of two steps: its folder, last.pt as bytes and as a dict."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(T.BACKBONES["tiny"], "mult", (1, 1, 1))
        run(T, *TINY, "--max-steps", 2, "--out", home)
        state = torch.load(home / "last.pt", weights_only=True)
        yield SimpleNamespace(folder=home, whole=(home / "last.pt").read_bytes(), state=state)

@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A folder to work in, with a copy of the run."""
    shutil.copytree(runs.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path

# ---- checkpoints
READERS = {
    "init": (T, *TINY, "--max-steps", 0, "--out", "new", "--init", "run/last.pt"),
    "resume": (T, "--resume", "--out", "run"),
    "sample": (sample, "run", "--out", "new.png"),
    "probe": (probe, "run/last.pt", "--json", "new.json"),
}
UNREADABLE = {  # what last.pt holds, and what each reader says
    "empty": (lambda run: b"", "is no checkpoint, or is cut short .*begins with b''"),
    "cut at its last byte": (lambda run: run.whole[:-1], "failed finding central directory"),
    "a Git-LFS pointer": (lambda run: b"version https://git-lfs.github.com/spec/v1\noid 1\n", "git-lfs"),
    "a pickle with code": (lambda run: pickle.dumps(Code(), 2), "(io|__builtin__).open"),
    "code among the args": (lambda run: packed(run.state | {"args": Code()}), "(io|__builtin__).open"),
}
WEIGHT = {"final.weight": torch.zeros(3)}
SHAPE = "size mismatch for final.weight"
UNFIT = {  # what last.pt holds, and what --init, --resume and the tools say, None: it serves
    "a list": (lambda run: packed([1, 2]), "holds a list", "holds a list", "is no checkpoint of a train script"),
    "no ema": (lambda run: packed({k: v for k, v in run.state.items() if k != "ema"}),
               "missing .*time_emb", None, "no 'ema'"),
    "no objective": (lambda run: packed({k: v for k, v in run.state.items() if k != "objective"}),
                     None, "'objective'", None),
    "another shape": (lambda run: packed(run.state | {"ema": run.state["ema"] | WEIGHT, "objective": WEIGHT}),
                      SHAPE, "another network.*final.weight", SHAPE),
    "another program's": (lambda run: packed({"model": {}}), "missing .*time_emb", "written by None.py", "no 'script'"),
    "a module of Python": (lambda run: packed(run.state | {"script": "os"}),
                           None, "written by os.py", "written by os: give --script os.py"),
}  # fmt: skip
CASES = [(case, reader, *row) for case, row in UNREADABLE.items() for reader in READERS]
for case, (make, init, resume, tools) in UNFIT.items():
    says = {"init": init, "resume": resume, "sample": tools, "probe": tools}
    CASES += [(case, reader, make, text) for reader, text in says.items() if text]

@pytest.mark.parametrize(("case", "reader", "make", "says"), CASES, ids=[f"{row[0]}, {row[1]}" for row in CASES])
def test_a_file_that_is_no_checkpoint_is_refused(case, reader, make, says, runs, here, capsys, recwarn):
    """Nothing is begun, nothing lost, no code run; the line is all that is said."""
    (here / "run/last.pt").write_bytes(make(runs))
    before = {path: path.is_file() and path.read_bytes() for path in here.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        run(*READERS[reader])
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not recwarn.list
    assert line.startswith("error: ") and "run/last.pt" in line and re.search(says, line), line
    assert {path: path.is_file() and path.read_bytes() for path in here.rglob("*")} == before

# ---- images and logs
def test_images_that_cannot_be_read_are_named_at_once(here, capsys):
    """All are counted, the first twenty named, each with its reason; no run is begun."""
    make_folder(here, n=4)
    folder = here / "mine/train/cat"
    reasons = {f"{i}.png": "cannot identify image file" for i in range(10, 29)}
    for name in reasons:
        (folder / name).write_text("I am not an image")
    picture, reasons["00.png"], reasons["00.jpg"] = Image.effect_noise((64, 64), 99), "truncated", "truncated"
    for name in ("00.png", "00.jpg"):
        picture.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    flags = ["--dataset", "mine", "--data", ".", "--resolution", 16, "--max-steps", 1, "--out", "new"]
    with pytest.raises(SystemExit) as stop:
        run(T, *TINY[2:], *flags)
    said = capsys.readouterr().err
    title, *lines = said[said.index("error: ") :].splitlines()  # a bar stands before
    assert stop.value.code == 2 and title == "error: 21 of 29 images cannot be read:"
    for line, name in zip(lines, sorted(reasons)[:20], strict=True):
        assert re.match(rf"  \S*/mine/train/cat/{name}: .*{reasons[name]}", line), line
    assert not (here / "new").exists() and not (here / "mine/.cache").exists()

@pytest.mark.parametrize(("ending", "steps"), [('{"step": 2, "epo', [1, 2, 3]), ("\0" * 9, [1, 2, 3]), (None, [3])])
def test_a_damaged_log_stops_no_run(ending, steps, here):
    """Half a line, zeros after a loss of power, or no file at all."""
    file = here / "run/metrics.jsonl"
    file.write_text(file.read_text() + str(ending))
    if ending is None:
        file.unlink()
    (here / "run/args.json").write_text("{")
    run(T, "--resume", "--out", "run", "--max-steps", 3)
    assert [line["step"] for line in metrics(here / "run")] == steps and load(here / "run")["step"] == 3
    assert json.loads(file.read_text().splitlines()[0])["args"]["batch"] == 8
