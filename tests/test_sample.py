"""sample.py: exact count, images that depend on their index only, and refusal of what is no checkpoint."""

import functools
import hashlib
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_checkpoint, refused, run
from PIL import Image
from torch._dynamo.testing import CompileCounter

import sample
import train_dit
import train_unet as T
import train_uvit

TINY = ["--backbone", "tiny", "--model", "edm"]
UVIT = ["--size", "tiny", "--cond"]  # ten classes

def unet(path, *flags, **options):
    return make_checkpoint(path, T, *TINY, *flags, shake=0.02, **options)

def gap(a, b):
    """The largest difference of uint8 images; a batch of another size may round once."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()

def draw(model, n, **options):
    """The images {index: uint8 (3, H, W)} of sample.generate, and its evaluations per block."""
    images, evaluations = {}, []
    for indices, block, count in sample.generate(model, n, **options):
        images.update(zip(indices, block, strict=True))
        evaluations.append(count)
    return images, evaluations

# ---- What is drawn ---------------------------------------------------------------------------------------------------
def test_image_i_depends_on_its_index_only(tmp_path, monkeypatch):
    """Neither the batch size, nor how many are drawn, nor the number of ranks changes an image."""
    model = sample.load_checkpoint(unet(tmp_path / "a.pt"))
    monkeypatch.setattr(sample, "BLOCK", 4)
    whole, _ = draw(model, 10, steps=2)
    assert sorted(whole) == list(range(10)) and len({image.numpy().tobytes() for image in whole.values()}) == 10
    halves = ((10, {"rank": 0, "world": 2}, [0, 1, 2, 3, 8, 9]), (10, {"rank": 1, "world": 2}, [4, 5, 6, 7]))
    for n, options, indices in ((10, {"batch": 3}, range(10)), (6, {}, range(6)), *halves):
        images, _ = draw(model, n, steps=2, **options)
        assert sorted(images) == list(indices), options
        assert all(gap(images[i], whole[i]) <= 1 for i in indices), options

@pytest.mark.parametrize(("model", "evaluations"), [("ddpm", 100), ("edm", 35), ("rf", None)])
def test_a_block_is_one_problem_however_it_is_cut(tmp_path, model, evaluations):
    """Two pieces are one evaluation, and RK45 chooses its steps for both; the network is a formula, to be quick."""
    model = sample.load_checkpoint(unet(tmp_path / "a.pt", "--model", model))
    model.net.forward = lambda x, t, y=None: torch.tanh(3 * x)
    whole, (calls,) = draw(model, 4)
    images, (again,) = draw(model, 4, batch=3)
    assert calls == again == (evaluations or calls) > 6
    assert all(gap(image, whole[i]) <= 1 for i, image in images.items())

@pytest.mark.slow
@pytest.mark.parametrize(("script", "flags"), [(T, [*TINY, "--self-cond", "--layer", "out_1"]),
                                               (train_dit, ["--size", "tiny", "--cond", "--self-cond"])])
def test_one_graph_for_all_blocks(script, flags, tmp_path, monkeypatch):
    """What is compiled is compiled once: for whole pieces, of all blocks and checkpoints; the rest runs as it is."""
    monkeypatch.setattr(sample, "BLOCK", 4)
    monkeypatch.setitem(T.BACKBONES, "tiny", {"width": 32, "mult": (1,), "blocks": 1, "biggan": False})
    monkeypatch.setitem(train_dit.SIZES, "tiny", (64, 3, 4))
    path, counter = make_checkpoint(tmp_path / "a.pt", script, *flags), CompileCounter()
    models = [sample.load_checkpoint(path) for _ in range(2)]
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        compiled = [draw(model, 11, compile=True, steps=2, batch=2)[0] for model in models]
    torch._dynamo.reset()
    assert counter.frame_count == 1 and counter.op_count > 10
    plain, _ = draw(models[0], 11, steps=2)
    assert all(gap(image, plain[i]) <= 1 for images in compiled for i, image in images.items())

# ---- What is written -------------------------------------------------------------------------------------------------
def test_folder_npz_and_grid_hold_the_same_images(tmp_path, capsys, monkeypatch):
    """In order, in six blocks."""
    monkeypatch.setattr(sample, "BLOCK", 2)
    path, flags = unet(tmp_path / "run/last.pt"), ["--n", 12, "--steps", 2]
    run(sample, tmp_path / "run", *flags, "--out", tmp_path / "png")
    run(sample, path, *flags, "--out", tmp_path / "twelve.npz")
    run(sample, path, *flags)
    files, arrays = sorted((tmp_path / "png").iterdir()), np.load(tmp_path / "twelve.npz")["arr_0"]
    assert len(files) == 12 and arrays.shape == (12, 16, 16, 3) and arrays.dtype == np.uint8
    assert all(np.array_equal(Image.open(file), array) for file, array in zip(files, arrays, strict=True))
    picture = np.asarray(Image.open(tmp_path / "run/samples.png"))
    assert picture.shape == (3 * 66 + 2, 4 * 66 + 2, 3)  # 16 pixels are enlarged to 64
    assert np.array_equal(picture[2:66, 2:66], arrays[0].repeat(4, 0).repeat(4, 1))
    assert np.array_equal(picture[68:132, 68:132], arrays[5].repeat(4, 0).repeat(4, 1))
    said = capsys.readouterr().out
    assert "EMA weights of epoch 3 (step 9)" in said and "NFE 3" in said and "labels" not in said
    assert f"wrote {tmp_path / 'twelve.npz'}" in said
    assert said.splitlines()[-1] == f"wrote {tmp_path / 'run/samples.png'}"

def test_comparisons_have_rows_with_names_and_files_of_their_own(tmp_path):
    """Rows share their noise and have the command line's order; a run's own picture stays as it is."""
    for name, seed in (("A", 0), ("B", 1)):
        for file in ("last.pt", "epoch_0003.pt"):
            unet(tmp_path / name / file, seed=seed)
    flags = ["--n", 2, "--steps", 1]
    run(sample, tmp_path / "A", *flags)
    before = (tmp_path / "A/samples.png").read_bytes()
    run(sample, tmp_path / "A", tmp_path / "B", tmp_path / "A", *flags)
    run(sample, tmp_path / "B/epoch_0003.pt", tmp_path / "A/last.pt", *flags)
    assert (tmp_path / "A/samples.png").read_bytes() == before
    rows = []
    for file, n in (("A/samples_A-B-A.png", 3), ("B/samples_B-epoch_0003-A-last.png", 2)):
        picture = np.asarray(Image.open(tmp_path / file))
        assert picture.shape[0] == n * 66 + 2 and picture.shape[1] > 2 * 66 + 50
        rows += [picture[2 + 66 * row : 66 + 66 * row] for row in range(n)]
    names, tiles = [row[:, : -2 * 66] for row in rows], [row[:, -2 * 66 :] for row in rows]
    assert all((name < 128).sum() > 30 for name in names) and not np.array_equal(names[0], names[1])
    a, b, a_again, b_first, a_last = tiles
    assert np.array_equal(a, a_again) and np.array_equal(a, a_last) and np.array_equal(b, b_first)
    assert not np.array_equal(a, b)

def test_long_comparisons_have_names_of_their_own():
    paths = [f"runs/a-run-with-a-long-name/epoch_{i:04d}.pt" for i in range(12)]
    names = {sample.comparison_name(paths[:n]) for n in (10, 11, 12)}
    assert len(names) == 3 and max(map(len, names)) <= 100

COLUMNS = (
    ([], 10, 8, list(range(10)) * 8),
    (["--n", "4"], 4, 1, [0, 1, 2, 3]),
    (["--labels", "solid star", "7", "1"], 3, 8, [3, 7, 1] * 8),
    (["--labels", "3", "--n", "4"], 2, 2, [3] * 4),
    (["--labels", "random"], 8, 8, None),
)

@pytest.mark.parametrize(("flags", "columns", "rows", "labels"), COLUMNS)
def test_a_class_has_a_column_with_its_name(tmp_path, capsys, monkeypatch, flags, columns, rows, labels):
    drawn, draw = [], sample.class_labels
    monkeypatch.setattr(sample, "class_labels", lambda *args, **kw: drawn.append(draw(*args, **kw)) or drawn[-1])
    run(sample, make_checkpoint(tmp_path / "a.pt", train_uvit, *UVIT), "--steps", 1, *flags)
    assert drawn[-1].tolist() == labels if labels else len(set(drawn[-1].tolist())) > 5
    picture, named = np.asarray(Image.open(tmp_path / "samples_a.png")), bool(labels) and len(set(labels)) > 1
    top = len(picture) - (rows * 66 + 2)
    assert picture.shape[1] == columns * 66 + 2 and (0 < top < 40) == named and (top == 0) != named
    for column in range(columns if named else 0):
        assert picture[:top, 66 * column : 66 * column + 66].min() < 100  # letters
    assert ("labels [3]" in capsys.readouterr().out) == (labels == [3] * 4)

def test_columns_of_several_models_are_named_where_all_draw_the_same_classes():
    def columns(*models):
        models = [SimpleNamespace(net=SimpleNamespace(classes=n), args=SimpleNamespace(classes=c)) for n, c in models]
        return sample.plan_grid(models, ["balanced"] * len(models), 4)

    assert columns((2, ["a", "b"]), (2, ["a", "b"])) == (4, 4, ["a", "b", "a", "b"])
    for other in ((2, ["c", "d"]), (0, ["a", "b"])):
        assert columns((2, ["a", "b"]), other) == (4, 4, [])
    assert columns((6, [*"abcdef"])) == (4, 4, [*"abcd"])

def test_a_word_is_a_class_name_before_it_is_a_number():
    model = SimpleNamespace(net=SimpleNamespace(classes=3), args=SimpleNamespace(classes=["2", "0", "x"]))
    assert sample.parse_labels(["2", "1", "x"], model) == [0, 1, 2]

@pytest.mark.slow
def test_two_ranks_write_what_one_writes(tmp_path):
    path, flags = unet(tmp_path / "a.pt"), ["--n", "300", "--steps", "1"]  # two blocks
    run(sample, path, *flags, "--out", tmp_path / "1.npz")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]  # else torchrun takes --n
    command = [sys.executable, "-m", *torchrun, ROOT / "sample.py", path, *flags, "--out", tmp_path / "2.npz"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = (np.load(tmp_path / f"{ranks}.npz")["arr_0"] for ranks in (1, 2))
    assert one.shape == (300, 16, 16, 3) and gap(one, two) <= 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.npz", "2.npz", "a.pt"]  # no parts are left

# ---- Checkpoints and scripts -----------------------------------------------------------------------------------------
def change(path, **entries):
    """Replace entries of a checkpoint."""
    torch.save(torch.load(path, weights_only=True) | entries, path)

def test_a_script_of_the_persons_own(tmp_path, capsys):
    """A renamed copy is run where --script names it, and only there; a script edited since gives a warning."""
    path, script = unet(tmp_path / "x.pt"), tmp_path / "my_unet.py"
    script.write_text((ROOT / "train_unet.py").read_text())
    change(path, script="my_unet", script_hash=hashlib.sha256(script.read_bytes()).hexdigest()[:16])
    assert "none.py does not exist" in refused(capsys, run, sample, path, "--script", tmp_path / "none.py")
    run(sample, path, "--n", 1, "--steps", 1, "--script", script)
    assert "edited" not in capsys.readouterr().err
    script.write_text(script.read_text() + "# edited\n")
    assert sample.load_checkpoint(path, script_file=script).script.__file__ == str(script)
    assert "my_unet.py has been edited since it wrote" in capsys.readouterr().err
    change(path, script="train_unet", script_hash="0" * 16)
    assert sample.load_checkpoint(path, script_file=script).script is T
    assert "train_unet.py has been edited since it wrote" in capsys.readouterr().err

# ---- Mistakes --------------------------------------------------------------------------------------------------------
MISTAKES = (
    ("a.pt none.pt --out rows.png", "none.pt does not exist"),
    ("cond.pt a.pt --labels 3 --out rows.png", "a.pt is unconditional"),
    ("a.pt cond.pt --cfg 2 --out rows.png", "--cfg"),
    ("a.pt cond.pt --vae x.pt --out rows.png", "--vae"),
    ("cond.pt --labels 10", "--labels 10: the classes of cond.pt are 0 to 9, or solid triangle"),
    ("cond.pt --labels 3 random", "--labels random"),
    ("a.pt --out dir.png", "dir.png exists"),
    ("a.pt --out a.pt", "a.pt exists"),
    ("a.pt --out a.jpg", "pictures are PNG"),
    ("dit.pt --cfg 2", "dit.pt is unconditional"),
    ("cdit.pt --cfg -1", "--cfg"),
    ("cdit.pt --steps 0", "--steps"),
    ("cdit.pt --cfg-interval 0.9 0.1", "--cfg-interval"),
)

@pytest.mark.parametrize(("flags", "says"), MISTAKES)
def test_mistakes_show_before_the_first_image(flags, says, tmp_path, capsys, monkeypatch):
    """Also those about the second checkpoint, and places that are taken or cannot be written: nothing changes."""
    monkeypatch.chdir(tmp_path)
    unet(tmp_path / "a.pt")
    make_checkpoint(tmp_path / "cond.pt", train_uvit, *UVIT)
    for name, more in (("dit.pt", []), ("cdit.pt", ["--cond"])) if "dit.pt" in flags else ():
        make_checkpoint(tmp_path / name, train_dit, "--size", "tiny", *more)
    (tmp_path / "dir.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sample, "image_noise", None)
    assert says in refused(capsys, run, sample, *flags.split()) and sorted(tmp_path.rglob("*")) == before

def test_ctrl_c_is_one_line(capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        sample.run_tool(interrupt, None)
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "error: stopped by Ctrl-C"

@pytest.mark.parametrize(("name", "limit"), [("a.npz", 1700), ("a.png", 1700), ("folder", 500)])
def test_a_full_disk_is_one_line_and_an_older_file_stays(tmp_path, capsys, name, limit):
    """Two images of 768 bytes fit, but not the file that they become."""
    path, limits = unet(tmp_path / "a.pt"), resource.getrlimit(resource.RLIMIT_FSIZE)
    if name != "folder":
        (tmp_path / name).write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        line = refused(capsys, run, sample, path, "--n", 2, "--steps", 1, "--out", tmp_path / name)
    finally:  # before pytest writes on
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line and (name == "folder" or (tmp_path / name).read_text() == "old")

def test_labels_follow_from_the_index():
    """In turn; random ones evenly over classes, by (seed, i) alone, and not from the numbers of image i's noise."""
    assert sample.class_labels(range(256, 260), 10, "balanced", 0).tolist() == [6, 7, 8, 9]
    assert sample.class_labels(range(256, 260), 10, [7, 2, 3], 0).tolist() == [2, 3, 7, 2]
    labels = sample.class_labels(range(3000), 10, "random", seed=5)
    assert labels[20:].equal(sample.class_labels(range(20, 3000), 10, "random", seed=5))
    assert not labels.equal(sample.class_labels(range(3000), 10, "random", seed=6))
    assert (labels.bincount(minlength=10) - 300).abs().max() < 90  # 5.5 standard deviations
    noises_own = [int(np.random.default_rng((5, i)).integers(10)) for i in range(3000)]
    agree = (labels == torch.tensor(noises_own)).float().mean()
    assert 0.05 < agree < 0.15
