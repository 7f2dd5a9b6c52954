"""Light on the surfaces of a scene: area lights and the sun with shadows, and one bounce.

Light is computed at nodes, points on a coarse grid over each surface; ``lightmap`` makes maps of
it. All of it is irradiance over pi, so that radiance is albedo times light.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int8

from flatdepth.rooms.bodies import first_hit, shell_exit
from flatdepth.rooms.scene import Emitter, Scene, Sky, Sun
from flatdepth.rooms.surfaces import Quad, Surface
from flatdepth.rooms.vectors import Vector

_SKIN_M = 0.004  # light is gathered this far off a surface, so that it does not shadow itself
_MOST_NODES = 96  # along one side of a surface
_EMITTER_RAYS = 32  # shared by all area lights
_GATHER_RAYS = 40
_GATHER_NODES = 400  # at a time, so that their rays stay in the processor's cache

Points = Float32[np.ndarray, "n 3"]


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The points at which light is computed, all surfaces one after the other.

    Attributes:
        points, normals: in the world.
        grids: per surface (first node, nodes along t, nodes along s); zero nodes if its light is
            fixed.
    """

    points: Points
    normals: Points
    grids: list[tuple[int, int, int]]


def place_nodes(surfaces: Sequence[Surface]) -> Nodes:
    points, normals = [np.zeros((0, 3))], [np.zeros((0, 3))]
    grids = []
    start = 0
    for surface in surfaces:
        if surface.coat.light is not None:
            grids.append((start, 0, 0))
            continue
        s, t = (_node_line(length, surface.coat.spacing_m) for length in surface.size)
        at, normal = surface.at(*np.meshgrid(s, t))
        points.append((at + _SKIN_M * normal).reshape(-1, 3))
        normals.append(normal.reshape(-1, 3))
        grids.append((start, len(t), len(s)))
        start += len(s) * len(t)
    return Nodes(
        points=np.concatenate(points).astype(np.float32),
        normals=np.concatenate(normals).astype(np.float32),
        grids=grids,
    )


def _node_line(length: float, spacing: float) -> Float64[np.ndarray, " n"]:
    if length < 0.4 * spacing:
        return np.array([length / 2])
    inset = min(0.01, 0.1 * length)
    count = min(max(round(length / spacing) + 1, 2), _MOST_NODES)
    return np.linspace(inset, length - inset, count)


def direct_light(scene: Scene, nodes: Nodes) -> Points:
    """What the nodes receive from area lights and the sun, with shadows."""
    light = np.zeros_like(nodes.points)
    side = round(min(max(math.sqrt(_EMITTER_RAYS / max(len(scene.emitters), 1)), 2), 4))
    for emitter in scene.emitters:
        for source in _lattice(emitter, side):
            weight = _lamplight(scene, nodes, emitter, source, side**2)
            light += weight[:, None] * emitter.radiance.astype(np.float32)
    if scene.sun is not None:
        light += _sunlight(scene, scene.sun, nodes)
    return light / np.float32(math.pi)


def _lattice(emitter: Emitter, side: int) -> Iterator[Vector]:
    """``side x side`` points on a lamp; no two share a row, which softens shadow steps."""
    steps = (np.arange(side) + 0.5) / side
    for i, alpha in enumerate(steps):
        for j, beta in enumerate(steps):
            along_a = (alpha + (j / side - 0.5) / side) % 1
            along_b = (beta + (i / side - 0.5) / side) % 1
            yield emitter.corner + along_a * emitter.a + along_b * emitter.b


def _lamplight(
    scene: Scene, nodes: Nodes, emitter: Emitter, source: Vector, sources: int
) -> Float32[np.ndarray, " n"]:
    """Irradiance per radiance from one of the points that stand for a lamp."""
    normal = np.cross(emitter.a, emitter.b)
    area = float(np.linalg.norm(normal))
    to_light = source.astype(np.float32) - nodes.points
    square = np.maximum(np.einsum("ni,ni->n", to_light, to_light), 0.04)
    facing = (normal / area).astype(np.float32)
    leaving = np.sqrt(square) if emitter.all_round else -(to_light @ facing)
    arriving = np.maximum(np.einsum("ni,ni->n", to_light, nodes.normals), 0)
    weight = area / sources * np.maximum(leaving, 0) * arriving / square**2
    lit = np.flatnonzero(weight > 0)
    blocked, _ = first_hit(scene.bodies, nodes.points[lit], to_light[lit])
    weight[lit[blocked < 1]] = 0
    return weight


def _sunlight(scene: Scene, sun: Sun, nodes: Nodes) -> Points:
    direction = sun.direction.astype(np.float32)
    weight = np.maximum(nodes.normals @ direction, 0)
    lit = np.flatnonzero(weight > 0)
    towards = np.broadcast_to(direction, (len(lit), 3))
    blocked, _ = first_hit(scene.bodies, nodes.points[lit], towards)
    dark = np.isfinite(blocked)
    if scene.shell_m is not None:
        exit_t, face = shell_exit(scene.shell_m, nodes.points[lit], towards)
        dark |= ~_through_hole(scene, face, nodes.points[lit] + exit_t[:, None] * towards)
    weight[lit[dark]] = 0
    return weight[:, None] * sun.irradiance.astype(np.float32)


def bounced_light(scene: Scene, nodes: Nodes, direct: Points) -> Points:
    """What the nodes receive from other surfaces, lit by ``direct``, and from the open sky."""
    local = _cosine_directions(_GATHER_RAYS)
    albedo = np.array([paint.mean for paint in scene.paints])
    typical = direct.mean(axis=0)
    # With few rays, the small bright patch around a lamp would leave spots on the walls.
    reflected = np.minimum(direct, 2.5 * typical)
    gathered = np.zeros_like(direct)
    for first in range(0, len(direct), _GATHER_NODES):
        span = np.s_[first : first + _GATHER_NODES]
        frames = _tangent_frames(nodes.normals[span])
        rays = np.einsum("kj,nij->nki", local, frames).reshape(-1, 3)
        origins = np.repeat(nodes.points[span], _GATHER_RAYS, axis=0)
        t, paint = first_hit(scene.bodies, origins, rays)
        if scene.shell_m is None:
            seen, distant = _open_air(scene.sky, typical, rays), np.full_like(t, np.inf)
        else:
            distant, face = shell_exit(scene.shell_m, origins, rays)
            points = origins + distant[:, None] * rays
            seen = _shell_radiance(scene, nodes, reflected, albedo, face, points)
        radiance = np.where((t < distant)[:, None], albedo[paint] * typical, seen)
        # Nearby surfaces are themselves in a corner that one bounce does not reach.
        nearness = np.minimum(1, np.minimum(t, distant) / np.float32(0.5)) ** np.float32(0.4)
        radiance *= nearness[:, None]
        gathered[span] = radiance.reshape(-1, _GATHER_RAYS, 3).mean(axis=1)
    return gathered


def _open_air(sky: Sky, typical: Float32[np.ndarray, "3"], rays: Points) -> Points:
    up = np.clip(rays[:, 2:], 0, 1)
    above = sky.horizon + (sky.zenith - sky.horizon) * up
    return np.where(rays[:, 2:] > 0, above, 0.25 * typical).astype(np.float32)


def _shell_radiance(
    scene: Scene,
    nodes: Nodes,
    light: Points,
    albedo: Float32[np.ndarray, "paints 3"],
    face: Int8[np.ndarray, " r"],
    points: Float32[np.ndarray, "r 3"],
) -> Float32[np.ndarray, "r 3"]:
    """What the walls, floor and ceiling send back; nothing through an opening (an emitter)."""
    radiance = np.zeros_like(points)
    for index, quad in enumerate(scene.shell):
        rays = np.flatnonzero(face == index)
        s, t = quad.coordinates(points[rays])
        start, rows, columns = nodes.grids[index]
        column = np.clip(np.rint(s * ((columns - 1) / quad.size[0])), 0, columns - 1)
        row = np.clip(np.rint(t * ((rows - 1) / quad.size[1])), 0, rows - 1)
        node = (start + row * columns + column).astype(np.int64)
        radiance[rays] = albedo[quad.coat.paint] * light[node]
        radiance[rays[_in_hole(quad, s, t)]] = 0
    return radiance


def _through_hole(
    scene: Scene, face: Int8[np.ndarray, " r"], points: Float32[np.ndarray, "r 3"]
) -> Bool[np.ndarray, " r"]:
    through = np.zeros(len(points), dtype=bool)
    for index, quad in enumerate(scene.shell):
        through |= (face == index) & _in_hole(quad, *quad.coordinates(points))
    return through


def _in_hole(
    quad: Quad, s: Float32[np.ndarray, " r"], t: Float32[np.ndarray, " r"]
) -> Bool[np.ndarray, " r"]:
    inside = np.zeros(len(s), dtype=bool)
    for s0, t0, s1, t1 in quad.holes:
        inside |= (s > s0) & (s < s1) & (t > t0) & (t < t1)
    return inside


def _cosine_directions(n: int) -> Float32[np.ndarray, "n 3"]:
    """Directions around +z with density cosine / pi: a Fibonacci spiral lifted up."""
    k = np.arange(n)
    radius = np.sqrt((k + 0.5) / n)
    angle = k * math.pi * (3 - math.sqrt(5))
    columns = [radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - radius**2)]
    return np.stack(columns, axis=1).astype(np.float32)


def _tangent_frames(normals: Points) -> Float32[np.ndarray, "n 3 3"]:
    """Rotations whose last column is the normal."""
    helper = np.where(np.abs(normals[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    first = np.cross(helper, normals)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(normals, first), normals], axis=2).astype(np.float32)
