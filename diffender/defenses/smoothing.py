"""Spatial smoothing: the median filter of feature squeezing (Xu et al. 2017)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffender.utils.options import check_options, option


@dataclass(frozen=True)
class Smoothing:
    window: int = option(3, "Side of the median's window.", low=1, high=99)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, x: Tensor) -> Tensor:
        """Each value of x (B, C, H, W) becomes the median of its window; the gradient goes to the one selected.

        As scipy.ndimage.median_filter: the border repeats in a mirror, an even window leans to the upper left and
        takes the upper of the two middle values.
        """
        k = self.window
        x = x[..., mirrored(x.shape[-2], k).to(x.device), :][..., mirrored(x.shape[-1], k).to(x.device)]
        windows = x.unfold(2, k, 1).unfold(3, k, 1).flatten(-2)
        return windows.kthvalue(k * k // 2 + 1).values


def mirrored(n: int, k: int) -> Tensor:
    """Indices of a line of n with the border that a window of k needs, (n + k - 1,): c b a | a b c d | d c b.

    Beyond that the line comes again.
    """
    return torch.from_numpy(np.pad(np.arange(n), (k // 2, (k - 1) // 2), mode="symmetric"))
