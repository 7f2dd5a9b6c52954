"""Colours: texture times light on the nearest surfaces, the sky where there are none."""

import math

import numpy as np
from jaxtyping import Float, Float32, Int16

from flatdepth.rooms.camera import Camera
from flatdepth.rooms.lightmap import Lightmaps
from flatdepth.rooms.raycast import cast, quad_coefficients
from flatdepth.rooms.scene import Scene, Sky
from flatdepth.rooms.surfaces import Quad
from flatdepth.rooms.vectors import Vector

_SAMPLES = 2  # rays per pixel along each side
_BRIGHTEST = 4.0

_Float32s = Float32[np.ndarray, " n"]


def shade(scene: Scene, light: Lightmaps, camera: Camera) -> Float32[np.ndarray, "h w 3"]:
    """Radiance per pixel, averaged over 2x2 rays."""
    radiance = _radiance(scene, light, camera)
    # Highlights are cut before averaging: an edge against a bright window stays smooth.
    np.minimum(radiance, _BRIGHTEST, out=radiance)
    fine = radiance.reshape(camera.height, _SAMPLES, camera.width, _SAMPLES, 3)
    total = sum(fine[:, i, :, j] for i in range(_SAMPLES) for j in range(_SAMPLES))
    return np.asarray(total, dtype=np.float32) / np.float32(_SAMPLES**2)


def _radiance(scene: Scene, light: Lightmaps, camera: Camera) -> Float32[np.ndarray, "n 3"]:
    """Radiance per ray, rows of pixels one after the other."""
    u, v = camera.grid(_SAMPLES)
    ids, inverse = (grid.ravel() for grid in cast(scene, camera, u, v, np.float32))
    order = np.argsort(ids, kind="stable")
    bounds = np.searchsorted(ids[order], np.arange(-1, len(scene.surfaces) + 1))
    texel, cell = np.zeros(ids.size, dtype=np.int32), np.zeros(ids.size, dtype=np.int32)
    _, s_rows, t_rows, distance = quad_coefficients(scene.quads, camera)
    # A sample's footprint on a plane grows with z^1.5 (z for scale, half a power for the slant).
    focal = float(camera.K_px[0, 0]) * _SAMPLES
    with np.errstate(divide="ignore"):
        footprint = -1.5 * np.log2(inverse) - np.float32(math.log2(focal))
    for index, surface in enumerate(scene.surfaces):
        rays = order[bounds[index + 1] : bounds[index + 2]]
        if not rays.size:
            continue
        at_u, at_v = u[rays % len(u)].astype(np.float32), v[rays // len(u)].astype(np.float32)
        depth = 1 / inverse[rays]
        if isinstance(surface, Quad):
            i = int(np.searchsorted(scene.quads.ids, index))
            s, t = (_affine(rows[i], at_u, at_v) * depth for rows in (s_rows, t_rows))
            away = max(float(distance[i]), 1e-3)  # depth over this is the slant's stretch
        else:
            points = camera.position + depth[:, None] * camera.rays(at_u, at_v)
            s, t = surface.coordinates(points)
            away = float(depth.mean())
        paint = scene.paints[surface.coat.paint]
        finest = 0.5 * math.log2(away) + math.log2(paint.texel_m)
        # Every surface shows its own part of the texture.
        shift = index * 0.618 * paint.period_m
        texel[rays] = paint.texels(s + shift, t + shift, footprint[rays] - np.float32(finest))
        texel[rays] += scene.atlas_offsets[surface.coat.paint]
        cell[rays] = light.cell(index, s, t)
    radiance = scene.atlas.take(texel, axis=0)
    radiance *= light.values.take(cell, axis=0)
    _add_haze(scene, radiance, ids, inverse)
    missed = order[bounds[0] : bounds[1]]
    if missed.size:
        rays = camera.rays(u[missed % len(u)], v[missed // len(u)])
        radiance[missed] = _sky_radiance(scene.sky, rays)
    return radiance


def _affine(q: Vector, u: _Float32s, v: _Float32s) -> _Float32s:
    """q . (u, v, 1) in float32."""
    q32 = q.astype(np.float32)
    total = q32[0] * u
    total += q32[1] * v
    total += q32[2]
    return total


def _sky_radiance(sky: Sky, rays: Float[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 3"]:
    """Radiance of the sky along world directions."""
    up = rays[:, 2] / np.linalg.norm(rays, axis=1)
    height = np.clip(up, 0, 1)[:, None] ** 0.5
    clear = sky.horizon + (sky.zenith - sky.horizon) * height
    # Clouds lie on a plane overhead, so that they shrink towards the horizon.
    overhead = 40 * rays[:, :2] / np.maximum(rays[:, 2:], 0.02 * np.abs(rays).max())
    column, row = (np.floor(overhead).astype(np.int64) % len(sky.clouds)).T
    cover = sky.clouds[row, column] * np.clip((up - 0.02) * 8, 0, 1)
    white = np.maximum(sky.horizon, sky.zenith).max() * 1.15
    return (clear + (white - clear) * cover[:, None]).astype(np.float32)


def _add_haze(
    scene: Scene,
    radiance: Float32[np.ndarray, "n 3"],
    ids: Int16[np.ndarray, " n"],
    inverse: Float32[np.ndarray, " n"],
) -> None:
    """Aerial perspective: hazy surfaces fade to the horizon's colour, in place."""
    hazy = np.array([*(s.coat.hazy for s in scene.surfaces), False])
    rays = np.flatnonzero(hazy[ids])
    share = 1 - np.exp(-1 / (inverse[rays] * np.float32(scene.sky.haze_m)))
    horizon = scene.sky.horizon.astype(np.float32)
    radiance[rays] += share[:, None] * (horizon - radiance[rays])
