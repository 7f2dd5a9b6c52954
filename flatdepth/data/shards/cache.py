"""Files of remote sets that are kept on this machine, under names that say their content."""

import os
from collections.abc import Callable
from pathlib import Path

from flatdepth.errors import UserError

CACHE_VARIABLE = "FLATDEPTH_CACHE"
"""Of the environment: where files are kept; else ``flatdepth`` in ``XDG_CACHE_HOME``."""


def cache_directory() -> Path:
    """Where files are kept, whether it exists or not."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flatdepth")


def downloaded(name: str, fetch: Callable[[str], object]) -> Path:
    """The kept file of a name, which ``fetch`` writes to a path if there is none.

    It appears whole or not at all, so that several processes may ask at once.

    Raises:
        UserError: it cannot be kept here.
    """
    target = cache_directory() / name
    if target.is_file():
        return target
    temporary = target.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(
            f"cannot keep files of remote sets in {target.parent} ({error.strerror}); set "
            f"{CACHE_VARIABLE} to a directory that can be written to"
        ) from error
    try:
        fetch(str(temporary))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
