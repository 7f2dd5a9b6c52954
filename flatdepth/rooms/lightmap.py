"""Light baked once per scene, to be looked up while shading."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32

from flatdepth.rooms.light import bounced_light, direct_light, place_nodes
from flatdepth.rooms.scene import Scene
from flatdepth.rooms.surfaces import OpenLight, Quad, Surface

_REFINE = 8  # cells per interval between nodes, so that looking up the nearest is enough

_Grid = Float32[np.ndarray, "t s 3"]


@dataclass(frozen=True, kw_only=True)
class Lightmaps:
    """Irradiance over pi of every surface on a grid of cells.

    Attributes:
        values: the surfaces one after the other, rows of constant t.
        starts: where each surface begins.
        cells: number of cells along s and t of each surface.
        sizes: lengths along s and t of each surface.
    """

    values: Float32[np.ndarray, "cells 3"]
    starts: list[int]
    cells: list[tuple[int, int]]
    sizes: list[tuple[float, float]]

    def cell(
        self, index: int, s: Float[np.ndarray, " n"], t: Float[np.ndarray, " n"]
    ) -> Int32[np.ndarray, " n"]:
        """Rows of ``values`` at coordinates of the surface with that index."""
        (columns, rows), (size_s, size_t) = self.cells[index], self.sizes[index]
        column = np.clip(s * (columns / size_s), 0, columns - 1).astype(np.int32)
        row = np.clip(t * (rows / size_t), 0, rows - 1).astype(np.int32)
        return self.starts[index] + row * columns + column


def bake(scene: Scene) -> Lightmaps:
    """Light on all surfaces; in a room, scaled so that irradiance is around pi."""
    nodes = place_nodes(scene.surfaces)
    direct = direct_light(scene, nodes)
    bounced = bounced_light(scene, nodes, direct)
    gain = 1.0
    if scene.shell:
        albedo = np.mean([scene.paints[quad.coat.paint].mean for quad in scene.shell])
        bounced /= 1 - albedo  # the geometric series of all further bounces
        end = nodes.grids[len(scene.shell)][0]
        gain = 1 / float((direct + bounced)[:end].mean())
    values, starts, cells, total = [], [], [], 0
    for surface, (start, rows, columns) in zip(scene.surfaces, nodes.grids, strict=True):
        if surface.coat.light is not None:
            grid = _open_grid(surface, surface.coat.light)
        else:
            span = np.s_[start : start + rows * columns]
            soft = bounced[span].reshape(rows, columns, 3)
            if min(rows, columns) > 3:
                soft = _blur(_blur(soft))
            grid = _refine(direct[span].reshape(rows, columns, 3) + soft) * np.float32(gain)
        values.append(grid.reshape(-1, 3))
        starts.append(total)
        cells.append((grid.shape[1], grid.shape[0]))
        total += grid.shape[0] * grid.shape[1]
    return Lightmaps(
        values=np.concatenate(values),
        starts=starts,
        cells=cells,
        sizes=[surface.size for surface in scene.surfaces],
    )


def _open_grid(surface: Surface, light: OpenLight) -> _Grid:
    cells = (1, 1) if isinstance(surface, Quad) else (16, 8)
    s, t = ((np.arange(n) + 0.5) / n * size for n, size in zip(cells, surface.size, strict=True))
    _, normals = surface.at(*np.meshgrid(s, t))
    return light.at(normals).astype(np.float32)


def _blur(grid: _Grid) -> _Grid:
    """A 3x3 binomial filter: the gather uses few rays, and bounced light is smooth."""
    padded = np.pad(grid, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / np.float32(16)


def _refine(grid: _Grid) -> Float32[np.ndarray, "fine_t fine_s 3"]:
    """Bilinear interpolation to cells finer than the nodes."""
    rows, columns = (_interpolation(n) for n in grid.shape[:2])
    return np.einsum("rj,jsc->rsc", rows, np.einsum("sk,jkc->jsc", columns, grid))


def _interpolation(nodes: int) -> Float32[np.ndarray, "cells nodes"]:
    """Weights of linear interpolation at cell centres."""
    if nodes == 1:
        return np.ones((1, 1), dtype=np.float32)
    at = (np.arange((nodes - 1) * _REFINE) + 0.5) / _REFINE
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(nodes))).astype(np.float32)
