"""Patches made, saved, loaded again and judged. Knows victims and attacks by what they can do, not by name."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffender.attacks.attack import Attack
from diffender.attacks.expectation import Attacked, Task, Victim
from diffender.attacks.patch import to_8bit
from diffender.evaluation.metrics import map_auc, mask_scores, mcnemar, proportion
from diffender.pipeline import Defended, Purified
from diffender.utils.errors import InputError
from diffender.utils.files import short
from diffender.utils.images import load_png, save_png, save_stages, stretch


class Plan(NamedTuple):
    """One attack in all its variants."""

    name: str
    base: Attack  # on the classifier alone: the patches of `transfer`
    adaptive: dict[str, tuple[Attack, Victim]]  # on the defence, starting from the base's state, by kind of gradient


class Reading(NamedTuple):
    """What a classifier sees: classes, and how sure it is of them."""

    label: list[int]
    confidence: list[float]  # its softmax, in [0, 1]


def read(logits: Tensor) -> Reading:
    """Classes and confidences from logits (B, K)."""
    confidence, label = logits.detach().softmax(dim=1).max(dim=1)
    return Reading(label.tolist(), [round(c, 4) for c in confidence.tolist()])


class Verdict(NamedTuple):
    """Whether an image is classified correctly after purifications with fresh noise. Each field lies in [0, 1]."""

    single: float  # by the first purification
    average: float  # share of all purifications
    worst: float  # by every purification: an attacker may submit again and again
    majority: float  # by the most frequent class among the first nine, or fewer: see `voters`


def voters(n: int) -> int:
    """How many of n purifications take part in the majority vote: 9, or the largest odd number of them."""
    return min(9, n - (n + 1) % 2)


def verdict(seen: Sequence[int], label: int) -> Verdict:
    """The verdict from the classes seen in N purifications of one image.

    The majority is that of the first `voters`; of classes that have equally many, it is the one that was seen first.
    """
    votes = seen[: voters(len(seen))]
    right = [c == label for c in seen]
    top = Counter(votes).most_common(1)[0][0]
    return Verdict(float(right[0]), mean(right), float(all(right)), float(top == label))


class Judge(NamedTuple):
    """The defended classifier that judges images, and how often it does."""

    target: Defended
    verdicts: int = 10  # purifications of each image
    batch: int = 1  # how many of them side by side; changes results by rounding


def purifications(
    judge: Judge, x: Tensor, ids: Sequence[str], seed: int
) -> tuple[Purified, list[list[int]], list[float]]:
    """With noise that no attack has seen: the first purified images, for each image the classes seen in all of its
    purifications, and the confidence in the first. Clean images and all attacks get the same noise, so that pairs
    compare like with like."""
    target, n = judge.target, judge.verdicts
    noises = [target.sample_noise(ids, seed, "verdict", k) for k in range(n)]
    looks = target.looks(x, noises if noises[0] is not None else noises[:1], judge.batch)  # deterministic: once
    first, logits = next(looks)
    readings = [read(logits), *(read(logits) for _, logits in looks)]
    seen = [list(labels) * (n // len(readings)) for labels in zip(*(r.label for r in readings), strict=True)]
    return first, seen, readings[0].confidence


def evaluate_batch(
    task: Task,
    judge: Judge,
    plans: Sequence[Plan],
    folder: Path,
    on_work: Callable[[str, float], None] = lambda variant, done: None,
    bases: dict | None = None,
) -> list[dict]:
    """Attack and judge the images of a task, whose victim is the undefended classifier: one record each.

    Every attacked image is saved in `folder` as an 8-bit PNG beside its mask, and judged as loaded from there.
    `on_work` hears what share of the work on `clean` or on a variant of an attack is done. `bases` keeps the patches
    made on the undefended classifier, for other defences of it.
    """
    task = task._replace(x=to_8bit(task.x))
    x, y, ids, undefended = task.x, task.y, task.image_ids, task.victim
    kept = {} if bases is None else bases
    clean, seen, sure = purifications(judge, x, ids, task.seed)
    names = file_names(ids)
    areas = [None] * len(ids) if clean.mask is None else clean.mask.mean(dim=(1, 2, 3)).tolist()
    columns = {"id": ids, "file": names, "label": y.tolist()} | answers(read(undefended(x, None)), seen, sure)
    columns["masked"] = areas
    records: list[dict] = [
        {name: column[b] for name, column in columns.items()} | {"attacks": {}} for b in range(len(ids))
    ]
    save_stages(folder / "images", names, {"clean": x} | stages(clean))
    on_work("clean", 1)
    for plan in plans:
        for kind, made, seconds in craft(plan, task, on_work, kept):
            variant = f"{plan.name}/{kind}"
            image, mask = through_files(folder / "adv" / plan.name / kind, names, made)
            out, seen, sure = purifications(judge, image, ids, task.seed)
            columns = answers(read(undefended(image, None)), seen, sure) | {
                "masks": mask_columns(out, mask),
                "area": mask.mean(dim=(1, 2, 3)).tolist(),
                "queries": made.queries.tolist(),
                "loss": [thin(row.tolist()) for row in made.trace],
                "fooled": [thin(row.tolist()) for row in made.fooled],
            }
            if hasattr(judge.target.defense, "certified"):
                columns["certified"] = judge.target.defense.certified(x, y.tolist(), mask)
            for b, record in enumerate(records):
                record["attacks"][variant] = {name: column[b] for name, column in columns.items()}
                record["attacks"][variant]["seconds"] = seconds / len(ids)
            save_stages(folder / "images" / variant, names, {"attacked": image} | stages(out))
            on_work(variant, 1)
    return records


def stages(out: Purified) -> dict[str, Tensor]:
    """What there is to see of purified images, by name, each (B, C, H, W) in [0, 1]."""
    found = {"mask": out.mask, "restored": out.image}
    if out.heatmap is not None:
        found["heatmap"] = stretch(out.heatmap, out.image.shape[-2:])
    return {stage: images for stage, images in found.items() if images is not None}


def answers(alone: Reading, seen: list[list[int]], sure: list[float]) -> dict[str, list]:
    """Columns of the records: what is seen without the defence and in each purification, and how sure of the first."""
    confidence = [list(pair) for pair in zip(alone.confidence, sure, strict=True)]
    return {"undefended": alone.label, "defended": seen, "confidence": confidence}


def craft(plan: Plan, task: Task, on_work: Callable, bases: dict) -> Iterator[tuple[str, Attacked, float]]:
    """(kind, attacked, seconds): the patches of the undefended classifier, then each adaptive variant's."""
    key = plan.base, tuple(task.image_ids)
    if key not in bases:
        started = time.monotonic()
        base = plan.base(task, callback=partial(on_work, f"{plan.name}/transfer"))
        bases[key] = base, time.monotonic() - started
    base, seconds = bases[key]
    yield "transfer", base, seconds
    for kind, (attack, victim) in plan.adaptive.items():
        started = time.monotonic()
        made = attack(task._replace(victim=victim), init=base.state, callback=partial(on_work, f"{plan.name}/{kind}"))
        yield kind, made, time.monotonic() - started


def through_files(folder: Path, names: Sequence[str], made: Attacked) -> tuple[Tensor, Tensor]:
    """Attacked images and masks as they come back from 8-bit files."""
    for b, name in enumerate(names):
        save_png(made.image[b], folder / f"{name}.png")
        save_png(made.mask[b], folder / f"{name}_mask.png")
    image, mask = load_attacked(folder, names)
    return image.to(made.image), mask.to(made.mask)


def file_names(ids: Sequence[str]) -> list[str]:
    """Names of files for images, of which ids in folders have slashes, or are long."""
    return [short(i.replace("/", "__")) for i in ids]


def load_attacked(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The attacked images (B, 3, S, S) and masks (B, 1, S, S) that a run saved under these names. Raises InputError
    where one is gone."""
    if gone := [name for name in names if not (folder / f"{name}.png").is_file()]:
        raise InputError(
            f"{folder / gone[0]}.png is gone, and checks, curves and controls need it; run anew under "
            "another --name, or leave them out by --trust off --curves off"
        )
    image = torch.stack([load_png(folder / f"{name}.png") for name in names])
    mask = torch.stack([load_png(folder / f"{name}_mask.png")[:1] for name in names])
    return image, mask


def thin(trace: Sequence[float], points: int = 20) -> list[float]:
    """A curve thinned to at most so many values, with the first and the last among them."""
    if len(trace) <= points:
        return [round(v, 4) for v in trace]
    return [round(trace[i * (len(trace) - 1) // (points - 1)], 4) for i in range(points)]


def mask_columns(out: Purified, truth: Tensor) -> list[dict[str, float]]:
    """How well each image's mask and difference map fit the true mask (B, 1, H, W), as far as there are any."""
    scores = {} if out.mask is None else mask_scores(out.mask, truth)._asdict()
    if out.heatmap is not None:
        scores["auc"] = map_auc(out.heatmap, truth)
    return [{name: score[b].item() for name, score in scores.items()} for b in range(len(truth))]


def by_variant(records: Sequence[dict]) -> dict[str, dict[str, Verdict]]:
    """Verdicts by attack/gradient and image."""
    found: dict[str, dict[str, Verdict]] = {}
    for r in records:
        for variant, a in r["attacks"].items():
            found.setdefault(variant, {})[r["id"]] = verdict(a["defended"], r["label"])
    return found


def by_kind(found: Mapping[str, Any], attack: str) -> dict[str, Any]:
    """What is found by attack/gradient, of one attack: by gradient."""
    prefix = f"{attack}/"
    return {variant.removeprefix(prefix): value for variant, value in found.items() if variant.startswith(prefix)}


def strongest_of(judged: Collection[dict[str, Verdict]], ids: Sequence[str]) -> list[Verdict]:
    """The verdict on each image under the strongest of its patches: the least of those of all variants, one by one."""
    each = [[verdicts[i] for verdicts in judged] for i in ids]  # of each image, under each of its patches
    return [Verdict(*map(min, zip(*of_image, strict=True))) for of_image in each]


def row(name: str, kind: str, undefended: Sequence[bool], verdicts: Collection[Verdict]) -> dict:
    columns = {column: proportion([getattr(v, column) for v in verdicts]) for column in Verdict._fields}
    return {"attack": name, "gradient": kind, "undefended": proportion(list(map(float, undefended)))} | columns


def summarize(records: Sequence[dict]) -> dict:
    """Rows of the table: clean, every variant, and the strongest on each image, of each attack and of all; and mean
    mask scores.

    The strongest takes the minimum over variants image by image, not the lowest row. For each verdict, an image counts
    as right only if it is right under every patch made for it. For the average verdict the lowest average of its
    patches counts.
    """
    clean = [verdict(r["defended"], r["label"]) for r in records]
    rows = [row("none", "", [r["undefended"] == r["label"] for r in records], clean)]
    judged = by_variant(records)
    names = list(dict.fromkeys(variant.split("/")[0] for variant in judged))
    groups = {tuple(variant.split("/")): [variant] for variant in judged}  # of each row but the first
    if len(names) > 1:
        groups |= {(f"strongest {n} on each image", ""): [f"{n}/{kind}" for kind in by_kind(judged, n)] for n in names}
    if judged:
        groups["strongest on each image", ""] = list(judged)
    for (name, kind), variants in groups.items():
        patches = [[r["attacks"][variant] for variant in variants] for r in records]  # of each image
        alone = [all(a["undefended"] == r["label"] for a in mine) for r, mine in zip(records, patches, strict=True)]
        strongest = strongest_of([judged[v] for v in variants], [r["id"] for r in records])
        rows.append(row(name, kind, alone, strongest))
        if kind not in ("", "transfer"):
            base, found = judged[f"{name}/transfer"], judged[f"{name}/{kind}"]
            rows[-1]["mcnemar"] = mcnemar([(base[i].single, v.single) for i, v in found.items()])
        if all("certified" in a for mine in patches for a in mine):
            rows[-1]["certified"] = proportion([float(all(a["certified"] for a in mine)) for mine in patches])
    masked = [r["masked"] for r in records if r["masked"] is not None]
    means = {variant: mask_means([r["attacks"][variant] for r in records]) for variant in judged}
    return {"rows": rows, "masks": means, "masked_clean": mean(masked) if masked else None}


def mask_means(attacks: Sequence[dict]) -> dict[str, float]:
    """Means over the images of one variant: scores of the masks, patched share, queries and seconds."""
    scores = {name: mean(a["masks"][name] for a in attacks) for name in attacks[0]["masks"]}
    return scores | {name: mean(a[name] for a in attacks) for name in ("area", "queries", "seconds")}
