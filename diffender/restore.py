"""Patch restoration, Sec. 3.2: inpaint the mask with the same model, keep the rest of the picture."""

import torch
from torch import Tensor

from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.samplers import SAMPLERS


def inpaint(
    model: LatentDiffusion,
    x: Tensor,
    mask: Tensor,
    context: Tensor,
    context_empty: Tensor,
    noise_masked: Tensor,
    noise_start: Tensor,
    noise_steps: Tensor,
    steps: int,
    guidance: float,
    eta: float = 0.0,
    sampler: str = "ddim",
) -> Tensor:
    """x (B, 3, H, W) in [0, 1] with mask (B, 1, H, W), 1 = repaint, to a whole new picture; about [0, 1], not clamped.

    From pure noise, `noise_start`. Both branches of guidance share an evaluation; guidance 1 runs the conditional one
    alone. noise_masked is for the posterior of the masked picture, noise_steps for eta > 0. Memory does not grow with
    `steps`: the model recomputes its activations in the backward pass.
    """
    conditioning = model.masked_conditioning(x, mask, noise_masked)

    def guided_eps(z_t: Tensor, t: int) -> Tensor:
        if guidance == 1:
            return model.eps(z_t, t, context, conditioning)
        eps, eps_empty = model.eps(z_t, t, torch.stack([context, context_empty]), conditioning)
        return eps_empty + guidance * (eps - eps_empty)

    method = SAMPLERS[sampler]
    z_0 = method.run(guided_eps, noise_start, method.grid(model.alphas_cumprod, steps), eta, noise_steps)
    return model.decode(z_0)


def composite(x: Tensor, x_hat: Tensor, mask: Tensor) -> Tensor:
    """x outside the mask, to the bit; the clamped x_hat inside."""
    return x * (1 - mask) + x_hat.clamp(0, 1) * mask
