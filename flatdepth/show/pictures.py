"""Depth, regions and errors as colours; contact sheets and training curves.

numpy in; numpy, PIL images or SVG bytes out. Nothing here uses pyplot, whose figures live in global
state, so pictures may be made in the middle of a training run.
"""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float32, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from flatdepth.types import Region

RGB = tuple[int, int, int]

# Colours 2, 3, 4 and 8 of the palette of Okabe & Ito, which stays distinct for colour-blind eyes.
REGION_COLOURS: Mapping[Region, RGB] = {
    Region.MIRROR: (86, 180, 233),
    Region.ART: (230, 159, 0),
    Region.FRAME: (0, 158, 115),
    Region.DECOY: (204, 121, 167),
}
FLAT_COLOUR: RGB = (213, 94, 0)
UNKNOWN_COLOUR: RGB = (128, 128, 128)
SKY_COLOUR: RGB = (20, 24, 48)

_DEPTH_MAP = "Spectral_r"
_ERROR_MAP = "magma"
_NO_LIMITS_M = (1.0, 10.0)
_LEAST_RATIO = 1.2

_PAPER: RGB = (255, 255, 255)
_INK: RGB = (31, 35, 40)
_MUTED_INK: RGB = (92, 99, 108)
_WARNING_INK: RGB = (179, 55, 47)
_TITLE_SIZE, _HEADING_SIZE, _TEXT_SIZE, _SMALL_SIZE = 21, 18, 15, 13
_MARGIN, _GAP = 20, 6
_LABEL_WIDTH, _LABEL_LINE, _BAR_WIDTH, _LEGEND_LINE = 170, 20, 76, 26
_TILE_GAP, _TILE_TEXT_LINES = 14, 3

_LIGHT = {"ink": "#1f2328", "muted": "#667080", "grid": "#e4e7eb", "loss": "#2b66b1"}
_DARK = {"ink": "#e6e8eb", "muted": "#98a1ad", "grid": "#2d333b", "loss": "#79aef0"}
_MOST_BLOCKS = 700
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

# Colour, line style and width in the validation panel; None: the ink of the page.
_REGION_LINES: Mapping[str, tuple[RGB | None, str, float]] = {
    "flat": (FLAT_COLOUR, "-", 2.4),
    **{name.name.lower(): (colour, "-", 1.2) for name, colour in REGION_COLOURS.items()},
    "background": (None, "-", 1.8),
    "clean": (None, "--", 1.8),
}


def depth_limits(
    depth_m: Float32[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"]
) -> tuple[float, float]:
    """The depths in metres that the two ends of the colour map stand for.

    They are the 2nd and 98th percentile of the valid finite depths, at least a factor 1.2 apart
    so that the noise of a flat wall is not stretched over the whole map; (1, 10) if there is no
    valid pixel. Take them from the truth and use them for truth and predictions alike.
    """
    known = depth_m[valid & np.isfinite(depth_m) & (depth_m > 0)]
    if known.size == 0:
        return _NO_LIMITS_M
    low, high = (float(limit) for limit in np.percentile(known.astype(np.float64), (2, 98)))
    widen = math.sqrt(max(1.0, _LEAST_RATIO * low / high))
    return low / widen, high * widen


def colour_depth(
    depth_m: Float32[np.ndarray, "h w"], *, low_m: float, high_m: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Colour a depth map: near is warm (red), far is cold (violet).

    The colour is linear in *inverse* depth from ``low_m`` to ``high_m``, clipped outside: on that
    scale a flat surface is a straight ramp, and what a monocular model gets wrong close by shows.

    Args:
        depth_m: planar z in metres. NaN and values <= 0 are unknown and become mid-grey;
            +inf is sky and becomes a dark blue that the colour map does not contain.
        low_m, high_m: the nearest and farthest depth of the map, 0 < low_m < high_m.
    """
    if not 0 < low_m < high_m:
        raise ValueError(f"depth limits must satisfy 0 < low_m < high_m, got {low_m}, {high_m}")
    sky = np.isposinf(depth_m)
    known = np.isfinite(depth_m) & (depth_m > 0)
    inverse = 1.0 / np.where(known, depth_m, np.float32(high_m)).astype(np.float64)
    nearness = (inverse - 1.0 / high_m) / (1.0 / low_m - 1.0 / high_m)
    colours = _apply_map(_DEPTH_MAP, nearness)
    colours[~known] = UNKNOWN_COLOUR
    colours[sky] = SKY_COLOUR
    return colours


def colour_error(
    pred_m: Float32[np.ndarray, "h w"],
    truth_m: Float32[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    limit: float,
) -> UInt8[np.ndarray, "h w 3"]:
    """Colour the relative error ``|pred - truth| / truth``: black is exact, pale is ``limit``.

    Args:
        pred_m, truth_m: planar z in metres; the truth is positive and finite where ``valid``.
        valid: the rest becomes mid-grey.
        limit: the relative error at the bright end (0.3 for 30 %); larger errors and predictions
            that are not finite are clipped to it.
    """
    truth = np.where(valid, truth_m, np.float32(1)).astype(np.float64)
    error = np.abs(pred_m.astype(np.float64) - truth) / truth
    colours = _apply_map(_ERROR_MAP, np.where(np.isfinite(error), error / limit, 1.0))
    colours[~valid] = UNKNOWN_COLOUR
    return colours


def colour_region(
    image: UInt8[np.ndarray, "h w 3"], region: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Show where each region lies: the image dimmed, every region tinted and outlined.

    The tints are ``REGION_COLOURS``; the background (``Region.BACKGROUND``) has none. The outline
    lies inside its region and is about 1/150 of the shorter side wide.
    """
    height, width = region.shape
    legend = np.zeros((256, 3), np.float32)
    for member, colour in REGION_COLOURS.items():
        legend[member] = colour
    tint = legend[region]
    pasted = (region != Region.BACKGROUND)[..., None]
    dimmed = 0.55 * image.astype(np.float32)
    outline = _region_edges(region, max(1, round(min(height, width) / 150)))[..., None] & pasted
    mixed = np.where(pasted, 0.5 * image + 0.5 * tint, dimmed)
    return np.where(outline, tint, mixed).round().astype(np.uint8)


def contact_sheet(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    columns: Sequence[str],
    row_titles: Sequence[str],
    *,
    title: str,
    regions: bool = True,
    limits_m: Sequence[tuple[float, float]] | None = None,
    error_limit: float | None = None,
    panel_width: int = 256,
) -> Image.Image:
    """Lay panels out as a table with headings, row labels and a legend.

    Args:
        rows: one sequence of panels per row, one panel per column, of any size; all are fitted to
            ``panel_width`` pixels by the aspect ratio of the first one.
        columns: the heading of each column.
        row_titles: the label of each row; wrapped, and cut off at the height of the row. May
            contain line breaks.
        title: the heading of the sheet.
        regions: whether to add the legend of ``colour_region``.
        limits_m: per row the limits given to ``colour_depth``; draws a colour bar beside each
            row and the colours of unknown depth and sky in the legend.
        error_limit: the limit given to ``colour_error``; adds its colour bar to the legend.

    Raises:
        ValueError: if there is no row, or the numbers of panels, headings, labels and limits do
            not agree.
    """
    if not rows or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"a sheet needs rows of {len(columns)} panels, one per column")
    if len(row_titles) != len(rows) or (limits_m is not None and len(limits_m) != len(rows)):
        raise ValueError(f"a sheet of {len(rows)} rows needs as many row titles and limits")
    first = rows[0][0]
    size = (panel_width, round(panel_width * first.shape[0] / first.shape[1]))
    left = _MARGIN + _LABEL_WIDTH
    top = _MARGIN + 46
    right = left + len(columns) * (size[0] + _GAP) - _GAP
    width = right + (_BAR_WIDTH if limits_m is not None else 0) + _MARGIN
    depth = None if limits_m is None else ("depth: near", "far")
    legend = _legend_items(regions=regions, depth=depth, error_limit=error_limit)
    lines = _flow(legend, width - left - _MARGIN)
    legend_top = top + 26 + len(rows) * (size[1] + _GAP) + 8
    height = legend_top + len(lines) * _LEGEND_LINE + _MARGIN - 8

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (left, _MARGIN), _fit(title, _TITLE_SIZE, width - left - _MARGIN), _INK, _font(_TITLE_SIZE)
    )
    for index, name in enumerate(columns):
        x = left + index * (size[0] + _GAP)
        draw.text((x, top), _fit(name, _TEXT_SIZE, size[0]), _INK, _font(_TEXT_SIZE))
    for index, (row, label) in enumerate(zip(rows, row_titles, strict=True)):
        y = top + 26 + index * (size[1] + _GAP)
        label_lines = _wrap(label, _SMALL_SIZE, _LABEL_WIDTH - 14)
        text = "\n".join(label_lines[: max(1, size[1] // _LABEL_LINE)])
        draw.multiline_text((_MARGIN, y), text, _INK, _font(_SMALL_SIZE), spacing=5)
        for column, panel in enumerate(row):
            fitted = ImageOps.pad(
                Image.fromarray(panel), size, Image.Resampling.BILINEAR, color=_PAPER
            )
            sheet.paste(fitted, (left + column * (size[0] + _GAP), y))
        if limits_m is not None:
            _draw_depth_bar(sheet, (right + 12, y), size[1], limits_m[index])
    _draw_legend(sheet, (left, legend_top), lines)
    return sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Pictures one above the other, and what is written above and below them.

    Attributes:
        heading: one line.
        text: under the heading, cut off after three lines.
        warning: a line in red under that.
        pictures: all tiles of a sheet have pictures of one size.
        caption: a line below the pictures.
    """

    heading: str
    text: str = ""
    warning: str = ""
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]]
    caption: str = ""


def tile_sheet(
    tiles: Sequence[Tile],
    *,
    title: str,
    columns: int,
    regions: bool,
    depth: tuple[str, str],
    error_limit: float | None,
) -> Image.Image:
    """Lay tiles out in rows, with a legend.

    The legend takes the place of the first picture that a tile has less than the others, or the
    foot of the sheet.

    Args:
        columns: tiles per row.
        regions, error_limit: as in ``contact_sheet``.
        depth: what is written at the near and at the far end of the depth's colours.

    Raises:
        ValueError: there is no tile, or the pictures are not of one size.
    """
    sizes = {picture.shape[1::-1] for tile in tiles for picture in tile.pictures}
    if len(sizes) != 1:
        raise ValueError(f"a sheet needs pictures of one size, found {sorted(sizes)}")
    ((width, height),) = sizes
    most = max(len(tile.pictures) for tile in tiles)
    texts = [_wrap(tile.text, _TEXT_SIZE, width)[:_TILE_TEXT_LINES] for tile in tiles]
    warned = any(tile.warning for tile in tiles)
    text_top = 28
    top = text_top + _LABEL_LINE * (max(map(len, texts)) + warned) + 4
    bottom = top + most * (height + _GAP)
    tile_height = bottom + 26 * any(tile.caption for tile in tiles) + _TILE_GAP
    rows = -(-len(tiles) // columns)
    first = _MARGIN + 46
    whole = columns * (width + _TILE_GAP) - _TILE_GAP
    free = next((i for i, tile in enumerate(tiles) if len(tile.pictures) < most), None)
    legend = _legend_items(regions=regions, depth=depth, error_limit=error_limit)
    lines = _flow(legend, whole if free is None else width)
    foot = first + rows * tile_height
    legend_height = len(lines) * _LEGEND_LINE if free is None else 0

    sheet = Image.new("RGB", (whole + 2 * _MARGIN, foot + legend_height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _fit(title, _TITLE_SIZE, whole), _INK, _font(_TITLE_SIZE))
    for index, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        x = _MARGIN + index % columns * (width + _TILE_GAP)
        y = first + index // columns * tile_height
        heading = _fit(tile.heading, _HEADING_SIZE, width)
        draw.text((x, y), heading, _INK, _font(_HEADING_SIZE))
        for number, line in enumerate(text):
            at = (x, y + text_top + number * _LABEL_LINE)
            draw.text(at, line, _MUTED_INK, _font(_TEXT_SIZE))
        at = (x, y + text_top + len(text) * _LABEL_LINE)
        warning = _fit(tile.warning, _TEXT_SIZE, width)
        draw.text(at, warning, _WARNING_INK, _font(_TEXT_SIZE), stroke_width=0.4)
        for number, picture in enumerate(tile.pictures):
            sheet.paste(Image.fromarray(picture), (x, y + top + number * (height + _GAP)))
        caption = _fit(tile.caption, _TEXT_SIZE, width)
        draw.text((x, y + bottom), caption, _INK, _font(_TEXT_SIZE))
        if index == free:
            below = y + top + len(tile.pictures) * (height + _GAP) + 10
            _draw_legend(sheet, (x, below), lines)
    if free is None:
        _draw_legend(sheet, (_MARGIN, foot), lines)
    return sheet


Outlines = Mapping[Region, Sequence[NDArray[np.float64]]]


def region_outlines(region: UInt8[np.ndarray, "h w"], members: Sequence[Region]) -> Outlines:
    """Around what lies in each of some regions: closed polygons (n, 2) of (u, v) in pixels.

    A polygon runs where a Gaussian mean of 1 px finds half of the region, so that slanted edges
    have no stairs and corners are rounded by less than a pixel. A hole has a polygon of its own;
    what is thinner than a pixel or two has none.
    """
    height, width = region.shape
    rim = 3
    v, u = (np.arange(-rim, size + rim) + 0.5 for size in (height, width))
    axes = Figure().subplots()
    found: dict[Region, list[NDArray[np.float64]]] = {}
    for member in members:
        inside = Image.fromarray(np.pad(np.where(region == member, np.uint8(255), 0), rim))
        share = np.asarray(inside.filter(ImageFilter.GaussianBlur(1)), np.float64) / 255
        if share.max() > 0.5:
            (path,) = axes.contour(u, v, share, levels=[0.5]).get_paths()
            found[member] = [np.asarray(polygon) for polygon in path.to_polygons()]
    return found


def draw_outlines(
    panel: UInt8[np.ndarray, "h w 3"], outlines: Outlines, scale: float
) -> UInt8[np.ndarray, "h w 3"]:
    """A panel with outlines of 2 px in the colours of their regions, on a dark rim.

    Args:
        scale: pixels of the panel per pixel of the outlines.
    """
    picture = Image.fromarray(panel)
    draw = ImageDraw.Draw(picture)
    for width, rim in ((6, True), (2, False)):
        for member, polygons in outlines.items():
            for polygon in polygons:
                points = [(float(u), float(v)) for u, v in polygon * scale - 0.5]
                draw.line(points, _INK if rim else REGION_COLOURS[member], width, joint="curve")
    return np.asarray(picture)


def save_png(image: Image.Image | UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Write a PNG file so that ``path`` never holds half of one; parent folders are made."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name beside ``path``, then rename; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def loss_curve(
    history: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    dark: bool = False,
    narrow: bool = False,
) -> bytes:
    """Draw how a run went, as an SVG file; the same arguments give the same bytes.

    The first panel has the training loss (each logged step thin, smoothed thick; logarithmic when
    it spans more than a factor 10), the skipped steps and the learning rate; the second one the
    validation AbsRel of every region, a marker per evaluation. Thin vertical lines mark the
    evaluations in the first panel too.

    Args:
        history: records with ``step``, ``loss`` (None or not finite for a skipped step) and
            ``lr``, sorted by step.
        evaluations: records with ``step`` and ``table`` (region -> metric -> value).
        dark: light ink for a dark page instead of dark ink for a light one.
        narrow: one panel above the other, for a phone.
    """
    theme = _DARK if dark else _LIGHT
    with matplotlib.rc_context(plot_style(dark)):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.05)
        figure = Figure(figsize=(4.1, 6.8) if narrow else (10.2, 3.7), layout=layout)
        training, validation = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        _draw_training(training, history, [int(record["step"]) for record in evaluations], theme)
        _draw_validation(validation, evaluations, theme)
        last = max([1, *(int(record["step"]) for record in (*history, *evaluations))])
        for axes in (training, validation):
            axes.set_xlim(-0.03 * last, 1.03 * last)
            axes.set_xlabel("optimiser step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y")
        return svg(figure)


def plot_style(dark: bool) -> dict[Any, Any]:
    """matplotlib's settings for the plots of a page."""
    theme = _DARK if dark else _LIGHT
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "flatdepth",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme["muted"],
        "grid.color": theme["grid"],
        "grid.linewidth": 0.7,
        "text.color": theme["ink"],
        "axes.titlecolor": theme["ink"],
        "axes.labelcolor": theme["muted"],
        "xtick.color": theme["muted"],
        "ytick.color": theme["muted"],
    }


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file without a time stamp."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class _LegendItem:
    """A swatch ``colours`` (n, 3) uint8, stretched to ``swatch`` pixels, with texts around it."""

    text: str
    colours: NDArray[np.uint8]
    swatch: int = 16
    before: str = ""

    @property
    def lead(self) -> int:
        """The pixels in front of the swatch."""
        return round(_font(_SMALL_SIZE).getlength(self.before)) + (8 if self.before else 0)

    @property
    def width(self) -> int:
        """The pixels from this item to the next."""
        return self.lead + self.swatch + 8 + round(_font(_SMALL_SIZE).getlength(self.text)) + 26


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has no accents and no arrows."""
    return ImageFont.truetype(str(findfont("DejaVu Sans")), size)


def _apply_map(name: str, values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(H, W) values, clipped to 0..1 -> (H, W, 3) uint8."""
    colours = matplotlib.colormaps[name](np.clip(values, 0.0, 1.0), bytes=True)
    return np.ascontiguousarray(colours[..., :3])


def _region_edges(region: NDArray[np.uint8], radius: int) -> NDArray[np.bool_]:
    """(H, W): where a window of ``2 radius + 1`` pixels holds more than one region."""
    picture = Image.fromarray(region)
    lowest = picture.filter(ImageFilter.MinFilter(2 * radius + 1))
    highest = picture.filter(ImageFilter.MaxFilter(2 * radius + 1))
    return np.asarray(lowest) != np.asarray(highest)


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Break ``text`` into lines of at most ``width`` pixels, at spaces and slashes if possible."""
    font = _font(size)
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in re.findall(r"[^\s/_]*[\s/_]|[^\s/_]+", paragraph):
            if line and font.getlength((line + word).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += word
            while len(line) > 1 and font.getlength(line.rstrip()) > width:
                shorter = range(len(line) - 1, 1, -1)
                fitting = next((n for n in shorter if font.getlength(line[:n]) <= width), 1)
                lines.append(line[:fitting])
                line = line[fitting:]
        lines.append(line.rstrip())
    return lines


def _fit(text: str, size: int, width: int) -> str:
    """One line of at most ``width`` pixels; what is cut off becomes an ellipsis."""
    font = _font(size)
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def metres(depth_m: float) -> str:
    return f"{depth_m:.2f} m" if depth_m < 1 else f"{depth_m:.1f} m"


def _draw_depth_bar(
    sheet: Image.Image, corner: tuple[int, int], height: int, limits_m: tuple[float, float]
) -> None:
    """A vertical bar, near at the top, labelled at its ends and its middle."""
    low, high = limits_m
    inverse = np.linspace(1 / low, 1 / high, height, dtype=np.float64)[:, None]
    ramp = colour_depth((1 / inverse).astype(np.float32), low_m=low, high_m=high)
    sheet.paste(Image.fromarray(ramp).resize((12, height)), corner)
    draw = ImageDraw.Draw(sheet)
    x, y = corner[0] + 17, corner[1]
    for depth, at, anchor in (
        (low, y, "la"),
        (2 / (1 / low + 1 / high), y + height // 2, "lm"),
        (high, y + height, "ld"),
    ):
        draw.text((x, at), metres(depth), _MUTED_INK, _font(12), anchor=anchor)


def _legend_items(
    *, regions: bool, depth: tuple[str, str] | None, error_limit: float | None
) -> list[_LegendItem]:
    items = []
    if regions:
        for region, colour in REGION_COLOURS.items():
            items.append(_LegendItem(region.name.lower(), np.array([colour], np.uint8)))
    if depth:
        near, far = depth
        ramp = _apply_map(_DEPTH_MAP, np.linspace(1, 0, 90)[None])[0]
        items.append(_LegendItem(far, ramp, 90, near))
        items.append(_LegendItem("sky", np.array([SKY_COLOUR], np.uint8)))
    if error_limit is not None:
        ramp = _apply_map(_ERROR_MAP, np.linspace(0, 1, 90)[None])[0]
        items.append(_LegendItem(f"{error_limit:.0%} or more", ramp, 90, "relative error: 0"))
    if depth or error_limit is not None:
        items.append(_LegendItem("unknown", np.array([UNKNOWN_COLOUR], np.uint8)))
    return items


def _flow(items: Sequence[_LegendItem], width: int) -> list[list[_LegendItem]]:
    """Fill lines of ``width`` pixels with as many items as fit, at least one each."""
    lines: list[list[_LegendItem]] = []
    used = width
    for item in items:
        if not lines or used + item.width > width:
            lines.append([])
            used = 0
        lines[-1].append(item)
        used += item.width
    return lines


def _draw_legend(
    sheet: Image.Image, corner: tuple[int, int], lines: Sequence[Sequence[_LegendItem]]
) -> None:
    for line, items in enumerate(lines):
        x = corner[0]
        for item in items:
            _draw_legend_item(sheet, (x, corner[1] + line * _LEGEND_LINE), item)
            x += item.width


def _draw_legend_item(sheet: Image.Image, corner: tuple[int, int], item: _LegendItem) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    draw.text((x, y + 8), item.before, _MUTED_INK, _font(_SMALL_SIZE), anchor="lm")
    sheet.paste(Image.fromarray(item.colours[None]).resize((item.swatch, 16)), (x + item.lead, y))
    at = (x + item.lead + item.swatch + 8, y + 8)
    draw.text(at, item.text, _MUTED_INK, _font(_SMALL_SIZE), anchor="lm")


def _draw_training(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    evaluated: Sequence[int],
    theme: Mapping[str, str],
) -> None:
    steps = np.array([record["step"] for record in history], np.float64)
    losses = np.array([_number(record["loss"]) for record in history], np.float64)
    fine = np.isfinite(losses)
    kept = _extremes(losses[fine])
    for step in evaluated:
        axes.axvline(step, color=theme["grid"], linewidth=0.9, zorder=0)
    axes.plot(steps[fine][kept], losses[fine][kept], color=theme["loss"], linewidth=0.6, alpha=0.45)
    smooth = _smooth(losses[fine])[kept]
    axes.plot(steps[fine][kept], smooth, color=theme["loss"], linewidth=1.9, label="loss, smoothed")
    if not fine.all():
        axes.plot(
            steps[~fine],
            np.full(int((~fine).sum()), 0.02),
            "x",
            color=_hex(FLAT_COLOUR),
            markersize=5,
            transform=axes.get_xaxis_transform(),
            label="skipped step",
        )
    if fine.any() and 0 < 10 * losses[fine].min() < losses[fine].max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title="Training", ylabel="loss")

    rates = np.array([_number(record["lr"]) for record in history], np.float64)
    rate_axes = axes.twinx()
    rate_axes.spines.right.set_visible(True)
    rate_axes.plot(steps, rates, color=theme["muted"], linewidth=1.1, linestyle=(0, (4, 2)))
    axes.plot([], [], color=theme["muted"], linewidth=1.1, linestyle=(0, (4, 2)), label="lr, right")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_locator(MaxNLocator(4))
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend_below(axes)


def _draw_validation(
    axes: Axes, evaluations: Sequence[Mapping[str, Any]], theme: Mapping[str, str]
) -> None:
    steps = np.array([record["step"] for record in evaluations], np.float64)
    for region, (colour, line, width) in _REGION_LINES.items():
        values = np.array(
            [_number(record["table"].get(region, {}).get("abs_rel")) for record in evaluations]
        )
        if np.isfinite(values).any():
            ink = _hex(colour) if colour else theme["ink" if region == "clean" else "muted"]
            axes.plot(
                steps,
                values,
                line,
                color=ink,
                linewidth=width,
                marker="o",
                markersize=2.5 + width,
                label=region,
            )
    axes.set(title="Validation", ylabel="AbsRel")
    axes.set_ylim(bottom=0)
    _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    """A frameless legend under the panel, where no curve can run into it."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=4,
            frameon=False,
            fontsize=8.5,
            handlelength=1.8,
            columnspacing=1.4,
        )


def _hex(colour: RGB) -> str:
    return "#" + bytes(colour).hex()


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential mean over about a fortieth of the values, corrected for its start from zero."""
    decay = 1 - 1 / max(3.0, values.size / 40)
    smooth = np.empty_like(values)
    total = weight = 0.0
    for index, value in enumerate(values):
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth[index] = total / weight
    return smooth


def _extremes(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which values to draw so that the file stays small and every peak stays visible.

    The lowest and the highest of each of ``_MOST_BLOCKS`` blocks, in order.
    """
    if values.size <= 2 * _MOST_BLOCKS:
        return np.arange(values.size)
    blocks = np.array_split(np.arange(values.size), _MOST_BLOCKS)
    chosen = [block[pick(values[block])] for block in blocks for pick in (np.argmin, np.argmax)]
    return np.unique([*chosen, values.size - 1])
