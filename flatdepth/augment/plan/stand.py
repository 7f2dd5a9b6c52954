"""Pastes that need no wall: standing boards, and the rotated rectangles of the earlier recipe."""

import numpy as np
from jaxtyping import Float64

from flatdepth.augment.plan.appearance import Form
from flatdepth.augment.plan.coarse import ThinView
from flatdepth.augment.plan.upright import CAMERA_UP, in_range, uprights
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import Rectangle, cross, pixel_rays, project, quad_area


def stand(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    nearest: Float64[np.ndarray, " n"],
    depth_range_m: tuple[float, float],
) -> Rectangle | None:
    """A board of random tilt in front of everything it covers, or None after eight attempts.

    Args:
        nearest: (N,) largest 1/z in each cell, earlier pastes included.
    """
    for attempt in range(8):
        own = draws.child(attempt)
        u = own.uniform("standing u", 0.15, 0.85) * thin.width
        v = own.uniform("standing v", 0.15, 0.85) * thin.height
        ray = pixel_rays(thin.K_px, np.array([u]), np.array([v]))[0]
        tilt = np.deg2rad(own.uniform("tilt", 0.0, config.max_tilt_deg))
        axis = np.deg2rad(own.uniform("tilt axis", -25.0, 25.0))
        side = 1 if own.uniform("tilt side") < 0.5 else -1
        m = _tilted(ray, side * tilt, axis)
        roll = np.deg2rad(own.uniform("standing roll", -8.0, 8.0))
        area = np.array([form.area * thin.height * thin.width])
        found = uprights(m, ray[None], CAMERA_UP, roll, form.aspect, area, thin.K_px)
        if found is None or np.isnan(found.heights).any():
            continue
        rectangle = found.rectangle(0)
        corners = project(thin.K_px, rectangle.corners())
        covered = thin.covered(corners)
        if covered.sum() * thin.cell[0] * thin.cell[1] < 0.8 * quad_area(corners):
            continue
        slope = np.abs(rectangle.plane @ np.linalg.inv(thin.K_px))
        margin = 0.5 * (slope[0] * thin.cell[0] + slope[1] * thin.cell[1])
        surface = np.maximum(rectangle.plane @ thin.rays[covered].T - margin, 1e-6)
        forward = own.uniform("clearance", 1.02, 1.3)
        scale = forward * float((nearest[covered] / surface).max())
        if scale <= 0:
            scale = rectangle.centre[2] / own.log_uniform("distance", 0.8, 4.0)
        board = Rectangle(
            centre=rectangle.centre / scale,
            right=rectangle.right,
            up=rectangle.up,
            width=rectangle.width / scale,
            height=rectangle.height / scale,
        )
        if in_range(board.corners(), depth_range_m):
            return board
    return None


def _tilted(ray: Float64[np.ndarray, " 3"], tilt: float, axis: float) -> Float64[np.ndarray, " 3"]:
    """Plane at distance 1 m along a ray, turned by ``tilt`` about an axis ``axis`` from upright."""
    direction = ray / np.linalg.norm(ray)
    sideways = cross(CAMERA_UP, direction)
    sideways /= np.linalg.norm(sideways)
    upright = cross(direction, sideways)
    about = np.cos(axis) * upright + np.sin(axis) * sideways
    return np.cos(tilt) * direction + np.sin(tilt) * cross(about, direction)


def legacy(
    thin: ThinView, draws: Draws, form: Form, depth_range_m: tuple[float, float]
) -> tuple[Rectangle, tuple[float, float, float]] | None:
    """A rotated rectangle of the image, and its depth as ``d . (u, v, 1)`` in metres.

    The recipe of the earlier offline scripts: the depth at the corner where the scene is deepest,
    falling linearly in the image to the scene's nearest depth under the paste at the opposite
    corner. It is linear in z and not in 1/z, so it is no plane. None where no depth is known.

    The rectangle itself faces the camera at the deepest corner's depth; it places the pixels only.
    """
    width = np.sqrt(form.area * thin.height * thin.width * form.aspect)
    height = width / form.aspect
    angle = np.deg2rad(draws.uniform("legacy angle", -45.0, 45.0))
    reach = 0.5 * np.array(
        [
            abs(np.cos(angle)) * width + abs(np.sin(angle)) * height,
            abs(np.sin(angle)) * width + abs(np.cos(angle)) * height,
        ]
    )
    size = np.array([thin.width, thin.height])
    low, high = np.minimum(reach, size / 2), np.maximum(size - reach, size / 2)
    u, v = (low + draws.uniforms("legacy centre", 2) * (high - low)).tolist()
    ray = pixel_rays(thin.K_px, np.array([u]), np.array([v]))[0]
    right = np.array([np.cos(angle), np.sin(angle), 0.0])
    scale = 1 / np.sqrt(thin.K_px[0, 0] * thin.K_px[1, 1])
    unit = Rectangle(
        centre=ray,
        right=right,
        up=cross(np.array([0.0, 0.0, 1.0]), right),
        width=width * scale,
        height=height * scale,
    )
    corners = project(thin.K_px, unit.corners())
    with np.errstate(divide="ignore"):
        depth = 1 / np.where(thin.inverse_depth > 0, thin.inverse_depth, np.nan)
    known = np.isfinite(depth)
    covered = thin.covered(corners) & known
    if not covered.any():
        return None
    places = np.stack([thin.u, thin.v], axis=1)[known]
    distance = np.linalg.norm(places[None] - corners[:, None], axis=2)
    at_corners = depth[known][distance.argmin(axis=1)]
    deepest = int(at_corners.argmax())
    near = max(float(depth[covered].min()), depth_range_m[0])
    far = min(max(float(at_corners[deepest]), near), depth_range_m[1])
    along = corners[(deepest + 2) % 4] - corners[deepest]
    slope = (near - far) * along / (along @ along)
    gradient = (float(slope[0]), float(slope[1]), float(far - slope @ corners[deepest]))
    board = Rectangle(
        centre=unit.centre * far,
        right=unit.right,
        up=unit.up,
        width=unit.width * far,
        height=unit.height * far,
    )
    return board, gradient
