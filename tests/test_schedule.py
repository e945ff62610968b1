"""The schedule against golden numbers of the published models, and its identities."""

import pytest
import torch

from diffender.stable_diffusion.schedule import eps_from_v, make_alphas_cumprod, noise_timestep, predict_x0, q_sample

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


@pytest.mark.parametrize("t", [1, 481, 981])
def test_v_stands_for_its_noise(t):
    """v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022), turned back into eps."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    a_t = A[t].double()
    v = a_t.sqrt() * noise - (1 - a_t).sqrt() * x0
    assert torch.allclose(eps_from_v(q_sample(x0, noise, a_t), v, a_t), noise, atol=1e-12)


def test_noise_ratio_of_the_paper():
    assert noise_timestep(0.5) == 481
    assert noise_timestep(1.0) == 981
    assert noise_timestep(0.58) == 561, "50 times 0.58 is a hair less than 29"
    with pytest.raises(ValueError, match="noise_ratio"):
        noise_timestep(0)
