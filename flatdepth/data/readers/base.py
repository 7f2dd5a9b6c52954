"""What every reader offers to the packing tool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from flatdepth.errors import BadFrame
from flatdepth.types import RawFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One frame found in a raw layout, not yet read.

    Attributes:
        key: the future ``RawFrame.key``.
        scene: the future ``RawFrame.scene``.
        files: role -> path or URL of the files to read ("image", "depth", ...).
        split: the official partition, "" if there is none.
        focal_px: focal length in pixels if the layout's own list states it, else 0.
    """

    key: str
    scene: str
    files: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    focal_px: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a raw layout holds.

    Attributes:
        items: the usable frames, sorted by key, keys unique.
        excluded: (key, reason) of the frames that the dataset's own lists rule out.
    """

    items: Sequence[Item]
    excluded: Sequence[tuple[str, str]] = ()


@runtime_checkable
class Reader(Protocol):
    """A raw layout. Readers are small picklable dataclasses, so packing can use processes.

    Attributes:
        dataset: short name written into every frame.
        kind: ``"depth"`` for RGB-D frames, ``"art"`` for pictures without depth.
        depth_range_m: finite depths outside (low, high] make packing skip the frame.
    """

    @property
    def dataset(self) -> str: ...

    @property
    def kind(self) -> Literal["depth", "art"]: ...

    @property
    def depth_range_m(self) -> tuple[float, float]: ...

    def list(self) -> Listing:
        """Find the frames. Raises UserError if the layout is not what was expected."""
        ...

    def read(self, item: Item) -> RawFrame:
        """Read one frame. Raises BadFrame if its files are damaged or do not fit together."""
        ...


MOST_OUTSIDE = 0.01
"""Share of the known depths that may lie outside of a reader's range: more show a wrong unit."""


def out_of_range(known_m: np.ndarray, range_m: tuple[float, float]) -> BadFrame:
    """The trouble with depths in metres that lie outside of a range, with a guess at its cause."""
    low, high = range_m
    detail = f"found {known_m.min():g}..{known_m.max():g} m, expected ({low:g}, {high:g}] m"
    middle = float(np.median(known_m))
    for factor in (1000.0, 0.001):
        if not low < middle <= high and low < middle / factor <= high:
            times = f"{factor:g} times too large" if factor > 1 else "1000 times too small"
            detail += f"; {times}: check the metres per unit (depth_scale)"
            break
    return BadFrame("depth out of range", detail)
