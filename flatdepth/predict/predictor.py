"""Predict depth on pictures.

Between the network and the files everything is a *field* at the input's own size: inverse depth,
in 1/m from a metric network and up to scale and shift from a relative one, in which planes are
affine (``flatdepth.types``), so that it may be resized, aligned and blended; from an affine network
its depth up to scale and shift, which cannot be inverted.
"""

import errno
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from tqdm import tqdm

from flatdepth.config import (
    LEAST_SIDE,
    MICRO_BATCH,
    MOST_SIDE,
    expect_multiple,
    nearest_multiple,
)
from flatdepth.data.loader import in_order
from flatdepth.data.readers.files import pinhole
from flatdepth.errors import BadFrame, UserError, expect_within, is_out_of_memory, printable
from flatdepth.geometry import (
    camera_trouble,
    focal_from_mm,
    off_centre,
    sensor_sides,
)
from flatdepth.models.network import Kind
from flatdepth.models.precision import expect_room
from flatdepth.models.preprocessing import PREPROCESSING, Preprocessing, preprocessing
from flatdepth.predict.inputs import (
    Input,
    Photo,
    announced_pixels,
    find_inputs,
    open_photo,
)
from flatdepth.predict.outputs import (
    FRAMES_SUFFIX,
    LAST_CODE,
    METRES_PER_CODE,
    SPATIAL,
    SUFFIXES,
    VIDEO_SUFFIXES,
    Camera,
    PngUnit,
    Prediction,
    Product,
    output_suffixes,
    render,
    saturated_pixels,
)
from flatdepth.predict.pointcloud import centred_pinhole, focal_from_fov
from flatdepth.predict.tiles import Tile, align, blend, tiles_of
from flatdepth.show.pictures import write_atomic

DEFAULT_FOV_DEG = 60.0

TILE_OVERLAP = 0.25
"""Of a tile's side."""

LARGE_PIXELS = 1 << 24
"""Larger pictures wait for the others and go one at a time, so that they share no memory."""

_LEAST_DEPTH_M = 1e-3
_THREADS = 4
_SECONDS_PER_LINE = 5


@runtime_checkable
class DepthModel(Protocol):
    """What is needed of a network; ``DepthAnythingV2`` is one."""

    kind: Kind

    @property
    def needs_focal(self) -> bool: ...

    @property
    def multiple(self) -> int: ...

    @property
    def side(self) -> int: ...

    def reach_m(self, focal_px: float) -> float: ...

    def __call__(self, image: Tensor, focal_px: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What is predicted at which resolution, and what is written.

    Attributes:
        write: the products, keys of ``outputs.SUFFIXES``.
        size: shorter side of the network's input in pixels, a multiple of what it takes; None:
            as in its training, else the one nearest to 518.
        batch: most images, or tiles of one image, that the network is given at once.
        tiles: refine the prediction with tiles of ``size`` pixels at the input's own resolution.
        steady: take the flicker out of videos; see ``steady.Steadier``.
        png_unit: what the codes of a metric depth PNG stand for.
        intrinsics: fx, fy, cx, cy in pixels of the inputs, cx and cy for pixel centres at
            integers, as flatdepth pack takes them.
        fov_deg: horizontal field of view in degrees, in place of intrinsics.
        focal_mm, sensor_mm: focal length and sensor, such as 18 and ``36x24``, in place of
            intrinsics; see ``geometry.focal_from_mm``.
        unusual_camera: take any field of view and any ratio of fx and fy.
        prune: points are left out where depth jumps by more than this share.
        overwrite: replace output files that exist.
        image_bits: bits of 16-bit grey images, as flatdepth pack takes them.

    Raises:
        UserError: a value is out of range; the message names the option of ``flatdepth predict``.
    """

    write: tuple[Product, ...] = ("depth", "colour", "side")
    size: int | None = None
    batch: int = 4
    tiles: bool = False
    steady: bool = False
    png_unit: PngUnit = "mm"
    intrinsics: tuple[float, float, float, float] | None = None
    fov_deg: float | None = None
    focal_mm: float | None = None
    sensor_mm: str | None = None
    unusual_camera: bool = False
    prune: float = 0.05
    overwrite: bool = False
    image_bits: int = 16

    def __post_init__(self) -> None:
        _require(
            8 <= self.image_bits <= 16, f"--image_bits: expected 8 to 16, got {self.image_bits}"
        )
        _require(bool(self.write), f"--write: expected some of {', '.join(SUFFIXES)}, got none")
        expect_within(
            "--size", LEAST_SIDE if self.size is None else self.size, LEAST_SIDE, MOST_SIDE
        )
        expect_within("--batch", self.batch, *MICRO_BATCH)
        expect_within("--prune", self.prune, 1e-6, 1e6)
        _require(
            self.fov_deg is None or 0 < self.fov_deg < 180,
            f"--fov: expected degrees between 0 and 180, got {self.fov_deg}",
        )
        for name, value in zip(("fx", "fy", "cx", "cy"), self.intrinsics or (), strict=False):
            low = 1e-3 if name.startswith("f") else -1e7
            expect_within(f"--intrinsics: {name}", value, low, 1e7)
        _require(
            self.intrinsics is None or self.fov_deg is None,
            "--fov: --intrinsics says the same; leave one of them out",
        )
        _require(
            self.focal_mm is None or (self.intrinsics is None and self.fov_deg is None),
            "--focal_mm: --intrinsics or --fov says the same; leave one of them out",
        )
        _require(
            (self.focal_mm is None) == (self.sensor_mm is None)
            and (self.focal_mm is None or 0 < self.focal_mm < math.inf),
            "--focal_mm and --sensor_mm: expected both, above 0, such as 18 and 36x24, got "
            f"{self.focal_mm} and {self.sensor_mm}",
        )
        if self.sensor_mm is not None:
            sensor_sides(self.sensor_mm)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# The network.


def input_of(model: DepthModel, options: PredictOptions) -> Preprocessing:
    """How pictures become the network's input and predictions come back.

    Raises:
        UserError: the chosen size is no multiple of what the network takes.
    """
    if options.size is not None:
        expect_multiple("--size", options.size, model.multiple)
    return preprocessing("ours", options.size or model.side, model.multiple)


@torch.inference_mode()
def predict_field(
    model: DepthModel,
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    way: Preprocessing,
    device: torch.device,
    focals_px: Sequence[float],
) -> list[Float32[np.ndarray, "_ _"]]:
    """The fields of images that share one network size, each at its image's own size.

    float16 autocast on CUDA, float32 elsewhere.

    Args:
        way: to the network's input and back; it brings the field back, not metres.
        focals_px: in pixels of each image.

    Returns:
        1/m, unitless and >= 0 from a relative network, unitless from an affine one. Not finite
        where float16 overflowed.
    """
    pixels = [torch.tensor(image, device=device).movedim(-1, 0)[None] for image in images]
    inputs = torch.cat([way.prepare(one.float() / 255) for one in pixels])
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        scales = [way.focal_scale(*image.shape[:2]) for image in images]
        focal_px = inputs.new_tensor([f * s for f, s in zip(focals_px, scales, strict=True)])
        outputs = model(inputs, focal_px).float()
    fields = outputs.clamp_min(_LEAST_DEPTH_M).reciprocal() if model.kind == "metric" else outputs
    return [
        way.restore(one[None], *image.shape[:2])[0, 0].cpu().numpy()
        for one, image in zip(fields, images, strict=True)
    ]


def predict_tiled(
    model: DepthModel,
    image: UInt8[np.ndarray, "h w 3"],
    way: Preprocessing,
    device: torch.device,
    focal_px: float,
    batch: int,
) -> Float32[np.ndarray, "h w"]:
    """The field at the image's own resolution.

    The whole image is predicted first. Tiles as large as the input's shorter side, which the
    network sees unscaled, are aligned to it by scale and shift and blended: they bring the detail,
    the whole brings the layout. An image that the network sees whole at full resolution needs none.
    """
    height, width = image.shape[:2]
    side, whole_size = min(way.size), way.network_size(height, width)
    whole = predict_field(model, [image], way, device, [focal_px])[0]
    if whole_size[0] >= height and whole_size[1] >= width:
        return whole
    overlap = round(TILE_OVERLAP * side)
    cell = math.ceil(max(height / whole_size[0], width / whole_size[1]))
    tiles = list(tiles_of(height, width, side, overlap))
    rows, columns = tiles[0].height, tiles[0].width
    tile_size = (nearest_multiple(rows, model.multiple), nearest_multiple(columns, model.multiple))
    unscaled = replace(PREPROCESSING["ours"], rule="exact", size=tile_size, multiple=model.multiple)

    def aligned() -> Iterator[tuple[Tile, Float32[np.ndarray, "_ _"]]]:
        for first in range(0, len(tiles), batch):
            some = tiles[first : first + batch]
            images = [image[tile.place] for tile in some]
            parts = predict_field(model, images, unscaled, device, [focal_px] * len(some))
            for tile, part in zip(some, parts, strict=True):
                yield tile, align(part, whole[tile.place], cell)

    # The shift may push the farthest or nearest pixels of a tile out of the network's range.
    reach_m = model.reach_m(focal_px * way.focal_scale(height, width))
    least, most = {
        "metric": (1 / reach_m, 1 / _LEAST_DEPTH_M),
        "relative": (0.0, np.inf),
        "affine": (-np.inf, np.inf),
    }[model.kind]
    return blend(aligned(), height, width, overlap).clip(least, most)


def predict_photo(
    model: DepthModel, photo: Photo, options: PredictOptions, device: torch.device
) -> Prediction:
    """The depth of one picture; its camera only if ``options`` or EXIF say it.

    Raises:
        BadFrame: the prediction is not finite.
    """
    height, width = photo.image.shape[:2]
    way = input_of(model, options)
    said = (options.intrinsics, options.fov_deg, options.focal_mm, photo.focal_px)
    known = any(value is not None for value in said)
    camera = choose_camera(photo.focal_px, height, width, options)
    if options.tiles:
        field = predict_tiled(model, photo.image, way, device, camera.focal_px, options.batch)
    else:
        field = predict_field(model, [photo.image], way, device, [camera.focal_px])[0]
    network = way.network_size(height, width)
    return _prediction(model, photo.image, field, camera if known else None, network, options)


def _prediction(
    model: DepthModel,
    image: UInt8[np.ndarray, "h w 3"],
    field: Float32[np.ndarray, "h w"],
    camera: Camera | None,
    network: tuple[int, int],
    options: PredictOptions,
) -> Prediction:
    if not np.isfinite(field).all():
        raise BadFrame("not finite", "the prediction is not finite; try --device cpu")
    return Prediction(
        image=image,
        field=field,
        kind=model.kind,
        camera=camera,
        blur_px=1.0 if options.tiles else image.shape[0] / network[0],
    )


def doubt(field: Float32[np.ndarray, "h w"], kind: Kind, reach_m: float) -> str | None:
    """One clause with the fix if a prediction looks as if the weights were misread, else None.

    Relative weights read as metric ones, metric ones read as relative, and a wrong ``max_depth_m``
    all load without a fault, for the tensors have the same names and shapes. Then the sigmoid is
    saturated nearly everywhere, or the ReLU is 0 nearly everywhere.

    Args:
        kind, reach_m: of the network; its largest depth in metres in this picture.
    """
    low, median, high = (float(value) for value in np.percentile(field, (2, 50, 98)))
    constant = high - low <= 0.01 * abs(high)
    if kind == "affine":
        return "the depth is nearly constant; are these the right weights?" if constant else None
    if kind == "relative":
        if median > 0 and not constant:
            return None
        found = "nearly constant" if median > 0 else "0 for most pixels"
        return f"the inverse depth is {found}; if these are metric weights, add --kind metric"
    saturated = 1 / high > 0.5 * reach_m and 1 / median > 0.7 * reach_m
    if not saturated and not constant:
        return None
    found = "far beyond half of" if saturated else "nearly constant within"
    return (
        f"the depth is {found} the greatest possible ({1 / high:.2f} to {1 / low:.2f} of "
        f"{reach_m:g} m); if these are relative weights, add --kind relative, if they "
        "were trained for another range, add --max_depth_m with it"
    )


def doubts(
    model: DepthModel,
    field: Float32[np.ndarray, "h w"],
    camera: Camera,
    options: PredictOptions,
) -> list[str]:
    """What speaks against a prediction and its camera, as clauses."""
    height, width = field.shape
    spatial = not SPATIAL.isdisjoint(options.write)
    crop = off_centre(camera.K_px, height, width) if spatial else None
    reach_m = model.reach_m(camera.focal_px * input_of(model, options).focal_scale(height, width))
    assumed = model.needs_focal and camera.is_assumed
    guess = f"{camera.origin}; its metres are wrong by as much" if assumed else None
    return [clause for clause in (doubt(field, model.kind, reach_m), crop, guess) if clause]


# The files.


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input that could not be predicted on, and the reason as a clause."""

    source: Input
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.source.path)}: {self.reason}; skipped"


@dataclass(frozen=True, slots=True)
class Written:
    """An input whose outputs are written; ``saturated`` pixels are too far for the depth PNG."""

    source: Input
    saturated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What ``predict_files`` did."""

    written: Sequence[Written]
    skipped: Sequence[Skipped]
    out: Path

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{len(self.written)} predicted{skipped}; outputs in {printable(self.out)}"


def plan_inputs(arguments: Sequence[str], out: Path, options: PredictOptions) -> list[Input]:
    """Pictures and videos, once it is sure that their outputs may be written below ``out``.

    Args:
        arguments: files, folders and glob patterns, see ``find_inputs``.

    Raises:
        UserError: an argument names nothing, an output exists, the frames of a video and another
            input would be written into one folder, or ``out`` cannot be made.
    """
    inputs = find_inputs(arguments, out, videos=True)
    folders = {Path(item.name).parent: item for item in inputs}
    for item in inputs:
        if item.is_video and (other := folders.get(Path(item.name + FRAMES_SUFFIX))):
            raise UserError(
                f"{item.path} and {other.path}: outputs of both would lie in "
                f"{item.name}{FRAMES_SUFFIX}; predict on one of them with another --out"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    suffixes = output_suffixes(options.write)
    of_videos = [VIDEO_SUFFIXES.get(product, FRAMES_SUFFIX) for product in options.write]
    targets = (
        out / (item.name + suffix)
        for item in inputs
        for suffix in (dict.fromkeys(of_videos) if item.is_video else suffixes)
    )
    # Not Path.exists, which raises where a name is too long for an output.
    existing = [] if options.overwrite else [one for one in targets if os.path.lexists(one)]
    if existing:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UserError(
            f"{existing[0]}{more} would be overwritten; choose another --out or add --overwrite"
        )
    return inputs


def predict_files(
    model: DepthModel,
    inputs: Sequence[Input],
    out: Path,
    options: PredictOptions,
    *,
    device: torch.device,
    checkpoint: str,
) -> Summary:
    """Predict on every input and write the outputs below ``out``, each file whole or not at all.

    Inputs that cannot be used are named on standard error and skipped.

    Args:
        model: on ``device``, in evaluation mode.
        inputs: as ``plan_inputs`` gives them.
        checkpoint: the name of the weights for the descriptions.

    Raises:
        UserError: point clouds or meshes are wanted from a relative network, the outputs cannot be
            written, or memory is full.
    """
    expect_fit(model, options, device)
    written: list[Written] = []
    skipped: list[Skipped] = []

    def write(result: _Predicted | _Postponed | Skipped) -> Written | _Postponed | Skipped:
        if not isinstance(result, _Predicted):
            return result
        about = {
            "image": result.source.path.name,
            "checkpoint": Path(checkpoint).name,
            "network_input": list(result.network),
            "tiles": options.tiles,
        }
        files = render(
            result.prediction,
            options.write,
            png_unit=options.png_unit,
            prune=options.prune,
            about=about,
        )
        try:
            for suffix, data in files.items():
                write_atomic(out / (result.source.name + suffix), data)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return Skipped(result.source, "its name is too long for outputs; shorten it")
        in_png = "depth" in options.write
        saturated = saturated_pixels(result.prediction, options.png_unit) if in_png else 0
        return Written(result.source, saturated)

    with (
        troubles_named(out, device),
        warnings.catch_warnings(),
        Progress(len(inputs), "image") as progress,
    ):
        # Of damaged metadata, which do not matter here.
        warnings.filterwarnings("ignore", module=r"PIL|pillow_heif")
        large: list[Input] = []
        for lane, threads in ((inputs, _THREADS), (large, 1)):
            predicted = _predicted(
                model,
                lane,
                options if threads > 1 else replace(options, batch=1),
                device,
                threads=threads,
                say_doubt=None if written else progress.say,
            )
            for result in in_order(write, predicted, threads=threads, ahead=threads):
                if isinstance(result, _Postponed):
                    large.append(result.source)
                    continue
                if isinstance(result, Skipped):
                    skipped.append(result)
                    progress.say(str(result))
                else:
                    if result.saturated and not any(one.saturated for one in written):
                        progress.say(_saturation(result, options.png_unit))
                    written.append(result)
                progress.step()
    return Summary(written=written, skipped=skipped, out=out)


def expect_fit(model: DepthModel, options: PredictOptions, device: torch.device) -> None:
    """Raise UserError if the options do not fit the network, or what it needs into memory."""
    spatial = SPATIAL.intersection(options.write)
    if spatial and model.kind != "metric":
        raise UserError(
            f"--write {','.join(sorted(spatial))}: the unknown shift of relative depth bends every "
            "surface; take metric weights for point clouds and meshes"
        )
    expect_room(options.batch, min(input_of(model, options).size), device)


@contextmanager
def troubles_named(out: Path, device: torch.device) -> Iterator[None]:
    """A lack of memory, and of a place below ``out`` to write to, become a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = ", or add --device cpu" if device.type == "cuda" else ""
        raise UserError(f"memory is full; lower --batch or --size{fix}") from error
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left for {out}; free some, then add --overwrite")
    return UserError(
        f"{error.filename or out} cannot be written ({error.strerror}); choose another --out"
    )


def _saturation(result: Written, unit: PngUnit) -> str:
    reach_m = LAST_CODE * METRES_PER_CODE[unit]
    fix = "; --png_unit cm reaches 655.35 m" if unit == "mm" else ""
    return (
        f"warning: {printable(result.source.path)}: {result.saturated} pixels lie beyond "
        f"{reach_m:g} m and saturate in the depth PNG{fix} (said once)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    source: Input
    image: UInt8[np.ndarray, "h w 3"]
    network: tuple[int, int]
    camera: Camera


@dataclass(frozen=True, slots=True)
class _Postponed:
    """An input of more than ``LARGE_PIXELS``."""

    source: Input


@dataclass(frozen=True, slots=True, kw_only=True)
class _Predicted:
    source: Input
    prediction: Prediction
    network: tuple[int, int]


def _predicted(
    model: DepthModel,
    inputs: Sequence[Input],
    options: PredictOptions,
    device: torch.device,
    *,
    threads: int,
    say_doubt: Callable[[str], None] | None,
) -> Iterator[_Predicted | _Postponed | Skipped]:
    """Predictions and what was put aside, in the order in which batches fill up.

    Args:
        threads: that open pictures; large ones are postponed unless it is a single one.
        say_doubt: what the first prediction is to be doubted with.
    """

    way = input_of(model, options)

    def load(item: Input) -> _Opened | _Postponed | Skipped:
        try:
            if threads > 1 and announced_pixels(item.path) > LARGE_PIXELS:
                return _Postponed(item)
            return _open(item, way, options)
        except BadFrame as error:
            return Skipped(item, error.detail)

    loaded = in_order(load, inputs, threads=threads, ahead=2 * threads - 1)
    for group in _batches(loaded, 1 if options.tiles else options.batch):
        if not isinstance(group, list):
            yield group
            continue
        images = [one.image for one in group]
        if options.tiles:
            maps = [
                predict_tiled(model, one.image, way, device, one.camera.focal_px, options.batch)
                for one in group
            ]
        else:
            focals_px = [one.camera.focal_px for one in group]
            maps = predict_field(model, images, way, device, focals_px)
        for one, field in zip(group, maps, strict=True):
            camera = None if SPATIAL.isdisjoint(options.write) else one.camera
            try:
                prediction = _prediction(model, one.image, field, camera, one.network, options)
            except BadFrame as error:
                yield Skipped(one.source, error.detail)
                continue
            if say_doubt is not None:
                for trouble in doubts(model, field, one.camera, options):
                    say_doubt(f"warning: {printable(one.source.path)}: {trouble}")
            say_doubt = None
            yield _Predicted(source=one.source, prediction=prediction, network=one.network)


def _open(item: Input, way: Preprocessing, options: PredictOptions) -> _Opened:
    photo = open_photo(item.path, options.image_bits)
    height, width = photo.image.shape[:2]
    camera = choose_camera(photo.focal_px, height, width, options)
    return _Opened(
        source=item,
        image=photo.image,
        network=way.network_size(height, width),
        camera=camera,
    )


def choose_camera(
    focal_px: float | None, height: int, width: int, options: PredictOptions
) -> Camera:
    """The camera as the options give it, else by EXIF, else ``DEFAULT_FOV_DEG`` across.

    Raises UserError if the options give one that cannot be, unless they insist.
    """
    if options.intrinsics is not None:
        fx, fy, cx, cy = options.intrinsics
        K_px, origin = pinhole(fx, fy, cx + 0.5, cy + 0.5), "intrinsics as given"
    else:
        if options.fov_deg is not None:
            focal, origin = focal_from_fov(options.fov_deg, width), "field of view as given"
        elif options.focal_mm is not None and options.sensor_mm is not None:
            focal = focal_from_mm(options.focal_mm, options.sensor_mm, height, width)
            origin = "focal length in mm as given"
        elif focal_px is not None:
            focal, origin = focal_px, "focal length from EXIF"
        else:
            focal = focal_from_fov(DEFAULT_FOV_DEG, width)
            origin = f"field of view unknown, assumed to be {DEFAULT_FOV_DEG:g} degrees"
        K_px = centred_pinhole(focal, height, width)
    trouble = camera_trouble(K_px, height, width)
    if trouble and origin.endswith("given") and not options.unusual_camera:
        raise UserError(trouble)
    return Camera(K_px=K_px, origin=origin, is_assumed="assumed" in origin)


def _batches(
    loaded: Iterable[_Opened | _Postponed | Skipped], size: int
) -> Iterator[list[_Opened] | _Postponed | Skipped]:
    """Groups of one network size; the oldest goes early rather than too many images waiting."""
    waiting: dict[tuple[int, int], list[_Opened]] = {}
    for item in loaded:
        if not isinstance(item, _Opened):
            yield item
            continue
        group = waiting.setdefault(item.network, [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(item.network)
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere; messages that do not break it.

    Args:
        total: how many there are, or None if that is not known.
        unit: of what, in the singular.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        self._bar = tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())
        self._total, self._unit, self._done = total, unit, 0
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def say(self, message: str) -> None:
        self._bar.write(message, file=sys.stderr)

    def step(self) -> None:
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= _SECONDS_PER_LINE:
            self._printed = now
            of, left = "", ""
            if self._total is not None and self._total >= self._done:
                seconds = (now - self._began) * (self._total / self._done - 1)
                of, left = f" of {self._total}", f", {tqdm.format_interval(seconds)} left"
            self.say(f"{self._done}{of} {self._unit}s{left}")
