"""Sparse-RS patches: random search over pixels and place by margins alone (Croce et al. 2022).

The gradient-free check of this threat model: where it beats white-box attacks, gradients are masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffender.attacks.attack import Attack, Callback, check_init
from diffender.attacks.expectation import Attacked, Task, judge, kept_back, logits_and_penalty, pick_rows
from diffender.attacks.patch import paste, patch_side, to_8bit
from diffender.noise import generator
from diffender.utils.options import option

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: when p_init is halved


@dataclass(frozen=True)
class SparseRS(Attack):
    """Every fourth proposal moves the patch, the others repaint a square in it with a corner colour of the RGB cube; in
    the second half of the queries they flip one channel of it.

    Where the victim is random, present patch and proposal are compared on the same fresh noise: two queries a step. In
    the end the last patch and the start are compared on noise that none has seen. Where the victim has a penalty
    (`evade`), the search lowers that, too.
    """

    access: ClassVar[str] = "queries"

    queries: int = option(1000, "Largest number of queries for each image.", low=1)
    p_init: float = option(0.4, "Share of the patch that is repainted at first.", low=0, high=1)

    def attempts(self, task: Task, init: Tensor | None, callback: Callback) -> Iterator[Attacked]:
        """`init` (B, 3 s^2 + 2) is pattern and corner."""
        x, size, side = task.x, task.x.shape[-1], patch_side(task.x.shape[-1], self.area)
        check_init(init, (3 * side**2 + 2,), f"(B, {3 * side**2 + 2}), pattern and corner")
        draws = [generator(task.seed, i, "sparse-rs") for i in task.image_ids]
        if init is None:
            pattern = torch.stack([squares(side, g) for g in draws])
            corner = torch.stack([torch.randint(0, size - side + 1, (2,), generator=g) for g in draws])
        else:
            pattern, corner = init[:, :-2].view(-1, 3, side, side).cpu(), init[:, -2:].cpu().long()
        random = task.noise("attack 0") is not None
        start = pattern, corner
        finals = 0 if init is None else kept_back(task, 2, self.queries)
        steps = (self.queries - finals - (not random)) // (2 if random else 1)

        def look(pattern: Tensor, corner: Tensor, step: int) -> Tensor:
            """What the search lowers, and whether it is misread, (2, B)."""
            image, mask = paste(x, to_8bit(pattern).to(x), corner)
            logits, penalty = logits_and_penalty(task.victim, image, task.noise(f"attack {step}"), mask)
            value = task.loss(logits) + penalty
            return torch.stack([value, logits.argmax(dim=1).ne(task.y).to(value)]).detach().cpu()

        now = torch.empty(0) if random else look(pattern, corner, 0)  # if random, anew in every step
        trace = []
        for step in range(steps):
            if random:
                now = look(pattern, corner, step)
            proposals = [
                self.propose(p, c, size, step / steps, step, g) for p, c, g in zip(pattern, corner, draws, strict=True)
            ]
            new_pattern, new_corner = map(torch.stack, zip(*proposals, strict=True))
            new = look(new_pattern, new_corner, step)
            better = new[0] < now[0]
            pattern, corner = (pick_rows(better, new_pattern, pattern), pick_rows(better, new_corner, corner))
            now = torch.where(better, new, now)
            trace.append(now)
            callback((step + 1) / steps)
        if finals:
            last, first = (paste(x, to_8bit(p).to(x), c)[0] for p, c in ((pattern, corner), start))
            better = (judge(task, last, "choice", 1) - judge(task, first, "choice", 1)).cpu() >= 0
            pattern, corner = pick_rows(better, pattern, start[0]), pick_rows(better, corner, start[1])
        image, mask = paste(x, to_8bit(pattern).to(x), corner)
        state = torch.cat([pattern.flatten(1), corner.float()], dim=1)
        queries = torch.full((len(x),), finals + (2 * steps if random else steps + 1))
        losses, missed = torch.stack(trace, dim=2) if trace else x.new_zeros(2, len(x), 0)
        yield Attacked(image, mask, state, queries, losses, missed)

    def propose(
        self, pattern: Tensor, corner: Tensor, size: int, progress: float, step: int, g: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The next pattern (3, s, s) and corner (2,) to try."""
        side = pattern.shape[-1]
        if step % 4 == 3:
            reach = max(1, round(0.75 * size * (1 - progress)))
            shift = torch.randint(-reach, reach + 1, (2,), generator=g)
            return pattern, (corner + shift).clamp(0, size - side)
        halvings = sum(progress * 10_000 > at for at in HALVINGS)
        p = self.p_init / 2**halvings
        square = max(1, min(side, round(p**0.5 * side)))
        top, left = torch.randint(0, side - square + 1, (2,), generator=g).tolist()
        pattern = pattern.clone()
        inside = pattern[:, top : top + square, left : left + square]
        if progress < 0.5:
            inside.copy_(torch.randint(0, 2, (3, 1, 1), generator=g).expand_as(inside))
        else:
            channel = int(torch.randint(0, 3, (), generator=g))
            inside[channel] = 1 - inside[channel].round()
        return pattern, corner


def squares(side: int, g: torch.Generator, count: int = 100) -> Tensor:
    """A pattern (3, s, s) of squares in corner colours, each pasted over the earlier ones."""
    pattern = torch.zeros(3, side, side)
    for _ in range(count):
        edge = int(torch.randint(1, max(2, round(0.4**0.5 * side)), (), generator=g))
        top, left = torch.randint(0, side - edge + 1, (2,), generator=g).tolist()
        colour = torch.randint(0, 2, (3, 1, 1), generator=g).float()
        pattern[:, top : top + edge, left : left + edge] = colour
    return pattern
