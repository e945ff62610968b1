"""The KL autoencoder of latent diffusion (Rombach et al. 2022): images in [0, 1] to scaled latents and back.

Modules carry the key names of CompVis checkpoints (`first_stage_model.`). The [-1, 1] range of the network and the
scale factor of the latents live here; `LatentDiffusion.latents` and the training script scale samples themselves.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffender.stable_diffusion.layers import GroupNorm, Upsample


@dataclass(frozen=True)
class VAEConfig:
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    z_channels: int = 4
    scale_factor: float = 0.18215
    norm_groups: int = 32  # narrow networks want fewer: with one channel a group the colour of an image is normed away
    patch: int = 1  # side of the squares of pixels that the first layer takes, and the last gives, as channels

    @property
    def factor(self) -> int:
        """Side in pixels of the square that one latent stands for."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


class Posterior(NamedTuple):
    """The encoder's Gaussian, unscaled: mean and log-variance, (B, z_channels, h, w) each."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + (self.logvar / 2).exp() * noise


def norm(channels: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions; 1x1 convolutions as projections."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = norm(c, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the original was trained


def middle(c: int, groups: int) -> nn.ModuleDict:
    block_1, block_2 = ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)
    return nn.ModuleDict({"block_1": block_1, "attn_1": AttnBlock(c, groups), "block_2": block_2})


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.patch = cfg.patch
        self.conv_in = nn.Conv2d(3 * cfg.patch**2, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c, last = cfg.ch, len(cfg.ch_mult) - 1
        for i, mult in enumerate(cfg.ch_mult):
            blocks = []
            for _ in range(cfg.num_res_blocks):
                blocks.append(ResnetBlock(c, cfg.ch * mult, cfg.norm_groups))
                c = cfg.ch * mult
            level = nn.ModuleDict({"block": nn.Sequential(*blocks)})
            if i < last:
                level["downsample"] = Downsample(c)
            self.down.append(level)
        self.mid = middle(c, cfg.norm_groups)
        self.norm_out = norm(c, cfg.norm_groups)
        self.conv_out = nn.Conv2d(c, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for level in self.down:
            for layer in level.children():
                h = layer(h)
        for block in self.mid.values():
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.patch = cfg.patch
        c = cfg.ch * cfg.ch_mult[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = middle(c, cfg.norm_groups)
        levels = []
        for i, mult in reversed(list(enumerate(cfg.ch_mult))):
            blocks = []
            for _ in range(cfg.num_res_blocks + 1):
                blocks.append(ResnetBlock(c, cfg.ch * mult, cfg.norm_groups))
                c = cfg.ch * mult
            level = nn.ModuleDict({"block": nn.Sequential(*blocks)})
            if i > 0:
                level["upsample"] = Upsample(c)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the last to run: numbered by resolution
        self.norm_out = norm(c, cfg.norm_groups)
        self.conv_out = nn.Conv2d(c, 3 * cfg.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid.values():
            h = block(h)
        for level in reversed(self.up):
            for layer in level.children():
                h = layer(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class AutoencoderKL(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def posterior(self, x: Tensor) -> Posterior:
        """The posterior of the unscaled latents of images (B, 3, H, W) in [0, 1].

        Raises ValueError unless H and W are multiples of `cfg.factor`.
        """
        if x.shape[-2] % self.cfg.factor or x.shape[-1] % self.cfg.factor:
            raise ValueError(f"image of {tuple(x.shape[-2:])}: both sides must be multiples of {self.cfg.factor}")
        mean, logvar = self.quant_conv(self.encoder(2 * x - 1)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to scaled latents (B, z_channels, h, w), the posterior's mean."""
        return self.cfg.scale_factor * self.posterior(x).mean

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, z_channels, h, w) to images (B, 3, H, W).

        Values may lie slightly outside of [0, 1]. They are not clamped, since clamping would cut their gradients.
        """
        x = self.decoder(self.post_quant_conv(z / self.cfg.scale_factor))
        return (x + 1) / 2
