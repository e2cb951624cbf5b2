"""Time the loop of a train script on random images: python tests/bench.py train_uvit.py --cls-token --batch 256

Takes the script's own flags, and --steps N (default 40, the first quarter warms up). Runs its main, with data, pictures
and checkpoints left out: img/s (on a CPU of its own time, which others on the machine disturb less), model FLOPs, their
share of the matrix rate reached in the same run, on a GPU peak memory.

--table [NAME ...]: baseline, self-conditioning or [CLS], --cl, and eager float32 (convolutions in TF32) in turn, of the
paper's networks on a GPU, of tiny ones on a CPU; and the --accum that fits, by peak memory, without a GPU by what a
compiled network keeps for its backward pass (Inductor's partition).
"""

import contextlib
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
CUDA = torch.cuda.is_available()
TINY = {"unet": "train_unet --backbone tiny", "uvit": "train_uvit --size tiny", "dit": "train_dit --size tiny"}
PAPER = {
    "ddpm": "train_unet --dataset cifar10",
    "ddpmpp": "train_unet --dataset cifar10 --model edm --backbone ddpmpp",
    "U-ViT-S": "train_uvit --dataset cifar10",
    "DiT-B": "train_dit --dataset imagenet100 --cache-latents none --accum 4",
}

def parse(script, flags):
    """Its flags, with what it would learn from the data."""
    args = script.parse_args(flags)
    args.classes, args.latents = ["noise"], {"mean": [0.0] * 32}
    return args

def random_data(script, args, n):
    """What load_data returns: n images of noise."""
    with torch.device("meta"):
        shape = script.build(args)[0].shape
    if getattr(args, "cache_latents", None):
        return torch.randn(n, 2, *shape).half(), torch.zeros(n, dtype=torch.long), args.classes
    return torch.randint(256, (n, *shape)).byte(), torch.zeros(n, dtype=torch.long), args.classes

def one_pass(script, args, n, backend=None):
    """The loss on n images, on the CPU, the teacher's pass included."""
    torch.manual_seed(0)
    objective = script.Objective(*script.build(args), args)
    draws = script.draw_numbers(n, objective.net.shape, objective.diffusion, torch.Generator().manual_seed(0))
    view = script.make_view(*random_data(script, args, n)[:2], draws, slice(n), args)
    if backend:
        torch.compiler.reset()
        objective.net.compile(backend=backend)
    return objective(**view, key=script.teacher_key(objective, view, args.cl_t) if args.cl > 0 else None)[0]

def kept_bytes(script, args):
    """Bytes per image that autograd keeps under bf16 autocast; weights and their copies cancel in the difference."""
    storages = {}  # by their address, which they keep as long as they are held

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    totals = []
    for n in (2, 4):
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
            one_pass(script, args, n, "aot_eager_decomp_partition")
        totals.append(sum(storage.nbytes() for storage in storages.values()))
        storages.clear()
    return (totals[1] - totals[0]) / 2

def seconds(work, *args):
    """How long work(*args) takes, with what it leaves to the GPU; and its result."""
    now = time.perf_counter if CUDA else time.thread_time
    start, result = now(), work(*args)
    if CUDA:
        torch.cuda.synchronize()
    return now() - start, result

def train(script, flags, steps):
    """Run main: median img/s after the warm-up, the GPU's peak memory without the data."""
    rate = script.learning_rate
    torch.compiler.reset()  # or a second network is compiled for batches of any size
    gc.collect()  # compiled networks refer to themselves

    def watched(args, step, *rest):  # called once a step
        if CUDA and step == steps // 4:
            torch.cuda.reset_peak_memory_stats()  # after cuDNN's and Inductor's trials
        return rate(args, step, *rest)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        args = parse(script, [*flags, "--out", f"{out}/run", "--max-steps", str(steps)])
        data = random_data(script, args, 16 * args.batch)
        script.load_data = lambda *_: data
        script.save_grid = script.save_run = script.catch_stop_signals = lambda *args, **kwargs: []
        script.LOG_EVERY, script.learning_rate = max(1, steps // 8), watched
        if not CUDA:
            script.time = SimpleNamespace(time=time.thread_time)
        script.main(args)
        script.learning_rate = rate
        lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    peak = torch.cuda.max_memory_allocated() - data[0].nbytes if CUDA else 0
    return statistics.median(line["img_per_s"] for line in lines if line["step"] > steps // 4), peak

def matrix_rate(dtype, device):
    """FLOP/s of large matrix products."""
    size = 8192 if CUDA else 2048
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 20 * size**3 / min(seconds(lambda: [a @ a for _ in range(10)])[0] for _ in range(3))

def time_runs(script, flags, steps, variants=([],), rounds=1):
    """Run the variants in turn and print a line for each, by its fastest run; returns the first one's peak memory."""
    device = script.setup_distributed("auto")[2]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
    dtype = dtypes[script.choose_precision("auto", device)]
    rate = matrix_rate(dtype, device)
    turns = [[train(script, [*flags, *variant], steps) for variant in variants] for _ in range(rounds)]
    fastest = [max(runs) for runs in zip(*turns, strict=True)]  # (img/s, peak) of each variant
    for variant, (speed, peak) in zip(variants, fastest, strict=True):
        args = parse(script, [*flags, *variant])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            one_pass(script, args, 2).backward()
        flops = counter.get_total_flops() / 2 * speed
        memory = f"; peak {peak / 2**30:.2f} GiB" if CUDA else ""
        print(f"{script.__name__} {' '.join([*flags, *variant])}: {speed:.5g} img/s, "
              f"{1000 * args.batch / speed:.4g} ms a step, {fastest[0][0] / speed:.3f} of the first; "
              f"{flops / 1e12:.3g} TFLOP/s, {flops / rate:.0%} of {dtype} products{memory}")
    return fastest[0][1]

def count_memory(name, script, args, peak):
    """Print what a run of the paper keeps in memory, and the --accum with which it fits into 24, 48 and 80 GB."""
    fixed = 22 * sum(p.numel() for p in script.build(args)[0].parameters())  # weights, gradients, Adam's, average, bf16
    total = args.accum * (peak - fixed) if peak else args.batch * kept_bytes(script, args)
    divisors = [n for n in range(1, args.batch + 1) if args.batch % n == 0]
    fits = [next(n for n in divisors if fixed + total / n < 0.9e9 * size) for size in (24, 48, 80)]
    print(f"{name}: {fixed / 1e9:.2f} GB, {total / args.batch / 1e6:.1f} MB an image, {total / 1e9:.1f} GB a "
          f"batch of {args.batch}; --accum {fits} for 24, 48, 80 GB")

def table(names, steps):
    """The rows of --table."""
    for name in names or (PAPER if CUDA else TINY | PAPER):
        module, *flags = (TINY | PAPER)[name].split()
        script, peak = importlib.import_module(module), 0
        if CUDA or name in TINY:
            plus, eager = "--cls-token" if "uvit" in module else "--self-cond", ["--amp", "off", "--no-compile"]
            variants = [], [plus], ["--cl", "0.01"], eager
            peak = time_runs(script, flags, steps, variants, rounds=1 if CUDA else 5)
        if name in PAPER:
            count_memory(name, script, parse(script, flags), peak)

def main():
    if not sys.argv[1:] or "--help" in sys.argv:
        raise SystemExit(__doc__)
    name, *flags = sys.argv[1:]
    steps = 40
    if "--steps" in flags:
        place = flags.index("--steps")
        steps = int(flags[place + 1])
        del flags[place : place + 2]
    print(torch.cuda.get_device_name() if CUDA else "CPU", torch.get_num_threads(), "threads, torch", torch.__version__)
    if name == "--table":
        table(flags, steps)
    else:
        time_runs(importlib.import_module(Path(name).stem), flags, steps)

if __name__ == "__main__":
    main()
