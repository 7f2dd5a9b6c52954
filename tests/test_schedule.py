"""The learning-rate factor: a table worked by hand, its laws, and its refusal to leave the run."""

import itertools
import math
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.training.schedule import lr_factor

Kind = Literal["constant", "polynomial", "cosine", "cyclic"]
FALLING = ("constant", "polynomial", "cosine")

# steps=6, warmup=2, so D=4 and the decay sees p = 0, 1/4, 1/2, 3/4.
# polynomial with power 2 and floor 0.2: s = 1, 9/16, 1/4, 1/16.
# cosine: s = 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4.
# cyclic with cycle 4: s = 1/3, 2/3, 1, 2/3.
TABLE: dict[Kind, list[float]] = {
    "constant": [0.5, 1, 1, 1, 1, 1],
    "polynomial": [0.5, 1, 1, 0.65, 0.4, 0.25],
    "cosine": [
        0.5,
        1,
        1,
        0.2 + 0.8 * (2 + math.sqrt(2)) / 4,
        0.6,
        0.2 + 0.8 * (2 - math.sqrt(2)) / 4,
    ],
    "cyclic": [0.5, 1, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1, 0.2 + 1.6 / 3],
}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_table(kind: Kind) -> None:
    factors = [
        lr_factor(s, steps=6, warmup=2, kind=kind, power=2.0, floor=0.2, cycle=4) for s in range(6)
    ]
    assert factors == pytest.approx(TABLE[kind], abs=1e-15)


def test_poly_schedule_of_depth_anything_v2() -> None:
    """Without warm-up the default is ``(1 - step / steps) ** 0.9``."""
    for step, expected in [(0, 1.0), (500, 0.5**0.9), (900, 0.1**0.9), (999, 1000**-0.9)]:
        factor = lr_factor(step, steps=1000, warmup=0, kind="polynomial")
        assert factor == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(
    kind=st.sampled_from(FALLING),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 70),
    power=st.floats(0.1, 4.0),
    floor=st.floats(0.0, 1.0),
)
def test_laws(kind: Kind, steps: int, warmup: int, power: float, floor: float) -> None:
    factors = [
        lr_factor(s, steps=steps, warmup=warmup, kind=kind, power=power, floor=floor)
        for s in range(steps)
    ]
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == [pytest.approx((s + 1) / warmup) for s in range(len(rising))]
    assert falling == sorted(falling, reverse=True)
    assert all(floor <= f <= 1 + 1e-15 for f in falling)
    assert all(f > 0 for f in factors), "a step at rate 0 would be wasted"
    if falling:
        assert falling[0] == pytest.approx(1)


@pytest.mark.parametrize("cycle", [2, 4, 10, 60])
def test_a_cycle_is_a_triangle_that_repeats(cycle: int) -> None:
    """Straight up to the peak, the same way down, never 0, the same in every cycle."""

    def factor(step: int) -> float:
        return lr_factor(step, steps=200, warmup=5, kind="cyclic", cycle=cycle)

    first = [factor(5 + k) for k in range(cycle + 1)]
    assert first[cycle // 2] == max(first) == 1
    assert first == pytest.approx(first[::-1], abs=1e-15)
    slopes = [b - a for a, b in itertools.pairwise(first[: cycle // 2 + 1])]
    assert slopes == [pytest.approx(slopes[0])] * (cycle // 2)
    assert slopes[0] > 0 and min(first) > 0
    assert [factor(5 + cycle + k) for k in range(cycle + 1)] == first


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside the run of 10 steps"):
        lr_factor(step, steps=10, warmup=2, kind="polynomial")
