"""The notebook of the first hour runs to its end; with one step an attack, since its own takes a minute."""

import json
import re

import pytest

from diffender.evaluation.options import PRESETS
from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS["laptop"], "iters_undefended", 1)
    names = {}
    with matplotlib.rc_context():
        matplotlib.use("agg")
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                source = re.sub(r"iters=\d+", "iters=1", "".join(cell["source"])).replace("range(10)", "range(1)")
                exec(compile(source, f"cell {number}", "exec"), names)  # noqa: S102
    assert (tmp_path / "runs/quickstart/report.html").is_file()
    assert names["found"].restored.size == (512, 512)


def test_the_notebook_was_committed_with_its_images_and_without_errors():
    cells = [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5
    assert "/tmp" not in json.dumps(cells)
