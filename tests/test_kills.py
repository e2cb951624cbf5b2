"""Killed at any moment, or told to stop, and typed again, a run ends as if nothing had been.

Its weights, epoch files and metrics.jsonl are compared with an unbroken run's, bit for bit. Jobs of one rank and of two
are forked, as torchrun would start them, from one process that has imported all.
"""

import functools
import io
import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from multiprocessing import connection, forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check_resumed, check_same, load, make_folder, metrics, shrink

import train_dit
import train_unet
import train_uvit

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks, and GLOO_SOCKET_IFNAME=lo")
pytestmark = [pytest.mark.slow, ONLY_LINUX]
SCRIPTS = {"unet": train_unet, "uvit": train_uvit, "dit": train_dit}
FLAGS = {"unet": ["--backbone", "tiny", "--model", "edm", "--self-cond"], "uvit": ["--size", "tiny", "--cls-token"],
         "dit": ["--size", "tiny", "--self-cond", "--cond", "--cl", "0.01"]}  # fmt: skip
RUN = ["--dataset", "shapes", "--batch", "8", "--epochs", "3", "--save-every", "1", "--device", "cpu", "--out", "run"]
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")

# What happens to a rank right before the n-th call of a function: a signal, a pause, or (half) SIGKILL when half is
# written; and whether there is a last.pt by then. A run has 24 steps and saves at every second. The fourth torch.save
# is that of epoch_0001.pt.
Moment = namedtuple("Moment", "call n act rank saved", defaults=("SIGKILL", 0, True))
STEP, SAVE, RENAME, TEXT = "utils.clip_grad_norm_", "torch.save", "os.replace", "path.write_text"

# ---- jobs: in the child
def prepare(name, saves):
    """The script and its tiny network, shrunk: every second step has a line and, if asked for, a last.pt."""
    script = SCRIPTS[name]
    vars(script).update(shrink(script) | {"LOG_EVERY": 2})
    script.TINY["cl_hidden"] = 32
    train_unet.BACKBONES["tiny"]["mult"] = (1, 1, 1)
    train_uvit.SIZES["tiny"], train_dit.SIZES["tiny"] = (32, 5, 2), (32, 6, 2)
    if saves:  # as each look at the clock finds it 1000 seconds later
        script.time = SimpleNamespace(time=itertools.count(0, 1000).__next__)
    return script

def arm(script, moment):
    """Let the moment come."""
    owner, name = moment.call.split(".")
    owner = {"script": script, "utils": torch.nn.utils, "torch": torch, "os": os, "path": Path}[owner]
    call, calls = getattr(owner, name), itertools.count(1)

    def armed(*args, **kw):
        if next(calls) == moment.n:
            if moment.act == "wait":  # until the test goes on
                Path("waits").touch()
                while not Path("go").exists():
                    time.sleep(0.01)
            if moment.act == "half" and moment.call == SAVE:
                call(args[0], whole := io.BytesIO())
                args[1].write(whole.getvalue()[: whole.tell() // 2])
                args[1].flush()
            if moment.act == "half" and moment.call == TEXT:
                call(args[0], args[1][: len(args[1]) // 2])
            if moment.act != "wait":
                os.kill(os.getpid(), getattr(signal, moment.act, signal.SIGKILL))
        return call(*args, **kw)

    setattr(owner, name, armed)

def run_rank(rank, name, ranks, port, here, argv, moment):
    """One rank of a job in the folder `here`, in this process."""
    os.chdir(here)
    said = os.open(f"said{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()} if ranks > 1 else {})
    for signum in SIGNALS:
        signal.signal(getattr(signal, signum), signal.SIG_DFL)
    script = prepare(name, saves=moment is None or moment.act not in SIGNALS)
    if moment and moment.rank == rank:
        arm(script, moment)
    script.main(script.parse_args(argv))

# ---- jobs: in the test
@pytest.fixture(scope="module")
def forks():
    """Makes processes that need not import torch."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        context.set_forkserver_preload(["test_kills"])
        forkserver.ensure_running()
    return context

def start(forks, here, name, ranks=1, moment=None, extra=None):
    """Type the command, by default with --resume if there is something to resume: the processes."""
    resume = ["--resume"] if (here / "run/last.pt").is_file() else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*FLAGS[name], *RUN, *(resume if extra is None else extra)]
    job = [forks.Process(target=run_rank, args=(rank, name, ranks, port, here, argv, moment)) for rank in range(ranks)]
    for process in job:
        process.start()
    return job

def wait(job):
    """Exit statuses of the ranks; those that outlive a killed one by a second are killed, as by torchrun."""
    running, seconds = job, 300
    while running:
        if not connection.wait([process.sentinel for process in running], seconds):
            for process in running:
                process.kill()
        running = [process for process in running if process.exitcode is None]
        seconds = 1 if any((process.exitcode or 0) < 0 for process in job) else 300
    return [process.exitcode for process in job]

def said(here):
    return "\n".join(path.read_text() for path in sorted(here.glob("said*")))

@pytest.fixture(scope="module")
def unbroken(forks, tmp_path_factory):
    """The folder of an unbroken run, which is made once."""

    @functools.cache
    def make(name, ranks):
        here = tmp_path_factory.mktemp(name)
        assert wait(start(forks, here, name, ranks)) == [0] * ranks, said(here)
        return here

    return make

def check_equal(whole, parts):
    """Two finished runs: the same files, and the same in them."""
    a, b = whole / "run", parts / "run"
    epochs = [f"epoch_000{i}.pt" for i in (1, 2, 3)]
    for run in (a, b):
        assert sorted(path.name for path in run.iterdir()) == ["args.json", *epochs, "last.pt", "metrics.jsonl"]
        assert [line["step"] for line in metrics(run)] == list(range(2, 25, 2))
    for name in epochs:
        one, two = load(a, name), load(b, name)
        assert one["step"] == two["step"]
        check_same(one["ema"], two["ema"], name)
    check_resumed(a, b, metrics(a), metrics(b))

def finish(forks, unbroken, here, name, ranks=1):
    """Type the command once more: it ends, as an unbroken run."""
    assert wait(start(forks, here, name, ranks)) == [0] * ranks, said(here)
    check_equal(unbroken(name, ranks), here)

# ---- kills
KILLS = {  # a run is killed several times, the ranks of two are also killed one by one
    "unet": (1, [
        Moment(TEXT, 2, saved=False),  # args.json without metrics.jsonl
        Moment(SAVE, 1, "half", saved=False),  # half of the first last.pt
        Moment("script.get_ema_multi_avg_fn", 17),  # weights are updated, their average is not
    ]),
    "uvit": (1, [
        Moment(SAVE, 5),  # epoch_0001.pt is new, last.pt is not
        Moment(RENAME, 6),  # last.pt is written and not renamed
        Moment(STEP, 2),
        Moment(TEXT, 2, "half"),  # half of metrics.jsonl
        Moment("script.save_grid", 2),  # all is saved, but the run has not ended
    ]),
    "dit": (2, [
        Moment(STEP, 1, saved=False),
        Moment(SAVE, 3, "half"),  # half of last.pt
        Moment(SAVE, 7, "half"),  # half of epoch_0002.pt
        Moment(STEP, 3, rank=1),
    ]),
}  # fmt: skip

@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_as_an_unbroken_one(name, forks, unbroken, tmp_path):
    ranks, moments = KILLS[name]
    for moment in moments:
        status = wait(start(forks, tmp_path, name, ranks, moment))[moment.rank]
        assert status == -signal.SIGKILL, (moment, said(tmp_path))
        assert (tmp_path / "run/last.pt").exists() == moment.saved, moment
        assert [*tmp_path.glob("run/*.tmp")] or moment.call not in (SAVE, RENAME)  # the next start clears them
    finish(forks, unbroken, tmp_path, name, ranks)

# ---- signals
@pytest.mark.parametrize(("name", "ranks", "ways"), [("uvit", 1, SIGNALS), ("dit", 2, SIGNALS[:1])])
def test_a_stopped_run_saves_its_step_and_goes_on(name, ranks, ways, forks, unbroken, tmp_path):
    """A single process ends with the step; ranks agree where the next line is due, which rank ever has the signal."""
    for i, way in enumerate(ways, start=1):
        statuses = wait(start(forks, tmp_path, name, ranks, Moment(STEP, 3, way, rank=ranks - 1)))
        assert statuses == [128 + getattr(signal, way)] * ranks, (way, said(tmp_path))
        assert load(tmp_path / "run")["step"] == (3 * i if ranks == 1 else 4), way
        assert said(tmp_path).count("add --resume") == i
    finish(forks, unbroken, tmp_path, name, ranks)

# ---- two jobs in one folder
@pytest.mark.parametrize(("step", "extra", "ends"), [(1, [], [2, 0]), (5, ["--resume"], [2, 0]), (5, [], [0, 2])])
def test_of_two_jobs_in_one_folder_one_trains_to_the_end(step, extra, ends, forks, unbroken, tmp_path):
    """The one that was started last, if it could start: a folder that holds a run takes --resume."""
    first = start(forks, tmp_path, "uvit", 1, Moment(STEP, step, "wait"))
    while first[0].is_alive() and not (tmp_path / "waits").exists():
        time.sleep(0.01)
    named = (tmp_path / "run/args.json").read_text()
    second = start(forks, tmp_path, "uvit", extra=extra)
    while second[0].is_alive() and (tmp_path / "run/args.json").read_text() in ("", named):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert wait(first) + wait(second) == ends, said(tmp_path)
    errors = re.findall("^error: (.*)", said(tmp_path), re.MULTILINE)
    says = "another job has been started in run" if ends[0] else "run already holds a run: add --resume"
    assert len(errors) == 1 and says in errors[0] and "Traceback" not in said(tmp_path)
    check_equal(unbroken("uvit", 1), tmp_path)

# ---- torchrun
def test_torchrun_passes_sigterm_on_and_the_run_resumes(tmp_path):
    make_folder(tmp_path, n=8)
    out, log = tmp_path / "run", open(tmp_path / "said", "w")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_uvit.py"]
    command += ["--size", "tiny", "--dataset", "mine", "--data", str(tmp_path), "--resolution", "8", "--batch", "8"]
    command += ["--epochs", "9999", "--device", "cpu", "--out", str(out)]
    file, kw = out / "metrics.jsonl", {"cwd": ROOT, "stdout": log, "stderr": log}
    with log, subprocess.Popen(command, **kw) as job:
        try:
            while not (file.is_file() and file.read_text().count("\n") > 2):
                assert job.poll() is None, said(tmp_path)
                time.sleep(0.05)
        finally:
            job.terminate()
        assert job.wait(120), said(tmp_path)
        step = load(out)["step"]
        assert step >= 20 and step % 10 == 0 and "add --resume" in said(tmp_path)
        subprocess.run([*command, "--resume", "--max-steps", str(step + 10)], **kw, check=True, timeout=120)
    assert [line["step"] for line in metrics(out)] == list(range(10, step + 11, 10)) and load(out)["step"] == step + 10
