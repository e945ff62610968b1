"""From options to objects: the model, the classifier, the images, the device."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffender.classifiers.dataset import Item, list_items, own_classes
from diffender.classifiers.imagenet import Classifier, load_classifier
from diffender.config import DefenseOptions, DIFFenderConfig, ModelOptions, TargetOptions
from diffender.faces.identification import RECOGNIZERS, identify, list_faces, split_faces
from diffender.pipeline import Defended, DIFFender
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError
from diffender.utils.files import printable, sha256
from diffender.weights.loading import RANDOM, WEIGHTS, exact_convolutions, header_of, load_model, settings_of
from diffender.weights.prompts import contexts_for
from diffender.weights.reading import folder_files, scheduler_of


def pick_device(name: str) -> torch.device:
    """`auto` is the CUDA GPU where there is one. Raises InputError for a device that is not there.

    From here on `exact_convolutions` holds. A GPU that was picked becomes this process's current one: pinned memory and
    torch.cuda.synchronize use that.
    """
    name = str(name)  # from Python it may be a torch.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    exact_convolutions()
    try:
        if name.startswith("meta"):
            raise RuntimeError("tensors there hold no values")
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as e:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            found.append("mps")
        raise InputError(f"--device {name} is not here; there is {', '.join(found)}; auto takes cuda, or cpu") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def open_model(opts: ModelOptions, device: torch.device) -> LatentDiffusion:
    """The diffusion model that the flags ask for, on its device."""
    prediction = None if opts.prediction == "auto" else opts.prediction
    parts = {"vae": opts.vae, "locator": opts.locate_unet}
    dtype = pick_dtype(opts, device)
    model = load_model(opts.model, opts.weights, dtype, ema=opts.ema, parts=parts, prediction=prediction)
    model.micro_batch = opts.micro_batch
    if opts.keep is not None:
        model.keep = opts.keep
    return model.to(device)


def open_defense(opts: DefenseOptions, device: torch.device, model: LatentDiffusion | None = None) -> DIFFender:
    """The defence that the flags ask for, on its device. `model` is used instead of opening one.

    Its networks are then shared. `keep` and `micro_batch` may differ from those of the given model.
    """
    model = open_model(opts.model, device) if model is None else copy(model)
    contexts = contexts_for(opts.prompt_kind, model, opts.prompts)
    return DIFFender(model, contexts, config_of(opts.model, opts.method))


def config_of(opts: ModelOptions, method: Mapping[str, Any]) -> DIFFenderConfig:
    """The settings that suit the model, but for those that are given. Reads the header of its file alone."""
    return replace(settings_of(opts.weights, opts.model), **method)


def open_target(opts: TargetOptions, device: torch.device, model: LatentDiffusion | None = None) -> Defended:
    """The classifier behind the defence that the flags ask for, on their device; `model` where it is open already."""
    return Defended(open_defense(opts.defense, device, model), open_classifier(opts, device))


def open_classifier(opts: TargetOptions, device: torch.device) -> Classifier:
    """The classifier that the flags ask for, on its device; a recogniser of faces takes its gallery from --data."""
    if opts.classifier in RECOGNIZERS:
        faces = split_faces(list_faces(opts.data), opts.fold)
        return identify(opts.classifier, opts.classifier_weights, faces, device)
    classifier = load_classifier(opts.classifier, opts.classifier_weights, opts.classes, RECOGNIZERS)
    if opts.classes is not None:
        classifier.names = [*map(printable, own_classes(opts.data, opts.classes))]
    return classifier.to(device)


def open_items(opts: TargetOptions) -> list[Item]:
    """The images that --data names; of faces, the probes. Raises InputError where they do not fit --classes."""
    if opts.classifier in RECOGNIZERS:
        return split_faces(list_faces(opts.data), opts.fold).probes
    return list_items(opts.data, opts.classes)


def pick_dtype(opts: ModelOptions, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 for an official model on a GPU, and float32 elsewhere. float16 rounds less: the
    map, a difference of two near numbers, is more exact in it."""
    ours = opts.embedded or "config" in header_of(opts.weights)
    auto = "bfloat16" if device.type == "cuda" and not ours else "float32"
    return getattr(torch, auto if opts.dtype == "auto" else opts.dtype)


def dtype_name(opts: ModelOptions, device: str) -> str:
    """The dtype of a run on this device, for its settings: float32, bfloat16 or float16."""
    return str(pick_dtype(opts, pick_device(device))).removeprefix("torch.")


def hashes_of(opts: ModelOptions, **others: str | Path | None) -> dict[str, Any]:
    """sha256 of every file that the model is made of, and of those of the other files that are given, by name."""
    given = ((opts.weights or WEIGHTS / "tiny.safetensors", None), (opts.vae, "vae"), (opts.locate_unet, "unet"))
    files: list[Path] = []
    for name, wanted in given:
        if not name or str(name) == RANDOM:
            continue
        path = Path(name).expanduser()
        files += [f for part in folder_files(path, wanted).values() for f in part] if path.is_dir() else [path]
        if wanted != "vae" and (scheduler := scheduler_of(path)):  # may say what the UNet predicts
            files.append(scheduler)
    model = [sha256(file) for file in files]
    return {"model": model} | {what: sha256(Path(path)) for what, path in others.items() if path}
