"""Independent streams of random numbers, so that whatever is drawn depends on its indices only."""

from enum import IntEnum

import numpy as np

Rng = np.random.Generator


class Kind(IntEnum):
    """What a stream is for."""

    ROOM = 1
    FRAME = 2
    EXPOSURE = 3
    PICTURE = 4
    NOISE = 5


def stream(kind: Kind, seed: int, first: int, second: int = 0) -> Rng:
    """A stream of its own for every combination of arguments (non-negative integers)."""
    # Always four integers: trailing zeros do not count as entropy.
    return np.random.default_rng(np.random.SeedSequence([kind, seed, first, second]))
