"""probe.py: its protocol, files and figures, the held-out loss, ranks against one process, and the user's mistakes.

What heads, kNN, noise and flips do is replayed in test_protocols.py.
"""

import argparse
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FLOAT32, make_checkpoint, make_folder, refused, run, spy
from torch import multiprocessing, nn

import probe
import train_dit
import train_unet
import train_uvit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16x16 images, `mini` in two classes and `flat` in one; untrained checkpoints of the smallest networks."""
    root = tmp_path_factory.mktemp("probe")
    make_folder(root, "mini", splits=("train",), n=40, size=(16, 16))
    make_folder(root, "mini", splits=("test",), n=12, size=(16, 16))
    make_folder(root, "flat", classes=("all",), size=(16, 16))
    flags = "--dataset", "mini", "--data", root, "--resolution", 16
    unet = *flags, "--backbone", "tiny"
    for name in "AB":
        for epoch in (1, 2):
            ddpm = *unet, "--self-cond", "--layer", "out_4"
            make_checkpoint(root / name / f"epoch_{epoch}.pt", train_unet, *ddpm, seed=epoch, epoch=epoch, shake=0.05)
    make_checkpoint(root / "edm.pt", train_unet, *unet, "--model", "edm", "--aug", 0.1)
    make_checkpoint(root / "rf.pt", train_unet, *unet, "--model", "rf")
    make_checkpoint(root / "dit.pt", train_dit, *flags, "--size", "tiny")
    make_checkpoint(root / "plain" / "last.pt", train_uvit, *flags, "--size", "tiny", shake=0.1)
    make_checkpoint(root / "cls" / "last.pt", train_uvit, *flags, "--size", "tiny", "--cls-token", shake=0.1)
    return root

def call(*argv):
    """The command in this process, on the CPU and quickly."""
    return run(probe, "--amp", "off", "--batch", 30, "--epochs", 2, *argv)

# ---- Protocol --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("trained", "diffusion", "want"), [
    (dict(backbone="ddpm", dataset="cifar100"), train_unet.DDPM(1e-3), (15, 4e-3, 512, 260)),
    (dict(backbone="ddpmpp", dataset="cifar10"), train_unet.EDM(), (15, 4e-3, 256, 0.585)),
    (dict(backbone="tiny", dataset="shapes"), train_unet.RF(), (30, 4e-3, 128, 0.4)),
    (dict(size="S", dataset="tiny-imagenet"), train_uvit.DDPM(1), (30, 4e-3, 256, 260)),
    (dict(size="tiny", dataset="shapes"), train_uvit.DDPM(1), (30, 4e-3, 128, 260)),
    (dict(size="B", dataset="imagenet"), train_dit.LatentRF(), (30, 2e-3, 1440, 0.5)),
])  # fmt: skip
def test_the_protocol_is_that_of_tab_11(trained, diffusion, want):
    """Epochs, lr, batch, and the last level of --grid."""
    model = SimpleNamespace(args=argparse.Namespace(**trained, cl_t=7), script=train_unet, diffusion=diffusion)
    one_image = (2, 4, 8, 8) if isinstance(diffusion, train_dit.LatentRF) else (3, 8, 8)
    split = probe.Split(torch.zeros(6, *one_image), torch.zeros(6), 2, None)

    def defaults(*flags):
        return probe.fill_in_protocol(probe.parse_args(["p", *flags]), model, split, torch.device("cpu"))

    args = defaults("--grid")
    assert (args.epochs, args.lr, args.batch, args.t[-1]) == want and args.dataset == trained["dataset"]
    assert defaults().t == defaults("--grid", "--pool", "gap", "token").t == [7]
    assert len(defaults("--loss").t) >= 10
    assert defaults("--dataset", "cifar10").epochs == 15 and defaults("--dataset", "stl10").epochs == 30

def test_a_formulation_of_ones_own_needs_its_levels(folder, capsys, monkeypatch):
    monkeypatch.delitem(probe.LEVELS, "EDM")
    assert "edm.pt: add the noise levels of EDM to LEVELS" in refused(capsys, call, folder / "edm.pt", "--t", 1)

def test_amp_auto_is_that_of_training(folder, monkeypatch):
    """bf16 where the processor has it; test_flags.py has one without."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    (result,) = call(folder / "A/epoch_1.pt", "--amp", "auto", "--epochs", 1, "--subset", 20)
    assert result["protocol"]["amp"] == "bf16"

@pytest.mark.parametrize("script", [train_unet, train_uvit, train_dit])
def test_the_network_stops_after_the_last_layer_asked_for(script):
    """No later block runs, and what it gives is what the whole network gives, bit for bit, random tokens included."""
    args = script.parse_args(["--backbone" if script is train_unet else "--size", "tiny"])
    net, diffusion = script.build(args)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    model = SimpleNamespace(net=net.eval(), diffusion=diffusion)
    x0, noise = torch.randn(2, 5, *net.shape, generator=torch.Generator().manual_seed(0))
    pool, first, late = "gap" if script is train_unet else "token", net.layers[0], net.layers[-2]
    torch.manual_seed(1)
    whole = diffusion.features(net, x0, args.cl_t, noise, pool=pool)
    ran, counts = [], []
    for module in net.modules():
        module.register_forward_hook(lambda *_: ran.append(1))
    for layers in ([late, first], net.layers):
        ran.clear()
        torch.manual_seed(1)
        feat = probe.Encoder(model, args.cl_t, {name: whole[name].shape[1] for name in layers}, pool)(x0, noise)
        assert torch.equal(feat, torch.cat([whole[name] for name in layers], 1)) and whole[first].std() > 1e-3
        counts.append(len(ran))
    assert 0 < counts[0] < counts[1] - 3

# ---- What is printed and written -------------------------------------------------------------------------------------
def test_grid_writes_table_json_and_picture(folder, tmp_path, figures, capsys):
    """Of two formulations, each with an axis of its own."""
    paths, where = (folder / "A/epoch_1.pt", folder / "edm.pt"), tmp_path / "grid"
    results = call(*paths, "--grid", "--t", 1, 66, "--pixels", "--cache", "--json", f"{where}.json")
    out = capsys.readouterr().out
    for words in ("EMA weights of epoch 1", "EMA weights of epoch 3", "80 train, 24 test, 2 classes",
                  "epochs 2, lr 0.004, batch 30, flip True, batchnorm False, cache True"):  # fmt: skip
        assert words in out
    want = [(f"out_{i}", level) for level in (1, 66) for i in range(1, 7)] + [("pixels", None)]
    table = []
    for result, symbol in zip(results, "ts", strict=True):
        assert [(cell["layer"], cell["level"]) for cell in result["cells"]] == want
        for cell in result["cells"]:
            place = cell["layer"] if cell["level"] is None else f"{cell['layer']}, {symbol}={cell['level']:g}"
            table.append(f"top-1 {cell['linear']:.2f} % +- {cell['linear_se']:.2f} ({place}), kNN {cell['knn']:.2f} %")
    *told, best = [line for line in out.splitlines() if line.startswith("top-1 ")]
    assert told == table and best in table
    assert out.splitlines()[-4:-2] == [f"wrote {where}.json", f"wrote {where}.png"]
    assert Path(f"{where}.png").is_file() and json.loads(Path(f"{where}.json").read_text())["checkpoints"] == results
    labels = [axes.get_xlabel() for axes in figures[0].axes[:2]]
    assert labels == ["noise level t (step of 1000)", "noise level s (sigma)"]
    (alone,) = call(paths[0], "--layer", "out_4", "--t", 66, "--cache")[0]["cells"]
    assert alone in results[0]["cells"], "a cell depends on the rest of the grid"

@pytest.mark.parametrize(("name", "pool", "layer"), [("A/epoch_1.pt", "gap", "out_2"), ("cls", "cls", "mid")])
def test_features_of_both_splits(folder, tmp_path, name, pool, layer):
    """At step 0, where no noise is added, they are the network's on the images themselves."""
    call(folder / name, "--layer", layer, "--pool", pool, "--t", 0, "--pixels", "--features", tmp_path / "f.npz")
    stored, model = np.load(tmp_path / "f.npz"), probe.load_checkpoint(folder / name)
    for split in ("train", "test"):
        images, labels, _ = train_unet.load_data(model.args, split)
        want = model.net.features(images / 127.5 - 1, torch.zeros(len(images)), pool=pool)[layer]
        assert np.allclose(stored[split], want, atol=FLOAT32) and stored[split].dtype == np.float32
        assert np.array_equal(stored[f"{split}_labels"], labels)

# ---- Mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("argv", "message"), [
    ("A/epoch_1.pt {}/none.pt", "none.pt does not exist"),
    ("A/epoch_1.pt --layer out_99", "no layer out_99: choose --layer from out_1 out_2"),
    ("A/epoch_1.pt {}/edm.pt --t 500", "edm.pt, --t: noise level 500: EDM takes"),
    ("A/epoch_1.pt --t 11 1001", "--t: noise level 1001: DDPM takes"),
    ("A/epoch_1.pt --grid --pool cls --pixels", "epoch_1.pt has no --pool cls"),
    ("A --curves --json a.json", "goes with what is measured"),
    ("A/epoch_1.pt --data {}/nowhere", "nowhere"),
    ("A/epoch_1.pt --dataset flat", "flat has no classes"),
    ("A/epoch_1.pt --json {}", "cannot write"),
    ("A/epoch_1.pt --plot {}/nowhere/a.png", "cannot write"),
    ("A/epoch_1.pt --grid --layer out_1", "not allowed with argument"),
    ("A/epoch_1.pt --plot a.txt", "FILE.png"),
    ("A/epoch_1.pt --lr 0", "above 0"),
    ("A/epoch_1.pt --lr nan", "above 0"),
    ("A/epoch_1.pt --pool gap cls --t 1 2", "go with one --t"),
    ("rf.pt {}/dit.pt --loss --t 0.5", "differ in formulation"),  # of both losses only the DiT's has a cosine
    ("A/epoch_1.pt --loss --features {}/f.npz", "not go with --loss"),
    ("A/epoch_1.pt --loss --subset 1", "--loss needs two test images or more, mini has 1"),
])
def test_mistakes_end_with_one_line_before_the_work(folder, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(probe, "train_heads", None)
    before = [*folder.iterdir(), *(folder / "A").iterdir()]
    assert message in refused(capsys, call, *f"{{}}/{argv}".format(*9 * [folder]).split())
    assert [*folder.iterdir(), *(folder / "A").iterdir()] == before, "an empty file is left"

ROW = '{"results": [{"checkpoint": "a/b.pt", "epoch": 1, "fid": 2}]}'

@pytest.mark.parametrize(("name", "text", "says"), [
    ("metrics.jsonl", None, "does not exist"),
    ("metrics.jsonl", '{"step": 0, "args": {"batch": 8}}', "has no line of a step yet"),
    ("metrics.jsonl", '{"step": 0, "args": {"batch": 8}}\n{"step": 9, "loss": 1.5}', "is damaged"),
    ("a.json", None, "does not exist"),
    ("a.json", ROW[:-2], "is damaged"),
    ("a.json", ROW.replace("checkpoint", "file"), "is damaged"),
])
def test_logs_and_results_that_cannot_be_drawn(tmp_path, capsys, name, text, says):
    """Missing, begun, cut, of an earlier version, or another program's."""
    if text is not None:
        (tmp_path / name).write_text(text)
    argv = [tmp_path, "--curves"] if name == "metrics.jsonl" else [tmp_path / name]
    assert f"{tmp_path / name} {says}" in refused(capsys, call, *argv)
    assert not [*tmp_path.glob("*.png")]

# ---- Held-out loss ---------------------------------------------------------------------------------------------------
class RF(nn.Module):
    """A formulation with a loss in closed form, lower for run 1 (net is its number). Keeps the noise it was given."""

    seen = ({}, {})

    def loss(self, net, x0, level, noise, y=None, aug=None):
        assert y is None and aug is None
        for row, (image, s) in enumerate(zip(x0, level.tolist(), strict=True)):
            self.seen[net][image.numpy().tobytes(), s] = noise[row]
        loss = (x0 + noise).mean() + level.mean() - net * (0.01 + 0.001 * x0[:, 0, 0, 0].mean())
        return torch.nan * loss, loss, None  # held out is the unweighted one, the second

def test_heldout_loss_is_the_mean_over_images_and_pairs_two_runs(monkeypatch):
    """2 500 images in 100 blocks. Noise hangs on image and level alone; a difference shows what single errors hide."""
    images = torch.randint(256, (2500, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(probe, "load_split", lambda *_: probe.Split(images, torch.zeros(2500), 4, train_unet.to_x0))
    args = probe.parse_args(["p", "--loss", "--amp", "off", "--t", "0.25", "0.5"])
    trained = argparse.Namespace(model="rf", dataset="shapes", cl_t=0.1, backbone="tiny")
    about = {"args": trained, "diffusion": RF(), "script": train_unet, "path": Path("p"), "epoch": 1, "name": "r"}
    a = probe.heldout_loss(SimpleNamespace(net=0, **about), args, torch.device("cpu"))
    b = probe.heldout_loss(SimpleNamespace(net=1, **about), args, torch.device("cpu"), a)
    x0, (seen, again) = train_unet.to_x0(images), RF.seen
    noise = torch.stack([seen[image.numpy().tobytes(), s] for s in args.t for image in x0]).flatten(1)
    assert len(seen) == 5000 and all(again[key].equal(value) for key, value in seen.items())
    assert len({tuple(row[:4].tolist()) for row in noise}) == 5000 and abs(noise.std() - 1) < 0.02
    x0, noise = x0.double(), noise.double().view(2, 2500, -1)
    lower = -0.01 - 0.001 * x0[:, 0, 0, 0]
    for row, level in enumerate(args.t):
        loss = x0.mean((1, 2, 3)) + noise[row].mean(1) + level
        assert a["loss"][row] == pytest.approx(loss.mean().item(), abs=5e-5)
        assert a["loss_se"][row] == pytest.approx(loss.std().item() / 50, rel=0.25)  # 100 blocks know it to 7 %
        assert b["difference"][row] == pytest.approx(lower.mean().item(), abs=2e-5)
        assert b["difference_se"][row] == pytest.approx(lower.std().item() / 50, rel=0.25)
    assert a["n_images"] == 2500 and np.shape(a["blocks"]) == (2, 100)

def test_heldout_loss_of_a_network_by_hand(folder, tmp_path):
    """eps prediction at one step on 24 images: noised, run and compared without the formulation's own code."""
    paths, file = [folder / f"A/epoch_{epoch}.pt" for epoch in (1, 2, 1)], tmp_path / "l.json"
    results = call(*paths, "--loss", "--t", 300, "--json", file, "--plot", tmp_path / "l.png")
    for path, result in zip(paths, results, strict=True):
        model = probe.load_checkpoint(path)
        images = train_unet.load_data(model.args, "test")[0]
        noise = torch.stack([probe.heldout_noise(i, 300.0, 0, (3, 16, 16)) for i in range(24)])
        alphabar = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:300]))
        x_t = alphabar**0.5 * (images / 127.5 - 1) + (1 - alphabar) ** 0.5 * noise
        each = (model.net(x_t, torch.full((24,), 0.3)) - noise).square().mean((1, 2, 3))
        assert result["loss"][0] == pytest.approx(each.mean().item(), rel=1e-4)
        assert result["levels"] == [300] and result["n_images"] == 24
        assert result["loss_se"][0] > 0, "two blocks are the least"
    assert results[2]["difference"] == [0] != results[1]["difference"], "each is compared with the first"
    assert json.loads(file.read_text())["checkpoints"] == results and (tmp_path / "l.png").is_file()

# ---- Figures ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    kept = []
    spy(monkeypatch, probe.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    return kept

def lines_of(axes):
    """{name: (x, y)} of the lines of a panel."""
    return {name: [np.array(values).tolist() for values in line.get_data()]
            for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}

def texts(labels):
    return [" ".join(label.get_text().split()) for label in labels]

def test_layer_epoch_maps_run_beside_run(folder, figures):
    paths = [folder / name / f"epoch_{epoch}.pt" for name in "BA" for epoch in (2, 1)]
    results = call(*paths, "--grid", "--t", 11, "--subset", 30, "--batchnorm", "--lr", 0.1)
    accuracies = [cell["linear"] for result in results for cell in result["cells"]]
    *maps, bar = figures[0].axes
    assert figures[0].get_suptitle() == "mini" and "accuracy" in bar.get_ylabel()
    assert (folder / "B/probe_grid_B-epoch_2-B-epoch_1-A-epoch_2-A-epoch_1.png").is_file()
    for axes, name, group in zip(maps, "BA", (results[:2], results[2:]), strict=True):
        want = [[cell["linear"] for cell in result["cells"]] for result in group]
        assert np.array_equal(axes.images[0].get_array().T, want)
        assert axes.images[0].get_clim() == (min(accuracies), max(accuracies))
        assert texts([axes.title]) == [f"{name}: ddpm tiny --self-cond adaptive"]
        assert texts(axes.get_xticklabels()) == ["2", "1"] and axes.get_xlabel() == "epoch, at t = 11"
        assert texts(axes.get_yticklabels()) == results[0]["layers"]
        assert texts(axes.texts) == [f"{value:.1f}" for value in np.transpose(want).flatten()]

def test_several_poolings_with_and_without_cls(folder, tmp_path, figures, capsys):
    argv = folder / "plain", folder / "cls", "--grid", "--pool", "gap", "token", "cls"
    results = call(*argv, "--subset", 30, "--json", tmp_path / "fig4.json")
    assert (tmp_path / "fig4.png").is_file()  # beside the JSON file
    assert f"note: {folder}/plain/last.pt: no --pool cls" in capsys.readouterr().out
    want = ["plain, epoch 3: ddpm tiny", "cls, epoch 3: ddpm tiny --cls-token"]
    assert [axes.get_title() for axes in figures[0].axes] == want
    assert [result["pools"] for result in results] == [["gap", "token"], ["gap", "token", "cls"]]
    for axes, result in zip(figures[0].axes, results, strict=True):
        assert len(lines_of(axes)) == len(result["pools"])
        for pool in result["pools"]:
            accuracies = [cell["linear"] for cell in result["cells"] if cell["pool"] == pool]
            assert lines_of(axes)[probe.POOLS[pool]] == [result["layers"], accuracies]

def test_fid_against_accuracy(tmp_path, figures, capsys):
    """Two runs, files of different order, a checkpoint that only one of the tools has seen."""
    def probed(name, epoch, accuracy):
        cells = [{"layer": "out_1", "level": 11, "linear": value} for value in (accuracy, accuracy - 9)]
        about = {"name": f"{name}, epoch {epoch}", "flags": "edm tiny", "dataset": "mini"}
        return {"checkpoint": f"runs/{name}/epoch_{epoch}.pt", "epoch": epoch, "cells": cells, **about}

    def scored(name, epoch, fid):
        return {"fid": fid, "is_mean": 3, "checkpoint": f"runs/{name}/epoch_{epoch}.pt", "epoch": epoch}

    a = [probed("a", 400, 62.0), probed("a", 200, 60.0), probed("b", 200, 50.0)]
    (tmp_path / "p.json").write_text(json.dumps({"top1": 62, "checkpoints": a}))
    results = [scored("b", 200, 9.0), scored("a", 200, 7.5), scored("a", 400, 6.5), scored("a", 600, 6.0)]
    results.append({"fid": 3.0, "samples": "a folder of images"})
    (tmp_path / "f.json").write_text(json.dumps({"results": results}))
    argv = tmp_path / "p.json", tmp_path / "f.json", "--plot", tmp_path / "fid.png"
    call(*argv)
    axes = figures[0].axes[0]
    assert lines_of(axes) == {"a, edm tiny": [[7.5, 6.5], [60, 62]], "b, edm tiny": [[9], [50]]}
    marks = {(text.get_text(), *text.xy) for text in axes.texts}
    assert marks == {("epoch 400", 6.5, 62), ("epoch 200", 7.5, 60), ("epoch 200", 9, 50)}
    assert figures[0].get_suptitle() == "mini" and (tmp_path / "fid.png").is_file()
    (tmp_path / "f.json").write_text(json.dumps({"results": results[3:]}))
    assert "no checkpoint has both" in refused(capsys, call, *argv)

def log_of(folder, steps, batch, loss_of, model="edm", dataset="mini"):
    """Write a metrics.jsonl: with a resume in its middle, half a line at its end, weighted losses of nonsense."""
    flags = {"batch": batch, "dataset": dataset, "model": model, "backbone": "tiny"}
    lines = [{"step": 0, "args": flags}]
    for step in range(10, steps + 10, 10):
        lines.append({"step": step, "loss": 9.0, "loss_diffusion": -7.0, "loss_unweighted": loss_of(step * batch)})
        if step == steps // 20 * 10:
            lines.append({"step": step, "args": flags})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + f'\n{{"step": {steps + 10}, "lo')

def test_training_losses_are_smoothed_alike(tmp_path, figures, capsys):
    """A straight line stays as it is; a jump after as many images is as steep in a run of small batches as of large."""
    log_of(tmp_path / "line", 1000, 64, lambda images: 2 - images / 64000)
    log_of(tmp_path / "short", 2000, 8, lambda images: float(images > 12000))
    log_of(tmp_path / "long", 1000, 64, lambda images: float(images > 12000), dataset="other")
    log_of(tmp_path / "rf", 1000, 64, lambda images: 1.0, model="rf")
    call(tmp_path / "line", "--curves", "--plot", tmp_path / "c.png")
    call(tmp_path / "short", tmp_path / "long", "--curves", "--plot", tmp_path / "c.png")
    log_of(tmp_path / "begun", 20, 64, lambda images: images)
    call(tmp_path / "begun", "--curves", "--plot", tmp_path / "c.png")
    one, two, begun = (figure.axes[0] for figure in figures)
    assert lines_of(begun)["begun, edm tiny, mini"] == [[1280], [1280]]  # the last of two lines
    x, y = lines_of(one)["line, edm tiny, mini"]
    assert y == pytest.approx([2 - images / 64000 for images in x]) and figures[0].get_suptitle() == "mini"
    assert 6400 <= x[0] < 10000 and 60000 < x[-1] <= 64000 and len(x) > 80
    rising = [[images for images, loss in zip(x, y, strict=True) if 0.01 < loss < 0.99]
              for x, y in lines_of(two).values()]
    widths = [max(images, default=0) - min(images, default=0) for images in rising]
    assert widths[0] == pytest.approx(800, abs=160) and widths[1] <= 800
    assert figures[1].get_suptitle() == "mini and other" and "mean over 800 images" in two.get_ylabel()
    assert "differ in formulation" in refused(capsys, call, tmp_path / "short", tmp_path / "rf", "--curves")

def test_images_seen_are_counted_with_the_batch_of_each_resume(tmp_path):
    rows = [{"step": 0, "args": {"batch": 8}}, {"step": 10, "loss_unweighted": 1}, {"step": 13, "args": {"batch": 2}},
            {"step": 20, "loss_unweighted": 0.5}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert probe.read_log(tmp_path)[1].tolist() == [80, 104 + 14]

# ---- Ranks -----------------------------------------------------------------------------------------------------------
def probe_as_rank(rank, world, port, out, argv):
    """Blocks are so small that both ranks have some. Saves the heads of the last level."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    train_heads, probe.NOISE_BLOCK = probe.train_heads, 16
    probe.train_heads = lambda *a: torch.save((heads := train_heads(*a)).state_dict(), f"{out}_{rank}.pt") or heads
    call(*argv, "--features", f"{out}.npz")

@pytest.mark.slow
def test_two_ranks_equal_one(folder, tmp_path):
    """An odd batch, a last one of a single image, blocks that do not divide, standardised features, several layers."""
    argv = [folder / "A/epoch_1.pt", "--layer", "out_1", "out_5", "--t", 11, 130, "--batchnorm", "--batch", 13]
    argv += ["--subset", 79]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, ranks in (("one", 1), ("two", 2)):
        multiprocessing.spawn(probe_as_rank, (ranks, port, tmp_path / name, argv), nprocs=ranks)
    one, two, other = (torch.load(tmp_path / name) for name in ("one_0.pt", "two_0.pt", "two_1.pt"))
    for name, value in one.items():
        assert torch.equal(two[name], other[name]) and torch.allclose(value, two[name], rtol=1e-3, atol=5e-5), name
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert all(np.allclose(one[name], two[name], atol=FLOAT32) for name in one)
