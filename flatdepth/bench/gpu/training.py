"""Two real trainings from random weights in the time that is left: with pastes and without."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from flatdepth.bench.gpu.rows import Row, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.step import measure_steps
from flatdepth.config import TrainConfig
from flatdepth.training import runlog
from flatdepth.training.loop import train

MARGIN = 0.75
"""Share of the time that the steps may take; the rest is for start, validation and report."""


def training(settings: Settings) -> Iterator[Row]:
    """ViT-S at 280 x 280 on the rendered rooms; AbsRel on flat things and around them."""
    end = time.monotonic() + settings.seconds
    steps = 4 if settings.dry else _affordable(settings, settings.seconds / 2)
    for name, share in (("with pastes", None), ("without pastes", 0.0)):
        if not settings.dry and time.monotonic() > end:
            return
        changes = {} if share is None else {"paste__share": share}
        config = _config(settings, name=name.replace(" ", "_"), steps=steps, **changes)
        with patch.object(runlog, "write_report"):
            train(config)
        metrics = json.loads(Path(config.runs, config.name, "metrics.json").read_text("utf-8"))
        table = metrics["evaluations"][-1]["table"]
        note = f"{steps} steps of {config.batch} images in {metrics['seconds']:.0f} s"
        for region in ("flat", "background", "clean"):
            yield figure(f"{name}: {region} AbsRel", table[region]["abs_rel"], note=note)


def _affordable(settings: Settings, seconds: float) -> int:
    """How many steps a training of so many seconds can take."""
    started = time.monotonic()
    times = measure_steps(_config(settings, name="rate"), steps=20, device=settings.device)
    left = seconds - (time.monotonic() - started)
    return max(20, int(MARGIN * left / (times.step_ms[1] / 1e3)))


def _config(settings: Settings, **changes: object) -> TrainConfig:
    steps = int(str(changes.get("steps", 20)))
    options: dict[str, object] = {
        "batch": 32,
        "micro_batch": 32,
        "save_every": steps,
        "data__height": 280,
        "data__width": 280,
        "model__checkpointing": "none",
        "optim__lr": 3e-4,
        "optim__head_lr_factor": 1.0,
        "optim__schedule": "cosine",
        "optim__warmup": max(1, steps // 20),
        "eval__every": steps,
        "eval__images": 96,
        "eval__batch": 16,
        "eval__patience": 0,
    }
    return settings.config("vits_indoor", **(options | changes))
