"""What a run depends on and its settings do not tell: models and attacks of the user's own.

A digest is the same in every process, so that a run goes on with the same model alone.
"""

import dis
import hashlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffender.utils.files import digest

PLAIN = (int, float, complex, str, bytes, type(None), type(...), range, slice, PurePath, torch.dtype, torch.device)
HELD = ("__func__", "__self__", "__wrapped__", "fget", "func", "args", "keywords")  # where wrappers hold functions
EVERY = vars(nn.Module()).keys()  # attributes that every module has
PACKAGE, STANDARD = "diffender", sys.stdlib_module_names


def code_digest(victim: nn.Module, *attacks: type) -> str:
    """sha256 of what the tensors of a victim do not tell, and of the attacks.

    That is the methods and attributes of its parts, and what these hold and read; of modules of this package their
    settings alone. An installed package counts by its version. Names that a function reads in another way than as its
    globals are not followed.
    """
    seen = {id(t): (i, t) for i, t in enumerate((*victim.parameters(), *victim.buffers()))}  # these have a hash already
    return hashlib.sha256(repr(account((victim, *attacks), seen)).encode()).hexdigest()


def account(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """A value in lists of words. What was `seen` before is told by its number, since parts may hold each other."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, np.ndarray | np.generic):
        return [value.dtype.str, account(value.tolist(), seen)]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, account(value.co_consts, seen)]
    if isinstance(value, tuple):
        return ["tuple", *(account(v, seen) for v in value)]
    if isinstance(value, set | frozenset):  # their order differs between processes
        return ["set", *sorted((account(v, seen) for v in value), key=repr)]
    if id(value) in seen:
        return seen[id(value)][0]
    seen[id(value)] = (len(seen), value)
    if isinstance(value, Tensor):
        return digest({"": value}, {})
    if isinstance(value, list):
        return ["list", *(account(v, seen) for v in value)]
    if isinstance(value, dict):
        return ["dict", *(account(pair, seen) for pair in value.items())]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return [name, *(account(v, seen) for v in inside(value))]


def inside(value: Any) -> Iterator[Any]:
    """What a function, a class, a module of torch or another object consists of."""
    if isinstance(value, FunctionType):
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__)
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        if version(value.__globals__.get("__name__", "")) is None:
            yield from globals_of(value)
    elif isinstance(value, type):
        yield version(value.__module__)
        if version(value.__module__) is None:
            yield value.__bases__
            yield {k: v for k, v in vars(value).items() if isinstance(v, FunctionType) or not k.startswith("__")}
    elif isinstance(value, nn.Module):
        yield type(value)
        if top(type(value)) == PACKAGE:
            yield [getattr(value, name, None) for name in ("cfg", "size", "purify", "random", "cleanser")]
        else:
            yield {k: v for k, v in vars(value).items() if k not in EVERY and not k.startswith("_torchdynamo")}
        yield [*value._forward_pre_hooks.values(), *value._forward_hooks.values()]
        yield dict(value.named_children())
        yield dict((*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)))
    elif isinstance(value, ModuleType):
        yield value.__name__
    else:
        yield type(value)
        if top(type(value)) in STANDARD:
            yield from (getattr(value, name, None) for name in HELD)
        if top(type(value)) not in (*STANDARD, "torch") or isinstance(value, Namespace | SimpleNamespace):
            yield getattr(value, "__dict__", {})
            slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
            yield {name: getattr(value, name, None) for name in slots if not name.startswith("__")}


def globals_of(function: FunctionType) -> Iterator[Any]:
    """What a function reads of its module, and of those modules of the user's own that it names."""
    there, code = function.__globals__, function.__code__
    for name in (n for n in named(code, "LOAD_GLOBAL", "LOAD_NAME") if n in there):
        yield there[name]
        if isinstance(there[name], ModuleType) and version(there[name].__name__) is None:
            held = vars(there[name])
            yield from (held[n] for n in named(code, "LOAD_ATTR", "LOAD_METHOD") if n in held)


def named(code: CodeType, *operations: str) -> list[str]:
    """The names that these operations take, in functions within it as well."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    return sorted(own.union(*(named(c, *operations) for c in code.co_consts if isinstance(c, CodeType))))


def top(thing: type) -> str:
    """The package that a class belongs to."""
    return thing.__module__.partition(".")[0]


def version(module: str) -> str | None:
    """The version of the installed package that a module belongs to; None for code of the user's own."""
    name = module.partition(".")[0]
    package = sys.modules.get(name)
    installed = re.search(r"[/\\](site|dist)-packages[/\\]", getattr(package, "__file__", None) or "")
    return f"{name} {getattr(package, '__version__', '')}" if installed or name in (PACKAGE, *STANDARD) else None
