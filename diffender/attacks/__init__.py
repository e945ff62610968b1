"""Patch attacks: frozen dataclasses of settings, attacked = attack(Task(victim, x, y, image_ids, seed))."""

from diffender.attacks.advp import AdvP
from diffender.attacks.attack import Attack
from diffender.attacks.fixed import Crop, Grey, Ready, UniformNoise
from diffender.attacks.gdpa import GDPA
from diffender.attacks.lavan import LaVAN
from diffender.attacks.rhde import RHDE
from diffender.attacks.sparse_rs import SparseRS

ATTACKS: dict[str, type[Attack]] = {
    "advp": AdvP, "lavan": LaVAN, "gdpa": GDPA, "rhde": RHDE, "sparse-rs": SparseRS, "ready": Ready,
    "noise": UniformNoise, "grey": Grey, "crop": Crop,
}  # fmt: skip
PAPER_ATTACKS = ("advp", "lavan", "gdpa", "rhde")  # the four of its tables
