"""From the records of a run to what people read: counts with intervals, a Markdown table, a grid of pictures.

python -m diffender.report README.md docs/choices.md      # put the tables of results/ into documents, anew
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

STAGES = ("clean", "attacked", "heatmap", "mask", "restored")


def save_stages(folder: Path, name: str, stages: dict[str, Tensor]) -> None:
    """One PNG a stage: name_clean.png, name_attacked.png, ... from (C, H, W) in [0, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, image in stages.items():
        to_pil_image((image.clamp(0, 1) * 255).round().byte()).save(folder / f"{name}_{stage}.png")


def stretch(heatmap: Tensor, size: tuple[int, int]) -> Tensor:
    """A difference map (1, h, w) to its own range [0, 1], enlarged without smoothing: what the localiser sees."""
    low, high = heatmap.aminmax()
    scaled = (heatmap - low) / (high - low).clamp_min(1e-8)
    return torch.nn.functional.interpolate(scaled[None], size, mode="nearest")[0]


def cell(p: dict | None) -> str:
    if p is None:
        return ""
    return f"{100 * p['accuracy']:.1f} % ({p['right']}/{p['n']}; {100 * p['low']:.0f}-{100 * p['high']:.0f})"


def markdown(results: dict) -> str:
    """The table of a run: accuracy in per cent (right/all; Wilson 95 % interval), then masks and cost."""
    lines = [f"| model | clean | {results['attack']} |", "|---|---|---|"]
    for row in results["rows"]:
        lines.append(f"| {row['name']} | {cell(row.get('clean'))} | {cell(row.get('robust'))} |")
    if "masks" in results:
        lines += [
            "",
            "| masks, means over the pictures | recall | precision | IoU | AUC of the difference map |",
            "|---" * 5 + "|",
        ]
        for name, which in (
            ("patches made on the undefended classifier", "transfer"),
            ("adaptive patches", "attacked"),
        ):
            m = results["masks"][which]
            lines.append(f"| {name} | {m['recall']:.3f} | {m['precision']:.3f} | {m['iou']:.3f} | {m['auc']:.3f} |")
        lines += ["", f"Masked share of clean pictures: {100 * results['clean_area']:.1f} %."]
    lines += [
        "",
        f"`{results['command']}`: {results['rows'][0]['clean']['n']} pictures, seed {results['seed']}, "
        f"{results['seconds']:.0f} s and {results['unet_evaluations']} UNet evaluations on {results['machine']}, "
        f"{results['date']}.",
    ]
    return "\n".join(lines) + "\n"


def save_grid(folder: Path, records: Sequence[dict], path: Path, names: Sequence[str], rows: int = 8) -> None:
    """A row a picture: clean, attacked, difference map, mask, restored, with what the classifier sees in each."""
    from matplotlib.figure import Figure

    records = records[:rows]
    attacked = "defended_attacked" in records[0]
    stages = [stage for stage in STAGES if attacked or stage != "attacked"]
    seen = {"clean": "undefended_clean", "attacked": "undefended_attacked"}
    seen["restored"] = "defended_attacked" if attacked else "defended_clean"
    figure = Figure(figsize=(2.1 * len(stages), 2.35 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), len(stages), squeeze=False)
    for row, record in zip(axes, records, strict=True):
        for axis, stage in zip(row, stages, strict=True):
            image = Image.open(folder / f"{record['file']}_{stage}.png")
            axis.imshow(image, cmap="inferno" if stage == "heatmap" else "gray", interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(stage, fontsize=8)
            if stage in seen:
                answer = record[seen[stage]]
                colour = "green" if answer == record["label"] else "firebrick"
                axis.set_title(f"{stage}: {names[answer].split(',')[0][:20]}", fontsize=8, color=colour)
    figure.savefig(path, dpi=100)


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


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(fill(path.read_text(encoding="utf-8"), Path("results")), encoding="utf-8")
