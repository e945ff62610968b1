"""How long work will take: a bar in a terminal, plain lines elsewhere, nothing where --quiet asks for it; and numbers
along the way for TensorBoard or Weights & Biases, which are imported only when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffender.utils.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from tqdm import tqdm

    from diffender.stable_diffusion.model import LatentDiffusion

LINE_SECONDS = 30  # between two lines where there is no terminal
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left"
TIMED = LINE.replace("{n_fmt} of {total_fmt}, {rate_fmt}, ", "")
TIMED_BAR = "{l_bar}{bar}| {elapsed} gone, {remaining} left"


class Lines:
    """stderr as a file or a pipe wants it: a bar's next state is a new line, not written over the last."""

    last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:  # a bar that closes says its last state again
            print(line, file=sys.stderr, flush=True)
            self.last = line

    def flush(self) -> None:
        pass


def bar(what: Collection | float, description: str, quiet: bool = False, unit: str = "it", initial: float = 0) -> tqdm:
    """Progress on stderr over a collection, over a count that `update` is told of, or over a float, such as seconds of
    work: rate and time left, and of a float the time alone."""
    from tqdm import tqdm  # here, since Ctrl-C during an import at the top ends in a traceback

    given: dict[str, object] = {"total": what} if isinstance(what, (int, float)) else {"iterable": what}
    given |= {"desc": description, "unit": unit, "initial": initial, "disable": quiet}
    terminal, file = (TIMED_BAR, TIMED) if isinstance(what, float) else (None, LINE)
    if sys.stderr.isatty():
        return tqdm(**given, mininterval=1, dynamic_ncols=True, bar_format=terminal)
    seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 0}
    return tqdm(**given, **seconds, position=0, bar_format=file, file=Lines())  # no cursor moves up in a file


class Progress:
    """A bar over the seconds of work that a forecast expects; counts the UNet evaluations that really run."""

    def __init__(self, model: LatentDiffusion | None, total: float, description: str, quiet: bool = False):
        self.evaluations = 0
        self.bar = bar(float(total), description, quiet)
        unets = [] if model is None else [unet for unet in (model.unet, model.locator) if unet is not None]
        self.hooks = [unet.register_forward_pre_hook(self.count) for unet in unets]

    def count(self, _module: nn.Module, args: tuple) -> None:
        _x, _t, contexts = args
        self.evaluations += len(contexts)

    def through(self, stages: Mapping[str, float]) -> Callable[[str, float], None]:
        """A function to call with a stage and the share of it that is done: it moves the bar. `stages` says how many
        seconds each should take."""
        starts = dict(zip(stages, accumulate(stages.values(), initial=self.bar.n), strict=False))

        def hear(stage: str, done: float) -> None:
            here = min(starts[stage] + done * stages[stage], self.bar.total)
            self.bar.update(max(0.0, here - self.bar.n))

        return hear

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.bar.close()


def tensorboard(folder: Path, config: dict) -> Callable[[dict, int], None]:
    """Scalars in `folder`/tensorboard."""
    writer = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", f"`{config}`")

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def wandb(folder: Path, config: dict) -> Callable[[dict, int], None]:
    """Scalars in a Weights & Biases run of the folder's name, resumed with it; WANDB_MODE=offline sends nothing."""
    run = optional("wandb", "wandb").init(
        project="diffender", name=folder.name, id=folder.name, resume="allow", dir=str(folder), config=config
    )
    return lambda values, step: run.log(values, step=step)


def optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f"--track {package} needs a package that is not here; pip install {package}") from e


TRACKERS = {"none": lambda folder, config: lambda values, step: None, "tensorboard": tensorboard, "wandb": wandb}
