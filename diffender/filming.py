"""Table 7: patches printed, filmed from five configurations, judged frame by frame.

Two patches: the digital one, made as it would be for a file (the paper's), and one made over frames of all poses, the
stronger adversary. A frame counts only if the classifier reads the clean scene right under the same pose and jitter.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffender.attacks import AdvP
from diffender.cli import pick
from diffender.data import Batch
from diffender.defenses.jpeg import JPEG
from diffender.evaluation import proportion
from diffender.experiment import Experiment
from diffender.models.classifiers import Classifier
from diffender.noise import generator
from diffender.paper import QUOTED
from diffender.physical import CONFIGURATIONS, Filmed, Pose, draw_frame, photograph, print_patch
from diffender.pipeline import Purified, Undefended
from diffender.report import save_png, table
from diffender.runs import append_records, command, read_records, write_json, write_text

JITTERS = {"smoke": 1, "laptop": 2, "paper": 8}  # frames of each pose
PATCHES = {"digital": "made for the file", "eot": "made over poses"}


class Shot(NamedTuple):
    """A frame as its file would be: 8 bits, after JPEG."""

    clean: Tensor  # (1, 3, S, S) in [0, 1]
    attacked: Tensor


def shots(
    x: Tensor, image: Tensor, mask: Tensor, image_id: str, seed: int, poses: tuple[Pose, ...], jitters: int
) -> Iterator[Shot]:
    """The frames of one scene x (1, 3, S, S) and of the same with a patch, of each pose."""
    for pose in poses:
        for j in range(jitters):
            g = generator(seed, image_id, "frame", *pose, j)
            frame = draw_frame([pose], x.shape[-1], g)
            jpeg = JPEG(int(torch.randint(75, 96, (), generator=g)))
            scenes = (x, print_patch(image, mask, frame.ink.to(x)))
            yield Shot(*(jpeg(photograph(scene, x, frame)) for scene in scenes))


def film(e: Experiment, batch: Batch) -> None:
    """Attack and film each picture that is not done; a record each."""
    opts, classifier = e.opts, e.target.classifier
    digital = pick(AdvP, opts, iters=opts.iters_undefended, eot=1, restarts=1)
    over_poses = replace(digital, eot=max(opts.eot, 4))
    done = {r["id"] for r in read_records(e.folder)}
    for i, image_id in enumerate(tqdm(batch.ids, desc="filming", mininterval=1)):
        if image_id in done:
            continue
        x, y = batch.x[i : i + 1].to(e.device), batch.y[i : i + 1].to(e.device)
        noise = e.target.sample_noise([image_id], opts.seed, "verdict")
        record = {"id": image_id, "label": int(y), "frames": {}}
        made_by = {
            "digital": digital(Undefended(classifier), x, y, [image_id], opts.seed),
            "eot": over_poses(Filmed(classifier, x), x, y, [image_id], opts.seed),
        }
        for patch, made in made_by.items():
            for name, poses in CONFIGURATIONS.items():
                frames = list(shots(x, made.image, made.mask, image_id, opts.seed, poses, JITTERS[opts.preset]))
                purified = [e.target.defense(shot.attacked, noise) for shot in frames]
                record["frames"][f"{patch}/{name}"] = [
                    judge(classifier, shot, out.image, int(y)) for shot, out in zip(frames, purified, strict=True)
                ]
                file = "_".join([image_id.replace("/", "__"), patch, re.sub(r"\W", "", name)])
                save_example(frames[0], purified[0], e.folder / "frames" / f"{file}.png")
        append_records(e.own, [record])


def judge(classifier: Classifier, shot: Shot, purified: Tensor, label: int) -> dict:
    """Whether the clean frame, the attacked one and the attacked one purified are read right."""
    images = {"clean": shot.clean, "undefended": shot.attacked, "defended": purified}
    return {name: bool(classifier(image).argmax() == label) for name, image in images.items()}


def save_example(shot: Shot, out: Purified, path: Path) -> None:
    """Attacked frame, its mask, and what is left of it, side by side."""
    save_png(torch.cat([shot.attacked[0], out.mask[0].expand(3, -1, -1), out.image[0]], dim=2), path)


def run_film(e: Experiment, batch: Batch) -> str:
    """Films what is missing; the table as Markdown, also in the folder beside results.json."""
    film(e, batch)
    opts = e.opts
    records = [r for r in read_records(e.folder) if r["id"] in batch.ids]
    results, rows = {"command": command(), "images": len(records), "cells": {}}, []
    for patch, text in PATCHES.items():
        for who in ("undefended", "defended"):
            line = [f"{'DIFFender' if who == 'defended' else 'Undefended'}, patch {text}"]
            for name in CONFIGURATIONS:
                frames = [f for r in records for f in r["frames"][f"{patch}/{name}"] if f["clean"]]
                cell = proportion([float(f[who]) for f in frames]) if frames else None
                results["cells"][f"{patch}/{who}/{name}"] = cell
                line.append("" if cell is None else f"{100 * cell['accuracy']:.1f} ({cell['right']:.0f}/{cell['n']})")
            rows.append(line)
    quoted = QUOTED[7]["Inception-V3"]
    for key, label in (("undefended", "Undefended"), ("diffender", "DIFFender")):
        rows.append([f"quoted: {label}, Inception-V3, photographed", *(f"{n:.1f}" for n in quoted[key])])
    kept = mean(f["clean"] for r in records for frames in r["frames"].values() for f in frames)
    text = table(["accuracy in per cent of frames", *CONFIGURATIONS], rows) + (
        f"\n`{command()}`: {len(records)} pictures, {JITTERS[opts.preset]} frames of each pose; the {100 * kept:.0f} % "
        f"that the classifier reads right when clean count. A simulation on {opts.data} with {opts.classifier}, AdvP "
        f"of {opts.iters_undefended} steps on the classifier alone, seed {opts.seed}; the paper printed its patches.\n"
    )
    write_json(e.folder / "results.json", results)
    write_text(e.folder / "table.md", text)
    return text
