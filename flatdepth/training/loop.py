"""The training loop: evaluate, save, stop, step, log.

``train`` is the whole flow: positions -> samples -> batch -> paste stage -> model -> loss -> step.
accelerate owns the process group, device, autocast, gradient scaling, accumulation, clipping, the
saved state and the trackers. The loader and the schedule stay outside it: what they do is a
function of the step.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor

from flatdepth.augment.draw.composite import as_params
from flatdepth.augment.filters import copy_to
from flatdepth.augment.flat_paste import FlatPaste
from flatdepth.augment.photometric import Photometric
from flatdepth.config import LossConfig, TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import (
    Sample,
    to_device,
    training_samples,
    truth_range_m,
    within_reach,
)
from flatdepth.errors import Stopped
from flatdepth.judge.validation import evaluate
from flatdepth.models.card import write_model_card
from flatdepth.models.checkpoint import load_weights, save_weights
from flatdepth.models.lora import add_lora, merged
from flatdepth.models.network import DepthNetwork, freeze
from flatdepth.models.networks import make_network
from flatdepth.models.precision import autocast
from flatdepth.pace import StageClock, mean
from flatdepth.training.ema import Ema
from flatdepth.training.launch import (
    make_accelerator,
    peers_awaited,
    place_gradients,
    placement,
    share_out,
)
from flatdepth.training.losses import depth_loss, own_arguments
from flatdepth.training.memory import expect_room, out_of_memory_advised
from flatdepth.training.optim import make_optimizer
from flatdepth.training.runlog import RunLog
from flatdepth.training.schedule import lr_factor
from flatdepth.training.state import (
    Progress,
    claimed,
    count_step,
    load_checkpoint,
    save_checkpoint,
    update_best,
    writing,
)
from flatdepth.training.stop import StopRequest
from flatdepth.training.teacher import open_teacher
from flatdepth.types import Batch, Region, TrainingBatch


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a training to its end (or to SIGTERM) and return what ``metrics.json`` says.

    Raises:
        UserError: the data, checkpoint or run directory do not fit the configuration.
    """
    run = Path(config.runs) / config.name
    accelerator = make_accelerator(config, run)
    accelerator.print(f"{run}: {placement(accelerator)}", flush=True)
    asked = dataclasses.replace(config, precision=accelerator.mixed_precision)
    config, accumulation = share_out(asked, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = accumulation
    if config.micro_batch != asked.micro_batch:
        accelerator.print(
            f"note: micro-batches of {config.micro_batch} instead of {asked.micro_batch}, so that "
            f"{accelerator.num_processes} devices share a batch of {config.batch} evenly"
        )
    with (
        out_of_memory_advised(config),
        peers_awaited(),
        claimed(run, config, accelerator) as checkpoint,
    ):
        return _train(config, run, accelerator, accumulation, checkpoint)


def _train(
    config: TrainConfig,
    run: Path,
    accelerator: Accelerator,
    accumulation: int,
    resume_from: Path | None,
) -> dict[str, Any]:
    with accelerator.main_process_first():
        corpus = open_corpus(config.data)

    expect_room(config, accelerator.device)
    torch.manual_seed(config.seed)
    model = build_model(config, accelerator)
    teacher = open_teacher(config, model, accelerator)
    optimizer = make_optimizer(model, config.optim, accelerator.device)
    peak_rates = [float(group["lr"]) for group in optimizer.param_groups]
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    place_gradients(wrapped, model.multiple, accelerator)
    ema = Ema(model, config.optim.ema)
    progress = Progress(data=dict(corpus.digests), teacher=teacher.digest if teacher else "")
    if resume_from is not None:
        progress = load_checkpoint(
            accelerator, resume_from, config, ema, progress.data, progress.teacher
        )
        if corpus.streams:
            accelerator.print(
                f"note: the WebDataset streams begin anew at step {progress.step}, in an order "
                "that follows from seed and step; the samples are not those of a run that was not "
                "stopped (data.loader)"
            )
    stream = training_samples(
        corpus,
        config,
        first_step=progress.step,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        accumulation=accumulation,
    )
    log = RunLog(run, config, accelerator, progress)
    clock = StageClock(accelerator.device)
    started = time.perf_counter() - progress.seconds
    wrapped.train()

    with StopRequest(accelerator) as stop:
        while True:
            # evaluate
            done = progress.step == config.steps and not stop.agreed
            due = done or progress.step % config.eval.every == 0
            if due and not stop.agreed and not progress.has_evaluation():
                label = _label(progress.step, config)
                title = f"{config.name}: {label}"
                with suppress(Stopped), ema.applied():
                    with stop.at_once():
                        result = evaluate(
                            model, corpus, config, accelerator, title=title, check=stop.agree
                        )
                    progress.add_evaluation(label, result.table)
                    if update_best(progress, config):
                        _save_weights(
                            run / "weights" / "best", model, accelerator, config, progress
                        )
                    log.evaluation(result.sheet)

            # save
            done = not stop.agreed and (done or 0 < config.eval.patience <= progress.stale)
            progress.seconds = time.perf_counter() - started
            due = done or stop.agreed or progress.step % config.save_every == 0
            if due and progress.step:
                save_checkpoint(accelerator, run, progress, config, ema)

            # stop
            if done or stop.agreed:
                break

            # step
            factor = lr_factor(
                progress.updates,
                steps=config.steps,
                warmup=config.optim.warmup,
                kind=config.optim.schedule,
                power=config.optim.power,
                floor=config.optim.floor,
                cycle=config.optim.cycle,
            )
            for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak * factor
            step_started, waited, cpu_started = time.perf_counter(), 0.0, time.process_time()
            sums = torch.zeros(3, device=accelerator.device)
            keys: list[str] = []
            spent: list[Mapping[str, float]] = []
            for _ in range(accumulation):
                clock.enter("wait")
                wait_started = time.perf_counter()
                with suppress(Stopped), stop.at_once():
                    samples = next(stream)
                if stop.agreed:
                    break
                waited += time.perf_counter() - wait_started
                keys += [sample.frame.key for sample in samples]
                spent += [sample.seconds for sample in samples]
                with accelerator.accumulate(wrapped):
                    batch = make_training_batch(samples, config, accelerator.device, clock.enter)
                    clock.enter("loss")
                    weight = loss_weight(batch, config.loss)
                    seeds = [sample.loss_seed for sample in samples]
                    own = own_arguments(config.loss, batch.depth_m, weight, seeds)
                    with autocast(accelerator):
                        lesson = None
                        if teacher is not None:
                            clock.enter("teacher")
                            lesson = teacher.lesson(batch)
                        clock.enter("forward")
                        prediction = wrapped(batch.image, batch.focal_px, *own)
                    clock.enter("loss")
                    losses = depth_loss(model.kind, prediction, batch.depth_m, weight, config.loss)
                    counts = (weight > 0).flatten(1).any(1)
                    taught = torch.zeros_like(losses)
                    if lesson is not None:
                        taught = lesson.loss(model.kind, prediction)
                        losses = losses + config.loss.teacher * taught
                        counts |= (lesson.weight > 0).flatten(1).any(1)
                    clock.enter("backward")
                    accelerator.backward(losses.mean())
                    clock.enter("loss")
                    parts = (losses.detach().sum(), taught.detach().sum(), counts.sum())
                    sums += torch.stack(parts)
            if stop.agreed:
                continue  # the step is not taken, and comes again when the run goes on
            clock.enter("agree")
            (mean_loss, mean_taught), images, stop.agreed = _agree(sums, stop, accelerator)
            clock.enter("optimiser")
            norm = math.nan
            if math.isfinite(mean_loss):
                _scale_gradients(model, config.batch / images)
                clip = config.optim.clip_norm
                norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), clip))
            taken = math.isfinite(norm)
            # after an overflow in fp16 the gradient scaler steps only to lower its scale, which is
            # no help where the forward pass overflowed: then the loss is not finite
            if taken or (math.isfinite(mean_loss) and accelerator.scaler is not None):
                optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # see place_gradients
            progress.step += 1
            count_step(progress, taken, keys, config)
            if taken:
                ema.update(progress.updates)

            # log
            clock.enter("")
            elsewhere_s = 0.0
            if config.data.processes:
                elsewhere_s = sum(one[name] for one in spent for name in one if name != "read")
            seconds = time.perf_counter() - step_started
            log.step(
                time=clock.seconds(),
                loader=mean(spent),
                samples=len(spent),
                cpu_seconds=time.process_time() - cpu_started + elsewhere_s,
                loss=mean_loss,
                lr=config.optim.lr * factor,
                grad_norm=norm,
                images_per_s=config.batch / seconds,
                data_wait_share=waited / seconds,
                **({"teacher": mean_taught} if teacher else {}),
            )

        stream.close()
        if done:
            with ema.applied():
                _save_weights(run / "weights" / "final", model, accelerator, config, progress)
        metrics = log.close(finished=done)
        if done and accelerator.is_main_process:
            for weights in (run / "weights").glob("*.safetensors"):
                write_model_card(weights, run)
    accelerator.end_training()
    return metrics


def build_model(config: TrainConfig, accelerator: Accelerator) -> DepthNetwork:
    """The model with the weights it starts from, frozen as configured."""
    chosen = config.model
    model = make_network(
        chosen.name,
        chosen.encoder,
        kind=chosen.kind,
        max_depth_m=chosen.max_depth_m,
        canonical_focal_px=chosen.canonical_focal_px,
        checkpointing=chosen.checkpointing,
    )
    model.trained_px = (config.data.height, config.data.width)
    if chosen.checkpoint is not None:
        accelerator.print(load_weights(model, chosen.checkpoint, head=chosen.head))
    model.begin_training(config.loss.is_own)
    freeze(model, chosen.freeze, chosen.frozen_blocks)
    if chosen.lora_rank:
        add_lora(model, rank=chosen.lora_rank, alpha=chosen.lora_alpha)
    return model


@torch.no_grad()
def make_training_batch(
    samples: list[Sample],
    config: TrainConfig,
    device: torch.device,
    enter: Callable[[str], None] = lambda _: None,
) -> TrainingBatch:
    """Samples as the model sees them: on the device, with pastes and changed colours.

    And as a teacher sees them, if there is one. ``enter`` is told copy, paste and photometric as
    they begin.
    """
    enter("copy")
    depth_range_m = truth_range_m(config)
    batch, plans, factors = to_device(samples, device, depth_range_m=depth_range_m)
    enter("paste")
    paste = FlatPaste(config.paste, depth_range_m=depth_range_m, p=1.0)
    pasted = paste(batch.image, batch.depth_m, batch.K_px, batch.valid, params=as_params(plans))
    enter("photometric")
    drawn = {"factors": factors, "batch_prob": torch.ones(len(samples))}
    image = Photometric(config.photometric, p=1.0)(pasted.image, params=drawn)
    region = torch.where(pasted.region > 0, pasted.region, batch.region)
    whole = TrainingBatch(
        **pasted._replace(image=image, region=region)._asdict(),
        K_px=batch.K_px,
        sample=batch.sample,
        photograph=batch.image if config.loss.teacher else None,
    )
    return within_reach(whole, config.model)


def loss_weight(batch: Batch, config: LossConfig) -> Float[Tensor, "b 1 h w"]:
    """Weight of every pixel: its region's where the truth is valid, else 0."""
    weights = [getattr(config, region.name.lower()) for region in Region]
    per_region = copy_to(torch.tensor(weights), batch.image)
    return per_region[batch.region.long()] * batch.valid


def _agree(
    sums: Tensor, stop: StopRequest, accelerator: Accelerator
) -> tuple[tuple[float, float], int, bool]:
    """(mean loss and a teacher's part of it without its factor, both over a step's images that have
    truth or a lesson; how many these are; whether a rank was stopped).

    Over all ranks. The means are NaN if there is no such image, and not finite if a loss is not.
    """
    mine = torch.cat((sums, sums.new_tensor([float(stop.received)])))
    total, taught, images, stops = accelerator.reduce(mine, "sum").tolist()
    if not images:
        return (math.nan, math.nan), 0, stops > 0
    return (total / images, taught / images), int(images), stops > 0


def _scale_gradients(model: DepthNetwork, factor: float) -> None:
    """From the mean over all images of the step, as accumulated, to that over those that count."""
    if factor != 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor


def _label(step: int, config: TrainConfig) -> str:
    if step == 0:
        return "start"
    if step == config.steps:
        return "end"
    return f"step {step}"


def _save_weights(
    stem: Path,
    model: DepthNetwork,
    accelerator: Accelerator,
    config: TrainConfig,
    progress: Progress,
) -> None:
    """Save the model in the official layout; collective, because FSDP must gather it."""
    if accelerator.distributed_type == DistributedType.FSDP:
        state = accelerator.get_state_dict(model)
        with torch.device("meta"):
            model = model.like()
        if accelerator.is_main_process:
            model.load_state_dict(state, assign=True)
    if accelerator.is_main_process:
        extra = {"run": config.name, "step": str(progress.step)}
        with writing(Path(config.runs) / config.name):
            save_weights(merged(model), stem, extra=extra, overwrite=True)
