"""The list of ``flatdepth benchmark gpu``, the most important first."""

from functools import partial

from flatdepth.bench.gpu.equality import batches, gradients, precision
from flatdepth.bench.gpu.loader import loader
from flatdepth.bench.gpu.machine import machine
from flatdepth.bench.gpu.memory import memory
from flatdepth.bench.gpu.paste import no_waiting, paste
from flatdepth.bench.gpu.resume import overflow, resume
from flatdepth.bench.gpu.runner import Part
from flatdepth.bench.gpu.step import kernels, step
from flatdepth.bench.gpu.training import training


def _memory(
    name: str, seconds: float, *, gpu_gib: float | None = None, goal_gib: float | None = None
) -> Part:
    run = partial(memory, name, gpu_gib=gpu_gib, goal_gib=goal_gib)
    return Part(name=f"memory {name}", run=run, seconds=seconds)


def _step(encoder: str, micro_batch: int, kind: str, *, compiled: bool = False) -> Part:
    goal = (encoder, micro_batch, compiled) == ("vitl", 4, False)
    return Part(
        name=f"step {encoder} x {micro_batch} {kind}{' compiled' if compiled else ''}",
        run=partial(step, encoder, micro_batch, kind, compiled=compiled, goal=goal),
        seconds=45 if compiled else 15,
    )


PARTS = (
    Part(name="machine", run=machine, seconds=1),
    _memory("vitl_8gb", 20, gpu_gib=8, goal_gib=6.0),
    _memory("vitl_4gb", 20, gpu_gib=4, goal_gib=4.0),
    Part(name="batches", run=batches, seconds=10, on_gpu=False),
    Part(name="gradients", run=gradients, seconds=10, on_gpu=False),
    _step("vitl", 4, "fp16"),
    _step("vitl", 1, "fp16"),
    Part(name="paste", run=paste, seconds=20),
    Part(name="no waiting", run=no_waiting, seconds=8),
    Part(name="resume", run=resume, seconds=40, on_gpu=False),
    Part(name="overflow", run=overflow, seconds=12, on_gpu=False),
    _step("vits", 16, "fp16"),
    Part(name="loader", run=loader, seconds=24),
    Part(name="kernels", run=kernels, seconds=15),
    Part(name="precision", run=precision, seconds=12),
    _memory("vits_indoor", 8),
    _memory("vitb_indoor", 8),
    _memory("vitl_lora", 15),
    _step("vitl", 4, "bf16"),
    _step("vitl", 4, "fp16", compiled=True),
    _step("vitl", 1, "bf16"),
    _step("vits", 16, "bf16"),
    _step("vits", 16, "fp16", compiled=True),
    Part(name="training", run=training, seconds=60),
    _step("vitl", 4, "bf16", compiled=True),
)
