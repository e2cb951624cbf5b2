"""Train a UNet that generates and represents: DDAE++ [P] under DDPM, EDM or rectified flow.

[P]    DDAE++, arXiv:2505.10999v1, after [DDAE] Xiang et al., 2303.09769
[DDPM] Ho et al., 2006.11239       [DDIM] Song et al., 2010.02502
[EDM]  Karras et al., 2206.00364   [EDM2] Karras et al., 2312.02696
[RF]   Liu et al., 2209.03003      [MoCo] Chen et al. 2021, MoCo v3, 2104.02057

    python train_unet.py --dataset shapes --backbone tiny --model edm --self-cond  # a CPU core, seven minutes
    torchrun --nproc_per_node=4 train_unet.py --dataset cifar100 --model edm --backbone ddpm --self-cond --cl 0.01

x0 clean image   x_t noisy image   eps unit noise   level: step t, noise std sigma or time t, (B,)   v velocity
e global embedding, e_t its time part   feat pooled feature of --layer   q, k contrastive query and key
B batch   C, H, W image   D width   average: the EMA, sampled, probed, the teacher
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
import signal
import sys
import time
import warnings
import zipfile
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
from scipy.integrate import solve_ivp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients: pytorch #169849, #196678
BACKBONES = {  # [P] Tab. 9. UNSPECIFIED: tiny is ours
    "ddpm": {"width": 128, "mult": (1, 2, 2, 2), "blocks": 2, "biggan": False},
    "ddpmpp": {"width": 128, "mult": (2, 2, 2), "blocks": 4, "biggan": True},
    "tiny": {"width": 32, "mult": (1, 2, 3), "blocks": 1, "biggan": False},
}
LAYERS = {  # [P] Tab. 10: (model, backbone): best block on CIFAR-10, CIFAR-100. UNSPECIFIED: elsewhere as on CIFAR-100
    ("ddpm", "ddpm"): ("out_6", "out_6"), ("ddpm", "ddpmpp"): ("out_7", "out_8"),
    ("edm", "ddpm"): ("out_7", "out_6"), ("edm", "ddpmpp"): ("out_9", "out_8"),
    ("rf", "ddpm"): ("out_7", "out_7"), ("rf", "ddpmpp"): ("out_8", "out_8"),
}
DEFAULTS = {  # [P] Tab. 8: dropout, EMA; Tab. 11: warm-up (epochs), BATCH; Tab. 10: level at which the layer is read
    "ddpm": {"dropout": 0.1, "ema": 0.9999, "warmup": 13, "cl_t": 11},
    "edm": {"dropout": 0.13, "ema": 0.9993, "warmup": 200, "cl_t": 0.06},
    "rf": {"dropout": 0.1, "ema": 0.9999, "warmup": 13, "cl_t": 0.06},
}
BATCH = {"ddpm": 512, "ddpmpp": 256}
PAPER = {"epochs": 2000, "lr": 4e-4, "cooldown": 0.0, "cl_hidden": 4096}  # [P] Tab. 11; head: [MoCo]
TINY = {"epochs": 5, "lr": 2e-3, "cooldown": 0.3, "cl_hidden": 512, "batch": 32, "ema": 0.999, "dropout": 0.0,
        "layer": "out_2"}  # UNSPECIFIED: ours, measured on shapes
RESOLUTIONS = {"shapes": 16, "cifar10": 32, "cifar100": 32}  # anything else: 64
ADDED = ("self_cond.", "time_emb.aug_emb.")  # public weights may lack these
FREE = "data out epochs accum save_every max_steps device compile resume init".split()  # --resume may change these
LOG_EVERY, SAVE_SECONDS = 10, 900  # steps between lines of metrics.jsonl, seconds between saves
SUFFIXES, FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), ("PNG", "JPEG", "WEBP", "BMP")
POLYGONS = {"triangle": (3, 1.0), "square": (4, 1.0), "sparkle": (8, 0.35), "star": (10, 0.45), "disc": (24, 1.0)}
SHAPES = [f"{kind} {name}" for kind in ("solid", "hollow") for name in POLYGONS]
SYM6 = (  # low-pass taps of the 12-tap symlet, [EDM] App. F.2
    0.0154041093, 0.00349071208, -0.117990111, -0.0483117426, 0.491055942, 0.787641141,
    0.337929422, -0.0726375228, -0.0210602925, 0.0447249018, 0.00176771186, -0.00780070833,
)


# ---- 2. Backbone -------------------------------
class TimeEmbedding(nn.Module):
    """Sinusoid, plus a linear map of the augmentation label, through a two-layer MLP: (B,) -> (B, 4 width)."""

    def __init__(self, width, aug_dim):
        super().__init__()
        self.width = width
        self.lin1 = nn.Linear(width, 4 * width)
        self.lin2 = nn.Linear(4 * width, 4 * width)
        self.aug_emb = nn.Linear(aug_dim, width, bias=False) if aug_dim else None

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
        self.resample = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2), None: nn.Identity()}[resample]

    def forward(self, x, e):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))  # (B, c_out, H', W')
        h = h + self.time_emb(e)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(self.resample(x))


class Attention(nn.Module):
    """Self-attention over pixels, one head, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view when channels-last
        qkv = self.projection(tokens)[:, None]  # (B, 1, HW, 3 C)
        with torch.autocast("cpu", enabled=False):  # its bf16 kernel is slow
            q, k, v = (qkv if x.is_cuda else qkv.float()).chunk(3, dim=-1)
            h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, HW, C)
        return x + self.output(h).view(B, H, W, C).permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """A residual block, then attention where asked for."""

    def __init__(self, c_in, c_out, emb_dim, dropout, attention):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb_dim, dropout)
        self.attn = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, e):
        return self.attn(self.res(x, e))


class Resample(nn.Module):
    """Halve or double the resolution: DDPM's convolution (conv), or BigGAN's residual block (op)."""

    def __init__(self, channels, emb_dim, dropout, direction, biggan):
        super().__init__()
        self.up = direction == "up"
        self.op = ResBlock(channels, channels, emb_dim, dropout, direction) if biggan else None
        self.conv = None if biggan else nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1)

    def forward(self, x, e):
        if self.op is not None:
            return self.op(x, e)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class UNet(nn.Module):
    """The UNet of DDPM or DDPM++ with self-conditioning after one decoder block. [P] Tab. 9

    Args:
        resolution: image side; attention stands where the side is 16, and in the middle.
        width, mult, blocks: base channels, multiple per resolution, blocks per resolution (one more in the decoder).
        biggan: resample with residual blocks (DDPM++) instead of convolutions (DDPM).
        aug_dim: length of the augmentation label, 0 for none.
        layer: decoder block "out_1".."out_n" whose pooled output is the feature; None takes the last.
        self_cond: None, "adaptive" or "add".
    """

    def __init__(self, resolution, width, mult, blocks, biggan, dropout=0.0, aug_dim=0, layer=None, self_cond=None):
        super().__init__()
        if resolution % 2 ** (len(mult) - 1):
            raise ValueError(f"{resolution} pixels cannot be halved {len(mult) - 1} times")
        self.shape, self.classes = (3, resolution, resolution), 0  # [P]'s UNets are unconditional
        emb_dim = 4 * width
        self.time_emb = TimeEmbedding(width, aug_dim)
        self.image_proj = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips, widths = width, [width], {}  # widths: decoder block -> channels
        for i, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(UNetBlock(c, m * width, emb_dim, dropout, attention=resolution >> i == 16))
                c = m * width
                skips.append(c)
            if i < len(mult) - 1:
                self.down.append(Resample(c, emb_dim, dropout, "down", biggan))
                skips.append(c)
        res1, res2 = (ResBlock(c, c, emb_dim, dropout) for _ in range(2))
        self.middle = nn.ModuleDict({"res1": res1, "attn": Attention(c), "res2": res2})
        self.up_names = []  # parallel to up: "out_k", or None where the resolution doubles
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(UNetBlock(c + skips.pop(), m * width, emb_dim, dropout, attention=resolution >> i == 16))
                c = m * width
                self.up_names.append(f"out_{len(widths) + 1}")
                widths[self.up_names[-1]] = c
            if i > 0:
                self.up.append(Resample(c, emb_dim, dropout, "up", biggan))
                self.up_names.append(None)
        self.norm = nn.GroupNorm(8, c)
        self.final = nn.Conv2d(c, 3, 3, padding=1)
        self.layers = list(widths)
        self.layer = layer or self.layers[-1]
        if self.layer not in widths:
            raise ValueError(f"no layer {self.layer!r}, but {', '.join(self.layers)}")
        if self_cond and self.layer == self.layers[-1]:
            raise ValueError(f"self-conditioning after {self.layer} leaves no decoder: take an earlier layer")
        self.feat_dim, self.emb_dim = widths[self.layer], emb_dim
        self.init_weights()
        self.self_cond = SelfConditioning(self.feat_dim, self.feat_dim, emb_dim, self_cond) if self_cond else None

    def init_weights(self):
        """UNSPECIFIED, near [DDPM]: uniform, variance 1 / fan_avg; residual branches and the output end in zeros."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock | Attention):
                nn.init.zeros_((module.conv2[1] if isinstance(module, ResBlock) else module.output).weight)
        nn.init.zeros_(self.final.weight)

    def run(self, x, t, y, aug, stop=None, maps=None):
        """Down, middle, up: (prediction, feat, e_t). stop: the last block to run. maps: a dict for their outputs."""
        if x.shape[1:] != self.shape or y is not None or aug is not None and self.time_emb.aug_emb is None:
            raise ValueError(f"x must be (B, *{self.shape}), not {tuple(x.shape)}; y None; no aug without aug_dim")
        e_t = self.time_emb(t)  # (B, 4 width)
        e = e_t if aug is None else self.time_emb(t, aug)
        skips = [self.image_proj(x)]
        for block in self.down:
            skips.append(block(skips[-1], e))
        h = self.middle["attn"](self.middle["res1"](skips[-1], e))
        h = self.middle["res2"](h, e)
        feat = None
        for name, block in zip(self.up_names, self.up, strict=True):
            if name is None:
                h = block(h, e)  # twice the resolution
                continue
            h = block(torch.cat([h, skips.pop()], dim=1), e)
            if maps is not None:
                maps[name] = h
            if name == self.layer:
                feat = h.float().mean(dim=(2, 3))  # (B, D)
            if name == stop:
                return None, feat, e_t
            if name == self.layer and self.self_cond:
                # [P] self-conditioning: the feature joins the embedding of all later blocks. Its scale depends on
                # e_t, time alone: how an image was augmented should not decide how much its content counts.
                e = self.self_cond(e, e_t, feat)
        return self.final(F.silu(self.norm(h))), feat, e_t

    def forward(self, x, t, y=None, aug=None, with_feat=False):
        """One raw evaluation: the prediction (B, 3, H, W); with_feat (prediction, feat, e_t), see encode.

        x: (B, 3, H, W), scaled by the formulation. t: (B,), the formulation's network time.
        y: None, [P]'s UNets are unconditional. aug: label (B, 9), None equals zeros.
        """
        out, feat, e_t = self.run(x, t, y, aug)
        return (out, feat, e_t) if with_feat else out

    def encode(self, x, t, y=None, aug=None):
        """Up to --layer alone: pooled feature (B, D) float32, time embedding e_t (B, 4 width)."""
        return self.run(x, t, y, aug, stop=self.layer)[1:]

    def features(self, x, t, y=None, pool="gap", last=None):
        """Means over pixels of the decoder blocks up to `last`, {name: (B, D) float32} in order; pool must be "gap"."""
        if pool != "gap":
            raise ValueError(f"a UNet has no tokens: use --pool gap, not {pool}")
        maps = {}
        self.run(x, t, y, None, last, maps)
        return {name: h.float().mean(dim=(2, 3)) for name, h in maps.items()}


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


class DDPM(Formulation):
    """Discrete steps t = 0 (clean) .. 1000, noise prediction. [DDPM] Sec. 2, [P] Tab. 8."""

    range, unit = (0, 1000), "whole steps"

    def __init__(self, time_scale=1e-3):
        super().__init__()
        self.time_scale = time_scale  # network time per step
        betas = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])
        self.register_buffer("alphabar", (1 - betas).log().cumsum(0).exp(), persistent=False)  # (1001,), a_t^2
        # DEVIATION: sampling uses [DDAE]'s own table, which has no clean step 0
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
        """What the network sees: x_t (B, C, H, W), its time (B,)."""
        return self.add_noise(x0, level, noise), per_image(level, x0).flatten().float() * self.time_scale

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Mean squared error on the noise; (feat, e_t) of net.encode."""
        eps_hat, *more = net(*self.inputs(x0, level, noise), y, aug, with_feat=True)
        return F.mse_loss(eps_hat.float(), noise), more

    def sample(self, net, noise, steps=100, y=None):
        """DDIM, eta 0, at least `steps` steps; clips x0 as [DDAE]. [DDIM] Eq. 12. noise (B, C, H, W) -> x0."""
        x, times = noise, [0, *range(1, 1001, 1000 // min(steps, 1000))][::-1]
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            a, a_next = self.alphabar_ddim[t], self.alphabar_ddim[t_next]
            eps_hat = net(x, torch.full((len(x),), t * self.time_scale, device=x.device), y).float()
            x0_hat = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)
            eps_hat = (x - a.sqrt() * x0_hat) / (1 - a).sqrt()  # the noise that agrees with the clipped x0
            x = a_next.sqrt() * x0_hat + (1 - a_next).sqrt() * eps_hat
        return x


class EDM(Formulation):
    """Noise std sigma, preconditioned denoiser D(x; sigma). [EDM] Tab. 1; uncertainty weighting [EDM2] Eq. 15."""

    range, unit, sigma_data = (0.002, 80.0), "sigma", 0.5

    def __init__(self, uncertainty=False):
        super().__init__()
        self.uncertainty = None  # u(sigma), training only
        if uncertainty:  # UNSPECIFIED: [P] says "a small head"; this one starts at u = 0, no weighting
            self.uncertainty = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 1))
            nn.init.zeros_(self.uncertainty[2].weight)
            nn.init.zeros_(self.uncertainty[2].bias)

    def draw_level(self, n, generator):
        """Training noise, (n,): ln sigma ~ N(-1.2, 1.2^2)."""
        return (1.2 * torch.randn(n, generator=generator, device=generator.device) - 1.2).exp()

    def add_noise(self, x0, level, noise):
        """x_t = x0 + sigma eps; x0, noise (B, C, H, W)."""
        return x0 + per_image(level, x0) * noise

    def scalings(self, sigma):
        """c_skip, c_out, c_in, c_noise at sigma (B, 1, 1, 1), each of that shape. [EDM] Tab. 1"""
        total = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4

    def inputs(self, x0, level, noise):
        """What the network sees: c_in x_t (B, C, H, W) and c_noise (B,)."""
        _, _, c_in, c_noise = self.scalings(per_image(level, x0).float())
        return c_in * self.add_noise(x0, level, noise), c_noise.flatten()

    def denoise(self, net, x_t, sigma, y=None):
        """D(x; sigma): x0_hat (B, C, H, W) float32 from x_t at noise std sigma, not clipped. [EDM] Eq. 7"""
        c_skip, c_out, c_in, c_noise = self.scalings(per_image(sigma, x_t).float())
        return c_skip * x_t + c_out * net(c_in * x_t, c_noise.flatten(), y).float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Squared error of D, weighted by 1 / c_out^2, a scalar; and (feat, e_t) of net.encode."""
        x_t = self.add_noise(x0, level, noise)
        c_skip, c_out, c_in, c_noise = self.scalings(per_image(level, x0))
        out, *more = net(c_in * x_t, c_noise.flatten(), y, aug, with_feat=True)
        x0_hat = c_skip * x_t + c_out * out.float()
        loss = ((x0_hat - x0) ** 2 / c_out**2).mean(dim=(1, 2, 3))  # (B,)
        if self.uncertainty is not None:
            with torch.autocast(x0.device.type, enabled=False):
                u = self.uncertainty(c_noise.view(-1, 1))[:, 0]  # (B,)
            loss = loss / u.exp() + u  # [EDM2] Eq. 15, [P] with augmentation
        return loss.mean(), more

    def schedule(self, steps):
        """Noise levels of the sampler, (steps + 1,) float64, 80 down to 0.002 with rho 7, then 0. [EDM] Eq. 5"""
        low, high = (sigma ** (1 / 7) for sigma in self.range)
        sigmas = torch.linspace(high, low, steps, dtype=torch.float64) ** 7
        return F.pad(sigmas, (0, 1))

    def sample(self, net, noise, steps=18, y=None):
        """Heun's method, float64 state, D clipped to [-1, 1] as [DDAE] does. [EDM] Alg. 1. noise -> x0 (B, C, H, W)."""
        sigmas = self.schedule(steps).tolist()
        x = noise.double() * sigmas[0]

        def slope(x, sigma):
            return (x - self.denoise(net, x.float(), sigma, y).double().clamp(-1, 1)) / sigma

        for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            d = slope(x, s)
            x_next = x + (s_next - s) * d
            if s_next > 0:  # the second-order correction
                x_next = x + (s_next - s) * (d + slope(x_next, s_next)) / 2
            x = x_next
        return x.float()


class RF(Formulation):
    """Rectified flow, time t from 0 (data) to 1 (noise), velocity prediction. [RF] Eq. 1, [P] Tab. 8."""

    range, unit = (0.0, 1.0), "times"

    def draw_level(self, n, generator):
        """Training times, (n,), uniform in [0, 1)."""
        return torch.rand(n, generator=generator, device=generator.device)

    def add_noise(self, x0, level, noise):
        """x_t = (1 - t) x0 + t eps; x0, noise (B, C, H, W)."""
        t = per_image(level, x0)
        return (1 - t) * x0 + t * noise

    def inputs(self, x0, level, noise):
        """What the network sees: x_t (B, C, H, W) and t (B,)."""
        return self.add_noise(x0, level, noise), per_image(level, x0).flatten().float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Mean squared error on v = eps - x0, a scalar; and (feat, e_t) of net.encode."""
        v_hat, *more = net(*self.inputs(x0, level, noise), y, aug, with_feat=True)
        return F.mse_loss(v_hat.float(), noise - x0), more

    def sample(self, net, noise, y=None):
        """Integrate dx/dt = v from t = 1 to 0 by adaptive RK45: noise (B, C, H, W) -> x0, not clipped.

        The error norm runs over the batch: the result depends a little on what is solved together.
        """

        def slope(t, state):  # scipy's state is flat float64 on the host
            x = torch.from_numpy(state).to(noise.device, torch.float32).view_as(noise)
            v = net(x, torch.full((len(x),), t, device=x.device), y).double().flatten().cpu().numpy()
            if not np.isfinite(v).all():  # RK45 would look for a step size for ever
                raise FloatingPointError("the network gave NaN or infinity")
            return v

        start = noise.double().flatten().cpu().numpy()
        solution = solve_ivp(slope, (1.0, 0.0), start, method="RK45", rtol=1e-5, atol=1e-5, t_eval=[0.0])
        return torch.from_numpy(solution.y[:, -1]).to(noise.device, torch.float32).view_as(noise)


# ---- 5. Data, augmentation ---------------------
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
    """Images uint8 (N, 3, resolution, resolution), labels (N,), both on the CPU, and class names."""
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


def to_x0(images, flip=None):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1], mirrored where flip (B,) is true."""
    x0 = images.float() / 127.5 - 1
    return x0 if flip is None else torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)


def to_uint8(x0):
    """x0 (B, 3, H, W), nominally in [-1, 1] -> uint8."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_numbers(n, shape, diffusion, generator):
    """One view's random numbers: uniform (n, 12), normal (n, 4), level (n,), noise (n, *shape)."""
    kw = {"generator": generator, "device": generator.device}
    uniform, normal = torch.rand(n, 12, **kw), torch.randn(n, 4, **kw)
    return uniform, normal, diffusion.draw_level(n, generator), torch.randn(n, *shape, **kw)


def make_view(images, labels, numbers, args):
    """One view of B images, from their rows of draw_numbers: x0, level, noise, y, aug of diffusion.loss.

    x0 is flipped, then augmented as aug (B, 9) or None says. y is None: the UNets of [P] see no class.
    """
    uniform, normal, level, noise = numbers
    x0, aug = to_x0(images, flip=uniform[:, 0] < 0.5), None
    if args.aug > 0:
        params, aug = gate_augment(uniform[:, 2:], normal, args.aug)
        x0 = augment(x0, params)
    return x0, level, noise, None, aug


def gate_augment(uniform, normal, p):
    """Keep each transform with probability p; 0 is no change. x-flip and angle r: 1/2, whatever p. [EDM] App. F.2

    uniform: (B, 10) in [0, 1): x-flip, y-flip, theta, r; gates of y-flip, scale, theta, w, both shifts, r.
    normal: (B, 4): scale, w, tx, ty.
    Returns (B, 8): xflip, yflip in {0, 1}; scale; rotation theta; stretch w, its angle r; shifts tx, ty; and (B, 9):
    the network's label of it, angles by cosine and sine.
    """
    scale, w, tx, ty = normal.unbind(1)
    xflip, yflip = (uniform[:, :2] < 0.5).float().unbind(1)
    theta, r = ((2 * uniform[:, 2:4] - 1) * math.pi).unbind(1)
    on_yflip, on_scale, on_theta, on_w, on_shift = (uniform[:, 4:9] < p).float().unbind(1)
    yflip, scale, theta, w = yflip * on_yflip, scale * on_scale, theta * on_theta, w * on_w
    r, tx, ty = r * (uniform[:, 9] < 0.5), tx * on_shift, ty * on_shift
    label = [xflip, yflip, scale, theta.cos() - 1, theta.sin(), w * r.cos(), w * r.sin(), tx, ty]
    return torch.stack([xflip, yflip, scale, theta, w, r, tx, ty], dim=1), torch.stack(label, dim=1)


def augment(x0, params):
    """EDM's non-leaky geometric augmentation: flips, then one affine warp at twice the resolution. [EDM] App. F.2

    Reflection padding, sym6 up- and downsampling are linear along each axis, so each is a constant matrix.
    DEVIATION: padded by S - 1; the reference pads as the batch needs and falls 2e-5 short in corners.
    x0: (B, C, S, S) float32; params: (B, 8), from gate_augment -> (B, C, S, S).
    """
    S, device = x0.shape[-1], x0.device
    xflip, yflip, scale, theta, w, r, tx, ty = params.unbind(1)
    x0 = torch.where(xflip.view(-1, 1, 1, 1) > 0, x0.flip(3), x0)
    x0 = torch.where(yflip.view(-1, 1, 1, 1) > 0, x0.flip(2), x0)
    up, down = augment_filters(S, device)  # (6S - 4, S), (S, 2S + 12)

    def rotation(angle):  # (B, 2, 2)
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)

    # The map from output to input pixels, origin at the centre, x right and y down: A p + b. [EDM] Tab. 6
    squeeze = torch.diag_embed(2 ** (0.2 * torch.stack([-w, w], dim=1)))
    A = rotation(theta) @ rotation(-r) @ squeeze @ rotation(r) * 2 ** (-0.2 * scale).view(-1, 1, 1)
    b = -(A @ (0.125 * S * torch.stack([tx, ty], dim=1))[:, :, None])  # (B, 2, 1)

    # Image point c lies at 2 c - 1/2 of the doubled grid, whose pixel p takes its value at q.
    side, n = 2 * S + 12, len(up)
    axis = torch.arange(side, device=device) + 0.5 - side / 2
    p = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).view(1, 2, -1)  # (1, 2, side^2), x first
    q = 2 * (A @ ((p + 0.5) / 2) + b) - 0.5
    grid = (q * 2 / n).transpose(1, 2).view(-1, side, side, 2)
    canvas = F.grid_sample(up @ x0 @ up.T, grid, align_corners=False)
    return down @ canvas @ down.T


@functools.cache
def augment_filters(S, device):
    """For S pixels: reflect by S - 1 and upsample (6S - 4, S); downsample and crop (S, 2S + 12)."""
    taps = torch.tensor(SYM6).view(1, 1, -1)
    reflected = F.pad(torch.eye(S)[:, None], [S - 1, S - 1], mode="reflect")  # a row per pixel, (S, 1, 3S - 2)
    up = F.conv_transpose1d(reflected, taps, stride=2, padding=5)[:, 0].T
    down = F.conv1d(torch.eye(2 * S + 12)[:, None, 1:], taps, stride=2)[:, 0].T
    return up.to(device), down.to(device)


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
    side = 8 if device.type == "cuda" else 4
    noise = torch.randn(side**2, *ema.shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    y = torch.arange(len(noise), device=device) % ema.classes if ema.classes else None
    images = to_uint8(diffusion.sample(ema, noise, y=y))
    save_image(images / 255, Path(args.out, f"samples_{epoch:04d}.png"), nrow=side, padding=2, pad_value=1)


# ---- 8. Flags ----------------------------------
@told("--cl-t, --layer or other flags do not fit")
def parse_args(argv=None):
    """Flags -> Namespace, every default resolved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("model, augmentation, contrast").add_argument
    add("--model", choices=["ddpm", "edm", "rf"], default="ddpm", help="formulation (default: ddpm)")
    add("--backbone", choices=[*BACKBONES], default="ddpm", help="35.7, 56.5 or 1.7 M parameters (default: ddpm)")
    add("--self-cond", nargs="?", choices=["adaptive", "add"], const="adaptive", help="(default: off; bare: adaptive)")
    add("--layer", help="decoder block of the feature, out_1 .. (default: [P] Tab. 10)")
    add("--aug", type=float, metavar="P", help="probability of each transform (default: 0; 0.12 with --cl)")
    add("--cl", type=float, metavar="GAMMA", default=0.0, help="weight of the MoCo loss (default: 0; [P]: 0.01)")
    add("--cl-head", choices=["time", "moco"], default="time", help="time-dependent or not (default: time)")
    add("--cl-t", type=float, metavar="LEVEL", help="level of teacher and probe (default: [P] Tab. 10)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="shapes", help="shapes, cifar10, cifar100 or a folder ROOT/NAME (default: shapes)")
    add("--data", default="./data", metavar="ROOT", help="of data sets (default: ./data)")
    add("--resolution", type=int, help="(default: shapes 16, CIFAR 32, folders 64)")
    add = parser.add_argument_group("optimisation ([P] Tab. 11)").add_argument
    add("--epochs", type=int, help="(default: 2000; tiny 5)")
    add("--batch", type=int, help="over all ranks (default: ddpm 512, ddpmpp 256, tiny 32)")
    add("--accum", type=int, default=1, help="passes per batch (default: 1)")
    add("--lr", type=float, help="after a warm-up of 13 epochs, EDM 200 (default: 4e-4; tiny 2e-3)")
    add("--ema", type=float, help="decay per step (default: 0.9999, EDM 0.9993, tiny 0.999)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="auto: bf16 where it is fast")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on GPUs)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="(default: runs/<from the flags>)")
    add("--resume", action="store_true", help="go on; with --out by the run's flags")
    add("--init", metavar="FILE", help="start from official weights")
    add("--save-every", type=int, help="epochs between epoch_NNNN.pt (default: a tenth of --epochs)")
    add("--max-steps", type=int, help="stop there; 0 with --init makes a checkpoint")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = read_flags(parser, argv)

    tiny, resolution = args.backbone == "tiny", args.resolution or RESOLUTIONS.get(args.dataset, 64)
    defaults = PAPER | DEFAULTS[args.model] | {"resolution": resolution, "aug": 0.12 if args.cl > 0 else 0.0}
    if tiny:
        defaults |= TINY
    else:
        layers = LAYERS[args.model, args.backbone]
        defaults |= {"batch": BATCH[args.backbone], "layer": layers[args.dataset != "cifar10"]}
    if resolution >= 64 and (args.model, args.backbone) == ("edm", "ddpm"):
        defaults |= {"layer": "out_5", "cl_t": 0.2964}  # [P] Tab. 10, the 64-pixel column
    return resolve_flags(parser, args, defaults, [args.dataset, args.model, args.backbone])


def build(args):
    """Untrained (UNet, DDPM | EDM | RF), on the CPU."""
    net = UNet(args.resolution, **BACKBONES[args.backbone], dropout=args.dropout, aug_dim=9 if args.aug > 0 else 0,
               layer=args.layer, self_cond=args.self_cond)
    if args.model == "edm":
        return net, EDM(uncertainty=args.aug > 0)  # [P] Tab. 8
    return net, DDPM() if args.model == "ddpm" else RF()


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
    """Adam on everything. [P] Tab. 11"""
    return torch.optim.Adam(objective.parameters(), lr=args.lr, fused=True)


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
    with told("stopped", (OSError, torch.OutOfMemoryError)):
        main(parse_args())
