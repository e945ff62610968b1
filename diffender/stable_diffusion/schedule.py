"""The noise schedule (Ho et al. 2020, with Stable Diffusion's "scaled linear" betas), as pure functions of tensors.

a_t is alphas_cumprod[t]: a number where one timestep holds for all, so that nothing is copied to a device or waited
for, or a tensor that broadcasts to the latents.
"""

import math

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def make_alphas_cumprod() -> Tensor:
    """The table of cumulative alphas, float32 of shape (1000,), computed in float64."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


ALPHAS_CUMPROD: tuple[float, ...] = tuple(make_alphas_cumprod().tolist())
"""The table as numbers."""


def sqrt(a: Tensor | float) -> Tensor | float:
    return a.sqrt() if isinstance(a, Tensor) else math.sqrt(a)


def q_sample(x0: Tensor, noise: Tensor, a_t: Tensor | float) -> Tensor:
    """Noise x0 to the level a_t: sqrt(a_t) x0 + sqrt(1 - a_t) noise."""
    return sqrt(a_t) * x0 + sqrt(1 - a_t) * noise


def predict_x0(x_t: Tensor, eps: Tensor, a_t: Tensor | float) -> Tensor:
    """The one-step estimate of x0 from x_t and the predicted noise; the inverse of `q_sample`."""
    return (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)


def eps_from_v(x_t: Tensor, v: Tensor, a_t: Tensor | float) -> Tensor:
    """The noise that a v-prediction stands for (Salimans & Ho 2022): v = sqrt(a_t) eps - sqrt(1 - a_t) x0."""
    return sqrt(a_t) * v + sqrt(1 - a_t) * x_t


def noise_timestep(noise_ratio: float) -> int:
    """The timestep of a noise ratio in [0.02, 1]: 481 for the paper's 0.5.

    The ratio is read on a DDIM grid of 50 steps with offset 1, as the inpainting models have it. The authors' demo
    localises with a model whose offset is 0, at 480. Raises ValueError for ratios out of range.
    """
    if not 0.02 <= noise_ratio <= 1:
        raise ValueError(f"noise_ratio is {noise_ratio}; it lies between 0.02 and 1")
    step = int(round(50 * noise_ratio, 6))  # rounded down; `round` first, since 50 * 0.58 is 28.999999999999996
    return (step - 1) * (TRAIN_STEPS // 50) + 1
