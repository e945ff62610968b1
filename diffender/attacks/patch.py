"""Patches as pixels: where they lie, how they are pasted, and the losses that attackers lower."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffender.attacks.expectation import Task
from diffender.noise import generator


def patch_side(size: int, area: float) -> int:
    """Side of a square patch that covers a share `area` of an S x S image: a pixel at least."""
    return max(1, round(size * math.sqrt(area)))


def random_mask(size: int, area: float, shape: str, g: Generator, corner: bool = False) -> Tensor:
    """A mask (1, S, S) of a square or disc, uniform over every place where it is whole.

    `corner`: at most 8 pixels away from one of the four corners, as LaVAN keeps clear of the object.
    """
    side = patch_side(size, area)
    if shape == "circle":
        side = min(size, round(side * math.sqrt(4 / math.pi)))
    free = size - side
    top, left = (int(torch.randint(0, free + 1, (), generator=g)) for _ in range(2))
    if corner:  # the drawn place says how far from the border, and (if odd) that it is the upper or left one
        away = [min(n % 9, free) for n in (top, left)]
        top, left = (a if n % 2 else free - a for n, a in zip((top, left), away, strict=True))
    mask = torch.zeros(1, size, size)
    inside = torch.ones(side, side)
    if shape == "circle":
        u = torch.arange(side) - (side - 1) / 2
        inside = (u[:, None] ** 2 + u[None, :] ** 2 <= (side / 2) ** 2).float()
    mask[0, top : top + side, left : left + side] = inside
    return mask


def masks_for(task: Task, key: str, area: float, shape: str = "square", corner: bool = False) -> Tensor:
    """One mask an image, (B, 1, S, S), from (seed, image id, key) alone."""
    size = task.x.shape[-1]
    drawn = [random_mask(size, area, shape, generator(task.seed, i, "location", key), corner) for i in task.image_ids]
    return torch.stack(drawn).to(task.x)


def apply_patch(x: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """Patch pixels inside the mask, x outside, to the bit."""
    return x * (1 - mask) + patch * mask


def relocated(content: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The pixels of `content` (B, C, S, S) inside mask `source`, moved to mask `target`; 0 elsewhere.

    Both masks (B, 1, S, S) have the same shape, at the same or at different places.
    """
    if source is target:
        return content * target
    here, there = (mask.expand_as(content) == 1 for mask in (source, target))
    return torch.zeros_like(content).masked_scatter(there, content[here])


def to_8bit(x: Tensor) -> Tensor:
    """Rounded to what an 8-bit file can hold."""
    return (x * 255).round() / 255


def loud(x: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) with a square of noise in their upper left corner, and where it is, (B, 1, S, S): what every
    defence should take for a patch. It shows what a defence does, and is no attack."""
    x, mask, side = x.clone(), torch.zeros_like(x[:, :1]), min(x.shape[-2:])
    n = max(1, side // 16)  # blocks of 4x4 pixels
    blocks = F.interpolate(torch.randint(0, 2, (1, 3, n, n), generator=generator("loud")).to(x), scale_factor=4)
    square = (..., slice(4 * n), slice(4 * n))
    x[square], mask[square] = blocks[..., :side, :side], 1
    return x, mask


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j for each image, (B,): negative where it is fooled."""
    return logit(logits, y) - logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def logit(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of class y (B,), out of logits (B, K)."""
    return logits.gather(1, y[:, None])[:, 0]


def paste(x: Tensor, pattern: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """Pattern (B, 3, s, s) at whole pixels, corner (B, 2) = (top, left): images like x and masks (B, 1, S, S)."""
    image, mask, side = x.clone(), torch.zeros_like(x[:, :1]), pattern.shape[-1]
    for b, (top, left) in enumerate(corner.tolist()):
        image[b, :, top : top + side, left : left + side] = pattern[b]
        mask[b, :, top : top + side, left : left + side] = 1
    return image, mask
