"""Command lines from dataclasses: one field, one flag; the fields of a part are flags beside the others.

Bad input ends in one line and exit code 2.
"""

import argparse
import errno
import math
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, get_type_hints

from diffender.utils.errors import InputError, nearest
from diffender.utils.interruption import Interrupted
from diffender.utils.malloc import keep_freed_memory

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


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


def part(default: Any, *only: str) -> Any:
    """A field that is a dataclass of options itself. `only` names those of its fields that are flags; none: all."""
    return field(default=default, metadata={"only": only})


def given(defaults: Any, *only: str, **beside: Any) -> Any:
    """A field that is a dict of those options of a dataclass that are given.

    The help shows the others as they are in `defaults`, and where they differ in the instances `beside`. `only` names
    those that are flags; none: all.
    """
    return field(default_factory=dict, metadata={"defaults": defaults, "only": only, "beside": beside})


class Leaf(NamedTuple):
    """One flag of a command."""

    name: str
    hint: Any
    value: Any  # the default, where the options are the usual ones
    metadata: Mapping[str, Any]
    shown: Any  # the default in the help

    @property
    def kind(self) -> Any:
        """Its type, None left out."""
        return self.hint.__args__[0] if isinstance(self.hint, types.UnionType) else self.hint


def leaves(opts: Any, only: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """The flags of a dataclass of options with their values, those of its parts included."""
    hints = get_type_hints(type(opts))
    for f in fields(opts):
        value = getattr(opts, f.name)
        if only and f.name not in only:
            continue
        if "defaults" in f.metadata:
            for leaf in leaves(f.metadata["defaults"], f.metadata["only"]):
                others = {name: getattr(other, leaf.name) for name, other in f.metadata["beside"].items()}
                notes = [f"; {name}: {other}" for name, other in others.items() if other != leaf.value]
                shown = f"{leaf.value}{''.join(notes)}"
                yield leaf._replace(hint=leaf.hint | None, value=value.get(leaf.name), shown=shown)
        elif "only" in f.metadata:
            yield from leaves(value, f.metadata["only"])
        else:
            yield Leaf(f.name, hints[f.name], value, f.metadata, value)


def flat(opts: Any) -> dict[str, Any]:
    """Every flag and its value; None for what is not given of a `given` part."""
    return {leaf.name: leaf.value for leaf in leaves(opts)}


def change(opts: Options, **values: Any) -> Options:
    """The options with other values for some flags, in whatever part they stand."""
    new = {}
    for f in fields(opts):
        if "only" in f.metadata:
            inner = getattr(opts, f.name)
            own = {leaf.name for leaf in leaves(f.metadata.get("defaults", inner), f.metadata["only"])}
            mine = {k: values.pop(k) for k in list(values) if k in own}  # in the order given
            if "defaults" in f.metadata:
                new[f.name] = inner | {k: v for k, v in mine.items() if v is not None}
            elif mine:
                new[f.name] = change(inner, **mine)
        elif f.name in values:
            new[f.name] = values.pop(f.name)
    if values:
        raise TypeError(f"{type(opts).__name__} has no option {', '.join(values)}")
    return replace(opts, **new)


def check_range(what: str, value: float, low: float | None, high: float | None) -> None:
    """Raises InputError unless `value` is finite and from low to high, both included. None: no limit on that side."""
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{what} is {value}; allowed is {allowed}")


def check_options(opts: Any) -> None:
    """Raises InputError for a flag, of whatever part, with a value that a command line would not take."""
    for leaf in leaves(opts):
        value, kind, (choices, low, high) = leaf.value, leaf.kind, map(leaf.metadata.get, ("choices", "low", "high"))
        if not leaf.metadata or (value is None and isinstance(leaf.hint, types.UnionType)):
            continue
        accepted = int | float if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):  # a bool is an int, too
            raise InputError(f"{leaf.name} is {value!r}; it must be of type {kind.__name__}")
        if choices and value not in choices:
            raise InputError(
                f"unknown {leaf.name} {value!r}; choose one of {', '.join(choices)}{nearest(str(value), choices)}"
            )
        if kind in (int, float):
            check_range(leaf.name, value, low, high)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line, without argparse's usage; "invalid int value" becomes "give a whole number"."""
        kinds = {"int": "a whole number", "float": "a number"}
        message = re.sub(
            r"argument (\S+): invalid (int|float) value: (.*)",
            lambda m: f"{m[1]} is {m[3]}; give {kinds[m[2]]}",
            message,
        )
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


UNITS = {"max_memory": "GiB"}  # that may follow a number
HABITS = {  # flags that other programs have: what stands for them here, in one command or another
    "--num-img": ("--images", "--shots"),
    "--limit": ("--images", "--shots"),
    "--data-dir": ("--data",),
    "--patch-size": ("--area, a share of the image",),
    "--resume": ("--name, that of the run", "--out, that of the run"),
    "--save-adv": ("--name, whose folder has them in adv/ in any case",),
}
parsed: list[str] = []  # the flags of the command at hand, by name


def parse(cls: type[Options], description: str, argv: list[str] | None = None) -> Options:
    """Options from the command line; hyphens and underscores mean the same. A tuple takes positional arguments."""
    start = cls()
    flags = list(leaves(start))
    parsed[:] = [f.name for f in flags]
    usage = " ".join(["[options]", *(f.name for f in flags if f.hint == tuple[str, ...])])
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=f"%(prog)s {usage}",
    )
    group: Any = parser
    for f in flags:
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        flag = flagged(f.name)
        text = f.metadata["help"].replace("%", "%%")  # argparse formats it
        text += "" if f.shown in (None, ()) else f" (default: {f.shown})"
        kind = f.kind
        if f.hint == tuple[str, ...]:
            group.add_argument(f.name, nargs="*", help=text)
        elif kind is bool:
            group.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, default=f.value, help=text)
        else:
            choices, kind = f.metadata["choices"], in_unit(UNITS.get(f.name, ""), kind)
            group.add_argument(flag, dest=f.name, type=kind, choices=choices, default=f.value, help=text)
    args, rest = parser.parse_known_intermixed_args(list(map(spelt, sys.argv[1:] if argv is None else argv)))
    if rest:
        known = [flagged(f.name) for f in flags]
        flag = rest[0].split("=")[0]
        ours = [words for words in HABITS.get(flag, ()) if words.split(",")[0] in known]
        hint = f" (here: {ours[0]})" if ours else nearest(flag, known)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    for f in flags:
        value, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float):
            check_range(flagged(f.name), value, low, high)
    return change(start, **vars(args))


def in_unit(unit: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse that takes a number with and without its unit: of GiB 8, 8G, 8GB and 8GiB."""

    def read(text: str) -> Any:
        return kind(text.rstrip(unit + unit.lower()))

    read.__name__ = kind.__name__  # for messages
    return read if unit else kind


def flagged(name: str) -> str:
    """An option as a flag: --noise-ratio for noise_ratio."""
    return f"--{name}".replace("_", "-")


def spelt(word: str) -> str:
    """A word of the command line in its usual spelling: --noise_ratio=0.5 becomes --noise-ratio=0.5.

    ~ after = becomes the home folder, since not every shell does that.
    """
    flag, equals, value = word.partition("=")
    at_home = os.path.expanduser(value)  # noqa: PTH111  (Path would make . of nothing)
    return flag.replace("_", "-") + equals + at_home if flag.startswith("--") else word


def check_read(opts: Any, readers: Mapping[str, tuple[str, object]]) -> None:
    """Raises InputError for an option that is not at its default and that nothing in this command reads.

    `readers` maps an option's name to what reads it, and whether that is there.
    """
    given, usual = flat(opts), flat(type(opts)())
    for name, (reader, there) in readers.items():
        if given.get(name) != usual.get(name) and not there:
            raise InputError(f"{flagged(name)} is read by {reader} alone: add that, or leave it out")


FREE = ("device", "quiet", "track", "micro_batch", "keep")  # of any run: they change results by rounding alone


def settings(opts: Any, *free: str) -> dict:
    """The options that results depend on: all but FREE and those named."""
    return {k: v for k, v in flat(opts).items() if k not in (*FREE, *free)}


SPARING = ("max_memory", "micro_batch", "batch_size", "eot_batch")  # what takes less memory when it is lower
KEPT = "what is written stays; start the same command again, with the same --name or --out"
FAULTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some space: {KEPT}") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO),
    "choose another place, or change its permissions",
)  # of files, by what the system says


def out_of_memory(e: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or a CPU's, for which torch has no error of its own."""
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(e)


def run(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: 0; 2 with one line where the input, the disk, a permission or the memory is at fault; 130
    where Ctrl-C or SIGTERM stopped it."""
    keep_freed_memory()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the scripts have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        main()
        sys.stdout.flush()
        code = 0
    except (InputError, Interrupted) as e:
        told, code = str(e), 2 if isinstance(e, InputError) else 130
    except KeyboardInterrupt:
        told, code = f"stopped; {KEPT}", 130
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        told, code = "", 0
    except OSError as e:
        if e.errno not in FAULTS:
            raise
        told, code = f"{e.filename or 'a file'}: {e.strerror}; {FAULTS[e.errno]}", 2
    except (MemoryError, RuntimeError) as e:
        if "home directory" in str(e):  # of pathlib
            told, code = "a path begins with ~ and a name that no user here has; write the path out", 2
        elif out_of_memory(e):
            sparing = [flagged(name) for name in SPARING if name in parsed]
            advice = f"give a lower {' or '.join(sparing)}: " if sparing else ""
            told, code = f"out of memory; {advice}{KEPT}", 2
        else:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        program = Path(sys.argv[0])
        name = program.parent.name if program.name == "__main__.py" else program.name
        print(f"{name}: {told}", file=sys.stderr)
    sys.exit(code)
