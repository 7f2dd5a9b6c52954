"""Tiles: coverage, exact alignment in the presence of outliers, blending without seams."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.predict.tiles import Tile, align, blend, tiles_of

SIDES = st.integers(1, 300)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, side=st.integers(8, 80))
def test_tiles_cover_the_image_and_overlap(height: int, width: int, side: int) -> None:
    overlap = side // 4
    tiles = list(tiles_of(height, width, side, overlap))
    covered = np.zeros((height, width), int)
    for tile in tiles:
        assert (tile.height, tile.width) == (min(side, height), min(side, width))
        assert 0 <= tile.top <= height - tile.height
        assert 0 <= tile.left <= width - tile.width
        covered[tile.place] += 1
    assert covered.min() >= 1
    for starts in ({tile.top for tile in tiles}, {tile.left for tile in tiles}):
        steps = np.diff(sorted(starts))
        assert (steps <= side - overlap).all()


@settings(deadline=None)
@given(
    scale=st.floats(0.05, 20),
    shift=st.floats(-5, 5),
    outliers=st.floats(0, 0.2),
    seed=st.integers(0, 99),
)
def test_alignment_undoes_scale_and_shift(
    scale: float, shift: float, outliers: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    reference = draw.uniform(0.1, 2, (40, 50)).astype(np.float32)
    tile = ((reference.astype(np.float64) - shift) / scale).astype(np.float32)
    wrong = draw.uniform(size=tile.shape) < outliers
    tile[wrong] = draw.uniform(tile.min(), tile.max(), int(wrong.sum()))
    aligned = align(tile, reference, 1)
    # Rounding to float32 at the size of shift / scale limits what can be undone.
    rounding = 4e-7 * (abs(shift) + 2)
    assert np.abs(aligned - reference)[~wrong].max() < 10 * rounding


@pytest.mark.parametrize("kind", ["noise", "constant", "reversed"])
def test_a_tile_that_contradicts_the_reference_is_replaced(kind: str) -> None:
    reference = np.linspace(1, 2, 1200, dtype=np.float32).reshape(30, 40)
    noise = np.random.default_rng(0).uniform(size=(30, 40)).astype(np.float32)
    tile = {"noise": noise, "constant": np.full_like(noise, 3.3), "reversed": 5 - reference}[kind]
    np.testing.assert_array_equal(align(tile, reference, 2), reference)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, side=st.integers(24, 80))
def test_blending_parts_of_a_map_gives_the_map(height: int, width: int, side: int) -> None:
    whole = np.random.default_rng(1).uniform(0.5, 2, (height, width)).astype(np.float32)
    tiles = tiles_of(height, width, side, side // 4)
    blended = blend(((tile, whole[tile.place]) for tile in tiles), height, width, side // 4)
    np.testing.assert_allclose(blended, whole, rtol=1e-6)


@settings(deadline=None)
@given(
    height=st.integers(40, 300),
    width=st.integers(40, 300),
    side=st.integers(40, 80),
    seed=st.integers(0, 99),
)
def test_blending_has_no_seams(height: int, width: int, side: int, seed: int) -> None:
    """Constant tiles of different values: all change comes from the window, so it is bounded.

    A weight changes by at most pi / (2 overlap) per pixel, of two tiles at once, between values
    that differ by at most 1.
    """
    draw = np.random.default_rng(seed)
    overlap = side // 4
    parts: list[tuple[Tile, np.ndarray]] = []
    for tile in tiles_of(height, width, side, overlap):
        value = np.float32(draw.uniform(1, 2))
        parts.append((tile, np.full((tile.height, tile.width), value)))
    blended = blend(parts, height, width, overlap)
    for axis in (0, 1):
        assert np.abs(np.diff(blended, axis=axis)).max() <= math.pi / overlap


@settings(deadline=None)
@given(amplitude=st.floats(0, 3), cell=st.integers(2, 7))
def test_detail_of_the_tile_does_not_flatten_it(amplitude: float, cell: int) -> None:
    """The reference is the tile without detail, whose mean over each cell is 0."""
    rows, columns = 5 * cell + 1, 8 * cell + 2
    v, u = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    ramp = 1 + 0.03 * u + 0.05 * v
    detail = np.where(u % cell == 0, cell - 1.0, -1.0)
    tile = (ramp + amplitude * detail).astype(np.float32)
    aligned = align((0.4 * tile - 7).astype(np.float32), ramp.astype(np.float32), cell)
    np.testing.assert_allclose(aligned, tile, atol=3e-5)
