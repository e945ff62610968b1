"""The layout keeps its promises: imports run one way, functions stay short, the README names every file."""

import ast
import subprocess
import sys
from dataclasses import replace

import pytest

from diffender.__main__ import COMMANDS
from diffender.attacks import AdvP
from diffender.attacks.gdpa import MODES
from diffender.config import EMBEDDED, Backward, DIFFenderConfig
from diffender.evaluation.options import PatchOptions
from diffender.faces.__main__ import Options as FaceOptions
from diffender.faces.identification import RECOGNIZERS
from diffender.localize import SCORES
from diffender.losses import EVASIONS
from diffender.paper import ablate, studies
from diffender.report.__main__ import filled
from diffender.stable_diffusion.samplers import SAMPLERS
from diffender.utils.errors import InputError
from diffender.utils.options import leaves
from tests.conftest import ROOT

PACKAGE = ROOT / "diffender"
# A room imports from itself and from the rooms on the lines above its own. A bare name is a file of diffender/.
FLOORS = """
utils ops noise losses
config
stable_diffusion
prompts
localize restore
pipeline weights attacks
classifiers
faces defenses
factory
evaluation
report tuning
photographs
own pretrain paper
"""
RANK = {room: i for i, line in enumerate(FLOORS.split("\n")) for room in line.split()}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The folder in diffender/ that a file lies in, or the file itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Modules of the package that a file imports, without those for type checkers alone."""
    tree = ast.parse(path.read_text())
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    typing = {id(node) for guard in guards for node in ast.walk(guard)}
    for node in [node for node in ast.walk(tree) if id(node) not in typing]:
        if isinstance(node, ast.ImportFrom) and node.module == "diffender":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffender."):
            yield node.module.split(".", 1)[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".", 1)[1] for alias in node.names if alias.name.startswith("diffender."))


def test_every_form_of_import_is_seen(tmp_path):
    code = tmp_path / "code.py"
    lines = ("from diffender import own", "import diffender.report.page", "from diffender.noise import seeds")
    code.write_text("\n".join(lines))
    assert sorted(imported(code)) == ["noise", "own", "report.page"]


def test_imports_run_one_way():
    doors = ("__init__", "__main__")  # they reach every room
    assert {room(path) for path in MODULES} == {*RANK, *doors}
    for path in MODULES:
        for other in {name.split(".")[0] for name in imported(path)} - {room(path)}:
            assert room(path) in doors or RANK[other] < RANK[room(path)], f"{path} imports {other}"


def test_attacks_know_no_defence_and_defences_no_attack():
    for path in MODULES:
        others = {name.split(".")[0] for name in imported(path)}
        if room(path) == "attacks":
            assert others <= {"attacks", "noise", "utils"}, path
        elif room(path) == "defenses" or room(path) in RANK and RANK[room(path)] <= RANK["pipeline"]:
            assert "attacks" not in others, path


def test_few_arguments():
    for path in [*MODULES, ROOT / "train.py", ROOT / "evaluate.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")]
                assert len(names) <= 6, f"{path}: {node.name} takes {len(names)}"


@pytest.mark.parametrize(
    "path", [*MODULES, ROOT / "train.py", ROOT / "evaluate.py"], ids=lambda p: "/".join(p.parts[-2:])
)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 65, node.name


def test_readme_names_every_room():
    readme = (ROOT / "README.md").read_text()
    for name in RANK:
        assert f"{name}/" in readme or f"{name}.py" in readme, name


def test_the_repository_stays_small():
    """With the packed photographs, 27.34 MB, it must fit into the 64 MiB that may go to a machine with a GPU."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no checkout: git does not know the files")
    size = sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file())
    assert size < 64 * 2**20 - 27.4e6


def test_documents_show_the_committed_results():
    documents = [(ROOT / "README.md").read_text(), *(p.read_text() for p in (ROOT / "docs").glob("*.md"))]
    for document in documents:
        assert filled(document, ROOT / "results") == document, "run python -m diffender report README.md docs/*.md"
    for folder in (p.parent for p in (ROOT / "results").glob("*/table.md")):
        assert any(f"<!-- results/{folder.name} -->" in document for document in documents), folder


def test_a_document_is_filled_from_the_results(tmp_path):
    stale = "before\n<!-- results/a -->\nold\n<!-- end -->\nafter\n"
    with pytest.raises(InputError, match="whose table the document asks for"):
        filled(stale, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/table.md").write_text("| new |\n")
    assert filled(stale, tmp_path) == "before\n<!-- results/a -->\n| new |\n<!-- end -->\nafter\n"


def test_names_that_stand_twice_are_the_same():
    """Help answers without torch, so a flag cannot take its choices from what it chooses among."""
    options = (DIFFenderConfig(), Backward(), PatchOptions(), FaceOptions())
    choices = {leaf.name: leaf.metadata["choices"] for opts in options for leaf in leaves(opts)}
    found = {"score": SCORES, "sampler": SAMPLERS, "hide": EVASIONS, "gdpa_mode": MODES, "classifier": RECOGNIZERS}
    assert {flag: choices[flag] for flag in found} == {flag: tuple(names) for flag, names in found.items()}
    assert (*studies.STUDIES, "examples") == ablate.STUDIES


@pytest.mark.parametrize("study", ["choices", "restoring", "defender", "attacker"])
def test_studies_change_one_choice_at_a_time(study):
    base, *others = studies.STUDIES[study]("tuned", EMBEDDED)
    assert (base.prompt, base.cfg, base.backward) == ("tuned", EMBEDDED, Backward("evade"))
    told = [vars(s.cfg) | vars(s.backward) | {"prompt": s.prompt} for s in (base, *others)]
    for setting, values in zip(others, told[1:], strict=True):
        ((name, value),) = ((k, v) for k, v in values.items() if v != told[0][k])
        assert setting.name == f"{name} {value}"
        assert (name in vars(Backward())) == (study == "attacker")


def test_schedules_differ_in_the_steps_of_the_attack_alone():
    base, *others = studies.STUDIES["schedule"]("tuned", EMBEDDED)
    assert base.backward == Backward("full") and not base.steps
    assert all(s._replace(name="base", steps={}) == base and replace(AdvP(), **s.steps) != AdvP() for s in others)


PROGRAMS = ["evaluate.py", "train.py", "diffender", *(module for module, _ in COMMANDS.values())]


@pytest.mark.parametrize("words", [*([program] for program in PROGRAMS), ["diffender.report", "compare"]])
def test_help_answers_without_torch(words):
    """It takes seconds to import, and mistakes on the command line should show at once, too."""
    program = words[0]
    start = f"run_path({program!r}" if program.endswith(".py") else f"run_module({program!r}"
    code = f"""if True:
        import runpy, sys
        sys.argv = {[*words, "--help"]}
        try:
            runpy.{start}, run_name="__main__")
        except SystemExit as e:
            print("exit", e.code)
        print(sorted(sys.modules.keys() & {{"torch", "timm", "torchvision", "safetensors.torch"}}))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.endswith("[]\n"), run.stdout + run.stderr
    assert "python" in run.stdout or "options" in run.stdout
