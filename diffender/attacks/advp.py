"""AdvP: a patch of optimised free pixels (Brown et al. 2017), one for each picture, as the paper's figures imply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffender.attacks.patch import (
    Attacked,
    Victim,
    apply_patch,
    margin,
    masks_for,
    targeted_cross_entropy,
    to_8bit,
    value_and_gradient,
)
from diffender.noise import Noise, generator


@dataclass(frozen=True)
class AdvP:
    """Momentum-sign steps on the mean gradient over fresh noise; pixels projected to [0, 1].

    At equal budget, the best patch by the mean loss of its own EOT samples competes with the last one on noise that
    neither has seen, so that a lucky draw cannot win.
    """

    area: float = 0.05  # of the picture
    shape: str = "square"  # or circle, of the same area
    location: str = "fixed"  # or eot: a new place for each EOT sample and for the verdict
    targeted: bool = False  # cross-entropy to a random class instead of the margin
    iters: int = 100
    eot: int = 10  # noise samples averaged in a step
    lr: float = 0.05  # of the pixel range; halved after half and after three quarters of the steps
    momentum: float = 0.9

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
        """Pictures x (B, 3, S, S) in [0, 1] with labels y (B,); `init` (B, 3, S, S) starts from given patch pixels.

        Results depend on (seed, image id), not on the batch. `callback(i)` is called after each step.
        """
        size = x.shape[-1]
        loss = self.loss(y, image_ids, seed)
        patch = init
        if patch is None:
            patch = torch.stack([torch.rand(3, size, size, generator=generator(seed, i, "init")) for i in image_ids])
            patch = patch.to(x)

        def draw(purpose: str, k: int) -> tuple[Noise | None, Tensor]:
            """The k-th sample of what is random: the victim's noise and, if it moves, the place of the patch."""
            key = "patch" if self.location == "fixed" else f"{purpose}/{k}"
            mask = masks_for(image_ids, seed, key, size, self.area, self.shape).to(x)
            return victim.sample_noise(image_ids, seed, purpose, k), mask

        def fresh_loss(patch: Tensor) -> Tensor:
            samples = [draw("choice", k) for k in range(self.eot)]
            values = [loss(victim(apply_patch(x, to_8bit(patch), mask), noise)) for noise, mask in samples]
            return torch.stack(values).mean(dim=0)

        velocity = torch.zeros_like(patch)
        best, best_loss = patch, torch.full((len(x),), torch.inf, device=x.device)
        for step in range(self.iters):
            value, gradient = torch.zeros(len(x)).to(x), torch.zeros_like(x)
            for k in range(self.eot):  # one after the other: memory does not grow with the number of samples
                noise, mask = draw(f"attack {step}", k)
                v, g = value_and_gradient(victim, apply_patch(x, patch, mask), noise, loss)
                value, gradient = value + v / self.eot, gradient + g * mask / self.eot
            best = torch.where((value < best_loss)[:, None, None, None], patch, best)
            best_loss = torch.minimum(value, best_loss)
            norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
            velocity = self.momentum * velocity + gradient / norm
            lr = self.lr * 0.5 ** sum(step >= self.iters * share for share in (0.5, 0.75))
            patch = (patch - lr * velocity.sign()).clamp(0, 1)
            callback(step)

        keep = fresh_loss(best) < fresh_loss(patch)
        patch = to_8bit(torch.where(keep[:, None, None, None], best, patch))
        _, mask = draw("verdict", 0)
        return Attacked(apply_patch(to_8bit(x), patch, mask), mask, patch)

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
        return targeted_cross_entropy(logits, target)
