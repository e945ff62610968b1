"""One latent diffusion model: VAE, text tower and 9-channel UNet as one object, for every preset.

Official checkpoints: `sd15-inpainting` (runwayml) and `sd2-inpainting` (stabilityai). `tiny` is the embedded model:
the same classes, narrower and shallower, with the weights in this repository.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffender.models.text import TextConfig, TextTransformer
from diffender.models.unet import UNet, UNetConfig
from diffender.models.vae import AutoencoderKL, VAEConfig
from diffender.schedule import make_alphas_cumprod


@dataclass(frozen=True)
class ModelConfig:
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    image_size: int  # side of the square pictures the model was trained on, in pixels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.vae.factor
        return self.vae.z_channels, side, side


PRESETS = {
    "tiny": ModelConfig(
        UNetConfig(
            model_channels=64, channel_mult=(1, 2, 2), num_res_blocks=1, attention_levels=(1,), context_dim=64,
            num_heads=4, norm_groups=8,
        ),
        VAEConfig(ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1, norm_groups=8),
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
    """eps(z_t, t, context | conditioning) with the ways into and out of latent space."""

    alphas_cumprod: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.unet = UNet(cfg.unet)
        self.vae = AutoencoderKL(cfg.vae)
        self.text = TextTransformer(cfg.text)
        self.register_buffer("alphas_cumprod", make_alphas_cumprod(), persistent=False)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts to their context, (len(texts), 77, context_dim)."""
        tokens = self.text.tokenize(texts).to(self.alphas_cumprod.device)
        return self.text(self.text.embed(tokens))

    def eps(self, z_t: Tensor, t: int | Tensor, context: Tensor, conditioning: Tensor) -> Tensor:
        """Predicted noise of latents (B, 4, h, w) at timestep t.

        context (B or 1, L, D); conditioning (B or 1, 5, h, w), from `masked_conditioning` or `blank_conditioning`.
        """
        b = len(z_t)
        t = torch.as_tensor(t, device=z_t.device).expand(b)
        x = torch.cat([z_t, conditioning.expand(b, -1, -1, -1)], dim=1)
        return self.unet(x, t, context.expand(b, -1, -1))

    def masked_conditioning(self, x: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """What an inpainting UNet sees beside its latents: the mask and the latents of the picture without its inside.

        x (B, 3, H, W) in [0, 1]; mask (B, 1, H, W) in {0, 1}, 1 = repaint; noise (B, 4, h, w) for the posterior.
        The inside becomes mid grey. The mask goes to the latent grid by its nearest (upper left) pixel.
        """
        masked = x * (1 - mask) + 0.5 * mask
        small = F.interpolate(mask, noise.shape[-2:], mode="nearest")
        return torch.cat([small, self.vae.encode(masked, noise)], dim=1)

    def blank_conditioning(self, size: tuple[int, int]) -> Tensor:
        """The conditioning "everything is masked", (1, 5, h, w): the UNet then denoises from the text alone.

        The latents are the posterior mean of a grey picture of `size` (H, W): nothing here depends on the input.
        """
        weight = self.vae.quant_conv.weight
        grey = torch.full((1, 3, *size), 0.5, dtype=weight.dtype, device=weight.device)
        z = self.vae.encode(grey)
        return torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
