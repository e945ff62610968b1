"""How long work will take: a bar in a terminal, plain lines elsewhere, nothing where --quiet asks for it; and numbers
along the way for TensorBoard or Weights & Biases, which are imported only when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffender.utils.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from diffender.stable_diffusion.model import LatentDiffusion

LINE_SECONDS = 30  # between two lines where there is no terminal
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left"


class Lines:
    """stderr as a file or a pipe wants it: a bar's next state is a new line, not written over the last."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def bar(what: Collection | int, description: str, quiet: bool = False, unit: str = "it", initial: int = 0) -> tqdm:
    """Progress over a collection, or over a count that `update` is told of: rate and time left, on stderr."""
    given: dict[str, object] = {"total": what} if isinstance(what, int) else {"iterable": what}
    given |= {"desc": description, "unit": unit, "initial": initial, "disable": quiet}
    if sys.stderr.isatty():
        return tqdm(**given, mininterval=1, dynamic_ncols=True)
    seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1}
    return tqdm(**given, **seconds, bar_format=LINE, file=Lines())


class Progress:
    """A bar over the work ahead, in units of one UNet evaluation; counts the evaluations that really ran.

    Work on the classifier alone is told to `advance`, at its worth in UNet evaluations; so it is for a defence without
    a diffusion model (None).
    """

    def __init__(self, model: LatentDiffusion | None, total: int, description: str, quiet: bool = False):
        self.evaluations = 0
        self.bar = bar(total, description, quiet, unit=" evaluations")
        unets = [] if model is None else [unet for unet in (model.unet, model.locator) if unet is not None]
        self.hooks = [unet.register_forward_pre_hook(self.count) for unet in unets]

    def count(self, _module: nn.Module, args: tuple) -> None:
        _x, _t, contexts = args
        self.evaluations += len(contexts)
        self.advance(len(contexts))

    def advance(self, n: int) -> None:
        self.bar.update(min(n, self.bar.total - self.bar.n))

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
