"""Solids in metres, z up, each with a surface and a region, and the frames they are built in."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

Vector = tuple[float, float, float]
Colour = tuple[float, float, float]

BACKGROUND, MIRROR, PICTURE, FRAME, SCREEN, OPENING = 0, 1, 2, 3, 5, 6


def rgb(code: str) -> Colour:
    """Linear colour of an sRGB code such as ``"e8e0d0"``."""
    srgb = np.frombuffer(bytes.fromhex(code), np.uint8) / 255
    red, green, blue = np.where(srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return float(red), float(green), float(blue)


@dataclass(frozen=True)
class Surface:
    """What a solid is made of; ``cycles.material`` says what the patterns are.

    Attributes:
        colour, other: linear; ``other`` is the pattern's second colour.
        size: of the pattern, in metres.
        bump: height of the pattern's relief, in metres.
        glow: radiance that it emits.
        image: file shown, once over the whole face, in place of the pattern.
    """

    colour: Colour
    other: Colour = (0.0, 0.0, 0.0)
    pattern: str = "plain"
    size: float = 1.0
    roughness: float = 0.6
    metallic: float = 0.0
    bump: float = 0.0
    glow: float = 0.0
    image: str = ""


@dataclass(frozen=True)
class Part:
    """Vertices (n, 3) in the room, faces as indices, texture coordinates (n per face, 2)."""

    vertices: np.ndarray
    faces: list[list[int]]
    uv: np.ndarray
    surface: Surface
    region: int
    smooth: bool
    is_flat_thing: bool


@dataclass
class Model:
    """Parts in the order in which they were added, and the frame in which the next one is built.

    Within ``at`` coordinates are those of the given place: x to the right, y to the front, z up.
    """

    parts: list[Part] = field(default_factory=list)
    frame: np.ndarray = field(default_factory=lambda: np.eye(4))
    within_flat_thing: bool = False

    @contextmanager
    def at(
        self, x: float, y: float, z: float = 0.0, *, turn: float = 0.0, lean: float = 0.0
    ) -> Iterator[None]:
        """A place, turned about z and then leaned back about its own x axis (radians)."""
        before = self.frame
        c, s, cl, sl = math.cos(turn), math.sin(turn), math.cos(lean), math.sin(lean)
        step = np.eye(4)
        step[:3] = [[c, -s * cl, s * sl, x], [s, c * cl, -c * sl, y], [0, sl, cl, z]]
        self.frame = before @ step
        try:
            yield
        finally:
            self.frame = before

    @contextmanager
    def flat_thing(self) -> Iterator[None]:
        """What is added within is left out of the plain twin of the view."""
        before, self.within_flat_thing = self.within_flat_thing, True
        try:
            yield
        finally:
            self.within_flat_thing = before

    def world(self, point: Sequence[float]) -> np.ndarray:
        """A point of the present frame in the room's coordinates."""
        return (self.frame @ [*point, 1.0])[:3]

    def add(
        self,
        vertices: np.ndarray,
        faces: list[list[int]],
        surface: Surface,
        *,
        region: int = BACKGROUND,
        smooth: bool = False,
        uv: np.ndarray | None = None,
    ) -> None:
        """Add a mesh of convex, planar faces, counter-clockwise seen from outside."""
        vertices = np.asarray(vertices, np.float64)
        if uv is None:
            uv = _box_map(vertices, faces)
        placed = vertices @ self.frame[:3, :3].T + self.frame[:3, 3]
        flat = self.within_flat_thing
        self.parts.append(Part(placed, faces, uv, surface, region, smooth, flat))

    def quad(
        self,
        corner: Sequence[float],
        right: Sequence[float],
        up: Sequence[float],
        surface: Surface,
        *,
        region: int = BACKGROUND,
    ) -> None:
        """A parallelogram that faces ``right x up``; an image fills it."""
        a, r, u = (np.array(v, np.float64) for v in (corner, right, up))
        uv = np.array([(0.0, 0), (1, 0), (1, 1), (0, 1)]) if surface.image else None
        corners = np.array([a, a + r, a + r + u, a + u])
        self.add(corners, [[0, 1, 2, 3]], surface, region=region, uv=uv)

    def box(
        self,
        centre: tuple[float, float],
        bottom: float,
        size: Vector,
        surface: Surface,
        *,
        round_m: float = 0.008,
        steps: int = 1,
        region: int = BACKGROUND,
    ) -> None:
        """An upright box with rounded edges, by the centre of its base."""
        half = np.array(size) / 2
        radius = min(round_m, *(0.45 * np.array(size)))
        angles = np.concatenate([np.linspace(q, q + 1, steps + 1) for q in range(4)]) * math.pi / 2
        signs = np.repeat([[1, 1], [-1, 1], [-1, -1], [1, -1]], steps + 1, axis=0)
        rows = np.concatenate([np.linspace(-1, 0, steps + 1), np.linspace(0, 1, steps + 1)])
        ring, count = [], len(angles)
        for row, up in zip(rows * math.pi / 2, [-1] * (steps + 1) + [1] * (steps + 1), strict=True):
            out = np.stack([np.cos(angles), np.sin(angles)], axis=1) * math.cos(row)
            flat = signs * (half[:2] - radius) + out * radius
            height = up * (half[2] - radius) + math.sin(row) * radius
            ring.append(np.column_stack([flat, np.full(count, height)]))
        vertices = np.concatenate(ring) + np.array([*centre, bottom + half[2]])
        faces = _tube(len(rows), count)
        # The poles' rings are rectangles of coinciding corners: one cap of the first of each.
        caps = [q * (steps + 1) for q in range(4)]
        faces += [caps[::-1], [(len(rows) - 1) * count + c for c in caps]]
        has_area = np.linalg.norm(_normals(vertices, faces), axis=1) > 1e-9
        faces = [face for face, has in zip(faces, has_area, strict=True) if has]
        self.add(vertices, faces, surface, region=region)

    def lathe(
        self,
        centre: tuple[float, float],
        profile: Sequence[tuple[float, float]],
        surface: Surface,
        *,
        sides: int = 16,
        region: int = BACKGROUND,
    ) -> None:
        """A round body from (radius, height) pairs, from the bottom up; a radius of 0 closes it."""
        turn = np.arange(sides) * 2 * math.pi / sides
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        rings = [np.column_stack([circle * max(r, 1e-4), np.full(sides, z)]) for r, z in profile]
        vertices = np.concatenate(rings) + np.array([*centre, 0.0])
        self.add(vertices, _tube(len(rings), sides), surface, region=region, smooth=8 < sides < 48)

    def disc(self, radius: float, z: float, surface: Surface, *, region: int) -> None:
        """A disc around the z axis, facing up."""
        turn = np.arange(48) * 2 * math.pi / 48
        circle = np.column_stack([radius * np.cos(turn), radius * np.sin(turn), np.full(48, z)])
        self.add(circle, [list(range(48))], surface, region=region)

    def ball(
        self, centre: Vector, radii: Vector, surface: Surface, *, power: float = 1.0, rows: int = 8
    ) -> None:
        """An ellipsoid; below 1, ``power`` makes it squarer, as a cushion is."""
        down = np.linspace(-math.pi / 2, math.pi / 2, rows + 1)
        turn = np.arange(2 * rows) * math.pi / rows

        def bent(values: np.ndarray) -> np.ndarray:
            return np.sign(values) * np.abs(values) ** power

        level = np.maximum(bent(np.cos(down)), 1e-3)
        x = level[:, None] * bent(np.cos(turn))
        y = level[:, None] * bent(np.sin(turn))
        z = np.repeat(bent(np.sin(down))[:, None], 2 * rows, axis=1)
        vertices = np.stack([x, y, z], axis=-1).reshape(-1, 3) * radii + centre
        self.add(vertices, _triangles(_tube(rows + 1, 2 * rows)), surface, smooth=True)

    def sheet(self, grid: np.ndarray, surface: Surface) -> None:
        """A surface through a grid (rows, columns, 3) of points."""
        rows, columns = grid.shape[:2]
        index = np.arange(rows * columns).reshape(rows, columns)
        corners = np.stack([index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]], -1)
        faces = _triangles(corners.reshape(-1, 4).tolist())
        self.add(grid.reshape(-1, 3), faces, surface, smooth=True)


def _tube(rings: int, count: int) -> list[list[int]]:
    """Faces between rings of ``count`` points each."""
    return [
        [
            r * count + i,
            r * count + (i + 1) % count,
            (r + 1) * count + (i + 1) % count,
            (r + 1) * count + i,
        ]
        for r in range(rings - 1)
        for i in range(count)
    ]


def _triangles(quads: list[list[int]]) -> list[list[int]]:
    return [half for a, b, c, d in quads for half in ([a, b, c], [a, c, d])]


def _normals(vertices: np.ndarray, faces: list[list[int]]) -> np.ndarray:
    """(faces, 3) vectors of twice the faces' areas."""
    counts = np.array([len(face) for face in faces])
    found = np.empty((len(faces), 3))
    for count in np.unique(counts):
        alike = np.flatnonzero(counts == count)
        corners = vertices[np.array([faces[i] for i in alike])]
        away = corners - corners[:, :1]
        found[alike] = np.cross(away, np.roll(away, -1, axis=1)).sum(axis=1)
    return found


def _box_map(vertices: np.ndarray, faces: list[list[int]]) -> np.ndarray:
    """Texture coordinates in metres: the two axes across which each face lies."""
    axis = np.abs(_normals(vertices, faces)).argmax(axis=1)
    across = np.array([(1, 2), (0, 2), (0, 1)])[np.repeat(axis, [len(face) for face in faces])]
    return np.take_along_axis(vertices[np.concatenate(faces)], across, axis=1)
