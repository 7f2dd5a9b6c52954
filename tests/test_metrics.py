"""Depth metrics, SSIM, flatness, region table, bootstrap: hand-worked values, oracles, laws."""

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flatdepth.judge.metrics import (
    RegionTable,
    bootstrap_means,
    flatness_residual,
    image_metrics,
    mean_over,
    percentile_interval,
    plane_normal_angle_deg,
    region_masks,
    ssim_map,
)
from flatdepth.types import ALL_METRICS, METRICS, REGIONS, Region

SEEDS = st.integers(0, 2**32 - 1)
RANGE = {"min_m": 1e-3, "max_m": 10.0}
PERFECT = {name: float(name.startswith("delta")) for name in METRICS}


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def scene(seed: int, b: int = 3, h: int = 11, w: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """(prediction, truth, mask), all within ``RANGE``."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.5, 6.0, (b, 1, h, w))
    pred = (truth * np.exp(rng.normal(0.1, 0.2, truth.shape))).clip(0.01, 9.9)
    mask = rng.random(truth.shape) < rng.uniform(0.1, 1.0)
    mask[..., 0, 0] = True
    return torch.tensor(pred).float(), torch.tensor(truth).float(), torch.tensor(mask)


def by_name(values: Tensor) -> dict[str, float]:
    return dict(zip(METRICS, values.tolist(), strict=True))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- image_metrics -----------------------------------------------------------------------------


def test_worked_by_hand() -> None:
    """p - t = 0, 2, -2 and p / t = 1, 2, 1/2: every mean has 3 terms."""
    values, pixels = image_metrics(row(1, 4, 2), row(1, 2, 4), row(1, 1, 1) > 0, **RANGE)
    ln2 = math.log(2)
    assert pixels.tolist() == [3]
    assert by_name(values[0]) == pytest.approx(
        {
            "abs_rel": (1 + 0.5) / 3,
            "sq_rel": (4 / 2 + 4 / 4) / 3,
            "rmse": math.sqrt(8 / 3),
            "rmse_log": ln2 * math.sqrt(2 / 3),
            "log10": 2 * math.log10(2) / 3,
            "silog": 100 * ln2 * math.sqrt(2 / 3),
            "mae": 4 / 3,
            "delta1": 1 / 3,
            "delta2": 1 / 3,
            "delta3": 1 / 3,
            "delta105": 1 / 3,
        },
        rel=1e-14,
    )


def test_silog_takes_the_mean_off() -> None:
    """d = 0, ln 4: mean ln 2, variance (ln 2)^2."""
    values, _ = image_metrics(row(1, 4), row(1, 1), row(1, 1) > 0, **RANGE)
    assert by_name(values[0])["silog"] == pytest.approx(100 * math.log(2), rel=1e-14)


def test_delta_thresholds_are_strict_and_symmetric() -> None:
    """1.25 itself is outside delta1, 1.5625 outside delta2, 1.953125 outside delta3."""
    ratios = (1.2, 1.25, 1.5, 1.5625, 1.75, 1.953125, 2.5, 1.0)
    one = torch.ones(1, 1, 1, 8)
    for pred, truth in ((row(*ratios), one), (one, row(*ratios))):
        found = by_name(image_metrics(pred, truth, one > 0, **RANGE)[0][0])
        assert [found[f"delta{k}"] for k in (1, 2, 3)] == [2 / 8, 4 / 8, 6 / 8]


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS)
def test_against_numpy(seed: int) -> None:
    pred, truth, mask = scene(seed)
    values, pixels = image_metrics(pred, truth, mask, **RANGE)
    assert values.dtype == torch.float64 and pixels.dtype == torch.int64
    for i in range(3):
        inside = mask[i].numpy()
        p, t = (x[i].numpy()[inside].astype(np.float64) for x in (pred, truth))
        log = np.log(p / t)
        worse = np.where(p > t, p / t, t / p)
        expected = {
            "abs_rel": np.mean(np.abs(p - t) / t),
            "sq_rel": np.mean((p - t) ** 2 / t),
            "rmse": np.linalg.norm(p - t) / np.sqrt(len(t)),
            "rmse_log": np.linalg.norm(log) / np.sqrt(len(t)),
            "log10": np.mean(np.abs(np.log10(p / t))),
            "silog": 100 * np.std(log),
            "mae": np.mean(np.abs(p - t)),
            "delta1": np.mean(worse < 1.25),
            "delta2": np.mean(worse < 1.5625),
            "delta3": np.mean(worse < 1.953125),
            "delta105": np.mean(worse < 1.05),
        }
        assert pixels[i] == len(t)
        assert by_name(values[i]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_a_perfect_prediction(seed: int) -> None:
    _, truth, mask = scene(seed)
    values, _ = image_metrics(truth, truth, mask, **RANGE)
    assert [by_name(v) for v in values] == [PERFECT] * 3


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, scale=st.floats(0.05, 20.0))
def test_silog_ignores_scale(seed: int, scale: float) -> None:
    """Float64 inputs, so that scaling rounds nothing away."""
    pred, truth, mask = scene(seed)
    wide = {"min_m": 1e-6, "max_m": 1e6}
    plain, _ = image_metrics(pred.double(), truth, mask, **wide)
    scaled, _ = image_metrics(pred.double() * scale, truth, mask, **wide)
    column = list(METRICS).index("silog")
    torch.testing.assert_close(scaled[:, column], plain[:, column], rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, poison=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30]))
def test_pixels_outside_the_mask_never_enter(seed: int, poison: float) -> None:
    pred, truth, mask = scene(seed)
    expected = image_metrics(pred, truth, mask, **RANGE)
    found = image_metrics(pred.where(mask, poison), truth.where(mask, poison), mask, **RANGE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_predictions_are_brought_into_the_range() -> None:
    """NaN, -inf, a negative depth and 0 read as min_m, what is beyond max_m as max_m."""
    wild = row(math.nan, -math.inf, -3, 0, math.inf, 1e9, 5)
    tame = row(0.5, 0.5, 0.5, 0.5, 8, 8, 5)
    truth, mask = row(1, 2, 3, 4, 5, 6, 7), row(*[1] * 7) > 0
    found, _ = image_metrics(wild, truth, mask, min_m=0.5, max_m=8.0)
    assert found.isfinite().all()
    assert torch.equal(found, image_metrics(tame, truth, mask, min_m=0.5, max_m=8.0)[0])


def test_an_image_without_pixels_is_0_and_leaves_its_neighbours_alone() -> None:
    pred, truth, mask = scene(0)
    expected, _ = image_metrics(pred, truth, mask, **RANGE)
    mask[1] = False
    values, pixels = image_metrics(pred, truth, mask, **RANGE)
    assert pixels[1] == 0 and (values[1] == 0).all()
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


@pytest.mark.usefixtures("restore_threads")
def test_bits_depend_on_neither_batch_nor_threads() -> None:
    """Images above the 32,768 elements from which torch shares a sum between threads."""
    pred, truth, _ = scene(1, b=3, h=190, w=201)
    mask = pred < 6
    assert (mask.sum((1, 2, 3)) > 32_768).all()
    K_px = camera(190, 201).expand(3, 3, 3)

    def everything(part: slice) -> Tensor:
        p, t, m, k = pred[part], truth[part], mask[part], K_px[part]
        metrics, _ = image_metrics(p, t, m, **RANGE)
        flat = flatness_residual(p, k, m, **RANGE), plane_normal_angle_deg(p, t, k, m, **RANGE)
        return torch.cat([metrics, torch.stack(flat, dim=1)], dim=1)

    expected = everything(slice(None))
    for threads, size in ((1, 3), (1, 1), (2, 2)):
        torch.set_num_threads(threads)
        parts = [everything(slice(i, i + size)) for i in range(0, 3, size)]
        assert torch.equal(torch.cat(parts), expected)


# --- regions -----------------------------------------------------------------------------------


def test_region_masks_of_pasted_images_partition_the_valid_pixels() -> None:
    rng = np.random.default_rng(0)
    region = torch.tensor(rng.integers(0, 5, (2, 1, 20, 20)), dtype=torch.uint8)
    valid = torch.tensor(rng.random((2, 1, 20, 20)) < 0.7)
    masks = region_masks(region, valid, flat_known=True)
    assert set(masks) == set(REGIONS) - {"clean"}
    parts = torch.stack([masks[r.name.lower()] for r in Region])
    assert torch.equal(parts.sum(0), valid.long())
    for r in Region:
        assert (region[masks[r.name.lower()]] == r).all()
    assert torch.equal(masks["flat"], valid & ((region == 1) | (region == 2)))


def test_region_masks_of_clean_images() -> None:
    valid = torch.rand(2, 1, 4, 4) < 0.5
    masks = region_masks(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), valid, flat_known=False)
    assert list(masks) == ["clean"]
    assert torch.equal(masks["clean"], valid)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_against_torchmetrics(seed: int) -> None:
    """Its logarithmic error takes ln(1 + x), hence the - 1."""
    pred, truth, mask = scene(seed, b=1)
    found = by_name(image_metrics(pred, truth, mask, **RANGE)[0][0])
    p, t = pred[mask].double(), truth[mask].double()
    expected = {
        "abs_rel": tm.mean_absolute_percentage_error(p, t),
        "mae": tm.mean_absolute_error(p, t),
        "rmse": tm.mean_squared_error(p, t, squared=False),
        "rmse_log": tm.mean_squared_log_error(p - 1, t - 1).sqrt(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-6), name


# --- SSIM --------------------------------------------------------------------------------------


def similarity(pred: Tensor, truth: Tensor, mask: Tensor) -> tuple[float, int]:
    mean, pixels = mean_over(*ssim_map(pred, truth, mask, **RANGE))
    return mean.item(), int(pixels)


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, h=st.integers(12, 30), w=st.integers(12, 30))
def test_ssim_against_scikit_image_and_torchmetrics(seed: int, h: int, w: int) -> None:
    """Both with the Gaussian window of 11 px; torchmetrics invents values beyond the border."""
    pred, truth, _ = scene(seed, 1, h, w)
    everywhere = torch.ones(1, 1, h, w, dtype=torch.bool)
    values, complete = ssim_map(pred, truth, everywhere, **RANGE)
    p, t = pred.double(), truth.double()
    extent = float(t.max() - t.min())
    mean, full = structural_similarity(
        p[0, 0].numpy(),
        t[0, 0].numpy(),
        data_range=extent,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    inner = values[0, 0, 5:-5, 5:-5].numpy()
    np.testing.assert_allclose(inner, full[5:-5, 5:-5], rtol=1e-9, atol=1e-9)
    assert complete.sum() == (h - 10) * (w - 10)
    assert similarity(pred, truth, everywhere)[0] == pytest.approx(mean, rel=1e-9)
    _, other = structural_similarity_index_measure(p, t, data_range=extent, return_full_image=True)
    if other.shape == values.shape:
        other = other[..., 5:-5, 5:-5]
    np.testing.assert_allclose(inner, other[0, 0].numpy(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, poison=st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30]))
def test_ssim_knows_nothing_outside_the_mask(seed: int, poison: float) -> None:
    pred, truth, _ = scene(seed, 2, 26, 31)
    rng = np.random.default_rng(seed)
    mask = torch.tensor(rng.random(truth.shape) > 0.003)
    values, complete = ssim_map(pred, truth, mask, **RANGE)
    poisoned = ssim_map(pred.where(mask, poison), truth.where(mask, poison), mask, **RANGE)
    assert values.isfinite().all()
    assert torch.equal(poisoned[0], values) and torch.equal(poisoned[1], complete)
    windows = np.lib.stride_tricks.sliding_window_view(mask.numpy(), (11, 11), axis=(2, 3))
    expected = np.zeros(mask.shape, bool)
    expected[..., 5:-5, 5:-5] = windows.all((-1, -2))
    assert (complete.numpy() == expected).all()


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, scale=st.floats(0.1, 1.6))
def test_ssim_of_equal_maps_is_1_and_a_common_scale_changes_nothing(
    seed: int, scale: float
) -> None:
    pred, truth, mask = (x[..., :20, :20] for x in scene(seed, 1, 20, 20))
    mask = torch.ones_like(mask)
    assert similarity(truth, truth, mask)[0] == pytest.approx(1.0, abs=1e-12)
    pred = pred.double().clamp(0.1, 6)
    plain = similarity(pred, truth.double(), mask)
    scaled = similarity(scale * pred, scale * truth.double(), mask)
    assert scaled[0] == pytest.approx(plain[0], rel=1e-9)
    assert similarity(truth + 1, truth, mask)[0] < 1


def test_ssim_of_a_bare_wall_and_of_nothing_is_finite() -> None:
    wall = torch.full((1, 1, 15, 15), 2.0)
    everywhere = torch.ones(1, 1, 15, 15, dtype=torch.bool)
    assert similarity(wall, wall, everywhere) == (pytest.approx(1.0), 25)
    assert similarity(wall, wall, ~everywhere) == (0.0, 0)
    assert 0 < similarity(wall * 1.5, wall, everywhere)[0] < 1


# --- flatness ----------------------------------------------------------------------------------


def camera(h: int, w: int) -> Tensor:
    """Off-centre principal point, unequal focal lengths, and some skew."""
    K = [[1.2 * w, 0.03 * w, 0.4 * w], [0.0, 1.5 * w, 0.55 * h], [0.0, 0.0, 1.0]]
    return torch.tensor([K], dtype=torch.float64)


def rays(K_px: Tensor, h: int, w: int) -> np.ndarray:
    """(h, w, 3) rays through the pixel centres, by inverting the camera."""
    v, u = np.mgrid[0:h, 0:w] + 0.5
    return np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K_px[0].numpy()).T


def depth_of(inverse: np.ndarray) -> Tensor:
    return torch.tensor(1 / inverse)[None, None]


def test_flatness_of_a_plane_is_0() -> None:
    K_px = camera(30, 40)
    inverse = rays(K_px, 30, 40) @ np.array([0.2, -0.1, 0.5])
    everywhere = torch.ones(1, 1, 30, 40, dtype=torch.bool)
    assert flatness_residual(depth_of(inverse), K_px, everywhere, **RANGE).item() < 1e-14
    stored = depth_of(inverse).float()
    assert flatness_residual(stored, K_px, everywhere, **RANGE).item() < 1e-7


def test_flatness_of_a_chequerboard_relief_is_its_height() -> None:
    """+-a on alternate pixels of an even grid is orthogonal to 1, x and y: no fit absorbs any."""
    K_px = camera(30, 40)
    plane = rays(K_px, 30, 40) @ np.array([0.2, -0.1, 0.5])
    relief = 0.01 * (-1.0) ** np.add.outer(np.arange(30), np.arange(40))
    everywhere = torch.ones(1, 1, 30, 40, dtype=torch.bool)
    found = flatness_residual(depth_of(plane + relief), K_px, everywhere, **RANGE)
    assert found.item() == pytest.approx(0.01 / plane.mean(), rel=1e-10)


def fit(inverse: np.ndarray, K_px: Tensor, mask: Tensor) -> tuple[np.ndarray, float]:
    """(m, RMS residual) by LAPACK's least squares."""
    inside = mask[0, 0].numpy()
    A = rays(K_px, *inside.shape)[inside]
    m, *_ = np.linalg.lstsq(A, inverse[inside], rcond=None)
    return m, float(np.sqrt(np.mean((A @ m - inverse[inside]) ** 2)))


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_plane_fits_against_lstsq(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pred, truth, mask = scene(seed, b=1)
    mask[0, 0, :3, :3] = True
    K_px = camera(11, 14)
    p, t = (1 / x[0, 0].double().numpy() for x in (pred, truth))
    (m_p, rms), (m_t, _) = fit(p, K_px, mask), fit(t, K_px, mask)
    cosine = m_p @ m_t / np.linalg.norm(m_p) / np.linalg.norm(m_t)
    outside = torch.tensor(rng.choice([np.nan, np.inf, 0.0, -1.0], mask.shape), dtype=torch.float32)
    pred_outside, truth_outside = pred.where(mask, outside), truth.where(mask, outside)

    found = flatness_residual(pred_outside, K_px, mask, **RANGE)
    assert found.item() == pytest.approx(rms / p[mask[0, 0].numpy()].mean(), rel=1e-9)
    scaled = flatness_residual(1.5 * pred.double(), K_px, mask, min_m=1e-3, max_m=20.0)
    assert scaled.item() == pytest.approx(found.item(), rel=1e-9)
    angle = plane_normal_angle_deg(pred_outside, truth_outside, K_px, mask, **RANGE)
    assert angle.item() == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.5, 30.0, 65.0])
def test_angle_between_constructed_planes(angle: float) -> None:
    """One plane seen straight on at 2 m, one at 3 m turned about the vertical axis."""
    K_px = camera(30, 40)
    turned = np.array([math.sin(math.radians(angle)), 0.0, math.cos(math.radians(angle))]) / 3
    straight = np.array([0.0, 0.0, 1.0]) / 2
    depths = [depth_of(rays(K_px, 30, 40) @ m) for m in (turned, straight)]
    mask = torch.zeros(1, 1, 30, 40, dtype=torch.bool)
    mask[..., 20:29, 25:38] = True
    wide = {"min_m": 1e-3, "max_m": 1000.0}
    for pred, truth in (depths, depths[::-1]):
        found = plane_normal_angle_deg(pred, truth, K_px, mask, **wide)
        assert found.item() == pytest.approx(angle, rel=1e-6, abs=1e-11)


def test_flatness_of_no_pixels_one_pixel_and_one_line_is_finite() -> None:
    """A diagonal line of a constant depth fits a plane seen straight on, and nothing steeper."""
    K_px = camera(8, 8).expand(3, 3, 3)
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[1, 0, 4, 4] = True
    mask[2, 0] = torch.eye(8, dtype=torch.bool)
    depth = torch.full((3, 1, 8, 8), 2.0)
    zero = [pytest.approx(0.0, abs=1e-12)] * 3
    assert flatness_residual(depth, K_px, mask, **RANGE).tolist() == zero
    assert plane_normal_angle_deg(depth, depth, K_px, mask, **RANGE).tolist() == zero
    tilted = torch.linspace(1.0, 2.0, 8).expand(3, 1, 8, 8)
    assert (plane_normal_angle_deg(tilted, depth, K_px, mask, **RANGE)[2] > 1).all()


def test_wild_predictions_leave_flatness_finite() -> None:
    wild = torch.full((1, 1, 4, 4), math.nan)
    wild[..., 1:, :] = torch.tensor([math.inf, 0.0, -2.0, 3.0])
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    truth = torch.full((1, 1, 4, 4), 2.0)
    assert flatness_residual(wild, camera(4, 4), mask, **RANGE).isfinite().all()
    assert plane_normal_angle_deg(wild, truth, camera(4, 4), mask, **RANGE).isfinite().all()


# --- RegionTable -------------------------------------------------------------------------------

Rows = list[tuple[int, str, list[float], int]]


def random_rows(seed: int, samples: int, columns: int) -> Rows:
    """Values over many orders of magnitude, so that a sum's order shows in its last bits."""
    rng = np.random.default_rng(seed)
    return [
        (s, name, (10.0 ** rng.uniform(-8, 8, columns)).tolist(), int(rng.integers(0, 200)))
        for s in range(samples)
        for name in REGIONS
    ]


def fill(table: RegionTable, rows: Rows, batch: int) -> RegionTable:
    for name in REGIONS:
        mine = [r for r in rows if r[1] == name]
        for i in range(0, len(mine), batch):
            ids, _, values, pixels = zip(*mine[i : i + batch], strict=True)
            table.add(
                torch.tensor(ids),
                name,
                torch.tensor(values, dtype=torch.float64),
                torch.tensor(pixels),
            )
    return table


def gather(tables: list[RegionTable]) -> RegionTable:
    """What ranks do: pad to the longest state with -1, concatenate, merge."""
    states = [t.state() for t in tables]
    longest = max(len(keys) for keys, _ in states)
    padded = [
        [torch.cat([x, x.new_full((longest - len(x), x.shape[1]), -1)]) for x in state]
        for state in states
    ]
    total = RegionTable(tables[0].columns)
    total.merge(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
    return total


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    samples=st.integers(0, 25),
    ranks=st.integers(1, 4),
    batch=st.integers(1, 7),
    data=st.data(),
)
def test_result_has_the_same_bits_for_any_order_ranks_and_batch(
    seed: int, samples: int, ranks: int, batch: int, data: st.DataObject
) -> None:
    columns = ("abs_rel", "rmse")
    rows = random_rows(seed, samples, len(columns))
    expected = fill(RegionTable(columns), rows, batch=1000).result()
    shuffled = data.draw(st.permutations(rows))
    tables = [fill(RegionTable(columns), shuffled[r::ranks], batch) for r in range(ranks)]
    found = gather(tables).result()
    assert json.dumps(found) == json.dumps(expected)


def test_result_is_the_mean_over_images_not_over_pixels() -> None:
    table = RegionTable(("abs_rel", "rmse"))
    values = torch.tensor([[0.1, 1.0], [0.3, 3.0], [9.0, 9.0]], dtype=torch.float64)
    table.add(torch.tensor([5, 2, 7]), "art", values, torch.tensor([64, 64_000, 63]))
    art = {"abs_rel": 0.2, "rmse": 2.0, "images": 2, "pixels": 64_064}
    assert table.result() == {"art": pytest.approx(art)}
    everything = {"abs_rel": 9.4 / 3, "rmse": 13 / 3, "images": 3, "pixels": 64_127}
    assert table.result(min_pixels=1) == {"art": pytest.approx(everything)}
    assert table.result(min_pixels=10**6) == {}


@pytest.mark.parametrize(("background", "gap"), [(0.1, 2.5), (0.0, None)])
def test_illusion_gap(background: float, gap: float | None) -> None:
    table = RegionTable(("abs_rel",))
    for name, value in (("background", background), ("flat", 0.25)):
        column = torch.tensor([[value]], dtype=torch.float64)
        table.add(torch.tensor([0]), name, column, torch.tensor([100]))
    result = table.result()
    assert result["flat"].get("illusion_gap") == pytest.approx(gap)
    json.dumps(result, allow_nan=False)


def test_a_table_without_abs_rel_or_without_background_has_no_illusion_gap() -> None:
    column = torch.tensor([[0.02]], dtype=torch.float64)
    for columns in (("flatness_residual",), ("abs_rel",)):
        table = RegionTable(columns)
        table.add(torch.tensor([0]), "flat", column, torch.tensor([100]))
        assert table.result() == {"flat": {columns[0]: 0.02, "images": 1, "pixels": 100}}


def test_an_empty_table() -> None:
    keys, values = RegionTable().state()
    assert keys.shape == (0, 3) and values.shape == (0, len(METRICS))
    assert RegionTable().result() == {}


def test_a_sample_evaluated_twice_is_refused() -> None:
    one = fill(RegionTable(("mae",)), random_rows(0, 3, 1), batch=2)
    with pytest.raises(ValueError, match="sample 0 was evaluated twice in region clean"):
        gather([one, one]).result()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_would_spoil_the_mean_are_refused_with_their_samples(value: float) -> None:
    values = torch.tensor([[1.0], [value]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mirror: values of samples \[8\] are not finite"):
        RegionTable(("mae",)).add(torch.tensor([3, 8]), "mirror", values, torch.tensor([99, 99]))


# --- bootstrap ---------------------------------------------------------------------------------


def one_column(values: list[float], name: str = "clean") -> RegionTable:
    table = RegionTable(("abs_rel",))
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    table.add(torch.arange(len(values)), name, column, torch.full((len(values),), 100))
    return table


def test_bootstrap_draws_scenes_and_not_images() -> None:
    """Scene a holds 0 and 0, scene b one 3: only the means 0, 1 (a and b) and 3 can be drawn."""
    table = one_column([0.0, 0.0, 3.0])
    means = bootstrap_means(table, {0: "a", 1: "a", 2: "b"}, ["a", "b"], draws=4000)["clean"]
    values, counts = np.unique(means["abs_rel"], return_counts=True)
    np.testing.assert_allclose(values, [0, 1, 3])
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
    assert percentile_interval(means["abs_rel"]) == (0.0, 3.0)


def test_bootstrap_interval_of_normal_means() -> None:
    """With one image per scene it is mean +- 1.96 s / sqrt(n), up to the noise of the draws."""
    values = np.random.default_rng(0).normal(5, 2, 400)
    names = [f"scene {i:03}" for i in range(400)]
    draws = bootstrap_means(one_column(values.tolist()), dict(enumerate(names)), names)
    low, high = percentile_interval(draws["clean"]["abs_rel"])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.08 * half)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, data=st.data())
def test_bootstrap_is_paired_seeded_and_blind_to_order(seed: int, data: st.DataObject) -> None:
    rows = [row for row in random_rows(seed, 12, 1) if row[3] >= 64]
    scene_of = {sample: f"scene {sample % 5}" for sample in range(12)}
    scenes = [f"scene {i}" for i in range(5)]
    plain = bootstrap_means(fill(RegionTable(("abs_rel",)), rows, 100), scene_of, scenes, draws=50)
    doubled = [(s, name, [2 * v for v in values], n) for s, name, values, n in rows]
    shuffled = data.draw(st.permutations(doubled))
    twice = bootstrap_means(
        fill(RegionTable(("abs_rel",)), shuffled, 3), scene_of, scenes[::-1], draws=50
    )
    assert plain.keys() == twice.keys()
    for region, row in plain.items():
        expected = 2 * row["abs_rel"]
        np.testing.assert_allclose(twice[region]["abs_rel"], expected, rtol=1e-9, equal_nan=True)
    if "flat" in plain and "background" in plain:
        ratio = plain["flat"]["abs_rel"] / plain["background"]["abs_rel"]
        np.testing.assert_array_equal(plain["flat"]["illusion_gap"], ratio)


def test_bootstrap_of_one_scene_says_nothing() -> None:
    table = one_column([1.0, 2.0])
    assert bootstrap_means(table, {0: "a", 1: "a"}, ["a"]) == {}
    assert bootstrap_means(table, {0: "a", 1: "a"}, ["a", "without rows"]) == {}


def test_resamples_without_the_region_do_not_count() -> None:
    table = one_column([1.0, 3.0], "art")
    scenes = ["a", "b", "c", "d", "e"]
    draws = bootstrap_means(table, {0: "a", 1: "b"}, scenes)["art"]["abs_rel"]
    assert np.isnan(draws).mean() == pytest.approx((3 / 5) ** 5, abs=0.03)
    assert percentile_interval(draws) == (1.0, 3.0)
    assert percentile_interval(np.array([math.nan])) is None


def test_from_pixels_to_table() -> None:
    """Two clean images and their pasted twins, against means taken by hand."""
    pred, truth, valid = scene(3, b=2)
    region = torch.zeros_like(truth, dtype=torch.uint8)
    region[0, :, :8] = Region.MIRROR
    region[1, :, 2:, 3:] = Region.ART
    ids, table = torch.tensor([10, 11]), RegionTable()
    for pasted in (False, True):
        for name, mask in region_masks(region, valid, flat_known=pasted).items():
            values, pixels = image_metrics(pred, truth, mask, **RANGE)
            table.add(ids, name, values, pixels)
    result = table.result(min_pixels=1)
    assert list(result) == ["clean", "background", "mirror", "art", "flat"]

    def abs_rel(i: int, where: Tensor) -> float:
        inside = valid[i] & where
        p, t = pred[i][inside].double(), truth[i][inside].double()
        return float(((p - t).abs() / t).mean())

    flat = [abs_rel(i, region[i] > 0) for i in (0, 1)]
    background = [abs_rel(i, region[i] == 0) for i in (0, 1)]
    assert result["mirror"]["abs_rel"] == pytest.approx(flat[0], rel=1e-12)
    assert result["art"]["abs_rel"] == pytest.approx(flat[1], rel=1e-12)
    assert result["flat"]["abs_rel"] == pytest.approx(sum(flat) / 2, rel=1e-12)
    assert result["flat"]["illusion_gap"] == pytest.approx(sum(flat) / sum(background), rel=1e-12)
    assert result["clean"]["pixels"] == int(valid.sum())


def test_every_metric_has_a_direction() -> None:
    """Directions checked on data: a worse prediction moves each metric the stated way."""
    assert set(METRICS) < set(ALL_METRICS)
    _, truth, mask = scene(4, b=1)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    good, bad = (
        image_metrics(truth * (s * noise).exp(), truth, mask, min_m=1e-3, max_m=100.0)[0][0]
        for s in (0.1, 0.6)
    )
    for name, g, b in zip(METRICS, good.tolist(), bad.tolist(), strict=True):
        assert (g < b) if ALL_METRICS[name].better == "lower" else (g > b)
