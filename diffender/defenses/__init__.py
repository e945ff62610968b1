"""DIFFender and what it is compared with: names to defended classifiers, f(x, noise) -> logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from diffender.classifiers.dataset import list_photographs, load_image
from diffender.defenses.diffpure import DiffPure
from diffender.defenses.dw import DW, guided
from diffender.defenses.fnc import fnc, reestimate_statistics
from diffender.defenses.hardened import Hardened
from diffender.defenses.jedi import Jedi
from diffender.defenses.jpeg import JPEG
from diffender.defenses.lgs import LGS
from diffender.defenses.patchcleanser import PatchCleanser
from diffender.defenses.purifier import Purifier
from diffender.defenses.smoothing import Smoothing
from diffender.ops import resize
from diffender.pipeline import Defended, ours
from diffender.utils.errors import InputError, nearest


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
    """`statistics` names photographs to estimate BatchNorm's anew: a folder, or a csv with a column `file`; 1000 or
    more, none evaluated."""
    twin = fnc(target.classifier, alpha)
    if statistics:
        files, cfg = list_photographs(statistics), target.classifier.cfg
        size = min(50, len(files))  # all batches weigh the same, so a rest would weigh too much
        parts = [files[i : i + size] for i in range(0, len(files) - size + 1, size)]
        reestimate_statistics(twin, (torch.stack([load_image(file, cfg) for file in part]) for part in parts))
    return Defended(Purifier(nn.Identity()), twin, bare=target.classifier)


def build_diffpure(target: Defended, **settings: Any) -> Defended:
    d = ours(target)
    purify = DiffPure(d.model, d.contexts.empty, d.blank, **settings)
    return Defended(Purifier(purify, d.model), target.classifier)


def build_hardened(target: Defended, area: float = 0.05, masks: int = 4, otherwise: str = "diffender") -> Defended:
    """`area` is the share of the largest square patch to withstand, `masks` the number of windows along an axis.
    `otherwise` answers where no windows agree: diffender, or, as in PatchCleanser, the majority."""
    return Defended(Hardened(ours(target), PatchCleanser(target.classifier, area, masks), otherwise), target.classifier)


def build_round_trip(target: Defended) -> Defended:
    """Control: to the size that DIFFender works at and back, nothing else."""
    size = ours(target).size
    return Defended(Purifier(lambda x: resize(resize(x, size), x.shape[-2:])), target.classifier)


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
    "jedi": pure(Jedi),
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
