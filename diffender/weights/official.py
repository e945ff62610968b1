"""The official checkpoints: what is published where, and how it becomes a safetensors file on this machine.

Torch is imported inside the functions: what only fetches a file answers at once.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffender.utils.errors import InputError
from diffender.utils.files import PICKLED_PART, PICKLES, one_line, save_atomic, sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor


class Published(NamedTuple):
    repository: str  # on the Hugging Face hub
    file: str
    bytes: int | None = None
    sha256: str | None = None  # None: the one that the hub states


FILES = {
    "sd15-inpainting": Published(
        "webui/stable-diffusion-inpainting",  # of runwayml's sd-v1-5-inpainting.ckpt, which is a pickle
        "sd-v1-5-inpainting.safetensors", 4_265_203_873,
        "0ec8f8585b104417a8c34a9fbcc1e922a70b8c15490ec4553087f01c8cf33673",
    ),
    "sd2-inpainting": Published(
        "stabilityai/stable-diffusion-2-inpainting",
        "512-inpainting-ema.safetensors", 5_214_662_094,
        "b29e2ed9a8fe58e76f7e801bda091d23738bd74c1da3f339bcbe2d40922fcb60",
    ),
    # The classifiers of the paper, by the exact names that timm publishes them under.
    "inception_v3": Published("timm/inception_v3.tv_in1k", "model.safetensors"),
    "swin_s": Published("timm/swin_small_patch4_window7_224.ms_in1k", "model.safetensors"),
    "resnet50": Published("timm/resnet50.tv_in1k", "model.safetensors"),
    "vit_b_16": Published("timm/vit_base_patch16_224.orig_in21k_ft_in1k", "model.safetensors"),
}  # fmt: skip


def fetch(name: str) -> Path:
    """Download an official file into the hub's cache, check its hash, and return its path.

    huggingface_hub does the transfer: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT (a mirror) and HF_TOKEN count as always,
    a broken transfer goes on where it stopped, and a file that is there already is not fetched again.
    """
    from huggingface_hub import constants, hf_hub_download

    published = FILES[name]
    try:
        path = Path(hf_hub_download(published.repository, published.file))
    except Exception as e:  # of many kinds, by version: HTTP, connection, cache, disk
        flag = "--classifier-weights" if published.repository.startswith("timm/") else "--weights"
        raise InputError(
            f"cannot get {published.file} of {published.repository} from {constants.ENDPOINT} ({one_line(e)}); go "
            f"online, set HF_ENDPOINT to a mirror, or copy the file here and give it as {flag}"
        ) from e
    found, stated = sha256(path), published.sha256 or path.resolve().name  # the hub's cache names files by their hash
    if found != stated:
        raise InputError(
            f"{path} is not the published file: {path.stat().st_size} bytes and sha256 {found}, expected "
            f"{published.bytes or 'as many as the hub has'} and {stated}; delete it and fetch again"
        )
    return path


def fetched(name: str) -> Path | None:
    """The file that an earlier `fetch` left in the hub's cache, or None."""
    if name not in FILES:
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(FILES[name].repository, FILES[name].file)
    return Path(path) if isinstance(path, str) else None


class Inert:
    """Takes the place of any class that a pickle names beside tensors: it holds what it is given and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def convert_folder(folder: Path) -> list[Path]:
    """The model's .bin files of a Hugging Face folder, as `convert` does it, that have no .safetensors files yet, and
    the indices of those that are shards."""
    from diffender.weights.reading import FOLDERS, shards

    parts = [folder, *(folder / Path(stem).parent for stem in FOLDERS.values())]
    files = sorted(file for part in parts for file in part.glob(PICKLED_PART))
    if not files:
        raise InputError(
            f"no {PICKLED_PART} file in {folder}; give a Hugging Face folder, or a {', '.join(sorted(PICKLES))} file"
        )
    made = [convert(file, out) for file in files if not (out := file.with_name(renamed(file.name))).exists()]
    for index in sorted(file for part in parts for file in part.glob(f"{PICKLED_PART}.index*.json")):
        if not (out := index.with_name(renamed(index.name))).exists():
            shards(index)  # raises InputError for one that is damaged
            content = json.loads(index.read_text(encoding="utf-8"))
            where = {key: renamed(name) for key, name in content["weight_map"].items()}
            write_json(out, content | {"weight_map": where})
            made.append(out)
    return made


def renamed(name: str) -> str:
    """The name in safetensors of a .bin file, or of an index of such files. The text encoder's pytorch_model.bin is
    model.safetensors; diffusion_pytorch_model has one name in both formats."""
    return name.removeprefix("pytorch_").replace(".bin", ".safetensors")


def convert(path: Path, out: Path) -> Path:
    """A pickled checkpoint (.ckpt, .bin) as safetensors: the tensors of its state_dict, or of its top level.

    Tied weights are written twice: safetensors has no sharing.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; give the path of a {', '.join(sorted(PICKLES))} file")
    if out.exists() and out.samefile(path):
        raise InputError(f"{path} is safetensors already; there is nothing to convert")
    if out.exists():
        raise InputError(f"{out} is there already; delete it, or choose another with --out")
    found, seen = state_dict(unpickled(path)), set()
    if not found:
        raise InputError(f"{path} holds no state_dict of tensors; give a checkpoint of Stable Diffusion")
    tensors = {}
    for key, value in found.items():
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if storage in seen else value
        seen.add(storage)
    save_atomic(tensors, out, {"converted": path.name})
    return out


def unpickled(path: Path) -> Any:
    """What a pickled checkpoint holds, read with weights_only, so that nothing in it is run.

    Classes of training frameworks become `Inert`. Raises InputError for a file that asks for functions of the system,
    and for a damaged one. Files of torch before 1.6 have no checksum, so other numbers in them go unnoticed.
    """
    import torch

    mmap = zipfile.is_zipfile(path)  # files of torch before 1.6 are no zip archives and cannot be mapped
    try:
        if mmap and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {part} is not that of its bytes: fetch the file again")
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mmap else []
        with torch.serialization.safe_globals([(Inert, name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged pickle may raise anything
        reason = re.search(
            r"(Trying to load|Unsupported|WeightsUnpickler error)[^\n]*", str(e)
        )  # behind torch's preface
        raise InputError(
            f"{path} cannot be read safely as a checkpoint ({reason[0] if reason else one_line(e) or type(e).__name__})"
        ) from e


def state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state_dict, or of its top level; empty if it has none."""
    from torch import Tensor

    inner = content.get("state_dict", content) if isinstance(content, dict) else {}
    named = inner.items() if isinstance(inner, dict) else ()
    return {key: value for key, value in named if isinstance(key, str) and isinstance(value, Tensor)}
