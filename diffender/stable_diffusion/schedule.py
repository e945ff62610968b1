"""The noise schedule (Ho et al. 2020, with Stable Diffusion's "scaled linear" betas), as pure functions of tensors."""

import torch
from torch import Tensor

TRAIN_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def make_alphas_cumprod() -> Tensor:
    """The table of cumulative alphas, float32 of shape (1000,), computed in float64."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def q_sample(x0: Tensor, noise: Tensor, a_t: Tensor | float) -> Tensor:
    """Noise x0 to the level a_t = alphas_cumprod[t]: sqrt(a_t) x0 + sqrt(1 - a_t) noise."""
    a_t = torch.as_tensor(a_t, dtype=x0.dtype, device=x0.device)
    return a_t.sqrt() * x0 + (1 - a_t).sqrt() * noise


def predict_x0(x_t: Tensor, eps: Tensor, a_t: Tensor | float) -> Tensor:
    """The one-step estimate of x0 from x_t and the predicted noise; the inverse of `q_sample`."""
    a_t = torch.as_tensor(a_t, dtype=x_t.dtype, device=x_t.device)
    return (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()


def eps_from_v(x_t: Tensor, v: Tensor, a_t: Tensor | float) -> Tensor:
    """The noise that a v-prediction stands for (Salimans & Ho 2022): v = sqrt(a_t) eps - sqrt(1 - a_t) x0."""
    a_t = torch.as_tensor(a_t, dtype=x_t.dtype, device=x_t.device)
    return a_t.sqrt() * v + (1 - a_t).sqrt() * x_t


def noise_timestep(noise_ratio: float) -> int:
    """The timestep of a noise ratio in (0, 1], on the 50-step DDIM grid that the authors' demo uses: 481 for 0.5."""
    if not 0.02 <= noise_ratio <= 1:
        raise ValueError(f"noise_ratio is {noise_ratio}; it lies between 0.02 and 1")
    return 20 * (int(50 * noise_ratio) - 1) + 1
