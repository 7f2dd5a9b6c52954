"""A prediction as files: 16-bit PNG, npy, colours, side by side, point cloud, mesh, description.

Everything is made from arrays, so nothing of the input's metadata can travel along.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, Float64, UInt8, UInt16
from PIL import Image

import flatdepth
from flatdepth.models.network import Kind
from flatdepth.predict.glb import glb_bytes
from flatdepth.predict.pointcloud import depth_edges, ply_bytes, unproject
from flatdepth.show.pictures import colour_depth, depth_limits

Product: TypeAlias = Literal["depth", "npy", "colour", "side", "ply", "glb"]
PngUnit: TypeAlias = Literal["mm", "cm", "inverse"]

SUFFIXES: Mapping[str, str] = {
    "depth": "_depth.png",
    "npy": "_depth.npy",
    "colour": "_colour.png",
    "side": "_side.png",
    "ply": "_points.ply",
    "glb": "_mesh.glb",
}
SPATIAL: frozenset[Product] = frozenset({"ply", "glb"})
"""Products that need metres and a camera."""
DESCRIPTION_SUFFIX = "_depth.json"
"""Says what the values of ``depth``, ``npy``, ``ply`` and ``glb`` mean; beside any of them."""

VIDEO_SUFFIXES: Mapping[str, str] = {"colour": "_colour.mp4", "side": "_side.mp4"}
FRAMES_SUFFIX = "_frames"
"""Of the folder in which the other products of a video lie, frame by frame, as of photographs."""

METRES_PER_CODE: Mapping[str, float] = {"mm": 0.001, "cm": 0.01}
"""Of the units in which depth itself is coded."""

LAST_CODE = 65535

QUANTITIES: Mapping[str, str] = {
    "metric": "planar depth along the optical axis, in metres",
    "relative": "inverse depth up to an unknown scale and shift, larger is nearer",
    "affine": "planar depth up to an unknown scale and shift, larger is farther",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """The pinhole camera of a point cloud or mesh.

    Attributes:
        K_px: (3, 3) float64 intrinsics in pixels of the image.
        origin: where they come from, in words.
        is_assumed: whether nobody said them.
    """

    K_px: Float64[np.ndarray, "3 3"]
    origin: str
    is_assumed: bool = False

    @property
    def focal_px(self) -> float:
        """The mean of fx and fy."""
        return float(self.K_px[0, 0] + self.K_px[1, 1]) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A picture with its predicted depth.

    Attributes:
        image: (H, W, 3) uint8 sRGB.
        field: (H, W) float32 inverse depth, in 1/m if metric, up to scale and shift if relative;
            depth up to scale and shift if affine.
        kind: of the network.
        camera: for point cloud and mesh, or None if neither is wanted.
        blur_px: width in pixels that the network spreads a depth edge over at the least: how much
            its output was enlarged.
    """

    image: UInt8[np.ndarray, "h w 3"]
    field: Float32[np.ndarray, "h w"]
    kind: Kind
    camera: Camera | None
    blur_px: float

    @property
    def values(self) -> Float32[np.ndarray, "h w"]:
        """What users are given: depth in metres, or what the others predict as it is."""
        return 1 / self.field if self.kind == "metric" else self.field

    @property
    def edge_px(self) -> int:
        """How far from a jump in depth a pixel may be a blend of two surfaces."""
        return max(1, round(self.blur_px))


def is_described(products: tuple[Product, ...]) -> bool:
    """Whether a description belongs to these products: to all that hold depth as numbers."""
    return not {"depth", "npy", *SPATIAL}.isdisjoint(products)


def output_suffixes(products: tuple[Product, ...]) -> list[str]:
    """The suffixes of the files that ``render`` makes."""
    suffixes = [SUFFIXES[product] for product in products]
    return [*suffixes, DESCRIPTION_SUFFIX] if is_described(products) else suffixes


def render(
    prediction: Prediction,
    products: tuple[Product, ...],
    *,
    png_unit: PngUnit,
    prune: float,
    about: Mapping[str, object],
    span: tuple[float, float] | None = None,
) -> dict[str, bytes]:
    """The contents of the output files, by suffix.

    Args:
        png_unit, span: see ``depth_codes``.
        prune: see ``depth_edges``.
        about: further entries of the description.
    """
    values = prediction.values
    codes, scale, offset = depth_codes(prediction, png_unit, span)
    files: dict[str, bytes] = {}
    if "depth" in products:
        files[SUFFIXES["depth"]] = _png(codes)
    if "npy" in products:
        files[SUFFIXES["npy"]] = npy_bytes(values)
    if not {"colour", "side"}.isdisjoint(products):
        colours = colour_field(prediction.field, prediction.kind)
        if "colour" in products:
            files[SUFFIXES["colour"]] = _png(colours)
        if "side" in products:
            files[SUFFIXES["side"]] = _png(side_by_side(prediction.image, colours))
    if "ply" in products:
        files[SUFFIXES["ply"]] = _cloud(prediction, prune)
    if "glb" in products:
        files[SUFFIXES["glb"]] = glb_bytes(
            _png(prediction.image),
            values,
            _camera(prediction).K_px,
            ratio=prune,
            radius=prediction.edge_px,
        )
    if is_described(products):
        description: dict[str, object] = {
            **about,
            "width": values.shape[1],
            "height": values.shape[0],
            "kind": prediction.kind,
            "quantity": QUANTITIES[prediction.kind],
            "smallest": float(values.min()),
            "largest": float(values.max()),
            "png": {
                "holds": "depth in metres"
                if _codes_depth(prediction, png_unit)
                else QUANTITIES[prediction.kind]
                if prediction.kind == "affine"
                else "inverse depth",
                "value": "scale * code + offset",
                "scale": scale,
                "offset": offset,
            },
            "flatdepth": flatdepth.__version__,
        }
        if prediction.camera is not None:
            description["camera"] = _camera_entry(prediction.camera)
        files[DESCRIPTION_SUFFIX] = (json.dumps(description, indent=2) + "\n").encode("ascii")
    return files


def depth_codes(
    prediction: Prediction, unit: PngUnit, span: tuple[float, float] | None = None
) -> tuple[UInt16[np.ndarray, "h w"], float, float]:
    """16-bit codes of a prediction, and the scale and offset that undo them.

    Depth is coded in mm or cm, from 1 to 65535: what is nearer or farther saturates (beyond
    65.535 m in mm), and 0, which most programs take for unknown, does not occur. Inverse depth,
    of a relative network always, and depth up to scale and shift are spread over the whole range,
    their smallest value at 0, or from the lower to the upper end of ``span``.
    """
    if _codes_depth(prediction, unit):
        scale, offset, first = METRES_PER_CODE[unit], 0.0, 1
        values = prediction.values
    else:
        values = prediction.field
        offset, high = span or (float(values.min()), float(values.max()))
        scale, first = (high - offset) / LAST_CODE or 1.0, 0
    codes = values.astype(np.float64)  # in place from here: it may be large
    codes -= offset
    codes /= scale
    np.rint(codes, out=codes)
    return codes.clip(first, LAST_CODE, out=codes).astype(np.uint16), scale, offset


def saturated_pixels(
    prediction: Prediction, unit: PngUnit, span: tuple[float, float] | None = None
) -> int:
    """How many pixels are too far for the codes of ``depth_codes``, or outside of ``span``."""
    if not _codes_depth(prediction, unit):
        low, high = span or (-np.inf, np.inf)
        return int(((prediction.field < low) | (prediction.field > high)).sum())
    return int((prediction.values > (LAST_CODE + 0.5) * METRES_PER_CODE[unit]).sum())


def _codes_depth(prediction: Prediction, unit: PngUnit) -> bool:
    """Whether the codes stand for depth rather than inverse depth."""
    return prediction.kind == "metric" and unit != "inverse"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourScale:
    """What the colours of one or several fields stand for: near is warm, far is cold.

    Attributes:
        kind: of the fields. Depth up to scale and shift is coloured as if the nearest value of
            ``span`` were 1 and the farthest 5.
        span: the smallest and the largest value of the fields it is made for.
        limits: the depths at the two ends: their 2nd and 98th percentile; see ``depth_limits``.
    """

    kind: Kind
    span: tuple[float, float]
    limits: tuple[float, float] = (1.0, 10.0)

    @classmethod
    def of(cls, fields: Sequence[Float32[np.ndarray, "h w"]], kind: Kind) -> "ColourScale":
        """One scale for fields of one size."""
        whole = np.concatenate(fields)
        scale = cls(kind=kind, span=(float(whole.min()), float(whole.max())))
        depth = scale.depth(whole)
        return replace(scale, limits=depth_limits(depth, np.isfinite(depth)))

    def depth(self, field: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
        """The depth that is coloured; inverse depth 0 is +inf, sky."""
        if self.kind == "affine":
            low, high = self.span
            return 1 + 4 * (field.clip(low, high) - low) / max(high - low, 1e-12)
        with np.errstate(divide="ignore", over="ignore"):
            return 1 / field

    def colours(self, field: Float32[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
        low_m, high_m = self.limits
        return colour_depth(self.depth(field), low_m=low_m, high_m=high_m)


def colour_field(field: Float32[np.ndarray, "h w"], kind: Kind) -> UInt8[np.ndarray, "h w 3"]:
    """A field in the colours of its own scale."""
    return ColourScale.of([field], kind).colours(field)


def side_by_side(
    image: UInt8[np.ndarray, "h w 3"], colours: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w2 3"]:
    """The image, a narrow white gap, its depth in colours."""
    height, width = image.shape[:2]
    gap = np.full((height, max(1, width // 40), 3), 255, np.uint8)
    return np.concatenate([image, gap, colours], axis=1)


def _cloud(prediction: Prediction, prune: float) -> bytes:
    camera, depth_m = _camera(prediction), prediction.values
    kept = ~depth_edges(depth_m, ratio=prune, radius=prediction.edge_px)
    comments = [
        "flatdepth, metres; x right, y up, z towards the viewer",
        f"camera at the origin, looking along -z; {camera.origin}",
    ]
    return ply_bytes(unproject(depth_m, camera.K_px)[kept], prediction.image[kept], comments)


def _camera(prediction: Prediction) -> Camera:
    if prediction.camera is None:
        raise ValueError("point clouds and meshes need a camera")
    return prediction.camera


def _camera_entry(camera: Camera) -> dict[str, object]:
    K = camera.K_px
    return {
        "fx": float(K[0, 0]),
        "fy": float(K[1, 1]),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "pixel_centres": "integer + 0.5",
        "from": camera.origin,
    }


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npy_bytes(values: Float32[np.ndarray, "h w"]) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()
