"""From the records of a run to what people read: counts with intervals, a Markdown table, a grid of pictures.

python -m diffender.report README.md docs/*.md            # put the tables of results/ into documents, anew
python -m diffender.report compare runs/A runs/B          # two runs, picture by picture

Torch is imported inside the functions: tables need none.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffender.cli import run
from diffender.errors import InputError
from diffender.files import one_line, whole, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

STAGES = ("clean", "attacked", "heatmap", "mask", "restored")


def save_png(image: Tensor, path: Path) -> None:
    """(C, H, W) in [0, 1] as an 8-bit PNG, which keeps multiples of 1/255 to the bit."""
    from torchvision.transforms.functional import to_pil_image

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        to_pil_image((image.detach().cpu().clamp(0, 1) * 255).round().byte()).save(partial, format="PNG")


def load_png(path: Path) -> Tensor:
    """What `save_png` wrote, as (3, H, W) in [0, 1]."""
    from torchvision.transforms.functional import pil_to_tensor

    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float() / 255


def save_stages(folder: Path, name: str, stages: dict[str, Tensor]) -> None:
    """One PNG a stage: name_clean.png, name_attacked.png, ... from (C, H, W) in [0, 1]."""
    for stage, image in stages.items():
        save_png(image, folder / f"{name}_{stage}.png")


def stretch(heatmap: Tensor, size: Sequence[int]) -> Tensor:
    """A difference map (1, h, w) to its own range [0, 1], enlarged without smoothing: what the localiser sees."""
    import torch

    low, high = heatmap.aminmax()
    scaled = (heatmap - low) / (high - low).clamp_min(1e-8)
    return torch.nn.functional.interpolate(scaled[None], size, mode="nearest")[0]


def counted(p: dict) -> str:
    return f"{100 * p['accuracy']:.1f} % ({p['right']:.0f}/{p['n']}; {100 * p['low']:.0f}-{100 * p['high']:.0f})"


def share(p: dict) -> str:
    return f"{100 * p['accuracy']:.1f} % ({100 * p['low']:.0f}-{100 * p['high']:.0f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def accuracies(results: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the main table: accuracy in per cent with counts and Wilson 95 % intervals."""
    head = ("attack", "gradient", "undefended", f"{results['defense']}, single", "average",
            f"worst of {results['verdicts']}", f"majority of {results['votes']}", "p")  # fmt: skip
    rows = []
    for r in results["rows"]:
        p = f"{r['mcnemar']:.2g}" if "mcnemar" in r else ""
        rows.append((r["attack"], r["gradient"], counted(r["undefended"]), counted(r["single"]),
                     *(share(r[column]) for column in ("average", "worst", "majority")), p))  # fmt: skip
    return head, rows


def markdown(results: dict) -> str:
    """The tables of a run: accuracy, masks, checks, and how it came about."""
    head, rows = accuracies(results)
    if results["masks"]:
        rows = [tuple(f"**{c}**" if c else "" for c in r) if r[0].startswith("strongest") else r for r in rows]
    parts = [table(head, rows)]
    if results["masks"]:
        scores = {"recall": "recall", "precision": "precision", "iou": "IoU", "auc": "AUC of the map"}
        scores = {c: title for c, title in scores.items() if all(c in m for m in results["masks"].values())}
        head = ("masks, means over the pictures", "patched", *scores.values(), "passes", "seconds a picture")
        rows = [(name, f"{100 * m['area']:.1f} %", *(f"{m[c]:.3f}" for c in scores),
                 f"{m['queries']:.0f}", f"{m['seconds']:.1f}") for name, m in results["masks"].items()]  # fmt: skip
        parts.append(table(head, rows))
    if results["masked_clean"] is not None:
        parts.append(f"Masked share of clean pictures: {100 * results['masked_clean']:.1f} %.\n")
    if results.get("trust"):
        parts.append(trust_table(results["trust"]))
    parts.append(
        f"`{results['command']}`: {results['rows'][0]['single']['n']} pictures, {results['setting']}, seed "
        f"{results['seed']}, {results['seconds']:.0f} s and {results['unet_evaluations']} UNet evaluations on "
        f"{results['machine']}, {results['date']}.\n"
    )
    return "\n".join(parts)


def trust_table(checks: Sequence[dict]) -> str:
    """One line a check; a failed one is red."""
    signs = {True: "🟢 pass", False: "🔴 **FAIL**", None: "shown"}
    rows = [(c["name"], c["figure"], c["wanted"], signs[c["passed"]]) for c in checks]
    return table(("can the evaluation be trusted?", "figure", "wanted", ""), rows)


def save_grid(folder: Path, records: Sequence[dict], path: Path, names: Sequence[str], rows: int = 8) -> None:
    """A row a picture: clean, attacked, difference map, mask, restored, with what the classifier sees in each."""
    from matplotlib.figure import Figure

    records = records[:rows]
    stages = [stage for stage in STAGES if (folder / f"{records[0]['file']}_{stage}.png").is_file()]
    figure = Figure(figsize=(2.1 * len(stages), 2.35 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), len(stages), squeeze=False)
    for row, record in zip(axes, records, strict=True):
        for axis, stage in zip(row, stages, strict=True):
            image = Image.open(folder / f"{record['file']}_{stage}.png")
            axis.imshow(image, cmap="inferno" if stage == "heatmap" else "gray", interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(stage, fontsize=8)
            last = list(record["attacks"].values() or [record])[-1]
            seen = {"clean": record["undefended"], "attacked": last["undefended"], "restored": last["defended"][0]}
            if stage in seen:
                answer = seen[stage]
                colour = "green" if answer == record["label"] else "firebrick"
                axis.set_title(f"{stage}: {names[answer].split(',')[0][:20]}", fontsize=8, color=colour)
    save_figure(figure, path, dpi=100)


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    with whole(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")


def class_names() -> list[str]:
    """ImageNet's 1000 class names in order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(info.num_classes())]


def fill(document: str, results: Path) -> str:
    """The document with every NAME/table.md of `results` between its marks, <!-- results/NAME --> and <!-- end -->."""

    def table(match: re.Match) -> str:
        content = (results / match["name"] / "table.md").read_text(encoding="utf-8")
        return f"<!-- results/{match['name']} -->\n{content}<!-- end -->"

    return re.sub(r"<!-- results/(?P<name>[\w-]+) -->\n.*?<!-- end -->", table, document, flags=re.DOTALL)


def read_records(folder: Path, files: str = "per_image*.jsonl") -> list[dict]:
    """The records of all processes, one for each picture; a line that is being written is left out.

    Raises InputError for any other line that is not a record.
    """
    records: dict[str, dict] = {}
    for path in sorted(folder.glob(files)):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                    records.setdefault(record["id"], record)
                except (ValueError, TypeError, KeyError) as e:
                    raise InputError(
                        f"{path}, line {number} is damaged ({one_line(e)}); delete that line and run the same command "
                        "with --name again: its picture is done anew"
                    ) from e
    return list(records.values())


def compare(a: Path, b: Path) -> str:
    """Two runs on the pictures and attacks that they share: who is right where the other is not, by the first
    purification of each; McNemar's exact p. `strongest` counts a picture under all shared attacks.

    Raises InputError where they share no pictures.
    """
    from diffender.metrics import mcnemar

    left, right = ({r["id"]: r for r in read_records(folder)} for folder in (a, b))
    ids = [i for i in left if i in right]
    if not ids:
        raise InputError(f"{a} and {b} share no pictures; compare runs of evaluate.py on the same --data and --seed")
    variants = list(left[ids[0]]["attacks"])
    shared = [v for v in variants if all(v in run[i]["attacks"] for run in (left, right) for i in ids)]

    def is_right(record: dict, attacks: Sequence[str]) -> bool:
        seen = [record["attacks"][v]["defended"][0] for v in attacks] if attacks else [record["defended"][0]]
        return all(c == record["label"] for c in seen)

    rows = []
    for name, attacks in {"none": [], **{v: [v] for v in shared}, **({"strongest": shared} if shared else {})}.items():
        pairs = [(is_right(left[i], attacks), is_right(right[i], attacks)) for i in ids]
        first, second = (sum(column) for column in zip(*pairs, strict=True))
        only = sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
        rows.append((name, *map(str, (first, second, *only)), f"{mcnemar(pairs):.2g}"))
    head = (f"{len(ids)} pictures", f"{a.name} right", f"{b.name} right", f"only {a.name}", f"only {b.name}", "p")
    return table(head, rows)


def main() -> None:
    what, *rest = sys.argv[1:] or [""]
    if what in ("", "-h", "--help"):
        print(__doc__)
        return
    if what == "compare":
        if len(rest) != 2 or not all((Path(folder) / "config.json").is_file() for folder in rest):
            raise InputError(f"compare {' '.join(rest)}: give two folders that evaluate.py wrote")
        print(compare(*map(Path, rest)), end="")
        return
    for path in map(Path, sys.argv[1:]):
        if not path.is_file():
            raise InputError(f"no document {path}; give Markdown files, or compare and two folders of runs")
        write_text(path, fill(path.read_text(encoding="utf-8"), Path("results")))


if __name__ == "__main__":
    run(main)
