"""Runs a list of measurements within a time, each in a process of its own, and keeps every result.

A part that raises, runs out of memory, crashes or takes too long costs one row that says so. After
every row the JSON file is whole.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from flatdepth.bench.gpu.rows import Row, number
from flatdepth.bench.gpu.settings import Settings
from flatdepth.show.pictures import write_atomic

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flatdepth.bench.gpu.plan", "torch._dynamo"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One measurement or several that share a process.

    Attributes:
        name: its name in the table.
        run: gives its rows; importable, so that another process can call it.
        seconds: about what it takes on a large GPU; with less time left it is not begun. It is
            ended after three times as much, or when the time is over.
        on_gpu: whether its goals are for a GPU only, so that a dry run does not judge them.
    """

    name: str
    run: Callable[[Settings], Iterator[Row]]
    seconds: float
    on_gpu: bool = True


def run_parts(
    parts: Sequence[Part],
    settings: Settings,
    *,
    seconds: float,
    out: Path,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Run the parts in their order and return all rows.

    Args:
        seconds: in all. A part that needs more than is left is skipped, and a later, shorter one
            may still run.
        out: JSON file, rewritten after every row: under ``"rows"`` the rows in their order.
        say: gets a line per row as it comes.
    """
    settings.work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    rows: list[Row] = []

    def add(part: Part, row: Row) -> None:
        if settings.dry and part.on_gpu and row.status in ("met", "missed"):
            row = dataclasses.replace(row, status="not judged")
        rows.append(dataclasses.replace(row, part=part.name))
        content = {"rows": [dataclasses.asdict(row) for row in rows]}
        write_atomic(out, json.dumps(_plain(content), indent=1).encode())
        say(f"{seconds - (end - time.monotonic()):5.0f} s  {_line(rows[-1])}")

    for part in parts:
        left = end - time.monotonic()
        needed = 0.0 if settings.dry else part.seconds
        if left < needed or left <= 0:
            note = f"needs about {needed:.0f} s, {max(0.0, left):.0f} s were left"
            add(part, Row(name="skipped", status="skipped", note=note))
            continue
        limit = left if settings.dry else min(left, 3 * part.seconds)
        told = dataclasses.replace(settings, seconds=limit, done=tuple(rows))
        started = time.monotonic()
        for row in _run_alone(part, told):
            add(part, row)
        add(part, Row(name="time", measured=time.monotonic() - started, unit="s"))
    return rows


def log_of(part: Part, settings: Settings) -> Path:
    """The file that gets what a part prints."""
    return settings.work / f"{part.name.replace(' ', '_')}.log"


def _run_alone(part: Part, settings: Settings) -> Iterator[Row]:
    """The rows of a part as they come, and one more if it fails."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    log = log_of(part, settings)
    process = CONTEXT.Process(target=_serve, args=(part, settings, theirs, log))
    process.start()
    theirs.close()
    end = time.monotonic() + settings.seconds
    try:
        while ready := wait([ours, process.sentinel], timeout=max(0.0, end - time.monotonic())):
            # a process that the part started may hold the pipe open, so its end is not waited for
            if ours not in ready:
                break
            try:
                row = ours.recv()
            except EOFError:
                break
            yield row
        else:
            note = f"took longer than {settings.seconds:.0f} s; see {log}"
            yield Row(name="ended", status="failed", note=note)
            return
        process.join()
        code = process.exitcode or 0
        if code:
            died = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            yield Row(name="died", status="failed", note=f"{died}; see {log}")
    finally:
        ours.close()
        _kill(process)


def _kill(process: BaseProcess) -> None:
    """End a part and the processes that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()


def _serve(part: Part, settings: Settings, results: Connection, log: Path) -> None:
    """In the part's process: send its rows, print into its log."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        for row in part.run(settings):
            results.send(row)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        results.send(
            Row(name="raised", status="failed", note=f"{type(error).__name__}: {text[:300]}")
        )


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _line(row: Row) -> str:
    goal = f" (goal {row.goal}: {row.status})" if row.goal else ""
    note = f"  {row.note}" if row.note else ""
    status = f" {row.status.upper()}" if row.status in ("failed", "skipped") else ""
    return f"{row.part}: {row.name} {number(row.measured)} {row.unit}{goal}{status}{note}".rstrip()
