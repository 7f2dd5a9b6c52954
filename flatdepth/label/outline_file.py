"""The LabelMe file beside a photograph, saved without losing what others put into it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from flatdepth.data.polygons import Outline, read_labelme, write_labelme
from flatdepth.errors import BadFrame, UserError
from flatdepth.show.pictures import write_atomic
from flatdepth.untrusted import parse_json


class Refused(UserError):
    """A file that is not ours to overwrite; the message says why and what can be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A shape of a LabelMe file as the marker's page knows it.

    Attributes:
        key: its own name while the marker runs; one that ``OutlineFile`` has not given is a new
            shape.
        label: what it is called.
        kind: ``shape_type`` of the file.
        corners: (n, 2) float64 of (u, v) in pixels of the upright photograph; None for what is no
            polygon or rectangle, which is kept as it is.
    """

    key: str
    label: str
    kind: str = "polygon"
    corners: Float64[np.ndarray, "_ 2"] | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """A shape that was read, all that the file says of it, and what of the photograph it is."""

    shape: Shape
    entry: Mapping[str, Any]
    outline: Outline


class OutlineFile:
    """The file NAME.json beside a photograph.

    Every version of it is known by its digest, None for no file; what is saved is saved over the
    version that was read or not at all.
    """

    def __init__(self, photo: Path, width: int, height: int) -> None:
        """``width`` and ``height`` are those of the upright photograph in pixels."""
        self.path = photo.with_suffix(".json")
        self._photo, self._width, self._height = photo, width, height
        self._known: dict[str, _Known] = {}

    def read(self) -> tuple[list[Shape], str | None]:
        """Its shapes in their order, and its digest.

        Raises:
            Refused: it is no LabelMe file, or one for another photograph.
        """
        payload = _payload(self.path)
        if payload is None:
            return [], None
        digest = hashlib.sha256(payload).hexdigest()
        found = self._parse(payload, digest)
        self._known |= {one.shape.key: one for one in found}
        return [one.shape for one in found], digest

    def outline(self, shape: Shape) -> Outline:
        """What of the photograph a shape is: also of a circle or a mask that was read."""
        if shape.corners is not None:
            return Outline(label=shape.label, parts=(shape.corners,))
        return self._expect_known(shape).outline

    def thing(self, shape: Shape) -> object:
        """Equal for the shapes that are one thing: those of one label and ``group_id``."""
        known = self._known.get(shape.key)
        group = None if known is None else known.entry.get("group_id")
        return shape.key if group is None else (shape.label, group)

    def save(self, shapes: Sequence[Shape], digest: str | None) -> str | None:
        """Write shapes over the version of that digest and return the new one.

        Fields that the marker does not know are kept, and so is everything about a shape whose
        corners and label are as they were. Nothing is written where nothing has to be.

        Raises:
            Refused: the file is another one meanwhile, or none.
            UserError: a shape without corners is in no version of the file.
        """
        payload = _payload(self.path)
        if digest != (None if payload is None else hashlib.sha256(payload).hexdigest()):
            raise Refused(
                f"{self.path.name}: another program changed it meanwhile; take its outlines, or "
                "set it aside and keep yours"
            )
        if payload is None and not shapes:
            return None
        empty = write_labelme([], self._photo.name, self._width, self._height)
        about = parse_json(empty if payload is None else payload)
        about["shapes"] = [self._entry(shape) for shape in shapes]
        data = json.dumps(about, indent=1).encode() + b"\n"
        if data != payload:
            write_atomic(self.path, data)
        return hashlib.sha256(data).hexdigest()

    def set_aside(self) -> Path:
        """Rename the file to NAME.json.N.bak, the first N that is free, and return that path."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}.bak")).exists():
            number += 1
        return self.path.rename(target)

    def _parse(self, payload: bytes, digest: str) -> list[_Known]:
        try:
            read_labelme(payload, self._width, self._height)
            known = []
            for number, entry in enumerate(parse_json(payload)["shapes"]):
                alone = json.dumps({"shapes": [entry]}).encode()
                (outline,) = read_labelme(alone, self._width, self._height)
                kind = str(entry.get("shape_type") or "polygon")
                is_drawn = kind in ("polygon", "rectangle") and not outline.is_empty
                shape = Shape(
                    key=f"{digest[:12]}.{number}",
                    label=str(entry["label"]),
                    kind=kind,
                    corners=outline.parts[0] if is_drawn else None,
                )
                known.append(_Known(shape, entry, outline))
        except BadFrame as error:
            raise _not_ours(self.path, error) from error
        return known

    def _entry(self, shape: Shape) -> Mapping[str, Any]:
        """What the file will say of a shape."""
        if shape.corners is None:
            return self._expect_known(shape).entry
        known = self._known.get(shape.key)
        entry: dict[str, Any]
        fresh = write_labelme([self.outline(shape)], "", self._width, self._height)
        (entry,) = parse_json(fresh)["shapes"]
        if known is None:
            return entry
        corners = known.shape.corners
        if (
            corners is not None
            and shape.label == known.shape.label
            and np.array_equal(shape.corners, corners)
        ):
            return known.entry
        changed = {name: entry[name] for name in ("label", "points", "shape_type")}
        return {**known.entry, **changed}

    def _expect_known(self, shape: Shape) -> _Known:
        if shape.key not in self._known:
            raise UserError(f"{self.path.name}: it has no such {shape.kind}; load it again")
        return self._known[shape.key]


def labels_beside(photo: Path) -> list[str]:
    """The labels of the outlines in the LabelMe file beside a photograph.

    Raises:
        Refused: it is no LabelMe file.
    """
    path = photo.with_suffix(".json")
    payload = _payload(path)
    if payload is None:
        return []
    try:
        about = parse_json(payload)
        size = [int(about.get(side) or 1) for side in ("imageWidth", "imageHeight")]
        return [one.label for one in read_labelme(payload, *size)]
    except (AttributeError, TypeError, ValueError, OverflowError, BadFrame) as error:
        raise _not_ours(path, error) from error


def _payload(path: Path) -> bytes | None:
    if path.is_symlink():
        raise Refused(f"{path.name}: it is a link; put the file itself in its place")
    return path.read_bytes() if path.exists() else None


def _not_ours(path: Path, error: Exception) -> Refused:
    return Refused(
        f"{path.name}: expected a LabelMe file for this photograph, found {error}; it stays as it "
        "is: move it away, or set it aside"
    )
