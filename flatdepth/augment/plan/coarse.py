"""A coarse look at a frame: what the planner works on.

One point per cell of a grid over the view, so that a plan costs a few milliseconds in a loader
thread whatever the image size.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from flatdepth.geometry import Rectangle, View, edge_lines, pixel_rays
from flatdepth.types import Frame

GRID_CELLS = 44
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinView:
    """A coarse grid over a view of a frame: N = rows x columns cells in row order.

    Each cell is represented by the source pixel at its centre, and by that pixel's own ray, so
    that a plane's points lie on the plane to the last digit. Where depth is sparse (a lidar's: less
    than 70 % of the cells that hold a known pixel have one at their centre), the known pixel
    nearest to its centre represents a cell instead.

    Attributes:
        frame, view: what is looked at.
        K_px: (3, 3) intrinsics of the view.
        columns: cells per row.
        u, v: (N,) view coordinates of the representing pixels.
        rays: (N, 3) their rays.
        inverse_depth: (N,) 1/z in 1/m there; 0 for sky, NaN unknown. Where all of nine pixels
            around are known it is their median, which on a plane is the centre's value and halves
            a depth camera's noise.
        nearest: (N,) largest 1/z of all source pixels of the cell, 0 if none is known.
        expected: (N,) share of the cells at the same elevation that the sensor would know if there
            was something within its reach; 1 where depth is dense.
        gap_px: (width, height) between the known pixels of a surface in view pixels; 0 where depth
            is dense.
        colour: (N, 3) sRGB 0..1.
    """

    frame: Frame
    view: View
    K_px: Float64[np.ndarray, "3 3"]
    columns: int
    u: Float64[np.ndarray, " n"]
    v: Float64[np.ndarray, " n"]
    rays: Float64[np.ndarray, "n 3"]
    inverse_depth: Float64[np.ndarray, " n"]
    nearest: Float64[np.ndarray, " n"]
    expected: Float64[np.ndarray, " n"]
    gap_px: tuple[float, float]
    colour: Float64[np.ndarray, "n 3"]

    @property
    def is_sparse(self) -> bool:
        return self.gap_px[1] > 0

    @property
    def height(self) -> int:
        return self.view.height

    @property
    def width(self) -> int:
        return self.view.width

    @property
    def rows(self) -> int:
        return len(self.u) // self.columns

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell in view pixels."""
        return self.width / self.columns, self.height / self.rows

    def covered(
        self, corners: Float64[np.ndarray, "4 2"], reach_cells: float = 0.5
    ) -> Bool[np.ndarray, " n"]:
        """The cells that a convex quad reaches: centres inside it or within a share of the
        cell's diagonal."""
        points = np.stack([self.u, self.v, np.ones_like(self.u)])
        distance = (edge_lines(corners) @ points).min(axis=0)
        return distance > -reach_cells * float(np.hypot(*self.cell))

    def pixels_inside(
        self, corners: Float64[np.ndarray, "4 2"]
    ) -> tuple[Float64[np.ndarray, "p 3"], Float64[np.ndarray, " p"]]:
        """Rays and 1/z of all source pixels of known depth inside a convex quad of the view."""
        view = self.view
        u, v = view.source_pixels(*corners.T)
        left, right = np.clip((u.min(), u.max() + 1), 0, view.crop_width + view.left).astype(int)
        top, bottom = np.clip((v.min(), v.max() + 1), 0, view.crop_height + view.top).astype(int)
        left, top = max(left, view.left), max(top, view.top)
        row, column = np.nonzero(np.isfinite(self.frame.depth_m[top:bottom, left:right]))
        u, v, rays, inverse = look_up(self.frame, view, self.K_px, row + top, column + left)
        inside = (edge_lines(corners) @ np.stack([u, v, np.ones_like(u)])).min(axis=0) > 0
        return rays[inside], inverse[inside]

    def on_rectangle(
        self, rectangle: Rectangle
    ) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Where the cells look at a rectangle's plane: a / half width, b / half height and 1/z.

        The first two are infinite where the plane is behind the camera.
        """
        points = np.stack([self.u, self.v, np.ones_like(self.u)])
        a, b, inverse = rectangle.pixel_matrix(self.K_px) @ points
        seen = inverse > 0
        scale = np.where(seen, 2 / np.where(seen, inverse, 1.0), np.inf)
        with np.errstate(invalid="ignore"):
            return (
                np.nan_to_num(a * scale / rectangle.width, nan=np.inf),
                np.nan_to_num(b * scale / rectangle.height, nan=np.inf),
                inverse,
            )


def thin_view(frame: Frame, view: View) -> ThinView:
    """Sample a frame's depth and colour on the coarse grid of a view."""
    cell = max(view.width, view.height) / GRID_CELLS
    columns, rows = max(8, round(view.width / cell)), max(8, round(view.height / cell))
    v, u = np.meshgrid(
        (np.arange(rows) + 0.5) * (view.height / rows),
        (np.arange(columns) + 0.5) * (view.width / columns),
        indexing="ij",
    )
    row, column = source_pixels(frame, view, u.ravel(), v.ravel())
    crop = frame.depth_m[
        view.top : view.top + view.crop_height, view.left : view.left + view.crop_width
    ]
    known = np.isfinite(crop)
    row_starts = (np.arange(rows) * view.crop_height) // rows
    column_starts = (np.arange(columns) * view.crop_width) // columns
    nearest_m = np.minimum.reduceat(
        np.minimum.reduceat(np.where(known, crop, np.float32(np.inf)), row_starts, axis=0),
        column_starts,
        axis=1,
    ).astype(np.float64)
    if view.flip:
        nearest_m = nearest_m[:, ::-1]
    nearest = (1.0 / nearest_m).ravel()
    at_centre = np.isfinite(frame.depth_m[row, column])
    is_sparse = np.count_nonzero(at_centre) < 0.7 * np.count_nonzero(nearest)
    gap_px = (0.0, 0.0)
    if is_sparse:
        _take_known(known, view, rows, columns, row, column)
        gap_px = (
            _gap(known.T, row_starts) * view.width / view.crop_width,
            _gap(known, column_starts) * view.height / view.crop_height,
        )
    K_px = view.intrinsics(frame.K_px)
    u_px, v_px, rays, centre = look_up(frame, view, K_px, row, column)
    inverse = centre if is_sparse else _median_of_nine(frame, row, column, centre)
    return ThinView(
        frame=frame,
        view=view,
        K_px=K_px,
        columns=columns,
        u=u_px,
        v=v_px,
        rays=rays,
        inverse_depth=inverse,
        nearest=nearest,
        expected=_expected(rays, inverse, rows) if is_sparse else np.ones_like(nearest),
        gap_px=gap_px,
        colour=frame.image[row, column].astype(np.float64) / 255,
    )


def _take_known(
    known: Bool[np.ndarray, "h w"],
    view: View,
    rows: int,
    columns: int,
    row: Int64[np.ndarray, " n"],
    column: Int64[np.ndarray, " n"],
) -> None:
    """Put each cell's known pixel nearest to its centre in place of the one at its centre."""
    at_row, at_column = np.nonzero(known)
    down = (at_row + 0.5) * (rows / view.crop_height)
    right = (at_column + 0.5) * (columns / view.crop_width)
    right = columns - right if view.flip else right
    cell = down.astype(np.int64) * columns + right.astype(np.int64)
    distance = (down % 1 - 0.5) ** 2 + (right % 1 - 0.5) ** 2
    best = np.full(rows * columns, np.iinfo(np.int64).max)
    np.minimum.at(best, cell, ((distance * 2**20).astype(np.int64) << 32) + np.arange(len(cell)))
    found = np.unique(cell)
    pixel = best[found] & (2**32 - 1)
    row[found], column[found] = view.top + at_row[pixel], view.left + at_column[pixel]


def _gap(known: Bool[np.ndarray, "h w"], starts: Int64[np.ndarray, " k"]) -> float:
    """Rows from one known pixel down to the next in a cell's width, 90th percentile."""
    column, row = np.nonzero(np.logical_or.reduceat(known, starts, axis=1).T)
    steps = np.diff(row)[np.diff(column) == 0]
    return float(np.percentile(steps, 90)) if len(steps) else 1.0


def _expected(
    rays: Float64[np.ndarray, "n 3"], inverse: Float64[np.ndarray, " n"], rows: int
) -> Float64[np.ndarray, " n"]:
    """``ThinView.expected``, by elevation above the camera's horizon, as a lidar's rings are.

    Much of a band may be sky, so any band in which a quarter as much is known as in the best one
    counts as seen like that one.
    """
    elevation = np.arctan2(-rays[:, 1], np.hypot(rays[:, 0], 1.0))
    edges = np.linspace(elevation.min(), elevation.max(), rows + 1)[1:-1]
    band = np.searchsorted(edges, elevation)
    share = np.bincount(band, np.isfinite(inverse), rows) / np.maximum(np.bincount(band), 1)
    return np.where(share >= 0.25 * share.max(), share.max(), 0.0)[band]


def _median_of_nine(
    frame: Frame,
    row: Int64[np.ndarray, " n"],
    column: Int64[np.ndarray, " n"],
    centre: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, " n"]:
    """Median 1/z of the pixels two apart around others, their own where one is unknown."""
    height, width = frame.depth_m.shape
    rows = np.clip(row[:, None] + np.repeat([-2, 0, 2], 3), 0, height - 1)
    columns = np.clip(column[:, None] + np.tile([-2, 0, 2], 3), 0, width - 1)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / frame.depth_m[rows, columns].astype(np.float64)
    whole = np.isfinite(inverse).all(axis=1)
    whole &= (row >= 2) & (row < height - 2) & (column >= 2) & (column < width - 2)
    return np.where(whole, np.median(inverse, axis=1), centre)


def source_pixels(
    frame: Frame, view: View, u: Float64[np.ndarray, " n"], v: Float64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Row and column of the source pixels that view coordinates fall on."""
    source_u, source_v = view.source_pixels(u, v)
    height, width = frame.depth_m.shape
    row = np.clip(np.floor(source_v), 0, height - 1).astype(np.int64)
    return row, np.clip(np.floor(source_u), 0, width - 1).astype(np.int64)


def look_up(
    frame: Frame,
    view: View,
    K_px: Float64[np.ndarray, "3 3"],
    row: Int64[np.ndarray, " n"],
    column: Int64[np.ndarray, " n"],
) -> tuple[
    Float64[np.ndarray, " n"],
    Float64[np.ndarray, " n"],
    Float64[np.ndarray, "n 3"],
    Float64[np.ndarray, " n"],
]:
    """View coordinates, rays and 1/z of source pixels, exactly at their centres."""
    u, v = view.view_pixels(column + 0.5, row + 0.5)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / frame.depth_m[row, column].astype(np.float64)
    return u, v, pixel_rays(K_px, u, v), inverse
