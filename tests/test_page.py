"""The report of a run as one page, and two runs compared."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

from diffender.classifiers.dataset import load_image, sample_items
from diffender.classifiers.imagenet import CLASSIFIERS
from diffender.report.__main__ import compare
from diffender.report.page import Answer, card, chart, charts, page, states, table_page
from diffender.report.tables import accuracies, csv_table, markdown
from diffender.utils.errors import InputError
from diffender.utils.formats import as_latex
from diffender.utils.images import save_png, save_stages

HOSTILE = "p<img src=x onerror=alert(1)>"  # a file's name, and a part of each class's
NAMES = [f"class <{i}>{HOSTILE}\"'</script>" for i in range(4)]


def record(i: int, clean: int = 1, attacked: int = 2, restored: int = 1) -> dict:
    attack = {
        "undefended": attacked,
        "defended": [restored, 1, 1],
        "loss": [1.0, 0.5],
        "fooled": [0.0, 1.0],
        "confidence": [0.9, 0.25],
    }
    return {
        "id": f"{HOSTILE}{i}" if i == 3 else f"p{i}",
        "file": f"{HOSTILE}{i}" if i == 3 else f"p{i}",
        "label": 1,
        "undefended": 1,
        "defended": [clean, 1, 1],
        "masked": 0.1,
        "confidence": [0.8, 0.7],
        "attacks": {"advp/transfer": attack, "advp/full": attack | {"defended": [restored, restored, 1]}},
    }


RECORDS = [record(0), record(1, restored=3), record(2, clean=0), record(3, attacked=1)]


def results() -> dict:
    p = {"right": 3.0, "n": 4, "accuracy": 0.75, "low": 0.3, "high": 0.95}
    row = {"undefended": p, "single": p, "average": p, "worst": p, "majority": p}
    rows = [row | {"attack": "none", "gradient": ""}, row | {"attack": "strongest on each image", "gradient": ""}]
    checks = [{"name": "a & b", "figure": "1", "wanted": "", "passed": passed} for passed in (True, False, None)]
    told = {"setting": "s", "seed": 0, "machine": "m", "date": "d", "command": "python evaluate.py --name <x>"}
    told |= {"curves": {"theta": {"at": [2.0, 2.5], "none": [1.0, 0.5]}, "area": {"at": []}}}
    told |= {"seconds": 1.0, "unet_evaluations": 9}
    return told | {"rows": rows, "defense": "D", "verdicts": 3, "votes": 3, "trust": checks}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run") / "images"
    photo = load_image(sample_items()[0].path, CLASSIFIERS["efficientnet_lite0"])
    names, photos = [r["file"] for r in RECORDS], photo.expand(len(RECORDS), -1, -1, -1)
    blocks = F.interpolate(F.avg_pool2d(photos[:, :1], 8), 224)
    shared = {"restored": photos, "mask": blocks.round(), "heatmap": blocks}
    save_stages(folder, names, {"clean": photos} | shared)
    for variant in RECORDS[0]["attacks"]:
        save_stages(folder / variant, names, {"attacked": photos} | shared)
    return page(results(), RECORDS, folder, NAMES, {"attack": "<b>"})


def test_accuracies_as_csv_and_latex():
    first, *rows = csv.DictReader(io.StringIO(csv_table(results())))
    assert first == {"attack": "none", "gradient": "", "verdict": "undefended"} | {
        "right": "3.0",
        "n": "4",
        "accuracy": "0.75",
        "low": "0.3",
        "high": "0.95",
    }
    assert len(rows) == 9
    told = results() | {"defense": "fnc_a"}
    lines = as_latex(*accuracies(told)).splitlines()
    assert lines[0] == r"\begin{tabular}{llrrrrrr}"
    assert lines[2].startswith(r"attack & gradient & undefended & fnc\_a, single & average")
    assert lines[-3].startswith(r"strongest on each image &  & 75.0 \% (3/4; 30-95)")
    assert all(line.count("&") == 7 and line.endswith(r" \\") for line in (lines[2], *lines[4:-2]))


def test_every_number_stands_under_its_head():
    p = lambda accuracy: {"right": accuracy, "n": 1, "accuracy": accuracy, "low": 0.0, "high": 1.0}  # noqa: E731
    heads = {"undefended": "undefended", "single": "D, single", "average": "average", "worst": "worst of 3"}
    heads["majority"] = "majority of 3"
    row = {name: p(i / 10) for i, name in enumerate(heads, start=1)} | {"attack": "advp", "gradient": "full"}
    scores = {"area": 0.05, "recall": 0.1, "precision": 0.2, "iou": 0.3, "auc": 0.4, "queries": 50, "seconds": 6.0}
    text = markdown(results() | {"rows": [row], "masks": {"advp/full": scores}, "masked_clean": None})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    main, masks = (dict(zip(lines[i], lines[i + 2], strict=True)) for i in (0, 3))
    assert [main[head].split()[0] for head in heads.values()] == ["10.0", "20.0", "30.0", "40.0", "50.0"]
    named = ("patched", "recall", "precision", "IoU", "AUC of the map", "passes", "seconds an image")
    assert [masks[head] for head in named] == ["5.0 %", "0.100", "0.200", "0.300", "0.400", "50", "6.0"]


def test_accuracy_over_the_steps_falls_where_the_attack_fools(monkeypatch):
    drawn = {}
    draw = lambda title, curves, *_, **how: drawn.update({title: curves}) or []  # noqa: E731
    monkeypatch.setattr("diffender.report.page.chart", draw)
    charts(results(), RECORDS)
    (right,) = (curves for title, curves in drawn.items() if title.startswith("accuracy that the attack saw"))
    assert right == {"advp/transfer": [100, 0], "advp/full": [100, 0]}


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
        assert attrs.get("src", "data:").startswith("data:")
        assert attrs.get("href", "images/").startswith("images/"), "files of the run"
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
    assert "</span> 25&nbsp;% (3 of 3)" in html, "how sure the classifier is"


def test_an_image_fails_by_one_attack_of_several():
    one = record(0)
    one["attacks"]["advp/full"]["defended"] = [3, 1, 1]
    assert states(one) == ["failed", "rescued"]


def test_answers_are_of_what_they_stand_under(tmp_path):
    """Attacked: the classifier alone; restored: the first purification, and how many others agree."""
    for stage in ("attacked", "restored"):
        save_png(torch.zeros(3, 8, 8), tmp_path / f"images/advp/full/p0_{stage}.png")
    row = card(record(0, attacked=2, restored=3), tmp_path / "images", NAMES)["rows"][-1]
    restored = Answer(NAMES[3], False, 0.25)
    assert {f["name"]: f["answer"] for f in row["figures"]} == {
        "attacked": Answer(NAMES[2], False, 0.9),
        "restored": restored,
    }
    assert row["verdict"] == restored._replace(agree=2, votes=3)


def test_curves_are_drawn_where_there_are_any(html):
    titles = re.findall(r'aria-label="([^"]*)"', html)
    assert [t for t in titles if "accuracy" in t or "loss" in t] == [
        "accuracy that the attack saw, in per cent",
        "attacker&#39;s loss, mean over images",
        "accuracy of these patches at other thresholds, in per cent",
    ]
    assert re.search(r">\s*2.5\s*</text>", html)


@pytest.mark.parametrize("width", [400, 1300, 2000])
def test_the_page_in_a_browser(html, tmp_path, browser, width):
    """Filters, choice of attack, slider and enlargement, by mouse and keyboard; every image is drawn."""
    (tmp_path / "report.html").write_text(html)
    tab = browser.new_page(viewport={"width": width, "height": 900})
    mistakes = []
    tab.on("pageerror", lambda e: mistakes.append(str(e)))
    tab.on("dialog", lambda d: (mistakes.append(d.message), d.dismiss()))  # the hostile name was run
    tab.goto((tmp_path / "report.html").as_uri())

    def visible(selector):
        return tab.locator(selector).filter(visible=True).count()

    for name, count in {"failed": 1, "rescued": 2, "alarm": 1, "every": 4}.items():
        tab.locator(f"#{name}").check()
        assert visible(".card") == count, name
    tab.locator("#every").focus()
    tab.keyboard.press("ArrowRight")
    assert visible(".card") == 1, "by keyboard"
    tab.locator("#every").check()

    assert tab.locator(".card h3").first.inner_text().startswith("p1 "), "the worst comes first"
    card = tab.locator(".card").first
    for place in ("h3", ".picks label", "figcaption"):
        assert f"{HOSTILE}\"'</script>" in card.locator(place).first.inner_text(), "names are told as they are"
    assert tab.locator("[onerror]").count() == 0
    shown = card.locator(".attacks > [data-row]").filter(visible=True)
    assert [shown.nth(i).get_attribute("data-row") for i in range(2)] == ["advp/transfer", "advp/full"]
    assert shown.count() == 2
    clean, one, two = (e.bounding_box() for e in (card.locator(".clean"), shown.first, shown.last))
    if width == 400:
        assert clean["y"] + clean["height"] <= one["y"] and one["y"] + one["height"] <= two["y"], "stacked"
    else:
        assert clean["x"] + clean["width"] <= one["x"] and one["x"] + one["width"] <= two["x"], "side by side"
        assert one["y"] == two["y"]
    card.get_by_role("checkbox", name="no patch").check()
    card.get_by_role("checkbox", name="advp/transfer").uncheck()
    assert [shown.nth(i).get_attribute("data-row") for i in range(2)] == ["no patch", "advp/full"]
    tab.locator("[data-every='advp/full']").uncheck()
    assert tab.locator(".attacks > [data-row='advp/full']:not([hidden])").count() == 0
    tab.locator("[data-every='advp/full']").check()
    assert tab.locator(".attacks > [data-row='advp/full']:not([hidden])").count() == 4

    slider = shown.first.locator("input[type=range]")
    slider.fill("30")
    assert shown.first.locator(".pair").evaluate("e => e.style.getPropertyValue('--cut')") == "30%"
    card.locator(".enlarge").first.press("Enter")
    assert tab.locator("#large").is_visible()
    assert tab.locator("#large img").bounding_box()["width"] > min(250, 0.8 * width)
    tab.keyboard.press("Escape")
    assert not tab.locator("#large").is_visible()
    assert card.locator("a").first.get_attribute("href") == "images/p1_clean.png"
    drawn = "() => [...document.images].filter(i => i.src && i.complete && !i.naturalWidth).length"
    assert tab.evaluate(drawn) == 0
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    assert mistakes == []
    tab.close()


def test_without_javascript_every_attack_is_shown(html, tmp_path, browser):
    (tmp_path / "report.html").write_text(html)
    tab = browser.new_page(java_script_enabled=False)
    tab.goto((tmp_path / "report.html").as_uri())
    rows = tab.locator(".card").first.locator(".attacks > .row")
    assert rows.count() == rows.filter(visible=True).count() == 1 + len(RECORDS[0]["attacks"])
    assert tab.locator(".picks").filter(visible=True).count() == 0
    tab.close()


def test_a_table_leads_to_its_runs(html, tmp_path, browser):
    run, table = tmp_path / "tables" / "<b> #1", tmp_path / "table1"
    run.mkdir(parents=True)
    (run / "report.html").write_text(html)
    table.mkdir()
    text = "| defence | advp |\n| --- | --- |\n| D | **1** |\n\nWhat was run.\n"
    (table / "report.html").write_text(table_page("Table <1>", text, {"the <run>": run}, table))
    tab = browser.new_page()
    tab.goto((table / "report.html").as_uri())
    assert [tab.locator(s).inner_text() for s in ("h1", "td b")] == ["Table <1>", "1"]
    assert tab.get_by_text("The pictures of a run are on its own page.").is_visible()
    tab.get_by_role("link", name="the <run>").click()
    tab.wait_for_url((run / "report.html").as_uri())
    assert tab.locator("h1").inner_text() == "D under attack"
    assert tab.locator(".card").count() == len(RECORDS)
    tab.close()


def contrast(one: str, two: str) -> float:
    """Of two colours as the browser tells them, by WCAG 2."""

    def luminance(colour):
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_the_dark_and_on_paper(html, tmp_path, browser, scheme):
    (tmp_path / "report.html").write_text(html)
    tab = browser.new_page(color_scheme=scheme)
    tab.goto((tmp_path / "report.html").as_uri())

    def colour(selector, of="color"):
        return tab.locator(selector).first.evaluate(f"e => getComputedStyle(e).{of}")

    def legible():
        """All kinds of text on the page's background, which is returned."""
        paper = colour("body", "backgroundColor")
        inks = {s: colour(s) for s in ("body", "h3", "th", "td", "a", "code", ".soft", ".good", ".bad")}
        inks[".charts text"] = colour(".charts text", "fill")
        assert {kind: ink for kind, ink in inks.items() if contrast(ink, paper) < 4.5} == {}
        return paper

    assert contrast(legible(), "rgb(0, 0, 0)" if scheme == "dark" else "rgb(255, 255, 255)") < 1.5
    tab.emulate_media(media="print")
    assert legible() == "rgb(255, 255, 255)"
    assert tab.locator("input, label").filter(visible=True).count() == 0, "controls"
    cards = tab.locator(".card").filter(visible=True)
    assert cards.count() == len(RECORDS)
    for each in cards.all():
        assert each.evaluate("e => getComputedStyle(e).contentVisibility") == "visible", "laid out, out of sight too"
        assert each.locator("img").filter(visible=True).count() == 9, "clean, and four of each attack"
    drawn = "images => images.every(image => image.complete && image.naturalWidth)"
    assert tab.locator(".card img").evaluate_all(drawn), "loaded, though nobody has scrolled there"
    tab.close()


def test_a_page_of_512_images_stays_light(html):
    assert len(html) / len(RECORDS) < 200_000, "100 MB in all, with two attacks"


def test_curves():
    assert chart("empty", {"a": [1.0]}, "steps") == []
    curves = {"a": [1.0, 1.0], "b": [0.0, 2.0, 1.0]}
    (drawn,) = chart("flat", curves, "steps")
    assert drawn.svg.count('id="curve"') == 2
    assert "nan" not in drawn.svg
    assert drawn == chart("flat", curves, "steps")[0], "the same every time"


def test_two_runs_are_compared_picture_by_picture(tmp_path):
    worse = [record(0), record(1, restored=3), record(2, restored=3), record(9)]
    worse[2]["attacks"]["advp/full"]["defended"] = [1, 1, 1]
    for name, records in (("a", RECORDS), ("b", worse), ("c", [record(7)])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "per_image.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = compare(tmp_path / "a", tmp_path / "b").splitlines()
    assert lines[0] == "| 3 images | a right | b right | only a | only b | p |"
    assert lines[2:6] == [
        "| none | 66.7 % (2/3; 21-94) | 100.0 % (3/3; 44-100) | 0 | 1 | 1 |",
        "| advp/transfer | 66.7 % (2/3; 21-94) | 33.3 % (1/3; 6-79) | 1 | 0 | 1 |",
        "| advp/full | 66.7 % (2/3; 21-94) | 66.7 % (2/3; 21-94) | 0 | 0 | 1 |",
        "| strongest | 66.7 % (2/3; 21-94) | 33.3 % (1/3; 6-79) | 1 | 0 | 1 |",  # right under both
    ]
    assert lines[-1].endswith(": first purifications, Wilson intervals of 95 %; p: McNemar, exact.")
    (tmp_path / "a" / "config.json").write_text('{"defense": "diffender", "theta": 2.0, "area": 0.05, "hide": "max"}')
    (tmp_path / "b" / "config.json").write_text('{"defense": "jpeg", "theta": 2.5, "area": 0.9, "hide": "mean"}')
    text = compare(tmp_path / "a", tmp_path / "b")
    assert text.startswith("| 3 images | DIFFender right | jpeg right | only DIFFender")
    assert text.endswith("exact. **The attackers differ**: area (0.05 and 0.9), hide (max and mean).\n")
    with pytest.raises(InputError, match="share no images"):
        compare(tmp_path / "a", tmp_path / "c")
