"""A room: shell, trim, furniture, windows with what is behind them, lamps."""

import math

import numpy as np

from flatdepth.rooms import textures
from flatdepth.rooms.build import Builder, Piece, box, centred, glow
from flatdepth.rooms.furnish import furnish
from flatdepth.rooms.outdoors import draw_sky, surround, towards_sun
from flatdepth.rooms.scene import Emitter, Scene, Sun
from flatdepth.rooms.streams import Rng
from flatdepth.rooms.surfaces import Coat, Quad
from flatdepth.rooms.textures import Texture
from flatdepth.rooms.vectors import EAST, NORTH, UP, Vector
from flatdepth.rooms.windows import Window, open_window, plan_windows

_Options = tuple[tuple[Texture, str, float], ...]  # with colours and the side of a tile in metres

_WALL_TEXTURES: _Options = (
    (textures.plain, textures.WALLS, 2.0),
    (textures.plaster, textures.WALLS, 1.6),
    (textures.stripes, textures.WALLS, 1.6),
    (textures.damask, textures.WALLS, 1.8),
    (textures.bricks, textures.BRICKS, 1.9),
    (textures.tiles, textures.WALLS, 1.8),
    (textures.wood, textures.WOODS, 1.5),
)
_WALL_SHARES = (0.27, 0.27, 0.13, 0.12, 0.11, 0.05, 0.05)
_FLOOR_TEXTURES: _Options = (
    (textures.planks, textures.WOODS, 2.0),
    (textures.tiles, textures.STONES, 2.4),
    (textures.carpet, textures.CARPETS, 1.2),
    (textures.herringbone, textures.WOODS, 2.0),
)
_FLOOR_SHARES = (0.4, 0.3, 0.14, 0.16)
_WALL_AZIMUTH = (-math.pi / 2, math.pi / 2, math.pi, 0.0)  # out of each wall


def build_room(rng: Rng, size: Vector, *, furnished: bool = True) -> Scene:
    """A room of the given width, depth and height in metres."""
    build = Builder()
    windows = plan_windows(rng, size)
    sky = draw_sky(rng)
    _shell(rng, build, size, windows)
    frame = build.paint(rng, textures.plain, textures.LACQUERS, 2.0)
    _trim(rng, build, size, windows, frame)
    if furnished:
        furnish(rng, build, size, windows)
    towards = towards_sun(rng, _WALL_AZIMUTH[windows[0].wall] if windows else 0.0)
    sun = None
    if windows:
        for window in windows:
            open_window(build, window, frame, sky)
        surround(rng, build, size, sky, towards)
        if rng.random() < 0.55:
            sun = Sun(direction=towards, irradiance=rng.uniform(3, 8) * np.array([1.1, 1.0, 0.8]))
    if not windows or rng.random() < 0.5:
        _lamps(rng, build, size, rng.uniform(20, 40) if windows else 60)
    return build.scene(sky, sun, size)


def _choose(rng: Rng, build: Builder, options: _Options, shares: tuple[float, ...]) -> int:
    texture, colours, period_m = options[rng.choice(len(options), p=shares)]
    return build.paint(rng, texture, colours, period_m)


def _shell(rng: Rng, build: Builder, size: Vector, windows: list[Window]) -> None:
    """The inner faces of the room, in the order that ``Scene`` asks for."""
    width, depth, height = size.tolist()
    walls = [_choose(rng, build, _WALL_TEXTURES, _WALL_SHARES)] * 4
    if rng.random() < 0.4:
        walls[rng.integers(4)] = _choose(rng, build, _WALL_TEXTURES, _WALL_SHARES)
    floor = _choose(rng, build, _FLOOR_TEXTURES, _FLOOR_SHARES)
    ceiling = build.paint(rng, textures.plain, "f0eee9 e8e6e0 f2f0ea", 2.0)
    faces = [
        ((0, 0, 0), NORTH, UP, (depth, height)),
        ((width, depth, 0), -NORTH, UP, (depth, height)),
        ((width, 0, 0), -EAST, UP, (width, height)),
        ((0, depth, 0), EAST, UP, (width, height)),
        ((0, 0, 0), EAST, NORTH, (width, depth)),
        ((0, 0, height), NORTH, EAST, (depth, width)),
    ]
    paints, spacings = [*walls, floor, ceiling], [0.22] * 4 + [0.15, 0.45]
    for index, (corner, a, b, extent) in enumerate(faces):
        build.surfaces.append(
            Quad(
                corner=np.array(corner, dtype=np.float64),
                a=a,
                b=b,
                size=extent,
                holes=tuple(window.hole for window in windows if window.wall == index),
                coat=Coat(paint=paints[index], spacing_m=spacings[index]),
            )
        )


def _trim(rng: Rng, build: Builder, size: Vector, windows: list[Window], paint: int) -> None:
    """Skirting boards, and sometimes beams under the ceiling."""
    width, depth, height = size
    high, thick = rng.uniform(0.07, 0.13), 0.015
    boards = [
        box(0, thick, 0, depth, 0, high, paint),
        box(width - thick, width, 0, depth, 0, high, paint),
        box(thick, width - thick, 0, thick, 0, high, paint),
        box(thick, width - thick, depth - thick, depth, 0, high, paint),
    ]
    low = {window.wall for window in windows if window.hole[1] < high + 0.05}
    kept = tuple(board for wall, board in enumerate(boards) if wall not in low)
    build.place(Piece(boxes=kept), solid=False)
    if rng.random() < 0.22 and height > 2.6:
        beam = build.paint(rng, textures.wood, textures.WOODS, 1.2)
        boxes = tuple(
            box(0, width, y - 0.07, y + 0.07, height - 0.18, height, beam)
            for y in np.arange(0.9, depth - 0.3, rng.uniform(1.0, 1.6))
        )
        build.place(Piece(boxes=boxes))


def _lamps(rng: Rng, build: Builder, size: Vector, power: float) -> None:
    """Flush panels or hanging globes on a grid over the room."""
    width, depth, height = size
    white = build.paint(rng, textures.plain, "f4f2ee", 2.0)
    tone = np.array([1.0, rng.uniform(0.82, 0.97), rng.uniform(0.6, 0.95)])
    rows, columns = max(1, round(depth / 3.5)), max(1, round(width / 4.5))
    hanging = bool(height > 2.6 and rng.random() < 0.45)
    side, power = (0.25, 2.5 * power) if hanging else (0.6, power)
    lit = Coat(light=glow(3.5 * tone))
    for y in (np.arange(rows) + 0.5) * depth / rows:
        for x in (np.arange(columns) + 0.5) * width / columns:
            if hanging:
                z = height - rng.uniform(0.45, 0.6)
                globe = Piece(balls=((0, 0, z, 0.15, white),))
                cord = Piece(drums=((0, 0, z + 0.14, 0.008, height - z, white),))
                build.place(globe, x, y, coat=lit, solid=False)
                build.place(cord, x, y, solid=False)
            else:
                z = height - 0.05
                panel = Piece(boxes=(centred(0.3, 0.3, z, height + 0.01, white),))
                build.place(panel, x, y, coat=lit, solid=False)
                z -= 0.01
            build.emitters.append(
                Emitter(
                    corner=np.array([x - side / 2, y - side / 2, z]),
                    a=side * NORTH,
                    b=side * EAST,
                    radiance=power * tone / (rows * columns),
                    all_round=hanging,
                )
            )
