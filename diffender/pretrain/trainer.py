"""The training loop's bookkeeping, for `pretrain`: optimiser, averaged weights, checkpoints, log."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diffender.pretrain.options import Recipe
from diffender.utils.errors import InputError
from diffender.utils.files import cut_tail, refuse_damaged, save_state, write_text
from diffender.utils.images import save_figure
from diffender.utils.progress import bar

SKIPPED = 20  # steps that may be left out
ANEW = "delete it to begin anew, or choose another --out"
SHARED = ("stage", "data", "seed", "init", "batch", "crop", "samples", "reuse", "locate", "hiding")


def shared(recipe: Recipe) -> dict:
    """The settings that a training must share with the checkpoint from which it goes on, as JSON can hold them."""
    values = {name: getattr(recipe, name) for name in SHARED}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def refuse_others(path: Path, told: dict, recipe: Recipe) -> None:
    """Raises InputError unless the training at `path`, of the settings `told`, can go on by this recipe."""
    if others := [k for k, v in shared(recipe).items() if told.get(k) != v]:
        raise InputError(f"{path} holds a training with other settings ({', '.join(others)}); {ANEW}")


class Trainer:
    """AdamW with warm-up, a cosine schedule and gradient clipping, EMA weights, checkpoints and a log."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.path = recipe.out / f"{recipe.stage}.ckpt"
        self.log = recipe.out / f"{recipe.stage}.jsonl"
        self.recipe, self.model = recipe, model
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, recipe.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        self.ema = AveragedModel(model, multi_avg_fn=self.average)
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.on_save: Callable[[], None] = lambda: None  # what a stage writes beside its checkpoint
        if self.path.is_file():
            with refuse_damaged(self.path, ANEW):
                state = torch.load(self.path, map_location="cpu", weights_only=True)
                refuse_others(self.path, state["settings"], recipe)
                self.ema.load_state_dict(state["ema"])
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.seconds = state["step"], state["seconds"]
            print(f"resuming {self.path} at step {self.step}")
        if self.log.is_file():  # the steps after the checkpoint are done again
            cut_tail(self.log)
            lines = self.log.read_text("utf-8").splitlines(keepends=True)
            write_text(self.log, "".join(line for line in lines if json.loads(line)["step"] < self.step))

    def left(self) -> range:
        """The numbers of the samples that the steps still to do take."""
        return range(self.step * self.recipe.batch, self.recipe.steps * self.recipe.batch)

    def steps(self) -> Iterator[Generator]:
        """Yield a generator for each step still to do, so that a resumed run draws what it would have drawn.

        Only the samples of the unet stage without --samples differ: its store of them begins empty again.

        Ends early when --minutes are spent.
        """
        start, mark = self.seconds, time.monotonic()
        saved = mark
        progress = bar(1.0, "training", initial=self.share_done())
        while self.step < self.recipe.steps and self.share_done() < 1:
            yield Generator(self.recipe.device).manual_seed(self.recipe.seed * 10_000_000 + self.step)
            self.step += 1
            self.seconds = start + time.monotonic() - mark
            progress.set_description_str(f"training, {self.step} steps", refresh=False)
            progress.update(min(1.0, self.share_done()) - progress.n)
            if time.monotonic() - saved > 60 * self.recipe.save_minutes:
                self.save()
                saved = time.monotonic()
        self.save()
        progress.close()

    def share_done(self) -> float:
        """The share of the training that is done, by steps or by time, whichever is larger."""
        by_time = self.seconds / (60 * self.recipe.minutes) if self.recipe.minutes else 0.0
        return max(self.step / self.recipe.steps, by_time)

    def average(self, averaged: list[Tensor], current: list[Tensor], _count: Tensor) -> None:
        """Averaged weights move towards the current ones, faster at first, so that they forget where training began."""
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def update(self, loss: Tensor, **terms: Tensor) -> None:
        """One optimiser step on `loss`; `terms` go to the log. A step whose gradient is not finite is left out."""
        lr = self.recipe.lr * min(1.0, (self.step + 1) / 100)
        lr *= 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, self.share_done()))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        if not nn.utils.clip_grad_norm_(self.params, 1.0).isfinite():
            self.skipped += 1
            if self.skipped > SKIPPED:
                raise InputError(
                    f"{self.skipped} gradients were not finite, the last at step {self.step}; go on with a lower --lr"
                )
            return
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        if self.step % 50 == 0:
            line = {"step": self.step, "seconds": round(self.seconds), "loss": loss.item()}
            line |= {k: v.item() for k, v in terms.items()}
            with self.log.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": shared(self.recipe),
        }
        save_state(state, self.path)
        if self.step:
            self.on_save()


def plot_losses(log: Path, names: tuple[str, ...]) -> None:
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    for name in names:
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    axis.set(xlabel="step", yscale="log")
    axis.legend()
    save_figure(figure, log.with_name(f"{log.stem}-loss.png"))
