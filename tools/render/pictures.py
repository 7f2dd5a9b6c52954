"""Images for pictures and screens: paintings, generated pictures, renders of other scenes."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flatdepth.rooms.pictures import render_picture
from flatdepth.show.pictures import write_atomic
from render.looks import Looks

ART = sorted((Path(__file__).parent / "art").glob("*.jpg"))
"""Paintings and prints in the public domain (credits beside them), none of ``shards/demo_art``."""

PAINTED, RENDERED = 48, 36
"""How many generated pictures and renders there are to draw from."""

SEED = 90210
"""Of the generated pictures: none that training draws by itself."""


@dataclass(frozen=True)
class Pictures:
    """A folder of images, made when they are first drawn.

    Attributes:
        photograph: renders the scene of a number, (h, w, 3) uint8.
    """

    folder: Path
    photograph: Callable[[int], np.ndarray]

    def draw(self, looks: Looks) -> tuple[str, float]:
        """A file and its width over height."""
        kind, number = (
            looks.pick("art art paint paint photo photo photo"),
            int(looks.rng.integers(2**31)),
        )
        match kind:
            case "art":
                file = ART[number % len(ART)]
            case "paint":
                file = self._made("paint", number % PAINTED, lambda k: render_picture(SEED, k)[0])
            case _:
                file = self._made("photo", number % RENDERED, self.photograph)
        with Image.open(file) as image:
            return str(file), image.width / image.height

    def _made(self, kind: str, number: int, make: Callable[[int], np.ndarray]) -> Path:
        file = self.folder / f"{kind}_{number:02d}.png"
        if not file.exists():
            buffer = io.BytesIO()
            Image.fromarray(make(number)).save(buffer, "PNG")
            write_atomic(file, buffer.getvalue())
        return file
