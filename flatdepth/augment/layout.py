"""Where a paste goes and on which plane: small float64 work per sample, on the CPU.

The planner looks at a thinned view of the depth (one point per cell of a coarse grid), so a plan
costs a few milliseconds in a loader thread and travels with the batch; the pixels are made on the
device by ``composite``. A plan is a function of (seed, epoch, sample) and the configuration alone.

Hung: planes are found in inverse depth by locally seeded RANSAC, a rectangle is laid out in metres
on a wall-like one, and the place is accepted if the grid says that the wall is really there.
Standing: a board of random tilt, brought forward until it is nearer than everything it covers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import (
    Rectangle,
    View,
    edge_lines,
    fit_plane_trimmed,
    fit_planes_robust,
    pixel_rays,
    project,
    quad_area,
)
from flatdepth.types import Frame, Region

GRID_CELLS = 44
HYPOTHESES = 48
MAX_WALL_SLOPE = 0.57
UP = np.array([0.0, -1.0, 0.0])
MIP_LEVELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinView:
    """A coarse grid over a view of a frame: N = rows x columns cells in row order.

    Each cell is represented by the source pixel at its centre, and by that pixel's own ray, so
    that a plane's points lie on the plane to the last digit.

    Attributes:
        frame, view: what is looked at.
        K_px: (3, 3) intrinsics of the view.
        columns: cells per row.
        u, v: (N,) view coordinates of the representing pixels.
        rays: (N, 3) their rays.
        inverse_depth: (N,) 1/z in 1/m there; 0 for sky, NaN unknown.
        nearest: (N,) largest 1/z of all source pixels of the cell, 0 if none is known.
        luminance: (N,) sRGB luma 0..1.
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
    luminance: Float64[np.ndarray, " n"]

    @property
    def height(self) -> int:
        return self.view.height

    @property
    def width(self) -> int:
        return self.view.width

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell in view pixels."""
        return self.width / self.columns, self.height / (len(self.u) // self.columns)


def thin_view(frame: Frame, view: View) -> ThinView:
    """Sample a frame's depth and luminance on the coarse grid of a view."""
    cell = max(view.width, view.height) / GRID_CELLS
    columns, rows = max(8, round(view.width / cell)), max(8, round(view.height / cell))
    v, u = np.meshgrid(
        (np.arange(rows) + 0.5) * (view.height / rows),
        (np.arange(columns) + 0.5) * (view.width / columns),
        indexing="ij",
    )
    row, column = _source_pixels(frame, view, u.ravel(), v.ravel())
    K_px = view.intrinsics(frame.K_px)
    u_px, v_px, rays, inverse = _look_up(frame, view, K_px, row, column)
    crop = frame.depth_m[
        view.top : view.top + view.crop_height, view.left : view.left + view.crop_width
    ]
    known = np.where(np.isfinite(crop), crop, np.float32(np.inf))
    row_starts = (np.arange(rows) * view.crop_height) // rows
    column_starts = (np.arange(columns) * view.crop_width) // columns
    nearest_m = np.minimum.reduceat(
        np.minimum.reduceat(known, row_starts, axis=0), column_starts, axis=1
    ).astype(np.float64)
    if view.flip:
        nearest_m = nearest_m[:, ::-1]
    colour = frame.image[row, column].astype(np.float64) / 255
    return ThinView(
        frame=frame,
        view=view,
        K_px=K_px,
        columns=columns,
        u=u_px,
        v=v_px,
        rays=rays,
        inverse_depth=inverse,
        nearest=(1.0 / nearest_m).ravel(),
        luminance=colour @ [0.299, 0.587, 0.114],
    )


def _source_pixels(
    frame: Frame, view: View, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the source pixels that view coordinates fall on."""
    source_u, source_v = view.source_pixels(u, v)
    height, width = frame.depth_m.shape
    row = np.clip(np.floor(source_v), 0, height - 1).astype(np.int64)
    return row, np.clip(np.floor(source_u), 0, width - 1).astype(np.int64)


def _look_up(
    frame: Frame, view: View, K_px: np.ndarray, row: np.ndarray, column: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """View coordinates, rays and 1/z of source pixels, exactly at their centres."""
    u, v = view.view_pixels(column + 0.5, row + 0.5)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / frame.depth_m[row, column].astype(np.float64)
    return u, v, pixel_rays(K_px, u, v), inverse


@dataclass(frozen=True, slots=True, kw_only=True)
class Paste:
    """One planned paste.

    Attributes:
        kind: ``Region.MIRROR`` or ``Region.ART``.
        hung: on a surface of the scene (else standing in front of it).
        front: background nearer than ``front`` times the surface's depth stays in front; 0 lets
            nothing through.
        rectangle: the whole paste with its frame, in camera coordinates.
        content: the part of it inside the frame; the same rectangle if there is no frame.
        portion: (left, top, right, bottom) of the content in its source, as shares of the source's
            size; left > right mirrors it.
        level: mip level (0 full size, each next one half) at which the content is sampled.
        gain: factor on the content's and the frame's colour, matching the light on the wall.
        tint: (3,) factor on the content's colour channels.
        frame_colour: (3,) sRGB 0..1.
        picture: which picture of the art collection, -1 for a mirror.
    """

    kind: Region
    hung: bool
    front: float
    rectangle: Rectangle
    content: Rectangle
    portion: tuple[float, float, float, float]
    level: int
    gain: float
    tint: tuple[float, float, float]
    frame_colour: tuple[float, float, float]
    picture: int


def plan_pastes(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    *,
    picture_aspects: Float64[np.ndarray, " pictures"],
    depth_range_m: tuple[float, float],
) -> tuple[Paste, ...]:
    """Plan the pastes of one image, from back to front.

    Args:
        thin: the view to paste into.
        draws: random numbers of this (seed, epoch, sample).
        picture_aspects: width / height of every picture of the art collection; may be empty.
        depth_range_m: (near, far) that truth must lie in.

    Returns:
        Between none and ``config.max_pastes`` pastes. They do not overlap when hung.
    """
    if draws.uniform("pasted") >= config.share:
        return ()
    count = 1 + draws.integer("pastes", config.max_pastes)
    kinds = {"mirror": config.mirror}
    if len(picture_aspects):
        kinds["art"] = config.art
    if sum(kinds.values()) <= 0:
        return ()
    taken = np.zeros(len(thin.u), dtype=bool)
    nearest = thin.nearest.copy()
    hung: list[Paste] = []
    standing: list[Paste] = []
    for number in range(count):
        own = draws.child(number)
        kind = own.choice("kind", kinds)
        picture = own.integer("picture", len(picture_aspects)) if kind == "art" else -1
        aspect = own.log_uniform("aspect", 0.5, 1.6)
        if kind == "art":
            aspect = float(picture_aspects[picture])
        style = _Style.draw(own, config, aspect)
        place = None
        if own.uniform("layout") < config.hung:
            place = _hang(thin, own, config, style, taken, depth_range_m)
        is_hung = place is not None
        if place is None:
            place = _stand(thin, own, config, style, nearest, depth_range_m)
        if place is None:
            continue
        region = Region.ART if kind == "art" else Region.MIRROR
        paste = _finish(thin, own, config, style, place, region, is_hung, picture)
        (hung if is_hung else standing).append(paste)
        covered = _covered(thin, project(thin.K_px, paste.rectangle.corners()))
        taken |= covered
        surface = paste.rectangle.plane @ thin.rays.T
        nearest = np.where(covered, np.maximum(nearest, surface), nearest)
    return (*hung, *standing)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """Shape of one paste: aspect (width / height) with its frame; widths for a height of 1."""

    aspect: float
    frame: float
    area: float

    @classmethod
    def draw(cls, draws: Draws, config: PasteConfig, content_aspect: float) -> "_Style":
        frame = 0.0
        if draws.uniform("framed") < config.framed:
            frame = draws.uniform("frame width", *config.frame_width) * min(content_aspect, 1.0)
        height = 1 + 2 * frame
        return cls(
            aspect=(content_aspect + 2 * frame) / height,
            frame=frame / height,
            area=draws.log_uniform("area", *config.area),
        )


def _hang(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    style: _Style,
    taken: Bool[np.ndarray, " n"],
    depth_range_m: tuple[float, float],
) -> Rectangle | None:
    """A rectangle on a wall of the scene, or None if no place is good enough."""
    known = np.isfinite(thin.inverse_depth) & (thin.inverse_depth > 0)
    seeds = _local_triples(thin, draws, known)
    if len(seeds) == 0:
        return None
    rays, inverse = thin.rays[known], thin.inverse_depth[known]
    planes, inliers = fit_planes_robust(
        rays,
        inverse,
        thin.rays[seeds],
        thin.inverse_depth[seeds],
        tolerance=config.plane_tolerance,
        noise=config.depth_noise,
    )
    norms = np.linalg.norm(planes, axis=1)
    wall = (norms > 0) & (np.abs(planes[:, 1]) <= MAX_WALL_SLOPE * norms)
    wall &= inliers.sum(axis=1) >= 12
    roll = np.deg2rad(2.0) * (2 * draws.uniform("roll") - 1)
    thickness = draws.uniform("thickness", *config.thickness_m)
    target_px2 = style.area * thin.height * thin.width
    smallest_px2 = config.area[0] * thin.height * thin.width
    for number in np.flatnonzero(wall):
        m = planes[number]
        centre_ray = thin.rays[seeds[number, 0]]
        if m @ centre_ray <= 0:
            continue
        for shrink in (1.0, 0.6, 0.36, 0.2):
            area = target_px2 * shrink
            if area < smallest_px2:
                break
            rectangle = _on_plane(m, centre_ray, roll, style.aspect, area, thin)
            if rectangle is None:
                continue
            if not _is_good_place(thin, rectangle, config, taken):
                continue
            refined = _refined_plane(thin, rectangle, config)
            offset = thickness * np.linalg.norm(refined)
            lifted = refined / (1 - offset) if offset < 0.2 else refined
            rectangle = _on_plane(lifted, centre_ray, roll, style.aspect, area, thin)
            if rectangle is not None and _in_range(rectangle, depth_range_m):
                return rectangle
    return None


def _local_triples(
    thin: ThinView, draws: Draws, known: Bool[np.ndarray, " n"]
) -> Int64[np.ndarray, "k 3"]:
    """Indices of three known points in a neighbourhood, first the place to hang something at."""
    rows = len(thin.u) // thin.columns
    reach = np.array([rows, thin.columns]) / 6
    row = (draws.uniforms("seed row", HYPOTHESES) * rows).astype(np.int64)
    column = (draws.uniforms("seed column", HYPOTHESES) * thin.columns).astype(np.int64)
    angle = 2 * np.pi * draws.uniforms("seed angle", HYPOTHESES)
    corners = []
    for turn in (0.0, 2 * np.pi / 3, 4 * np.pi / 3):
        corner_row = np.clip(np.round(row + reach[0] * np.sin(angle + turn)), 0, rows - 1)
        corner_column = np.clip(
            np.round(column + reach[1] * np.cos(angle + turn)), 0, thin.columns - 1
        )
        corners.append((corner_row * thin.columns + corner_column).astype(np.int64))
    centre = row * thin.columns + column
    triples = np.stack([centre, corners[0], corners[1]], axis=1)
    triples = triples[known[triples].all(axis=1)]
    return triples[(triples[:, 1] != triples[:, 2]) & (triples[:, 0] != triples[:, 1])]


def _on_plane(
    m: np.ndarray,
    centre_ray: np.ndarray,
    roll: float,
    aspect: float,
    area_px2: float,
    thin: ThinView,
) -> Rectangle | None:
    """The upright rectangle of about the given projected area on plane m around a ray."""
    normal = m / np.linalg.norm(m)
    up = UP - (UP @ normal) * normal
    if np.linalg.norm(up) < 0.1:
        return None
    up /= np.linalg.norm(up)
    right = np.cross(normal, up)
    right, up = (
        np.cos(roll) * right + np.sin(roll) * up,
        np.cos(roll) * up - np.sin(roll) * right,
    )
    centre = centre_ray / (m @ centre_ray)
    height = 0.05 * centre[2]
    for _ in range(3):
        rectangle = Rectangle(
            centre=centre, right=right, up=up, width=height * aspect, height=height
        )
        corners = rectangle.corners()
        if corners[:, 2].min() < 0.25 * centre[2]:
            return None
        height *= np.sqrt(area_px2 / max(quad_area(project(thin.K_px, corners)), 1e-9))
    rectangle = Rectangle(centre=centre, right=right, up=up, width=height * aspect, height=height)
    return rectangle if rectangle.corners()[:, 2].min() >= 0.25 * centre[2] else None


def _is_good_place(
    thin: ThinView, rectangle: Rectangle, config: PasteConfig, taken: Bool[np.ndarray, " n"]
) -> bool:
    """Whether a rectangle can hang there, as far as the grid can tell.

    Good: mostly in the image, nothing hung there yet, at least 40 % of its depth known; of the
    known points at least 75 % on the plane, at most 20 % in front of it and 8 % behind it; some of
    the wall in each quarter.
    """
    place = rectangle.pixel_matrix(thin.K_px) @ np.stack([thin.u, thin.v, np.ones_like(thin.u)])
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = place[:2] / place[2]
    inside = (place[2] > 0) & (np.abs(a) < rectangle.width / 2) & (np.abs(b) < rectangle.height / 2)
    cells = int(inside.sum())
    cell_px2 = thin.cell[0] * thin.cell[1]
    projected = quad_area(project(thin.K_px, rectangle.corners())) / cell_px2
    if cells < 6 or cells < 0.8 * projected or (inside & taken).any():
        return False
    surface = place[2][inside]
    deviation = thin.inverse_depth[inside] - surface
    slack = config.plane_tolerance * surface + config.depth_noise
    known = np.isfinite(deviation)
    on_plane = known & (np.abs(deviation) <= slack)
    in_front = (deviation > slack).sum()
    behind = (deviation < -slack).sum()
    quarter = 2 * (a[inside] > 0) + (b[inside] > 0)
    return bool(
        known.sum() >= 0.4 * cells
        and on_plane.sum() >= 0.75 * known.sum()
        and in_front <= 0.2 * known.sum()
        and behind <= 0.08 * known.sum()
        and len(np.unique(quarter[on_plane])) == 4
    )


def _refined_plane(thin: ThinView, rectangle: Rectangle, config: PasteConfig) -> np.ndarray:
    """The wall's plane from up to 1024 source pixels under the rectangle and a little around it."""
    side = np.linspace(-0.6, 0.6, 32)
    a, b = (x.ravel() for x in np.meshgrid(side * rectangle.width, side * rectangle.height))
    points = rectangle.centre + a[:, None] * rectangle.right + b[:, None] * rectangle.up
    points = points[points[:, 2] > 0]
    u, v = project(thin.K_px, points).T
    inside = (u >= 0) & (u < thin.width) & (v >= 0) & (v < thin.height)
    row, column = _source_pixels(thin.frame, thin.view, u[inside], v[inside])
    _, _, rays, inverse = _look_up(thin.frame, thin.view, thin.K_px, row, column)
    surface = rays @ rectangle.plane
    slack = config.plane_tolerance * surface + config.depth_noise
    on_plane = np.abs(inverse - surface) <= slack
    return fit_plane_trimmed(rays[on_plane], inverse[on_plane])


def _stand(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    style: _Style,
    nearest: Float64[np.ndarray, " n"],
    depth_range_m: tuple[float, float],
) -> Rectangle | None:
    """A board of random tilt in front of everything it covers, or None after eight attempts."""
    for attempt in range(8):
        own = draws.child(attempt)
        u = own.uniform("standing u", 0.15, 0.85) * thin.width
        v = own.uniform("standing v", 0.15, 0.85) * thin.height
        ray = pixel_rays(thin.K_px, np.array([u]), np.array([v]))[0]
        tilt = np.deg2rad(own.uniform("tilt", 0.0, config.max_tilt_deg))
        axis = np.deg2rad(own.uniform("tilt axis", -25.0, 25.0))
        side = 1 if own.uniform("tilt side") < 0.5 else -1
        m = _tilted(ray, side * tilt, axis)
        roll = np.deg2rad(own.uniform("standing roll", -8.0, 8.0))
        area = style.area * thin.height * thin.width
        rectangle = _on_plane(m, ray, roll, style.aspect, area, thin)
        if rectangle is None:
            continue
        corners = project(thin.K_px, rectangle.corners())
        covered = _covered(thin, corners)
        if covered.sum() * thin.cell[0] * thin.cell[1] < 0.8 * quad_area(corners):
            continue
        slope = np.abs(rectangle.plane @ np.linalg.inv(thin.K_px))
        margin = 0.5 * (slope[0] * thin.cell[0] + slope[1] * thin.cell[1])
        surface = np.maximum(rectangle.plane @ thin.rays[covered].T - margin, 1e-6)
        forward = own.uniform("clearance", 1.02, 1.3)
        scale = forward * float((nearest[covered] / surface).max())
        if scale <= 0:
            scale = rectangle.centre[2] / own.log_uniform("distance", 0.8, 4.0)
        board = Rectangle(
            centre=rectangle.centre / scale,
            right=rectangle.right,
            up=rectangle.up,
            width=rectangle.width / scale,
            height=rectangle.height / scale,
        )
        if _in_range(board, depth_range_m):
            return board
    return None


def _tilted(ray: np.ndarray, tilt: float, axis: float) -> np.ndarray:
    """Plane at distance 1 m along a ray, turned by ``tilt`` about an axis ``axis`` from upright."""
    direction = ray / np.linalg.norm(ray)
    sideways = np.cross(UP, direction)
    sideways /= np.linalg.norm(sideways)
    upright = np.cross(direction, sideways)
    about = np.cos(axis) * upright + np.sin(axis) * sideways
    return np.cos(tilt) * direction + np.sin(tilt) * np.cross(about, direction)


def _in_range(rectangle: Rectangle, depth_range_m: tuple[float, float]) -> bool:
    z = rectangle.corners()[:, 2]
    return bool(z.min() >= depth_range_m[0] and z.max() <= depth_range_m[1])


def _covered(
    thin: ThinView, corners: Float64[np.ndarray, "4 2"], reach_cells: float = 0.5
) -> Bool[np.ndarray, " n"]:
    """The cells that a projected quad reaches: centres inside it or within a share of the
    cell's diagonal."""
    points = np.stack([thin.u, thin.v, np.ones_like(thin.u)])
    distance = (edge_lines(corners) @ points).min(axis=0)
    return distance > -reach_cells * float(np.hypot(*thin.cell))


def _finish(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    style: _Style,
    rectangle: Rectangle,
    kind: Region,
    hung: bool,
    picture: int,
) -> Paste:
    frame = style.frame * rectangle.height
    content = Rectangle(
        centre=rectangle.centre,
        right=rectangle.right,
        up=rectangle.up,
        width=rectangle.width - 2 * frame,
        height=rectangle.height - 2 * frame,
    )
    outer_corners = project(thin.K_px, rectangle.corners())
    inner_corners = project(thin.K_px, content.corners())
    if kind is Region.MIRROR:
        on_left = float(outer_corners[:, 0].mean()) < thin.width / 2
        portion = _mirror_portion(thin, draws, config, content.width / content.height, on_left)
        tint = tuple(0.88 + 0.1 * draws.uniforms("tint", 3))
        gain = 1.0
    else:
        portion = (0.0, 0.0, 1.0, 1.0)
        tint = (1.0, 1.0, 1.0)
        wall = _covered(thin, outer_corners, reach_cells=1.5)
        luminance = float(thin.luminance[wall].mean()) if wall.any() else 0.5
        gain = float(np.clip(0.4 + 0.9 * luminance, 0.4, 1.1) * draws.uniform("gain", 0.9, 1.1))
    noise = config.depth_noise * rectangle.centre[2]
    source_px2 = abs(portion[2] - portion[0]) * abs(portion[3] - portion[1])
    reduction = np.sqrt(source_px2 * thin.height * thin.width / quad_area(inner_corners))
    level = int(np.clip(np.round(np.log2(reduction)), 0, MIP_LEVELS - 1))
    return Paste(
        kind=kind,
        hung=hung,
        front=1 / (1 + config.plane_tolerance + noise) if hung else 0.0,
        rectangle=rectangle,
        content=content,
        portion=portion,
        level=level,
        gain=gain,
        tint=tint,
        frame_colour=_frame_colour(draws),
        picture=picture,
    )


def _mirror_portion(
    thin: ThinView, draws: Draws, config: PasteConfig, aspect: float, on_left: bool
) -> tuple[float, float, float, float]:
    """A portion of the half of the image where the mirror is not, flipped left to right."""
    half_width, height = 0.5 * thin.width, float(thin.height)
    side = draws.uniform("portion", *config.mirror_portion)
    portion_height = side * min(height, half_width / aspect)
    portion_width = portion_height * aspect
    left = draws.uniform("portion left") * (half_width - portion_width)
    top = draws.uniform("portion top") * (height - portion_height)
    left += half_width if on_left else 0.0
    return (
        (left + portion_width) / thin.width,
        top / height,
        left / thin.width,
        (top + portion_height) / height,
    )


def _frame_colour(draws: Draws) -> tuple[float, float, float]:
    """Wood, gold, black, white or any dull colour."""
    palette: Sequence[tuple[float, float, float]] = (
        (0.36, 0.23, 0.13),
        (0.20, 0.12, 0.07),
        (0.72, 0.58, 0.28),
        (0.08, 0.08, 0.08),
        (0.90, 0.89, 0.86),
        (0.55, 0.55, 0.56),
    )
    base = np.array(palette[draws.integer("frame palette", len(palette))])
    varied = np.clip(base * draws.uniform("frame light", 0.75, 1.2), 0, 1)
    varied = np.clip(varied + 0.06 * (draws.uniforms("frame hue", 3) - 0.5), 0, 1)
    return (float(varied[0]), float(varied[1]), float(varied[2]))
