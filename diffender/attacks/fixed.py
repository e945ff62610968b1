"""Patches that nothing optimises here: ready-made ones from a file, and controls that any attack must beat."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffender.attacks.attack import Attack, Callback
from diffender.attacks.expectation import Attacked, Task
from diffender.attacks.patch import apply_patch, masks_for, patch_side, to_8bit
from diffender.noise import generator
from diffender.utils.errors import InputError
from diffender.utils.files import load_tensors


@dataclass(frozen=True)
class Fixed(Attack):
    """Content from the subclass, place from (seed, image id): where AdvP's patch of this area lies.

    The victim is not asked.
    """

    def attempts(self, task: Task, init: Tensor | None, callback: Callback) -> Iterator[Attacked]:
        x, side = task.x, patch_side(task.x.shape[-1], self.area)
        mask, patch = masks_for(task, "patch", self.area), torch.zeros_like(x)
        for b, image_id in enumerate(task.image_ids):
            content = self.content(x[b], int(task.y[b]), side, generator(task.seed, image_id, "content"))
            patch[b, mask[b].expand(3, -1, -1) == 1] = content.flatten().to(x)
        image = apply_patch(x, to_8bit(patch), mask)
        no_steps = x.new_zeros(len(x), 0)
        yield Attacked(image, mask, patch, torch.zeros(len(x)).long(), no_steps, no_steps)

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        """The patch (3, s, s) for image x (3, S, S) of class y."""
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
    (Pintor et al. 2023) is stored: a random one that aims at another class than the image's."""

    flags: ClassVar[dict[str, str]] = {"patch_file": "file"}

    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.patches  # a file that cannot be used shows before anything runs

    @cached_property
    def patches(self) -> tuple[Tensor, Tensor]:
        """Patches and targets of the file. Raises InputError for no file and for one of anything else."""
        if self.file is None:
            raise InputError("ready patches come from a file; give --patch-file, safetensors with patches and targets")
        state = load_tensors(Path(self.file))
        if {"patches", "targets"} - set(state):
            raise InputError(f"{self.file} holds {', '.join(state)}; wanted are patches and targets")
        patches, targets = state["patches"].float(), state["targets"]
        square = patches.ndim == 4 and patches.shape[1] == 3 and patches.shape[2] == patches.shape[3]
        if not (square and len(patches) and targets.shape == patches.shape[:1]):
            raise InputError(
                f"{self.file} has patches {tuple(patches.shape)} and targets {tuple(targets.shape)}; wanted are "
                "patches (N, 3, s, s) and targets (N,), at least one"
            )
        if not (patches.min() >= 0 and patches.max() <= 1):
            raise InputError(f"{self.file} has patches outside of [0, 1]; divide by 255, undo any normalisation")
        return patches, targets

    def content(self, x: Tensor, y: int, side: int, g: torch.Generator) -> Tensor:
        patches, targets = self.patches
        usable = (targets != y).nonzero()[:, 0]
        if not len(usable):
            raise InputError(f"{self.file} has no patch that aims at another class than {y}")
        patch = patches[usable[torch.randint(len(usable), (), generator=g)]]
        if patch.shape[-1] == side:
            return patch
        return F.interpolate(patch[None], (side, side), mode="bilinear", antialias=True)[0]
