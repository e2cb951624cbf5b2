"""Shared by all tests: the golden fixtures and their regenerated weights."""

import importlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny networks gain nothing from more


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
        """Assert that value agrees with outputs[name] within the fixture's tolerance (longest matching prefix)."""
        want = torch.as_tensor(self.outputs[name] if want is None else want, dtype=torch.float64)
        value = torch.as_tensor(value).detach().to(torch.float64)
        assert value.shape == want.shape, f"{name}: {tuple(value.shape)}, want {tuple(want.shape)}"
        tolerance = self.tolerance[max((p for p in self.tolerance if name.startswith(p)), key=len)]
        error = (value - want).abs().max().item() / max(1.0, want.abs().max().item())
        assert error <= tolerance, f"{name}: error {error:.2e} above {tolerance:.0e}"


@pytest.fixture
def golden():
    return Golden


@pytest.fixture(scope="module")
def fewer_shapes():
    """64 images instead of 10 000 in every train script of this process, so that an epoch of batch 8 is 8 steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_unet", "train_uvit", "train_dit"):
            script = importlib.import_module(name)
            patch.setattr(script, "draw_shapes", lambda n, seed, draw=script.draw_shapes: draw(64, seed))
        yield


def metrics(out):
    """The lines of a run's metrics.jsonl after its header."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]


def load(out, name="last.pt"):
    """A checkpoint of a run."""
    return torch.load(out / name, weights_only=True)


def launch(n, script, *flags):
    """A script in a process of its own, or under torchrun with n gloo ranks; it must end with status 0."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    command, env = [sys.executable, *ranks, str(ROOT / script), *flags], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def check_equal_steps(a, b, rel):
    """Runs a and b, one rank and several, logged the same; the std of the queries is of a rank's own."""
    for one, two in zip(metrics(a), metrics(b), strict=True):
        for key in one.keys() - {"img_per_s", "cl_std"}:
            assert one[key] == pytest.approx(two[key], rel=rel, abs=1e-5), (one["step"], key)


def check_resumed(a, b, whole, parts):
    """Run b, stopped and resumed, equals the unbroken run a bit for bit, in weights and in what it logged."""
    first, second = load(a), load(b)
    for key in ("model", "ema", "head", "ema_projector"):
        assert all(first[key][k].equal(v) for k, v in second[key].items()), key
    for line in whole + parts:
        line.pop("img_per_s")
    assert whole == parts
