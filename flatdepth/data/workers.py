"""Processes that compute what threads ask for, for work that holds the interpreter's lock.

A process is a new interpreter that knows nothing of the program it belongs to: scripts need no
``if __name__ == "__main__"``, a device stays with the training. Tasks and results go through its
pipes, the bytes of arrays as they are. Whoever dies, the other notices: a process ends with its
pipe, one that was killed is replaced.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import LifoQueue, SimpleQueue
from typing import IO, Any, Generic, TypeVar

import numpy as np

from flatdepth.errors import UserError

if sys.platform == "linux":
    import fcntl

Task = TypeVar("Task")
Result = TypeVar("Result")

ATTEMPTS = 3
"""How many processes a task may bring down."""

PIPE_BYTES = 1 << 20
"""What a pipe holds; more needs a privilege (pipe(7))."""

_SERVE = "from flatdepth.data.workers import serve; serve()"
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Workers(Generic[Task, Result]):
    """A function computed in processes, one task at a time in each; call it from many threads.

    Args:
        make: makes the function in each process, where it is called once. What is pickled must be
            importable there, and tasks, results and errors must be picklable.
        count: most processes; one starts when it is first needed.
    """

    def __init__(self, make: Callable[[], Callable[[Task], Result]], count: int) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._closed = False
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def __call__(self, task: Task) -> Result:
        """The function's result; what it raises is raised here, with its traceback as a note.

        Raises:
            UserError: processes that work on this task are killed again and again.
        """
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                worker = worker or self._start()
                try:
                    succeeded, result = worker.ask(task)
                except (EOFError, OSError):
                    self._end(worker)
                    worker = None
                    if self._closed:
                        raise
                    print(
                        "note: a process that prepares samples was ended by the system; another "
                        "one goes on where it was",
                        file=sys.stderr,
                    )
                    continue
                if succeeded:
                    return result
                raise result
        finally:
            self._idle.put(worker)
        raise UserError(
            f"data.processes: {ATTEMPTS} processes that prepared the same sample were ended by the "
            "system, most likely for lack of memory; take fewer of them"
        )

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._closed = True
        for worker in list(self._running):
            self._end(worker)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise EOFError("closed")
            worker = _Worker(self._make)
            self._running.add(worker)
        return worker

    def _end(self, worker: "_Worker") -> None:
        with self._lock:
            self._running.discard(worker)
        worker.end()


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the training
            env={
                **os.environ,
                **dict.fromkeys(_ONE_THREAD, "1"),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._tasks, self._results = self._process.stdin, self._process.stdout
        _widen(self._results)
        self._make: Callable[[], Callable[[Any], Any]] | None = make

    def ask(self, task: object) -> tuple[bool, Any]:
        """Whether the function returned, and what it returned or raised.

        Raises:
            EOFError, OSError: the process is gone.
        """
        if self._make is not None:
            _send(self._tasks, _packed(self._make))
            self._make = None
        _send(self._tasks, _packed(task))
        answer: tuple[bool, Any] = _receive(self._results)
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._tasks, self._results):
            pipe.close()


def serve() -> None:
    """The life of such a process: make the function, then answer tasks until there are no more."""
    tasks = os.fdopen(os.dup(0), "rb", buffering=0)
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what is printed is no result
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a job, which ends by itself
    waiting: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(tasks, waiting), daemon=True).start()
    make, function = waiting.get(), None
    while True:
        task = waiting.get()
        try:
            function = function or make()
            answer = _packed((True, function(task)))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"in a process that prepares samples:\n{traceback.format_exc()}")
            answer = _packed((False, error))
        _send(results, answer)


def _listen(tasks: IO[bytes], waiting: "SimpleQueue[Any]") -> None:
    """Take tasks; without the program that sends them, end at once, whatever is being done."""
    try:
        while True:
            waiting.put(_receive(tasks))
    except EOFError:
        os._exit(0)
    except BaseException:  # what was sent cannot be imported here
        traceback.print_exc()
        os._exit(1)


def _packed(message: object) -> list[Any]:
    """A message as buffers: the number of their lengths, these, the pickle and its arrays."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    buffers = [head, *(array.raw() for array in arrays)]
    lengths = struct.pack(f"<{1 + len(buffers)}Q", len(buffers), *map(len, buffers))
    return [lengths, *buffers]


def _send(pipe: IO[bytes], buffers: list[Any]) -> None:
    for buffer in buffers:
        left = memoryview(buffer)
        while left:
            left = left[pipe.write(left) :]


def _receive(pipe: IO[bytes]) -> Any:
    """A message. Raises EOFError if there is none, or only a part of one."""
    (count,) = struct.unpack("<Q", _read(pipe, 8))
    head, *arrays = (_read(pipe, n) for n in struct.unpack(f"<{count}Q", _read(pipe, 8 * count)))
    return pickle.loads(head, buffers=arrays)


def _read(pipe: IO[bytes], length: int) -> memoryview:
    buffer = left = np.empty(length, np.uint8).data
    while left:
        count = pipe.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the process at the other end is gone")
        left = left[count:]
    return buffer


def _widen(pipe: IO[bytes]) -> None:
    """Let a pipe hold an image, so that its two ends wait less for each other (Linux)."""
    if sys.platform == "linux":
        with suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
