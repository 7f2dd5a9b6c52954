"""The outdoors: sky, sun, ground, houses and trees."""

import math
from dataclasses import replace

import numpy as np

from flatdepth.rooms import textures
from flatdepth.rooms.build import Builder, Piece, box, centred
from flatdepth.rooms.scene import Sky
from flatdepth.rooms.streams import Rng
from flatdepth.rooms.surfaces import Coat, OpenLight
from flatdepth.rooms.textures import noise
from flatdepth.rooms.vectors import Vector


def draw_sky(rng: Rng) -> Sky:
    """Clear to grey, with more or less cloud and haze."""
    grey = rng.uniform(0, 0.7)
    clear = np.array([0.28, 0.5, 0.95]) * rng.uniform(0.85, 1.15)
    zenith = clear + (np.array([0.8, 0.84, 0.9]) - clear) * grey
    horizon = np.array([0.95, 1.0, 1.05]) * rng.uniform(0.95, 1.1, 3)
    cover = np.clip((noise(rng, 1.3) - rng.uniform(-0.5, 1.2)) * 0.7, 0, 1)
    return Sky(
        zenith=1.1 * zenith,
        horizon=1.15 * horizon,
        clouds=cover.astype(np.float32),
        haze_m=rng.uniform(150, 600),
    )


def towards_sun(rng: Rng, azimuth: float) -> Vector:
    """A unit vector towards a sun near an azimuth (0 is +y, positive towards +x)."""
    azimuth += rng.uniform(-0.7, 0.7)
    height = rng.uniform(0.35, 0.8)
    level = math.cos(height)
    return np.array([level * math.sin(azimuth), level * math.cos(azimuth), math.sin(height)])


def surround(rng: Rng, build: Builder, size: Vector, sky: Sky, sun: Vector) -> None:
    """What the windows look out on: ground to 120 m, houses and trees, nothing near the room."""
    light = OpenLight(
        ambient=0.5 * (sky.zenith + sky.horizon) / 2,
        sun=rng.uniform(0.4, 1.6) * np.array([1.1, 1.0, 0.85]),
        direction=sun,
    )
    ground = -rng.choice([rng.uniform(0.15, 0.5), rng.uniform(2.5, 6.0)])
    grass = build.paint(rng, textures.leaves, textures.GREENS, 2.5)
    coat = Coat(light=light, hazy=True)
    middle = size / 2
    west_east, south_north = ((at - 120, at + 120) for at in middle[:2])
    build.lay(west_east, south_north, ground, replace(coat, paint=grass))
    facades = [build.paint(rng, textures.facade, textures.FACADES, 4.0) for _ in range(3)]
    hedge = build.paint(rng, textures.leaves, textures.GREENS, 1.2)
    bark = build.paint(rng, textures.wood, "5a4632 4a3b2c", 1.0)
    for angle in np.arange(0, 2 * math.pi, 0.28) + rng.uniform(0, 0.2):
        distance = rng.choice([rng.uniform(8, 18), rng.uniform(18, 70)])
        x = middle[0] + (distance + size[0] / 2) * math.sin(angle)
        y = middle[1] + (distance + size[1] / 2) * math.cos(angle)
        what = rng.random()
        if what < 0.5 and distance > 20:
            piece = house(rng, facades[rng.integers(3)], facades[rng.integers(3)])
        elif what < 0.62:
            half = rng.uniform(3, 8) / 2
            piece = Piece(boxes=(centred(half, 0.4, 0, rng.uniform(0.8, 1.8), hedge),))
        else:
            piece = tree(rng, hedge, bark)
        turn = -angle + rng.uniform(-0.3, 0.3)
        build.place(piece, x, y, turn, z=ground, coat=coat, solid=False)


def house(rng: Rng, wall: int, roof: int) -> Piece:
    """A block with eaves and a chimney, in two paints."""
    w, d, h = rng.uniform(6, 14), rng.uniform(6, 9), rng.uniform(3, 9)
    body = centred(w / 2, d / 2, 0, h, wall)
    eaves = centred(w / 2 + 0.3, d / 2 + 0.3, h, h + 0.4, roof)
    chimney = box(0.2 * w, 0.2 * w + 0.7, -0.3, 0.4, h + 0.4, h + 1.6, roof)
    return Piece(boxes=(body, eaves, chimney))


def tree(rng: Rng, leaves: int, bark: int) -> Piece:
    """A trunk and a crown of four balls."""
    h = rng.uniform(1.2, 2.6)
    crown = rng.uniform(0.8, 1.6)
    balls = tuple(
        (
            rng.uniform(-0.6, 0.6) * crown,
            rng.uniform(-0.6, 0.6) * crown,
            h + rng.uniform(0.2, 1.6) * crown,
            crown * rng.uniform(0.6, 1.0),
            leaves,
        )
        for _ in range(4)
    )
    trunk = (0.0, 0.0, 0.0, 0.14, h + 0.5, bark)
    return Piece(drums=(trunk,), balls=balls)
