"""Controls of Table 1: the true mask, and one of its shape elsewhere, with each fill.

Between them lies what localisation can bring, and between fills what restoration can. Under the true mask no pixel of
a patch is seen, so the patches made on the undefended classifier stand for all others at their places. Under a mask
elsewhere they are a lower bound of what an attacker can do.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffender.classifiers.dataset import Batch
from diffender.defenses.fill import FILLS
from diffender.evaluation.records import append_records, read_records
from diffender.evaluation.verdicts import Verdict, file_names, load_attacked, verdict
from diffender.noise import generator
from diffender.pipeline import Defended
from diffender.utils.files import cut_tail
from diffender.utils.progress import bar

FILLED = (*FILLS, "diffusion")


def controls(
    target: Defended, folder: Path, attacks: Sequence[str], batch: Batch, seed: int, quiet: bool = True
) -> dict[str, dict[str, list[Verdict]]]:
    """Each kind of mask with each fill ("true grey"), by column, on the attacked images of a run in `folder`; target is
    DIFFender.

    What the classifier sees goes to controls.jsonl there, a line an image, so that a second call goes on.
    """
    own = folder / "controls.jsonl"
    cut_tail(own)
    done = {image_id: r["seen"] for image_id, r in read_records(folder, own.name).items()}
    images = batch.x.to(target.classifier.mean).split(1)
    for x, image_id in zip(images, bar(batch.ids, "controls", quiet, " images"), strict=True):
        if image_id not in done:
            done[image_id] = look(target, folder, attacks, x, image_id, seed)
            append_records(own, [{"id": image_id, "seen": done[image_id]}])

    def verdicts(key: str, column: str) -> list[Verdict]:
        return [verdict([done[i][key][column]], y) for i, y in zip(batch.ids, batch.y.tolist(), strict=True)]

    keys = [f"{whose} {fill}" for whose in ("true", "random") for fill in FILLED]
    return {key: {column: verdicts(key, column) for column in ("clean", *attacks)} for key in keys}


def look(
    target: Defended, folder: Path, attacks: Sequence[str], x: Tensor, image_id: str, seed: int
) -> dict[str, dict[str, int]]:
    """The classes seen of one image x (1, 3, S, S) by kind of mask and fill ("true grey"), then clean or attack."""
    scenes = {name: load_attacked(folder / "adv" / name / "transfer", file_names([image_id])) for name in attacks}
    scenes = {name: (image.to(x), mask.to(x)) for name, (image, mask) in scenes.items()}
    first = next(iter(scenes.values()))[1]
    moved_away = {name: (image, elsewhere(mask, image_id, seed)) for name, (image, mask) in scenes.items()}
    holes = {
        "true": {"clean": (x, torch.zeros_like(first)), **scenes},
        "random": {"clean": (x, elsewhere(first, image_id, seed)), **moved_away},
    }
    return {
        f"{whose} {fill}": {name: seen(target, fill, *scene, image_id, seed) for name, scene in masked.items()}
        for whose, masked in holes.items()
        for fill in FILLED
    }


def elsewhere(mask: Tensor, image_id: str, seed: int) -> Tensor:
    """A mask (1, 1, S, S) moved within the image to a random place where it does not cover what it covered before; a
    large one, of a hundred places to that where it does least."""
    g = generator(seed, image_id, "random mask")
    rows, columns = (mask[0, 0].any(dim=d).nonzero().flatten().tolist() for d in (1, 0))
    if not rows:
        return mask
    top, left, size = rows[0], columns[0], mask.shape[-1]
    height, width = rows[-1] - top + 1, columns[-1] - left + 1
    best, least = mask, mask.sum()
    for _ in range(100):
        y, x = (int(torch.randint(size - side + 1, (), generator=g)) for side in (height, width))
        there = mask.roll((y - top, x - left), dims=(2, 3))
        if (both := (there * mask).sum()) < least:
            best, least = there, both
        if least == 0:
            break
    return best


def seen(target: Defended, fill: str, x: Tensor, mask: Tensor, image_id: str, seed: int) -> int:
    """What the classifier sees in an image (1, 3, S, S) whose mask is filled."""
    if not mask.any():
        filled = x
    elif fill == "diffusion":
        noise = target.sample_noise([image_id], seed, "verdict")
        filled = target.defense.repaint(x, mask, noise)
    else:
        filled = FILLS[fill](x, mask)
    return int(target.classifier(filled).argmax())
