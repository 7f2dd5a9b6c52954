"""Images for pictures and screens: paintings, generated pictures, renders of other scenes."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flatdepth.resources import demo_file
from flatdepth.rooms.pictures import render_picture
from flatdepth.show.pictures import write_atomic
from render.looks import Looks

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
                file = self._art()[number % 5]
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

    def _art(self) -> list[Path]:
        """The paintings and prints of ``shards/demo_art``, reduced."""
        files: list[Path] = []
        with tarfile.open(Path(demo_file("shards/demo_art"), "demo_art-000000.tar")) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    file = self.folder / f"art_{len(files)}.png"
                    if not file.exists():
                        image = Image.open(tar.extractfile(member) or io.BytesIO()).convert("RGB")
                        image.thumbnail((640, 640))
                        buffer = io.BytesIO()
                        image.save(buffer, "PNG")
                        write_atomic(file, buffer.getvalue())
                    files.append(file)
        return files
