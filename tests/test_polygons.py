"""Outlines drawn by hand, against half-planes and shapes of known area."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from flatdepth.data.polygons import (
    Outline,
    draw_outlines,
    read_labelme,
    unknown_labels,
    write_labelme,
)
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


def labelme(*shapes: dict[str, object]) -> list[Outline]:
    return read_labelme(json.dumps({"shapes": shapes}).encode(), WIDTH, HEIGHT)


def test_rectangles_are_two_corners() -> None:
    shape = {"label": "mirror", "points": [[10, 9], [3, 5]], "shape_type": "rectangle"}
    region, _ = draw_outlines(labelme(shape), HEIGHT, WIDTH)
    assert region[5:9, 3:10].all() and int((region > 0).sum()) == 28


def test_circles_are_a_centre_and_a_point_of_them() -> None:
    shape = {"label": "mirror", "points": [[15, 12], [18, 16]], "shape_type": "circle"}
    region, _ = draw_outlines(labelme(shape), HEIGHT, WIDTH)
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    away = np.hypot(u - 15, v - 12)
    clear = np.abs(away - 5) > 0.01
    np.testing.assert_array_equal((region > 0)[clear], (away < 5)[clear])


def test_masks_lie_at_their_first_point_and_are_cut_off_at_the_edge() -> None:
    patch = np.array([[0, 255, 255], [9, 0, 1]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(patch).save(file, "PNG")
    for left, top in ((4, 7), (WIDTH - 2, -1)):
        shape = {
            "label": "mirror",
            "points": [[left, top], [left + 2, top + 1]],
            "shape_type": "mask",
            "mask": base64.b64encode(file.getvalue()).decode(),
        }
        region, _ = draw_outlines(labelme(shape), HEIGHT, WIDTH)
        expected = np.zeros((HEIGHT + 4, WIDTH + 4), np.uint8)
        expected[top + 2 : top + 4, left : left + 3] = patch > 0
        np.testing.assert_array_equal(region, expected[2 : HEIGHT + 2, :WIDTH])


def test_shapes_of_one_group_are_one_thing() -> None:
    parts = [box(2, 2, 6, 6), box(4, 4, 9, 9), box(12, 12, 15, 15)]
    shapes = [{"label": "mirror", "points": part, "group_id": 3} for part in parts]
    other = {"label": "tv", "points": box(20, 2, 24, 4), "group_id": 3}
    alone = {"label": "mirror", "points": box(20, 12, 24, 15), "group_id": None}
    found = labelme(*shapes, other, alone)
    _, number = draw_outlines(found, HEIGHT, WIDTH)
    assert [one.label for one in found] == ["mirror", "tv", "mirror"]
    assert int((number == 1).sum()) == 16 + 25 - 4 + 9 and int((number == 2).sum()) == 12
    assert unknown_labels(found) == {"tv": 1}


def test_an_illusion_in_another_is_a_hole_and_a_mirror_in_another_is_not() -> None:
    inner, outer, beside = box(5, 5, 8, 8), box(2, 2, 20, 20), box(22, 2, 26, 6)
    for label, area in (("illu", 18 * 18 - 9 + 16), ("mirror", 18 * 18 + 16)):
        shapes = [{"label": label, "points": part} for part in (inner, outer, beside, outer)]
        region, number = draw_outlines(labelme(*shapes[:3]), HEIGHT, WIDTH)
        assert int((region > 0).sum()) == area
        assert int(number.max()) == (2 if label == "illu" else 3)
        assert draw_outlines(labelme(*shapes), HEIGHT, WIDTH)[0].any()


def test_what_surrounds_nothing_is_told_by_its_label() -> None:
    shapes = [
        {"label": "mirror", "points": [[1, 1], [2, 2]], "shape_type": kind}
        for kind in ("line", "polygon", None)
    ]
    found = labelme(*shapes)
    assert unknown_labels(found) == {"mirror (line)": 1, "mirror (2 points)": 2}
    assert not draw_outlines(found, HEIGHT, WIDTH)[0].any()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b'{"shapes": [1]}',
        b'{"shapes": [{"label": "a", "points": [[0, 0], [1]]}]}',
        b'{"shapes": [{"label": "a", "points": [[0, 0]], "shape_type": "mask", "mask": "?"}]}',
        b'{"shapes": [{"label": "a", "points": [[0, 0], [1, 1], [1e999, 2]]}]}',
        b'{"shapes": [{"label": "a", "points": "abc"}]}',
        b'{"shapes": [], "imageWidth": 31}',
    ],
)
def test_what_is_no_file_of_outlines_for_the_image_is_damage(payload: bytes) -> None:
    with pytest.raises(BadFrame, match="outlines"):
        read_labelme(payload, WIDTH, HEIGHT)
