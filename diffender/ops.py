"""Tensor operations that several stages share."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, to the bit, with the gradient of `soft` (Bengio et al. 2013): for thresholds and BPDA."""
    return hard.detach() + (soft - soft.detach())


def binarize(x: Tensor, threshold: float, ste: str = "identity", k: float = 5.0) -> Tensor:
    """1 where x > threshold, else 0 (Binarize of Eq. 2). `ste` chooses the backward pass:

    identity   the gradient of x, as in the authors' demo (the paper's B.3 does not say which estimator it uses)
    sigmoid    the gradient of sigmoid(k (x - threshold))
    none       no gradient
    soft       returns that sigmoid itself instead of 0 and 1, so that finite differences can check gradients
    """
    hard = (x > threshold).to(x.dtype)
    if ste == "none":
        return hard
    soft = x if ste == "identity" else (k * (x - threshold)).sigmoid()
    return soft if ste == "soft" else straight_through(hard, soft)


def gaussian_blur(x: Tensor, kernel: int = 3, sigma: float = 1.0) -> Tensor:
    """Separable Gaussian smoothing of (B, C, H, W), reflecting at the border."""
    offsets = torch.arange(kernel, dtype=x.dtype, device=x.device) - kernel // 2
    w = torch.exp(-(offsets**2) / (2 * sigma**2))
    w = (w / w.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (kernel // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, w, groups=x.shape[1]), w.mT, groups=x.shape[1])


def dilate(x: Tensor, kernel: int = 3) -> Tensor:
    """Grey-scale dilation of (B, C, H, W) by a square."""
    return F.max_pool2d(x, kernel, stride=1, padding=kernel // 2)


def connected(seeds: Tensor, region: Tensor) -> Tensor:
    """The part of `region` that is 8-connected, within it, to one of `seeds`; all (B, 1, H, W) in {0, 1}.

    The fixed point of dilating the seeds within the region, for each image on its own. Seeds may be other numbers above
    0: each connected part then has the largest in it.
    """
    found = seeds * region
    while True:
        larger = dilate(found) * region
        if torch.equal(larger, found):
            return found
        found = larger


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize with antialiasing; the identity where the size is right already."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def recompute(function: Callable[..., Tensor], *args: Tensor, limit: int | None = None, keep: bool = False) -> Tensor:
    """function(*args) in batches of at most `limit` rows. Activations are recomputed in the backward pass.

    Memory then grows neither with the number of calls nor, given a limit, with the batch. With `keep`, activations are
    stored instead: the backward pass is faster and takes more memory. All of `args` share their first dimension. The
    function must treat rows independently and draw no random numbers.
    """
    if limit is not None and len(args[0]) > limit:
        parts = zip(*(a.split(limit) for a in args), strict=True)
        return torch.cat([recompute(function, *part, keep=keep) for part in parts])
    if not keep and torch.is_grad_enabled() and any(a.requires_grad for a in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
