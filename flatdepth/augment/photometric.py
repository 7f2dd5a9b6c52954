"""Colour changes over whole images, after pasting, with the factors drawn per sample on the CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_gamma,
    adjust_saturation_with_gray_subtraction,
)
from torch import Tensor

from flatdepth.augment.rng import Draws, hash_words, mix32, name_word
from flatdepth.config import PhotometricConfig

COLUMNS = ("brightness", "contrast", "saturation", "gamma", "noise", "noise seed")


def draw_photometric(draws: Sequence[Draws], config: PhotometricConfig) -> Float[Tensor, "b 6"]:
    """Factors per image (columns as in ``COLUMNS``), float64; neutral for unchanged images."""
    rows = np.tile([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], (len(draws), 1))
    for row, own in zip(rows, draws, strict=True):
        if own.uniform("photometric") >= config.share:
            continue
        for column, name in enumerate(COLUMNS[:3]):
            limit = getattr(config, name)
            row[column] = own.uniform(name, 1 - limit, 1 + limit)
        row[3] = np.exp(own.uniform("gamma", -config.gamma, config.gamma))
        row[4] = own.uniform("noise", 0.0, config.noise)
        row[5] = own.integer("noise seed", 2**31)
    return torch.from_numpy(rows)


@torch.no_grad()
def photometric(
    image: Float[Tensor, "b 3 h w"], factors: Float[Tensor, "b 6"]
) -> Float[Tensor, "b 3 h w"]:
    """Apply brightness, contrast, saturation, gamma and noise to sRGB images in 0..1.

    Brightness and contrast scale the values about 0 and about the image's mean, saturation about
    each pixel's grey; the noise is Gaussian, a hash of (seed, channel, pixel), equal on all devices
    up to rounding.
    """
    with torch.autocast(image.device.type, enabled=False):
        scale = factors.to(image.dtype)
        image = adjust_brightness_accumulative(image, scale[:, 0])
        image = adjust_contrast_with_mean_subtraction(image, scale[:, 1])
        image = adjust_saturation_with_gray_subtraction(image, scale[:, 2])
        image = adjust_gamma(image, scale[:, 3])
        noise = _gaussian(factors[:, 5].long(), image)
        return (image + scale[:, 4, None, None, None] * noise).clamp(0, 1)


def _gaussian(seed: Tensor, like: Tensor) -> Tensor:
    """Standard normal numbers of the shape of ``like`` by the Box-Muller transform.

    One 32-bit hash per value, 16 bits for the radius (so at most 4.9) and 16 for the angle.
    """
    batch, channels, height, width = like.shape
    index = mix32(torch.arange(channels * height * width, device=like.device))
    word = mix32(hash_words(seed, name_word("noise"))[:, None] + index)
    radius = (((word >> 16).to(like.dtype) + 0.5) / 65536).log().mul(-2).sqrt()
    angle = ((word & 0xFFFF).to(like.dtype) + 0.5) * (2 * torch.pi / 65536)
    return (radius * angle.cos()).reshape(batch, channels, height, width)
