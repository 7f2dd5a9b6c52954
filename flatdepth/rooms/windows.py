"""Windows: where they are, what frames them, and the daylight they let in."""

from dataclasses import dataclass

import numpy as np

from flatdepth.rooms.bodies import Block
from flatdepth.rooms.build import Builder, Piece, glow
from flatdepth.rooms.scene import Emitter, Sky
from flatdepth.rooms.streams import Rng
from flatdepth.rooms.surfaces import Coat, Quad
from flatdepth.rooms.vectors import Vector

_Rectangle = tuple[float, float, float, float]  # (s0, t0, s1, t1) in a wall's coordinates


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """An opening.

    Attributes:
        wall: index into ``Scene.surfaces``.
        hole: ``(s0, t0, s1, t1)`` in the wall's coordinates.
        thickness: of the wall, in metres.
    """

    wall: int
    hole: _Rectangle
    thickness: float


def plan_windows(rng: Rng, size: Vector) -> list[Window]:
    """None to six windows of a room of the given width, depth and height in metres."""
    windows = []
    walls = rng.permutation(4)[: int(rng.choice([0, 1, 2], p=[0.35, 0.5, 0.15]))]
    low = rng.random() < 0.25
    sill = rng.uniform(0.05, 0.15) if low else rng.uniform(0.8, 1.0)
    top = min(size[2] - 0.2, rng.uniform(2.1, 2.4))
    thickness = rng.uniform(0.18, 0.35)
    for wall in walls.tolist():
        length = size[1] if wall < 2 else size[0]
        count = max(1, min(int(rng.integers(1, 4)), int(length / 2)))
        step = length / count
        opening = min(rng.uniform(0.9, 2.2), step - 0.6)
        for i in range(count):
            middle = (i + 0.5) * step
            hole = (middle - opening / 2, sill, middle + opening / 2, top)
            windows.append(Window(wall=wall, hole=hole, thickness=thickness))
    return windows


def open_window(build: Builder, window: Window, frame: int, sky: Sky) -> None:
    """The reveal, the bars, the sill and the daylight of one window, all in the paint ``frame``."""
    wall = build.surfaces[window.wall]
    assert isinstance(wall, Quad)
    s0, t0, s1, t1 = window.hole
    thick, width, height = window.thickness, s1 - s0, t1 - t0
    inward = np.cross(wall.a, wall.b)
    daylight = (sky.horizon + sky.zenith) / 2

    def at(s: float, t: float, out: float) -> Vector:
        return wall.corner + s * wall.a + t * wall.b - out * inward

    def place(p: Vector, q: Vector, coat: Coat) -> None:
        block = Block(low=np.minimum(p, q), high=np.maximum(p, q), paint=frame)
        build.place(Piece(boxes=(block,)), coat=coat, solid=False)

    reveal = [
        (at(s0, t0, thick), inward, wall.a, (thick, width), 1.0),
        (at(s0, t1, thick), wall.a, inward, (width, thick), 0.6),
        (at(s0, t0, thick), wall.b, inward, (height, thick), 0.8),
        (at(s1, t0, thick), inward, wall.b, (thick, height), 0.8),
    ]
    for corner, a, b, size, share in reveal:
        coat = Coat(paint=frame, light=glow(share * daylight))
        build.surfaces.append(Quad(corner=corner, a=a, b=b, size=size, coat=coat))
    backlit = Coat(light=glow(0.55 * daylight))
    for left, bottom, right, top in _bars(window):
        near = at(right, top, 0.55 * thick + 0.05)
        place(at(left, bottom, 0.55 * thick), near, backlit)
    place(at(s0 - 0.05, t0 - 0.03, -0.1), at(s1 + 0.05, t0, 0.0), Coat())
    build.emitters.append(
        Emitter(corner=at(s0, t0, 0), a=width * wall.a, b=height * wall.b, radiance=1.5 * daylight)
    )


def _bars(window: Window) -> list[_Rectangle]:
    """The sides of the frame, its lower and upper bar, and mullions."""
    s0, t0, s1, t1 = window.hole
    bars = [
        (s0, t0, s0 + 0.05, t1),
        (s1 - 0.05, t0, s1, t1),
        (s0 + 0.05, t0, s1 - 0.05, t0 + 0.05),
        (s0 + 0.05, t1 - 0.05, s1 - 0.05, t1),
    ]
    mullions = int((s1 - s0) / 0.8)
    for i in range(mullions):
        s = s0 + (i + 1) * (s1 - s0) / (mullions + 1)
        bars.append((s - 0.025, t0 + 0.05, s + 0.025, t1 - 0.05))
    return bars
