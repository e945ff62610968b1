"""What checkpoint files hold, in any layout, and where in them each tensor of a model lies.

Headers are read first and settle everything: which part of the model a file holds, that every name is known, that
shapes fit. Then the tensors are read one by one, mapped from the file where their dtype is the wanted one.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffender.stable_diffusion.unet import UNet
from diffender.stable_diffusion.vae import AutoencoderKL
from diffender.utils.errors import InputError
from diffender.utils.files import one_line, open_safetensors, read_header
from diffender.weights.layouts import (
    EMA,
    IGNORED,
    OPEN_CLIP,
    PREFIXES,
    ema_name,
    new_vae_name,
    open_clip_names,
    unet_name,
    vae_name,
)

FOLDERS = {
    "unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model", "text": "text_encoder/model"
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    third: int | None = None  # of its rows: 0, 1, 2 for q, k, v of a fused projection


class Checkpoint(NamedTuple):
    """What a file or folder holds, by part of the model (unet, vae, text); keys are without the part's prefix."""

    path: Path
    layouts: dict[str, str]  # of each part: compvis, huggingface or openclip
    parts: dict[str, dict[str, Stored]]
    ema: dict[str, Stored]  # averaged copies, by full name
    unknown: list[str]
    ignored: list[str]
    header: dict  # of our own files


class Match(NamedTuple):
    """Where each tensor of a module lies, and what stands against loading it."""

    tensors: dict[str, Stored]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]


def list_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name."""
    with open_safetensors(path) as f:
        slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118  (keys() of a file, not of a dict)
        return {k: Stored(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}


def scan(path: Path) -> Checkpoint:
    """Find out what a file or folder holds; reads headers only."""
    if path.is_dir():
        parts = {part: list_tensors(file) for part, file in folder_files(path).items()}
        return Checkpoint(path, dict.fromkeys(parts, "huggingface"), parts, {}, [], [], {})
    entries = list_tensors(path)
    found = Checkpoint(path, {}, {}, {}, [], [], read_header(path))
    kept = {}
    for key, stored in entries.items():
        if IGNORED.fullmatch(key):
            found.ignored.append(key)
        elif key.startswith(EMA):
            found.ema[key] = stored
        else:
            kept[key] = stored
    bare = bare_part(kept)
    if bare is not None:
        found.parts[bare] = kept
        found.layouts[bare] = "compvis" if any(k.startswith("encoder.down.") for k in kept) else "huggingface"
        return found
    prefixes = [(part, prefix, "compvis") for part, prefix in PREFIXES.items()] + [("text", OPEN_CLIP, "openclip")]
    for key, stored in kept.items():
        for part, prefix, layout in prefixes:
            if key.startswith(prefix):
                found.parts.setdefault(part, {})[key.removeprefix(prefix)] = stored
                found.layouts[part] = layout
                break
        else:
            found.unknown.append(key)
    return found


def folder_files(folder: Path) -> dict[str, Path]:
    """The weights files of a Hugging Face folder by part; given one of its sub-folders, that part alone."""
    found = {}
    for part, stem in FOLDERS.items():
        inside = stem.removeprefix(f"{folder.name}/")
        names = [f"{base}{kind}.safetensors" for base in {stem: 0, inside: 0} for kind in ("", ".fp16")]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is not None:
            found[part] = file
    if not found:
        wanted = ", ".join(f"{stem}.safetensors" for stem in FOLDERS.values())
        raise InputError(f"no weights file in {folder}; a model's folder has {wanted} (or .fp16.safetensors)")
    return found


def bare_part(keys: Iterable[str]) -> str | None:
    """The part of a model that a file without the single file's prefixes holds, if it is one."""
    heads = {k.split(".")[0] for k in keys}
    if {"conv_in", "down_blocks", "mid_block"} <= heads:
        return "unet"
    if {"encoder", "decoder", "quant_conv"} <= heads:
        return "vae"
    return "text" if heads == {"text_model"} else None


def match(source: Checkpoint, part: str, module: nn.Module, ema: bool = False) -> Match:
    """Find the tensors of `module`, which is the `part` (unet, vae, text) of a model, in a checkpoint."""
    like = module.state_dict()
    tensors, unexpected = {}, []
    if ema:
        if not source.ema:
            raise InputError(f"{source.path} holds no averaged (EMA) copies; leave out --ema")
        tensors = {k: source.ema[ema_name(k)] for k in like if ema_name(k) in source.ema}
    else:
        find = renaming(part, source.layouts.get(part, "compvis"), module)
        for key, stored in source.parts.get(part, {}).items():
            names = [name for name in find(key) if name in like]
            if tensors.keys() & set(names) or (not names and not IGNORED.fullmatch(key)):
                unexpected.append(stored.key)  # a second one for the same place, or one for none
            for i, name in enumerate(names):
                tensors[name] = stored._replace(third=i) if len(names) == 3 else stored
    missing = [PREFIXES[part] + k for k in like if k not in tensors]
    misfits = []
    for name, stored in tensors.items():
        shape, wanted = taken_shape(stored), tuple(like[name].shape)
        attention = part == "vae" and ".attn_1." in name  # linear in some layouts, a 1x1 convolution in others
        if shape != wanted and not (attention and shape == tuple(n for n in wanted if n > 1)):
            misfits.append(f"{stored.key} {stored.shape} for {wanted}{' x 3' if stored.third is not None else ''}")
        elif stored.dtype not in FLOATS:
            misfits.append(f"{stored.key} of dtype {stored.dtype} for {', '.join(FLOATS)}")
    return Match(tensors, missing, unexpected, misfits)


def renaming(part: str, layout: str, module: nn.Module) -> Callable[[str], list[str]]:
    """key -> our names, within the part, of what it holds: one name, or three for a fused q, k, v projection."""
    if layout == "openclip":
        return open_clip_names
    if layout == "huggingface" and part == "unet":
        assert isinstance(module, UNet)
        ours = {unet_name(k, module.cfg.num_res_blocks): k for k in module.state_dict()}
        return lambda key: [ours.get(key, key)]
    if layout == "huggingface" and part == "vae":
        assert isinstance(module, AutoencoderKL)
        ours = {vae_name(k, len(module.cfg.ch_mult)): k for k in module.state_dict()}
        return lambda key: [ours.get(new_vae_name(key), key)]
    return lambda key: [key.removeprefix("text_model.")]


def taken_shape(stored: Stored) -> tuple[int, ...] | None:
    """The shape of what is taken of a stored tensor; None for a third of what has no thirds."""
    if stored.third is None:
        return stored.shape
    if not stored.shape or stored.shape[0] % 3:
        return None
    return stored.shape[0] // 3, *stored.shape[1:]


def check_match(path: Path, unknown: list[str], matches: Iterable[Match]) -> None:
    """Raises InputError, naming the first five, unless every tensor is there, fits, and nothing is left over."""
    matches = list(matches)
    missing = [k for m in matches for k in m.missing]
    unexpected = [*unknown, *(k for m in matches for k in m.unexpected)]
    misfits = [k for m in matches for k in m.misfits]
    if missing or unexpected:
        raise InputError(
            f"{path} does not hold this model: {len(missing)} keys missing ({first_five(missing)}), {len(unexpected)} "
            f"unexpected ({first_five(unexpected)}); check --model and --weights"
        )
    if misfits:
        raise InputError(f"{path} holds other tensors than this model's ({first_five(misfits)}); check --weights")


def first_five(names: list[str]) -> str:
    return "first: " + (", ".join(ascii(n)[1:-1] for n in names[:5]) or "none")


def read(tensors: dict[str, Stored], like: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Read what `match` found, in the shapes of `like`; raises InputError where a number is not finite.

    Tensors are mapped from the file eight at a time: what a cast or a change of memory format leaves behind is soon
    unmapped, and the peak stays near the size of the result.
    """

    def copied(name: str) -> bool:  # to channels last, where convolutions are faster
        return like[name].ndim == 4 and like[name].shape[-1] > 1

    out = {}
    order = sorted(tensors, key=lambda name: (str(tensors[name].file), copied(name), tensors[name].key))
    groups = groupby(enumerate(order), key=lambda item: (tensors[item[1]].file, copied(item[1]), item[0] // 8))
    for (file, *_), group in groups:
        with open_safetensors(file) as f:
            for _, name in group:
                stored = tensors[name]
                try:
                    value = f.get_tensor(stored.key)
                except SafetensorError as e:
                    raise InputError(f"{file} is damaged ({one_line(e)}); fetch or copy it again") from e
                value = value if stored.third is None else value.chunk(3)[stored.third]
                value = value.to(dtype).reshape(like[name].shape)
                if copied(name):
                    value = value.contiguous(memory_format=torch.channels_last)
                low, high = value.aminmax()
                if not (low.isfinite() and high.isfinite()):
                    raise InputError(
                        f"{file}: {ascii(stored.key)[1:-1]} holds NaN or infinity in {dtype}; try --dtype float32"
                    )
                out[name] = value
    return out
