"""Damaged and hostile input of every kind that the project reads: ``python -m tests.fuzz``.

Seeded and in one process. Each input is a good file with some bytes changed, given to the code of
the product that reads it. It must end in one sentence (``UserError``, or a frame that is skipped
and listed), or in what the good file gives. Where a checksum protects the content, anything else
that is taken counts as silent; elsewhere a changed pixel cannot be known. Every other exception is
a traceback that a user would have seen.
"""

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import logging
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import OpenEXR
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import Subset
from flatdepth.data.pack import Job, pack
from flatdepth.data.polygons import draw_outlines
from flatdepth.data.readers.art import ArtReader
from flatdepth.data.readers.base import Item, Reader
from flatdepth.data.readers.files import read_intrinsics
from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.readers.hypersim import HypersimReader
from flatdepth.data.readers.labels import forget_files, read_outlines, read_planes
from flatdepth.data.readers.lists import ListReader
from flatdepth.data.readers.nyu import NyuReader
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.readers.vkitti2 import VKitti2Reader
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.write import Sample
from flatdepth.data.streams import Stream
from flatdepth.errors import BadFrame, UserError
from flatdepth.models import card
from flatdepth.models.checkpoint import load_weights, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.predict.inputs import open_photo
from flatdepth.show.run_page import write_report
from flatdepth.training.ema import Ema
from flatdepth.training.runlog import _keep_history
from flatdepth.training.state import Progress, load_checkpoint, save_checkpoint
from flatdepth.types import METRICS_FORMAT
from tests import test_annotations
from tests.conftest import REPOSITORY
from tests.test_annotations import coco_masks, cvat_polygons, labelme, text
from tests.test_layouts import Maker, nyu, nyu_list, vkitti

HYPERSIM = REPOSITORY / "tests" / "data" / "hypersim"
HEIGHT, WIDTH = 30, 40
SLOW_SECONDS = 5.0
"""An input that takes more time of the processor counts as a hang."""

HOSTILE_NUMBERS = (b"0", b"-1", b"1" * 5000, b"99999999999", b"1e999", b"nan", b"65535", b"")
HOSTILE_WORDS = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x10000)


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    """The same bytes, damaged by chance or by intent; never equal to ``data``."""
    changed = data
    while changed == data:
        place = int(draw.integers(min(len(data), draw.choice([16, 128, 1024, len(data)]))))
        length = int(draw.integers(1, 600))
        before, after = data[:place], data[place:]
        match draw.choice(
            ["flip", "cut", "zero", "noise", "insert", "drop", "number", "word", "nest", "twice"],
            p=[0.25, 0.1, 0.1, 0.1, 0.05, 0.05, 0.15, 0.1, 0.05, 0.05],
        ):
            case "flip":
                changed = before + bytes([after[0] ^ (1 << int(draw.integers(8)))]) + after[1:]
            case "cut":
                changed = before
            case "zero":
                changed = before + bytes(min(length, len(after))) + after[length:]
            case "noise":
                changed = before + draw.bytes(length) + after[length:]
            case "insert":
                changed = before + draw.bytes(length) + after
            case "drop":
                changed = before + after[length:]
            case "number":
                changed = _with_number(data, place, draw)
            case "word":
                word = struct.pack(draw.choice(["<I", ">I"]), draw.choice(HOSTILE_WORDS))
                changed = before + word + after[4:]
            case "nest":
                changed = before + b"[" * 100_000 + after
            case "twice":
                changed = data + data
    return changed


def _with_number(data: bytes, place: int, draw: np.random.Generator) -> bytes:
    """Another value for the number in digits at or behind a place."""
    start = next((i for i in range(place, len(data)) if 48 <= data[i] < 58), len(data))
    end = next((i for i in range(start, len(data)) if not 48 <= data[i] < 58), len(data))
    return data[:start] + HOSTILE_NUMBERS[draw.integers(len(HOSTILE_NUMBERS))] + data[end:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that reads files which anybody may have damaged.

    Attributes:
        files: name -> good bytes; one of them is changed.
        read: given the files, writes and reads them and returns what came of it, comparable.
        protected: whether a checksum has to tell every change.
        weight: its share of the inputs.
    """

    files: Mapping[str, bytes]
    read: Callable[[str, Mapping[str, bytes]], object]
    protected: bool = False
    weight: float = 1.0


@dataclass
class Tally:
    """Outcomes of one target."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fuzz(
    targets: Mapping[str, Target], inputs: int, seed: int, say: Callable[[str], None] = print
) -> dict[str, Tally]:
    """Try ``inputs`` damaged files, spread over the targets by weight.

    Returns:
        Per target how many ended as "sentence", "same" or "taken", and what must not be: "silent",
        "traceback" or "slow". Each of these has a line that says which input it was.
    """
    total = sum(target.weight for target in targets.values())
    tallies = {}
    for name, target in targets.items():
        tally = tallies[name] = Tally()
        good = {file: target.read(file, target.files) for file in target.files}
        for number in range(max(1, round(inputs * target.weight / total))):
            draw = np.random.default_rng([seed, number, *name.encode()])
            file = sorted(target.files)[draw.integers(len(target.files))]
            changed = mutate(target.files[file], draw)
            started = time.process_time()
            outcome, detail = "taken", ""
            try:
                if _equal(target.read(file, {**target.files, file: changed}), good[file]):
                    outcome = "same"
                elif target.protected:
                    outcome = "silent"
            except (UserError, BadFrame) as error:
                outcome = "sentence"
                if not str(error).isprintable():
                    outcome, detail = "traceback", f"not one printable line: {error!r:.200}"
            except (Exception, MemoryError) as error:
                outcome, detail = "traceback", f"{type(error).__name__}: {error!s:.200}"
            if (seconds := time.process_time() - started) > SLOW_SECONDS:
                outcome, detail = "slow", f"{seconds:.1f} s"
            tally.counts[outcome] += 1
            if outcome in ("silent", "traceback", "slow"):
                tally.faults.append(f"{name} {file} input {number}: {outcome} {detail}")
        outcomes = ", ".join(f"{count} {what}" for what, count in sorted(tally.counts.items()))
        say(f"{name:12} {sum(tally.counts.values()):6} inputs: {outcomes}")
    return tallies


def _equal(one: object, other: object) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and np.array_equal(one, other, equal_nan=True)
    return type(one) is type(other) and one == other


def make_targets(folder: Path) -> dict[str, Target]:
    """Everything that the project reads, as small files below ``folder``."""
    room = folder / "rooms"
    pack(RoomsReader(scenes=2, frames_per_scene=2, height=28, width=42), room, workers=1, level=1)
    return {
        "shard": _shards(folder / "shard", room, "*.tar"),
        "index": _shards(folder / "index", room, INDEX_NAME),
        "columns": _shards(folder / "columns", room, COLUMNS_NAME),
        "stream": _stream(folder / "stream", room),
        "record": _records(folder / "record"),
        "checkpoint": _checkpoint(folder / "checkpoint"),
        "depth": _depth_files(folder / "depth"),
        **_images(folder / "image"),
        "intrinsics": _intrinsics(folder / "intrinsics"),
        "labels": _labels(folder / "labels"),
        **_layouts(folder / "layouts"),
        "weights": _weights(folder / "weights"),
        "config": _config(folder / "config"),
        "run": _run(folder / "run"),
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _read_all(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _shards(folder: Path, room: Path, mutated: str) -> Target:
    """A shard set as training reads it."""
    everything = _read_all(room)
    names = {path.name for path in room.glob(mutated)}

    def read(_: str, files: Mapping[str, bytes]) -> object:
        _write(folder, everything | dict(files))
        with ShardSet.open(folder) as shards:
            subset = Subset(shards=shards, rows=np.arange(len(shards)), first_identity=0)
            frames = [subset.frame(place) for place in range(len(subset))]
            about = (shards.dataset, shards.kind, list(shards.scenes), list(shards.splits))
        return (*about, *((f.image, f.depth_m, f.K_px, f.key, f.scene) for f in frames))

    return Target(
        files={name: everything[name] for name in names}, read=read, protected=True, weight=2.0
    )


def _stream(folder: Path, room: Path) -> Target:
    """A tar as WebDataset reads it, without an index."""
    (tar,) = room.glob("*.tar")

    def read(name: str, files: Mapping[str, bytes]) -> object:
        _write(folder, files)
        stream = Stream.of_list(str(folder / name), resampled=False)
        window = next(stream.windows(seed=0, rank=0, ranks=1))
        return tuple(window.frame(place).image for place in range(4))

    return Target(files={tar.name: tar.read_bytes()}, read=read)


def _records(folder: Path) -> Target:
    """What an interrupted packing goes on from."""
    raw, begun = folder / "raw", folder / "begun"
    for number in range(4):
        _write(
            raw, {f"image/{number}.png": _png(number), f"depth/{number}.png": _depth_png(number)}
        )
    reader = FolderReader(str(raw), "image/*.png", "depth/*.png", 0.001, fov_deg=60)

    class Cut(Exception):
        pass

    read = FolderReader.read

    def interrupted(self: FolderReader, item: Item) -> object:
        if item.key.endswith("3"):
            raise Cut
        return read(self, item)

    def packed(out: Path) -> dict[str, bytes]:
        with contextlib.redirect_stderr(io.StringIO()):
            pack(reader, out, workers=1, level=1, shard_mb=0.001)
        return _read_all(out)

    FolderReader.read = interrupted  # type: ignore[assignment, method-assign]
    with contextlib.suppress(Cut):
        packed(begun)
    FolderReader.read = read  # type: ignore[method-assign]
    everything = _read_all(begun)

    def resumed(_: str, files: Mapping[str, bytes]) -> object:
        shutil.rmtree(folder / "out", ignore_errors=True)
        _write(folder / "out", everything | dict(files))
        return packed(folder / "out")

    files = {name: data for name, data in everything.items() if name.endswith(".json")}
    assert len(files) > 2
    return Target(files=files, read=resumed, protected=True, weight=0.5)


def _checkpoint(folder: Path) -> Target:
    """What a run goes on from: every file of a checkpoint."""
    config = TrainConfig()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 20)).sum().backward()
    optimizer.step()
    ema = Ema(model, 0.9)
    progress = Progress(step=1, data={"rooms": "0" * 64})
    path = save_checkpoint(accelerator, folder, progress, config, ema)
    everything = _read_all(path)

    def read(_: str, files: Mapping[str, bytes]) -> object:
        _write(path, everything | dict(files))
        loaded = load_checkpoint(accelerator, path, config, ema, progress.data)
        moments = (m for state in optimizer.state.values() for m in state.values())
        tensors = [*model.parameters(), *ema.state_dict().values(), *moments]
        return dataclasses.asdict(loaded), tuple(t.detach().numpy().copy() for t in tensors)

    return Target(files=everything, read=read, protected=True, weight=2.0)


def _depth_files(folder: Path) -> Target:
    """Depth files of RGB-D frames, through packing."""
    codes = np.random.default_rng(0).integers(500, 5000, (HEIGHT, WIDTH)).astype(np.uint16)
    metres = (codes / 1000).astype(np.float32)
    hdf5, npy, npz = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with h5py.File(hdf5, "w") as file:
        file.create_dataset("depth", data=metres, chunks=(10, 20), compression="gzip")
    np.save(npy, metres)
    np.savez_compressed(npz, depth=metres)
    folder.mkdir()
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"Z": metres}).write(str(folder / "depth.exr"))
    files = {
        "exr": (folder / "depth.exr").read_bytes(),
        "h5": hdf5.getvalue(),
        "npy": npy.getvalue(),
        "npz": npz.getvalue(),
        "pfm": b"Pf\n%d %d\n-1.0\n" % (WIDTH, HEIGHT) + metres[::-1].astype("<f4").tobytes(),
        "pgm": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + codes.astype(">u2").tobytes(),
        "png": _saved(Image.fromarray(codes), "PNG"),
        "tif": _saved(Image.fromarray(metres), "TIFF"),
    }
    files["region"] = _saved(Image.fromarray((codes % 5).astype(np.uint8)), "PNG")
    _write(folder, {"image/0.png": _png(0), "good.png": _depth_png(0)})

    def read(name: str, files: Mapping[str, bytes]) -> object:
        depth = f"depth/0.{name}"
        _write(folder, {depth: files[name]})
        scale = 0.001 if name in ("pgm", "png", "region") else 1.0
        reader = FolderReader(str(folder), "image/*.png", f"depth/*.{name}", scale, fov_deg=60)
        if name == "region":
            return _packed(reader, folder, image="image/0.png", depth="good.png", region=depth)
        return _packed(reader, folder, image="image/0.png", depth=depth, mask=depth)

    return Target(files=files, read=read, weight=3.0)


def _images(folder: Path) -> dict[str, Target]:
    """Pictures, as those of frames, as art and to predict on."""
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "avif": "AVIF", "tif": "TIFF"}
    kinds |= {"bmp": "BMP", "ppm": "PPM"}
    files = {ext: _saved(Image.fromarray(pixels), kind) for ext, kind in kinds.items()}
    _write(folder, {"depth/0.png": _depth_png(0)})

    def frame(name: str) -> object:
        globs = (f"image/*.{name}", "depth/*.png")
        reader = FolderReader(str(folder), *globs, 0.001, fov_deg=60, resize_images=True)
        return _packed(reader, folder, image=f"image/0.{name}", depth="depth/0.png")

    def art(name: str) -> object:
        reader = ArtReader(str(folder), max_side=20)
        return _packed(reader, folder, image=f"image/0.{name}")

    def photo(name: str) -> object:
        return open_photo(folder / f"image/0.{name}").image

    def target(read: Callable[[str], object]) -> Target:
        def written(name: str, files: Mapping[str, bytes]) -> object:
            _write(folder, {f"image/0.{name}": files[name]})
            return read(name)

        return Target(files=files, read=written)

    return {read.__name__: target(read) for read in (frame, art, photo)}


def _packed(reader: Reader, folder: Path, **files: str) -> object:
    """One frame through reading, checking and encoding, as a packing worker does it."""
    item = Item(key="0", scene="x", files={role: str(folder / f) for role, f in files.items()})
    return _job(reader, item)


def _job(reader: Reader, item: Item) -> object:
    result = Job(reader, min_valid=0.01, level=1)(item)
    if isinstance(result, Sample):
        return result.members
    raise BadFrame(result.reason, result.detail)


def _intrinsics(folder: Path) -> Target:
    """Text files of intrinsics, as packing reads them for a frame."""
    files = {
        "matrix": b"525.0 0 319.5\n0 525.0 239.5\n0 0 1\n",
        "sized": b"640, 480, 525.0, 525.0, 319.5, 239.5",
        "json": b'{"w": 640, "h": 480, "K": [525.0, 0, 0, 0, 525.0, 0, 319.5, 239.5, 1]}',
    }

    def read(name: str, files: Mapping[str, bytes]) -> object:
        _write(folder, files)
        return read_intrinsics(str(folder / name), 640, 480)

    return Target(files=files, read=read, weight=0.5)


def _labels(folder: Path) -> Target:
    """Files of outlines and planes beside photographs."""
    patch = base64.b64encode(_saved(Image.new("L", (9, 7), 1), "PNG")).decode()
    mask = {"label": "mirror", "points": [[3, 2], [11, 8]], "shape_type": "mask", "mask": patch}
    plane = {"plane": [-8e-5, -4e-7, -1e-4, 0.99], "mask_id": 1}
    files = {
        "labelme": labelme(),
        "masks": json.dumps({"shapes": [mask]}).encode(),
        "coco": coco_masks(text),
        "cvat": cvat_polygons(),
        "cvat_mask": test_annotations.cvat(
            '<mask label="mirror" rle="2, 3, 4" left="1" top="2" width="3" height="3"/>'
        ),
        "planes": json.dumps([plane]).encode(),
    }

    def read(name: str, files: Mapping[str, bytes]) -> object:
        _write(folder, files)
        forget_files()
        if name == "planes":
            found = read_planes(str(folder / name), 0.001)
            return np.array([(one["mask_id"], *one["m"]) for one in found])
        size = (test_annotations.HEIGHT, test_annotations.WIDTH)
        outlines = read_outlines(str(folder / name), "a/1.jpg", *size)
        return None if outlines is None else draw_outlines(outlines, *size)

    return Target(files=files, read=read, weight=0.5)


def _layouts(folder: Path) -> dict[str, Target]:
    """The tables, lists and arrays of published data sets, with a frame or two."""
    make = {name: Maker(folder / name) for name in ("list", "vkitti2", "nyu", "hypersim")}
    nyu_list(make["list"])
    vkitti(make["vkitti2"])
    table = "frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n0 0 725.0 725.0 620.5 187.0\n"
    make["vkitti2"].text("vkitti_2.0.3_textgt/Scene01/clone/intrinsic.txt", table)
    nyu(make["nyu"])
    shutil.copytree(HYPERSIM, folder / "hypersim")
    images = "ai_037_002/images/scene_cam_00"
    make["hypersim"].image(f"{images}_final_preview/frame.0000.tonemap.jpg", 768, 1024)
    readers = {
        "list": ListReader(
            raw=str(folder / "list"), depth_scale=0.001, file=str(folder / "list" / "nyu_train.txt")
        ),
        "vkitti2": VKitti2Reader(str(folder / "vkitti2"), cameras="0"),
        "nyu": NyuReader(str(folder / "nyu")),
        "hypersim": HypersimReader(str(folder / "hypersim")),
    }

    def target(name: str) -> Target:
        def read(_: str, files: Mapping[str, bytes]) -> object:
            _write(folder / name, files)
            reader = readers[name]
            items = reader.list().items
            return tuple(_job(reader, item) for item in items)

        return Target(files=_read_all(folder / name), read=read, weight=0.1)

    return {name: target(name) for name in readers}


def _weights(folder: Path) -> Target:
    """Weight files of both kinds."""
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=20.0)
    folder.mkdir()
    save_weights(model, folder / "good")
    everything = {path.name: path.read_bytes() for path in folder.glob("*.[ps][ta]*")}

    def read(name: str, files: Mapping[str, bytes]) -> object:
        _write(folder, files)
        return load_weights(model, str(folder / name)).matched

    return Target(files=everything, read=read, weight=0.3)


def _config(folder: Path) -> Target:
    """A configuration file."""

    def read(name: str, files: Mapping[str, bytes]) -> object:
        _write(folder, files)
        arguments = [f"--config={folder / name}"]
        return parse_config(TrainConfig, arguments, prog="train.py", description=None)

    good = (REPOSITORY / "configs" / "quickstart.yaml").read_bytes()
    return Target(files={"quickstart.yaml": good}, read=read, weight=0.1)


def _run(folder: Path) -> Target:
    """What a run wrote, as its page, a model card and a run that goes on read it."""
    evaluation = {
        "label": "end",
        "step": 1,
        "illusion_gap": None,
        "table": {"all": {"abs_rel": 0.1}},
    }
    metrics = {
        "format": METRICS_FORMAT, "name": "x", "finished": True, "protocol": "p", "seconds": 1.0,
        "device": "cpu", "versions": {"torch": "2"}, "evaluations": [evaluation],
    }  # fmt: skip
    config = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(TrainConfig()))))
    lines = (json.dumps({"step": step, "loss": 1.0, "lr": 0.1}) for step in (1, 2, 3))
    files = {
        "metrics.json": json.dumps(metrics).encode(),
        "config.yaml": config.encode(),
        "history.jsonl": "".join(f"{line}\n" for line in lines).encode(),
    }

    def read(_: str, files: Mapping[str, bytes]) -> object:
        _write(folder, files)
        write_report(folder, folder / "page.html")
        card.read_run(folder)
        _keep_history(folder / "history.jsonl", 2)
        return None

    return Target(files=files, read=read, weight=0.5)


def _depth_png(seed: int) -> bytes:
    codes = np.random.default_rng(seed).integers(500, 5000, (HEIGHT, WIDTH)).astype(np.uint16)
    return _saved(Image.fromarray(codes), "PNG")


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return _saved(Image.fromarray(pixels), "PNG")


def _saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="Names of targets.")
    parser.add_argument("--show", type=int, default=20, help="Faults to print per target.")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet():
        targets = make_targets(Path(folder))
        chosen = {name: targets[name] for name in options.only or targets}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tallies = fuzz(chosen, options.inputs, options.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for tally in tallies.values():
        print(*tally.faults[: options.show], sep="\n", end="\n" if tally.faults else "")
    faults = sum(len(tally.faults) for tally in tallies.values())
    inputs = sum(sum(tally.counts.values()) for tally in tallies.values())
    seconds = time.perf_counter() - started
    print(f"{inputs} inputs in {seconds:.0f} s, {faults} faults, peak memory +{grown:.0f} MiB")
    return 1 if faults else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, warnings, logs and notes of the code under test are not printed."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
