"""FID and Inception Score of checkpoints, folders of PNGs or npz files, in one file.

    python fid.py runs/NAME                                # 50 000 samples against its own training set
    python fid.py runs/NAME/epoch_*.pt --json fid.json     # the lowest counts, as in [P]
    python fid.py samples.npz --ref cifar100               # what sample.py wrote, npz or folder of PNGs
    torchrun --nproc_per_node=4 fid.py runs/LATENTS --ref VIRTUAL_imagenet256_labeled.npz --labels random   # as [ADM]

[FID] Heusel et al. 2017, arXiv:1706.08500   [IS] Salimans et al. 2016, arXiv:1606.03498
[P] DDAE++, arXiv:2505.10999, which says neither the number of samples nor the split nor the network. UNSPECIFIED: as
[DDAE] Xiang et al. 2023, arXiv:2303.09769: EMA weights, 50 000 samples against the training set at its own resolution
[ADM] Dhariwal & Nichol 2021, arXiv:2105.05233: its statistics (mu and sigma) are the reference at 256 pixels

How the number is made, since published ones differ (UNSPECIFIED: [P] names no library): the Inception of 2015-12-05,
weights and resize of pytorch-fid (half-pixel bilinear to 299, no antialiasing), float32 without TF32 or autocast.
The Inception Score reads the same single pass: softmax over all 1008 logits without the bias of fc, 10 splits of the
images in the order of numpy's RandomState(2020), as torch-fidelity splits them. DEVIATION: torch-fidelity resizes as
TensorFlow 1 did (no half-pixel shift), which would cost a second pass.
Not run with the public weights yet: the network is held to both libraries by random weights (tests/test_fid.py).

B batch   C,H,W image   N images   D = 2048 feature width   K = 1008 classes   S = 10 splits
"""

import argparse
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torchvision.models import inception
from tqdm import tqdm

import train_unet
from sample import TROUBLE, add_sampling_flags, generate, load_checkpoint, sampling, told
from train_unet import fail, open_image, read_checkpoint, setup_distributed

WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA = "6726825d"  # how the file's sha256 begins
LEAST, USUAL = 2048, 50_000  # images: fewer cannot fill the covariance; fewer make FID higher than published ones


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
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(branches, 1)


class Inception(inception.Inception3):
    """The FID Inception: torchvision's network but for its pools; names and shapes of pytorch-fid's weight file."""

    def __init__(self):
        mixed = [MixedA, inception.InceptionB, MixedC, inception.InceptionD, MixedE]
        blocks = [inception.BasicConv2d, *mixed, inception.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        self.Mixed_7c.pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)  # an oddity that FID needs

    def forward(self, x):
        """Images (B, 3, 299, 299) in [-1, 1] -> features (B, 2048) float32, unbiased logits (B, 1008) float64."""
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
    return 2 * F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1


def load_inception(path, device, rank=0):
    """The Inception in eval mode; its attribute sha says which weights these are.

    path: pytorch-fid's weight file, None for torch's hub cache, filled by a download if need be.
    Ends with exit status 2 where the weights are missing, damaged or of another network. A file of another hash is
    used, with a warning: its numbers compare with nothing published.
    """
    net = Inception()
    if path is None:
        try:
            with FileLock(Path(torch.hub.get_dir(), "inception.lock")):  # one downloads, the others wait
                state = torch.hub.load_state_dict_from_url(
                    WEIGHTS_URL, map_location="cpu", progress=rank == 0, check_hash=True, weights_only=True
                )
        except Exception:  # no network, a wrong hash, or whatever a damaged file in the cache may raise
            place = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_URL.split("/")[-1])
            fail(f"no intact Inception weights, no download: put {WEIGHTS_URL} at {place}, or give --weights FILE")
        net.sha = WEIGHTS_SHA
    else:
        state = read_checkpoint(path)
        net.sha = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    try:
        net.load_state_dict(state)
    except Exception:
        fail(f"{path or 'the hub cache'} holds another network than the FID Inception: download {WEIGHTS_URL}")
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


def score_splits(n, splits=10):
    """The split of the Inception Score that each of n images belongs to, (n,) int64; torch-fidelity's shuffle."""
    splits = min(splits, n)
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

    def __init__(self, width=2048, classes=1008, splits=10, device="cpu"):
        shapes = {"feat": (width,), "outer": (width, width)}  # sums of x and of x x^T
        shapes |= {"count": (splits,), "p": (splits, classes), "plogp": (splits,)}  # per split, p = softmax(logits)
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

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
        full = self.sums["count"] > 0  # fewer images than splits leave some empty
        count, p, plogp = (self.sums[name][full] for name in ("count", "p", "plogp"))
        marginal = p / count[:, None]  # (S, K)
        scores = (plogp / count - torch.xlogy(marginal, marginal).sum(1)).exp()  # (S,)
        return scores.mean().item(), scores.std(correction=0).item()


# ---- 3. Images ---------------------------------
class Images(NamedTuple):
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


def read_npz(path, *names):
    """Those of the named arrays that an npz holds, {name: array}; nothing is unpickled, and no other array is read."""
    try:
        with zipfile.ZipFile(path if os.path.isfile(path) else "") as file:  # a pipe would be waited for
            size = sum(file.getinfo(f"{name}.npy").file_size for name in names if f"{name}.npy" in file.namelist())
        if size > max(2**30, 100 * os.path.getsize(path)):
            raise ValueError  # images do not pack like this: a bomb
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except Exception:  # a damaged zip may raise anything
        fail(f"{path} does not exist or cannot be read as an npz (damaged, pickled or a bomb): make it anew")


def open_images(path, n, batch):
    """The first n images (None: all) of an npz or of a folder.

    Args:
        path: npz with arr_0, uint8 (N, H, W, 3), as sample.py and [ADM] write; or folder: PNGs directly inside it
            count, in the order of their names; dotfiles do not.
    """
    if path.is_dir():
        files = sorted(filter(Path.is_file, path.glob("[!.]*.[pP][nN][gG]")))[:n]
        if not files:
            fail(f"{path} holds no .png files: give a folder of PNGs, lossless as they were sampled, not JPEG")
        def read(file):
            with told(f"{file} cannot be read as an image"):
                return open_image(file)

        width, height = read(files[0]).size

        def fetch(indices):
            images = [read(files[i]) for i in indices]
            for i, image in zip(indices, images, strict=True):
                if image.size != (width, height):
                    fail(f"{files[i]} is not {width}x{height} as {files[0].name}: FID needs images of one size")
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

        return in_batches(str(path), len(files), (height, width), fetch, batch)
    array = read_npz(path, "arr_0").get("arr_0")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or len(array) == 0:
        found = "no arr_0" if array is None else f"{array.dtype} {array.shape}"
        fail(f"{path} has {found}: images are arr_0, uint8 of shape (N, H, W, 3), as sample.py --out FILE.npz writes")
    images = torch.from_numpy(array[:n]).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return in_batches(str(path), len(images), images.shape[2:], lambda i: images[i.start : i.stop], batch)


def open_samples(path, args, device):
    """What is to be scored: (Model or None, Images). Checkpoints sample on the fly, so that nothing is kept."""
    path = Path(path)
    run = path.is_dir() and any((path / name).exists() for name in ("last.pt", "args.json"))
    if path.suffix == ".npz" or (path.is_dir() and not run):
        return None, open_images(path, args.n, args.batch)
    model, options = load_checkpoint(path, device), sampling(args)
    generate(model, 0, **options)  # flags that do not fit end here, not after the reference

    def blocks(rank, world):
        for indices, images, _ in generate(model, args.n, rank, world, **options):
            yield indices, images

    name = f"{model}, labels {options['labels']}" if model.net.classes else str(model)
    return model, Images(name, args.n, (model.args.resolution,) * 2, blocks)


def check_images(images, size, args):
    """Refuse images whose covariance would be singular, or that have another size than what they are compared with."""
    if images.n < (2 if args.allow_few else LEAST):
        fail(f"{images.name}: {images.n} images, but FID needs {LEAST}, as many as features; to try, 2: --allow-few")
    if images.size != size:
        fail(f"{images.name} has {images.size[1]}x{images.size[0]} images, compared with {size[1]}x{size[0]}: unequal")


@torch.no_grad()
def measure(net, images, batch, rank=0, world=1):
    """Run the Inception over Images, each rank over its share, `batch` at a time -> Sums over all ranks."""
    device = net.fc.weight.device
    split, sums = score_splits(images.n), Sums(device=device)
    bar = tqdm(total=images.n, unit="img", desc="inception", disable=rank > 0)
    for indices, block in images.blocks(rank, world):
        assert block.shape[1:] == (3, *images.size), f"{images.name}: {tuple(block.shape)}, expected size {images.size}"
        splits = split[indices.start : indices.stop]
        for piece, s in zip(block.split(batch), splits.split(batch), strict=True):
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # FID moves with TF32
                x = preprocess(piece.to(device)).contiguous(memory_format=torch.channels_last)
                sums.update(*net(x), s.to(device))
        bar.update(min(world * len(indices), images.n - bar.n))
    bar.close()
    if world > 1:
        for value in sums.sums.values():
            dist.all_reduce(value)
    return sums


# ---- 4. The reference --------------------------
def read_statistics(path):
    """mu (2048,) and sigma (2048, 2048) of an npz, None, None if it has neither. Images that it holds stay unread."""
    stored = read_npz(path, "mu", "sigma")
    shapes = {key: array.shape for key, array in stored.items() if array.dtype.kind == "f"}
    if stored and shapes != {"mu": (2048,), "sigma": (2048, 2048)}:
        fail(f"{path} holds {shapes}: statistics are mu (2048,) and sigma (2048, 2048), floating-point numbers")
    return [torch.from_numpy(stored[key]) if stored else None for key in ("mu", "sigma")]


def dataset_reference(name, data, samples, net, args, rank, world):
    """Gaussian of a data set's training split at the samples' resolution, and what it was made from.

    Both are kept in DATA/.fid under a name with hashes of pixels and weights: what was made from others is not found.
    """
    flags = argparse.Namespace(dataset=name, data=data, resolution=samples.size[0])
    pixels = train_unet.load_data(flags, "train")[0]  # (N, 3, H, W) uint8, on every rank, whatever trained the network
    n, size = len(pixels), pixels.shape[2:]
    images = in_batches(f"the training set {name}", n, size, lambda i: pixels[i.start : i.stop], args.batch)
    check_images(images, samples.size, args)
    found = [None, None]  # rank 0 looks, for all: the hash, and whether the file exists
    if rank == 0:
        sha = hashlib.sha256(pixels.numpy()).hexdigest()[:16]
        cache = Path(data, ".fid", f"{Path(name).name}_train_{size[0]}_{sha}_{net.sha}.npz")
        found = [sha, cache.is_file()]
    if world > 1:
        dist.broadcast_object_list(found)
    made = {"dataset": name, "split": "train", "resolution": size[0], "count": n, "pixels": found[0]}
    if found[1]:
        return *(read_statistics(cache) if rank == 0 else (None, None)), made
    mean, cov = measure(net, images, args.batch, rank, world).gaussian()
    if rank == 0:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            tmp = cache.with_suffix(f".{os.getpid()}.tmp")
            with open(tmp, "wb") as file:
                np.savez(file, mu=mean.cpu().numpy(), sigma=cov.cpu().numpy())
            os.replace(tmp, cache)
        except OSError as error:  # a read-only data folder costs only the next run's time
            print(f"note: {cache} cannot be written ({error}): the reference is made again next time", file=sys.stderr)
    return mean, cov, made


def reference(model, samples, net, args, rank, world):
    """The Gaussian to compare with, on rank 0, and a dict that says what it is: mean (2048,), cov (2048, 2048), dict.

    --ref is read as files where it is a path or names a folder of PNGs; any other name is a data set.
    """
    name = args.ref or (model and model.args.dataset)
    if name is None:
        fail("--ref is missing: a folder or npz is compared with a data set, another folder or another npz")
    path = Path(name)
    if not args.ref or not (path.suffix == ".npz" or len(path.parts) > 1 or any(path.glob("*.png"))):
        data = args.data or (model.args.data if model else "./data")
        return dataset_reference(name, data, samples, net, args, rank, world)
    mean, cov = (None, None) if path.is_dir() else read_statistics(path)
    if mean is not None:
        if rank == 0:
            print(f"note: {path} holds statistics: whether resolution, resize and weights are ours cannot be checked")
        return mean, cov, {"statistics": str(path)}
    images = open_images(path, None, args.batch)
    check_images(images, samples.size, args)
    gaussian = measure(net, images, args.batch, rank, world).gaussian()
    return *gaussian, {"images": str(path), "resolution": images.size[0], "count": images.n}


# ---- 5. Flags and main -------------------------
def parse_args(argv=None):
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("samples", nargs="+", metavar="{CKPT,DIR,NPZ}", help="checkpoints, run folders, folders of PNGs or npz files")
    add("--ref", metavar="{DATASET,DIR,NPZ}", help="training split of a data set, folder of PNGs, npz of images or of "
        "mu and sigma (default: the data set that the first checkpoint was trained on)")  # fmt: skip
    add("--n", type=int, default=50_000, help="images, of a folder or npz the first (default: 50000, as DDAE++)")
    add("--allow-few", action="store_true", help=f"do not insist on {LEAST} images: to try things out")
    add("--weights", metavar="FILE", help="(default: pytorch-fid's, from torch's hub cache or the net)")
    add("--data", help="root of data sets (default: the checkpoint's, else ./data)")
    add("--json", type=Path, metavar="FILE", help="write the results here, too")
    add_sampling_flags(parser.add_argument_group("sampling from checkpoints, as in sample.py").add_argument)
    return parser.parse_args(argv)


@told("stopped", TROUBLE)
def main(args):
    """Score the samples. Rank 0 prints and writes; the number, of several the lowest, comes last on stdout."""
    sampling(args)  # its checks
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")  # of the sampler, as in sample.py; the Inception's stays full
    if args.json and rank == 0:
        if args.json.is_dir() or not os.access(args.json if args.json.exists() else f"{args.json.parent}/", os.W_OK):
            fail(f"cannot write {args.json}: name a file in a folder that exists")

    # 1. What is scored, with what, against what: mistakes show before the long part.
    opened = [open_samples(path, args, device) for path in args.samples]
    first, samples = opened[0]
    for model, images in opened:
        check_images(images, samples.size, args)
        if not args.ref and model and first and model.args.dataset != first.args.dataset:
            fail(f"{model.path} was trained on {model.args.dataset}, {first.path} on {first.args.dataset}: give --ref")
    net = load_inception(args.weights, device, rank)
    mean, cov, made = reference(first, samples, net, args, rank, world)
    if rank == 0:
        print(f"Inception: sha256 {net.sha}; score: 10 splits, order of RandomState(2020), 1008 unbiased logits")
        print("reference: " + ", ".join(f"{key} {value}" for key, value in made.items()))

    # 2. The numbers, printed and written as they come.
    results, lines = [], []
    for path, (model, images) in zip(args.samples, opened, strict=True):
        if rank == 0:
            print(f"samples: {images.n} images of {images.size[1]}x{images.size[0]} from {images.name}")
            if images.n < USUAL:
                print(f"warning: {images.n} samples: FID falls with their number, compare at {USUAL}", file=sys.stderr)
        sums = measure(net, images, args.batch, rank, world)
        if rank > 0:
            continue
        gaussians = mean, cov, *sums.gaussian()
        if not all(t.isfinite().all() for t in gaussians):
            fail("NaN or infinity among the features or in the reference: the weight file or the reference is damaged")
        fid, (score, spread) = frechet_distance(*gaussians), sums.inception_score()
        results.append({"fid": fid, "is_mean": score, "is_std": spread, "n": images.n, "samples": path})
        if model is not None:
            results[-1] |= {"checkpoint": str(model.path), "weights": "ema", "epoch": model.epoch, "step": model.step}
            results[-1] |= sampling(args) | {"amp": args.amp}
        if args.json:
            common = {"resolution": samples.size[0], "reference": made, "inception_sha256": net.sha}
            args.json.write_text(json.dumps({"results": results} | common, indent=2) + "\n")
            print(f"wrote {args.json}")
        which = f" ({path})" if len(opened) > 1 else ""
        lines.append(f"FID {fid:.2f}  IS {score:.2f} +- {spread:.2f}{which}")
        print(lines[-1])
    if len(results) > 1:
        lowest = min(range(len(results)), key=lambda i: results[i]["fid"])
        print("the lowest:", lines[lowest], sep="\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
