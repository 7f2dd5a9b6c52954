"""Evaluation protocols: published crops and ranges, alignments against planted truth and lstsq."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.judge.protocol import (
    ALIGNMENTS,
    FITS,
    PROTOCOLS,
    Alignment,
    Fit,
    align,
    own_alignment,
)
from flatdepth.models.network import Kind

SEEDS = st.integers(0, 2**32 - 1)
RANGE_M = (1e-3, 80.0)
TAKING = [name for name in ALIGNMENTS if name != "metric"]


# --- crops -------------------------------------------------------------------------------------


def test_the_issue_names_six_protocols() -> None:
    assert set(PROTOCOLS) == {
        "none",
        "nyu-eigen",
        "kitti-garg",
        "kitti-eigen",
        "hypersim",
        "vkitti2",
    }


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a mask, which must be a full rectangle."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    assert mask.sum() == (bottom - top) * (right - left)
    return top, bottom, left, right


@pytest.mark.parametrize(
    ("name", "shape", "expected", "range_m"),
    [
        ("none", (30, 40), (0, 30, 0, 40), (1e-3, 80)),
        ("hypersim", (768, 1024), (0, 768, 0, 1024), (1e-3, 20)),
        ("vkitti2", (375, 1242), (0, 375, 0, 1242), (1e-3, 80)),
        ("nyu-eigen", (480, 640), (45, 471, 41, 601), (1e-3, 10)),
        # 0.40810811 * 352 = 143.65, 0.99189189 * 352 = 349.15; 0.03594771 * 1216 = 43.71 ...
        ("kitti-garg", (352, 1216), (143, 349, 43, 1172), (1e-3, 80)),
        ("kitti-eigen", (352, 1216), (117, 321, 43, 1172), (1e-3, 80)),
    ],
)
def test_crops_and_ranges(
    name: str,
    shape: tuple[int, int],
    expected: tuple[int, int, int, int],
    range_m: tuple[float, float],
) -> None:
    protocol = PROTOCOLS[name]
    assert box(protocol.mask(*shape)) == expected
    assert protocol.range_m == range_m
    assert protocol.source
    text = str(protocol)
    assert text.startswith(f"protocol {name}: ") and f"{range_m[1]:g} m" in text


def test_the_kitti_window_is_the_bottom_centre() -> None:
    view = PROTOCOLS["kitti-garg"].view(375, 1242)
    assert (view.top, view.left) == (23, 13)
    assert (view.crop_height, view.crop_width) == (view.height, view.width) == (352, 1216)


def test_other_protocols_look_at_the_whole_frame() -> None:
    for name in ("none", "hypersim", "vkitti2"):
        view = PROTOCOLS[name].view(31, 47)
        assert (view.top, view.left, view.height, view.width) == (0, 0, 31, 47)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("nyu-eigen", (240, 320), "expected frames of 480 x 640 px.*found 240 x 320"),
        ("kitti-garg", (350, 1242), "expected frames of at least 352 x 1216 px.*found 350 x 1242"),
    ],
)
def test_frames_of_the_wrong_size_are_refused(
    name: str, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=f"protocol {name}: {message}.*--protocol"):
        PROTOCOLS[name].view(*shape)


# --- alignment ---------------------------------------------------------------------------------


def frames(seed: int, b: int = 2) -> tuple[Tensor, Tensor, np.random.Generator]:
    """(depth, mask): float64 depth of 0.5 to 4 m, and a mask of 30 to 100 %."""
    rng = np.random.default_rng(seed)
    depth = torch.tensor(rng.uniform(0.5, 4, (b, 1, 13, 17)))
    mask = torch.tensor(rng.random(depth.shape) < rng.uniform(0.3, 1))
    return depth, mask, rng


def plant(depth: Tensor, alignment: Alignment, scale: float, shift: float) -> Tensor:
    """The truth that the alignment should recover from ``depth``."""
    if alignment == "scale-shift-depth":
        return scale * depth + shift
    if alignment == "scale-shift-inverse":
        return 1 / (scale / depth + 0.1 * shift)
    return scale * depth


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    alignment=st.sampled_from(TAKING),
    fit=st.sampled_from(FITS),
    scale=st.floats(0.2, 5),
    shift=st.floats(0, 2),
)
def test_a_planted_scale_and_shift_is_recovered(
    seed: int, alignment: Alignment, fit: Fit, scale: float, shift: float
) -> None:
    depth, mask, _ = frames(seed)
    truth = plant(depth, alignment, scale, shift)
    found = align(depth, truth, mask, kind="metric", alignment=alignment, fit=fit, range_m=RANGE_M)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, scale=st.floats(0.01, 100), shift=st.floats(-1, 1), fit=st.sampled_from(FITS))
def test_a_prediction_of_any_scale_and_shift_becomes_the_truth(
    seed: int, scale: float, shift: float, fit: Fit
) -> None:
    truth, mask, _ = frames(seed)
    said: dict[Kind, Tensor] = {"relative": 1 / truth, "affine": truth}
    for kind, quantity in said.items():
        found = align(
            scale * (quantity + shift),
            truth,
            mask,
            kind=kind,
            alignment=own_alignment(kind),
            fit=fit,
            range_m=RANGE_M,
        )
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    seed=SEEDS,
    alignment=st.sampled_from(["scale", "scale-shift-depth", "scale-shift-inverse"]),
)
def test_robust_fits_ignore_a_quarter_of_wild_truth(seed: int, alignment: Alignment) -> None:
    depth, mask, rng = frames(seed, b=1)
    mask[:] = True
    truth = plant(depth, alignment, 1.7, 0.3)
    wild = torch.tensor(rng.random(depth.shape) < 0.25)
    seen = torch.where(wild, torch.tensor(rng.uniform(9, 20, depth.shape)), truth)

    def error(fit: Fit) -> float:
        found = align(
            depth, seen, mask, kind="metric", alignment=alignment, fit=fit, range_m=RANGE_M
        )
        return float((found.double() / truth - 1).abs().max())

    assert error("robust") < 1e-4 < 1e-2 < error("least-squares")


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_least_squares_against_lstsq(seed: int) -> None:
    pred, mask, rng = frames(seed, b=1)
    mask[..., :2] = True
    truth = pred * torch.tensor(np.exp(rng.normal(0.2, 0.3, pred.shape)))
    p, t = pred[mask].numpy(), truth[mask].numpy()

    def found(alignment: Alignment) -> np.ndarray:
        aligned = align(pred, truth, mask, kind="metric", alignment=alignment, range_m=RANGE_M)
        return aligned[mask].double().numpy()

    (s,), *_ = np.linalg.lstsq(p[:, None], t, rcond=None)
    np.testing.assert_allclose(found("scale"), s * p, rtol=1e-9)
    (s, c), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)
    np.testing.assert_allclose(found("scale-shift-depth"), s * p + c, rtol=1e-9)
    (s, c), *_ = np.linalg.lstsq(np.stack([1 / p, np.ones_like(p)], 1), 1 / t, rcond=None)
    expected = 1 / np.clip(s / p + c, 1 / 80, 1e3)
    np.testing.assert_allclose(found("scale-shift-inverse"), expected, rtol=1e-5)
    np.testing.assert_allclose(found("median"), p * np.median(t) / np.median(p), rtol=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_robust_fits_have_the_least_absolute_deviations(seed: int) -> None:
    """The sum is convex: no nearby scale or line may have a smaller one."""
    pred, mask, rng = frames(seed, b=1)
    mask[..., :3] = True
    truth = pred * torch.tensor(np.exp(rng.normal(0.2, 0.3, pred.shape)))
    t = truth[mask]

    def deviations(aligned: Tensor) -> float:
        return float((aligned[mask] - t).abs().sum())

    def robust(alignment: Alignment) -> Tensor:
        return align(
            pred, truth, mask, kind="metric", alignment=alignment, fit="robust", range_m=RANGE_M
        )

    scaled, line = robust("scale"), robust("scale-shift-depth")
    for step in (-1e-3, -1e-5, 1e-5, 1e-3):
        assert deviations(scaled) <= deviations(scaled * (1 + step)) + 1e-9
        for other in (line + step, line + step * pred, line + step * (pred - 2)):
            assert deviations(line) <= deviations(other) * (1 + 1e-4)


@settings(deadline=None, max_examples=40)
@given(
    seed=SEEDS,
    alignment=st.sampled_from(ALIGNMENTS),
    fit=st.sampled_from(FITS),
    poison=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0]),
)
def test_masks_are_respected_and_images_are_fitted_alone(
    seed: int, alignment: Alignment, fit: Fit, poison: float
) -> None:
    pred, mask, rng = frames(seed)
    mask[:, 0, 0, :4] = True
    truth = pred * torch.tensor(np.exp(rng.normal(0.2, 0.3, pred.shape)))

    def run(p: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return align(p, t, m, kind="metric", alignment=alignment, fit=fit, range_m=RANGE_M)

    expected = run(pred, truth, mask)
    found = run(pred.where(mask, poison), truth.where(mask, poison), mask)
    assert torch.equal(found[mask], expected[mask])
    alone = torch.cat([run(pred[i : i + 1], truth[i : i + 1], mask[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alignment", TAKING)
@pytest.mark.parametrize("fit", FITS)
def test_predictions_that_are_not_finite_do_not_enter_the_fit(
    alignment: Alignment, fit: Fit
) -> None:
    pred, mask, _ = frames(3)
    mask[:] = True
    truth = plant(pred, alignment, 1.5, 0.2)
    pred[:, :, 2, ::3], pred[:, :, 5, 1::4] = np.nan, np.inf
    found = align(pred, truth, mask, kind="metric", alignment=alignment, fit=fit, range_m=RANGE_M)
    finite = pred.isfinite()
    torch.testing.assert_close(found[finite].double(), truth[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("fit", FITS)
def test_nothing_to_fit_on_gives_finite_depth(alignment: Alignment, fit: Fit) -> None:
    pred, mask, _ = frames(4)
    nothing = torch.zeros_like(mask)
    found = align(pred, pred, nothing, kind="metric", alignment=alignment, fit=fit, range_m=RANGE_M)
    assert found.isfinite().all()


def test_metric_alignment_changes_nothing_and_relative_needs_a_shift() -> None:
    pred, mask, _ = frames(5)
    same = align(pred, pred * 2, mask, kind="metric", alignment="metric", range_m=RANGE_M)
    assert same is pred
    kinds: tuple[Kind, ...] = ("relative", "affine")
    for kind, alignment in product(kinds, ALIGNMENTS):
        if alignment != own_alignment(kind):
            with pytest.raises(ValueError, match=f"{kind} cannot be aligned by {alignment}"):
                align(pred, pred, mask, kind=kind, alignment=alignment, range_m=RANGE_M)
