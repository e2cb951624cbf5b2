"""train_unet.py as its user runs it: steps, resume, ranks, stops and mistakes."""

import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, check_equal_steps, launch, load, metrics

import train_unet as T

pytestmark = pytest.mark.usefixtures("fewer_shapes")
TINY = ["--dataset", "shapes", "--backbone", "tiny", "--batch", "8", "--log-every", "1", "--sample-every", "0"]


def train(out, *flags):
    """Run the script in this process; returns its metrics lines without the header."""
    T.main(T.parse_args([*TINY, "--out", str(out), *flags]))
    return metrics(out)


def script(*flags, nproc=1):
    """Command line of the script, under torchrun with several ranks."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *ranks, str(ROOT / "train_unet.py"), *TINY, *flags]


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "ddpm", "--dropout", "0.1"],
        ["--model", "edm", "--self-cond", "--cl", "0.01"],
        ["--model", "rf", "--self-cond", "add", "--cl", "0.01", "--cl-head", "moco", "--accum", "2"],
    ],
    ids=["ddpm", "edm-sc-cl", "rf-add-moco"],
)
def test_resume_repeats_an_unbroken_run_bit_for_bit(tmp_path, flags):
    flags = [*flags, "--epochs", "2"]
    whole = train(tmp_path / "a", *flags, "--max-steps", "10")
    train(tmp_path / "b", *flags, "--max-steps", "7")
    parts = train(tmp_path / "b", *flags, "--max-steps", "10", "--resume")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert a["step"] == b["step"] == 10 and a["epoch"] == 1

    def compare(x, y, where):
        assert type(x) is type(y), where
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for k in x:
                compare(x[k], y[k], f"{where}.{k}")
        elif isinstance(x, torch.Tensor):
            assert x.equal(y), where

    for key in a.keys() - {"args"}:
        compare(a[key], b[key], key)
    for line in whole + parts:
        line.pop("img_per_s")
    assert whole == parts


def test_checkpoint_contract(tmp_path):
    lines = train(tmp_path, "--epochs", "1", "--save-every", "1", "--self-cond", "--cl", "0.01")
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["epoch"] == 1
    keys = "step epoch lr loss loss_diffusion loss_contrast grad_norm img_per_s cl_acc cl_pos cl_std"
    assert set(lines[0]) == set(keys.split())
    assert all(math.isfinite(v) for line in lines for v in line.values())
    small, last = load(tmp_path, "epoch_0001.pt"), load(tmp_path)
    assert set(small) == {"script", "args", "ema", "epoch", "step"} and small["script"] == "train_unet"
    assert set(last) == set(small) | {"model", "diffusion", "head", "ema_projector", "optimizer", "scaler"}
    assert small["args"] == json.loads((tmp_path / "args.json").read_text())
    net, _ = T.build(T.parse_args([*TINY, "--self-cond", "--cl", "0.01"]))
    net.load_state_dict(small["ema"])  # no prefixes of wrappers, nothing missing
    header = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert header["classes"] == list(T.SHAPES) and header["torch"] == torch.__version__
    assert not list(tmp_path.glob("*.tmp"))


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
    """torchrun with two gloo ranks: every step's loss, gradient norm and the weights, contrastive part included."""
    flags = [*flags, "--max-steps", "4"]
    for n in (1, 2):
        launch(n, "train_unet.py", *TINY, *flags, "--out", str(tmp_path / str(n)))
    check_equal_steps(tmp_path / "1", tmp_path / "2", rel=2e-4)
    a, b = load(tmp_path / "1")["ema"], load(tmp_path / "2")["ema"]
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_a_failing_rank_takes_all_down(tmp_path):
    """A user's mistake on every rank ends torchrun at once, with the reason on stderr."""
    start = time.time()
    command = script("--batch", "7", "--out", str(tmp_path / "x"), nproc=2)
    done = subprocess.run(command, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert done.returncode != 0 and "error: --batch 7 is not divisible" in done.stderr and time.time() - start < 100


def test_sigterm_saves_and_resumes(tmp_path):
    """The script also runs when copied alone into an empty folder, which is how this test runs it."""
    out, alone = tmp_path / "run", shutil.copy(ROOT / "train_unet.py", tmp_path)
    command = [alone if part.endswith("train_unet.py") else part for part in script("--epochs", "5", "--out", str(out))]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = out / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 2):
        assert run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in said
    step = load(out)["step"]
    assert 2 <= step < 6250
    command += ["--resume", "--max-steps", str(step + 1)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert load(out)["step"] == step + 1
    assert [json.loads(x)["step"] for x in metrics.read_text().splitlines()[1:]] == list(range(1, step + 2))


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    train(tmp_path, "--max-steps", "2")
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(T, "learning_rate", lambda *_: math.nan)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--max-steps", "6", "--resume")
    assert stop.value.code == 1 and "diverged" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before


def test_sample_grid_is_drawn(tmp_path):
    args = T.parse_args([*TINY, "--model", "edm", "--out", str(tmp_path)])
    net, diffusion = T.build(args)
    T.save_grid(args, net.eval(), diffusion, torch.device("cpu"), 3)
    from PIL import Image

    assert Image.open(tmp_path / "samples_0003.png").size == (4 * 18 + 2, 4 * 18 + 2)


def test_bench_prints_json_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    T.main(T.parse_args([*TINY, "--bench", "2", "--self-cond", "--cl", "0.01"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["img_per_s"] > 0 and result["gflop_per_img"] > 0 and result["batch"] == 8
    assert not list(tmp_path.iterdir())


def test_flops_are_counted():
    """A training step costs about three forward passes; the forward pass of the DDPM UNet is known: 6 GMAC at 32 px."""
    net = T.UNet(32, **T.BACKBONES["ddpm"])
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1)
    forward = T.count_flops(lambda: net(x, t), 1)
    assert forward == pytest.approx(12.2e9, rel=0.05)


def test_learning_rate():
    args = T.parse_args(["--epochs", "100", "--warmup", "10", "--cooldown", "0.25", "--lr", "1"])
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
        (["--cl", "0.01"], {"aug": 0.12}),
        (["--cl", "0.01", "--aug", "0"], {"aug": 0}),
        ([], {"aug": 0, "epochs": 2000, "cooldown": 0, "save_every": 200}),
    ],
)  # fmt: skip
def test_defaults_are_the_papers(flags, want):
    args = vars(T.parse_args(flags))
    assert {k: args[k] for k in want} == want


def test_init_takes_public_names_and_wrapped_ones(tmp_path):
    torch.manual_seed(0)
    source, _ = T.build(T.parse_args(TINY))
    torch.save({"MODEL": {f"module.net.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pt")
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


def mistake(kind, tmp_path):
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
    if kind == "init-missing":
        return [*out, "--init", str(tmp_path / "none.pt")]
    if kind == "init-pickle":
        (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
        return [*out, "--init", str(tmp_path / "bomb.pt")]
    if kind == "init-other":
        torch.save({"model": {"final.weight": torch.zeros(3)}}, tmp_path / "other.pt")
        return [*out, "--init", str(tmp_path / "other.pt")]
    if kind == "resume-nothing":
        return [*out, "--resume"]
    train(tmp_path / "run", "--max-steps", "1")
    if kind == "out-other":
        return [*out, "--lr", "0.5"]
    if kind == "out-same":
        return out
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    return [*out, "--resume"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("dataset", "no folder"), ("batch", "not divisible"), ("batch-size", "more than the 64"),
        ("layer", "out_1, out_2"), ("level", "out of range"), ("init-missing", "does not exist"),
        ("init-pickle", "cannot be read"), ("init-other", "does not fit"), ("resume-nothing", "no "),
        ("out-other", "--lr"), ("out-same", "--resume"), ("resume-cut", "cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(kind, says, tmp_path, capsys):
    flags = mistake(kind, tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        T.main(T.parse_args([*TINY, *flags]))
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(err) == 1 and says in err[0]
    assert not (tmp_path / "boom").exists()  # nothing was unpickled
