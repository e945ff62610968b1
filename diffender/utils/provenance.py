"""How results came about: by what command, on what machine, with what versions, from what commit.

Torch is imported inside the functions: what only names the command answers at once.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from diffender.utils.files import printable

if TYPE_CHECKING:
    import torch

CHECKOUT = Path(__file__).parents[2]
CHANGED = "-changed"


def command(from_here: bool = False) -> str:
    """The command line of this process: as the documents have it, in the repository, or as it works `from_here`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("diffender "):
        program = f"-m {sys.argv[0]}"
    elif spec:
        program = f"-m {spec.name.removesuffix('.__main__')}"
    else:
        program = sys.argv[0] if from_here else Path(sys.argv[0]).name
    return printable(f"python {program} {shlex.join(sys.argv[1:])}".rstrip())


def machine(device: torch.device) -> str:
    """What the results were computed on, in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} {platform.machine()} CPU cores" if device.type == "cpu" else str(device)


def environment(device: torch.device) -> dict:
    """What results were computed with: date, commit of a checkout, versions, the device and torch's threads."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "timm", "open_clip_torch", "numpy"):
        with suppress(PackageNotFoundError):  # not every source of packages leaves a version to be read
            versions[name] = version(name)
    where = {"cuda": torch.version.cuda, "machine": machine(device), "threads": torch.get_num_threads()}
    return origin() | versions | where


def origin() -> dict:
    """The day, and the commit of the code."""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit()}


@cache
def commit() -> str | None:
    """The commit that this checkout was at when this process first asked: its code is no later one. It ends in CHANGED
    where files of the commit were edited. None where there is no checkout, or no git."""
    git = ["git", f"--git-dir={CHECKOUT / '.git'}", f"--work-tree={CHECKOUT}"]
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", f"--dirty={CHANGED}"]  # the whole hash, no tag
    with suppress(OSError):
        return subprocess.run([*git, *describe], capture_output=True, text=True).stdout.strip() or None
    return None


def shortened(commits: Sequence[str]) -> str:
    """Commits as documents name them, ", commit a6c33fd and 4f81cdb"; nothing where there are none."""
    short = (c[:7] + (" with changes" if c.endswith(CHANGED) else "") for c in commits)
    return f", commit {' and '.join(short)}" if commits else ""
