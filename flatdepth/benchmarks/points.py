"""Which of annotated points is nearer: DA-2K and the first layer of LayeredDepth."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from flatdepth.benchmarks.base import Benchmark, Case, Published, Row, Sample, Shot
from flatdepth.benchmarks.maps import Map
from flatdepth.data.readers.files import Tree, damage_named, read_bytes
from flatdepth.errors import BadFrame
from flatdepth.models.network import Kind
from flatdepth.predict.inputs import open_photo
from flatdepth.predict.predictor import PredictOptions, choose_camera
from flatdepth.untrusted import parse_json

Tuples = Int64[np.ndarray, "n k 2"]
"""n tuples of k points, nearest first; (column, row) of a pixel."""

SIZES = {"pairs": "pairs", "trips": "triplets", "quads": "quadruplets"}


def in_order(prediction: Map, kind: Kind, points: Tuples) -> Bool[np.ndarray, " n"]:
    """Which tuples a prediction puts in their order, from near to far; equal depths are wrong.

    Args:
        prediction: at the size of the picture that the points lie in.
    """
    values = prediction[points[..., 1], points[..., 0]].astype(np.float64)
    farther = np.diff(-values if kind == "relative" else values, axis=1)
    return (farther > 0).all(axis=1)


def _load(path: Path, tuples: Mapping[str, Tuples], *, drop: bool) -> Case:
    photo = open_photo(path)
    height, width = photo.image.shape[:2]
    kept: dict[str, Tuples] = {}
    for region, points in tuples.items():
        inside = ((points >= 0) & (points < (width, height))).all(axis=(1, 2))
        if not (drop or inside.all()):
            raise BadFrame("points outside the image", f"{path}: {width}x{height}")
        if inside.any():
            kept[region] = points[inside]
    focal_px = choose_camera(photo.focal_px, height, width, PredictOptions()).focal_px
    return Case([Shot(photo.image, focal_px)], partial(_score, kept))


def _score(tuples: Mapping[str, Tuples], maps: Sequence[Map], kind: Kind) -> Iterator[Row]:
    for region, points in tuples.items():
        accuracy = 100 * float(in_order(maps[0], kind, points).mean())
        yield Row(region, {"accuracy": accuracy}, len(points))


def _da_2k_samples(raw: Tree) -> Sequence[Sample]:
    top = next((top for top in ("", "DA-2K/") if raw.is_file(f"{top}annotations.json")), None)
    if top is None:
        return []
    url = raw.url(f"{top}annotations.json")
    with damage_named("annotations unreadable", url):
        pairs = {
            name: np.array([_nearer_first(pair) for pair in annotated], np.int64)
            for name, annotated in parse_json(read_bytes(url)).items()
        }
    found = []
    for name, points in pairs.items():
        scene = name.removeprefix("images/").split("/")[0]
        load = partial(_load, Path(raw.url(top + name)), {scene: points, "all": points}, drop=False)
        found.append(Sample(name, name, load))
    return found


def _nearer_first(pair: Mapping[str, Any]) -> list[list[int]]:
    """(column, row) of the nearer and of the farther point; the file has (row, column)."""
    nearer = pair["closer_point"]
    farther = {"point1": "point2", "point2": "point1"}[nearer]
    return [[int(pair[which][1]), int(pair[which][0])] for which in (nearer, farther)]


def _layered_samples(raw: Tree) -> Sequence[Sample]:
    ending = "tuples.json"
    return [
        Sample(stem.rstrip("./"), stem, partial(_load_layered, raw, stem))
        for stem in (path.removesuffix(ending) for path in raw.walk() if path.endswith(ending))
    ]


def _load_layered(raw: Tree, stem: str) -> Case:
    url = raw.url(f"{stem}tuples.json")
    with damage_named("tuples unreadable", url):
        first = parse_json(read_bytes(url))["layer_first"]
        tuples = {
            SIZES[size]: np.array(
                [
                    [one[f"p{number}"][:2] for number in range(1, points + 1)]
                    for one in first[size]
                    if one["is_real"]
                ],
                np.int64,
            ).reshape(-1, points, 2)
            for points, size in enumerate(SIZES, start=2)
        }
    return _load(Path(raw.url(f"{stem}image.png")), tuples, drop=True)


_RESOLUTION = (
    "prediction at the picture's size; no alignment; a tuple is right if depth rises strictly from "
    "point to point"
)

DA_2K = Benchmark(
    name="da_2k",
    protocol=(
        f"DA-2K, all pairs; {_RESOLUTION}; share of right pairs, each counting once, by scene type "
        "and over all. There is no official script. Pairs are where models disagree, so compare "
        "with the unmodified model, which is near the ceiling: this shows damage, not gain."
    ),
    layout="annotations.json and images/TYPE/",
    source="depth-anything/DA-2K on Hugging Face",
    samples=_da_2k_samples,
    things="pairs",
    units={"accuracy": "%"},
    compared=[
        (region, "accuracy") for region in ("all", "indoor", "outdoor", "transparent_reflective")
    ],
    published=[
        Published("DA-V2 Small", "P", (95.3, 92.9, 93.0, 94.4)),
        Published("DA-V2 Base", "P", (97.0, 96.2, 94.8, 96.3)),
        Published("DA-V2 Large", "P", (97.1, 96.4, 93.9, 96.3)),
        Published("DA-V1", "P", (88.5, None, None, None)),
        Published("Marigold", "P", (86.8, None, None, None)),
    ],
    remark="How the mean is weighted is not stated; the mean over pairs fits the rows by type.",
)

LAYERED_DEPTH = Benchmark(
    name="layered_depth",
    protocol=(
        f"LayeredDepth, validation split, tuples of the first layer (layer_first); {_RESOLUTION}; "
        "tuples that reach outside the image or are marked as not real are left out; share of "
        "right tuples over all images together, each tuple counting once."
    ),
    layout="N.image.png and N.tuples.json, or N/image.png and N/tuples.json, of the validation set",
    source="princeton-vl/LayeredDepth on Hugging Face",
    samples=_layered_samples,
    things="tuples",
    units={"accuracy": "%"},
    compared=[(region, "accuracy") for region in SIZES.values()],
    published=[
        Published("DPT-Large", "S", (77.999, 61.888, 56.198)),
        Published("SeeGroup", "S", (90.525, 82.282, 78.372)),
    ],
    remark="Figures of the test server, which others quote, do not compare with these.",
)
