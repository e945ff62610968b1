"""PatchCleanser (Xiang et al. 2022): two rounds of masks, and a certificate against every patch up to a size.

Beyond the paper: no attack is needed for the certificate, it is a lower bound of accuracy under all of them.
"""

import math
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from diffender.classifiers.imagenet import Classifier


@dataclass(frozen=True)
class PatchCleanser:
    classifier: Classifier
    patch: int  # side in pixels of the largest patch that it must withstand
    masks: int = 6  # an axis
    batch_size: int = 64

    def windows(self, size: int) -> list[tuple[int, int, int]]:
        """Masks as (top, left, side) such that every patch x patch square lies inside one."""
        stride = math.ceil((size - self.patch + 1) / self.masks)
        side = min(self.patch + stride - 1, size)
        starts = [*range(0, size - side, stride), size - side]
        return [(top, left, side) for top in starts for left in starts]

    def predict(self, x: Tensor, pairs: list[tuple[int, int]]) -> list[int]:
        """The classes of one image (3, S, S) under pairs of masks; a pair of the same is a single mask."""
        windows, classes = self.windows(x.shape[-1]), []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            covered = x.repeat(len(part), 1, 1, 1)
            for row, pair in zip(covered, part, strict=True):
                for top, left, side in (windows[i] for i in pair):
                    row[:, top : top + side, left : left + side] = self.classifier.mean  # 0 to the network
            classes += self.classifier(covered).argmax(dim=1).tolist()
        return classes

    def __call__(self, x: Tensor) -> int:
        """The class of one image (3, S, S): the one all first masks agree on, else a dissenter that a second round
        confirms, else the majority."""
        n = len(self.windows(x.shape[-1]))
        first = self.predict(x, [(i, i) for i in range(n)])
        majority = max(set(first), key=first.count)
        for i, label in enumerate(first):
            if label != majority and set(self.predict(x, [(i, j) for j in range(n)])) == {label}:
                return label
        return majority

    def certified(self, x: Tensor, label: int) -> bool:
        """Whether no patch of that size, wherever it is, can change the answer from the true label: every pair of
        masks must already give it (their theorem 1)."""
        n = len(self.windows(x.shape[-1]))
        singles = self.predict(x, [(i, i) for i in range(n)])
        return set(singles) == {label} and set(self.predict(x, list(combinations(range(n), 2)))) == {label}
