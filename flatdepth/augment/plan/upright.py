"""Upright rectangles on a plane, sized by the area that they project to."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from flatdepth.geometry import CORNERS, Rectangle, cross, project, quad_area

CAMERA_UP = np.array([0.0, -1.0, 0.0])
SHRINK = np.array([1.0, 0.6, 0.36, 0.2])
"""Shares of the area asked for that are tried in turn."""
LARGEST_M = 6.0
"""Longer side of the largest posters, signs and boards out of doors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uprights:
    """Rectangles with the same axes on one plane.

    Attributes:
        m: (3,) the plane in 1/m.
        right, up: (3,) unit vectors of their sides.
        centres: (c, 3) in metres.
        widths, heights: (c,) in metres; NaN for one that would reach too near to the camera.
        corners: (c, 4, 3) in metres, in the order of ``Rectangle.corners``.
    """

    m: Float64[np.ndarray, " 3"]
    right: Float64[np.ndarray, " 3"]
    up: Float64[np.ndarray, " 3"]
    centres: Float64[np.ndarray, "c 3"]
    widths: Float64[np.ndarray, " c"]
    heights: Float64[np.ndarray, " c"]
    corners: Float64[np.ndarray, "c 4 3"]

    def rectangle(self, number: int) -> Rectangle:
        return Rectangle(
            centre=self.centres[number],
            right=self.right,
            up=self.up,
            width=float(self.widths[number]),
            height=float(self.heights[number]),
        )


def uprights(
    m: Float64[np.ndarray, " 3"],
    rays: Float64[np.ndarray, "c 3"],
    up: Float64[np.ndarray, " 3"],
    roll: float,
    aspect: float,
    areas_px2: Float64[np.ndarray, " c"],
    K_px: Float64[np.ndarray, "3 3"],
) -> Uprights | None:
    """Rectangles on plane m around rays that project to about the given areas.

    Three steps of scaling by the root of what the area lacks. One that comes nearer to the camera
    than a quarter of its centre's depth is given up.

    Args:
        up: unit vector that their sides follow, turned by ``roll`` radians.
        aspect: width / height.

    Returns:
        None if the plane is level.
    """
    normal = m / np.linalg.norm(m)
    in_plane = up - (up @ normal) * normal
    length = np.linalg.norm(in_plane)
    if length < 0.1:
        return None
    in_plane /= length
    across = cross(normal, in_plane)
    axes = np.stack(
        [
            np.cos(roll) * across + np.sin(roll) * in_plane,
            np.cos(roll) * in_plane - np.sin(roll) * across,
        ]
    )
    centres = rays / (rays @ m)[:, None]
    sides = CORNERS * (0.5 * aspect, 0.5) @ axes
    heights = 0.05 * centres[:, 2]
    for step in range(4):
        corners = centres[:, None] + heights[:, None, None] * sides
        too_near = corners[:, :, 2].min(axis=1) < 0.25 * centres[:, 2]
        if too_near.any():
            corners[too_near], heights[too_near] = np.nan, np.nan
        if step < 3:
            heights *= np.sqrt(areas_px2 / np.maximum(quad_area(project(K_px, corners)), 1e-9))
    return Uprights(
        m=m,
        right=axes[0],
        up=axes[1],
        centres=centres,
        widths=heights * aspect,
        heights=heights,
        corners=corners,
    )


def in_range(
    corners: Float64[np.ndarray, "*c 4 3"], depth_range_m: tuple[float, float]
) -> Bool[np.ndarray, "*c"]:
    """Whether all corners of a rectangle are between near and far; not if they are NaN."""
    z = corners[..., 2]
    inside = (z.min(axis=-1) >= depth_range_m[0]) & (z.max(axis=-1) <= depth_range_m[1])
    return np.asarray(inside)
