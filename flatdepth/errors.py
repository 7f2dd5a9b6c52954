"""The two kinds of trouble a user can cause. Everything else is a bug and keeps its traceback."""

import errno
import sys
from collections.abc import Callable

from flatdepth.malloc import keep_freed_memory

_REFUSALS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
)


class UserError(Exception):
    """A mistake in a command, a config or a file layout.

    The message is one sentence that names the file or key, what was expected and found, and the
    fix. Command lines print it without a traceback and exit with code 2.
    """


class BadFrame(Exception):
    """One raw frame that cannot be used (corrupt file, wrong shape, no valid depth).

    Packing skips the frame, counts it under ``reason`` and lists it. ``reason`` is a short phrase
    shared by all frames with the same trouble ("image unreadable"); ``detail`` is specific.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room: for tensors, or for what cuBLAS and cuDNN take themselves."""
    return any(sign in str(error) for sign in ("out of memory", "_ALLOC_FAILED"))


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line's ``main`` and exit; a ``UserError`` becomes one line and exit code 2.

    So does a file or directory that the user named and that cannot be written or read.
    """
    keep_freed_memory()
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in _REFUSALS or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; name another place", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
