"""probe.py: heads against closed forms, kNN against a loop, ranks against one process, and the command line."""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing, nn

import probe
import sample
import train_dit
import train_unet
import train_uvit


def flags(**changes):
    """The resolved flags that the functions of probe.py read."""
    args = dict(batch=32, epochs=3, lr=4e-3, flip=True, batchnorm=False, cache=False, features=None, seed=0)
    return argparse.Namespace(**{**args, **changes})


def make_split(n, seed=0, classes=4):
    """Random 8x8 images whose brightness tells the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=draw)
    images = torch.randint(100, (n, 3, 8, 8), generator=draw) + 30 * labels[:, None, None, None]
    return probe.Split(images.to(torch.uint8), labels, classes, train_unet.to_x0)


class FakeDiffusion:
    """Two layers: colour means, and the left half's pixels. Their noise is level * noise."""

    def features(self, net, x0, level, noise, y=None, pool="gap", last=None):
        x = x0 + level * noise
        feats = {"out_1": x.mean((2, 3)), "out_2": x[..., :4].flatten(1)}
        return {name: feats[name] for name in list(feats)[: list(feats).index(last) + 1]}


LAYERS = {"out_1": 3, "out_2": 96}


def fake_encoder(level, layers=LAYERS):
    net = SimpleNamespace(layers=[*LAYERS])
    return probe.Encoder(SimpleNamespace(net=net, diffusion=FakeDiffusion(), path="fake"), level, layers)


# ---- Heads, kNN, protocol ---------------------------------------------------------------------------------
def test_head_learns_the_class_frequencies():
    """With one-hot features cross-entropy has a closed form: softmax(logits) = class frequencies given the feature."""
    group = torch.arange(3).repeat_interleave(40)
    labels = torch.cat([torch.arange(40) % 2, torch.arange(40) % 4, torch.full((40,), 3)])
    images = group.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    class OneHot:
        widths = {"feature": 3}

        def __call__(self, x0, noise):
            return nn.functional.one_hot(x0[:, 0, 0, 0].long(), 3).float()

    split = probe.Split(images, labels, 4, lambda x, flip: x.float())
    heads = probe.train_heads(OneHot(), split, flags(batch=120, epochs=500, lr=0.1))
    got = heads(torch.eye(3))[0].softmax(1)
    want = torch.stack([torch.bincount(labels[group == g], minlength=4) / 40 for g in range(3)])
    assert torch.allclose(got, want, atol=0.01), got
    assert heads.accuracy(torch.eye(3)[[2, 2]], torch.tensor([3, 0])) == [50]


def test_separable_features_are_separated():
    train, test = make_split(512), make_split(128, seed=1)
    cells = probe.probe_level(fake_encoder(0.01), train, test, flags(epochs=40, lr=0.05))
    assert [(cell["layer"], cell["level"]) for cell in cells] == [("out_1", 0.01), ("out_2", 0.01)]
    assert cells[0]["linear"] == 100 and cells[1]["linear"] > 90, cells


def test_heads_trained_together_equal_heads_trained_alone():
    train, args = make_split(100), flags()
    both = probe.train_heads(fake_encoder(0.1), train, args)
    weights = both.weight.split(list(LAYERS.values()))
    assert weights[1].abs().max() > 1e-3
    for i, (name, width) in enumerate(LAYERS.items()):
        alone = probe.train_heads(fake_encoder(0.1, {name: width}), train, args)
        assert torch.allclose(weights[i], alone.weight, atol=1e-6)
        assert torch.allclose(both.bias[i], alone.bias[0], atol=1e-6)


def test_heads_match_plain_adam():
    """One head, no noise: the textbook loop with torch's own pieces, flips and the smaller last batch included."""
    train, args = make_split(90), flags()
    train.images[..., 4:] = 0  # so that flips show
    heads = probe.train_heads(fake_encoder(0.0, {"out_2": 96}), train, args)
    linear = nn.Linear(96, 4)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    opt = torch.optim.Adam(linear.parameters(), lr=args.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)
    for epoch in range(3):
        draw = probe.stream_generator("cpu", 0, probe.ORDER, epoch)
        order, flip = torch.randperm(90, generator=draw), torch.rand(90, generator=draw) < 0.5
        for index in order.split(32):
            x0 = train_unet.to_x0(train.images[index])
            feat = torch.where(flip[index, None, None, None], x0.flip(3), x0)[..., :4].flatten(1)
            opt.zero_grad()
            nn.functional.cross_entropy(linear(feat), train.labels[index]).backward()
            opt.step()
            cosine.step()
    assert torch.allclose(heads.weight.T, linear.weight, atol=1e-6)
    assert torch.allclose(heads.bias[0], linear.bias, atol=1e-6)


@pytest.mark.parametrize("cache", [False, True])
def test_batchnorm_is_torchs_over_the_training_split(cache, monkeypatch):
    kept, trained = [], probe.train_heads
    monkeypatch.setattr(probe, "train_heads", lambda *a: kept.append(trained(*a)) or kept[0])
    train = make_split(600)
    probe.probe_level(fake_encoder(0.0), train, make_split(50, seed=1), flags(batchnorm=True, cache=cache))
    x0 = train_unet.to_x0(train.images)
    feats = [x0.mean((2, 3)), x0[..., :4].flatten(1)]
    parts = zip(feats, kept[0].weight.split(list(LAYERS.values())), kept[0].bias, strict=True)
    want = [nn.BatchNorm1d(feat.shape[1], affine=False)(feat) @ weight + bias for feat, weight, bias in parts]
    assert torch.allclose(kept[0](torch.cat(feats, 1)), torch.stack(want), atol=1e-4)
    assert kept[0].weight.abs().max() > 1e-3


@pytest.mark.parametrize("n", [12, 50])  # fewer than k, and more
def test_knn_is_the_brute_force_vote(n):
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(n, 7, generator=draw), torch.randn(9, 7, generator=draw)
    classes, labels = torch.randint(3, (n,), generator=draw), torch.randint(3, (9,), generator=draw)
    got = probe.knn(queries, labels, bank, classes, [3, 4], 3)
    for layer, columns in enumerate([slice(0, 3), slice(3, 7)]):
        hits = 0
        for query, label in zip(queries[:, columns], labels, strict=True):
            near = [float(query @ b / query.norm() / b.norm()) for b in bank[:, columns]]
            score = [0.0] * 3
            for similarity, c in sorted(zip(near, classes.tolist(), strict=True), reverse=True)[:20]:
                score[c] += math.exp(similarity / 0.07)
            hits += score.index(max(score)) == int(label)
        assert got[layer] == pytest.approx(100 * hits / 9, abs=1e-4)


def test_latents_take_the_stored_mirror_image():
    latents = torch.randn(6, 2, 4, 8, 8, dtype=torch.float16)
    split = probe.Split(latents, torch.zeros(6).long(), 1, train_dit.to_x0)
    x0 = split.x0(torch.tensor([4, 1]), torch.tensor([True, False]))
    assert torch.equal(x0, torch.stack([latents[4, 1], latents[1, 0]]).float())


@pytest.mark.parametrize(
    ("trained", "diffusion", "want"),
    [
        (dict(model="ddpm", backbone="ddpm", dataset="cifar100"), train_unet.DDPM(1e-3), (15, 4e-3, 512, "t", 260)),
        (dict(model="edm", backbone="ddpmpp", dataset="cifar10"), train_unet.EDM(), (15, 4e-3, 256, "s", 0.585)),
        (dict(model="rf", backbone="tiny", dataset="shapes"), train_unet.RF(), (30, 4e-3, 128, "t", 0.4)),
        (dict(model="ddpm", size="S", dataset="tiny-imagenet"), train_uvit.DDPM(1), (30, 4e-3, 256, "t", 260)),
        (dict(model="ddpm", size="tiny", dataset="shapes"), train_uvit.DDPM(1), (30, 4e-3, 128, "t", 260)),
        (dict(model="rf", size="B", dataset="imagenet"), train_dit.LatentRF(), (30, 2e-3, 1440, "t", 0.5)),
    ],
)
def test_the_protocol_is_that_of_tab_11(trained, diffusion, want):
    args = argparse.Namespace(**trained, cl_t=7)
    model = SimpleNamespace(args=args, script=train_unet, diffusion=diffusion, path=Path("p"), epoch=3, name="p")
    latents = isinstance(diffusion, train_dit.LatentRF)
    split = probe.Split(torch.zeros(6, 2, 4, 8, 8) if latents else torch.zeros(6, 3, 8, 8), torch.zeros(6), 2, None)

    def defaults(**flags):
        blank = dict(epochs=None, lr=None, batch=None, amp="auto", t=None, dataset=None, loss=False, pool=["gap"])
        flags = argparse.Namespace(**blank | {"grid": True} | flags)
        return probe.fill_in_protocol(flags, model, split, torch.device("cpu"))

    args = defaults()
    head = probe.result_header(model, args)
    assert (args.epochs, args.lr, args.batch, head["symbol"], args.t[-1]) == want
    assert defaults(grid=False).t == defaults(pool=["gap", "token"]).t == [7]
    assert len(defaults(loss=True).t) >= 10 and head["dataset"] == trained["dataset"]
    assert defaults(dataset="cifar10").epochs == 15 and defaults(dataset="stl10").epochs == 30


@pytest.mark.parametrize(("fast", "want"), [(False, "off"), (True, "bf16")])
def test_amp_auto_is_that_of_training(run, monkeypatch, fast, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast}, raising=False)
    flags = [run / "epoch_1.pt", "--amp", "auto", "--epochs", "1", "--subset", "20", "--json", run / "amp.json"]
    assert call(*flags)[0]["protocol"]["amp"] == want


# ---- Noise: fresh, cached, split over ranks ----------------------------------------------------------------
def test_cache_equals_fresh_without_noise():
    train, test = make_split(700), make_split(60, seed=1)
    fresh, cached = (probe.probe_level(fake_encoder(0.0), train, test, flags(cache=c)) for c in (False, True))
    assert [cell["linear"] for cell in fresh] == [cell["linear"] for cell in cached]
    assert [cell["knn"] for cell in fresh] == [None, None] and min(cell["knn"] for cell in cached) > 40  # chance is 25


def test_noise_is_fresh_in_training_and_fixed_in_testing(monkeypatch):
    """And no two images share it, of one block or of two."""
    seen = []
    monkeypatch.setattr(probe, "NOISE_BLOCK", 32)

    class Spy:
        widths = {"out": 3}

        def __call__(self, x0, noise):
            seen.append(noise)
            return x0.mean((2, 3))

    train = make_split(64)
    probe.train_heads(Spy(), train, flags(batch=64, epochs=2))
    for _ in range(2):
        probe.stored_features(Spy(), train, probe.TEST_NOISE, seed=0)
    fresh, fixed, again = seen[:2], torch.cat(seen[2:4]), torch.cat(seen[4:])
    assert fixed.equal(again)
    for a, b in [*itertools.combinations([*fresh, fixed], 2), seen[2:4], (fixed[:-1], fixed[1:])]:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.05
    assert abs(fresh[0].std() - 1) < 0.02


# ---- Command line ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of 16x16 images in two classes, and two untrained checkpoints of the smallest network."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.RandomState(0)
    for split, n in [("train", 40), ("test", 20)]:
        for label, name in enumerate(["dark", "light"]):
            folder = root / "data" / "mini" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.randint(0, 200, (16, 16, 3)) + 3 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        shutil.copytree(folder, root / "data" / "flat" / split)
    argv = ["--dataset", "mini", "--data", str(root / "data"), "--resolution", "16", "--backbone", "tiny"]
    args = train_unet.parse_args([*argv, "--self-cond", "--layer", "out_4", "--out", str(root)])
    for epoch in (1, 2):
        net, _ = train_unet.build(args)
        state = {"script": "train_unet", "args": vars(args), "ema": net.state_dict(), "epoch": epoch, "step": 9}
        torch.save(state, root / f"epoch_{epoch}.pt")
    state["args"] = state["args"] | {"model": "edm"}
    torch.save(state, root / "edm.pt")
    return root


def call(*argv):
    """Run the command in this process, on the CPU and quickly."""
    args = probe.parse_args([*"--device cpu --amp off --batch 30 --epochs 2".split(), *map(str, argv)])
    return sample.run_tool(probe.main, args)


def is_png(path):
    image = Image.open(path)
    image.load()
    return image.format == "PNG" and min(image.size) > 100


def test_defaults_are_the_checkpoints_own(run, capsys):
    result = call(run / "epoch_1.pt", "--json", run / "one.json")[0]
    lines = capsys.readouterr().out.splitlines()
    (cell,) = result["cells"]
    se = math.sqrt(cell["linear"] * (100 - cell["linear"]) / 40)  # binomial, 40 test images
    assert lines[-1] == f"top-1 {cell['linear']:.2f} % +- {se:.2f} (out_4, t=11)"
    assert len([line for line in lines if line.startswith("top-1")]) == 1
    assert "EMA weights of epoch 1" in lines[0]
    for word in ("epochs 2", "lr 0.004", "batch 30", "batchnorm False", "cache False", "80 train, 40 test, 2 classes"):
        assert word in lines[1], lines[1]
    written = json.loads((run / "one.json").read_text())
    assert written["checkpoints"] == [result] and written["top1"] == result["cells"][0]["linear"]
    assert cell["layer"] == "out_4" and lines[-2] == f"wrote {run / 'one.json'}"


def test_grid_writes_table_json_and_picture(run, capsys):
    result = call(run / "epoch_1.pt", "--grid", "--t", "1", "66", "--pixels", "--cache")[0]
    lines = capsys.readouterr().out.splitlines()
    layers = result["layers"]
    assert len(layers) > 4 and layers == [f"out_{i + 1}" for i in range(len(layers))]
    pattern = r"top-1 (\d+\.\d\d) % \+- \d\.\d\d \((\w+)(?:, t=(\d+))?\), kNN (\d+\.\d\d) %"
    told = [re.fullmatch(pattern, line) for line in lines[2:-3]]
    assert lines[-3:-1] == [f"wrote {run / 'probe_grid'}.{suffix}" for suffix in ("json", "png")]
    assert lines[-1] in lines[2:-3] and "pixels" not in lines[-1]
    assert [(m[2], m[3]) for m in told] == [*[(x, t) for t in ("1", "66") for x in layers], ("pixels", None)]
    assert [m[1] for m in told] == [f"{cell['linear']:.2f}" for cell in result["cells"]]
    cells = json.loads((run / "probe_grid.json").read_text())["checkpoints"][0]["cells"]
    assert cells == result["cells"] and len(cells) == 2 * len(layers) + 1
    assert cells[-1]["layer"] == "pixels" and cells[-1]["level"] is None
    assert all(0 <= c["linear"] <= 100 and 0 <= c["knn"] <= 100 for c in cells)
    assert is_png(run / "probe_grid.png")


def test_a_cell_does_not_depend_on_the_rest_of_the_grid(run):
    grid = call(run / "epoch_1.pt", "--layer", "out_2", "out_4", "--t", "1", "66", "--batchnorm")[0]["cells"]
    alone = call(run / "epoch_1.pt", "--layer", "out_4", "--t", "66", "--batchnorm")[0]["cells"]
    assert grid[-1] == alone[0]


def test_the_best_cell_is_that_of_the_heads_and_of_the_network():
    """Neither the nearest neighbours' best nor raw pixels, unless there is nothing else."""
    pixels = {"level": None, "linear": 75.0, "knn": 80.0}
    cells = [{"level": 11, "linear": linear, "knn": knn} for linear, knn in ((30.0, 20.0), (40.0, 10.0), (35.0, 50.0))]
    assert probe.best_cell([*cells, pixels]) is cells[1] and probe.best_cell([pixels]) is pixels


def test_several_checkpoints_give_a_curve_and_the_best(run, capsys):
    results = call(run / "epoch_2.pt", run / "epoch_1.pt")
    lines = capsys.readouterr().out.splitlines()
    best = max(result["cells"][0]["linear"] for result in results)
    winner = max(results, key=lambda result: result["cells"][0]["linear"])
    assert lines[-1].startswith(f"top-1 {best:.2f} % +- ") and lines[-1].endswith("(out_4, t=11)")
    written = run / f"probe_{run.name}-epoch_2-{run.name}-epoch_1.json"
    assert lines[-3:-1] == [f"wrote {written}", f"best: {run.name}, epoch {winner['epoch']}"]
    assert [r["epoch"] for r in json.loads(written.read_text())["checkpoints"]] == [2, 1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{run}/none.pt"], "none.pt does not exist"),
        (["{run}/epoch_1.pt", "{run}/none.pt"], "none.pt does not exist"),
        (["{run}/epoch_1.pt", "--layer", "out_99"], "no layer out_99: choose --layer from out_1 out_2"),
        (["{run}/epoch_1.pt", "{run}/edm.pt", "--t", "500"], "edm.pt, --t: noise level 500: EDM takes"),
        (["{run}/epoch_1.pt", "--t", "11", "1001"], "--t: noise level 1001: DDPM takes"),
        (["{run}/epoch_1.pt", "--pool", "cls"], "epoch_1.pt has no --pool cls"),
        (["{run}/epoch_1.pt", "--data", "{run}/nowhere"], "nowhere"),
        (["{run}/epoch_1.pt", "--dataset", "flat"], "flat has no classes"),
        (["{run}/" + 5000 * "x"], "File name too long"),
        (["{run}/epoch_1.pt", "--json", "{run}"], "cannot write"),
        (["{run}/epoch_1.pt", "--plot", "{run}/nowhere/a.png"], "cannot write"),
        (["{run}/epoch_1.pt", "--features", "{run}/epoch_1.pt/f.npz"], "cannot write"),
        (["{run}/epoch_1.pt", "--grid", "--layer", "out_1"], "not allowed with argument"),
        (["{run}/epoch_1.pt", "--device", "gpu"], "invalid choice: 'gpu'"),
        (["{run}/epoch_1.pt", "--plot", "a.txt"], "FILE.png"),
        (["{run}/epoch_1.pt", "--lr", "0"], "above 0"),
        (["{run}/epoch_1.pt", "--lr", "nan"], "above 0"),
        (["{run}/epoch_1.pt", "--batch", "9" * 30], "above 0"),
        (["{run}/epoch_1.pt", "--t", "nan"], "noise level nan"),
        (["{run}/epoch_1.pt", "--pool", "gap", "cls", "--t", "1", "2"], "go with one --t"),
        (["{run}/epoch_1.pt", "{run}/edm.pt", "--loss", "--t", "1"], "differ in formulation"),
        (["{run}/epoch_1.pt", "--loss", "--features", "{run}/f.npz"], "not go with --loss"),
        (["{run}/epoch_1.pt", "--loss", "--subset", "1"], "--loss needs two test images or more, mini has 1"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(run, capsys, argv, message):
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit) as stop:
        call(*(part.format(run=run) for part in argv))
    said = capsys.readouterr()
    error = said.err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error and "error: " in error, error
    assert "top-1" not in said.out and sorted(run.iterdir()) == before, "told after the work, or an empty file is left"


LOG = '{"step": 0, "args": {"batch": 8, "dataset": "mini"}}\n{"step": 9, "loss_unweighted": 1.5}\n'
SCORED = {"checkpoint": "a/b.pt", "epoch": 1, "dataset": "mini"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", None),
        ("metrics.jsonl", LOG[:60]),
        ("metrics.jsonl", LOG.replace("unweighted", "diffusion")),  # of an earlier version
        ("metrics.jsonl", LOG.replace("8", '"many"')),
        ("metrics.jsonl", LOG.replace("{", "[").replace("}", "]}")),
        ("metrics.jsonl", "\0\xff" * 99),
        ("a.json", None),
        ("a.json", "[1, 2"),
        ("a.json", "[]"),
        ("a.json", '{"results": [7]}'),
        ("a.json", json.dumps({"results": [{"epoch": 3, "fid": 1}]})),
        ("a.json", json.dumps({"results": [SCORED | {"fid": 2, "cells": [{"linear": "?"}]}]})),
        ("a.json", json.dumps({"results": [SCORED | {"fid": {}, "cells": [{"linear": 1, "level": 2}]}]})),
        ("a.json", json.dumps({"results": [SCORED, SCORED | {"epoch": "last"}]})),
    ],
)
def test_damaged_logs_and_results_are_told_in_one_line(tmp_path, capsys, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    argv = [str(tmp_path), "--curves"] if name == "metrics.jsonl" else [str(tmp_path / name)]
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and re.match(rf"error: {tmp_path / name}: missing, damaged,? (or )?empty", error), error
    assert [path.name for path in tmp_path.iterdir()] == [name] * (text is not None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_is_told_in_one_line(run, capsys):
    with pytest.raises(SystemExit) as stop:
        call(run / "epoch_1.pt", "--json", "/dev/full")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error and "No space left" in error, error


class Loss(nn.Module):
    """A formulation whose loss on a batch is the mean of what loss_of(x0, level, noise) gives for each image."""

    def __init__(self, loss_of):
        super().__init__()
        self.loss_of = loss_of

    def loss(self, net, x0, level, noise, y=None, aug=None):
        assert y is None and aug is None
        loss = torch.stack([self.loss_of(*row) for row in zip(x0, level, noise, strict=True)]).mean()
        return torch.nan * loss, loss, None  # held out is the unweighted one, the second

    def check_level(self, level):
        assert 0 <= level <= 1


Loss.__name__ = "RF"  # whose levels it has


def fake_losses(monkeypatch, n, *losses, **changes):
    """heldout_loss of one fake run after the other, on n random images."""
    split = make_split(n)
    monkeypatch.setattr(probe, "load_split", lambda *a: split)
    results = []
    for i, loss_of in enumerate(losses):
        args = argparse.Namespace(model="rf", dataset="shapes", cl_t=0.1, backbone="tiny")
        path = Path(f"run{i}/last.pt")
        model = SimpleNamespace(args=args, diffusion=Loss(loss_of), script=train_unet, path=path, epoch=1, name="r")
        model.net = None
        blank = dict(epochs=1, lr=1, batch=1, amp="off", t=None, dataset=None, loss=True, grid=False, pool=["gap"])
        flags = argparse.Namespace(**blank | {"seed": 0} | changes)
        results.append(probe.heldout_loss(model, flags, torch.device("cpu"), results[0] if results else None))
    return split, results


def test_heldout_loss_and_its_standard_error_are_those_over_images(monkeypatch):
    """Against the textbook formula over single images: 2 500 of them, in 100 blocks."""
    split, (result,) = fake_losses(monkeypatch, 2500, lambda x0, level, noise: x0.mean() + level, t=[0.0, 0.5])
    each = split.to_x0(split.images).mean((1, 2, 3)).double()
    assert result["loss"] == pytest.approx([each.mean().item(), each.mean().item() + 0.5], abs=1e-6)
    assert result["loss_se"][0] == pytest.approx(each.std().item() / 50, rel=0.25)  # 100 blocks know it to 7 %
    assert result["n_images"] == 2500 and np.shape(result["blocks"]) == (2, 100)


def test_noise_hangs_on_image_and_level_alone(monkeypatch):
    seen = [{}, {}]

    def spy(run):
        def loss_of(x0, level, noise):
            seen[run][x0.sum().item(), level.item()] = noise
            return noise.square().mean()

        return loss_of

    _, (a, b) = fake_losses(monkeypatch, 60, spy(0), spy(1), t=[0.1, 0.2])
    assert len(seen[0]) == 120 and all(seen[1][key].equal(noise) for key, noise in seen[0].items())
    noise = torch.stack(list(seen[0].values())).flatten(1)
    assert len({tuple(row[:4].tolist()) for row in noise}) == 120 and abs(noise.std() - 1) < 0.02
    assert b["difference"] == b["difference_se"] == [0, 0] and a["loss"] == pytest.approx([1, 1], abs=0.05)
    assert min(a["loss_se"]) > 0


def test_paired_difference_sees_what_single_errors_hide(monkeypatch):
    def plain(x0, level, noise):
        return x0.square().mean() * 100 + noise.mean()

    def better(x0, level, noise):
        return plain(x0, level, noise) - 0.01 * (1 + x0[0, 0, 0])

    split, (a, b) = fake_losses(monkeypatch, 500, plain, better, t=[0.3])
    each = -0.01 * (1 + split.to_x0(split.images)[:, 0, 0, 0]).double()
    assert b["difference"] == pytest.approx([each.mean().item()], abs=1e-5)
    assert b["difference_se"][0] == pytest.approx(each.std().item() / 500**0.5, rel=0.5)
    assert b["difference_se"][0] < 0.01 * b["loss_se"][0]


def test_heldout_loss_of_a_network_by_hand(run):
    """eps prediction at one step on 40 images: noised, run and compared without the formulation's own code."""
    (result,) = call(run / "epoch_1.pt", "--loss", "--t", "300", "--json", run / "l.json", "--plot", run / "l.png")
    model = probe.load_checkpoint(run / "epoch_1.pt")
    images = train_unet.load_data(model.args, "test")[0]
    draws = [probe.stream_generator("cpu", 0, probe.LOSS_NOISE, 300_000_000, i) for i in range(40)]
    noise = torch.stack([torch.randn(3, 16, 16, generator=draw) for draw in draws])
    alphabar = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:300]))
    x_t = alphabar**0.5 * (images / 127.5 - 1) + (1 - alphabar) ** 0.5 * noise
    each = (model.net(x_t, torch.full((40,), 0.3)) - noise).square().mean((1, 2, 3))
    assert result["loss"][0] == pytest.approx(each.mean().item(), rel=1e-5)
    assert result["levels"] == [300] and result["n_images"] == 40 and is_png(run / "l.png")
    assert json.loads((run / "l.json").read_text())["checkpoints"] == [result]


def test_edms_uncertainty_stays_out_of_the_heldout_loss(run, tmp_path):
    """At raw output 0 the denoised image is c_skip x_t, so that the loss has a closed form, whatever u(sigma) is."""
    argv = ["--dataset", "mini", "--data", str(run / "data"), "--resolution", "16", "--backbone", "tiny"]
    args = train_unet.parse_args([*argv, "--model", "edm", "--aug", "0.1", "--out", str(tmp_path)])
    state = {"script": "train_unet", "args": vars(args), "ema": train_unet.build(args)[0].state_dict()}
    torch.save(state | {"epoch": 1, "step": 1}, tmp_path / "edm.pt")
    model = probe.load_checkpoint(tmp_path / "edm.pt")
    nn.init.constant_(model.diffusion.uncertainty.linear.weight, 3.0)
    flags = probe.parse_args([str(tmp_path / "edm.pt"), "--loss", "--amp", "off", "--t", "0.0020", "0.5"])
    result = probe.heldout_loss(model, flags, torch.device("cpu"))
    x0 = train_unet.load_data(args, "test")[0] / 127.5 - 1
    assert result["loss"][0] == pytest.approx(1, abs=0.02)  # almost clean: c_skip x_t - x0 is the noise
    assert result["loss"][1] == pytest.approx(0.5 * (x0.square().mean().item() / 0.25 + 1), rel=0.02)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    kept = []

    class Kept(probe.Figure):
        def savefig(self, *args, **kwargs):
            kept.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(probe, "Figure", Kept)
    return kept


def lines_of(axes):
    """{name: (x, y)} of the lines of a panel."""
    drawn, names = axes.get_legend_handles_labels()
    lines = {}
    for line, name in zip(drawn, names, strict=True):
        line = getattr(line, "lines", [line])[0]  # an errorbar has several
        lines[name] = [np.array(values).tolist() for values in line.get_data()]
    return lines


@pytest.fixture
def two_runs(run, tmp_path):
    """The two checkpoints as epochs 1 and 2 of the runs A and B."""
    for folder in ("A", "B"):
        (tmp_path / folder).mkdir()
        for epoch in (1, 2):
            (tmp_path / folder / f"epoch_{epoch}.pt").symlink_to(run / f"epoch_{epoch}.pt")
    return tmp_path


def test_layer_epoch_maps_run_beside_run(two_runs, figures):
    """In the order of the command line."""
    paths = [two_runs / run / f"epoch_{epoch}.pt" for run in "BA" for epoch in (2, 1)]
    results = call(*paths, "--grid", "--t", "11", "--subset", "30", "--batchnorm", "--lr", "0.1")
    accuracies = [cell["linear"] for result in results for cell in result["cells"]]
    a, b, bar = figures[0].axes
    assert "mini" in figures[0].get_suptitle() and "accuracy" in bar.get_ylabel()
    assert is_png(two_runs / "B/probe_grid_B-epoch_2-B-epoch_1-A-epoch_2-A-epoch_1.png")
    assert a.images[0].get_clim() == b.images[0].get_clim() == (min(accuracies), max(accuracies))
    for axes, name, group in ((a, "B", results[:2]), (b, "A", results[2:])):
        want = [[cell["linear"] for cell in result["cells"]] for result in group]
        assert np.array_equal(axes.images[0].get_array().T, want)
        assert " ".join(axes.get_title().split()) == f"{name}: ddpm tiny --self-cond adaptive"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "1"]
        assert axes.get_xlabel() == "epoch, at t = 11"
        assert [text.get_text() for text in axes.get_yticklabels()] == results[0]["layers"]


def test_each_map_has_its_own_axis(run, figures):
    """Steps of DDPM beside sigmas of EDM."""
    call(run / "epoch_1.pt", run / "edm.pt", "--grid", "--subset", "30", "--epochs", "1")
    labels = [axes.get_xlabel() for axes in figures[0].axes[:2]]
    assert labels == ["noise level t (step of 1000)", "noise level s (sigma)"]


def test_losses_of_two_formulations_are_not_paired(run, tmp_path, capsys):
    """DiT's rectified flow has a cosine term, the UNet's has none."""
    for name, script, flags in ("rf", train_unet, ["--model", "rf", "--backbone", "tiny"]), ("dit", train_dit, []):
        flags += ["--dataset", "mini", "--data", str(run / "data"), "--resolution", "16", "--epochs", "1"]
        args = script.parse_args([*flags, *(["--size", "tiny"] if name == "dit" else []), "--out", str(tmp_path)])
        state = {"script": script.__name__, "args": vars(args), "ema": script.build(args)[0].state_dict()}
        torch.save(state | {"epoch": 1, "step": 9}, tmp_path / f"{name}.pt")
    with pytest.raises(SystemExit):
        call(tmp_path / "rf.pt", tmp_path / "dit.pt", "--loss", "--t", "0.5")
    assert "differ in formulation" in capsys.readouterr().err
    (result,) = call(tmp_path / "dit.pt", "--loss", "--t", "0.5", "--subset", "20")
    assert result["loss_se"][0] > 0  # two blocks are the least


def test_one_layer_over_epochs(two_runs, figures):
    """Numbers of single cells need no picture, but can have one."""
    paths = [two_runs / run / f"epoch_{epoch}.pt" for run in "AB" for epoch in (1, 2)]
    call(*paths[:2], "--subset", "30", "--epochs", "1")
    assert not figures and not list((two_runs / "A").glob("*.png"))
    results = call(*paths, "--subset", "30", "--plot", two_runs / "a.png")
    values = [result["cells"][0]["linear"] for result in results]
    for axes, want in zip(figures[0].axes, (values[:2], values[2:]), strict=False):
        assert axes.images[0].get_array().tolist() == [want]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2"]
        assert [text.get_text() for text in axes.texts] == [f"{value:.1f}" for value in want]


def test_several_poolings_with_and_without_cls(run, tmp_path, figures, capsys):
    argv = ["--dataset", "mini", "--data", str(run / "data"), "--resolution", "16", "--size", "tiny"]
    for name in ("plain", "cls"):
        args = train_uvit.parse_args([*argv, "--out", str(tmp_path / name), *["--cls-token"] * (name == "cls")])
        state = {"script": "train_uvit", "args": vars(args), "ema": train_uvit.build(args)[0].state_dict()}
        (tmp_path / name).mkdir()
        torch.save(state | {"epoch": 3, "step": 1}, tmp_path / name / "last.pt")
    argv = tmp_path / "plain", tmp_path / "cls", "--grid", "--pool", "gap", "token", "cls"
    results = call(*argv, "--subset", "30", "--json", tmp_path / "fig4.json")
    assert is_png(tmp_path / "fig4.png")  # beside the JSON file
    assert f"note: {tmp_path}/plain/last.pt: no --pool cls" in capsys.readouterr().out
    assert [axes.get_title() for axes in figures[0].axes] == ["plain, epoch 3: ddpm tiny",
                                                              "cls, epoch 3: ddpm tiny --cls-token"]
    assert results[0]["pools"] == ["gap", "token"] and results[1]["pools"] == ["gap", "token", "cls"]
    cells = {(cell["pool"], cell["layer"]): cell["linear"] for cell in results[1]["cells"]}
    for axes, result in zip(figures[0].axes, results, strict=True):
        lines = lines_of(axes)
        assert list(lines) == [probe.POOLS[pool] for pool in result["pools"]]
        for pool in result["pools"]:
            want = [cell["linear"] for cell in result["cells"] if cell["pool"] == pool]
            assert lines[probe.POOLS[pool]] == [result["layers"], want]
    alone = call(tmp_path / "cls", "--layer", "mid", "--pool", "cls", "--subset", "30")[0]["cells"]
    assert alone[0]["linear"] == cells["cls", "mid"]


@pytest.mark.parametrize("script", [train_unet, train_uvit, train_dit])
def test_the_network_stops_after_the_last_layer_asked_for(script, tmp_path):
    """No later block runs, and what it gives is what the whole network gives, bit for bit, random tokens included."""
    size = ["--backbone" if script is train_unet else "--size", "tiny", "--out", str(tmp_path)]
    args, ran, counts = script.parse_args(size), [], []
    net, diffusion = script.build(args)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    model = SimpleNamespace(net=net.eval(), diffusion=diffusion)
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, *net.shape, generator=draw)
    pool, first, last = "gap" if script is train_unet else "token", net.layers[0], net.layers[-2]
    torch.manual_seed(1)
    whole = diffusion.features(net, x0, args.cl_t, noise, pool=pool)
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for layers in ([last, first], net.layers):
        ran.clear()
        torch.manual_seed(1)
        feat = probe.Encoder(model, args.cl_t, {name: whole[name].shape[1] for name in layers}, pool)(x0, noise)
        assert torch.equal(feat, torch.cat([whole[name] for name in layers], 1)) and whole[first].std() > 1e-3
        counts.append(len(ran))
    assert 0 < counts[0] < counts[1] - 3


def test_fid_against_accuracy(tmp_path, figures, capsys):
    """Two runs, files of different order, a checkpoint that only one of the tools has seen."""
    def probed(run, epoch, accuracy):
        cells = [{"layer": "out_1", "level": 11, "linear": value} for value in (accuracy, accuracy - 9)]
        about = {"name": f"{run}, epoch {epoch}", "flags": "edm tiny", "dataset": "mini"}
        return {"checkpoint": f"runs/{run}/epoch_{epoch}.pt", "epoch": epoch, "cells": cells, **about}

    def scored(run, epoch, fid):
        return {"fid": fid, "is_mean": 3, "checkpoint": f"runs/{run}/epoch_{epoch}.pt", "epoch": epoch}

    a = [probed("a", 400, 62.0), probed("a", 200, 60.0), probed("b", 200, 50.0)]
    (tmp_path / "p.json").write_text(json.dumps({"top1": 62, "checkpoints": a}))
    results = [scored("b", 200, 9.0), scored("a", 200, 7.5), scored("a", 400, 6.5), scored("a", 600, 6.0)]
    (tmp_path / "f.json").write_text(json.dumps({"results": results}))
    call(tmp_path / "p.json", tmp_path / "f.json", "--plot", tmp_path / "fid.png")
    axes = figures[0].axes[0]
    lines = lines_of(axes)
    assert lines == {"a, edm tiny": [[7.5, 6.5], [60, 62]], "b, edm tiny": [[9], [50]]} and is_png(tmp_path / "fid.png")
    marks = {text.get_text(): [tuple(text.xy)] for text in axes.texts if text.get_text() != "epoch 200"}
    assert marks == {"epoch 400": [(6.5, 62)]} and len(axes.texts) == 3
    assert figures[0].get_suptitle() == "mini"
    (tmp_path / "f.json").write_text(json.dumps({"results": results[3:]}))
    with pytest.raises(SystemExit):
        call(tmp_path / "p.json", tmp_path / "f.json", "--plot", tmp_path / "fid.png")
    assert "no checkpoint has both" in capsys.readouterr().err


def log_of(folder, steps, batch, loss_of, model="edm", dataset="mini", ending=""):
    """Write a run's metrics.jsonl, with a resume in its middle; the weighted losses in it are nonsense."""
    flags = {"batch": batch, "dataset": dataset, "model": model, "backbone": "tiny"}
    lines = [{"step": 0, "args": flags}]
    for step in range(10, steps + 10, 10):
        lines.append({"step": step, "loss": 9.0, "loss_diffusion": -7.0, "loss_unweighted": loss_of(step * batch)})
        if step == steps // 20 * 10:
            lines.append({"step": step, "args": flags})
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + ending)


def test_training_loss_of_a_run_that_is_going(tmp_path, figures):
    """A running mean leaves a straight line as it is; the last line of the log is half written."""
    log_of(tmp_path, 1000, 64, lambda images: 2 - images / 64000, ending='{"step": 1010, "lo')
    call(tmp_path, "--curves", "--plot", tmp_path / "c.png")
    x, y = lines_of(figures[0].axes[0])[f"{tmp_path.name}, edm tiny, mini"]
    assert y == pytest.approx([2 - images / 64000 for images in x]) and figures[0].get_suptitle() == "mini"
    assert 6400 <= x[0] < 10000 and 60000 < x[-1] <= 64000 and len(x) > 80


def test_training_losses_are_smoothed_alike(tmp_path, figures, capsys):
    """A jump after as many images is as steep in a short run of small batches as in a long one; data sets are named."""
    log_of(tmp_path / "short", 2000, 8, lambda images: float(images > 8000))
    log_of(tmp_path / "long", 1000, 64, lambda images: float(images > 8000), dataset="other")
    call(tmp_path / "short", tmp_path / "long", "--curves", "--plot", tmp_path / "c.png")
    widths = []
    for x, y in lines_of(figures[0].axes[0]).values():
        rising = [images for images, loss in zip(x, y, strict=True) if 0.01 < loss < 0.99]
        widths.append(max(rising, default=0) - min(rising, default=0))
    assert figures[0].get_suptitle() == "mini and other" and "mean over 800 images" in figures[0].axes[0].get_ylabel()
    assert widths[0] == pytest.approx(800, abs=160) and widths[1] <= 800
    log_of(tmp_path / "rf", 1000, 64, lambda images: 1.0, model="rf")
    with pytest.raises(SystemExit):
        call(tmp_path / "short", tmp_path / "rf", "--curves")
    assert "differ in formulation" in capsys.readouterr().err


def test_features_of_both_splits(run, tmp_path):
    """At step 0, where no noise is added, they are the network's on the images themselves."""
    call(run / "epoch_1.pt", "--layer", "out_2", "--t", "0", "--pixels", "--features", tmp_path / "f.npz")
    stored, model = np.load(tmp_path / "f.npz"), probe.load_checkpoint(run / "epoch_1.pt")
    for split in ("train", "test"):
        images, labels, _ = train_unet.load_data(model.args, split)
        want = model.net.features(images / 127.5 - 1, torch.zeros(len(images)))["out_2"]
        assert np.allclose(stored[split], want, atol=1e-5) and stored[split].dtype == np.float32
        assert np.array_equal(stored[f"{split}_labels"], labels)


def test_another_data_set(run, tmp_path):
    """Brightness that no training image had, in three classes, at 32 pixels: the network sees 16."""
    for split, n in (("train", 20), ("test", 8)):
        for label in range(3):
            folder = tmp_path / "other" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.full((32, 32, 3), 100 * label + i, np.uint8)).save(folder / f"{i}.png")
    argv = ["--dataset", "other", "--data", tmp_path, "--batchnorm", "--lr", "0.1"]
    result = call(run / "epoch_1.pt", *argv, "--epochs", "15")[0]
    assert result["dataset"] == "other" and "60 train, 24 test, 3 classes" in result["protocol"]["images"]
    assert result["cells"][0]["linear"] > 90


def test_broken_weights_are_an_error(run, tmp_path, capsys):
    state = torch.load(run / "epoch_1.pt", weights_only=True)
    state["ema"]["image_proj.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(SystemExit):
        call(tmp_path / "nan.pt")
    assert "NaN or infinity" in capsys.readouterr().err


def call_and_keep_heads(path, argv):
    """Run the command with blocks so small that both ranks have some; save the heads of its last level."""
    trained, block, probe.NOISE_BLOCK = probe.train_heads, probe.NOISE_BLOCK, 16
    try:
        probe.train_heads = lambda *a: torch.save((heads := trained(*a)).state_dict(), path) or heads
        return call(*argv)
    finally:
        probe.train_heads, probe.NOISE_BLOCK = trained, block


def rank_main(rank, port, path, argv):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    call_and_keep_heads(f"{path}_{rank}", argv)


def test_two_ranks_equal_one(run, tmp_path):
    """An odd batch, a last one of a single image, blocks that do not divide, standardised features, several layers."""
    argv = [run / "epoch_1.pt", "--layer", "out_1", "out_5", "--t", "11", "130", "--batchnorm", "--batch", "13"]
    argv += ["--subset", "79"]
    one = call_and_keep_heads(tmp_path / "one", argv)[0]["cells"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv += ["--json", tmp_path / "two.json"]
    multiprocessing.spawn(rank_main, (port, tmp_path / "two", argv), nprocs=2)
    heads = [torch.load(tmp_path / name) for name in ("one", "two_0", "two_1")]
    for name, value in heads[0].items():
        assert torch.equal(heads[1][name], heads[2][name]), name
        assert torch.allclose(value, heads[1][name], rtol=1e-3, atol=1e-5), name
    two = json.loads((tmp_path / "two.json").read_text())["checkpoints"][0]["cells"]
    assert one == two
