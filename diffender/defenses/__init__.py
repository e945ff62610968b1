"""DIFFender and what it is compared with: names to defended classifiers, f(x, noise) -> logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffender.classifiers.dataset import list_items, load_image
from diffender.config import EXACT, Backward
from diffender.defenses.diffpure import DiffPure
from diffender.defenses.dw import DW, guided
from diffender.defenses.fnc import fnc, reestimate_statistics
from diffender.defenses.hardened import Hardened
from diffender.defenses.jedi import jedi
from diffender.defenses.jpeg import JPEG
from diffender.defenses.lgs import LGS
from diffender.defenses.patchcleanser import PatchCleanser
from diffender.defenses.smoothing import Smoothing
from diffender.noise import seeded, seeds
from diffender.ops import resize, straight_through
from diffender.pipeline import Defended, DIFFender, Purified, check_images, drawn
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError, nearest

Purify = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]  # images to purified ones, and to their masks

FAR = 10  # values beyond are no longer those of an image, clamped or not


@runtime_checkable
class Diffusing(Protocol):
    """A defence that takes noise: only those that diffuse do."""

    def __call__(self, x: Tensor, noise: Tensor) -> Tensor: ...

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor: ...


class Purifier(nn.Module):
    """A function of images with DIFFender's signature and its two extreme backward passes.

    bpda is the identity; anything else (`auto`) differentiates what is differentiable. What is not counts as a constant
    or is passed straight through, as each defence's own file says. `random`: purify draws from torch's global
    generator, which is seeded for each image.
    """

    def __init__(self, purify: Purify | Diffusing, model: LatentDiffusion | None = None, random: bool = False):
        super().__init__()
        self.purify, self.model, self.random = purify, model, random

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Tensor | None:
        if isinstance(self.purify, Diffusing):
            return self.purify.sample_noise(image_ids, seed, purpose, k)
        return seeds(image_ids, seed, purpose, k) if self.random else None

    def forward(self, x: Tensor, noise: Tensor | None = None, backward: Backward = EXACT) -> Purified:
        check_images(x)
        if backward.mode == "bpda":
            out = self(x.detach(), noise)
            return out._replace(image=straight_through(out.image, x))
        if isinstance(self.purify, Diffusing):
            return Purified(*checked(self.purify(x.clone(), drawn(noise)), x))
        answer = partial(answered, self.purify)
        return Purified(*(seeded(answer, x, drawn(noise)) if self.random else answer(x)))


def answered(purify: Purify, x: Tensor) -> tuple[Tensor, ...]:
    """What a purifier makes of a copy of x, which it may change in place."""
    return checked(purify(x.clone()), x)


def checked(out: Any, x: Tensor) -> tuple[Tensor, ...]:
    """What a purifier makes of x: images, and masks if it has them. Raises InputError for anything else."""
    image, mask = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    parts = {"images": image} if mask is None else {"images": image, "masks": mask}
    for part in parts.values():
        if not isinstance(part, Tensor):
            told = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
            told += f" that holds a {type(part).__name__}" * (part is not out)
            raise InputError(
                f"the purifier returns {told}; it returns a tensor of images (B, 3, H, W), or a tuple of that and a "
                "tensor of masks (B, 1, H, W)"
            )
    for (what, part), channels in zip(parts.items(), (3, 1), strict=False):
        wanted = (len(x), channels, *x.shape[-2:])
        if (part.shape, part.dtype, part.device) != (wanted, x.dtype, x.device):
            raise InputError(
                f"the purifier makes {what} {tuple(part.shape)}, {part.dtype}, {part.device} of images "
                f"{tuple(x.shape)}; return {what} {wanted}, {x.dtype}, {x.device}"
            )
        low, high = part.detach().aminmax()
        if max(-low, high) > FAR:
            raise InputError(
                f"the purifier makes {what} with values in [{low:.3g}, {high:.3g}]; they lie in [0, 1]: divide by 255"
            )
    return tuple(parts.values())


class Entry(NamedTuple):
    build: Callable[..., Defended]  # (target, **settings), which are keywords with defaults
    passed_to: Callable | None = None  # what takes these keywords, if `build` only passes them on

    @property
    def settings(self) -> dict[str, int | float | str]:
        """The defence's settings and their defaults."""
        parameters = inspect.signature(self.passed_to or self.build).parameters.values()
        return {p.name: p.default for p in parameters if isinstance(p.default, int | float | str)}


def pure(purify: Callable) -> Entry:
    """The entry of a defence that needs only its settings."""
    return Entry(lambda target, **settings: Defended(Purifier(purify(**settings)), target.classifier), purify)


def build_dw(target: Defended, **settings: Any) -> Defended:
    network = target.classifier
    if any(isinstance(m, nn.ReLU | nn.ReLU6) for m in network.modules()):
        network = guided(network)
    return Defended(Purifier(DW(network, **settings)), target.classifier)


def build_fnc(target: Defended, alpha: float = 1.1, statistics: str = "") -> Defended:
    """`statistics` names photographs (a folder or csv, 1000 or more, none evaluated) to estimate BatchNorm's anew."""
    twin = fnc(target.classifier, alpha)
    if statistics:
        items, cfg = list_items(statistics), target.classifier.cfg
        size = min(50, len(items))  # all batches weigh the same, so a rest would weigh too much
        parts = [items[i : i + size] for i in range(0, len(items) - size + 1, size)]
        reestimate_statistics(twin, (torch.stack([load_image(i.path, cfg) for i in part]) for part in parts))
    return Defended(Purifier(nn.Identity()), twin, bare=target.classifier)


def build_diffpure(target: Defended, **settings: Any) -> Defended:
    d = target.defense
    assert isinstance(d, DIFFender)  # as `build` asks
    purify = DiffPure(d.model, d.contexts.empty, d.blank, **settings)
    return Defended(Purifier(purify, d.model), target.classifier)


def build_hardened(target: Defended, area: float = 0.05, masks: int = 4, otherwise: str = "diffender") -> Defended:
    """`area` is the share of the largest square patch to withstand, `masks` the number of windows along an axis.
    `otherwise` answers where no windows agree: diffender, or, as in PatchCleanser, the majority."""
    d = target.defense
    assert isinstance(d, DIFFender)  # as `build` asks
    return Defended(Hardened(d, PatchCleanser(target.classifier, area, masks), otherwise), target.classifier)


def build_round_trip(target: Defended) -> Defended:
    """Control: to the size that DIFFender works at and back, nothing else."""
    d = target.defense
    assert isinstance(d, DIFFender)  # as `build` asks
    return Defended(Purifier(lambda x: resize(resize(x, d.size), x.shape[-2:])), target.classifier)


DEFENSES = {
    "diffender": Entry(lambda target: target),
    "hardened": Entry(build_hardened),
    "none": Entry(lambda target: Defended(Purifier(nn.Identity()), target.classifier)),
    "resize": Entry(build_round_trip),
    "vae": Entry(lambda target: build_diffpure(target, t_star=0.0, steps=0)),
    "jpeg": pure(JPEG),
    "smoothing": pure(Smoothing),
    "dw": Entry(build_dw, DW),
    "lgs": pure(LGS),
    "fnc": Entry(build_fnc),
    "diffpure": Entry(build_diffpure, DiffPure),
    "jedi": pure(jedi),
}


def parse_defense(text: str) -> tuple[str, dict[str, int | float | str]]:
    """ "jpeg:quality=50" to its name and settings. Raises InputError for what does not exist."""
    name, _, rest = text.partition(":")
    if name not in DEFENSES:
        raise InputError(
            f"unknown defence {name!r}; choose one of {', '.join(DEFENSES)}{nearest(name, DEFENSES)}; one of your own "
            "is attacked from Python, by diffender.benchmark"
        )
    defaults, settings = DEFENSES[name].settings, {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            settings[key] = type(defaults[key])(value)
        except (KeyError, ValueError) as e:
            known = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise InputError(f"setting {part!r} of defence {name}; its settings and their defaults: {known}") from e
    return name, settings


def build(text: str, target: Defended) -> Defended:
    """The defence that a name, or a name with settings as "jpeg:quality=50", stands for, around target's classifier.

    target is DIFFender: it lends its diffusion model, at its size, to the defences that need one. Move it to its
    device first: a defence keeps what it took, and does not follow a later move.
    """
    name, settings = parse_defense(text)
    return DEFENSES[name].build(target, **settings)
