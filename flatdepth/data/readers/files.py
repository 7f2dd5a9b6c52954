"""What the readers share: finding files on any file system, and reading what others wrote.

Everything read here comes from someone else's disk. Damage is reported as ``BadFrame``; a missing
file system or directory is a ``UserError``.
"""

import csv
import errno
import importlib.util
import io
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import h5py
import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Float64, UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from flatdepth.data.readers.base import Item
from flatdepth.data.shards.codec import MAX_PIXELS
from flatdepth.data.shards.read import is_intrinsics
from flatdepth.errors import BadFrame, UserError, printable
from flatdepth.untrusted import parse_json, parse_xml

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".avif", ".heic", ".heif", ".tif", ".tiff"}
    | {".bmp", ".ppm", ".pgm"}
)
"""Endings of the images that are looked for in a directory; files may hold another format."""

FORMAT_NAMES = "JPEG, MPO, PNG, WebP, AVIF, HEIC, TIFF, BMP or PPM"

OTHER_IMAGES = frozenset(
    {".gif", ".jxl", ".jp2", ".svg", ".tga", ".psd", ".exr", ".hdr", ".dng", ".raw", ".cr2"}
    | {".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
)
"""Endings of images that are not read."""

# Pillow knows formats that run other programs (EPS); only plain raster formats are ever tried.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "PPM")
_HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1"}
)
HEAD_BYTES = 64
"""Of a file, enough for ``image_formats``."""

# An MPO is a JPEG with more JPEGs appended; every JPEG decoder reads its first picture.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_EXIF_ORIENTATION = 0x0112
_GREY_TYPES = {"1": np.bool_, "L": np.uint8, "I": np.int32, "F": np.float32}

MAX_BYTES = 8 * MAX_PIXELS
"""Files and arrays above this are refused: room for the 16-bit RGBA of an image of MAX_PIXELS."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""

_TEXT_BYTES = 1 << 24  # Record3D has the poses of all frames in the same file

_NO_ACCESS = (
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EIO,
    errno.ENAMETOOLONG,
)


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


def read_bytes(url: str, limit: int = MAX_BYTES) -> bytes:
    """The whole file. Raises BadFrame if it is missing, unreadable or has over ``limit`` bytes.

    Other failures stay loud, and so does refusal by a remote file system, which more likely comes
    from credentials than from the file.
    """
    if "\0" in url:
        raise BadFrame("file missing", url)
    opening = fsspec.open(url, "rb")
    try:
        with opening as file:
            known_size = getattr(file, "size", None) or 0  # zip members and the like have none
            data = b"" if known_size > limit else bytes(file.read(limit + 1))
    except FileNotFoundError as error:
        raise BadFrame("file missing", url) from error
    except OSError as error:
        if error.errno not in _NO_ACCESS or not isinstance(opening.fs, LocalFileSystem):
            raise
        raise BadFrame("file unreadable", f"{url}: {error.strerror}") from error
    if max(known_size, len(data)) > limit:
        raise BadFrame("file too large", f"{url}: more than {limit} bytes")
    return data


def read_table(url: str, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a text table with a header.

    Raises UserError if it is none, one of ``columns`` is missing, or a row has fewer.
    """
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
    for number, row in enumerate(rows, start=2):
        if any(row[column] is None for column in columns):
            raise UserError(f"{url}: line {number} is cut short; restore the file")
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


def ending(path: str) -> str:
    """The ending of a file's path or URL in small letters: ``.png``, or "" if there is none."""
    found = re.search(r"\.[^./]+$", path.partition("::")[0])
    return found[0].lower() if found else ""


def warn_of_unread(root: str, paths: Iterable[str]) -> None:
    """One warning that counts ``paths`` by their endings, if there are any."""
    counts = sorted(Counter(ending(path) or "without" for path in paths).items())
    if counts:
        listed = ", ".join(f"{number} {name}" for name, number in counts)
        warnings.warn(
            f"{printable(root)}: files left unread by their endings: {listed}", stacklevel=3
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The bytes of an image file that fully decodes, with its format and size in pixels.

    ``turned_from`` is the EXIF orientation that it was turned upright from, 1 if it was not.
    """

    image: bytes
    image_ext: str
    width: int
    height: int
    turned_from: int = 1


def read_image(
    url: str, depth_shape: tuple[int, ...] | None = None, image_bits: int = 16
) -> Picture:
    """The colour image of an RGB-D frame: jpg, png and webp as they are, the rest as JPEG.

    Depth belongs to the pixels as they are stored or, where the image's EXIF data tell viewers to
    turn it, to the image as it is shown. The proportions of the depth decide. An image that it
    fits only when turned upright is turned, and encoded as JPEG.

    Args:
        depth_shape: (H, W) of the depth map, if it is known.
        image_bits: bits that the values of 16-bit grey images have; they are encoded as JPEG if
            these are fewer than 16.

    Raises:
        BadFrame: the image is missing, damaged, absurdly large, has values of more than
            ``image_bits``, or it cannot be told whether the depth fits it turned or not.
    """
    data = read_bytes(url)
    image, orientation = _decode(data, url)
    turn = orientation in TURNS and _depth_is_upright(image, orientation, depth_shape, url)
    kept = None if turn or (image_bits < 16 and _is_deep(image)) else _keep(data, image)
    if kept is not None:
        return kept
    with damage_named("image unreadable", url):
        pixels = to_rgb(image, image_bits)
    if turn:
        return replace(encode_jpeg(pixels.transpose(TURNS[orientation])), turned_from=orientation)
    return encode_jpeg(pixels)


def _depth_is_upright(
    image: Image.Image, orientation: int, depth_shape: tuple[int, ...] | None, url: str
) -> bool:
    """Whether a depth map is that of a rotated image as it is shown and not as it is stored."""
    if depth_shape is not None:
        shown = image.size if orientation > 4 else image.size[::-1]
        as_stored = same_proportions(*image.size[::-1], *depth_shape)
        as_shown = same_proportions(*shown, *depth_shape)
        if not (as_stored and as_shown):
            return as_shown
    raise BadFrame(
        "image rotated by EXIF",
        f"{url}: orientation {orientation}, and the depth's size does not tell whether it is"
        " that of the image as stored or as shown; save the image turned and without the tag",
    )


def same_proportions(height: int, width: int, other_height: int, other_width: int) -> bool:
    """Whether two sizes, each at least one pixel, have the same proportions to 2 %."""
    return abs(width * other_height - height * other_width) <= 0.02 * height * other_width


def read_art(url: str, max_side: int) -> Picture:
    """A picture without depth: its own bytes if jpg, png or webp, upright and small enough.

    Otherwise it is turned upright, shrunk (Lanczos) until its longer side is ``max_side`` pixels
    (0: any size is small enough), and encoded as JPEG. Raises BadFrame if damaged.
    """
    data = read_bytes(url)
    image, orientation = _decode(data, url)
    small = max_side == 0 or max(image.size) <= max_side
    kept = _keep(data, image) if small and orientation not in TURNS else None
    if kept is not None:
        return kept
    with damage_named("image unreadable", url):
        pixels = to_rgb(image)
    if orientation in TURNS:
        pixels = pixels.transpose(TURNS[orientation])
    if not small:
        shrink = max_side / max(pixels.size)
        width, height = (max(1, round(side * shrink)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return encode_jpeg(pixels)


def encode_jpeg(image: Image.Image | UInt8[np.ndarray, "h w 3"]) -> Picture:
    """RGB pixels as JPEG, quality 95, full-resolution colour, always the same settings.

    Raises BadFrame if a side is longer than JPEG knows.
    """
    pixels = Image.fromarray(np.asarray(image))  # without the source's EXIF, comment and profile
    buffer = io.BytesIO()
    with damage_named("image cannot be stored as JPEG", f"{pixels.width}x{pixels.height}"):
        pixels.save(buffer, "JPEG", quality=95, subsampling=0, optimize=False, progressive=False)
    return Picture(
        image=buffer.getvalue(), image_ext="jpg", width=pixels.width, height=pixels.height
    )


def grey_maximum(url: str) -> int:
    """The largest value of a 16-bit grey image, 0 for other images. Raises BadFrame if damaged."""
    image, _ = _decode(read_bytes(url), url)
    with damage_named("image unreadable", url):
        return int(np.asarray(image).max()) if _is_deep(image) else 0


def read_depth_image(url: str) -> NDArray[Any]:
    """The (H, W) uint16 codes of a 16-bit PNG, PGM or TIFF, or the float32 ones of a TIFF or PFM.

    Raises BadFrame for anything else: 8-bit and colour images are drawings of depth, not depth.
    """
    values = read_grey_image(url)
    if values.dtype not in (np.uint16, np.float32):
        raise BadFrame("depth is not 16-bit", f"{url}: {values.dtype}")
    return values


def read_grey_image(url: str, role: str = "depth") -> NDArray[Any]:
    """The (H, W) values of a grey PNG, TIFF, PGM or PFM as it stores them.

    They are bool, uint8, uint16, int32 (TIFF) or float32 (TIFF, PFM). Raises BadFrame for an image
    with colours or palette, or of a format that does not keep values.
    """
    data = read_bytes(url)
    if data.startswith(b"P5"):
        return _parse_pgm(data, url, role)
    image, _ = _decode(data, url, role)
    # Pillow rescales the values of other PGM files, and has one mode for 16 and 32 bits.
    exact = image.format in ("PNG", "TIFF") or image.mode == "F"
    dtype = np.uint16 if image.mode.startswith("I;16") else _GREY_TYPES.get(image.mode)
    if not exact or dtype is None:
        raise BadFrame(
            f"{role} is not a grey image",
            f"{url}: a {image.format} of mode {image.mode}, expected PNG, TIFF, binary PGM or PFM",
        )
    with damage_named(f"{role} unreadable", url):
        return np.asarray(image).astype(dtype)


def read_label_image(url: str, colours: bool) -> NDArray[Any]:
    """The (H, W) labels in an image: its numbers, or its colours as 0xRRGGBB.

    Numbers are grey values of 8 or 16 bits, places in a palette, or values that are equal in three
    channels; those of a JPEG are not exact. Raises BadFrame for other images.
    """
    data = read_bytes(url)
    if data.startswith(b"P5"):
        return _parse_pgm(data, url, "regions")
    image, _ = _decode(data, url, "regions")
    with damage_named("regions unreadable", url):
        if not colours and (image.mode in ("1", "L", "P", "F") or _is_deep(image)):
            return np.asarray(image)
        rgb = np.asarray(image.convert("RGB")).astype(np.int64)
    if colours:
        return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    if (coloured := (rgb != rgb[..., :1]).any(axis=-1)).any():
        found = "#" + "".join(f"{value:02x}" for value in rgb[coloured][0])
        fix = f"give region_names their meanings, such as {found}:mirror"
        raise BadFrame("regions are colours", f"{url}: {fix}")
    return rgb[..., 0]


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
    with damage_named("HDF5 unreadable", url), h5py.File(io.BytesIO(data), "r") as file:
        return [_read_dataset(file, name, url) for name in names]


def read_hdf5_row(url: str, names: Sequence[str], row: int) -> list[NDArray[Any]]:
    """One row along the first axis of each named array, of a file that may be of any size.

    Raises BadFrame as ``read_hdf5`` does, and if there is no such row.
    """
    opening = fsspec.open(url, "rb")
    with damage_named("HDF5 unreadable", url), opening as data, h5py.File(data, "r") as file:
        return [_read_dataset(file, name, url, row) for name in names]


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
    if not same_proportions(picture.height, picture.width, height, width):
        raise BadFrame(
            "image and depth differ in proportions",
            f"image {picture.width}x{picture.height}, depth {width}x{height}",
        )
    image, _ = _decode(picture.image, "image")
    with damage_named("image unreadable", "image"):
        resized = to_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
    return replace(encode_jpeg(resized), turned_from=picture.turned_from)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Float64[np.ndarray, "3 3"]:
    """``K_px`` from focal lengths and principal point in pixels, centres at integer + 0.5."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def read_intrinsics(url: str, width: int, height: int) -> Float64[np.ndarray, "3 3"]:
    """The intrinsics in a text file, in pixels and with its own convention of pixel centres.

    The file has fx fy cx cy, the same behind width and height (five distortion coefficients after
    them, as Matterport3D has them, are ignored), or a matrix of 3x3, 3x4 or 4x4 row by row, numbers
    separated by spaces, commas, semicolons or brackets. Or it is JSON with these names or with a
    3x3 ``K`` or ``intrinsic_matrix``, row by row or (Record3D, Open3D) column by column. Or it is
    OpenCV's XML with the ``proj_matL`` of rectified images or ``mtxL`` (Booster).

    Args:
        width, height: of the image they are for, in pixels.

    Raises:
        BadFrame: the file is missing, is not such a text, or names another size.
    """
    reason = "intrinsics unreadable"
    text = read_bytes(url, _TEXT_BYTES)
    with damage_named(reason, url):
        if text.lstrip().startswith(b"{"):
            numbers = _json_intrinsics(parse_json(text))
        elif text.lstrip().startswith(b"<"):
            found = _opencv_nodes(text, ("proj_matL", "mtxL"))
            numbers = found.get("proj_matL") or found["mtxL"]
        else:
            words = re.split(r"[\s,;\[\]()]+", text.decode("utf-8-sig"))
            numbers = [float(word) for word in filter(None, words[:20])]
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


def read_baseline(url: str) -> float:
    """The ``baselineLR`` of OpenCV's XML, in its own unit; 1 for other files of intrinsics.

    Raises BadFrame if it is XML without one.
    """
    text = read_bytes(url, _TEXT_BYTES)
    if not text.lstrip().startswith(b"<"):
        return 1.0
    with damage_named("baseline unreadable", url):
        [baseline] = _opencv_nodes(text, ("baselineLR",))["baselineLR"]
        if not 0 < baseline < math.inf:
            raise ValueError(f"a baseline of {baseline}")
    return baseline


def _opencv_nodes(text: bytes, names: Sequence[str]) -> dict[str, list[float]]:
    """The numbers of nodes of an OpenCV FileStorage XML that are there."""
    root = parse_xml(text)
    nodes = ((name, root.find(name)) for name in names)
    return {
        name: [float(word) for word in (node.findtext("data") or node.text or "").split()]
        for name, node in nodes
        if node is not None
    }


def _json_intrinsics(about: Any) -> list[float]:
    """width, height (if there), fx, fy, cx, cy; any exception if they are not there."""
    about = about.get("camera", about)
    width, height = (about.get(name[0], about.get(name)) for name in ("width", "height"))
    size = [float(width), float(height)] if width and height else []
    if "K_px" in about:  # of flatdepth pack export, whose pixel centres are at integer + 0.5
        K = np.array(about["K_px"], np.float64)
        return [*size, *(K[[0, 1, 0, 1], [0, 1, 2, 2]] - [0, 0, 0.5, 0.5]).tolist()]
    matrix = about.get("K", about.get("intrinsic_matrix"))
    if matrix is None:
        return size + [float(about[name]) for name in ("fx", "fy", "cx", "cy")]
    K = np.array(matrix, np.float64).reshape(3, 3)
    K = K if K[2].tolist() == [0, 0, 1] else K.T
    return [*size, *K[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()]


def relative_paths(tree: Tree, files: Mapping[str, str]) -> dict[str, object]:
    """Where a frame came from, for its ``meta``: free of the machine's own directories."""
    return {role: printable(tree.path(url)) for role, url in files.items()}


@contextmanager
def damage_named(reason: str, where: str) -> Iterator[None]:
    """What goes wrong with somebody's bytes becomes a BadFrame; decoders raise nearly anything.

    Warnings are not shown: they are about damaged metadata of what decodes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadFrame, UserError):
        raise
    except Exception as error:
        what = str(error) if 0 < len(str(error)) < 300 else type(error).__name__
        raise BadFrame(reason, f"{where}: {what}") from error


def image_formats(head: bytes) -> tuple[str, ...]:
    """The formats that Pillow is to try on a file that begins so.

    Raises BadFrame if it is HEIC and pillow-heif is not installed.
    """
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIF_BRANDS or b"avif" in head[:HEAD_BYTES]:
        return _FORMATS
    if importlib.util.find_spec("pillow_heif") is None:
        raise BadFrame(
            "HEIC", "HEIC pictures need pillow-heif; install it with: pip install pillow-heif"
        )
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return ("HEIF",)


def check_tiles(image: Image.Image) -> None:
    """Raise ValueError if a TIFF has tiles above MAX_PIXELS: they are decoded whole."""
    if isinstance(image, TiffImageFile):
        width, height = (image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH))
        if width * height > MAX_PIXELS:
            raise ValueError(f"tiles of {width}x{height} pixels")


def _decode(data: bytes, url: str, role: str = "image") -> tuple[Image.Image, int]:
    """The decoded image as it is stored, and its EXIF orientation (1 is upright)."""
    with damage_named(f"{role} unreadable", url):
        try:
            image = Image.open(io.BytesIO(data), formats=image_formats(data))
        except Image.DecompressionBombError as error:
            raise BadFrame(f"{role} too large", f"{url}: more than {MAX_PIXELS} pixels") from error
        except UnidentifiedImageError as error:  # names an address in memory instead of the file
            raise BadFrame(
                f"{role} unreadable", f"{url}: damaged or none of {FORMAT_NAMES}"
            ) from error
        if image.width * image.height > MAX_PIXELS:
            raise BadFrame(f"{role} too large", f"{url}: {image.width}x{image.height} pixels")
        check_tiles(image)
        # Before decoding: Pillow turns a TIFF upright, and forgets that it did.
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        image.load()
        if not isinstance(image, TiffImageFile) or orientation not in TURNS:
            return image, orientation
        back = image.transpose(TURNS[14 - orientation if orientation in (6, 8) else orientation])
        back.format = image.format
        return back, orientation


def _keep(data: bytes, image: Image.Image) -> Picture | None:
    ext = _KEPT_FORMATS.get(image.format or "")
    if ext is None:
        return None
    return Picture(image=data, image_ext=ext, width=image.width, height=image.height)


def to_rgb(image: Image.Image, image_bits: int = 16) -> Image.Image:
    """An image of any mode as 8-bit RGB, transparent pixels on white, as shards decode it.

    Of 16-bit grey values, which have ``image_bits``, the highest 8 bits are taken.

    Raises:
        BadFrame: the values are not of 8 or 16 bits, or have more than ``image_bits``.
    """
    if image.mode == "F":
        detail = "the image holds floating-point values; save it with 8 or 16 bits"
        raise BadFrame("image is not 8- or 16-bit", detail)
    if _is_deep(image):  # Pillow would clip the values at 255 instead of scaling them
        values = np.asarray(image).clip(0, 65535)
        if values.max() >> image_bits:
            detail = f"the image has values up to {values.max()}, more than {image_bits} bits"
            raise BadFrame("image has more bits than image_bits", detail)
        image = Image.fromarray((values >> (image_bits - 8)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _parse_pgm(data: bytes, url: str, role: str) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Binary PGM. Not left to Pillow, which rescales the codes unless the maximum is 65535."""
    number = rb"\s+(?:#[^\n]*\n\s*)*(\d{1,9})"
    header = re.match(rb"P5" + number * 3 + rb"\s", data)
    if header is None:
        raise BadFrame(f"{role} unreadable", f"{url}: damaged PGM header")
    width, height, largest = (int(group) for group in header.groups())
    dtype = np.dtype(">u2" if largest > 255 else "u1")
    if not (width and height and 0 < largest < 65536):
        raise BadFrame(f"{role} unreadable", f"{url}: a {width}x{height} PGM up to {largest}")
    if len(data) - header.end() < dtype.itemsize * width * height:
        raise BadFrame(f"{role} unreadable", f"{url}: truncated PGM")
    codes = np.frombuffer(data, dtype, count=width * height, offset=header.end())
    return codes.reshape(height, width).astype(dtype.newbyteorder("="))


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
    if dataset.compression == "gzip":
        _check_chunks(dataset.id, chunk)
    array = np.asarray(dataset[() if row is None else row])
    return array.astype(array.dtype.newbyteorder("="))


def _check_chunks(dataset: h5py.h5d.DatasetID, chunk_bytes: int) -> None:
    """Raise ValueError if a compressed chunk is a bomb, which HDF5 would expand in full."""
    suspects = []  # deflate makes at most 1032 bytes of one

    def suspect(chunk: h5py.h5d.StoreInfo) -> None:
        if 1032 * chunk.size > MAX_BYTES:
            suspects.append(chunk.chunk_offset)

    dataset.chunk_iter(suspect)
    for place in suspects:
        _, stored = dataset.read_direct_chunk(place)
        if len(zlib.decompressobj().decompress(stored, chunk_bytes + 1)) > chunk_bytes:
            raise ValueError(f"the chunk at {place} expands to more than {chunk_bytes} bytes")
