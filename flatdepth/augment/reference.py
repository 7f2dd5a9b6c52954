"""The paste stage again: slow, in numpy float64, by other routes; what tests hold ``composite`` to.

Depth comes from the ray and the plane, the place in the content from a homography solved from the
four projected corners (composite has one affine form for both), and every sample from the mip level
itself instead of an atlas.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from flatdepth.augment.layout import Paste
from flatdepth.geometry import pixel_rays, project
from flatdepth.types import Region

_BEVEL = (0.14, -0.05, -0.16, 0.05)


def paste_reference(
    image: Float32[np.ndarray, "h w 3"],
    depth_m: Float32[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    plan: Sequence[Paste],
    pictures: Sequence[UInt8[np.ndarray, "h w 3"] | None],
    K_px: Float64[np.ndarray, "3 3"],
    *,
    depth_range_m: tuple[float, float],
) -> tuple[
    Float64[np.ndarray, "h w 3"],
    Float64[np.ndarray, "h w"],
    Bool[np.ndarray, "h w"],
    UInt8[np.ndarray, "h w"],
]:
    """Paste one image's plan; arguments and results as in ``composite.paste``, for one sample."""
    height, width = depth_m.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    rays = pixel_rays(K_px, u, v)
    out_image, out_depth, out_valid = image.astype(float), depth_m.astype(float), valid.copy()
    region = np.zeros((height, width), dtype=np.uint8)
    for paste, picture in zip(plan, pictures, strict=True):
        inverse = rays @ paste.rectangle.plane
        z = 1 / np.maximum(inverse, 1e-9)
        edges = _distances(project(K_px, paste.rectangle.corners()), u, v)
        outer, inner = edges.min(0), _distances(project(K_px, paste.content.corners()), u, v).min(0)
        cover = (outer > 0) & ~(valid & (depth_m < paste.front * z))

        source = image.astype(float) if picture is None else picture / 255
        s, t = _unit_square(project(K_px, paste.content.corners()), u, v)
        left, top, right, bottom = paste.portion
        content = _sample(source, left + s * (right - left), top + t * (bottom - top), paste.level)
        content = content * (paste.gain * np.array(paste.tint))
        bevel = 1 + np.array(_BEVEL)[edges.argmin(0)]
        frame = paste.gain * np.array(paste.frame_colour) * bevel[..., None]
        mix = np.clip(inner, 0, 1)[..., None]
        colour = np.clip(frame + mix * (content - frame), 0, 1)
        blended = out_image + np.clip(outer, 0, 1)[..., None] * (colour - out_image)

        out_image = np.where(cover[..., None], blended, out_image)
        out_depth = np.where(cover, z, out_depth)
        in_range = (z >= depth_range_m[0]) & (z <= depth_range_m[1])
        out_valid = np.where(cover, in_range, out_valid)
        kind = np.where(inner > 0, int(paste.kind), int(Region.FRAME))
        region = np.where(cover, kind, region).astype(np.uint8)
    return out_image, out_depth, out_valid, region


def _distances(corners: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(4, H, W) distances to the edges of a quad whose corners run clockwise in the image."""
    distances = []
    for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        length = np.hypot(u1 - u0, v1 - v0)
        distances.append(((u1 - u0) * (v - v0) - (v1 - v0) * (u - u0)) / length)
    return np.stack(distances)


def _unit_square(corners: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where pixels lie in the unit square that a quad is the projective image of."""
    rows = []
    for (s, t), (x, y) in zip(((0, 0), (1, 0), (1, 1), (0, 1)), corners, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -x * s, -y * s, -s])
        rows.append([0, 0, 0, x, y, 1, -x * t, -y * t, -t])
    homography = np.linalg.svd(np.array(rows))[2][-1].reshape(3, 3)
    s, t, w = np.moveaxis(np.stack([u, v, np.ones_like(u)], -1) @ homography.T, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return s / w, t / w


def _sample(source: np.ndarray, x: np.ndarray, y: np.ndarray, level: int) -> np.ndarray:
    """Bilinear samples at shares (x, y) of the source's size, from its ``level``-th reduction."""
    for _ in range(level):
        for axis in (0, 1):
            source = _halved(source, axis)
    height, width = source.shape[:2]
    column = np.clip(np.nan_to_num(x * width), 0.5, width - 0.5) - 0.5
    row = np.clip(np.nan_to_num(y * height), 0.5, height - 0.5) - 0.5
    i0, j0 = np.floor(column).astype(int), np.floor(row).astype(int)
    i1, j1 = np.minimum(i0 + 1, width - 1), np.minimum(j0 + 1, height - 1)
    a, b = (column - i0)[..., None], (row - j0)[..., None]
    upper = source[j0, i0] * (1 - a) + source[j0, i1] * a
    lower = source[j1, i0] * (1 - a) + source[j1, i1] * a
    return upper * (1 - b) + lower * b


def _halved(source: np.ndarray, axis: int) -> np.ndarray:
    """Half as many samples along an axis; each is the mean of all that it touches."""
    old = source.shape[axis]
    new = max(1, old // 2)
    starts = [i * old // new for i in range(new)]
    ends = [-(-(i + 1) * old // new) for i in range(new)]
    means = [
        source.take(range(start, end), axis).mean(axis)
        for start, end in zip(starts, ends, strict=True)
    ]
    return np.stack(means, axis)
