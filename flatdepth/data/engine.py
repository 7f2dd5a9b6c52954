"""Parts of a listing as tasks of Ray, on this machine or on a cluster.

A part is packed by one process of one CPU; a lost process costs its part what it had done since
its last finished shard. An actor gathers what the tasks tell.
"""

import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from flatdepth.data.pack import Part, Things, cpus, pack_part
from flatdepth.data.progress import Progress
from flatdepth.data.shards.read import resolve
from flatdepth.errors import UserError, import_extra

RETRIES = 3
"""How often a part is tried again whose process was lost, or whose storage failed."""

PATIENCE_S = 300.0
"""How long such a try waits for the one before, which may live on a machine out of reach."""

_STORE_BYTES = 100 * 2**20  # only lists of files lie in it
_SECONDS_BETWEEN_REPORTS = 0.5

Counts = tuple[int, int, int]
"""Frames done, done earlier, left out."""


def import_ray() -> Any:
    """The package, with a sentence where there is none."""
    return import_extra("ray", "--engine ray", "ray")


def run_on_ray(
    parts: Sequence[Part], *, address: str | None, workers: int | None, progress: Progress
) -> Iterator[tuple[int, Things]]:
    """Pack parts as tasks; what ``pack_part`` gave, in the order in which they end.

    Args:
        parts: unfinished ones, whose directories exist.
        address: of a cluster; None: Ray is started on this machine, unless this process has it.
        workers: tasks at the same time; None: as many as there are CPUs, and as many in waiting.
        progress: is moved, and says what the tasks say.

    Raises:
        UserError: of a part; nothing answers at ``address``; or processes were lost again and
            again.
    """
    with _ray(address, workers) as ray:
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()
        task = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=[OSError])(_pack_there)
        waiting, running = deque(enumerate(parts)), dict[Any, Part]()
        shown: dict[int, Counts] = {}
        try:
            while waiting or running:
                room = workers or 2 * int(ray.cluster_resources().get("CPU", 1))
                while waiting and len(running) < room:
                    number, part = waiting.popleft()
                    ref = task.remote(part, number, board, str(Path.cwd()), _visible(part))
                    running[ref] = part
                done, _ = ray.wait(list(running), timeout=1)
                counts, lines = ray.get(board.take.remote())
                for line in lines:
                    progress.say(line)
                for number, new in counts.items():
                    old = shown.get(number, (0, 0, 0))
                    progress.move(new[0] - old[0], new[1] - old[1], new[2] - old[2])
                shown |= counts
                for ref in done:
                    yield _result(ray, ref, running.pop(ref))
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
            ray.kill(board)


@contextmanager
def _ray(address: str | None, workers: int | None) -> Iterator[Any]:
    """Within, Ray. It is stopped, or left, only if it was not there before."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own: dict[str, object] = {
        "num_cpus": workers or cpus(),
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
    }
    try:
        try:
            ray.init(address or "local", logging_level="WARNING", **({} if address else own))
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"--address {address}" if address else "--engine ray"
            raise UserError(
                f"{where}: Ray does not answer ({str(error).splitlines()[0]}); give HOST:PORT of "
                "'ray start --head', or leave --address out to use this machine alone"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray's own would leave with another exit code
        yield ray
    finally:
        ray.shutdown()


def _result(ray: Any, ref: Any, part: Part) -> tuple[int, Things]:
    try:
        result: tuple[int, Things] = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"{part.url} lost its process {RETRIES + 1} times, most likely for lack of memory "
            f"({type(error).__name__}); run the same command again with fewer --workers to resume"
        ) from error
    return result


class Board:
    """Gathers what tasks tell until it is taken."""

    def __init__(self) -> None:
        self._counts: dict[int, Counts] = {}
        self._lines: list[str] = []

    def post(self, number: int, counts: Counts, lines: Sequence[str]) -> None:
        """The counts of a part since its present try began, and new lines."""
        self._counts[number] = counts
        self._lines += lines

    def take(self) -> tuple[dict[int, Counts], list[str]]:
        """What is new."""
        taken = self._counts, self._lines
        self._counts, self._lines = {}, []
        return taken


class Reporter:
    """A ``Report`` of one part that goes to a board twice a second."""

    def __init__(self, board: Any, number: int) -> None:
        self._board, self._number = board, number
        self._counts: Counter[str] = Counter()
        self._lines: list[str] = []
        self._sent = time.monotonic()

    def say(self, message: str) -> None:
        self._lines.append(message)

    def earlier(self, frames: int, left_out: int = 0) -> None:
        self._counts.update(done=frames, earlier=frames, left_out=left_out)

    def step(self, *, left_out: bool = False) -> None:
        self._counts.update(done=1, left_out=left_out)
        if time.monotonic() - self._sent > _SECONDS_BETWEEN_REPORTS:
            self.send()

    def send(self) -> Any:
        """Post what is known; a reference to wait for."""
        counts, lines = self._counts, self._lines
        self._sent, self._lines = time.monotonic(), []
        return self._board.post.remote(
            self._number, (counts["done"], counts["earlier"], counts["left_out"]), lines
        )


def _pack_there(
    part: Part, number: int, board: Any, directory: str, visible: Sequence[str]
) -> tuple[int, Things]:
    """The task: pack a part in this process.

    Args:
        part: what to pack.
        number: of the part, for the board.
        board: is told of every frame.
        directory: of the command, for relative paths.
        visible: what must be seen here, for the command saw it.
    """
    with suppress(OSError):
        os.chdir(directory)
    if missing := [path for path in visible if not Path(path).exists()]:
        raise UserError(
            f"the machine {socket.gethostname()} does not see {missing[0]}; all that pack need "
            "--raw and --out on a shared file system, or at URLs"
        )
    report = Reporter(board, number)
    try:
        return pack_part(
            part,
            lambda items: map(part.job, items),
            report,
            may_be_empty=True,
            patience_s=PATIENCE_S,
        )
    finally:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.get(report.send())


def _visible(part: Part) -> list[str]:
    """The raw data and the directory of a part, as far as they are on a file system here."""
    fs, root = resolve(part.url)
    paths = [getattr(part.job.reader, "raw", ""), root if isinstance(fs, LocalFileSystem) else ""]
    return [str(Path(path).absolute()) for path in paths if path and Path(path).exists()]
