"""Training replayed: what the paper says that optimiser steps do, in plain tensors, against what a real run did.

A run is watched from outside: what went into its networks and losses, which random numbers were drawn, what its
optimiser was given. What went in must be rows of a data set that the test wrote, noised as the paper says; losses,
gradients, updates and averages are then computed here and compared.
"""

import functools
import inspect
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import load, metrics
from PIL import Image
from scipy.stats import kstest

import train_dit
import train_unet
import train_uvit

BATCH, CLASSES, EMA = 8, 3, 0.6
EXACT = 2e-6  # of what is computed element by element from recorded tensors: no sum, so the same on every processor
PREFIX = {"model": "net", "diffusion": "diffusion", "head": "head"}  # of names in last.pt
NETWORKS = {train_unet: train_unet.UNet, train_uvit: train_uvit.UViT, train_dit: train_dit.DiT}
UNET = ["--backbone", "tiny", "--self-cond", "--aug", "0.5", "--model"]
LONG = ("unet-ddpm", "unet-rf")  # seconds; the others stay among the quick tests
SLOW = pytest.mark.slow
CASES = {  # script, flags; the teacher's level, never the default; gamma, in one case so small that nothing is clipped
    "unet-ddpm": (train_unet, [*UNET, "ddpm"], 66, 0.3),
    "unet-edm": (train_unet, [*UNET, "edm"], 0.3, 0.3),
    "unet-rf": (train_unet, [*UNET, "rf"], 0.2, 0.3),
    "uvit": (train_uvit, ["--size", "tiny", "--cls-token", "--aug", "0.5", "--cond"], 66, 0.3),
    "uvit-gap": (train_uvit, ["--size", "tiny", "--aug", "0.5"], 22, 0.01),
    "dit": (train_dit, ["--size", "tiny", "--self-cond", "--cond"], 0.2, 0.3),
    "dit-latents": (train_dit, ["--size", "tiny", "--self-cond", "--cond", "--cache-latents"], 0.3, 0.3),
}

# ---- The adapter: all that knows the scripts from inside
def run(script, patch, *flags):
    """A run with what has no flag: every step is logged, lr warms up in 3 steps, dropout acts."""
    patch.setattr(script, "LOG_EVERY", 1)
    args = script.parse_args([*map(str, flags), "--device", "cpu"])
    args.warmup, args.cooldown, args.cl_hidden = 1.5, 0.0, 32
    if script is train_unet:
        args.dropout = 0.2
    script.main(args)
    return args

class Watch:
    """A run and what was seen of it: steps[k] holds the calls of one optimiser step, grids the calls of the sampler.

    With `light` the network is replaced by something cheap, for questions about the draws alone.
    """

    def __init__(self, script, patch, light=False):
        self.steps, self.grids, self.now, self.sampling = [], [], None, False
        network, randn = NETWORKS[script], torch.randn
        run, shape = network.run, inspect.signature(network.run)
        self.reset()

        def watched_run(module, *given, **named):
            call = dict(shape.bind(module, *given, **named).arguments)
            call |= {"training": {m.training for m in call.pop("self").modules()}, "rng": torch.get_rng_state()}
            call["weights"] = None if light else tensors(module)
            kind = "grid" if self.sampling else "student" if module is self.parts["model"] else "teacher"
            (self.grids[-1]["calls"] if self.sampling else self.now[kind]).append(call)
            if not light:
                return run(module, *given, **named)
            feat = call["x"].flatten(1)[:, : module.feat_dim]
            return call["x"] * next(module.parameters()).mean(), feat, feat.new_zeros(len(feat), module.emb_dim)

        patch.setattr(network, "run", watched_run)
        patch.setattr(torch, "randn", lambda *given, **named: self.keep("randn", randn(*given, **named)))
        patch.setattr(script, "make_optimizer", functools.partial(self.watched_optimizer, script.make_optimizer))

    def watched_optimizer(self, make_optimizer, objective, args):
        """The optimiser that the script makes; from now on its steps and the formulation are watched."""
        diffusion = objective.diffusion
        self.parts = {"model": objective.net, "diffusion": diffusion, "head": objective.head}
        loss, level, sample = diffusion.loss, diffusion.draw_level, diffusion.sample

        def watched_loss(*given, **named):
            self.now["loss"].append(dict(inspect.signature(loss).bind(*given, **named).arguments))
            return loss(*given, **named)

        def watched_sample(net, noise, *given, y=None, **named):
            self.grids.append({"noise": noise, "y": y, "calls": [], "after": len(self.steps)})
            self.sampling = True
            self.now["randn"].clear()  # the grid's noise is of no step
            x0 = sample(net, noise, y=y, **fewer(diffusion))
            self.sampling = False
            return x0

        diffusion.loss, diffusion.sample = watched_loss, watched_sample
        diffusion.draw_level = lambda *given: self.keep("level", level(*given))
        optimizer = make_optimizer(objective, args)
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        return optimizer

    def reset(self):
        self.now = {"student": [], "teacher": [], "loss": [], "level": [], "randn": []}

    def keep(self, kind, value):
        self.now[kind].append(value)
        return value

    def named(self):
        """Everything trainable, by (part, name) as in last.pt."""
        return {(part, k): p for part in self.parts for k, p in self.parts[part].named_parameters() if p.requires_grad}

    def before(self, optimizer, *_):
        known = {id(p) for p in self.named().values()}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == known
        self.now["grad"] = {key: p.grad.clone() for key, p in self.named().items() if p.grad is not None}

    def after(self, *_):
        self.now["params"] = {key: p.detach().clone() for key, p in self.named().items()}
        self.steps.append(self.now)
        self.reset()

def fewer(diffusion):
    """Two steps will do, where the sampler takes a number of them (RK45 does not)."""
    return {} if isinstance(diffusion, train_unet.RF) else {"steps": 2}

# ---- Data that are recognised, and the paper's formulas
def tensors(module):
    return {k: v.detach().clone() for k, v in module.state_dict().items()}

def write_data(root, n, latents=False):
    """n images of noise in class folders, none like another or like its mirror image: views (n, 2, C, H, W), labels.

    latents: a finished cache of train_dit.py instead, x0 as float16, each image and its mirror image.
    """
    g = torch.Generator().manual_seed(n)
    labels = torch.arange(n) * CLASSES // n  # classes are read in order
    if latents:
        root.mkdir(parents=True)
        views = torch.randn(n, 2, 4, 4, 4, generator=g).half()
        meta = {"dataset": "tones", "resolution": 64, "vae": "none", "mean": [0.0] * 4, "std": [1.0] * 4}
        torch.save(meta | {"classes": [f"c{k}" for k in range(CLASSES)], "train": n, "test": n}, root / "meta.pt")
        for split in ("train", "test"):
            torch.save({"latents": views, "labels": labels}, root / f"{split}_00000.pt")
        return views.float(), labels
    images = torch.randint(256, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = root / "tones" / "train" / f"c{label}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    x0 = images / 255 * 2 - 1
    return torch.stack([x0, x0.flip(3)], dim=1), labels

def close(a, b, atol=2e-5, rtol=2e-5):
    """Whether two tensors agree, compared in float64."""
    return torch.allclose(a.detach().double(), b.detach().double(), atol=atol, rtol=rtol)

def all_close(a, b):
    """Whether two state dicts of weights agree, which were averaged element by element."""
    return a.keys() == b.keys() and all(close(a[name], b[name], EXACT, 0) for name in a)

def along(values, x):
    return torch.as_tensor(values).double().view(-1, *[1] * (x.ndim - 1))

def path(model, level):
    """x_t = a x0 + b eps: (a, b), float64 (B,). paper.md, section 2."""
    level = level.double()
    if model == "ddpm":
        product = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)])
        return product[level.long()].sqrt(), (1 - product[level.long()]).sqrt()
    return (torch.ones_like(level), level) if model == "edm" else (1 - level, level)

def network_input(script, model, level, x_t):
    """What the network sees of x_t, and its time."""
    if model == "edm":
        return x_t / (along(level, x_t) ** 2 + 0.25).sqrt(), level.double().log() / 4
    scale = {train_unet: 1e-3, train_uvit: 0.999}
    time = level.double() * scale[script] if model == "ddpm" else level.double()
    return x_t, 1 - time if script is train_dit else time  # the DiT runs on its ancestor's clock

def diffusion_loss(script, model, out, x_t, x0, level, noise, u):
    """Mean loss of raw network outputs. paper.md, section 2; u: log variance of the uncertainty weighting, or None."""
    if model == "ddpm":
        return ((out - noise) ** 2).mean()
    if model == "rf":
        v, v_hat = noise - x0, -out if script is train_dit else out
        loss = ((v_hat - v) ** 2).mean()
        cosine = (v * v_hat).sum(1) / (v.norm(dim=1) * v_hat.norm(dim=1).clamp(min=0.1))  # DEVIATION
        return loss + (1 - cosine).mean() if script is train_dit else loss
    s, sd = along(level, x0).float(), 0.5
    denoised = sd**2 / (s**2 + sd**2) * x_t + s * sd / (s**2 + sd**2).sqrt() * out
    loss = ((s**2 + sd**2) / (s * sd) ** 2 * (denoised - x0) ** 2).flatten(1).mean(1)
    return (loss / u.exp() + u).mean()

def log_variance(diffusion, t):
    """u(sigma) of times t = ln(sigma) / 4: fixed Fourier features, a linear layer without bias. paper.md, section 2."""
    (weights,) = diffusion.uncertainty.parameters()
    freqs, phases = diffusion.uncertainty.buffers()
    return (2**0.5 * torch.cos(t[:, None] * freqs + phases) * weights).sum(1)

def info_nce(q, k, temperature=0.2):
    """MoCo v3's loss of queries q (B, D) against keys k (B, D)."""
    cosines = q @ k.T / (q.norm(dim=1)[:, None] * k.norm(dim=1))
    shares = (cosines / temperature).softmax(dim=1)
    return -2 * temperature * shares.diag().log().mean()

def stored_noise(step, shape):
    """All noise of a batch's shape that was drawn in a step: (draws, B, C, H, W)."""
    return torch.cat([z.view(-1, *shape) for z in step["randn"] if z.shape[-3:] == shape[1:]])

def recognise(script, x0, views, aug):
    """Row and flip of each image x0 (B, C, H, W) in views (N, 2, C, H, W); aug (B, 9): how it was changed since.

    The augmentation is read back from its label, so that image and label must belong together. A label leaves the sign
    of the stretch open: both are tried.
    """
    found, flat = [], views.flatten(0, 1)
    for i in range(len(x0)):
        tries = [flat]
        if aug is not None:
            xflip, yflip, scale, cosine, sine, c, s, tx, ty = aug[i].tolist()
            turn, w, r = math.atan2(sine, cosine + 1), math.hypot(c, s), math.atan2(s, c)
            params = [[xflip, yflip, scale, turn, w, r, tx, ty], [xflip, yflip, scale, turn, -w, r + math.pi, tx, ty]]
            tries = [script.augment(flat, torch.tensor([p] * len(flat))) for p in params]
        errors = torch.stack([(t - x0[i]).abs().flatten(1).amax(1) for t in tries]).amin(0)
        assert errors.min() < (2e-4 if views.shape[2] == 3 else 5e-3), (  # latents are rounded to float16
            "what enters the network is no image of the data under its own label")
        found.append(divmod(int(errors.argmin()), 2))
    rows, flips = zip(*found, strict=True)
    return torch.tensor(rows), torch.tensor(flips)

def teacher_view(script, model, call, level, rows, drawn, views):
    """Flips and noise (B, ...) of the teacher's view of the images `rows`, from what its network was given."""
    level = torch.full((len(rows),), level)
    a, b = (along(part, call["x"]) for part in path(model, level))
    scale, time = network_input(script, model, level, torch.ones_like(call["x"], dtype=torch.float64))
    assert close(call["t"], time), "the teacher's level is not t*"
    for noise in drawn:
        try:
            x0 = ((call["x"].double() / scale - b * noise) / a).float()
            seen, flips = recognise(script, x0, views, call.get("aug"))
        except AssertionError:
            continue
        assert seen.equal(rows), "the teacher sees other images than the denoiser"
        return flips, noise
    raise AssertionError("the teacher's view is no image of the data plus noise that was drawn")

def watched(case, n, batch, tmp_path, patch, *more, light=False):
    """Two epochs on n images, from weights without zeros, EMA weights that are not the trained ones: what was seen.

    Returns the flags, the Watch, the first checkpoint as conftest.load reads it, the views and the labels.
    """
    script, flags, level, gamma = CASES[case]
    latents, out = case == "dit-latents", tmp_path / "run"
    views, labels = write_data(tmp_path / "data", n, latents)
    flags = [*flags, *([] if latents else ["--data"]), tmp_path / "data", "--resolution", 64 if latents else 16, *more]
    flags += ["--dataset", "tones", "--batch", batch, "--cl", gamma, "--cl-t", level, "--ema", EMA, "--epochs", 2]
    with patch.context() as inner:
        watch = Watch(script, inner, light)
        run(script, inner, *flags, "--out", out, "--max-steps", 0)
        start, trained = load(out), {f"{PREFIX[part]}.{name}" for part, name in watch.named()}
        assert all(v.equal(start["objective"][name]) for name, v in start["average"].items())
        g = torch.Generator().manual_seed(1)
        for name, v in [*start["objective"].items(), *start["average"].items()]:
            if name in trained:
                v += 0.03 * torch.empty_like(v).normal_(generator=g)
        torch.save(start, out / "last.pt")
        watch.reset()
        args = run(script, inner, *flags, "--out", out, "--resume")
    return args, watch, start, views, labels

# ---- The tests
@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW if case in LONG else ()) for case in CASES])
def test_run_equals_its_replay(case, tmp_path, monkeypatch):
    """Four steps in two epochs of 17 images, each step of 2 x 4 images, with everything on."""
    script, _, level, gamma = CASES[case]
    more = "--accum", 2, "--save-every", 1
    args, watch, start, views, labels = watched(case, 17, BATCH, tmp_path, monkeypatch, *more)
    out, model = tmp_path / "run", args.model
    net, head, diffusion = (deepcopy(watch.parts[part]) for part in ("model", "head", "diffusion"))
    ema, teacher_projector = deepcopy(net).eval(), deepcopy(head.projector)
    modules = {"model": net, "ema": ema, "head": head, "ema_projector": teacher_projector, "diffusion": diffusion}
    for part, module in modules.items():
        module.load_state_dict(start[part])
    net.train()
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == ({0.2} if script is train_unet else set())
    own = {(part, k): p for part in PREFIX for k, p in modules[part].named_parameters() if p.requires_grad}
    moments = {key: (torch.zeros(p.shape).double(), torch.zeros(p.shape).double()) for key, p in own.items()}
    lines, order, averages, mirrored, clipped = metrics(out), [], [tensors(ema)], [], set()
    assert len(watch.steps) == len(lines) == 4 and [line["step"] for line in lines] == [1, 2, 3, 4]
    for n, (step, line) in enumerate(zip(watch.steps, lines, strict=True), start=1):
        assert [len(step[kind]) for kind in ("student", "teacher", "loss")] == [2, 2, 2]
        drawn = stored_noise(step, (BATCH, *net.shape))
        drawn_level, sums = torch.cat(step["level"]), torch.zeros(3)
        for micro, (call, seen, view) in enumerate(zip(step["student"], step["teacher"], step["loss"], strict=True)):
            mine = slice(4 * micro, 4 * micro + 4)
            # The denoiser's view: images, label of the augmentation, class or null class, level, noise.
            x0, noise, y, aug = view["x0"], view["noise"], call.get("y"), call.get("aug")
            rows, flipped = recognise(script, x0, views, aug)
            order += rows.tolist()
            mirrored += [] if aug is None else (flipped + aug[:, 0] == 1).tolist()  # by one of both, or by none
            assert view["level"].equal(drawn_level[mine]) and any(noise.equal(z[mine]) for z in drawn)
            a, b = path(model, view["level"])
            x_t = along(a, x0) * x0 + along(b, x0) * noise
            want, time = network_input(script, model, view["level"], x_t)
            assert close(call["x"], want) and close(call["t"], time)
            assert (y is None) == (net.classes == 0) and (aug is None) == (script is train_dit)
            assert y is None or ((y == labels[rows]) | (y == -1)).all()
            # The teacher's: the same images, draws of its own, t*, no class, eval mode, EMA weights.
            _, other = teacher_view(script, model, seen, level, rows, drawn[:, mine], views)
            assert not other.equal(noise) and (seen.get("y") is None or (seen["y"] == -1).all())
            assert aug is None or (aug != seen["aug"]).any(1).all()
            assert call["training"] == {True} and seen["training"] == {False}
            assert all_close(ema.state_dict(), seen["weights"])
            with torch.no_grad():
                key = teacher_projector(*ema.encode(seen["x"], seen["t"], aug=seen.get("aug")))
            # Losses; dropout repeats what it drew.
            torch.set_rng_state(call["rng"])
            result, feat, e_t = net(call["x"], call["t"], y, aug, with_feat=True)
            u = log_variance(diffusion, call["t"]) if model == "edm" else None
            loss = diffusion_loss(script, model, result, x_t.float(), x0, view["level"], noise, u)
            contrast = info_nce(head(feat, e_t), key)
            ((loss + gamma * contrast) / 2).backward()
            sums += torch.stack([loss, contrast, loss + gamma * contrast]).detach() / 2
        for name, value in zip(("loss_diffusion", "loss_contrast", "loss"), sums.tolist(), strict=True):
            assert line[name] == pytest.approx(value, rel=1e-4), (n, name)  # BatchNorm over 4 rows enlarges rounding
        # Gradients, clipped at norm 1; warm-up of lr over 3 steps; the optimiser's update.
        norm = torch.stack([p.grad.norm() for p in own.values()]).norm()
        clipped.add(bool(norm > 1))
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        lr = args.lr * min(1, n / 3)
        assert line["lr"] == pytest.approx(lr, rel=1e-6)
        beta1, beta2 = {train_unet: (0.9, 0.999), train_uvit: (0.99, 0.999), train_dit: (0.9, 0.95)}[script]
        for key, p in own.items():
            grad, (m, v) = step["grad"][key].double(), moments[key]
            assert close(grad, p.grad * min(1, 1 / norm), 5e-5, 1e-4), (n, key)
            m.mul_(beta1).add_((1 - beta1) * grad)
            v.mul_(beta2).add_((1 - beta2) * grad**2)
            decays = script is train_uvit and not key[1].endswith(("bias", "pos_embed"))  # [CLS] does
            want = p.detach().double() * (1 - lr * 0.03 * decays)
            want -= lr * (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + 1e-8)
            assert close(step["params"][key], want, EXACT, 0), (n, key)
            p.detach().copy_(step["params"][key])
            p.grad = None
        # The averages of the network and of the projector. paper.md, section 7: the decay's warm-up, n from 0.
        decay = EMA if script is train_dit else min(EMA, 1 - (1 + (n - 1)) ** (-2 / 3))
        for average, module in ((ema, net), (teacher_projector, head.projector)):
            for p, q in zip(average.parameters(), module.parameters(), strict=True):
                p.detach().copy_(decay * p.detach() + (1 - decay) * q.detach())
        averages.append(tensors(ema))
    assert (case != "uvit-gap") in clipped, "one case has gradients shorter than 1, the others have longer ones"
    for epoch in (order[:16], order[16:]):
        assert len(set(epoch)) == 16 and epoch != sorted(epoch)
    assert order[:16] != order[16:]
    assert aug is None or set(mirrored) == {True, False}, "flip and augmentation undo each other"
    draws = {tuple(call["rng"].tolist()) for step in watch.steps for call in step["student"]}
    assert script is not train_unet or len(draws) == 8, "dropout repeats its draws"
    # The files.
    last = load(out)
    for part, module in modules.items():
        assert all_close(module.state_dict(), last[part]), part
    assert (last["step"], last["epoch"]) == (4, 2)
    for epoch in (1, 2):
        state = load(out, f"epoch_{epoch:04d}.pt")
        assert all_close(averages[2 * epoch], state["ema"])
        assert (state["step"], state["epoch"]) == (2 * epoch, epoch) and state["args"] == last["args"] == vars(args)
    if case != "dit-latents":  # there is no VA-VAE here to show latents with
        check_grids(watch.grids, averages, ema, deepcopy(watch.parts["diffusion"]), out)

def check_grids(grids, averages, net, diffusion, out):
    """The grids of both epochs: EMA weights in eval mode, from the same noise, laid out row by row."""
    assert [grid["after"] for grid in grids] == [2, 4] and grids[0]["noise"].equal(grids[1]["noise"])
    assert kstest(grids[0]["noise"].flatten().numpy(), "norm").pvalue > 1e-4
    for epoch, grid in enumerate(grids, start=1):
        for call in grid["calls"]:
            assert call["training"] == {False} and call.get("aug") is None
            assert all_close(averages[2 * epoch], call["weights"])
        net.load_state_dict(averages[2 * epoch])
        y = torch.arange(16) % CLASSES if net.classes else None
        with torch.no_grad():
            x0 = type(diffusion).sample(diffusion, net, grid["noise"], y=y, **fewer(diffusion))
        image = torch.from_numpy(np.array(Image.open(out / f"samples_{epoch:04d}.png"))).permute(2, 0, 1).int()
        assert image.shape == (3, 266, 266)  # 4 x 4 of 16 pixels, each four times as large, 2 between them
        for k in range(16):
            top, left = 2 + 66 * (k // 4), 2 + 66 * (k % 4)
            want = ((x0[k].clamp(-1, 1) + 1) * 127.5).round().int().repeat_interleave(4, 1).repeat_interleave(4, 2)
            assert (image[:, top : top + 64, left : left + 64] - want).abs().max() <= 1

LEVELS = {  # paper.md, section 2
    "unet-ddpm": lambda t: (t * 1000, "uniform", (0.5, 1000)),
    "unet-edm": lambda t: (t * 4, "norm", (-1.2, 1.2)),
    "unet-rf": lambda t: (t, "uniform", (0, 1)),
    "uvit": lambda t: (t / 0.999, "uniform", (0.5, 1000)),
    "dit": lambda t: (torch.logit(t), "norm", (0, 1)),
}

@pytest.mark.parametrize("case", LEVELS)
def test_draws_are_the_papers_and_the_last_epoch_is_kept(case, tmp_path, monkeypatch):
    """Two epochs of 300 images in steps of 100, the network left out: order, flips, labels, levels, noise."""
    script, _, level, _ = CASES[case]
    more = ["--save-every", 3, *([] if script is train_dit else ["--aug", 0])]
    args, watch, _, views, labels = watched(case, 300, 100, tmp_path, monkeypatch, *more, light=True)
    kept = [file.name for file in (tmp_path / "run").glob("epoch_*")]
    assert kept == ["epoch_0002.pt"], "the last epoch is kept, whatever --save-every says"
    rows, flips, times, noises, null = [], [], [], [], []
    for step in watch.steps:
        view, call, seen = step["loss"][0], step["student"][0], step["teacher"][0]
        drawn = stored_noise(step, view["noise"].shape)
        row, flip = recognise(script, view["x0"], views, None)
        other_flip, other = teacher_view(script, args.model, seen, level, row, drawn, views)
        rows.append(row)
        flips.append(torch.stack([flip, other_flip]))
        times.append(call["t"].double())
        noises += [view["noise"], other]
        if call.get("y") is not None:
            assert ((call["y"] == labels[row]) | (call["y"] == -1)).all()
            null.append(call["y"] == -1)
    # An epoch is a permutation of all rows, in another order than the next one, and not a sorted one turned round.
    epochs = torch.cat(rows).view(2, 300)
    assert all(sorted(epoch.tolist()) == list(range(300)) for epoch in epochs)
    ranked = torch.stack([*epochs, torch.arange(300)]).double()
    assert torch.corrcoef(ranked).fill_diagonal_(0).abs().max() < 0.25
    # Half of the images are flipped, the teacher's by a draw of its own, and anew in every step.
    flips = torch.cat(flips, dim=1)
    for half in (flips[0], flips[0] == flips[1], flips[0, :-100] == flips[0, 100:]):
        assert 0.4 < half.double().mean() < 0.6
    if script is not train_unet:  # a tenth of the labels is dropped, by a draw of its own
        null = torch.cat(null)
        assert 0.05 < null.double().mean() < 0.16 and 0.2 < flips[0, null].double().mean() < 0.8
    values, kind, parameters = LEVELS[case](torch.cat(times))
    assert kstest(values.numpy(), kind, parameters).pvalue > 1e-3
    if args.model == "ddpm":
        drawn = watch.parts["diffusion"].draw_level(50_000, torch.Generator())
        assert (drawn.min(), drawn.max()) == (1, 1000)
    noise = torch.stack(noises).view(12 * 100, -1)
    assert kstest(noise.flatten()[::7].numpy(), "norm").pvalue > 1e-3
    assert (noise @ noise.T / noise.shape[1]).fill_diagonal_(0).abs().max() < 0.3  # all of them independent
