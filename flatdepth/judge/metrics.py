"""Depth and flatness metrics per image and region, and the table that gathers them.

The field's convention is followed: a metric is computed over the pixels of one image, and a data
set's figure is the mean over its images, each counting once. ``RegionTable`` keeps one row per
(sample, region) until the end, so a result has the same bits for any order of arrival, batch size
or number of ranks.

To that end every image is reduced on its own: reductions over a batch axis, and lone sums that
torch splits over threads, change their last bits with the batch size and the number of threads.

Everything is computed in float64. Masks say which pixels count; what prediction and truth hold
elsewhere (NaN, inf, 0) never enters. The truth must be finite and above 0 inside the mask.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from flatdepth.types import METRICS, REGIONS, Region


def region_masks(
    region: UInt8[Tensor, "b 1 h w"], valid: Bool[Tensor, "b 1 h w"], *, flat_known: bool
) -> dict[str, Bool[Tensor, "b 1 h w"]]:
    """The pixels to evaluate, by region name.

    Args:
        region: values of ``Region``.
        valid: where the truth is known and in range.
        flat_known: False for clean images, which have the one region "clean"; True for images that
            went through the paste stage or whose own flat things are labelled, which have the other
            six ("flat" is mirror or art).
    """
    if not flat_known:
        return {"clean": valid}
    masks = {r.name.lower(): valid & (region == r) for r in Region}
    return masks | {"flat": masks["mirror"] | masks["art"]}


def image_metrics(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    min_m: float,
    max_m: float,
) -> tuple[Float64[Tensor, "b m"], Int64[Tensor, " b"]]:
    """The metrics of each image over its masked pixels.

    With prediction p, truth t and d = ln p - ln t, means over the pixels:

    - abs_rel ``mean |p - t| / t``, sq_rel ``mean (p - t)^2 / t`` (metres), rmse
      ``sqrt(mean (p - t)^2)`` (metres), mae ``mean |p - t|`` (metres),
    - rmse_log ``sqrt(mean d^2)``, log10 ``mean |log10 p - log10 t|``,
    - silog ``100 * sqrt(mean d^2 - (mean d)^2)``, the KITTI benchmark's form as BTS and ZoeDepth
      report it, blind to a global scale. Depth Anything V2's script prints
      ``sqrt(mean d^2 - (mean d)^2 / 2)`` under the same name; the two do not compare.
    - delta k ``share of pixels with max(p / t, t / p) < 1.25^k``;
      delta105 the same with 1.05

    (Eigen, Puhrsch and Fergus 2014, section 4; log10 from Saxena et al. 2009, Make3D).

    Predictions are first brought into ``[min_m, max_m]`` for every metric, NaN to ``min_m``, as
    BTS and ZoeDepth do: the figures are finite whatever the model says.

    Args:
        pred_m: predicted planar z in metres, at the truth's resolution.
        truth_m: true planar z in metres.
        mask: the pixels that count.
        min_m, max_m: range in metres that predictions are brought into, that of the protocol.

    Returns:
        (values, pixels): values in the order of ``METRICS``, and the number of masked pixels. An
        image without any has values 0 and pixels 0.
    """

    formulas = [FORMULAS[name] for name in METRICS]

    def metrics(i: int) -> Tensor:
        inside = mask[i, 0]
        p = _in_range(pred_m[i, 0][inside], min_m, max_m)
        t = truth_m[i, 0][inside].double()
        pixels = Pixels(p, t, p - t, p.log() - t.log(), torch.maximum(p / t, t / p))
        means = _means(*(formula.of_pixel(pixels) for formula in formulas))
        return torch.stack([f.of_mean(mean) for f, mean in zip(formulas, means, strict=True)])

    return _per_image(metrics, mask, len(METRICS)), mask.sum((1, 2, 3))


class Pixels(NamedTuple):
    """Prediction p, truth t, p - t, ln p - ln t and max(p / t, t / p) of n pixels, (n,) each."""

    p: Tensor
    t: Tensor
    error: Tensor
    d: Tensor
    ratio: Tensor


class Formula(NamedTuple):
    """A metric: a value per pixel (n,), and what is made of its mean."""

    of_pixel: Callable[[Pixels], Tensor]
    of_mean: Callable[[Tensor], Tensor] = lambda mean: mean


FORMULAS: dict[str, Formula] = {
    "abs_rel": Formula(lambda x: x.error.abs() / x.t),
    "sq_rel": Formula(lambda x: x.error**2 / x.t),
    "rmse": Formula(lambda x: x.error**2, torch.sqrt),
    "rmse_log": Formula(lambda x: x.d**2, torch.sqrt),
    "log10": Formula(lambda x: x.d.abs() / math.log(10)),
    "silog": Formula(lambda x: (x.d - _means(x.d, x.d)[0]) ** 2, lambda v: 100 * v.sqrt()),
    "mae": Formula(lambda x: x.error.abs()),
    "delta1": Formula(lambda x: (x.ratio < 1.25).double()),
    "delta2": Formula(lambda x: (x.ratio < 1.25**2).double()),
    "delta3": Formula(lambda x: (x.ratio < 1.25**3).double()),
    "delta105": Formula(lambda x: (x.ratio < 1.05).double()),
}
"""The formulas of ``flatdepth.types.METRICS``."""


SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_SSIM_FLOOR = 0.01


def ssim_map(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    min_m: float,
    max_m: float,
) -> tuple[Float64[Tensor, "b 1 h w"], Bool[Tensor, "b 1 h w"]]:
    """Structural similarity of two depth maps around every pixel whose whole window counts.

    Wang et al. 2004, equation 13: means, variances and covariance under an 11 x 11 Gaussian window
    of sigma 1.5 px, ``C1 = (0.01 L)^2``, ``C2 = (0.03 L)^2``. L is the range of the masked true
    depth of the image (at least 1 % of its largest depth, for walls seen straight on), so that
    scaling both maps changes nothing. A window that reaches a pixel outside the mask or the image
    has no value: depth that is not known is never made up.

    Args:
        pred_m: predicted planar z in metres, brought into the range as in ``image_metrics``.
        truth_m: true planar z in metres.
        mask: the pixels that count.
        min_m, max_m: range in metres that predictions are brought into.

    Returns:
        (values, complete): the similarity, and where there is one. Elsewhere values are
        meaningless but finite. Average them with ``mean_over``.
    """
    p = torch.where(mask, _in_range(pred_m, min_m, max_m), 0.0)
    t = torch.where(mask, truth_m, 0.0).double()
    highest = t.amax((1, 2, 3), keepdim=True)
    lowest = torch.where(mask, t, highest).amin((1, 2, 3), keepdim=True)
    extent = (highest - lowest).maximum(_SSIM_FLOOR * highest)
    extent = torch.where(highest > 0, extent, 1.0)
    c1, c2 = (0.01 * extent) ** 2, (0.03 * extent) ** 2
    mean_p, mean_t = _window_mean(p), _window_mean(t)
    var_p = _window_mean(p * p) - mean_p**2
    var_t = _window_mean(t * t) - mean_t**2
    covariance = _window_mean(p * t) - mean_p * mean_t
    values = (2 * mean_p * mean_t + c1) * (2 * covariance + c2)
    values = values / ((mean_p**2 + mean_t**2 + c1) * (var_p + var_t + c2))
    outside = F.max_pool2d((~mask).float(), SSIM_WINDOW, 1, SSIM_WINDOW // 2) > 0
    reach = SSIM_WINDOW // 2
    inner = torch.zeros_like(mask)
    inner[..., reach : mask.shape[-2] - reach, reach : mask.shape[-1] - reach] = True
    return values, inner & ~outside


def mean_over(
    values: Float64[Tensor, "b 1 h w"], mask: Bool[Tensor, "b 1 h w"]
) -> tuple[Float64[Tensor, " b"], Int64[Tensor, " b"]]:
    """(mean, pixels) of a map over the masked pixels of each image; 0 where there are none."""

    def mean(i: int) -> Tensor:
        inside = values[i][mask[i]]
        return _means(inside, inside)[:1]

    return _per_image(mean, mask, 1)[:, 0], mask.sum((1, 2, 3))


def flatness_residual(
    pred_m: Float[Tensor, "b 1 h w"],
    K_px: Float64[Tensor, "b 3 3"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    min_m: float,
    max_m: float,
) -> Float64[Tensor, " b"]:
    """How far each masked part of a prediction is from a plane, blind to scale.

    The least-squares plane ``1/z = m . (x, y, 1)`` is fitted to the predicted inverse depth
    (``flatdepth.types``, Planes); the result is the RMS residual divided by the mean predicted
    inverse depth. 0 is flat; 0.02 is relief of 2 %. 0 for an image without masked pixels, so ask
    it only of masks with many.

    Args:
        pred_m: predicted planar z in metres, brought into the range as in ``image_metrics``.
        K_px: intrinsics, pixel centres at integers + 0.5.
        mask: the pixels of the surface.
        min_m, max_m: range in metres that predictions are brought into.
    """

    def residual(i: int) -> Tensor:
        inverse = _in_range(pred_m[i, 0][mask[i, 0]], min_m, max_m).reciprocal()
        x, y = _ray_xy(K_px[i], mask[i, 0])
        m = _fit_plane(x, y, inverse)
        mean, sq = _means(inverse, (inverse - m[0] * x - m[1] * y - m[2]) ** 2)
        return sq.sqrt() / mean

    return _per_image(residual, mask, 1)[:, 0]


def plane_normal_angle_deg(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    K_px: Float64[Tensor, "b 3 3"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    min_m: float,
    max_m: float,
) -> Float64[Tensor, " b"]:
    """Angle in degrees, 0..180, between the planes fitted to prediction and truth.

    Both planes are least-squares fits of inverse depth as in ``flatness_residual``; their
    normals are the directions of ``m``. 0 for an image without masked pixels. Pixels on one line
    determine no plane; both fits then take the one with the least slope across the line.

    Args:
        pred_m: predicted planar z in metres, brought into the range as in ``image_metrics``.
        truth_m: true planar z in metres.
        K_px: intrinsics, pixel centres at integers + 0.5.
        mask: the pixels of the surface.
        min_m, max_m: range in metres that predictions are brought into.
    """

    def angle(i: int) -> Tensor:
        inside = mask[i, 0]
        x, y = _ray_xy(K_px[i], inside)
        a = _fit_plane(x, y, _in_range(pred_m[i, 0][inside], min_m, max_m).reciprocal())
        b = _fit_plane(x, y, truth_m[i, 0][inside].double().reciprocal())
        # atan2 and not acos, which loses half of the digits near 0
        return torch.atan2(torch.linalg.cross(a, b).norm(), a @ b).rad2deg()

    return _per_image(angle, mask, 1)[:, 0]


class RegionTable:
    """Values per (sample, region), and their means over the images of each region.

    Fill one table per rank with ``add``; gather the two tensors of ``state`` of all ranks and
    ``merge`` them into an empty table; ask that for its ``result``. Rows live on the CPU.
    """

    def __init__(self, columns: Iterable[str] = METRICS) -> None:
        """Args: columns: names of the values, in the order in which ``add`` takes them."""
        self.columns = tuple(columns)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(
        self,
        sample_ids: Int64[Tensor, " b"],
        name: str,
        values: Float64[Tensor, "b m"],
        pixels: Int64[Tensor, " b"],
    ) -> None:
        """Add a batch's values in one region.

        Args:
            sample_ids: identity of each image, 0 or above, the same on every rank.
            name: one of ``REGIONS``.
            values: one row per image, in the order of ``columns``.
            pixels: pixels of the region in each image.

        Raises:
            ValueError: a value is not finite, which would spoil the mean without a trace of
                where it came from.
        """
        bad = ~values.isfinite().all(dim=1)
        if bad.any():
            raise ValueError(f"{name}: values of samples {sample_ids[bad].tolist()} are not finite")
        region = torch.full_like(sample_ids, REGIONS.index(name))
        self.merge(torch.stack([sample_ids, region, pixels], dim=1), values)

    def merge(self, keys: Int64[Tensor, "n 3"], values: Float64[Tensor, "n m"]) -> None:
        """Add the rows of another table's ``state``.

        Rows whose sample id is negative are skipped, so states of unequal length can be padded
        with -1 and gathered (``accelerator.pad_across_processes(x, pad_index=-1)``).
        """
        real = keys[:, 0] >= 0
        self._keys.append(keys[real].cpu())
        self._values.append(values[real].cpu())

    def state(self) -> tuple[Int64[Tensor, "n 3"], Float64[Tensor, "n m"]]:
        """All rows on the CPU: (sample id, index in ``REGIONS``, pixels) and the values."""
        keys = torch.cat([torch.empty(0, 3, dtype=torch.int64), *self._keys])
        empty = torch.empty(0, len(self.columns), dtype=torch.float64)
        return keys, torch.cat([empty, *self._values])

    def result(self, min_pixels: int = 64) -> dict[str, dict[str, float]]:
        """The mean of every column over the images of each region, ready for JSON.

        Each region also has "images" (that the means are over) and "pixels" (their sum). Where
        the columns include "abs_rel", region "flat" has "illusion_gap", its AbsRel divided by
        that of "background": 1 when flat things are no harder than the rest of the picture.

        Args:
            min_pixels: an image with fewer pixels of a region does not count for it.

        Returns:
            region -> column -> mean, in the order of ``REGIONS``; regions without images are
            left out, as is an illusion gap whose background has no error to divide by.

        Raises:
            ValueError: a sample was added twice.
        """
        keys, values = self.state()
        samples, times = keys[:, :2].unique(dim=0, return_counts=True)
        if (times > 1).any():
            sample, region = samples[times > 1][0].tolist()
            raise ValueError(f"sample {sample} was evaluated twice in region {REGIONS[region]}")

        table: dict[str, dict[str, float]] = {}
        for index, name in enumerate(REGIONS):
            rows = (keys[:, 1] == index) & (keys[:, 2] >= min_pixels)
            images = int(rows.sum())
            if images:
                # fsum is exact before its one rounding, hence blind to the order of the rows
                sums = [math.fsum(column) for column in values[rows].T.tolist()]
                means = {c: s / images for c, s in zip(self.columns, sums, strict=True)}
                table[name] = means | {"images": images, "pixels": int(keys[rows, 2].sum())}

        background = table.get("background", {}).get("abs_rel", 0.0)
        if "flat" in table and background > 0:
            table["flat"]["illusion_gap"] = table["flat"]["abs_rel"] / background
        return table


def bootstrap_means(
    table: RegionTable,
    scene_of: Mapping[int, str],
    scenes: Sequence[str],
    *,
    draws: int = 2000,
    seed: int = 0,
    min_pixels: int = 64,
) -> dict[str, dict[str, Float64[np.ndarray, " draws"]]]:
    """The means of ``RegionTable.result`` again, over scenes drawn with replacement.

    Frames of one scene resemble each other, so the scene is what is drawn (cluster bootstrap,
    Davison and Hinkley 1997, section 3.8). The draws depend on ``seed`` and the number of scenes
    alone: tables of the same images are resampled alike, and the differences between their draws
    are those of a paired comparison.

    Args:
        table: rows of one data set.
        scene_of: sample id -> scene.
        scenes: the scenes of the data set, those without rows included.
        draws: number of resamples.
        seed: of the resamples.
        min_pixels: as in ``RegionTable.result``.

    Returns:
        region -> column (and "illusion_gap") -> means; NaN for a resample without the region.
        Regions seen in fewer than two scenes are left out: nothing is known of their spread.
    """
    keys, values = (part.numpy() for part in table.state())
    number = {scene: i for i, scene in enumerate(sorted(scenes))}
    picks = scene_draws(len(number), draws, seed)
    result: dict[str, dict[str, np.ndarray]] = {}
    for index, name in enumerate(REGIONS):
        rows = (keys[:, 1] == index) & (keys[:, 2] >= min_pixels)
        scene = np.array([number[scene_of[i]] for i in keys[rows, 0].tolist()], dtype=np.int64)
        counts = np.bincount(scene, minlength=len(number))
        if np.count_nonzero(counts) < 2:
            continue
        sums = np.zeros((len(number), len(table.columns)))
        np.add.at(sums, scene, values[rows])
        images = (picks @ counts).astype(np.float64)
        images[images == 0] = np.nan
        means = (picks @ sums) / images[:, None]
        result[name] = dict(zip(table.columns, means.T, strict=True))
    if "flat" in result and "background" in result and "abs_rel" in table.columns:
        background = result["background"]["abs_rel"]
        background = np.where(background > 0, background, np.nan)
        result["flat"]["illusion_gap"] = result["flat"]["abs_rel"] / background
    return result


def scene_draws(scenes: int, draws: int, seed: int) -> Int64[np.ndarray, "draws scenes"]:
    """How often each of the scenes is drawn when as many are drawn with replacement."""
    picks: np.ndarray = np.random.default_rng(seed).multinomial(
        scenes, np.full(scenes, 1 / scenes), size=draws
    )
    return picks


def percentile_interval(
    draws: Float64[np.ndarray, " draws"], level: float = 0.95
) -> tuple[float, float] | None:
    """The central interval that holds ``level`` of the draws; NaN draws do not count."""
    known = draws[~np.isnan(draws)]
    if known.size == 0:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def _window_mean(x: Float64[Tensor, "b 1 h w"]) -> Float64[Tensor, "b 1 h w"]:
    """Gaussian mean around every pixel, 0 beyond the image.

    Shifted sums and not a convolution, whose order of summation differs between backends.
    """
    reach = SSIM_WINDOW // 2
    offsets = range(-reach, reach + 1)
    weights = [math.exp(-0.5 * (k / SSIM_SIGMA) ** 2) for k in offsets]
    total = math.fsum(weights)
    for axis, padding in ((-1, (reach, reach)), (-2, (0, 0, reach, reach))):
        size = x.shape[axis]
        padded = F.pad(x, padding)
        x = torch.zeros_like(x)
        for start, weight in enumerate(weights):
            x = x + weight / total * padded.narrow(axis, start, size)
    return x


def _per_image(
    compute: Callable[[int], Tensor], mask: Bool[Tensor, "b 1 h w"], columns: int
) -> Float64[Tensor, "b m"]:
    """``compute`` of each image that has masked pixels, 0 for the others."""
    out = torch.zeros(len(mask), columns, dtype=torch.float64, device=mask.device)
    for i, any_inside in enumerate(mask.flatten(1).any(dim=1).tolist()):
        if any_inside:
            out[i] = compute(i)
    return out


def _means(*rows: Float64[Tensor, " n"]) -> Float64[Tensor, " k"]:
    """The mean of each row, of which there must be two or more.

    With several rows torch gives each to one thread; a lone one it would split, and the number
    of threads would show in the last bits.
    """
    return torch.stack(rows).mean(dim=1)


def _in_range(pred_m: Float[Tensor, "..."], min_m: float, max_m: float) -> Float64[Tensor, "..."]:
    return pred_m.double().nan_to_num(nan=min_m).clamp(min_m, max_m)


def _ray_xy(
    K_px: Float64[Tensor, "3 3"], mask: Bool[Tensor, "h w"]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """x and y of the rays (x, y, 1) through the centres of the masked pixels."""
    v, u = (index.double() + 0.5 for index in mask.nonzero(as_tuple=True))
    y = (v - K_px[1, 2]) / K_px[1, 1]
    x = (u - K_px[0, 2] - K_px[0, 1] * y) / K_px[0, 0]
    return x, y


def _fit_plane(
    x: Float64[Tensor, " n"], y: Float64[Tensor, " n"], inverse: Float64[Tensor, " n"]
) -> Float64[Tensor, "3"]:
    """Least-squares m of ``inverse = m . (x, y, 1)``.

    Centring takes the offset out of the problem, which keeps the normal equations of a small,
    off-centre region well conditioned. The pseudo-inverse gives pixels on one line the fit with
    the least slope.
    """
    x_mean, y_mean, inverse_mean = _means(x, y, inverse)
    dx, dy, d = x - x_mean, y - y_mean, inverse - inverse_mean
    xx, xy, yy, xd, yd = _means(dx * dx, dx * dy, dy * dy, dx * d, dy * d)
    normal = torch.stack([xx, xy, xy, yy]).reshape(2, 2)
    # The eigenvalues of a region two pixels thin and L long are 3 / L^2 apart: no image gets to
    # 1e-12, and rounding stays below it.
    slope = torch.linalg.pinv(normal, rtol=1e-12, hermitian=True) @ torch.stack([xd, yd])
    offset = inverse_mean - slope[0] * x_mean - slope[1] * y_mean
    return torch.cat([slope, offset[None]])
