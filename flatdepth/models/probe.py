"""One forward pass over a rendered room: do weights predict what they are taken for?

A file of the original project does not say whether its model is metric or relative, nor the maximum
depth, and every combination loads. Read wrongly, it predicts a constant: this is how it shows.

The head ends in one logit per pixel. A relative model predicts ``relu(logit)``, inverse depth, so
training drives its logits above 0 wherever there is something at a finite distance. A metric model
predicts ``max_depth_m * sigmoid(logit)``, so its logits are below 0 wherever the depth is less than
half of the maximum: below -1 at a quarter. In a room of a few metres the two have opposite signs:

- relative weights read as metric: positive logits, the sigmoid saturates and nearly every pixel is
  ``max_depth_m`` (published values: logits of 8.8, 24 and 79 for Depth Anything Small, Base and
  Large on one indoor photograph, sigmoid 0.9998 and up; -2.6 for the metric indoor Small; tests and
  converter of Hugging Face transformers);
- metric weights read as relative: negative logits, the ReLU makes nearly every pixel 0.

A wrong ``max_depth_m`` multiplies every depth by the same factor, so only the truth can show it:
the room is rendered, hence its depth is known. A factor of 2.5 is reported and not refused, since a
model may err by as much in a place unlike its training data; the official 20 m and 80 m differ by
a factor of 4.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from flatdepth.config import nearest_multiple
from flatdepth.data.readers.rooms import render_room
from flatdepth.errors import UserError
from flatdepth.models.network import DepthNetwork, Kind

HEIGHT, WIDTH = 252, 336
"""Pixels of the rendered room for multiples of 14; for others the nearest that there are."""

SHARE = 0.99
"""Share of the pixels that must agree before weights are refused."""

SATURATED = 0.7
"""Median share of ``max_depth_m`` from which a metric model is saturated; fresh ones are at 0.5."""

FACTOR = 2.5
"""Ratio of median depths beyond which the maximum depth is doubted."""


def probe_image(multiple: int) -> Float[Tensor, "1 3 h w"]:
    """The room, sRGB in 0..1, its sides multiples of ``multiple``."""
    return _room(multiple)[0].clone()


@torch.no_grad()
def likely_kind(model: DepthNetwork) -> Kind | None:
    """The kind that a model's logits look like, if nearly all have one sign.

    Args:
        model: a relative one, whose prediction is the positive part of the logits.
    """
    share = float((model.eval()(probe_image(model.multiple)) > 0).float().mean())
    if share >= SHARE:
        return "relative"
    return "metric" if share <= 1 - SHARE else None


@torch.no_grad()
def check_weights(
    model: DepthNetwork, tensors: Mapping[str, Tensor], source: str
) -> tuple[str, ...]:
    """Predict the room with ``tensors`` in the place of the model's own, which stay as they are.

    Args:
        tensors: the model's whole state dict, on its device and in its dtypes.
        source: the file's name for messages.

    Returns:
        Doubts about the maximum depth, in words; empty if there are none.

    Raises:
        UserError: the prediction is not finite or is the constant of weights of the other kind.
    """
    image, truth_m = _room(model.multiple)
    own_px = model.canonical_focal_px
    focal_px = None if own_px is None else torch.tensor([own_px])  # the network's own output
    seen = (image.to(model.image_mean.device), focal_px)
    pred = functional_call(model, dict(tensors), seen).cpu()
    if not pred.isfinite().all():
        raise UserError(f"{source} predicts values that are not finite; take another file")
    nearest_m, median_m, farthest_m = (float(q) for q in truth_m.quantile(truth_m.new([0, 0.5, 1])))
    if model.kind == "relative":
        share = float((pred == 0).float().mean())
        if share >= SHARE:
            raise UserError(
                f"{source} predicts 0 at {share:.1%} of the pixels of a rendered room: these are "
                "the weights of a metric model read as relative; set kind to metric and "
                "max_depth_m to what it was trained with (20 for the official indoor files, 80 "
                "for outdoor), or pass head='fresh'"
            )
        return ()
    half, median = model.max_depth_m / 2, float(pred.median())
    share = float((pred > half).float().mean())
    if share >= SHARE and median > SATURATED * model.max_depth_m and farthest_m < half:
        raise UserError(
            f"{source} predicts {median:.1f} of {model.max_depth_m:g} m, its maximum, nearly "
            f"everywhere in a rendered room {nearest_m:.1f} to {farthest_m:.1f} m away: these are "
            "the weights of a relative model read as metric; set kind to relative, or pass "
            "head='fresh'"
        )
    if not 1 / FACTOR < median / median_m < FACTOR:
        return (
            f"it predicts a median of {median:.1f} m in a rendered room of {median_m:.1f} m; check "
            f"that max_depth_m {model.max_depth_m:g} is what the weights were trained with (20 for "
            "the official indoor files, 80 for outdoor)",
        )
    return ()


@cache
def _room(multiple: int) -> tuple[Float[Tensor, "1 3 h w"], Float[Tensor, " n"]]:
    """A room without windows, and the depth of its pixels in metres."""
    height, width = (nearest_multiple(side, multiple) for side in (HEIGHT, WIDTH))
    frame = render_room(0, 1, 0, height, width)
    image = torch.from_numpy(frame.image).movedim(-1, 0)[None].float() / 255
    return image, torch.from_numpy(frame.depth_m[np.isfinite(frame.depth_m)])
