"""Packing on engines: frames of a camera's size, packed by one process, by a pool, and by Ray."""

import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flatdepth.bench.timing import Timing, compare
from flatdepth.cli import cpus
from flatdepth.data.engine import running_ray
from flatdepth.data.parts import pack_parts
from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.shards.codec import decode_frame

HEIGHT, WIDTH = 768, 1024


def measure_packing(frames: int, parts: int, rounds: int) -> tuple[list[Timing], float, int]:
    """Pack the same frames in the same parts by each engine in turn.

    Returns:
        The timings; seconds that Ray took to start, which are not in them, while starting the pool
        is; bytes of the frames in the set.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(running_ray(None, cpus()))
        ray_s = time.monotonic() - started
        raw = stack.enter_context(made_up_frames(frames))
        reader = FolderReader(
            str(raw),
            image_glob="*.jpg",
            depth_glob="*.png",
            depth_scale=0.001,
            intrinsics=(900.0, 900.0, WIDTH / 2, HEIGHT / 2),
            dataset="camera",
        )
        sizes = []

        def run(engine: str, workers: int | None) -> None:
            with tempfile.TemporaryDirectory(dir=raw.parent) as out, redirect_stderr(io.StringIO()):
                done = pack_parts(reader, out, parts=parts, engine=engine, workers=workers)
            sizes.append(done.bytes)

        timings = compare(
            {
                "one process": lambda: run("local", 1),
                "local": lambda: run("local", None),
                "ray": lambda: run("ray", None),
            },
            baseline="local",
            rounds=rounds,
            device=torch.device("cpu"),
        )
    assert len(set(sizes)) == 1
    return timings, ray_s, sizes[0]


@contextmanager
def made_up_frames(count: int) -> Iterator[Path]:
    """A directory with views of a room, (768, 1024), with a sensor's noise: JPEG and depth in mm
    as 16-bit PNG."""
    reader = RoomsReader(scenes=1, frames_per_scene=1, height=HEIGHT, width=WIDTH)
    frame = decode_frame(reader.read(reader.list().items[0]))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory, "raw")
        raw.mkdir()
        for number in range(count):
            image, depth_m = (
                np.roll(a, 8 * number, axis=1).astype(np.float64)
                for a in (frame.image, np.nan_to_num(frame.depth_m, posinf=0))
            )
            image += random.normal(0, 4, image.shape)
            depth_m *= 1 + random.normal(0, 2e-3, depth_m.shape)
            picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            picture.save(raw / f"{number:05d}.jpg", quality=92)
            codes = np.rint(1000 * depth_m).clip(0, 65535).astype(np.uint16)
            Image.fromarray(codes).save(raw / f"{number:05d}.png")
        yield raw


def packing_text(timings: list[Timing], frames: int, parts: int, ray_s: float, size: int) -> str:
    """Frames and parts per second of each engine."""
    lines = [f"{frames} frames of {WIDTH} x {HEIGHT}, {size / frames / 1e6:.2f} MB each, packed"]
    for timing in timings:
        seconds = timing.ms[1] / 1e3
        lines.append(
            f"{timing.name}: {frames / seconds:.2f} frames/s, {parts / seconds:.3f} parts/s"
        )
    return "\n".join([*lines, f"Ray itself took {ray_s:.1f} s to start, which is not in its time"])
