"""Memory of a configuration's training, beside what the simulation says of it."""

from collections.abc import Iterator

from flatdepth.bench.gpu.rows import Row, at_most, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.step import prepared, training_batches
from flatdepth.training.memory import CONTEXT_BYTES, GIB, measure, simulate, train_shortly

SIMULATION_PERCENT = 3.0


def memory(
    name: str, settings: Settings, *, gpu_gib: float | None = None, goal_gib: float | None = None
) -> Iterator[Row]:
    """Two optimiser steps and a validation batch on real samples.

    Args:
        name: of the configuration.
        gpu_gib: size of the GPU that it is for; the allocator is held to that less a context.
        goal_gib: most that may be allocated.
    """
    config = settings.config(name)
    simulated = simulate(config).peak.total
    yield figure("simulated", simulated / GIB, "GiB")
    device = settings.device
    trained, _ = prepared(config, device)
    with training_batches(trained, device) as next_batch:
        if device.type != "cuda":
            train_shortly(trained, device, next_batch)
            yield at_most("allocated to simulated", None, SIMULATION_PERCENT, "%", "needs a GPU")
            return
        cap = None if gpu_gib is None else int(gpu_gib * GIB) - CONTEXT_BYTES
        found = measure(trained, cap, next_batch)
    note = "" if cap is None else f"allocator held to {cap / GIB:g} GiB"
    if goal_gib is None:
        yield figure("allocated", found.allocated / GIB, "GiB", note)
    else:
        yield at_most("allocated", found.allocated / GIB, goal_gib, "GiB", note)
    yield figure("reserved", found.reserved / GIB, "GiB")
    yield figure("device", found.device / GIB, "GiB", "with the CUDA context and other processes")
    apart = 100 * (found.allocated / simulated - 1)
    yield at_most("allocated to simulated", abs(apart), SIMULATION_PERCENT, "%", f"{apart:+.2f} %")
