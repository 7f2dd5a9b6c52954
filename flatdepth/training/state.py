"""Checkpoints of a run: written whole or not at all, found again, and checked before they are used.

``<run>/checkpoints/step-00000500/`` holds what accelerate saves (weights, optimiser, scaler and the
random states), ``ema.safetensors`` if weights are averaged, and ``state.json`` with the position,
the evaluations, the resolved configuration and the versions. The directory is filled under a
temporary name, synced to disk and renamed; older checkpoints are deleted after that.

The random states are accelerate's and nothing reads them: what is random in a sample is a function
of the seed and its position, and the network draws no random numbers after it is built.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME, DistributedType, broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flatdepth.cli import versions
from flatdepth.config import SetConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.training.ema import Ema
from flatdepth.training.stop import forget_process, record_process
from flatdepth.types import ALL_METRICS
from flatdepth.untrusted import parse_json

FORMAT = 2
STATE_FILE = "state.json"
EMA_FILE = "ema.safetensors"

SAFE_TO_CHANGE = (
    "name",
    "runs",
    "micro_batch",
    "save_every",
    "keep",
    "log_every",
    "tracker",
    "max_bad_steps",
    "resume",
    "data.threads",
    "data.processes",
    "data.prefetch",
    "data.cache_gb",
    "data.read_timeout_s",
    "data.outage_minutes",
    "model.checkpointing",
    "eval.batch",
    "eval.pictures",
    "eval.patience",
)
"""Configuration keys that may differ on resume: they change neither samples nor the recipe."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; everything that resuming needs besides accelerate's own state.

    Attributes:
        step: optimiser steps, skipped ones included; the next step's samples follow from it.
        seconds: training time so far, over all interruptions.
        bad_steps: steps in a row that were skipped: their loss or gradient was not finite (in fp16
            an overflow, after which the gradient scaler tries a smaller scale) or no pixel valid.
        skipped_steps: such steps in all.
        best: value of the chosen metric at the best validation, and its step.
        stale: validations in a row that were no better.
        evaluations: as in metrics.json.
        data: per shard set a digest of its content, by which a run knows its samples again.
        teacher: digest of the teacher's weights; empty without one.
    """

    step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    skipped_steps: int = 0
    best: dict[str, float] | None = None
    stale: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    teacher: str = ""

    @property
    def updates(self) -> int:
        """Optimiser steps that changed the weights: what rate, moments and average count by."""
        return self.step - self.skipped_steps

    def has_evaluation(self) -> bool:
        """Whether the present step has been validated, before an interruption perhaps."""
        return any(entry["step"] == self.step for entry in self.evaluations)

    def add_evaluation(self, label: str, table: Mapping[str, Mapping[str, float]]) -> None:
        """Take in a validation of the present step."""
        self.evaluations.append(
            {
                "label": label,
                "step": self.step,
                "table": {region: dict(row) for region, row in table.items()},
                "illusion_gap": table.get("flat", {}).get("illusion_gap"),
            }
        )


def update_best(progress: Progress, config: TrainConfig) -> bool:
    """Whether the newest validation is the best so far; updates ``best`` and ``stale``.

    A value that is not finite or missing is never the best, and neither is one whose AbsRel on
    clean images is worse than ``eval.clean_guard`` allows, for a model that started from a
    checkpoint.
    """
    region, _, metric = config.eval.metric.partition(".")
    first, newest = (progress.evaluations[i]["table"] for i in (0, -1))
    value = newest.get(region, {}).get(metric, math.nan)
    sign = 1 if ALL_METRICS[metric].better == "lower" else -1
    better = math.isfinite(value)
    if progress.best is not None:
        better &= sign * value < sign * progress.best["value"]
    if config.model.checkpoint is not None and "clean" in newest and "clean" in first:
        limit = first["clean"]["abs_rel"] * (1 + config.eval.clean_guard)
        better &= newest["clean"]["abs_rel"] <= limit
    progress.stale = 0 if better else progress.stale + 1
    if better:
        progress.best = {"value": value, "step": progress.step}
    return better


def count_step(progress: Progress, taken: bool, keys: list[str], config: TrainConfig) -> None:
    """Count a step that was or was not taken.

    Args:
        keys: this rank's samples of the step; the message names those of all ranks.

    Raises:
        UserError: ``max_bad_steps`` steps in a row were not taken.
    """
    progress.bad_steps = 0 if taken else progress.bad_steps + 1
    progress.skipped_steps += not taken
    if progress.bad_steps >= config.max_bad_steps:
        keys = gather_object(keys)
        half = "fp16 ends at 65504: begin a new run with --precision bf16, or "
        raise UserError(
            f"{progress.bad_steps} optimiser steps in a row had a loss or gradient that is not "
            f"finite, or no valid pixel (max_bad_steps); the last one's samples were "
            f"{', '.join(keys)}; {half if config.precision == 'fp16' else ''}lower optim.lr, or "
            "look at these frames with flatdepth pack verify"
        )


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted((run / "checkpoints").glob("step-*[0-9]"))
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The optimiser step of a checkpoint, from its directory's name."""
    return int(checkpoint.name.removeprefix(".").removeprefix("step-").removesuffix(".tmp"))


@contextmanager
def claimed(run: Path, config: TrainConfig, accelerator: Accelerator) -> Iterator[Path | None]:
    """The checkpoint to go on from, the main process's choice, or None for a new run.

    Within, no other training gets the run. The lock is beside it and ends with the main process,
    however that ends; so is a record of that process, by which the run can be asked to stop.

    Raises:
        UserError: another training has the run, or it exists and shall not be touched.
    """
    lock = FileLock(run.with_name(f".{run.name}.lock"))
    refusal, choice = None, None
    try:
        if accelerator.is_main_process:
            refusal = _claim(run, config, lock)
            choice = newest_checkpoint(run)
            if refusal is None:
                record_process(run)
        refusal, choice = broadcast_object_list([refusal, choice])
        if refusal is not None:
            raise UserError(refusal)
        yield choice
    finally:
        if lock.is_locked:
            forget_process(run)
        lock.release()


def _claim(run: Path, config: TrainConfig, lock: FileLock) -> str | None:
    """Take the lock of a run, or say why not."""
    if config.resume == "never" and run.exists():
        return f"{run} already exists and resume is 'never'; choose another --name, or delete it"
    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return (
            f"another training is writing to {run}; stop it (or wait for its end), or choose "
            "another --name"
        )
    return None


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Within, what cannot be written (a full disk, say) is a ``UserError`` that says what is left.

    torch.save reports it as a RuntimeError of its archive writer.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        good = newest_checkpoint(run)
        left = "there is no checkpoint yet" if good is None else f"the last good one is {good}"
        reason = " ".join(str(error).split())
        free = shutil.disk_usage(run).free // 2**20
        raise UserError(
            f"cannot write to {run} ({reason}; {free} MiB are free); {left}; free space there and "
            "run the same command again to go on from it"
        ) from error


def save_checkpoint(
    accelerator: Accelerator, run: Path, progress: Progress, config: TrainConfig, ema: Ema
) -> Path:
    """Save the state of a run after an optimiser step; collective over all ranks.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: it could not be written; older checkpoints are as they were.
    """
    target = run / "checkpoints" / f"step-{progress.step:08d}"
    if target.exists():
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with writing(run):
        accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        document = {
            "format": FORMAT,
            "ranks": accelerator.num_processes,
            "fsdp": _is_sharded(accelerator),
            "progress": dataclasses.asdict(progress),
            "config": dataclasses.asdict(config),
            "versions": versions(),
        }
        with writing(run):
            if average := ema.state_dict():
                save_file(average, temporary / EMA_FILE)
            document["files"] = {name: _sha256(file) for name, file in _files(temporary).items()}
            document["sha256"] = _own_sha256(document)
            (temporary / STATE_FILE).write_text(json.dumps(document, indent=1))
            for file in sorted(temporary.rglob("*")):
                _sync(file)
            _sync(temporary)
            temporary.rename(target)
            _sync(target.parent)
        _prune(target.parent, config.keep)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    config: TrainConfig,
    ema: Ema,
    data: Mapping[str, str],
    teacher: str = "",
) -> Progress:
    """Bring the prepared model and optimiser and the average to the state of a checkpoint.

    Args:
        data: digests of the shard sets, as in ``Progress``.
        teacher: digest of the teacher's weights, as in ``Progress``.

    Raises:
        UserError: the checkpoint is damaged or of another format, or was made with other data,
            another teacher or a configuration that differs in a key that may not change, or this
            host does not see it.
    """
    if not path.exists():
        raise UserError(
            f"{path} of the main process is not on host {platform.node()}; put runs on a file "
            "system that all hosts share, or copy the checkpoint there"
        )
    document = _read_state(path)
    if accelerator.is_local_main_process:
        _check_files(path, document["files"])
    if document.get("fsdp", False) != _is_sharded(accelerator):
        began = "without" if _is_sharded(accelerator) else "with"
        raise UserError(
            f"{path} was made {began} FSDP; launch the run as it was begun, or start a new one "
            "with another name"
        )
    changed = config_changes(_completed(document["config"]), _plain(dataclasses.asdict(config)))
    unsafe = {key: pair for key, pair in changed.items() if key not in SAFE_TO_CHANGE}
    if unsafe:
        key, (old, new) = next(iter(unsafe.items()))
        raise UserError(
            f"{path} was made with {key}={old}, now it is {new}"
            + (f" (and {len(unsafe) - 1} more keys differ)" if len(unsafe) > 1 else "")
            + "; set it back, or start a new run with another name"
        )
    made_with = document["progress"].setdefault("data", dict(data))
    if other := [name for name, digest in made_with.items() if data[name] != digest]:
        raise UserError(
            f"{path} was made with another {other[0]}, which was packed anew since; put the old "
            "set back, or start a new run with another name"
        )
    if (taught_by := document["progress"].get("teacher", "")) != teacher:
        raise UserError(
            f"{path} was made with the teacher {taught_by[:12]} (SHA-256 of its weights), but "
            f"{config.model.teacher or config.model.checkpoint} now holds {teacher[:12]}; put the "
            "old weights back, or start a new run with another name"
        )
    # to the CPU first: on several GPUs there may be no room for a second copy
    accelerator.load_state(str(path), map_location="cpu")
    progress = Progress(**document["progress"])
    _undo_first_step(accelerator, path, progress)
    # accelerate's count of micro-batches, from which it tells where optimiser steps end, is of the
    # accumulation that the checkpoint was made with.
    accelerator.step = 0
    if ema.state_dict():
        ema.load_state_dict(load_file(path / EMA_FILE))
    return progress


def _undo_first_step(accelerator: Accelerator, path: Path, progress: Progress) -> None:
    """Take back the step without gradients by which torch makes a sharded optimiser's state.

    accelerate has it count for the gradient scaler, which it loads before (accelerate 1.15), and
    where no moments were saved because no step was taken yet, those of this one are left.
    """
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.load(path / SCALER_NAME, weights_only=True))
    if not progress.updates:
        for optimizer in accelerator._optimizers:
            optimizer.state.clear()


def config_changes(
    old: Mapping[str, object], new: Mapping[str, object], prefix: str = ""
) -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ, with (old, new)."""
    changed: dict[str, tuple[object, object]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed |= config_changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changed[prefix + key] = (before, after)
    return changed


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of what versions before this one did not know."""
    defaults = _plain(dataclasses.asdict(TrainConfig()))
    known = {
        key: {**value, **config.get(key, {})} if isinstance(value, dict) else config.get(key, value)
        for key, value in defaults.items()
    }
    entry = _plain(dataclasses.asdict(SetConfig(path="")))
    known["data"]["train"] = [{**entry, **older} for older in known["data"]["train"]]
    return {**config, **known}


def _plain(value: dict[str, object]) -> dict[str, object]:
    """As JSON would give it back: tuples become lists."""
    plain: dict[str, object] = json.loads(json.dumps(value))
    return plain


def _read_state(path: Path) -> dict[str, Any]:
    """What ``state.json`` says, if it is as it was written.

    Raises:
        UserError: it is damaged or of another format.
    """
    try:
        document: dict[str, Any] = parse_json((path / STATE_FILE).read_bytes())
        if document["format"] != FORMAT:
            raise UserError(
                f"{path}: checkpoint format {document['format']!r}, this version reads {FORMAT}; "
                "start a new run with another name"
            )
        if document["sha256"] != _own_sha256(document):
            raise ValueError("its checksum differs")
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, STATE_FILE) from error
    return document


def _check_files(path: Path, expected: Mapping[str, str]) -> None:
    """Compare every file of a checkpoint with its checksum, before anything of it is loaded.

    Raises:
        UserError: one is missing or not what was written.
    """
    found = _files(path)
    for name, sha256 in expected.items():
        if name not in found or _sha256(found[name]) != sha256:
            raise _damaged(path, name)


def _damaged(path: Path, name: str) -> UserError:
    earlier = [other for other in path.parent.glob("step-*[0-9]") if other.name < path.name]
    fix = (
        f"delete this checkpoint to go on from {max(earlier).name}"
        if earlier
        else "there is none before it; start a new run with another name"
    )
    return UserError(f"{path} is damaged: {name} is missing or not as it was written; {fix}")


def _own_sha256(document: Mapping[str, Any]) -> str:
    """SHA-256 of a state without its own entry, as JSON with sorted keys."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """All files of a checkpoint but ``state.json``, by their path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    named.pop(STATE_FILE, None)
    return named


def _is_sharded(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    """Delete old checkpoints, and what is left of those that were never finished."""
    torn = folder.glob(".step-*.tmp")
    for old in (*sorted(folder.glob("step-*[0-9]"))[:-keep], *torn):
        shutil.rmtree(old)
