"""Patch attacks: frozen dataclasses of options, called on a victim."""

from diffender.attacks.advp import AdvP
from diffender.attacks.lavan import LaVAN

ATTACKS = {"advp": AdvP, "lavan": LaVAN}
