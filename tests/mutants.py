"""Would the tests notice? Plausible single mistakes, made one at a time in a copy of the repository.

    python tests/mutants.py --jobs 4              # all of them, in about half an hour
    python tests/mutants.py --only teacher        # those whose name contains "teacher"

Each mutant is (name, old text, new text) under the file that it is made in; under train_*.py it is made in every train
script that holds the old text, because what they share must stay the same. The old text must occur exactly once in a
file; a fourth entry says which occurrence is meant where it does not. A mutant is caught when a test fails, or when
the tests run out of --limit. tests/test_repo.py does not count here: it reads source text. Not part of CI.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = "rank or sigterm"  # tests that start processes: they come last
FIRST = {  # where a file's mistakes are likely to show; the other tests follow
    "train_*.py": ["closed_forms", "model", "replay", "golden", "data", "train", "uvit", "dit"],
    "train_unet.py": ["closed_forms", "model", "golden", "train", "replay"],
    "train_uvit.py": ["closed_forms", "uvit", "replay"],
    "train_dit.py": ["closed_forms", "dit", "replay"],
    "sample.py": ["protocols", "sample", "uvit"],
    "probe.py": ["protocols", "probe"],
    "fid.py": ["closed_forms", "protocols", "fid"],
}
MUTANTS = {
    "train_*.py": [
        # teacher
        ("teacher in training mode", "copy.deepcopy(net).eval().requires_grad_(False)",
         "copy.deepcopy(net).requires_grad_(False)"),
        ("teacher sees the denoiser's view", "diffusion, views[1])", "diffusion, views[0])"),
        ("teacher at a random level",
         "diffusion.draw_level(n, generator) if level is None else torch.full((n,), level, device=device)",
         "diffusion.draw_level(n, generator)"),
        ("teacher without augmentation label", 'ema(x_t, t, aug=view["aug"], feat="only")', 'ema(x_t, t, feat="only")'),
        ("teacher is the trained network", "teacher_key(ema, ema_projector", "teacher_key(net, ema_projector"),
        ("teacher with the trained projector", "teacher_key(ema, ema_projector", "teacher_key(ema, head.projector"),
        ("teacher's projector never updated", "ema_update(ema_projector, head.projector, decay)", "pass"),
        # objective, optimiser, average
        ("gamma left out", "loss = loss + self.gamma * contrast", "loss = loss + contrast"),
        ("uncertainty weighting off", "EDM(uncertainty=args.aug > 0)", "EDM()"),
        ("no gradient clipping", "clip_grad_norm_(objective.parameters(), 1.0",
         "clip_grad_norm_(objective.parameters(), 1e9"),
        ("network in eval mode", "    objective.train()", "    objective.eval()"),
        ("accumulated gradients not averaged", "scaler.scale(loss / args.accum)", "scaler.scale(loss)"),
        ("gradients never cleared", "        optimizer.zero_grad(set_to_none=True)\n        step += 1",
         "        step += 1"),
        ("learning rate never set", 'group["lr"] = lr', "pass"),
        ("warm-up one step late", "min(1.0, (step + 1) / max", "min(1.0, step / max"),
        ("warm-up counted in steps", "args.warmup * per_epoch", "args.warmup"),
        ("EMA without its own warm-up", "decay = min(args.ema, (1 + step) / (10 + step))", "decay = args.ema"),
        ("EMA the wrong way round", "list(net.parameters()), 1 - decay)", "list(net.parameters()), decay)"),
        ("EMA of the network never updated", "        ema_update(ema, net, decay)", "        pass"),
        # data of a step
        ("same order in every epoch", "seeded(args.seed, 2, order_epoch)", "seeded(args.seed, 2, 0)"),
        ("no shuffling", "torch.randperm(len(images), generator=shuffle)", "torch.arange(len(images))"),
        ("images drawn with replacement", "torch.randperm(len(images), generator=shuffle)",
         "torch.randint(len(images), (len(images),), generator=shuffle)"),
        ("same rows in every step", "order[step % per_epoch * args.batch :]", "order[:]"),
        ("same noise in every step", "seeded(args.seed, 0, step)", "seeded(args.seed, 0, 0)"),
        ("accumulation repeats its rows", "slice((micro * world + rank) * local, (micro * world + rank + 1) * local)",
         "slice(rank * local, (rank + 1) * local)"),
        ("all ranks take the same rows", "slice((micro * world + rank) * local, (micro * world + rank + 1) * local)",
         "slice(micro * world * local, (micro * world + 1) * local)"),
        ("no flips", "torch.rand(n, generator=generator, device=device) < 0.5",
         "torch.rand(n, generator=generator, device=device) < 0.0"),
        ("flips upside down", 'torch.where(draws.pop("flip").view(-1, 1, 1, 1), x0.flip(3), x0)',
         'torch.where(draws.pop("flip").view(-1, 1, 1, 1), x0.flip(2), x0)'),
        ("augmentation label without augmentation", '{"x0": augment(x0, params), ', '{"x0": x0, '),
        ("augmentation not told", '"aug": augment_label(params)}', '"aug": augment_label(0 * params)}'),
        ("null class off by one", "torch.where(drop, net.classes, ", "torch.where(drop, net.classes - 1, "),
        ("labels never dropped", "device=device) < args.label_drop", "device=device) < 0"),
        ("labels of other images", "labels[rows].to(device", "labels[: args.batch].to(device"),
        ("labels never shown", "        if net.classes:  #", "        if False:  #"),
        # what is kept
        ("epoch file holds the trained weights", 'epoch:04d}.pt", ema=ema.state_dict()',
         'epoch:04d}.pt", ema=net.state_dict()'),
        ("last.pt holds the trained weights as EMA", '{"model": net, "ema": ema,', '{"model": net, "ema": net,'),
        ("last.pt holds the EMA as trained weights", '{"model": net, "ema": ema,', '{"model": ema, "ema": ema,'),
        ("sample grid of the trained network", "    save_grid(args, ema, ", "    save_grid(args, net, "),
        ("epoch files at the wrong epochs", "epoch % args.save_every == 0 or", "epoch % args.save_every == 1 or"),
        ("epoch counted one step late", "step // per_epoch, step % per_epoch == 0",
         "(step - 1) // per_epoch, step % per_epoch == 0"),
        ("resume forgets the optimiser", 'optimizer.load_state_dict(state["optimizer"])', "pass"),
        # contrastive head
        ("MoCo scaled by T instead of 2 T", "return 2 * temperature * F.cross", "return temperature * F.cross"),
        ("MoCo's positives of rank 0 on every rank", "device=q.device) + rank * len(q)", "device=q.device)"),
        ("MoCo's key carries a gradient", "k.detach().float()", "k.float()"),
        ("MoCo without predictor", "self.predictor(self.projector(feat, e_t), e_t)", "self.projector(feat, e_t)"),
        ("MoCo's batch norm on one rank's rows", "x = x - rank_mean(x.mean(0))", "x = x - x.mean(0)"),
        ("MoCo's projector not told the time", "if self.time is not None:", "if False:"),
        ("MoCo's last norm with weights", "affine=k < len(pairs) - 1", "affine=True"),
        # data sets
        ("shapes: test split is part of training", '"test": (2000, 1)', '"test": (2000, 0)'),
        ("CIFAR: test split is the training split", 'train=split == "train"', "train=True"),
        ("folders: test split is the training split", 'else ("test", "val")', 'else ("train",)'),
        ("crop from the corner", "left, top = (width - resolution) // 2, (height - resolution) // 2",
         "left, top = 0, 0"),
        ("pixels in [0, 1]", "images.float() / 127.5 - 1", "images.float() / 255"),
        ("pixels cut, not rounded", "* 127.5).round().clamp(0, 255)", "* 127.5).clamp(0, 255)"),
        # DDPM, DDIM
        ("DDPM: no clean step 0", "torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])",
         "torch.linspace(1e-4, 0.02, 1001)"),
        ("DDPM: steps 0 to 999", "torch.randint(1, 1001, (n,)", "torch.randint(0, 1000, (n,)"),
        ("DDIM: no clipping", "/ a.sqrt()).clamp(-1, 1)", "/ a.sqrt())"),
        ("DDIM: noise does not follow the clipping", "eps_hat = (x - a.sqrt() * x0_hat) / (1 - a).sqrt()", "pass"),
        ("DDIM: training's table", "ddim = (1 - torch.linspace(1e-4, 0.02, 1001))", "ddim = (1 - betas)"),
        ("DDIM: steps from 0", "range(1, 1001, 1000 // ", "range(0, 1000, 1000 // "),
        # EDM
        ("EDM: c_noise not divided by 4", "s.flatten().log() / 4", "s.flatten().log()"),
        ("EDM: weight of another table", "weight = (s**2 + sd**2) / (s * sd) ** 2", "weight = 1 / s**2"),
        ("EDM: training noise too strong", "device=generator.device) - 1.2).exp()",
         "device=generator.device) + 1.2).exp()"),
        ("EDM: rho 5", "torch.linspace(high, low, steps, dtype=torch.float64) ** 7",
         "torch.linspace(high ** (7 / 5), low ** (7 / 5), steps, dtype=torch.float64) ** 5"),
        ("EDM: no clipping", ".double().clamp(-1, 1)", ".double()"),
        ("EDM: Euler for Heun", "(d + slope(x_next, s_next)) / 2", "d"),
        ("EDM: label not given to the network", "net(x_in, c_noise, y, aug, feat", "net(x_in, c_noise, y, None, feat"),
        # RF, features
        ("RF: velocity the other way", "F.mse_loss(v_hat.float(), noise - x0)",
         "F.mse_loss(v_hat.float(), x0 - noise)"),
        ("RF: coarse tolerance", "rtol=1e-5, atol=1e-5", "rtol=1e-2, atol=1e-2"),
        ("features of the clean image", "net.features(*self.inputs(x0, level, noise)",
         "net.features(*self.inputs(x0, level, 0 * noise)"),
        # augmentation
        ("augmentation: rotation's sign", "a = rotation(theta) @", "a = rotation(-theta) @"),
        ("augmentation: translation's sign", "b = -(a @", "b = (a @"),
        ("augmentation: scale's sign", "2 ** (-0.2 * scale)", "2 ** (0.2 * scale)"),
        ("augmentation: stretched the other way", "[2 ** (-0.2 * w), 2 ** (0.2 * w)]",
         "[2 ** (0.2 * w), 2 ** (-0.2 * w)]"),
        ("augmentation: shifts too far", "(0.125 * S * ", "(0.25 * S * "),
        ("augmentation: filter reversed", "torch.tensor(SYM6)", "torch.tensor(SYM6[::-1])"),
        ("augmentation: angle r gated by p", 'draws["gate_aniso_rotate"] < 0.5', 'draws["gate_aniso_rotate"] < p'),
        ("augmentation: x-flip gated by p", '[draws["xflip"].float(), ', '[draws["xflip"] * on["yflip"], '),
        ("label: cosine", "theta.cos() - 1, ", "theta.cos(), "),
        ("label: sine", "theta.sin(), w", "-theta.sin(), w"),
        ("label: r's components swapped", "w * r.cos(), w * r.sin()", "w * r.sin(), w * r.cos()"),
        # self-conditioning, in UNet and DiT
        ("self-conditioning: detached", "self.self_cond(e, e_t, pooled)", "self.self_cond(e, e_t, pooled.detach())"),
        ("self-conditioning: scale sees all of e", "self.self_cond(e, e_t, pooled)", "self.self_cond(e, e, pooled)"),
        ("self-conditioning: scale without SiLU", "self.scale(F.silu(e_t)) * f", "self.scale(e_t) * f"),
        ("self-conditioning: MLP starts at random", "        nn.init.zeros_(self.mlp[2].weight)\n", ""),
        ("head is told the label, teacher", "return pooled, e_t", "return pooled, e"),
        ("head is told the label", "return (out, (pooled, e_t))", "return (out, (pooled, e))"),
    ],
    "train_unet.py": [
        ("UNet: sinusoid's order", "emb = torch.cat([angles.sin(), angles.cos()]",
         "emb = torch.cat([angles.cos(), angles.sin()]"),
        ("UNet: groups of the last norm", "nn.GroupNorm(8, c)", "nn.GroupNorm(32, c)"),
        ("UNet: queries and keys swapped with values", "q, k, v = self.projection", "v, k, q = self.projection"),
        ("UNet: no attention in the encoder", "attention = resolution >> level == 16", "attention = False", 1),
        ("UNet: skips first in first out", "skips.pop()], dim=1)", "skips.pop(0)], dim=1)"),
        ("UNet: no dropout", "nn.Dropout(dropout)", "nn.Dropout(0.0)"),
        ("UNet: dropout not handed on", "dropout=args.dropout, ", ""),
        ("UNet: optimiser without the head", "torch.optim.Adam(objective.parameters()",
         "torch.optim.Adam(objective.net.parameters()"),
        ("UNet: EDM's EMA", '"dropout": 0.13, "ema": 0.9993', '"dropout": 0.13, "ema": 0.9999'),
        ("UNet: EDM's dropout", '"edm": {"dropout": 0.13', '"edm": {"dropout": 0.1'),
        ("UNet: batch of ddpmpp", '"ddpmpp": 256', '"ddpmpp": 512'),
        ("UNet: level of the teacher", 'LEVELS = {"ddpm": 11, "edm": 0.06', 'LEVELS = {"ddpm": 11, "edm": 0.6'),
        ("UNet: no augmentation with --cl", '"aug": 0.12 if args.cl > 0 else 0.0', '"aug": 0.0'),
        ("UNet: layer of other data sets", 'layers[args.dataset != "cifar10"]', "layers[0]"),
        ("UNet: learning rate", '"lr": 2e-3 if tiny else 4e-4', '"lr": 2e-3 if tiny else 2e-4'),
    ],
    "train_uvit.py": [
        ("U-ViT: sinusoid's order", "torch.cat([angles.cos(), angles.sin()]", "torch.cat([angles.sin(), angles.cos()]"),
        ("U-ViT: no mask", "mask[:, :2] = torch.eye(2, device=x.device)", "pass"),
        ("U-ViT: mask one way only", "mask[:, :2] = torch.eye(2, device=x.device)", "mask[0, 1] = False"),
        ("U-ViT: skips first in first out", "skips.pop() if", "skips.pop(0) if"),
        ("U-ViT: skip before x", "torch.cat([x, skip], dim=2)", "torch.cat([skip, x], dim=2)"),
        ("U-ViT: pooling takes all tokens", "image = h[:, -self.length :].float()", "image = h.float()"),
        ("U-ViT: contrast on the mean", '"cl_target": "cls" if args.cls_token else "gap"', '"cl_target": "gap"'),
        ("U-ViT: [CLS] without position", "(self.cls_token + self.cls_pos_embed).expand", "self.cls_token.expand"),
        ("U-ViT: null class is class 0", "null = table[-1] if", "null = table[0] if"),
        ("U-ViT: time in [0, 1000]", "DDPM(time_scale=0.999)", "DDPM(time_scale=1.0)"),
        ("U-ViT: positions decay", 'name.endswith(("bias", "pos_embed"))', 'name.endswith("bias")'),
        ("U-ViT: betas", "betas=(0.99, 0.999)", "betas=(0.9, 0.999)"),
        ("U-ViT: optimiser without the head", "in objective.named_parameters():",
         "in objective.net.named_parameters():"),
        ("U-ViT: layer at 64 pixels", 'LAYERS = ("out_2", "out_1")', 'LAYERS = ("out_2", "out_2")'),
    ],
    "train_dit.py": [
        ("DiT: sinusoid's order", "self.mlp(torch.cat([angles.cos(), angles.sin()]",
         "self.mlp(torch.cat([angles.sin(), angles.cos()]"),
        ("DiT: positions, row first", "torch.cat([column, row], dim=1)", "torch.cat([row, column], dim=1)"),
        ("DiT: rotary turns backwards", "torch.stack([-b, a], dim=4)", "torch.stack([b, -a], dim=4)"),
        ("DiT: rotary, column first", "[angles.repeat_interleave(side, 0), angles.repeat(side, 1)]",
         "[angles.repeat(side, 1), angles.repeat_interleave(side, 0)]"),
        ("DiT: scale and shift swapped", "shift1, scale1, gate1, shift2", "scale1, shift1, gate1, shift2"),
        ("DiT: SiLU on the other half", "F.silu(a) * b", "a * F.silu(b)"),
        ("DiT: channel slowest in a patch", "p, p, C)  # channel fastest\n        out = h.permute(0, 5, 1, 3, 2, 4)",
         "C, p, p)  # channel fastest\n        out = h.permute(0, 3, 1, 4, 2, 5)"),
        ("DiT: fixed positions are trained", "side // patch), requires_grad=False)", "side // patch))"),
        ("DiT: clock not turned round", "1 - per_image(level, x0)", "per_image(level, x0)"),
        ("DiT: velocity not turned round", "noise - x0, -out.float()", "noise - x0, out.float()"),
        ("DiT: cosine along rows", "F.cosine_similarity(v_hat, v, dim=1)", "F.cosine_similarity(v_hat, v, dim=2)"),
        ("DiT: uniform times", "torch.randn(n, generator=generator, device=generator.device).sigmoid()",
         "torch.rand(n, generator=generator, device=generator.device)"),
        ("DiT: three channels guided", "v = v_null + cfg * (v - v_null)",
         "v = torch.cat([v_null[:, :3] + cfg * (v - v_null)[:, :3], v[:, 3:]], 1)"),
        ("DiT: guidance at all times", " and interval[0] <= t <= interval[1]:", ":"),
        ("DiT: interval on the other clock", "cfg_interval=(0.0, 0.89)", "cfg_interval=(0.11, 1.0)"),
        ("DiT: guidance off", "cfg=1.5, cfg_interval", "cfg=1.0, cfg_interval"),
        ("DiT: shift towards data", "shift * t / (1 + (shift - 1) * t)", "t / (shift + (1 - shift) * t)"),
        ("DiT: teacher at a random level", '"level": torch.full((n,), args.cl_t, device=device), ',
         '"level": diffusion.draw_level(n, generator), '),
        ("DiT: both views flipped alike", '"flip": ~view["flip"]', '"flip": view["flip"]'),
        ("DiT: flips upside down", "torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)",
         "torch.where(flip.view(-1, 1, 1, 1), x0.flip(2), x0)"),
        ("DiT: betas", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
        ("DiT: optimiser without the head", "in objective.parameters() if", "in objective.net.parameters() if"),
        ("latents: not divided by the std", " / self.std.view(-1, 1, 1)", ""),
        ("latents: mirror image where none is asked for", "self.raw[:, 1], self.raw[:, 0])",
         "self.raw[:, 0], self.raw[:, 1])"),
        ("latents: mean of the posterior", "mean + std * torch.randn(mean.shape, generator=noise).to(device)", "mean"),
        ("latents: mirror image not mirrored", "for view in (x, x.flip(3))", "for view in (x, x)"),
        ("latents: statistics of the test split", 'made["train"] | {"test"', 'made["test"] | {"test"'),
        ("latents: decoded as they are", "net.decode(z * std + mean)", "net.decode(z)"),
        ("VA-VAE: padded on the other side", "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))"),
        ("VA-VAE: variance for std", "(logvar.clamp(-30, 20) / 2).exp()", "logvar.clamp(-30, 20).exp()"),
    ],
    "sample.py": [
        ("trained weights instead of EMA", 'net.load_state_dict(state["ema"])',
         'net.load_state_dict(state.get("model", state["ema"]))'),
        ("loaded network in training mode", "memory_format=torch.channels_last).eval()",
         "memory_format=torch.channels_last)"),
        ("NaN samples written", "if not torch.isfinite(x0).all():", "if False:"),
        ("noise does not depend on --seed", "default_rng((seed, i))", "default_rng(i)"),
        ("samples without labels", "noise, y=y, **options)", "noise, **options)"),
        ("labels of the first piece", "else y[i], aug)", "else y[: len(t[i])], aug)"),
        ("ranks draw the same blocks", "range(rank * BLOCK, n, world * BLOCK)", "range(0, n, world * BLOCK)"),
        ("images transposed", "block.permute(0, 2, 3, 1)", "block.permute(0, 3, 2, 1)"),
        ("--steps ignored", 'else {"steps": steps}', "else {}"),
    ],
    "probe.py": [
        ("probe tests on the training split", 'load_split(model, args, "test", device)',
         'load_split(model, args, "train", device)'),
        ("probe shows class labels", "self.level, noise, y=None, ",
         "self.level, noise, y=torch.zeros(len(x0)).long() if getattr(self.model.net, 'classes', 0) else None, "),
        ("probe takes the last checkpoint", 'max(results, key=lambda result: best_cell(result["cells"])["linear"])',
         "results[-1]"),
        ("probe takes the worst cell", "return max(cells,", "return min(cells,"),
        ("probe's heads in training mode", "        self.eval()\n", ""),
        ("probe's heads tested on training images", "heads.accuracy(test_feat, test.labels)",
         "heads.accuracy(encode(train.x0(torch.arange(40), torch.zeros(40).bool()), 0), train.labels[:40])"),
        ("probe flips the test images", "encode, test, False, TEST", "encode, test, True, TEST"),
        ("probe never flips", "(torch.rand(n, generator=draw) < 0.5) & args.flip",
         "(torch.rand(n, generator=draw) < 0) & args.flip"),
        ("probe ignores --no-flip", "(torch.rand(n, generator=draw) < 0.5) & args.flip",
         "(torch.rand(n, generator=draw) < 0.5)"),
        ("probe repeats its noise", "args.seed, NOISE, epoch)", "args.seed, NOISE, 0)"),
        ("probe repeats its order", "args.seed, ORDER, epoch)", "args.seed, ORDER, 0)"),
        ("probe's lr stays", "args.lr * 0.5 * (1 + math.cos(", "args.lr * 0.5 * (2 + 0 * math.cos("),
        ("probe's epochs on CIFAR", "15 if cifar else 30", "30"),
        ("probe's lr on latents", "2e-3 if latents else 4e-3", "4e-3"),
        ("probe's level", "else [model.args.cl_t])", "else [model.diffusion.levels[0]])"),
        ("probe's layer", "args.layer or [model.args.layer]", "args.layer or [list(feats)[-1]]"),
        ("probe's cache without flips", "torch.where(flip[index, None], cache[-1][index], cache[0][index])",
         "cache[0][index]"),
        ("kNN among the test images", "bank, cache = fixed_features(encode, train, ",
         "bank, cache = fixed_features(encode, test, "),
        ("subset with labels of others", "images[some], labels[some]", "images[some], labels[: len(some)]"),
        ("kNN votes unweighted", "weight = (similarity / temperature).exp()", "weight = torch.ones_like(similarity)"),
    ],
    "fid.py": [
        ("FID against the test split", 'script.load_data(flags, "train")', 'script.load_data(flags, "test")'),
        ("FID: covariance over n", "torch.outer(mean, mean)) / (n - 1)", "torch.outer(mean, mean)) / n"),
        ("FID: root counted once", "cov_b.trace() - 2 * trace_root", "cov_b.trace() - trace_root"),
        ("FID: Inception in training mode", "channels_last).eval().requires_grad_(False)",
         "channels_last).requires_grad_(False)"),
        ("FID: sampling flags dropped", "generate(model, args.n, rank, world, **options)",
         "generate(model, args.n, rank, world)"),
        ("FID: ranks not summed", "        sums.all_reduce()", "        pass"),
        ("FID: resize aligns corners", "align_corners=False) - 1", "align_corners=True) - 1"),
        ("Inception: padding averaged", "count_include_pad=False", "count_include_pad=True"),
        ("Inception: average in the last block", "Mixed7(2048, max_pool=True)", "Mixed7(2048, max_pool=False)"),
        ("Inception: bias in the logits", "self.fc.weight.double().T\n",
         "self.fc.weight.double().T + self.fc.bias.double()\n"),
        ("IS: images in their order", "np.random.RandomState(2020).permutation(n)", "np.arange(n)"),
        ("IS: every block in the first splits", "split[indices.start : indices.stop]", "split[: len(indices)]"),
        ("IS: std over n - 1", "scores.std(correction=0)", "scores.std()"),
    ],
}  # fmt: skip


def mutate(tree, target, old, new, occurrence=None):
    """Replace the text in every file of the tree that it is meant for."""
    found = 0
    for path in sorted(tree.glob(target)):
        text = path.read_text()
        count = text.count(old)
        if not count:
            continue
        parts, n = text.split(old), occurrence or 1
        if n > count or (occurrence is None and count > 1):
            raise ValueError(f"{count} times in {path.name}")
        text = old.join(parts[:n]) + new + old.join(parts[n:])
        compile(text, path.name, "exec")
        path.write_text(text)
        found += 1
    if not found:
        raise ValueError("not found")


def run_tests(tree, target, limit):
    """The first test that fails, "" if none does: quick tests of the likely files, other quick ones, slow ones."""
    first = [f"tests/test_{name}.py" for name in FIRST[target] if (tree / f"tests/test_{name}.py").is_file()]
    every = sorted(str(path.relative_to(tree)) for path in tree.glob("tests/test_*.py") if path.name != "test_repo.py")
    rest = [name for name in every if name not in first]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for chosen, files in ((f"not ({SLOW})", first), (f"not ({SLOW})", rest), (SLOW, first + rest)):
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", chosen]
        command += ["--basetemp", str(tree / "tmp"), *files]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        tests = subprocess.Popen(command, cwd=tree, env=env, start_new_session=True, **pipes)
        try:
            said, _ = tests.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # the tests and the processes that they started
            tests.communicate()
            return f"no end in {limit} s"
        if tests.returncode:
            failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", said, re.MULTILINE)
            return failed[0] if failed else said.strip().splitlines()[-1]
    return ""


def judge(target, mutant, limit):
    """Verdict, and the first failing test or what is wrong with the mutant. None: of the repository as it is."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__"))
        if mutant is not None:
            try:
                mutate(tree, target, *mutant[1:])
            except (ValueError, SyntaxError) as error:
                return "INVALID", str(error)
        failed = run_tests(tree, target, limit)
    return ("caught" if failed else "SURVIVED"), failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument("--only", default="", help="part of a name, or of a file's name")
    parser.add_argument("--limit", type=int, default=900, help="seconds for each third of the tests (default: 900)")
    parser.add_argument("--check", action="store_true", help="only see whether the texts are still there")
    args = parser.parse_args()
    todo = [(target, mutant) for target, mutants in MUTANTS.items() for mutant in mutants]
    todo = [(target, mutant) for target, mutant in todo if args.only in mutant[0] or args.only in target]
    if args.check:
        for target, mutant in todo:
            with tempfile.TemporaryDirectory() as folder:
                for path in ROOT.glob("*.py"):
                    shutil.copy(path, folder)
                try:
                    mutate(Path(folder), target, *mutant[1:])
                except (ValueError, SyntaxError) as error:
                    print(f"{target:15} {mutant[0]}: {error}")
        return
    counts = {"caught": 0, "SURVIVED": 0, "INVALID": 0}
    with ThreadPoolExecutor(args.jobs) as pool:
        plain = pool.submit(judge, "train_*.py", None, args.limit)
        futures = [(target, mutant[0], pool.submit(judge, target, mutant, args.limit)) for target, mutant in todo]
        for target, name, future in futures:
            if plain.done() and plain.result()[1]:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"the tests fail without any mutant, first {plain.result()[1]}")
            verdict, failed = future.result()
            counts[verdict] += 1
            print(f"{verdict:9} {target:14} {name:48} {failed}", flush=True)
    if plain.result()[1]:
        sys.exit(f"nothing of this counts: the tests fail without any mutant, first {plain.result()[1]}")
    print(f"{counts['caught']} of {len(todo)} caught, {100 * counts['caught'] / max(1, len(todo)):.1f} %; "
          f"{counts['SURVIVED']} survived, {counts['INVALID']} invalid")


if __name__ == "__main__":
    main()
