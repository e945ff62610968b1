"""What a mask is filled with where no diffusion model paints: grey, the mean colour, or a harmonic surface."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def grey(x: Tensor, mask: Tensor) -> Tensor:
    return x * (1 - mask) + 0.5 * mask


def mean_colour(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of what is not masked; grey where everything is."""
    known = 1 - mask
    count = known.sum(dim=(2, 3), keepdim=True)
    colour = torch.where(count > 0, (x * known).sum(dim=(2, 3), keepdim=True) / count.clamp_min(1), 0.5)
    return x * known + colour * mask


def harmonic(x: Tensor, mask: Tensor, sweeps: int = 20, smallest: int = 8) -> Tensor:
    """Laplace's equation inside mask (B, 1, H, W) in {0, 1}, with x (B, C, H, W) around it as the boundary.

    Coarse to fine: averages of the known pixels down to `smallest`, then Jacobi sweeps on every level, the known pixels
    laid over again. Linear in the known pixels, so exact in its gradient.
    """
    known = 1 - mask
    if min(x.shape[-2:]) <= smallest:
        start = mean_colour(x, mask)
    else:
        half = partial(F.avg_pool2d, kernel_size=2, ceil_mode=True, count_include_pad=False)
        share = half(known)
        small = half(x * known) / share.clamp_min(1e-8)
        coarse = harmonic(small, (share == 0).to(x), sweeps, smallest)
        start = F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)
    filled = x * known + start * mask
    for _ in range(sweeps):
        p = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        around = (p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2]) / 4
        filled = x * known + around * mask
    return filled


FILLS = {"grey": grey, "mean": mean_colour, "harmonic": harmonic}
