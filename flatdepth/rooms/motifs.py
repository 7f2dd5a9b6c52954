"""What generated pictures show: rooms, corridors, streets and landscapes, all of them deep.

A motif is a function of a generator and a size in pixels that returns a scene and a view of it.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flatdepth.rooms import textures
from flatdepth.rooms.build import Builder, Piece, box, centred
from flatdepth.rooms.camera import Camera
from flatdepth.rooms.interior import build_room
from flatdepth.rooms.outdoors import draw_sky, house, towards_sun, tree
from flatdepth.rooms.pose import place_camera
from flatdepth.rooms.scene import Scene, Sun
from flatdepth.rooms.streams import Rng
from flatdepth.rooms.surfaces import Ball, Coat

View = tuple[Scene, Camera]

_FAR = Coat(hazy=True, spacing_m=3.0)
_NEAR = Coat(hazy=True, spacing_m=0.7)


def interior(rng: Rng, height: int, width: int) -> View:
    """A furnished room, seen along its length."""
    size = np.array([rng.uniform(3, 7), rng.uniform(6, 12), rng.uniform(2.4, 3.8)])
    scene = build_room(rng, size)
    cameras = [place_camera(rng, scene, height, width) for _ in range(6)]
    deepest = max(cameras, key=lambda c: scene.sight(c.position, c.rotation[None, :, 2])[0])
    return scene, deepest


def corridor(rng: Rng, height: int, width: int) -> View:
    """A long narrow room, seen from one end."""
    size = np.array([rng.uniform(1.9, 3.2), rng.uniform(10, 24), rng.uniform(2.4, 3.4)])
    scene = build_room(rng, size, furnished=False)
    camera = Camera.looking(
        np.array([rng.uniform(0.35, 0.65) * size[0], 0.8, rng.uniform(1.3, 1.7)]),
        yaw=rng.uniform(-0.12, 0.12),
        pitch=rng.uniform(-0.1, 0.03),
        fov=math.radians(rng.uniform(55, 80)),
        height=height,
        width=width,
    )
    return scene, camera


def street(rng: Rng, height: int, width: int) -> View:
    """A road between houses, trees along it, seen from eye level."""
    build = Builder()
    half, kerb = rng.uniform(3, 5), rng.uniform(1.6, 2.6)
    asphalt = build.paint(rng, textures.carpet, "6b6b6e 7d7a74 8a8278", 3.0)
    paving = build.paint(rng, textures.tiles, textures.STONES, 4.0)
    grass = build.paint(rng, textures.leaves, textures.GREENS, 3.0)
    white = build.paint(rng, textures.plain, "e8e6e0", 3.0)
    leaves = build.paint(rng, textures.leaves, textures.GREENS, 1.5)
    bark = build.paint(rng, textures.wood, textures.WOODS, 1.0)
    facades = [build.paint(rng, textures.facade, textures.FACADES, 5.0) for _ in range(4)]
    facades += [build.paint(rng, textures.bricks, textures.BRICKS, 3.0)]
    glass = build.paint(rng, textures.plain, "39434d 4b5966", 3.0)
    build.lay((-160, 160), (-10, 240), 0.0, Coat(paint=grass, spacing_m=20, hazy=True))
    build.lay((-half, half), (-10, 240), 0.01, Coat(paint=asphalt, spacing_m=2, hazy=True))
    for x in (-half - kerb, half):
        build.lay((x, x + kerb), (-10, 160), 0.1, Coat(paint=paving, spacing_m=1.5, hazy=True))
    for y in np.arange(4, 90, 5.0):
        mark = Piece(boxes=(centred(0.08, 1, 0, 0.02, white),))
        build.place(mark, 0, y, coat=_FAR, solid=False)
    for side in (-1, 1):
        turn = side * math.pi / 2
        y = rng.uniform(-2, 4)
        while y < 110:
            length = rng.uniform(6, 13)
            terrace = _terrace(rng, length, facades[rng.integers(len(facades))], glass, white)
            if rng.random() < 0.85:
                build.place(terrace, side * (half + kerb), y + length / 2, turn, coat=_FAR)
            y += length + (0 if rng.random() < 0.6 else rng.uniform(1.5, 5))
        for y in np.arange(rng.uniform(5, 9), 70, rng.uniform(8, 13)):
            if rng.random() < 0.65:
                build.place(tree(rng, leaves, bark), side * (half + 0.6), y, z=0.1, coat=_NEAR)
    return _outdoor_view(rng, build, rng.uniform(-0.9, 0.9) * half, height, width)


def _terrace(rng: Rng, length: float, wall: int, glass: int, trim: int) -> Piece:
    """A house whose front is at y = 0, and its windows, which stand out a little."""
    storeys, bay = int(rng.integers(2, 5)), length / max(2, round(length / 2.6))
    top = 3.1 * storeys + rng.uniform(0.3, 0.8)
    walls = (
        box(-length / 2, length / 2, -8, 0, 0, top, wall),
        box(-length / 2, length / 2, -8.2, 0.25, top, top + 0.3, trim),
    )
    windows = []
    for storey in range(storeys):
        for x in np.arange(-length / 2 + bay / 2, length / 2, bay):
            z = 3.1 * storey + 0.95
            windows.append(box(x - 0.6, x + 0.6, -0.1, 0.04, z - 0.08, z + 1.58, trim))
            windows.append(box(x - 0.52, x + 0.52, -0.1, 0.05, z, z + 1.5, glass))
    return Piece(boxes=walls, details=tuple(windows))


def landscape(rng: Rng, height: int, width: int) -> View:
    """Rolling hills behind fields, a road lined with trees and posts, a few houses."""
    build = Builder()
    leaves = build.paint(rng, textures.leaves, textures.GREENS, 1.5)
    bark = build.paint(rng, textures.wood, textures.WOODS, 1.0)
    crops, earth = textures.GREENS + " b39a4f c2a85a", textures.GREENS + " 8a6b45 b3924f"
    fields = [build.paint(rng, textures.leaves, crops, 9.0) for _ in range(3)]
    furrows = [build.paint(rng, textures.stripes, earth, 14.0) for _ in range(2)]
    road = build.paint(rng, textures.carpet, "a8977a 8f8778 c0ad8a", 4.0)
    walls = [build.paint(rng, textures.facade, textures.FACADES, 5.0) for _ in range(2)]
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
                build.place(tree(rng, leaves, bark), side, y, coat=_NEAR)
            else:
                post = Piece(boxes=(centred(0.08, 0.08, 0, 1.3, bark),))
                build.place(post, side, y, coat=_FAR)
    for _ in range(rng.integers(2, 6)):
        x, y = rng.choice([-1, 1]) * rng.uniform(12, 40), rng.uniform(25, 85)
        build.place(house(rng, walls[0], walls[1]), x, y, rng.uniform(-1, 1), coat=_FAR)
    return _outdoor_view(rng, build, lane + wide / 2, height, width)


def _outdoor_view(rng: Rng, build: Builder, x: float, height: int, width: int) -> View:
    """Under a sky and a sun from the side, looking along +y from x at eye level or higher."""
    sun = Sun(
        direction=towards_sun(rng, rng.choice([-1.9, 1.9, 2.6, -2.6])),
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
    return build.scene(draw_sky(rng), sun), camera


MOTIFS: dict[str, Callable[[Rng, int, int], View]] = {
    "interior": interior,
    "corridor": corridor,
    "street": street,
    "landscape": landscape,
}
