"""SynMirror: rendered mirrors with exact depth, one HDF5 file of BlenderProc per view."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    Tree,
    damage_named,
    encode_jpeg,
    ending,
    make_key,
    pinhole,
    read_hdf5,
    relative_paths,
    sort_items,
)
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import BadFrame, expect_within
from flatdepth.types import RawFrame, Region
from flatdepth.untrusted import parse_json

_ARRAYS = ("colors", "depth", "category_id_segmaps", "cam_states")
_MIRROR = 1


@dataclass(frozen=True, slots=True)
class SynMirrorReader:
    """SynMirror as unpacked: ``SOURCE/PART/ID/{0,1,2}.hdf5``; each ID, an object, is a scene.

    ``colors`` (H, W, 3) uint8, ``depth`` planar z of the mirror's surface itself, 1e10 in the void,
    ``category_id_segmaps`` with 1 for the mirror, and ``cam_states``, JSON with ``cam_K`` for pixel
    centres at integers. Objects are scaled to a size of 1, so its units are no metres.
    """

    raw: str
    """Directory or URL; all ``.hdf5`` files in it and below are taken."""
    metres_per_unit: float = 1.0
    """Metres per unit of depth, as you like."""
    dataset: str = "synmirror"
    """Short name of the data set."""

    def __post_init__(self) -> None:
        expect_within("metres_per_unit", self.metres_per_unit, 1e-3, 1e3)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, 1000.0)

    def list(self) -> Listing:
        """Find the views. Raises UserError if there are none."""
        tree = Tree(self.raw)
        items = sort_items(
            Item(
                key=make_key(path),
                scene=make_key(path).rpartition("/")[0] or self.dataset,
                files={"view": tree.url(path)},
            )
            for path in tree.walk()
            if ending(path) == ".hdf5"
        )
        if not items:
            raise tree.layout_error("files such as hf-objaverse-v3/000-142/ID/0.hdf5")
        return Listing(items=items)

    def read(self, item: Item) -> RawFrame:
        """Read one view. Raises BadFrame if it is damaged or lacks an array."""
        url = item.files["view"]
        colours, depth, kinds, states = read_hdf5(url, _ARRAYS)
        with damage_named("HDF5 unreadable", url):
            about: dict[str, Any] = parse_json(states.tobytes().rstrip(b"\0"))
            (fx, _, cx), (_, fy, cy), _ = np.array(about["cam_K"], np.float64).tolist()
        height, width = depth.shape[:2]
        shapes = (colours.shape, depth.shape, kinds.shape)
        if shapes != ((height, width, 3), (height, width), (height, width)):
            raise BadFrame("arrays differ in size", f"{url}: {', '.join(map(str, shapes))}")
        depth_m = depth.astype(np.float32) * np.float32(self.metres_per_unit)
        depth_m[~(depth_m > 0)] = np.nan
        depth_m[depth_m > self.depth_range_m[1]] = np.inf
        picture = encode_jpeg(colours.astype(np.uint8))
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=width,
            height=height,
            depth=encode_log_u16(depth_m, near_m=1e-3, far_m=1000.0),
            K_px=pinhole(fx, fy, cx + 0.5, cy + 0.5),
            meta=relative_paths(Tree(self.raw), item.files),
            region=np.where(kinds == _MIRROR, Region.MIRROR, Region.BACKGROUND).astype(np.uint8),
        )
