"""What the commands of `pretrain` take: their flags, and the recipe that a stage of training is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffender.config import RunOptions, TargetOptions
from diffender.utils.options import given, option, part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """What `all` chooses for each stage where it is not given."""

    batch: int = option(16, "Samples in a step.", low=1, group="a step")
    crop: int = option(96, "Side of the VAE's training crops, in pixels; a multiple of 8.", low=32)
    lr: float = option(8e-4, "Learning rate of AdamW.", low=0)
    ema: float = option(0.998, "Decay of the averaged weights, a step; lower in the first steps.", low=0, high=0.99999)
    reuse: int = option(8, "How often the unet stage uses each sample on average, without --samples.", low=1)
    locate: float = option(0.0, "Weight of Eq. 4 on pasted regions, in the unet stage.", low=0)
    hiding: int = option(
        0, "Largest number of steps by which half of the pasted regions are first changed to lower the map.", low=0
    )


@dataclass(frozen=True)
class Training:
    data: Path | None = option(
        None, "Folder with captions.csv, a file of `pack`, or of `join` the folder of parts.", group="training"
    )
    out: Path = option(Path("runs/pretrain"), "Folder; `pack` and `join` need the name of a file that is new.")
    init: Path | None = option(None, "Whole model of ours that decoder and unet start from; vae takes its shape.")
    steps: int = option(4000, "Optimiser steps in all, those done before included.", low=1)
    minutes: float | None = option(None, "Stop after so many minutes in all; --lr falls towards that end.", low=0.01)
    workers: int = option(0, "Processes that make samples beside the training.", low=0)
    save_minutes: float = option(1.0, "Minutes between two checkpoints.", low=0)
    parts: float = option(15.0, "For the stage all: size in MB of each part that the model is split into.", low=0.1)
    samples: int = option(
        0, "Encode this many images once and train on them. 0: make new ones, each for --reuse uses.", low=0
    )
    seed: int = option(0, "Seed of weights and samples.", low=0)
    device: str = option("auto", "Torch device. auto: the GPU where there is one.")
    sizes: dict[str, Any] = given(Sizes())


@dataclass(frozen=True, kw_only=True)
class Recipe(Sizes, Training):
    """What a stage of training is told: the flags, with a size for every one of `Sizes`."""

    stage: str
    device: torch.device


@dataclass(frozen=True)
class Jedi:
    data: str = option("samples", "Photographs, none of them to be evaluated on: samples, a folder by wnid, or a csv.")
    images: int = option(100, "Number of photographs for the statistics of clean images.", low=2)
    size: int = option(224, "Side that the photographs are resized to, in pixels.", low=32)
    out: str = option("runs/jedi.safetensors", "Output file, in float16; the defence reads weights/jedi.safetensors.")
    masks: int = option(8000, "Number of drawn masks.", low=1)
    epochs: int = option(30, "Epochs over the masks.", low=1)
    lr: float = option(2e-3, "Learning rate of Adam.", low=0)
    seed: int = option(0, "Seed of masks and weights.", low=0)


@dataclass(frozen=True)
class Beforehand:
    attacked: TargetOptions = part(TargetOptions(), "data", "classifier", "fold", "classifier_weights", "classes")
    run: RunOptions = part(RunOptions())
    batch_size: int = option(8, "Images per batch.", low=1, group="what is made")
    images: int = option(500, "Number of images. evaluate.py leaves them out.", low=1)
    area: float = option(0.05, "Share of the image that the patch covers.", low=0.0005, high=0.9)
    target: int = option(859, "Class that the universal patch aims at (the original's toaster).", low=0, high=999)
    updates: int = option(1000, "Steps of Adam.", low=1)
    eot: int = option(1, "EOT samples in each step.", low=1)
    width: int = option(64, "Width of the generator.", low=1)
    out: str = option("runs/beforehand.safetensors", "Output file.")
