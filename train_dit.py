"""Train a DiT that generates and represents: DDAE++ [P] on VA-VAE latents or on pixels.

[P]    DDAE++, arXiv:2505.10999v1, after [DDAE] Xiang et al., 2303.09769
[DiT]  Peebles and Xie, 2212.09748   [RoPE] Su et al., 2104.09864
[LDiT] Yao et al., LightningDiT and VA-VAE, 2501.01423   [KL] Rombach et al., 2112.10752
[RF]   Liu et al., 2209.03003   [SD3]  Esser et al., 2403.03206
[CFG]  Ho and Salimans, 2207.12598   [Int] Kynkaanniemi et al., 2404.07724
[MoCo] Chen et al. 2021, MoCo v3, 2104.02057

    python train_dit.py --dataset shapes --size tiny --cond --self-cond  # on pixels, on a laptop
    torchrun --nproc_per_node=8 train_dit.py --dataset imagenet100 --data ROOT --vae vavae.pt --cache-latents LATENTS \\
        --size B --self-cond  # caches first, then trains

x0 clean latent, normalised per channel, or image   x_t noisy x0   eps unit noise   v velocity
t time: 0 data, 1 noise; the network is given 1 - t
e global embedding, e_t its time part   feat pooled tokens of --layer   q, k contrastive query and key   y class label
B batch   C, H, W latent or image   N tokens   D width   average: the EMA, sampled, probed, the teacher
"""

# ---- 1. Imports, constants ---------------------
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from glob import glob
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # wrong gradients: pytorch #190796, #193061

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients: pytorch #169849, #196678
SIZES = {  # width, depth, heads: [DiT] Tab. 1. UNSPECIFIED: tiny is ours, for a CPU
    "tiny": (64, 6, 4), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16),
}
# [P] Tab. 11, EMA Tab. 8; epochs: of pixels. Head: [MoCo]'s for ViTs. UNSPECIFIED: latents' gradient clipping, ours
PAPER = {"epochs": 2000, "batch": 1024, "lr": 2e-4, "ema": 0.9999, "warmup": 0.0, "cooldown": 0.0, "cl_hidden": 4096}
TINY = {"epochs": 8, "batch": 16, "lr": 2e-3, "ema": 0.999, "warmup": 13, "cooldown": 0.3, "cl_hidden": 512}  # ours
RESOLUTIONS = {"shapes": 16, "cifar10": 32, "cifar100": 32}  # anything else: 64, latents 256
ADDED = ("self_cond.",)  # public weights lack what [P] adds
# flags that may be others on --resume
FREE = "data out epochs accum save_every max_steps device compile resume init vae cache_latents latents".split()
LOG_EVERY, SAVE_SECONDS = 10, 900  # steps between lines of metrics.jsonl, seconds between saves
SUFFIXES, FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), ("PNG", "JPEG", "WEBP", "BMP")
POLYGONS = {"triangle": (3, 1.0), "square": (4, 1.0), "sparkle": (8, 0.35), "star": (10, 0.45), "disc": (24, 1.0)}
SHAPES = [f"{kind} {name}" for kind in ("solid", "hollow") for name in POLYGONS]
BLOCK, STATISTICS = 64, 2048  # images encoded at a time; images that give mean and std


# ---- 2. Backbone -------------------------------
class DiTTime(nn.Module):
    """Sinusoid of 256 numbers, cosines first, through a two-layer MLP: time (B,) -> (B, D) float32."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = t.float()[:, None] * freqs  # (B, 128)
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def grid_positions(width, side):
    """Fixed embedding (1, side^2, width): sines and cosines of the column, then of the row. [DiT]"""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * freqs  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    column, row = line.repeat(side, 1), line.repeat_interleave(side, 0)  # tokens run row by row
    return torch.cat([column, row], dim=1)[None].float()


class Rotary(nn.Module):
    """Tables of the rotary embedding, (N, head width): half a head turns with the row, the rest with the column."""

    def __init__(self, head_width, side):
        super().__init__()
        m = head_width // 2
        freqs = 10000.0 ** (-torch.arange(0, m, 2) / m)
        angles = (torch.arange(side)[:, None] * freqs).repeat_interleave(2, 1)  # (side, m): two channels turn as a pair
        angles = torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], dim=1)  # (N, head width)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        """Turn x (B, heads, N, head width), in float32. [RoPE]"""
        a, b = x.float().unflatten(3, (-1, 2)).unbind(4)
        turned = torch.stack([-b, a], dim=4).flatten(3)
        return x * self.freqs_cos + turned * self.freqs_sin


class DiTAttention(nn.Module):
    """Self-attention with rotary positions, and with --qk-norm RMSNorm of queries and keys."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, 1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, rotary):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        q, k = (rotary(norm(z.float())) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        with torch.autocast("cpu", enabled=False):  # its bf16 kernel is slow
            q, k, v = (z.to(v.dtype) if x.is_cuda else z.float() for z in (q, k, v))
            h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, N, D))


class DiTBlock(nn.Module):
    """x + gate * f(norm(x) (1 + scale) + shift), f attention, then SwiGLU; the six vectors come from e. [DiT] Fig. 3"""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.attn, hidden = DiTAttention(width, heads, qk_norm), int(2 / 3 * 4 * width)
        self.mlp = nn.ModuleDict({"w12": nn.Linear(width, 2 * hidden), "w3": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, e, rotary):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(e)[:, None].chunk(6, dim=2)  # (B, 1, D)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        a, b = self.mlp["w12"](self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=2)
        return x + gate2 * self.mlp["w3"](F.silu(a) * b)


class DiT(nn.Module):
    """LightningDiT with self-conditioning after one block. [LDiT], [P] Tab. 9

    Args:
        channels, side: of the latent or image. patch: its side. classes: 0 for unconditional.
        layer: block "1".."depth" whose pooled output is the feature; None takes the last.
        self_cond: None, "adaptive" or "add".
    """

    def __init__(self, channels, side, patch, width, depth, heads, qk_norm=False, classes=0, layer=None,
                 self_cond=None):
        super().__init__()
        if side % patch:
            raise ValueError(f"patches of {patch} do not divide {side} pixels")
        self.shape, self.classes, self.patch = (channels, side, side), classes, patch
        self.feat_dim = self.emb_dim = width
        self.layers = [str(i + 1) for i in range(depth)]
        self.layer = layer or str(depth)
        if self.layer not in self.layers:
            raise ValueError(f"no layer {self.layer!r}, but {', '.join(self.layers)}")
        if self_cond and self.layer == str(depth):
            raise ValueError(f"self-conditioning after {self.layer} leaves no decoder: take an earlier layer")
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, patch, stride=patch)))
        self.t_embedder = DiTTime(width)
        if classes:  # the last row is the null class
            self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(classes + 1, width)))
        self.pos_embed = nn.Parameter(grid_positions(width, side // patch), requires_grad=False)
        self.feat_rope = Rotary(width // heads, side // patch)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "norm_final": nn.RMSNorm(width, 1e-6), "linear": nn.Linear(width, patch**2 * channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        })
        self.init_weights()
        self.self_cond = SelfConditioning(width, 2 * width // 3, width, self_cond) if self_cond else None

    def init_weights(self):
        """UNSPECIFIED, as [DiT]: uniform of variance 1 / fan_avg; embeddings of std 0.02; modulations and output 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for module in [self.t_embedder.mlp[0], self.t_embedder.mlp[2], *(self.y_embedder if self.classes else ())]:
            nn.init.normal_(module.weight, std=0.02)
        silent = [block.adaLN_modulation[1] for block in self.blocks]  # blocks start as the identity
        for module in [*silent, self.final_layer["adaLN_modulation"][1], self.final_layer["linear"]]:
            nn.init.zeros_(module.weight)

    def run(self, x, t, y, aug, stop=None, maps=None):
        """All blocks: (prediction, feat, e_t). stop: the last block to run. maps: a dict for their outputs."""
        if x.shape[1:] != self.shape or aug is not None or (y is not None and not self.classes):
            raise ValueError(f"x must be (B, *{self.shape}), not {tuple(x.shape)}; aug None; y None if unconditional")
        e = e_t = self.t_embedder(t)  # (B, D)
        if self.classes:
            y = torch.full_like(t, -1, dtype=torch.long) if y is None else y
            e = e + self.y_embedder(y.masked_fill(y < 0, self.classes))
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D), patches row by row
        feat = None
        for name, block in zip(self.layers, self.blocks, strict=True):
            h = block(h, e, self.feat_rope)
            if maps is not None:
                maps[name] = h
            if name == self.layer:
                feat = h.float().mean(dim=1)  # (B, D)
            if name == stop:
                return None, feat, e_t
            if name == self.layer and self.self_cond:
                # [P] self-conditioning: the feature joins the embedding of all later blocks. Its scale depends on
                # e_t, time alone: the class should not decide how much the content counts.
                e = self.self_cond(e, e_t, feat)
        (C, H, _), p, last = self.shape, self.patch, self.final_layer
        shift, scale = last["adaLN_modulation"](e)[:, None].chunk(2, dim=2)
        h = last["linear"](last["norm_final"](h) * (1 + scale) + shift)  # (B, N, p^2 C), channel fastest
        h = h.view(-1, H // p, H // p, p, p, C)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.shape), feat, e_t

    def forward(self, x, t, y=None, aug=None, with_feat=False):
        """One raw evaluation: the prediction (B, C, H, W); with_feat (prediction, feat, e_t), see encode.

        x: (B, C, H, W). t: (B,), [LDiT]'s time, 0 noise and 1 data. aug: None, latents cannot be warped.
        y: class labels (B,), -1 or self.classes for the null class; None is that everywhere, or no class at all.
        """
        out, feat, e_t = self.run(x, t, y, aug)
        return (out, feat, e_t) if with_feat else out

    def encode(self, x, t, y=None, aug=None):
        """Up to --layer alone: feature (B, D) float32, time embedding e_t (B, D)."""
        return self.run(x, t, y, aug, stop=self.layer)[1:]

    def features(self, x, t, y=None, pool="gap", last=None):
        """Outputs of the blocks up to `last`, pooled by "gap" or "token" (a random one): {name: (B, D) float32}."""
        if pool not in ("gap", "token"):
            raise ValueError(f"a DiT has no [CLS] token: use --pool gap or token, not {pool}")
        maps, image = {}, torch.arange(len(x), device=x.device)
        self.run(x, t, y, None, last, maps)

        def pooled(h):  # (B, N, D)
            if pool == "gap":
                return h.float().mean(1)
            return h[image, torch.randint(h.shape[1], image.shape, device=x.device)].float()

        return {name: pooled(h) for name, h in maps.items()}


# ---- 3. Self-conditioning: the paper's idea ----
class SelfConditioning(nn.Module):
    """Condense the pooled feature and feed it back to the decoder. [P]

    adaptive: e' = e + s(SiLU(e_t)) * MLP(feat), s linear;   add (ablation): e' = e + MLP(feat).
    UNSPECIFIED: the MLP ends in zeros, so that training starts at the baseline; s starts around 1.
    """

    def __init__(self, feat_dim, hidden, emb_dim, kind):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(feat_dim, hidden), nn.SiLU(), nn.Linear(hidden, emb_dim))
        self.scale = nn.Linear(emb_dim, emb_dim) if kind == "adaptive" else None
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)
        if self.scale is not None:
            nn.init.ones_(self.scale.bias)

    def forward(self, e, e_t, feat):
        """e, e_t: (B, E); feat: (B, D) -> e' (B, E)."""
        f = self.mlp(feat)
        return e + f if self.scale is None else e + self.scale(F.silu(e_t)) * f


# ---- 4. Diffusion formulation ------------------
def per_image(level, x):
    """A number or (B,) noise level -> (B, 1, 1, 1) on x's device."""
    level = level if isinstance(level, torch.Tensor) else x.new_full((len(x),), level)
    if level.shape != x.shape[:1]:
        raise ValueError(f"a noise level is a number or of shape ({len(x)},), not {tuple(level.shape)}")
    return level.view(-1, 1, 1, 1)


class Formulation(nn.Module):
    """What formulations share."""

    def check_level(self, level):
        """ValueError if a noise level is outside of self.range."""
        low, high = self.range
        if not low <= level <= high or isinstance(low, int) and level % 1:
            raise ValueError(f"noise level {level:g}: {type(self).__name__} takes {self.unit} from {low} to {high}")

    def features(self, net, x0, level, noise, y=None, pool="gap", last=None):
        """net.features of x0 noised at `level`, a number or (B,)."""
        return net.features(*self.inputs(x0, level, noise), y, pool, last)


class LatentRF(Formulation):
    """Rectified flow of latents, t from 0 (data) to 1 (noise), velocity prediction. [P] Tab. 8, [RF] Eq. 1

    The network runs on [LDiT]'s clock, as its public weights do: it is given 1 - t and returns -v = x0 - eps.
    UNSPECIFIED: pixels are treated as latents are.
    """

    range, unit = (0.0, 1.0), "times"

    def draw_level(self, n, generator):
        """Training times, (n,): sigmoid of a standard normal, "lognorm". [SD3]"""
        return torch.randn(n, generator=generator, device=generator.device).sigmoid()

    def add_noise(self, x0, level, noise):
        """x_t = (1 - t) x0 + t eps; x0, noise (B, C, H, W)."""
        t = per_image(level, x0)
        return (1 - t) * x0 + t * noise

    def inputs(self, x0, level, noise):
        """What the network sees: x_t (B, C, H, W) and its clock 1 - t, (B,)."""
        return self.add_noise(x0, level, noise), 1 - per_image(level, x0).flatten().float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Squared error of v = eps - x0, plus 1 - cos(v_hat, v) along channels, [LDiT]; and the net's (feat, e_t)."""
        out, *more = net(*self.inputs(x0, level, noise), y, aug, with_feat=True)
        v, v_hat = noise - x0, -out.float()
        cosine = (F.normalize(v_hat, dim=1, eps=0.1) * F.normalize(v, dim=1)).sum(1)  # DEVIATION: v_hat starts at 0
        return F.mse_loss(v_hat, v) + (1 - cosine).mean(), more

    def velocity(self, net, x, t, y=None, cfg=1.0, interval=(0.0, 1.0)):
        """v_hat (B, C, H, W) at time t, a number; guided inside the interval, on all channels [P]. [CFG], [Int]"""
        guided = y is not None and cfg != 1 and interval[0] <= t <= interval[1]
        if guided:  # with the class and without, as one batch
            x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, -1)])
        v = -net(x, torch.full((len(x),), 1 - t, device=x.device), y).float()
        if not guided:
            return v
        v_class, v_null = v.chunk(2)
        return v_null + cfg * (v_class - v_null)

    def times(self, steps, shift):
        """The sampler's steps + 1 times from 1 to 0: t' = shift t / (1 + (shift - 1) t). [SD3]"""
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (shift * t / (1 + (shift - 1) * t)).tolist()

    def sample(self, net, noise, steps=250, y=None, cfg=1.5, cfg_interval=(0.0, 0.89), shift=3.3):
        """Euler: noise (B, C, H, W) -> x0, not clipped. [P] Tab. 8

        y: labels (B,) or None. cfg: guidance weight, acts where y is given and t in cfg_interval; 1 is off.
        shift: of the times, more of them near noise; 1 is off. steps: [LDiT] counts grid points, which are one more.
        """
        x, times = noise, self.times(steps, shift)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = x + (t_next - t) * self.velocity(net, x, t, y, cfg, cfg_interval)
        return x


# ---- 5. Data, augmentation: pixels or latents ----
def draw_shapes(n, seed, side):
    """SHAPES of random place, size, turn and colours: uint8 (n, 3, side, side), labels int64 (n,)."""
    rng = np.random.RandomState(seed)  # a frozen stream
    images, labels = np.empty((n, side, side, 3), np.uint8), rng.permutation(n) % len(SHAPES)
    for i, label in enumerate(labels):
        dark = rng.randint(0, 128, 3)
        back, front = rng.permutation([dark, dark + rng.randint(64, 128, 3)]).tolist()
        radius, turn = rng.uniform(16, 26), rng.uniform(-0.3, 0.3)  # of 64 x 64 pixels
        x, y = 32 + rng.uniform(-1, 1, 2) * (34 - radius)
        corners, inner = [*POLYGONS.values()][label % 5]
        canvas = Image.new("RGB", (64, 64), tuple(back))
        for scale, colour in ((radius, front), (radius / 2, back))[: 1 + label // 5]:
            z = scale * np.exp(1j * (turn + 2 * np.pi * np.arange(corners) / corners)) * -1j
            z[1::2] *= inner
            ImageDraw.Draw(canvas).polygon([*zip(x + z.real, y + z.imag, strict=True)], fill=tuple(colour))
        images[i] = canvas.resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def open_image(path):
    """A picture as Pillow's RGB: upright, 8 bits, on white where it is transparent."""
    with told(f"{path} is not an image that Pillow reads, or too large"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) >= 100 * min(image.size):
                raise ValueError(image.size)
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def load_image(path, resolution):
    """Box-halve, resize, center-crop, as in ADM: uint8 (3, resolution, resolution)."""
    image = open_image(path)
    while min(image.size) >= 2 * resolution:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)[top:, left:][:resolution, :resolution].transpose(2, 0, 1)


def list_images(root, split):
    """(file, class index) of a split's images, and class names. Hidden files do not count."""
    folder, notes = root / (split if (root / split).is_dir() else "val"), root / "val" / "val_annotations.txt"
    classes, there = (sorted(f[:-1] for f in glob("*/", root_dir=path)) for path in (root / "train", folder))
    with told(f"{root} needs train/<class>/* and test/ or val/ with the same classes, of {' '.join(SUFFIXES)}"):
        if split == "test" and notes.is_file():  # tiny-imagenet as it comes
            rows = [line.split("\t") for line in notes.read_text().splitlines()]
            pairs, there = [(f"images/{row[0]}", classes.index(row[1])) for row in rows], classes
            folder = root / "val"
        else:
            pairs = [(f"{name}/{file}", label) for label, name in enumerate(classes or ".")
                     for file in sorted(glob("**", root_dir=folder / name, recursive=True))]
        pairs = [(f"{folder}/{f}", y) for f, y in pairs if f.lower().endswith(SUFFIXES) and os.path.isfile(folder / f)]
        odd = {*there} ^ {*classes} or {*(classes or ".")} - {(classes or ".")[y] for _, y in pairs}
        if odd:
            raise ValueError(f"{len(pairs)} images, see {min(odd)}")
    return pairs, classes


def read_folder(root, split, resolution):
    """load_data of class folders: images are decoded once, and kept as one file of pixels."""
    pairs, classes = list_images(root, split)
    seen = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file, _ in pairs]
    folder = root / ".cache" if os.access(root, os.W_OK) else Path(torch.hub.get_dir(), "ddae")
    cache = folder / f"{split}_{resolution}_{hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}.bin"
    shape = len(pairs), 3, resolution, resolution
    if not cache.is_file() or cache.stat().st_size != math.prod(shape):
        folder.mkdir(parents=True, exist_ok=True)
        with open(f"{cache}.tmp", "wb") as file, ThreadPoolExecutor() as pool:
            decoded = pool.map(lambda pair: load_image(pair[0], resolution), pairs)
            for image in tqdm(decoded, f"reading {root.name}/{split}", len(pairs), leave=False):
                file.write(image.tobytes())
        os.replace(f"{cache}.tmp", cache)
    images = torch.from_file(str(cache), size=math.prod(shape), dtype=torch.uint8)
    return images.view(shape), torch.tensor([label for _, label in pairs]), classes


def load_data(args, split):
    """Images uint8 (N, 3, resolution, resolution) and labels (N,) of a split, on the CPU, and the class names.

    With --cache-latents normalised latents float16 (N, 2, C, h, w) of image and mirror image; fills in args.latents.
    """
    if args.cache_latents:
        return load_latents(args, split)
    name, train, root = args.dataset, split == "train", Path(args.data, args.dataset)
    if (name not in RESOLUTIONS or name != "shapes" and args.resolution != 32) and not (root / "train").is_dir():
        fail(f"{name}: no folder {root}/train; only shapes and 32-pixel CIFAR do without")
    with FileLock(Path(torch.hub.get_dir(), f"{root.name}.lock")):  # one downloads or decodes, the others wait
        if (root / "train").is_dir():
            return read_folder(root, split, args.resolution)
        if name == "shapes":
            return *draw_shapes(10000 if train else 2000, 0 if train else 1, args.resolution), SHAPES
        with told(f"no download of {name}: put its images into {root}/train/<class>/"):
            stored = getattr(datasets, name.upper())(args.data, train, download=True)
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(stored.targets), stored.classes


class VAEResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, + x."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, 1e-6), nn.GroupNorm(32, c_out, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + self.nin_shortcut(x)


class VAEAttention(nn.Module):
    """Self-attention over pixels, one head, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class VAEStage(nn.Module):
    """Residual blocks of one resolution, each with attention where asked; then a convolution that resamples."""

    def __init__(self, c_in, c_out, blocks, attention=False, resample=None):
        super().__init__()
        self.block = nn.ModuleList(VAEResBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(VAEAttention(c_out) if attention else nn.Identity() for _ in range(blocks))
        self.downsample = self.upsample = nn.Identity()
        if resample == "down":
            pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom
            self.downsample = nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c_out, c_out, 3, stride=2)))
        if resample == "up":
            nearest = nn.Upsample(scale_factor=2)
            self.upsample = nn.Sequential(OrderedDict(nearest=nearest, conv=nn.Conv2d(c_out, c_out, 3, padding=1)))

    def forward(self, x):
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


class VAE(nn.Module):
    """The VA-VAE: a KL autoencoder, 16 x 16 pixels to z numbers. [KL], [LDiT]"""

    def __init__(self, width=128, z=32):
        super().__init__()
        w = [width * m for m in (1, 1, 2, 2, 4)]  # channels from full resolution down to a sixteenth
        down = [VAEStage(w[max(i - 1, 0)], w[i], 2, i == 4, "down" if i < 4 else None) for i in range(5)]
        up = [(str(i), VAEStage(w[min(i + 1, 4)], w[i], 3, i == 4, "up" if i else None)) for i in (4, 3, 2, 1, 0)]
        mid = OrderedDict(block_1=VAEResBlock(w[4], w[4]), attn_1=VAEAttention(w[4]), block_2=VAEResBlock(w[4], w[4]))
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(3, w[0], 3, padding=1), down=nn.Sequential(*down), mid=nn.Sequential(mid),
            norm_out=nn.GroupNorm(32, w[4], 1e-6), silu=nn.SiLU(), conv_out=nn.Conv2d(w[4], 2 * z, 3, padding=1)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(z, w[4], 3, padding=1), mid=nn.Sequential(copy.deepcopy(mid)),
            up=nn.Sequential(OrderedDict(up)), norm_out=nn.GroupNorm(32, w[0], 1e-6), silu=nn.SiLU(),
            conv_out=nn.Conv2d(w[0], 3, 3, padding=1)))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, x):
        """Image (B, 3, H, W) in [-1, 1] -> mean and std of the posterior, each (B, z, H/16, W/16)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def decode(self, z):
        """Latent, not normalised, (B, z, h, w) -> image (B, 3, 16 h, 16 w), nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def load_vae(path, device):
    """The VA-VAE of a public file, frozen, in eval mode."""
    state = read_checkpoint(path)
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the rest trained it
    with told(f"--vae {path} is no VA-VAE"):
        state = {k: v for k, v in state.get("state_dict", state).items() if k.startswith(parts)}
        vae = VAE(state["encoder.conv_in.weight"].shape[0], state["post_quant_conv.weight"].shape[0])
        vae.load_state_dict(state)
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def vae_hash(path):
    """sha256 of the VA-VAE's file, 16 hexadecimal digits."""
    if not Path(path).is_file():
        fail(f"{path}, the VA-VAE, does not exist: give --vae FILE")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@torch.inference_mode()
def encode_images(vae, pairs, resolution, seed):
    """Images and mirror images -> draws from the posterior, not normalised: (n, 2, z, h, w)."""
    with ThreadPoolExecutor() as pool:
        images = np.stack([*pool.map(lambda pair: load_image(pair[0], resolution), pairs)])  # (n, 3, H, W)
    images = torch.from_numpy(np.stack([images, images[..., ::-1]], axis=1)).flatten(0, 1)  # (2n, 3, H, W)
    device = vae.quant_conv.weight.device
    posterior = [torch.cat(vae.encode(to_x0(piece.to(device))), dim=1).cpu() for piece in images.split(16)]
    mean, std = torch.cat(posterior).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return (mean + std * noise).unflatten(0, (-1, 2))


def read_meta(args, **wanted):
    """meta.json of --cache-latents, or None; fails on latents other than wanted."""
    path = Path(args.cache_latents, "meta.json")
    if not path.is_file():
        return None
    with told(f"{path} is damaged: delete the folder, or take another --cache-latents"):
        meta = json.loads(path.read_text())
        names = ("classes", "vae", "mean", "std", *wanted)
        other = [f"{k} {meta[k]}" for k in names if meta[k] != wanted.get(k, meta[k])]
    if other:
        fail(f"{path.parent} was made with another {other[0][:60]}: give that, or take another --cache-latents")
    return meta


def begin_cache(args, found, about, vae):
    """Room on disk for both splits, labels and, at the end, meta.json with the latents' mean and std."""
    folder, side = Path(args.cache_latents), args.resolution // 16
    folder.mkdir(parents=True, exist_ok=True)
    for split, (pairs, _) in found.items():
        shape = (len(pairs), 2, vae.post_quant_conv.in_channels, side, side)
        part, size = folder / f"{split}.part.npy", 2 * math.prod(shape)
        print(f"{split}: {len(pairs):,} images x 2 flips = {size / 1e9:.3g} GB in {folder}", flush=True)
        try:
            np.lib.format.open_memmap(part, "w+", np.float16, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk kills whoever writes to a map
                with open(part, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
            np.save(folder / f"{split}.done.npy", np.zeros(math.ceil(len(pairs) / BLOCK), np.uint8))
            np.save(folder / f"{split}.labels.npy", [label for _, label in pairs])
        except OSError as error:
            for part in folder.glob("*.part.npy"):
                part.unlink()
            fail(f"{folder} has no room for {size / 1e9:.3g} GB ({error}): take another --cache-latents")
    if "mean" not in about:  # the same images in every run
        pairs = found["train"][0]
        pairs = [pairs[i] for i in np.random.RandomState(0).permutation(len(pairs))[:STATISTICS]]
        bar = tqdm(range(0, len(pairs), BLOCK), "mean and std of the latents", unit="block")
        z = torch.cat([encode_images(vae, pairs[i : i + BLOCK], args.resolution, seeded(0, i)) for i in bar])
        about |= {"mean": z.mean((0, 1, 3, 4)).tolist(), "std": z.std((0, 1, 3, 4)).tolist()}
    (folder / "meta.tmp").write_text(json.dumps(about))
    os.replace(folder / "meta.tmp", folder / "meta.json")


def cache_latents(args):
    """Encode both splits into SPLIT.npy of --cache-latents, named so at the end.

    Rank r takes blocks r, r + world, ..; SPLIT.done.npy marks those on disk, for a killed job to go on.
    """
    folder, root = Path(args.cache_latents), Path(args.data, args.dataset)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.vae is None or not (root / "train").is_dir():
        fail(f"{folder} holds no finished latents: to make them, give --vae FILE and {root}/train/<class>/*")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):  # ranks write into one file
        fail("--cache-latents: let one node make them first, with --max-steps 1 --out ELSEWHERE")
    _lock = claim(folder) if rank == 0 else None  # held while it lives
    found = {split: list_images(root, split) for split in ("train", "test")}
    names = [file.removeprefix(str(root)) for pairs, _ in found.values() for file, _ in pairs]
    about = {"dataset": args.dataset, "resolution": args.resolution, "classes": found["train"][1]} | args.latents
    about["files"] = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
    vae = load_vae(args.vae, "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    with FileLock(Path(torch.hub.get_dir(), "latents.lock")):
        if not read_meta(args, **about):
            begin_cache(args, found, about, vae)
    mean, std = (torch.tensor(read_meta(args)[k]).view(-1, 1, 1) for k in ("mean", "std"))
    for split, (pairs, _) in found.items():
        final, part, done = (folder / f"{split}{kind}.npy" for kind in ("", ".part", ".done"))
        if final.is_file():
            continue
        with told(f"{folder} is damaged: take another --cache-latents, or delete the folder"):
            latents, finished = (np.lib.format.open_memmap(path, "r+") for path in (part, done))
            if (latents.ndim, len(latents), finished.shape) != (5, len(pairs), (math.ceil(len(pairs) / BLOCK),)):
                raise ValueError(f"{latents.shape}, {finished.shape}")
        todo = [b for b in range(rank, len(finished), world) if not finished[b]]
        for b in tqdm(todo, f"encoding {split}", unit="block", disable=rank > 0):
            rows = slice(b * BLOCK, (b + 1) * BLOCK)
            z = encode_images(vae, pairs[rows], args.resolution, seeded(1, split == "train", b))
            x0 = ((z - mean) / std).half()
            if not x0.isfinite().all():
                fail(f"--vae {args.vae} gives infinity or NaN on {pairs[rows][0][0]} or one soon after")
            latents[rows] = x0.numpy()
            latents.flush()
            finished[b] = 1
        if world > 1:
            dist.barrier()  # all blocks are there
        if rank == 0:
            os.replace(part, final)
            done.unlink()
        if world > 1:
            dist.barrier()  # they have their name


def load_latents(args, split):
    """load_data from --cache-latents; what is not finished there is made first."""
    folder = Path(args.cache_latents)
    if not all((folder / f"{name}.npy").is_file() for name in ("train", "test")):
        cache_latents(args)
    with told(f"{folder} is damaged: take another --cache-latents, or delete the folder"):
        meta = read_meta(args, dataset=args.dataset, resolution=args.resolution, **args.latents) or {}
        args.latents = {k: meta[k] for k in ("vae", "mean", "std")}  # for build and decoder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it cannot be written to: "c" could, but counts against memory
            latents = torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="r"))  # read when indexed
        labels = torch.from_numpy(np.load(folder / f"{split}.labels.npy")).long()
        if latents.shape[:3] != (len(labels), 2, len(meta["mean"])) or labels.max() >= max(1, len(meta["classes"])):
            raise ValueError(f"{tuple(latents.shape)} latents, {len(labels)} labels")
        return latents, labels, meta["classes"]


def to_x0(images, flip=None):
    """uint8 (B, 3, H, W), or latents float16 (B, 2, C, h, w) -> x0 (B, C, H, W) float32, mirrored where flip (B,)."""
    if images.ndim == 5:  # the latent of the mirror image is not the mirror image of the latent
        plain, mirrored = images.unbind(1)
    else:
        plain = images.float() / 127.5 - 1
        mirrored = plain.flip(3)
    return (plain if flip is None else torch.where(flip.view(-1, 1, 1, 1), mirrored, plain)).float()


def to_uint8(x0):
    """x0 (B, 3, H, W), nominally in [-1, 1] -> uint8."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def decoder(args, device, vae=None):
    """The function from sampled x0 to uint8 images; latents need the VA-VAE of --vae."""
    path = vae or args.vae
    if not args.cache_latents:
        return to_uint8 if vae is None else fail(f"--vae {vae}: the checkpoint works on pixels, drop it")
    if path is None or "mean" not in args.latents:
        fail("the checkpoint works on latents: give --vae FILE, or make it anew with train_dit.py --latent-stats")
    if vae_hash(path) != args.latents.get("vae"):
        fail(f"--vae {path} is not the file that the latents were made with")
    net = load_vae(path, device)
    mean, std = (torch.tensor(args.latents[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))

    def decode(x0):  # in pieces: pixels need room
        return torch.cat([to_uint8(net.decode(x * std + mean)) for x in x0.split(16)])

    return decode


def draw_numbers(n, shape, diffusion, generator):
    """One view's random numbers: uniform (n, 12), normal (n, 4), level (n,), noise (n, *shape)."""
    kw = {"generator": generator, "device": generator.device}
    uniform, normal = torch.rand(n, 12, **kw), torch.randn(n, 4, **kw)
    return uniform, normal, diffusion.draw_level(n, generator), torch.randn(n, *shape, **kw)


def make_view(images, labels, numbers, args):
    """One view of B images, from their rows of draw_numbers: x0, level, noise, y, aug of diffusion.loss.

    UNSPECIFIED: two views differ in flip and noise. With --cond y (B,), a tenth of it -1, the null class. [LDiT]
    """
    uniform, _, level, noise = numbers
    y = labels.masked_fill(uniform[:, 1] < 0.1, -1) if args.cond else None
    return to_x0(images, flip=uniform[:, 0] < 0.5), level, noise, y, None


# ---- 6. MoCo-v3 head ---------------------------
class RankMean(torch.autograd.Function):
    """Average of a tensor over ranks."""

    @staticmethod
    def forward(ctx, x):
        if not dist.is_initialized():
            return x.clone()
        x = x / dist.get_world_size()
        dist.all_reduce(x)
        return x

    backward = forward  # the gradient is averaged as well


class BatchNorm(nn.Module):
    """BatchNorm by the statistics of all ranks. (SyncBatchNorm refuses CPU tensors.)"""

    def __init__(self, dim, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):
        x = x.float()  # (B, D)
        x = x - RankMean.apply(x.mean(0))
        x = x * (RankMean.apply((x**2).mean(0)) + 1e-5).rsqrt()
        return x if self.weight is None else x * self.weight + self.bias


class Projector(nn.Module):
    """MoCo v3's MLP of widths dims; with emb_dim time-dependent [P].

    UNSPECIFIED: how; here e_t (B, emb_dim) scales and shifts the hidden layers, from 1 and 0.
    """

    def __init__(self, dims, emb_dim=0):
        super().__init__()
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.linear = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairs)
        self.norm = nn.ModuleList(BatchNorm(o, affine=k < len(pairs) - 1) for k, (_, o) in enumerate(pairs))
        self.time = nn.ModuleList(nn.Linear(emb_dim, 2 * o) for _, o in pairs[:-1]) if emb_dim else None
        for p in self.time.parameters() if emb_dim else ():
            nn.init.zeros_(p)

    def forward(self, x, e_t=None):
        """(B, dims[0]), (B, emb_dim) -> (B, dims[-1]) float32."""
        for k, (linear, norm) in enumerate(zip(self.linear, self.norm, strict=True)):
            x = norm(linear(x))
            if k < len(self.linear) - 1:
                if self.time is not None:
                    scale, shift = self.time[k](F.silu(e_t)).chunk(2, dim=1)
                    x = x * (1 + scale) + shift
                x = F.relu(x)
        return x


class MoCoHead(nn.Module):
    """Projector, whose EMA makes the keys, and predictor, online only. [MoCo] Sec. 3"""

    def __init__(self, feat_dim, emb_dim, timed, hidden):
        super().__init__()
        self.projector = Projector([feat_dim, hidden, hidden, 256], emb_dim if timed else 0)
        self.predictor = Projector([256, hidden, 256])

    def forward(self, feat, e_t):
        """feat (B, D), e_t (B, E) -> q (B, 256)."""
        return self.predictor(self.projector(feat, e_t))


def moco_loss(q, k, temperature=0.2):
    """InfoNCE of queries q (B, D), keys k (B, D) of all ranks, times 2 temperature [MoCo]; one direction only [P].

    UNSPECIFIED: the temperature is [MoCo]'s.
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
    keys, rank = k, 0
    if dist.is_initialized():
        keys, rank = k.new_empty(dist.get_world_size() * len(k), k.shape[1]), dist.get_rank()
        dist.all_gather_into_tensor(keys, k)  # (B world, D), in rank order
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ keys.T / temperature  # (B, B world)
    target = torch.arange(len(q), device=q.device) + rank * len(q)
    return 2 * temperature * F.cross_entropy(logits, target)


# ---- 7. Run utilities --------------------------
def fail(message, status=2):
    """One line on stderr, then exit. Rank 0 speaks; torchrun ends the others meanwhile."""
    time.sleep(5 * (os.environ.get("RANK", "0") != "0"))
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)  # above an open bar
    raise SystemExit(status)


@contextlib.contextmanager
def told(what, errors=Exception):
    """Makes errors one line."""
    try:
        yield
    except errors as error:
        fail(f"{what} ({str(error)[:200]})")


def setup_distributed(device):
    """Join torchrun's process group, if any: --device -> rank, world, torch.device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: this torch sees no GPU; use --device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if rank > 0:  # what another fails of comes first; 15: SIGTERM
        sys.excepthook = lambda *error: (signal.signal(15, signal.SIG_DFL), time.sleep(5), sys.__excepthook__(*error))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return rank, world, device


def seeded(*numbers):
    """A well-mixed seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@torch.no_grad()
def ema_update(average, objective, decay):
    """average <- decay average + (1 - decay) objective."""
    torch._foreach_lerp_(list(average.parameters()), list(objective.parameters()), 1 - decay)


def save_checkpoint(path, state):
    """Write, then rename: no file is half written."""
    with told(f"{path} not written: disk full?"), open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def read_checkpoint(path):
    """torch.load of tensors and plain types only: no code in a file is run."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about foreign pickles
        if not zipfile.is_zipfile(path) or not zipfile.ZipFile(path).testzip():  # torch checks no sums
            return torch.load(path, map_location="cpu", weights_only=True)
    fail(f"{path} does not exist or cannot be read as a checkpoint")


def load_weights(net, path):
    """--init: official names, behind any wrapper's prefix; only ADDED may be missing."""
    state = read_checkpoint(path)
    anchor = max((k for k in net.state_dict() if not k.startswith(ADDED)), key=len)
    with told(f"--init {path} does not fit this network"):
        for key in ("ema", "EMA", "model", "MODEL", "state_dict"):
            state = state[key] if isinstance(state.get(key), dict) else state
        prefix = next((k[: -len(anchor)] for k in [*state][::-1] if k.endswith(anchor)), "")  # ema_pytorch's is last
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix) and isinstance(v, torch.Tensor)}
        missing, odd = net.load_state_dict(state, strict=False)
        odd += [k for k in missing if not k.startswith(ADDED)] + [k for k, v in state.items() if not v.isfinite().all()]
        if odd:
            raise ValueError(f"{len(odd)} are missing, have no place or are not finite: {odd[0]}")


def save_run(args, parts, epoch, step, keep):
    """With keep epoch_NNNN.pt; then last.pt."""
    about = {"script": Path(__file__).stem, "args": vars(args), "epoch": epoch, "step": step}
    about["ema"] = parts["average"].net.state_dict()
    if keep:
        save_checkpoint(f"{args.out}/epoch_{epoch:04d}.pt", about)
    save_checkpoint(f"{args.out}/last.pt", about | {name: part.state_dict() for name, part in parts.items()})


def load_run(path, parts):
    """Restore what save_run wrote; the step to go on from."""
    state = read_checkpoint(path)
    with told(f"--resume: {path} is damaged, take another --out"):
        state["optimizer"]["param_groups"] = parts["optimizer"].state_dict()["param_groups"]
        for name, part in parts.items():
            if state[name]:  # without fp16 the scaler has none
                part.load_state_dict(state[name])
        for p, moments in parts["optimizer"].state.items():  # in p's layout
            moments |= {k: torch.empty_like(p).copy_(moments[k].view_as(p)) for k in ("exp_avg", "exp_avg_sq")}
            moments["step"].view(())
        return range(state["step"] + 1)[-1]  # a whole number


def claim(out):
    """Lock a run's folder; it dies with its process. Clears what a kill left."""
    lock = FileLock(Path(out, ".lock"), timeout=0)
    with told(f"{out}: another job is writing there", Timeout):
        lock.acquire()
    for path in Path(out).glob("*.tmp"):
        path.unlink()
    return lock


def start_run(args, net, step, about):
    """Say what is trained; args.json; metrics.jsonl up to step."""
    print(f"{type(net).__name__}, {sum(p.numel() for p in net.parameters()):,} parameters, feature {args.layer}")
    Path(args.out, "args.json").write_text(json.dumps(vars(args), indent=2))
    metrics, tmp = (Path(args.out, f"metrics.{end}") for end in ("jsonl", "tmp"))
    first = json.dumps({"step": 0, "args": vars(args), "torch": torch.__version__} | about).encode()
    lines = metrics.read_bytes().splitlines() if step and metrics.is_file() else [first]
    tmp.write_bytes(b"\n".join([*lines[: 1 + step // LOG_EVERY], b""]))
    os.replace(tmp, metrics)


def all_finite(stats, run):
    """A step's numbers, mean of ranks; a diverged run ends here, unsaved."""
    values = RankMean.apply(torch.stack([*stats.values()])).tolist()
    if not all(map(math.isfinite, values)):
        signal.signal(15, signal.SIG_DFL)  # ends fail's wait
        fail(f"training diverged: take a lower --lr; {run}/last.pt is older", status=1)
    return dict(zip(stats, values, strict=True))


@torch.no_grad()
def save_grid(args, ema, diffusion, device, epoch):
    """samples_NNNN.png: 64 samples, on a CPU 16, always from the same noise."""
    if args.cache_latents and not os.path.isfile(args.vae or ""):
        return  # nothing decodes them
    side = 8 if device.type == "cuda" else 4
    noise = torch.randn(side**2, *ema.shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    y = torch.arange(len(noise), device=device) % ema.classes if ema.classes else None
    images = decoder(args, device)(diffusion.sample(ema, noise, y=y))
    save_image(images / 255, Path(args.out, f"samples_{epoch:04d}.png"), nrow=side, padding=2, pad_value=1)


# ---- 8. Flags ----------------------------------
@told("--cl-t, --layer or other flags do not fit")
def parse_args(argv=None):
    """Flags -> Namespace, every default resolved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.set_defaults(model="rf", cl_head="time", latents={})  # latents: vae (its hash), mean, std
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=[*SIZES], default="B", help="0.5, 130, 457 or 674 M parameters (default: B)")
    add("--patch", type=int, help="side of a patch (default: latents 1; pixels resolution / 16, at least 2)")
    add("--self-cond", nargs="?", choices=["adaptive", "add"], const="adaptive", help="(default: off; bare: adaptive)")
    add("--layer", help="block of the feature (default: [P] Tab. 10; other sizes the same share of it)")
    add("--cond", nargs="?", type=int, const=1, default=0, metavar="CLASSES", help="class-conditional (bare: as data)")
    add("--qk-norm", action="store_true", help="RMSNorm of queries and keys: steadier in fp16")
    add = parser.add_argument_group("contrastive part").add_argument
    add("--cl", type=float, metavar="GAMMA", default=0.0, help="weight of the MoCo loss (default: 0; [P]: 0.01)")
    add("--cl-t", type=float, metavar="LEVEL", help="time of the teacher and of probe.py (default: 0.25; pixels 0.06)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="shapes", help="shapes, cifar10, cifar100 or a folder ROOT/NAME (default: shapes)")
    add("--data", default="./data", metavar="ROOT", help="of data sets (default: ./data)")
    add("--resolution", type=int, help="of images (default: shapes 16, CIFAR 32, folders 64, for latents 256)")
    add("--cache-latents", metavar="DIR", type=os.path.abspath, help="train on latents; --vae first puts them there")
    add("--vae", metavar="FILE", type=os.path.abspath, help="VA-VAE f16d32, to make latents and sample grids")
    add("--latent-stats", metavar="FILE", help="their mean and std, of public weights (default: from images)")
    add = parser.add_argument_group("optimisation ([P] Tab. 11)").add_argument
    add("--epochs", type=int, help="(default: latents 1400, --cond 1000, imagenet 90; pixels 2000; tiny 8)")
    add("--batch", type=int, help="total over all ranks (default: 1024; tiny 16)")
    add("--accum", type=int, default=1, help="passes per batch (default: 1)")
    add("--lr", type=float, help="of Adam, constant (default: 2e-4; tiny 2e-3)")
    add("--ema", type=float, help="decay per step (default: 0.9999, tiny 0.999)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="auto: bf16 where it is fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on GPUs)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="(default: runs/<from the flags>)")
    add("--resume", action="store_true", help="go on; with --out by the run's flags")
    add("--init", metavar="FILE", help="start from official weights")
    add("--save-every", type=int, help="epochs between epoch_NNNN.pt (default: a tenth; imagenet 20)")
    add("--max-steps", type=int, help="stop there; 0 with --init makes a checkpoint")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = read_flags(parser, argv)

    latents, large = args.cache_latents is not None, args.dataset == "imagenet"  # of 1000 classes
    if (args.vae or args.latent_stats) and not (args.vae and latents):
        parser.error("--vae FILE goes with --cache-latents DIR, and --latent-stats with both")
    if args.vae and (os.path.isfile(args.vae) or not args.resume):  # a resumed run may do without
        args.latents = args.latents | {"vae": vae_hash(args.vae)}
    if args.latent_stats and "mean" not in args.latents:
        try:
            stats = read_checkpoint(args.latent_stats)
            args.latents |= {k: stats[k].flatten().tolist() for k in ("mean", "std")}
        except (TypeError, LookupError, AttributeError):
            parser.error(f"--latent-stats {args.latent_stats} needs tensors mean and std, a number per channel")
    if latents and (meta := read_meta(args)):
        args.latents = {k: meta[k] for k in ("vae", "mean", "std")} | args.latents
    resolution = args.resolution or (256 if latents else RESOLUTIONS.get(args.dataset, 64))
    block = 8 if not large else 10 if args.cond else 9  # of B's 12, [P] Tab. 10
    defaults = PAPER | {
        "resolution": resolution, "patch": 1 if latents else max(2, resolution // 16),
        "layer": str(round(block * SIZES[args.size][1] / 12)), "cl_t": 0.25 if latents else 0.06,
    }
    if latents:
        defaults["epochs"] = 90 if large else 1000 if args.cond else 1400
        defaults["save_every"] = 20 if large else None  # None: a tenth of the epochs
    defaults |= TINY if args.size == "tiny" else {}
    return resolve_flags(parser, args, defaults, [args.dataset, "dit", args.size, "latents" if latents else "pixels"])


def build(args):
    """Untrained network and formulation, on the CPU: (DiT, LatentRF)."""
    channels, side = 3, args.resolution
    if args.cache_latents:
        channels, side = len(args.latents.get("mean", range(32))), side // 16  # 32 in the public VA-VAE
        if args.resolution % 16:
            raise ValueError(f"the VA-VAE takes multiples of 16 pixels, not {args.resolution}")
    net = DiT(channels, side, args.patch, *SIZES[args.size], qk_norm=args.qk_norm,
              classes=args.cond and max(args.cond, len(args.classes)), layer=args.layer, self_cond=args.self_cond)
    return net, LatentRF()


def read_flags(parser, argv):
    """argparse's answer; with --resume, flags not given are those of the run in --out."""
    parser.error = fail
    parser.set_defaults(classes=[])  # their names, of the data
    args = parser.parse_args(argv)
    if args.resume and args.out:
        state = read_checkpoint(Path(args.out, "last.pt"))
        run = {k: v for k, v in state.get("args").items() if k in vars(args)}
        parser.set_defaults(**run | {"max_steps": None})
        args = parser.parse_args(argv)
        with told(f"--resume: {args.out} is damaged, or another script's"), torch.device("meta"):
            build(argparse.Namespace(**state["args"]))[0].load_state_dict(state["ema"], assign=True)
        for key, value in run.items():
            if key not in FREE and getattr(args, key) != value:
                fail(f"--resume: {args.out} has --{key.replace('_', '-')} {value}; drop the flag")
    return args


def resolve_flags(parser, args, defaults, name):
    """Fill in defaults, check numbers, name the run after the flags given."""
    given = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and v not in name and k not in FREE}
    name = "-".join([*name, *(k if v is True else f"{k}-{v}" for k, v in given.items())])
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k, None) is None})
    args.save_every = args.save_every or max(1, args.epochs // 10)
    args.warmup = min(args.warmup, args.epochs / (10 if args.cooldown else 4))  # UNSPECIFIED: short runs
    for key, value in vars(args).items():
        least = 1e-9 if key in "resolution patch epochs batch accum save_every lr".split() else 0
        most = 1 if key in ("aug", "ema") else 1e15
        if key not in ("classes", "latents") and not isinstance(value, str | None) and not least <= value <= most:
            fail(f"--{key.replace('_', '-')} {value} is out of range")
    if args.cl > 0 and args.batch // args.accum < 2:
        fail("--cl needs two images or more in a pass")
    with torch.device("meta"):
        build(args)[1].check_level(args.cl_t)
    args.data, args.out = os.path.abspath(args.data), args.out or "runs/" + name.replace("_", "-").replace("/", "-")
    return args


# ---- 9. The loop -------------------------------
def make_optimizer(objective, args):
    """Adam on everything that learns. [P] Tab. 11; its betas are [LDiT]'s."""
    params = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.Adam(params, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(args, step, per_epoch, total):
    """Linear warm-up, constant; tiny networks end in a linear fall to 0."""
    rise = (step + 1) / max(1.0, args.warmup * per_epoch)
    return args.lr * max(0.0, min(1.0, rise, (total - step) / max(1.0, args.cooldown * total)))


class Objective(nn.Module):
    """All that is trained, called once per pass, as DDP wants it."""

    def __init__(self, net, diffusion, head, gamma):
        super().__init__()
        self.net, self.diffusion, self.head, self.gamma = net, diffusion, head, gamma

    def forward(self, x0, level, noise, y, aug, key):
        """L_diffusion + gamma L_moco of one view, and numbers worth logging. [P]"""
        loss, (feat, e_t) = self.diffusion.loss(self.net, x0, level, noise, y, aug)
        stats = {"loss_diffusion": loss}
        if key is not None:
            stats["loss_contrast"] = moco_loss(self.head(feat, e_t), key)
            loss = loss + self.gamma * stats["loss_contrast"]
        return loss, {"loss": loss} | stats


@torch.no_grad()
def teacher_key(average, view, level):
    """The EMA's key (B, 256) of a second view at a fixed level; the pass stops at --layer. [P]"""
    x0, _, noise, _, aug = view
    x_t, t = average.diffusion.inputs(x0, level, noise)
    return average.head.projector(*average.net.encode(x_t, t, aug=aug))  # UNSPECIFIED: it is never told a class


def main(args):
    """Train. args.out gets last.pt, epoch_NNNN.pt, metrics.jsonl, args.json, samples_NNNN.png."""
    # 1. Where we run, how the batch is cut.
    rank, world, device = setup_distributed(args.device)
    cuda, last, launcher = device.type == "cuda", Path(args.out, "last.pt"), os.getppid()
    local = args.batch // (world * args.accum)  # images of one rank in one pass
    if args.batch % (world * args.accum):
        fail(f"--batch {args.batch} is not divisible by ranks x --accum = {world} x {args.accum}")
    if last.is_file() and not args.resume:
        fail(f"--out {args.out} holds a run: add --resume, or take another --out")

    # 2. Data: on the device, unless they fill a third of it.
    nothing = *torch.empty(2, 1).expand(2, args.batch), args.classes
    images, labels, classes = load_data(args, "train") if args.max_steps != 0 else nothing
    if args.classes not in ([], classes) or not classes and getattr(args, "cond", 0) == 1:
        fail(f"{args.dataset} has other classes than {args.out} (--resume), or none (bare --cond)")
    args.classes = classes
    if len(images) < args.batch:
        fail(f"--batch {args.batch} is more than the {len(images)} training images")
    if not cuda or images.nbytes < torch.cuda.mem_get_info(device)[0] / 3:
        images, labels = images.to(device), labels.to(device)
    per_epoch = len(images) // args.batch
    total = args.epochs * per_epoch
    end = total if args.max_steps is None else min(total, args.max_steps)

    # 3. Network, its average, the head, the optimiser.
    torch.manual_seed(args.seed)
    net, diffusion = build(args)
    if args.init and not args.resume:
        load_weights(net, args.init)
    bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    bf16 = torch.cuda.is_bf16_supported(False) if cuda else bf16
    amp = ("bf16" if bf16 else "fp16" if cuda else "off") if args.amp == "auto" else args.amp
    autocast = torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp), amp != "off")
    head = MoCoHead(net.feat_dim, net.emb_dim, args.cl_head == "time", args.cl_hidden) if args.cl > 0 else None
    layout = torch.channels_last if cuda else torch.preserve_format  # slower on CPUs
    objective = Objective(net, diffusion, head, args.cl).to(device, memory_format=layout)
    average = copy.deepcopy(objective).eval().requires_grad_(False)
    optimizer = make_optimizer(objective, args)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parts = {"objective": objective, "average": average, "optimizer": optimizer, "scaler": scaler}
    _lock = claim(args.out) if rank == 0 else None  # while it lives
    step = load_run(last, parts) if args.resume else 0
    if step > end:
        fail(f"--resume: {last} is past step {end}: give more --epochs or --max-steps")
    if args.compile or (args.compile is None and cuda):
        torch._dynamo.config.optimize_ddp = False  # it cuts the graph into seven
        net.compile()
        average.net.encode = torch.compile(average.net.encode)
    ddp = DistributedDataParallel(objective, gradient_as_bucket_view=True) if world > 1 else objective
    if rank == 0:
        start_run(args, net, step, {"ranks": world, "device": torch.cuda.get_device_name() if cuda else "cpu"})
        print(f"batch {args.batch} = {world} ranks x {args.accum} passes x {local} images; {device}, {amp}")
    bar = tqdm(total=end, initial=step, unit="step", disable=rank > 0, mininterval=1)
    # A signal or torchrun's end: finish the step, save. First save in a minute.
    generator, order, since, stop, signals = torch.Generator(device), None, (step, time.time()), 0, [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    saved = time.time() - SAVE_SECONDS + 60
    if end == rank == 0:  # --max-steps 0
        save_run(args, parts, 0, 0, keep=False)

    # 4. The loop.
    objective.train()
    while step < end and not stop:
        # 1. Data. Numbers follow from (seed, step), so resume repeats. Ranks draw the whole batch, keep their rows.
        epoch, nth = divmod(step, per_epoch)
        if order is None or nth == 0:
            shuffle = torch.Generator().manual_seed(seeded(args.seed, 2, epoch))
            order = torch.randperm(len(images), generator=shuffle).to(images.device)
        rows = order[nth * args.batch :][: args.batch]
        generator.manual_seed(seeded(args.seed, 0, step))
        torch.manual_seed(seeded(args.seed, 1, step, rank))  # for dropout
        drawn = [draw_numbers(args.batch, net.shape, diffusion, generator) for _ in range(2 if head else 1)]
        stats = {}
        for micro in range(args.accum):
            begin = (micro * world + rank) * local
            mine = slice(begin, begin + local)
            batch, y = images[rows[mine]], labels[rows[mine]]
            if batch.device != device:
                batch, y = (part.pin_memory().to(device, non_blocking=True) for part in (batch, y))
            views = [make_view(batch, y, [part[mine] for part in numbers], args) for numbers in drawn]
            # 2. The teacher's key from the second view, one forward pass on the first for both losses.
            ddp.require_backward_grad_sync = micro == args.accum - 1
            with autocast:
                key = teacher_key(average, views[1], args.cl_t) if head else None
                loss, found = ddp(*views[0], key)  # x0, level, noise, y, aug, key
            scaler.scale(loss / args.accum).backward()
            stats = {name: stats.get(name, 0) + value.detach() / args.accum for name, value in found.items()}
        # 3. Update the weights, then their average. UNSPECIFIED: its decay warms up, not as [DDAE]'s.
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0, foreach=True)  # [DDAE]
        stats["grad_norm"] = grad_norm.nan_to_num(0, 0) if amp == "fp16" else grad_norm  # skipped
        lr = learning_rate(args, step, per_epoch, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        ema_update(average, objective, min(args.ema, (1 + step) / (10 + step)))

        # 4. Report and save.
        bar.update()
        epoch = step // per_epoch
        keep = step == total or step % per_epoch == 0 and epoch % args.save_every == 0
        orphan = signal.SIGTERM * (world > 1 and os.getppid() != launcher)
        wanted = torch.tensor([max(*signals, orphan), time.time() - saved > SAVE_SECONDS])
        if world > 1:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX)  # on the host: no wait for the GPU
        stop, due = wanted.tolist()
        line, save = step % LOG_EVERY == 0, keep or due or stop or step == end
        if line or save:
            values = all_finite(stats, args.out)
        if line and rank == 0:
            speed, since = (step - since[0]) * args.batch / (time.time() - since[1]), (step, time.time())
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} img/s")
            with open(last.with_name("metrics.jsonl"), "a") as file:
                file.write(json.dumps({"step": step, "epoch": epoch, "lr": lr, **values, "img_per_s": speed}) + "\n")
        saved = time.time() if save else saved
        if save and rank == 0:
            bar.set_description("saving, sampling")
            save_run(args, parts, epoch, step, keep)
            if keep or step == end:
                save_grid(args, average.net, diffusion, device, epoch)
            bar.set_description()
    bar.close()
    if world > 1:
        del ddp  # before its group, or it may hang: pytorch #56297
        dist.destroy_process_group()
    if rank == 0:
        print(f"{last}, step {step}; next: " + ("the same with --resume" if stop else f"python probe.py {args.out}"))
    if stop:
        raise SystemExit(128 + stop)


if __name__ == "__main__":
    with told("stopped", OSError):  # disk full, no permission
        main(parse_args())
