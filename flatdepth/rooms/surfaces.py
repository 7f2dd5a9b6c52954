"""The shapes that are drawn: rectangles, discs, drums and balls, and how they look.

Every shape has surface coordinates (s, t) in metres: ``at`` goes from them to the world,
``coordinates`` back.
"""

import math
from dataclasses import dataclass

import numpy as np

from flatdepth.rooms.vectors import Scalars, Vector, Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLight:
    """Unshadowed light by orientation, for what is lit by itself or seen through a window.

    Attributes:
        ambient: irradiance over pi from above; half of it arrives from below.
        sun: irradiance over pi of a surface facing ``direction``.
        direction: unit vector towards the sun.
    """

    ambient: Vector
    sun: Vector
    direction: Vector

    def at(self, normals: Vectors) -> Vectors:
        """Irradiance over pi for unit normals."""
        facing = np.maximum(normals @ self.direction, 0)[..., None]
        return self.ambient * (0.75 + 0.25 * normals[..., 2:]) + self.sun * facing


@dataclass(frozen=True, slots=True, kw_only=True)
class Coat:
    """How a surface looks, whatever its shape.

    Attributes:
        paint: index into ``Scene.paints``.
        light: its light if that is not to be baked.
        spacing_m: distance between baked points.
        hazy: whether aerial perspective applies.
    """

    paint: int = 0
    light: OpenLight | None = None
    spacing_m: float = 0.3
    hazy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quad:
    """A rectangle (or the ellipse in it), seen only from the side its normal ``a x b`` points to.

    Attributes:
        corner: the point ``(s, t) = (0, 0)``.
        a, b: orthonormal directions of s and t.
        size: lengths along a and b.
        holes: rectangles ``(s0, t0, s1, t1)`` cut out.
        disc: keep only the inscribed ellipse.
        coat: how it looks.
    """

    corner: Vector
    a: Vector
    b: Vector
    size: tuple[float, float]
    coat: Coat
    holes: tuple[tuple[float, float, float, float], ...] = ()
    disc: bool = False

    def at(self, s: Scalars, t: Scalars) -> tuple[Vectors, Vectors]:
        """Points and normals at surface coordinates."""
        points = self.corner + s[..., None] * self.a + t[..., None] * self.b
        return points, np.broadcast_to(np.cross(self.a, self.b), points.shape)

    def coordinates(self, points: Vectors) -> tuple[Scalars, Scalars]:
        """Surface coordinates of points on it, in the precision of the points."""
        offset = points - self.corner.astype(points.dtype)
        return offset @ self.a.astype(points.dtype), offset @ self.b.astype(points.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drum:
    """The side of an upright cylinder, seen from outside; s is the arc length around it.

    Attributes:
        base: centre of the lower rim.
        radius, height: in metres.
        coat: how it looks.
    """

    base: Vector
    radius: float
    height: float
    coat: Coat

    @property
    def size(self) -> tuple[float, float]:
        return 2 * math.pi * self.radius, self.height

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        r = np.array([self.radius, self.radius, 0.0])
        return self.base - r, self.base + r + [0.0, 0.0, self.height]

    def at(self, s: Scalars, t: Scalars) -> tuple[Vectors, Vectors]:
        """Points and normals at surface coordinates."""
        angle = s / self.radius
        normals = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
        return self.base + self.radius * normals + t[..., None] * np.array([0.0, 0, 1]), normals

    def coordinates(self, points: Vectors) -> tuple[Scalars, Scalars]:
        """Surface coordinates of points on it."""
        x, y, z = np.moveaxis(points - self.base, -1, 0)
        return (np.arctan2(y, x) % (2 * math.pi)) * self.radius, z

    def distance(self, point: Vector) -> float:
        """From a point outside to the solid cylinder."""
        x, y, z = point - self.base
        return math.hypot(max(math.hypot(x, y) - self.radius, 0), z - min(max(z, 0), self.height))

    def inverse_depth(self, origin: Vector, rays: Vectors) -> Scalars:
        """1/z of the front hit of each ray, 0 where it misses."""
        o = origin - self.base
        a = rays[..., 0] ** 2 + rays[..., 1] ** 2
        b = rays[..., 0] * o[0] + rays[..., 1] * o[1]
        z = _first_root(a, b, o[0] ** 2 + o[1] ** 2 - self.radius**2)
        height = o[2] + z * rays[..., 2]
        return np.where((height >= 0) & (height <= self.height), 1 / z, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ball:
    """A sphere; s and t are arc lengths along the equator and from the lowest point up.

    Attributes:
        centre: in the world.
        radius: in metres.
        coat: how it looks.
    """

    centre: Vector
    radius: float
    coat: Coat

    @property
    def size(self) -> tuple[float, float]:
        return 2 * math.pi * self.radius, math.pi * self.radius

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        return self.centre - self.radius, self.centre + self.radius

    def at(self, s: Scalars, t: Scalars) -> tuple[Vectors, Vectors]:
        """Points and normals at surface coordinates."""
        longitude, polar = s / self.radius, t / self.radius
        ring = np.sin(polar)
        normals = np.stack(
            [ring * np.cos(longitude), ring * np.sin(longitude), -np.cos(polar)], axis=-1
        )
        return self.centre + self.radius * normals, normals

    def coordinates(self, points: Vectors) -> tuple[Scalars, Scalars]:
        """Surface coordinates of points on it."""
        x, y, z = np.moveaxis((points - self.centre) / self.radius, -1, 0)
        longitude = np.arctan2(y, x) % (2 * math.pi)
        return longitude * self.radius, np.arccos(np.clip(-z, -1, 1)) * self.radius

    def distance(self, point: Vector) -> float:
        """From a point outside to the ball."""
        return float(np.linalg.norm(point - self.centre)) - self.radius

    def inverse_depth(self, origin: Vector, rays: Vectors) -> Scalars:
        """1/z of the front hit of each ray, 0 where it misses."""
        o = origin - self.centre
        a = np.einsum("...i,...i->...", rays, rays)
        return 1 / _first_root(a, rays @ o, float(o @ o) - self.radius**2)


Solid = Drum | Ball
Surface = Quad | Drum | Ball


def _first_root(a: Scalars, half_b: Scalars, c: float) -> Scalars:
    """The smaller root of ``a z^2 + 2 half_b z + c`` for a camera outside (c > 0), else +inf."""
    discriminant = half_b**2 - a * c
    hit = (discriminant > 0) & (half_b < 0)
    # c / (larger numerator) instead of (smaller numerator) / a: no cancellation far away.
    return np.where(hit, c / (np.sqrt(np.maximum(discriminant, 0)) - half_b + ~hit), np.inf)
