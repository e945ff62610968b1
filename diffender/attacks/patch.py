"""What all patch attacks share: geometry, composition, losses, expectation over noise."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from diffender.errors import check_finite
from diffender.noise import Noise, generator


class Victim(Protocol):
    """What is attacked: logits of pictures in [0, 1], given the noise of one pass (None where nothing is random)."""

    def __call__(self, x: Tensor, noise: Noise | None) -> Tensor: ...

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Noise | None: ...


class Attacked(NamedTuple):
    image: Tensor  # (B, 3, S, S) in [0, 1], multiples of 1/255
    mask: Tensor  # (B, 1, S, S) in {0, 1}, 1 = patched
    patch: Tensor  # (B, 3, S, S): the free pixels, defined inside the mask only


def patch_side(size: int, area: float) -> int:
    """Side of a square patch that covers a share `area` of an S x S picture."""
    return round(size * math.sqrt(area))


def random_mask(size: int, area: float, shape: str, g: Generator) -> Tensor:
    """A mask (1, S, S) of a square or disc, uniform over every place where it is whole."""
    side = patch_side(size, area)
    if shape == "circle":
        side = round(side * math.sqrt(4 / math.pi))
    top, left = (int(torch.randint(0, size - side + 1, (), generator=g)) for _ in "yx")
    mask = torch.zeros(1, size, size)
    inside = torch.ones(side, side)
    if shape == "circle":
        u = torch.arange(side) - (side - 1) / 2
        inside = (u[:, None] ** 2 + u[None, :] ** 2 <= (side / 2) ** 2).float()
    mask[0, top : top + side, left : left + side] = inside
    return mask


def masks_for(image_ids: Sequence[str], seed: int, key: str, size: int, area: float, shape: str) -> Tensor:
    """One mask an image, (B, 1, S, S), from (seed, image id, key) alone."""
    return torch.stack([random_mask(size, area, shape, generator(seed, i, "location", key)) for i in image_ids])


def apply_patch(x: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """Patch pixels inside the mask, x outside, to the bit."""
    return x * (1 - mask) + patch * mask


def to_8bit(x: Tensor) -> Tensor:
    """Rounded to what an 8-bit file can hold."""
    return (x * 255).round() / 255


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j for each picture, (B,): negative where it is fooled."""
    return logit(logits, y) - logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def logit(logits: Tensor, y: Tensor) -> Tensor:
    """That of class y (B,), out of logits (B, K)."""
    return logits.gather(1, y[:, None])[:, 0]


def targeted_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """CE(z, t) for each picture, (B,): small where it is fooled into t."""
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


def value_and_gradient(
    victim: Victim, x: Tensor, noise: Noise | None, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss of each picture (B,) and its gradient, like x. Losses are summed: a picture's gradient knows no batch."""
    x = x.detach().requires_grad_()
    value = loss(victim(x, noise))
    gradient = torch.autograd.grad(value.sum(), x)[0]
    check_finite("attack's gradient", gradient)
    return value.detach(), gradient
