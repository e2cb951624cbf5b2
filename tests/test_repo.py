"""What holds across files: shared text, the seam, sizes, and a README that names what exists."""

import ast
import inspect
import itertools
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
TRAIN = [p for p in SCRIPTS if p.name.startswith("train_")]
MAY_DIFFER = {"build", "parse_args", "make_optimizer"}  # what each script is about
LATENTS = {"load_data", "to_x0", "make_view", "save_grid", "ema_decay"}  # train_dit.py: data come in and go out, [LDiT]
FLAGS = {"train_unet": 26, "train_uvit": 28, "train_dit": 28}
TINY = {"train_unet": ["--backbone", "tiny"], "train_uvit": ["--size", "tiny"], "train_dit": ["--size", "tiny"]}
SEAM = {"parse_args": "argv", "build": "args", "load_data": "args split", "to_x0": "images flip", "to_uint8": "x0",
        "main": "args"}  # fmt: skip

def blocks(path):
    """{name: source, with decorators and the comments right above} of the top-level definitions."""
    lines, out = path.read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            top = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1
            while top and lines[top - 1].startswith("#") and not lines[top - 1].startswith("# ----"):
                top -= 1
            out[node.name] = "\n".join(lines[top : node.end_lineno])
    return out

def test_same_name_means_same_text():
    found = {p.name: blocks(p) for p in SCRIPTS}
    for a, b in itertools.combinations(found, 2):
        train = a.startswith("train_") and b.startswith("train_")  # they even share their loop
        free = MAY_DIFFER | (set() if train else {"main"}) | (LATENTS if "train_dit.py" in (a, b) else set())
        same = (found[a].keys() & found[b].keys()) - free
        for name in same:
            assert found[a][name] == found[b][name], f"{name} differs between {a} and {b}"
        assert len(same) >= 30 or not train, len(same)  # the comparison is not empty

def test_train_scripts_have_the_same_sections():
    banners = [re.findall(r"^# ---- (\d+\. .+?) -{3,}$", p.read_text(), re.MULTILINE) for p in TRAIN]
    assert len(banners[0]) == 9
    assert all([x.split(":")[0] for x in b] == [x.split(":")[0] for x in banners[0]] for b in banners)

@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_seam(path):
    """design.md: the names by which the tools use a train script, and nothing of ours imported into one."""
    module = __import__(path.stem)
    net, diffusion = module.build(module.parse_args(TINY[path.stem]))
    functions = {getattr(module, name): parameters for name, parameters in SEAM.items()}
    functions |= {net.forward: "x t y aug with_feat", net.encode: "x t y aug", net.features: "x t y pool last",
                  diffusion.add_noise: "x0 level noise",
                  diffusion.features: "net x0 level noise y pool last"}  # fmt: skip
    for function, parameters in functions.items():
        assert " ".join(inspect.signature(function).parameters) == parameters, function
    assert list(inspect.signature(diffusion.sample).parameters)[:2] == ["net", "noise"]
    imported = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    assert "torch" in imported and not {p.stem for p in SCRIPTS} & set(imported)

@pytest.mark.parametrize("path", TRAIN, ids=lambda p: p.stem)
def test_main_and_flags_stay_few(path, capsys):
    """A checklist that is read in one go: main of at most 120 lines, and few flags."""
    assert blocks(path)["main"].count("\n") < 120
    with pytest.raises(SystemExit):
        __import__(path.stem).parse_args(["--help"])
    flags = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(set(flags)) == len(flags) and 20 < len(flags) <= FLAGS[path.stem], flags

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_citations_are_defined(path):
    keys = r"\[(P|DDAE|EDM2?|DDPM|DDIM|RF|MoCo|UViT|L?DiT|RoPE|KL|SD3|CFG|Int|FID|IS)\]"
    text = path.read_text()
    head = ast.get_docstring(ast.parse(text))
    assert "arXiv:2505.10999" in head
    assert set(re.findall(keys, text)) <= set(re.findall(keys, head))

def test_readme_names_what_exists():
    text = re.sub("#SBATCH.*", "", README)  # flags of Slurm
    sources = {p.name: p.read_text() for p in [*SCRIPTS, ROOT / "tests" / "bench.py"]}

    def has(source, flag):
        return f'"{flag}"' in source or f'"{flag.replace("--no-", "--")}"' in source  # argparse adds --no-flip

    for name in re.findall(r"\b([a-z_]+\.py)\b", text):
        readers_own = name.startswith("my_")
        assert readers_own or (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    for flag in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)\b(?!_)", text):
        assert any(has(source, flag) for source in sources.values()), flag
    commands = re.findall(r"((?:train_[a-z]+|sample|probe|fid)\.py [^&`\n]*)", text)
    assert len(commands) > 10
    for command in commands:
        for flag in re.findall(r" (--[a-z-]+)", command):
            assert has(sources[command.split()[0]], flag), f"{flag} of {command.split()[0]}"

def test_quick_start_is_two_commands():
    """The first sets up and does the main job, over several lines; the second passes the tests, as .ci/run does."""
    section = re.search(r"## Quick start.*?\n## ", README, re.DOTALL).group(0)
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    commands = [re.sub(r"(&&|\\)\n\s*", r"\1 ", block).strip() for block in blocks]
    assert len(commands) == 2 and not any("\n" in command for command in commands)
    assert "--self-cond" in commands[0] and "python -m pytest" in commands[1]

def test_readme_links_to_files_and_headings_that_exist():
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) > 10
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists() and (ROOT / link).stat().st_size < 150_000 or (ROOT / link).is_dir(), link
