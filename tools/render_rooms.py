"""Path-trace furnished rooms with exact depth, regions and camera: a developer's tool.

python tools/render_rooms.py train --out RAW --scenes 0:800
python tools/render_rooms.py streets --out RAW --scenes 0:200
python tools/render_rooms.py bench --out BENCH --scenes 0:120

``train`` rooms and ``streets`` have nothing flat that shows something. ``bench`` has real mirrors,
pictures and screens, and doorways and windows beside them, one scene in five a street. Needs the
extra ``render``. Frames that exist are kept, so that the same command goes on where it was stopped,
and (kind, scene, view, seed) decide every frame whatever was rendered before. A frame is

    RAW/room_0001/0.jpg         the image (RAW/street_0001/0.jpg of ``streets``)
    RAW/room_0001/0.npy         float32 planar z in metres, +inf sky
    RAW/room_0001/0.region.png  0 background, 1 mirror, 2 picture, 3 frame, 5 screen, 6 opening
    RAW/room_0001/0.txt         fx fy cx cy, pixel centres at integers
    RAW/room_0001/0.plain.jpg   bench only: the view without its flat things ...
    RAW/room_0001/0.plain.npy   ... and its depth

for ``flatdepth pack folder --image_glob "*/*.jpg" --depth_glob "*/*.npy" --depth_scale 1
--intrinsics_glob "*/*.txt" --scene_from parent``.
"""

import argparse
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flatdepth.cli import Parser, number, run_command
from flatdepth.errors import import_extra
from flatdepth.show.pictures import write_atomic

FRAMES_PER_PROCESS = 50
"""Blender keeps a little of every scene; a fresh process has none of it."""


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("kind", choices=("train", "streets", "bench"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=scene_range, default=range(8), help="first:end")
    parser.add_argument("--views", type=number(1, 100), default=1, help="cameras per scene")
    parser.add_argument("--width", type=number(16, 4096), default=280)
    parser.add_argument("--height", type=number(16, 4096), default=210)
    parser.add_argument("--samples", type=number(1, 4096), default=16, help="paths per pixel")
    parser.add_argument("--seed", type=number(0, 2**31), default=0)
    devices = ("CPU", "CUDA", "OPTIX", "HIP", "ONEAPI", "METAL")
    parser.add_argument("--device", choices=devices, default="CPU", help="of Cycles")
    args = parser.parse_args()
    frames = [(scene, view) for scene in args.scenes for view in range(args.views)]
    missing = [frame for frame in frames if not frame_file(args, *frame, ".jpg").exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=FRAMES_PER_PROCESS) as child:
        for frame in with_progress(missing, len(frames)):
            child.submit(render_frame, args, *frame).result()


def scene_range(text: str) -> range:
    first, _, end = text.partition(":")
    try:
        found = range(int(first), int(end))
    except ValueError:
        found = range(0)
    if not found or found.start < 0:
        raise argparse.ArgumentTypeError(f"expected first:end such as 0:800, got {text!r}")
    return found


def with_progress(frames: list[tuple[int, int]], total: int) -> Iterator[tuple[int, int]]:
    """The frames, each told when it is done: a bar on a terminal, else a line."""
    done = total - len(frames)
    if sys.stderr.isatty():
        yield from tqdm(frames, initial=done, total=total, unit="frame")
        return
    started = time.monotonic()
    for count, frame in enumerate(frames, 1):
        yield frame
        each = (time.monotonic() - started) / count
        left = each * (len(frames) - count) / 60
        told = f"{done + count} of {total} frames, {each:.1f} s each, {left:.0f} minutes left"
        print(told, file=sys.stderr, flush=True)


def frame_file(args: argparse.Namespace, scene: int, view: int, ending: str) -> Path:
    name = "street" if args.kind == "streets" else "room"
    return args.out / f"{name}_{scene:04d}" / f"{view}{ending}"


def render_frame(args: argparse.Namespace, scene: int, view: int) -> None:
    """Render one frame and write its files, the one by which it counts as whole last."""
    with silence():
        import_extra("bpy", "tools/render_rooms.py", "render")
        from render.views import Settings, make_frame

        size = (args.width, args.height)
        settings = Settings(args.seed, *size, args.samples, args.device, args.out / "pictures")
        frame = make_frame(args.kind, scene, view, settings)
    camera = frame.camera
    numbers = (camera.focal_px, camera.focal_px, (camera.width - 1) / 2, (camera.height - 1) / 2)
    files = {
        ".npy": npy(frame.depth_m),
        ".region.png": encoded(frame.region, "PNG"),
        ".txt": (" ".join(map(repr, numbers)) + "\n").encode(),
    }
    if frame.plain is not None:
        image, depth_m = frame.plain
        files |= {".plain.npy": npy(depth_m), ".plain.jpg": encoded(image, "JPEG")}
    files[".jpg"] = encoded(frame.image, "JPEG")
    for ending, data in files.items():
        write_atomic(frame_file(args, scene, view, ending), data)


@contextmanager
def silence() -> Iterator[None]:
    """Within, nothing that Blender prints is shown."""
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, own in zip((1, 2), kept, strict=True):
            os.dup2(own, stream)
        for stream in (*kept, nowhere):
            os.close(stream)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encoded(image: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, quality=92)
    return buffer.getvalue()


if __name__ == "__main__":
    run_command(main)
