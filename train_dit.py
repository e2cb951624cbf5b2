"""Train a DiT that generates and represents: DDAE++ on VA-VAE latents or on pixels, in one file.

[P]    DDAE++, arXiv:2505.10999            self-conditioning, contrastive self-distillation
[DiT]  Peebles and Xie 2022, arXiv:2212.09748   [RoPE] Su et al. 2021, arXiv:2104.09864
[LDiT] Yao et al. 2025, LightningDiT and VA-VAE, arXiv:2501.01423   [KL] Rombach et al. 2021, arXiv:2112.10752
[RF]   Liu et al. 2022, arXiv:2209.03003   [SD3]  Esser et al. 2024, arXiv:2403.03206
[CFG]  Ho and Salimans 2022, arXiv:2207.12598   [Int] Kynkaanniemi et al. 2024, arXiv:2404.07724
[MoCo] Chen et al. 2021, MoCo v3, arXiv:2104.02057

    python train_dit.py --dataset shapes --size tiny --cond --self-cond                   # on pixels, on a laptop
    torchrun --nproc_per_node=8 train_dit.py --dataset imagenet100 --data ROOT --vae vavae.pt --cache-latents LATENTS \\
        --size B --self-cond                                                              # caches first, then trains

Then sample.py, probe.py and fid.py read runs/NAME. The README lists every run of the paper and what we measured.

x0 clean latent, normalised per channel, or image   x_t noisy x0   eps unit noise   v velocity   t time: 0 data, 1 noise
e global embedding, e_t its time part   feat pooled tokens of --layer   q, k contrastive query and key   y class label
B batch   C, H, W latent or image   N tokens   D width   net is trained; ema is its average: sampled, probed, teacher
"""

# ---- 1. Imports, constants --------------------------------------------------------------------------
import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

SIZES = {  # as [DiT] Tab. 1. UNSPECIFIED: tiny is ours, for a CPU
    "tiny": {"width": 64, "depth": 6, "heads": 4},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
RESOLUTIONS = {"shapes": 16, "cifar10": 32, "cifar100": 32}  # anything else: 64, latents 256
CLASSES = {"shapes": 10, "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}
ADDED = ("self_cond.",)  # what [P] adds to the network: public weights lack it
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # of the VA-VAE's public file; the rest trained it
FREE = {  # flags that may change when a run is resumed
    "data", "device", "compile", "resume", "epochs", "max_steps", "save_every", "sample_every", "log_every",
    "data_device", "out", "bench", "init", "amp", "warmup", "vae", "cache_latents", "latents",
}
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SHAPES = ("bar", "crescent", "cross", "disc", "ell", "frame", "plus", "ring", "square", "triangle")
PEAK_TFLOPS = {  # dense bf16 tensor-core rate by vendor data sheet, for --bench
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71, "RTX 3080 Ti": 68,
}


# ---- 2. Backbone ------------------------------------------------------------------------------------
class DiTTime(nn.Module):
    """Sinusoid of 256 numbers, cosines first, through a two-layer MLP: time (B,) in [0, 1] -> (B, D) float32."""

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
    column, row = line.repeat(side, 1), line.repeat_interleave(side, 0)  # (side^2, width / 2); tokens run row by row
    return torch.cat([column, row], dim=1)[None].float()


class Rotary(nn.Module):
    """Tables of the rotary embedding, (N, head width): the first half of a head turns with the row, then the column."""

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
    """Multi-head self-attention with rotary positions, and with --qk-norm RMSNorm of queries and keys."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, 1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x, rotary):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        q, k = (rotary(norm(z.float())).to(v.dtype) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """w3(SiLU(a) * b), with a and b from one layer; hidden width 8/3 of D."""

    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class DiTBlock(nn.Module):
    """x + gate * f(norm(x) (1 + scale) + shift), f attention, then SwiGLU; the six vectors come from e. [DiT] Fig. 3"""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.attn, self.mlp = DiTAttention(width, heads, qk_norm), SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, e, rotary):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(e)[:, None].chunk(6, dim=2)  # (B, 1, D)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiTOutput(nn.Module):
    """Modulated norm and a linear map to the patch: (B, N, D) -> (B, N, patch^2 C)."""

    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, 1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, e):
        shift, scale = self.adaLN_modulation(e)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """LightningDiT with self-conditioning after one block. [LDiT], [P]

    Args:
        channels, side: of the latent or image. patch: side of a patch.
        width, depth, heads: sizes. qk_norm: normalise queries and keys.
        classes: 0 for unconditional, else their number; y = classes is the null class.
        layer: block "1".."depth" whose pooled output is the feature; None takes the last.
        self_cond: None, "adaptive" or "add".
    Raises:
        ValueError: for a layer or patch that this network cannot have.
    """

    def __init__(self, channels, side, patch, width, depth, heads, qk_norm=False, classes=0, layer=None,
                 self_cond=None):
        super().__init__()
        if side % patch:
            raise ValueError(f"patches of {patch} do not divide {side} pixels")
        self.shape, self.classes, self.patch = (channels, side, side), classes, patch
        self.feat_dim = self.emb_dim = width
        self.layers = [str(i + 1) for i in range(depth)]
        self.layer = layer or self.layers[-1]
        if self.layer not in self.layers:
            raise ValueError(f"unknown layer {self.layer!r}; this network has {', '.join(self.layers)}")
        if self_cond and self.layer == self.layers[-1]:
            raise ValueError(f"self-conditioning after {self.layer} leaves no decoder: take an earlier layer")
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, patch, stride=patch)))
        self.t_embedder = DiTTime(width)
        self.y_embedder = None
        if classes:
            self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(classes + 1, width)))
        self.pos_embed = nn.Parameter(grid_positions(width, side // patch), requires_grad=False)
        self.feat_rope = Rotary(width // heads, side // patch)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, qk_norm) for _ in range(depth))
        self.final_layer = DiTOutput(width, patch**2 * channels)
        self.self_cond = SelfConditioning(width, 2 * width // 3, width, self_cond) if self_cond else None
        self.init_weights()

    def init_weights(self):
        """UNSPECIFIED, as [DiT]: uniform of variance 1 / fan_avg, embeddings normal of std 0.02, the rest zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        embeddings = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]] + list(self.y_embedder or ())
        for module in embeddings:
            nn.init.normal_(module.weight, std=0.02)
        silent = [block.adaLN_modulation[1] for block in self.blocks]  # every block starts as the identity
        for module in [*silent, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(module.weight)
        if self.self_cond:
            self.self_cond.init_weights()

    def tokens(self, x):
        """Patches row by row, with their fixed positions: (B, C, H, W) -> (B, N, D)."""
        return self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, x, t, y=None, aug=None, feat=None, tap=None):
        """One raw evaluation.

        Args:
            x: (B, C, H, W). t: (B,), [LDiT]'s time, 0 noise and 1 data.
            y: class labels (B,), None is the null class everywhere; must be None for unconditional networks.
            aug: must be None, latents cannot be warped.
            feat: None, "too" or "only" (stop at the feature layer: the teacher's pass).
            tap: called as tap(name, h) with the output (B, N, D) of every block.
        Returns:
            the prediction (B, C, H, W); with "too" also (feat, e_t), with "only" just (feat, e_t):
            pooled feature (B, D) in float32 and time embedding (B, D).
        Raises:
            ValueError: if x is not (B, *self.shape), aug is given, or y is given to an unconditional network.
        """
        if x.shape[1:] != self.shape or aug is not None or (y is not None and not self.classes):
            raise ValueError(f"x must be (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}; aug must be "
                             "None, and y in an unconditional network")
        e = e_t = self.t_embedder(t)  # (B, D)
        if self.classes:
            y = torch.full_like(t, self.classes, dtype=torch.long) if y is None else y
            e = e + self.y_embedder(y)
        h = self.tokens(x)
        for name, block in zip(self.layers, self.blocks, strict=True):
            h = block(h, e, self.feat_rope)
            if tap is not None:
                tap(name, h)
            if name == self.layer:  # the encoder ends here, the decoder begins
                pooled = h.float().mean(dim=1)  # (B, D)
                if feat == "only":
                    return pooled, e_t
                if self.self_cond is not None:
                    e = self.self_cond(e, e_t, pooled)  # [P]: self-conditioning
        (C, H, _), p = self.shape, self.patch
        h = self.final_layer(h, e).view(-1, H // p, H // p, p, p, C)  # channel fastest
        out = h.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.shape)  # (B, C, H, W)
        return (out, (pooled, e_t)) if feat == "too" else out

    def features(self, x, t, y=None, pool="gap"):
        """Pooled outputs of all blocks, {name: (B, D) float32} in depth order, from one forward pass.

        Args:
            x, t, y: as in forward. pool: "gap" (mean over tokens) or "token" (one random token per image).
        Raises:
            ValueError: for pool="cls", which a DiT does not have.
        """
        if pool not in ("gap", "token"):
            raise ValueError(f"a DiT has no [CLS] token: use --pool gap or --pool token, not {pool}")
        out = {}

        def tap(name, h):
            where = torch.randint(h.shape[1], (len(h),), device=h.device) if pool == "token" else None
            out[name] = h.float().mean(1) if where is None else h[torch.arange(len(h), device=h.device), where].float()

        self.forward(x, t, y, tap=tap)
        return out


class VAEResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, + x."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, 1e-6), nn.GroupNorm(32, c_out, 1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


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
    """Residual blocks of one resolution, each followed by attention where asked; then a convolution that resamples."""

    def __init__(self, c_in, c_out, blocks, attention, resample=None):
        super().__init__()
        self.block = nn.ModuleList(VAEResBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(VAEAttention(c_out) for _ in range(blocks if attention else 0))
        if resample == "down":
            self.downsample = nn.Sequential(OrderedDict(conv=nn.Conv2d(c_out, c_out, 3, stride=2)))
        if resample == "up":
            self.upsample = nn.Sequential(OrderedDict(conv=nn.Conv2d(c_out, c_out, 3, padding=1)))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        if hasattr(self, "downsample"):
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom
        if hasattr(self, "upsample"):
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class VAEMiddle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (VAEResBlock(channels, channels), VAEAttention(channels),
                                                   VAEResBlock(channels, channels))

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class VAEEncoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> (B, 2 z, H/16, W/16)."""

    def __init__(self, widths, z):
        super().__init__()
        last, pairs = len(widths) - 1, zip([widths[0], *widths[:-1]], widths, strict=True)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(VAEStage(c_in, c_out, 2, i == last, "down" if i < last else None)
                                  for i, (c_in, c_out) in enumerate(pairs))
        self.mid = VAEMiddle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VAEDecoder(nn.Module):
    """Latent (B, z, h, w) -> image (B, 3, 16 h, 16 w), nominally in [-1, 1]. Stages are numbered by resolution."""

    def __init__(self, widths, z):
        super().__init__()
        last, pairs = len(widths) - 1, zip([*widths[1:], widths[-1]], widths, strict=True)
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = VAEMiddle(widths[-1])
        self.up = nn.ModuleList(VAEStage(c_in, c_out, 3, i == last, "up" if i else None)
                                for i, (c_in, c_out) in enumerate(pairs))
        self.norm_out = nn.GroupNorm(32, widths[0], 1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for stage in reversed(self.up):
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The VA-VAE: a KL autoencoder, 16 x 16 pixels to one of z channels. [KL], [LDiT]

    Args:
        width: base channels, 128 in the public file. z: latent channels, 32 there.
    """

    def __init__(self, width=128, z=32):
        super().__init__()
        widths = [width * m for m in (1, 1, 2, 2, 4)]
        self.encoder, self.decoder = VAEEncoder(widths, z), VAEDecoder(widths, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, x):
        """Image (B, 3, H, W) in [-1, 1] -> mean and std of the posterior, each (B, z, H/16, W/16)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def decode(self, z):
        """Latent, not normalised, (B, z, h, w) -> image (B, 3, 16 h, 16 w), nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


# ---- 3. Self-conditioning: the paper's idea ---------------------------------------------------------
class SelfConditioning(nn.Module):
    """Condense the pooled feature and feed it back to the decoder. [P]

    adaptive: e' = e + s(SiLU(e_t)) * MLP(feat), s linear;   add (ablation): e' = e + MLP(feat).
    """

    def __init__(self, feat_dim, hidden, emb_dim, kind):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(feat_dim, hidden), nn.SiLU(), nn.Linear(hidden, emb_dim))
        self.scale = nn.Linear(emb_dim, emb_dim) if kind == "adaptive" else None

    def init_weights(self):
        """UNSPECIFIED: the MLP ends in zeros, so that training starts at the baseline; s starts around 1."""
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)
        if self.scale is not None:
            nn.init.ones_(self.scale.bias)

    def forward(self, e, e_t, feat):
        """e, e_t: (B, E); feat: (B, D) -> e' (B, E)."""
        f = self.mlp(feat)
        return e + f if self.scale is None else e + self.scale(F.silu(e_t)) * f


# ---- 4. Diffusion formulation -----------------------------------------------------------------------
def per_image(level, x):
    """A number or (B,) noise level -> (B, 1, 1, 1) on x's device, to multiply images x (B, C, H, W) with."""
    level = torch.as_tensor(level, device=x.device)
    level = level.expand(len(x)) if level.ndim == 0 else level
    if level.shape != x.shape[:1]:
        raise ValueError(f"the noise level must be a number or have shape ({len(x)},), got {tuple(level.shape)}")
    return level.view(-1, 1, 1, 1)


class Formulation(nn.Module):
    """What DDPM, EDM and RF share: levels in the paper's own unit, and reading features at one."""

    def check_level(self, level):
        """Raise ValueError if a noise level given by the user is outside of self.range."""
        low, high = self.range
        if not low <= level <= high:
            raise ValueError(f"noise level {level:g} is out of range: {type(self).__name__} has {low:g} to {high:g}")
        if isinstance(low, int) and level != int(level):
            raise ValueError(f"noise level {level:g}: {type(self).__name__} has whole steps {low} to {high}")

    def features(self, net, x0, level, noise, y=None, pool="gap"):
        """Features of every layer of x0 noised at `level` (a number or (B,)): {name: (B, D) float32}. [P]"""
        return net.features(*self.inputs(x0, level, noise), y, pool)


class LatentRF(Formulation):
    """Rectified flow of latents, t from 0 (data) to 1 (noise), velocity prediction. [P] Tab. 9, [RF] Eq. 1

    The network runs on [LDiT]'s clock, so that its public weights fit: it is given 1 - t and returns -v = x0 - eps.
    """

    symbol, range = "t", (0.0, 1.0)
    levels = (0.06, 0.15, 0.25, 0.35, 0.5)

    def __init__(self, cos_loss=True):
        super().__init__()
        self.cos_loss = cos_loss

    def draw_level(self, n, generator):
        """Training times, (n,): sigmoid of a standard normal, "lognorm". [SD3]"""
        return torch.randn(n, generator=generator, device=generator.device).sigmoid()

    def add_noise(self, x0, level, noise):
        """x_t = (1 - t) x0 + t eps; x0, noise (B, C, H, W)."""
        t = per_image(level, x0)
        return (1 - t) * x0 + t * noise

    def inputs(self, x0, level, noise):
        """Noise x0 for the network: (B, C, H, W), and the network's time 1 - t, (B,)."""
        return self.add_noise(x0, level, noise), 1 - per_image(level, x0).flatten().float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Mean squared error on v = eps - x0, plus 1 - cos(v_hat, v) along channels, averaged over positions. [LDiT]

        Returns the scalar loss and the network's (feat, e_t).
        """
        out, feat = net(*self.inputs(x0, level, noise), y, aug, feat="too")
        v, v_hat = noise - x0, -out.float()
        loss = F.mse_loss(v_hat, v)
        if self.cos_loss:
            loss = loss + (1 - F.cosine_similarity(v_hat, v, dim=1)).mean()
        return loss, feat

    def velocity(self, net, x, t, y=None, cfg=1.0, interval=(0.0, 1.0)):
        """v_hat (B, C, H, W) at time t, a number; guided on all channels inside the interval: [CFG], [Int].

        DEVIATION: [DiT]'s code guides the first three channels only; [P] guides all, and so do we.
        """
        clock = torch.full((len(x),), 1 - t, device=x.device)
        v = -net(x, clock, y).float()
        if y is not None and cfg != 1 and interval[0] <= t <= interval[1]:  # elsewhere one evaluation does
            v_null = -net(x, clock).float()
            v = v_null + cfg * (v - v_null)
        return v

    def times(self, steps, shift):
        """Grid of the sampler, 1 down to 0, steps + 1 numbers: t' = shift t / (1 + (shift - 1) t). [SD3]"""
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return (shift * t / (1 + (shift - 1) * t)).tolist()

    def sample(self, net, noise, steps=250, y=None, cfg=1.5, cfg_interval=(0.0, 0.89), shift=3.3):
        """Euler from t = 1 to 0, more steps near noise. noise (B, C, H, W) -> x0, not clipped. [P] Tab. 9

        Args:
            y: labels (B,) or None. cfg: guidance weight where y is given, 1 is off. cfg_interval: of t, where it acts.
            shift: of the time grid, 1 is off. steps: network evaluations ([LDiT] counts grid points: one more).
        """
        x, times = noise, self.times(steps, shift)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = x + (t_next - t) * self.velocity(net, x, t, y, cfg, cfg_interval)
        return x


# ---- 5. Data, augmentation: flips, and a cache of latents -------------------------------------------
def draw_shapes(n, seed):
    """Ten classes of shapes on 16x16 pixels with random place, size, slight rotation and colours.

    Returns:
        images uint8 (n, 3, 16, 16) and labels int64 (n,) in 0..9, class names SHAPES; equal for equal arguments.
    """
    rng = np.random.RandomState(seed)  # its stream is frozen, so everybody gets the same set
    labels = rng.permutation(n) % len(SHAPES)
    angle, radius = rng.uniform(-0.25, 0.25, n), rng.uniform(4.5, 7, n)
    x, y = (8 + rng.uniform(-1, 1, n) * (8.5 - radius) for _ in range(2))  # centres; a few shapes leave the frame
    back = rng.uniform(0, 0.5, (n, 3, 1, 1))
    front = back + rng.uniform(0.25, 0.5, (n, 3, 1, 1))
    dark = rng.uniform(0, 1, n) < 0.4  # these are dark on bright
    back[dark], front[dark] = front[dark], back[dark]
    inside = {  # in the shape's own coordinates u, v in units of its radius; p, q are u, v turned by 45 degrees
        "bar": lambda u, v, p, q: (abs(u) < 1) & (abs(v) < 0.35),
        "crescent": lambda u, v, p, q: (np.hypot(u, v) < 1) & (np.hypot(u - 0.45, v) > 0.75),
        "cross": lambda u, v, p, q: (np.minimum(abs(p), abs(q)) < 0.27) & (np.maximum(abs(p), abs(q)) < 1),
        "disc": lambda u, v, p, q: np.hypot(u, v) < 0.9,
        "ell": lambda u, v, p, q: (np.maximum(abs(u), abs(v)) < 0.85) & ((u < -0.3) | (v > 0.3)),
        "frame": lambda u, v, p, q: abs(np.maximum(abs(u), abs(v)) - 0.65) < 0.2,
        "plus": lambda u, v, p, q: (np.minimum(abs(u), abs(v)) < 0.27) & (np.maximum(abs(u), abs(v)) < 1),
        "ring": lambda u, v, p, q: abs(np.hypot(u, v) - 0.775) < 0.225,
        "square": lambda u, v, p, q: np.maximum(abs(u), abs(v)) < 0.8,
        "triangle": lambda u, v, p, q: (v < 0.75) & (v > 2 * abs(u) - 1),
    }
    images = np.empty((n, 3, 16, 16), np.uint8)
    grid = (np.arange(48) + 0.5) / 3  # 3 x 3 samples a pixel
    for k, name in enumerate(SHAPES):
        i = np.flatnonzero(labels == k)
        dx, dy = grid[None, None] - x[i, None, None], grid[None, :, None] - y[i, None, None]
        cos, sin, scale = (a[:, None, None] for a in (np.cos(angle[i]), np.sin(angle[i]), radius[i]))
        u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale  # (n_k, 48, 48)
        mask = inside[name](u, v, (u + v) / 2**0.5, (u - v) / 2**0.5)
        cover = mask.reshape(-1, 16, 3, 16, 3).mean((2, 4))[:, None]  # (n_k, 1, 16, 16), share of a pixel
        images[i] = np.round(255 * (back[i] + (front[i] - back[i]) * cover))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def load_image(path, resolution):
    """Read, box-halve, resize bicubically and center-crop, as in ADM: uint8 (3, resolution, resolution)."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that Pillow reads: replace it or take it out") from error
    while min(image.size) >= 2 * resolution:
        image = image.reduce(2)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image).transpose(2, 0, 1)


def list_folder(root, split):
    """Class folders, or tiny-imagenet's own layout: (files, class index of each, class names)."""
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    notes = root / "val" / "val_annotations.txt"  # tiny-imagenet, whose test/ holds no labels
    splits = (split,) if split == "train" else ("val",) if notes.is_file() else ("test", "val")
    folder = next((root / s for s in splits if (root / s).is_dir()), None)
    if folder is None:
        fail(f"{root} has no test/ or val/ folder beside train/: add one with the same class folders")
    if folder == notes.parent and notes.is_file():
        rows = [line.split("\t")[:2] for line in notes.read_text().splitlines()]
        pairs = [(folder / "images" / name, wnid) for name, wnid in rows]
    else:
        pairs = []
        for name in sorted(p.name for p in folder.iterdir() if p.is_dir()):
            files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not files:
                fail(f"{folder / name} holds no images: fill the class folder or remove it")
            pairs += [(file, name) for file in files]
    index = {name: i for i, name in enumerate(classes)}
    for file, name in pairs:
        if name not in index:
            fail(f"{file}: class {name!r} is not among the class folders of {root / 'train'}")
    if not pairs:
        fail(f"{folder} holds no class folders with images: expected {folder}/<class>/*.png")
    return [file for file, _ in pairs], [index[name] for _, name in pairs], classes


def read_folder(root, split, resolution):
    """Images of a class folder, decoded once and cached as one array beside the data."""
    files, labels, classes = list_folder(root, split)
    seen = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    stamp = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    cache = root / ".cache" / f"{split}_{resolution}_{stamp}.npy"
    if cache.is_file():
        return map_array(cache), torch.tensor(labels), classes
    tmp = cache.with_suffix(f".{os.environ.get('RANK', 0)}.{os.getpid()}.tmp")
    shape = (len(files), 3, resolution, resolution)
    try:
        cache.parent.mkdir(exist_ok=True)
        images = np.lib.format.open_memmap(tmp, "w+", np.uint8, shape)
    except OSError as error:
        print(f"note: {cache} cannot be written ({error}): the images are decoded again next time", file=sys.stderr)
        tmp, images = None, np.empty(shape, np.uint8)
    try:
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(lambda file: load_image(file, resolution), files)
            bar = tqdm(decoded, f"reading {root.name}/{split}", len(files), unit="img", mininterval=1)
            for i, image in enumerate(bar):
                images[i] = image
    except ValueError as error:
        bar.close()
        if tmp is not None:
            tmp.unlink()
        fail(error)
    if tmp is None:
        return torch.from_numpy(images), torch.tensor(labels), classes
    images.flush()
    os.replace(tmp, cache)
    return map_array(cache), torch.tensor(labels), classes


def map_array(path):
    """An .npy file as a tensor that reads from disk what is indexed; processes share it. It must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the latter
        return torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False))


def data_root(args):
    """The folder that holds the data set's train/<class>/*, or None."""
    roots = [Path(args.data) / args.dataset]
    roots += [Path(args.data) / "tiny-imagenet-200"] * (args.dataset == "tiny-imagenet")
    return next((root for root in roots if (root / "train").is_dir()), None)


def read_data(args, split):
    """What load_data returns, and the class names: the one rule of --dataset and --data."""
    name, root, folders = args.dataset, data_root(args), f"{args.data}/{args.dataset}/train/<class>/"
    with rank_zero_first():
        if root is not None:
            images, labels, classes = read_folder(root, split, args.resolution)
        elif name == "shapes":
            images, labels = draw_shapes(*{"train": (10000, 0), "test": (2000, 1)}[split])
            classes = list(SHAPES)
        elif name in ("cifar10", "cifar100"):
            source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    stored = source(Path(args.data), train=split == "train", download=True)
            except (OSError, RuntimeError) as error:
                fail(f"{name} could not be downloaded ({error}); put its images into {folders} instead")
            images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
            labels, classes = torch.tensor(stored.targets), stored.classes
        else:
            fail(f"--dataset {name}: there is no folder {folders}, and only shapes, cifar10 and "
                 "cifar100 come without one; check --dataset and --data")
    if images.shape[1:] != (3, args.resolution, args.resolution):
        fail(f"--resolution {args.resolution}: {name} is built in at {images.shape[-1]} pixels; drop --resolution")
    return images, labels, classes


def to_x0(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x0):
    """x0 (B, 3, H, W), nominally in [-1, 1] -> uint8."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def file_hash(path):
    """sha256 of a file, 16 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def load_vae(path, device):
    """The VA-VAE of a public file (or of a state dict with the same names), frozen, in eval mode."""
    state = read_checkpoint(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {k: v for k, v in state.items() if k.startswith(PARTS)}
    try:
        vae = VAE(state["encoder.conv_in.weight"].shape[0], state["post_quant_conv.weight"].shape[0])
        vae.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        fail(f"--vae {path} is no VA-VAE, or lacks a tensor: {' '.join(str(error).split())[:120]}")
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


class Latents:
    """Cached latents (N, 2, C, h, w), each image's and its mirror's, float16 and not yet normalised.

    It stands for the tensor where data are held, indexed and moved. On the CPU it is memory-mapped: an index reads just
    its rows, at disk speed. `x0` makes of it what the network sees.
    """

    def __init__(self, raw, mean, std):
        self.raw, self.mean, self.std = raw, mean, std  # mean, std: (C,) float32
        self.shape, self.ndim, self.nbytes = raw.shape, raw.ndim, raw.nbytes
        self.device, self.is_cuda = raw.device, raw.is_cuda

    def __len__(self):
        return len(self.raw)

    def __getitem__(self, rows):
        return Latents(self.raw[rows], self.mean, self.std)

    def to(self, device, non_blocking=False):
        return Latents(*(part.to(device, non_blocking=non_blocking) for part in (self.raw, self.mean, self.std)))

    def pin_memory(self):
        return Latents(self.raw.pin_memory(), self.mean, self.std)

    def x0(self, flip):
        """Of every image (flip false) or its mirror image (flip true, (N,) bool), normalised: (N, C, h, w) float32."""
        z = torch.where(flip.view(-1, 1, 1, 1), self.raw[:, 1], self.raw[:, 0]).float()
        return (z - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def read_meta(args):
    """What DIR/meta.json of --cache-latents says of a finished cache, or None."""
    path = Path(args.cache_latents) / "meta.json"
    try:
        meta = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        meta = {}
    if meta is not None and not {"dataset", "resolution", "vae", "shape", "mean", "std"} <= meta.keys():
        fail(f"{path} is damaged: take another --cache-latents, or delete the folder")
    return meta


def read_stats(args):
    """What --latent-stats and --vae say, in the form of read_meta."""
    stats = read_checkpoint(args.latent_stats)
    if not isinstance(stats, dict) or not all(isinstance(stats.get(k), torch.Tensor) for k in ("mean", "std")):
        fail(f"--latent-stats {args.latent_stats} needs the tensors mean and std, one number per channel")
    if not Path(args.vae).is_file():
        fail(f"--vae {args.vae} does not exist")
    return {"vae": file_hash(args.vae)} | {k: stats[k].flatten().tolist() for k in ("mean", "std")}


def cache_split(args, split, vae, device):
    """Encode one split, both flips, into DIR/SPLIT.npy; a killed job goes on after the last whole block of 64 images.

    Rank r takes blocks r, r + world, .. of the one file. A block counts as done when its row of SPLIT.sums.npy, sum and
    sum of squares per channel, is no longer NaN: that is written after the block. SPLIT.npy gets its name at the end.
    Returns the file's shape, its statistics and what it was made from.
    """
    folder, root = Path(args.cache_latents), data_root(args)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    files, labels, classes = list_folder(root, split)
    z, side, size = vae.post_quant_conv.in_channels, args.resolution // 16, 64
    shape, blocks = (len(files), 2, z, side, side), math.ceil(len(files) / size)
    size_gb = 2 * math.prod(shape) / 1e9
    seen = [(str(f.relative_to(root)), f.stat().st_size) for f in files]
    made = {"dataset": args.dataset, "resolution": args.resolution, "vae": file_hash(args.vae),
            "files": hashlib.sha256(repr(seen).encode()).hexdigest()[:16], "seed": args.seed}
    done, part, sums = (folder / f"{split}{end}" for end in (".npy", ".part.npy", ".sums.npy"))
    with rank_zero_first():
        if not sums.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < 1e9 * size_gb:
                fail(f"--cache-latents {folder}: {size_gb:.1f} GB do not fit its disk; take another folder")
            (folder / f"{split}.json").write_text(json.dumps(made | {"classes": classes, "labels": labels}))
            np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
            np.lib.format.open_memmap(f"{sums}.tmp", "w+", np.float64, (blocks, 2, z))[:] = np.nan
            os.replace(f"{sums}.tmp", sums)
    try:
        old = json.loads((folder / f"{split}.json").read_text())
        other = [k for k in made if old[k] != made[k]]
        store = np.lib.format.open_memmap(part if part.is_file() else done, "r+")
        totals = np.lib.format.open_memmap(sums, "r+")
    except (OSError, ValueError, KeyError):
        fail(f"--cache-latents {folder} is damaged ({split}): take another folder, or delete it")
    if other:
        fail(f"--cache-latents {folder} was begun with another {' and '.join(other)}: take another folder")
    if store.shape != shape or totals.shape != (blocks, 2, z):
        fail(f"--cache-latents {folder}: {split} has shape {store.shape} instead of {shape}; take another folder")

    @torch.inference_mode()
    def encode(images, block):
        """uint8 (b, 3, H, W) -> posterior samples (b, 2, z, h, w); the noise depends on the seed and the block only."""
        x = to_x0(torch.from_numpy(images).to(device, memory_format=torch.channels_last))
        noise = torch.Generator().manual_seed(seeded(args.seed, 3, split == "train", block))
        flips = []
        for view in (x, x.flip(3)):
            pairs = [vae.encode(piece) for piece in view.split(8)]
            mean, std = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            flips.append(mean + std * torch.randn(mean.shape, generator=noise).to(device))
        return torch.stack(flips, dim=1)

    todo = [b for b in range(rank, blocks, world) if np.isnan(totals[b, 0, 0])]
    if todo:
        for _ in range(2):  # the first pass warms up
            start = time.time()
            encode(np.zeros((8, 3, args.resolution, args.resolution), np.uint8), 0)
        hours = (time.time() - start) / 8 * len(todo) * size / 3600
        if rank == 0:
            print(f"{split}: {len(files):,} images x 2 flips x {math.prod(shape[2:]):,} float16 = {size_gb:.3g} GB in "
                  f"{folder}; {len(todo)} of {blocks} blocks to do on this rank, about {hours:.2g} h", flush=True)
    with ThreadPoolExecutor() as pool:
        for b in tqdm(todo, f"encoding {split}", unit="block", disable=rank > 0):
            rows = slice(b * size, (b + 1) * size)
            try:
                images = np.stack(list(pool.map(lambda f: load_image(f, args.resolution), files[rows])))
            except ValueError as error:
                fail(error)
            latents = encode(images, b).to(torch.float16).cpu()
            if not latents.isfinite().all():
                fail(f"--vae {args.vae} gives infinity or NaN on {files[rows][0]} or one of the {size} after it")
            store[rows] = latents.numpy()
            store.flush()
            wide = latents.double().transpose(0, 2).flatten(1)  # (z, numbers)
            totals[b] = torch.stack([wide.sum(1), wide.square().sum(1)]).numpy()
            totals.flush()
    if world > 1:
        dist.barrier()
    mean, square = np.load(sums).sum(0) / (2 * len(files) * side**2)  # numbers per channel
    if rank == 0 and part.is_file():
        os.replace(part, done)
    return made | {"shape": shape, "mean": mean.tolist(), "std": np.sqrt(square - mean**2).tolist()}


def cache_latents(args, device):
    """Make, or finish, the cache of both splits; its meta.json, written last, says that it is whole."""
    if args.vae == "none":
        fail(f"--cache-latents {args.cache_latents} holds no finished cache: give --vae FILE to make it")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):  # ranks write into one file
        fail("--cache-latents: make the cache on one node, with --max-steps 0, before several train on it")
    root = data_root(args)
    if root is None:
        fail(f"--cache-latents encodes class folders, and there is no {args.data}/{args.dataset}/train/<class>/")
    for split in ("train", "test"):
        list_folder(root, split)  # what is missing is said now, not hours later
    vae = load_vae(args.vae, device)
    made = {split: cache_split(args, split, vae, device) for split in ("train", "test")}
    with rank_zero_first():
        path = Path(args.cache_latents) / "meta.json"
        if not path.is_file():
            Path(f"{path}.tmp").write_text(json.dumps(made["train"] | {"test": made["test"]}))
            os.replace(f"{path}.tmp", path)
    return read_meta(args)


def read_latents(args, split):
    """Latents, labels int64 (N,) and class names of a finished cache, which must be the run's own."""
    folder, meta = Path(args.cache_latents), read_meta(args)
    if meta is None:
        fail(f"{folder} holds no finished cache of latents: make it by training with --vae FILE, or name its folder")
    other = [k for k in ("dataset", "resolution") if meta[k] != getattr(args, k)]
    if other:
        fail(f"--cache-latents {folder} holds {', '.join(f'--{k} {meta[k]}' for k in other)}: give the same")
    stats = args.latents or meta  # a network needs those it was trained with
    if stats["vae"] != meta["vae"]:
        fail(f"{folder} holds latents of another VA-VAE than that of this run: name the folder of its own")
    try:
        about = json.loads((folder / f"{split}.json").read_text())
        latents = Latents(map_array(folder / f"{split}.npy"), torch.tensor(stats["mean"]), torch.tensor(stats["std"]))
    except (OSError, ValueError):
        fail(f"{folder} is damaged ({split}): take another --cache-latents, or delete the folder")
    return latents, torch.tensor(about["labels"]), about["classes"]


def load_data(args, split):
    """The images of a data set, or its cached latents.

    Args:
        args: needs dataset, data and resolution, or cache_latents. split: "train" or "test".
    Returns:
        images uint8 (N, 3, resolution, resolution), or Latents (N, 2, C, h, w); labels int64 (N,), on the CPU.
    Ends with exit status 2 and one line where the data are missing or damaged.
    """
    return (read_latents if args.cache_latents else read_data)(args, split)[:2]


def training_set(args, device):
    """Images or latents, labels and class names to train on. Noise where none are needed: for --bench, and where public
    weights with statistics of their own (--latent-stats) just become a checkpoint."""
    if args.bench or (args.latent_stats and args.max_steps == 0):
        shape = latent_shape(args)
        if args.cache_latents:
            raw = torch.randn(4 * args.batch, 2, *shape).half()
            images = Latents(raw, torch.zeros(shape[0]), torch.ones(shape[0]))
        else:
            images = torch.randint(256, (4 * args.batch, *shape)).byte()
        return images, torch.zeros(len(images), dtype=torch.long), []
    if not args.cache_latents:
        return read_data(args, "train")
    meta = read_meta(args) or cache_latents(args, device)
    args.latents = args.latents or meta
    if args.vae != "none" and (not Path(args.vae).is_file() or file_hash(args.vae) != meta["vae"]):
        fail(f"--vae {args.vae} is not the file that {args.cache_latents} was made with: give that one, or none")
    return read_latents(args, "train")


def decoder(args, device, vae=None):
    """The function that turns what the sampler returns into uint8 images; latents need the VA-VAE of --vae."""
    if not args.cache_latents and vae is not None:
        fail(f"--vae {vae}: the checkpoint works on pixels, drop it")
    if not args.cache_latents:
        return to_uint8
    path = vae or args.vae
    if path == "none":
        fail("this checkpoint works on latents: give --vae FILE to decode them")
    net = load_vae(path, device)
    if file_hash(path) != args.latents["vae"]:
        fail(f"--vae {path} is not the file that the latents were made with")
    mean, std = (torch.tensor(args.latents[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))

    def decode(x0):
        return torch.cat([to_uint8(net.decode(z * std + mean)) for z in x0.split(16)])  # pieces: pixels need room

    return decode


# ---- 6. MoCo-v3 head --------------------------------------------------------------------------------
class AllReduce(torch.autograd.Function):
    """Sum over ranks, in the backward pass too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad.contiguous())


def rank_mean(x):
    """Average of a tensor over ranks, differentiable."""
    return AllReduce.apply(x) / dist.get_world_size() if dist.is_initialized() else x


class BatchNorm(nn.Module):
    """BatchNorm by the statistics of the batch of all ranks (torch's SyncBatchNorm refuses CPU tensors).

    There are no running statistics: the head is used in training only, and MoCo's teacher takes the batch's too.
    """

    def __init__(self, dim, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):
        x = x.float()  # (B, D)
        x = x - rank_mean(x.mean(0))
        x = x * (rank_mean((x**2).mean(0)) + 1e-5).rsqrt()
        return x if self.weight is None else x * self.weight + self.bias


class Projector(nn.Module):
    """MoCo v3's MLP. With emb_dim, hidden layers are scaled and shifted by e_t: the time-dependent projector of [P].

    Args:
        dims: widths from input to output. emb_dim: width of e_t, 0 for the original head (--cl-head moco).
    """

    def __init__(self, dims, emb_dim=0):
        super().__init__()
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        self.linear = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairs)
        self.norm = nn.ModuleList(BatchNorm(o, affine=k < len(pairs) - 1) for k, (_, o) in enumerate(pairs))
        self.time = nn.ModuleList(nn.Linear(emb_dim, 2 * o) for _, o in pairs[:-1]) if emb_dim else None
        for layer in self.time or ():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, e_t):
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
    """Projector (3 layers, its EMA copy is the teacher's) and predictor (2 layers, online side only). [MoCo] Sec. 3

    UNSPECIFIED: widths of MoCo v3 for ViTs, 4096 hidden and 256 out.
    """

    def __init__(self, feat_dim, emb_dim, timed, hidden=4096):
        super().__init__()
        self.projector = Projector([feat_dim, hidden, hidden, 256], emb_dim if timed else 0)
        self.predictor = Projector([256, hidden, 256])

    def forward(self, feat, e_t):
        """feat (B, D), e_t (B, E) -> q (B, 256)."""
        return self.predictor(self.projector(feat, e_t), e_t)


def moco_loss(q, k, temperature=0.2):
    """InfoNCE of queries against the keys of all ranks, times 2 temperature. [MoCo] Alg. 1; one direction, [P].

    Args:
        q, k: (B, D) on each rank, normalised here; k carries no gradient. temperature: of the softmax.
    Returns:
        scalar loss of this rank's queries, and {"cl_acc", "cl_pos", "cl_std"}: share of queries whose own key is
        nearest, mean cosine of the positives, and std of the normalised queries times sqrt(D) (1 is uniform on the
        sphere, 0 a collapse).
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
    keys, rank = k, 0
    if dist.is_initialized():
        parts, rank = [torch.empty_like(k) for _ in range(dist.get_world_size())], dist.get_rank()
        dist.all_gather(parts, k.contiguous())
        keys = torch.cat(parts)  # (B world, D), in rank order
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ keys.T / temperature  # (B, B world)
    target = torch.arange(len(q), device=q.device) + rank * len(q)
    with torch.no_grad():
        stats = {
            "cl_acc": (logits.argmax(1) == target).float().mean(),
            "cl_pos": (q * k).sum(1).mean(),
            "cl_std": q.std(0).mean() * q.shape[1] ** 0.5,
        }
    return 2 * temperature * F.cross_entropy(logits, target), stats


# ---- 7. Run utilities -------------------------------------------------------------------------------
def fail(message):
    """Report the user's mistake: one line on stderr, exit status 2, as argparse does."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def setup_distributed(device):
    """Join torchrun's process group, or stay one process.

    Args:
        device: the --device flag: "auto", "cpu", "cuda" or "cuda:N".
    Returns:
        rank, world, torch.device. NCCL carries GPU tensors, gloo CPU tensors.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            fail(f"--device {device}: this torch sees no GPU; use --device cpu")
        if ":" in device and world > 1:
            fail(f"--device {device}: torchrun gives every rank a GPU of its own; use --device cuda")
        device = device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, torch.device(device)


def seeded(*numbers):
    """A well-mixed 64-bit seed from non-negative integers. (torch's CPU generator looks at the low 32 bits only.)"""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def rank_zero_first():
    """The first rank of each node goes through the body before the others: downloads and caches are written once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


@torch.no_grad()
def ema_update(ema, net, decay):
    """ema <- decay ema + (1 - decay) net, all parameters in a few kernels."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after the current step; one more, seconds later, kills. Ranks stop together.

    (A launcher and its scheduler may both pass on the first one, so what comes at once counts as one.)
    """

    def __init__(self):
        self.signum, self.since = 0, math.inf
        self.before = {s: signal.signal(s, self) for s in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self, signum, frame):
        if time.time() - self.since > 3:
            self.restore()
            signal.raise_signal(signum)
        self.signum, self.since = signum, min(self.since, time.time())

    def restore(self):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def agreed(self):
        """The signal that any rank received, or 0. A host-side all-reduce of one number: the GPU is not waited for."""
        if not dist.is_initialized():
            return self.signum
        flag = torch.tensor([self.signum])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def save_checkpoint(path, **state):
    """Write, then rename: a killed job never leaves half a file. Tensors and plain types only."""
    tmp = Path(f"{path}.tmp")
    torch.save(state, tmp)
    os.replace(tmp, path)


def read_checkpoint(path):
    """torch.load of tensors and plain types only: no code that a file may carry is run. Exit status 2 if it cannot."""
    if not Path(path).is_file():
        fail(f"{path} does not exist, or is no file: check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about foreign pickles is not for our users
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        fail(f"{path} cannot be read as a checkpoint (damaged, cut short, or not plain torch.save); use another")


def load_weights(net, path):
    """Start from a public checkpoint or one of ours (--init): official names, wrapper prefixes are dropped.

    What the paper adds (ADDED) may be missing in the file; anything else is an error.
    """
    state = read_checkpoint(path)
    state = state if isinstance(state, dict) else {}
    for key in ("ema", "EMA", "model", "MODEL", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    want = net.state_dict()
    anchor = max((name for name in want if not name.startswith(ADDED)), key=len)  # no other name ends like this
    prefix = next((k[: -len(anchor)] for k in state if k.endswith(anchor)), "")
    found = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    missing = [k for k in want if k not in found and not k.startswith(ADDED)]
    wrong = [k for k in want if k in found and getattr(found[k], "shape", None) != want[k].shape]
    extra = [k for k, v in found.items() if k not in want and isinstance(v, torch.Tensor)]
    if extra and not missing + wrong:
        fail(f"--init {path} holds {len(extra)} tensors that this network has no place for, first {extra[0]}: is a "
             "flag missing?")
    if missing or wrong:
        fail(f"--init {path} does not fit this network: {len(missing)} tensors missing, {len(wrong)} of other shapes, "
             f"first {(missing + wrong)[0]}")
    net.load_state_dict({k: found.get(k, want[k]) for k in want})


def check_out(args):
    """Refuse a folder that holds another configuration's run, or this one's without --resume."""
    free = FREE | ({"accum"} if args.cl == 0 else set())
    known, last = Path(args.out) / "args.json", Path(args.out) / "last.pt"
    if known.is_file() and last.is_file():
        old = json.loads(known.read_text())
        new = json.loads(json.dumps(vars(args)))
        other = [k for k in new if k not in free and old.get(k) != new[k]]
        other = [f"--{k.replace('_', '-')} {str(old.get(k))[:60]}" for k in other]
        if other:
            fail(f"--out {args.out} holds a run with {', '.join(other)}: choose another --out")
        if not args.resume:
            fail(f"--out {args.out} holds this run already: add --resume to go on with it, or choose another --out")
    if args.resume and not last.is_file():
        fail(f"--resume: there is no {last} to go on from; drop --resume to start")


class MetricsLog:
    """metrics.jsonl (first line: the run; then one line per --log-every steps) and the progress bar, on rank 0.

    Sums stay on the device between lines; ranks are averaged when a line is written.
    """

    def __init__(self, args, step, end, rank, header):
        self.path, self.rank = Path(args.out) / "metrics.jsonl", rank
        self.active = rank == 0 and not args.bench
        if self.active:
            old = self.path.read_text().splitlines()[1:] if step and self.path.is_file() else []
            old = [line for line in old if line.endswith("}")]  # a killed job may leave half a line
            kept = [json.dumps({"args": vars(args)} | header)] + [x for x in old if json.loads(x)["step"] <= step]
            self.path.write_text("\n".join(kept) + "\n")
        self.bar = tqdm(total=end, initial=step, unit="step", desc=Path(args.out).name, disable=rank > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 20)
        self.restart(step)

    def restart(self, step):
        """Start a new interval: saving and sampling do not count as training time."""
        self.sums, self.counts, self.start, self.step = {}, {}, time.time(), step

    def add(self, stats):
        """Add scalars, tensors on the device, to the interval; nothing is waited for."""
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def check(self, reduce=lambda values: values):
        """Means of the interval; stops the run, exit status 1, where one is not finite."""
        values = [(self.sums[name] / self.counts[name]).float() for name in self.sums]
        values = dict(zip(self.sums, reduce(torch.stack(values)).tolist(), strict=True)) if values else {}
        if not all(math.isfinite(v) for v in values.values()):
            self.bar.close()
            if self.rank == 0:
                print(f"error: training diverged before step {self.bar.n} ({values}): start again with a lower --lr, "
                      f"another --out and --init {self.path.parent}/last.pt, the last good one, if it exists",
                      file=sys.stderr)
            raise SystemExit(1)
        return values

    def write(self, step, epoch, lr, batch):
        """One line of metrics, averaged over steps and ranks, then a new interval."""
        values = self.check(rank_mean)
        speed = (step - self.step) * batch / max(1e-9, time.time() - self.start)
        if self.active:
            line = {"step": step, "epoch": epoch, "lr": lr, **values, "img_per_s": round(speed, 2)}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} img/s")
        self.restart(step)


def save_run(args, state, modules, optimizer, scaler):
    """last.pt: everything an exact resume needs. Random numbers follow from (seed, step), so none are stored."""
    parts = {name: module.state_dict() for name, module in modules.items()}
    parts |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    save_checkpoint(Path(args.out) / "last.pt", **state, **parts)


def load_run(args, modules, optimizer, scaler):
    """Restore what save_run wrote; returns the step to go on from."""
    path = Path(args.out) / "last.pt"
    state = read_checkpoint(path)
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16
            scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError):
        fail(f"--resume: {path} is of another configuration; start over in another --out")
    return state["step"]


@torch.no_grad()
def save_grid(args, ema, diffusion, device, epoch):
    """samples_NNNN.png: images of the EMA network from noise that is the same every time, 64 on a GPU, 16 on a CPU."""
    side = 8 if device.type == "cuda" else 4
    noise = torch.randn(side**2, *ema.shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    y = torch.arange(len(noise), device=device) % ema.classes if ema.classes else None
    x0 = diffusion.sample(ema.forward, noise, y=y)  # .forward: another batch size would compile again
    images = decoder(args, device)(x0)
    save_image(images / 255, Path(args.out) / f"samples_{epoch:04d}.png", nrow=side, padding=2, pad_value=1)


def peak_tflops(device):
    """Vendor's dense bf16 peak of this GPU in TFLOP/s, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def count_flops(run, n):
    """Floating-point operations per image of run(), a training step on n images: matrix products and convolutions."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / n


def synchronized_time(device):
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report_bench(args, seconds, flops, device, world):
    """Print the result of --bench, JSON on the last line."""
    speed, peak = args.bench * args.batch / seconds, peak_tflops(device)
    tflops = flops * speed / world / 1e12
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on Windows

        name, memory = "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    result = {
        "img_per_s": round(speed, 2), "ms_per_step": round(1000 * seconds / args.bench, 2),
        "gflop_per_img": round(flops / 1e9, 3), "tflops_per_device": round(tflops, 4),
        "share_of_peak": round(tflops / peak, 4) if peak else None, "peak_memory_gib": round(memory / 2**30, 3),
        "batch": args.batch, "ranks": world, "device": name, "torch": torch.__version__, "seed": args.seed,
    }
    print(json.dumps(result))


# ---- 8. Flags ---------------------------------------------------------------------------------------
def parse_args(argv=None):
    """Flags -> Namespace with every default resolved. Exits with status 2 on a wrong value."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=list(SIZES), default="B", help="0.5, 130, 457, 674 M parameters (default: B)")
    group.add_argument("--patch", type=int, help="(default: latents 1, pixels resolution / 16, at least 2)")
    group.add_argument("--self-cond", nargs="?", choices=["adaptive", "add"], const="adaptive",
                       help="self-conditioning after --layer (default: off; bare: adaptive; add is the ablation)")
    group.add_argument("--layer", help="block of the feature, 1, 2, .. (default: B 8, with more than 500 classes 9 and "
                       "with --cond 10, [P] Tab. 10; other sizes two thirds of the depth)")
    group.add_argument("--qk-norm", action="store_true",
                       help="RMSNorm of queries and keys: steadier in fp16 and in long runs")
    group.add_argument("--cond", nargs="?", type=int, const=-1, default=0, metavar="CLASSES",
                       help="class-conditional; bare: as many classes as the data set has (default: off)")
    group.add_argument("--label-drop", type=float, default=0.1, metavar="P",
                       help="share of training images whose label is the null class (default: 0.1, [P] Tab. 9)")
    group.add_argument("--cos-loss", action=argparse.BooleanOptionalAction, default=True,
                       help="add 1 - cos(v_hat, v) to the loss (default: on)")
    group = parser.add_argument_group("contrastive part (the two flips of an image are the two views)")
    group.add_argument("--cl", type=float, metavar="GAMMA", default=0.0,
                       help="weight of the MoCo v3 loss (default: 0, off; 0.01 in the paper, on pixels)")
    group.add_argument("--cl-head", choices=["time", "moco"], default="time",
                       help="time-dependent or original projector (default: time)")
    group.add_argument("--cl-hidden", type=int, metavar="N", help="hidden width of the head (default: 4096; tiny 512)")
    group.add_argument("--cl-t", type=float, metavar="LEVEL",
                       help="time of the teacher and default of probe.py --t (default: latents 0.25, [P] Tab. 10; "
                       "pixels 0.06)")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes",
                       help="shapes, cifar10, cifar100, tiny-imagenet or any folder below --data (default: shapes)")
    group.add_argument("--data", default="./data", metavar="ROOT",
                       help="ROOT/NAME/train/<class>/* is read if it exists (default: ./data)")
    group.add_argument("--vae", default="none", metavar="FILE", help="VA-VAE f16d32 (default: none)")
    group.add_argument("--cache-latents", metavar="DIR", help="train on the latents in DIR; where it is not complete, "
                       "encode the class folders of --dataset with --vae first (default: train on pixels)")
    group.add_argument("--latent-stats", metavar="FILE", help="channel mean and std of public weights, a torch file, "
                       "instead of the cache's own")
    group.add_argument("--resolution", type=int, help="(default: shapes 16, CIFAR 32, folders 64, latents 256)")
    group.add_argument("--data-device", choices=["auto", "cpu"],
                       help="where the data live (default: auto, the device; latents cpu, memory-mapped)")
    group = parser.add_argument_group("optimisation ([P] Tab. 9)")
    group.add_argument("--epochs", type=int, help="(default: latents 1400, with --cond 1000, of more than 500 "
                       "classes 90; pixels 2000; tiny 8)")
    group.add_argument("--batch", type=int, help="total over all ranks (default: 1024; tiny 16)")
    group.add_argument("--accum", type=int, default=1, help="accumulation steps; --batch stays the total (default: 1)")
    group.add_argument("--lr", type=float, help="of Adam, betas (0.9, 0.95) (default: 2e-4; tiny 2e-3)")
    group.add_argument("--warmup", type=float, help="epochs (default: 0; tiny a tenth of --epochs)")
    group.add_argument("--cooldown", type=float,
                       help="share of the run at its end in which lr falls to 0 (default: 0; tiny 0.3)")
    group.add_argument("--ema", type=float, help="EMA decay per step (default: 0.9999, tiny 0.999)")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                       help="(default: auto: bf16 on GPUs that have it, else fp16; off on a CPU)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on GPUs)")
    group.add_argument("--seed", type=int, default=0, help="of weights, order, noise and cache (default: 0)")
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="folder of the run (default: runs/<name from the flags>)")
    group.add_argument("--resume", action="store_true", help="go on from OUT/last.pt as if never stopped")
    group.add_argument("--init", metavar="FILE", help="start from these weights (official names)")
    group.add_argument("--save-every", type=int, default=200, help="epochs between epoch_NNNN.pt (default: 200)")
    group.add_argument("--sample-every", type=int, help="epochs between sample grids, 0 for none (default: 50; latents "
                       "without --vae 0)")
    group.add_argument("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl (default: 50)")
    group.add_argument("--max-steps", type=int, help="stop after this step, even within an epoch; with 0 and --init "
                       "public weights become a checkpoint for the tools")
    group.add_argument("--bench", type=int, metavar="N", help="time N steps, print JSON, write nothing")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)

    args.model = "rf"  # the one formulation of [P] on latents
    tiny, latents = args.size == "tiny", args.cache_latents is not None
    args.cache_latents = str(Path(args.cache_latents).resolve()) if latents else None  # the tools look there,
    args.vae = args.vae if args.vae == "none" else str(Path(args.vae).resolve())  # from wherever they are called
    if args.vae != "none" and not latents:
        parser.error("--vae goes with --cache-latents DIR: say where the latents are to be kept")
    if args.latent_stats and (not latents or args.vae == "none"):
        parser.error("--latent-stats goes with --vae FILE and --cache-latents DIR")
    args.latents = None  # hash of the VA-VAE, statistics of the channels
    if latents:
        args.latents = read_stats(args) if args.latent_stats else read_meta(args)
    resolution = args.resolution or (256 if latents else RESOLUTIONS.get(args.dataset, 64))
    root = Path(args.data) / args.dataset / "train"
    classes = CLASSES.get(args.dataset, 0)
    if root.is_dir():
        classes = sum(p.is_dir() for p in root.iterdir())
    elif latents and read_meta(args):
        classes = len(json.loads((Path(args.cache_latents) / "train.json").read_text())["classes"])
    if args.cond == -1:
        args.cond = classes or -1
    large, depth = max(classes, args.cond) > 500, SIZES[args.size]["depth"]
    block = (10 if args.cond else 9) if large else 8  # of 12, [P] Tab. 10
    epochs = 8 if tiny else 2000 if not latents else 90 if large else 1000 if args.cond else 1400
    given = [f"{name.replace('_', '-')}{getattr(args, name)}" for name in
             ("patch", "layer", "cl_t", "cl_hidden", "resolution", "epochs", "batch", "lr", "warmup", "cooldown", "ema")
             if getattr(args, name) is not None]  # to tell runs apart
    epochs = args.epochs if args.epochs is not None else epochs
    defaults = {
        "resolution": resolution, "patch": 1 if latents else max(2, resolution // 16),
        "layer": str(block if args.size == "B" else round(block * depth / 12)), "cl_t": 0.25 if latents else 0.06,
        "epochs": epochs, "batch": 16 if tiny else 1024, "lr": 2e-3 if tiny else 2e-4, "ema": 0.999 if tiny else 0.9999,
        "warmup": epochs / 10 if tiny else 0.0, "cooldown": 0.3 if tiny else 0.0, "cl_hidden": 512 if tiny else 4096,
        "data_device": "cpu" if latents else "auto", "sample_every": 0 if latents and args.vae == "none" else 50,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("resolution", "patch", "epochs", "batch", "accum", "save_every", "log_every", "bench", "lr",
                 "cl_hidden"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("cooldown", "ema", "label_drop"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be between 0 and 1")
    if min(args.cl, args.warmup, args.sample_every, args.seed, args.max_steps or 0) < 0:
        parser.error("--cl, --warmup, --sample-every, --seed and --max-steps must not be negative")
    if args.cond < 0:
        parser.error(f"--cond: {args.dataset} is not there to be counted; give the number of classes")
    if args.cond and args.label_drop == 0:
        parser.error("--label-drop 0: guidance and probing need the null class; take a little")
    if latents and args.resolution % 16:
        parser.error(f"--resolution {args.resolution}: the VA-VAE takes multiples of 16")
    try:
        with torch.device("meta"):
            build(args)[1].check_level(args.cl_t)
    except ValueError as error:
        parser.error(f"--patch, --layer or --cl-t: {error}")
    if args.out is None:
        parts = [args.dataset, "dit", args.size, latents and "latents", args.self_cond and f"sc-{args.self_cond}",
                 args.cond and "cond", args.label_drop != 0.1 and f"drop{args.label_drop:g}",
                 not args.cos_loss and "mse", args.qk_norm and "qknorm", args.cl and f"cl{args.cl:g}",
                 args.cl_head == "moco" and "moco", args.seed and f"seed{args.seed}", *given]
        args.out = "runs/" + "-".join(part for part in parts if part)
    return args


def latent_shape(args):
    """(C, h, w) of what the network works on."""
    if not args.cache_latents:
        return 3, args.resolution, args.resolution
    channels = len(args.latents["mean"]) if args.latents else 32  # of the public VA-VAE
    return channels, args.resolution // 16, args.resolution // 16


def build(args):
    """Untrained network and formulation, on the CPU: (DiT, LatentRF)."""
    net = DiT(*latent_shape(args)[:2], args.patch, **SIZES[args.size], qk_norm=args.qk_norm, classes=args.cond,
              layer=args.layer, self_cond=args.self_cond)
    return net, LatentRF(args.cos_loss)


# ---- 9. The loop ------------------------------------------------------------------------------------
def make_optimizer(objective, args):
    """Adam on everything that learns. [P] Tab. 9"""
    params = [p for p in objective.parameters() if p.requires_grad]
    return torch.optim.Adam(params, lr=args.lr, betas=(0.9, 0.95), fused=True)


class Objective(nn.Module):
    """Everything trainable in one module, called once per pass, so that DDP sees every gradient."""

    def __init__(self, net, diffusion, head, gamma):
        super().__init__()
        self.net, self.diffusion, self.head, self.gamma = net, diffusion, head, gamma

    def forward(self, view, key=None):
        """Total loss = L_diffusion + gamma L_moco of one view, and numbers worth logging."""
        loss, (feat, e_t) = self.diffusion.loss(self.net, **view)
        stats = {"loss_diffusion": loss.detach()}
        if key is not None:
            contrast, found = moco_loss(self.head(feat, e_t), key)
            stats |= {"loss_contrast": contrast.detach()} | found
            loss = loss + self.gamma * contrast
        return loss, stats | {"loss": loss.detach()}


@torch.no_grad()
def teacher_key(ema, projector, diffusion, view):
    """Key (B, 256) of the EMA network at its fixed level, from a second view; the pass stops at --layer. [P]"""
    x_t, t = diffusion.inputs(view["x0"], view["level"], view["noise"])
    return projector(*ema(x_t, t, aug=view["aug"], feat="only"))


def draw_views(n, shape, diffusion, args, generator):
    """The random numbers of a whole batch: of the denoiser's view and, with --cl, of the teacher's at its level t*.

    Every rank draws them all and keeps its rows, so that the result does not depend on how many ranks share a batch.
    UNSPECIFIED: [P] gives no two views of latents. Ours are the two flips, one for the denoiser, one for the teacher.
    """
    device = generator.device
    view = {
        "flip": torch.rand(n, generator=generator, device=device) < 0.5,
        "level": diffusion.draw_level(n, generator),
        "noise": torch.randn(n, *shape, generator=generator, device=device),
    }
    if args.cl == 0:
        return [view]
    noise = torch.randn(n, *shape, generator=generator, device=device)
    return [view, {"flip": ~view["flip"], "level": torch.full((n,), args.cl_t, device=device), "noise": noise}]


def make_view(images, draws):
    """uint8 (B, 3, H, W) or Latents, and their draws -> what diffusion.loss takes."""
    draws = dict(draws)
    flip = draws.pop("flip")
    if isinstance(images, Latents):  # the latent of the mirror image is not the latent's mirror image
        x0 = images.x0(flip)
    else:
        x0 = to_x0(images)
        x0 = torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)
    return {"x0": x0, "aug": None} | draws


def learning_rate(args, step, per_epoch, total):
    """Linear warm-up, constant, and with --cooldown a linear fall to 0 at the end ([P] Tab. 8 has none)."""
    warm = min(1.0, (step + 1) / max(1.0, args.warmup * per_epoch))
    return args.lr * max(0.0, min(warm, (total - step) / max(1.0, args.cooldown * total)))


def main(args):
    """Train. Writes last.pt, epoch_NNNN.pt, metrics.jsonl, args.json and samples_NNNN.png into args.out."""
    # 1. Where we run, and how the batch is cut.
    rank, world, device = setup_distributed(args.device)
    cuda = device.type == "cuda"
    if args.batch % (world * args.accum):
        fail(f"--batch {args.batch} is not divisible by ranks x accumulation = {world} x {args.accum}")
    local = args.batch // (world * args.accum)
    if not args.bench:
        check_out(args)
    if args.amp == "auto":  # bf16 in hardware, or else fp16
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "fp16" if cuda else "off"
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    autocast = torch.autocast(device.type, dtype=amp, enabled=amp is not None)

    # 2. Data: whole, on the device.
    images, labels, classes = training_set(args, device)
    if len(images) < args.batch:
        fail(f"--batch {args.batch} is more than the {len(images)} training images of {args.dataset}: take fewer")
    if args.data_device != "cpu":
        try:
            images, labels = images.to(device), labels.to(device)
        except torch.OutOfMemoryError:
            fail(f"{images.nbytes / 1e9:.1f} GB of data do not fit {device}: use --data-device cpu")
    per_epoch = len(images) // args.batch
    total = args.epochs * per_epoch

    # 3. Network, its average, the head, the optimiser.
    torch.manual_seed(args.seed)
    net, diffusion = build(args)
    if net.classes and not len(classes) <= net.classes:
        fail(f"--cond {net.classes}: {args.dataset} has {len(classes)} classes; give their number, or --cond alone")
    if args.init and not args.resume:
        load_weights(net, args.init)
    head = None
    if args.cl > 0:
        head = MoCoHead(net.feat_dim, net.emb_dim, args.cl_head == "time", args.cl_hidden)
    objective = Objective(net, diffusion, head, args.cl).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema_projector = copy.deepcopy(head.projector).requires_grad_(False) if head else None
    modules = {"model": net, "ema": ema, "diffusion": diffusion}
    modules |= {"head": head, "ema_projector": ema_projector} if head else {}
    optimizer = make_optimizer(objective, args)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    step = load_run(args, modules, optimizer, scaler) if args.resume and not args.bench else 0
    if rank == 0:
        added = sum(p.numel() for name, p in net.named_parameters() if name.startswith(ADDED))
        print(f"{args.model}, {type(net).__name__}: {sum(p.numel() for p in net.parameters()):,} parameters, of which "
              f"{added:,} of the paper's own; feature {args.layer} ({net.feat_dim} channels)")
        print(f"{args.dataset}: {len(images):,} images of {args.resolution} px, "
              f"{args.epochs} epochs of {per_epoch} steps")
        print(f"batch {args.batch} in total = {world} ranks x {args.accum} accumulation x {local} images; "
              f"{device}, autocast {amp or 'off'}")

    # 4. One pass over this rank's rows; the loop calls it args.accum times per step.
    def forward(rows, draws, module):
        batch = images[rows]
        batch = batch.pin_memory().to(device, non_blocking=True) if cuda and not batch.is_cuda else batch
        views = [make_view(batch, d) for d in draws]
        with autocast:
            key = teacher_key(ema, ema_projector, diffusion, views[1]) if head else None
            return module(views[0], key)

    generator = torch.Generator(device)
    flops = 0
    if args.bench:
        draws = draw_views(2, net.shape, diffusion, args, generator)
        flops = count_flops(lambda: forward(slice(2), draws, objective)[0].backward(), 2)
        optimizer.zero_grad(set_to_none=True)
    if args.compile or (args.compile is None and cuda):
        net.compile()
        ema.compile()
    ddp = objective
    if world > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions give broadcast_buffers another name
            ddp = DistributedDataParallel(objective, gradient_as_bucket_view=True, broadcast_buffers=False)

    # 5. The loop.
    end = total if args.max_steps is None else min(total, args.max_steps)
    warm = max(3, args.bench // 10) if args.bench else None
    end = warm + args.bench if args.bench else end
    if rank == 0 and not args.bench:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, "args.json").write_text(json.dumps(vars(args), indent=2))
    header = {"classes": classes, "ranks": world, "torch": torch.__version__,
              "device": torch.cuda.get_device_name(device) if cuda else "cpu",
              "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    log, stop = MetricsLog(args, step, end, rank, header), StopSignal()
    objective.train()
    order_epoch, saved, stopping = None, time.time(), 0
    about = {"script": Path(__file__).stem, "args": vars(args)}
    if end == 0 and rank == 0:  # --max-steps 0: a checkpoint of the weights as they came
        save_run(args, about | {"epoch": 0, "step": 0}, modules, optimizer, scaler)
    while step < end:
        if step == warm:
            start = synchronized_time(device)
        # 1. Every random number follows from (seed, step): a resumed run repeats an unbroken one.
        generator.manual_seed(seeded(args.seed, 0, step))
        torch.manual_seed(seeded(args.seed, 1, step, rank))  # dropout, the only draw that sees the ranks
        if step // per_epoch != order_epoch:
            order_epoch = step // per_epoch
            shuffle = torch.Generator().manual_seed(seeded(args.seed, 2, order_epoch))
            order = torch.randperm(len(images), generator=shuffle).to(images.device)
        rows = order[step % per_epoch * args.batch :][: args.batch]
        draws = draw_views(args.batch, net.shape, diffusion, args, generator)
        if net.classes:  # some images come without their label, with the null class; the teacher never sees one
            drop = torch.rand(args.batch, generator=generator, device=device) < args.label_drop
            draws[0]["y"] = torch.where(drop, net.classes, labels[rows].to(device, non_blocking=True))
        for micro in range(args.accum):
            mine = slice((micro * world + rank) * local, (micro * world + rank + 1) * local)
            sync = micro == args.accum - 1 or world == 1
            with contextlib.nullcontext() if sync else ddp.no_sync():
                # 2. The teacher's key, then one forward pass for both losses.
                loss, stats = forward(rows[mine], [{k: v[mine] for k, v in d.items()} for d in draws], ddp)
                # 3. Gradients.
                scaler.scale(loss / args.accum).backward()
            log.add(stats)
        # 4. Update the weights, then their average. UNSPECIFIED: the decay warms up, for the sake of short runs; it
        #    is 0.9955 after 2 000 steps, 0.9999 after 90 000.
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0, foreach=True)  # [P] Tab. 8
        log.add({"grad_norm": grad_norm if amp is not torch.float16 else grad_norm.nan_to_num(0, 0, 0)})
        lr = learning_rate(args, step, per_epoch, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        ema_update(ema, net, decay)
        if head:
            ema_update(ema_projector, head.projector, decay)

        # 5. Report and save. Nothing below changes the numbers above.
        log.bar.update()
        epoch, ended = step // per_epoch, step % per_epoch == 0
        stopping = stop.agreed()  # SIGTERM or SIGINT: nothing is lost
        keep = ended and (epoch % args.save_every == 0 or step == total)
        draw_grid = args.sample_every > 0 and (ended and epoch % args.sample_every == 0 or step == end)
        if step % args.log_every == 0 or keep or draw_grid or step == end:
            log.write(step, epoch, lr, args.batch)
        if rank == 0 and not args.bench:
            state = about | {"epoch": epoch, "step": step}
            if keep or stopping or step == end or (ended and time.time() - saved > 900):
                log.check()
                save_run(args, state, modules, optimizer, scaler)
                saved = time.time()
            if keep:
                save_checkpoint(Path(args.out) / f"epoch_{epoch:04d}.pt", ema=ema.state_dict(), **state)
            if draw_grid:
                save_grid(args, ema, diffusion, device, epoch)
                log.restart(step)
        if stopping:
            break
    log.bar.close()
    stop.restore()
    if args.bench and step == end and rank == 0:
        report_bench(args, synchronized_time(device) - start, flops, device, world)
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        print(f"stopped after step {step}: the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(128 + stopping)


if __name__ == "__main__":
    main(parse_args())
