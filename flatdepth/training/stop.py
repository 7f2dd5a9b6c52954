"""Stopping a run from outside: SIGTERM and SIGINT are remembered and acted upon between steps."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator

from flatdepth.cli import signals_to
from flatdepth.errors import Stopped

ONE_REQUEST_SECONDS = 2.0


class StopRequest:
    """Remembers SIGTERM and SIGINT until all ranks agree on it: after a step or a validation batch.

    A process that is alone acts ``at_once`` where it reads, waits or validates. A second SIGINT
    interrupts anywhere, unless it comes within ``ONE_REQUEST_SECONDS``: a Ctrl-C reaches the
    processes from the terminal and, passed on, from torchrun.

    Attributes:
        received: whether this process was asked to stop.
        agreed: whether the run stops.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received = False
        self.agreed = False
        self._accelerator = accelerator
        self._at_once = False
        self._first = 0.0

    def __enter__(self) -> "StopRequest":
        self._signals = signals_to(self._receive)
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__(None, None, None)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a request is ``Stopped`` if the process is alone; others would wait for it."""
        self._at_once = self._accelerator.num_processes == 1
        try:
            if self._at_once and self.received:
                self._stop()
            yield
        finally:
            self._at_once = False

    def agree(self) -> None:
        """Raise ``Stopped`` if any rank was asked to stop; collective over all ranks."""
        asked = torch.tensor([float(self.received)], device=self._accelerator.device)
        if self._accelerator.reduce(asked, "sum").item() > 0:
            self._stop()

    def _stop(self) -> NoReturn:
        self.agreed = True
        raise Stopped

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
            if self._at_once:
                self._stop()
        elif number == signal.SIGINT and now - self._first > ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt(number)
