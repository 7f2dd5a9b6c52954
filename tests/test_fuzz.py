"""300 inputs of the fuzzer, of every kind; ``python -m tests.fuzz`` tries 10,000."""

import re
from pathlib import Path

import numpy as np
import pytest

from flatdepth.data.shards import codec
from flatdepth.data.shards.codec import decode_image
from flatdepth.errors import BadFrame
from tests.fuzz import fuzz, make_targets, mutate, quiet
from tests.test_codec import jpeg_kinds


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


def decoded_or_refused(payload: bytes) -> tuple[tuple[int, ...] | None, bytes | str]:
    try:
        pixels = decode_image(payload)
    except BadFrame as error:
        return None, re.sub(r" at 0x\w+", "", str(error))
    return pixels.shape, pixels.tobytes()


def test_damaged_jpegs_are_judged_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = jpeg_kinds()
    draw = np.random.default_rng(2)
    damaged = [mutate(payload, draw) for payload in kinds.values() for _ in range(40)]
    damaged += [payload[:-cut] for payload in kinds.values() for cut in (1, 2, 3, 40)]
    got = [decoded_or_refused(payload) for payload in damaged]
    monkeypatch.setattr(codec, "simplejpeg", None)
    assert got == [decoded_or_refused(payload) for payload in damaged]
    refused = sum(shape is None for shape, _ in got)
    assert 100 < refused < len(got) - 100
