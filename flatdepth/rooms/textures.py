"""Textures and colours.

A texture is a function of a generator and a base colour that returns (T, T, 3) linear albedo and
tiles seamlessly. Colours are space-separated sRGB codes, one of which is picked.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float, Float32

from flatdepth.rooms.colour import decode_srgb
from flatdepth.rooms.paint import TEXTURE_SIZE
from flatdepth.rooms.streams import Kind, Rng, stream
from flatdepth.rooms.vectors import Vector

Field = Float[np.ndarray, "t t"]
Albedo = Float[np.ndarray, "t t 3"]
Texture = Callable[[Rng, Vector], Albedo]


WALLS = "d9d2c3 cfd6d2 e2dcd0 b9c4c9 d8c3a5 c9d1b8 e3d3cb a9b7a0 c4b6c9 9fb0bd d9b99b e6e2da 8d9fa8"
BRICKS = "9c5a45 8a4b3a b07a5c a89a8c c9bfb3"
WOODS = "8a5a34 a9713f 6b4226 c39a6b d2b183 4a3021 b5834f 9a7b5b"
STONES = "b8b2a6 8f8d88 cfc8ba a39a8c 77797a d8d3c8 9b8f80"
CARPETS = "7d8288 8b7f70 5f6b75 a39a8a 7a5a55 56615a b3a795"
FABRICS = "7b8fa1 a8574a 4f6d7a c7a256 6f8060 b9b1a3 3e4a5c 9c6b84 d1cabd 5a4a42 b5643c 44695c"
LACQUERS = "e8e6e1 f0eee9 d9dcdc 3f444a b7c2c4 6d8a96 c65b45 d9a441 87a08b e2d9c6"
GREENS = "4d6b32 5d7a3a 3f5a30 6f7f3d 7b8a48"
FACADES = "d8c7a8 c98f6b b9b0a2 e0d8c8 a8b0b3 cfae88 b56a50"
BOOKS = "8c3b32 2f4b66 c9a24b 3f5b45 d8cdb8 5b3b52 2d2f36 b56a3d 6f8fa5"


@cache
def _noise_bank(slope: float, stretch: float) -> tuple[Float32[np.ndarray, "t t"], ...]:
    """Four tileable noise fields of unit variance with amplitude spectrum frequency^-slope."""
    rng = stream(Kind.NOISE, 0, int(slope * 16), int(stretch * 16))
    rows = np.fft.fftfreq(TEXTURE_SIZE)[:, None] * TEXTURE_SIZE * stretch
    columns = np.fft.rfftfreq(TEXTURE_SIZE)[None] * TEXTURE_SIZE
    radius = np.hypot(rows, columns)
    gain = np.where(radius > 0, np.maximum(radius, 1) ** -slope, 0)
    fields = []
    for _ in range(4):
        field = np.fft.irfft2(
            np.fft.rfft2(rng.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE))) * gain
        )
        fields.append((field / field.std()).astype(np.float32))
    return tuple(fields)


def noise(rng: Rng, slope: float = 1.0, stretch: float = 1.0) -> Float32[np.ndarray, "t t"]:
    """One of the bank's fields, rolled: cheap, and different in every place it is used."""
    field = _noise_bank(slope, stretch)[rng.integers(4)]
    return np.roll(field, rng.integers(TEXTURE_SIZE, size=2), axis=(0, 1))


def _colour(hexa: str) -> Vector:
    """Linear albedo of an sRGB colour such as "d8cfc0"."""
    return decode_srgb(np.frombuffer(bytes.fromhex(hexa), dtype=np.uint8) / 255.0)


def pick_colour(rng: Rng, colours: str) -> Vector:
    """One of several space-separated colours, varied a little."""
    options = colours.split()
    return np.clip(_colour(options[rng.integers(len(options))]) * rng.uniform(0.9, 1.1, 3), 0, 0.92)


def _grid(cells: float) -> Float[np.ndarray, "2 t t"]:
    """Rows y and columns x of the texels, both 0..cells over a tile."""
    return np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE] * (cells / TEXTURE_SIZE)


def _tint(base: Vector, factor: Field) -> Float32[np.ndarray, "t t 3"]:
    """An albedo image from one colour and a brightness field."""
    return np.clip(base.astype(np.float32) * factor.astype(np.float32)[..., None], 0.01, 0.95)


def plain(rng: Rng, base: Vector) -> Albedo:
    """Paint or lacquer: faint unevenness."""
    return _tint(base, 1 + 0.025 * noise(rng, 1.5) + 0.02 * noise(rng, 0.3))


def plaster(rng: Rng, base: Vector) -> Albedo:
    """Rough plaster: grain lit from the side."""
    grain = noise(rng, 0.7)
    relief = grain - np.roll(grain, (1, 1), axis=(0, 1))
    return _tint(base, 1 + 0.05 * relief + 0.035 * noise(rng, 1.6))


def stripes(rng: Rng, base: Vector) -> Albedo:
    """Striped wallpaper."""
    count = int(rng.choice([4, 8, 16]))
    phase = np.arange(TEXTURE_SIZE) * count / TEXTURE_SIZE % 1
    band = (phase < rng.uniform(0.3, 0.6)) * rng.uniform(0.08, 0.22)
    return _tint(base, 1 - band[None, :] + 0.02 * noise(rng, 0.5))


def damask(rng: Rng, base: Vector) -> Albedo:
    """Wallpaper with a repeated ornament."""
    count = int(rng.choice([4, 8]))
    y, x = _grid(2 * math.pi * count)
    shift = np.where(np.sin(y / 2) > 0, 0, math.pi)
    ornament = np.cos(x + shift) * np.cos(y) + 0.5 * np.cos(2 * (x + shift)) - 0.4 * np.cos(3 * y)
    return _tint(base, 1 - 0.14 * (ornament > rng.uniform(0.2, 0.6)) + 0.02 * noise(rng, 0.5))


def bricks(rng: Rng, base: Vector) -> Albedo:
    """Running bond, 8 by 24 per tile."""
    rows, columns = 24, 8
    y, x = _grid(1)
    row = np.floor(y * rows)
    along = x * columns + 0.5 * (row % 2)
    shade = rng.uniform(0.75, 1.15, (rows, columns))[row.astype(int), along.astype(int) % columns]
    joint = (y * rows % 1 < 0.15) | (along % 1 < 0.05)
    factor = np.where(joint, rng.uniform(1.1, 1.5), shade)
    return _tint(base, factor * (1 + 0.08 * noise(rng, 0.5)))


def tiles(rng: Rng, base: Vector) -> Albedo:
    """Square tiles with joints, sometimes in two colours."""
    count = int(rng.choice([4, 6, 8]))
    y, x = _grid(count)
    row, column = y.astype(int), x.astype(int)
    factor = rng.uniform(0.92, 1.06, (count, count))[row, column]
    if rng.random() < 0.45:
        factor = factor * np.where((row + column) % 2, 1.0, rng.uniform(0.3, 0.75))
    joint = 0.03 * count / 6
    seam = (x % 1 < joint) | (y % 1 < joint)
    return _tint(base, np.where(seam, rng.uniform(0.45, 0.7), factor + 0.04 * noise(rng, 1.4)))


def planks(rng: Rng, base: Vector) -> Albedo:
    """Floor boards along s, with staggered ends and grain."""
    rows = int(rng.choice([8, 12, 16]))
    y, x = _grid(1)
    row = (y * rows).astype(int)
    along = x + rng.random(rows)[row]
    board = (along * 2).astype(int) % 2
    factor = rng.uniform(0.7, 1.12, (rows, 2))[row, board]
    gap = (y * rows % 1 < 0.04 * rows / 8) | (along * 2 % 1 < 0.012)
    grain = 0.09 * noise(rng, 0.8, 8.0)
    return _tint(base, np.where(gap, 0.4, factor * (1 + grain)))


def herringbone(rng: Rng, base: Vector) -> Albedo:
    """Parquet of blocks laid at right angles in a basket weave."""
    count = 8
    y, x = _grid(count)
    turned = (x.astype(int) + y.astype(int)) % 2 == 1
    across = np.where(turned, y, x) * 4
    slat = across.astype(int) % (4 * count)
    tint = rng.uniform(0.75, 1.1, (count, count, 4 * count))
    factor = tint[y.astype(int), x.astype(int), slat]
    gap = (across % 1 < 0.1) | (x % 1 < 0.04) | (y % 1 < 0.04)
    return _tint(base, np.where(gap, 0.55, factor) * (1 + 0.05 * noise(rng, 0.6)))


def carpet(rng: Rng, base: Vector) -> Albedo:
    """Pile: strong fine grain and slow blotches."""
    return _tint(base, 1 + 0.16 * noise(rng, 0.0) + 0.06 * noise(rng, 1.5))


def rug(rng: Rng, base: Vector) -> Albedo:
    """Woven bands in two more colours."""
    second, third = pick_colour(rng, FABRICS), pick_colour(rng, FABRICS)
    y, x = _grid(1)
    wave = np.sin(2 * math.pi * 8 * y) + 0.8 * np.sign(np.sin(2 * math.pi * 16 * x))
    image = np.where((wave > 0.9)[..., None], second, base)
    image = np.where((wave < -0.9)[..., None], third, image)
    return np.clip(image * (1 + 0.12 * noise(rng, 0.1))[..., None], 0.01, 0.95)


def wood(rng: Rng, base: Vector) -> Albedo:
    """Veneer with grain along s."""
    grain = noise(rng, 0.9, 8.0)
    rings = np.sin(4 * noise(rng, 1.6, 4.0))
    return _tint(base, 1 + 0.1 * grain + 0.06 * rings)


def fabric(rng: Rng, base: Vector) -> Albedo:
    """A plain weave."""
    y, x = _grid(2 * math.pi * 64)
    return _tint(base, 1 + 0.07 * np.sin(x) * np.sin(y) + 0.07 * noise(rng, 0.3))


def leaves(rng: Rng, base: Vector) -> Albedo:
    """Foliage: light and shade in clumps."""
    clumps = np.tanh(1.5 * noise(rng, 0.9))
    return _tint(base, 0.95 + 0.5 * clumps + 0.15 * noise(rng, 0.2))


def facade(rng: Rng, base: Vector) -> Albedo:
    """Rendered outside wall with courses."""
    course = np.arange(TEXTURE_SIZE)[:, None] * 16 / TEXTURE_SIZE % 1 < 0.08
    return _tint(base, (1 - 0.18 * course) * (1 + 0.06 * noise(rng, 1.0)))
