"""The photometric stage: each effect against an oracle, what is drawn, images stay apart."""

import colorsys
import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_gamma,
    adjust_saturation_with_gray_subtraction,
)
from PIL import Image
from torch import Tensor

from flatdepth.augment.filters import blur, soft_round, ycbcr_matrix
from flatdepth.augment.photometric import (
    NEUTRAL,
    colour,
    draw_photometric,
    jpeg,
    noise,
    photometric,
    quantisation_tables,
)
from flatdepth.augment.rng import Draws
from flatdepth.config import PhotometricConfig
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY

FRAMES = REPOSITORY / "tests" / "data" / "rgbd"
ROOM = FRAMES / "redwood" / "image" / "00005.jpg"
DINING = FRAMES / "slambook2_ch5" / "color" / "1.png"


def column(*values: float) -> Float[Tensor, " b"]:
    return torch.tensor(values, dtype=torch.float64)


def rows(*changes: dict[str, float]) -> Float[Tensor, "b 10"]:
    return torch.tensor([list({**NEUTRAL, **row}.values()) for row in changes], dtype=torch.float64)


def factors_of(draws: Sequence[Draws], config: PhotometricConfig) -> Float[Tensor, "b 10"]:
    return torch.from_numpy(np.stack([draw_photometric(own, config) for own in draws]))


def noise_image(batch: int, height: int, width: int, low: float = 0, high: float = 1) -> Tensor:
    values = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))
    return low + (high - low) * values


def photograph(path: object, height: int, width: int) -> Image.Image:
    return Image.open(str(path)).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Float[Tensor, "1 3 h w"]:
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 255


def recoloured(image: Tensor, **factors: float) -> Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "gamma")
    values = {**NEUTRAL, **factors}
    return colour(image, *(column(values[name]).expand(len(image)) for name in names))


# colour


def test_brightness_contrast_saturation_and_gamma_are_those_of_kornia() -> None:
    image = noise_image(1, 24, 30, 0.3, 0.7)
    expected = adjust_brightness_accumulative(image, 1.15)
    expected = adjust_contrast_with_mean_subtraction(expected, 0.85)
    expected = adjust_saturation_with_gray_subtraction(expected, 1.2)
    expected = adjust_gamma(expected, 0.9)
    ours = recoloured(image, brightness=1.15, contrast=0.85, saturation=1.2, gamma=0.9)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("degrees", [-60.0, -10.0, 10.0, 120.0])
def test_hue_turns_colours_about_the_grey_axis(degrees: float) -> None:
    """Mean and distance from grey stay, and the angle about the grey axis grows by the hue."""
    image = noise_image(1, 16, 16, 0.4, 0.6)
    turned = recoloured(image, hue=degrees)

    def polar(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        red, green, blue = pixels[0].double()
        across, along = math.sqrt(3) / 2 * (green - blue), red - (green + blue) / 2
        return (red + green + blue) / 3, torch.hypot(along, across), torch.atan2(across, along)

    mean, distance, angle = polar(image)
    mean_turned, distance_turned, angle_turned = polar(turned)
    torch.testing.assert_close(mean_turned, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(distance_turned, distance, atol=1e-6, rtol=0)
    error = torch.remainder(angle_turned - angle - math.radians(degrees) + 1, 2 * math.pi) - 1
    assert float((error * distance).abs().max()) < 1e-6


def test_hue_agrees_with_the_hexagon_of_colorsys() -> None:
    """The hexagon's hue is off the true angle by 1.12 degrees at most, so a turn by twice that."""
    image = noise_image(1, 12, 12, 0.2, 0.8)
    turned = recoloured(image, hue=10)
    for before, after in zip(image[0].flatten(1).T, turned[0].flatten(1).T, strict=True):
        change = 360 * (colorsys.rgb_to_hsv(*after)[0] - colorsys.rgb_to_hsv(*before)[0])
        assert abs((change - 10 + 180) % 360 - 180) < 2.3


def test_a_turn_by_a_third_renames_the_channels() -> None:
    image = noise_image(1, 9, 9)
    red_to_green = image[:, [2, 0, 1]]
    torch.testing.assert_close(recoloured(image, hue=120), red_to_green, atol=1e-6, rtol=0)


def test_grey_has_no_hue_and_no_saturation() -> None:
    image = noise_image(1, 9, 9)[:, :1].expand(1, 3, 9, 9)
    changed = recoloured(image, hue=77, saturation=1.9)
    torch.testing.assert_close(changed, image, atol=1e-6, rtol=0)


def test_black_and_white_survive_any_gamma() -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[..., 2:] = 1
    torch.testing.assert_close(recoloured(image, gamma=0.5), image, atol=1e-6, rtol=0)


# blur


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.0, 2.5])
def test_blur_is_the_two_dimensional_convolution(sigma: float) -> None:
    image = noise_image(1, 13, 17)
    radius = math.ceil(3 * sigma)
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    edges = [(0, 0), (radius, radius), (radius, radius)]
    padded = np.pad(image[0].double().numpy(), edges, mode="edge")
    expected = np.zeros((3, 13, 17))
    for y in range(13):
        for x in range(17):
            window = padded[:, y : y + 2 * radius + 1, x : x + 2 * radius + 1]
            expected[:, y, x] = (window * kernel).sum((1, 2))
    ours = blur(image, column(sigma))[0].double().numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


# noise


@pytest.mark.parametrize("level", [0.2, 0.5, 0.8])
def test_noise_has_the_stated_variance_and_a_normal_shape(level: float) -> None:
    image = torch.full((1, 3, 160, 161), level)
    added = (noise(image, column(0.02), column(0.03), column(77)) - image).double()
    count = added.numel()
    deviation = math.sqrt(0.02**2 + 0.03**2 * level)
    z = added.flatten() / deviation
    assert abs(float(z.mean())) < 3.3 / math.sqrt(count)
    assert abs(float(z.square().mean()) - 1) < 3.3 * math.sqrt(2 / count)
    assert abs(float(z.pow(4).mean()) - 3) < 3.3 * math.sqrt(96 / count)
    for share, quantile in ((0.5, 0.67449), (0.9, 1.64485), (0.99, 2.57583)):
        found = float((z.abs() < quantile).double().mean())
        assert abs(found - share) < 3.3 * math.sqrt(share * (1 - share) / count)


def test_noise_is_white_over_pixels_channels_and_seeds() -> None:
    image = torch.full((2, 3, 128, 128), 0.5)
    added = noise(image, column(0.1, 0.1), column(0, 0), column(5, 6)) - image
    one, other = added.double() / 0.1
    limit = 3.5 / math.sqrt(3 * 127 * 128)
    assert abs(float((one * other).mean())) < limit
    assert abs(float((one[:, 1:] * one[:, :-1]).mean())) < limit
    assert abs(float((one[:, :, 1:] * one[:, :, :-1]).mean())) < limit
    for channel in (1, 2):
        assert abs(float((one[0] * one[channel]).mean())) < 3.5 / 128


# JPEG


def test_quantisation_tables_are_those_of_libjpeg() -> None:
    tables = quantisation_tables(torch.arange(1, 101, dtype=torch.float64))
    for quality in range(1, 101):
        stored = Image.open(saved(Image.new("RGB", (8, 8)), quality)).quantization
        for number in (0, 1):
            assert tables[number, quality - 1, 0].tolist() == list(stored[number])


def saved(picture: Image.Image, quality: int) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer


@pytest.mark.parametrize("path", [ROOM, DINING], ids=["room", "dining"])
@pytest.mark.parametrize("quality", [40, 70, 95])
def test_jpeg_is_what_a_real_encoder_and_decoder_leave(path: object, quality: int) -> None:
    """What is left between them is libjpeg's rounding of colours and pixels to 8 bits."""
    picture = photograph(path, 203, 277)
    decoded = np.array(Image.open(saved(picture, quality)), dtype=np.float64)
    image = to_tensor(picture)
    ours = jpeg(image, column(quality)).clamp(0, 1)[0].movedim(0, -1).double().numpy() * 255
    original = np.array(picture, dtype=np.float64)
    change = decoded - original
    assert np.abs(ours - decoded).mean() < 0.5 * np.abs(change).mean()
    assert np.corrcoef((ours - original).ravel(), change.ravel())[0, 1] > 0.92
    assert abs(np.std(ours - original) / np.std(change) - 1) < 0.05


def test_jpeg_of_grey_is_the_cosine_transform_in_steps() -> None:
    """Against the sums of T.81 A.3.3 in float64, in the blocks without a coefficient on a ramp."""
    quality, size = 60, 64
    grey = to_tensor(photograph(DINING, size, size))[:, :1]
    table = quantisation_tables(column(quality))[0, 0, 0].reshape(8, 8).numpy()
    line = np.array(
        [[math.cos((2 * x + 1) * u * math.pi / 16) for x in range(8)] for u in range(8)]
    )
    line *= np.where(np.arange(8) == 0, math.sqrt(0.5), 1.0)[:, None] / 2
    pixels = 255 * grey[0, 0].double().numpy() - 128
    blocks = pixels.reshape(8, 8, 8, 8).swapaxes(1, 2)
    steps = np.einsum("ux,vy,abxy->abuv", line, line, blocks) / table
    restored = np.einsum("ux,vy,abuv->abxy", line, line, np.round(steps) * table)
    clear = (np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1 / 32 + 1e-4).all((2, 3))
    ours = 255 * jpeg(grey.expand(1, 3, size, size), column(quality))[0].double().numpy() - 128
    ours = ours.reshape(3, 8, 8, 8, 8).swapaxes(2, 3)
    assert clear.sum() > 5
    np.testing.assert_allclose(ours[:, clear], np.stack([restored[clear]] * 3), atol=2e-3)


@pytest.mark.parametrize("quality", [1, 40, 95, 100])
def test_jpeg_does_not_blow_up_the_last_bits(quality: int) -> None:
    """What differs between devices before JPEG must not decide on whole steps of it."""
    image = to_tensor(photograph(ROOM, 203, 277))
    other = image + 1e-6 * (noise_image(1, 203, 277) - 0.5)
    change = jpeg(other, column(quality)) - jpeg(image, column(quality))
    assert float(change.abs().max()) < 1e-4


@settings(max_examples=200, deadline=None)
@given(st.floats(-1000, 1000), st.floats(-0.1, 0.1))
def test_soft_rounding_rounds_and_is_continuous(value: float, step: float) -> None:
    here, there = soft_round(column(value, value + step))
    if abs(value - math.floor(value) - 0.5) > 1 / 32:
        assert float(here) == round(value)
    assert abs(float(there - here)) <= 16 * abs(step) + 1e-9
    assert (there - here) * step >= 0


def test_luma_and_chroma_are_those_of_jfif() -> None:
    expected = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    np.testing.assert_allclose(ycbcr_matrix()[0].numpy(), expected, atol=5e-7)
    picture = photograph(ROOM, 30, 40)
    ours = 255 * rgb_to_grayscale(to_tensor(picture))[0, 0].double().numpy()
    np.testing.assert_allclose(ours, np.array(picture.convert("L")), atol=0.51)


# the stage

MIXED = rows(
    {},
    {"brightness": 1.1, "hue": 7.0, "gamma": 0.9},
    {"blur": 0.4},
    {"noise": 0.01, "noise seed": 12.0},
    {"jpeg": 60.0},
    {"contrast": 0.9, "blur": 1.3, "noise": 0.02, "shot": 0.02, "noise seed": 3.0, "jpeg": 40.0},
)


@pytest.mark.parametrize("size", [(37, 53), (112, 154)])
def test_an_image_comes_out_the_same_alone_and_in_a_batch(size: tuple[int, int]) -> None:
    image = noise_image(len(MIXED), *size)
    together = photometric(image, MIXED)
    for row in range(len(MIXED)):
        alone = photometric(image[row : row + 1], MIXED[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    turned = photometric(image.flip(0), MIXED.flip(0))
    assert torch.equal(together.flip(0), turned)


def test_only_what_a_factor_asks_for_is_changed() -> None:
    image = noise_image(len(MIXED), 40, 56)
    before = image.clone()
    changed = photometric(image, MIXED)
    assert torch.equal(image, before)
    assert torch.equal(changed[0], image[0])
    for row in range(1, len(MIXED)):
        assert float((changed[row] - image[row]).abs().mean()) > 1e-3
    assert photometric(image, rows(*[{}] * len(MIXED))) is image


def test_the_order_is_that_of_a_camera_and_every_step_is_clipped() -> None:
    image = noise_image(1, 40, 56)
    row = MIXED[5:]
    expected = recoloured(image, contrast=0.9).clamp(0, 1)
    expected = blur(expected, column(1.3)).clamp(0, 1)
    expected = noise(expected, column(0.02), column(0.02), column(3)).clamp(0, 1)
    expected = jpeg(expected, column(40)).clamp(0, 1)
    assert torch.equal(photometric(image, row), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 40))
def test_images_stay_in_range_at_any_size(seed: int, height: int, width: int) -> None:
    extreme = PhotometricConfig(
        share=1, brightness=1, contrast=1, saturation=1, hue=180, gamma=1,
        blur_share=1, blur=10, noise_share=1, noise=1, shot=1, jpeg_share=1, jpeg_quality=(1, 100),
    )  # fmt: skip
    factors = factors_of([Draws(seed, 0, sample) for sample in range(3)], extreme)
    image = noise_image(3, height, width)
    changed = photometric(image, factors)
    assert changed.shape == image.shape and changed.dtype == torch.float32
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1


def test_small_changes_of_the_image_stay_small() -> None:
    """The last bits in which devices differ do not show, whatever the effects."""
    image = to_tensor(photograph(ROOM, 203, 277)).expand(6, 3, 203, 277).contiguous()
    other = (image + 1e-6 * (noise_image(6, 203, 277) - 0.5)).clamp(0, 1)
    difference = (photometric(other, MIXED) - photometric(image, MIXED)).abs()
    assert float(difference.max()) < 1e-4


# what is drawn


def drawn(config: PhotometricConfig, count: int = 1500) -> dict[str, Tensor]:
    factors = factors_of([Draws(7, 1, sample) for sample in range(count)], config)
    return dict(zip(NEUTRAL, factors.T, strict=True))


def test_factors_fill_their_ranges_in_the_configured_shares() -> None:
    config = PhotometricConfig(
        share=0.6, blur_share=0.25, noise_share=0.75, jpeg_share=0.5, jpeg_quality=(30, 33)
    )
    found = drawn(config)
    shares = {"hue": 0.6, "brightness": 0.6, "blur": 0.15, "noise": 0.45, "shot": 0.45, "jpeg": 0.3}
    for name, share in shares.items():
        changed = float((found[name] != NEUTRAL[name]).double().mean())
        assert abs(changed - share) < 3.5 * math.sqrt(share * (1 - share) / 1500)
    limits = {
        "brightness": (0.8, 1.2),
        "contrast": (0.8, 1.2),
        "saturation": (0.8, 1.2),
        "hue": (-10.0, 10.0),
        "gamma": (math.exp(-0.2), math.exp(0.2)),
        "blur": (0.0, 1.0),
        "noise": (0.0, 0.02),
        "shot": (0.0, 0.02),
    }
    for name, (low, high) in limits.items():
        changed = found[name][found[name] != NEUTRAL[name]]
        room = 0.02 * (high - low)
        assert low <= float(changed.min()) < low + room
        assert high - room < float(changed.max()) <= high
    qualities = found["jpeg"][found["jpeg"] > 0]
    assert set(qualities.tolist()) == {30.0, 31.0, 32.0, 33.0}


def test_a_share_of_nothing_is_neutral() -> None:
    for name, values in drawn(PhotometricConfig(share=0.0), 50).items():
        assert (values == NEUTRAL[name]).all()


def test_factors_belong_to_the_sample_alone() -> None:
    config = PhotometricConfig()
    draws = [Draws(0, 0, sample) for sample in range(20)]
    together = factors_of(draws, config)
    assert torch.equal(factors_of(draws[::-1], config), together.flip(0))
    seeds = together[:, list(NEUTRAL).index("noise seed")]
    seeds = seeds[seeds > 0]
    assert len(seeds.unique()) == len(seeds) > 1
    # another effect's share does not change what is drawn for this one
    other = factors_of(draws, dataclasses.replace(config, blur_share=1.0))
    for name in ("brightness", "noise", "jpeg"):
        number = list(NEUTRAL).index(name)
        assert torch.equal(other[:, number], together[:, number])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("share", 1.5),
        ("noise_share", -0.1),
        ("hue", 200.0),
        ("blur", 11.0),
        ("shot", 2.0),
        ("jpeg_quality", (0, 50)),
        ("jpeg_quality", (60, 50)),
    ],
)
def test_settings_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^photometric\.{key}: expected .* got "):
        PhotometricConfig(**{key: value})
