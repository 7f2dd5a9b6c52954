"""Furniture: functions of a generator and a palette that return a piece with its front at +y."""

from dataclasses import dataclass

import numpy as np

from flatdepth.rooms import textures
from flatdepth.rooms.bodies import Block
from flatdepth.rooms.build import Builder, Piece, box, centred
from flatdepth.rooms.streams import Rng


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """The paints of one room's furniture."""

    wood: int
    dark: int
    lacquer: int
    accent: int
    fabric: int
    cushion: int
    leaves: int
    books: tuple[int, ...]


def palette(rng: Rng, build: Builder) -> Palette:
    """Paints for the furniture of one room."""
    return Palette(
        wood=build.paint(rng, textures.wood, textures.WOODS, 1.0),
        dark=build.paint(rng, textures.wood, textures.WOODS, 1.3),
        lacquer=build.paint(rng, textures.plain, textures.LACQUERS, 1.5),
        accent=build.paint(rng, textures.plain, textures.FABRICS, 1.5),
        fabric=build.paint(rng, textures.fabric, textures.FABRICS, 0.6),
        cushion=build.paint(rng, textures.fabric, textures.FABRICS, 0.5),
        leaves=build.paint(rng, textures.leaves, textures.GREENS, 0.5),
        books=tuple(build.paint(rng, textures.plain, textures.BOOKS, 1.0) for _ in range(3)),
    )


def _legs(x: float, y: float, thick: float, top: float, paint: int) -> tuple[Block, ...]:
    """Four legs whose outer corners are at (+-x, +-y)."""
    spans = ((-x, -x + thick), (x - thick, x))
    deep = ((-y, -y + thick), (y - thick, y))
    return tuple(box(*sx, *sy, 0, top, paint) for sx in spans for sy in deep)


def table(rng: Rng, p: Palette) -> Piece:
    w, d, h = rng.uniform(1.1, 1.9), rng.uniform(0.7, 0.95), rng.uniform(0.7, 0.77)
    top = rng.uniform(0.03, 0.05)
    wood = p.wood if rng.random() < 0.6 else p.lacquer
    legs = _legs(w / 2 - 0.05, d / 2 - 0.05, rng.uniform(0.045, 0.08), h - top, wood)
    apron = centred(w / 2 - 0.08, d / 2 - 0.08, h - 0.12, h - top, wood)
    board = centred(w / 2, d / 2, h - top, h, wood)
    pot = ((0.3 * w, 0.0, h, 0.06, 0.14, p.accent),)
    bowl = ((-0.1 * w, 0.0, h + 0.07, 0.07, p.cushion),) if rng.random() < 0.5 else ()
    return Piece(width=w, depth=d, boxes=(board, apron, *legs), drums=pot, balls=bowl)


def coffee_table(rng: Rng, p: Palette) -> Piece:
    if rng.random() < 0.4:
        r = rng.uniform(0.3, 0.45)
        drums = ((0, 0, 0, 0.2, 0.03, p.dark), (0, 0, 0.03, 0.04, 0.38, p.dark))
        return Piece(width=2 * r, depth=2 * r, drums=(*drums, (0, 0, 0.41, r, 0.035, p.wood)))
    w, d, h = rng.uniform(0.8, 1.2), rng.uniform(0.5, 0.7), rng.uniform(0.36, 0.46)
    boards = (
        centred(w / 2, d / 2, h - 0.04, h, p.wood),
        centred(w / 2 - 0.06, d / 2 - 0.06, 0.12, 0.14, p.wood),
        box(-0.15, 0.15, -0.1, 0.12, h, h + 0.05, p.books[0]),
    )
    return Piece(width=w, depth=d, boxes=(*boards, *_legs(w / 2, d / 2, 0.06, h - 0.04, p.wood)))


def chair(_: Rng, p: Palette) -> Piece:
    seat = box(-0.21, 0.21, -0.2, 0.22, 0.43, 0.47, p.cushion)
    posts = [box(x, x + 0.035, -0.235, -0.2, 0, 0.9, p.wood) for x in (-0.21, 0.175)]
    rails = [box(-0.175, 0.175, -0.23, -0.205, z, z + 0.08, p.wood) for z in (0.6, 0.78)]
    legs = [box(x, x + 0.035, 0.18, 0.215, 0, 0.43, p.wood) for x in (-0.21, 0.175)]
    return Piece(width=0.44, depth=0.48, boxes=(seat, *posts, *rails, *legs))


def shelf(rng: Rng, p: Palette) -> Piece:
    w, d, h = rng.uniform(0.7, 1.5), rng.uniform(0.26, 0.36), rng.uniform(1.1, 2.1)
    wood = p.dark if rng.random() < 0.5 else p.lacquer
    back = box(-w / 2, w / 2, -d / 2, -d / 2 + 0.015, 0, h, wood)
    sides = [box(x, x + 0.03, -d / 2 + 0.015, d / 2, 0, h, wood) for x in (-w / 2, w / 2 - 0.03)]
    boxes, books = [back, *sides], []
    levels = np.linspace(0.06, h - 0.03, max(3, round(h / 0.38)) + 1)
    for z in levels:
        boxes.append(box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2 + 0.015, d / 2, z, z + 0.025, wood))
    room = levels[1] - levels[0] - 0.04
    for z in levels[:-1]:
        x = -w / 2 + 0.04
        while x < w / 2 - 0.14:
            thick = rng.uniform(0.03, 0.11)
            if rng.random() < 0.75:
                top = z + 0.025 + room * rng.uniform(0.55, 0.92)
                front = d / 2 - rng.uniform(0.03, 0.1)
                paint = p.books[rng.integers(len(p.books))]
                books.append(box(x, x + thick, -d / 2 + 0.02, front, z + 0.025, top, paint))
            else:
                thick += 0.12
            x += thick + 0.006
    return Piece(width=w, depth=d, boxes=tuple(boxes), details=tuple(books))


def _doors(
    w: float, z0: float, z1: float, front: float, count: int, p: Palette
) -> tuple[Block, ...]:
    """Door panels that stand out of a front, with knobs."""
    boxes, step = [], w / count
    for i in range(count):
        x0, x1 = -w / 2 + i * step + 0.008, -w / 2 + (i + 1) * step - 0.008
        boxes.append(box(x0, x1, front, front + 0.018, z0 + 0.01, z1 - 0.01, p.lacquer))
        knob = x1 - 0.06 if i % 2 == 0 else x0 + 0.04
        mid = (z0 + z1) / 2
        boxes.append(
            box(knob, knob + 0.02, front + 0.018, front + 0.04, mid - 0.06, mid + 0.06, p.dark)
        )
    return tuple(boxes)


def cupboard(rng: Rng, p: Palette) -> Piece:
    w, d, h = rng.uniform(0.9, 1.8), rng.uniform(0.45, 0.6), rng.uniform(1.7, 2.15)
    wood = p.wood if rng.random() < 0.5 else p.lacquer
    body = box(-w / 2, w / 2, -d / 2, d / 2 - 0.04, 0.08, h, wood)
    plinth = box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2, d / 2 - 0.08, 0, 0.08, p.dark)
    doors = _doors(w, 0.1, h - 0.02, d / 2 - 0.04, max(2, round(w / 0.5)), p)
    return Piece(width=w, depth=d, boxes=(body, plinth), details=doors)


def sideboard(rng: Rng, p: Palette) -> Piece:
    w, d, h = rng.uniform(1.0, 1.9), rng.uniform(0.38, 0.48), rng.uniform(0.65, 0.9)
    body = box(-w / 2, w / 2, -d / 2, d / 2 - 0.04, 0.14, h, p.wood)
    doors = _doors(w, 0.15, h - 0.02, d / 2 - 0.04, max(2, round(w / 0.5)), p)
    legs = _legs(w / 2 - 0.05, d / 2 - 0.08, 0.05, 0.14, p.dark)
    vase = ((0.3 * w, 0, h, 0.055, 0.24, p.accent), (0.3 * w, 0, h + 0.24, 0.03, 0.06, p.accent))
    balls = ((0.3 * w, 0, h + 0.42, 0.15, p.leaves),) if rng.random() < 0.6 else ()
    books = box(-0.35 * w, -0.35 * w + 0.26, -0.1, 0.1, h, h + 0.09, p.books[1])
    return Piece(
        width=w, depth=d, boxes=(body, books, *legs), details=doors, drums=vase, balls=balls
    )


def sofa(rng: Rng, p: Palette) -> Piece:
    w, d, arm = rng.uniform(1.5, 2.3), rng.uniform(0.82, 0.98), rng.uniform(0.14, 0.2)
    inner = w - 2 * arm
    boxes = [
        box(-w / 2 + 0.01, w / 2 - 0.01, -d / 2 + 0.01, d / 2 - 0.03, 0.1, 0.3, p.fabric),
        box(-w / 2, -w / 2 + arm, -d / 2, d / 2, 0.08, 0.6, p.fabric),
        box(w / 2 - arm, w / 2, -d / 2, d / 2, 0.08, 0.6, p.fabric),
        box(-inner / 2, inner / 2, -d / 2, -d / 2 + 0.2, 0.3, 0.84, p.fabric),
        *_legs(w / 2 - 0.05, d / 2 - 0.06, 0.05, 0.1, p.dark),
    ]
    count = 3 if w > 1.9 else 2
    step = inner / count
    for i in range(count):
        x0, x1 = -inner / 2 + i * step + 0.008, -inner / 2 + (i + 1) * step - 0.008
        boxes.append(box(x0, x1, -d / 2 + 0.3, d / 2 - 0.01, 0.3, 0.45, p.fabric))
        boxes.append(box(x0, x1, -d / 2 + 0.2, -d / 2 + 0.34, 0.42, 0.78, p.fabric))
    x = rng.uniform(-0.3, 0.3) * inner
    boxes.append(box(x - 0.2, x + 0.2, -d / 2 + 0.34, -d / 2 + 0.45, 0.45, 0.82, p.cushion))
    return Piece(width=w, depth=d, boxes=tuple(boxes))


def bed(rng: Rng, p: Palette) -> Piece:
    w, d = rng.uniform(1.0, 1.8), 2.05
    pillow = 0.5 * w - 0.12
    boxes = [
        box(-w / 2, w / 2, -d / 2 + 0.06, d / 2, 0.12, 0.32, p.wood),
        box(-w / 2, w / 2, -d / 2, -d / 2 + 0.06, 0, rng.uniform(0.8, 1.15), p.wood),
        box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2 + 0.07, d / 2 - 0.03, 0.32, 0.5, p.lacquer),
        box(-w / 2 + 0.015, w / 2 - 0.015, -d / 2 + 0.65, d / 2 - 0.02, 0.3, 0.54, p.fabric),
        *_legs(w / 2 - 0.02, d / 2 - 0.02, 0.07, 0.12, p.dark),
    ]
    for x in (-w / 4, w / 4):
        sides = (x - pillow / 2, x + pillow / 2, -d / 2 + 0.12, -d / 2 + 0.5)
        boxes.append(box(*sides, 0.5, 0.62, p.cushion))
    return Piece(width=w, depth=d, boxes=tuple(boxes))


def desk(rng: Rng, p: Palette) -> Piece:
    w, d, h = rng.uniform(1.2, 1.7), rng.uniform(0.6, 0.75), 0.74
    boxes = [
        centred(w / 2, d / 2, h - 0.03, h, p.wood),
        box(w / 2 - 0.45, w / 2 - 0.03, -d / 2 + 0.03, d / 2 - 0.05, 0.06, h - 0.03, p.lacquer),
        box(-w / 2 + 0.03, -w / 2 + 0.06, -d / 2 + 0.03, d / 2 - 0.03, 0, h - 0.03, p.wood),
        box(0.1, 0.42, -0.1, 0.12, h, h + 0.04, p.books[0]),
        box(0.13, 0.4, -0.08, 0.1, h + 0.04, h + 0.07, p.books[2]),
    ]
    x0, x1, y0, y1 = w / 2 - 0.44, w / 2 - 0.04, d / 2 - 0.05, d / 2 - 0.03
    drawers = tuple(box(x0, x1, y0, y1, z, z + 0.18, p.lacquer) for z in (0.1, 0.3, 0.5))
    lamp = (
        (-w / 2 + 0.2, -0.1, h, 0.08, 0.02, p.dark),
        (-w / 2 + 0.2, -0.1, h, 0.012, 0.4, p.dark),
    )
    shade = (-w / 2 + 0.2, -0.1, h + 0.3, 0.11, 0.16, p.accent)
    return Piece(width=w, depth=d, boxes=tuple(boxes), details=drawers, drums=(*lamp, shade))


def plant(rng: Rng, p: Palette) -> Piece:
    r, h = rng.uniform(0.14, 0.2), rng.uniform(0.28, 0.42)
    drums = ((0, 0, 0, r, h, p.accent), (0, 0, h, 0.02, 0.5, p.dark))
    crown = rng.uniform(0.2, 0.28)
    balls = tuple(
        (
            rng.uniform(-0.5, 0.5) * crown,
            rng.uniform(-0.5, 0.5) * crown,
            h + rng.uniform(0.2, 0.75),
            crown * rng.uniform(0.55, 0.9),
            p.leaves,
        )
        for _ in range(5)
    )
    return Piece(width=2.4 * crown, depth=2.4 * crown, drums=drums, balls=balls)


def crates(rng: Rng, p: Palette) -> Piece:
    a, b = rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.5)
    low = centred(a / 2, a / 2, 0, b, p.wood)
    high = box(-0.4 * a, 0.25 * a, -0.3 * a, 0.4 * a, b, b + rng.uniform(0.2, 0.4), p.dark)
    return Piece(width=a, depth=a, boxes=(low, high) if rng.random() < 0.6 else (low,))


def pouf(rng: Rng, p: Palette) -> Piece:
    r = rng.uniform(0.22, 0.32)
    return Piece(
        width=2 * r, depth=2 * r, drums=((0, 0, 0, r, rng.uniform(0.35, 0.45), p.cushion),)
    )


def toy_ball(rng: Rng, p: Palette) -> Piece:
    r = rng.uniform(0.12, 0.3)
    return Piece(width=2 * r, depth=2 * r, balls=((0, 0, r, r, p.accent),))


def column(rng: Rng, p: Palette, height: float) -> Piece:
    r = rng.uniform(0.14, 0.22)
    base = centred(r + 0.05, r + 0.05, 0, 0.12, p.lacquer)
    capital = centred(r + 0.05, r + 0.05, height - 0.1, height, p.lacquer)
    shaft = (0.0, 0.0, 0.12, r, height - 0.22, p.lacquer)
    return Piece(width=2 * r + 0.1, depth=2 * r + 0.1, boxes=(base, capital), drums=(shaft,))
