"""Table 7: patches printed, filmed from five configurations, judged frame by frame.

By simulation, two patches: the digital one, made as it would be for a file (the paper's), and one made over frames of
all poses, the stronger adversary. A frame counts only if the classifier reads the clean scene right under the same pose
and jitter. Or from photographs that were really taken: --frames names a csv of file, label, configuration and, where
there is one, clean: the file of the same scene without its patch.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from diffender.attacks import AdvP
from diffender.attacks.expectation import Attacked, Task
from diffender.classifiers.dataset import Batch, csv_items, digest_of, load_image, read_csv
from diffender.classifiers.imagenet import Classifier
from diffender.defenses.jpeg import JPEG
from diffender.evaluation.metrics import counted, discordant, mcnemar, proportion
from diffender.evaluation.plan import of_this_shard
from diffender.evaluation.records import append_records, read_records
from diffender.evaluation.run import Experiment, refuse_changed
from diffender.evaluation.verdicts import file_names
from diffender.evaluation.workers import is_first, wait
from diffender.noise import generator
from diffender.paper.physical import CONFIGURATIONS, Filmed, Pose, draw_frame, photograph, print_patch
from diffender.paper.quoted import QUOTED
from diffender.pipeline import Purified
from diffender.utils.errors import InputError
from diffender.utils.files import write_json, write_text
from diffender.utils.formats import table
from diffender.utils.images import save_png
from diffender.utils.progress import bar
from diffender.utils.provenance import command, machine

JITTERS = {"smoke": 1, "laptop": 2, "paper": 8, "strong": 8}  # frames of each pose
PATCHES = {"digital": "made for the file", "eot": "made over poses", "photographed": "as photographed"}


class Shot(NamedTuple):
    """A frame as its file would be: 8 bits, after JPEG."""

    clean: Tensor  # (1, 3, S, S) in [0, 1]
    attacked: Tensor


def shots(task: Task, made: Attacked, poses: tuple[Pose, ...], jitters: int) -> Iterator[Shot]:
    """The frames of a task's one scene, x (1, 3, S, S), and of the same with a patch, of each pose."""
    x = task.x
    for pose in poses:
        for j in range(jitters):
            g = generator(task.seed, *task.image_ids, "frame", *pose, j)
            frame = draw_frame([pose], x.shape[-1], g)
            jpeg = JPEG(int(torch.randint(75, 96, (), generator=g)))
            scenes = (x, print_patch(made.image, made.mask, frame.ink.to(x)))
            yield Shot(*(jpeg(photograph(scene, x, frame)) for scene in scenes))


def film(e: Experiment, batch: Batch) -> str:
    """Attack and film each image that is not done, a record each. Returns `write_table`'s text."""
    opts, classifier = e.opts, e.target.classifier
    digital = AdvP.from_flags(vars(opts.patch) | {"iters": opts.iters_undefended, "eot": 1, "restarts": 1})
    over_poses = replace(digital, eot=max(opts.eot, 4))
    done = read_records(e.folder)
    refuse_changed(e.folder, e.plans, done, batch)
    for i in bar(of_this_shard(opts, len(batch.ids)), "filming", opts.run.quiet):
        image_id = batch.ids[i]
        if image_id in done:
            continue
        x, y = batch.x[i : i + 1].to(e.device), batch.y[i : i + 1].to(e.device)
        task = Task(e.target.undefended(), x, y, [image_id], opts.run.seed)
        record = {"id": image_id, "hash": batch.hashes[i], "label": int(y), "frames": {}}
        made_by = {"digital": digital(task), "eot": over_poses(task._replace(victim=Filmed(classifier, x)))}
        for patch, made in made_by.items():
            for name, poses in CONFIGURATIONS.items():
                graded = []
                for k, shot in enumerate(shots(task, made, poses, JITTERS[opts.preset])):
                    noise = e.target.sample_noise([image_id], opts.run.seed, f"frame/{name}", k)
                    out = e.target.defense(shot.attacked, noise)
                    graded.append(grade(classifier, shot, out.image, int(y)))
                    if k == 0:
                        file = "_".join([*file_names([image_id]), patch, re.sub(r"\W", "", name)])
                        save_example(shot, out, e.folder / "frames" / f"{file}.png")
                record["frames"][f"{patch}/{name}"] = graded
        append_records(e.own, [record])
    return write_table(
        e,
        batch.ids,
        f"images, {JITTERS[opts.preset]} frames of each pose. A simulation on {opts.target.data} with "
        f"{opts.target.classifier}, AdvP of {opts.iters_undefended} steps on the classifier alone; the paper printed "
        "its patches.",
    )


def judge_photographs(e: Experiment) -> str:
    """The same from photographs: a record for each of the csv that is not done; the table has its configurations."""
    path = Path(e.opts.target.data).expanduser()
    items = csv_items(path, e.opts.target.classes)
    rows = read_csv(path, "file", "label", "configuration")
    done = read_records(e.folder)
    for i in bar(of_this_shard(e.opts, len(items)), "photographs", e.opts.run.quiet):
        item, row = items[i], rows[i]
        files = [path.parent / row["clean"] if row.get("clean") else item.path, item.path]
        told = {"hashes": [digest_of(file) for file in files], "label": item.label}
        told["configuration"] = row["configuration"]
        if item.id in done:
            if any(done[item.id].get(key) != value for key, value in told.items()):
                raise InputError(
                    f"{e.folder} holds what was seen of {item.id} with another file, label or configuration; delete "
                    "that folder"
                )
            continue
        shot = Shot(*(load_image(file, e.target.classifier.cfg)[None].to(e.device) for file in files))
        out = e.target.defense(shot.attacked, e.target.sample_noise([item.id], e.opts.run.seed, "verdict"))
        frame = grade(e.target.classifier, shot, out.image, item.label) | ({} if row.get("clean") else {"clean": True})
        save_example(shot, out, e.folder / "frames" / f"{file_names([item.id])[0]}.png")
        append_records(e.own, [{"id": item.id, **told, "frames": {f"photographed/{row['configuration']}": [frame]}}])
    return write_table(e, [i.id for i in items], f"photographs of {e.opts.target.data}, {e.opts.target.classifier}.")


def grade(classifier: Classifier, shot: Shot, purified: Tensor, label: int) -> dict:
    """Whether the clean frame, the attacked one and the attacked one purified are read right."""
    images = {"clean": shot.clean, "undefended": shot.attacked, "defended": purified}
    return {name: bool(classifier(image).argmax() == label) for name, image in images.items()}


def save_example(shot: Shot, out: Purified, path: Path) -> None:
    """Attacked frame, its mask, and what is left of it, side by side."""
    save_png(torch.cat([shot.attacked[0], out.mask[0].expand(3, -1, -1), out.image[0]], dim=2), path)


def write_table(e: Experiment, ids: Sequence[str], what: str) -> str:
    """Rows by patch, columns by configuration: of the frames that are read right when clean, how many still are. What
    is uncertain is so over images, since the frames of one are alike. Returns Markdown and writes it beside
    results.json; nothing while other shards are at work."""
    wait()
    records = [r for image_id, r in read_records(e.folder).items() if image_id in ids]
    if len(records) < len(ids) or not is_first():
        return ""
    names = [name for record in records for name in record["frames"]]
    patches, configurations = (list(dict.fromkeys(name.split("/", 1)[i] for name in names)) for i in (0, 1))
    results, rows = {"command": command(), "images": len(records), "cells": {}}, []
    for patch in patches:
        lines = [[f"{title}, patch {PATCHES[patch]}"] for title in ("Undefended", "DIFFender", "more frames right")]
        for configuration in configurations:
            frames = [[f for f in r["frames"].get(f"{patch}/{configuration}", ()) if f["clean"]] for r in records]
            frames = [of_image for of_image in frames if of_image]
            right = [[sum(f[who] for f in of_image) for of_image in frames] for who in ("undefended", "defended")]
            for who, line, counts in zip(("undefended", "defended"), lines, right, strict=False):
                told = {"right": sum(counts), "n": sum(map(len, frames))}  # the interval is of as many trials as images
                cell = proportion([told["right"] / told["n"]] * len(counts)) | told if counts else None
                results["cells"][f"{patch}/{who}/{configuration}"] = cell
                line.append(counted(cell, unit="") if cell else "")
            pairs = list(zip(*right, strict=True))
            only, other = discordant(pairs)
            lines[2].append(f"{only} : {other} (p = {mcnemar(pairs):.2g})" if pairs else "")
        rows += lines
    if configurations == list(CONFIGURATIONS):
        quoted = QUOTED[7]["Inception-V3"]
        for key, title in (("undefended", "Undefended"), ("diffender", "DIFFender")):
            rows.append([f"quoted: {title}, Inception-V3, photographed", *(f"{n:.1f}" for n in quoted[key])])
    kept = mean(f["clean"] for record in records for frames in record["frames"].values() for f in frames)
    text = table(["accuracy in per cent of frames", *configurations], rows) + (
        f"\n`{command()}`: {len(records)} {what} The {100 * kept:.0f} % of frames that the classifier reads right when "
        "clean count: right/all; Wilson's interval of 95 % for as many trials as images. More frames right: images of "
        "which the undefended classifier reads more frames : of which DIFFender does; p: McNemar's test of these. Seed "
        f"{e.opts.run.seed}, {machine(e.device)}, {time.strftime('%Y-%m-%d')}.\n"
    )
    write_json(e.folder / "results.json", results)
    write_text(e.folder / "table.md", text)
    return text
