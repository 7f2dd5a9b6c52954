"""The data that flows through flatdepth, and the one legend of its shapes, units and frames.

Pixel coordinates
    ``u`` runs right and ``v`` runs down. The centre of the pixel in column ``i`` and row ``j`` is
    at ``(u, v) = (i + 0.5, j + 0.5)``; the image covers ``[0, W] x [0, H]``. Resizing by a factor
    ``s`` therefore maps ``u`` to ``s * u`` with no offset, and cropping subtracts the corner.
    Files that state intrinsics for pixel centres at integers (TUM, Kinect and OpenCV style) get
    ``+0.5`` on ``cx`` and ``cy`` when they are read.

Camera
    Right-handed: x right, y down, z forward along the optical axis, in metres. A pixel's ray is
    ``K_px^-1 @ (u, v, 1)``, whose third component is exactly 1 because ``K_px`` is upper
    triangular with ``K_px[2, 2] = 1``.

Depth
    ``depth_m`` is always *planar* z in metres, never the distance along the ray. ``NaN`` means
    unknown and ``+inf`` means sky or beyond the sensor's range.

Planes
    A plane with unit normal ``n`` at distance ``d`` (``n . X = d``) is written as
    ``m = n / d`` in 1/m, so that ``1/z = m . ray``: inverse depth is affine in pixel coordinates.
    This law makes planar truth, fits planes and measures flatness everywhere in the project.

Shape letters: B batch, K pastes per image, H rows, W columns.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Region(IntEnum):
    """What a pixel shows; the values of ``Batch.region`` and of region maps in shards."""

    BACKGROUND = 0
    MIRROR = 1
    ART = 2
    FRAME = 3
    DECOY = 4


METRICS_FORMAT = 1
"""Version of the ``metrics.json`` of a run."""


class Metric(NamedTuple):
    """How a metric is called and explained, and which way is better.

    In the meanings p is the predicted and t the true depth, d = ln p − ln t.
    """

    label: str
    meaning: str
    better: Literal["lower", "higher"]


METRICS: dict[str, Metric] = {
    "abs_rel": Metric("AbsRel", "mean of |p − t| / t", "lower"),
    "sq_rel": Metric("SqRel", "mean of (p − t)² / t, in metres", "lower"),
    "rmse": Metric("RMSE", "root of the mean of (p − t)², in metres", "lower"),
    "rmse_log": Metric("RMSE log", "root of the mean of d²", "lower"),
    "log10": Metric("log10", "mean of |log₁₀ p − log₁₀ t|", "lower"),
    "silog": Metric(
        "SILog", "100 × standard deviation of d: the error that no scale can mend", "lower"
    ),
    "mae": Metric("MAE", "mean of |p − t|, in metres", "lower"),
    "delta1": Metric("δ < 1.25", "share of pixels with max(p / t, t / p) < 1.25", "higher"),
    "delta2": Metric("δ < 1.25²", "share of pixels with max(p / t, t / p) < 1.25²", "higher"),
    "delta3": Metric("δ < 1.25³", "share of pixels with max(p / t, t / p) < 1.25³", "higher"),
    "delta105": Metric("δ < 1.05", "share of pixels with max(p / t, t / p) < 1.05", "higher"),
}
"""Columns of ``judge.metrics.image_metrics``, whose formulas are ``judge.metrics.FORMULAS``."""

ALL_METRICS: Mapping[str, Metric] = ChainMap(
    {
        "ssim": Metric(
            "SSIM", "structural similarity of the depth maps, 11 × 11 windows; 1 is equal", "higher"
        ),
        "boundary_f1": Metric(
            "Boundary F1",
            "F1 of the depth edges of clean pictures with dense truth, blind to scale (Depth Pro)",
            "higher",
        ),
        "flatness_residual": Metric(
            "Relief",
            "RMS distance of 1/p from its best plane, over the mean of 1/p; 0 is flat",
            "lower",
        ),
        "plane_normal_angle_deg": Metric(
            "Plane angle",
            "angle between the planes fitted to prediction and truth, in degrees",
            "lower",
        ),
        "illusion_gap": Metric(
            "Illusion gap", "AbsRel on mirrors and art over AbsRel on the background", "lower"
        ),
    },
    METRICS,
)
"""``METRICS`` and after them what is measured besides."""

REGIONS: tuple[str, ...] = ("clean", "background", "mirror", "art", "frame", "decoy", "flat")
"""Names that ``judge.metrics.region_masks`` gives and ``RegionTable`` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthCodes:
    """Depth as the source stored it, bit for bit, with what the codes mean.

    Attributes:
        codes: (H, W) uint16 or float16.
        quantity: ``"z"`` for planar depth, ``"distance"`` for the Euclidean distance to the
            optical centre (Hypersim); distances become z when decoded.
        scale_m: metres per code (0.001 for mm, 0.01 for cm, 1/256, 1/5000, 1.0 for metres).
            Unused when ``log_range_m`` is set.
        hole: the code that means "unknown", or None. NaN always means unknown for float16.
        sky: the code that means "sky or beyond range", or None.
        log_range_m: (near, far) in metres for the logarithmic code of float32 sources:
            ``z = near * (far / near) ** ((code - 1) / 65533)`` for codes 1..65534.
    """

    codes: NDArray[np.uint16] | NDArray[np.float16]
    quantity: Literal["z", "distance"] = "z"
    scale_m: float = 1.0
    hole: int | None = None
    sky: int | None = None
    log_range_m: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatThings:
    """The planes of the labelled mirrors, pictures and screens of a frame.

    Attributes:
        number: (H, W) uint8, which thing a pixel shows, counted from 1; 0: none.
        planes: (N, 3) float64, ``m`` of each in 1/m (see the legend); NaN where it is not known,
            and then neither is the depth there.
    """

    number: NDArray[np.uint8]
    planes: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFrame:
    """One frame as a reader found it: what packing writes and what decoding starts from.

    Attributes:
        key: unique in its dataset, '/'-separated, its last part without dots
            (``ai_001_001/cam_00/0000``); becomes the tar member name.
        dataset: short name (``hypersim``, ``vkitti2``, ``nyu``, ``rooms`` or the user's own).
        scene: the unit of every split; frames of one scene never cross a split.
        image: the bytes of an image file, the source's own wherever possible.
        image_ext: ``jpg``, ``png`` or ``webp``.
        width, height: of the image, in pixels.
        depth: the depth codes, or None for a picture of an art collection.
        K_px: (3, 3) float64 intrinsics (see the legend), or None for a picture.
        split: the dataset's official partition (``train``, ``val``, ``test``), "" if it has none.
        meta: JSON values carried along (camera, source path, ...).
        region: (H, W) uint8 values of ``Region`` where real flat things are labelled, else None.
        things: planes that take the place of the depth where flat things are, or None where the
            depth itself is true there.
    """

    key: str
    dataset: str
    scene: str
    image: bytes
    image_ext: str
    width: int
    height: int
    depth: DepthCodes | None = None
    K_px: NDArray[np.float64] | None = None
    split: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)
    region: NDArray[np.uint8] | None = None
    things: FlatThings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One decoded frame.

    Attributes:
        image: (H, W, 3) uint8 sRGB.
        depth_m: (H, W) float32 planar z in metres; NaN unknown, +inf sky.
        K_px: (3, 3) float64 intrinsics.
        key, dataset, scene, meta, region: as in ``RawFrame``.
        behind_m: (H, W) float32, the depth as the source has it, without the planes of ``things``:
            behind a mirror that of what it reflects. None if it has none.
    """

    image: NDArray[np.uint8]
    depth_m: NDArray[np.float32]
    K_px: NDArray[np.float64]
    key: str
    dataset: str
    scene: str
    meta: Mapping[str, object] = field(default_factory=dict)
    region: NDArray[np.uint8] | None = None
    behind_m: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the paste stage takes and gives, and what the model is trained on.

    Attributes:
        image: (B, 3, H, W) float32 sRGB in 0..1.
        depth_m: (B, 1, H, W) float32 planar z in metres, 0 where not ``valid``.
        valid: (B, 1, H, W) bool, where ``depth_m`` is known and in range.
        region: (B, 1, H, W) uint8, values of ``Region``.
        K_px: (B, 3, 3) float64 intrinsics.
        sample: (B,) int64 identity of each sample in the data set.
    """

    image: Tensor
    depth_m: Tensor
    valid: Tensor
    region: Tensor
    K_px: Tensor
    sample: Tensor

    @property
    def focal_px(self) -> Tensor:
        """(B,) focal lengths in pixels: the mean of fx and fy."""
        return self.K_px.diagonal(dim1=-2, dim2=-1)[:, :2].mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch(Batch):
    """A batch with pastes and changed colours.

    Attributes:
        photograph: (B, 3, H, W) the same images before either; None where nobody asks for them.
    """

    photograph: Tensor | None
