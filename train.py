"""Tune the two prompts of DIFFender on a few attacked photographs (Sec. 3.3).

    python train.py --shots 8                          embedded model, sample photographs; under 10 minutes on 2 cores
    torchrun --nproc-per-node 4 train.py --shots 8     each batch split between processes, a GPU each; same prompts

Attacks the pictures with AdvP, keeping the true masks, then descends Eq. 7 over the 16 context vectors of each prompt:
cross-entropy of the mask (Eq. 4) + l1 to the clean picture (Eq. 5) + distance of classifier features (Eq. 6).
Writes prompts.safetensors, which `python evaluate.py --prompts FILE` takes: those of the round whose masks fit a few
held-out photographs best. Ctrl-C stops after the round in hand; the same command goes on.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffender.config import DefenseOptions, ModelOptions
from diffender.utils.options import changed, option, parse, pick, run, settings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from diffender.classifiers.dataset import Batch
    from diffender.classifiers.imagenet import Classifier
    from diffender.losses import TuningLoss
    from diffender.pipeline import DIFFender
    from diffender.prompts import PromptPair
    from diffender.stable_diffusion.vae import Posterior


@dataclass(frozen=True)
class Options(ModelOptions):
    data: str = option("samples", "samples, a folder by wnid, or a csv of file and label")
    shots: int = option(8, "number of photographs to tune on", low=1)
    held_out: int = option(4, "further ones, whose masks choose the round that is kept; 0: keep the last", low=0)
    rounds: int = option(50, "passes over them", low=1)
    batch_size: int = option(4, "photographs in an optimiser step", low=1)
    n_ctx: int = option(16, "context vectors of each prompt", low=1, high=75)
    ctx_init: str = option("words", "start from the manual prompts' words or from noise", choices=("words", "noise"))
    lr: float = option(0.01, "of Adam, on the context vectors; falls to zero along a cosine", low=0)
    printed_eq4: bool = option(False, "Eq. 4 as printed, without its negative term")
    without: str = option(
        "none", "leave a term of Eq. 7 out, as Table 2 does", choices=("none", "mask", "l1", "feature")
    )
    area: float = option(0.05, "share of the picture that a patch covers", low=0.0005, high=0.9)
    iters: int = option(100, "steps of AdvP on the classifier alone", low=1)
    classifier: str = option("efficientnet_lite0", "classifier under defence, a name of diffender.classifiers.imagenet")
    classifier_weights: str | None = option(None, "its safetensors file in timm's names; none for the embedded one")
    noise_ratio: float = changed(DefenseOptions, "noise_ratio", 0.2)
    draws: int = changed(DefenseOptions, "draws", 2, "Number of draws m in Eq. 2 while tuning.")
    theta: float = changed(DefenseOptions, "theta", 2.5)
    steps: int = changed(DefenseOptions, "steps", 3, "Sampler steps of restoration while tuning.")
    sampler: str = changed(DefenseOptions, "sampler", "dpmpp")
    guidance: float = changed(DefenseOptions, "guidance", 1.0)
    seed: int = option(0, "Seed of every random choice.", low=0, group="the run")
    out: str = option("runs/prompts.safetensors", "where the prompts go, and a tuning that was stopped goes on")
    track: str = option("none", "package that hears losses along the way", choices=("none", "tensorboard", "wandb"))


def main() -> None:
    opts = parse(Options, __doc__)
    # Imported after the options are known to be good: torch and timm take seconds.
    import torch

    from diffender.attacks import AdvP
    from diffender.attacks.expectation import Task
    from diffender.classifiers.imagenet import load_classifier
    from diffender.config import DIFFenderConfig
    from diffender.evaluation.memory import footprint, keep_or_recompute
    from diffender.evaluation.workers import own_device, start
    from diffender.factory import open_model, pick_device, pick_dtype
    from diffender.noise import generator
    from diffender.pipeline import DIFFender, Undefended
    from diffender.prompts import MANUAL, PromptPair
    from diffender.utils.errors import InputError
    from diffender.utils.files import place_for
    from diffender.utils.progress import bar
    from diffender.weights.prompts import save_prompts

    started = time.monotonic()
    path = place_for(Path(opts.out))
    if unfinished(opts).is_file():
        read_unfinished(opts)  # one that cannot go on shows before any work
    rank, workers = start()
    smallest = opts.shots % opts.batch_size or opts.batch_size  # batch
    if workers > smallest:
        raise InputError(
            f"{workers} processes share a batch of {smallest}: start at most {smallest}, or change --shots"
        )
    opts = replace(opts, device=own_device(opts.device))
    device = pick_device(opts.device)
    classifier = load_classifier(opts.classifier, opts.classifier_weights).to(device)
    batch = photographs(opts, classifier)
    model = open_model(opts, device)
    x, y = batch.x.to(device), batch.y.to(device)

    attack = AdvP(area=opts.area, iters=opts.iters, eot=1)
    with bar(attack.iters, "attacking the photographs", opts.quiet or rank > 0) as progress:
        task = Task(Undefended(classifier), x, y, batch.ids, opts.seed)
        attacked = attack(task, callback=lambda _: progress.update())
    fooled = int((classifier(attacked.image).argmax(dim=1) != y).sum())
    if rank == 0 and not opts.quiet:
        print(f"{fooled} of {len(y)} attacked photographs fool {opts.classifier}; tuning on {device}")

    prompts = PromptPair(opts.n_ctx, model.cfg.text.width, generator(opts.seed, "ctx")).to(device)
    if opts.ctx_init == "words":
        prompts.initialize_from(model.text, MANUAL)
    if opts.keep is None:
        one = footprint(model.cfg, pick_dtype(opts.dtype, device), classifier.net, x.shape[-1])
        evaluations = opts.steps * (1 if opts.guidance == 1 else 2)
        model.keep = keep_or_recompute(one, opts.batch_size, opts.draws, evaluations, device)
    defense = DIFFender(model, prompts(model), pick(DIFFenderConfig, opts))
    posterior, features = defense.posterior(attacked.image), classifier.features(x)
    every = Shots(batch.ids, x, attacked.image, attacked.mask, posterior, features)
    terms = tune(opts, defense, classifier, prompts, every, rank, workers)
    if rank > 0:
        return

    header = asdict(opts) | {"ids": batch.ids, "hashes": batch.hashes, "terms": terms, "torch": torch.__version__}
    save_prompts(prompts, path, header)
    unfinished(opts).unlink(missing_ok=True)
    print(f"saved {path} after {time.monotonic() - started:.0f} s; use it with python evaluate.py --prompts {path}")


def photographs(opts: Options, classifier: Classifier) -> Batch:
    """Those to tune on and those to choose by. Raises InputError where there are too few, or no layers for Eq. 6."""
    from diffender.classifiers.dataset import correct_subset, list_items
    from diffender.utils.errors import InputError

    if not classifier.cfg.taps:
        raise InputError(
            f"{opts.classifier} names no layers for the feature distance of Eq. 6; take another classifier"
        )
    wanted = opts.shots + opts.held_out
    batch = correct_subset(list_items(opts.data), classifier, wanted, opts.seed)
    if len(batch.ids) < wanted:
        raise InputError(
            f"--shots {opts.shots} and --held-out {opts.held_out} are {wanted} photographs; {opts.classifier} reads "
            f"{len(batch.ids)} of --data {opts.data} right: ask for fewer, or give more"
        )
    return batch


class Shots(NamedTuple):
    """Attacked photographs and what no round of tuning changes."""

    ids: list[str]
    clean: Tensor  # (B, 3, S, S) in [0, 1]
    attacked: Tensor
    mask: Tensor  # (B, 1, S, S) in {0, 1}, 1 = patch
    posterior: Posterior  # of the attacked pictures, for localisation
    features: list[Tensor]  # of the clean ones, Eq. 6

    def part(self, rows: Tensor) -> Shots:
        """Those with these numbers."""
        few = [t[rows] for t in (self.clean, self.attacked, self.mask)]
        posterior = type(self.posterior)(*(moment[rows] for moment in self.posterior))
        return Shots([self.ids[i] for i in rows], *few, posterior, [feature[rows] for feature in self.features])


def tune(
    opts: Options,
    defense: DIFFender,
    classifier: Classifier,
    prompts: PromptPair,
    every: Shots,
    rank: int,
    workers: int,
) -> dict[str, float]:
    """Descend Eq. 7 over both prompts on the first --shots pictures; leaves the best round's, and returns its terms.

    Of each batch this process takes every `workers`-th picture, from the `rank`-th; gradients are added up over all.
    After each round a file beside --out holds all that the next one needs, so that the same command goes on.
    """
    import torch

    from diffender.factory import command
    from diffender.utils.files import whole
    from diffender.utils.interruption import patient
    from diffender.utils.progress import TRACKERS, bar

    shots, held_out = torch.arange(len(every.ids)).tensor_split([opts.shots])
    batches = shots.split(opts.batch_size)
    parts = [(every.part(rows[rank::workers]), len(rows[rank::workers]) / len(rows)) for rows in batches]
    held_out = every.part(held_out)
    optimizer = torch.optim.Adam(prompts.parameters(), opts.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, opts.rounds * len(parts))
    best, kept, begun = {}, {}, 0
    if unfinished(opts).is_file():
        done = read_unfinished(opts)
        for what in (prompts, optimizer, schedule):
            what.load_state_dict(done[type(what).__name__])
        best, kept, begun = done["best"], done["kept"], done["rounds"]
    empty, speaks = defense.contexts.empty, rank == 0 and not opts.quiet
    log = TRACKERS[opts.track if rank == 0 else "none"](Path(opts.out).parent, asdict(opts))
    progress = bar(opts.rounds, "tuning", not speaks, initial=begun)
    with progress, patient(f"stopped after a round; go on with: {command()}") as may_stop:
        for round_ in range(begun, opts.rounds):
            terms = tuning_round(opts, defense, classifier, prompts, optimizer, schedule, parts, round_, empty)
            if held_out.ids:
                terms["held_out_iou"] = mask_fit(opts, defense, prompts, held_out, empty)
            if not best or terms.get("held_out_iou", torch.inf) > best.get("held_out_iou", 0):
                best, kept = (terms, {name: value.clone() for name, value in prompts.state_dict().items()})
            if rank == 0:
                state = {type(what).__name__: what.state_dict() for what in (prompts, optimizer, schedule)}
                state |= {"best": best, "kept": kept, "rounds": round_ + 1, "settings": resolved(opts)}
                with whole(unfinished(opts)) as partial:
                    torch.save(state, partial)
            if speaks:
                progress.write("  ".join(f"{name} {value:.4g}" for name, value in terms.items()))
            log({name: value for name, value in terms.items() if name != "round"}, round_)
            progress.update()
            may_stop()
    prompts.load_state_dict(kept)
    return best


def unfinished(opts: Options) -> Path:
    """Where a tuning that has not ended is kept."""
    return Path(f"{opts.out}.unfinished")


def resolved(opts: Options) -> dict:
    """What a tuning that goes on must share with the one that stopped."""
    from diffender.factory import model_hashes

    return settings(opts, "out") | {"sha256": model_hashes(opts)}


def read_unfinished(opts: Options) -> dict:
    """Raises InputError for a file that is damaged, or a tuning with other settings."""
    import pickle

    import torch

    from diffender.utils.errors import InputError
    from diffender.utils.files import one_line

    path, advice = unfinished(opts), "delete it to begin anew, or choose another --out"
    try:
        state = torch.load(path, map_location=opts.device if opts.device != "auto" else None, weights_only=True)
        theirs = state["settings"]
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
        raise InputError(f"{path} is damaged ({one_line(e)}); {advice}") from e
    mine = resolved(opts)
    if changed := sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)):
        raise InputError(f"{path} holds a tuning with other settings ({', '.join(changed)}); {advice}")
    return state


def tuning_round(
    opts: Options,
    defense: DIFFender,
    classifier: Classifier,
    prompts: PromptPair,
    optimizer: Optimizer,
    schedule: LRScheduler,
    parts: list[tuple[Shots, float]],
    round_: int,
    empty: Tensor,
) -> dict[str, float]:
    """A step for each batch: this process's pictures of it, and their share. Returns the mean terms."""
    import torch

    from diffender.evaluation.workers import add_up

    names, steps = ("mask", "l1", "feature", "total", "iou", "grad_L", "grad_R"), []
    for part, share in parts:
        defense.contexts = prompts(defense.model, empty)
        loss, iou = tuning_step(opts, defense, classifier, part, f"tuning {round_}")
        optimizer.zero_grad()
        (share * loss.total).backward()
        terms = share * torch.stack([*loss, iou]).detach()
        ctxs = (prompts.ctx_locate, prompts.ctx_restore)
        add_up(terms, *(ctx.grad for ctx in ctxs))
        norms = [ctx.grad.norm().item() for ctx in ctxs]
        assert min(norms) > 0, f"no gradient reaches a prompt: norms {norms}"
        optimizer.step()
        schedule.step()
        steps.append([*terms.tolist(), *norms])
    return {"round": round_} | dict(zip(names, torch.tensor(steps).mean(dim=0).tolist(), strict=True))


def mask_fit(opts: Options, defense: DIFFender, prompts: PromptPair, held_out: Shots, empty: Tensor) -> float:
    """Mean IoU of the masks on photographs that the prompts are not tuned on."""
    import torch

    from diffender.evaluation.metrics import mask_scores

    with torch.no_grad():
        defense.contexts = prompts(defense.model, empty)
        noise = defense.sample_noise(held_out.ids, opts.seed, "held out")
        found = defense.localize(held_out.attacked, noise, posterior=held_out.posterior)
    return mask_scores(found.mask, held_out.mask).iou.mean().item()


def tuning_step(
    opts: Options, defense: DIFFender, classifier: Classifier, shots: Shots, purpose: str
) -> tuple[TuningLoss, Tensor]:
    """Eq. 7 on these pictures, and the mean IoU of their masks."""
    from diffender.evaluation.metrics import mask_scores
    from diffender.losses import feature_distance, mask_cross_entropy, restoration_l1, tuning_loss
    from diffender.utils.errors import named_images

    with named_images(shots.ids):
        noise = defense.sample_noise(shots.ids, opts.seed, purpose)
        out = defense(shots.attacked, noise, posterior=shots.posterior)
    loss = tuning_loss(
        mask_cross_entropy(out.z_score - opts.theta, shots.mask, opts.printed_eq4),
        restoration_l1(out.image, shots.clean),
        feature_distance(classifier.features(out.image), shots.features),
    )
    if opts.without != "none":
        loss = loss._replace(total=loss.total - getattr(loss, opts.without))
    return loss, mask_scores(out.mask, shots.mask).iou.mean()


if __name__ == "__main__":
    run(main)
