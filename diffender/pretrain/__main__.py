"""Train the embedded diffusion model (`--model tiny`) on captioned photographs.

    python -m diffender pretrain vae  --data PHOTOS --steps 4000
    python -m diffender pretrain unet --data PHOTOS --steps 4000 --samples 10000
    python -m diffender pretrain decoder --data PHOTOS --steps 4000 --crop 224 --batch 2

On a machine with one GPU and no network, in ten minutes, from one file that is carried there:

    python -m diffender pretrain pack --data PHOTOS --out photos.safetensors
    python -m diffender pretrain all  --data photos.safetensors --out DIR --minutes 9 --workers 14 --parts 15
    python -m diffender pretrain join --data DIR --out tiny.safetensors

`all` gives VAE, decoder and UNet their shares of --minutes and leaves the model in parts of at most --parts MB. Each
stage leaves a checkpoint every minute, in a folder beside --out, so that a run that is killed loses a minute; started
again, it goes on. From the UNet's first minute on, --out holds the model as it is then.

A stage resumes from its checkpoint in --out and leaves `vae.safetensors` or `tiny.safetensors` there, with an image
and a log of its losses. `unet` needs the VAE of the first stage. With --samples it encodes that many images once and
trains on them, as a CPU can; without, every sample is new. `decoder` trains the VAE's decoder on, alone, on whole
images: the latents stay what they are, and so does the UNet. With --init weights/tiny.safetensors, `decoder` and
`unet` train a whole model on, from its first step.
The other stages take options of their own (`python -m diffender pretrain jedi --help`):

    python -m diffender pretrain jedi --data PHOTOS                                weights/jedi.safetensors
    python -m diffender pretrain universal --data DATA --out patch.safetensors     one patch for all images
    python -m diffender pretrain gdpa --data DATA --out generator.safetensors      GDPA's generator
"""

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffender.config import RunOptions, TargetOptions
from diffender.utils.errors import InputError, nearest
from diffender.utils.options import given, option, parse, part, run

PLACES = ("data", "out", "init")  # options that are paths


@dataclass(frozen=True)
class Sizes:
    """What `all` chooses for each stage where it is not given."""

    batch: int = option(16, "Samples in a step.", low=1, group="a step")
    crop: int = option(96, "Side of the VAE's training crops, in pixels; a multiple of 8.", low=32)
    lr: float = option(8e-4, "Learning rate of AdamW.", low=0)
    ema: float = option(0.998, "Decay of the averaged weights, a step; lower in the first steps.", low=0, high=0.99999)
    reuse: int = option(8, "How often each sample of the unet stage is used, on average.", low=1)
    locate: float = option(0.0, "Weight of Eq. 4 on pasted regions, in the unet stage.", low=0)
    hiding: int = option(
        0, "Largest number of steps by which half of the pasted regions are first changed to lower the map.", low=0
    )


@dataclass(frozen=True)
class Training:
    data: str | None = option(
        None, "Folder with captions.csv, a file of `pack`, or of `join` the folder of parts.", group="training"
    )
    out: str = option("runs/pretrain", "Folder; for `pack` and `join`, the file to write.")
    init: str | None = option(None, "Whole model of ours that decoder and unet start from.")
    steps: int = option(4000, "Optimiser steps in all, those done before included.", low=1)
    minutes: float | None = option(None, "Stop after so many in all, and lower --lr towards that end.", low=0.01)
    workers: int = option(0, "Processes that make samples beside the training.", low=0)
    decay: bool = option(True, "Lower --lr at the end.")
    save_minutes: float = option(1.0, "Minutes between two checkpoints.", low=0)
    parts: float = option(15.0, "Of all: size of the parts of the model, in MB.", low=0.1)
    focus: float = option(0.35, "Share of a unet batch trained as localisation uses it.", low=0, high=1)
    samples: int = option(0, "Encode so many images once; 0: a new one each time.", low=0)
    seed: int = option(0, "Seed of weights and samples.", low=0)
    device: str = option("auto", "Torch device. auto: the GPU where there is one.")
    sizes: dict[str, Any] = given(Sizes())


@dataclass(frozen=True)
class Jedi:
    data: str = option("samples", "Photographs, none of them to be evaluated on: samples, a folder by wnid, or a csv.")
    images: int = option(100, "Number of photographs for the statistics of clean images.", low=2)
    size: int = option(224, "Side that the photographs are resized to, in pixels.", low=32)
    out: str = option("weights/jedi.safetensors", "Output file, in float16.")
    masks: int = option(8000, "Number of drawn masks.", low=1)
    epochs: int = option(30, "Epochs over the masks.", low=1)
    lr: float = option(2e-3, "Learning rate of Adam.", low=0)
    seed: int = option(0, "Seed of masks and weights.", low=0)


@dataclass(frozen=True)
class Beforehand:
    attacked: TargetOptions = part(TargetOptions())
    run: RunOptions = part(RunOptions())
    batch_size: int = option(8, "Images per batch.", low=1, group="what is made")
    through: str = option(
        "classifier", "What is attacked: the classifier alone, or the defence.", choices=("classifier", "defence")
    )
    images: int = option(500, "Number of images. None of them may be attacked later.", low=1)
    area: float = option(0.05, "Share of the image that the patch covers.", low=0.0005, high=0.9)
    target: int = option(859, "Class that the universal patch aims at (the original's toaster).", low=0, high=999)
    updates: int = option(1000, "Steps of Adam.", low=1)
    eot: int = option(1, "EOT samples in each step.", low=1)
    width: int = option(64, "Width of the generator.", low=1)
    out: str = option("runs/beforehand.safetensors", "Output file.")


STAGES = dict.fromkeys(("pack", "all", "join", "vae", "decoder", "unet"), Training)
STAGES |= {"jedi": Jedi, "universal": Beforehand, "gdpa": Beforehand}


def train(stage: str, opts: Training) -> None:
    if opts.data is None:
        raise InputError("--data is missing; give a folder with captions.csv, or a file that `pack` wrote")
    if stage == "all" and opts.minutes is None:
        raise InputError("all needs --minutes, the time that there is")
    if (crop := opts.sizes.get("crop", 0)) % 8:
        raise InputError(f"--crop is {crop}; it is a multiple of 8")
    # Imported after the options are known to be good: torch takes seconds.
    from diffender.factory import pick_device
    from diffender.pretrain.making import pack_all, train_unet, train_vae
    from diffender.pretrain.whole import join, train_all

    places = {name: None if value is None else Path(value) for name, value in vars(opts).items() if name in PLACES}
    args = Namespace(**vars(opts) | places | vars(Sizes(**opts.sizes)) | {"stage": stage})
    args.device = pick_device(opts.device)
    stages = {"pack": pack_all, "join": join, "vae": train_vae, "decoder": train_vae, "unet": train_unet}
    if stage not in ("pack", "join"):
        args.out.mkdir(parents=True, exist_ok=True)
    (stages | {"all": train_all})[stage](args)


def main() -> None:
    stage, rest = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    if stage in ("-h", "--help"):
        parse(Training, __doc__, ["--help"])
    if stage not in STAGES:
        raise InputError(f"unknown stage {stage}; choose one of {', '.join(STAGES)}{nearest(stage, STAGES)}")
    opts = parse(STAGES[stage], __doc__, rest)
    if stage == "jedi":
        from diffender.pretrain.jedi import train_jedi

        train_jedi(opts)
    elif stage in ("universal", "gdpa"):
        from diffender.pretrain.beforehand import make

        make(stage, opts)
    else:
        train(stage, opts)


if __name__ == "__main__":
    run(main)
