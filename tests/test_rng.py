"""Stateless random numbers: equal on numpy and torch, uniform, independent of everything else."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatdepth.augment.rng import Draws, hash_words, mix32, name_word

WORDS = st.integers(-(2**63), 2**63 - 1)


def test_mix32_is_a_bijection_on_a_sample_of_words() -> None:
    words = np.arange(2**20, dtype=np.int64) * 4093 % 2**32
    mixed = mix32(words)
    assert len(np.unique(mixed)) == len(np.unique(words))
    assert mixed.min() >= 0 and mixed.max() < 2**32


def test_mix32_agrees_with_python_integers() -> None:
    def reference(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    words = [0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789]
    assert mix32(np.array(words)).tolist() == [reference(word) for word in words]


@given(st.lists(WORDS, min_size=1, max_size=5))
def test_numpy_and_torch_hash_to_the_same_bits(words: list[int]) -> None:
    arrays = [np.array([word], dtype=np.int64) for word in words]
    tensors = [torch.tensor([word]) for word in words]
    assert hash_words(*arrays).tolist() == hash_words(*tensors).tolist()


def test_order_and_every_bit_of_the_words_matter() -> None:
    base = hash_words(np.array([5]), 7)
    assert hash_words(np.array([7]), 5) != base
    for bit in range(62):
        assert hash_words(np.array([5 ^ (1 << bit)]), 7) != base


def test_draws_depend_on_identity_and_name_alone() -> None:
    draws = Draws(1, 2, 3)
    first = draws.uniform("a")
    draws.uniforms("b", 100)
    assert draws.uniform("a") == first == Draws(1, 2, 3).uniform("a")
    assert draws.uniform("b") != first
    assert Draws(1, 2, 4).uniform("a") != first
    assert draws.uniforms("a", 3)[0] == first
    assert draws.child(4).uniform("a") == Draws(1, 2, 3, 4).uniform("a")


def test_uniforms_are_uniform_and_uncorrelated_across_identities() -> None:
    values = np.array([Draws(0, 0, sample).uniform("x") for sample in range(4000)])
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    chi2 = float(((counts - 200) ** 2 / 200).sum())
    assert chi2 < 43.8  # 99.9 % quantile of chi-square with 19 degrees of freedom
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 3.3 / np.sqrt(4000)


def test_choice_follows_its_weights_and_integer_its_range() -> None:
    names = [Draws(s).choice("kind", {"a": 3.0, "b": 0.0, "c": 1.0}) for s in range(4000)]
    assert "b" not in names
    assert abs(names.count("a") / 4000 - 0.75) < 3.3 * np.sqrt(0.75 * 0.25 / 4000)
    assert {Draws(s).integer("n", 5) for s in range(200)} == {0, 1, 2, 3, 4}


def test_log_uniform_has_a_uniform_logarithm() -> None:
    values = [Draws(s).log_uniform("x", 0.01, 1.0) for s in range(4000)]
    assert min(values) >= 0.01 and max(values) < 1.0
    assert abs(np.median(np.log10(values)) + 1.0) < 0.06


def test_a_draw_is_the_hash_of_its_identity_and_name() -> None:
    rng = np.random.default_rng(0)
    for identity in rng.integers(0, 2**56, (200, 3)).tolist():
        state = hash_words(*identity)
        for name in ("crop", "flip", "a", ""):
            word = hash_words(state, name_word(name), 0)
            assert Draws(*identity).uniform(name) == word / 2**32
            assert Draws(*identity[:2]).child(identity[2]).uniform(name) == word / 2**32
            index = np.arange(3)
            words = hash_words(state, name_word(name), index)
            assert (Draws(*identity).uniforms(name, 3) == words / 2**32).all()
