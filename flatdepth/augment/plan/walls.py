"""Walls and ground of a view, by locally seeded RANSAC in inverse depth on the coarse grid."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from flatdepth.augment.plan.coarse import ThinView
from flatdepth.augment.plan.upright import CAMERA_UP
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import fit_plane_trimmed, fit_planes_robust

HYPOTHESES = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Walls:
    """Walls and ground of a view, with the direction that is up in it.

    Attributes:
        m: (k, 3) planes of the walls in 1/m; there may be none.
        inliers: (k, p) where each is seen among ``rays``.
        rays: (p, 3) to the cells of known depth.
        up: (3,) unit vector.
        ground: (3,) plane in 1/m of the ground or floor, None if none is seen.
        on_ground: (p,) where it is seen among ``rays``.
    """

    m: Float64[np.ndarray, "k 3"]
    inliers: Bool[np.ndarray, "k p"]
    rays: Float64[np.ndarray, "p 3"]
    up: Float64[np.ndarray, " 3"]
    ground: Float64[np.ndarray, " 3"] | None
    on_ground: Bool[np.ndarray, " p"]


def find_walls(thin: ThinView, draws: Draws, config: PasteConfig) -> Walls | None:
    """Walls that are seen in at least a fifth as many cells as the largest one, and the ground.

    None if no depth is known.
    """
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
    is_wall &= support >= 0.2 * support[is_wall].max(initial=0)
    rays, inverse = thin.rays[known], thin.inverse_depth[known]
    is_level = m @ up <= -0.98 * np.linalg.norm(m, axis=1)
    ground, on_ground = _ground(m[is_level], inliers[is_level], rays, inverse, config)
    return Walls(
        m=m[is_wall], inliers=inliers[is_wall], rays=rays, up=up, ground=ground, on_ground=on_ground
    )


def _ground(
    m: Float64[np.ndarray, "k 3"],
    inliers: Bool[np.ndarray, "k n"],
    rays: Float64[np.ndarray, "n 3"],
    inverse_depth: Float64[np.ndarray, " n"],
    config: PasteConfig,
) -> tuple[Float64[np.ndarray, " 3"] | None, Bool[np.ndarray, " n"]]:
    """Of level planes below the camera the one that most points lie on, and which do.

    At least 5 % of the points must lie on it, and at most 5 % below it, as the floor does below a
    table.
    """
    surface = m @ rays.T
    slack = config.plane_tolerance * surface + config.depth_noise
    under = inverse_depth < surface - slack
    good = (inliers.mean(axis=1) >= 0.05) & (under.mean(axis=1) <= 0.05)
    if not good.any():
        return None, np.zeros(len(rays), dtype=bool)
    own = inliers[good][np.argmax(inliers[good].sum(axis=1))]
    return fit_plane_trimmed(rays[own], inverse_depth[own]), own


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
