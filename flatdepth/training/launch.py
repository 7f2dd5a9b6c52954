"""What a run is launched on: its devices and precision, and how a step is shared out."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from flatdepth.cli import cpus
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError, import_extra
from flatdepth.models.network import nominal_focal
from flatdepth.models.precision import autocast


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The accelerator of a run; on a CPU fp16 becomes full precision, with a word about it.

    Raises:
        UserError: the tracker's package is missing, FSDP meets what it cannot do, or the launcher
            started processes that accelerate does not join into one run.
    """
    if config.tracker != "none":
        import_extra(config.tracker, f"tracker: {config.tracker}")
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = config.precision
    if precision == "fp16" and on_cpu:
        print("note: fp16 needs a GPU; this run uses full precision", file=sys.stderr)
        precision = "no"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(str(run), logging_dir=str(run / "tracker")),
        kwargs_handlers=[
            # Every weight is used once per forward pass: a cache of their half-precision copies
            # saves no work, and with checkpointing it holds them all when the head's activations
            # peak.
            AutocastKwargs(cache_enabled=False),
            # With place_gradients: no second copy of the gradients for their exchange.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            *_patience(config),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if on_cpu and launched == 1:
        use_all_cores()
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but accelerate sees "
            f"{accelerator.num_processes}; launch with torchrun or a matching accelerate config"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise UserError(
                "FSDP of version 1 does not work here; set fsdp_version: 2, as in "
                "configs/accelerate/fsdp.yaml"
            )
        refused = {
            "optim.ema": (config.optim.ema, "0"),
            "model.lora_rank": (config.model.lora_rank, "0"),
            "optim.kind adamw8bit": (config.optim.kind == "adamw8bit", "adamw"),
        }
        for key, fix in ((key, fix) for key, (value, fix) in refused.items() if value):
            raise UserError(
                f"{key} does not work with FSDP, which spreads the weights over the devices; "
                f"set it to {fix}, or launch with configs/accelerate/multi_gpu.yaml"
            )
        use_autocast_alone(accelerator)
    return accelerator


def _patience(config: TrainConfig) -> list[InitProcessGroupKwargs]:
    """With sets on servers, devices wait for one whose server is away, for as long as that waits.

    By themselves they give up after 10 minutes (NCCL) or 30 (gloo).
    """
    data = config.data
    if not any(
        "://" in path for path in (*data.val, *data.art, *(set_.path for set_ in data.train))
    ):
        return []
    return [InitProcessGroupKwargs(timeout=timedelta(minutes=30 + data.outage_minutes))]


def use_all_cores() -> None:
    """Undo the single thread that ``accelerate launch`` gives a process on a CPU by default.

    ``OMP_NUM_THREADS=1`` cannot be told from that default, so it is followed only together with
    ``MKL_NUM_THREADS=1``, and every other number always.
    """
    if (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and os.environ.get("OMP_NUM_THREADS") == "1"
        and "MKL_NUM_THREADS" not in os.environ
    ):
        torch.set_num_threads(min(cpus(), psutil.cpu_count(logical=False) or cpus()))


def placement(accelerator: Accelerator) -> str:
    """Where a run takes place, in words: what became of the launcher's defaults."""
    ranks = accelerator.num_processes
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    name = device_name(accelerator.device)
    return f"{processes} on {name}, precision {accelerator.mixed_precision}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


def place_gradients(wrapped: nn.Module, multiple: int, accelerator: Accelerator) -> None:
    """Let the gradients of DistributedDataParallel lie where they are exchanged, before step one.

    By itself it makes its buckets beside the first step's gradients, and once more in the order in
    which those came. Two passes without effect do both while there is no optimiser state yet, so
    the peak stays that of a single device; and a run that goes on sums over ranks in the order of
    one that was not stopped. The gradients must be kept and zeroed from then on.

    Args:
        wrapped: what accelerate made of the model, in training mode; other wrappers are left alone.
        multiple: of the model's sides, in pixels.
    """
    if not isinstance(wrapped, DistributedDataParallel):
        return
    # two images: the class token's gradient from one has strides that torch warns of
    image = torch.zeros(2, 3, 2 * multiple, 2 * multiple, device=accelerator.device)
    for _ in range(2):
        wrapped.zero_grad(set_to_none=True)
        with autocast(accelerator):
            prediction = wrapped(image, nominal_focal(image))
        prediction.sum().backward()
    wrapped.zero_grad(set_to_none=False)


@contextmanager
def peers_awaited() -> Iterator[None]:
    """Within, that another process has gone is a ``UserError``: why is for that one to say."""
    try:
        yield
    except RuntimeError as error:
        signs = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
        if not any(sign in str(error) for sign in signs):
            raise
        raise UserError(
            "this process stops because another one of the run has ended; what that one said tells "
            "why, and the same command goes on from the newest checkpoint"
        ) from error


def use_autocast_alone(accelerator: Accelerator) -> None:
    """Keep FSDP from casting weights, inputs, outputs and gradients to half precision by itself.

    Autocast does what is right for each operation, as on one device: normalisation, residual
    stream and prediction stay in full precision.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def share_out(config: TrainConfig, ranks: int) -> tuple[TrainConfig, int]:
    """How ``ranks`` devices share the ``batch`` of an optimiser step.

    Returns:
        The configuration with the largest micro-batch, up to its own, that divides a device's share
        of the batch, and how many of them the share is.

    Raises:
        UserError: ``batch`` is not a multiple of the number of devices.
    """
    share, rest = divmod(config.batch, ranks)
    if rest:
        raise UserError(
            f"batch: expected a multiple of the {ranks} devices, got {config.batch}; the next one "
            f"is {(share + 1) * ranks}"
        )
    most = min(config.micro_batch, share)
    micro_batch = next(images for images in range(most, 0, -1) if share % images == 0)
    return dataclasses.replace(config, micro_batch=micro_batch), share // micro_batch
