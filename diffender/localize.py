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
    """x_a and x_b of Eq. 2: x0 predicted in one step with prompt_L and with the empty text, (B, m, 4, h, w) each.

    z0 (B, 4, h, w) are the latents of the image. blank (1, 5, h, w) tells an inpainting UNet that everything is masked.
    Both predictions start from the same noised latents. Guidance leaves that for the empty text unchanged, so a draw
    takes two UNet evaluations. Without a prompt (`contexts.locate` is None, the paper's EP variant) the same noise
    would make both predictions equal. The second then starts from noise of its own, `noise.draws_empty`.
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
    x0_prompt = rearrange(predict_x0(z_t, eps, a_t), "(b m) c h w -> b m c h w", b=b)
    x0_empty = rearrange(predict_x0(z_t_empty, eps_empty, a_t), "(b m) c h w -> b m c h w", b=b)
    return x0_prompt, x0_empty


def difference_map(x0_prompt: Tensor, x0_empty: Tensor) -> Tensor:
    """Eq. 2: the mean over m draws and the channels of |x0(prompt) - x0(empty)|, (B, m, 4, h, w) to (B, 1, h, w)."""
    return reduce((x0_prompt - x0_empty).abs(), "b m c h w -> b 1 h w", "mean")


def standardize(x: Tensor) -> Tensor:
    """z-score of each image's map (B, 1, h, w), with the unbiased standard deviation."""
    std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(1e-8)


def standardize_robustly(x: Tensor) -> Tensor:
    """As `standardize`, (B, 1, h, w), but with the median and the median absolute deviation (MAD).

    A large patch raises the mean and the standard deviation, and so its own threshold. It changes median and MAD less.
    """
    flat = x.flatten(2)
    median = flat.median(dim=2, keepdim=True).values
    # The MAD of a normal distribution is 0.6745 standard deviations.
    mad = (flat - median).abs().median(dim=2, keepdim=True).values
    return ((flat - median) / (mad / 0.6745).clamp_min(1e-8)).view_as(x)


SCORES = {"z": standardize, "mad": standardize_robustly}


def grown(z_score: Tensor, cfg: DIFFenderConfig, backward: Backward = FULL) -> Tensor:
    """Hysteresis thresholding (Canny 1986), (B, 1, h, w): the regions above cfg.grow with a latent above theta in them.

    One latent above theta is enough to mask a whole region, so an attacker has to hide every latent of the patch.
    Gradients pass the lower threshold as `backward.ste` says, see `binarize`.
    """
    seeds, region = ((z_score > threshold).to(z_score.dtype) for threshold in (cfg.theta, cfg.grow))
    reached = connected(seeds, region)
    lower = binarize(z_score, cfg.grow, backward.ste, backward.ste_k)
    return lower * reached if backward.ste == "soft" else straight_through(reached, lower)


def refine_mask(z_score: Tensor, size: Sequence[int], cfg: DIFFenderConfig, backward: Backward = FULL) -> Tensor:
    """Eq. 2's Binarize, as in B.3: z-scores (B, 1, h, w) to a mask (B, 1, H, W) of size = (H, W), in {0, 1}.

    Steps: threshold theta, 3x3 Gaussian blur (none for sigma 0), dilation by a square, upsampling, threshold 0.5. With
    the default blur and dilation, single latents vanish, and larger regions grow by about one latent.

    Gradients pass the first threshold as `backward.ste` says (see `binarize`), and the second straight through. With
    ste="soft" the mask is not binary but lies in [0, 1].

    By Cantelli's inequality at most 1 / (1 + theta^2) of a map, 20 % for theta 2, lies theta standard deviations above
    its mean. Dilation adds about a latent on each side. A patch much larger than that is therefore masked only in part.
    """
    if 0 < cfg.grow < cfg.theta:
        mask = grown(z_score, cfg, backward)
    else:
        mask = binarize(z_score, cfg.theta, backward.ste, backward.ste_k)
    if cfg.sigma > 0:
        mask = gaussian_blur(mask, sigma=cfg.sigma)
    mask = resize(dilate(mask, cfg.dilation), size)
    return mask if backward.ste == "soft" else binarize(mask, 0.5)
