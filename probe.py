"""What a checkpoint knows: a linear layer on the frozen feature of every layer, at many noise levels. [P] is DDAE++

    python probe.py runs/NAME                            # at the paper's layer and level ([P] Tab. 10)
    python probe.py runs/NAME --grid --pixels --cache    # layers x levels, beside raw input
    python probe.py runs/NAME/epoch_{0800,1000,1200}.pt  # CIFAR: the best of three
    python probe.py probe.json fid.json --plot fid.png   # [P] Fig. 3, from what probe.py and fid.py wrote
    torchrun --nproc_per_node=4 probe.py runs/A runs/B --loss    # held-out loss, paired

The protocol of [P] (DDAE++, arXiv:2505.10999, Tab. 11; ancestor [DDAE], arXiv:2303.09769): EMA weights, cross-entropy,
Adam with a cosine to 0, horizontal flip only, fresh noise in each epoch, no label; one fixed noise per test image.

x0 clean image   noise unit noise   level step, sigma or time   feat (B, D) pooled feature, layers side by side
B batch   N images of a split   D width, summed over the L layers probed   K classes
"""

import argparse
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from sample import UserError, check_writable, comparison_name, describe, load_checkpoint, run_tool, setup_distributed

# By formulation: the noise level, and levels of --grid and of --loss. Those of --grid lie around [P] Tab. 10, ours.
TENTHS = [i / 10 for i in range(1, 10)]
LEVELS = {
    "DDPM": ("t (step of 1000)", [1, 11, 33, 66, 130, 260], [1, 10, 30, *range(100, 1001, 100)]),
    "EDM": ("s (sigma)", [0.0075, 0.023, 0.06, 0.14, 0.2964, 0.585],
            [0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2, 6, 20, 80]),
    "RF": ("t (time)", [0.01, 0.03, 0.06, 0.12, 0.25, 0.4], [0.02, *TENTHS, 0.98]),
    "LatentRF": ("t (time)", [0.06, 0.15, 0.25, 0.35, 0.5], [0.02, *TENTHS, 0.98]),
}
# Batch of pixels; others 256. UNSPECIFIED: our reading of [P] Tab. 11; tiny: ours
BATCHES = {"ddpm": 512, "tiny": 128}
BLOCK = 512  # images whose noise is drawn as a whole, so this is fixed
KNN_K, KNN_TEMPERATURE = 20, 0.07
ORDER, NOISE, TRAIN, FLIPPED, TEST, SUBSET, LOSS = range(7)  # streams of random numbers under one --seed
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v")
PROTOCOL = ("dataset", "epochs", "lr", "batch", "flip", "batchnorm", "cache", "amp", "seed")  # what is told
ACCURACY = "linear top-1 accuracy, %"

# ---- 1. Random numbers, ranks, data, frozen features ----
def stream_generator(device, *numbers):
    """A generator of its own for each (seed, stream, index, ..)."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

def rank_and_world():
    """This process's rank and the number of ranks."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()

def all_reduce(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def print_once(text):
    """Print on rank 0."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)

@dataclass
class Split:
    """The images and labels of a split."""
    images: torch.Tensor  # uint8 (N, 3, H, W), or latents float16 (N, 2, C, h, w), each image and its mirror image
    labels: torch.Tensor  # int64 (N,), on the device
    classes: int
    to_x0: object  # of the train script

    def x0(self, index, flip):
        """Images by index (B,), mirrored where flip (B,): (B, C, H, W) float32 on the device."""
        images = self.images[index.to(self.images.device)]
        return self.to_x0(images.to(index.device), flip)

def load_split(model, args, split, device):
    """Read a split through the checkpoint's train script; images on the device unless they would fill it."""
    flags = argparse.Namespace(**vars(model.args))
    flags.dataset = args.dataset or flags.dataset
    flags.data = args.data or flags.data
    if getattr(flags, "cache_latents", None):
        flags.cache_latents = args.data or flags.cache_latents
    images, labels, classes = model.script.load_data(flags, split)
    if args.subset:
        generator = stream_generator("cpu", args.seed, SUBSET, 0)
        chosen = torch.randperm(len(labels), generator=generator)[: args.subset]
        images, labels = images[chosen], labels[chosen]
    if device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return Split(images, labels.to(device), len(classes), model.script.to_x0)

@dataclass
class Encoder:
    """The frozen network at one noise level: (x0, noise), both (B, C, H, W) -> feat (B, D) float32."""
    model: object  # of load_checkpoint
    level: float | None  # None: no network, the clean x0 itself
    layers: dict  # name -> width of what stands side by side in D
    pool: str | None = "gap"  # or "token", "cls"
    autocast: object = torch.autocast("cpu", enabled=False)

    @torch.no_grad()
    def __call__(self, x0, noise):
        if len(x0) == 0:  # a rank may get nothing of the last batch
            return x0.new_zeros(0, sum(self.layers.values()))
        if self.level is None:
            return x0.flatten(1)  # (B, C*H*W)
        last = max(self.layers, key=self.model.net.layers.index)  # later layers are not run
        with self.autocast:
            feats = self.model.diffusion.features(
                self.model.net, x0, self.level, noise, y=None, pool=self.pool, last=last)
        return torch.cat([feats[name].float() for name in self.layers], dim=1)  # (B, D)

def stored_features(encode, split, stream, seed, flip=False):
    """Features of a whole split under one fixed noise per image, for any number of ranks: (N, D) float32 on each."""
    device, n = split.labels.device, len(split.labels)
    rank, world = rank_and_world()
    feats = torch.zeros(n, sum(encode.layers.values()), device=device)
    blocks = range(rank, math.ceil(n / BLOCK), world)
    for block in tqdm(blocks, desc="features", leave=False, disable=rank > 0):
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
        feats = ((feat - self.mean) / self.std).split(self.widths, dim=1)
        weights = self.weight.split(self.widths)
        return torch.stack([x @ w + b for x, w, b in zip(feats, weights, self.bias, strict=True)])

    @torch.no_grad()
    def accuracy(self, feat, labels):
        """Top-1 accuracy of each head in percent, a list of L floats, from feat (N, D) and labels (N,)."""
        hits = torch.zeros(len(self.widths), device=feat.device)
        for x, y in zip(feat.split(BLOCK), labels.split(BLOCK), strict=True):
            hits += (self(x).argmax(2) == y).sum(1)
        return (100 * hits / len(labels)).tolist()

def train_heads(encode, train, args, stored=(), mean=0.0, std=1.0):
    """Train the heads of all layers at once; their losses are summed, so each learns as if alone.

    stored: features (N, D) to train on instead of fresh ones, (without flip, with flip). Order, flips and noise are
    drawn for whole batches, of which a rank takes its share: all ranks end with the same Heads, as one rank would.
    """
    device, n = train.labels.device, len(train.labels)
    rank, world = rank_and_world()
    heads = Heads(encode.layers.values(), train.classes, mean, std).to(device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=args.lr)
    total, done = args.epochs * math.ceil(n / args.batch), 0  # steps
    bar = tqdm(total=total, desc="heads", leave=False, disable=rank > 0)
    for epoch in range(args.epochs):
        generator = stream_generator("cpu", args.seed, ORDER, epoch)
        noise_generator = stream_generator(device, args.seed, NOISE, epoch)
        order = torch.randperm(n, generator=generator).to(device)
        flip = torch.rand(n, generator=generator) < (0.5 if args.flip else 0)
        flip = flip.to(device)  # (N,), of image i
        for step, batch in enumerate(order.split(args.batch)):  # the smaller last one, too, as in [DDAE]
            index = batch.tensor_split(world)[rank]  # this rank's share, (b,)
            if stored:
                feat = torch.where(flip[index, None], stored[1][index], stored[0][index])  # (b, D)
            else:
                x0 = train.x0(index, flip[index])
                noise = torch.randn(len(batch), *x0.shape[1:], generator=noise_generator, device=device)
                torch.manual_seed(noise_generator.initial_seed() + step * world + rank)  # for --pool token
                feat = encode(x0, noise.tensor_split(world)[rank])
            logits = heads(feat)  # (L, b, K)
            labels = train.labels[index].repeat(len(logits))  # (L * b,)
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / len(batch)
            optimizer.zero_grad()
            loss.backward()
            for parameter in heads.parameters():
                all_reduce(parameter.grad)
            progress = done / total  # UNSPECIFIED: the cosine moves per step; in [DDAE] per epoch
            optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * progress)) / 2
            optimizer.step()
            done += 1
            bar.update()
    bar.close()
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
            score = torch.zeros(len(q), classes, device=q.device)
            score.scatter_add_(1, bank_labels[near], weight)  # (b, K)
            hits += (score.argmax(1) == y).sum().item()
        accuracy.append(100 * hits / len(labels))
    return accuracy

# ---- 3. The probe of one checkpoint ------------
def load_model(path, args, device):
    """load_checkpoint; raises UserError for layers and levels that the checkpoint does not have."""
    model = load_checkpoint(path, device, args.script)
    for layer in args.layer or []:
        if layer not in model.net.layers:
            known = " ".join(model.net.layers)
            raise UserError(f"{model.path} has no layer {layer}: choose --layer from {known}")
    for level in args.t or []:
        try:
            model.diffusion.check_level(level)
        except ValueError as error:
            raise UserError(f"{model.path}, --t: {error}") from error
    return model

def fill_in_protocol(args, model, split, device):
    """A copy of the flags with what they leave open, from [P] Tab. 10 and 11; and args.autocast."""
    args, trained = argparse.Namespace(**vars(args)), model.args
    args.dataset = args.dataset or trained.dataset
    latents = split.images.ndim == 5
    size = trained.backbone if "backbone" in trained else trained.size
    args.epochs = args.epochs or (15 if args.dataset in ("cifar10", "cifar100") else 30)
    args.lr = args.lr or (2e-3 if latents else 4e-3)
    args.batch = args.batch or (1440 if latents else BATCHES.get(size, 256))
    args.amp = model.script.choose_precision(args.amp, device)
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    args.autocast = torch.autocast(device.type, dtype, enabled=args.amp != "off")
    _, grid_levels, loss_levels = LEVELS[type(model.diffusion).__name__]
    if args.t is None:
        args.t = [trained.cl_t]
        if args.grid and len(args.pool) == 1:
            args.t = grid_levels
        if args.loss:
            args.t = loss_levels
    return args

def describe_result(model, args):
    """The head of a result: what was measured, a dict of plain values."""
    axis, _, _ = LEVELS[type(model.diffusion).__name__]
    return {"checkpoint": str(model.path), "name": model.name, "flags": describe(model.args),
            "dataset": args.dataset, "axis": axis, "levels": args.t, "epoch": model.epoch}

def make_encoders(model, args, x0):
    """An Encoder per pooling and level, and one of raw input. An image x0 (1, C, H, W) shows layers and widths."""
    encoders = []
    for pool in args.pool:
        try:
            feats = model.diffusion.features(model.net, x0, args.t[0], torch.zeros_like(x0), y=None, pool=pool)
        except ValueError as error:
            if pool == args.pool[0]:
                raise UserError(f"{model.path}: {error}") from error
            print_once(f"note: {model.path}: {error}")  # [P] Fig. 4 has a network without [CLS]
            continue
        names = args.layer or [model.args.layer]
        if args.grid:
            names = list(feats)
        layers = {name: feats[name].shape[1] for name in names}
        encoders += [Encoder(model, level, layers, pool, args.autocast) for level in args.t]
    if args.pixels:
        encoders.append(Encoder(model, None, {"pixels": x0.numel()}, pool=None))
    return encoders

def probe(model, args, device):
    """Probe a checkpoint: a dict of plain values, the protocol and the cells of probe_level."""
    train, test = load_split(model, args, "train", device), load_split(model, args, "test", device)
    if train.classes < 2:
        name = args.dataset or model.args.dataset
        raise UserError(f"--dataset {name} has no classes to probe; --loss needs none")
    args = fill_in_protocol(args, model, train, device)
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    protocol["images"] = f"{len(train.labels)} train, {len(test.labels)} test, {train.classes} classes"
    print_once(f"{model}\nprotocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()))
    first = train.x0(torch.zeros(1, dtype=torch.long, device=device), None)  # (1, C, H, W)
    encoders = make_encoders(model, args, first)
    result = describe_result(model, args)
    pools = list(dict.fromkeys(encode.pool for encode in encoders if encode.pool))
    result.update(layers=list(encoders[0].layers), pools=pools, protocol=protocol, cells=[])
    for encode in encoders:
        cells = probe_level(encode, train, test, args)
        result["cells"] += cells
        if len(args.paths) * len(encoders) * len(cells) > 1:  # main prints a single number
            for cell in cells:
                print_once(describe_cell(cell, result))
    return result

def probe_level(encode, train, test, args):
    """Accuracy of every layer in percent: list of dicts with layer, level, pool, linear and knn (None: not asked)."""
    widths = encode.layers.values()
    test_feat = stored_features(encode, test, TEST, args.seed)  # (N, D)
    if not torch.isfinite(test_feat).all():
        path = encode.model.path
        raise UserError(f"{path}: the features hold NaN or infinity; try --amp off, or an earlier epoch")
    stored, mean, std, nearest = (), 0.0, 1.0, [None] * len(widths)
    if args.cache or args.batchnorm or args.features:
        bank = stored_features(encode, train, TRAIN, args.seed)  # (N, D)
        nearest = knn(test_feat, test.labels, bank, train.labels, widths, train.classes)
    if args.features and encode.level is not None and rank_and_world()[0] == 0:
        arrays = {"train": bank, "train_labels": train.labels, "test": test_feat, "test_labels": test.labels}
        with open(args.features, "wb") as file:
            np.savez(file, **{name: array.cpu() for name, array in arrays.items()})
    if args.batchnorm:
        mean, std = bank.mean(0), (bank.var(0, correction=0) + 1e-5).sqrt()  # 1e-5 as in BatchNorm
    if args.cache:
        mirrored = stored_features(encode, train, FLIPPED, args.seed, flip=True) if args.flip else bank
        stored = (bank, mirrored)
    linear = train_heads(encode, train, args, stored, mean, std).accuracy(test_feat, test.labels)
    cells = []
    for layer, accuracy, neighbours in zip(encode.layers, linear, nearest, strict=True):
        se = standard_error(accuracy, len(test.labels))
        cells.append({"layer": layer, "level": encode.level, "pool": encode.pool, "linear": accuracy,
                      "linear_se": se, "knn": neighbours})
    return cells

def standard_error(accuracy, n):
    """Standard error, in percent, of an accuracy in percent over n test images."""
    return math.sqrt(accuracy * (100 - accuracy) / n)

def best_cell(cells):
    """The cell of highest linear accuracy; raw input counts only where it is alone."""
    return max(cells, key=lambda cell: (cell["level"] is not None, cell["linear"]))

def describe_cell(cell, result):
    """The number and its place: `top-1 72.04 % +- 0.45 (out_2, t=11)`; with kNN where it was measured."""
    place = cell["layer"]
    if cell["level"] is not None:
        place += f", {result['axis'][0]}={cell['level']:g}"
    if cell["pool"] not in (None, "gap"):
        place += f", {cell['pool']}"
    text = f"top-1 {cell['linear']:.2f} % +- {cell['linear_se']:.2f} ({place})"
    if cell["knn"] is not None:
        text += f", kNN {cell['knn']:.2f} %"
    return text

# ---- 4. Held-out loss --------------------------
@torch.no_grad()
def heldout_loss(model, args, device, first=None):
    """The formulation's loss on the test split, unweighted, without class or augmentation label: a dict.

    diffusion.loss averages over its batch, so one observation is the mean of a random block of about 25 images. Noise
    depends on image and level alone, so that blocks pair up with those of `first`, the first checkpoint's result.
    """
    test = load_split(model, args, "test", device)
    args = fill_in_protocol(args, model, test, device)
    n = len(test.labels)
    if n < 2:
        raise UserError(f"--loss needs two test images or more, {args.dataset} has {n}")
    rank, world = rank_and_world()
    order = torch.randperm(n, generator=stream_generator("cpu", args.seed, ORDER, 0))
    blocks = order.tensor_split(max(2, math.ceil(n / 25)))
    losses = torch.zeros(len(args.t), len(blocks), dtype=torch.float64, device=device)
    for b in tqdm(range(rank, len(blocks), world), desc="loss", leave=False, disable=rank > 0):
        x0 = test.x0(blocks[b].to(device), None)  # (B, C, H, W)
        for row, level in enumerate(args.t):
            noise = [noise_of_image(i, level, args.seed, x0.shape[1:]) for i in blocks[b].tolist()]
            levels = x0.new_full((len(x0),), level)
            with args.autocast:
                _, unweighted, _ = model.diffusion.loss(model.net, x0, levels, torch.stack(noise).to(device))
            losses[row, b] = unweighted
    losses = all_reduce(losses).cpu().numpy()  # (levels, blocks)
    result = describe_result(model, args)
    result.update(images=list(test.images.shape), blocks=losses.tolist())
    differences = losses - np.array((first or result)["blocks"])
    for name, values in (("loss", losses), ("difference", differences)):
        result[name] = values.mean(1).tolist()
        result[f"{name}_se"] = (values.std(1, ddof=1) / len(blocks) ** 0.5).tolist()
    print_once(f"{model}\n{n} test images of {args.dataset}")
    for i, level in enumerate(args.t):
        text = f"{result['axis'][0]}={level:g}".ljust(14)
        text += f"held-out loss {result['loss'][i]:.5f} +- {result['loss_se'][i]:.5f}"
        if first:
            text += f", difference {result['difference'][i]:+.5f} +- {result['difference_se'][i]:.5f}"
        print_once(text)
    return result

def noise_of_image(index, level, seed, shape):
    """The noise of a test image at a level, of `shape`, on the CPU."""
    generator = stream_generator("cpu", seed, LOSS, round(1e6 * level), index)
    return torch.randn(shape, generator=generator)

# ---- 5. Figures --------------------------------
def new_figure(panels, results, height=5):
    """A figure that is headed by the data sets, and its panels in a row."""
    figure = Figure((1 + 6 * panels, height), layout="constrained")
    figure.suptitle(" and ".join(dict.fromkeys(result["dataset"] for result in results)))
    return figure, figure.subplots(1, panels, squeeze=False)[0]

def finish_panel(axes, xlabel, ylabel):
    """Labels, a light grid, and the legend below."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)

def style(number):
    """Colour and marker of a figure's line number 0, 1, .."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}

def network_cells(results):
    """The cells of results, but those of raw input."""
    return [cell for result in results for cell in result["cells"] if cell["level"] is not None]

def draw_layer_maps(results):
    """Accuracy by layer: a map per run with a column per epoch ([P] Fig. 5), or per checkpoint with one per level."""
    by_epoch = all(len(result["levels"]) == 1 for result in results)
    maps = {}  # {what has a map of its own: its results}
    for i, result in enumerate(results):
        run = (Path(result["checkpoint"]).parent, result["axis"], *result["layers"])
        maps.setdefault(run if by_epoch else i, []).append(result)
    accuracies = [cell["linear"] for cell in network_cells(results)]
    low, high = min(accuracies), max(accuracies)
    figure, panels = new_figure(len(maps), results)
    width = 2
    for axes, group in zip(panels, maps.values(), strict=True):
        first = group[0]
        ticks, title = [f"{level:g}" for level in first["levels"]], first["name"]
        xlabel = f"noise level {first['axis']}"
        if by_epoch:
            ticks = [result["epoch"] for result in group]
            xlabel = f"epoch, at {first['axis'][0]} = {first['levels'][0]:g}"
            title = first["name"].split(",")[0]
        values = [cell["linear"] for cell in network_cells(group)]
        values = np.reshape(values, (-1, len(first["layers"]))).T  # (layers, columns)
        image = axes.imshow(values, aspect="auto", vmin=low, vmax=high)
        for (y, x), value in np.ndenumerate(values):
            color = "w" if value < (low + high) / 2 else "k"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=color, size=8)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_yticks(range(len(first["layers"])), first["layers"])
        axes.set_xlabel(xlabel)
        columns = max(4, len(ticks))
        title = textwrap.fill(f"{title}: {first['flags']}", 7 * columns, break_on_hyphens=False)
        axes.set_title(title, size=8)
        width += 1 + 0.5 * columns
    figure.set_size_inches(width, 2.5 + 0.35 * max(len(result["layers"]) for result in results))
    figure.colorbar(image, ax=panels, label=ACCURACY)
    return figure

def draw_poolings(results):
    """Accuracy over layers: a line per checkpoint and pooling. [P] Fig. 4"""
    figure, (axes,) = new_figure(1, results)
    number = 0
    for result in results:
        for pool in result["pools"]:
            accuracies = [cell["linear"] for cell in network_cells([result]) if cell["pool"] == pool]
            label = f"{pool}: {result['name']}, {result['flags']}"
            axes.plot(result["layers"], accuracies, label=label, **style(number))
            number += 1
    first = results[0]
    finish_panel(axes, f"layer, at {first['axis'][0]} = {first['levels'][0]:g}", ACCURACY)
    return figure

def draw_heldout_loss(results):
    """Held-out loss over levels; beside it the paired differences to the first run, in percent of its loss."""
    first = results[0]
    figure, panels = new_figure(min(2, len(results)), results)
    for number, result in enumerate(results):
        label = f"{result['name']}, {result['flags']}"
        look = {"capsize": 3, **style(number)}
        panels[0].errorbar(result["levels"], result["loss"], result["loss_se"], label=label, **look)
        if number > 0:
            percent = 100 / np.array(first["loss"])
            difference, error = percent * result["difference"], percent * result["difference_se"]
            panels[1].errorbar(first["levels"], difference, error, label=result["name"], **look)
    xlabel, n = f"noise level {first['axis']}", first["images"][0]
    finish_panel(panels[0], xlabel, f"held-out loss ± standard error, {n} images")
    if len(results) > 1:
        panels[1].axhline(0, color=COLORS[0], label=first["name"])
        finish_panel(panels[1], xlabel, f"paired difference to {first['name']}, %")
    for axes in panels:
        if first["axis"] == LEVELS["EDM"][0]:
            axes.set_xscale("log")
    return figure

def read_log(folder):
    """What metrics.jsonl says: the flags (dict), and images seen and the unweighted diffusion loss, arrays (n,)."""
    path, flags, images, losses = Path(folder, "metrics.jsonl"), None, [], []
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line) if line.endswith("}") else {}  # the last may be cut
            if "args" in row:  # the first, and one of each resume
                flags = row["args"]
            elif row:
                images.append(float(row["step"] * flags["batch"]))
                losses.append(float(row["loss_unweighted"]))
        if not images:
            raise ValueError("no step yet")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: missing, damaged, empty, or without loss_unweighted ({error!r})") from error
    return flags, np.array(images), np.array(losses)

def draw_training_loss(folders):
    """Unweighted diffusion loss over images seen, also while runs go on: running means over as many images for all."""
    logs = [read_log(folder) for folder in folders]
    window = min(images[-1] for _, images, _ in logs) / 20  # images
    figure, (axes,) = new_figure(1, [flags for flags, _, _ in logs])
    for folder, (flags, images, losses) in zip(folders, logs, strict=True):
        if flags["model"] != logs[0][0]["model"]:
            raise UserError(f"{folders[0]} and {folder} differ in formulation: their losses do not compare")
        n = max(1, round(window * len(images) / images[-1]))  # lines of a window
        start = min(2 * n, len(images) - n)  # without the steep beginning
        means = np.ones(n) / n
        images = np.convolve(images[start:], means, "valid")
        losses = np.convolve(losses[start:], means, "valid")
        label = f"{Path(folder).absolute().name}, {describe(argparse.Namespace(**flags))}, {flags['dataset']}"
        axes.plot(images, losses, label=label, alpha=0.8)
    finish_panel(axes, "training images seen", f"unweighted diffusion loss, mean over {window:.0f} images")
    return figure

def read_results(files):
    """What JSON files of probe.py and fid.py say of checkpoints: {run folder: {epoch: {fid, accuracy, label, ..}}}."""
    runs = {}
    for file in files:
        try:
            content = json.loads(Path(file).read_text())
            for row in content.get("checkpoints") or content["results"]:
                folder = str(Path(row["checkpoint"]).absolute().parent)
                found = runs.setdefault(folder, {}).setdefault(int(row["epoch"]), {})
                if "fid" in row:
                    found["fid"] = float(row["fid"])
                if "cells" in row:
                    found["accuracy"] = float(best_cell(row["cells"])["linear"])
                    found["label"] = f"{row['name'].split(',')[0]}, {row['flags']}"
                    found["dataset"] = row["dataset"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: missing, damaged or empty ({error!r})") from error
    return runs

def draw_fid_against_accuracy(files):
    """Accuracy of the best cell over FID: checkpoints matched by folder and epoch, lines along a run. [P] Fig. 3"""
    figure, (axes,) = new_figure(1, [])
    datasets = []
    for number, epochs in enumerate(read_results(files).values()):
        points = []
        for epoch, row in sorted(epochs.items()):
            if "fid" in row and "accuracy" in row:
                points.append((row["fid"], row["accuracy"]))
                axes.annotate(f"epoch {epoch}", points[-1], (5, 5), textcoords="offset points", size=8)
                label = row["label"]
                datasets.append(row["dataset"])
        if points:
            axes.plot(*np.transpose(points), label=label, **style(number))
    if not datasets:
        raise UserError("no checkpoint has both FID and accuracy: probe those that fid.py scored")
    figure.suptitle(" and ".join(dict.fromkeys(datasets)))
    finish_panel(axes, "FID (less is better)", ACCURACY)
    return figure

# ---- 6. Flags and main -------------------------
def parse_args(argv=None):
    """Flags -> Namespace; None where the checkpoint decides."""
    parser = argparse.ArgumentParser(usage="%(prog)s RUN [RUN ...] [flags]", description=__doc__.split("\n\n")[0])
    parser.add_argument("paths", nargs="+", metavar="RUN",
                        help="checkpoints, run folders (their last.pt), or JSON files of probe.py and fid.py (Fig. 3)")
    add = parser.add_argument_group("what is read (default: one layer)").add_mutually_exclusive_group().add_argument
    add("--layer", nargs="+", metavar="L", help="layers (default: the run's --layer)")
    add("--grid", action="store_true", help="every layer, at several levels")
    add("--loss", action="store_true", help="held-out loss per level, and its difference to the first RUN's")
    add("--curves", action="store_true", help="draw the training loss so far, of run folders")
    add = parser.add_argument_group("features").add_argument
    add("--t", nargs="+", type=float, metavar="T", help="noise levels: DDPM steps 0 .. 1000, EDM sigmas 0.002 .. 80, "
        "others times 0 .. 1 (default: the run's --cl-t; with --grid and --loss a list)")
    add("--pool", nargs="+", choices=["gap", "token", "cls"], default=["gap"],
        help="mean over the image, a random token, U-ViT's [CLS] token (default: gap)")
    add("--pixels", action="store_true", help="also the flattened clean pixels or latents")
    add("--features", type=Path, metavar="FILE", help="npz to write features and labels to (last RUN, level, pool)")
    add = parser.add_argument_group("heads: the paper's protocol, and ways to leave it").add_argument
    add("--epochs", type=int, help="(default: CIFAR 15, others 30)")
    add("--lr", type=float, help="(default: pixels 4e-3, latents 2e-3)")
    add("--batch", type=int, help="over all ranks (default: --backbone ddpm 512, tiny 128, others 256, latents 1440)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="flip at random (default: on)")
    add("--cache", action="store_true", help="quick: noise is fixed, features are stored; with kNN")
    add("--batchnorm", action="store_true", help="standardise features by training mean and std; with kNN")
    add("--subset", type=int, metavar="N", help="at most N random images of each split (default: all)")
    add = parser.add_argument_group("data and run").add_argument
    add("--dataset", help="(default: the training run's)")
    add("--data", help="data root, or folder of latents (default: the training run's)")
    add("--json", type=Path, metavar="FILE", help="results (default: beside the first RUN, but not of a single number)")
    add("--plot", type=Path, metavar="FILE.png", help="the picture (default: beside --json)")
    add("--seed", type=int, default=0, help="of order, flips and noise (default: 0)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="(default: auto, as in training)")
    add("--script", metavar="FILE", help="your train script, of checkpoints that none of the three scripts wrote")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    for name in ("epochs", "lr", "batch", "subset"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e15:
            parser.error(f"--{name} must be above 0")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if args.plot and args.plot.suffix != ".png":
        parser.error("--plot takes FILE.png")
    if len(args.pool) > 1 and len(args.t or []) > 1:
        parser.error("several --pool go with one --t")
    if args.loss and (len(args.pool) > 1 or args.features or args.pixels):
        parser.error("several --pool, --features and --pixels do not go with --loss")
    args.files = args.paths[0].endswith(".json")
    kind, several, first = kind_of_results(args), len(args.paths) > 1, Path(args.paths[0])
    name = f"{kind}_{comparison_name(args.paths)}" if several and not args.files else kind
    if several or kind != "probe":
        folder = first if first.is_dir() else first.parent
        args.json = args.json or folder / f"{name}.json"
    if kind != "probe":
        args.plot = args.plot or args.json.with_suffix(".png")
    return args

def kind_of_results(args):
    """What the files of a command are called, but for the runs that it compares."""
    if args.files:
        return "fid_accuracy"
    if args.curves:
        return "training_loss"
    if args.loss:
        return "heldout_loss"
    if len(args.pool) > 1:
        return "probe_pools"
    return "probe_grid" if args.grid else "probe"

def draw_probes(results):
    """The figure that suits the results of probe."""
    several = any(len(result["pools"]) > 1 for result in results)
    return draw_poolings(results) if several else draw_layer_maps(results)

def check_comparison(args):
    """Load every checkpoint once, so that mistakes show before the long part; --loss compares like with like."""
    kinds = set()
    for path in args.paths:
        model = load_model(path, args, "cpu")
        kinds.add((type(model.diffusion).__name__, args.dataset or model.args.dataset, model.net.shape))
    if args.loss and len(kinds) > 1:
        raise UserError(f"{' and '.join(args.paths)} differ in formulation, data set or resolution")

def main(args):
    """Probe every checkpoint, or measure and draw what the flags ask; returns the results."""
    for path in (args.json, args.plot, args.features):
        if path:
            check_writable(path)
    if args.curves or args.files:
        draw = draw_training_loss if args.curves else draw_fid_against_accuracy
        draw(args.paths).savefig(args.plot, dpi=150)
        return print(f"wrote {args.plot}")
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")
    if len(args.paths) > 1:
        check_comparison(args)

    # 1. The numbers, written as they come: a job may be cut short.
    results = []
    for path in args.paths:
        model = load_model(path, args, device)
        if args.loss:
            result = heldout_loss(model, args, device, first=results[0] if results else None)
        else:
            result = probe(model, args, device)
        results.append(result)
        content = {"checkpoints": results}
        if not args.loss:
            best = max(results, key=lambda result: best_cell(result["cells"])["linear"])
            cell = best_cell(best["cells"])
            content.update(cell, top1=cell["linear"], checkpoint=best["checkpoint"], epoch=best["epoch"])
        if rank == 0 and args.json:
            args.json.write_text(json.dumps(content, indent=1))

    # 2. The picture, and the number, of several the best.
    if rank == 0 and args.plot:
        draw = draw_heldout_loss if args.loss else draw_probes
        draw(results).savefig(args.plot, dpi=150)
    for path in (args.json, args.plot, args.features):
        if path:
            print_once(f"wrote {path}")
    if not args.loss:
        if len(results) > 1:
            print_once(f"best: {best['name']}")
        print_once(describe_cell(cell, best))
    if world > 1:
        dist.destroy_process_group()
    return results

if __name__ == "__main__":
    run_tool(main, parse_args())
