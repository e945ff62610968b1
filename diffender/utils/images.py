"""Images in and out: 8-bit PNG files, difference maps stretched to be seen, a grid of stages.

Torch is imported inside the functions: what only reads files answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffender.utils.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

STAGES = ("clean", "attacked", "heatmap", "mask", "restored")


def to_image(image: Tensor) -> Image.Image:
    """(C, H, W) in [0, 1] with 8 bits, which keep multiples of 1/255."""
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image((image.detach().cpu().clamp(0, 1) * 255).round().byte())


def save_png(image: Tensor, path: Path) -> None:
    """`to_image` as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        to_image(image).save(partial, format="PNG")


def load_png(path: Path) -> Tensor:
    """What `save_png` wrote, as (3, H, W) in [0, 1]."""
    from torchvision.transforms.functional import pil_to_tensor

    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float() / 255


def save_stages(folder: Path, names: Sequence[str], stages: dict[str, Tensor]) -> None:
    """One PNG an image and stage: NAME_clean.png, NAME_attacked.png, ... from (B, C, H, W) in [0, 1]."""
    for stage, images in stages.items():
        for name, image in zip(names, images, strict=True):
            save_png(image, folder / f"{name}_{stage}.png")


def stage_files(folder: Path, record: dict, variant: str = "") -> dict[str, Path]:
    """The stages of an image that a run saved in `folder`, under one of its attacks or, without one, clean."""
    files = {s: folder / ("" if s == "clean" else variant) / f"{record['file']}_{s}.png" for s in STAGES}
    return {stage: file for stage, file in files.items() if file.is_file()}


def stretch(heatmap: Tensor, size: Sequence[int]) -> Tensor:
    """Difference maps (B, 1, h, w), each in its own range [0, 1], enlarged without smoothing: what is localised by."""
    import torch

    low, high = (f(heatmap, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scaled = (heatmap - low) / (high - low).clamp_min(1e-8)
    return torch.nn.functional.interpolate(scaled, size, mode="nearest")


def save_grid(folder: Path, records: Sequence[dict], path: Path, names: Sequence[str], rows: int = 8) -> None:
    """A row an image, under its last attack: clean, attacked, difference map, mask, restored, with what the classifier
    sees in each. Nothing where no images are there."""
    from matplotlib.figure import Figure

    saved = [(r, stage_files(folder, r, list(r["attacks"] or [""])[-1])) for r in records]
    saved = [(r, files) for r, files in saved if files][:rows]
    if not saved:
        return
    stages = list(saved[0][1])
    figure = Figure(figsize=(2.1 * len(stages), 2.35 * len(saved)), layout="constrained")
    axes = figure.subplots(len(saved), len(stages), squeeze=False)
    for row, (record, files) in zip(axes, saved, strict=True):
        for axis, (stage, file) in zip(row, files.items(), strict=False):
            image = Image.open(file)
            axis.imshow(image, cmap="inferno" if stage == "heatmap" else "gray", vmin=0, vmax=255)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
