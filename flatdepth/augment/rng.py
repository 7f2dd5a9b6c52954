"""Stateless randomness: every random number is a hash of what it is for.

A draw is identified by integers (seed, epoch, sample, paste) and a name, so it does not depend on
the batch, the rank, the order of evaluation or on any other draw. The arithmetic is on 32-bit words
in int64, without overflow, so numpy and torch agree bit for bit on every device.
"""

import zlib
from functools import cache
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float64
from torch import Tensor

_MASK = 0xFFFFFFFF
Words = TypeVar("Words", np.ndarray, Tensor, int)


def mix32(x: Words) -> Words:
    """Scramble 32-bit words held in int64 (numpy or torch) or an int; a bijection of 0..2^32-1.

    Shifts and multipliers are those of "lowbias32" (C. Wellons, hash-prospector, 2018).
    """
    x = x & _MASK
    if isinstance(x, int):
        x = (x ^ x >> 16) * 0x7FEB352D & _MASK
        x = (x ^ x >> 15) * 0x846CA68B & _MASK
        return x ^ x >> 16
    if isinstance(x, np.ndarray) and x.ndim:
        y: Any = x.astype(np.uint32)  # whose products wrap, in a quarter of the time
        y = (y ^ (y >> 16)) * np.uint32(0x7FEB352D)
        y = (y ^ (y >> 15)) * np.uint32(0x846CA68B)
        return (y ^ (y >> 16)).astype(np.int64)
    x = _multiply32(x ^ (x >> 16), 0x7FEB352D)
    x = _multiply32(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _multiply32(x: Words, factor: int) -> Words:
    """``x * factor`` modulo 2^32, in halves so that no int64 product overflows."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _MASK


def hash_words(*words: np.ndarray | Tensor | int, state: Any = 0) -> Any:
    """Hash int64 arrays of broadcastable shapes and integers to uniform 32-bit words in int64.

    The result is an integer if all words are. Integers cost least before the first array. ``state``
    is the hash of words that come before these.
    """
    word: Any
    for word in words:
        state = mix32(state + mix32(word) + 0x9E3779B9)
        state = mix32(state ^ ((word >> 32) & _MASK) ^ 0x5BD1E995)
    return state


@cache
def name_word(name: str) -> int:
    """The integer that stands for a draw's name; stable across versions and machines."""
    return zlib.crc32(name.encode())


@cache
def _mixed_name(name: str) -> int:
    return mix32(name_word(name))


def _word(state: int, mixed: int) -> int:
    """``hash_words(word, 0, state=state)`` of a word below 2^32, of which ``mixed`` is the
    ``mix32``; most draws are of this kind."""
    for added in (mixed, 0):
        x = state + added + 0x9E3779B9 & _MASK
        x = (x ^ x >> 16) * 0x7FEB352D & _MASK
        x = (x ^ x >> 15) * 0x846CA68B & _MASK
        x = x ^ x >> 16 ^ 0x5BD1E995
        x = (x ^ x >> 16) * 0x7FEB352D & _MASK
        x = (x ^ x >> 15) * 0x846CA68B & _MASK
        state = x ^ x >> 16
    return state


class Draws:
    """Random numbers for one identity (seed, epoch, sample, ...), addressed by name.

    >>> Draws(0, 1, 2).uniform("tilt") == Draws(0, 1, 2).uniform("tilt")
    True
    """

    def __init__(self, *identity: int) -> None:
        self._identity = tuple(int(word) for word in identity)
        self._begun: int = hash_words(hash_words(*self._identity))

    def child(self, *identity: int) -> "Draws":
        """The draws of a part of this identity (a paste of a sample, say)."""
        return Draws(*self._identity, *identity)

    def uniforms(self, name: str, count: int) -> Float64[np.ndarray, " count"]:
        """``count`` numbers uniform in [0, 1), float64 with 32 random bits each."""
        index = np.arange(count, dtype=np.int64)
        words: np.ndarray = hash_words(name_word(name), index, state=self._begun)
        return words / 2**32

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """One number uniform in [low, high)."""
        return low + (high - low) * (_word(self._begun, _mixed_name(name)) / 2**32)

    def log_uniform(self, name: str, low: float, high: float) -> float:
        """One number in [low, high) whose logarithm is uniform."""
        return low * (high / low) ** self.uniform(name)

    def integer(self, name: str, count: int) -> int:
        """One integer uniform in 0..count-1 (bias below count / 2^32)."""
        return int(self.uniform(name) * count)

    def choice(self, name: str, weights: dict[str, float]) -> str:
        """One key of ``weights`` with probability proportional to its value."""
        names = list(weights)
        edges = np.cumsum([weights[key] for key in names])
        return names[int(np.searchsorted(edges, self.uniform(name) * edges[-1], side="right"))]
