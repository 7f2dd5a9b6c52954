"""Depth of a video without flicker: predictions brought onto one another where nothing moves.

A network sees each frame anew, so the scale of what it predicts, and its shift if it is not metric,
jump a little from frame to frame even if the camera stands.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from flatdepth.judge.protocol import fit_line
from flatdepth.models.network import Kind

FORGET_S = 1.0
"""Time constant in seconds in which the steady field follows the mean of the predicted ones."""

_CELLS = 64  # along the longer side, at most
_STILL_CODES = 4  # of 255
_LEAST_STILL = 0.05  # of all cells
_LEAST_CORRELATION = 0.5


@dataclass(frozen=True, slots=True)
class Gauge:
    """A field is multiplied by ``scale``, then ``shift`` is added."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, field: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
        return np.float32(self.scale) * field + np.float32(self.shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Before:
    time_s: float
    colours: UInt8[np.ndarray, "h w 3"]
    raw: Float32[np.ndarray, "h w"]
    steady: Float32[np.ndarray, "h w"]


class Steadier:
    """Finds for each frame the gauge in which its field follows the frames before it.

    Fields are compared on means over cells, 64 along the longer side, where no channel of the
    image changed by more than 4 of 255 codes since the frame before (``still``). A metric field
    only gets a scale, so that planes stay planes, the exponential of the median of the difference
    of logarithms; the others get scale and shift, by least absolute deviations as in
    ``judge.protocol``, once each way: the scale is the geometric mean of the slope of y on x and
    the inverse slope of x on y, for the slope of one alone is too small where both have noise, and
    a chain of such fits would flatten the depth. Where less than 5 % of the cells are still, and
    where the fields have nothing in common, the last gauge stays.

    From then on the steady field is ``k (scale x field + shift) + (1 - k) field`` with
    ``k = exp(-dt / FORGET_S)``. In a scene that stands still its gauge is thereby the exponential
    mean of those of the predicted fields: one that jumps by D moves it by (1 - k) D, and its mean
    over time is theirs. Nothing that is wrong outlives a few seconds; and what really changes in
    regions of one colour, before a camera that walks, is followed with that delay.
    """

    def __init__(self, kind: Kind, depth: Callable[[np.ndarray], np.ndarray]) -> None:
        """For fields of a kind; flicker is measured of ``depth``, see ``ColourScale.depth``."""
        self._kind, self._depth = kind, depth
        self._gauge = Gauge()
        self._before: _Before | None = None
        self._changes: list[tuple[float, float]] = []

    def step(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        field: Float32[np.ndarray, "h w"],
        time_s: float,
    ) -> Gauge:
        """The gauge of the next frame, whose time is in seconds."""
        height, width = field.shape
        shrink = max(1.0, max(height, width) / _CELLS)
        cells = (max(1, round(width / shrink)), max(1, round(height / shrink)))
        colours, raw = (
            np.asarray(Image.fromarray(pixels).resize(cells, Image.Resampling.BOX))
            for pixels in (image, field)
        )
        before, still = self._before, np.zeros(raw.shape, bool)
        if before is not None:
            change = np.abs(colours.astype(np.int16) - before.colours).max(axis=-1)
            still = change <= _STILL_CODES
            usable = still.mean() >= _LEAST_STILL
            fitted = self._fit(raw[still], before.steady[still]) if usable else self._gauge
            kept = math.exp(-(time_s - before.time_s) / FORGET_S)
            self._gauge = Gauge(1 + kept * (fitted.scale - 1), kept * fitted.shift)
        steady = self._gauge(raw)
        if before is not None and still.any():
            pairs = ((before.raw, raw), (before.steady, steady))
            self._changes.append((self._change(*pairs[0], still), self._change(*pairs[1], still)))
        self._before = _Before(time_s=time_s, colours=colours, raw=raw, steady=steady)
        return self._gauge

    @property
    def flicker(self) -> tuple[float, float]:
        """As predicted and steadied: the mean over pairs of consecutive frames of the median over
        still cells of ``|ln d_t - ln d_{t-1}|``; NaN if no cell ever was still.
        """
        if not self._changes:
            return math.nan, math.nan
        raw, steady = np.mean(self._changes, axis=0)
        return float(raw), float(steady)

    def _fit(self, x: Float32[np.ndarray, " n"], y: Float32[np.ndarray, " n"]) -> Gauge:
        if self._kind == "metric":
            return Gauge(math.exp(float(np.median(np.log(y) - np.log(x)))))
        both = torch.from_numpy(np.stack([x, y]).astype(np.float64))[:, None, None]
        every = torch.ones_like(both, dtype=torch.bool)
        onto, back = fit_line(both, both.flip(0), every, "robust")[0].flatten().tolist()
        if min(onto, back) <= 0 or onto * back < _LEAST_CORRELATION**2:
            return self._gauge
        scale = math.sqrt(onto / back)
        return Gauge(scale, float(np.median(y - scale * x)))

    def _change(
        self,
        before: Float32[np.ndarray, "h w"],
        after: Float32[np.ndarray, "h w"],
        still: Bool[np.ndarray, "h w"],
    ) -> float:
        first, second = (self._depth(cells)[still].astype(np.float64) for cells in (before, after))
        known = np.isfinite(first) & np.isfinite(second) & (first > 0) & (second > 0)
        changes = np.abs(np.log(second[known]) - np.log(first[known]))
        return float(np.median(changes)) if len(changes) else 0.0
