"""What a benchmark is: samples in the authors' layout, one protocol, figures others published."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flatdepth.benchmarks.maps import Map
from flatdepth.data.readers.files import Tree
from flatdepth.models.network import Kind

SCALED = ", scaled"
"""Ends the name of a region in which predictions are scaled that are otherwise left as they are."""


class Shot(NamedTuple):
    """A picture to predict on: uint8 sRGB, and its focal length in pixels.

    ``at_network``: the prediction is wanted at the resolution of the network's input, not at the
    picture's.
    """

    image: UInt8[np.ndarray, "h w 3"]
    focal_px: float
    at_network: bool = False


class Row(NamedTuple):
    """Values of one sample in one region, each a mean over ``weight`` things; NaN: none."""

    region: str
    values: Mapping[str, float]
    weight: float = 1.0


class Case(NamedTuple):
    """A sample that is read: its pictures, and what scores the predictions of all of them."""

    shots: Sequence[Shot]
    score: Callable[[Sequence[Map], Kind], Iterable[Row]]


class Sample(NamedTuple):
    """A sample that is not read yet.

    ``scene`` is the unit that is drawn for intervals. ``load`` raises BadFrame for damaged files.
    """

    name: str
    scene: str
    load: Callable[[], Case]


class Published(NamedTuple):
    """A system's figures as published, in the order of ``Benchmark.compared``.

    ``mark``: P as printed in the authors' paper or repository, S at second hand.
    """

    system: str
    mark: Literal["P", "S"]
    figures: tuple[float | None, ...]


def as_they_are(means: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Columns whose mean is the figure."""
    return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A published test.

    Attributes:
        name: in ``--benchmark``.
        protocol: split, resolution, alignment, metrics and mean, in one paragraph.
        layout: what the raw directory holds, in words that follow "expected".
        source: where it is downloaded from, by name.
        samples: those of a raw directory, none if it has another layout.
        finish: column -> figure from column -> weighted mean, for scalars and for draws alike.
        things: what ``Row.weight`` counts, "" if nothing.
        units: column -> unit, where it has one.
        compared: (region, column) of the published figures.
        published: others' figures.
        remark: what is to be known about them.
    """

    name: str
    protocol: str
    layout: str
    source: str
    samples: Callable[[Tree], Sequence[Sample]]
    finish: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = as_they_are
    things: str = ""
    units: Mapping[str, str] = field(default_factory=dict)
    compared: Sequence[tuple[str, str]]
    published: Sequence[Published]
    remark: str = ""


def is_higher_better(column: str) -> bool:
    return column.startswith(("delta", "accuracy"))
