"""Layers with the parameters of torch's, computed faster or more exactly than torch computes them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Large ones run in float32 on CPUs as a 1x1 convolution over the tokens (B, L, C): oneDNN's can be faster than the
    BLAS behind F.linear. `benchmarks/networks.py --parts linear` compares them."""

    def forward(self, x: Tensor) -> Tensor:
        small = x.numel() * self.out_features < 2**25
        if small or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        return F.conv2d(x.mT[:, :, None], self.weight[:, :, None, None], self.bias)[:, :, 0].mT


class GroupNorm(nn.GroupNorm):
    """Exact in channels-last layout too.

    On CPUs torch computes the variance of channels-last tensors in one pass, as E[x^2] - E[x]^2, which loses digits
    where the mean is large beside the deviation. A norm does not change when a constant is subtracted from a group, so
    the mean of an 8x8 grid of its pixels is subtracted first. For the same reason no gradient flows through that mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.is_contiguous():
            return super().forward(x)
        few = x.detach()[..., :: max(1, x.shape[-2] // 8), :: max(1, x.shape[-1] // 8)]
        mean = few.reshape(len(x), self.num_groups, -1).mean(dim=-1)
        return super().forward(x - mean.repeat_interleave(self.num_channels // self.num_groups, 1)[:, :, None, None])


class Upsample(nn.Module):
    """Nearest doubling, then a 3x3 convolution, computed as the one transposed convolution that they make.

    A 4x4 kernel of stride 2 has 16 products for an input pixel where doubling and convolution have 36. The parameters
    are those of the 3x3 convolution, under their published names. The kernel is made of them anew in every call, since
    a tensor's version does not tell of what is written through `.data`, as merged adapters are.
    """

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, fold_doubling(self.conv.weight), self.conv.bias, stride=2, padding=1)


def fold_doubling(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) to the (I, O, 4, 4) whose transposed convolution of stride 2 doubles and convolves in one.

    Summed in float32 at least.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).transpose(0, 1)
    w = w.contiguous(memory_format=torch.channels_last).flip(2, 3)  # one slow copy; all else follows the memory
    total = F.pad(w, (0, 1, 0, 1))
    for i, j in ((0, 1), (1, 0), (1, 1)):
        total[..., j : j + 3, i : i + 3] += w
    return total.to(weight.dtype)
