"""Expectation over the victim's noise (EOT, Athalye et al. 2018), and the choice among patches on fresh noise."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffender.noise import Noise, stack
from diffender.utils.errors import InputError, check_finite

Shown = Tensor | Callable[[int], Tensor]  # attacked images (B, 3, S, S), or what they are in the k-th pass
Draw = Callable[[int], tuple[Tensor, Tensor, Noise | Tensor | None]]  # k -> attacked images, their patches, the noise


class Victim(Protocol):
    """The attacked model: maps images in [0, 1] and the noise of one pass to logits.

    Noise is None for deterministic models. One that has `with_penalty(x, noise, patch)`, patch (B, 1, S, S) in {0, 1}
    being where the attacker's pixels are, gives the logits (B, K) and a penalty (B,). Gradients, Sparse-RS and RHDE
    lower the penalty besides their own loss. GDPA's search for a place and its moves lower the victim's loss alone.
    """

    def __call__(self, x: Tensor, noise: Noise | Tensor | None) -> Tensor: ...

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Noise | Tensor | None: ...


class Attacked(NamedTuple):
    image: Tensor  # (B, 3, S, S) in [0, 1], multiples of 1/255
    mask: Tensor  # (B, 1, S, S) in {0, 1}, 1 = patched
    state: Tensor  # (B, ...): from where the same attack can go on, as its `init`
    queries: Tensor  # (B,): how often the victim saw each image
    trace: Tensor  # (B, steps): the loss along the way
    fooled: Tensor  # (B, steps): the share of each step's samples that were misread; in evade by the classifier alone


class Sample(NamedTuple):
    """One sample of the expectation over the victim's noise."""

    value: Tensor  # (B,): the attacker's loss, penalty included
    fooled: Tensor  # (B,) in {0, 1}
    gradient: Tensor  # (B, 3, S, S): of the value, to the attacked image
    mask: Tensor  # (B, 1, S, S): where that image is patched


def no_loss(logits: Tensor) -> Tensor:
    raise AssertionError("an attack sets its task's loss before it asks the victim")


class Task(NamedTuple):
    """Images, labels and the victim that an attack is run on."""

    victim: Victim
    x: Tensor  # (B, 3, S, S) in [0, 1]
    y: Tensor  # (B,): true labels
    image_ids: Sequence[str]
    seed: int
    loss: Callable[[Tensor], Tensor] = no_loss  # what the attacker lowers, from logits (B, K) to (B,); the attack's own

    def noise(self, purpose: str, k: int = 0) -> Noise | Tensor | None:
        return self.victim.sample_noise(self.image_ids, self.seed, purpose, k)

    def part(self, rows: slice) -> "Task":
        """The same of these images alone."""
        return self._replace(x=self.x[rows], y=self.y[rows], image_ids=self.image_ids[rows])


def logits_and_penalty(victim: Victim, x: Tensor, noise: Noise | Tensor | None, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and penalty (B,) of images (B, 3, S, S), patched where patch (B, 1, S, S) is 1.

    The penalty is 0 for a victim without `with_penalty`.
    """
    if hasattr(victim, "with_penalty"):
        return victim.with_penalty(x, noise, patch)
    return victim(x, noise), x.new_zeros(len(x))


def samples(task: Task, draw: Draw, eot: int, batch: int = 1) -> Iterator[Sample]:
    """The `eot` samples of an expectation over the victim's noise, `batch` of them side by side.

    `draw(k)` gives the k-th attacked images (B, 3, S, S), where they are patched (B, 1, S, S) and the victim's noise.
    Losses are summed, so an image's gradient does not depend on the batch. Samples are drawn as they are needed: with
    batch = 1 memory does not grow with `eot`.
    """
    b = len(task.y)
    for start in range(0, eot, batch):
        drawn = [draw(k) for k in range(start, min(start + batch, eot))]
        images, patches, noises = zip(*drawn, strict=True)
        x = torch.cat(images).detach().requires_grad_()
        logits, penalty = logits_and_penalty(task.victim, x, stack(noises), torch.cat(patches))
        value = torch.cat([task.loss(part) for part in logits.split(b)]) + penalty
        attached = value.requires_grad  # perhaps through weights alone; then the gradient to x is None
        gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if attached else None
        if gradient is None:
            raise InputError(
                "the victim's logits have no gradient: call it without torch.no_grad and detach nothing, or attack it "
                'through bpda (--grad bpda, gradient="bpda") or by queries (rhde, sparse-rs)'
            )
        for part in gradient.split(b):
            check_finite("attack's gradient", part)
        fooled = logits.argmax(dim=1).ne(task.y.repeat(len(drawn))).float()
        values, misread, gradients = (t.detach().split(b) for t in (value, fooled, gradient))
        for k in range(len(drawn)):
            yield Sample(values[k], misread[k], gradients[k], patches[k])


class Expectation(NamedTuple):
    """Means over the samples of one step."""

    gradient: Tensor  # (B, 3, S, S)
    value: Tensor  # (B,): the attacker's loss, penalty included
    fooled: Tensor  # (B,): the share of samples that the victim misread
    score: Tensor  # (B,): their `rank`


def expect(
    task: Task, draw: Draw, eot: int, batch: int = 1, share: Callable[[Sample], Tensor] = lambda s: s.gradient
) -> Expectation:
    """The step that gradient attacks share: loss and gradient over `eot` samples, as in `samples`.

    `share` is what a sample gives to the mean gradient, (B, 3, S, S).
    """
    gradient, values, fooled = torch.zeros_like(task.x), [], []
    for sample in samples(task, draw, eot, batch):
        gradient = gradient + share(sample) / eot
        values.append(sample.value)
        fooled.append(sample.fooled)
    losses, misread = torch.stack(values), torch.stack(fooled)
    return Expectation(gradient, losses.mean(dim=0), misread.mean(dim=0), rank(losses, misread))


class Course:
    """How an attempt went: the state of each image with the best score on its own samples, and the curves."""

    def __init__(self) -> None:
        self.best: list[Tensor] = []  # (B, ...), once there is one
        self.score = torch.empty(0)
        self.value: list[Tensor] = []
        self.fooled: list[Tensor] = []

    def record(self, state: Tensor, seen: Expectation) -> None:
        """`state` (B, ...) is what `seen` was measured on."""
        if self.best:
            state = pick_rows(seen.score > self.score, state, self.best[0])
            self.score = torch.maximum(seen.score, self.score)
        else:
            self.score = seen.score
        self.best = [state]
        self.value.append(seen.value)
        self.fooled.append(seen.fooled)

    def curves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and share fooled, (B, steps) each."""
        value, fooled = (torch.stack(c, dim=1) if c else x.new_zeros(len(x), 0) for c in (self.value, self.fooled))
        return value, fooled


def judge(task: Task, shown: Shown, purpose: str, eot: int, batch: int = 1, least: int = 3) -> Tensor:
    """The score of attacked images, (B,): `rank` over `eot` noises, or `least` if these are more, `batch` side by side.

    A deterministic victim is asked once, if it is always shown the same. Calls with the same purpose compare images on
    the same noise.
    """
    values, fooled, n = [], [], judgements(task, eot, least, moving=callable(shown))
    for start in range(0, n, batch):
        passes = range(start, min(start + batch, n))
        images = torch.cat([shown(k) if callable(shown) else shown for k in passes])
        logits = task.victim(images, stack([task.noise(purpose, k) for k in passes])).detach()
        for part in logits.split(len(task.y)):
            values.append(task.loss(part))
            fooled.append(part.argmax(dim=1).ne(task.y).float())
    return rank(torch.stack(values), torch.stack(fooled))


def judgements(task: Task, eot: int, least: int = 3, moving: bool = False) -> int:
    """How many passes `judge` takes; `moving`: each is shown something else."""
    random = task.victim.sample_noise(task.image_ids[:1], task.seed, "judge") is not None  # asked for that of one image
    return max(least, eot) if moving or random else 1


def kept_back(task: Task, candidates: int, queries: int) -> int:
    """How many of an attack's queries are kept for judging its candidates in the end, so that no lucky draw wins: none
    without noise, and none if they would take more than half of the budget."""
    passes = judgements(task, 1)
    wanted = candidates * passes if passes > 1 else 0
    return wanted if queries >= 2 * wanted else 0


def rank(values: Tensor, fooled: Tensor) -> Tensor:
    """One score for each image, (B,), from losses and successes (K, B) of K samples. Larger is better for the attacker.

    More successes always win. Among equals the lower mean loss does.
    """
    loss = values.mean(dim=0)
    # The loss adds a part in (0, 1), which is less than a success and strictly falling.
    return fooled.sum(dim=0) + 0.5 - 0.5 * loss / (1 + loss.abs())


def pick_rows(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where `better` (B,), else of `old`."""
    ones = (1,) * (new.ndim - 1)
    return torch.where(better.view(-1, *ones), new, old)


def best_attempt(
    task: Task, attempts: Sequence[Attacked], eot: int, batch: int = 1, shown: Sequence[Shown] | None = None
) -> Attacked:
    """Each image's best attempt on noise that none has seen; queries are those of all attempts. `shown`, one of each
    attempt, is judged instead of their images."""
    if len(attempts) == 1:
        return attempts[0]
    shown = [a.image for a in attempts] if shown is None else shown
    winner = torch.stack([judge(task, one, "restarts", eot, batch) for one in shown]).argmax(dim=0)
    rows = torch.arange(len(winner), device=winner.device)
    fields = [torch.stack(field)[winner, rows] for field in zip(*attempts, strict=True)]
    passes = judgements(task, eot, moving=callable(shown[0]))
    queries = torch.stack([a.queries for a in attempts]).sum(dim=0) + len(attempts) * passes
    return Attacked(*fields)._replace(queries=queries)
