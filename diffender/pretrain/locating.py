"""Eq. 4 in pretraining: the difference map is told where a region was pasted, and regions learn to hide from it.

A model of this size, trained on captions alone, sees pastes dimly; the few shots of prompt tuning cannot change that.
Hiding is self-adversarial training (as of the segmenter in SAC, Liu et al. 2022): no classifier takes part.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from diffender.localize import standardize
from diffender.losses import evasion, evasion_max, mask_cross_entropy
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.schedule import predict_x0, q_sample

LEVELS = (100, 400)  # range of timesteps, without the upper end
THETA = 2.5  # threshold of the mask that is learned, in standard deviations
LOWER = 1.0  # threshold under which hiding brings a region on average; it brings the highest latent under THETA
STRIDES = (0.15, 0.5)  # range of the step size of `hide`, in standard deviations of latents


class Asked(NamedTuple):
    """The conditions of the two predictions that Eq. 2 compares."""

    contexts: Tensor  # (2, L, D): of the prompt, and of the empty one
    blank: Tensor  # (1, 5, h, w): everything is masked


def score(model: LatentDiffusion, z_0: Tensor, noise: Tensor, t: Tensor, asked: Asked) -> Tensor:
    """The z-scores (B, 1, h, w) of the difference between the predictions with both contexts, as Eq. 2 of one draw; t
    (B,) timesteps."""
    a_t = model.alphas_cumprod[t][:, None, None, None]
    z_t = q_sample(z_0, noise, a_t)
    b = len(z_0)
    with torch.autocast(z_0.device.type, torch.bfloat16):
        contexts, blank = (tensor.expand(b, -1, -1, -1) for tensor in asked)
        eps = model.predict_noise(model.unet, z_t, t, contexts, blank).float()
    x_0 = [predict_x0(z_t, eps[:, i], a_t) for i in range(2)]
    return standardize((x_0[0] - x_0[1]).abs().mean(dim=1, keepdim=True))


def hide(
    model: LatentDiffusion, z_0: Tensor, region: Tensor, at: tuple[Tensor, Tensor, Asked], steps: int, g: Generator
) -> Tensor:
    """Latents whose region has moved by signed steps that lower its score; `at` is the rest of `score`'s arguments."""
    low, high = STRIDES
    stride = low + (high - low) * torch.rand((), generator=g, device=g.device)
    z = z_0.detach()
    for _ in range(steps):
        z.requires_grad_()
        z_score = score(model, z, *at)
        sticks_out = evasion(z_score, region, LOWER) + evasion_max(z_score, region, THETA)
        (gradient,) = torch.autograd.grad(sticks_out.sum(), z)
        z = (z - stride * gradient.sign() * region).detach()
    return z


def location_loss(
    model: LatentDiffusion, z_0: Tensor, region: Tensor, asked: Asked, steps: int, g: Generator
) -> Tensor:
    """Eq. 4 of latents (B, 4, h, w) with pasted regions (B, 1, h, w) in [0, 1], some empty, at random noise levels.

    Half of the regions, at random, have hidden before, by 1 to `steps` steps.
    """
    b = len(z_0)
    t = torch.randint(*LEVELS, (b,), generator=g, device=g.device)
    noise = torch.randn(z_0.shape, generator=g, device=g.device)
    whole = region.round()  # of latents that are covered by more than half
    hides = (torch.rand(b, generator=g, device=g.device) < 0.5) & whole.flatten(1).any(dim=1)
    if steps and hides.any():
        n = int(torch.randint(1, steps + 1, (), generator=g, device=g.device))
        at = noise[hides], t[hides], asked._replace(contexts=asked.contexts.detach())
        z_0 = z_0.clone()
        z_0[hides] = hide(model, z_0[hides], whole[hides], at, n, g)
    return mask_cross_entropy(score(model, z_0, noise, t, asked) - THETA, region)
