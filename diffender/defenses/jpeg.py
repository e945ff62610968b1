"""JPEG compression (Dziugaite et al. 2016): 4:2:0, as tensors; rounding goes straight through."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from diffender.ops import straight_through
from diffender.utils.options import check_options, option

LUMA = (  # ITU-T T.81, Annex K
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
)  # fmt: skip
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@dataclass(frozen=True)
class JPEG:
    quality: int = option(75, "libjpeg's quality.", low=1, high=100)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [0, 1] as it comes back from a JPEG file of this quality."""
        height, width = x.shape[-2:]
        x = F.pad(round_ste(255 * x), (0, -width % 16, 0, -height % 16), mode="replicate")
        y, cb, cr = colours(x, TO_YCBCR).split(1, dim=1)
        luma = quantise(y - 128, table(LUMA, self.quality).to(x)) + 128
        chroma = quantise(F.avg_pool2d(torch.cat([cb, cr], dim=1), 2), table(CHROMA, self.quality).to(x))
        # libjpeg's "fancy" upsampling; nearest would cost some 5 dB
        chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
        x = round_ste(colours(torch.cat([luma, chroma], dim=1), TO_RGB).clamp(0, 255))
        return x[..., :height, :width] / 255


def round_ste(x: Tensor) -> Tensor:
    return straight_through(x.round(), x)


def colours(x: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", torch.tensor(matrix).to(x), x)


def table(base: tuple[int, ...], quality: int) -> Tensor:
    """The quantisation table (8, 8) of a quality from 1 to 100, in libjpeg's integer arithmetic."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).float().view(8, 8)


def dct_matrix() -> Tensor:
    """The orthonormal DCT-II, (8, 8)."""
    k = torch.arange(8.0)
    d = torch.cos(math.pi / 8 * (k[None, :] + 0.5) * k[:, None]) / 2
    d[0] /= math.sqrt(2)
    return d


def quantise(x: Tensor, q: Tensor) -> Tensor:
    """Channels (B, C, H, W) around 0 through DCT, rounding to multiples of the table q (8, 8), and back."""
    d = dct_matrix().to(x)
    blocks = rearrange(x, "b c (h i) (w j) -> b c h w i j", i=8, j=8)
    blocks = d.T @ (round_ste(d @ blocks @ d.T / q) * q) @ d
    return rearrange(blocks, "b c h w i j -> b c (h i) (w j)")
