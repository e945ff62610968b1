"""The report of a run as one page, and two runs compared."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from diffender.classifiers.dataset import load_image, sample_items
from diffender.classifiers.imagenet import CLASSIFIERS
from diffender.report.__main__ import compare
from diffender.report.page import chart, page, states
from diffender.utils.errors import InputError
from diffender.utils.images import save_stages
from tests.conftest import ROOT

NAMES = [f"class <{i}>" for i in range(4)]


def record(i: int, clean: int = 1, attacked: int = 2, restored: int = 1) -> dict:
    attack = {
        "undefended": attacked,
        "defended": [restored, 1, 1],
        "loss": [1.0, 0.5],
        "fooled": [0.0, 1.0],
        "confidence": [0.9, 0.25],
    }
    return {
        "id": f"p{i}",
        "file": f"p{i}",
        "label": 1,
        "undefended": 1,
        "defended": [clean, 1, 1],
        "masked": 0.1,
        "confidence": [0.8, 0.7],
        "attacks": {"advp/transfer": attack},
    }


RECORDS = [record(0), record(1, restored=3), record(2, clean=0), record(3, attacked=1)]


def results() -> dict:
    p = {"right": 3.0, "n": 4, "accuracy": 0.75, "low": 0.3, "high": 0.95}
    row = {"undefended": p, "single": p, "average": p, "worst": p, "majority": p}
    rows = [row | {"attack": "none", "gradient": ""}, row | {"attack": "strongest on each image", "gradient": ""}]
    checks = [{"name": "a & b", "figure": "1", "wanted": "", "passed": passed} for passed in (True, False, None)]
    told = {"setting": "s", "seed": 0, "machine": "m", "date": "d", "command": "python evaluate.py --name <x>"}
    told |= {"curves": {"theta": {"at": [2.0, 2.5], "none": [1.0, 0.5]}, "area": {"at": []}}}
    return told | {"rows": rows, "defense": "D", "verdicts": 3, "votes": 3, "trust": checks, "seconds": 1.0}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("images")
    photo = load_image(sample_items()[0].path, CLASSIFIERS["efficientnet_lite0"])
    stages = dict.fromkeys(("clean", "attacked", "restored"), photo) | {"mask": photo[:1].round()}
    for r in RECORDS:
        save_stages(folder, r["file"], stages)
    return page(results(), RECORDS, folder, NAMES, {"attack": "<b>"})


class Tags(HTMLParser):
    """Opening tags and their attributes; what is open at the end."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(html):
    tags = Tags(html)
    assert tags.open == []
    for tag, attrs in tags.found:
        assert tag != "link"
        assert all(attrs[k].startswith("data:") for k in ("src", "href") if k in attrs)
    assert "http" not in re.sub(r"data:image[^\"]*|xmlns(:xlink)?=\"[^\"]*\"", "", html)
    assert all(attrs.get("alt") for tag, attrs in tags.found if tag == "img")
    assert len([1 for tag, _ in tags.found if tag == "section"]) == len(RECORDS)


def test_texts_are_escaped(html):
    assert "class &lt;1&gt;" in html
    assert "--name &lt;x&gt;" in html
    assert "a &amp; b" in html
    assert "&lt;b&gt;" in html


def test_images_are_filtered_by_what_happened(html):
    assert [states(r) for r in RECORDS] == [["rescued"], ["failed"], ["rescued", "alarm"], []]
    for text in ("failed under attack (1)", "rescued (2)", "false alarms (1)", "all (4)"):
        assert text in html
    assert "(1 of 3)" in html
    assert "</span> 25 % (3 of 3)" in html, "how sure the classifier is"


def test_curves_are_drawn_where_there_are_any(html):
    titles = re.findall(r'aria-label="([^"]*)"', html)
    assert [t for t in titles if "accuracy" in t or "loss" in t] == [
        "accuracy that the attack saw, in per cent",
        "attacker&#39;s loss, mean over images",
        "accuracy of these patches at other thresholds, in per cent",
    ]
    assert re.search(r">\s*2.5\s*</text>", html)


BROWSER = """if True:
    import os, sys
    os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    from PySide6.QtCore import QUrl
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication
    app, page, script = QApplication(sys.argv[:1]), sys.argv[1], sys.argv[2]
    view = QWebEngineView()
    view.resize(1200, 900)
    view.show()
    done = lambda found: (print(found, flush=True), os._exit(0))
    view.loadFinished.connect(lambda ok: view.page().runJavaScript(script, done))
    view.load(QUrl.fromLocalFile(page))
    app.exec()
"""


def test_the_page_in_a_browser(html, tmp_path):
    """Filters show and hide cards, by keyboard too; the slider cuts; every image is drawn; nothing sticks out."""
    try:
        import PySide6.QtWebEngineWidgets  # noqa: F401
    except ImportError as e:
        pytest.skip(f"no browser ({e}): pip install PySide6")
    (tmp_path / "report.html").write_text(html)
    script = """(() => {
        const visible = card => getComputedStyle(card).display != 'none'
        const found = {}
        for (const id of ['every', 'failed', 'rescued', 'alarm']) {
            document.getElementById(id).click()
            found[id] = [...document.querySelectorAll('.card')].filter(visible).length
        }
        document.getElementById('every').click()
        const input = document.querySelector('.slide input')
        input.value = 30
        input.dispatchEvent(new Event('input'))
        found.cut = document.querySelector('.pair').style.getPropertyValue('--cut')
        found.hidden = document.querySelector('.slide').hidden
        found.broken = [...document.images].filter(i => i.complete && !i.naturalWidth).length
        found.focusable = document.querySelectorAll('input, summary').length
        found.wide = document.documentElement.scrollWidth <= innerWidth
        return JSON.stringify(found)
    })()"""
    run = [sys.executable, "-c", BROWSER, tmp_path / "report.html", script]
    found = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert json.loads(found.stdout.splitlines()[-1]) == {
        "every": 4,
        "failed": 1,
        "rescued": 2,
        "alarm": 1,
        "cut": "30%",
        "hidden": False,
        "broken": 0,
        "focusable": 4 + len(RECORDS) + 1,
        "wide": True,
    }


def test_a_page_of_512_images_stays_light(html):
    assert len(html) / len(RECORDS) < 100_000, "50 MB in all"


def test_curves():
    assert chart("empty", {"a": [1.0]}, "steps") == []
    curves = {"a": [1.0, 1.0], "b": [0.0, 2.0, 1.0]}
    (drawn,) = chart("flat", curves, "steps")
    assert drawn.svg.count('id="curve"') == 2
    assert "nan" not in drawn.svg
    assert drawn == chart("flat", curves, "steps")[0], "the same every time"


def test_two_runs_are_compared_picture_by_picture(tmp_path):
    worse = [record(0), record(1, restored=3), record(2, restored=3), record(9)]
    for name, records in (("a", RECORDS), ("b", worse), ("c", [record(7)])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "per_image.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = compare(tmp_path / "a", tmp_path / "b").splitlines()
    assert lines[0] == "| 3 images | a right | b right | only a | only b | p |"
    assert lines[2:] == [
        "| none | 2 | 3 | 0 | 1 | 1 |",
        "| advp/transfer | 2 | 1 | 1 | 0 | 1 |",
        "| strongest | 2 | 1 | 1 | 0 | 1 |",
    ]
    with pytest.raises(InputError, match="share no images"):
        compare(tmp_path / "a", tmp_path / "c")
    command = [sys.executable, "-m", "diffender.report", "compare", tmp_path / "a", tmp_path / "gone"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
