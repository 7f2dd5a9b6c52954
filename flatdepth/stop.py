"""Stopping a run from outside: SIGTERM and SIGINT are remembered and acted upon between steps."""

import signal
from types import FrameType


class StopRequest:
    """Remembers SIGTERM and SIGINT until the end of the step, when all ranks agree on it.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received = False
        self.agreed = False

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
