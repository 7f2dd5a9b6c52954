"""Several trainings in one folder, one after the other.

Each is a run like any other, launched through accelerate; one that has finished is not run again,
one that was interrupted goes on from its checkpoint.
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flatdepth.cli import signals_to
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.show.pictures import write_atomic
from flatdepth.untrusted import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A training to come.

    Attributes:
        title: what it is for, in words.
        config: what it does; its ``runs`` is the folder of them all.
    """

    title: str
    config: TrainConfig


def run_all(runs: Sequence[Planned], folder: Path, launch: str) -> list[Mapping[str, Any]]:
    """Train every run that has not finished, and return what each one's metrics.json says.

    Args:
        folder: where the runs and, beside them, their configurations go.
        launch: options for ``accelerate launch``.

    Raises:
        UserError: ``folder`` holds runs of other configurations, or a run did not finish.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        folder / f"{run.config.name}.yaml": yaml.safe_dump(
            json.loads(json.dumps(dataclasses.asdict(run.config))), sort_keys=False
        )
        for run in runs
    }
    extra = sorted({*folder.glob("*.yaml")} - texts.keys())
    changed = [path for path, text in texts.items() if _differs(path, text)]
    if extra or changed:
        raise UserError(
            f"{(extra or changed)[0]} belongs to runs with other settings; choose another name, or "
            "delete the folder"
        )
    records = []
    for run, (path, text) in zip(runs, texts.items(), strict=True):
        place = folder / run.config.name
        record = _finished(place)
        if record is None:
            write_atomic(path, text.encode())
            print(f"== {run.title}", flush=True)
            _launch(path, launch)
            record = _finished(place)
            if record is None:
                raise UserError(
                    f"{place} has not finished; give the same command again to go on where it "
                    "stopped"
                )
        else:
            print(f"== {run.title} (finished before)", flush=True)
        records.append(record)
    return records


def _differs(path: Path, text: str) -> bool:
    return path.exists() and path.read_text("utf-8") != text


def _finished(run: Path) -> Mapping[str, Any] | None:
    path = run / "metrics.json"
    if not path.is_file():
        return None
    try:
        record: Mapping[str, Any] = parse_json(path.read_bytes())
        return record if record["finished"] else None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; delete {run} to run it again") from error


def _launch(config: Path, options: str) -> None:
    """``accelerate launch -m flatdepth.train``; SIGINT and SIGTERM are passed on as SIGTERM.

    On SIGTERM a run saves a checkpoint and ends.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(options)]
    command += ["-m", "flatdepth.train", f"--config={config}"]
    # a session of its own, so that Ctrl-C reaches the run once and as SIGTERM
    process = subprocess.Popen(command, start_new_session=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()

    with signals_to(stop):
        code = process.wait()
        while stopped and _alive(process.pid):
            time.sleep(0.1)
    if stopped:
        raise UserError(f"stopped in {config.stem}; give the same command again to go on there")
    if code:
        raise UserError(
            f"{config} ended with exit code {code}; see its messages above, then give the same "
            "command again"
        )


def _alive(group: int) -> bool:
    """Whether a process group has members: the launcher ends before the runs that it started."""
    if os.name != "posix":
        return False
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
