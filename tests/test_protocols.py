"""What probe.py, fid.py and sample.py do with a checkpoint, replayed from the paper's protocol in plain PyTorch.

Every image says who it is: a constant colour for the class, and at the upper left a mark whose green is the image's
number and whose blue tells the split; the mark of a mirrored image stands at the right. Networks are real and small,
EMA and trained weights different. What a tool asks of the network is watched at the seam (diffusion.features,
diffusion.sample, the network's run) and at the optimiser's step; random draws are taken as data, all that follows from
them is computed again.

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
from conftest import make_checkpoint, refused, run, spy
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
DIT = (train_dit, "--size", "tiny", "--patch", "2", "--self-cond", "--layer", "2", "--cl-t", "0.3")

# ---- The adapter: names of the tools' insides ------------------------------------------------------------------------
class TinyInception(nn.Module):
    """A stand-in for fid.Inception: means of the image's quarters make 8 features, all others are 0, and the logits."""

    def __init__(self):
        super().__init__()
        self.sha, self.seen = "0a" * 4, []
        draw = torch.Generator().manual_seed(0)
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

def heads_of(opt):
    """A copy of what probe.py trains: the layers' weights one below the other (D, K), and their biases (L, K)."""
    return [plain(p) for p in opt.param_groups[0]["params"]]

def cells_of(path):
    """The cells {layer, level, linear, knn} of the only checkpoint in probe.py's JSON file; level None: pixels."""
    (checkpoint,) = json.loads(path.read_text())["checkpoints"]
    return checkpoint["cells"]

# ---- Data and checkpoints --------------------------------------------------------------------------------------------
def write_data(root, darker=1.0):
    """Class folders ROOT/{train,test}/{a,b,c}. Returns the test labels and the training images (N, H, W, 3)."""
    train = []
    for blue, (split, n, dim) in enumerate((("train", TRAIN, 1.0), ("test", TEST, 0.8))):
        for label, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                other = split == "test" and i % 4 == 0
                image = np.empty((16, 16, 3))
                image[:] = np.array(COLOURS[(label + other) % 3]) * dim * darker
                image[0, 0] = 254, label * n + i, 100 + 50 * blue  # colours that a sampler hardly draws
                image = image.astype(np.uint8)
                Image.fromarray(image).save(root / split / name / f"{i:03d}.png")
                train += [image] if split == "train" else []
    return torch.arange(3 * TEST) // TEST, np.stack(train)

def write_checkpoint(path, data, script, *flags, **changes):
    """An untrained network as a run would leave it; gain=0 makes its features constant. Trained weights differ."""
    flags = "--dataset", "blocks", "--data", data, "--resolution", 16, *flags
    make_checkpoint(path, script, *flags, **{"shake": 0.1, "epoch": 7, "classes": list("abc"), **changes})
    state = torch.load(path, weights_only=True)
    state["objective"] = {f"net.{name}": v + 0.1 * torch.randn_like(v) for name, v in state["ema"].items()}
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
    paths = {name: write_checkpoint(root / f"{name}.pt", root, *flags)
             for name, flags in (("uvit", UVIT), ("unet", UNET), ("dit", DIT))}
    return SimpleNamespace(root=root, truth=truth, train=train, others=others, **paths)

# ---- The watch -------------------------------------------------------------------------------------------------------
def plain(value):
    """A copy that autograd may use, though it was made in inference mode."""
    with torch.inference_mode(False):
        return torch.from_numpy(value.detach().float().numpy().copy())

class Watch:
    """Records, in order: passes of the networks, reads of features, samples, optimiser steps."""

    def __init__(self, patch):
        self.passes, self.reads, self.samples, self.steps, self.nets = [], [], [], [], set()
        for network in (train_unet.UNet, train_uvit.UViT, train_dit.DiT):
            spy(patch, network, "run", self.note_pass)
        for diffusion in (train_unet.EDM, train_uvit.DDPM, train_dit.LatentRF):
            self.watch(patch, diffusion)
        self.hooks = [register_optimizer_step_pre_hook(self.before), register_optimizer_step_post_hook(self.after)]

    def note_pass(self, net, x, t, y=None, aug=None, *_, **__):
        self.nets.add(net)
        self.passes.append({
            "weights": fingerprint(net.state_dict()),
            "training": any(module.training for module in net.modules()),
            "learning": torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters()),
            "labels": y is not None and bool((y != net.classes).any()),
            "augmented": aug is not None and bool(aug.any())})  # fmt: skip

    def watch(self, patch, diffusion):
        features, sample = diffusion.features, diffusion.sample

        def watch_features(formulation, net, x0, level, noise, *args, **kwargs):
            feats = features(formulation, net, x0, level, noise, *args, **kwargs)
            if noise.any():  # a look at the layers' widths goes without
                read = {"x0": plain(x0), "noise": plain(noise), "level": level, "step": len(self.steps)}
                self.reads.append(SimpleNamespace(**read, feats={k: plain(v) for k, v in feats.items()}))
            return feats

        @functools.wraps(sample)  # tools look at its parameters
        def watch_sample(formulation, net, noise, *args, **kwargs):
            x0 = sample(formulation, net, noise, *args, **kwargs)
            self.samples.append(SimpleNamespace(noise=plain(noise), y=kwargs.get("y"), x0=plain(x0)))
            return x0

        patch.setattr(diffusion, "features", watch_features)
        patch.setattr(diffusion, "sample", watch_sample)

    def before(self, opt, args, kwargs):
        params = [p for group in opt.param_groups for p in group["params"]]
        assert not {id(p) for p in params} & {id(p) for net in self.nets for p in net.parameters()}
        self.steps.append(SimpleNamespace(opt=opt, lr=opt.param_groups[0]["lr"], start=heads_of(opt)))

    def after(self, opt, args, kwargs):
        self.steps[-1].end = heads_of(opt)

    def check_network(self, *paths, labels=False):
        """EMA weights, in eval mode and frozen, no augmentation label, the null class unless `labels`."""
        seen = list(dict.fromkeys(found.pop("weights") for found in self.passes))
        assert seen == pytest.approx([fingerprint(torch.load(path)["ema"]) for path in paths], rel=1e-9)
        want = {"training": False, "learning": False, "labels": labels, "augmented": False}
        assert all(found == want for found in self.passes)
        self.passes.clear()

    def stop(self):
        for hook in self.hooks:
            hook.remove()

    def training(self):
        """The reads that were trained on: the last before every step."""
        return [[r for r in self.reads if r.step == step][-1] for step in range(len(self.steps))]

    def still(self):
        """The reads that were not trained on: of the test, of kNN's bank, and where features are cached."""
        trained = {id(read) for read in self.training()}
        return [read for read in self.reads if id(read) not in trained]

    def images(self):
        """uint8 (N, H, W, 3) of all that was sampled, rounded to the nearest of 256 values in [-1, 1]."""
        x0 = torch.cat([s.x0 for s in self.samples]).permute(0, 2, 3, 1).double().numpy()
        return np.clip(np.rint((x0 + 1) * 127.5), 0, 255).astype(np.uint8)

@pytest.fixture
def watch(monkeypatch):
    """A Watch. There are several blocks of images where there would be one; the Inception has 8 features."""
    watch, distance = Watch(monkeypatch), fid.frechet_distance
    watch.inception, watch.loaded = TinyInception(), []
    monkeypatch.setattr(fid, "load_inception", lambda *_, **__: watch.loaded.append(1) or watch.inception)
    monkeypatch.setattr(fid, "frechet_distance",  # of 2048 features, most of them 0, it takes seconds
                        lambda *moments: distance(*(m[(slice(8),) * m.ndim] for m in moments)))
    monkeypatch.setattr(probe, "NOISE_BLOCK", 16)
    monkeypatch.setattr(sample, "BLOCK", 16)
    yield watch
    watch.stop()

def who(x0):
    """Images (B, 3, 16, 16) in [-1, 1] -> number (B,), whether of the test split (B,), whether mirrored (B,)."""
    raw = ((x0 + 1) * 127.5).round().long()
    flip = raw[:, 0, 0, 15] == 254
    assert (flip != (raw[:, 0, 0, 0] == 254)).all()  # one mark in every image, so nothing was cropped
    mark = torch.where(flip[:, None], raw[:, :, 0, 15], raw[:, :, 0, 0])
    return mark[:, 1], mark[:, 2] == 150, flip

# ---- probe.py --------------------------------------------------------------------------------------------------------
def replay(watch, lr, layers, standardise):
    """Train the heads of the recorded features again, step by step. Returns the last heads, one per layer."""
    watch.stop()
    heads, widths = [], [watch.reads[0].feats[layer].shape[1] for layer in layers]
    for weight, bias in zip(watch.steps[0].start[0].split(widths), watch.steps[0].start[1], strict=True):
        heads.append(nn.Linear(*weight.shape))
        heads[-1].weight.data, heads[-1].bias.data = weight.T.clone(), bias.clone()
    opt = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, len(watch.steps))  # UNSPECIFIED: per step, as ours
    for step, (read, done) in enumerate(zip(watch.training(), watch.steps, strict=True)):
        assert done.lr == pytest.approx(opt.param_groups[0]["lr"], rel=1e-6), step
        opt.zero_grad()
        for head, layer in zip(heads, layers, strict=True):
            F.cross_entropy(head(standardise(read.feats[layer], layer)), who(read.x0)[0] // TRAIN).backward()
        opt.step()
        cosine.step()
        assert torch.allclose(torch.cat([head.weight.T for head in heads]), done.end[0], atol=1e-4), step
        assert torch.allclose(torch.stack([head.bias for head in heads]), done.end[1], atol=1e-4), step
    return heads

def still_features(watch, layer, split=True):
    """Features that were read without training on them, row i of image i: of the test or the training split."""
    rows = {}
    for read in watch.still():
        for i, of_test, flip, feat in zip(*who(read.x0), read.feats[layer], strict=True):
            if of_test == split and not flip:
                assert int(i) not in rows or not split, "a test image was read twice"
                rows[int(i)] = feat
    assert sorted(rows) == list(range(3 * (TEST if split else TRAIN)))
    return torch.stack([rows[i] for i in sorted(rows)])

@pytest.mark.parametrize(("name", "layers", "level", "epochs", "flags"), [
    ("uvit", ["in_1", "out_2"], "t=600", 4, ["--layer", "in_1", "out_2", "--t", 600, "--epochs", 4, "--batch", 25]),
    ("unet", ["out_2"], "s=5", 4, ["--layer", "out_2", "--t", 5, "--epochs", 4, "--batch", 25, "--batchnorm"]),
    ("dit", ["2"], "t=0.3", 30, ["--no-flip"]),  # all else follows from the training run
])  # fmt: skip
def test_probe_replayed(world, watch, capsys, tmp_path, name, layers, level, epochs, flags):
    path, batchnorm = getattr(world, name), "--batchnorm" in flags
    run(probe, path, *flags, "--json", tmp_path / "a.json")
    watch.check_network(path)
    assert {float(read.level) for read in watch.reads} == {float(level[2:])}

    # 1. Training: the whole training split and nothing else, in a new order, with new flips in each epoch. Nowhere,
    # neither in two epochs nor in the test, do two images share their noise.
    steps, n = watch.training(), 3 * TRAIN
    assert [len(read.x0) for read in steps] == ([25, 25, 10] if "--batch" in flags else [n]) * epochs
    number, of_test, flip = (torch.cat(part).view(epochs, n)
                             for part in zip(*(who(read.x0) for read in steps), strict=True))
    assert not of_test.any() and (number.sort(1)[0] == torch.arange(n)).all()
    assert len({tuple(row.tolist()) for row in number}) == epochs
    if "--no-flip" in flags:
        assert not flip.any()
    else:
        flip = flip.gather(1, number.argsort(1)).float()  # by image
        assert 0.4 < flip.mean() < 0.6 and 0.3 < (flip[0] != flip[1]).float().mean() < 0.7
    noise = torch.cat([read.noise for read in watch.reads]).flatten(1)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.25

    # 2. Test: every test image once, unflipped. kNN's bank, and statistics of features: training images unflipped.
    assert not any(who(read.x0)[2].any() for read in watch.still())
    banks = {layer: still_features(watch, layer, False) for layer in layers if batchnorm}

    def standardise(feat, layer):
        if not batchnorm:
            return feat
        return (feat - banks[layer].mean(0)) / (banks[layer].var(0, correction=0) + 1e-5).sqrt()

    # 3. The same heads and the same accuracy, but for two images that a rounding may decide.
    assert type(watch.steps[0].opt) is torch.optim.Adam
    cells = cells_of(tmp_path / "a.json")
    assert [(cell["layer"], cell["level"]) for cell in cells] == [(layer, float(level[2:])) for layer in layers]
    for head, layer, cell in zip(replay(watch, 4e-3, layers, standardise), layers, cells, strict=True):
        feat = still_features(watch, layer)
        right = (head(standardise(feat, layer)).argmax(1) == world.truth).float().mean().item()
        assert cell["linear"] == pytest.approx(100 * right, abs=200.1 / len(feat))
        near = knn(banks[layer], np.arange(n) // TRAIN, feat, world.truth) if batchnorm else None
        assert cell["knn"] == near if near is None else cell["knn"] == pytest.approx(near, abs=200.1 / len(feat))
    best = max(cells, key=itemgetter("linear"))
    spread = (best["linear"] * (100 - best["linear"]) / 72) ** 0.5
    said = f"top-1 {best['linear']:.2f} % +- {spread:.2f} ({best['layer']}, {level})"
    said += f", kNN {best['knn']:.2f} %" if batchnorm else ""
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == said and (len(cells) > 1 or not [line for line in lines if line.startswith("top-1")])

def knn(bank, bank_labels, queries, labels):
    """Top-1 in percent of the vote of the 20 nearest by cosine, weights exp(similarity / 0.07)."""
    hits, bank = 0, bank.double().numpy()
    for query, label in zip(queries.double().numpy(), labels.tolist(), strict=True):
        near = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        first = np.argsort(-near)[:20]
        votes = [np.exp(near[first][bank_labels[first] == c] / 0.07).sum() for c in range(3)]
        hits += np.argmax(votes) == label
    return 100 * hits / len(queries)

def test_cached_probe_and_pixels(world, watch, capsys, tmp_path):
    """With --cache every training image is read twice, once mirrored. Raw pixels, told beside: 75 %."""
    layers = ["in_1", "in_2", "out_2"]
    run(probe, world.uvit, "--layer", *layers, "--t", 600, "--pixels", "--cache", "--json", tmp_path / "a.json")
    watch.check_network(world.uvit)
    *cells, pixels = cells_of(tmp_path / "a.json")
    assert pixels["level"] is None and pixels["linear"] == pytest.approx(75) and pixels["knn"] == pytest.approx(75)
    # A clean image has one colour, so all its pixels get one weight, but for the marks: at the left, mirrored right.
    weight = watch.steps[-1].end[0].T.reshape(3, 3, 16, 16)
    assert torch.allclose(weight[:, :, 1:], weight[:, :, 1:, :1].expand(-1, -1, 15, 16), atol=5e-5)
    assert all((weight[:, :, 0, side] - weight[:, :, 1, side]).abs().max() > 1e-3 for side in (0, 15))
    assert len(watch.steps) and all(read.step == 0 for read in watch.reads)
    seen = [tuple(map(int, row)) for read in watch.reads for row in zip(*who(read.x0), strict=True)]
    want = [(i, 1, 0) for i in range(3 * TEST)] + [(i, 0, flip) for i in range(3 * TRAIN) for flip in (0, 1)]
    assert sorted(seen) == sorted(want)
    noise = torch.cat([read.noise for read in watch.reads]).flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.25  # mirror images have their own
    watch.steps.clear()
    for layer, cell in zip(layers, cells, strict=True):
        bank, queries = (still_features(watch, layer, split) for split in (False, True))
        want = knn(bank, np.arange(3 * TRAIN) // TRAIN, queries, world.truth)
        assert cell["knn"] == pytest.approx(want, abs=200.1 / len(queries)), layer
    best = max(cells, key=itemgetter("linear"))
    number = f"({best['layer']}, t=600), kNN {best['knn']:.2f} %"
    assert capsys.readouterr().out.splitlines()[-1].endswith(number)

def test_best_of_several_checkpoints(world, watch, capsys, tmp_path):
    """Constant features know one class of three; the checkpoint in the middle knows more, and it counts."""
    paths = [write_checkpoint(tmp_path / "a" / f"{epoch}.pt", world.root, *UVIT, gain=gain, epoch=epoch)
             for epoch, gain in ((1200, 0), (1000, 1), (800, 0))]
    run(probe, *paths, "--epochs", 4, "--batch", 20, "--layer", "out_2")
    *_, where, which, last = capsys.readouterr().out.splitlines()
    file, = {*(tmp_path / "a").iterdir()} - {*paths}  # and no picture
    result = json.loads(file.read_text())
    found = [checkpoint["cells"][0]["linear"] for checkpoint in result["checkpoints"]]
    assert [checkpoint["epoch"] for checkpoint in result["checkpoints"]] == [1200, 1000, 800]
    assert found[0] == found[2] == pytest.approx(100 / 3, abs=0.01) and found[1] > 40
    assert (where, which) == (f"wrote {file}", "best: a, epoch 1000") and file.name == "probe_a-1200-a-1000-a-800.json"
    assert last.startswith(f"top-1 {found[1]:.2f} % +- ") and last.endswith(" (out_2, t=11)")
    assert (result["top1"], result["epoch"]) == (found[1], 1000)

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

def looked_at(inception):
    """The marked images that the Inception saw since the last call: (number, of the test split)."""
    corner = torch.cat(inception.seen).add(1).mul(127.5).round().long()
    inception.seen.clear()
    return sorted((g, b == 150) for r, g, b in corner.tolist() if r == 254 and b in (100, 150))

@pytest.mark.parametrize("name", [pytest.param("uvit", marks=pytest.mark.slow), "dit"])
def test_fid_replayed(world, watch, capsys, tmp_path, name):
    """Of three U-ViTs at once, and of one DiT."""
    paths, n, everything = [getattr(world, name)], 37, [(i, False) for i in range(3 * TRAIN)]
    if name == "uvit":
        paths += [write_checkpoint(tmp_path / f"{seed}.pt", world.root, *UVIT, seed=seed) for seed in (1, 2)]
    shutil.rmtree(world.root / ".fid", ignore_errors=True)

    def score(train, *argv, images=None):
        """One run, its scores checked: what was seen of the data, and the images that were sampled or are given."""
        watch.samples.clear()
        watch.loaded.clear()
        run(fid, *argv, "--allow-few", "--data", world.root, "--json", tmp_path / "a.json")
        seen, images = looked_at(watch.inception), watch.images() if images is None else images
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FID ")]
        results = json.loads((tmp_path / "a.json").read_text())["results"]
        for i, result in enumerate(results):
            want = scores(np.split(images, len(results))[i], train, watch.inception)
            assert [result[key] for key in ("fid", "is_mean", "is_std")] == pytest.approx(want, rel=4e-4, abs=1e-5)
            said = f"FID {result['fid']:.2f}  IS {result['is_mean']:.2f} +- {result['is_std']:.2f}"
            assert lines[i] == said + f" ({argv[i]})" * (len(results) > 1)
        lowest = min(results, key=itemgetter("fid"))
        assert lines[-1] == lines[results.index(lowest)] and len({line.split()[1] for line in lines}) == len(results)
        assert watch.loaded == [1], "one Inception for all"
        return seen, images

    # EMA, the whole training split and no test image, balanced classes. Again: the reference is not measured twice.
    # Another seed, other images. Another data set, another reference.
    flags = "--n", n, "--steps", 2
    seen, images = score(world.train, *paths, *flags)
    watch.check_network(*paths, labels=name == "uvit")
    labels = [s.y for s in watch.samples]
    assert torch.cat(labels).tolist() == [i % 3 for i in range(n)] * 3 if name == "uvit" else set(labels) == {None}
    assert len(images) == n * len(paths) and seen == everything
    noise = torch.cat([s.noise for s in watch.samples])[:n].flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.25 and abs(noise.std() - 1) < 0.03
    seen, again = score(world.train, paths[0], *flags)
    assert seen == [] and np.array_equal(images[:n], again)
    assert json.loads((tmp_path / "a.json").read_text())["results"][0]["epoch"] == 7
    seen, others = score(world.others, paths[0], *flags, "--seed", 1, "--ref", "others")
    assert seen == everything and not (others == again).all((1, 2, 3)).any()

    # Stored images: the training images score 0; of an npz the first n count.
    np.savez(tmp_path / "train.npz", arr_0=world.train)
    score(world.train, tmp_path / "train.npz", "--ref", "blocks", images=world.train)
    assert json.loads((tmp_path / "a.json").read_text())["results"][0]["fid"] == pytest.approx(0, abs=1e-5)

    # sample.py draws what fid.py scores, with the EMA weights, and writes the sampler's x0, rounded.
    watch.samples.clear()
    run(sample, paths[0], "--n", 40, "--steps", 2, "--out", tmp_path / "drawn.npz")
    watch.check_network(paths[0], labels=name == "uvit")
    assert np.array_equal(np.load(tmp_path / "drawn.npz")["arr_0"], watch.images())
    assert name == "uvit" or (watch.samples[0].x0.abs() > 1).any()  # RF does not clip, so that rounding has to
    score(world.train, tmp_path / "drawn.npz", "--ref", tmp_path / "train.npz", "--n", n, images=again)

# ---- All tools -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tool", [sample, fid, probe])
def test_nan_is_refused(world, watch, capsys, tmp_path, tool):
    """Broken weights end a tool with status 2 before it writes a number or an image."""
    state = torch.load(world.uvit, weights_only=True)
    state["ema"]["decoder_pred.bias" if tool is not probe else "pos_embed"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    out = tmp_path / ("a.npz" if tool is sample else "a.json")
    few = ["--n", 4, "--steps", 2]
    flags = {sample: [*few, "--out", out], fid: [*few, "--allow-few", "--json", out], probe: ["--json", out]}
    assert "NaN" in refused(capsys, run, tool, tmp_path / "nan.pt", *flags[tool])
    assert not out.exists() or out.stat().st_size == 0
