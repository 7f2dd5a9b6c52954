"""What must not depend on the device, on checkpointing, on micro-batches or on precision."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flatdepth.augment.draw.composite import PasteGroup, stack_plans
from flatdepth.bench.gpu.rows import Row, at_most, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.step import first_samples, prepared, training_batches
from flatdepth.data.loader import Sample
from flatdepth.models.network import Checkpointing, nominal_focal
from flatdepth.training.loop import make_training_batch
from flatdepth.training.losses import depth_loss
from flatdepth.training.memory import build_bare_model, take_step
from flatdepth.training.optim import make_optimizer

PIXELS = 1e-4
DEPTH = 1e-6
GRADIENTS = 1e-5
HALF_PERCENT = 1.0
STEPS = 20

CPU = torch.device("cpu")


def batches(settings: Settings) -> Iterator[Row]:
    """Batches of the same seed on the CPU and on the device."""
    config = settings.config("vits_indoor", batch=8, micro_batch=8)
    differing, pixels, depth = 0, 0.0, 0.0
    masks = {"region": 0, "valid": 0}
    for samples, again in zip(first_samples(config, 2), first_samples(config, 2), strict=True):
        there = [group.to(settings.device).to(CPU) for group in _parameters(samples)]
        pairs = zip(_tensors(there), _tensors(_parameters(again)), strict=True)
        differing += sum(not torch.equal(one, other) for one, other in pairs)
        expected = make_training_batch(samples, config, CPU)
        found = make_training_batch(samples, config, settings.device)
        pixels = max(pixels, (found.image.cpu() - expected.image).abs().max().item())
        for name in masks:
            unequal = getattr(found, name).cpu() != getattr(expected, name)
            masks[name] += int(unequal.sum())
        same = expected.valid & found.valid.cpu() & (expected.region == found.region.cpu())
        relative = (found.depth_m.cpu() / expected.depth_m - 1).abs()
        depth = max(depth, relative[same].max().item())
    yield at_most("parameters that differ", differing, 0, "tensors")
    yield at_most("pixels", pixels, PIXELS, note="largest difference, of 0 to 1")
    yield at_most("depth", depth, DEPTH, note="largest relative difference")
    for name, count in masks.items():
        yield at_most(f"{name} that differs", count, 0, "pixels")


def gradients(settings: Settings) -> Iterator[Row]:
    """Gradients of one step in float32 with and without checkpointing, and of 4 x 1 and 1 x 4."""
    _full_float32()
    plain = _gradient(settings, checkpointing="none", micro_batch=4)
    for name, gradient in (
        ("the same again", _gradient(settings, checkpointing="none", micro_batch=4)),
        ("checkpointing encoder", _gradient(settings, checkpointing="encoder", micro_batch=4)),
        ("encoder + head", _gradient(settings, checkpointing="encoder+head", micro_batch=4)),
        ("4 x 1 to 1 x 4", _gradient(settings, checkpointing="none", micro_batch=1)),
    ):
        apart = ((gradient - plain).norm() / plain.norm()).item()
        yield at_most(name, apart, GRADIENTS, note="norm of the difference to the gradient's")


def precision(settings: Settings) -> Iterator[Row]:
    """The loss over ``STEPS`` steps in fp16 (bf16 on a CPU) and in float32, on the same samples."""
    _full_float32()
    half = "bf16" if settings.dry else "fp16"
    expected, found = (np.array(_losses(settings, kind)) for kind in ("no", half))
    apart = 100 * np.abs(found / expected - 1)
    note = f"mean over {STEPS} steps; float32 goes from {expected[0]:.4f} to {expected[-1]:.4f}"
    yield at_most(f"loss in {half} to float32", float(apart.mean()), HALF_PERCENT, "%", note)
    yield figure("the furthest step", float(apart.max()), "%")


def _full_float32() -> None:
    """Nothing in TF32, which cuDNN takes by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _parameters(samples: Sequence[Sample]) -> tuple[PasteGroup, ...]:
    """The plans of a batch as tensors, all images at once as on a GPU."""
    view = samples[0].view
    return stack_plans(
        [sample.plan for sample in samples],
        [sample.contents for sample in samples],
        np.stack([sample.view.intrinsics(sample.frame.K_px) for sample in samples]),
        height=view.height,
        width=view.width,
        together=len(samples),
    )


def _tensors(groups: Sequence[PasteGroup]) -> list[Tensor]:
    """All tensors of paste groups."""

    def of(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return [of(getattr(value, entry.name)) for entry in dataclasses.fields(value)]
        return [of(item) for item in value] if isinstance(value, tuple) else value

    leaves = tree_leaves([of(group) for group in groups])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _gradient(settings: Settings, *, checkpointing: Checkpointing, micro_batch: int) -> Tensor:
    """Gradient of the first step of ViT-S in float32, all parameters in one vector."""
    device = settings.device
    config = settings.config(
        "vits_indoor",
        batch=4,
        micro_batch=micro_batch,
        precision="no",
        model__checkpointing=checkpointing,
    )
    torch.manual_seed(0)
    model = build_bare_model(config).to(device)
    micro_steps = config.batch // micro_batch
    with training_batches(config, device) as next_batch:
        for _ in range(micro_steps):
            image, truth_m, weight = next_batch()
            losses = depth_loss(
                model.kind, model(image, nominal_focal(image)), truth_m, weight, config.loss
            )
            (losses.mean() / micro_steps).backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts).double()


def _losses(settings: Settings, kind: str) -> list[float]:
    """Mean loss of each of the first steps of ViT-S."""
    device = settings.device
    config = settings.config(
        "vits_indoor",
        batch=4,
        micro_batch=4,
        precision=kind,
        data__height=252,
        data__width=252,
        optim__warmup=1,
        optim__lr=1e-4,
    )
    config, micro_steps = prepared(config, device)
    torch.manual_seed(0)
    model = build_bare_model(config).to(device)
    optimizer = make_optimizer(model, config.optim, device)
    # at a small scale no step is skipped, so both train on the same samples
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=kind == "fp16")
    found: list[float] = []
    with training_batches(config, device) as next_batch:
        for _ in range(STEPS):
            loss = take_step(
                model,
                optimizer,
                config,
                next_batch,
                micro_steps=micro_steps,
                enter=lambda _: None,
                scaler=scaler,
            )
            found.append(loss.item())
    return found
