"""Stopping a run from outside: SIGTERM and SIGINT are remembered and acted upon between steps."""

import signal
import time
from types import FrameType

ONE_REQUEST_SECONDS = 2.0


class StopRequest:
    """Remembers SIGTERM and SIGINT until the end of the step, when all ranks agree on it.

    A second SIGINT interrupts at once, unless it comes within ``ONE_REQUEST_SECONDS``: a Ctrl-C
    reaches the processes from the terminal and, passed on, from torchrun.
    """

    def __init__(self) -> None:
        self.received = False
        self.agreed = False
        self._first = 0.0

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
        elif number == signal.SIGINT and now - self._first > ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt
