"""The README's table of the small study, from tests/results/study.json: python tests/study.py

Two runs of one seed see the same images, noise and order, so each row is a mean of paired differences over seeds, with
its 95 % interval (Student's t). Accuracies are of the mean token or pixel ("gap"), in percent of the test images.
"""

import json
import math
import statistics
from pathlib import Path

from scipy.stats import t

RUNS = json.loads((Path(__file__).parent / "results" / "study.json").read_text())
ROWS = [  # part, baseline, variant, layer that conditions or is contrasted, how the README calls it, the nearest row of
    # the paper: CIFAR-100 with EDM and ddpm (add: CIFAR-10, ddpmpp), CIFAR-100 with UViT-S, ImageNet-100 with DiT-B
    ("unet", "baseline", "selfcond", "out_2", "UNet, `--self-cond`", 65.35 - 63.68),
    ("unet", "baseline", "selfcond-add", "out_2", "UNet, `--self-cond add`", 94.85 - 94.83),
    ("unet", "baseline", "selfcond-cl", "out_2", "UNet, `--self-cond --cl 0.01`", 69.50 - 63.68),
    ("uvit", "baseline", "cls", "out_2", "U-ViT, `--cls-token`", 72.04 - 70.66),
    ("uvit", "baseline", "cls-cl", "out_2", "U-ViT, `--cls-token --cl 0.01`", 74.48 - 70.66),
    ("dit", "uncond", "uncond-selfcond", "4", "DiT, `--self-cond`", 84.86 - 83.78),
    ("dit", "cond", "cond-selfcond", "4", "DiT, `--cond --self-cond`", 83.24 - 83.08),
]
MEASURES = {  # of a run, its layer and its baseline
    "linear, best block": lambda run, layer, base: max(cell[2] for cell in gap(run)),
    "linear": lambda run, layer, base: next(cell[2] for cell in gap(run) if cell[1] == layer),
    "20-NN": lambda run, layer, base: next(cell[3] for cell in gap(run) if cell[1] == layer),
    "held-out loss, %": lambda run, layer, base: 100 * statistics.mean(map(relative, run["loss"], base["loss"])),
}

def gap(run):
    """The run's cells [pool, layer, linear, knn] of the mean."""
    return [cell for cell in run["cells"] if cell[0] == "gap"]

def relative(loss, other):
    return loss / other - 1

def interval(differences):
    """Mean, and half the width of its 95 % interval."""
    n = len(differences)
    half = t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return statistics.mean(differences), half

def table():
    """Markdown, a row per variant: its difference from the baseline, with half of the 95 % interval."""
    lines = ["| against its baseline | seeds | " + " | ".join(MEASURES) + " | paper: linear |"]
    lines += ["|---" * (3 + len(MEASURES)) + "|"]
    for part, baseline, variant, layer, name, paper in ROWS:
        runs = {(run["variant"], run["seed"]): run for run in RUNS if run["part"] == part}
        seeds = [seed for kind, seed in sorted(runs) if kind == variant and (baseline, seed) in runs]
        cells = []
        for value in MEASURES.values():
            differences = []
            for seed in seeds:
                base = runs[baseline, seed]
                differences.append(value(runs[variant, seed], layer, base) - value(base, layer, base))
            mean, half = interval(differences)
            cells.append(f"{mean:+.2f} ± {half:.2f}")
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + f" | {paper:+.2f} |")
    return "\n".join(lines)

if __name__ == "__main__":
    print(table())
