"""train_unet.py as its user runs it: resume, ranks, stops and mistakes. What all three scripts share is tested here."""

import argparse
import hashlib
import json
import math
import os
import runpy
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT, check_resumed, load, make_folder, metrics, refused, run, spy

import train_unet as T

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = "--dataset shapes --backbone tiny --batch 8".split()

@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setitem(T.BACKBONES["tiny"], "mult", (1, 1, 1))

def train(out, flags):
    """Run the script in this process; returns its lines of metrics."""
    run(T, *TINY, *flags.split(), "--out", out)
    return metrics(out)

# ---- runs
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--model ddpm", "--model edm --aug 0.1 --self-cond --cl 0.01",
     "--model rf --self-cond add --cl 0.01 --cl-head moco --accum 2"],
)  # fmt: skip
def test_resume_repeats_an_unbroken_run_bit_for_bit(flags, tmp_path, monkeypatch):
    """Dropout is at work. A kill has left a line of a step that is run again, and half a line.

    The moments come as a GPU lays them out, channels last: fused kernels would read them in the order of memory.
    """
    monkeypatch.setitem(T.TINY, "dropout", 0.1)
    a, b = tmp_path / "a", tmp_path / "b"
    flags += " --epochs 2 --max-steps"
    whole = train(a, f"{flags} 10")
    train(b, f"{flags} 7")
    state = load(b)
    for moments in state["optimizer"]["state"].values():
        moments |= {k: m.contiguous(memory_format=torch.channels_last) for k, m in moments.items() if m.ndim == 4}
    torch.save(state, b / "last.pt")
    with open(b / "metrics.jsonl", "a") as lost:
        lost.write(json.dumps(whole[7] | {"loss": 0.0}) + '\n{"step": 7, "epoch": 0, "lr"')
    parts = train(b, f"{flags} 10 --resume")
    check_resumed(a, b, whole, parts)
    assert [line["step"] for line in parts] == list(range(1, 11))
    assert load(b)["step"] == 10 and load(b)["epoch"] == 1
    assert whole[0]["loss_unweighted"] == whole[0]["loss_diffusion"]  # EDM's learned weights start at 1
    assert (whole[9]["loss_unweighted"] != whole[9]["loss_diffusion"]) == ("edm" in flags)

def test_a_resume_takes_the_runs_own_flags_and_says_what_it_does(tmp_path, capsys):
    """Flags that are given override the run's, but for the limit of steps, which is each call's own."""
    first = train(tmp_path, "--model edm --self-cond --cl 0.02 --seed 3 --epochs 1 --max-steps 3")
    before = vars(T.parse_args(["--out", str(tmp_path), "--resume"]))
    flags = ["--out", str(tmp_path), "--resume", "--epochs", "2", "--lr", "0.01"]
    args = T.parse_args(flags)
    assert {k for k, v in vars(args).items() if v != before[k]} == {"epochs", "lr"} and args.max_steps is None
    capsys.readouterr()
    run(T, *flags)
    said, lines, last = capsys.readouterr().out, metrics(tmp_path), load(tmp_path)
    rates = [line["lr"] for line in lines]
    assert lines[:3] == first and [line["step"] for line in lines] == list(range(1, 17)) and last["step"] == 16
    assert rates[3:] == [T.learning_rate(args, step, 8, 16) for step in range(3, 16)] and max(rates) > 0.005
    assert f"going on from step 3 to 16, learning rate {rates[3]:.2g} now, {rates[15]:.2g} at the end" in said
    want = {"epochs": 2, "lr": 0.01, "cl": 0.02, "seed": 3, "self_cond": "adaptive", "model": "edm"}
    assert {k: last["args"][k] for k in want} == want
    assert (tmp_path / "epoch_0001.pt").is_file() and (tmp_path / "epoch_0002.pt").is_file()
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [i for i, line in enumerate(log) if "args" in line] == [0, 4]  # each start, where it was
    for line, step, epochs in ((log[0], 0, 1), (log[4], 3, 2)):
        assert line["step"] == step and line["args"]["epochs"] == epochs
        assert line["ranks"] == 1 and line["torch"] == torch.__version__
    saved = (tmp_path / "last.pt").read_bytes()
    run(T, *flags[:3])  # nothing left to do, nothing lost
    assert (tmp_path / "last.pt").read_bytes() == saved and metrics(tmp_path) == lines

def test_checkpoint_contract(tmp_path):
    lines = train(tmp_path, "--model edm --self-cond --cl 0.01 --epochs 1 --save-every 1")
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["epoch"] == 1
    keys = "step epoch lr loss loss_diffusion loss_unweighted loss_contrast grad_norm img_per_s"
    assert set(lines[0]) == set(keys.split())
    assert all(math.isfinite(v) for line in lines for v in line.values())
    small, last = (torch.load(tmp_path / name, weights_only=True) for name in ("epoch_0001.pt", "last.pt"))
    assert set(small) == {"script", "script_hash", "args", "ema", "epoch", "step"} and small["script"] == "train_unet"
    assert small["script_hash"] == hashlib.sha256((ROOT / "train_unet.py").read_bytes()).hexdigest()[:16]
    assert set(last) == set(small) | {"objective", "average", "optimizer", "scaler"}
    assert small["args"]["classes"] == T.SHAPES and small["args"]["train_images"] == 64
    given, log = json.loads((tmp_path / "args.json").read_text()), (tmp_path / "metrics.jsonl").read_text()
    assert given.pop("job") and given == small["args"] == json.loads(log.splitlines()[0])["args"]
    net, _ = T.build(argparse.Namespace(**small["args"]))
    net.load_state_dict(small["ema"])  # no prefixes of wrappers, nothing missing
    assert not list(tmp_path.glob("*.tmp"))

def test_grids_are_named_after_their_epoch_or_last(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(T, "save_grid", lambda *given: names.append(given[-1]))
    train(tmp_path, "--epochs 2 --save-every 1 --max-steps 11")
    assert names == ["0001", "last"]

# ---- stops
def test_ctrl_c_once_and_twice(capsys):
    """The first is noted and says what follows, on rank 0; the second stops at once.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    ways = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    before = {number: signal.getsignal(number) for number in ways}
    try:
        for number in ways:  # a job in the background of a shell would ignore SIGINT
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for rank in (1, 0):
            received = T.catch_stop_signals(rank)
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # a scheduler may send it twice
                signal.raise_signal(number)
            assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
            said = capsys.readouterr().err
            assert said.strip() == ("finishing this step, then saving; once more to stop at once" if rank == 0 else "")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def test_a_single_process_stops_after_its_step(tmp_path, monkeypatch):
    def stop(args, step, *_):
        if step == 2:
            signal.raise_signal(signal.SIGUSR1)

    spy(monkeypatch, T, "learning_rate", stop)
    monkeypatch.setattr(T, "LOG_EVERY", 10)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--max-steps 9")
    assert end.value.code == 128 + signal.SIGUSR1 and load(tmp_path)["step"] == 3

@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
@pytest.mark.parametrize("name", ["train_unet", "train_uvit", "train_dit"])
def test_a_full_disk_is_told_and_loses_nothing(name, tmp_path, capsys, monkeypatch):
    """Files may grow to 100 kB while a script, run as its user does, saves again: what it had stays."""
    import resource

    make_folder(tmp_path, n=4)
    size = "--backbone" if name == "train_unet" else "--size"
    flags = f"{size} tiny --dataset mine --data {tmp_path} --resolution 16 --batch 8 --max-steps 0 --device cpu"
    monkeypatch.setattr(sys, "argv", [name, *flags.split(), "--out", str(tmp_path / "run")])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    before = (tmp_path / "run/last.pt").read_bytes()
    sys.argv.append("--resume")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        said = refused(capsys, runpy.run_path, str(ROOT / f"{name}.py"), None, "__main__")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt cannot be written, is the disk full? (" in said
    assert (tmp_path / "run/last.pt").read_bytes() == before and not [*tmp_path.glob("run/*.tmp")]

@pytest.mark.parametrize("interval", [1, 100])
def test_nan_stops_and_keeps_the_last_good_checkpoint(interval, tmp_path, capsys, monkeypatch):
    """Where a line is due, or at the latest where the run would be saved."""
    train(tmp_path, "--max-steps 2")
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(T, "LOG_EVERY", interval)
    monkeypatch.setattr(T, "learning_rate", lambda *_: math.nan)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--max-steps 6 --resume")
    assert stop.value.code == 1 and "diverged" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before

# ---- parts
def test_learning_rate():
    args = argparse.Namespace(lr=1, warmup=10, cooldown=0.25)
    rates = [T.learning_rate(args, step, 1, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == rates[75] == 1
    assert rates[76] < 1 and rates[99] == pytest.approx(1 / 25) and min(rates) > 0

# ---- mistakes
MISTAKES = [  # flags, and what is said
    ("--dataset nowhere", "no folder"), ("--accum 3", "not divisible"), ("--batch 128", "more than the 64"),
    ("--layer out_77", "out_1, out_2"), ("--cl-t 2000", "from 0 to 1000"), ("--cl-t 0.5", "whole steps"),
    ("--cl 0.01 --accum 8", "two or more"), ("--compile", "--no-compile"), ("--init none.pt", "does not exist"),
    ("--resume", "does not exist"), ("--device cuda:1", "--device"),
    *((flag, flag.split()[0]) for flag in ("--lr nan", "--lr 0", "--aug 1.5", "--ema -1", "--epochs 0", "--seed -1",
                                           "--resolution 0", "--cl -1", "--max-steps -1")),
]  # fmt: skip
OF_A_RUN = [  # flags in the folder of a run, what its last.pt says of its data, and what is said
    ("", {}, "add --resume"), ("--resume --max-steps 0", {}, "past the end 0"),
    ("--resume --self-cond", {}, "of another network"),
    ("--resume", {"train_images": 65}, "it had 65 images, now 64"),
    ("--resume", {"classes": T.SHAPES[::-1]}, "class names differ"),
]  # fmt: skip

@pytest.fixture(scope="module")
def begun(fewer_shapes, tmp_path_factory):
    """A run of one step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(T.BACKBONES["tiny"], "mult", (1, 1, 1))
        train(home := tmp_path_factory.mktemp("begun"), "--max-steps 1")
    return home

@pytest.mark.parametrize(("flags", "changes", "says"), [*((flags, None, says) for flags, says in MISTAKES), *OF_A_RUN])
def test_mistakes_end_with_one_line_and_status_2(flags, changes, says, begun, tmp_path, capsys, monkeypatch):
    """Nothing is begun, nor is anything lost."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T.shutil, "which", lambda name: None)  # no compiler
    if changes is not None:
        shutil.copytree(begun, tmp_path / "run")
        state = load(begun)
        torch.save(state | {"args": state["args"] | changes}, tmp_path / "run/last.pt")
    before = {file: file.read_bytes() for file in tmp_path.glob("run/*")}
    assert says in refused(capsys, lambda: T.main(T.parse_args([*TINY, "--out", "run", *flags.split()])))
    assert before == {file: file.read_bytes() for file in tmp_path.glob("run/*")}
    assert before or not [*tmp_path.iterdir()]

def test_the_unweighted_loss_is_logged(tmp_path):
    """EDM with augmentation weights its loss by a learned head, which starts at zero."""
    first, _, third = train(tmp_path, "--model edm --aug 0.1 --max-steps 3")
    assert first["loss_unweighted"] == first["loss_diffusion"] == first["loss"]
    assert third["loss_unweighted"] != third["loss_diffusion"] == third["loss"]
