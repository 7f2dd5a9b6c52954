"""JPEG decoders side by side: their time and their pixels, per kind of file and number of threads.

All decode the same bytes in memory to (h, w, 3) uint8, on threads as the loader does. One that
takes as long on two threads as on one keeps Python's interpreter lock while it works.
"""

import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from flatdepth.bench.timing import Timing, compare, table
from flatdepth.data.shards.codec import decode_image
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import BadFrame, UserError

Decoder = Callable[[bytes], UInt8[np.ndarray, "h w 3"]]

PILLOW, OURS = "Pillow", "flatdepth"

KINDS: Mapping[str, Mapping[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:4:4": {"subsampling": 0},
    "progressive": {"subsampling": 2, "progressive": True},
    "grey": {},
    "restart markers": {"subsampling": 2, "restart_marker_rows": 1},
    "stored as RGB": {"keep_rgb": True},
}
"""How pictures are encoded anew, at quality 95."""

PER_SET = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far pixels are from Pillow's: the largest and the mean step, and the share that differ.

    All over the three channels, in steps of 1/255.
    """

    largest: int
    mean: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Decoders on files of one kind.

    Attributes:
        kind: of ``KINDS``, or how the files came.
        differences: per decoder that takes all files.
        timings: of these per number of threads, for all files together.
    """

    kind: str
    differences: Mapping[str, Difference]
    timings: Mapping[int, list[Timing]]


def decoders() -> dict[str, Decoder]:
    """Pillow, what flatdepth reads frames with, and the others that are installed."""
    found: dict[str, Decoder] = {PILLOW: _pillow, OURS: decode_image}
    with suppress(ImportError):
        turbo = importlib.import_module("kornia_rs.io").decode_image_jpegturbo
        found["kornia_rs"] = lambda payload: turbo(payload, "rgb")
    with suppress(ImportError):
        cv2 = importlib.import_module("cv2")
        found["OpenCV"] = lambda payload: cv2.imdecode(
            np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR_RGB
        )
    with suppress(ImportError, AttributeError):  # torchvision will lose it
        of_torchvision = importlib.import_module("torchvision.io").decode_jpeg
        found["torchvision"] = lambda payload: _last_axis(
            of_torchvision(torch.frombuffer(bytearray(payload), dtype=torch.uint8), "RGB")
        )
    with suppress(ImportError, AttributeError):
        of_torchcodec = importlib.import_module("torchcodec.decoders").decode_jpeg
        found["torchcodec"] = lambda payload: _last_axis(of_torchcodec(payload, mode="RGB"))
    return found


def pictures(paths: Sequence[Path]) -> list[bytes]:
    """JPEG files: those given or in given folders, by their names' ends, else some of demo sets.

    Raises:
        UserError: a path is not there, there is no JPEG, or one is damaged.
    """
    if not paths:
        sets = [ShardSet.open(f"shards/{name}") for name in ("demo_art", "rooms-train")]
        raws = [shards.read(i) for shards in sets for i in range(PER_SET)]
        return [raw.image for raw in raws if raw.image_ext == "jpg"]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; name JPEG files or folders of them")
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.suffix.lower() in (".jpg", ".jpeg")
    ]
    if not files:
        raise UserError(f"no JPEG at {paths[0]}; name .jpg files or folders of them")
    payloads = [file.read_bytes() for file in files]
    for file, payload in zip(files, payloads, strict=True):
        try:
            decode_image(payload)
        except BadFrame as error:
            raise UserError(f"{file}: {error}; leave it out") from error
    return payloads


def measure_decoding(
    payloads: Sequence[bytes], *, threads: Sequence[int], rounds: int
) -> list[Decoding]:
    """Compare all decoders on files as they are and encoded anew in every kind.

    Args:
        payloads: whole JPEG files.
        threads: numbers of threads, each timed by itself.
        rounds: of all decoders in turn, per kind and number of threads.
    """
    images = [Image.fromarray(decode_image(payload)) for payload in payloads]
    of_kinds = {"as they are": list(payloads)} | {
        kind: [_encoded(image, kind) for image in images] for kind in KINDS
    }
    found = []
    for kind, files in tqdm(of_kinds.items(), desc="kinds", disable=None, leave=False):
        differences, contenders = {}, {}
        for name, decode in decoders().items():
            with suppress(Exception):  # each library has its own errors for what it does not take
                differences[name] = _difference(decode, files)
                contenders[name] = decode
        timings = {}
        for number in threads:
            with ThreadPoolExecutor(number) as pool:
                calls = {name: partial(_all, pool, one, files) for name, one in contenders.items()}
                timings[number] = compare(
                    calls, baseline=PILLOW, rounds=rounds, device=torch.device("cpu")
                )
        found.append(Decoding(kind=kind, differences=differences, timings=timings))
    return found


def decoding_text(payloads: Sequence[bytes], found: Sequence[Decoding]) -> str:
    """The differences and timings as tables."""
    sizes = sorted({Image.open(io.BytesIO(payload)).size for payload in payloads})
    listed = ", ".join(f"{width} x {height}" for width, height in sizes)
    lines = [f"{len(payloads)} files of {listed} pixels; times are for all of them"]
    for one in found:
        lines.append(f"\n{one.kind}; pixels against Pillow's: " + _told(one.differences))
        for number, timings in one.timings.items():
            lines.append(f"threads: {number}\n{table(timings)}")
    return "\n".join(lines)


def _told(differences: Mapping[str, Difference]) -> str:
    other = [
        f"{name} up to {found.largest}, mean {found.mean:.3f}, {found.share:.1%} of them"
        for name, found in differences.items()
        if found.largest
    ]
    return "; ".join(other) or "the same from all"


def _pillow(payload: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(io.BytesIO(payload)) as image:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _last_axis(image: torch.Tensor) -> np.ndarray:
    """(3, h, w) to (h, w, 3)."""
    result: np.ndarray = image.movedim(0, -1).numpy()
    return result


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image = image.convert("L") if kind == "grey" else image
    image.save(buffer, "JPEG", quality=95, **KINDS[kind])
    return buffer.getvalue()


def _all(pool: ThreadPoolExecutor, decode: Decoder, files: Sequence[bytes]) -> None:
    for _ in pool.map(decode, files):
        pass


def _difference(decode: Decoder, files: Sequence[bytes]) -> Difference:
    steps = np.concatenate(
        [
            np.abs(decode(file).astype(np.int16) - _pillow(file).astype(np.int16)).ravel()
            for file in files
        ]
    )
    return Difference(
        largest=int(steps.max()), mean=float(steps.mean()), share=float((steps > 0).mean())
    )
