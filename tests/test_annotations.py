"""COCO, CVAT and LabelMe: the same outlines from each, run lengths against ones worked by hand."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from flatdepth.data.annotations import decode_rle, parse_outlines
from flatdepth.data.polygons import draw_outlines, unknown_labels
from flatdepth.errors import BadFrame

HEIGHT, WIDTH = 24, 32
MIRROR = [(3.0, 2.5), (14.0, 4.0), (12.5, 20.0), (2.0, 18.0)]
POSTER = [(18.0, 6.0), (29.0, 7.0), (28.0, 15.0), (19.0, 14.0)]


def coco(*annotations: dict[str, object], images: list[dict[str, object]] | None = None) -> bytes:
    own = {"id": 4, "file_name": "a/1.jpg", "height": HEIGHT, "width": WIDTH}
    names = ["mirror", "poster", "cat"]
    about = {
        "images": images or [own],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": 4} | one for i, one in enumerate(annotations)],
    }
    return json.dumps(about).encode()


def cvat(shapes: str, image: str = "a/1.jpg") -> bytes:
    head = f'<image id="0" name="{image}" width="{WIDTH}" height="{HEIGHT}">'
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{head}{shapes}'
        "</image></annotations>"
    ).encode()


def drawn(payload: bytes, image: str = "a/1.jpg") -> tuple[np.ndarray, np.ndarray]:
    outlines = parse_outlines(payload).outlines(image, HEIGHT, WIDTH)
    assert outlines is not None
    return draw_outlines(outlines, HEIGHT, WIDTH)


def flat(points: list[tuple[float, float]]) -> list[float]:
    return [value for point in points for value in point]


def rle(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, by a loop."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def text(counts: list[int]) -> str:
    """COCO's text of run lengths: 5 bits at a time until what is left is a sign alone."""
    letters = ""
    for place, count in enumerate(counts):
        left = count - counts[place - 2] if place > 2 else count
        while True:
            bits, left = left & 31, left >> 5
            done = left == (-1 if bits & 16 else 0)
            letters += chr(48 + bits + (0 if done else 32))
            if done:
                break
    return letters


def labelme() -> bytes:
    labels = (("mirror", MIRROR), ("poster", POSTER))
    shapes = [{"label": label, "points": points} for label, points in labels]
    return json.dumps({"shapes": shapes, "imageWidth": WIDTH, "imageHeight": HEIGHT}).encode()


def coco_polygons() -> bytes:
    return coco(
        {"category_id": 10, "segmentation": [flat(MIRROR)]},
        {"category_id": 11, "segmentation": [flat(POSTER)]},
    )


def coco_masks(encode: Callable[[list[int]], object]) -> bytes:
    region, _ = drawn(labelme())
    return coco(
        *(
            {
                "category_id": category,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": encode(rle(region == value))},
            }
            for category, value in ((10, 1), (11, 2))
        )
    )


def cvat_polygons() -> bytes:
    lines = (";".join(f"{u:.2f},{v:.2f}" for u, v in points) for points in (MIRROR, POSTER))
    first, second = lines
    return cvat(
        f'<polygon label="poster" points="{second}" z_order="2"/>'
        f'<polygon label="mirror" points="{first}" z_order="-1"><attribute name="x">y</attribute>'
        "</polygon>"
    )


@pytest.mark.parametrize(
    "make",
    [
        coco_polygons,
        lambda: coco_masks(list),
        lambda: coco_masks(text),
        cvat_polygons,
    ],
    ids=["coco", "coco_runs", "coco_text", "cvat"],
)
def test_every_kind_of_file_gives_the_same_maps(make: Callable[[], bytes]) -> None:
    for one, other in zip(drawn(make()), drawn(labelme()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("counts", "mask"),
    [
        ("322O2", [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]),
        ([3, 2, 2, 1, 4], [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]),
        ("06", [[1, 1, 1], [1, 1, 1]]),
        ("6", [[0, 0, 0], [0, 0, 0]]),
        # 405, 20, 20, then 37 times the run of two before, then 795 more than that
        ("e<d0d0" + "0" * 37 + "kh0", np.pad(np.ones((20, 20), int), ((5, 15), (10, 20)))),
    ],
)
def test_run_lengths_of_pycocotools(counts: str | list[int], mask: object) -> None:
    expected = np.array(mask, bool)
    np.testing.assert_array_equal(decode_rle(counts, *expected.shape), expected)


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_rle(rle(mask), *mask.shape), mask)
    np.testing.assert_array_equal(decode_rle(text(rle(mask)), *mask.shape), mask)


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    library = pytest.importorskip("pycocotools.mask")
    counts = library.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(decode_rle(counts, *mask.shape), mask)


@pytest.mark.parametrize(
    "counts", ["~", "3", [3, -1, 10], [3, 10], "322O2" * 9, "oooooooooooooooo"]
)
def test_run_lengths_of_other_sizes_are_damage(counts: str | list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        decode_rle(counts, 3, 4)


def test_polygons_of_an_annotation_are_united_and_a_crowd_is_parted() -> None:
    outer, inner, away = ([a, a, b, a, b, b, a, b] for a, b in ((2, 12), (4, 8), (14, 20)))
    one = {"category_id": 10, "segmentation": [outer, inner, away]}
    region, number = drawn(coco(one))
    assert int((region > 0).sum()) == 100 + 36 and number.max() == 1
    _, number = drawn(coco(one | {"iscrowd": 1}))
    assert [int((number == n).sum()) for n in (1, 2)] == [100, 36]


def test_boxes_alone_and_unknown_names_are_told() -> None:
    found = parse_outlines(
        coco(
            {"category_id": 10, "segmentation": [], "bbox": [1, 1, 5, 5]},
            {"category_id": 10, "segmentation": [[1, 1, 2, 2]]},
            {"category_id": 12, "segmentation": [flat(POSTER)]},
        )
    ).outlines("1.jpg", HEIGHT, WIDTH)
    assert found is not None
    assert unknown_labels(found) == {"mirror (no outline)": 2, "cat": 1}


def test_a_mask_of_cvat_goes_along_the_rows_of_its_box() -> None:
    """CVAT's own example of a disc, 13 by 15 pixels."""
    runs = "3, 5, 7, 7, 5, 9, 3, 11, 2, 11, 2, 12, 1, 12, 1, 26, 1, 12, 1, 12, 2, 11, 3, 9, 5, 7, "
    runs += "7, 5, 3"
    shape = (
        f'<mask label="mirror" rle="{runs}" left="9" top="4" width="13" height="15" z_order="0"/>'
    )
    region, _ = drawn(cvat(shape))
    disc = region[4:19, 9:22] > 0
    assert int((region > 0).sum()) == int(disc.sum()) == 149
    assert "".join(".#"[int(pixel)] for pixel in disc[0]) == "...#####....."
    assert disc[7].all() and "".join(".#"[int(pixel)] for pixel in disc[14]) == ".....#####..."


def test_boxes_and_ellipses_of_cvat_may_be_turned() -> None:
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    turn = np.radians(30)
    along, across = (
        (u - 16) * np.cos(turn) + (v - 12) * np.sin(turn),
        (v - 12) * np.cos(turn) - (u - 16) * np.sin(turn),
    )
    box = '<box label="mirror" xtl="8" ytl="8" xbr="24" ybr="16" rotation="30"/>'
    inside = np.maximum(np.abs(along) / 8, np.abs(across) / 4)
    round_ = '<ellipse label="mirror" cx="16" cy="12" rx="8" ry="4" rotation="30.0"/>'
    for shape, level in ((box, inside), (round_, np.hypot(along / 8, across / 4))):
        region, _ = drawn(cvat(shape))
        clear = np.abs(level - 1) > 0.01
        np.testing.assert_array_equal((region > 0)[clear], (level < 1)[clear])


def test_shapes_that_surround_nothing_are_told() -> None:
    shapes = '<polyline label="mirror" points="1,1;2,2;3,9"/><tag label="dark"/>'
    found = parse_outlines(cvat(shapes)).outlines("a/1.jpg", HEIGHT, WIDTH)
    assert found is not None
    assert unknown_labels(found) == {"mirror (polyline)": 1, "dark (tag)": 1}


def named(*names: str) -> bytes:
    images = [
        {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
        for i, name in enumerate(names)
    ]
    return coco(images=images)


@pytest.mark.parametrize(
    ("names", "image", "known"),
    [
        (["1.jpg"], "train/1.jpg", True),
        (["x/train/1.jpg"], "train/1.jpg", True),
        (["x\\train\\1.jpg"], "train/1.jpg", True),
        (["./1.jpg"], "1.jpg", True),
        (["val/1.jpg"], "train/1.jpg", False),
        (["11.jpg"], "1.jpg", False),
        (["a/1.jpg", "b/1.jpg"], "x/b/1.jpg", True),
        (["1.jpg", "a/1.jpg"], "x/a/1.jpg", True),
    ],
)
def test_photographs_are_found_by_the_ends_of_their_paths(
    names: list[str], image: str, known: bool
) -> None:
    found = parse_outlines(named(*names)).outlines(image, HEIGHT, WIDTH)
    assert (found == []) if known else (found is None)


def test_paths_of_several_photographs_are_no_guess() -> None:
    with pytest.raises(BadFrame, match=r"outlines of several photographs fit: 1\.jpg may be a/1"):
        parse_outlines(named("a/1.jpg", "b/1.jpg")).outlines("1.jpg", HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "unreadable"),
        (b"[]", "neither LabelMe"),
        (b"{}", "neither LabelMe, COCO instances nor CVAT"),
        (b"3", "unreadable"),
        (b"<a", "unreadable"),
        (b"<annotation><filename/></annotation>", "found <annotation>"),
        (b"<annotations><track/></annotations>", "for video"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "document type"),
        ("<annotations/>".encode("utf-16"), "unreadable"),
        (b'{"images": [], "annotations": [{}], "categories": []}', "unreadable"),
        (b'{"images": [{}], "annotations": [], "categories": []}', "unreadable"),
    ],
)
def test_what_is_no_file_of_outlines_is_damage(payload: bytes, said: str) -> None:
    with pytest.raises(BadFrame, match=said):
        parse_outlines(payload)


@pytest.mark.parametrize(
    "payload",
    [
        coco({"category_id": 99, "segmentation": [flat(MIRROR)]}),
        coco({"category_id": 10, "segmentation": [[1, 2, "x", 4, 5, 6]]}),
        coco({"category_id": 10, "segmentation": {"size": [3, 4], "counts": [12]}}),
        coco({"category_id": 10, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [12]}}),
        cvat('<polygon label="a" points="1,2;x,4;5,6"/>'),
        cvat('<polygon label="a" points="1,2;3;5,6"/>'),
        cvat('<box label="a" xtl="1"/>'),
        cvat('<mask label="a" rle="1,2" left="0" top="0" width="9" height="9"/>'),
        cvat('<mask label="a" rle="1" left="0" top="0" width="1e9" height="1e9"/>'),
    ],
)
def test_outlines_that_are_none_are_damage_of_their_photograph(payload: bytes) -> None:
    with pytest.raises(BadFrame, match="outlines unreadable"):
        parse_outlines(payload).outlines("a/1.jpg", HEIGHT, WIDTH)


@pytest.mark.parametrize("payload", [labelme(), coco_polygons(), cvat_polygons()])
def test_outlines_for_another_size_are_refused(payload: bytes) -> None:
    with pytest.raises(BadFrame, match="outlines are for another size: 32x24, the image has 24x32"):
        parse_outlines(payload).outlines("a/1.jpg", WIDTH, HEIGHT)
