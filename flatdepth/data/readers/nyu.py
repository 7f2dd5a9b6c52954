"""NYU Depth V2 (Silberman et al., 2012) in the HDF5 layout of FastDepth (Wofk et al., 2019)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    Tree,
    check_same_size,
    encode_jpeg,
    make_key,
    pinhole,
    read_hdf5,
    relative_paths,
    sort_items,
)
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import BadFrame
from flatdepth.types import DepthCodes, RawFrame

_SPLITS = {"train": "train", "val": "test"}
_LAYOUT = "train/<scene>/NNNNN.h5 or val/official/NNNNN.h5"

# The toolbox's calibration of the colour camera, for pixel coordinates that start at 1.
_FOCAL = (518.86, 519.47)
_CENTRE_FROM_ONE = (325.58, 253.74)


@dataclass(frozen=True, slots=True)
class NyuReader:
    """NYU frames: ``rgb`` uint8 (3, H, W) and ``depth`` (H, W), 0 where unknown.

    Depth is float32 in metres, kept as logarithmic 16-bit codes, or (in some mirrors) uint16 in
    millimetres, kept bit for bit. The official test frames are ``val/official``; they carry no
    scene name, so they count as one scene. A trailing letter of a training scene
    (``basement_0001a``, ``basement_0001b``) numbers the recordings of one room and is not part of
    the scene.

    The MATLAB toolbox back-projects with columns counted 1..640 and rows 1..480
    (``meshgrid(1:640, 1:480)``), where the first pixel's centre is 1; flatdepth puts it at 0.5,
    so 0.5 is *subtracted* from the principal point.
    """

    raw: str
    """Directory or URL that holds ``train`` and ``val``."""

    @property
    def dataset(self) -> str:
        return "nyu"

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, 10.1)  # the sensor ends at 10 m; codes are rounded

    def list(self) -> Listing:
        """Find the frames. Raises UserError if there are none."""
        tree = Tree(self.raw)
        items = sort_items(_find(tree))
        if not items:
            raise tree.layout_error(_LAYOUT)
        return Listing(items=items)

    def read(self, item: Item) -> RawFrame:
        """Read one frame; the colours are encoded as JPEG, quality 95, 4:4:4."""
        url = item.files["frame"]
        rgb, depth = read_hdf5(url, ["rgb", "depth"])
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[0] != 3:
            raise BadFrame("image is not 3xHxW uint8", f"{url}: {rgb.dtype} {rgb.shape}")
        picture = encode_jpeg(np.ascontiguousarray(rgb.transpose(1, 2, 0)))
        check_same_size(picture, depth, url)
        (fx, fy), (cx, cy) = _FOCAL, _CENTRE_FROM_ONE
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            depth=_codes(depth, url),
            K_px=pinhole(fx, fy, cx - 0.5, cy - 0.5),
            split=item.split,
            meta=relative_paths(Tree(self.raw), item.files),
        )


def _find(tree: Tree) -> Iterator[Item]:
    for part, split in _SPLITS.items():
        for directory in tree.dirs(part):
            for name in tree.files(f"{part}/{directory}"):
                path = f"{part}/{directory}/{name}"
                if name.endswith(".h5"):
                    yield Item(
                        key=make_key(path),
                        scene=re.sub(r"(?<=\d)[a-z]$", "", directory),
                        files={"frame": tree.url(path)},
                        split=split,
                    )


def _codes(depth: NDArray[Any], url: str) -> DepthCodes:
    if depth.dtype == np.uint16:
        return DepthCodes(codes=depth, scale_m=0.001, hole=0)
    if depth.dtype != np.float32:
        raise BadFrame("depth is neither float32 nor uint16", f"{url}: {depth.dtype}")
    return encode_log_u16(np.where(depth == 0, np.float32(np.nan), depth))
