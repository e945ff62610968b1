"""Jedi (Tarchoun et al. 2023): where entropy is too high, an autoencoder completes the mask, and it is filled.

The defence reads weights/jedi.safetensors. `python -m diffender pretrain jedi --data PHOTOS` makes such a file: it
trains the autoencoder on drawn masks and estimates the entropy of clean images on 100 photographs (`stats=own`).
The original's autoencoder saw the patches of its own data set; ours sees squares, rectangles and ellipses. The original
fills by coherence transport, we by a harmonic surface.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffender.defenses.fill import harmonic
from diffender.defenses.smoothing import mirrored
from diffender.ops import connected
from diffender.utils.files import load_tensors, read_header
from diffender.utils.options import check_options, option
from diffender.weights.loading import WEIGHTS

WINDOWS, STRIDES = ((9, 13, 17), (4, 6, 8))  # for sides up to 800; MATLAB's ranges make 8, 12 and 16 one pixel wider
PATCH_MEAN, PATCH_STD = (5.32, 6.06, 6.47), (0.32, 0.34, 0.35)
OFFICIAL = ((2.75, 3.19, 3.47), (1.16, 1.13, 1.07))  # means and deviations in bits, as `clean_entropy` returns them
GREY = (0.2989, 0.5870, 0.1140)
SIDE, HIDDEN = 64, 100
COMPLETION = WEIGHTS / "jedi.safetensors"


class Autoencoder(nn.Module):
    """One hidden layer between two sigmoids, as MATLAB's trainAutoencoder builds it: masks (B, 4096) to themselves."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(SIDE**2, HIDDEN)
        self.decode = nn.Linear(HIDDEN, SIDE**2)

    def forward(self, mask: Tensor) -> Tensor:
        return self.logits(mask).sigmoid()

    def logits(self, mask: Tensor) -> Tensor:
        return self.decode(self.encode(mask).sigmoid())


@dataclass(frozen=True)
class Jedi:
    stats: str = option(
        "official", "Statistics of clean entropy: the authors', or of photographs of our size.", ("official", "own")
    )
    completion: str = option("autoencoder", "What completes masks.", ("autoencoder", "none"))
    min_area: float = option(0.005, "Smallest connected region that counts, as a share of the image.", low=0, high=1)
    threshold: float = option(
        0.33, "Threshold of the autoencoder's output, above which a pixel is masked.", low=0, high=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [0, 1] filled, and the mask (B, 1, H, W). Histograms have no gradient."""
        mask = without_small(suspicious(x.detach(), *clean_entropy(self.stats)), self.min_area)
        if self.completion == "autoencoder":
            mask = complete(load_autoencoder().to(x), mask, self.threshold)
        return harmonic(x, mask), mask


@cache
def clean_entropy(stats: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a window's entropy in clean images, in bits, a number for each scale."""
    if stats == "official":
        return OFFICIAL
    header = read_header(COMPLETION)
    return tuple(header["clean_mean"]), tuple(header["clean_std"])


def entropy_windows(x: Tensor, window: int, stride: int) -> Tensor:
    """Shannon entropy in bits of 256 grey levels in windows centred on pixels 0, stride, 2 stride, ..., (B, h, w)."""
    grey = (x * torch.tensor(GREY).to(x)[:, None, None]).sum(dim=1)
    grey = (255 * grey).round().clamp(0, 255).long()
    rows, columns = (mirrored(n, window).to(x.device) for n in grey.shape[-2:])
    windows = grey[:, rows][:, :, columns].unfold(1, window, stride).unfold(2, window, stride).flatten(-2)
    counts = x.new_zeros(*windows.shape[:-1], 256).scatter_add_(-1, windows, torch.ones_like(windows, dtype=x.dtype))
    p = counts / window**2
    return -torch.special.xlogy(p, p).sum(dim=-1) / math.log(2)


def thresholds(mean: Tensor, i: int, clean_mean: tuple[float, ...], clean_std: tuple[float, ...]) -> Tensor:
    """The entropy thresholds (B,) in bits of scale i, as in the authors' code.

    `mean` (B,) is the mean window entropy of an image. One deviation of clean images raises the threshold by one of
    patches.
    """
    pm, ps, cm, cs = PATCH_MEAN[i], PATCH_STD[i], clean_mean[i], clean_std[i]
    return pm + 1.5 * ps - 2 * ps * (pm - cm) / pm + ps * (mean - cm) / cs


def suspicious(x: Tensor, clean_mean: tuple[float, ...], clean_std: tuple[float, ...]) -> Tensor:
    """Pixels (B, 1, H, W) in {0, 1} whose nearest window's entropy is above the threshold, in any scale."""
    found = torch.zeros_like(x[:, :1], dtype=torch.bool)
    for i, (window, stride) in enumerate(zip(WINDOWS, STRIDES, strict=True)):
        e = entropy_windows(x, window, stride)
        high = e > thresholds(e.flatten(1).mean(dim=1), i, clean_mean, clean_std)[:, None, None]
        rows, columns = (
            (torch.arange(n, device=x.device) / stride).round().long().clamp_max(m - 1)
            for n, m in zip(x.shape[-2:], e.shape[-2:], strict=True)
        )
        found |= high[:, rows][:, :, columns][:, None]
    return found.to(x)


def without_small(mask: Tensor, min_area: float) -> Tensor:
    """Mask (B, 1, H, W) in {0, 1} without its 8-connected regions below a share of the image."""
    pixels = mask[0].numel()
    numbers = torch.arange(1.0, pixels + 1, device=mask.device).view(1, *mask.shape[1:])  # exact up to 2^24 pixels
    regions = connected(numbers, mask).flatten(1).long()  # each pixel's region, by the largest number in it
    counts = torch.zeros(len(mask), pixels + 1, device=mask.device, dtype=torch.long)
    counts.scatter_add_(1, regions, torch.ones_like(regions))
    return mask * (counts.gather(1, regions).view_as(mask) >= min_area * pixels)


@cache
def load_autoencoder() -> Autoencoder:
    net = Autoencoder()
    net.load_state_dict({k: v.float() for k, v in load_tensors(COMPLETION).items()})
    return net.requires_grad_(False)


def complete(net: Autoencoder, mask: Tensor, threshold: float) -> Tensor:
    """The mask (B, 1, H, W) as the nearest patch-like one; an empty one stays empty."""
    small = F.interpolate(mask, (SIDE, SIDE), mode="area").flatten(1)
    found = (net(small) > threshold).to(mask) * small.amax(dim=1, keepdim=True).gt(0)
    return F.interpolate(found.view(-1, 1, SIDE, SIDE), mask.shape[-2:], mode="nearest")
