"""Shared by all tests: the golden fixtures and their regenerated weights."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # as the scripts, which may be imported too late

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
FLOAT32 = 5e-5  # the largest difference seen is 1.0e-5 here, and 7.4e-6 on a processor with AMX where it is 0 here
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny networks gain nothing from more
torch.cpu.get_capabilities = dict  # --amp auto is float32 here, whatever this processor can

def draw(name, shape, salt, gain):
    """The weight that belongs to a tensor name, as the golden data defines it: a seeded draw scaled by kind."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{salt}/{name}".encode()))
    if name.endswith("running_var"):
        return 0.75 + 0.5 * torch.rand(shape, generator=generator)
    normal = torch.randn(shape, generator=generator)
    if name.endswith("running_mean"):
        return 0.1 * normal
    if len(shape) >= 2:
        return gain * normal / (normal.numel() / shape[0]) ** 0.5
    return 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal

class Golden:
    """One fixture: f.inputs, f.outputs, f.config, f.weights() and f.check(name, value)."""

    def __init__(self, name):
        self.__dict__.update(torch.load(ROOT / "tests" / "golden" / f"{name}.pt", weights_only=True))

    def weights(self):
        """State dict under the official names."""
        names = [n for n in self.shapes if n not in self.kept and not n.endswith("num_batches_tracked")]
        return {n: draw(n, tuple(self.shapes[n]), self.salt, self.gain) for n in names}

    def check(self, name, value, want=None):
        """Assert that value agrees with outputs[name] within the fixture's tolerance (longest matching prefix).

        That of float32 is at least FLOAT32: other processors sum in another order.
        """
        want = torch.as_tensor(self.outputs[name] if want is None else want, dtype=torch.float64)
        tolerance = self.tolerance[max((p for p in self.tolerance if name.startswith(p)), key=len)]
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            tolerance = max(tolerance, FLOAT32)
        value = torch.as_tensor(value).detach().to(torch.float64)
        assert value.shape == want.shape, f"{name}: {tuple(value.shape)}, want {tuple(want.shape)}"
        error = (value - want).abs().max().item() / max(1.0, want.abs().max().item())
        assert error <= tolerance, f"{name}: error {error:.2e} above {tolerance:.0e}"

@pytest.fixture
def golden():
    return Golden

@pytest.fixture(autouse=True)
def exact_float32():
    """The tools allow matrix products of lower precision, for the whole process: not beyond the test that ran them."""
    yield
    torch.set_float32_matmul_precision("highest")

# ---- data, checkpoints, and scripts run in this process
def make_folder(root, name="mine", splits=("train", "test"), classes=("cat", "dog"), n=3, size=(8, 8), suffix=".png"):
    """A data set of random images (width, height): root/name/<split>/<class>/<i>.png."""
    rng = np.random.RandomState(0)
    for split in splits:
        for label in classes:
            folder = root / name / split / label
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}{suffix}")

def make_checkpoint(path, script, *flags, seed=0, shake=0.0, gain=1.0, epoch=3, step=9, classes=None):
    """An untrained network as a run would leave it; normal noise of std `shake` wakes what starts at zero."""
    args = script.parse_args(list(map(str, flags)))
    args.classes = classes or script.SHAPES
    torch.manual_seed(seed)
    weights = script.build(args)[0].state_dict()
    weights = {name: gain * (value + shake * torch.randn_like(value)) for name, value in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"script": script.__name__, "args": vars(args), "ema": weights, "epoch": epoch, "step": step}
    torch.save(state, path)
    return path

def run(script, *flags):
    """What a script's main returns, as the command line runs it but in this process, on the CPU."""
    args = script.parse_args([*map(str, flags), "--device", "cpu"])
    if script.__name__.startswith("train_"):
        return script.main(args)
    return importlib.import_module("sample").run_tool(script.main, args)

def refused(capsys, call, *given):
    """The one line of an error that call(*given) must end with: exit status 2, or a UserError that would become it."""
    with pytest.raises((SystemExit, importlib.import_module("sample").UserError)) as stop:
        call(*given)
    if stop.type is not SystemExit:
        return str(stop.value)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]

def spy(patch, owner, name, note):
    """Tell note what owner.name is called with."""
    call = getattr(owner, name)

    def told(*given, **named):
        note(*given, **named)
        return call(*given, **named)

    patch.setattr(owner, name, told)

def shrink(script):
    """What makes a train script's runs short: 64 shapes, 8 steps of batch 8; no samples; and each step has its line."""
    draw = script.draw_shapes
    return {"draw_shapes": lambda n, *rest: draw(64, *rest), "save_grid": lambda *_: None, "LOG_EVERY": 1}

@pytest.fixture(scope="module")
def fewer_shapes():
    """All train scripts of this process, shrunk."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_unet", "train_uvit", "train_dit"):
            script = importlib.import_module(name)
            for key, value in shrink(script).items():
                patch.setattr(script, key, value)
        yield

def metrics(out):
    """The lines of a run's metrics.jsonl, but those that say what was run: the first, and one of each resume."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "args" not in line]

def load(out, name="last.pt"):
    """A checkpoint of a run; what last.pt holds as two modules, trained and averaged, also part by part."""
    state = torch.load(out / name, map_location="cpu", weights_only=True)
    parts = {"model": "objective.net.", "diffusion": "objective.diffusion.", "head": "objective.head.",
             "ema_projector": "average.head.projector."}  # fmt: skip
    for part, prefix in parts.items() if "objective" in state else ():
        module, prefix = prefix.split(".", 1)
        state[part] = {k.removeprefix(prefix): v for k, v in state[module].items() if k.startswith(prefix)}
    return state

def launch(n, script, *flags):
    """A script in a process of its own, or under torchrun with n gloo ranks; it must end with status 0.

    Train scripts are shrunk as by fewer_shapes: a line of Python in front of their main does it on every rank.
    """
    program = [str(ROOT / script)]
    if script.startswith("train_"):
        start = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import conftest"
        rest = "vars(s).update(conftest.shrink(s)); s.main(s.parse_args())"
        program = ["-c", f"{start}; import {Path(script).stem} as s; {rest}"]
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--no-python", sys.executable]
    command, env = [sys.executable, *(ranks if n > 1 else []), *program, *flags], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done

def check_equal_steps(a, b, rel):
    """Runs a and b, one rank and several, logged the same."""
    for one, two in zip(metrics(a), metrics(b), strict=True):
        for key in one.keys() - {"img_per_s"}:
            assert one[key] == pytest.approx(two[key], rel=rel, abs=1e-5), (one["step"], key)

def distance(script, a, b):
    """How far apart the weights of runs a and b ended, relative to how far a has moved from its start."""
    args, one, two = argparse.Namespace(**load(a)["args"]), load(a)["model"], load(b)["model"]
    torch.manual_seed(args.seed)
    start = script.build(args)[0].state_dict()
    apart, moved = (sum((one[k] - other[k]).square().sum() for k in one) for other in (two, start))
    return (apart / moved).sqrt().item()

def check_same(x, y, where):
    """Two states made of dicts, lists, tensors and numbers agree bit for bit."""
    assert type(x) is type(y), where
    if isinstance(x, dict | list):
        assert len(x) == len(y) and (isinstance(x, list) or x.keys() == y.keys()), where
        for k in x if isinstance(x, dict) else range(len(x)):
            check_same(x[k], y[k], f"{where}.{k}")
    else:
        assert x.equal(y) if isinstance(x, torch.Tensor) else x == y, where

def check_resumed(a, b, whole, parts):
    """Run b, stopped and resumed, equals the unbroken run a bit for bit, in its whole state and in what it logged."""
    check_same(*({k: v for k, v in load(run).items() if k != "args"} for run in (a, b)), "last.pt")
    for line in whole + parts:
        line.pop("img_per_s")
    assert whole and whole == parts
