"""What every part is told, and the configurations that they run."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from flatdepth.bench.gpu.rows import Row
from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.resources import CONFIGS, ROOT

DRY = {
    "model.encoder": "vitt",
    "data.height": "56",
    "data.width": "70",
    "data.threads": "2",
    "eval.batch": "2",
    "eval.images": "4",
}
"""What a dry run takes in place of any configuration's own and of a part's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a part is told.

    Attributes:
        shards: directory of the demo shard set ``demo_pictures``.
        work: directory for logs and runs, which may be thrown away.
        dry: tiny sizes on the CPU.
        seconds: that the part may take.
        done: rows of the parts before.
    """

    shards: Path
    work: Path
    dry: bool
    seconds: float = math.inf
    done: tuple[Row, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where parts compute; not asked for before a part's process has begun."""
        return torch.device("cpu" if self.dry else "cuda")

    def config(self, name: str, /, **changes: object) -> TrainConfig:
        """A packaged configuration on the demo sets, with random weights.

        Args:
            name: of its file.
            changes: options, with ``__`` for the dot of a group.
        """
        options = {
            "runs": self.work / "runs",
            "tracker": "none",
            "data.train": f"[{{path: {ROOT / 'shards' / 'rooms-train'}}}]",
            "data.art": f"[{self.shards / 'demo_pictures'}]",
            "data.threads": os.cpu_count() or 1,
            "model.checkpoint": "null",
        }
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        if self.dry:
            options |= DRY
        arguments = [f"--config={CONFIGS / name}.yaml"]
        arguments += [f"--{key}={value}" for key, value in options.items()]
        return parse_config(TrainConfig, arguments, prog="train.py", description=None)
