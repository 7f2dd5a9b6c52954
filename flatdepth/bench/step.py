"""Where the time of an optimiser step goes, how many images that makes per second, and the MFU."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flatdepth.bench.timing import environment, wait
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, training_samples
from flatdepth.pace import StageClock
from flatdepth.training.ema import Ema
from flatdepth.training.launch import share_out
from flatdepth.training.loop import loss_weight, make_training_batch
from flatdepth.training.memory import (
    NextBatch,
    build_bare_model,
    build_bare_teacher,
    count_flops,
    take_step,
)
from flatdepth.training.optim import make_optimizer

WARM_UP = 2

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "T4": 65.0,
}
"""Dense fp16 tensor-core TFLOP/s with float32 accumulation, from NVIDIA's data sheets."""


def known_peak_tflops(device: str) -> float | None:
    """The entry of ``PEAK_TFLOPS`` for a device's name; None for one that only resembles it."""
    for key, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b(?! (Ti|SUPER|D|Laptop)\b)", device):
            return peak
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Optimiser steps of one GPU or CPU.

    Attributes:
        stages: milliseconds per optimiser step by stage, as (25 %, median, 75 %).
        step_ms: the same of whole steps.
        images_per_s: at the median.
        data_wait_share: share of the median step spent waiting for the loader.
        tflop_per_image: forward and backward without recomputation, and a teacher's forward.
        mfu: model FLOPs utilisation, the share of ``peak_tflops`` that these are; None without.
        peak_tflops: of the device, or None if unknown.
        environment: what the figures depend on.
    """

    stages: Mapping[str, tuple[float, float, float]]
    step_ms: tuple[float, float, float]
    images_per_s: float
    data_wait_share: float
    tflop_per_image: float
    mfu: float | None
    peak_tflops: float | None
    environment: Mapping[str, object]


def measure_steps(
    config: TrainConfig,
    *,
    steps: int,
    device: torch.device,
    peak_tflops: float | None = None,
    compile_with: str | None = None,
) -> StepTimes:
    """Time optimiser steps on the configured data, with random weights.

    Args:
        steps: timed, after ``WARM_UP`` others.
        peak_tflops: of the device; None looks it up in ``PEAK_TFLOPS``.
        compile_with: backend of ``torch.compile`` for each transformer block and the head; None
            compiles nothing.

    Raises:
        UserError: the data do not fit the configuration.
    """
    config, accumulation = prepared(config, device)
    with device:
        model = build_bare_model(config)
        teacher = build_bare_teacher(config, model)
    if compile_with is not None:
        heads = [part for name, part in model.named_children() if not model.is_encoder(f"{name}.")]
        for module in (*model.blocks, *heads):
            module.compile(backend=compile_with, dynamic=False)
    optimizer = make_optimizer(model, config.optim, device)
    ema = Ema(model, config.optim.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    clock = StageClock(device)
    timed = []
    with training_batches(config, device, clock.enter) as next_batch:
        for number in tqdm(range(WARM_UP + steps), desc="steps", disable=None, leave=False):
            take_step(
                model,
                optimizer,
                config,
                next_batch,
                micro_steps=accumulation,
                enter=clock.enter,
                scaler=scaler,
                teacher=teacher,
            )
            ema.update(number + 1)
            clock.enter("")
            wait(device)
            timed.append(clock.seconds())
    return _summary(config, timed[WARM_UP:], device, peak_tflops)


def prepared(config: TrainConfig, device: torch.device) -> tuple[TrainConfig, int]:
    """A configuration as one device trains it, and its micro-batches per step."""
    if device.type == "cpu" and config.precision == "fp16":
        config = dataclasses.replace(config, precision="no")
    return share_out(config, ranks=1)


@contextmanager
def training_batches(
    config: TrainConfig, device: torch.device, enter: Callable[[str], None] = lambda _: None
) -> Iterator[NextBatch]:
    """Micro-batches of a training on one device, made as ``flatdepth.training.loop`` makes them.

    Args:
        config: as ``prepared`` gives it.
        enter: told wait, copy, paste, photometric and loss as they begin.
    """
    stream = _stream(config)

    def next_batch() -> tuple[Tensor, Tensor, Tensor]:
        enter("wait")
        batch = make_training_batch(next(stream), config, device, enter)
        enter("loss")
        return batch.image, batch.depth_m, loss_weight(batch, config.loss)

    with closing(stream):
        yield next_batch


def first_samples(config: TrainConfig, count: int) -> list[list[Sample]]:
    """The samples of a training's first ``count`` micro-batches on one device."""
    with closing(_stream(config)) as stream:
        return list(itertools.islice(stream, count))


def _stream(config: TrainConfig) -> Generator[list[Sample], None, None]:
    accumulation = config.batch // config.micro_batch
    return training_samples(
        open_corpus(config.data), config, first_step=0, rank=0, ranks=1, accumulation=accumulation
    )


def _summary(
    config: TrainConfig,
    timed: list[dict[str, float]],
    device: torch.device,
    peak_tflops: float | None,
) -> StepTimes:
    facts = environment(device)
    if peak_tflops is None:
        peak_tflops = known_peak_tflops(str(facts["device"]))
    stages = {name: _quartiles_ms([step[name] for step in timed]) for name in timed[0]}
    step_ms = _quartiles_ms([sum(step.values()) for step in timed])
    images_per_s = 1e3 * config.batch / step_ms[1]
    plain = dataclasses.replace(config.model, checkpointing="none")
    tflop = count_flops(dataclasses.replace(config, model=plain)) / 1e12
    return StepTimes(
        stages=stages,
        step_ms=step_ms,
        images_per_s=images_per_s,
        data_wait_share=stages["wait"][1] / step_ms[1],
        tflop_per_image=tflop,
        mfu=None if peak_tflops is None else tflop * images_per_s / peak_tflops,
        peak_tflops=peak_tflops,
        environment=facts,
    )


def _quartiles_ms(seconds: list[float]) -> tuple[float, float, float]:
    low, middle, high = (1e3 * np.percentile(seconds, (25, 50, 75))).tolist()
    return low, middle, high


def step_text(config: TrainConfig, times: StepTimes) -> str:
    """The times as a table: milliseconds with quartiles, share of the step."""
    lines = [
        f"{config.model.encoder}, {config.data.height} x {config.data.width}, batch "
        f"{config.batch} in micro-batches of {config.micro_batch}, "
        f"checkpointing {config.model.checkpointing}, {times.environment['device']}",
        f"{'':12} {'ms':>9}  {'quartiles':>19}  {'share':>6}",
    ]
    for name, (low, middle, high) in (*times.stages.items(), ("step", times.step_ms)):
        share = middle / times.step_ms[1]
        lines.append(f"{name:12} {middle:9.2f}  {low:9.2f}-{high:9.2f}  {share:6.1%}")
    rate = f"{times.images_per_s:.2f} images/s, {times.tflop_per_image:.3f} TFLOP per image"
    if times.mfu is None:
        lines.append(f"{rate}; MFU: unknown device, name its peak with --peak_tflops")
    else:
        lines.append(f"{rate}; MFU {times.mfu:.1%} of {times.peak_tflops:g} TFLOP/s")
    return "\n".join(lines)
