"""Patches that nothing optimises here: ready-made ones from a file, and controls that any attack must beat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffender.attacks.patch import Attacked, Victim, apply_patch, masks_for, patch_side, to_8bit
from diffender.noise import generator
from diffender.utils.errors import InputError
from diffender.utils.files import load_tensors


@dataclass(frozen=True)
class Fixed:
    """Content from the subclass, place from (seed, image id): where AdvP's patch of this area lies."""

    access: ClassVar[str] = "none"

    area: float = 0.05

    def __call__(
        self,
        victim: Victim,
        x: Tensor,
        y: Tensor,
        image_ids: Sequence[str],
        seed: int,
        init: Tensor | None = None,
        callback: Callable[[int], None] = lambda i: None,
    ) -> Attacked:
        """Pictures x (B, 3, S, S) in [0, 1] with labels y (B,). The victim is not asked."""
        size, side = x.shape[-1], patch_side(x.shape[-1], self.area)
        mask = masks_for(image_ids, seed, "patch", size, self.area).to(x)
        patch = torch.zeros_like(x)
        for b, image_id in enumerate(image_ids):
            content = self.content(x[b], int(y[b]), side, generator(seed, image_id, "content"))
            patch[b, mask[b].expand(3, -1, -1) == 1] = content.flatten().to(x)
        image = apply_patch(to_8bit(x), to_8bit(patch), mask)
        return Attacked(image, mask, patch, torch.zeros(len(x)).long(), *(x.new_zeros(len(x), 0),) * 2)

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        """The patch (3, s, s) for picture x (3, S, S) of class y."""
        raise NotImplementedError


class Grey(Fixed):
    """Mid grey."""

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        return torch.full((3, side, side), 0.5)


class UniformNoise(Fixed):
    """Uniform noise."""

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        return torch.rand(3, side, side, generator=g)


class Crop(Fixed):
    """A natural texture: another piece of the same photograph, upside down."""

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        top, left = torch.randint(0, x.shape[-1] - side + 1, (2,), generator=g).tolist()
        return x[:, top : top + side, left : left + side].flip(1)


@dataclass(frozen=True)
class Ready(Fixed):
    """A patch out of a safetensors file with `patches` (N, 3, s, s) in [0, 1] and `targets` (N,), as ImageNet-Patch
    (Pintor et al. 2023) is stored: a random one that aims at another class than the picture's."""

    file: str | None = None

    def __post_init__(self) -> None:
        self.load()

    def load(self) -> tuple[Tensor, Tensor]:
        """Patches and targets. Raises InputError for no file and for one of anything else."""
        if self.file is None:
            raise InputError("ready patches come from a file; give --patch-file, safetensors with patches and targets")
        state = load_tensors(Path(self.file))
        if {"patches", "targets"} - set(state):
            raise InputError(f"{self.file} holds {', '.join(state)}; wanted are patches and targets")
        patches, targets = state["patches"].float(), state["targets"]
        if not (patches.ndim == 4 and patches.shape[1] == 3 and len(patches) and targets.shape == patches.shape[:1]):
            raise InputError(
                f"{self.file} has patches {tuple(patches.shape)} and targets {tuple(targets.shape)}; wanted are "
                "patches (N, 3, s, s) and targets (N,), at least one"
            )
        if not (patches.min() >= 0 and patches.max() <= 1):
            raise InputError(f"{self.file} has patches outside of [0, 1]; divide by 255, undo any normalisation")
        return patches, targets

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        patches, targets = self.load()
        usable = (targets != y).nonzero()[:, 0]
        if not len(usable):
            raise InputError(f"{self.file} has no patch that aims at another class than {y}")
        patch = patches[usable[torch.randint(len(usable), (), generator=g)]]
        if patch.shape[-1] == side:
            return patch
        return F.interpolate(patch[None], (side, side), mode="bilinear", antialias=True)[0]
