"""Documents tell the truth: commands parse, and run at their smallest setting; code in them runs or is ours."""

import argparse
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import diffender
from diffender.__main__ import COMMANDS
from diffender.classifiers.dataset import sample_items
from diffender.evaluation.options import refuse_conflicts, refuse_unread
from diffender.utils import options as cli
from diffender.weights.prompts import SHIPPED
from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*.md")])
NEEDS = {  # words in a command, and what it takes that is not here
    "--weights sd-v1-5": "an official checkpoint", "sd-v1-5-inpainting": "an official checkpoint",
    "weights fetch": "a network", "facenet": "weights of a recogniser of faces", "diffender faces": "images of LFW",
    "--before": "an earlier commit beside this one", "benchmarks/": "idle cores and diffusers beside",
    "pip install": "a network; CI runs it", "pytest": "itself", "ruff": "the linter; CI runs it",
    "mypy": "the type checker; CI runs it",
    "pretrain pack": "captions.csv; tests/test_pretrain.py", "pretrain vae": "the same", "pretrain decoder": "the same",
    "pretrain unet": "the same",
    "pretrain all": "the same", "pretrain join": "the same", "results/": "hours: it is the command of a result",
}  # fmt: skip
SMALLEST = {
    "evaluate.py": "--preset smoke --images 1 --iters 1 --iters-undefended 2 --steps 1 --draws 1 "
    "--verdicts 1 --eot 1 --queries 4 --queries-undefended 20 --trust off --curves off --batch-size 1",
    "train.py": "--shots 2 --batch-size 2 --held-out 0 --rounds 1 --iters 2 --steps 2 --draws 1",
    "diffender.paper.ablate": "--images 1 --iters 2 --draws 1 --steps 1",
    "universal": "--images 2 --updates 1 --width 2 --batch-size 2",
    "gdpa": "--images 2 --updates 1 --width 2 --batch-size 2",
    "diffender.photographs": "--draws 1 --steps 1",
    "diffender.evaluation.certify": "--images 1 --masks 2",
    "jedi": "--images 2 --epochs 1 --out jedi.safetensors",
}


def commands(document):
    """Command lines in a document: those of its shell blocks, and those in backticks."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:python|torchrun) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [part.strip() for line in lines + inline for part in " ".join(line.split()).split("&&")]
    return [c for c in found if c and not c.startswith("#")]


EVERY = list(dict.fromkeys(c for document in [*DOCUMENTS, NOTEBOOK] for c in commands(document)))
PYTHON = [c for c in EVERY if re.match(r"(\.venv/bin/)?python |torchrun ", c) and not c.endswith("...")]


def program(command):
    """The module or file that it starts, and what follows."""
    words = shlex.split(command)[1:]
    while words and words[0].startswith("-") and words[0] != "-m":
        words = words[2:]  # of torchrun
    if words[0] != "-m":
        return words[0], words[1:]
    if words[1] == "diffender":
        return (COMMANDS[words[2]][0], words[3:]) if words[2:] else ("diffender.__main__", [])
    return COMMANDS.get(words[1].removeprefix("diffender."), words[1:])[0], words[2:]


def test_there_are_commands():
    assert len(PYTHON) > 40
    assert {"evaluate.py", "train.py", "diffender.photographs", "diffender.report.__main__"} <= {
        program(c)[0] for c in PYTHON
    }


@pytest.mark.parametrize("command", PYTHON)
def test_commands_are_of_programs_and_options_that_exist(command):
    name, args = program(command)
    if name in ("pytest", "venv") or name.startswith("benchmarks/"):
        return
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    if hasattr(module, "Options"):
        opts = cli.parse(module.Options, "", args)
        if name == "evaluate.py":
            refuse_conflicts(opts)
            refuse_unread(opts)


class Parsed(Exception):
    """A benchmark has understood its command line."""


@pytest.mark.parametrize("command", [c for c in PYTHON if program(c)[0].startswith("benchmarks/")])
def test_commands_of_benchmarks_are_understood(command, monkeypatch):
    name, args = program(command)
    parse = argparse.ArgumentParser.parse_args

    def stop(self):
        parse(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [name, *args])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / name), run_name="__main__")


def test_the_cost_of_50000_images(monkeypatch, capsys):
    """The one benchmark that measures nothing runs to its last line."""
    monkeypatch.setattr(sys, "argv", ["scale.py", "--model", "tiny"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    runpy.run_path(str(ROOT / "benchmarks" / "scale.py"), run_name="__main__")
    assert "| --preset strong: every gradient, three restarts |" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_told_by_benchmarks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency.py", "--device", "tpu"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks" / "latency.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "--device tpu is not here; there is cpu" in capsys.readouterr().err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with everything that the documents' commands name."""
    folder = tmp_path_factory.mktemp("workplace")
    wnids = ImageNetInfo().label_names()
    for items in ("imagenet", "my_images", "photos/imagenet_samples"):
        for item in sample_items():
            (folder / items / wnids[item.label]).mkdir(parents=True, exist_ok=True)
            shutil.copy(item.path, folder / items / wnids[item.label])
    (folder / "nips17").mkdir()
    rows = [f"{item.path},{item.label}" for item in sample_items()]
    (folder / "nips17/labels.csv").write_text("\n".join(["file,label", *rows]))
    (folder / "frames.csv").write_text("\n".join(["file,label,configuration", *(f"{r},front" for r in rows[:2])]))
    (folder / "folder").mkdir()
    for name in ("photo.jpg", "folder/other.jpg"):
        shutil.copy(sample_items()[0].path, folder / name)
    patches = {"patches": torch.rand(2, 3, 50, 50), "targets": torch.tensor([1, 2])}
    save_file(patches, folder / "FILE.safetensors")
    for name in ("README.md", "docs", "results"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "runs").mkdir()
    shutil.copy(SHIPPED, folder / "runs/prompts.safetensors")
    return folder


def run(command, folder):
    name, args = program(command)
    start = [sys.executable, "-m", name] if not name.endswith(".py") else [sys.executable, ROOT / name]
    if command.startswith("torchrun"):
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / name]
    small = [] if "--help" in args else shlex.split(SMALLEST.get(args[0] if args and args[0] in SMALLEST else name, ""))
    args = [part for a in args for part in (sorted(map(str, folder.glob(a))) if "*" in a else [a])]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    while True:  # what this command does not read is left out of the smallest setting, flag by flag
        line = [*start, *args, *small]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=900, env=env)
        refused = re.search(r": (--[\w-]+) .*is read by ", done.stderr)
        if done.returncode != 2 or not refused or refused[1] not in small:
            return done
        at = small.index(refused[1])
        del small[at : at + 2]


@pytest.mark.slow
@pytest.mark.parametrize("command", EVERY)
def test_commands_run_at_their_smallest_setting(command, workplace):
    for words, reason in NEEDS.items():
        if words in command:
            pytest.skip(f"needs {reason}")
    if "report compare" in command:
        for name in ("A", "B"):
            made = run(f"python evaluate.py --attack none --name {name}", workplace)
            assert made.returncode == 0, made.stderr
    if "train.py" in command and "--out" not in command:
        (workplace / "runs/prompts.safetensors").unlink(missing_ok=True)  # of another command
    done = run(command, workplace)
    assert done.returncode == 0, done.stderr[-2000:]


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(sample_items()[0].path, "photo.jpg")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        exec(block, names)
    assert names["logits"].shape == (1, 1000)
    assert Image.open("clean.png").size == Image.open("photo.jpg").size


class Brightness(torch.nn.Module):
    """Somebody's cats and dogs."""

    def forward(self, x):
        bright = x.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)


def test_code_of_the_usage_runs(photos, tmp_path, monkeypatch):
    """In the order of the page, at the smallest budget."""
    benchmark, made = diffender.benchmark, []

    def short(model, images, labels, **given):
        few = {"iters": 1, "iters_undefended": 1, "eot": 1, "verdicts": 1, "curves": "off", "trust": "off"}
        made.append(benchmark(model, images, labels, **few | given))
        return made[-1]

    monkeypatch.setattr(diffender, "benchmark", short, raising=False)
    monkeypatch.chdir(tmp_path)
    names = {"diffender": diffender, "torch": torch, "images": photos[:1], "labels": [0], "model": Brightness()}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/usage.md").read_text(), flags=re.DOTALL):
        exec(block, names)
    kinds = [[row["gradient"] for row in results["rows"][1:-1]] for results in made]
    assert kinds == [["transfer", "auto"], ["transfer", "bpda", "auto"], ["transfer", "evade"]]
    assert (tmp_path / "runs/mine/report.html").is_file()


def test_code_of_the_guide_is_the_code():
    """Every line of an excerpt stands in the package."""
    sources = [*(ROOT / "diffender").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    lines = {line.strip() for path in sources for line in path.read_text().splitlines()}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            assert line.strip() in lines, line
