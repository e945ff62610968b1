"""Charts for documents: accuracy over what the attacker knows of the defence, and losses over an attack's steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from diffender.evaluation.metrics import proportion, whiskers
from diffender.evaluation.options import OURS
from diffender.evaluation.records import read_config, read_finished, read_records
from diffender.evaluation.verdicts import by_kind, by_variant, strongest_of
from diffender.utils.errors import InputError
from diffender.utils.images import save_figure

STAGES = {  # what the attacker knows, and the gradients that he takes besides those of the stages before
    "nothing\n(patch of the\nclassifier)": ("transfer",),
    "that there\nis a defence\n(BPDA)": ("bpda",),
    "its mask\n(straight\nthrough)": ("bpda-mask",),
    "all of it\n(exact\ngradient)": ("auto", "surrogate", "full", "full+loc"),
    "how to hide\nfrom it\n(evade)": ("evade",),
}
WITHIN = ("fnc",)  # defences within the classifier: they change no image, so bpda, too, is their own gradient
CONTROLS = dict.fromkeys(("resize", "vae"), {"color": "0.7", "linestyle": ":"})
STYLES = CONTROLS | {  # of lines by their defences; the others have colours
    "hardened": {"color": "black", "linestyle": "--", "linewidth": 2.5},
    "diffender": {"color": "black", "linewidth": 2.5},
}


def known(records: Sequence[dict], within: bool = False) -> dict[int, dict]:
    """The share of first purifications that are right at each stage, of each image under its strongest AdvP patch so
    far; a stage whose gradients the run does not have is left out.

    `within`: a defence of WITHIN, for which BPDA is no stage of its own.
    """
    mine, seen, found = by_kind(by_variant(records), "advp"), [], {}
    for stage, kinds in enumerate(STAGES.values()):
        new = [mine[kind] for kind in kinds if kind in mine]
        seen += new
        if new and not (within and "bpda" in kinds):
            found[stage] = proportion([v.single for v in strongest_of(seen, [r["id"] for r in records])])
    return found


def draw_knowledge(folders: Sequence[Path], path: Path) -> None:
    """One line for each run, by its defence, with Wilson's 95 % intervals. What budget and images are not the first
    run's is named. Raises InputError for a run without AdvP."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    budgets = []
    for i, folder in enumerate(folders):
        config, done = read_config(folder), (folder / "results.json").is_file()
        defense = config.get("defense", "")
        name = defense.partition(":")[0]
        records = read_finished(folder)[1] if done else [*read_records(folder).values()]
        points = known(records, name in WITHIN) if all("attacks" in r for r in records) else {}
        if not points or "iters" not in config:
            raise InputError(f"{folder} holds no evaluation under advp; the chart is of that attack alone")
        budgets.append(f",\n{config['iters']} steps, EOT {config.get('eot')}, {len(records)} images")
        title, style = OURS.get(defense, defense), {"linewidth": 1} | STYLES.get(name, {})
        if budgets[i] != budgets[0]:
            title, style = title + budgets[i], style | {"linestyle": "-."}
        x = [stage + 0.02 * (i - len(folders) / 2) for stage in points]  # side by side, where they coincide
        axis.errorbar(x, *whiskers([*points.values()]), **style, marker="o", label=title, capsize=2, elinewidth=0.7)
    axis.set(ylabel="right under AdvP, %", ylim=(-3, 103), xlabel="what the attacker knows")
    axis.set_xticks(range(len(STAGES)), list(STAGES), fontsize=8)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def draw_steps(folder: Path, path: Path) -> None:
    """The loss of each attack on the defence over its steps: the mean over the images, and the middle half of them.

    Each kind of gradient lowers a loss of its own, so only the shapes can be compared. Raises InputError for a run
    whose records have no such losses.
    """
    records = [*read_records(folder).values()]
    variants = records[0].get("attacks", {}) if records else {}
    every = {v: [r["attacks"].get(v, {}).get("loss") for r in records] for v in variants}
    curves = {v: np.array(rows) for v, rows in every.items() if all(rows) and not v.endswith("/transfer")}
    if not curves:
        raise InputError(f"{folder} holds no losses of an attack on the defence; give the folder of an attacked run")
    figure = Figure(figsize=(2.2 * len(curves), 2.3), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        steps = np.linspace(0, 100, rows.shape[1])
        axis.fill_between(steps, *np.quantile(rows, (0.25, 0.75), axis=0), color="0.85")
        axis.plot(steps, rows.mean(axis=0), color="black")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("steps done, %", fontsize=8)
    figure.supylabel("attacker's loss", fontsize=8)
    save_figure(figure, path)
