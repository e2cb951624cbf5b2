"""Draw images from any checkpoint of this repository with the sampler that its formulation was trained for.

    python sample.py runs/NAME                                        # an 8 x 8 grid, next to the checkpoint
    python sample.py runs/A runs/B --n 12 --out rows.png              # a row per checkpoint, same noise in a column
    torchrun --nproc_per_node=4 -- sample.py runs/NAME --n 50000 --out samples.npz   # the -- keeps --n from torchrun

Image i is made from a seed of its own, so it does not depend on the number of ranks or on --batch. EMA weights are
used, as in [P] (DDAE++, arXiv:2505.10999): DDIM 100 steps, Heun 18 steps (35 evaluations) or adaptive RK45.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import pickle
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

SCRIPTS = ("train_unet", "train_uvit", "train_dit")  # the only code that a checkpoint may name
BLOCK = 256  # images that are solved as one ODE: RK45 picks its steps for all of them, so this is fixed


def fail(message):
    """Report the user's mistake: one line on stderr, exit status 2, as argparse does."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def setup_distributed(device):
    """Join torchrun's process group, or stay one process.

    Args:
        device: the --device flag: "auto", "cpu", "cuda" or "cuda:N".
    Returns:
        rank, world, torch.device. NCCL carries GPU tensors, gloo CPU tensors.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            fail(f"--device {device}: this torch sees no GPU; use --device cpu")
        if ":" in device and world > 1:
            fail(f"--device {device}: torchrun gives every rank a GPU of its own; use --device cuda")
        device = device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, torch.device(device)


@dataclasses.dataclass
class Model:
    """What a checkpoint gives: the EMA network in eval mode and everything needed to use it."""

    path: Path
    script: object  # the imported train script
    args: argparse.Namespace  # the flags it was trained with
    net: torch.nn.Module
    diffusion: torch.nn.Module
    epoch: int
    step: int

    def __str__(self):
        a = self.args
        return f"{self.path}: EMA weights of epoch {self.epoch} (step {self.step}), {a.model} on {a.dataset}"


def read_checkpoint(path):
    """torch.load of tensors and plain types only: no code that a file may carry is run. Exit status 2 if it cannot."""
    if not Path(path).is_file():
        fail(f"{path} does not exist, or is no file: check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about foreign pickles is not for our users
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        fail(f"{path} cannot be read as a checkpoint (damaged, cut short, or not plain torch.save); use another")


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint and rebuild its EMA network with the script that wrote it.

    Args:
        path: a .pt file of a train script, or a run folder (then its last.pt).
        device: where the network goes.
    Returns:
        Model, in eval mode, without gradients.
    Ends with exit status 2 where the file is missing, damaged or not one of our checkpoints. Nothing is unpickled
    but tensors and plain types, and no code is imported but that of SCRIPTS.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not {"script", "args", "ema", "epoch", "step"} <= state.keys():
        fail(f"{path} is no checkpoint of this repository: it needs the keys script, args, ema, epoch and step")
    if state["script"] not in SCRIPTS:
        fail(f"{path} was written by {state['script']!r}; these tools read checkpoints of {', '.join(SCRIPTS)}")
    script = importlib.import_module(state["script"])
    args = argparse.Namespace(**state["args"])
    net, diffusion = script.build(args)
    try:
        net.load_state_dict(state["ema"])
    except RuntimeError as error:
        fail(f"{path}: weights do not fit the network that its flags describe: {' '.join(str(error).split())[:200]}")
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    diffusion = diffusion.to(device).eval()
    return Model(path, script, args, net, diffusion, int(state["epoch"]), int(state["step"]))


def initial_noise(indices, shape, seed):
    """Unit Gaussian noise of the given image indices, (len(indices), *shape) float32 on the CPU, a seed per image."""
    rows = [np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def class_labels(indices, classes, kind, seed):
    """Class of each image, (len(indices),) int64: "balanced" (index modulo classes) or "random" (by seed and index)."""
    if kind == "balanced":
        return torch.tensor(list(indices)) % classes
    return torch.tensor([int(np.random.default_rng((seed, i, 1)).integers(classes)) for i in indices])


@torch.no_grad()
def generate(model, n, rank=0, world=1, *, seed=0, steps=None, batch=256, amp=None, labels="balanced", vae=None,
             **options):
    """Sample images 0..n-1, block by block; rank r takes blocks r, r + world, ...

    Args:
        model: from load_checkpoint.
        n: number of images over all ranks.
        seed: seed of the whole set; image i starts from noise that depends on (seed, i) only.
        steps: sampler steps, None for the formulation's own.
        batch: images per network evaluation (memory only, it changes nothing else).
        amp: dtype of autocast, None for float32.
        labels: of class_labels, where the network is class-conditional.
        vae: file of the VA-VAE that decodes latents, None for the one of the training run.
        options: what else diffusion.sample takes (cfg, cfg_interval, shift).
    Yields:
        (indices, images, nfe): a range, uint8 (len(indices), 3, H, W) on the CPU, network evaluations per image.
    """
    device = next(model.net.parameters()).device
    decode = model.script.decoder(model.args, device, vae)
    options |= {} if steps is None else {"steps": steps}
    for name in options:
        if name not in inspect.signature(model.diffusion.sample).parameters:
            fail(f"--{name.replace('_', '-')}: {type(model.diffusion).__name__}, of {model.path}, has none; drop it")
    if options.keys() & {"cfg", "cfg_interval"} and not model.net.classes:
        fail(f"--cfg and --cfg-interval guide by class labels, and {model.path} is unconditional: drop them")
    calls = 0

    def net(x, t, y=None, aug=None):
        """The network in pieces of `batch` images, counting evaluations."""
        nonlocal calls
        calls += 1
        pieces = [slice(i, i + batch) for i in range(0, len(x), batch)]
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return torch.cat([model.net(x[i], t[i], None if y is None else y[i], aug) for i in pieces])

    for first in range(rank * BLOCK, n, world * BLOCK):
        calls, indices = 0, range(first, min(first + BLOCK, n))
        noise = initial_noise(indices, model.net.shape, seed).to(device)
        y = class_labels(indices, model.net.classes, labels, seed).to(device) if model.net.classes else None
        x0 = model.diffusion.sample(net, noise, y=y, **options)
        if not torch.isfinite(x0).all():
            fail(f"{model.path}: the sampler returned NaN or infinity; the weights are broken, take an earlier epoch")
        yield indices, decode(x0), calls


def gather_blocks(blocks, rank, world):
    """Bring the blocks of all ranks to rank 0, round by round.

    Args:
        blocks: this rank's iterator of (indices, tensor, extra).
    Yields:
        on rank 0 every (indices, CPU tensor, extra) of all ranks; on other ranks nothing. Every rank must iterate.
    """
    if world == 1:
        yield from ((indices, values.cpu(), extra) for indices, values, extra in blocks)
        return
    while True:
        block = next(blocks, None)
        received = [None] * world if rank == 0 else None
        block = block and (block[0], block[1].cpu(), block[2])
        dist.gather_object(block, received)  # rank 0 always has a block when any rank has one
        more = [rank == 0 and any(b is not None for b in received)]
        dist.broadcast_object_list(more)
        if not more[0]:
            return
        if rank == 0:
            yield from (b for b in received if b is not None)


def add_sampling_flags(group):
    """The flags of generate, which fid.py has as well."""
    group.add_argument("--steps", type=int, help="sampler steps; None: DDIM 100, Heun 18, RF adaptive RK45; RF with a "
                       "number: Euler; DiT Euler 250 (default: %(default)s)")
    group.add_argument("--labels", choices=["balanced", "random"], default="balanced",
                       help="classes of class-conditional samples, balanced: image i has class i modulo their number; "
                       "it moves FID (default: %(default)s)")
    group.add_argument("--cfg", type=float, metavar="W", help="guidance weight of a class-conditional DiT, 1: off; "
                       "None: 1.5, [P] (default: %(default)s)")
    group.add_argument("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       help="times at which guidance acts; None: 0 0.89, [P] (default: %(default)s)")
    group.add_argument("--shift", type=float, metavar="S", help="of a DiT's time grid, t' = S t / (1 + (S - 1) t), "
                       "1: off; None: 3.3, [P] (default: %(default)s)")
    group.add_argument("--vae", metavar="FILE", help="VA-VAE of a DiT on latents; None: the training run's "
                       "(default: %(default)s)")
    group.add_argument("--seed", type=int, default=0,
                       help="of the set; image i depends on (seed, i) only (default: %(default)s)")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off",
                       help="autocast of the network (default: %(default)s)")


def sampling(args):
    """What the flags of add_sampling_flags and --batch mean to generate; exit status 2 for senseless numbers."""
    low = {"steps": 1, "batch": 1, "seed": 0, "shift": 1e-6}
    for name, least in low.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name} must be at least {least:g}")
    if args.cfg is not None and args.cfg < 0:
        fail("--cfg must be at least 0")
    if args.cfg_interval is not None and not 0 <= args.cfg_interval[0] < args.cfg_interval[1] <= 1:
        fail("--cfg-interval takes two times, LOW below HIGH, between 0 (data) and 1 (noise)")
    flags = {name: getattr(args, name) for name in ("seed", "steps", "batch", "labels", "vae")}
    options = {"cfg": args.cfg, "cfg_interval": args.cfg_interval, "shift": args.shift}
    amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    return flags | {"amp": amp} | {name: value for name, value in options.items() if value is not None}


def parse_args(argv=None):
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ckpt", nargs="+", metavar="CKPT", help="checkpoint files, or run folders (then their last.pt)")
    parser.add_argument("--n", type=int, help="images (default: 64; of several checkpoints 12 each)")
    parser.add_argument("--out", help="folder for PNGs, FILE.npz (arr_0: uint8 N,H,W,3) or FILE.png "
                        "(default: samples.png beside the first checkpoint)")
    add_sampling_flags(parser)
    parser.add_argument("--batch", type=int, default=256, help="images per network evaluation (default: 256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    args.n = args.n if args.n is not None else (64 if len(args.ckpt) == 1 else 12)
    if args.n < 1:
        parser.error("--n must be at least 1")
    first = Path(args.ckpt[0])
    args.out = Path(args.out) if args.out else (first if first.is_dir() else first.parent) / "samples.png"
    if args.out.suffix in (".jpg", ".jpeg", ".webp", ".gif"):
        parser.error(f"--out {args.out}: give FILE.png, FILE.npz or a folder; images are kept without loss")
    if len(args.ckpt) > 1 and args.out.suffix != ".png":
        parser.error("several checkpoints make the rows of one picture: give --out FILE.png")
    return args


def main(args):
    """Sample every checkpoint and write the pictures."""
    options = sampling(args)
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")
    folder = args.out.suffix not in (".png", ".npz")
    if folder and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        fail(f"--out {args.out} is not an empty folder: choose another, so that the count stays exact")
    if rank == 0:
        (args.out if folder else args.out.parent).mkdir(parents=True, exist_ok=True)
    rows = []
    for path in args.ckpt:
        model = load_checkpoint(path, device)
        if rank == 0:
            print(model, *([f"{args.labels} labels"] if model.net.classes else []), sep=", ")
        bar = tqdm(total=args.n, unit="img", desc="sample", disable=rank > 0)
        start, nfes, images = time.time(), [], None  # (n, H, W, 3), but for a folder
        blocks = generate(model, args.n, rank, world, **options)
        for indices, block, nfe in gather_blocks(blocks, rank, world):
            block = block.permute(0, 2, 3, 1).numpy()
            if folder:
                for i, image in zip(indices, block, strict=True):
                    Image.fromarray(image).save(args.out / f"{i:06d}.png")
            else:
                images = np.empty((args.n, *block.shape[1:]), np.uint8) if images is None else images
                images[indices.start : indices.stop] = block
            nfes.append(nfe)
            bar.update(len(indices))
        bar.close()
        if rank == 0:
            print(f"{args.n} images in {time.time() - start:.1f} s, NFE {sum(nfes) / len(nfes):.0f}")
            rows.append(images)
    if rank == 0 and not folder:
        if args.out.suffix == ".npz":
            tmp = args.out.with_suffix(".tmp.npz")
            np.savez(tmp, arr_0=rows[0])
            os.replace(tmp, args.out)
        else:
            if len({row.shape for row in rows}) > 1:
                fail("the checkpoints have different resolutions: draw them into pictures of their own")
            columns = args.n if len(rows) > 1 else int(np.ceil(args.n**0.5))
            images = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2)
            grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(args.out)
    if rank == 0:
        print(args.out)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
