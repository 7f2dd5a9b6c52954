"""Preprocessing against the processors of transformers and diffusers, OpenCV, and closed forms."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.geometry import View, view_image
from flatdepth.models.preprocessing import PREPROCESSING, Preprocessing, preprocessing

SHAPES = [(480, 640), (640, 480), (375, 1242), (333, 500), (30, 40), (7, 5), (61, 700), (518, 518)]
"""Landscape, portrait, wide, odd, tiny, tinier than any padding, extreme, right as it is."""

SIDES = st.integers(1, 3000)


def codes(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """8-bit noise with coarse structure: every filter gives it another look."""
    draw = np.random.default_rng(seed)
    height, width = shape
    coarse = draw.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3)).repeat(9, 0).repeat(9, 1)
    fine = draw.integers(-60, 61, (height, width, 3))
    return (coarse[:height, :width] + fine).clip(0, 255).astype(np.uint8)


def floats(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).movedim(-1, 0)[None].float() / 255


def prediction_for(system: Preprocessing, shape: tuple[int, int]) -> Tensor:
    size = system.network_size(*shape)
    return torch.rand((1, 1, *size), generator=torch.Generator().manual_seed(0)) * 5


def assert_same_codes(found: Tensor, expected: Tensor) -> None:
    """Equal to 8 bits but for a few last digits, where fixed-point arithmetic rounds otherwise.

    They are many (6 %) only where the ratio of the sides is so simple that halves are frequent.
    """
    assert found.shape == expected.shape
    difference = (255 * (found - expected)).abs()
    assert difference.max() < 2.01
    assert (difference > 0.01).float().mean() < 0.08


# Sizes.


@pytest.mark.parametrize(
    ("name", "shape", "size", "expected"),
    [
        ("ours", (480, 640), 518, (518, 686)),
        ("ours", (300, 3000), 518, (210, 2072)),
        ("depth_anything_v2", (480, 640), 518, (518, 686)),
        ("depth_anything_v2", (200, 300), 518, (518, 784)),
        ("depth_anything_v2", (300, 1000), 518, (518, 1722)),
        ("depth_anything_v2_hf", (480, 640), 518, (518, 686)),
        ("depth_anything_v2_hf", (200, 300), 518, (350, 518)),
        ("depth_anything_v2_hf", (300, 1000), 518, (154, 518)),
        ("depth_anything_3", (480, 640), 504, (378, 504)),
        ("depth_anything_3", (1080, 1920), 504, (280, 504)),
        ("depth_anything_3", (504, 497), 504, (504, 504)),
        ("depth_anything_3", (504, 496), 504, (504, 490)),
        ("depth_anything_3", (30, 4000), 504, (14, 504)),
        ("midas_v21", (480, 640), 384, (288, 384)),
        ("midas_v21", (640, 480), 384, (384, 288)),
        ("midas_v21", (30, 40), 384, (288, 384)),
        ("midas_v21_small", (1080, 1920), 256, (128, 256)),  # 4.5 multiples: the even one
        ("midas_v21_small", (480, 640), 256, (192, 256)),
        ("dpt", (480, 640), 384, (384, 512)),
        ("dpt", (1080, 1920), 384, (384, 672)),
        ("dpt", (30, 40), 384, (288, 384)),
        ("dpt", (480, 640), 512, (512, 672)),
        ("dpt_square", (480, 640), 384, (384, 384)),
        ("dpt_swin2_hf", (480, 640), 256, (256, 256)),
        ("zoedepth", (480, 640), 384, (384, 512)),
        ("zoedepth", (640, 480), 384, (672, 512)),
        ("zoedepth", (375, 1242), 384, (384, 1152)),
        ("zoedepth", (1080, 1920), 384, (384, 672)),
        ("marigold", (480, 640), 768, (576, 768)),
        ("marigold", (375, 1242), 768, (232, 768)),
        ("marigold", (30, 4000), 768, (8, 768)),
        ("resnet50", (480, 640), 224, (224, 288)),
    ],
)
def test_network_sizes_are_those_of_the_originals(
    name: str, shape: tuple[int, int], size: int, expected: tuple[int, int]
) -> None:
    """Worked out by hand from the rules of the originals' code."""
    assert preprocessing(name, size).network_size(*shape) == expected


@settings(deadline=None)
@given(height=SIDES, width=SIDES, name=st.sampled_from(sorted(PREPROCESSING)))
def test_sizes_obey_their_rules(height: int, width: int, name: str) -> None:
    system = preprocessing(name)
    rows, columns = system.network_size(height, width)
    multiple = system.multiple
    assert rows % multiple == 0 and columns % multiple == 0 and min(rows, columns) > 0
    if system.rule == "exact":
        assert (rows, columns) == system.size
    elif system.rule == "lower":
        long = max(rows, columns)
        assert min(rows, columns) == system.size[0] or long == system.most_aspect * system.size[0]
    elif system.rule == "minimal":
        assert rows == system.size[0] or columns == system.size[1]
    else:
        assert max(rows, columns) == system.size[0]
    if system.rule != "exact" and not system.reflect:
        wanted = rows * width / height
        half = multiple * (0.5 + 0.5 * width / height) + 1  # each side rounded by itself
        # Rounding down to a pixel, then up to a multiple, moves by a whole one.
        slack = 2 * half if system.rule == "longer" else half
        assert abs(columns - wanted) <= slack + 1e-6 or min(rows, columns) == multiple


def test_another_size_keeps_the_proportions_and_says_what_fits() -> None:
    assert preprocessing("zoedepth", 768).size == (768, 1024)
    assert preprocessing("zoedepth", 448).size == (448, 608)  # 597.3 to the nearest 32
    assert preprocessing("ours").size == (518, 518)
    assert preprocessing("ours", 256, multiple=32).network_size(480, 640) == (256, 352)
    with pytest.raises(UserError, match="multiple of 14, got 500; the nearest is 504"):
        preprocessing("depth_anything_v2", 500)
    for wrong in (0, -14, 100_002):
        with pytest.raises(UserError, match="size: expected 14 to"):
            preprocessing("ours", wrong)
    with pytest.raises(UserError, match=r"expected one of ours, .*, found 'midas'"):
        preprocessing("midas")


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), name=st.sampled_from(sorted(PREPROCESSING))
)
def test_pictures_of_any_size_go_there_and_back(height: int, width: int, name: str) -> None:
    system = preprocessing(name, PREPROCESSING[name].multiple)
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    prepared = system.prepare(image)
    assert prepared.shape == (2, 3, *system.network_size(height, width))
    assert prepared.dtype == image.dtype
    torch.testing.assert_close(system.prepare(image[:1]), prepared[:1])
    if system.eight_bit or system.resample != "bicubic":
        assert prepared.min() >= 0 and prepared.max() <= 1
    back = system.restore(prepared[:, :1], height, width)
    assert back.shape == (2, 1, height, width)
    constant = system.prepare(torch.full((1, 3, height, width), 0.6))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.6))
    same = system.restore(constant[:, :1], height, width)
    torch.testing.assert_close(same, torch.full_like(same, 0.6))


def test_a_prediction_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        preprocessing("marigold").restore(torch.zeros(1, 1, 570, 768), 480, 640)


# Pixels.


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_shows_the_network_what_training_does(shape: tuple[int, int]) -> None:
    system = preprocessing("ours", 56)
    rows, columns = system.network_size(*shape)
    image = floats(codes(shape))
    view = View(
        top=0, left=0, crop_height=shape[0], crop_width=shape[1], height=rows, width=columns
    )
    assert torch.equal(system.prepare(image)[0], view_image(image[0], view))


@pytest.mark.parametrize(
    ("name", "settings_of_the_hub"),
    [
        (
            "depth_anything_v2_hf",
            {
                "size": {"height": 518, "width": 518},
                "keep_aspect_ratio": True,
                "ensure_multiple_of": 14,
                "resample": 3,
            },
        ),
        ("dpt_hf", {"size": {"height": 384, "width": 384}, "resample": 2}),
        (
            "dpt_swin2_hf",
            {
                "size": {"height": 384, "width": 384},
                "keep_aspect_ratio": False,
                "ensure_multiple_of": 32,
                "resample": 3,
            },
        ),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_dpt_processor_of_transformers(
    name: str, settings_of_the_hub: dict[str, Any], shape: tuple[int, int]
) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.DPTImageProcessor(do_normalize=False, **settings_of_the_hub)
    system, image = preprocessing(name), codes(shape)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert_same_codes(system.prepare(floats(image)), expected)
    processor.do_rescale = False  # floats, for the filter itself
    expected = processor(floats(image)[0], return_tensors="pt")["pixel_values"].clamp(0, 1)
    found = replace(system, eight_bit=False).prepare(floats(image))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    prediction = prediction_for(system, shape)
    (back,) = processor.post_process_depth_estimation(
        SimpleNamespace(predicted_depth=prediction[:, 0]), [shape]
    )
    restored = system.restore(prediction, *shape)[0, 0]
    torch.testing.assert_close(restored, back["predicted_depth"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_zoedepth_processor_of_transformers(shape: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.ZoeDepthImageProcessor(
        do_normalize=False,
        size={"height": 384, "width": 512},
        keep_aspect_ratio=True,
        ensure_multiple_of=32,
    )
    system, image = preprocessing("zoedepth"), codes(shape)
    found = system.prepare(floats(image))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    prediction = prediction_for(system, shape)
    (back,) = processor.post_process_depth_estimation(
        SimpleNamespace(predicted_depth=prediction[:, 0]), source_sizes=[shape]
    )
    restored = system.restore(prediction, *shape)[0, 0]
    torch.testing.assert_close(restored, back["predicted_depth"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_marigold_processor_of_diffusers(shape: tuple[int, int]) -> None:
    module = pytest.importorskip("diffusers.pipelines.marigold.marigold_image_processing")
    processor = module.MarigoldImageProcessor(vae_scale_factor=8, do_normalize=False)
    system, image = preprocessing("marigold"), codes(shape)
    found = system.prepare(floats(image))
    expected, padding, _ = processor.preprocess(image, 768)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    prediction = prediction_for(system, shape)
    unpadded = processor.unpad_image(prediction, padding)
    back = processor.resize_antialias(unpadded, shape, "bilinear", is_aa=False)
    torch.testing.assert_close(system.restore(prediction, *shape), back, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["depth_anything_v2", "midas_v21", "dpt", "dpt_square"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cubic_resampling_is_that_of_opencv(name: str, shape: tuple[int, int]) -> None:
    """The originals resize float64 in 0..1 and keep what overshoots."""
    cv2 = pytest.importorskip("cv2")
    system, image = preprocessing(name, 224), codes(shape)
    rows, columns = system.network_size(*shape)
    expected = cv2.resize(image / 255.0, (columns, rows), interpolation=cv2.INTER_CUBIC)
    found = system.prepare(floats(image))[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert found.max() > 1


@pytest.mark.parametrize("shape", [*SHAPES, (504, 380), (1512, 1008), (800, 504), (90, 1100)])
def test_depth_anything_3_resizes_twice_as_opencv_does(shape: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    image = codes(shape)
    scale = 504 / max(shape)
    once = tuple(round(side * scale) for side in shape)
    filters = cv2.INTER_AREA, cv2.INTER_CUBIC
    step = cv2.resize(image, once[::-1], interpolation=filters[scale > 1])
    twice = tuple(min(range(14, 519, 14), key=lambda n: (abs(n - side), -n)) for side in once)
    grows = any(new > old for new, old in zip(twice, once, strict=True))
    expected = cv2.resize(step, twice[::-1], interpolation=filters[grows])
    assert_same_codes(preprocessing("depth_anything_3").prepare(floats(image)), floats(expected))


@pytest.mark.parametrize("sides", [(100, 56), (97, 42), (1234, 28), (56, 56), (41, 28)])
def test_area_is_the_mean_over_each_new_pixel(sides: tuple[int, int]) -> None:
    """The integral of the piecewise constant image, by the definition, in float64."""
    source, target = sides
    values = np.random.default_rng(0).uniform(size=source)
    edges = np.linspace(0, source, target + 1)
    integral = np.interp(edges, np.arange(source + 1), np.concatenate([[0], values.cumsum()]))
    expected = np.diff(integral) * target / source
    system = Preprocessing(
        size=(target, target), rule="exact", multiple=14, resample="area", resample_back="bilinear"
    )
    image = torch.from_numpy(values).expand(1, 3, 60, source)
    for found in (
        system.prepare(image)[0, 1, 3],
        system.prepare(image.mT)[0, 1, :, 3],
    ):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


# Where things are.


def origin(system: Preprocessing, side: int, network: int) -> np.ndarray:
    """Where in a picture lies what comes back at each of its pixel centres, in pixels.

    Closed form: both ways are lines, through the outermost centres if corners are aligned, through
    the outermost edges else.
    """

    def across(x: np.ndarray, source: int, target: int, how: str) -> np.ndarray:
        if how.endswith("corners"):
            return (x - 0.5) * (target - 1) / (source - 1) + 0.5
        return x * target / source

    pad = int(3 * (side / 2) ** 0.5) if system.reflect else 0
    padded = side + 2 * pad
    seen = across(np.arange(side) + 0.5 + pad, padded, network, system.resample_back)
    return across(seen, network, padded, system.resample) - pad


@pytest.mark.parametrize("name", sorted(PREPROCESSING))
@pytest.mark.parametrize("shape", [(480, 640), (700, 504), (96, 128)])
def test_a_ramp_comes_back_where_it_was(name: str, shape: tuple[int, int]) -> None:
    """A network that returns its input returns a ramp, moved by the original's own corners only.

    A filter may displace single pixels (cubic with a = -0.75 by 0.048 of the coarser map's), so a
    line is fitted to the ramp inside of the borders and looked at from border to border. With
    corners aligned one way only it ends up to 0.4 pixels from where it was.
    """
    system = replace(PREPROCESSING[name], eight_bit=False)
    height, width = shape
    rows, columns = system.network_size(height, width)  # multiples at once, so not padded
    for axis, side, network in ((0, height, rows), (1, width, columns)):
        u = np.arange(side) + 0.5
        ramp = torch.from_numpy(u / side).float()
        image = (ramp if axis else ramp[:, None]).expand(1, 3, height, width)
        back = system.restore(system.prepare(image)[:, :1], height, width)[0, 0].double().numpy()
        found = side * (back[height // 2] if axis else back[:, width // 2])
        coarser = max(1, side / network)
        inner = slice(round(5 * coarser), -round(5 * coarser))
        expected = origin(system, side, network)
        assert np.abs(found - expected)[inner].max() < 0.15 * coarser
        fitted = np.polyval(np.polyfit(u[inner], found[inner], 1), u)
        np.testing.assert_allclose(fitted, expected, atol=0.08 * coarser)


@pytest.mark.parametrize("name", sorted(PREPROCESSING))
def test_which_systems_move_what_is_at_the_borders(name: str) -> None:
    """Aligned corners one way only: half the difference of the pixels at borders, opposite."""
    system = PREPROCESSING[name]
    rows, _ = system.network_size(960, 1280)
    shift = origin(system, 960, rows) - (np.arange(960) + 0.5)
    assert abs(shift[0] + shift[-1]) < 1e-9
    if name in ("ours", "depth_anything_v2", "resnet50"):
        assert shift[0] == pytest.approx(0.5 * (960 / rows - 1))
    elif name == "zoedepth":
        padded = 960 + 2 * 65
        assert shift[0] == pytest.approx(-0.5 * (padded / rows - 1), rel=0.2)  # inside its padding
    else:
        assert np.abs(shift).max() < 1e-9
