"""Exact depth and regions: a ray through the centre of every pixel, and the plane it meets."""

from dataclasses import dataclass

import bpy
import numpy as np
from mathutils import Vector as BlenderVector
from mathutils.bvhtree import BVHTree

from render.model import OPENING, Part
from render.stage import Camera, FlatThing, Patch, Stage


@dataclass(frozen=True)
class Solids:
    """The triangles of a mesh as Blender renders them.

    Attributes:
        corners: (n, 3, 3) in metres.
        part: (n,) number of the part of each.
    """

    tree: BVHTree
    corners: np.ndarray
    part: np.ndarray

    @staticmethod
    def of(thing: bpy.types.Object, parts: list[Part]) -> "Solids":
        """The evaluated mesh of ``cycles.mesh_of(parts)``."""
        mesh = thing.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
        mesh.calc_loop_triangles()
        vertices = np.empty((len(mesh.vertices), 3), np.float32)
        mesh.vertices.foreach_get("co", vertices.ravel())
        count = len(mesh.loop_triangles)
        triangles, polygon = np.empty((count, 3), np.int32), np.empty(count, np.int32)
        mesh.loop_triangles.foreach_get("vertices", triangles.ravel())
        mesh.loop_triangles.foreach_get("polygon_index", polygon)
        of_polygon = np.repeat(np.arange(len(parts)), [len(part.faces) for part in parts])
        tree = BVHTree.FromPolygons(vertices.tolist(), triangles.tolist(), all_triangles=True)
        return Solids(tree, vertices[triangles].astype(np.float64), of_polygon[polygon])

    def clearance(self, point: np.ndarray) -> float:
        """Distance to the nearest surface in metres."""
        return float(self.tree.find_nearest(BlenderVector(point))[3])

    def cast(self, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) planar z in metres, +inf where nothing is, and the part seen, -1 for none."""
        rays = camera.rays()
        flat, eye = rays.reshape(-1, 3), BlenderVector(camera.eye)
        hits = (self.tree.ray_cast(eye, BlenderVector(ray))[2] for ray in flat)
        index = np.array([-1 if hit is None else hit for hit in hits])
        a, b, c = np.moveaxis(self.corners[index], 1, 0)
        normal = np.cross(b - a, c - a)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = ((a - camera.eye) * normal).sum(-1) / (flat * normal).sum(-1)
        shape = rays.shape[:2]
        part = np.where(index < 0, -1, self.part[index])
        return np.where(index < 0, np.inf, z).reshape(shape), part.reshape(shape)


def through(patch: Patch, camera: Camera) -> np.ndarray:
    """(h, w) planar z at which each ray crosses a rectangle, +inf where it does not."""
    rays = camera.rays()
    normal = np.cross(patch.right, patch.up)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = ((patch.corner - camera.eye) @ normal) / (rays @ normal)
    inside = z > 0
    at = camera.eye + z[..., None] * rays - patch.corner
    for side in (patch.right, patch.up):
        along = at @ side / (side @ side)
        inside &= (along >= 0) & (along <= 1)
    return np.where(inside, z, np.inf)


def regions(stage: Stage, camera: Camera, z: np.ndarray, part: np.ndarray) -> np.ndarray:
    """(h, w) uint8 regions of what ``Solids.cast`` saw."""
    of_part = np.array([p.region for p in stage.model.parts] + [0], np.uint8)
    region = of_part[part]
    for patch in stage.openings:
        region[(through(patch, camera) < z - 1e-6) & (region == 0)] = OPENING
    return region


def check_planes(
    things: list[FlatThing],
    camera: Camera,
    z: np.ndarray,
    part: np.ndarray,
    tolerance: float = 1e-4,
) -> None:
    """Every pane's pixels lie on the plane that it was built on, and 1/z is affine in them.

    Raises:
        AssertionError: they do not; the relative error in 1/z is above ``tolerance``.
    """
    v, u = np.mgrid[: camera.height, : camera.width]
    for thing in things:
        seen = part == thing.part
        if seen.sum() < 4:
            continue
        normal = np.cross(thing.patch.right, thing.patch.up)
        known = (camera.rays()[seen] @ normal) / ((thing.patch.corner - camera.eye) @ normal)
        error = np.abs(1 / z[seen] / known - 1).max()
        pixels = np.stack([u[seen], v[seen], np.ones(seen.sum())], axis=1)
        fitted = pixels @ np.linalg.lstsq(pixels, 1 / z[seen], rcond=None)[0]
        bend = np.abs(fitted * z[seen] - 1).max()
        assert max(error, bend) < tolerance, f"pane {thing.part}: {error=}, {bend=}"
