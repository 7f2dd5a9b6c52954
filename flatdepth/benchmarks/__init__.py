"""Published benchmarks of mirrors, pictures, glass and ordinal depth, one module per protocol."""

from collections.abc import Mapping

from flatdepth.benchmarks.base import Benchmark
from flatdepth.benchmarks.booster import BOOSTER
from flatdepth.benchmarks.illusions import ILLUSIONS
from flatdepth.benchmarks.mirage import MIRAGE
from flatdepth.benchmarks.mirror3d import MIRROR3D_NYU
from flatdepth.benchmarks.points import DA_2K, LAYERED_DEPTH

BENCHMARKS: Mapping[str, Benchmark] = {
    one.name: one for one in (BOOSTER, ILLUSIONS, MIRAGE, LAYERED_DEPTH, DA_2K, MIRROR3D_NYU)
}
"""Reflect3r is not among them: it has 16 synthetic views and no protocol for one picture."""
