"""Samples of remote sets that are read before they are asked for, neighbours by one request.

Who knows which samples come next announces them. Those that lie close together in a shard become
one request; daemon threads send these in the order of use, as far as there is room for bytes that
nobody has asked for yet. A sample that is asked for before its request was sent has it sent at
once. Bytes and order are the same as without.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

from flatdepth.data.shards.remote import NotWanted, Ranges

Task = TypeVar("Task")

AHEAD_BYTES = 256 << 20
"""Most bytes that are read ahead by a process."""

GAP_BYTES = 512 << 10
"""Between samples that are read together: what comes in the time of a first byte, or so."""

TOGETHER_BYTES = 8 << 20
"""Most bytes of a request for several samples."""


@runtime_checkable
class Source(Protocol):
    """A set whose samples may be read ahead; ``ShardSet`` is one."""

    @property
    def ranges(self) -> Ranges | None: ...

    def shard_path(self, number: int) -> str: ...

    def place_ahead(self, i: int) -> tuple[int, int, int] | None: ...

    def expect(self, together: "Together") -> None: ...

    def forget(self, together: "Together") -> None: ...


class Room:
    """Bytes that may be held; its lock is that of all that hold some.

    Attributes:
        held: bytes now.
        most: bytes at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self.changed = threading.Condition()

    def free(self, size: int) -> None:
        """Hold so many bytes less."""
        with self.changed:
            self.held -= size
            self.changed.notify_all()


class Together:
    """Samples of one shard that are read by one request.

    Attributes:
        spans: sample -> first and past-the-last byte, of those that nobody has taken yet.
        size: bytes of the request.
    """

    def __init__(
        self, ranges: Ranges, path: str, spans: Mapping[int, tuple[int, int]], room: Room
    ) -> None:
        self.spans = dict(spans)
        self._start = min(start for start, _ in spans.values())
        self._end = max(end for _, end in spans.values())
        self.size = self._end - self._start
        self._ranges = ranges
        self._path = path
        self._room = room
        self._parts: dict[int, bytes] = {}
        self._error: OSError | None = None
        self._is_begun = False
        self._done = threading.Event()

    @property
    def is_waiting(self) -> bool:
        """Whether it is still to be read."""
        return bool(self.spans) and not self._is_begun

    def begin(self) -> bool:
        """Take the room it needs; whoever gets True must ``fetch``."""
        with self._room.changed:
            if not self.is_waiting or self._room.held + self.size > self._room.most:
                return False
            self._room.held += self.size
            self._is_begun = True
            return True

    def fetch(self) -> None:
        """Read it. What comes in another length is left to be read sample by sample."""
        parts: dict[int, bytes] = {}
        try:
            blob = self._ranges.read(self._path, self._start, self._end, lambda: bool(self.spans))
            if len(blob) == self.size:
                parts = {
                    i: blob[start - self._start : end - self._start]
                    for i, (start, end) in self.spans.copy().items()
                }
        except NotWanted:
            pass
        except OSError as error:
            self._error = error
        finally:
            with self._room.changed:
                self._parts = {i: part for i, part in parts.items() if i in self.spans}
                self._room.free(self.size - sum(map(len, self._parts.values())))
            self._done.set()

    def take(self, i: int) -> bytes | None:
        """The bytes of a sample, which are given once; None if it must be read alone.

        Raises:
            OSError: as ``Ranges.read``.
        """
        if self.begin():
            self.fetch()
        if self._is_begun:
            self._done.wait()
        blob = self.drop(i)
        if self._error is not None:
            raise OSError(str(self._error)) from self._error
        return blob

    def drop(self, i: int) -> bytes | None:
        """Forget a sample; returns its bytes if they are there."""
        with self._room.changed:
            self.spans.pop(i, None)
            blob = self._parts.pop(i, None)
            self._room.free(len(blob or b""))
            return blob


class ReadAhead:
    """Reads what was announced, on threads that begin with the first remote sample."""

    def __init__(self, threads: int, most: int = AHEAD_BYTES) -> None:
        self.room = Room(most)
        self._threads = threads
        self._queue: deque[Together] = deque()
        self._expected: list[tuple[Source, Together]] = []
        self._is_begun = self._is_closed = False

    def through(
        self, tasks: Iterator[Task], chunk: int, sample: Callable[[Task], tuple[Source, int]]
    ) -> Iterator[Task]:
        """The tasks, announced in chunks, each of them one chunk before it is begun."""
        begun: list[Task] = []
        while coming := list(islice(tasks, chunk)):
            self.announce(sample(task) for task in coming)
            yield from begun
            begun = coming
        yield from begun

    def announce(self, samples: Iterable[tuple[Source, int]]) -> None:
        """Say which samples will be asked for, in that order."""
        places: dict[tuple[int, int], dict[int, tuple[int, int, int]]] = defaultdict(dict)
        sources: dict[int, Source] = {}
        for turn, (source, i) in enumerate(samples):
            if (place := source.place_ahead(i)) is not None:
                number, start, end = place
                sources[id(source)] = source
                places[id(source), number].setdefault(i, (start, end, turn))
        if not places:
            return
        found: list[tuple[int, Source, Together]] = []
        for (key, number), spans in places.items():
            source = sources[key]
            assert source.ranges is not None
            for group in neighbours(spans):
                first = min(spans[i][2] for i in group)
                own = {i: spans[i][:2] for i in group}
                path = source.shard_path(number)
                found.append((first, source, Together(source.ranges, path, own, self.room)))
        found.sort(key=lambda one: one[0])
        with self.room.changed:
            self._expected = [one for one in self._expected if one[1].spans]
            for _, source, together in found:
                source.expect(together)
                self._expected.append((source, together))
                self._queue.append(together)
            self.room.changed.notify_all()
        if not self._is_begun:
            self._is_begun = True
            for _ in range(self._threads):
                threading.Thread(target=self._work, name="ahead", daemon=True).start()

    def close(self) -> None:
        """Give up what nobody has asked for yet, and end the threads."""
        with self.room.changed:
            self._is_closed = True
            self._queue.clear()
            for source, together in self._expected:
                source.forget(together)
                for i in list(together.spans):
                    together.drop(i)
            self._expected = []
            self.room.changed.notify_all()

    def _work(self) -> None:
        while (together := self._next()) is not None:
            together.fetch()

    def _next(self) -> Together | None:
        """The next request, as soon as there is one and room for it; None at the end."""
        with self.room.changed:
            while not self._is_closed:
                while self._queue and not self._queue[0].is_waiting:
                    self._queue.popleft()
                if self._queue and self._queue[0].begin():
                    return self._queue.popleft()
                self.room.changed.wait()
        return None


def neighbours(spans: Mapping[int, tuple[int, int, int]]) -> Iterator[list[int]]:
    """The samples of a shard in groups that are worth one request each."""
    group: list[int] = []
    begin = last = 0
    for i in sorted(spans, key=lambda i: spans[i]):
        start, end, _ = spans[i]
        if group and (start - last > GAP_BYTES or end - begin > TOGETHER_BYTES):
            yield group
            group = []
        if not group:
            begin = start
        group.append(i)
        last = end
    yield group
