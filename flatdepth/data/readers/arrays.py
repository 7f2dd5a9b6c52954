"""Depth maps and masks as arrays, from every kind of file that holds one."""

import io
import math
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from flatdepth.data.readers.files import (
    MAX_BYTES,
    damage_named,
    ending,
    read_bytes,
    read_grey_image,
    read_hdf5,
)
from flatdepth.data.shards.codec import MAX_PIXELS
from flatdepth.errors import BadFrame, import_extra

_HEADER_BYTES = 1 << 16  # numpy reads at most 10000 characters of a header as Python text
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # all that numpy writes; bounded memory
ARRAY_ENDINGS = (".npy", ".npz", ".h5", ".hdf5", ".exr")
"""Of files that hold arrays; all others are images."""
_EXR_DEPTHS = ("Z", "V", "Y", "R")


def read_depth_array(url: str, name: str, allow_8bit: bool = False) -> NDArray[Any]:
    """A depth map as its file stores it; integers that fit 16 bits become uint16.

    Args:
        url: see ``read_array``.
        name: of the array or channel, where a file has several.
        allow_8bit: without it 8-bit values, most often drawings of depth, are refused.

    Returns:
        (H, W), of any type of numbers; float16, float32 and float64 as they are.

    Raises:
        BadFrame, UserError: as ``read_array``, and for 8-bit values.
    """
    array = read_array(url, name)
    if array.dtype.itemsize == 1 and not allow_8bit:
        fix = "if they are depth and no drawing of it, --depth_8bit true takes them"
        raise BadFrame("depth is not 16-bit", f"{url}: values of 8 bits; {fix}")
    fits = array.dtype.kind in "biu" and array.min() >= 0 and array.max() < 2**16
    return array.astype(np.uint16) if fits else array


def read_array(url: str, name: str, role: str = "depth") -> NDArray[Any]:
    """The (H, W) numbers or truth values in a file, by its ending.

    ``.npy``; ``.npz``, its only array or the one called ``name``; ``.h5`` and ``.hdf5``, the array
    called ``name``; ``.exr``, the channel called ``name``, else Z, V, Y, R or the only one; any
    other ending is an image, see ``files.read_grey_image``. A first or last axis of length 1 is
    dropped.

    Args:
        url: path or URL.
        name: of the array or channel.
        role: what it is, for messages.

    Raises:
        BadFrame: the file is missing, damaged or absurdly large, or has no such array.
        UserError: the package that reads ``.exr`` files is not installed.
    """
    kind = ending(url)
    if kind in (".h5", ".hdf5"):
        [array] = read_hdf5(url, [name])
    elif kind in (".npy", ".npz", ".exr"):
        data = read_bytes(url)
        with damage_named(f"{role} unreadable", url):
            if kind == ".npy":
                array = _npy(data)
            else:
                array = _npz(data, name) if kind == ".npz" else _exr(data, name)
    else:
        array = read_grey_image(url, role)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.squeeze(axis=2 if array.shape[2] == 1 else 0)
    if array.ndim != 2 or not 0 < array.size <= MAX_PIXELS or array.dtype.kind not in "biuf":
        found = f"{array.dtype} of shape {array.shape}"
        raise BadFrame(f"{role} is not one map of numbers", f"{url}: {found}")
    return array


def _npy(data: bytes) -> NDArray[Any]:
    """The array of numpy.save, never more than the bytes that are there."""
    file = io.BytesIO(data[:_HEADER_BYTES])
    if npy_format.read_magic(file) == (1, 0):
        shape, by_column, dtype = npy_format.read_array_header_1_0(file)
    else:
        shape, by_column, dtype = npy_format.read_array_header_2_0(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"expected plain numbers, found {dtype}")
    count = math.prod(shape)
    if min(shape, default=0) < 1 or count * dtype.itemsize > len(data) - file.tell():
        raise ValueError(f"the shape is {shape}, but there are {len(data)} bytes")
    values = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape, order="F" if by_column else "C").astype(dtype.newbyteorder("="))


def _npz(data: bytes, name: str) -> NDArray[Any]:
    """An array of numpy.savez or numpy.savez_compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        info = members[_chosen(name, list(members))]
        if info.file_size > MAX_BYTES or info.compress_type not in _ZIP_METHODS:
            raise ValueError(f"{info.filename} announces {info.file_size} bytes")
        with archive.open(info) as member:
            return _npy(member.read(info.file_size))


def _exr(data: bytes, name: str) -> NDArray[Any]:
    """A channel of the first part of an OpenEXR file: float16, float32 or uint32."""
    openexr = import_extra("OpenEXR", "depth in .exr files", "exr")
    header = openexr.File(io.BytesIO(data), header_only=True, num_threads=0).header()
    (left, top), (right, bottom) = (corner.tolist() for corner in header["dataWindow"])
    names = [channel.name for channel in header["channels"]]
    pixels = (right - left + 1) * (bottom - top + 1)
    if not 0 < 4 * pixels * len(names) <= MAX_BYTES:
        raise ValueError(f"announces {len(names)} channels of {pixels} pixels")
    wanted = [depth for depth in _EXR_DEPTHS if depth in names]
    channel = _chosen(name if name in names or not wanted else wanted[0], names)
    with redirect_stdout(io.StringIO()):  # where it would print what is damaged
        file = openexr.File(io.BytesIO(data), separate_channels=True, num_threads=0)
    return np.asarray(file.channels()[channel].pixels)


def _chosen(name: str, names: Sequence[str]) -> str:
    """``name``, or the only one of ``names``. Raises BadFrame if there is no such name."""
    if name in names or len(names) == 1:
        return name if name in names else names[0]
    found = f"no array {name!r}, found {', '.join(sorted(names)[:20]) or 'none'}"
    raise BadFrame("no such array in the file", f"{found}; name one with --depth_array")
