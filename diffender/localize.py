"""Patch localisation, Sec. 3.2 and Eq. 2: where two one-step predictions of the same image differ.

Eq. 2 as the authors' code and the paper's appendix B.3 read it: the absolute difference of the latents for each pair,
its mean over exactly m draws and the channels, its z-score over the image, a threshold theta in standard deviations,
then smoothing and dilation.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from diffender.config import FULL, Backward, DIFFenderConfig
from diffender.noise import Noise
from diffender.ops import binarize, connected, dilate, gaussian_blur, resize, straight_through
from diffender.prompts import Contexts
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.schedule import ALPHAS_CUMPROD, noise_timestep, predict_x0, q_sample


def predict_pair(
    model: LatentDiffusion, z0: Tensor, contexts: Contexts, noise: Noise, cfg: DIFFenderConfig, blank: Tensor
) -> tuple[Tensor, Tensor]:
    """x0 predicted in one step with the prompt, and with the empty prompt, for each draw: (B, m, 4, h, w) both.

    z0 (B, 4, h, w) are the latents of the image; blank (1, 5, h, w) says that everything is masked. Both predictions
    share their noise: guidance is the identity for the empty prompt, so two UNet evaluations a draw suffice. Without a
    prompt (`contexts.locate` is None, the paper's EP variant) shared noise would give exactly zero, so the second
    prediction takes noise of its own.
    """
    b, m = noise.draws.shape[:2]
    t = noise_timestep(cfg.noise_ratio)
    a_t = ALPHAS_CUMPROD[t]
    z0 = repeat(z0, "b c h w -> (b m) c h w", m=m)
    z_t = q_sample(z0, rearrange(noise.draws, "b m c h w -> (b m) c h w"), a_t)
    if contexts.locate is not None:
        z_t_empty = z_t
        eps, eps_empty = model.eps_from_text(z_t, t, torch.stack([contexts.locate, contexts.empty]), blank)
        eps = eps_empty + cfg.guidance * (eps - eps_empty)
    else:
        z_t_empty = q_sample(z0, rearrange(noise.draws_empty, "b m c h w -> (b m) c h w"), a_t)
        eps, eps_empty = model.eps_from_text(torch.cat([z_t, z_t_empty]), t, contexts.empty, blank).chunk(2)
    x0 = predict_x0(z_t, eps, a_t), predict_x0(z_t_empty, eps_empty, a_t)
    x0_prompt, x0_empty = (rearrange(x, "(b m) c h w -> b m c h w", b=b) for x in x0)
    return x0_prompt, x0_empty


def difference_map(x0_prompt: Tensor, x0_empty: Tensor) -> Tensor:
    """Eq. 2: the mean over m draws and the channels of |x0(prompt) - x0(empty)|, (B, m, 4, h, w) to (B, 1, h, w)."""
    return reduce((x0_prompt - x0_empty).abs(), "b m c h w -> b 1 h w", "mean")


def standardize(x: Tensor) -> Tensor:
    """z-score of each image's map (B, 1, h, w), with the unbiased standard deviation."""
    std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(1e-8)


def standardize_robustly(x: Tensor) -> Tensor:
    """The same from median and median absolute deviation: a large patch does not raise the bar for itself."""
    flat = x.flatten(2)
    median = flat.median(dim=2, keepdim=True).values
    mad = (flat - median).abs().median(dim=2, keepdim=True).values  # of a normal distribution: 0.6745 deviations
    return ((flat - median) / (mad / 0.6745).clamp_min(1e-8)).view_as(x)


SCORES = {"z": standardize, "mad": standardize_robustly}


def grown(z_score: Tensor, cfg: DIFFenderConfig, backward: Backward = FULL) -> Tensor:
    """Threshold with hysteresis (Canny 1986): the regions above cfg.grow that hold a latent above theta, (B, 1, h, w).

    An attacker hides half a patch from one threshold; here every latent that stays above theta gives away the whole.
    Gradients pass straight through the lower threshold.
    """
    seeds, region = ((z_score > threshold).to(z_score.dtype) for threshold in (cfg.theta, cfg.grow))
    reached = connected(seeds, region)
    lower = binarize(z_score, cfg.grow, backward.ste, backward.ste_k)
    return lower * reached if backward.ste == "soft" else straight_through(reached, lower)


def refine_mask(z_score: Tensor, size: Sequence[int], cfg: DIFFenderConfig, backward: Backward = FULL) -> Tensor:
    """z-score map (B, 1, h, w) to the mask (B, 1, *size) in {0, 1}; gradients pass straight through both thresholds.

    `backward.ste` says how through the first, see `binarize`; with `soft` nothing is binary.

    Threshold theta, 3x3 Gaussian (none for sigma 0), square dilation, upsampling, threshold 0.5: lone pixels vanish,
    and what stays grows by about one latent. By Cantelli's inequality no more than 1 / (1 + theta^2) of a map lies
    theta standard deviations above its mean (20 % at 2): of larger patches a part escapes.
    """
    if 0 < cfg.grow < cfg.theta:
        mask = grown(z_score, cfg, backward)
    else:
        mask = binarize(z_score, cfg.theta, backward.ste, backward.ste_k)
    if cfg.sigma > 0:
        mask = gaussian_blur(mask, sigma=cfg.sigma)
    mask = resize(dilate(mask, cfg.dilation), size)
    return mask if backward.ste == "soft" else binarize(mask, 0.5)
