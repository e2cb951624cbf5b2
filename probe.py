"""What a checkpoint knows: a linear layer on the frozen feature of every layer, at many noise levels. [P] is DDAE++

    python probe.py runs/NAME                            # at the paper's layer and level ([P] Tab. 10)
    python probe.py runs/NAME --grid --pixels --cache    # layers x levels, beside raw input
    python probe.py runs/NAME/epoch_{0800,1000,1200}.pt  # CIFAR: the best of three
    python probe.py probe_epochs.json fid.json --plot fid.png    # [P] Fig. 3
    torchrun --nproc_per_node=4 probe.py runs/A runs/B --loss    # held-out loss, paired

The protocol of [P] (DDAE++, arXiv:2505.10999, Tab. 11; ancestor [DDAE], arXiv:2303.09769): EMA weights, cross-entropy,
Adam with a cosine to 0, horizontal flip only, fresh noise in each epoch, no label; one fixed noise per test image.

x0 clean image   noise unit noise   level step, sigma or time   feat (B, D) pooled feature, layers side by side
B batch   N images of a split   D width, summed over the L layers probed   K classes
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from sample import TROUBLE, load_checkpoint, told
from train_unet import fail, setup_distributed

GRIDS = {  # the noise level; levels of --grid, ours, around those of [P] Tab. 10; levels of --loss
    "ddpm": ("t, step of 1000", [1, 11, 33, 66, 130, 260], [1, 10, 30, *range(100, 1001, 100)]),
    "edm": ("s, sigma", [0.0075, 0.023, 0.06, 0.14, 0.2964, 0.585], [0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2, 6, 20, 80]),
    "rf": ("t, time", [0.01, 0.03, 0.06, 0.12, 0.25, 0.4], [0.02, *(i / 10 for i in range(1, 10)), 0.98]),
    "dit": ("t, time", [0.06, 0.15, 0.25, 0.35, 0.5], [0.02, *(i / 10 for i in range(1, 10)), 0.98]),
}
BATCH = {"ddpm": 512, "tiny": 128}  # of pixels; others 256. UNSPECIFIED: our reading of [P] Tab. 11; tiny: ours
BLOCK, KNN_K, KNN_TEMPERATURE = 512, 20, 0.07  # a block of images draws its noise as a whole: fixed
AHEAD = {"cuda": 1024, "cpu": 1}  # images of one call of the network, at least a batch: few leave a GPU waiting
ORDER, NOISE, TRAIN, FLIPPED, TEST, SUBSET, LOSS = range(7)  # streams of random numbers under one --seed
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito's
ACCURACY = "linear top-1 accuracy, %"


# ---- 1. Random numbers, ranks, data and frozen features ----
def stream_generator(device, *numbers):
    """A generator of its own for each (seed, stream, index, ..)."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def ranks():
    """Rank and world size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@dataclass
class Split:
    images: torch.Tensor  # uint8 (N, 3, H, W), or latents float16 (N, 2, C, h, w), each image and its mirror image
    labels: torch.Tensor  # int64 (N,), on the device
    classes: int
    to_x0: object  # of the train script

    def x0(self, index, flip):
        """Images by index (B,), mirrored where flip (B,): (B, C, H, W) float32 on the device."""
        return self.to_x0(self.images[index.to(self.images.device)].to(index.device), flip)


def load_split(model, args, split, device):
    """Read a split through the checkpoint's train script; images on the device unless they would fill it."""
    flags = argparse.Namespace(**vars(model.args))
    flags.data, flags.dataset = args.data or flags.data, args.dataset or flags.dataset
    flags.cache_latents = flags.cache_latents and (args.data or flags.cache_latents)
    images, labels, classes = model.script.load_data(flags, split)
    if args.subset:
        some = torch.randperm(len(labels), generator=stream_generator("cpu", args.seed, SUBSET, 0))[: args.subset]
        images, labels = images[some], labels[some]
    if device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return Split(images, labels.to(device), len(classes), model.script.to_x0)


@dataclass
class Encoder:
    """The frozen network at one noise level: (x0, noise), both (B, C, H, W) -> feat (B, D) float32."""
    model: object  # of load_checkpoint
    level: float | None  # None is the raw baseline, the clean x0
    layers: dict  # name -> width of what stands side by side in D
    pool: str = "gap"  # or "token", "cls"
    autocast: object = torch.autocast("cpu", enabled=False)

    @torch.no_grad()
    def __call__(self, x0, noise):
        if not len(x0):  # a rank may get nothing of the last batch
            return x0.new_zeros(0, sum(self.layers.values()))
        if self.level is None:
            return x0.flatten(1)  # (B, C*H*W)
        with self.autocast:
            feats = self.model.diffusion.features(self.model.net, x0, self.level, noise, y=None, pool=self.pool,
                                                  last=max(self.layers, key=self.model.net.layers.index))
        return torch.cat([feats[name].float() for name in self.layers], 1)  # (B, D)


def stored_features(encode, split, stream, seed, flip=False):
    """Features of a whole split under one fixed noise per image, for any number of ranks: (N, D) float32 on each."""
    device, n, width, (rank, world) = split.labels.device, len(split.labels), sum(encode.layers.values()), ranks()
    feats = torch.zeros(n, width, device=device)
    for block in tqdm(range(rank, math.ceil(n / BLOCK), world), desc="features", leave=False, disable=rank > 0):
        index = torch.arange(block * BLOCK, min((block + 1) * BLOCK, n), device=device)
        x0 = split.x0(index, torch.full_like(index, flip, dtype=torch.bool))
        generator = stream_generator(device, seed, stream, block)
        torch.manual_seed(generator.initial_seed())  # --pool token draws its tokens from the global generator
        feats[index] = encode(x0, torch.randn(x0.shape, generator=generator, device=device))
    return all_reduce(feats)


# ---- 2. Classifiers: linear heads and kNN ------
class Heads(nn.Module):
    """One linear classifier per layer, each on its own columns of feat, standardised by mean and std (D,) if given."""

    def __init__(self, widths, classes, mean=0.0, std=1.0):
        super().__init__()
        self.widths, self.mean, self.std = list(widths), mean, std
        # UNSPECIFIED: their start; [DDAE]'s is random. From zero a head depends on no other head.
        self.weight = nn.Parameter(torch.zeros(sum(self.widths), classes))  # (D, K)
        self.bias = nn.Parameter(torch.zeros(len(self.widths), classes))  # (L, K)

    def forward(self, feat):
        """(B, D) -> logits (L, B, K)."""
        feats, weights = ((feat - self.mean) / self.std).split(self.widths, 1), self.weight.split(self.widths)
        return torch.stack([x @ w + b for x, w, b in zip(feats, weights, self.bias, strict=True)])

    @torch.no_grad()
    def accuracy(self, feat, labels):
        """Top-1 accuracy of each head in percent, a list of L floats, from feat (N, D) and labels (N,)."""
        hits = sum((self(f).argmax(2) == y).sum(1) for f, y in zip(feat.split(BLOCK), labels.split(BLOCK), strict=True))
        return (100 * hits / len(labels)).tolist()


def train_heads(encode, train, args, stored=(), mean=0.0, std=1.0):
    """Train the heads of all layers at once; their losses are summed, so each learns as if alone.

    stored: features (N, D) to train on instead of fresh ones, [without flip, with flip]. Draws are made for whole
    batches, of which a rank takes its share: numbers hang on neither ranks nor calls, and Heads are equal on all.
    """
    device, n, (rank, world) = train.labels.device, len(train.labels), ranks()
    heads = Heads(encode.layers.values(), train.classes, mean, std).to(device)
    opt = torch.optim.Adam(heads.parameters(), lr=args.lr)
    together = max(1, AHEAD[device.type] * world // args.batch)  # batches of a call; 1024 images take 4 to 12 GB
    for epoch in range(args.epochs):
        draw = stream_generator("cpu", args.seed, ORDER, epoch)
        noise_draw = stream_generator(device, args.seed, NOISE, epoch)
        order = torch.randperm(n, generator=draw).to(device)
        flip = ((torch.rand(n, generator=draw) < 0.5) & args.flip).to(device)  # (N,), of image i
        batches = order.split(args.batch)  # the smaller last one, too, as in [DDAE]
        for step, batch in enumerate(tqdm(batches, f"heads, epoch {epoch}", leave=False, disable=rank > 0)):
            if step % together == 0:
                some = batches[step : step + together]
                index = torch.cat([b.tensor_split(world)[rank] for b in some])  # this rank's shares
                if stored:
                    feats = torch.where(flip[index, None], stored[1][index], stored[0][index])
                else:
                    x0 = train.x0(index, flip[index])
                    noise = [torch.randn((len(b), *x0.shape[1:]), generator=noise_draw, device=device) for b in some]
                    torch.manual_seed(noise_draw.initial_seed() + step * world + rank)  # for --pool token alone
                    feats = encode(x0, torch.cat([b.tensor_split(world)[rank] for b in noise]))
            index = batch.tensor_split(world)[rank]  # (b,)
            feat, feats = feats.tensor_split([len(index)])  # (b, D), and those of the next batches
            logits = heads(feat)  # (L, b, K)
            labels = train.labels[index].repeat(len(logits))  # (L * b,)
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / len(batch)
            opt.zero_grad()
            loss.backward()
            for p in heads.parameters():
                all_reduce(p.grad)
            progress = (epoch + step / len(batches)) / args.epochs  # UNSPECIFIED: per step; [DDAE] moves per epoch
            opt.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * progress)) / 2
            opt.step()
    return heads


@torch.no_grad()
def knn(queries, labels, bank, bank_labels, widths, classes):
    """Top-1 accuracy of each layer in percent, a list of L floats: the k nearest training features (bank) vote."""
    accuracy = []
    for query, key in zip(queries.split(list(widths), 1), bank.split(list(widths), 1), strict=True):
        query, key, hits = F.normalize(query, dim=1), F.normalize(key, dim=1), 0
        for q, y in zip(query.split(BLOCK), labels.split(BLOCK), strict=True):
            similarity, near = (q @ key.T).topk(min(KNN_K, len(key)), 1)  # (b, k)
            weight = (similarity / KNN_TEMPERATURE).exp()
            score = torch.zeros(len(q), classes, device=q.device).scatter_add_(1, bank_labels[near], weight)  # (b, K)
            hits += (score.argmax(1) == y).sum().item()
        accuracy.append(100 * hits / len(labels))
    return accuracy


# ---- 3. The probe of one checkpoint ------------
def probe_level(encode, train, test, args):
    """Accuracy of every layer in percent: list of dicts with layer, level, pool, linear and knn (None: not asked)."""
    test_feat = stored_features(encode, test, TEST, args.seed)  # (N, D)
    if not torch.isfinite(test_feat).all():
        fail(f"{encode.model.path}: the features hold NaN or infinity; try --amp off, or an earlier epoch")
    stored, mean, std, nearest = [], 0.0, 1.0, [None] * len(encode.layers)
    if args.cache or args.batchnorm or args.features:
        bank = stored_features(encode, train, TRAIN, args.seed)  # (N, D)
        nearest = knn(test_feat, test.labels, bank, train.labels, encode.layers.values(), train.classes)
    if args.features and encode.level is not None and ranks()[0] == 0:
        arrays = {"train": bank, "train_labels": train.labels, "test": test_feat, "test_labels": test.labels}
        np.savez(args.features, **{name: array.cpu() for name, array in arrays.items()})
    if args.batchnorm:
        mean, std = bank.mean(0), (bank.var(0, correction=0) + 1e-5).sqrt()  # 1e-5 as in BatchNorm
    if args.cache:
        stored = [bank, stored_features(encode, train, FLIPPED, args.seed, flip=True) if args.flip else bank]
    linear = train_heads(encode, train, args, stored, mean, std).accuracy(test_feat, test.labels)
    cells, common = zip(encode.layers, linear, nearest, strict=True), {"level": encode.level, "pool": encode.pool}
    return [{"layer": layer, "linear": a, "knn": b} | common for layer, a, b in cells]


def load(path, args, device):
    """load_checkpoint; flags that do not fit it end the command."""
    model = load_checkpoint(path, device)
    for layer in {*(args.layer or [])} - {*model.net.layers}:
        fail(f"{model.path} has no layer {layer}: choose --layer from {' '.join(model.net.layers)}")
    with told(f"{model.path}, --t"):
        for level in args.t or []:
            model.diffusion.check_level(level)
    return model


def protocol_defaults(args, model, split, device):
    """Namespace with what the flags leave open ([P] Tab. 10, 11), and the head of a result: what is measured."""
    trained, args = vars(model.args), argparse.Namespace(**vars(args))
    args.dataset = args.dataset or trained["dataset"]
    latents, cifar = split.images.ndim == 5, args.dataset in ("cifar10", "cifar100")
    args.epochs = args.epochs or (15 if cifar else 30)
    args.lr = args.lr or (2e-3 if latents else 4e-3)
    args.batch = args.batch or (1440 if latents else BATCH.get(trained.get("backbone", trained.get("size")), 256))
    if args.amp == "auto":  # as in training
        bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
        args.amp = "bf16" if (torch.cuda.is_bf16_supported(False) if device.type == "cuda" else bf16) else "off"
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    args.autocast = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    axis, grid, wide = GRIDS["dit" if model.script.__name__ == "train_dit" else trained["model"]]
    args.t = args.t or (wide if args.loss else grid if args.grid and len(args.pool) == 1 else [trained["cl_t"]])
    head = {"dataset": args.dataset, "model": trained["model"], "axis": axis, "levels": args.t, "epoch": model.epoch}
    head |= {"checkpoint": str(model.path), "name": f"{model.path.absolute().parent.name}, epoch {model.epoch}"}
    return args, head


def probe(model, args, device):
    """Probe a checkpoint: a dict of plain values, the protocol and the cells of probe_level."""
    train, test = load_split(model, args, "train", device), load_split(model, args, "test", device)
    if train.classes < 2:
        fail(f"--dataset {args.dataset or model.args.dataset} has no classes to probe; --loss needs none")
    args, result = protocol_defaults(args, model, train, device)
    x0 = train.x0(torch.zeros(1, dtype=torch.long, device=device), None)  # (1, C, H, W), to see the layers
    pools = {}  # {pool: {layer: width}}
    for pool in args.pool:
        try:
            feats = model.diffusion.features(model.net, x0, args.t[0], torch.zeros_like(x0), y=None, pool=pool)
        except ValueError as error:  # [P] Fig. 4 has a network without [CLS]
            (fail if pool == args.pool[0] else print)(f"{model.path}, no --pool {pool}: {error}")
            continue
        wanted = feats if args.grid else args.layer or [model.args.layer]
        pools[pool] = {layer: feats[layer].shape[1] for layer in map(str, wanted)}
    encoders = [Encoder(model, level, pools[pool], pool, args.autocast) for pool in pools for level in args.t]
    encoders += [Encoder(model, None, {"pixels": x0[0].numel()}, pool=None)] if args.pixels else []
    protocol = {key: getattr(args, key) for key in "dataset epochs lr batch flip batchnorm cache amp seed".split()}
    protocol["images"] = f"{len(train.labels)} train, {len(test.labels)} test, {train.classes} classes"
    print(f"{model}\nprotocol: {', '.join(f'{key} {value}' for key, value in protocol.items())}")
    result |= {"layers": list(encoders[0].layers), "pools": list(pools), "protocol": protocol, "cells": []}
    for encode in encoders:
        cells = probe_level(encode, train, test, args)
        result["cells"] += cells
        for cell in cells:
            print(describe(cell, result) + ("" if cell["knn"] is None else f", kNN {cell['knn']:.2f} %"), flush=True)
    return result


@torch.no_grad()
def heldout_loss(model, args, device, earlier=()):
    """The formulation's loss on the test split, without class or augmentation label: a dict of plain values.

    diffusion.loss averages over its batch, so one observation is the mean of a random block of about 25 images. Noise
    hangs on image and level alone: blocks pair up with those of the first earlier result.
    """
    test = load_split(model, args, "test", device)
    args, result = protocol_defaults(args, model, test, device)
    model.diffusion.uncertainty = None  # EDM's learned weight belongs to training
    order = torch.randperm(len(test.labels), generator=stream_generator("cpu", args.seed, ORDER, 0))
    blocks, (rank, world) = order.tensor_split(max(2, math.ceil(len(order) / 25))), ranks()
    losses = torch.zeros(len(args.t), len(blocks), dtype=torch.float64, device=device)
    for b in tqdm(range(rank, len(blocks), world), desc="loss", leave=False, disable=rank > 0):
        x0 = test.x0(blocks[b].to(device), None)  # (B, C, H, W)
        for row, level in enumerate(args.t):
            draws = [stream_generator("cpu", args.seed, LOSS, round(1e6 * level), i) for i in blocks[b].tolist()]
            noise = torch.stack([torch.randn(x0.shape[1:], generator=draw) for draw in draws]).to(device)
            with args.autocast:
                losses[row, b] = model.diffusion.loss(model.net, x0, torch.full_like(x0[:, 0, 0, 0], level), noise)[0]
    result |= {"images": list(test.images.shape), "blocks": all_reduce(losses).tolist()}
    for name, other in (("loss", 0), ("difference", (*earlier, result)[0]["blocks"])):
        values = np.subtract(result["blocks"], other)
        result[name] = values.mean(1).tolist()
        result[f"{name}_se"] = (values.std(1, ddof=1) / len(blocks) ** 0.5).tolist()
    print(f"{model}\n{len(order)} test images of {args.dataset}")
    text = "{:.5f} +- {:.5f}" + ", difference {:+.5f} +- {:.5f}" * bool(earlier)
    for level, *row in zip(args.t, *(result[k] for k in "loss loss_se difference difference_se".split()), strict=True):
        print(f"{result['axis'][0]}={level:g}".ljust(14) + "held-out loss " + text.format(*row))
    return result


# ---- 4. Tables and pictures --------------------
def best_cell(cells):
    """The cell of highest linear accuracy; the raw baseline counts only where it is alone."""
    return max(cells, key=lambda cell: (cell["level"] is not None, cell["linear"]))


def describe(cell, result):
    """The number and its place: `top-1 72.04 % (out_2, t=11)`."""
    level = "" if cell["level"] is None else f", {result['axis'][0]}={cell['level']:g}"
    pool = f", {cell['pool']}" if len(result["pools"]) > 1 else ""
    return f"top-1 {cell['linear']:.2f} % ({cell['layer']}{level}{pool})"


def plot_lines(title, settings, *panels):
    """A figure of panels (y label, lines) side by side; a line is (name, x, y) or (name, x, y, standard errors)."""
    figure = Figure((1 + 6 * len(panels), 5), layout="constrained")
    figure.suptitle(title)
    for axes, (ylabel, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, x, *y) in enumerate(lines):
            axes.errorbar(x, *y, capsize=3, label=name, color=COLORS[i % 7], marker="os^Dv"[i % 5] * (len(x) < 25))
        axes.set(ylabel=ylabel, **settings)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    return figure


def plot_probes(results):
    """Accuracy over layers: lines for several poolings, else maps of each run's epochs, or a checkpoint's levels."""
    maps = {}  # {(folder, name, axis, layers): {column: accuracy of each layer}}
    one_level = all(len(r["levels"]) == 1 for r in results)
    levels = {f", {r['axis'][0]} = {r['levels'][0]:g}" for r in results if one_level}
    title = " and ".join({r["dataset"]: 0 for r in results}) + "".join(levels) * (len(levels) == 1)
    if any(len(r["pools"]) > 1 for r in results):
        lines = [(f"{r['name']}, {pool}", r["layers"], [cell["linear"] for cell in r["cells"] if cell["pool"] == pool])
                 for r in results for pool in r["pools"]]  # fmt: skip
        return plot_lines(title, {"xlabel": "layer"}, (ACCURACY, lines))
    for r in sorted(results, key=lambda result: result["epoch"]):
        run, columns = Path(r["checkpoint"]).absolute().parent, [r["epoch"]] if one_level else r["levels"]
        rows = np.reshape([cell["linear"] for cell in r["cells"] if cell["pool"]], (len(columns), -1))
        name = run.name if one_level else r["name"]
        maps.setdefault((run, name, r["axis"], *r["layers"]), {}).update(zip(columns, rows, strict=True))
    values = [np.stack([*columns.values()], 1) for columns in maps.values()]  # each (L, columns)
    low, high = min(map(np.min, values)), max(map(np.max, values))
    size = 1.5 + sum(1 + 0.5 * len(columns) for columns in maps.values()), max(3, 1.5 + 0.35 * len(values[0]))
    figure = Figure(size, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, ((_, name, axis, *layers), columns), value in zip(panels, maps.items(), values, strict=True):
        image = axes.imshow(value, aspect="auto", vmin=low, vmax=high)
        for (y, x), v in np.ndenumerate(value):
            axes.text(x, y, f"{v:.1f}", ha="center", va="center", color="wk"[int(2 * v > low + high)], size=8)
        axes.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
        axes.set(yticks=range(len(layers)), yticklabels=layers, xlabel="epoch" if one_level else axis)
        axes.set_title(name, size=9)
    figure.colorbar(image, ax=panels, label=ACCURACY)
    return figure


def plot_losses(results):
    """Held-out loss over levels; beside it the paired differences to the first run, in percent of its loss."""
    first, levels = results[0], results[0]["levels"]
    lines = [(r["name"], levels, r["loss"], r["loss_se"]) for r in results]
    changes = [(r["name"], levels, *(100 * np.divide((r["difference"], r["difference_se"]), first["loss"])))
               for r in results]  # fmt: skip
    panels = ("held-out loss ± standard error", lines), (f"paired difference to {first['name']}, %", changes)
    scale = {"xlabel": first["axis"], "xscale": "log" if first["axis"][0] == "s" else "linear"}
    return plot_lines(f"{first['dataset']}, {first['images'][0]} test images", scale, *panels[: len(results)])


def plot_training(folders):
    """Diffusion loss over images seen: running means over a twentieth of the log, without the steep first tenth."""
    lines = []
    for folder in map(Path, folders):
        log = (folder / "metrics.jsonl").read_text().splitlines()
        head, *rows = [json.loads(row) for row in log if row.endswith("}")]  # the last may be cut
        images, loss = np.array([(row["step"] * head["args"]["batch"], row["loss_diffusion"]) for row in rows], float).T
        n = 1 + len(loss) // 20
        lines.append((folder.name, *(np.convolve(x, np.ones(n) / n, "valid")[2 * n - 2 :] for x in (images, loss))))
    return plot_lines(head["args"]["dataset"], {"xlabel": "training images seen"}, ("diffusion loss", lines))


def plot_fid(files):
    """FID against the accuracy of the best cell: checkpoints matched by folder and epoch, arrows along a run."""
    found, runs = {}, {}  # {(folder, epoch): all that is known}; {folder: [(epoch, FID, accuracy)]}
    for file in files:
        content = json.loads(Path(file).read_text())
        for row in content.get("checkpoints") or content["results"]:
            found.setdefault((Path(row["checkpoint"]).absolute().parent, row["epoch"]), {}).update(row)
    for (folder, epoch), row in sorted(found.items()):
        if {"fid", "cells"} <= row.keys():
            runs.setdefault(folder, []).append((epoch, row["fid"], best_cell(row["cells"])["linear"]))
            dataset = row["dataset"]
    if not runs:
        fail("no checkpoint has both FID and accuracy: probe those that fid.py scored")
    lines = [(folder.name, *[*zip(*points, strict=True)][1:]) for folder, points in runs.items()]
    figure = plot_lines(dataset, {"xlabel": "FID (less is better), numbers: epoch"}, (ACCURACY, lines))
    for points in runs.values():
        for (_, *start), (epoch, *end) in zip(points[:1] + points[:-1], points, strict=True):
            figure.axes[0].annotate(epoch, end, (5, 5), textcoords="offset points")
            figure.axes[0].annotate("", end, start, arrowprops={"arrowstyle": "->", "lw": 0.5})
    return figure


# ---- 5. Flags and main -------------------------
def parse_args(argv=None):
    """Flags -> Namespace; None where the checkpoint decides."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("paths", nargs="+", metavar="RUN", help="checkpoints, run folders (last.pt), or JSON: Fig. 3")
    add = parser.add_argument_group("what is read").add_mutually_exclusive_group().add_argument
    add("--loss", action="store_true", help="held-out loss per level, and its difference to the first RUN's")
    add("--curves", action="store_true", help="draw the training loss so far")
    add("--layer", nargs="+", metavar="L", help="None: the checkpoint's --layer, [P] Tab. 10")
    add("--grid", action="store_true", help="every layer, at several levels")
    add = parser.add_argument_group("protocol ([P]) and run").add_argument
    add("--t", nargs="+", type=float, metavar="T", help="levels; None: with --grid, --loss a list, else --cl-t")
    add("--pool", nargs="+", choices=["gap", "token", "cls"], default=["gap"], help="mean, random token, [CLS] token")
    add("--pixels", action="store_true", help="also the flattened clean pixels or latents")
    add("--epochs", type=int, help="[P] Tab. 11; None: CIFAR 15, others 30")
    add("--lr", type=float, help="[P] Tab. 11; None: pixels 4e-3, latents 2e-3")
    add("--batch", type=int, help="None: ddpm 512, others 256 (our reading of [P] Tab. 11), latents 1440, tiny 128")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="flip at random")
    add("--batchnorm", action="store_true", help="standardise features by training mean and std")
    add("--subset", type=int, metavar="N", help="at most N random images of each split")
    add("--cache", action="store_true", help="fix the noise and train on stored features; kNN, too")
    add("--dataset", help="None: the training run's")
    add("--data", help="data root, or the cache of latents; None: the training run's")
    add("--json", type=Path, metavar="FILE", help="results; None: beside the first RUN, but not of one cell")
    add("--plot", type=Path, metavar="FILE.png", help="the picture; None: as --json")
    add("--features", type=Path, metavar="FILE.npz", help="features (last RUN, level, pool), labels")
    add("--seed", type=int, default=0, help="of order, flips and noise")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args(argv)
    if not all(0 < n < 1e15 for n in (args.epochs, args.lr, args.batch, args.subset, args.seed + 1) if n is not None):
        parser.error("--epochs, --lr, --batch, --subset must be above 0, --seed at least 0")
    if args.plot and args.plot.suffix != ".png":
        parser.error("--plot takes FILE.png")
    if len(args.pool) > 1 < len(args.t or []) or args.loss and (args.pool[1:] or args.features or args.pixels):
        parser.error("several --pool go with one --t; they, --features and --pixels not with --loss")
    first = Path(args.paths[0])
    args.files, folder = first.suffix == ".json", first if os.path.isdir(first) else first.parent
    name = "probe_pools" if args.pool[1:] else "probe_epochs" if not args.grid else "probe_grid"
    name = "heldout_loss" if args.loss else "training_loss" if args.curves else "fid_accuracy" if args.files else name
    if name != "probe_epochs" or len(args.paths) > 1:
        args.json = args.json or folder / f"{name}.json"
        args.plot = args.plot or args.json.with_suffix(".png")
    return args


@told("stopped", TROUBLE)
def main(args):
    """Probe every checkpoint, or do what the flags ask; returns the results."""
    for path in (files := [path for path in (args.json, args.plot, args.features) if path]):
        if path.is_dir() or not os.access(path if path.exists() else f"{path.parent}/", os.W_OK):
            fail(f"cannot write {path}: name a file in a folder that exists")
    if args.curves or args.files:
        with told(f"{' '.join(args.paths)}: missing, damaged or empty"):
            (plot_training if args.curves else plot_fid)(args.paths).savefig(args.plot, dpi=150)
            return print(f"wrote {args.plot}")
    rank, world, device = setup_distributed(args.device)
    sys.stdout = sys.stdout if rank == 0 else None
    torch.set_float32_matmul_precision("high")
    results = []
    if len(args.paths) > 1:  # mistakes show first
        models = (load(path, args, "cpu") for path in args.paths)
        kinds = {(type(m.diffusion).__name__, args.dataset or m.args.dataset, m.net.shape) for m in models}
        if args.loss and len(kinds) > 1:
            fail(f"{' and '.join(args.paths)} differ in formulation, data set or resolution")
    for path in args.paths:
        model = load(path, args, device)
        results.append(heldout_loss(model, args, device, results) if args.loss else probe(model, args, device))
        content = {"checkpoints": results}
        if not args.loss:
            cell, best = max(((best_cell(r["cells"]), r) for r in results), key=lambda pair: pair[0]["linear"])
            content |= {"top1": cell["linear"], "checkpoint": best["checkpoint"], "epoch": best["epoch"]} | cell
        if rank == 0 and args.json:  # a job may be cut short
            args.json.write_text(json.dumps(content, indent=1))
    if rank == 0 and args.plot:
        (plot_losses if args.loss else plot_probes)(results).savefig(args.plot, dpi=150)
    print(*(f"wrote {path}" for path in files), sep="\n", end="\n" * bool(files))
    if not args.loss:
        print(describe(cell, best) + f", {best['name']}" * (len(results) > 1))
    if world > 1:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main(parse_args())
