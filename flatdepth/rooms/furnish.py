"""Where the furniture of a room stands."""

import math

import numpy as np

from flatdepth.rooms import furniture, textures
from flatdepth.rooms.build import Builder, Piece, centred
from flatdepth.rooms.furniture import Palette
from flatdepth.rooms.streams import Rng
from flatdepth.rooms.surfaces import Coat
from flatdepth.rooms.vectors import Vector
from flatdepth.rooms.windows import Window


class _Floor:
    """Keeps track of where furniture stands."""

    def __init__(self, width: float, depth: float) -> None:
        self.width, self.depth = width, depth
        self.taken: list[tuple[float, float, float, float]] = []

    def claim(self, x: float, y: float, yaw: float, piece: Piece, gap: float) -> bool:
        """Take the upright rectangle around a turned footprint, if it is free."""
        c, s = abs(math.cos(yaw)), abs(math.sin(yaw))
        half_x = (piece.width * c + piece.depth * s) / 2
        half_y = (piece.width * s + piece.depth * c) / 2
        x0, x1, y0, y1 = x - half_x, x + half_x, y - half_y, y + half_y
        if x0 < 0.02 or y0 < 0.02 or x1 > self.width - 0.02 or y1 > self.depth - 0.02:
            return False
        for a0, a1, b0, b1 in self.taken:
            if x0 < a1 + gap and a0 < x1 + gap and y0 < b1 + gap and b0 < y1 + gap:
                return False
        self.taken.append((x0, x1, y0, y1))
        return True


_WALL_YAW = (-math.pi / 2, math.pi / 2, 0.0, math.pi)  # turns a piece's front away from each wall
_TALL = (furniture.shelf, furniture.cupboard)
_LOW = (
    furniture.sideboard,
    furniture.sofa,
    furniture.bed,
    furniture.desk,
    furniture.crates,
    furniture.plant,
    furniture.sideboard,
    furniture.sofa,
)
_FREE = (
    furniture.coffee_table,
    furniture.pouf,
    furniture.plant,
    furniture.crates,
    furniture.toy_ball,
)
_ATTEMPTS = 8  # at a free place for a piece; then it is left out


def furnish(rng: Rng, build: Builder, size: Vector, windows: list[Window]) -> None:
    """Furnish a room of the given width, depth and height in metres."""
    width, depth, height = size
    palette = furniture.palette(rng, build)
    floor = _Floor(width, depth)
    area = width * depth
    if rng.random() < 0.6:
        _dining(rng, build, floor, palette)
    if area > 25 and rng.random() < 0.35:
        _colonnade(rng, build, floor, palette, height)
    # Tall furniture is rare: pictures are to be hung on the walls.
    tall = [_TALL[rng.integers(len(_TALL))] for _ in range(rng.integers(0, 3))]
    low = [_LOW[rng.integers(len(_LOW))] for _ in range(int(np.clip(area / 9, 2, 5)))]
    for make in (*tall, *low):
        shunned = {window.wall for window in windows} if make in _TALL else set()
        walls = [wall for wall in range(4) if wall not in shunned]
        _along_a_wall(rng, build, floor, make(rng, palette), walls)
    for _ in range(int(np.clip(area / 12, 1, 4))):
        _anywhere(rng, build, floor, _FREE[rng.integers(len(_FREE))](rng, palette))
    if rng.random() < 0.5:
        _rug(rng, build, floor)


def _along_a_wall(rng: Rng, build: Builder, floor: _Floor, piece: Piece, walls: list[int]) -> None:
    for _ in range(_ATTEMPTS):
        wall = walls[rng.integers(len(walls))]
        along = rng.uniform(0.1, 0.9) * (floor.depth if wall < 2 else floor.width)
        out = piece.depth / 2 + rng.uniform(0.025, 0.08)
        x = (out, floor.width - out, along, along)[wall]
        y = (along, along, out, floor.depth - out)[wall]
        if floor.claim(x, y, _WALL_YAW[wall], piece, 0.05):
            build.place(piece, x, y, _WALL_YAW[wall])
            return


def _anywhere(rng: Rng, build: Builder, floor: _Floor, piece: Piece) -> None:
    for _ in range(_ATTEMPTS):
        x, y = rng.uniform(0.5, floor.width - 0.5), rng.uniform(0.5, floor.depth - 0.5)
        yaw = rng.uniform(0, 2 * math.pi)
        if floor.claim(x, y, yaw, piece, 0.25):
            build.place(piece, x, y, yaw)
            return


def _dining(rng: Rng, build: Builder, floor: _Floor, palette: Palette) -> None:
    """A table with chairs around it, well inside the room."""
    table, chair = furniture.table(rng, palette), furniture.chair(rng, palette)
    around = Piece(width=table.width + 0.2, depth=table.depth + 1.0)
    yaw = float(rng.choice([0, math.pi / 2])) + rng.uniform(-0.15, 0.15)
    for _ in range(_ATTEMPTS):
        x, y = rng.uniform(0.25, 0.75) * floor.width, rng.uniform(0.25, 0.75) * floor.depth
        if floor.claim(x, y, yaw, around, 0.3):
            break
    else:
        return
    build.place(table, x, y, yaw)
    c, s = math.cos(yaw), math.sin(yaw)
    for side in (-1, 1):
        for along in (-0.25, 0.25):
            if rng.random() < 0.15:
                continue
            px, py = along * table.width, side * (table.depth / 2 + rng.uniform(0.0, 0.25))
            turn = yaw + (0 if side < 0 else math.pi) + rng.uniform(-0.2, 0.2)
            build.place(chair, x + c * px - s * py, y + s * px + c * py, turn)


def _colonnade(rng: Rng, build: Builder, floor: _Floor, palette: Palette, height: float) -> None:
    """A row of columns along the room."""
    column = furniture.column(rng, palette, height)
    x = rng.choice([0.25, 0.75]) * floor.width
    for y in np.arange(1.2, floor.depth - 0.8, rng.uniform(2.2, 3.2)):
        if floor.claim(x, y, 0.0, column, 0.1):
            build.place(column, x, y)


def _rug(rng: Rng, build: Builder, floor: _Floor) -> None:
    paint = build.paint(rng, textures.rug, textures.FABRICS, rng.uniform(0.8, 1.6))
    w, d = rng.uniform(0.35, 0.6) * floor.width, rng.uniform(0.3, 0.5) * floor.depth
    rug = Piece(boxes=(centred(w / 2, d / 2, 0, 0.012, paint),))
    x, y = rng.uniform(0.4, 0.6) * floor.width, rng.uniform(0.4, 0.6) * floor.depth
    build.place(rug, x, y, solid=False, coat=Coat(spacing_m=0.2))
