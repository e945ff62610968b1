"""The samplers' grids against golden numbers, their identities, and their gradients. Parity is in test_parity.py."""

import pytest
import torch

from diffender.config import DIFFenderConfig
from diffender.stable_diffusion.samplers import SAMPLERS, Step, ddim, ddim_grid, ddim_step, dpmpp, dpmpp_grid
from diffender.stable_diffusion.schedule import ALPHAS_CUMPROD, q_sample
from diffender.utils.errors import InputError

A = ALPHAS_CUMPROD


@pytest.mark.parametrize(
    ("steps", "head", "last"), [(5, [801, 601, 401, 201], 1), (20, [951, 901], 1), (50, [981, 961], 1), (30, [958], 1)]
)
def test_ddim_timesteps(steps, head, last):
    timesteps = [step.t for step in ddim_grid(steps)]
    assert len(timesteps) == steps
    assert timesteps[: len(head)] == head
    assert timesteps[-1] == last


def test_ddim_ends_at_the_first_alpha_not_at_one():
    grid = ddim_grid(20)
    assert grid[-1].a_prev == A[0]
    assert [s.a_prev for s in grid[:-1]] == [s.a_t for s in grid[1:]]


@pytest.mark.parametrize(("steps", "head", "last"), [(10, [999, 899], 100), (20, [999, 949], 50), (3, [999, 666], 333)])
def test_dpmpp_timesteps(steps, head, last):
    grid = dpmpp_grid(steps)
    assert [s.t for s in grid[: len(head)]] == head
    assert (len(grid), grid[-1].t, grid[-1].a_prev) == (steps, last, 1.0)


@pytest.mark.parametrize("make", [ddim_grid, dpmpp_grid])
def test_more_steps_than_the_schedule_has_are_refused(make):
    with pytest.raises(InputError, match="steps is 1000"):
        make(1000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_true_noise_leads_back(name):
    """Along the true eps a deterministic run lands on q_sample at its last level, whatever its steps."""
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=g, dtype=torch.float64)
    sampler = SAMPLERS[name]
    grid = sampler.grid(7)
    z_t = q_sample(x0, noise, grid[0].a_t)
    z_0 = sampler.run(lambda z, t: (z - A[t] ** 0.5 * x0) / (1 - A[t]) ** 0.5, z_t, grid)
    assert torch.allclose(z_0, q_sample(x0, noise, grid[-1].a_prev), atol=1e-9)


def gaussian_eps(z: torch.Tensor, t: int) -> torch.Tensor:
    """The exact eps of data that is normal with standard deviation 0.3: then the solution of the ODE is known."""
    a = A[t]
    return (1 - a) ** 0.5 * z / (0.09 * a + 1 - a)


def test_dpmpp_needs_fewer_steps_than_ddim():
    """On Gaussian data: the error of 10 DPM-Solver++ steps is below that of 10 DDIM steps from the same t."""
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, end = A[999], A[0]
    exact = z * ((0.09 * end + 1 - end) / (0.09 * a + 1 - a)) ** 0.5
    grid = [s._replace(a_prev=s.a_prev if s.a_prev < 1 else end) for s in dpmpp_grid(10)]
    errors = [(run(gaussian_eps, z, grid) - exact).norm() for run in (dpmpp, ddim)]
    assert errors[0] < 0.5 * errors[1]


def test_eta_one_keeps_the_marginal_variance():
    """With x0 = 0 and unit noise, a stochastic step must keep var(x_t) = 1 - a_t."""
    g = torch.Generator().manual_seed(2)
    noise, fresh = torch.randn(2, 400_000, generator=g, dtype=torch.float64)
    step = Step(500, A[500], A[400])
    x = ddim_step((1 - step.a_t) ** 0.5 * noise, noise, step, eta=1.0, noise=fresh)
    assert x.var().item() == pytest.approx(1 - step.a_prev, rel=0.01)
    with pytest.raises(ValueError, match="needs its noise"):
        ddim_step(x, noise, step, eta=1.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_by_finite_differences(name):
    """Through the whole run, to the start and to what the noise is predicted from."""
    sampler = SAMPLERS[name]
    g = torch.Generator().manual_seed(3)
    z, w = (torch.randn(1, 2, 2, 2, generator=g, dtype=torch.float64).requires_grad_() for _ in "zw")
    grid = sampler.grid(4)
    run = lambda z, w: sampler.run(lambda z_t, t: (z_t * w + t / 1000).tanh(), z, grid)  # noqa: E731
    assert torch.autograd.gradcheck(run, (z, w), rtol=1e-4)


def test_names_and_eta():
    with pytest.raises(InputError, match="unknown sampler 'euler'; choose one of ddim, dpmpp"):
        DIFFenderConfig(sampler="euler")
    with pytest.raises(InputError, match="eta is 0.5; DPM-Solver"):
        dpmpp(gaussian_eps, torch.zeros(1, 4, 8, 8), dpmpp_grid(4), eta=0.5)
