"""Time the loop of a train script on random images: python tests/bench.py train_uvit.py --cls-token --batch 256

Takes the script's own flags, and --steps N (default 40, the first quarter warms up). Runs its main, with data, pictures
and checkpoints left out, and prints one JSON line: img/s, model FLOPs per image (matrix products and convolutions of a
training step), their share of the matrix rate that the device reaches in the same run, peak memory.
"""

import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))


def count_flops(script, args):
    """FLOPs per image of one training step, teacher included."""
    torch.manual_seed(0)
    net, diffusion = script.build(args)
    head = script.MoCoHead(net.feat_dim, net.emb_dim, args.cl_head == "time", args.cl_hidden) if args.cl > 0 else None
    objective = script.Objective(net, diffusion, head, args.cl)
    images, labels, generator = *random_data(script, args, 2)[:2], torch.Generator().manual_seed(0)
    view = script.make_view(
        images, labels, script.draw_numbers(2, net.shape, diffusion, generator), args
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        key = head and script.teacher_key(net, head.projector, diffusion, view, args.cl_t)
        objective(*view, key)[0].backward()
    return counter.get_total_flops() / 2


def random_data(script, args, n):
    """What load_data returns: n images of noise."""
    with torch.device("meta"):
        shape = script.build(args)[0].shape
    if getattr(args, "cache_latents", None):
        return torch.randn(n, 2, *shape).half(), torch.zeros(n, dtype=torch.long), ["noise"]
    return torch.randint(256, (n, *shape)).byte(), torch.zeros(n, dtype=torch.long), ["noise"]


def matrix_rate(device):
    """TFLOP/s of a large matrix product: bf16 on a GPU, float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, times = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e12


def main():
    name, *flags = sys.argv[1:]
    steps = int(flags.pop(flags.index("--steps") + 1)) if "--steps" in flags else 40
    flags = [flag for flag in flags if flag != "--steps"]
    script = importlib.import_module(Path(name).stem)
    with tempfile.TemporaryDirectory() as out:
        args = script.parse_args([*flags, "--out", f"{out}/run", "--max-steps", str(steps)])
        script.load_data = lambda args, split: random_data(script, args, 4 * args.batch)
        script.save_grid = script.save_run = lambda *args, **kwargs: None
        script.LOG_EVERY = max(1, steps // 8)
        flops, start = count_flops(script, args), time.time()
        script.main(args)
        total = time.time() - start
        lines = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(line["img_per_s"] for line in lines if line["step"] > steps // 4)
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    cuda, rate = device.type == "cuda", matrix_rate(device)
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({
        "img_per_s": round(speed, 2), "ms_per_step": round(1000 * args.batch / speed, 1),
        "gflop_per_img": round(flops / 1e9, 3), "tflops": round(flops * speed / 1e12, 3),
        "matrix_tflops": round(rate, 3), "share": round(flops * speed / 1e12 / rate, 3),
        "peak_memory_gib": round(memory / 2**30, 2),
        "seconds_before_and_after": round(total - steps * args.batch / speed, 1), "batch": args.batch,
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "seed": args.seed,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
