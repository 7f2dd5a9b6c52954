"""Parts of a listing as tasks of Ray, on this machine or on a cluster.

A part is packed by one process of one CPU; a lost process costs its part what it had done since
its last finished shard. An actor gathers what the tasks tell.
"""

import os
import re
import secrets
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from flatdepth.cli import INTERRUPTING, cpus
from flatdepth.data.board import Board, Counts, Reporter
from flatdepth.data.pack import Part, Things, pack_part
from flatdepth.data.progress import Progress
from flatdepth.data.shards.read import resolve
from flatdepth.errors import UserError, import_extra

RETRIES = 3
"""How often a part is tried again whose process was lost, or whose storage failed."""

PATIENCE_S = 300.0
"""How long such a try waits for the one before, which may live on a machine out of reach."""

_STORE_BYTES = 100 * 2**20  # only lists of files lie in it
_KNOCK_SECONDS = 10.0
_SECONDS_TO_END = 1.5


def find_ray(address: str | None) -> Any:
    """The package, once something listens at the address; Ray takes many minutes to notice.

    Raises:
        UserError: it is not installed, or nothing does.
    """
    ray = import_extra("ray", "--engine ray", "ray")
    if match := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d{1,5})", address or ""):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=_KNOCK_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _silence(address, error) from error
    return ray


def _silence(address: str | None, error: Exception) -> UserError:
    where = f"--address {address}" if address else "--engine ray"
    return UserError(
        f"{where}: Ray does not answer ({str(error).splitlines()[0]}); give HOST:PORT of 'ray "
        "start --head', or leave --address out to use this machine alone"
    )


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
    with running_ray(address, workers) as ray:
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
            _cancel(ray, list(running))
            ray.kill(board)


@contextmanager
def running_ray(address: str | None, workers: int | None) -> Iterator[Any]:
    """Within, Ray. It is stopped, or left, only if it was not there before."""
    ray = find_ray(address)
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Ray's are 15, and a token in the user's home.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    own: dict[str, object] = {
        "num_cpus": workers or cpus(),
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
    }
    try:
        with _kept_signals() as keep:
            try:
                ray.init(address or "local", logging_level="ERROR", **({} if address else own))
            except (OSError, RuntimeError, ValueError) as error:
                raise _silence(address, error) from error
            keep()
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _kept_signals() -> Iterator[Callable[[], None]]:
    """Within, an interrupt knows its signal, which Ray forgets; ``keep`` undoes Ray's handlers."""
    caught: list[int] = []
    handlers = {number: signal.getsignal(number) for number in INTERRUPTING}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        handler = handlers[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    def keep() -> None:
        if current_thread() is main_thread():
            for number, handler in handlers.items():
                signal.signal(number, note if callable(handler) else handler)

    try:
        yield keep
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or caught[:1])) from None
    finally:
        if current_thread() is main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _cancel(ray: Any, refs: list[Any]) -> None:
    """End tasks: at first so that they drop what is half-written."""
    if not refs:
        return
    for ref in refs:
        ray.cancel(ref)
    _, deaf = ray.wait(refs, num_returns=len(refs), timeout=_SECONDS_TO_END)
    for ref in deaf:
        ray.cancel(ref, force=True)


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
