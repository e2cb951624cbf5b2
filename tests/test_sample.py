"""sample.py: exact count, images that depend on their index only, and refusal of what is no checkpoint."""

import functools
import hashlib
import os
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch._dynamo.testing import CompileCounter

import sample
import train_dit
import train_unet as T
import train_uvit


def checkpoint(path, model="edm", seed=0):
    """An untrained tiny network as a run would leave it, its zero-initialised layers shaken."""
    args = T.parse_args(["--model", model, "--dataset", "shapes", "--backbone", "tiny"])
    torch.manual_seed(seed)
    net, _ = T.build(args)
    with torch.no_grad():
        net.final.weight.normal_(std=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"script": "train_unet", "args": vars(args), "ema": net.state_dict(), "epoch": 3, "step": 9}, path)
    return path


def conditional(path):
    """An untrained class-conditional network of ten classes."""
    args = train_uvit.parse_args(["--dataset", "shapes", "--size", "tiny", "--cond"])
    args.classes = train_uvit.SHAPES
    net, _ = train_uvit.build(args)
    torch.save({"script": "train_uvit", "args": vars(args), "ema": net.state_dict(), "epoch": 3, "step": 9}, path)
    return path


def run(*flags):
    sample.run_tool(sample.main, sample.parse_args([str(f) for f in flags]))


def error_of(capsys, call, *argv):
    """The one line on stderr of a call that must end with exit status 2; a bar may stand beside it."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("sample:")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_image_i_depends_on_its_index_only(tmp_path, monkeypatch):
    """Neither the batch size, nor how many are drawn, nor the number of ranks changes an image."""
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt"))
    monkeypatch.setattr(sample, "BLOCK", 4)

    def draw(n, **kw):
        out = {}
        for indices, images, _ in sample.generate(model, n, steps=3, **kw):
            out.update(zip(indices, images, strict=True))
        return out

    whole = draw(10)
    assert sorted(whole) == list(range(10)) and whole[0].dtype == torch.uint8 and whole[0].shape == (3, 16, 16)
    for other in (draw(10, batch=3), draw(6), draw(10, rank=0, world=2) | draw(10, rank=1, world=2)):
        for i, image in other.items():
            assert (image.int() - whole[i].int()).abs().max() <= 1  # a batch of another size may round once
    assert not any(whole[i].equal(draw(1, seed=1)[0]) for i in range(10))
    assert len({image.numpy().tobytes() for image in whole.values()}) == 10


@pytest.mark.parametrize(("model", "nfe"), [("ddpm", 100), ("edm", 35)])
def test_nfe_is_counted(tmp_path, model, nfe):
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt", model))
    ((_, _, calls),) = sample.generate(model, 2, batch=1)  # two pieces are still one evaluation
    assert calls == nfe


def test_rk45_is_batch_independent_and_counts(tmp_path):
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt", "rf"))
    ((_, a, nfe),) = sample.generate(model, 4, batch=4)
    ((_, b, same),) = sample.generate(model, 4, batch=3)
    assert nfe == same > 6 and (a.int() - b.int()).abs().max() <= 1


def test_folder_npz_and_grid(tmp_path, capsys):
    ckpt = checkpoint(tmp_path / "run/last.pt")
    run(tmp_path / "run", "--n", "5", "--steps", "2", "--out", tmp_path / "png")
    run(ckpt, "--n", "5", "--steps", "2", "--out", tmp_path / "five.npz")
    files = sorted((tmp_path / "png").iterdir())
    arrays = np.load(tmp_path / "five.npz")["arr_0"]
    assert len(files) == 5 and arrays.shape == (5, 16, 16, 3) and arrays.dtype == np.uint8
    assert all((np.asarray(Image.open(f)) == a).all() for f, a in zip(files, arrays, strict=True))
    run(ckpt, "--n", "5", "--steps", "2")
    picture = np.asarray(Image.open(tmp_path / "run/samples.png"))
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 3)  # 16 pixels are enlarged to 64
    assert (picture[2:66, 2:66] == arrays[0].repeat(4, 0).repeat(4, 1)).all()
    assert (picture[68:132, 68:132] == arrays[4].repeat(4, 0).repeat(4, 1)).all()
    said = capsys.readouterr().out
    assert "EMA weights of epoch 3 (step 9)" in said and "NFE 3" in said and "labels" not in said
    assert f"wrote {tmp_path / 'five.npz'}" in said and said.splitlines()[-1] == f"wrote {tmp_path / 'run/samples.png'}"


def test_rows_share_their_noise_and_have_names(tmp_path):
    a, b = checkpoint(tmp_path / "first/last.pt"), checkpoint(tmp_path / "second/last.pt", seed=1)
    run(a, b, a, "--n", "4", "--steps", "3", "--out", tmp_path / "rows.png")
    picture = np.asarray(Image.open(tmp_path / "rows.png"))
    margin = picture.shape[1] - (4 * 66 + 2)
    assert picture.shape[0] == 3 * 66 + 2 and margin > 50
    rows = [picture[2 + 66 * r : 66 + 66 * r] for r in range(3)]
    names, tiles = [row[:, :margin] for row in rows], [row[:, margin:] for row in rows]
    assert (tiles[0] == tiles[2]).all() and not (tiles[0] == tiles[1]).all()
    assert all((name < 128).sum() > 30 for name in names) and not (names[0] == names[1]).all()


def test_a_column_per_class(tmp_path, capsys, monkeypatch):
    """Ten classes have ten columns with their names; --labels, by number or name, columns of those."""
    path, drawn, draw = conditional(tmp_path / "a.pt"), [], sample.class_labels
    monkeypatch.setattr(sample, "class_labels", lambda *args, **kw: drawn.append(draw(*args, **kw)) or drawn[-1])
    for flags, columns, rows, labels in (
        ([], 10, 8, list(range(10)) * 8),
        (["--n", "4"], 4, 1, [0, 1, 2, 3]),
        (["--labels", "3", "7", "1"], 3, 8, [3, 7, 1] * 8),
        (["--labels", "solid star", "hollow square", "1"], 3, 8, [3, 6, 1] * 8),
        (["--labels", "3", "--n", "4"], 2, 2, [3] * 4),
    ):
        run(path, "--steps", "1", *flags)
        picture = Image.open(tmp_path / "samples.png")
        top = picture.height - (rows * 66 + 2)
        assert picture.width == columns * 66 + 2 and (0 < top < 40) == (len(set(labels)) > 1)
        for column in range(columns if top else 0):  # letters above each
            assert np.asarray(picture)[:top, 66 * column : 66 * column + 66].min() < 100
        assert drawn.pop().tolist() == labels
        drawn.clear()  # those of the names
    assert "labels [3]" in capsys.readouterr().out
    run(path, "--steps", "1", "--labels", "random", "--n", "64")
    assert Image.open(tmp_path / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2) and len(set(drawn.pop().tolist())) > 5
    for bad in (["10"], ["-1"], ["3", "random"], ["cat"]):
        with pytest.raises(SystemExit) as stop:
            run(path, "--steps", "1", "--labels", *bad)
        assert stop.value.code == 2 and "--labels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(checkpoint(tmp_path / "b.pt"), "--labels", "3")
    assert "unconditional" in capsys.readouterr().err and not drawn


def test_features_can_train_a_head(tmp_path):
    """The network is frozen; what it returns is an ordinary tensor that a head can learn from."""
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt"))
    x0 = model.script.to_x0(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    feat = list(model.diffusion.features(model.net, x0, 0.06, torch.randn_like(x0)).values())[0]
    head = torch.nn.Linear(feat.shape[1], 2)
    head(feat).sum().backward()
    assert head.weight.grad.abs().sum() > 0 and not any(p.requires_grad for p in model.net.parameters())


def test_two_ranks_write_what_one_writes(tmp_path):
    ckpt = checkpoint(tmp_path / "a.pt")
    script = str(ROOT / "sample.py")
    flags = [str(ckpt), "--n", "300", "--steps", "1"]  # two blocks
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]  # else torchrun takes --n
    for name, extra in (("1", []), ("2", launch)):
        command = [sys.executable, *extra, script, *flags, "--out", f"{tmp_path}/{name}.npz"]
        subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    subprocess.run([*command[:-1], tmp_path / "png"], check=True, capture_output=True, timeout=120)
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "12")
    pngs = np.stack([np.asarray(Image.open(tmp_path / "png" / f"{i:06d}.png")) for i in range(300)]).astype(int)
    assert one.shape == (300, 16, 16, 3) and abs(one - two).max() <= 1 and abs(one - pngs).max() <= 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.npz", "2.npz", "a.pt", "png"]  # no parts are left


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def change(path, key, value, part=None):
    """Replace an entry of a checkpoint, or of one of its parts."""
    state = torch.load(path, weights_only=True)
    (state[part] if part else state)[key] = value
    torch.save(state, path)


NO_CHECKPOINTS = {  # what happens to the file, and what is said
    "missing": (lambda path: path.unlink(), "does not exist"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "failed finding central directory"),
    "text": (lambda path: path.write_text("hello"), "it begins with b'hello'"),
    "pickle with code": (lambda path: path.write_bytes(pickle.dumps(Bomb(f"{path}.boom"), 2)), "cannot be read"),
    "another program's": (lambda path: torch.save({"model": {}}, path), "has no 'script'"),
    "a list": (lambda path: torch.save([1], path), "is no checkpoint of a train script"),
    "weights missing": (lambda path: change(path, "final.bias", torch.zeros(1), "ema"), "size mismatch for final.bias"),
    "another backbone": (lambda path: change(path, "backbone", 5, "args"), "does not fit train_unet.py (5)"),
    "a script of the person's": (lambda path: change(path, "script", "my_unet"), "give --script my_unet.py"),
    "a module of Python": (lambda path: change(path, "script", "os"), "give --script os.py"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_no_checkpoint(case, tmp_path, capsys):
    """One line with the true reason, status 2, no code run; a notebook gets an exception that says the same."""
    path = checkpoint(tmp_path / "x.pt")
    damage, says = NO_CHECKPOINTS[case]
    damage(path)
    line = error_of(capsys, run, path)
    assert says in line and str(path) in line
    with pytest.raises(sample.UserError) as error:
        sample.load_checkpoint(path)
    assert str(error.value).split(" (")[0] in line
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"] * (case != "missing")


def test_a_script_of_the_persons_own(tmp_path, capsys):
    """A renamed copy is run where --script names it, and only there; an edited one gives a warning."""
    path, script = checkpoint(tmp_path / "x.pt"), tmp_path / "my_unet.py"
    script.write_text((ROOT / "train_unet.py").read_text())
    text_hash = hashlib.sha256(script.read_bytes()).hexdigest()[:16]
    run(path, "--n", "1", "--steps", "2", "--out", tmp_path / "a.npz")
    change(path, "script", "my_unet")
    change(path, "script_hash", text_hash)
    assert "none.py does not exist" in error_of(capsys, run, path, "--script", tmp_path / "none.py")
    run(path, "--n", "1", "--steps", "2", "--out", tmp_path / "b.npz", "--script", script)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert "edited" not in capsys.readouterr().err
    script.write_text(script.read_text() + "# edited\n")
    sample.load_checkpoint(path, script_file=script)
    assert "my_unet.py has been edited since it wrote" in capsys.readouterr().err


def test_an_edited_train_script_is_told(tmp_path, capsys):
    path = checkpoint(tmp_path / "x.pt")
    change(path, "script_hash", T.SCRIPT_HASH)
    sample.load_checkpoint(path)
    assert capsys.readouterr().err == ""
    change(path, "script_hash", "0" * 16)
    sample.load_checkpoint(path)
    assert "warning: " in (said := capsys.readouterr().err) and "train_unet.py has been edited since" in said


def test_generate_raises_what_a_notebook_shows(tmp_path, monkeypatch):
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt"))
    for options in ({"cfg": 2.0}, {"labels": [1]}, {"vae": "x.pt"}):
        with pytest.raises(sample.UserError):
            sample.generate(model, 1, **options)
    monkeypatch.setattr(T.EDM, "sample", lambda self, net, noise, y=None: noise * torch.nan)
    with pytest.raises(sample.UserError, match="NaN or infinity"):
        next(sample.generate(model, 1))


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(T.EDM, "sample", lambda self, net, noise, y=None: interrupt())
    with pytest.raises(SystemExit) as stop:
        run(checkpoint(tmp_path / "a.pt"), "--n", "1")
    assert stop.value.code == 130 and "error: stopped by Ctrl-C" in capsys.readouterr().err


def test_comparisons_have_files_of_their_own(tmp_path):
    """A's picture stays as it is; the order is the command line's."""
    for name in ("A", "B"):
        checkpoint(tmp_path / name / "last.pt", seed=ord(name))
        checkpoint(tmp_path / name / "epoch_0003.pt", seed=ord(name))
    run(tmp_path / "A", "--n", "1", "--steps", "1")
    before = (tmp_path / "A/samples.png").read_bytes()
    run(tmp_path / "A", tmp_path / "B", "--n", "1", "--steps", "1")
    run(tmp_path / "B/epoch_0003.pt", tmp_path / "A/last.pt", "--n", "1", "--steps", "1")
    assert (tmp_path / "A/samples.png").read_bytes() == before
    ab, ba = (np.asarray(Image.open(tmp_path / name)) for name in
              ("A/samples_A-B.png", "B/samples_B-epoch_0003-A-last.png"))  # fmt: skip
    assert (ab[2:66, -66:] == ba[68:132, -66:]).all() and not (ab[2:66, -66:] == ba[2:66, -66:]).all()


@pytest.fixture
def small(monkeypatch):
    """Whole checkpoints of networks that compile quickly: UNets and a DiT."""
    monkeypatch.setitem(T.BACKBONES, "tiny", {"width": 32, "mult": (1,), "blocks": 1, "biggan": False})
    monkeypatch.setitem(train_dit.SIZES, "tiny", (64, 3, 4))
    states = []
    for script, flags in (
        (T, ["--backbone", "tiny", "--model", "edm", "--self-cond", "--layer", "out_1"]),
        (T, ["--backbone", "tiny", "--resolution", "8"]),
        (train_dit, ["--size", "tiny", "--cond", "--self-cond"]),
    ):
        args = script.parse_args(["--dataset", "shapes", *flags])
        args.classes = script.SHAPES
        state = {"script": script.__name__, "args": vars(args), "ema": dict(script.build(args)[0].state_dict())}
        states.append(state | {"epoch": 3, "step": 9})
    return states


def test_one_graph_for_all_blocks(small, tmp_path, monkeypatch):
    """What is compiled is compiled once: for whole pieces, of all blocks and checkpoints; the rest runs as it is."""
    monkeypatch.setattr(sample, "BLOCK", 4)
    rf, steps = small[1] | {"args": small[1]["args"] | {"model": "rf", "cl_t": 0.06}}, {"steps": 2}
    for state, options in ((small[0], steps), (small[1], steps), (rf, {}), (small[2], steps | {"batch": 2})):
        models, counter = [], CompileCounter()
        torch._dynamo.reset()
        for i in range(2):
            torch.save(state, tmp_path / f"{i}.pt")
            models.append(sample.load_checkpoint(tmp_path / f"{i}.pt"))
            models[-1].net.to(memory_format=torch.channels_last)  # as on a GPU
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
            compiled = [list(sample.generate(model, 11, compile=True, **options)) for model in models]
        assert counter.frame_count == 1 and counter.op_count > 10
        for (_, a, _), (_, b, _) in zip(sample.generate(models[0], 11, **options), compiled[1], strict=True):
            assert (a.int() - b.int()).abs().max() <= 1
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", None)
    assert len(list(sample.generate(models[0], 4 * 9, steps=1))) == 9  # a CPU compiles when it is told to


def test_amp(tmp_path):
    """--amp bf16 changes the images, by little."""
    model = sample.load_checkpoint(checkpoint(tmp_path / "a.pt"))
    (_, a, _), = sample.generate(model, 4, steps=3)
    (_, b, _), = sample.generate(model, 4, steps=3, amp=torch.bfloat16)
    gap = (a.int() - b.int()).abs().float()
    assert 0 < gap.mean() < 1 and gap.max() < 12


def test_mistakes_show_before_the_first_image(tmp_path, capsys, monkeypatch):
    """Those about the second checkpoint or its flags, and places that cannot be written."""
    path, other = checkpoint(tmp_path / "a.pt"), conditional(tmp_path / "b.pt")
    monkeypatch.setattr(T.EDM, "sample", lambda self, net, noise, steps=18, y=None: pytest.fail("sampled"))
    out = tmp_path / "rows.png"
    assert "none.pt does not exist" in error_of(capsys, run, path, tmp_path / "none.pt", "--out", out)
    assert f"{path} is unconditional" in error_of(capsys, run, other, path, "--labels", "3", "--out", out)
    assert "--cfg" in error_of(capsys, run, path, other, "--cfg", "2", "--out", out)
    assert "--vae" in error_of(capsys, run, path, other, "--vae", "x.pt", "--out", out)
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "file").write_text("")
    for bad in ("dir.png", "file", "file/a.png", "file/folder"):
        assert str(tmp_path / bad.split("/")[0]) in error_of(capsys, run, path, "--out", tmp_path / bad)
    assert not out.exists()


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.PNG"])
def test_a_picture_of_another_format_is_not_taken_for_a_folder(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stop:
        run(checkpoint(tmp_path / "a.pt"), "--out", tmp_path / name)
    assert stop.value.code == 2 and "pictures are PNG" in capsys.readouterr().err and not (tmp_path / name).exists()


def test_a_full_disk(tmp_path, capsys):
    """One line, as for every file that cannot be written."""
    path, limits = checkpoint(tmp_path / "a.pt"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("a.npz", "a.png", "folder"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            assert "File too large" in error_of(capsys, run, path, "--n", "2", "--steps", "1", "--out", tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_old_folder_is_not_mixed(tmp_path, capsys):
    ckpt = checkpoint(tmp_path / "a.pt")
    (tmp_path / "png").mkdir()
    (tmp_path / "png/old.png").touch()
    with pytest.raises(SystemExit) as stop:
        run(ckpt, "--out", tmp_path / "png")
    assert stop.value.code == 2 and "png exists" in capsys.readouterr().err
