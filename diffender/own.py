"""Your own model under attack, from Python.

    results = diffender.benchmark(model, images, labels, attack="advp", gradient="auto", budget="laptop")

`model` is a defended classifier (`Defended`, around DIFFender or a purifier of your own), or any module from images in
[0, 1] to logits. What evaluate.py writes is written to runs/NAME, with the same report, and the results are returned.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffender.classifiers.dataset import Batch
from diffender.config import Backward, TargetOptions
from diffender.defenses import Purifier
from diffender.defenses.hardened import Hardened
from diffender.evaluation.plan import Options, build_plans, default_name, fill, refuse_unread
from diffender.evaluation.run import NO_MATTER, Experiment, finish, work
from diffender.noise import generator
from diffender.pipeline import Defended, DIFFender, Purified, check_images
from diffender.report.folder import write_report
from diffender.stable_diffusion.layers import Upsample
from diffender.utils.errors import InputError
from diffender.utils.options import change, flat, settings

IMAGENET = 1000  # so many classes have ImageNet's names, unless others are given


class AnyModel(Defended):
    """A module from images (B, 3, H, W) in [0, 1] to logits (B, K) as a victim, attacked as a whole.

    One that is random takes its numbers from torch's global generator. It sees each image alone, with that generator
    seeded from the image's noise and put back afterwards: a result knows no batch and no order.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        one = x[:1].to(next(chain(model.parameters(), model.buffers()), x).device)
        # What there is of a defence is within the model.
        super().__init__(Purifier(nn.Identity()), Alone(self, one))  # type: ignore[arg-type]  # as good as a Classifier
        self.model, self.sample_noise = model.eval(), self.seeds
        with torch.random.fork_rng():  # the caller's numbers stay as they are
            self.random = not torch.equal(model(one), model(one))

    def seeds(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor | None:
        """A seed for each image, (B,)."""
        if not self.random:
            return None
        return torch.tensor([generator(seed, i, purpose, k).initial_seed() for i in image_ids])

    def forward(self, x: Tensor, noise: Any = None) -> Tensor:
        if noise is None:
            return self.model(x)
        rows = []
        for row, seed in zip(x.split(1), noise.tolist(), strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                rows.append(self.model(row))
        return torch.cat(rows)

    def looks(self, x: Tensor, noises: Sequence[Any], batch: int = 1) -> Iterator[tuple[Purified, Tensor]]:
        for noise in noises:
            yield Purified(x, None, None, None), self(x, noise)

    def under(self, backward: Backward) -> "AnyModel":
        """Itself: it has one backward pass."""
        return self


class Alone(nn.Module):
    """The model as its attacker sees it before anything is random to them: under one noise."""

    def __init__(self, whole: AnyModel, like: Tensor):
        super().__init__()
        self.whole = [whole]  # in a list: a module that holds its holder would have no end
        self.names: list[str] | None = None
        self.mean = like.new_zeros(())  # says where images belong, as a Classifier's does

    def forward(self, x: Tensor) -> Tensor:
        (whole,) = self.whole
        return whole(x, whole.sample_noise([""] * len(x), 0, "alone"))


def benchmark(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | Sequence[int],
    attack: str = "advp",
    gradient: str | None = None,
    budget: str = "laptop",
    **options: Any,
) -> dict:
    """Attack every image, judge it, write the run's folder and report; returns what results.json holds.

    images (B, 3, S, S), float32 in [0, 1]; labels (B,), from 0 to the number of classes less one. `attack`, `gradient`
    and `budget` are evaluate.py's --attack, --grad and --preset; `options` are others of its flags by name (iters, eot,
    area, seed, name, ...), and `names`, the names of the classes. The same call with the same `name` goes on where it
    stopped. Raises InputError for what does not fit.
    """
    names = options.pop("names", None)
    y = torch.as_tensor(labels)
    check_images(images)
    victim = model if isinstance(model, Defended) else AnyModel(model, images)
    classes = victim.classifier(images[:1].to(victim.classifier.mean.device)).shape[1]
    if y.shape != (len(images),) or y.is_floating_point() or not 0 <= y.min() <= y.max() < classes:
        raise InputError(
            f"labels of shape {tuple(y.shape)} and type {y.dtype}; they are one whole number for each of the "
            f"{len(images)} images, from 0 to {classes - 1}"
        )
    names = names or victim.classifier.names or (None if classes == IMAGENET else [str(i) for i in range(classes)])
    given = {"attack": attack, "grad": gradient, "preset": budget, "images": len(images), "defense": title(victim)}
    if isinstance(victim, AnyModel):
        given |= {"grad": "auto", "trust": "off"} | ({} if victim.random else {"eot": 1})
    opts = change(Options(), **{"quiet": True, **given, **options})
    refuse_unread(opts)
    opts = fill(opts)
    folder = Path("runs") / (opts.name or default_name(opts))
    own, plans = folder / "per_image.jsonl", build_plans(opts, victim)
    experiment = Experiment(opts, folder, own, victim, plans, resolved(opts, victim, images, y), names)
    batch = Batch([f"{i:05}" for i in range(len(images))], images, y, [])
    work([experiment], batch)
    finish(experiment, batch)
    return write_report(folder)


def title(victim: Defended | AnyModel) -> str:
    """What the report calls the defence."""
    if isinstance(victim, AnyModel):
        return type(victim.model).__name__
    if isinstance(victim.defense, DIFFender):
        return "hardened" if isinstance(victim.defense, Hardened) else "diffender"
    purify = getattr(victim.defense, "purify", victim.defense)
    return getattr(purify, "__name__", type(purify).__name__)


def resolved(opts: Options, victim: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """Everything that an image's result depends on."""
    found = settings(opts, *NO_MATTER, *flat(TargetOptions()))
    if isinstance(victim.defense, DIFFender):
        found |= asdict(victim.defense.cfg)
    if isinstance(victim.defense, Hardened):
        found |= {"patch": victim.defense.cleanser.patch, "masks": victim.defense.cleanser.masks}
    derived = {id(m.kernel) for m in victim.modules() if isinstance(m, Upsample)}  # made of weights, when first used
    buffers = [b for b in victim.buffers() if id(b) not in derived]
    tensors = {"model": [*victim.parameters(), *buffers], "images": [images, labels]}
    return found | {"torch": torch.__version__, "sha256": {what: digest(found) for what, found in tensors.items()}}


def digest(tensors: Sequence[Tensor]) -> str:
    """sha256 of the values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
