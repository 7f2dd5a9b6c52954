"""Boundary F1 and soft edge error: hand-worked values, loops over pixels, laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatdepth.judge.boundaries import THRESHOLDS, boundary_f1, soft_edge_error

SEEDS = st.integers(0, 2**32 - 1)
RANGE = {"min_m": 1e-3, "max_m": 1e3}


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def f1(pred: Tensor, truth: Tensor, mask: Tensor | None = None) -> tuple[float, int]:
    mask = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    score, pairs = boundary_f1(pred, truth, mask, **RANGE)
    return score.item(), int(pairs.item())


def scene(seed: int, share: float = 0.97) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of a few depths with a little noise: prediction, truth, mask."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.choice([1.0, 1.1, 1.3, 2.0], (3, 4)), np.ones((3, 3)))
    pred = truth * np.exp(rng.normal(0, 0.06, truth.shape))
    mask = rng.random(truth.shape) < share
    return tuple(torch.tensor(x)[None, None] for x in (pred, truth, mask))  # type: ignore[return-value]


def slow_f1(pred: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Sets of edges, pair by pair, direction by direction."""
    height, width = truth.shape
    total = weights = 0.0
    for t in np.linspace(1.05, 1.25, 10):
        precision = recall = 0.0
        for dv, du in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            predicted, true = set(), set()
            for v in range(height):
                for u in range(width):
                    other = v + dv, u + du
                    if not (0 <= other[0] < height and 0 <= other[1] < width):
                        continue
                    if mask[v, u] and mask[other]:
                        # nearer towards the direction: inverse depth rises by the ratio
                        if pred[v, u] / pred[other] > t:
                            predicted.add((v, u))
                        if truth[v, u] / truth[other] > t:
                            true.add((v, u))
            precision += len(predicted & true) / max(len(predicted), 1) / 4
            recall += len(predicted & true) / max(len(true), 1) / 4
        both = precision + recall
        total += t * (2 * precision * recall / both if both else 0)
        weights += t
    return total / weights


def test_f1_worked_by_hand() -> None:
    """One edge in one of four directions: precision and recall are 1/4 where it is found."""
    truth = row(1, 1, 2, 2)
    assert f1(truth, truth) == (pytest.approx(0.25, rel=1e-14), 3)
    found = sum(t for t in np.linspace(1.05, 1.25, 10) if t < 1.15) / THRESHOLDS.sum().item()
    assert f1(row(1, 1, 1.15, 1.15), truth)[0] == pytest.approx(0.25 * found, rel=1e-14)
    assert f1(row(1, 2, 2, 2), truth)[0] == 0  # a pixel off is off
    assert f1(row(2, 2, 1, 1), truth)[0] == 0  # and so is the wrong side in front


def test_f1_of_a_false_edge_halves_the_precision() -> None:
    """2 predicted edges to the left, 1 true: precision 1/8, recall 1/4, F1 1/6."""
    assert f1(row(1, 1, 2, 4), row(1, 1, 2, 2))[0] == pytest.approx(1 / 6, rel=1e-14)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_f1_against_loops_over_pixels(seed: int) -> None:
    pred, truth, mask = scene(seed)
    score, _ = f1(pred, truth, mask)
    expected = slow_f1(*(x[0, 0].numpy() for x in (pred, truth, mask)))
    assert score == pytest.approx(expected, rel=1e-12, abs=1e-15)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, power=st.integers(-6, 6))
def test_f1_ignores_scale(seed: int, power: int) -> None:
    """Powers of two, so that scaling rounds nothing."""
    pred, truth, mask = scene(seed)
    assert f1(pred * 2.0**power, truth, mask) == f1(pred, truth, mask)


def test_f1_of_a_perfect_island_is_1() -> None:
    truth = torch.full((1, 1, 6, 6), 2.0)
    truth[..., 2:4, 2:4] = 1.0
    assert f1(truth, truth) == (1.0, 60)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -1.0, 1e9])
def test_f1_knows_nothing_outside_the_mask(poison: float) -> None:
    pred, truth, mask = scene(3)
    before = f1(pred, truth, mask)
    assert f1(pred.masked_fill(~mask, poison), truth.masked_fill(~mask, 0), mask) == before


def test_sparse_truth_and_truth_without_edges_say_nothing() -> None:
    pred, truth, _ = scene(5)
    sparse = torch.zeros_like(truth, dtype=torch.bool)
    sparse[..., ::2, :] = True
    assert f1(pred, truth, sparse)[1] == 0
    assert f1(pred, truth * 0 + 2)[1] == 0
    assert f1(pred, truth, truth > 100)[1] == 0
    half = torch.zeros_like(sparse)
    half[..., :4, :] = True  # dense in a part of the picture
    assert f1(pred, truth, half)[1] == 4 * 11 + 3 * 12


def test_f1_of_a_batch_has_the_bits_of_its_images() -> None:
    scenes = [scene(seed) for seed in range(3)]
    together = boundary_f1(*(torch.cat(maps) for maps in zip(*scenes, strict=True)), **RANGE)
    for number, one in enumerate(scenes):
        assert (together[0][number].item(), together[1][number].item()) == f1(*one)


def slow_see(pred: np.ndarray, truth: np.ndarray, valid: np.ndarray, step: float) -> float:
    height, width = truth.shape

    def around(v: int, u: int, reach: tuple[tuple[int, int], ...]) -> list[float]:
        places = [(v + dv, u + du) for dv, du in reach]
        inside = [(y, x) for y, x in places if 0 <= y < height and 0 <= x < width]
        return [truth[place] for place in inside if valid[place]]

    cross = ((-1, 0), (1, 0), (0, -1), (0, 1))
    square = tuple((dv, du) for dv in (-1, 0, 1) for du in (-1, 0, 1))
    errors = [
        min(abs(t - pred[v, u]) for t in around(v, u, square))
        for v in range(height)
        for u in range(width)
        if valid[v, u] and any(abs(t - truth[v, u]) > step for t in around(v, u, cross))
    ]
    return float(np.mean(errors)) if errors else math.nan


def test_soft_edge_error_worked_by_hand() -> None:
    truth, everywhere = np.array([[1.0, 1, 5, 5]]), np.ones((1, 4), bool)
    assert soft_edge_error(np.array([[1.0, 3, 5, 5]]), truth, everywhere) == 1  # (2 + 0) / 2
    assert soft_edge_error(np.array([[1.0, 1, 1, 5]]), truth, everywhere) == 0  # a pixel off
    assert soft_edge_error(np.array([[9.0, 1, 5, 9]]), truth, everywhere) == 0  # not at the edge
    assert math.isnan(soft_edge_error(truth, truth, everywhere, step=4.0))
    unknown = np.array([[True, True, False, True]])
    assert math.isnan(soft_edge_error(truth, truth, unknown))


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS)
def test_soft_edge_error_against_loops_over_pixels(seed: int) -> None:
    pred, truth, valid = (x[0, 0].numpy() for x in scene(seed, 0.9))
    found = soft_edge_error(pred, np.where(valid, truth, 77.0), valid, 0.15)
    assert found == pytest.approx(slow_see(pred, truth, valid, 0.15), rel=1e-12, nan_ok=True)
