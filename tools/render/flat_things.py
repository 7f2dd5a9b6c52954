"""Real mirrors, pictures and screens; the present frame's x runs along a wall, y away from it."""

import math
from collections.abc import Callable
from dataclasses import replace

from render.furniture import Piece, cupboard, desk
from render.interior import Room, Wall, place
from render.looks import BLACK, BRASS, WHITE, Looks
from render.model import FRAME, MIRROR, PICTURE, SCREEN, Surface, Vector
from render.pictures import Pictures
from render.stage import FlatThing, Patch, Stage

SILVER = Surface((0.86, 0.88, 0.87), pattern="mirror")

Size = tuple[float, float]


def add_flat_things(room: Room, pictures: Pictures, out_of_doors: bool) -> None:
    """One to three of them, each where there is a place for it."""
    looks = room.looks
    for _ in range(int(looks.rng.integers(1, 4))):
        indoors = "mirror mirror picture picture other other"
        match looks.pick("poster poster mural screen" if out_of_doors else indoors):
            case "mirror":
                hang(room, mirror(looks), 0.5 if looks.chance(0.7) else 0.05)
            case "picture":
                hang(room, framed_picture(looks, pictures, looks.between(0.7, 1.8)), 0.8)
            case "poster":
                hang(room, framed_picture(looks, pictures, looks.between(1.3, 3.0)), 0.6)
            case "mural":
                hang(room, mural(looks, pictures), 0.4)
            case "screen":
                hang(room, screen(looks, pictures, looks.between(0.9, 2.0)), 0.8)
            case "other":
                make = (leaning_mirror, mirror_wardrobe, television, hung_television, monitor)
                make[int(looks.rng.integers(len(make)))](room, pictures)


Thing = tuple[Size, Callable[[Stage], None]]
"""Outer size, and what builds it from the middle of its lower edge, its back at y = 0."""


def hang(room: Room, thing: Thing, lowest: float) -> None:
    """Hang a thing on some wall, its middle at the height of the eyes or higher."""
    looks, ((width, height), build) = room.looks, thing
    for _ in range(60):
        wall = room.walls[int(looks.rng.integers(len(room.walls)))]
        if wall.length < width + 0.2 or wall.height < height + lowest + 0.1:
            continue
        x = looks.between(width / 2 + 0.08, wall.length - width / 2 - 0.08)
        z = max(lowest, looks.between(1.4, 1.65) - height / 2)
        rect = (x - width / 2, x + width / 2, z, z + height)
        if wall.is_free(*rect):
            wall.taken.append(rect)
            stand(room, wall, x, z, build)
            return


def stand(room: Room, wall: Wall, x: float, z: float, build: Callable[[Stage], None]) -> None:
    model = room.stage.model
    with model.at(wall.x, wall.y, turn=wall.turn), model.at(x, 0, z), model.flat_thing():
        build(room.stage)


def pane(stage: Stage, size: Size, y: float, z: float, surface: Surface, region: int) -> None:
    """What a flat thing shows, as an upright rectangle at ``y`` that rises from ``z``."""
    model, (width, height) = stage.model, size
    corner, right, up = (width / 2, y, z), (-width, 0, 0), (0, 0, height)  # as seen from the front
    model.quad(corner, right, up, surface, region=region)
    note(stage, corner, right, up)


def note(stage: Stage, corner: Vector, right: Vector, up: Vector) -> None:
    """The part that was added last is a flat thing within this rectangle of the present frame."""
    place, turn = stage.model.world(corner), stage.model.frame[:3, :3]
    patch = Patch(place, turn @ right, turn @ up)
    stage.flat_things.append(FlatThing(patch, len(stage.model.parts) - 1))


def frame(stage: Stage, size: Size, wide: float, deep: float, surface: Surface) -> None:
    """A frame and back around an opening of ``size`` that begins at z = ``wide``."""
    model, (width, height) = stage.model, size
    for side in (-1, 1):
        x = side * (width + wide) / 2
        model.box((x, deep / 2), 0, (wide, deep, height + 2 * wide), surface, region=FRAME)
    for z in (0, height + wide):
        model.box((0, deep / 2), z, (width, deep, wide), surface, region=FRAME)
    model.box((0, 0.004), wide, (width, 0.006, height), BLACK, round_m=0.001, region=FRAME)


def frame_surface(looks: Looks) -> Surface:
    return (looks.wood(), looks.wood(), BLACK, WHITE, BRASS)[int(looks.rng.integers(5))]


def mirror(looks: Looks) -> Thing:
    """Framed, bare or round."""
    if looks.chance(0.25):
        return round_mirror(looks)
    height = looks.between(0.7, 1.8)
    width = height * looks.between(0.6, 1.6) if height < 1.2 else looks.between(0.5, 2.0)
    wide = looks.between(0.015, 0.12) if looks.chance(0.7) else 0.0
    surface, deep = frame_surface(looks), looks.between(0.02, 0.05)
    size = (width, height)

    def build(stage: Stage) -> None:
        if wide:
            frame(stage, size, wide, deep, surface)
        pane(stage, size, 0.6 * deep, wide, SILVER, MIRROR)

    return (width + 2 * wide, height + 2 * wide), build


def round_mirror(looks: Looks) -> Thing:
    radius, wide = looks.between(0.35, 0.65), looks.between(0.01, 0.05)
    surface = frame_surface(looks)

    def build(stage: Stage) -> None:
        model, outer = stage.model, radius + wide
        with model.at(0, 0, outer, lean=-math.pi / 2):  # its z is the wall's y
            rim = [(outer, 0), (outer, 0.03), (radius, 0.03), (radius, 0.01)]
            model.lathe((0, 0), rim, surface, sides=48, region=FRAME)
            model.disc(radius, 0.012, SILVER, region=MIRROR)
            note(stage, (-radius, -radius, 0.012), (2 * radius, 0, 0), (0, 2 * radius, 0))

    return (2 * (radius + wide), 2 * (radius + wide)), build


def framed_picture(looks: Looks, pictures: Pictures, longest: float) -> Thing:
    """Framed with or without a mat, a canvas, or a bare sheet."""
    file, aspect = pictures.draw(looks)
    size = (longest, longest / aspect) if aspect > 1 else (longest * aspect, longest)
    wide = looks.between(0.015, 0.09) if looks.chance(0.7) else 0.0
    mat = looks.between(0.04, 0.12) if wide and looks.chance(0.5) else 0.0
    deep, surface = looks.between(0.015, 0.04), frame_surface(looks)
    behind_glass = looks.chance(0.4)
    shown = Surface((1, 1, 1), image=file, roughness=0.06 if behind_glass else 0.8)
    inner = (size[0] + 2 * mat, size[1] + 2 * mat)

    def build(stage: Stage) -> None:
        model = stage.model
        if wide:
            frame(stage, inner, wide, deep, surface)
        else:
            model.box(
                (0, deep / 2), 0, (*(inner[0], deep), inner[1]), WHITE, round_m=0.001, region=FRAME
            )
        y = 0.6 * deep if wide else deep + 0.001
        if mat:
            model.quad(
                (inner[0] / 2, y - 0.001, wide),
                (-inner[0], 0, 0),
                (0, 0, inner[1]),
                WHITE,
                region=PICTURE,
            )
        pane(stage, size, y, wide + mat, shown, PICTURE)

    return (inner[0] + 2 * wide, inner[1] + 2 * wide), build


def mural(looks: Looks, pictures: Pictures) -> Thing:
    """Painted on the wall itself."""
    file, aspect = pictures.draw(looks)
    width = looks.between(2.2, 4.5)
    size = (width, min(width / aspect, 3.2))
    shown = Surface((1, 1, 1), image=file, roughness=0.9)
    return size, lambda stage: pane(stage, size, 0.003, 0.0, shown, PICTURE)


def screen(looks: Looks, pictures: Pictures, width: float) -> Thing:
    file, _ = pictures.draw(looks)
    size, wide, deep = (width, width * 9 / 16), looks.between(0.008, 0.025), 0.05
    shown = Surface((1, 1, 1), image=file, roughness=0.15, glow=looks.between(0.5, 1.6))

    def build(stage: Stage) -> None:
        frame(stage, size, wide, deep, BLACK)
        pane(stage, size, 0.8 * deep, wide, shown, SCREEN)

    return (width + 2 * wide, size[1] + 2 * wide), build


def hung_television(room: Room, pictures: Pictures) -> None:
    hang(room, screen(room.looks, pictures, room.looks.between(0.9, 1.5)), 0.7)


def on_top(room: Room, base: Piece, thing: Thing, height: float, y: float) -> None:
    """Place a piece of furniture with a flat thing standing on it on a foot."""
    (_, tall), build = thing

    def both(stage: Stage) -> None:
        base.build(stage)
        model = stage.model
        with model.at(0, y, height), model.flat_thing():
            model.box((0, 0.02), 0, (0.28, 0.2, 0.015), BLACK)
            model.box((0, 0.0), 0, (0.05, 0.03, 0.12), BLACK)
            with model.at(0, 0, 0.05):
                build(stage)

    width, depth, _ = base.size
    place(room, Piece((width, depth, height + tall + 0.05), both))


def television(room: Room, pictures: Pictures) -> None:
    base = bare(cupboard, room.looks)
    width = min(base.size[0] * 0.95, room.looks.between(0.8, 1.4))
    on_top(room, base, screen(room.looks, pictures, width), base.size[2], 0.18)


def monitor(room: Room, pictures: Pictures) -> None:
    base = desk(room.looks)
    on_top(room, base, screen(room.looks, pictures, room.looks.between(0.5, 0.8)), 0.745, 0.2)


def bare(make: Callable[[Looks], Piece], looks: Looks) -> Piece:
    """A piece whose middle is not cluttered."""
    return make(replace(looks, is_tidy=True))


def leaning_mirror(room: Room, pictures: Pictures) -> None:  # noqa: ARG001  (as the others)
    """A tall mirror that stands on the floor and leans against a wall."""
    looks = room.looks
    (width, height), wide = (
        (looks.between(0.5, 1.1), looks.between(1.3, 1.9)),
        looks.between(0.02, 0.08),
    )
    surface, lean = frame_surface(looks), looks.between(0.06, 0.14)
    away = math.sin(lean) * (height + 2 * wide) + 0.01

    def build(stage: Stage) -> None:
        model = stage.model
        with model.flat_thing(), model.at(0, away, 0.003, lean=lean):
            frame(stage, (width, height), wide, 0.03, surface)
            pane(stage, (width, height), 0.02, wide, SILVER, MIRROR)

    place(room, Piece((width + 2 * wide, away + 0.05, height), build))


def mirror_wardrobe(room: Room, pictures: Pictures) -> None:  # noqa: ARG001
    """A wardrobe with sliding doors, some of them mirrors."""
    looks = room.looks
    columns, each, height = (
        int(looks.rng.integers(2, 4)),
        looks.between(0.6, 0.9),
        looks.between(2.0, 2.25),
    )
    body, is_mirror = looks.cabinet(), [looks.chance(0.6) for _ in range(columns)]
    is_mirror[0] = True
    width, depth = columns * each, 0.62

    def build(stage: Stage) -> None:
        model = stage.model
        model.box((0, depth / 2), 0, (width, depth, height), body)
        for i, mirrored in enumerate(is_mirror):
            y = depth + 0.02 * (i % 2)
            with model.at((i + 0.5) * each - width / 2, y, 0.05):
                model.box((0, 0), 0, (each, 0.024, height - 0.08), body, round_m=0.003)
                if mirrored:
                    with model.flat_thing():
                        pane(stage, (each - 0.05, height - 0.13), 0.016, 0.025, SILVER, MIRROR)

    place(room, Piece((width, depth + 0.05, height), build))
