"""Furnished rooms with windows and doorways that open on something deep."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from render.furniture import ROOMS, Piece, clutter, shade
from render.looks import WHITE, Looks
from render.model import Surface, rgb
from render.outside import daylight, surroundings
from render.stage import Lamp, Patch, Stage

Rect = tuple[float, float, float, float]


@dataclass
class Wall:
    """An upright wall; within ``frame`` x runs along it, y into the room.

    Attributes:
        holes: (x0, x1, z0, z1) through it.
        taken: like ``holes``, what nothing may hang on: those, and furniture before it.
        is_outer: nothing of the room lies behind it.
        has_windows: its holes open on the street, not on a room.
    """

    x: float
    y: float
    turn: float
    length: float
    height: float
    surface: Surface
    thick: float
    is_outer: bool = True
    has_windows: bool = False
    holes: list[Rect] = field(default_factory=list)
    taken: list[Rect] = field(default_factory=list)

    def plan(self, x0: float, x1: float, y0: float, y1: float) -> Rect:
        """A rectangle of its frame as (x0, y0, x1, y1) of the room."""
        c, s = round(math.cos(self.turn)), round(math.sin(self.turn))
        xs = [self.x + c * x - s * y for x, y in ((x0, y0), (x1, y1))]
        ys = [self.y + s * x + c * y for x, y in ((x0, y0), (x1, y1))]
        return min(xs), min(ys), max(xs), max(ys)

    def is_free(self, x0: float, x1: float, z0: float, z1: float, gap: float = 0.05) -> bool:
        inside = x0 > gap and x1 < self.length - gap and z1 < self.height - gap
        return inside and not any(
            x0 < b + gap and x1 > a - gap and z0 < d + gap and z1 > c - gap
            for a, b, c, d in self.taken
        )


@dataclass
class Room:
    """A room in the making."""

    stage: Stage
    looks: Looks
    width: float
    depth: float
    height: float
    walls: list[Wall]
    used: list[Rect]

    def is_free(self, rect: Rect, gap: float = 0.04) -> bool:
        x0, y0, x1, y1 = rect
        inside = min(x0, y0) > -1e-6 and x1 < self.width + 1e-6 and y1 < self.depth + 1e-6
        return inside and not any(
            x0 < c + gap and x1 > a - gap and y0 < d + gap and y1 > b - gap
            for a, b, c, d in self.used
        )


def furnished_room(looks: Looks, decorate: Callable[[Room], None] | None) -> Room:
    """A room with its furniture, light and surroundings.

    Args:
        decorate: adds what hangs on the walls, before the furniture takes its place; such a room
            also has alcoves and framed openings, which resemble those things.
    """
    room = empty_room(looks)
    night = looks.chance(0.22)
    room.stage.lamp_power = looks.between(12, 30) if night or looks.chance(0.45) else 0.0
    open_walls(room, night)
    if decorate is not None:
        add_alcove(room)
    for wall in room.walls:
        build_wall(room, wall)
    if decorate is not None:
        decorate(room)
    kind = looks.pick(tuple(ROOMS))
    pieces = [make(looks) for make in ROOMS[kind]]
    for piece in pieces[: int(looks.rng.integers(5, len(pieces) + 1))]:
        place(room, piece)
    ceiling(room)
    daylight(room.stage, looks, night, [wall.turn for wall in room.walls if wall.has_windows])
    return room


def empty_room(looks: Looks) -> Room:
    """Rectangular, or an L whose notch is the corner at (width, depth)."""
    width, depth = looks.between(2.6, 6.5), looks.between(3.0, 7.0)
    height, thick = looks.between(2.3, 3.1), looks.between(0.15, 0.4)
    paint = looks.paint()
    is_l = looks.chance(0.3) and min(width, depth) > 3.6
    notch = (
        (looks.between(1.0, width - 2.4), looks.between(1.0, depth - 2.4)) if is_l else (0.0, 0.0)
    )
    in_x, in_y = width - notch[0], depth - notch[1]
    corners = [(0.0, 0.0), (width, 0.0), (width, in_y), (in_x, in_y), (in_x, depth), (0.0, depth)]
    if not is_l:
        corners = [corners[0], corners[1], (width, depth), corners[5]]
    accent = int(looks.rng.integers(2 * len(corners)))
    walls = []
    for i, (x, y) in enumerate(corners):
        dx, dy = np.subtract(corners[(i + 1) % len(corners)], (x, y)).tolist()
        surface = looks.accent() if i == accent else paint
        outer = not (is_l and i in (2, 3))
        wall = Wall(x, y, math.atan2(dy, dx), math.hypot(dx, dy), height, surface, thick, outer)
        walls.append(wall)
    used = [(in_x, in_y, width + 1, depth + 1)] if is_l else []
    stage = Stage(floor=(0, 0, width, depth), blocked=used)
    floor, above = looks.floor(), looks.paint() if looks.chance(0.1) else WHITE
    stage.model.quad((0, 0, 0), (width, 0, 0), (0, depth, 0), floor)
    stage.model.quad((0, 0, height), (0, depth, 0), (width, 0, 0), above)
    return Room(stage, looks, width, depth, height, walls, used)


def open_walls(room: Room, night: bool) -> None:
    """Windows in one or two outer walls, doorways in one or two others."""
    looks = room.looks
    outer = [wall for wall in room.walls if wall.is_outer and wall.length > 1.8]
    outer = [outer[i] for i in looks.rng.permutation(len(outer))]
    with_windows = 2 if looks.chance(0.35) else 1
    storey = looks.pick("0.15 0.15 3.2 6.5")
    surroundings(room.stage, looks, -float(storey), outer[:with_windows])
    for wall in outer[:with_windows]:
        add_windows(room, wall, night)
    for wall in outer[with_windows : with_windows + int(looks.rng.integers(1, 3))]:
        if wall.length > 2.2:
            add_doorway(room, wall)
    frame, leaf = looks.cabinet(), looks.cabinet()
    for wall in outer:
        if not wall.holes and wall.length > 2.0 and looks.chance(0.4):
            x = looks.between(0.2, wall.length - 1.2)
            wall.taken.append((x - 0.1, x + 1.0, 0, 2.15))
            room.used.append(wall.plan(x - 0.1, x + 1.0, 0, 0.7))
            with room.stage.model.at(wall.x, wall.y, turn=wall.turn):
                architrave(room, (x, x + 0.9, 0, 2.05), 0.0, frame)
                closed_door(room, x + 0.45, leaf)


def closed_door(room: Room, x: float, leaf: Surface) -> None:
    model = room.stage.model
    with model.at(x, 0):
        model.box((0, 0.005), 0.005, (0.89, 0.025, 2.04), leaf, round_m=0.002)
        for low, high in ((0.15, 0.9), (1.05, 1.9)):
            model.box((0, 0.018), low, (0.6, 0.02, high - low), leaf, round_m=0.009)
        model.box((0.37, 0.05), 1.02, (0.12, 0.02, 0.02), room.looks.metal())


def add_windows(room: Room, wall: Wall, night: bool) -> None:
    looks = room.looks
    sill = 0.0 if looks.chance(0.2) else looks.between(0.45, 1.0)
    top = min(room.height - 0.15, sill + looks.between(1.1, 1.7) if sill else 2.25)
    many = max(1, min(3, int(wall.length / looks.between(1.5, 2.8))))
    each = wall.length / many
    width = min(each - 0.5, looks.between(0.7, 2.4))
    frame = WHITE if looks.chance(0.6) else looks.cabinet()
    panes, bars = int(looks.rng.integers(1, 4)), int(looks.rng.integers(1, 3))
    cover, cloth = looks.pick("curtains curtains none blind none"), looks.plain_cloth()
    wall.has_windows = True
    for i in range(many):
        x = (i + 0.5) * each - width / 2
        hole = (x, x + width, sill, top)
        wall.holes.append(hole)
        wall.taken.append((x - 0.35, x + width + 0.35, sill - 0.1, top + 0.2))
        with room.stage.model.at(wall.x, wall.y, turn=wall.turn):
            window(room, wall, hole, frame, panes if width > 0.9 else 1, bars)
            if cover == "curtains":
                curtains(room, hole, cloth)
            elif cover == "blind":
                with room.stage.model.at(x + width / 2, 0.03):
                    drop = looks.between(0.15, 0.45) * (top - sill)
                    for z in np.arange(top, top - drop, -0.04).tolist():
                        room.stage.model.box((0, 0), z, (width + 0.06, 0.035, 0.003), WHITE)
            if not night:
                sky_light(room, wall, hole)
    if sill == 0:
        room.used.append(wall.plan(0.3, wall.length - 0.3, 0, 0.5))


def window(room: Room, wall: Wall, hole: Rect, frame: Surface, panes: int, bars: int) -> None:
    """Frame, bars and sill of an opening without glass, and what is seen through it."""
    model, (x0, x1, z0, z1) = room.stage.model, hole
    y, thick = -0.65 * wall.thick, 0.06
    for x in np.linspace(x0, x1, panes + 1).tolist():
        x = min(max(x, x0 + thick / 2), x1 - thick / 2)
        model.box((x, y), z0, (thick, 0.06, z1 - z0), frame)
    for z in np.linspace(z0, z1 - thick, bars + 1).tolist():
        model.box(((x0 + x1) / 2, y), z, (x1 - x0, 0.055, thick), frame)
    if z0 > 0:
        model.box(((x0 + x1) / 2, 0.0), z0 - 0.03, (x1 - x0 + 0.1, 0.2, 0.03), frame)
    opening(room, (x0, x1, z0, z1), -wall.thick)


def opening(room: Room, hole: Rect, y: float) -> None:
    """Note the see-through part of a hole, in the plane at ``y`` of the present frame."""
    x0, x1, z0, z1 = hole
    model = room.stage.model
    corner = model.world((x0, y, z0))
    right, up = model.world((x1, y, z0)) - corner, model.world((x0, y, z1)) - corner
    room.stage.openings.append(Patch(corner, right, up))


def sky_light(room: Room, wall: Wall, hole: Rect) -> None:
    """The sky's light in a window, sent inwards by an area lamp in its plane."""
    x0, x1, z0, z1 = hole
    model = room.stage.model
    place = model.world(((x0 + x1) / 2, -wall.thick - 0.02, (z0 + z1) / 2))
    aim = model.world((0, 1, -0.25)) - model.world((0, 0, 0))
    size = (x1 - x0, z1 - z0)
    power = room.looks.between(25, 45) * size[0] * size[1]
    lamp = Lamp("AREA", tuple(place.tolist()), power, rgb("e3edff"), tuple(aim.tolist()), size)
    room.stage.lamps.append(lamp)


def curtains(room: Room, hole: Rect, cloth: Surface) -> None:
    x0, x1, z0, z1 = hole
    looks, model = room.looks, room.stage.model
    top, bottom = (
        min(z1 + 0.12, room.height - 0.05),
        0.03 if looks.chance(0.7) else max(0.03, z0 - 0.1),
    )
    model.box(
        ((x0 + x1) / 2, 0.09), top, (x1 - x0 + 0.7, 0.025, 0.025), looks.metal(), round_m=0.012
    )
    for start, end in ((x0 - 0.3, x0 + 0.1), (x1 - 0.1, x1 + 0.3)):
        x = np.linspace(start, end, 60)
        fold = 0.09 + 0.035 * np.sin(
            np.linspace(0, looks.between(30, 50), 60) + looks.between(0, 6)
        )
        rows = [np.column_stack([x, fold, np.full(60, z)]) for z in (bottom, top)]
        model.sheet(np.stack(rows), cloth)


def architrave(room: Room, hole: Rect, y: float, frame: Surface, wide: float = 0.08) -> None:
    """A moulding around a hole, on the face of the wall at ``y``."""
    x0, x1, z0, z1 = hole
    model = room.stage.model
    for x in (x0 - wide / 2, x1 + wide / 2):
        model.box((x, y + 0.01), z0, (wide, 0.035, z1 - z0), frame)
    model.box(((x0 + x1) / 2, y + 0.01), z1, (x1 - x0 + 2 * wide, 0.035, wide), frame)


def add_doorway(room: Room, wall: Wall) -> None:
    """A doorway, or wide opening, into a room behind with its own floor, walls and light."""
    looks, model = room.looks, room.stage.model
    wide = looks.between(0.85, 1.0) if looks.chance(0.7) else looks.between(1.2, 1.8)
    high = min(2.1 if wide < 1.1 else looks.between(2.1, 2.4), room.height - 0.15)
    x = looks.between(0.15, wall.length - wide - 0.15)
    hole = (x, x + wide, 0.0, high)
    wall.holes.append(hole)
    wall.taken.append((x - 0.12, x + wide + 0.12, 0, high + 0.12))
    room.used.append(wall.plan(x, x + wide, 0, 0.8))
    with model.at(wall.x, wall.y, turn=wall.turn):
        architrave(room, hole, 0.0, WHITE if looks.chance(0.7) else looks.cabinet())
        opening(room, hole, -wall.thick)
        if wide < 1.1 and looks.chance(0.5):
            with model.at(x, -wall.thick, turn=looks.between(-1.9, -1.2)), model.at(0.45, 0):
                model.box((0, 0), 0.01, (0.84, 0.04, high - 0.03), looks.cabinet())


def add_alcove(room: Room) -> None:
    """A recess in a wall, or a framed opening where there is a room behind."""
    looks, model = room.looks, room.stage.model
    width, height = looks.between(0.5, 1.3), looks.between(0.5, 1.1)
    for i in looks.rng.permutation(len(room.walls)).tolist():
        wall = room.walls[i]
        x, z = looks.between(0.1, max(0.2, wall.length - width - 0.1)), looks.between(0.8, 1.1)
        hole = (x, x + width, z, min(z + height, wall.height - 0.2))
        if wall.has_windows or not wall.is_free(*hole, 0.15):
            continue
        with model.at(wall.x, wall.y, turn=wall.turn):
            opening(room, hole, 0.0)
            if not wall.holes:
                size = ((0, 0, hole[3] - z), (width, 0, 0))
                model.quad((x, -wall.thick, z), *size, wall.surface)
                with model.at(x + width / 2, -wall.thick / 2, z + 0.001):
                    clutter(room.stage, looks, width * 0.8, 0.03, 3, 0.6 * height)
            if looks.chance(0.6):
                wide, frame = looks.between(0.03, 0.08), looks.cabinet()
                architrave(room, hole, 0.0, frame, wide)
                model.box((x + width / 2, 0.01), z - wide, (width + 2 * wide, 0.035, wide), frame)
        wall.holes.append(hole)
        wall.taken.append((x - 0.1, x + width + 0.1, z - 0.1, hole[3] + 0.1))
        return


def room_behind(room: Room, wall: Wall) -> None:
    looks, model, stage = room.looks, room.stage.model, room.stage
    length, height, away = wall.length, room.height, looks.between(1.2, 4.5)
    floor, paint = looks.floor(), looks.paint()
    near, far = -wall.thick, -wall.thick - away
    model.quad((0, far, 0), (length, 0, 0), (0, away + wall.thick, 0), floor)
    model.quad((0, far, height), (0, away, 0), (length, 0, 0), WHITE)
    back = Wall(0, 0, 0, length, height, paint, wall.thick, holes=list(wall.holes))
    pierced(room, back, near, facing=-1)
    model.quad((0, far, 0), (length, 0, 0), (0, 0, height), paint)
    model.quad((0, near, 0), (0, -away, 0), (0, 0, height), paint)
    model.quad((length, far, 0), (0, away, 0), (0, 0, height), paint)
    with model.at(length * looks.between(0.25, 0.75), far):
        kind = ROOMS[looks.pick(tuple(ROOMS))]
        piece = kind[int(looks.rng.integers(len(kind)))](looks)
        if piece.size[0] < 0.45 * length and piece.size[1] < away - 0.5 and not piece.in_middle:
            piece.build(stage)
    place = model.world((length / 2, (near + far) / 2, height - 0.15))
    power = looks.between(8, 22) * max(1.0, away * length / 6)
    stage.lamps.append(
        Lamp("AREA", tuple(place.tolist()), power, looks.lamplight(), size=(0.6, 0.6))
    )


def pierced(room: Room, wall: Wall, y: float, facing: int) -> None:
    """The face of a wall at ``y``, as rectangles around its holes."""
    xs = sorted({0.0, wall.length, *(v for hole in wall.holes for v in hole[:2])})
    zs = sorted({0.0, wall.height, *(v for hole in wall.holes for v in hole[2:])})
    for x0, x1 in pairwise(xs):
        for z0, z1 in pairwise(zs):
            x, z = (x0 + x1) / 2, (z0 + z1) / 2
            if not any(a < x < b and c < z < d for a, b, c, d in wall.holes):
                sides = ((x1 - x0, 0, 0), (0, 0, z1 - z0))
                right, up = sides[::facing]
                room.stage.model.quad((x0, y, z0), right, up, wall.surface)


def build_wall(room: Room, wall: Wall) -> None:
    """Faces, reveals, skirting."""
    model = room.stage.model
    white = WHITE if room.looks.is_bench else Surface(rgb("e9e7e2"), roughness=0.5)
    with model.at(wall.x, wall.y, turn=wall.turn):
        pierced(room, wall, 0.0, facing=-1)
        t = wall.thick
        if any(hole[2] == 0 for hole in wall.holes) and not wall.has_windows:
            room_behind(room, wall)
        elif wall.is_outer:
            pierced(room, wall, -t, facing=1)
        for x0, x1, z0, z1 in wall.holes:
            model.quad((x0, 0, z0), (0, -t, 0), (0, 0, z1 - z0), white)
            model.quad((x1, -t, z0), (0, t, 0), (0, 0, z1 - z0), white)
            model.quad((x0, -t, z1), (x1 - x0, 0, 0), (0, t, 0), white)
            if z0 > 0:
                model.quad((x0, 0, z0), (x1 - x0, 0, 0), (0, -t, 0), white)
            else:
                model.quad((x0, -t, 0.002), (x1 - x0, 0, 0), (0, t, 0), white)
        x = 0.0
        doors_at = sorted(hole for hole in [*wall.holes, *wall.taken] if hole[2] <= 0)
        for x0, x1, *_ in [*doors_at, (wall.length, wall.length)]:
            if x0 > x:
                model.box(((x + x0) / 2, 0.007), 0, (x0 - x, 0.014, 0.09), white, round_m=0.004)
            x = max(x, x1)


def place(room: Room, piece: Piece) -> None:
    """Stand a piece where there is room for it, if there is any."""
    looks, (width, depth, height) = room.looks, piece.size
    for _ in range(80):
        if piece.in_middle:
            x = looks.between(0.5, max(0.6, room.width - 0.5))
            y = looks.between(0.5, max(0.6, room.depth - 0.5 - depth))
            quarter = int(looks.rng.integers(4))
            spot = Wall(x, y, quarter * math.pi / 2, 0, 0, WHITE, 0)
            rect = spot.plan(-width / 2, width / 2, 0, depth)
            gap, wall = 0.35, None
        else:
            wall = room.walls[int(looks.rng.integers(len(room.walls)))]
            if wall.length < width + 0.04:
                continue
            x = looks.between(width / 2, wall.length - width / 2)
            if looks.chance(0.3):
                x = width / 2 + 0.03
            x0, x1 = x - width / 2, x + width / 2
            if not wall.is_free(x0, x1, 0.02, height, 0.0):
                continue
            rect, gap = wall.plan(x0, x1, 0.016, depth), 0.04
            c, s = math.cos(wall.turn), math.sin(wall.turn)
            spot = Wall(
                wall.x + c * x - s * 0.016, wall.y + s * x + c * 0.016, wall.turn, 0, 0, WHITE, 0
            )
        if room.is_free(rect, gap):
            with room.stage.model.at(spot.x, spot.y, turn=spot.turn):
                piece.build(room.stage)
            room.used.append(rect)
            room.stage.blocked.append(rect)
            if wall:
                wall.taken.append((x0, x1, 0, height))
            return


def ceiling(room: Room) -> None:
    """A ceiling lamp, sometimes beams, and the light that walls of a bright room give back."""
    looks, model, stage = room.looks, room.stage.model, room.stage
    x, y = room.width * looks.between(0.35, 0.6), room.depth * looks.between(0.35, 0.6)
    if looks.chance(0.7):
        drop = looks.between(0.3, 0.7) if room.height > 2.5 else 0.25
        with model.at(x, y, room.height - drop):
            cord = [(0.004, 0.15), (0.004, drop - 0.02), (0.05, drop - 0.02), (0.05, drop)]
            model.lathe((0, 0), cord, WHITE, sides=8)
            shade(
                stage,
                looks,
                0,
                looks.between(0.14, 0.3),
                looks.between(0.12, 0.24),
                1.6 * stage.lamp_power,
            )
    if looks.chance(0.12):
        wood = looks.wood()
        for along in np.arange(0.5, room.depth, looks.between(0.7, 1.2)).tolist():
            model.box((room.width / 2, along), room.height - 0.14, (room.width, 0.12, 0.14), wood)
    power = looks.between(3, 9) * room.width * room.depth / 12
    stage.lamps.append(
        Lamp("AREA", (x, y, room.height - 0.03), power, rgb("fff4e6"), size=(1.8, 1.8))
    )
