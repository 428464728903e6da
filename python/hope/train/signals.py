"""Ctrl-C and SIGTERM as a wish to stop after the step."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopSignals:
    """While open, a first SIGINT or SIGTERM is only noted; a second raises KeyboardInterrupt.

    grace: seconds in which a second one is taken for the first: what has started the processes of a
    run may hand on a signal that they have received themselves.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self.grace, self._since = grace, 0.0
        self.received: signal.Signals | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._stack.enter_context(_handler(number, self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._since < self.grace:
                return
            raise KeyboardInterrupt
        self._since = time.monotonic()
        self.received = signal.Signals(number)
        # print is not safe in a handler: it may have interrupted another print.
        os.write(2, b"\nstopping after this step, with a checkpoint (again: at once, without)\n")


@contextlib.contextmanager
def _handler(number: signal.Signals, handle: Any) -> Iterator[None]:
    previous = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, previous)
