"""Files of remote sets that are kept on this machine, under names that say their content.

The columns of their indexes, and samples up to a limit, for all processes of the machine.
"""

import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from flatdepth.errors import UserError, printable

CACHE_VARIABLE = "FLATDEPTH_CACHE"
"""Of the environment: where files are kept; else ``flatdepth`` in ``XDG_CACHE_HOME``."""

SAMPLES = "samples"
"""Directory of kept samples in the cache."""

PAGE = 4096
"""Bytes that files are counted in."""

SLACK = 0.05
"""Share of the limit that is made free together, so that the directory is rarely listed."""

PAUSE_SECONDS = 60.0
"""How long nothing is kept after there was no room."""

YOUNG_SECONDS = 60.0
"""How much later than this process another one of the same run may have begun."""

_LOCK_SECONDS = 2.0
_STALE_SECONDS = 3600.0
_COUNT = struct.Struct("<qd")  # bytes in use, time when they were last counted


def cache_directory() -> Path:
    """Where files are kept, whether it exists or not."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flatdepth")


def downloaded(name: str, fetch: Callable[[str], object]) -> Path:
    """The kept file of a name, which ``fetch`` writes to a path if there is none.

    It appears whole or not at all. Of several processes that ask at once, one fetches.

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
        with FileLock(target.with_name(f".{name}.lock")):
            if not target.is_file():
                fetch(str(temporary))
                temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


class SampleCache:
    """Bytes of samples in files, never more than a limit together, whoever writes them.

    What is to be written is first added to a count that all processes share, under a lock. Files
    appear whole or not at all: a process killed at any moment leaves the count too high and a file
    under another name at worst. Files are counted when a process begins and when there is no room,
    which is when such files are removed.

    Where there is no room, files give way that were not used since this run began, the least
    recently used first. Others stay, and the new one is not kept: a run reads its samples equally
    often, so to throw one out for the other gains nothing, and in random order costs most hits.

    Nothing here stops a run: what goes wrong is said once, and samples are read from their server.
    """

    def __init__(self, limit: int, directory: Path) -> None:
        self._limit = limit
        self._directory = directory
        self._since = time.time() - YOUNG_SECONDS
        self._no_room_until = 0.0
        self._mutex = threading.Lock()
        self._has_counted = False
        self._told: set[str] = set()

    def get(self, name: str, length: int, crc32: int) -> bytes | None:
        """The bytes under a name, if they are here; damaged ones are removed, with a note."""
        path = self._path(name)
        try:
            blob = path.read_bytes()
            if len(blob) == length and zlib.crc32(blob) == crc32:
                with suppress(OSError):
                    os.utime(path)
                return blob
            path.unlink(missing_ok=True)
            self._tell("damaged", f"{path} is damaged; it is removed and its sample read again")
        except FileNotFoundError:
            pass
        except OSError as error:
            self._tell("read", f"cannot read {path} ({error.strerror}); samples come from afar")
        return None

    def holds(self, name: str) -> bool:
        """Whether something is kept under a name."""
        return self._path(name).exists()

    def put(self, name: str, blob: bytes) -> None:
        """Keep bytes under a name if there is room."""
        path = self._path(name)
        size = -(-len(blob) // PAGE) * PAGE
        if size > self._limit or time.monotonic() < self._no_room_until:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() or not self._reserve(temporary, len(blob)):
                return
            try:
                with temporary.open("r+b") as file:
                    file.write(blob)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                with suppress(Timeout), self._counted() as used:
                    used[0] -= size
                raise
        except Timeout:
            self._no_room_until = time.monotonic() + _LOCK_SECONDS
        except OSError as error:
            self._no_room_until = time.monotonic() + PAUSE_SECONDS
            self._tell(
                "write", f"cannot keep samples in {self._directory} ({error.strerror}); going on"
            )

    def _path(self, name: str) -> Path:
        return self._directory / name[:2] / name

    def _reserve(self, temporary: Path, length: int) -> bool:
        """Make a file of zeros, if the limit allows it; so whoever counts files counts it too."""
        size = -(-length // PAGE) * PAGE
        with self._counted() as used:
            if used[0] + size > self._limit:
                used[0] = self._make_room(size)
            if used[0] + size > self._limit:
                return False
            with temporary.open("wb") as file:
                file.truncate(length)
            used[0] += size
        return True

    @contextmanager
    def _counted(self) -> Iterator[list[int]]:
        """Within, no other process changes the bytes in use, which may be changed in the list.

        Raises:
            Timeout: another process holds the lock for longer than such things take.
        """
        lock = FileLock(self._directory / ".lock")
        with self._mutex, lock.acquire(_LOCK_SECONDS, poll_interval=0.002):
            descriptor = os.open(self._directory / ".count", os.O_RDWR | os.O_CREAT)
            try:
                content, now = os.pread(descriptor, _COUNT.size, 0), time.time()
                used, counted_at = _COUNT.unpack(content) if len(content) == _COUNT.size else (0, 0)
                if not counted_at or not (self._has_counted or counted_at > now - PAUSE_SECONDS):
                    used, counted_at = sum(size for _, size, _ in self._files()), now
                self._has_counted = True
                figures = [used]
                yield figures
                os.pwrite(descriptor, _COUNT.pack(figures[0], counted_at), 0)
            finally:
                os.close(descriptor)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of all files."""
        found = []
        for folder in os.scandir(self._directory):
            if not folder.is_dir():
                continue
            for file in os.scandir(folder.path):
                with suppress(OSError):
                    about = file.stat()
                    size = -(-about.st_size // PAGE) * PAGE
                    found.append((about.st_mtime, size, Path(file.path)))
        return found

    def _make_room(self, size: int) -> int:
        """Remove files until ``size`` more bytes fit, or none may be; returns the bytes in use."""
        begun = time.monotonic()
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        goal = min(self._limit - size, int((1 - SLACK) * self._limit))
        for used_at, freed, path in files:
            is_stale = path.suffix == ".tmp" and used_at < time.time() - _STALE_SECONDS
            is_old = path.suffix != ".tmp" and used_at < self._since
            if is_stale or (is_old and used > goal):
                with suppress(OSError):
                    path.unlink()
                    used -= freed
        if used + size > self._limit:
            now = time.monotonic()
            self._no_room_until = now + max(PAUSE_SECONDS, 100 * (now - begun))
        return used

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            print(f"note: {printable(text)}", file=sys.stderr, flush=True)


@lru_cache(maxsize=8)
def sample_cache(limit: int, directory: Path) -> SampleCache:
    """The one of this process for a limit in bytes and a directory of the cache."""
    return SampleCache(limit, directory / SAMPLES)
