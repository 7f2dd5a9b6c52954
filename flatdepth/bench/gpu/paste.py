"""The paste stage alone: its time against the bytes it must move, its kernels, no waiting."""

import time
from collections.abc import Iterator

import torch

from flatdepth.bench.gpu.rows import Row, at_most, figure
from flatdepth.bench.gpu.settings import Settings
from flatdepth.bench.paste import paste_contenders
from flatdepth.bench.step import first_samples, prepared
from flatdepth.bench.timing import compare, profiled, wait
from flatdepth.training.loop import make_training_batch

FLOOR = 3.0
BYTES_PER_PIXEL = 2 * (3 * 4 + 4 + 1 + 1)
"""Image, depth, valid and region, read once and written once; the pictures are not counted."""

COPIED_BYTES = 2**28
CONTENDERS = ("grid_sample", "paste", "paste + photometric", "kornia", "kornia + ColorJitter")


def paste(settings: Settings) -> Iterator[Row]:
    """One picture per image at 518 x 518, for batches of 1, 4 and 16."""
    device = settings.device
    size, rounds, sizes = (56, 2, (1, 2, 4)) if settings.dry else (518, 30, (1, 4, 16))
    rate = _copy_rate(device, COPIED_BYTES // (64 if settings.dry else 1))
    yield figure("copying on the device", rate / 1e9, "GB/s", "read + written")
    for batch in sizes:
        contenders = paste_contenders(batch, size, (0.03, 0.3), device)
        chosen = {name: contenders[name] for name in CONTENDERS}
        timings = compare(chosen, baseline="kornia", rounds=rounds, device=device)
        ms = {timing.name: timing.ms[1] for timing in timings}
        ratio = {timing.name: timing.ratio[1] for timing in timings}
        floor_ms = 1e3 * batch * size * size * BYTES_PER_PIXEL / rate
        kernels = profiled(contenders["paste"], device)
        count, kernel_ms = sum(k.calls for k in kernels), sum(k.ms for k in kernels)
        for name in CONTENDERS:
            yield figure(f"{name}, {batch}", ms[name], "ms", f"{ratio[name]:.2f} x plain Kornia")
        yield figure(f"kernels, {batch}", count, "", f"{kernel_ms:.3f} ms on the device")
        name, note = f"paste to its bytes, {batch}", f"these take {floor_ms:.4f} ms"
        times = ms["paste"] / floor_ms
        yield (
            at_most(name, times, FLOOR, "x", note)
            if batch == sizes[-1]
            else figure(name, times, "x", note)
        )
        yield figure(f"its kernels to its bytes, {batch}", kernel_ms / floor_ms, "x")


def no_waiting(settings: Settings) -> Iterator[Row]:
    """The stage on samples of a training, with every wait of the host for the device an error."""
    device = settings.device
    config, _ = prepared(settings.config("vits_indoor", batch=16, micro_batch=16), device)
    waits = 0
    for number, samples in enumerate(first_samples(config, 4)):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            make_training_batch(samples, config, device)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            waits += 1
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    yield at_most("batches with a wait for the device", waits, 0, note="of 3")


def _copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes, the best of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        wait(device)
        begin = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size / min(seconds)
