"""What a picture looks like as a screen print, a painting or a drawing: contents of pastes.

All sizes are shares of the picture's height, and nothing is random.
"""

from collections.abc import Callable
from enum import IntEnum

import torch
import torch.nn.functional as F
from jaxtyping import Float
from kornia.color import rgb_to_grayscale, rgb_to_ycbcr, ycbcr_to_rgb
from torch import Tensor

from flatdepth.augment.filters import blur, copy_to, soft_round

_TONES = 6  # of the screen print, from black to white
_CHROMA_STEPS = 16  # of each chroma axis over its whole range
_PRINT_BLUR = 0.003  # share of the height: what is finer becomes no speck of ink
_BRUSH = 0.008  # radius of the painting's windows, share of the height
_BRUSH_NOISE = 1e-4  # variance of luma below which a window is as good as a flat one
_PENCIL = 0.012  # standard deviation that a line stands out from, share of the height
_SHADING = 0.5  # share of the drawing's darkness that comes from the picture's own tone
_PAPER = (0.97, 0.95, 0.90)
_GRAPHITE = (0.16, 0.16, 0.18)


class Style(IntEnum):
    """How a paste's content is drawn."""

    NONE = 0
    POSTERISE = 1
    SMOOTH = 2
    SKETCH = 3


@torch.no_grad()
def stylise(source: Float[Tensor, "b 3 h w"], style: Style) -> Float[Tensor, "b 3 h w"]:
    """Draw pictures (sRGB 0..1, float32) in a style; ``Style.NONE`` returns them as they are."""
    if style is Style.NONE:
        return source
    with torch.autocast(source.device.type, enabled=False):
        return _STYLES[style](source)


def posterise(source: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """A screen print: 6 tones of luma, and chroma in steps of 1/16, so that grey stays grey."""
    luma, chroma = rgb_to_ycbcr(blur(source, _sigma(_PRINT_BLUR, source))).split((1, 2), dim=1)
    tones = soft_round(luma * (_TONES - 1)) / (_TONES - 1)
    inks = soft_round((chroma - 0.5) * _CHROMA_STEPS) / _CHROMA_STEPS + 0.5
    return ycbcr_to_rgb(torch.cat([tones, inks], dim=1))


def smooth(source: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """A painting: edge-preserving smoothing that leaves patches like strokes of a brush.

    The Kuwahara filter: of the four windows that have the pixel in a corner, the mean of the one
    with the least variance of luma. Instead of that one alone all four count, by variance^-4 above
    a floor, so that the result is continuous (after Papari, Petkov and Campisi, "Artistic edge and
    corner enhancing smoothing", IEEE Transactions on Image Processing, 2007).
    """
    radius = max(1, round(_BRUSH * source.shape[-2]))
    grey = rgb_to_grayscale(source) - 0.5  # centred: little cancels in the variance
    planes = torch.cat([source, grey, grey**2], dim=1)
    planes = F.pad(planes, (radius, radius, radius, radius), mode="replicate")
    means = F.avg_pool2d(F.avg_pool2d(planes, (radius + 1, 1), 1), (1, radius + 1), 1)
    variance = (means[:, 4:] - means[:, 3:4] ** 2).clamp_min(0)
    weight = (1 + variance / _BRUSH_NOISE).square().square().reciprocal()
    weighted = torch.cat([means[:, :3] * weight, weight], dim=1)
    rows = weighted[:, :, :-radius] + weighted[:, :, radius:]
    total = rows[..., :-radius] + rows[..., radius:]
    return (total[:, :3] / total[:, 3:]).clamp(0, 1)


def sketch(source: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """A pencil drawing: the grey, dodged by its blurred negative, and some of its own tone.

    The dodge blend of a picture with a negative n is grey / (1 - n): 1 where the picture is no
    darker than around it, so that lines and textures are left on white paper.
    """
    grey = rgb_to_grayscale(source)
    around = blur(grey, _sigma(_PENCIL, source))
    lines = ((grey + 0.02) / (around + 0.02)).clamp(0, 1)
    tone = lines**3 * (1 - _SHADING + _SHADING * grey.clamp(0, 1).sqrt())
    paper, graphite = (
        copy_to(torch.tensor(rgb, dtype=torch.float64), source)[:, None, None]
        for rgb in (_PAPER, _GRAPHITE)
    )
    return torch.lerp(graphite, paper, tone)


def _sigma(share: float, source: Tensor) -> Tensor:
    return torch.full((len(source),), share * source.shape[-2], dtype=torch.float64)


_STYLES: dict[Style, Callable[[Tensor], Tensor]] = {
    Style.POSTERISE: posterise,
    Style.SMOOTH: smooth,
    Style.SKETCH: sketch,
}
