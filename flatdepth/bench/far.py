"""A file system that is as far away as one likes: local files behind made-up delays.

``far://HOST/PATH`` is a file below the directory of a ``Line`` in ``LINES``.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem


@dataclass(slots=True, kw_only=True)
class Line:
    """What lies between here and a host.

    Attributes:
        directory: what the host serves.
        median_s: median time to the first byte, log-normal with a sigma of 0.25.
        slow_share, slow_s: share of the answers that take so long instead.
        bytes_per_s: of each answer after its first byte.
        seed: of the delays.
        hangs: whether the host never answers a request, told by its number from 0.
        asked: (path, start, end) of all requests for ranges.
    """

    directory: Path
    median_s: float = 0.0
    slow_share: float = 0.0
    slow_s: float = 0.0
    bytes_per_s: float = 1e12
    seed: int = 0
    hangs: Callable[[int], bool] = lambda _: False
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def delay_s(self, length: int) -> float:
        """Seconds that an answer of so many bytes takes, drawn anew."""
        slow = self._random.random() < self.slow_share
        first_s = self.slow_s if slow else self.median_s * self._random.lognormvariate(0, 0.25)
        return first_s + length / self.bytes_per_s

    _random: random.Random = field(init=False, repr=False)


LINES: dict[str, Line] = {}
"""By host."""


class FarFileSystem(AsyncFileSystem):
    """Reads through ``LINES``."""

    protocol = "far"

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        line, file = self._place(path)
        if not file.is_file():
            raise FileNotFoundError(path)
        if start is None or end is None:
            return file.read_bytes()
        line.asked.append((path, start, end))
        if line.hangs(len(line.asked) - 1):
            await asyncio.sleep(1e6)
        await asyncio.sleep(line.delay_s(end - start))
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read(end - start)

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(await self._cat_file(rpath))

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        file = self._place(path)[1]
        if not file.exists():
            raise FileNotFoundError(path)
        kind = "file" if file.is_file() else "directory"
        return {"name": path, "size": file.stat().st_size, "type": kind}

    def _place(self, path: str) -> tuple[Line, Path]:
        host, _, rest = self._strip_protocol(path).partition("/")
        return LINES[host], LINES[host].directory / rest


def register() -> None:
    """Let fsspec know ``far://``."""
    fsspec.register_implementation("far", FarFileSystem, clobber=True)
