"""Draw images from any checkpoint of this repository with the sampler that its formulation was trained for.

    python sample.py runs/NAME                                # a grid beside the checkpoint, a column per class
    python sample.py runs/NAME --labels cat dog 7             # classes by name or number
    python sample.py runs/A runs/B --n 12                     # a row per checkpoint, same noise in a column
    torchrun --nproc_per_node=4 -- sample.py runs/NAME --n 50000 --out samples.npz   # the -- keeps --n from torchrun

Image i is made from a seed of its own, so it does not depend on the number of ranks or on --batch; RK45 chooses its
steps for a block of images, on which they depend a little. EMA weights are used, as in [P] (DDAE++, arXiv:2505.10999):
DDIM 100 steps, Heun 18 steps (35 evaluations) or adaptive RK45.

The other tools stand on this file: UserError, load_checkpoint, setup_distributed, run_tool.
"""

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import shutil
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torchvision.utils import make_grid
from tqdm import tqdm

SCRIPTS = ("train_unet", "train_uvit", "train_dit")  # what a checkpoint may name; other code only by --script
BLOCK = 256  # images that are solved as one ODE: RK45 picks its steps for all of them, so this is fixed
TILE = 64  # pixels; smaller images are enlarged in pictures
MOST_COLUMNS = 20  # with more classes a class has no column of its own

# ---- 1. Errors and ranks -----------------------
class UserError(ValueError):
    """A mistake that the user can mend. A notebook shows it; run_tool makes it one line and exit status 2."""

def fail(message, status=2):
    """End the program with one line on stderr: for mistakes that the user can mend."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # above the progress bar
    raise SystemExit(status)

def run_tool(main, args):
    """Run main(args). User errors, full disks and full memory end in one line and exit status 2, Ctrl-C in 130."""
    try:
        return main(args)
    # FloatingPointError: RK45, of a network that gives NaN.
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError, FloatingPointError) as error:
        fail(" ".join(str(error).split()) or type(error).__name__)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C", status=130)

def first_line(error):
    """The reason that an exception gives, without torch's advice."""
    reason = str(error).split("WeightsUnpickler error: ")[-1].strip()
    return reason.split("\n")[0].split(". ")[0] or type(error).__name__

def setup_distributed(device):
    """Join torchrun's process group, or stay a single process. Returns rank, world size and torch.device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not on_gpu:
        fail("--device cuda: torch finds no GPU; use --device cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:  # a long limit, for while rank 0 decodes a data set
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))
    return rank, world, device

# ---- 2. Checkpoints ----------------------------
@dataclass
class Model:
    """What a checkpoint gives: the EMA network, in eval mode and frozen, and everything needed to use it."""

    path: Path
    script: object  # the imported train script; used are build, load_data, to_x0, to_uint8, decoder, choose_precision
    args: argparse.Namespace  # the flags it was trained with
    net: torch.nn.Module
    diffusion: torch.nn.Module
    epoch: int
    step: int

    @property
    def name(self):
        """Run folder and epoch, as pictures call it."""
        return f"{self.path.absolute().parent.name}, epoch {self.epoch}"

    def __str__(self):
        return (f"{self.path}: EMA weights of epoch {self.epoch} (step {self.step}), "
                f"{describe(self.args)}, trained on {self.args.dataset}")

def describe(args):
    """What a run trains, by the flags that matter most: 'edm tiny --self-cond adaptive --cl 0.01'."""
    words = [args.model, args.backbone if "backbone" in args else args.size]
    for flag in ("self_cond", "cls_token", "cond", "aug", "cl"):
        value = getattr(args, flag, None)
        if value:
            words.append(f"--{flag.replace('_', '-')} {value}".removesuffix(" True"))
    return " ".join(words)

def comparison_name(paths):
    """What a file that compares checkpoints is called after: A-B for runs/A and runs/B."""
    names = []
    for path in map(Path, paths):
        path = path.absolute()
        names.append(path.name if os.path.isdir(path) else f"{path.parent.name}-{path.stem}")
    name = "-".join(names)
    if len(name) > 100:  # file names have a limit; the hash tells long comparisons apart
        name = f"{name[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name

def check_writable(path):
    """Raise UserError now if a file could not be written later."""
    folder = Path(path).absolute().parent
    place = path if Path(path).is_file() else folder
    if os.path.isdir(path) or not folder.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"cannot write {path}: name a file in a folder that exists")

def import_script(name, file=None):
    """The train script that wrote a checkpoint: one of SCRIPTS, else the file that the user names."""
    if name in SCRIPTS:
        return importlib.import_module(name)
    if file is None:
        raise UserError(f"it was written by {name}: give --script {name}.py, whose code is then run")
    if not Path(file).is_file() or Path(file).suffix != ".py":
        raise UserError(f"--script {file} does not exist, or is no .py file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script

def read_weights(path):
    """What a file of torch.save holds, on the CPU. weights_only: tensors and plain values, no code."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path} is no regular file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise almost anything
        with open(path, "rb") as file:
            beginning = file.read(40)  # shows, for example, a Git-LFS pointer
        reason = f"({first_line(error)}); it begins with {beginning}"
        raise UserError(f"{path} is no checkpoint, or is cut short {reason}") from error

def load_checkpoint(path, device="cpu", script_file=None):
    """Rebuild the EMA network of a checkpoint with the script that wrote it.

    path: a .pt file, or a run folder (its last.pt). script_file: see import_script. Raises UserError where the file
    is missing, damaged, or no checkpoint of ours, or where the network does not fit it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    state = read_weights(path)
    for key in ("script", "args", "ema", "epoch", "step"):
        if not isinstance(state, dict) or key not in state:
            raise UserError(f"{path} is no checkpoint of a train script: it has no {key!r}")
    try:
        script = import_script(state["script"], script_file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    text_hash = hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest()[:16]
    if state.get("script_hash", text_hash) != text_hash:
        print(f"warning: {script.__file__} has been edited since it wrote {path}", file=sys.stderr)
    try:
        args = argparse.Namespace(**state["args"])
        net, diffusion = script.build(args)
        net.load_state_dict(state["ema"])
    except Exception as error:  # flags of another version, weights of another network
        reason = str(error).strip().split("\n")[-1].strip()[:200]
        raise UserError(f"{path} does not fit {Path(script.__file__).name} ({reason})") from error
    net.to(device).eval().requires_grad_(False)
    if torch.device(device).type == "cuda":
        net.to(memory_format=torch.channels_last)  # faster there, slower on CPUs
    return Model(path, script, args, net, diffusion.to(device).eval(), state["epoch"], state["step"])

# ---- 3. Sampling -------------------------------
class CountingNetwork:
    """The network as a sampler calls it, x (B, C, H, W), t (B,), y (B,) or None -> (B, C, H, W): in pieces of `batch`
    images, under autocast, and counted; with guidance a call has twice the images.
    """

    def __init__(self, net, batch, amp, compiled):
        self.net, self.batch, self.amp = net, batch, amp
        self.compiled = torch.compile(net, dynamic=False) if compiled else net
        self.evaluations = 0

    def __call__(self, x, t, y=None):
        self.evaluations += 1
        outputs = []
        with torch.autocast(x.device.type, dtype=self.amp, enabled=self.amp is not None):
            for first in range(0, len(x), self.batch):
                rows = slice(first, first + self.batch)
                whole = len(x[rows]) == self.batch  # a smaller piece would cause a second compilation
                net = self.compiled if whole else self.net
                outputs.append(net(x[rows], t[rows], None if y is None else y[rows]))
        return torch.cat(outputs)

def class_labels(indices, classes, labels, seed):
    """Class of each image, (len(indices),) int64: drawn by seed and index, or all classes or those listed in turn."""
    if labels == "random":
        # The 1 tells this stream of random numbers from the noise's.
        draws = [np.random.default_rng((seed, i, 1)).integers(classes) for i in indices]
        return torch.from_numpy(np.array(draws))
    if labels == "balanced":
        labels = range(classes)
    return torch.tensor([labels[i % len(labels)] for i in indices])

def image_noise(seed, index, shape):
    """The noise that image number `index` starts from, float32."""
    return torch.from_numpy(np.random.default_rng((seed, index)).standard_normal(shape, dtype=np.float32))

def generate(model, n, rank=0, world=1, *, seed=0, batch=BLOCK, amp=None, compile=None,
             labels="balanced", vae=None, **options):
    """Sample images 0 .. n - 1, block by block; rank r takes blocks r, r + world, ...

    Args:
        seed: of the whole set; image i starts from noise that depends on (seed, i) only.
        batch: images per evaluation (memory only). amp: dtype of autocast or None.
        compile: whether the network is compiled; None: on a GPU, for more than 8 blocks.
        labels: of a class-conditional network: "balanced" (i modulo classes), "random" or a list of classes.
        vae: file of the VA-VAE, None for the training run's. options: of diffusion.sample (steps, cfg, ...).
    Returns an iterator of indices (a range), images uint8 (B, 3, H, W) on the CPU, network evaluations per image.
    Raises UserError at once where the arguments do not fit the model, and later if the sampler gives NaN.
    """
    device, classes = next(model.net.parameters()).device, model.net.classes
    known = inspect.signature(model.diffusion.sample).parameters
    for name in options:
        if name not in known:
            kind = type(model.diffusion).__name__
            raise UserError(f"--{name.replace('_', '-')}: {kind}, of {model.path}, has none; drop it")
    guided = "cfg" in options or "cfg_interval" in options
    if not classes and (guided or isinstance(labels, list)):
        raise UserError(f"{model.path} is unconditional: drop --cfg, --cfg-interval and --labels")
    if vae and not getattr(model.args, "cache_latents", None):
        raise UserError(f"--vae {vae}: {model.path} works on pixels, drop it")
    decode = model.script.to_uint8
    if hasattr(model.script, "decoder"):  # train_dit.py's, which is to_uint8 for pixels
        decode = model.script.decoder(model.args, device, vae)
    if compile is None:
        compile = n > 8 * BLOCK and device.type == "cuda"
    net = CountingNetwork(model.net, min(batch, BLOCK), amp, compile)

    @torch.no_grad()
    def draw_block(first):
        indices = range(first, min(first + BLOCK, n))
        noise = torch.stack([image_noise(seed, i, model.net.shape) for i in indices]).to(device)
        y = class_labels(indices, classes, labels, seed).to(device) if classes else None
        net.evaluations = 0
        x0 = model.diffusion.sample(net, noise, y=y, **options)
        if not torch.isfinite(x0).all():
            raise UserError(f"{model.path}: the sampler gives NaN or infinity; take an earlier epoch")
        return indices, decode(x0).cpu(), net.evaluations

    return (draw_block(first) for first in range(rank * BLOCK, n, world * BLOCK))

# ---- 4. Files ----------------------------------
def write_npz(path, blocks, shape):
    """Write arr_0, uint8 of `shape`, from blocks of its bytes: numpy's format, without all images in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block)

def draw_grid(images, columns, row_names, column_names):
    """Images uint8 (N, H, W, 3) -> PIL image: tiles of TILE pixels or more, rows and columns with their names."""
    scale = math.ceil(TILE / images.shape[1])
    tiles = images.permute(0, 3, 1, 2)
    tiles = tiles.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(tiles, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0)
    side = tiles.shape[2] + 2
    column_names = [textwrap.fill(name, side // 6) for name in column_names]  # a letter is 6 pixels wide
    left = 6 * max([2 + len(line) for name in row_names for line in name.split("\n")], default=0)
    top = 16 * max([1 + name.count("\n") for name in column_names], default=0)
    picture = ImageOps.expand(Image.fromarray(grid.numpy()), (left, top, 0, 0), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(row_names):
        draw.text((6, top + (row + 0.5) * side), name, "black", anchor="lm")
    for column, name in enumerate(column_names):
        draw.text((left + (column + 0.5) * side, top / 2), name, "black", anchor="mm", align="center")
    return picture

# ---- 5. Flags and main -------------------------
def add_sampling_flags(add):
    """The flags of generate, which fid.py has as well; add is an add_argument."""
    add("--steps", type=int, help="of DDPM and U-ViT (default: 100), EDM (18), DiT (250); RF on UNets chooses its own")
    add("--labels", nargs="+", default=["balanced"], metavar="CLASS",
        help="of a --cond network: balanced, random, or names or numbers, from 0, of classes (default: balanced)")
    add("--cfg", type=float, help="guidance weight of a --cond DiT; 1: off (default: 1.5)")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="times with guidance, 0 is data, 1 noise (default: 0 0.89)")
    add("--vae", metavar="FILE", help="VA-VAE of a DiT on latents (default: the training run's)")
    add("--seed", type=int, default=0, help="image i depends on (seed, i) only (default: 0)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off",
        help="autocast; bf16 moves pixels by up to 18 of 255 (default: off)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help=f"torch.compile (default: on GPUs, for more than {8 * BLOCK} images)")
    add("--batch", type=int, default=BLOCK, help=f"images per evaluation and rank (default: {BLOCK}, the most)")
    add("--script", metavar="FILE", help="your train script, of checkpoints that none of the three scripts wrote")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")

def sampling_options(args):
    """What the flags mean to generate, but for the labels: a dict. Raises UserError for values out of range."""
    for name, least in {"n": 1, "steps": 1, "batch": 1, "seed": 0, "cfg": 0}.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name} must be at least {least}")
    low, high = args.cfg_interval or (0, 1)
    if not 0 <= low < high <= 1:
        raise UserError("--cfg-interval takes two times, LOW below HIGH, between 0 (data) and 1 (noise)")
    options = {"amp": {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]}
    for name in ("seed", "steps", "batch", "compile", "vae", "cfg", "cfg_interval"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options

def parse_labels(words, model):
    """--labels for generate: "balanced", "random" or a list of class numbers. A name counts before a number."""
    if words in (["balanced"], ["random"]):
        return words[0]
    if not model.net.classes:
        raise UserError(f"{model.path} is unconditional: drop --labels")
    names, numbers = model.args.classes, []
    for word in words:
        if word in names:
            numbers.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            numbers.append(int(word))
        else:
            known = f"0 to {len(names) - 1}, or {', '.join(names[:5])}, .."
            raise UserError(f"--labels {word}: the classes of {model.path} are {known}")
    return numbers

def parse_args(argv=None):
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(usage="%(prog)s CKPT [CKPT ...] [flags]", description=__doc__.splitlines()[0],
                                     epilog="On 4 GPUs: torchrun --nproc_per_node=4 -- %(prog)s CKPT [flags]")
    add = parser.add_argument
    add("ckpt", nargs="+", metavar="CKPT", help="checkpoints, or run folders (their last.pt)")
    add("--n", type=int,
        help="images in all (default: 64; with a column for each class 8 each; with several CKPT 12 each)")
    add("--out", type=Path, help="new folder, FILE.npz or FILE.png (default: samples.png beside the first CKPT, "
        "of several samples_A-B.png)")
    add_sampling_flags(add)
    args = parser.parse_args(argv)
    if args.out is None:
        first = Path(args.ckpt[0])
        name = "samples"
        if len(args.ckpt) > 1:
            name = f"samples_{comparison_name(args.ckpt)}"
        elif first.suffix == ".pt" and first.stem != "last":  # another checkpoint of a run has a picture of its own
            name = f"samples_{first.stem}"
        args.out = (first if os.path.isdir(first) else first.parent) / f"{name}.png"
    suffix = args.out.suffix
    if len(args.ckpt) > 1 and suffix != ".png":
        parser.error("several checkpoints make the rows of one picture: give --out FILE.png")
    if suffix != ".png" and suffix.lower() in Image.registered_extensions():
        parser.error("pictures are PNG: give --out FILE.png, FILE.npz or a new folder")
    return args

def plan_grid(models, labels, n):
    """Number of images of each model, number of columns, and their names if every column is of one class."""
    model, labels = models[0], labels[0]
    drawn = 0  # number of classes that are drawn in turn
    if isinstance(labels, list):
        drawn = len(labels)
    elif labels == "balanced":
        drawn = model.net.classes
    one_class = False  # per column
    if len(models) > 1:  # a row per model
        n = columns = n or 12
        one_class = drawn > 0 and all(other.args.classes == model.args.classes for other in models)
    elif 1 < drawn <= MOST_COLUMNS:
        n, one_class = n or 8 * drawn, True
        columns = min(n, drawn)
    else:
        n = n or 64
        columns = math.ceil(n**0.5)
    if not one_class or not all(other.net.classes for other in models):
        return n, columns, []
    numbers = class_labels(range(columns), model.net.classes, labels, seed=0)
    return n, columns, [model.args.classes[i] for i in numbers]

def main(args):
    """Draw images from every checkpoint, each rank its blocks, and write them to args.out."""
    options = sampling_options(args)
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")

    # 1. What is drawn: mistakes show before the first image.
    models = [load_checkpoint(path, device, args.script) for path in args.ckpt]
    labels = [parse_labels(args.labels, model) for model in models]
    side = models[0].args.resolution
    for model in models:
        if model.args.resolution != side:
            raise UserError("the checkpoints have different resolutions: draw them into pictures of their own")
    n, columns, column_names = plan_grid(models, labels, args.n)
    draws = []
    for model, classes in zip(models, labels, strict=True):
        draws.append(generate(model, n, rank, world, labels=classes, **options))

    # 2. The images: each rank writes what it draws, so that nobody holds all of them.
    kind, parts = args.out.suffix.lower(), Path(f"{args.out}.parts")
    is_folder = kind not in (".png", ".npz")
    if args.out.is_dir() or (is_folder and args.out.exists()):
        raise UserError(f"{args.out} exists: choose a new name, so that its number of images is exact")
    if world > 1:
        dist.barrier()  # all have looked
    if rank == 0:
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
        parts.mkdir(parents=True)
    if world > 1:
        dist.barrier()
    for row, model in enumerate(models):
        evaluations, rounds = [], math.ceil(n / world / BLOCK)
        for indices, images, count in tqdm(draws[row], "sample", rounds, unit="block", disable=rank > 0):
            images = images.permute(0, 2, 3, 1).contiguous().numpy()
            if is_folder:
                for i, image in zip(indices, images, strict=True):
                    Image.fromarray(image).save(parts / f"{i:06d}.png")
            else:
                (parts / f"{row}_{indices.start}").write_bytes(images.tobytes())
            evaluations.append(count)
        if rank == 0:
            print(f"{model}, {n} images, NFE {np.mean(evaluations):.0f}")  # of this rank's blocks
            if model.net.classes:
                print(f"labels {labels[row]}")
    if world > 1:
        dist.barrier()  # all parts are written
        dist.destroy_process_group()

    # 3. The parts become the output, which is written whole before it takes the place of an older file.
    if rank > 0:
        return
    whole = parts / f"whole{kind}"
    blocks = ((parts / f"{row}_{i}").read_bytes() for row in range(len(models)) for i in range(0, n, BLOCK))
    if is_folder:
        os.rename(parts, args.out)
    elif kind == ".npz":
        write_npz(whole, blocks, (n, side, side, 3))
    else:
        row_names = []
        if len(models) > 1:
            row_names = [f"{model.name}\n{describe(model.args)}" for model in models]
        images = torch.frombuffer(bytearray().join(blocks), dtype=torch.uint8).view(-1, side, side, 3)
        draw_grid(images, columns, row_names, column_names).save(whole)
    if not is_folder:
        os.replace(whole, args.out)
    shutil.rmtree(parts, ignore_errors=True)
    print(f"wrote {args.out}")

if __name__ == "__main__":
    run_tool(main, parse_args())
