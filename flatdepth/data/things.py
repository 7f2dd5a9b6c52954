"""The plane of a labelled flat thing, from the depth around it or in it.

A mirror, and to a depth model a picture too, shows a depth that is not its own. What it hangs on
is seen around it: the plane is fitted to a ring outside its outline, in inverse depth, where planes
are affine whatever the scale (``flatdepth.types``). The fit is robust, because things stand before
the wall and the floor begins below it, and it says how far it can be trusted.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from flatdepth.geometry import fit_plane, fit_planes_robust, pixel_rays

RING = 0.2
"""Width of the ring as a share of the square root of the thing's area."""
GAP = 0.02
"""Distance of the ring from the outline, likewise: an outline drawn by hand is not exact, and depth
near edges is a mixture."""
SECTORS = 24
"""Equal angles around the thing's centre; each counts once, however much of it is seen."""
HYPOTHESES = 200
TOLERANCE, NOISE = 0.02, 0.003
"""Inliers are within this share of 1/z, and this much in 1/m, as ``paste.plane_tolerance``."""
REFITS = 5
EXACT = 0.05
"""Of the tolerance: deviations that are left to rounding of depth, whatever the scatter."""
SPREAD = 2.5
"""Standard deviations within which the points of a plane are expected, in the last fits."""
LEAST_POINTS = 12
LEAST_SHARE = 0.4
MOST_UNCERTAIN = 0.05
MOST_POINTS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneFit:
    """A plane and how well it fits.

    Attributes:
        m: (3,) float64, in 1/m.
        residual: RMS of the relative deviation of the inliers' 1/z from the plane.
        share: of the sectors that are seen, the mean share of points that lie on the plane.
        uncertainty: relative error of 1/z that such a residual may cause where the plane is
            extrapolated most inside the thing: the residual times the root of the largest leverage
            ``ray . (mean of ray ray^T)^-1 ray`` of its pixels (Cook and Weisberg 1982, section
            2.2), as if all points erred alike.
        open_deg: the widest angle, seen from the middle of the thing, within which no sector has
            the plane in most of its points; below 180 the thing is among them, not beside.
        behind: whether the plane is behind the camera at a pixel of the thing.
    """

    m: Float64[np.ndarray, " 3"]
    residual: float
    share: float
    uncertainty: float
    open_deg: float
    behind: bool

    @property
    def trouble(self) -> str | None:
        """Why the plane should not be taken for truth; None if it may be."""
        if self.behind:
            return "the plane around it does not pass through it"
        if self.share < LEAST_SHARE:
            return f"only {self.share:.0%} of what surrounds it lies on one plane"
        if self.uncertainty > MOST_UNCERTAIN:
            return f"its plane is known to {self.uncertainty:.0%} only"
        if self.open_deg >= 180:
            return "what lies on its plane is on one side of it"
        return None


def fit_thing(
    depth_m: Float32[np.ndarray, "h w"],
    K_px: Float64[np.ndarray, "3 3"],
    thing: Bool[np.ndarray, "h w"],
    others: Bool[np.ndarray, "h w"],
    *,
    inside: bool = False,
) -> PlaneFit | None:
    """The plane of a flat thing.

    Args:
        depth_m: planar z in metres, or in any other unit; NaN unknown, +inf sky.
        K_px: intrinsics.
        thing: its pixels.
        others: pixels that say nothing of it: other flat things, frames, openings.
        inside: fit to the depth of the thing itself (a picture seen by a depth camera) rather than
            to the ring around it.

    Returns:
        The fit; None if there are too few points with known depth. Equal arguments give equal bits.
    """
    known = ~others & np.isfinite(depth_m) & (depth_m > 0)
    rows, columns = np.nonzero(known & ring(thing, inside=inside))
    if len(rows) < LEAST_POINTS:
        return None
    own_rows, own_columns = np.nonzero(thing)
    angle = np.arctan2(rows - own_rows.mean(), columns - own_columns.mean())
    sector = ((angle / (2 * np.pi) + 0.5) * SECTORS).astype(np.int64) % SECTORS
    generator = np.random.default_rng(0)
    kept = generator.permutation(len(rows))[:MOST_POINTS]
    rows, columns, sector = rows[kept], columns[kept], sector[kept]
    rays = pixel_rays(K_px, columns + 0.5, rows + 0.5)
    inverse = 1 / depth_m[rows, columns].astype(np.float64)
    points = np.bincount(sector, minlength=SECTORS)
    weight = 1 / (points[sector] * np.count_nonzero(points))
    triples = generator.choice(len(rows), (HYPOTHESES, 3), p=weight)
    planes = [
        fit_planes_robust(
            *(rays, inverse, rays[triples], inverse[triples]),
            tolerance=TOLERANCE,
            noise=NOISE,
            refits=refits,
        )[0]
        for refits in (0, 3)
    ]
    m, kept = _polished(_best(np.concatenate(planes), rays, inverse, weight), rays, inverse)
    on_plane = _deviation(m, rays, inverse) <= 1
    share = float(weight[on_plane].sum())
    held = np.bincount(sector[on_plane], minlength=SECTORS) > points / 2
    if kept.sum() < LEAST_POINTS:
        return None
    rays, inverse = rays[kept], inverse[kept]
    residual = float(np.sqrt(np.mean((inverse / (rays @ m) - 1) ** 2)))
    own = pixel_rays(K_px, own_columns + 0.5, own_rows + 0.5)
    moments = np.linalg.pinv(rays.T @ rays / len(rays))
    leverage = np.einsum("ni,ij,nj->n", own, moments, own).max()
    return PlaneFit(
        m=m,
        residual=residual,
        share=share,
        uncertainty=residual * float(np.sqrt(leverage)),
        open_deg=_widest_gap_deg(held),
        behind=bool((own @ m <= 0).any()),
    )


def ring(thing: Bool[np.ndarray, "h w"], *, inside: bool = False) -> Bool[np.ndarray, "h w"]:
    """The pixels that a thing's plane is fitted to: around it, or its own but for its rim."""
    side = float(np.sqrt(thing.sum()))
    gap, width = max(1, round(GAP * side)), max(3, round(RING * side))
    if inside:
        return ~_grown(~thing, gap) & thing
    return _grown(thing, gap + width) & ~_grown(thing, gap)


def _widest_gap_deg(held: Bool[np.ndarray, " sectors"]) -> float:
    """The widest angle without a sector that is held; 360 if none is."""
    places = np.flatnonzero(held)
    if len(places) == 0:
        return 360.0
    steps = np.diff(places, append=places[0] + SECTORS)
    return float(steps.max() - 1) * 360 / SECTORS


def _deviation(
    m: Float64[np.ndarray, "*k 3"],
    rays: Float64[np.ndarray, "n 3"],
    inverse: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, "*k n"]:
    """|1/z - m . ray| in units of what is tolerated; infinite behind the camera."""
    predicted = m @ rays.T
    with np.errstate(divide="ignore"):
        deviation = np.abs(inverse - predicted) / (TOLERANCE * predicted + NOISE)
    return np.where(predicted > 0, deviation, np.inf)


def _best(
    planes: Float64[np.ndarray, "k 3"],
    rays: Float64[np.ndarray, "n 3"],
    inverse: Float64[np.ndarray, " n"],
    weight: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, " 3"]:
    """The plane that most points lie on at every tolerance from ``EXACT`` to 1.

    Octaves of the tolerance count alike, as for noise of unknown scale (Barath, Matas and Noskova
    2019): the integral of the share of inliers over the logarithm of the tolerance. At one
    tolerance a plane between two surfaces that just reaches both would beat that of either.
    """
    gain = -np.log(_deviation(planes, rays, inverse).clip(EXACT, 1))
    best: Float64[np.ndarray, " 3"] = planes[int((gain @ weight).argmax())]
    return best


def _polished(
    m: Float64[np.ndarray, " 3"],
    rays: Float64[np.ndarray, "n 3"],
    inverse: Float64[np.ndarray, " n"],
) -> tuple[Float64[np.ndarray, " 3"], Bool[np.ndarray, " n"]]:
    """Fitted again to what lies within ``SPREAD`` of its own scatter, and those points.

    The scatter is 1.4826 times the median deviation of the inliers, which for normal errors is
    their standard deviation (Rousseeuw and Croux 1993), so that what a tolerance for noisy depth
    lets in besides, such as a skirting board, is left out where depth is exact.
    """
    for _ in range(REFITS):
        deviation = _deviation(m, rays, inverse)
        inliers = deviation[deviation <= 1]
        if len(inliers) < LEAST_POINTS:
            return m, deviation <= 1
        scatter = 1.4826 * float(np.median(inliers))
        kept = deviation <= min(1.0, max(SPREAD * scatter, EXACT))
        m = fit_plane(rays[kept], inverse[kept])
    return m, kept


def _grown(mask: Bool[np.ndarray, "h w"], by: int) -> Bool[np.ndarray, "h w"]:
    """All pixels within a square of ``by`` pixels to each side of one that is set."""
    grown: Tensor = torch.from_numpy(mask)[None, None].to(torch.float32)
    for size in ((2 * by + 1, 1), (1, 2 * by + 1)):
        grown = F.max_pool2d(grown, size, stride=1, padding=(size[0] // 2, size[1] // 2))
    return grown[0, 0].numpy() > 0
