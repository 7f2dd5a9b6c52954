"""Predictions and truth as arrays: other quantities, other sizes, a fitted line, errors.

Maps are (h, w) float arrays; a prediction is in the quantity of its system's kind
(``flatdepth.models.network``).
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float

from flatdepth.models.network import Kind

Map = Float[np.ndarray, "_ _"]
LEAST = 1e-6


def inverse_depth(prediction: Map, kind: Kind) -> Map:
    """Inverse depth, in 1/m or up to scale and shift; affine depth, which has none, as it is."""
    return 1 / np.maximum(prediction, LEAST) if kind == "metric" else prediction


def bilinear(values: Map, height: int, width: int) -> Map:
    """At another size, pixel centres at integers + 0.5, without a filter (OpenCV's default)."""
    if values.shape == (height, width):
        return values
    batch = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    return F.interpolate(batch, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """At another size, each pixel from source index ``floor(i * old / new)``, as OpenCV's."""
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    return values[rows[:, None], columns]


def fit_line(x: Map, y: Map, mask: Bool[np.ndarray, "_ _"]) -> Map:
    """``scale * x + shift`` with the least sum of squares to y over the mask; mean(y) if x is flat.

    Source: Ranftl et al. 2020 (MiDaS), equation 4.
    """
    inside, target = x[mask].astype(np.float64), y[mask].astype(np.float64)
    centred = inside - inside.mean()
    variance = (centred**2).sum()
    scale = (centred * target).sum() / variance if variance > 0 else 0.0
    return scale * (x.astype(np.float64) - inside.mean()) + target.mean()


def depth_errors(
    p: Float[np.ndarray, " n"], t: Float[np.ndarray, " n"], ratios: Mapping[str, float]
) -> dict[str, float]:
    """abs_rel, rmse and mae (in the maps' unit), and the share in % of ``max(p/t, t/p) < ratio``.

    Args:
        p, t: predicted and true depth above 0 of one or more pixels.
        ratios: name -> ratio.
    """
    error, ratio = np.abs(p - t), np.maximum(p / t, t / p)
    return {
        "abs_rel": float((error / t).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "mae": float(error.mean()),
        **{name: 100 * float((ratio < limit).mean()) for name, limit in ratios.items()},
    }
