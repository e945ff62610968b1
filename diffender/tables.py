"""The paper's Tables 1 to 5, a command each: python evaluate.py --table 1 [--preset smoke|laptop|paper].

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

from diffender.evaluation import VERDICTS, proportion, verdict
from diffender.experiment import Experiment, finish, pictures, prepare, work
from diffender.paper import COLUMNS, QUOTED
from diffender.plans import Options, describe, fill
from diffender.report import table
from diffender.runs import open_model, pick_device, read_records, write_text

NAMES = {
    "undefended": "Undefended", "resize": "control: resize round trip", "vae": "control: VAE round trip",
    "jpeg": "JPEG (Dziugaite et al., 2016)", "smoothing": "Spatial smoothing (Xu et al., 2017)",
    "dw": "DW (Hayes, 2018), our reconstruction", "lgs": "LGS (Naseer et al., 2019)", "fnc": "FNC (Yu et al., 2021)",
    "diffpure": "DiffPure (Nie et al., 2022), on our model", "jedi": "Jedi (Tarchoun et al., 2023)",
    "diffender": "DIFFender", "NR": "DIFFender (NR)", "EP": "DIFFender (EP)", "MP": "DIFFender (MP)",
    "without mask": "without L_CE", "without l1": "without L_1", "without feature": "without d",
}  # fmt: skip
TRANSFER_TO = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")  # prompts are tuned on the first


class Row(NamedTuple):
    key: str  # of NAMES and QUOTED
    changes: dict  # of the options


class Cell(NamedTuple):
    """Four verdicts over n pictures, as `proportion` gives them, under the strongest patch for each."""

    verdicts: dict[str, dict]


def rows_of(number: int, opts: Options) -> list[Row]:
    ours = Row("diffender", {})
    if number == 1:
        others = ("resize", "vae", "jpeg", "smoothing", "dw", "lgs", "fnc", "diffpure", "jedi")
        return [*(Row(name, {"defense": name, "grad": None}) for name in others), ours]
    if number == 2:
        terms = ("mask", "feature", "l1")
        tuned = [Row(f"without {term}", {"prompts": retuned(opts, term)}) for term in terms]
        return [*tuned, Row("diffender", {"prompts": retuned(opts, "none")})]
    if number == 3:
        return [Row("NR", {"restore": False}), ours]
    if number == 4:
        return [Row("EP", {"prompt": "empty"}), Row("MP", {"prompt": "manual"}), ours]
    return [ours]


def retuned(opts: Options, without: str) -> str:
    """Prompts tuned with one term of Eq. 7 left out, by train.py; made where they are not there yet."""
    path = Path("runs") / f"table2-{opts.preset}" / f"prompts-without-{without}.safetensors"
    if not path.is_file():
        few = ["--shots", "2", "--held-out", "1", "--rounds", "1", "--iters", "5"] if opts.preset == "smoke" else []
        train = Path(sys.argv[0]).with_name("train.py")
        subprocess.run([sys.executable, train, "--without", without, "--out", path, "--data", opts.tuning_data,
                        "--classifier", opts.classifier, *few], check=True)  # fmt: skip
    return str(path)


def run_table(number: int, opts: Options) -> str:
    """Run what is missing of a table; returns it as Markdown and writes it to runs/, with csv and LaTeX."""
    classifiers = TRANSFER_TO if number == 5 else (opts.classifier,)
    blocks = [run_block(number, opts, classifier) for classifier in classifiers]
    folder = Path("runs") / f"table{number}-{opts.preset}"
    lines = [line for block in blocks for line in block]
    text = markdown(number, lines) + f"\n{notes(number, opts, lines)}"
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", as_csv(lines))
    write_text(folder / "table.tex", as_latex(number, lines))
    return text


class Line(NamedTuple):
    classifier: str
    key: str
    cells: dict[str, Cell]  # by column


def run_block(number: int, opts: Options, classifier: str) -> list[Line]:
    opts = replace(opts, classifier=classifier, attack="all", trust="off")
    rows = rows_of(number, opts)
    model = open_model(opts, pick_device(opts.device))  # once for all
    experiments = []
    for row in rows:
        name = f"table{number}-{opts.preset}/{classifier}/{row.key.replace(' ', '-')}"
        experiments.append(prepare(fill(replace(opts, **row.changes, name=name)), model))
    batch = pictures(experiments[-1].opts, experiments[-1].target)
    work(experiments, batch)
    lines = []
    for row, experiment in zip(rows, experiments, strict=True):
        finish(experiment, batch)
        lines.append(Line(classifier, row.key, cells(experiment, batch.ids)))
    bare = undefended(experiments[-1], batch.ids)
    return lines if number in (2, 3, 4) else [Line(classifier, "undefended", bare), *lines]


def cells(experiment: Experiment, ids: Sequence[str]) -> dict[str, Cell]:
    records = [r for r in read_records(experiment.folder) if r["id"] in ids]
    found = {"clean": [[verdict(r["defended"], r["label"])] for r in records]}
    for name in COLUMNS[1:]:
        found[name] = [
            [verdict(a["defended"], r["label"]) for variant, a in r["attacks"].items() if variant.startswith(name)]
            for r in records
        ]
    return {
        name: Cell({v: proportion([min(getattr(one, v) for one in some) for some in verdicts]) for v in VERDICTS})
        for name, verdicts in found.items()
    }


def undefended(experiment: Experiment, ids: Sequence[str]) -> dict[str, Cell]:
    """The classifier alone, under the patches made on it."""
    records = [r for r in read_records(experiment.folder) if r["id"] in ids]
    right = {"clean": [float(r["undefended"] == r["label"]) for r in records]}
    for name in COLUMNS[1:]:
        right[name] = [float(r["attacks"][f"{name}/transfer"]["undefended"] == r["label"]) for r in records]
    return {name: Cell({v: proportion(values) for v in VERDICTS}) for name, values in right.items()}


def markdown(number: int, lines: Sequence[Line]) -> str:
    """Ours in per cent (right of n), the best defence of a column bold; the paper's beside them."""
    quoted = QUOTED[number]
    head = ["classifier", "defence", *COLUMNS, *(f"{c}, quoted ({' / '.join(quoted)})" for c in COLUMNS)]
    out = []
    for line in lines:
        numbers = [model.get(line.key) for model in quoted.values()]
        beside = [" / ".join("" if n is None else f"{n[i]:.1f}" for n in numbers) for i in range(len(COLUMNS))]
        mine = []
        for column in COLUMNS:
            p = line.cells[column].verdicts["single"]
            text = f"{100 * p['accuracy']:.1f} ({p['right']:.0f}/{p['n']})"
            mine.append(f"**{text}**" if p["accuracy"] == best(lines, line.classifier, column) else text)
        out.append([line.classifier, NAMES[line.key], *mine, *(b.strip(" /") for b in beside)])
    return table(head, out)


def best(lines: Sequence[Line], classifier: str, column: str) -> float:
    compared = [
        line for line in lines
        if line.classifier == classifier and line.key != "undefended" and "control" not in NAMES[line.key]
    ]  # fmt: skip
    return max(line.cells[column].verdicts["single"]["accuracy"] for line in compared)


def notes(number: int, opts: Options, lines: Sequence[Line]) -> str:
    n = lines[0].cells["clean"].verdicts["single"]["n"]
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return (
        f"`{command}`: accuracy in per cent, first purification, under the strongest of the patches made for each "
        f"picture. {n} pictures, {describe(fill(replace(opts, attack='all')))}, seed {opts.seed}. Departures from the "
        f"paper: classifier {', '.join(dict.fromkeys(line.classifier for line in lines))} (theirs in the heads of the "
        f"quoted columns), data {opts.data} (theirs 512 of ImageNet), diffusion model "
        f"{opts.weights or 'the embedded one'} (theirs Stable Diffusion), and the budget above (theirs 100 steps). "
        f"Baselines take `bpda` and `auto` gradients, DIFFender {fill(opts).grad}; the paper BPDA.\n"
    )


def as_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["classifier", "defence", "attack", "verdict", "right", "n", "accuracy", "low", "high"])
    for line in lines:
        for column, cell in line.cells.items():
            for name, p in cell.verdicts.items():
                numbers = (p["right"], p["n"], *(round(p[k], 4) for k in ("accuracy", "low", "high")))
                writer.writerow([line.classifier, line.key, column, name, *numbers])
    return text.getvalue()


def as_latex(number: int, lines: Sequence[Line]) -> str:
    """Ours alone, for \\usepackage{booktabs}."""
    out = [r"\begin{tabular}{ll" + "r" * len(COLUMNS) + "}", r"\toprule"]
    out += ["classifier & defence & " + " & ".join(COLUMNS) + r" \\", r"\midrule"]
    for line in lines:
        values = [f"{100 * line.cells[c].verdicts['single']['accuracy']:.1f}" for c in COLUMNS]
        out.append(" & ".join([line.classifier, NAMES[line.key], *values]).replace("_", r"\_") + r" \\")
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", ""])
