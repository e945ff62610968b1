"""Verdicts on a batch of pictures, and their summary. Knows victims and attacks by what they can do, not by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from torch import Tensor

from diffender.attacks.patch import Attacked, Victim, to_8bit
from diffender.metrics import MaskScores, map_auc, mask_scores, wilson
from diffender.pipeline import Defended, Purified
from diffender.report import save_stages, stretch

Attack = Callable[..., Attacked]
MASK_COLUMNS = (*MaskScores._fields, "auc")


def verdict(target: Defended, x: Tensor, ids: Sequence[str], seed: int, purpose: str) -> tuple[Purified, list[int]]:
    """One purification with noise that no attack has seen, and the classes that the classifier then sees."""
    out = target.defense(x, target.sample_noise(ids, seed, f"verdict {purpose}"))
    return out, target.classifier(out.image).argmax(dim=1).tolist()


def evaluate_batch(
    undefended: Victim,
    target: Defended,
    attack_undefended: Attack | None,
    attack_target: Attack | None,
    ids: Sequence[str],
    x: Tensor,
    y: Tensor,
    seed: int,
    pictures: Path,
    on_step: Callable[[int], None] = lambda pictures: None,
) -> list[dict]:
    """Attack and judge pictures x (B, 3, S, S) in [0, 1] with labels y (B,): one record each, pictures saved.

    `on_step` hears the number of pictures after each step of the attack on the undefended classifier.
    """
    x = to_8bit(x)
    labels = y.tolist()
    clean, clean_seen = verdict(target, x, ids, seed, "clean")
    records = [
        {"id": i, "file": i.replace("/", "__"), "label": label, "undefended_clean": seen, "defended_clean": defended,
         "clean_area": area}
        for i, label, seen, defended, area in zip(
            ids, labels, undefended(x, None).argmax(dim=1).tolist(), clean_seen,
            clean.mask.mean(dim=(1, 2, 3)).tolist(), strict=True,
        )
    ]  # fmt: skip
    last = {"clean": x, "heatmap": clean.heatmap, "mask": clean.mask, "restored": clean.image}
    if attack_target is not None:
        base = attack_undefended(undefended, x, y, ids, seed, callback=lambda _step: on_step(len(ids)))
        adaptive = attack_target(target, x, y, ids, seed, init=base.patch)
        transfer_out, transfer_seen = verdict(target, base.image, ids, seed, "transfer")
        out, adaptive_seen = verdict(target, adaptive.image, ids, seed, "adaptive")
        columns = {
            "undefended_base": undefended(base.image, None).argmax(dim=1).tolist(),
            "undefended_attacked": undefended(adaptive.image, None).argmax(dim=1).tolist(),
            "defended_transfer": transfer_seen,
            "defended_attacked": adaptive_seen,
            "masks_transfer": mask_columns(transfer_out, base.mask),
            "masks_attacked": mask_columns(out, adaptive.mask),
        }
        for b, record in enumerate(records):
            record |= {name: column[b] for name, column in columns.items()}
        last = {
            "clean": x,
            "attacked": adaptive.image,
            "heatmap": out.heatmap,
            "mask": out.mask,
            "restored": out.image,
        }
    for b, record in enumerate(records):
        stages = {stage: image[b].detach().cpu() for stage, image in last.items()}
        stages["heatmap"] = stretch(stages["heatmap"], x.shape[-2:])
        save_stages(pictures, record["file"], stages)
    return records


def mask_columns(out: Purified, truth: Tensor) -> list[dict[str, float]]:
    """How well each picture's mask and difference map fit the true mask (B, 1, H, W)."""
    scores = (*mask_scores(out.mask, truth), map_auc(out.heatmap, truth))
    rows = zip(*(score.tolist() for score in scores), strict=True)
    return [dict(zip(MASK_COLUMNS, row, strict=True)) for row in rows]


def proportion(flags: Sequence[bool]) -> dict:
    """Counts, share and Wilson interval of a list of outcomes."""
    low, high = wilson(sum(flags), len(flags))
    return {
        "right": sum(flags),
        "n": len(flags),
        "accuracy": sum(flags) / len(flags),
        "low": low,
        "high": high,
    }


def summarize(records: Sequence[dict], defense: str, adaptive: str) -> dict:
    """Rows of the table and mean mask scores. `defense` and `adaptive` name the defence and its attack's settings."""

    def right(*keys: str) -> dict:
        return proportion([all(r[key] == r["label"] for key in keys) for r in records])

    rows = [{"name": "undefended", "clean": right("undefended_clean")}]
    rows.append({"name": defense, "clean": right("defended_clean")})
    if "defended_attacked" not in records[0]:
        return {"rows": rows}
    rows[0]["robust"] = right("undefended_base")
    rows[1]["robust"] = right("defended_transfer", "defended_attacked")
    rows[1]["name"] += ", strongest attack on each picture"
    rows += [
        {
            "name": f"{defense}, patches made on the undefended classifier",
            "robust": right("defended_transfer"),
        },
        {"name": f"{defense}, adaptive: {adaptive}", "robust": right("defended_attacked")},
    ]
    masks = {
        which: {name: mean([r[f"masks_{which}"][name] for r in records]) for name in MASK_COLUMNS}
        for which in ("transfer", "attacked")
    }
    return {"rows": rows, "masks": masks, "clean_area": mean([r["clean_area"] for r in records])}
