"""The index of a shard set: what the set consists of, and one row per sample.

``index.json`` is small: data set, shards, checksums of the rows. Its first entry is the SHA-256 of
all bytes behind that entry. The columns of the N samples, in the order of the shards, are the
tensors of ``index.safetensors``, which is mapped into memory: ten million rows are opened at once,
and of those only what is asked for is read::

    key.bytes, key.end                   (B,) uint8 UTF-8 one after the other; (N,) int64 ends
    scene.code, scene.bytes, scene.end   (N,) int32 which of the distinct names, which follow
    split.code, split.bytes, split.end   likewise
    size                                 (N, 2) int32 image height and width in pixels
    crc32                                (N,) uint32 of the sample's bytes in its span
    member.<extension>                   (N, 2) int64 offset and length in the shard; (-1, 0): none

Opening compares scenes and splits with their CRC-32, for what is trained on hangs on them; reading
a sample compares its block of rows with theirs, once. Up to version 2 the rows were lists in
``index.json``; such sets are read, and ``flatdepth pack reindex`` gives them columns.
"""

import hashlib
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32
from numpy.typing import NDArray

from flatdepth.data.shards import (
    COLUMNS_NAME,
    DEPTH_EXT,
    IMAGE_EXTS,
    JSON_EXT,
    KNOWN_EXTS,
    is_dataset_name,
    is_key,
    is_shard_name,
    shard_name,
)
from flatdepth.errors import UserError
from flatdepth.untrusted import parse_json

Columns = Mapping[str, NDArray[Any]]

_FORMAT = "flatdepth-shards"
_VERSION = 3
_LISTS_VERSION = 2  # of sets with rows in index.json
_UNSIGNED_VERSION = 1  # of sets that were packed before the index had a checksum
_UNSIGNED_KEYS = {"dataset", "format", "kind", "request", "samples", "shards", "skipped", "version"}
_SIGNATURE = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')
_MEMBER = "member."
_EAGER = ("scene.code", "scene.bytes", "scene.end", "split.code", "split.bytes", "split.end")

BLOCK = 4096
"""Rows that have a checksum together."""


class StringColumn(Sequence[str], ABC):
    """Strings that are made when they are asked for."""

    __slots__ = ()

    @abstractmethod
    def at(self, place: int) -> str:
        """The string at a place from 0 on."""

    @overload
    def __getitem__(self, i: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: SupportsIndex | slice) -> str | list[str]:
        places = range(len(self))[i]
        if isinstance(places, range):
            return [self.at(place) for place in places]
        return self.at(places)


class Strings(StringColumn):
    """Strings in two arrays, for millions of them.

    Attributes:
        data: (B,) uint8 UTF-8, one string after the other.
        ends: (N,) int64 past-the-last byte of each.
    """

    __slots__ = ("data", "ends")

    def __init__(self, data: UInt8[np.ndarray, " b"], ends: Int64[np.ndarray, " n"]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, values: Iterable[str]) -> "Strings":
        """The same strings."""
        encoded = [value.encode() for value in values]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @classmethod
    def joined(cls, parts: Sequence["Strings"]) -> "Strings":
        """Those of all parts, in order."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.data for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, place: int) -> str:
        begin = self.ends[place - 1] if place else 0
        return self.data[begin : self.ends[place]].tobytes().decode(errors="replace")


class Categories(StringColumn):
    """Strings of which many are the same.

    Attributes:
        codes: (N,) int32 number of each one's name.
        names: the distinct strings.
    """

    __slots__ = ("codes", "names")

    def __init__(self, codes: Int32[np.ndarray, " n"], names: Sequence[str]) -> None:
        self.codes, self.names = codes, names

    @classmethod
    def of(cls, values: Iterable[str]) -> "Categories":
        """The same strings, their names in the order in which they occur first."""
        numbers: dict[str, int] = {}
        codes = [numbers.setdefault(value, len(numbers)) for value in values]
        return cls(np.array(codes, np.int32), tuple(numbers))

    @classmethod
    def joined(cls, parts: Sequence["Categories"]) -> "Categories":
        """Those of all parts, in order."""
        whole = cls.of(name for part in parts for name in part.names)
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        codes = [
            whole.codes[start + part.codes] for part, start in zip(parts, starts, strict=False)
        ]
        return cls(np.concatenate(codes), whole.names)

    def __len__(self) -> int:
        return len(self.codes)

    def at(self, place: int) -> str:
        return self.names[self.codes[place]]

    def isin(self, names: Iterable[str]) -> Bool[np.ndarray, " n"]:
        """Which of the strings are among ``names``."""
        wanted = set(names)
        chosen: NDArray[np.bool_] = np.array([name in wanted for name in self.names], bool)
        return chosen[self.codes] if len(chosen) else np.zeros(len(self), bool)

    def counts(self, rows: Any = slice(None)) -> dict[str, int]:
        """How often each name occurs, in all rows or some; names that do not are left out."""
        numbers = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        return {name: n for name, n in zip(self.names, numbers, strict=True) if n}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tar of a set: file name, size in bytes, SHA-256 in hex, number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a set consists of.

    Attributes:
        dataset: short name of the data set.
        kind: ``"depth"`` for RGB-D frames, ``"art"`` for pictures without depth.
        request: the options the set was packed with.
        skipped: reason -> number of frames left out.
        shards: the tars, in order.
        keys, scenes, splits: one string per sample, in the order of the shards.
        sizes: (N, 2) int32 image height and width in pixels.
        crc32: (N,) uint32 CRC-32 of the sample's bytes in its ``span``.
        members: extension -> (N, 2) int64 offset and length in the shard; (-1, 0) if absent.
        blocks: CRC-32 of every ``BLOCK`` rows, as recorded with them; none if they were not.
    """

    dataset: str
    kind: Literal["depth", "art"]
    request: Mapping[str, object]
    skipped: Mapping[str, int]
    shards: tuple[Shard, ...] = ()
    keys: Strings = field(default_factory=lambda: Strings.of(()))
    scenes: Categories = field(default_factory=lambda: Categories.of(()))
    splits: Categories = field(default_factory=lambda: Categories.of(()))
    sizes: Int32[np.ndarray, "n 2"] = field(default_factory=lambda: np.empty((0, 2), np.int32))
    crc32: UInt32[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.uint32))
    members: Mapping[str, Int64[np.ndarray, "n 2"]] = field(default_factory=dict)
    blocks: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def starts(self) -> Int64[np.ndarray, " shards_and_1"]:
        """First sample of each shard, and the number of all."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    def shard_of(self, rows: Any) -> Any:
        """Number of the shard of a sample, or of each of some."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_of(self, shard: int) -> range:
        """The samples of a shard."""
        return range(*self.starts[shard : shard + 2].tolist())

    def span(self, i: int) -> tuple[int, int]:
        """First and past-the-last byte of a sample's members, headers between included.

        They are neighbours in the tar, so this is one range read. (0, 0) if there are none.
        """
        places = [table[i].tolist() for table in self.members.values()]
        spans = [(offset, offset + length) for offset, length in places if offset >= 0]
        return min((a for a, _ in spans), default=0), max((b for _, b in spans), default=0)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The tensors of ``index.safetensors``."""
        found: dict[str, NDArray[Any]] = {
            "size": self.sizes,
            "crc32": self.crc32,
            "scene.code": self.scenes.codes,
            "split.code": self.splits.codes,
        }
        names = Strings.of(self.scenes.names), Strings.of(self.splits.names)
        for name, strings in (("key", self.keys), ("scene", names[0]), ("split", names[1])):
            found |= {f"{name}.bytes": strings.data, f"{name}.end": strings.ends}
        found |= {_MEMBER + ext: table for ext, table in self.members.items()}
        return {name: np.ascontiguousarray(column) for name, column in found.items()}

    def block_checksum(self, block: int) -> int:
        """CRC-32 of a block of rows: of all their columns, one after the other."""
        first, last = block * BLOCK, min((block + 1) * BLOCK, len(self))
        ends = self.keys.ends
        begin = ends[first - 1] if first else 0
        parts = [
            self.keys.data[begin : ends[last - 1]],
            *(column[first:last] for column in (ends, self.sizes, self.crc32)),
            *(self.members[ext][first:last] for ext in sorted(self.members)),
        ]
        found = 0
        for part in parts:
            found = zlib.crc32(np.ascontiguousarray(part).data, found)
        return found

    def to_bytes(self) -> tuple[bytes, bytes]:
        """The bytes of ``index.json`` and of the columns: equal content gives equal bytes."""
        columns = self.columns()
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "dataset": self.dataset,
            "kind": self.kind,
            "request": self.request,
            "skipped": self.skipped,
            "shards": [
                {"name": s.name, "bytes": s.bytes, "sha256": s.sha256, "samples": s.samples}
                for s in self.shards
            ],
            "columns": {name: checksum(columns[name]) for name in _EAGER},
            "members": sorted(self.members),
            "blocks": [self.block_checksum(b) for b in range(-(-len(self) // BLOCK))],
        }
        return sign(document), safetensors.numpy.save(columns)

    @staticmethod
    def from_bytes(data: bytes, columns: Callable[[str], Columns], source: str) -> "Index":
        """Parse and check an index that anybody may have written.

        Args:
            data: the bytes of ``index.json``.
            columns: gives the columns, which older versions do not have, by the checksum of
                ``index.json``.
            source: path or URL of the latter, for messages.

        Raises:
            UserError: it is not an index, is of a newer version, is not what was written, or
                contradicts itself.
        """
        try:
            document = _checked(data)
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']!r} instead of {_FORMAT!r}")
            is_signed = "checksum" in document
            known = (_LISTS_VERSION, _VERSION) if is_signed else (_UNSIGNED_VERSION,)
            if document["version"] not in known:
                raise ValueError(
                    f"format version {document['version']!r}, this flatdepth reads {_VERSION}"
                )
            if document["version"] == _VERSION:
                index = _of_columns(document, columns(document["checksum"]))
            else:
                index = _of_lists(document)
                check_rows(index)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{source} is not a usable shard index ({what}); copy or pack it again"
            ) from error
        return index


def checksum(column: NDArray[Any]) -> int:
    """CRC-32 of a column's bytes."""
    return zlib.crc32(column.data)


def mapped_columns(path: Path) -> Columns:
    """The columns in a file, of which nothing is read before it is asked for.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{COLUMNS_NAME} is damaged: {error}") from error


def parsed_columns(data: bytes) -> Columns:
    """The columns in bytes. Raises ValueError if they are damaged."""
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{COLUMNS_NAME} is damaged: {error}") from error


def canonical_json(document: object) -> bytes:
    """Compact UTF-8 JSON with sorted keys and no NaN: equal documents give equal bytes."""
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def sign(document: Mapping[str, object]) -> bytes:
    """An index as canonical JSON whose first entry is the SHA-256 of all bytes behind that entry.

    So a reader checks the file's own bytes, without writing it anew.
    """
    rest = canonical_json({key: document[key] for key in document if key != "checksum"})[1:] + b"\n"
    return b'{"checksum":"' + hashlib.sha256(rest).hexdigest().encode() + b'",' + rest


def _checked(data: bytes) -> dict[str, Any]:
    """The document in signed bytes, or in those of a set from before there were signatures.

    Raises:
        ValueError: the bytes are not those that were signed, or are no JSON object.
    """
    signature = _SIGNATURE.match(data)
    if signature:
        found = hashlib.sha256(memoryview(data)[signature.end() :]).hexdigest()
        if found != signature[1].decode():
            raise ValueError("its checksum differs: it was damaged or edited")
    document = _mapping(parse_json(data))
    if not signature and not document.keys() <= _UNSIGNED_KEYS:
        raise ValueError("its checksum is missing: it was damaged or edited")
    return document


def concatenate(indices: Sequence[Index], request: Mapping[str, object]) -> Index:
    """One index over the shards of several, in the given order, renamed by position.

    Args:
        indices: at least one; all of one data set and kind.
        request: the ``request`` of the result.
    """
    first = indices[0]
    exts = sorted({ext for index in indices for ext in index.members})

    def table(index: Index, ext: str) -> NDArray[np.int64]:
        absent = np.tile(np.array([-1, 0], np.int64), (len(index), 1))
        return index.members.get(ext, absent)

    shards = [shard for index in indices for shard in index.shards]
    skipped: Counter[str] = Counter()
    for index in indices:
        skipped.update(index.skipped)
    return Index(
        dataset=first.dataset,
        kind=first.kind,
        request=request,
        skipped=dict(skipped),
        shards=tuple(
            Shard(
                name=shard_name(first.dataset, number),
                bytes=shard.bytes,
                sha256=shard.sha256,
                samples=shard.samples,
            )
            for number, shard in enumerate(shards)
        ),
        keys=Strings.joined([index.keys for index in indices]),
        scenes=Categories.joined([index.scenes for index in indices]),
        splits=Categories.joined([index.splits for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
        crc32=np.concatenate([index.crc32 for index in indices]),
        members={ext: np.concatenate([table(index, ext) for index in indices]) for ext in exts},
    )


def _of_columns(document: Mapping[str, Any], columns: Columns) -> Index:
    """The index in a document and its columns, checked without a look at every row."""
    sums, blocks = _mapping(document["columns"]), _list(document["blocks"])
    exts = _list(document["members"])
    for name in _EAGER:
        if checksum(columns[name]) != sums[name]:
            raise ValueError(f"column {name} of {COLUMNS_NAME} is damaged: its checksum differs")
    index = Index(
        **_head(document),
        blocks=blocks,
        keys=_strings(columns, "key"),
        scenes=_categories(columns, "scene"),
        splits=_categories(columns, "split"),
        sizes=columns["size"],
        crc32=columns["crc32"],
        members={ext: columns[_MEMBER + ext] for ext in exts},
    )
    _check_head(index)
    if len(blocks) != -(-len(index) // BLOCK):
        raise ValueError(f"{len(blocks)} checksums for {len(index)} rows")
    wanted = {"key.end": np.int64, "scene.code": np.int32, "split.code": np.int32}
    wanted |= {"crc32": np.uint32, "size": np.int32}
    wanted |= {_MEMBER + ext: np.int64 for ext in exts}
    for name, dtype in wanted.items():
        shape = (index.starts[-1], 2)[: columns[name].ndim]
        if columns[name].dtype != dtype or columns[name].shape != shape:
            raise ValueError(f"column {name} of {COLUMNS_NAME} is {columns[name].dtype}{shape}")
    return index


def _strings(columns: Columns, name: str) -> Strings:
    data, ends = columns[f"{name}.bytes"], columns[f"{name}.end"]
    last = ends[-1] if len(ends) else 0
    if data.dtype != np.uint8 or ends.dtype != np.int64 or data.shape != (last,):
        raise ValueError(f"column {name}.bytes of {COLUMNS_NAME} does not end with its last row")
    return Strings(data, ends)


def _categories(columns: Columns, name: str) -> Categories:
    codes, names = columns[f"{name}.code"], tuple(_strings(columns, name))
    if len(codes) and not 0 <= codes.min() <= codes.max() < len(names):
        raise ValueError(f"column {name}.code of {COLUMNS_NAME} numbers no name")
    return Categories(codes, names)


def _head(document: Mapping[str, Any]) -> dict[str, Any]:
    """What all versions say of a set as a whole."""
    skipped = _mapping(document["skipped"])
    return {
        "dataset": _string(document["dataset"]),
        "kind": document["kind"],
        "request": _mapping(document["request"]),
        "skipped": {str(reason): _integer(n) for reason, n in skipped.items()},
        "shards": tuple(
            Shard(
                name=_string(shard["name"]),
                bytes=_integer(shard["bytes"]),
                sha256=_string(shard["sha256"]),
                samples=_integer(shard["samples"]),
            )
            for shard in _list(document["shards"])
        ),
    }


def _of_lists(document: Mapping[str, Any]) -> Index:
    """An index of version 1 or 2."""
    rows = _mapping(document["samples"])
    head = _head(document)
    samples = [shard.samples for shard in head["shards"]]
    if _list(rows["shard"]) != np.repeat(np.arange(len(samples)), samples).tolist():
        raise ValueError("samples that do not follow the order of the shards")
    sizes = [_integers(rows["height"], np.int32), _integers(rows["width"], np.int32)]
    return Index(
        **head,
        keys=Strings.of(map(_string, _list(rows["key"]))),
        scenes=Categories.of(map(_string, _list(rows["scene"]))),
        splits=Categories.of(map(_string, _list(rows["split"]))),
        sizes=np.stack(sizes, axis=1),
        crc32=_integers(rows["crc32"], np.uint32),
        members={
            ext: np.stack([_integers(table["offset"]), _integers(table["length"])], axis=1)
            for ext, table in _mapping(rows["members"]).items()
        },
    )


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"an object was expected, not {value!r:.40}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, not {value!r:.40}")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string was expected, not {value!r:.40}")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"an integer was expected, not {value!r:.40}")
    return value


def _integers(value: object, dtype: type[np.integer[Any]] = np.int64) -> NDArray[Any]:
    return np.array([_integer(v) for v in _list(value)], dtype)


def _check_head(index: Index) -> None:
    if not is_dataset_name(index.dataset) or index.kind not in ("depth", "art"):
        raise ValueError(f"data set {index.dataset!r} of kind {index.kind!r}")
    if bad := [shard.name for shard in index.shards if not is_shard_name(shard.name)]:
        raise ValueError(f"shard name {bad[0]!r}")
    if any(shard.samples < 0 for shard in index.shards):
        raise ValueError("a shard with fewer samples than none")


def check_rows(index: Index) -> None:
    """Raise ValueError where an index contradicts itself or names a file outside its set."""
    _check_head(index)
    n = len(index)
    columns: list[Sized] = [index.scenes, index.splits, index.sizes, index.crc32]
    columns += index.members.values()
    if {len(column) for column in columns} != {n} or index.starts[-1] != n:
        raise ValueError("columns of different lengths")
    keys = list(index.keys)
    if bad := [key for key in keys if not is_key(key)]:
        raise ValueError(f"key {bad[0]!r}")
    if len(set(keys)) != n:
        raise ValueError("a key twice")
    if (index.sizes < 1).any():
        raise ValueError("an image without pixels")
    samples = [shard.samples for shard in index.shards]
    ends = np.repeat(np.array([shard.bytes for shard in index.shards], np.int64), samples)
    for ext, table in index.members.items():
        offset, length = table.T
        present = offset >= 0
        if (length < 0).any() or (length[~present] != 0).any() or (length > ends - offset).any():
            raise ValueError(f"a member .{ext} outside its shard")
    counts = {
        ext: (index.members[ext][:, 0] >= 0) if ext in index.members else np.zeros(n, bool)
        for ext in KNOWN_EXTS
    }
    images = sum(counts[ext].astype(int) for ext in IMAGE_EXTS)
    depth = counts[DEPTH_EXT] == (index.kind == "depth")
    if not (counts[JSON_EXT].all() and np.all(images == 1) and depth.all()):
        raise ValueError("a sample without its members")
