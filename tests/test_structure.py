"""The layout keeps its promises: imports run one way, functions stay short, the README names every file."""

import ast
import re
import subprocess
import sys

import pytest

from diffender.report import fill
from tests.conftest import ROOT

PACKAGE = ROOT / "diffender"
# A module imports only from lines above its own.
LAYERS = [
    {"errors", "interruption", "ops", "schedule", "layouts"},
    {"noise", "metrics", "cli", "files", "samplers"},
    {"models.layers"},
    {"models.text", "models.unet", "models.vae", "models.classifiers", "models.faces"},
    {"diffusion", "losses", "checkpoints", "official"},
    {"weights", "progress"},
    {"localize", "restore", "prompts"},
    {"pipeline"},
    {"attacks.patch", "attacks.stickers"},
    {f"defenses.{name}" for name in ("fill", "jpeg", "smoothing", "lgs", "fnc", "diffpure")},
    {"defenses.dw"},
    {"attacks.advp", "attacks.gdpa", "attacks.rhde", "attacks.fixed"},
    {"attacks.lavan", "attacks.sparse_rs"},
    {"attacks", "data", "report", "memory"},
    {"faces", "defenses.jedi"},
    {"defenses"},
    {"runs"},
    {"defenses.patchcleanser", "defend"},
    {"evaluation", "corpus", "trainer"},
    {"pretrain", "ablation", "trust", "plans", "attacks.beforehand"},
    {"page", "curves"},
    {"experiment", "paper", "physical", "controls", "workers"},
    {"filming"},
    {"tables"},
    {"figures"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
}
MODULES = {k: v for k, v in MODULES.items() if k not in ("__init__", "models")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffender."):
            yield node.module.removeprefix("diffender.")


def test_every_module_has_a_layer():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    for other in imports(MODULES[name]):
        assert RANK[other] < RANK[name], f"{name} imports {other}"


def test_attacks_know_no_defence_and_defences_no_attack():
    for name in MODULES:
        if name.startswith("attacks.") and name != "attacks.beforehand":
            others = {other for other in imports(MODULES[name]) if not other.startswith("attacks.")}
            assert others <= {"noise", "errors", "files"}
    for name in MODULES:
        if RANK[name] <= RANK["pipeline"] or name.startswith("defenses"):
            assert not any(other.startswith("attacks") for other in imports(MODULES[name]))


@pytest.mark.parametrize("path", [*MODULES.values(), ROOT / "train.py", ROOT / "evaluate.py"], ids=lambda p: p.name)
def test_functions_are_short_and_hinted(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 65, node.name


def test_readme_maps_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in MODULES.values():
        if path.name != "__init__.py":
            assert path.name in readme, path


def test_documents_show_the_committed_results():
    documents = [(ROOT / "README.md").read_text(), *(p.read_text() for p in (ROOT / "docs").glob("*.md"))]
    for document in documents:
        assert fill(document, ROOT / "results") == document, "run python -m diffender.report README.md docs/*.md"
    for folder in (p.parent for p in (ROOT / "results").glob("*/table.md")):
        assert any(f"<!-- results/{folder.name} -->" in document for document in documents), folder


def test_readme_commands_are_options_that_exist():
    readme = (ROOT / "README.md").read_text()
    for name in ("train.py", "evaluate.py"):
        source = "".join(p.read_text() for p in (ROOT / name, PACKAGE / "cli.py", PACKAGE / "plans.py"))
        for command in re.findall(rf"python {re.escape(name)}([^\n`]*)", readme):
            for flag in re.findall(r"--([a-z0-9-]+)", command):
                name = flag.removeprefix("no-").replace("-", "_")
                assert f"    {name}:" in source or flag == "help", flag


@pytest.mark.parametrize(
    "program", ["evaluate.py", "train.py", "diffender.defend", "diffender.report", "diffender.page"]
)
def test_help_answers_without_torch(program):
    """It takes seconds to import, and mistakes on the command line should show at once, too."""
    start = f"run_path({program!r}" if program.endswith(".py") else f"run_module({program!r}"
    code = f"""if True:
        import runpy, sys
        sys.argv = ["program", "--help"]
        try:
            runpy.{start}, run_name="__main__")
        except SystemExit as e:
            print("exit", e.code)
        print(sorted(sys.modules.keys() & {{"torch", "timm", "torchvision", "safetensors.torch"}}))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.endswith("[]\n"), run.stdout + run.stderr
    assert "python" in run.stdout or "options" in run.stdout
