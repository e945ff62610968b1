"""Patch attacks: frozen dataclasses of options, called on a victim."""

from diffender.attacks.advp import AdvP

ATTACKS = {"advp": AdvP}
