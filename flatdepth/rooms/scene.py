"""Everything a camera can see, and the light in it."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int64

from flatdepth.rooms.bodies import Body, first_hit, shell_exit
from flatdepth.rooms.paint import Paint
from flatdepth.rooms.surfaces import Quad, Solid, Surface
from flatdepth.rooms.vectors import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitter:
    """A rectangular area light.

    Attributes:
        corner, a, b: a corner and the two full edge vectors; light leaves on the ``a x b`` side.
        radiance: linear light.
        all_round: shine equally in all directions instead, as a globe of that size does.
    """

    corner: Vector
    a: Vector
    b: Vector
    radiance: Vector
    all_round: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sun:
    """A parallel light.

    Attributes:
        direction: unit vector towards the sun.
        irradiance: on a surface that faces it.
    """

    direction: Vector
    irradiance: Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Sky:
    """What is seen and received where nothing is hit.

    Attributes:
        zenith, horizon: radiance.
        clouds: tileable cover in 0..1, on a plane overhead.
        haze_m: distance over which hazy surfaces fade to the horizon's colour by 1/e.
    """

    zenith: Vector
    horizon: Vector
    clouds: Float32[np.ndarray, "t t"]
    haze_m: float


@dataclass(frozen=True, kw_only=True)
class QuadTable:
    """All quads of a scene as arrays, so that projecting them is a handful of operations.

    Attributes:
        ids: index of each quad in ``Scene.surfaces``, increasing.
        quads: the quads themselves.
        corner, a, b, normal, size: their fields, one row each.
    """

    ids: Int64[np.ndarray, " n"]
    quads: tuple[Quad, ...]
    corner: Float[np.ndarray, "n 3"]
    a: Float[np.ndarray, "n 3"]
    b: Float[np.ndarray, "n 3"]
    normal: Float[np.ndarray, "n 3"]
    size: Float[np.ndarray, "n 2"]

    @classmethod
    def of(cls, surfaces: tuple[Surface, ...]) -> "QuadTable":
        pairs = [(i, s) for i, s in enumerate(surfaces) if isinstance(s, Quad)]
        quads = tuple(quad for _, quad in pairs)
        a, b = np.array([q.a for q in quads]), np.array([q.b for q in quads])
        return cls(
            ids=np.array([i for i, _ in pairs]),
            quads=quads,
            corner=np.array([q.corner for q in quads]),
            a=a,
            b=b,
            normal=np.cross(a, b),
            size=np.array([q.size for q in quads], dtype=np.float64),
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Surfaces to draw, bodies that stop light, and lights.

    Attributes:
        surfaces: drawn; when ``shell_m`` is set the first six are the inner faces of the box
            ``[0, shell_m]`` in the order x=0, x=max, y=0, y=max, floor, ceiling.
        bodies: what stops light.
        paints: textures that surfaces and blocks refer to.
        emitters, sun, sky: the lights.
        shell_m: size of the closed room around the scene, or None outdoors.
    """

    surfaces: tuple[Surface, ...]
    bodies: tuple[Body, ...]
    paints: tuple[Paint, ...]
    sky: Sky
    emitters: tuple[Emitter, ...] = ()
    sun: Sun | None = None
    shell_m: Vector | None = None

    @cached_property
    def quads(self) -> QuadTable:
        return QuadTable.of(self.surfaces)

    @cached_property
    def solids(self) -> tuple[tuple[int, Solid], ...]:
        """The curved surfaces with their indices."""
        return tuple((i, s) for i, s in enumerate(self.surfaces) if isinstance(s, Solid))

    @property
    def shell(self) -> list[Quad]:
        """The six inner faces of the room, empty outdoors."""
        faces = self.surfaces[:6] if self.shell_m is not None else ()
        return [face for face in faces if isinstance(face, Quad)]

    @cached_property
    def atlas(self) -> Float32[np.ndarray, "n 3"]:
        """The pyramids of all paints, one after the other."""
        return np.concatenate([paint.pyramid for paint in self.paints])

    @cached_property
    def atlas_offsets(self) -> list[int]:
        """Where each paint starts in the atlas."""
        ends = np.cumsum([len(paint.pyramid) for paint in self.paints])
        return [0, *ends[:-1].tolist()]

    def clearance(self, point: Vector) -> float:
        """Distance from a point to the nearest body, drum or ball."""
        things = [*self.bodies, *(solid for _, solid in self.solids)]
        return min((thing.distance(point) for thing in things), default=math.inf)

    def sight(self, origin: Vector, rays: Float[np.ndarray, "n 3"]) -> Float32[np.ndarray, " n"]:
        """How far one sees along world directions, in units of their length: bodies and walls."""
        rays = rays.astype(np.float32)
        origins = np.broadcast_to(origin.astype(np.float32), rays.shape)
        t, _ = first_hit(self.bodies, origins, rays)
        if self.shell_m is not None:
            t = np.minimum(t, shell_exit(self.shell_m, origins, rays)[0])
        return t
