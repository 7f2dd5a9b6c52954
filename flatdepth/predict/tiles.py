"""One depth map from overlapping tiles: where they lie, how they are aligned and blended.

Everything here is a field whose unknowns are a scale and a shift: inverse depth (Ranftl et al.
2020, MiDaS), in which a plane stays a plane under both, or depth itself of affine networks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

_LEAST_SPREAD = 1e-6  # standard deviation over mean: the rounding of float32
_LEAST_CORRELATION = 0.5
_MOST_FITS = 20  # 4 or 5 are usual; rounding may make a cell come and go for ever


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def place(self) -> tuple[slice, slice]:
        """The rows and columns, to index an array with."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )


def tiles_of(height: int, width: int, side: int, overlap: int) -> Iterator[Tile]:
    """Tiles of ``side`` pixels that cover an image, row by row.

    They are spread evenly and overlap by at least ``overlap`` pixels; along an axis that is
    shorter than ``side`` they are as long as the image.
    """
    for top in _starts(height, side, overlap):
        for left in _starts(width, side, overlap):
            yield Tile(top, left, min(side, height), min(side, width))


def _starts(length: int, side: int, overlap: int) -> list[int]:
    if length <= side:
        return [0]
    steps = math.ceil((length - side) / (side - overlap))
    return [round(step * (length - side) / steps) for step in range(steps + 1)]


def align(
    tile: Float32[np.ndarray, "h w"], reference: Float32[np.ndarray, "h w"], cell: int
) -> Float32[np.ndarray, "h w"]:
    """The tile with the scale and shift that fit it best to the reference, both inverse depth.

    Means over cells of ``cell`` pixels are compared, the resolution of the reference: detail that
    only the tile has would count as noise in it and flatten the fit. Least squares in float64,
    refitted without the cells beyond three robust standard deviations (1.4826 MAD, Hampel 1974)
    until these are the same ones again: the first fit is drawn towards them, and so finds some of
    them only later. A tile whose correlation with the reference is below 0.5 was predicted without
    seeing enough (a blank wall); the reference is returned in its place.
    """
    x, y = _cell_means(tile, cell), _cell_means(reference, cell)
    kept = np.ones(x.size, bool)
    for _ in range(_MOST_FITS):
        scale, shift, correlation = _fit_line(x[kept], y[kept])
        residual = np.abs(scale * x + shift - y)
        within = residual <= max(3 * 1.4826 * float(np.median(residual)), 1e-12)
        if np.array_equal(within, kept):
            break
        kept = within
    if correlation < _LEAST_CORRELATION:
        return reference
    return (scale * tile.astype(np.float64) + shift).astype(np.float32)


def _cell_means(values: Float32[np.ndarray, "h w"], cell: int) -> Float64[np.ndarray, " n"]:
    """Means over whole cells; a rest at the lower or right border is left out."""
    height, width = values.shape
    tall, wide = min(cell, height), min(cell, width)
    rows, columns = height // tall, width // wide
    cells = values[: rows * tall, : columns * wide].reshape(rows, tall, columns, wide)
    return cells.mean(axis=(1, 3), dtype=np.float64).ravel()


def _fit_line(
    x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """Least-squares scale and shift with ``y = scale * x + shift``, and the correlation.

    Where x or y is constant there is nothing to scale: the scale and the correlation are 0.
    """
    mean_x, mean_y = float(x.mean()), float(y.mean())
    spread_x, spread_y = float(x.std()), float(y.std())
    if spread_x <= _LEAST_SPREAD * abs(mean_x) or spread_y <= _LEAST_SPREAD * abs(mean_y):
        return 0.0, mean_y, 0.0
    covariance = float((x - mean_x) @ (y - mean_y)) / x.size
    scale = covariance / spread_x**2
    return scale, mean_y - scale * mean_x, covariance / (spread_x * spread_y)


def blend(
    parts: Iterable[tuple[Tile, Float32[np.ndarray, "_ _"]]],
    height: int,
    width: int,
    overlap: int,
) -> Float32[np.ndarray, "h w"]:
    """The weighted mean of overlapping tiles, without seams.

    The weight of a tile falls to 0 at those of its sides that lie inside the image, as the square
    of a sine over ``overlap`` pixels, so the result is as continuous as the tiles are.
    """
    total = np.zeros((height, width), np.float32)
    weights = np.zeros((height, width), np.float32)
    for tile, values in parts:
        rows = _window(tile.top, tile.height, height, overlap)
        columns = _window(tile.left, tile.width, width, overlap)
        weight = (rows[:, None] * columns).astype(np.float32)
        total[tile.place] += weight * values
        weights[tile.place] += weight
    return total / weights


def _window(start: int, size: int, length: int, overlap: int) -> Float64[np.ndarray, " n"]:
    ramp = np.sin((np.arange(overlap) + 0.5) * (math.pi / 2 / overlap)) ** 2
    window = np.ones(size)
    if start > 0:
        window[:overlap] *= ramp
    if start + size < length:
        window[size - overlap :] *= ramp[::-1]
    return window
