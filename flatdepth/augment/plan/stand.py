"""Pastes that need no wall: standing boards, and the rotated rectangles of the earlier recipe."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64

from flatdepth.augment.plan.appearance import Form
from flatdepth.augment.plan.coarse import ThinView
from flatdepth.augment.plan.upright import CAMERA_UP, LARGEST_M, SHRINK, in_range, uprights
from flatdepth.augment.plan.walls import Walls
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import Rectangle, cross, pixel_rays, project, quad_area


def stand(
    thin: ThinView,
    walls: Walls | None,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    taken: Bool[np.ndarray, " n"],
    nearest: Float64[np.ndarray, " n"],
    depth_range_m: tuple[float, float],
) -> Rectangle | None:
    """A board of random tilt in front of everything it covers, standing on the ground if it can.

    If no ground is seen or none of sixteen attempts of shrinking size fits there, it hovers, turned
    by up to 8 degrees; None if none of eight attempts fits either.

    Args:
        taken: (N,) cells of earlier pastes.
        nearest: (N,) largest 1/z in each cell, earlier pastes included.
    """
    if walls is not None and walls.ground is not None and walls.on_ground.any():
        feet = walls.rays[walls.on_ground]
        for attempt in range(16):
            own = draws.child(attempt)
            foot = feet[own.integer("foot", len(feet))]
            area = max(form.area * SHRINK[attempt // 4], min(form.area, config.area[0]))
            smaller = replace(form, area=area)
            board = _standing(thin, own, config, smaller, foot, walls.ground, taken, nearest)
            if board is not None and in_range(board.corners(), depth_range_m):
                return board
    for attempt in range(8):
        board = _hovering(thin, draws.child(attempt), config, form, nearest)
        if board is not None and in_range(board.corners(), depth_range_m):
            return board
    return None


def _standing(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    foot: Float64[np.ndarray, " 3"],
    ground: Float64[np.ndarray, " 3"],
    taken: Bool[np.ndarray, " n"],
    nearest: Float64[np.ndarray, " n"],
) -> Rectangle | None:
    """A board whose lower edge is on the ground near where the ray ``foot`` meets it.

    The edge is 1 to 3 % nearer than the ground: so much does it take to be in front of the ground
    under it, whose pixels are looked at one by one there.
    """
    up = -ground / np.linalg.norm(ground)
    focal = np.sqrt(thin.K_px[0, 0] * thin.K_px[1, 1])
    height = np.sqrt(form.area * thin.height * thin.width / form.aspect) / focal  # at a depth of 1
    middle = foot + 0.5 * height * up
    board = _board(thin, draws, config, form, middle / middle[2], up, 0.0)
    if board is None:
        return None
    contact = float((board.corners() @ ground).max())
    corners = project(thin.K_px, board.corners())
    sides = corners[:2] - corners[3:1:-1]
    strip = min(1.0, 2 * thin.cell[1] / float(np.linalg.norm(sides, axis=1).min()))
    lower = np.concatenate([corners[3:1:-1] + strip * sides, corners[2:]])
    rays, inverse = thin.pixels_inside(lower)
    cells = thin.covered(corners) & (taken | ~thin.covered(lower))
    scale = max(
        1.01 * contact,
        1.001 * float((inverse / (rays @ board.plane)).max(initial=0.0)),
        _in_front(thin, board, cells, nearest),
    )
    if not 0 < scale <= 1.03 * contact:
        return None
    board = _nearer(board, scale)
    return board if max(board.width, board.height) <= LARGEST_M else None


def _hovering(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    nearest: Float64[np.ndarray, " n"],
) -> Rectangle | None:
    """A board anywhere, 2 to 30 % nearer than it must be to cover what it does."""
    u = draws.uniform("standing u", 0.15, 0.85) * thin.width
    v = draws.uniform("standing v", 0.15, 0.85) * thin.height
    ray = pixel_rays(thin.K_px, np.array([u]), np.array([v]))[0]
    roll = np.deg2rad(draws.uniform("standing roll", -8.0, 8.0))
    board = _board(thin, draws, config, form, ray, CAMERA_UP, roll)
    if board is None:
        return None
    covered = thin.covered(project(thin.K_px, board.corners()))
    scale = draws.uniform("clearance", 1.02, 1.3) * _in_front(thin, board, covered, nearest)
    if scale <= 0:
        scale = board.centre[2] / draws.log_uniform("distance", 0.8, 4.0)
    return _nearer(board, scale)


def _board(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    ray: Float64[np.ndarray, " 3"],
    up: Float64[np.ndarray, " 3"],
    roll: float,
) -> Rectangle | None:
    """A tilted board 1 m away along a ray, None if too little of it is in the image."""
    tilt = np.deg2rad(draws.uniform("tilt", 0.0, config.max_tilt_deg))
    axis = np.deg2rad(draws.uniform("tilt axis", -25.0, 25.0))
    side = 1 if draws.uniform("tilt side") < 0.5 else -1
    area = np.array([form.area * thin.height * thin.width])
    m = _tilted(ray, side * tilt, axis)
    found = uprights(m, ray[None], up, roll, form.aspect, area, thin.K_px)
    if found is None or np.isnan(found.heights).any():
        return None
    corners = project(thin.K_px, found.corners[0])
    covered = thin.covered(corners)
    if covered.sum() * thin.cell[0] * thin.cell[1] < 0.8 * quad_area(corners):
        return None
    return found.rectangle(0)


def _in_front(
    thin: ThinView,
    board: Rectangle,
    cells: Bool[np.ndarray, " n"],
    nearest: Float64[np.ndarray, " n"],
) -> float:
    """How many times nearer a board must come to be in front of everything in some cells."""
    slope = np.abs(board.plane @ np.linalg.inv(thin.K_px))
    margin = 0.5 * (slope[0] * thin.cell[0] + slope[1] * thin.cell[1])
    surface = np.maximum(board.plane @ thin.rays[cells].T - margin, 1e-6)
    return float((nearest[cells] / surface).max(initial=0.0))


def _nearer(board: Rectangle, scale: float) -> Rectangle:
    """The board brought ``scale`` times nearer; its image stays the same."""
    return replace(
        board,
        centre=board.centre / scale,
        width=board.width / scale,
        height=board.height / scale,
    )


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
