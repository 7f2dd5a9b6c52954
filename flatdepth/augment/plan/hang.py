"""Hung pastes: upright rectangles laid out in metres on the walls of a scene.

A place is accepted if the coarse grid says that the wall is really there, under the rectangle and
around it, so that nothing is hung on a chair's back or a monitor. The places and sizes tried on a
wall are looked at together; the plane is then refined on source pixels under the rectangle.
"""

import numpy as np
from jaxtyping import Bool, Float64

from flatdepth.augment.plan.appearance import Form
from flatdepth.augment.plan.coarse import ThinView, look_up, source_pixels
from flatdepth.augment.plan.upright import LARGEST_M, SHRINK, Uprights, in_range, uprights
from flatdepth.augment.plan.walls import Walls
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import Rectangle, fit_plane_trimmed, project, quad_area

MOST_WALLS = 24
PLACES = 4
SUPPORT_M = 0.8
MAX_LIFT = 0.02


def hang(
    thin: ThinView,
    walls: Walls,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    taken: Bool[np.ndarray, " n"],
    depth_range_m: tuple[float, float],
) -> Rectangle | None:
    """A rectangle on a wall of the scene, or None if no place is good enough.

    The walls are tried in random order, ``PLACES`` random places on each, the area asked for and
    smaller ones at each.

    Args:
        taken: (N,) cells where something hangs already.
        depth_range_m: (near, far) that the rectangle must lie in.
    """
    roll = np.deg2rad(1.5) * (2 * draws.uniform("roll") - 1)
    thickness = draws.uniform("thickness", *config.thickness_m)
    areas = form.area * thin.height * thin.width * SHRINK
    areas = areas[areas >= config.area[0] * thin.height * thin.width]
    order = np.argsort(draws.uniforms("wall", len(walls.m)))
    places = draws.uniforms("place", len(order) * PLACES).reshape(-1, PLACES)

    def candidates(m: np.ndarray, rays: np.ndarray, areas: np.ndarray) -> Uprights | None:
        return uprights(m, rays, walls.up, roll, form.aspect, areas, thin.K_px)

    def good(found: Uprights) -> Bool[np.ndarray, " c"]:
        fits = in_range(found.corners, depth_range_m)
        if thin.is_sparse:
            fits &= np.maximum(found.widths, found.heights) <= LARGEST_M
            if walls.ground is not None:
                fits &= (found.corners @ walls.ground).max(axis=1) <= 1
        return fits & _are_good_places(thin, found, config, taken)

    for wall, own in zip(order[:MOST_WALLS].tolist(), places, strict=False):
        seen = np.flatnonzero(walls.inliers[wall])
        rays = walls.rays[seen[(own * len(seen)).astype(np.int64)]]
        rays, own_areas = np.repeat(rays, len(areas), axis=0), np.tile(areas, PLACES)
        found = candidates(walls.m[wall], rays, own_areas)
        if found is None:
            continue
        for number in np.flatnonzero(good(found)).tolist():
            refined = _refined_plane(thin, found.rectangle(number), config)
            if refined is None:
                continue
            one = slice(number, number + 1)
            lifted = candidates(_lifted(refined, thickness), rays[one], own_areas[one])
            if lifted is not None and good(lifted).item():
                return lifted.rectangle(0)
    return None


def _are_good_places(
    thin: ThinView, boxes: Uprights, config: PasteConfig, taken: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " c"]:
    """Which rectangles can hang where they are, as far as the grid can tell.

    Good: mostly in the image, nothing hung there yet, at least 40 % of its depth known (70 %
    of what the sensor can see where depth is sparse: there sky is unknown); of the known points at
    least 75 % on the plane, at most 20 % in front of it and 8 % behind it; some of the wall in each
    quarter. Around it, on 0.8 m or 1.3 times its size, at least half of what is not hidden by
    things in front is wall, and at most 12 % is behind.
    """
    surface = thin.rays @ boxes.m
    deviation = thin.inverse_depth - surface
    slack = config.plane_tolerance * surface + config.depth_noise
    known, on_plane = np.isfinite(deviation), np.abs(deviation) <= slack
    classes = np.stack(
        [
            np.ones_like(known),
            taken,
            thin.expected,
            known,
            on_plane,
            deviation > slack,
            deviation < -slack,
        ],
        axis=1,
    ).astype(np.float32)
    points = thin.rays / np.where(surface > 0, surface, np.nan)[:, None]
    a = points @ boxes.right - (boxes.centres @ boxes.right)[:, None]
    b = points @ boxes.up - (boxes.centres @ boxes.up)[:, None]
    to_side, to_top = np.abs(a), np.abs(b)
    width, height = boxes.widths[:, None], boxes.heights[:, None]

    inside = (to_side < width / 2) & (to_top < height / 2)
    counts = inside.astype(np.float32) @ classes
    cells, hung, expected, total, wall, front, back = counts.T
    projected = quad_area(project(thin.K_px, boxes.corners))
    good: np.ndarray = (cells >= 6) & (hung == 0)
    good &= cells * thin.cell[0] * thin.cell[1] >= 0.8 * projected
    good &= (total >= (0.7 if thin.is_sparse else 0.4) * expected) & (wall >= 0.75 * total)
    good &= (front <= 0.2 * total) & (back <= 0.08 * total)
    inside &= on_plane
    right, above = a > 0, b > 0
    for quarter in (right & above, right & ~above, ~right & above, ~right & ~above):
        good &= (inside & quarter).any(axis=1)

    around = to_side < np.maximum(1.3 * width, SUPPORT_M) / 2
    around &= to_top < np.maximum(1.3 * height, SUPPORT_M) / 2
    _, _, _, total, wall, front, back = (around.astype(np.float32) @ classes - counts).T
    good &= wall >= 0.5 * np.maximum(total - front, 1)
    good &= back <= 0.12 * np.maximum(total, 1)
    return good


def _refined_plane(
    thin: ThinView, rectangle: Rectangle, config: PasteConfig
) -> Float64[np.ndarray, " 3"] | None:
    """The wall's plane from up to 1024 source pixels under the rectangle and a little around it.

    From all known ones where depth is sparse.
    """
    if thin.is_sparse:
        corners = rectangle.centre + 1.2 * (rectangle.corners() - rectangle.centre)
        rays, inverse = thin.pixels_inside(project(thin.K_px, corners))
    else:
        rays, inverse = _sampled_pixels(thin, rectangle)
    surface = rays @ rectangle.plane
    slack = config.plane_tolerance * surface + config.depth_noise
    on_plane_ = np.abs(inverse - surface) <= slack
    if on_plane_.sum() < 12:
        return None
    return fit_plane_trimmed(rays[on_plane_], inverse[on_plane_])


def _sampled_pixels(
    thin: ThinView, rectangle: Rectangle
) -> tuple[Float64[np.ndarray, "p 3"], Float64[np.ndarray, " p"]]:
    """Rays and 1/z of 32 x 32 source pixels under 1.2 times a rectangle."""
    side = np.linspace(-0.6, 0.6, 32)
    a, b = (x.ravel() for x in np.meshgrid(side * rectangle.width, side * rectangle.height))
    points = rectangle.centre + a[:, None] * rectangle.right + b[:, None] * rectangle.up
    points = points[points[:, 2] > 0]
    u, v = project(thin.K_px, points).T
    inside = (u >= 0) & (u < thin.width) & (v >= 0) & (v < thin.height)
    row, column = source_pixels(thin.frame, thin.view, u[inside], v[inside])
    _, _, rays, inverse = look_up(thin.frame, thin.view, thin.K_px, row, column)
    return rays, inverse


def _lifted(m: Float64[np.ndarray, " 3"], thickness_m: float) -> Float64[np.ndarray, " 3"]:
    """The parallel plane ``thickness_m`` nearer to the camera, but never by more than 2 %."""
    return m / (1 - min(thickness_m * float(np.linalg.norm(m)), MAX_LIFT))
