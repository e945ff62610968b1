"""What every attack is: a frozen dataclass of its settings, called on a task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from diffender.attacks.expectation import Attacked, Task, best_attempt
from diffender.attacks.patch import margin, to_8bit
from diffender.noise import generator
from diffender.utils.errors import InputError
from diffender.utils.images import check_images
from diffender.utils.options import check_options, option
from diffender.utils.progress import bar

Made = TypeVar("Made", bound="Attack")
Callback = Callable[[float], None]  # hears what share of the work is done, up to 1


@dataclass(frozen=True)
class Attack:
    """attacked = attack(task): a subclass gives the attempts, and its loss if that is not the margin.

    `access` says what an attack may ask of its victim: gradient, queries, or none.
    """

    access: ClassVar[str] = "none"
    moves: ClassVar[float] = 0.0  # forward passes that a step takes besides its samples, on average
    flags: ClassVar[dict[str, str]] = {}  # of a command line, where a flag and its field have different names

    area: float = option(0.05, "Share of the image that the patch covers.", low=0.0005, high=1)

    def __post_init__(self) -> None:
        """Raises InputError for settings out of their range."""
        check_options(self)

    @classmethod
    def reads(cls) -> dict[str, str]:
        """The flags that this attack takes, and their fields."""
        return {f.name: f.name for f in fields(cls) if f.name not in cls.flags.values()} | cls.flags

    @classmethod
    def from_flags(cls: type[Made], values: Mapping[str, Any]) -> Made:
        """The attack that the flags ask for; None, and flags that it does not take, leave it its defaults."""
        return cls(**{field: values[flag] for flag, field in cls.reads().items() if values.get(flag) is not None})

    def __call__(self, task: Task, init: Tensor | None = None, callback: Callback = lambda done: None) -> Attacked:
        """The best attempt for each image, of images rounded to 8 bits. Results depend on (seed, image id), not on the
        batch.

        `init` (B, ...), the `state` of an earlier result, is where the first attempt starts. `callback` hears after
        each step what share of the work is done.
        """
        check_images(task.x)
        check_square(task.x)
        if self.access != "none" and not hasattr(task.victim, "sample_noise"):
            raise InputError(
                f"the victim is a {type(task.victim).__name__}; give Defended(defense, classifier), or "
                "Undefended(classifier)"
            )
        y = task.y
        if not isinstance(y, Tensor) or y.ndim != 1 or y.dtype != torch.int64:
            told = f"of {y.dtype}, {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise InputError(f"labels are {told}; they are a tensor (B,) of whole numbers, int64")
        if not len(task.x) == len(y) == len(task.image_ids):
            counts = f"{len(task.x)} images, {len(y)} labels and {len(task.image_ids)} ids"
            raise InputError(f"a task of {counts}; each image has a label and an id")
        task = task._replace(x=to_8bit(task.x), loss=self.loss(task))
        attempts = list(self.attempts(task, init, callback))
        return self.choose(task, attempts)

    @property
    def averaged_steps(self) -> float:
        """The effective number of gradients that momentum averages in one step. 1 without momentum."""
        return 1.0

    def loss(self, task: Task) -> Callable[[Tensor], Tensor]:
        """The loss that the attacker minimises, from logits (B, K) to (B,)."""
        return partial(margin, y=task.y)

    def attempts(self, task: Task, init: Tensor | None, callback: Callback) -> Iterator[Attacked]:
        """The runs of the attack, one for each restart."""
        raise NotImplementedError

    def choose(self, task: Task, attempts: list[Attacked]) -> Attacked:
        """The only attempt."""
        (attacked,) = attempts
        return attacked


def attack_all(attack: Attack, task: Task, size: int, init: Tensor | None = None, quiet: bool = True) -> Attacked:
    """A task's images attacked, `size` at a time, from the states `init` of an earlier attack."""
    parts = bar(slices(size, task.image_ids), "attacking", quiet)
    done = [attack(task.part(rows), None if init is None else init[rows]) for rows in parts]
    return Attacked(*map(torch.cat, zip(*done, strict=True)))


def slices(size: int, ids: Sequence[str]) -> list[slice]:
    return [slice(i, i + size) for i in range(0, len(ids), size)]


def check_init(init: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    """Raises InputError unless `init` (B, ...) has this shape without B, -1 being any number, or is None."""
    if init is None:
        return
    if init.ndim != 1 + len(shape) or any(n not in (-1, m) for n, m in zip(shape, init.shape[1:], strict=True)):
        raise InputError(
            f"init is of shape {tuple(init.shape)}; it is the state of an earlier result of this attack with this "
            f"area: {what}"
        )


def check_square(x: Tensor) -> None:
    """Raises InputError for images (B, 3, H, W) that no attack takes."""
    if x.shape[-2] != x.shape[-1]:
        raise InputError(f"images of {tuple(x.shape[-2:])} pixels; attacks take square ones: crop them")


def steps_averaged_by(momentum: float, steps: int) -> float:
    """The effective number of gradients in a momentum sum over so many steps: (sum w)^2 / sum w^2.

    The weights are w_k = momentum^k, k = 0 .. steps - 1. A plain mean of that many gradients has the same ratio of
    signal to noise. After many steps it is (1 + momentum) / (1 - momentum).
    """
    weights = [momentum**k for k in range(steps)]
    return sum(weights) ** 2 / sum(w**2 for w in weights)


def within(callback: Callback, i: int, n: int) -> Callback:
    """The callback of the i-th of n equal parts."""
    return lambda done: callback((i + done) / n)


@dataclass(frozen=True)
class GradientAttack(Attack):
    """An attack by the mean gradient over fresh noise; the best attempt is chosen on noise that none has seen."""

    access: ClassVar[str] = "gradient"

    iters: int = option(100, "Steps.", low=1)
    eot: int = option(10, "Noise samples in each step.", low=1)
    eot_batch: int = option(1, "EOT samples in one forward pass. Changes results by rounding.", low=1)
    restarts: int = option(1, "Attempts, of which each image keeps the best.", low=1)

    def first_pixels(self, task: Task, side: int, key: str) -> Tensor:
        """Uniform noise, (B, 3, side, side), for the attempt of that key."""
        draws = [generator(task.seed, i, f"init{key}") for i in task.image_ids]
        return torch.stack([torch.rand(3, side, side, generator=g) for g in draws]).to(task.x)

    def choose(self, task: Task, attempts: list[Attacked]) -> Attacked:
        return best_attempt(task, attempts, self.eot, self.eot_batch)
