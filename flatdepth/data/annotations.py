"""Files of outlines, recognised by their content: LabelMe, COCO instances, CVAT for images.

All three have the corner of the first pixel at (0, 0), which is the convention of
``flatdepth.types``: a pixel belongs to an outline if its centre does. COCO's lists of polygons are
united and have no holes; its run lengths go down the columns of the image, CVAT's along the rows of
a box (pycocotools 2.0.11, mask.py and maskApi.c; CVAT, xml_format.md).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import Bool, Float64

from flatdepth.data.components import components
from flatdepth.data.polygons import Outline, box, ellipse, no_area, place, read_labelme, united
from flatdepth.errors import BadFrame
from flatdepth.untrusted import parse_json, parse_xml

_DAMAGE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, IndexError)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlineFile:
    """What a file says of photographs.

    Attributes:
        kind: ``LabelMe``, ``COCO`` or ``CVAT``.
        photographs: path of each as the file has it -> its outlines, given its height and width.
            LabelMe's files are of one photograph, whatever its name: that is "".
        by_file: name of a file -> the paths that end in it.
    """

    kind: str
    photographs: Mapping[str, Callable[[int, int], list[Outline]]]
    by_file: Mapping[str, Sequence[str]]

    def outlines(self, image: str, height: int, width: int) -> list[Outline] | None:
        """The outlines on a photograph, in the order in which they are to be drawn.

        Args:
            image: '/'-separated path of the photograph; it is the one in the file whose path is
                the end of this one, or that this one is the end of.
            height, width: of the photograph in pixels.

        Returns:
            None if the file does not know the photograph.

        Raises:
            BadFrame: what it says is damaged or for another size, or several of its paths fit.
        """
        name = "" if self.kind == "LabelMe" else self._name(image)
        if name is None:
            return None
        try:
            return self.photographs[name](height, width)
        except _DAMAGE as error:
            detail = f"{name}: {type(error).__name__}: {error}"
            raise BadFrame("outlines unreadable", detail) from error

    def knows(self, image: str) -> bool:
        """Whether it has outlines of a photograph, or several that may be meant."""
        return self.kind == "LabelMe" or bool(self._names(image))

    def _name(self, image: str) -> str | None:
        names = self._names(image)
        if len(names) > 1:
            detail = f"{image} may be {' or '.join(names[:2])}"
            raise BadFrame("outlines of several photographs fit", detail)
        return names[0] if names else None

    def _names(self, image: str) -> Sequence[str]:
        """The paths of the longest common end."""
        parts = _parts(image)
        longest, names = 0, list[str]()
        for name in self.by_file.get(parts[-1], ()):
            own = _parts(name)
            shared = min(len(parts), len(own))
            if own[-shared:] == parts[-shared:] and shared >= longest:
                names = [*names, name] if shared == longest else [name]
                longest = shared
        return names


def _outline_file(
    kind: str, photographs: Iterable[tuple[str, Callable[[int, int], list[Outline]]]]
) -> OutlineFile:
    outlines = dict(photographs)
    by_file = defaultdict(list)
    for name in outlines:
        by_file[(_parts(name) or [""])[-1]].append(name)
    return OutlineFile(kind=kind, photographs=outlines, by_file=by_file)


def parse_outlines(payload: bytes) -> OutlineFile:
    """Recognise a file and find its photographs.

    Raises:
        BadFrame: it is none of the three kinds, or damaged.
    """
    try:
        if payload.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            return _parse_cvat(parse_xml(payload))
        about = parse_json(payload)
        if "shapes" in about:
            one = lambda height, width: read_labelme(payload, width, height)  # noqa: E731
            return _outline_file("LabelMe", [("", one)])
        if "annotations" in about and "images" in about:
            return _parse_coco(about)
    except _DAMAGE as error:
        raise BadFrame("outlines unreadable", f"{type(error).__name__}: {error}") from error
    raise BadFrame("outlines unreadable", "neither LabelMe, COCO instances nor CVAT for images")


def decode_rle(counts: Sequence[int] | str, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """A mask from COCO's run lengths, of 0 and 1 in turn, down one column after the other.

    Args:
        counts: the lengths, or COCO's text of them: of each number, less that two before it from
            the fourth on, 5 bits per character from 48 on, lowest first, 32 added to all
            characters but its last, whose 16 is the sign.

    Raises:
        ValueError: the lengths are not those of so many pixels.
    """
    runs = _from_text(counts) if isinstance(counts, str) else [int(count) for count in counts]
    return _unroll(runs, width, height).T


# The kinds of file.


def _parse_coco(about: Mapping[str, Any]) -> OutlineFile:
    labels = {one["id"]: str(one["name"]) for one in about["categories"]}
    drawn = defaultdict(list)
    for annotation in about["annotations"]:
        drawn[annotation["image_id"]].append(annotation)

    def reading(image: Mapping[str, Any]) -> Callable[[int, int], list[Outline]]:
        def outlines(height: int, width: int) -> list[Outline]:
            _expect_size(image.get("width", width), image.get("height", height), height, width)
            return [
                outline
                for annotation in drawn[image["id"]]
                for outline in _of_annotation(
                    labels[annotation["category_id"]], annotation, height, width
                )
            ]

        return outlines

    return _outline_file(
        "COCO", ((str(image["file_name"]), reading(image)) for image in about["images"])
    )


def _of_annotation(
    label: str, annotation: Mapping[str, Any], height: int, width: int
) -> list[Outline]:
    """One outline, or one of each connected part of what is marked as a crowd."""
    shape = annotation.get("segmentation")
    if isinstance(shape, Mapping):
        if [int(side) for side in shape["size"]] != [height, width]:
            raise ValueError(f"run lengths for {shape['size']}")
        whole = Outline(label=label, mask=decode_rle(shape["counts"], height, width))
    else:
        polygons = [np.array(flat, np.float64) for flat in shape or ()]
        parts = [flat.reshape(-1, 2) for flat in polygons if flat.size >= 6 and flat.size % 2 == 0]
        if not parts or not all(np.isfinite(part).all() for part in parts):
            return [no_area(label, "no outline")]
        whole = united([Outline(label=label, parts=(part,)) for part in parts], height, width)
    if not annotation.get("iscrowd"):
        return [whole]
    parted = components(whole.inside(height, width).astype(np.uint8))
    numbers = range(1, int(parted.max()) + 1)
    return [Outline(label=label, mask=parted == number) for number in numbers]


def _parse_cvat(root: Element) -> OutlineFile:
    images = root.findall("image")
    if root.tag != "annotations" or (not images and root.find("track") is not None):
        found = "a CVAT file for video" if root.tag == "annotations" else f"<{root.tag}>"
        raise ValueError(f"expected CVAT for images 1.1, found {found}")

    def reading(image: Element) -> Callable[[int, int], list[Outline]]:
        def outlines(height: int, width: int) -> list[Outline]:
            _expect_size(image.get("width", width), image.get("height", height), height, width)
            shapes = [shape for shape in image if shape.get("label") is not None]
            shapes.sort(key=lambda shape: float(shape.get("z_order", 0)))
            return [_of_element(shape, height, width) for shape in shapes]

        return outlines

    return _outline_file("CVAT", ((image.attrib["name"], reading(image)) for image in images))


def _of_element(shape: Element, height: int, width: int) -> Outline:
    label = shape.attrib["label"]

    def numbers(*names: str) -> list[float]:
        return [float(shape.attrib[name]) for name in names]

    if shape.tag == "mask":
        left, top, columns, rows = (int(n) for n in numbers("left", "top", "width", "height"))
        if not (0 < columns <= width and 0 < rows <= height):
            raise ValueError(f"a mask of {columns}x{rows} pixels")
        runs = [int(run) for run in shape.attrib["rle"].split(",")]
        return Outline(
            label=label, mask=place(_unroll(runs, rows, columns), left, top, height, width)
        )
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in shape.attrib["points"].split(";")]
        points = np.array(pairs, np.float64).reshape(-1, 2)
    elif shape.tag == "box":
        points = box(*numbers("xtl", "ytl", "xbr", "ybr"))
    elif shape.tag == "ellipse":
        points = ellipse(*numbers("cx", "cy", "rx", "ry"))
    else:
        return no_area(label, shape.tag)
    points = _rotated(points, float(shape.get("rotation", 0)))
    if not np.isfinite(points).all():
        raise ValueError(f"a {shape.tag} of {label} with points that are no numbers")
    return Outline(label=label, parts=(points,)) if len(points) > 2 else no_area(label, "2 points")


def _rotated(points: Float64[np.ndarray, "n 2"], degrees: float) -> Float64[np.ndarray, "n 2"]:
    """Points turned clockwise in the image about the middle of what they enclose."""
    if not degrees:
        return points
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    return (points - middle) @ np.array([[cos, sin], [-sin, cos]]) + middle


def _expect_size(said_width: Any, said_height: Any, height: int, width: int) -> None:
    if (int(said_width), int(said_height)) != (width, height):
        detail = f"{said_width}x{said_height}, the image has {width}x{height}"
        raise BadFrame("outlines are for another size", detail)


def _from_text(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"run lengths with {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs


def _unroll(runs: Sequence[int], rows: int, columns: int) -> Bool[np.ndarray, "rows columns"]:
    """Run lengths of 0 and 1 in turn, along the rows."""
    if min(runs, default=0) < 0 or sum(runs) != rows * columns:
        raise ValueError(f"run lengths of {sum(runs)} pixels for {columns}x{rows}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(rows, columns)


def _parts(path: str) -> list[str]:
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
