"""Train the embedded diffusion model (`--model tiny`) on captioned photographs.

    python -m diffender.pretrain vae  --data PHOTOS --steps 4000
    python -m diffender.pretrain unet --data PHOTOS --steps 4000 --samples 10000
    python -m diffender.pretrain decoder --data PHOTOS --steps 4000 --crop 224 --batch 2

On a machine with one GPU and no network, in ten minutes, from one file that is carried there:

    python -m diffender.pretrain pack --data PHOTOS --out photos.safetensors
    python -m diffender.pretrain all  --data photos.safetensors --out DIR --minutes 9 --workers 14 --parts 15
    python -m diffender.pretrain join --data DIR --out tiny.safetensors

`all` gives VAE, decoder and UNet their shares of --minutes and leaves the model in parts of at most --parts MB. Every
minute it leaves the model as it is then, so that a run that is killed loses a minute; started again, it goes on.

A stage resumes from its checkpoint in --out and leaves `vae.safetensors` or `tiny.safetensors` there, with an image
and a log of its losses. `unet` needs the VAE of the first stage. With --samples it encodes that many images once and
trains on them, as a CPU can; without, every sample is new. `decoder` trains the VAE's decoder on, alone, on whole
images: the latents stay what they are, and so does the UNet. With --init weights/tiny.safetensors, `decoder` and
`unet` train a whole model on, from its first step.
The other stages take options of their own (`python -m diffender.pretrain jedi --help`):

    python -m diffender.pretrain jedi --data PHOTOS                                weights/jedi.safetensors
    python -m diffender.pretrain universal --data DATA --out patch.safetensors     one patch for all images
    python -m diffender.pretrain gdpa --data DATA --out generator.safetensors      GDPA's generator
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from diffender.config import RunOptions, TargetOptions
from diffender.utils.options import Parser, option, parse, part, run


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
    batch_size: int = option(8, "Images per batch.", low=1)
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


def train(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m diffender.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["pack", "all", "join", "vae", "decoder", "unet", "jedi", "universal", "gdpa"])
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with captions.csv, a file of `pack`, or of `join` the folder of parts",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pretrain"), help="folder; for `pack` and `join`, the file to write"
    )
    parser.add_argument("--init", type=Path, help="whole model of ours that decoder and unet start from")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps in all, those done before included")
    parser.add_argument("--minutes", type=float, help="stop after so many in all, and lower --lr towards that end")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="processes that make samples beside the training")
    parser.add_argument("--crop", type=int, default=96, help="side of the VAE's training crops, in pixels")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, a step")
    parser.add_argument("--decay", action=argparse.BooleanOptionalAction, default=True, help="lower --lr at the end")
    parser.add_argument("--save-minutes", type=float, default=1, help="minutes between two checkpoints")
    parser.add_argument("--reuse", type=int, default=8, help="times that a sample of the unet stage is used on average")
    parser.add_argument("--parts", type=float, default=15, help="of all: size of the parts of the model, in MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--focus", type=float, default=0.35, help="share of a unet batch trained as localisation uses it"
    )
    parser.add_argument(
        "--locate", type=float, default=0.0, help="weight of Eq. 4 on pasted regions, in the unet stage"
    )
    parser.add_argument("--hiding", type=int, default=0, help="steps at most by which half of the regions hide from it")
    parser.add_argument("--samples", type=int, default=0, help="encode so many images once; 0: a new one each time")
    args = parser.parse_args(argv)
    args.on_save = lambda: None  # after each checkpoint of the unet stage
    # Imported after the options are known to be good: torch takes seconds.
    import torch

    from diffender.pretrain.making import pack_all, train_unet, train_vae
    from diffender.pretrain.whole import join, train_all

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.stage in ("pack", "join"):
        {"pack": pack_all, "join": join}[args.stage](args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "decoder": train_vae, "unet": train_unet, "all": train_all}[args.stage](args)


def main() -> None:
    stage, rest = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]
    if stage == "jedi":
        given = parse(Jedi, __doc__, rest)
        from diffender.pretrain.jedi import train_jedi

        train_jedi(given)
    elif stage in ("universal", "gdpa"):
        options = parse(Beforehand, __doc__, rest)
        from diffender.pretrain.beforehand import make

        make(stage, options)
    else:
        train(sys.argv[1:])


if __name__ == "__main__":
    run(main)
