"""Outlines of mirrors, pictures and screens, drawn by hand on photographs, as region maps.

Outlines lie in LabelMe's JSON files, one beside each photograph: that is what ``flatdepth label``
writes and what LabelMe itself reads. Coordinates are those of ``flatdepth.types``: the centre of
the first pixel is at (0.5, 0.5).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from flatdepth.errors import BadFrame
from flatdepth.types import Region
from flatdepth.untrusted import parse_json

NAMES: Mapping[str, Region] = {
    "mirror": Region.MIRROR,
    **dict.fromkeys(
        ("art", "picture", "painting", "poster", "photo", "mural", "screen"), Region.ART
    ),
    "frame": Region.FRAME,
    **dict.fromkeys(("decoy", "opening", "window", "doorway"), Region.DECOY),
    **dict.fromkeys(("background", "object"), Region.BACKGROUND),
}
"""Labels that are understood. An object in front of a mirror is drawn after it, as background."""

MOST_THINGS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """One labelled thing.

    Attributes:
        label: what it was called.
        parts: closed polygons, (n, 2) float64 of (u, v) in pixels each. A pixel belongs to the
            thing if its centre is inside an odd number of them, so a part in another is a hole.
    """

    label: str
    parts: tuple[Float64[np.ndarray, "_ 2"], ...]


def read_labelme(payload: bytes, width: int, height: int) -> list[Outline]:
    """The outlines of a LabelMe file: its polygons and rectangles, other shapes are passed over.

    Args:
        payload: the file.
        width, height: of the photograph in pixels.

    Raises:
        BadFrame: it is no such file, or one for a photograph of another size.
    """
    try:
        about: dict[str, Any] = parse_json(payload)
        size = (int(about.get("imageWidth") or width), int(about.get("imageHeight") or height))
        outlines = [
            Outline(label=str(shape["label"]), parts=(_corners(shape),))
            for shape in about["shapes"]
            if shape.get("shape_type", "polygon") in ("polygon", "rectangle")
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadFrame("outlines unreadable", f"{type(error).__name__}: {error}") from error
    if size != (width, height):
        raise BadFrame(
            "outlines are for another size",
            f"{size[0]}x{size[1]}, the image has {width}x{height}",
        )
    return outlines


def write_labelme(outlines: Iterable[Outline], image: str, width: int, height: int) -> bytes:
    """A LabelMe file of outlines of one part each.

    Args:
        image: file name of the photograph, which lies beside it.
        width, height: of the photograph in pixels.
    """
    shapes = [
        {
            "label": outline.label,
            "points": outline.parts[0].tolist(),
            "group_id": None,
            "shape_type": "polygon",
            "flags": {},
        }
        for outline in outlines
    ]
    about: dict[str, Any] = {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }
    return json.dumps(about, indent=1).encode() + b"\n"


def draw_outlines(
    outlines: Sequence[Outline],
    height: int,
    width: int,
    names: Mapping[str, Region] = NAMES,
) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"]]:
    """Region map and number map of outlines, later ones over earlier ones.

    Args:
        outlines: those whose label is not among ``names`` are passed over.
        names: label in lower case -> region.

    Returns:
        Values of ``Region``; and 1, 2, ... for the mirrors and pictures in the order of the
        outlines, 0 elsewhere (``FlatThings.number``).

    Raises:
        BadFrame: there are more than ``MOST_THINGS`` mirrors and pictures.
    """
    region, number = np.zeros((2, height, width), np.uint8)
    things = 0
    for outline in outlines:
        kind = names.get(outline.label.strip().lower())
        if kind is None:
            continue
        inside = _inside(outline.parts, height, width)
        is_thing = kind in (Region.MIRROR, Region.ART)
        things += is_thing
        if things > MOST_THINGS:
            raise BadFrame("too many outlines", f"more than {MOST_THINGS} mirrors and pictures")
        region[inside] = kind
        number[inside] = things if is_thing else 0
    return region, number


def _corners(shape: Mapping[str, object]) -> Float64[np.ndarray, "n 2"]:
    points = np.array(shape["points"], np.float64)
    is_rectangle = shape.get("shape_type") == "rectangle"
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points {shape['points']!r:.100}")
    if is_rectangle and len(points) == 2:
        (left, top), (right, bottom) = points
        points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if len(points) < 3:
        raise ValueError(f"{len(points)} points")
    return points


def _inside(
    parts: Iterable[Float64[np.ndarray, "_ 2"]], height: int, width: int
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose centre is inside an odd number of polygons (even-odd rule)."""
    crossings = np.zeros((height, width + 1), np.int32)
    for points in parts:
        for (u0, v0), (u1, v1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            first, last = (int(np.clip(np.ceil(v - 0.5), 0, height)) for v in sorted((v0, v1)))
            rows = np.arange(first, last)
            if len(rows):
                u = u0 + (rows + 0.5 - v0) * (u1 - u0) / (v1 - v0)
                columns = np.clip(np.ceil(u - 0.5), 0, width).astype(np.int64)
                np.add.at(crossings, (rows, columns), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1
