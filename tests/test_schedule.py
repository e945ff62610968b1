"""The schedule against golden numbers of the published models, and its identities."""

import pytest
import torch

from diffender.schedule import (
    ddim_alphas,
    ddim_step,
    ddim_timesteps,
    make_alphas_cumprod,
    noise_timestep,
    predict_x0,
    q_sample,
)

A = make_alphas_cumprod()


@pytest.mark.parametrize(
    ("t", "value"),
    [(0, 0.99915), (1, 0.998296), (20, 0.981314), (480, 0.303694), (481, 0.302295), (499, 0.277669650),
     (500, 0.276332684), (951, 0.008155), (981, 0.005775), (999, 0.004660099)],
)  # fmt: skip
def test_alphas_cumprod_golden(t, value):
    assert A[t].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("t", [0, 250, 481, 999])
def test_predict_x0_inverts_q_sample(t):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    a_t = A[t].double()
    assert torch.allclose(predict_x0(q_sample(x0, noise, a_t), noise, a_t), x0, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "head", "last"), [(5, [801, 601, 401, 201], 1), (20, [951, 901], 1), (50, [981, 961], 1), (30, [958], 1)]
)
def test_ddim_timesteps(steps, head, last):
    timesteps = ddim_timesteps(steps)
    assert len(timesteps) == steps
    assert timesteps[: len(head)] == head
    assert timesteps[-1] == last


def test_ddim_ends_at_the_first_alpha_not_at_one():
    a_t, a_prev = ddim_alphas(A, ddim_timesteps(20))
    assert a_prev[-1] == A[0].item()
    assert a_prev[:-1] == a_t[1:]


def test_ddim_with_the_true_noise_recovers_x0():
    """Along the true eps a deterministic run lands on q_sample at the first alpha, whatever its steps."""
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=g, dtype=torch.float64)
    timesteps = ddim_timesteps(7)
    x = q_sample(x0, noise, A[timesteps[0]].item())
    for a_t, a_prev in zip(*ddim_alphas(A, timesteps), strict=True):
        x = ddim_step(x, noise, a_t, a_prev)
    assert torch.allclose(x, q_sample(x0, noise, A[0].item()), atol=1e-10)


def test_eta_one_keeps_the_marginal_variance():
    """With x0 = 0 and unit noise, a stochastic step must keep var(x_t) = 1 - a_t."""
    g = torch.Generator().manual_seed(2)
    noise, fresh = torch.randn(2, 400_000, generator=g, dtype=torch.float64)
    a_t, a_prev = A[500].item(), A[400].item()
    x = ddim_step((1 - a_t) ** 0.5 * noise, noise, a_t, a_prev, eta=1.0, noise=fresh)
    assert x.var().item() == pytest.approx(1 - a_prev, rel=0.01)
    with pytest.raises(ValueError, match="needs its noise"):
        ddim_step(x, noise, a_t, a_prev, eta=1.0)


def test_noise_ratio_of_the_paper():
    assert noise_timestep(0.5) == 481
    assert noise_timestep(1.0) == 981
    with pytest.raises(ValueError, match="noise_ratio"):
        noise_timestep(0)
