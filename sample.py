"""Draw images from any checkpoint of this repository with the sampler that its formulation was trained for.

    python sample.py runs/NAME --labels 3 7 12                        # a grid beside the checkpoint, a column per class
    python sample.py runs/A runs/B --n 12 --out rows.png              # a row per checkpoint, same noise in a column
    torchrun --nproc_per_node=4 -- sample.py runs/NAME --n 50000 --out samples.npz   # the -- keeps --n from torchrun

Image i is made from a seed of its own, so it does not depend on the number of ranks or on --batch. EMA weights are
used, as in [P] (DDAE++, arXiv:2505.10999): DDIM 100 steps, Heun 18 steps (35 evaluations) or adaptive RK45.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import math
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import make_grid
from tqdm import tqdm

from train_unet import fail, read_checkpoint, setup_distributed

TROUBLE = OSError, MemoryError, torch.OutOfMemoryError, FloatingPointError  # what a tool tells in one line
SCRIPTS = ("train_unet", "train_uvit", "train_dit")  # the only code that a checkpoint may name
BLOCK = 256  # images that are solved as one ODE: RK45 picks its steps for all of them, so this is fixed
TILE, MOST_COLUMNS = 64, 20  # pictures: least side of a tile; with more classes a class has no column


class Model(NamedTuple):
    """What a checkpoint gives: the EMA network, in eval mode and frozen, and everything needed to use it."""
    path: Path
    script: object  # the imported train script
    args: argparse.Namespace  # the flags it was trained with
    net: torch.nn.Module
    diffusion: torch.nn.Module
    epoch: int
    step: int

    def __str__(self):
        what = f"{self.args.model} on {self.args.dataset}"
        return f"{self.path}: EMA weights of epoch {self.epoch} (step {self.step}), {what}"


@contextlib.contextmanager
def told(what, errors=Exception):
    """Makes errors one line."""
    try:
        yield
    except errors as error:
        fail(f"{what} ({' '.join(str(error).split())[:200]})")


def check_flags(args, net, diffusion):
    """Raise something if a flag that the tools read is not as a train script writes it; build has tried the others."""
    diffusion.check_level(args.cl_t)
    fine = args.model in ("ddpm", "edm", "rf") and args.layer == net.layer and 0 < args.resolution <= 4096
    fine &= args.dataset.isprintable() and "\0" not in "".join([args.data, args.cache_latents or "", args.vae or ""])
    if not fine or bool in (type(args.cl_t), type(args.resolution)):
        raise ValueError("no train script writes such flags")
    if "mean" in args.latents:  # for decoder
        torch.tensor([args.latents["mean"], args.latents["std"]]).view(2, net.shape[0])


def load_checkpoint(path, device="cpu"):
    """Rebuild the EMA network of a checkpoint (a .pt file, or a run folder's last.pt) with the script that wrote it.

    Exit status 2 where the file is missing, damaged or not ours. No code is run but that of SCRIPTS.
    """
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():  # a pipe would be waited for
        fail(f"{path} does not exist, or is no file: give the last.pt or epoch_*.pt of a run")
    with told(f"{path} is damaged, or no checkpoint of a run's network"):  # a file may hold anything
        with zipfile.ZipFile(path) as file:
            if any(record.compress_type for record in file.infolist()):
                raise ValueError("packed")  # torch.load would inflate it
        state = read_checkpoint(path)
        if not isinstance(state, dict) or state.get("script") not in SCRIPTS:
            raise ValueError(f"none of {', '.join(SCRIPTS)} wrote this")
        script = importlib.import_module(state["script"])
        json.dumps([state["args"], state["epoch"], state["step"]])  # plain values
        args = argparse.Namespace(**{"cache_latents": None, "vae": None, "latents": {}} | state["args"])
        with torch.device("meta"):  # misfits are found before memory is taken
            net, diffusion = script.build(args)
            net.load_state_dict(state["ema"], assign=True)
        if sum(value.numel() for value in state["ema"].values()) > path.stat().st_size:
            raise ValueError("more weights than bytes")  # a tensor may repeat what it stores
        check_flags(args, net, diffusion)
        net, diffusion = script.build(args)
        net.load_state_dict(state["ema"])
        epoch, step = int(state["epoch"]), int(state["step"])
    layout = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
    net.to(device, memory_format=layout).eval().requires_grad_(False)
    return Model(path, script, args, net, diffusion.to(device).eval(), epoch, step)


def class_labels(indices, classes, labels, seed):
    """Class of each image, (len(indices),) int64: drawn by seed and index, or all classes or those listed in turn."""
    if labels == "random":
        return torch.tensor([int(np.random.default_rng((seed, i, 1)).integers(classes)) for i in indices])
    return torch.tensor([i % classes if labels == "balanced" else labels[i % len(labels)] for i in indices])


def generate(model, n, rank=0, world=1, *, seed=0, batch=BLOCK, amp=None, compile=None, labels="balanced", vae=None,
             **options):
    """Sample images 0..n-1, block by block; rank r takes blocks r, r + world, ... Misfits end with exit status 2.

    Args:
        seed: of the whole set; image i starts from noise that depends on (seed, i) only.
        batch: images per evaluation (memory only). amp: dtype of autocast or None. compile: None: on a GPU, for many.
        labels: of a class-conditional network: "balanced" (i modulo classes), "random" or a list of classes.
        vae: file of the VA-VAE, None for the training run's. options: of diffusion.sample (steps, cfg, ...).
    Returns an iterator of indices (a range), images uint8 (B, 3, H, W) on the CPU, network evaluations per image.
    """
    device, classes = next(model.net.parameters()).device, model.net.classes
    for name in options.keys() - inspect.signature(model.diffusion.sample).parameters.keys():
        fail(f"--{name.replace('_', '-')}: {type(model.diffusion).__name__}, of {model.path}, has none; drop it")
    if not classes and (options.keys() & {"cfg", "cfg_interval"} or isinstance(labels, list)):
        fail(f"{model.path} is unconditional: drop --cfg, --cfg-interval and the numbers of --labels")
    if isinstance(labels, list) and max(labels) >= classes:
        fail(f"--labels: the classes of {model.path} are 0 to {classes - 1}")
    if vae and not model.args.cache_latents:
        fail(f"--vae {vae}: {model.path} works on pixels, drop it")
    decoder, piece = getattr(model.script, "decoder", None), min(batch, BLOCK)
    decode = decoder(model.args, device, vae) if decoder else model.script.to_uint8
    compile = n > 8 * BLOCK and device.type == "cuda" if compile is None else compile
    compiled = torch.compile(model.net, dynamic=False) if compile else model.net

    def net(x, t, y=None):
        net.calls += 1
        parts = zip(x.split(piece), t.split(piece), [None] * len(x) if y is None else y.split(piece), strict=False)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):  # a last, smaller part is not compiled
            return torch.cat([(compiled if len(part[0]) == piece else model.net)(*part) for part in parts])

    @torch.no_grad()
    def block(first):
        net.calls, indices = 0, range(first, min(first + BLOCK, n))
        noise = [np.random.default_rng((seed, i)).standard_normal(model.net.shape, dtype=np.float32) for i in indices]
        noise = torch.from_numpy(np.stack(noise)).to(device)
        y = class_labels(indices, classes, labels, seed).to(device) if classes else None
        x0 = model.diffusion.sample(net, noise, y=y, **options)
        if not torch.isfinite(x0).all():
            fail(f"{model.path}: the sampler returned NaN or infinity; the weights are broken, take an earlier epoch")
        return indices, decode(x0).cpu(), net.calls

    return map(block, range(rank * BLOCK, n, world * BLOCK))


def draw_grid(images, columns, names):
    """uint8 (N, H, W, 3) -> PIL image: tiles of at least TILE pixels in rows, each row's name left of it."""
    scale = math.ceil(TILE / images.shape[1])
    tiles = images.permute(0, 3, 1, 2).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(tiles, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0)
    margin = max((12 + int(ImageFont.load_default().getlength(name)) for name in names), default=0)
    picture = ImageOps.expand(Image.fromarray(grid.numpy()), (margin, 0, 0, 0), "white")
    for row, name in enumerate(names):
        ImageDraw.Draw(picture).text((6, (row + 0.5) * picture.height / len(names)), name, "black", anchor="lm")
    return picture


def add_sampling_flags(add):
    """The flags of generate, which fid.py has as well; add is an add_argument."""
    add("--steps", type=int, help="(default: DDIM 100, of divisors of 1000; Heun 18; RF adaptive, no steps; DiT 250)")
    add("--labels", nargs="+", default=["balanced"], metavar="CLASS", help="balanced (default), random or numbers")
    add("--cfg", type=float, help="guidance weight of a class-conditional DiT, 1: off (default: 1.5, DDAE++ Tab. 8)")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="its times (default: 0 0.89)")
    add("--vae", metavar="FILE", help="VA-VAE of a DiT on latents (default: the run's)")
    add("--seed", type=int, default=0, help="image i depends on (seed, i) only (default: 0)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="(default: off; bf16 moves pixels by up to 18)")
    add("--compile", action=argparse.BooleanOptionalAction, help=f"(default: on a GPU, above {8 * BLOCK} images)")
    add("--batch", type=int, default=BLOCK, help=f"images per network evaluation and rank (default: {BLOCK}, the most)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")


def sampling(args):
    """What the flags mean to generate, as a dict; exit status 2 for senseless ones."""
    for name, least in {"n": 1, "steps": 1, "batch": 1, "seed": 0, "cfg": 0}.items():
        if getattr(args, name) is not None and not least <= getattr(args, name) < math.inf:
            fail(f"--{name} must be at least {least}")
    if args.cfg_interval is not None and not 0 <= args.cfg_interval[0] < args.cfg_interval[1] <= 1:
        fail("--cfg-interval takes two times, LOW below HIGH, between 0 (data) and 1 (noise)")
    names = "seed", "steps", "batch", "compile", "vae", "cfg", "cfg_interval"
    options = {name: value for name, value in vars(args).items() if name in names and value is not None}
    options["amp"] = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    if args.labels not in (["balanced"], ["random"]) and not all(word.isdecimal() for word in args.labels):
        fail("--labels takes balanced, random, or numbers of classes")
    options["labels"] = [int(word) for word in args.labels] if args.labels[0].isdecimal() else args.labels[0]
    return options


def parse_args(argv=None):
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ckpt", nargs="+", metavar="CKPT", help="checkpoint files, or run folders (then their last.pt)")
    parser.add_argument("--n", type=int, help="images (default: 64; 8 for each column of a class, 12 for a named row)")
    parser.add_argument("--out", type=Path, help="new folder, FILE.npz or FILE.png (default: samples.png beside CKPT)")
    add_sampling_flags(parser.add_argument)
    args = parser.parse_args(argv)
    first = Path(args.ckpt[0])
    args.out = args.out or (first if os.path.isdir(first) else first.parent) / "samples.png"
    if len(args.ckpt) > 1 and args.out.suffix != ".png":
        parser.error("several checkpoints make the rows of one picture: give --out FILE.png")
    if args.out.suffix != ".png" and args.out.suffix.lower() in Image.registered_extensions():
        parser.error("pictures are PNG: give --out FILE.png, FILE.npz or a new folder")
    return args


@told("stopped", TROUBLE)
def main(args):
    """Sample every checkpoint and write the pictures."""
    options = sampling(args)
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")
    folder = args.out.suffix not in (".png", ".npz")

    # 1. What is drawn: mistakes show before the first image.
    models = [load_checkpoint(path, device) for path in args.ckpt]
    side, classes, labels = models[0].args.resolution, models[0].net.classes, options["labels"]
    if any(model.args.resolution != side for model in models):
        fail("the checkpoints have different resolutions: draw them into pictures of their own")
    per_class = len(labels) if isinstance(labels, list) else classes if labels == "balanced" else 0
    by_class, several = 1 < per_class <= MOST_COLUMNS, len(models) > 1
    n = args.n or (12 if several else 8 * per_class if by_class else 64)
    columns = n if several else per_class if by_class else math.ceil(n**0.5)
    draws = [generate(model, n, rank, world, **options) for model in models]

    # 2. The images: every rank fills in its own.
    if rank == 0:  # what cannot be written shows now; a folder must be new, so that the count stays exact
        (args.out if folder else args.out.parent).mkdir(parents=True, exist_ok=not folder)
        folder or args.out.open("ab").close()
    images = torch.zeros(len(models), n, side, side, 3, dtype=torch.uint8)
    for row, (model, blocks) in enumerate(zip(models, draws, strict=True)):
        nfes, rounds = [], math.ceil(n / world / BLOCK)
        for indices, block, nfe in tqdm(blocks, "sample", rounds, unit="block", disable=rank > 0):
            images[row, indices.start : indices.stop] = block.permute(0, 2, 3, 1)
            nfes.append(nfe)
        if rank == 0:
            print(f"{model}, {n} images, NFE {np.mean(nfes):.0f}" + f", labels {labels}" * bool(model.net.classes))
    if world > 1:
        dist.all_reduce(images)  # all but one are zero
        dist.destroy_process_group()

    # 3. The file.
    if rank > 0:
        return
    if folder:
        for i, image in enumerate(images[0].numpy()):
            Image.fromarray(image).save(args.out / f"{i:06d}.png")
    elif args.out.suffix == ".npz":
        np.savez(args.out, arr_0=images[0].numpy())
    else:
        names = [f"{model.path.absolute().parent.name}, epoch {model.epoch}" for model in models if several]
        draw_grid(images.flatten(0, 1), columns, names).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(parse_args())
