"""The exceptions that mean the user's input is at fault, not the program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


LONGEST = 900  # characters of a message


class InputError(ValueError):
    """Says in one line what was given, what is allowed and what to do. The scripts print it and exit with code 2.

    A damaged file may bring words of any length: the middle of a very long line is left out.
    """

    def __init__(self, line: str):
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """ " (nearest: NAME)" for what was probably meant, to end a message with; empty where nothing is near."""
    close = [name for name in allowed if given and name.startswith(given)] or get_close_matches(given, list(allowed), 1)
    return f" (nearest: {close[0]})" if close else ""


class NonFinite(InputError):
    """NaN or infinity in `what`, for the images at `rows` of the batch."""

    def __init__(self, what: str, rows: list[int]):
        super().__init__(f"NaN or infinity in the {what} of image {', '.join(map(str, rows))} of the batch")
        self.what, self.rows = what, rows


def check_finite(what: str, x: Tensor) -> None:
    """Raises NonFinite unless every number of x (B, ...) is finite."""
    good = x.detach().flatten(1).isfinite().all(dim=1)
    if not good.all():
        raise NonFinite(what, (~good).nonzero()[:, 0].tolist())


@contextmanager
def named_images(image_ids: Sequence[str]) -> Iterator[None]:
    """Turns a NonFinite of this batch, or of several copies of it side by side, into an error that names its images."""
    try:
        yield
    except NonFinite as e:
        names = ", ".join(dict.fromkeys(image_ids[i % len(image_ids)] for i in e.rows))
        raise InputError(f"NaN or infinity in the {e.what} of {names}; --dtype float32 may help") from e
