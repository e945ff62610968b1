"""DIFFender (Kang et al., ECCV 2024) in pure PyTorch: find adversarial patches, paint them over.

The files here follow the paper: localize and restore (Sec. 3.2), prompts and losses (3.3), pipeline (the whole).
The networks are in stable_diffusion/, most tools in folders of their own. Names load when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "pipeline": ("DIFFender", "Defended", "Undefended", "WithFreshNoise"),
    "config": ("DIFFenderConfig", "EMBEDDED", "Backward"),
    "photographs": ("Defender", "defend", "load"),
    "own": ("AnyModel", "benchmark"),
    "defenses": ("Hardened", "PatchCleanser", "Purifier"),
    "prompts": ("Contexts", "PromptPair"),
    "stable_diffusion.model": ("MODELS", "LatentDiffusion", "ModelConfig"),
    "weights.loading": ("load_model",),
    "weights.prompts": ("contexts_for",),
    "classifiers.imagenet": ("load_classifier",),
    "attacks": ("ATTACKS", "AdvP", "GDPA", "LaVAN", "RHDE", "SparseRS"),
    "attacks.expectation": ("Attacked", "Task"),
    "utils.errors": ("InputError",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = [*_MODULE]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'diffender' has no attribute {name!r}")
    return getattr(import_module(f"diffender.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
