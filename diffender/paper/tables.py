"""The paper's tables, a command each: python evaluate.py --table 1 [--preset smoke|laptop|paper].

A table is a list of experiments on the same images. Each lives in a folder of its own, named by its settings, so it
resumes, and tables share those that they have in common. A cell is the share of right answers under the strongest of
the patches made for each image, first purification; the csv has all verdicts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from diffender.classifiers.dataset import digest_of_all, list_photographs
from diffender.evaluation.metrics import counted, discordant, mcnemar, proportion
from diffender.evaluation.options import Options, kinds, with_preset
from diffender.evaluation.plan import describe, method_of
from diffender.evaluation.records import open_run, read_finished, read_records
from diffender.evaluation.run import Experiment, finish, load_images, made_in, prepare, resolved, work
from diffender.evaluation.verdicts import Verdict, by_kind, by_variant, strongest_of, verdict
from diffender.evaluation.workers import is_first, wait
from diffender.faces.identification import RECOGNIZERS
from diffender.factory import hashes_of, open_model, pick_device
from diffender.paper.controls import controls
from diffender.paper.filming import film, judge_photographs
from diffender.paper.quoted import COLUMNS, QUOTED
from diffender.report.chart import WITHIN, draw_knowledge
from diffender.report.folder import write_report
from diffender.report.page import table_page
from diffender.utils.errors import InputError, nearest
from diffender.utils.files import digest, short, write_text
from diffender.utils.formats import as_csv, as_latex, table
from diffender.utils.options import change, flagged
from diffender.utils.provenance import command, machine, shortened

NAMES = {
    "undefended": "Undefended", "resize": "control: resize round trip", "vae": "control: VAE round trip",
    "jpeg": "JPEG (Dziugaite et al., 2016)", "smoothing": "Spatial smoothing (Xu et al., 2017)",
    "dw": "DW (Hayes, 2018), our reconstruction", "lgs": "LGS (Naseer et al., 2019)", "fnc": "FNC (Yu et al., 2021)",
    "diffpure": "DiffPure (Nie et al., 2022), on our model", "jedi": "Jedi (Tarchoun et al., 2023)",
    "true grey": "control: true mask, grey", "true mean": "control: true mask, mean colour",
    "true harmonic": "control: true mask, harmonic", "true diffusion": "control: true mask, our model",
    "random grey": "control: random mask, grey", "random mean": "control: random mask, mean colour",
    "random harmonic": "control: random mask, harmonic", "random diffusion": "control: random mask, our model",
    "jedi-own": "Jedi, statistics of this size", "hardened": "DIFFender, hardened",
    "diffender": "DIFFender", "NR": "DIFFender (NR)", "EP": "DIFFender (EP)", "MP": "DIFFender (MP)",
    "without mask": "without L_CE", "without l1": "without L_1", "without feature": "without d",
}  # fmt: skip
BESIDE = {  # other readings of the same run, in lines of their own
    "bpda": ", attacked by transfer and bpda alone",  # the paper's gradient, where a run has others too
    "certified": ", certified at the patch's place",
}
# Flags of train.py for Table 2, by preset; others tune as it does by itself.
TUNING = {"smoke": "--shots 2 --held-out 1 --rounds 1 --iters 5", "laptop": "--rounds 20"}
VARIANTS: dict[str, dict] = {
    "diffender": {}, "hardened": {"defense": "hardened"}, "NR": {"restore": False}, "EP": {"prompt": "empty"},
    "MP": {"prompt": "manual"}, "jedi-own": {"defense": "jedi:stats=own", "grad": None},
}  # fmt: skip
BASELINES = ("jpeg", "smoothing", "dw", "lgs", "fnc")
ROWS = {  # of each table
    1: ("resize", "vae", *BASELINES, "diffpure", "jedi", "jedi-own", "hardened", "diffender"),
    2: ("without mask", "without feature", "without l1", "diffender"),
    3: ("NR", "diffender"),
    4: ("EP", "MP", "diffender"),
    5: ("diffender",),
    6: (*BASELINES, "jedi", "EP", "MP", "diffender"),
}
TRANSFER_TO = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")  # prompts are tuned on the first


Row = tuple[str, dict]  # a key of NAMES and QUOTED, and how the options change


def asked_rows(opts: Options) -> list[str]:
    """The rows that --rows names; none without it."""
    return [] if opts.rows is None else [name.strip() for name in opts.rows.split(",")]


def chosen_rows(number: int, opts: Options) -> list[Row]:
    """The rows of a table, or those of them that --rows names. Raises InputError for others."""
    keys = ROWS[number]
    wanted = asked_rows(opts) or keys
    if unknown := [name for name in wanted if name not in keys]:
        raise InputError(f"--rows {unknown[0]}: table {number} has {', '.join(keys)}{nearest(unknown[0], keys)}")
    return [(key, changes(number, key, opts)) for key in keys if key in wanted]


def changes(number: int, key: str, opts: Options) -> dict:
    """How a row's options differ from the table's. Tunes the prompts of Table 2, but not in a dry run."""
    if number == 2 and opts.dry_run:
        return {}  # the shipped prompts stand in for those that would be tuned
    if number == 2:
        return {"prompts": retuned(opts, "none" if key == "diffender" else key.removeprefix("without "))}
    return VARIANTS.get(key, {"defense": key, "grad": None})


def retuned(opts: Options, without: str) -> str:
    """Prompts tuned by train.py with one term of Eq. 7 left out; made where none with these settings are there."""
    target = opts.target
    given = {"data": opts.tuning_data, "classifier": target.classifier, "classifier_weights": target.classifier_weights}
    given |= vars(target.defense.model) | {"seed": opts.run.seed, "without": without}
    given |= {k: v for k, v in method_of(opts).items() if k in ("noise_ratio", "theta", "sampler", "guidance")}
    flags = [word for k, v in given.items() for word in flag(k, v)] + TUNING.get(opts.preset, "").split()
    told = {k: v for k, v in given.items() if k not in ("data", "micro_batch", "keep")}
    told |= {"sha256": hashes_of(target.defense.model, classifier=target.classifier_weights)}
    told |= {"photographs": digest_of_all(list_photographs(opts.tuning_data)), "budget": TUNING.get(opts.preset, "")}
    key = f"{target.classifier}-without-{without}-{digest({}, told)[:8]}"
    path = Path("runs") / "tables" / f"{key}.safetensors"
    if not path.is_file() and is_first():
        train = Path(sys.argv[0]).with_name("train.py")
        words = [sys.executable, train, "--out", path, "--device", opts.run.device, *flags]
        alone = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}  # other workers wait here
        if subprocess.run(words, env=alone).returncode != 0:
            raise InputError(f"Table 2 needs prompts tuned without {without}; train.py failed, as said above")
    wait()
    return str(path)


def flag(name: str, value: object) -> list[str]:
    """An option as words of a command line; none for None."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [flagged(name if value else f"no_{name}")]
    return [flagged(name), str(value)]


def columns(number: int) -> tuple[str, ...]:
    return ("clean", "gdpa", "rhde") if number == 6 else COLUMNS


class Line(NamedTuple):
    classifier: str
    key: str  # of NAMES
    verdicts: dict[str, list[Verdict]]  # by column: of each image, under the strongest of its patches
    run: Path | None = None  # the folder that they come from
    reading: str = ""  # of BESIDE, if it is not the usual one

    @property
    def title(self) -> str:
        return NAMES[self.key] + BESIDE.get(self.reading, "")


def run_table(number: int, opts: Options) -> str:
    """Run what is missing of a table; returns it as Markdown and writes it to runs/, with csv and LaTeX."""
    if number == 7:
        return run_table_7(opts)
    if number == 6 and opts.target.classifier not in RECOGNIZERS:
        raise InputError(
            f"--table 6 is of faces; give --classifier {' or '.join(RECOGNIZERS)} with its --classifier-weights, and "
            "--data with a folder for each person"
        )
    classifiers = TRANSFER_TO if number == 5 else [opts.target.classifier]
    folds = range(opts.folds) if number == 6 else [opts.target.fold]
    blocks = [run_block(number, opts, classifier, fold) for classifier in classifiers for fold in folds]
    if opts.dry_run and number == 2:
        print("the prompts would be tuned first, which is not counted, and the folders have other names")
    if not all(blocks):
        return ""
    every = [line for block in blocks for line in block]
    lines = pool(every)
    made = [r for run in {line.run for line in every if line.run} for r in read_finished(run)[1]]
    where = " and ".join(made_in(made, "machine")) or machine(pick_device(opts.run.device))
    took = f"{cost(made)} on {where}, {made_on(made)}"
    text = markdown(number, lines) + f"\n{notes(number, opts, lines, took)}{paired(number, lines)}"
    some = ["+".join(asked_rows(opts)).replace(" ", "-")] if opts.rows else []  # they do not replace the whole table
    folder = Path("runs") / short("-".join([f"table{number}", opts.preset, *some]))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", csv_table(lines))
    write_text(folder / "table.tex", latex_table(number, lines))
    if number == 1:
        draw_knowledge([line.run for line in every if line.run and not line.reading], folder / "knowledge.png")
    runs = {f"{line.classifier}, {NAMES[line.key]} ({line.run.name})": line.run for line in every if line.run}
    write_text(folder / "report.html", table_page(f"Table {number} of the paper", text, runs, folder))
    return text


def run_table_7(opts: Options) -> str:
    """Table 7, of filmed patches, as `run_table` has it: from the photographs that --frames names, or by simulation."""
    if opts.frames and not Path(opts.frames).expanduser().is_file():
        raise InputError(
            f"--frames {opts.frames}: no such file; give a csv of file, label, configuration and, if you like, clean"
        )
    own = with_preset(change(opts, attack="none", trust="off", data=opts.frames or opts.target.data, name="tables"))
    experiment = prepare(named(own, "photographed" if opts.frames else "filmed"))
    batch = None if opts.frames else load_images(own, experiment.target)
    open_run(experiment.folder, experiment.config, experiment.own)
    return film(experiment, batch) if batch else judge_photographs(experiment)


def run_block(number: int, opts: Options, classifier: str, fold: int) -> list[Line]:
    """The lines of one classifier and one choice of probes."""
    attack = ",".join(columns(number)[1:])
    opts = change(opts, classifier=classifier, attack=attack, trust="off", curves="off", fold=fold)
    lines = run_rows(chosen_rows(number, opts), opts, controlled=number == 1 and opts.rows is None)
    return lines[1:] if number in (2, 3, 4) else lines


def run_rows(rows: Sequence[Row], opts: Options, controlled: bool = False) -> list[Line]:
    """Lines of the undefended classifier, of controls if wanted, and of each row, on the images that DIFFender has;
    none while other shards are at work."""
    model = open_model(opts.target.defense.model, pick_device(opts.run.device))  # once for all
    experiments = [
        prepare(named(with_preset(change(opts, **changed, name="tables")), key), model) for key, changed in rows
    ]
    last = rows[-1][0]
    ours = experiments[-1] if last == "diffender" or last.startswith("without") else prepare(with_preset(opts), model)
    batch = load_images(ours.opts, ours.target)
    work(experiments, batch)
    if opts.dry_run:
        return []
    wait()
    if not is_first() or None in [finish(experiment, batch) for experiment in experiments]:
        return []
    for e in experiments:
        write_report(e.folder)
    classifier = opts.target.classifier
    made = [(key, e) for (key, _), e in zip(rows, experiments, strict=True)]
    lines = [Line(classifier, key, by_column(e, batch.ids), e.folder) for key, e in made]
    found = [readings(key, e, batch.ids) for key, e in made]
    shown = in_common(lines, found)
    others: list[Line] = []  # of other readings of the same runs
    for line, mine in zip(lines, found, strict=True):
        others += [line._replace(verdicts=v, reading=name) for name, v in mine.items() if name in shown]
    beside = [Line(classifier, "undefended", undefended(experiments[-1], batch.ids))]
    if controlled:
        names, folder = [plan.name for plan in ours.plans], experiments[-1].folder
        masked = controls(ours.target, folder, names, batch, opts.run.seed, opts.run.quiet)
        beside += [Line(classifier, key, verdicts) for key, verdicts in masked.items()]
    return [*beside, *lines, *others]


def named(opts: Options, key: str) -> Options:
    """The options with the name of the folder in runs/tables/ that belongs to these settings. What is not given counts
    for nothing, so that a new flag renames no folder."""
    given = {name: value for name, value in resolved(opts).items() if value is not None}
    return change(opts, name=f"tables/{opts.target.classifier}-{key.replace(' ', '-')}-{digest({}, given)[:8]}")


def readings(key: str, experiment: Experiment, ids: Sequence[str]) -> dict[str, dict[str, list[Verdict]]]:
    """What BESIDE names of the run of a row, by column."""
    stronger = set(kinds(experiment.opts)) - {"transfer", "bpda"}
    found = {}
    if stronger and "bpda" in kinds(experiment.opts):
        found["bpda"] = by_column(experiment, ids, stronger | {"bpda"} if key in WITHIN else stronger)
    if hasattr(experiment.target.defense, "certified"):
        records = read_records(experiment.folder)
        proven = {"clean": by_column(experiment, ids)["clean"]}
        for plan in experiment.plans:
            mine = [[a["certified"] for a in by_kind(records[i]["attacks"], plan.name).values()] for i in ids]
            proven[plan.name] = [Verdict(*[float(all(seen))] * len(Verdict._fields)) for seen in mine]
        found["certified"] = proven
    return found


def in_common(lines: Sequence[Line], found: Sequence[dict]) -> set[str]:
    """The readings to show: certificates, and those that every defence has. No defence may be first only because others
    lack a reading."""
    compared = [set(mine) for line, mine in zip(lines, found, strict=True) if is_defence(line)]
    return {"certified"}.union(set.intersection(*compared) if compared else ())


def by_column(experiment: Experiment, ids: Sequence[str], leave: Collection[str] = ()) -> dict[str, list[Verdict]]:
    """The verdicts by column: on each image under the strongest of the patches that each attack made for it, without
    those of the gradients in `leave`."""
    records = read_records(experiment.folder)
    found = {"clean": [verdict(records[i]["defended"], records[i]["label"]) for i in ids]}
    judged = by_variant([records[i] for i in ids])
    for plan in experiment.plans:
        mine = [of for kind, of in by_kind(judged, plan.name).items() if kind not in leave]
        found[plan.name] = strongest_of(mine, ids)
    return found


def undefended(experiment: Experiment, ids: Sequence[str]) -> dict[str, list[Verdict]]:
    """The classifier alone, under the patches made on it."""
    found = read_records(experiment.folder)
    records = [found[i] for i in ids]
    seen = {"clean": [r["undefended"] for r in records]}
    for name in (plan.name for plan in experiment.plans):
        seen[name] = [r["attacks"][f"{name}/transfer"]["undefended"] for r in records]
    labels = [r["label"] for r in records]
    return {name: [verdict([c], y) for c, y in zip(classes, labels, strict=True)] for name, classes in seen.items()}


def pool(lines: Sequence[Line]) -> list[Line]:
    """Lines of one classifier and one defence as one: the folds of faces."""
    pooled: dict[tuple[str, str, str], dict[str, list[Verdict]]] = {}
    for line in lines:
        known = pooled.setdefault((line.classifier, line.key, line.reading), {})
        for column, verdicts in line.verdicts.items():
            known[column] = known.get(column, []) + verdicts
    return [Line(classifier, key, found, reading=name) for (classifier, key, name), found in pooled.items()]


def cell(line: Line, column: str, name: str = "single") -> dict:
    return proportion([getattr(v, name) for v in line.verdicts[column]])


def markdown(number: int, lines: Sequence[Line]) -> str:
    """Ours in per cent (right of n; interval), the paper's beside them. The defence that is first in a column is bold
    where every other one differs from it (McNemar, p < 0.05); else all that are not told from it end in =. Classifiers
    have a column where there are several."""
    quoted, shown = QUOTED[number], columns(number)
    first = ("classifier",) if len({line.classifier for line in lines}) > 1 else ()
    out = []
    for line in lines:
        theirs = [model[line.key] for model in quoted.values() if line.key in model]
        beside = [" / ".join(f"{numbers[i]:.1f}" for numbers in theirs) for i in range(len(shown))]
        ours = []
        for column in shown:
            text = counted(cell(line, column), unit="")
            among = leaders(lines, line, column)
            ours.append(text if line.key not in among else f"**{text}**" if len(among) == 1 else f"{text} =")
        out.append([*(getattr(line, name) for name in first), line.title, *ours, *beside])
    return table([*first, "defence", *shown, *(f"{c}, quoted ({' / '.join(quoted)})" for c in shown)], out)


def is_defence(line: Line) -> bool:
    """Whether the line is a defence, not a row to compare with."""
    return line.key != "undefended" and not NAMES[line.key].startswith("control")


def leaders(lines: Sequence[Line], line: Line, column: str) -> list[str]:
    """Of lines of the same classifier and reading, the defence that is first in a column, and all that McNemar's test
    (p < 0.05) cannot tell from it; none where there is only one."""
    same = [n for n in lines if (n.classifier, n.reading) == (line.classifier, line.reading) and is_defence(n)]
    right = {n.key: [v.single for v in n.verdicts[column]] for n in same}
    if len(right) < 2:
        return []
    first = max(right.values(), key=sum)
    return [key for key, other in right.items() if mcnemar(list(zip(first, other, strict=True))) >= 0.05]


def paired(number: int, lines: Sequence[Line]) -> str:
    """Each defence beside DIFFender on the same images, attacked alike: how many images it alone reads right, how many
    DIFFender alone, and McNemar's p. In Table 5 the undefended classifier instead. Empty where there is nothing to
    compare."""
    shown, rows = columns(number), []
    for own, line in product([line for line in lines if line.key == "diffender"], lines):
        alike = line.key == "undefended" if number == 5 else is_defence(line) and line.reading == own.reading
        if line is own or line.classifier != own.classifier or not alike:
            continue
        row = []
        for column in shown:
            pairs = [(a.single, b.single) for a, b in zip(line.verdicts[column], own.verdicts[column], strict=True)]
            only, other = discordant(pairs)
            row.append(f"{only} : {other} (p = {mcnemar(pairs):.2g})")
        rows.append((f"{line.classifier}, {own.title}" if number == 5 else line.title, *row))
    if not rows:
        return ""
    what = "the classifier without a defence" if number == 5 else "the row's defence"
    told = f"Images that {what} alone reads right : that DIFFender alone reads right; p: McNemar, exact."
    head = "undefended, beside" if number == 5 else "beside DIFFender"
    return f"\n{table((head, *shown), rows)}\n{told}\n"


def made_on(made: Sequence[dict]) -> str:
    """The days on which the images of these records were attacked, and by what code; or that records do not say it."""
    if not all(r.get("date") for r in made):
        return f"finished on {time.strftime('%Y-%m-%d')}; not all records name their day and commit"
    return f"{' and '.join(made_in(made, 'date'))}{shortened(made_in(made, 'commit'))}"


def cost(made: Sequence[dict]) -> str:
    """What the runs of these records took."""
    hours, evaluations = sum(r["seconds"] for r in made) / 3600, sum(r["unet_evaluations"] for r in made)
    return f"{hours:.1f} h in all processes together and {evaluations:,.0f} UNet evaluations"


def notes(number: int, opts: Options, lines: Sequence[Line], took: str) -> str:
    """What was run, what it took, where and when, and how it departs from the paper."""
    full, target = with_preset(change(opts, attack="all")), opts.target
    names = ", ".join(dict.fromkeys(line.classifier for line in lines))
    baselines = "baselines are attacked through `bpda` and `auto` gradients, " if number in (1, 6) else ""
    missing = [NAMES[key] for key in ROWS[number] if key not in {line.key for line in lines}]
    left = f"Left out: {', '.join(missing)}. " if missing else ""
    dependent = "folds share people, so intervals and tests are too narrow; " if opts.folds > 1 else ""
    proven = any(line.reading == "certified" for line in lines)
    untargeted = ", no attack targeted" if full.patch.targeted is False else ""
    certified = "certified: no pixels at that place can change the answer; " if proven else ""
    return (
        f"`{command()}`: accuracy in per cent (right/all; Wilson's interval of 95 %), first purification, under the "
        "strongest of the patches made for each image; bold: first by every paired test (McNemar, exact, p < 0.05); =: "
        f"not told from the first by such a test; {dependent}{certified}{baselines}DIFFender through "
        f"{full.grad} (paper: BPDA). "
        f"{len(lines[0].verdicts['clean'])} images, {describe(full)}{untargeted}, seed {opts.run.seed}, {took}. "
        f"{left}Departures from the paper: classifier {names} (theirs in the heads of the quoted columns), data "
        f"{target.data} (theirs 512 images of {'LFW' if number == 6 else 'ImageNet'}), diffusion model "
        f"{target.defense.model.weights or 'the embedded one'} (theirs Stable Diffusion), and this budget (theirs 100 "
        "steps).\n"
    )


def csv_table(lines: Sequence[Line]) -> str:
    """Every share, one a line."""
    numbers = ("right", "n", "accuracy", "low", "high")
    rows = []
    for line in lines:
        for column in line.verdicts:
            for name in Verdict._fields:
                p = cell(line, column, name)
                told = (line.classifier, line.key, line.reading, column, name)
                rows.append((*told, *(round(p[k], 4) for k in numbers)))
    return as_csv(("classifier", "defence", "reading", "attack", "verdict", *numbers), rows)


def latex_table(number: int, lines: Sequence[Line]) -> str:
    """Our numbers alone."""
    shown = columns(number)
    rows = [(n.classifier, n.title, *(f"{100 * cell(n, c)['accuracy']:.1f}" for c in shown)) for n in lines]
    return as_latex(("classifier", "defence", *shown), rows)
