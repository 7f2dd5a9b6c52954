"""Which sample stands at which position of the endless training stream: pure arithmetic.

Position ``p`` counts samples, not batches. An optimiser step of ``batch`` samples covers the
positions ``[step * batch, (step + 1) * batch)``; ranks and micro-batches are slices of that range
(``rank_positions``), so the samples of a step depend on neither the number of ranks nor the size of
the micro-batches. There is no state to save but the position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import Int64

from flatdepth.augment.rng import hash_words

_BLOCK = 1000
_ROUNDS = 6


def permute(
    index: Int64[np.ndarray, " n"], size: int, key: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Element ``index`` of a keyed pseudo-random permutation of 0..size-1, in O(1) memory.

    A balanced Feistel network (Luby & Rackoff 1988) over the next even power of two, walked along
    its cycle until it re-enters 0..size-1 (Black & Rogaway 2002). ``key`` selects the permutation,
    element by element.
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    result = index.copy()
    pending = np.ones(index.shape, dtype=bool)
    while pending.any():
        left, right = result[pending] >> half_bits, result[pending] & half_mask
        for round_ in range(_ROUNDS):
            scramble = hash_words(key[pending], right, round_)
            left, right = right, left ^ (scramble & half_mask)
        result[pending] = (left << half_bits) | right
        pending &= result >= size
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The samples at some positions: arrays of equal length.

    Attributes:
        set: which shard set.
        index: sample within its set.
        epoch: how many times the set has been gone through before.
    """

    set: Int64[np.ndarray, " n"]
    index: Int64[np.ndarray, " n"]
    epoch: Int64[np.ndarray, " n"]


@dataclass(frozen=True, slots=True)
class Order:
    """An endless stream over several sets of samples, mixed by weight.

    The stream is cut into blocks of 1000 positions. Every block holds the same number of samples
    of each set (its weight by largest remainder), in a permuted order, so the mixture is exact in
    every block. Each set is gone through in epochs: every sample once per epoch, in an order of
    its own for each (seed, set, epoch).

    Attributes:
        sizes: number of samples per set, all positive.
        weights: relative share of each set in the stream, not negative, not all zero.
        seed: selects the stream.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or min(self.sizes) < 1:
            raise ValueError(f"sizes {self.sizes} and weights {self.weights} do not fit")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights {self.weights} must be >= 0 and not all 0")

    def quotas(self) -> Int64[np.ndarray, " sets"]:
        """Samples of each set in a block of 1000; a set with a positive weight gets at least 1."""
        share = np.asarray(self.weights) / sum(self.weights) * _BLOCK
        quota = np.floor(share).astype(np.int64)
        by_remainder = np.argsort(quota - share, kind="stable")
        quota[by_remainder[: _BLOCK - int(quota.sum())]] += 1
        starved = (quota == 0) & (np.asarray(self.weights) > 0)
        quota[starved] = 1
        quota[int(np.argmax(quota))] -= int(quota.sum()) - _BLOCK
        return quota

    def draw(self, positions: Int64[np.ndarray, " n"]) -> Draw:
        """The samples at ``positions`` (any order, any gaps)."""
        block, slot = np.divmod(positions, _BLOCK)
        quota = self.quotas()
        if len(self.sizes) > 1:
            slot = permute(slot, _BLOCK, self._key(-1, block))
        ends = np.cumsum(quota)
        which = np.searchsorted(ends, slot, side="right").astype(np.int64)
        turn = block * quota[which] + slot - (ends - quota)[which]
        epoch, place = np.divmod(turn, np.asarray(self.sizes, dtype=np.int64)[which])
        index = np.empty_like(place)
        for set_, size in enumerate(self.sizes):
            mine = which == set_
            key = self._key(set_, epoch[mine])
            index[mine] = permute(place[mine], size, key)
        return Draw(set=which, index=index, epoch=epoch)

    def _key(self, stream: int, counter: np.ndarray) -> np.ndarray:
        key: np.ndarray = hash_words(self.seed, stream, counter)
        return key


def rank_positions(
    step: int, micro_step: int, *, micro_batch: int, rank: int, ranks: int, accumulation: int
) -> Int64[np.ndarray, " micro_batch"]:
    """Positions that ``rank`` reads for one micro-batch.

    Args:
        step: optimiser step, from 0.
        micro_step: 0..accumulation-1 within the step.
        micro_batch: samples per rank and micro-step.
        rank, ranks: this process and their number.
        accumulation: micro-steps per optimiser step.
    """
    first = ((step * accumulation + micro_step) * ranks + rank) * micro_batch
    return np.arange(first, first + micro_batch, dtype=np.int64)


def scene_split(scenes: Sequence[str], val_share: float, seed: int) -> set[str]:
    """The scenes that are held out for validation.

    Scenes are ranked by a hash of (seed, name), so that adding scenes moves few others. At least
    one scene is held out and at least one is left, where there are two or more and
    ``0 < val_share < 1``; a single scene is never held out.
    """
    names = sorted(set(scenes))
    if val_share <= 0 or len(names) < 2:
        return set()
    digests = np.array([name_hash(name) for name in names], dtype=np.int64)
    ranked = [names[i] for i in np.argsort(hash_words(seed, digests), kind="stable")]
    held = min(max(1, round(len(names) * val_share)), len(names) - 1)
    return set(ranked[:held])


def name_hash(name: str) -> int:
    """A number of 56 bits that stands for a name, on every machine."""
    return int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
