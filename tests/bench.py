"""Time the loop of a train script on random images: python tests/bench.py train_uvit.py --cls-token --batch 256

Takes the script's own flags, and --steps N (default 40, the first quarter warms up). Runs its main, with data, pictures
and checkpoints left out: img/s (on a CPU of its own time, which others on the machine disturb less), model FLOPs, their
share of the matrix rate reached in the same run, on a GPU peak memory. --profile lists five steps' operations by time.

    python tests/bench.py --table [NAME ...]   # of TINY or PAPER below (default: all)

Baseline, self-conditioning or [CLS], --cl, and eager float32 (convolutions in TF32) in turn, the paper's networks on a
GPU, tiny ones on a CPU; the --accum that fits, by peak memory, without a GPU by what a compiled network keeps for its
backward pass (Inductor's partition).

    python tests/bench.py --tools RUN          # a trained one

sample.py, eager and compiled, float32 and bf16; probe.py, a cell and grids; fid.py's Inception with random weights.
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
from torch import profiler
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
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
    kept = {2: {}, 4: {}}  # {images: {address: storage}}; a storage that is held keeps its address
    for n, storages in kept.items():

        def keep(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda x: x):
            one_pass(script, args, n, "aot_eager_decomp_partition")
    few, many = (sum(storage.nbytes() for storage in storages.values()) for storages in kept.values())
    return (many - few) / 2

def seconds(work, *args):
    """How long work(*args) takes, with what it leaves to the GPU; and its result."""
    now = time.perf_counter if torch.cuda.is_available() else time.thread_time
    start, result = now(), work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start, result

def train(script, flags, steps, each=lambda step: None):
    """Run main, each(step) in every step: median img/s after the warm-up, the GPU's peak memory without the data."""
    cuda, rate = torch.cuda.is_available(), script.learning_rate
    torch.compiler.reset()  # or a second network is compiled for batches of any size
    gc.collect()  # compiled networks refer to themselves

    def watched(args, step, *rest):  # called once a step
        if cuda and step == steps // 4:
            torch.cuda.reset_peak_memory_stats()  # after cuDNN's and Inductor's trials
        each(step)
        return rate(args, step, *rest)

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        args = parse(script, [*flags, "--out", f"{out}/run", "--max-steps", str(steps)])
        data = random_data(script, args, 16 * args.batch)
        script.load_data = lambda *_: data
        script.save_grid = script.save_run = script.catch_stop_signals = lambda *args, **kwargs: []
        script.LOG_EVERY, script.learning_rate = max(1, steps // 8), watched
        if not cuda:
            script.time = SimpleNamespace(time=time.thread_time)
        script.main(args)
        script.learning_rate = rate
        lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    peak = torch.cuda.max_memory_allocated() - data[0].nbytes if cuda else 0
    return statistics.median(line["img_per_s"] for line in lines if line["step"] > steps // 4), peak

def time_runs(script, flags, steps, variants=([],), rounds=1):
    """Run the variants in turn and print a line for each, by its fastest run; returns the first one's peak memory."""
    cuda, device = torch.cuda.is_available(), script.setup_distributed("auto")[2]
    size, dtypes = 8192 if cuda else 2048, {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
    dtype = dtypes[script.choose_precision("auto", device)]
    a = torch.randn(size, size, dtype=dtype, device=device)
    rate = 20 * size**3 / min(seconds(lambda: [a @ a for _ in range(10)])[0] for _ in range(3))
    a = None
    runs = [[] for _ in variants]
    for n in range(rounds):
        for variant, same in zip(variants, runs, strict=True):
            same.append(train(script, [*flags, *variant], steps))
            if n < rounds - 1:
                continue
            (first, _), (speed, peak) = max(runs[0]), max(same)
            args = parse(script, [*flags, *variant])
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                one_pass(script, args, 2).backward()
            flops = counter.get_total_flops() / 2 * speed
            print(f"{script.__name__} {' '.join([*flags, *variant])}: {speed:.5g} img/s, "
                  f"{1000 * args.batch / speed:.4g} ms a step, {first / speed:.3f} of the first; "
                  f"{flops / 1e12:.3g} TFLOP/s, {flops / rate:.0%} of {dtype} products"
                  + (f"; peak {peak / 2**30:.2f} GiB" if cuda else ""), flush=True)  # fmt: skip
    return runs[0][0][1]

def profile(script, flags, steps):
    """Five steps of main after the warm-up: operations, on a GPU its kernels, by their own time."""
    with profiler.profile(schedule=profiler.schedule(wait=0, warmup=steps // 4, active=5, repeat=1)) as seen:
        train(script, flags, steps, lambda step: seen.step())
    order = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    print(seen.key_averages().table(order, row_limit=25, max_name_column_width=90))

def time_tools(run):
    """Sampling, probing and scoring of a trained run."""
    fid, probe, sample = map(importlib.import_module, ("fid", "probe", "sample"))
    device, first = sample.setup_distributed("auto")[2], None
    torch.set_float32_matmul_precision("high")  # as the tools do
    model, cuda = sample.load_checkpoint(run, device), device.type == "cuda"
    for amp in None, torch.bfloat16:
        for compiled in (False, True)[: 1 + cuda]:
            torch.compiler.reset()
            blocks = sample.generate(model, (4 if cuda else 2) * sample.BLOCK, amp=amp, compile=compiled)
            images = next(blocks)[1].int()  # warms up
            spent, rest = seconds(list, blocks)
            first = images if first is None else first
            print(f"sample.py, {amp or torch.float32}{', compiled' * compiled}: {len(rest) * sample.BLOCK / spent:.4g} "
                  f"img/s; pixels move by up to {(images - first).abs().max()} of 255", flush=True)  # fmt: skip
    levels = [f"{level:g}" for level in probe.LEVELS[type(model.diffusion).__name__].grid[:3]]
    with tempfile.TemporaryDirectory() as folder:

        def cell(*flags):  # seconds
            flags = [str(run), *some, *flags, "--json", f"{folder}/a.json", "--plot", f"{folder}/a.png"]
            with contextlib.redirect_stdout(sys.stderr):
                return seconds(probe.main, probe.parse_args(flags))[0]

        some, short = [] if cuda else ["--subset", "1000"], ["--epochs", "2", "--t"]
        cell(*short, *levels, "--grid"), cell(*short, levels[0], "--subset", "2")  # cuDNN tries out every shape
        idle = cell(*short, levels[0], "--subset", "2")  # checkpoint, data, picture
        grid, last, own = cell(*short, *levels, "--grid") - idle, 0, 0
        for level in levels:
            last += cell(*short, level, "--layer", model.net.layers[-1]) - idle
            own += cell(*short, level) - idle
        print(f"probe.py: {' '.join(['a cell', *some])} {cell():.3g} s; a grid of all layers at {', '.join(levels)} "
              f"costs {grid / last:.2f} of three passes at the last layer, {grid / own:.2f} at {model.args.layer}")
        torch.save(fid.Inception().state_dict(), f"{folder}/random.pth")
        net, n = fid.load_inception(f"{folder}/random.pth", device), 10_000 if cuda else 64
        pixels, batch = torch.randint(256, (n, 3, 32, 32)).byte(), 250 if cuda else 32
        images = fid.in_batches("noise", n, (32, 32), lambda i: pixels[i.start : i.stop], batch)
        spent = [seconds(fid.measure, net, images, batch)[0] for _ in range(2)][1]
        print(f"fid.py: {n / spent:.4g} img/s")

def main():
    if not sys.argv[1:] or "--help" in sys.argv:
        raise SystemExit(__doc__)
    name, *flags = sys.argv[1:]
    steps = int(flags.pop(flags.index("--steps") + 1)) if "--steps" in flags else 40
    flags, cuda = [flag for flag in flags if flag != "--steps"], torch.cuda.is_available()
    print(torch.cuda.get_device_name() if cuda else "CPU", torch.get_num_threads(), "threads, torch", torch.__version__)
    if name == "--tools":
        return time_tools(Path(flags[0]))
    if name != "--table":
        work, flags = profile if "--profile" in flags else time_runs, [flag for flag in flags if flag != "--profile"]
        return work(importlib.import_module(Path(name).stem), flags, steps)
    for name in flags or (PAPER if cuda else TINY | PAPER):
        module, *own = (TINY | PAPER)[name].split()
        script, peak = importlib.import_module(module), None
        if cuda or name in TINY:
            plus, eager = "--cls-token" if "uvit" in module else "--self-cond", ["--amp", "off", "--no-compile"]
            peak = time_runs(script, own, steps, ([], [plus], ["--cl", "0.01"], eager), 1 if cuda else 5)
        if name in PAPER:
            args = parse(script, own)  # weights, gradients, Adam's moments, average; bf16 copies
            fixed = 22 * sum(p.numel() for p in script.build(args)[0].parameters())
            total = args.accum * (peak - fixed) if peak else args.batch * kept_bytes(script, args)
            accum = [n for n in range(1, args.batch + 1) if args.batch % n == 0]
            fits = [next(n for n in accum if fixed + total / n < 0.9e9 * size) for size in (24, 48, 80)]
            print(f"{name}: {fixed / 1e9:.2f} GB, {total / args.batch / 1e6:.1f} MB an image, {total / 1e9:.1f} GB a "
                  f"batch of {args.batch}; --accum {fits} for 24, 48, 80 GB", flush=True)  # fmt: skip

if __name__ == "__main__":
    main()
