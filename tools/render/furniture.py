"""Furniture: the middle of its back edge is at the origin, x to the right, y to the front."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from render.looks import LEAF, WHITE, Looks
from render.model import Model, Surface, Vector
from render.stage import Lamp, Stage


@dataclass(frozen=True)
class Piece:
    """A piece of furniture that has its size already.

    Attributes:
        size: width, depth, height in metres.
        build: adds it to the stage's model, in the present frame.
        in_middle: it stands free in the room, not against a wall.
    """

    size: Vector
    build: Callable[[Stage], None]
    in_middle: bool = False


def legs(
    model: Model, width: float, depth: float, height: float, thick: float, of: Surface
) -> None:
    for x in (-1, 1):
        for y in (0, 1):
            centre = (x * (width / 2 - thick), thick + y * (depth - 2 * thick))
            model.box(centre, 0, (thick, thick, height), of)


def sofa(looks: Looks) -> Piece:
    seats = int(looks.rng.integers(1, 4))
    width, depth = 0.45 + 0.62 * seats, looks.between(0.82, 0.98)
    seat, back, arm = 0.42, looks.between(0.72, 0.92), looks.between(0.12, 0.22)
    cloth, feet = looks.plain_cloth(), looks.wood()
    cushions = [looks.cloth() for _ in range(int(looks.rng.integers(0, seats + 2)))]
    places = looks.rng.uniform(-0.5, 0.5, len(cushions)) * (width - 2 * arm - 0.4)

    def build(stage: Stage) -> None:
        model = stage.model
        legs(model, width, depth, 0.12, 0.05, feet)
        model.box((0, depth / 2), 0.1, (width, depth, 0.18), cloth, round_m=0.03, steps=2)
        model.box((0, 0.11), 0.2, (width, 0.22, back - 0.2), cloth, round_m=0.06, steps=3)
        for side in (-1, 1):
            x = side * (width - arm) / 2
            model.box((x, depth / 2), 0.2, (arm, depth, 0.38), cloth, round_m=0.05, steps=3)
        each = (width - 2 * arm) / seats
        for i in range(seats):
            x = -width / 2 + arm + (i + 0.5) * each
            size = (each - 0.01, depth - 0.2, 0.16)
            model.box((x, depth / 2 + 0.12), seat - 0.15, size, cloth, round_m=0.05, steps=3)
            with model.at(x, 0.24, seat, lean=0.2):
                model.box((0, 0.07), 0, (each - 0.02, 0.15, 0.42), cloth, round_m=0.06, steps=3)
        for x, cushion in zip(places.tolist(), cushions, strict=True):
            with model.at(x, 0.5, seat + 0.2, turn=3 * x % 0.5, lean=0.35):
                model.ball((0, 0, 0), (0.21, 0.08, 0.21), cushion, power=0.6)

    return Piece((width, depth, back), build)


def rug_under(model: Model, looks: Looks, size: tuple[float, float], y: float) -> None:
    if looks.chance(0.5):
        across, along = size
        model.box((0, y), 0.001, (across, along, 0.012), looks.rug(), round_m=0.005)


def armchair(looks: Looks) -> Piece:
    cloth, wood = looks.cloth(), looks.wood()
    width, depth, turn = looks.between(0.65, 0.85), 0.8, looks.between(-0.5, 0.5)

    def build(stage: Stage) -> None:
        model = stage.model
        with model.at(0, 0.45, turn=turn), model.at(0, -0.4):
            legs(model, width * 0.9, depth * 0.9, 0.3, 0.04, wood)
            size = (width - 0.1, depth - 0.1, 0.18)
            model.box((0, depth / 2), 0.27, size, cloth, round_m=0.05, steps=3)
            with model.at(0, 0.08, 0.4, lean=0.22):
                model.box((0, 0.05), 0, (width - 0.1, 0.14, 0.5), cloth, round_m=0.06, steps=3)
            for side in (-1, 1):
                x = side * (width / 2 - 0.04)
                model.box((x, depth / 2), 0.52, (0.07, depth * 0.8, 0.05), wood, round_m=0.02)
                model.box((x, depth * 0.8), 0.2, (0.05, 0.05, 0.33), wood)

    return Piece((width + 0.2, depth + 0.1, 0.9), build, looks.chance(0.4))


def bed(looks: Looks) -> Piece:
    width, length = float(looks.rng.choice([0.95, 1.4, 1.65, 1.85])), 2.1
    frame, sheet, blanket = looks.cabinet(), WHITE, looks.cloth(2.0)
    pillows = [
        looks.cloth() if looks.chance(0.4) else WHITE for _ in range(2 if width > 1.2 else 1)
    ]
    head = looks.between(0.8, 1.3)
    fold, bumps = looks.between(0.55, 0.9), looks.rng.normal(0, 0.012, (14, 12))

    def build(stage: Stage) -> None:
        model = stage.model
        model.box((0, 0.04), 0, (width + 0.06, 0.07, head), frame, round_m=0.02, steps=2)
        model.box((0, length / 2), 0.1, (width, length, 0.22), frame, round_m=0.02)
        legs(model, width, length, 0.12, 0.08, frame)
        rug_under(model, looks, (width + 1.2, 1.5), length * 0.7)
        size = (width - 0.04, length - 0.1, 0.24)
        model.box((0, length / 2 + 0.02), 0.3, size, sheet, round_m=0.06, steps=3)
        x = np.linspace(-1, 1, 12)[None] * (width / 2 + 0.03) * np.ones((14, 1))
        y = np.linspace(fold, length + 0.02, 14)[:, None] * np.ones((1, 12))
        drop = np.where(np.abs(x) > width / 2 - 0.06, 0.28, 0.0) + np.where(
            y > length - 0.05, 0.25, 0
        )
        z = 0.58 + bumps * (drop == 0) - np.minimum(drop, 0.3)
        model.sheet(np.stack([x, y, z], axis=-1), blanket)
        for i, pillow in enumerate(pillows):
            px = (i + 0.5) * width / len(pillows) - width / 2
            with model.at(px, 0.3, 0.62, lean=0.45):
                model.ball((0, 0, 0), (0.32, 0.22, 0.1), pillow, power=0.55)

    return Piece((width + 0.1, length + 0.05, head), build)


def chair(model: Model, looks: Looks, seat: Surface, frame: Surface, round_back: bool) -> None:
    """A dining chair, its middle at the origin, facing +y."""
    with model.at(0, -0.22):
        legs(model, 0.44, 0.44, 0.44, 0.035, frame)
        model.box((0, 0.22), 0.43, (0.45, 0.45, 0.04), seat, round_m=0.015, steps=2)
        with model.at(0, 0.02, 0.46, lean=looks.between(0.08, 0.16)):
            if round_back:
                model.box((0, 0.0), 0.08, (0.42, 0.025, 0.34), seat, round_m=0.012, steps=2)
            else:
                for x in np.linspace(-0.18, 0.18, 5):
                    model.box((x, 0), 0, (0.025, 0.02, 0.42), frame)
                model.box((0, 0), 0.4, (0.42, 0.03, 0.07), frame, round_m=0.01)


def table(looks: Looks) -> Piece:
    is_round = looks.chance(0.3)
    width = looks.between(1.1, 2.0)
    depth = width if is_round else looks.between(0.75, 0.95)
    top, frame, seat = looks.wood(), looks.wood(), looks.cloth()
    round_back = looks.chance(0.5)
    cloth = looks.cloth(2) if looks.chance(0.2) else top

    def build(stage: Stage) -> None:
        model = stage.model
        middle = 0.55 + depth / 2
        rug_under(model, looks, (width + 1.0, depth + 1.0), middle)
        if is_round:
            model.lathe((0, middle), [(0.3, 0), (0.28, 0.03), (0.05, 0.08), (0.05, 0.7)], frame)
            half = width / 2
            rim = [(0, 0.72), (half, 0.72), (half, 0.75), (0, 0.75)]
            model.lathe((0, middle), rim, cloth, sides=32)
        else:
            with model.at(0, 0.55):
                legs(model, width - 0.1, depth, 0.72, looks.between(0.05, 0.09), frame)
                model.box((0, depth / 2), 0.71, (width, depth, 0.04), cloth, round_m=0.01)
        for side in (-1, 1):
            for x in [0.0] if width < 1.3 else [-width / 4, width / 4]:
                away = depth / 2 + looks.between(0.08, 0.22)
                turn = looks.between(-0.25, 0.25) + (math.pi if side > 0 else 0)
                with model.at(x, middle + side * away, turn=turn):
                    chair(model, looks, seat, frame, round_back)
        with model.at(0, middle, 0.755):
            clutter(stage, looks, width * 0.5, depth * 0.4, 3)

    return Piece((width, depth + 1.1, 0.76), build, True)


def coffee_table(looks: Looks) -> Piece:
    width, depth, height = (
        looks.between(0.7, 1.2),
        looks.between(0.5, 0.7),
        looks.between(0.35, 0.45),
    )
    wood, metal = looks.wood(), looks.metal()
    is_round = looks.chance(0.35)
    rug_size = (width + looks.between(0.6, 1.2), depth + looks.between(0.6, 1.1))

    def build(stage: Stage) -> None:
        model = stage.model
        rug_under(model, looks, rug_size, depth / 2)
        if is_round:
            rim = [(0, height - 0.03), (width / 2, height - 0.03), (width / 2, height), (0, height)]
            model.lathe((0, depth / 2), rim, wood, sides=32)
            with model.at(0, 0.12):
                legs(model, width * 0.65, depth - 0.24, height - 0.02, 0.03, metal)
        else:
            legs(model, width, depth, height - 0.02, 0.05, metal)
            model.box((0, depth / 2), height - 0.04, (width, depth, 0.04), wood)
        with model.at(0, depth / 2, height):
            clutter(stage, looks, width * 0.6, depth * 0.5, int(looks.rng.integers(1, 5)))

    return Piece((width, depth, height), build, True)


def cupboard(looks: Looks) -> Piece:
    """A sideboard, chest or low board with things on it."""
    width, depth = looks.between(0.7, 2.0), looks.between(0.35, 0.5)
    height, feet = looks.between(0.45, 1.0), looks.between(0.05, 0.18)
    columns, rows = max(1, round(width / looks.between(0.4, 0.7))), int(looks.rng.integers(1, 4))
    body, knob = looks.cabinet(), looks.metal()

    def build(stage: Stage) -> None:
        model = stage.model
        legs(model, width, depth, feet, 0.04, looks.wood())
        model.box((0, depth / 2), feet, (width, depth, height - feet), body)
        doors(model, body, knob, (width, depth), (feet, height), columns, rows)
        with model.at(0, depth / 2, height):
            clutter(stage, looks, width * 0.85, depth * 0.5, int(looks.rng.integers(1, 7)))

    return Piece((width, depth + 0.02, height), build)


def doors(
    model: Model,
    body: Surface,
    knob: Surface,
    size: tuple[float, float],
    rise: tuple[float, float],
    columns: int,
    rows: int,
) -> None:
    """A grid of doors or drawers with handles on a front at y = depth."""
    (width, depth), (low, high) = size, rise
    across, up = width / columns, (high - low) / rows
    for i in range(columns):
        for j in range(rows):
            x, z = (i + 0.5) * across - width / 2, low + j * up
            model.box((x, depth), z + 0.012, (across - 0.02, 0.03, up - 0.024), body, round_m=0.006)
            handle = (0.12, 0.02, 0.015) if rows > 1 else (0.015, 0.02, 0.16)
            at = 0 if rows > 1 else (across / 2 - 0.06) * (1 if i % 2 == 0 else -1)
            model.box((x + at, depth + 0.025), z + up / 2, handle, knob, round_m=0.004)


def wardrobe(looks: Looks) -> Piece:
    columns = int(looks.rng.integers(2, 5))
    width, depth, height = 0.5 * columns, 0.6, looks.between(1.95, 2.25)
    body, knob = looks.cabinet(), looks.metal()

    def build(stage: Stage) -> None:
        stage.model.box((0, depth / 2), 0, (width, depth, height), body)
        doors(stage.model, body, knob, (width, depth), (0.08, height - 0.03), columns, 1)

    return Piece((width, depth + 0.04, height), build)


def shelves(looks: Looks) -> Piece:
    width, depth = looks.between(0.6, 1.8), looks.between(0.26, 0.36)
    height, rows = looks.between(1.2, 2.2), int(looks.rng.integers(3, 6))
    body, has_back = looks.cabinet(), looks.chance(0.6)

    def build(stage: Stage) -> None:
        model = stage.model
        for side in (-1, 1):
            model.box((side * (width / 2 - 0.01), depth / 2), 0, (0.025, depth, height), body)
        if has_back:
            model.box((0, 0.008), 0.05, (width - 0.02, 0.012, height - 0.06), body)
        step = (height - 0.1) / rows
        for row in range(rows + 1):
            model.box((0, depth / 2), 0.06 + row * step, (width - 0.02, depth, 0.025), body)
            if row < rows:
                with model.at(0, depth / 2, 0.085 + row * step):
                    fill_shelf(stage, looks, width - 0.1, depth, step - 0.05)

    return Piece((width, depth, height), build)


def fill_shelf(stage: Stage, looks: Looks, width: float, depth: float, height: float) -> None:
    """Rows of books and other things on a board around the origin."""
    x = -width / 2
    while x < width / 2 - 0.12:
        if looks.chance(0.6):
            many = int(looks.rng.integers(3, 12))
            for thick in looks.rng.uniform(0.015, 0.05, many):
                if x + thick > width / 2:
                    break
                tall = height * looks.between(0.6, 0.95)
                size = (thick * 0.96, depth * 0.7, tall)
                stage.model.box((x + thick / 2, 0), 0, size, looks.thing(), round_m=0.002)
                x += float(thick)
        else:
            with stage.model.at(x + 0.1, 0):
                clutter(stage, looks, 0.05, 0.04, 1, height)
            x += 0.2
        x += looks.between(0.0, 0.2)


def clutter(
    stage: Stage, looks: Looks, width: float, depth: float, many: int, tallest: float = 0.4
) -> None:
    """Small things on a surface around the origin, side by side."""
    for i in range(0 if looks.is_tidy else many):
        x = (i + 0.5) / many * width - width / 2
        with stage.model.at(x, looks.between(-0.3, 0.3) * depth, turn=looks.between(-0.6, 0.6)):
            small_thing(stage, looks, min(tallest, width / many + 0.15))


def small_thing(stage: Stage, looks: Looks, tallest: float) -> None:
    model, surface = stage.model, looks.thing()
    tall = tallest * looks.between(0.4, 0.95)
    match looks.pick("vase vase books box bowl plant lamp bottle"):
        case "vase":
            r = tall * looks.between(0.15, 0.3)
            neck = r * looks.between(0.35, 0.9)
            shape = [(0, 0), (r * 0.6, 0), (r, tall * 0.4), (neck, tall * 0.8), (neck * 1.2, tall)]
            model.lathe((0, 0), shape, surface)
            if looks.chance(0.4):
                leaves(model, looks, (0, 0, tall), tall * 0.9, 14)
        case "books":
            z = 0.0
            for _ in range(int(looks.rng.integers(1, 5))):
                thick = looks.between(0.015, 0.04)
                with model.at(0, 0, z, turn=looks.between(-0.3, 0.3)):
                    model.box((0, 0), 0, (0.14, 0.2, thick), looks.thing(), round_m=0.003)
                z += thick
        case "box":
            model.box((0, 0), 0, (tall * 0.7, tall * 0.5, tall * 0.6), surface)
        case "bowl":
            r = min(0.15, tall * 0.5)
            model.lathe(
                (0, 0),
                [(0, 0), (r * 0.4, 0), (r, r * 0.5), (r * 0.95, r * 0.5), (0, 0.02)],
                surface,
            )
        case "plant":
            r = tall * 0.22
            model.lathe((0, 0), [(0, 0), (r * 0.8, 0), (r, r * 1.6), (0, r * 1.5)], surface)
            leaves(model, looks, (0, 0, r * 1.5), tall * 0.6, 18)
        case "lamp" if tall > 0.22:
            table_lamp(stage, looks, tall)
        case _:
            r = tall * 0.13
            shape = [
                (0, 0),
                (r, 0),
                (r, tall * 0.6),
                (r * 0.35, tall * 0.75),
                (r * 0.35, tall),
                (0, tall),
            ]
            model.lathe((0, 0), shape, surface, sides=12)


def shade(stage: Stage, looks: Looks, z: float, radius: float, height: float, power: float) -> None:
    """A lamp's open shade around the z axis, lit from within."""
    light = looks.lamplight()
    glow = 1.2 if power else 0.0
    cloth = Surface(light if power else (0.8, 0.77, 0.7), roughness=0.9, glow=glow)
    top = radius * looks.between(0.5, 1.0)
    stage.model.lathe((0, 0), [(radius, z), (top, z + height)], cloth, sides=24)
    if power:
        place = stage.model.world((0, 0, z + height / 2))
        stage.lamps.append(Lamp("POINT", tuple(place.tolist()), power, light, size=(0.04, 0)))


def table_lamp(stage: Stage, looks: Looks, tall: float) -> None:
    r = tall * 0.14
    foot = [
        (0, 0),
        (r * 1.6, 0),
        (r * 1.6, 0.015),
        (r * 0.5, 0.03),
        (r, tall * 0.3),
        (r * 0.3, tall * 0.7),
    ]
    stage.model.lathe((0, 0), foot, looks.thing())
    shade(stage, looks, tall * 0.6, tall * 0.38, tall * 0.4, stage.lamp_power * 0.4)


def floor_lamp(looks: Looks) -> Piece:
    metal, tall = looks.metal(), looks.between(1.4, 1.75)

    def build(stage: Stage) -> None:
        with stage.model.at(0, 0.22):
            pole = [(0, 0), (0.15, 0), (0.15, 0.02), (0.012, 0.03), (0.012, tall - 0.2)]
            stage.model.lathe((0, 0), pole, metal)
            shade(stage, looks, tall - 0.28, 0.2, 0.28, stage.lamp_power)

    return Piece((0.44, 0.44, tall), build)


def leaves(
    model: Model, looks: Looks, root: Vector, length: float, many: int, of: Surface = LEAF
) -> None:
    """Bent leaves that spring from a point."""
    t = np.linspace(0, 1, 5)[:, None]
    for _ in range(many):
        around, rise = looks.between(0, 2 * math.pi), looks.between(0.5, 1.35)
        size = length * looks.between(0.6, 1.1)
        width = 0.13 * size * np.sin(math.pi * (0.08 + 0.9 * t)) * np.array([[-1, 0.0, 1]])
        out = size * t * math.cos(rise) + 0.25 * size * t**2
        up = size * t * math.sin(rise) - 0.3 * size * t**2 + np.abs(width) * 0.3
        grid = np.stack([width, out + 0 * width, up], axis=-1)
        with model.at(*root, turn=around):
            model.sheet(grid, of)


def plant(looks: Looks) -> Piece:
    tall = looks.between(0.6, 1.7)
    pot, radius = looks.thing(), looks.between(0.13, 0.2)
    stem = Surface((0.08, 0.05, 0.03))

    def build(stage: Stage) -> None:
        model = stage.model
        with model.at(0, 0.3):
            high = radius * 1.7
            model.lathe((0, 0), [(0, 0), (radius * 0.8, 0), (radius, high), (0, high - 0.03)], pot)
            if tall > 1.1:
                model.lathe((0, 0), [(0.02, high - 0.05), (0.012, tall * 0.75)], stem, sides=6)
                for z in np.linspace(tall * 0.45, tall * 0.8, 4):
                    leaves(model, looks, (0, 0, float(z)), tall * 0.3, 12)
            else:
                leaves(model, looks, (0, 0, high - 0.03), tall - high, 36)

    return Piece((0.6, 0.6, tall), build)


def desk(looks: Looks) -> Piece:
    width, depth = looks.between(1.0, 1.6), looks.between(0.6, 0.75)
    wood, frame, seat = looks.wood(), looks.metal(), looks.plain_cloth()

    def build(stage: Stage) -> None:
        model = stage.model
        legs(model, width, depth, 0.72, 0.045, frame)
        model.box((0, depth / 2), 0.71, (width, depth, 0.035), wood)
        model.box((width / 2 - 0.25, depth / 2), 0.15, (0.38, depth - 0.1, 0.55), wood)
        with model.at(width * 0.3, depth * 0.4, 0.745):
            clutter(stage, looks, width * 0.25, depth * 0.5, 2)
        with model.at(-width * 0.15, depth + 0.15, turn=math.pi + looks.between(-0.6, 0.6)):
            chair(model, looks, seat, frame, True)

    return Piece((width, depth + 0.45, 0.76), build)


def kitchen(looks: Looks) -> Piece:
    columns = int(looks.rng.integers(3, 7))
    width, depth = 0.6 * columns, 0.6
    body, top, knob = looks.cabinet(), looks.stone(), looks.metal()
    colour = looks.wall_colour()
    splash = Surface(colour, colour, "tiles", looks.between(0.08, 0.2), 0.15, bump=0.001)
    uppers = looks.chance(0.7)

    def build(stage: Stage) -> None:
        model = stage.model
        model.box((0, depth / 2 - 0.03), 0, (width, depth - 0.08, 0.1), Surface((0.02, 0.02, 0.02)))
        model.box((0, depth / 2), 0.1, (width, depth, 0.76), body)
        doors(model, body, knob, (width, depth), (0.12, 0.86), columns, 1)
        model.box((0, depth / 2), 0.86, (width + 0.02, depth + 0.03, 0.04), top)
        model.box((0, 0.006), 0.9, (width, 0.01, 0.55), splash, round_m=0.001)
        if uppers:
            model.box((0, 0.17), 1.45, (width, 0.34, 0.65), body)
            doors(model, body, knob, (width, 0.34), (1.46, 2.09), columns, 1)
        with model.at(0, depth / 2 - 0.05, 0.9):
            clutter(stage, looks, width * 0.9, depth * 0.4, columns + 1, 0.38)

    return Piece((width, depth + 0.05, 2.1 if uppers else 1.45), build)


def radiator(looks: Looks) -> Piece:
    ribs, height = int(looks.rng.integers(8, 20)), looks.between(0.5, 0.65)

    def build(stage: Stage) -> None:
        for i in range(ribs):
            x = (i + 0.5 - ribs / 2) * 0.06
            stage.model.box((x, 0.07), 0.12, (0.05, 0.08, height - 0.12), WHITE, round_m=0.015)

    return Piece((0.06 * ribs, 0.12, height), build)


def wall_shelf(looks: Looks) -> Piece:
    """Boards on a wall, at the height of the eyes."""
    width, board = looks.between(0.6, 1.5), looks.wood()
    heights = [1.35, 1.75][: int(looks.rng.integers(1, 3))]

    def build(stage: Stage) -> None:
        for z in heights:
            stage.model.box((0, 0.11), z, (width, 0.22, 0.03), board)
            with stage.model.at(0, 0.11, z + 0.03):
                fill_shelf(stage, looks, width - 0.1, 0.22, 0.34)

    return Piece((width, 0.24, 2.1), build)


def pouf(looks: Looks) -> Piece:
    cloth, r = looks.cloth(), looks.between(0.22, 0.34)

    def build(stage: Stage) -> None:
        stage.model.ball((0, 0.36, 0.2), (r, r, 0.2), cloth, power=0.7)

    return Piece((0.72, 0.72, 0.4), build, looks.chance(0.5))


ROOMS: dict[str, tuple[Callable[[Looks], Piece], ...]] = {
    "living": (
        *(sofa, coffee_table, cupboard, radiator, shelves, armchair, floor_lamp, plant, sofa),
        *(wall_shelf, pouf, plant, cupboard),
    ),
    "bedroom": (
        *(bed, wardrobe, cupboard, radiator, armchair, floor_lamp, plant, cupboard, pouf, desk),
        *(wall_shelf, shelves),
    ),
    "dining": (
        *(table, cupboard, shelves, plant, radiator, cupboard, floor_lamp, armchair, wall_shelf),
        *(plant, sofa),
    ),
    "kitchen": (kitchen, table, kitchen, radiator, cupboard, wall_shelf, shelves, plant, plant),
    "study": (
        *(desk, shelves, radiator, armchair, plant, floor_lamp, shelves, cupboard, sofa, pouf),
        *(wall_shelf, plant),
    ),
}
"""What a room of each kind has, most important first."""
