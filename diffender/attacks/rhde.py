"""RHDE: a fixed sticker, its place, angle and opacity searched by differential evolution (Wei, Guo and Yu 2022).

Black-box: it sees class probabilities alone, and counts every query. Where the victim is random, all queries of one
generation share their noise, and each generation draws new noise. The elite is judged again on it; other parents keep
the values of an earlier generation. Such values may be lucky, so some queries are kept for the end. There the best
three candidates and the start are compared on unseen noise.

Where the victim has a penalty (`evade`), the search lowers that, too. Then it sees the map as well, but no gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from diffender.attacks.attack import Attack, Callback, check_init, within
from diffender.attacks.expectation import Attacked, Task, judge, judgements, kept_back, logits_and_penalty
from diffender.attacks.patch import to_8bit
from diffender.attacks.stickers import NAMES, largest_area, render, side_for
from diffender.noise import generator, stack
from diffender.utils.errors import InputError, named_images, nearest
from diffender.utils.options import option

GAP, BETA = (0.15, 20.0)  # the gap at which the runner-up is locked, and the weight of the relative gap then
MISREAD = 100.0  # more than the energy of any candidate
FRESH = 10  # draws that must all be fooled before the search may stop
FINALISTS = 4  # the best three and the start


class Crowd(NamedTuple):
    """Candidates: what they are and what the victim made of them."""

    genes: Tensor  # (N, 4) in [0, 1]: top, left, angle, opacity
    sticker: Tensor  # (N,): index into NAMES
    probs: Tensor  # (N, classes)
    penalty: Tensor  # (N,): what the search lowers besides, as in `evade`; else 0

    def take(self, rows: Tensor) -> "Crowd":
        return Crowd(*(t[rows] for t in self))


def energy(probs: Tensor, y: int, locked: int | None) -> Tensor:
    """What the search lowers, (N,), from probabilities (N, classes) of candidates for an image of class y.

    Before the lock: p_y minus the largest other probability. After it, with r the locked class: BETA (p_y - p_r) / p_y
    + (p_y - p_r), minus MISREAD if misclassified. Misclassified candidates are below 0, all others are not.
    """
    true = probs[:, y]
    if locked is None:
        others = probs.clone()
        others[:, y] = -1
        return true - others.amax(dim=1)
    gap = true - probs[:, locked]
    return BETA * gap / true.clamp_min(1e-6) + gap - MISREAD * probs.argmax(dim=1).ne(y)


@dataclass(frozen=True)
class RHDE(Attack):
    """Differential evolution over place, angle and opacity of a sticker, by queries alone (Wei, Guo and Yu 2022).

    The sticker covers the share `area` of the image, by its opacity. Raises InputError for an unknown sticker, and for
    one that cannot cover so much.
    """

    access: ClassVar[str] = "queries"

    sticker: str | None = None  # of stickers.NAMES; none: the best three of all after some queries for each
    opacity: tuple[float, float] = (0.8, 0.98)  # the range of the search
    population: int = option(30, "Candidates.", low=4)
    iters: int = option(33, "Generations.", low=1)
    queries: int = option(2400, "Largest number of queries for each image.", low=1)
    elite: float = option(0.2, "Share of the candidates whose neighbours are tried.", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sticker is not None and self.sticker not in NAMES:
            near = nearest(self.sticker, NAMES)
            raise InputError(f"unknown sticker {self.sticker!r}; choose one of {', '.join(NAMES)}{near}")
        if not 0 <= self.opacity[0] <= self.opacity[1] <= 1:
            raise InputError(f"opacity is {self.opacity}; it is a range within 0 to 1, the lower end first")
        smallest = min((self.sticker,) if self.sticker else NAMES, key=largest_area)
        if self.area > largest_area(smallest):
            raise InputError(
                f"the sticker {smallest} covers {largest_area(smallest):.3f} of an image at most, and area is "
                f"{self.area:g}; lower it, or choose another sticker of {', '.join(NAMES)}"
            )

    def attempts(self, task: Task, init: Tensor | None, callback: Callback) -> Iterator[Attacked]:
        """One image after the other. `init` (B, N, 5) replaces the first population."""
        check_init(init, (-1, 5), "(B, N, 5), genes and sticker of each candidate")
        results = []
        for b, image_id in enumerate(task.image_ids):
            one, heard = task.part(slice(b, b + 1)), within(callback, b, len(task.y))
            one = one._replace(loss=self.loss(one))
            with named_images([image_id]):
                results.append(Search(self, one).run(None if init is None else init[b].cpu(), heard))
        yield Attacked(*map(torch.cat, zip(*results, strict=True)))


class Search:
    """The search on one image."""

    def __init__(self, cfg: RHDE, task: Task):
        self.cfg, self.task, self.y = cfg, task, int(task.y)
        self.g: Generator = generator(task.seed, task.image_ids[0], "rhde")
        self.seen = 0
        self.limit = cfg.queries - kept_back(task, FINALISTS, cfg.queries)  # of the search
        self.locked: int | None = None  # the runner-up class, once the gap to it is small
        self.visited: set[tuple[int, int, int]] = set()  # sticker, top, left

    def paste(self, genes: Tensor, sticker: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates as 8-bit images (N, 3, S, S) and where they differ from the image, (N, 1, S, S)."""
        x, size = self.task.x, self.task.x.shape[-1]
        images, masks = (x.repeat(len(genes), 1, 1, 1), x.new_zeros(len(genes), 1, size, size))
        low, high = self.cfg.opacity
        for n, (gene, index) in enumerate(zip(genes, sticker.tolist(), strict=True)):
            side = side_for(NAMES[index], size, self.cfg.area)
            top, left = (round(v * (size - side)) for v in gene[:2].tolist())
            decal = render(NAMES[index], 360 * gene[2:3], side)[0].to(x) * (low + (high - low) * gene[3]).to(x)
            at = (n, slice(None), slice(top, top + side), slice(left, left + side))
            images[at] = images[at] * (1 - decal[3:]) + decal[:3]
            masks[at] = (decal[3:] > 0).to(x.dtype)
        return to_8bit(images), masks

    def ask(self, genes: Tensor, sticker: Tensor, purpose: str) -> Crowd:
        """Query the victim, all candidates on the same noise; none beyond the budget."""
        left = self.limit - self.seen
        genes, sticker = genes[:left], sticker[:left]
        if not len(genes):
            return Crowd(genes, sticker, torch.empty(0, 0), torch.empty(0))
        images, masks = self.paste(genes, sticker)
        logits, penalty = logits_and_penalty(
            self.task.victim, images, stack([self.task.noise(purpose)] * len(genes)), masks
        )
        self.seen += len(genes)
        return Crowd(genes, sticker, logits.detach().softmax(dim=1).cpu(), penalty.detach().cpu())

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.g)

    def first(self, init: Tensor | None) -> Crowd:
        """The first population: an earlier search's, or a Latin hypercube over the best stickers."""
        n = min(self.cfg.population, max(4, self.limit // 3))  # so that a small budget searches too
        if init is not None:
            return self.ask(init[:n, :4], init[:n, 4].long(), "attack 0")
        tries = min(5, self.limit // (2 * len(NAMES)))  # at most half of the queries go into the screening
        if self.cfg.sticker is not None or tries == 0:
            best = torch.tensor([NAMES.index(self.cfg.sticker or NAMES[0])])
        else:
            kinds = torch.arange(len(NAMES)).repeat_interleave(tries)
            tried = self.ask(self.uniform(len(kinds), 4), kinds, "screening")
            scores = self.energies(tried)
            best = torch.stack([scores[tried.sticker == k].amin() for k in range(len(NAMES))]).argsort()[:3]
        cells = torch.stack([torch.randperm(n, generator=self.g) for _ in range(4)], dim=1)
        genes = (cells + self.uniform(n, 4)) / n
        return self.ask(genes, best[torch.arange(n) % len(best)], "attack 0")

    def run(self, init: Tensor | None, callback: Callback) -> Attacked:
        crowd, trace, missed, done = self.first(init), [], [], False
        for step in range(1, self.cfg.iters + 1):
            crowd = crowd.take(self.energies(crowd).argsort(stable=True))
            trace.append(self.energies(crowd)[0])
            missed.append(crowd.probs[0].argmax().ne(self.y).float())
            hides = crowd.penalty.any()  # then no lock: the locked energy is much larger and would outweigh the penalty
            if self.locked is None and not hides and trace[-1] <= GAP:
                others = crowd.probs[0].clone()
                others[self.y] = -1
                self.locked = int(others.argmax())  # energies follow: they are computed from the probabilities
            callback(self.seen / self.cfg.queries)
            done = done or self.seen >= self.limit
            if not done:  # else the curves go on, so that those of all images are equally long
                crowd = self.generation(crowd, f"attack {step}")
                done = self.certain(crowd, step)
        crowd = crowd.take(self.energies(crowd).argsort(stable=True))
        state = torch.cat([crowd.genes, crowd.sticker[:, None].float()], dim=1)
        if self.limit < self.cfg.queries:
            start = state[:0] if init is None else init[:1]
            state = self.final(torch.cat([state[: FINALISTS - 1], start]), state)
        image, mask = self.paste(state[:1, :4], state[:1, 4].long())
        curves = (torch.stack(curve)[None] for curve in (trace, missed))
        return Attacked(image, mask, state[None], torch.tensor([self.seen]), *curves)

    def final(self, few: Tensor, state: Tensor) -> Tensor:
        """The candidates (N, 5), led by the one of a few that is best on fresh noise."""
        images, _ = self.paste(few[:, :4], few[:, 4].long())
        scores = torch.cat([judge(self.task, image[None], "choice", 1) for image in images])
        self.seen += len(few) * judgements(self.task, 1)
        return torch.cat([few[scores.argmax()][None], state])

    def energies(self, crowd: Crowd) -> Tensor:
        return energy(crowd.probs, self.y, self.locked) + crowd.penalty

    def certain(self, crowd: Crowd, step: int) -> bool:
        """Whether the best candidate fools the victim on FRESH new draws; asked only of one that fools it now."""
        best = crowd.take(self.energies(crowd).argmin()[None])
        if best.probs.argmax() == self.y or self.limit - self.seen < FRESH:
            return False
        if self.task.noise("certain") is None:
            return True
        image, _ = self.paste(best.genes, best.sticker)
        for k in range(FRESH):
            self.seen += 1
            if self.task.victim(image, self.task.noise(f"certain {step} {k}")).argmax() == self.y:
                return False
        return True

    def generation(self, crowd: Crowd, purpose: str) -> Crowd:
        """One generation, `crowd` sorted best first: neighbours of the elite, best1bin for the others."""
        n = len(crowd.genes)
        n_elite = max(1, round(self.cfg.elite * n))
        elite = crowd.take(torch.arange(n_elite))
        if self.task.noise(purpose) is not None:  # no lucky draw survives
            elite = self.ask(elite.genes, elite.sticker, purpose)
            elite = elite.take(self.energies(elite).argsort(stable=True))
            crowd = Crowd(*(torch.cat([new, old[len(new) :]]) for new, old in zip(elite, crowd, strict=True)))
        near = torch.cat([self.neighbours(gene, int(s)) for gene, s in zip(elite.genes, elite.sticker, strict=True)])
        answers = self.ask(near, elite.sticker.repeat_interleave(8), purpose)
        owner = torch.arange(len(answers.genes)) // 8
        trials = [answers.take((owner == e).nonzero()[:, 0]) for e in range(n_elite)]
        trials = [t.take(self.energies(t).argmin()[None]) for t in trials if len(t.genes)]
        parents = list(range(len(trials)))
        if n > n_elite:
            mates = torch.stack([torch.randperm(n, generator=self.g)[:2] for _ in range(n_elite, n)])
            factor = 0.5 + 0.5 * self.uniform(1)
            genes = crowd.genes[0] + factor * (crowd.genes[mates[:, 0]] - crowd.genes[mates[:, 1]])
            genes = torch.where((genes < 0) | (genes > 1), self.uniform(*genes.shape), genes)
            sticker = torch.where(self.uniform(len(genes)) < 0.5, crowd.sticker[0], crowd.sticker[n_elite:])
            bred = self.ask(genes, sticker, purpose)
            trials += [bred.take(torch.tensor([i])) for i in range(len(bred.genes))]
            parents += list(range(n_elite, n_elite + len(bred.genes)))
        fields = [list(t.unbind()) for t in crowd]
        for parent, trial in zip(parents, trials, strict=True):
            if self.energies(trial)[0] < self.energies(crowd.take(torch.tensor([parent])))[0]:
                for field, value in zip(fields, trial, strict=True):
                    field[parent] = value[0]
        return Crowd(*map(torch.stack, fields))

    def neighbours(self, gene: Tensor, sticker: int) -> Tensor:
        """The eight places a pixel away, (8, 4). Where the search has been before, a coin decides: farther out, or
        a new opacity; so it neither stands still nor asks twice."""
        free = self.task.x.shape[-1] - side_for(NAMES[sticker], self.task.x.shape[-1], self.cfg.area)
        top, left = (round(v * free) for v in gene[:2].tolist())
        found = []
        for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
            opacity, distance = gene[3], 1
            outwards = self.uniform(1).item() < 0.5

            def spot(distance: int, dy: int = dy, dx: int = dx) -> tuple[int, int, int]:
                return (sticker, min(max(top + dy * distance, 0), free), min(max(left + dx * distance, 0), free))

            if spot(distance) in self.visited and not outwards:
                opacity = self.uniform(1)[0]
            while outwards and spot(distance) in self.visited and distance < free:
                distance += 1
            self.visited.add(spot(distance))
            _, y, x = spot(distance)
            found.append(
                torch.stack([torch.tensor(y / max(free, 1)), torch.tensor(x / max(free, 1)), gene[2], opacity])
            )
        return torch.stack(found)
