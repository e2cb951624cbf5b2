"""Killed at any moment and resumed, a run ends as if nothing had been: weights, epoch files and metrics.jsonl.

20 kills, DDAE_KILLS=200 for more: of jobs of one rank and of two, which are forked from one process that has imported
all, as torchrun would start them. What torchrun itself does is tested with torchrun.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check_same, load, shrink
from PIL import Image

FLAGS = {"train_unet": ["--backbone", "tiny", "--model", "edm", "--self-cond", "--cl", "0.01"],
         "train_uvit": ["--size", "tiny", "--cls-token"],
         "train_dit": ["--size", "tiny", "--self-cond", "--cond"]}  # fmt: skip
RUN = ["--dataset", "shapes", "--batch", "8", "--epochs", "3", "--save-every", "1", "--out", "run"]  # 24 steps
JOBS = [(name, ranks) for name in FLAGS for ranks in (1, 2)]
MOMENTS = ("save", "step", "file", "step", "save", "time")
WAYS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
ENDS_IN = 30  # seconds for a rank to notice that the others are gone


def small(name):
    """The script, shrunk, and its tiny network once more."""
    module = __import__(name)
    vars(module).update(shrink(module))
    module.TINY["cl_hidden"] = 32
    if name == "train_unet":
        module.BACKBONES["tiny"]["mult"] = (1, 1, 1)
    else:
        module.SIZES["tiny"] = (32, 6, 2) if name == "train_dit" else (32, 5, 2)
    return module


def prepare(name):
    """The script, shrunk: every second step has a line, and a minute passes in 0.1 s, so that it saves by time."""
    module = small(name)
    module.LOG_EVERY = 2
    clock = {k: getattr(time, k) for k in dir(time) if not k.startswith("__")}
    module.time = SimpleNamespace(**clock | {k: lambda f=clock[k]: 600 * f() for k in ("time", "monotonic")})
    return module


class Job:
    """A script's ranks, each in a process of its own. doom(event, path) is told of the first one's file operations."""

    def __init__(self, module, ranks, here, argv, doom=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.pids, self.status, self.here = [], {}, here
        here.mkdir(exist_ok=True)
        for rank in range(ranks):
            child = os.fork()
            if not child:
                where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ.update(where | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {})
                self.child(module, argv, doom if rank == 0 else None, here, here / f"said{rank}")
            self.pids.append(child)

    def child(self, module, argv, doom, here, said):
        status = 99
        try:
            os.chdir(here)
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if doom:
                files = ("open", "os.rename")
                sys.addaudithook(lambda event, about: doom(event, str(about[0])) if event in files else None)
            module.main(module.parse_args(argv))
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            status = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        """True while a rank runs."""
        for pid in set(self.pids) - self.status.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.status[pid] = os.waitstatus_to_exitcode(status)
        return len(self.status) < len(self.pids)

    def running(self):
        return self.poll() and not self.status

    def kill(self, way, only=None):
        for pid in self.pids if only is None else [self.pids[only]]:
            if pid not in self.status:
                os.kill(pid, way)

    def wait(self, seconds):
        """Statuses in order of ranks, once all have ended; a rank that does not end is an error.

        One whose store died with rank 0 before it had joined would look for it for hours: torchrun, which has the store
        and ends the others of a rank that died, is played at the end.
        """
        for end in (time.time() + seconds, time.time() + seconds + 10):
            while self.poll() and time.time() < end:
                time.sleep(0.002)
            if self.status:
                self.kill(signal.SIGTERM)
        left = [pid for pid in self.pids if pid not in self.status]
        self.kill(signal.SIGKILL)
        assert not left, f"{len(left)} of {len(self.pids)} ranks did not end in {seconds} s: {self.said()}"
        return [self.status[pid] for pid in self.pids]

    def said(self):
        return [path.read_text(errors="replace")[-1500:] for path in sorted(self.here.glob("said*"))]


def doomed(rng, moment):
    """A hook that ends its process at some file operation of the run, or a few milliseconds later, as SIGKILL would."""
    count, delay = rng.randrange(1, 25 if moment == "file" else 7), rng.choice([0, 0, rng.uniform(1e-4, 0.03)])
    seen = []

    def doom(event, path):
        if path.startswith(("run/", os.getcwd())) and (moment == "file" or path.endswith(".tmp")):
            seen.append(path)
            if len(seen) == count and not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            if len(seen) == count:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, delay)

    return doom


def attempt(rng, module, ranks, here, moment, way):
    """Start or resume the run in here/run and kill it at the moment: the ways in which its ranks ended."""
    argv = [*FLAGS[module.__name__], *RUN, *(["--resume"] if (here / "run/last.pt").is_file() else [])]
    if moment in ("save", "file"):
        return Job(module, ranks, here, argv, doomed(rng, moment)).wait(60)
    job, file = Job(module, ranks, here, argv), here / "run/metrics.jsonl"
    before = file.read_bytes().count(b"\n") if file.is_file() else 0
    lines, end = before + rng.randrange(0, 5), time.time() + rng.uniform(0.05, 1.5) * (1 if moment == "time" else 99)
    while job.running() and time.time() < end:
        if moment == "step" and file.is_file() and file.read_bytes().count(b"\n") > lines:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))
    job.kill(way, only=rng.choice([None, rng.randrange(ranks)]))
    return job.wait(ENDS_IN)


def finish(module, ranks, here):
    """Go on until done, without a kill."""
    argv = [*FLAGS[module.__name__], *RUN, *(["--resume"] if (here / "run/last.pt").is_file() else [])]
    job = Job(module, ranks, here, argv)
    assert set(job.wait(120)) == {0}, job.said()


def check_equal(whole, parts):
    """Two finished runs: the same files, and the same in them."""
    a, b = whole / "run", parts / "run"
    names = sorted(p.name for p in a.iterdir() if not p.name.startswith("."))
    assert names == sorted(p.name for p in b.iterdir() if not p.name.startswith("."))
    assert len([n for n in names if n.startswith("epoch_")]) == 3 and "last.pt" in names
    for name in names:
        if name.endswith(".pt"):
            check_same(*({k: v for k, v in load(run, name).items() if k != "args"} for run in (a, b)), name)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    assert [line.pop("img_per_s") > 0 for part in lines for line in part[1:]]
    steps = [[line["step"] for line in part] for part in lines]
    assert steps == [list(range(0, 25, 2))] * 2, steps
    assert [Path(part[0]["args"].pop("data")).name for part in lines] == ["data"] * 2 and lines[0] == lines[1]


def killed_runs(n, home):
    """n kills over all JOBS, each followed by a resume; what was wrong, as text."""
    wrong = []
    for number, (name, ranks) in enumerate(JOBS):
        module, rng, whole = prepare(name), random.Random(number), home / f"{name}{ranks}"
        finish(module, ranks, whole)
        kills, runs, here = 0, 0, None
        want = (n + number) // len(JOBS)  # n in all
        while kills < want:
            here = here or home / f"{name}{ranks}_{runs}"
            moment, way = MOMENTS[(kills + runs) % len(MOMENTS)], rng.choice(WAYS)
            what = f"{name}, {ranks} ranks, run {runs}, kill {kills}, {moment}, {way.name}"
            try:
                ends = attempt(rng, module, ranks, here, moment, way)
                kills += set(ends) != {0}
                done = set(ends) == {0} or kills == want or rng.random() < 0.2
                said = Job.said(SimpleNamespace(here=here))
                assert not set(ends) & {2, 99, 1 if ranks == 1 else 2}, f"{ends}: {said}"
                if done:
                    finish(module, ranks, here)
                    check_equal(whole, here)
            except AssertionError as error:
                wrong.append(f"{what}: {str(error)[:1500]}")
                done, kills = True, kills + 1
            print(what, file=sys.stderr, flush=True)
            if done:
                shutil.rmtree(here, ignore_errors=True)
                here, runs = None, runs + 1
    return wrong


# ---- what a job meets on its way
def second_job(home):
    """While a job runs another with the same --out is refused, before the first save and after it; nobody is hurt."""
    module, here, whole = prepare("train_uvit"), home / "two", home / "one"
    finish(module, 1, whole)
    module.time = time  # the first save comes with the first epoch
    argv, run = [*FLAGS["train_uvit"], *RUN], here / "run"
    first = Job(module, 1, here, argv)
    try:
        for extra, sign in (([], "metrics.jsonl"), (["--resume"], "last.pt")):
            while first.running() and not (run / sign).is_file():
                time.sleep(0.002)
            os.kill(first.pids[0], signal.SIGSTOP)  # it waits for the other
            second = Job(module, 1, here, [*argv, *extra])
            (status,), (said,) = second.wait(60), second.said()
            assert status == 2 and len(re.findall("^error: .*run", said, re.MULTILINE)) == 1, (extra, status, said)
            os.kill(first.pids[0], signal.SIGCONT)
    finally:
        first.kill(signal.SIGCONT)
    assert first.wait(60) == [0]
    check_equal(whole, here)


def lock_dies(home):
    """A job that was killed leaves no lock behind."""
    module, here = prepare("train_uvit"), home / "lock"
    job, file = Job(module, 2, here, [*FLAGS["train_uvit"], *RUN]), here / "run/metrics.jsonl"
    while job.running() and not file.is_file():
        time.sleep(0.002)
    job.kill(signal.SIGKILL)
    job.wait(10)
    finish(module, 2, here)


def stale_files(home):
    """What a killed job left half written, in its run and in the cache of images, is gone once the next one is done."""
    module, here = prepare("train_uvit"), home / "stale"
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        path = here / "pics/train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(path)
    argv = [*FLAGS["train_uvit"], "--dataset", "pics", "--data", ".", "--resolution", "16", "--batch", "4"]
    argv += ["--out", "run"]
    ended = Job(module, 1, here, argv, lambda event, path: event == "os.rename" and os._exit(9))
    assert ended.wait(60) == [9]
    left = [*here.rglob("*.tmp")]
    assert left  # of the cache
    (here / "run").mkdir(exist_ok=True)
    for path in [*left, here / "run/last.pt.tmp", here / "run/epoch_0001.pt.tmp"]:
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 2 * 86400,) * 2)  # and nobody has written to it for days
    job = Job(module, 1, here, [*argv, "--epochs", "1", "--save-every", "9", "--max-steps", "1"])
    assert job.wait(60) == [0], job.said()
    assert not [*here.rglob("*.tmp")]


def campaign(what, n):
    """Run a function above in this process, which forks; what was wrong goes to stdout."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as tmp:
        if what == "kills":
            print(json.dumps(killed_runs(n, Path(tmp))))
        else:
            globals()[what](Path(tmp))


def python(*argv):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, __file__, *argv]
    return subprocess.run(command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True)


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and GLOO_SOCKET_IFNAME=lo")


@linux
def test_killed_runs_end_as_unbroken_ones():
    n = int(os.environ.get("DDAE_KILLS", 20))
    done = python("kills", str(n))
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, f"{len(wrong)} of {n} kills:\n" + "\n".join(wrong)


@linux
@pytest.mark.parametrize("what", ["second_job", "lock_dies", "stale_files"])
def test_two_jobs_and_leftovers(what):
    done = python(what, "0")
    assert done.returncode == 0, done.stderr[-3000:]


# ---- torchrun
@contextlib.contextmanager
def torchrun(tmp_path, *flags, first=""):
    """train_uvit.py on two ranks, 10 000 steps unless flags say otherwise: the launcher; nothing stays behind.

    first: Python that changes the script, s.
    """
    start = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import conftest, train_uvit as s"
    body = "import ast, pathlib; end = ast.parse(pathlib.Path(s.__file__).read_text()).body[-1:]"
    call = "exec(compile(ast.Module(end, []), 's', 'exec'), vars(s) | {'__name__': '__main__'})"
    program = ["-c", f"{start}; vars(s).update(conftest.shrink(s)); {first}\n{body}; {call}"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable]
    argv = ["--size", "tiny", "--dataset", "shapes", "--batch", "8", "--epochs", "1250", "--out", "run", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DDAE_JOB": str(tmp_path)}
    with open(tmp_path / "err", "w") as err:
        command = [sys.executable, *ranks, *program, *argv]
        job = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=err, stdout=subprocess.DEVNULL)
    try:
        yield job
    finally:
        for pid in running(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()


def running(tmp_path):
    """The processes of a job, launcher and ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of others, or gone; a zombie's is empty
            found += [int(path.parent.name)] * (f"DDAE_JOB={tmp_path}\0".encode() in path.read_bytes())
    return found


@linux
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_ranks_end_with_their_launcher(tmp_path, way):
    """SIGTERM: they finish the step and save. SIGKILL: they end within a minute, and what they saved is whole."""
    with torchrun(tmp_path) as job:
        file, end = tmp_path / "run/metrics.jsonl", time.time() + 60
        while not (file.is_file() and file.read_bytes().count(b"\n") > 3):
            assert time.time() < end and job.poll() is None, (tmp_path / "err").read_text()[-2000:]
            time.sleep(0.05)
        assert len(running(tmp_path)) == 3
        job.send_signal(way)
        job.wait(60)
        end = time.time() + (5 if way == signal.SIGTERM else 60)
        while running(tmp_path) and time.time() < end:
            time.sleep(0.1)
        assert not running(tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert load(tmp_path / "run")["step"] == lines[-1]["step"] >= 3


@linux
def test_ranks_end_with_a_launcher_that_dies_while_data_are_read(tmp_path):
    """When the loop begins their parent is another process already."""
    slow = "lambda *args, load=s.load_data: (open(s.os.environ['RANK'], 'w'), s.time.sleep(4), load(*args))[2]"
    with torchrun(tmp_path, first=f"s.load_data = {slow}") as job:
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert job.poll() is None, (tmp_path / "err").read_text()[-2000:]
            time.sleep(0.1)
        job.kill()
        job.wait()
        end = time.time() + 60
        while running(tmp_path) and time.time() < end:
            time.sleep(0.1)
        assert not running(tmp_path)
    assert load(tmp_path / "run")["step"] == 1


@linux
@pytest.mark.parametrize(
    ("says", "first"),
    [("training diverged", "s.learning_rate = lambda *_: float('nan')"),
     ("disk full", "s.save_checkpoint = lambda *_: (_ for _ in ()).throw(OSError('disk full'))")],
)  # fmt: skip
def test_an_error_in_the_loop_is_told_once(tmp_path, says, first):
    """Of all ranks or of rank 0: the others wait for the launcher's SIGTERM, which ends them."""
    with torchrun(tmp_path, "--save-every", "1", first=first) as job:
        assert job.wait(120)
    said = (tmp_path / "err").read_text()
    assert said.count("error: ") == 1 and says in said and "RuntimeError" not in said, said


@linux
@pytest.mark.parametrize("flags", ["--out err", "--batch 7", "--dataset nowhere"])
def test_a_mistake_is_told_once_by_all_ranks(tmp_path, flags):
    """One line is ours; what follows the launcher's first line is its own."""
    with torchrun(tmp_path, *flags.split()) as job:
        assert job.wait(120)
    said = (tmp_path / "err").read_text()
    ours = re.sub(r"^[WEI]\d{4} .*torch/distributed/elastic.*(.|\n)*", "", said, flags=re.MULTILINE)
    ours = [line for line in ours.splitlines() if line and not re.match(r"\*{9}|Setting OMP_|usage: | {4}", line)]
    assert len(ours) == 1 and re.match(r"(\S+: )?error: ", ours[0]), said
    assert "[rank" not in said and said.count("error: ") == 1


if __name__ == "__main__":
    campaign(sys.argv[1], int(sys.argv[2]))
