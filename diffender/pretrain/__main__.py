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
and a log of its losses. It may then have other --steps, --minutes, --lr and --ema; all other settings of its training
must be the same. `unet` needs the VAE of the first stage. With --samples it encodes that many images once and trains
on them, as a CPU can; without, it makes new ones all the time, and uses each --reuse times on average. `decoder` trains
the VAE's decoder on, alone, on whole images: the latents stay what they are, and so does the UNet. With --init
weights/tiny.safetensors, `decoder` and `unet` train a whole model on, from its first step.
The other stages take options of their own (`python -m diffender pretrain jedi --help`):

    python -m diffender pretrain jedi --data PHOTOS                                runs/jedi.safetensors
    python -m diffender pretrain universal --data DATA --out patch.safetensors     one patch for all images
    python -m diffender pretrain gdpa --data DATA --out generator.safetensors      GDPA's generator
"""

import sys

from diffender.pretrain.options import Beforehand, Jedi, Recipe, Training
from diffender.utils.errors import InputError, nearest
from diffender.utils.options import check_read, parse, run

STAGES = dict.fromkeys(("pack", "all", "join", "vae", "decoder", "unet"), Training)
STAGES |= {"jedi": Jedi, "universal": Beforehand, "gdpa": Beforehand}


def refuse_unread(stage: str, opts: Training) -> None:
    """Raises InputError for a flag that this stage does not read."""
    single, both = ("vae", "decoder", "unet"), ("unet", "all")
    training = ("minutes", "workers", "save_minutes", "seed", "device", "batch", "lr", "ema")
    readers = {
        **dict.fromkeys(training, ("stages that train", stage in (*single, "all"))),
        **dict.fromkeys(("init", "steps"), ("single stages", stage in single)),
        **dict.fromkeys(("samples", "reuse", "locate", "hiding"), ("unet and all", stage in both)),
        "crop": ("vae, decoder and all", stage in ("vae", "decoder", "all")),
        "parts": ("all", stage == "all"),
    }
    check_read(opts, readers)
    located = opts.sizes.get("locate", stage == "all")  # `all` locates unless it is told otherwise
    check_read(opts, {"reuse": ("runs without --samples", not opts.samples), "hiding": ("--locate", located)})


def train(stage: str, opts: Training) -> None:
    if opts.data is None:
        raise InputError("--data is missing; give a folder with captions.csv, or a file that `pack` wrote")
    if stage == "all" and opts.minutes is None:
        raise InputError("all needs --minutes, the time that there is")
    if stage in ("pack", "join") and opts.out == Training.out:
        raise InputError("--out is missing; name the file to write")
    refuse_unread(stage, opts)
    if (crop := opts.sizes.get("crop", 0)) % 8:
        raise InputError(f"--crop is {crop}; it is a multiple of 8")
    # Imported after the options are known to be good: torch takes seconds.
    from diffender.factory import pick_device
    from diffender.pretrain.stages import pack_all, train_unet, train_vae
    from diffender.pretrain.whole import join, train_all

    if stage in ("pack", "join"):
        {"pack": pack_all, "join": join}[stage](opts.data, opts.out)
        return
    device = pick_device(opts.device)
    opts.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**vars(opts) | opts.sizes | {"stage": stage, "device": device})
    {"all": train_all, "vae": train_vae, "decoder": train_vae, "unet": train_unet}[stage](recipe)


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
