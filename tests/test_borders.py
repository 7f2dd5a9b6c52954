"""The border classifier: what can be told is told, and no more."""

from pathlib import Path

import numpy as np
import pytest

from flatdepth.bench.borders import WAYS, Patches, classify, gather, patch_sheet
from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from tests.conftest import TinySets


def patches(told_by: float, count: int = 480) -> Patches:
    """White noise of three scenes; the pasted half has a vertical edge of this height."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, 32, 32)).astype(np.float32)
    pasted = np.arange(count) % 2 == 0
    values[pasted, :, 16:] += told_by
    return Patches(values=values, pasted=pasted, scene=np.arange(count) % 3)


def test_what_can_be_told_is_told_and_what_cannot_is_not() -> None:
    assert classify(patches(1.0), 0).accuracy > 0.95
    alike = classify(patches(0.0), 0)
    assert alike.folds == 3
    assert abs(alike.accuracy - 0.5) < 0.08  # 480 coins: 3.5 standard deviations


def test_one_scene_cannot_be_held_out() -> None:
    one = patches(1.0, 60)
    with pytest.raises(UserError, match="one scene only"):
        classify(Patches(values=one.values, pasted=one.pasted, scene=one.scene * 0), 0)


def test_gathered_patches_are_normal_and_balanced(tiny_sets: TinySets, tmp_path: Path) -> None:
    path = tiny_sets.config(tmp_path)
    config = parse_config(TrainConfig, [f"--config={path}"], prog="borders.py", description=None)
    seen: list[int] = []
    found = gather(config, 6, lambda done, _: seen.append(done))
    assert seen == list(range(1, 7))
    assert tuple(found) == WAYS
    for one in found.values():
        assert len(one.pasted) > 20
        assert one.pasted.mean() == 0.5
        np.testing.assert_allclose(one.values.mean(axis=(1, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(one.values.std(axis=(1, 2)), 1, atol=1e-4)
    assert patch_sheet(found["naive"]).width > 1000
