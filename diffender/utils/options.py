"""Command lines from dataclasses: one field, one flag. Bad input ends in one line and exit code 2."""

import argparse
import ctypes
import errno
import math
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from diffender.utils.errors import InputError, nearest
from diffender.utils.interruption import Interrupted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
Fields = TypeVar("Fields", bound="DataclassInstance")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    group: str | None = None,
) -> Any:
    """A field with its help text, and its allowed values or range (both ends included). `group` heads it, and those
    that follow, in --help."""
    given = {"help": help, "choices": choices, "low": low, "high": high, "group": group}
    return field(default=default, metadata=given)


def changed(cls: type, name: str, default: Any, help: str | None = None) -> Any:
    """The option `name` of another class with another default: its range, its choices and, unless given, its help."""
    given = next(f for f in fields(cls) if f.name == name)
    return field(default=default, metadata={**given.metadata, "help": help or given.metadata["help"]})


def allowed(low: float | None, high: float | None) -> str:
    """A range in words."""
    return f"at least {low}" if high is None else f"from {low} to {high}"


def check_options(opts: Any) -> None:
    """Raises InputError for a value outside of its choices or its range."""
    for f in fields(opts):
        value, choices = getattr(opts, f.name), f.metadata.get("choices")
        low, high = f.metadata.get("low"), f.metadata.get("high")
        if choices and value is not None and value not in choices:
            raise InputError(f"unknown {f.name} {value!r}; choose one of {', '.join(choices)}")
        if isinstance(value, int | float) and not isinstance(value, bool) and not within(value, low, high):
            raise InputError(f"{f.name} is {value}; allowed is {allowed(low, high)}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; argparse would print its usage first."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(cls: type[Options], description: str, argv: list[str] | None = None) -> Options:
    """Options from the command line; hyphens and underscores mean the same. A tuple takes what has no flag."""
    hints = get_type_hints(cls)
    usage = " ".join(["[options]", *(f.name for f in fields(cls) if hints[f.name] == tuple[str, ...])])
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=f"%(prog)s {usage}",
    )
    group = parser.add_argument_group("options")
    for f in fields(cls):
        assert f.default is not MISSING, f"option {f.name} needs a default"
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        flag = with_hyphens(f"--{f.name}")
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        hint = hints[f.name]
        kind = hint.__args__[0] if isinstance(hint, types.UnionType) else hint
        if hint == tuple[str, ...]:
            group.add_argument(f.name, nargs="*", help=f.metadata["help"])
        elif kind is bool:
            group.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            choices = f.metadata["choices"]
            group.add_argument(flag, dest=f.name, type=kind, choices=choices, default=f.default, help=text)
    args, rest = parser.parse_known_args(list(map(with_hyphens, sys.argv[1:] if argv is None else argv)))
    if rest:
        known = [with_hyphens(f"--{f.name}") for f in fields(cls)]
        parser.error(f"unrecognized arguments: {' '.join(rest)}{nearest(rest[0].split('=')[0], known)}")
    for f in fields(cls):
        value, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not within(value, low, high):
            parser.error(f"{with_hyphens(f'--{f.name}')} is {value}; allowed is {allowed(low, high)}")
    return cls(**vars(args))


def with_hyphens(word: str) -> str:
    """A flag as it is known, however it is spelt: --noise_ratio=0.5 is --noise-ratio=0.5."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def within(value: float, low: float | None, high: float | None) -> bool:
    """Whether a number lies in a range, both ends included, None for an open one; NaN and infinity do not."""
    return math.isfinite(value) and (low is None or value >= low) and (high is None or value <= high)


FREE = ("device", "quiet", "track", "micro_batch", "keep")  # of any run: no result depends on them


def settings(opts: Any, *free: str) -> dict:
    """The options that results depend on: all but FREE and those named."""
    return {k: v for k, v in asdict(opts).items() if k not in (*FREE, *free)}


def pick(cls: type[Fields], opts: Any, **override: Any) -> Fields:
    """A dataclass from the options of the same names; an option that is None leaves it its own default."""
    values = {f.name: getattr(opts, f.name, None) for f in fields(cls)}
    return cls(**{name: value for name, value in values.items() if value is not None} | override)


KEPT = "what is written stays, and the same command with the same --name or --out goes on"
FAULTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some space: {KEPT}") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO),
    "choose another place, or change its permissions",
)  # of files, by what the system says


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of giving each back to the kernel, which zeroes the next one page by
    page. Elsewhere, nothing."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for parameter in (trim_threshold, mmap_threshold):
        mallopt(parameter, 2**31 - 1)


def run(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: 0; 2 with one line where the input, the disk or a permission is at fault; 130 where Ctrl-C
    or SIGTERM stopped it."""
    keep_freed_memory()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        main()
        code = 0
    except (InputError, Interrupted) as e:
        told, code = str(e), 2 if isinstance(e, InputError) else 130
    except KeyboardInterrupt:
        told, code = f"stopped; {KEPT}", 130
    except OSError as e:
        if e.errno not in FAULTS:
            raise
        told, code = f"{e.filename or 'a file'}: {e.strerror}; {FAULTS[e.errno]}", 2
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        program = Path(sys.argv[0])
        name = program.parent.name if program.name == "__main__.py" else program.name
        print(f"{name}: {told}", file=sys.stderr)
    sys.exit(code)
