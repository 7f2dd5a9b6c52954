"""Training losses, one number per image.

Every loss averages over an image's own pixels and returns shape (B,). The loss of an optimiser step
is the mean over those of its images that have any weight, over all micro-batches and ranks
together, so it does not depend on how the step is split, an image with few valid pixels counts as
much as any other, and one without any does not dilute the rest. The training loop takes this mean,
because only it sees the whole step.

``weight`` (B, 1, H, W) is both mask and importance: 0 means "no truth here", and doubling the
weight of a pixel is the same as having the pixel twice. Only ratios within an image matter. What
prediction and truth hold where the weight is 0 (NaN, inf, 0) touches neither loss nor gradient,
and an image without any weight has loss 0 and gradient 0. Pixels with weight must have finite
truth above 0; a prediction that is NaN there makes the loss NaN, which the training loop reports.

Half-precision predictions are widened to float32 and autocast is switched off inside; float64
stays float64 for the sake of tests.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flatdepth.config import LOSSES as COMPARES
from flatdepth.config import LossConfig
from flatdepth.models.network import Kind, Supervision

# A truth whose inverse depth deviates from its median by less than this share on average holds no
# shape, only the rounding of its source (float16 depth codes: up to 4.9e-4).
MIN_RELIEF = 1e-3

# A prediction whose mean absolute deviation is below this counts as constant. The floor bounds
# the gradient, which would otherwise grow without limit as a prediction collapses.
MIN_SPREAD = 1e-4


# Two depths within a ratio of 1 plus this are equal for the ranking loss (the tolerance of Xian et
# al. 2020, "Structure-Guided Ranking Loss").
EQUAL_RATIO = 0.03

# Smallest depth in metres that a prediction may stand for; smaller ones count as this.
MIN_M = 1e-3


def own_arguments(
    config: LossConfig,
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    seeds: Sequence[int],
) -> tuple[Supervision, ...]:
    """What the network is called with after image and focal length, for ``depth_loss``.

    Nothing, unless the configured loss is the network's own, which makes it within its forward
    pass: whatever wraps the network has to see the call.

    Args:
        seeds: per image, of what the loss draws.
    """
    if not config.is_own:
        return ()
    return (Supervision(truth_m, weight, tuple(seeds)),)


def depth_loss(
    kind: Kind,
    pred: Float[Tensor, "b 1 h w"] | Float[Tensor, " b"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    config: LossConfig | None = None,
) -> Float[Tensor, " b"]:
    """The configured sum of losses; ``silog_loss`` or ``relative_loss`` if none is configured.

    Args:
        kind: what the model predicts. The affine-invariant losses compare inverse depth, for which
            they take the inverse of a metric prediction; only of an ``affine`` model, which cannot
            be inverted, they compare depth itself. The losses in log depth need a metric one
            (``TrainConfig`` sees to it).
        pred: prediction in the units of ``kind``; the losses themselves where they are the
            network's own.
        truth_m: planar z in metres.
        weight: pixel weights, 0 where there is no truth.
        config: the terms and their factors; the defaults if None.
    """
    config = config or LossConfig()
    if config.is_own:
        (factor,) = config.terms.values()
        return factor * pred
    terms = config.terms or {"silog" if kind == "metric" else "affine": 1.0}
    total = torch.zeros(len(pred), dtype=_wide(pred).dtype, device=pred.device)
    for name, factor in terms.items():
        value, target = pred, truth_m
        if COMPARES[name] == "shape" and kind == "metric":
            value = _inverse(pred, weight)
        elif kind == "affine":
            # Depth is to its inverse what inverse depth is to depth.
            target = _inverse(truth_m, weight)
        total = total + factor * LOSSES[name](value, target, weight, config)
    return total


def silog_loss(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    *,
    lam: float = 0.5,
    min_m: float = MIN_M,
    eps: float = 1e-3,
) -> Float[Tensor, " b"]:
    """Scale-invariant logarithmic loss.

    With ``d = log pred - log truth`` and the weighted mean E over an image,

        v = E[d^2] - lam * E[d]^2 = Var[d] + (1 - lam) * E[d]^2        (the form computed)
        loss = sqrt(v + eps^2) - eps

    (Eigen, Puhrsch and Fergus 2014, equation 4, under the root of Lee et al. 2019, BTS, without
    BTS's factor of 10; ``lam`` 0.5 as in Depth Anything V2). The slope of ``sqrt(v)`` is infinite
    at a perfect fit; with ``eps`` it is at most ``1 / (2 eps)``. The price is a loss that is too
    low by less than ``eps``, and exact at 0.

    Args:
        pred_m: predicted planar z in metres. Values below ``min_m`` count as ``min_m`` and get no
            gradient.
        truth_m: true planar z in metres.
        weight: pixel weights, 0 where there is no truth.
        lam: 0 for the plain RMS of log errors, 1 to ignore a global scale altogether.
        min_m: smallest depth in metres that a prediction may stand for.
        eps: smoothing of the root, in log depth; 1e-3 is an error of 0.1 %.
    """
    with torch.autocast(pred_m.device.type, enabled=False):
        d, w = _log_error(pred_m, truth_m, weight, min_m)
        mean = _weighted_mean(d, w)
        v = _weighted_mean((d - mean) ** 2, w) + (1.0 - lam) * mean**2
        # sqrt(v + eps^2) - eps without its cancellation
        return (v / ((v + eps**2).sqrt() + eps)).squeeze(1)


def l1_log_loss(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    *,
    min_m: float = MIN_M,
) -> Float[Tensor, " b"]:
    """``E[|log pred - log truth|]``; 0.01 is an error of 1 %. Arguments as of ``silog_loss``."""
    with torch.autocast(pred_m.device.type, enabled=False):
        d, w = _log_error(pred_m, truth_m, weight, min_m)
        return _weighted_mean(d.abs(), w).squeeze(1)


def l2_log_loss(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    *,
    min_m: float = MIN_M,
) -> Float[Tensor, " b"]:
    """``E[(log pred - log truth)^2]``, without a root. Arguments as of ``silog_loss``."""
    with torch.autocast(pred_m.device.type, enabled=False):
        d, w = _log_error(pred_m, truth_m, weight, min_m)
        return _weighted_mean(d**2, w).squeeze(1)


def relative_loss(
    pred_inv: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    *,
    trim: float = 0.2,
    scales: int = 4,
    gradient_weight: float = 2.0,
) -> Float[Tensor, " b"]:
    """Affine-invariant loss on inverse depth: trimmed L1 plus multi-scale gradient matching.

    Prediction and true inverse depth are each brought to median 0 and mean absolute deviation 1
    over the image, so a positive affine transform of the prediction changes nothing. With R the
    difference of the two:

        loss = 1/2 * E[|R|, the largest ``trim`` counted as 0]
             + gradient_weight * sum over k of E_k[|dR/dx| + |dR/dy|]

    (Ranftl et al. 2020, MiDaS, section 5: alignment, trimmed loss with the factor 1/2, gradient
    term with 4 scales). E_k averages over the image thinned to every 2^k-th row and column, so
    every scale has the same say. A difference between two pixels has the smaller of their
    weights. The ratio of 1:2 between the terms is that of Depth Anything V2 (Yang et al. 2024).

    An image whose truth has less relief than ``MIN_RELIEF`` (a bare wall seen straight on) has no
    shape to compare with: loss 0, gradient 0. A prediction with less spread than ``MIN_SPREAD``
    is scaled by that floor, where the invariance to scale ends.

    Args:
        pred_inv: predicted inverse depth, any scale and shift.
        truth_m: true planar z in metres.
        weight: pixel weights, 0 where there is no truth.
        trim: share of an image's weight whose largest residuals are dropped.
        scales: number of scales of the gradient term.
        gradient_weight: factor of the gradient term.
    """
    with torch.autocast(pred_inv.device.type, enabled=False):
        pred, truth, w = _align(pred_inv, truth_m, weight)
        residual = pred - truth
        data = 0.5 * _trimmed_mean(residual.abs().flatten(1), w.flatten(1), trim)
        steps = [2**k for k in range(scales)]
        edges = [_gradient_mean(residual[..., ::s, ::s], w[..., ::s, ::s]) for s in steps]
        return data + gradient_weight * torch.stack(edges).sum(0)


def ranking_loss(
    pred_inv: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
) -> Float[Tensor, " b"]:
    """Ordinal loss on pairs of pixels: which one is nearer, or neither.

    With R the difference of a pair's predictions, brought to median 0 and mean absolute deviation
    1 over the image as in ``relative_loss``,

        log(1 + exp(-R))   the first pixel is nearer (its inverse depth is larger)
        log(1 + exp(R))    the second one is
        R^2                their true depths are within a ratio of 1 + ``EQUAL_RATIO``

    (Chen et al. 2016, "Single-Image Depth Perception in the Wild", equation 2), averaged over the
    pairs; a pair has the smaller of its two weights. Every pixel is paired with its partners at
    the offsets of ``_pair_offsets``, wrapping around, so no random numbers are needed and every
    pixel gets a gradient. The minimum is not 0: the logarithms only approach it.

    Args:
        pred_inv: predicted inverse depth, any scale and shift.
        truth_m: true planar z in metres.
        weight: pixel weights, 0 where there is no truth.
    """
    with torch.autocast(pred_inv.device.type, enabled=False):
        inside, w = weight > 0, _wide(weight)
        pred = torch.where(inside, _wide(pred_inv), 0.0)
        log_truth = torch.where(inside, _wide(truth_m), 1.0).log()
        centred, spread, _ = _centre(pred, w)
        pred = centred / spread.clamp(min=MIN_SPREAD)
        amount = total = torch.zeros(len(pred), dtype=pred.dtype, device=pred.device)
        for offset in _pair_offsets(pred.shape[-2], pred.shape[-1]):
            partner, log_partner, w_partner = (
                x.roll(offset, dims=(-2, -1)) for x in (pred, log_truth, w)
            )
            nearer = log_partner - log_truth
            equal = nearer.abs() <= math.log1p(EQUAL_RATIO)
            r = pred - partner
            value = torch.where(equal, r**2, F.softplus(-nearer.sign() * r))
            w_pair = torch.minimum(w, w_partner)
            amount = amount + (w_pair * value).sum((1, 2, 3))
            total = total + w_pair.sum((1, 2, 3))
        return _ratio(amount, total)


def _pair_offsets(height: int, width: int) -> list[tuple[int, int]]:
    """(rows, columns) to partners near and far: 1/16, 1/8, 1/4 and 1/2 of the sides, diagonals."""
    offsets = []
    for part in (16, 8, 4, 2):
        down, right = height // part, width // part
        offsets += [(down, 0), (0, right), (down, right), (down, -right)]
    return [offset for offset in dict.fromkeys(offsets) if offset != (0, 0)]


def _inverse(
    depth_m: Float[Tensor, "b 1 h w"], weight: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, "b 1 h w"]:
    """Inverse depth where there is weight, 1 elsewhere."""
    return torch.where(weight > 0, _wide(depth_m), 1.0).clamp(min=MIN_M).reciprocal()


def _log_error(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    min_m: float,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """(log pred - log truth, 0 where there is no weight; weight)."""
    inside = weight > 0
    pred = torch.where(inside, _wide(pred_m), 1.0).clamp(min=min_m)
    truth = torch.where(inside, _wide(truth_m), 1.0)
    return (pred.log() - truth.log()).flatten(1), _wide(weight).flatten(1)


def _align(
    pred_inv: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"]]:
    """Predicted and true inverse depth at median 0 and spread 1; weight, 0 without relief."""
    inside, w = weight > 0, _wide(weight)
    pred = torch.where(inside, _wide(pred_inv), 0.0)
    truth = torch.where(inside, _wide(truth_m), 1.0).reciprocal()
    pred_centred, pred_spread, _ = _centre(pred, w)
    truth_centred, truth_spread, truth_median = _centre(truth, w)
    has_shape = truth_spread > MIN_RELIEF * truth_median
    aligned = truth_centred / torch.where(has_shape, truth_spread, 1.0)
    return pred_centred / pred_spread.clamp(min=MIN_SPREAD), aligned, w * has_shape


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _ratio(amount: Float[Tensor, " b"], total: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``amount / total``, 0 for an image without weight."""
    return amount / torch.where(total > 0, total, 1.0)


def _weighted_mean(x: Float[Tensor, "b n"], w: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    return _ratio((w * x).sum(1), w.sum(1)).unsqueeze(1)


def _weighted_median(x: Float[Tensor, "b n"], w: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    """The smallest value with at least half of the weight at or below it.

    By sorting, because ``torch.median`` has no weights and no deterministic form on CUDA.
    """
    values, order = x.sort(dim=1, stable=True)
    below = w.gather(1, order).cumsum(1)
    half = 0.5 * below[:, -1:]
    return values.gather(1, torch.searchsorted(below, half))


def _centre(
    x: Float[Tensor, "b 1 h w"], w: Float[Tensor, "b 1 h w"]
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """(x minus its median, its mean absolute deviation from it, the median)."""
    median = _weighted_median(x.flatten(1), w.flatten(1))[:, :, None, None]
    centred = x - median
    spread = _weighted_mean(centred.abs().flatten(1), w.flatten(1))[:, :, None, None]
    return centred, spread, median


def _trimmed_mean(
    size: Float[Tensor, "b n"], w: Float[Tensor, "b n"], trim: float
) -> Float[Tensor, " b"]:
    """Weighted mean of ``size`` with the largest ``trim`` of the weight counted as 0.

    The pixel on the border is dropped in part, which keeps the loss continuous in the weights.
    """
    size, order = size.sort(dim=1, stable=True)
    w = w.gather(1, order)
    total = w.cumsum(1)
    kept = ((1.0 - trim) * total[:, -1:] - (total - w)).clamp(min=0.0).minimum(w)
    return _ratio((kept * size).sum(1), total[:, -1])


def _gradient_mean(r: Float[Tensor, "b 1 h w"], w: Float[Tensor, "b 1 h w"]) -> Float[Tensor, " b"]:
    """Weighted mean of ``|dr/dx| + |dr/dy|`` between neighbours that both have weight."""
    dx = (r[..., 1:] - r[..., :-1]).abs() * torch.minimum(w[..., 1:], w[..., :-1])
    dy = (r[..., 1:, :] - r[..., :-1, :]).abs() * torch.minimum(w[..., 1:, :], w[..., :-1, :])
    return _ratio(dx.sum((1, 2, 3)) + dy.sum((1, 2, 3)), w.sum((1, 2, 3)))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, LossConfig], Tensor]] = {
    "silog": lambda pred_m, truth_m, weight, config: silog_loss(
        pred_m, truth_m, weight, lam=config.silog_lambda
    ),
    "l1_log": lambda pred_m, truth_m, weight, _: l1_log_loss(pred_m, truth_m, weight),
    "l2_log": lambda pred_m, truth_m, weight, _: l2_log_loss(pred_m, truth_m, weight),
    "affine": lambda pred_inv, truth_m, weight, config: relative_loss(
        pred_inv,
        truth_m,
        weight,
        trim=config.trim,
        scales=config.gradient_scales,
        gradient_weight=config.gradient_weight,
    ),
    "ranking": lambda pred_inv, truth_m, weight, _: ranking_loss(pred_inv, truth_m, weight),
}
"""Name in ``loss.terms`` -> (prediction, truth_m, weight, settings) -> (B,). The prediction is in
metres or an inverse depth, as ``flatdepth.config.LOSSES`` says."""
