"""What the figures were measured on."""

import os
from collections.abc import Iterator

import torch

from flatdepth.bench.gpu.rows import Row, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.timing import environment
from flatdepth.training.memory import GIB


def machine(settings: Settings) -> Iterator[Row]:
    """The device and its memory, the cores, the versions."""
    device = settings.device
    facts = environment(device)
    total = (
        torch.cuda.get_device_properties(device).total_memory / GIB if not settings.dry else None
    )
    yield figure(str(facts["device"]), total, "GiB", f"CUDA {torch.version.cuda}")
    versions = facts["versions"]
    assert isinstance(versions, dict)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield figure("CPU cores", os.cpu_count(), note=text)
