"""Ctrl-C and SIGTERM between two pieces of work, not within one."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


class Interrupted(Exception):
    """Work stopped where it was asked to; the message says how to go on. Scripts print it and exit with code 130."""


@contextmanager
def patient(goes_on: str) -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C and SIGTERM wait for the next call of the function given, which raises Interrupted(goes_on); a
    second one does not wait. Only the main thread is told of signals: in another one nothing is done."""
    asked: list[bool] = []

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print("\nfinishing what is in hand; once more to stop at once", file=sys.stderr, flush=True)

    def check() -> None:
        if asked:
            raise Interrupted(goes_on)

    signals = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    before = {s: signal.signal(s, ask) for s in signals}
    try:
        yield check
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
