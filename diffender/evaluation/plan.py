"""What an evaluation will do: from its options to a target and its attacks, known before anything runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from diffender.config import PAPER, THROUGH_RESTORATION, Backward, DIFFenderConfig
from diffender.evaluation.options import Options, adaptive_kinds, attacks, is_ours, kinds, shard_of
from diffender.utils.errors import InputError
from diffender.utils.options import change, flagged

if TYPE_CHECKING:
    from diffender.evaluation.verdicts import Plan
    from diffender.pipeline import Defended
    from diffender.stable_diffusion.model import LatentDiffusion

AREAS = (0.01, 0.02, 0.05, 0.1)  # of patches in the curve over their size


def method_of(opts: Options) -> dict[str, Any]:
    """The settings given instead of the model's. --preset paper gives them all, and flags override it."""
    return (asdict(PAPER) if opts.preset == "paper" else {}) | opts.target.defense.method


def config_of(opts: Options) -> DIFFenderConfig:
    """The settings of the method, those that suit the model included."""
    from diffender import factory

    return factory.config_of(opts.target.defense.model, method_of(opts))


def sources(opts: Options) -> dict[str, str]:
    """Where each setting of the method comes from."""
    model, given = opts.target.defense.model, opts.target.defense.method
    suits = f"suits {'the embedded model' if model.embedded else model.weights or model.model}"
    usual = "--preset paper" if opts.preset == "paper" else suits
    return {name: flagged(name) if name in given else usual for name in asdict(PAPER)}


def of_this_shard(opts: Options, count: int) -> list[int]:
    """The indices, out of `count` images, that this shard does."""
    shard, shards = shard_of(opts.shard)
    return list(range(shard, count, shards))


def default_name(opts: Options) -> str:
    """A folder name made of the time in microseconds, since other runs may start within the same second."""
    return f"{datetime.now():%Y%m%d-%H%M%S-%f}-{opts.attack.replace(',', '+')}"


def build_target(opts: Options, model: LatentDiffusion | None = None) -> Defended:
    """The classifier behind the defence, with micro-batches that fit the memory allowed, or activations kept where they
    fit the memory free."""
    from diffender.defenses import build
    from diffender.evaluation.memory import GIB, fit_micro_batch, footprint, held_bytes, keep_or_recompute
    from diffender.factory import open_target, pick_device

    target = open_target(change(opts.target, **method_of(opts)), pick_device(opts.run.device), model)
    model, classifier = target.defense.model, target.classifier
    device, draws = classifier.mean.device, config_of(opts).draws
    one = partial(footprint, model, classifier.net, classifier.cfg.size)
    verdict_rows, attack_rows = opts.batch_size * opts.eot_batch, opts.batch_size * min(opts.eot, opts.eot_batch)
    if opts.max_memory is not None:
        model.keep = False  # as the limit reckons
        model.micro_batch = fit_micro_batch(one(), verdict_rows, draws, held_bytes(device), int(opts.max_memory * GIB))
    elif opts.target.defense.model.keep is None:  # what other defences than DIFFender would keep is not known
        model.keep = is_ours(opts) and keep_or_recompute(one(), attack_rows, draws, recorded_steps(opts), device)
    return build(opts.defense, target)


def recorded_steps(opts: Options) -> int:
    """UNet evaluations of restoration that the gradients asked for pass through."""
    return config_of(opts).evaluations if set(adaptive_kinds(opts)) & set(THROUGH_RESTORATION) else 0


def backward_of(opts: Options, kind: str) -> Backward:
    """The backward pass of a gradient of that kind."""
    return replace(opts.backward, mode=kind, ste=opts.ste)


def attack_flags(opts: Options) -> dict[str, Any]:
    """What an attack on the defence is made from, by `Attack.from_flags`."""
    return vars(opts.patch) | {k: getattr(opts, k) for k in ("iters", "eot", "eot_batch", "restarts", "queries")}


def as_drawn(opts: Options, target: Defended) -> Options:
    """The options with EOT 1 where all EOT samples would be equal: without noise, and with the patch at one place."""
    same = target.sample_noise(["0"], 0, "plan") is None and opts.patch.location != "eot"
    return replace(opts, eot=1) if same else opts


def refuse_unused_eot(asked: int | None, opts: Options) -> None:
    """Raises InputError where another EOT was asked for than the options have, as drawn."""
    if asked not in (None, opts.eot):
        raise InputError(f"--eot {asked}: {opts.defense} draws no noise, so all samples are the same; leave it out")


def build_plans(opts: Options, target: Defended) -> list[Plan]:
    """What each attack does to the classifier alone, where nothing is random but the place, and to the defence."""
    from diffender.evaluation.verdicts import Plan

    given = attack_flags(opts)
    eot = opts.eot if opts.patch.location == "eot" else 1
    by_queries = {"queries": opts.queries_undefended, "iters": opts.iters_undefended}
    by_gradient = {"iters": opts.iters_undefended, "eot": eot, "restarts": 1}
    plans = []
    for name, cls in attacks(opts).items():
        base = cls.from_flags(given | (by_queries if cls.access == "queries" else by_gradient))
        attack, adaptive = cls.from_flags(given), {}
        if cls.access == "queries":
            adaptive["queries"] = (attack, target)
            if "evade" in kinds(opts):  # the same search, which hides as well
                adaptive["evade"] = (attack, target.under(backward_of(opts, "evade")))
        elif cls.access == "gradient":
            for kind in adaptive_kinds(opts):
                adaptive[kind] = (attack, target.under(backward_of(opts, kind)))
        plans.append(Plan(name, base, adaptive))
    return plans


def describe(opts: Options) -> str:
    """The budget in a few words."""
    access = {cls.access for cls in attacks(opts).values()}
    plural = "s" if opts.restarts > 1 else ""
    steps = (
        f"{opts.iters} steps, EOT {opts.eot}, {opts.restarts} restart{plural} "
        f"(classifier alone: {opts.iters_undefended} steps)"
        if adaptive_kinds(opts)
        else f"{opts.iters_undefended} steps on the classifier alone"
    )
    queries = f"{opts.queries} queries (classifier alone: {opts.queries_undefended})"
    told = [text for kind, text in (("gradient", steps), ("queries", queries)) if kind in access]
    return ", ".join(told) or ("nothing optimised" if access else "no attack")
