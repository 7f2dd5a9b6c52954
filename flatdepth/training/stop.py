"""Stopping a run from outside: SIGTERM and SIGINT are remembered and acted upon between steps.

Who is to be signalled is written beside the run while a process has it.
"""

import json
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
import torch
from accelerate import Accelerator

from flatdepth.cli import signals_to
from flatdepth.errors import Stopped, UserError
from flatdepth.show.pictures import write_atomic
from flatdepth.untrusted import parse_json

ONE_REQUEST_SECONDS = 2.0

_SAME_START_SECONDS = 1.0


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


def record_process(run: Path) -> None:
    """Write beside a run that this process has it: number, start and host."""
    own = psutil.Process()
    record = {"pid": own.pid, "started": own.create_time(), "host": platform.node()}
    write_atomic(_record_of(run), json.dumps(record).encode())


def forget_process(run: Path) -> None:
    """Undo ``record_process``."""
    _record_of(run).unlink(missing_ok=True)


def process_of(run: Path) -> psutil.Process | str | None:
    """The process that has a run; the name of its host if that is another one; None if none has it.

    A record that a killed process left is none: its number may be another's now, but not with the
    same start.
    """
    try:
        record = parse_json(_record_of(run).read_bytes())
        pid, started, host = int(record["pid"]), float(record["started"]), str(record["host"])
        if host != platform.node():
            return host
        found = psutil.Process(pid)
        same = abs(found.create_time() - started) < _SAME_START_SECONDS
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return None


def ask_to_stop(run: Path) -> int:
    """Ask the process that has a run to stop, as Ctrl-C does; returns its number.

    Raises:
        UserError: none has it, it is on another host, or somebody else's.
    """
    found = process_of(run)
    if isinstance(found, str):
        raise UserError(f"{run.name} runs on {found}; stop it there")
    try:
        if found is None:
            raise psutil.NoSuchProcess(0)
        found.send_signal(signal.SIGINT)  # psutil looks once more whether it is still the same
    except psutil.NoSuchProcess as error:
        raise UserError(f"{run.name} is not running; there is nothing to stop") from error
    except psutil.AccessDenied as error:
        raise UserError(f"{run.name} runs as another user, who alone can stop it") from error
    return found.pid


def _record_of(run: Path) -> Path:
    return run.with_name(f".{run.name}.process.json")
