"""What checkpoint files hold, in any layout, and where in them each tensor of a model lies.

Headers are read first and settle everything: which part of the model a file holds, that every name is known, that
shapes fit. Then the tensors are read one by one, mapped from the file where their dtype is the wanted one.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffender.stable_diffusion.unet import UNet
from diffender.stable_diffusion.vae import AutoencoderKL
from diffender.utils.errors import InputError
from diffender.utils.files import PICKLED_PART, one_line, open_safetensors, read_header
from diffender.weights.layouts import (
    EMA,
    IGNORED,
    OLD_TEXT,
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
WRAPPER = re.compile(r"^(state_dict|module)\.")  # before every name, in files of some training frameworks
STRANGERS = (  # names that are no part of Stable Diffusion 1 or 2, and what brings them
    (r"lora|hada_|lokr_|\.alpha$|adapter", "tensors of a LoRA or another adapter, which has to be merged first"),
    (r"control_model|controlnet|input_hint|zero_convs", "a ControlNet"),
    (r"motion_modules|temporal_transformer", "motion modules of a video model"),
    (r"scale_weight|weight_scale|scaled_fp8|input_scale", "float8 weights with scales of their own"),
    (r"absmax|quant_map|quant_state|bitsandbytes|nested_", "weights quantised by bitsandbytes"),
    (r"qweight|qzeros", "weights quantised by GPTQ or AWQ"),
    (r"conditioner\.embedders|label_emb|add_embedding", "a model of the Stable Diffusion XL family"),
    (r"joint_blocks|double_blocks|single_transformer_blocks", "a diffusion transformer"),
    (r"string_to_param|emb_params|embedding_manager", "a textual inversion"),
    (r"safety_checker|concept_embeds", "a safety checker"),
)
FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")


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
    """Where each tensor of a module lies, and what prevents loading it."""

    tensors: dict[str, Stored]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]


def list_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name."""
    with open_safetensors(path) as f:
        slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118  (keys() of a file, not of a dict)
        return {k: Stored(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}


def scan(path: Path, wanted: str | None = None) -> Checkpoint:
    """Find out what a file or folder holds; reads headers only. Of a folder one part may be wanted alone. "~" is the
    home folder."""
    path = path.expanduser()
    if path.is_dir():
        parts = {
            part: {k: stored for file in files for k, stored in list_tensors(file).items()}
            for part, files in folder_files(path, wanted).items()
        }
        return Checkpoint(path, dict.fromkeys(parts, "huggingface"), parts, {}, [], [], {})
    found = Checkpoint(path, {}, {}, {}, [], [], read_header(path))
    kept = {}
    for name, stored in list_tensors(path).items():
        key = WRAPPER.sub("", name)
        if IGNORED.fullmatch(key):
            found.ignored.append(key)
        elif key.startswith(EMA):
            found.ema[key] = stored
        else:
            kept[key] = stored
    only = part_of(kept)
    if only is not None:
        found.parts[only] = kept
        ours = any(k.startswith(("encoder.down.", "input_blocks.")) for k in kept)
        found.layouts[only] = "compvis" if ours else "huggingface"
        return found
    prefixes = [(part, prefix, "compvis") for part, prefix in PREFIXES.items()]
    prefixes += [("text", OPEN_CLIP, "openclip"), ("text", OLD_TEXT, "compvis")]
    for key, stored in kept.items():
        for part, prefix, layout in prefixes:
            if key.startswith(prefix):
                found.parts.setdefault(part, {})[key.removeprefix(prefix)] = stored
                found.layouts[part] = layout
                break
        else:
            found.unknown.append(key)
    return found


def folder_files(folder: Path, wanted: str | None = None) -> dict[str, list[Path]]:
    """The weights files of a Hugging Face folder by part, or of the wanted part; given one of its sub-folders, or a
    repository of one part, that part alone."""
    stems = {part: stem for part, stem in FOLDERS.items() if wanted in (None, part)}
    found: dict[str, list[Path]] = {}
    for part, stem in stems.items():
        for base in dict.fromkeys((stem, stem.removeprefix(f"{folder.resolve().name}/"))):
            if files := weights_files(folder, base):
                found.setdefault(part, files)
    if not found and (files := weights_files(folder, "diffusion_pytorch_model")):
        only = part_of(key for file in files for key in list_tensors(file))
        found = {only: files} if only in stems else {}
    missing = {part: folder / Path(stem).parent for part, stem in stems.items() if part not in found}
    if pickled := [part for part, place in missing.items() if found and any(place.glob(PICKLED_PART))]:
        convert = f"python -m diffender weights convert {folder}"
        raise InputError(f"{folder} has its {pickled[0]} as a pickle alone (.bin); {convert} converts it safely")
    if not found:
        names = ", ".join(f"{stem}.safetensors" for stem in stems.values())
        if any(file for place in (folder, *missing.values()) for file in place.glob(PICKLED_PART)):
            advice = f"its .bin files are pickles; python -m diffender weights convert {folder} converts them safely"
        else:
            advice = f"a model's folder has {names}, or variants of these as .fp16.safetensors"
        raise InputError(f"no weights file in {folder}; {advice}")
    return found


def weights_files(folder: Path, base: str) -> list[Path]:
    """The file of this name in a folder, or its shards, which an index.json lists; none where it is not there.

    Of several variants (.fp16, .non_ema) the plain one is taken, else the first.
    """
    whole = sorted(folder.glob(f"{base}.safetensors")) + sorted(folder.glob(f"{base}.*.safetensors"))
    whole = [file for file in whole if not re.search(r"-\d+-of-\d+\.", file.name)]
    indices = sorted(folder.glob(f"{base}*safetensors.index*.json"))
    return whole[:1] or (shards(indices[0]) if indices else [])


def scheduler_of(path: Path) -> Path | None:
    """The scheduler's file of a Hugging Face folder, given that folder, its `unet`, or a file in either."""
    places = (folder / "scheduler" / "scheduler_config.json" for folder in (path, *path.absolute().parents[:2]))
    return next((place for place in places if place.is_file()), None)


def shards(index: Path) -> list[Path]:
    """The files that an index.json lists. Raises InputError where it is damaged or one of them is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.with_name(Path(name).name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{index} is no index of shards ({one_line(e)}); fetch or copy it again") from e
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{index} lists shards that are not there: {', '.join(missing[:5])}; fetch or copy them")
    return files


def part_of(keys: Iterable[str]) -> str | None:
    """The part of a model that a file without the single file's prefixes holds, if it is one."""
    heads = {k.split(".")[0] for k in keys}
    if heads >= {"conv_in", "down_blocks", "mid_block"} or heads >= {"input_blocks", "middle_block", "output_blocks"}:
        return "unet"
    if {"encoder", "decoder", "quant_conv"} <= heads:
        return "vae"
    return "text" if heads in ({"text_model"}, {"embeddings", "encoder", "final_layer_norm"}) else None


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
        # Linear in some files, a 1x1 convolution in others: the same numbers.
        projection = (part == "vae" and ".attn_1." in name) or re.search(r"\.proj_(in|out)\.", name)
        if shape != wanted and not (projection and squeezed(shape) == squeezed(wanted)):
            misfits.append(f"{stored.key} {stored.shape} for {wanted}{' x 3' if stored.third is not None else ''}")
        elif stored.dtype not in FLOATS:
            misfits.append(f"{stored.key} of dtype {stored.dtype} for {', '.join(FLOATS)}")
    return Match(tensors, missing, unexpected, misfits)


def squeezed(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Without the sides of a 1x1 kernel."""
    return shape[:-2] if shape is not None and len(shape) == 4 and shape[-2:] == (1, 1) else shape


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


def check_match(path: Path, unknown: list[str], matches: Sequence[Match]) -> None:
    """Raises InputError, naming the first five, unless every tensor is there, fits, and nothing is left over."""
    missing = [k for m in matches for k in m.missing]
    unexpected = [*unknown, *(k for m in matches for k in m.unexpected)]
    misfits = [k for m in matches for k in m.misfits]
    if missing or unexpected:
        if strange := stranger(unexpected):
            raise InputError(f"{path} holds {strange} ({first_five(unexpected)}), which is not supported")
        raise InputError(
            f"{path} does not hold this model: {len(missing)} keys missing ({first_five(missing)}), {len(unexpected)} "
            f"unexpected ({first_five(unexpected)}); check the model's name and this file"
        )
    if misfits:
        raise InputError(f"{path} holds other tensors than this model's ({first_five(misfits)}); check this file")


def stranger(names: Sequence[str]) -> str | None:
    """What brings such names into a file, if any is known not to be of Stable Diffusion 1 or 2."""
    return next((what for pattern, what in STRANGERS if any(re.search(pattern, name) for name in names)), None)


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
