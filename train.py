"""Tune the two prompts of DIFFender on a few attacked photographs (Sec. 3.3).

    python train.py --shots 8                          embedded model, sample photographs; about 2 minutes on 2 cores
    torchrun --nproc-per-node 4 train.py --shots 8     batches split between processes, a GPU each; same to rounding

Attacks the images with AdvP, keeping the true masks, then descends Eq. 7 over the 16 context vectors of each prompt:
cross-entropy of the mask (Eq. 4) + l1 to the clean image (Eq. 5) + distance of classifier features (Eq. 6).
Writes prompts.safetensors, which `python evaluate.py --prompts FILE` takes: those of the round whose masks fit a few
held-out photographs best. Ctrl-C stops after the round in hand; the same command goes on.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports shows no traceback; `run` listens again

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffender.config import (
    EMBEDDED,
    PAPER,
    Backward,
    DIFFenderConfig,
    ModelOptions,
    RunOptions,
    TargetOptions,
    TuningConfig,
)
from diffender.utils.errors import InputError
from diffender.utils.files import new_file, place_for, refuse_damaged, save_state
from diffender.utils.interruption import patient
from diffender.utils.options import change, check_read, flat, given, option, parse, part, run, settings
from diffender.utils.progress import TRACKERS, bar
from diffender.utils.provenance import command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from diffender.attacks.expectation import Attacked, Task
    from diffender.classifiers.dataset import Batch
    from diffender.classifiers.imagenet import Classifier
    from diffender.pipeline import Defended
    from diffender.prompts import PromptPair
    from diffender.stable_diffusion.model import LatentDiffusion
    from diffender.tuning import Tuning, Work


HIDING = Backward("evade")  # how --adaptive attacks
ANEW = "delete it to begin anew, or choose another --out"
WHILE_TUNING = {"draws": 2, "steps": 3}  # instead of EMBEDDED's 3 and 2, while prompts are tuned


@dataclass(frozen=True)
class Options:
    tuning: TuningConfig = part(TuningConfig())
    model: ModelOptions = part(ModelOptions())
    method: dict[str, Any] = given(
        PAPER,
        *("noise_ratio", "draws", "theta", "steps", "sampler", "guidance"),
        embedded=replace(EMBEDDED, **WHILE_TUNING),
    )
    run: RunOptions = part(RunOptions(), "device", "quiet")
    target: TargetOptions = part(TargetOptions(), "data", "classifier", "classifier_weights")
    shots: int = option(8, "Number of images to tune on (paper: 8).", low=1, group="the photographs")
    held_out: int = option(
        4, "Number of further images. The round whose masks fit them best is kept. 0: keep the last.", low=0
    )
    n_ctx: int = option(16, "Context vectors of each prompt (paper: 16).", low=1, high=75, group="the prompts")
    ctx_init: str = option(
        "words", "Initialise from the words of the manual prompts or from noise.", choices=("words", "noise")
    )
    area: float = option(0.05, "Share of the image that a patch covers.", low=0.0005, high=0.9, group="the attack")
    iters: int = option(100, "Steps of AdvP on the classifier alone.", low=1)
    adaptive_iters: int = option(20, "Steps of AdvP through the defence, of --adaptive.", low=1)
    out: str = option(
        "runs/prompts.safetensors",
        "Output file, a new one. A stopped tuning with the same file goes on.",
        group="results",
    )
    track: str = option("none", "Tracker that receives the losses during tuning.", choices=tuple(TRACKERS))


def main() -> None:
    opts = parse(Options, __doc__)
    if opts.held_out and opts.tuning.adaptive > opts.tuning.rounds:
        raise InputError(
            f"--adaptive {opts.tuning.adaptive} with --rounds {opts.tuning.rounds}: no round would be compared; give "
            "at most as many, or --held-out 0"
        )
    check_read(opts, {"adaptive_iters": ("--adaptive", opts.tuning.adaptive)})
    if opts.tuning.printed_eq4 and opts.tuning.without == "mask":
        raise InputError("--printed-eq4 and --without mask: there is no Eq. 4 then; leave one of them out")
    # Imported after the options are known to be good: torch and timm take seconds.
    import torch

    from diffender.attacks.expectation import Task
    from diffender.classifiers.imagenet import load_classifier
    from diffender.evaluation.memory import footprint, keep_or_recompute
    from diffender.evaluation.workers import add_up, own_device
    from diffender.factory import open_model, pick_device
    from diffender.pipeline import Defended, DIFFender, Undefended
    from diffender.tuning import Shots, Tuning, Work
    from diffender.weights.prompts import save_prompts

    started = time.monotonic()
    going_on = unfinished(opts).is_file()
    path = place_for(Path(opts.out)) if going_on else new_file(Path(opts.out))
    if going_on:
        read_unfinished(opts)  # one that cannot go on shows before any work
    rank, workers = join(opts)
    opts = change(opts, device=own_device(opts.run.device))
    device = pick_device(opts.run.device)
    classifier = load_classifier(opts.target.classifier, opts.target.classifier_weights).to(device)
    batch = photographs(opts, classifier).to(device)
    model, cfg = open_model(opts.model, device), config_of(opts)

    task = Task(Undefended(classifier), batch.x, batch.y, batch.ids, opts.tuning.seed)
    attacked = attack_alone(opts, task, rank == 0 and not opts.run.quiet)

    prompts = first_prompts(opts, model)
    if opts.model.keep is None:
        one = footprint(model, classifier.net, batch.x.shape[-1])
        model.keep = keep_or_recompute(one, opts.tuning.batch_size, cfg.draws, cfg.evaluations, device)
    defense = DIFFender(model, prompts(model), cfg)
    posterior, features = defense.posterior(attacked.image), classifier.features(batch.x)
    every = Shots(batch.ids, batch.x, attacked.image, attacked.mask, posterior, features)
    tuning = Tuning(prompts, opts.tuning, math.ceil(opts.shots / opts.tuning.batch_size))
    target = Defended(defense, classifier)
    attack_anew = partial(attack_through, opts, task._replace(victim=target.under(HIDING)), attacked.state)
    shots, held_out = torch.arange(len(batch.ids)).tensor_split([opts.shots])
    batches = []
    for rows in shots.split(opts.tuning.batch_size):
        mine = rows[rank::workers]  # of this process
        batches.append((mine, len(mine) / len(rows)))
    work = Work(every, batches, held_out, attack_anew, add_up)
    tune_and_save(opts, target, tuning, work, batch.hashes, rank == 0)
    if rank > 0:
        return

    told = {"ids": batch.ids, "hashes": batch.hashes, "terms": tuning.best, "torch": torch.__version__}
    save_prompts(prompts, path, flat(opts) | asdict(cfg) | told)
    unfinished(opts).unlink(missing_ok=True)
    print(f"saved {path} after {time.monotonic() - started:.0f} s; use it with python evaluate.py --prompts {path}")


def join(opts: Options) -> tuple[int, int]:
    """The rank of this process and how many there are. Raises InputError where a batch has too few images for all."""
    from diffender.evaluation.workers import start

    rank, workers = start()
    smallest_batch = opts.shots % opts.tuning.batch_size or opts.tuning.batch_size
    if workers > smallest_batch:
        raise InputError(
            f"{workers} processes share a batch of {smallest_batch}: start at most {smallest_batch}, or change --shots"
        )
    return rank, workers


def first_prompts(opts: Options, model: LatentDiffusion) -> PromptPair:
    """The prompts before any tuning, on the model's device."""
    from diffender.noise import generator
    from diffender.prompts import MANUAL, PromptPair

    prompts = PromptPair(opts.n_ctx, model.cfg.text.width, generator(opts.tuning.seed, "ctx"))
    prompts.to(model.alphas_cumprod.device)
    if opts.ctx_init == "words":
        prompts.initialize_from(model.text, MANUAL)
    return prompts


def attack_alone(opts: Options, task: Task, speaks: bool) -> Attacked:
    """The images of the task attacked on the undefended classifier."""
    from diffender.attacks import AdvP

    attack = AdvP(area=opts.area, iters=opts.iters, eot=1)
    with bar(attack.iters, "attacking the photographs", not speaks) as progress:
        attacked = attack(task, callback=lambda _: progress.update())
    if speaks:
        fooled = int((task.victim(attacked.image, None).argmax(dim=1) != task.y).sum())
        print(f"{fooled} of {len(task.y)} attacked photographs fool {opts.target.classifier}")
    return attacked


def attack_through(opts: Options, task: Task, starts: Tensor) -> Tensor:
    """The images of the task (B, 3, S, S) attacked through its victim, from `starts`: states of earlier attacks."""
    from diffender.attacks import AdvP
    from diffender.attacks.attack import attack_all

    return attack_all(
        AdvP(area=opts.area, iters=opts.adaptive_iters, eot=1), task, 1, starts
    ).image  # one at a time: little memory


def photographs(opts: Options, classifier: Classifier) -> Batch:
    """The photographs to tune on, and those by which the best round is chosen. Raises InputError where there are too
    few, or no layers for Eq. 6."""
    from diffender.classifiers.dataset import correct_subset, list_items

    if not classifier.cfg.taps:
        raise InputError(
            f"{opts.target.classifier} names no layers for the feature distance of Eq. 6; take another classifier"
        )
    wanted = opts.shots + opts.held_out
    batch = correct_subset(list_items(opts.target.data), classifier, wanted, opts.tuning.seed)
    if len(batch.ids) < wanted:
        raise InputError(
            f"--shots {opts.shots} and --held-out {opts.held_out} are {wanted} photographs; {opts.target.classifier} "
            f"reads {len(batch.ids)} of --data {opts.target.data} right: ask for fewer, or give more"
        )
    return batch


def tune_and_save(
    opts: Options, target: Defended, tuning: Tuning, work: Work, hashes: Sequence[str], first: bool
) -> None:
    """Tune on photographs with these hashes. After each round the first process leaves a file beside --out with all
    that the next one needs, so that the same command goes on."""
    from diffender.tuning import tune

    if unfinished(opts).is_file():
        with refuse_damaged(unfinished(opts), ANEW):
            tuning.load_state_dict(read_unfinished(opts, hashes))
    speaks = first and not opts.run.quiet
    log = TRACKERS[opts.track if first else "none"](
        Path(opts.out).with_suffix(""), flat(opts) | asdict(config_of(opts))
    )
    progress = bar(opts.tuning.rounds, "tuning", not speaks, initial=tuning.rounds)
    with progress, patient(f"stopped after a round; go on with: {command(from_here=True)}") as may_stop:
        for terms in tune(target, tuning, work, opts.tuning):
            if first:
                save_state(tuning.state_dict() | {"settings": resolved(opts), "hashes": hashes}, unfinished(opts))
            if speaks:
                progress.write("  ".join(f"{name} {value:.4g}" for name, value in terms.items()))
            log(terms, tuning.rounds - 1)
            progress.update()
            may_stop()


def config_of(opts: Options) -> DIFFenderConfig:
    """The settings that suit the model. The embedded model takes those of WHILE_TUNING; flags override both."""
    from diffender import factory

    while_tuning = WHILE_TUNING if opts.model.embedded else {}
    return factory.config_of(opts.model, while_tuning | opts.method)


def unfinished(opts: Options) -> Path:
    """Where a tuning that has not ended is kept."""
    return Path(f"{opts.out}.unfinished")


def resolved(opts: Options) -> dict:
    """What a tuning that goes on must share with the one that stopped."""
    from diffender.factory import dtype_name, hashes_of

    dtype = dtype_name(opts.model, opts.run.device)
    hashes = hashes_of(opts.model, classifier=opts.target.classifier_weights)
    return settings(opts, "out") | asdict(config_of(opts)) | {"sha256": hashes, "dtype": dtype}


def read_unfinished(opts: Options, hashes: Sequence[str] | None = None) -> dict:
    """Raises InputError for a file that is damaged, or a tuning with other settings or on other photographs."""
    import torch

    path = unfinished(opts)
    with refuse_damaged(path, ANEW):
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        theirs = dict(state["settings"])
    mine = resolved(opts)
    if others := sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)):
        raise InputError(f"{path} holds a tuning with other settings ({', '.join(others)}); {ANEW}")
    if hashes is not None and list(hashes) != state.get("hashes"):
        raise InputError(f"{path} holds a tuning on other photographs than --data {opts.target.data} has; {ANEW}")
    return state


if __name__ == "__main__":
    run(main)
