"""Files in and out: whole or not at all, and one clear line for whatever is not the safetensors file it should be.

Torch is imported inside the functions: what only writes text answers at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from diffender.utils.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = {".ckpt", ".bin", ".pt", ".pth"}
PICKLED_PART = "*pytorch_model*.bin"  # of a Hugging Face folder; what is beside it, as optimizer.bin, is no model's


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds, and is deleted otherwise."""
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")  # several machines may share the folder
    try:
        yield partial
        partial.replace(path)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk names none
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    with whole(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def cut_tail(path: Path) -> None:
    """Cut off a last line that a killed process left unfinished: the next one would be glued to it."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        with whole(path) as partial:
            partial.write_bytes(content[: content.rfind(b"\n") + 1])


def save_state(state: dict, path: Path) -> None:
    """torch.save, whole or not at all, for torch.load with weights_only. Raises OSError: the disk may be full."""
    import torch

    buffer = io.BytesIO()  # torch writing to a disk turns its errors into a RuntimeError
    torch.save(state, buffer)
    with whole(path) as partial:
        partial.write_bytes(buffer.getbuffer())


@contextmanager
def refuse_damaged(path: Path, advice: str) -> Iterator[None]:
    """Raises InputError with this advice where the block, which reads what `save_state` wrote, fails in any way."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as e:  # a damaged pickle may raise anything
        raise InputError(f"{path} is damaged ({one_line(e) or type(e).__name__}); {advice}") from e


def save_atomic(tensors: dict[str, Tensor], path: Path, header: dict) -> None:
    """Write a safetensors file with `header` as JSON in its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        with whole(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(tensors, partial, metadata={"diffender": json.dumps(header)})
            partial.chmod(mode)  # safetensors leaves a file that its owner alone can read
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot write {path} ({one_line(e)}); free some space, or choose another place") from e


def place_for(path: Path) -> Path:
    """The path of a file that is written later. Makes its folder; raises InputError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as f:
            f.write(b"?")
    except OSError as e:
        raise InputError(f"cannot write to {path.parent} ({e.strerror}); choose another place") from e
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    return path


def new_file(path: Path) -> Path:
    """`place_for` for a file that must not exist yet. Raises InputError if it does."""
    if path.is_file():
        raise InputError(f"{path} is there already; delete it, or choose another with --out")
    return place_for(path)


def sha256(path: Path) -> str:
    """The sha256 of a file, read once while its size and time stay the same. "~" is the home folder.

    Raises InputError where there is no file.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"no file {path}; give the path of one")
    told = path.stat()
    return hashed(path, told.st_size, told.st_mtime_ns)


@cache
def hashed(path: Path, _size: int, _time: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_checked(tensors: dict[str, Tensor], path: Path, header: dict) -> None:
    """`save_atomic` with a checksum in the header, for `check_digest`."""
    save_atomic(tensors, path, header | {"digest": digest(tensors, header)})


def check_digest(path: Path, tensors: dict[str, Tensor], header: dict) -> None:
    """Raises InputError where a file's header states a checksum that its content has not."""
    rest = {k: v for k, v in header.items() if k != "digest"}
    if "digest" in header and header["digest"] != digest(tensors, rest):
        raise InputError(f"{path} is damaged: its checksum is not the one it states; fetch or copy it again")


def digest(tensors: dict[str, Tensor], header: dict | list) -> str:
    """A checksum of a file's tensors and header, or of other things that JSON can hold."""
    import torch

    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].detach().to_dense().cpu()
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.flatten().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def printable(text: str) -> str:
    """A file's name, or a command line, that can be shown and written: bytes that are no UTF-8 as \\xff."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def short(name: str) -> str:
    """A name of 200 bytes at most, since files add to it; a longer one ends in a hash of the whole."""
    full = name.encode()
    return name if len(full) <= 200 else f"{full[:180].decode(errors='ignore')}_{hashlib.sha256(full).hexdigest()[:16]}"


def one_line(e: BaseException) -> str:
    return ascii(" ".join(str(e).split()))[1:-1][:200]


def open_safetensors(path: Path):  # noqa: ANN201
    """A lazily read safetensors file; raises InputError for anything that is not one. "~" is the home folder."""
    from safetensors import SafetensorError, safe_open

    path = path.expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the path of a .safetensors file")
    if not path.exists():
        raise InputError(f"no file {path}; give the path of a .safetensors file")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        with path.open("rb") as f:
            start = f.read(2)
        if start in (b"PK", b"\x80\x02") or path.suffix in PICKLES:  # a zip archive or a bare pickle, whatever its name
            raise InputError(
                f"{path} looks like a pickle, which can run code when it is read; convert it with "
                f"python -m diffender weights convert {path}"
            ) from e
        raise InputError(f"{path} is not a whole safetensors file ({one_line(e)}); fetch or copy it again") from e


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with open_safetensors(path) as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (no dict)


def check_fit(path: Path, what: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises InputError unless a file's tensors are those that `what` has, by name and shape."""
    wrong = state.keys() ^ wanted.keys() or {k for k in wanted if state[k].shape != wanted[k].shape}
    if wrong:
        names = ", ".join(sorted(wrong)[:5])
        raise InputError(
            f"{path} does not fit {what}: {len(wrong)} tensors differ ({names}); give the file made for it"
        )


def read_header(path: Path) -> dict:
    """The JSON that `save_atomic` put into the file's metadata; {} for files of others."""
    with open_safetensors(path) as f:
        text = (f.metadata() or {}).get("diffender", "{}")
    try:
        header = json.loads(text)
    except ValueError as e:
        raise InputError(f"{path} has a damaged header ({one_line(e)}); fetch or copy it again") from e
    if not isinstance(header, dict):
        raise InputError(f"{path} has a damaged header (no JSON object); fetch or copy it again")
    return header
