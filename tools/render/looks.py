"""Colours and surfaces; those of the bench are none of the training rooms'."""

from dataclasses import dataclass, replace

import numpy as np

from render.model import Colour, Surface, rgb

WHITE = Surface(rgb("eeece6"), roughness=0.45)
BLACK = Surface(rgb("161616"), roughness=0.35)
CHROME = Surface(rgb("c9c9c9"), metallic=1.0, roughness=0.25)
BRASS = Surface(rgb("b08d4a"), metallic=1.0, roughness=0.35)
LEAF = Surface(rgb("1f3d16"), rgb("4f7a2c"), "mottled", 0.6, roughness=0.45)

_WALLS = {
    False: "f2efe8 e8e2d5 dcdcd8 cfd6cf c7d3dc b9c4b1 d9c2a9 e5d3c4 9fb0a4 7f8f9c b98a74 3f5566 "
    "d8cba6 f5f3ee e9e9e9 c4b6a6 8c9a7b a85f4c",
    True: "efe9dd e4e6e8 d3cdc2 bfcbd6 a8b8a0 e0cfc3 c9b58f 6c7d8e 8a6d5f 556b5c f3f0ea dedbe4 "
    "b7a3a8 2f4a4f caa07c 9c9c94",
}
_CLOTHS = {
    False: "5b6470 8a8378 3f5a6b a6563f c3b59a 2f4637 7a4b57 b9862f d6d0c4 43434a 6f8a91 9a7b5f",
    True: "4a5548 94705a 2d4258 b07a6a cdbfae 615a72 86302f 6f7f3f e0dad0 37393d 88a0a0 c28f4a",
}
_WOODS = {
    False: "c9a06c/a87d4b 8a5a34/6b4226 5a3a24/3e2717 d9bf95/c2a273 a67c52/8c6239 b5b0a5/98928a",
    True: "bd8f5e/9b6f42 76492c/5a3520 4a3122/2f1f15 e0c9a4/cbb086 93704e/795a3b 8f8a80/736e66",
}
_BRICKS = {
    False: "8c4a38/a55d47 b0705a/94533f cfc9bf/ddd8d0",
    True: "7a3d30/955040 a8806a/8b6350 e2ddd4/c9c3b8",
}
_WALLPAPERS = {False: ("stripes", "leaves", "dots"), True: ("checks", "rug", "leaves", "stripes")}
_LAMPLIGHTS = ("ffcf9c", "ffd9ae", "ffe3c4", "fff0de")


def tinted(rng: np.random.Generator, colour: Colour, amount: float = 0.06) -> Colour:
    """A colour a little off."""
    red, green, blue = np.clip(np.array(colour) * rng.normal(1, amount, 3), 0.005, 0.95)
    return float(red), float(green), float(blue)


def dimmed(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return red * factor, green * factor, blue * factor


@dataclass
class Looks:
    """Draws surfaces; each call is another draw.

    Attributes:
        is_tidy: nothing is to stand on the furniture.
    """

    rng: np.random.Generator
    is_bench: bool
    is_tidy: bool = False

    def pick(self, names: str | tuple[str, ...]) -> str:
        choices = names.split() if isinstance(names, str) else names
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def pair(self, names: str) -> tuple[Colour, Colour]:
        one, two = self.pick(names).split("/")
        return tinted(self.rng, rgb(one)), tinted(self.rng, rgb(two))

    def wall_colour(self) -> Colour:
        return tinted(self.rng, rgb(self.pick(_WALLS[self.is_bench])), 0.03)

    def paint(self) -> Surface:
        return Surface(self.wall_colour(), roughness=self.between(0.5, 0.9), bump=0.001)

    def accent(self) -> Surface:
        """A wall that is not just painted."""
        return self._wall("wallpaper wallpaper bricks concrete boards paint")

    def facade(self) -> Surface:
        return self._wall("bricks bricks concrete paint paint paint")

    def _wall(self, kinds: str) -> Surface:
        match self.pick(kinds):
            case "wallpaper":
                colour = self.wall_colour()
                other = tinted(self.rng, dimmed(colour, 0.75), 0.15)
                pattern = self.pick(_WALLPAPERS[self.is_bench])
                return Surface(colour, other, pattern, self.between(0.08, 0.35), roughness=0.8)
            case "bricks":
                return Surface(*self.pair(_BRICKS[self.is_bench]), "bricks", 1, 0.85, bump=0.006)
            case "concrete":
                grey = tinted(self.rng, rgb("9a9894"))
                return Surface(
                    grey, tinted(self.rng, rgb("b9b6b0")), "mottled", 2.0, 0.75, bump=0.002
                )
            case "boards":
                return replace(self.wood(), pattern="planks", size=self.between(0.09, 0.2))
        return self.paint()

    def wood(self) -> Surface:
        light, dark = self.pair(_WOODS[self.is_bench])
        return Surface(light, dark, "wood", self.between(0.6, 1.4), self.between(0.25, 0.6))

    def cabinet(self) -> Surface:
        """Of furniture with doors: wood or lacquer."""
        return self.wood() if self.chance(0.6) else replace(self.paint(), roughness=0.35, bump=0.0)

    def cloth(self, size: float = 1.0) -> Surface:
        colour = tinted(self.rng, rgb(self.pick(_CLOTHS[self.is_bench])))
        pattern = self.pick("fabric fabric fabric stripes checks leaves")
        other = tinted(self.rng, colour, 0.12)
        if pattern != "fabric":
            other = self.cloth_colour()
        return Surface(colour, other, pattern, size * self.between(0.1, 0.3), 0.9, bump=0.001)

    def cloth_colour(self) -> Colour:
        return tinted(self.rng, rgb(self.pick(_CLOTHS[self.is_bench])))

    def plain_cloth(self) -> Surface:
        colour = self.cloth_colour()
        return Surface(colour, tinted(self.rng, colour, 0.1), "fabric", 1.0, 0.9, bump=0.0015)

    def rug(self) -> Surface:
        pattern = self.pick("rug fabric stripes checks dots leaves")
        size = self.between(0.15, 0.5)
        return Surface(self.cloth_colour(), self.cloth_colour(), pattern, size, 0.95, bump=0.002)

    def floor(self) -> Surface:
        match self.pick("planks planks planks tiles tiles carpet concrete marble checks"):
            case "planks":
                light, _ = self.pair(_WOODS[self.is_bench])
                return Surface(
                    light,
                    tinted(self.rng, light, 0.15),
                    "planks",
                    self.between(0.07, 0.22),
                    self.between(0.2, 0.5),
                )
            case "tiles":
                colour = tinted(self.rng, rgb(self.pick("d6d2ca b5aea3 8f8a84 c9b59b 6d6a68")))
                other = tinted(self.rng, colour, 0.05)
                return Surface(colour, other, "tiles", self.between(0.2, 0.7), 0.25, bump=0.002)
            case "carpet":
                return replace(self.plain_cloth(), roughness=1.0, bump=0.004)
            case "concrete":
                return Surface(rgb("8b8985"), rgb("a9a6a1"), "mottled", 2.5, 0.4)
            case "marble":
                return Surface(rgb("e6e3de"), rgb("b3aea8"), "marble", 1.5, 0.15)
        colour, other = tinted(self.rng, rgb("d9d4c8")), tinted(self.rng, rgb("4a4642"))
        return Surface(colour, other, "checks", self.between(0.25, 0.45), 0.3)

    def stone(self) -> Surface:
        return Surface(*self.pair("e6e3de/a8a39c 3a3a3c/55555a d6c8b4/b8a58c"), "marble", 1.0, 0.2)

    def thing(self) -> Surface:
        """Of clutter: books, vases, boxes."""
        colour = tinted(
            self.rng, rgb(self.pick(f"{_CLOTHS[self.is_bench]} {_WALLS[self.is_bench]}"))
        )
        return Surface(colour, roughness=self.between(0.15, 0.8))

    def metal(self) -> Surface:
        return (BLACK, CHROME, BRASS)[self.rng.integers(3)]

    def lamplight(self) -> Colour:
        return rgb(self.pick(_LAMPLIGHTS))
