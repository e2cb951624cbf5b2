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
    "best linear": lambda run, layer, base: max(cell[2] for cell in gap(run)),
    "linear": lambda run, layer, base: next(cell[2] for cell in gap(run) if cell[1] == layer),
    "kNN": lambda run, layer, base: next(cell[3] for cell in gap(run) if cell[1] == layer),
    "held-out loss": lambda run, layer, base: 100 * statistics.mean(map(relative, run["loss"], base["loss"])),
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
    """Markdown, a row per variant."""
    lines = ["| against its baseline | paper, linear | seeds | " + " | ".join(MEASURES) + ", % |"]
    lines += ["|---" * (3 + len(MEASURES)) + "|"]
    for part, baseline, variant, layer, name, paper in ROWS:
        runs = {(r["variant"], r["seed"]): r for r in RUNS if r["part"] == part}
        seeds = [seed for kind, seed in sorted(runs) if kind == variant and (baseline, seed) in runs]
        pairs = [(runs[variant, seed], runs[baseline, seed]) for seed in seeds]
        cells = []
        for measure, value in MEASURES.items():
            ours, theirs = ([value(pair[k], layer, pair[1]) for pair in pairs] for k in (0, 1))
            mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            spread = f" ({statistics.stdev(theirs):.1f})" if len(theirs) > 1 else ""
            start = "" if measure == "held-out loss" else f"{statistics.mean(theirs):.1f}{spread} "
            cells.append(f"{start}{mean:+.2f}" + f" ± {half:.2f}" * (len(pairs) > 1))
        lines.append(f"| {name} | {paper:+.2f} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
