"""What a latent diffusion model of depth learns from: the truth as a picture, noise, the target.

Ke et al. 2024, "Repurposing Diffusion-Based Image Generators for Monocular Depth Estimation"
(Marigold), section 3. A latent cell is what the autoencoder makes of a square of pixels.

Shapes: b batch, c latent channels, h and w pixels or cells.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from flatdepth.augment.rng import Draws

NEAR, FAR = 0.02, 0.98
"""Quantiles of an image's depth that become -1 and 1."""

MIN_SPREAD = 1e-3
"""Between them there must be more than this share of the farther one; less is the rounding of the
truth's source."""

OCTAVES = 10
STRENGTH = 0.9
"""Amplitude of a coarser octave of the noise over that of the one before, at the last time."""


def affine_depth(
    depth_m: Float[Tensor, "b 1 h w"], weight: Float[Tensor, "b 1 h w"]
) -> tuple[Float[Tensor, "b 1 h w"], Bool[Tensor, " b"]]:
    """Depth of each image from -1 to 1, and whether the image has any shape.

    ``2 (z - near) / (far - near) - 1`` with the 2 % and 98 % quantiles (linear between two values)
    of the pixels with weight, clipped. Pixels without weight are as far as can be: what they hold
    reaches the latents of their neighbours. A flat image is far everywhere.
    """
    known = weight > 0
    ordered = torch.where(known, depth_m, torch.inf).flatten(1).sort(dim=1).values
    last = known.flatten(1).sum(1, keepdim=True) - 1
    near, far = (_quantile(ordered, last, share)[:, :, None, None] for share in (NEAR, FAR))
    has_shape = (last[:, :, None, None] >= 0) & (far - near > MIN_SPREAD * far)
    span = torch.where(has_shape, far - near, 1.0)
    depth = (2 * (depth_m - torch.where(has_shape, near, 0.0)) / span - 1).clamp(-1, 1)
    return torch.where(known & has_shape, depth, 1.0), has_shape.flatten()


def _quantile(ordered: Float[Tensor, "b n"], last: Tensor, share: float) -> Float[Tensor, "b 1"]:
    """Of the first ``last + 1`` values of each row; by itself, as torch's takes 2^24 at most."""
    place = share * last.clamp(min=0).double()
    low = place.floor().long()
    high = torch.minimum(low + 1, last.clamp(min=0))
    return torch.lerp(ordered.gather(1, low), ordered.gather(1, high), (place - low).to(ordered))


def cell_weight(weight: Float[Tensor, "b 1 h w"], side: int) -> Float[Tensor, "b 1 h2 w2"]:
    """Mean weight of each cell of ``side`` pixels; 0 where one of its pixels has none."""
    unknown = F.max_pool2d((weight <= 0).to(weight), side)
    return torch.where(unknown > 0, 0.0, F.avg_pool2d(weight, side))


def annealed_noise(
    size: tuple[int, int, int], strength: float, draws: Draws
) -> Float[Tensor, "c h w"]:
    """Multi-resolution noise of one image: standard deviation 1 over all of it, on the CPU.

    A white field, and over it up to ``OCTAVES`` more: octave i is smaller by the i-th power of a
    factor between 2 and 4 than the one before, enlarged bilinearly, and has the amplitude
    ``strength`` to the i-th power (section 3.3; the published code's rule). At strength 0 the sum
    is white. The standard deviation is the image's own, where the published code takes the batch's.

    Args:
        size: channels, rows and columns.
        strength: 0 to 1; annealed, that is in proportion to the time that the noise is for.
        draws: of this image; all randomness comes from it.
    """
    generator = torch.Generator().manual_seed(draws.integer("noise", 1 << 32))
    noise = torch.randn(size, generator=generator)
    channels, rows, columns = size
    for octave in range(OCTAVES):
        zoom = draws.uniform(f"zoom {octave}", 2.0, 4.0) ** octave
        rows, columns = max(1, int(rows / zoom)), max(1, int(columns / zoom))
        coarse = torch.randn(1, channels, rows, columns, generator=generator)
        noise += F.interpolate(coarse, size[1:], mode="bilinear")[0] * strength**octave
        if rows == 1 or columns == 1:
            break
    return noise / noise.std()


def denoising_target(
    kind: str, clean: Tensor, noise: Tensor, alpha: Float[Tensor, "b 1 1 1"]
) -> Tensor:
    """What a network of the prediction type says of ``sqrt(alpha) clean + sqrt(1 - alpha) noise``.

    Args:
        kind: "epsilon" (the noise), "sample" (what is clean) or "v_prediction", which is
            ``sqrt(alpha) noise - sqrt(1 - alpha) clean`` (Salimans and Ho 2022, appendix D).
        alpha: share of the signal in the variance, alpha-bar of the time.
    """
    if kind == "v_prediction":
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    return noise if kind == "epsilon" else clean
