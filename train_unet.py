"""Train a UNet that generates and represents: DDAE++ under DDPM, EDM or rectified flow, in one file.

    python train_unet.py --dataset shapes --backbone tiny --model edm --self-cond    # a CPU core, five minutes
    torchrun --nproc_per_node=4 train_unet.py --dataset cifar100 --model edm --self-cond --cl 0.01

Begin with SelfConditioning, UNet.run (where it acts), DDPM, EDM or RF, Objective and teacher_key (the losses), main.
Sources and marks (UNSPECIFIED: the paper leaves it open; DEVIATION: we depart from the paper or its ancestor):
    [P]    DDAE++, arXiv:2505.10999v1          [DDAE] Xiang et al., arXiv:2303.09769
    [DDPM] Ho et al., arXiv:2006.11239         [DDIM] Song et al., arXiv:2010.02502
    [EDM]  Karras et al., arXiv:2206.00364     [EDM2] Karras et al., arXiv:2312.02696
    [RF]   Liu et al., arXiv:2209.03003        [MoCo] Chen et al., MoCo v3, arXiv:2104.02057
Symbols:
    x0     clean image in [-1, 1]              x_t    noisy image; *_hat is a prediction: x0_hat, eps_hat, v_hat
    noise  standard normal, the paper's eps    level  DDPM's step, EDM's sigma or RF's time of each image, (B,)
    t      the network's time, (B,)            e_t    time embedding, (B, E)
    feat   pooled feature of --layer, (B, D)   e      e_t with the augmentation label; self-conditioning adds to it
    aug    augmentation label, (B, 9)          q, k   contrastive query and key, (B, 256)
    B batch   C, H, W image   D, E widths
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
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # wrong gradients: pytorch #190796, #193061

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, PngImagePlugin
from scipy.integrate import solve_ivp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # it gives NaN gradients: pytorch #169849, #196678
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes; else images with a long text are refused

# Base width, multiple of it per resolution, blocks per resolution: [P] Tab. 9. tiny is our own, for a CPU.
BACKBONES = {"ddpm": {"width": 128, "mult": (1, 2, 2, 2), "blocks": 2, "biggan": False},
             "ddpmpp": {"width": 128, "mult": (2, 2, 2), "blocks": 4, "biggan": True},
             "tiny": {"width": 32, "mult": (1, 2, 3), "blocks": 1, "biggan": False}}
# (formulation, backbone): feature layer on (CIFAR-10, others). [P] Tab. 10; UNSPECIFIED beyond CIFAR
LAYERS = {("ddpm", "ddpm"): ("out_6", "out_6"), ("ddpm", "ddpmpp"): ("out_7", "out_8"),
          ("edm", "ddpm"): ("out_7", "out_6"), ("edm", "ddpmpp"): ("out_9", "out_8"),
          ("rf", "ddpm"): ("out_7", "out_7"), ("rf", "ddpmpp"): ("out_8", "out_8")}
# Dropout, EMA: [P] Tab. 8. Warm-up (epochs, fewer in short runs): Tab. 11. cl_t, level of teacher and probe: Tab. 10.
FORMULATIONS = {"ddpm": {"dropout": 0.1, "ema": 0.9999, "warmup": 13, "cl_t": 11},
                "edm": {"dropout": 0.13, "ema": 0.9993, "warmup": 200, "cl_t": 0.06},
                "rf": {"dropout": 0.1, "ema": 0.9999, "warmup": 13, "cl_t": 0.06}}
PAPER = {"epochs": 2000, "lr": 4e-4, "cooldown": 0.0, "cl_hidden": 4096}  # [P] Tab. 11; width of the head: [MoCo]
BATCH = {"ddpm": 512, "ddpmpp": 256}  # [P] Tab. 11
# Ours. cooldown: the share of all steps in which lr falls.
TINY = {"epochs": 5, "batch": 32, "lr": 2e-3, "ema": 0.999, "cooldown": 0.3, "cl_hidden": 512, "dropout": 0.0}
NEW_WEIGHTS = ("self_cond.", "time_emb.aug_emb.")  # what [P] adds to the official networks
RESOLUTIONS = {"shapes": 16, "cifar10": 32, "cifar100": 32}  # other data sets: 64
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

class TimeEmbedding(nn.Module):
    """Times (B,), and the augmentation label if given, through a two-layer MLP: (B, 4 width) float32."""
    def __init__(self, width, aug_dim):
        super().__init__()
        self.width = width
        self.lin1 = nn.Linear(width, 4 * width)
        self.lin2 = nn.Linear(4 * width, 4 * width)
        self.aug_emb = nn.Linear(aug_dim, width, bias=False) if aug_dim else None

    def forward(self, t, aug=None):
        half = self.width // 2
        freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        angles = t.float()[:, None] * freqs  # (B, width / 2)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, width)
        with torch.autocast(t.device.type, enabled=False):  # bf16 cannot tell neighbouring steps apart
            if aug is not None:
                emb = emb + self.aug_emb(aug)
            return self.lin2(F.silu(self.lin1(emb)))

class ResBlock(nn.Module):
    """Two convolutions, with the embedding added between them, and a shortcut. BigGAN's also halves or doubles."""
    def __init__(self, c_in, c_out, emb_dim, dropout, resample=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))  # of e; the name is [DDAE]'s
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
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, 1, H * W, C)
        q, k, v = self.projection(tokens).chunk(3, dim=3)  # each (B, 1, HW, C)
        h = self.output(attention(q, k, v))
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)

class UNetBlock(nn.Module):
    """A residual block, then attention where asked for."""
    def __init__(self, c_in, c_out, emb_dim, dropout, attention):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb_dim, dropout)
        self.attn = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, e):
        return self.attn(self.res(x, e))

class Resample(nn.Module):
    """Halve or double the resolution: by DDPM's convolution (conv), or by BigGAN's residual block (op)."""
    def __init__(self, channels, emb_dim, dropout, direction, biggan):
        super().__init__()
        self.up = direction == "up"
        self.op = ResBlock(channels, channels, emb_dim, dropout, direction) if biggan else None
        self.conv = None if biggan else nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=1)

    def forward(self, x, e):
        if self.op is not None:
            return self.op(x, e)
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)

class UNet(nn.Module):
    """The UNet of DDPM or DDPM++, with self-conditioning after one decoder block. [P] Tab. 9, weight names: [DDAE].
    resolution: image side; attention stands where it is 16, and in the middle. width, mult: base channels and their
    multiple per resolution. blocks: per resolution, one more in the decoder. biggan: DDPM++. aug_dim: length of the
    augmentation label or 0. layer: decoder block of the feature, out_1 .. out_n. self_cond: None, adaptive or add.
    """
    def __init__(self, resolution, width, mult, blocks, biggan, dropout=0.0, aug_dim=0, layer=None, self_cond=None):
        super().__init__()
        if resolution % 2 ** (len(mult) - 1) != 0:
            raise ValueError(f"{resolution} pixels cannot be halved {len(mult) - 1} times")
        self.shape, self.classes = (3, resolution, resolution), 0  # the UNets of [P] are unconditional
        self.emb_dim = emb_dim = 4 * width
        self.time_emb = TimeEmbedding(width, aug_dim)
        self.image_proj = nn.Conv2d(3, width, 3, padding=1)
        # Down path. Each output is kept for the up path, beginning with the first convolution's.
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skip_widths = width, [width]  # c: channels so far
        for i, multiple in enumerate(mult):
            side, c_out = resolution // 2**i, multiple * width
            for _ in range(blocks):
                self.down.append(UNetBlock(c, c_out, emb_dim, dropout, attention=side == 16))
                c = c_out
                skip_widths.append(c)
            if i < len(mult) - 1:
                self.down.append(Resample(c, emb_dim, dropout, "down", biggan))
                skip_widths.append(c)
        res1, res2 = ResBlock(c, c, emb_dim, dropout), ResBlock(c, c, emb_dim, dropout)
        self.middle = nn.ModuleDict({"res1": res1, "attn": Attention(c), "res2": res2})
        # Up path, from the lowest resolution. Its blocks out_1, out_2, .. are [P]'s decoder blocks.
        self.up_names, widths = [], {}  # names (None: doubles the resolution), and channels by name
        for i in reversed(range(len(mult))):
            side, c_out = resolution // 2**i, mult[i] * width
            for _ in range(blocks + 1):
                self.up.append(UNetBlock(c + skip_widths.pop(), c_out, emb_dim, dropout, attention=side == 16))
                c, name = c_out, f"out_{len(widths) + 1}"
                self.up_names.append(name)
                widths[name] = c
            if i > 0:
                self.up.append(Resample(c, emb_dim, dropout, "up", biggan))
                self.up_names.append(None)
        self.norm = nn.GroupNorm(8, c)  # as in [DDAE]; all others have 32 groups
        self.final = nn.Conv2d(c, 3, 3, padding=1)
        self.layers = list(widths)
        self.layer = layer or self.layers[-1]
        if self.layer not in widths:
            raise ValueError(f"there is no layer {layer!r}, only {', '.join(self.layers)}")
        if self_cond and self.layer == self.layers[-1]:
            raise ValueError(f"self-conditioning after {self.layer} leaves no decoder: take an earlier layer")
        self.feat_dim = widths[self.layer]
        self.init_weights()  # before SelfConditioning, which has a start of its own
        self.self_cond = SelfConditioning(self.feat_dim, self.feat_dim, emb_dim, self_cond) if self_cond else None

    def init_weights(self):
        """Xavier's uniform; residual branches and the output end in zeros. UNSPECIFIED, near [DDPM]."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2[1].weight)
            if isinstance(module, Attention):
                nn.init.zeros_(module.output.weight)
        nn.init.zeros_(self.final.weight)

    def run(self, x, t, y=None, aug=None, stop=None, maps=None):
        """All blocks, or those up to `stop`: (prediction or None, feat, e_t). The dict `maps` gets decoder outputs."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be (B, *{self.shape}), not {tuple(x.shape)}")
        if y is not None or (aug is not None and self.time_emb.aug_emb is None):
            raise ValueError("this network has no classes for y, or no aug_dim for aug")
        e_t = self.time_emb(t)  # (B, E), of time alone
        e = e_t if aug is None else self.time_emb(t, aug)  # what the blocks see
        skips = [self.image_proj(x)]
        for block in self.down:
            skips.append(block(skips[-1], e))
        h = self.middle["attn"](self.middle["res1"](skips[-1], e))
        h = self.middle["res2"](h, e)
        feat = None
        for name, block in zip(self.up_names, self.up, strict=True):
            if name is None:
                h = block(h, e)  # double the resolution
                continue
            h = block(torch.cat([h, skips.pop()], dim=1), e)
            if maps is not None:
                maps[name] = h
            if name == self.layer:
                feat = h.float().mean(dim=(2, 3))  # (B, D)
            if name == stop:
                return None, feat, e_t
            if name == self.layer and self.self_cond is not None:
                # [P] self-conditioning: the feature joins the embedding of all later blocks. Its scale depends on e_t,
                # on time alone: how an image was augmented should not decide how much its content counts.
                e = self.self_cond(e, e_t, feat)
        return self.final(F.silu(self.norm(h))), feat, e_t

    def forward(self, x, t, y=None, aug=None, with_feat=False):
        """Prediction (B, 3, H, W) from x (B, 3, H, W) and t (B,), the formulation's inputs; with_feat adds feat, e_t.
        y: None, these UNets are unconditional. aug: augmentation label (B, 9), None is zeros.
        """
        prediction, feat, e_t = self.run(x, t, y, aug)
        return (prediction, feat, e_t) if with_feat else prediction

    def encode(self, x, t, y=None, aug=None):
        """The pass up to --layer only: feat (B, D) float32 and e_t (B, E)."""
        _, feat, e_t = self.run(x, t, y, aug, stop=self.layer)
        return feat, e_t

    def features(self, x, t, y=None, pool="gap", last=None):
        """Means over pixels of all decoder blocks, or of those up to `last`: {layer: (B, D)} float32, by depth."""
        if pool != "gap":
            raise ValueError(f"a UNet has no tokens: use --pool gap, not {pool}")
        maps = {}
        self.run(x, t, y, stop=last, maps=maps)
        return {name: h.float().mean(dim=(2, 3)) for name, h in maps.items()}

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

class Formulation(nn.Module):
    """A diffusion process: check_level, draw_level, add_noise, inputs, loss, sample, and its LEVELS in probe.py."""
    def features(self, net, x0, level, noise, y=None, pool="gap", last=None):
        """net.features of x0 noised to `level`: what probe.py reads."""
        x, t = self.inputs(x0, level, noise)
        return net.features(x, t, y, pool, last)

class DDPM(Formulation):
    """A level is a step, from 0 (clean) to 1000; the network predicts the noise. [DDPM] Sec. 2, [P] Tab. 8"""
    def __init__(self, time_scale):
        super().__init__()
        self.time_scale = time_scale  # network time per step: 1e-3 for UNets, 0.999 for U-ViT
        betas = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])  # of steps 0 .. 1000
        self.register_buffer("alphabar", (1 - betas).log().cumsum(0).exp(), persistent=False)
        # DEVIATION from [DDIM], as in [DDAE]: the sampler's table counts one beta more; level 0 has alphabar 0.9999.
        betas = torch.linspace(1e-4, 0.02, 1001)
        self.register_buffer("alphabar_ddim", (1 - betas).log().cumsum(0).exp(), persistent=False)

    def check_level(self, level):
        """Raise ValueError unless `level` is a step."""
        if not 0 <= level <= 1000 or level % 1 != 0:
            raise ValueError(f"noise level {level:g}: DDPM takes whole steps from 0 to 1000")

    def draw_level(self, n, generator):
        """Steps of n training images, uniform over 1 .. 1000: (n,) int64."""
        return torch.randint(1, 1001, (n,), generator=generator, device=generator.device)

    def add_noise(self, x0, level, noise):
        """The forward process, images (B, C, H, W): x_t = sqrt(alphabar_t) x0 + sqrt(1 - alphabar_t) noise."""
        alphabar = self.alphabar[per_image(level, x0).long()]  # (B, 1, 1, 1)
        return alphabar.sqrt() * x0 + (1 - alphabar).sqrt() * noise

    def inputs(self, x0, level, noise):
        """What the network sees: x_t (B, C, H, W) and its time (B,)."""
        t = per_image(level, x0).flatten().float() * self.time_scale
        return self.add_noise(x0, level, noise), t

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Return the loss, the unweighted loss (here the same), and (feat, e_t). Mean squared error of the noise."""
        x_t, t = self.inputs(x0, level, noise)
        eps_hat, feat, e_t = net(x_t, t, y, aug, with_feat=True)
        loss = F.mse_loss(eps_hat.float(), noise)
        return loss, loss, (feat, e_t)

    def sample(self, net, noise, steps=100, y=None):
        """DDIM, eta 0, in at least `steps` steps: noise (B, C, H, W) -> x0. [DDIM] Eq. 12; x0 clipped as in [DDAE]."""
        levels = list(range(1, 1001, 1000 // min(steps, 1000)))  # 1, 11, 21, .., 991
        levels = levels[::-1] + [0]
        x = noise
        for level, next_level in zip(levels[:-1], levels[1:], strict=True):
            alphabar, alphabar_next = self.alphabar_ddim[level], self.alphabar_ddim[next_level]
            t = torch.full((len(x),), level * self.time_scale, device=x.device)
            eps_hat = net(x, t, y).float()
            x0_hat = ((x - (1 - alphabar).sqrt() * eps_hat) / alphabar.sqrt()).clamp(-1, 1)
            eps_hat = (x - alphabar.sqrt() * x0_hat) / (1 - alphabar).sqrt()  # of the clipped x0_hat
            x = alphabar_next.sqrt() * x0_hat + (1 - alphabar_next).sqrt() * eps_hat
        return x

class Uncertainty(nn.Module):
    """u, the learned log variance of EDM's loss: frozen Fourier features of ln(sigma) / 4, one linear layer. [EDM2]"""
    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))
        self.linear = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.linear.weight)  # UNSPECIFIED: it starts at u = 0, no weighting

    def forward(self, t):
        features = math.sqrt(2) * torch.cos(t[:, None] * self.freqs + self.phases)  # (B, width)
        return self.linear(features)[:, 0]

class EDM(Formulation):
    """A level is sigma, the noise's standard deviation; D(x; sigma) predicts x0. [EDM] Tab. 1, [P] Tab. 8"""

    sigma_min, sigma_max = 0.002, 80.0
    sigma_data = 0.5

    def __init__(self, uncertainty=False):
        super().__init__()
        self.uncertainty = Uncertainty() if uncertainty else None  # [P] App. A

    def check_level(self, level):
        """Raise ValueError unless `level` is a sigma that the network has learned."""
        if not self.sigma_min <= level <= self.sigma_max:
            raise ValueError(f"noise level {level:g}: EDM takes sigma from {self.sigma_min} to {self.sigma_max}")

    def draw_level(self, n, generator):
        """Sigmas of n training images, ln sigma ~ N(-1.2, 1.2^2): (n,)."""
        return (1.2 * torch.randn(n, generator=generator, device=generator.device) - 1.2).exp()

    def add_noise(self, x0, level, noise):
        """The forward process, images (B, C, H, W): x_t = x0 + sigma noise."""
        return x0 + per_image(level, x0) * noise

    def scalings(self, sigma):
        """c_skip, c_out, c_in, c_noise at sigma (B, 1, 1, 1), each of that shape. [EDM] Tab. 1"""
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4

    def inputs(self, x0, level, noise):
        """What the network sees: c_in x_t (B, C, H, W) and its time, c_noise (B,)."""
        _, _, c_in, c_noise = self.scalings(per_image(level, x0).float())
        return c_in * self.add_noise(x0, level, noise), c_noise.flatten()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Return the loss, the loss without learned weights, and (feat, e_t). Squared error of D, over c_out^2."""
        c_skip, c_out, c_in, c_noise = self.scalings(per_image(level, x0))
        x_t, t = self.add_noise(x0, level, noise), c_noise.flatten()
        output, feat, e_t = net(c_in * x_t, t, y, aug, with_feat=True)
        x0_hat = c_skip * x_t + c_out * output.float()
        loss = ((x0_hat - x0) ** 2 / c_out**2).mean(dim=(1, 2, 3))  # (B,)
        unweighted = loss.mean()
        if self.uncertainty is not None:  # [P] with augmentation
            with torch.autocast(x0.device.type, enabled=False):
                u = self.uncertainty(t)  # t is ln(sigma) / 4
            loss = loss / u.exp() + u
        return loss.mean(), unweighted, (feat, e_t)

    def denoise(self, net, x_t, sigma, y=None):
        """D(x_t; sigma), the x0_hat (B, C, H, W) float32 of x_t at noise sigma. [EDM] Eq. 7"""
        c_skip, c_out, c_in, c_noise = self.scalings(per_image(sigma, x_t))
        return c_skip * x_t + c_out * net(c_in * x_t, c_noise.flatten(), y).float()

    def schedule(self, steps):
        """Sigmas of the sampler, (steps + 1,) float64: from 80 down to 0.002 with rho 7, then 0. [EDM] Eq. 5"""
        start, end = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        sigmas = torch.linspace(start, end, steps, dtype=torch.float64) ** 7
        return F.pad(sigmas, (0, 1))

    def sample(self, net, noise, steps=18, y=None):
        """Heun's method with a state in float64: noise (B, C, H, W) -> x0. [EDM] Alg. 1"""
        sigmas = self.schedule(steps).tolist()
        x = noise.double() * sigmas[0]

        def slope(x, sigma):
            x0_hat = self.denoise(net, x.float(), sigma, y).double().clamp(-1, 1)  # clipped as in [DDAE]
            return (x - x0_hat) / sigma

        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
            d = slope(x, sigma)
            next_x = x + (next_sigma - sigma) * d
            if next_sigma > 0:  # the second-order correction
                next_x = x + (next_sigma - sigma) * (d + slope(next_x, next_sigma)) / 2
            x = next_x
        return x.float()

class RF(Formulation):
    """A level is a time, from 0 (data) to 1 (noise); the network predicts v = noise - x0. [RF] Eq. 1, [P] Tab. 8"""

    def check_level(self, level):
        """Raise ValueError unless `level` is a time."""
        if not 0 <= level <= 1:
            raise ValueError(f"noise level {level:g}: rectified flow takes times from 0 to 1")

    def draw_level(self, n, generator):
        """Times of n training images, uniform in [0, 1): (n,)."""
        return torch.rand(n, generator=generator, device=generator.device)

    def add_noise(self, x0, level, noise):
        """The forward process, images (B, C, H, W): x_t = (1 - t) x0 + t noise."""
        t = per_image(level, x0)
        return (1 - t) * x0 + t * noise

    def inputs(self, x0, level, noise):
        """What the network sees: x_t (B, C, H, W) and its time (B,), which is the level itself."""
        return self.add_noise(x0, level, noise), per_image(level, x0).flatten().float()

    def loss(self, net, x0, level, noise, y=None, aug=None):
        """Return the loss, the unweighted loss (here the same), and (feat, e_t). Mean squared error of v."""
        x_t, t = self.inputs(x0, level, noise)
        v_hat, feat, e_t = net(x_t, t, y, aug, with_feat=True)
        loss = F.mse_loss(v_hat.float(), noise - x0)
        return loss, loss, (feat, e_t)

    def sample(self, net, noise, y=None):
        """Integrate dx/dt = v from t = 1 to 0 by adaptive RK45: noise (B, C, H, W) -> x0, not clipped.
        The batch is one system of equations, so an image depends a little on the others. UNSPECIFIED: the tolerance.
        """

        def velocity(t, state):  # scipy's state is flat, float64 and on the host
            x = torch.from_numpy(state).to(noise.device, torch.float32).view_as(noise)
            v_hat = net(x, torch.full((len(x),), t, device=x.device), y)
            if not v_hat.isfinite().all():  # else RK45 would look for a smaller step for ever
                raise FloatingPointError("the network gave NaN or infinity")
            return v_hat.double().flatten().cpu().numpy()

        start = noise.double().flatten().cpu().numpy()
        solution = solve_ivp(velocity, (1.0, 0.0), start, method="RK45", rtol=1e-5, atol=1e-5, t_eval=[0.0])
        return torch.from_numpy(solution.y[:, -1]).to(noise.device, torch.float32).view_as(noise)

# ---- 5. Data, augmentation ---------------------
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
    """The "train" or "test" split of --dataset: images uint8 (N, 3, side, side), labels int64 (N,), class names."""
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

def to_x0(images, flip=None):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]; images where flip (B,) is true are mirrored."""
    x0 = images.float() / 127.5 - 1
    if flip is not None:
        x0 = torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)
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
    Half of the images are mirrored, and the network is not told. The augmentation's own flips are in its label.
    """
    draws = {name: values[rows] for name, values in draws.items()}
    x0, aug, y = to_x0(images, draws["flip"]), None, None
    if args.aug > 0:
        params, aug = gate_augment(draws["aug_uniform"], draws["aug_normal"], args.aug)
        x0 = augment(x0, params)
    if args.cond:  # U-ViT and DiT
        y = labels.masked_fill(draws["drop_label"], -1)  # the null class
    return {"x0": x0, "level": draws["level"], "noise": draws["noise"], "y": y, "aug": aug}

def gate_augment(uniform, normal, p):
    """Draw EDM's augmentation: each transform with probability p; xflip is a fair coin, r is 0 in half of the draws.
    uniform (B, 10) in [0, 1), normal (B, 4) -> params (B, 8): flips in {0, 1}, scale, rotation theta, stretch w and its
    angle r, shifts tx and ty, 0 for none; and aug (B, 9), the same for the network, by cosine and sine. [EDM] App. F.2
    """
    u_xflip, u_yflip, u_theta, u_r, gate_yflip, gate_scale, gate_theta, gate_w, gate_shift, gate_r = uniform.unbind(1)
    n_scale, n_w, n_tx, n_ty = normal.unbind(1)
    xflip = (u_xflip < 0.5).float()
    yflip = torch.where(gate_yflip < p, (u_yflip < 0.5).float(), 0)
    scale = torch.where(gate_scale < p, n_scale, 0)
    theta = torch.where(gate_theta < p, (2 * u_theta - 1) * math.pi, 0)
    w = torch.where(gate_w < p, n_w, 0)
    r = torch.where(gate_r < 0.5, (2 * u_r - 1) * math.pi, 0)
    tx = torch.where(gate_shift < p, n_tx, 0)
    ty = torch.where(gate_shift < p, n_ty, 0)
    params = torch.stack([xflip, yflip, scale, theta, w, r, tx, ty], dim=1)
    aug = [xflip, yflip, scale, theta.cos() - 1, theta.sin(), w * r.cos(), w * r.sin(), tx, ty]
    return params, torch.stack(aug, dim=1)

def rotation(angle):
    """Rotation matrices (B, 2, 2) of angles (B,)."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)

def augment(x0, params):
    """EDM's non-leaky augmentation: flips, then one affine warp at twice the resolution. [EDM] App. F.2
    Reflection padding and filtered up- and downsampling are linear along each axis, so each is a constant matrix.
    DEVIATION: the padding is always S - 1; the reference pads as the batch needs, and differs by 2e-5 in corners.
    x0: images (B, C, S, S) float32. params: (B, 8), from gate_augment.
    """
    S, device = x0.shape[-1], x0.device
    xflip, yflip, scale, theta, w, r, tx, ty = params.unbind(1)
    x0 = torch.where(xflip.view(-1, 1, 1, 1) > 0, x0.flip(3), x0)
    x0 = torch.where(yflip.view(-1, 1, 1, 1) > 0, x0.flip(2), x0)
    # [EDM] Tab. 6: scale, rotate, stretch along r, shift. Inverted, p -> A p + b; from the centre, x right and y down.
    stretch = torch.diag_embed(2 ** (0.2 * torch.stack([-w, w], dim=1)))
    A = rotation(theta) @ rotation(-r) @ stretch @ rotation(r) * 2 ** (-0.2 * scale).view(-1, 1, 1)
    shift = 0.125 * S * torch.stack([tx, ty], dim=1)[:, :, None]  # (B, 2, 1)
    b = -(A @ shift)
    # Doubled output at p is doubled input at q, from the centre. Image pixel k is doubled pixel 2k: c is at 2 c - 1/2.
    up, down = augment_filters(S, device)  # (6S - 4, S), (S, 2S + 12)
    side = down.shape[1]
    axis = torch.arange(side, device=device) + 0.5 - side / 2
    p = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).view(1, 2, -1)  # (1, 2, side^2), x first
    q = 2 * (A @ ((p + 0.5) / 2) + b) - 0.5
    grid = (q * 2 / len(up)).transpose(1, 2).view(-1, side, side, 2)  # from -1 to 1
    doubled = up @ x0 @ up.T
    warped = F.grid_sample(doubled, grid, align_corners=False)
    return down @ warped @ down.T

# Low-pass filter of the 12-tap symlet, [EDM] App. F.2
SYM6 = (0.0154041093, 0.00349071208, -0.117990111, -0.0483117426, 0.491055942, 0.787641141,
        0.337929422, -0.0726375228, -0.0210602925, 0.0447249018, 0.00176771186, -0.00780070833)

@functools.cache
def augment_filters(S, device):
    """Matrices for rows of S pixels: up (6S - 4, S) reflects S - 1 at the ends and upsamples, down (S, 2S + 12) halves.
    The margin of 6 is half a filter. Twelve taps have no middle: padding=5 and 1: make the two half shifts cancel.
    """
    taps = torch.tensor(SYM6).view(1, 1, -1)
    padded = F.pad(torch.eye(S)[:, None], [S - 1, S - 1], mode="reflect")  # (S, 1, 3S - 2)
    up = F.conv_transpose1d(padded, taps, stride=2, padding=5)[:, 0].T
    down = F.conv1d(torch.eye(2 * S + 12)[:, None, 1:], taps, stride=2)[:, 0].T
    return up.to(device), down.to(device)

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
    side = 8 if device.type == "cuda" else 4
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(side**2, *net.shape, generator=generator).to(device)
    y = torch.arange(side**2, device=device) % net.classes if net.classes else None
    images = to_uint8(diffusion.sample(net, noise, y=y))
    scale = math.ceil(64 / images.shape[2])  # tiles of 64 pixels or more
    images = F.interpolate(images / 255, scale_factor=scale, mode="nearest")
    save_image(images, f"{args.out}/samples_{name}.png", nrow=side, padding=2, pad_value=1)

# ---- 8. Flags ----------------------------------
# Flags that make the default name of a run
NAME_FLAGS = ("model", "backbone", "self_cond", "layer", "aug", "cl", "cl_head", "cl_t", "ema", "seed")

def parse_args(argv=None):
    """Read the flags; every default is resolved in what is returned."""
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__.splitlines()[0],
                                     epilog="On 4 GPUs: torchrun --nproc_per_node=4 %(prog)s [flags]")
    parser.set_defaults(cond=False)  # no flag: the UNets of [P] are unconditional
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["ddpm", "edm", "rf"], default="ddpm", help="formulation (default: ddpm)")
    add("--backbone", choices=BACKBONES, default="ddpm",
        help="35.7, 56.5 or 1.7 M parameters; tiny is for CPUs (default: ddpm)")
    add("--self-cond", nargs="?", choices=["adaptive", "add"], const="adaptive",
        help="self-conditioning; add is an ablation (default: off; without a value: adaptive)")
    add("--layer", metavar="L",
        help="decoder block whose feature is fed back, contrasted and probed, out_1 .. (default: tiny out_2; else "
        "out_5 to out_9, as in Tab. 10 for each model and data set; a run prints it)")
    add = parser.add_argument_group("augmentation and contrastive loss").add_argument
    add("--aug", type=float, metavar="P",
        help="EDM's augmentation: probability of each transform (default: 0.12 if --cl is on, else 0)")
    add("--cl", type=float, metavar="GAMMA", default=0.0,
        help="weight of the contrastive loss; the paper's is 0.01 (default: 0, off)")
    add("--cl-head", choices=["time", "moco"], default="time", help="projector that depends on time, or MoCo v3's "
        "(default: time)")
    add("--cl-t", type=float, metavar="LEVEL",
        help="noise level of teacher and probe.py: --model ddpm a step 0 .. 1000, edm a sigma 0.002 .. 80, rf a time "
        "0 .. 1 (default: 11, 0.06, 0.06; edm with ddpm at 64 pixels 0.2964)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="shapes", help="shapes, cifar10, cifar100, or a folder in --data (default: shapes)")
    add("--data", default="./data", metavar="ROOT",
        help="ROOT/NAME/{train,test}/<class>/*; images are cropped to squares and resized (default: ./data)")
    add("--resolution", type=int, metavar="N", help="pixels (default: shapes 16, CIFAR 32, others 64)")
    add = parser.add_argument_group("optimisation (the paper's Tab. 11)").add_argument
    add("--epochs", type=int, metavar="N", help="in all, also with --resume (default: 2000; tiny 5)")
    add("--batch", type=int, metavar="N",
        help="images per step, over all GPUs (default: --backbone ddpm 512, ddpmpp 256, tiny 32)")
    add("--accum", type=int, metavar="N", default=1,
        help="passes that a batch is cut into, to save memory; each contrasts its own images (default: 1)")
    add("--lr", type=float,
        help="rises over 13 epochs, EDM 200, at most a quarter; tiny falls at the end (default: 4e-4; tiny 2e-3)")
    add("--ema", type=float, help="EMA decay per step (default: 0.9999, EDM 0.9993, tiny 0.999)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
        help="precision; auto: bf16 where fast, else GPUs fp16, CPUs off (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on GPUs)")
    add("--seed", type=int, metavar="N", default=0, help="of weights, order and noise (default: 0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="folder of the run (default: runs/<a name made from the flags>)")
    add("--resume", action="store_true", help="go on from last.pt in --out; flags that are given replace the run's")
    add("--init", metavar="FILE", help="start from public weights of this network, or from a run's")
    add("--save-every", type=int, metavar="N", help="epochs between epoch_NNNN.pt (default: a tenth of --epochs)")
    add("--max-steps", type=int, metavar="N", help="stop at step N; 0 with --init makes a checkpoint of its weights")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    args = read_flags(parser, argv)
    resolution = args.resolution or RESOLUTIONS.get(args.dataset, 64)
    defaults = {**PAPER, **FORMULATIONS[args.model], "resolution": resolution, "batch": BATCH.get(args.backbone)}
    if args.backbone == "tiny":
        defaults.update(TINY, layer="out_2")
    else:
        on_cifar10, elsewhere = LAYERS[args.model, args.backbone]
        defaults["layer"] = on_cifar10 if args.dataset == "cifar10" else elsewhere
    defaults["aug"] = 0.12 if args.cl > 0 else 0.0  # it makes two views
    if resolution >= 64 and args.model == "edm" and args.backbone == "ddpm":
        defaults.update(layer="out_5", cl_t=0.2964)  # [P] Tab. 10, the 64-pixel column
    return resolve_flags(parser, args, defaults)

def build(args):
    """The untrained network and the diffusion process, on the CPU: (UNet, DDPM, EDM or RF)."""
    net = UNet(args.resolution, **BACKBONES[args.backbone], dropout=args.dropout, aug_dim=9 if args.aug > 0 else 0,
               layer=args.layer, self_cond=args.self_cond)
    if args.model == "ddpm":
        return net, DDPM(time_scale=1e-3)  # t / T
    if args.model == "edm":
        return net, EDM(uncertainty=args.aug > 0)  # [P] Tab. 8
    return net, RF()

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
    """Adam on everything. [P] Tab. 11"""
    return torch.optim.Adam(objective.parameters(), lr=args.lr, fused=True)

def learning_rate(args, step, per_epoch, total):
    """Linear rise, then constant; with a cool-down (tiny networks) the end of the run falls linearly to 0."""
    warmup, cooldown = args.warmup * per_epoch, args.cooldown * total  # steps
    rise, fall = (step + 1) / max(1, warmup), (total - step) / max(1, cooldown)
    return args.lr * min(1, rise, fall)

def ema_decay(args, step):
    """Decay of the average after step 1, 2, ..; the first update copies. UNSPECIFIED: [DDAE]'s, whose n is step - 1."""
    return min(args.ema, 1 - step ** (-2 / 3))

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
