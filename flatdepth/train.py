"""The training loop: evaluate, save, stop, step, log.

``train`` is the whole flow: positions -> samples -> batch -> paste stage -> model -> loss -> step.
accelerate owns the process group, device, autocast, gradient scaling, accumulation, clipping, the
saved state and the trackers. The loader and the schedule stay outside it: what they do is a
function of the step.
"""

import dataclasses
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from jaxtyping import Float
from torch import Tensor

from flatdepth.augment.composite import paste
from flatdepth.augment.photometric import photometric
from flatdepth.config import LossConfig, TrainConfig
from flatdepth.corpus import open_corpus
from flatdepth.errors import UserError
from flatdepth.evaluate import evaluate
from flatdepth.loader import Sample, to_device, training_samples
from flatdepth.losses import depth_loss
from flatdepth.metrics import BETTER
from flatdepth.models.checkpoint import load_weights, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2, freeze, parameter_groups
from flatdepth.runlog import RunLog
from flatdepth.schedule import lr_factor
from flatdepth.state import (
    Progress,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from flatdepth.types import Batch, Region


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a training to its end (or to SIGTERM) and return what ``metrics.json`` says.

    Raises:
        UserError: the data, checkpoint or run directory do not fit the configuration.
    """
    run = Path(config.runs) / config.name
    accelerator = make_accelerator(config, run)
    accumulation = accumulation_steps(config, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = accumulation
    resume_from = _claim_run(run, config)
    with accelerator.main_process_first():
        corpus = open_corpus(config.data)

    torch.manual_seed(config.seed)
    model = build_model(config, accelerator)
    groups = parameter_groups(
        model, config.optim.lr, config.optim.head_lr_factor, config.optim.weight_decay
    )
    peak_rates: list[Any] = [group["lr"] for group in groups]
    on_cuda = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, fused=on_cuda or None)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    if resume_from is not None:
        progress = load_checkpoint(accelerator, resume_from, config)
    log = RunLog(run, config, accelerator, progress)
    stream = training_samples(
        corpus,
        config,
        first_step=progress.step,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        accumulation=accumulation,
    )
    started = time.perf_counter() - progress.seconds
    wrapped.train()

    with StopRequest() as stop:
        while True:
            # evaluate
            done = progress.step == config.steps
            due = done or progress.step % config.eval.every == 0
            if due and not stop.agreed and not log.has_evaluated(progress.step):
                label = _label(progress.step, config)
                title = f"{config.name}: {label}"
                result = evaluate(model, corpus, config, accelerator, title=title)
                log.evaluation(label, result.table, result.sheet)
                if _is_best(progress, config) and accelerator.is_main_process:
                    _save_weights(model, run / "weights" / "best", config, progress.step)

            # save
            done |= 0 < config.eval.patience <= progress.stale
            progress.seconds = time.perf_counter() - started
            if done or stop.agreed or (progress.step and progress.step % config.save_every == 0):
                save_checkpoint(accelerator, run, progress, config)

            # stop
            if done or stop.agreed:
                break

            # step
            factor = lr_factor(
                progress.step,
                steps=config.steps,
                warmup=config.optim.warmup,
                kind=config.optim.schedule,
            )
            for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak * factor
            step_started, waited = time.perf_counter(), 0.0
            loss_sum = torch.zeros((), device=accelerator.device)
            keys: list[str] = []
            for _ in range(accumulation):
                wait_started = time.perf_counter()
                samples = next(stream)
                waited += time.perf_counter() - wait_started
                keys += [sample.frame.key for sample in samples]
                with accelerator.accumulate(wrapped):
                    batch = make_training_batch(samples, config, accelerator.device)
                    with accelerator.autocast():
                        prediction = wrapped(batch.image)
                    weight = loss_weight(batch, config.loss)
                    loss = depth_loss(model.kind, prediction, batch.depth_m, weight).mean()
                    accelerator.backward(loss)
                    loss_sum += loss.detach()
            mean_loss, stop.agreed = _agree(loss_sum / accumulation, stop, accelerator)
            norm = math.nan
            if math.isfinite(mean_loss):
                clip = config.optim.clip_norm
                norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), clip))
            # an overflow of scaled fp16 gradients is the scaler's to handle
            taken = math.isfinite(mean_loss) and (
                math.isfinite(norm) or accelerator.scaler is not None
            )
            if taken:
                optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            _count_bad_steps(progress, taken, keys, config)

            # log
            seconds = time.perf_counter() - step_started
            log.step(
                loss=mean_loss,
                lr=config.optim.lr * factor,
                grad_norm=norm,
                images_per_s=config.batch / seconds,
                data_wait_share=waited / seconds,
            )

    stream.close()
    if done and accelerator.is_main_process:
        _save_weights(model, run / "weights" / "final", config, progress.step)
    metrics = log.close(finished=done)
    accelerator.end_training()
    return metrics


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The accelerator of a run; on a CPU fp16 becomes full precision, with a word about it.

    Raises:
        UserError: the launcher started processes that accelerate does not join into one run.
    """
    on_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    precision = config.precision
    if precision == "fp16" and on_cpu:
        print("note: fp16 needs a GPU; this run uses full precision", file=sys.stderr)
        precision = "no"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(str(run), logging_dir=str(run / "tracker")),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but accelerate sees "
            f"{accelerator.num_processes}; launch with torchrun or a matching accelerate config"
        )
    return accelerator


def accumulation_steps(config: TrainConfig, ranks: int) -> int:
    """Micro-batches per optimiser step on each of ``ranks`` devices.

    Raises:
        UserError: ``batch`` is not a multiple of ``micro_batch`` times the number of devices.
    """
    share = config.micro_batch * ranks
    if config.batch % share:
        raise UserError(
            f"batch: expected a multiple of micro_batch x devices = {config.micro_batch} x {ranks} "
            f"= {share}, got {config.batch}; the next one is {-(-config.batch // share) * share}"
        )
    return config.batch // share


def build_model(config: TrainConfig, accelerator: Accelerator) -> DepthAnythingV2:
    """The model with the weights it starts from, frozen as configured."""
    chosen = config.model
    model = DepthAnythingV2(
        chosen.encoder,
        kind=chosen.kind,
        max_depth_m=chosen.max_depth_m,
        checkpointing=chosen.checkpointing,
    )
    if chosen.checkpoint is not None:
        accelerator.print(load_weights(model, chosen.checkpoint, head=chosen.head))
    freeze(model, chosen.freeze, chosen.frozen_blocks)
    return model


@torch.no_grad()
def make_training_batch(samples: list[Sample], config: TrainConfig, device: torch.device) -> Batch:
    """Samples as the model sees them: on the device, with pastes and changed colours."""
    depth_range_m = (config.data.min_depth_m, config.model.max_depth_m)
    batch, plans, factors = to_device(samples, device, depth_range_m=depth_range_m)
    batch = paste(batch, plans, depth_range_m=depth_range_m)
    return dataclasses.replace(batch, image=photometric(batch.image, factors))


def loss_weight(batch: Batch, config: LossConfig) -> Float[Tensor, "b 1 h w"]:
    """Weight of every pixel: its region's where the truth is valid, else 0."""
    weights = [getattr(config, region.name.lower()) for region in Region]
    per_region = torch.tensor(weights, device=batch.region.device)
    return per_region[batch.region.long()] * batch.valid


class StopRequest:
    """Remembers SIGTERM and SIGINT until the end of the step, when all ranks agree on it.

    A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received = False
        self.agreed = False

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


def _agree(loss: Tensor, stop: StopRequest, accelerator: Accelerator) -> tuple[float, bool]:
    """The mean loss over ranks (not finite if it is so on any) and whether any rank was stopped."""
    mine = torch.stack([loss, torch.full_like(loss, float(stop.received))])
    total, stops = accelerator.reduce(mine, "sum").tolist()
    return total / accelerator.num_processes, stops > 0


def _claim_run(run: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a new run."""
    if config.resume == "never" and run.exists():
        raise UserError(
            f"{run} already exists and resume is 'never'; choose another --name, or delete it"
        )
    return newest_checkpoint(run)


def _label(step: int, config: TrainConfig) -> str:
    if step == 0:
        return "start"
    if step == config.steps:
        return "end"
    if step == config.paste.start_step:
        return "before pastes"
    return f"step {step}"


def _is_best(progress: Progress, config: TrainConfig) -> bool:
    """Whether the newest evaluation is the best so far; updates ``best`` and ``stale``."""
    region, _, metric = config.eval.metric.partition(".")
    tables = [entry["table"] for entry in progress.evaluations]
    newest = tables[-1]
    value = newest.get(region, {}).get(metric)
    if value is None:
        return False
    sign = 1 if BETTER[metric] == "lower" else -1
    better = progress.best is None or sign * value < sign * progress.best["value"]
    if config.model.checkpoint is not None and "clean" in newest and "clean" in tables[0]:
        limit = tables[0]["clean"]["abs_rel"] * (1 + config.eval.clean_guard)
        better &= newest["clean"]["abs_rel"] <= limit
    progress.stale = 0 if better else progress.stale + 1
    if better:
        progress.best = {"value": value, "step": progress.step}
    return better


def _count_bad_steps(progress: Progress, taken: bool, keys: list[str], config: TrainConfig) -> None:
    progress.bad_steps = 0 if taken else progress.bad_steps + 1
    progress.skipped_steps += not taken
    if progress.bad_steps >= config.max_bad_steps:
        raise UserError(
            f"{progress.bad_steps} optimiser steps in a row had a loss or gradient that is not "
            f"finite (max_bad_steps); the last one's samples were {', '.join(keys)}; lower "
            "optim.lr, or look at these frames with tools/pack.py verify"
        )


def _save_weights(model: DepthAnythingV2, stem: Path, config: TrainConfig, step: int) -> None:
    extra = {"run": config.name, "step": str(step)}
    save_weights(model, stem, extra=extra, overwrite=True)
