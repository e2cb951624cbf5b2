"""probe.py: heads against closed forms, kNN against a loop, ranks against one process, and the command line."""

import argparse
import itertools
import json
import math
import os
import re
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing, nn

import probe
import train_dit
import train_unet


def flags(**changes):
    """The resolved flags that the functions of probe.py read."""
    args = dict(batch=32, epochs=3, lr=4e-3, flip=True, crop=False, batchnorm=False, cache=False, seed=0)
    return argparse.Namespace(**{**args, **changes})


def make_split(n, seed=0, classes=4):
    """Random 8x8 images whose brightness tells the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=draw)
    images = torch.randint(100, (n, 3, 8, 8), generator=draw) + 30 * labels[:, None, None, None]
    return probe.Split(images.to(torch.uint8), labels, train_unet.to_x0)


class FakeDiffusion:
    """Two layers: colour means, and the left half's pixels. Their noise is level * noise."""

    def features(self, net, x0, level, noise, y=None, pool="gap"):
        x = x0 + level * noise
        return {"out_1": x.mean((2, 3)), "out_2": x[..., :4].flatten(1)}


LAYERS = {"out_1": 3, "out_2": 96}


def fake_encoder(level, layers=LAYERS):
    return probe.Encoder(SimpleNamespace(net=None, diffusion=FakeDiffusion(), path="fake"), level, layers)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are small: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- Heads, kNN, crop --------------------------------------------------------------------------------------
def test_head_learns_the_class_frequencies():
    """With one-hot features cross-entropy has a closed form: softmax(logits) = class frequencies given the feature."""
    group = torch.arange(3).repeat_interleave(40)
    labels = torch.cat([torch.arange(40) % 2, torch.arange(40) % 4, torch.full((40,), 3)])
    images = group.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    class OneHot:
        layers = {"feature": 3}

        def __call__(self, x0, noise):
            return nn.functional.one_hot(x0[:, 0, 0, 0].long(), 3).float()

    split = probe.Split(images, labels, lambda x: x.float())
    heads = probe.train_heads(OneHot(), split, 4, flags(batch=120, epochs=500, lr=0.1))
    got = heads(torch.eye(3))[0].softmax(1)
    want = torch.stack([torch.bincount(labels[group == g], minlength=4) / 40 for g in range(3)])
    assert torch.allclose(got, want, atol=0.01), got
    assert heads.accuracy(torch.eye(3)[[2, 2]], torch.tensor([3, 0])) == [50]


def test_separable_features_are_separated():
    train, test = make_split(512), make_split(128, seed=1)
    cells = probe.probe_level(fake_encoder(0.01), train, test, 4, flags(epochs=40, lr=0.05))
    assert [(cell["layer"], cell["level"]) for cell in cells] == [("out_1", 0.01), ("out_2", 0.01)]
    assert cells[0]["linear"] == 100 and cells[1]["linear"] > 90, cells


@pytest.mark.parametrize("batchnorm", [False, True])
def test_heads_trained_together_equal_heads_trained_alone(batchnorm):
    train = make_split(100)
    args = flags(batchnorm=batchnorm)
    both = probe.train_heads(fake_encoder(0.1), train, 4, args)
    assert both.linears[1].weight.abs().max() > 1e-3
    for i, (name, width) in enumerate(LAYERS.items()):
        alone = probe.train_heads(fake_encoder(0.1, {name: width}), train, 4, args)
        assert torch.allclose(both.linears[i].weight, alone.linears[0].weight, atol=1e-6)


def test_heads_match_plain_adam():
    """One head, no noise, no flip: the textbook loop with torch's own pieces gives the same weights."""
    train, args = make_split(96), flags(flip=False)
    heads = probe.train_heads(fake_encoder(0.0, {"out_1": 3}), train, 4, args)
    linear = nn.Linear(3, 4)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    opt = torch.optim.Adam(linear.parameters(), lr=args.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)
    for epoch in range(3):
        order = torch.randperm(96, generator=probe.stream_generator("cpu", 0, probe.ORDER, epoch))
        for index in order.split(32):
            feat = train_unet.to_x0(train.images[index]).mean((2, 3))
            opt.zero_grad()
            nn.functional.cross_entropy(linear(feat), train.labels[index]).backward()
            opt.step()
            cosine.step()
    assert torch.allclose(heads.linears[0].weight, linear.weight, atol=1e-6)


def test_batchnorm_is_torchs():
    ours, torchs = probe.SyncedNorm(5), nn.BatchNorm1d(5, affine=False)
    for feat in 100 + torch.randn(4, 16, 5) * torch.arange(1, 6):
        assert torch.allclose(ours(feat), torchs(feat), atol=1e-4)
    assert torch.allclose(ours.eval()(feat), torchs.eval()(feat), atol=1e-4)


@pytest.mark.parametrize("n", [12, 50])  # fewer than k, and more
def test_knn_is_the_brute_force_vote(n):
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(n, 7, generator=draw), torch.randn(9, 7, generator=draw)
    classes, labels = torch.randint(3, (n,), generator=draw), torch.randint(3, (9,), generator=draw)
    blocks = zip(bank.split(8), classes.split(8), strict=True)
    got = probe.knn(queries, labels, blocks, [3, 4], 3)
    for layer, columns in enumerate([slice(0, 3), slice(3, 7)]):
        hits = 0
        for query, label in zip(queries[:, columns], labels, strict=True):
            near = [float(query @ b / query.norm() / b.norm()) for b in bank[:, columns]]
            score = [0.0] * 3
            for similarity, c in sorted(zip(near, classes.tolist(), strict=True), reverse=True)[:20]:
                score[c] += math.exp(similarity / 0.07)
            hits += score.index(max(score)) == int(label)
        assert got[layer] == pytest.approx(100 * hits / 9, abs=1e-4)


def test_random_crop_is_numpys_pad_and_slice():
    x0 = torch.randn(3, 2, 8, 8)
    shift = torch.tensor([[1, 1], [0, 2], [2, 1]])
    got = probe.random_crop(x0, shift, 1)
    assert torch.equal(got[0], x0[0])
    padded = np.pad(x0, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    for i, (y, x) in enumerate(shift.tolist()):
        assert np.array_equal(got[i], padded[i, :, y : y + 8, x : x + 8])


def test_latents_take_the_stored_mirror_image_and_their_own_protocol():
    raw = torch.randn(6, 2, 4, 8, 8, dtype=torch.float16)
    latents = train_dit.Latents(raw, torch.full((4,), 0.5), torch.full((4,), 2.0))
    split = probe.Split(latents, torch.zeros(6).long(), None)
    x0 = split.x0(torch.tensor([4, 1]), torch.tensor([True, False]))
    assert torch.equal(x0, (torch.stack([raw[4, 1], raw[1, 0]]).float() - 0.5) / 2)
    blank = dict(epochs=None, lr=None, batch=None, amp="auto", t=None, grid=False, crop=False)
    for images, dataset, want in [
        (latents, "imagenet", (30, 2e-3, 1440)),
        (torch.zeros(6, 3, 8, 8).byte(), "cifar100", (15, 4e-3, 128)),
        (torch.zeros(6, 3, 8, 8).byte(), "shapes", (30, 4e-3, 128)),
    ]:
        model = SimpleNamespace(args=SimpleNamespace(dataset=dataset, cl_t=11))
        split = probe.Split(images, torch.zeros(2000), None)
        args = probe.resolve(argparse.Namespace(**blank), model, split, torch.device("cpu"))
        assert (args.epochs, args.lr, args.batch, args.amp, args.t) == (*want, "off", [11])


# ---- Noise: fresh, cached, split over ranks ----------------------------------------------------------------
def test_cache_equals_fresh_without_noise():
    train, test = make_split(700), make_split(60, seed=1)
    fresh, cached = (probe.probe_level(fake_encoder(0.0), train, test, 4, flags(cache=c)) for c in (False, True))
    assert fresh == cached


def test_noise_is_fresh_in_training_and_fixed_in_testing():
    seen = []

    class Spy:
        layers = {"out": 3}

        def __call__(self, x0, noise):
            seen.append(noise)
            return x0.mean((2, 3))

    train = make_split(64)
    probe.train_heads(Spy(), train, 4, flags(batch=64, epochs=2))
    fixed = [list(probe.fixed_features(Spy(), train, False, probe.TEST, flags(), 0, 1)) for _ in range(2)]
    fresh, again = seen[:2], seen[2:]
    assert fixed and torch.equal(*again)
    for a, b in itertools.combinations([*fresh, again[0]], 2):
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
    argv = ["--dataset", "mini", "--data", str(root / "data"), "--resolution", "16", "--backbone", "tiny"]
    args = train_unet.parse_args([*argv, "--self-cond", "--layer", "out_4", "--out", str(root)])
    for epoch in (1, 2):
        net, _ = train_unet.build(args)
        state = {"script": "train_unet", "args": vars(args), "ema": net.state_dict(), "epoch": epoch, "step": 9}
        torch.save(state, root / f"epoch_{epoch}.pt")
    return root


def call(*argv):
    """Run the command in this process, on the CPU and quickly."""
    return probe.main(probe.parse_args(["--device", "cpu", "--batch", "30", "--epochs", "2", *map(str, argv)]))


def is_png(path):
    image = Image.open(path)
    image.load()
    return image.format == "PNG" and min(image.size) > 100


def test_defaults_are_the_checkpoints_own(run, capsys):
    result = call(run / "epoch_1.pt", "--json", run / "one.json")[0]
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"top-1 \d+\.\d\d % \(out_4, t=11\)", lines[-1]), lines[-1]
    for word in ("EMA of epoch 1", "pool gap", "epochs 2", "lr 0.004", "batch 30", "flip True", "crop False"):
        assert word in lines[1], lines[1]
    written = json.loads((run / "one.json").read_text())
    assert written["checkpoints"] == [result] and written["top1"] == result["cells"][0]["linear"]
    assert [c["layer"] for c in result["cells"]] == ["out_4"]


def test_grid_writes_table_json_and_picture(run, capsys):
    result = call(run / "epoch_1.pt", "--grid", "--t", "1", "66", "--pixels", "--cache")[0]
    lines = capsys.readouterr().out.splitlines()
    layers = result["protocol"]["layers"]
    assert len(layers) > 4 and layers == [f"out_{i + 1}" for i in range(len(layers))]
    assert re.fullmatch(r"top-1 \d+\.\d\d % \(out_\d, t=(1|66)\)", lines[-1])
    assert [line.split()[0] for line in lines[-len(layers) - 2 : -1]] == [*layers, "pixels"]
    cells = json.loads((run / "probe_grid.json").read_text())["checkpoints"][0]["cells"]
    assert cells == result["cells"] and len(cells) == 2 * len(layers) + 1
    assert cells[-1]["layer"] == "pixels" and cells[-1]["level"] is None
    assert all(0 <= c["linear"] <= 100 and 0 <= c["knn"] <= 100 for c in cells)
    assert is_png(run / "probe_grid.png")


def test_a_cell_does_not_depend_on_the_rest_of_the_grid(run):
    grid = call(run / "epoch_1.pt", "--layer", "out_2", "out_4", "--t", "1", "66", "--batchnorm")[0]["cells"]
    alone = call(run / "epoch_1.pt", "--layer", "out_4", "--t", "66", "--batchnorm")[0]["cells"]
    assert grid[-1] == alone[0]


def test_several_checkpoints_give_a_curve_and_the_best(run, capsys):
    results = call(run / "epoch_2.pt", run / "epoch_1.pt", "--crop", "--no-flip")
    lines = capsys.readouterr().out.splitlines()
    best = max(result["cells"][0]["linear"] for result in results)
    assert lines[-1] == f"top-1 {best:.2f} % (out_4, t=11)"
    assert [r["epoch"] for r in json.loads((run / "probe_epochs.json").read_text())["checkpoints"]] == [2, 1]
    assert is_png(run / "probe_epochs.png")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{run}/none.pt"], "none.pt does not exist"),
        (["{run}/epoch_1.pt", "{run}/none.pt"], "none.pt does not exist"),
        (["{run}/epoch_1.pt", "--layer", "out_99"], "no layer out_99: choose --layer from out_1 out_2"),
        (["{run}/epoch_1.pt", "--t", "11", "1001"], "--t 1001: noise level 1001 is out of range"),
        (["{run}/epoch_1.pt", "--pool", "cls"], "no [CLS] token"),
        (["{run}/epoch_1.pt", "--data", "{run}/nowhere"], "nowhere"),
        (["{run}/epoch_1.pt", "--json", "{run}"], "cannot write"),
        (["{run}/epoch_1.pt", "--grid", "--layer", "out_1"], "--grid probes every layer"),
        (["{run}/epoch_1.pt", "--cache", "--crop"], "excludes --crop"),
        (["{run}/epoch_1.pt", "--plot", "a.txt"], "FILE.png"),
        (["{run}/epoch_1.pt", "--lr", "0"], "above 0"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(run, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        call(*(part.format(run=run) for part in argv))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in error and "error: " in error, error


def test_broken_weights_are_an_error(run, tmp_path, capsys):
    state = torch.load(run / "epoch_1.pt", weights_only=True)
    state["ema"]["image_proj.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(SystemExit):
        call(tmp_path / "nan.pt")
    assert "NaN or infinity" in capsys.readouterr().err


def call_and_keep_heads(path, argv):
    """Run the command with blocks so small that both ranks have some; save the heads of its last level."""
    trained, block, probe.BLOCK = probe.train_heads, probe.BLOCK, 16
    try:
        probe.train_heads = lambda *a: torch.save((heads := trained(*a)).state_dict(), path) or heads
        return call(*argv)
    finally:
        probe.train_heads, probe.BLOCK = trained, block


def rank_main(rank, port, path, argv):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    call_and_keep_heads(f"{path}_{rank}", argv)


def test_two_ranks_equal_one(run, tmp_path):
    """An odd batch, blocks that do not divide, batch normalisation, several layers."""
    argv = [run / "epoch_1.pt", "--layer", "out_1", "out_5", "--t", "11", "130", "--batchnorm", "--batch", "27"]
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
