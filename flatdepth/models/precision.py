"""Where a network computes, and in which types."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from flatdepth.cli import free_memory
from flatdepth.errors import UserError

HALF: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""What autocast computes in, by ``TrainConfig.precision``."""

LEAST_BYTES_PER_PIXEL = 500
"""Memory of a forward pass per pixel of its input, rounded down; measured with the smallest
network (the largest takes several times as much)."""


def autocast(accelerator: Accelerator) -> torch.autocast:
    """What a forward pass runs under: the same as accelerate's own, which is not for every step.

    Each time that one is made it clears the process's environment and fills it again. A loader
    thread that reads a variable meanwhile, as libjpeg does for every image, reads freed memory:
    some run in every few thousand steps ended in a segmentation fault.
    """
    half = HALF.get(accelerator.mixed_precision)
    handler = accelerator.autocast_handler or AutocastKwargs()
    return torch.autocast(
        accelerator.device.type,
        half,
        enabled=half is not None and handler.enabled,
        cache_enabled=handler.cache_enabled,
    )


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_device(name: str | None) -> torch.device:
    """The device of an option ``--device``; None is ``best_device``.

    Raises:
        UserError: it is a GPU and there is none.
    """
    device = torch.device(name) if name else best_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no usable GPU; leave the option out")
    return device


def expect_room(batch: int, size: int, device: torch.device) -> None:
    """Refuse forward passes of ``batch`` images of ``size`` pixels that the machine cannot hold.

    A GPU refuses by itself.

    Raises:
        UserError: free memory is less than the smallest network would take.
    """
    need, free = batch * size**2 * LEAST_BYTES_PER_PIXEL, free_memory()
    if device.type == "cpu" and need > free:
        raise UserError(
            f"--batch {batch} at --size {size}: expected at most the {free / 1e9:.1f} GB of free "
            f"memory, but the network takes more than {need / 1e9:.1f} GB; lower one of them"
        )
