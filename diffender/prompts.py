"""The two prompts of DIFFender, Sec. 3.3 and Eq. 3: empty, hand-written, or 16 learned context vectors each."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.text import END, POSITIONS, START, TextTransformer
from diffender.utils.errors import InputError

MANUAL = ("adversarial", "clean")  # prompt_L, prompt_R of the paper's MP variant


class Contexts(NamedTuple):
    """Text contexts for the UNet, (1, 77, D) each: prompt_L, prompt_R and the empty text (Sec. 3.2).

    `locate` is None for the empty-prompt variant (EP).
    """

    locate: Tensor | None
    restore: Tensor
    empty: Tensor

    def detach(self) -> "Contexts":
        """Constants: no gradient reaches the prompts."""
        locate = None if self.locate is None else self.locate.detach()
        return Contexts(locate, self.restore.detach(), self.empty.detach())


class PromptPair(nn.Module):
    """prompt_L and prompt_R of Eq. 3: `n_ctx` learned context vectors each, (n_ctx, dim), in the place of words.

    Raises InputError unless n_ctx is from 1 to 75.
    """

    def __init__(self, n_ctx: int, dim: int, g: Generator | None = None):
        super().__init__()
        if not 1 <= n_ctx <= POSITIONS - 2:
            raise InputError(f"n_ctx is {n_ctx}; a prompt holds 1 to {POSITIONS - 2} context vectors")
        self.ctx_locate = nn.Parameter(0.02 * torch.randn(n_ctx, dim, generator=g))
        self.ctx_restore = nn.Parameter(0.02 * torch.randn(n_ctx, dim, generator=g))

    def initialize_from(self, text: TextTransformer, words: tuple[str, str]) -> None:
        """Start both prompts from the embeddings of these words, repeated to fill the n vectors."""
        for ctx, word in zip((self.ctx_locate, self.ctx_restore), words, strict=True):
            tokens = text.tokenize([word])[0]
            tokens = tokens[1 : int((tokens == END).nonzero()[0])]
            fill = tokens[torch.arange(len(ctx)) % len(tokens)]
            ctx.data.copy_(text.embed(fill.to(ctx.device)))

    def forward(self, model: LatentDiffusion, empty: Tensor | None = None) -> Contexts:
        """Both prompts as contexts; `empty` (1, 77, D) is that of the empty text, if known already."""
        locate, restore = (learned_context(model.text, ctx) for ctx in (self.ctx_locate, self.ctx_restore))
        return Contexts(locate, restore, model.encode_text([""]) if empty is None else empty)


def learned_context(text: TextTransformer, ctx: Tensor) -> Tensor:
    """The context (1, 77, D) of a prompt of Eq. 3: ctx (n, D) between start and end token, then padding."""
    pad = [text.cfg.pad_token] * (POSITIONS - 2 - len(ctx))
    frame = text.embed(torch.tensor([START, END, *pad], device=ctx.device))
    return text(torch.cat([frame[:1], ctx, frame[1:]])[None])


def empty_contexts(model: LatentDiffusion) -> Contexts:
    """The paper's EP variant: no words at all."""
    empty = model.encode_text([""])
    return Contexts(None, empty, empty)


def manual_contexts(model: LatentDiffusion) -> Contexts:
    """The paper's MP variant: hand-written words for localisation and restoration."""
    locate, restore, empty = model.encode_text([*MANUAL, ""]).split(1)
    return Contexts(locate, restore, empty)
