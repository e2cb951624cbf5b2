"""Several ranks with accumulation, dropout and signals, and saves by the clock: what they must leave alone."""

import functools
import signal
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import check_equal_steps, check_resumed, distance, load, metrics, run, shrink, spy
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_unet

# ---- Ranks, signals, timed saves
UNET = ["--dataset", "shapes", "--backbone", "tiny", "--batch", "8", "--epochs", "200", "--device", "cpu"]

def run_jobs(rank, world, here, jobs, dropout, wait):
    """One rank's share of jobs, (folder, flags, the rank that is told to stop in its third step or None).

    wait: of a barrier, since rank 0 saves when others have gone on.
    """
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (shrink(train_unet) | {"LOG_EVERY": 2}).items():
            patch.setattr(train_unet, key, value)
        patch.setitem(train_unet.BACKBONES["tiny"], "mult", (1, 1, 1))
        patch.setitem(train_unet.TINY, "dropout", dropout)
        patch.setitem(train_unet.TINY, "cl_hidden", 32)
        for key, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
            patch.setenv(key, str(value))
        join = torch.distributed.init_process_group
        for number, (folder, flags, told) in enumerate(jobs):
            where = {"init_method": f"file://{here}/{number}.join", "rank": rank, "world_size": world}
            patch.setattr(torch.distributed, "init_process_group", functools.partial(join, **where))
            seen = run_job([*UNET, "--out", f"{here}/{folder}", *flags], told == rank)
            torch.save(seen, f"{here}/{number}.{rank}")
            wait()

def run_job(flags, told):
    """Exit status, gradients of the first step, and a checksum of each dropout mask."""
    seen = {"status": 0, "gradients": [], "masks": []}

    def keep_gradients(optimizer, *_):
        if not seen["gradients"]:
            seen["gradients"] = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]

    def keep_mask(module, _, output):
        if isinstance(module, nn.Dropout) and module.training:
            seen["masks"].append(zlib.crc32((output == 0).numpy().tobytes()))

    def stop(args, step, *_):
        if told and step == 2:
            signal.raise_signal(signal.SIGUSR1)

    hooks = register_optimizer_step_pre_hook(keep_gradients), register_module_forward_hook(keep_mask)
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, train_unet, "learning_rate", stop)
        try:
            train_unet.main(train_unet.parse_args(flags))
        except SystemExit as end:
            seen["status"] = end.code
    for hook in hooks:
        hook.remove()
    return seen

def spawn(here, jobs, dropout):
    """Two ranks do all jobs, one after the other."""
    barrier = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(run_jobs, (2, here, jobs, dropout, barrier.wait), nprocs=2)

@pytest.mark.slow
def test_two_ranks_with_accumulation_equal_one_process(tmp_path, monkeypatch):
    """A pass of all ranks holds the images of one pass of a single process, and contrasts these; without --cl the cuts
    do not matter at all."""
    monkeypatch.setitem(train_unet.BACKBONES["tiny"], "mult", (1, 1, 1))
    flags = ["--model", "edm", "--self-cond", "--max-steps", "4"]
    contrast, plain = [*flags, "--cl", "0.3"], [*flags, "--model", "rf"]
    jobs = [("contrast", [*contrast, "--accum", "2"], None), ("plain", [*plain, "--accum", "2"], None)]
    spawn(tmp_path, jobs, 0.0)
    for number, (folder, flags) in enumerate([("contrast", [*contrast, "--accum", "2"]), ("plain", plain)]):
        (tmp_path / "one").mkdir(exist_ok=True)
        run_jobs(0, 1, tmp_path / "one", [(folder, flags, None)], 0.0, tuple)
        one, *two = (torch.load(tmp_path / name) for name in ("one/0.0", f"{number}.0", f"{number}.1"))
        assert two[0]["status"] == two[1]["status"] == 0
        for a, b, c in zip(one["gradients"], *(rank["gradients"] for rank in two), strict=True):
            assert b.equal(c) and (a - b).abs().max() <= 1e-4 * max(a.abs().max(), 1e-2)
        check_equal_steps(tmp_path / "one" / folder, tmp_path / folder, rel=1e-4)
        assert distance(train_unet, tmp_path / "one" / folder, tmp_path / folder) < 5e-3

@pytest.mark.slow
def test_ranks_drop_out_apart_stop_together_and_go_on(tmp_path):
    """A signal that rank 0 gets stops both where the next line is due; what follows repeats the unbroken run."""
    flags = ["--accum", "2", "--max-steps", "6"]
    spawn(tmp_path, [("whole", flags, None), ("parts", flags, 0), ("parts", [*flags, "--resume"], None)], 0.2)
    seen = [[torch.load(f"{tmp_path}/{number}.{rank}") for rank in (0, 1)] for number in (0, 1, 2)]
    for rank, signum in ((0, signal.SIGUSR1), (1, signal.SIGTERM)):
        whole, stopped, resumed = (job[rank] for job in seen)
        assert stopped["status"] == 128 + signum and resumed["status"] == 0
        assert stopped["masks"] + resumed["masks"] == whole["masks"]
        assert len(stopped["masks"]) == 4 * 2 * 11  # steps, passes, blocks
    masks = seen[0][0]["masks"] + seen[0][1]["masks"]
    assert len(masks) == len(set(masks)) == 2 * 6 * 2 * 11  # no two alike, on whatever rank
    check_resumed(tmp_path / "whole", tmp_path / "parts", metrics(tmp_path / "whole"), metrics(tmp_path / "parts"))

SECONDS = {1: 59, 2: 61, 3: 960, 4: 962, 5: 1861, 6: 1863, 7: 1864}  # a minute, then twice 15 minutes and a bit

def test_a_run_is_saved_after_a_minute_and_every_quarter_of_an_hour(tmp_path, monkeypatch, fewer_shapes):
    """In mid-epoch, and without an epoch's file."""
    now, saved = [0.0], []
    monkeypatch.setattr(train_unet, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setitem(train_unet.BACKBONES["tiny"], "mult", (1, 1, 1))

    def set_clock(args, step):
        now[0] = SECONDS[step]

    def note_save(args, parts, epoch, step, keep):
        saved.append((epoch, step, keep))

    spy(monkeypatch, train_unet, "ema_decay", set_clock)
    spy(monkeypatch, train_unet, "save_run", note_save)
    run(train_unet, *UNET, "--max-steps", 7, "--out", tmp_path)
    assert saved == [(0, 2, False), (0, 4, False), (0, 6, False), (0, 7, False)] and load(tmp_path)["step"] == 7
