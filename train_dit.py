"""Train a DiT that generates and represents: DDAE++ by rectified flow on VA-VAE latents or on pixels, in one file.

    python train_dit.py --dataset shapes --size tiny --cond --self-cond    # on pixels: a CPU core, a few minutes
    torchrun --nproc_per_node=8 train_dit.py --dataset imagenet100 --self-cond --vae vavae.pt --cache-latents LATENTS

Begin with SelfConditioning, DiT.run (where it acts), LatentRF, Objective and teacher_key (the losses), main.
Sources and marks (UNSPECIFIED: the paper leaves it open; DEVIATION: we depart from the paper or its ancestor):
    [P]    DDAE++, arXiv:2505.10999v1          [DDAE] Xiang et al., arXiv:2303.09769
    [DiT]  Peebles and Xie, arXiv:2212.09748   [RoPE] Su et al., arXiv:2104.09864
    [LDiT] Yao et al., LightningDiT and VA-VAE, arXiv:2501.01423
    [KL]   Rombach et al., arXiv:2112.10752    [RF]   Liu et al., arXiv:2209.03003
    [SD3]  Esser et al., arXiv:2403.03206      [CFG]  Ho and Salimans, arXiv:2207.12598
    [Int]  Kynkaanniemi et al., 2404.07724     [MoCo] Chen et al., MoCo v3, arXiv:2104.02057
Symbols:
    x0     clean latent, normalised, or image  x_t    noisy x0; *_hat is a prediction: v_hat
    noise  standard normal, the paper's eps    level  time of each image, 0 (data) .. 1 (noise), (B,)
    v      velocity, noise - x0                t      the network's time, which runs the other way: 1 - level, (B,)
    e_t    time embedding, (B, D)              e      e_t plus the class's; self-conditioning adds to it
    feat   pooled feature of --layer, (B, D)   q, k   contrastive query and key, (B, 256)
    y      class, (B,); -1 is the null class   B batch   C, H, W latent or image   N tokens   D width
    objective: the module that is trained. average: its EMA copy, which is sampled, probed, and MoCo's teacher.
"""

# ---- 1. Imports, constants ---------------------
import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # wrong gradients: pytorch #190796, #193061

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients: pytorch #169849, #196678
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; else images with a long text are refused

# Width, depth, heads: [DiT] Tab. 1. tiny is our own, for a CPU.
SIZES = {"tiny": (64, 6, 4), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# [P] Tab. 8 and 11; epochs are those of its pixel networks, cl_hidden is [MoCo]'s. TINY is ours: warmup counts epochs
# (see resolve_flags), cooldown is the share of all steps in which lr falls.
PAPER = {"epochs": 2000, "batch": 1024, "lr": 2e-4, "ema": 0.9999, "warmup": 0, "cooldown": 0.0, "cl_hidden": 4096}
TINY = {"epochs": 8, "batch": 16, "lr": 2e-3, "ema": 0.999, "warmup": 13, "cooldown": 0.3, "cl_hidden": 512}
NEW_WEIGHTS = ("self_cond.",)  # what [P] adds to the official network
SHARD = 4096  # images whose latents share a file
BLOCK = 64  # images that are encoded together, with one seed
STATISTICS = 2048  # images whose latents give mean and std
STATISTICS_NOISE, LATENTS_NOISE = 0, 1  # streams of random numbers, not of --seed: runs share a cache
RESOLUTIONS = {"shapes": 16, "cifar10": 32, "cifar100": 32}  # other data sets: 64, as latents 256
LOG_EVERY = 10  # steps
SCRIPT_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # so that tools notice an edit

# ---- 2. Backbone -------------------------------
# Another backbone needs the attributes shape (C, H, W), classes (0: unconditional), layers (names by depth), layer (the
# feature's), feat_dim, emb_dim (widths of feat and e_t), and forward, encode, features as below, with feat in float32.
# Each parameter takes part in each pass (DDP), and training changes no buffers (the EMA skips them). Then change build,
# the table of sizes, the defaults of parse_args, and NEW_WEIGHTS.

def attention(q, k, v, mask=None):
    """Scaled dot-product attention of q, k, v (B, heads, N, D / heads)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask)
    with torch.autocast("cpu", enabled=False):  # float32: bf16 is slower there
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)

class DiTTime(nn.Module):
    """Embed times t (B,): cosines and sines, then a two-layer MLP, (B, D) float32."""
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = t.float()[:, None] * freqs  # (B, 128)
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))

def grid_positions(width, side):
    """Fixed position embedding (1, side^2, width): sines and cosines of the column, then of the row. [DiT]"""
    freqs = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * freqs  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    column, row = line.repeat(side, 1), line.repeat_interleave(side, 0)  # tokens run row by row
    return torch.cat([column, row], dim=1)[None].float()

class Rotary(nn.Module):
    """Rotary position embedding: half of a head turns with the token's row, the rest with its column. [RoPE]"""
    def __init__(self, head_width, side):
        super().__init__()
        half = head_width // 2
        freqs = 10000.0 ** (-torch.arange(0, half, 2) / half)
        angles = torch.arange(side)[:, None] * freqs
        angles = angles.repeat_interleave(2, 1)  # (side, half): two channels turn as a pair
        rows, columns = angles.repeat_interleave(side, 0), angles.repeat(side, 1)
        angles = torch.cat([rows, columns], dim=1)  # (N, head_width)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        """Turn x (B, heads, N, head_width), in float32."""
        a, b = x.float().unflatten(3, (-1, 2)).unbind(4)
        turned = torch.stack([-b, a], dim=4).flatten(3)
        return x * self.freqs_cos + turned * self.freqs_sin

class DiTAttention(nn.Module):
    """Multi-head self-attention with rotary positions; qk_norm: RMSNorm of queries and keys."""
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, 1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, 1e-6) if qk_norm else nn.Identity()

    def forward(self, x, rotary):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        q = rotary(self.q_norm(q.float())).to(v.dtype)
        k = rotary(self.k_norm(k.float())).to(v.dtype)
        h = attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, N, D))

class DiTBlock(nn.Module):
    """Attention, then SwiGLU; e scales and shifts what goes in, and gates what comes out. [DiT] Fig. 3"""
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.attn = DiTAttention(width, heads, qk_norm)
        hidden = 8 * width // 3
        self.mlp = nn.ModuleDict({"w12": nn.Linear(width, 2 * hidden), "w3": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, e, rotary):
        modulation = self.adaLN_modulation(e)[:, None]  # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        gate, value = self.mlp["w12"](self.norm2(x) * (1 + scale2) + shift2).chunk(2, dim=2)
        return x + gate2 * self.mlp["w3"](F.silu(gate) * value)

class DiT(nn.Module):
    """LightningDiT with self-conditioning after one block. [P] Tab. 9, weight names of [LDiT]

    channels, side: of a latent or image. patch: its side. classes: 0 for unconditional. layer: block of the feature,
    "1" .. "depth", None is the last. self_cond: None, adaptive or add.
    """
    def __init__(self, channels, side, patch, width, depth, heads, qk_norm=False, classes=0, layer=None,
                 self_cond=None):
        super().__init__()
        if side % patch != 0:
            raise ValueError(f"patches of {patch} do not divide {side} pixels")
        if width % (4 * heads) != 0:
            raise ValueError(f"width {width} is no multiple of 4 x {heads} heads")  # of Rotary
        self.shape, self.patch = (channels, side, side), patch
        self.classes = classes
        self.layers = [str(i + 1) for i in range(depth)]
        self.layer = layer or self.layers[-1]
        if self.layer not in self.layers:
            raise ValueError(f"there is no layer {layer!r}, only {', '.join(self.layers)}")
        if self_cond and self.layer == self.layers[-1]:
            raise ValueError(f"self-conditioning after {self.layer} leaves no decoder: take an earlier layer")
        self.feat_dim = self.emb_dim = width
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, patch, stride=patch)))
        self.t_embedder = DiTTime(width)
        if classes:  # the last row is the null class
            self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(classes + 1, width)))
        self.pos_embed = nn.Parameter(grid_positions(width, side // patch), requires_grad=False)
        self.feat_rope = Rotary(width // heads, side // patch)  # [LDiT]'s name
        self.blocks = nn.ModuleList(DiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "norm_final": nn.RMSNorm(width, 1e-6), "linear": nn.Linear(width, patch**2 * channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        })
        self.init_weights()  # not of what follows, which starts in its own way
        self.self_cond = SelfConditioning(width, 2 * width // 3, width, self_cond) if self_cond else None

    def init_weights(self):
        """Xavier's uniform, embeddings normal of std 0.02, modulations and output zero. UNSPECIFIED, as [DiT]."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                nn.init.zeros_(module.bias)
        embeddings = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        if self.classes:
            embeddings.append(self.y_embedder.embedding_table)
        for module in embeddings:
            nn.init.normal_(module.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]  # so blocks start as the identity
        zero += [self.final_layer["adaLN_modulation"][1], self.final_layer["linear"]]
        for module in zero:
            nn.init.zeros_(module.weight)

    def run(self, x, t, y=None, aug=None, stop=None, maps=None):
        """All blocks, or those up to `stop`: (prediction or None, feat, e_t). The dict `maps` gets their outputs."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be (B, *{self.shape}), not {tuple(x.shape)}")
        if (y is not None and not self.classes) or aug is not None:
            raise ValueError("this network has no classes for y, or aug is given, which other scripts have")
        e = e_t = self.t_embedder(t)  # (B, D)
        if self.classes:
            if y is None:
                y = torch.full((len(x),), -1, device=x.device)
            e = e + self.y_embedder(y.masked_fill(y < 0, self.classes))  # -1, the null class, has the last row
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
            if name == self.layer and self.self_cond is not None:
                # [P] self-conditioning: the feature joins the embedding of all later blocks. Its scale depends on e_t,
                # on time alone: the class should not decide how much an image's content counts.
                e = self.self_cond(e, e_t, feat)
        last = self.final_layer
        shift, scale = last["adaLN_modulation"](e)[:, None].chunk(2, dim=2)
        h = last["linear"](last["norm_final"](h) * (1 + scale) + shift)  # (B, N, p^2 C)
        side, p = self.shape[1] // self.patch, self.patch
        h = h.view(-1, side, side, p, p, self.shape[0])  # (B, row, column, row inside, column inside, C)
        h = h.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.shape)  # (B, C, H, W): patches put together
        return h, feat, e_t

    def forward(self, x, t, y=None, aug=None, with_feat=False):
        """-v_hat (see LatentRF), (B, C, H, W), of x (B, C, H, W) at the time t (B,); with_feat adds feat, e_t.
        y: classes (B,), None is -1 for all. aug: None; the other scripts have an augmentation label.
        """
        prediction, feat, e_t = self.run(x, t, y, aug)
        return (prediction, feat, e_t) if with_feat else prediction

    def encode(self, x, t, y=None, aug=None):
        """The pass up to --layer only: feat (B, D) float32 and e_t (B, D)."""
        _, feat, e_t = self.run(x, t, y, aug, stop=self.layer)
        return feat, e_t

    def features(self, x, t, y=None, pool="gap", last=None):
        """Outputs of all blocks, or those up to `last`, pooled by "gap" or "token" (a random one): {layer: (B, D)}."""
        if pool not in ("gap", "token"):
            raise ValueError(f"a DiT has no [CLS] token: use --pool gap or token, not {pool}")
        maps, rows = {}, torch.arange(len(x), device=x.device)
        self.run(x, t, y, stop=last, maps=maps)
        for name, h in maps.items():
            if pool == "gap":
                maps[name] = h.float().mean(dim=1)
            else:
                token = torch.randint(h.shape[1], rows.shape, device=x.device)
                maps[name] = h[rows, token].float()
        return maps

# ---- 3. Self-conditioning: the paper's idea ----
class SelfConditioning(nn.Module):
    """Condense the pooled feature and feed it back to the blocks after it. [P]
    adaptive: e' = e + s(SiLU(e_t)) * MLP(feat), s a linear map. add (an ablation): e' = e + MLP(feat).
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
        """The embedding e (B, E) with the feature (B, D) added, scaled by a function of e_t (B, E)."""
        f = self.mlp(feat)
        if self.scale is not None:
            f = self.scale(F.silu(e_t)) * f
        return e + f

# ---- 4. Diffusion formulation ------------------
def per_image(level, x):
    """A noise level, one number or (B,), as (B, 1, 1, 1) for arithmetic with images x."""
    if not isinstance(level, torch.Tensor):
        level = x.new_full((len(x),), level)
    if level.shape != x.shape[:1]:
        raise ValueError(f"a noise level is a number or of shape ({len(x)},), not {tuple(level.shape)}")
    return level.view(-1, 1, 1, 1)

class LatentRF(nn.Module):
    """A level is a time, from 0 (data) to 1 (noise); the network predicts v = noise - x0. [P] Tab. 8, [RF] Eq. 1
    The network runs on [LDiT]'s clock, as public weights do: it is given 1 - level and returns -v. UNSPECIFIED: pixels
    are treated as latents are.
    """

    def check_level(self, level):
        """Raise ValueError unless `level` is a time."""
        if not 0 <= level <= 1:
            raise ValueError(f"noise level {level:g}: rectified flow takes times from 0 to 1")

    def draw_level(self, n, generator):
        """Times of n training images, the sigmoid of a standard normal ("lognorm"): (n,). [SD3]"""
        return torch.randn(n, generator=generator, device=generator.device).sigmoid()

    def add_noise(self, x0, level, noise):
        """The forward process, (B, C, H, W): x_t = (1 - level) x0 + level noise."""
        level = per_image(level, x0)
        return (1 - level) * x0 + level * noise

    def inputs(self, x0, level, noise):
        """What the network sees: x_t (B, C, H, W) and its time, 1 - level (B,)."""
        return self.add_noise(x0, level, noise), 1 - per_image(level, x0).flatten().float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Return the loss, the unweighted loss (the same), and (feat, e_t). Error of v + 1 - cos(v_hat, v). [LDiT]"""
        x_t, t = self.inputs(x0, level, noise)
        output, feat, e_t = net(x_t, t, y, aug, with_feat=True)
        v, v_hat = noise - x0, -output.float()
        v_hat_unit = F.normalize(v_hat, dim=1, eps=0.1)  # DEVIATION: 1e-8 explodes gradients at v_hat = 0, the start
        cosine = (v_hat_unit * F.normalize(v, dim=1)).sum(1)  # (B, H, W)
        loss = F.mse_loss(v_hat, v) + (1 - cosine).mean()
        return loss, loss, (feat, e_t)

    def velocity(self, net, x, level, y=None, cfg=1.0, interval=(0.0, 1.0)):
        """v_hat (B, C, H, W) at a level, a number; guided inside the interval, on all channels [P]. [CFG], [Int]"""
        guided = y is not None and cfg != 1 and interval[0] <= level <= interval[1]
        if guided:  # with the class and without, as one batch
            x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, -1)])
        v_hat = -net(x, torch.full((len(x),), 1 - level, device=x.device), y).float()
        if guided:
            v_class, v_null = v_hat.chunk(2)
            v_hat = v_null + cfg * (v_class - v_null)
        return v_hat

    def times(self, steps, shift):
        """The sampler's steps + 1 levels from 1 to 0: level' = shift level / (1 + (shift - 1) level). [SD3]"""
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (shift * levels / (1 + (shift - 1) * levels)).tolist()

    def sample(self, net, noise, steps=250, y=None, cfg=1.5, cfg_interval=(0.0, 0.89), shift=3.3):
        """Euler: noise (B, C, H, W) -> x0, not clipped. [P] Tab. 8. DEVIATION: with 250, [LDiT] makes 249 steps.
        cfg: guidance, where there are labels y and for levels in cfg_interval; 1 is off. shift: more steps near noise.
        """
        x, levels = noise, self.times(steps, shift)
        for level, next_level in zip(levels[:-1], levels[1:], strict=True):
            x = x + (next_level - level) * self.velocity(net, x, level, y, cfg, cfg_interval)
        return x

    def features(self, net, x0, level, noise, y=None, pool="gap", last=None):
        """net.features of x0 noised to `level`: what probe.py reads."""
        x, t = self.inputs(x0, level, noise)
        return net.features(x, t, y, pool, last)

# ---- 5. Data, augmentation: pixels or latents ----
# Name: (corners, radius of every second corner relative to the others)
POLYGONS = {"triangle": (3, 1.0), "square": (4, 1.0), "sparkle": (8, 0.35), "star": (10, 0.45), "disc": (24, 1.0)}
SHAPES = [f"{fill} {name}" for fill in ("solid", "hollow") for name in POLYGONS]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP")  # MPO: some phones' .jpg
NO_DATA = (".", "@", "__MACOSX")  # beginnings of names: hidden, thumbnails, leftovers
# EXIF orientation -> what turns the image upright
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}

def draw_shapes(n, seed, side):
    """n polygons of random place, size, angle and colours, of the ten SHAPES: uint8 (n, 3, side, side), labels (n,)."""
    rng = np.random.RandomState(seed)  # the same in all versions of numpy
    labels = rng.permutation(n) % len(SHAPES)
    images = np.empty((n, side, side, 3), np.uint8)
    for i, label in enumerate(labels):
        fill, name = SHAPES[label].split()
        corners, inner = POLYGONS[name]
        dark = rng.randint(0, 128, 3)
        bright = dark + rng.randint(64, 128, 3)
        background, foreground = rng.permutation([dark, bright]).tolist()
        radius, angle = rng.uniform(16, 26), rng.uniform(-0.3, 0.3)
        centre = 32 + rng.uniform(-1, 1, 2) * (34 - radius)
        angles = angle - np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
        outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # (corners, 2), on the unit circle
        outline[1::2] *= inner
        canvas = Image.new("RGB", (64, 64), tuple(background))  # reduced at the end
        draw = ImageDraw.Draw(canvas)
        draw.polygon((centre + radius * outline).flatten().tolist(), tuple(foreground))
        if fill == "hollow":
            draw.polygon((centre + radius / 2 * outline).flatten().tolist(), tuple(background))
        images[i] = canvas.resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()

def open_image(path):
    """Read an image as RGB of 8 bits: its first frame, upright, on white where it is transparent."""
    with Image.open(path) as image:
        if image.format not in FORMATS:
            raise ValueError(f"is a {image.format}; read are PNG, JPEG, WebP, BMP")
        try:
            orientation = image.getexif().get(0x0112)
        except SyntaxError:  # broken metadata
            orientation = None
        image.load()
    if orientation in TURNS:
        image = image.transpose(Image.Transpose[TURNS[orientation]])
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them
        gray = np.asarray(image)
        transparent = gray == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(transparent, 255, gray >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (0, 0):  # all 0: a program left it unset
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def load_image(path, resolution):
    """Read, resize and center-crop an image as ADM does: uint8 (3, resolution, resolution)."""
    image = open_image(path)
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def load_images(files, resolution):
    """load_image of all files: uint8 (N, 3, resolution, resolution). Exits with a list of those that cannot be read."""
    images = torch.empty(len(files), 3, resolution, resolution, dtype=torch.uint8)
    problems = []
    def read(i):
        try:
            images[i] = load_image(files[i], resolution)
        except Exception as error:  # a damaged file can raise almost anything
            problems.append(f"\n  {files[i]}: {error}")
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(read, range(len(files))), "reading images", len(files), leave=False, delay=1))
    if problems:
        fail(f"{len(problems)} of {len(files)} images cannot be read:{''.join(sorted(problems)[:20])}")
    return images

def find_images(split):
    """The images of a split by class, {class name: sorted files}; where there are no class folders, {"": files}."""
    found = {}
    for parent, folders, names in os.walk(split, followlinks=True):
        inside = Path(parent).relative_to(split).parts
        folders[:] = [name for name in folders if not name.startswith(NO_DATA)]
        if inside:  # class folders may be links; links below them could lead in circles
            folders[:] = [name for name in folders if not os.path.islink(f"{parent}/{name}")]
        label = unicodedata.normalize("NFC", inside[0]) if inside else ""  # Macs spell é in two letters
        names = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(NO_DATA)]
        found.setdefault(label, []).extend(f"{parent}/{name}" for name in names)
    if len(found) > 1:
        beside = found.pop("")
        if beside:
            print(f"note: {len(beside)} pictures in {split} lie beside the class folders and are not used")
    return {label: sorted(found[label]) for label in sorted(found)}

def list_images(root, split):
    """Files and class indices of a split, [(path, index), ..], and class names; none if train/ has no class folders."""
    found = find_images(root / "train")
    classes = list(found)
    annotations = root / "val/val_annotations.txt"  # Tiny-ImageNet's: lines of file, class, bounding box
    if split == "test" and annotations.is_file():
        rows = [line.split("\t") for line in annotations.read_text().splitlines()]
        samples = [(f"{root}/val/images/{row[0]}", classes.index(row[1])) for row in rows]
        missing = [path for path, _ in samples if not os.path.isfile(path)]
        if missing:
            fail(f"missing: {len(missing)} of {len(samples)} images of val_annotations.txt, such as {missing[0]}")
        return samples, classes
    if split == "test":  # test/ or else val/, whichever has the classes of train/
        found = find_images(root / "test")
        if list(found) != classes:
            found = find_images(root / "val")
        if "" in found and classes != [""]:
            fail(f"{root}: val/ holds images, but no class folders")
        if list(found) != classes:
            fail(f"{root}: neither test/ nor val/ has the classes of train/")
    for name, files in found.items():
        if not files:
            fail(f"{root}/{split}/{name} holds no images ({' '.join(SUFFIXES)})")
    samples = [(path, index) for index, files in enumerate(found.values()) for path in files]
    return samples, [name for name in classes if name]

def load_folder(root, split, resolution):
    """load_data of class folders. Decoded images are kept in one file, beside the data or in the user's own cache."""
    samples, classes = list_images(root, split)
    files, labels = [path for path, _ in samples], torch.tensor([index for _, index in samples])
    states = [os.stat(path) for path in files]  # ctime tells replacements of equal size and date
    facts = [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]
    names = [path.removeprefix(str(root)) for path in files]
    key = hashlib.sha256(repr([names, facts]).encode()).hexdigest()
    folder = root / ".cache" if os.access(root, os.W_OK) else Path(torch.hub.get_dir(), "ddae", root.name)
    cache = folder / f"{split}_{resolution}.pt"
    try:
        stored = torch.load(cache, weights_only=True, mmap=True)
        if stored["key"] == key:
            return stored["images"], labels, classes
    except Exception:  # missing, damaged, another user's
        pass
    images = load_images(files, resolution)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(cache, {"key": key, "images": images})
    except OSError as error:
        print(f"note: decoded images are not kept for the next run ({error})")
    return images, labels, classes

def load_data(args, split):
    """The "train" or "test" split of --dataset: images uint8 (N, 3, side, side), labels int64 (N,), class names.

    With --cache-latents its latents, see load_latents.
    """
    if args.cache_latents:
        return load_latents(args, split)
    with rank_zero_first():  # it downloads or decodes, the others find the files
        return read_data(args.dataset, Path(args.data), split, args.resolution)

def read_data(name, data, split, resolution):
    """load_data on one rank. Class folders data/name/train/ come first, then what needs no files."""
    root, train = data / name, split == "train"
    if (root / "train").is_dir():
        return load_folder(root, split, resolution)
    if name == "shapes":
        images, labels = draw_shapes(10000, 0, resolution) if train else draw_shapes(2000, 1, resolution)
        return images, labels, SHAPES
    if name not in ("cifar10", "cifar100") or resolution != 32:
        fail(f"there is no folder {root}/train, and only shapes, and CIFAR at 32 pixels, do without")
    try:
        stored = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](data, train, download=True)
    except (OSError, RuntimeError) as error:  # no network, or a file that was cut
        fail(f"{name} cannot be downloaded ({error}): put its images into {root}/train/<class>/")
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(stored.targets), stored.classes

def vae_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)

def vae_conv(c_in, c_out, side=3):
    return nn.Conv2d(c_in, c_out, side, padding=side // 2)

class VAEResBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, and a shortcut."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = vae_norm(c_in), vae_conv(c_in, c_out)
        self.norm2, self.conv2 = vae_norm(c_out), vae_conv(c_out, c_out)
        self.nin_shortcut = vae_conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)

class VAEAttention(nn.Module):
    """Self-attention over pixels, one head, residual."""
    def __init__(self, channels):
        super().__init__()
        self.norm = vae_norm(channels)
        self.q, self.k = vae_conv(channels, channels, 1), vae_conv(channels, channels, 1)
        self.v, self.proj_out = vae_conv(channels, channels, 1), vae_conv(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        qkv = torch.stack([self.q(h), self.k(h), self.v(h)]).flatten(3)  # (3, B, C, HW)
        q, k, v = qkv.transpose(2, 3)[:, :, None]  # each (B, 1, HW, C)
        h = attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)

class VAEStage(nn.Module):
    """Residual blocks of one resolution, each with attention where asked for; then a convolution that resamples."""
    def __init__(self, c_in, c_out, blocks, attention, resample):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.block = nn.ModuleList(VAEResBlock(widths[i], widths[i + 1]) for i in range(blocks))
        self.attn = nn.ModuleList(VAEAttention(c_out) if attention else nn.Identity() for _ in range(blocks))
        self.downsample = self.upsample = nn.Identity()
        if resample == "down":  # padded at right and bottom
            conv = nn.Conv2d(c_out, c_out, 3, stride=2)
            self.downsample = nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))
        if resample == "up":
            self.upsample = nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=vae_conv(c_out, c_out)))

    def forward(self, x):
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))

class VAE(nn.Module):
    """The VA-VAE: a KL autoencoder, 16 x 16 pixels to z numbers. [KL], weight names of [LDiT]"""
    def __init__(self, width=128, z=32):
        super().__init__()
        widths = [width * multiple for multiple in (1, 1, 2, 2, 4)]  # from full resolution to a sixteenth
        down, c = nn.Sequential(), width
        for i, c_out in enumerate(widths):
            down.append(VAEStage(c, c_out, 2, attention=i == 4, resample="down" if i < 4 else None))
            c = c_out
        up = nn.Sequential()
        for i in (4, 3, 2, 1, 0):  # from the lowest resolution, numbered as in the encoder
            up.add_module(str(i), VAEStage(c, widths[i], 3, attention=i == 4, resample="up" if i > 0 else None))
            c = widths[i]
        first, last = widths[0], widths[4]
        block_1, block_2 = VAEResBlock(last, last), VAEResBlock(last, last)
        middle = OrderedDict(block_1=block_1, attn_1=VAEAttention(last), block_2=block_2)
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=vae_conv(3, first), down=down, mid=nn.Sequential(middle),
            norm_out=vae_norm(last), silu=nn.SiLU(), conv_out=vae_conv(last, 2 * z)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=vae_conv(z, last), mid=nn.Sequential(copy.deepcopy(middle)), up=up,
            norm_out=vae_norm(first), silu=nn.SiLU(), conv_out=vae_conv(first, 3)))
        self.quant_conv, self.post_quant_conv = vae_conv(2 * z, 2 * z, 1), vae_conv(z, z, 1)

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
    state = state.get("state_dict", state)
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the rest only trained it
    weights = {name: value for name, value in state.items() if name.startswith(parts)}
    try:
        vae = VAE(width=len(weights["encoder.conv_in.weight"]), z=len(weights["post_quant_conv.weight"]))
        vae.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        fail(f"--vae {path} is no VA-VAE ({str(error).splitlines()[-1].strip()})")
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

def vae_hash(path):
    """Tells VA-VAEs apart: sha256 of the file, 16 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]

@torch.no_grad()
def encode_images(vae, files, resolution, seed):
    """Latents of images and mirror images, drawn from the VAE's posterior, not normalised: (n, 2, z, h, w)."""
    images = load_images(files, resolution)  # (n, 3, H, W)
    both = torch.stack([images, images.flip(3)], dim=1).flatten(0, 1)  # (2n, 3, H, W)
    device = vae.quant_conv.weight.device
    means, stds = [], []
    for piece in both.split(16):  # for memory
        mean, std = vae.encode(to_x0(piece.to(device)))
        means.append(mean.cpu())
        stds.append(std.cpu())
    mean, std = torch.cat(means), torch.cat(stds)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return (mean + std * noise).unflatten(0, (-1, 2))

class Shards:
    """Latents in memory-mapped tensors of SHARD images, indexed as one, (N, 2, z, h, w) float16 on the CPU."""
    def __init__(self, parts):
        self.parts, self.device = parts, torch.device("cpu")
        self.shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        self.ndim, self.nbytes = 5, 2 * math.prod(self.shape)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        rows = torch.arange(len(self))[rows]  # row numbers, of indices, a mask or a slice
        latents = torch.empty(len(rows), *self.shape[1:], dtype=torch.float16)
        for i, row in enumerate(rows.tolist()):
            latents[i] = self.parts[row // SHARD][row % SHARD]
        return latents

    def to(self, device):
        return self if device.type == "cpu" else torch.cat([part.to(device) for part in self.parts])

def open_cache(args, device):
    """Read meta.pt of --cache-latents, or make it: data, VA-VAE (its hash), mean and std, which are measured once.

    Exits if it is of other latents. args.latents: the run's own, on --resume and in the tools, else {}.
    """
    file, root = Path(args.cache_latents, "meta.pt"), Path(args.data, args.dataset)
    meta = {"dataset": args.dataset, "resolution": args.resolution, **args.latents}
    has_vae = args.vae is not None and os.path.isfile(args.vae)
    if has_vae:
        meta["vae"] = vae_hash(args.vae)
        if args.latents and meta["vae"] != args.latents["vae"]:
            fail(f"--vae {args.vae} is not the file that the run's latents were made with: give that one")
    if args.latent_stats and not args.latents:
        stats = read_checkpoint(args.latent_stats)
        if "mean" not in stats or "std" not in stats:
            fail(f"--latent-stats {args.latent_stats} holds no tensors mean and std")
        meta.update(mean=stats["mean"].flatten().tolist(), std=stats["std"].flatten().tolist())
    if file.is_file():
        stored = read_checkpoint(file)
        for name, value in meta.items():
            found = stored.get(name)
            if found != value:
                fail(f"{file.parent} holds latents of another {name} ({str(found)[:40]}): choose another folder")
        return stored
    if not has_vae or not (root / "train").is_dir():
        fail(f"{file.parent} holds no latents: to make them, give --vae FILE and {root}/train/<class>/*")
    samples, meta["classes"] = list_images(root, "train")
    meta.update(train=len(samples), test=len(list_images(root, "test")[0]))
    if "mean" not in meta:
        chosen = np.random.RandomState(0).permutation(len(samples))[:STATISTICS]
        files, vae = [samples[i][0] for i in chosen], load_vae(args.vae, device)
        blocks = tqdm(range(0, len(files), BLOCK), "mean and std of the latents", unit="block")
        z = [encode_images(vae, files[i : i + BLOCK], args.resolution, stream_seed(STATISTICS_NOISE, i))
             for i in blocks]
        z = torch.cat(z)  # (STATISTICS, 2, z, h, w)
        meta.update(mean=z.mean((0, 1, 3, 4)).tolist(), std=z.std((0, 1, 3, 4)).tolist())
    file.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(file, meta)
    return meta

def make_shards(args, meta, shards, device):
    """Encode the images of shards [(file, split, number), ..] and write their latents and labels."""
    if not args.vae:
        fail(f"{args.cache_latents} is not complete: give --vae FILE")
    vae = load_vae(args.vae, device)
    mean, std = torch.tensor(meta["mean"]).view(-1, 1, 1), torch.tensor(meta["std"]).view(-1, 1, 1)
    samples = {}
    for split in ("train", "test"):
        samples[split], classes = list_images(Path(args.data, args.dataset), split)
        n = len(samples[split])
        if (n, classes) != (meta[split], meta["classes"]):
            fail(f"{args.cache_latents} was begun with {meta[split]} {split} images, there are {n}; or classes differ")
    for file, split, number in tqdm(shards, "encoding", unit=" shards"):
        part, z = samples[split][number * SHARD : (number + 1) * SHARD], []
        for i in range(0, len(part), BLOCK):
            block = (number * SHARD + i) // BLOCK  # its number in the split
            files = [path for path, _ in part[i : i + BLOCK]]
            seed = stream_seed(LATENTS_NOISE, int(split == "train"), block)
            z.append(encode_images(vae, files, args.resolution, seed))
        x0 = ((torch.cat(z) - mean) / std).half()
        if not x0.isfinite().all():
            fail(f"--vae {args.vae} gives NaN or infinity on one of {part[0][0]} .. {part[-1][0]}")
        save_checkpoint(file, {"latents": x0, "labels": torch.tensor([label for _, label in part])})

def load_latents(args, split):
    """load_data of latents, image and mirror image: (N, 2, z, h, w). Makes missing shards; fills in args.latents."""
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    with rank_zero_first():
        meta = open_cache(args, device)
    shards = []  # [(file, split, number), ..]
    for name in ("train", "test"):
        for number in range(math.ceil(meta[name] / SHARD)):
            shards.append((Path(args.cache_latents, f"{name}_{number:05d}.pt"), name, number))
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    missing = [shard for shard in shards[rank::world] if not shard[0].is_file()]
    if missing:
        make_shards(args, meta, missing, device)
    if world > 1:
        dist.barrier()
    args.latents = {"vae": meta["vae"], "mean": meta["mean"], "std": meta["std"]}
    parts = [torch.load(file, weights_only=True, mmap=True) for file, name, _ in shards if name == split]
    labels = torch.cat([part["labels"] for part in parts])
    if len(labels) != meta[split]:
        fail(f"{args.cache_latents} has {len(labels)} of {meta[split]} {split} latents: make the folder again")
    return Shards([part["latents"] for part in parts]), labels, meta["classes"]

def decoder(args, device, vae=None):
    """The function from sampled x0 to uint8 images; for latents by the VA-VAE in a file, by default the run's --vae."""
    if not args.cache_latents:
        return to_uint8
    path = vae or args.vae
    if path is None:
        fail("give --vae FILE, the one that the latents were made with")
    if vae_hash(path) != args.latents["vae"]:
        fail(f"--vae {path} is not the file that the latents were made with: give that one")
    net = load_vae(path, device)
    mean = torch.tensor(args.latents["mean"], device=device).view(-1, 1, 1)
    std = torch.tensor(args.latents["std"], device=device).view(-1, 1, 1)
    def decode(x0):  # in pieces, since pixels need room
        return torch.cat([to_uint8(net.decode(piece * std + mean)) for piece in x0.split(16)])
    return decode

def to_x0(images, flip=None):
    """uint8 (B, 3, H, W), or latents (B, 2, C, h, w), -> float32 (B, C, H, W); where flip (B,) is true, mirrored."""
    if images.ndim == 5:  # the latent of a mirror image is not the mirror image of a latent
        x0, mirrored = images.float().unbind(1)
    else:
        x0 = images.float() / 127.5 - 1
        mirrored = x0.flip(3)
    if flip is not None:
        x0 = torch.where(flip.view(-1, 1, 1, 1), mirrored, x0)
    return x0

def to_uint8(x0):
    """x0 (B, 3, H, W), nominally in [-1, 1] -> uint8."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def draw_numbers(n, shape, diffusion, generator):
    """All random numbers of one view of n images: a dict of tensors whose first dimension is n."""
    kw = {"generator": generator, "device": generator.device}
    uniform = torch.rand(n, 12, **kw)
    return {
        "flip": uniform[:, 0] < 0.5,
        "drop_label": uniform[:, 1] < 0.1,
        "aug_uniform": uniform[:, 2:],  # (n, 10), for gate_augment, which DiT has not
        "aug_normal": torch.randn(n, 4, **kw),
        "level": diffusion.draw_level(n, generator),
        "noise": torch.randn(n, *shape, **kw),
    }

def make_view(images, labels, draws, rows, args):
    """One view of B images, by their rows of draw_numbers: the arguments x0, level, noise, y, aug of Objective.
    UNSPECIFIED: the two views differ in flip and noise alone: latents cannot be warped, and pixels are treated alike.
    """
    draws = {name: values[rows] for name, values in draws.items()}
    x0, y = to_x0(images, draws["flip"]), None
    if args.cond:
        y = labels.masked_fill(draws["drop_label"], -1)  # the null class, [LDiT]
    return {"x0": x0, "level": draws["level"], "noise": draws["noise"], "y": y, "aug": None}

# ---- 6. MoCo-v3 head ---------------------------
def mean_over_ranks(x):
    """The mean of a tensor over ranks, without gradient."""
    if not dist.is_initialized():
        return x.detach().clone()
    x = x.detach() / dist.get_world_size()
    dist.all_reduce(x)
    return x

class RankMean(torch.autograd.Function):
    """mean_over_ranks with a gradient: each rank's loss has x by 1 / world, so x's gradient is the mean of theirs."""
    @staticmethod
    def forward(ctx, x):
        return mean_over_ranks(x)
    @staticmethod
    def backward(ctx, grad):
        return mean_over_ranks(grad)

class BatchNorm(nn.Module):
    """Batch normalisation over all ranks; SyncBatchNorm needs GPUs. No running statistics: eval mode uses the batch."""
    def __init__(self, dim, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):
        x = x.float()  # (B, dim)
        x = x - RankMean.apply(x.mean(0))
        variance = RankMean.apply((x**2).mean(0))
        x = x * (variance + 1e-5).rsqrt()
        if self.weight is not None:
            x = x * self.weight + self.bias
        return x

class HeadMLP(nn.Module):
    """MoCo v3's MLP with batch normalisation, dims[0] -> .. -> dims[-1]; with emb_dim it depends on time [P]."""
    def __init__(self, dims, emb_dim=0):
        super().__init__()
        hidden = dims[1:-1]
        self.linear = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(dims[:-1], dims[1:], strict=True))
        self.norm = nn.ModuleList([*(BatchNorm(dim) for dim in hidden), BatchNorm(dims[-1], affine=False)])
        self.time = None
        if emb_dim:  # UNSPECIFIED: how; here by scale and shift of hidden layers
            self.time = nn.ModuleList(nn.Linear(emb_dim, 2 * dim) for dim in hidden)
            for parameter in self.time.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x, e_t=None):
        """x (B, dims[0]), e_t (B, emb_dim) -> (B, dims[-1]) float32."""
        last = len(self.linear) - 1
        for i in range(last):
            x = self.norm[i](self.linear[i](x))
            if self.time is not None:
                scale, shift = self.time[i](F.silu(e_t)).chunk(2, dim=1)
                x = x * (1 + scale) + shift
            x = F.relu(x)
        return self.norm[last](self.linear[last](x))

class MoCoHead(nn.Module):
    """A projector, whose EMA makes the teacher's keys, and a predictor, which only the student uses. [MoCo] Sec. 3"""
    def __init__(self, feat_dim, emb_dim, time_dependent, hidden):
        super().__init__()
        self.projector = HeadMLP([feat_dim, hidden, hidden, 256], emb_dim if time_dependent else 0)
        self.predictor = HeadMLP([256, hidden, 256])

    def forward(self, feat, e_t):
        """The query (B, 256) of a feature (B, feat_dim) at the time embedding e_t (B, emb_dim)."""
        return self.predictor(self.projector(feat, e_t))

def moco_loss(q, k, temperature=0.2):  # UNSPECIFIED: the temperature is [MoCo]'s
    """InfoNCE of q and the keys k (B, 256) of all ranks, times 2 temperature [MoCo]. UNSPECIFIED: in one direction."""
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
    rank, keys = 0, k
    if dist.is_initialized():
        rank = dist.get_rank()
        gathered = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, k)
        keys = torch.cat(gathered)  # (B world, D), in order of ranks
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ keys.T / temperature  # (B, B world)
    positive = rank * len(q) + torch.arange(len(q), device=q.device)  # query i, this rank's key i
    return 2 * temperature * F.cross_entropy(logits, positive)

# ---- 7. Run utilities --------------------------
def fail(message, status=2):
    """End the program with one line on stderr: for mistakes that the user can mend."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # above the progress bar
    raise SystemExit(status)

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

@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block first, all others after it."""
    waits = dist.is_initialized() and dist.get_rank() > 0
    if waits:
        dist.barrier()
    yield
    if dist.is_initialized() and not waits:
        dist.barrier()

def choose_precision(amp, device):
    """Resolve --amp auto: bf16 where hardware has it (a step takes half the time), else fp16 on GPUs, off on CPUs."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return "off"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "off"

DRAWS, DROPOUT, ORDER = 0, 1, 2  # independent streams of random numbers
def stream_seed(*numbers):
    """One seed from several numbers, such as --seed, a stream, and a step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])

@functools.lru_cache(maxsize=1)
def epoch_order(seed, epoch, n, device):
    """The order in which an epoch goes through n images: a permutation (n,)."""
    generator = torch.Generator().manual_seed(stream_seed(seed, ORDER, epoch))
    return torch.randperm(n, generator=generator).to(device)

def catch_stop_signals(rank):
    """The list returned receives each signal that asks the run to stop, so that the loop can end its step and save."""
    received = []
    def note_signal(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt  # the second Ctrl-C
        received.append(number)
        if number == signal.SIGINT and rank == 0:
            tqdm.write("finishing this step, then saving; once more to stop at once", file=sys.stderr)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has not all of them
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(number, note_signal)
    return received

def save_checkpoint(path, state):
    """Write under a name of this process, then rename: no reader finds half a file. A full disk is an OSError."""
    temporary = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk; torch's zip writer makes it the second
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, is the disk full? ({error})") from error

def read_checkpoint(path):
    """Load a file, or last.pt of a run folder. weights_only: it may hold tensors and plain values, no code."""
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        fail(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise almost anything
        with open(path, "rb") as file:
            beginning = file.read(40)  # shows, for example, a Git-LFS pointer
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip()
        reason = reason.split("\n")[0].split(". ")[0]  # the rest is advice of torch's
        fail(f"{path} is no checkpoint, or is cut short ({reason}); it begins with {beginning}")
    if not isinstance(state, dict):
        fail(f"{path} holds a {type(state).__name__}, not the dict that a checkpoint is")
    return state

def load_weights(net, path):
    """Start from official weights, or from one of our checkpoints. What [P] adds may be missing in them."""
    state, entry = read_checkpoint(path), f"{path}"
    for key in ("ema", "model_ema", "EMA", "model", "MODEL", "state_dict"):  # open each that exists, EMA first
        if isinstance(state.get(key), dict):
            state, entry = state[key], f"{entry}, {key}"
    for prefix in ("ema_model.", "module.", "net."):  # what ema_pytorch, DDP, and [DDAE] put before names
        inner = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        if inner:
            state, entry = inner, f"{entry}, {prefix}*"
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a shape differs
        fail(f"--init {path} does not fit: {str(error).splitlines()[1].strip()}")
    missing = [name for name in missing if not name.startswith(NEW_WEIGHTS)]
    if missing or unexpected:
        fail(f"--init {path} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    print(f"weights: {entry}")

def save_run(args, parts, epoch, step, keep):
    """Write last.pt, to resume from, and if it is to be kept epoch_NNNN.pt, whose "ema" is all that the tools need."""
    state = {"script": Path(__file__).stem, "script_hash": SCRIPT_HASH, "args": vars(args), "epoch": epoch,
             "step": step, "ema": parts["average"].net.state_dict()}
    if keep:
        save_checkpoint(f"{args.out}/epoch_{epoch:04d}.pt", state)
    for name, part in parts.items():
        state[name] = part.state_dict()
    save_checkpoint(f"{args.out}/last.pt", state)

def load_run(out, parts):
    """Restore what save_run wrote. Returns the number of steps done."""
    state = read_checkpoint(out)
    try:
        for name, part in parts.items():
            if name != "scaler" or state[name]:  # without fp16 it is empty
                part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"--resume: {out}/last.pt is of another network, or no last.pt ({str(error).splitlines()[-1].strip()})")
    for parameter, moments in parts["optimizer"].state.items():
        for name in ("exp_avg", "exp_avg_sq"):  # laid out as the parameter: channels last only on GPUs
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    return state["step"]

class Log:
    """Rank 0's args.json, metrics.jsonl and bar. The newest job owns the folder; older ones exit at their next line."""
    def __init__(self, args, step, end, facts):
        if Path(args.out, "last.pt").is_file() and not args.resume:
            fail(f"{args.out} already holds a run: add --resume, or choose another --out")
        os.makedirs(args.out, exist_ok=True)
        for half_written in Path(args.out).glob("*.pt.*.tmp"):  # by a killed job
            half_written.unlink()
        self.job, self.args_file = uuid.uuid4().hex, Path(args.out, "args.json")
        self.args_file.write_text(json.dumps({**vars(args), "job": self.job}, indent=2))
        self.file = Path(args.out, "metrics.jsonl")
        lines = []
        if step > 0 and self.file.is_file():  # steps after the last save are repeated
            for line in self.file.read_text(errors="replace").splitlines():
                found = re.match(r'{"step": (\d+), .*}$', line)
                if found and int(found[1]) <= step:
                    lines.append(line)
        lines.append(json.dumps({"step": step, "args": vars(args), "torch": torch.__version__, **facts}))
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n")
        os.replace(temporary, self.file)
        self.bar = tqdm(total=end, initial=step, unit="step")
        self.batch, self.step, self.time = args.batch, step, time.time()

    def write(self, step, values):
        """Add a line to metrics.jsonl and move the progress bar. Exits if another job has taken the folder."""
        if self.job not in self.args_file.read_text():
            fail(f"another job has been started in {self.args_file.parent}: it goes on, this one ends")
        now = time.time()
        speed = (step - self.step) * self.batch / (now - self.time)
        self.bar.update(step - self.step)
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} img/s")
        self.step, self.time = step, now
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **values, "img_per_s": speed}) + "\n")

@torch.no_grad()
def save_grid(args, net, diffusion, device, name):
    """samples_NAME.png: 64 samples (16 on a CPU) of the EMA network, each time from the same noise."""
    if args.cache_latents and not os.path.isfile(args.vae or ""):
        return  # nothing decodes them
    side = 8 if device.type == "cuda" else 4
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(side**2, *net.shape, generator=generator).to(device)
    y = torch.arange(side**2, device=device) % net.classes if net.classes else None
    images = decoder(args, device)(diffusion.sample(net, noise, y=y))
    scale = math.ceil(64 / images.shape[2])  # tiles of 64 pixels or more
    images = F.interpolate(images / 255, scale_factor=scale, mode="nearest")
    save_image(images, f"{args.out}/samples_{name}.png", nrow=side, padding=2, pad_value=1)

# ---- 8. Flags ----------------------------------
# Flags that make the default name of a run
NAME_FLAGS = ("size", "patch", "self_cond", "layer", "cond", "qk_norm", "cl", "cl_t", "ema", "seed")

def parse_args(argv=None):
    """Read the flags; every default is resolved in what is returned."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__.splitlines()[0],
                                     epilog="On 4 GPUs: torchrun --nproc_per_node=4 %(prog)s [flags]")
    parser.set_defaults(model="rf", cl_head="time", aug=0.0, latents={})  # no flags, but read by others
    add = parser.add_argument_group("model").add_argument
    add("--size", choices=SIZES, default="B", help="0.5, 130, 457 or 674 M parameters; tiny is for CPUs (default: B)")
    add("--patch", type=int, metavar="N", help="side of a patch (default: latents 1; pixels 2, at 64 pixels 4)")
    add("--self-cond", nargs="?", choices=["adaptive", "add"], const="adaptive",
        help="self-conditioning; add is an ablation (default: off; without a value: adaptive)")
    add("--layer", metavar="L",
        help="block whose feature is fed back, contrasted and probed, 1 .. (default: tiny 4, B 8, L 16, XL 19; for "
        "--dataset imagenet B 9, then with --cond 10)")
    add("--cond", action="store_true", help="class-conditional; one label in ten is dropped in training")
    add("--qk-norm", action="store_true",
        help="RMSNorm of queries and keys, as some weights for --init have (default: off)")
    add = parser.add_argument_group("contrastive loss").add_argument
    add("--cl", type=float, metavar="GAMMA", default=0.0, help="its weight; the paper's is 0.01 (default: 0, off)")
    add("--cl-t", type=float, metavar="TIME", help="noise level of teacher and probe.py, from 0 (data) to 1 (noise) "
        "(default: latents 0.25, pixels 0.06)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="shapes",
        help="shapes, cifar10, cifar100, or a folder in --data, such as imagenet (default: shapes)")
    add("--data", default="./data", metavar="ROOT",
        help="ROOT/NAME/{train,test}/<class>/*; images are cropped to squares and resized (default: ./data)")
    add("--resolution", type=int, metavar="N", help="pixels (default: shapes 16, CIFAR 32, others 64, for latents 256)")
    add("--cache-latents", metavar="DIR", type=os.path.abspath,
        help="train on latents that are kept in DIR; missing ones are first made, from images by --vae")
    add("--vae", metavar="FILE", type=os.path.abspath,
        help="VA-VAE f16d32: makes latents, decodes samples; may be left out where neither is wanted")
    add("--latent-stats", metavar="FILE",
        help="mean and std that the weights of --init were trained with (default: measured)")
    add = parser.add_argument_group("optimisation (the paper's Tab. 11)").add_argument
    add("--epochs", type=int, metavar="N",
        help="in all, also with --resume (default: pixels 2000; latents 1400, with --cond 1000, of imagenet 90; tiny "
        "8)")
    add("--batch", type=int, metavar="N", help="images per step, over all GPUs (default: 1024; tiny 16)")
    add("--accum", type=int, metavar="N", default=1,
        help="passes that a batch is cut into, to save memory; each contrasts its own images (default: 1)")
    add("--lr", type=float, help="constant; tiny rises and falls (default: 2e-4; tiny 2e-3)")
    add("--ema", type=float, help="EMA decay per step (default: 0.9999; tiny 0.999)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
        help="precision; auto: bf16 where fast, else GPUs fp16, CPUs off (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on GPUs)")
    add("--seed", type=int, metavar="N", default=0, help="of weights, order and noise (default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="folder of the run (default: runs/<a name made from the flags>)")
    add("--resume", action="store_true", help="go on from last.pt in --out; flags that are given replace the run's")
    add("--init", metavar="FILE", help="start from public weights of this network, or from a run's")
    add("--save-every", type=int, metavar="N",
        help="epochs between epoch_NNNN.pt (default: a tenth of --epochs; imagenet 20)")
    add("--max-steps", type=int, metavar="N", help="stop at step N; 0 with --init makes a checkpoint of its weights")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    args = read_flags(parser, argv)
    if (args.vae or args.latent_stats) and not args.cache_latents:
        parser.error("--vae and --latent-stats go with --cache-latents DIR")
    resolution = args.resolution or (256 if args.cache_latents else RESOLUTIONS.get(args.dataset, 64))
    if args.cache_latents and resolution % 16 != 0:
        parser.error(f"--resolution: the VA-VAE takes multiples of 16 pixels, not {resolution}")
    defaults = {**PAPER, "resolution": resolution, "patch": max(2, resolution // 16), "cl_t": 0.06}
    block = 8  # of B's 12, [P] Tab. 10
    if args.dataset == "imagenet":
        block = 10 if args.cond else 9
    defaults["layer"] = str(round(block * SIZES[args.size][1] / 12))
    if args.cache_latents:
        defaults.update(patch=1, cl_t=0.25, epochs=1000 if args.cond else 1400)
        if args.dataset == "imagenet":
            defaults.update(epochs=90, save_every=20)
    if args.size == "tiny":
        defaults.update(TINY)
    return resolve_flags(parser, args, defaults)

def build(args):
    """The untrained network and the diffusion process, on the CPU: (DiT, LatentRF)."""
    channels, side = 3, args.resolution
    if args.cache_latents:
        channels, side = len(args.latents["mean"]), args.resolution // 16
    width, depth, heads = SIZES[args.size]
    classes = len(args.classes) if args.cond else 0
    net = DiT(channels, side, args.patch, width, depth, heads, args.qk_norm, classes, args.layer, args.self_cond)
    return net, LatentRF()

def read_flags(parser, argv):
    """Parse the flags; with --resume once more, now with the run's own as the defaults of those that are not given."""
    parser.set_defaults(classes=[], train_images=0)  # no flags: main sets them
    args = parser.parse_args(argv)
    name = f"{args.dataset}-{Path(__file__).stem.removeprefix('train_')}"
    for flag in NAME_FLAGS:
        if getattr(args, flag) != parser.get_default(flag):
            name += f"-{flag}-{getattr(args, flag)}"
    out = args.out or f"runs/{name.replace('_', '-').replace('-True', '')}"
    if args.resume:
        state = read_checkpoint(out)
        if state.get("script") != Path(__file__).stem:
            fail(f"--resume: {out}/last.pt was written by {state.get('script')}.py, not by this script")
        parser.set_defaults(**{**state["args"], "max_steps": None})  # which is not carried over
    parser.set_defaults(out=out)
    return parser.parse_args(argv)

def resolve_flags(parser, args, defaults):
    """Fill in the defaults of flags that were not given, and refuse values out of range."""
    defaults.setdefault("save_every", max(1, (args.epochs or defaults["epochs"]) // 10))
    for name, value in defaults.items():  # some have no flag
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.warmup = min(args.warmup, args.epochs / (10 if args.cooldown else 4))  # UNSPECIFIED: at most 1/4, tiny 1/10
    args.data = os.path.abspath(args.data)
    for name in ("resolution", "patch", "epochs", "batch", "accum", "lr", "save_every"):
        if name in args and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name, highest in {"aug": 1, "ema": 1, "cl": 1e9, "seed": 2**63, "max_steps": 2**63}.items():
        if not 0 <= (getattr(args, name) or 0) <= highest:
            parser.error(f"--{name.replace('_', '-')} must lie between 0 and {highest:g}")
    if args.cl > 0 and args.batch // args.accum < 2:
        parser.error("--cl compares the images of a pass, and needs two or more: raise --batch, or lower --accum")
    return args

# ---- 9. The loop -------------------------------
def make_optimizer(objective, args):
    """Adam on everything that learns. [P] Tab. 11; the betas are [LDiT]'s."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    return torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.95), fused=True)

def learning_rate(args, step, per_epoch, total):
    """Linear rise, then constant; with a cool-down (tiny networks) the end of the run falls linearly to 0."""
    warmup, cooldown = args.warmup * per_epoch, args.cooldown * total  # steps
    rise, fall = (step + 1) / max(1, warmup), (total - step) / max(1, cooldown)
    return args.lr * min(1, rise, fall)

def ema_decay(args, step):
    """Decay of the average's update after step 1, 2, ... UNSPECIFIED: --ema from the first step on, as [LDiT]."""
    return args.ema

class Objective(nn.Module):
    """Everything that is trained, and its loss, in one module: DDP synchronises gradients of a forward call only."""
    def __init__(self, net, diffusion, args):
        super().__init__()
        self.net, self.diffusion, self.gamma = net, diffusion, args.cl
        self.head = None
        if args.cl > 0:
            self.head = MoCoHead(net.feat_dim, net.emb_dim, args.cl_head == "time", args.cl_hidden)

    def forward(self, x0, level, noise, y, aug, key):
        """The loss of one view, and what to log: diffusion loss + gamma contrastive loss. [P]"""
        loss, unweighted, (feat, e_t) = self.diffusion.loss(self.net, x0, level, noise, y, aug)
        losses = {"loss_diffusion": loss, "loss_unweighted": unweighted}
        if key is not None:
            query = self.head(feat, e_t)  # of the same pass as the diffusion loss
            losses["loss_contrast"] = moco_loss(query, key)
            loss = loss + self.gamma * losses["loss_contrast"]
        return loss, {"loss": loss, **losses}

@torch.no_grad()
def teacher_key(average, view, level):
    """Key (B, 256) of the EMA network, run up to --layer on a second view noised to the fixed `level`. [P]"""
    x_t, t = average.diffusion.inputs(view["x0"], level, view["noise"])
    feat, e_t = average.net.encode(x_t, t, aug=view["aug"])  # UNSPECIFIED: no class, eval mode
    return average.head.projector(feat, e_t)

def build_training(args, device):
    """What training changes, on the device: the objective, its average, and the optimiser."""
    torch.manual_seed(args.seed)
    try:
        net, diffusion = build(args)
        diffusion.check_level(args.cl_t)
    except ValueError as error:  # a layer, patch or level that does not exist
        fail(error)
    if args.init and not args.resume:
        load_weights(net, args.init)
    objective = Objective(net, diffusion, args).to(device)
    if device.type == "cuda":
        objective.to(memory_format=torch.channels_last)  # faster there, slower on CPUs
    average = copy.deepcopy(objective).eval().requires_grad_(False)
    return objective, average, make_optimizer(objective, args)

def compile_networks(net, teacher):
    """Compile the network's forward and the teacher's encode, in place."""
    if not (shutil.which("gcc") or shutil.which("clang")):
        fail("torch.compile needs a compiler, and there is no gcc: give --no-compile, or install one")
    torch._dynamo.config.optimize_ddp = False  # it would cut the network into seven graphs
    net.compile()
    teacher.encode = torch.compile(teacher.encode)

def check_data(args, images, classes):
    """Exit if the training data do not fit the flags or, on --resume, are not those of the run."""
    if args.resume and (len(images), classes) != (args.train_images, args.classes):
        fail(f"not the data of this run: it had {args.train_images} images, now {len(images)}; or class names differ")
    if args.cond and not classes:
        fail(f"--cond needs classes, and {args.dataset} has no folders train/<class>/")
    if len(images) < args.batch:
        fail(f"--batch {args.batch} is more than the {len(images)} training images")

def main(args):
    """Train; args.out receives last.pt, epoch_NNNN.pt, samples_NNNN.png, metrics.jsonl and args.json."""
    # Where we run, and how the batch is cut.
    rank, world, device = setup_distributed(args.device)
    if args.batch % (world * args.accum) != 0:
        fail(f"--batch {args.batch} is not divisible by {world} ranks x --accum {args.accum}")
    pass_size = args.batch // (world * args.accum)  # images of one rank in one pass
    # Data, on the GPU if they take less than a third of it.
    images, labels, classes = load_data(args, "train")
    check_data(args, images, classes)
    args.classes, args.train_images = classes, len(images)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 3:
        images, labels = images.to(device), labels.to(device)
    per_epoch = len(images) // args.batch  # steps
    total = args.epochs * per_epoch
    end = total if args.max_steps is None else min(total, args.max_steps)
    # What is trained.
    objective, average, optimizer = build_training(args, device)
    net, diffusion = objective.net, objective.diffusion
    contrastive = args.cl > 0
    precision = choose_precision(args.amp, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=precision != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = {"objective": objective, "average": average, "optimizer": optimizer, "scaler": scaler}
    step = load_run(args.out, parts) if args.resume else 0
    if step > end:
        fail(f"{args.out} is at step {step}, past the end {end}: give more --epochs or --max-steps")
    if args.compile or (args.compile is None and device.type == "cuda"):
        compile_networks(net, average.net)
    trained = DistributedDataParallel(objective, gradient_as_bucket_view=True) if world > 1 else objective
    if rank == 0:
        print(f"{type(net).__name__}, {sum(p.numel() for p in net.parameters()):,} parameters, {device}, {precision}, "
              f"batch {args.batch} = {world} ranks x {args.accum} passes x {pass_size} images, feature {args.layer}")
        if args.resume:
            lr_now = learning_rate(args, step, per_epoch, total)
            lr_end = learning_rate(args, max(step, end - 1), per_epoch, total)
            print(f"going on from step {step} to {end}, learning rate {lr_now:.2g} now, {lr_end:.2g} at the end")
        log = Log(args, step, end, {"ranks": world, "device": str(device), "precision": precision})
        if end == 0:  # --max-steps 0
            save_run(args, parts, epoch=0, step=0, keep=False)
    next_save = time.time() + 60  # the first after a minute
    generator = torch.Generator(device)
    signals = catch_stop_signals(rank)
    stop = False
    while step < end and not stop:
        # 1. Random numbers. They follow from (seed, step), so a resumed run repeats them. Each rank draws them for the
        #    whole batch and uses its own rows, so that they do not depend on the number of ranks.
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(args.seed, epoch, len(images), images.device)
        batch = order[position * args.batch : (position + 1) * args.batch]  # indices of images
        generator.manual_seed(stream_seed(args.seed, DRAWS, step))
        torch.manual_seed(stream_seed(args.seed, DROPOUT, step, rank))  # for dropout, in UNets
        draws1 = draw_numbers(args.batch, net.shape, diffusion, generator)
        draws2 = draw_numbers(args.batch, net.shape, diffusion, generator) if contrastive else None

        # 2. Both losses: the teacher's key of the second view, and one pass of the network on the first.
        logged = {}
        for micro in range(args.accum):
            first = (micro * world + rank) * pass_size  # 2 ranks, --accum 2: rank 0 has quarters 0 and 2
            rows = slice(first, first + pass_size)
            x, y = images[batch[rows]], labels[batch[rows]]
            if images.device.type != device.type:  # pinned, so that the copies do not wait
                x = x.pin_memory().to(device, non_blocking=True)
                y = y.pin_memory().to(device, non_blocking=True)
            view1 = make_view(x, y, draws1, rows, args)
            view2 = make_view(x, y, draws2, rows, args) if contrastive else None
            # Ranks exchange gradients in the last pass only, by the attribute that DDP's no_sync sets.
            trained.require_backward_grad_sync = micro == args.accum - 1
            with autocast:
                key = teacher_key(average, view2, level=args.cl_t) if contrastive else None
                loss, losses = trained(**view1, key=key)
            scaler.scale(loss / args.accum).backward()
            for name, value in losses.items():
                logged[name] = logged.get(name, 0) + value.detach() / args.accum

        # 3. Update the weights, then their average. In fp16, a step whose gradients overflow is skipped.
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)  # [DDAE]
        if precision != "fp16":  # where it may be infinite
            logged["grad_norm"] = grad_norm
        lr = learning_rate(args, step, per_epoch, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        update_average = get_ema_multi_avg_fn(ema_decay(args, step))
        update_average(list(average.parameters()), list(objective.parameters()), None)  # None: unused

        # 4. Log and save. At every tenth step ranks agree on a stop, and losses are read from the GPU. A single process
        #    stops after its step.
        epochs_done = step // per_epoch
        is_last = step == end
        keep = step == total or (step % per_epoch == 0 and epochs_done % args.save_every == 0)
        if step % LOG_EVERY == 0 or keep or is_last or (world == 1 and signals):
            stop = mean_over_ranks(torch.tensor(float(len(signals)), device=device)).item() > 0
            logged = {name: mean_over_ranks(value).item() for name, value in logged.items()}
            if not all(math.isfinite(value) for value in logged.values()):
                fail(f"training diverged at step {step}: lower --lr; last.pt, if any, is from before", status=1)
            if rank == 0:
                if step % LOG_EVERY == 0:
                    log.write(step, {"epoch": epochs_done, "lr": lr, **logged})
                if keep or stop or is_last or time.time() > next_save:
                    save_run(args, parts, epochs_done, step, keep)
                    next_save = time.time() + 900
                if keep or is_last:
                    grid_name = f"{epochs_done:04d}" if step % per_epoch == 0 else "last"
                    save_grid(args, average.net, diffusion, device, grid_name)
    if world > 1:
        del trained  # before its group, or it may hang: pytorch #56297
        dist.destroy_process_group()
    if rank == 0:
        log.bar.update(step - log.bar.n)
        log.bar.close()
        hint = "add --resume" if stop else f"python probe.py {args.out}"
        print(f"{args.out}/last.pt, step {step}; next: {hint}")
    if stop:
        raise SystemExit(128 + max(signals, default=signal.SIGTERM))  # as a shell reports it

if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:  # a full disk, no permission
        fail(error)
    except KeyboardInterrupt:
        fail("stopped at once; what had been saved is kept", status=130)
