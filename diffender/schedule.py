"""The diffusion schedule and the DDIM sampler, as pure functions of tensors.

Noise schedule: Ho et al. 2020 with Stable Diffusion's "scaled linear" betas. Sampler: Song et al. 2021 (DDIM),
eq. 12 and 16, with the timestep grid and the final alpha of the published Stable Diffusion pipelines.
"""

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


def ddim_timesteps(steps: int) -> list[int]:
    """The timesteps of an N-step DDIM run, largest first: k (1000 // N) + 1 ("leading" spacing, offset 1)."""
    if not 1 <= steps <= TRAIN_STEPS - 1:
        raise ValueError(f"steps is {steps}; DDIM takes 1 to {TRAIN_STEPS - 1} steps")
    stride = TRAIN_STEPS // steps
    return [min(k * stride + 1, TRAIN_STEPS - 1) for k in reversed(range(steps))]


def ddim_alphas(alphas_cumprod: Tensor, timesteps: list[int]) -> tuple[list[float], list[float]]:
    """(a_t, a_prev) for each step. Before the last step stands alphas_cumprod[0], not 1, as in the published models."""
    stride = TRAIN_STEPS // len(timesteps)
    a_t = [alphas_cumprod[t].item() for t in timesteps]
    a_prev = [alphas_cumprod[max(t - stride, 0)].item() for t in timesteps]
    return a_t, a_prev


def ddim_step(
    x_t: Tensor, eps: Tensor, a_t: float, a_prev: float, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """One step from level a_t to level a_prev; eta 0 is deterministic, eta 1 has the variance of DDPM.

    `noise` (the shape of x_t) is needed when eta > 0.
    """
    x0 = predict_x0(x_t, eps, a_t)
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    x_prev = a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps
    if eta > 0:
        if noise is None:
            raise ValueError(f"eta is {eta}: a stochastic DDIM step needs its noise")
        x_prev = x_prev + sigma * noise
    return x_prev


def noise_timestep(noise_ratio: float) -> int:
    """The timestep of a noise ratio in (0, 1], on the 50-step DDIM grid that the authors' demo uses: 481 for 0.5."""
    if not 0.02 <= noise_ratio <= 1:
        raise ValueError(f"noise_ratio is {noise_ratio}; it lies between 0.02 and 1")
    return ddim_timesteps(50)[50 - int(50 * noise_ratio)]
