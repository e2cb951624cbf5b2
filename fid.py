"""FID and Inception Score of a checkpoint, a folder of PNGs or an npz, in one file: the Inception is inline.

    python fid.py runs/NAME                                           # 50 000 samples against its own training set
    python fid.py samples.npz --ref cifar100                          # what sample.py wrote, npz or folder of PNGs
    python fid.py samples.npz --ref adm.npz --json fid.json           # against stored statistics (mu and sigma)
    torchrun --nproc_per_node=4 fid.py runs/NAME --weights pt_inception-2015-12-05-6726825d.pth

[FID] Heusel et al. 2017, arXiv:1706.08500   [IS] Salimans et al. 2016, arXiv:1606.03498
[P] DDAE++, arXiv:2505.10999: EMA weights, 50 000 samples against the training set at its own resolution

How the number is made, since published ones differ (UNSPECIFIED: [P] names no library): the Inception of 2015-12-05,
weights and resize of pytorch-fid (half-pixel bilinear to 299, no antialiasing), float32 without TF32 or autocast.
The Inception Score reads the same single pass: softmax over all 1008 logits without the bias of fc, 10 splits of the
images in the order of numpy's RandomState(2020), as torch-fidelity splits them. DEVIATION: torch-fidelity resizes as
TensorFlow 1 did (no half-pixel shift), which would cost a second pass; how far that moves the score is not measured.
Not run with the public weights yet: the network is held to both libraries by random weights (tests/test_fid.py).

B batch   C,H,W image   N images   D = 2048 feature width   K = 1008 classes   S = 10 splits
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from sample import add_sampling_flags, fail, generate, load_checkpoint, sampling, setup_distributed

WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA = "6726825d"  # how the file's sha256 begins
LEAST, USUAL = 2048, 50_000  # images: fewer make the covariance singular; fewer make FID higher than published ones


# ---- 1. Inception-v3 of 2015-12-05 -----------------------------------------------------------------
class Conv(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; padded by half the kernel unless pad is False."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, pad=True):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def avg_pool(x):
    """3x3 mean, stride 1; the padding is left out of the average, unlike in torchvision's Inception."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(c_in, 48), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 64), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(c_in, c_pool)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(avg_pool(x))], 1)


class Mixed6a(nn.Module):
    def __init__(self, c_in):
        super().__init__()
        self.branch3x3 = Conv(c_in, 384, 3, stride=2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 64), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, pad=False)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed6(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, c), Conv(c, c, (1, 7))
        self.branch7x7_3 = Conv(c, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, c), Conv(c, c, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c, c, (1, 7)), Conv(c, c, (7, 1))
        self.branch7x7dbl_5 = Conv(c, 192, (1, 7))
        self.branch_pool = Conv(768, 192)

    def forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(avg_pool(x))], 1)


class Mixed7a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, 3, stride=2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, pad=False)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed7(nn.Module):
    def __init__(self, c_in, max_pool):
        super().__init__()
        self.branch1x1 = Conv(c_in, 320)
        self.branch3x3_1 = Conv(c_in, 384)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(c_in, 448), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch_pool = Conv(c_in, 192)
        self.max_pool = max_pool

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else avg_pool(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """The FID Inception: names and shapes of pytorch-fid's weight file, which are those of torchvision."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a, self.Mixed_6b = Mixed6a(288), Mixed6(128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = Mixed6(160), Mixed6(160), Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, max_pool=False)
        self.Mixed_7c = Mixed7(2048, max_pool=True)  # the maximum is an oddity of this network: FID needs it
        self.fc = nn.Linear(2048, 1008)

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


def load_inception(path, device, rank=0, world=1):
    """The Inception with pytorch-fid's weights, from a file or from torch's hub cache, filled by a download if need be.

    Args:
        path: the weight file, None for the cache.
    Returns:
        Inception in eval mode; its attributes path and sha256 tell which weights these are.
    Ends with exit status 2 where the weights are missing, damaged or of another network. A file of another hash is
    used, with a warning: its numbers compare with nothing published.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.split("/")[-1]
        if rank > 0:
            dist.barrier()  # rank 0 downloads, the others find the file
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA, progress=rank == 0)
            except (OSError, RuntimeError) as error:  # no network; or the wrong hash
                fail(f"no Inception weights ({error}): put {WEIGHTS_URL} at {path}, or give it as --weights FILE")
        if rank == 0 and world > 1:
            dist.barrier()
    elif not Path(path).is_file():
        fail(f"--weights {path} does not exist: download {WEIGHTS_URL} and give where you put it")
    inception = Inception()
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        inception.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError):
        fail(f"{path} is damaged or holds another network than the FID Inception: download {WEIGHTS_URL}")
    if rank == 0 and not digest.startswith(WEIGHTS_SHA):
        print(f"warning: {path} is not pytorch-fid's file (sha256 {digest[:8]}, not {WEIGHTS_SHA}): "
              "these numbers compare with no others", file=sys.stderr)
    inception.path, inception.sha256 = str(path), digest
    return inception.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---- 2. Frechet distance and Inception Score -------------------------------------------------------
def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr A + tr B - 2 tr sqrt(A B), between two Gaussians. [FID]

    With A = L L^T, A B has the eigenvalues of the symmetric L^T B L, so that eigh in float64 gives the trace of the
    root: no complex numbers, nothing added to the diagonal; singular covariances are fine.

    Args:
        mean_a, mean_b: (D,); cov_a, cov_b: (D, D), symmetric.
    Returns:
        float, at least 0.
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

    def all_reduce(self):
        """Add up the sums of all ranks, on every rank."""
        for value in self.sums.values():
            dist.all_reduce(value)

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


# ---- 3. Images: a checkpoint's, a folder's, an npz's -----------------------------------------------
@dataclasses.dataclass
class Images:
    """Images to be measured, and how a rank gets its share of them."""

    name: str
    n: int
    size: tuple  # (H, W)
    blocks: Callable  # (rank, world) -> iterator of (range of indices, uint8 (B, 3, H, W) on the CPU)


def shared(name, n, size, fetch, batch):
    """Images that fetch(range of indices) reads: rank r takes batches r, r + world, ..."""

    def blocks(rank, world):
        for first in range(rank * batch, n, world * batch):
            indices = range(first, min(first + batch, n))
            yield indices, fetch(indices)

    return Images(name, n, tuple(size), blocks)


def shared_tensor(name, images, batch):
    """Images of a tensor, uint8 (N, 3, H, W)."""
    return shared(name, len(images), images.shape[2:], lambda indices: images[indices.start : indices.stop], batch)


def read_npz(path, *names):
    """Those of the named arrays that an npz holds, {name: array}; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error):
        fail(f"{path} cannot be read as an npz (damaged, cut short or pickled): delete it and make it anew")


def read_png(path):
    """One PNG -> uint8 (3, H, W)."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "L", "P"):  # alpha and 16 bits have no one way to 8-bit RGB
                fail(f"{path} has colour mode {image.mode}: save 8-bit RGB without alpha")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        fail(f"{path} is no image that Pillow reads: replace it or take it out of the folder")


def open_images(path, n, batch):
    """The images of an npz (arr_0: uint8 (N, H, W, 3), as sample.py and ADM write) or of a folder of PNGs.

    Args:
        path: existing npz or folder; PNGs directly inside it count, in the order of their names.
        n: take the first n of them, None for all.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".png")[:n]
        if not files:
            fail(f"{path} holds no .png files: give a folder of PNGs, lossless as they were sampled, not JPEG")
        shape = read_png(files[0]).shape  # (3, H, W)

        def fetch(indices):
            images = [read_png(files[i]) for i in indices]
            odd = next((i for i, image in zip(indices, images, strict=True) if image.shape != shape), None)
            if odd is not None:
                fail(f"{files[odd]} is not {shape[2]}x{shape[1]} as {files[0].name}: FID needs one size, sort them out")
            return torch.stack(images)

        return shared(str(path), len(files), shape[1:], fetch, batch)
    array = read_npz(path, "arr_0").get("arr_0")
    if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or len(array) == 0:
        found = "no arr_0" if array is None else f"{array.dtype} {array.shape}"
        fail(f"{path} has {found}: images are arr_0, uint8 of shape (N, H, W, 3), as sample.py --out FILE.npz writes")
    return shared_tensor(str(path), torch.from_numpy(array[:n]).permute(0, 3, 1, 2), batch)  # (N, 3, H, W)


def open_samples(args, device):
    """What is to be scored: (Model or None, Images). Checkpoints sample on the fly, so that nothing is kept."""
    path = Path(args.samples)
    if not path.exists():
        fail(f"{path} does not exist: give a checkpoint, its run folder, a folder of PNGs or an npz")
    run = path.is_dir() and any((path / name).exists() for name in ("last.pt", "args.json"))
    if path.suffix == ".npz" or (path.is_dir() and not run):
        return None, open_images(path, args.n, args.batch)
    model, options = load_checkpoint(path, device), sampling(args)

    def blocks(rank, world):
        for indices, images, _ in generate(model, args.n, rank, world, **options):
            yield indices, images

    name = f"{model}, {args.labels} labels" if model.net.classes else str(model)
    return model, Images(name, args.n, (model.args.resolution,) * 2, blocks)


@torch.no_grad()
def measure(inception, images, batch, rank=0, world=1):
    """Run the Inception over a set of images, each rank over its share.

    Args:
        inception: an Inception, on the device to be used.
        images: Images. batch: images per pass.
    Returns:
        Sums over all ranks.
    """
    device = inception.fc.weight.device
    split, sums = score_splits(images.n), Sums(device=device)
    bar = tqdm(total=images.n, unit="img", desc="inception", disable=rank > 0)
    for indices, block in images.blocks(rank, world):
        assert block.shape[1:] == (3, *images.size), f"{images.name}: {tuple(block.shape)}, expected size {images.size}"
        splits = split[indices.start : indices.stop]
        for piece, s in zip(block.split(batch), splits.split(batch), strict=True):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would move FID in the decimals
                x = preprocess(piece.to(device)).contiguous(memory_format=torch.channels_last)
                sums.update(*inception(x), s.to(device))
        bar.update(min(world * len(indices), images.n - bar.n))
    bar.close()
    if world > 1:
        sums.all_reduce()
    return sums


# ---- 4. The reference ------------------------------------------------------------------------------
def check_count(images, args):
    """Refuse a number of images whose covariance would be singular."""
    if images.n < (2 if args.allow_few else LEAST):
        fail(f"{images.name}: {images.n} images, but FID needs {LEAST}, as many as features: take more (--n), "
             "or --allow-few to try things out with 2 or more")  # fmt: skip


def check_reference(images, samples, args):
    """Refuse a reference that is too small or of another resolution."""
    check_count(images, args)
    if images.size != samples.size:
        ours, theirs = (f"{i.name} has {i.size[1]}x{i.size[0]} images" for i in (samples, images))
        fail(f"{ours}, {theirs}: FID compares at one resolution, take a reference of the samples'")


def dataset_reference(name, model, samples, inception, args, rank, world):
    """Gaussian of a data set's training split at the samples' resolution, and what it was made from.

    Both are cached in ROOT/.fid, with hashes of pixels and weights. A cache that was made from anything else is an
    error, because a silently wrong reference spoils every number.
    """
    if model is not None and model.script.__name__ != "train_dit":
        script, flags = model.script, argparse.Namespace(**vars(model.args))
        flags.dataset, flags.data = name, args.data or flags.data
    else:  # no train script, or one that loads latents: train_unet.py reads the pixels
        script = importlib.import_module("train_unet")
        data = args.data or (model.args.data if model else "./data")
        flags = script.parse_args(["--dataset", name, "--data", data, "--resolution", str(samples.size[0])])
    pixels = script.load_data(flags, "train")[0]  # (N, 3, H, W) uint8, on every rank
    images = shared_tensor(f"the training set {name}", pixels, args.batch)
    check_reference(images, samples, args)
    made = {"dataset": name, "split": "train", "resolution": flags.resolution, "count": images.n}
    made |= {"pixels": hashlib.sha256(pixels.numpy()).hexdigest(), "inception": inception.sha256}
    cache = Path(flags.data) / ".fid" / f"{name}_train_{flags.resolution}_{inception.sha256[:8]}.npz"
    cached = [cache.is_file()]
    if world > 1:
        dist.broadcast_object_list(cached)  # all ranks measure, or none
    if not cached[0]:
        mean, cov = measure(inception, images, args.batch, rank, world).gaussian()
        if rank == 0:
            write_cache(cache, mu=mean.cpu().numpy(), sigma=cov.cpu().numpy(), made_from=json.dumps(made))
        return mean, cov, made
    if rank > 0:
        return None, None, made  # rank 0 holds the file and computes the distance
    stored = read_npz(cache, "mu", "sigma", "made_from")
    old = json.loads(str(stored.get("made_from", "{}")))
    odd = ", ".join(f"{key} was {old.get(key)}, is {made[key]}" for key in made if old.get(key) != made[key])
    if odd:
        fail(f"{cache} was made from something else ({odd}): delete it, or bring back what it was made from")
    return torch.from_numpy(stored["mu"]), torch.from_numpy(stored["sigma"]), made | {"cache": str(cache)}


def write_cache(path, **arrays):
    """Write, then rename; a read-only data folder costs only the next run's time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_suffix(f".{os.getpid()}.tmp")
        with open(tmp, "wb") as file:
            np.savez(file, **arrays)
        os.replace(tmp, path)
    except OSError as error:
        print(f"note: {path} cannot be written ({error}): the reference is made again next time", file=sys.stderr)


def reference(model, samples, inception, args, rank, world):
    """The Gaussian to compare with and a dict that says what it is: mean (2048,), cov (2048, 2048), dict.

    --ref is read as files where it is a path or names a folder of PNGs; any other name is a data set.
    """
    name = args.ref or (model and model.args.dataset)
    if name is None:
        fail("--ref is missing: a folder or npz is compared with a data set, another folder or another npz")
    path = Path(name)
    if not args.ref or not (path.suffix == ".npz" or len(path.parts) > 1 or any(path.glob("*.png"))):
        return dataset_reference(name, model, samples, inception, args, rank, world)
    if not path.exists():
        fail(f"--ref {path} does not exist: give a data set's name, a folder of PNGs or an npz")
    stored = {} if path.is_dir() else read_npz(path, "mu", "sigma")
    if not stored:
        images = open_images(path, None, args.batch)
        check_reference(images, samples, args)
        gaussian = measure(inception, images, args.batch, rank, world).gaussian()
        return *gaussian, {"images": str(path), "resolution": list(images.size), "count": images.n}
    shapes = {key: array.shape for key, array in stored.items()}
    if shapes != {"mu": (2048,), "sigma": (2048, 2048)}:
        fail(f"{path} holds {shapes}: statistics are mu (2048,) and sigma (2048, 2048)")
    if rank == 0:
        print(f"note: {path} holds statistics only: whether resolution, resize and weights are ours cannot be checked")
    return torch.from_numpy(stored["mu"]), torch.from_numpy(stored["sigma"]), {"statistics": str(path)}


# ---- 5. Flags and main -----------------------------------------------------------------------------
def parse_args(argv=None):
    """Flags -> Namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("samples", metavar="{CKPT,DIR,NPZ}", help="checkpoint, run folder, folder of PNGs or npz")
    parser.add_argument("--ref", metavar="{DATASET,DIR,NPZ}",
                        help="training split of a data set, folder of PNGs, npz of images or of mu and sigma; "
                             "None: the data set that the checkpoint was trained on")  # fmt: skip
    parser.add_argument("--n", type=int, default=50_000, help="images; a folder's or npz's first ones ([P])")
    parser.add_argument("--allow-few", action="store_true", help=f"do not insist on {LEAST} images: to try things out")
    parser.add_argument("--weights", metavar="FILE", help="None: pytorch-fid's, from torch's hub cache or the net")
    parser.add_argument("--data", help="root of data sets; None: the checkpoint's, else ./data")
    parser.add_argument("--json", metavar="FILE", help="write the results here, too")
    parser.add_argument("--batch", type=int, default=128, help="images per network evaluation and rank")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_sampling_flags(parser.add_argument_group("sampling from a checkpoint, as in sample.py"))
    args = parser.parse_args(argv)
    if args.n < 2:
        parser.error("--n must be at least 2")
    return args


def main(args):
    """Score the samples. Rank 0 prints and writes, the number comes last on stdout."""
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")  # of the sampler, as in sample.py; the Inception's stays full
    if args.json and not Path(args.json).absolute().parent.is_dir():
        fail(f"--json {args.json}: there is no such folder, make it first")

    # 1. What is scored, with what, against what: mistakes show before the long part.
    model, samples = open_samples(args, device)
    check_count(samples, args)
    inception = load_inception(args.weights, device, rank, world)
    if rank == 0:
        print(f"samples: {samples.n} images of {samples.size[1]}x{samples.size[0]} from {samples.name}")
        print(f"Inception: {inception.path} (sha256 {inception.sha256[:8]})")
        if samples.n < USUAL:
            print(f"warning: {samples.n} samples: FID falls with their number, compare at {USUAL}", file=sys.stderr)
    mean, cov, made = reference(model, samples, inception, args, rank, world)
    if rank == 0:
        print("reference: " + ", ".join(f"{key} {value}" for key, value in made.items() if key != "inception"))

    # 2. The samples.
    sums = measure(inception, samples, args.batch, rank, world)

    # 3. The numbers.
    if rank == 0:
        gaussians = mean, cov, *sums.gaussian()
        if not all(t.isfinite().all() for t in gaussians):
            fail("NaN or infinity among the features or in the reference: the weight file or the reference is damaged")
        fid = frechet_distance(*gaussians)
        score, spread = sums.inception_score()
        print("Inception Score: 10 splits, order of RandomState(2020), 1008 unbiased logits, pytorch-fid's resize")
        if args.json:
            result = {"fid": fid, "is_mean": score, "is_std": spread, "n": samples.n, "samples": args.samples}
            if model is not None:
                result |= {"checkpoint": str(model.path), "weights": "ema", "epoch": model.epoch, "step": model.step}
                result |= sampling(args) | {"amp": args.amp}
            result |= {"resolution": list(samples.size), "reference": made, "inception_sha256": inception.sha256}
            Path(args.json).write_text(json.dumps(result | {"torch": torch.__version__}, indent=2) + "\n")
        print(f"FID {fid:.2f}  IS {score:.2f} +- {spread:.2f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
