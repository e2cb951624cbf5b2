"""FID and Inception Score of checkpoints, folders of PNGs or npz files, in one file.

    python fid.py runs/NAME                                # 50 000 samples against its own training set
    python fid.py runs/NAME/epoch_*.pt --json fid.json     # the lowest counts, as in [P]
    python fid.py samples.npz --ref cifar100               # what sample.py wrote, npz or folder of PNGs
    torchrun --nproc_per_node=4 -- fid.py runs/LATENTS --ref VIRTUAL_imagenet256_labeled.npz --labels random

[FID] Heusel et al. 2017, arXiv:1706.08500   [IS] Salimans et al. 2016, arXiv:1606.03498
[P] DDAE++, arXiv:2505.10999   [DDAE] Xiang et al. 2023, arXiv:2303.09769
[ADM] Dhariwal & Nichol 2021, arXiv:2105.05233: its statistics (mu and sigma) are the reference at 256 pixels

UNSPECIFIED marks what [P] leaves open, DEVIATION where we differ from what we follow.

What is compared (UNSPECIFIED: [P] says neither the number of samples nor the split): as in [DDAE], EMA weights, 50 000
samples against the training set at its own resolution.

How the number is made, since published ones differ (UNSPECIFIED: [P] names no library): the Inception of 2015-12-05,
weights and resize of pytorch-fid (half-pixel bilinear to 299, no antialiasing), float32 without TF32 or autocast.
The Inception Score reads the same single pass: softmax over all 1008 logits without the bias of fc, 10 splits of the
images in the order of numpy's RandomState(2020), as torch-fidelity splits them. DEVIATION: torch-fidelity resizes as
TensorFlow 1 did (no half-pixel shift), which would cost a second pass.
Not run with the public weights yet: with random weights, the network equals both libraries' (tests/test_fid.py).

B batch   C,H,W image   N images   D = 2048 feature width   K = 1008 classes   S = 10 splits
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torchvision.models import inception
from tqdm import tqdm

import sample
from sample import UserError, generate, load_checkpoint, parse_labels, sampling_options

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
WEIGHTS_SHA = "6726825d"  # how the file's sha256 begins
LEAST_IMAGES = 2048  # as many as features; with fewer the number says little
USUAL_IMAGES = 50_000  # fewer make FID higher than published ones
SPLITS = 10  # of the Inception Score

# ---- 1. Inception-v3 of 2015-12-05 -------------
def avg_pool(x):
    """3x3 mean, stride 1; the padding is left out of the average, unlike in torchvision's Inception."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

class MixedA(inception.InceptionA):
    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(avg_pool(x))], 1)

class MixedC(inception.InceptionC):
    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(avg_pool(x))], 1)

class MixedE(inception.InceptionE):
    pool = staticmethod(avg_pool)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        branches += [self.branch_pool(self.pool(x))]
        return torch.cat(branches, 1)

class Inception(inception.Inception3):
    """The FID Inception: torchvision's network but for its pools; names and shapes of pytorch-fid's weight file."""

    def __init__(self):
        mixed = [MixedA, inception.InceptionB, MixedC, inception.InceptionD, MixedE]
        blocks = [inception.BasicConv2d, *mixed, inception.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        # An oddity that FID needs: the last block has maximum pooling.
        self.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)

    def forward(self, x):
        """Images (B, 3, 299, 299) in [-1, 1] -> features (B, 2048) float32, logits without fc's bias (B, 1008)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        feat = x.mean((2, 3))  # (B, 2048)
        return feat, feat.double() @ self.fc.weight.double().T

def preprocess(images):
    """What pytorch-fid feeds the Inception: uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [-1, 1]."""
    images = images.float() / 255
    return 2 * F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) - 1

def download_weights(rank, world):
    """The path of pytorch-fid's weights in torch's hub cache; rank 0 downloads them if need be, while others wait."""
    path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_FILE)
    if rank == 0 and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, path, hash_prefix=WEIGHTS_SHA)
        except (OSError, RuntimeError) as error:  # no network, or a wrong hash
            raise UserError(f"the Inception weights cannot be downloaded ({error}): put {WEIGHTS_URL} at {path}, "
                            "or give --weights FILE") from error
    if world > 1:
        dist.barrier()
    return path

def load_inception(path, device, rank=0, world=1):
    """The Inception in eval mode; its attribute sha says which weights these are.

    path: pytorch-fid's weight file, None for torch's hub cache, filled by a download if need be. A file of another
    hash is used, with a warning: its numbers compare with nothing published.
    Raises UserError where the weights are missing, damaged or of another network.
    """
    net = Inception()
    path = path or download_weights(rank, world)
    state = sample.read_weights(path)
    net.sha = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds another network than the FID Inception; take {WEIGHTS_URL}") from error
    if rank == 0 and net.sha != WEIGHTS_SHA:
        print(f"warning: {path} is not pytorch-fid's file (sha256 {net.sha}, not {WEIGHTS_SHA}): "
              "these numbers compare with no others", file=sys.stderr)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

# ---- 2. Frechet distance and Inception Score ----
def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr A + tr B - 2 tr sqrt(A B), between two Gaussians. [FID]

    With A = L L^T, A B has the eigenvalues of the symmetric L^T B L, so that eigh in float64 gives the trace of the
    root: no complex numbers, nothing added to the diagonal; singular covariances are fine.

    mean_a, mean_b: (D,); cov_a, cov_b: (D, D), symmetric -> float, at least 0.
    """
    mean_a, cov_a, mean_b, cov_b = (t.double().cpu() for t in (mean_a, cov_a, mean_b, cov_b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()  # (D, D), L of A = L L^T; rounding leaves negatives of 1e-16
    trace_root = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return max(0.0, distance.item())

def assign_splits(n):
    """The split of the Inception Score that each of n images belongs to, (n,) int64; torch-fidelity's shuffle."""
    splits = min(SPLITS, n)
    order = np.random.RandomState(2020).permutation(n)
    split = torch.empty(n, dtype=torch.int64)
    for s in range(splits):
        split[order[s * n // splits : (s + 1) * n // splits]] = s
    return split

class Sums:
    """Running float64 sums: all that both numbers need, 34 MB whatever N is, and what ranks add up.

    The features of ImageNet would be 10 GB. Summing x x^T and removing the mean afterwards costs no accuracy here:
    features are of order 1, so float64 keeps 13 digits (tests/test_fid.py compares with two passes).
    """

    def __init__(self, width=2048, classes=1008, device="cpu"):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.sums = {
            "feat": zeros(width), "outer": zeros(width, width),  # sums of x and of x x^T
            "count": zeros(SPLITS), "p": zeros(SPLITS, classes), "plogp": zeros(SPLITS),  # p = softmax(logits)
        }  # fmt: skip

    def update(self, feat, logits, split):
        """Add images: feat (B, D), logits (B, K), split (B,) int64 below S."""
        feat, logp = feat.double(), logits.double().log_softmax(1)
        p = logp.exp()  # (B, K)
        self.sums["count"].index_add_(0, split, torch.ones_like(p[:, 0]))
        self.sums["feat"] += feat.sum(0)
        self.sums["outer"] += feat.T @ feat
        self.sums["p"].index_add_(0, split, p)
        self.sums["plogp"].index_add_(0, split, (p * logp).sum(1))

    def gaussian(self):
        """Mean (D,) and covariance (D, D) over n - 1, float64."""
        n = self.sums["count"].sum()
        mean = self.sums["feat"] / n
        return mean, (self.sums["outer"] - n * torch.outer(mean, mean)) / (n - 1)

    def inception_score(self):
        """exp of the mean KL(p(y|x), p(y)) of a split; mean and population standard deviation over splits. [IS]"""
        nonempty = self.sums["count"] > 0  # fewer images than splits leave some empty
        count, p, plogp = (self.sums[name][nonempty] for name in ("count", "p", "plogp"))
        marginal = p / count[:, None]  # (S, K)
        # mean KL = mean of sum p log p - sum of marginal log marginal
        scores = (plogp / count - torch.xlogy(marginal, marginal).sum(1)).exp()  # (S,)
        return scores.mean().item(), scores.std(correction=0).item()

# ---- 3. Images ---------------------------------
@dataclass
class Images:
    """Images to be measured, and how a rank gets its share of them."""
    name: str
    n: int
    size: tuple  # (H, W)
    blocks: Callable  # (rank, world) -> iterator of (range of indices, uint8 (B, 3, H, W) on the CPU)

def in_batches(name, n, size, fetch, batch):
    """Images that fetch(range of indices) reads: rank r takes batches r, r + world, ..."""
    def blocks(rank, world):
        for first in range(rank * batch, n, world * batch):
            indices = range(first, min(first + batch, n))
            yield indices, fetch(indices)

    return Images(name, n, tuple(size), blocks)

def in_memory(name, images, batch):
    """Images of a tensor, uint8 (N, 3, H, W)."""
    def fetch(indices):
        return images[indices.start : indices.stop]

    return in_batches(name, len(images), images.shape[2:], fetch, batch)

def read_npz(path, *names):
    """Those of the named arrays that an npz holds, {name: array}; nothing is unpickled, and no other array is read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Exception as error:  # a damaged zip may raise anything; a bare .npy ends here, too
        reason = sample.first_line(error)
        raise UserError(f"{path} cannot be read as an npz ({reason}): make it anew") from error

def open_npz(path, n, batch):
    """The first n images (None: all) of an npz: arr_0, uint8 (N, H, W, 3), as sample.py and [ADM] write it."""
    array = read_npz(path, "arr_0").get("arr_0")
    if array is None:
        raise UserError(f"{path} has no arr_0, where sample.py writes images, uint8 (N, H, W, 3)")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or len(array) == 0:
        raise UserError(f"{path} holds {array.dtype} {array.shape}, but images are uint8 (N, H, W, 3)")
    return in_memory(str(path), torch.from_numpy(array[:n]).permute(0, 3, 1, 2), batch)

def read_png(path):
    """A PNG of 8 bits, RGB, gray or of a palette, as uint8 (H, W, 3). Gray of 16 bits and transparency are refused."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in ("RGB", "L", "P") or image.has_transparency_data:
                raise ValueError(f"{image.mode}, or transparent: convert it to RGB of 8 bits")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error})") from error

def open_folder(path, n, batch):
    """The first n images (None: all) of a folder: the PNGs directly inside, by name; hidden files do not count."""
    files = [file for file in path.glob("[!.]*") if file.suffix.lower() == ".png" and file.is_file()]
    files = sorted(files)[:n]
    if not files:
        raise UserError(f"{path} holds no .png files; JPEGs would change the number")
    height, width, _ = read_png(files[0]).shape

    def fetch(indices):
        images = [read_png(files[i]) for i in indices]
        for i, image in zip(indices, images, strict=True):
            if image.shape != (height, width, 3):
                raise UserError(f"{files[i]} is not {width}x{height} as {files[0].name}, FID needs one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    return in_batches(str(path), len(files), (height, width), fetch, batch)

def open_images(path, n, batch):
    """The first n images (None: all) of an npz or of a folder of PNGs."""
    return open_folder(path, n, batch) if path.is_dir() else open_npz(path, n, batch)

def open_samples(path, args, device):
    """What is to be scored: (Model or None, Images). Checkpoints sample on the fly, so that nothing is kept."""
    path = Path(path)
    is_run = (path / "last.pt").exists() or (path / "args.json").exists()
    if path.suffix.lower() == ".npz" or (path.is_dir() and not is_run):
        return None, open_images(path, args.n, args.batch)
    if path.is_file() and path.suffix != ".pt":
        raise UserError(f"{path}: give an npz, a folder of PNGs, or a checkpoint (.pt)")
    model, options = load_checkpoint(path, device, args.script), sampling_options(args)
    options["labels"] = parse_labels(args.labels, model)
    generate(model, 0, **options)  # samples nothing, but raises for flags that do not fit this model

    def blocks(rank, world):
        for indices, images, _ in generate(model, args.n, rank, world, **options):
            yield indices, images

    name = f"{model}, labels {options['labels']}" if model.net.classes else str(model)
    side = model.args.resolution
    return model, Images(name, args.n, (side, side), blocks)

def check_images(images, size, args):
    """Refuse too few images, and those of another size than what they are compared with."""
    least = 2 if args.allow_few else LEAST_IMAGES
    if images.n < least:
        raise UserError(f"{images.name}: {images.n} images, but FID needs {LEAST_IMAGES}, as many as features; "
                        "to try things out with 2 or more: --allow-few")
    if images.size != size:
        raise UserError(f"{images.name} has {images.size[1]}x{images.size[0]} images, "
                        f"compared with {size[1]}x{size[0]}: unequal")

@torch.no_grad()
def measure(net, images, batch, rank=0, world=1):
    """Run the Inception over Images, each rank over its share, `batch` at a time -> Sums over all ranks."""
    device = net.fc.weight.device
    split_of_image, sums = assign_splits(images.n), Sums(device=device)
    bar = tqdm(total=images.n, unit="img", desc="inception", disable=rank > 0)
    for indices, block in images.blocks(rank, world):
        splits = split_of_image[indices.start : indices.stop]
        for piece, piece_splits in zip(block.split(batch), splits.split(batch), strict=True):
            x = preprocess(piece.to(device)).contiguous(memory_format=torch.channels_last)
            # FID would move with TF32.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                feat, logits = net(x)
            sums.update(feat, logits, piece_splits.to(device))
        bar.update(min(world * len(indices), images.n - bar.n))  # the other ranks are about as far
    bar.close()
    if world > 1:
        for value in sums.sums.values():
            dist.all_reduce(value)
    return sums

# ---- 4. The reference --------------------------
def read_statistics(path):
    """(mu (2048,), sigma (2048, 2048)) of an npz, or None if it has neither. Images that it holds stay unread."""
    stored = read_npz(path, "mu", "sigma")
    if not stored:
        return None
    shapes = {name: array.shape for name, array in stored.items() if array.dtype.kind == "f"}
    if shapes != {"mu": (2048,), "sigma": (2048, 2048)}:
        raise UserError(f"{path} holds {shapes}, not floats mu (2048,) and sigma (2048, 2048)")
    return torch.from_numpy(stored["mu"]), torch.from_numpy(stored["sigma"])

def dataset_reference(script, name, data, size, net, args, rank, world):
    """Mean and covariance (on rank 0) of a data set's training split at the samples' size, and what they are made from.

    They are kept in DATA/.fid under a name with hashes of pixels and weights, so that other ones have another file.
    script: the train script whose load_data reads the pixels.
    """
    flags = argparse.Namespace(dataset=name, data=data, resolution=size[0], cache_latents=None)  # pixels, not latents
    pixels, _, _ = script.load_data(flags, "train")  # (N, 3, H, W) uint8, on every rank
    images = in_memory(f"the training set {name}", pixels, args.batch)
    check_images(images, size, args)
    pixel_hash = hashlib.sha256(pixels.numpy()).hexdigest()[:16]
    cache = Path(data, ".fid", f"{Path(name).name}_train_{size[0]}_{pixel_hash}_{net.sha}.npz")
    made_from = {"dataset": name, "split": "train", "resolution": size[0], "count": len(pixels), "pixels": pixel_hash}
    is_stored = [cache.is_file()]  # a list, as broadcast_object_list wants
    if world > 1:
        dist.broadcast_object_list(is_stored)  # rank 0's answer, for all
    if is_stored[0]:
        statistics = read_statistics(cache) if rank == 0 else None
        return statistics, made_from
    mean, cov = measure(net, images, args.batch, rank, world).gaussian()
    if rank == 0:
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, mu=mean.cpu().numpy(), sigma=cov.cpu().numpy())
            os.replace(temporary, cache)
        except OSError as error:  # a read-only data folder costs only the next run's time
            if temporary.is_file():
                temporary.unlink()
            print(f"note: the reference is not kept for the next time ({error})", file=sys.stderr)
    return (mean, cov), made_from

def is_path(name):
    """Whether --ref names files: an npz, a path with "/", or a folder here that is no data set with train/."""
    path = Path(name)
    if path.suffix.lower() == ".npz" or "/" in name:
        return True
    return path.is_dir() and not (path / "train").is_dir()

def reference(model, size, net, args, rank, world):
    """What samples of a size (H, W) are compared with: its mean (2048,) and covariance (2048, 2048), on rank 0, and
    a dict that says what it is. By default it is the data set that the model was trained on.
    """
    name = args.ref
    if name is None:
        if model is None:
            raise UserError("--ref is missing: a data set, folder or npz to compare with")
        name = model.args.dataset
    is_dataset = args.ref is None or not is_path(name)
    if is_dataset:
        data = args.data or (model.args.data if model else "./data")
        script = model.script if model else importlib.import_module("train_unet")  # all read data alike
        return dataset_reference(script, name, data, size, net, args, rank, world)
    path = Path(name)
    statistics = None if path.is_dir() else read_statistics(path)
    if statistics:
        if rank == 0:
            print(f"note: whether {path} was made with our resize and weights cannot be checked")
        return statistics, {"statistics": str(path)}
    images = open_images(path, None, args.batch)
    check_images(images, size, args)
    gaussian = measure(net, images, args.batch, rank, world).gaussian()
    return gaussian, {"images": str(path), "resolution": images.size[0], "count": images.n}

# ---- 5. Flags and main -------------------------
def parse_args(argv=None):
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(usage="%(prog)s SAMPLES [SAMPLES ...] [flags]",
                                     description=__doc__.splitlines()[0],
                                     epilog="On 4 GPUs: torchrun --nproc_per_node=4 -- %(prog)s SAMPLES [flags]")
    add = parser.add_argument
    add("samples", nargs="+", metavar="SAMPLES", help="checkpoints, run folders, folders of PNGs, npz files")
    add("--ref", metavar="REF",
        help="a data set (its training split), folder of PNGs, or npz of images (arr_0) or of statistics (mu, sigma) "
        "(default: the data set of the first SAMPLES, a checkpoint)")
    add("--n", type=int, default=50_000, help="images to score; of files the first (default: 50000)")
    add("--allow-few", action="store_true", help=f"accept fewer than {LEAST_IMAGES} images, for a try")
    add("--weights", metavar="FILE", help="pytorch-fid's Inception (default: torch's hub cache, or a download)")
    add("--data", metavar="ROOT", help="folder of data sets (default: the checkpoint's, else ./data)")
    add("--json", type=Path, metavar="FILE", help="write the results here, too")
    add = parser.add_argument_group("sampling from checkpoints, as in sample.py").add_argument
    sample.add_sampling_flags(add)
    return parser.parse_args(argv)

def score(sums, gaussian):
    """FID against a reference, Inception Score, and its standard deviation."""
    ours = sums.gaussian()
    for tensor in (*gaussian, *ours):
        if not tensor.isfinite().all():
            raise UserError("NaN or infinity among the features or in the reference: a damaged file")
    return frechet_distance(*gaussian, *ours), *sums.inception_score()

def score_line(result, with_path):
    """The numbers as they are printed: `FID 7.14  IS 8.31 +- 0.10`."""
    text = f"FID {result['fid']:.2f}  IS {result['is_mean']:.2f} +- {result['is_std']:.2f}"
    return f"{text} ({result['samples']})" if with_path else text

def describe_sampling(model, args):
    """What the samples of a model depend on, flags or defaults of its sampler: a dict of plain values."""
    facts = {"seed": args.seed, "amp": args.amp}
    names = ["steps", "shift"]
    if model.net.classes:
        names += ["cfg", "cfg_interval"]
    for name, parameter in inspect.signature(model.diffusion.sample).parameters.items():
        if name in names:
            given = getattr(args, name, None)  # shift has no flag
            facts[name] = parameter.default if given is None else given
    if model.net.classes:
        facts["labels"] = args.labels
    return facts

def main(args):
    """Score the samples. Rank 0 prints and writes; the number, of several the lowest, comes last on stdout."""
    sampling_options(args)  # raises for values out of range
    rank, world, device = sample.setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")  # as in sample.py; the Inception's stays full
    if args.json:
        sample.check_writable(args.json)

    # 1. What is scored, with what, against what: mistakes show before the long part.
    opened = [open_samples(path, args, device) for path in args.samples]
    first_model, first_images = opened[0]
    for model, images in opened:
        check_images(images, first_images.size, args)
        if model and first_model and model.args.dataset != first_model.args.dataset and not args.ref:
            other = f"{first_model.path} on {first_model.args.dataset}"
            raise UserError(f"{model.path} was trained on {model.args.dataset}, {other}: give --ref")
    net = load_inception(args.weights, device, rank, world)
    gaussian, made_from = reference(first_model, first_images.size, net, args, rank, world)
    if rank == 0:
        print(f"Inception: sha256 {net.sha}; score: 10 splits by RandomState(2020), 1008 logits without bias")
        print("reference: " + ", ".join(f"{name} {value}" for name, value in made_from.items()))

    # 2. The numbers, printed and written as they come.
    results = []
    for path, (model, images) in zip(args.samples, opened, strict=True):
        if rank == 0:
            print(f"samples: {images.n} images of {images.size[1]}x{images.size[0]} from {images.name}")
            if images.n < USUAL_IMAGES:
                print(f"warning: {images.n} samples: FID falls with their number, compare at {USUAL_IMAGES}",
                      file=sys.stderr)
        sums = measure(net, images, args.batch, rank, world)
        if rank > 0:
            continue
        fid, score_mean, score_std = score(sums, gaussian)
        result = {"fid": fid, "is_mean": score_mean, "is_std": score_std, "n": images.n, "samples": path}
        if model:
            result.update(checkpoint=str(model.path), weights="ema", epoch=model.epoch)
            result.update(step=model.step, **describe_sampling(model, args))
        results.append(result)
        if args.json:
            content = {"results": results, "resolution": first_images.size[0]}
            content.update(reference=made_from, inception_sha256=net.sha)
            args.json.write_text(json.dumps(content, indent=2) + "\n")
            print(f"wrote {args.json}")
        print(score_line(result, len(opened) > 1))
    if len(results) > 1:
        lowest = min(results, key=lambda result: result["fid"])
        print("the lowest:", score_line(lowest, with_path=True), sep="\n")
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    sample.run_tool(main, parse_args())
