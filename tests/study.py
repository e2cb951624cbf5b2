"""The README's tables of our runs, from tests/results: python tests/study.py

cifar10.json: tiny networks on CIFAR-10, one seed. study.json: short runs of several seeds. Two runs of one seed see the
same images, noise and order, so each row of the study is a mean of paired differences over seeds, with its 95 %
interval (Student's t). Accuracies are of the mean token or pixel ("gap"), in percent of the test images.
"""

import json
import math
import statistics
from pathlib import Path

from scipy.stats import t

RESULTS = Path(__file__).parent / "results"
CIFAR = json.loads((RESULTS / "cifar10.json").read_text())["runs"]
RUNS = json.loads((RESULTS / "study.json").read_text())
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

def cifar_table():
    """Markdown, a row per run on CIFAR-10: the last epoch's best layer at two levels, with standard errors."""
    lines = ["| run | epochs | best layer, less noise: linear | 20-NN | best layer, more noise: linear | 20-NN |"]
    lines += ["|---" * 6 + "|"]
    for run in CIFAR:
        flags = f"`{run['flags']}`" if run["flags"] else "baseline"
        cells = [f"{run['network']}, {flags}", str(run["maps"][-1]["epoch"])]
        for result in (run["maps"][-1], run["high"]):
            _, layer, _, linear, error, knn = max(result["cells"], key=lambda cell: cell[3])
            cells += [f"{layer}: {linear:.2f} ± {error:.2f}", f"{knn:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

def loss_table(network):
    """Markdown, a row per run of a network that has a baseline: paired differences of held-out loss in percent."""
    baseline, *others = (run for run in CIFAR if run["network"] == network)
    lines = [f"| {network} | " + " | ".join(f"{level:g}" for level in baseline["loss"]["levels"]) + " |"]
    lines += ["|---" * (1 + len(baseline["loss"]["levels"])) + "|"]
    for run in others:
        cells = [f"`{run['flags']}`"]
        for loss, *paired in zip(baseline["loss"]["loss"], run["loss"]["difference"], run["loss"]["difference_se"],
                                 strict=True):
            difference, error = (100 * value / loss for value in paired)
            cells.append(f"{difference:+.2f} ± {error:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

if __name__ == "__main__":
    print(cifar_table(), loss_table("UNet"), loss_table("U-ViT"), table(), sep="\n\n")
