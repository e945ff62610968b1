"""Controls of Table 1: the true mask, and one of its shape elsewhere, closed by each fill.

Between them lies what localisation can bring, and between fills what restoration can. Under the true mask no pixel of
a patch is seen, so the patches made on the undefended classifier stand for all others at their places. Under a mask
elsewhere they are a lower bound of what an attacker can do.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffender.classifiers.dataset import Batch
from diffender.defenses.fill import FILLS
from diffender.evaluation.verdicts import Verdict, file_names, load_attacked, verdict
from diffender.noise import generator
from diffender.pipeline import Defended
from diffender.restore import composite

FILLED = (*FILLS, "diffusion")


class Control(NamedTuple):
    key: str  # "true grey", "random diffusion", ...
    verdicts: dict[str, list[Verdict]]  # by column


def controls(target: Defended, folder: Path, attacks: Sequence[str], batch: Batch, seed: int) -> Iterator[Control]:
    """Each kind of mask with each fill, on the attacked images of a run in `folder`; target is DIFFender."""
    x, ids = batch.x.to(target.classifier.mean), batch.ids
    attacked = {name: load_attacked(folder / "adv" / name / "transfer", file_names(ids)) for name in attacks}
    attacked = {name: (image.to(x), mask.to(x)) for name, (image, mask) in attacked.items()}
    first = next(iter(attacked.values()))[1]
    for whose in ("true", "random"):
        scenes = {"clean": (x, torch.zeros_like(first) if whose == "true" else elsewhere(first, ids, seed))}
        for name, (image, mask) in attacked.items():
            scenes[name] = (image, mask if whose == "true" else elsewhere(mask, ids, seed))
        for fill in FILLED:
            seen = {column: classes(target, fill, *scene, ids, seed) for column, scene in scenes.items()}
            yield Control(
                f"{whose} {fill}",
                {
                    column: [verdict([c], y) for c, y in zip(found, batch.y.tolist(), strict=True)]
                    for column, found in seen.items()
                },
            )


def elsewhere(mask: Tensor, ids: Sequence[str], seed: int) -> Tensor:
    """Each mask (1, S, S) moved within the image to a random place where it does not cover what it covered before; of
    a large one, to the place where it does least."""
    return torch.stack([moved(m, generator(seed, i, "random mask")) for m, i in zip(mask, ids, strict=True)])


def moved(mask: Tensor, g: torch.Generator, tries: int = 100) -> Tensor:
    """One mask (1, S, S) in another place, as `elsewhere` says."""
    rows, columns = (mask[0].any(dim=d).nonzero().flatten().tolist() for d in (1, 0))
    if not rows:
        return mask
    (top, low), (left, right), size = (rows[0], rows[-1]), (columns[0], columns[-1]), mask.shape[-1]
    best, least = mask, mask.sum()
    for _ in range(tries):
        y, x = (int(torch.randint(size - (end - start), (), generator=g)) for start, end in ((top, low), (left, right)))
        there = mask.roll((y - top, x - left), dims=(1, 2))
        if (both := (there * mask).sum()) < least:
            best, least = there, both
        if least == 0:
            break
    return best


def classes(target: Defended, fill: str, x: Tensor, mask: Tensor, ids: Sequence[str], seed: int) -> list[int]:
    """What the classifier sees in images (B, 3, S, S) whose mask is filled, one after the other."""
    found = []
    for i, image_id in enumerate(ids):
        image, hole = x[i : i + 1], mask[i : i + 1]
        if fill == "diffusion":
            noise = target.sample_noise([image_id], seed, "verdict")
            filled = composite(image, target.defense.restore(image, hole, noise), hole)
        else:
            filled = FILLS[fill](image, hole)
        found.append(int(target.classifier(filled).argmax()))
    return found
