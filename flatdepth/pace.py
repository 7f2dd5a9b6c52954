"""Where the time of a training goes, and what sets its pace.

Two kinds of seconds: those of an optimiser step by stage (``StageClock``), which add up to the
step, and those of preparing its samples by stage (``stage``), which pass in other threads at the
same time. The step waits when the second kind does not keep up.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

STEP_STAGES: Mapping[str, str] = {
    "wait": "until the loader has the samples",
    "copy": "samples to the device, their views cut there",
    "paste": "pastes drawn",
    "photometric": "light, lens and noise",
    "teacher": "a frozen teacher's forward pass",
    "forward": "the network",
    "loss": "weights of the pixels and the loss",
    "backward": "gradients, their exchange between devices included",
    "agree": "loss read from the device and over all ranks",
    "optimiser": "clipping, step and average of the weights",
}
"""Stages of an optimiser step; what is done in each."""

LOADER_STAGES: Mapping[str, str] = {
    "read": "bytes from disk or net",
    "decode": "JPEG, PNG and depth codes",
    "plan": "where pastes hang",
    "content": "what they show, after reading and decoding it",
}
"""Stages of preparing a sample; what is done in each."""

WARM_UP = 10
"""Steps that say nothing about the pace: threads start, caches fill, kernels are chosen."""

WINDOW = 50
"""Steps over which the pace is judged."""

WAITING = 0.1
"""Share of the time from which on waiting for samples counts."""

BUSY = 0.75
"""Share of the time from which on a lane that works is the one that limits."""

CROWDED = 0.85
"""The same of the processor's cores."""

_NAMES = {
    "read": "reading",
    "decode": "decoding",
    "plan": "the planner",
    "content": "making what pastes show",
}
_FEWER = "lower paste.share or paste.max_pastes"
_RELIEF = {"read": "copy the shards to a faster disk", "plan": _FEWER, "content": _FEWER}


class StageClock:
    """Splits time into named stages.

    On CUDA events are recorded in the stream and read when it has reached them, so nothing is
    waited for: waiting for data counts only as far as the GPU ran out of work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def enter(self, stage: str) -> None:
        """End the current stage and begin another, "" for time that does not count.

        A stage may be entered many times.
        """
        mark: Any = time.perf_counter()
        if self._on_cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((stage, mark))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage since the last call; what CUDA has not reached yet is in the next."""
        seconds: dict[str, float] = defaultdict(float)
        done = 0
        for (stage, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if self._on_cuda and not end.query():
                break
            if stage:
                seconds[stage] += begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
            done += 1
        del self._marks[:done]
        return dict(seconds)


class _Thread(threading.local):
    spent: "dict[str, float] | None" = None
    inner = 0.0


_thread = _Thread()


@contextmanager
def preparing() -> Iterator[dict[str, float]]:
    """Within, the seconds of this thread's stages are added up, by name."""
    _thread.spent = defaultdict(float)
    try:
        yield _thread.spent
    finally:
        _thread.spent = None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Within, this thread's time is that stage's, but for that of stages inside.

    Nobody counts it outside of ``preparing``.
    """
    if _thread.spent is None:
        yield
        return
    outer, _thread.inner = _thread.inner, 0.0
    begin = time.perf_counter()
    try:
        yield
    finally:
        whole = time.perf_counter() - begin
        add(name, whole - _thread.inner)
        _thread.inner = outer + whole


def add(name: str, seconds: float) -> None:
    """Count work that another thread or process did for the sample of this thread."""
    if _thread.spent is not None:
        _thread.spent[name] += seconds


def mean(spent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds of each stage over samples; those without it count as 0."""
    return {name: sum(one.get(name, 0.0) for one in spent) / len(spent) for name in LOADER_STAGES}


def _means(sums: Mapping[str, float], count: int) -> dict[str, float]:
    return {name: round(value / count, 6) for name, value in sums.items()}


class Lane(NamedTuple):
    """What works on samples beside others of its kind.

    Attributes:
        name: of one of them.
        width: how many there are.
        stages: what each does, one thing at a time.
        wider: what a user can do to have more of them; "" if nothing.
    """

    name: str
    width: int
    stages: Sequence[str]
    wider: str


class Limit(NamedTuple):
    """What limits a run: its name, and a sentence that says why and what to do."""

    what: str
    sentence: str


def limit(
    step: Mapping[str, float], work: Mapping[str, float], lanes: Iterable[Lane], busy: float
) -> Limit | None:
    """What else than the network sets the pace; None where it does.

    A lane that is busy all the time can do no more; of several the busiest is the one, or one
    before it that is nearly as busy. If none is, too little is begun ahead.

    Args:
        step: seconds by stage of some steps.
        work: seconds by stage spent on as many steps' samples.
        lanes: who does that, those of a single stage first.
        busy: share of the cores' time that this process used.
    """
    seconds = sum(step.values())
    if not step.get("wait", 0.0) > WAITING * seconds:
        return None
    spent = {lane: sum(work.get(name, 0.0) for name in lane.stages) for lane in lanes}
    uses = {lane: spent[lane] / lane.width / seconds for lane in spent}
    lane = next(one for one in uses if uses[one] >= 0.9 * max(uses.values()))
    use = uses[lane]
    slowest = max(lane.stages, key=lambda name: work.get(name, 0.0))
    share = work.get(slowest, 0.0) / spent[lane] if spent[lane] else 0.0
    waits = f"its steps wait {step['wait'] / seconds:.0%} of the time for samples"
    most = f", {share:.0%} of that {_NAMES[slowest]}" if len(lane.stages) > 1 else ""
    relief = _RELIEF.get(slowest, "")
    if busy > CROWDED:
        remedy = " or ".join(filter(None, ("give it more cores", relief)))
        return Limit(
            "cores",
            f"the processor limits this run: {waits} while network and loader keep its cores "
            f"{busy:.0%} busy, so more threads would not help; {remedy}",
        )
    if use < BUSY:
        return Limit(
            "ahead",
            f"too few samples are prepared ahead in this run: {waits} though {lane.name} has "
            f"nothing to do {1 - use:.0%} of it; raise data.prefetch",
        )
    remedy = " or ".join(filter(None, (lane.wider, relief)))
    return Limit(
        slowest,
        f"{_NAMES[slowest]} limits this run: {waits}, and {lane.name} is at work "
        f"{min(use, 1.0):.0%} of it{most}; {remedy}",
    )


class Pace:
    """Judges a run window by window of its steps, and tells of a change once.

    Args:
        lanes: who prepares samples.
        cores: that this process has.
        latest: what ``latest`` is until a window is whole.
    """

    def __init__(
        self, lanes: Sequence[Lane], cores: float, latest: dict[str, Any] | None = None
    ) -> None:
        self._lanes = lanes
        self._cores = cores
        self._steps = -WARM_UP
        self._step: Counter[str] = Counter()
        self._work: Counter[str] = Counter()
        self._cpu_seconds = 0.0
        self._told = ""
        self.latest = latest
        """Of the last whole window: ``time`` and ``loader``, mean seconds by stage per step and
        per sample, and ``limit``, a sentence or ""."""

    def add(
        self,
        step: Mapping[str, float],
        loader: Mapping[str, float],
        *,
        samples: int,
        cpu_seconds: float,
    ) -> str:
        """A step more; the sentence if something new limits the run, else "".

        Args:
            step: seconds by stage.
            loader: mean seconds by stage of each of its samples.
            samples: how many these are.
            cpu_seconds: of the whole process during the step.
        """
        self._steps += 1
        if self._steps <= 0:
            return ""
        self._step.update(step)
        self._work.update({name: samples * value for name, value in loader.items()})
        self._cpu_seconds += cpu_seconds
        if self._steps < WINDOW:
            return ""
        busy = self._cpu_seconds / (self._cores * self._step.total())
        found = limit(self._step, self._work, self._lanes, busy)
        self.latest = {
            "time": _means(self._step, WINDOW),
            "loader": _means(self._work, WINDOW * samples),
            "limit": found.sentence if found else "",
        }
        self._steps, self._cpu_seconds = 0, 0.0
        self._step.clear()
        self._work.clear()
        if found is None or found.what == self._told:
            return ""
        self._told = found.what
        return found.sentence
