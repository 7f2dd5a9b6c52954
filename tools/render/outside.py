"""What windows open on, and the light that comes from there."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from render.looks import Looks, dimmed, tinted
from render.model import Model, Surface, rgb
from render.stage import Lamp, Stage


class Side(Protocol):
    x: float
    y: float
    turn: float
    length: float


def surroundings(stage: Stage, looks: Looks, ground: float, walls: Sequence[Side]) -> None:
    """Ground, houses and trees before the given walls, ``ground`` below the floor."""
    model = stage.model
    green = Surface(rgb("3d5227"), rgb("66763a"), "mottled", 3.0, 0.95)
    paved = Surface(rgb("77736c"), rgb("8d8a84"), "mottled", 4.0, 0.9)
    reach = 150.0
    corner, sides = (-reach, -reach, ground), ((2 * reach, 0, 0), (0, 2 * reach, 0))
    model.quad(corner, *sides, green if looks.chance(0.6) else paved)
    for wall in walls:
        with model.at(wall.x, wall.y, ground, turn=wall.turn):
            row_of_houses(model, looks, wall.length / 2, -looks.between(9, 35))
            for _ in range(int(looks.rng.integers(1, 6))):
                x = looks.between(-8, wall.length + 8)
                tree(model, looks, x, -looks.between(5, 16))
            if looks.chance(0.4):
                hedge = Surface(rgb("22351a"), rgb("3d5a26"), "mottled", 0.5, 0.9, bump=0.03)
                model.box((0, -looks.between(4, 7)), 0, (40, 0.6, looks.between(0.8, 1.5)), hedge)


def row_of_houses(model: Model, looks: Looks, middle: float, y: float) -> None:
    x = middle - 45.0
    while x < middle + 45:
        width, high = looks.between(6, 14), looks.between(2, 6) // 1 * 3.0 + 0.9
        if looks.chance(0.85):
            wall = Surface(looks.wall_colour(), (0, 0, 0), "facade", looks.between(2.0, 3.2), 0.8)
            roof = Surface(
                tinted(looks.rng, rgb(looks.pick("6b3f33 4a4648 7d4a38"))), roughness=0.9
            )
            model.box((x + width / 2, y - 5), 0, (width, 10, high), wall, round_m=0.02)
            with model.at(x, y - 5, high):
                if looks.chance(0.6):
                    gable = np.array([(0, -5.3, 0), (0, 5.3, 0), (0, 0, 3.0)])
                    other = gable + np.array([width, 0, 0])
                    faces = [[0, 1, 2], [3, 5, 4], [1, 4, 5, 2], [0, 2, 5, 3]]
                    model.add(np.concatenate([gable, other]), faces, roof)
        x += width


def tree(model: Model, looks: Looks, x: float, y: float) -> None:
    tall = looks.between(3, 8)
    bark = Surface(rgb("4a3826"), rgb("2c2118"), "wood", 0.5, 0.9)
    colour = tinted(looks.rng, rgb(looks.pick("2d4a1c 40602a 56702f 6d7a35 8a6a2a")), 0.1)
    crown = Surface(dimmed(colour, 0.35), colour, "mottled", 0.5, 0.9, bump=0.15)
    with model.at(x, y):
        model.lathe((0, 0), [(0.05 * tall / 2, 0), (0.025 * tall, tall * 0.6)], bark, sides=8)
        for _ in range(9):
            around, out = looks.between(0, 2 * math.pi), looks.between(0, 0.2) * tall
            z = tall * looks.between(0.5, 0.95)
            r = tall * looks.between(0.09, 0.17)
            centre = (out * math.cos(around), out * math.sin(around), z)
            model.ball(centre, (r, r, r * 0.85), crown, rows=6)


def daylight(stage: Stage, looks: Looks, night: bool, turns: Sequence[float]) -> None:
    """Sky and sun; by day the sun often stands where it shines through a wall so turned."""
    if night:
        stage.horizon, stage.zenith, stage.sky_radiance = rgb("4a5a80"), rgb("101830"), 0.12
        return
    overcast = looks.chance(0.35)
    stage.zenith = rgb("b9c3cf") if overcast else rgb(looks.pick("6f8fc0 5f82b8 86a3c8"))
    stage.horizon = rgb("dfe3e6") if overcast else rgb(looks.pick("dde2e8 ece4d8 dfe6ee"))
    stage.sky_radiance = looks.between(0.8, 1.4)
    if overcast:
        return
    outward = (turns[int(looks.rng.integers(len(turns)))] if turns else 0.0) - math.pi / 2
    if looks.chance(0.3):
        outward += math.pi
    around, up = outward + looks.between(-1.0, 1.0), looks.between(0.3, 1.0)
    aim = (-math.cos(around) * math.cos(up), -math.sin(around) * math.cos(up), -math.sin(up))
    warm = rgb("fff3e0") if up > 0.5 else rgb("ffd9a8")
    stage.lamps.append(Lamp("SUN", (0, 0, 50), looks.between(5, 15), warm, aim))
