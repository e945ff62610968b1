"""AdvP: a patch of optimised free pixels (Brown et al. 2017), one for each image, as the paper's figures imply."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffender.attacks.attack import Callback, GradientAttack, check_init, steps_averaged_by, within
from diffender.attacks.expectation import (
    Attacked,
    Course,
    Draw,
    Sample,
    Shown,
    Task,
    best_attempt,
    expect,
    judge,
    judgements,
)
from diffender.attacks.patch import apply_patch, margin, masks_for, relocated, to_8bit
from diffender.noise import generator
from diffender.utils.errors import InputError
from diffender.utils.options import option


@dataclass(frozen=True)
class AdvP(GradientAttack):
    """Sign steps with momentum on the mean gradient over fresh noise (EOT). Pixels stay in [0, 1].

    At the end up to three patches compete: the last one, the best by its own EOT samples, and `init` if given. They are
    compared on noise that no step has seen, and with location="eot" at places that no step has seen. So a patch cannot
    win by a lucky draw. Each restart begins at another place and with other pixels.
    """

    shape: str = option("square", "A circle has the same area.", choices=("square", "circle"))
    location: str = option(
        "fixed", "eot: a new place for each EOT sample and for the verdict.", choices=("fixed", "corner", "eot")
    )
    targeted: bool = False  # cross-entropy to a random class instead of the margin
    levels: int = option(
        256, "Values of each channel of the patch; gradients pass straight through the rounding.", low=2, high=256
    )
    lr: float = option(0.05, "Step size in units of the pixel range.", low=0)
    decay: str = option(
        "halved",
        "How the step size falls: halved at 1/2 and 3/4 of the steps, or linear to a tenth.",
        ("halved", "linear"),
    )
    momentum: float = option(0.9, "Share of the last step's direction that stays.", low=0, high=0.999)
    fixed_noise: bool = False  # the same noise in every step: one draw of the defence is attacked, for checks only

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape == "circle" and self.area > math.pi / 4:
            raise InputError(
                f"a circle of {self.area:g} of the image does not fit into it; at most {math.pi / 4:.3f} does"
            )

    @property
    def averaged_steps(self) -> float:
        return steps_averaged_by(self.momentum, self.iters)

    def attempts(self, task: Task, init: Tensor | None, callback: Callback) -> Iterator[Attacked]:
        """`init` is the state (B, 4, S, S) of an earlier result: patch pixels, and the mask of where they are kept. The
        first attempt has its patch there, whatever `area` and `shape` say."""
        told = "(B, 4, S, S), patch pixels, and the mask of where they are kept"
        check_init(init, (4, *task.x.shape[-2:]), told)
        if init is not None and self.location == "eot" and init[:, 3].sum() != self.home(task, "").sum():
            raise InputError(
                f"init has a patch of another size than area {self.area:g} and shape {self.shape}, so it cannot be "
                "moved; give the state of an attack with the same two"
            )
        for r in range(self.restarts):
            yield self.attempt(task, r, init if r == 0 else None, within(callback, r, self.restarts))

    def attempt(self, task: Task, r: int, init: Tensor | None, callback: Callback) -> Attacked:
        """The r-th run, from its own place and first pixels."""
        x = task.x
        key = f" {r}" if r else ""  # of its place, pixels and noise: none for the first attempt
        if init is None:
            patch = self.first_pixels(task, x.shape[-1], key)
            home, candidates = self.home(task, key), []
        else:
            patch, home = init.split((3, 1), dim=1)
            candidates = [patch]
        velocity, course = torch.zeros_like(patch), Course()

        def share(sample: Sample) -> Tensor:
            return relocated(sample.gradient, sample.mask, home)

        for step in range(self.iters):
            seen = expect(task, self.draw(task, patch, home, step, key), self.eot, self.eot_batch, share)
            course.record(patch, seen)
            norm = seen.gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
            velocity = self.momentum * velocity + seen.gradient / norm
            patch = (patch - self.step_size(step) * velocity.sign()).clamp(0, 1)
            callback((step + 1) / self.iters)

        states = to_8bit(torch.stack([*candidates, *course.best, patch]))
        purpose, least = ("attack 0", 1) if self.fixed_noise else ("choice", 3)
        shown = [self.shown(x, task, self.rounded(p), home, purpose + key) for p in states]
        scores = [judge(task, one, purpose + key, self.eot, self.eot_batch, least) for one in shown]
        chosen = torch.stack(scores).argmax(dim=0)
        patch = states[chosen, torch.arange(len(x), device=x.device)]
        mask = self.place(task, "verdict", 0, home)
        judged = judgements(task, self.eot, least, moving=self.location == "eot")
        queries = torch.full((len(x),), self.eot * self.iters + judged * len(states), device=x.device)
        image = apply_patch(x, relocated(self.rounded(patch), home, mask), mask)
        return Attacked(image, mask, torch.cat([patch, home], dim=1), queries, *course.curves(x))

    def step_size(self, step: int) -> float:
        if self.decay == "linear":
            return self.lr * (1 - 0.9 * step / max(1, self.iters - 1))
        halvings = sum(step >= self.iters * share for share in (0.5, 0.75))
        return self.lr * 0.5**halvings

    def choose(self, task: Task, attempts: list[Attacked]) -> Attacked:
        """Attempts whose patches lie anywhere are compared at places that are not the verdict's."""
        kept = [a.state.split((3, 1), dim=1) for a in attempts]
        shown = [self.shown(task.x, task, self.rounded(patch), home, "restarts") for patch, home in kept]
        return best_attempt(task, attempts, self.eot, self.eot_batch, shown)

    def rounded(self, patch: Tensor) -> Tensor:
        """The patch rounded to `levels` values a channel, all of which an 8-bit file holds. Steps do not round it."""
        steps = self.levels - 1
        return to_8bit((patch * steps).round() / steps)

    def shown(self, x: Tensor, task: Task, patch: Tensor, home: Tensor, purpose: str) -> Shown:
        """x with the patch where it is kept, or, if it may lie anywhere, at another place in each pass."""

        def at(k: int) -> Tensor:
            place = self.place(task, purpose, k, home)
            return apply_patch(x, relocated(patch, home, place), place)

        return at if self.location == "eot" else at(0)

    def home(self, task: Task, key: str) -> Tensor:
        """Masks (B, 1, S, S) of where the patch's pixels are kept: new in each attempt, unless patches move anyway."""
        key = "" if self.location == "eot" else key
        return masks_for(task, f"patch{key}", self.area, self.shape, self.location == "corner")

    def place(self, task: Task, purpose: str, k: int, home: Tensor) -> Tensor:
        """Masks (B, 1, S, S) of the k-th sample."""
        return masks_for(task, f"{purpose}/{k}", self.area, self.shape) if self.location == "eot" else home

    def draw(self, task: Task, patch: Tensor, home: Tensor, step: int, key: str) -> Draw:
        """The samples of a step: the patch pasted, and fresh noise of the victim."""
        purpose = f"attack {0 if self.fixed_noise else step}{key}"
        pixels = patch if self.levels == 256 else self.rounded(patch)  # the steps ignore rounding to 8 bits

        def sample(k: int):  # noqa: ANN202
            mask = self.place(task, purpose, k, home)
            return apply_patch(task.x, relocated(pixels, home, mask), mask), mask, task.noise(purpose, k)

        return sample

    def loss(self, task: Task) -> Callable[[Tensor], Tensor]:
        if not self.targeted:
            return partial(margin, y=task.y)

        def aim(logits: Tensor) -> Tensor:
            classes, y = logits.shape[1], task.y
            generators = [generator(task.seed, i, "target") for i in task.image_ids]
            offsets = [int(torch.randint(1, classes, (), generator=g)) for g in generators]
            return self.towards(logits, y, (y + torch.tensor(offsets, device=y.device)) % classes)

        return aim

    def towards(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """The targeted loss, (B,)."""
        return F.cross_entropy(logits, target, reduction="none")
