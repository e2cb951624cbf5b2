"""Shared by all tests: the golden fixtures and their regenerated weights."""

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
