"""What probe.py, fid.py and sample.py do with a checkpoint, replayed from the paper's protocol in plain PyTorch.

The tools run by their command line on class folders whose every image says who it is: a constant colour for the class,
and at the upper left a mark whose green is the image's number and whose blue tells the split; the mark of a mirrored
image stands at the right. Networks are real and small, their weights random, EMA and trained weights different. What a
tool asks of the network is watched at the seam (diffusion.features, diffusion.sample, the network's forward) and at the
optimiser's step; random draws are taken as data, all that follows from them is computed again.

A quarter of the test images wear the colour of the next class, so that who learns colours perfectly is right in 75 %.
"""

import functools
import json
import shutil
from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fid
import probe
import sample
import train_dit
import train_unet
import train_uvit

COLOURS = ((200, 60, 40), (60, 200, 40), (40, 60, 200))
TRAIN, TEST = 20, 24  # images per class
UVIT = (train_uvit, "--size", "tiny", "--cls-token", "--cond", "--aug", "0.12", "--layer", "out_1")
UNET = (train_unet, "--backbone", "tiny", "--self-cond", "--layer", "out_3", "--model", "edm")
DIT = (train_dit, "--size", "tiny", "--patch", "2", "--self-cond")


# ---- The adapter: names of the tools' insides ------------------------------------------------------------------------
class TinyInception(nn.Module):
    """A stand-in for fid.Inception: means of the image's quarters make 8 features, all others are 0, and the logits."""

    def __init__(self, seed=0):
        super().__init__()
        self.path, self.sha256, self.sha, self.seen = "tiny", f"{seed}a" * 32, f"{seed}a" * 4, []
        draw = torch.Generator().manual_seed(seed)
        self.maps = [torch.randn(12, 8, generator=draw), torch.randn(8, 1008, generator=draw)]
        self.fc = nn.Linear(2048, 1008)  # its device is asked for

    def forward(self, x):
        """(B, 3, 299, 299) in [-1, 1] -> features (B, 2048) float32, logits (B, 1008) float64."""
        self.seen.append(x[:, :, 0, 0])
        feat, logits = self.look(x)
        return F.pad(feat, (0, 2040)), logits

    def look(self, x):
        feat = torch.tanh(F.adaptive_avg_pool2d(x, 2).flatten(1) @ self.maps[0])
        return feat, (feat @ self.maps[1]).double()


def shrink(patch, inception):
    """Inside the tools: several blocks of images where there would be one, the small Inception and its 8 features."""
    distance = fid.frechet_distance  # of 2048 features, all but 8 of them 0, it takes seconds
    patch.setattr(fid, "frechet_distance", lambda *moments: distance(*(m[(slice(8),) * m.ndim] for m in moments)))
    patch.setattr(fid, "load_inception", lambda *args, **kwargs: inception)
    patch.setattr(probe, "NOISE_BLOCK", 16)
    patch.setattr(sample, "BLOCK", 16)


def heads_of(opt, widths):
    """Copies of the linear layers that probe.py trains, one per probed layer: [(weight (K, D), bias (K,))]."""
    weight, bias = (plain(p) for p in opt.param_groups[0]["params"])  # side by side: (D, K) and (L, K)
    return [(w.T, b) for w, b in zip(weight.split(widths), bias, strict=True)]


def cells_of(path):
    """The cells {layer, level, linear, knn} of every checkpoint in probe.py's JSON file; level None: clean pixels."""
    return [checkpoint["cells"] for checkpoint in json.loads(path.read_text())["checkpoints"]]


def score_of(path):
    """The first result, a dict with fid, is_mean, is_std and epoch, in a JSON file of fid.py."""
    return json.loads(path.read_text())["results"][0]


# ---- Data and checkpoints --------------------------------------------------------------------------------------------
def write_data(root, darker=1.0):
    """Class folders ROOT/{train,test}/{a,b,c}. Returns the test labels and the training images (N, H, W, 3)."""
    truth, kept = {}, []
    for blue, (split, n, dim) in enumerate((("train", TRAIN, 1.0), ("test", TEST, 0.8))):
        for label, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                other = split == "test" and i % 4 == 0
                image = np.empty((16, 16, 3))
                image[:] = np.array(COLOURS[(label + other) % 3]) * dim * darker
                image[0, 0] = 254, label * n + i, 100 + 50 * blue  # colours that a sampler hardly draws
                image = image.astype(np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i:03d}.png")
                truth.update({label * n + i: label} if split == "test" else {})
                kept += [image] if split == "train" else []
    return torch.tensor([truth[i] for i in sorted(truth)]), np.stack(kept)


def write_checkpoint(path, data, script, *flags, dataset="blocks", seed=0, gain=1.0, epoch=7):
    """An untrained network as a run would leave it, in the format of design.md; gain 0 makes its features constant."""
    flags = ["--dataset", dataset, "--data", str(data), "--resolution", "16", *flags]
    args = script.parse_args(flags)
    args.classes = list("abc")
    torch.manual_seed(seed)
    start = script.build(args)[0].state_dict()
    ema, model = ({k: gain * (v + 0.1 * torch.randn_like(v)) for k, v in start.items()} for _ in range(2))
    state = {"script": script.__name__, "args": vars(args), "ema": ema, "model": model, "epoch": epoch, "step": 9}
    torch.save(state, path)
    return path


def fingerprint(weights):
    return sum(float((i + 1) * w.double().sum()) for i, w in enumerate(weights.values()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data sets `blocks` and `others` (darker) and three checkpoints. Read, never written, by the tests."""
    root = tmp_path_factory.mktemp("protocols")
    truth, train = write_data(root / "blocks")
    _, others = write_data(root / "others", 0.6)
    uvit = write_checkpoint(root / "uvit.pt", root, *UVIT)
    unet = write_checkpoint(root / "unet.pt", root, *UNET)
    dit = write_checkpoint(root / "dit.pt", root, *DIT)
    return SimpleNamespace(root=root, truth=truth, train=train, others=others, uvit=uvit, unet=unet, dit=dit)


# ---- The watch -------------------------------------------------------------------------------------------------------
def plain(value):
    """A copy that autograd may use, though it was made in inference mode."""
    with torch.inference_mode(False):
        return torch.from_numpy(value.detach().float().numpy().copy())


class Watch:
    """Records, in order: forwards of the network, reads of features, samples, optimiser steps."""

    def __init__(self, patch):
        self.forwards, self.reads, self.samples, self.steps, self.nets = [], [], [], [], []
        self.layers = []  # whose heads to keep
        for script in (train_unet, train_uvit, train_dit):
            patch.setattr(script, "build", functools.partial(self.build, script.build))
        self.hooks = [register_optimizer_step_pre_hook(self.before), register_optimizer_step_post_hook(self.after)]

    def build(self, build, args):
        net, diffusion = build(args)
        forward, features, draw = net.forward, diffusion.features, diffusion.sample
        self.nets.append(net)

        def look(y, aug=None):
            training = any(m.training for m in (*net.modules(), *diffusion.modules()))
            free = torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters())
            shown = y is not None and bool((y != net.classes).any())
            warped = aug is not None and bool(aug.any())
            self.forwards.append((fingerprint(net.state_dict()), training, free, shown, warped))

        def watch_forward(x, t, y=None, aug=None, *args, **kwargs):
            look(y, aug)
            return forward(x, t, y, aug, *args, **kwargs)

        def watch_features(net, x0, level, noise, y=None, pool="gap", last=None):
            look(y)
            feats = features(net, x0, level, noise, y, pool, last)
            if noise.any():  # a look at the layers' widths goes without
                read = {"x0": plain(x0), "noise": plain(noise), "level": level, "step": len(self.steps)}
                self.reads.append(SimpleNamespace(**read, feats={k: plain(v) for k, v in feats.items()}))
            return feats

        @functools.wraps(draw)
        def watch_sample(call, noise, *args, **kwargs):
            x0 = draw(call, noise, *args, **kwargs)
            self.samples.append(SimpleNamespace(noise=plain(noise), y=kwargs.get("y"), x0=plain(x0)))
            return x0

        net.forward, diffusion.features, diffusion.sample = watch_forward, watch_features, watch_sample
        return net, diffusion

    def before(self, opt, args, kwargs):
        params = [p for group in opt.param_groups for p in group["params"]]
        assert not {id(p) for p in params} & {id(p) for net in self.nets for p in net.parameters()}
        widths = [self.reads[-1].feats[layer].shape[1] for layer in self.layers] if self.layers else []
        start = heads_of(opt, widths) if widths else None
        self.steps.append(SimpleNamespace(opt=opt, lr=opt.param_groups[0]["lr"], widths=widths, start=start))

    def after(self, opt, args, kwargs):
        self.steps[-1].end = heads_of(opt, self.steps[-1].widths) if self.layers else None

    def check_network(self, path, labels=False):
        """EMA weights, in eval mode and frozen, no augmentation label, the null class unless `labels`."""
        want = fingerprint(torch.load(path, weights_only=True)["ema"])
        assert self.forwards
        for found, training, free, shown, warped in self.forwards:
            assert found == pytest.approx(want, rel=1e-9) and not training and not free and not warped
            assert shown == labels

    def stop(self):
        for hook in self.hooks:
            hook.remove()

    def training(self):
        """The reads that were trained on: the last before every step."""
        return [[r for r in self.reads if r.step == step][-1] for step in range(len(self.steps))]

    def images(self):
        """uint8 (N, H, W, 3) of all that was sampled, rounded to the nearest of 256 values in [-1, 1]."""
        x0 = torch.cat([s.x0 for s in self.samples]).permute(0, 2, 3, 1).double().numpy()
        return np.clip(np.rint((x0 + 1) * 127.5), 0, 255).astype(np.uint8)


@pytest.fixture
def watch(monkeypatch):
    watch = Watch(monkeypatch)
    watch.inception = TinyInception()
    shrink(monkeypatch, watch.inception)
    yield watch
    watch.stop()


def who(x0):
    """Images (B, 3, 16, 16) in [-1, 1] -> number (B,), whether of the test split (B,), whether mirrored (B,)."""
    raw = ((x0 + 1) * 127.5).round().long()
    flip = raw[:, 0, 0, 15] == 254
    assert (flip != (raw[:, 0, 0, 0] == 254)).all()  # one mark in every image, so nothing was cropped
    mark = torch.where(flip[:, None], raw[:, :, 0, 15], raw[:, :, 0, 0])
    return mark[:, 1], mark[:, 2] == 150, flip


def run(tool, *argv):
    sample.run_tool(tool.main, tool.parse_args([*map(str, argv), "--device", "cpu"]))


def refused(capsys, tool, *argv):
    """The one line of an error that ended the tool with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(tool, *argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


# ---- probe.py --------------------------------------------------------------------------------------------------------
def replay(watch, lr):
    """Train the heads of the recorded features again, step by step. Returns the last heads, one per layer."""
    watch.stop()
    heads = [nn.Linear(width, 3) for width in watch.steps[0].widths]
    for head, (weight, bias) in zip(heads, watch.steps[0].start, strict=True):
        head.weight.data, head.bias.data = weight.clone(), bias.clone()
    opt = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, len(watch.steps))  # UNSPECIFIED: per step, as ours
    for step, (read, done) in enumerate(zip(watch.training(), watch.steps, strict=True)):
        assert done.lr == pytest.approx(opt.param_groups[0]["lr"], rel=1e-6), step
        opt.zero_grad()
        for head, layer in zip(heads, watch.layers, strict=True):
            F.cross_entropy(head(read.feats[layer]), who(read.x0)[0] // TRAIN).backward()
        opt.step()
        cosine.step()
        for head, theirs in zip(heads, done.end, strict=True):
            assert all(torch.allclose(p, q, atol=2e-5) for p, q in zip(head.parameters(), theirs, strict=True)), step
    return heads


def still_features(watch, layer, split=True):
    """Features that were read without training on them, row i of image i: of the test or the training split."""
    trained, rows = {id(r) for r in watch.training()}, {}
    for read in (r for r in watch.reads if id(r) not in trained):
        for i, of_test, flip, feat in zip(*who(read.x0), read.feats[layer], strict=True):
            if of_test == split and not flip:
                assert int(i) not in rows or not split, "a test image was read twice"
                rows[int(i)] = feat
    assert sorted(rows) == list(range(3 * (TEST if split else TRAIN)))
    return torch.stack([rows[i] for i in sorted(rows)])


@pytest.mark.parametrize(("name", "layers", "symbol", "level"),
                         [("uvit", ["in_1", "out_2"], "t", 600), ("unet", ["out_2"], "s", 5)])
def test_probe_replayed(world, watch, capsys, tmp_path, name, layers, symbol, level):
    path, watch.layers, epochs, batch = getattr(world, name), layers, 4, 20
    flags = ["--layer", *layers, "--t", level, "--epochs", epochs, "--batch", batch, "--json", tmp_path / "a.json"]
    run(probe, path, *flags)
    watch.check_network(path)
    assert {float(read.level) for read in watch.reads} == {level}

    # 1. Training: the whole training split and nothing else, in a new order, with new flips and noise in each epoch.
    steps, n = watch.training(), 3 * TRAIN
    number, of_test, flip = (torch.stack(part).view(epochs, n)
                             for part in zip(*(who(read.x0) for read in steps), strict=True))
    assert not of_test.any() and all(len(read.x0) == batch for read in steps)
    assert (number.sort(1)[0] == torch.arange(n)).all() and len({tuple(row.tolist()) for row in number}) == epochs
    order = number.argsort(1)
    flip, noise = flip.gather(1, order), torch.cat([read.noise for read in steps]).view(epochs, n, -1)
    assert 0.35 < flip.float().mean() < 0.65 and 0.3 < (flip[0] != flip[1]).float().mean() < 0.7
    noise = noise[torch.arange(epochs)[:, None], order].flatten(0, 1)  # (epochs * n, 768), by epoch and image
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    alike = torch.corrcoef(noise).fill_diagonal_(0).abs().max()
    assert alike < 0.25, "two images, or two epochs of an image, share their noise"

    # 2. Test: every test image once, unflipped. kNN's bank: training images unflipped.
    trained = {id(read) for read in steps}
    assert not any(who(read.x0)[2].any() for read in watch.reads if id(read) not in trained)

    # 3. The same heads and the same accuracy.
    assert isinstance(watch.steps[0].opt, torch.optim.Adam) and not isinstance(watch.steps[0].opt, torch.optim.AdamW)
    right = [100 * (head(still_features(watch, layer)).argmax(1) == world.truth).float().mean().item()
             for head, layer in zip(replay(watch, 4e-3), layers, strict=True)]
    cells = cells_of(tmp_path / "a.json")[0]
    assert [cell["layer"] for cell in cells] == layers and {cell["level"] for cell in cells} == {level}
    assert [cell["linear"] for cell in cells] == pytest.approx(right, abs=1e-3)
    best = layers[right.index(max(right))]
    top = max(right)
    number = f"top-1 {top:.2f} % +- {(top * (100 - top) / 72) ** 0.5:.2f} ({best}, {symbol}={level:g})"
    assert capsys.readouterr().out.splitlines()[-1] == number


def test_heads_are_tested_with_the_statistics_of_training(world, watch, tmp_path):
    """Where all test images look the same, their own mean and variance would leave nothing to tell the class by."""
    for colour in "ab":
        data, out = tmp_path / colour, tmp_path / f"{colour}.json"
        shutil.copytree(world.root / "blocks" / "train", data / "blocks" / "train")
        for name in "abc":  # 20 of the class that the colour belongs to, 1 of each other
            (data / "blocks" / "test" / name).mkdir(parents=True)
            for file in sorted((data / "blocks" / "train" / colour).iterdir())[: TRAIN if name == colour else 1]:
                shutil.copy(file, data / "blocks" / "test" / name)
        run(probe, world.uvit, "--pixels", "--batchnorm", "--cache", "--data", data, "--json", out)
        assert cells_of(out)[0][-1]["linear"] == pytest.approx(100 * TRAIN / (TRAIN + 2))


@pytest.mark.parametrize(("dataset", "epochs"), [("cifar10", 15), ("blocks", 30)])
def test_probe_defaults(world, watch, capsys, tmp_path, dataset, epochs):
    """[P]: lr 4e-3, 15 epochs on CIFAR, else 30; layer and level of the training run. 60 images are one batch."""
    if dataset == "cifar10":
        shutil.copytree(world.root / "blocks", tmp_path / dataset)
    path = write_checkpoint(tmp_path / "a.pt", tmp_path if dataset == "cifar10" else world.root, *UVIT, "--cl-t", "33",
                            dataset=dataset)
    run(probe, path)
    assert len(watch.steps) == epochs and watch.steps[0].lr == 4e-3 and watch.steps[-1].lr < 1e-4
    assert {len(read.x0) for read in watch.training()} == {3 * TRAIN} and {float(r.level) for r in watch.reads} == {33}
    flips = torch.stack([who(read.x0)[2] for read in watch.training()]).float()
    assert abs(flips.mean() - 0.5) < 0.06
    assert capsys.readouterr().out.splitlines()[-1].endswith("(out_1, t=33)")


@pytest.mark.parametrize(
    ("script", "flags", "batches"),
    [
        (train_unet, ["--backbone", "ddpm", "--layer", "out_1"], [512, 88]),
        (train_unet, ["--backbone", "ddpmpp", "--layer", "out_1"], [256, 256, 88]),
        (train_uvit, ["--size", "S"], [256, 256, 88]),
    ],
)  # fmt: skip
def test_batches_of_the_probe(watch, monkeypatch, tmp_path, script, flags, batches):
    """[P] Tab. 11, on 600 images and with networks that only bear the names of the paper's; no image is left out."""
    for backbone in ("ddpm", "ddpmpp"):
        monkeypatch.setitem(train_unet.BACKBONES, backbone, {"width": 32, "mult": (1,), "blocks": 1, "biggan": False})
    monkeypatch.setitem(train_uvit.SIZES, "S", train_uvit.SIZES["tiny"])
    monkeypatch.setattr(script, "draw_shapes",
                        lambda n, seed, side, draw=script.draw_shapes: draw(600 if seed == 0 else 20, seed, side))
    path = write_checkpoint(tmp_path / "a.pt", tmp_path, script, *flags, dataset="shapes")
    run(probe, path, "--epochs", 1, "--no-flip")
    assert [len(read.x0) for read in watch.training()] == batches
    data = script.to_x0(script.load_data(script.parse_args([*flags, "--dataset", "shapes"]), "train")[0])
    seen = torch.cat([read.x0 for read in watch.training()])
    found, want = ({image.numpy().tobytes() for image in images} for images in (seen, data))
    assert found == want  # and, as was asked, none mirrored


def test_probe_of_latents(world, watch, monkeypatch, tmp_path):
    """[P]: lr 2e-3, batch 1440, 30 epochs. A mirrored latent is the stored one, not the latent mirrored."""
    raw = torch.rand(1500, 2, 4, 1, 1).round(decimals=2) * torch.tensor([1, -1]).view(2, 1, 1, 1)
    sizes = {"train": 1500, "test": 50}
    monkeypatch.setattr(train_dit, "load_data", lambda args, split: (
        raw[: sizes[split]].half(), torch.arange(sizes[split]) % 2, ["a", "b"]))
    path = write_checkpoint(tmp_path / "a.pt", world.root, train_dit, "--size", "tiny", "--patch", "1")
    state = torch.load(path, weights_only=True)
    state["args"] |= {"cache_latents": str(tmp_path), "latents": {"mean": [0.0] * 4, "std": [1.0] * 4}}
    with torch.random.fork_rng():
        net = train_dit.build(SimpleNamespace(**state["args"]))[0]
    torch.save(state | {"ema": {k: v + 0.1 * torch.randn_like(v) for k, v in net.state_dict().items()}}, path)
    run(probe, path, "--epochs", 1)
    assert [len(read.x0) for read in watch.training()] == [1440, 60] and watch.steps[0].lr == 2e-3
    x0 = watch.training()[0].x0.flatten(1)
    assert ((x0 >= 0).all(1) | (x0 <= 0).all(1)).all() and 0.4 < (x0 < 0).any(1).float().mean() < 0.6
    stored = {tuple(row) for row in raw.half().float().flatten(0, 1).flatten(1).tolist()}
    assert {tuple(row) for row in x0.tolist()} <= stored
    watch.steps.clear()
    sizes["train"] = 40
    run(probe, path)
    assert len(watch.steps) == 30


def knn(bank, bank_labels, queries, labels):
    """Top-1 in percent of the vote of the 20 nearest by cosine, weights exp(similarity / 0.07)."""
    hits = 0
    for query, label in zip(queries, labels, strict=True):
        near = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        first = np.argsort(-near)[:20]
        votes = [np.exp(near[first][bank_labels[first] == c] / 0.07).sum() for c in range(3)]
        hits += np.argmax(votes) == label
    return 100 * hits / len(queries)


def test_knn_and_pixels(world, watch, capsys, tmp_path):
    """With --cache every training image is read twice, once mirrored. Raw pixels, told beside: 75 %."""
    layers = ["in_1", "in_2", "out_2"]
    run(probe, world.uvit, "--layer", *layers, "--t", 600, "--pixels", "--cache", "--json", tmp_path / "a.json")
    watch.check_network(world.uvit)
    *cells, pixels = cells_of(tmp_path / "a.json")[0]
    assert pixels["level"] is None and pixels["linear"] == pytest.approx(75) and pixels["knn"] == pytest.approx(75)
    # A clean image has one colour, so all its pixels get one weight, but for the marks: at the left, mirrored right.
    weight = heads_of(watch.steps[-1].opt, [768])[0][0].view(3, 3, 16, 16)
    assert torch.allclose(weight[:, :, 1:], weight[:, :, 1:, :1].expand(-1, -1, 15, 16), atol=1e-5)
    assert all((weight[:, :, 0, side] - weight[:, :, 1, side]).abs().max() > 1e-3 for side in (0, 15))
    reads = [r for r in watch.reads if r.step == 0]
    assert len(watch.steps) and all(r.step == 0 for r in watch.reads)
    seen = [tuple(map(int, row)) for r in reads for row in zip(*who(r.x0), strict=True)]
    want = [(i, 1, 0) for i in range(3 * TEST)] + [(i, 0, flip) for i in range(3 * TRAIN) for flip in (0, 1)]
    assert sorted(seen) == sorted(want)
    watch.steps.clear()
    labels = np.arange(3 * TRAIN) // TRAIN
    for layer, cell in zip(layers, cells, strict=True):
        bank, queries = (still_features(watch, layer, split).double().numpy() for split in (False, True))
        assert cell["knn"] == pytest.approx(knn(bank, labels, queries, world.truth.numpy()), abs=1e-3), layer
    best = max(cells, key=itemgetter("linear"))
    number = f"({best['layer']}, t=600), kNN {best['knn']:.2f} %"
    assert capsys.readouterr().out.splitlines()[-1].endswith(number)


@pytest.mark.parametrize("pool", ["gap", "token", "cls"])
def test_probe_pools_the_block_that_was_asked_for(world, watch, monkeypatch, pool):
    """The last 64 tokens of a block's output are the image's, the first is [CLS]."""
    tokens, forward = [], train_uvit.UViTBlock.forward
    monkeypatch.setattr(train_uvit.UViTBlock, "forward",
                        lambda self, *args: tokens.append((self, plain(out := forward(self, *args)))) or out)
    run(probe, world.uvit, "--layer", "out_2", "--pool", pool, "--epochs", 1)
    last = [h for block, h in tokens if block is watch.nets[-1].out_blocks[-1]]
    last = last[len(last) - len(watch.reads) :]  # without the look at the widths
    places = set()
    for h, read in zip(last, watch.reads, strict=True):
        image, feat = h[:, -64:], read.feats["out_2"]
        if pool == "token":
            gap, place = (image - feat[:, None]).abs().amax(2).min(1)
            assert gap.max() < 1e-6
            places |= set(place.tolist())
        else:
            assert torch.allclose(feat, image.mean(1) if pool == "gap" else h[:, 0], atol=1e-5)
    assert pool != "token" or len(places) > 40


def test_best_of_several_checkpoints(world, watch, capsys, tmp_path):
    """Constant features know one class of three; the checkpoint in the middle knows more, and it counts."""
    paths = [write_checkpoint(tmp_path / f"epoch_{epoch}.pt", world.root, *UVIT, gain=gain, epoch=epoch)
             for epoch, gain in ((800, 0), (1000, 1), (1200, 0))]
    run(probe, *paths, "--epochs", 4, "--batch", 20, "--layer", "out_2", "--json", tmp_path / "a.json")
    found = [cells[0]["linear"] for cells in cells_of(tmp_path / "a.json")]
    assert found[0] == found[2] == pytest.approx(100 / 3, abs=0.01) and found[1] > 40
    *_, which, last = capsys.readouterr().out.splitlines()
    assert which == f"best: {tmp_path.name}, epoch 1000"
    assert last.startswith(f"top-1 {found[1]:.2f} % +- ") and last.endswith(" (out_2, t=11)")
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["top1"], result["epoch"]) == (found[1], 1000)


@pytest.mark.parametrize("script", [train_unet, train_uvit, train_dit])
def test_no_test_image_of_shapes_is_a_training_image(script):
    args = script.parse_args(["--dataset", "shapes"])
    train, test = ({i.numpy().tobytes() for i in script.load_data(args, split)[0]} for split in ("train", "test"))
    assert len(test) > 1000 and len(train) > 5000 and not train & test


# ---- fid.py ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def scores(images, train, inception):
    """FID, IS and its spread of uint8 images (N, H, W, 3). The 10 splits are dealt in RandomState(2020)'s order."""
    def gaussian(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        feat, logits = (out.double().numpy() for out in inception.look(x))
        return feat.mean(0), np.cov(feat, rowvar=False), logits

    (mean, cov, logits), (mean_t, cov_t, _) = gaussian(images), gaussian(train)
    root = scipy.linalg.sqrtm(cov @ cov_t).real
    p = np.exp(logits - scipy.special.logsumexp(logits, axis=1, keepdims=True))
    p, n = p[np.random.RandomState(2020).permutation(len(p))], len(p)
    parts = [p[i * n // 10 : (i + 1) * n // 10] for i in range(10)]
    each = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]
    return ((mean - mean_t) ** 2).sum() + np.trace(cov + cov_t - 2 * root), np.mean(each), np.std(each)


def check_scores(path, last, want):
    """The JSON file and the last line on stdout say FID and IS as computed here."""
    result = score_of(path)
    assert [result[key] for key in ("fid", "is_mean", "is_std")] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert last == f"FID {result['fid']:.2f}  IS {result['is_mean']:.2f} +- {result['is_std']:.2f}"


def looked_at(inception):
    """The marked images that the Inception saw since the last call: (number, of the test split)."""
    corner = torch.cat(inception.seen).add(1).mul(127.5).round().long()
    inception.seen.clear()
    return sorted((g, b == 150) for r, g, b in corner.tolist() if r == 254 and b in (100, 150))


@pytest.mark.parametrize("name", ["uvit", "dit"])
def test_fid_replayed(world, watch, capsys, tmp_path, name):
    path, n, data = getattr(world, name), 37, world.root
    everything = [(i, False) for i in range(3 * TRAIN)]
    shutil.rmtree(data / ".fid", ignore_errors=True)

    def score(*flags):
        """One run; returns what was seen of the data, and the images that were sampled."""
        watch.samples.clear()
        run(fid, path, "--n", n, "--steps", 2, "--allow-few", "--data", data, "--json", tmp_path / "a.json", *flags)
        return looked_at(watch.inception), watch.images() if watch.samples else None

    # 1. EMA, the whole training split and no test image, the numbers themselves.
    seen, images = score()
    last = capsys.readouterr().out.splitlines()[-1]
    watch.check_network(path, labels=name == "uvit")
    assert seen == everything and images.shape == (n, 16, 16, 3)
    check_scores(tmp_path / "a.json", last, scores(images, world.train, watch.inception))
    assert score_of(tmp_path / "a.json")["epoch"] == 7
    balanced = [s.y for s in watch.samples]
    if name == "uvit":
        assert torch.cat(balanced).tolist() == [i % 3 for i in range(n)]
    else:
        assert balanced == [None] * len(balanced)

    # 2. Again: the reference is not measured twice. Another seed, other images. Another data set, another reference.
    seen, again = score()
    assert seen == [] and np.array_equal(images, again)
    check_scores(tmp_path / "a.json", last, scores(images, world.train, watch.inception))
    seen, others = score("--seed", 1, "--ref", "others")
    assert seen == everything and not (others == images).all((1, 2, 3)).any()
    last = capsys.readouterr().out.splitlines()[-1]
    check_scores(tmp_path / "a.json", last, scores(others, world.others, watch.inception))


def test_fid_labels_at_random(world, watch):
    """Image i's class depends on (seed, i) only, is not i's remainder, and every class comes up."""
    drawn = []
    for n, seed in ((37, 0), (20, 0), (37, 1)):
        watch.samples.clear()
        run(fid, world.uvit, "--n", n, "--steps", 1, "--allow-few", "--labels", "random", "--seed", seed)
        drawn.append(torch.cat([s.y for s in watch.samples]).tolist())
    assert set(drawn[0]) == {0, 1, 2} and drawn[0][:20] == drawn[1] and drawn[0] != drawn[2]
    assert sum(c == i % 3 for i, c in enumerate(drawn[0])) < 25


def test_fid_of_stored_images(world, watch, capsys, tmp_path):
    """The training images score 0; of an npz the first n count; sample.py draws the images that fid.py scores."""
    np.savez(tmp_path / "train.npz", arr_0=world.train)
    flags = ["--allow-few", "--data", world.root, "--json", tmp_path / "a.json"]
    run(fid, tmp_path / "train.npz", "--ref", "blocks", *flags)
    assert score_of(tmp_path / "a.json")["fid"] == pytest.approx(0, abs=1e-5)
    run(sample, world.uvit, "--n", 40, "--steps", 2, "--out", tmp_path / "drawn.npz")
    capsys.readouterr()
    run(fid, tmp_path / "drawn.npz", "--ref", tmp_path / "train.npz", "--n", 37, *flags)
    last, images = capsys.readouterr().out.splitlines()[-1], watch.images()[:37]
    check_scores(tmp_path / "a.json", last, scores(images, world.train, watch.inception))
    run(fid, world.uvit, "--n", 37, "--steps", 2, *flags)
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_fid_of_several_checkpoints(world, watch, monkeypatch, capsys, tmp_path):
    """One reference, one Inception; each checkpoint's own numbers are printed and written, the lowest comes last."""
    paths = [write_checkpoint(tmp_path / f"epoch_{epoch}.pt", world.root, *UVIT, seed=epoch, epoch=epoch)
             for epoch in (800, 1000, 1200)]
    shutil.rmtree(world.root / ".fid", ignore_errors=True)
    loaded = []
    monkeypatch.setattr(fid, "load_inception", lambda *_, **__: loaded.append(1) or watch.inception)
    run(fid, *paths, "--n", 20, "--steps", 2, "--allow-few", "--json", tmp_path / "a.json")
    assert len(loaded) == 1 and looked_at(watch.inception) == [(i, False) for i in range(3 * TRAIN)]
    lines, results = [], json.loads((tmp_path / "a.json").read_text())["results"]
    for i, (result, path) in enumerate(zip(results, paths, strict=True)):
        want = scores(watch.images()[20 * i : 20 * i + 20], world.train, watch.inception)
        assert [result[key] for key in ("fid", "is_mean", "is_std")] == pytest.approx(want, rel=1e-4, abs=1e-5)
        lines.append(f"FID {result['fid']:.2f}  IS {result['is_mean']:.2f} +- {result['is_std']:.2f} ({path})")
    assert len({line.split()[1] for line in lines}) == 3
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FID ")]
    assert printed == [*lines, min(lines, key=lambda line: float(line.split()[1]))]


# ---- sample.py -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["uvit", "dit"])
def test_images_are_the_ema_networks(world, watch, tmp_path, name):
    """Written pixels are the sampler's x0, rounded; image i starts from noise of (seed, i), whatever n is."""
    path, noise = getattr(world, name), {}
    for n, seed in ((40, 0), (5, 0), (5, 1)):
        watch.samples.clear()
        calls = len(watch.forwards)
        run(sample, path, "--n", n, "--seed", seed, "--steps", 2, "--out", tmp_path / f"{n}_{seed}.npz")
        assert len(watch.forwards) - calls == 2 * len(watch.samples)  # steps, blocks of images
        written = np.load(tmp_path / f"{n}_{seed}.npz")["arr_0"]
        assert written.dtype == np.uint8 and np.array_equal(written, watch.images())
        noise[n, seed] = torch.cat([s.noise for s in watch.samples])
        if name == "uvit":
            assert torch.cat([s.y for s in watch.samples]).tolist() == [i % 3 for i in range(n)]
    watch.check_network(path, labels=name == "uvit")
    assert name == "uvit" or (watch.samples[0].x0.abs() > 1).any()  # RF does not clip, so that rounding has to
    assert torch.equal(noise[40, 0][:5], noise[5, 0])
    rows = torch.cat([noise[40, 0], noise[5, 1]]).flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.25 and abs(rows.std() - 1) < 0.03
    run(sample, path, "--n", 20, "--steps", 2, "--out", tmp_path / "png")
    files = sorted((tmp_path / "png").iterdir())
    whole = np.load(tmp_path / "40_0.npz")["arr_0"].astype(int)
    assert len(files) == 20
    assert all(abs(np.asarray(Image.open(f)) - whole[i]).max() <= 1 for i, f in enumerate(files))


@pytest.mark.parametrize("tool", [sample, fid, probe])
def test_nan_is_refused(world, watch, capsys, tmp_path, tool):
    """Broken weights end a tool with status 2 before it writes a number or an image."""
    state = torch.load(world.uvit, weights_only=True)
    state["ema"]["decoder_pred.bias" if tool is not probe else "pos_embed"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    out = tmp_path / ("a.npz" if tool is sample else "a.json")
    flags = {sample: ["--n", 4, "--out", out], fid: ["--n", 4, "--allow-few", "--json", out], probe: ["--json", out]}
    assert "NaN" in refused(capsys, tool, tmp_path / "nan.pt", *flags[tool], *([] if tool is probe else ["--steps", 2]))
    assert not out.exists() or out.stat().st_size == 0
