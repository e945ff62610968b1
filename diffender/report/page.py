"""A run as one page that needs no network and no server: verdict, table, checks, curves, every image.

    python -m diffender.report page runs/NAME     write report.html there anew

Images are inlined, reduced to 224 pixels; cards that are out of sight are not laid out, so that hundreds stay light.
"""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from diffender.report.tables import accuracies, counted
from diffender.utils.images import STAGES

WIDTH = 224  # of an image on the page
CURVE = (420, 190)  # of a chart
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2")
GREY = "#64748b"  # without a patch, or without a defence

STYLE = Path(__file__).with_suffix(".css")

# The slider shows the card's own images again, which are inlined once.
SCRIPT = """
document.querySelectorAll('.slide').forEach(slide => {
  slide.querySelectorAll('img').forEach(i => { i.src = slide.closest('.card').querySelector('.' + i.alt + ' img').src })
  const pair = slide.querySelector('.pair')
  slide.querySelector('input').addEventListener('input', e => pair.style.setProperty('--cut', e.target.value + '%'))
  slide.hidden = false
})
"""


def inline(path: Path) -> str:
    """An image as a data URI: photographs as JPEG, maps and masks as PNG in grey."""
    with Image.open(path) as image:
        grey = image.mode in ("L", "1")
        image = image.convert("L" if grey else "RGB")
        image.thumbnail((WIDTH, WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, **({"format": "PNG", "optimize": True} if grey else {"format": "JPEG", "quality": 82}))
    kind = "png" if grey else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def chart(
    title: str,
    curves: dict[str, Sequence[float]],
    axis: str,
    at: Sequence[float] = (),
    span: tuple[float, float] | None = None,
    colours: dict[str, str] | None = None,
) -> str:
    """Lines over the numbers `at`, evenly spaced, or over their own index, as an inline SVG; `span` fixes the scale."""
    curves = {name: values for name, values in curves.items() if len(values) > 1}
    if not curves:
        return ""
    (width, height), pad = CURVE, 34
    every = [v for values in curves.values() for v in values]
    low, high = span or (min(every), max(every))
    high = high if high > low else low + 1

    def across(i: int, n: int) -> float:
        return pad + i * (width - pad - 16) / (n - 1)

    def point(i: int, n: int, value: float) -> str:
        return f"{across(i, n):.1f},{8 + (height - pad - 8) * (high - value) / (high - low):.1f}"

    parts = [f"<line class=axis x1={pad} x2={width - 8} y1={y} y2={y} />" for y in (8, height - pad)]
    ends = (high, 12), (low, height - pad + 4)
    parts += [f"<text x={pad - 4} y={y} text-anchor=end>{v:.3g}</text>" for v, y in ends]
    parts += [
        f"<text x={across(i, len(at)):.0f} y={height - pad + 14} text-anchor=middle>{v:g}</text>"
        for i, v in enumerate(at)
    ]
    parts.append(f"<text x={width / 2} y={height - 4} text-anchor=middle>{escape(axis)}</text>")
    legend = []
    for (name, values), usual in zip(curves.items(), COLOURS * len(curves), strict=False):
        colour = (colours or {}).get(name, usual)
        points = " ".join(point(i, len(values), v) for i, v in enumerate(values))
        parts.append(f'<polyline fill=none stroke="{colour}" stroke-width=2 points="{points}" />')
        legend.append(f'<span class=key><span style="color:{colour}">&#9632;</span> {escape(name)}</span>')
    size = f'viewBox="0 0 {width} {height}" width={width}'
    svg = f'<svg role=img aria-label="{escape(title)}" {size}>{"".join(parts)}</svg>'
    return (
        f"<figure style='width:{width}px'>{svg}<figcaption>{escape(title)}: {', '.join(legend)}</figcaption></figure>"
    )


def along_steps(records: Sequence[dict], what: str) -> dict[str, list[float]]:
    """`loss` or `fooled` of each attack along its steps, mean over images."""
    found: dict[str, list[list[float]]] = {}
    for record in records:
        for variant, attack in record["attacks"].items():
            found.setdefault(variant, []).append(attack.get(what, []))
    return {name: [sum(step) / len(step) for step in zip(*rows, strict=False)] for name, rows in found.items()}


def charts(results: dict, records: Sequence[dict]) -> str:
    """Over the attacks' steps, and over theta and the patch's size where --curves asked for them."""
    steps, percent = "steps, evenly thinned", (0, 100)
    loss = along_steps(records, "loss")
    colours = dict(zip(loss, COLOURS * len(loss), strict=False))  # the same attack has the same one everywhere
    right = {name: [100 - 100 * v for v in values] for name, values in along_steps(records, "fooled").items()}
    drawn = [
        chart("accuracy that the attack saw, in per cent", right, steps, span=percent, colours=colours),
        chart("attacker's loss, mean over images", loss, steps, colours=colours),
    ]
    titles = {
        "theta": ("accuracy of these patches at other thresholds, in per cent", "theta"),
        "area": ("accuracy under patches of other sizes, made anew, in per cent", "share of the image"),
    }
    for axis, (title, label) in titles.items():
        columns = dict(results.get("curves", {}).get(axis, {}))
        at = columns.pop("at", ())
        columns = {name: [100 * v for v in values] for name, values in columns.items()}
        drawn.append(chart(title, columns, label, at, percent, dict.fromkeys(columns, GREY) | colours))
    return "".join(drawn)


def headline(results: dict) -> str:
    """The run in two sentences."""
    last = results["rows"][-1]
    n = last["single"]["n"]
    if last["attack"] == "none":
        return f"No attack. {results['defense']} leaves {counted(last['single'])} of {n} clean images right."
    return (
        f"Under the strongest patch made for each of {n} images, {results['defense']} leaves "
        f"{counted(last['single'])} right, and the undefended classifier {counted(last['undefended'])}. Clean: "
        f"{counted(results['rows'][0]['single'])}. Other patches may do more harm: these are upper bounds."
    )


def states(record: dict) -> list[str]:
    """What an image is filtered by."""
    attacks, label = record["attacks"].values(), record["label"]
    found = ["failed"] if any(a["defended"][0] != label for a in attacks) else []
    if any(a["undefended"] != label == a["defended"][0] for a in attacks):
        found.append("rescued")
    if record["defended"][0] != label:
        found.append("alarm")
    return found


def seen(
    answer: int, label: int, names: Sequence[str], votes: Sequence[int] = (), confidence: float | None = None
) -> str:
    """A class in words, ticked or crossed, how sure the classifier is of it, and how many purifications agree."""
    tally = f" ({sum(v == answer for v in votes)} of {len(votes)})" if len(votes) > 1 else ""
    sure = "" if confidence is None else f" {100 * confidence:.0f} %"
    kind, sign = ("good", "&#10003;") if answer == label else ("bad", "&#10007;")
    return f"<span class={kind}>{sign}&nbsp;{escape(names[answer].split(',')[0])}</span>{sure}{tally}"


def card(record: dict, folder: Path, names: Sequence[str]) -> str:
    """One image: its stages under the last attack, what is seen in each, all attacks in a line."""
    label, attacks = record["label"], record["attacks"]
    last = list(attacks.values())[-1] if attacks else record
    uris = {s: inline(f) for s in STAGES if (f := folder / f"{record['file']}_{s}.png").is_file()}
    clean, attacked = (r.get("confidence", (None, None)) for r in (record, last))
    told = {
        "clean": seen(record["undefended"], label, names, (), clean[0]),
        "attacked": seen(last["undefended"], label, names, (), attacked[0]),
        "restored": seen(last["defended"][0], label, names, last["defended"], attacked[1]),
    }
    parts = [
        f'<figure class={stage}><img loading=lazy alt="{stage}" src="{uri}"><figcaption>{stage} {told.get(stage, "")}'
        "</figcaption></figure>"
        for stage, uri in uris.items()
    ]
    before = "attacked" if "attacked" in uris else "clean"
    if {before, "restored"} <= set(uris):
        parts.append(
            f'<figure class=slide hidden><div class=pair><img alt="{before}"><img alt="restored"></div>'
            f'<input type=range min=0 max=100 value=50 aria-label="{before} and restored">'
            f"<figcaption>{before} | restored</figcaption></figure>"
        )
    each = "; ".join(f"{escape(k)} {seen(a['defended'][0], label, names, a['defended'])}" for k, a in attacks.items())
    title = f"{escape(record['id'])} <span class=soft>is {escape(names[label].split(',')[0])}</span>"
    clean = seen(record["defended"][0], label, names, record["defended"])
    return (
        f"<section class='card {' '.join(states(record))}'><h3>{title}</h3><div class=row>{''.join(parts)}</div>"
        f"<div class=soft>defended: clean {clean}{'; ' * bool(each)}{each}</div></section>"
    )


def page(results: dict, records: Sequence[dict], folder: Path, names: Sequence[str], config: dict) -> str:
    """The whole document; `folder` holds the images of the stages."""
    top, lines = accuracies(results)
    head, *rows = [[escape(cell) for cell in line] for line in (top, *lines)]
    note = "<p class=soft>In per cent, with counts and Wilson intervals of 95 %.</p>"
    parts = [f"<h2>Accuracy</h2>{table(head, rows)}{note}"]
    if results.get("trust"):
        passed, failed = ("<span class=good>&#10003; pass</span>", "<span class=bad>&#10007; fail</span>")
        signs = {True: passed, False: failed, None: "shown"}
        checks = [[*(escape(c[k]) for k in ("name", "figure", "wanted")), signs[c["passed"]]] for c in results["trust"]]
        parts.append("<h2>Can the evaluation be trusted?</h2>" + table(("check", "figure", "wanted", ""), checks))
    if drawn := charts(results, records):
        parts.append(f"<h2>Curves</h2><div class=charts>{drawn}</div>")
    filters = {"every": "all", "failed": "failed under attack", "rescued": "rescued", "alarm": "false alarms"}
    counts = {name: sum(name in states(r) for r in records) for name in filters} | {"every": len(records)}
    radios = "".join(
        f"<label><input type=radio name=filter id={name}{' checked' * (name == 'every')}> {title} ({counts[name]})"
        "</label>"
        for name, title in filters.items()
    )
    cards = "".join(card(r, folder, names) for r in records)
    parts.append(f"<h2>Images</h2><fieldset><legend class=soft>show</legend>{radios}</fieldset>{cards}")
    settings = [[escape(k), f"<code>{escape(json.dumps(v))}</code>"] for k, v in config.items()]
    parts.append(
        f"<h2>Settings</h2><details><summary>all {len(settings)}</summary>{table(('', ''), settings)}</details>"
    )
    seconds, machine = f"{results['seconds']:.0f} s", escape(results["machine"])
    about = f"{results['setting']}, seed {results['seed']}, {seconds} on {machine}, {results['date']}"
    title = f"{escape(results['defense'])} under attack"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE.read_text('utf-8')}</style><h1>{title}</h1>"
        f"<p class=verdict>{headline(results)}</p><p class=soft>{about}. Again: "
        f"<code>{escape(results['command'])}</code></p>{''.join(parts)}<script>{SCRIPT}</script></html>\n"
    )
