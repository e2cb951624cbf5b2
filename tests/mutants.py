"""Would the tests notice? Plausible single mistakes, made one at a time in a copy of the repository.

    python tests/mutants.py --jobs 4              # all of them, in about an hour
    python tests/mutants.py --jobs 4 --quick      # the likely tests only; look at what survives these without --quick
    python tests/mutants.py --only "teacher|EMA"  # those whose name holds one of these words

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
    "train_*.py": ["closed_forms", "replay", "train", "model", "golden", "data", "uvit", "dit"],
    "train_unet.py": ["closed_forms", "model", "train", "golden", "replay"],
    "train_uvit.py": ["closed_forms", "uvit", "replay"],
    "train_dit.py": ["closed_forms", "dit", "replay"],
    "sample.py": ["protocols", "sample", "uvit"],
    "probe.py": ["protocols", "probe", "closed_forms"],
    "fid.py": ["closed_forms", "protocols", "fid"],
}
BEFORE = {  # by its name, where to look even before
    "replay": "teacher|view|gamma|uncertainty|clipping|mode|gradients|rate|warm-up|order|rows|shuffl|replace|coin|flip|"
              "noise in|dropout in|label|EMA|epoch|last.pt|grid|without predictor|optimiser without|clock|velocity",
    "train": "resume|metrics|NaN saved|SIGTERM|a run in|cooldown|no epoch|: level|: layer|: batch|: learn|'s EMA",
}
MUTANTS = {
    "train_*.py": [
        ("teacher in training mode",
         "copy.deepcopy(objective).eval().requires_grad_(False)", "copy.deepcopy(objective).requires_grad_(False)"),
        ("teacher is the trained network", "teacher_key(average, views", "teacher_key(objective, views"),
        ("teacher's projector never updated",
         "        ema_update(average, objective,", "        ema_update(average.net, objective.net,"),
        ("gamma left out", "loss + self.gamma * stats", "loss + stats"),
        ("no gradient clipping",
         "clip_grad_norm_(objective.parameters(), 1.0", "clip_grad_norm_(objective.parameters(), 1e9"),
        ("network in eval mode", "    objective.train()", "    objective.eval()"),
        ("accumulated gradients not averaged", "scaler.scale(loss / args.accum)", "scaler.scale(loss)"),
        ("gradients never cleared",
         "        optimizer.zero_grad(set_to_none=True)\n        step += 1", "        step += 1"),
        ("learning rate never set", 'group["lr"] = lr', "pass"),
        ("warm-up counted in steps", "args.warmup * per_epoch", "args.warmup"),
        ("EMA without its own warm-up", "min(args.ema, (1 + step) / (10 + step))", "args.ema"),
        ("EMA the wrong way round", "list(objective.parameters()), 1 - decay)", "list(objective.parameters()), decay)"),
        ("EMA of the network never updated",
         "        ema_update(average, objective,", "        ema_update(average.diffusion, objective.diffusion,"),
        ("no shuffling", "torch.randperm(len(images), generator=shuffle)", "torch.arange(len(images))"),
        ("images drawn with replacement",
         "torch.randperm(len(images), generator=shuffle)",
         "torch.randint(len(images), (len(images),), generator=shuffle)"),
        ("same noise in every step", "seeded(args.seed, 0, step)", "seeded(args.seed, 0, 0)"),
        ("last.pt holds the trained weights as EMA", '"average": average,', '"average": objective,'),
        ("last.pt holds the EMA as trained weights", '{"objective": objective,', '{"objective": average,'),
        ("sample grid of the trained network", "    save_grid(args, average.net, ", "    save_grid(args, net, "),
        ("MoCo scaled by T instead of 2 T", "return 2 * temperature * F.cross", "return temperature * F.cross"),
        ("MoCo's positives of rank 0 on every rank", "device=q.device) + rank * len(q)", "device=q.device)"),
        ("MoCo's key carries a gradient", "k.detach().float()", "k.float()"),
        ("MoCo without predictor", "self.predictor(self.projector(feat, e_t))", "self.projector(feat, e_t)"),
        ("MoCo's projector not told the time", "if self.time is not None:", "if False:"),
        ("MoCo's last norm with weights", "affine=k < len(pairs) - 1", "affine=True"),
        ("images halved upwards", "[side // 2 for side in image.size]", "[-(-side // 2) for side in image.size]"),
        ("--init takes the first weights of several", "for k in [*state][::-1] if", "for k in state if"),
        ("crop from the corner",
         "left, top = (width - resolution) // 2, (height - resolution) // 2", "left, top = 0, 0"),
        ("pixels in [0, 1]", "images.float() / 127.5 - 1", "images.float() / 255"),
        ("pixels cut, not rounded", "* 127.5).round().clamp(0, 255)", "* 127.5).clamp(0, 255)"),
        ("DDPM: no clean step 0",
         "torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])", "torch.linspace(1e-4, 0.02, 1001)"),
        ("DDPM: steps 0 to 999", "torch.randint(1, 1001, (n,)", "torch.randint(0, 1000, (n,)"),
        ("DDIM: no clipping", "/ a.sqrt()).clamp(-1, 1)", "/ a.sqrt())"),
        ("DDIM: noise does not follow the clipping", "eps_hat = (x - a.sqrt() * x0_hat) / (1 - a).sqrt()", "pass"),
        ("DDIM: training's table", "ddim = (1 - torch.linspace(1e-4, 0.02, 1001))", "ddim = (1 - betas)"),
        ("DDIM: steps from 0", "range(1, 1001, 1000 // ", "range(0, 1000, 1000 // "),
        ("EDM: training noise too strong",
         "device=generator.device) - 1.2).exp()", "device=generator.device) + 1.2).exp()"),
        ("EDM: rho 5",
         "torch.linspace(high, low, steps, dtype=torch.float64) ** 7",
         "torch.linspace(high ** (7 / 5), low ** (7 / 5), steps, dtype=torch.float64) ** 5"),
        ("EDM: no clipping", ".double().clamp(-1, 1)", ".double()"),
        ("EDM: Euler for Heun", "(d + slope(x_next, s_next)) / 2", "d"),
        ("RF: velocity the other way",
         "F.mse_loss(v_hat.float(), noise - x0)", "F.mse_loss(v_hat.float(), x0 - noise)"),
        ("RF: coarse tolerance", "rtol=1e-5, atol=1e-5", "rtol=1e-2, atol=1e-2"),
        ("features of the clean image",
         "net.features(*self.inputs(x0, level, noise)", "net.features(*self.inputs(x0, level, 0 * noise)"),
        ("augmentation: scale's sign", "2 ** (-0.2 * scale)", "2 ** (0.2 * scale)"),
        ("augmentation: stretched the other way",
         "torch.stack([-w, w], dim=1)", "torch.stack([w, -w], dim=1)"),
        ("augmentation: shifts too far", "(0.125 * S * ", "(0.25 * S * "),
        ("augmentation: filter reversed", "torch.tensor(SYM6)", "torch.tensor(SYM6[::-1])"),
        ("label: cosine", "theta.cos() - 1, ", "theta.cos(), "),
        ("label: sine", "theta.sin(), w", "-theta.sin(), w"),
        ("label: r's components swapped", "w * r.cos(), w * r.sin()", "w * r.sin(), w * r.cos()"),
        ("self-conditioning: scale without SiLU", "self.scale(F.silu(e_t)) * f", "self.scale(e_t) * f"),
        ("self-conditioning: MLP starts at random", "        nn.init.zeros_(self.mlp[2].weight)\n", ""),
        ("teacher sees the denoiser's view", "average, views[1], args.cl_t", "average, views[0], args.cl_t"),
        ("teacher at the denoiser's level",
         "average.diffusion.inputs(x0, level, noise)", "average.diffusion.inputs(x0, view[1], noise)"),
        ("teacher is told the class",
         "_, aug = view\n    x_t, t = average.diffusion.inputs(x0, level, noise)\n    return "
         "average.head.projector(*average.net.encode(x_t, t, aug=aug))",
         "y, aug = view\n    x_t, t = average.diffusion.inputs(x0, level, noise)\n    return "
         "average.head.projector(*average.net.encode(x_t, t, y, aug=aug))"),
        ("teacher without augmentation label", "average.net.encode(x_t, t, aug=aug)", "average.net.encode(x_t, t)"),
        ("views share their draws",
         "drawn = [draw_numbers(args.batch, net.shape, diffusion, generator) for _ in range(2 if head else 1)]",
         "drawn = [draw_numbers(args.batch, net.shape, diffusion, generator)] * 2"),
        ("warm-up one step late", "rise = (step + 1) / max", "rise = step / max"),
        ("cooldown too late", "max(1.0, args.cooldown * total)", "max(1.0, 0.5 * args.cooldown * total)"),
        ("same order in every epoch", "seeded(args.seed, 2, epoch)", "seeded(args.seed, 2, 0)"),
        ("same rows in every step", "order[nth * args.batch :][: args.batch]", "order[: args.batch]"),
        ("accumulation repeats its rows", "begin = (micro * world + rank) * local", "begin = rank * local"),
        ("all ranks take the same rows", "begin = (micro * world + rank) * local", "begin = micro * world * local"),
        ("same dropout in every step", "seeded(args.seed, 1, step, rank)", "seeded(args.seed, 1, 0, rank)"),
        ("no flips", "flip=uniform[:, 0] < 0.5", "flip=uniform[:, 0] < 0.0"),
        ("flips upside down",
         "torch.where(flip.view(-1, 1, 1, 1), x0.flip(3), x0)", "torch.where(flip.view(-1, 1, 1, 1), x0.flip(2), x0)"),
        ("augmentation label without augmentation", "        x0 = augment(x0, params)", "        augment(x0, params)"),
        ("augmentation not told",
         "params, aug = gate_augment(uniform[:, 2:], normal, args.aug)",
         "params, aug = gate_augment(uniform[:, 2:], normal, args.aug)\n        aug = 0 * aug"),
        ("flip and augmentation share a coin",
         "gate_augment(uniform[:, 2:], normal, args.aug)", "gate_augment(uniform[:, :10], normal, args.aug)"),
        ("labels never dropped", "uniform[:, 1] < 0.1", "uniform[:, 1] < 0"),
        ("label drop and flip share a coin", "uniform[:, 1] < 0.1", "uniform[:, 0] < 0.1"),
        ("labels of other images", "labels[rows[mine]]", "labels[mine]"),
        ("labels never shown", "-1) if args.cond else None", "-1) if False else None"),
        ("epoch file holds the trained weights", '= parts["average"].net', '= parts["objective"].net'),
        ("epoch files at the wrong epochs", "epoch % args.save_every == 0\n", "epoch % args.save_every == 1\n"),
        ("no epoch file at the end", "keep = step == total or step", "keep = step"),
        ("epoch counted one step late",
         "        epoch = step // per_epoch\n", "        epoch = (step - 1) // per_epoch\n"),
        ("resume takes moments as another device laid them out",
         "torch.empty_like(p).copy_(moments[k].view_as(p))", "moments[k].view_as(p)"),
        ("resume forgets the optimiser",
         "            part.load_state_dict(state[name])",
         '            name == "optimizer" or part.load_state_dict(state[name])'),
        ("resume forgets the EMA",
         "            part.load_state_dict(state[name])",
         '            name == "average" or part.load_state_dict(state[name])'),
        ("resume: --max-steps stays", 'parser.set_defaults(**run | {"max_steps": None})', "parser.set_defaults(**run)"),
        ("resume takes no flag of the run", 'parser.set_defaults(**run | {"max_steps": None})', "pass"),
        ("resume: --epochs refused", "if key not in FREE and getattr(args, key)", "if getattr(args, key)"),
        ("resume: other flags accepted",
         "if key not in FREE and getattr(args, key)", "if False and getattr(args, key)"),
        ("resume: a network of any size is built",
         'build(argparse.Namespace(**state["args"]))[0].load_state_dict(state["ema"], assign=True)', "pass"),
        ("a full disk is a traceback", 'told(f"{path} not written: disk full?"), ', ""),
        ("attention in bf16 on a CPU", 'torch.autocast("cpu", enabled=False)', 'torch.autocast("cpu", torch.bfloat16)'),
        ("metrics not cut back", "lines[: 1 + step // LOG_EVERY], b", "lines, b"),
        ("metrics cut back by one step too many", "lines[: 1 + step // LOG_EVERY]", "lines[: step // LOG_EVERY]"),
        ("metrics lose what was run", "lines[: 1 + step // LOG_EVERY]", "lines[1 : 1 + step // LOG_EVERY]"),
        ("NaN saved", "    if not all(map(math.isfinite, values)):", "    if False:"),
        ("SIGTERM ignored", "        stop, due = wanted.tolist()", "        _, due = wanted.tolist()"),
        ("resume: other classes taken", "if args.classes not in ([], classes) or not", "if not"),
        ("resume: an end before its step taken", "    if step > end:", "    if False:"),
        ("one class where there is none", " or not classes and getattr(args, \"cond\", 0) == 1:", ":"),
        ("a folder is begun before its data are there",
         "    # 2. Data: on", "    Path(args.out).mkdir(parents=True, exist_ok=True)\n\n    # 2. Data: on"),
        ("a run in --out is overwritten", "    if last.is_file() and not args.resume:", "    if False:"),
        ("MoCo's batch norm on one rank's rows", "RankMean.apply(x.mean(0))", "x.mean(0)"),
        ("MoCo's batch norm: variance of one rank's rows", "RankMean.apply((x**2).mean(0))", "(x**2).mean(0)"),
        ("shapes: test split is the training split", "10000 if train else 2000, 0 if train else 1,", "10000, 0,"),
        ("CIFAR: test split is the training split",
         "(args.data, train, download=True)", "(args.data, True, download=True)"),
        ("folders: test split is the training split",
         'root / (split if (root / split).is_dir() else "val")', 'root / "train"'),
        ("EDM: c_noise not divided by 4", "sigma.log() / 4", "sigma.log()"),
        ("EDM: no weight", "(x0_hat - x0) ** 2 / c_out**2", "(x0_hat - x0) ** 2"),
        ("EDM: c_skip of another table", "self.sigma_data**2 / total, sigma", "self.sigma_data / total, sigma"),
        ("EDM: uncertainty's second term left out", "loss = loss / u.exp() + u", "loss = loss / u.exp()"),
        ("EDM: label not given to the network",
         "net(c_in * x_t, c_noise.flatten(), y, aug, with_feat=True)",
         "net(c_in * x_t, c_noise.flatten(), y, None, with_feat=True)"),
        ("augmentation: rotation's sign", "A = rotation(theta) @", "A = rotation(-theta) @"),
        ("augmentation: translation's sign", "b = -(A @", "b = (A @"),
        ("augmentation: angle r gated by p", "r * (uniform[:, 9] < 0.5)", "r * (uniform[:, 9] < p)"),
        ("augmentation: x-flip gated by p",
         "    yflip, scale, theta, w = yflip * on_yflip,",
         "    xflip, yflip, scale, theta, w = xflip * on_yflip, yflip * on_yflip,"),
        ("augmentation: ty gated by w's gate", "ty * on_shift", "ty * on_w"),
        ("augmentation: angles of half a turn",
         "(2 * uniform[:, 2:4] - 1) * math.pi", "(uniform[:, 2:4] - 0.5) * math.pi"),
        ("self-conditioning: detached", "self.self_cond(e, e_t, feat)", "self.self_cond(e, e_t, feat.detach())"),
        ("self-conditioning: scale sees all of e", "self.self_cond(e, e_t, feat)", "self.self_cond(e, e, feat)"),
        ("head is told the label, teacher", "return None, feat, e_t", "return None, feat, e"),
    ],
    "train_unet.py": [
        ("UNet: sinusoid's order",
         "emb = torch.cat([angles.sin(), angles.cos()]", "emb = torch.cat([angles.cos(), angles.sin()]"),
        ("UNet: groups of the last norm", "nn.GroupNorm(8, c)", "nn.GroupNorm(32, c)"),
        ("UNet: any aug is taken", " or aug is not None and self.time_emb.aug_emb is None", ""),
        ("UNet: queries and keys swapped with values", "q, k, v = (qkv if", "v, k, q = (qkv if"),
        ("UNet: skips first in first out", "skips.pop()], dim=1)", "skips.pop(0)], dim=1)"),
        ("UNet: no dropout", "nn.Dropout(dropout)", "nn.Dropout(0.0)"),
        ("UNet: dropout not handed on", "dropout=args.dropout, ", ""),
        ("UNet: optimiser without the head",
         "torch.optim.Adam(objective.parameters()", "torch.optim.Adam(objective.net.parameters()"),
        ("UNet: EDM's EMA", '"dropout": 0.13, "ema": 0.9993', '"dropout": 0.13, "ema": 0.9999'),
        ("UNet: EDM's dropout", '"edm": {"dropout": 0.13', '"edm": {"dropout": 0.1'),
        ("UNet: batch of ddpmpp", '"ddpmpp": 256', '"ddpmpp": 512'),
        ("UNet: no augmentation with --cl", '"aug": 0.12 if args.cl > 0 else 0.0', '"aug": 0.0'),
        ("UNet: layer of other data sets", 'layers[args.dataset != "cifar10"]', "layers[0]"),
        ("UNet: uncertainty weighting off", "EDM(uncertainty=args.aug > 0)", "EDM()"),
        ("UNet: uncertainty weighting always on",
         "EDM(uncertainty=args.aug > 0)", "EDM(uncertainty=True)"),
        ("UNet: head is told the label", "self.norm(h))), feat, e_t", "self.norm(h))), feat, e"),
        ("UNet: no attention in the encoder",
         "self.down.append(UNetBlock(c, m * width, emb_dim, dropout, attention=resolution >> i == 16))",
         "self.down.append(UNetBlock(c, m * width, emb_dim, dropout, attention=False))"),
        ("UNet: level of the teacher", '"warmup": 200, "cl_t": 0.06', '"warmup": 200, "cl_t": 0.6'),
        ("UNet: learning rate", '"lr": 4e-4', '"lr": 2e-4'),
        ("UNet: warm-up of EDM", '"warmup": 200', '"warmup": 13'),
    ],
    "train_uvit.py": [
        ("U-ViT: sinusoid's order", "torch.cat([angles.cos(), angles.sin()]", "torch.cat([angles.sin(), angles.cos()]"),
        ("U-ViT: skips first in first out", "skips.pop() if", "skips.pop(0) if"),
        ("U-ViT: skip before x", "torch.cat([x, skip], dim=2)", "torch.cat([skip, x], dim=2)"),
        ("U-ViT: pooling takes all tokens", "h, image = h[:, -self.length :].float(),", "h, image = h.float(),"),
        ("U-ViT: contrast on the mean", '"cl_target": "cls" if args.cls_token else "gap"', '"cl_target": "gap"'),
        ("U-ViT: [CLS] without position", "(self.cls_token + self.cls_pos_embed).expand", "self.cls_token.expand"),
        ("U-ViT: null class is class 0", "y.masked_fill(y < 0, self.classes))[:", "y.masked_fill(y < 0, 0))[:"),
        ("U-ViT: time in [0, 1000]", "DDPM(time_scale=0.999)", "DDPM(time_scale=1.0)"),
        ("U-ViT: positions decay", 'name.endswith(("bias", "pos_embed"))', 'name.endswith("bias")'),
        ("U-ViT: betas", "betas=(0.99, 0.999)", "betas=(0.9, 0.999)"),
        ("U-ViT: optimiser without the head",
         "in objective.named_parameters():", "in objective.net.named_parameters():"),
        ("U-ViT: no mask",
         "torch.eye(2, N, device=x.device).flip(0) > 0", "torch.eye(2, N, device=x.device) > 2"),
        ("U-ViT: mask one way only",
         "torch.eye(2, N, device=x.device).flip(0)", "torch.eye(2, N, device=x.device).flip(0).tril()"),
        ("U-ViT: layer at 64 pixels", '"out_1" if resolution >= 64 else "out_2"', '"out_2"'),
        ("U-ViT: level at 64 pixels", "66 if resolution >= 64 else 11", "11"),
        ("U-ViT: null class off by one", "(uniform[:, 1] < 0.1, -1)", "(uniform[:, 1] < 0.1, 0)"),
        ("U-ViT: nothing is masked", "masked = cls_token and aug_dim > 0", "masked = False"),
    ],
    "train_dit.py": [
        ("DiT: sinusoid's order",
         "self.mlp(torch.cat([angles.cos(), angles.sin()]", "self.mlp(torch.cat([angles.sin(), angles.cos()]"),
        ("DiT: positions, row first", "torch.cat([column, row], dim=1)", "torch.cat([row, column], dim=1)"),
        ("DiT: rotary turns backwards", "torch.stack([-b, a], dim=4)", "torch.stack([b, -a], dim=4)"),
        ("DiT: rotary, column first",
         "[angles.repeat_interleave(side, 0), angles.repeat(side, 1)]",
         "[angles.repeat(side, 1), angles.repeat_interleave(side, 0)]"),
        ("DiT: scale and shift swapped", "shift1, scale1, gate1, shift2", "scale1, shift1, gate1, shift2"),
        ("DiT: SiLU on the other half", "F.silu(a) * b", "a * F.silu(b)"),
        ("DiT: fixed positions are trained", "side // patch), requires_grad=False)", "side // patch))"),
        ("DiT: clock not turned round", "1 - per_image(level, x0)", "per_image(level, x0)"),
        ("DiT: velocity not turned round", "noise - x0, -out.float()", "noise - x0, out.float()"),
        ("DiT: cosine along rows", "F.normalize(v_hat, dim=1", "F.normalize(v_hat, dim=2"),
        ("DiT: cosine of a zero", "dim=1, eps=0.1", "dim=1, eps=1e-8"),
        ("DiT: uniform times",
         "torch.randn(n, generator=generator, device=generator.device).sigmoid()",
         "torch.rand(n, generator=generator, device=generator.device)"),
        ("DiT: interval on the other clock", "cfg_interval=(0.0, 0.89)", "cfg_interval=(0.11, 1.0)"),
        ("DiT: guidance off", "cfg=1.5, cfg_interval", "cfg=1.0, cfg_interval"),
        ("DiT: shift towards data", "shift * t / (1 + (shift - 1) * t)", "t / (shift + (1 - shift) * t)"),
        ("DiT: betas", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
        ("DiT: optimiser without the head", "in objective.parameters() if", "in objective.net.parameters() if"),
        ("VA-VAE: variance for std", "(logvar.clamp(-30, 20) / 2).exp()", "logvar.clamp(-30, 20).exp()"),
        ("DiT: flips upside down", "mirrored = plain.flip(3)", "mirrored = plain.flip(2)"),
        ("DiT: head is told the label", "reshape(-1, *self.shape), feat, e_t", "reshape(-1, *self.shape), feat, e"),
        ("DiT: channel slowest in a patch",
         "p, p, C)\n        return h.permute(0, 5, 1, 3, 2, 4)",
         "C, p, p)\n        return h.permute(0, 3, 1, 4, 2, 5)"),
        ("DiT: three channels guided",
         "return v_null + cfg * (v_class - v_null)",
         "return torch.cat([(v_null + cfg * (v_class - v_null))[:, :3], v_class[:, 3:]], 1)"),
        ("DiT: guidance at all times", " and interval[0] <= t <= interval[1]\n", "\n"),
        ("DiT: guided by class 0", "torch.full_like(y, -1)])", "torch.full_like(y, 0)])"),
        ("DiT: null class off by one",
         "labels.masked_fill(uniform[:, 1] < 0.1, -1)", "labels.masked_fill(uniform[:, 1] < 0.1, 0)"),
        ("latents: not divided by the std", "((z - mean) / std).half()", "(z - mean).half()"),
        ("latents: mean not removed", "((z - mean) / std).half()", "(z / std).half()"),
        ("latents: mirror image where none is asked for",
         "plain, mirrored = images.unbind(1)", "mirrored, plain = images.unbind(1)"),
        ("latents: mean of the posterior", "(mean + std * noise).unflatten", "mean.unflatten"),
        ("latents: mirror image not mirrored",
         "np.stack([images, images[..., ::-1]], axis=1)", "np.stack([images, images], axis=1)"),
        ("latents: statistics of the test split", 'pairs = found["train"][0]', 'pairs = found["test"][0]'),
        ("latents: statistics of the first images",
         "for i in np.random.RandomState(0).permutation(len(pairs))[:STATISTICS]]",
         "for i in range(min(STATISTICS, len(pairs)))]"),
        ("latents: decoded as they are", "net.decode(x * std + mean)", "net.decode(x)"),
        ("VA-VAE: padded on the other side", "nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 0, 1, 0))"),
    ],
    "sample.py": [
        ("trained weights instead of EMA",
         'net.load_state_dict(state["ema"])', 'net.load_state_dict(state.get("model", state["ema"]))'),
        ("loaded network in training mode",
         "memory_format=layout).eval()", "memory_format=layout)"),
        ("NaN samples written", "if not torch.isfinite(x0).all():", "if False:"),
        ("noise does not depend on --seed", "default_rng((seed, i))", "default_rng(i)"),
        ("samples without labels", "noise, y=y, **options)", "noise, **options)"),
        ("labels of the first piece", "else y.split(piece)", "else [y[:piece]] * len(x)"),
        ("ranks draw the same blocks", "range(rank * BLOCK, n, world * BLOCK)", "range(0, n, world * BLOCK)"),
        ("images transposed", "block.permute(0, 2, 3, 1)", "block.permute(0, 3, 2, 1)"),
        ("--steps ignored", '"seed", "steps", "batch"', '"seed", "batch"'),
        ("random labels do not depend on --seed", "default_rng((seed, i, 1))", "default_rng((0, i, 1))"),
    ],
    "probe.py": [
        ("probe shows class labels",
         "self.level, noise, y=None, ",
         "self.level, noise, y=torch.zeros(len(x0)).long() if getattr(self.model.net, 'classes', 0) else None, "),
        ("probe takes the last checkpoint",
         'max(((best_cell(r["cells"]), r) for r in results), key=lambda pair: pair[0]["linear"])',
         '(best_cell(results[-1]["cells"]), results[-1])'),
        ("probe pairs the losses of two formulations", "(type(m.diffusion).__name__, ", "(m.args.model, "),
        ("one axis for all maps", 'name, r["axis"], *r', 'name, results[0]["axis"], *r'),
        ("probe takes the worst cell", "return max(cells,", "return min(cells,"),
        ("probe repeats its noise", "args.seed, NOISE, epoch)", "args.seed, NOISE, 0)"),
        ("probe repeats its order", "args.seed, ORDER, epoch)", "args.seed, ORDER, 0)"),
        ("probe's epochs on CIFAR", "15 if cifar else 30", "30"),
        ("probe's lr on latents", "2e-3 if latents else 4e-3", "4e-3"),
        ("probe's layer", "args.layer or [model.args.layer]", "args.layer or [list(feats)[-1]]"),
        ("subset with labels of others", "images[some], labels[some]", "images[some], labels[: len(some)]"),
        ("probe tests on the training split",
         'load_split(model, args, "test", device)', 'load_split(model, args, "train", device)', 1),
        ("held-out loss on the training split",
         'load_split(model, args, "test", device)', 'load_split(model, args, "train", device)', 2),
        ("held-out loss with EDM's learned weight", "    model.diffusion.uncertainty = None", "    pass"),
        ("held-out loss: one noise for all images", "round(1e6 * level), i)", "round(1e6 * level), 0)"),
        ("held-out loss: difference to the last", '(*earlier, result)[0][', '(*earlier, result)[-1]['),
        ("held-out loss: spread for standard error", "ddof=1) / len(blocks) ** 0.5)", "ddof=1))"),
        ("probe's heads tested on training images",
         ".accuracy(test_feat, test.labels)",
         ".accuracy(stored_features(encode, train, TEST, args.seed), train.labels)"),
        ("probe flips the test images",
         "stored_features(encode, test, TEST, args.seed)", "stored_features(encode, test, TEST, args.seed, True)"),
        ("probe ignores --no-flip", "< 0.5) & args.flip)", "< 0.5))"),
        ("probe never flips", "(torch.rand(n, generator=draw) < 0.5)", "(torch.rand(n, generator=draw) < 0)"),
        ("probe's lr stays", "args.lr * (1 + math.cos(math.pi * progress)) / 2", "args.lr"),
        ("probe's level", 'else [trained["cl_t"]])', "else grid[:1])"),
        ("probe's cache without flips",
         "torch.where(flip[index, None], stored[1][index], stored[0][index])", "stored[0][index]"),
        ("probe's cache: mirror images not mirrored", "FLIPPED, args.seed, flip=True)", "FLIPPED, args.seed)"),
        ("probe's cache: one noise for all blocks",
         "stream_generator(device, seed, stream, block)", "stream_generator(device, seed, stream, 0)"),
        ("probe standardises by the test split", "bank.mean(0), (bank.var(", "test_feat.mean(0), (test_feat.var("),
        ("probe drops the last batch",
         "batches = order.split(args.batch)",
         "batches = [b for b in order.split(args.batch) if len(b) == min(n, args.batch)]"),
        ("probe's batch of ddpm", 'BATCH = {"ddpm": 512', 'BATCH = {"ddpm": 256'),
        ("probe counts raw pixels", '(cell["level"] is not None, cell["linear"])', 'cell["linear"]'),
        ("kNN asks the training images", "knn(test_feat, test.labels, bank,", "knn(bank, train.labels, bank,"),
        ("kNN votes unweighted",
         "weight = (similarity / KNN_TEMPERATURE).exp()", "weight = torch.ones_like(similarity)"),
        ("kNN without normalisation", "F.normalize(query, dim=1), F.normalize(key, dim=1)", "query, key"),
    ],
    "fid.py": [
        ("FID against the test split", 'train_unet.load_data(flags, "train")', 'train_unet.load_data(flags, "test")'),
        ("FID: covariance over n", "torch.outer(mean, mean)) / (n - 1)", "torch.outer(mean, mean)) / n"),
        ("FID: root counted once", "cov_b.trace() - 2 * trace_root", "cov_b.trace() - trace_root"),
        ("FID: Inception in training mode",
         "channels_last).eval().requires_grad_(False)", "channels_last).requires_grad_(False)"),
        ("FID: sampling flags dropped",
         "generate(model, args.n, rank, world, **options)", "generate(model, args.n, rank, world)"),
        ("FID: resize aligns corners", "align_corners=False) - 1", "align_corners=True) - 1"),
        ("Inception: padding averaged", "count_include_pad=False", "count_include_pad=True"),
        ("Inception: bias in the logits",
         "self.fc.weight.double().T\n", "self.fc.weight.double().T + self.fc.bias.double()\n"),
        ("IS: images in their order", "np.random.RandomState(2020).permutation(n)", "np.arange(n)"),
        ("IS: every block in the first splits", "split[indices.start : indices.stop]", "split[: len(indices)]"),
        ("IS: std over n - 1", "scores.std(correction=0)", "scores.std()"),
        ("FID: ranks not summed", "            dist.all_reduce(value)", "            pass"),
        ("Inception: average in the last block", "partial(F.max_pool2d, kernel", "partial(F.avg_pool2d, kernel"),
        ("FID: the highest of several", "lowest = min(range", "lowest = max(range"),
        ("FID: only the last of several is written", '{"results": results}', '{"results": results[-1:]}'),
        ("FID: all scored as the first",
         "sums = measure(net, images, args.batch, rank, world)",
         "sums = measure(net, samples, args.batch, rank, world)"),
        ("FID: reference of other pixels is used", "_{sha}_{net.sha}.npz", "_{net.sha}.npz"),
        ("FID: reference of other weights is used", "_{sha}_{net.sha}.npz", "_{sha}.npz"),
        ("FID: --n ignored for npz", "torch.from_numpy(array[:n])", "torch.from_numpy(array)"),
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


def run_tests(tree, target, name, limit, quick):
    """The first test that fails, "" if none does: quick tests of the likely files, other quick ones, slow ones."""
    first = sorted(FIRST[target], key=lambda test: not re.search(BEFORE.get(test, "$^"), name))
    first = [f"tests/test_{test}.py" for test in first]
    every = sorted(str(path.relative_to(tree)) for path in tree.glob("tests/test_*.py") if path.name != "test_repo.py")
    rest = [name for name in every if name not in first]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    stages = [(f"not ({SLOW})", first), (f"not ({SLOW})", rest), (SLOW, first + rest)]
    for chosen, files in stages[:1] if quick else stages:
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


def judge(target, mutant, limit, quick):
    """Verdict, and the first failing test or what is wrong with the mutant. None: of the repository as it is."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__"))
        if mutant is not None:
            try:
                mutate(tree, target, *mutant[1:])
            except (ValueError, SyntaxError) as error:
                return "INVALID", str(error)
        failed = run_tests(tree, target, mutant[0] if mutant else "", limit, quick)
    return ("caught" if failed else "SURVIVED"), failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument("--only", default="", help="regular expression for names, or files' names")
    parser.add_argument("--limit", type=int, default=900, help="seconds for each third of the tests (default: 900)")
    parser.add_argument("--quick", action="store_true", help="only the quick ones of the likely tests")
    parser.add_argument("--check", action="store_true", help="only see whether the texts are still there")
    args = parser.parse_args()
    todo = [(target, mutant) for target, mutants in MUTANTS.items() for mutant in mutants]
    todo = [(target, mutant) for target, mutant in todo if re.search(args.only, f"{mutant[0]} {target}")]
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
        plain = pool.submit(judge, "train_*.py", None, args.limit, args.quick)
        options = args.limit, args.quick
        futures = [(target, mutant[0], pool.submit(judge, target, mutant, *options)) for target, mutant in todo]
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
