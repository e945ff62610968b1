"""The tables of a run: counts with Wilson intervals, masks, checks, as Markdown; accuracies as csv and LaTeX too."""

from __future__ import annotations

from collections.abc import Sequence

from diffender.evaluation.metrics import bounded, counted, percent
from diffender.utils.formats import as_csv, table
from diffender.utils.provenance import shortened


def accuracies(results: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the main table: accuracy in per cent with counts and Wilson 95 % intervals."""
    proven = any("certified" in r for r in results["rows"])
    head = (
        "attack",
        "gradient",
        results.get("undefended", "undefended"),
        f"{results['defense']}, single",
        "average",
        f"worst of {results['verdicts']}",
        f"majority of {results['votes']}",
        "p",
        *(["certified"] if proven else []),
    )
    rows = [
        (
            r["attack"],
            r["gradient"],
            counted(r["undefended"]),
            counted(r["single"]),
            *(bounded(r[column]) for column in ("average", "worst", "majority")),
            f"{r['mcnemar']:.2g}" if "mcnemar" in r else "",
            *([bounded(r["certified"]) if "certified" in r else ""] if proven else []),
        )
        for r in results["rows"]
    ]
    return head, rows


def markdown(results: dict) -> str:
    """The tables of a run: accuracy, masks, checks, and how it came about."""
    head, rows = accuracies(results)
    rows = [tuple(f"**{c}**" if c else "" for c in r) if r[0].startswith("strongest") else r for r in rows]
    parts = [table(head, rows)]
    if results["masks"]:
        scores = {"recall": "recall", "precision": "precision", "iou": "IoU", "auc": "AUC of the map"}
        scores = {c: title for c, title in scores.items() if all(c in m for m in results["masks"].values())}
        head = ("masks, means over the images", "patched", *scores.values(), "passes", "seconds an image")
        rows = [
            (name, percent(m["area"]), *(f"{m[c]:.3f}" for c in scores), f"{m['queries']:.0f}", f"{m['seconds']:.1f}")
            for name, m in results["masks"].items()
        ]
        parts.append(table(head, rows))
    if results["masked_clean"] is not None:
        parts.append(f"Masked share of clean images: {percent(results['masked_clean'])}.\n")
    if results.get("trust"):
        parts.append(trust_table(results["trust"]))
    parts.append(
        f"`{results['command']}`: {results['rows'][0]['single']['n']} images, {results['setting']}, seed "
        f"{results['seed']}, {cost(results)}.\n"
    )
    return "\n".join(parts)


def cost(results: dict) -> str:
    """What the run took, and where. Energy, where the machine tells it, is the whole machine's while it attacked."""
    energy = f", {results['watt_hours']:.1f} Wh" if "watt_hours" in results else ""
    took = f"{results['seconds']:.0f} s{energy} and {results['unet_evaluations']} UNet evaluations"
    if "forecast" in results:
        took += f" (attacks and verdicts {results['seconds_attacked']:.0f} s, forecast {results['forecast']:.0f} s)"
    return f"{took} on {results['machine']}, {results['date']}{shortened(results.get('commits', []))}"


def trust_table(checks: Sequence[dict]) -> str:
    """One line a check; a failed one is red."""
    signs = {True: "🟢 pass", False: "🔴 **FAIL**", None: "shown"}
    rows = [(c["name"], c["figure"], c["wanted"], signs[c["passed"]]) for c in checks]
    return table(("can the evaluation be trusted?", "figure", "wanted", ""), rows)


def csv_table(results: dict) -> str:
    """Every accuracy of a run, one a line."""
    numbers = ("right", "n", "accuracy", "low", "high")
    rows = [
        (r["attack"], r["gradient"], verdict, *(round(p[k], 4) for k in numbers))
        for r in results["rows"]
        for verdict, p in r.items()
        if isinstance(p, dict)
    ]
    return as_csv(("attack", "gradient", "verdict", *numbers), rows)
