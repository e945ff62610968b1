"""Patch restoration, Sec. 3.2: inpaint the mask with the same model, keep the rest of the picture."""

from functools import partial

import torch
from torch import Tensor

from diffender.diffusion import LatentDiffusion
from diffender.ops import recompute
from diffender.schedule import ddim_alphas, ddim_step, ddim_timesteps


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
    eta: float,
) -> Tensor:
    """x (B, 3, H, W) in [0, 1] with mask (B, 1, H, W), 1 = repaint, to a whole new picture; about [0, 1], not clamped.

    DDIM from pure noise. The conditional and the empty branch of guidance share a batch; guidance 1 runs the first
    alone. Activations of a step are recomputed in the backward pass, so memory does not grow with `steps`.
    """
    conditioning = recompute(model.masked_conditioning, x, mask, noise_masked)
    b = len(x)
    contexts = context.expand(b, -1, -1)
    if guidance != 1:
        contexts = torch.cat([contexts, context_empty.expand(b, -1, -1)])

    def guided_eps(t: int, z_t: Tensor, contexts: Tensor, conditioning: Tensor) -> Tensor:
        if guidance == 1:
            return model.eps(z_t, t, contexts, conditioning)
        eps, eps_empty = model.eps(torch.cat([z_t, z_t]), t, contexts, torch.cat([conditioning, conditioning])).chunk(2)
        return eps_empty + guidance * (eps - eps_empty)

    z_t = noise_start
    timesteps = ddim_timesteps(steps)
    for i, (t, a_t, a_prev) in enumerate(zip(timesteps, *ddim_alphas(model.alphas_cumprod, timesteps), strict=True)):
        # t is bound now: the backward pass runs the function again, when the loop has long moved on.
        eps = recompute(partial(guided_eps, t), z_t, contexts, conditioning)
        z_t = ddim_step(z_t, eps, a_t, a_prev, eta, noise_steps[:, i] if eta > 0 else None)
    return recompute(model.vae.decode, z_t)


def composite(x: Tensor, x_hat: Tensor, mask: Tensor) -> Tensor:
    """x outside the mask, to the bit; the clamped x_hat inside."""
    return x * (1 - mask) + x_hat.clamp(0, 1) * mask
