"""Train a UNet that generates and represents: DDAE++ under DDPM, EDM or rectified flow, in one file.

[P]    DDAE++, arXiv:2505.10999            self-conditioning, non-leaky augmentation, contrastive self-distillation
[DDPM] Ho et al. 2020, arXiv:2006.11239    [DDIM] Song et al. 2020, arXiv:2010.02502
[EDM]  Karras et al. 2022, arXiv:2206.00364   [EDM2] Karras et al. 2023, arXiv:2312.02696
[RF]   Liu et al. 2022, arXiv:2209.03003   [MoCo] Chen et al. 2021, MoCo v3, arXiv:2104.02057

    python train_unet.py --dataset shapes --backbone tiny --model edm --self-cond          # a laptop, four minutes
    torchrun --nproc_per_node=4 train_unet.py --dataset cifar100 --model edm --backbone ddpm --self-cond --cl 0.01

Then sample.py, probe.py and fid.py read runs/NAME. The README lists every run of the paper and what we measured.

x0 clean image   x_t noisy image   eps unit noise   level: step t, noise std sigma or time t, (B,)   v velocity
e global embedding, e_t its time part   feat pooled feature of --layer   q, k contrastive query and key
B batch   C, H, W image   D width   net is trained; ema is its average: sampled, probed, and the teacher
"""

# ---- 1. Imports, constants --------------------------------------------------------------------------
import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.integrate import solve_ivp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

RECIPES = {  # [P] Tab. 8: what a formulation sets on UNets
    "ddpm": {"dropout": 0.1, "ema": 0.9999, "warmup": 13},
    "edm": {"dropout": 0.13, "ema": 0.9993, "warmup": 200},
    "rf": {"dropout": 0.1, "ema": 0.9999, "warmup": 13},
}
BACKBONES = {  # [P] Tab. 8. UNSPECIFIED: tiny is ours, for a CPU
    "ddpm": {"width": 128, "mult": (1, 2, 2, 2), "blocks": 2, "biggan": False},
    "ddpmpp": {"width": 128, "mult": (2, 2, 2), "blocks": 4, "biggan": True},
    "tiny": {"width": 32, "mult": (1, 2, 3), "blocks": 1, "biggan": False},
}
BATCH = {"ddpm": 512, "ddpmpp": 256, "tiny": 32}
LAYERS = {  # [P] Tab. 10: most semantic decoder block on CIFAR-10, elsewhere. UNSPECIFIED: tiny was measured on shapes
    ("ddpm", "ddpm"): ("out_6", "out_6"), ("ddpm", "ddpmpp"): ("out_7", "out_8"),
    ("edm", "ddpm"): ("out_7", "out_6"), ("edm", "ddpmpp"): ("out_9", "out_8"),
    ("rf", "ddpm"): ("out_7", "out_7"), ("rf", "ddpmpp"): ("out_8", "out_8"),
    ("ddpm", "tiny"): ("out_2", "out_2"), ("edm", "tiny"): ("out_2", "out_2"), ("rf", "tiny"): ("out_2", "out_2"),
}
LEVELS = {"ddpm": 11, "edm": 0.06, "rf": 0.06}  # [P] Tab. 10: the noise level at which that block is read
RESOLUTIONS = {"shapes": 16, "cifar10": 32, "cifar100": 32}  # anything else: 64
ADDED = ("self_cond.", "time_emb.aug_emb.")  # what [P] adds to the network: public weights lack it
FREE = {  # flags that may change when a run is resumed
    "data", "device", "compile", "resume", "epochs", "max_steps", "save_every", "sample_every", "log_every",
    "data_device", "out", "bench", "init", "amp", "warmup",
}
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SHAPES = ("bar", "crescent", "cross", "disc", "ell", "frame", "plus", "ring", "square", "triangle")
SYM6 = (  # low-pass taps of the 12-tap symlet [EDM] App. F.2; they sum to sqrt(2)
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)
PEAK_TFLOPS = {  # dense bf16 tensor-core rate by vendor data sheet, for --bench
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71, "RTX 3080 Ti": 68,
}


# ---- 2. Backbone ------------------------------------------------------------------------------------
class TimeEmbedding(nn.Module):
    """Sinusoid, plus a linear map of the augmentation label, through a two-layer MLP: (B,) -> (B, 4 width)."""

    def __init__(self, width, aug_dim):
        super().__init__()
        self.width = width
        self.lin1 = nn.Linear(width, 4 * width)
        self.lin2 = nn.Linear(4 * width, 4 * width)
        if aug_dim:
            self.aug_emb = nn.Linear(aug_dim, width, bias=False)

    def forward(self, t, aug=None):
        half = self.width // 2
        freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        angles = t.float()[:, None] * freqs  # (B, width / 2); t is not multiplied by 1000
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, width)
        with torch.autocast(t.device.type, enabled=False):  # bf16 cannot tell neighbouring steps apart
            emb = emb if aug is None else emb + self.aug_emb(aug)
            return self.lin2(F.silu(self.lin1(emb)))


class ResBlock(nn.Module):
    """norm, SiLU, conv, + embedding, norm, SiLU, dropout, conv, + shortcut. BigGAN's: resamples before conv1."""

    def __init__(self, c_in, c_out, emb_dim, dropout, resample=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.norm2 = nn.GroupNorm(32, c_out)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.resample = {
            "down": nn.AvgPool2d(2),
            "up": nn.Upsample(scale_factor=2, mode="nearest"),
            None: nn.Identity(),
        }[resample]

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))  # (B, c_out, H', W')
        h = h + self.time_emb(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(self.resample(x))


class Attention(nn.Module):
    """Self-attention over pixels: GroupNorm, one head, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view when channels-last
        q, k, v = self.projection(tokens)[:, None].chunk(3, dim=-1)  # each (B, 1, HW, C)
        h = self.output(F.scaled_dot_product_attention(q, k, v)[:, 0])  # (B, HW, C)
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """A residual block, followed by attention where the resolution asks for it."""

    def __init__(self, c_in, c_out, emb_dim, dropout, attention):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb_dim, dropout)
        self.attn = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        return self.attn(self.res(x, emb))


class Resample(nn.Module):
    """Halve or double the resolution: DDPM's convolution (conv), or BigGAN's residual block (op)."""

    def __init__(self, channels, emb_dim, dropout, direction, biggan):
        super().__init__()
        self.up = direction == "up"
        if biggan:
            self.op = ResBlock(channels, channels, emb_dim, dropout, resample=direction)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1)

    def forward(self, x, emb):
        if hasattr(self, "op"):
            return self.op(x, emb)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels, emb_dim, dropout):
        super().__init__()
        self.res1 = ResBlock(channels, channels, emb_dim, dropout)
        self.attn = Attention(channels)
        self.res2 = ResBlock(channels, channels, emb_dim, dropout)

    def forward(self, x, emb):
        return self.res2(self.attn(self.res1(x, emb)), emb)


class UNet(nn.Module):
    """The UNet of DDPM or DDPM++ with self-conditioning after one decoder block. [P] Tab. 8

    Args:
        resolution: image side; attention stands wherever the side is 16, and in the middle.
        width, mult, blocks: base channels, multiple per level, blocks per level (one more in the decoder).
        biggan: resample with residual blocks (DDPM++) instead of convolutions (DDPM).
        dropout: probability, in every residual block.
        aug_dim: length of the augmentation label, 0 for none.
        layer: decoder block "out_1".."out_n" whose pooled output is the feature; None takes the last.
        self_cond: None, "adaptive" or "add".
    """

    def __init__(self, resolution, width, mult, blocks, biggan, dropout=0.0, aug_dim=0, layer=None, self_cond=None):
        super().__init__()
        self.shape, self.classes = (3, resolution, resolution), 0  # [P]'s UNets are unconditional
        emb_dim = 4 * width
        self.time_emb = TimeEmbedding(width, aug_dim)
        self.image_proj = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]
        for level, m in enumerate(mult):
            attention = resolution >> level == 16
            for _ in range(blocks):
                self.down.append(UNetBlock(c, m * width, emb_dim, dropout, attention))
                c = m * width
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(Resample(c, emb_dim, dropout, "down", biggan))
                skips.append(c)
        self.middle = Middle(c, emb_dim, dropout)
        widths = {}  # decoder block -> channels
        for level, m in reversed(list(enumerate(mult))):
            attention = resolution >> level == 16
            for _ in range(blocks + 1):
                self.up.append(UNetBlock(c + skips.pop(), m * width, emb_dim, dropout, attention))
                c = m * width
                widths[f"out_{len(widths) + 1}"] = c
            if level > 0:
                self.up.append(Resample(c, emb_dim, dropout, "up", biggan))
        self.norm = nn.GroupNorm(8, c)
        self.final = nn.Conv2d(c, 3, 3, padding=1)
        self.layers = list(widths)
        self.layer = layer or self.layers[-1]
        if self.layer not in widths:
            raise ValueError(f"unknown layer {self.layer!r}; this network has {', '.join(self.layers)}")
        if self_cond and self.layer == self.layers[-1]:
            raise ValueError(f"self-conditioning after {self.layer} leaves no decoder: take an earlier layer")
        self.feat_dim, self.emb_dim = widths[self.layer], emb_dim
        self.self_cond = SelfConditioning(self.feat_dim, self.feat_dim, emb_dim, self_cond) if self_cond else None
        self.init_weights()

    def init_weights(self):
        """UNSPECIFIED, as [DDPM]: uniform with variance 1 / fan_avg; residual branches and the output end in zeros."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            last = {ResBlock: lambda m: m.conv2[1], Attention: lambda m: m.output, UNet: lambda m: m.final}
            if type(module) in last:
                nn.init.zeros_(last[type(module)](module).weight)
        if self.self_cond:
            self.self_cond.init_weights()

    def forward(self, x, t, y=None, aug=None, feat=None, tap=None):
        """One raw evaluation.

        Args:
            x: (B, 3, H, W), scaled as the formulation wants it. t: (B,), the formulation's network time.
            y: must be None, the UNets of [P] are unconditional. aug: label (B, 9), None equals zeros.
            feat: None, "too" or "only" (stop at the feature layer: the teacher's pass).
            tap: called as tap(name, h) with the output (B, D, H', W') of every decoder block.
        Returns:
            the prediction (B, 3, H, W); with "too" also (feat, e_t), with "only" just (feat, e_t):
            pooled feature (B, D) in float32 and time embedding (B, 4 width).
        Raises:
            ValueError: if x is not (B, *self.shape), or y is given.
        """
        if x.shape[1:] != self.shape or y is not None:
            raise ValueError(f"x must be (B, {', '.join(map(str, self.shape))}) and y None, got {tuple(x.shape)}, {y}")
        e_t = self.time_emb(t)  # (B, 4 width)
        e = e_t if aug is None else self.time_emb(t, aug)
        h = self.image_proj(x)
        skips = [h]
        for block in self.down:
            h = block(h, e)
            skips.append(h)
        h = self.middle(h, e)
        names = iter(self.layers)
        for block in self.up:
            if isinstance(block, Resample):
                h = block(h, e)
                continue
            h = block(torch.cat([h, skips.pop()], dim=1), e)
            name = next(names)
            if tap is not None:
                tap(name, h)
            if name == self.layer:  # the encoder ends here, the decoder begins
                pooled = h.float().mean(dim=(2, 3))  # (B, D)
                if feat == "only":
                    return pooled, e_t
                if self.self_cond is not None:
                    e = self.self_cond(e, e_t, pooled)  # [P]: self-conditioning
        out = self.final(F.silu(self.norm(h)))
        return (out, (pooled, e_t)) if feat == "too" else out

    def features(self, x, t, y=None, pool="gap"):
        """Pooled outputs of all decoder blocks, {name: (B, D) float32} in depth order, from one forward pass.

        Args:
            x, t, y: as in forward. pool: "gap" (mean over pixels) or "token" (one random pixel per image).
        Raises:
            ValueError: for pool="cls", which a UNet does not have.
        """
        if pool not in ("gap", "token"):
            raise ValueError(f"a UNet has no [CLS] token: use --pool gap or --pool token, not {pool}")
        out = {}

        def tap(name, h):
            tokens = h.float().flatten(2)  # (B, D, H'W')
            if pool == "gap":
                out[name] = tokens.mean(2)
            else:
                where = torch.randint(tokens.shape[2], (len(h), 1, 1), device=h.device).expand(-1, tokens.shape[1], 1)
                out[name] = tokens.gather(2, where)[:, :, 0]

        self.forward(x, t, y, tap=tap)
        return out


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


class DDPM(Formulation):
    """Discrete steps t = 0 (clean) .. 1000, noise prediction. [DDPM] Sec. 2, [P] Tab. 8."""

    symbol, range = "t", (0, 1000)
    levels = (1, 11, 33, 66, 130, 260)  # what probe.py --grid visits

    def __init__(self, time_scale=1e-3):
        super().__init__()
        self.time_scale = time_scale  # network time per step
        betas = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])
        self.register_buffer("alphabar", (1 - betas).log().cumsum(0).exp(), persistent=False)  # (1001,), a_t^2
        # DEVIATION: the reference code's DDIM samples with this slightly different table, so its published FIDs do
        ddim = (1 - torch.linspace(1e-4, 0.02, 1001)).log().cumsum(0).exp()
        self.register_buffer("alphabar_ddim", ddim, persistent=False)

    def draw_level(self, n, generator):
        """Training steps, (n,) int64, uniform over 1..1000."""
        return torch.randint(1, 1001, (n,), generator=generator, device=generator.device)

    def add_noise(self, x0, level, noise):
        """x_t = a_t x0 + sqrt(1 - a_t^2) eps at step `level`; x0, noise (B, C, H, W)."""
        alphabar = self.alphabar[per_image(level, x0).long()]
        return alphabar.sqrt() * x0 + (1 - alphabar).sqrt() * noise

    def inputs(self, x0, level, noise):
        """Noise x0 and scale it for the network: (B, C, H, W), (B,)."""
        return self.add_noise(x0, level, noise), per_image(level, x0).flatten().float() * self.time_scale

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Mean squared error on the noise. Returns the scalar loss and the network's (feat, e_t)."""
        eps_hat, feat = net(*self.inputs(x0, level, noise), y, aug, feat="too")
        return F.mse_loss(eps_hat.float(), noise), feat

    def sample(self, net, noise, steps=100, y=None):
        """DDIM with eta 0; every estimate of x0 is clipped to [-1, 1]. [DDIM] Eq. 12. noise (B, C, H, W) -> x0."""
        x, times = noise, list(range(1, 1001, 1000 // min(steps, 1000)))[::-1] + [0]
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            a, a_next = self.alphabar_ddim[t], self.alphabar_ddim[t_next]
            eps_hat = net(x, torch.full((len(x),), t * self.time_scale, device=x.device), y).float()
            x0_hat = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)
            eps_hat = (x - a.sqrt() * x0_hat) / (1 - a).sqrt()  # the noise that agrees with the clipped x0
            x = a_next.sqrt() * x0_hat + (1 - a_next).sqrt() * eps_hat
        return x


class EDM(Formulation):
    """Noise std sigma, preconditioned denoiser D(x; sigma). [EDM] Tab. 1; uncertainty weighting [EDM2] Eq. 15."""

    symbol, range, sigma_data = "s", (0.002, 80.0), 0.5
    levels = (0.0075, 0.023, 0.06, 0.14, 0.2964, 0.585)

    def __init__(self, uncertainty=False):
        super().__init__()
        self.uncertainty = None  # u(sigma), training only
        if uncertainty:
            self.uncertainty = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 1))
            nn.init.zeros_(self.uncertainty[2].weight)
            nn.init.zeros_(self.uncertainty[2].bias)

    def draw_level(self, n, generator):
        """Training noise, (n,): ln sigma ~ N(-1.2, 1.2^2)."""
        return (1.2 * torch.randn(n, generator=generator, device=generator.device) - 1.2).exp()

    def add_noise(self, x0, level, noise):
        """x = x0 + sigma eps; x0, noise (B, C, H, W)."""
        return x0 + per_image(level, x0) * noise

    def precondition(self, x, sigma):
        """Network input c_in x (B, C, H, W) and time c_noise = ln(sigma) / 4 (B,)."""
        s = per_image(sigma, x).float()
        return x / (s**2 + self.sigma_data**2).sqrt(), s.flatten().log() / 4

    def inputs(self, x0, level, noise):
        """Noise x0 and scale it for the network: (B, C, H, W), (B,)."""
        return self.precondition(self.add_noise(x0, level, noise), level)

    def combine(self, x, sigma, out):
        """D(x; sigma) = c_skip x + c_out F, in float32."""
        s, sd = per_image(sigma, x).float(), self.sigma_data
        return (sd**2 * x + s * sd * (s**2 + sd**2).sqrt() * out.float()) / (s**2 + sd**2)

    def denoise(self, net, x, sigma, y=None, aug=None):
        """x0_hat (B, C, H, W) from x at noise std sigma, not clipped."""
        return self.combine(x, sigma, net(*self.precondition(x, sigma), y, aug))

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Weighted squared error, mean over everything. Returns the scalar loss and the network's (feat, e_t)."""
        x = self.add_noise(x0, level, noise)
        x_in, c_noise = self.precondition(x, level)
        out, feat = net(x_in, c_noise, y, aug, feat="too")
        s, sd = per_image(level, x0), self.sigma_data
        weight = (s**2 + sd**2) / (s * sd) ** 2
        loss = (weight * (self.combine(x, level, out) - x0) ** 2).mean(dim=(1, 2, 3))  # (B,)
        if self.uncertainty is not None:
            with torch.autocast(x.device.type, enabled=False):
                u = self.uncertainty(c_noise[:, None])[:, 0]  # (B,)
            loss = loss / u.exp() + u
        return loss.mean(), feat

    def schedule(self, steps):
        """Noise levels of the sampler, (steps + 1,) float64, 80 down to 0.002 with rho 7, then 0. [EDM] Eq. 5"""
        low, high = self.range[0] ** (1 / 7), self.range[1] ** (1 / 7)
        sigmas = torch.linspace(high, low, steps, dtype=torch.float64) ** 7
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])

    def sample(self, net, noise, steps=18, y=None):
        """Heun's method, deterministic, D clipped to [-1, 1], float64 state. [EDM] Alg. 1. noise -> x0 (B, C, H, W)."""
        sigmas = self.schedule(steps).tolist()
        x = noise.double() * sigmas[0]

        def slope(x, sigma):
            x0_hat = self.denoise(net, x.float(), sigma, y).double().clamp(-1, 1)
            return (x - x0_hat) / sigma

        for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            d = slope(x, s)
            x_next = x + (s_next - s) * d
            if s_next > 0:
                x_next = x + (s_next - s) * (d + slope(x_next, s_next)) / 2
            x = x_next
        return x.float()


class RF(Formulation):
    """Rectified flow, time t from 0 (data) to 1 (noise), velocity prediction. [RF] Eq. 1, [P]."""

    symbol, range = "t", (0.0, 1.0)
    levels = (0.01, 0.03, 0.06, 0.12, 0.25, 0.4)

    def draw_level(self, n, generator):
        """Training times, (n,), uniform in [0, 1)."""
        return torch.rand(n, generator=generator, device=generator.device)

    def add_noise(self, x0, level, noise):
        """x_t = (1 - t) x0 + t eps; x0, noise (B, C, H, W)."""
        t = per_image(level, x0)
        return (1 - t) * x0 + t * noise

    def inputs(self, x0, level, noise):
        """Noise x0 for the network: (B, C, H, W), (B,)."""
        return self.add_noise(x0, level, noise), per_image(level, x0).flatten().float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Mean squared error on v = eps - x0. Returns the scalar loss and the network's (feat, e_t)."""
        v_hat, feat = net(*self.inputs(x0, level, noise), y, aug, feat="too")
        return F.mse_loss(v_hat.float(), noise - x0), feat

    def sample(self, net, noise, steps=None, y=None):
        """Integrate dx/dt = v from t = 1 to 0: adaptive RK45 at tolerance 1e-5, or Euler when `steps` is given.

        RK45's error norm runs over the whole batch, so its result depends a little on what is solved together.
        noise (B, C, H, W) -> x0 (B, C, H, W), not clipped.
        """

        def velocity(t, x):
            return net(x, torch.full((len(x),), t, device=x.device), y).float()

        if steps is not None:
            x = noise
            for i in range(steps):
                x = x - velocity(1 - i / steps, x) / steps
            return x

        def slope(t, state):  # scipy's state is flat float64 on the host
            x = torch.from_numpy(state).to(noise.device, torch.float32).view_as(noise)
            v = velocity(t, x).double().flatten().cpu().numpy()
            if not np.isfinite(v).all():  # RK45 would look for a step size for ever
                raise FloatingPointError
            return v

        start = noise.double().flatten().cpu().numpy()
        try:
            solution = solve_ivp(slope, (1.0, 0.0), start, method="RK45", rtol=1e-5, atol=1e-5, t_eval=[0.0])
        except FloatingPointError:
            return torch.full_like(noise, math.nan)
        return torch.from_numpy(solution.y[:, -1]).to(noise.device, torch.float32).view_as(noise)


# ---- 5. Data, augmentation --------------------------------------------------------------------------
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


def load_data(args, split):
    """The images of a data set.

    Args:
        args: needs dataset, data and resolution. split: "train" or "test".
    Returns:
        images uint8 (N, 3, resolution, resolution), labels int64 (N,), on the CPU.
    Ends with exit status 2 and one line where the data are missing or damaged.
    """
    return read_data(args, split)[:2]


def training_set(args, device):
    """Images, labels and class names to train on. --bench takes noise: it needs no data set."""
    if not args.bench:
        return read_data(args, "train")
    images = torch.randint(256, (4 * args.batch, 3, args.resolution, args.resolution)).byte()
    return images, torch.zeros(len(images), dtype=torch.long), []


def to_x0(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x0):
    """x0 (B, 3, H, W), nominally in [-1, 1] -> uint8."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def decoder(args, device, vae=None):
    """The function that turns what the sampler returns into uint8 images."""
    if vae is not None:
        fail(f"--vae {vae}: the checkpoint works on pixels, drop it")
    return to_uint8


def draw_augment(n, generator):
    """Raw random numbers of the augmentation of n images: {name: (n,), translate: (2, n)}. [EDM] App. F.2"""
    kw = {"generator": generator, "device": generator.device}
    draws = {name: torch.randint(2, (n,), **kw) for name in ("xflip", "yflip")}
    draws |= {name: torch.randn(n, **kw) for name in ("scale", "aniso_w")}
    draws |= {name: torch.rand(n, **kw) for name in ("rotate_u", "aniso_u")}
    draws["translate"] = torch.randn(2, n, **kw)
    gates = ("yflip", "scale", "rotate", "aniso", "aniso_rotate", "translate")
    return draws | {f"gate_{name}": torch.rand(n, **kw) for name in gates}


def gate_augment(draws, p):
    """Keep each transform with probability p. [EDM] App. F.2: x-flip is always drawn, the angle r kept half the time.

    Returns:
        (n, 8): xflip, yflip in {0, 1}; scale; rotation theta; stretch w, its angle r; shifts tx, ty. Zero is identity.
    """
    on = {name: (draws[f"gate_{name}"] < p).float() for name in ("yflip", "scale", "rotate", "aniso", "translate")}
    theta, r = ((2 * draws[name] - 1) * math.pi for name in ("rotate_u", "aniso_u"))
    r = r * (draws["gate_aniso_rotate"] < 0.5)
    tx, ty = draws["translate"] * on["translate"]
    rows = [draws["xflip"].float(), draws["yflip"] * on["yflip"], draws["scale"] * on["scale"], theta * on["rotate"]]
    return torch.stack([*rows, draws["aniso_w"] * on["aniso"], r, tx, ty], dim=1)


def augment_label(params):
    """Parameters (B, 8) of gate_augment -> the 9 numbers that the network is told. [EDM] App. F.2"""
    xflip, yflip, scale, theta, w, r, tx, ty = params.unbind(1)
    return torch.stack([xflip, yflip, scale, theta.cos() - 1, theta.sin(), w * r.cos(), w * r.sin(), tx, ty], dim=1)


def augment(x0, params):
    """EDM's non-leaky geometric augmentation: flips, then one affine warp at twice the resolution. [EDM] App. F.2

    Reflection padding, sym6 up- and downsampling are linear along each axis, so each is one constant matrix.
    DEVIATION: always padded by S - 1; the reference pads as far as the batch needs and falls 2e-5 short in corners.

    Args:
        x0: (B, C, S, S) float32. params: (B, 8), from gate_augment.
    Returns:
        (B, C, S, S) float32; rows do not depend on each other.
    """
    S, device = x0.shape[-1], x0.device
    xflip, yflip, scale, theta, w, r, tx, ty = params.unbind(1)
    x0 = torch.where(xflip.view(-1, 1, 1, 1) > 0, x0.flip(3), x0)
    x0 = torch.where(yflip.view(-1, 1, 1, 1) > 0, x0.flip(2), x0)
    up, down = augment_filters(S, device)  # (6S - 4, S), (S, 2S + 12)

    # The map from output to input pixels, origin at the centre, x right and y down: A p + b. [EDM] Tab. 6
    def rotation(a):  # (B, 2, 2)
        return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=1).view(-1, 2, 2)

    squeeze = torch.diag_embed(torch.stack([2 ** (-0.2 * w), 2 ** (0.2 * w)], dim=1))
    a = rotation(theta) @ rotation(-r) @ squeeze @ rotation(r) * 2 ** (-0.2 * scale).view(-1, 1, 1)
    b = -(a @ (0.125 * S * torch.stack([tx, ty], dim=1))[:, :, None])  # (B, 2, 1)

    # Canvas pixel p of the doubled grid takes its value at 2 (A p / 2 + b), with half-pixel centres.
    side, n = 2 * S + 12, len(up)
    axis = torch.arange(side, device=device) + 0.5 - side / 2
    p = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).view(1, 2, -1)  # (1, 2, side^2), x first
    q = 2 * (a @ ((p + 0.5) / 2) + b) - 0.5
    grid = (q * 2 / n).transpose(1, 2).view(-1, side, side, 2)
    canvas = F.grid_sample(up @ x0 @ up.T, grid, padding_mode="zeros", align_corners=False)
    return down @ canvas @ down.T


@functools.cache
def augment_filters(S, device):
    """Matrices for an axis of S pixels: reflect by S - 1 and upsample (6S - 4, S); downsample and crop (S, 2S + 12)."""
    taps, n = torch.tensor(SYM6), 3 * S - 2
    reflect = torch.zeros(n, S)
    place = torch.arange(-(S - 1), 2 * S - 1).abs()
    reflect[torch.arange(n), torch.where(place < S, place, 2 * (S - 1) - place)] = 1
    up, down = torch.zeros(2 * n, n), torch.zeros(S, 2 * S + 12)
    for j in range(12):
        m = torch.arange(n)
        k = 2 * m + j - 5  # zeros between the samples, then a convolution
        ok = (k >= 0) & (k < 2 * n)
        up[k[ok], m[ok]] = taps[j]
        down[torch.arange(S), 2 * torch.arange(S) + 1 + j] = taps[j]
    return (up @ reflect).to(device), down.to(device)


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
    group.add_argument("--model", choices=["ddpm", "edm", "rf"], default="ddpm", help="formulation (default: ddpm)")
    group.add_argument("--backbone", choices=list(BACKBONES), default="ddpm",
                       help="35.7 M, 56.5 M or 1.7 M parameters (default: ddpm)")
    group.add_argument("--self-cond", nargs="?", choices=["adaptive", "add"], const="adaptive",
                       help="self-conditioning after --layer (default: off; bare: adaptive; add is the ablation)")
    group.add_argument("--layer", help="decoder block of the feature, out_1, out_2, .. (default: [P] Tab. 10)")
    group.add_argument("--dropout", type=float, help="(default: 0.1, EDM 0.13, tiny 0; [P] Tab. 8)")
    group = parser.add_argument_group("augmentation and contrastive part")
    group.add_argument("--aug", type=float, metavar="P",
                       help="probability of each non-leaky transform (default: 0; 0.12 with --cl)")
    group.add_argument("--cl", type=float, metavar="GAMMA", default=0.0,
                       help="weight of the MoCo v3 loss (default: 0, off; 0.01 in the paper)")
    group.add_argument("--cl-head", choices=["time", "moco"], default="time",
                       help="time-dependent or original projector (default: time)")
    group.add_argument("--cl-hidden", type=int, metavar="N", help="hidden width of the head (default: 4096; tiny 512)")
    group.add_argument("--cl-t", type=float, metavar="LEVEL",
                       help="noise level of the teacher and default of probe.py --t "
                       "(default: step 11, EDM sigma 0.06, at 64 pixels 0.2964, RF time 0.06; [P] Tab. 10)")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes",
                       help="shapes, cifar10, cifar100, tiny-imagenet or any folder below --data (default: shapes)")
    group.add_argument("--data", default="./data", metavar="ROOT",
                       help="ROOT/NAME/train/<class>/* is read if it exists (default: ./data)")
    group.add_argument("--resolution", type=int, help="(default: shapes 16, CIFAR 32, folders 64)")
    group.add_argument("--data-device", choices=["auto", "cpu"], default="auto",
                       help="where the uint8 images live; cpu when they do not fit the GPU (default: auto)")
    group = parser.add_argument_group("optimisation ([P] Tab. 8)")
    group.add_argument("--epochs", type=int, help="(default: 2000; tiny 5)")
    group.add_argument("--batch", type=int, help="total over all ranks (default: ddpm 512, ddpmpp 256, tiny 32)")
    group.add_argument("--accum", type=int, default=1, help="accumulation steps; --batch stays the total (default: 1)")
    group.add_argument("--lr", type=float, help="(default: 4e-4; tiny 2e-3)")
    group.add_argument("--warmup", type=float,
                       help="epochs (default: 13, EDM 200; at most a quarter of --epochs, tiny a tenth)")
    group.add_argument("--cooldown", type=float,
                       help="share of the run at its end in which lr falls to 0 (default: 0; tiny 0.3)")
    group.add_argument("--ema", type=float, help="EMA decay per step (default: 0.9999, EDM 0.9993, tiny 0.999)")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                       help="(default: auto: bf16 on GPUs that have it, else fp16; off on a CPU)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on GPUs)")
    group.add_argument("--seed", type=int, default=0, help="of weights, order, noise and augmentation (default: 0)")
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="folder of the run (default: runs/<name from the flags>)")
    group.add_argument("--resume", action="store_true", help="go on from OUT/last.pt as if never stopped")
    group.add_argument("--init", metavar="FILE", help="start from these weights (official names)")
    group.add_argument("--save-every", type=int, default=200, help="epochs between epoch_NNNN.pt (default: 200)")
    group.add_argument("--sample-every", type=int, default=50,
                       help="epochs between sample grids, 0 for none (default: 50)")
    group.add_argument("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl (default: 50)")
    group.add_argument("--max-steps", type=int, help="stop after this step, even within an epoch; with 0 and --init "
                       "public weights become a checkpoint for the tools")
    group.add_argument("--bench", type=int, metavar="N", help="time N steps, print JSON, write nothing")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)

    tiny, recipe = args.backbone == "tiny", RECIPES[args.model]
    layers = LAYERS[args.model, args.backbone]
    resolution = args.resolution or RESOLUTIONS.get(args.dataset, 64)
    layer, level = layers[args.dataset != "cifar10"], LEVELS[args.model]
    if resolution >= 64 and (args.model, args.backbone) == ("edm", "ddpm"):
        layer, level = "out_5", 0.2964  # [P] Tab. 10, the 64-pixel column
    epochs = args.epochs if args.epochs is not None else (5 if tiny else 2000)
    given = [f"{name.replace('_', '-')}{getattr(args, name)}" for name in
             ("layer", "cl_t", "resolution", "epochs", "batch", "lr", "warmup", "cooldown", "ema", "dropout",
              "cl_hidden") if getattr(args, name) is not None]  # to tell runs apart
    defaults = {  # UNSPECIFIED: the caps on the warm-up, for short runs
        "resolution": resolution, "layer": layer, "cl_t": level, "epochs": epochs, "batch": BATCH[args.backbone],
        "dropout": 0.0 if tiny else recipe["dropout"], "ema": 0.999 if tiny else recipe["ema"],
        "lr": 2e-3 if tiny else 4e-4, "warmup": min(recipe["warmup"], epochs / (10 if tiny else 4)),
        "cooldown": 0.3 if tiny else 0.0,
        "aug": 0.12 if args.cl > 0 else 0.0,  # two views need it
        "cl_hidden": 512 if tiny else 4096,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("resolution", "epochs", "batch", "accum", "save_every", "log_every", "bench", "lr", "cl_hidden"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name in ("aug", "cooldown", "dropout", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} must be between 0 and 1")
    if min(args.cl, args.warmup, args.sample_every, args.seed, args.max_steps or 0) < 0:
        parser.error("--cl, --warmup, --sample-every, --seed and --max-steps must not be negative")
    if args.resolution % 2 ** (len(BACKBONES[args.backbone]["mult"]) - 1):
        parser.error(f"--resolution {args.resolution} cannot be halved at every level of {args.backbone}")
    try:
        with torch.device("meta"):
            build(args)[1].check_level(args.cl_t)
    except ValueError as error:
        parser.error(f"--layer or --cl-t: {error}")
    if args.out is None:
        parts = [args.dataset, args.model, args.backbone, args.self_cond and f"sc-{args.self_cond}",
                 args.aug and f"aug{args.aug:g}", args.cl and f"cl{args.cl:g}", args.cl_head == "moco" and "moco",
                 args.seed and f"seed{args.seed}", *given]
        args.out = "runs/" + "-".join(part for part in parts if part)
    return args


def build(args):
    """Untrained network and formulation, on the CPU: (UNet, DDPM | EDM | RF)."""
    aug_dim = 9 if args.aug > 0 else 0
    net = UNet(args.resolution, **BACKBONES[args.backbone], dropout=args.dropout, aug_dim=aug_dim,
               layer=args.layer, self_cond=args.self_cond)
    if args.model == "edm":
        return net, EDM(uncertainty=args.aug > 0)  # [P] Tab. 8
    return net, DDPM() if args.model == "ddpm" else RF()


# ---- 9. The loop ------------------------------------------------------------------------------------
def make_optimizer(objective, args):
    """Adam on everything. [P] Tab. 8"""
    return torch.optim.Adam(objective.parameters(), lr=args.lr, fused=True)


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
    """
    views, device = [], generator.device
    for level in (None, args.cl_t) if args.cl > 0 else (None,):
        view = {
            "flip": torch.rand(n, generator=generator, device=device) < 0.5,
            "level": diffusion.draw_level(n, generator) if level is None else torch.full((n,), level, device=device),
            "noise": torch.randn(n, *shape, generator=generator, device=device),
        }
        if args.aug > 0:
            view["params"] = gate_augment(draw_augment(n, generator), args.aug)  # (n, 8)
        views.append(view)
    return views


def make_view(images, draws):
    """uint8 (B, 3, H, W) and its draws -> what diffusion.loss takes: x0 in [-1, 1], level, noise, aug."""
    x0, draws = to_x0(images), dict(draws)
    x0 = torch.where(draws.pop("flip").view(-1, 1, 1, 1), x0.flip(3), x0)
    if "params" not in draws:
        return {"x0": x0, "aug": None} | draws
    params = draws.pop("params")
    return {"x0": augment(x0, params), "aug": augment_label(params)} | draws


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
