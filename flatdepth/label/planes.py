"""What a depth model sees in outlined flat things, and the planes that take its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64

from flatdepth.data.polygons import NAMES, Outline, draw_outlines
from flatdepth.data.shards.codec import with_planes
from flatdepth.data.things import NOISE, TOLERANCE, PlaneFit, fit_thing, ring
from flatdepth.geometry import pixel_rays
from flatdepth.types import FlatThings, Region

MOST_POINTS = 400
"""Of a kind in a section."""
_FRONTAL = 0.1
"""A wall whose normal is this close to the optical axis is looked at from above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A thing and what is around it, projected along its plane, which so is a line.

    Points are (t, z) in the unit of the depth: ``t`` across, to the right or, seen from the side,
    downwards; ``z`` along the optical axis. The camera is at (0, 0).

    Attributes:
        seen_from: the direction of looking, nearest to vertical or horizontal.
        on_plane, off_plane: (n, 2), of the ring that the plane was fitted to, by what fits it.
        seen: (n, 2), where the model sees the thing itself.
        thing: (2, 2), the ends of the thing on its plane.
    """

    seen_from: Literal["above", "the side"]
    on_plane: Float64[np.ndarray, "_ 2"]
    off_plane: Float64[np.ndarray, "_ 2"]
    seen: Float64[np.ndarray, "_ 2"]
    thing: Float64[np.ndarray, "2 2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One mirror, picture or screen.

    Attributes:
        place: which of the outlines it is, from 0.
        fit: None where nothing can be fitted.
        trouble: why its plane is not to be trusted, or None.
        distance: z of its plane in the middle of what is seen of it, in the unit of the depth.
        tilt_deg: angle between the plane's normal and the optical axis.
        excess: median of how much farther than its plane the model sees it, as a share: 1 is twice
            as far, negative is nearer.
    """

    place: int
    fit: PlaneFit | None
    trouble: str | None
    distance: float | None = None
    tilt_deg: float | None = None
    excess: float | None = None
    section: Section | None = None


def examine(
    depth_m: Float32[np.ndarray, "h w"],
    K_px: Float64[np.ndarray, "3 3"],
    outlines: Sequence[Outline],
) -> tuple[list[Thing], Float32[np.ndarray, "h w"]]:
    """The flat things among outlines, and the depth with their planes put in.

    Args:
        depth_m: as predicted, in metres or any other unit.
        K_px: intrinsics of the depth map.
        outlines: in pixels of the depth map, later ones over earlier ones.

    Returns:
        The things in the order of the outlines; and the depth, NaN in things with trouble.

    Raises:
        BadFrame: there are too many things.
    """
    region, number = draw_outlines(outlines, *depth_m.shape)
    flat = (Region.MIRROR, Region.ART)
    places = [n for n, one in enumerate(outlines) if NAMES.get(one.label.strip().lower()) in flat]
    things = []
    for count, place in enumerate(places, 1):
        thing = number == count
        others = (region != Region.BACKGROUND) & ~thing
        things.append(_thing(depth_m, K_px, thing, others, place))
    planes = np.full((len(things), 3), np.nan)
    for row, one in zip(planes, things, strict=True):
        if one.fit is not None and one.trouble is None:
            row[:] = one.fit.m
    return things, with_planes(depth_m, K_px, FlatThings(number=number, planes=planes))


def _thing(
    depth_m: Float32[np.ndarray, "h w"],
    K_px: Float64[np.ndarray, "3 3"],
    thing: Bool[np.ndarray, "h w"],
    others: Bool[np.ndarray, "h w"],
    place: int,
) -> Thing:
    if not thing.any():
        return Thing(place=place, fit=None, trouble="nothing of it is seen")
    fit = fit_thing(depth_m, K_px, thing, others)
    if fit is None:
        return Thing(place=place, fit=None, trouble="too little is seen around it")
    if fit.behind:
        return Thing(place=place, fit=fit, trouble=fit.trouble)
    rows, columns = np.nonzero(thing)
    own = pixel_rays(K_px, columns + 0.5, rows + 0.5)
    seen = depth_m[rows, columns].astype(np.float64) * (own @ fit.m)
    known = seen[np.isfinite(seen)]
    return Thing(
        place=place,
        fit=fit,
        trouble=fit.trouble,
        distance=float(1 / (own.mean(axis=0) @ fit.m)),
        tilt_deg=float(np.degrees(np.arccos(abs(fit.m[2]) / np.linalg.norm(fit.m)))),
        excess=float(np.median(known)) - 1 if known.size else None,
        section=_section(depth_m, K_px, thing, ring(thing) & ~others, fit.m),
    )


def _section(
    depth_m: Float32[np.ndarray, "h w"],
    K_px: Float64[np.ndarray, "3 3"],
    thing: Bool[np.ndarray, "h w"],
    around: Bool[np.ndarray, "h w"],
    m: Float64[np.ndarray, " 3"],
) -> Section:
    across = m[:2] / np.linalg.norm(m)
    steep = float(np.linalg.norm(across))
    across = np.array([1.0, 0.0]) if steep < _FRONTAL else across / steep
    from_above = abs(across[0]) >= abs(across[1])
    across *= np.sign(across[0] if from_above else across[1])

    def project(
        mask: Bool[np.ndarray, "h w"],
    ) -> tuple[Float64[np.ndarray, "n 2"], Bool[np.ndarray, " n"]]:
        """(t, z) of some pixels with known depth, and whether they are on the plane."""
        rows, columns = np.nonzero(mask & np.isfinite(depth_m) & (depth_m > 0))
        some = np.random.default_rng(0).permutation(len(rows))[: 2 * MOST_POINTS]
        rows, columns = rows[some], columns[some]
        rays, z = pixel_rays(K_px, columns + 0.5, rows + 0.5), depth_m[rows, columns]
        expected = rays @ m
        near = np.abs(1 / z - expected) <= TOLERANCE * expected + NOISE
        return np.stack([rays[:, :2] @ across * z, z], axis=-1), near

    points, near = project(around)
    rows, columns = np.nonzero(thing)
    rays = pixel_rays(K_px, columns + 0.5, rows + 0.5)
    z = 1 / (rays @ m)
    hung = np.stack([rays[:, :2] @ across * z, z], axis=-1)
    along = hung @ np.array([m[2], -m[:2] @ across])
    return Section(
        seen_from="above" if from_above else "the side",
        on_plane=points[near][:MOST_POINTS],
        off_plane=points[~near][:MOST_POINTS],
        seen=project(thing)[0][:MOST_POINTS],
        thing=hung[[along.argmin(), along.argmax()]],
    )
