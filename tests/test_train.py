"""train_unet.py as its user runs it: steps, resume, ranks, stops and mistakes."""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, check_equal_steps, check_resumed, distance, launch, load, make_folder, metrics
from PIL import Image

import train_unet as T
import train_uvit as V

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--backbone", "tiny", "--batch", "8"]
GRID = T.save_grid


def train(out, *flags):
    """Run the script in this process; returns its lines of metrics."""
    T.main(T.parse_args([*TINY, "--out", str(out), *flags]))
    return metrics(out)


def script(*flags):
    """Command line of the script."""
    return [sys.executable, str(ROOT / "train_unet.py"), *TINY, *flags]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "ddpm"],
        ["--model", "edm", "--self-cond", "--cl", "0.01"],
        ["--model", "rf", "--self-cond", "add", "--cl", "0.01", "--cl-head", "moco", "--accum", "2"],
    ],
    ids=["ddpm", "edm-sc-cl", "rf-add-moco"],
)
def test_resume_repeats_an_unbroken_run_bit_for_bit(tmp_path, flags, monkeypatch):
    """Dropout is at work, and nothing but these flags is needed, repeated or left out, to go on."""
    monkeypatch.setitem(T.TINY, "dropout", 0.1)
    flags = [*flags, "--epochs", "2"]
    whole = train(tmp_path / "a", *flags, "--max-steps", "10")
    train(tmp_path / "b", *flags, "--max-steps", "7")
    parts = train(tmp_path / "b", *flags, "--max-steps", "10", "--resume")
    check_resumed(tmp_path / "a", tmp_path / "b", whole, parts)
    assert load(tmp_path / "b")["step"] == 10 and load(tmp_path / "b")["epoch"] == 1


def test_a_killed_run_logs_every_step_once(tmp_path, monkeypatch):
    """kill -9 leaves lines of steps that are run again, and half a line."""
    monkeypatch.setattr(T, "LOG_EVERY", 2)
    file, flags = tmp_path / "b" / "metrics.jsonl", ["--model", "edm", "--epochs", "2"]
    whole = train(tmp_path / "a", *flags, "--max-steps", "11")
    train(tmp_path / "b", *flags, "--max-steps", "5")
    about = file.read_text().splitlines()[0]
    with open(file, "a") as lost:
        lost.write(json.dumps(whole[2] | {"loss": 0.0}) + '\n{"step": 8, "epoch": 1, "lr"')
    parts = train(tmp_path / "b", *flags, "--max-steps", "11", "--resume")
    check_resumed(tmp_path / "a", tmp_path / "b", whole, parts)
    assert file.read_text().splitlines()[0] == about and [line["step"] for line in parts] == [2, 4, 6, 8, 10]


def test_a_run_can_be_made_longer(tmp_path):
    """--out and --epochs are all it takes: flags that are not given are the run's own, those that are override them."""
    flags = ["--model", "edm", "--self-cond", "--cl", "0.02", "--lr", "1e-3", "--seed", "3"]
    first = train(tmp_path, *flags, "--epochs", "1")
    before = vars(T.parse_args(["--out", str(tmp_path), "--resume"]))
    args = T.parse_args(["--out", str(tmp_path), "--epochs", "2", "--resume"])
    assert {k for k, v in vars(args).items() if v != before[k]} == {"epochs"}
    T.main(args)
    lines, last = metrics(tmp_path), load(tmp_path)
    assert lines[:8] == first and [line["step"] for line in lines] == list(range(1, 17)) and last["step"] == 16
    assert [line["lr"] for line in lines[8:]] == [T.learning_rate(args, step, 8, 16) for step in range(8, 16)]
    assert last["args"]["epochs"] == 2 and last["args"]["lr"] == 1e-3 and last["args"]["self_cond"] == "adaptive"
    assert (tmp_path / "epoch_0001.pt").is_file() and (tmp_path / "epoch_0002.pt").is_file()
    saved = (tmp_path / "last.pt").read_bytes()
    T.main(T.parse_args(["--out", str(tmp_path), "--resume"]))  # nothing left to do, nothing lost
    assert (tmp_path / "last.pt").read_bytes() == saved and metrics(tmp_path) == lines


def test_checkpoint_contract(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "save_grid", GRID)
    flags = ["--model", "edm", "--self-cond", "--cl", "0.01"]
    lines = train(tmp_path, *flags, "--epochs", "1", "--save-every", "1")
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["epoch"] == 1
    keys = "step epoch lr loss loss_diffusion loss_unweighted loss_contrast grad_norm img_per_s"
    assert set(lines[0]) == set(keys.split())
    assert all(math.isfinite(v) for line in lines for v in line.values())
    small, last = (torch.load(tmp_path / name, weights_only=True) for name in ("epoch_0001.pt", "last.pt"))
    assert set(small) == {"script", "script_hash", "args", "ema", "epoch", "step"} and small["script"] == "train_unet"
    assert small["script_hash"] == hashlib.sha256((ROOT / "train_unet.py").read_bytes()).hexdigest()[:16]
    assert set(last) == set(small) | {"objective", "average", "optimizer", "scaler"}
    given = json.loads((tmp_path / "args.json").read_text())
    assert given.pop("job") and given == small["args"]
    net, _ = T.build(T.parse_args([*TINY, *flags]))
    net.load_state_dict(small["ema"])  # no prefixes of wrappers, nothing missing
    about = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert about["step"] == 0 and about["args"] == small["args"] and about["ranks"] == 1
    assert small["args"]["classes"] == T.SHAPES and small["args"]["train_images"] == 64
    assert about["torch"] == torch.__version__
    assert not list(tmp_path.glob("*.tmp"))
    assert Image.open(tmp_path / "samples_0001.png").size == (4 * 66 + 2, 4 * 66 + 2)  # tiles of 64 pixels


def test_every_epoch_has_all_images_in_another_order(tmp_path, monkeypatch):
    seen, view = [], T.make_view
    monkeypatch.setattr(T, "make_view", lambda images, *rest: seen.extend(images) or view(images, *rest))
    train(tmp_path, "--model", "edm", "--epochs", "2", "--accum", "2")
    order = [image.numpy().tobytes() for image in seen]
    stored = [image.numpy().tobytes() for image in T.draw_shapes(64, 0, 16)[0]]
    assert sorted(order[:64]) == sorted(order[64:]) == sorted(stored)
    assert order[:64] != order[64:] and stored not in (order[:64], order[64:])


def test_accumulation_keeps_the_total_batch(tmp_path):
    one = train(tmp_path / "1", "--max-steps", "3")
    four = train(tmp_path / "4", "--max-steps", "3", "--accum", "4")
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_seed_matters(tmp_path):
    a, b = (train(tmp_path / s, "--max-steps", "1", "--seed", s)[0]["loss"] for s in ("1", "2"))
    assert a != b


@pytest.mark.parametrize("flags", [["--model", "edm", "--self-cond", "--cl", "0.01"], ["--model", "ddpm"]])
def test_two_ranks_equal_one(tmp_path, flags):
    """torchrun with two gloo ranks: every step's loss, gradient norm and the weights, contrastive part included.

    Of a long run, whose warm-up begins with small steps: Adam's first are signs of gradients, rounding included.
    """
    flags = [*flags, "--epochs", "200", "--max-steps", "4"]
    for n in (1, 2):
        launch(n, "train_unet.py", *TINY, *flags, "--out", str(tmp_path / str(n)))
    check_equal_steps(tmp_path / "1", tmp_path / "2", rel=3e-5)
    assert distance(T, tmp_path / "1", tmp_path / "2") < 5e-3


def test_sigterm_saves_and_resumes(tmp_path):
    """The script also runs when copied alone into an empty folder, which is how this test runs it."""
    out, alone = tmp_path / "run", shutil.copy(ROOT / "train_unet.py", tmp_path)
    command = [alone if part.endswith("train_unet.py") else part for part in script("--epochs", "5", "--out", str(out))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    file = out / "metrics.jsonl"
    while not (file.is_file() and len(file.read_text().splitlines()) > 2):
        assert run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in said
    step = load(out)["step"]
    assert 20 <= step < 6250
    command += ["--resume", "--max-steps", str(step + 10)]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    assert load(out)["step"] == step + 10
    assert [line["step"] for line in metrics(out)] == list(range(10, step + 11, 10))


def test_resume_says_what_it_does(tmp_path, capsys):
    """Where it goes on, which learning rate follows, and a line in the log with flags, ranks and torch."""
    train(tmp_path, "--epochs", "1", "--max-steps", "3")
    capsys.readouterr()
    T.main(T.parse_args(["--out", str(tmp_path), "--resume", "--max-steps", "8", "--epochs", "3", "--lr", "0.01"]))
    said = capsys.readouterr().out
    args = argparse.Namespace(**load(tmp_path)["args"])
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert rates[3:] == [T.learning_rate(args, step, 8, 24) for step in range(3, 8)] and max(rates[3:]) > 0.005
    assert f"going on from step 3 to 8, learning rate {rates[3]:.2g} now, {rates[7]:.2g} at the end" in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    starts = [line for line in lines if "args" in line]
    assert [line["step"] for line in starts] == [0, 3] and [line["args"]["epochs"] for line in starts] == [1, 3]
    assert starts[1]["ranks"] == 1 and starts[1]["torch"] == torch.__version__ and lines.index(starts[1]) == 4


@pytest.fixture
def handlers():
    """The handlers of signals as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                                                              signal.SIGUSR1, signal.SIGUSR2)}  # fmt: skip
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_once_and_twice(handlers, capsys):
    """The first is noted and says what follows, on rank 0; the second stops at once; so does the first in a grid."""
    for rank in (1, 0):
        received = T.catch_stop_signals(rank)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
        said = capsys.readouterr().err
        assert said.strip() == ("finishing this step, then saving; once more to stop at once" if rank == 0 else "")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_a_grid_is_sampled(handlers, tmp_path):
    args = T.parse_args([*TINY, "--out", str(tmp_path)])
    net, diffusion = T.build(args)
    received = T.catch_stop_signals(0)
    diffusion.sample = lambda net, noise, y: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        GRID(args, net, diffusion, torch.device("cpu"), "last")
    T.catch_stop_signals(0)
    diffusion.sample = lambda net, noise, y: noise
    GRID(args, net, diffusion, torch.device("cpu"), "last")
    assert not received and [file.name for file in tmp_path.iterdir()] == ["samples_last.png"]
    signal.raise_signal(signal.SIGINT)  # noted again, as before the grid


def test_the_unweighted_loss_is_logged(tmp_path):
    """EDM's learned weights leave it: from a run's own weights it follows as (loss - u) exp(u) averages to."""
    lines = train(tmp_path / "a", "--model", "edm", "--aug", "0.1", "--max-steps", "3")
    assert lines[0]["loss_unweighted"] == lines[0]["loss_diffusion"]  # u starts at 0
    assert lines[2]["loss_unweighted"] != lines[2]["loss_diffusion"]
    u, x0, sigma = 0.7, torch.randn(4, 3, 16, 16), torch.rand(4) + 0.1
    edm = T.EDM(uncertainty=True)
    torch.nn.init.zeros_(edm.uncertainty.linear.weight)
    edm.uncertainty.forward = lambda t: torch.full_like(t, u)
    silent = lambda x, t, y, aug, with_feat: (torch.zeros_like(x), None, None)  # noqa: E731
    weighted, unweighted, _ = edm.loss(silent, x0, sigma, torch.randn_like(x0))
    assert weighted.item() == pytest.approx(unweighted.item() / math.exp(u) + u, rel=1e-5)
    for diffusion, level in ((T.DDPM(1e-3), torch.tensor([3, 40, 500, 900])), (T.RF(), sigma), (T.EDM(), sigma)):
        loss, unweighted, _ = diffusion.loss(silent, x0, level, torch.randn_like(x0))
        assert loss.item() == unweighted.item()


def test_flags_in_a_file_that_are_not_its_networks(tmp_path, capsys):
    train(tmp_path, "--max-steps", "1")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["args"]["self_cond"] = "add"
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(SystemExit) as stop:
        T.main(T.parse_args(["--out", str(tmp_path), "--resume"]))
    assert stop.value.code == 2 and "of another network" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    """Files may grow to 1 MB: the checkpoint does not fit; the next run goes on from the last one, and tidies up."""
    import resource

    flags = ["--out", str(tmp_path), "--max-steps"]
    subprocess.run(script(*flags, "1"), capture_output=True, timeout=120, check=True)
    before = (tmp_path / "last.pt").read_bytes()
    done = subprocess.run(
        script(*flags, "2", "--resume"), capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )  # fmt: skip
    errors = [line for line in re.split("[\r\n]", done.stderr) if re.match("error: .*disk full", line)]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "last.pt").read_bytes() == before and not [*tmp_path.glob("*.tmp")]


@pytest.mark.parametrize("interval", [1, 100])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, interval):
    """Where a line is due, or at the latest where the run would be saved."""
    train(tmp_path, "--max-steps", "2")
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(T, "LOG_EVERY", interval)
    monkeypatch.setattr(T, "learning_rate", lambda *_: math.nan)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--max-steps", "6", "--resume")
    assert stop.value.code == 1 and "diverged" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before


def test_learning_rate():
    args = argparse.Namespace(lr=1, warmup=10, cooldown=0.25)
    rates = [T.learning_rate(args, step, 1, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == rates[75] == 1
    assert rates[76] < 1 and rates[99] == pytest.approx(1 / 25) and min(rates) > 0


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["--model", "ddpm", "--backbone", "ddpm", "--dataset", "cifar10"],
         {"layer": "out_6", "cl_t": 11, "batch": 512, "dropout": 0.1, "ema": 0.9999, "warmup": 13, "lr": 4e-4}),
        (["--model", "edm", "--backbone", "ddpmpp", "--dataset", "cifar10"],
         {"layer": "out_9", "cl_t": 0.06, "batch": 256, "dropout": 0.13, "ema": 0.9993, "warmup": 200}),
        (["--model", "rf", "--backbone", "ddpmpp", "--dataset", "cifar100"], {"layer": "out_8", "cl_t": 0.06}),
        (["--model", "edm", "--dataset", "tiny-imagenet"], {"layer": "out_5", "cl_t": 0.2964, "resolution": 64}),
        (["--model", "edm", "--epochs", "1200"], {"warmup": 200}),
        (["--epochs", "8"], {"warmup": 2, "cooldown": 0}),  # ours, for short runs
        (["--model", "rf", "--backbone", "tiny"],
         {"warmup": 0.5, "cooldown": 0.3, "dropout": 0, "lr": 2e-3, "layer": "out_2", "cl_t": 0.06}),
        (["--cl", "0.01"], {"aug": 0.12}),
        (["--cl", "0.01", "--aug", "0"], {"aug": 0}),
        ([], {"aug": 0, "epochs": 2000, "cooldown": 0, "save_every": 200}),
    ],
)  # fmt: skip
def test_defaults_are_the_papers(flags, want):
    args = vars(T.parse_args(flags))
    assert {k: args[k] for k in want} == want


def test_resume_takes_moments_in_a_gpus_layout(tmp_path):
    """Channels-last there, contiguous here: the same numbers, which fused kernels would read in the order of memory."""
    train(tmp_path / "a", "--max-steps", "3")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    state = torch.load(tmp_path / "b/last.pt", weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments |= {k: m.contiguous(memory_format=torch.channels_last) for k, m in moments.items() if m.ndim == 4}
    torch.save(state, tmp_path / "b/last.pt")
    a, b = (train(tmp_path / name, "--max-steps", "6", "--resume") for name in "ab")
    assert [line["loss"] for line in a] == [line["loss"] for line in b]


@pytest.mark.parametrize("kind", ["MODEL", "EMA"])
def test_init_takes_public_names_and_wrapped_ones(tmp_path, kind):
    """As [DDAE] saves them: behind DDP's prefix; and as ema_pytorch keeps them, the average beside the trained ones."""
    torch.manual_seed(0)
    source, _ = T.build(T.parse_args(TINY))
    weights = {f"module.net.{k}": v for k, v in source.state_dict().items()}
    if kind == "EMA":
        trained = {f"online_model.{k}": v + 1 for k, v in source.state_dict().items()}
        average = {f"ema_model.{k}": v for k, v in source.state_dict().items()}
        weights = {"initted": torch.tensor(True), "step": torch.tensor(3)} | trained | average
    torch.save({kind: weights, "MODEL": weights}, tmp_path / "w.pt")
    target, _ = T.build(T.parse_args([*TINY, "--self-cond", "--aug", "0.1"]))
    T.load_weights(target, tmp_path / "w.pt")
    for k, v in source.state_dict().items():
        assert target.state_dict()[k].equal(v), k


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def mistake(kind, tmp_path, monkeypatch):
    """Flags that contain one user's mistake."""
    out = ["--out", str(tmp_path / "run")]
    if kind == "dataset":
        return [*out, "--dataset", "nowhere", "--data", str(tmp_path)]
    if kind == "batch":
        return [*out, "--accum", "3"]
    if kind == "batch-size":
        return [*out, "--batch", "128"]
    if kind == "layer":
        return [*out, "--layer", "out_77"]
    if kind == "level":
        return [*out, "--cl-t", "2000"]
    if kind == "level-between":
        return [*out, "--cl-t", "0.5"]
    if kind == "compiler":
        monkeypatch.setattr(T.shutil, "which", lambda name: None)
        return [*out, "--compile"]
    if kind == "batch-1":
        return [*out, "--cl", "0.01", "--accum", "8"]
    if kind == "init-missing":
        return [*out, "--init", str(tmp_path / "none.pt")]
    if kind == "init-pickle":
        (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
        return [*out, "--init", str(tmp_path / "bomb.pt")]
    if kind == "init-other":
        torch.save({"model": {"final.weight": torch.zeros(3)}}, tmp_path / "other.pt")
        return [*out, "--init", str(tmp_path / "other.pt")]
    if kind == "init-more":
        state = T.build(T.parse_args(TINY))[0].state_dict()
        torch.save(state | {"label_emb.weight": torch.zeros(10, 128)}, tmp_path / "more.pt")
        return [*out, "--init", str(tmp_path / "more.pt")]
    if kind == "resume-nothing":
        return [*out, "--resume"]
    if kind == "resume-classes":
        make_folder(tmp_path, n=4)
        flags = [*out, "--dataset", "mine", "--data", str(tmp_path)]
        T.main(T.parse_args([*TINY, *flags, "--max-steps", "1"]))
        os.rename(tmp_path / "mine/train/cat", tmp_path / "mine/train/zebra")  # the labels swap
        return [*flags, "--resume"]
    if kind == "resume-script":
        V.main(V.parse_args(["--size", "tiny", "--max-steps", "0", *out]))
        return [*out, "--resume"]
    train(tmp_path / "run", "--max-steps", "1")
    if kind == "resume-images":
        draw = T.draw_shapes
        monkeypatch.setattr(T, "draw_shapes", lambda *given: [torch.cat([part, part[:1]]) for part in draw(*given)])
        return [*out, "--resume"]
    if kind == "resume-past":
        return [*out, "--resume", "--max-steps", "0"]
    if kind == "resume-with":
        return [*out, "--self-cond", "--resume"]
    if kind == "out-same":
        return out
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    return [*out, "--resume"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dataset", "no folder"), ("batch", "not divisible"), ("batch-size", "more than the 64"),
        ("layer", "out_1, out_2"), ("level", "from 0 to 1000"), ("init-missing", "does not exist"),
        ("init-pickle", "cannot be read"), ("init-other", "does not fit"), ("init-more", "label_emb.weight"),
        ("resume-nothing", "does not exist"), ("resume-images", "it had 64 images, now 65"),
        ("resume-with", "of another network"), ("out-same", "--resume"), ("resume-cut", "cannot be read"),
        ("resume-classes", "class names differ"), ("resume-script", "written by train_uvit.py"),
        ("resume-past", "past the end 0"), ("level-between", "whole steps"), ("batch-1", "two or more"),
        ("compiler", "--no-compile"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(kind, says, tmp_path, capsys, monkeypatch):
    flags = mistake(kind, tmp_path, monkeypatch)
    before = {file: file.read_bytes() for file in tmp_path.glob("run/[!.]*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        T.main(T.parse_args([*TINY, *flags]))
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(err) == 1 and says in err[0]
    assert not (tmp_path / "boom").exists()  # nothing was unpickled
    assert before == {file: file.read_bytes() for file in tmp_path.glob("run/[!.]*")}  # nothing was lost
    assert before or kind == "resume-nothing" or not (tmp_path / "run").exists()  # and nothing begun


@pytest.mark.parametrize(
    "flag",
    [("--lr", "nan"), ("--lr", "0"), ("--aug", "1.5"), ("--ema", "-1"), ("--epochs", "0"), ("--seed", "-1"),
     ("--resolution", "0"), ("--cl", "-1"), ("--device", "cuda:1"), ("--max-steps", "-1")],
)  # fmt: skip
def test_wrong_numbers_end_with_one_line_and_status_2(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        T.parse_args(["--model", "ddpm", *flag])
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(err) == 1 and flag[0] in err[0]
