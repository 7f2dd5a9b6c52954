"""Outlines of mirrors, pictures and screens, drawn by hand on photographs, as region maps.

Outlines lie in LabelMe's JSON files, one beside each photograph: that is what ``flatdepth label``
writes and what LabelMe itself reads. ``data.annotations`` reads other files. Coordinates are those
of ``flatdepth.types``: the centre of the first pixel is at (0.5, 0.5).
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, UInt8
from PIL import Image

from flatdepth.errors import BadFrame
from flatdepth.types import Region
from flatdepth.untrusted import parse_json

ILLUSION = "illu"
"""What 3D-Mirage calls pictures on the ground and on walls; one in another is a hole."""

NAMES: Mapping[str, Region] = {
    "mirror": Region.MIRROR,
    **dict.fromkeys(
        ("art", "picture", "painting", "poster", "photo", "mural", "screen", ILLUSION), Region.ART
    ),
    "frame": Region.FRAME,
    **dict.fromkeys(("decoy", "opening", "window", "doorway"), Region.DECOY),
    **dict.fromkeys(("background", "_background_", "object"), Region.BACKGROUND),
}
"""Labels that are understood. An object in front of a mirror is drawn after it, as background."""

MOST_THINGS = 255

_FAR_PX = 1e7  # so that no difference of damaged coordinates overflows


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """One labelled thing.

    Attributes:
        label: what it was called.
        parts: closed polygons, (n, 2) float64 of (u, v) in pixels each. A pixel belongs to the
            thing if its centre is inside an odd number of them, so a part in another is a hole.
        mask: (H, W) bool, the pixels of the thing, in place of parts where a file says these.
    """

    label: str
    parts: tuple[Float64[np.ndarray, "_ 2"], ...] = ()
    mask: Bool[np.ndarray, "h w"] | None = None

    @property
    def is_empty(self) -> bool:
        return self.mask is None and not self.parts

    def inside(self, height: int, width: int) -> Bool[np.ndarray, "h w"]:
        """The pixels of a photograph of this size that belong to it."""
        return _inside(self.parts, height, width) if self.mask is None else self.mask


def united(outlines: Sequence[Outline], height: int, width: int) -> Outline:
    """One outline of all that is inside one of these, called as the first."""
    if len(outlines) == 1:
        return outlines[0]
    mask = np.logical_or.reduce([outline.inside(height, width) for outline in outlines])
    return Outline(label=outlines[0].label, mask=mask)


def no_area(label: str, why: str) -> Outline:
    """What was drawn but surrounds nothing; its label is one that nobody understands."""
    return Outline(label=f"{label} ({why})")


def unknown_labels(
    outlines: Iterable[Outline], names: Mapping[str, Region] = NAMES
) -> Counter[str]:
    """The labels that are not among ``names``, and how many outlines have each."""
    return Counter(one.label for one in outlines if one.label.strip().lower() not in names)


def read_labelme(payload: bytes, width: int, height: int) -> list[Outline]:
    """The outlines of a LabelMe file: polygons, rectangles, circles and masks.

    Shapes of one label and ``group_id`` are one thing. Other shapes, and those of fewer points than
    surround something, have a label that says so (``no_area``). A polygon of 3D-Mirage's label
    that lies in another is a hole of it.

    Args:
        payload: the file.
        width, height: of the photograph in pixels, upright, as LabelMe shows it.

    Raises:
        BadFrame: it is no such file, or one for a photograph of another size.
    """
    try:
        about: dict[str, Any] = parse_json(payload)
        size = (int(about.get("imageWidth") or width), int(about.get("imageHeight") or height))
        shapes = list(about["shapes"])
        if size != (width, height):
            raise BadFrame(
                "outlines are for another size",
                f"{size[0]}x{size[1]}, the image has {width}x{height}",
            )
        groups: dict[tuple[object, ...], list[Outline]] = {}
        for place, shape in enumerate(shapes):
            outline = _of_shape(shape, height, width)
            group = shape.get("group_id")
            alone = ("alone", place) if group is None or outline.is_empty else (group,)
            groups.setdefault((outline.label, *alone), []).append(outline)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        raise BadFrame("outlines unreadable", f"{type(error).__name__}: {error}") from error
    return _with_holes([united(group, height, width) for group in groups.values()])


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
        inside = outline.inside(height, width)
        is_thing = kind in (Region.MIRROR, Region.ART)
        things += is_thing
        if things > MOST_THINGS:
            raise BadFrame("too many outlines", f"more than {MOST_THINGS} mirrors and pictures")
        region[inside] = kind
        number[inside] = things if is_thing else 0
    return region, number


def _of_shape(shape: Mapping[str, Any], height: int, width: int) -> Outline:
    label, kind = str(shape["label"]), str(shape.get("shape_type") or "polygon")
    points = np.array(shape["points"], np.float64).reshape(len(shape["points"]), 2)
    if not np.isfinite(points).all():
        raise ValueError(f"points {shape['points']!r:.100}")
    if kind == "mask":
        return Outline(label=label, mask=_pasted(shape["mask"], points, height, width))
    if kind not in ("polygon", "rectangle", "oriented_rectangle", "circle"):
        return no_area(label, kind)
    if kind == "circle" and len(points) == 2:
        points = ellipse(*points[0], *[np.hypot(*(points[1] - points[0]))] * 2)
    elif kind == "rectangle" and len(points) == 2:
        points = box(*points[0], *points[1])
    if len(points) < 3:
        return no_area(label, f"{len(points)} points")
    return Outline(label=label, parts=(points,))


def box(left: float, top: float, right: float, bottom: float) -> Float64[np.ndarray, "4 2"]:
    """The corners of an upright rectangle."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return np.array(corners, np.float64)


def ellipse(cx: float, cy: float, rx: float, ry: float) -> Float64[np.ndarray, "_ 2"]:
    """A polygon of 90 corners in place of an upright ellipse, smaller by 0.08 %."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _pasted(
    png: str, points: Float64[np.ndarray, "_ 2"], height: int, width: int
) -> Bool[np.ndarray, "h w"]:
    """The mask of a LabelMe shape: a PNG in base64 whose first pixel is at its first point."""
    with Image.open(io.BytesIO(base64.b64decode(png)), formats=("PNG",)) as image:
        if image.width > width or image.height > height:
            raise ValueError(f"a mask of {image.width}x{image.height} pixels")
        patch = np.asarray(image.convert("L")) > 0
    left, top = (round(value) for value in points[0])
    return place(patch, left, top, height, width)


def place(
    patch: Bool[np.ndarray, "_ _"], left: int, top: int, height: int, width: int
) -> Bool[np.ndarray, "h w"]:
    """A mask of a whole photograph from one of a box in it; what is outside of it is cut off."""
    whole = np.zeros((height, width), bool)
    rows, columns = np.nonzero(patch)
    rows, columns = rows + top, columns + left
    seen = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    whole[rows[seen], columns[seen]] = True
    return whole


def _with_holes(outlines: Sequence[Outline]) -> list[Outline]:
    """Outlines of 3D-Mirage that lie in another, made holes of that."""
    found = list(outlines)
    drawn = [i for i, one in enumerate(found) if one.label == ILLUSION and len(one.parts) == 1]
    holes: dict[int, int] = {}
    for inner in drawn:
        for outer in drawn:
            if inner != outer and outer not in holes and _surrounds(found[outer], found[inner]):
                holes[inner] = outer
    for inner, outer in holes.items():
        found[outer] = replace(found[outer], parts=(*found[outer].parts, *found[inner].parts))
    return [one for i, one in enumerate(found) if i not in holes]


def _surrounds(outer: Outline, inner: Outline) -> bool:
    """Whether all corners of ``inner`` are inside ``outer``, by crossings of a ray to the right."""
    (u, v), (a_u, a_v) = inner.parts[0].T[:, :, None], outer.parts[0].T
    b_u, b_v = np.roll(a_u, -1), np.roll(a_v, -1)
    crosses = (a_v <= v) != (b_v <= v)
    with np.errstate(divide="ignore", invalid="ignore"):
        right = u < a_u + (v - a_v) * (b_u - a_u) / (b_v - a_v)
    return bool(((crosses & right).sum(axis=1) % 2 == 1).all())


def _inside(
    parts: Iterable[Float64[np.ndarray, "_ 2"]], height: int, width: int
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose centre is inside an odd number of polygons (even-odd rule)."""
    crossings = np.zeros((height, width + 1), np.int32)
    for points in parts:
        corners = points.clip(-_FAR_PX, _FAR_PX)
        for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            first, last = (int(np.clip(np.ceil(v - 0.5), 0, height)) for v in sorted((v0, v1)))
            rows = np.arange(first, last)
            if len(rows):
                u = u0 + (rows + 0.5 - v0) * (u1 - u0) / (v1 - v0)
                columns = np.clip(np.ceil(u - 0.5), 0, width).astype(np.int64)
                np.add.at(crossings, (rows, columns), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1
