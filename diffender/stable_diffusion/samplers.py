"""Samplers on the schedule of Stable Diffusion, as pure functions: DDIM, and DPM-Solver++(2M) where steps are few.

A grid lists the steps of a run; a sampler walks it from noise to latents, asking `eps(z_t, t)` once a step. Both are
differentiable.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from diffender.stable_diffusion.schedule import ALPHAS_CUMPROD, TRAIN_STEPS, predict_x0
from diffender.utils.errors import InputError

Eps = Callable[[Tensor, int], Tensor]  # noise in z_t (B, 4, h, w) at timestep t


class Step(NamedTuple):
    t: int
    a_t: float  # alphas_cumprod where the step starts
    a_prev: float  # and where it ends


def ddim_grid(steps: int) -> list[Step]:
    """t_k = k (1000 // N) + 1 for k = N-1 .. 0: "leading" spacing with offset 1, as the official pipelines run.

    The last step ends at alphas_cumprod[0], not at 1 (`set_alpha_to_one` is false in the published models). Some N
    begin well below t = 999: N = 1 at t = 1, N = 2 at 501, N = 3 at 667, and N from 501 to 998 at t = N. Restoration
    starts from pure noise, which the model does not expect there. Raises InputError unless N is from 1 to 999.
    """
    check_steps(steps)
    stride = TRAIN_STEPS // steps
    timesteps = [k * stride + 1 for k in reversed(range(steps))]
    return [Step(t, ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[max(t - stride, 0)]) for t in timesteps]


def dpmpp_grid(steps: int) -> list[Step]:
    """Evenly spaced from t = 999 to, but without, 0; the last step ends free of noise (a_prev = 1)."""
    check_steps(steps)
    timesteps = [round(k * (TRAIN_STEPS - 1) / steps) for k in reversed(range(1, steps + 1))]
    a = [ALPHAS_CUMPROD[t] for t in timesteps]
    return list(map(Step, timesteps, a, [*a[1:], 1.0]))


def check_steps(steps: int) -> None:
    if not 1 <= steps <= TRAIN_STEPS - 1:
        raise InputError(f"steps is {steps}; a sampler takes 1 to {TRAIN_STEPS - 1}")


def ddim_step(z_t: Tensor, eps: Tensor, step: Step, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """Song et al. 2021, eq. 12 and 16: eta 0 is deterministic, eta 1 has the variance of DDPM and needs `noise`."""
    _, a_t, a_prev = step
    x0 = predict_x0(z_t, eps, a_t)
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
    z_prev = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma**2) * eps
    if eta > 0:
        if noise is None:
            raise ValueError(f"eta is {eta}: a stochastic DDIM step needs its noise")
        z_prev = z_prev + sigma * noise
    return z_prev


def ddim(predict_eps: Eps, z_t: Tensor, grid: list[Step], eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """Walk `grid` from z_t (B, 4, h, w). `noise` (B, len(grid), 4, h, w) is that of the steps, for eta > 0."""
    for i, step in enumerate(grid):
        step_noise = noise[:, i] if eta > 0 and noise is not None else None
        z_t = ddim_step(z_t, predict_eps(z_t, step.t), step, eta, step_noise)
    return z_t


def half_log_snr(a: float) -> float:
    """lambda = log(alpha / sigma) of Lu et al. 2022; infinite where no noise is left."""
    return math.inf if a == 1 else 0.5 * math.log(a / (1 - a))


def dpmpp_step(z_t: Tensor, x0: Tensor, step: Step, x0_before: Tensor | None, before: Step | None) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), from this x0 estimate and that of the step before.

    First order where there is none, and at the end, where the noise-free limit of the update is x0 itself.
    """
    _, a_t, a_prev = step
    h = half_log_snr(a_prev) - half_log_snr(a_t)
    d = x0
    if x0_before is not None and before is not None and a_prev < 1:
        h_before = half_log_snr(a_t) - half_log_snr(before.a_t)
        d = x0 + 0.5 * h / h_before * (x0 - x0_before)
    return math.sqrt((1 - a_prev) / (1 - a_t)) * z_t - math.sqrt(a_prev) * math.expm1(-h) * d


def dpmpp(predict_eps: Eps, z_t: Tensor, grid: list[Step], eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """Walk `grid` from z_t (B, 4, h, w); deterministic: eta must be 0, and `noise` is not used."""
    if eta > 0:
        raise InputError(f"eta is {eta}; DPM-Solver++(2M) is deterministic: use eta 0, or the ddim sampler")
    x0_before, before = None, None
    for step in grid:
        x0 = predict_x0(z_t, predict_eps(z_t, step.t), step.a_t)
        z_t = dpmpp_step(z_t, x0, step, x0_before, before)
        x0_before, before = x0, step
    return z_t


class Sampler(NamedTuple):
    grid: Callable[..., list[Step]]
    run: Callable[..., Tensor]


SAMPLERS = {"ddim": Sampler(ddim_grid, ddim), "dpmpp": Sampler(dpmpp_grid, dpmpp)}
