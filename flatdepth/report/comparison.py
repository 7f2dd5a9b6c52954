"""The same pictures through several depth systems, as a sheet and as a page: choose by looking.

Systems and their depth come from the caller, already aligned; here are the figures, the colours and
what is said about them. What the page looks like is in ``flatdepth/show/templates/systems.html``.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image
from torch import Tensor

from flatdepth.judge.metrics import RegionTable, flatness_residual, image_metrics, region_masks
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.predict.pointcloud import centred_pinhole, focal_from_fov
from flatdepth.report.page import ERROR_LIMIT, RELIEF_LIMIT
from flatdepth.show import html
from flatdepth.show.clouds import cloud_json
from flatdepth.show.pictures import (
    REGION_COLOURS,
    Outlines,
    Tile,
    colour_depth,
    colour_error,
    colour_region,
    depth_limits,
    draw_outlines,
    metres,
    region_outlines,
    tile_sheet,
)
from flatdepth.show.run_page import Cell, Label, cells, definitions, metric_label, region_label
from flatdepth.types import ALL_METRICS, Region

ASSUMED_FOV_DEG = 60.0
"""Across a picture whose camera is not known, for its point cloud."""

UNTRAINED = "random weights: shows the form only"

Table = Mapping[str, Mapping[str, float]]
"""Region -> metric -> mean, as ``measure`` gives it."""

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "mirror": ("abs_rel", "delta1", "flatness_residual"),
    "art": ("abs_rel", "delta1", "flatness_residual"),
    "flat": ("abs_rel", "delta1", "flatness_residual"),
    "background": ("abs_rel", "delta1"),
    "decoy": ("abs_rel", "delta1"),
    "clean": ("abs_rel", "delta1"),
}
_FLAT = (Region.MIRROR, Region.ART)
_LEAST_PIXELS = 64
_MOST_THINGS = 1 << 20
_SHEET_PX, _WIDEST_PX, _MOST_COLUMNS = 1980, 480, 6
_PAGE_PX = 640
_RAMP = np.linspace(1, 2, 17, dtype=np.float32)[None]
_CLOUD_REACH = 4.0
"""Points of a cloud that are this many times as far as the colours reach are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A way to get depth from a picture.

    Attributes:
        label: how it is called.
        predicts: what it says, in words: "depth up to scale and shift".
        weights: where they come from, in words.
        alignment: what was fitted to the truth, in words: "none (metric)".
        licence: of the weights.
        note: anything else worth saying, or "".
        untrained: its weights are random, so its depth means nothing; said loudly.
    """

    label: str
    predicts: str
    weights: str
    alignment: str
    licence: str
    note: str = ""
    untrained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A picture, its depth by every system, and the truth where it is known.

    Attributes:
        name: how it is called.
        image: uint8 sRGB.
        depths_m: per system the aligned planar z: metres where there is truth, else on one scale
            for all systems. Not finite or <= 0 where a system says nothing.
        truth_m: planar z in metres.
        valid: where the truth counts; None: wherever it is finite and above 0.
        region: values of ``Region`` where flat things are labelled.
        K_px: intrinsics of the picture, pixel centres at integers + 0.5.
        range_m: that depth is brought into before it is measured, as in ``judge.protocol``.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    depths_m: Sequence[Float32[np.ndarray, "h w"]]
    truth_m: Float32[np.ndarray, "h w"] | None = None
    valid: Bool[np.ndarray, "h w"] | None = None
    region: UInt8[np.ndarray, "h w"] | None = None
    K_px: Float64[np.ndarray, "3 3"] | None = None
    range_m: tuple[float, float] = PROTOCOLS["none"].range_m

    @property
    def camera(self) -> Float64[np.ndarray, "3 3"]:
        """``K_px``, or square pixels that see ``ASSUMED_FOV_DEG`` across."""
        if self.K_px is not None:
            return self.K_px
        height, width = self.image.shape[:2]
        return centred_pinhole(focal_from_fov(ASSUMED_FOV_DEG, width), height, width)

    @property
    def limits(self) -> tuple[float, float]:
        """The depths at the ends of the colours of all its pictures."""
        if self.truth_m is not None:
            return depth_limits(self.truth_m, self.counted)
        pooled = np.concatenate(list(self.depths_m))
        return depth_limits(pooled, np.ones(pooled.shape, bool))

    @property
    def counted(self) -> Bool[np.ndarray, "h w"]:
        """Where there is truth to compare with."""
        if self.truth_m is None:
            return np.zeros(self.image.shape[:2], bool)
        known = np.isfinite(self.truth_m) & (self.truth_m > 0)
        return known if self.valid is None else known & self.valid

    @property
    def outlines(self) -> Outlines:
        """Around its mirrors and pictures."""
        return {} if self.region is None else region_outlines(self.region, _FLAT)

    def ends(self) -> tuple[str, str]:
        """``limits`` in words."""
        low, high = self.limits
        if self.truth_m is None:
            return "near", "far (relative, no metres)"
        return metres(low), f"{metres(high)} or more"


def measure(cases: Iterable[Case]) -> list[Table]:
    """The figures of every system by region: means over the pictures that have truth.

    Regions and formulas are those of ``judge.metrics``, without "frame"; a picture whose flat
    things are not labelled is "clean". "images" and "pixels" are what a mean is over.
    "flatness_residual" of "mirror", "art" and "flat" is the mean over "things": the connected parts
    of a region that have 64 pixels or more.

    Args:
        cases: taken one at a time; each by the same systems.
    """
    books: list[_Book] = []
    for number, case in enumerate(cases):
        books = books or [_Book(RegionTable(), RegionTable(("residual",))) for _ in case.depths_m]
        if case.truth_m is not None:
            _score(case, case.truth_m, number, books)
    return [_table(*book) for book in books]


class _Book(NamedTuple):
    """The rows of a system: ``METRICS`` per (picture, region), relief per (thing, region)."""

    depth: RegionTable
    relief: RegionTable


def _score(
    case: Case, truth_m: Float32[np.ndarray, "h w"], number: int, books: Sequence[_Book]
) -> None:
    near, far = case.range_m
    counted, K_px = _batch(case.counted), torch.tensor(case.camera)[None]
    truth = torch.where(counted, _batch(truth_m), 1.0)
    region = np.zeros(truth_m.shape, np.uint8) if case.region is None else case.region
    masks = region_masks(_batch(region), counted, flat_known=case.region is not None)
    things = [
        (member.name.lower(), _batch(part))
        for member in _FLAT
        for part in _parts(case.counted & (region == member))
    ]
    for book, depth_m in zip(books, case.depths_m, strict=True):
        pred = _batch(depth_m)
        for name in masks.keys() & _COLUMNS:
            mask = masks[name]
            row = image_metrics(pred, truth, mask, min_m=near, max_m=far)
            book.depth.add(torch.tensor([number]), name, *row)
        for place, (name, part) in enumerate(things):
            residual = flatness_residual(pred, K_px, part, min_m=near, max_m=far)[:, None]
            identity = torch.tensor([number * _MOST_THINGS + place])
            for each in (name, "flat"):
                book.relief.add(identity, each, residual, part.sum((1, 2, 3)))


def _batch(array: np.ndarray) -> Tensor:
    """(h, w) -> (1, 1, h, w)."""
    return torch.tensor(array)[None, None]


def _parts(mask: Bool[np.ndarray, "h w"]) -> list[Bool[np.ndarray, "h w"]]:
    """The connected parts of a mask that have ``_LEAST_PIXELS`` or more; corners do not connect.

    Every pixel takes the highest number of its run from the left, in all four directions by turns,
    until nothing changes.
    """
    before = np.zeros(mask.shape, np.int64)
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while not np.array_equal(before, labels):
        before = labels
        for _ in range(4):
            runs = np.cumsum(~mask, axis=1) * (mask.size + 1)
            labels = (np.maximum.accumulate(labels + runs, axis=1) - runs) * mask
            labels, mask = np.rot90(labels), np.rot90(mask)
    numbers, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == number for number in numbers[sizes >= _LEAST_PIXELS]]


def _table(depth: RegionTable, relief: RegionTable) -> Table:
    table = depth.result(_LEAST_PIXELS)
    for region, row in relief.result().items():
        table[region] |= {"flatness_residual": row["residual"], "things": row["images"]}
    return table


def sheet(case: Case, systems: Sequence[System]) -> Image.Image:
    """One picture by every system: image, truth, every depth in the same colours.

    Where there is truth, each depth has its relative error below it, with the outlines of mirrors
    and pictures, and AbsRel on those and around them.

    Raises:
        ValueError: the depths are not those of these systems.
    """
    _expect_match(case, systems)
    tables = measure([case])
    columns = _columns(len(systems) + (1 if case.truth_m is None else 2))
    rows, across = case.image.shape[:2]
    width = min(_WIDEST_PX, _SHEET_PX // columns)
    size = (width, round(width * rows / across))
    low_m, high_m = case.limits
    outlines = case.outlines

    def fit(panel: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        return np.asarray(Image.fromarray(panel).resize(size, Image.Resampling.BILINEAR))

    def depth(depth_m: Float32[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        return fit(colour_depth(depth_m, low_m=low_m, high_m=high_m))

    shown = [case.image]
    if case.region is not None:
        shown.append(colour_region(case.image, case.region))
    tiles = [Tile(heading="Image", pictures=list(map(fit, shown)))]
    if case.truth_m is not None:
        tiles.append(Tile(heading="True depth", pictures=[depth(case.truth_m)]))
    for system, depth_m, table in zip(systems, case.depths_m, tables, strict=True):
        pictures = [depth(depth_m)]
        if case.truth_m is not None:
            error = fit(colour_error(depth_m, case.truth_m, case.counted, ERROR_LIMIT))
            pictures.append(draw_outlines(error, outlines, width / across))
        tiles.append(
            Tile(
                heading=system.label,
                text=f"{system.predicts}; alignment: {system.alignment}",
                warning=UNTRAINED if system.untrained else "",
                pictures=pictures,
                caption=_caption(table),
            )
        )
    near, far = case.ends()
    return tile_sheet(
        tiles,
        title=case.name,
        columns=columns,
        regions=case.region is not None,
        depth=(f"depth: {near}", far),
        error_limit=None if case.truth_m is None else ERROR_LIMIT,
    )


def _columns(tiles: int) -> int:
    """Per row, so that the rows are as even as can be."""
    return -(-tiles // -(-tiles // _MOST_COLUMNS))


def _caption(table: Table) -> str:
    places = (("flat", "flat things"), ("background", "around"), ("clean", "whole picture"))
    found = [f"{table[r]['abs_rel']:.3f} {words}" for r, words in places if r in table]
    return f"AbsRel {', '.join(found)}" if found else ""


def _expect_match(case: Case, systems: Sequence[System]) -> None:
    if len(case.depths_m) != len(systems):
        raise ValueError(
            f"{case.name}: expected {len(systems)} depth maps, found {len(case.depths_m)}"
        )


class _Picture(NamedTuple):
    """``key`` is how the page's script calls it."""

    key: str
    name: str
    webp: bytes


class _Bar(NamedTuple):
    """A figure of a picture; ``share`` in 0..1 is how long its bar is."""

    name: str
    cell: Cell
    share: float
    colour: str


class _Card(NamedTuple):
    """A system on one picture."""

    system: System
    pictures: Sequence[_Picture]
    bars: Sequence[_Bar]


class _Exhibit(NamedTuple):
    """A case as the page shows it; ``outlines`` are (colour, path of an SVG)."""

    name: str
    size: tuple[int, int]
    measured: bool
    camera_known: bool
    ends: tuple[str, str]
    own: Sequence[_Picture]
    cards: Sequence[_Card]
    outlines: Sequence[tuple[str, str]]
    cloud: str


def write_page(
    out: Path, cases: Sequence[Case], systems: Sequence[System], table: Sequence[Table] | None
) -> Path:
    """Write one HTML page that loads nothing and return its path.

    Args:
        out: file to write.
        cases: the pictures to show.
        table: per system its figures over all pictures, as from ``measure``; these may be more
            than are shown. None if no picture has truth.

    Raises:
        UserError: ``out`` is a directory.
        ValueError: the depths or figures are not those of these systems.
    """
    for case in cases:
        _expect_match(case, systems)
    if table is not None and len(table) != len(systems):
        raise ValueError(f"expected the figures of {len(systems)} systems, found {len(table)}")
    return html.write_page(
        out,
        "systems.html",
        systems=systems,
        exhibits=[_exhibit(case, systems) for case in cases],
        columns=_columns(len(systems) + 1),
        depth_ramp=_gradient(colour_depth(1 / _RAMP[:, ::-1], low_m=0.5, high_m=1.0)),
        error_ramp=_gradient(colour_error(_RAMP, np.ones_like(_RAMP), _RAMP > 0, 1.0)),
        error_limit=f"{ERROR_LIMIT:.0%}",
        relief_limit=f"{RELIEF_LIMIT:.0%}",
        untrained=UNTRAINED,
        reach=f"{_CLOUD_REACH:g}",
        fov=f"{ASSUMED_FOV_DEG:g}",
        regions=_regions(systems, table or []),
        metrics=definitions(("abs_rel", "delta1", "flatness_residual")),
    )


def _exhibit(case: Case, systems: Sequence[System]) -> _Exhibit:
    low_m, high_m = case.limits
    # the viewer expects metres: without any, the nearest surfaces are put at two
    unit = np.float32(2 / low_m if case.truth_m is None else 1)
    own = [_Picture("image", "Image", _webp(case.image))]
    maps = {str(number): depth_m for number, depth_m in enumerate(case.depths_m)}
    if case.truth_m is not None:
        true = colour_depth(case.truth_m, low_m=low_m, high_m=high_m)
        own.append(_Picture("truth", "True depth", _webp(true)))
        maps = {"truth": case.truth_m} | maps
    cards = []
    for number, (system, depth_m, bars) in enumerate(
        zip(systems, case.depths_m, _bars(case, systems), strict=True)
    ):
        colours = colour_depth(depth_m, low_m=low_m, high_m=high_m)
        name = f"{system.label} (random weights)" if system.untrained else system.label
        pictures = [_Picture(f"depth {number}", name, _webp(colours))]
        if case.truth_m is not None:
            error = colour_error(depth_m, case.truth_m, case.counted, ERROR_LIMIT)
            pictures.append(_Picture(f"error {number}", f"{name}: error", _webp(error)))
        cards.append(_Card(system, pictures, bars))
    return _Exhibit(
        name=case.name,
        size=(case.image.shape[1], case.image.shape[0]),
        measured=case.truth_m is not None,
        camera_known=case.K_px is not None,
        ends=case.ends(),
        own=own,
        cards=cards,
        outlines=[
            (_css(REGION_COLOURS[member]), " ".join(map(_path, polygons)))
            for member, polygons in case.outlines.items()
        ],
        cloud=cloud_json(
            case.image,
            {
                name: np.where(z <= _CLOUD_REACH * high_m, z * unit, np.float32(np.nan))
                for name, z in maps.items()
            },
            case.camera,
        ),
    )


def _bars(case: Case, systems: Sequence[System]) -> list[list[_Bar]]:
    """Per system what is known of it on this picture."""
    tables = measure([case])
    rows: list[list[_Bar | None]] = []
    for name, region, metric, limit, colour in (
        ("Flat things", "flat", "abs_rel", ERROR_LIMIT, "var(--bad)"),
        ("Around them", "background", "abs_rel", ERROR_LIMIT, "var(--muted)"),
        ("Whole picture", "clean", "abs_rel", ERROR_LIMIT, "var(--muted)"),
        ("Relief", "flat", "flatness_residual", RELIEF_LIMIT, "var(--relief)"),
    ):
        values = [table.get(region, {}).get(metric, math.nan) for table in tables]
        rows.append(
            [
                cell and _Bar(name, cell, min(1.0, value / limit), colour)
                for cell, value in zip(_column(values, systems, metric), values, strict=True)
            ]
        )
    return [[bar for bar in column if bar] for column in zip(*rows, strict=True)]


def _column(values: Sequence[float], systems: Sequence[System], metric: str) -> list[Cell | None]:
    """Figures of one metric; systems with random weights cannot be the best."""
    eligible = [math.nan if s.untrained else v for s, v in zip(systems, values, strict=True)]
    ranked = cells(eligible, ALL_METRICS[metric].better)
    return [
        shown and (*shown[:2], bool(rank and rank[2]))
        for shown, rank in zip(cells(values, None), ranked, strict=True)
    ]


class _Region(NamedTuple):
    """A region of the table; ``columns`` are (metric, better, a cell per system)."""

    label: Label
    over: str
    columns: Sequence[tuple[str, str, Sequence[Cell | None]]]


def _regions(systems: Sequence[System], table: Sequence[Table]) -> list[_Region]:
    regions = []
    for region, metrics in _COLUMNS.items():
        rows = [one.get(region, {}) for one in table]
        counts = [row["images"] for row in rows if "images" in row]
        if not counts:
            continue
        over = _count(max(counts), "picture")
        things = [row["things"] for row in rows if "things" in row]
        if things:
            over += f", {_count(max(things), 'thing')}"
        columns = []
        for metric in metrics:
            values = [row.get(metric, math.nan) for row in rows]
            columns.append(
                (metric_label(metric), ALL_METRICS[metric].better, _column(values, systems, metric))
            )
        regions.append(_Region(region_label(region), over, columns))
    return regions


def _count(number: float, noun: str) -> str:
    return f"{number:.0f} {noun}{'' if number == 1 else 's'}"


def _path(polygon: Float64[np.ndarray, "n 2"]) -> str:
    return "M" + "L".join(f"{u:g} {v:g}" for u, v in polygon.tolist()) + "Z"


def _gradient(colours: UInt8[np.ndarray, "1 n 3"]) -> str:
    """A CSS gradient."""
    return f"linear-gradient(to right, {', '.join(map(_css, colours[0].tolist()))})"


def _css(colour: Sequence[int]) -> str:
    return f"rgb({', '.join(map(str, colour))})"


def _webp(panel: UInt8[np.ndarray, "h w 3"]) -> bytes:
    picture = Image.fromarray(panel)
    picture.thumbnail((_PAGE_PX, _PAGE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88, method=4)
    return buffer.getvalue()
