"""A run's folder, its device, its machine. Results are appended picture by picture, so a killed run can go on."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from diffender.checkpoints import folder_files
from diffender.cli import ModelOptions, TargetOptions, pick
from diffender.data import Item, list_items
from diffender.diffusion import LatentDiffusion
from diffender.errors import InputError
from diffender.faces import RECOGNIZERS, identify, list_faces, split_faces
from diffender.files import one_line, place_for, sha256, write_json, write_text
from diffender.models.classifiers import Classifier, load_classifier
from diffender.pipeline import Defended, DIFFender, DIFFenderConfig
from diffender.prompts import SHIPPED, contexts_for
from diffender.report import read_records
from diffender.weights import EMBEDDED, RANDOM, load_model


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name} does not work here ({str(e).splitlines()[0]}); use auto or cpu") from e


def open_model(opts: ModelOptions, device: torch.device) -> LatentDiffusion:
    """The diffusion model that the flags ask for, on its device."""
    prediction = None if opts.prediction == "auto" else opts.prediction
    model = load_model(
        opts.model, opts.weights, pick_dtype(opts.dtype, device),
        ema=opts.ema, vae=opts.vae, locator=opts.locate_unet, prediction=prediction,
    )  # fmt: skip
    model.micro_batch, model.keep = opts.micro_batch, bool(opts.keep)
    return model.to(device)


def open_target(opts: TargetOptions, model: LatentDiffusion | None = None) -> Defended:
    """The classifier behind the defence that the flags ask for, on their device; `model` where it is open already."""
    device = pick_device(opts.device)
    classifier = open_classifier(opts).to(device)
    model = open_model(opts, device) if model is None else model
    contexts = contexts_for(opts.prompt, model, Path(opts.prompts or SHIPPED)).detach()
    return Defended(DIFFender(model, contexts, pick(DIFFenderConfig, opts)), classifier)


def open_classifier(opts: TargetOptions) -> Classifier:
    """The classifier that the flags ask for; a recogniser of faces takes its gallery from --data."""
    if opts.classifier in RECOGNIZERS:
        return identify(opts.classifier, opts.classifier_weights, split_faces(list_faces(opts.data), opts.fold))
    return load_classifier(opts.classifier, opts.classifier_weights)


def open_items(opts: TargetOptions) -> list[Item]:
    """The pictures that --data names; of faces, the probes."""
    if opts.classifier in RECOGNIZERS:
        return split_faces(list_faces(opts.data), opts.fold).probes
    return list_items(opts.data)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def command() -> str:
    """The command line of this process, as a user would type it again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return " ".join(["python", f"-m {spec.name}" if spec else Path(sys.argv[0]).name, *sys.argv[1:]])


def machine(device: torch.device) -> str:
    return f"{os.cpu_count()} {platform.machine()} CPU cores" if device.type == "cpu" else str(device)


def model_hashes(opts: ModelOptions) -> list[str]:
    """sha256 of every file that the model is made of."""
    paths = [Path(p) for p in (opts.weights or EMBEDDED / "tiny.safetensors", opts.vae, opts.locate_unet) if p]
    files = [f for p in paths if str(p) != RANDOM for f in (folder_files(p).values() if p.is_dir() else [p])]
    return [sha256(file) for file in files]


def open_run(folder: Path, config: dict, own: Path) -> list[dict]:
    """Make the folder, or resume in it: the records that are there. Another configuration there is refused.

    Each process appends to its `own` file; a last line there that a killed run left unfinished is cut off.
    """
    path = folder / "config.json"
    config = json.loads(json.dumps(config))
    if path.is_file():
        other = read_config(folder)
        changed = sorted(k for k in config.keys() | other.keys() if config.get(k) != other.get(k))
        if changed:
            raise InputError(f"{folder} holds a run with other settings ({', '.join(changed)}); choose another --name")
    else:
        place_for(path)
        write_json(path, config)
    if own.is_file():
        text = own.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            write_text(own, text[: text.rfind("\n") + 1])
    return read_records(folder)


def read_config(folder: Path) -> dict:
    """Raises InputError where it is damaged."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise InputError(f"{folder / 'config.json'} is damaged ({one_line(e)}); choose another --name") from e


def append_records(path: Path, records: Sequence[dict]) -> None:
    """All at once: a process that is killed leaves whole records, and at most one unfinished line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as f:
        f.write(text)
