"""Albedo textures as mip pyramids."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32

TEXTURE_SIZE = 256
_LEVELS = int(math.log2(TEXTURE_SIZE)) + 1
_LEVEL_STARTS = np.cumsum(
    [0] + [(TEXTURE_SIZE >> level) ** 2 for level in range(_LEVELS - 1)]
).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint:
    """A tileable albedo texture.

    Attributes:
        pyramid: all mip levels from the finest down, each in row-major order, linear RGB.
        period_m: the side of one tile.
    """

    pyramid: Float32[np.ndarray, "p 3"]
    period_m: float

    @classmethod
    def from_texture(cls, texture: Float[np.ndarray, "t t 3"], period_m: float) -> "Paint":
        level = texture.astype(np.float32)
        levels = [level.reshape(-1, 3)]
        while len(level) > 1:
            half = level[0::2] + level[1::2]
            level = (half[:, 0::2] + half[:, 1::2]) * np.float32(0.25)
            levels.append(level.reshape(-1, 3))
        return cls(pyramid=np.concatenate(levels), period_m=period_m)

    @property
    def mean(self) -> Float32[np.ndarray, "3"]:
        """The coarsest level: the average albedo."""
        return self.pyramid[-1]

    @property
    def texel_m(self) -> float:
        """Side of a texel of the finest level."""
        return self.period_m / TEXTURE_SIZE

    def texels(
        self,
        s: Float[np.ndarray, " n"],
        t: Float[np.ndarray, " n"],
        level: Float32[np.ndarray, " n"],
    ) -> Int32[np.ndarray, " n"]:
        """Rows of the pyramid at (s, t) metres on the nearest mip level."""
        lod = np.clip(np.rint(level), 0, _LEVELS - 1).astype(np.int32)
        scale = TEXTURE_SIZE / self.period_m
        column = np.floor(s * scale).astype(np.int32) & (TEXTURE_SIZE - 1)
        row = np.floor(t * scale).astype(np.int32) & (TEXTURE_SIZE - 1)
        return _LEVEL_STARTS[lod] + (((row >> lod) << (_LEVELS - 1 - lod)) + (column >> lod))
