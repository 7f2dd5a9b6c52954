"""300 inputs of the fuzzer, of every kind; ``python -m tests.fuzz`` tries 10,000."""

from pathlib import Path

import numpy as np

from tests.fuzz import fuzz, make_targets, mutate, quiet


def test_no_damage_is_silent_and_none_is_a_traceback(tmp_path: Path) -> None:
    with quiet():
        targets = make_targets(tmp_path)
        tallies = fuzz(targets, 300, seed=0, say=lambda _: None)
    assert not [fault for tally in tallies.values() for fault in tally.faults]
    assert sum(sum(tally.counts.values()) for tally in tallies.values()) >= 290
    refused = [name for name, tally in tallies.items() if tally.counts["sentence"]]
    assert {"shard", "index", "checkpoint", "depth", "frame", "weights"} <= set(refused)


def test_a_mutation_always_changes_something() -> None:
    for seed in range(500):
        data = b"P5 12 34 255\n" + bytes(99)
        assert mutate(data, np.random.default_rng(seed)) != data
