"""Local gradients smoothing (Naseer et al. 2019): darken blocks whose first-order gradients are dense."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffender.utils.errors import InputError
from diffender.utils.options import check_options, option

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class LGS:
    block: int = option(15, "Side of a block.", low=1, high=100)
    overlap: int = option(5, "Pixels that a block shares with the next.", low=0)
    threshold: float = option(0.1, "Mean gradient above which a block is darkened.", low=0)
    smoothing: float = option(2.3, "How much a gradient of 1 darkens.", low=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.overlap >= self.block:
            raise InputError(f"overlap is {self.overlap}; it is smaller than the block, {self.block}")

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [0, 1]. Exact gradients but for the choice of blocks, which is a constant."""
        g = gradient_magnitude(x)
        return x * (1 - (self.smoothing * g * self.dense(g.detach())).clamp(0, 1))

    def dense(self, g: Tensor) -> Tensor:
        """The union of the blocks whose mean of g (B, 1, H, W) exceeds the threshold, (B, 1, H, W) in {0, 1}.

        Mirrored at the lower right, so that blocks cover every pixel: 15 by 10 misses the last 9 of 224, and a patch
        there would never be seen. Raises InputError for images smaller than a block.
        """
        height, width = g.shape[-2:]
        if self.block > (most := min(height, width)):
            raise InputError(f"block is {self.block}; in images of {height} x {width} pixels it is at most {most}")
        stride = self.block - self.overlap
        below, right = ((-(n - self.block)) % stride for n in (height, width))
        keep = F.avg_pool2d(F.pad(g, (0, right, 0, below), mode="reflect"), self.block, stride) > self.threshold
        ones = torch.ones(1, 1, self.block, self.block).to(g)
        return (F.conv_transpose2d(keep.to(g), ones, stride=stride) > 0).to(g)[..., :height, :width]


def gradient_magnitude(x: Tensor) -> Tensor:
    """Forward differences of the luma of x (B, 3, H, W), scaled to [0, 1] in each image, (B, 1, H, W)."""
    luma = (x * torch.tensor(LUMA).to(x)[:, None, None]).sum(dim=1, keepdim=True)
    dx = F.pad(luma[..., :, 1:] - luma[..., :, :-1], (0, 1))
    dy = F.pad(luma[..., 1:, :] - luma[..., :-1, :], (0, 0, 0, 1))
    g = (dx**2 + dy**2 + 1e-12).sqrt()  # inside the root: the slope at 0 is infinite
    low, high = g.amin(dim=(1, 2, 3), keepdim=True), g.amax(dim=(1, 2, 3), keepdim=True)
    return (g - low) / (high - low + 1e-7)
