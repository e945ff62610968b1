"""Every random tensor of one pass of the defence, as an argument.

Noise is derived from (seed, image id, purpose, k) alone. So it does not depend on batch size, order, stops or number of
processes. Two purposes share noise only by a collision of 32-bit seeds, and EOT draws k = 0, 1, 2, ... The tensors of
a pass come from one stream, in the order of `Noise`: another number of draws changes all that follow.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

Made = TypeVar("Made")
CPU = torch.device("cpu")


class Noise(NamedTuple):
    """Standard normal tensors for B images; h, w is the latent grid."""

    image: Tensor  # (B, 4, h, w): posterior of the image, for localisation
    draws: Tensor  # (B, m, 4, h, w): forward noise of the m draws of Eq. 2
    draws_empty: Tensor  # (B, m, 4, h, w): second of each pair, used by the empty-prompt variant only
    masked: Tensor  # (B, 4, h, w): posterior of the masked image
    start: Tensor  # (B, 4, h, w): where DDIM starts
    steps: Tensor  # (B, T, 4, h, w): noise of the DDIM steps; T = 0 for eta 0


def generator(*key: int | str) -> Generator:
    """A CPU generator for this key: equal keys give equal numbers, on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def preserved_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores torch's global random state after the block: the CPU's, and this device's if it is a CUDA GPU.

    Without a device, torch would ask every GPU of the machine for its generator. MPS is not restored.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def from_seed(seed: int, make: Callable[[], Made], device: torch.device = CPU) -> Made:
    """make() after seeding torch's global generators of the CPU and of this device, from which it draws.

    `preserved_rng` restores their state afterwards, except on MPS.
    """
    with preserved_rng(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        return make()


def stack(noises: Sequence[Noise | Tensor | None]) -> Noise | Tensor | None:
    """The noise of several batches, concatenated along the batch dimension. None for a deterministic victim."""
    if noises[0] is None:
        return None
    if isinstance(noises[0], Tensor):
        return torch.cat(list(noises))  # type: ignore[arg-type]  # all have the type of the first
    return type(noises[0])(*map(torch.cat, zip(*noises, strict=True)))


def sample_noise(
    shape: Sequence[int], counts: tuple[int, int], seed: int, image_ids: Sequence[str], purpose: str, k: int = 0
) -> Noise:
    """The k-th noise of these images for this purpose: `counts` draws and steps, of latents of this shape (4, h, w)."""
    draws, steps = counts

    def one(image_id: str) -> list[Tensor]:
        g = generator(seed, image_id, purpose, k)
        sizes = ((), (draws,), (draws,), (), (), (steps,))  # of the fields of Noise, in order
        return [torch.randn(*size, *shape, generator=g) for size in sizes]

    return Noise(*map(torch.stack, zip(*(one(i) for i in image_ids), strict=True)))


def seeds(image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor:
    """The k-th noise of a module that draws from torch's global generator: a seed for each image, (B,)."""
    return torch.tensor([generator(seed, i, purpose, k).initial_seed() for i in image_ids])


def seeded(module: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
    """module(x) for x (B, 3, H, W), each image alone with torch's global generator seeded; it is put back afterwards.

    So results of random modules do not depend on batch or order either. They are tuples of tensors.
    """
    pairs = zip(seeds.tolist(), x.split(1), strict=True)
    rows = [from_seed(seed, partial(module, row), x.device) for seed, row in pairs]
    return tuple(map(torch.cat, zip(*rows, strict=True)))
