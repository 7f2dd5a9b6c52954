"""Streets between houses, for posters and murals, and to be seen in pictures."""

import math

import numpy as np

from render.furniture import leaves
from render.interior import Room, Wall, pierced
from render.looks import BLACK, WHITE, Looks
from render.model import Surface, rgb
from render.outside import daylight, tree
from render.stage import Stage

GLASS = Surface(rgb("1b222b"), roughness=0.05)


def street(looks: Looks) -> Room:
    """A street along y whose houses are walls to hang things on; nothing hangs there yet."""
    width, length = looks.between(8, 14), 60.0
    floor = (1.2, 14.0, width - 1.2, 46.0)
    stage = Stage(floor=floor)
    model, reach = stage.model, 200.0
    asphalt = Surface(rgb("45454a"), rgb("5d5d60"), "mottled", 1.2, 0.85)
    slabs = Surface(rgb("8d8a84"), rgb("a19d96"), "tiles", looks.between(0.4, 0.9), 0.85)
    model.quad((-reach, -reach, -0.14), (2 * reach, 0, 0), (0, 2 * reach, 0), asphalt)
    pavement = looks.between(1.8, 2.6)
    for x in (pavement / 2, width - pavement / 2):
        model.box((x, length / 2), -0.14, (pavement + 1, 3 * length, 0.14), slabs, round_m=0.02)
    walls = []
    for side in (0, 1):
        y = -6.0
        while y < length:
            front = looks.between(5, 11)
            set_back = looks.between(0, 0.5)
            x = -set_back if side == 0 else width + set_back
            start = y + front if side == 0 else y
            turn = -math.pi / 2 if side == 0 else math.pi / 2
            storeys = int(looks.rng.integers(1, 5))
            surface = looks.facade()
            wall = Wall(x, start, turn, front, 3.1 * storeys + 0.8, surface, 0.18)
            walls.append(wall)
            y += front + (looks.between(1, 4) if looks.chance(0.25) else 0.0)
    for end in (-30.0, length + 25):
        facade = Surface(looks.wall_colour(), (0, 0, 0), "facade", 2.6, 0.8)
        model.box((width / 2, end), 0, (26, 8, looks.between(8, 15)), facade)
    room = Room(stage, looks, width, length, 20.0, walls, [])
    for wall in walls:
        plan_windows(room, wall)
        build_house(room, wall)
    furnish(room, pavement)
    daylight(stage, looks, False, [looks.between(0, 2 * math.pi)])
    return room


def plan_windows(room: Room, wall: Wall) -> None:
    """Windows in the upper storeys; at the ground some have none, where posters go."""
    looks = room.looks
    many, wide = int(wall.length // looks.between(1.9, 3.0)), looks.between(0.8, 1.3)
    has_shop = looks.chance(0.5)
    for i in range(many):
        x = (i + 0.5) * wall.length / many - wide / 2
        for storey in range(round(wall.height // 3.1)):
            z = 3.1 * storey
            if storey:
                hole = (x, x + wide, z + 0.9, z + 2.5)
            elif i == 0:
                hole = (x, x + 1.0, 0.02, 2.2)
            elif has_shop:
                hole = (x - 0.2, x + wide + 0.2, 0.6, 2.5)
            else:
                continue
            wall.holes.append(hole)
            wall.taken.append(hole)


def build_house(room: Room, wall: Wall) -> None:
    """The front with its windows, door, sills and cornice, and the house behind it."""
    model, looks, t = room.stage.model, room.looks, wall.thick
    frame, height = WHITE if looks.chance(0.6) else looks.cabinet(), wall.height
    with model.at(wall.x, wall.y, turn=wall.turn):
        pierced(room, wall, 0.0, facing=-1)
        model.box(
            (wall.length / 2, -5 - t), 0, (wall.length, 10, height - 0.05), GLASS, round_m=0.001
        )
        for x in (0.0, wall.length):
            model.quad((x, 0, 0), (0, -10, 0), (0, 0, height), wall.surface)
        size = (wall.length, 0.25, 0.25)
        model.box((wall.length / 2, 0), height - 0.2, size, frame)
        for x0, x1, z0, z1 in wall.holes:
            for x in (x0, x1):
                model.quad((x, 0, z0), (0, -t, 0), (0, 0, z1 - z0), wall.surface)
            for x in (x0, (x0 + x1) / 2, x1):
                model.box((x, 0.03 - t), z0, (0.06, 0.05, z1 - z0), frame)
            for z in (z0, z0 + 0.65 * (z1 - z0), z1 - 0.06):
                model.box(((x0 + x1) / 2, 0.03 - t), z, (x1 - x0, 0.05, 0.06), frame)
            model.box(((x0 + x1) / 2, 0), z0 - 0.06, (x1 - x0 + 0.1, 0.16, 0.06), frame)


def furnish(room: Room, pavement: float) -> None:
    """Cars, trees, street lamps and tubs along both kerbs."""
    looks, model = room.looks, room.stage.model
    for x, side in ((pavement + 1.4, 1), (room.width - pavement - 1.4, -1)):
        y = looks.between(0, 6)
        while y < room.depth:
            at = x - side * 1.2
            match looks.pick("car car tree lamp tub none none"):
                case "car":
                    with model.at(x + side * 0.3, y, -0.14, turn=math.pi / 2):
                        car(room)
                    room.stage.blocked.append((x - 1, y - 2.4, x + 1, y + 2.4))
                case "tree":
                    tree(model, looks, at, y)
                case "lamp":
                    model.lathe((at, y), [(0.09, 0), (0.06, 0.6), (0.04, 4.6)], BLACK, sides=12)
                    model.ball((at, y, 4.7), (0.2, 0.2, 0.25), WHITE)
                case "tub":
                    with model.at(at, y):
                        model.lathe((0, 0), [(0.25, 0), (0.35, 0.6), (0, 0.55)], looks.stone())
                        leaves(model, looks, (0, 0, 0.55), 0.8, 30)
            y += looks.between(4.5, 8)


def car(room: Room) -> None:
    """About 4.2 m long, along x."""
    looks, model = room.looks, room.stage.model
    paint = Surface(
        rgb(looks.pick("7c1f1f 20304f d8d8d6 2b2b2d 8f9699 3f5a46 c7b58a")), roughness=0.2
    )
    model.box((0, 0), 0.28, (4.2, 1.75, 0.55), paint, round_m=0.14, steps=3)
    model.box((-0.15, 0), 0.75, (2.4, 1.5, 0.66), GLASS, round_m=0.2, steps=3)
    model.box((-0.15, 0), 1.33, (1.7, 1.2, 0.1), paint, round_m=0.05, steps=2)
    for x in (-1.3, 1.3):
        for y in (-0.78, 0.78):
            with model.at(x, y - 0.1, 0.32, lean=-math.pi / 2):
                rim = [(0, 0), (0.31, 0), (0.32, 0.02), (0.32, 0.18), (0.31, 0.2), (0, 0.2)]
                model.lathe((0, 0), rim, BLACK, sides=20)
    for x, y in np.array([(2.08, 0.6), (2.08, -0.6)]).tolist():
        model.box((x, y), 0.55, (0.06, 0.3, 0.14), WHITE, round_m=0.02)
