"""Depth and image bytes: what a shard stores and how it becomes a ``Frame``.

Depth keeps the codes of its source bit for bit (``DepthCodes``). The payload of a
``.depth.fdz`` member is, little-endian::

    4 bytes "FDZ1" | u8 dtype (0 uint16, 1 float16) | u8 predictor | u32 H | u32 W | zstd frame

The zstd frame holds the low bytes of all codes, then all high bytes. Predictor 1 replaces every
16-bit pattern by its difference from the one before it in row order (modulo 2**16, zigzag-coded
so that small steps of either sign have an empty high byte); predictor 0 stores the patterns as
they are. What the codes mean travels as JSON beside them (``depth_meta``).
"""

import io
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import zstandard
from jaxtyping import Float32, Float64, UInt8
from numpy.typing import NDArray
from PIL import Image

from flatdepth.errors import BadFrame
from flatdepth.geometry import pixel_rays
from flatdepth.pace import stage
from flatdepth.types import DepthCodes, FlatThings, Frame, RawFrame

try:
    import simplejpeg
except ImportError:  # it has no wheels for this Python yet; Pillow gives the same pixels
    simplejpeg = None

MAX_PIXELS = 1 << 26
"""Images and depth maps above this many pixels (8192 x 8192) are refused as size bombs."""

_HEADER = struct.Struct("<4sBBII")
_MAGIC = b"FDZ1"
_DTYPES = (np.dtype(np.uint16), np.dtype(np.float16))
_LOG_STEPS = 65533


def encode_depth(codes: DepthCodes, level: int = 12) -> bytes:
    """Compress depth codes without loss, with the predictor that gives fewer bytes.

    Args:
        codes: (H, W) uint16 or float16 codes of at most ``MAX_PIXELS`` pixels.
        level: zstd level, 1..22. It changes the size and the packing time, not the reading time.

    Returns:
        The payload of a ``.depth.fdz`` member. Every 16-bit pattern, NaN payloads included,
        comes back from ``decode_depth``.
    """
    height, width = codes.codes.shape
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"cannot store depth of shape {height}x{width}")
    patterns = np.ascontiguousarray(codes.codes).view(np.uint16).ravel()
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    bodies = [compressor.compress(_split(p)) for p in (patterns, _differences(patterns))]
    predictor = int(len(bodies[1]) < len(bodies[0]))
    dtype = _DTYPES.index(codes.codes.dtype)
    return _HEADER.pack(_MAGIC, dtype, predictor, height, width) + bodies[predictor]


def decode_depth(payload: bytes, meta: Mapping[str, Any]) -> DepthCodes:
    """Undo ``encode_depth``.

    Args:
        payload: a ``.depth.fdz`` member.
        meta: what ``depth_meta`` gave for the codes.

    Raises:
        BadFrame: the payload or its description is damaged, or announces too many pixels.
    """
    if len(payload) < _HEADER.size or payload[:4] != _MAGIC:
        raise BadFrame("depth unreadable", "not a depth payload")
    _, dtype, predictor, height, width = _HEADER.unpack_from(payload)
    pixels = height * width
    if dtype >= len(_DTYPES) or predictor > 1 or not 0 < pixels <= MAX_PIXELS:
        raise BadFrame("depth unreadable", f"header says {height}x{width}, type {dtype}")
    body = memoryview(payload)[_HEADER.size :]
    try:
        # Checked before decompressing, so that a bomb never gets its memory.
        size = zstandard.get_frame_parameters(body).content_size
        if size != 2 * pixels:
            raise BadFrame("depth unreadable", f"{size} bytes for {height}x{width} codes")
        planes = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadFrame("depth unreadable", str(error)) from error
    patterns = _join(planes)
    if predictor:
        patterns = _sums(patterns)
    codes = patterns.view(_DTYPES[dtype]).reshape(height, width)
    try:
        return _with_meaning(codes, meta)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadFrame("depth unreadable", f"its description {dict(meta)!r:.200}") from error


def depth_meta(codes: DepthCodes) -> dict[str, Any]:
    """What the codes mean, as JSON values: the ``"depth"`` entry of a sample's JSON."""
    return {
        "quantity": codes.quantity,
        "scale_m": codes.scale_m,
        "hole": codes.hole,
        "sky": codes.sky,
        "log_range_m": None if codes.log_range_m is None else list(codes.log_range_m),
    }


def encode_log_u16(
    depth_m: Float32[np.ndarray, "h w"], near_m: float = 0.1, far_m: float = 1000.0
) -> DepthCodes:
    """Logarithmic 16-bit codes for float32 depth, which has no 16-bit codes of its own.

    The relative error is at most half a step, ``ln(far / near) / 65533 / 2``: 7.03e-5 for the
    default range. Depth without a true scale may need a lower ``near_m``, which costs precision
    only logarithmically (1e-3..1e4 m: 1.23e-4).

    Args:
        depth_m: (H, W) planar z in metres. NaN (unknown) gets code 0 and +inf (sky) 65535.
        near_m, far_m: the range of codes 1..65534, in metres.

    Raises:
        BadFrame: a finite depth lies outside the range (or is -inf). Clipping it would turn
            unmarked holes and wrong units into false truth; the reader decides what they are.
    """
    if not 0 < near_m < far_m < np.inf:
        raise ValueError(f"depth range {near_m}..{far_m} m is empty")
    finite = np.isfinite(depth_m)
    codes = np.zeros(depth_m.shape, np.uint16)
    codes[np.isposinf(depth_m)] = 65535
    values = depth_m[finite].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(np.log(values / near_m) / np.log(far_m / near_m) * _LOG_STEPS)
    inside = (steps >= 0) & (steps <= _LOG_STEPS)
    if not inside.all() or np.isneginf(depth_m).any():
        found = f"{np.nanmin(depth_m):g}..{values.max(initial=-np.inf):g} m"
        raise BadFrame("depth out of range", f"found {found}, expected {near_m:g}..{far_m:g} m")
    codes[finite] = steps.astype(np.uint16) + 1
    return DepthCodes(codes=codes, hole=0, sky=65535, log_range_m=(near_m, far_m))


def depth_metres(codes: DepthCodes, K_px: Float64[np.ndarray, "3 3"]) -> Float32[np.ndarray, "h w"]:
    """Planar z in metres: NaN where unknown, +inf for sky.

    A distance ``d`` to the optical centre becomes ``z = d / ||K_px^-1 (u, v, 1)||`` with pixel
    centres at integer + 0.5, since a ray's third component is 1.

    Args:
        codes: (H, W) codes and their meaning.
        K_px: upper triangular intrinsics of the same pixel grid; used for distances only.
    """
    values = _table(codes.codes.dtype.char, codes.scale_m, codes.hole, codes.sky, codes.log_range_m)
    metres = np.take(values, codes.codes.view(np.uint16))
    if codes.quantity == "distance":
        metres /= _ray_length(K_px, *metres.shape)
    return metres


@stage("decode")
def decode_image(payload: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG, PNG or WebP file to 8-bit sRGB. Safe to call from many threads.

    Grey is repeated, palettes and CMYK are converted, 16-bit values keep their high byte, and
    transparent pixels show white behind. The stored pixel grid is kept: an EXIF orientation is
    ignored, since depth and intrinsics belong to the stored grid.

    Raises:
        BadFrame: the file is damaged, of another format, or larger than ``MAX_PIXELS``.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadFrame("image too large", f"{image.width}x{image.height} pixels")
            pixels = _jpeg_pixels(payload, image)
            return np.array(_to_rgb(image)) if pixels is None else pixels
    except BadFrame:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadFrame("image too large", str(error)) from error
    except Exception as error:
        # Pillow's decoders answer damaged bytes with many types of exception.
        raise BadFrame("image unreadable", f"{type(error).__name__}: {error}") from error


def encode_map(numbers: UInt8[np.ndarray, "h w"]) -> bytes:
    """A map of regions or things as a grey PNG: a ``.region.png`` or ``.thing.png`` member."""
    buffer = io.BytesIO()
    Image.fromarray(numbers).save(buffer, "PNG")
    return buffer.getvalue()


def decode_map(payload: bytes, most: int, what: str) -> UInt8[np.ndarray, "h w"]:
    """Undo ``encode_map``.

    Args:
        payload: the member.
        most: the largest number that means something.
        what: ``"regions"`` or ``"things"``, for messages.

    Raises:
        BadFrame: it is no such map, or has larger numbers.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
            if image.mode != "L" or image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels of mode {image.mode}")
            numbers = np.array(image)
        if numbers.max() > most:
            raise ValueError(f"there is no number {numbers.max()} among {what}")
    except Exception as error:  # as in decode_image
        raise BadFrame(f"{what} unreadable", f"{type(error).__name__}: {error}") from error
    return numbers


@stage("decode")
def decode_frame(raw: RawFrame) -> Frame:
    """Decode an RGB-D frame.

    Raises:
        BadFrame: its bytes are damaged, image, depth, regions and things differ in shape, or it
            has no depth or no intrinsics.
    """
    if raw.depth is None or raw.K_px is None:
        raise BadFrame("no depth or no intrinsics")
    image = decode_image(raw.image)
    if raw.depth.codes.shape != image.shape[:2]:
        shapes = f"{raw.depth.codes.shape} and {image.shape[:2]}"
        raise BadFrame("depth and image differ in shape", shapes)
    numbers = None if raw.things is None else raw.things.number
    for what, own in (("regions", raw.region), ("things", numbers)):
        if own is not None and own.shape != image.shape[:2]:
            shapes = f"{own.shape} and {image.shape[:2]}"
            raise BadFrame(f"{what} and image differ in shape", shapes)
    depth_m = depth_metres(raw.depth, raw.K_px)
    return Frame(
        image=image,
        depth_m=depth_m if raw.things is None else with_planes(depth_m, raw.K_px, raw.things),
        K_px=raw.K_px,
        key=raw.key,
        dataset=raw.dataset,
        scene=raw.scene,
        meta=raw.meta,
        region=raw.region,
        behind_m=None if raw.things is None else depth_m,
    )


def with_planes(
    depth_m: Float32[np.ndarray, "h w"], K_px: Float64[np.ndarray, "3 3"], things: FlatThings
) -> Float32[np.ndarray, "h w"]:
    """Depth in metres whose pixels of flat things lie on their planes, ``z = 1 / (m . ray)``.

    NaN where a plane is not known, or the pixel's ray does not meet it in front of the camera.
    """
    rows, columns = np.nonzero(things.number)
    rays = pixel_rays(K_px, columns + 0.5, rows + 0.5)
    planes = things.planes[things.number[rows, columns].astype(np.int64) - 1]
    inverse = np.einsum("nk,nk->n", rays, planes)
    result = depth_m.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        result[rows, columns] = np.where(inverse > 0, 1 / inverse, np.nan)
    return result


def _split(patterns: NDArray[np.uint16]) -> bytes:
    """All low bytes, then all high bytes."""
    return patterns.astype("<u2", copy=False).view(np.uint8).reshape(-1, 2).T.tobytes()


def _join(planes: bytes) -> NDArray[np.uint16]:
    """Undo ``_split``."""
    low, high = np.frombuffer(planes, np.uint8).reshape(2, -1)
    patterns = high.astype(np.uint16)
    patterns <<= 8
    patterns |= low
    return patterns


def _differences(patterns: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Zigzag-coded steps from each pattern to the next: 0, -1, 1, -2, ... become 0, 1, 2, 3."""
    steps = patterns.copy()
    steps[1:] -= patterns[:-1]
    signed = steps.view(np.int16)
    return ((signed << 1) ^ (signed >> 15)).view(np.uint16)


def _sums(zigzag: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Undo ``_differences``; the steps are overwritten."""
    sign = zigzag & 1
    np.negative(sign, out=sign)
    zigzag >>= 1
    zigzag ^= sign
    # The same modulo 2**16; numpy sums words of 16 bits three times as slowly.
    return np.cumsum(zigzag, dtype=np.uint32).astype(np.uint16)


def _with_meaning(codes: NDArray[Any], meta: Mapping[str, Any]) -> DepthCodes:
    """Attach a description that anybody may have written to its codes."""
    quantity, scale_m = meta["quantity"], float(meta["scale_m"])
    if quantity not in ("z", "distance") or not 0 < scale_m < np.inf:
        raise ValueError
    log_range_m = meta["log_range_m"]
    if log_range_m is not None:
        near_m, far_m = (float(v) for v in log_range_m)
        if not 0 < near_m < far_m < np.inf:
            raise ValueError
        log_range_m = (near_m, far_m)
    hole, sky = (None if meta[name] is None else int(meta[name]) for name in ("hole", "sky"))
    if any(code is not None and abs(code) > 65535 for code in (hole, sky)):
        raise ValueError
    return DepthCodes(
        codes=codes,
        quantity=quantity,
        scale_m=scale_m,
        hole=hole,
        sky=sky,
        log_range_m=log_range_m,
    )


@lru_cache(maxsize=32)
def _table(
    dtype: str,
    scale_m: float,
    hole: int | None,
    sky: int | None,
    log_range_m: tuple[float, float] | None,
) -> NDArray[np.float32]:
    """(65536,) float32 metres (z or distance) of every 16-bit pattern, built in float64."""
    # Signalling NaNs are among the patterns, and a foreign scale may overflow float32.
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float64)
        if log_range_m is None:
            metres = values * scale_m
        else:
            near_m, far_m = log_range_m
            metres = near_m * (far_m / near_m) ** ((values - 1) / _LOG_STEPS)
        if hole is not None:
            metres[values == hole] = np.nan
        if sky is not None:
            metres[values == sky] = np.inf
        table = metres.astype(np.float32)
    table.flags.writeable = False
    return table


def _ray_length(
    K_px: Float64[np.ndarray, "3 3"], height: int, width: int
) -> Float32[np.ndarray, "h w"]:
    """Length of each pixel's ray ``K_px^-1 (u, v, 1)``, whose third component is 1."""
    (xu, xv, x0), (_, yv, y0) = np.linalg.inv(K_px)[:2]
    u, v = np.arange(width) + 0.5, np.arange(height) + 0.5
    y = (yv * v + y0).astype(np.float32)
    x = (xu * u + x0).astype(np.float32)
    if xv:  # a skewed grid; else all rows have the same x
        x = x + (xv * v).astype(np.float32)[:, None]
    squares = x * x + (y * y + 1)[:, None]
    return np.sqrt(squares, out=squares)


def _jpeg_pixels(payload: bytes, image: Image.Image) -> UInt8[np.ndarray, "h w 3"] | None:
    """Pixels of a whole JPEG, bit for bit those of Pillow in less time.

    Args:
        payload: the file.
        image: the same, with its header read by Pillow.

    Returns:
        None for other formats, for CMYK and for every file that libjpeg-turbo has as much as a
        warning about: what is damaged is Pillow's to say.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    try:
        decoded = simplejpeg.decode_jpeg(payload, buffer=pixels)
    except ValueError:
        return None
    return pixels if decoded.shape == pixels.shape else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
