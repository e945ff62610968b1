"""A function of images, the user's own or a baseline, with DIFFender's signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from diffender.config import FULL, Backward
from diffender.noise import seeded, seeds
from diffender.ops import straight_through
from diffender.pipeline import Purified, require_noise
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError
from diffender.utils.images import check_images

Purify = Callable[..., Tensor | tuple[Tensor, Tensor]]  # images to purified ones, and to their masks

FAR = 10  # a value beyond it shows another range, such as 0 to 255, not an overshoot of [0, 1]


class Purifier(nn.Module):
    """A function of images (B, 3, H, W) in [0, 1] as a defence. It may also return masks (B, 1, H, W).

    Mode bpda is the identity. Every other mode (auto) takes the function's own gradient; each file of this folder says
    what has none. A function with a method `sample_noise` takes that noise as its second argument. `random`: the
    function draws from torch's global generator, which is seeded for each image. Raises InputError where a function has
    both. A call raises it for images, noise or results that do not fit.
    """

    def __init__(self, purify: Purify, model: LatentDiffusion | None = None, random: bool = False):
        super().__init__()
        if random and hasattr(purify, "sample_noise"):
            raise InputError("the purifier has sample_noise, so its noise is an argument; leave out random=True")
        self.purify, self.model, self.random = purify, model, random

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor | None:
        if hasattr(self.purify, "sample_noise"):
            return self.purify.sample_noise(image_ids, seed, purpose, k)
        return seeds(image_ids, seed, purpose, k) if self.random else None

    def forward(self, x: Tensor, noise: Tensor | None = None, backward: Backward = FULL) -> Purified:
        check_images(x)
        if backward.mode == "bpda":
            out = self(x.detach(), noise)
            return out._replace(image=straight_through(out.image, x))

        def answer(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            return checked(self.purify(x.clone(), *given), x)  # it may change its copy in place

        if hasattr(self.purify, "sample_noise"):
            return Purified(*answer(x, require_noise(noise)))
        return Purified(*(seeded(answer, x, require_noise(noise)) if self.random else answer(x)))


def checked(out: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What a purifier makes of x: images, and masks if it has them. Raises InputError for anything else."""
    image, mask = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    parts = {"images": image} if mask is None else {"images": image, "masks": mask}
    for part in parts.values():
        if not isinstance(part, Tensor):
            told = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
            if part is not out:
                told += f" that holds a {type(part).__name__}"
            raise InputError(
                f"the purifier returns {told}; it returns a tensor of images (B, 3, H, W), or a tuple of that and a "
                "tensor of masks (B, 1, H, W)"
            )
    for (what, part), channels in zip(parts.items(), (3, 1), strict=False):
        wanted = (len(x), channels, *x.shape[-2:])
        if (part.shape, part.dtype, part.device) != (wanted, x.dtype, x.device):
            raise InputError(
                f"the purifier makes {what} {tuple(part.shape)}, {part.dtype}, {part.device} of images "
                f"{tuple(x.shape)}; return {what} {wanted}, {x.dtype}, {x.device}"
            )
        low, high = part.detach().aminmax()
        if max(-low, high) > FAR:
            raise InputError(
                f"the purifier makes {what} with values in [{low:.3g}, {high:.3g}]; they lie in [0, 1]: divide by 255"
            )
    return tuple(parts.values())
