"""The two kinds of trouble a user can cause. Everything else is a bug and keeps its traceback."""

import importlib
import re
from pathlib import Path
from types import ModuleType

_LOGIN = re.compile(r"(\w://)[^/\s'\"]+@")
_QUERY = re.compile(r"(\w://[^\s?'\"]+)\?[^\s'\")]+")


class UserError(Exception):
    """A mistake in a command, a config or a file layout.

    The message is one sentence that names the file or key, what was expected and found, and the
    fix, on one line whatever the file holds. Command lines print it without a traceback and exit
    with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(without_secrets(message)))


class BadFrame(Exception):
    """One raw frame that cannot be used (corrupt file, wrong shape, no valid depth).

    Packing skips the frame, counts it under ``reason`` and lists it. ``reason`` is a short phrase
    shared by all frames with the same trouble ("image unreadable"); ``detail`` is specific.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(printable(f"{reason}: {detail}" if detail else reason))
        self.reason = reason
        self.detail = detail


def printable(text: str | Path) -> str:
    """A text on one line: control characters and undecodable bytes become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def without_secrets(text: str) -> str:
    """A text whose URLs have lost users, passwords and queries, which may be signatures."""
    return _QUERY.sub(r"\1?***", _LOGIN.sub(r"\1***@", text))


class Stopped(BaseException):
    """A training was asked to stop and could do so at once, with nothing to save but its state."""


def expect_within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number that is not in low..high, the ends included; NaN and infinity never are.

    Raises:
        UserError: it is not; the message begins with ``name``.
    """
    if not low <= value <= high:
        raise UserError(f"{name}: expected {low} to {high}, got {value}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room: on a device, for cuBLAS and cuDNN, on the CPU, for a thread."""
    signs = ("out of memory", "_ALLOC_FAILED", "Cannot allocate memory", "can't start new thread")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def import_extra(package: str, wanted_by: str, extra: str | None = None) -> ModuleType:
    """Import an optional dependency.

    Args:
        package: its name.
        wanted_by: the configuration key and value that need it, for the message.
        extra: the extra of flatdepth that installs it; None if none does.

    Raises:
        UserError: the package is missing or does not import.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        wanted = package if extra is None else f"'flatdepth[{extra}]'"
        raise UserError(
            f"{wanted_by} needs the package {package} ({error}); pip install {wanted}"
        ) from error
