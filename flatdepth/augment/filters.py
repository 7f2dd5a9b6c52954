"""Operations on pixels that the photometric stage and the stylised contents share.

Kornia has them too; docs/design.md says why these are ours. An image comes out the same alone and
in a batch: weighted slices and channels instead of convolutions and matrix products, whose order of
summation may change with the shape and which some devices run in less than float32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JFIF


def blur(
    image: Float[Tensor, "b c h w"], sigma_px: Float64[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """Convolve with each image's Gaussian, cut at 3 sigma; border pixels are repeated.

    Args:
        sigma_px: standard deviations above 0 in pixels, on the CPU.
    """
    reach = torch.ceil(3 * sigma_px)[:, None]
    radius = int(reach.max())
    tap = torch.arange(radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (tap / sigma_px[:, None]) ** 2) * (tap <= reach)
    weight = weight / (2 * weight.sum(dim=1, keepdim=True) - weight[:, :1])
    weights = copy_to(weight, image).T[..., None, None, None]
    for axis, padding in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        size = image.shape[axis]
        padded = F.pad(image, padding, mode="replicate")
        image = image * weights[0]
        for k in range(1, radius + 1):
            pair = padded.narrow(axis, radius - k, size) + padded.narrow(axis, radius + k, size)
            image.addcmul_(pair, weights[k])
    return image


def mix_channels(
    image: Float[Tensor, "b k h w"], matrix: Float[Tensor, "#b c k"]
) -> Float[Tensor, "b c h w"]:
    """Multiply every pixel's channels by its image's matrix."""
    mixed = image[:, :1] * matrix[:, :, 0, None, None]
    for channel in range(1, image.shape[1]):
        own = image[:, channel : channel + 1]
        mixed = torch.addcmul(mixed, own, matrix[:, :, channel, None, None])
    return mixed


def ycbcr_matrix() -> Float64[Tensor, "1 3 3"]:
    """From RGB to Y and to Cb and Cr about 0, all with the range of the RGB (JFIF 1.02)."""
    weight = torch.tensor(LUMA, dtype=torch.float64)
    red, _, blue = torch.eye(3, dtype=torch.float64)
    chroma = [(axis - weight) / (2 * (1 - weight @ axis)) for axis in (blue, red)]
    return torch.stack([weight, *chroma])[None]


def soft_round(values: Tensor) -> Tensor:
    """Round to whole numbers, with a ramp of width 1/16 instead of the jump between two of them.

    Devices differ in the last bits of a value; without the ramp such a bit could decide on a whole
    step, with it the difference grows by a factor of at most 16.
    """
    whole = values.floor()
    return whole + ((values - whole - 0.5) * 16 + 0.5).clamp_(0, 1)


def copy_to(values: Tensor, image: Tensor) -> Tensor:
    """A tensor of the CPU on the device of the image, without waiting for that device.

    Floating point numbers take the image's dtype.
    """
    values = values.to(image.dtype) if values.is_floating_point() else values
    values = values.pin_memory() if image.is_cuda else values
    return values.to(image.device, non_blocking=True)
