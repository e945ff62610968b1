"""Tuned prompts from files and to files."""

from pathlib import Path

from diffender.noise import CPU, preserved_rng
from diffender.prompts import Contexts, PromptPair, empty_contexts, manual_contexts
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError
from diffender.utils.files import check_digest, load_tensors, read_header, save_checked
from diffender.weights.loading import WEIGHTS

SHIPPED = WEIGHTS / "prompts.safetensors"


def save_prompts(prompts: PromptPair, path: Path, header: dict) -> None:
    save_checked(prompts.state_dict(), path, header)


def load_prompts(path: Path, dim: int) -> PromptPair:
    """Learned prompts of width `dim`; raises InputError for a damaged file, or one of another kind or model."""
    header, state = read_header(path), load_tensors(path)
    if sorted(state) != ["ctx_locate", "ctx_restore"]:
        raise InputError(f"{path} holds {sorted(state)[:5]}; prompts are two tensors, ctx_locate and ctx_restore")
    shapes = [tuple(v.shape) for v in state.values()]
    n_ctx = shapes[0][0] if shapes[0] else 0
    if shapes != [(n_ctx, dim)] * 2:
        raise InputError(
            f"{path} holds prompts of shapes {shapes[0]} and {shapes[1]}; this model's are {dim} wide: use --prompt "
            "manual, or tune new ones (train.py)"
        )
    check_digest(path, state, header)
    with preserved_rng(CPU):  # PromptPair draws initial values from torch's global generator
        prompts = PromptPair(n_ctx, dim)
    prompts.load_state_dict(state)
    return prompts


def contexts_for(kind: str, model: LatentDiffusion, path: str | Path | None = None) -> Contexts:
    """Contexts by name: empty, manual, or tuned (without a file, the shipped). They are constants; see `PromptPair`."""
    if kind == "tuned":
        prompts = load_prompts(Path(path or SHIPPED), model.cfg.text.width).to(model.alphas_cumprod.device)
        return prompts(model).detach()
    kinds = {"empty": empty_contexts, "manual": manual_contexts}
    if kind not in kinds:
        raise InputError(f"unknown prompt {kind!r}; choose empty, manual or tuned")
    return kinds[kind](model)
