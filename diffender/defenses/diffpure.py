"""DiffPure (Nie et al. 2022) on our own diffusion model: noise the image to t*, then denoise it all the way.

With the UNet and VAE of DIFFender, so that a comparison is one of methods. The original diffuses pixels of 256 x 256
with another schedule: its t* = 0.15 has the noise level of 0.18 here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffender.noise import generator
from diffender.ops import resize
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.samplers import Step, ddim
from diffender.stable_diffusion.schedule import ALPHAS_CUMPROD, TRAIN_STEPS, q_sample
from diffender.utils.errors import InputError
from diffender.utils.options import check_options, option


@dataclass(frozen=True)
class DiffPure:
    model: LatentDiffusion
    empty: Tensor  # (1, 77, D): the context of the empty prompt
    blank: Tensor  # (1, 5, h, w): "everything is masked", which makes an inpainting UNet unconditional at this size
    t_star: float = option(0.15, "Noise ratio t*. 0: the round trip through the VAE alone.", low=0, high=0.999)
    steps: int = option(15, "Steps of DDIM from t* down.", low=0, high=TRAIN_STEPS)
    eta: float = option(1.0, "1: stochastic as the original's SDE; 0: deterministic.", low=0, high=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.t_star > 0 and self.steps < 1:
            raise InputError(f"steps is {self.steps}; with t_star {self.t_star} it is at least 1")
        if self.t_star > 0 and self.steps > (most := max(1, round(self.t_star * TRAIN_STEPS))):
            raise InputError(f"steps is {self.steps}; from t_star {self.t_star} there are {most} timesteps to take")

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor:
        """(B, 2 + steps, 4, h, w): of the posterior, of the way up, of the steps down."""
        shape = (2 + self.steps, *self.blank[0, 1:].shape)
        drawn = [torch.randn(shape, generator=generator(seed, i, purpose, k)) for i in image_ids]
        return torch.stack(drawn).to(self.model.alphas_cumprod)

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor:
        """x (B, 3, H, W) in [0, 1]; the same noise gives the same image."""
        size = [n * self.model.cfg.vae.factor for n in self.blank.shape[-2:]]
        z = self.model.encode(resize(x, size), noise[:, 0])
        if self.t_star > 0:
            grid = self.grid()
            z = q_sample(z, noise[:, 1], grid[0].a_t)
            z = ddim(self.eps, z, grid, self.eta, noise[:, 2:])
        return resize(self.model.decode(z).clamp(0, 1), x.shape[-2:])

    def eps(self, z_t: Tensor, t: int) -> Tensor:
        return self.model.eps(z_t, t, self.empty, self.blank)

    def grid(self) -> list[Step]:
        """Evenly spaced timesteps from t* down; the last step ends at alphas_cumprod[0]."""
        a = ALPHAS_CUMPROD
        timesteps = torch.linspace(0, self.t_star * TRAIN_STEPS, self.steps + 1).round().long().flip(0).tolist()
        return [Step(t, a[t], a[p]) for t, p in zip(timesteps, timesteps[1:], strict=False)]
