"""A chart of Table 1: accuracy under attackers who know nothing of a defence, that it is there, or all of it."""

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from diffender.evaluation.metrics import proportion
from diffender.evaluation.records import read_finished
from diffender.evaluation.verdicts import by_kind, by_variant, strongest_of
from diffender.utils.images import save_figure

STAGES = {  # what the attacker knows, and the gradients that this allows; None: every one that the run has
    "nothing\n(patch of the classifier)": ("transfer",),
    "that there is a defence\n(BPDA)": ("transfer", "bpda"),
    "the defence\n(its strongest gradient)": None,
}
STYLES = {  # of lines whose titles begin so, by the first that fits; the others have colours
    "control": {"color": "0.7", "linestyle": ":"},
    "DIFFender, hardened": {"color": "black", "linestyle": "--", "linewidth": 2.5},
    "DIFFender": {"color": "black", "linewidth": 2.5},
}


def known(records: Sequence[dict], within: bool = False) -> dict[int, dict]:
    """The share of first purifications that are right at each stage, of each image under its strongest AdvP patch so
    far; a stage whose gradient the run does not have is left out.

    `within`: a defence within the classifier, whose bpda is its own gradient and so no stage of its own.
    """
    mine, found = by_kind(by_variant(records), "advp"), {}
    for stage, kinds in enumerate(STAGES.values()):
        if kinds is None or (kinds[-1] in mine and not (within and "bpda" in kinds)):
            seen = [mine[kind] for kind in kinds or mine if kind in mine]
            found[stage] = proportion([v.single for v in strongest_of(seen, [r["id"] for r in records])])
    return found


def draw_knowledge(runs: dict[str, Path], path: Path, within: Collection[str] = ()) -> None:
    """One line for each run, by its title, with Wilson's 95 % intervals. `within` are titles of defences that lie
    within the classifier, as FNC does."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for i, (title, folder) in enumerate(runs.items()):
        points = known(read_finished(folder)[1], title in within)
        y = [100 * p["accuracy"] for p in points.values()]
        around = [[v - 100 * p["low"] for v, p in zip(y, points.values(), strict=True)]]
        around += [[100 * p["high"] - v for v, p in zip(y, points.values(), strict=True)]]
        style = next((style for start, style in STYLES.items() if title.startswith(start)), {})
        x = [stage + 0.02 * (i - len(runs) / 2) for stage in points]  # side by side, where they coincide
        axis.errorbar(x, y, around, **{"linewidth": 1} | style, marker="o", label=title, capsize=2, elinewidth=0.7)
    axis.set(ylabel="right under AdvP, %", ylim=(-3, 103), xlabel="what the attacker knows")
    axis.set_xticks(range(len(STAGES)), list(STAGES))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
