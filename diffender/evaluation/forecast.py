"""What an evaluation will cost, in passes of the defence and in time, known before it starts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from diffender.evaluation.memory import GIB, footprint, held_bytes, kept_bytes, peak_bytes
from diffender.evaluation.plan import (
    AREAS,
    COSTLY,
    Options,
    attacks,
    budget,
    config_of,
    describe,
    kinds,
    recorded_steps,
)
from diffender.factory import pick_dtype
from diffender.noise import generator
from diffender.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from diffender.pipeline import Defended

WARM, LONG = 3, 20.0  # further passes that are measured, as long as the fastest took fewer seconds
PLAIN = 4  # UNet evaluations that a step on the classifier alone is worth, on a CPU
COST = {  # of a step, in forward passes
    "bpda": 1.1, "bpda-mask": 1.9, "surrogate": 3.4, "full": 3.6, "full+loc": 3.6, "evade": 1.5, "auto": 3.6,
}  # fmt: skip


class Forecast(NamedTuple):
    """What an experiment will cost, from one measured pass of its defence."""

    passes: float  # of attacks and verdicts
    after: float  # of checks and curves, when all images are done
    seconds: float  # of a pass
    evaluations: int  # of a UNet in a pass, or what a pass is worth in them
    memory: str  # in words

    @property
    def work(self) -> int:
        return round(self.passes * self.evaluations)


def forecast(opts: Options, target: Defended, x: Tensor, parts: list[tuple[list[int], bool]]) -> Forecast:
    """The forecast for the images of `parts`, from one pass measured on x (1, 3, S, S)."""
    x, side = x.clone(), x.shape[-1] // 4
    x[..., :side, :side] = torch.rand(side, side, generator=generator("forecast"))  # something to restore
    noise = target.sample_noise(["estimate"], opts.run.seed, "estimate")
    with Progress(target.defense.model, 0, "", quiet=True) as progress:
        seconds = timed(target, x, noise)
    for _ in range(WARM):  # a first pass waits for memory and for kernels, which counts where passes are short
        seconds = min(seconds, timed(target, x, noise)) if seconds < LONG else seconds
    count = {costly: sum(len(part) for part, c in parts if c == costly) for costly in (True, False)}
    passes = sum(n * costs(opts, costly) for costly, n in count.items())
    checks = {"off": 0, "quick": 50 + 8 * opts.eot, "full": 50 + 100 * opts.eot * opts.iters}[opts.trust]
    after = opts.trust_images * checks * (opts.attack != "none") + curve_costs(opts) * sum(count.values())
    return Forecast(passes, after, seconds, progress.evaluations or PLAIN, memory_needed(opts, target, x, parts))


def timed(target: Defended, x: Tensor, noise: object) -> float:
    """Seconds of one pass."""
    started = time.monotonic()
    target(x, noise)
    return time.monotonic() - started


def announce(opts: Options, forecasts: list[Forecast]) -> None:
    """Say before the start what will be done, what it will cost, and what it leaves out."""
    total = sum((f.passes + f.after) * f.seconds for f in forecasts)
    if len(forecasts) > 1:
        print(f"{len(forecasts)} experiments, about {duration(total)}{max((f.memory for f in forecasts), key=len)}")
    else:
        (only,) = forecasts
        each = f"{only.passes + only.after:.0f} passes of the defence of {only.seconds:.2f} s each"
        print(f"about {duration(total)}: {each}{only.memory}")
    if opts.preset == "paper" and opts.attack != "none":
        step = opts.eot * sum(COST[kind] for kind in kinds(opts)) * sum(f.seconds for f in forecasts)
        print(f"that is {step:.1f} s an image and step; the paper's 64 hours for 512 images and 100 steps are 4.5 s")
    elif opts.preset != "strong" and opts.attack != "none":
        strong = replace(opts, **budget(opts, "strong"))
        whole = strong.images * costs(strong, True) * sum(f.seconds for f in forecasts)
        print(
            f"left out against --preset strong ({strong.images} images, {strong.iters} steps, EOT {strong.eot}, "
            f"{strong.restarts} restarts, every gradient): {describe(opts)} on {opts.images}; all of it would take "
            f"about {duration(whole)} here"
        )


def memory_needed(opts: Options, target: Defended, x: Tensor, parts: list[tuple[list[int], bool]]) -> str:
    """The memory needed by a defence with a diffusion model, in words."""
    model = target.defense.model
    if model is None:
        return ""
    one = footprint(
        model.cfg, pick_dtype(opts.target.defense.model.dtype, x.device), target.classifier.net, x.shape[-1]
    )
    draws = config_of(opts).draws
    side_by_side = min(opts.batch_size, max((len(part) for part, _ in parts), default=1))
    above = peak_bytes(one, side_by_side * opts.eot_batch, draws, model.micro_batch)  # verdicts take less
    if model.keep:
        rows = side_by_side * min(opts.eot, opts.eot_batch)
        above = max(above, kept_bytes(one, rows, draws, recorded_steps(opts)))
    peak = held_bytes(x.device) + above
    return f"; at most {peak / GIB:.1f} GiB" + (f", micro-batches of {model.micro_batch}" if model.micro_batch else "")


def costs(opts: Options, costly: bool) -> float:
    """What an image takes, in forward passes of the defence: attacks, choices among patches, verdicts."""
    total = float(opts.verdicts)
    for cls in attacks(opts).values():
        total += opts.verdicts
        if cls.access == "queries":
            total += opts.queries + opts.verdicts + 0.06 * opts.queries_undefended
        elif cls.access == "gradient":
            total += 0.25 * opts.iters_undefended
            for kind in kinds(opts):
                if kind != "transfer" and (costly or kind not in COSTLY):
                    total += opts.verdicts + opts.restarts * (opts.eot * opts.iters * COST[kind] + 3 * max(3, opts.eot))
    return total


def curve_costs(opts: Options) -> float:
    """What an image takes for --curves, in forward passes of the defence."""
    if opts.curves == "off":
        return 0
    columns = 1 + len(attacks(opts)) * (1 + len(kinds(opts)))
    sizes = len(AREAS) * costs(opts, costly=True) / max(1, len(attacks(opts))) if opts.curves == "all" else 0
    return 3 * columns + sizes


def duration(seconds: float) -> str:
    """Rough words for a length of time."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
