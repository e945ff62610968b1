"""Our networks against diffusers', with random weights at reduced size. Skipped where diffusers is not installed."""

import pytest
import torch

from diffender.layouts import unet_name, vae_name
from diffender.models.unet import UNet, UNetConfig
from diffender.models.vae import AutoencoderKL, VAEConfig
from diffender.schedule import ddim_alphas, ddim_step, ddim_timesteps, make_alphas_cumprod

diffusers = pytest.importorskip("diffusers")


def randomize(module: torch.nn.Module) -> None:
    """Weights large enough for a wrong epsilon, activation or order to show, small enough to stay finite."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        scale = 0.3 if p.ndim == 1 else 0.7 / p[0].numel() ** 0.5
        p.data = scale * torch.randn(p.shape, generator=g, dtype=p.dtype) + (p.ndim == 1) * 0.2


def copy(ours: torch.nn.Module, theirs: torch.nn.Module, name) -> None:
    state = {name(k): v for k, v in ours.state_dict().items()}
    like = theirs.state_dict()
    assert state.keys() == like.keys()
    theirs.load_state_dict({k: v.reshape(like[k].shape) for k, v in state.items()})


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("linear", [False, True], ids=["sd15", "sd2"])
def test_unet_eps_and_gradients(linear):
    cfg = UNetConfig(model_channels=32, channel_mult=(1, 2, 4, 4), context_dim=48, linear_proj=linear,
                     num_heads=None if linear else 4, head_dim=16)  # fmt: skip
    ours = UNet(cfg).double()
    randomize(ours)
    blocks = ("CrossAttn",) * 3 + ("",)
    theirs = diffusers.UNet2DConditionModel(
        in_channels=9, out_channels=4, block_out_channels=(32, 64, 128, 128), layers_per_block=2,
        down_block_types=[f"{b}DownBlock2D" for b in blocks], up_block_types=[f"{b}UpBlock2D" for b in blocks[::-1]],
        cross_attention_dim=48, attention_head_dim=[2, 4, 8, 8] if linear else 4, use_linear_projection=linear,
    ).double()  # fmt: skip
    copy(ours, theirs, lambda k: unet_name(k, 2))
    g = torch.Generator().manual_seed(1)
    for t, size in ((1, (16, 16)), (481, (16, 24)), (981, (8, 16))):
        x = torch.randn(2, 9, *size, generator=g, dtype=torch.float64).requires_grad_()
        context = torch.randn(2, 77, 48, generator=g, dtype=torch.float64).requires_grad_()
        a, b = ours(x, torch.tensor([t, t]), context), theirs(x, t, context).sample
        assert relative(a, b) < 1e-6
        weights = torch.randn(b.shape, generator=g, dtype=torch.float64)
        grads = [torch.autograd.grad((y * weights).sum(), (x, context)) for y in (a, b)]
        for ga, gb in zip(*grads, strict=True):
            assert relative(ga, gb) < 1e-6


def test_vae_moments_and_decode():
    ours = AutoencoderKL(VAEConfig(ch=32)).double()
    randomize(ours)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    ).double()  # fmt: skip
    copy(ours, theirs, lambda k: vae_name(k, 4))
    g = torch.Generator().manual_seed(1)
    x = torch.rand(1, 3, 48, 64, generator=g, dtype=torch.float64)
    posterior, dist = ours.posterior(x), theirs.encode(2 * x - 1).latent_dist
    assert relative(posterior.mean, dist.mean) < 1e-6
    assert relative(posterior.logvar, dist.logvar) < 1e-6
    z = torch.randn(1, 4, 6, 8, generator=g, dtype=torch.float64)
    assert relative(ours.decode(z), (theirs.decode(z / 0.18215).sample + 1) / 2) < 1e-6


@pytest.mark.parametrize(("steps", "eta"), [(5, 0.0), (20, 0.0), (20, 1.0)])
def test_ddim_trajectory(steps, eta):
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    timesteps = ddim_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps
    g = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(1, 4, 8, 8, generator=g)
    for t, a_t, a_prev in zip(timesteps, *ddim_alphas(make_alphas_cumprod(), timesteps), strict=True):
        noise = torch.randn(1, 4, 8, 8, generator=g)
        ours = ddim_step(ours, (ours * (1 + t / 1000)).tanh(), a_t, a_prev, eta, noise)
        eps = (theirs * (1 + t / 1000)).tanh()
        theirs = scheduler.step(eps, t, theirs, eta=eta, variance_noise=noise if eta else None).prev_sample
    assert relative(ours, theirs) < 1e-5
