"""The paper's tables, a command each: python evaluate.py --table 1 [--preset smoke|laptop|paper].

A table is a list of experiments on the same pictures, each in a folder of its own, so it resumes. A cell is the share
of right answers under the strongest of the patches made for each picture, first purification; the csv has all verdicts.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from diffender.errors import InputError
from diffender.evaluation import Verdict, proportion, strongest, verdict
from diffender.experiment import Experiment, finish, pictures, prepare, resolved, work
from diffender.faces import RECOGNIZERS
from diffender.files import read_header
from diffender.filming import run_film
from diffender.paper import COLUMNS, QUOTED
from diffender.plans import Options, describe, fill
from diffender.report import table
from diffender.runs import command, open_model, open_run, pick_device, read_records, write_text

NAMES = {
    "undefended": "Undefended", "resize": "control: resize round trip", "vae": "control: VAE round trip",
    "jpeg": "JPEG (Dziugaite et al., 2016)", "smoothing": "Spatial smoothing (Xu et al., 2017)",
    "dw": "DW (Hayes, 2018), our reconstruction", "lgs": "LGS (Naseer et al., 2019)", "fnc": "FNC (Yu et al., 2021)",
    "diffpure": "DiffPure (Nie et al., 2022), on our model", "jedi": "Jedi (Tarchoun et al., 2023)",
    "diffender": "DIFFender", "NR": "DIFFender (NR)", "EP": "DIFFender (EP)", "MP": "DIFFender (MP)",
    "without mask": "without L_CE", "without l1": "without L_1", "without feature": "without d",
}  # fmt: skip
NO_DEFENSE = ("undefended", "resize", "vae")  # rows to compare with
TRANSFER_TO = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")  # prompts are tuned on the first


class Row(NamedTuple):
    key: str  # of NAMES and QUOTED
    changes: dict  # of the options


def rows_of(number: int, opts: Options) -> list[Row]:
    ours = Row("diffender", {})
    if number == 1:
        others = ("resize", "vae", "jpeg", "smoothing", "dw", "lgs", "fnc", "diffpure", "jedi")
        return [*(Row(name, {"defense": name, "grad": None}) for name in others), ours]
    if number == 2:
        terms = ("mask", "feature", "l1")
        tuned = [Row(f"without {term}", {"prompts": retuned(opts, term)}) for term in terms]
        return [*tuned, Row("diffender", {"prompts": retuned(opts, "none")})]
    prompts = [Row("EP", {"prompt": "empty"}), Row("MP", {"prompt": "manual"})]
    if number == 6:
        others = ("jpeg", "smoothing", "dw", "lgs", "fnc", "jedi")
        return [*(Row(name, {"defense": name, "grad": None}) for name in others), *prompts, ours]
    if number == 3:
        return [Row("NR", {"restore": False}), ours]
    if number == 4:
        return [*prompts, ours]
    return [ours]


def retuned(opts: Options, without: str) -> str:
    """Prompts tuned with one term of Eq. 7 left out, by train.py; made where they are not there yet."""
    path = Path("runs") / f"table2-{opts.preset}" / opts.classifier / f"prompts-without-{without}.safetensors"
    if not path.is_file() or read_header(path).get("data") != opts.tuning_data:
        few = ["--shots", "2", "--held-out", "1", "--rounds", "1", "--iters", "5"] if opts.preset == "smoke" else []
        train = Path(sys.argv[0]).with_name("train.py")
        tuned = subprocess.run([sys.executable, train, "--without", without, "--out", path, "--data", opts.tuning_data,
                                "--classifier", opts.classifier, *few])  # fmt: skip
        if tuned.returncode != 0:
            raise InputError(f"Table 2 needs prompts tuned without {without}; train.py failed, as said above")
    return str(path)


def columns(number: int) -> tuple[str, ...]:
    return ("clean", "gdpa", "rhde") if number == 6 else COLUMNS


class Line(NamedTuple):
    classifier: str
    key: str  # of NAMES
    verdicts: dict[str, list[Verdict]]  # by column: of each picture, under the strongest of its patches


def run_table(number: int, opts: Options) -> str:
    """Run what is missing of a table; returns it as Markdown and writes it to runs/, with csv and LaTeX."""
    folder = Path("runs") / f"table{number}-{opts.preset}"
    if number == 7:
        own = fill(replace(opts, attack="none", trust="off", name=f"{folder.name}/{opts.classifier}"))
        experiment = prepare(own)
        batch = pictures(own, experiment.target)
        open_run(experiment.folder, resolved(own), experiment.own)
        return run_film(experiment, batch)
    if number == 6 and opts.classifier not in RECOGNIZERS:
        raise InputError(
            f"--table 6 is of faces; give --classifier {' or '.join(RECOGNIZERS)} with its --classifier-weights, and "
            "--data with a folder for each person"
        )
    parts = [(c, opts.fold) for c in TRANSFER_TO] if number == 5 else [(opts.classifier, opts.fold)]
    if number == 6:
        parts = [(opts.classifier, fold) for fold in range(opts.folds)]
    blocks = [run_block(number, opts, classifier, fold) for classifier, fold in parts]
    lines = pool([line for block in blocks for line in block])
    text = markdown(number, lines) + f"\n{notes(number, opts, lines)}"
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", as_csv(lines))
    write_text(folder / "table.tex", as_latex(number, lines))
    return text


def run_block(number: int, opts: Options, classifier: str, fold: int) -> list[Line]:
    """The lines of one classifier and one choice of probes."""
    attack = ",".join(columns(number)[1:])
    opts = replace(opts, classifier=classifier, attack=attack, trust="off", fold=fold)
    name = f"table{number}-{opts.preset}/{classifier}" + f"-{fold}" * (fold > 0)
    lines = run_rows(rows_of(number, opts), opts, name)
    return lines[1:] if number in (2, 3, 4) else lines


def run_rows(rows: Sequence[Row], opts: Options, name: str) -> list[Line]:
    """Lines of the undefended classifier and of each row, on the same pictures; experiments live in runs/<name>/."""
    model = open_model(opts, pick_device(opts.device))  # once for all
    experiments = [
        prepare(fill(replace(opts, **row.changes, name=f"{name}/{row.key.replace(' ', '-')}")), model) for row in rows
    ]
    batch = pictures(experiments[-1].opts, experiments[-1].target)
    work(experiments, batch)
    for experiment in experiments:
        finish(experiment, batch)
    lines = [Line(opts.classifier, row.key, by_column(e, batch.ids)) for row, e in zip(rows, experiments, strict=True)]
    return [Line(opts.classifier, "undefended", undefended(experiments[-1], batch.ids)), *lines]


def by_column(experiment: Experiment, ids: Sequence[str]) -> dict[str, list[Verdict]]:
    """Of each picture, verdict by verdict, under the strongest of the patches that each attack made for it."""
    records = [r for r in read_records(experiment.folder) if r["id"] in ids]
    found = {"clean": [verdict(r["defended"], r["label"]) for r in records]}
    for name in (plan.name for plan in experiment.plans):
        found[name] = []
        for r in records:
            some = [verdict(a["defended"], r["label"]) for v, a in r["attacks"].items() if v.split("/")[0] == name]
            found[name].append(strongest(some))
    return found


def undefended(experiment: Experiment, ids: Sequence[str]) -> dict[str, list[Verdict]]:
    """The classifier alone, under the patches made on it."""
    records = [r for r in read_records(experiment.folder) if r["id"] in ids]
    seen = {"clean": [r["undefended"] for r in records]}
    for name in (plan.name for plan in experiment.plans):
        seen[name] = [r["attacks"][f"{name}/transfer"]["undefended"] for r in records]
    labels = [r["label"] for r in records]
    return {name: [verdict([c], y) for c, y in zip(classes, labels, strict=True)] for name, classes in seen.items()}


def pool(lines: Sequence[Line]) -> list[Line]:
    """Lines of one classifier and one defence as one: the folds of faces."""
    pooled = {}
    for line in lines:
        known = pooled.setdefault(line[:2], {})
        for column, verdicts in line.verdicts.items():
            known[column] = known.get(column, []) + verdicts
    return [Line(*key, verdicts) for key, verdicts in pooled.items()]


def share(line: Line, column: str, name: str = "single") -> dict:
    return proportion([getattr(v, name) for v in line.verdicts[column]])


def markdown(number: int, lines: Sequence[Line]) -> str:
    """Ours in per cent (right of n), the best defence of a column bold; the paper's beside them."""
    quoted, shown = QUOTED[number], columns(number)
    out = []
    for line in lines:
        theirs = [model[line.key] for model in quoted.values() if line.key in model]
        beside = [" / ".join(f"{numbers[i]:.1f}" for numbers in theirs) for i in range(len(shown))]
        ours = []
        for column in shown:
            p = share(line, column)
            text = f"{100 * p['accuracy']:.1f} ({p['right']:.0f}/{p['n']})"
            first = line.key not in NO_DEFENSE and p["accuracy"] == best(lines, line.classifier, column)
            ours.append(f"**{text}**" if first else text)
        out.append([line.classifier, NAMES[line.key], *ours, *beside])
    return table(["classifier", "defence", *shown, *(f"{c}, quoted ({' / '.join(quoted)})" for c in shown)], out)


def best(lines: Sequence[Line], classifier: str, column: str) -> float:
    defences = [n for n in lines if n.classifier == classifier and n.key not in NO_DEFENSE]
    return max(share(line, column)["accuracy"] for line in defences)


def notes(number: int, opts: Options, lines: Sequence[Line]) -> str:
    """What was run, and how it departs from the paper."""
    full = fill(replace(opts, attack="all"))
    return (
        f"`{command()}`: accuracy in per cent, first purification, under the strongest of the patches made for each "
        f"picture. {len(lines[0].verdicts['clean'])} pictures, {describe(full)}, seed {opts.seed}. Departures from the "
        f"paper: classifier {', '.join(dict.fromkeys(line.classifier for line in lines))} (theirs in the heads of the "
        f"quoted columns), data {opts.data} (theirs 512 pictures of {'LFW' if number == 6 else 'ImageNet'}), diffusion "
        f"model {opts.weights or 'the embedded one'} (theirs Stable Diffusion), and this budget (theirs 100 steps). "
        f"Baselines are attacked through `bpda` and `auto` gradients, DIFFender through {full.grad} (theirs BPDA).\n"
    )


def as_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["classifier", "defence", "attack", "verdict", "right", "n", "accuracy", "low", "high"])
    for line in lines:
        for column in line.verdicts:
            for name in Verdict._fields:
                p = share(line, column, name)
                numbers = (round(p[k], 4) for k in ("right", "n", "accuracy", "low", "high"))
                writer.writerow([line.classifier, line.key, column, name, *numbers])
    return text.getvalue()


def as_latex(number: int, lines: Sequence[Line]) -> str:
    """Ours alone, for \\usepackage{booktabs}."""
    shown = columns(number)
    out = [r"\begin{tabular}{ll" + "r" * len(shown) + "}", r"\toprule"]
    out += ["classifier & defence & " + " & ".join(shown) + r" \\", r"\midrule"]
    for line in lines:
        values = [f"{100 * share(line, c)['accuracy']:.1f}" for c in shown]
        out.append(" & ".join([line.classifier, NAMES[line.key], *values]).replace("_", r"\_") + r" \\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", ""])
