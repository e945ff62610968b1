"""AdvP: a patch of optimised free pixels (Brown et al. 2017), one for each picture, as the paper's figures imply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffender.attacks.patch import (
    Attacked,
    Task,
    Victim,
    apply_patch,
    best_attempt,
    cross_entropy,
    judge,
    judgements,
    margin,
    masks_for,
    pick_rows,
    rank,
    samples,
    to_8bit,
)
from diffender.noise import Noise, generator


@dataclass(frozen=True)
class AdvP:
    """Momentum-sign steps on the mean gradient over fresh noise; pixels projected to [0, 1].

    At equal budget, the best patch by its own EOT samples and the one that it started from compete with the last one
    on noise that none has seen, so that a lucky draw cannot win. Restarts take other places and other first pixels.
    """

    access: ClassVar[str] = "gradient"

    area: float = 0.05  # of the picture
    shape: str = "square"  # or circle, of the same area
    location: str = "fixed"  # or corner; or eot: a new place for each EOT sample and for the verdict
    targeted: bool = False  # cross-entropy to a random class instead of the margin
    iters: int = 100
    eot: int = 10  # noise samples averaged in a step
    eot_batch: int = 1  # of them side by side, also in the choice among patches; changes no result
    lr: float = 0.05  # of the pixel range; halved after half and after three quarters of the steps
    momentum: float = 0.9
    restarts: int = 1
    fixed_noise: bool = False  # the same noise in every step: one draw of the defence is attacked, for checks only

    def __call__(
        self,
        victim: Victim,
        x: Tensor,
        y: Tensor,
        image_ids: Sequence[str],
        seed: int,
        init: Tensor | None = None,
        callback: Callable[[int], None] = lambda i: None,
    ) -> Attacked:
        """Pictures x (B, 3, S, S) in [0, 1] with labels y (B,); `init`, an earlier result's `state` (B, 3, S, S),
        starts the first attempt from given patch pixels.

        Results depend on (seed, image id), not on the batch. `callback(i)` is called after each step.
        """
        task = Task(victim, x, y, image_ids, seed, self.loss(y, image_ids, seed))
        attempts = [self.attempt(task, r, init if r == 0 else None, callback) for r in range(self.restarts)]
        return best_attempt(task, attempts, self.eot, self.eot_batch)

    def attempt(self, task: Task, r: int, init: Tensor | None, callback: Callable[[int], None]) -> Attacked:
        """The r-th run, from its own place and first pixels."""
        x, size = task.x, task.x.shape[-1]
        key = f" {r}" if r else ""
        if init is None:
            drawn = [torch.rand(3, size, size, generator=generator(task.seed, i, f"init{key}")) for i in task.image_ids]
            patch = torch.stack(drawn).to(x)
        else:
            patch = init

        def place(purpose: str, k: int) -> Tensor:
            at = f"{purpose}{key}/{k}" if self.location == "eot" else f"patch{key}"
            corner = self.location == "corner"
            return masks_for(task.image_ids, task.seed, at, size, self.area, self.shape, corner).to(x)

        def draw(k: int) -> tuple[Tensor, Tensor, Noise | Tensor | None]:
            purpose = f"attack {0 if self.fixed_noise else step}"
            mask = place(purpose, k)
            return apply_patch(x, patch, mask), mask, task.noise(purpose + key, k)

        first = [] if init is None else [patch]
        best, best_score = patch, torch.full((len(x),), -torch.inf, device=x.device)
        velocity, trace, missed = torch.zeros_like(patch), [], []
        for step in range(self.iters):
            gradient, values, fooled = torch.zeros_like(x), [], []
            for sample in samples(task, draw, self.eot, self.eot_batch):
                gradient = gradient + sample.gradient * sample.mask / self.eot
                values.append(sample.value)
                fooled.append(sample.fooled)
            score = rank(torch.stack(values), torch.stack(fooled))
            best = pick_rows(score > best_score, patch, best)
            best_score = torch.maximum(score, best_score)
            trace.append(torch.stack(values).mean(dim=0))
            missed.append(torch.stack(fooled).mean(dim=0))
            norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
            velocity = self.momentum * velocity + gradient / norm
            lr = self.lr * 0.5 ** sum(step >= self.iters * share for share in (0.5, 0.75))
            patch = (patch - lr * velocity.sign()).clamp(0, 1)
            callback(step)

        candidates = torch.stack([*first, best, patch])
        images = [apply_patch(x, to_8bit(p), place("choice", 0)) for p in candidates]
        scores = [judge(task, image, "choice" + key, self.eot, self.eot_batch) for image in images]
        chosen = torch.stack(scores).argmax(dim=0)
        patch = to_8bit(candidates[chosen, torch.arange(len(x), device=x.device)])
        mask = place("verdict", 0)
        seen = self.eot * self.iters + judgements(task, self.eot) * len(candidates)
        queries = torch.full((len(x),), seen, device=x.device)
        curves = (torch.stack(curve, dim=1) for curve in (trace, missed))
        return Attacked(apply_patch(to_8bit(x), patch, mask), mask, patch, queries, *curves)

    def loss(self, y: Tensor, image_ids: Sequence[str], seed: int) -> Callable[[Tensor], Tensor]:
        """What each picture's attacker lowers, from logits (B, K) to (B,)."""
        if not self.targeted:
            return lambda logits: margin(logits, y)

        def aim(logits: Tensor) -> Tensor:
            k = logits.shape[1]
            shift = [int(torch.randint(1, k, (), generator=generator(seed, i, "target"))) for i in image_ids]
            return self.towards(logits, y, (y + torch.tensor(shift, device=y.device)) % k)

        return aim

    def towards(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """The targeted loss, (B,)."""
        return cross_entropy(logits, target)
