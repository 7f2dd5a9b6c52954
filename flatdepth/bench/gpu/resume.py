"""A run in fp16 that is killed and goes on, and one with an overflow in it."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flatdepth.bench.crash import fingerprint, train_into_log
from flatdepth.bench.gpu.rows import Row, at_most, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.training.losses import depth_loss

STEPS = 20
SAVED = 10
KILLED = 11
OVERFLOW = 5

# Its processes are in this one's group, and end with it. No CUDA context exists here to be forked.
CONTEXT = multiprocessing.get_context("fork")


def resume(settings: Settings) -> Iterator[Row]:
    """Twenty steps of ViT-S: whole, whole again, and killed at 11; how far they are apart."""
    whole, again, broken = (_config(settings, name) for name in ("whole", "again", "broken"))
    for config in (whole, again):
        _finish(_start(config))
    process = _start(broken)
    while len(_history(broken)) < KILLED:
        if process.exitcode is not None:
            raise UserError(f"the run ended before step {KILLED}; see {_log(broken)}")
        time.sleep(0.001)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    yield figure("killed after step", len(_history(broken)))
    _finish(_start(broken))
    yield _apart("undisturbed, twice: losses", whole, again, goal=False)
    yield _apart("killed and gone on: losses", whole, broken, goal=True)
    prints = [fingerprint(_run(config)) for config in (whole, broken)]
    differing = [name for name in prints[0] if prints[0][name] != prints[1][name]]
    note = ", ".join(differing) or "weights, history and validations are equal"
    yield figure("killed and gone on: what differs", len(differing), note=note)
    scalers = [_scaler(config) for config in (whole, broken)]
    unequal = float(scalers[0] != scalers[1])
    yield at_most("gradient scaler that differs", unequal, 0, note=str(scalers[1]))


def overflow(settings: Settings) -> Iterator[Row]:
    """The same with gradients that overflow at one step: it is skipped, counted, and the scale
    lowered."""
    config = _config(settings, "overflow")
    _finish(CONTEXT.Process(target=_train_with_overflow, args=(config, settings.dry)))
    norms = {entry["step"]: entry["grad_norm"] for entry in _history(config)}
    skipped = [step for step, norm in norms.items() if norm is None]
    note = f"skipped: {', '.join(map(str, skipped))}"
    yield at_most("planted overflow not skipped", float(OVERFLOW not in skipped), 0, note=note)
    counted = json.loads((_run(config) / "metrics.json").read_text("utf-8"))["skipped_steps"]
    yield at_most("skipped steps counted wrongly", abs(counted - len(skipped)), 0)
    scaler = _scaler(config)
    if scaler is not None:
        expected = 2.0**16 / 2 ** len(skipped)
        apart = abs(math.log2(scaler["scale"] / expected))
        yield at_most("scale, halvings missed", apart, 0, note=f"scale {scaler['scale']:g}")


def _config(settings: Settings, name: str) -> TrainConfig:
    return settings.config(
        "vits_indoor",
        name=name,
        steps=STEPS,
        batch=4,
        micro_batch=2,
        save_every=SAVED,
        data__height=140,
        data__width=140,
        eval__every=STEPS,
        eval__images=8,
        eval__pictures=0,
        optim__warmup=5,
        optim__lr=1e-4,
    )


def _run(config: TrainConfig) -> Path:
    return Path(config.runs, config.name)


def _log(config: TrainConfig) -> Path:
    return Path(config.runs).parent / f"{config.name}.log"


def _start(config: TrainConfig) -> BaseProcess:
    process = CONTEXT.Process(target=train_into_log, args=(config, _log(config)))
    process.start()
    return process


def _finish(process: BaseProcess) -> None:
    """Wait for a training to end, starting it if need be.

    Raises:
        UserError: it failed.
    """
    if process.pid is None:
        process.start()
    process.join()
    if process.exitcode != 0:
        raise UserError(f"a training ended with exit code {process.exitcode}; see its log")


def _train_with_overflow(config: TrainConfig, dry: bool) -> None:
    """Make the loss of step ``OVERFLOW`` so large that its gradient is infinite in half precision.

    In full precision, as on a CPU, the loss itself is made infinite.
    """
    calls = 0
    accumulation = config.batch // config.micro_batch

    def planted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        losses = depth_loss(*args)
        now = calls == (OVERFLOW - 1) * accumulation + 1
        return losses * (math.inf if dry else 1e30) if now else losses

    with patch("flatdepth.training.loop.depth_loss", planted):
        train_into_log(config, _log(config))


def _history(config: TrainConfig) -> list[dict[str, Any]]:
    path = _run(config) / "history.jsonl"
    if not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _apart(name: str, config: TrainConfig, other: TrainConfig, *, goal: bool) -> Row:
    """The largest relative difference between the losses of two runs."""
    ours, theirs = ([entry["loss"] for entry in _history(c)] for c in (config, other))
    apart = [abs(b / a - 1) for a, b in zip(ours, theirs, strict=True)]
    unequal = [step for step, value in enumerate(apart, start=1) if value]
    note = f"unequal from step {unequal[0]}" if unequal else "equal to the last bit"
    if goal:
        return at_most(name, max(apart), 0, note=note)
    return figure(name, max(apart), note=note)


def _scaler(config: TrainConfig) -> dict[str, Any] | None:
    """The state of the gradient scaler in the newest checkpoint; None where there is none."""
    path = _run(config) / "checkpoints" / f"step-{STEPS:08d}" / "scaler.pt"
    return torch.load(path, weights_only=True) if path.exists() else None
