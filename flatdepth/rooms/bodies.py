"""What stops light: boxes that turn together, and the walls of a room."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int8, Int16

from flatdepth.rooms.vectors import Vector, turn_about_up

_CHUNK = 8192  # rays that stay in the processor's cache while all bodies are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """An upright box between two corners, and the paint on it (index into ``Scene.paints``)."""

    low: Vector
    high: Vector
    paint: int


@dataclass(frozen=True, kw_only=True)
class Body:
    """One piece of furniture: blocks that turn together around a vertical axis.

    Attributes:
        x, y, yaw: where its frame is and how it is turned, metres and radians.
        blocks: boxes in that frame.
    """

    x: float
    y: float
    yaw: float
    blocks: tuple[Block, ...]

    @cached_property
    def low(self) -> Vector:
        return np.min([block.low for block in self.blocks], axis=0)

    @cached_property
    def high(self) -> Vector:
        return np.max([block.high for block in self.blocks], axis=0)

    def into_frame(self, point: Vector) -> Vector:
        """A world point in the body's frame."""
        return (point - np.array([self.x, self.y, 0.0])) @ turn_about_up(self.yaw)

    def distance(self, point: Vector) -> float:
        """From a world point to the nearest block, 0 inside."""
        p = self.into_frame(point)
        return min(
            float(np.linalg.norm(p - np.clip(p, block.low, block.high))) for block in self.blocks
        )


def shell_exit(
    shell_m: Vector, origins: Float32[np.ndarray, "n 3"], rays: Float32[np.ndarray, "n 3"]
) -> tuple[Float32[np.ndarray, " n"], Int8[np.ndarray, " n"]]:
    """Ray parameter and face (in the order of ``Scene``) at which rays leave [0, shell_m]."""
    wall = np.where(rays > 0, shell_m.astype(np.float32), np.float32(0))
    t = np.abs((wall - origins) / np.where(np.abs(rays) < 1e-9, np.float32(1e-9), rays))
    axis = t.argmin(axis=1)
    row = np.arange(len(t))
    return t[row, axis], (2 * axis + (rays[row, axis] > 0)).astype(np.int8)


def first_hit(
    bodies: Sequence[Body], origins: Float32[np.ndarray, "n 3"], rays: Float32[np.ndarray, "n 3"]
) -> tuple[Float32[np.ndarray, " n"], Int16[np.ndarray, " n"]]:
    """Ray parameter of the nearest block (inf: none) and its paint (0 if none)."""
    t = np.full(len(rays), np.inf, dtype=np.float32)
    paint = np.zeros(len(rays), dtype=np.int16)
    for first in range(0, len(rays), _CHUNK):
        span = np.s_[first : first + _CHUNK]
        starts, steps = np.ascontiguousarray(origins[span].T), np.ascontiguousarray(rays[span].T)
        for body in bodies:
            _hit_body(body, starts, steps, t[span], paint[span])
    return t, paint


def _hit_body(
    body: Body,
    starts: Float32[np.ndarray, "3 n"],
    steps: Float32[np.ndarray, "3 n"],
    t: Float32[np.ndarray, " n"],
    paint: Int16[np.ndarray, " n"],
) -> None:
    """Lower t, and set paint, where rays hit a block of the body first."""
    c, s = np.float32(math.cos(body.yaw)), np.float32(math.sin(body.yaw))
    x, y = starts[0] - np.float32(body.x), starts[1] - np.float32(body.y)
    start = np.stack([c * x + s * y, c * y - s * x, starts[2]])
    inverse = np.stack([c * steps[0] + s * steps[1], c * steps[1] - s * steps[0], steps[2]])
    inverse[np.abs(inverse) < 1e-9] = 1e-9
    np.reciprocal(inverse, out=inverse)
    enter, leave = _slab(start, inverse, body.low, body.high)
    near = np.flatnonzero((enter < leave) & (leave > 0) & (enter < t))
    if not near.size:
        return
    start, inverse = start[:, near], inverse[:, near]
    for block in body.blocks:
        enter, leave = _slab(start, inverse, block.low, block.high)
        hit = (enter < leave) & (leave > 0) & (enter < t[near])
        t[near[hit]] = np.maximum(enter[hit], 0)
        paint[near[hit]] = block.paint


def _slab(
    start: Float32[np.ndarray, "3 n"],
    inverse: Float32[np.ndarray, "3 n"],
    low: Vector,
    high: Vector,
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Where rays, given with the inverse of their direction, enter and leave a box."""
    at_low = (low.astype(np.float32)[:, None] - start) * inverse
    at_high = (high.astype(np.float32)[:, None] - start) * inverse
    enter, leave = np.minimum(at_low, at_high), np.maximum(at_low, at_high)
    return (
        np.maximum(np.maximum(enter[0], enter[1]), enter[2]),
        np.minimum(np.minimum(leave[0], leave[1]), leave[2]),
    )
