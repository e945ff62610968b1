"""What an evaluation will cost in time and memory, known before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from diffender.attacks.expectation import Task, Victim, samples
from diffender.attacks.patch import loud, margin
from diffender.evaluation.memory import GIB, footprint, held_bytes, kept_bytes, peak_bytes
from diffender.evaluation.options import Options, adaptive_kinds, attacks, budget, kinds
from diffender.evaluation.plan import AREAS, backward_of, config_of, describe, recorded_steps

if TYPE_CHECKING:
    from torch import Tensor

    from diffender.pipeline import Defended

LONG = 20.0  # seconds: where a pass takes longer, other costs are estimated from it by COST, not measured
# In passes of the defence: a query and a step on the undefended classifier, a query that hides, and a sample of each
# gradient.
COST = {
    "pass": 1.0, "query": 0.06, "undefended": 0.25, "hiding": 0.6,
    "bpda": 1.1, "bpda-mask": 1.9, "surrogate": 3.4, "full": 3.6, "full+loc": 3.6, "evade": 1.5, "auto": 3.6,
}  # fmt: skip


class Forecast(NamedTuple):
    """What an experiment will cost."""

    parts: list[dict[str, float]]  # of each batch, the seconds of `clean` and of each variant of an attack
    after: float  # the seconds of checks and curves, when all images are done
    seconds: dict[str, float]  # of everything in COST
    memory: tuple[int, str]  # bytes at most, and in words

    @property
    def work(self) -> float:
        """Seconds of attacks and verdicts."""
        return sum(sum(part.values()) for part in self.parts)


def forecast(opts: Options, target: Defended, x: Tensor, parts: list[list[int]], made: Sequence[bool]) -> Forecast:
    """The forecast for the images of `parts`, from passes and gradients measured on x (1, 3, S, S).

    `made` says of each part whether its patches of the undefended classifier come from another experiment. With --quiet
    nothing is measured, unless it is a dry run.
    """
    silent = opts.run.quiet and not opts.dry_run
    seconds = COST if silent else measured(opts, target, x)
    if target.sample_noise(["estimate"], opts.run.seed, "estimate") is None:
        opts = replace(opts, verdicts=1)  # a deterministic defence needs one alone
    alone = costs(opts, seconds)
    shared = costs(opts, seconds | {"query": 0.0, "undefended": 0.0})  # the patches of the classifier are there
    of_parts = [shared if is_made else alone for is_made in made]
    todo = [{v: len(part) * cost for v, cost in each.items()} for part, each in zip(parts, of_parts, strict=True)]
    checks = {"off": 0, "quick": 70, "full": 70 + 100 * opts.eot * opts.iters}[opts.trust]
    after = opts.trust_images * checks * seconds["pass"] if opts.attack != "none" else 0.0
    after += sum(len(part) for part in parts) * curve_costs(opts, seconds)
    return Forecast(todo, after, seconds, (0, "") if silent else memory_needed(opts, target, x, parts))


def measured(opts: Options, target: Defended, x: Tensor) -> dict[str, float]:
    """Seconds per image of each entry of COST. Entries that these options use are measured.

    The others are the entry of COST times the seconds of one pass.
    """
    x, patch = loud(x)  # something to restore
    noise = target.sample_noise(["forecast"], opts.run.seed, "forecast")

    def look(rows: int) -> None:
        for _ in target.looks(x, [noise] * rows, rows):
            pass

    def step(victim: Victim, rows: int) -> None:
        y = torch.zeros(1, dtype=torch.long, device=x.device)
        task = Task(victim, x, y, ["forecast"], opts.run.seed, partial(margin, y=y))
        for _ in samples(task, lambda k: (x, patch, task.noise("forecast", k)), rows, rows):
            pass

    undefended = target.undefended()
    wide = min(opts.eot, opts.eot_batch)
    found = {"pass": timed(look, min(opts.verdicts, opts.eot_batch))}
    if found["pass"] < LONG:
        found["query"] = timed(lambda rows: undefended(x, None), 1)
        found["undefended"] = timed(partial(step, undefended), 1)
        for kind in adaptive_kinds(opts):
            found[kind] = timed(partial(step, target.under(backward_of(opts, kind))), wide)
        if "evade" in kinds(opts) and any(cls.access == "queries" for cls in attacks(opts).values()):
            hiding = target.under(backward_of(opts, "evade"))
            found["hiding"] = timed(lambda rows: hiding.with_penalty(x, noise, patch), 1)
    return {what: cost * found["pass"] for what, cost in COST.items()} | found


def timed(run: Callable[[int], None], rows: int) -> float:
    """Seconds per row of run(rows). The second of two runs counts, unless the first takes more than LONG a row.

    The first run also waits for memory and for kernels.
    """
    for _ in range(2):
        started = time.monotonic()
        run(rows)
        seconds = (time.monotonic() - started) / rows
        if seconds > LONG:
            break
    return seconds


def announce(opts: Options, forecasts: list[Forecast]) -> None:
    """Say before the start what will be done, what it will cost, and what it leaves out."""
    total = sum(f.work + f.after for f in forecasts)
    memory = max(f.memory for f in forecasts)[1]
    if len(forecasts) > 1:
        print(f"{len(forecasts)} experiments, about {duration(total)}{memory}")
        return
    (only,) = forecasts
    adaptive = adaptive_kinds(opts)
    told = ", ".join(f"{what} {only.seconds[what]:.2f} s" for what in ("pass", *adaptive))
    print(f"about {duration(total)}: {told}{memory}")
    if opts.preset == "paper" and adaptive:
        step = opts.eot * sum(only.seconds[kind] for kind in adaptive)
        print(f"that is {step:.1f} s an image and step; the paper's 64 hours for 512 images and 100 steps are 4.5 s")
    elif opts.preset != "strong" and opts.attack != "none":
        strong = replace(opts, **budget(opts, "strong"))
        whole = strong.images * sum(costs(strong, only.seconds).values())
        print(
            f"left out against --preset strong ({strong.images} images, {strong.iters} steps, EOT {strong.eot}, "
            f"{strong.restarts} restarts, every gradient): {describe(opts)} on {opts.images}; all of it would take "
            f"about {duration(whole)} here"
        )


def memory_needed(opts: Options, target: Defended, x: Tensor, parts: list[list[int]]) -> tuple[int, str]:
    """The memory needed by a defence with a diffusion model, in bytes and in words."""
    model = target.defense.model
    if model is None:
        return 0, ""
    try:
        one = footprint(model, target.classifier.net, x.shape[-1])
    except RuntimeError:  # of a classifier that looks at values, which tensors without storage have not
        return 0, "; the memory needed is not known"
    draws = config_of(opts).draws
    images = min(opts.batch_size, max((len(part) for part in parts), default=1))
    verdict_rows, attack_rows = images * opts.eot_batch, images * min(opts.eot, opts.eot_batch)
    above = peak_bytes(one, verdict_rows, draws, model.micro_batch)
    if model.keep:
        above = max(above, kept_bytes(one, attack_rows, draws, recorded_steps(opts)))
    peak = held_bytes(x.device) + above
    micro = f", micro-batches of {model.micro_batch}" if model.micro_batch else ""
    return peak, f"; at most {peak / GIB:.1f} GiB{micro}"


def costs(opts: Options, of: Mapping[str, float]) -> dict[str, float]:
    """What an image takes, for `clean` and each variant of an attack: patches made, choices among them, verdicts. `of`
    says what everything in COST takes."""
    verdicts = opts.verdicts * of["pass"]
    found = {"clean": verdicts}
    for name, cls in attacks(opts).items():
        found[f"{name}/transfer"] = verdicts
        if cls.access == "queries":
            found[f"{name}/transfer"] += opts.queries_undefended * of["query"]
            found[f"{name}/queries"] = verdicts + opts.queries * of["pass"]
            if "evade" in kinds(opts):
                found[f"{name}/evade"] = verdicts + opts.queries * of["hiding"]
        elif cls.access == "gradient":
            found[f"{name}/transfer"] += opts.iters_undefended * (of["undefended"] + cls.moves * of["query"])
            for kind in adaptive_kinds(opts):
                chosen = 3 * max(3, opts.eot) * of["pass"]
                attempt = opts.iters * (opts.eot * of[kind] + cls.moves * of["pass"]) + chosen
                found[f"{name}/{kind}"] = verdicts + opts.restarts * attempt
    return found


def curve_costs(opts: Options, of: Mapping[str, float]) -> float:
    """What an image takes for --curves."""
    if opts.curves == "off":
        return 0
    shown = costs(opts, of)  # of clean images and of each variant of an attack
    whole = sum(shown.values()) / max(1, len(attacks(opts)))
    over_theta = 3 * len(shown) * of["pass"] if opts.defense == "diffender" else 0
    return over_theta + (len(AREAS) * whole if opts.curves == "all" else 0)


def duration(seconds: float) -> str:
    """Rough words for a length of time."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
