"""Are two images of one person? LFW's protocol, which tells how good a recogniser is."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffender.classifiers.dataset import read_csv
from diffender.utils.errors import InputError


class Verification(NamedTuple):
    accuracy: float  # mean over the folds, the threshold chosen on the others
    threshold: float  # mean, of the squared distance of unit embeddings


def verify(distances: Tensor, same: Tensor, folds: int = 10) -> Verification:
    """LFW's protocol: squared distances (N,), whether each pair is of one person (N,), in blocks of a fold each.

    Raises InputError for fewer than two pairs a fold.
    """
    if len(same) < 2 * folds:
        raise InputError(f"{len(same)} pairs are too few for {folds} folds; give at least {2 * folds}")
    parts = torch.arange(len(same)).tensor_split(folds)
    accuracies, thresholds = [], []
    for part in parts:
        others = torch.ones(len(same), dtype=torch.bool)
        others[part] = False
        ordered, order = distances[others].sort()
        candidates = (ordered[1:] + ordered[:-1]) / 2
        called_same = torch.searchsorted(ordered, candidates, right=True)  # how many distances are up to it
        hits = F.pad((2 * same[others][order].long() - 1).cumsum(dim=0), (1, 0))  # same, less different, of the first n
        right = hits[called_same]  # the number of right answers, up to a constant
        thresholds.append(candidates[right == right.max()].median().item())  # the middle of the best
        accuracies.append(((distances[part] <= thresholds[-1]) == same[part]).float().mean().item())
    return Verification(sum(accuracies) / folds, sum(thresholds) / folds)


def read_pairs(path: Path, root: Path) -> list[tuple[Path, Path, bool]]:
    """LFW's pairs.txt (name i j, or name i name j), or a csv with file_a, file_b and same."""
    if path.suffix.lower() == ".csv":
        rows = read_csv(path, "file_a", "file_b", "same")
        if wrong := next((r["same"] for r in rows if r["same"] not in ("0", "1")), None):
            raise InputError(f"{path}: same is {wrong!r}; it is 1 for two images of one person, 0 for two people")
        return [(root / r["file_a"], root / r["file_b"], r["same"] == "1") for r in rows]

    def image(name: str, number: str) -> Path:
        if not number.isdecimal():
            raise InputError(f"{path}: {name} {number}; after a name stands the number of its image, as in LFW's pairs")
        return root / name / f"{name}_{int(number):04d}.jpg"

    pairs = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        match line.split():
            case [name, i, j]:
                pairs.append((image(name, i), image(name, j), True))
            case [name, i, other, j]:
                pairs.append((image(name, i), image(other, j), False))
            case [_, *_]:
                raise InputError(f"{path}: {line!r} is no pair; give name i j, or name i name j, as in LFW's pairs")
    return pairs
