"""Weights in and out: safetensors only, the configuration in the header, strict about every key.

Files of ours carry the names of the CompVis single file. Read are these, the official single files of SD1.5-inpainting
and SD2-inpainting, and Hugging Face folders of either.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffender.diffusion import PRESETS, LatentDiffusion, ModelConfig
from diffender.errors import InputError
from diffender.layouts import IGNORED, PREFIXES, from_open_clip, new_vae_name, unet_name, vae_name
from diffender.models.text import TextConfig
from diffender.models.unet import UNetConfig
from diffender.models.vae import VAEConfig
from diffender.schedule import make_alphas_cumprod

EMBEDDED = Path(__file__).parents[1] / "weights"


def save_atomic(tensors: dict[str, Tensor], path: Path, header: dict) -> None:
    """Write a safetensors file with `header` as JSON in its metadata; nothing is left behind half-written."""
    partial = path.with_name(path.name + ".partial")
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, partial, metadata={"diffender": json.dumps(header)})
    partial.rename(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_safetensors(path: Path):  # noqa: ANN201  (safe_open is a class of compiled code)
    """A lazily read safetensors file; raises InputError for anything that is not one."""
    if not path.is_file():
        raise InputError(f"no weights file {path}; give the path of a .safetensors file")
    try:
        return safe_open(path, "pt")
    except SafetensorError as e:
        hint = "this looks like a pickle" if path.suffix in {".ckpt", ".bin", ".pt", ".pth"} else "the file is damaged"
        raise InputError(
            f"{path} is not a safetensors file ({hint}); convert with torch.load(..., weights_only=True) and "
            f"safetensors.torch.save_file ({e})"
        ) from e


def read_header(path: Path) -> dict:
    """The JSON that `save_atomic` put into the file's metadata; {} for files of others."""
    with open_safetensors(path) as f:
        return json.loads((f.metadata() or {}).get("diffender", "{}"))


def save_model(model: LatentDiffusion, path: Path, header: dict) -> None:
    """Write the whole model in float16, in CompVis names, with its configuration in the header."""
    tensors = {
        prefix + k: v.half() for part, prefix in PREFIXES.items() for k, v in getattr(model, part).state_dict().items()
    }
    save_atomic(tensors, path, {"config": asdict(model.cfg)} | header)


def load_model(name: str, path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    """A model of `PRESETS`, frozen and in eval mode, with the weights at `path` (default: the embedded `tiny`)."""
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}; choose one of {', '.join(PRESETS)}")
    if path is None:
        if name != "tiny":
            raise InputError(f"model {name!r} needs --weights, the path of its official .safetensors file")
        path = EMBEDDED / "tiny.safetensors"
    path = Path(path)
    header = {} if path.is_dir() else read_header(path)
    cfg = config_from_json(header["config"]) if "config" in header else PRESETS[name]
    with torch.device("meta"):
        model = LatentDiffusion(cfg)
    state = read_folder(path, model) if path.is_dir() else from_open_clip(read_tensors(path))
    load_strict(model, state, path, dtype)
    model.alphas_cumprod = make_alphas_cumprod()  # the only buffer, not in any file
    return model.requires_grad_(False).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path) as f:
        return {k: f.get_tensor(k) for k in f.keys() if not IGNORED.fullmatch(k)}  # noqa: SIM118


def read_folder(root: Path, model: LatentDiffusion) -> dict[str, Tensor]:
    """A Hugging Face folder (unet/, vae/, text_encoder/) in our names; what does not fit keeps its own."""
    cfg = model.cfg
    renamed = {
        "unet": {unet_name(k, cfg.unet.num_res_blocks): k for k in model.unet.state_dict()},
        "vae": {vae_name(k, len(cfg.vae.ch_mult)): k for k in model.vae.state_dict()},
        "text": {f"text_model.{k}": k for k in model.text.state_dict()},
    }
    files = {"unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model", "text": "text_encoder/model"}
    state = {}
    for part, stem in files.items():
        candidates = [root / f"{stem}{kind}.safetensors" for kind in ("", ".fp16")]
        path = next((p for p in candidates if p.is_file()), candidates[0])
        like = getattr(model, part).state_dict()
        for key, value in read_tensors(path).items():
            name = renamed[part].get(new_vae_name(key) if part == "vae" else key)
            if name is None:
                state[f"{part}: {key}"] = value
            else:  # the VAE's attention is linear there, a 1x1 convolution here
                attention = part == "vae" and ".attn_1." in name and value.numel() == like[name].numel()
                state[PREFIXES[part] + name] = value.reshape(like[name].shape) if attention else value
    return state


def load_strict(model: LatentDiffusion, state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Put every tensor of `state` in its place; a missing, unexpected or misshapen one is an error that names it."""
    want = {
        prefix + k: (part, k, v)
        for part, prefix in PREFIXES.items()
        for k, v in getattr(model, part).state_dict().items()
    }
    missing = [k for k in want if k not in state]
    unexpected = [k for k in state if k not in want]
    if missing or unexpected:
        raise InputError(
            f"{path} does not hold this model: {len(missing)} keys missing "
            f"(first: {', '.join(missing[:5]) or 'none'}), "
            f"{len(unexpected)} unexpected (first: {', '.join(unexpected[:5]) or 'none'}); check --model and --weights"
        )
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, (_, _, v) in want.items()
        if state[k].shape != v.shape
    ]
    if shapes:
        raise InputError(
            f"{path} holds other shapes than this model: {'; '.join(shapes[:5])}; check --model and --weights"
        )
    for part in PREFIXES:
        tensors = {k: state[full].to(dtype) for full, (p, k, _) in want.items() if p == part}
        getattr(model, part).load_state_dict(tensors, assign=True)


def config_from_json(config: dict) -> ModelConfig:
    def build(cls: type, fields: dict):  # noqa: ANN202
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
    return ModelConfig(**{k: build(parts[k], v) if k in parts else v for k, v in config.items()})
