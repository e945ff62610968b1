"""Patch restoration, Sec. 3.2: inpaint the mask with the same model, keep the rest of the image."""

import torch
from torch import Tensor

from diffender.config import DIFFenderConfig
from diffender.noise import Noise
from diffender.prompts import Contexts
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.samplers import SAMPLERS


def inpaint(
    model: LatentDiffusion, x: Tensor, mask: Tensor, contexts: Contexts, noise: Noise, cfg: DIFFenderConfig
) -> Tensor:
    """x (B, 3, H, W) in [0, 1] with mask (B, 1, H, W), 1 = repaint, to a whole new image; about [0, 1], not clamped.

    It starts from pure noise, `noise.start`. Both branches of guidance share an evaluation; guidance 1 runs the
    conditional one alone. Unless the model keeps its activations, they are recomputed: memory does not grow with steps.
    """
    conditioning = model.masked_conditioning(x, mask, noise.masked)

    def guided_eps(z_t: Tensor, t: int) -> Tensor:
        if cfg.guidance == 1:
            return model.eps(z_t, t, contexts.restore, conditioning)
        eps, eps_empty = model.eps(z_t, t, torch.stack([contexts.restore, contexts.empty]), conditioning)
        return eps_empty + cfg.guidance * (eps - eps_empty)

    sampler = SAMPLERS[cfg.sampler]
    grid = sampler.grid(cfg.steps)
    z_0 = sampler.run(guided_eps, noise.start, grid, cfg.eta, noise.steps)
    return model.decode(z_0)


def composite(x: Tensor, x_hat: Tensor, mask: Tensor) -> Tensor:
    """x outside the mask, to the bit; the clamped x_hat inside."""
    return x * (1 - mask) + x_hat.clamp(0, 1) * mask
