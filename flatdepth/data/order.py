"""Which sample stands at which position of the endless training stream: pure arithmetic.

Position ``p`` counts samples, not batches. An optimiser step of ``batch`` samples covers the
positions ``[step * batch, (step + 1) * batch)``; ranks and micro-batches share that range out
(``rank_draw``), so the samples of a step depend on neither the number of ranks nor the size of
the micro-batches. There is no state to save but the position.

A set's order can keep neighbours together for a while (``Locality``), for sets that are read over a
network: what lies side by side is then wanted soon after and by the same machine.
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
    index: Int64[np.ndarray, " n"],
    size: Int64[np.ndarray, " n"] | int,
    key: Int64[np.ndarray, " n"],
) -> Int64[np.ndarray, " n"]:
    """Element ``index`` of a keyed pseudo-random permutation of 0..size-1, in O(1) memory.

    A balanced Feistel network (Luby & Rackoff 1988) over the next even power of two, walked along
    its cycle until it re-enters 0..size-1 (Black & Rogaway 2002). ``size`` and ``key`` select the
    permutation, element by element.
    """
    size = np.broadcast_to(size, index.shape)
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.int64)
    half_bits = np.maximum(1, (bits + 1) // 2)
    result, begun = index.copy(), hash_words(key)
    pending = np.arange(len(index))
    while len(pending):
        half, state = half_bits[pending], begun[pending]
        half_mask = (1 << half) - 1
        left, right = result[pending] >> half, result[pending] & half_mask
        for round_ in range(_ROUNDS):
            scramble = hash_words(right, round_, state=state)
            left, right = right, left ^ (scramble & half_mask)
        result[pending] = (left << half) | right
        pending = pending[result[pending] >= size[pending]]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """How long an order keeps the neighbours of a set together.

    Attributes:
        block: samples side by side that stand in the same window; 1: none.
        window: blocks that are gone through together.
    """

    block: int = 1
    window: int = 1


def permute_locally(
    place: Int64[np.ndarray, " n"],
    size: Int64[np.ndarray, " n"],
    key: Int64[np.ndarray, " n"],
    block: Int64[np.ndarray, " n"],
    window: Int64[np.ndarray, " n"],
) -> Int64[np.ndarray, " n"]:
    """Element ``place`` of a keyed permutation of 0..size-1 with ``Locality``.

    ``block`` is 2 or more. Blocks are permuted. Every ``window`` of them that follow each other are
    gone through in turns, each of which takes one sample of each block, in an order of its own. So
    any two samples of a block stand in different turns. The last block is filled up with numbers
    beyond ``size``; a place that would hold one of these is walked along its cycle, which goes on
    in the last window. So fewer than ``block`` samples stand in a window other than their block's.
    """
    block = np.minimum(block, size)
    blocks = -(-size // block)
    whole = blocks // window
    result = place.copy()
    pending = np.arange(len(place))
    while len(pending):
        a_block, a_window, a_key = block[pending], window[pending], key[pending]
        number, offset = np.divmod(result[pending], a_window * a_block)
        is_last = number == whole[pending]
        width = np.where(is_last, blocks[pending] - number * a_window, a_window)
        turn, slot = np.divmod(offset, width)
        slot = permute(slot, width, hash_words(a_key, number, turn)) + number * a_window
        within = permute(turn, a_block, hash_words(a_key, slot))
        result[pending] = permute(slot, blocks[pending], a_key) * a_block + within
        pending = pending[result[pending] >= size[pending]]
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
        locality: per set, how long neighbours stay together; empty: in no set.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    locality: tuple[Locality, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights) or min(self.sizes) < 1:
            raise ValueError(f"sizes {self.sizes} and weights {self.weights} do not fit")
        if len(self.locality) not in (0, len(self.sizes)):
            raise ValueError(f"sizes {self.sizes} and locality {self.locality} do not fit")
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
        size = np.asarray(self.sizes, dtype=np.int64)[which]
        epoch, place = np.divmod(turn, size)
        key = self._key(which, epoch)
        locality = self.locality or (Locality(),) * len(self.sizes)
        block = np.array([each.block for each in locality])[which]
        window = np.array([each.window for each in locality])[which]
        apart, together = np.flatnonzero(block == 1), np.flatnonzero(block > 1)
        index = np.empty_like(place)
        index[apart] = permute(place[apart], size[apart], key[apart])
        columns = (column[together] for column in (place, size, key, block, window))
        index[together] = permute_locally(*columns)
        return Draw(set=which, index=index, epoch=epoch)

    @property
    def is_local(self) -> bool:
        """Whether neighbours of any set stay together."""
        return any(locality.block > 1 for locality in self.locality)

    def _key(self, stream: np.ndarray | int, counter: np.ndarray) -> np.ndarray:
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


def as_stored(draw: Draw, steps: int) -> Int64[np.ndarray, " n"]:
    """Places in a draw of whole steps, each step's in the order in which its samples are stored."""
    step = np.repeat(np.arange(steps), len(draw.set) // steps)
    return np.lexsort((draw.epoch, draw.index, draw.set, step))


def rank_draw(
    order: Order,
    step: int,
    steps: int,
    *,
    micro_batch: int,
    rank: int,
    ranks: int,
    accumulation: int,
) -> Draw:
    """What ``rank`` reads in ``steps`` optimiser steps from ``step`` on, in the order of reading.

    As ``rank_positions`` says, unless neighbours of a set stay together. Then the samples of a step
    are dealt out as they are stored, by set and number, so that a block is read by one machine or
    two rather than by all: ranks of a machine are neighbours. The samples of the step are the same.
    """
    sharing = {"micro_batch": micro_batch, "ranks": ranks, "accumulation": accumulation}
    if not order.is_local:
        slices = [
            rank_positions(number, micro_step, rank=rank, **sharing)
            for number in range(step, step + steps)
            for micro_step in range(accumulation)
        ]
        return order.draw(np.concatenate(slices))
    mine = accumulation * micro_batch
    first, batch = step * mine * ranks, mine * ranks
    draw = order.draw(np.arange(first, first + steps * batch, dtype=np.int64))
    chosen = as_stored(draw, steps).reshape(steps, ranks, mine)[:, rank].ravel()
    return Draw(set=draw.set[chosen], index=draw.index[chosen], epoch=draw.epoch[chosen])


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
