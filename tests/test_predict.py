"""Prediction: sizes, batches, tiles, doubts, every output file, the command."""

import json
import math
import runpy
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import Kind
from flatdepth.models.preprocessing import PREPROCESSING, Preprocessing, preprocessing
from flatdepth.predict.outputs import (
    QUANTITIES,
    SUFFIXES,
    PngUnit,
    Prediction,
    colour_field,
    depth_codes,
)
from flatdepth.predict.predictor import (
    PredictOptions,
    Summary,
    choose_camera,
    doubt,
    plan_inputs,
    predict_field,
    predict_files,
    predict_tiled,
)
from tests.conftest import REPOSITORY
from tests.test_pointcloud import read_ply

pillow_heif.register_heif_opener()

CPU = torch.device("cpu")


@dataclass
class Stub:
    """A network that is any function of the image; it remembers the shapes it was given."""

    function: Callable[[Tensor], Tensor]
    kind: Kind = "metric"
    max_depth_m: float = 20.0
    needs_focal: bool = False
    multiple: int = 14
    side: int = 518
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def reach_m(self, focal_px: float) -> float:
        return self.max_depth_m * (focal_px / 100 if self.needs_focal else 1.0)

    def __call__(self, image: Tensor, focal_px: Tensor | None = None) -> Tensor:
        self.seen.append(tuple(image.shape))
        depth = self.function(image)
        if self.needs_focal:
            assert focal_px is not None
            depth = depth * focal_px[:, None, None, None] / 100
        return depth


def brightness_as_depth(image: Tensor) -> Tensor:
    """1 m where black, 5 m where white."""
    return 1 + 4 * image.mean(1, keepdim=True)


def exactly(rows: int, columns: int) -> Preprocessing:
    return replace(PREPROCESSING["ours"], rule="exact", size=(rows, columns))


def photo(path: Path, height: int = 20, width: int = 28, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(image).save(path, **options)  # type: ignore[arg-type]
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def run(
    folder: Path, out: Path, model: Stub | None = None, *arguments: str, **options: object
) -> Summary:
    chosen = PredictOptions(**{"size": 14, **options})  # type: ignore[arg-type]
    return predict_files(
        model or Stub(brightness_as_depth),
        plan_inputs(list(arguments) or [str(folder)], out, chosen),
        out,
        chosen,
        device=CPU,
        checkpoint="weights/final.safetensors",
    )


# Sizes.


@settings(deadline=None)
@given(
    height=st.integers(1, 9000), width=st.integers(1, 9000), size=st.sampled_from([14, 112, 518])
)
def test_the_shorter_side_becomes_the_size(height: int, width: int, size: int) -> None:
    rows, columns = preprocessing("ours", size).network_size(height, width)
    assert rows % 14 == 0 and columns % 14 == 0
    short, long = sorted((rows, columns))
    assert (short == columns) == (width <= height) or short == long
    aspect = max(height, width) / min(height, width)
    if aspect <= 4:
        assert short == size
        assert abs(long - size * aspect) <= 7 + 1e-6
    else:
        assert long == 4 * size
        assert abs(short - 4 * size / aspect) <= 7 + 1e-6 or short == 14


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (20, 28), (301, 77)])
def test_any_size_and_aspect_comes_out_as_it_went_in(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    photo(tmp_path / "in" / "a.png", *shape)
    out = tmp_path / "out"
    summary = run(tmp_path / "in", out, write=tuple(SUFFIXES))
    assert not summary.skipped
    height, width = shape
    assert np.load(out / "a_depth.npy").shape == shape
    assert pixels(out / "a_depth.png").shape == shape
    colours, side = pixels(out / "a_colour.png"), pixels(out / "a_side.png")
    assert colours.shape == (*shape, 3)
    assert side.shape[0] == height and side.shape[1] > 2 * width
    np.testing.assert_array_equal(side[:, :width], pixels(tmp_path / "in" / "a.png"))
    np.testing.assert_array_equal(side[:, -width:], colours)


def test_planes_survive_the_way_to_the_input_size() -> None:
    """A plane is affine in inverse depth; bilinear enlargement of depth itself would bend it."""
    rows, columns = 28, 42
    v, u = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    inverse = 0.2 + 0.5 * u + 0.3 * v
    model = Stub(lambda image: (1 / inverse).expand(len(image), 1, rows, columns))
    image = np.zeros((133, 201, 3), np.uint8)
    found = predict_field(model, [image], exactly(rows, columns), CPU, [1.0])[0]
    v_out, u_out = np.meshgrid(np.linspace(0, 1, 133), np.linspace(0, 1, 201), indexing="ij")
    np.testing.assert_allclose(found, 0.2 + 0.5 * u_out + 0.3 * v_out, rtol=2e-6)


def test_the_network_itself_is_called_as_in_training() -> None:
    """Without a change of size, the prediction is the model's own output on the image."""
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=10).eval()
    image = np.random.default_rng(0).integers(0, 256, (42, 56, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(image).movedim(-1, 0)[None].float() / 255)[0, 0].numpy()
    found = predict_field(model, [image], exactly(42, 56), CPU, [1.0])[0]
    np.testing.assert_allclose(1 / found, expected, rtol=1e-5)


# Batches.


def test_images_of_one_network_size_share_a_batch(tmp_path: Path) -> None:
    for number in range(5):
        photo(tmp_path / "in" / f"a{number}.png", 20, 28, seed=number)
        photo(tmp_path / "in" / f"b{number}.png", 40, 56, seed=number)
        photo(tmp_path / "in" / f"c{number}.png", 28, 20, seed=number)
    model = Stub(brightness_as_depth)
    summary = run(tmp_path / "in", tmp_path / "out", model, batch=4, size=28)
    assert len(summary.written) == 15
    assert sorted(shape[0] for shape in model.seen) == [1, 2, 4, 4, 4]


def test_a_batch_predicts_what_single_images_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="relative").eval()
    for number in range(3):
        photo(tmp_path / "in" / f"{number}.png", 30 + number, 42, seed=number)
    for batch in (1, 3):
        options = PredictOptions(size=28, batch=batch, write=("npy",))
        out = tmp_path / str(batch)
        inputs = plan_inputs([str(tmp_path / "in")], out, options)
        predict_files(model, inputs, out, options, device=CPU, checkpoint="")
    for number in range(3):
        one, three = (np.load(tmp_path / batch / f"{number}_depth.npy") for batch in ("1", "3"))
        np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.sampled_from([(20, 28), (28, 20), (14, 56), (9, 9)]), max_size=12))
def test_every_input_is_done_once_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    photo(folder / "in" / "first.png")
    for number, size in enumerate(sizes):
        photo(folder / "in" / f"{number}.png", *size)
    summary = run(folder / "in", folder / "out", batch=2)
    done = [item.source.name for item in summary.written]
    assert sorted(done) == sorted(["first", *map(str, range(len(sizes)))])


# Tiles.


def ramp_image(height: int, width: int) -> np.ndarray:
    v, u = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return np.stack([u, v, 0.5 * u + 0.25 * v], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["metric", "relative", "affine"])
@pytest.mark.parametrize("shape", [(150, 230), (97, 300), (260, 131), (30, 400)])
def test_tiles_of_a_linear_network_give_the_whole(kind: Kind, shape: tuple[int, int]) -> None:
    """A field that is linear in the image, each call with a scale and shift of its own.

    Tiles then differ from the whole by the rounding of the image to 8 bits (half a code of each
    channel) and, within two pixels of the whole's own input, by its resampling at the border.
    """
    gauge = np.random.default_rng(0)

    def linear(image: Tensor) -> Tensor:
        own = 0.5 + (image * torch.tensor([0.4, 0.3, 0.3]).view(1, 3, 1, 1)).sum(1, True)
        if image.shape[-2:] == (56, 56):  # a tile
            scale, shift = gauge.uniform(0.5, 2), gauge.uniform(0, 0.5)
            own = scale * own + shift
        if kind == "affine":
            own = own - 1
        return 1 / own if kind == "metric" else own

    model = Stub(linear, kind)
    image = ramp_image(*shape)
    way = preprocessing("ours", 56)
    whole = predict_field(model, [image], way, CPU, [1.0])[0]
    tiled = predict_tiled(model, image, way, CPU, 1.0, batch=3)
    assert len(model.seen) > 3
    margin = math.ceil(2 * max(shape) / max(way.network_size(*shape)))
    inner = (slice(margin, -margin), slice(margin, -margin))
    assert np.abs(tiled - whole)[inner].max() < 1.5 / 255
    assert np.abs(tiled - whole).max() < 4 * margin / 56
    # The same ramp without tiles has steps of one code per channel; seams would add to them.
    for axis in (0, 1):
        assert np.abs(np.diff(tiled, axis=axis)).max() < 1 / min(shape) + 1.5 / 255


def test_tiles_bring_detail_that_the_whole_cannot_resolve() -> None:
    """Stripes of one pixel on a ramp are gone at a quarter of the resolution, and must be back."""
    ramp = ramp_image(224, 224)[..., :1].repeat(3, axis=2)
    stripes = 40 * (np.arange(224) % 2)[None, :, None]
    image = (ramp * 0.8 + stripes).astype(np.uint8)
    model = Stub(lambda x: 0.2 + x.mean(1, keepdim=True), "relative")
    truth = 0.2 + image[..., 0] / 255
    whole = predict_field(model, [image], exactly(56, 56), CPU, [1.0])[0]
    tiled = predict_tiled(model, image, preprocessing("ours", 56), CPU, 1.0, batch=4)
    assert np.abs(whole - truth).mean() > 0.05
    assert np.abs(tiled - truth).mean() < 0.01


def test_an_image_seen_whole_needs_no_tiles() -> None:
    model = Stub(brightness_as_depth)
    image = ramp_image(50, 56)
    tiled = predict_tiled(model, image, preprocessing("ours", 56), CPU, 1.0, batch=4)
    assert len(model.seen) == 1
    whole = predict_field(model, [image], exactly(56, 70 - 7 - 7), CPU, [1.0])[0]
    np.testing.assert_array_equal(tiled, whole)


def test_the_focal_length_counts_in_pixels_of_what_the_network_sees() -> None:
    """At 100 px the stub says metres; a picture at half its size has half the focal length."""
    for height, width, focal_px in ((28, 56, 100.0), (56, 112, 200.0), (280, 560, 1000.0)):
        model = Stub(lambda image: torch.full_like(image[:, :1], 3.0), needs_focal=True)
        image = np.zeros((height, width, 3), np.uint8)
        found = predict_field(model, [image], exactly(28, 56), CPU, [focal_px])[0]
        np.testing.assert_allclose(1 / found, 3.0, rtol=1e-6)


def test_metres_that_hang_on_an_assumed_focal_length_are_doubted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "in" / "a.png")
    model = Stub(brightness_as_depth, needs_focal=True)
    run(tmp_path / "in", tmp_path / "assumed", model, write=("npy",))
    assert "field of view unknown, assumed to be 60 degrees" in capsys.readouterr().err
    run(tmp_path / "in", tmp_path / "said", model, write=("npy",), fov_deg=60.0)
    assert capsys.readouterr().err == ""
    run(
        tmp_path / "in",
        tmp_path / "longer",
        model,
        write=("npy",),
        focal_mm=36.0,
        sensor_mm="36x24",
    )
    run(
        tmp_path / "in", tmp_path / "wider", model, write=("npy",), focal_mm=18.0, sensor_mm="36x24"
    )
    longer, wider = (np.load(tmp_path / name / "a_depth.npy") for name in ("longer", "wider"))
    np.testing.assert_allclose(longer, 2 * wider, rtol=1e-5)


def test_tiled_depth_stays_in_the_range_of_the_network() -> None:
    """Tiles that reach beyond the fitted line end at the greatest depth, never behind it."""

    def spiky(image: Tensor) -> Tensor:
        depth = brightness_as_depth(image)
        if image.shape[-2:] == (28, 28):
            depth[..., ::9, ::9] = 1e9
        return depth

    model = Stub(spiky, max_depth_m=6.0)
    tiled = predict_tiled(model, ramp_image(90, 100), preprocessing("ours", 28), CPU, 1.0, batch=4)
    assert np.isfinite(tiled).all() and (1 / tiled).max() <= 6.0 * (1 + 1e-6)


# Doubts.


def flat(value: float) -> np.ndarray:
    return np.full((20, 30), value, np.float32)


def spread(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 600, dtype=np.float32).reshape(20, 30)


@pytest.mark.parametrize(
    ("values", "kind", "fix"),
    [
        (spread(1 / 5, 1 / 0.8), "metric", None),
        (spread(1 / 19.9, 1 / 3), "metric", None),
        (1 / spread(2.5, 2.8), "metric", None),
        (flat(1 / 20), "metric", "add --kind relative"),
        (1 / spread(18, 20), "metric", "add --max_depth_m"),
        (flat(0.4), "metric", "nearly constant"),
        (spread(0.0, 8), "relative", None),
        (flat(0.0), "relative", "add --kind metric"),
        (np.maximum(spread(-9, 1), 0), "relative", "0 for most pixels"),
        (flat(3.0), "relative", "nearly constant"),
        (spread(-1.0, 0.0), "affine", None),
        (flat(-0.5), "affine", "nearly constant"),
    ],
)
def test_misread_weights_are_doubted(values: np.ndarray, kind: Kind, fix: str | None) -> None:
    found = doubt(values, kind, 20.0)
    assert found is None if fix is None else found is not None and fix in found


def logits_as(kind: Kind, level: float) -> Stub:
    """A network whose logits lie around ``level``, read as ``kind``, as the model's head does."""

    def read(image: Tensor) -> Tensor:
        logits = level + 2 * image.mean(1, keepdim=True)
        return 20 * logits.sigmoid() if kind == "metric" else logits.relu()

    return Stub(read, kind)


def test_relative_weights_read_as_metric_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        photo(tmp_path / "in" / f"{number}.png", seed=number)
    for kind, level, fix in (
        ("metric", 8.0, "--kind relative"),
        ("relative", -9.0, "--kind metric"),
    ):
        run(tmp_path / "in", tmp_path / kind, logits_as(kind, level))  # type: ignore[arg-type]
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("warning: ") and "0.png" in errors[0] and fix in errors[0]
    for kind, level in (("metric", -2.6), ("relative", 3.0)):
        run(tmp_path / "in", tmp_path / f"{kind}2", logits_as(kind, level))  # type: ignore[arg-type]
        assert capsys.readouterr().err == ""


def test_a_prediction_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    for value in (math.nan, math.inf):
        model = Stub(partial(lambda value, x: torch.full_like(x[:, :1], value), value), "relative")
        summary = run(tmp_path / "in", tmp_path / "out", model)
        assert [str(item.reason) for item in summary.skipped] == [
            "the prediction is not finite; try --device cpu"
        ]
        assert not list((tmp_path / "out").iterdir())


# Files.


def prediction(values: np.ndarray, kind: Kind) -> Prediction:
    image = np.zeros((*values.shape, 3), np.uint8)
    return Prediction(image=image, field=values, kind=kind, camera=None, blur_px=1.0)


@settings(deadline=None)
@given(low=st.floats(0.002, 30), span=st.floats(0.01, 100), unit=st.sampled_from(["mm", "cm"]))
def test_metric_codes_are_off_by_half_a_unit_at_most(low: float, span: float, unit: str) -> None:
    depth = np.linspace(low, low + span, 60, dtype=np.float32).reshape(6, 10)
    codes, scale, offset = depth_codes(prediction(1 / depth, "metric"), unit)  # type: ignore[arg-type]
    assert (scale, offset) == ({"mm": 0.001, "cm": 0.01}[unit], 0)
    in_reach = depth < 65535 * scale
    decoded = codes * scale
    off = np.abs(decoded - depth) - 4 * np.finfo(np.float32).eps * depth  # two reciprocals
    assert off[in_reach & (depth > scale)].max(initial=0) <= scale / 2
    assert (codes[~in_reach] == 65535).all()
    assert codes.min() >= 1


@pytest.mark.parametrize(
    ("kind", "unit"), [("relative", "mm"), ("metric", "inverse"), ("affine", "mm")]
)
def test_codes_without_a_unit_span_the_whole_range(kind: Kind, unit: PngUnit) -> None:
    values = np.random.default_rng(0).uniform(0.3, 41, (30, 40)).astype(np.float32)
    codes, scale, offset = depth_codes(prediction(values, kind), unit)
    assert (codes.min(), codes.max()) == (0, 65535)
    np.testing.assert_allclose(codes * scale + offset, values, atol=0.51 * scale)
    constant, scale, offset = depth_codes(prediction(flat(2.0), kind), unit)
    assert (constant * scale + offset == 2.0).all()


@pytest.mark.parametrize(
    ("kind", "unit"),
    [("metric", "mm"), ("metric", "inverse"), ("relative", "mm"), ("affine", "mm")],
)
def test_depth_files_say_the_same(tmp_path: Path, kind: Kind, unit: PngUnit) -> None:
    photo(tmp_path / "in" / "a.png", 28, 42)
    out = tmp_path / "out"
    model = Stub(brightness_as_depth, kind)
    run(tmp_path / "in", out, model, write=("depth", "npy"), png_unit=unit)
    values = np.load(out / "a_depth.npy")
    assert values.dtype == np.float32
    with Image.open(out / "a_depth.png") as image:
        assert image.mode == "I;16"
        codes = np.asarray(image)
    about = json.loads((out / "a_depth.json").read_text())
    assert (about["image"], about["checkpoint"]) == ("a.png", "final.safetensors")
    assert (about["width"], about["height"], about["kind"]) == (42, 28, kind)
    assert (about["smallest"], about["largest"]) == (values.min(), values.max())
    decoded = codes * about["png"]["scale"] + about["png"]["offset"]
    in_depth = (kind, unit) == ("metric", "mm")
    inverse = QUANTITIES["affine"] if kind == "affine" else "inverse depth"
    assert about["png"]["holds"] == ("depth in metres" if in_depth else inverse)
    coded = 1 / values if (kind, unit) == ("metric", "inverse") else values
    np.testing.assert_allclose(decoded, coded, atol=0.51 * about["png"]["scale"])


def test_depth_beyond_the_codes_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        photo(tmp_path / "in" / f"{number}.png", seed=number)
    far = Stub(lambda x: 120 * x.mean(1, keepdim=True).clamp_min(0.01), max_depth_m=150)
    run(tmp_path / "in", tmp_path / "mm", far)
    errors = capsys.readouterr().err
    assert errors.count("saturate") == 1
    assert "beyond 65.535 m" in errors and "--png_unit cm" in errors
    run(tmp_path / "in", tmp_path / "cm", far, png_unit="cm")
    assert "saturate" not in capsys.readouterr().err
    assert json.loads((tmp_path / "cm" / "0_depth.json").read_text())["png"]["scale"] == 0.01


def test_colours_are_warm_near_and_cold_far(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(ramp_image(28, 140)[..., :1].repeat(3, 2)).save(tmp_path / "in" / "a.png")
    run(tmp_path / "in", tmp_path / "out", size=28)
    colours = pixels(tmp_path / "out" / "a_colour.png").astype(int)
    assert (colours[:, 5, 0] > colours[:, 5, 2] + 50).all()  # dark is near is red
    assert (colours[:, -5, 2] > colours[:, -5, 0] + 50).all()


def test_point_clouds_hold_the_depth_map(tmp_path: Path) -> None:
    """Depth 1..5 m by brightness of a smooth image: all points there, at z = -depth, coloured."""
    (tmp_path / "in").mkdir()
    image = (ramp_image(42, 56) * 0.2 + 90).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    intrinsics = (60.0, 50.0, 27.5, 22.5)
    run(tmp_path / "in", tmp_path / "o", size=42, write=("npy", "ply"), intrinsics=intrinsics)
    depth = np.load(tmp_path / "o" / "a_depth.npy").astype(np.float64).ravel()
    comments, points, colours = read_ply((tmp_path / "o" / "a_points.ply").read_bytes())
    assert any("intrinsics as given" in line for line in comments)
    np.testing.assert_array_equal(colours, image.reshape(-1, 3))
    v, u = np.divmod(np.arange(42 * 56), 56)
    fx, fy, cx, cy = intrinsics
    expected = np.stack([(u - cx) / fx * depth, -(v - cy) / fy * depth, -depth], axis=1)
    np.testing.assert_allclose(points, expected, rtol=1e-5, atol=1e-6)
    camera = json.loads((tmp_path / "o" / "a_depth.json").read_text())["camera"]
    assert (camera["fx"], camera["fy"]) == (fx, fy)
    assert (camera["cx"], camera["cy"]) == (cx + 0.5, cy + 0.5), "centres at integer + 0.5 there"


def test_edges_are_left_out_of_point_clouds(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    halves = np.zeros((56, 56, 3), np.uint8)
    halves[:, 28:] = 255
    Image.fromarray(halves).save(tmp_path / "in" / "a.png")
    run(tmp_path / "in", tmp_path / "o", size=14, write=("ply",))  # enlarged four times
    _, points, _ = read_ply((tmp_path / "o" / "a_points.ply").read_bytes())
    z = -points[:, 2]
    assert 0.6 * 56 * 56 < len(z) < 56 * 56
    assert (np.isclose(z, 1, atol=0.1) | np.isclose(z, 5, atol=0.5)).all()


def test_the_camera_comes_from_the_best_source() -> None:
    given_K = choose_camera(
        900.0, 20, 30, PredictOptions(intrinsics=(1, 2, 3, 4), unusual_camera=True)
    )
    np.testing.assert_array_equal(given_K.K_px, [[1, 0, 3.5], [0, 2, 4.5], [0, 0, 1]])
    by_fov = choose_camera(900.0, 20, 30, PredictOptions(fov_deg=90))
    np.testing.assert_allclose(by_fov.K_px, [[15, 0, 15], [0, 15, 10], [0, 0, 1]])
    by_exif = choose_camera(900.0, 20, 30, PredictOptions())
    np.testing.assert_allclose(by_exif.K_px, [[900, 0, 15], [0, 900, 10], [0, 0, 1]])
    assumed = choose_camera(None, 20, 30, PredictOptions())
    assert assumed.K_px[0, 0] == pytest.approx(15 / math.tan(math.radians(30)))
    origins = [camera.origin for camera in (given_K, by_fov, by_exif, assumed)]
    assert len(set(origins)) == 4 and "assumed" in origins[-1]


def test_nothing_of_the_metadata_travels_along(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = "SECRET"
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8769)[0xA405] = 30
    photo(
        tmp_path / "in" / "a.jpg",
        exif=exif,
        comment=b"SECRET",
        icc_profile=b"SECRET" * 30,
        xmp=b"<x>SECRET</x>",
    )
    out = tmp_path / "out"
    run(tmp_path / "in", out, write=tuple(SUFFIXES))
    files = list(out.iterdir())
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        assert b"SECRET" not in content and b"Exif" not in content, path.name
        assert str(tmp_path).encode() not in content, path.name
        if path.suffix == ".png":
            assert png_chunks(content) == {b"IHDR", b"IDAT", b"IEND"}
            with Image.open(path) as image:
                assert image.height > image.width or "side" in path.name  # upright


def png_chunks(content: bytes) -> set[bytes]:
    kinds, at = set(), 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kinds.add(content[at + 4 : at + 8])
        at += 12 + length
    return kinds


def test_equal_names_in_different_folders_do_not_collide(tmp_path: Path) -> None:
    for number, name in enumerate(("p/1.png", "q/1.png", "q/1.jpg")):
        photo(tmp_path / name, seed=number)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "p" / "1.png"), str(tmp_path / "q")]
    summary = run(tmp_path, out, None, *arguments, write=("npy",))
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.npy")}
    assert found == {"p/1_depth.npy", "q/1.png_depth.npy", "q/1.jpg_depth.npy"}
    assert len({np.load(out / name).tobytes() for name in found}) == 3
    assert str(summary) == f"3 predicted; outputs in {out}"


def test_outputs_are_never_replaced_silently(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "in" / "b.png")
    out = tmp_path / "out"
    run(tmp_path / "in", out, write=("colour",))
    before = (out / "a_colour.png").read_bytes()
    brighter = Stub(lambda x: 7 - brightness_as_depth(x))
    with pytest.raises(UserError, match=r"a_colour\.png and 1 more .* add --overwrite"):
        run(tmp_path / "in", out, brighter, write=("side", "colour"))
    assert not list(out.glob("*_side.png"))
    assert (out / "a_colour.png").read_bytes() == before
    run(tmp_path / "in", out, brighter, write=("colour",), overwrite=True)
    assert (out / "a_colour.png").read_bytes() != before


def test_an_output_folder_that_cannot_be_is_a_mistake(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path / "in", tmp_path / "file" / "out")


def test_a_name_too_long_for_outputs_is_named(tmp_path: Path) -> None:
    photo(tmp_path / "in" / f"{'x' * 251}.png")
    photo(tmp_path / "in" / "a.png")
    summary = run(tmp_path / "in", tmp_path / "out", write=("npy",))
    assert [item.source.name for item in summary.written] == ["a"]
    assert [item.reason for item in summary.skipped] == [
        "its name is too long for outputs; shorten it"
    ]


def test_large_pictures_come_last_and_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatdepth.predict.predictor.LARGE_PIXELS", 30 * 40)
    for number in range(6):
        photo(tmp_path / "in" / f"{number}.png", 30, 40 + number % 2, seed=number)
    model = Stub(brightness_as_depth)
    summary = run(tmp_path / "in", tmp_path / "out", model, batch=4)
    assert [item.source.name for item in summary.written] == ["0", "2", "4", "1", "3", "5"]
    assert [shape[0] for shape in model.seen] == [3, 1, 1, 1]


@pytest.mark.parametrize(("kind", "product"), [("relative", "ply"), ("affine", "glb")])
def test_point_clouds_and_meshes_need_metric_depth(
    tmp_path: Path, kind: Kind, product: str
) -> None:
    photo(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match=f"--write {product}: .* take metric weights for point"):
        run(tmp_path / "in", tmp_path / "o", Stub(brightness_as_depth, kind), write=(product,))


def test_colours_of_depth_up_to_scale_and_shift_do_not_depend_on_either() -> None:
    values = spread(0.0, 1.0)
    colours = colour_field(values, "affine")
    np.testing.assert_array_equal(colours, colour_field(np.float32(8) * values - 2, "affine"))
    near, far = colours[0, 0].astype(int), colours[-1, -1].astype(int)
    assert near[0] > near[2] and far[2] > far[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "--size"),
        ({"batch": 0}, "--batch: expected 1 to 1024"),
        ({"fov_deg": 180.0}, "--fov: expected degrees between 0 and 180"),
        ({"fov_deg": 60.0, "intrinsics": (1.0, 1.0, 1.0, 1.0)}, "--fov: --intrinsics says"),
        ({"intrinsics": (0.0, 1.0, 1.0, 1.0)}, "--intrinsics: fx: expected 0.001 to"),
        ({"prune": 0.0}, "--prune: expected 1e-06 to"),
        ({"write": ()}, "--write: expected some of depth, npy"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        PredictOptions(**options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_size_that_the_network_does_not_take_is_named(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    model = Stub(brightness_as_depth)
    with pytest.raises(UserError, match="--size: expected a positive multiple of 14, got 500; the"):
        run(tmp_path / "in", tmp_path / "out", model, size=500)
    model.multiple, model.side = 32, 512
    run(tmp_path / "in", tmp_path / "out", model, size=None)
    assert model.seen == [(1, 3, 512, 704)]  # 20 x 28 px


# The command.


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=8)
    return save_weights(model, tmp_path_factory.mktemp("weights") / "final")[1]


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the predict.py command."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "tools" / "predict.py"), run_name="__main__")
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_the_command_from_weights_to_files(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "b.png")
    out = tmp_path / "out"
    options = ["--checkpoint", weights, "--size", 28, "--device", "cpu", "--tiles"]
    code, text, errors = command(
        monkeypatch,
        capsys,
        tmp_path / "in",
        *options,
        "--out",
        out,
        "--write",
        "depth,ply,glb",
        "--intrinsics=20,20,14,10",
        tmp_path / "b.png",
    )
    assert (code, text) == (0, f"2 predicted; outputs in {out}\n"), errors
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {
        f"{name}_{product}"
        for name in ("in/a", "b")
        for product in ("depth.png", "depth.json", "points.ply", "mesh.glb")
    }
    assert "loaded 155 of 155 tensors" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--checkpoint", "W"], "required"),
        (["IN", "--checkpoint", "nowhere.pth", "--out", "O"], "nowhere.pth"),
        (["nowhere.jpg", "--checkpoint", "W", "--out", "O"], "nowhere.jpg: no such file"),
        (["IN", "--checkpoint", "W", "--out", "IN"], "--out"),
        (["IN", "--checkpoint", "W", "--out", "O", "--write", "depht"], "got 'depht'"),
        (["IN", "--checkpoint", "W", "--out", "O", "--intrinsics", "1,2"], "expected FX,FY,CX,CY"),
        (["IN", "--checkpoint", "W", "--out", "O", "--size", "500"], "the nearest is 504"),
        (
            ["IN", "--checkpoint", "W", "--out", "O", "--write", "ply", "--intrinsics=1,1,14,10"],
            "--focal_mm 18 --sensor_mm 36x24",
        ),
        (["IN", "--checkpoint", "W", "--out", "O", "--overwrit"], "--overwrit"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    photo(tmp_path / "in" / "a.png")
    places = {"W": weights, "O": tmp_path / "out", "IN": tmp_path / "in"}
    monkeypatch.chdir(tmp_path)
    code, text, errors = command(
        monkeypatch, capsys, *(places.get(argument, argument) for argument in arguments)
    )
    assert (code, text) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and message in last, errors
    assert "Traceback" not in errors
