"""NYU Depth V2 (Silberman et al., 2012): the labelled ``.mat`` or FastDepth's HDF5 files."""

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import h5py
import numpy as np
from numpy.typing import NDArray

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    Tree,
    check_same_size,
    encode_jpeg,
    make_key,
    pinhole,
    read_bytes,
    read_hdf5,
    read_hdf5_row,
    relative_paths,
    sort_items,
)
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import BadFrame, UserError, import_extra
from flatdepth.types import DepthCodes, RawFrame

_SPLITS = {"train": "train", "val": "test"}
_LABELLED = "nyu_depth_v2_labeled.mat"
_LAYOUT = f"train/<scene>/NNNNN.h5 or val/official/NNNNN.h5, or {_LABELLED}"

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

    ``nyu_depth_v2_labeled.mat`` (MATLAB 7.3, which is HDF5 with all axes reversed) has 1449 frames
    with their scenes; ``splits.mat`` beside it says which are for testing (read with SciPy).
    """

    raw: str
    """Directory or URL that holds ``train`` and ``val``, or ``nyu_depth_v2_labeled.mat``."""
    labelled_depth: Literal["depths", "rawDepths"] = "depths"
    """Array of the ``.mat``: ``depths``, with holes filled in, or ``rawDepths`` of the sensor."""

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
        items = sort_items([*_find(tree), *_find_labelled(tree)])
        if not items:
            raise tree.layout_error(_LAYOUT)
        return Listing(items=items)

    def read(self, item: Item) -> RawFrame:
        """Read one frame; the colours are encoded as JPEG, quality 95, 4:4:4."""
        url = item.files["frame"]
        if url.partition("::")[0].endswith(".mat"):
            row = int(item.key.rpartition("/")[2]) - 1
            arrays = read_hdf5_row(url, ["images", self.labelled_depth], row)
            rgb, depth = (array.swapaxes(-1, -2) for array in arrays)
        else:
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


def _find_labelled(tree: Tree) -> Iterator[Item]:
    if not tree.is_file(_LABELLED):
        return
    url = tree.url(_LABELLED)
    try:
        with fsspec.open(url, "rb") as data, h5py.File(data, "r") as file:
            scenes = ["".join(map(chr, file[name][:, 0])) for name in file["scenes"][0]]
    except Exception as error:  # h5py raises nearly anything on other files
        raise UserError(f"{url}: expected the labelled frames of NYU Depth V2 ({error})") from error
    splits = _labelled_splits(tree)
    for number, name in enumerate(scenes, 1):
        scene = re.sub(r"(?<=\d)[a-z]$", "", name)
        split = splits.get(number, "")
        yield Item(key=f"labelled/{number:04d}", scene=scene, files={"frame": url}, split=split)


def _labelled_splits(tree: Tree) -> dict[int, str]:
    """Number of a labelled frame, from 1 -> its official split."""
    if not tree.is_file("splits.mat"):
        warnings.warn(f"{tree.root}: no splits.mat, so no official split", stacklevel=4)
        return {}
    url = tree.url("splits.mat")
    matlab = import_extra("scipy", url).io
    try:
        table = matlab.loadmat(io.BytesIO(read_bytes(url)))
        names = {"trainNdxs": "train", "testNdxs": "test"}
        return {int(n): split for name, split in names.items() for n in table[name].ravel()}
    except Exception as error:  # SciPy raises nearly anything on other files
        raise UserError(
            f"{url}: expected trainNdxs and testNdxs of NYU Depth V2 ({error})"
        ) from error


def _codes(depth: NDArray[Any], url: str) -> DepthCodes:
    if depth.dtype == np.uint16:
        return DepthCodes(codes=depth, scale_m=0.001, hole=0)
    if depth.dtype != np.float32:
        raise BadFrame("depth is neither float32 nor uint16", f"{url}: {depth.dtype}")
    return encode_log_u16(np.where(depth == 0, np.float32(np.nan), depth))
