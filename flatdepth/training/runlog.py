"""What a run leaves behind and says: history, metrics, pictures, report, trackers, progress.

``runs/NAME/``::

    config.yaml       the resolved configuration; flatdepth train --config reads it
    history.jsonl     one line per optimiser step, the seconds of its stages included
    metrics.json      every validation, protocol, what set the pace, device, versions
    pictures/         a contact sheet per validation
    report.html       all of it on one page
    weights/          best and final, .pth and .safetensors in the official layout
    checkpoints/      what resuming needs
    tracker/          TensorBoard's or wandb's files
"""

import dataclasses
import importlib
import json
import math
import platform
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from flatdepth.cli import cpus, local_ranks, versions
from flatdepth.config import TrainConfig
from flatdepth.data.loader import lanes
from flatdepth.errors import UserError
from flatdepth.judge.validation import protocol
from flatdepth.pace import Pace
from flatdepth.show.pictures import save_png, write_atomic
from flatdepth.show.run_page import write_report
from flatdepth.training.launch import device_name
from flatdepth.training.state import Progress, writing
from flatdepth.types import METRICS_FORMAT
from flatdepth.untrusted import parse_json

SHOWN_REGIONS = ("clean", "background", "flat", "mirror", "art", "frame")


class RunLog:
    """Writes the files of a run on the main process; its methods are called by all ranks."""

    def __init__(
        self, run: Path, config: TrainConfig, accelerator: Accelerator, progress: Progress
    ) -> None:
        self._run = run
        self._config = config
        self._accelerator = accelerator
        self._progress = progress
        self._main = accelerator.is_main_process
        self._bar: tqdm | None = None
        cores = cpus() / local_ranks()
        self._pace = Pace(lanes(config), cores, _pace_before(run))
        if self._main:
            run.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(_plain(config), sort_keys=False)
            write_atomic(run / "config.yaml", text.encode())
            _keep_history(run / "history.jsonl", progress.step)
            self._say(_headline(run, config, progress))
            if sys.stderr.isatty():
                self._bar = tqdm(
                    total=config.steps, initial=progress.step, unit="step", dynamic_ncols=True
                )
        settings = tracker_settings(run, config, progress) if self._main else {}
        accelerator.init_trackers("flatdepth", _flat(_plain(config)), init_kwargs=settings)

    def step(
        self,
        *,
        time: Mapping[str, float],
        loader: Mapping[str, float],
        samples: int,
        cpu_seconds: float,
        **values: float,
    ) -> None:
        """Record an optimiser step.

        Args:
            time, loader, samples, cpu_seconds: of this rank, as ``Pace.add`` takes them.
            values: loss, lr, grad_norm, images_per_s, data_wait_share, and of a run with a teacher
                its loss, ``teacher``.
        """
        step = self._progress.step
        news = self._pace.add(time, loader, samples=samples, cpu_seconds=cpu_seconds)
        if self._main:
            record: dict[str, Any] = {"step": step}
            record |= {name: _json_number(v) for name, v in values.items()}
            record |= {"time": _to_microseconds(time), "loader": _to_microseconds(loader)}
            path = self._run / "history.jsonl"
            with writing(self._run), path.open("a", encoding="utf-8") as history:
                history.write(json.dumps(record) + "\n")
            if self._bar is not None:
                self._bar.update()
                self._bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['lr']:.1e}")
            elif step % self._config.log_every == 0:
                self._say(step_line(step, self._config.steps, values))
            if news:
                self._say(f"note: {news}")
        if step % self._config.log_every == 0:
            groups = {"train": values, "time": time, "time/loader": loader}
            flat = {f"{group}/{name}": v for group, g in groups.items() for name, v in g.items()}
            self._accelerator.log(flat, step=step)

    def evaluation(self, sheet: Image.Image | None) -> None:
        """Tell of the newest validation and rewrite metrics.json and the report."""
        step = self._progress.step
        label, table = (self._progress.evaluations[-1][key] for key in ("label", "table"))
        if self._main:
            if sheet is not None:
                name = f"{step:06d}_{label.replace(' ', '_')}.png"
                with writing(self._run):
                    save_png(sheet, self._run / "pictures" / name)
            parts = [
                f"{region} {table[region]['abs_rel']:.3f}"
                for region in SHOWN_REGIONS
                if region in table
            ]
            self._say(f"validation ({label}, step {step}), AbsRel: {', '.join(parts)}")
            with writing(self._run):
                self._write(finished=False)
        flat = {
            f"val/{region}/{metric}": value
            for region, row in table.items()
            for metric, value in row.items()
        }
        self._accelerator.log(flat, step=step)
        if sheet is not None:
            _track_pictures(self._accelerator, sheet, step)

    def close(self, *, finished: bool) -> dict[str, Any]:
        """Write the last metrics.json and report; returns the metrics."""
        if self._main:
            with writing(self._run):
                self._write(finished=finished)
            if self._bar is not None:
                self._bar.close()
            if finished:
                if self._progress.step < self._config.steps:
                    self._say(
                        f"stopped early at step {self._progress.step} of {self._config.steps}: "
                        f"{self._progress.stale} validations in a row without a better "
                        f"{self._config.eval.metric}"
                    )
                self._say(f"done: {self._run / 'report.html'}")
            else:
                self._say(
                    f"stopped at step {self._progress.step}; give the same command again to go on"
                )
        return self._metrics(finished)

    def _metrics(self, finished: bool) -> dict[str, Any]:
        return {
            "format": METRICS_FORMAT,
            "name": self._config.name,
            "finished": finished,
            "protocol": protocol(self._config),
            "seconds": self._progress.seconds,
            "skipped_steps": self._progress.skipped_steps,
            "best": self._progress.best,
            "pace": self._pace.latest,
            "teacher": self._progress.teacher or None,
            "device": device_name(self._accelerator.device),
            "versions": versions() | {"python": platform.python_version()},
            "evaluations": self._progress.evaluations,
        }

    def _write(self, *, finished: bool) -> None:
        text = json.dumps(self._metrics(finished), indent=1, allow_nan=False)
        write_atomic(self._run / "metrics.json", text.encode())
        write_report(self._run)

    def _say(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)


def tracker_settings(run: Path, config: TrainConfig, progress: Progress) -> dict[str, Any]:
    """What a tracker must know so that a run that goes on stays one run there.

    TensorBoard: the first step whose figures are still to come; those it has from there on were
    lost with the steps. The others keep runs elsewhere, by an identity that lies in ``tracker/id``,
    as another run directory may have the same name.
    """
    if config.tracker == "tensorboard":
        return {"tensorboard": {"purge_step": progress.step + progress.has_evaluation()}}
    if config.tracker not in ("wandb", "trackio"):
        return {}
    kept = run / "tracker" / "id"
    if not kept.exists():
        write_atomic(kept, uuid.uuid4().hex[:8].encode())
    identity = kept.read_text("utf-8")
    own = {"resume": "allow", "name": f"{config.name}-{identity}"}
    if config.tracker == "wandb":
        own |= {"name": config.name, "id": identity, "dir": str(kept.parent)}
    return {config.tracker: own}


def _track_pictures(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    """Send the contact sheet to the trackers, each of which wants it otherwise."""
    name = "val/pictures"
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [sheet]}, step=step)
        elif tracker.name == "trackio":
            trackio = importlib.import_module("trackio")
            tracker.log({name: trackio.Image(np.asarray(sheet))}, step=step)


def _plain(config: TrainConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted keys with values that trackers accept."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            simple = isinstance(value, str | int | float | bool)
            flat[prefix + key] = value if simple else json.dumps(value)
    return flat


def _keep_history(path: Path, last_step: int) -> None:
    """Drop the records after the checkpoint that the run goes on from.

    The last line may be one that was being written when the run was killed.

    Raises:
        UserError: another line is no record.
    """
    kept = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if int(parse_json(line)["step"]) > last_step:
                break
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} is damaged; delete that line to go on without it"
            ) from error
        kept.append(line + b"\n")
    write_atomic(path, b"".join(kept))


def _pace_before(run: Path) -> dict[str, Any] | None:
    """What the last part of a run says of its pace; a run that goes on keeps it for a while."""
    try:
        before = parse_json((run / "metrics.json").read_bytes())["pace"]
        json.dumps(before, allow_nan=False)
        return before if isinstance(before, dict) else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _to_microseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in seconds.items()}


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def step_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """A step in the log; the values are those of ``RunLog.step``."""
    taught = f"teacher {values['teacher']:.4f}  " if "teacher" in values else ""
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  {taught}lr {values['lr']:.2e}  "
        f"grad {values['grad_norm']:.2f}  {values['images_per_s']:.1f} images/s  "
        f"data wait {values['data_wait_share']:.0%}"
    )


def _headline(run: Path, config: TrainConfig, progress: Progress) -> str:
    if progress.step >= config.steps:
        begin = f"{run} is complete at step {progress.step}"
    elif progress.step:
        begin = f"{run}: going on at step {progress.step} of {config.steps}"
    else:
        begin = f"{run}: {config.steps} steps of {config.batch} images"
    return f"{begin}, {config.model.encoder} ({config.model.kind})"
