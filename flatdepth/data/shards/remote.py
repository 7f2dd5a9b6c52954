"""Ranges of remote files: second requests for slow ones, time-outs, waiting for a server to return.

A range that takes longer than 95 % of its like is asked for a second time, and the first answer
counts (hedged requests; Dean & Barroso, "The Tail at Scale", CACM 56(2), 2013). A budget holds the
second requests to a few percent. What hangs is given up and tried again; a server that has answered
before is waited for, which costs a note a minute at most, however many reads wait.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401  its exit handler must be there before ours
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.dirfs import DirFileSystem

from flatdepth.errors import without_secrets

Value = TypeVar("Value")

ATTEMPTS = 5
"""How often a remote read is tried, however soon each attempt fails."""

FIRST_PAUSE_SECONDS = 0.5
"""Wait before the second attempt; every further one takes twice as long as the one before."""

LONGEST_PAUSE_SECONDS = 30.0

NOTE_SECONDS = 60.0
"""Least time between two notes about a server; it doubles while the server is away."""

SLOWEST_BYTES_PER_S = 100_000
"""Time that the bytes of a range may take, beside the time-out, before it counts as hanging."""

HEDGE_FLOOR_SECONDS = 0.1
"""A second request is never sent sooner."""

UNKNOWN_SECONDS = 2.0
"""When a second request is sent while too few reads have been timed."""

_TIMED = 256
_LEAST_TIMED = 32
_BURST = 10.0
_SLICE_SECONDS = 0.2
_MOST_THREADS = 64
_CURABLE = (408, 425, 429)  # of the HTTP statuses that say that the request was wrong
_FINAL = (FileNotFoundError, NotADirectoryError, PermissionError)

_ending = threading.Event()
# The interpreter joins the threads of executors before it ends; this lets those go that wait here.
threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a remote set is read.

    Attributes:
        timeout_s: seconds without an answer after which a request is given up.
        outage_s: how long a server that has answered before is waited for, in seconds.
        cache_bytes: how much is kept on this machine, of all sets together; 0: nothing.
        hedged: second requests as a share of all, at most; 0: none.
    """

    timeout_s: float = 30.0
    outage_s: float = 1800.0
    cache_bytes: int = 0
    hedged: float = 0.05


class Server:
    """What is known of a server: how long its answers take, and whether it is away.

    Attributes:
        name: scheme and host, or bucket; no secrets.
        requests, hedges: ranges that were asked for, and how many of them a second time.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = 0
        self.hedges = 0
        self.slots = threading.BoundedSemaphore(_MOST_THREADS)
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMED))
        self._tokens = 1.0
        self._lock = threading.Lock()
        self._has_answered = False
        self._away_since: float | None = None
        self._failures = 0
        self._next_note = 0.0
        self._pause = NOTE_SECONDS
        self._is_noted = False

    @property
    def has_answered(self) -> bool:
        """Whether any range was read from it."""
        return self._has_answered

    def asked(self, share: float) -> None:
        """Count a request, which allows ``share`` second ones."""
        with self._lock:
            self.requests += 1
            self._tokens = min(_BURST, self._tokens + share)

    def may_hedge(self, share: float) -> bool:
        """Whether a second request may be sent now, which is then counted."""
        with self._lock:
            if share <= 0 or self._tokens < 1:
                return False
            self._tokens -= 1
            self.hedges += 1
            return True

    def hedge_after_s(self, length: int) -> float:
        """The 95th percentile of the seconds that ranges of about this length took lately."""
        with self._lock:
            times = sorted(self._times[length.bit_length()])
        if len(times) < _LEAST_TIMED:
            return UNKNOWN_SECONDS
        return max(HEDGE_FLOOR_SECONDS, times[len(times) * 95 // 100])

    def answered(self, seconds: float, length: int) -> None:
        """Count an answer; a note says so if the server had been away."""
        with self._lock:
            self._has_answered = True
            self._times[length.bit_length()].append(seconds)
            if self._away_since is None:
                return
            away_s, noted = time.monotonic() - self._away_since, self._is_noted
            self._away_since, self._is_noted, self._pause = None, False, NOTE_SECONDS
        if noted and away_s >= NOTE_SECONDS:
            _note(f"{self.name} answers again after {away_s / 60:.0f} min")

    def failed(self, error: Exception, outage_s: float) -> None:
        """Count an attempt that failed and will be repeated; a note says so now and then."""
        with self._lock:
            now = time.monotonic()
            self._away_since = self._away_since or now
            self._failures += 1
            if now < self._next_note:
                return
            away_s, failures = now - self._away_since, self._failures
            self._next_note, self._pause = now + self._pause, 2 * self._pause
            self._failures, self._is_noted = 0, True
        many = f"{failures} reads" if failures > 1 else "a read"
        patience = f", for {outage_s / 60:.0f} min at most" if self._has_answered else ""
        since = f"; away for {away_s / 60:.0f} min" if away_s >= NOTE_SECONDS else ""
        _note(f"{self.name}: {many} failed ({_said(error)}){since}; trying again{patience}")


_servers: WeakValueDictionary[tuple[int, str], Server] = WeakValueDictionary()
_servers_lock = threading.Lock()


def server_of(fs: fsspec.AbstractFileSystem, path: str) -> Server:
    """The server of a path, the same for all sets on it."""
    parts = urlsplit(str(fs.unstrip_protocol(path)))
    name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    with _servers_lock:
        return _servers.setdefault((hash(fs), name), Server(name))


class Ranges:
    """Reads ranges of the files below a path. All methods may be called from many threads.

    Attributes:
        server: whom it asks.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str, reading: Reading) -> None:
        self.server = server_of(fs, root)
        self._fs = fs
        self._reading = reading

    def read(
        self, path: str, start: int, end: int, wanted: Callable[[], bool] = lambda: True
    ) -> bytes:
        """The bytes of a file from ``start`` to ``end``; what the server sends, if it is another
        length.

        Args:
            path: in the file system.
            start, end: first byte, and the one after the last.
            wanted: whether anybody waits for it still; it is given up if not.

        Raises:
            OSError: the file is missing or may not be read, or the last attempt failed.
        """
        begun, server, outage_s = time.monotonic(), self.server, self._reading.outage_s
        for attempt in range(1, 1 << 30):
            try:
                return self._attempt(path, start, end, wanted)
            except (*_FINAL, NotWanted):
                raise
            except Exception as error:
                waited_s = time.monotonic() - begun
                patient = server.has_answered and not _is_refusal(error) and waited_s < outage_s
                if attempt >= ATTEMPTS and not patient:
                    raise OSError(f"{_said(error)} ({attempt} attempts)") from error
                server.failed(error, outage_s)
                _sleep(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)), wanted)
        raise AssertionError("unreachable")

    def _attempt(self, path: str, start: int, end: int, wanted: Callable[[], bool]) -> bytes:
        length, server = end - start, self.server
        begun = time.monotonic()
        limit_s = self._reading.timeout_s + length / SLOWEST_BYTES_PER_S
        hedge_s = server.hedge_after_s(length)
        server.asked(self._reading.hedged)
        requests = [self._request(path, start, end)]
        try:
            while True:
                passed_s = time.monotonic() - begun
                if passed_s >= limit_s:
                    raise TimeoutError(f"no answer in {limit_s:.0f} s")
                if passed_s >= hedge_s and len(requests) == 1:
                    if server.may_hedge(self._reading.hedged):
                        requests.append(self._request(path, start, end))
                        hedge_s = limit_s
                    else:
                        hedge_s = passed_s + _SLICE_SECONDS
                until_s = min(limit_s, hedge_s) - passed_s
                done, _ = wait(requests, min(until_s, _SLICE_SECONDS), FIRST_COMPLETED)
                for request in done:
                    requests.remove(request)
                    error = _error(request)
                    if error is None:
                        server.answered(time.monotonic() - begun, length)
                        return request.result()
                    if not requests:
                        raise error
                _expect_wanted(wanted)
        finally:
            for request in requests:
                request.cancel()

    def _request(self, path: str, start: int, end: int) -> "Future[bytes]":
        """Ask for a range. What is not waited for any more can be cancelled, its line is closed;
        only file systems that know no other way than to block leave a thread behind, of which there
        are so many at most.
        """
        fs, inner = self._fs, self._fs
        while isinstance(inner, DirFileSystem):  # asynchronous by its class, whatever it is of
            inner = inner.fs
        if isinstance(inner, AsyncFileSystem):
            asked = fs._cat_file(path, start=start, end=end)
            return asyncio.run_coroutine_threadsafe(asked, fs.loop)
        answer: Future[bytes] = Future()
        if not self.server.slots.acquire(timeout=self._reading.timeout_s):
            answer.set_exception(TimeoutError(f"{_MOST_THREADS} reads hang"))
            return answer

        def call() -> None:
            try:
                answer.set_result(fs.cat_file(path, start=start, end=end))
            except Exception as error:
                answer.set_exception(error)
            finally:
                self.server.slots.release()

        answer.set_running_or_notify_cancel()
        threading.Thread(target=call, name="range", daemon=True).start()
        return answer


def retried(name: str, call: Callable[[], Value], attempts: int) -> Value:
    """What a call returns that reads a file; one that fails is tried again, more slowly.

    Raises:
        OSError: the file is missing or may not be read, or the last attempt failed.
    """
    for attempt in range(attempts):
        try:
            return call()
        except _FINAL:
            raise
        except Exception as error:  # every kind of file system has its own errors for a lost line
            if attempt + 1 == attempts:
                raise OSError(f"{_said(error)} ({attempts} attempts)") from error
            pause = FIRST_PAUSE_SECONDS * 2**attempt
            _note(f"{name}: {_said(error)}; trying again in {pause:g} s")
            _sleep(pause, lambda: True)
    raise AssertionError("unreachable")


class NotWanted(OSError):
    """Nobody waits for the answer any more."""


def _expect_wanted(wanted: Callable[[], bool]) -> None:
    if _ending.is_set() or not wanted():
        raise NotWanted("not waited for any more")


def _sleep(seconds: float, wanted: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        _ending.wait(min(left, _SLICE_SECONDS))
        _expect_wanted(wanted)


def _error(request: "Future[bytes]") -> BaseException | None:
    return OSError("the request was cancelled") if request.cancelled() else request.exception()


def _is_refusal(error: Exception) -> bool:
    """Whether a server says that the request is wrong, which no waiting cures."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _CURABLE


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _note(text: str) -> None:
    print(f"note: {without_secrets(text)}", file=sys.stderr, flush=True)
