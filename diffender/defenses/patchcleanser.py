"""PatchCleanser (Xiang et al. 2022): two rounds of windows, and a certificate against every patch up to a size.

Beyond the paper: the certificate needs no attack. It is a lower bound of the accuracy under all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from diffender.classifiers.imagenet import Classifier
from diffender.restore import composite
from diffender.utils.errors import InputError

AT_ONCE = 4  # pairs of a row, before it is asked whether the row can still agree
ROUNDING = 1e-3  # of logits, at most


@dataclass(frozen=True)
class PatchCleanser:
    """Raises InputError for an area outside of 0.0005 to 0.5 and for less than one window along an axis."""

    classifier: Classifier
    area: float  # share of the image that the largest square patch to withstand covers
    masks: int = 6  # windows along each axis; Xiang et al. call a window a mask
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not 0.0005 <= self.area <= 0.5 or self.masks < 1:
            raise InputError(
                f"area is {self.area:g} and masks {self.masks}; area lies in 0.0005 to 0.5, masks is at least 1"
            )

    def largest(self, size: int) -> int:
        """Side in pixels of the largest patch that it must withstand in images of this size."""
        return max(1, round(size * math.sqrt(self.area)))

    def windows(self, size: int) -> list[tuple[int, int, int]]:
        """Windows as (top, left, side) such that every square of the largest side lies inside one."""
        patch = self.largest(size)
        stride = math.ceil((size - patch + 1) / self.masks)
        side = min(patch + stride - 1, size)
        starts = [*range(0, size - side, stride), size - side]
        return [(top, left, side) for top in starts for left in starts]

    def cover(self, x: Tensor, pairs: Sequence[tuple[int, ...]]) -> Tensor:
        """One image (3, S, S) under each pair of windows, (P, 3, S, S). (i, i) is one window, () is none."""
        return composite(x, self.classifier.mean, self.hidden(x, pairs))  # the mean colour, which is 0 once normalised

    def hidden(self, x: Tensor, pairs: Sequence[tuple[int, ...]]) -> Tensor:
        """What each pair of windows covers of an image like x (3, S, S), (P, 1, S, S) in {0, 1}.

        Raises InputError for an image that is not square: no window would cover what is beyond the square.
        """
        if x.shape[-1] != x.shape[-2]:
            raise InputError(f"windows cover square images, and this one is of {tuple(x.shape[-2:])} pixels; crop it")
        windows = self.windows(x.shape[-1])
        masks = x.new_zeros(len(pairs), 1, *x.shape[1:])
        for mask, pair in zip(masks, pairs, strict=True):
            for top, left, side in (windows[i] for i in pair):
                mask[:, top : top + side, left : left + side] = 1
        return masks

    def logits(self, x: Tensor, pairs: Sequence[tuple[int, ...]]) -> Tensor:
        """Those of one image (3, S, S) under pairs of windows, (len(pairs), K)."""
        parts = (pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size))
        return torch.cat([self.classifier(self.cover(x, part)) for part in parts])

    def predict(self, x: Tensor, pairs: Sequence[tuple[int, int]]) -> list[int]:
        """The classes of one image (3, S, S) under pairs of windows."""
        return self.logits(x, pairs).argmax(dim=1).tolist()

    def surely(self, x: Tensor, pairs: Sequence[tuple[int, ...]], label: int) -> list[bool]:
        """For each pair, whether `label` leads by more than ROUNDING, so that another batch cannot change it."""
        values, labels = self.logits(x, pairs).topk(2)
        return (labels[:, 0].eq(label) & (values[:, 0] - values[:, 1] > ROUNDING)).tolist()

    def singles(self, x: Tensor) -> list[int]:
        """The classes under each window alone: the first round."""
        return self.predict(x, [(i, i) for i in range(len(self.windows(x.shape[-1])))])

    def __call__(self, x: Tensor) -> int:
        """The class of one image (3, S, S): the one all single windows agree on, else one that a second round confirms,
        else the majority."""
        label, _ = self.agreed(x) or self.majority(x)
        return label

    def majority(self, x: Tensor) -> tuple[int, int]:
        """The class of one image (3, S, S) that most single windows give, and the first of these windows."""
        first = self.singles(x)
        label = max(set(first), key=first.count)
        return label, first.index(label)

    def agreed(self, x: Tensor) -> tuple[int, int] | None:
        """The class of one image (3, S, S) that all windows, or all pairs with one window, agree on, and that window.

        None where no window's row agrees. Two rows share a pair, so they cannot agree on two classes. Dissenters go
        first: of an attacked image they are the few windows that hide the patch. The first pair that disagrees with
        a row ends it.
        """
        first = self.singles(x)
        if len(set(first)) == 1:
            return first[0], 0
        majority = max(set(first), key=first.count)
        order = sorted(range(len(first)), key=lambda i: first[i] == majority)
        possible, known = set(order), {(i, i) for i in order}
        for i in order:
            pairs = [(min(i, j), max(i, j)) for j in order]
            row = [pair for pair in pairs if pair not in known]
            while row and i in possible:
                part, row = row[:AT_ONCE], row[AT_ONCE:]
                for pair, seen in zip(part, self.predict(x, part), strict=True):
                    possible -= {k for k in pair if seen != first[k]}
                known.update(part)
            if i in possible:
                return first[i], i
        return None

    def certified(self, x: Tensor, label: int, patch: Tensor) -> bool:
        """Whether no pixels in a place (1, S, S) in {0, 1} can change the answer from the true label.

        It is so where a window hides the whole place and every pair with that window gives the label, beyond rounding:
        the attacker's pixels are in none of these pairs, and each other row shares a pair with this one, so none agrees
        on another class.
        """
        every = range(len(self.windows(x.shape[-1])))
        hiding = [i for i in every if (patch <= self.hidden(x, [(i, i)])[0]).all()]
        return any(all(self.surely(x, [(i, j) for j in every], label)) for i in hiding)

    def right_rows(self, x: Tensor, label: int) -> list[bool]:
        """Of each window, whether all pairs with it give the label, beyond rounding."""
        n = len(self.windows(x.shape[-1]))
        pairs = list(combinations_with_replacement(range(n), 2))
        sure = self.surely(x, pairs, label)
        wrong = {i for pair, right in zip(pairs, sure, strict=True) if not right for i in pair}
        return [i not in wrong for i in range(n)]

    def certified_places(self, x: Tensor, label: int) -> float:
        """The share of all places of a patch at which it cannot change the answer from the true label."""
        patch = self.largest(x.shape[-1])
        size = x.shape[-1] - patch + 1
        places = torch.zeros(size, size, dtype=torch.bool)
        for (top, left, side), right in zip(self.windows(x.shape[-1]), self.right_rows(x, label), strict=True):
            room = side - patch + 1
            places[top : top + room, left : left + room] |= right
        return places.float().mean().item()
