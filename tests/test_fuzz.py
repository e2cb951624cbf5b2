"""Damaged files, odd folders and wrong flags: each ends with status 0 or 2, in one line, soon and in little memory.

300 cases, DDAE_FUZZ=5000 for more. `python tests/test_fuzz.py 17 18` runs case 17 alone and prints what it said.
"""

import ast
import copy
import gc
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_kills import small

SECONDS, MEGABYTES = 20, 2000
NAMES = ("train_unet", "train_uvit", "train_dit")
RUN = ["--dataset", "shapes", "--batch", "8", "--epochs", "2", "--cl", "0.01"]
MODEL = {"train_unet": ["--backbone", "tiny", "--model", "edm", "--self-cond"],
         "train_uvit": ["--size", "tiny", "--cls-token"], "train_dit": ["--size", "tiny", "--self-cond"]}  # fmt: skip
ODD = (None, float("nan"), float("inf"), -1, 0, 1, 3, 0.5, -0.5, 10**13, 1e308, True, "x", "", "1", "nan", "../x",
       "a\nb", "a\0b", [], [1, 2], {}, {"a": 1}, torch.zeros(3), torch.zeros(2, 2), torch.tensor(1))  # fmt: skip
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e-320", "0.5", "1", "2", "3", "7", "1e300", "1e14", "99999999999999", "x",
           "", "1" * 400)  # fmt: skip


class Script:
    """A train script, shrunk, with a run of two steps; called as a process would call it."""

    def __init__(self, name, home):
        self.name, self.home = name, home / name
        body = ast.parse((ROOT / f"{name}.py").read_text()).body
        assert isinstance(body[-1], ast.If)  # if __name__ == "__main__"
        self.start = compile(ast.Module(body[-1:], []), f"{name}.py", "exec")
        self.module = small(name)
        self.run([*MODEL[name], *RUN, "--out", str(self.home), "--max-steps", "2"])
        self.state = torch.load(self.home / "last.pt", weights_only=True)
        self.bytes = (self.home / "last.pt").read_bytes()

    def run(self, argv):
        sys.argv = [f"{self.name}.py", *argv]
        exec(self.start, vars(self.module) | {"__name__": "__main__"})


# ---- damage
def damage(rng, data):
    """Bytes of a file, cut, flipped, overwritten or something else: (what, bytes)."""
    kind = rng.choice(["empty", "cut", "flip", "flip", "hole", "garbage", "pickle", "text", "npz", "double"])
    n, where = len(data), rng.randrange(len(data))
    if kind == "cut":
        return kind, data[:where]
    if kind == "flip":
        return kind, data[:where] + bytes([data[where] ^ 1 << rng.randrange(8)]) + data[where + 1 :]
    if kind == "hole":
        return kind, data[:where] + bytes(min(1000, n - where)) + data[where + 1000 :]
    if kind == "pickle":
        return kind, pickle.dumps(rng.choice([[], {"model": Path("x")}, 7, print, {"args": {}}]), rng.choice([2, 4]))
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    rest = {"empty": b"", "garbage": rng.randbytes(2000), "text": b"hello\n", "npz": file.getvalue()}
    return kind, rest.get(kind, data * 2)


def odd_tensor(rng, t):
    """Another tensor in the place of t: shape, type, layout, values."""
    kinds = "shape less more scalar none double int complex bool nan inf big"
    if (kind := rng.choice(kinds.split())) == "big":  # a few bytes in the file, and more than any memory
        return torch.zeros(1).expand(10**6, 10**6)
    return {"shape": lambda: t.flatten()[None], "less": lambda: t.flatten()[:-1], "more": lambda: torch.stack([t, t]),
            "scalar": lambda: torch.tensor(1.0), "none": lambda: t.flatten()[:0], "double": t.double, "int": t.int,
            "complex": lambda: t.to(torch.complex64), "bool": t.bool, "nan": lambda: torch.full_like(t, torch.nan),
            "inf": lambda: torch.full_like(t, torch.inf)}[kind]()  # fmt: skip


def odd_entry(rng, table):
    """Change, drop, rename or add one entry of a dict."""
    key, kind = rng.choice([*table]), rng.choice(["set", "set", "set", "drop", "rename", "add"])
    value = table[key]
    if kind in ("drop", "rename"):
        del table[key]
    if kind == "set":
        odd = isinstance(value, torch.Tensor) and value.is_floating_point() and rng.random() < 0.8
        table[key] = odd_tensor(rng, value) if odd else rng.choice(ODD)
    if kind in ("rename", "add"):
        table[rng.choice(["x", "", "self", 7, f"{key}.x", "net.x"])] = value
    return f"{kind} {key}"


# ---- cases: each gives argv and the statuses that are right, and may give a check of what a run with status 0 left
def resume_args(rng, script, here):
    """last.pt with another value, key or type among its args."""
    state = copy.deepcopy(script.state)
    if (dice := rng.random()) < 0.1:
        state["args"] = rng.choice(ODD)
    elif dice < 0.2:  # a large network that the file does not hold
        key, sizes = ("backbone", "BACKBONES") if script.name == "train_unet" else ("size", "SIZES")
        state["args"][key] = [*vars(script.module)[sizes]][-1 if key == "size" else 1]
    else:
        odd_entry(rng, state["args"])
    return resume(script, here, state)


def resume_top(rng, script, here):
    """last.pt with another value among the top entries."""
    state = copy.deepcopy(script.state)
    odd_entry(rng, state)
    return resume(script, here, rng.choice([state] * 9 + [rng.choice(ODD)]))


def resume_tensors(rng, script, here):
    """last.pt with other tensors of the network, its average or the heads."""
    state = copy.deepcopy(script.state)
    odd_entry(rng, state[rng.choice(["objective", "average", "ema"])])
    return resume(script, here, state, (0, 1, 2))


def resume_optimizer(rng, script, here):
    """last.pt with other moments, steps, groups of the optimiser, or a scaler that the run has not."""
    state = copy.deepcopy(script.state)
    adam, kind = state["optimizer"], rng.choice(["moment", "moment", "moment", "state", "group", "top", "scaler"])
    if kind == "moment":
        odd_entry(rng, adam["state"][rng.choice([*adam["state"]])])
    elif kind == "scaler":
        state["scaler"] = {"scale": 1.0, "growth_factor": 2.0} if rng.random() < 0.5 else rng.choice(ODD)
    else:
        odd_entry(rng, {"state": adam["state"], "group": adam["param_groups"][0], "top": adam}[kind])
    return resume(script, here, state, (0, 1, 2))


def resume(script, here, state, allowed=(0, 2)):
    shutil.copytree(script.home, here / "run")
    torch.save(state, here / "run/last.pt")
    return ["--out", "run", "--resume", "--max-steps", "3", "--no-compile"], allowed


def resume_file(rng, script, here):
    """last.pt cut, flipped or replaced: never taken for a run, unless only the end of the archive moved."""
    shutil.copytree(script.home, here / "run")
    kind, data = damage(rng, script.bytes)
    (here / "run/last.pt").write_bytes(data)
    return ["--out", "run", "--resume", "--max-steps", "3"], (0, 2) if kind in ("flip", "hole", "double") else (2,)


def flipped_weights(rng, script, here):
    """One bit of a stored tensor: the archive's checksum knows."""
    shutil.copytree(script.home, here / "run")
    tensor = rng.choice([t for t in script.state["objective"].values() if t.numel() > 99])
    where = script.bytes.index(bytes(tensor.untyped_storage())) + rng.randrange(4 * tensor.numel())
    data = bytearray(script.bytes)
    data[where] ^= 1 << rng.randrange(8)
    name = rng.choice(["last.pt", "w.pt"])
    (here / "run" / name).write_bytes(data)
    if name == "last.pt":
        return ["--out", "run", "--resume", "--max-steps", "3"], (2,)
    return [*MODEL[script.name], "--out", "other", "--init", "run/w.pt", "--max-steps", "0"], (2,)


def for_people(rng, script, here):
    """args.json or metrics.jsonl cut, damaged or gone: the truth is in last.pt, so a run goes on."""
    shutil.copytree(script.home, here / "run")
    path = here / "run" / rng.choice(["args.json", "metrics.jsonl"])
    data = damage(rng, path.read_bytes())[1]
    path.unlink()
    if rng.random() < 0.9:
        path.write_bytes(data)

    def check():
        assert torch.load(here / "run/last.pt", weights_only=True)["step"] == 3
        assert json.loads((here / "run/args.json").read_text())["max_steps"] == 3
        assert json.loads((here / "run/metrics.jsonl").read_text(errors="replace").splitlines()[-1])["step"] == 3

    return ["--out", "run", "--resume", "--max-steps", "3"], (0,), check


def init(rng, script, here):
    """--init: other tensors, prefixes, wrappers, damage. NaN and infinity are no weights."""
    state, kind = copy.deepcopy(script.state["ema"]), rng.choice(["entry", "entry", "nan", "prefix", "file", "odd"])
    allowed = {"nan": (2,), "prefix": (0,), "file": (0, 2), "odd": (2,)}.get(kind, (0, 1, 2))
    if kind == "nan":
        key = rng.choice([k for k, v in state.items() if v.is_floating_point()])
        state[key] = state[key].contiguous()
        state[key].view(-1)[rng.randrange(state[key].numel())] = rng.choice([torch.nan, torch.inf])
    if kind == "entry":
        odd_entry(rng, state)
    if kind == "prefix":
        prefix = rng.choice(["module.", "_orig_mod.", "net.", "module._orig_mod.", "a.b."])
        state = {f"{prefix}{k}": v for k, v in state.items()}
        state = rng.choice([state, {"state_dict": state}, {"model": {}, "ema": state, "step": 3}])
    torch.save(rng.choice(ODD) if kind == "odd" else state, here / "w.pt")
    if kind == "file":
        what, data = damage(rng, (here / "w.pt").read_bytes())
        (here / "w.pt").write_bytes(data)
        allowed = (0, 2) if what in ("flip", "hole", "double") else (2,)
    steps = rng.choice(["0", "1"])
    return [*MODEL[script.name], *RUN, "--out", "run", "--init", "w.pt", "--max-steps", steps], allowed


def draw(rng, path, size=(16, 16), mode="RGB", **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    (image if mode == "RGB" else image.convert("L") if mode == "I;16" else image.convert(mode)).save(path, **kw)


def folder(rng, root):
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2"):
        draw(rng, root / "pics/train" / f"{name}.png")
    return root / "pics/train"


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def odd_folder(rng, script, here):
    """Class folders with what users, editors and systems leave in them."""
    train, side, batch, want = folder(rng, here), "16", "4", (0, 2)
    file = train / rng.choice("ab") / rng.choice(["9.png", "0.png", "x y.png", "é.png"])
    harmless = "dot notebook mac mode alpha exif cmyk one beside bytes capital tif moving".split()
    others = "dangling loop fifo inside text zero cut flip 16-bit long bomb empty no-class no-train flat newline"
    kind = rng.choice(harmless + others.split())
    if kind == "dot":
        (train / "a/.DS_Store").write_bytes(rng.randbytes(99))
        (train / ".DS_Store").write_bytes(rng.randbytes(99))
    elif kind == "notebook":
        (train / ".ipynb_checkpoints").mkdir()
        if rng.random() < 0.5:
            draw(rng, train / ".ipynb_checkpoints/0.png")
    elif kind == "mac":
        file.with_name("._0.png").write_bytes(rng.randbytes(99))
    elif kind in ("dangling", "loop"):
        file.unlink(missing_ok=True)
        file.symlink_to("nowhere" if kind == "dangling" else file)
    elif kind == "fifo":
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    elif kind == "inside":
        draw(rng, file.with_name("deeper.png") / "1.png")
    elif kind in ("text", "zero"):
        file.write_bytes(b"I am not an image" * (kind == "text"))
    elif kind in ("cut", "flip"):
        data = bytearray((train / "a/0.png").read_bytes())
        n = rng.randrange(len(data))
        data[n] ^= 1 << rng.randrange(8)
        file.write_bytes(data[:n] if kind == "cut" else data)
    elif kind == "mode":
        draw(rng, file, mode=rng.choice(["1", "L", "LA", "P"]))
    elif kind == "16-bit":
        Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(file)
    elif kind == "alpha":
        draw(rng, file, mode="RGBA")
    elif kind in ("exif", "cmyk"):
        draw(rng, file.with_suffix(".jpg"), (20, 16), "RGB" if kind == "exif" else "CMYK", exif=exif(rng.randint(0, 9)))
    elif kind == "long":  # more than the images, so that it ends once they are read
        draw(rng, file, rng.choice([(20000, 1), (1, 20000)]))
        side, batch = "256", "1024"
    elif kind == "bomb":
        Image.new("1", rng.choice([(12000, 12000), (20000, 20000)])).save(file)
    elif kind == "one":
        draw(rng, file, rng.choice([(1, 1), (1, 2), (3, 1)]))
    elif kind == "empty":
        (train / "c").mkdir()
        want = (2,)
    elif kind in ("no-class", "no-train"):
        shutil.rmtree(train)
        train.mkdir() if kind == "no-class" else train.write_text("x")
        want = (2,)
    elif kind == "flat":
        for name in "ab":
            shutil.move(train / name / "0.png", train / f"{name}.png")
            shutil.rmtree(train / name)
    elif kind == "beside":
        draw(rng, train / "0.png")
    elif kind == "newline":
        (train / "a/1\n2.png").write_text(rng.choice(["x", ""]))
    elif kind == "bytes":
        shutil.copy(train / "a/0.png", os.fsencode(train) + b"/b/\xff\xfe.png")
    elif kind == "capital":
        shutil.move(train / "a/0.png", train / "a/0.PNG")
    elif kind == "tif":
        draw(rng, file.with_suffix(".tif"))
    elif kind == "moving":
        file.with_suffix(".webp").unlink(missing_ok=True)
        frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
        frames[0].save(file.with_suffix(".webp"), save_all=True, append_images=frames[1:])
    if kind in harmless:
        want = (0,)

    def check():
        classes = json.loads((here / "run/metrics.jsonl").read_text().splitlines()[0])["args"]["classes"]
        assert kind == "flat" or classes == ["a", "b"], classes

    flags = ["--data", ".", "--dataset", "pics", "--resolution", side, "--batch", batch, "--max-steps", "1"]
    return [*MODEL[script.name], *flags, "--epochs", "1", "--out", "run"], want, check


def cached_images(rng, script, here):
    """A damaged .cache/*.npy is made anew: it is nobody's work. (Flipped pixels are pixels.)"""
    train = folder(rng, here)
    with open(os.devnull, "w") as sys.stderr:
        right = script.module.read_folder(here / "pics", "train", 16)[0].clone()
    sys.stderr = sys.__stderr__
    (cache,) = (train.parent / ".cache").iterdir()
    data, kind = cache.read_bytes(), rng.choice(["any", "any", "shape", "type", "object", "header", "folder", "tmp"])
    if kind == "any":
        kind, data = damage(rng, data)
        cache.write_bytes(data)
    elif kind == "header":
        n = rng.randrange(128)
        cache.write_bytes(data[:n] + rng.randbytes(1) + data[n + 1 :])
    elif kind == "folder":
        cache.unlink()
        cache.mkdir()
    elif kind == "tmp":
        cache.rename(f"{cache}.1.tmp")
    else:
        other = {"shape": np.zeros((3, 3, 16, 16), np.uint8), "type": np.zeros((6, 3, 16, 16))}
        np.save(cache, other.get(kind, np.array([{}, 1])))

    def check():
        found = script.module.read_folder(here / "pics", "train", 16)[0]
        assert kind in ("flip", "hole", "header") or found.equal(right)

    flags = ["--data", ".", "--dataset", "pics", "--resolution", "16", "--batch", "4", "--max-steps", "1"]
    return [*MODEL[script.name], *flags, "--epochs", "1", "--out", "run"], (0, 2) if kind == "folder" else (0,), check


def make_latents(script, home):
    """Class folders, a random VA-VAE and a finished cache."""
    rng = random.Random(0)
    for split in ("train", "test"):
        for i in range(6):
            draw(rng, home / "pics" / split / "ab"[i % 2] / f"{i}.png", (32, 32))
    torch.save({"state_dict": script.module.VAE(32, 4).state_dict()}, home / "vae.pt")
    os.chdir(home)
    script.run([*MODEL["train_dit"], *latent_flags("lat"), "--vae", "vae.pt", "--max-steps", "1"])


def latent_flags(name):
    return ["--data", ".", "--dataset", "pics", "--resolution", "32", "--batch", "4", "--epochs", "1", "--cond",
            "--cache-latents", name, "--out", "run"]  # fmt: skip


def latents(rng, script, here):
    """A cache of latents with damaged meta.json, arrays, labels; or one that was begun, with damaged parts."""
    for path in (script.home.parent / "latents").iterdir():
        if path.name == "lat":
            shutil.copytree(path, here / "lat")
        elif path.name != "run":
            (here / path.name).symlink_to(path)
    lat, extra, kind = here / "lat", [], rng.choice(["meta", "meta", "array", "file", "begun", "vae"])
    meta = json.loads((lat / "meta.json").read_text())
    if kind == "meta":
        odd = [v for v in ODD if not isinstance(v, torch.Tensor)]
        odd += [[v] * 4 for v in (float("nan"), "a", [1.0], 1e30, 0.0)]
        key = rng.choice([*meta])
        meta[key] = rng.choice(odd)
        (lat / "meta.json").write_text(json.dumps(meta))
    elif kind == "array":
        path = lat / rng.choice(["train.npy", "train.labels.npy", "test.npy"])
        a = np.load(path)
        odd = [a[:-1], a[:0], a.astype(np.float64), a.astype(np.int8), a.ravel(), a[None], a * 0 - 7, a * 0 + 99,
               np.array([{}]), np.zeros(3, "M8[s]"), np.array(["a"])]  # fmt: skip
        np.save(path, rng.choice(odd if "labels" in path.name else odd[:6] + odd[8:]))
    elif kind == "file":
        path = rng.choice(sorted(lat.glob("[!.]*")))
        data = damage(rng, path.read_bytes())[1]
        path.unlink()
        if rng.random() < 0.8:
            path.write_bytes(data)
    elif kind == "begun":
        (lat / "train.npy").rename(lat / "train.part.npy")
        np.save(lat / "train.done.npy", np.zeros(1, np.uint8))
        path = lat / rng.choice(["train.part.npy", "train.done.npy", "train.labels.npy", "meta.json"])
        if rng.random() < 0.3:
            odd = [np.zeros(1, np.float16), np.zeros((2, 2)), np.array([{}]), np.ones(40, np.uint8)]
            np.save(path, rng.choice(odd))
        else:
            path.write_bytes(damage(rng, path.read_bytes())[1])
        extra = ["--vae", "vae.pt"]
    else:
        shutil.rmtree(lat)
        state = torch.load(here / "vae.pt", weights_only=True)["state_dict"]
        odd_entry(rng, state)
        (here / "vae.pt").unlink()
        torch.save({"state_dict": state}, here / "vae.pt")
        extra = ["--vae", "vae.pt"]
    return [*MODEL[script.name], *latent_flags("lat"), *extra, "--max-steps", "1"], (0, 1, 2)


def flags(rng, script, here):
    """Numbers that are none, or too many, in one or two flags."""
    known = ["--aug", "--cl", "--cl-t", "--label-drop", "--cond", "--resolution", "--epochs", "--batch", "--accum",
             "--lr", "--ema", "--seed", "--save-every", "--max-steps", "--patch"]  # fmt: skip
    absent = {"train_unet": ("--label-drop", "--cond", "--patch"), "train_uvit": ("--patch",),
              "train_dit": ("--aug", "--label-drop")}  # fmt: skip
    known = [flag for flag in known if flag not in absent[script.name]]
    picked = rng.sample(known, rng.choice([1, 1, 2]))
    given = [part for flag in picked for part in (flag, rng.choice(NUMBERS))]
    steps = [] if "--max-steps" in picked else ["--max-steps", rng.choice("011")]
    base = ["--dataset", "shapes", "--batch", "8", "--epochs", "1", "--out", "run"]
    return [*MODEL[script.name], *base, *steps, *given], (0, 1, 2)


def special_flags(rng, script, here):
    """Mistakes with a name."""
    (here / "file").write_text("x")
    (here / "folder").mkdir()
    folder(rng, here)
    torch.save(script.state, here / "full.pt")
    cases = [
        (["--device", "gpu"], 2), (["--device", "mps"], 2), (["--device", "cuda"], 2), (["--out", "file"], 2),
        (["--out", "file/x"], 2), (["--out", "/proc/nowhere/x"], 2), (["--out", "/dev/full"], 2), (["--out", ""], 0),
        (["--batch", "1", "--cl", "0.01"], 2), (["--cl", "nan"], 2), (["--cl", "inf"], 2), (["--lr", "inf"], 2),
        (["--dataset", "../x"], 2), (["--dataset", "a/b"], 2), (["--dataset", ""], 2), (["--dataset", "."], 2),
        (["--dataset", "/"], 2), (["--dataset", "x" * 300], 2), (["--data", "file", "--dataset", "pics"], 2),
        (["--data", "/dev/null", "--dataset", "cifar10"], 2), (["--init", "folder"], 2), (["--init", "/dev/null"], 2),
        (["--init", ""], (0, 2)), (["--init", "full.pt"], (0, 2)), (["--resume"], 2),
        (["--resume", "--out", "folder"], 2), (["--resume", "--out", "file"], 2), (["--layer", ""], (0, 2)),
        (["--layer", "out_99"], 2), (["--amp", "fp8"], 2),
        (["--nonsense"], 2), (["extra"], 2), (["--dataset", "pics", "--data", ".", "--resolution", "16"], 0),
        (["--dataset", "../pics", "--data", "folder", "--resolution", "16"], (0, 2)),
        (["--dataset", "./pics", "--data", ".", "--resolution", "16"], (0, 2)),
        (["--max-steps", "0", "--out", "file"], 2), (["--max-steps", "0", "--batch", "99999999999999"], (0, 2)),
    ]  # fmt: skip
    if script.name == "train_dit":
        cases += [(["--vae", "file"], 2), (["--cache-latents", "file", "--vae", "full.pt"], 2),
                  (["--cache-latents", "folder"], 2), (["--cache-latents", "new", "--vae", "folder"], 2),
                  (["--cache-latents", "new", "--vae", "full.pt", "--latent-stats", "full.pt"], 2)]  # fmt: skip
    given, allowed = rng.choice(cases)

    def check():  # a run that names itself is below runs/
        assert all(p.is_relative_to(here / "runs") or "--out" in given for p in here.parent.rglob("last.pt")), given

    argv = [*MODEL[script.name], "--dataset", "shapes", "--batch", "4", "--epochs", "1", "--max-steps", "1", *given]
    return argv, allowed if isinstance(allowed, tuple) else (allowed,), check


KINDS = [resume_args, resume_args, resume_top, resume_tensors, resume_optimizer, resume_optimizer, resume_file,
         flipped_weights, for_people, init, init, odd_folder, odd_folder, cached_images, latents, flags, flags,
         special_flags]  # fmt: skip


# ---- the campaign
def case(i, scripts, home):
    """Run case i in a process of its own, forked from one that has imported all: how it ended, and what was wrong."""
    kind, rng = KINDS[i % len(KINDS)], random.Random(i)
    script = scripts["train_dit" if kind is latents else NAMES[i // len(KINDS) % 3]]
    here, start = home / f"case{i}" / "cwd", time.time()
    here.mkdir(parents=True)
    child = os.fork()
    if not child:
        status = 99
        try:
            signal.alarm(SECONDS)
            os.chdir(here)
            argv, allowed, *check = kind(rng, script, here)
            (here.parent / "about").write_text(json.dumps([argv, allowed]))
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(here.parent / name, os.O_WRONLY | os.O_CREAT), number)
            status = 1
            script.run(argv)
            status = 0
            if check:
                check[0]()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    status, seconds, megabytes = os.waitstatus_to_exitcode(status), time.time() - start, usage.ru_maxrss / 1024
    about, stderr = (here.parent / name for name in ("about", "stderr"))
    argv, allowed = json.loads(about.read_text()) if about.is_file() else ([], [])
    said = stderr.read_bytes().decode(errors="replace") if stderr.is_file() else ""
    shutil.rmtree(here.parent)
    wrong = judge(status, said, allowed)
    if seconds > SECONDS or megabytes > MEGABYTES:
        wrong = f"{seconds:.0f} s, {megabytes:.0f} MB"
    what = {"case": i, "kind": kind.__name__, "script": script.name, "argv": argv, "status": status, "wrong": wrong}
    return what | {"said": said[-3000:], "seconds": round(seconds, 1), "megabytes": round(megabytes)}


def judge(status, said, allowed):
    """What is wrong with how a script ended, or None: status, and one line that says why."""
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+(%\||step|img|block)", line)]  # a bar's
    errors = [line for line in lines if re.match(r"(train_\w+\.py: )?error: .", line)]
    if "Traceback" in said:
        return "traceback"
    if status not in allowed:
        return f"status {status}, not {allowed}"
    usage = said.lstrip().startswith("usage: ")  # argparse puts its usage before
    if status and (len(errors) != 1 or lines[-1] != errors[0] or not usage and len(lines) > 1):
        return "not one line"
    if status == 1 and "diverged" not in errors[0]:
        return "status 1 without divergence"
    return None


def campaign(first, last):
    """Cases first to last - 1, reports as lines of JSON on stdout."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.fsync = lambda file: None
    with tempfile.TemporaryDirectory() as tmp, open(os.devnull, "w") as null:
        home, stdout = Path(tmp), sys.stdout
        (home / "latents").mkdir()
        sys.stdout = sys.stderr = null
        scripts = {name: Script(name, home) for name in NAMES}
        make_latents(scripts["train_dit"], home / "latents")
        sys.stdout, sys.stderr = stdout, sys.__stderr__
        gc.freeze()  # fewer pages to copy
        size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (size + (6 << 30), resource.RLIM_INFINITY))
        for i in range(first, last):
            print(json.dumps(case(i, scripts, home)), flush=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fuzz():
    n = int(os.environ.get("DDAE_FUZZ", 300))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, __file__, "0", str(n)], env=env | {"PYTHONPATH": path}, capture_output=True)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(cases) == n, done.stderr.decode()[-2000:]
    bad = [c for c in cases if c["wrong"]]
    told = [f"{c['case']} {c['kind']} {c['script']} {c['argv']}: {c['wrong']}: {c['said'][-300:]!r}" for c in bad]
    assert not bad, f"{len(bad)} of {n}:\n" + "\n".join(told[:20])
    ends = [c["status"] for c in cases]
    assert min(ends.count(0), ends.count(2)) > n / 10  # the mutations are neither harmless nor all fatal


if __name__ == "__main__":
    campaign(*map(int, sys.argv[1:]))
