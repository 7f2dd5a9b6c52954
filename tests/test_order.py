"""The laws of the data order: permutation per epoch, exact mixture, rank and world invariance."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.data.order import (
    Locality,
    Order,
    permute,
    permute_locally,
    rank_draw,
    rank_positions,
    scene_split,
)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.int64)
    result = permute(index, size, np.full(size, key, dtype=np.int64))
    assert sorted(result.tolist()) == list(range(size))


def test_permute_depends_on_its_key_and_looks_random() -> None:
    index = np.arange(1000, dtype=np.int64)
    first, second = (permute(index, 1000, np.full(1000, key)) for key in (1, 2))
    assert (first != second).mean() > 0.99
    assert abs(np.corrcoef(index, first)[0, 1]) < 3.3 / np.sqrt(1000)
    fixed_points = [int((permute(index, 1000, np.full(1000, k)) == index).sum()) for k in range(50)]
    assert 0.4 < np.mean(fixed_points) < 1.8  # one on average for a uniform permutation


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000), st.integers(0, 5))
def test_every_epoch_of_a_single_set_visits_each_sample_once(
    size: int, seed: int, epoch: int
) -> None:
    order = Order(sizes=(size,), weights=(1.0,), seed=seed)
    draw = order.draw(np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(draw.index.tolist()) == list(range(size))
    assert set(draw.epoch.tolist()) == {epoch}


def test_epochs_and_seeds_are_ordered_differently() -> None:
    order = Order(sizes=(50,), weights=(1.0,), seed=3)
    first, second = order.draw(np.arange(50)).index, order.draw(np.arange(50, 100)).index
    other = Order(sizes=(50,), weights=(1.0,), seed=4).draw(np.arange(50)).index
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0.05, 1.0)), min_size=2, max_size=5),
    st.integers(0, 100),
)
def test_mixture_is_exact_in_every_block_and_each_set_keeps_its_epochs(
    sets: list[tuple[int, float]], seed: int
) -> None:
    sizes, weights = zip(*sets, strict=True)
    order = Order(sizes=sizes, weights=weights, seed=seed)
    quota = order.quotas()
    assert quota.sum() == 1000
    assert np.abs(quota - 1000 * np.array(weights) / sum(weights)).max() <= 1
    draw = order.draw(np.arange(3000))
    for set_, size in enumerate(sizes):
        mine = draw.set == set_
        assert mine.sum() == 3 * quota[set_]
        seen = list(zip(draw.epoch[mine].tolist(), draw.index[mine].tolist(), strict=True))
        assert len(set(seen)) == len(seen)
        for epoch in range(int(mine.sum()) // size):
            assert sorted(i for e, i in seen if e == epoch) == list(range(size))


def test_a_look_up_does_not_depend_on_its_neighbours() -> None:
    order = Order(sizes=(70, 1234), weights=(0.3, 0.7), seed=9)
    whole = order.draw(np.arange(5000))
    some = np.array([4999, 3, 1000, 999, 2718, 3])
    part = order.draw(some)
    assert part.index.tolist() == whole.index[some].tolist()
    assert part.set.tolist() == whole.set[some].tolist()
    far = order.draw(np.array([10**12]))
    assert 0 <= far.index[0] < order.sizes[int(far.set[0])]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ranks_are_disjoint_and_the_step_is_the_same_for_every_world_size(
    ranks: int, micro_batch: int
) -> None:
    batch = 24
    accumulation = batch // (ranks * micro_batch)
    for step in (0, 1, 17):
        positions = [
            int(position)
            for rank in range(ranks)
            for micro_step in range(accumulation)
            for position in rank_positions(
                step,
                micro_step,
                micro_batch=micro_batch,
                rank=rank,
                ranks=ranks,
                accumulation=accumulation,
            )
        ]
        assert sorted(positions) == list(range(step * batch, (step + 1) * batch))


def ordered(size: int, locality: Locality, key: int) -> np.ndarray:
    """All samples of an epoch in the order of their places."""
    columns = [np.full(size, number) for number in (size, key, locality.block, locality.window)]
    return permute_locally(np.arange(size), *columns)


localities = st.builds(Locality, block=st.integers(2, 40), window=st.integers(1, 12))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), localities, st.integers(0, 2**32 - 1))
def test_neighbours_kept_together_are_a_permutation_still(
    size: int, locality: Locality, key: int
) -> None:
    assert sorted(ordered(size, locality, key).tolist()) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_block_stands_in_one_window_but_for_the_few_that_fill_up_the_last_one(
    size: int, block: int, window: int, key: int
) -> None:
    found = ordered(size, Locality(block=block, window=window), key)
    block = min(block, size)
    windows = np.full(-(-size // block), -1)
    strays = 0
    for place, sample in reversed(list(enumerate(found.tolist()))):  # the last window first
        home = windows[sample // block]
        windows[sample // block] = place // (block * window) if home < 0 else home
        strays += windows[sample // block] != place // (block * window)
    assert strays <= -size % block
    assert np.bincount(windows).max() <= window


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.tuples(st.integers(1, 300), localities), min_size=1, max_size=4),
    st.sampled_from([(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.integers(0, 2**20),
    st.integers(0, 100),
)
def test_a_step_has_the_same_samples_for_every_world_size_and_micro_batch(
    sets: list[tuple[int, Locality]],
    sharing: tuple[int, int],
    micro_batch: int,
    step: int,
    seed: int,
) -> None:
    sizes, locality = zip(*sets, strict=True)
    order = Order(sizes=sizes, weights=(1.0,) * len(sizes), seed=seed, locality=locality)
    ranks, share = sharing
    while share % micro_batch:
        micro_batch -= 1
    steps = 2

    def samples(step: int, steps: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
        draw = rank_draw(
            order,
            step,
            steps,
            micro_batch=micro_batch,
            rank=rank,
            ranks=ranks,
            accumulation=share // micro_batch,
        )
        return list(zip(draw.set.tolist(), draw.index.tolist(), draw.epoch.tolist(), strict=True))

    whole = order.draw(np.arange(12 * step, 12 * (step + steps)))
    for number in range(steps):
        dealt = [s for rank in range(ranks) for s in samples(step + number, 1, rank, ranks)]
        part = slice(12 * number, 12 * (number + 1))
        columns = (whole.set[part], whole.index[part], whole.epoch[part])
        assert sorted(dealt) == sorted(zip(*(c.tolist() for c in columns), strict=True))
    ahead = samples(step, steps, ranks - 1, ranks)
    assert ahead == [s for n in range(steps) for s in samples(step + n, 1, ranks - 1, ranks)]


def test_no_two_samples_of_a_block_stand_in_one_turn() -> None:
    found = ordered(2048, Locality(block=8, window=16), 5).reshape(-1, 16)
    blocks = np.sort(found // 8, axis=1)
    assert (np.diff(blocks, axis=1) > 0).all()
    assert len({tuple(row) for row in (found // 8).tolist()}) == 128  # an order of its own each
    steps = np.abs(np.diff(np.sort(found.reshape(-1, 128), axis=1)))
    assert steps.max() > 1  # windows are of blocks from all over the set


def test_without_blocks_the_order_is_that_of_earlier_versions() -> None:
    kept: dict[str, Any] = {"sizes": (70, 1234), "weights": (0.3, 0.7), "seed": 9}
    plain = Order(**kept).draw(np.arange(6))
    assert plain.index.tolist() == [511, 1074, 2, 49, 1106, 42]
    given = Order(**kept, locality=(Locality(window=5), Locality())).draw(np.arange(6))
    assert given.index.tolist() == plain.index.tolist()


def test_a_machine_reads_few_blocks_where_neighbours_stay_together() -> None:
    order = Order(
        sizes=(40_000,), weights=(1.0,), seed=0, locality=(Locality(block=32, window=16),)
    )
    touched = []
    for rank in range(8):
        draw = rank_draw(order, 8, 8, micro_batch=8, rank=rank, ranks=8, accumulation=1)
        touched.append(len(set((draw.index // 32).tolist())))
    assert max(touched) == 2  # 16 if dealt by position: each would read of every block
    assert order.draw(np.arange(512)).index.tolist() != list(range(512))


def test_scene_split_holds_out_whole_scenes_and_is_stable() -> None:
    scenes = [f"scene_{i:02d}" for i in range(20)]
    held = scene_split(scenes * 3, 0.2, seed=0)
    assert len(held) == 4
    assert held == scene_split(list(reversed(scenes)), 0.2, seed=0)
    assert held != scene_split(scenes, 0.2, seed=1)
    grown = scene_split([*scenes, "another"], 0.2, seed=0)
    assert len(held & grown) >= 3


def test_scene_split_leaves_at_least_one_scene_on_each_side() -> None:
    assert scene_split(["a"], 0.5, 0) == set()
    assert len(scene_split(["a", "b"], 0.01, 0)) == 1
    assert len(scene_split(["a", "b"], 0.99, 0)) == 1
    assert scene_split(["a", "b"], 0.0, 0) == set()


def test_an_order_refuses_weights_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="locality"):
        Order(sizes=(3, 4), weights=(1.0, 1.0), seed=0, locality=(Locality(),))
    for sizes, weights in (((3,), (0.0,)), ((3, 4), (1.0,)), ((0,), (1.0,)), ((2, 2), (1, -1))):
        with pytest.raises(ValueError, match=r"weights|sizes"):
            Order(sizes=sizes, weights=weights, seed=0)
