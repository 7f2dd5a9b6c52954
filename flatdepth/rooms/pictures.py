"""Pictures to hang on walls: deep views, each in some style."""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flatdepth.rooms.colour import develop
from flatdepth.rooms.lightmap import bake
from flatdepth.rooms.motifs import MOTIFS
from flatdepth.rooms.shade import shade
from flatdepth.rooms.streams import Kind, stream
from flatdepth.rooms.styles import STYLES

_ASPECTS = (0.7, 0.75, 1.0, 4 / 3, 1.5, 16 / 9)


def render_picture(
    seed: int, picture: int, height: int = 252, width: int = 336
) -> tuple[UInt8[np.ndarray, "h w 3"], dict[str, object]]:
    """Draw one picture.

    Motifs and styles take turns, so that even a small collection has all of them.

    Args:
        seed, picture: non-negative integers that decide everything but the resolution.
        height, width: the picture has about this many pixels in all; its aspect ratio varies.

    Returns:
        sRGB image and ``{"motif": ..., "style": ...}``.
    """
    rng = stream(Kind.PICTURE, seed, picture)
    motif = list(MOTIFS)[picture % len(MOTIFS)]
    style = list(STYLES)[picture // len(MOTIFS) % len(STYLES)]
    aspect = _ASPECTS[rng.integers(len(_ASPECTS))]
    side = math.sqrt(height * width)
    scene, camera = MOTIFS[motif](
        rng, round(side / math.sqrt(aspect)), round(side * math.sqrt(aspect))
    )
    image = develop(shade(scene, bake(scene), camera), exposure=rng.uniform(0.8, 1.2))
    styled = STYLES[style](rng, Image.fromarray(image))
    return np.asarray(styled), {"motif": motif, "style": style}
