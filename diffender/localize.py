"""Patch localisation, Sec. 3.2 and Eq. 2: where two one-step predictions of the same picture differ.

Read as the authors' code and B.3 do: absolute difference of the latents for each pair, mean over exactly m draws and
the channels, z-score over the picture, threshold theta in standard deviations, then smoothing and dilation.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from diffender.ops import binarize, dilate, gaussian_blur, resize
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.schedule import predict_x0, q_sample


def difference_map(
    model: LatentDiffusion,
    z0: Tensor,
    context: Tensor | None,
    context_empty: Tensor,
    draws: Tensor,
    draws_empty: Tensor,
    conditioning: Tensor,
    t: int,
    guidance: float,
) -> Tensor:
    """Mean over draws and channels of |x0(prompt) - x0(empty)|: (B, 1, h, w), not negative.

    z0 (B, 4, h, w) latents of the image; draws (B, m, 4, h, w) noise. With a prompt, both predictions share their
    noise: guidance is the identity for the empty prompt, so the difference is guidance (sigma_t / alpha_t) times that
    of the two eps, and two evaluations a draw suffice. Without one (`context=None`, the paper's EP variant) shared
    noise would give exactly zero: the second prediction then takes its own noise, `draws_empty`.
    """
    m = draws.shape[1]
    a_t = model.alphas_cumprod[t].item()
    z0 = repeat(z0, "b c h w -> (b m) c h w", m=m)
    z_a = q_sample(z0, rearrange(draws, "b m c h w -> (b m) c h w"), a_t)
    if context is not None:
        z_b = z_a
        eps, eps_b = model.eps_from_text(z_a, t, torch.stack([context, context_empty]), conditioning)
        eps_a = eps_b + guidance * (eps - eps_b)
    else:
        z_b = q_sample(z0, rearrange(draws_empty, "b m c h w -> (b m) c h w"), a_t)
        eps_a, eps_b = model.eps_from_text(torch.cat([z_a, z_b]), t, context_empty, conditioning).chunk(2)
    difference = (predict_x0(z_a, eps_a, a_t) - predict_x0(z_b, eps_b, a_t)).abs()
    return reduce(difference, "(b m) c h w -> b 1 h w", "mean", m=m)


def standardize(x: Tensor) -> Tensor:
    """z-score of each picture's map (B, 1, h, w), with the unbiased standard deviation."""
    std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(1e-8)


def standardize_robustly(x: Tensor) -> Tensor:
    """The same from median and median absolute deviation: a large patch does not raise the bar for itself."""
    flat = x.flatten(2)
    median = flat.median(dim=2, keepdim=True).values
    mad = (flat - median).abs().median(dim=2, keepdim=True).values  # of a normal distribution: 0.6745 deviations
    return ((flat - median) / (mad / 0.6745).clamp_min(1e-8)).view_as(x)


SCORES = {"z": standardize, "mad": standardize_robustly}


def refine_mask(
    z_score: Tensor,
    theta: float,
    size: Sequence[int],
    sigma: float = 1.0,
    dilation: int = 3,
    ste: str = "identity",
    k: float = 5.0,
) -> Tensor:
    """z-score map (B, 1, h, w) to the mask (B, 1, *size) in {0, 1}; gradients pass straight through both thresholds.

    `ste` and `k` say how through the first, see `binarize`; with `soft` nothing is binary.

    Threshold theta, 3x3 Gaussian (none for sigma 0), square dilation, upsampling, threshold 0.5: lone pixels vanish,
    and what stays grows by about one latent. By Cantelli's inequality no more than 1 / (1 + theta^2) of a map lies
    theta standard deviations above its mean (20 % at 2): larger patches escape.
    """
    mask = binarize(z_score, theta, ste, k)
    if sigma > 0:
        mask = gaussian_blur(mask, sigma=sigma)
    mask = resize(dilate(mask, dilation), size)
    return mask if ste == "soft" else binarize(mask, 0.5)
