"""One latent diffusion model: VAE, text encoder and 9-channel UNet as one object, for every preset.

Official checkpoints: `sd15-inpainting` (runwayml) and `sd2-inpainting` (stabilityai). `tiny` is the embedded model:
the same classes, narrower and shallower, with the weights in this repository.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffender.ops import recompute
from diffender.stable_diffusion.schedule import eps_from_v, make_alphas_cumprod
from diffender.stable_diffusion.text import TextConfig, TextTransformer
from diffender.stable_diffusion.unet import UNet, UNetConfig
from diffender.stable_diffusion.vae import AutoencoderKL, Posterior, VAEConfig


@dataclass(frozen=True)
class ModelConfig:
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    image_size: int  # side of the square images the model was trained on, in pixels

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of this many pixels."""
        return self.vae.factor * self.unet.multiple

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.vae.factor
        return self.vae.z_channels, side, side


MODELS = {
    "tiny": ModelConfig(
        UNetConfig(
            model_channels=96, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), context_dim=64,
            num_heads=4, norm_groups=8, prediction="v", patch=2,
        ),
        VAEConfig(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8, patch=2),
        TextConfig(width=64, heads=2, layers=3),
        image_size=224,
    ),
    "sd15-inpainting": ModelConfig(UNetConfig(), VAEConfig(), TextConfig(), image_size=512),
    "sd2-inpainting": ModelConfig(
        UNetConfig(context_dim=1024, num_heads=None, linear_proj=True),
        VAEConfig(),
        TextConfig(width=1024, heads=16, layers=23, quick_gelu=False, pad_token=0),
        image_size=512,
    ),
}  # fmt: skip


class LatentDiffusion(nn.Module):
    """A latent diffusion model (Rombach et al. 2022): VAE, text encoder, UNet and noise schedule.

    `posterior`, `latents` and `decode` lead to latents and back, `encode_text` makes contexts, `eps` predicts noise.
    """

    alphas_cumprod: Tensor
    micro_batch: int | None = None  # largest number of rows in one forward pass; the texts of a latent stay together
    settings: Any = None  # the DIFFenderConfig that suits the model; `load_model` sets it
    keep: bool = False  # store activations for the backward pass instead of recomputing them: takes more memory

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.unet = UNet(cfg.unet)
        self.vae = AutoencoderKL(cfg.vae)
        self.text = TextTransformer(cfg.text)
        self.locator: UNet | None = None  # a 4-channel UNet for localisation, as in the authors' demo
        self.register_buffer("alphas_cumprod", make_alphas_cumprod(), persistent=False)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts to their context, (len(texts), 77, context_dim)."""
        tokens = self.text.tokenize(texts).to(self.alphas_cumprod.device)
        return self.text(self.text.embed(tokens))

    def predict_noise(
        self, unet: UNet, z_t: Tensor, t: Tensor, contexts: Tensor, conditioning: Tensor | None = None
    ) -> Tensor:
        """Noise predicted by a UNet, (B, n, 4, h, w), in the dtype of z_t (B, 4, h, w), without micro-batches.

        t (B,) are timesteps, contexts (B, n, L, D) are n texts for each row, conditioning is (B, 5, h, w) or None. The
        texts of a row share the layers before the first text is read. A v-prediction is converted to noise.
        """
        x = z_t if conditioning is None else torch.cat([z_t, conditioning], dim=1)
        out = unet(x.to(unet.dtype), t, rearrange(contexts, "b n l d -> (n b) l d").to(unet.dtype)).to(z_t.dtype)
        out = rearrange(out, "(n b) c h w -> b n c h w", b=len(x))
        if unet.cfg.prediction == "v":
            return eps_from_v(z_t[:, None], out, self.alphas_cumprod[t].view(-1, 1, 1, 1, 1))
        return out

    def run(self, network: Callable[..., Tensor], *args: Tensor, texts: int = 1) -> Tensor:
        """network(*args) in micro-batches. Activations are recomputed in the backward pass unless `keep` is set.

        Of each row of `args` the network makes `texts` rows, one for each text.
        """
        limit = None if self.micro_batch is None else max(1, self.micro_batch // texts)
        return recompute(network, *args, limit=limit, keep=self.keep)

    def eps(
        self, z_t: Tensor, t: int, context: Tensor, conditioning: Tensor | None, unet: UNet | None = None
    ) -> Tensor:
        """Predicted noise of latents (B, 4, h, w) at timestep t, given a mask and what lies around it.

        context (B or 1, L, D), or (n, B or 1, L, D) for n answers (n, B, 4, h, w) to the same latents; conditioning
        (B or 1, 5, h, w), from `masked_conditioning`, or None for another `unet` of 4 channels. Activations are
        recomputed in the backward pass, so memory does not grow with the number of evaluations, unless `keep` is set.
        """
        b, several = len(z_t), context.ndim == 4
        contexts = (context if several else context[None]).expand(-1, b, -1, -1).transpose(0, 1)
        inputs = [z_t, torch.full((b,), t, device=z_t.device), contexts]
        if conditioning is not None:
            inputs.append(conditioning.expand(b, -1, -1, -1))
        out = self.run(partial(self.predict_noise, unet or self.unet), *inputs, texts=contexts.shape[1])
        return out.transpose(0, 1) if several else out[:, 0]

    def eps_from_text(self, z_t: Tensor, t: int, context: Tensor, blank: Tensor) -> Tensor:
        """`eps` given the text alone, as localisation uses it.

        It comes from the separate 4-channel UNet if there is one. Otherwise the inpainting UNet is told that everything
        is masked, by blank (1, 5, h, w) from `blank_conditioning`.
        """
        return self.eps(z_t, t, context, blank if self.locator is None else None, self.locator)

    def posterior(self, x: Tensor) -> Posterior:
        """The posterior of the unscaled latents of images (B, 3, H, W) in [0, 1], from which `latents` draws."""
        moments = self.run(lambda x: torch.cat(self.vae.posterior(x), dim=1), x)
        return Posterior(*moments.chunk(2, dim=1))

    def latents(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """Scaled latents from a posterior, with noise (B, 4, h, w)."""
        return self.vae.cfg.scale_factor * posterior.sample(noise)

    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to scaled latents, with noise (B, 4, h, w) for the posterior."""
        return self.latents(self.posterior(x), noise)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) to images; about [0, 1], not clamped."""
        return self.run(self.vae.decode, z)

    def masked_conditioning(self, x: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """What an inpainting UNet sees beside z_t, (B, 5, h, w): the mask, and latents of the image with grey in it.

        x (B, 3, H, W) in [0, 1]; mask (B, 1, H, W) in {0, 1}, 1 = repaint; noise (B, 4, h, w) for the posterior.
        The mask goes to the latent grid by its nearest (upper left) pixel.
        """
        masked = x * (1 - mask) + 0.5 * mask
        small = F.interpolate(mask, noise.shape[-2:], mode="nearest")
        return torch.cat([small, self.encode(masked, noise)], dim=1)

    def blank_conditioning(self, size: tuple[int, int]) -> Tensor:
        """The conditioning "everything is masked", (1, 5, h, w): the UNet then denoises from the text alone.

        The latents are the posterior mean of a grey image of `size` (H, W): nothing here depends on the input.
        """
        weight = self.vae.quant_conv.weight
        grey = torch.full((1, 3, *size), 0.5, dtype=weight.dtype, device=weight.device)
        z = self.vae.encode(grey)
        return torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
