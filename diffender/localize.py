"""Patch localisation, Sec. 3.2 and Eq. 2: where two one-step predictions of the same picture differ.

Read as the authors' code and B.3 do: absolute difference of the latents for each pair, mean over exactly m draws and
the channels, z-score over the picture, threshold theta in standard deviations, then smoothing and dilation.
"""

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from diffender.diffusion import LatentDiffusion
from diffender.ops import binarize, dilate, gaussian_blur, resize
from diffender.schedule import predict_x0, q_sample


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

    z0 (B, 4, h, w) latents of the picture; draws (B, m, 4, h, w) noise. With a prompt, both predictions share their
    noise: guidance is the identity for the empty prompt, so the difference is guidance (sigma_t / alpha_t) times that
    of the two eps, and two evaluations a draw suffice. Without one (`context=None`, the paper's EP variant) shared
    noise would give exactly zero: the second prediction then takes its own noise, `draws_empty`.
    """
    m = draws.shape[1]
    a_t = model.alphas_cumprod[t].item()
    z0 = repeat(z0, "b c h w -> (b m) c h w", m=m)
    z_a = q_sample(z0, rearrange(draws, "b m c h w -> (b m) c h w"), a_t)
    if context is None:
        z_b = q_sample(z0, rearrange(draws_empty, "b m c h w -> (b m) c h w"), a_t)
        contexts = context_empty.expand(2 * len(z0), -1, -1)
    else:
        z_b = z_a
        contexts = torch.cat([context.expand(len(z0), -1, -1), context_empty.expand(len(z0), -1, -1)])
    z_t = torch.cat([z_a, z_b])
    eps = model.eps_from_text(z_t, t, contexts, conditioning)
    if context is None:
        x0_a, x0_b = predict_x0(z_t, eps, a_t).chunk(2)
        difference = x0_a - x0_b
    else:
        eps_a, eps_b = eps.chunk(2)
        difference = guidance * ((1 - a_t) / a_t) ** 0.5 * (eps_b - eps_a)
    return reduce(difference.abs(), "(b m) c h w -> b 1 h w", "mean", m=m)


def standardize(x: Tensor) -> Tensor:
    """z-score of each picture's map (B, 1, h, w), with the unbiased standard deviation."""
    std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(1e-8)


def refine_mask(z_score: Tensor, theta: float, size: tuple[int, int]) -> Tensor:
    """z-score map (B, 1, h, w) to the mask (B, 1, *size) in {0, 1}; gradients pass straight through both thresholds.

    Threshold theta, 3x3 Gaussian of sigma 1, 3x3 dilation, upsampling, threshold 0.5: lone pixels vanish, and what
    stays grows by about one latent. By Cantelli's inequality no more than 1 / (1 + theta^2) of a map lies above theta
    (20 % at 2): larger patches escape.
    """
    mask = dilate(gaussian_blur(binarize(z_score, theta)))
    return binarize(resize(mask, size), 0.5)
