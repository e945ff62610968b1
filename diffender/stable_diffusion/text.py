"""The CLIP text transformer (Radford et al. 2021), run from token embeddings so that learned context vectors go in.

One class serves OpenAI's ViT-L/14 (SD1), OpenCLIP's ViT-H/14 without its last block (SD2) and the embedded model's.
Key names are those of Hugging Face and of SD1's single file (`text_model.`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

VOCABULARY, POSITIONS = 49408, 77
START, END = 49406, 49407


@dataclass(frozen=True)
class TextConfig:
    width: int = 768
    heads: int = 12
    layers: int = 12
    quick_gelu: bool = True  # x sigmoid(1.702 x) instead of the exact GELU
    pad_token: int = END


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(POSITIONS, width)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=self.heads) for y in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(h, "b n l d -> b l (n d)"))


class MLP(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.activation = quick_gelu if cfg.quick_gelu else F.gelu
        self.fc1 = nn.Linear(cfg.width, 4 * cfg.width)
        self.fc2 = nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width)
        self.self_attn = SelfAttention(cfg.width, cfg.heads)
        self.layer_norm2 = nn.LayerNorm(cfg.width)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    encode: Callable[[str], list[int]] | None = None  # from a text to its token ids; None: the CLIP tokenizer

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = Embeddings(cfg.width)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))})
        self.final_layer_norm = nn.LayerNorm(cfg.width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, 77) to their embeddings (B, 77, D), positions not yet added."""
        return self.embeddings.token_embedding(tokens)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Token embeddings (B, 77, D) to the context (B, 77, D): causal, no padding mask, no pooling."""
        x = embeddings + self.embeddings.position_embedding.weight
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.final_layer_norm(x)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids (B, 77) in int64: start, at most 75 tokens, end, padding."""
        encode = self.encode or tokenizer().encode
        rows = [[START, *(encode(text)[: POSITIONS - 2] if text else ()), END] for text in texts]
        return torch.tensor([row + [self.cfg.pad_token] * (POSITIONS - len(row)) for row in rows])


@cache
def tokenizer():  # noqa: ANN201
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
