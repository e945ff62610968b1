"""Images in and out: 8-bit PNG files, difference maps stretched to be seen, figures.

Torch is imported inside the functions: what only reads files answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffender.utils.errors import InputError
from diffender.utils.files import whole

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

STAGES = ("clean", "attacked", "heatmap", "mask", "restored")


def check_images(x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises InputError unless x (B, 3, H, W) lies in [0, 1], within rounding, with B at least 1, and is of this dtype;
    without one, of any floating point."""
    import torch

    wanted = "floating point" if dtype is None else str(dtype)
    if not isinstance(x, torch.Tensor):
        raise InputError(f"images are a {type(x).__name__}; they are a torch.Tensor (B, 3, H, W), {wanted} in [0, 1]")
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"images of shape {tuple(x.shape)}; they are (B, 3, H, W)")
    if not x.is_floating_point() or dtype not in (None, x.dtype):
        raise InputError(f"images of dtype {x.dtype}; they are {wanted}: convert them by .to({dtype or torch.float32})")
    if not x.numel():
        raise InputError(f"images of shape {tuple(x.shape)}: there are none; give at least one")
    low, high = x.detach().aminmax()
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise InputError(
            f"images with values in [{low:.3g}, {high:.3g}]; they lie in [0, 1]: divide by 255, leave normalisation to "
            "the classifier"
        )


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
    """Difference maps (B, 1, h, w), each stretched to [0, 1] and enlarged to `size` without smoothing."""
    import torch

    low, high = (f(heatmap, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    scaled = (heatmap - low) / (high - low).clamp_min(1e-8)
    return torch.nn.functional.interpolate(scaled, size, mode="nearest")


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
