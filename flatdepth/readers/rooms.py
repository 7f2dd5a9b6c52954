"""Generated rooms with exact depth, and generated pictures to hang in them: nothing to download.

Rooms are boxes with textured walls, furniture, area lights and windows onto an outdoors that is
really there (its depth is the ground's and the houses', +inf for the sky). Nothing flat on a wall
ever shows depth: what looks like a picture of another place is only ever pasted by training.

A room is a function of ``(seed, scene)``, a frame of ``(seed, scene, frame)`` and a picture of
``(seed, picture)``: any subset, in any order and in any process, has the same pixels. (On another
kind of processor numpy may round the last bit of a logarithm differently, and Pillow's JPEG may
differ between versions.)
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from flatdepth.errors import UserError
from flatdepth.readers.base import Item, Listing
from flatdepth.readers.raycast import (
    TEXTURE_SIZE,
    Ball,
    Block,
    Body,
    Camera,
    Coat,
    Drum,
    Emitter,
    OpenLight,
    Paint,
    Quad,
    Scene,
    Sky,
    Sun,
    Surface,
    cast,
    decode_srgb,
    depth_of,
    develop,
    shade,
)
from flatdepth.shards.codec import encode_log_u16
from flatdepth.types import Frame, RawFrame

Vec = NDArray[np.floating]
Rng = np.random.Generator

CLEARANCE_M = 0.45
"""Cameras keep this far from everything, which at 75 degrees leaves 0.3 m of planar depth."""

_ROOM, _FRAME, _EXPOSURE, _PICTURE, _NOISE = range(1, 6)  # the kinds of random streams


def _rng(kind: int, seed: int, first: int, second: int = 0) -> Rng:
    """An independent stream; always four integers, since trailing zeros do not count as entropy."""
    return np.random.default_rng(np.random.SeedSequence([kind, seed, first, second]))


# Textures: functions of a generator that return (T, T, 3) linear albedo and tile seamlessly.

_SIDE = TEXTURE_SIZE


@cache
def _noise_bank(slope: float, stretch: float) -> tuple[Vec, ...]:
    """Four tileable noise fields of unit variance with amplitude spectrum frequency^-slope."""
    rng = _rng(_NOISE, 0, int(slope * 16), int(stretch * 16))
    rows = np.fft.fftfreq(_SIDE)[:, None] * _SIDE * stretch
    columns = np.fft.rfftfreq(_SIDE)[None] * _SIDE
    radius = np.hypot(rows, columns)
    gain = np.where(radius > 0, np.maximum(radius, 1) ** -slope, 0)
    fields = []
    for _ in range(4):
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE))) * gain)
        fields.append((field / field.std()).astype(np.float32))
    return tuple(fields)


def _noise(rng: Rng, slope: float = 1.0, stretch: float = 1.0) -> Vec:
    """One of the bank's fields, rolled: cheap, and different in every place it is used."""
    field = _noise_bank(slope, stretch)[rng.integers(4)]
    return np.roll(field, rng.integers(_SIDE, size=2), axis=(0, 1))


def _colour(hexa: str) -> Vec:
    """Linear albedo of an sRGB colour such as "d8cfc0"."""
    return decode_srgb(np.frombuffer(bytes.fromhex(hexa), dtype=np.uint8) / 255.0)


def _pick(rng: Rng, colours: str) -> Vec:
    """One of several space-separated colours, varied a little."""
    options = colours.split()
    return np.clip(_colour(options[rng.integers(len(options))]) * rng.uniform(0.9, 1.1, 3), 0, 0.92)


def _tint(base: Vec, factor: Vec) -> Vec:
    """An albedo image from one colour and a brightness field."""
    return np.clip(base.astype(np.float32) * factor.astype(np.float32)[..., None], 0.01, 0.95)


def _plain(rng: Rng, base: Vec) -> Vec:
    """Paint or lacquer: faint unevenness."""
    return _tint(base, 1 + 0.025 * _noise(rng, 1.5) + 0.02 * _noise(rng, 0.3))


def _plaster(rng: Rng, base: Vec) -> Vec:
    """Rough plaster: grain lit from the side."""
    grain = _noise(rng, 0.7)
    relief = grain - np.roll(grain, (1, 1), axis=(0, 1))
    return _tint(base, 1 + 0.05 * relief + 0.035 * _noise(rng, 1.6))


def _stripes(rng: Rng, base: Vec) -> Vec:
    """Striped wallpaper."""
    count = int(rng.choice([4, 8, 16]))
    phase = np.arange(_SIDE) * count / _SIDE % 1
    band = (phase < rng.uniform(0.3, 0.6)) * rng.uniform(0.08, 0.22)
    return _tint(base, 1 - band[None, :] + 0.02 * _noise(rng, 0.5))


def _damask(rng: Rng, base: Vec) -> Vec:
    """Wallpaper with a repeated ornament."""
    count = int(rng.choice([4, 8]))
    y, x = np.mgrid[:_SIDE, :_SIDE] * (2 * math.pi * count / _SIDE)
    shift = np.where(np.sin(y / 2) > 0, 0, math.pi)
    ornament = np.cos(x + shift) * np.cos(y) + 0.5 * np.cos(2 * (x + shift)) - 0.4 * np.cos(3 * y)
    return _tint(base, 1 - 0.14 * (ornament > rng.uniform(0.2, 0.6)) + 0.02 * _noise(rng, 0.5))


def _bricks(rng: Rng, base: Vec) -> Vec:
    """Running bond, 8 by 24 per tile."""
    rows, columns = 24, 8
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    row = np.floor(y * rows)
    along = x * columns + 0.5 * (row % 2)
    shade = rng.uniform(0.75, 1.15, (rows, columns))[row.astype(int), along.astype(int) % columns]
    joint = (y * rows % 1 < 0.15) | (along % 1 < 0.05)
    factor = np.where(joint, rng.uniform(1.1, 1.5), shade)
    return _tint(base, factor * (1 + 0.08 * _noise(rng, 0.5)))


def _tiles(rng: Rng, base: Vec) -> Vec:
    """Square tiles with joints, sometimes in two colours."""
    count = int(rng.choice([4, 6, 8]))
    y, x = np.mgrid[:_SIDE, :_SIDE] * (count / _SIDE)
    row, column = y.astype(int), x.astype(int)
    factor = rng.uniform(0.92, 1.06, (count, count))[row, column]
    if rng.random() < 0.45:
        factor = factor * np.where((row + column) % 2, 1.0, rng.uniform(0.3, 0.75))
    joint = 0.03 * count / 6
    seam = (x % 1 < joint) | (y % 1 < joint)
    return _tint(base, np.where(seam, rng.uniform(0.45, 0.7), factor + 0.04 * _noise(rng, 1.4)))


def _planks(rng: Rng, base: Vec) -> Vec:
    """Floor boards along s, with staggered ends and grain."""
    rows = int(rng.choice([8, 12, 16]))
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    row = (y * rows).astype(int)
    along = x + rng.random(rows)[row]
    board = (along * 2).astype(int) % 2
    factor = rng.uniform(0.7, 1.12, (rows, 2))[row, board]
    gap = (y * rows % 1 < 0.04 * rows / 8) | (along * 2 % 1 < 0.012)
    grain = 0.09 * _noise(rng, 0.8, 8.0)
    return _tint(base, np.where(gap, 0.4, factor * (1 + grain)))


def _herringbone(rng: Rng, base: Vec) -> Vec:
    """Parquet of blocks laid at right angles in a basket weave."""
    count = 8
    y, x = np.mgrid[:_SIDE, :_SIDE] * (count / _SIDE)
    turned = (x.astype(int) + y.astype(int)) % 2 == 1
    across = np.where(turned, y, x) * 4
    slat = across.astype(int) % (4 * count)
    tint = rng.uniform(0.75, 1.1, (count, count, 4 * count))
    factor = tint[y.astype(int), x.astype(int), slat]
    gap = (across % 1 < 0.1) | (x % 1 < 0.04) | (y % 1 < 0.04)
    return _tint(base, np.where(gap, 0.55, factor) * (1 + 0.05 * _noise(rng, 0.6)))


def _carpet(rng: Rng, base: Vec) -> Vec:
    """Pile: strong fine grain and slow blotches."""
    return _tint(base, 1 + 0.16 * _noise(rng, 0.0) + 0.06 * _noise(rng, 1.5))


def _rug(rng: Rng, base: Vec) -> Vec:
    """Woven bands in two more colours."""
    second, third = _pick(rng, _FABRICS), _pick(rng, _FABRICS)
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    wave = np.sin(2 * math.pi * 8 * y) + 0.8 * np.sign(np.sin(2 * math.pi * 16 * x))
    image = np.where((wave > 0.9)[..., None], second, base)
    image = np.where((wave < -0.9)[..., None], third, image)
    return np.clip(image * (1 + 0.12 * _noise(rng, 0.1))[..., None], 0.01, 0.95)


def _wood(rng: Rng, base: Vec) -> Vec:
    """Veneer with grain along s."""
    grain = _noise(rng, 0.9, 8.0)
    rings = np.sin(4 * _noise(rng, 1.6, 4.0))
    return _tint(base, 1 + 0.1 * grain + 0.06 * rings)


def _fabric(rng: Rng, base: Vec) -> Vec:
    """A plain weave."""
    y, x = np.mgrid[:_SIDE, :_SIDE] * (2 * math.pi * 64 / _SIDE)
    return _tint(base, 1 + 0.07 * np.sin(x) * np.sin(y) + 0.07 * _noise(rng, 0.3))


def _leaves(rng: Rng, base: Vec) -> Vec:
    """Foliage: light and shade in clumps."""
    clumps = np.tanh(1.5 * _noise(rng, 0.9))
    return _tint(base, 0.95 + 0.5 * clumps + 0.15 * _noise(rng, 0.2))


def _facade(rng: Rng, base: Vec) -> Vec:
    """Rendered outside wall with courses."""
    course = np.arange(_SIDE)[:, None] * 16 / _SIDE % 1 < 0.08
    return _tint(base, (1 - 0.18 * course) * (1 + 0.06 * _noise(rng, 1.0)))


_WALLS = (
    "d9d2c3 cfd6d2 e2dcd0 b9c4c9 d8c3a5 c9d1b8 e3d3cb a9b7a0 c4b6c9 9fb0bd d9b99b e6e2da 8d9fa8"
)
_BRICKS = "9c5a45 8a4b3a b07a5c a89a8c c9bfb3"
_WOODS = "8a5a34 a9713f 6b4226 c39a6b d2b183 4a3021 b5834f 9a7b5b"
_STONES = "b8b2a6 8f8d88 cfc8ba a39a8c 77797a d8d3c8 9b8f80"
_CARPETS = "7d8288 8b7f70 5f6b75 a39a8a 7a5a55 56615a b3a795"
_FABRICS = "7b8fa1 a8574a 4f6d7a c7a256 6f8060 b9b1a3 3e4a5c 9c6b84 d1cabd 5a4a42 b5643c 44695c"
_LACQUERS = "e8e6e1 f0eee9 d9dcdc 3f444a b7c2c4 6d8a96 c65b45 d9a441 87a08b e2d9c6"
_GREENS = "4d6b32 5d7a3a 3f5a30 6f7f3d 7b8a48"
_FACADES = "d8c7a8 c98f6b b9b0a2 e0d8c8 a8b0b3 cfae88 b56a50"
_BOOKS = "8c3b32 2f4b66 c9a24b 3f5b45 d8cdb8 5b3b52 2d2f36 b56a3d 6f8fa5"


Texture = Callable[[Rng, Vec], Vec]
_Box = tuple[Vec, Vec, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Furniture in its own frame: x to the side, y to the front, z up, its footprint centred.

    Attributes:
        width, depth: of the footprint along x and y.
        boxes: (lowest corner, highest corner, paint).
        details: boxes on or in other boxes; their own shadow would not be noticed.
        drums: (x, y, z of the base, radius, height, paint).
        balls: (x, y, z of the centre, radius, paint).
    """

    width: float
    depth: float
    boxes: tuple[_Box, ...] = ()
    details: tuple[_Box, ...] = ()
    drums: tuple[tuple[float, float, float, float, float, int], ...] = ()
    balls: tuple[tuple[float, float, float, float, int], ...] = ()


def _box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, paint: int) -> _Box:
    low, high = np.array([[x0, y0, z0], [x1, y1, z1]], dtype=np.float64)
    return low, high, paint


_EAST, _NORTH, _UP = np.eye(3)
_INDOORS = Coat()


class _Builder:
    """Collects the parts of a scene."""

    def __init__(self) -> None:
        self.surfaces: list[Surface] = []
        self.bodies: list[Body] = []
        self.paints: list[Paint] = []
        self.emitters: list[Emitter] = []

    def paint(self, rng: Rng, texture: Texture, colours: str, period_m: float) -> int:
        image = texture(rng, _pick(rng, colours))
        self.paints.append(Paint.from_texture(image, period_m))
        return len(self.paints) - 1

    def place(
        self,
        piece: _Piece,
        x: float,
        y: float,
        yaw: float,
        *,
        z: float = 0.0,
        coat: Coat = _INDOORS,
        solid: bool = True,
    ) -> None:
        """Put a piece into the world, in its own paints.

        Args:
            x, y, z, yaw: where its frame goes, metres and radians.
            coat: everything but the paint of its surfaces.
            solid: stop light and keep cameras away.
        """
        origin = np.array([x, y, z])
        c, s = math.cos(yaw), math.sin(yaw)
        turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        lift = np.array([0.0, 0.0, z])
        blocks = []
        for low, high, paint in (*piece.boxes, *piece.details):
            self.surfaces += _faces(low, high, origin, turn, replace(coat, paint=paint))
        for low, high, paint in piece.boxes:
            blocks.append(Block(low=low + lift, high=high + lift, paint=paint))
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
        self.surfaces.append(
            Quad(
                corner=np.array([x[0], y[0], z]),
                a=_EAST,
                b=_NORTH,
                size=(x[1] - x[0], y[1] - y[0]),
                coat=coat,
            )
        )

    def scene(self, sky: Sky, sun: Sun | None, shell_m: Vec | None = None) -> Scene:
        return Scene(
            surfaces=tuple(self.surfaces),
            bodies=tuple(self.bodies),
            paints=tuple(self.paints),
            emitters=tuple(self.emitters),
            sky=sky,
            sun=sun,
            shell_m=shell_m,
        )


def _glow(radiance: Vec) -> OpenLight:
    """The light of a lamp's surface."""
    return OpenLight(ambient=radiance, sun=np.zeros(3), direction=_UP)


def _drum(base: Vec, radius: float, height: float, coat: Coat) -> list[Surface]:
    """An upright cylinder with its top."""
    top = Quad(
        corner=base + np.array([-radius, -radius, height]),
        a=_EAST,
        b=_NORTH,
        size=(2 * radius, 2 * radius),
        disc=True,
        coat=coat,
    )
    return [Drum(base=base, radius=radius, height=height, coat=coat), top]


def _core(x: float, y: float, z0: float, z1: float, half: float, paint: int) -> Block:
    """The box inside a drum or ball that stops light for it, clear of its surface."""
    low, high, _ = _box(x - half, x + half, y - half, y + half, z0, z1, paint)
    return Block(low=low, high=high, paint=paint)


def _faces(low: Vec, high: Vec, origin: Vec, turn: Vec, coat: Coat) -> list[Quad]:
    """The six faces of a box, seen from outside; the lower one only where it can be seen."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    dx, dy, dz = high - low
    faces = [
        ((x1, y1, z0), -_EAST, _UP, (dx, dz)),
        ((x0, y0, z0), _EAST, _UP, (dx, dz)),
        ((x1, y0, z0), _NORTH, _UP, (dy, dz)),
        ((x0, y1, z0), -_NORTH, _UP, (dy, dz)),
        ((x0, y0, z1), _EAST, _NORTH, (dx, dy)),
    ]
    if origin[2] + z0 > 0.9:
        faces.append(((x0, y0, z0), _NORTH, _EAST, (dy, dx)))
    return [
        Quad(
            corner=origin + turn @ np.array(corner),
            a=turn @ a,
            b=turn @ b,
            size=(float(size[0]), float(size[1])),
            coat=coat,
        )
        for corner, a, b, size in faces
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Palette:
    """The paints of one room's furniture."""

    wood: int
    dark: int
    lacquer: int
    accent: int
    fabric: int
    cushion: int
    leaves: int
    books: tuple[int, ...]


def _palette(rng: Rng, build: _Builder) -> _Palette:
    return _Palette(
        wood=build.paint(rng, _wood, _WOODS, 1.0),
        dark=build.paint(rng, _wood, _WOODS, 1.3),
        lacquer=build.paint(rng, _plain, _LACQUERS, 1.5),
        accent=build.paint(rng, _plain, _FABRICS, 1.5),
        fabric=build.paint(rng, _fabric, _FABRICS, 0.6),
        cushion=build.paint(rng, _fabric, _FABRICS, 0.5),
        leaves=build.paint(rng, _leaves, _GREENS, 0.5),
        books=tuple(build.paint(rng, _plain, _BOOKS, 1.0) for _ in range(3)),
    )


def _legs(x: float, y: float, thick: float, top: float, paint: int) -> tuple[_Box, ...]:
    """Four legs whose outer corners are at (+-x, +-y)."""
    spans = ((-x, -x + thick), (x - thick, x))
    deep = ((-y, -y + thick), (y - thick, y))
    return tuple(_box(*sx, *sy, 0, top, paint) for sx in spans for sy in deep)


def _table(rng: Rng, p: _Palette) -> _Piece:
    w, d, h = rng.uniform(1.1, 1.9), rng.uniform(0.7, 0.95), rng.uniform(0.7, 0.77)
    top = rng.uniform(0.03, 0.05)
    wood = p.wood if rng.random() < 0.6 else p.lacquer
    legs = _legs(w / 2 - 0.05, d / 2 - 0.05, rng.uniform(0.045, 0.08), h - top, wood)
    apron = _box(-w / 2 + 0.08, w / 2 - 0.08, -d / 2 + 0.08, d / 2 - 0.08, h - 0.12, h - top, wood)
    board = _box(-w / 2, w / 2, -d / 2, d / 2, h - top, h, wood)
    pot = ((0.3 * w, 0.0, h, 0.06, 0.14, p.accent),)
    bowl = ((-0.1 * w, 0.0, h + 0.07, 0.07, p.cushion),) if rng.random() < 0.5 else ()
    return _Piece(width=w, depth=d, boxes=(board, apron, *legs), drums=pot, balls=bowl)


def _coffee_table(rng: Rng, p: _Palette) -> _Piece:
    if rng.random() < 0.4:
        r = rng.uniform(0.3, 0.45)
        drums = ((0, 0, 0, 0.2, 0.03, p.dark), (0, 0, 0.03, 0.04, 0.38, p.dark))
        return _Piece(width=2 * r, depth=2 * r, drums=(*drums, (0, 0, 0.41, r, 0.035, p.wood)))
    w, d, h = rng.uniform(0.8, 1.2), rng.uniform(0.5, 0.7), rng.uniform(0.36, 0.46)
    boards = (
        _box(-w / 2, w / 2, -d / 2, d / 2, h - 0.04, h, p.wood),
        _box(-w / 2 + 0.06, w / 2 - 0.06, -d / 2 + 0.06, d / 2 - 0.06, 0.12, 0.14, p.wood),
        _box(-0.15, 0.15, -0.1, 0.12, h, h + 0.05, p.books[0]),
    )
    return _Piece(width=w, depth=d, boxes=(*boards, *_legs(w / 2, d / 2, 0.06, h - 0.04, p.wood)))


def _chair(_: Rng, p: _Palette) -> _Piece:
    seat = _box(-0.21, 0.21, -0.2, 0.22, 0.43, 0.47, p.cushion)
    posts = [_box(x, x + 0.035, -0.235, -0.2, 0, 0.9, p.wood) for x in (-0.21, 0.175)]
    rails = [_box(-0.175, 0.175, -0.23, -0.205, z, z + 0.08, p.wood) for z in (0.6, 0.78)]
    legs = [_box(x, x + 0.035, 0.18, 0.215, 0, 0.43, p.wood) for x in (-0.21, 0.175)]
    return _Piece(width=0.44, depth=0.48, boxes=(seat, *posts, *rails, *legs))


def _shelf(rng: Rng, p: _Palette) -> _Piece:
    w, d, h = rng.uniform(0.7, 1.5), rng.uniform(0.26, 0.36), rng.uniform(1.1, 2.1)
    wood = p.dark if rng.random() < 0.5 else p.lacquer
    back = _box(-w / 2, w / 2, -d / 2, -d / 2 + 0.015, 0, h, wood)
    sides = [_box(x, x + 0.03, -d / 2 + 0.015, d / 2, 0, h, wood) for x in (-w / 2, w / 2 - 0.03)]
    boxes, books = [back, *sides], []
    levels = np.linspace(0.06, h - 0.03, max(3, round(h / 0.38)) + 1)
    for z in levels:
        boxes.append(_box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2 + 0.015, d / 2, z, z + 0.025, wood))
    room = levels[1] - levels[0] - 0.04
    for z in levels[:-1]:
        x = -w / 2 + 0.04
        while x < w / 2 - 0.14:
            thick = rng.uniform(0.03, 0.11)
            if rng.random() < 0.75:
                top = z + 0.025 + room * rng.uniform(0.55, 0.92)
                front = d / 2 - rng.uniform(0.03, 0.1)
                paint = p.books[rng.integers(len(p.books))]
                books.append(_box(x, x + thick, -d / 2 + 0.02, front, z + 0.025, top, paint))
            else:
                thick += 0.12
            x += thick + 0.006
    return _Piece(width=w, depth=d, boxes=tuple(boxes), details=tuple(books))


def _doors(
    w: float, z0: float, z1: float, front: float, count: int, p: _Palette
) -> tuple[_Box, ...]:
    """Door panels that stand out of a front, with knobs."""
    boxes, step = [], w / count
    for i in range(count):
        x0, x1 = -w / 2 + i * step + 0.008, -w / 2 + (i + 1) * step - 0.008
        boxes.append(_box(x0, x1, front, front + 0.018, z0 + 0.01, z1 - 0.01, p.lacquer))
        knob = x1 - 0.06 if i % 2 == 0 else x0 + 0.04
        mid = (z0 + z1) / 2
        boxes.append(
            _box(knob, knob + 0.02, front + 0.018, front + 0.04, mid - 0.06, mid + 0.06, p.dark)
        )
    return tuple(boxes)


def _cupboard(rng: Rng, p: _Palette) -> _Piece:
    w, d, h = rng.uniform(0.9, 1.8), rng.uniform(0.45, 0.6), rng.uniform(1.7, 2.15)
    wood = p.wood if rng.random() < 0.5 else p.lacquer
    body = _box(-w / 2, w / 2, -d / 2, d / 2 - 0.04, 0.08, h, wood)
    plinth = _box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2, d / 2 - 0.08, 0, 0.08, p.dark)
    doors = _doors(w, 0.1, h - 0.02, d / 2 - 0.04, max(2, round(w / 0.5)), p)
    return _Piece(width=w, depth=d, boxes=(body, plinth), details=doors)


def _sideboard(rng: Rng, p: _Palette) -> _Piece:
    w, d, h = rng.uniform(1.0, 1.9), rng.uniform(0.38, 0.48), rng.uniform(0.65, 0.9)
    body = _box(-w / 2, w / 2, -d / 2, d / 2 - 0.04, 0.14, h, p.wood)
    doors = _doors(w, 0.15, h - 0.02, d / 2 - 0.04, max(2, round(w / 0.5)), p)
    legs = _legs(w / 2 - 0.05, d / 2 - 0.08, 0.05, 0.14, p.dark)
    vase = ((0.3 * w, 0, h, 0.055, 0.24, p.accent), (0.3 * w, 0, h + 0.24, 0.03, 0.06, p.accent))
    balls = ((0.3 * w, 0, h + 0.42, 0.15, p.leaves),) if rng.random() < 0.6 else ()
    books = _box(-0.35 * w, -0.35 * w + 0.26, -0.1, 0.1, h, h + 0.09, p.books[1])
    return _Piece(
        width=w, depth=d, boxes=(body, books, *legs), details=doors, drums=vase, balls=balls
    )


def _sofa(rng: Rng, p: _Palette) -> _Piece:
    w, d, arm = rng.uniform(1.5, 2.3), rng.uniform(0.82, 0.98), rng.uniform(0.14, 0.2)
    inner = w - 2 * arm
    boxes = [
        _box(-w / 2 + 0.01, w / 2 - 0.01, -d / 2 + 0.01, d / 2 - 0.03, 0.1, 0.3, p.fabric),
        _box(-w / 2, -w / 2 + arm, -d / 2, d / 2, 0.08, 0.6, p.fabric),
        _box(w / 2 - arm, w / 2, -d / 2, d / 2, 0.08, 0.6, p.fabric),
        _box(-inner / 2, inner / 2, -d / 2, -d / 2 + 0.2, 0.3, 0.84, p.fabric),
        *_legs(w / 2 - 0.05, d / 2 - 0.06, 0.05, 0.1, p.dark),
    ]
    count = 3 if w > 1.9 else 2
    step = inner / count
    for i in range(count):
        x0, x1 = -inner / 2 + i * step + 0.008, -inner / 2 + (i + 1) * step - 0.008
        boxes.append(_box(x0, x1, -d / 2 + 0.3, d / 2 - 0.01, 0.3, 0.45, p.fabric))
        boxes.append(_box(x0, x1, -d / 2 + 0.2, -d / 2 + 0.34, 0.42, 0.78, p.fabric))
    x = rng.uniform(-0.3, 0.3) * inner
    boxes.append(_box(x - 0.2, x + 0.2, -d / 2 + 0.34, -d / 2 + 0.45, 0.45, 0.82, p.cushion))
    return _Piece(width=w, depth=d, boxes=tuple(boxes))


def _bed(rng: Rng, p: _Palette) -> _Piece:
    w, d = rng.uniform(1.0, 1.8), 2.05
    pillow = 0.5 * w - 0.12
    boxes = [
        _box(-w / 2, w / 2, -d / 2 + 0.06, d / 2, 0.12, 0.32, p.wood),
        _box(-w / 2, w / 2, -d / 2, -d / 2 + 0.06, 0, rng.uniform(0.8, 1.15), p.wood),
        _box(-w / 2 + 0.03, w / 2 - 0.03, -d / 2 + 0.07, d / 2 - 0.03, 0.32, 0.5, p.lacquer),
        _box(-w / 2 + 0.015, w / 2 - 0.015, -d / 2 + 0.65, d / 2 - 0.02, 0.3, 0.54, p.fabric),
        *_legs(w / 2 - 0.02, d / 2 - 0.02, 0.07, 0.12, p.dark),
    ]
    for x in (-w / 4, w / 4):
        sides = (x - pillow / 2, x + pillow / 2, -d / 2 + 0.12, -d / 2 + 0.5)
        boxes.append(_box(*sides, 0.5, 0.62, p.cushion))
    return _Piece(width=w, depth=d, boxes=tuple(boxes))


def _desk(rng: Rng, p: _Palette) -> _Piece:
    w, d, h = rng.uniform(1.2, 1.7), rng.uniform(0.6, 0.75), 0.74
    boxes = [
        _box(-w / 2, w / 2, -d / 2, d / 2, h - 0.03, h, p.wood),
        _box(w / 2 - 0.45, w / 2 - 0.03, -d / 2 + 0.03, d / 2 - 0.05, 0.06, h - 0.03, p.lacquer),
        _box(-w / 2 + 0.03, -w / 2 + 0.06, -d / 2 + 0.03, d / 2 - 0.03, 0, h - 0.03, p.wood),
        _box(0.1, 0.42, -0.1, 0.12, h, h + 0.04, p.books[0]),
        _box(0.13, 0.4, -0.08, 0.1, h + 0.04, h + 0.07, p.books[2]),
    ]
    x0, x1, y0, y1 = w / 2 - 0.44, w / 2 - 0.04, d / 2 - 0.05, d / 2 - 0.03
    drawers = tuple(_box(x0, x1, y0, y1, z, z + 0.18, p.lacquer) for z in (0.1, 0.3, 0.5))
    lamp = (
        (-w / 2 + 0.2, -0.1, h, 0.08, 0.02, p.dark),
        (-w / 2 + 0.2, -0.1, h, 0.012, 0.4, p.dark),
    )
    shade = (-w / 2 + 0.2, -0.1, h + 0.3, 0.11, 0.16, p.accent)
    return _Piece(width=w, depth=d, boxes=tuple(boxes), details=drawers, drums=(*lamp, shade))


def _plant(rng: Rng, p: _Palette) -> _Piece:
    r, h = rng.uniform(0.14, 0.2), rng.uniform(0.28, 0.42)
    drums = ((0, 0, 0, r, h, p.accent), (0, 0, h, 0.02, 0.5, p.dark))
    crown = rng.uniform(0.2, 0.28)
    balls = tuple(
        (
            float(rng.uniform(-0.5, 0.5) * crown),
            float(rng.uniform(-0.5, 0.5) * crown),
            float(h + rng.uniform(0.2, 0.75)),
            float(crown * rng.uniform(0.55, 0.9)),
            p.leaves,
        )
        for _ in range(5)
    )
    return _Piece(width=2.4 * crown, depth=2.4 * crown, drums=drums, balls=balls)


def _crates(rng: Rng, p: _Palette) -> _Piece:
    a, b = rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.5)
    low = _box(-a / 2, a / 2, -a / 2, a / 2, 0, b, p.wood)
    high = _box(-0.4 * a, 0.25 * a, -0.3 * a, 0.4 * a, b, b + rng.uniform(0.2, 0.4), p.dark)
    return _Piece(width=a, depth=a, boxes=(low, high) if rng.random() < 0.6 else (low,))


def _pouf(rng: Rng, p: _Palette) -> _Piece:
    r = rng.uniform(0.22, 0.32)
    return _Piece(
        width=2 * r, depth=2 * r, drums=((0, 0, 0, r, rng.uniform(0.35, 0.45), p.cushion),)
    )


def _toy_ball(rng: Rng, p: _Palette) -> _Piece:
    r = rng.uniform(0.12, 0.3)
    return _Piece(width=2 * r, depth=2 * r, balls=((0, 0, r, r, p.accent),))


def _column(rng: Rng, p: _Palette, height: float) -> _Piece:
    r = rng.uniform(0.14, 0.22)
    base = _box(-r - 0.05, r + 0.05, -r - 0.05, r + 0.05, 0, 0.12, p.lacquer)
    capital = _box(-r - 0.05, r + 0.05, -r - 0.05, r + 0.05, height - 0.1, height, p.lacquer)
    shaft = (0.0, 0.0, 0.12, r, height - 0.22, p.lacquer)
    return _Piece(width=2 * r + 0.1, depth=2 * r + 0.1, boxes=(base, capital), drums=(shaft,))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """An opening in a wall, in the wall's coordinates: sill and lintel heights, left and right."""

    wall: int
    hole: tuple[float, float, float, float]
    thickness: float


class _Floor:
    """Keeps track of where furniture stands."""

    def __init__(self, width: float, depth: float) -> None:
        self.width, self.depth = width, depth
        self.taken: list[tuple[float, float, float, float]] = []

    def claim(self, x: float, y: float, yaw: float, piece: _Piece, gap: float) -> bool:
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
_TALL = (_shelf, _cupboard)
_LOW = (_sideboard, _sofa, _bed, _desk, _crates, _plant, _sideboard, _sofa)
_FREE = (_coffee_table, _pouf, _plant, _crates, _toy_ball)


def _furnish(rng: Rng, build: _Builder, size: Vec, windows: list[_Window]) -> None:
    width, depth, height = size
    palette = _palette(rng, build)
    floor = _Floor(width, depth)
    area = width * depth
    if rng.random() < 0.6:
        _dining(rng, build, floor, palette)
    if area > 25 and rng.random() < 0.35:
        _colonnade(rng, build, floor, palette, height)
    # Tall furniture is rare: pictures are to be hung on the walls.
    tall = [_TALL[rng.integers(len(_TALL))] for _ in range(rng.integers(0, 3))]
    low = [_LOW[rng.integers(len(_LOW))] for _ in range(int(np.clip(area / 9, 2, 5)))]
    dark = {window.wall for window in windows}
    for make in (*tall, *low):
        piece = make(rng, palette)
        walls = [k for k in range(4) if not (make in _TALL and k in dark)]
        for _ in range(8):
            wall = walls[rng.integers(len(walls))]
            length = depth if wall < 2 else width
            along = rng.uniform(0.1, 0.9) * length
            out = piece.depth / 2 + rng.uniform(0.025, 0.08)
            x, y = ((out, along), (width - out, along), (along, out), (along, depth - out))[wall]
            if floor.claim(x, y, _WALL_YAW[wall], piece, 0.05):
                build.place(piece, x, y, _WALL_YAW[wall])
                break
    for _ in range(int(np.clip(area / 12, 1, 4))):
        piece = _FREE[rng.integers(len(_FREE))](rng, palette)
        for _ in range(8):
            x, y = rng.uniform(0.5, width - 0.5), rng.uniform(0.5, depth - 0.5)
            yaw = rng.uniform(0, 2 * math.pi)
            if floor.claim(x, y, yaw, piece, 0.25):
                build.place(piece, x, y, yaw)
                break
    if rng.random() < 0.5:
        _lay_rug(rng, build, width, depth)


def _dining(rng: Rng, build: _Builder, floor: _Floor, palette: _Palette) -> None:
    """A table with chairs around it, well inside the room."""
    table, chair = _table(rng, palette), _chair(rng, palette)
    around = _Piece(width=table.width + 0.2, depth=table.depth + 1.0)
    yaw = float(rng.choice([0, math.pi / 2])) + rng.uniform(-0.15, 0.15)
    for _ in range(8):
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


def _colonnade(rng: Rng, build: _Builder, floor: _Floor, palette: _Palette, height: float) -> None:
    """A row of columns along the room."""
    column = _column(rng, palette, height)
    x = rng.choice([0.25, 0.75]) * floor.width
    for y in np.arange(1.2, floor.depth - 0.8, rng.uniform(2.2, 3.2)):
        if floor.claim(float(x), float(y), 0.0, column, 0.1):
            build.place(column, float(x), float(y), 0.0)


def _lay_rug(rng: Rng, build: _Builder, width: float, depth: float) -> None:
    paint = build.paint(rng, _rug, _FABRICS, rng.uniform(0.8, 1.6))
    w, d = rng.uniform(0.35, 0.6) * width, rng.uniform(0.3, 0.5) * depth
    rug = _Piece(width=w, depth=d, boxes=(_box(-w / 2, w / 2, -d / 2, d / 2, 0, 0.012, paint),))
    x, y = rng.uniform(0.4, 0.6) * width, rng.uniform(0.4, 0.6) * depth
    build.place(rug, x, y, 0.0, solid=False, coat=Coat(spacing_m=0.2))


_WALL_TEXTURES: tuple[tuple[Texture, str, float], ...] = (
    (_plain, _WALLS, 2.0),
    (_plaster, _WALLS, 1.6),
    (_stripes, _WALLS, 1.6),
    (_damask, _WALLS, 1.8),
    (_bricks, _BRICKS, 1.9),
    (_tiles, _WALLS, 1.8),
    (_wood, _WOODS, 1.5),
)
_WALL_SHARES = (0.27, 0.27, 0.13, 0.12, 0.11, 0.05, 0.05)
_FLOOR_TEXTURES: tuple[tuple[Texture, str, float], ...] = (
    (_planks, _WOODS, 2.0),
    (_tiles, _STONES, 2.4),
    (_carpet, _CARPETS, 1.2),
    (_herringbone, _WOODS, 2.0),
)
_FLOOR_SHARES = (0.4, 0.3, 0.14, 0.16)


def _textured(
    rng: Rng, build: _Builder, options: tuple[tuple[Texture, str, float], ...], shares: tuple
) -> int:
    texture, colours, period_m = options[rng.choice(len(options), p=shares)]
    return build.paint(rng, texture, colours, period_m)


def _shell(rng: Rng, build: _Builder, size: Vec, windows: list[_Window]) -> None:
    """The inner faces of the room, in the order that ``Scene`` asks for."""
    width, depth, height = size
    walls = [_textured(rng, build, _WALL_TEXTURES, _WALL_SHARES)] * 4
    if rng.random() < 0.4:
        walls[rng.integers(4)] = _textured(rng, build, _WALL_TEXTURES, _WALL_SHARES)
    floor = _textured(rng, build, _FLOOR_TEXTURES, _FLOOR_SHARES)
    ceiling = build.paint(rng, _plain, "f0eee9 e8e6e0 f2f0ea", 2.0)
    faces = [
        ((0, 0, 0), _NORTH, _UP, (depth, height)),
        ((width, depth, 0), -_NORTH, _UP, (depth, height)),
        ((width, 0, 0), -_EAST, _UP, (width, height)),
        ((0, depth, 0), _EAST, _UP, (width, height)),
        ((0, 0, 0), _EAST, _NORTH, (width, depth)),
        ((0, 0, height), _NORTH, _EAST, (depth, width)),
    ]
    paints, spacings = [*walls, floor, ceiling], [0.22] * 4 + [0.15, 0.45]
    for index, (corner, a, b, extent) in enumerate(faces):
        build.surfaces.append(
            Quad(
                corner=np.array(corner, dtype=np.float64),
                a=a,
                b=b,
                size=(float(extent[0]), float(extent[1])),
                holes=tuple(window.hole for window in windows if window.wall == index),
                coat=Coat(paint=paints[index], spacing_m=spacings[index]),
            )
        )


def _plan_windows(rng: Rng, size: Vec) -> list[_Window]:
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
            windows.append(_Window(wall=wall, hole=hole, thickness=thickness))
    return windows


def _open_window(build: _Builder, window: _Window, frame: int, sky: Sky) -> None:
    """The reveal, the frame's bars, the sill and the daylight of one window."""
    wall = build.surfaces[window.wall]
    assert isinstance(wall, Quad)
    s0, t0, s1, t1 = window.hole
    thick, width, height = window.thickness, s1 - s0, t1 - t0
    inward = np.cross(wall.a, wall.b)
    glow = (sky.horizon + sky.zenith) / 2

    def at(s: float, t: float, out: float) -> Vec:
        return wall.corner + s * wall.a + t * wall.b - out * inward

    reveal = [
        (at(s0, t0, thick), inward, wall.a, (thick, width), 1.0),
        (at(s0, t1, thick), wall.a, inward, (width, thick), 0.6),
        (at(s0, t0, thick), wall.b, inward, (height, thick), 0.8),
        (at(s1, t0, thick), inward, wall.b, (thick, height), 0.8),
    ]
    for corner, a, b, extent, share in reveal:
        coat = Coat(paint=frame, light=_glow(share * glow))
        build.surfaces.append(Quad(corner=corner, a=a, b=b, size=extent, coat=coat))
    bars = [(s0, s0 + 0.05, t0, t1), (s1 - 0.05, s1, t0, t1)]
    bars += [(s0 + 0.05, s1 - 0.05, t0, t0 + 0.05), (s0 + 0.05, s1 - 0.05, t1 - 0.05, t1)]
    mullions = int(width / 0.8)
    for i in range(mullions):
        s = s0 + (i + 1) * width / (mullions + 1)
        bars.append((s - 0.025, s + 0.025, t0 + 0.05, t1 - 0.05))
    boxes = [(at(a, c, 0.55 * thick), at(b, d, 0.55 * thick + 0.05)) for a, b, c, d in bars]
    boxes.append((at(s0 - 0.05, t0 - 0.03, -0.1), at(s1 + 0.05, t0, 0.0)))
    for i, (p, q) in enumerate(boxes):
        piece = _Piece(width=0, depth=0, boxes=((np.minimum(p, q), np.maximum(p, q), frame),))
        is_sill = i == len(boxes) - 1
        coat = Coat(light=None if is_sill else _glow(0.55 * glow))
        build.place(piece, 0, 0, 0, coat=coat, solid=False)
    build.emitters.append(
        Emitter(corner=at(s0, t0, 0), a=width * wall.a, b=height * wall.b, radiance=1.5 * glow)
    )


def _sky(rng: Rng) -> Sky:
    grey = rng.uniform(0, 0.7)
    clear = np.array([0.28, 0.5, 0.95]) * rng.uniform(0.85, 1.15)
    zenith = clear + (np.array([0.8, 0.84, 0.9]) - clear) * grey
    horizon = np.array([0.95, 1.0, 1.05]) * rng.uniform(0.95, 1.1, 3)
    cover = np.clip((_noise(rng, 1.3) - rng.uniform(-0.5, 1.2)) * 0.7, 0, 1)
    return Sky(
        zenith=1.1 * zenith,
        horizon=1.15 * horizon,
        clouds=cover.astype(np.float32),
        haze_m=rng.uniform(150, 600),
    )


def _sun_towards(rng: Rng, azimuth: float) -> Vec:
    """A unit vector towards a sun near an azimuth (0 is +y, positive towards +x)."""
    azimuth += rng.uniform(-0.7, 0.7)
    height = rng.uniform(0.35, 0.8)
    level = math.cos(height)
    return np.array([level * math.sin(azimuth), level * math.cos(azimuth), math.sin(height)])


def _outdoors(rng: Rng, build: _Builder, size: Vec, sky: Sky, sun: Vec) -> None:
    """What the windows look out on: ground to 120 m, houses and trees, nothing near the room."""
    light = OpenLight(
        ambient=0.5 * (sky.zenith + sky.horizon) / 2,
        sun=rng.uniform(0.4, 1.6) * np.array([1.1, 1.0, 0.85]),
        direction=sun,
    )
    ground = -rng.choice([rng.uniform(0.15, 0.5), rng.uniform(2.5, 6.0)])
    grass = build.paint(rng, _leaves, _GREENS, 2.5)
    middle = size / 2
    coat = Coat(light=light, hazy=True)
    build.lay(
        (middle[0] - 120, middle[0] + 120),
        (middle[1] - 120, middle[1] + 120),
        ground,
        replace(coat, paint=grass),
    )
    facades = [build.paint(rng, _facade, _FACADES, 4.0) for _ in range(3)]
    hedge = build.paint(rng, _leaves, _GREENS, 1.2)
    bark = build.paint(rng, _wood, "5a4632 4a3b2c", 1.0)
    for angle in np.arange(0, 2 * math.pi, 0.28) + rng.uniform(0, 0.2):
        distance = rng.choice([rng.uniform(8, 18), rng.uniform(18, 70)])
        x = middle[0] + (distance + size[0] / 2) * math.sin(angle)
        y = middle[1] + (distance + size[1] / 2) * math.cos(angle)
        what = rng.random()
        if what < 0.5 and distance > 20:
            piece = _house(rng, facades[rng.integers(3)], facades[rng.integers(3)])
        elif what < 0.62:
            w = rng.uniform(3, 8)
            box = _box(-w / 2, w / 2, -0.4, 0.4, 0, rng.uniform(0.8, 1.8), hedge)
            piece = _Piece(width=w, depth=0.8, boxes=(box,))
        else:
            piece = _tree(rng, hedge, bark)
        turn = -angle + rng.uniform(-0.3, 0.3)
        build.place(piece, x, y, turn, z=ground, coat=coat, solid=False)


def _house(rng: Rng, wall: int, roof: int) -> _Piece:
    w, d, h = rng.uniform(6, 14), rng.uniform(6, 9), rng.uniform(3, 9)
    body = _box(-w / 2, w / 2, -d / 2, d / 2, 0, h, wall)
    eaves = _box(-w / 2 - 0.3, w / 2 + 0.3, -d / 2 - 0.3, d / 2 + 0.3, h, h + 0.4, roof)
    chimney = _box(0.2 * w, 0.2 * w + 0.7, -0.3, 0.4, h + 0.4, h + 1.6, roof)
    return _Piece(width=w, depth=d, boxes=(body, eaves, chimney))


def _tree(rng: Rng, leaves: int, bark: int) -> _Piece:
    h = rng.uniform(1.2, 2.6)
    crown = rng.uniform(0.8, 1.6)
    balls = tuple(
        (
            float(rng.uniform(-0.6, 0.6) * crown),
            float(rng.uniform(-0.6, 0.6) * crown),
            float(h + rng.uniform(0.2, 1.6) * crown),
            float(crown * rng.uniform(0.6, 1.0)),
            leaves,
        )
        for _ in range(4)
    )
    trunk = (0.0, 0.0, 0.0, 0.14, h + 0.5, bark)
    return _Piece(width=2 * crown, depth=2 * crown, drums=(trunk,), balls=balls)


def _lamps(rng: Rng, build: _Builder, size: Vec, power: float) -> None:
    """Flush panels or hanging globes on a grid over the room."""
    width, depth, height = size
    white = build.paint(rng, _plain, "f4f2ee", 2.0)
    tone = np.array([1.0, rng.uniform(0.82, 0.97), rng.uniform(0.6, 0.95)])
    rows, columns = max(1, round(depth / 3.5)), max(1, round(width / 4.5))
    hanging = bool(height > 2.6 and rng.random() < 0.45)
    lamp = 0.25 if hanging else 0.6
    power *= 2.5 if hanging else 1
    glow = Coat(light=_glow(3.5 * tone))
    for y in (np.arange(rows) + 0.5) * depth / rows:
        for x in (np.arange(columns) + 0.5) * width / columns:
            if hanging:
                z = height - rng.uniform(0.45, 0.6)
                globe = _Piece(width=0, depth=0, balls=((0, 0, z, 0.15, white),))
                build.place(globe, float(x), float(y), 0, coat=glow, solid=False)
                cord = _Piece(width=0, depth=0, drums=((0, 0, z + 0.14, 0.008, height - z, white),))
                build.place(cord, float(x), float(y), 0, solid=False)
            else:
                z = height - 0.05
                panel = _box(-0.3, 0.3, -0.3, 0.3, z, height + 0.01, white)
                piece = _Piece(width=0, depth=0, boxes=(panel,))
                build.place(piece, float(x), float(y), 0, coat=glow, solid=False)
            build.emitters.append(
                Emitter(
                    corner=np.array([x - lamp / 2, y - lamp / 2, z if hanging else z - 0.01]),
                    a=lamp * _NORTH,
                    b=lamp * _EAST,
                    radiance=power * tone / (rows * columns),
                    all_round=hanging,
                )
            )


def _trim(rng: Rng, build: _Builder, size: Vec, windows: list[_Window], paint: int) -> None:
    """Skirting boards, and sometimes beams under the ceiling."""
    width, depth, height = size
    high, thick = rng.uniform(0.07, 0.13), 0.015
    boards = [
        _box(0, thick, 0, depth, 0, high, paint),
        _box(width - thick, width, 0, depth, 0, high, paint),
        _box(thick, width - thick, 0, thick, 0, high, paint),
        _box(thick, width - thick, depth - thick, depth, 0, high, paint),
    ]
    low = {window.wall for window in windows if window.hole[1] < high + 0.05}
    kept = tuple(board for wall, board in enumerate(boards) if wall not in low)
    build.place(_Piece(width=0, depth=0, boxes=kept), 0, 0, 0, solid=False)
    if rng.random() < 0.22 and height > 2.6:
        beam = build.paint(rng, _wood, _WOODS, 1.2)
        boxes = tuple(
            _box(0, width, y - 0.07, y + 0.07, height - 0.18, height, beam)
            for y in np.arange(0.9, depth - 0.3, rng.uniform(1.0, 1.6))
        )
        build.place(_Piece(width=width, depth=depth, boxes=boxes), 0, 0, 0)


def _build_room(rng: Rng, size: Vec, *, furnished: bool = True) -> Scene:
    """A room of the given width, depth and height in metres."""
    build = _Builder()
    windows = _plan_windows(rng, size)
    sky = _sky(rng)
    _shell(rng, build, size, windows)
    frame = build.paint(rng, _plain, _LACQUERS, 2.0)
    _trim(rng, build, size, windows, frame)
    if furnished:
        _furnish(rng, build, size, windows)
    azimuth = (-math.pi / 2, math.pi / 2, math.pi, 0.0)[windows[0].wall] if windows else 0.0
    towards = _sun_towards(rng, azimuth)
    sun = None
    if windows:
        for window in windows:
            _open_window(build, window, frame, sky)
        _outdoors(rng, build, size, sky, towards)
        if rng.random() < 0.55:
            sun = Sun(direction=towards, irradiance=rng.uniform(3, 8) * np.array([1.1, 1.0, 0.8]))
    if not windows or rng.random() < 0.5:
        _lamps(rng, build, size, rng.uniform(20, 40) if windows else 60)
    return build.scene(sky, sun, size)


@lru_cache(maxsize=2)
def room_scene(seed: int, scene: int) -> Scene:
    """The room of a seed and scene index; the last few are kept."""
    rng = _rng(_ROOM, seed, scene)
    size = np.array([rng.uniform(3, 9), rng.uniform(4, 12), rng.uniform(2.4, 3.5)])
    return _build_room(rng, size)


def _pose(rng: Rng, scene: Scene, height: int, width: int) -> Camera:
    """A camera in the free part of a room, with something to see.

    The view is at least 1 m deep in five directions, and in the middle one some share of the
    room's length that varies; after many attempts only the clearance is asked for.
    """
    assert scene.shell_m is not None
    wanted = rng.uniform(2.0, 0.75 * max(scene.shell_m[:2]))
    high, wide = height / max(height, width), width / max(height, width)
    for attempt in range(400):
        position = np.append(rng.uniform(0.5, scene.shell_m[:2] - 0.5), rng.uniform(1.1, 1.8))
        camera = Camera.looking(
            position,
            yaw=rng.uniform(-math.pi, math.pi),
            pitch=math.radians(rng.uniform(-12, 4)),
            fov=math.radians(rng.uniform(55, 75)),
            height=height,
            width=width,
        )
        if scene.clearance(position) < CLEARANCE_M:
            continue
        spread = 0.35 * np.array(
            [[0, 0], [-wide, -high], [-wide, high], [wide, -high], [wide, high]]
        )
        sides = np.column_stack([spread, np.ones(5)]) @ camera.rotation.T
        sight = scene.sight(position, sides)
        if attempt >= 200 or (sight.min() >= 1.0 and sight[0] >= wanted):
            return camera
    raise RuntimeError("no place for a camera in this room")


def _describe(camera: Camera) -> dict[str, object]:
    forward = camera.rotation[:, 2]
    return {
        "position_m": [round(float(x), 6) for x in camera.position],
        "yaw_deg": round(math.degrees(math.atan2(forward[0], forward[1])), 6),
        "pitch_deg": round(math.degrees(math.asin(forward[2])), 6),
    }


def room_camera(seed: int, scene: int, frame: int, height: int, width: int) -> Camera:
    """The camera of one frame, in the coordinates of ``room_scene``."""
    return _pose(_rng(_FRAME, seed, scene, frame), room_scene(seed, scene), height, width)


def _room_name(scene: int) -> str:
    return f"room_{scene:04d}"


def _room_key(scene: int, frame: int) -> str:
    return f"{_room_name(scene)}/frame_{frame:02d}"


def render_room(seed: int, scene: int, frame: int, height: int = 252, width: int = 336) -> Frame:
    """Draw one frame of one room.

    Args:
        seed, scene, frame: non-negative integers that decide everything but the resolution.
        height, width: in pixels.

    Returns:
        The frame with exact float32 depth: finite and positive, or +inf for the sky. Colours are
        averages of 2x2 rays per pixel; depth is that of the ray through the pixel's centre.
    """
    room = room_scene(seed, scene)
    camera = room_camera(seed, scene, frame, height, width)
    exposure = _rng(_EXPOSURE, seed, scene, frame).uniform(0.6, 1.3)
    _, inverse = cast(room, camera, *camera.grid(1), np.float64)
    return Frame(
        image=develop(shade(room, camera), exposure=exposure),
        depth_m=depth_of(inverse),
        K_px=camera.K_px,
        key=_room_key(scene, frame),
        dataset="rooms",
        scene=_room_name(scene),
        meta={"seed": seed, "camera": _describe(camera)},
    )


def _interior(rng: Rng, height: int, width: int) -> NDArray[np.uint8]:
    """A furnished room, seen along its length."""
    size = np.array([rng.uniform(3, 7), rng.uniform(6, 12), rng.uniform(2.4, 3.8)])
    scene = _build_room(rng, size)
    cameras = [_pose(rng, scene, height, width) for _ in range(6)]
    deepest = max(cameras, key=lambda c: scene.sight(c.position, c.rotation[None, :, 2])[0])
    return develop(shade(scene, deepest), exposure=rng.uniform(0.8, 1.2))


def _corridor(rng: Rng, height: int, width: int) -> NDArray[np.uint8]:
    """A long narrow room, seen from one end."""
    size = np.array([rng.uniform(1.9, 3.2), rng.uniform(10, 24), rng.uniform(2.4, 3.4)])
    scene = _build_room(rng, size, furnished=False)
    camera = Camera.looking(
        np.array([rng.uniform(0.35, 0.65) * size[0], 0.8, rng.uniform(1.3, 1.7)]),
        yaw=rng.uniform(-0.12, 0.12),
        pitch=rng.uniform(-0.1, 0.03),
        fov=math.radians(rng.uniform(55, 80)),
        height=height,
        width=width,
    )
    return develop(shade(scene, camera), exposure=rng.uniform(0.8, 1.2))


def _street(rng: Rng, height: int, width: int) -> NDArray[np.uint8]:
    """A road between houses, trees along it, seen from eye level."""
    build = _Builder()
    half, kerb = rng.uniform(3, 5), rng.uniform(1.6, 2.6)
    asphalt = build.paint(rng, _carpet, "6b6b6e 7d7a74 8a8278", 3.0)
    paving = build.paint(rng, _tiles, _STONES, 4.0)
    grass = build.paint(rng, _leaves, _GREENS, 3.0)
    white = build.paint(rng, _plain, "e8e6e0", 3.0)
    leaves, bark = build.paint(rng, _leaves, _GREENS, 1.5), build.paint(rng, _wood, _WOODS, 1.0)
    facades = [build.paint(rng, _facade, _FACADES, 5.0) for _ in range(4)]
    facades += [build.paint(rng, _bricks, _BRICKS, 3.0)]
    glass = build.paint(rng, _plain, "39434d 4b5966", 3.0)
    build.lay((-160, 160), (-10, 240), 0.0, Coat(paint=grass, spacing_m=20, hazy=True))
    build.lay((-half, half), (-10, 240), 0.01, Coat(paint=asphalt, spacing_m=2, hazy=True))
    for x in (-half - kerb, half):
        build.lay((x, x + kerb), (-10, 160), 0.1, Coat(paint=paving, spacing_m=1.5, hazy=True))
    for y in np.arange(4, 90, 5.0):
        mark = _Piece(width=0, depth=0, boxes=(_box(-0.08, 0.08, -1, 1, 0, 0.02, white),))
        build.place(mark, 0, float(y), 0, coat=_FAR, solid=False)
    for side in (-1, 1):
        turn = side * math.pi / 2
        y = rng.uniform(-2, 4)
        while y < 110:
            length = rng.uniform(6, 13)
            house = _terrace(rng, length, facades[rng.integers(len(facades))], glass, white)
            if rng.random() < 0.85:
                build.place(house, side * (half + kerb), y + length / 2, turn, coat=_FAR)
            y += length + (0 if rng.random() < 0.6 else rng.uniform(1.5, 5))
        for y in np.arange(rng.uniform(5, 9), 70, rng.uniform(8, 13)):
            if rng.random() < 0.65:
                tree = _tree(rng, leaves, bark)
                build.place(tree, side * (half + 0.6), float(y), 0, z=0.1, coat=_NEAR)
    return _outdoor_view(rng, build, rng.uniform(-0.9, 0.9) * half, height, width)


_FAR = Coat(hazy=True, spacing_m=3.0)
_NEAR = Coat(hazy=True, spacing_m=0.7)


def _terrace(rng: Rng, length: float, wall: int, glass: int, trim: int) -> _Piece:
    """A house whose front is at y = 0, and its windows, which stand out a little."""
    storeys, bay = int(rng.integers(2, 5)), length / max(2, round(length / 2.6))
    top = 3.1 * storeys + rng.uniform(0.3, 0.8)
    walls = (
        _box(-length / 2, length / 2, -8, 0, 0, top, wall),
        _box(-length / 2, length / 2, -8.2, 0.25, top, top + 0.3, trim),
    )
    windows = []
    for storey in range(storeys):
        for x in np.arange(-length / 2 + bay / 2, length / 2, bay):
            z = 3.1 * storey + 0.95
            windows.append(_box(x - 0.6, x + 0.6, -0.1, 0.04, z - 0.08, z + 1.58, trim))
            windows.append(_box(x - 0.52, x + 0.52, -0.1, 0.05, z, z + 1.5, glass))
    return _Piece(width=length, depth=8, boxes=walls, details=tuple(windows))


def _landscape(rng: Rng, height: int, width: int) -> NDArray[np.uint8]:
    """Rolling hills behind fields, a road lined with trees and posts, a few houses."""
    build = _Builder()
    leaves, bark = build.paint(rng, _leaves, _GREENS, 1.5), build.paint(rng, _wood, _WOODS, 1.0)
    fields = [build.paint(rng, _leaves, _GREENS + " b39a4f c2a85a", 9.0) for _ in range(3)]
    furrows = [build.paint(rng, _stripes, _GREENS + " 8a6b45 b3924f", 14.0) for _ in range(2)]
    road = build.paint(rng, _carpet, "a8977a 8f8778 c0ad8a", 4.0)
    walls = [build.paint(rng, _facade, _FACADES, 5.0) for _ in range(2)]
    lane, wide = rng.uniform(-4, 4), rng.uniform(2, 4)
    build.lay((-400, 400), (-10, 600), 0.0, replace(_FAR, paint=fields[0], spacing_m=40))
    for x, paint in zip((-34.0, 9.0), furrows, strict=True):
        strip = (x, x + rng.uniform(12, 25))
        build.lay(strip, (-10, 200), 0.02, replace(_FAR, paint=paint))
    build.lay((lane, lane + wide), (-10, 200), 0.04, replace(_FAR, paint=road, spacing_m=1.5))
    for y in np.geomspace(100, 520, 18):
        radius, rise = rng.uniform(0.5, 1.5) * y, rng.uniform(0.06, 0.24) * y
        centre = np.array([rng.uniform(-0.9, 0.9) * y, y + radius, rise - radius])
        coat = replace(_FAR, paint=fields[rng.integers(len(fields))], spacing_m=0.2 * radius)
        build.surfaces.append(Ball(centre=centre, radius=radius, coat=coat))
    for side in (lane - 1.2, lane + wide + 1.2):
        for y in np.arange(rng.uniform(7, 12), 110, rng.uniform(7, 13)):
            if rng.random() < 0.6:
                build.place(_tree(rng, leaves, bark), side, float(y), 0, coat=_NEAR)
            else:
                post = _box(-0.08, 0.08, -0.08, 0.08, 0, 1.3, bark)
                piece = _Piece(width=0, depth=0, boxes=(post,))
                build.place(piece, side, float(y), 0, coat=_FAR)
    for _ in range(rng.integers(2, 6)):
        x, y = rng.choice([-1, 1]) * rng.uniform(12, 40), rng.uniform(25, 85)
        build.place(_house(rng, walls[0], walls[1]), x, y, rng.uniform(-1, 1), coat=_FAR)
    return _outdoor_view(rng, build, lane + wide / 2, height, width)


def _outdoor_view(
    rng: Rng, build: _Builder, x: float, height: int, width: int
) -> NDArray[np.uint8]:
    """Under a sky and a sun from the side, looking along +y from x at eye level or higher."""
    sun = Sun(
        direction=_sun_towards(rng, rng.choice([-1.9, 1.9, 2.6, -2.6])),
        irradiance=rng.uniform(2, 5) * np.array([1.1, 1.0, 0.82]),
    )
    camera = Camera.looking(
        np.array([x, 0.0, rng.uniform(1.5, 4.0)]),
        yaw=rng.uniform(-0.2, 0.2),
        pitch=rng.uniform(-0.05, 0.1),
        fov=math.radians(rng.uniform(50, 75)),
        height=height,
        width=width,
    )
    return develop(shade(build.scene(_sky(rng), sun), camera), exposure=rng.uniform(0.8, 1.2))


def _posterised(rng: Rng, image: Image.Image) -> Image.Image:
    """Few flat tones, as in a screen print."""
    flat = image.filter(ImageFilter.MedianFilter(5))
    count = int(rng.integers(4, 8))
    steps = [round(255 * ((x * count) // 256 + 0.5) / count) for x in range(256)]
    return flat.point(steps * 3)


def _painted(rng: Rng, image: Image.Image) -> Image.Image:
    """Dabs of one colour each, and richer colours."""
    dabs = image.filter(ImageFilter.ModeFilter(int(rng.choice([5, 7]))))
    return ImageEnhance.Color(dabs).enhance(rng.uniform(1.2, 1.8))


def _sketched(rng: Rng, image: Image.Image) -> Image.Image:
    """Pencil: the grey picture divided by its blurred negative (colour dodge), on tinted paper."""
    grey = np.asarray(ImageOps.grayscale(image), dtype=np.float64)
    soft = np.asarray(
        ImageOps.grayscale(image).filter(ImageFilter.GaussianBlur(rng.uniform(2, 5))),
        dtype=np.float64,
    )
    lines = np.clip(grey / np.maximum(soft, 1), 0, 1) ** 2
    tone = lines * (0.55 + 0.45 * grey / 255)
    paper = rng.uniform([225, 215, 190], [255, 250, 240])
    return Image.fromarray((tone[..., None] * paper).astype(np.uint8))


def _toned(rng: Rng, image: Image.Image) -> Image.Image:
    """Old print: one ink on warm paper."""
    ink = tuple(int(x) for x in rng.uniform([20, 10, 10], [70, 60, 70]))
    paper = tuple(int(x) for x in rng.uniform([225, 210, 180], [255, 245, 225]))
    return ImageOps.colorize(ImageOps.grayscale(image), ink, paper)


def _shifted(rng: Rng, image: Image.Image) -> Image.Image:
    """Hues turned and colours strengthened, contrast raised."""
    hue, saturation, value = image.convert("HSV").split()
    turn = int(rng.integers(-40, 40))
    turned = hue.point([(x + turn) % 256 for x in range(256)])
    merged = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    return ImageEnhance.Contrast(merged).enhance(rng.uniform(1.0, 1.35))


def _unchanged(_: Rng, image: Image.Image) -> Image.Image:
    return image


_MOTIFS = {"interior": _interior, "corridor": _corridor, "street": _street, "landscape": _landscape}
_STYLES = {
    "plain": _unchanged,
    "posterised": _posterised,
    "painted": _painted,
    "sketched": _sketched,
    "toned": _toned,
    "shifted": _shifted,
}
_ASPECTS = (0.7, 0.75, 1.0, 4 / 3, 1.5, 16 / 9)


def render_picture(
    seed: int, picture: int, height: int = 252, width: int = 336
) -> tuple[UInt8[np.ndarray, "h w 3"], dict[str, object]]:
    """Draw one picture to hang on a wall: a deep view, in some style.

    Motifs and styles take turns, so that even a small collection has all of them.

    Args:
        seed, picture: non-negative integers that decide everything but the resolution.
        height, width: the picture has about this many pixels in all; its aspect ratio varies.

    Returns:
        sRGB image and ``{"motif": ..., "style": ...}``.
    """
    rng = _rng(_PICTURE, seed, picture)
    motif = list(_MOTIFS)[picture % len(_MOTIFS)]
    style = list(_STYLES)[picture // len(_MOTIFS) % len(_STYLES)]
    aspect = _ASPECTS[rng.integers(len(_ASPECTS))]
    side = math.sqrt(height * width)
    image = _MOTIFS[motif](rng, round(side / math.sqrt(aspect)), round(side * math.sqrt(aspect)))
    styled = _STYLES[style](rng, Image.fromarray(image))
    return np.asarray(styled), {"motif": motif, "style": style}


def _jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name}: expected {least} or more, found {value}")


@dataclass(frozen=True, slots=True)
class RoomsReader:
    """Generated rooms with exact depth; each room is one scene."""

    raw: str = ""
    """Unused: there is nothing to read."""
    scenes: int = 40
    """Number of rooms."""
    frames_per_scene: int = 6
    """Views of each room."""
    height: int = 252
    """Of the images, in pixels."""
    width: int = 336
    """Of the images, in pixels."""
    seed: int = 0
    """Decides all rooms; rooms of different seeds have nothing in common."""
    dataset: str = "rooms"
    """Short name of the data set."""

    def __post_init__(self) -> None:
        _check("scenes", self.scenes, 1)
        _check("frames_per_scene", self.frames_per_scene, 1)
        _check("height", self.height, 16)
        _check("width", self.width, 16)
        _check("seed", self.seed, 0)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.1, 200.0)

    def list(self) -> Listing:
        """Name the frames: ``room_0003/frame_02``."""
        pairs = [(s, f) for s in range(self.scenes) for f in range(self.frames_per_scene)]
        items = [Item(key=_room_key(s, f), scene=_room_name(s)) for s, f in pairs]
        return Listing(items=sorted(items, key=lambda item: item.key))

    def read(self, item: Item) -> RawFrame:
        """Draw one frame."""
        room, view = item.key.split("/")
        frame = render_room(
            self.seed,
            int(room.removeprefix("room_")),
            int(view.removeprefix("frame_")),
            self.height,
            self.width,
        )
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=_jpeg(frame.image),
            image_ext="jpg",
            width=self.width,
            height=self.height,
            depth=encode_log_u16(frame.depth_m),
            K_px=frame.K_px,
            split=item.split,
            meta=frame.meta,
        )


@dataclass(frozen=True, slots=True)
class PicturesReader:
    """Generated pictures that look deep: rooms, corridors, streets, landscapes, in six styles."""

    raw: str = ""
    """Unused: there is nothing to read."""
    pictures: int = 24
    """Number of pictures; 24 have every motif in every style."""
    height: int = 252
    """Together with ``width``: pixels per picture; aspect ratios vary."""
    width: int = 336
    """See ``height``."""
    seed: int = 0
    """Decides all pictures."""
    dataset: str = "pictures"
    """Short name of the collection."""

    def __post_init__(self) -> None:
        _check("pictures", self.pictures, 1)
        _check("height", self.height, 16)
        _check("width", self.width, 16)
        _check("seed", self.seed, 0)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "art"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, math.inf)

    def list(self) -> Listing:
        """Name the pictures: ``picture_0007``, each its own scene."""
        keys = sorted(f"picture_{index:04d}" for index in range(self.pictures))
        return Listing(items=[Item(key=key, scene=key) for key in keys])

    def read(self, item: Item) -> RawFrame:
        """Draw one picture."""
        number = int(item.key.removeprefix("picture_"))
        image, meta = render_picture(self.seed, number, self.height, self.width)
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=_jpeg(image),
            image_ext="jpg",
            width=image.shape[1],
            height=image.shape[0],
            split=item.split,
            meta={"seed": self.seed, **meta},
        )
