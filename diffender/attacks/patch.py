"""What all patch attacks share: geometry, composition, losses, expectation over noise."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from diffender.noise import Noise, generator, stack
from diffender.utils.errors import check_finite


class Victim(Protocol):
    """What is attacked: logits of pictures in [0, 1], given the noise of one pass (None where nothing is random).

    A victim may also have `with_penalty(x, noise, patch) -> (logits, penalty (B,))`: what a gradient attack lowers
    besides its own loss, given where its pixels are.
    """

    def __call__(self, x: Tensor, noise: Noise | Tensor | None) -> Tensor: ...

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Noise | Tensor | None: ...


class Attacked(NamedTuple):
    image: Tensor  # (B, 3, S, S) in [0, 1], multiples of 1/255
    mask: Tensor  # (B, 1, S, S) in {0, 1}, 1 = patched
    state: Tensor  # (B, ...): from where the same attack can go on, as its `init`
    queries: Tensor  # (B,): how often the victim saw each picture
    trace: Tensor  # (B, steps): the loss along the way
    fooled: Tensor  # (B, steps): the share of each step's samples that the victim misread


class Sample(NamedTuple):
    """One sample of the expectation over the victim's noise."""

    value: Tensor  # (B,): the attacker's loss, penalty included
    fooled: Tensor  # (B,) in {0, 1}
    gradient: Tensor  # (B, 3, S, S): of the value, to the attacked picture
    mask: Tensor  # (B, 1, S, S): where that picture is patched


def patch_side(size: int, area: float) -> int:
    """Side of a square patch that covers a share `area` of an S x S picture."""
    return round(size * math.sqrt(area))


def random_mask(size: int, area: float, shape: str, g: Generator, corner: bool = False) -> Tensor:
    """A mask (1, S, S) of a square or disc, uniform over every place where it is whole.

    `corner`: at most 8 pixels away from one of the four corners, as LaVAN keeps clear of the object.
    """
    side = patch_side(size, area)
    if shape == "circle":
        side = round(side * math.sqrt(4 / math.pi))
    free = size - side
    top, left = (int(torch.randint(0, free + 1, (), generator=g)) for _ in "yx")
    if corner:
        top, left = (min(n % 9, free) if n % 2 else free - min(n % 9, free) for n in (top, left))
    mask = torch.zeros(1, size, size)
    inside = torch.ones(side, side)
    if shape == "circle":
        u = torch.arange(side) - (side - 1) / 2
        inside = (u[:, None] ** 2 + u[None, :] ** 2 <= (side / 2) ** 2).float()
    mask[0, top : top + side, left : left + side] = inside
    return mask


def masks_for(
    image_ids: Sequence[str], seed: int, key: str, size: int, area: float, shape: str = "square", corner: bool = False
) -> Tensor:
    """One mask an image, (B, 1, S, S), from (seed, image id, key) alone."""
    return torch.stack([random_mask(size, area, shape, generator(seed, i, "location", key), corner) for i in image_ids])


def apply_patch(x: Tensor, patch: Tensor, mask: Tensor) -> Tensor:
    """Patch pixels inside the mask, x outside, to the bit."""
    return x * (1 - mask) + patch * mask


def to_8bit(x: Tensor) -> Tensor:
    """Rounded to what an 8-bit file can hold."""
    return (x * 255).round() / 255


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j for each picture, (B,): negative where it is fooled."""
    return logit(logits, y) - logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def logit(logits: Tensor, y: Tensor) -> Tensor:
    """That of class y (B,), out of logits (B, K)."""
    return logits.gather(1, y[:, None])[:, 0]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """CE(z, t) for each picture, (B,): small where it is taken for t."""
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


class Task(NamedTuple):
    """Which pictures of whom an attack is to have misread."""

    victim: Victim
    x: Tensor  # (B, 3, S, S) in [0, 1]
    y: Tensor  # (B,): true labels
    image_ids: Sequence[str]
    seed: int
    loss: Callable[[Tensor], Tensor]  # what the attacker lowers, from logits (B, K) to (B,)

    def noise(self, purpose: str, k: int = 0) -> Noise | Tensor | None:
        return self.victim.sample_noise(self.image_ids, self.seed, purpose, k)


def samples(
    task: Task, draw: Callable[[int], tuple[Tensor, Tensor, Noise | Tensor | None]], eot: int, batch: int = 1
) -> Iterator[Sample]:
    """The `eot` samples of an expectation over the victim's noise, `batch` of them side by side: the same either way.

    `draw(k)` gives the k-th attacked pictures (B, 3, S, S), where they are patched (B, 1, S, S) and the victim's noise.
    Losses are summed, so that a picture's gradient knows no batch. Drawn as they are needed: with batch = 1 memory
    does not grow with `eot`.
    """
    b = len(task.y)
    for start in range(0, eot, batch):
        drawn = [draw(k) for k in range(start, min(start + batch, eot))]
        images, patches, noises = zip(*drawn, strict=True)
        x = torch.cat(images).detach().requires_grad_()
        if hasattr(task.victim, "with_penalty"):
            logits, penalty = task.victim.with_penalty(x, stack(noises), torch.cat(patches))
        else:
            logits, penalty = task.victim(x, stack(noises)), 0
        value = torch.cat([task.loss(part) for part in logits.split(b)]) + penalty
        gradient = torch.autograd.grad(value.sum(), x)[0]
        for part in gradient.split(b):
            check_finite("attack's gradient", part)
        fooled = logits.argmax(dim=1).ne(task.y.repeat(len(drawn))).float()
        yield from map(Sample, *(t.detach().split(b) for t in (value, fooled, gradient)), patches)


def judge(task: Task, images: Tensor, purpose: str, eot: int, batch: int = 1) -> Tensor:
    """How good attacked pictures are, (B,): `rank` over `eot` noises, at least three, if there is noise, `batch` of
    them side by side; the same purpose compares all on the same."""
    values, fooled, n = [], [], judgements(task, eot)
    for start in range(0, n, batch):
        noises = [task.noise(purpose, k) for k in range(start, min(start + batch, n))]
        logits = task.victim(images.repeat(len(noises), 1, 1, 1), stack(noises)).detach()
        for part in logits.split(len(images)):
            values.append(task.loss(part))
            fooled.append(part.argmax(dim=1).ne(task.y).float())
    return rank(torch.stack(values), torch.stack(fooled))


def judgements(task: Task, eot: int) -> int:
    """How many passes `judge` takes."""
    return 1 if task.noise("judge") is None else max(3, eot)


def rank(values: Tensor, fooled: Tensor) -> Tensor:
    """Losses and successes (K, B) to one number each (B,), larger is better: first the successes, then the loss."""
    return fooled.sum(dim=0) + torch.sigmoid(-values.mean(dim=0))  # in (0, 1): never worth a success


def pick_rows(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where `better` (B,), else of `old`."""
    return torch.where(better.view(-1, *(1,) * (new.ndim - 1)), new, old)


def best_attempt(task: Task, attempts: Sequence[Attacked], eot: int, batch: int = 1) -> Attacked:
    """Each picture's best attempt on noise that none has seen; queries are those of all attempts."""
    if len(attempts) == 1:
        return attempts[0]
    winner = torch.stack([judge(task, a.image, "restarts", eot, batch) for a in attempts]).argmax(dim=0)
    rows = torch.arange(len(winner), device=winner.device)
    fields = [torch.stack(field)[winner, rows] for field in zip(*attempts, strict=True)]
    queries = torch.stack([a.queries + judgements(task, eot) for a in attempts]).sum(dim=0)
    return Attacked(*fields)._replace(queries=queries)
