"""Command lines from dataclasses: one field, one flag. Bad input ends in one line and exit code 2."""

import argparse
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from diffender.errors import InputError

Options = TypeVar("Options")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field with its help text, and its allowed values or range (both ends included)."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class ModelOptions:
    """Which diffusion model runs, and how: the flags that the scripts share."""

    model: str = option("auto", "preset of diffender.diffusion; auto: the embedded tiny, or what --weights holds")
    weights: str | None = option(None, "single file or Hugging Face folder; random: for trials at full size")
    ema: bool = option(False, "take the averaged copies of the UNet, which some files of training hold")
    vae: str | None = option(None, "another VAE, alone or in a whole model")
    locate_unet: str | None = option(None, "a separate 4-channel UNet for localisation, as in the authors' demo")
    prediction: str = option(
        "auto", "what UNets predict whose files do not say (auto: epsilon)", choices=("auto", "epsilon", "v")
    )
    dtype: str = option(
        "auto", "of the UNets (auto: float32 on the CPU, bfloat16 on a GPU); text tower and VAE stay in float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    micro_batch: int | None = option(None, "at most so many latents or pictures in a network at a time", low=1)
    device: str = option("auto", "auto, cpu, cuda, ...")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; argparse would print its usage first."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(cls: type[Options], description: str, argv: list[str] | None = None) -> Options:
    """Options from the command line; hyphens and underscores mean the same."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = get_type_hints(cls)
    for f in fields(cls):
        assert f.default is not MISSING, f"option {f.name} needs a default"
        flags = {f"--{f.name.replace('_', '-')}": None, f"--{f.name}": None}
        text = f"{f.metadata['help']} (default: {f.default})"
        if hints[f.name] is bool:
            parser.add_argument(
                *flags, dest=f.name, action=argparse.BooleanOptionalAction, default=f.default, help=text
            )
        else:
            hint = hints[f.name]
            kind = hint.__args__[0] if isinstance(hint, types.UnionType) else hint
            choices = f.metadata["choices"]
            parser.add_argument(*flags, dest=f.name, type=kind, choices=choices, default=f.default, help=text)
    args = parser.parse_args(argv)
    for f in fields(cls):
        value, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            parser.error(f"--{f.name.replace('_', '-')} is {value}; allowed is {allowed}")
    return cls(**vars(args))


def run(main: Callable[[], None]) -> NoReturn:
    """Call main and exit: 0, or 2 with one line where the input is at fault."""
    try:
        main()
    except InputError as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
