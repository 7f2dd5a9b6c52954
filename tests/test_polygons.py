"""Outlines drawn by hand, against half-planes and shapes of known area."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flatdepth.data.polygons import Outline, draw_outlines, read_labelme, write_labelme
from flatdepth.errors import BadFrame
from flatdepth.types import Region

HEIGHT, WIDTH = 24, 32


def outline(label: str, *parts: list[list[float]]) -> Outline:
    return Outline(label=label, parts=tuple(np.array(part, np.float64) for part in parts))


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


@given(arrays(np.float64, (3, 2), elements=st.floats(-8, 40)))
def test_a_triangle_covers_the_pixels_whose_centres_are_inside(corners: np.ndarray) -> None:
    region, number = draw_outlines([Outline(label="mirror", parts=(corners,))], HEIGHT, WIDTH)
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    sides = np.roll(corners, -1, axis=0) - corners
    beside = [dx * (v - y) - dy * (u - x) for (x, y), (dx, dy) in zip(corners, sides, strict=True)]
    clear = np.abs(beside).min(axis=0) > 1e-6
    inside = (np.array(beside) > 0).all(axis=0) | (np.array(beside) < 0).all(axis=0)
    np.testing.assert_array_equal((region == Region.MIRROR)[clear], inside[clear])
    np.testing.assert_array_equal(number == 1, region == Region.MIRROR)


def test_a_box_between_pixel_corners_covers_them_exactly() -> None:
    region, _ = draw_outlines([outline("Poster ", box(3, 5, 10, 9))], HEIGHT, WIDTH)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[5:9, 3:10] = Region.ART
    np.testing.assert_array_equal(region, expected)


def test_a_part_in_another_is_a_hole() -> None:
    region, _ = draw_outlines(
        [outline("mirror", box(2, 2, 20, 20), box(5, 5, 8, 8))], HEIGHT, WIDTH
    )
    assert int((region == Region.MIRROR).sum()) == 18 * 18 - 3 * 3
    assert not region[5:8, 5:8].any()


def test_later_outlines_lie_over_earlier_ones() -> None:
    drawn = [
        outline("frame", box(1, 1, 21, 21)),
        outline("mirror", box(3, 3, 19, 19)),
        outline("object", box(0, 15, 8, 24)),
        outline("cat", box(0, 0, 32, 24)),
        outline("screen", box(24, 3, 30, 9)),
    ]
    region, number = draw_outlines(drawn, HEIGHT, WIDTH)
    assert region[1, 1] == Region.FRAME and region[3, 3] == Region.MIRROR
    assert region[16, 4] == Region.BACKGROUND and region[5, 25] == Region.ART
    assert number[3, 3] == 1 and number[5, 25] == 2 and number[16, 4] == 0 and number[1, 1] == 0


def test_files_come_back() -> None:
    drawn = [outline("mirror", [[1.25, 2], [9, 3.5], [4, 20]]), outline("tv", box(3, 3, 9, 9))]
    payload = write_labelme(drawn, "a.jpg", WIDTH, HEIGHT)
    assert json.loads(payload)["imagePath"] == "a.jpg"
    back = read_labelme(payload, WIDTH, HEIGHT)
    assert [one.label for one in back] == ["mirror", "tv"]
    for one, other in zip(back, drawn, strict=True):
        np.testing.assert_array_equal(one.parts[0], other.parts[0])


def test_rectangles_are_two_corners() -> None:
    shape = {"label": "mirror", "points": [[10, 9], [3, 5]], "shape_type": "rectangle"}
    other = {"label": "x", "points": [[1, 1], [2, 2]], "shape_type": "circle"}
    about = {"shapes": [shape, other]}
    (found,) = read_labelme(json.dumps(about).encode(), WIDTH, HEIGHT)
    region, _ = draw_outlines([found], HEIGHT, WIDTH)
    assert region[5:9, 3:10].all() and int((region > 0).sum()) == 28


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b'{"shapes": [1]}',
        b'{"shapes": [{"label": "a", "points": [[0, 0], [1, 1]]}]}',
        b'{"shapes": [{"label": "a", "points": [[0, 0], [1, 1], [1e999, 2]]}]}',
        b'{"shapes": [{"label": "a", "points": "abc"}]}',
        b'{"shapes": [], "imageWidth": 31}',
    ],
)
def test_what_is_no_file_of_outlines_for_the_image_is_damage(payload: bytes) -> None:
    with pytest.raises(BadFrame, match="outlines"):
        read_labelme(payload, WIDTH, HEIGHT)
