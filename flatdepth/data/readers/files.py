"""What the readers share: finding files on any file system, and reading what others wrote.

Everything read here comes from someone else's disk. Damage is reported as ``BadFrame``; a missing
file system or directory is a ``UserError``.
"""

import csv
import errno
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float64, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from flatdepth.data.readers.base import Item
from flatdepth.data.shards.codec import MAX_PIXELS
from flatdepth.data.shards.read import is_intrinsics
from flatdepth.errors import BadFrame, UserError

# Pillow knows formats that run other programs (EPS); only plain raster formats are ever tried.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
# An MPO is a JPEG with more JPEGs appended; every JPEG decoder reads its first picture.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_EXIF_ORIENTATION = 0x0112

MAX_BYTES = 8 * MAX_PIXELS
"""Files and arrays above this are refused: room for the 16-bit RGBA of an image of MAX_PIXELS."""

_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EIO)
_UPRIGHT = (0, 1)


@dataclass(frozen=True, slots=True)
class Tree:
    """A directory on any file system that fsspec knows (``/data/x``, ``s3://bucket/x``,
    ``zip://x::/data/all.zip``). Paths below it are relative and '/'-separated; names that start
    with a dot are left out. All listings are sorted.
    """

    root: str

    def url(self, path: str) -> str:
        """The path or URL of a file below the root."""
        head, chain, outer = self.root.partition("::")
        slash = "" if not path or head.endswith("/") else "/"
        return f"{head}{slash}{path}{chain}{outer}"

    def path(self, url: str) -> str:
        """The inverse of ``url``."""
        head, chain, outer = self.root.partition("::")
        return url.removesuffix(chain + outer).removeprefix(head).removeprefix("/")

    def dirs(self, path: str = "") -> list[str]:
        """The names of the directories in ``path``; none if it does not exist."""
        return [name for name, is_dir in self._entries(path) if is_dir]

    def files(self, path: str = "") -> list[str]:
        """The names of the files in ``path``; none if it does not exist."""
        return [name for name, is_dir in self._entries(path) if not is_dir]

    def walk(self, path: str = "") -> Iterator[str]:
        """The paths of all files in ``path`` and below, relative to the root."""
        prefix = f"{path}/" if path else ""
        for name, is_dir in self._entries(path):
            if is_dir:
                yield from self.walk(prefix + name)
            else:
                yield prefix + name

    def is_file(self, path: str) -> bool:
        """Whether ``path`` is a file below the root."""
        parent, _, name = path.rpartition("/")
        return name in self.files(parent)

    def layout_error(self, expected: str) -> UserError:
        """The error for a root that does not hold the layout ``expected``."""
        try:
            names = [f"{name}/" if is_dir else name for name, is_dir in self._list("")]
        except (FileNotFoundError, NotADirectoryError):
            return UserError(f"{self.root}: no such directory; expected {expected}")
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return UserError(f"{self.root}: expected {expected}, found {shown or 'nothing'}")

    def _entries(self, path: str) -> list[tuple[str, bool]]:
        try:
            return self._list(path)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _list(self, path: str) -> list[tuple[str, bool]]:
        try:
            fs, root = url_to_fs(self.url(path))
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.root}: {error}") from error
        root = root.rstrip("/")
        entries = []
        for entry in fs.ls(root, detail=True):
            full = entry["name"].rstrip("/")
            name = full.rpartition("/")[2]
            # Object stores list a directory's own marker among its entries.
            if full.strip("/") != root.strip("/") and name and not name.startswith("."):
                entries.append((name, entry["type"] == "directory"))
        return sorted(entries)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises BadFrame if it is missing, unreadable or has over ``MAX_BYTES``.

    Other failures stay loud, and so does refusal by a remote file system, which more likely comes
    from credentials than from the file.
    """
    opening = fsspec.open(url, "rb")
    try:
        with opening as file:
            known_size = getattr(file, "size", None) or 0  # zip members and the like have none
            data = b"" if known_size > MAX_BYTES else bytes(file.read(MAX_BYTES + 1))
    except FileNotFoundError as error:
        raise BadFrame("file missing", url) from error
    except OSError as error:
        if error.errno not in _NO_ACCESS or not isinstance(opening.fs, LocalFileSystem):
            raise
        raise BadFrame("file unreadable", f"{url}: {error.strerror}") from error
    if max(known_size, len(data)) > MAX_BYTES:
        raise BadFrame("file too large", f"{url}: more than {MAX_BYTES} bytes")
    return data


def read_table(url: str, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a text table with a header. Raises UserError if one of ``columns`` is missing."""
    try:
        with fsspec.open(url, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            header = list(reader.fieldnames or ())
            rows = list(reader)
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{url}: not a text table ({error})") from error
    missing = [column for column in columns if column not in header]
    if missing:
        raise UserError(
            f"{url}: expected the columns {', '.join(columns)}, found {', '.join(header)}"
        )
    return rows


def make_key(path: str) -> str:
    """A path without its extension as a frame key: letters of any script, digits, '_' and '-'."""
    parts = re.sub(r"\.[^./]*$", "", path).split("/")
    return "/".join(re.sub(r"[^\w-]", "_", part) for part in parts)


def sort_items(items: Iterable[Item]) -> tuple[Item, ...]:
    """Sort by key. Of items with the same key all but the first file get a number behind it."""
    items = sorted(items, key=lambda item: (item.key, *item.files.values()))
    keys = Counter(item.key for item in items)
    found: dict[str, Item] = {}
    for item in items:
        key, number = item.key, 1
        while key in found or (number > 1 and key in keys):
            number += 1
            key = f"{item.key}-{number}"
        found[key] = replace(item, key=key)
    return tuple(found[key] for key in sorted(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The bytes of an image file that fully decodes, with its format and size in pixels."""

    image: bytes
    image_ext: str
    width: int
    height: int


def read_image(url: str) -> Picture:
    """The colour image of an RGB-D frame: jpg, png and webp as they are, the rest as JPEG.

    Raises BadFrame if it is missing, damaged, absurdly large, or shown rotated by its EXIF data
    (the depth map would not fit).
    """
    data = read_bytes(url)
    image, orientation = _decode(data, url)
    if orientation not in _UPRIGHT:
        raise BadFrame("image rotated by EXIF", f"{url}: orientation {orientation}")
    return _keep(data, image) or encode_jpeg(_to_rgb(image, url))


def read_art(url: str, max_side: int) -> Picture:
    """A picture without depth: its own bytes if jpg, png or webp, upright and small enough.

    Otherwise it is turned upright, shrunk (Lanczos) until its longer side is ``max_side`` pixels
    (0: any size is small enough), and encoded as JPEG. Raises BadFrame if damaged.
    """
    data = read_bytes(url)
    image, orientation = _decode(data, url)
    small = max_side == 0 or max(image.size) <= max_side
    kept = _keep(data, image) if small and orientation in _UPRIGHT else None
    if kept is not None:
        return kept
    pixels = _to_rgb(ImageOps.exif_transpose(image), url)
    if not small:
        shrink = max_side / max(pixels.size)
        width, height = (max(1, round(side * shrink)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return encode_jpeg(pixels)


def encode_jpeg(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> Picture:
    """RGB pixels as JPEG, quality 95, full-resolution colour, always the same settings."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    # Without the source's EXIF, so that nothing turns an upright picture a second time.
    image.save(buffer, "JPEG", quality=95, subsampling=0, optimize=False, progressive=False)
    return Picture(image=buffer.getvalue(), image_ext="jpg", width=image.width, height=image.height)


def read_depth_image(url: str) -> NDArray[Any]:
    """The (H, W) uint16 codes of a 16-bit PNG, PGM or TIFF, or the float32 ones of a TIFF.

    Raises BadFrame for anything else: 8-bit and colour images are drawings of depth, not depth.
    """
    data = read_bytes(url)
    if data.startswith(b"P5"):
        return _parse_pgm(data, url)
    image, _ = _decode(data, url, role="depth")
    if image.mode == "F":
        return np.asarray(image).astype(np.float32)
    if not image.mode.startswith("I;16"):
        raise BadFrame("depth is not 16-bit", f"{url}: a {image.format} of mode {image.mode}")
    return np.asarray(image).astype(np.uint16)


def read_rgba_floats(url: str) -> NDArray[np.float32]:
    """(H, W) float32 whose four bytes are the blue, green, red and alpha of an image (TartanAir).

    Raises BadFrame if it is no such image.
    """
    image, _ = _decode(read_bytes(url), url, role="depth")
    if image.mode != "RGBA":
        raise BadFrame("depth is not RGBA", f"{url}: a {image.format} of mode {image.mode}")
    bgra = np.ascontiguousarray(np.asarray(image)[..., [2, 1, 0, 3]])
    return bgra.view("<f4")[..., 0].astype(np.float32)


def read_hdf5(url: str, names: Sequence[str]) -> list[NDArray[Any]]:
    """The named arrays of one HDF5 file. Raises BadFrame if the file is damaged or lacks one."""
    data = read_bytes(url)
    with _open_hdf5(io.BytesIO(data), url) as file:
        return [_read_dataset(file, name, url) for name in names]


def read_hdf5_row(url: str, names: Sequence[str], row: int) -> list[NDArray[Any]]:
    """One row along the first axis of each named array, of a file that may be of any size.

    Raises BadFrame as ``read_hdf5`` does, and if there is no such row.
    """
    with _open_hdf5(fsspec.open(url, "rb"), url) as file:
        return [_read_dataset(file, name, url, row) for name in names]


@contextmanager
def _open_hdf5(source: AbstractContextManager[Any], url: str) -> Iterator[h5py.File]:
    try:
        with source as data, h5py.File(data, "r") as file:
            yield file
    except BadFrame:
        raise
    except Exception as error:  # h5py raises nearly anything on damaged bytes
        raise BadFrame("HDF5 unreadable", f"{url}: {error}") from error


def check_same_size(picture: Picture, depth: NDArray[Any], where: str, fix: str = "") -> None:
    """Raise BadFrame, with a ``fix``, unless ``depth`` is (H, W) of the picture's size."""
    if depth.shape != (picture.height, picture.width):
        raise BadFrame(
            "image and depth differ in size",
            f"{where}: image {picture.width}x{picture.height}, depth of shape {depth.shape}{fix}",
        )


def fit_picture(picture: Picture, height: int, width: int) -> Picture:
    """A picture at another size of the same proportions, to 2 %.

    Raises BadFrame if the proportions differ.
    """
    if (picture.height, picture.width) == (height, width):
        return picture
    if abs(picture.width * height / (picture.height * width) - 1) > 0.02:
        raise BadFrame(
            "image and depth differ in proportions",
            f"image {picture.width}x{picture.height}, depth {width}x{height}",
        )
    image = _to_rgb(Image.open(io.BytesIO(picture.image)), "image")
    return encode_jpeg(image.resize((width, height), Image.Resampling.LANCZOS))


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Float64[np.ndarray, "3 3"]:
    """``K_px`` from focal lengths and principal point in pixels, centres at integer + 0.5."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def read_intrinsics(url: str, width: int, height: int) -> Float64[np.ndarray, "3 3"]:
    """The intrinsics in a text file, in pixels and with its own convention of pixel centres.

    The file has fx fy cx cy, the same behind width and height (five distortion coefficients after
    them, as Matterport3D has them, are ignored), or a matrix of 3x3, 3x4 or 4x4 row by row, numbers
    separated by spaces, commas, semicolons or brackets. Or it is JSON with these names or with a
    3x3 ``K`` or ``intrinsic_matrix``, row by row or (Record3D, Open3D) column by column.

    Args:
        width, height: of the image they are for, in pixels.

    Raises:
        BadFrame: the file is missing, is not such a text, or names another size.
    """
    reason = "intrinsics unreadable"
    try:
        text = read_bytes(url).decode("utf-8-sig")
        if text.lstrip().startswith("{"):
            numbers = _json_intrinsics(json.loads(text))
        else:
            numbers = [float(word) for word in re.split(r"[\s,;\[\]()]+", text) if word]
    except BadFrame:
        raise
    except Exception as error:  # JSON may hold anything
        raise BadFrame(reason, f"{url}: {error}") from error
    if len(numbers) in (6, 11):
        if numbers[:2] != [width, height]:
            size = "x".join(f"{side:g}" for side in numbers[:2])
            raise BadFrame(
                "intrinsics of another size",
                f"{url}: {size} for {width}x{height}; with --resize_images, --intrinsics_of image"
                " takes those of the images' own size",
            )
        numbers = numbers[2:6]
    if len(numbers) == 4:
        K_px = pinhole(*numbers)
    elif len(numbers) in (9, 12, 16):
        K_px = np.array(numbers).reshape(4 if len(numbers) == 16 else 3, -1)[:3, :3]
    else:
        expected = "4 or 6 numbers or a matrix of 3x3, 3x4 or 4x4"
        raise BadFrame(reason, f"{url}: expected {expected}, found {len(numbers)} numbers")
    if not is_intrinsics(K_px):
        raise BadFrame(reason, f"{url}: no intrinsics, {K_px.tolist()}")
    return K_px


def _json_intrinsics(about: Any) -> list[float]:
    """width, height (if there), fx, fy, cx, cy; any exception if they are not there."""
    about = about.get("camera", about)
    width, height = (about.get(name[0], about.get(name)) for name in ("width", "height"))
    size = [float(width), float(height)] if width and height else []
    matrix = about.get("K", about.get("intrinsic_matrix"))
    if matrix is None:
        return size + [float(about[name]) for name in ("fx", "fy", "cx", "cy")]
    K = np.array(matrix, np.float64).reshape(3, 3)
    K = K if K[2].tolist() == [0, 0, 1] else K.T
    return [*size, *K[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()]


def relative_paths(tree: Tree, files: Mapping[str, str]) -> dict[str, object]:
    """Where a frame came from, for its ``meta``: free of the machine's own directories."""
    return {role: printable(tree.path(url)) for role, url in files.items()}


def printable(path: str | Path) -> str:
    """A path on one line: control characters and undecodable bytes become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def _decode(data: bytes, url: str, role: str = "image") -> tuple[Image.Image, int]:
    """The decoded image and its EXIF orientation (1 is upright)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata of an image that decodes
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadFrame(f"{role} too large", f"{url}: {image.width}x{image.height} pixels")
            # Before decoding: Pillow turns a TIFF upright, and forgets that it did.
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            image.load()
    except BadFrame:
        raise
    except Image.DecompressionBombError as error:
        raise BadFrame(f"{role} too large", f"{url}: more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:  # names an address in memory instead of the file
        formats = ", ".join(_FORMATS)
        raise BadFrame(f"{role} unreadable", f"{url}: damaged or none of {formats}") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise BadFrame(f"{role} unreadable", f"{url}: {error}") from error
    return image, orientation


def _keep(data: bytes, image: Image.Image) -> Picture | None:
    ext = _KEPT_FORMATS.get(image.format or "")
    if ext is None:
        return None
    return Picture(image=data, image_ext=ext, width=image.width, height=image.height)


def _to_rgb(image: Image.Image, url: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise BadFrame("image is not 8- or 16-bit", url)
    if image.has_transparency_data:  # on white, as shards decode the files kept as they are
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _parse_pgm(data: bytes, url: str) -> NDArray[np.uint16]:
    """Binary PGM. Not left to Pillow, which rescales the codes unless the maximum is 65535."""
    number = rb"\s+(?:#[^\n]*\n\s*)*(\d+)"
    header = re.match(rb"P5" + number * 3 + rb"\s", data)
    if header is None:
        raise BadFrame("depth unreadable", f"{url}: damaged PGM header")
    width, height, largest = (int(group) for group in header.groups())
    if not 255 < largest < 65536:
        raise BadFrame("depth is not 16-bit", f"{url}: a PGM with maximum {largest}")
    if len(data) - header.end() < 2 * width * height:
        raise BadFrame("depth unreadable", f"{url}: truncated PGM")
    codes = np.frombuffer(data, ">u2", count=width * height, offset=header.end())
    return codes.reshape(height, width).astype(np.uint16)


def _read_dataset(file: h5py.File, name: str, url: str, row: int | None = None) -> NDArray[Any]:
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise BadFrame("HDF5 unreadable", f"{url}: no dataset {name}, found {sorted(file)}")
    dataset = file[name]
    # A stranger's file must not make us read other files of this machine.
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise BadFrame("HDF5 unreadable", f"{url}: {name} is not a plain dataset")
    chunk = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    rows = 1 if row is None or not dataset.shape else dataset.shape[0]
    if dataset.size is None or max(dataset.nbytes // max(rows, 1), chunk) > MAX_BYTES:
        raise BadFrame("HDF5 unreadable", f"{url}: {name} has the shape {dataset.shape}")
    array = np.asarray(dataset[() if row is None else row])
    return array.astype(array.dtype.newbyteorder("="))
