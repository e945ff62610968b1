"""The whole model in one go, within a limit of time: for one GPU, ten minutes and no network."""

import json
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from diffender.pretrain.options import Recipe
from diffender.pretrain.stages import train_unet, train_vae
from diffender.pretrain.trainer import ANEW, refuse_others, shared
from diffender.utils.errors import InputError
from diffender.utils.files import check_digest, load_tensors, new_file, read_header, refuse_damaged, whole, write_json

SHARES = {"vae": 0.3, "decoder": 0.2, "unet": 0.5}  # of --minutes
ON_A_GPU = {
    "vae": {"batch": 64, "crop": 128, "lr": 1e-3, "ema": 0.999},
    "decoder": {"batch": 16, "crop": 224, "lr": 5e-4, "ema": 0.999},
    "unet": {"batch": 256, "lr": 1e-3, "ema": 0.999, "locate": 1.0, "hiding": 4},
}
ON_A_CPU = {  # to rehearse: the smallest sizes
    "vae": {"batch": 4, "crop": 64},
    "decoder": {"batch": 1, "crop": 224},
    "unet": {"batch": 4, "reuse": 2, "locate": 1.0, "hiding": 1},
}
LAST = 30  # seconds kept for the files at the end


def train_all(recipe: Recipe) -> None:
    """Each stage with its share of --minutes; a stage that an earlier run ended is not done again.

    The working files lie in a folder beside --out, which gets only what is to be carried away: the model in parts, the
    logs of the losses and the images.
    """
    deadline = time.monotonic() + 60 * recipe.minutes - LAST
    out = recipe.out.resolve()
    work = out.with_name(f"{out.name}-work")
    work.mkdir(parents=True, exist_ok=True)
    left = dict(SHARES)
    usual = ON_A_GPU if recipe.device.type == "cuda" else ON_A_CPU
    for stage in SHARES:
        done = work / f"{stage}.done"
        given = replace(recipe, **usual[stage] | recipe.sizes | {"stage": stage, "out": work, "steps": 10**7})
        if done.is_file():
            with refuse_damaged(done, ANEW):
                refuse_others(work, json.loads(done.read_text("utf-8")), given)
        else:
            minutes = max(0.05, (deadline - time.monotonic()) / 60 * left[stage] / sum(left.values()))
            minutes += spent(work / f"{stage}.ckpt") / 60
            given = replace(given, minutes=minutes)
            if stage == "unet":
                train_unet(given, lambda: carry(work, out, recipe.parts))
            else:
                train_vae(given)
            write_json(done, shared(given))
        del left[stage]
        carry(work, out, recipe.parts)
    print(f"everything is in {recipe.out}")


def spent(checkpoint: Path) -> float:
    """The seconds that a stage has trained before."""
    if not checkpoint.is_file():
        return 0.0
    with refuse_damaged(checkpoint, ANEW):
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["seconds"]  # reads no tensor


def carry(work: Path, out: Path, megabytes: float) -> None:
    """Copy the model, in parts, the logs and the images from the working folder."""
    model = work / "tiny.safetensors"
    if model.is_file():
        content, size = model.read_bytes(), int(megabytes * 1e6)
        parts = [content[i : i + size] for i in range(0, len(content), size)]
        with ExitStack() as stack:  # all are renamed in the end, so that a kill seldom leaves parts of two models
            for i, part in enumerate(parts):
                stack.enter_context(whole(out / f"tiny.safetensors.{i}")).write_bytes(part)
        for old in parts_in(out)[len(parts) :]:
            old.unlink()
    for file in [*work.glob("*.jsonl"), *(f for f in work.glob("*.png") if "-loss" not in f.name)]:
        with whole(out / file.name) as partial:
            partial.write_bytes(file.read_bytes())


def parts_in(folder: Path) -> list[Path]:
    """The parts of a model in their order, without what a kill left half-written."""
    found = (p for p in folder.glob("tiny.safetensors.*") if re.fullmatch(r"\.\d+", p.suffix))
    return sorted((p for p in found if p.stem == "tiny.safetensors"), key=lambda p: int(p.suffix[1:]))


def join(folder: Path, out: Path) -> None:
    """The parts in a folder as the one file `out`."""
    parts = parts_in(folder)
    if not parts:
        raise InputError(f"no parts of a model in {folder}; give the folder that `all` wrote")
    names = [f"tiny.safetensors.{i}" for i in range(len(parts))]
    if gone := [name for name, part in zip(names, parts, strict=True) if name != part.name]:
        raise InputError(f"{folder} has {parts[-1].name} but no {gone[0]}; copy all parts of the model there")
    with whole(new_file(out)) as partial:
        partial.write_bytes(b"".join(part.read_bytes() for part in parts))
        try:
            check_digest(partial, load_tensors(partial), read_header(partial))
        except InputError as e:
            told = f"the {len(parts)} parts in {folder} make no whole model: one is damaged, or the last are missing"
            raise InputError(f"{told}; copy all of them there again") from e
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB of {len(parts)} parts")
