"""What every reader offers to the packing tool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from flatdepth.types import RawFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One frame found in a raw layout, not yet read.

    Attributes:
        key: the future ``RawFrame.key``.
        scene: the future ``RawFrame.scene``.
        files: role -> path or URL of the files to read ("image", "depth", ...).
        split: the official partition, "" if there is none.
    """

    key: str
    scene: str
    files: Mapping[str, str] = field(default_factory=dict)
    split: str = ""


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
