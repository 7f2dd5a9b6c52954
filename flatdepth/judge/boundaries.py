"""How well the edges of a depth map lie where those of the truth are.

Two figures with a definition that leaves nothing open: Depth Pro's boundary F1, and the soft edge
error of SMD-Nets. The depth boundary errors of iBims-1 are not here: they hang on the thresholds
of an edge detector that runs on maps stretched to 0..1 each by its own extremes.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

THRESHOLDS = torch.linspace(1.05, 1.25, 10, dtype=torch.float64)
"""Ratios of the inverse depth of neighbours from which Depth Pro calls it an edge."""

DENSE = 0.75
"""Least share of known neighbours in a truth whose edges can be told from its holes."""


def boundary_f1(
    pred_m: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    min_m: float,
    max_m: float,
) -> tuple[Float64[Tensor, " b"], Int64[Tensor, " b"]]:
    """The scale-invariant boundary F1 of Depth Pro (Bochkovskii et al. 2024, section 3.3).

    With inverse depth q, an edge of threshold t towards the right is a pair of neighbours with
    ``q(right) / q(left) > t``, and so on for left, down and up. Precision is the mean over the
    four directions of ``|P and T| / max(|P|, 1)`` (P predicted, T true edges), recall that of
    ``|P and T| / max(|T|, 1)``, F1 their harmonic mean (0 if both are 0); the score is the mean of
    F1 over ``THRESHOLDS``, weighted by them. Pixels match exactly, there is no tolerance.

    Their code knows no missing depth; here pairs count only if both ends do. A direction or
    threshold without a true edge costs a perfect prediction its share of the score.

    Args:
        pred_m: predicted planar z in metres, brought into the range as in ``image_metrics``.
        truth_m: true planar z in metres.
        mask: the pixels that count.
        min_m, max_m: range in metres that predictions are brought into.

    Returns:
        (score, pairs): 0..1, and the number of neighbours that both count. That is 0 where a score
        says nothing: less than ``DENSE`` of the neighbours of what counts count too (lidar), or
        the truth has no edge.
    """
    scores, pairs = zip(
        *(_one(*maps, min_m, max_m) for maps in zip(pred_m, truth_m, mask, strict=True)),
        strict=True,
    )
    return torch.stack(scores), torch.stack(pairs)


def _one(
    pred_m: Float[Tensor, "1 h w"],
    truth_m: Float[Tensor, "1 h w"],
    mask: Bool[Tensor, "1 h w"],
    min_m: float,
    max_m: float,
) -> tuple[Float64[Tensor, ""], Int64[Tensor, ""]]:
    thresholds = THRESHOLDS.to(pred_m.device)
    p = pred_m.double().nan_to_num(nan=min_m).clamp(min_m, max_m).reciprocal()
    t = truth_m.double().reciprocal()
    pairs = touched = torch.zeros((), dtype=torch.int64, device=pred_m.device)
    found: list[Tensor] = []
    sides = (
        (np.s_[..., :, :-1], np.s_[..., :, 1:]),
        (np.s_[..., :-1, :], np.s_[..., 1:, :]),
    )
    for a, b in sides:
        both = mask[a] & mask[b]
        pairs, touched = pairs + both.sum(), touched + (mask[a] | mask[b]).sum()
        p_a, p_b, t_a, t_b = (x[side][both] for x in (p, t) for side in (a, b))
        for ratio_p, ratio_t in ((p_a / p_b, t_a / t_b), (p_b / p_a, t_b / t_a)):
            sets = (ratio_p, ratio_t, torch.minimum(ratio_p, ratio_t))
            found.append(torch.stack([_above(ratio, thresholds) for ratio in sets]))
    predicted, true, hit = torch.stack(found, dim=1).double()
    precision = (hit / predicted.clamp_min(1)).mean(0)
    recall = (hit / true.clamp_min(1)).mean(0)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-300)
    says_something = (pairs >= DENSE * touched) & (true[:, 0].sum() > 0)
    return (thresholds * f1).sum() / thresholds.sum(), torch.where(says_something, pairs, 0)


def _above(ratio: Float64[Tensor, " n"], thresholds: Float64[Tensor, " k"]) -> Int64[Tensor, " k"]:
    edges = ratio[ratio > thresholds[0]]  # few, so the rest is compared once
    return (edges[:, None] > thresholds).sum(0)


def soft_edge_error(
    pred: Float[np.ndarray, "h w"],
    truth: Float[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    step: float = 1.0,
) -> float:
    """The soft edge error of SMD-Nets (Tosi et al. 2021): forgiving of where an edge is by a pixel.

    The mean over the edge pixels of the least ``|truth' - pred|``, truth' being the true value at
    the pixel or one of its eight neighbours. An edge pixel differs from one of its four neighbours
    by more than ``step`` in the truth. Pixels without truth make no edge and are nobody's
    neighbours (theirs hold 0 and do).

    Args:
        pred, truth: disparity in pixels, or any other quantity that both have.
        valid: where the truth is known.
        step: in the same unit.

    Returns:
        In the same unit; NaN if there is no edge.
    """
    known = np.pad(np.where(valid, truth, np.nan).astype(np.float64), 1, constant_values=np.nan)
    height, width = truth.shape
    shifted = {
        (dv, du): known[1 + dv : 1 + dv + height, 1 + du : 1 + du + width]
        for dv in (-1, 0, 1)
        for du in (-1, 0, 1)
    }
    sides = [shifted[at] for at in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    edge = np.any([np.abs(side - shifted[0, 0]) > step for side in sides], axis=0)
    if not edge.any():
        return float("nan")
    errors = np.stack([np.abs(one[edge] - pred[edge]) for one in shifted.values()])
    return float(np.nanmin(errors, axis=0).mean())
