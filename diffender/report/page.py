"""Pages that need no network and no server: a run with its table, checks, curves and images; a table of the paper; and
photographs that were defended.

The page itself is page.html, a Jinja template, and page.css. The worst images come first. Images are inlined, reduced
to 224 pixels (photographs to 448), and link to their files, which a click shows enlarged; cards that are out of sight
are not laid out, so that hundreds stay light.
"""

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from diffender.classifiers.dataset import as_rgb, turned
from diffender.evaluation.metrics import counted
from diffender.report.tables import accuracies, cost
from diffender.utils.files import sha256
from diffender.utils.images import stage_files

WIDTH = 224  # of an image on the page
HERE = Path(__file__).parent
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2")
GREY = "#64748b"  # without a patch, or without a defence
# Of charts: text that stays text, lines that are seen on white and on black.
STYLE = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
FILTERS = {"every": "all", "failed": "failed under attack", "rescued": "rescued", "alarm": "false alarms"}
MASKED = {"every": "all", "masked": "something is masked", "untouched": "untouched", "changed": "read differently"}


class Chart(NamedTuple):
    title: str
    svg: Markup


class Answer(NamedTuple):
    """What the classifier said of one image."""

    name: str  # of the class
    right: bool | None  # None where nobody knows
    confidence: float | None = None
    agree: int = 1  # purifications with this answer
    votes: int = 1  # purifications in all


def inline(path: Path, width: int = WIDTH) -> str:
    """An image as a data URI, the right way up: photographs as JPEG, maps and masks as PNG in grey."""
    with Image.open(path) as image:
        image = turned(image)
        grey = image.mode in ("L", "1")
        image = image.convert("L") if grey else as_rgb(image)
        image.thumbnail((width, width))
        buffer = io.BytesIO()
        image.save(buffer, **({"format": "PNG", "optimize": True} if grey else {"format": "JPEG", "quality": 82}))
    kind = "png" if grey else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chart(
    title: str,
    curves: dict[str, Sequence[float]],
    axis: str,
    at: Sequence[float] = (),
    span: tuple[float, float] | None = None,
    colours: Mapping[str, str] = MappingProxyType({}),
) -> list[Chart]:
    """Lines over the numbers `at`, or over their own index, as an inline SVG; `span` fixes the scale.

    A list of one chart; empty where no curve has two points.
    """
    curves = {name: values for name, values in curves.items() if len(values) > 1}
    if not curves:
        return []
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(4.4, 2.2), layout="constrained")
        axes = figure.subplots()
        for (name, values), usual in zip(curves.items(), COLOURS * len(curves), strict=False):
            x = list(at) or range(len(values))
            axes.plot(x, values, color=colours.get(name, usual), label=name, gid="curve", marker="." if at else "")
        axes.set_xlabel(axis)
        if span:
            margin = (span[1] - span[0]) / 30
            axes.set_ylim(span[0] - margin, span[1] + margin)
        if at:
            axes.set_xticks(at, [f"{v:g}" for v in at])
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return [Chart(title, Markup(text[text.index("<svg") :]))]  # without the head that a file would have


def along_steps(records: Sequence[dict], what: str) -> dict[str, list[float]]:
    """`loss` or `fooled` of each attack along its steps, mean over images."""
    found: dict[str, list[list[float]]] = {}
    for record in records:
        for variant, attack in record["attacks"].items():
            found.setdefault(variant, []).append(attack.get(what, []))
    return {name: [sum(step) / len(step) for step in zip(*rows, strict=False)] for name, rows in found.items()}


def charts(results: dict, records: Sequence[dict]) -> list[Chart]:
    """Over the attacks' steps, and over theta and the patch's size where --curves asked for them."""
    steps, percent = "steps, evenly thinned", (0, 100)
    loss = along_steps(records, "loss")
    colours = dict(zip(loss, COLOURS * len(loss), strict=False))  # the same attack has the same one everywhere
    right = {name: [100 - 100 * v for v in values] for name, values in along_steps(records, "fooled").items()}
    drawn = chart("accuracy that the attack saw, in per cent", right, steps, span=percent, colours=colours)
    drawn += chart("attacker's loss, mean over images", loss, steps, colours=colours)
    titles = {
        "theta": ("accuracy of these patches at other thresholds, in per cent", "theta"),
        "area": ("accuracy under patches of other sizes, made anew, in per cent", "share of the image"),
    }
    for axis, (title, label) in titles.items():
        columns = dict(results.get("curves", {}).get(axis, {}))
        at = columns.pop("at", ())
        columns = {name: [100 * v for v in values] for name, values in columns.items()}
        drawn += chart(title, columns, label, at, percent, dict.fromkeys(columns, GREY) | colours)
    return drawn


def headline(results: dict) -> str:
    """The run in two sentences."""
    last = results["rows"][-1]
    n = last["single"]["n"]
    if last["attack"] == "none":
        return f"No attack. {results['defense']} leaves {counted(last['single'])} of {n} clean images right."
    bound = "Other patches may do more harm: these are upper bounds."
    if "certified" in last:
        bound += f" Certified are {counted(last['certified'])}: no pixels at the patch's place can change that answer."
    alone = f", and the undefended classifier {counted(last['undefended'])}"
    return (
        f"Under the strongest patch made for each of {n} images, {results['defense']} leaves "
        f"{counted(last['single'])} right{alone if results.get('undefended', 'undefended') == 'undefended' else ''}. "
        f"Clean: {counted(results['rows'][0]['single'])}. {bound}"
    )


def states(record: dict) -> list[str]:
    """The filters of the page that show this image."""
    attacks, label = record["attacks"].values(), record["label"]
    found = ["failed"] if any(a["defended"][0] != label for a in attacks) else []
    if any(a["undefended"] != label == a["defended"][0] for a in attacks):
        found.append("rescued")
    if record["defended"][0] != label:
        found.append("alarm")
    return found


def card(record: dict, folder: Path, names: Sequence[str]) -> dict:
    """One image for the template: the clean photograph, and a row for each attack and for none, with its stages, what
    is seen in them and the answer to it. `folder` holds the images of the run."""
    label = record["label"]

    def answer(c: int, confidence: float | None = None) -> Answer:
        return Answer(names[c], c == label, confidence)

    def row(name: str, found: dict, variant: str = "") -> dict:
        alone, sure = found["confidence"]
        seen = found["defended"]
        restored = answer(seen[0], sure)
        told = {"attacked": answer(found["undefended"], alone), "restored": restored}
        files = stage_files(folder, record, variant)
        shown = [figure(s, f, folder, told.get(s)) for s, f in files.items() if s != "clean"]
        before = "attacked" if variant else "clean"
        verdict = restored._replace(agree=seen.count(seen[0]), votes=len(seen))
        return {"name": name, "figures": shown, "before": before if "restored" in files else None, "verdict": verdict}

    clean, _ = record["confidence"]
    photograph = stage_files(folder, record).get("clean")
    rows = [row("no patch", record), *(row(name, a, name) for name, a in record["attacks"].items())]
    return {
        "id": record["id"],
        "label": f"is {names[label]}",
        "states": states(record),
        "clean": [figure("clean", photograph, folder, answer(record["undefended"], clean))] if photograph else [],
        "rows": rows,
        "shown": {rows[min(1, len(rows) - 1)]["name"], rows[-1]["name"]},  # at first: who knows nothing, who knows most
    }


def figure(stage: str, file: Path, folder: Path, told: Answer | None, width: int = WIDTH) -> dict:
    """An image for the template, and where its file lies from the page, which is beside `folder`."""
    return {"name": stage, "uri": inline(file, width), "file": link(file, folder.parent), "answer": told}


def link(file: Path, folder: Path) -> str:
    """Where a file lies from a page in this folder. Its name may be no UTF-8."""
    return quote(os.fsencode(Path(os.path.relpath(file, folder)).as_posix()))


def harm(record: dict) -> float:
    """The share of purifications, over all attacks, that are read wrong."""
    seen = [c != record["label"] for a in record["attacks"].values() for c in a["defended"]]
    return sum(seen) / max(1, len(seen))


def page(results: dict, records: Sequence[dict], folder: Path, names: Sequence[str], config: dict) -> str:
    """A run of evaluate.py; `folder` holds the images of the stages."""
    head, rows = accuracies(results)
    return render(
        title=f"{results['defense']} under attack",
        headline=formatted(headline(results)),
        told=f"{results['setting']}, seed {results['seed']}, {cost(results)}.",
        command=results["command"],
        tables=[table("Accuracy", head, rows, "In per cent, with counts and Wilson intervals of 95 %.")],
        trust=results.get("trust"),
        charts=charts(results, records),
        filters=counted_filters(FILTERS, [states(r) for r in records]),
        attacks=["no patch", *dict.fromkeys(name for r in records for name in r["attacks"])],
        cards=[card(r, folder, names) for r in sorted(records, key=harm, reverse=True)],
        settings=config,
    )


def table_page(title: str, text: str, runs: Mapping[str, Path], folder: Path) -> str:
    """A table.md that lies in `folder`, with links to the runs behind its rows, by name. A note follows each of its
    tables: the accuracies, and the defences beside DIFFender."""
    blocks = text.strip().split("\n\n")
    tables = []
    for name, block, note in zip(("Accuracy", "Beside DIFFender"), blocks[::2], blocks[1::2], strict=False):
        head, _, *rows = (line[2:-2].split(" | ") for line in block.splitlines())
        tables.append(table(name, head, rows, note.replace("`", "")))
    hrefs = {name: link(run / "report.html", folder) for name, run in runs.items()}
    return render(title=title, tables=tables, runs=hrefs)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> dict:
    """A table for the template; its cells are Markdown."""
    return {"title": title, "head": head, "rows": [[formatted(cell) for cell in row] for row in rows], "note": note}


def formatted(cell: str) -> Markup:
    """Text of Markdown for the page: bold is kept, and no line breaks within brackets."""
    text = Markup(re.sub(r"\([^)]*\)( =)?", r'<span class="whole">\g<0></span>', str(escape(cell.strip("*")))))
    return Markup("<b>{}</b>").format(text) if cell.startswith("**") else text


def photographs_page(records: Sequence[dict], folder: Path, config: dict, command: str) -> str:
    """What `defend` left in `folder`: each photograph, its map, its mask and what was restored."""
    masked = [r["masked"] for r in records if r["masked"]]
    area = f", {100 * sum(masked) / len(masked):.1f} % of their pixels on average" if masked else ""
    kept = config.get("composite", True)
    outside = "Outside of the mask, photographs stay as they were." if kept else "All pixels were painted anew."
    filters = MASKED if any("before" in r for r in records) else {k: v for k, v in MASKED.items() if k != "changed"}
    return render(
        title="Photographs, defended",
        headline=f"In {len(masked)} of {len(records)} photographs something was masked{area}.",
        told=f"{outside} The map is stretched to its own range.",
        command=command,
        filters=counted_filters(filters, [photograph_states(r) for r in records]),
        cards=[photograph(r, folder) for r in sorted(records, key=lambda r: r["masked"], reverse=True)],
        settings=config,
    )


def photograph_states(record: dict) -> list[str]:
    """The filters of the page that show this photograph."""
    found = ["masked" if record["masked"] else "untouched"]
    if "before" in record and record["before"]["class"] != record["after"]["class"]:
        found.append("changed")
    return found


def photograph(record: dict, folder: Path) -> dict:
    """One photograph for the template, in a single row: before, map, mask, after."""
    files = {s: folder / f"{record['id']}_{s}.png" for s in ("heatmap", "mask", "restored")}
    told = {
        stage: Answer(seen["label"].split(",")[0], None, seen["confidence"])
        for stage, when in (("photograph", "before"), ("restored", "after"))
        if (seen := record.get(when))
    }
    original = Path(record["file"])  # where it was when it was defended; another file may be there now
    there = original.is_file() and sha256(original) == record["sha256"]
    stages = ({"photograph": original} if there else {}) | files
    shown = [figure(s, f, folder / "images", told.get(s), 2 * WIDTH) for s, f in stages.items() if f.is_file()]
    name = "what was masked"
    return {
        "id": record["id"],
        "label": f"{100 * record['masked']:.1f} % masked, largest z-score {record['largest_z_score']}",
        "states": photograph_states(record),
        "clean": [],
        "rows": [{"name": name, "figures": shown, "before": "photograph" if there else None}],
        "shown": {name},
    }


def counted_filters(titles: Mapping[str, str], found: Sequence[Sequence[str]]) -> list[dict]:
    """The filters with the number of images, of `found` their states, that each shows; the first shows all."""
    every = next(iter(titles))
    return [
        {"name": k, "title": title, "count": len(found) if k == every else sum(k in s for s in found)}
        for k, title in titles.items()
    ]


def render(settings: Mapping[str, object] = MappingProxyType({}), **parts: object) -> str:
    """The whole document. What is not among the parts is left out of it."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text("utf-8")),
        settings={k: json.dumps(v) for k, v in settings.items()},
        **{"tables": [], "filters": [], "attacks": [], **parts},
    )
