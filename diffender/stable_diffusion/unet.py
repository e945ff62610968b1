"""The text-conditioned inpainting UNet of latent diffusion (Rombach et al. 2022), as a readable list of blocks.

Module and parameter names are those of CompVis checkpoints (`model.diffusion_model.`), so the official weights load
without renaming. Input: 4 noisy latents, 1 mask, 4 latents of the masked image.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffender.stable_diffusion.layers import GroupNorm, Linear, Upsample


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 9
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with transformers; the middle always has one
    context_dim: int = 768
    num_heads: int | None = 8  # heads everywhere, or None: width / head_dim heads
    head_dim: int = 64
    norm_groups: int = 32
    prediction: str = "epsilon"  # what the output means: the noise, or "v" of Salimans & Ho 2022
    patch: int = 1  # side of the squares of latents that the first layer takes, and the last gives, as channels
    linear_proj: bool = False  # proj_in and proj_out of a transformer: linear (SD2) or 1x1 convolution (SD1)

    @property
    def multiple(self) -> int:
        """Both sides of the latents are multiples of this: `patch`, doubled for each level after the first."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // self.head_dim


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B, dim) of timesteps (B,), cosines first, in float32."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        # Identity holds the place of the original's dropout, so that the convolution keeps its name (out_layers.3).
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + repeat_rows(self.emb_layers(emb), len(x))[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim, dim, bias=False)
        self.to_v = Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=self.heads) for y in (q, k, v))
        if x.device.type == "cpu":  # every block of queries reads k and v again, faster if they are contiguous
            k, v = k.contiguous(), v.contiguous()
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b n l d -> b l (n d)"))


class GEGLU(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = Linear(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = repeat_rows(x + self.attn1(h, h), len(context))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, c: int, cfg: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(cfg.norm_groups, c, eps=1e-6)
        self.proj_in = Linear(c, c) if cfg.linear_proj else nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, cfg.context_dim, cfg.heads(c))])
        self.proj_out = Linear(c, c) if cfg.linear_proj else nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        linear = isinstance(self.proj_in, Linear)
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = to_map(self.proj_out(h), x) if linear else self.proj_out(to_map(h, x))
        return repeat_rows(x, len(h)) + h


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """x repeated along the batch dimension until it has `rows` rows."""
    ones = (1,) * (x.ndim - 1)
    return x if len(x) == rows else x.repeat(rows // len(x), *ones)


def to_tokens(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[-2])


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.Sequential):
    """A sequence that hands the time embedding to residual blocks and the text to transformers."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]  # three, not one
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """out = unet(x, t, context): predicts noise or v, as `cfg.prediction` says, in the first `out_channels` of x."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        emb_dim = 4 * cfg.model_channels
        self.time_embed = nn.Sequential(nn.Linear(cfg.model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        def block(c_in: int, c_out: int, level: int) -> list[nn.Module]:
            attention = [SpatialTransformer(c_out, cfg)] if level in cfg.attention_levels else []
            return [ResBlock(c_in, c_out, emb_dim, cfg.norm_groups), *attention]

        c = cfg.model_channels
        last = len(cfg.channel_mult) - 1
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.patch**2 * cfg.in_channels, c, 3, padding=1))])
        skips = [c]  # widths of what the way down leaves for the way up
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Block(*block(c, cfg.model_channels * mult, level)))
                c = cfg.model_channels * mult
                skips.append(c)
            if level < last:
                self.input_blocks.append(Block(Downsample(c)))
                skips.append(c)

        before, after = (ResBlock(c, c, emb_dim, cfg.norm_groups) for _ in range(2))
        self.middle_block = Block(before, SpatialTransformer(c, cfg), after)

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                layers = block(c + skips.pop(), cfg.model_channels * mult, level)
                c = cfg.model_channels * mult
                if level > 0 and i == cfg.num_res_blocks:
                    layers.append(Upsample(c))
                self.output_blocks.append(Block(*layers))

        last_layer = nn.Conv2d(c, cfg.patch**2 * cfg.out_channels, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(cfg.norm_groups, c), nn.SiLU(), last_layer)

    @property
    def dtype(self) -> torch.dtype:
        return self.get_parameter("out.2.weight").dtype

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, in_channels, h, w), t (B,) in 0..999, context (B, L, context_dim) -> out (B, out_channels, h, w).

        With n contexts for each image, context is (n B, L, context_dim) and out has n B rows: row k B + b belongs to
        image b. The layers before the first text are then computed once for each image. Raises ValueError unless h and
        w are multiples of `cfg.multiple`.
        """
        multiple = self.cfg.multiple
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise ValueError(f"latents of {tuple(x.shape[-2:])}: both sides must be multiples of {multiple}")
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(x.dtype))
        skips, h = [], F.pixel_unshuffle(x, self.cfg.patch)
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, repeat_rows(skips.pop(), len(h))], dim=1), emb, context)
        return F.pixel_shuffle(self.out(h), self.cfg.patch)
