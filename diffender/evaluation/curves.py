"""Curves of the report: accuracy over the threshold and over the patch's size; resumed image by image.

Over theta the run's own patches are judged. They were made for the run's theta, so at every other one their attacker
assumed a wrong one. Over the size the patches of the run's first attack are made anew, on the classifier alone and
through the last of its gradients. One purification judges each, the first of the run's verdicts.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from diffender.attacks.expectation import Task
from diffender.attacks.patch import to_8bit
from diffender.evaluation.plan import AREAS
from diffender.evaluation.records import append_records, read_records
from diffender.evaluation.verdicts import Plan, craft, load_attacked, read
from diffender.localize import refine_mask
from diffender.noise import Noise, stack
from diffender.pipeline import DIFFender
from diffender.restore import composite
from diffender.utils.files import cut_tail

THRESHOLDS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)


def draw_curves(
    which: str, task: Task, plans: Sequence[Plan], records: Collection[dict], folder: Path, may_stop: Callable[[], None]
) -> dict[str, dict]:
    """`theta` or `all` of a run's images: {"theta": {"at": [...], "none": accuracies, ...}, "area": ...}.

    The task's victim is the defended classifier.
    """
    path = folder / f"curves-{which}.jsonl"
    cut_tail(path)
    done = read_records(folder, path.name)
    for i, record in enumerate(records):
        if record["id"] not in done:
            one = task.part(slice(i, i + 1))
            one = one._replace(x=to_8bit(one.x))
            found = {"id": record["id"], "theta": over_theta(one, record, folder)}
            if which == "all" and plans:
                found["area"] = over_area(one, plans[0])
            append_records(path, [found])
            done[record["id"]] = found
            may_stop()
    every = [done[i] for i in task.image_ids]
    axes = {"theta": THRESHOLDS, "area": AREAS}
    return {axis: {"at": at} | mean_columns([r[axis] for r in every if axis in r]) for axis, at in axes.items()}


def mean_columns(rows: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The mean of each column over the images that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [mean(v) for v in zip(*(row[name] for row in rows if name in row), strict=True)] for name in names}


def over_theta(task: Task, record: dict, folder: Path) -> dict[str, list[bool]]:
    """Whether the image and each patch made for it are classified correctly at every threshold. Localised once."""
    x, target = task.x, task.victim
    own = type(target.defense)
    if not issubclass(own, DIFFender) or (own.localize, own.forward) != (DIFFender.localize, DIFFender.forward):
        return {}  # its masks may come from elsewhere
    noise = task.noise("verdict")
    images = {"none": x}
    for variant in record["attacks"]:
        images[variant] = load_attacked(folder / "adv" / variant, [record["file"]])[0].to(x)
    found = {}
    for name, image in images.items():
        seen = read(target.classifier(at_thresholds(target.defense, image, noise))).label
        found[name] = [label == record["label"] for label in seen]
    return found


def at_thresholds(defense: DIFFender, x: Tensor, noise: Noise) -> Tensor:
    """The purified image (1, 3, S, S) at every threshold, side by side: (T, 3, S, S)."""
    cfg, z_score, n = defense.cfg, defense.localize(x, noise).z_score, len(THRESHOLDS)
    size = x.shape[-2:]
    masks = [refine_mask(z_score, size, replace(cfg, theta=theta)) for theta in THRESHOLDS]
    every, mask = x.expand(n, -1, -1, -1), torch.cat(masks)
    restored = defense.restore(every, mask, stack([noise] * n))
    return composite(every, restored, mask) if cfg.composite else restored.clamp(0, 1)


def over_area(task: Task, plan: Plan) -> dict[str, list[bool]]:
    """Whether the image is classified correctly under patches of every size, defended and undefended."""
    found: dict[str, list[bool]] = {}
    target, noise = task.victim, task.noise("verdict")
    undefended = task._replace(victim=target.undefended())
    for area in AREAS:
        last = dict(list(plan.adaptive.items())[-1:])
        sized = plan._replace(
            base=replace(plan.base, area=area),
            adaptive={kind: (replace(attack, area=area), victim) for kind, (attack, victim) in last.items()},
        )
        for kind, made, _ in craft(sized, undefended, lambda variant, done: None, {}):
            seen = {kind: target(made.image, noise)}
            if kind == "transfer":
                seen["undefended"] = target.bare(made.image)
            for name, logits in seen.items():
                found.setdefault(f"{plan.name}/{name}", []).append(bool((logits.argmax(dim=1) == task.y).all()))
    return found
