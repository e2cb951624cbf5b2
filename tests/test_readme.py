"""Every recipe of the README, parsed by the scripts themselves, is the run that the paper describes."""

import importlib
import re

import pytest
import study
import torch
from conftest import ROOT, load, run, shrink

import sample

POINTS = {  # [P] Tab. 10: (model, backbone, CIFAR-10?) -> layer; level
    ("ddpm", "ddpm", True): ("out_6", 11), ("ddpm", "ddpm", False): ("out_6", 11),
    ("edm", "ddpm", True): ("out_7", 0.06), ("edm", "ddpm", False): ("out_6", 0.06),
    ("rf", "ddpm", True): ("out_7", 0.06), ("rf", "ddpm", False): ("out_7", 0.06),
    ("ddpm", "ddpmpp", True): ("out_7", 11), ("ddpm", "ddpmpp", False): ("out_8", 11),
    ("edm", "ddpmpp", True): ("out_9", 0.06), ("edm", "ddpmpp", False): ("out_8", 0.06),
    ("rf", "ddpmpp", True): ("out_8", 0.06), ("rf", "ddpmpp", False): ("out_8", 0.06),
}  # fmt: skip
UNETS = {"ddpm": (0.9999, 13, 0.1), "edm": (0.9993, 200, 0.13), "rf": (0.9999, 13, 0.1)}  # [P] Tab. 8, 11: EMA, warm-up
DIT = {  # [P] Tab. 10, 11: (data set, class-conditional) -> layer, epochs
    ("imagenet100", False): ("8", 1400), ("imagenet100", True): ("8", 1000),
    ("imagenet", False): ("9", 90), ("imagenet", True): ("10", 90),
}  # fmt: skip
TEXT = (ROOT / "README.md").read_text().replace("\\\n", " ")  # a command's lines as one

def recipes():
    """(script, flags, numbers of the paper) of every filled cell of the README's recipe tables."""
    found, head = [], None
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells if re.search(r"train_\w+\.py", cells[0]) else []
        elif head and not cells[0].startswith("-"):
            script, common = re.search(r"(train_\w+)\.py([^`]*)`", head[0]).groups()
            for column, numbers in zip(head[1:], cells[1:], strict=True):
                extra = " ".join(re.findall(r"`(--[^`]+)`", column)[:1])
                for flags in re.findall(r"`(--[^`]+)`", cells[0]) if numbers else ():
                    found.append((script, f"{common} {flags} {extra}".split(), numbers))
    return found

@pytest.mark.parametrize(("script", "flags", "numbers"), recipes(), ids=str)
def test_recipe_is_the_papers_run(script, flags, numbers, tmp_path):
    (tmp_path / "vavae.pt").write_bytes(b"any")
    flags = [{"vavae.pt": f"{tmp_path}/vavae.pt", "DIR": f"{tmp_path}/latents"}.get(flag, flag) for flag in flags]
    args = importlib.import_module(script).parse_args([*flags, "--data", str(tmp_path)])
    assert re.search(r"\d+\.\d\d / \d\d\.\d\d", numbers)
    got = (args.batch, args.epochs, args.lr, args.layer, args.cl_t)
    small = args.resolution == 32
    epochs = 1200 if "1200" in flags else 2000
    if script == "train_unet":
        layer, level = POINTS[args.model, args.backbone, args.dataset == "cifar10"]
        if not small:
            layer, level = "out_5", 0.2964
        if "--cl-t" in flags:
            level = float(flags[flags.index("--cl-t") + 1])
        assert got == (512 if args.backbone == "ddpm" else 256, epochs, 4e-4, layer, level)
        assert (args.ema, args.warmup, args.dropout) == UNETS[args.model]
    elif script == "train_uvit":
        assert got == (256, epochs, 4e-4, *(("out_2", 11) if small else ("out_1", 66)))
        assert (args.ema, args.warmup, args.patch, args.size) == (0.9999, 13, 2 if small else 4, "S")
    else:
        layer, epochs = DIT[args.dataset, bool(args.cond)]
        assert got == (1024, epochs, 2e-4, layer, 0.25)
        assert (args.ema, args.size, args.patch, args.resolution) == (0.9999, "B", 1, 256)
    contrast = float(flags[flags.index("--cl") + 1]) if "--cl" in flags else 0
    assert args.cl == contrast
    assert script == "train_dit" or args.aug == (0.12 if contrast or "--aug" in flags else 0)

def test_all_rows_are_there():
    """28 rows of CIFAR with UNets and U-ViT, their A and C, 64 pixels, latents, ablations (a) to (d); five claims."""
    scripts = [script for script, *_ in recipes()]
    count = {name: scripts.count(name) for name in sorted(set(scripts))}
    assert count == {"train_unet": 14 * 2 + 14 + 9 + 7, "train_uvit": 14, "train_dit": 8}
    assert [script for script, *_ in CLAIMS] == ["train_uvit"] * 3 + ["train_unet", "train_dit"]

CLAIMS = re.findall(r"\| `(train_\w+)\.py`, `[\w.]+` \| `([^`]+)` \| `([^`]+)` \|", TEXT)
INLINE = re.findall(r"`((?:sample|probe|fid)\.py\s[^`]+)`", TEXT)
BLOCKS = re.findall(r"((?:sample|probe|fid)\.py [^&#\n]+)", "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)))

@pytest.mark.parametrize("command", [*INLINE, *BLOCKS])
def test_tools_commands_parse(command):
    script, *flags = re.sub(r"\{[\d,]+\}", "0800", command).split()
    importlib.import_module(script.removesuffix(".py")).parse_args([flag for flag in flags if flag != "..."])

def test_study_is_what_its_runs_say():
    """The tables of tests/study.py; its interval by hand: t of 2 degrees of freedom is 4.303."""
    for table in (study.cifar_table(), study.loss_table("UNet"), study.loss_table("U-ViT"), study.table()):
        assert table in TEXT
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.302653 / 3**0.5))
    found = {(run["part"], run["variant"], run["seed"]): run for run in study.RUNS}
    assert len(found) == len(study.RUNS) and all(f"--seed {seed}" in run["train"] for (*_, seed), run in found.items())

@pytest.mark.parametrize(("script", "before", "after"), CLAIMS, ids=[after for *_, after in CLAIMS])
def test_claim_that_a_changed_line_tries(script, before, after, tmp_path, monkeypatch):
    """The copy with the changed line trains, and trains differently; guidance of three channels leaves the others."""
    text = (ROOT / f"{script}.py").read_text()
    assert text.count(before) == 1
    (tmp_path / "changed.py").write_text(text.replace(before, after))
    ours, changed = importlib.import_module(script), sample.import_script("changed", tmp_path / "changed.py")
    if script == "train_dit":
        x, y = torch.randn(2, 5, 4, 4), torch.zeros(2, dtype=torch.long)

        def net(x, t, y):
            return x * torch.where(y < 0, 1.0, 2.0).view(-1, 1, 1, 1)

        one, other = (module.LatentRF().velocity(net, x, 0.5, y, cfg=3.0) for module in (ours, changed))
        assert one[:, :3].equal(other[:, :3]) and other[:, 3:].equal(-2 * x[:, 3:]) and not one.equal(other)
        return
    size = ["--size", "tiny", "--cls-token"] if script == "train_uvit" else ["--backbone", "tiny", "--model", "edm"]
    ends = []
    for module in (ours, changed):
        for name, value in shrink(module).items():
            monkeypatch.setattr(module, name, value)
        run(module, *size, "--aug", 0.5, "--batch", 8, "--max-steps", 3, "--out", tmp_path / module.__name__)
        ends.append(load(tmp_path / module.__name__)["model"])
    assert ends[0].keys() == ends[1].keys() and any(not ends[0][k].equal(ends[1][k]) for k in ends[0])
