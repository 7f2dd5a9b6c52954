"""Reading shard sets: any sample of any shard in one range read, local or remote."""

import io
import math
import os
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import UInt8
from numpy.typing import NDArray

from flatdepth.data.shards import (
    COLUMNS_NAME,
    DEPTH_EXT,
    IMAGE_EXTS,
    INDEX_NAME,
    JSON_EXT,
    KNOWN_EXTS,
    REGION_EXT,
    THING_EXT,
    WORK_DIR,
    is_key,
)
from flatdepth.data.shards.ahead import Together
from flatdepth.data.shards.cache import cache_directory, downloaded, sample_cache
from flatdepth.data.shards.codec import (
    decode_depth,
    decode_frame,
    decode_image,
    decode_map,
)
from flatdepth.data.shards.index import (
    BLOCK,
    Categories,
    Columns,
    Index,
    Strings,
    mapped_columns,
    parsed_columns,
)
from flatdepth.data.shards.remote import ATTEMPTS, Ranges, Reading, retried
from flatdepth.errors import BadFrame, UserError, printable, without_secrets
from flatdepth.pace import stage
from flatdepth.resources import demo_file
from flatdepth.types import FlatThings, Frame, RawFrame, Region
from flatdepth.untrusted import parse_json

_MAX_DESCRIPTORS = 256


def resolve(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or fsspec URL, and the path in it.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "http" if url.startswith("http") else url.partition(":")[0]
        fix = f"; pip install 'flatdepth[{extra}]'" if extra in ("http", "s3") else ""
        raise UserError(f"cannot open {url!r}: {error}{fix}") from error
    except ValueError as error:
        raise UserError(f"cannot open {url!r}: {error}") from error
    return fs, path.rstrip("/") or path


class ShardSet:
    """A shard set opened for random access. All methods may be called from many threads.

    Attributes:
        url: the directory or URL it was opened from.
        root: its path in its file system.
        index: its index; the columns below are taken from it.
        keys, scenes, splits: one string per sample.
        sizes: (N, 2) int32 image height and width in pixels.
        ranges: reads its shards if it is remote.
    """

    def __init__(
        self,
        url: str,
        fs: fsspec.AbstractFileSystem,
        root: str,
        index: Index,
        reading: Reading | None = None,
    ) -> None:
        self.url = url
        self.index = index
        self.keys: Strings = index.keys
        self.scenes: Categories = index.scenes
        self.splits: Categories = index.splits
        self.sizes: NDArray[np.int32] = index.sizes
        self._fs = fs
        self.root = root
        self._pread = isinstance(fs, LocalFileSystem) and hasattr(os, "pread")
        self._descriptors: dict[int, int] = {}
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        reading = reading or Reading()
        self.ranges = None if isinstance(fs, LocalFileSystem) else Ranges(fs, root, reading)
        self._cache = (
            sample_cache(reading.cache_bytes, cache_directory())
            if self.ranges and reading.cache_bytes
            else None
        )
        self._together: dict[int, Together] = {}
        self._handed: dict[int, bytes] = {}

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        check_sizes: bool = True,
        use_cache: bool = True,
        reading: Reading | None = None,
    ) -> "ShardSet":
        """Open the set in a directory, at an fsspec URL, or at the path of its ``index.json``.

        Args:
            url: where the set is.
            check_sizes: compare the sizes of local shards with the index at once, rather than
                find a truncated one hours later.
            use_cache: take the columns of a remote index from this machine if they are kept here,
                and keep them.
            reading: how samples of a remote set are read; None: as is usual, and none are kept.

        Raises:
            UserError: there is no finished set, its index is unusable, or a shard is missing or
                of another size.
        """
        url = demo_file(os.fspath(url))
        fs, root = resolve(url)
        root = root.removesuffix(f"/{INDEX_NAME}")
        try:
            data = _cat(fs, f"{root}/{INDEX_NAME}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(_how_to_make(url, fs, root)) from error
        except OSError as error:
            raise UserError(f"cannot read {url}/{INDEX_NAME}: {error}") from error
        shards = cls(url, fs, root, open_index(url, fs, root, data, use_cache), reading)
        if unknown := sorted(shards.index.members.keys() - KNOWN_EXTS):
            named = printable(without_secrets(url))
            print(f"note: {named}: members .{unknown[0]} mean nothing here", file=sys.stderr)
        if check_sizes and isinstance(fs, LocalFileSystem):
            shards._check_sizes()
        return shards

    @property
    def dataset(self) -> str:
        """Short name of the data set."""
        return self.index.dataset

    @property
    def kind(self) -> str:
        """``"depth"`` for RGB-D frames, ``"art"`` for pictures without depth."""
        return self.index.kind

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: SupportsIndex) -> RawFrame:
        """Sample ``i`` as it was packed: image bytes untouched, depth codes bit for bit.

        Raises:
            UserError: its shard is missing, truncated or damaged at this sample.
        """
        i = range(len(self))[i]
        with self._named(i):
            return raw_frame(self.keys[i], self.members(i))

    def frame(self, i: SupportsIndex) -> Frame:
        """Sample ``i`` of a set of frames, decoded.

        Raises:
            UserError: as ``read``, or its members do not decode or fit together.
        """
        raw = self.read(i)
        with self._named(int(i)):
            return decode_frame(raw)

    def image(self, i: SupportsIndex) -> UInt8[np.ndarray, "h w 3"]:
        """The image of sample ``i`` alone, decoded to 8-bit sRGB. Raises UserError as ``frame``."""
        raw = self.read(i)
        with self._named(int(i)):
            return decode_image(raw.image)

    @contextmanager
    def _named(self, i: int) -> Iterator[None]:
        """Within, that sample ``i`` cannot be used is a UserError that names it."""
        i = range(len(self))[i]
        try:
            yield
        except BadFrame as error:
            raise UserError(
                f"{self.shard_path(int(self.index.shard_of(i)))}: sample {self.keys[i]} is damaged "
                f"({error}); find all damage with: flatdepth pack verify {self.url}"
            ) from error

    def members(self, i: SupportsIndex) -> dict[str, bytes]:
        """The files of sample ``i`` by extension. Raises UserError as ``read_bytes``."""
        i = range(len(self))[i]
        blob, start = self.read_bytes(i), self.index.span(i)[0]
        rows = {ext: table[i].tolist() for ext, table in self.index.members.items()}
        return {
            ext: blob[offset - start : offset - start + length]
            for ext, (offset, length) in rows.items()
            if offset >= 0
        }

    @stage("read")
    def read_bytes(self, i: SupportsIndex) -> bytes:
        """The bytes of sample ``i`` from its first member to its last, tar headers between.

        Raises:
            UserError: its shard is missing or truncated, or these are not the bytes that were
                packed (their CRC-32 is in the index).
        """
        i = range(len(self))[i]
        self._check_block(i // BLOCK)
        start, end = self.index.span(i)
        number = int(self.index.shard_of(i))
        path = self.shard_path(number)
        key, size = self.keys[i], self.index.shards[number].bytes
        if not (is_key(key) and start < end <= size):
            raise UserError(
                f"{self.url}/{COLUMNS_NAME}: row {i} cannot be right; copy or pack the set again"
            )
        try:
            if self._pread:
                blob = self._read_local(number, path, start, end - start)
            else:
                blob = self._read_remote(i, path, start, end)
        except OSError as error:
            raise UserError(f"cannot read shard {path}: {error}") from error
        if len(blob) > end - start:
            raise UserError(
                f"cannot read shard {path}: its server sends whole files instead of the range that "
                "was asked for; take a server with range requests, or copy the set to a local disk"
            )
        if len(blob) < end - start:
            raise UserError(
                f"shard {path} is truncated: sample {key} needs {end} bytes; copy or pack it again"
            )
        if zlib.crc32(blob) != self.index.crc32[i]:
            raise UserError(
                f"{path}: sample {key} is damaged (its checksum differs from the index); "
                f"copy or pack it again; find all damage with: flatdepth pack verify {self.url}"
            )
        return blob

    def _check_block(self, block: int) -> None:
        if not self.index.blocks or block in self._checked:
            return
        if self.index.block_checksum(block) != self.index.blocks[block]:
            raise UserError(
                f"{self.url}/{COLUMNS_NAME}: rows {block * BLOCK} and on are damaged (their "
                f"checksum differs); copy or pack the set again{self._kept}"
            )
        self._checked.add(block)

    @property
    def _kept(self) -> str:
        """What else can be done where columns are damaged."""
        local = isinstance(self._fs, LocalFileSystem)
        return "" if local else f", or delete the copy of its index in {cache_directory()}"

    def shard_path(self, number: int) -> str:
        """Path of a shard in the set's file system."""
        return f"{self.root}/{self.index.shards[number].name}"

    def shard_url(self, number: int) -> str:
        """Where other programs find a shard: its path, or its URL if it is remote."""
        path = self.shard_path(number)
        local = isinstance(self._fs, LocalFileSystem)
        return path if local else str(self._fs.unstrip_protocol(path))

    def open_shard(self, number: int) -> io.IOBase:
        """A whole shard as a file. Raises OSError if it cannot be opened."""
        file: io.IOBase = self._fs.open(self.shard_path(number), "rb")
        return file

    def close(self) -> None:
        """Close the descriptors; the set can still be read and will open them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _read_local(self, number: int, path: str, offset: int, length: int) -> bytes:
        # Threads share a descriptor: pread has no position. Sets of more shards than fit open
        # theirs for each read, so that no descriptor is ever closed under another thread.
        with self._lock:
            descriptor = self._descriptors.get(number)
            if descriptor is None and len(self._descriptors) < _MAX_DESCRIPTORS:
                descriptor = self._descriptors[number] = os.open(path, os.O_RDONLY)
        if descriptor is not None:
            return os.pread(descriptor, length, offset)
        with Path(path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def _read_remote(self, i: int, path: str, start: int, end: int) -> bytes:
        """A sample from this machine's cache, from what was read ahead, or from its server."""
        if self.ranges is None:  # a local one where there is no pread
            return retried(path, lambda: self._fs.cat_file(path, start=start, end=end), 1)
        if (blob := self._handed.pop(i, None)) is not None:
            return blob
        crc32, together = int(self.index.crc32[i]), self._together.pop(i, None)
        if self._cache and (kept := self._cache.get(self._kept_name(i), end - start, crc32)):
            if together is not None:
                together.drop(i)
            return kept
        blob = None if together is None else together.take(i)
        if blob is None:
            blob = self.ranges.read(path, start, end)
        if self._cache and len(blob) == end - start and zlib.crc32(blob) == crc32:
            self._cache.put(self._kept_name(i), blob)
        return blob

    def hand(self, i: int, blob: bytes) -> None:
        """Give the bytes of a remote sample that another process has read, for the next read."""
        self._handed[i] = blob

    def place_ahead(self, i: int) -> tuple[int, int, int] | None:
        """Shard, first and past-the-last byte of a sample that is worth reading ahead."""
        if self.ranges is None or i in self._together:
            return None
        if self._cache and self._cache.holds(self._kept_name(i)):
            return None
        number, (start, end) = int(self.index.shard_of(i)), self.index.span(i)
        return (number, start, end) if start < end <= self.index.shards[number].bytes else None

    def expect(self, together: Together) -> None:
        """Take samples from there when they are asked for."""
        self._together |= dict.fromkeys(together.spans, together)

    def forget(self, together: Together) -> None:
        """Read samples that were to come from there by themselves."""
        for i in list(together.spans):
            self._together.pop(i, None)

    def _kept_name(self, i: int) -> str:
        """What a sample is called in the cache: by its content, whatever the set is called."""
        shard = self.index.shards[int(self.index.shard_of(i))]
        return f"{shard.sha256[:32]}-{self.index.span(i)[0]}"

    def _check_sizes(self) -> None:
        for number, shard in enumerate(self.index.shards):
            path = Path(self.shard_path(number))
            if not path.is_file():
                raise UserError(f"shard {path} is missing; copy it there or pack the set again")
            if (found := path.stat().st_size) != shard.bytes:
                raise UserError(
                    f"shard {path} has {found} bytes where its index says {shard.bytes}; "
                    "copy or pack it again"
                )


def open_index(
    url: str, fs: fsspec.AbstractFileSystem, root: str, data: bytes, use_cache: bool
) -> Index:
    """The index of the set at ``url`` from the bytes of its ``index.json``.

    The columns of a remote set are downloaded once, into a cache, if that is to be used.

    Raises:
        UserError: as ``Index.from_bytes``, or the columns are not there.
    """

    def columns(checksum: str) -> Columns:
        path = f"{root}/{COLUMNS_NAME}"
        try:
            if isinstance(fs, LocalFileSystem):
                return mapped_columns(Path(path))
            if not use_cache:
                return parsed_columns(_cat(fs, path))
            name = f"index-{checksum}.safetensors"
            return mapped_columns(
                downloaded(name, lambda to: retried(path, lambda: fs.get_file(path, to), ATTEMPTS))
            )
        except OSError as error:
            raise UserError(
                f"cannot read {url}/{COLUMNS_NAME}: {error}; it belongs to {INDEX_NAME}, copy it "
                "there or pack the set again"
            ) from error

    return Index.from_bytes(data, columns, f"{url}/{INDEX_NAME}")


def _cat(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """A whole file. Raises OSError as ``retried``."""
    blob: bytes = retried(path, lambda: fs.cat_file(path), _attempts(fs))
    return blob


def _attempts(fs: fsspec.AbstractFileSystem) -> int:
    return 1 if isinstance(fs, LocalFileSystem) else ATTEMPTS


@stage("decode")
def raw_frame(key: str, parts: Mapping[str, bytes]) -> RawFrame:
    """Assemble a sample from its files by extension.

    Raises:
        BadFrame: one is missing or damaged, or they belong to another key.
    """
    try:
        (image_ext,) = (ext for ext in IMAGE_EXTS if ext in parts)
        about: dict[str, Any] = parse_json(parts[JSON_EXT])
        if about["key"] != key:
            raise ValueError(f"key {about['key']!r}")
        depth = decode_depth(parts[DEPTH_EXT], about["depth"]) if DEPTH_EXT in parts else None
        return RawFrame(
            key=key,
            dataset=str(about["dataset"]),
            scene=str(about["scene"]),
            image=parts[image_ext],
            image_ext=image_ext,
            width=int(about["width"]),
            height=int(about["height"]),
            depth=depth,
            K_px=None if about["K_px"] is None else _intrinsics(about["K_px"]),
            split=str(about["split"]),
            meta=dict(about["meta"]),
            region=(
                decode_map(parts[REGION_EXT], max(Region), "regions")
                if REGION_EXT in parts
                else None
            ),
            things=_things(parts[THING_EXT], about["planes"]) if THING_EXT in parts else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadFrame("description unreadable", f"{type(error).__name__}: {error}") from error


def _things(payload: bytes, rows: Sequence[Sequence[float] | None]) -> FlatThings:
    planes = np.array([(math.nan,) * 3 if row is None else row for row in rows], np.float64)
    if planes.shape[1:] != (3,):
        raise ValueError(f"planes {rows!r:.200}")
    return FlatThings(number=decode_map(payload, len(planes), "things"), planes=planes)


def _intrinsics(rows: object) -> NDArray[np.float64]:
    K_px = np.array(rows, dtype=np.float64)
    if not is_intrinsics(K_px):
        raise ValueError(f"intrinsics {rows!r:.200}")
    return K_px


def is_intrinsics(K_px: NDArray[np.float64]) -> bool:
    """Whether a matrix is (3, 3), finite, upper triangular with K[2, 2] = 1 and fx, fy > 0."""
    if K_px.shape != (3, 3):
        return False
    (fx, skew, cx), (yx, fy, cy), last = K_px.tolist()
    finite = all(math.isfinite(value) for value in (fx, skew, cx, fy, cy))
    return finite and fx > 0 and fy > 0 and yx == 0 and last == [0, 0, 1]


def _how_to_make(url: str, fs: fsspec.AbstractFileSystem, root: str) -> str:
    """Why there is no set at ``url`` and what to do about it."""
    try:
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)}
    except OSError:
        names = set()
    if WORK_DIR in names:
        return f"packing into {url} is not finished; run the same pack command again to resume it"
    if any(name.startswith("part-") for name in names):
        return f"{url} holds parts of a set; join them with: flatdepth pack merge {url}"
    below = sorted(name for name in names if fs.exists(f"{root}/{name}/{INDEX_NAME}"))
    if below:
        return f"{url} is not a shard set itself; name one below it ({', '.join(below)})"
    return (
        f"there is no shard set at {url} ({INDEX_NAME} not found); make one with: "
        f"flatdepth pack DATASET --raw DIR --out {url}"
    )
