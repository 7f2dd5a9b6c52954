"""Pictures to predict on: finding them, naming their outputs, opening what others made.

Other than for packing, an EXIF orientation is applied, HEIC is read, damaged EXIF data do no harm,
and the focal length is wanted. Damage is a ``BadFrame`` whose detail is readable by itself.
"""

import glob
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

# The packer's conversion of colour modes, so that a network sees pixels as it did in training.
from flatdepth.data.readers.files import (
    EXTENSIONS,
    FORMAT_NAMES,
    HEAD_BYTES,
    MAX_BYTES,
    TURNS,
    check_tiles,
    image_formats,
    to_rgb,
    warn_of_unread,
)
from flatdepth.data.shards.codec import MAX_PIXELS
from flatdepth.errors import BadFrame, UserError

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".mts", ".3gp"}
)
"""Endings of what is opened as a video."""

_ORIENTATION = 0x0112
_EXIF_IFD = 0x8769
_FOCAL_MM = 0x920A
_FOCAL_35MM = 0xA405
_PLANE_X_RESOLUTION = 0xA20E
_PLANE_UNIT = 0xA210
_PIXEL_WIDTH, _PIXEL_HEIGHT = 0xA002, 0xA003
_UNIT_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
_DIAGONAL_35MM = math.hypot(36, 24)


@dataclass(frozen=True, slots=True)
class Input:
    """A file to predict on, and the name of its outputs below the output folder.

    ``name`` is '/'-separated and has no suffix yet: ``kitchen/0001`` becomes
    ``kitchen/0001_depth.png`` and so on.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return _is_video(self.path)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_EXTENSIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Photo:
    """An opened picture, upright.

    Attributes:
        image: (H, W, 3) uint8 sRGB.
        focal_px: focal length in pixels of ``image`` as its EXIF data state it, or None.
    """

    image: UInt8[np.ndarray, "h w 3"]
    focal_px: float | None


def find_inputs(arguments: Sequence[str], out: Path, *, videos: bool = False) -> list[Input]:
    """The pictures that files, folders (searched to the bottom) and glob patterns stand for.

    Outputs keep the inputs' folders below the common parent of all arguments. They are named
    without the extension unless two pictures, or two videos, of one folder would then share a
    name. Folders and patterns leave out hidden files and what lies in ``out``, so that a second
    run does not take the pictures of the first one, and folders ``videos`` that are not wanted. A
    warning counts what else folders hold, by ending.

    Raises:
        UserError: an argument names nothing, a folder cannot be read, or ``out`` is one of them.
    """
    forbidden = out.resolve()
    bases: list[Path] = []
    found: dict[Path, None] = {}
    for argument in arguments:
        base, files = _expand(argument, forbidden, VIDEO_EXTENSIONS if videos else frozenset())
        bases.append(base)
        found.update(dict.fromkeys(files))
    try:
        root = os.path.commonpath([*bases, *(path.parent for path in found)])
    except ValueError as error:  # on Windows
        raise UserError("the inputs lie on different drives; run once for each drive") from error
    folders: dict[tuple[Path, bool], list[Path]] = defaultdict(list)
    for path in found:
        folders[path.parent, _is_video(path)].append(path)
    named = []
    for (folder, _), paths in folders.items():
        shared = len({path.stem.casefold() for path in paths}) < len(paths)
        place = Path(os.path.relpath(folder, root))
        named += [
            Input(path, (place / (path.name if shared else path.stem)).as_posix()) for path in paths
        ]
    order = {path: number for number, path in enumerate(found)}
    return sorted(named, key=lambda item: order[item.path])


def _expand(argument: str, forbidden: Path, more: frozenset[str]) -> tuple[Path, list[Path]]:
    """The folder that an argument's outputs are named from, and its files, all absolute."""
    path = _absolute(argument)
    if os.path.isfile(path):  # noqa: PTH113  # pathlib raises where the name is too long
        return path.parent, [path]
    if os.path.isdir(path):  # noqa: PTH112
        if path.resolve() == forbidden:
            raise UserError(f"--out: {argument} is also an input; choose another folder")
        listed = list(_walk(path, forbidden))
        files = [file for file in listed if file.suffix.lower() in EXTENSIONS | more]
        if not files:
            raise UserError(
                f"{argument}: expected a folder with pictures "
                f"({', '.join(sorted(EXTENSIONS | more))}), found none; "
                "to read files of another name, name them or use a pattern"
            )
        # files of outlines lie beside photographs, and are not missed
        others = [file for file in {*listed} - {*files} if file.suffix.lower() != ".json"]
        warn_of_unread(argument, list(map(str, others)))
        return path, files
    if glob.has_magic(argument):
        parts = Path(argument).expanduser().parts
        first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        base = _absolute(Path(*parts[:first]))
        files = [
            _absolute(file)
            for file in sorted(base.glob(str(Path(*parts[first:]))))
            if _is_readable(file)
            and not any(_hidden(part) for part in file.relative_to(base).parts)
            and forbidden not in file.resolve().parents
        ]
        if not files:
            raise UserError(f"{argument}: the pattern matches no file; check it, and quote it")
        return base, files
    raise UserError(f"{argument}: no such file or folder; check the name")


def _absolute(path: str | Path) -> Path:
    """Without '..', but with links as they are: a linked picture keeps the name it is given by."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100


def _hidden(name: str) -> bool:
    return name.startswith(".") and name != ".."


def _walk(folder: Path, forbidden: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=_unlisted):
        here = Path(parent)
        folders[:] = sorted(
            name for name in folders if not _hidden(name) and (here / name).resolve() != forbidden
        )
        for name in sorted(files):
            path = here / name
            if not _hidden(name) and _is_readable(path):
                yield path


def _is_readable(path: Path) -> bool:
    """Whether opening ends: with a file, or with an error that names a broken link.

    A pipe or a device could block for ever. pathlib would raise where a folder is closed.
    """
    return os.path.isfile(path) or not os.path.exists(path)  # noqa: PTH110, PTH113


def _unlisted(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); make it "
        "readable, or name the folders beside it"
    ) from error


def open_photo(path: Path, image_bits: int = 16) -> Photo:
    """Open a picture of any colour mode and turn it upright.

    Transparent pixels show white behind, of 16-bit grey, whose values have ``image_bits``, the
    highest 8 are taken, and of several pictures in a file the first. Safe to call from many
    threads. Pillow may warn of damaged metadata.

    Raises:
        BadFrame: it is no picture, damaged, absurdly large, or cannot be read.
    """
    with _opened(path) as image:
        return upright(image, image_bits)


def upright(image: Image.Image, image_bits: int = 16) -> Photo:
    """An opened picture as ``open_photo`` gives it.

    Raises:
        BadFrame: its values are not of 8 or 16 bits, or have more than ``image_bits``.
    """
    image.load()
    exif, details = _read_exif(image)
    pixels = np.asarray(to_rgb(image, image_bits))
    turn = TURNS.get(int(_number(exif.get(_ORIENTATION))))
    if turn is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    height, width = pixels.shape[:2]
    return Photo(image=pixels, focal_px=focal_from_exif(details, height, width))


def announced_pixels(path: Path) -> int:
    """How many pixels a picture has by its header. Raises BadFrame as ``open_photo`` does."""
    with _opened(path) as image:
        return image.width * image.height


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture of at most ``MAX_PIXELS``; what goes wrong with it then becomes a BadFrame."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            if not head:
                raise BadFrame("empty", "the file is empty")
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise BadFrame(
                    "too large",
                    f"the file has {size} bytes; save the image with at most {MAX_BYTES} bytes",
                )
            file.seek(0)
            with Image.open(file, formats=image_formats(head)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadFrame(
                        "too large",
                        f"the image has {image.width} x {image.height} pixels; shrink it to at "
                        f"most {MAX_PIXELS} pixels",
                    )
                check_tiles(image)
                yield image
    except UnidentifiedImageError as error:
        raise BadFrame(
            "not an image", f"the file is damaged or not an image ({FORMAT_NAMES})"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadFrame(
            "too large", f"the image is too large; shrink it to at most {MAX_PIXELS} pixels"
        ) from error
    except BadFrame:
        raise
    except OSError as error:
        if error.errno is not None:
            raise BadFrame("unreadable", f"the file cannot be read ({error.strerror})") from error
        raise _damaged(error) from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise _damaged(error) from error


def focal_from_exif(details: Mapping[int, object], height: int, width: int) -> float | None:
    """Focal length in pixels of a picture of that size, or None if its EXIF data do not state it.

    ``FocalLengthIn35mmFilm`` is the focal length that gives the same diagonal angle of view on a
    36 x 24 mm frame (EXIF 2.32, 4.6.5), so ``f_px = f_35 * diagonal_px / 43.27``. Without it,
    ``FocalLength`` times ``FocalPlaneXResolution``, for the size in pixels that the camera wrote
    down if the picture was resized since. A crop made later is not in the data.
    """
    diagonal = math.hypot(height, width)
    focal = _number(details.get(_FOCAL_35MM)) * diagonal / _DIAGONAL_35MM
    if not _plausible(focal, diagonal):
        per_mm = _number(details.get(_PLANE_X_RESOLUTION)) / _UNIT_MM.get(
            int(_number(details.get(_PLANE_UNIT)) or 2), math.inf
        )
        original = max(
            _number(details.get(_PIXEL_WIDTH)), _number(details.get(_PIXEL_HEIGHT))
        ) or max(height, width)
        focal = _number(details.get(_FOCAL_MM)) * per_mm * max(height, width) / original
    return focal if _plausible(focal, diagonal) else None


def _plausible(focal_px: float, diagonal_px: float) -> bool:
    """Whether a lens could be so: from fisheye to the longest telephoto lenses; not 0 or NaN."""
    return 0.1 < focal_px / diagonal_px < 100


def _read_exif(image: Image.Image) -> tuple[Mapping[int, object], Mapping[int, object]]:
    """The main EXIF tags and those about the exposure; empty where the data are damaged.

    After decoding: Pillow turns a TIFF upright then, and takes the tag out.
    """
    try:
        exif = image.getexif()
        return dict(exif), dict(exif.get_ifd(_EXIF_IFD))
    except Exception:  # as many types of exception as ways to damage it
        return {}, {}


def _number(value: object) -> float:
    """An EXIF value as a finite number; 0 if it is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _damaged(error: Exception) -> BadFrame:
    what = " ".join(str(error).split()) or type(error).__name__
    return BadFrame("damaged", f"the image is damaged ({what})")
