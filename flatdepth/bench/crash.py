"""Whether a run survives being killed: SIGKILL at random instants, gone on, compared bit for bit.

Every run is a process of its own, forked from a server that has imported everything, so that a
trial takes the time of the training and not of starting Python.
"""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from safetensors.numpy import load_file

from flatdepth.cli import run_command
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.training.state import newest_checkpoint, step_of

FINAL = Path("weights", "final.safetensors")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flatdepth.training.loop", "torch._dynamo"])
POLL_SECONDS = 0.0005
LONGEST_DELAY_SECONDS = 0.1
"""A kill meant for a checkpoint's writing comes at most this long after the writing began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One killed run.

    Attributes:
        aim: what the kill was aimed at: any instant, or the writing of a checkpoint.
        after: seconds from the start of the process to the kill.
        ended: whether the run was through before the kill came.
        newest: step of the newest whole checkpoint it left, 0 for none.
        torn: steps of the checkpoints that it left half written.
        differences: what differs from the undisturbed run after going on; empty if nothing does.
    """

    aim: str
    after: float
    ended: bool
    newest: int
    torn: tuple[int, ...]
    differences: tuple[str, ...]


def crash_trials(
    config: TrainConfig, folder: Path, *, trials: int, seed: int, log: Path
) -> Iterator[Trial]:
    """Train undisturbed once, then ``trials`` times with a kill, and compare.

    Odd trials are killed at an instant that is uniform over the undisturbed run's duration, even
    ones while a checkpoint that is drawn at random is being written.

    Args:
        config: of the run; ``runs`` is replaced.
        folder: new or empty; gets the undisturbed run and the newest trial.
        seed: of the instants.
        log: file that gets what the runs print.

    Raises:
        UserError: ``folder`` is not empty, or a run fails.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new directory")
    folder.mkdir(parents=True, exist_ok=True)
    whole = replace(config, runs=str(folder / "whole"))
    _start_server()
    started = time.perf_counter()
    finish(whole, log)
    duration = time.perf_counter() - started
    expected = fingerprint(Path(whole.runs, config.name))
    draw = random.Random(seed)
    saves = range(config.save_every, config.steps + 1, config.save_every)
    for number in range(trials):
        broken = replace(config, runs=str(folder / f"trial-{number:03d}"))
        run = Path(broken.runs, config.name)
        process = start(broken, log)
        started = time.perf_counter()
        if number % 2 == 0:
            aim, moment = "any instant", draw.uniform(0, duration)
        else:
            step = draw.choice(saves)
            half_written = run / "checkpoints" / f".step-{step:08d}.tmp"
            aim, moment = f"writing of step {step}", draw.uniform(0, LONGEST_DELAY_SECONDS)
            _wait_for(half_written.exists, process)
        process.join(moment)
        ended = process.exitcode is not None
        process.kill()
        process.join()
        after = time.perf_counter() - started
        newest = newest_checkpoint(run)
        torn = tuple(sorted(step_of(path) for path in (run / "checkpoints").glob(".step-*.tmp")))
        finish(broken, log)
        found = fingerprint(run)
        yield Trial(
            aim=aim,
            after=after,
            ended=ended,
            newest=0 if newest is None else step_of(newest),
            torn=torn,
            differences=tuple(name for name in expected if found[name] != expected[name]),
        )


def start(config: TrainConfig, log: Path) -> BaseProcess:
    """Start a training in a process of its own; its exit code is that of ``flatdepth train``.

    Args:
        log: file that what it prints is appended to.
    """
    process = CONTEXT.Process(target=train_into_log, args=(config, log))
    process.start()
    return process


def finish(config: TrainConfig, log: Path) -> None:
    """Train to the end in a process of its own.

    Raises:
        UserError: it failed.
    """
    process = start(config, log)
    process.join()
    if process.exitcode != 0:
        last = log.read_text("utf-8", "replace").strip().rsplit("\n", 1)[-1]
        raise UserError(f"a run ended with exit code {process.exitcode}: {last}; see {log}")


def fingerprint(run: Path) -> dict[str, object]:
    """What two equal runs have in common to the last bit, by name."""
    lines = (run / "history.jsonl").read_text("utf-8").splitlines()
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    kept = ("step", "loss", "lr", "grad_norm")
    return {
        "weights": {name: array.tobytes() for name, array in load_file(run / FINAL).items()},
        "history": [{key: json.loads(line)[key] for key in kept} for line in lines],
        "validations": metrics["evaluations"],
        "best": metrics["best"],
    }


def train_into_log(config: TrainConfig, log: Path) -> None:
    """Train and exit as ``flatdepth train`` does; what it prints goes to the end of ``log``."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from flatdepth.training import runlog
    from flatdepth.training.loop import train

    torch.set_num_threads(1)
    # The report is drawn from the other files and takes longer than so small a training.
    with patch.object(runlog, "write_report"):
        run_command(lambda: 0 if train(config) else 1)


def _start_server() -> None:
    """Have the imports done, so that the first run's duration is without them."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def _wait_for(happened: Callable[[], bool], process: BaseProcess) -> None:
    while not happened() and process.exitcode is None:
        time.sleep(POLL_SECONDS)
