"""Timings that can be compared: interleaved rounds in one process, reported as ratios.

Every contender runs once per round, in an order that is turned from round to round, so drifts of
the clock and of other load hit all alike. Reported are the median and the quartiles of each one's
time and of its ratio to the baseline of the same round.
"""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from flatdepth.cli import versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One contender: milliseconds and ratio to the baseline, as (25 %, median, 75 %)."""

    name: str
    ms: tuple[float, float, float]
    ratio: tuple[float, float, float]


def compare(
    contenders: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int,
    device: torch.device,
) -> list[Timing]:
    """Time all contenders over ``rounds`` interleaved rounds, after two rounds of warm-up."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wait(device)
            begin = time.perf_counter()
            contenders[name]()
            wait(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - begin)
    base = np.array(seconds[baseline])
    return [
        Timing(
            name=name,
            ms=_quartiles(1e3 * np.array(seconds[name])),
            ratio=_quartiles(np.array(seconds[name]) / base),
        )
        for name in names
    ]


def environment(device: torch.device) -> dict[str, object]:
    """What the figures depend on."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def table(timings: list[Timing]) -> str:
    """A plain text table: name, median ms with quartiles, ratio with quartiles."""
    width = max(len(timing.name) for timing in timings)
    lines = [f"{'':{width}}  {'ms':>8}  {'quartiles':>17}  {'ratio':>7}  {'quartiles':>13}"]
    for timing in timings:
        low, middle, high = timing.ms
        low_ratio, ratio, high_ratio = timing.ratio
        lines.append(
            f"{timing.name:{width}}  {middle:8.2f}  {low:8.2f}-{high:8.2f}  {ratio:7.2f}  "
            f"{low_ratio:6.2f}-{high_ratio:6.2f}"
        )
    return "\n".join(lines)


def as_json(timings: list[Timing]) -> list[dict[str, object]]:
    """The timings as JSON values."""
    return [asdict(timing) for timing in timings]


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return low, middle, high


def wait(device: torch.device) -> None:
    """Until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a device ran under one name, or a CPU as one operator: calls and their milliseconds."""

    name: str
    calls: int
    ms: float


def profiled(call: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of a call, or its operators on a CPU; those that took longest first."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        call()
        wait(device)
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    found = [Kernel(e.key, e.count, getattr(e, own) / 1e3) for e in seen.key_averages()]
    return sorted(found, key=lambda kernel: -kernel.ms)
