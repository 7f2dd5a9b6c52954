"""Connected components, against scipy's and against areas drawn by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from flatdepth.data.components import components

ndimage = pytest.importorskip("scipy.ndimage")


@given(
    arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 2))
)
def test_areas_are_those_of_scipy_per_value(values: np.ndarray) -> None:
    found = components(values)
    assert np.array_equal(found > 0, values > 0)
    for value in (1, 2):
        own, count = ndimage.label(values == value, np.ones((3, 3)))
        pairs = {*zip(own[own > 0].tolist(), found[own > 0].tolist(), strict=True)}
        assert len(pairs) == count == len({number for _, number in pairs})


def test_numbers_follow_the_first_pixels() -> None:
    values = np.array([[0, 7, 0, 5], [7, 0, 0, 5], [0, 0, 7, 7]], np.uint8)
    expected = [[0, 1, 0, 2], [1, 0, 0, 2], [0, 0, 3, 3]]
    np.testing.assert_array_equal(components(values), expected)


def test_a_spiral_is_one_area() -> None:
    values = np.zeros((41, 41), np.uint8)
    row, column, steps = 20, 20, [(0, 1), (1, 0), (0, -1), (-1, 0)]
    for leg in range(36):
        for _ in range(2 * (leg // 2 + 1)):
            if 0 <= row < 41 and 0 <= column < 41:
                values[row, column] = 3
            row, column = row + steps[leg % 4][0], column + steps[leg % 4][1]
    assert components(values).max() == 1 and (values == 0).sum() > 600
