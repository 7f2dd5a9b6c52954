"""Putting a scene together: pieces in their own frame, and the builder that places them."""

from dataclasses import dataclass, replace

import numpy as np

from flatdepth.rooms.bodies import Block, Body
from flatdepth.rooms.paint import Paint
from flatdepth.rooms.scene import Emitter, Scene, Sky, Sun
from flatdepth.rooms.streams import Rng
from flatdepth.rooms.surfaces import Ball, Coat, Drum, OpenLight, Quad, Surface
from flatdepth.rooms.textures import Texture, pick_colour
from flatdepth.rooms.vectors import EAST, NORTH, UP, Vector, turn_about_up

_SEEN_FROM_BELOW_M = 0.9  # boxes that begin lower than this do not show their underside
_PLAIN = Coat()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A thing in its own frame: x to the side, y to the front, z up, its footprint centred.

    Attributes:
        width, depth: of the footprint along x and y; not needed outside of ``furnish``.
        boxes: upright boxes.
        details: boxes on or in other boxes; their own shadow would not be noticed.
        drums: (x, y, z of the base, radius, height, paint).
        balls: (x, y, z of the centre, radius, paint).
    """

    width: float = 0.0
    depth: float = 0.0
    boxes: tuple[Block, ...] = ()
    details: tuple[Block, ...] = ()
    drums: tuple[tuple[float, float, float, float, float, int], ...] = ()
    balls: tuple[tuple[float, float, float, float, int], ...] = ()


def box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, paint: int) -> Block:
    low, high = np.array([[x0, y0, z0], [x1, y1, z1]], dtype=np.float64)
    return Block(low=low, high=high, paint=paint)


def centred(x: float, y: float, z0: float, z1: float, paint: int) -> Block:
    """The box from (-x, -y) to (x, y)."""
    return box(-x, x, -y, y, z0, z1, paint)


def glow(radiance: Vector) -> OpenLight:
    """The light of a lamp's surface."""
    return OpenLight(ambient=radiance, sun=np.zeros(3), direction=UP)


class Builder:
    """Collects the parts of a scene."""

    def __init__(self) -> None:
        self.surfaces: list[Surface] = []
        self.bodies: list[Body] = []
        self.paints: list[Paint] = []
        self.emitters: list[Emitter] = []

    def paint(self, rng: Rng, texture: Texture, colours: str, period_m: float) -> int:
        """A new paint in one of the space-separated colours; its index."""
        image = texture(rng, pick_colour(rng, colours))
        self.paints.append(Paint.from_texture(image, period_m))
        return len(self.paints) - 1

    def place(
        self,
        piece: Piece,
        x: float = 0.0,
        y: float = 0.0,
        yaw: float = 0.0,
        *,
        z: float = 0.0,
        coat: Coat = _PLAIN,
        solid: bool = True,
    ) -> None:
        """Put a piece into the world, in its own paints.

        Args:
            x, y, z, yaw: where its frame goes, metres and radians.
            coat: everything but the paint of its surfaces.
            solid: stop light and keep cameras away.
        """
        origin, turn = np.array([x, y, z]), turn_about_up(yaw)
        for block in (*piece.boxes, *piece.details):
            self.surfaces += _faces(block, origin, turn, replace(coat, paint=block.paint))
        blocks = [_lifted(block, z) for block in piece.boxes]
        for px, py, pz, radius, height, paint in piece.drums:
            base = origin + turn @ np.array([px, py, pz])
            self.surfaces += _drum(base, radius, height, replace(coat, paint=paint))
            blocks.append(_core(px, py, z + pz, z + pz + height - 0.02, 0.7 * radius, paint))
        for px, py, pz, radius, paint in piece.balls:
            centre = origin + turn @ np.array([px, py, pz])
            ball = Ball(centre=centre, radius=radius, coat=replace(coat, paint=paint))
            self.surfaces.append(ball)
            half = 0.55 * radius
            blocks.append(_core(px, py, z + pz - half, z + pz + half, half, paint))
        if solid:
            self.bodies.append(Body(x=x, y=y, yaw=yaw, blocks=tuple(blocks)))

    def lay(self, x: tuple[float, float], y: tuple[float, float], z: float, coat: Coat) -> None:
        """A horizontal rectangle, seen from above."""
        corner, size = np.array([x[0], y[0], z]), (x[1] - x[0], y[1] - y[0])
        self.surfaces.append(Quad(corner=corner, a=EAST, b=NORTH, size=size, coat=coat))

    def scene(self, sky: Sky, sun: Sun | None, shell_m: Vector | None = None) -> Scene:
        return Scene(
            surfaces=tuple(self.surfaces),
            bodies=tuple(self.bodies),
            paints=tuple(self.paints),
            emitters=tuple(self.emitters),
            sky=sky,
            sun=sun,
            shell_m=shell_m,
        )


def _lifted(block: Block, z: float) -> Block:
    lift = np.array([0.0, 0.0, z])
    return replace(block, low=block.low + lift, high=block.high + lift)


def _drum(base: Vector, radius: float, height: float, coat: Coat) -> tuple[Drum, Quad]:
    """An upright cylinder with its top."""
    corner, side = base + np.array([-radius, -radius, height]), 2 * radius
    top = Quad(corner=corner, a=EAST, b=NORTH, size=(side, side), disc=True, coat=coat)
    return Drum(base=base, radius=radius, height=height, coat=coat), top


def _core(x: float, y: float, z0: float, z1: float, half: float, paint: int) -> Block:
    """The box inside a drum or ball that stops light for it, clear of its surface."""
    return box(x - half, x + half, y - half, y + half, z0, z1, paint)


def _faces(block: Block, origin: Vector, turn: np.ndarray, coat: Coat) -> list[Quad]:
    """The faces of a box, seen from outside; the lower one only where it can be seen."""
    (x0, y0, z0), (x1, y1, z1) = block.low, block.high
    dx, dy, dz = (block.high - block.low).tolist()
    faces = [
        ((x1, y1, z0), -EAST, UP, (dx, dz)),
        ((x0, y0, z0), EAST, UP, (dx, dz)),
        ((x1, y0, z0), NORTH, UP, (dy, dz)),
        ((x0, y1, z0), -NORTH, UP, (dy, dz)),
        ((x0, y0, z1), EAST, NORTH, (dx, dy)),
    ]
    if origin[2] + z0 > _SEEN_FROM_BELOW_M:
        faces.append(((x0, y0, z0), NORTH, EAST, (dy, dx)))
    return [
        Quad(corner=origin + turn @ np.array(corner), a=turn @ a, b=turn @ b, size=size, coat=coat)
        for corner, a, b, size in faces
    ]
