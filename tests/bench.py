"""Time the loop of a train script on random images: python tests/bench.py train_uvit.py --cls-token --batch 256

Takes the script's own flags, and --steps N (default 40, the first quarter warms up). Runs its main, with data, pictures
and checkpoints left out: img/s (on a CPU of its own time, which others on the machine disturb less), model FLOPs, their
share of the matrix rate reached in the same run, peak memory.

    python tests/bench.py --table [NAME ...]   # of TINY or PAPER below (default: all)

Baseline, self-conditioning or [CLS], and --cl in turn, the paper's networks on a GPU, tiny ones on a CPU; the --accum
that fits, by peak memory, without a GPU by what a compiled network keeps for its backward pass (Inductor's partition).
"""

import contextlib
import gc
import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
TINY = {"unet": "train_unet --backbone tiny", "uvit": "train_uvit --size tiny", "dit": "train_dit --size tiny"}
PAPER = {
    "ddpm": "train_unet --dataset cifar10",
    "ddpmpp": "train_unet --dataset cifar10 --model edm --backbone ddpmpp",
    "U-ViT-S": "train_uvit --dataset cifar10",
    "DiT-B": "train_dit --dataset imagenet100 --cache-latents none --accum 2",
}


def random_data(script, args, n):
    """What load_data returns: n images of noise."""
    with torch.device("meta"):
        shape = script.build(args)[0].shape
    if getattr(args, "cache_latents", None):
        return torch.randn(n, 2, *shape).half(), torch.zeros(n, dtype=torch.long), ["noise"]
    return torch.randint(256, (n, *shape)).byte(), torch.zeros(n, dtype=torch.long), ["noise"]


def one_pass(script, args, n, backend=None):
    """The loss on n images, on the CPU, the teacher's pass included."""
    torch.manual_seed(0)
    net, diffusion = script.build(args)
    head = script.MoCoHead(net.feat_dim, net.emb_dim, args.cl_head == "time", args.cl_hidden) if args.cl > 0 else None
    numbers = script.draw_numbers(n, net.shape, diffusion, torch.Generator().manual_seed(0))
    view = script.make_view(*random_data(script, args, n)[:2], numbers, args)
    if backend:
        torch.compiler.reset()
        net.compile(backend=backend)
    objective = script.Objective(net, diffusion, head, args.cl)
    return objective(*view, script.teacher_key(objective, view, args.cl_t) if head else None)[0]


def kept_bytes(script, args):
    """Bytes per image that autograd keeps under bf16 autocast; weights and their copies cancel in the difference."""
    kept = {2: {}, 4: {}}  # {images: {address: storage}}; a storage that is held keeps its address
    for n, storages in kept.items():

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
            one_pass(script, args, n, "aot_eager_decomp_partition")
    few, many = (sum(storage.nbytes() for storage in storages.values()) for storages in kept.values())
    return (many - few) / 2


def train(script, flags, steps):
    """Run main: median img/s of the intervals after the warm-up, peak memory in bytes."""
    cuda = torch.cuda.is_available() and "cpu" not in flags
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        args = script.parse_args([*flags, "--out", f"{out}/run", "--max-steps", str(steps)])
        script.load_data = lambda args, split: random_data(script, args, 16 * args.batch)
        script.save_grid = script.save_run = lambda *args, **kwargs: None
        script.LOG_EVERY = max(1, steps // 8)
        torch.compiler.reset()  # or a second network is compiled for batches of any size
        gc.collect()  # compiled networks refer to themselves
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            script.time = SimpleNamespace(time=time.thread_time)
        script.main(args)
        lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics.median(line["img_per_s"] for line in lines if line["step"] > steps // 4), peak


def time_runs(script, flags, variants, steps, rounds=1):
    """Run the variants in turn and print a line for each, by its fastest run; returns the first one's peak memory."""
    runs = [[train(script, [*flags, *variant], steps) for variant in variants] for _ in range(rounds)]
    speeds, cuda = [max(run[i][0] for run in runs) for i in range(len(variants))], torch.cuda.is_available()
    size, kind = (8192, {"device": "cuda", "dtype": torch.bfloat16}) if cuda else (2048, {"dtype": torch.float32})
    clock = {} if cuda else {"timer": time.thread_time}
    rate = 2 * size**3 / Timer("a @ a", globals={"a": torch.randn(size, size, **kind)}, **clock).timeit(10).mean
    for variant, speed, (_, peak) in zip(variants, speeds, runs[0], strict=True):
        args = script.parse_args([*flags, *variant])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            one_pass(script, args, 2).backward()
        flops = counter.get_total_flops() / 2 * speed
        print(f"{script.__name__} {' '.join([*flags, *variant])}: {speed:.5g} img/s, {1000 * args.batch / speed:.4g} "
              f"ms a step, {speeds[0] / speed:.3f} of the first; {flops / 1e12:.3g} TFLOP/s, {flops / rate:.0%} of "
              f"{kind['dtype']} products; peak {peak / 2**30:.2f} GiB", flush=True)  # fmt: skip
    return runs[0][0][1]


def main():
    name, *flags = sys.argv[1:]
    steps = int(flags.pop(flags.index("--steps") + 1)) if "--steps" in flags else 40
    flags, cuda = [flag for flag in flags if flag != "--steps"], torch.cuda.is_available()
    print(torch.cuda.get_device_name() if cuda else "CPU", torch.get_num_threads(), "threads, torch", torch.__version__)
    if name != "--table":
        return time_runs(importlib.import_module(Path(name).stem), flags, [[]], steps)
    for name in flags or (PAPER if cuda else TINY | PAPER):
        module, *own = (TINY | PAPER)[name].split()
        script, peak = importlib.import_module(module), None
        if cuda or name in TINY:
            variants = [], ["--cls-token" if "uvit" in module else "--self-cond"], ["--cl", "0.01"]
            peak = time_runs(script, own, variants, steps, 1 if cuda else 5)
        if name in PAPER:
            args = script.parse_args(own)  # weights, gradients, Adam's moments, average; bf16 copies
            fixed = 22 * sum(p.numel() for p in script.build(args)[0].parameters())
            total = args.accum * (peak - fixed) if peak else args.batch * kept_bytes(script, args)
            accum = [n for n in range(1, args.batch + 1) if args.batch % n == 0]
            fits = [next(n for n in accum if fixed + total / n < 0.9e9 * size) for size in (24, 48, 80)]
            print(f"{name}: {fixed / 1e9:.2f} GB, {total / args.batch / 1e6:.1f} MB an image, {total / 1e9:.1f} GB a "
                  f"batch of {args.batch}; --accum {fits} for 24, 48, 80 GB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
