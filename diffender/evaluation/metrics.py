"""What is measured: accuracies with their intervals, and how well the mask covers the patch."""

import math
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskScores(NamedTuple):
    """Scores of each mask, (B,). Recall: covered share of the patch. Precision: patched share of the mask."""

    recall: Tensor
    precision: Tensor
    iou: Tensor


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, (low, high), of n trials, at least one."""
    p, z = successes / n, 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding may put p a hair outside


def proportion(values: Sequence[float]) -> dict:
    """Mean of values in [0, 1] and its Wilson interval, with one trial for each value.

    Where values are shares of several draws, the interval is too wide rather than too narrow.
    """
    low, high = wilson(sum(values), len(values))
    return {"right": sum(values), "n": len(values), "accuracy": mean(values), "low": low, "high": high}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def bounded(p: dict) -> str:
    """A proportion with its interval."""
    return f"{percent(p['accuracy'])} ({100 * p['low']:.0f}-{100 * p['high']:.0f})"


def counted(p: dict, unit: str = " %") -> str:
    """A proportion with its count and its interval."""
    return f"{100 * p['accuracy']:.1f}{unit} ({p['right']:.0f}/{p['n']}; {100 * p['low']:.0f}-{100 * p['high']:.0f})"


def whiskers(cells: Sequence[dict]) -> tuple[list[float], list[list[float]]]:
    """Proportions in per cent, and how far their intervals reach below and above them: y and yerr of matplotlib."""
    y, low, high = ([100 * p[key] for p in cells] for key in ("accuracy", "low", "high"))
    return y, [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]


def discordant(pairs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """How many of paired outcomes are higher on the left, and how many on the right."""
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)


def mcnemar(pairs: Sequence[tuple[float, float]]) -> float:
    """Exact two-sided McNemar test on paired outcomes in {0, 1}: the probability of a split of the pairs that differ at
    least as uneven as this, if either were as likely to win."""
    first, second = discordant(pairs)
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def mask_scores(mask: Tensor, truth: Tensor) -> MaskScores:
    """mask and truth (B, 1, H, W) in {0, 1}. An empty mask has precision 0 here, an empty truth recall 0."""
    both, found, true = ((m.flatten(1)).sum(dim=1) for m in (mask * truth, mask, truth))
    return MaskScores(both / true.clamp_min(1), both / found.clamp_min(1), both / (found + true - both).clamp_min(1))


def auc(score: Tensor, truth: Tensor) -> float:
    """Probability that a random pixel of the patch scores above a random one outside, ties counted half; 0.5 is chance.
    1-D tensors; NaN where either side has no pixel."""
    score, truth = score.cpu(), truth.cpu()  # float64 is not on every device
    apart = score[truth > 0.5][:, None] - score[truth <= 0.5]
    return ((apart > 0).double() + 0.5 * (apart == 0)).mean().item()


def map_auc(heatmap: Tensor, truth: Tensor) -> Tensor:
    """`auc` of each difference map (B, 1, h, w) against the true mask (B, 1, H, W), (B,).

    The patch's latents are those that it covers by more than half; of a patch smaller than that, those that it covers
    most.
    """
    inside = F.interpolate(truth, heatmap.shape[-2:], mode="area")
    inside = inside >= inside.amax(dim=(1, 2, 3), keepdim=True).clamp_max(0.5 + 1e-6)
    return torch.tensor([auc(h.flatten(), t.flatten()) for h, t in zip(heatmap, inside, strict=True)])
