"""The plan of an image's pastes: what, where, on which plane, and how it looks.

Small float64 work per sample on the CPU, in a loader thread; the pixels are made on the device by
``composite``. A plan is a function of (seed, epoch, sample) and the configuration alone.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from flatdepth.augment.plan.appearance import Form, Kind, Look, draw_form, draw_look
from flatdepth.augment.plan.coarse import ThinView
from flatdepth.augment.plan.hang import hang
from flatdepth.augment.plan.sensor import sharpness_and_noise
from flatdepth.augment.plan.stand import legacy, stand
from flatdepth.augment.plan.walls import Walls, find_walls
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.geometry import Rectangle, project, quad_area

CONTRAST = 1.5
Layout = Literal["hung", "standing", "legacy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paste:
    """One planned paste.

    Attributes:
        kind: what it is.
        layout: where it is placed.
        front: background nearer than ``front`` times the surface's depth stays in front; 0 lets
            nothing through.
        spread_px: (width, height) in view pixels: where depth is sparse, what is within so many
            pixels of something in front may be part of it and stays in front too.
        rectangle: the whole paste with its frame, in camera coordinates.
        look: how it is drawn.
        picture_px: (width, height) of the picture inside frame and mat, in texels: as large as it
            is seen, or as the source's own sharpness allows.
        portion: (left, top, right, bottom) in view pixels of what a mirror shows; left > right,
            because a mirror flips it. None for everything else.
        picture: number in the art collection; -1 if it shows something else.
        draws: random numbers for the rest of its content.
        depth_gradient: legacy only: depth in metres is ``depth_gradient . (u, v, 1)``.
    """

    kind: Kind
    layout: Layout
    front: float
    spread_px: tuple[int, int]
    rectangle: Rectangle
    look: Look
    picture_px: tuple[int, int]
    portion: tuple[float, float, float, float] | None
    picture: int
    draws: Draws
    depth_gradient: tuple[float, float, float] | None = None

    @property
    def picture_box(self) -> Rectangle:
        """The part of the rectangle inside frame and mat."""
        inset = 2 * (self.look.frame_m + self.look.mat_m)
        return replace(
            self.rectangle,
            width=self.rectangle.width - inset,
            height=self.rectangle.height - inset,
        )

    def describe(self) -> str:
        """Layout and kind in two words."""
        return f"{self.layout} {self.kind}"


def is_pasted(draws: Draws, config: PasteConfig) -> bool:
    """Whether an image gets pastes at all, so that a clean one costs nothing."""
    return draws.uniform("pasted") < config.share


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
        config: settings of the step (``PasteConfig.at``).
        picture_aspects: width / height of every picture of the art collection; may be empty.
        depth_range_m: (near, far) that truth must lie in.

    Returns:
        Between none and ``config.max_pastes`` pastes. They do not overlap when hung.
    """
    if not is_pasted(draws, config):
        return ()
    kinds = asdict(config.content)
    if len(picture_aspects) == 0:
        kinds["art"] = 0.0
    if sum(kinds.values()) <= 0:
        return ()
    scene = _Occupied(
        taken=np.zeros(len(thin.u), dtype=bool), nearest=thin.nearest, free=config.max_area
    )
    walls = find_walls(thin, draws, config)
    sensor = sharpness_and_noise(thin.frame.image)
    pastes: list[Paste] = []
    for number in range(1 + draws.integer("pastes", config.max_pastes)):
        if scene.free < config.area[0]:
            break
        own = draws.child(number)
        kind = Kind(own.choice("kind", kinds))
        picture = own.integer("picture", len(picture_aspects)) if kind is Kind.ART else -1
        aspect = float(picture_aspects[picture]) if kind is Kind.ART else 1.0
        form = draw_form(own, config, kind, aspect)
        form = replace(form, area=min(form.area, scene.free))
        place = _place(thin, walls, own, config, form, scene, depth_range_m)
        if place is not None:
            pastes.append(_paste(thin, own, config, kind, form, place, picture, sensor))
            scene = scene.with_rectangle(thin, place.rectangle)
    return tuple(sorted(pastes, key=lambda paste: paste.layout != "hung"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Occupied:
    """What earlier pastes leave: cells hung on, nearest 1/z per cell, free share of the area."""

    taken: Bool[np.ndarray, " n"]
    nearest: Float64[np.ndarray, " n"]
    free: float

    def with_rectangle(self, thin: ThinView, rectangle: Rectangle) -> "_Occupied":
        corners = project(thin.K_px, rectangle.corners())
        covered = thin.covered(corners)
        surface = rectangle.plane @ thin.rays.T
        return _Occupied(
            taken=self.taken | covered,
            nearest=np.where(covered, np.maximum(self.nearest, surface), self.nearest),
            free=self.free - float(quad_area(corners)) / (thin.height * thin.width),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    layout: Layout
    rectangle: Rectangle
    depth_gradient: tuple[float, float, float] | None = None


def _place(
    thin: ThinView,
    walls: Walls | None,
    draws: Draws,
    config: PasteConfig,
    form: Form,
    scene: _Occupied,
    depth_range_m: tuple[float, float],
) -> _Place | None:
    layout = draws.choice("layout", asdict(config.layout))
    if layout == "legacy":
        found = legacy(thin, draws, form, depth_range_m)
        if found is not None:
            return _Place(layout="legacy", rectangle=found[0], depth_gradient=found[1])
    if layout == "hung" and walls is not None:
        rectangle = hang(thin, walls, draws, config, form, scene.taken, depth_range_m)
        if rectangle is not None:
            return _Place(layout="hung", rectangle=rectangle)
    if config.layout.standing == 0:
        return None
    rectangle = stand(thin, walls, draws, config, form, scene.taken, scene.nearest, depth_range_m)
    return None if rectangle is None else _Place(layout="standing", rectangle=rectangle)


def _paste(
    thin: ThinView,
    draws: Draws,
    config: PasteConfig,
    kind: Kind,
    form: Form,
    place: _Place,
    picture: int,
    sensor: tuple[float, float],
) -> Paste:
    hung = place.layout == "hung"
    hidden = hung and config.depth_test
    noise = config.depth_noise * place.rectangle.centre[2]
    paste = Paste(
        kind=kind,
        layout=place.layout,
        front=1 / (1 + 2 * config.plane_tolerance + noise) if hidden else 0.0,
        spread_px=_spread_px(thin) if hidden else (0, 0),
        rectangle=place.rectangle,
        look=draw_look(thin, draws, config, kind, form, place.rectangle, hung=hung, sensor=sensor),
        picture_px=(2, 2),
        portion=None,
        picture=picture,
        draws=draws,
        depth_gradient=place.depth_gradient,
    )
    box = paste.picture_box
    corners = project(thin.K_px, box.corners())
    portion = None
    if kind is Kind.MIRROR:
        on_left = float(corners[:, 0].mean()) < thin.width / 2
        portion = _mirror_portion(thin, draws, config, box.width / box.height, on_left)
    return replace(paste, picture_px=_picture_px(corners, thin), portion=portion)


def _spread_px(thin: ThinView) -> tuple[int, int]:
    """A gap between returns, and the 2 pixels by which a majority of 5 x 5 wears off corners."""
    if not thin.is_sparse:
        return 0, 0
    return math.ceil(thin.gap_px[0]) + 2, math.ceil(thin.gap_px[1]) + 2


def _picture_px(corners: Float64[np.ndarray, "4 2"], thin: ThinView) -> tuple[int, int]:
    """The size at which a picture is seen, no sharper than the photograph it is pasted into."""
    sides = np.linalg.norm(np.roll(corners, -1, axis=0) - corners, axis=1)
    seen = np.array([sides[0] + sides[2], sides[1] + sides[3]]) / 2
    view = thin.view
    source = np.array([view.crop_width / view.width, view.crop_height / view.height])
    width, height = np.clip(
        np.round(seen * np.minimum(source, 1.0)), 2, [1.5 * view.width, 1.5 * view.height]
    ).astype(int)
    return int(width), int(height)


def _mirror_portion(
    thin: ThinView, draws: Draws, config: PasteConfig, aspect: float, on_left: bool
) -> tuple[float, float, float, float]:
    """A portion of the half of the image where the mirror is not, flipped left to right.

    Of up to four draws the first whose depths (10th to 90th percentile) differ by ``CONTRAST`` is
    taken, else the one with the largest contrast: a mirror that shows a bare wall teaches little.
    """
    half_width, height = 0.5 * thin.width, float(thin.height)
    found: list[tuple[float, tuple[float, float, float, float]]] = []
    for attempt in range(4):
        own = draws.child(100 + attempt)
        side = own.uniform("portion", *config.mirror_portion)
        portion_height = side * min(height, half_width / aspect)
        portion_width = portion_height * aspect
        left = own.uniform("portion left") * (half_width - portion_width)
        top = own.uniform("portion top") * (height - portion_height)
        left += half_width if on_left else 0.0
        box = (left, top, left + portion_width, top + portion_height)
        found.append((_depth_contrast(thin, box), box))
        if found[-1][0] >= CONTRAST:
            break
    left, top, right, bottom = max(found, key=lambda entry: entry[0])[1]
    return right, top, left, bottom


def _depth_contrast(thin: ThinView, box: tuple[float, float, float, float]) -> float:
    """90th over 10th percentile of the known depths in a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    inside = (thin.u >= left) & (thin.u <= right) & (thin.v >= top) & (thin.v <= bottom)
    inverse = thin.inverse_depth[inside]
    inverse = inverse[inverse > 0]
    if len(inverse) < 4:
        return 1.0
    low, high = np.percentile(inverse, (10, 90))
    return float(high / low)
