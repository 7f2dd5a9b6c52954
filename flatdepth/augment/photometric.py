"""Light, lens, sensor and JPEG over whole images, after pasting, as one camera took them all.

``Photometric`` is the stage as a Kornia augmentation. The factors are drawn per sample on the CPU
and stay there: which effects run, and on which images of a batch, is known without asking the
device. No image depends on the others.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from flatdepth.augment.filters import LUMA, blur, copy_to, mix_channels, soft_round, ycbcr_matrix
from flatdepth.augment.rng import Draws, hash_words, mix32, name_word
from flatdepth.config import PhotometricConfig

NEUTRAL = {
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,
    "gamma": 1.0,
    "blur": 0.0,
    "noise": 0.0,
    "shot": 0.0,
    "noise seed": 0.0,
    "jpeg": 0.0,
}
"""The columns of the factors, with the values that leave an image as it is."""


class Photometric(IntensityAugmentationBase2D):
    """The stage in Kornia's form: works alone and in ``AugmentationSequential``.

    Images are sRGB 0..1 of any floating point type, (3, h, w) or (b, 3, h, w); they are computed in
    float32. Masks, boxes and keypoints pass unchanged. Parameters are ``{"factors": (b, 10)}``,
    float64 on the CPU, as ``draw_photometric`` gives them; a dictionary given back replays them.

    Args:
        config: which effects and how strong; the defaults if None.
        p: share of the images that are changed; None takes ``config.share``.
        same_on_batch: one draw for all images of a batch.
        keepdim: give back (3, h, w) for (3, h, w).
    """

    def __init__(
        self,
        config: PhotometricConfig | None = None,
        *,
        p: float | None = None,
        same_on_batch: bool = False,
        keepdim: bool = False,
    ) -> None:
        config = config or PhotometricConfig()
        share = config.share if p is None else p
        super().__init__(p=share, same_on_batch=same_on_batch, keepdim=keepdim)
        self._config = replace(config, share=1.0)

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Factors for a batch of a shape, seeded by torch's random generator of the CPU."""
        seeds = draw_seeds(batch_shape[0], same_on_batch=self.same_on_batch)
        rows = [draw_photometric(Draws(seed), self._config) for seed in seeds.tolist()]
        return {"factors": torch.from_numpy(np.array(rows).reshape(-1, len(NEUTRAL)))}

    def apply_transform(
        self,
        input: Tensor,
        params: Mapping[str, Tensor],
        flags: Mapping[str, Any],  # noqa: ARG002
        transform: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Apply the factors of the images that Kornia's gate lets through."""
        neutral = torch.tensor(list(NEUTRAL.values()), dtype=torch.float64)
        chosen = params["batch_prob"].cpu()[:, None] > 0.5
        factors = torch.where(chosen, params["factors"].cpu(), neutral)
        return photometric(input.float(), factors).to(input.dtype)


def draw_seeds(count: int, *, same_on_batch: bool) -> Tensor:
    """Seeds of ``count`` images from torch's random generator of the CPU, (count,) int64."""
    drawn = torch.randint(2**31, (min(count, 1) if same_on_batch else count,))
    return drawn.expand(count)


def draw_photometric(draws: Draws, config: PhotometricConfig) -> Float64[np.ndarray, " 10"]:
    """The factors of an image (columns as in ``NEUTRAL``).

    Brightness, contrast and saturation are factors, hue is in degrees, gamma an exponent, blur a
    standard deviation in pixels, noise and shot are standard deviations in units of the full range,
    jpeg is a quality in 1..100, or 0 for none.
    """
    factors = dict(NEUTRAL)
    if draws.uniform("photometric") < config.share:
        factors |= _drawn(draws, config)
    return np.array(list(factors.values()))


def _drawn(draws: Draws, config: PhotometricConfig) -> dict[str, float]:
    factors = {}
    for name in ("brightness", "contrast", "saturation"):
        limit = getattr(config, name)
        factors[name] = draws.uniform(name, 1 - limit, 1 + limit)
    factors["hue"] = draws.uniform("hue", -config.hue, config.hue)
    factors["gamma"] = math.exp(draws.uniform("gamma", -config.gamma, config.gamma))
    if draws.uniform("blurred") < config.blur_share:
        factors["blur"] = draws.uniform("blur", 0.0, config.blur)
    if draws.uniform("noisy") < config.noise_share:
        factors["noise"] = draws.uniform("noise", 0.0, config.noise)
        factors["shot"] = draws.uniform("shot", 0.0, config.shot)
        factors["noise seed"] = draws.integer("noise seed", 2**31)
    if draws.uniform("compressed") < config.jpeg_share:
        low, high = config.jpeg_quality
        factors["jpeg"] = low + draws.integer("jpeg", high - low + 1)
    return factors


@torch.no_grad()
def photometric(
    image: Float[Tensor, "b 3 h w"], factors: Float[Tensor, "b 10"]
) -> Float[Tensor, "b 3 h w"]:
    """Apply what a camera does, in its order: colour, blur, noise, JPEG; clamped after each.

    Args:
        image: sRGB 0..1, float32, on any device.
        factors: as ``draw_photometric`` gives them, float64 on the CPU.

    Returns:
        A new batch. An effect touches only the images that have a factor for it; the others keep
        their bits. No image depends on the others.
    """
    with torch.autocast(image.device.type, enabled=False):
        for effect, names in _EFFECTS:
            own = factors[:, [_COLUMN[name] for name in names]]
            neutral = own.new_tensor([NEUTRAL[name] for name in names])
            rows = (own != neutral).any(dim=1).nonzero()[:, 0]
            if len(rows):
                place = copy_to(rows, image)
                changed = effect(image[place], *own[rows].unbind(dim=1))
                image = image.index_copy(0, place, changed.clamp(0, 1))
    return image


def colour(
    image: Float[Tensor, "b 3 h w"],
    brightness: Float[Tensor, " b"],
    contrast: Float[Tensor, " b"],
    saturation: Float[Tensor, " b"],
    hue_deg: Float[Tensor, " b"],
    gamma: Float[Tensor, " b"],
) -> Float[Tensor, "b 3 h w"]:
    """Linear changes of the sRGB values in one 3 x 3 matrix per image, then gamma.

    Brightness scales the values about 0, contrast about the image's mean luma, saturation about
    each pixel's luma. Hue turns the colour about the grey axis (Rodrigues' rotation formula about
    (1, 1, 1)), from red towards yellow for a positive angle. Factors are on the CPU.
    """
    angle = torch.deg2rad(hue_deg)[:, None, None]
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    third = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    luma = torch.tensor(LUMA, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)
    turn = angle.cos() * identity + (1 - angle.cos()) * third + angle.sin() * cross
    amount = saturation[:, None, None]
    saturate = amount * identity + (1 - amount) * luma.expand(3, 3)
    matrix = (brightness * contrast)[:, None, None] * (turn @ saturate)
    # one axis at a time: the order of these sums does not depend on the size of the batch
    mean_luma = (image.mean(-1).mean(-1) * copy_to(luma, image)).sum(-1)
    grey = mean_luma * copy_to(brightness * (1 - contrast), image)
    linear = mix_channels(image, copy_to(matrix, image)) + grey[:, None, None, None]
    exponent = copy_to(gamma, image)[:, None, None, None]
    # not pow, whose last bit changes with the place in the batch
    return linear.clamp_(0, 1).log_().mul_(exponent).exp_()


def noise(
    image: Float[Tensor, "b 3 h w"],
    read: Float[Tensor, " b"],
    shot: Float[Tensor, " b"],
    seed: Float[Tensor, " b"],
) -> Float[Tensor, "b 3 h w"]:
    """Add Gaussian noise of variance read^2 + shot^2 * value.

    The standard normal numbers are hashes of (seed, channel, pixel), one 32-bit hash for two of
    them by the Box-Muller transform: 16 bits for the radius (so at most 4.9), 16 for the angle.
    """
    batch, size = image.shape[0], image[0].numel()
    key = copy_to(hash_words(seed.long(), name_word("noise")), image)
    word = mix32(key[:, None] + torch.arange((size + 1) // 2, device=image.device))
    radius = (((word >> 16).to(image.dtype) + 0.5) / 65536).log_().mul_(-2).sqrt_()
    angle = ((word & 0xFFFF).to(image.dtype) + 0.5) * (2 * torch.pi / 65536)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]
    variances = copy_to(torch.stack([read**2, shot**2]), image)[..., None, None, None]
    deviation = torch.addcmul(variances[0], variances[1], image).sqrt_()
    return image + deviation * normal.reshape(batch, *image.shape[1:])


def jpeg(image: Float[Tensor, "b 3 h w"], quality: Float[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
    """What is left of an image after baseline JPEG with 4:2:0 chroma (ITU-T T.81, JFIF).

    The example tables of T.81 Annex K are scaled by quality as libjpeg does. Colours and pixels are
    not rounded to 8 bits, and coefficients on the edge between two steps go to a value between
    them (``soft_round``); else it is the real thing without the entropy coder.

    Args:
        quality: whole numbers in 1..100, on the CPU.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % 16, 0, -height % 16), mode="replicate")
    to_ycbcr = 255 * ycbcr_matrix()
    luma_table, chroma_table = copy_to(quantisation_tables(quality), image)
    ycbcr = mix_channels(padded, copy_to(to_ycbcr, image))
    luma = _quantise_blocks(ycbcr[:, :1] - 128, luma_table) + 128
    chroma = _quantise_blocks(F.avg_pool2d(ycbcr[:, 1:], 2), chroma_table)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    restored = mix_channels(torch.cat([luma, chroma], 1), copy_to(to_ycbcr.inverse(), image))
    return restored[..., :height, :width]


def _quantise_blocks(plane: Float[Tensor, "b c h w"], table: Float[Tensor, "b 1 64"]) -> Tensor:
    """Round the cosine transform of every 8 x 8 block to multiples of the image's table.

    The transform is a matrix product in float32, so TF32 must be off, as it is by default.
    """
    cosines = copy_to(_cosines(), plane)
    blocks = plane.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)
    coefficients = blocks.reshape(len(plane), -1, 64) @ cosines.T
    restored = (soft_round(coefficients / table) * table) @ cosines
    return restored.reshape(blocks.shape).transpose(-3, -2).reshape(plane.shape)


def _cosines() -> Float[Tensor, "64 64"]:
    """The orthonormal two-dimensional DCT-II of 8 x 8 blocks as a matrix, frequency by pixel."""
    frequency, pixel = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(8) + 0.5
    line = torch.cos(math.pi / 8 * frequency * pixel) / 2
    line[0] /= math.sqrt(2)
    return torch.kron(line, line)


def quantisation_tables(quality: Float[Tensor, " b"]) -> Float[Tensor, "2 b 1 64"]:
    """The steps of luma and of chroma, by rows of the block, as libjpeg scales them by quality."""
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    base = torch.tensor([_LUMA_TABLE, _CHROMA_TABLE], dtype=torch.float64)
    scaled = base[:, None, None] * percent[:, None, None]
    return ((scaled + 50) / 100).floor().clamp(1, 255)


_COLUMN = {name: column for column, name in enumerate(NEUTRAL)}
_EFFECTS: tuple[tuple[Callable[..., Tensor], tuple[str, ...]], ...] = (
    (colour, ("brightness", "contrast", "saturation", "hue", "gamma")),
    (blur, ("blur",)),
    (noise, ("noise", "shot", "noise seed")),
    (jpeg, ("jpeg",)),
)
# ITU-T T.81 (1992), tables K.1 and K.2, by rows
_LUMA_TABLE = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_TABLE = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 32),
)
