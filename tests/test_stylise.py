"""Stylised contents: each style against a slow float64 twin and its laws, pictures stay apart."""

import math

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float64
from PIL import Image
from torch import Tensor

from flatdepth.augment.draw.stylise import Style, posterise, sketch, smooth, stylise
from tests.conftest import REPOSITORY

DATA = REPOSITORY / "tests" / "data"
PAINTING = DATA / "art" / "jcjohnson_neural-style__shipwreck.jpg"
ROOM = DATA / "rgbd" / "redwood" / "image" / "00005.jpg"
EVERY = tuple(Style)
DRAW = {Style.POSTERISE: posterise, Style.SMOOTH: smooth, Style.SKETCH: sketch}
LUMA = np.array([0.299, 0.587, 0.114])


def picture(path: object, height: int, width: int) -> Float[Tensor, "1 3 h w"]:
    image = Image.open(str(path)).convert("RGB")
    values = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(values).movedim(-1, 0)[None].float() / 255


def batch(height: int, width: int) -> Float[Tensor, "5 3 h w"]:
    random = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1))
    return torch.cat([random, picture(PAINTING, height, width), picture(ROOM, height, width)])


def pixels(image: Tensor) -> Float64[np.ndarray, "h w 3"]:
    return image[0].movedim(0, -1).double().numpy()


def blurred(values: Float64[np.ndarray, "h w k"], sigma: float) -> Float64[np.ndarray, "h w k"]:
    """A Gaussian cut at 3 sigma as a two-dimensional sum, with repeated border pixels."""
    radius = math.ceil(3 * sigma)
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
    padded = np.pad(values, [(radius, radius), (radius, radius), (0, 0)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, (0, 1))
    return np.einsum("hwkyx,yx->hwk", windows, kernel / kernel.sum())


# posterise


def test_posterised_luma_and_chroma_lie_on_their_steps() -> None:
    """6 tones and chroma in steps of 1/16, those next to the blurred original's."""
    source = picture(PAINTING, 90, 120)
    luma = np.array(LUMA)
    to_ycbcr = np.stack([luma, 0.564 * ([0, 0, 1] - luma), 0.713 * ([1, 0, 0] - luma)])
    steps = blurred(pixels(source), 0.003 * 90) @ to_ycbcr.T * (5, 16, 16)
    on_ramp = (np.abs(steps - np.floor(steps) - 0.5) < 1 / 32 + 1e-4).any(-1)
    expected = np.round(steps) / (5, 16, 16) @ np.linalg.inv(to_ycbcr).T
    ours = pixels(posterise(source))
    assert on_ramp.mean() < 0.25
    np.testing.assert_allclose(ours[~on_ramp], expected.clip(0, 1)[~on_ramp], atol=2e-6)


def test_posterised_grey_has_six_greys() -> None:
    ramp = torch.linspace(0, 1, 701).expand(1, 3, 8, 701)
    found = posterise(ramp)
    torch.testing.assert_close(found[:, :1].expand_as(found), found, atol=1e-6, rtol=0)
    tones = (found[0, 0, 0] * 5).double()
    settled = (tones - tones.round()).abs() < 1e-5
    assert settled.double().mean() > 0.9
    assert tones[settled].round().unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert (tones.diff() > -1e-6).all()


# smooth


def test_smooth_is_the_weighted_kuwahara_filter() -> None:
    height, width = 310, 24
    source = picture(ROOM, height, width)
    radius = 2  # 0.008 of the height
    values = np.pad(pixels(source), [(radius, radius), (radius, radius), (0, 0)], mode="edge")
    grey = values @ LUMA
    ours = pixels(smooth(source))
    for y in range(0, height, 9):
        for x in range(width):
            total, weights = np.zeros(3), 0.0
            for top in (y, y + radius):
                for left in (x, x + radius):
                    window = np.s_[top : top + radius + 1, left : left + radius + 1]
                    weight = (1 + grey[window].var() / 1e-4) ** -4
                    total += weight * values[window].mean((0, 1))
                    weights += weight
            np.testing.assert_allclose(ours[y, x], total / weights, atol=2e-5)


def test_smoothing_takes_the_noise_and_leaves_the_edge() -> None:
    side, noise = 400, 0.03
    clean = torch.full((1, 3, side, side), 0.2)
    clean[..., side // 2 :] = 0.8
    generator = torch.Generator().manual_seed(5)
    found = smooth(clean + noise * torch.randn(clean.shape, generator=generator))
    error = (found - clean).abs()
    assert float(error.square().mean().sqrt()) < 0.6 * noise
    # a window across the edge would be off by at least 0.6 / 4
    assert float(error[..., side // 2 - 1 : side // 2 + 1].max()) < 0.1


def test_a_flat_picture_stays_as_it_is() -> None:
    flat = torch.tensor([0.2, 0.5, 0.9])[None, :, None, None].expand(1, 3, 30, 40)
    torch.testing.assert_close(smooth(flat), flat, atol=1e-6, rtol=0)


# sketch


def test_sketch_is_the_dodged_grey_on_paper() -> None:
    height = 100
    source = picture(PAINTING, height, 80)
    grey = pixels(source) @ LUMA
    around = blurred(grey[..., None], 0.012 * height)[..., 0]
    lines = np.clip((grey + 0.02) / (around + 0.02), 0, 1)
    tone = lines**3 * (0.5 + 0.5 * np.sqrt(grey))
    paper, graphite = np.array([0.97, 0.95, 0.90]), np.array([0.16, 0.16, 0.18])
    expected = graphite + tone[..., None] * (paper - graphite)
    np.testing.assert_allclose(pixels(sketch(source)), expected, atol=1e-5)


def test_a_dark_line_is_drawn_and_a_flat_tone_is_shaded() -> None:
    source = torch.full((1, 3, 200, 200), 0.6)
    source[..., 100:102, :] = 0.1
    drawn = sketch(source).mean(1)[0]
    assert float(drawn[101].max()) < 0.25
    assert float(drawn[40].min()) > 0.8
    assert float(sketch(torch.full((1, 3, 40, 40), 0.1)).mean()) < float(drawn[40].mean()) - 0.1


# the stage


@pytest.mark.parametrize("kind", list(Style))
def test_a_picture_is_drawn_the_same_alone_or_in_a_batch(kind: Style) -> None:
    source = batch(37, 53)
    before = source.clone()
    together = stylise(source, kind)
    assert torch.equal(source, before)
    for row in range(len(source)):
        alone = stylise(source[row : row + 1], kind)
        assert torch.equal(together[row : row + 1], alone)
    if kind is Style.NONE:
        assert together is source


@pytest.mark.parametrize("kind", [Style.POSTERISE, Style.SMOOTH, Style.SKETCH])
@pytest.mark.parametrize("size", [(5, 4), (37, 53), (150, 201)])
def test_styles_change_pictures_and_keep_them_in_range(kind: Style, size: tuple[int, int]) -> None:
    source = batch(*size)
    found = stylise(source, kind)
    assert found.shape == source.shape and found.dtype == torch.float32
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert (found - source).abs().mean((1, 2, 3)).min() > 0.005


@pytest.mark.parametrize("kind", [Style.POSTERISE, Style.SMOOTH, Style.SKETCH])
def test_small_changes_of_the_source_stay_small(kind: Style) -> None:
    """The last bits in which devices differ do not show."""
    source = batch(112, 154)
    generator = torch.Generator().manual_seed(2)
    other = source + 1e-6 * (torch.rand(source.shape, generator=generator) - 0.5)
    assert float((DRAW[kind](other) - DRAW[kind](source)).abs().max()) < 1e-4
