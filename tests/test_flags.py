"""Every flag of the six scripts, and each of its choices: what a run with it does that a run without it does not."""

import argparse
import contextlib
import functools
import io
import itertools
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load, make_checkpoint, make_folder, metrics, run, spy
from torch import nn

import fid
import probe
import sample
import train_dit
import train_unet
import train_uvit

TRAIN = {"train_unet": ["--backbone", "tiny"], "train_uvit": ["--size", "tiny"], "train_dit": ["--size", "tiny"]}

def autocast():
    """The dtype of the CPU's autocast, None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

# ---- Defaults; those of the paper's own runs are in test_readme.py
PAPER = {"epochs": 2000, "warmup": 13, "cooldown": 0, "save_every": 200, "ema": 0.9999, "lr": 4e-4}
LATENT = {"batch": 1024, "lr": 2e-4, "ema": 0.9999, "warmup": 0, "cooldown": 0, "qk_norm": False, "cl_hidden": 4096}
DEFAULTS = {  # script and flags: what else they mean
    "train_unet": {**PAPER, "resolution": 16, "dataset": "shapes", "aug": 0},
    "train_unet --epochs 8": {"warmup": 2, "cooldown": 0},
    "train_unet --model rf --backbone tiny": {
        "warmup": 0.5, "cooldown": 0.3, "dropout": 0, "lr": 2e-3, "layer": "out_2", "cl_t": 0.06},
    "train_unet --cl 0.01": {"aug": 0.12}, "train_unet --cl 0.01 --aug 0": {"aug": 0},
    "train_uvit --dataset cifar100 --cls-token --cl 0.01 --save-every 5": {
        **PAPER, "save_every": 5, "model": "ddpm", "cl_target": "cls", "aug": 0.12, "cond": False,
        "out": "runs/cifar100-uvit-cls-token-cl-0.01"},  # named after the flags that make the run
    "train_uvit --dataset tiny-imagenet": {"aug": 0, "cls_token": 0},
    "train_uvit --dataset tiny-imagenet --patch 2": {"patch": 2},
    "train_uvit --cl 0.01": {"cl_target": "gap"}, "train_uvit --cls-token --cl-target gap": {"cl_target": "gap"},
    "train_dit --dataset elsewhere": {"patch": 4, "size": "B", **LATENT},
    "train_dit --dataset cifar100": {"patch": 2, "cl_t": 0.06, "layer": "8", "epochs": 2000, **LATENT},
    "train_dit --dataset imagenet --cache-latents x": {"save_every": 20, **LATENT},
    "train_dit --dataset imagenet100 --cache-latents x --size XL": {"layer": "19"},
    "train_dit --dataset imagenet --cache-latents x --cond --size L": {"layer": "20"},
}

@pytest.mark.parametrize("words", DEFAULTS)
def test_defaults(words):
    script, *flags = words.split()
    args = vars(sys.modules[script].parse_args(flags))
    assert {name: args[name] for name in DEFAULTS[words]} == DEFAULTS[words]

# ---- Flags: "flag value | other flags": what a run with them does; without the flag it does something else
OTHER = "something else"  # than without the flag
DEVICE = {"--device auto": {"refused": None}, "--device cpu": {"refused": None}, "--device cuda": {"refused": OTHER}}
PRECISION = {"--amp bf16": {"autocast": torch.bfloat16}, "--amp fp16": {"autocast": torch.float16},
             "--amp off": {"autocast": None}}  # fmt: skip

def common(script, layer, level, net):
    """Of every train script; with a layer and a level that are not its defaults."""
    return {
        **DEVICE, **PRECISION, "--amp auto": {"autocast": None},
        f"--layer {layer}": {"layer": layer}, "--cl 0.3": {"gamma": 0.3}, f"--cl-t {level} | --cl 1": {"level": level},
        "--dataset mine --resolution 8": {"images": 8, "classes": ["cat", "dog"]},
        "--data other | --dataset mine --resolution 8": {"classes": ["ant", "bee", "cow"]},
        "--resolution 8": {"side": 8}, "--epochs 1 | --max-steps 99": {"updates": 8}, "--batch 4": {"passes": [4, 4]},
        "--accum 2": {"passes": [4] * 4}, "--lr 0.25 | --epochs 2": {"lr": 0.25}, "--ema 0.25": {"decay": 0.25},
        "--compile": {"compiled": [net, "encode"]}, "--no-compile": {"compiled": []}, "--out to-NEW": {"out": "to-NEW"},
        "--seed 5": {"weights": OTHER, "first": OTHER}, f"--init init_{script}.pt": {"weights": OTHER},
        f"--resume | --out done_{script}": {"refused": None, "updates": 1}, "--max-steps 3": {"updates": 3},
        "--save-every 2 | --epochs 4 --batch 32 --max-steps 9": {"epochs": [2, 4]},
    }  # fmt: skip

AUG = {"--aug 0.5": {"aug": 0.5}, "--cl-head time | --cl 1": {"head": "time"},
       "--cl-head moco | --cl 1": {"head": "moco"}}  # fmt: skip
SELF = {"--self-cond": {"self_cond": "adaptive"}, "--self-cond adaptive": {"self_cond": "adaptive"},
        "--self-cond add": {"self_cond": "add"}}  # fmt: skip
COND = {"--cond": {"labelled": True}}
LATENTS = " --dataset mine --resolution 16"
CASES = {
    "train_unet": {**common("train_unet", "out_4", "66", "UNet"), **AUG, **SELF,
        "--model ddpm": {"formulation": "DDPM"}, "--model edm": {"formulation": "EDM"},
        "--model rf": {"formulation": "RF"}, "--backbone tiny": {"width": 128, "blocks": 6},
        "--backbone ddpm": {"width": 512, "blocks": 12}, "--backbone ddpmpp": {"width": 512, "blocks": 15}},
    "train_uvit": {**common("train_uvit", "in_2", "66", "UViT"), **AUG, **COND,
        "--size tiny": {"width": 64, "blocks": 5}, "--size S": {"width": 512, "blocks": 13},
        "--size M": {"width": 768, "blocks": 17}, "--patch 4": {"patch": 4}, "--cls-token": {"cls_token": True},
        "--cl-target gap | --cls-token": {"pool": "gap"}, "--cl-target cls | --cls-token": {"pool": "cls"}},
    "train_dit": {**common("train_dit", "2", "0.5", "DiT"), **COND, **SELF,
        "--size tiny": {"width": 64, "blocks": 6}, "--size B": {"width": 768, "blocks": 12},
        "--size L": {"width": 1024, "blocks": 24}, "--size XL": {"width": 1152, "blocks": 28},
        "--patch 4": {"patch": 4}, "--qk-norm": {"qk_norm": True},
        f"--cache-latents NEW --vae vae.pt | {LATENTS}": {"channels": 4, "side": 1},
        f"--vae vae.pt | --cache-latents NEW {LATENTS}": {"refused": None, "channels": 4},
        f"--latent-stats stats.pt | --cache-latents NEW --vae vae.pt {LATENTS}": {"mean": [1.0, 2.0, 3.0, 4.0]}},
}  # fmt: skip
SAMPLING = {
    **DEVICE, **PRECISION, "--script mine.py | own.pt": {"refused": None}, "--n 6": {"drawn": 6},
    "--steps 3": {"steps": 3}, "--labels 7": {"labels": [7]}, "--cfg 3": {"cfg": 3.0}, "--seed 5": {"pixels": OTHER},
    "--cfg-interval 0.2 0.6": {"interval": [0.2, 0.6]}, "--vae copy.pt | latents/last.pt": {"vae": "copy.pt"},
    "--compile": {"compiled": ["DiT"]}, "--no-compile": {"compiled": []}, "--batch 3": {"largest": 3},
}  # fmt: skip
CASES["sample"] = {**SAMPLING, "--out NEW.npz": {"wrote": ["NEW.npz"]}, "--out NEW": {"wrote": ["NEW"]}}
CASES["fid"] = {**SAMPLING, "--allow-few | --n 3": {"refused": None},
                "--ref mine": {"reference": "the training set mine"}, "--weights w.pth": {"inception": "w.pth"},
                "--data other | --ref mine": {"images": 12}, "--json NEW.json": {"wrote": ["NEW.json"]}}  # fmt: skip
CASES["probe"] = {
    **DEVICE, **PRECISION, "--amp auto": {"autocast": None}, "--script mine.py | own.pt": {"refused": None},
    "--layer out_4": {"layers": ["out_4"]}, "--grid": {"layers": [f"out_{i}" for i in range(1, 7)], "levels": 6},
    "--loss": {"losses": 13}, "--curves --plot NEW.png | curves": {"wrote": ["NEW.png"]}, "--t 66": {"level": 66.0},
    "--pool gap": {"pool": "gap"}, "--pool token | uvit.pt": {"pool": "token"}, "--pool cls | uvit.pt": {"pool": "cls"},
    "--pixels": {"layers": ["out_2", "pixels"]}, "--features NEW.npz": {"wrote": ["NEW.npz"]},
    "--epochs 3": {"updates": 3}, "--lr 0.5": {"lr": 0.5}, "--batch 4": {"updates": 4}, "--flip": {"flips": True},
    "--no-flip": {"flips": False}, "--cache": {"stored": True}, "--batchnorm": {"standardised": True},
    "--subset 8": {"images": 8}, "--dataset mine": {"classes": 2}, "--data other | --dataset mine": {"classes": 3},
    "--json NEW.json": {"wrote": ["NEW.json"]}, "--seed 5": {"noise": OTHER},
    "--plot NEW.png | --grid": {"wrote": ["NEW.png", "probe_grid_unet.json"]},
}  # fmt: skip
BASE = {"sample": "--n 4 --steps 2 dit.pt", "fid": "--n 4 --steps 2 dit.pt",
        "probe": "--epochs 1 --subset 16 unet.pt"}

def flags_of(script, patch):
    """The flags of a script as argparse knows them, {flag: its values, or []}."""
    parsers, words = [], [] if script.__name__ in TRAIN else ["a.pt"]
    spy(patch, argparse.ArgumentParser, "parse_args", lambda parser, argv=None: parsers.append(parser))
    script.parse_args(words)
    actions = [action for action in parsers[-1]._actions if action.option_strings and action.dest != "help"]
    return {flag: list(action.choices or []) for action in actions for flag in action.option_strings}

@pytest.mark.parametrize("script", CASES)
def test_every_flag_and_every_choice_has_a_case(script, monkeypatch):
    cases = [case.split(" | ")[0].split() + [""] for case in CASES[script]]
    flags = flags_of(sys.modules[script], monkeypatch)
    assert {words[0] for words in cases} == set(flags)
    for flag, choices in flags.items():
        assert set(choices) <= {words[1] for words in cases if words[0] == flag}, flag

@pytest.fixture(scope="module")
def place(tmp_path_factory, fewer_shapes):
    """A folder with all that flags may name."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "data", n=4, size=(16, 16))
    make_folder(place / "other", n=4, size=(16, 16), classes=("ant", "bee", "cow"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setitem(train_unet.BACKBONES["tiny"], "mult", (1, 1, 1))
        patch.setattr(os, "fsync", lambda file: None)
        for name in TRAIN:
            patch.setitem(sys.modules[name].TINY, "cl_hidden", 32)
        make_checkpoint(place / "unet.pt", train_unet, *TRAIN["train_unet"], shake=0.1)
        make_checkpoint(place / "uvit.pt", train_uvit, *TRAIN["train_uvit"], "--cls-token", shake=0.1)
        make_checkpoint(place / "dit.pt", train_dit, *TRAIN["train_dit"], "--cond", shake=0.1)
        torch.save({"state_dict": train_dit.VAE(32, 4).state_dict()}, place / "vae.pt")
        shutil.copy(place / "vae.pt", place / "copy.pt")
        torch.save({"mean": torch.arange(1.0, 5), "std": torch.ones(4)}, place / "stats.pt")
        shutil.copy(train_dit.__file__, place / "mine.py")
        torch.save(torch.load(place / "dit.pt") | {"script": "mine"}, place / "own.pt")
        flags = ["--size", "tiny", "--cache-latents", "cache", "--vae", "vae.pt", "--batch", 4]
        run(train_dit, *flags, *LATENTS.split(), "--max-steps", 0, "--out", "latents")
        run(train_unet, *TRAIN["train_unet"], "--batch", 8, "--max-steps", 12, "--out", "curves")
        for name, words in TRAIN.items():
            run(sys.modules[name], *words, "--batch", 8, "--max-steps", 1, "--out", f"done_{name}")
            make_checkpoint(place / f"init_{name}.pt", sys.modules[name], *words, seed=5)
        yield place

@pytest.fixture(scope="module")
def facts(place):
    """facts(script, words): what a run with these words does, found once."""
    numbers = itertools.count()

    @functools.cache
    def find(name, line):
        seen, new = SimpleNamespace(refused=None), f"new{next(numbers)}"
        before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
        errors = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
            patch.chdir(place)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(shutil, "which", lambda name: name)
            seen.compiled = []
            patch.setattr(nn.Module, "compile", lambda net: seen.compiled.append(type(net).__name__))
            patch.setattr(torch, "compile", lambda f, **_: seen.compiled.append(getattr(f, "__name__", "DiT")) or f)
            find_facts = observe_training if name in TRAIN else observe_tool
            try:
                find_facts(sys.modules[name], line.replace("NEW", new).split(), seen, patch, new)
            except SystemExit:
                seen.refused = errors.getvalue().strip().splitlines()[-1]
        changed = [path.name for path in place.iterdir() if before.get(path) != path.stat().st_mtime_ns]
        seen.compiled = list(dict.fromkeys(seen.compiled))
        seen.wrote = sorted(name.replace(new, "NEW") for name in changed if name not in ("data", "other"))
        return vars(seen)

    return find

def observe_training(script, words, seen, patch, new):
    """Of networks that are not tiny, only how they are built, without memory."""
    name = script.__name__
    args = script.parse_args([*TRAIN[name], "--batch", "8", "--max-steps", "2", "--out", new, *words])

    def note_network(net, diffusion):
        names = dict(net.named_parameters())
        seen.formulation, seen.width, seen.blocks = type(diffusion).__name__, net.emb_dim, len(net.layers)
        seen.patch = next(module for module in net.modules() if isinstance(module, nn.Conv2d)).kernel_size[0]
        seen.self_cond = None
        if "self_cond.mlp.0.bias" in names:
            seen.self_cond = "adaptive" if "self_cond.scale.bias" in names else "add"
        seen.qk_norm, seen.cls_token = "blocks.0.attn.q_norm.weight" in names, "cls_token" in names

    if "tiny" not in (getattr(args, "size", None), getattr(args, "backbone", None)):
        with torch.device("meta"):
            note_network(*script.build(args))
        return
    seen.passes, seen.updates, seen.level, seen.aug, seen.labelled, decays = [], 0, None, None, None, []

    def note_pass(objective, x0, level, noise, y, aug, key):
        seen.passes.append(len(x0))
        seen.autocast, seen.labelled = autocast(), y is not None
        if len(seen.passes) == 1:
            seen.first, seen.channels, seen.side = x0.sum().item(), *x0.shape[1:3]

    def note_start(objective, args):
        net, head = objective.net, objective.head
        note_network(net, objective.diffusion)
        seen.weights = sum(p.double().abs().sum().item() for p in net.parameters())
        seen.layer, seen.pool = net.layer, getattr(net, "feat_pool", "gap")
        if head is not None:
            seen.head = "moco" if head.projector.time is None else "time"

    spy(patch, script.Objective, "forward", note_pass)
    spy(patch, script, "make_optimizer", note_start)
    spy(patch, script, "get_ema_multi_avg_fn", decays.append)
    spy(patch, script, "teacher_key", lambda average, view, level: setattr(seen, "level", f"{level:g}"))
    if hasattr(script, "gate_augment"):
        spy(patch, script, "gate_augment", lambda uniform, normal, p: setattr(seen, "aug", p))
    script.main(args)
    last, lines = load(Path(args.out)), metrics(Path(args.out))
    seen.updates, seen.decay, seen.lr = len(decays), decays[-1], max(line["lr"] for line in lines)
    seen.images, seen.classes = last["args"]["train_images"], last["args"]["classes"]
    seen.mean = (last["args"].get("latents") or {"mean": None})["mean"]
    seen.epochs = sorted(int(file.stem[-4:]) for file in Path(args.out).glob("epoch_*.pt"))
    seen.out = args.out.replace(new, "NEW")
    if args.cl:
        seen.gamma = round((lines[0]["loss"] - lines[0]["loss_diffusion"]) / lines[0]["loss_contrast"], 3)

def observe_tool(script, words, seen, patch, new):
    """Samples are drawn for sample.py and fid.py; the Inception is left out."""
    name = script.__name__
    base = BASE[name].split()
    if any(word.endswith((".pt", "curves")) and word not in ("vae.pt", "copy.pt") for word in words):
        base.pop()  # another checkpoint
    seen.pixels, seen.drawn, seen.steps, seen.largest, seen.vae, seen.autocast = 0, 0, 0, 0, None, None
    seen.labels, seen.inception, measured = None, None, []

    def note_images(x0):
        seen.drawn, seen.pixels = seen.drawn + len(x0), seen.pixels + x0.sum().item()

    def note_network(net, x, *_, **__):
        seen.largest, seen.autocast = max(seen.largest, len(x)), autocast()

    def note_velocity(rf, net, x, level, y, cfg, interval):
        seen.steps, seen.cfg, seen.interval = seen.steps + 1, cfg, list(interval)
        seen.labels = y if y is None else sorted(set(y.tolist()))

    spy(patch, train_dit, "to_uint8", note_images)
    spy(patch, train_dit.DiT, "forward", note_network)
    spy(patch, train_dit.LatentRF, "velocity", note_velocity)
    spy(patch, train_dit, "load_vae", lambda path, device: setattr(seen, "vae", str(path).split("/")[-1]))
    patch.setattr(fid, "LEAST_IMAGES", 4)

    def measure(net, images, *_):
        measured.append(sum(len(block) for _, block in images.blocks(0, 1)))
        if len(measured) == 1:
            seen.reference, seen.images = images.name, measured[0]
        return SimpleNamespace(gaussian=lambda: (torch.zeros(1), torch.zeros(1)))

    patch.setattr(fid, "measure", measure)
    patch.setattr(fid, "score", lambda *_: (1.0, 2.0, 0.5))
    patch.setattr(fid, "load_inception", lambda path, *_: setattr(seen, "inception", path) or SimpleNamespace(sha="0"))
    seen.noise, seen.flips, seen.lr, seen.updates = 0.0, False, 0.0, 0

    def note_step(optimizer, *_):
        seen.lr, seen.updates = max(seen.lr, optimizer.param_groups[0]["lr"]), seen.updates + 1

    def note_heads(encode, train, args, stored=None, mean=0.0, std=1.0):
        seen.stored, seen.standardised = stored is not None, isinstance(mean, torch.Tensor)
        seen.images, seen.classes = len(train.labels), train.classes

    def note_encoder(encode, x0, noise):
        seen.noise += noise.sum().item()

    def note_features(net, *_, **__):
        seen.autocast = autocast()

    def note_x0(split, index, flip=None):
        if flip is not None:
            seen.flips = seen.flips or 0 < flip.float().mean().item() < 1

    spy(patch, probe, "train_heads", note_heads)
    spy(patch, probe.Encoder, "__call__", note_encoder)
    spy(patch, probe.Split, "x0", note_x0)
    spy(patch, train_unet.UNet, "features", note_features)
    spy(patch, torch.optim.Adam, "step", note_step)
    args = script.parse_args([*base, *words])
    for root in ("data", "other"):
        shutil.rmtree(f"{root}/.fid", ignore_errors=True)  # references are measured anew
    results = sample.run_tool(script.main, args)
    if name == "probe" and results:
        cells = results[0].get("cells", [{"level": None, "pool": None, "layer": None}])
        seen.layers = list(dict.fromkeys(cell["layer"] for cell in cells))
        seen.levels, seen.level, seen.pool = len(results[0]["levels"]), cells[0]["level"], cells[0]["pool"]
        seen.losses = len(results[0].get("loss", []))

@pytest.mark.slow
@pytest.mark.parametrize(("script", "flag"), sorted({(s, case.split()[0]) for s in CASES for case in CASES[s]}))
def test_a_flag_changes_what_it_says(script, flag, facts):
    """Each of its values does; and at least one does otherwise than the default."""
    differs = False
    for case, wants in CASES[script].items():
        if case.split()[0] != flag:
            continue
        words, _, context = case.partition(" | ")
        plain, seen = facts(script, context), facts(script, f"{context} {words}")
        for fact, want in wants.items():
            have = seen.get(fact)
            if want == OTHER:
                assert have is not None and have != plain.get(fact), (case, fact, have)
            else:
                assert have == want, (case, fact, have)
            differs = differs or have != plain.get(fact)
    assert differs or flag in ("--flip", "--no-compile")  # which are the defaults
