"""The rendered sets that travel with the package: whole, and as flat as they say."""

import numpy as np
import pytest
from skimage.measure import label

from flatdepth.data.sets import verify
from flatdepth.data.shards.read import ShardSet
from flatdepth.geometry import pixel_rays
from flatdepth.judge.experiment import PLAIN
from flatdepth.types import Region
from tests.conftest import REPOSITORY

STEP = 1e-4
"""Half a step of the packed depth is less."""

MAT_M = 0.001
"""A mat lies so far behind its picture."""


@pytest.mark.parametrize("name", ["rooms-train", "flatbench"])
def test_it_is_whole_and_small(name: str) -> None:
    report = verify(REPOSITORY / "shards" / name)
    assert not report.damage
    files = list((REPOSITORY / "shards" / name).iterdir())
    assert sum(file.stat().st_size for file in files) < 25e6


def test_training_rooms_have_nothing_that_is_labelled() -> None:
    with ShardSet.open(REPOSITORY / "shards" / "rooms-train") as shards:
        assert ".region.png" not in shards.index.members
        assert len(set(shards.scenes)) == len(shards)


def steps(depth_m: np.ndarray) -> np.ndarray:
    """Where 1/z bends or jumps, as between two sliding doors."""
    inverse = 1 / depth_m
    bends = np.zeros(depth_m.shape, bool)
    for axis in (0, 1):
        second = np.roll(inverse, 1, axis) + np.roll(inverse, -1, axis) - 2 * inverse
        bends |= np.abs(second) > 6 * STEP * inverse
    return bends


def test_every_mirror_picture_and_screen_is_a_plane_before_what_its_twin_shows() -> None:
    things = 0
    with ShardSet.open(REPOSITORY / "shards" / "flatbench") as shards:
        row_of = {key: row for row, key in enumerate(shards.keys)}
        for key, row in row_of.items():
            if key.endswith(PLAIN):
                continue
            frame, plain = shards.frame(row), shards.frame(row_of[key + PLAIN])
            assert frame.region is not None and plain.region is None
            flat = np.isin(frame.region, (Region.MIRROR, Region.ART))
            assert flat.any(), key
            known = ~np.isnan(frame.depth_m)
            assert known.mean() > 0.999
            assert (plain.depth_m >= frame.depth_m * (1 - STEP))[known].all(), key
            # besides: brackets and feet of what was taken away
            rest = ~flat & (frame.region != Region.FRAME)
            same = np.isclose(frame.depth_m, plain.depth_m, rtol=2 * STEP)
            assert same[rest].mean() > 0.98, key
            whole = np.where(flat & ~steps(frame.depth_m), frame.region, 0)
            pieces, count = label(whole, return_num=True, connectivity=1)
            for number in range(1, count + 1):
                v, u = np.nonzero(pieces == number)
                if len(u) < 64:
                    continue
                things += 1
                z = frame.depth_m[v, u].astype(np.float64)
                points = z[:, None] * pixel_rays(frame.K_px, u + 0.5, v + 0.5)
                away = points - points.mean(axis=0)
                off = np.abs(away @ np.linalg.svd(away, full_matrices=False)[2][2])
                is_picture = frame.region[v[0], u[0]] == Region.ART
                assert (off <= STEP * z + (MAT_M if is_picture else 0)).all(), key
    assert things >= 120
