"""The conditions that figures depend on: crop, depth range, alignment and resolution, by name.

Two published numbers compare only if all four agree, so a ``Protocol`` says them in words, to be
printed with every table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.geometry import View
from flatdepth.models.network import Kind

Alignment = Literal["metric", "median", "scale", "scale-shift-depth", "scale-shift-inverse"]
Fit = Literal["least-squares", "robust"]

ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
FITS: tuple[Fit, ...] = get_args(Fit)

_REWEIGHTINGS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Which pixels of a frame are compared, and in which range.

    Attributes:
        name: a key of ``PROTOCOLS``.
        range_m: (near, far) in metres. Truth outside does not count; predictions are brought into
            it.
        frame: (height, width) that every frame must have, because ``crop_px`` is made for it.
        window: (height, width) that is cut from the bottom centre of image and truth before
            anything else.
        crop_px: (top, bottom, left, right) of the pixels that count; bottom and right exclusive.
        crop_share: the same as shares of the height and width, rounded down to pixels.
        source: where the figures come from.
    """

    name: str
    range_m: tuple[float, float]
    frame: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    crop_px: tuple[int, int, int, int] | None = None
    crop_share: tuple[float, float, float, float] | None = None
    source: str

    def view(self, height: int, width: int) -> View:
        """The part of a frame that the protocol looks at, in the frame's own pixels.

        Raises:
            UserError: the protocol is not made for frames of this size.
        """
        if self.frame is not None and (height, width) != self.frame:
            raise UserError(
                f"protocol {self.name}: expected frames of {_size(self.frame)} px, for which its "
                f"crop is made, found {_size((height, width))} px; take another --protocol"
            )
        rows, columns = self.window or (height, width)
        if rows > height or columns > width:
            raise UserError(
                f"protocol {self.name}: expected frames of at least {_size((rows, columns))} px, "
                f"found {_size((height, width))} px; take another --protocol"
            )
        return View(
            top=height - rows,
            left=(width - columns) // 2,
            crop_height=rows,
            crop_width=columns,
            height=rows,
            width=columns,
        )

    def mask(self, height: int, width: int) -> Bool[Tensor, "h w"]:
        """The pixels of a view of this size that count."""
        top, bottom, left, right = self.crop_px or (0, height, 0, width)
        if self.crop_share is not None:
            shares = zip(self.crop_share, (height, height, width, width), strict=True)
            top, bottom, left, right = (int(share * size) for share, size in shares)
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        return inside

    def __str__(self) -> str:
        cut = "" if self.window is None else f"bottom centre {_size(self.window)} px of the frame, "
        crop = "no crop"
        if self.crop_px is not None:
            top, bottom, left, right = self.crop_px
            crop = f"rows {top} to {bottom - 1} and columns {left} to {right - 1} count"
        if self.crop_share is not None:
            top_share, bottom_share, left_share, right_share = self.crop_share
            crop = (
                f"rows {top_share:.2%} to {bottom_share:.2%} and columns {left_share:.2%} to "
                f"{right_share:.2%} count"
            )
        near, far = self.range_m
        return (
            f"protocol {self.name}: {cut}{crop}; true depth of {near:g} to {far:g} m, predictions "
            "brought into that range"
        )


_KITTI_WINDOW = (352, 1216)

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="none",
            range_m=(1e-3, 80.0),
            source="every pixel with known depth",
        ),
        Protocol(
            name="nyu-eigen",
            range_m=(1e-3, 10.0),
            frame=(480, 640),
            crop_px=(45, 471, 41, 601),
            source="Eigen, Puhrsch and Fergus 2014; figures as in BTS and ZoeDepth",
        ),
        Protocol(
            name="kitti-garg",
            range_m=(1e-3, 80.0),
            window=_KITTI_WINDOW,
            crop_share=(0.40810811, 0.99189189, 0.03594771, 0.96405229),
            source="Garg et al. 2016, in the benchmark's window, as ZoeDepth evaluates",
        ),
        Protocol(
            name="kitti-eigen",
            range_m=(1e-3, 80.0),
            window=_KITTI_WINDOW,
            crop_share=(0.3324324, 0.91351351, 0.0359477, 0.96405229),
            source="Eigen, Puhrsch and Fergus 2014, in the benchmark's window",
        ),
        Protocol(
            name="hypersim",
            range_m=(1e-3, 20.0),
            source="range of Depth Anything V2's indoor metric models; no official table exists",
        ),
        Protocol(
            name="vkitti2",
            range_m=(1e-3, 80.0),
            source="range of Depth Anything V2's outdoor metric models; ZoeDepth crops as KITTI",
        ),
    )
}


def describe_alignment(alignment: Alignment, fit: Fit) -> str:
    """An alignment in words."""
    how = "least squares" if fit == "least-squares" else "least absolute deviations"
    return {
        "metric": "no alignment (metric)",
        "median": "scaled by the ratio of medians",
        "scale": f"scale in depth by {how}",
        "scale-shift-depth": f"scale and shift in depth by {how}",
        "scale-shift-inverse": f"scale and shift in inverse depth by {how}",
    }[alignment]


def own_alignment(kind: Kind) -> Alignment:
    """What a prediction of a kind needs to be depth in metres."""
    alignments: dict[Kind, Alignment] = {
        "metric": "metric",
        "relative": "scale-shift-inverse",
        "affine": "scale-shift-depth",
    }
    return alignments[kind]


def align(
    prediction: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    kind: Kind,
    alignment: Alignment,
    fit: Fit = "least-squares",
    range_m: tuple[float, float],
) -> Float[Tensor, "b 1 h w"]:
    """Depth in metres from a prediction, with what the alignment may take from the truth.

    Each image is fitted on its own over the masked pixels whose prediction is finite; what
    prediction and truth hold elsewhere never enters.

    - ``metric``: nothing is taken.
    - ``median``: times median(truth) / median(prediction) (Zhou et al. 2017).
    - ``scale``: times s, least ``sum (s p - t)^2``; robust: least ``sum |s p - t|``, which is the
      median of t / p with weights p.
    - ``scale-shift-depth``: ``s p + c`` fitted to t, p as it is from an affine model.
    - ``scale-shift-inverse``: ``s / p + c`` (``s q + c`` for a relative model's q) fitted to 1 / t
      (Ranftl et al. 2020, MiDaS, equation 4).

    The robust fits minimise absolute deviations, which a minority of wild pixels cannot move; those
    with a shift do so by iteratively reweighted least squares (Schlossmacher 1973).

    Args:
        prediction: as models of the kind give it.
        truth_m: true planar z in metres.
        mask: the pixels to fit on.
        kind: what the prediction is.
        range_m: (near, far) in metres that depth predictions are brought into before a fit.

    Raises:
        ValueError: a prediction that is only known up to scale and shift with any other alignment
            than one that fits both in its own quantity (``own_alignment``).
    """
    if kind != "metric" and alignment != own_alignment(kind):
        raise ValueError(f"a prediction of kind {kind} cannot be aligned by {alignment}")
    if alignment == "metric":
        return prediction
    near, far = range_m
    mask = mask & prediction.isfinite()
    if alignment == "scale-shift-inverse":
        inverse = prediction
        if kind == "metric":
            inverse = prediction.double().clamp(near, far).reciprocal()
        return align_inverse_depth(inverse, truth_m, mask, range_m, fit)
    pred_m = prediction.double()
    if kind == "metric":
        pred_m = pred_m.clamp(near, far)
    if alignment == "scale-shift-depth":
        scale, mean_x, mean_y = fit_line(pred_m, truth_m.double(), mask, fit)
        return (scale * (pred_m - mean_x) + mean_y).to(prediction.dtype)
    scales = [
        _scale(p[inside], t[inside].double(), alignment, fit)
        for p, t, inside in zip(pred_m, truth_m, mask, strict=True)
    ]
    return (torch.stack(scales)[:, None, None, None] * pred_m).to(prediction.dtype)


def align_inverse_depth(
    inverse: Float[Tensor, "b 1 h w"],
    truth_m: Float[Tensor, "b 1 h w"],
    valid: Bool[Tensor, "b 1 h w"],
    depth_range_m: tuple[float, float],
    fit: Fit = "least-squares",
) -> Float[Tensor, "b 1 h w"]:
    """Metric depth from inverse depth, by the scale and shift that fit 1/truth best.

    Over the valid pixels of each image whose prediction is finite, in float64. An aligned inverse
    depth below 1/far becomes far.
    """
    valid = valid & inverse.isfinite()
    truth = torch.where(valid, 1 / truth_m.double(), 0.0)
    scale, mean_x, mean_y = fit_line(inverse.double(), truth, valid, fit)
    aligned = scale * (inverse.double() - mean_x) + mean_y
    near, far = depth_range_m
    return aligned.clamp(1 / far, 1 / near).reciprocal().float()


def fit_line(
    x: Float64[Tensor, "b 1 h w"],
    y: Float64[Tensor, "b 1 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    fit: Fit,
) -> tuple[Float64[Tensor, "b 1 1 1"], Float64[Tensor, "b 1 1 1"], Float64[Tensor, "b 1 1 1"]]:
    """``y = scale * (x - mean_x) + mean_y`` over the masked pixels of each image."""
    weight = mask.double().flatten(1)
    x, y = (torch.where(mask, value, 0.0).flatten(1) for value in (x, y))
    line = _weighted_line(x, y, weight)
    if fit == "robust":
        # Where the residual vanishes so would the bound on the weight.
        least = 1e-9 * y.abs().amax(1, keepdim=True).clamp_min(1e-12)
        for _ in range(_REWEIGHTINGS):
            scale, mean_x, mean_y = line
            residual = (scale * (x - mean_x) + mean_y - y).abs().maximum(least)
            inverse = weight / residual
            line = _weighted_line(x, y, inverse / inverse.amax(1, keepdim=True).clamp_min(1e-300))
    scale, mean_x, mean_y = (value[..., None, None] for value in line)
    return scale, mean_x, mean_y


def _weighted_line(
    x: Float64[Tensor, "b n"], y: Float64[Tensor, "b n"], weight: Float64[Tensor, "b n"]
) -> tuple[Float64[Tensor, "b 1"], Float64[Tensor, "b 1"], Float64[Tensor, "b 1"]]:
    """(scale, mean_x, mean_y) of the least-squares line; weights sum to 1 or more, or to 0."""
    count = weight.sum(1).clamp_min(1)
    mean_x = ((weight * x).sum(1) / count)[:, None]
    mean_y = ((weight * y).sum(1) / count)[:, None]
    centred = weight * (x - mean_x)
    variance = (centred * (x - mean_x)).sum(1).clamp_min(1e-12)
    scale = ((centred * (y - mean_y)).sum(1) / variance)[:, None]
    return scale, mean_x, mean_y


def _scale(
    p: Float64[Tensor, " n"], t: Float64[Tensor, " n"], alignment: Alignment, fit: Fit
) -> Float64[Tensor, ""]:
    """The factor of one image; 1 where there is nothing to fit on."""
    if len(p) == 0:
        return torch.ones((), dtype=torch.float64, device=p.device)
    if alignment == "median":
        return _median(t) / _median(p)
    if fit == "least-squares":
        return (p * t).sum() / (p * p).sum()
    ratio, order = (t / p).sort(stable=True)
    below = p[order].cumsum(0)
    return ratio[torch.searchsorted(below, 0.5 * below[-1])]


def _median(x: Float64[Tensor, " n"]) -> Float64[Tensor, ""]:
    """The middle value, or the mean of the two middle ones."""
    ordered = x.sort().values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
