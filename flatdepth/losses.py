"""Training losses, one number per image.

Every loss averages over an image's own pixels and returns shape (B,). The loss of a batch is the
plain mean over its images, so it does not depend on how a batch is split into micro-batches or
over ranks, and an image with few valid pixels counts as much as any other.

``weight`` (B, 1, H, W) is both mask and importance: 0 means "no truth here", and doubling the
weight of a pixel is the same as having the pixel twice. Only ratios within an image matter. What
prediction and truth hold where the weight is 0 (NaN, inf, 0) touches neither loss nor gradient,
and an image without any weight has loss 0 and gradient 0. Pixels with weight must have finite
truth above 0; a prediction that is NaN there makes the loss NaN, which the training loop reports.

Half-precision predictions are widened to float32 and autocast is switched off inside; float64
stays float64 for the sake of tests.
"""

from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

# A truth whose inverse depth deviates from its median by less than this share on average holds no
# shape, only the rounding of its source (float16 depth codes: up to 4.9e-4).
MIN_RELIEF = 1e-3

# A prediction whose mean absolute deviation is below this counts as constant. The floor bounds
# the gradient, which would otherwise grow without limit as a prediction collapses.
MIN_SPREAD = 1e-4


def depth_loss(
    kind: Literal["metric", "relative"],
    pred: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
) -> Float[Tensor, " b"]:
    """The loss that fits what a model predicts.

    Args:
        kind: ``"metric"``: ``pred`` is planar z in metres (``silog_loss``); ``"relative"``:
            inverse depth up to scale and shift (``relative_loss``).
        pred: prediction in the units of ``kind``.
        truth_m: planar z in metres.
        weight: pixel weights, 0 where there is no truth.
    """
    match kind:
        case "metric":
            return silog_loss(pred, truth_m, weight)
        case "relative":
            return relative_loss(pred, truth_m, weight)
        case _:
            assert_never(kind)


def silog_loss(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, "b 1 h w"],
    *,
    lam: float = 0.5,
    min_m: float = 1e-3,
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
        inside, weight = weight > 0, _wide(weight)
        pred = torch.where(inside, _wide(pred_m), 1.0).clamp(min=min_m)
        truth = torch.where(inside, _wide(truth_m), 1.0)
        d, w = (pred.log() - truth.log()).flatten(1), weight.flatten(1)
        mean = _weighted_mean(d, w)
        v = _weighted_mean((d - mean) ** 2, w) + (1.0 - lam) * mean**2
        # sqrt(v + eps^2) - eps without its cancellation
        return (v / ((v + eps**2).sqrt() + eps)).squeeze(1)


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
        inside, w = weight > 0, _wide(weight)
        pred = torch.where(inside, _wide(pred_inv), 0.0)
        truth = torch.where(inside, _wide(truth_m), 1.0).reciprocal()

        pred_centred, pred_spread, _ = _centre(pred, w)
        truth_centred, truth_spread, truth_median = _centre(truth, w)
        has_shape = truth_spread > MIN_RELIEF * truth_median
        w = w * has_shape
        residual = pred_centred / pred_spread.clamp(min=MIN_SPREAD)
        residual = residual - truth_centred / torch.where(has_shape, truth_spread, 1.0)

        data = 0.5 * _trimmed_mean(residual.abs().flatten(1), w.flatten(1), trim)
        steps = [2**k for k in range(scales)]
        edges = [_gradient_mean(residual[..., ::s, ::s], w[..., ::s, ::s]) for s in steps]
        return data + gradient_weight * torch.stack(edges).sum(0)


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
