"""What the marker knows: the photographs of a folder, their outlines, depth and planes.

Photographs are upright and numbered from 0; pixels of outlines are those of the full resolution.
All of it may be called from many threads.
"""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Float64, UInt8
from PIL import Image

from flatdepth.data.polygons import NAMES, Outline, united
from flatdepth.errors import UserError
from flatdepth.label.outline_file import OutlineFile, Refused, Shape, labels_beside
from flatdepth.label.planes import Thing, examine
from flatdepth.predict.inputs import Photo, find_inputs, open_photo
from flatdepth.predict.predictor import (
    DepthModel,
    PredictOptions,
    choose_camera,
    input_of,
    predict_photo,
)
from flatdepth.predict.teacher import metres_of
from flatdepth.show.pictures import colour_depth, depth_limits
from flatdepth.types import Region

SHOWN_PX = 2000
"""Longer side at which a photograph is shown and given to the model, at most."""
DEPTH_PX = 768
"""Longer side at which planes are fitted, at most: networks know little more than that."""
Made = TypeVar("Made")
_FLAT = (Region.MIRROR, Region.ART)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where the labelling of a photograph stands.

    Attributes:
        name: of its file, '/'-separated below the folder.
        outlines: how many of its outlines have a label that is understood.
        things: how many of them are mirrors, pictures or screens.
        trouble: what is wrong, or None; of its planes it is known once they were fitted.
    """

    name: str
    outlines: int
    things: int
    trouble: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The outlines of a photograph.

    Attributes:
        width, height: of the photograph in pixels.
        shapes: all that its LabelMe file holds.
        digest: of the file; None if there is none.
        trouble: why the file is neither read nor written, or None.
    """

    width: int
    height: int
    shapes: Sequence[Shape]
    digest: str | None
    trouble: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """What ``planes.examine`` found in a photograph.

    Attributes:
        things: ``place`` counts the shapes.
        planed: (h, w) float32, the depth with the planes.
        metric: whether the unit is metres; else they are made up.
        camera: where the intrinsics come from.
        limits: the depths at the ends of the colours.
    """

    things: Sequence[Thing]
    planed: Float32[np.ndarray, "h w"]
    metric: bool
    camera: str
    limits: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A photograph reduced to ``SHOWN_PX``, and its own size in pixels."""

    photo: Photo
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Depth:
    """Predicted depth, reduced to ``DEPTH_PX``, its intrinsics, and what ``Planes`` says of it."""

    depth_m: Float32[np.ndarray, "h w"]
    K_px: Float64[np.ndarray, "3 3"]
    camera: str
    limits: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.depth_m.shape
        return height, width


class Session:
    """The photographs of a folder while they are labelled."""

    def __init__(
        self, folder: Path, model: DepthModel, options: PredictOptions, device: torch.device
    ) -> None:
        """
        Args:
            folder: searched to the bottom, without hidden files and links that lead out of it.
            model: on ``device``, in evaluation mode; metric or relative.

        Raises:
            UserError: there are no photographs, or planes are not flat in what the model predicts.
        """
        if model.kind == "affine":
            raise UserError(
                "--model: the weights predict depth up to scale and shift, in which planes are not "
                "flat; take metric or relative ones"
            )
        if not folder.is_dir():
            raise UserError(f"{folder}: expected a folder with photographs, found none")
        root = folder.resolve()
        found = [one.path for one in find_inputs([str(folder)], root / ".none")]
        self.photos = [path for path in found if root in path.resolve().parents]
        if not self.photos:
            raise UserError(f"{folder}: its photographs are links out of it; name their own folder")
        base = Path(os.path.abspath(folder))  # noqa: PTH100  # as find_inputs, links as they are
        self.names = [path.relative_to(base).as_posix() for path in self.photos]
        self._model, self._options, self._device = model, options, device
        self._files: dict[int, OutlineFile] = {}
        self._troubles: dict[int, str | None] = {}
        self._owners: dict[Path, Path] = {}
        for photo in self.photos:
            self._owners.setdefault(photo.with_suffix(""), photo)
        # a file can be saved and another photograph shown while the model computes
        self._saving, self._opening, self._predicting = Lock(), Lock(), Lock()
        self._opened = _one_at_a_time(self._opening, 4, self._open)
        self._depths = _one_at_a_time(self._predicting, 32, self._predict)

    @property
    def metric(self) -> bool:
        return self._model.kind == "metric"

    def states(self) -> list[State]:
        """Of all photographs, by their files as they are now."""
        return [self.state(number) for number in range(len(self.photos))]

    def labelled(self) -> int:
        """How many photographs have outlines."""
        return sum(state.outlines > 0 for state in self.states())

    def shown(self, number: int) -> bytes:
        """A photograph as a JPEG of at most ``SHOWN_PX``. Raises BadFrame if it is damaged."""
        return _encoded(self._opened(number).photo.image, "JPEG")

    def depth(self, number: int) -> bytes:
        """The depth of a photograph as predicted, in colours, as WebP. Raises as ``planes``."""
        found = self._depths(number)
        return self._coloured(found.depth_m, found.limits)

    def document(self, number: int) -> Document:
        """The outlines of a photograph. Raises BadFrame if the photograph is damaged."""
        opened = self._opened(number)
        shapes: list[Shape] = []
        digest = trouble = None
        try:
            with self._saving:
                shapes, digest = self._file(number).read()
        except Refused as refusal:
            trouble = str(refusal)
        return Document(
            width=opened.width,
            height=opened.height,
            shapes=shapes,
            digest=digest,
            trouble=trouble,
        )

    def save(self, number: int, shapes: Sequence[Shape], digest: str | None) -> str | None:
        """Save the outlines of a photograph over the version of that digest; returns the new one.

        Raises:
            Refused: the file is another one meanwhile, or none of ours.
        """
        with self._saving:
            return self._file(number).save(shapes, digest)

    def set_aside(self, number: int) -> str:
        """Rename the LabelMe file of a photograph so that it is kept, and return its new name."""
        with self._saving:
            return self._file(number).set_aside().name

    def planes(self, number: int, shapes: Sequence[Shape]) -> Planes:
        """The planes of outlines, saved or not, in depth as ``flatdepth pack photos`` takes it.

        Raises:
            BadFrame: the photograph is damaged, its depth not finite, or there are too many things.
            UserError: a shape without corners is in no version of the file.
        """
        found, file = self._depths(number), self._file(number)
        groups: dict[object, list[int]] = {}
        for place, shape in enumerate(shapes):
            groups.setdefault(file.thing(shape), []).append(place)
        places = [group[0] for group in groups.values()]
        outlines = [
            united([self._reduced(number, file.outline(shapes[one])) for one in group], *found.size)
            for group in groups.values()
        ]
        things, planed = examine(found.depth_m, found.K_px, outlines)
        first = next((one.trouble for one in things if one.trouble), None)
        self._troubles[number] = first
        return Planes(
            things=[replace(one, place=places[one.place]) for one in things],
            planed=planed,
            metric=self.metric,
            camera=found.camera,
            limits=found.limits,
        )

    def coloured(self, planes: Planes) -> bytes:
        """The depth with planes in the colours of ``depth``, as WebP; grey where it is unknown."""
        return self._coloured(planes.planed, planes.limits)

    def _reduced(self, number: int, outline: Outline) -> Outline:
        """An outline in pixels of the depth map."""
        opened, (height, width) = self._opened(number), self._depths(number).size
        scale = np.array([width / opened.width, height / opened.height])
        mask = outline.mask
        if mask is not None:
            rows, columns = (
                (np.arange(n) + 0.5) / s for n, s in ((height, scale[1]), (width, scale[0]))
            )
            mask = mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
        return replace(outline, parts=tuple(part * scale for part in outline.parts), mask=mask)

    @staticmethod
    def _coloured(depth_m: Float32[np.ndarray, "h w"], limits: tuple[float, float]) -> bytes:
        return _encoded(colour_depth(depth_m, low_m=limits[0], high_m=limits[1]), "WEBP")

    def state(self, number: int) -> State:
        """Of one photograph."""
        trouble = self._troubles.get(number)
        labels: list[str] = []
        try:
            self._expect_own_file(number)
            labels = labels_beside(self.photos[number])
        except Refused as refusal:
            trouble = str(refusal)
        kinds = [NAMES[name] for label in labels if (name := label.strip().lower()) in NAMES]
        things = sum(kind in _FLAT for kind in kinds)
        return State(name=self.names[number], outlines=len(kinds), things=things, trouble=trouble)

    def _file(self, number: int) -> OutlineFile:
        self._expect_own_file(number)
        if number not in self._files:
            opened = self._opened(number)
            photo = self.photos[number]
            self._files[number] = OutlineFile(photo, opened.width, opened.height)
        return self._files[number]

    def _expect_own_file(self, number: int) -> None:
        photo = self.photos[number]
        first = self._owners[photo.with_suffix("")]
        if first != photo:
            raise Refused(
                f"{photo.name}: its outlines would be in the file of {first.name}; rename one"
            )

    def _open(self, number: int) -> _Opened:
        photo = open_photo(self.photos[number], self._options.image_bits)
        height, width = photo.image.shape[:2]
        small = Image.fromarray(photo.image)
        small.thumbnail((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
        focal_px = photo.focal_px and photo.focal_px * small.width / width
        reduced = Photo(image=np.asarray(small), focal_px=focal_px)
        return _Opened(photo=reduced, width=width, height=height)

    def _predict(self, number: int) -> _Depth:
        photo = self._opened(number).photo
        field = predict_photo(self._model, photo, self._options, self._device).field
        height, width = field.shape
        camera = choose_camera(photo.focal_px, height, width, self._options)
        scale = min(1.0, DEPTH_PX / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        small = F.interpolate(
            torch.from_numpy(field)[None, None], size, mode="bilinear", antialias=True
        )[0, 0].numpy()
        way = input_of(self._model, self._options)
        reach_m = self._model.reach_m(camera.focal_px * way.focal_scale(height, width))
        depth_m = metres_of(small, self._model.kind, reach_m)
        to_small = np.diag([size[1] / width, size[0] / height, 1.0])
        return _Depth(
            depth_m=depth_m,
            K_px=to_small @ camera.K_px,
            camera=camera.origin,
            limits=depth_limits(depth_m, np.ones(size, bool)),
        )


def _one_at_a_time(
    lock: AbstractContextManager[object], kept: int, make: Callable[[int], Made]
) -> Callable[[int], Made]:
    """``make`` with the last few of its results kept, called by one thread at a time."""
    cached = lru_cache(kept)(make)

    def get(number: int) -> Made:
        with lock:
            return cached(number)

    return get


def _encoded(image: UInt8[np.ndarray, "h w 3"], kind: Literal["JPEG", "WEBP"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, quality=88)
    return buffer.getvalue()
