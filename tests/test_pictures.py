"""Colour maps against closed forms, contact sheets pixel by pixel, curves as parsed SVG."""

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flatdepth.show import pictures as pictures
from flatdepth.show.pictures import (
    FLAT_COLOUR,
    REGION_COLOURS,
    SKY_COLOUR,
    UNKNOWN_COLOUR,
    Tile,
    colour_depth,
    colour_error,
    colour_region,
    contact_sheet,
    depth_limits,
    draw_outlines,
    loss_curve,
    region_outlines,
    save_png,
    tile_sheet,
    write_atomic,
)
from flatdepth.types import Region


def position_in_map(colours: np.ndarray, name: str) -> np.ndarray:
    """Where in 0..1 each colour of (h, w, 3) lies in a matplotlib map of 256 entries."""
    table = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3].astype(int)
    distance = np.abs(colours[..., None, :].astype(int) - table).sum(-1)
    assert (distance.min(-1) == 0).all(), "a colour that the map does not contain"
    return distance.argmin(-1) / 255


def solid(colour: tuple[int, int, int], height: int = 30, width: int = 40) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def where(sheet: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(n, 2) rows and columns of the pixels of exactly this colour."""
    return np.argwhere((np.asarray(sheet) == colour).all(-1))


@given(st.floats(0.1, 10), st.floats(1.05, 50), st.integers(2, 40))
def test_depth_colour_is_linear_in_inverse_depth(low: float, ratio: float, count: int) -> None:
    high = low * ratio
    nearness = np.linspace(0, 1, count)
    depth = (1 / (1 / high + nearness * (1 / low - 1 / high))).astype(np.float32)[None]
    found = position_in_map(colour_depth(depth, low_m=low, high_m=high), "Spectral_r")
    # half a table entry, and the rounding of float32 depth magnified by the narrowest range
    np.testing.assert_allclose(found[0], nearness, atol=1 / 255 + 1e-5)


def test_near_is_warm_and_far_is_cold_and_the_rest_is_clipped() -> None:
    depth = np.array([[0.5, 1.0, 4.0, 90.0]], np.float32)
    row = colour_depth(depth, low_m=1.0, high_m=4.0)[0].astype(int)
    assert (row[0] == row[1]).all() and (row[2] == row[3]).all()
    assert row[1][0] > row[1][2] + 50, "near: more red than blue"
    assert row[2][2] > row[2][0] + 50, "far: more blue than red"


def test_unknown_depth_is_grey_and_sky_has_its_own_colour() -> None:
    depth = np.array([[np.nan, 0.0, -1.0, -np.inf, np.inf]], np.float32)
    row = colour_depth(depth, low_m=1.0, high_m=4.0)[0]
    assert (row[:4] == UNKNOWN_COLOUR).all()
    assert (row[4] == SKY_COLOUR).all()


@pytest.mark.parametrize(
    ("special", "name"),
    [(UNKNOWN_COLOUR, "Spectral_r"), (SKY_COLOUR, "Spectral_r"), (UNKNOWN_COLOUR, "magma")],
)
def test_special_colours_are_far_from_their_map(special: tuple[int, int, int], name: str) -> None:
    table = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3].astype(float)
    assert np.linalg.norm(table - special, axis=1).min() > 40


@pytest.mark.parametrize("limits", [(0.0, 1.0), (2.0, 2.0), (3.0, 1.0), (-1.0, 1.0)])
def test_depth_colour_refuses_limits_out_of_order(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low_m < high_m"):
        colour_depth(np.ones((1, 1), np.float32), low_m=limits[0], high_m=limits[1])


def test_depth_limits_are_percentiles_of_what_is_valid() -> None:
    depth = np.linspace(1, 11, 101, dtype=np.float32)[None]  # percentile p is 1 + p / 10
    valid = np.ones(depth.shape, bool)
    np.testing.assert_allclose(depth_limits(depth, valid), (1.2, 10.8), rtol=1e-6)
    spoiled = np.concatenate([depth, np.float32([[np.nan, np.inf, 0.0, -3.0, 500.0]])], axis=1)
    mask = np.arange(spoiled.shape[1])[None] != spoiled.shape[1] - 1  # all but the 500 m
    assert depth_limits(spoiled, mask) == depth_limits(depth, valid)


@given(st.floats(0.01, 100), st.floats(1, 100))
def test_depth_limits_scale_with_the_depth(scale: float, spread: float) -> None:
    depth = np.geomspace(1, spread, 64).astype(np.float32).reshape(8, 8)
    valid = np.ones((8, 8), bool)
    low, high = depth_limits(depth, valid)
    scaled = depth_limits((depth * np.float32(scale)).astype(np.float32), valid)
    np.testing.assert_allclose(scaled, (low * scale, high * scale), rtol=1e-5)
    assert high / low > 1.2 - 1e-9


def test_depth_limits_of_a_wall_are_centred_on_it() -> None:
    low, high = depth_limits(np.full((4, 4), 3, np.float32), np.ones((4, 4), bool))
    assert low * high == pytest.approx(9.0) and high / low == pytest.approx(1.2)


def test_depth_limits_without_valid_pixels_can_be_drawn() -> None:
    depth = np.full((2, 2), np.nan, np.float32)
    low, high = depth_limits(depth, np.ones((2, 2), bool))
    assert (colour_depth(depth, low_m=low, high_m=high) == UNKNOWN_COLOUR).all()


def test_error_colour_is_the_relative_error_up_to_its_limit() -> None:
    truth = np.array([[2.0, 2.0, 2.0, 2.0, 2.0, np.nan, 0.0]], np.float32)
    pred = np.array([[2.0, 2.2, 1.8, 9.0, np.nan, 1.0, 1.0]], np.float32)
    valid = np.array([[True, True, True, True, True, False, False]])
    colours = colour_error(pred, truth, valid, 0.2)
    found = position_in_map(colours[:, :5], "magma")[0]
    np.testing.assert_allclose(found, [0, 0.5, 0.5, 1, 1], atol=1 / 255)
    assert (colours[0, 5:] == UNKNOWN_COLOUR).all()


def test_region_tints_dim_the_background_and_outline_each_region() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
    region = np.zeros((24, 30), np.uint8)
    region[4:20, 5:25] = Region.FRAME
    region[8:16, 9:21] = Region.ART
    shown = colour_region(image, region)
    for v in range(24):
        for u in range(30):
            around = region[max(0, v - 1) : v + 2, max(0, u - 1) : u + 2]
            source = image[v, u].astype(float)
            if region[v, u] == Region.BACKGROUND:
                expected = 0.55 * source
            elif len(np.unique(around)) > 1:
                expected = np.array(REGION_COLOURS[Region(region[v, u])], float)
            else:
                expected = 0.5 * source + 0.5 * np.array(REGION_COLOURS[Region(region[v, u])])
            assert np.abs(shown[v, u] - expected).max() <= 0.51, (v, u)


def test_every_region_but_the_background_has_a_colour_of_its_own() -> None:
    assert set(REGION_COLOURS) == set(Region) - {Region.BACKGROUND}
    assert len({*REGION_COLOURS.values(), FLAT_COLOUR, UNKNOWN_COLOUR}) == len(Region) + 1


COLOURS = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 0, 255), (0, 255, 255), (255, 255, 0)]]


def test_sheet_places_every_panel_in_its_row_and_column() -> None:
    long_key = "scene_without_any_space/" * 30 + "x" * 300
    sheet = contact_sheet(
        [[solid(colour) for colour in row] for row in COLOURS],
        ["image", "a heading that is far too long for its column", "truth"],
        [long_key, "second\nAbsRel 0.31 → 0.12"],
        title="A title longer than the sheet is wide " * 9,
        limits_m=[(0.5, 3.0), (1.0, 20.0)],
        error_limit=0.3,
        panel_width=80,
    )
    corners = {}
    for row, colours in enumerate(COLOURS):
        for column, colour in enumerate(colours):
            pixels = where(sheet, colour)
            assert len(pixels) == 80 * 60, "covered by a text, or of another size"
            assert (np.ptp(pixels, axis=0) == (59, 79)).all()
            corners[row, column] = pixels.min(axis=0)
    for row in range(2):
        assert len({int(corners[row, column][0]) for column in range(3)}) == 1
        assert corners[row, 0][1] < corners[row, 1][1] - 80 < corners[row, 2][1] - 160
    assert (corners[1, 0] - corners[0, 0])[0] > 60


def test_sheet_fits_panels_of_other_sizes_and_shapes() -> None:
    red, green, blue = COLOURS[0]
    panels = [solid(red), solid(green, 300, 400), solid(blue, 40, 40)]
    sheet = contact_sheet([panels], "abc", ["row"], title="sizes", regions=False, panel_width=80)
    assert len(where(sheet, red)) == len(where(sheet, green)) == 80 * 60
    assert len(where(sheet, blue)) == 60 * 60, "a square is fitted by its height, not stretched"


def test_sheet_legends_are_drawn_on_demand() -> None:
    panel = [[solid((1, 2, 3))]]
    bare = contact_sheet(panel, ["a"], ["b"], title="c", regions=False)
    full = contact_sheet(
        panel, ["a"], ["b"], title="c", limits_m=[(1.0, 2.0)], error_limit=0.3, panel_width=900
    )
    for colour in (*REGION_COLOURS.values(), SKY_COLOUR, UNKNOWN_COLOUR):
        assert len(where(bare, colour)) == 0
        assert len(where(full, colour)) >= 16 * 16


@pytest.mark.parametrize(("panel_width", "lines"), [(900, 1), (190, 2), (60, 4)])
def test_sheet_legend_flows_into_as_few_lines_as_fit(panel_width: int, lines: int) -> None:
    sheet = contact_sheet([[solid((1, 2, 3))]], ["a"], ["b"], title="c", panel_width=panel_width)
    swatches = [where(sheet, colour) for colour in REGION_COLOURS.values()]
    assert all(len(swatch) == 16 * 16 for swatch in swatches)
    assert len({int(swatch[:, 0].min()) for swatch in swatches}) == lines


def test_sheet_label_stays_within_its_row() -> None:
    def label_of_second_row(first: str) -> np.ndarray:
        sheet = contact_sheet(
            [[solid((9, 8, 7))], [solid((7, 8, 9))]], ["a"], [first, "second"], title="t"
        )
        top, left = where(sheet, (7, 8, 9)).min(axis=0)
        return np.asarray(sheet)[top:, :left]

    assert np.array_equal(label_of_second_row("word " * 400), label_of_second_row("word"))


def test_sheet_depth_bar_runs_from_near_to_far() -> None:
    panel = [[solid((1, 2, 3), 100, 100)]]
    arguments = (panel, ["a"], ["b"])
    sheet = contact_sheet(
        *arguments, title="c", regions=False, limits_m=[(1.0, 4.0)], panel_width=200
    )
    top, left = where(sheet, (1, 2, 3)).min(axis=0)
    bar = np.asarray(sheet)[top : top + 200, left + 200 + 12 + 5]
    found = position_in_map(bar[None], "Spectral_r")[0]
    np.testing.assert_allclose(found, np.linspace(1, 0, 200), atol=2 / 255)


@pytest.mark.parametrize("character", "→é×δ–ł")
def test_sheet_font_has_the_characters_that_labels_use(character: str) -> None:
    def draw(text: str) -> np.ndarray:
        sheet = contact_sheet([[solid((9, 9, 9))]], ["a"], [text], title="t", regions=False)
        return np.asarray(sheet)

    assert not np.array_equal(draw(character), draw("\uffff")), "drawn as a missing glyph"


@pytest.mark.parametrize(
    ("rows", "columns", "titles", "limits"),
    [
        ([], ["a"], [], None),
        ([[solid((0, 0, 0))]], ["a", "b"], ["r"], None),
        ([[solid((0, 0, 0))]], ["a"], [], None),
        ([[solid((0, 0, 0))]], ["a"], ["r"], [(1.0, 2.0), (1.0, 2.0)]),
    ],
)
def test_sheet_refuses_a_table_with_holes(rows, columns, titles, limits) -> None:
    with pytest.raises(ValueError, match="rows"):
        contact_sheet(rows, columns, titles, title="t", limits_m=limits)


def tiles(counts: list[int], text: str = "") -> list[Tile]:
    """Tiles of as many pictures each, 200 x 90, every picture in a colour of its own."""
    return [
        Tile(
            heading="a heading " * 9,
            text=text,
            warning="beware " * 20,
            pictures=[solid((10 * tile, 10 * row, 7), 90, 200) for row in range(count)],
            caption="a caption " * 9,
        )
        for tile, count in enumerate(counts)
    ]


def test_tiles_fill_rows_and_keep_their_pictures_together() -> None:
    text = "scene_without_any_space/" * 30
    sheet = tile_sheet(
        tiles([2, 2, 2, 2, 2], text),
        title="A title longer than the sheet is wide " * 9,
        columns=3,
        regions=True,
        depth=("1 m", "9 m"),
        error_limit=0.5,
    )
    corners = {}
    for tile in range(5):
        for row in range(2):
            pixels = where(sheet, (10 * tile, 10 * row, 7))
            assert len(pixels) == 200 * 90, "covered by a text, or of another size"
            corners[tile, row] = pixels.min(axis=0)
        assert 90 < corners[tile, 1][0] - corners[tile, 0][0] < 110
        assert corners[tile, 1][1] == corners[tile, 0][1]
    assert len({int(corners[tile, 0][0]) for tile in range(3)}) == 1
    assert corners[3, 0][0] == corners[4, 0][0] > corners[0, 1][0] + 90
    assert corners[3, 0][1] == corners[0, 0][1] and corners[4, 0][1] == corners[1, 0][1]
    for colour in (*REGION_COLOURS.values(), SKY_COLOUR, UNKNOWN_COLOUR):
        assert where(sheet, colour)[:, 0].min() > corners[4, 1][0] + 90, "the legend is below all"


def test_the_legend_of_tiles_takes_a_free_place() -> None:
    def draw(counts: list[int]) -> Image.Image:
        return tile_sheet(
            tiles(counts), title="t", columns=3, regions=True, depth=("", ""), error_limit=None
        )

    full, free = draw([2, 2, 2]), draw([2, 1, 2])
    assert free.height < full.height and free.width == full.width
    left, right = where(free, (10, 0, 7))[:, 1].min(), where(free, (20, 0, 7))[:, 1].min()
    top = where(free, (10, 0, 7))[:, 0].max()
    for colour in (*REGION_COLOURS.values(), UNKNOWN_COLOUR):
        swatch = where(free, colour)
        assert len(swatch) >= 16 * 16 and swatch[:, 0].min() > top
        assert left <= swatch[:, 1].min() and swatch[:, 1].max() < right


def test_tiles_need_pictures_of_one_size() -> None:
    options = {"title": "t", "columns": 1, "regions": False, "depth": ("", ""), "error_limit": 0.5}
    other = Tile(heading="a", pictures=[solid((1, 2, 3))])
    for wrong in ([], [*tiles([1]), other]):
        with pytest.raises(ValueError, match="one size"):
            tile_sheet(wrong, **options)


def area(polygon: np.ndarray) -> float:
    """By the shoelace formula."""
    u, v = polygon.T
    return abs(float(u @ np.roll(v, 1) - v @ np.roll(u, 1))) / 2


def test_outlines_enclose_their_region() -> None:
    v, u = np.mgrid[:90, :120] + 0.5
    region = np.zeros((90, 120), np.uint8)
    region[(u - 80) ** 2 + (v - 50) ** 2 < 30**2] = Region.MIRROR
    region[(u - 80) ** 2 + (v - 50) ** 2 < 10**2] = Region.FRAME
    region[:20, :30] = Region.ART  # in the corner of the image
    found = region_outlines(region, (Region.MIRROR, Region.ART, Region.DECOY))
    assert set(found) == {Region.MIRROR, Region.ART}
    outer, inner = sorted(found[Region.MIRROR], key=area, reverse=True)
    for polygon, radius in ((outer, 30), (inner, 10)):
        assert np.array_equal(polygon[0], polygon[-1])
        distance = np.hypot(polygon[:, 0] - 80, polygon[:, 1] - 50)
        assert np.abs(distance - radius).max() < 0.8
    (corner,) = found[Region.ART]
    assert area(corner) == pytest.approx(20 * 30, abs=6), "rounded corners alone are missing"
    np.testing.assert_allclose([corner.min(0), corner.max(0)], [(0, 0), (30, 20)], atol=0.1)


def test_outlines_are_drawn_where_the_region_ends() -> None:
    region = np.zeros((60, 80), np.uint8)
    region[20:40, 30:60] = Region.MIRROR
    panel = np.full((180, 240, 3), 200, np.uint8)
    drawn = draw_outlines(panel, region_outlines(region, (Region.MIRROR,)), 3.0)
    assert (panel == 200).all() and drawn.shape == panel.shape
    v, u = np.nonzero((drawn == REGION_COLOURS[Region.MIRROR]).all(-1))
    beside = np.minimum(np.abs(v + 0.5 - 60), np.abs(v + 0.5 - 120))
    across = np.minimum(np.abs(u + 0.5 - 90), np.abs(u + 0.5 - 180))
    assert len(v) > 2 * (60 + 90) and np.minimum(beside, across).max() < 3
    v, u = np.nonzero((drawn != 200).any(-1))
    assert v.min() >= 55 and v.max() < 125 and u.min() >= 85 and u.max() < 185


def test_png_round_trip_makes_folders(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    save_png(array, tmp_path / "a" / "b.png")
    save_png(Image.fromarray(array), tmp_path / "a" / "c.png")
    for name in ("b.png", "c.png"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / name)), array)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.png", "c.png"]


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_interrupted_write_keeps_the_old_file_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    path = tmp_path / "x.bin"
    write_atomic(path, b"old")

    def full_disk(self: Path, _: object) -> None:
        with self.open("wb") as file:
            file.write(b"n")
        raise OSError("no space left")

    monkeypatch.setattr(Path, method, full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new content")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def history(losses: list[float | None]) -> list[dict]:
    return [{"step": i + 1, "loss": loss, "lr": 1e-4} for i, loss in enumerate(losses)]


def texts(svg: bytes) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]


EVALUATIONS = [
    {"step": step, "table": {"flat": {"abs_rel": 0.4 - step / 50}, "clean": {"abs_rel": 0.1}}}
    for step in (0, 5, 10)
]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_curve_names_what_it_draws_and_nothing_else(dark: bool, narrow: bool) -> None:
    losses = [1.0, 0.9, None, 0.7, 0.6, float("nan"), 0.5, 0.5, 0.4, 0.4]
    found = texts(loss_curve(history(losses), EVALUATIONS, dark=dark, narrow=narrow))
    for text in ("Training", "Validation", "flat", "clean", "skipped step", "learning rate"):
        assert text in found
    assert "mirror" not in found and "art" not in found
    assert "skipped step" not in texts(loss_curve(history([1.0, 0.9]), EVALUATIONS))


def test_curve_is_reproducible_and_self_contained() -> None:
    svg = loss_curve(history([1.0, 0.5]), EVALUATIONS)
    assert svg == loss_curve(history([1.0, 0.5]), EVALUATIONS)
    references = re.findall(rb'(?:href|src)="([^"]*)"', svg)
    assert references and all(reference.startswith(b"#") for reference in references)
    assert b"@import" not in svg and b"<script" not in svg


@pytest.mark.parametrize(
    ("records", "evaluations"),
    [
        (history([0.5]), []),
        (history([None, None]), EVALUATIONS),
        ([], EVALUATIONS),
        (history([-1.0, 2.0, 300.0]), EVALUATIONS[:1]),
        (history([0.0, 0.0]), [{"step": 0, "table": {"flat": {"abs_rel": None}, "clean": {}}}]),
        ([{"step": 1, "loss": 0.5, "lr": None}], []),
    ],
)
def test_curve_of_an_unusual_run_is_still_an_svg(records, evaluations) -> None:
    assert "Training" in texts(loss_curve(records, evaluations))


def test_curve_of_a_long_run_is_small_and_keeps_its_peak() -> None:
    losses = np.random.default_rng(2).uniform(0.5, 1, 50_000)
    losses[31_234] = 7.0
    chosen = pictures._extremes(losses)
    assert {losses.argmax(), losses.argmin(), 49_999} <= set(chosen)
    assert (np.diff(chosen) > 0).all() and len(chosen) < 1500
    assert len(loss_curve(history(losses.tolist()))) < 300_000


def test_smoothing_is_a_weighted_mean_of_the_past() -> None:
    values = np.random.default_rng(3).normal(size=400)
    smooth = pictures._smooth(values)
    decay = 1 - 1 / 10  # a fortieth of 400
    for index in (0, 1, 57, 399):
        weights = decay ** np.arange(index, -1, -1)
        expected = (weights * values[: index + 1]).sum() / weights.sum()
        assert smooth[index] == pytest.approx(expected, rel=1e-9)


def test_pictures_leave_the_drawing_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    loss_curve(history([1.0, 0.5]), EVALUATIONS)
    assert dict(matplotlib.rcParams) == before
    buffer = io.BytesIO()
    contact_sheet([[solid((1, 1, 1))]], ["a"], ["b"], title="c").save(buffer, "PNG")
    assert dict(matplotlib.rcParams) == before
