"""DW, "digital watermarking" (Hayes 2018), blind variant: remove what the saliency map shows as one dense blob.

OUR RECONSTRUCTION: no implementation is public. The steps are those that the DIFFender paper names (saliency, erosion)
and that Hayes's abstract describes; their sizes are ours.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffender.classifiers.imagenet import Classifier
from diffender.defenses.fill import harmonic
from diffender.ops import dilate, gaussian_blur
from diffender.utils.options import check_options, option


@dataclass(frozen=True)
class DW:
    network: Classifier  # whose saliency it is: `guided(classifier)`, or the classifier where it has no ReLUs
    sigma: float = option(4.0, "Blur of the saliency, for images of side 224, as the two below.", low=0.1, high=50)
    erosion: int = option(7, "Side of the square that erodes.", low=1, high=99)
    dilation: int = option(13, "Side of the square that dilates.", low=1, high=99)
    quantile: float = option(0.95, "Share of the pixels that are not salient.", low=0, high=1)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, S, S) in [0, 1] with the blob filled, and the mask (B, 1, S, S). The mask has no gradient."""
        scale = x.shape[-1] / 224
        sigma = self.sigma * scale
        density = gaussian_blur(self.salience(x), 2 * math.ceil(3 * sigma) + 1, sigma)
        bar = density.flatten(1).quantile(self.quantile, dim=1)[:, None, None, None]
        mask = dilate(erode((density > bar).to(x), odd(self.erosion * scale)), odd(self.dilation * scale))
        return harmonic(x, mask), mask

    def salience(self, x: Tensor) -> Tensor:
        """|d max logit / dx|, the largest over colours, (B, 1, H, W)."""
        with torch.enable_grad():  # also where the caller evaluates without gradients
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.network(leaf).amax(dim=1).sum(), leaf)
        return gradient.abs().amax(dim=1, keepdim=True)


def erode(x: Tensor, kernel: int) -> Tensor:
    """Erosion of (B, C, H, W) in [0, 1] by a square; what lies outside the image erodes nothing."""
    return 1 - dilate(1 - x, kernel)


def odd(n: float) -> int:
    return 2 * round((n - 1) / 2) + 1


def guided(classifier: Classifier) -> Classifier:
    """A copy that shares the weights. The backward pass of its modules ReLU and ReLU6 lets positive gradients of active
    units through alone (Springenberg et al. 2015). Raises torch's RuntimeError where what follows a ReLU writes into
    its output."""
    memo = {id(t): t for t in (*classifier.parameters(), *classifier.buffers())}
    twin = copy.deepcopy(classifier, memo)
    for module in twin.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False  # torch hooks no module that writes into its input
            module.register_full_backward_hook(positive)
    return twin


def positive(_module: nn.Module, gradients: Any, _out: Any) -> tuple[Tensor]:
    """What reaches the module's input, without what is negative."""
    return (gradients[0].clamp_min(0),)
