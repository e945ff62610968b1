"""Prompt tuning, Sec. 3.3: descend Eq. 7 over the context vectors of both prompts, on a few attacked images.

Nothing here touches a file or starts a process: the caller saves the state after a round, and hands in what adds up
gradients over several processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffender.config import TuningConfig
from diffender.evaluation.metrics import mask_scores
from diffender.losses import TuningLoss, feature_distance, mask_cross_entropy, restoration_l1
from diffender.pipeline import Defended, ours
from diffender.prompts import Contexts, PromptPair
from diffender.stable_diffusion.vae import Posterior
from diffender.utils.errors import named_images


class Shots(NamedTuple):
    """Attacked images and what no round of tuning changes."""

    ids: list[str]
    clean: Tensor  # (B, 3, S, S) in [0, 1]
    attacked: Tensor
    mask: Tensor  # (B, 1, S, S) in {0, 1}, 1 = patch
    posterior: Posterior  # of the attacked images, for localisation
    features: list[Tensor]  # of the clean ones, Eq. 6

    def part(self, rows: Tensor) -> "Shots":
        """The shots with these indices."""
        clean, attacked, mask = (t[rows] for t in (self.clean, self.attacked, self.mask))
        posterior = Posterior(*(moment[rows] for moment in self.posterior))
        features = [feature[rows] for feature in self.features]
        return Shots([self.ids[int(i)] for i in rows], clean, attacked, mask, posterior, features)


class Work(NamedTuple):
    """What `tune` works on. Images are told by their index in `every`."""

    every: Shots
    batches: Sequence[tuple[Tensor, float]]  # of this process: images, and their share of the batch
    held_out: Tensor  # images that the prompts are not tuned on
    attack: Callable[[], Tensor]  # all images attacked through the target's prompts, (B, 3, S, S)
    all_reduce: Callable[..., None] = lambda *tensors: None  # adds up each tensor over all processes, in place


class Tuning:
    """All that a round changes: the prompts, their optimizer and schedule, the best round so far, and new attacks."""

    def __init__(self, prompts: PromptPair, cfg: TuningConfig, batches: int):
        self.prompts = prompts
        self.optimizer = torch.optim.Adam(prompts.parameters(), cfg.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, cfg.rounds * batches)
        self.rounds = 0  # done
        self.best: dict[str, float] = {}  # its terms
        self.kept: dict[str, Tensor] = {}  # its prompts
        self.attacked: list[Tensor] = []  # all images as attacked anew, uint8 (B, 3, S, S), oldest first

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("prompts", "optimizer", "schedule")}
        return parts | {name: getattr(self, name) for name in ("rounds", "best", "kept", "attacked")}

    def load_state_dict(self, state: dict) -> None:
        for name in ("prompts", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.rounds, self.best, self.kept = state["rounds"], state["best"], state["kept"]
        self.attacked = state["attacked"]


def tune(target: Defended, tuning: Tuning, work: Work, cfg: TuningConfig) -> Iterator[dict[str, float]]:
    """Run the rounds that are left; yields the mean terms of each. At the end the prompts are those of the best round.

    A round is the best if its masks fit the images held out best, or if it is the last and nothing is held out. With
    cfg.adaptive all images are attacked anew after some rounds, and only these rounds are compared, each under the
    attack that knows its prompts.
    """
    every, held_out = work.every, work.held_out
    versions = [every, *(attacked_anew(target, every, images) for images in tuning.attacked)]
    while tuning.rounds < cfg.rounds:
        steps = []
        for rows, share in work.batches:
            shots = mixed(versions, rows, tuning.rounds)
            steps.append(step(target, tuning, shots, share, cfg, work.all_reduce))
        terms = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
        anew = cfg.adaptive > 0 and (tuning.rounds + 1) % cfg.adaptive == 0
        if anew:
            ours(target).contexts = contexts_of(target, tuning.prompts).detach()
            tuning.attacked.append((work.attack() * 255).round().byte())
            versions.append(attacked_anew(target, every, tuning.attacked[-1]))
        better = not len(held_out)  # then the last round is kept
        if len(held_out) and (anew or cfg.adaptive == 0):
            terms["held_out_iou"] = mask_fit(target, tuning.prompts, versions[-1].part(held_out), cfg.seed)
            better = terms["held_out_iou"] > tuning.best.get("held_out_iou", -1)
        if better:
            tuning.best = terms
            tuning.kept = {name: value.clone() for name, value in tuning.prompts.state_dict().items()}
        tuning.rounds += 1
        yield terms
    tuning.prompts.load_state_dict(tuning.kept)


def attacked_anew(target: Defended, every: Shots, images: Tensor) -> Shots:
    """The shots with other attacked images, uint8 (B, 3, S, S), at the same places."""
    attacked = images.to(every.clean) / 255
    return every._replace(attacked=attacked, posterior=ours(target).posterior(attacked))


def mixed(versions: Sequence[Shots], rows: Tensor, rounds: int) -> Shots:
    """The shots with these indices. Where they were attacked several times, the versions take turns over the rounds."""
    turns = [versions[(rounds + int(i)) % len(versions)].part(i[None]) for i in rows]  # of one image each
    posterior = Posterior(*map(torch.cat, zip(*(one.posterior for one in turns), strict=True)))
    attacked = torch.cat([one.attacked for one in turns])
    return versions[0].part(rows)._replace(attacked=attacked, posterior=posterior)


def contexts_of(target: Defended, prompts: PromptPair) -> Contexts:
    """The contexts of these prompts for this target, whose empty prompt stays."""
    return prompts(ours(target).model, ours(target).contexts.empty)


def step(
    target: Defended, tuning: Tuning, shots: Shots, share: float, cfg: TuningConfig, all_reduce: Callable[..., None]
) -> dict[str, float]:
    """One optimizer step on one batch, of whose images `shots` are this share; returns its terms."""
    prompts = tuning.prompts
    ours(target).contexts = contexts_of(target, prompts)
    loss, iou = eq_7(target, shots, cfg, f"tuning {tuning.rounds}")
    tuning.optimizer.zero_grad()
    (share * loss.total).backward()
    terms = share * torch.stack([*loss, iou]).detach()
    ctxs = {"grad_L": prompts.ctx_locate, "grad_R": prompts.ctx_restore}
    gradients = {name: ctx.grad for name, ctx in ctxs.items() if ctx.grad is not None}
    all_reduce(terms, *gradients.values())
    assert len(gradients) == 2, f"only one prompt has a gradient: {list(gradients)}"
    norms = [gradient.norm() for gradient in gradients.values()]
    tuning.optimizer.step()
    tuning.schedule.step()
    values = torch.cat([terms, torch.stack(norms)]).tolist()  # one transfer from a GPU, after all work is queued
    return dict(zip((*TuningLoss._fields, "iou", *gradients), values, strict=True))


def eq_7(target: Defended, shots: Shots, cfg: TuningConfig, purpose: str) -> tuple[TuningLoss, Tensor]:
    """Eq. 7 on these images, and the mean IoU of their masks."""
    defense = ours(target)
    with named_images(shots.ids):
        noise = defense.sample_noise(shots.ids, cfg.seed, purpose)
        out = defense(shots.attacked, noise, posterior=shots.posterior)
    assert out.z_score is not None and out.mask is not None  # DIFFender has both
    terms = (
        mask_cross_entropy(out.z_score - defense.cfg.theta, shots.mask, cfg.printed_eq4),
        restoration_l1(out.image, shots.clean),
        feature_distance(target.classifier.features(out.image), shots.features),
    )
    loss = TuningLoss(*terms, terms[0] + terms[1] + terms[2])
    if cfg.without != "none":
        loss = loss._replace(total=loss.total - getattr(loss, cfg.without))
    return loss, mask_scores(out.mask, shots.mask).iou.mean()


def mask_fit(target: Defended, prompts: PromptPair, held_out: Shots, seed: int) -> float:
    """Mean IoU of the masks on images that the prompts are not tuned on."""
    defense = ours(target)
    defense.contexts = contexts_of(target, prompts).detach()
    noise = defense.sample_noise(held_out.ids, seed, "held out")
    found = defense.localize(held_out.attacked, noise, posterior=held_out.posterior)
    return mask_scores(found.mask, held_out.mask).iou.mean().item()
