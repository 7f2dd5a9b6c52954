"""The nearest surface along each ray, and its exact depth.

For a plane, 1/z and the surface coordinates over z are affine in the pixel coordinates, so a
rectangle is drawn by evaluating affine functions on the pixels that its projection covers.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int16

from flatdepth.rooms.camera import Camera
from flatdepth.rooms.scene import QuadTable, Scene
from flatdepth.rooms.surfaces import Quad
from flatdepth.rooms.vectors import Vector

_NEAR_M = 0.05  # in front of which nothing is drawn; cameras keep farther away from everything

_Window = tuple[slice, slice]
_Edges = Float64[np.ndarray, "n e 3"]
_Bounds = Float64[np.ndarray, "n 2"]
_Rows = Float64[np.ndarray, "n 3"]


def cast(
    scene: Scene,
    camera: Camera,
    u: Float64[np.ndarray, " w"],
    v: Float64[np.ndarray, " h"],
    dtype: type[np.float32] | type[np.float64],
) -> tuple[Int16[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """The nearest surface along the ray through each (u, v).

    Args:
        u, v: increasing pixel coordinates of the columns and rows.
        dtype: precision of the result and the tests.

    Returns:
        Surface index (-1: none) and inverse planar depth in 1/m (0: none).
    """
    ids = np.full((len(v), len(u)), -1, dtype=np.int16)
    inverse = np.zeros((len(v), len(u)), dtype=dtype)

    def draw(index: int, window: _Window, depth: np.ndarray, hit: np.ndarray) -> None:
        np.copyto(inverse[window], depth, where=hit, casting="same_kind")
        np.copyto(ids[window], np.int16(index), where=hit)

    # Neighbouring faces overlap by a hair, so that rounding leaves no crack between them.
    slack = 1e-4 if dtype is np.float32 else 1e-9
    table = scene.quads
    w, s, t, distance = quad_coefficients(table, camera)
    windows = _windows(u, v, *_pixel_bounds(camera, *_quad_edges(table)))
    for i in np.flatnonzero(distance > 1e-9):
        if (window := windows[i]) is None:
            continue
        plane = _AffineGrid(u[window[1]], v[window[0]], dtype)
        depth = plane(w[i])
        hit = depth > inverse[window]
        hit &= _inside(plane, table.quads[i], w[i], s[i], t[i], slack)
        draw(int(table.ids[i]), window, depth, hit)
    for index, solid in scene.solids:
        bounds = _pixel_bounds(camera, *_box_edges(*solid.bounds))
        if (window := _windows(u, v, *bounds)[0]) is None:
            continue
        rays = camera.rays(*np.broadcast_arrays(u[window[1]], v[window[0], None]))
        depth = solid.inverse_depth(camera.position, rays)
        draw(index, window, depth, depth > inverse[window])
    return ids, inverse


def depth_of(inverse: Float64[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Planar z in metres from inverse depth, +inf where nothing was hit."""
    with np.errstate(divide="ignore"):
        return (1 / inverse).astype(np.float32)


def quad_coefficients(
    table: QuadTable, camera: Camera
) -> tuple[_Rows, _Rows, _Rows, Float64[np.ndarray, " n"]]:
    """Per quad, rows that are affine in (u, v, 1): 1/z, s/z and t/z; and the camera's distance.

    With ray d and plane n.X = n.c: 1/z = n.d / n.(c-o), s/z = a.(o-c)/z + a.d.
    """
    offset = camera.position - table.corner
    distance = np.einsum("ni,ni->n", table.normal, offset)
    to_pixel = camera.ray_matrix
    with np.errstate(divide="ignore"):
        w = (table.normal @ to_pixel) / -distance[:, None]
    s = np.einsum("ni,ni->n", table.a, offset)[:, None] * w + table.a @ to_pixel
    t = np.einsum("ni,ni->n", table.b, offset)[:, None] * w + table.b @ to_pixel
    return w, s, t, distance


@dataclass(frozen=True, slots=True)
class _AffineGrid:
    """Evaluates q . (u, v, 1) over a grid as a sum of a column and a row."""

    u: Float64[np.ndarray, " w"]
    v: Float64[np.ndarray, " h"]
    dtype: type

    def __call__(self, q: Vector) -> Float[np.ndarray, "h w"]:
        row = (q[0] * self.u + q[2]).astype(self.dtype)
        return np.add.outer((q[1] * self.v).astype(self.dtype), row)


def _inside(
    plane: _AffineGrid, quad: Quad, w: Vector, s: Vector, t: Vector, slack: float
) -> Bool[np.ndarray, "h w"]:
    """Whether s and t are on the quad, tested on s/z and t/z to stay affine."""
    size_s, size_t = quad.size
    if quad.disc:
        across, along = plane(s * 2 / size_s - w), plane(t * 2 / size_t - w)
        return across**2 + along**2 <= plane(w) ** 2
    inside = plane(s + slack * w) >= 0
    inside &= plane((size_s + slack) * w - s) >= 0
    inside &= plane(t + slack * w) >= 0
    inside &= plane((size_t + slack) * w - t) >= 0
    for s0, t0, s1, t1 in quad.holes:
        hole = plane(s - s0 * w) > 0
        hole &= plane(s1 * w - s) > 0
        hole &= plane(t - t0 * w) > 0
        hole &= plane(t1 * w - t) > 0
        inside &= ~hole
    return inside


def _windows(
    u: Float64[np.ndarray, " w"], v: Float64[np.ndarray, " h"], low: _Bounds, high: _Bounds
) -> list[_Window | None]:
    """Rows and columns within pixel bounds and a pixel around them, None if there are none."""
    left, right = np.searchsorted(u, low[:, 0] - 1), np.searchsorted(u, high[:, 0] + 1)
    top, bottom = np.searchsorted(v, low[:, 1] - 1), np.searchsorted(v, high[:, 1] + 1)
    return [
        np.s_[r0:r1, c0:c1] if r0 < r1 and c0 < c1 else None
        for r0, r1, c0, c1 in zip(top, bottom, left, right, strict=True)
    ]


def _pixel_bounds(camera: Camera, starts: _Edges, ends: _Edges) -> tuple[_Bounds, _Bounds]:
    """Lowest and highest (u, v) of the part in front of the camera; low > high if there is none.

    Args:
        starts, ends: the edges of each shape.
    """
    z0 = (starts - camera.position) @ camera.rotation[:, 2]
    z1 = (ends - camera.position) @ camera.rotation[:, 2]
    crosses = (z0 < _NEAR_M) != (z1 < _NEAR_M)
    share = np.where(crosses, (_NEAR_M - z0) / np.where(crosses, z1 - z0, 1.0), 0.0)
    points = np.concatenate([starts, starts + share[..., None] * (ends - starts)], axis=1)
    keep = np.concatenate([z0 >= _NEAR_M, crosses], axis=1)[..., None]
    uv = camera.project(points)
    return np.where(keep, uv, np.inf).min(axis=1), np.where(keep, uv, -np.inf).max(axis=1)


def _quad_edges(table: QuadTable) -> tuple[_Edges, _Edges]:
    along_a, along_b = table.a * table.size[:, :1], table.b * table.size[:, 1:]
    corner = table.corner
    corners = np.stack(
        [corner, corner + along_a, corner + along_a + along_b, corner + along_b], axis=1
    )
    return corners, np.roll(corners, -1, axis=1)


def _box_edges(low: Vector, high: Vector) -> tuple[_Edges, _Edges]:
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    steps = np.abs(corners[:, None] - corners).sum(axis=2)
    starts, ends = np.nonzero(np.triu(steps == 1))
    points = low + corners * (high - low)
    return points[None, starts], points[None, ends]
