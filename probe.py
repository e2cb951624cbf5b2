"""Linear probes of a checkpoint's frozen features, its held-out loss, and the figures of [P].

    python probe.py runs/NAME                            # at the paper's layer and level ([P] Tab. 10)
    python probe.py runs/NAME --grid --pixels --cache    # layers x levels, beside raw input
    python probe.py runs/NAME/epoch_{0800,1000,1200}.pt  # CIFAR: the best of three
    python probe.py probe.json fid.json --plot fid.png   # [P] Fig. 3, from what probe.py and fid.py wrote
    torchrun --nproc_per_node=4 -- probe.py runs/A runs/B --loss    # held-out loss, on the same images and noise

The protocol of [P] (DDAE++, arXiv:2505.10999, Tab. 11; ancestor [DDAE], arXiv:2303.09769): EMA weights, cross-entropy,
Adam with a cosine to 0, horizontal flip only, fresh noise in each epoch and one fixed noise per test image. The network
is given no class. UNSPECIFIED marks what [P] leaves open.

x0 clean image   noise unit noise   level step, sigma or time   feat (B, D) pooled feature, layers side by side
B batch   N images of a split   D width, summed over the L layers probed   K classes
model is what sample.load_checkpoint returns: the train script and its flags, the network, the diffusion process, and
a name, "run, epoch N". A result is a dict of one checkpoint, as in the JSON file. Its cells are dicts of one accuracy
each, with the layer and the level (None: of the raw input).
"""

import argparse
import json
import math
import os
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


@dataclass
class Levels:
    """A formulation's noise levels: how they are called, and those of --grid (ours, around [P] Tab. 10) and --loss."""
    symbol: str
    unit: str
    grid: list
    loss: list

TENTHS = [i / 10 for i in range(1, 10)]
LEVELS = {  # by the class of model.diffusion
    "DDPM": Levels("t", "step of 1000", [1, 11, 33, 66, 130, 260], [1, 10, 30, *range(100, 1001, 100)]),
    "EDM": Levels("s", "sigma", [0.0075, 0.023, 0.06, 0.14, 0.2964, 0.585],
                  [0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2, 6, 20, 80]),
    "RF": Levels("t", "time", [0.01, 0.03, 0.06, 0.12, 0.25, 0.4], [0.02, *TENTHS, 0.98]),
    "LatentRF": Levels("t", "time", [0.06, 0.15, 0.25, 0.35, 0.5], [0.02, *TENTHS, 0.98]),
}
# Batch for networks on pixels, by --backbone or --size; others 256. UNSPECIFIED: as we read [P] Tab. 11; tiny is ours
BATCHES = {"ddpm": 512, "tiny": 128}
NOISE_BLOCK = 512  # images whose noise comes from one generator; as if part of the seed
CHUNK = 512  # images that are classified at once, for memory
LOSS_BLOCK = 25  # images that make one observation of the held-out loss
KNN_K, KNN_TEMPERATURE = 20, 0.07  # of Wu et al. 2018, arXiv:1805.01978, with fewer neighbours
# Independent streams of random numbers under one --seed. FRESH is drawn anew in each epoch; TRAIN, MIRRORED, TEST once
ORDER, FRESH_NOISE, TRAIN_NOISE, MIRRORED_NOISE, TEST_NOISE, SUBSET, LOSS_NOISE = range(7)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
POOLS = {"gap": "mean over the image", "token": "a random token", "cls": "[CLS] token"}
MARKERS = ("o", "s", "^", "D", "v")
PROTOCOL = ("dataset", "epochs", "lr", "batch", "flip", "batchnorm", "cache", "amp", "seed")  # flags that are printed
ACCURACY = "linear top-1 accuracy, %"

# ---- 1. Random numbers, ranks, data, frozen features ----
def stream_generator(device, *numbers):
    """A generator whose seed is a hash of several numbers, such as --seed, a stream and an epoch."""
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(seed))

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
    to_x0: object  # the train script's function from images to x0

    def x0(self, index, flip=None):
        """Images by index (B,), mirrored where flip (B,) is true: (B, C, H, W) float32 on the device."""
        images = self.images[index.to(self.images.device)]
        return self.to_x0(images.to(index.device), flip)

def load_split(model, args, name, device):
    """Read the split "train" or "test" by the checkpoint's train script; on the device if half of it stays free."""
    flags = argparse.Namespace(**vars(model.args))
    flags.dataset = args.dataset or flags.dataset
    if getattr(flags, "cache_latents", None):  # a DiT on latents, for which --data is their folder
        flags.cache_latents = args.data or flags.cache_latents
    else:
        flags.data = args.data or flags.data
    images, labels, classes = model.script.load_data(flags, name)
    if args.subset:
        generator = stream_generator("cpu", args.seed, SUBSET)
        chosen = torch.randperm(len(labels), generator=generator)[: args.subset]
        images, labels = images[chosen], labels[chosen]
    if device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return Split(images, labels.to(device), len(classes), model.script.to_x0)

@dataclass
class Encoder:
    """Features at one noise level, or the raw input: (x0, noise), both (B, C, H, W) -> feat (B, D) float32."""
    model: object
    level: float | None  # None: the clean x0, flattened
    widths: dict  # {layer: width} of the layers that stand side by side in D
    pool: str | None = "gap"  # or "token", "cls"
    autocast: object = torch.autocast("cpu", enabled=False)

    @torch.no_grad()
    def __call__(self, x0, noise):
        if len(x0) == 0:  # a rank may get nothing of the last batch
            return x0.new_zeros(0, sum(self.widths.values()))
        if self.level is None:
            return x0.flatten(1)  # (B, C*H*W)
        deepest = max(self.widths, key=self.model.net.layers.index)  # later layers are not run
        with self.autocast:
            feats = self.model.diffusion.features(
                self.model.net, x0, self.level, noise, y=None, pool=self.pool, last=deepest)
        return torch.cat([feats[name].float() for name in self.widths], dim=1)  # (B, D)

def compute_features(encode, split, stream, seed, flip=False):
    """Features of a whole split under one fixed noise per image, (N, D) float32, the same on each rank.

    Noise follows from (seed, stream, number of the block, place in it), whatever the number of ranks.
    """
    device, n = split.labels.device, len(split.labels)
    rank, world = rank_and_world()
    feats = torch.zeros(n, sum(encode.widths.values()), device=device)
    blocks = range(rank, math.ceil(n / NOISE_BLOCK), world)
    for block in tqdm(blocks, desc="features", leave=False, disable=rank > 0):
        index = torch.arange(block * NOISE_BLOCK, min((block + 1) * NOISE_BLOCK, n), device=device)
        x0 = split.x0(index, torch.full((len(index),), flip, device=device))
        generator = stream_generator(device, seed, stream, block)
        if encode.pool == "token":  # whose tokens are drawn from the global generator
            torch.manual_seed(generator.initial_seed())
        feats[index] = encode(x0, torch.randn(x0.shape, generator=generator, device=device))
    return all_reduce(feats)  # a row is 0 on all ranks but one

# ---- 2. Classifiers: linear heads and kNN ------
class Heads(nn.Module):
    """One linear classifier per layer, each on its own columns of feat, standardised by mean and std (D,) if given."""
    def __init__(self, widths, classes, mean=0.0, std=1.0):
        super().__init__()
        self.widths, self.mean, self.std = list(widths), mean, std
        # UNSPECIFIED: heads start at zero. Drawn at random, as in [DDAE], they would vary with the set of layers.
        self.weight = nn.Parameter(torch.zeros(sum(self.widths), classes))  # (D, K)
        self.bias = nn.Parameter(torch.zeros(len(self.widths), classes))  # (L, K)

    def forward(self, feat):
        """(B, D) -> logits (L, B, K)."""
        feats = ((feat - self.mean) / self.std).split(self.widths, dim=1)  # each (B, width)
        weights = self.weight.split(self.widths)  # each (width, K)
        logits = [x @ weight + bias for x, weight, bias in zip(feats, weights, self.bias, strict=True)]
        return torch.stack(logits)

    @torch.no_grad()
    def accuracy(self, feat, labels):
        """Top-1 accuracy of each head in percent, a list of L floats, from feat (N, D) and labels (N,)."""
        hits = torch.zeros(len(self.widths), device=feat.device)
        for x, y in zip(feat.split(CHUNK), labels.split(CHUNK), strict=True):
            hits += (self(x).argmax(2) == y).sum(1)
        return (100 * hits / len(labels)).tolist()

def train_heads(encode, train, args, stored=None, mean=0.0, std=1.0):
    """Train one head per layer, all at once. The losses are summed, and Adam treats each weight alone, so that heads
    do not influence each other.

    stored: features to train on instead of fresh ones, (without flip (N, D), with flip (N, D)). Order, flips and noise
    are drawn for whole batches, of which a rank takes its share: any number of ranks ends with the same Heads, except
    with --pool token, whose tokens are drawn by each rank.
    """
    device, n = train.labels.device, len(train.labels)
    rank, world = rank_and_world()
    heads = Heads(encode.widths.values(), train.classes, mean, std).to(device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=args.lr)
    steps = math.ceil(n / args.batch)  # per epoch, with a smaller last one, as in [DDAE]
    flip_probability = 0.5 if args.flip else 0.0
    bar = tqdm(total=args.epochs * steps, desc="heads", leave=False, disable=rank > 0)
    for epoch in range(args.epochs):
        generator = stream_generator("cpu", args.seed, ORDER, epoch)
        noise_generator = stream_generator(device, args.seed, FRESH_NOISE, epoch)
        order = torch.randperm(n, generator=generator).to(device)
        flip = torch.rand(n, generator=generator) < flip_probability
        flip = flip.to(device)  # (N,), of image i
        for step, batch in enumerate(order.split(args.batch)):
            index = batch.tensor_split(world)[rank]  # this rank's share, (b,)
            if stored is not None:
                plain, mirrored = stored
                feat = torch.where(flip[index, None], mirrored[index], plain[index])  # (b, D)
            else:
                x0 = train.x0(index, flip[index])
                noise = torch.randn(len(batch), *x0.shape[1:], generator=noise_generator, device=device)
                if encode.pool == "token":
                    torch.manual_seed(noise_generator.initial_seed() + step * world + rank)
                feat = encode(x0, noise.tensor_split(world)[rank])  # the same share
            logits = heads(feat)  # (L, b, K)
            labels = train.labels[index].repeat(len(logits))  # (L b,), once for each layer
            losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            loss = losses / len(batch)  # the mean over the images of all ranks, summed over layers
            optimizer.zero_grad()
            loss.backward()
            for parameter in heads.parameters():
                all_reduce(parameter.grad)
            progress = (epoch + step / steps) / args.epochs  # UNSPECIFIED: per step; in [DDAE] per epoch
            optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * progress)) / 2
            optimizer.step()
            bar.update()
    bar.close()
    return heads

@torch.no_grad()
def knn(queries, labels, bank, bank_labels, widths, classes):
    """Top-1 accuracy of each layer in percent, a list of L floats: the k nearest training features (bank) vote."""
    accuracy = []
    for layer_queries, keys in zip(queries.split(list(widths), 1), bank.split(list(widths), 1), strict=True):
        layer_queries, keys = F.normalize(layer_queries, dim=1), F.normalize(keys, dim=1)
        hits = 0
        for q, y in zip(layer_queries.split(CHUNK), labels.split(CHUNK), strict=True):
            similarity, near = (q @ keys.T).topk(min(KNN_K, len(keys)), 1)  # (b, k)
            weight = (similarity / KNN_TEMPERATURE).exp()
            score = torch.zeros(len(q), classes, device=q.device)
            score.scatter_add_(1, bank_labels[near], weight)  # (b, K)
            hits += (score.argmax(1) == y).sum().item()
        accuracy.append(100 * hits / len(labels))
    return accuracy

# ---- 3. The probe of one checkpoint ------------
def load_model(path, args, device):
    """Load a checkpoint. Raises UserError for layers and levels that it does not have."""
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

def levels_of(model):
    """The Levels of a checkpoint's formulation."""
    name = type(model.diffusion).__name__
    if name not in LEVELS:
        raise UserError(f"{model.path}: add the noise levels of {name} to LEVELS in probe.py")
    return LEVELS[name]

def fill_in_protocol(args, model, split, device):
    """Return a copy of the flags with what they leave open, by [P] Tab. 10 and 11, and with args.autocast."""
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
    levels = levels_of(model)
    if args.t is None:
        if args.loss:
            args.t = levels.loss
        elif args.grid and len(args.pool) == 1:  # [P] Fig. 4 has one level
            args.t = levels.grid
        else:
            args.t = [trained.cl_t]  # the level of [P] Tab. 10, also in runs without --cl
    return args

def result_header(model, args):
    """The beginning of a result: what was measured, a dict of plain values."""
    levels = levels_of(model)
    return {"checkpoint": str(model.path), "name": model.name, "flags": describe(model.args), "dataset": args.dataset,
            "epoch": model.epoch, "levels": args.t, "symbol": levels.symbol, "unit": levels.unit}

def make_encoders(model, args, x0):
    """An Encoder per pooling and level, and one of raw input. One pass of an image x0 (1, C, H, W) tells the widths."""
    encoders = []
    for pool in args.pool:
        try:
            feats = model.diffusion.features(model.net, x0, args.t[0], torch.zeros_like(x0), y=None, pool=pool)
        except ValueError as error:  # this network has no [CLS], as one of those in [P] Fig. 4
            print_once(f"note: {model.path}: {error}")
            continue
        layers = args.layer or [model.args.layer]
        if args.grid:
            layers = list(feats)
        widths = {layer: feats[layer].shape[1] for layer in layers}
        encoders += [Encoder(model, level, widths, pool, args.autocast) for level in args.t]
    if not encoders:
        raise UserError(f"{model.path} has no --pool {' '.join(args.pool)}")
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
    one_image = train.x0(torch.zeros(1, dtype=torch.long, device=device))  # (1, C, H, W)
    encoders = make_encoders(model, args, one_image)
    pools = list(dict.fromkeys(encode.pool for encode in encoders if encode.pool))
    result = result_header(model, args)
    result.update(layers=list(encoders[0].widths), pools=pools, protocol=protocol, cells=[])
    count = len(args.paths) * sum(len(encode.widths) for encode in encoders)
    for encode in encoders:
        cells = probe_level(encode, train, test, args)
        result["cells"] += cells
        for cell in cells:
            if count > 1:  # main prints an only one
                print_once(describe_cell(cell, result))
    return result

def probe_level(encode, train, test, args):
    """Accuracies of every layer in percent: dicts with layer, level, pool, linear, linear_se, knn (or None)."""
    widths = encode.widths.values()
    test_feat = compute_features(encode, test, TEST_NOISE, args.seed)  # (N, D)
    if not torch.isfinite(test_feat).all():
        path = encode.model.path
        raise UserError(f"{path}: the features hold NaN or infinity; try --amp off, or an earlier epoch")
    stored, knn_accuracy = None, [None] * len(widths)
    mean, std = 0.0, 1.0
    if args.cache or args.batchnorm or args.features:
        bank = compute_features(encode, train, TRAIN_NOISE, args.seed)  # (N, D)
        knn_accuracy = knn(test_feat, test.labels, bank, train.labels, widths, train.classes)
    if args.features and encode.level is not None and rank_and_world()[0] == 0:
        arrays = {"train": bank, "train_labels": train.labels, "test": test_feat, "test_labels": test.labels}
        with open(args.features, "wb") as file:  # each encoder overwrites the one before
            np.savez(file, **{name: array.cpu() for name, array in arrays.items()})
    if args.batchnorm:  # with exact statistics of the training split; 1e-5 is BatchNorm's epsilon
        mean, std = bank.mean(0), (bank.var(0, correction=0) + 1e-5).sqrt()
    if args.cache:
        mirrored = compute_features(encode, train, MIRRORED_NOISE, args.seed, flip=True) if args.flip else bank
        stored = (bank, mirrored)
    linear = train_heads(encode, train, args, stored, mean, std).accuracy(test_feat, test.labels)
    cells = []
    for layer, accuracy, nearest in zip(encode.widths, linear, knn_accuracy, strict=True):
        se = standard_error(accuracy, len(test.labels))
        cells.append({"layer": layer, "level": encode.level, "pool": encode.pool, "linear": accuracy,
                      "linear_se": se, "knn": nearest})
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
        place += f", {result['symbol']}={cell['level']:g}"
    if cell["pool"] not in (None, "gap"):
        place += f", {cell['pool']}"
    text = f"top-1 {cell['linear']:.2f} % +- {cell['linear_se']:.2f} ({place})"
    if cell["knn"] is not None:
        text += f", kNN {cell['knn']:.2f} %"
    return text

# ---- 4. Held-out loss --------------------------
@torch.no_grad()
def heldout_loss(model, args, device, baseline=None):
    """The loss on the test split, without class, augmentation and EDM's learned weight: a dict.

    diffusion.loss averages over its batch, so one observation is the mean of a random block of images. Smaller blocks
    would take more passes, larger ones leave fewer observations for the standard error. Noise depends on image
    and level alone, so that blocks pair up with those of `baseline`, the first checkpoint's result.
    """
    test = load_split(model, args, "test", device)
    args = fill_in_protocol(args, model, test, device)
    n = len(test.labels)
    if n < 2:
        raise UserError(f"--loss needs two test images or more, {args.dataset} has {n}")
    rank, world = rank_and_world()
    order = torch.randperm(n, generator=stream_generator("cpu", args.seed, ORDER))
    blocks = order.tensor_split(max(2, math.ceil(n / LOSS_BLOCK)))  # a standard error needs two
    losses = torch.zeros(len(args.t), len(blocks), dtype=torch.float64, device=device)
    for b in tqdm(range(rank, len(blocks), world), desc="loss", leave=False, disable=rank > 0):
        x0 = test.x0(blocks[b].to(device))  # (B, C, H, W)
        for row, level in enumerate(args.t):
            noise = [heldout_noise(i, level, args.seed, x0.shape[1:]) for i in blocks[b].tolist()]
            levels = x0.new_full((len(x0),), level)
            with args.autocast:
                _, unweighted, _ = model.diffusion.loss(model.net, x0, levels, torch.stack(noise).to(device))
            losses[row, b] = unweighted
    losses = all_reduce(losses).cpu().numpy()  # (levels, blocks)
    result = result_header(model, args)
    result.update(n_images=n, blocks=losses.tolist())
    differences = np.zeros_like(losses)
    if baseline:
        differences = losses - np.array(baseline["blocks"])
    for name, values in (("loss", losses), ("difference", differences)):
        result[name] = values.mean(1).tolist()
        result[f"{name}_se"] = (values.std(1, ddof=1) / len(blocks) ** 0.5).tolist()
    print_once(f"{model}\n{n} test images of {args.dataset}")
    for i, level in enumerate(args.t):
        text = f"{result['symbol']}={level:g}".ljust(14)
        text += f"held-out loss {result['loss'][i]:.5f} +- {result['loss_se'][i]:.5f}"
        if baseline:
            text += f", difference {result['difference'][i]:+.5f} +- {result['difference_se'][i]:.5f}"
        print_once(text)
    return result

def heldout_noise(index, level, seed, shape):
    """The noise of a test image at a level, for --loss: of `shape`, on the CPU."""
    generator = stream_generator("cpu", seed, LOSS_NOISE, round(1e6 * level), index)  # whole numbers
    return torch.randn(shape, generator=generator)

# ---- 5. Figures --------------------------------
def new_figure(panels, datasets):
    """A figure that is headed by the data sets, and its panels in a row."""
    figure = Figure((1 + 6 * panels, 5), layout="constrained")
    figure.suptitle(" and ".join(dict.fromkeys(datasets)))
    return figure, figure.subplots(1, panels, squeeze=False)[0]

def finish_panel(axes, xlabel, ylabel):
    """Labels, a light grid, and the legend below."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)

def level_label(result):
    """Label of an axis of noise levels."""
    return f"noise level {result['symbol']} ({result['unit']})"

def style(number):
    """Colour and marker of a figure's line number 0, 1, .."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}

def network_cells(results):
    """The cells of results, but those of raw input."""
    return [cell for result in results for cell in result["cells"] if cell["level"] is not None]

def draw_layer_maps(results):
    """Accuracy by layer: a map per run with a column per epoch ([P] Fig. 5), or per checkpoint with one per level."""
    by_epoch = all(len(result["levels"]) == 1 for result in results)
    maps = {}  # {key: results of one map}
    for result in results:
        key = result["checkpoint"]
        if by_epoch:  # those of a run share a map
            key = (Path(result["checkpoint"]).parent, result["levels"][0], *result["layers"])
        maps.setdefault(key, []).append(result)
    accuracies = [cell["linear"] for cell in network_cells(results)]
    low, high = min(accuracies), max(accuracies)
    figure, panels = new_figure(len(maps), [result["dataset"] for result in results])
    inches = 2
    for axes, group in zip(panels, maps.values(), strict=True):
        first = group[0]
        ticks, title = [f"{level:g}" for level in first["levels"]], first["name"]
        xlabel = level_label(first)
        if by_epoch:
            ticks = [result["epoch"] for result in group]
            xlabel = f"epoch, at {first['symbol']} = {first['levels'][0]:g}"
            title = first["name"].split(",")[0]
        values = [cell["linear"] for cell in network_cells(group)]
        values = np.reshape(values, (-1, len(first["layers"]))).T  # (layers, columns): cells come column by column
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
        inches += 1 + 0.5 * columns
    figure.set_size_inches(inches, 2.5 + 0.35 * max(len(result["layers"]) for result in results))
    figure.colorbar(image, ax=panels, label=ACCURACY)
    return figure

def draw_poolings(results):
    """Accuracy over layers: a panel per checkpoint, a line per pooling. [P] Fig. 4"""
    figure, panels = new_figure(len(results), [result["dataset"] for result in results])
    for axes, result in zip(panels, results, strict=True):
        for number, pool in enumerate(POOLS):
            accuracies = [cell["linear"] for cell in network_cells([result]) if cell["pool"] == pool]
            if accuracies:
                axes.plot(result["layers"], accuracies, label=POOLS[pool], **style(number))
        axes.set_title(f"{result['name']}: {result['flags']}", size=9)
        axes.sharey(panels[0])
        finish_panel(axes, f"layer, at {result['symbol']} = {result['levels'][0]:g}", ACCURACY)
    return figure

def draw_heldout_loss(results):
    """Held-out loss over levels; beside it the paired differences to the first run, in percent of its loss."""
    first = results[0]
    figure, panels = new_figure(min(2, len(results)), [result["dataset"] for result in results])
    for number, result in enumerate(results):
        label = f"{result['name']}, {result['flags']}"
        line_style = {"capsize": 3, **style(number)}
        panels[0].errorbar(result["levels"], result["loss"], result["loss_se"], label=label, **line_style)
        if number > 0:
            to_percent = 100 / np.array(first["loss"])
            difference, error = to_percent * result["difference"], to_percent * result["difference_se"]
            panels[1].errorbar(first["levels"], difference, error, label=result["name"], **line_style)
    xlabel = level_label(first)
    finish_panel(panels[0], xlabel, f"held-out loss ± standard error, {first['n_images']} images")
    if len(results) > 1:
        panels[1].axhline(0, color=COLORS[0], label=first["name"])
        finish_panel(panels[1], xlabel, f"paired difference to {first['name']}, %")
    for axes in panels:
        if first["unit"] == "sigma":
            axes.set_xscale("log")
    return figure

def read_log(folder):
    """The flags (dict) in metrics.jsonl, and arrays (n,) of images seen and of loss_unweighted."""
    path, flags, images, losses = Path(folder, "metrics.jsonl"), {}, [], []
    step, images_seen = 0, 0
    if not path.is_file():
        raise UserError(f"{path} does not exist: give run folders")
    try:
        for line in path.read_text().splitlines():
            if not line.endswith("}"):  # cut by a kill
                continue
            row = json.loads(line)
            if row["step"] > step:
                images_seen += (row["step"] - step) * flags["batch"]
                step = row["step"]
            if "args" in row:  # the first line, and one of each resume, whose batch may be another
                flags = row["args"]
            else:
                images.append(float(images_seen))
                losses.append(float(row["loss_unweighted"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or of an earlier version ({error!r})") from error
    if not images:
        raise UserError(f"{path} has no line of a step yet")
    return flags, np.array(images), np.array(losses)

def draw_training_loss(folders):
    """Unweighted diffusion loss over images seen, also of runs that go on: means over the same number of images."""
    logs = [read_log(folder) for folder in folders]
    window = min(images[-1] for _, images, _ in logs) / 20  # a twentieth of the shortest run
    figure, (axes,) = new_figure(1, [flags["dataset"] for flags, _, _ in logs])
    for folder, (flags, images, losses) in zip(folders, logs, strict=True):
        if flags["model"] != logs[0][0]["model"]:
            raise UserError(f"{folders[0]} and {folder} differ in formulation: their losses do not compare")
        n = max(1, round(window * len(images) / images[-1]))  # lines of the log in a window
        start = min(2 * n, len(images) - n)  # skip the steep beginning, two windows, but leave one
        kernel = np.ones(n) / n
        images = np.convolve(images[start:], kernel, "valid")
        losses = np.convolve(losses[start:], kernel, "valid")
        label = f"{Path(folder).absolute().name}, {describe(argparse.Namespace(**flags))}, {flags['dataset']}"
        axes.plot(images, losses, label=label, alpha=0.8)
    finish_panel(axes, "training images seen", f"unweighted diffusion loss, mean over {window:.0f} images")
    return figure

def read_results(files):
    """What JSON files of probe.py and fid.py say of checkpoints: {run folder: {epoch: {fid, accuracy, label, ..}}}."""
    runs = {}
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{file} does not exist")
        try:
            content = json.loads(Path(file).read_text())
            for row in content.get("checkpoints") or content["results"]:  # probe.py's, or fid.py's
                if "samples" in row and "checkpoint" not in row:  # fid.py's of a folder of images
                    continue
                folder = str(Path(row["checkpoint"]).absolute().parent)
                found = runs.setdefault(folder, {}).setdefault(int(row["epoch"]), {})
                if "fid" in row:
                    found["fid"] = float(row["fid"])
                if "cells" in row:
                    found["accuracy"] = float(best_cell(row["cells"])["linear"])
                    found["label"] = f"{row['name'].split(',')[0]}, {row['flags']}"
                    found["dataset"] = row["dataset"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged, or not written by probe.py or fid.py ({error!r})") from error
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
                color = style(number)["color"]
                axes.annotate(f"epoch {epoch}", points[-1], (5, 5), textcoords="offset points", size=8, color=color)
                label = row["label"]
                datasets.append(row["dataset"])
        if points:
            axes.plot(*np.transpose(points), label=label, **style(number))
    if not datasets:
        raise UserError("no checkpoint has both FID and accuracy: probe those that fid.py scored")
    figure.suptitle(" and ".join(dict.fromkeys(datasets)))
    axes.margins(0.12)  # room for the epochs
    finish_panel(axes, "FID (less is better)", ACCURACY)
    return figure

# ---- 6. Flags and main -------------------------
def parse_args(argv=None):
    """Flags -> Namespace; None where the checkpoint decides."""
    parser = argparse.ArgumentParser(usage="%(prog)s RUN [RUN ...] [flags]",
                                     description="Linear probes of frozen features, and what else a checkpoint knows.",
                                     epilog="On 4 GPUs: torchrun --nproc_per_node=4 -- %(prog)s RUN [flags]")
    parser.add_argument("paths", nargs="+", metavar="RUN",
                        help="checkpoints, run folders (their last.pt), or, to draw FID against accuracy, JSON files "
                             "of probe.py and fid.py")
    add = parser.add_argument_group("what is read (default: one layer)").add_mutually_exclusive_group().add_argument
    add("--layer", nargs="+", metavar="L", help="layers (default: the run's --layer)")
    add("--grid", action="store_true", help="every layer, at several levels")
    add("--loss", action="store_true", help="held-out loss per level, and its difference to the first RUN's")
    add("--curves", action="store_true",
        help="draw the training loss over images seen, of run folders, also while they train")
    add = parser.add_argument_group("features").add_argument
    add("--t", nargs="+", type=float, metavar="T",
        help="noise levels: of DDPM and U-ViT steps 0 .. 1000, of EDM sigmas 0.002 .. 80, of RF and DiT times 0 .. 1 "
        "(default: the run's --cl-t; with --grid six, with --loss about ten)")
    add("--pool", nargs="+", choices=POOLS, default=["gap"],
        help="mean over the image, a random token, U-ViT's [CLS] token (default: gap)")
    add("--pixels", action="store_true", help="also the flattened clean pixels or latents")
    add("--features", type=Path, metavar="FILE",
        help="file to write features and labels to, numpy's npz (last RUN, level, pool); with 20-NN")
    add = parser.add_argument_group("heads: the paper's protocol, and ways to leave it").add_argument
    add("--epochs", type=int, help="(default: CIFAR 15, others 30)")
    add("--lr", type=float, help="(default: pixels 4e-3, latents 2e-3)")
    add("--batch", type=int, help="over all ranks (default: --backbone ddpm 512, tiny 128, others 256, latents 1440)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="flip at random (default: on)")
    add("--cache", action="store_true", help="quick: noise is fixed, features are kept in memory; with 20-NN accuracy")
    add("--batchnorm", action="store_true", help="standardise features by training mean and std; with 20-NN accuracy")
    add("--subset", type=int, metavar="N", help="at most N random images of each split (default: all)")
    add = parser.add_argument_group("data and run").add_argument
    add("--dataset", help="(default: the training run's)")
    add("--data", help="data root, or folder of latents (default: the training run's)")
    add("--json", type=Path, metavar="FILE",
        help="results (default: beside the first RUN; none for one RUN without --grid, --loss or several --pool)")
    add("--plot", type=Path, metavar="FILE.png", help="the picture (default: beside --json)")
    add("--seed", type=int, default=0, help="of order, flips and noise (default: 0)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
        help="precision, by the rule of training (default: auto)")
    add("--script", metavar="FILE", help="your train script, of checkpoints that none of the three scripts wrote")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    for name in ("epochs", "lr", "batch", "subset"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e15:  # nor nan
            parser.error(f"--{name} must be above 0")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if args.plot and args.plot.suffix != ".png":
        parser.error("--plot takes FILE.png")
    if len(args.pool) > 1 and len(args.t or []) > 1:
        parser.error("several --pool go with one --t")
    if args.loss and (len(args.pool) > 1 or args.features or args.pixels):
        parser.error("several --pool, --features and --pixels do not go with --loss")
    args.paths_are_json = args.paths[0].endswith(".json")
    args.is_drawing = args.curves or args.paths_are_json
    if args.is_drawing and args.json:
        parser.error("--json goes with what is measured, not with what is drawn of files")
    name_outputs(args)
    return args

def name_outputs(args):
    """Fill in args.json and args.plot. One run's accuracies of given layers have neither."""
    kind, several = kind_of_results(args), len(args.paths) > 1
    path, name = Path(args.paths[0]), kind
    if several and not args.paths_are_json:
        name = f"{kind}_{comparison_name(args.paths)}"
    elif path.suffix == ".pt" and path.stem != "last":  # another checkpoint of a run has files of its own
        name = f"{kind}_{path.stem}"
    folder = path
    if not os.path.isdir(folder):
        folder = folder.parent
    has_figure = kind != "probe"
    if args.plot is None and has_figure:
        args.plot = args.json.with_suffix(".png") if args.json else folder / f"{name}.png"
    if args.json is None and not args.is_drawing and (several or has_figure):
        args.json = folder / f"{name}.json"

def kind_of_results(args):
    """The first part of the names of a command's files."""
    if args.paths_are_json:
        return "fid_accuracy"
    if args.curves:
        return "training_loss"
    if args.loss:
        return "heldout_loss"
    if len(args.pool) > 1:
        return "probe_pools"
    return "probe_grid" if args.grid else "probe"

def check_comparison(args):
    """Load every checkpoint once, so that mistakes show before the long part; --loss compares like with like."""
    kinds = set()
    for path in args.paths:
        model = load_model(path, args, "cpu")
        kinds.add((type(model.diffusion).__name__, args.dataset or model.args.dataset, model.net.shape))
    if args.loss and len(kinds) > 1:
        raise UserError(f"{' and '.join(args.paths)} differ in formulation, data set or resolution")

def summary(results):
    """The best cell of all results, its checkpoint, and the line that is printed: added to the JSON file."""
    best = max(results, key=lambda result: best_cell(result["cells"])["linear"])
    cell = best_cell(best["cells"])
    text = describe_cell(cell, best)
    if len(results) > 1:
        text = f"best: {best['name']}\n{text}"
    return {"checkpoint": best["checkpoint"], "epoch": best["epoch"], "top1": cell["linear"], **cell, "text": text}

def main(args):
    """Probe every checkpoint, or measure and draw what the flags ask; returns the results."""
    for path in (args.json, args.plot, args.features):
        if path:
            check_writable(path)
    if args.is_drawing:  # needs no network
        draw = draw_training_loss if args.curves else draw_fid_against_accuracy
        draw(args.paths).savefig(args.plot, dpi=150)
        print(f"wrote {args.plot}")
        return []
    rank, world, device = setup_distributed(args.device)
    torch.set_float32_matmul_precision("high")
    if len(args.paths) > 1:
        check_comparison(args)

    # 1. The numbers, written as they come: a job may be cut short.
    results = []
    for path in args.paths:
        model = load_model(path, args, device)
        if args.loss:
            baseline = results[0] if results else None
            results.append(heldout_loss(model, args, device, baseline))
            content = {}
        else:
            results.append(probe(model, args, device))
            content = summary(results)
        if rank == 0 and args.json:
            args.json.write_text(json.dumps({"checkpoints": results, **content}, indent=1))

    # 2. The picture, the files, and last the number.
    if rank == 0 and args.plot:
        draw = draw_layer_maps
        if args.loss:
            draw = draw_heldout_loss
        elif any(len(result["pools"]) > 1 for result in results):
            draw = draw_poolings
        draw(results).savefig(args.plot, dpi=150)
    for path in (args.json, args.plot, args.features):
        if path:
            print_once(f"wrote {path}")
    if not args.loss:
        print_once(summary(results)["text"])
    if world > 1:
        dist.destroy_process_group()
    return results

if __name__ == "__main__":
    run_tool(main, parse_args())
