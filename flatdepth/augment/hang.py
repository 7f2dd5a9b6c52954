"""Hung pastes: walls found in the depth, and upright rectangles laid out on them in metres.

Planes are found in inverse depth by locally seeded RANSAC on the coarse grid and refined on source
pixels under the rectangle. A place is accepted if the grid says that the wall is really there,
under the rectangle and around it, so that nothing is hung on a chair's back or a monitor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float64, Int64

from flatdepth.augment.looks import Form
from flatdepth.augment.rng import Draws
from flatdepth.augment.thin import ThinView, look_up, source_pixels
from flatdepth.config import PasteConfig
from flatdepth.geometry import (
    Rectangle,
    cross,
    fit_plane_trimmed,
    fit_planes_robust,
    project,
    quad_area,
)

HYPOTHESES = 96
PLACES = 4
ATTEMPTS = 96
CAMERA_UP = np.array([0.0, -1.0, 0.0])
SUPPORT_M = 0.8
MAX_LIFT = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Walls:
    """Walls of a view, with the direction that is up in it.

    Attributes:
        m: (k, 3) planes in 1/m.
        rays: per wall (p, 3) rays to the cells where it is seen.
        up: (3,) unit vector.
    """

    m: Float64[np.ndarray, "k 3"]
    rays: tuple[Float64[np.ndarray, "_ 3"], ...]
    up: Float64[np.ndarray, " 3"]


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

    Args:
        taken: (N,) cells where something hangs already.
        depth_range_m: (near, far) that the rectangle must lie in.
    """
    roll = np.deg2rad(1.5) * (2 * draws.uniform("roll") - 1)
    thickness = draws.uniform("thickness", *config.thickness_m)
    target_px2 = form.area * thin.height * thin.width
    smallest_px2 = config.area[0] * thin.height * thin.width
    for m, ray in islice(_places(walls, draws), ATTEMPTS):
        for shrink in (1.0, 0.6, 0.36, 0.2):
            area = target_px2 * shrink
            if area < smallest_px2:
                break
            rectangle = on_plane(m, ray, walls.up, roll, form.aspect, area, thin)
            if rectangle is None or not in_range(rectangle, depth_range_m):
                continue
            if not _is_good_place(thin, rectangle, config, taken):
                continue
            refined = _refined_plane(thin, rectangle, config)
            if refined is None:
                continue
            lifted = _lifted(refined, thickness)
            rectangle = on_plane(lifted, ray, walls.up, roll, form.aspect, area, thin)
            if rectangle is None or not in_range(rectangle, depth_range_m):
                continue
            if _is_good_place(thin, rectangle, config, taken):
                return rectangle
    return None


def _places(
    walls: Walls, draws: Draws
) -> Iterator[tuple[Float64[np.ndarray, " 3"], Float64[np.ndarray, " 3"]]]:
    """``PLACES`` random places on each wall, the walls in random order: plane and ray."""
    order = np.argsort(draws.uniforms("wall", len(walls.m)))
    numbers = draws.uniforms("place", len(order) * PLACES).reshape(-1, PLACES)
    for wall, own in zip(order.tolist(), numbers, strict=True):
        rays = walls.rays[wall]
        for number in own.tolist():
            yield walls.m[wall], rays[int(number * len(rays))]


def find_walls(thin: ThinView, draws: Draws, config: PasteConfig) -> Walls | None:
    """Walls that are seen in at least a fifth as many cells as the largest one, None if no wall."""
    known = np.isfinite(thin.inverse_depth) & (thin.inverse_depth > 0)
    seeds = _local_triples(thin, draws, known)
    if len(seeds) == 0:
        return None
    m, inliers = fit_planes_robust(
        thin.rays[known],
        thin.inverse_depth[known],
        thin.rays[seeds],
        thin.inverse_depth[seeds],
        tolerance=config.plane_tolerance,
        noise=config.depth_noise,
    )
    usable = (np.linalg.norm(m, axis=1) > 0) & (inliers.sum(axis=1) >= 12)
    m, inliers = m[usable], inliers[usable]
    support = inliers.sum(axis=1)
    up, slope = _up(m, inliers, thin.rays[known], thin.inverse_depth[known])
    is_wall = np.abs(m @ up) <= slope * np.linalg.norm(m, axis=1)
    if not is_wall.any():
        return None
    is_wall &= support >= 0.2 * support[is_wall].max()
    rays = thin.rays[known]
    return Walls(m=m[is_wall], rays=tuple(rays[own] for own in inliers[is_wall]), up=up)


def _up(
    m: Float64[np.ndarray, "k 3"],
    inliers: Bool[np.ndarray, "k n"],
    rays: Float64[np.ndarray, "n 3"],
    inverse_depth: Float64[np.ndarray, " n"],
) -> tuple[Float64[np.ndarray, " 3"], float]:
    """The direction against gravity, and how far a wall's normal may be from horizontal (sine).

    A floor, ceiling or table top within 35 degrees of the camera's own idea of up says which way up
    is. Of several, the one that most points agree with, their planes being parallel or at right
    angles to it, as in most rooms; if less than half do, or without one, the camera's is taken and
    walls may lean more.
    """
    support = inliers.sum(axis=1)
    normals = m / np.maximum(np.linalg.norm(m, axis=1), 1e-12)[:, None]
    level = np.flatnonzero(
        (np.abs(normals @ CAMERA_UP) >= 0.82) & (support >= 0.05 * len(inverse_depth))
    )
    if len(level) > 0:
        angle = np.abs(normals[level] @ normals.T)
        agreeing = ((angle < 0.1) | (angle > 0.99)) @ support
        best = int(np.argmax(agreeing))
        if 2 * agreeing[best] >= support.sum():
            own = inliers[level[best]]
            floor = fit_plane_trimmed(rays[own], inverse_depth[own])
            return floor * np.sign(floor @ CAMERA_UP) / np.linalg.norm(floor), 0.2
    return CAMERA_UP, 0.57


def _local_triples(
    thin: ThinView, draws: Draws, known: Bool[np.ndarray, " n"]
) -> Int64[np.ndarray, "k 3"]:
    """Indices of three known points in a neighbourhood, first the place to hang something at."""
    reach = np.array([thin.rows, thin.columns]) / 6
    row = (draws.uniforms("seed row", HYPOTHESES) * thin.rows).astype(np.int64)
    column = (draws.uniforms("seed column", HYPOTHESES) * thin.columns).astype(np.int64)
    angle = 2 * np.pi * draws.uniforms("seed angle", HYPOTHESES)
    corners = []
    for turn in (0.0, 2 * np.pi / 3, 4 * np.pi / 3):
        corner_row = np.clip(np.round(row + reach[0] * np.sin(angle + turn)), 0, thin.rows - 1)
        corner_column = np.clip(
            np.round(column + reach[1] * np.cos(angle + turn)), 0, thin.columns - 1
        )
        corners.append((corner_row * thin.columns + corner_column).astype(np.int64))
    centre = row * thin.columns + column
    triples = np.stack([centre, corners[0], corners[1]], axis=1)
    triples = triples[known[triples].all(axis=1)]
    return triples[(triples[:, 1] != triples[:, 2]) & (triples[:, 0] != triples[:, 1])]


def on_plane(
    m: Float64[np.ndarray, " 3"],
    centre_ray: Float64[np.ndarray, " 3"],
    up: Float64[np.ndarray, " 3"],
    roll: float,
    aspect: float,
    area_px2: float,
    thin: ThinView,
) -> Rectangle | None:
    """The upright rectangle of about the given projected area on plane m around a ray.

    None if the plane is level, or reaches too near to the camera.
    """
    normal = m / np.linalg.norm(m)
    in_plane = up - (up @ normal) * normal
    if np.linalg.norm(in_plane) < 0.1:
        return None
    in_plane /= np.linalg.norm(in_plane)
    right = cross(normal, in_plane)
    right, in_plane = (
        np.cos(roll) * right + np.sin(roll) * in_plane,
        np.cos(roll) * in_plane - np.sin(roll) * right,
    )
    centre = centre_ray / (m @ centre_ray)
    height = 0.05 * centre[2]
    for step in range(4):
        rectangle = Rectangle(
            centre=centre, right=right, up=in_plane, width=height * aspect, height=height
        )
        corners = rectangle.corners()
        if corners[:, 2].min() < 0.25 * centre[2]:
            return None
        if step < 3:
            height *= np.sqrt(area_px2 / max(quad_area(project(thin.K_px, corners)), 1e-9))
    return rectangle


def in_range(rectangle: Rectangle, depth_range_m: tuple[float, float]) -> bool:
    """Whether all corners are between near and far."""
    z = rectangle.corners()[:, 2]
    return bool(z.min() >= depth_range_m[0] and z.max() <= depth_range_m[1])


def _is_good_place(
    thin: ThinView, rectangle: Rectangle, config: PasteConfig, taken: Bool[np.ndarray, " n"]
) -> bool:
    """Whether a rectangle can hang there, as far as the grid can tell.

    Good: mostly in the image, nothing hung there yet, at least 40 % of its depth known; of the
    known points at least 75 % on the plane, at most 20 % in front of it and 8 % behind it; some of
    the wall in each quarter. Around it, on 0.8 m or 1.3 times its size, at least half of what is
    not hidden by things in front is wall, and at most 12 % is behind.
    """
    a, b, surface = thin.on_rectangle(rectangle)
    inside = (np.abs(a) < 1) & (np.abs(b) < 1)
    cells = int(inside.sum())
    projected = quad_area(project(thin.K_px, rectangle.corners()))
    if cells < 6 or cells * thin.cell[0] * thin.cell[1] < 0.8 * projected:
        return False
    if (inside & taken).any():
        return False
    deviation = thin.inverse_depth - surface
    slack = config.plane_tolerance * surface + config.depth_noise
    known = np.isfinite(deviation)
    on_plane_ = known & (np.abs(deviation) <= slack)
    in_front, behind = known & (deviation > slack), known & (deviation < -slack)
    quarter = 2 * (a > 0) + (b > 0)
    total = (known & inside).sum()
    if not (
        total >= 0.4 * cells
        and (on_plane_ & inside).sum() >= 0.75 * total
        and (in_front & inside).sum() <= 0.2 * total
        and (behind & inside).sum() <= 0.08 * total
        and len(np.unique(quarter[on_plane_ & inside])) == 4
    ):
        return False
    reach_a = max(1.3, SUPPORT_M / rectangle.width)
    reach_b = max(1.3, SUPPORT_M / rectangle.height)
    around = (np.abs(a) < reach_a) & (np.abs(b) < reach_b) & ~inside & known
    visible = (around & ~in_front).sum()
    return bool(
        (around & on_plane_).sum() >= 0.5 * max(visible, 1)
        and (around & behind).sum() <= 0.12 * max(around.sum(), 1)
    )


def _refined_plane(
    thin: ThinView, rectangle: Rectangle, config: PasteConfig
) -> Float64[np.ndarray, " 3"] | None:
    """The wall's plane from up to 1024 source pixels under the rectangle and a little around it."""
    side = np.linspace(-0.6, 0.6, 32)
    a, b = (x.ravel() for x in np.meshgrid(side * rectangle.width, side * rectangle.height))
    points = rectangle.centre + a[:, None] * rectangle.right + b[:, None] * rectangle.up
    points = points[points[:, 2] > 0]
    u, v = project(thin.K_px, points).T
    inside = (u >= 0) & (u < thin.width) & (v >= 0) & (v < thin.height)
    row, column = source_pixels(thin.frame, thin.view, u[inside], v[inside])
    _, _, rays, inverse = look_up(thin.frame, thin.view, thin.K_px, row, column)
    surface = rays @ rectangle.plane
    slack = config.plane_tolerance * surface + config.depth_noise
    on_plane_ = np.abs(inverse - surface) <= slack
    if on_plane_.sum() < 12:
        return None
    return fit_plane_trimmed(rays[on_plane_], inverse[on_plane_])


def _lifted(m: Float64[np.ndarray, " 3"], thickness_m: float) -> Float64[np.ndarray, " 3"]:
    """The parallel plane ``thickness_m`` nearer to the camera, but never by more than 2 %."""
    return m / (1 - min(thickness_m * float(np.linalg.norm(m)), MAX_LIFT))
