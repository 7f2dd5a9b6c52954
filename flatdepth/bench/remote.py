"""Reading a set over a line with a long tail: one range after the other, and what helps.

Contenders take turns within one run and read the same samples in the same order, blocks of
neighbours mixed with each other, on the loader's threads and in order.
"""

import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Int64

from flatdepth.bench.far import LINES, Line, register
from flatdepth.bench.index import made_up_index
from flatdepth.bench.timing import Timing, compare, environment, table
from flatdepth.data.loader import ANNOUNCED, READERS, in_order
from flatdepth.data.shards.ahead import ReadAhead
from flatdepth.data.shards.cache import CACHE_VARIABLE
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.remote import Reading
from flatdepth.data.shards.write import Output, write_index

SPREAD = 64
"""Samples of the set for each one that is read."""

WINDOW = 8
"""Blocks that are mixed with each other."""

ALONE = "one by one"
HEDGED = "hedged"
AHEAD = "hedged, read ahead"
KEPT = "kept on this machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRates:
    """What the contenders take.

    Attributes:
        timings: for ``samples`` samples.
        samples: per contender and round.
        wait_ms: (50 %, 99 %, longest) of what a thread waits for a sample, by contender.
        asked: ranges that the server was asked for per sample, by contender.
        environment: what the figures depend on.
    """

    timings: list[Timing]
    samples: int
    wait_ms: Mapping[str, tuple[float, float, float]]
    asked: Mapping[str, float]
    environment: Mapping[str, object]


def measure_remote(
    *, samples: int, rounds: int, threads: int, block: int, line: Mapping[str, Any]
) -> RemoteRates:
    """Time all contenders on a made-up set of samples of 100 KB, in shards of 200 MB.

    Args:
        samples: that every contender reads in a round, of a set of ``SPREAD`` times as many.
        rounds: of all contenders in turn, after two that do not count.
        threads: that read.
        block: neighbours in the set that come soon after each other; 1: random order.
        line: fields of ``Line``.
    """
    order = _order(samples, block)
    waits: dict[str, list[float]] = {}
    with _far_set(samples) as folder:
        contenders = {}
        for number, (name, reading) in enumerate(
            {
                ALONE: Reading(hedged=0.0),
                HEDGED: Reading(),
                AHEAD: Reading(),
                KEPT: Reading(cache_bytes=10**9),
            }.items()
        ):
            LINES[f"host{number}"] = Line(directory=folder, seed=number)
            shards = ShardSet.open(f"far://host{number}/set", reading=reading)
            if name == KEPT:
                for i in order.tolist():
                    shards.read_bytes(i)
            LINES[f"host{number}"] = Line(directory=folder, seed=number, **line)
            waits[name] = []
            contenders[name] = _Reader(shards, order, threads, name == AHEAD, waits[name])
        timings = compare(contenders, baseline=ALONE, rounds=rounds, device=torch.device("cpu"))
        asked = {
            name: len(LINES[f"host{number}"].asked) / (samples * (rounds + 2))
            for number, name in enumerate(contenders)
        }
    return RemoteRates(
        timings=timings,
        samples=samples,
        wait_ms={name: _percentiles(values) for name, values in waits.items()},
        asked=asked,
        environment={
            **environment(torch.device("cpu")),
            "threads": threads,
            "block": block,
            **line,
        },
    )


class _Reader:
    """Reads all samples in an order at each call."""

    def __init__(
        self,
        shards: ShardSet,
        order: Int64[np.ndarray, " n"],
        threads: int,
        is_ahead: bool,
        waits: list[float],
    ) -> None:
        self._shards, self._order, self._threads = shards, order, threads
        self._is_ahead, self._waits = is_ahead, waits

    def __call__(self) -> None:
        rows: Iterator[int] = iter(self._order.tolist())
        ahead = ReadAhead(READERS * self._threads)
        if self._is_ahead:
            rows = ahead.through(rows, ANNOUNCED, lambda i: (self._shards, i))
        for _ in in_order(self._read, rows, threads=self._threads, ahead=4 * self._threads):
            pass
        ahead.close()

    def _read(self, i: int) -> None:
        begun = time.perf_counter()
        self._shards.read_bytes(i)
        self._waits.append(time.perf_counter() - begun)


def _order(samples: int, block: int) -> Int64[np.ndarray, " n"]:
    """Blocks of neighbours from anywhere in the set, mixed within windows of some."""
    rng = np.random.default_rng(0)
    cut = np.arange(samples * SPREAD // block * block).reshape(-1, block)
    blocks = cut[rng.permutation(len(cut))[: -(-samples // block)]]
    windows = [blocks[i : i + WINDOW] for i in range(0, len(blocks), WINDOW)]
    return np.concatenate([rng.permutation(window.ravel()) for window in windows])[:samples]


@contextmanager
def _far_set(samples: int) -> Iterator[Path]:
    """A directory with a set whose shards are holes, and a cache of its own meanwhile."""
    register()
    index = made_up_index(samples * SPREAD)
    start, end = index.span(0)
    crc32 = np.full(len(index), zlib.crc32(bytes(end - start)), np.uint32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "set")
        folder.mkdir()
        write_index(Output(str(folder)), replace(index, crc32=crc32))
        for shard in index.shards:
            with (folder / shard.name).open("wb") as file:
                file.truncate(shard.bytes)
        with patch.dict(os.environ, {CACHE_VARIABLE: str(Path(name, "cache"))}):
            yield Path(name)


def _percentiles(seconds: list[float]) -> tuple[float, float, float]:
    middle, late, last = np.percentile(1e3 * np.array(seconds), (50, 99, 100)).tolist()
    return middle, late, last


def remote_text(found: RemoteRates) -> str:
    """The timings as a table, then what threads wait and how often the server was asked."""
    width = max(map(len, found.wait_ms))
    lines = [table(found.timings)]
    lines.append(f"{'':{width}}  samples/s  50 % ms  99 % ms  longest  requests/sample")
    for timing in found.timings:
        middle, late, last = found.wait_ms[timing.name]
        lines.append(
            f"{timing.name:{width}}  {1e3 * found.samples / timing.ms[1]:9.1f}  {middle:7.1f}  "
            f"{late:7.1f}  {last:7.0f}  {found.asked[timing.name]:15.3f}"
        )
    return "\n".join(lines)
