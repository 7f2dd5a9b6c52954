"""Where time goes: stages add up to the whole on a clock of ours, and what limits is named."""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatdepth import pace
from flatdepth.cli import parse_config
from flatdepth.config import SetConfig, TrainConfig
from flatdepth.data import loader
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import lanes, training_samples
from flatdepth.data.shards import codec
from flatdepth.data.shards.read import ShardSet
from flatdepth.pace import (
    LOADER_STAGES,
    WARM_UP,
    WINDOW,
    Lane,
    Pace,
    StageClock,
    add,
    limit,
    mean,
    preparing,
    stage,
)
from tests.conftest import TinySets

CPU = torch.device("cpu")
PLANNER = Lane("the planner", 1, ("plan",), "")
THREADS = Lane("a loader thread", 4, ("read", "decode", "plan", "content"), "raise data.threads")


class Clock:
    """A time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that the stages are measured with."""
    ours = Clock()
    for module in (pace, loader):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: ours.now))
    return ours


@pytest.fixture
def config(tiny_sets: TinySets, tmp_path: Path) -> TrainConfig:
    path = tiny_sets.config(tmp_path, paste={"share": 1.0})
    return parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)


def first_seconds(config: TrainConfig, count: int) -> list[Mapping[str, float]]:
    """Seconds of a training's first samples, prepared by a single thread."""
    alone = replace(config, data=replace(config.data, threads=1))
    stream = training_samples(
        open_corpus(alone.data), alone, first_step=0, rank=0, ranks=1, accumulation=2
    )
    samples = list(itertools.islice(itertools.chain.from_iterable(stream), count))
    stream.close()
    return [sample.seconds for sample in samples]


def judged(
    pace: Pace, step: Mapping[str, float], loader: Mapping[str, float], steps: int
) -> list[str]:
    """What is said over so many equal steps of 4 samples, on one core."""
    return [
        said for _ in range(steps) if (said := pace.add(step, loader, samples=4, cpu_seconds=0.0))
    ]


def test_stages_add_up_to_the_step(clock: Clock) -> None:
    stages = StageClock(CPU)
    clock.spend(1)
    for name, seconds in (("wait", 2), ("work", 4), ("wait", 8), ("", 16), ("work", 32)):
        stages.enter(name)
        clock.spend(seconds)
    stages.enter("")
    assert stages.seconds() == {"wait": 2 + 8, "work": 4 + 32}
    clock.spend(64)
    stages.enter("work")
    clock.spend(128)
    stages.enter("")
    assert stages.seconds() == {"work": 128}
    assert stages.seconds() == {}


def test_cuda_is_asked_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that the stream has not finished counts in the next step, and none is lost."""
    marks: list["Event"] = []
    reached = 0

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            marks.append(self)

        def query(self) -> bool:
            return marks.index(self) < reached

        def elapsed_time(self, end: "Event") -> float:
            assert self.query()
            assert end.query()
            return 1000.0 * sum(range(marks.index(self), marks.index(end)))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stages = StageClock(torch.device("cuda"))
    for name in ("wait", "forward", "optimiser", ""):  # seconds: 0, 1, 2
        stages.enter(name)
    assert stages.seconds() == {}
    reached = 3
    assert stages.seconds() == {"wait": 0.0, "forward": 1.0}
    for name in ("wait", "forward", "optimiser", ""):  # 3 do not count, then 4, 5, 6
        stages.enter(name)
    reached = 7
    assert stages.seconds() == {"optimiser": 2.0, "wait": 4.0, "forward": 5.0}
    reached = 8
    assert stages.seconds() == {"optimiser": 6.0}


def test_a_stage_inside_another_is_not_counted_twice(clock: Clock) -> None:
    with stage("decode"):
        clock.spend(1)  # nobody counts
    with preparing() as seconds:
        with stage("content"):
            clock.spend(2)
            with pytest.raises(ValueError, match="damaged"), stage("read"):
                clock.spend(4)
                raise ValueError("damaged")
            with stage("decode"):
                clock.spend(8)
                with stage("decode"):
                    clock.spend(16)
            clock.spend(32)
        clock.spend(64)
        with stage("read"):
            clock.spend(128)
        add("plan", 256.0)
    assert seconds == {"content": 2 + 32, "read": 4 + 128, "decode": 8 + 16, "plan": 256}
    assert mean([seconds, {"read": 4.0}]) == {"read": 68, "decode": 12, "plan": 128, "content": 17}


def test_threads_are_counted_apart() -> None:
    found: dict[str, Mapping[str, float]] = {}
    both = threading.Barrier(2)

    def work(name: str) -> None:
        with preparing() as seconds:
            both.wait()
            with stage(name):
                both.wait()
        found[name] = seconds

    threads = [threading.Thread(target=work, args=(name,)) for name in ("read", "plan")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: list(seconds) for name, seconds in found.items()} == {
        "read": ["read"],
        "plan": ["plan"],
    }


SLOW: dict[str, tuple[object, str]] = {
    "read": (ShardSet, "_read_local"),
    "decode": (codec, "depth_metres"),
    "plan": (loader, "plan_pastes"),
    "content": (loader, "make_content"),
}


@pytest.mark.parametrize("slow", [*SLOW, "network"])
def test_what_is_slow_is_named(
    slow: str, clock: Clock, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real samples, of which one stage takes a second each time, and nothing else any time."""
    if slow != "network":
        owner, name = SLOW[slow]
        true: Callable[..., Any] = getattr(owner, name)

        def slowly(*arguments: Any, **options: Any) -> Any:
            clock.spend(1.0)
            return true(*arguments, **options)

        monkeypatch.setattr(owner, name, slowly)
    spent = first_seconds(config, 8)
    loader_s = mean(spent)
    assert {name for name in LOADER_STAGES if loader_s[name] > 0} == {slow} - {"network"}
    assert all(sum(one.values()) in range(16) for one in spent)

    # the step of 4 samples that their threads allow, beside a network of a second
    stages, ours = StageClock(CPU), lanes(config)
    ready = max(sum(4 * loader_s[name] for name in one.stages) / one.width for one in ours)
    stages.enter("wait")
    clock.spend(max(0.0, ready - 1.0))
    stages.enter("forward")
    clock.spend(1.0)
    stages.enter("")
    step = stages.seconds()
    assert sum(step.values()) == pytest.approx(max(ready, 1.0))

    told = judged(Pace(ours, cores=1), step, loader_s, WARM_UP + 3 * WINDOW)
    if slow == "network":
        assert told == []
    else:
        (sentence,) = told
        assert sentence.startswith(f"{pace._NAMES[slow]} limits this run: its steps wait ")
        fix = "lower paste.share" if slow == "plan" else "raise data.threads"
        assert fix in sentence


def test_a_change_is_told_once_after_the_warm_up() -> None:
    ours = Pace((PLANNER, THREADS), cores=1)
    network, waits = {"forward": 1.0}, {"wait": 0.5, "forward": 0.5}
    planning, decoding = {"plan": 0.25}, {"decode": 1.0}
    assert judged(ours, waits, planning, WARM_UP + WINDOW - 1) == []
    assert ours.latest is None
    (first,) = judged(ours, waits, planning, 1)
    assert first.startswith("the planner limits this run")
    assert ours.latest == {"time": waits, "loader": planning, "limit": first}
    assert judged(ours, waits, planning, 2 * WINDOW) == []
    assert judged(ours, network, decoding, WINDOW) == []
    assert ours.latest == {"time": network, "loader": decoding, "limit": ""}
    assert judged(ours, waits, planning, WINDOW) == []
    (second,) = judged(ours, waits, decoding, WINDOW)
    assert second.startswith("decoding limits this run")
    kept = Pace((), 1, latest={"limit": "as before"})
    assert judged(kept, waits, decoding, WINDOW) == []
    assert kept.latest == {"limit": "as before"}


@pytest.mark.parametrize(
    ("wait", "work", "busy", "what", "words"),
    [
        (0.05, {"plan": 1.0}, 0.5, None, ()),
        (0.4, {"plan": 0.95, "decode": 0.1}, 0.5, "plan", ("wait 40% of", "at work 95%")),
        (0.4, {"plan": 0.5, "read": 3.0, "decode": 0.4}, 0.5, "read", ("faster disk", "77% of")),
        (0.4, {"plan": 0.5, "content": 3.4}, 0.5, "content", ("raise data.threads or lower",)),
        # the cores are shared with a network on the CPU: then more threads are no way out
        (0.4, {"plan": 0.5, "decode": 3.4}, 0.97, "cores", ("97% busy", "give it more cores")),
        (0.05, {"plan": 0.5, "decode": 3.4}, 0.97, None, ()),
        (0.4, {"decode": 1.0}, 0.3, "ahead", ("nothing to do 75% of it; raise data.prefetch",)),
        (0.4, {}, 0.3, "ahead", ("nothing to do 100% of it",)),
    ],
)
def test_whatever_limits_is_told_with_a_way_out(
    wait: float, work: dict[str, float], busy: float, what: str | None, words: Sequence[str]
) -> None:
    found = limit({"wait": wait, "forward": 1 - wait}, work, (PLANNER, THREADS), busy)
    assert (found and found.what) == what
    assert all(word in found.sentence for word in words) if found else not words


def test_a_stream_is_read_by_one_thread(config: TrainConfig, tiny_sets: TinySets) -> None:
    rooms = str(tiny_sets.rooms)
    data = replace(
        config.data, loader="webdataset", train=[SetConfig(path=rooms)], val=[rooms], threads=4
    )
    streamed = replace(config, data=data)
    assert {one.width for one in lanes(streamed) if "read" in one.stages} == {1}
    assert [sorted(one.stages) for one in lanes(config)] == [["plan"], sorted(LOADER_STAGES)]
    few = replace(config, data=replace(config.data, threads=64, prefetch=2), micro_batch=4)
    assert lanes(few)[-1][1:] == (8, tuple(LOADER_STAGES), "raise data.prefetch")
    apart = replace(config, data=replace(config.data, processes=2, prefetch=4))
    (processes,) = lanes(apart)
    assert processes.name == "a loader process" and processes.width == 2
    assert processes.wider == "raise data.processes"


def test_the_time_of_the_reader_counts_as_reading(config: TrainConfig, tiny_sets: TinySets) -> None:
    rooms = str(tiny_sets.rooms)
    shard = next(tiny_sets.rooms.glob("*.tar"))
    data = replace(
        config.data, loader="webdataset", train=[SetConfig(path=str(shard))], val=[rooms]
    )
    before = time.perf_counter()
    spent = first_seconds(replace(config, data=data), 4)
    passed = time.perf_counter() - before
    assert all(one["read"] > 0 for one in spent)
    assert sum(sum(one.values()) for one in spent) < 2 * passed  # the reader and one thread
