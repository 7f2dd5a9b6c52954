"""Images per second, MFU and the stages of an optimiser step; and the kernels it is made of."""

from collections.abc import Iterator

import torch

from flatdepth.bench.gpu.rows import Row, at_least, at_most, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.step import WARM_UP, measure_steps, prepared, training_batches
from flatdepth.bench.timing import profiled, wait
from flatdepth.config import TrainConfig
from flatdepth.training.memory import build_bare_model, take_step
from flatdepth.training.optim import make_optimizer

MFU_PERCENT = 40.0
STAGE_PERCENT = 1.0
KERNELS = 15


def step_config(settings: Settings, encoder: str, micro_batch: int, precision: str) -> TrainConfig:
    """Sixteen images of 518 x 518 per step; ViT-L one by one as on 8 GB, else no checkpointing."""
    if settings.dry:
        micro_batch = min(micro_batch, 4)
    return settings.config(
        f"{encoder}_{'8gb' if encoder == 'vitl' else 'indoor'}",
        batch=max(2, micro_batch) if settings.dry else 16,
        micro_batch=micro_batch,
        precision=precision,
        model__checkpointing="encoder" if micro_batch == 1 else "none",
    )


def step(
    encoder: str,
    micro_batch: int,
    precision: str,
    settings: Settings,
    *,
    compiled: bool = False,
    goal: bool = False,
) -> Iterator[Row]:
    """Time optimiser steps, loader included.

    Args:
        compiled: with ``torch.compile`` of the blocks and the head.
        goal: whether ``MFU_PERCENT`` is expected.
    """
    config = step_config(settings, encoder, micro_batch, precision)
    backend = None if not compiled else "aot_eager" if settings.dry else "inductor"
    times = measure_steps(
        config,
        steps=1 if settings.dry else 8,
        device=settings.device,
        compile_with=backend,
    )
    busy = 1 - times.data_wait_share
    yield figure("images/s", times.images_per_s)
    yield figure("images/s without waiting", times.images_per_s / busy)
    mfu = None if times.mfu is None else 100 * times.mfu
    peak = f"of {times.peak_tflops:g} TFLOP/s" if times.peak_tflops else "unknown device"
    yield at_least("MFU", mfu, MFU_PERCENT, "%", peak) if goal else figure("MFU", mfu, "%", peak)
    if mfu is not None:
        yield figure("MFU without waiting", mfu / busy, "%")
    share = sum(times.stages[name][1] for name in ("paste", "photometric"))
    percent = 100 * share / (times.step_ms[1] * busy)
    if encoder == "vitl" and not compiled:
        yield at_most("paste + photometric", percent, STAGE_PERCENT, "%", "of a step's work")
    else:
        yield figure("paste + photometric", percent, "%", "of a step's work")
    stages = ", ".join(f"{name} {middle:.2f}" for name, (_, middle, _) in times.stages.items())
    yield figure("step", times.step_ms[1], "ms", stages)


def kernels(settings: Settings) -> Iterator[Row]:
    """Where the time of ViT-L at 4 in fp16 goes: the kernels that take most."""
    device = settings.device
    config, accumulation = prepared(step_config(settings, "vitl", 4, "fp16"), device)
    with device:
        model = build_bare_model(config)
    optimizer = make_optimizer(model, config.optim, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    with training_batches(config, device) as next_batch:

        def one_step() -> None:
            take_step(
                model,
                optimizer,
                config,
                next_batch,
                micro_steps=accumulation,
                enter=lambda _: None,
                scaler=scaler,
            )

        for _ in range(WARM_UP):
            one_step()
        wait(device)
        found = profiled(one_step, device)
    total = sum(kernel.ms for kernel in found)
    yield figure("all kernels", total, "ms", f"{sum(kernel.calls for kernel in found)} calls")
    for kernel in found[:KERNELS]:
        name = " ".join(kernel.name.split())[:80]
        yield figure(name, kernel.ms, "ms", f"{kernel.ms / total:.1%}, {kernel.calls} calls")
