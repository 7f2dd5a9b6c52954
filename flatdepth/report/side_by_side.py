"""Pictures through several depth systems: read, predicted, brought to one scale, written."""

import gc
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8

from flatdepth.data.shards import INDEX_NAME
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.predict.inputs import find_inputs, open_photo
from flatdepth.predict.outputs import npy_bytes
from flatdepth.predict.pointcloud import depth_edges, ply_bytes, unproject
from flatdepth.predict.predictor import PredictOptions, choose_camera
from flatdepth.predict.systems import (
    OpenedSystem,
    Settings,
    on_one_scale,
    open_system,
    predict_with,
)
from flatdepth.report.comparison import Case, System, Table, measure, sheet, write_page
from flatdepth.show.pictures import write_atomic

EXAMPLES = {"shards/flatbench": ("room_0066/0", "room_0078/0", "room_0084/0")}
"""Set -> keys of the pictures that are shown by default: mirrors, a painting, a mural."""

PAGE, FIGURES, SHEET_SUFFIX = "compare.html", "compare.json", "_sheet.png"

Extra = Literal["npy", "ply"]
_JUMP = 0.05
"""Points where depth jumps by more than this share are left out, as in ``flatdepth predict``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is predicted on.

    Attributes:
        name: how it is called.
        image: sRGB.
        focal_px: said, or assumed.
        truth_m, region, K_px: as in ``Case``, where they are known.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    focal_px: float
    truth_m: Float32[np.ndarray, "h w"] | None = None
    region: UInt8[np.ndarray, "h w"] | None = None
    K_px: Float64[np.ndarray, "3 3"] | None = None

    @property
    def focal_is_assumed(self) -> bool:
        """Whether nobody said its camera."""
        return self.K_px is None

    @property
    def file_name(self) -> str:
        """The name with whatever a file's cannot have replaced."""
        return as_file_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Pictures by every system.

    Attributes:
        cases: per picture.
        systems: in the order in which they were given.
        table: per system the figures by region; None if no picture has truth.
        settings: how the systems predicted.
    """

    cases: Sequence[Case]
    systems: Sequence[System]
    table: Sequence[Table] | None
    settings: Settings = field(default_factory=Settings)


def read_pictures(
    inputs: Sequence[str], out: Path, *, most: int, cameras: PredictOptions
) -> list[Picture]:
    """The pictures of photographs, folders and shard sets, in the order in which they are given.

    Args:
        inputs: as ``find_inputs`` takes them, or directories and URLs of shard sets of frames; none
            stands for ``EXAMPLES``.
        out: the folder for outputs, which is not searched.
        most: frames of each set, evenly spaced; 0: all.
        cameras: what is said about the camera of photographs.

    Raises:
        UserError: an input names nothing, or is a set of pictures without depth.
    """
    if not inputs:
        return [one for url, keys in EXAMPLES.items() for one in _frames(url, keys)]
    pictures: list[Picture] = []
    for given in inputs:
        if (Path(given) / INDEX_NAME).is_file() or "://" in given:
            shards = ShardSet.open(given)
            count = len(shards) if most == 0 else min(most, len(shards))
            rows = np.linspace(0, len(shards) - 1, count).round().astype(int).tolist()
            pictures += _frames(given, [shards.keys[row] for row in rows])
        else:
            pictures += _photos(given, out, cameras)
    return pictures


def _frames(url: str, keys: Iterable[str]) -> Iterator[Picture]:
    shards = ShardSet.open(url)
    if shards.kind != "depth":
        raise UserError(f"--input: {url} holds pictures without depth; give a set of frames")
    for key in keys:
        frame = shards.frame(shards.keys.index(key))
        yield Picture(
            name=f"{frame.dataset} {frame.key}",
            image=frame.image,
            focal_px=float(frame.K_px[0, 0] + frame.K_px[1, 1]) / 2,
            truth_m=frame.depth_m,
            region=frame.region,
            K_px=frame.K_px,
        )


def _photos(given: str, out: Path, cameras: PredictOptions) -> Iterator[Picture]:
    for item in find_inputs([given], out):
        photo = open_photo(item.path)
        height, width = photo.image.shape[:2]
        camera = choose_camera(photo.focal_px, height, width, cameras)
        yield Picture(
            name=item.name,
            image=photo.image,
            focal_px=camera.focal_px,
            K_px=None if camera.is_assumed else camera.K_px,
        )


def compare(
    models: Sequence[str],
    pictures: Sequence[Picture],
    settings: Settings,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Predict every picture with every system; one network is in memory at a time.

    Args:
        models: as ``open_system`` takes them.
        progress: called with (predictions done, predictions in all).

    Raises:
        UserError: two systems have one label, or one cannot be used.
    """
    labels = [given.partition("=")[0] for given in models]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(
            f"--model: {repeated[0]} is given twice; give the second a label of its own, as in "
            f"--model {repeated[0]}_2=WEIGHTS"
        )
    opened: list[OpenedSystem] = []
    predictions: list[list[Float32[np.ndarray, "h w"]]] = []
    for number, given in enumerate(models):
        system = open_system(given, settings, device)
        print(f"{system.label}: {system.weights}", file=sys.stderr)
        maps: list[Float32[np.ndarray, "h w"]] = []
        for picture in pictures:
            maps.append(predict_with(system, picture.image, picture.focal_px, settings))
            progress(number * len(pictures) + len(maps), len(models) * len(pictures))
        predictions.append(maps)
        assumed = sum(picture.focal_is_assumed for picture in pictures)
        if system.network is not None and system.network.needs_focal and assumed:
            guess = (
                f"focal length assumed for {assumed} of {len(pictures)} pictures (--fov says it)"
            )
            print(f"warning: {system.label}: {guess}", file=sys.stderr)
            system = replace(system, note="; ".join(filter(None, (system.note, guess))))
        opened.append(system.without_network())
        del system
        gc.collect()

    cases: list[Case] = []
    alignments: list[dict[str, None]] = [{} for _ in opened]
    for picture, *maps in zip(pictures, *predictions, strict=True):
        common = on_one_scale(maps, opened, picture.truth_m)
        for found, alignment in zip(alignments, common.alignments, strict=True):
            found[alignment] = None
        cases.append(
            Case(
                name=picture.name,
                image=picture.image,
                depths_m=common.depths_m,
                truth_m=picture.truth_m,
                region=picture.region,
                K_px=picture.K_px,
            )
        )
    systems = [
        System(
            label=one.label,
            predicts=one.predicts,
            weights=one.weights,
            alignment="; ".join(found),
            licence=one.licence,
            note=one.note,
            untrained=one.untrained,
        )
        for one, found in zip(opened, alignments, strict=True)
    ]
    has_truth = any(case.truth_m is not None for case in cases)
    table = measure(cases) if has_truth else None
    return Comparison(cases=cases, systems=systems, table=table, settings=settings)


def targets(pictures: Sequence[Picture], out: Path) -> list[Path]:
    """The files that ``write`` makes in any case."""
    return [
        *(out / name for name in (PAGE, FIGURES)),
        *(out / f"{picture.file_name}{SHEET_SUFFIX}" for picture in pictures),
    ]


def write(comparison: Comparison, out: Path, extras: Sequence[Extra] = ()) -> None:
    """Write the page, the sheets and the figures below ``out``, over what is there.

    Args:
        extras: what is written for every picture and system besides: aligned depth (float32) and
            point clouds.
    """
    out.mkdir(parents=True, exist_ok=True)
    systems = comparison.systems
    for case in comparison.cases:
        name = as_file_name(case.name)
        sheet(case, systems).save(out / f"{name}{SHEET_SUFFIX}")
        for system, depth_m in zip(systems, case.depths_m, strict=True):
            stem = f"{name}_{as_file_name(system.label)}"
            if "npy" in extras:
                write_atomic(out / f"{stem}_depth.npy", npy_bytes(depth_m))
            if "ply" in extras:
                write_atomic(out / f"{stem}_points.ply", _cloud(case, depth_m))
    write_page(out / PAGE, comparison.cases, systems, comparison.table)
    tables: Sequence[Table | None] = comparison.table or [None] * len(systems)
    figures = {
        "pictures": [case.name for case in comparison.cases],
        "settings": asdict(comparison.settings),
        "systems": [
            {**asdict(system), "figures": _plain(table)}
            for system, table in zip(systems, tables, strict=True)
        ],
    }
    text = json.dumps(figures, indent=1, allow_nan=False) + "\n"
    write_atomic(out / FIGURES, text.encode())


def _plain(table: Table | None) -> dict[str, dict[str, float | None]] | None:
    """What is not a number as null."""
    if table is None:
        return None
    return {
        region: {name: value if math.isfinite(value) else None for name, value in row.items()}
        for region, row in table.items()
    }


def _cloud(case: Case, depth_m: Float32[np.ndarray, "h w"]) -> bytes:
    usable = np.isfinite(depth_m) & (depth_m > 0)
    depth_m = np.where(usable, depth_m, np.float32(1))
    kept = usable & ~depth_edges(depth_m, ratio=_JUMP, radius=1)
    comments = ["flatdepth compare; x right, y up, z towards the viewer"]
    return ply_bytes(unproject(depth_m, case.camera)[kept], case.image[kept], comments)


def as_file_name(name: str) -> str:
    """A name with whatever a file's cannot have replaced."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
