"""Depth systems side by side: known figures, one colour scale, a page that works in a browser."""

import base64
import dataclasses
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image
from skimage.measure import label as components

from flatdepth.errors import UserError
from flatdepth.report import comparison
from flatdepth.report.comparison import UNTRAINED, Case, System, measure, sheet, write_page
from flatdepth.show.pictures import SKY_COLOUR, Tile, colour_depth, depth_limits
from flatdepth.types import Region
from tests.browser import Browser
from tests.test_report import HOSTILE, Page

HEIGHT, WIDTH = 72, 96
K_PX = np.array([[90.0, 0, 48], [0, 90, 36], [0, 0, 1]])
MIRROR, ART = (slice(10, 42), slice(8, 40)), (slice(20, 60), slice(60, 84))
PAINT = (200, 30, 60)


def system(label: str, **changes: Any) -> System:
    known = System(
        label=label,
        predicts=f"what {label} predicts",
        weights=f"weights of {label}",
        alignment=f"alignment of {label}",
        licence=f"licence of {label}",
        note=f"note on {label}",
    )
    return dataclasses.replace(known, **changes)


def wall() -> np.ndarray:
    """A slanted wall: 1/z = m . ray."""
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inverse = 0.25 + 0.1 * (u - 48) / 90 - 0.05 * (v - 36) / 90
    return (1 / inverse).astype(np.float32)


def labelled() -> np.ndarray:
    region = np.zeros((HEIGHT, WIDTH), np.uint8)
    region[MIRROR], region[ART] = Region.MIRROR, Region.ART
    return region


def altered(place: tuple[slice, slice], factor: float | np.ndarray) -> np.ndarray:
    depth_m = wall()
    depth_m[place] *= factor
    return depth_m


def checkers(factor: float) -> np.ndarray:
    v, u = np.mgrid[:40, :24]
    return np.where((u + v) % 2, np.float32(factor), np.float32(1))


def room(**changes: Any) -> Case:
    """Truth itself, a mirror seen twice as deep, a picture seen rough, and no truth in anything."""
    known = Case(
        name="a room",
        image=np.full((HEIGHT, WIDTH, 3), PAINT, np.uint8),
        depths_m=[wall(), altered(MIRROR, 2.0), altered(ART, checkers(1.5)), 1.1 * wall()],
        truth_m=wall(),
        region=labelled(),
        K_px=K_PX,
    )
    return dataclasses.replace(known, **changes)


SYSTEMS = [system("exact"), system("deep"), system("rough"), system("far", untrained=True)]


def test_figures_of_planted_errors() -> None:
    exact, deep, rough, far = measure([room()])
    assert list(exact) == ["background", "mirror", "art", "flat"]
    for row in exact.values():
        assert row["abs_rel"] == 0 and row["delta1"] == 1 and row["images"] == 1
    for region, things in (("mirror", 1), ("art", 1), ("flat", 2)):
        assert exact[region]["things"] == things
        assert exact[region]["flatness_residual"] < 1e-6

    mirror, art = 32 * 32, 40 * 24
    assert deep["mirror"]["abs_rel"] == pytest.approx(1, rel=1e-6) and deep["mirror"]["delta1"] == 0
    assert deep["art"] == exact["art"] and deep["background"] == exact["background"]
    assert deep["flat"]["abs_rel"] == pytest.approx(mirror / (mirror + art), rel=1e-6)
    assert deep["mirror"]["flatness_residual"] < 1e-6, "a plane at another depth is flat"

    assert rough["art"]["abs_rel"] == pytest.approx(0.25, rel=1e-6), "half of it 50 % too far"
    assert rough["art"]["delta1"] == pytest.approx(0.5)
    assert rough["mirror"] == exact["mirror"]
    for row in far.values():
        assert row["abs_rel"] == pytest.approx(0.1, rel=1e-5)


def test_relief_of_a_chequered_wall_is_known() -> None:
    """1/p takes two values in turns around their mean, so relief is half their distance over it."""
    level = np.full((HEIGHT, WIDTH), 3, np.float32)
    rough = level.copy()
    rough[ART] *= checkers(1.5)
    (row,) = measure([room(depths_m=[rough], truth_m=level)])
    # both surfaces are means of one thing; the mirror has none
    assert row["art"]["flatness_residual"] == pytest.approx((1 - 1 / 1.5) / (1 + 1 / 1.5), rel=1e-4)
    assert row["flat"]["flatness_residual"] == pytest.approx(
        row["art"]["flatness_residual"] / 2, rel=1e-4
    )


def test_means_are_over_the_pictures_with_truth_each_counting_once() -> None:
    off = room(depths_m=[1.5 * wall()] * 4, region=None)
    dark = room(truth_m=None)
    half = room(valid=np.arange(WIDTH)[None].repeat(HEIGHT, 0) < 50)
    exact, deep, _, _ = measure(iter([room(), off, dark, half]))
    assert exact["clean"]["images"] == 1
    assert exact["clean"]["abs_rel"] == pytest.approx(0.5, rel=1e-5)
    assert exact["mirror"]["images"] == 2 and exact["art"]["images"] == 1
    assert deep["flat"]["things"] == 3
    expected = (32 * 32 / (32 * 32 + 40 * 24) + 1) / 2  # the second picture shows the mirror alone
    assert deep["flat"]["abs_rel"] == pytest.approx(expected, rel=1e-6)
    assert measure([dark]) == [{}] * 4


def test_figures_are_finite_whatever_a_system_says() -> None:
    wild = wall()
    wild[:20] = np.nan
    wild[20:40] = np.inf
    wild[40:50] = -3
    wild[50:55] = 0
    (row,) = measure([room(depths_m=[wild])])
    assert all(math.isfinite(value) for figures in row.values() for value in figures.values())
    assert row["mirror"]["abs_rel"] > 1


@pytest.mark.parametrize("seed", range(4))
def test_things_are_connected_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.random((9, 12)) < (0.3, 0.5, 0.6, 0.8)[seed]
    mask = coarse.repeat(9, 0).repeat(8, 1)
    mask[::17] = False
    numbers = components(mask, connectivity=1)
    expected = [numbers == n for n in range(1, numbers.max() + 1) if (numbers == n).sum() >= 64]
    found = comparison._parts(mask)
    key = np.ndarray.tobytes
    assert sorted(map(key, found)) == sorted(map(key, expected)) and len(found) > 1


def test_a_spiral_is_one_thing() -> None:
    spiral = np.zeros((41, 41), bool)
    for ring in range(0, 20, 4):
        inner = slice(ring, 41 - ring)
        spiral[ring, inner] = spiral[40 - ring, inner] = True
        spiral[inner, ring] = spiral[inner, 40 - ring] = True
        spiral[ring + 2, ring] = False
        spiral[ring + 4 : ring + 5, ring : ring + 5] = True
    assert components(spiral, connectivity=1).max() == 1
    (found,) = comparison._parts(spiral)
    assert np.array_equal(found, spiral)


def count(picture: Image.Image | np.ndarray, colour: Any) -> int:
    return int((np.asarray(picture) == np.asarray(colour)).all(-1).sum())


def test_the_same_depth_has_the_same_colour_in_every_panel() -> None:
    truth_m = np.where(np.arange(WIDTH) < 48, 1, 9)[None].repeat(HEIGHT, 0).astype(np.float32)
    level = [np.full_like(truth_m, depth) for depth in (3, 3, 6)]
    three, six = (colour_depth(z, low_m=1, high_m=9)[0, 0] for z in level[1:])
    panel = 396 * 297
    known = sheet(room(depths_m=level, truth_m=truth_m), SYSTEMS[:3])
    assert known.width == 5 * 396 + 4 * 14 + 2 * 20
    assert count(known, three) == 2 * panel and count(known, six) == panel
    assert count(known, PAINT) == panel

    free = room(depths_m=[truth_m, *level], truth_m=None, region=None)
    low, high = depth_limits(np.concatenate(free.depths_m), np.ones((4 * HEIGHT, WIDTH), bool))
    three, six = (colour_depth(z, low_m=low, high_m=high)[0, 0] for z in level[1:])
    pooled = sheet(free, SYSTEMS)
    assert count(pooled, three) == 2 * panel and count(pooled, six) == panel


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """What the next sheet shows."""
    shown: list[Tile] = []
    draw = comparison.tile_sheet

    def keep(tiles: list[Tile], **options: Any) -> Image.Image:
        shown[:] = tiles
        return draw(tiles, **options)

    monkeypatch.setattr(comparison, "tile_sheet", keep)
    return shown


def test_errors_and_figures_show_up_where_they_were_planted(tiles: list[Tile]) -> None:
    sheet(room(), SYSTEMS)
    assert [tile.heading for tile in tiles] == [
        "Image", "True depth", "exact", "deep", "rough", "far",
    ]  # fmt: skip
    assert [tile.caption for tile in tiles] == [
        "",
        "",
        "AbsRel 0.000 flat things, 0.000 around",
        "AbsRel 0.516 flat things, 0.000 around",
        "AbsRel 0.121 flat things, 0.000 around",
        "AbsRel 0.100 flat things, 0.100 around",
    ]
    assert [tile.warning for tile in tiles] == [""] * 5 + [UNTRAINED]
    assert "what deep predicts" in tiles[3].text and "alignment of deep" in tiles[3].text
    scale = tiles[3].pictures[1].shape[1] / WIDTH
    black, pale = (matplotlib.colormaps["magma"](x, bytes=True)[:3] for x in (0.0, 1.0))
    outlines = 0.07  # most of a panel that they cover
    exact, deep, far = (tiles[number].pictures[1] for number in (2, 3, 5))
    assert count(exact, black) > (1 - outlines) * exact[..., 0].size and count(exact, pale) == 0
    area = 32 * 32 * scale**2
    assert 0.7 * area < count(deep, pale) <= area
    rows, columns = np.nonzero((deep == pale).all(-1))
    assert rows.min() >= 10 * scale - 1 and rows.max() <= 42 * scale
    assert columns.min() >= 8 * scale - 1 and columns.max() <= 40 * scale
    assert count(far, black) == count(far, pale) == 0
    for tile in tiles[2:]:
        depth, error = tile.pictures
        assert depth.shape == error.shape


def test_a_picture_without_truth_has_one_row_and_no_figures(tiles: list[Tile]) -> None:
    sheet(room(truth_m=None, region=None), SYSTEMS)
    assert [tile.heading for tile in tiles] == ["Image", "exact", "deep", "rough", "far"]
    assert {len(tile.pictures) for tile in tiles} == {1}
    assert {tile.caption for tile in tiles} == {""}


def test_a_picture_without_labels_is_measured_as_a_whole(tiles: list[Tile]) -> None:
    sheet(room(region=None), SYSTEMS)
    assert tiles[-1].caption == "AbsRel 0.100 whole picture"


@pytest.mark.parametrize("systems", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("known", [True, False])
def test_sheets_have_a_readable_width(systems: int, known: bool) -> None:
    case = room(depths_m=[wall()] * systems)
    if not known:
        case = dataclasses.replace(case, truth_m=None, region=None)
    found = sheet(case, [system(HOSTILE * 9)] * systems)
    assert found.width <= 2400
    assert found.width >= 1600 or systems < 3
    assert found.width / found.height > 0.5


def test_sky_and_unknown_depth_are_shown_as_such(tiles: list[Tile]) -> None:
    truth_m = wall()
    truth_m[:20] = np.inf
    nothing = np.full_like(truth_m, np.nan)
    sheet(room(depths_m=[truth_m, nothing], truth_m=truth_m), SYSTEMS[:2])
    assert count(tiles[1].pictures[0], SKY_COLOUR) > 0.2 * tiles[1].pictures[0][..., 0].size
    assert count(tiles[3].pictures[0], (128, 128, 128)) == tiles[3].pictures[0][..., 0].size


def test_depths_of_other_systems_are_refused(tmp_path: Path) -> None:
    wrong = room(depths_m=[wall()])
    with pytest.raises(ValueError, match="a room: expected 4 depth maps, found 1"):
        sheet(wrong, SYSTEMS)
    with pytest.raises(ValueError, match="a room: expected 4 depth maps, found 1"):
        write_page(tmp_path / "page.html", [wrong], SYSTEMS, None)
    with pytest.raises(ValueError, match="figures of 4 systems, found 1"):
        write_page(tmp_path / "page.html", [room()], SYSTEMS, [{}])
    with pytest.raises(UserError, match="is a directory"):
        write_page(tmp_path, [room()], SYSTEMS, None)


def page_of(folder: Path, *cases: Case, systems: list[System] | None = None) -> tuple[Page, str]:
    chosen = systems or SYSTEMS
    table = measure(cases) if any(case.truth_m is not None for case in cases) else None
    text = write_page(folder / "page.html", cases, chosen, table).read_text("utf-8")
    return Page(text), text


def decoded(page: Page) -> dict[str, np.ndarray]:
    """Alternative text -> pixels, of the pictures inside the page."""
    found = {}
    for tag, attributes in page.tags:
        if tag == "img" and "src" in attributes:
            kind, data = re.fullmatch(r"data:image/(.*?);base64,(.*)", attributes["src"]).groups()
            assert kind == "webp"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                found[attributes["alt"]] = np.asarray(image.convert("RGB")).astype(int)
    return found


def test_the_page_is_one_self_contained_file(tmp_path: Path) -> None:
    page, text = page_of(tmp_path, room(), room(name="another", truth_m=None, region=None))
    assert text.startswith("<!doctype html>")
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "base", "use"}
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    again = write_page(tmp_path / "again.html", [room()], SYSTEMS, measure([room()]))
    once = write_page(tmp_path / "once.html", [room()], SYSTEMS, measure([room()]))
    assert again.read_bytes() == once.read_bytes()


def test_the_page_shows_every_depth_in_the_same_colours(tmp_path: Path) -> None:
    truth_m = np.where(np.arange(WIDTH) < 48, 1, 9)[None].repeat(HEIGHT, 0).astype(np.float32)
    level = [np.full_like(truth_m, depth) for depth in (3, 3, 6)]
    pictures = decoded(
        page_of(tmp_path, room(depths_m=level, truth_m=truth_m), systems=SYSTEMS[:3])[0]
    )
    assert set(pictures) == {
        f"{name} of a room"
        for name in (
            "Image", "True depth", "exact", "exact: error", "deep", "deep: error", "rough",
            "rough: error",
        )
    }  # fmt: skip
    for name, depth_m in zip(("exact", "deep", "rough"), level, strict=True):
        expected = colour_depth(depth_m, low_m=1, high_m=9).astype(int)
        assert np.abs(pictures[f"{name} of a room"] - expected).max() <= 8  # WebP loses some
    assert np.abs(pictures["Image of a room"] - PAINT).max() <= 8


def test_an_opening_that_is_flattened_shows_in_its_own_column() -> None:
    """A system that makes everything flat is right on mirrors and wrong where there is depth."""
    region = labelled()
    opening = (slice(0, 8), slice(0, 15))
    assert not region[opening].any()
    region[opening] = Region.DECOY
    case = dataclasses.replace(room(region=region), depths_m=[wall(), altered(opening, 0.5)])
    right, flattened = measure([case])
    assert right["decoy"]["abs_rel"] == 0 and right["decoy"]["pixels"] == 120
    assert flattened["decoy"]["abs_rel"] == pytest.approx(0.5)
    assert flattened["mirror"] == right["mirror"]


def test_the_table_holds_the_figures_and_marks_the_best(tmp_path: Path) -> None:
    cases = [room(), room(region=None)]
    table = measure(cases)
    page, _ = page_of(tmp_path, *cases)
    (texts,), (values,) = page.tables, page.values
    columns = [
        (region, metric)
        for region, metrics in comparison._COLUMNS.items()
        for metric in metrics
        if region in table[0]
    ]
    assert values[2:] == [[row[region][metric] for region, metric in columns] for row in table]
    assert texts[0] == [
        "Systemalignment",
        "Mirrors1 picture, 1 thing",
        "Art1 picture, 1 thing",
        "Mirrors and art1 picture, 2 things",
        "Background1 picture",
        "Clean images1 picture",
    ]
    relative, share, relief = "AbsRel ↓", "δ < 1.25 ↑", "Relief ↓"
    assert texts[1] == [relative, share, relief] * 3 + [relative, share] * 2
    for row, one in zip(texts[2:], SYSTEMS, strict=True):
        assert row[0] == one.label + one.alignment + (UNTRAINED if one.untrained else "")
    best = []
    for row in table[:3]:  # the fourth has random weights
        for region, metric in columns:
            every = [other[region][metric] for other in table[:3]]
            first = max(every) if metric == "delta1" else min(every)
            if row[region][metric] == first and len(set(every)) > 1:
                best.append(first)
    assert page.best == best and len(best) > 10


def test_a_system_with_random_weights_is_never_the_best_and_is_said_so_loudly(
    tmp_path: Path,
) -> None:
    both = [system("honest"), system("random", untrained=True)]
    case = room(depths_m=[1.3 * wall(), wall()])  # by luck it is right
    page, text = page_of(tmp_path, case, systems=both)
    assert page.best == []
    assert text.count(UNTRAINED) == 3 and f"{UNTRAINED.capitalize()}</b>" in text
    options = [a for tag, a in page.tags if tag == "button" and "random" in str(a.get("data-name"))]
    assert [a["data-name"] for a in options] == [
        "random (random weights)",
        "random (random weights): error",
    ]
    honest, _ = page_of(tmp_path, case, systems=[system("honest"), system("other")])
    assert UNTRAINED not in honest.text.lower() and len(honest.best) > 0


def test_the_page_says_what_is_known_of_each_system_and_of_the_camera(tmp_path: Path) -> None:
    known, _ = page_of(tmp_path, room())
    for one in SYSTEMS:
        for fact in (one.predicts, one.weights, one.alignment, one.licence, one.note):
            assert fact in known.text
    assert "60° across are assumed" not in known.text and "By region" in known.text
    free, text = page_of(tmp_path, room(truth_m=None, region=None, K_px=None))
    assert "60° across are assumed" in free.text
    assert "By region" not in free.text and free.tables == [] and "Relative error" not in text
    assert "far (relative, no metres)" in free.text


def test_an_assumed_camera_sees_60_degrees() -> None:
    (fx, _, cx), (_, fy, cy), _ = room(K_px=None).camera
    assert math.degrees(2 * math.atan(WIDTH / 2 / fx)) == pytest.approx(60)
    assert fx == fy and (cx, cy) == (WIDTH / 2, HEIGHT / 2)


def test_hostile_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    plain, _ = page_of(tmp_path, room())
    fields = ("label", "predicts", "weights", "alignment", "licence", "note")
    hostile = [
        dataclasses.replace(one, **dict.fromkeys(fields, f"{HOSTILE} {one.label}"))
        for one in SYSTEMS
    ]
    page, text = page_of(tmp_path, room(name=HOSTILE), systems=hostile)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not any("onerror" in a or "onclick" in a for _, a in page.tags)
    assert text.count("<script") == 2 and page.text.count(HOSTILE) > 6 * len(hostile)
    assert len(page.tags) == len(plain.tags)


def test_eight_systems_on_a_picture_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    v, u = np.mgrid[:480, :640]
    depth_m = (2 + u / 400 + np.sin(v / 40)).astype(np.float32)
    noisy = [
        (depth_m * (1 + 0.01 * rng.standard_normal(depth_m.shape))).astype(np.float32)
        for _ in range(8)
    ]
    image = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    case = Case(name="large", image=image, depths_m=noisy, truth_m=depth_m)
    path = write_page(tmp_path / "page.html", [case], [system("s")] * 8, None)
    assert path.stat().st_size < 2e6


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "page.html"
    level = np.full((HEIGHT, WIDTH), 4, np.float32)
    cases = [
        room(depths_m=[level, *room().depths_m[1:]], region=None),
        room(name=HOSTILE),
        room(name="free", truth_m=None, region=None, K_px=None),
    ]
    return write_page(out, cases, SYSTEMS, measure(cases))


def middle(browser: Browser, selector: str) -> tuple[float, float, float]:
    """(left, width, vertical middle) of an element that is scrolled into view."""
    box = browser.run(
        f"(() => {{ const e = document.querySelector('{selector}');"
        "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        "return [b.x, b.width, b.y + b.height / 2]; })()"
    )
    return box[0], box[1], box[2]


def pixel(browser: Browser, x: float, y: float) -> np.ndarray:
    shot = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    with Image.open(io.BytesIO(shot)) as image:
        return np.array(image.convert("RGB").getpixel((round(x), round(y))))


def drag(browser: Browser, y: float, *xs: float) -> None:
    kinds = ["mousePressed", *["mouseMoved"] * (len(xs) - 1), "mouseReleased"]
    for kind, x in zip(kinds, [*xs, xs[-1]], strict=True):
        browser.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="left",
            buttons=0 if kind == "mouseReleased" else 1,
            clickCount=1,
        )


def test_the_divider_is_dragged_and_moved_with_keys(browser: Browser, page_file: Path) -> None:
    """The image is painted in one colour and the first depth is level, so pixels tell the sides."""
    browser.open(page_file)
    shown = "document.querySelector('.slider').querySelectorAll('img')"
    loaded = "image.complete || new Promise(go => image.addEventListener('load', go, {once: true}))"
    browser.run(f"Promise.all([...{shown}].map(image => {loaded})).then(() => true)")
    low, high = room().limits
    level = colour_depth(np.full((1, 1), 4, np.float32), low_m=low, high_m=high)[0, 0].astype(int)
    left, width, y = middle(browser, ".slider")
    y += 60  # away from the handle

    def is_image(share: float) -> bool:
        found = pixel(browser, left + share * width, y)
        near_paint, near_level = (np.abs(found - c).max() <= 12 for c in (PAINT, level))
        assert near_paint != near_level, found
        return bool(near_paint)

    assert [is_image(share) for share in (0.05, 0.45, 0.55, 0.95)] == [True, True, False, False]
    drag(browser, y, left + 0.5 * width, left + 0.6 * width, left + 0.9 * width)
    at = float(browser.run("document.querySelector('.slider input').value"))
    assert at == pytest.approx(90, abs=0.5), "the divider is under the pointer"
    assert [is_image(share) for share in (0.05, 0.88, 0.92)] == [True, True, False]
    for key in ("Home", "ArrowRight"):
        browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key=key, code=key,
                     windowsVirtualKeyCode={"Home": 36, "ArrowRight": 39}[key])  # fmt: skip
    assert browser.run("document.querySelector('.slider input').value") == "0.5"
    assert not is_image(0.05)
    others = browser.run("[...document.querySelectorAll('.slider input')].map(i => i.value)")
    assert others[1:] == ["50", "50"], "every picture has its own divider"
    assert browser.complaints() == []


SHOWN = (
    "[...document.querySelectorAll('.case')].map(c => ['left', 'right'].map(s =>"
    " [...c.querySelectorAll('button[data-key]')].find(b => ['src', 'alt'].every("
    "a => b.querySelector('img')[a] == c.querySelector(`img[data-side=${s}]`)[a])).dataset.key))"
)
INK = (
    "[...document.querySelectorAll('canvas')].map(c => { const d = new Uint32Array("
    "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
    "return [d.filter(x => x).length / d.length, d.reduce((a, x) => (a * 31 + x) | 0, 0)]; })"
)


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.run(
        f"(() => {{ const s = document.querySelector('{selector}'); s.value = '{value}';"
        "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def test_any_picture_is_put_on_either_side_and_into_the_cloud(
    browser: Browser, page_file: Path
) -> None:
    browser.open(page_file)
    assert browser.run(SHOWN) == [["image", "depth 0"]] * 3
    choose(browser, 'select[data-side="left"]', "truth")
    choose(browser, 'select[data-side="right"]', "error 2")
    assert browser.run(SHOWN) == [["truth", "error 2"], *[["image", "depth 0"]] * 2]
    chips = "[...document.querySelectorAll('.chip')].slice(0, 2).map(c => c.textContent)"
    assert browser.run(chips) == ["True depth", "rough: error"]

    before = browser.run(INK)
    assert len(before) == 3 and min(share for share, _ in before) > 0.05
    left, width, y = middle(browser, '.case button[data-key="depth 1"]')
    drag(browser, y, left + width / 2)
    assert browser.run(SHOWN)[0] == ["truth", "depth 1"]
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.key)"
    assert browser.run(pressed)[:2] == ["truth", "depth 1"]
    assert browser.run("document.querySelector('.cloud select').value") == "1"
    after = browser.run(INK)
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, False, False]
    choose(browser, ".cloud select", "truth")
    assert browser.run(INK)[0] != after[0]
    browser.run("document.querySelector('button[data-view=above]').click()")
    left, width, y = middle(browser, "canvas")
    turned = browser.run(INK)
    drag(browser, y, left + 50, left + 150)
    assert browser.run(INK)[0] != turned[0]

    outline = "getComputedStyle(document.querySelectorAll('.slider .outline')[0]).display"
    assert browser.run(outline) != "none"
    browser.run("document.querySelector('.check input').click()")
    assert browser.run(outline) == "none"
    assert browser.complaints() == [] and browser.requests() <= {"file", "data", "chrome"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1500])
def test_the_page_fits_and_everything_has_a_name(
    browser: Browser, page_file: Path, scheme: str, width: int
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.call("Emulation.setEmulatedMedia", features=features)
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    try:
        browser.open(page_file)
        assert browser.run("document.documentElement.scrollWidth - window.innerWidth") <= 0
        page = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (page == "rgb(255, 255, 255)") == (scheme == "light")
        sizes = browser.run(
            "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
        )
        assert len(sizes) == 10 + 10 + 5 + 2 * 3 and min(sizes) == WIDTH
        browser.call("Accessibility.enable")
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        named = [
            (node["role"]["value"], node["name"]["value"])
            for node in nodes
            if not node["ignored"]
            and node["role"]["value"] in {"button", "checkbox", "combobox", "image", "slider"}
        ]
        roles = [role for role, _ in named]
        assert roles.count("slider") == 3 and roles.count("combobox") == 9
        assert roles.count("button") == 10 + 10 + 5 + 3 * 3 and roles.count("checkbox") == 1
        assert all(name.strip() for _, name in named), named
        assert browser.complaints() == []
    finally:
        browser.call("Accessibility.disable")
        browser.call("Emulation.clearDeviceMetricsOverride")
        browser.call("Emulation.setEmulatedMedia", features=[])
