"""Measure what a checkpoint knows: one linear layer on the frozen feature of every layer, at one or many noise levels.

    python probe.py runs/NAME                                       # at the layer and level of the paper ([P] Table 10)
    python probe.py runs/NAME --layer out_6 --t 1 11 66             # one layer at several levels
    python probe.py runs/NAME --grid --pixels --cache               # layers x levels, beside the raw input; quickly
    python probe.py runs/NAME/epoch_{0800,1000,1200}.pt             # how CIFAR is reported: the best of three
    torchrun --nproc_per_node=4 probe.py runs/NAME --grid

The protocol is that of [P] (DDAE++, arXiv:2505.10999): EMA weights, cross-entropy, Adam with
a cosine to 0, horizontal flip only, fresh noise in each epoch, no class or augmentation label. Every part of it is a
flag and is printed with the number, because published protocols differ. One forward pass feeds the heads of all
layers, so --grid costs one run per level. The classes of the test split are predicted from one fixed noise per image.

Beside it stands a kNN vote (k = 20 by cosine, weights exp(similarity / 0.07), as in InstDisc and DINO), on features
without flip: no training, so a quick and independent look at the same feature.

x0 clean image   noise unit noise   level step, sigma or time   feat (B, D) pooled feature, layers side by side
B batch   N images of a split   D width, summed over the L layers probed   K classes
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from sample import fail, load_checkpoint, setup_distributed

BLOCK = 512  # images per pass where nothing is trained: fixed, because a block draws its noise as a whole
KNN_K, KNN_TEMPERATURE = 20, 0.07
ORDER, NOISE, TRAIN, TRAIN_FLIPPED, TEST, SUBSET = range(6)  # streams of random numbers under one --seed


# ---- 1. Random numbers and ranks ---------------------------------------------------------------------------
def stream_generator(device, seed, stream, index):
    """A generator of its own for each (seed, stream, index). Hashed: the CPU's generator reads 32 bits of a seed."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence((seed, stream, index)).generate_state(1)[0]))


def all_reduce(tensor):
    """Sum over ranks in place; with one process the tensor as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# ---- 2. Data and frozen features ---------------------------------------------------------------------------
@dataclass
class Split:
    """One split of the data set: images uint8 (N, 3, H, W) or latents, labels int64 (N,) on the device.

    Latents come as (N, 2, C, h, w), each image and its mirror image, because the mirrored latent is not the latent
    mirrored; they are an object of the train script's whose x0(flip) chooses.
    """

    images: torch.Tensor
    labels: torch.Tensor
    to_x0: object  # of the train script: uint8 images -> float32 in [-1, 1]

    def x0(self, index, flip):
        """Images by index (B,), mirrored where flip (B,) is true: (B, C, H, W) float32 on the device."""
        where, device = self.images.device, self.labels.device
        if self.images.ndim == 5:
            return self.images[index.to(where)].to(device).x0(flip)
        x0 = self.to_x0(self.images[index.to(where)].to(device))  # (B, C, H, W)
        return torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)


def load_split(model, args, split, device):
    """Read a split through the checkpoint's train script. Images live on the device unless they would fill it."""
    flags = argparse.Namespace(**vars(model.args))
    flags.data = args.data or flags.data
    if args.data and getattr(flags, "cache_latents", None):
        flags.cache_latents = args.data
    images, labels = model.script.load_data(flags, split)
    if args.subset:
        some = torch.randperm(len(labels), generator=stream_generator("cpu", args.seed, SUBSET, 0))[: args.subset]
        images, labels = images[some], labels[some]
    if device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return Split(images, labels.to(device), model.script.to_x0)


def random_crop(x0, shift, pad):
    """Cut (B, C, H, W) again after reflect padding, at shift (B, 2) in 0..2*pad; shift = pad is the image itself."""
    height, width = x0.shape[2:]
    rows = shift[:, :1] + torch.arange(height, device=x0.device)  # (B, H)
    cols = shift[:, 1:] + torch.arange(width, device=x0.device)  # (B, W)
    padded = F.pad(x0, [pad] * 4, mode="reflect").permute(0, 2, 3, 1)  # (B, H + 2 pad, W + 2 pad, C)
    image = torch.arange(len(x0), device=x0.device)
    return padded[image[:, None, None], rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W)


@dataclass
class Encoder:
    """The frozen network at one noise level: (x0, noise), both (B, C, H, W) -> feat (B, D) float32."""

    model: object  # of load_checkpoint
    level: float | None  # in the paper's unit; None is the raw baseline, the clean x0 itself
    layers: dict  # name -> width of what stands side by side in D
    pool: str = "gap"  # or "token", "cls"
    amp: torch.dtype | None = None  # of autocast, None for float32

    def __call__(self, x0, noise):
        if self.level is None:
            return x0.flatten(1)  # (B, C*H*W)
        with torch.inference_mode(), torch.autocast(x0.device.type, dtype=self.amp, enabled=self.amp is not None):
            feats = self.model.diffusion.features(self.model.net, x0, self.level, noise, y=None, pool=self.pool)
        return torch.cat([feats[name].float() for name in self.layers], 1)  # (B, D); a copy that autograd may keep


def fixed_features(encode, split, flip, stream, args, rank, world):
    """Features of a whole split under one fixed noise per image; blocks of images are dealt out to the ranks.

    Yields:
        (index, feat): (b,) and (b, D), this rank's blocks. Neither depends on the number of ranks.
    """
    device, n = split.labels.device, len(split.labels)
    for block in tqdm(range(rank, math.ceil(n / BLOCK), world), desc="features", leave=False, disable=rank > 0):
        index = torch.arange(block * BLOCK, min((block + 1) * BLOCK, n), device=device)
        x0 = split.x0(index, torch.full_like(index, flip, dtype=torch.bool))
        generator = stream_generator(device, args.seed, stream, block)
        torch.manual_seed(generator.initial_seed())  # --pool token draws its tokens from the global generator
        yield index, encode(x0, torch.randn(x0.shape, generator=generator, device=device))


def gather_features(blocks, n, encode, device):
    """All rows of fixed_features on every rank, (n, D) float32."""
    size = (n, sum(encode.layers.values()))
    try:
        feats = torch.zeros(size, device=device)
    except RuntimeError:  # out of memory, on either kind of device
        fail(f"{math.prod(size) * 4 / 2**30:.1f} GiB of features do not fit {device}: drop --cache, or use --layer")
    for index, feat in blocks:
        feats[index] = feat
    return all_reduce(feats)


# ---- 3. Classifiers: linear heads and kNN ------------------------------------------------------------------
class SyncedNorm(nn.Module):
    """nn.BatchNorm1d(affine=False) over the batches of all ranks together, for inputs that need no gradient.

    nn.SyncBatchNorm would do, but refuses CPU tensors.
    """

    def __init__(self, width, momentum=0.1, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, feat):
        """(B, D) -> (B, D) of mean 0 and variance 1 over the global batch, or by the running averages in eval."""
        mean, var = self.mean, self.var
        if self.training:
            wide = feat.double()  # so that E[x^2] - E[x]^2 keeps its digits
            count = wide.new_full((1,), len(wide))
            sums = all_reduce(torch.cat([wide.sum(0), wide.square().sum(0), count]))
            mean, square = (sums[:-1] / sums[-1]).chunk(2)  # (D,), (D,)
            var = (square - mean.square()).clamp(min=0)
            self.mean.lerp_(mean.float(), self.momentum)
            self.var.lerp_((var * sums[-1] / (sums[-1] - 1)).float(), self.momentum)
        return ((feat - mean) * (var + self.eps).rsqrt()).float()


class Heads(nn.Module):
    """One linear classifier per layer, each on its own columns of feat.

    UNSPECIFIED: [P] gives no start for the head; ours is zero. The problem is convex, and a head then depends neither
    on a seed nor on which others are trained with it.
    """

    def __init__(self, widths, classes, batchnorm=False):
        super().__init__()
        self.widths = list(widths)
        self.norm = SyncedNorm(sum(self.widths)) if batchnorm else nn.Identity()
        self.linears = nn.ModuleList(nn.Linear(width, classes) for width in self.widths)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, feat):
        """(B, D) -> logits (L, B, K)."""
        parts = self.norm(feat).split(self.widths, 1)
        return torch.stack([linear(part) for linear, part in zip(self.linears, parts, strict=True)])

    @torch.no_grad()
    def accuracy(self, feat, labels):
        """Top-1 accuracy of each head in percent, a list of L floats, from feat (N, D) and labels (N,)."""
        self.eval()
        hits = sum((self(f).argmax(2) == y).sum(1) for f, y in zip(feat.split(BLOCK), labels.split(BLOCK), strict=True))
        return (100 * hits / len(labels)).tolist()


def train_heads(encode, train, classes, args, rank=0, world=1, cache=None):
    """Train the heads of all layers at once; their losses are summed, so each learns as if alone.

    Args:
        encode: Encoder.
        train: Split.
        args: batch (over all ranks), epochs, lr, flip, crop, batchnorm, seed.
        cache: stored features, [without flip, with flip] of (N, D) each, to train on instead of fresh ones.
    Returns:
        Heads, equal on all ranks. Every draw is made for the global batch, of which a rank takes its share.
    """
    device, n = train.labels.device, len(train.labels)
    batch, steps, pad = args.batch, n // args.batch, train.images.shape[-1] // 8  # an incomplete batch is left out
    heads = Heads(encode.layers.values(), classes, args.batchnorm).to(device).train()
    params = list(heads.parameters())
    grad = torch.zeros(sum(p.numel() for p in params), device=device)  # the gradients in one piece, for one all_reduce
    for p, piece in zip(params, grad.split([p.numel() for p in params]), strict=True):
        p.grad = piece.view_as(p)
    opt = torch.optim.Adam(params, lr=args.lr, fused=True)
    bar = tqdm(total=args.epochs * steps, desc="linear", leave=False, disable=rank > 0)

    for epoch in range(args.epochs):
        draw = stream_generator("cpu", args.seed, ORDER, epoch)
        noise_draw = stream_generator(device, args.seed, NOISE, epoch)
        torch.manual_seed(noise_draw.initial_seed() + rank)  # for --pool token alone
        order = torch.randperm(n, generator=draw).to(device)
        flip = ((torch.rand(n, generator=draw) < 0.5) & args.flip).to(device)  # (N,), of image i
        shift = torch.randint(0, 2 * pad + 1, (n, 2), generator=draw).to(device)  # (N, 2)
        loss_sum = torch.zeros((), device=device)
        for step in range(steps):
            # 1. This rank's share of the batch, with fresh noise.
            index = order[step * batch : (step + 1) * batch].tensor_split(world)[rank]
            if cache is None:
                x0 = train.x0(index, flip[index])  # (b, C, H, W)
                x0 = random_crop(x0, shift[index], pad) if args.crop else x0
                noise = torch.randn((batch, *x0.shape[1:]), generator=noise_draw, device=device)
                feat = encode(x0, noise.tensor_split(world)[rank])  # (b, D)
            else:
                feat = torch.where(flip[index, None], cache[-1][index], cache[0][index])
            # 2. Cross-entropy of every head, as a mean over the global batch.
            logits = heads(feat)  # (L, b, K)
            labels = train.labels[index].repeat(len(logits))  # (L * b,)
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / batch
            # 3. Update. UNSPECIFIED: [P] does not say whether the cosine moves per step or per epoch; ours per step.
            grad.zero_()
            loss.backward()
            all_reduce(grad)
            opt.param_groups[0]["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / args.epochs))
            opt.step()
            loss_sum += loss.detach()
            bar.update()
        bar.set_postfix(loss=f"{loss_sum.item() * world / steps / len(logits):.3f}")  # rank 0's share, mean over heads
    bar.close()
    return heads


@torch.no_grad()
def knn(queries, labels, bank, widths, classes, k=KNN_K, temperature=KNN_TEMPERATURE):
    """Weighted k-nearest-neighbour vote by cosine similarity, weights exp(similarity / temperature).

    Args:
        queries: test features, (Q, D), equal on all ranks.
        labels: their classes, (Q,).
        bank: iterator of (feat (b, D), classes (b,)), this rank's share of the training set. It streams by, so that
            memory stays at L * Q * k candidates.
        widths: the L layer widths that D is made of.
    Returns:
        top-1 accuracy of each layer in percent, a list of L floats.
    """
    queries = [F.normalize(q, dim=1) for q in queries.split(widths, 1)]
    near = torch.full((len(widths), len(labels), k), -math.inf, device=labels.device)  # similarities, (L, Q, k)
    vote = torch.zeros(near.shape, dtype=torch.long, device=labels.device)  # their classes

    def keep_nearest(layer, similarity, candidate):
        """Merge candidates (Q, m) of one layer into its k nearest."""
        similarity, candidate = torch.cat([near[layer], similarity], 1), torch.cat([vote[layer], candidate], 1)
        near[layer], top = similarity.topk(k, 1)
        vote[layer] = candidate.gather(1, top)

    for feat, candidate in bank:
        for layer, (q, f) in enumerate(zip(queries, feat.split(widths, 1), strict=True)):
            keep_nearest(layer, q @ F.normalize(f, dim=1).T, candidate.expand(len(q), -1))
    if dist.is_initialized():
        pairs = [(torch.empty_like(near), torch.empty_like(vote)) for _ in range(dist.get_world_size())]
        dist.all_gather([pair[0] for pair in pairs], near)
        dist.all_gather([pair[1] for pair in pairs], vote)
        near.fill_(-math.inf)
        for similarity, candidate in pairs:
            for layer in range(len(widths)):
                keep_nearest(layer, similarity[layer], candidate[layer])
    accuracy = []
    for similarity, candidate in zip(near, vote, strict=True):
        weight = (similarity / temperature).exp()  # (Q, k); 0 where there were fewer than k neighbours
        score = torch.zeros(len(labels), classes, device=labels.device).scatter_add_(1, candidate, weight)  # (Q, K)
        accuracy.append(100 * (score.argmax(1) == labels).float().mean().item())
    return accuracy


# ---- 4. The probe of one checkpoint ------------------------------------------------------------------------
def probe_level(encode, train, test, classes, args, rank=0, world=1):
    """Linear and kNN accuracy of every layer of the encoder.

    Returns:
        list of dicts with layer, level, linear and knn (percent).
    """
    device, n, widths = train.labels.device, len(train.labels), list(encode.layers.values())
    test_blocks = fixed_features(encode, test, False, TEST, args, rank, world)
    test_feat = gather_features(test_blocks, len(test.labels), encode, device)  # (N, D)
    if not torch.isfinite(test_feat).all():
        fail(f"{encode.model.path}: the features hold NaN or infinity; try --amp off, or an earlier epoch")
    bank, cache = fixed_features(encode, train, False, TRAIN, args, rank, world), None
    if args.cache:
        cache = [gather_features(bank, n, encode, device)]
        bank = ((index, cache[0][index]) for index in torch.arange(n, device=device).split(BLOCK)[rank::world])
        if args.flip:
            flipped = fixed_features(encode, train, True, TRAIN_FLIPPED, args, rank, world)
            cache.append(gather_features(flipped, n, encode, device))
    bank = ((feat, train.labels[index]) for index, feat in bank)
    nearest = knn(test_feat, test.labels, bank, widths, classes)
    heads = train_heads(encode, train, classes, args, rank, world, cache)
    linear = heads.accuracy(test_feat, test.labels)
    cells = zip(encode.layers, linear, nearest, strict=True)
    return [{"layer": layer, "level": encode.level, "linear": a, "knn": b} for layer, a, b in cells]


def find_layers(model, level, args, x0):
    """Dict name -> width of the layers to probe: those of --layer, or with --grid all, in depth order."""
    try:
        model.diffusion.check_level(level)
        with torch.inference_mode():
            feats = model.diffusion.features(model.net, x0, level, torch.zeros_like(x0), y=None, pool=args.pool)
    except ValueError as error:
        fail(f"{model.path}, --pool {args.pool} --t {level:g}: {error}")
    wanted = list(feats) if args.grid else [str(layer) for layer in args.layer or [model.args.layer]]
    for layer in wanted:
        if layer not in feats:
            fail(f"{model.path} has no layer {layer}: choose --layer from {' '.join(feats)}")
    return {layer: feats[layer].shape[1] for layer in wanted}


def resolve(args, model, train, device):
    """Fill what the flags leave open from the checkpoint and its data set ([P]), in a new Namespace."""
    latents, cifar = train.images.ndim == 5, model.args.dataset in ("cifar10", "cifar100")
    args = argparse.Namespace(**vars(args))
    args.epochs = args.epochs or (15 if cifar else 30)
    args.lr = args.lr or (2e-3 if latents else 4e-3)
    args.batch = min(args.batch or (1440 if latents else 128), len(train.labels))  # UNSPECIFIED: 128 for pixels is ours
    if args.amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "off"
    args.t = args.t or (list(model.diffusion.levels) if args.grid else [model.args.cl_t])
    if args.crop and latents:
        fail("--crop cuts pixels, and this checkpoint works on latents: drop it")
    return args


def probe(model, args, rank=0, world=1, device=None):
    """Probe one checkpoint by the flags of parse_args.

    Returns:
        dict of plain values: path, epoch, step, script, model, dataset, symbol, protocol and cells (of probe_level).
    """
    device = device or torch.device("cpu")
    train, test = load_split(model, args, "train", device), load_split(model, args, "test", device)
    args = resolve(args, model, train, device)
    if args.batch < world:
        fail(f"--batch {args.batch} (over all ranks) is less than the {world} ranks: raise it or use fewer ranks")
    first = torch.arange(2, device=device)
    x0 = train.x0(first, first < 0)  # (2, C, H, W), to see the layers
    layers = [find_layers(model, level, args, x0) for level in args.t][0]
    classes, flags = int(train.labels.max()) + 1, ("pool", "epochs", "lr", "batch", "flip", "crop", "batchnorm")
    protocol = {
        "weights": f"EMA of epoch {model.epoch}, frozen",
        "layers": list(layers),
        "levels": args.t,  # clean for the raw baseline
        **{flag: getattr(args, flag) for flag in flags},
        "noise": "once per image and flip" if args.cache else "fresh each epoch",
        "optimizer": "Adam, cosine to 0",
        "knn": f"k {KNN_K}, cosine, weights exp(similarity / {KNN_TEMPERATURE})",
        "amp": args.amp,
        "seed": args.seed,
        "images": f"{len(train.labels)} train, {len(test.labels)} test, {classes} classes",
    }
    result = {"path": str(model.path), "epoch": model.epoch, "step": model.step, "script": model.script.__name__}
    result |= {"model": model.args.model, "dataset": model.args.dataset, "symbol": model.diffusion.symbol}
    result |= {"protocol": protocol, "cells": []}
    if rank == 0:
        print(model)
        shown = {**protocol, "layers": " ".join(layers), "levels": " ".join(f"{level:g}" for level in args.t)}
        print("protocol:", "; ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    encoders = [Encoder(model, level, layers, args.pool, amp) for level in args.t]
    encoders += [Encoder(model, None, {"pixels": x0[0].numel()})] if args.pixels else []
    for encode in encoders:
        start = time.time()
        cells = probe_level(encode, train, test, classes, args, rank, world)
        result["cells"] += cells
        if rank == 0:
            print(f"{describe(best_cell(cells), result)} of {len(cells)} in {time.time() - start:.0f} s", flush=True)
    return result


# ---- 5. Tables, pictures, flags ----------------------------------------------------------------------------
def best_cell(cells):
    """The cell of highest linear accuracy; the raw baseline counts only where it is alone."""
    return max(cells, key=lambda cell: (cell["level"] is not None, cell["linear"]))


def describe(cell, result):
    """The number and its place: `top-1 72.04 % (out_2, t=11)`."""
    place = "pixels" if cell["level"] is None else f"{cell['layer']}, {result['symbol']}={cell['level']:g}"
    return f"top-1 {cell['linear']:.2f} % ({place})"


def rows_of(result):
    """Dict layer -> its cells in order of the levels, raw baseline last."""
    rows = {}
    for cell in result["cells"]:
        rows.setdefault(cell["layer"], []).append(cell)
    return rows


def table(result):
    """Rows layers, columns levels, entries linear (kNN) top-1 in percent."""
    symbol, levels = result["symbol"], result["protocol"]["levels"]
    lines = ["linear (kNN)".ljust(14) + "".join(f"{symbol}={level:g}".rjust(16) for level in levels)]
    for layer, row in rows_of(result).items():
        lines.append(layer.ljust(14) + "".join(f"{c['linear']:.2f} ({c['knn']:.2f})".rjust(16) for c in row))
    return "\n".join(lines)


def plot_grids(results, path):
    """Heat maps of the linear accuracy, layers x levels, one panel per checkpoint."""
    levels, layers = zip(*[(r["protocol"]["levels"], r["protocol"]["layers"]) for r in results], strict=True)
    size = sum(2.2 + 0.8 * len(t) for t in levels), 1.2 + 0.35 * max(map(len, layers))
    figure = Figure(size, layout="constrained")
    for i, axes in enumerate(figure.subplots(1, len(results), squeeze=False)[0]):
        rows = rows_of(results[i])
        values = np.array([[cell["linear"] for cell in rows[layer]] for layer in layers[i]])  # (layers, levels)
        figure.colorbar(axes.imshow(values, aspect="auto"), ax=axes, label="linear top-1, %")
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < (values.min() + values.max()) / 2 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, size=8)
        axes.set_yticks(range(len(layers[i])), layers[i])
        axes.set_xticks(range(len(levels[i])), [f"{t:g}" for t in levels[i]])
        axes.set_xlabel(f"noise level {results[i]['symbol']}")
        axes.set_title(f"{Path(results[i]['path']).parent.name}\nepoch {results[i]['epoch']}", size=8)
    figure.savefig(path, dpi=150)


def plot_curves(results, path):
    """Accuracy of the best cell against the epoch, one colour per run folder: linear solid, kNN dashed."""
    runs = {}
    for result in results:
        cell = best_cell(result["cells"])
        runs.setdefault(Path(result["path"]).parent, []).append((result["epoch"], cell["linear"], cell["knn"]))
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (run, points) in enumerate(runs.items()):
        epoch, linear, nearest = zip(*sorted(points), strict=True)
        axes.plot(epoch, linear, f"C{i}o-", label=f"{run.name}, linear")
        axes.plot(epoch, nearest, f"C{i}o--", label=f"{run.name}, kNN", alpha=0.5)
    axes.set(xlabel="epoch", ylabel="top-1, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parse_args(argv=None):
    """Flags -> Namespace. What depends on the checkpoint stays None until it is read (resolve)."""
    on_off, formatter = argparse.BooleanOptionalAction, argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("ckpt", nargs="+", metavar="CKPT", help="checkpoint files or run folders (then last.pt)")
    add = parser.add_argument_group("feature").add_argument
    add("--layer", nargs="+", metavar="L", help="layer names; None: the checkpoint's --layer, [P] Tab. 10")
    add("--t", nargs="+", type=float, metavar="T", help="noise levels: step, sigma or time; None: the checkpoint's "
        "--cl-t, [P] Tab. 10, or with --grid a list that suits its formulation")
    add("--grid", action="store_true", help="every layer at every level, one run per level")
    add("--pool", choices=["gap", "token", "cls"], default="gap", help="mean over pixels, one random token, or [CLS]")
    add("--pixels", action="store_true", help="also the raw baseline: the flattened clean pixels or latent")
    add = parser.add_argument_group("protocol ([P])").add_argument
    add("--epochs", type=int, help="passes over the training split; None: CIFAR 15, others 30")
    add("--lr", type=float, help="of Adam at the start, cosine to 0; None: pixels 4e-3, latents 2e-3")
    add("--batch", type=int, help="images over all ranks; None: pixels 128 (ours), latents 1440")
    add("--flip", action=on_off, default=True, help="random horizontal flip in training")
    add("--crop", action=on_off, default=False, help="random crop in training, padded by resolution / 8 (reflection)")
    add("--batchnorm", action=on_off, default=False, help="BatchNorm without affine before each head")
    add("--subset", type=int, metavar="N", help="at most N random images of each split, to save time; None: all")
    add("--cache", action=on_off, default=False, help="draw the noise once per image and flip and train on stored "
        "features: two passes over the training split instead of one per epoch, for 8 N D bytes. Measured on the "
        "README's quick start (s=0.2964, 3000 images, 10 epochs): top-1 moves by -0.4 on average over the layers, "
        "1.5 at most; another --seed moves it by 0.9")
    add = parser.add_argument_group("run").add_argument
    add("--data", help="data root, or of a run on latents the folder of its cache; None: that of the training run")
    add("--json", type=Path, metavar="FILE", help="all results; None: beside the first checkpoint if --grid or "
        "several, else none is written")
    add("--plot", type=Path, metavar="FILE", help="PNG: heat map of the cells, or for several checkpoints without "
        "--grid accuracy against epoch; None: as --json")
    add("--seed", type=int, default=0, help="of order, flips and noise, which do not depend on the number of ranks")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="autocast of the frozen network; auto "
        "is bf16 on a GPU that has it")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if args.grid and args.layer:
        parser.error("--grid probes every layer: drop --layer, or drop --grid to probe these layers at several --t")
    if args.cache and args.crop:
        parser.error("--cache stores one feature per flip, so it excludes --crop")
    numbers = (args.epochs, args.lr, args.batch, args.subset)
    if any(value is not None and not value > 0 for value in numbers) or args.seed < 0:
        parser.error("--epochs, --lr, --batch and --subset must be above 0, --seed at least 0")
    if args.plot and args.plot.suffix != ".png":
        parser.error(f"--plot {args.plot}: pictures are PNG, give FILE.png")
    if args.grid or len(args.ckpt) > 1:
        first = Path(args.ckpt[0])
        base = (first if first.is_dir() else first.parent) / ("probe_grid" if args.grid else "probe_epochs")
        args.json, args.plot = args.json or base.with_suffix(".json"), args.plot or base.with_suffix(".png")
    return args


def main(args):
    """Probe every checkpoint; print, write and draw. Returns the results, as they stand in the JSON file."""
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")
    for path in args.ckpt[1:]:
        load_checkpoint(path)  # a wrong one is reported now, not when its turn comes
    for path in filter(None, [args.json, args.plot]):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            fail(f"cannot write {path}: {error.strerror}; name another file")
    results = []
    for path in args.ckpt:
        results.append(probe(load_checkpoint(path, device), args, rank, world, device))
        best = max(results, key=lambda result: best_cell(result["cells"])["linear"])
        cell = best_cell(best["cells"])
        if rank == 0:
            print(table(results[-1]), flush=True)
            if args.json:  # after each checkpoint, so that a job cut short leaves what it has
                summary = {"top1": cell["linear"], "path": best["path"], "epoch": best["epoch"], **cell}
                args.json.write_text(json.dumps({**summary, "checkpoints": results}, indent=1))
    if rank == 0:
        if args.plot:
            (plot_grids if args.grid or len(results) == 1 else plot_curves)(results, args.plot)
        if len(results) > 1:
            for result in results:
                print(f"epoch {result['epoch']:5d}  {describe(best_cell(result['cells']), result)}  {result['path']}")
        print(describe(cell, best))
    if world > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main(parse_args())
