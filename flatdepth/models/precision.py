"""Where a network computes, and in which types."""

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs


def autocast(accelerator: Accelerator) -> torch.autocast:
    """What a forward pass runs under: the same as accelerate's own, which is not for every step.

    Each time that one is made it clears the process's environment and fills it again. A loader
    thread that reads a variable meanwhile, as libjpeg does for every image, reads freed memory:
    some run in every few thousand steps ended in a segmentation fault.
    """
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
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
