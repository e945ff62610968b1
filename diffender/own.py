"""Your own model under attack, from Python.

    results = diffender.benchmark(model, images, labels, attack="advp", gradient="auto", budget="laptop")

`model` is a defended classifier (`Defended`, around DIFFender or a purifier of your own), or any module from images in
[0, 1] to logits. What evaluate.py writes is written to runs/NAME, with the same report, and the results are returned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffender.attacks.patch import loud
from diffender.classifiers.dataset import Batch, digest_of_all
from diffender.classifiers.imagenet import Classifier
from diffender.config import Backward, TargetOptions
from diffender.defenses import Purifier
from diffender.defenses.hardened import Hardened
from diffender.defenses.jedi import COMPLETION, Jedi
from diffender.evaluation.options import PRESETS, Options, attacks, refuse_conflicts, refuse_unread, with_preset
from diffender.evaluation.plan import as_drawn, build_plans, default_name, refuse_unused_eot
from diffender.evaluation.run import NO_MATTER, Experiment, finish, work
from diffender.noise import preserved_rng, seeded, seeds
from diffender.pipeline import Defended, DIFFender, Purified
from diffender.report.folder import write_report
from diffender.utils.code import code_digest
from diffender.utils.errors import InputError, nearest
from diffender.utils.files import digest
from diffender.utils.images import check_images
from diffender.utils.options import change, check_options, flat, leaves, settings

IMAGENET = 1000  # so many classes have ImageNet's names, unless others are given


class AnyModel(Defended):
    """A module from images (B, 3, H, W) in [0, 1] to logits (B, K), as a victim that is attacked as a whole.

    A random module draws from torch's global generator, which is seeded for each image. In place of an undefended
    classifier stands the same module with fixed noise (`Alone`). Raises InputError for other outputs than logits.
    """

    undefended_is = "one fixed noise"

    def __init__(self, model: nn.Module, x: Tensor):
        one = x[:1].to(next(chain(model.parameters(), model.buffers()), x).device)
        both = torch.cat([one, loud(one)[0]])  # some defences are random where they see a patch alone
        # A defence, if there is one, is inside the model. So the purifier is the identity.
        super().__init__(Purifier(nn.Identity()), Alone(self, one))  # type: ignore[arg-type]  # as good as a Classifier
        self.model = model.eval()
        with preserved_rng(one.device):  # the caller's numbers stay as they are
            first, second = answer(model, both.clone()), model(both.clone())
        if not isinstance(first, Tensor) or first.ndim != 2:
            told = f"{type(first).__name__}{f' {tuple(first.shape)}' if isinstance(first, Tensor) else ''}"
            raise InputError(f"the model returns a {told}; it maps images (B, 3, H, W) to logits (B, classes)")
        if first.shape[1] > 1 and first.min() >= 0 and torch.allclose(first.sum(dim=1), first.new_ones(2), atol=1e-3):
            raise InputError("the model returns probabilities; return logits, or the logarithm of the probabilities")
        # Within rounding: a GPU may add in another order each time.
        self.random = not torch.allclose(first, second, rtol=1e-4, atol=1e-5)

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor | None:
        return seeds(image_ids, seed, purpose, k) if self.random else None

    def forward(self, x: Tensor, noise: Any = None) -> Tensor:
        x = x.clone()  # the model may change it in place
        return self.model(x) if noise is None else seeded(lambda row: (self.model(row),), x, noise)[0]

    def looks(self, x: Tensor, noises: Sequence[Any], batch: int = 1) -> Iterator[tuple[Purified, Tensor]]:
        for noise in noises:
            yield Purified(x), self(x, noise)

    def under(self, backward: Backward) -> "AnyModel":
        """Itself: it has one backward pass."""
        return self


class Alone(nn.Module):
    """The model with its noise held fixed: it stands in place of an undefended classifier."""

    def __init__(self, whole: AnyModel, like: Tensor):
        super().__init__()
        self.whole = [whole]  # in a list: a module may not hold the one that holds it
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
    and `budget` are evaluate.py's --attack, --grad and --preset; of what is not DIFFender `full` is the same as `auto`,
    its own gradient. `options` are others of the flags by name (iters, eot, area, seed, name, ...), and `names`, the
    names of the classes. The same call with the same `name` goes on where it stopped. Raises InputError for what does
    not fit.
    """
    named = options.pop("names", None)
    check_images(images, torch.float32)
    with left_as_it_was(model):
        victim = as_victim(model, images)
        classes = answer(victim.classifier, images[:1].to(victim.classifier.mean.device)).shape[1]
        if classes < 2:
            raise InputError(f"the model has logits (B, {classes}); classes are 2 or more: return a logit for each")
        y = as_labels(labels, len(images), classes)
        names = victim.classifier.names if named is None else named
        if names is None and classes != IMAGENET:
            names = [str(i) for i in range(classes)]
        if names is not None and not are_names(names, classes):
            raise InputError(f"names are {names!r:.99}; they are a list of {classes} strings, one for each class")
        asked = {"quiet": True, "attack": attack, "grad": gradient, "preset": budget, "images": len(images)}
        opts = as_drawn(options_for(victim, asked, options), victim)
        refuse_unused_eot(options.get("eot"), opts)
        name = opts.name or default_name(opts)
        folder = Path("runs") / name
        own, plans = folder / "per_image.jsonl", build_plans(opts, victim)
        told = {} if named is None else {"names": named}
        again = {"attack": attack, "gradient": gradient, "budget": budget} | options | told | {"name": name}
        call = f"diffender.benchmark(model, images, labels, {', '.join(f'{k}={v!r}' for k, v in again.items())})"
        experiment = Experiment(opts, folder, own, victim, plans, resolved(opts, victim, images, y), names, call)
        batch = Batch([f"{i:05}" for i in range(len(images))], images, y, [])
        work([experiment], batch)
        finish(experiment, batch)
        return write_report(folder)


def options_for(victim: Defended, asked: dict[str, Any], options: dict[str, Any]) -> Options:
    """The options of a run: `asked` by the arguments of `benchmark`, further `options`, and the preset's values for the
    rest. Raises InputError for what does not fit."""
    if asked["preset"] not in tuple(PRESETS):
        near = nearest(str(asked["preset"]), PRESETS)
        raise InputError(f"budget is {asked['preset']!r}; choose one of {', '.join(PRESETS)}{near}")
    refuse_foreign(options)
    if isinstance(victim, AnyModel):
        if asked["grad"] not in (None, "auto", "full"):
            raise InputError(
                f"gradient is {asked['grad']!r}; a module has its own gradient alone, auto or full: leave it out"
            )
        asked = asked | {"grad": "auto"}
    elif asked["grad"] == "full" and not isinstance(victim.defense, DIFFender):
        asked = asked | {"grad": "auto"}  # the gradient of the whole, under the name that other defences have for it
    opts = change(Options(), **asked | options, defense=title(victim))
    check_options(opts)
    refuse_conflicts(opts)
    refuse_unread(opts)
    return change(with_preset(opts), defense=title(victim))  # with_preset made its name lower case


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts the mode of every part of the caller's model back, whatever happens."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_victim(model: nn.Module, images: Tensor) -> Defended:
    """The model as a victim. Raises InputError for what is none."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    if isinstance(model, DIFFender | Purifier):
        raise InputError("a defence alone has no classes; give diffender.Defended(defense, classifier)")
    if not isinstance(model, Defended):
        return AnyModel(model, images)
    if type(model).forward is not Defended.forward and type(model).looks is Defended.looks:
        raise InputError(
            f"{type(model).__name__} overrides forward but not looks, which verdicts call; override both, or give a "
            "module that is not a Defended"
        )
    if not isinstance(model.classifier, Classifier | Alone):
        raise InputError(
            f"the classifier behind the defence is a {type(model.classifier).__name__}; wrap it so that its size and "
            "normalisation are known: Classifier(net, ClassifierConfig(...)) of diffender.classifiers.imagenet"
        )
    return model


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """model(x). Raises InputError for weights of a type that does not take x."""
    try:
        return model(x)
    except RuntimeError as e:  # others may be meant: a model may convert what it is given
        others = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype != x.dtype}
        if not others or "type" not in str(e):
            raise
        raise InputError(
            f"the model's weights are {', '.join(sorted(others))}; benchmark takes float32: call .float()"
        ) from e


def as_labels(labels: Tensor | Sequence[int], images: int, classes: int) -> Tensor:
    """Labels (B,). Raises InputError unless they fit the images and the classes."""
    wanted = f"they are one whole number for each of the {images} images, from 0 to {classes - 1}"
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"labels are {labels!r:.99}; {wanted}") from e
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if y.shape != (images,) or not whole or not 0 <= y.min() <= y.max() < classes:
        raise InputError(f"labels of shape {tuple(y.shape)} and type {y.dtype}; {wanted}")
    return y.long()


def are_names(names: Any, classes: int) -> bool:
    """Whether they are a list of strings, one for each class."""
    several = isinstance(names, Sequence) and not isinstance(names, str)
    return several and len(names) == classes and all(isinstance(name, str) for name in names)


def refuse_foreign(options: dict[str, Any]) -> None:
    """Raises InputError for options that evaluate.py does not have or keeps, or that repeat an argument."""
    kept = {"device", "table", "rows", "figure", "folds", "frames", "tuning_data", "shard", "list", "dry_run"}
    told, of_the_model = {"grad", "preset", "images", "defense"}, {leaf.name for leaf in leaves(TargetOptions())}
    known = {leaf.name for leaf in leaves(Options())} - kept - told - of_the_model
    if unknown := sorted(options.keys() - known):
        why = f"is unknown{nearest(unknown[0], sorted(known))}"
        why = "belongs to evaluate.py alone" if unknown[0] in kept else why
        why = "is told by the arguments" if unknown[0] in told else why
        why = "is settled in the model that you give" if unknown[0] in of_the_model else why
        raise InputError(f"option {unknown[0]} {why}; options are {', '.join(sorted(known))}")


def title(victim: Defended | AnyModel) -> str:
    """What the report calls the defence. What is not this package's is marked, so that no name of it is taken."""
    if isinstance(victim.defense, DIFFender):
        return "hardened" if isinstance(victim.defense, Hardened) else "diffender"
    own = victim.model if isinstance(victim, AnyModel) else getattr(victim.defense, "purify", victim.defense)
    name = getattr(own, "__name__", type(own).__name__)
    return f"{name if name.isidentifier() else 'purifier'} (own)"


def resolved(opts: Options, victim: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """Everything that an image's result depends on."""
    found = settings(opts, *NO_MATTER, *flat(TargetOptions()))
    if isinstance(victim.defense, DIFFender):
        found |= asdict(victim.defense.cfg)
    if isinstance(victim.defense, Hardened):
        cleanser = victim.defense.cleanser
        found |= {"patch": cleanser.largest(images.shape[-1]), "masks": cleanser.masks}
        found |= {"otherwise": victim.defense.otherwise}
    tensors = {"model": [*victim.parameters(), *victim.buffers()], "images": [images, labels]}
    hashes = {what: digest({str(i): t for i, t in enumerate(group)}, {}) for what, group in tensors.items()}
    if isinstance(getattr(victim.defense, "purify", None), Jedi):
        hashes["jedi"] = digest_of_all([COMPLETION])  # its network is no part of it
    return found | {
        "torch": torch.__version__,
        "sha256": hashes | {"code": code_digest(victim, *attacks(opts).values())},
    }
