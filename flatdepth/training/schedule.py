"""The learning rate as a pure function of the optimiser step, so that resuming needs no state."""

import math
from typing import Literal, assert_never


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup: int,
    kind: Literal["constant", "polynomial", "cosine", "cyclic"],
    power: float = 0.9,
    floor: float = 0.0,
    cycle: int = 0,
) -> float:
    """What to multiply the base learning rate by for one optimiser step.

    Warm-up is linear, ``(step + 1) / warmup``: ``1 / warmup`` for step 0, 1 for step
    ``warmup - 1``. The decay then runs over the other ``D = steps - warmup`` steps with progress
    ``p = (step - warmup) / D``, from exactly 1 at its first step towards ``floor`` at
    ``step == steps``, which is never taken. The last step therefore has ``p = 1 - 1 / D``:

    ============  =================================  ====================================
    kind          shape ``s(p)``                     ``s`` of the last step
    ============  =================================  ====================================
    constant      1                                  1
    polynomial    ``(1 - p) ** power``               ``D ** -power``
    cosine        ``(1 + cos(pi * p)) / 2``          ``(1 - cos(pi / D)) / 2``
    ============  =================================  ====================================

    ``cyclic`` does not end: after the warm-up it rises and falls in a straight line every
    ``cycle`` steps. The step ``k = 0 .. cycle - 1`` of a cycle has

        s = 1 - |2 k - cycle| / (cycle + 2)

    which is 1 in its middle (for an even ``cycle``) and 2 / (cycle + 2) at its start rather than 0,
    because a step at rate 0 would be wasted. The factor is ``floor + (1 - floor) * s``.

    Args:
        step: 0-based optimiser step that the factor is used for, ``0 <= step < steps``.
        steps: optimiser steps of the whole run, warm-up included.
        warmup: steps of warm-up; 0 starts at the full rate.
        kind: the decay. ``polynomial`` with power 0.9 is the usual "poly" schedule of dense
            prediction (Liu et al. 2015, ParseNet); ``cosine`` is a half period without restarts
            (Loshchilov and Hutter 2017, SGDR, equation 5); ``cyclic`` is the triangular policy
            (Smith 2017, "Cyclical Learning Rates").
        power: exponent of the polynomial decay.
        floor: share of the base rate that the decay ends at, 0..1.
        cycle: steps of one rise and fall; only read, and at least 2, if ``kind`` is cyclic.

    Raises:
        ValueError: ``step`` is outside the run.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside the run of {steps} steps")
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    match kind:
        case "constant":
            shape = 1.0
        case "polynomial":
            shape = (1.0 - progress) ** power
        case "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cyclic":
            shape = 1.0 - abs(2 * ((step - warmup) % cycle) - cycle) / (cycle + 2)
        case _:
            assert_never(kind)
    return floor + (1.0 - floor) * shape
