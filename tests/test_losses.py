"""Training losses: closed forms, numpy references, invariances, finite gradients at the traps."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flatdepth.config import LossConfig, ModelConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.training.losses import (
    EQUAL_RATIO,
    MIN_RELIEF,
    _pair_offsets,
    _trimmed_mean,
    _weighted_median,
    depth_loss,
    l1_log_loss,
    l2_log_loss,
    ranking_loss,
    relative_loss,
    silog_loss,
)

Kind = Literal["silog", "l1_log", "l2_log", "affine", "ranking"]
KINDS = get_args(Kind)
SEEDS = st.integers(0, 2**32 - 1)
LOSSES: dict[Kind, Callable[..., Tensor]] = {
    "silog": silog_loss,
    "l1_log": l1_log_loss,
    "l2_log": l2_log_loss,
    "affine": relative_loss,
    "ranking": ranking_loss,
}


def row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype).reshape(1, 1, 1, -1)


def scene(
    seed: int, b: int = 3, h: int = 9, w: int = 10, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(prediction, truth, weight) with weights 0, 0.5, 1 and 2."""
    rng = np.random.default_rng(seed)
    pred = rng.uniform(0.5, 8.0, (b, 1, h, w))
    truth = rng.uniform(0.5, 8.0, (b, 1, h, w))
    weight = rng.choice([0.0, 0.5, 1.0, 2.0], (b, 1, h, w))
    weight[:, :, 0, :2] = 1.0
    return tuple(torch.as_tensor(x, dtype=dtype) for x in (pred, truth, weight))  # type: ignore[return-value]


def loss_and_grad(kind: Kind, pred: Tensor, truth: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    pred = pred.clone().requires_grad_()
    loss = LOSSES[kind](pred, truth, weight)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    return loss.detach(), grad


# --- metric ------------------------------------------------------------------------------------


def test_silog_worked_by_hand() -> None:
    """d = 0 with weight 3 and d = 1 with weight 1: E[d] = E[d^2] = 1/4, v = 1/4 - 1/32 = 7/32."""
    loss = silog_loss(row(2, np.e), row(2, 1), row(3, 1))
    assert loss.tolist() == pytest.approx([(7 / 32 + 1e-6) ** 0.5 - 1e-3], rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, lam=st.floats(0.0, 1.0))
def test_silog_against_the_published_form(seed: int, lam: float) -> None:
    """sqrt(E[d^2] - lam E[d]^2), missed from below by less than eps."""
    pred, truth, weight = scene(seed)
    d = np.log(pred.double().numpy()) - np.log(truth.double().numpy())
    w = weight.double().numpy()
    w /= w.sum((1, 2, 3), keepdims=True)
    v = (w * d**2).sum((1, 2, 3)) - lam * (w * d).sum((1, 2, 3)) ** 2

    loss = silog_loss(pred, truth, weight, lam=lam, eps=1e-3).numpy()
    np.testing.assert_allclose(loss, np.sqrt(v + 1e-6) - 1e-3, rtol=1e-5)
    assert (loss < np.sqrt(v)).all() and (loss > np.sqrt(v) - 1e-3).all()


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, scale=st.floats(0.1, 10.0))
def test_silog_with_lam_1_ignores_scale_and_with_lam_0_does_not(seed: int, scale: float) -> None:
    pred, truth, weight = scene(seed)
    for lam, expected in [(1.0, 0.0), (0.0, abs(np.log(scale)))]:
        loss = silog_loss(truth * scale, truth, weight, lam=lam, eps=1e-6)
        torch.testing.assert_close(loss, torch.full((3,), expected), rtol=1e-5, atol=2e-6)
    scaled, plain = (silog_loss(p, truth, weight, lam=1.0) for p in (pred * scale, pred))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_silog_of_a_perfect_fit_is_0_with_finite_gradient() -> None:
    _, truth, weight = scene(0)
    loss, grad = loss_and_grad("silog", truth, truth, weight)
    assert loss.tolist() == [0, 0, 0]
    assert (grad == 0).all()


@pytest.mark.parametrize("error", [1e-7, 1e-5, 1e-3])
def test_silog_gradient_is_bounded_near_a_perfect_fit(error: float) -> None:
    """|dloss/dv| <= 1 / (2 eps), so one pixel of n in log depth gets at most |d| / (n eps)."""
    truth = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    pred = truth.clone()
    pred[0, 0, 0, 0] += error
    _, grad = loss_and_grad("silog", pred, truth, torch.ones_like(truth))
    assert 0 < grad[0, 0, 0, 0] <= error / (16 * 1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-8])
def test_silog_reads_predictions_below_the_range_as_its_edge(value: float) -> None:
    pred, truth, weight = row(value, 3), row(2, 3), row(1, 1)
    loss, grad = loss_and_grad("silog", pred, truth, weight)
    assert torch.equal(loss, silog_loss(row(1e-3, 3), truth, weight))
    assert grad.isfinite().all() and grad[..., 0] == 0


# --- relative ----------------------------------------------------------------------------------


def reference_relative_loss(pred: np.ndarray, truth_m: np.ndarray, mask: np.ndarray) -> float:
    """MiDaS section 5 for one image, with loops: mask only, no weights."""

    def align(d: np.ndarray) -> np.ndarray:
        inside = np.sort(d[mask])
        centre = inside[(len(inside) - 1) // 2]
        return (d - centre) / np.abs(inside - centre).mean()

    r = align(pred) - align(1 / truth_m)
    kept = np.sort(np.abs(r[mask]))[: round(0.8 * mask.sum())]
    total = kept.sum() / (2 * mask.sum())
    for step in (1, 2, 4, 8):
        rs, ms = r[::step, ::step], mask[::step, ::step]
        edges = 0.0
        for i, j in np.ndindex(rs.shape):
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < rs.shape[0] and m < rs.shape[1] and ms[i, j] and ms[k, m]:
                    edges += abs(rs[k, m] - rs[i, j])
        total += 2 * edges / ms.sum()
    return total


@pytest.mark.parametrize("seed", range(5))
def test_relative_against_the_reference(seed: int) -> None:
    """90 or 85 pixels with truth: both multiples of 5, where trimming needs no rounding."""
    pred, truth, _ = scene(seed, b=2, dtype=torch.float64)
    mask = torch.ones(2, 1, 9, 10, dtype=torch.bool)
    mask[1, 0, 2, 3:8] = False
    expected = [
        reference_relative_loss(*(x[i, 0].numpy() for x in (pred, truth, mask))) for i in range(2)
    ]
    loss = relative_loss(pred, truth, mask.double())
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    half = relative_loss(pred.float(), truth.float(), mask.float())
    assert half.tolist() == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, scale=st.floats(0.01, 100.0), shift=st.floats(-100.0, 100.0))
def test_relative_ignores_positive_affine_transforms(seed: int, scale: float, shift: float) -> None:
    pred, truth, weight = scene(seed, dtype=torch.float64)
    plain = relative_loss(pred, truth, weight)
    torch.testing.assert_close(
        relative_loss(scale * pred + shift, truth, weight), plain, rtol=1e-9, atol=0
    )
    copy = relative_loss(scale / truth + shift, truth, weight)
    torch.testing.assert_close(copy, torch.zeros_like(copy), rtol=0, atol=1e-8)
    assert (relative_loss(-scale / truth, truth, weight) > 0.5).all(), "depth turned inside out"


def test_trimmed_mean_worked_by_hand() -> None:
    """Sizes 1..5: trimming 20 % drops the 5; 30 % drops half of the 4 as well."""
    size = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])
    one = torch.ones(1, 5)
    assert _trimmed_mean(size, one, 0.0).item() == pytest.approx(3.0)
    assert _trimmed_mean(size, one, 0.2).item() == pytest.approx((1 + 2 + 3 + 4) / 5)
    assert _trimmed_mean(size, one, 0.3).item() == pytest.approx((1 + 2 + 3 + 2) / 5)
    # the 4 has half of the weight: a budget of 8 * 0.8 leaves 6.4 - 3 = 3.4 of its 4
    weight = torch.tensor([[1.0, 1.0, 4.0, 1.0, 1.0]])
    assert _trimmed_mean(size, weight, 0.2).item() == pytest.approx((1 + 2 + 3 + 3.4 * 4) / 8)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), min_size=1, max_size=12).filter(
        lambda pairs: any(w for _, w in pairs)
    )
)
def test_weighted_median_is_the_lower_median_of_repeated_values(
    pairs: list[tuple[int, int]],
) -> None:
    x, w = (torch.tensor([column], dtype=torch.float32) for column in zip(*pairs, strict=True))
    repeated = torch.tensor([float(v) for v, n in pairs for _ in range(n)])
    assert _weighted_median(x, w).item() == repeated.median().item()


@pytest.mark.parametrize("pred", [0.0, 0.3, 1e-3, 7.0])
def test_relative_of_a_constant_prediction_has_a_bounded_gradient(pred: float) -> None:
    _, truth, weight = scene(1)
    loss, grad = loss_and_grad("affine", torch.full_like(truth, pred), truth, weight)
    assert loss.isfinite().all() and (loss > 0).all()
    assert grad.isfinite().all() and (grad != 0).any()


def test_relative_learns_nothing_from_a_truth_without_relief() -> None:
    pred, truth, weight = scene(2)
    wall = 3.0 + 0.3 * MIN_RELIEF * torch.rand(truth.shape, generator=torch.Generator())
    for bare in (torch.full_like(truth, 3.0), wall):
        loss, grad = loss_and_grad("affine", pred, bare, weight)
        assert loss.tolist() == [0, 0, 0]
        assert (grad == 0).all()
    tilted = 1 / torch.linspace(0.30, 0.31, 10).expand_as(truth)
    assert (relative_loss(pred, tilted, weight) > 0).all()


def test_relative_of_images_smaller_than_its_scales() -> None:
    loss = relative_loss(row(1, 2, 3), 1 / row(1, 2, 3), row(1, 1, 1))
    assert loss.tolist() == pytest.approx([0.0], abs=1e-6)
    assert relative_loss(row(5), row(2), row(1)).tolist() == [0.0]


# --- absolute in log depth ---------------------------------------------------------------------


def test_l1_and_l2_log_worked_by_hand() -> None:
    """Log errors 0 with weight 3 and 1 with weight 1, then log 2 and -log 2."""
    for loss in (l1_log_loss, l2_log_loss):
        found = loss(row(2, np.e), row(2, 1), row(3, 1))
        assert found.tolist() == pytest.approx([0.25], rel=1e-6)
    both = row(2, 1), row(1, 2), row(1, 1)
    assert l1_log_loss(*both).item() == pytest.approx(np.log(2), rel=1e-6)
    assert l2_log_loss(*both).item() == pytest.approx(np.log(2) ** 2, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=st.floats(0.01, 100.0))
def test_log_losses_depend_on_ratios_alone_and_silog_is_made_of_them(
    seed: int, scale: float
) -> None:
    pred, truth, weight = scene(seed, dtype=torch.float64)
    for loss in (l1_log_loss, l2_log_loss):
        plain = loss(pred, truth, weight)
        torch.testing.assert_close(
            loss(scale * pred, scale * truth, weight), plain, rtol=1e-9, atol=0
        )
        torch.testing.assert_close(loss(truth, pred, weight), plain, rtol=1e-12, atol=0)
    root = silog_loss(pred, truth, weight, lam=0.0, eps=1e-9)
    torch.testing.assert_close(root**2, l2_log_loss(pred, truth, weight), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["l1_log", "l2_log"])
def test_log_losses_of_a_perfect_fit_are_0_with_finite_gradient(kind: Kind) -> None:
    _, truth, weight = scene(0)
    loss, grad = loss_and_grad(kind, truth, truth, weight)
    assert loss.tolist() == [0, 0, 0]
    assert (grad == 0).all()


# --- ranking -----------------------------------------------------------------------------------


def reference_ranking_loss(pred: np.ndarray, truth_m: np.ndarray, weight: np.ndarray) -> float:
    """Chen et al. 2016, equation 2, pair by pair, on predictions of median 0 and spread 1."""
    inside = np.sort(pred[weight > 0])
    centre = inside[(len(inside) - 1) // 2]
    aligned = (pred - centre) / np.abs(inside - centre).mean()
    height, width = pred.shape
    total = pairs = 0.0
    for i, j in np.ndindex(height, width):
        for down, right in _pair_offsets(height, width):
            k, m = (i - down) % height, (j - right) % width
            r = aligned[i, j] - aligned[k, m]
            ratio = truth_m[k, m] / truth_m[i, j]
            w = min(weight[i, j], weight[k, m])
            if 1 / (1 + EQUAL_RATIO) <= ratio <= 1 + EQUAL_RATIO:
                value = r**2
            else:
                value = np.log1p(np.exp(-r if ratio > 1 else r))
            total, pairs = total + w * value, pairs + w
    return total / pairs


@pytest.mark.parametrize("seed", range(3))
def test_ranking_against_the_reference(seed: int) -> None:
    pred, truth, _ = scene(seed, b=2, h=16, w=17, dtype=torch.float64)
    truth[:, :, :8] = truth[:, :, :1]  # equal depths too
    mask = torch.rand(pred.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    expected = [
        reference_ranking_loss(*(x[i, 0].numpy() for x in (pred, truth, mask.double())))
        for i in range(2)
    ]
    loss = ranking_loss(pred, truth, mask.double())
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_ranking_of_two_pixels_worked_by_hand() -> None:
    """Inverse depths 0 and 2: lower median 0, mean deviation 1. The offset of 1 makes 2 pairs."""
    pred, one = row(0, 2), row(1, 1)
    right = ranking_loss(pred, row(5, 1), one).item()
    wrong = ranking_loss(pred, row(1, 5), one).item()
    equal = ranking_loss(pred, row(3, 3), one).item()
    assert _pair_offsets(1, 2) == [(0, 1), (0, -1)]
    assert right == pytest.approx(np.log1p(np.exp(-2)), rel=1e-6)
    assert wrong == pytest.approx(np.log1p(np.exp(2)), rel=1e-6)
    assert equal == pytest.approx(4, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=st.floats(0.01, 100.0), shift=st.floats(-100.0, 100.0))
def test_ranking_ignores_positive_affine_transforms_and_any_order_keeping_truth(
    seed: int, scale: float, shift: float
) -> None:
    pred, truth, weight = scene(seed, dtype=torch.float64)
    plain = ranking_loss(pred, truth, weight)
    moved = ranking_loss(scale * pred + shift, truth, weight)
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=0)
    right, wrong = (ranking_loss(sign / truth, truth, weight) for sign in (1, -1))
    assert (right < wrong).all()


def test_every_pixel_with_truth_is_in_a_pair() -> None:
    pred, truth, _ = scene(1, b=1, h=37, w=41)
    _, grad = loss_and_grad("ranking", pred, truth, torch.ones_like(truth))
    assert (grad != 0).all()


# --- the configured sum ------------------------------------------------------------------------


def test_the_default_is_silog_for_metric_and_affine_for_relative_models() -> None:
    pred, truth, weight = scene(3)
    assert torch.equal(depth_loss("metric", pred, truth, weight), silog_loss(pred, truth, weight))
    found = depth_loss("relative", pred, truth, weight)
    assert torch.equal(found, relative_loss(pred, truth, weight))


def test_terms_add_up_with_their_factors_and_options() -> None:
    pred, truth, weight = scene(3)
    config = LossConfig(
        terms={"silog": 1.0, "l1_log": 0.5, "l2_log": 0.25, "affine": 2.0, "ranking": 0.1},
        silog_lambda=0.85,
        trim=0.1,
        gradient_weight=0.5,
        gradient_scales=2,
    )
    inverse = 1 / pred
    expected = (
        silog_loss(pred, truth, weight, lam=0.85)
        + 0.5 * l1_log_loss(pred, truth, weight)
        + 0.25 * l2_log_loss(pred, truth, weight)
        + 2.0 * relative_loss(inverse, truth, weight, trim=0.1, gradient_weight=0.5, scales=2)
        + 0.1 * ranking_loss(inverse, truth, weight)
    )
    torch.testing.assert_close(depth_loss("metric", pred, truth, weight, config), expected)


def test_affine_and_ranking_of_a_relative_model_take_the_prediction_as_it_is() -> None:
    pred, truth, weight = scene(3)
    config = LossConfig(terms={"affine": 1.0, "ranking": 3.0})
    expected = relative_loss(pred, truth, weight) + 3 * ranking_loss(pred, truth, weight)
    torch.testing.assert_close(depth_loss("relative", pred, truth, weight, config), expected)


def test_an_affine_model_is_compared_in_depth() -> None:
    """The reference, which takes inverse depth and depth, given depth and its inverse instead."""
    pred, truth, _ = scene(6, b=1, dtype=torch.float64)
    whole = torch.ones_like(truth)
    mask = np.ones((9, 10), dtype=bool)
    expected = reference_relative_loss(pred[0, 0].numpy(), 1 / truth[0, 0].numpy(), mask)
    assert depth_loss("affine", pred, truth, whole).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        depth_loss("affine", 3 * truth - 7, truth, whole), whole.new_zeros(1), rtol=0, atol=1e-9
    )
    ranking = LossConfig(terms={"ranking": 1.0})
    right, wrong = (depth_loss("affine", s * truth, truth, whole, ranking) for s in (1, -1))
    assert right.item() < wrong.item()


@pytest.mark.parametrize("model", ["metric", "relative", "affine"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 0.0, -1.0])
def test_pixels_without_weight_never_enter_the_sum(
    model: Literal["metric", "relative", "affine"], poison: float
) -> None:
    pred, truth, weight = scene(5)
    dark = weight == 0
    config = LossConfig(terms={"affine": 1.0, "ranking": 1.0})
    found = []
    for value in (1.0, poison):
        given = pred.masked_fill(dark, value).requires_grad_()
        loss = depth_loss(model, given, truth.masked_fill(dark, value), weight, config)
        (grad,) = torch.autograd.grad(loss.sum(), given)
        found.append((loss, grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_metres_cannot_be_asked_of_a_relative_model() -> None:
    with pytest.raises(UserError, match=r"loss\.terms: silog compare .* set model\.kind to metric"):
        TrainConfig(loss=LossConfig(terms={"silog": 1.0}), model=ModelConfig(kind="relative"))


def test_a_kind_that_the_network_does_not_predict_is_named() -> None:
    with pytest.raises(UserError, match="depth_anything_v2 predicts metric or relative depth, got"):
        ModelConfig(kind="affine")


# --- what all promise --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_a_batch_changes_neither_loss_nor_gradient(kind: Kind) -> None:
    """A batch of 4, one image of it empty, against micro-batches of 2 and of 1."""
    pred, truth, weight = scene(4, b=4)
    weight[2] = 0
    full, full_grad = loss_and_grad(kind, pred, truth, weight)
    for size in (1, 2):
        parts = [
            loss_and_grad(kind, *chunk)
            for chunk in zip(*(x.split(size) for x in (pred, truth, weight)), strict=True)
        ]
        losses, grads = (torch.cat(x) for x in zip(*parts, strict=True))
        torch.testing.assert_close(losses, full, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grads, full_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_pixels_without_weight_never_enter(kind: Kind, poison: float) -> None:
    pred, truth, weight = scene(5)
    expected_loss, expected_grad = loss_and_grad(kind, pred, truth, weight)
    dark = weight == 0
    assert dark.any()
    poisoned = pred.masked_fill(dark, poison), truth.masked_fill(dark, poison)
    loss, grad = loss_and_grad(kind, *poisoned, weight)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(grad, expected_grad)
    assert (grad[dark] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_weight_gives_0_and_leaves_its_neighbours_alone(kind: Kind) -> None:
    pred, truth, weight = scene(6)
    alone, _ = loss_and_grad(kind, pred[1:], truth[1:], weight[1:])
    weight[0], truth[0], pred[0, ..., ::2] = 0, float("nan"), 0
    loss, grad = loss_and_grad(kind, pred, truth, weight)
    assert loss[0] == 0 and (grad[0] == 0).all()
    torch.testing.assert_close(loss[1:], alone, rtol=1e-6, atol=0)
    assert (grad[1:] != 0).any() and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_prediction_with_weight_is_loud(kind: Kind) -> None:
    pred, truth, weight = scene(7)
    pred[1, 0, 0, 0] = float("nan")
    assert LOSSES[kind](pred, truth, weight).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_only_ratios_of_weights_matter(kind: Kind) -> None:
    pred, truth, weight = scene(8)
    expected = LOSSES[kind](pred, truth, weight)
    for factor in (0.25, 1e-6, 3.0, 1e6):
        torch.testing.assert_close(
            LOSSES[kind](pred, truth, factor * weight), expected, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (silog_loss, {}),
        (l1_log_loss, {}),
        (l2_log_loss, {}),
        (relative_loss, {"gradient_weight": 0.0}),
    ],
)
def test_weight_n_is_the_pixel_n_times(
    loss: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    pred, truth, _ = scene(9, b=1, h=1, w=12, dtype=torch.float64)
    times = torch.tensor([0, 1, 2, 3] * 3)
    repeated = [x.repeat_interleave(times, dim=3) for x in (pred, truth)]
    weighted = loss(pred, truth, times.double().reshape(1, 1, 1, 12), **options)
    plain = loss(*repeated, torch.ones_like(repeated[0]), **options)
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_widened(kind: Kind, dtype: torch.dtype) -> None:
    pred, truth, weight = scene(10)
    loss = LOSSES[kind](pred.to(dtype), truth, weight)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, LOSSES[kind](pred.to(dtype).float(), truth, weight))


class AutocastSpy(TorchFunctionMode):
    """Counts the arithmetic that autocast could have touched."""

    touched = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        arithmetic = getattr(func, "__name__", "") in {"log", "sub", "__sub__", "sort", "where"}
        self.touched += arithmetic and torch.is_autocast_enabled("cpu")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_off_inside(kind: Kind) -> None:
    pred, truth, weight = scene(10)
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastSpy() as spy:
        LOSSES[kind](pred, truth, weight)
        assert spy.touched == 0
        pred.log()
        assert spy.touched == 1, "the spy sees nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    pred, truth, weight = scene(11, b=2, h=5, w=6, dtype=torch.float64)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: LOSSES[kind](p, truth, weight), (pred,))
