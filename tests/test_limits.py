"""Numbers have ceilings, and a command can be stopped in every phase."""

import argparse
import dataclasses
import math
import multiprocessing
import os
import pydoc
import resource
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from unittest.mock import patch

import psutil
import pytest
from PIL import Image

from flatdepth import __main__ as command
from flatdepth.bench.crash import CONTEXT
from flatdepth.cli import free_memory, number, run_command
from flatdepth.commands import benchmark, checkpoint, crossval, evaluate, predict, preview, report
from flatdepth.config import PasteStage, TrainConfig
from flatdepth.data.pack import pack
from flatdepth.data.parts import pack_parts
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.errors import UserError
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import Request
from flatdepth.predict.predictor import PredictOptions
from flatdepth.training.state import newest_checkpoint
from tests.conftest import TinySets

HUGE = {int: (10**12, -1), float: (1e12, 1e300, math.inf, math.nan, -1.0)}
LEGAL = {("seed", 10**12), ("data.split_seed", 10**12), ("eval.seed", 10**12)}
"""Seeds: any 63 bits."""

Leaf = tuple[str, type, Callable[[Any], object]]


def leaves(kind: type, prefix: str, make: Callable[..., object]) -> Iterator[Leaf]:
    """(key, int or float, how to make a configuration with a value there) of all numbers."""
    for name, hint in get_type_hints(kind).items():
        yield from _numbers(prefix + name, hint, lambda value, name=name: make(**{name: value}))


def _numbers(key: str, hint: Any, make: Callable[[Any], object]) -> Iterator[Leaf]:
    parts = [part for part in get_args(hint) if part is not type(None)]
    if dataclasses.is_dataclass(hint):
        needed = {"path": "x"} if "path" in get_type_hints(hint) else {}
        needed |= {"step": 0} if hint is PasteStage else {}
        yield from leaves(
            hint,
            "paste." if hint is PasteStage and "." not in key else f"{key}.",
            lambda **values: make(hint(**{**needed, **values})),
        )
    elif hint in (int, float):
        yield key, hint, make
    elif get_origin(hint) is tuple:
        yield key, parts[0], lambda value: make((value, value))
    elif get_origin(hint) is list:
        yield from _numbers(key, parts[0], lambda value: make([value]))
    elif get_origin(hint) is dict:
        yield from _numbers(f"{key}.silog", parts[1], lambda value: make({"silog": value}))
    elif get_origin(hint) is types.UnionType and len(parts) == 1:
        yield from _numbers(key, parts[0], make)
    else:
        assert not {int, float} & {hint, *parts}, f"{key}: {hint} is not understood here"


NUMBERS = list(leaves(TrainConfig, "", TrainConfig))


def test_every_number_of_the_configuration_has_a_floor_and_a_ceiling() -> None:
    keys = {key for key, _, _ in NUMBERS}
    assert {"steps", "data.prefetch", "data.train.weight", "paste.stages.step"} <= keys
    assert {"loss.terms.silog", "paste.area", "paste.content.mirror"} <= keys and len(keys) > 90
    passed = set()
    for key, kind, make in NUMBERS:
        for value in HUGE[kind]:
            try:
                make(value)
            except UserError as error:
                # of a stage the setting that it takes over is named
                named = key.replace("paste.stages.", "paste.")
                assert str(error).startswith((f"{key}: ", f"{named}: ")), (key, value, error)
            else:
                passed.add((key, value))
    assert passed == LEGAL


@pytest.mark.parametrize("value", HUGE[int])
@pytest.mark.parametrize("name", ["size", "batch", "images", "threads", "bootstrap"])
def test_every_number_of_predict_and_evaluate_has_them_too(name: str, value: int) -> None:
    if name in ("size", "batch"):
        with pytest.raises(UserError, match=f"^--{name}: expected "):
            PredictOptions(**{name: value})
    with pytest.raises(UserError, match=f"^--{name}: expected "):
        Request(
            checkpoints=(),
            kinds=(),
            max_depths_m=(),
            trained_on=(),
            data=(),
            protocol=PROTOCOLS["none"],
            **{name: value},
        )


@pytest.mark.parametrize("value", [1e300, math.inf, math.nan, -1e300])
def test_every_number_of_a_camera_has_them(value: float) -> None:
    for place in range(4):
        numbers = [20.0, 20.0, 14.0, 10.0]
        numbers[place] = value
        with pytest.raises(UserError, match=r"^--intrinsics: .*: expected "):
            PredictOptions(intrinsics=tuple(numbers))
    for name, option in (("fov_deg", "fov"), ("prune", "prune")):
        with pytest.raises(UserError, match=f"^--{option}: expected "):
            PredictOptions(**{name: value})


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options(sub)
        else:
            yield action


CHECKED_BY_THE_DATACLASS = {
    "--size", "--batch", "--fov", "--prune", "--images", "--threads", "--bootstrap", "--range",
}  # fmt: skip


@pytest.mark.parametrize(
    "parser",
    [
        benchmark.options,
        checkpoint.command_line,
        crossval.own_options,
        evaluate.options,
        predict.parser,
        preview.own_options,
        report.options,
    ],
)
def test_every_number_of_a_command_line_has_them(parser: Callable[[], Any]) -> None:
    for action in options(parser()):
        name = next(iter(action.option_strings), "")
        if action.type in (int, float):
            assert name in CHECKED_BY_THE_DATACLASS, name
        elif getattr(action.type, "__qualname__", "").startswith(number.__qualname__):
            for text in ("nan", "inf", "1e300", "-1", "1" + 19 * "0", "x"):
                with pytest.raises(argparse.ArgumentTypeError, match=r"^expected .* to "):
                    action.type(text)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 10**6},
        {"shard_mb": 1e300},
        {"shard_mb": math.nan},
        {"min_valid": math.nan},
        {"level": 10**12},
        {"part": (1, 10**12)},
        {"parts": 0},
        {"parts": 10**12},
    ],
)
def test_every_number_of_packing_has_them(options: dict[str, Any], tmp_path: Path) -> None:
    (name,) = options
    with pytest.raises(UserError, match=rf"^--{name}: expected .* to "):
        (pack_parts if name == "parts" else pack)(RoomsReader(), str(tmp_path), **options)


def test_free_memory_minds_a_limit_of_the_process() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    free = free_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        resource.setrlimit(
            resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28), before[1])
        )
        assert free_memory() < 1.1 * (1 << 28) < free
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Stopping.

SECONDS = 20.0
"""More than stopping takes on a busy machine, and far less than what is being waited for."""


def _command(arguments: Sequence[str], folder: Path, hung: str | None, limit: int) -> None:
    """Run a command whose function ``hung`` never comes back from a read."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.argv = ["flatdepth", *arguments]

    def hang(*_: object, **__: object) -> None:
        (folder / "hung").touch()
        os.open(folder / "fifo", os.O_RDONLY)

    if hung is not None:
        owner, _, name = hung.rpartition(".")
        patch.object(pydoc.locate(owner), name, hang).start()
    run_command(lambda: command.run(list(arguments)))


def start(
    arguments: Sequence[object], folder: Path, hung: str | None = None, limit: int = 0
) -> BaseProcess:
    """Begin a command in a process of its own; it prints to ``folder``/log.txt."""
    words = [str(argument) for argument in arguments]
    process = CONTEXT.Process(target=_command, args=(words, folder, hung, limit))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process: BaseProcess, folder: Path) -> None:
    until = time.monotonic() + 6 * SECONDS
    while not condition():
        assert process.exitcode is None, (folder / "log.txt").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)


def stop(process: BaseProcess, number: int, folder: Path) -> str:
    """Send a signal, see that the process ends in time, and return what it printed."""
    os.kill(process.pid or 0, number)
    process.join(SECONDS)
    alive = process.exitcode is None
    process.kill()
    said = (folder / "log.txt").read_text()
    assert not alive, said
    assert "Traceback" not in said and "leaked" not in said, said
    assert not [path for path in folder.rglob("*.tmp") if path.is_file()]
    return said


@pytest.fixture
def runs(tiny_sets: TinySets, tmp_path: Path) -> dict[str, list[object]]:
    """Commands that take no time."""
    config = tiny_sets.config(
        tmp_path, steps=1, data__height=28, data__width=42, eval__images=2, eval__pictures=0
    )
    Image.new("RGB", (56, 42)).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    weights = ["--checkpoint", "shards/demo_vitt.safetensors"]
    os.mkfifo(tmp_path / "fifo")
    return {
        "train": ["train", "--config", config],
        "weights": ["train", "--config", config, "--model.checkpoint", weights[1]],
        "evaluate": ["evaluate", *weights, "--data", tiny_sets.rooms, "--size=28"],
        "predict": ["predict", *weights, tmp_path / "photo.png", "--out", out, "--size=28"],
        "report": ["report", tmp_path / "runs" / "tiny", "--no_judging"],
        "pack": ["pack", "rooms", "--scenes=2", "--frames_per_scene=1", "--height=16",
                 "--width=16", "--workers=1", "--out", out],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hung", "number"),
    [
        ("train", "flatdepth.data.frames.ShardSet.open", signal.SIGTERM),
        ("weights", "flatdepth.models.checkpoint.read_weights", signal.SIGINT),
        ("evaluate", "flatdepth.data.frames.Subset.frame", signal.SIGTERM),
        ("predict", "flatdepth.predict.inputs.Image.open", signal.SIGINT),
        ("report", "flatdepth.show.run_page.read_run", signal.SIGINT),
        ("pack", "flatdepth.data.readers.rooms.render_room", signal.SIGTERM),
    ],
)
def test_a_command_that_waits_for_a_read_is_interrupted(
    name: str, hung: str, number: int, runs: dict[str, list[object]], tmp_path: Path
) -> None:
    process = start(runs[name], tmp_path, hung)
    wait_for((tmp_path / "hung").exists, process, tmp_path)
    said = stop(process, number, tmp_path)
    assert process.exitcode == 128 + number
    assert said.count("interrupted by") == 1
    assert said.endswith("nothing half-written\n")
    if name in ("predict", "pack"):
        again = start(runs[name], tmp_path)
        again.join()
        assert again.exitcode == 0, (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("hung", "number"),
    [
        ("flatdepth.judge.validation.validation_sample", signal.SIGTERM),
        ("flatdepth.data.loader.training_sample", signal.SIGINT),
    ],
)
def test_a_training_that_waits_for_samples_stops_and_goes_on(
    hung: str, number: int, runs: dict[str, list[object]], tmp_path: Path
) -> None:
    process = start(runs["train"], tmp_path, hung)
    wait_for((tmp_path / "hung").exists, process, tmp_path)
    said = stop(process, number, tmp_path)
    assert process.exitcode == 0
    assert said.endswith("stopped at step 0; give the same command again to go on\n")
    again = start(runs["train"], tmp_path)
    again.join()
    assert again.exitcode == 0 and "done: " in (tmp_path / "log.txt").read_text()


def test_a_training_that_saves_saves_to_the_end(
    runs: dict[str, list[object]], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    process = start([*runs["train"], "--save_every=1", "--steps=100000"], tmp_path)
    wait_for(lambda: any((run / "checkpoints").glob(".step-*.tmp")), process, tmp_path)
    said = stop(process, signal.SIGTERM, tmp_path)
    assert process.exitcode == 0
    newest = newest_checkpoint(run)
    assert newest is not None and said.splitlines()[-1].startswith(
        f"stopped at step {int(newest.name[5:])}; give"
    )


def test_demo_sets_being_packed_leave_no_process_behind(
    runs: dict[str, list[object]], tmp_path: Path
) -> None:
    demo = tmp_path / "demo_pictures"
    process = start([*runs["train"], "--data.art", f"[{demo}]"], tmp_path)
    wait_for(lambda: any(demo.glob(".pack/pictures*.tmp")), process, tmp_path)
    group = children(process.pid or 0)
    assert len(group) > 1
    stop(process, signal.SIGTERM, tmp_path)
    assert process.exitcode == 143
    wait_for(lambda: not any(map(lives, group)), multiprocessing.current_process(), tmp_path)


def test_a_stopped_run_takes_its_ray_with_it(tmp_path: Path) -> None:
    rooms = ["pack", "rooms", "--scenes=400", "--frames_per_scene=1", "--parts=4", "--shard_mb=1"]
    process = start([*rooms, "--engine=ray", "--out", tmp_path / "set"], tmp_path)
    wait_for(lambda: any(tmp_path.glob("set/.pack/*/.pack/*.tar.*")), process, tmp_path)
    group = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(group) > 3
    said = stop(process, signal.SIGTERM, tmp_path)
    assert process.exitcode == 143 and said.count("interrupted by SIGTERM") == 1
    wait_for(lambda: not any(map(lives, group)), multiprocessing.current_process(), tmp_path)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--data.prefetch=1024", "--micro_batch=1024"], "data.prefetch x micro_batch: "),
        (["--data.processes=256"], "data.processes: "),
        (["--micro_batch=1024", "--data.height=4004", "--data.width=4004"], "micro_batch 1024, "),
    ],
)
def test_what_memory_does_not_hold_is_refused_at_the_start(
    arguments: list[str], key: str, runs: dict[str, list[object]], tmp_path: Path
) -> None:
    process = start(
        [*runs["train"], "--batch=1024", "--data.prefetch=1", *arguments], tmp_path, limit=12 << 30
    )
    process.join()
    said = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 2 and f"\nerror: {key}" in said, said
