"""Depth maps to coloured point clouds in binary PLY files."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Float64, UInt8
from torch import Tensor

from flatdepth.data.readers.files import pinhole
from flatdepth.geometry import pixel_rays

_VERTEX = np.dtype(
    [(name, "<f4") for name in ("x", "y", "z")]
    + [(name, "u1") for name in ("red", "green", "blue")]
)


def focal_from_fov(fov_deg: float, width: int) -> float:
    """Focal length in pixels of a pinhole camera that sees ``fov_deg`` degrees across."""
    return width / (2 * math.tan(math.radians(fov_deg) / 2))


def centred_pinhole(focal_px: float, height: int, width: int) -> Float64[np.ndarray, "3 3"]:
    """``K_px`` of square pixels with the principal point in the middle of the image."""
    return pinhole(focal_px, focal_px, width / 2, height / 2)


def depth_edges(
    depth_m: Float32[np.ndarray, "h w"], *, ratio: float, radius: int
) -> Bool[np.ndarray, "h w"]:
    """Pixels at a jump in depth, where a network blends two surfaces into points between them.

    A pixel is one if, within ``radius`` pixels (a square window), the farthest depth exceeds the
    nearest by more than ``ratio`` of the nearest, and inverse depth is bent: its second difference
    with arms of ``radius`` pixels exceeds ``ratio`` of its value. The second condition spares
    planes, which are affine in inverse depth, at every slant.
    """
    z = torch.from_numpy(depth_m)[None, None]
    spread = _greatest(z, radius) > -_greatest(-z, radius) * (1 + ratio)
    bend = torch.zeros_like(z)
    for axis in (-2, -1):
        inner = z.shape[axis] - 2 * radius
        if inner > 0:
            before, here, after = (
                1 / z.narrow(axis, start, inner) for start in (0, radius, 2 * radius)
            )
            part = bend.narrow(axis, radius, inner)
            part.copy_(torch.maximum(part, (before - 2 * here + after).abs() / here))
    return (spread & (_greatest(bend, radius) > ratio))[0, 0].numpy()


def _greatest(x: Tensor, radius: int) -> Tensor:
    """The greatest value within ``radius`` rows and columns."""
    size = 2 * radius + 1
    rows = F.max_pool2d(x, (size, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, size), stride=1, padding=(0, radius))


def unproject(
    depth_m: Float32[np.ndarray, "h w"], K_px: Float64[np.ndarray, "3 3"]
) -> Float32[np.ndarray, "h w 3"]:
    """Points in metres of every pixel centre, as viewers show them upright.

    x right, y up, z towards the viewer: the camera of ``flatdepth.types`` with y and z turned
    round, as in OpenGL, so a camera at the origin that looks along -z sees the picture again.
    """
    height, width = depth_m.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    points = pixel_rays(K_px, u, v) * depth_m[..., None]
    return (points * np.array([1.0, -1.0, -1.0])).astype(np.float32)


def ply_bytes(
    points: Float32[np.ndarray, "n 3"], colours: UInt8[np.ndarray, "n 3"], comments: Sequence[str]
) -> bytes:
    """Points as a binary little-endian PLY file: float x, y, z and uchar red, green, blue.

    Args:
        comments: lines of ASCII text for the header.
    """
    vertices = np.empty(len(points), _VERTEX)
    for axis, name in enumerate(("x", "y", "z")):
        vertices[name] = points[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, channel]
    header = ["ply", "format binary_little_endian 1.0"]
    header += [f"comment {line}" for line in comments]
    header += [f"element vertex {len(points)}"]
    header += [f"property float {name}" for name in ("x", "y", "z")]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header += ["end_header", ""]
    return "\n".join(header).encode("ascii") + vertices.tobytes()
