"""Photographs without depth as training data: the depth of a frozen network at packing.

The network, called the teacher, is fooled by mirrors and pictures. Where these are labelled, their
planes come from the depth around them, which it reads well; everywhere else the set teaches what
the teacher knows already.
"""

import io
import math
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    EXTENSIONS,
    HEAD_BYTES,
    OTHER_IMAGES,
    Picture,
    Tree,
    damage_named,
    ending,
    image_formats,
    make_key,
    read_art,
    read_bytes,
    relative_paths,
    sort_items,
    warn_of_unread,
)
from flatdepth.data.readers.labels import (
    DEFAULT_NAMES,
    Labels,
    check_names,
    forget_files,
    look_at_labels,
    read_labels,
    with_labels,
)
from flatdepth.data.readers.patterns import beside, is_scene_rule, match, scene_of, wildcards
from flatdepth.data.shards.codec import decode_image, encode_log_u16
from flatdepth.errors import BadFrame, UserError, expect_within
from flatdepth.geometry import off_centre
from flatdepth.models.checkpoint import open_model, weight_digest
from flatdepth.models.network import Kind
from flatdepth.models.precision import chosen_device
from flatdepth.predict.inputs import Photo, upright
from flatdepth.predict.outputs import Camera
from flatdepth.predict.predictor import (
    DepthModel,
    PredictOptions,
    choose_camera,
    doubt,
    input_of,
    predict_photo,
)
from flatdepth.types import RawFrame

MEDIAN_M = 3.0
"""Median depth that is made up for a relative teacher, which knows no metres."""
NEAR_M, FAR_M = 0.05, 200.0
BEYOND = 0.98
"""Of the greatest depth that a metric teacher can say: what it says of the sky."""


@dataclass(frozen=True, slots=True)
class PhotosReader:
    """Photographs with the depth that a teacher predicts, upright and at their own size.

    Mirrors and pictures that are labelled get the plane that fits the teacher's depth around them;
    without labels a photograph is one of which nothing is known. JPEG, PNG and WebP are stored as
    they are, others and turned ones as JPEG. The camera is that of the options, else of the EXIF
    data, else 60 degrees are assumed.
    """

    raw: str
    """Directory or URL that the patterns start from."""
    teacher: str = field(kw_only=True)
    """Weight file, its folder or a hub id, as for ``flatdepth predict``: metric or relative. Depth
    of a relative one is its prediction q as z = s / q with a median of 3 m, so that planes stay
    planes: to train relative networks on."""
    image_glob: str = field(default="**/*.*", kw_only=True)
    """Pattern of the photographs; of what it matches, images are taken."""
    region_glob: str = field(default="", kw_only=True)
    """Pattern of region maps: images or arrays of the photographs' size whose numbers or colours
    ``region_names`` explains. Its wildcards stand for the same text as the first ones of
    ``image_glob``, so that ``**/*.png`` goes with ``**/*.jpg``."""
    polygon_glob: str = field(default="", kw_only=True)
    """Pattern of files of outlines, in place of region maps: LabelMe (``**/*.json``), COCO
    instances or CVAT for images; without wildcards it is one file for all."""
    region_names: str = field(default=DEFAULT_NAMES, kw_only=True)
    """What labels mean, as for ``flatdepth pack folder``."""
    bad_planes: Literal["ignore", "skip"] = field(default="ignore", kw_only=True)
    """What happens where no plane can be trusted. ``ignore``: the thing has no truth, and is
    named; ``skip``: the photograph is left out."""
    max_side: int = field(default=0, kw_only=True)
    """Larger photographs are shrunk to this many pixels; 0: never."""
    fov_deg: float = field(default=0.0, kw_only=True)
    """Horizontal field of view in degrees; 0: by EXIF, else 60."""
    focal_mm: float = field(default=0.0, kw_only=True)
    """Focal length in millimetres; needs ``sensor_mm``."""
    sensor_mm: str = field(default="", kw_only=True)
    """Width and height of the sensor in millimetres, such as 36x24, or its width alone."""
    unusual_camera: bool = field(default=False, kw_only=True)
    """Take any field of view."""
    size: int = field(default=0, kw_only=True)
    """Shorter side of the teacher's input in pixels; 0: as in its training, else near 518."""
    tiles: bool = field(default=False, kw_only=True)
    """Full resolution from tiles, as ``flatdepth predict --tiles``."""
    device: Literal["auto", "cuda", "cpu"] = field(default="auto", kw_only=True)
    """Where the teacher runs; ``auto``: on a GPU if there is one."""
    teacher_kind: Literal["auto", "metric", "relative"] = field(default="auto", kw_only=True)
    """What the teacher predicts, for weights that do not say it."""
    max_depth_m: float = field(default=0.0, kw_only=True)
    """Greatest depth of metric weights that do not say it: 20 indoor, 80 outdoor."""
    scene_from: str = field(default="file", kw_only=True)
    """What is a scene, the unit of splits, as for ``flatdepth pack folder``: by default each
    photograph; ``parent`` for albums of one place per directory."""
    dataset: str = field(default="photos", kw_only=True)
    """Short name of the data set."""
    teacher_sha256: str = field(default="", init=False)

    def __post_init__(self) -> None:
        expect_within("max_side", self.max_side, 0, 10**5)
        runs = len(wildcards(self.image_glob))
        for name, glob in (("region_glob", self.region_glob), ("polygon_glob", self.polygon_glob)):
            if len(wildcards(glob)) > runs:
                raise UserError(
                    f"{name}: expected at most the {runs} runs of wildcards of image_glob, found"
                    f" {glob}"
                )
        if self.region_glob and self.polygon_glob:
            raise UserError("region_glob and polygon_glob are both given: leave one of them out")
        if not is_scene_rule(self.scene_from):
            raise UserError(
                "scene_from: expected parent, file, dataset or a number, or a pattern with"
                f" wildcards, found {self.scene_from}"
            )
        check_names(self.region_names, bool(self.polygon_glob))
        self._options()
        object.__setattr__(self, "teacher_sha256", weight_digest(self.teacher))

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, FAR_M)

    def list(self) -> Listing:
        """Find the photographs. Warns of what is assumed, doubtful or not read.

        Raises UserError if there are none, their labels fit none of them, or the teacher cannot be
        opened or predicts depth that cannot be inverted.
        """
        forget_files()
        tree = Tree(self.raw)
        paths = list(tree.walk())
        found = {role: match(glob, paths) for role, glob in self._globs().items()}
        others = {path for files in found.values() for path in files.values()}
        matched = match(self.image_glob, set(paths).difference(others))
        images = {parts: path for parts, path in matched.items() if ending(path) in EXTENSIONS}
        if not images:
            raise tree.layout_error(f"photographs {self.image_glob} (patterns start from --raw)")
        labels = {role: beside(images, found[role], glob) for role, glob in self._globs().items()}
        items = sort_items(
            Item(
                key=make_key(path),
                scene=scene_of(path, self.scene_from, self.dataset),
                files={"image": tree.url(path)}
                | {role: tree.url(of[path]) for role, of in labels.items() if path in of},
            )
            for path in images.values()
        )
        warn_of_unread(self.raw, [path for path in paths if ending(path) in OTHER_IMAGES])
        look_at_labels(self.raw, items, self.region_glob or self.polygon_glob, self._look_at)
        self._look_at_teacher(items[0])
        return Listing(items=items)

    def read(self, item: Item) -> RawFrame:
        """Read one photograph and predict its depth. Raises BadFrame if it is damaged."""
        opened = _open_photo(item.files["image"], self.max_side)
        picture = opened.picture
        model, device = self._model()
        image = decode_image(picture.image)
        height, width = image.shape[:2]
        camera = choose_camera(opened.focal_px, height, width, self._options())
        photo = Photo(image=image, focal_px=opened.focal_px)
        prediction = predict_photo(model, photo, self._options(), device)
        depth_m = metres_of(prediction.field, model.kind, self._reach_m(model, camera, image.shape))
        labels = self._labels_of(item, opened)
        meta: dict[str, object] = {
            "teacher": Path(self.teacher).name,
            "teacher_sha256": self.teacher_sha256,
            "teacher_kind": model.kind,
            "camera": camera.origin,
            "intrinsics_assumed": camera.is_assumed,
        }
        raw = RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=width,
            height=height,
            depth=encode_log_u16(depth_m, near_m=NEAR_M, far_m=FAR_M),
            K_px=camera.K_px,
            meta=meta | relative_paths(Tree(self.raw), item.files),
        )
        return with_labels(
            raw,
            None if labels is None else labels.resized(height, width),
            planes="fit",
            art_inside=False,
            skip_bad=self.bad_planes == "skip",
        )

    def _globs(self) -> dict[str, str]:
        return {
            role: glob
            for role, glob in (("region", self.region_glob), ("polygon", self.polygon_glob))
            if glob
        }

    def _options(self) -> PredictOptions:
        return PredictOptions(
            size=self.size or None,
            tiles=self.tiles,
            fov_deg=self.fov_deg or None,
            focal_mm=self.focal_mm or None,
            sensor_mm=self.sensor_mm or None,
            unusual_camera=self.unusual_camera,
        )

    def _model(self) -> tuple[DepthModel, torch.device]:
        kind = None if self.teacher_kind == "auto" else self.teacher_kind
        device = None if self.device == "auto" else self.device
        return _open_teacher(self.teacher, kind, self.max_depth_m or None, device)

    def _reach_m(self, model: DepthModel, camera: Camera, shape: tuple[int, ...]) -> float:
        """The largest depth in metres that the teacher can say of a photograph of this shape."""
        scale = input_of(model, self._options()).focal_scale(shape[0], shape[1])
        return model.reach_m(camera.focal_px * scale)

    def _labels_of(self, item: Item, opened: "_Opened") -> Labels | None:
        """The labels of a photograph, of the size of its map or its file."""
        path = Tree(self.raw).path(item.files["image"])
        return read_labels(item.files, path, *opened.size, self.region_names, "regions")

    def _look_at(self, item: Item) -> Labels | None:
        return self._labels_of(item, _open_photo(item.files["image"], self.max_side))

    def _look_at_teacher(self, item: Item) -> None:
        """Say what is odd about the first photograph, before anything is packed."""
        model, device = self._model()
        input_of(model, self._options())
        if model.kind == "affine":
            raise UserError(
                f"{self.teacher}: expected a metric or relative teacher, found an affine one, whose"
                " depth is known up to a shift in z, under which planes do not stay planes; take"
                " other weights"
            )
        remarks = []
        if model.kind == "relative":
            remarks.append(
                f"{self.teacher} is relative: the set's metres are made up (a median of"
                f" {MEDIAN_M:g}); train relative networks on it"
            )
        try:
            opened = _open_photo(item.files["image"], self.max_side)
            image = decode_image(opened.picture.image)
            photo = Photo(image=image, focal_px=opened.focal_px)
            predicted = predict_photo(model, photo, self._options(), device).field
            camera = choose_camera(opened.focal_px, image.shape[0], image.shape[1], self._options())
        except BadFrame:
            pass  # packing lists it
        else:
            crop = off_centre(camera.K_px, *image.shape[:2])
            strange = doubt(predicted, model.kind, self._reach_m(model, camera, image.shape))
            remarks += [remark for remark in (strange, crop) if remark]
            if camera.is_assumed:
                remarks.append(f"{item.key} and others: {camera.origin}; see --fov_deg")
        for remark in remarks:
            warnings.warn(f"{self.raw}: {remark}", stacklevel=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A photograph as it is packed, the size (H, W) of its file upright, its focal length."""

    picture: Picture
    size: tuple[int, int]
    focal_px: float | None


def _open_photo(url: str, max_side: int) -> _Opened:
    picture = read_art(url, max_side)
    data = read_bytes(url)
    formats = image_formats(data[:HEAD_BYTES])
    with damage_named("image unreadable", url), Image.open(io.BytesIO(data), formats=formats) as im:
        photo = upright(im)
    height, width = photo.image.shape[:2]
    focal_px = photo.focal_px and photo.focal_px * picture.width / width
    return _Opened(picture=picture, size=(height, width), focal_px=focal_px)


@lru_cache(maxsize=1)
def _open_teacher(
    source: str, kind: Kind | None, max_depth_m: float | None, device: str | None
) -> tuple[DepthModel, torch.device]:
    chosen = chosen_device(device)
    model, report = open_model(source, kind=kind, max_depth_m=max_depth_m)
    for doubtful in report.doubts:
        warnings.warn(f"{source}: {doubtful}", stacklevel=2)
    return model.to(chosen), chosen


def metres_of(
    predicted: Float32[np.ndarray, "h w"], kind: Kind, max_depth_m: float
) -> Float32[np.ndarray, "h w"]:
    """Planar z from a predicted field (``predictor``).

    A metric one is inverted. A relative one, 1/z up to scale and shift, is taken as 1/z up to
    scale: ``z = s / q``, with the median of what is positive at ``MEDIAN_M``. An unknown shift
    bends space, but 1/z of a plane stays affine in the pixels. What is not positive or farther than
    ``FAR_M``, or for a metric teacher than ``BEYOND`` of its greatest depth, is sky (+inf); what is
    nearer than ``NEAR_M`` is unknown (NaN).

    Raises:
        BadFrame: nothing is positive.
    """
    inverse = predicted.astype(np.float64)
    far_m = FAR_M
    if kind == "relative":
        if not (inverse > 0).any():
            raise BadFrame("the teacher sees nothing", "its inverse depth is nowhere positive")
        inverse /= MEDIAN_M * np.median(inverse[inverse > 0])
    elif math.isfinite(max_depth_m):
        far_m = min(FAR_M, BEYOND * max_depth_m)
    with np.errstate(divide="ignore", over="ignore"):
        depth_m = 1 / inverse
    depth_m[(inverse <= 0) | (depth_m > far_m)] = np.inf
    depth_m[depth_m < NEAR_M] = np.nan
    return depth_m.astype(np.float32)
