"""Shard sets: standard WebDataset tars with an index that makes every sample a range read.

A shard set is one directory (or URL prefix)::

    index.json              written last: a set without it is unfinished; signed, see ``sign``
    <dataset>-000000.tar    <key>.jpg|png|webp, <key>.depth.fdz, <key>.json, <key>.region.png where
                            flat things are labelled, <key>.thing.png where planes are given for
                            them, then the next key
    skipped.jsonl           one line per frame left out, with the reason

The tars are byte-deterministic and carry no path to trust: a member name is a key and an
extension, and only the extensions above are ever decoded.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flatdepth.errors import UserError
from flatdepth.untrusted import parse_json

INDEX_NAME = "index.json"
SKIPPED_NAME = "skipped.jsonl"
WORK_DIR = ".pack"
DEPTH_EXT = "depth.fdz"
JSON_EXT = "json"
REGION_EXT = "region.png"
THING_EXT = "thing.png"
IMAGE_EXTS = ("jpg", "png", "webp")
KNOWN_EXTS = {JSON_EXT, DEPTH_EXT, REGION_EXT, THING_EXT, *IMAGE_EXTS}

_FORMAT = "flatdepth-shards"
_VERSION = 2
_UNSIGNED_VERSION = 1  # of sets that were packed before the index had a checksum
_UNSIGNED_KEYS = {"dataset", "format", "kind", "request", "samples", "shards", "skipped", "version"}
_SIGNATURE = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')
_FORBIDDEN = r"/\\:\x00-\x1f\x7f\ud800-\udfff"
_KEY = re.compile(rf"(?!.*(?:^|/)\.{{1,2}}/)(?:[^{_FORBIDDEN}]+/)*[^.{_FORBIDDEN}]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9]{6,}\.tar")
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def is_key(key: str) -> bool:
    """Whether ``key`` is safe as a tar member and file name: relative, its last part dotless."""
    return _KEY.fullmatch(key) is not None


def is_dataset_name(name: str) -> bool:
    """Whether ``name`` can begin a shard's file name."""
    return _DATASET.fullmatch(name) is not None


def shard_name(dataset: str, number: int) -> str:
    """The file name of a data set's shard ``number``, counted from 0."""
    return f"{dataset}-{number:06d}.tar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One tar of a set: file name, size in bytes, SHA-256 in hex, number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What ``index.json`` says: the shards, and one row per sample in shard order.

    Attributes:
        dataset: short name of the data set.
        kind: ``"depth"`` for RGB-D frames, ``"art"`` for pictures without depth.
        request: the options the set was packed with.
        skipped: reason -> number of frames left out.
        shards: the tars, in order.
        keys, scenes, splits: one string per sample.
        sizes: (N, 2) int64 image height and width in pixels.
        shard: (N,) int64 number of the sample's shard.
        crc32: (N,) int64 CRC-32 of the sample's bytes from ``spans()[i, 0]`` to ``spans()[i, 1]``.
        members: extension -> (N, 2) int64 offset and length in the shard; (-1, 0) if absent.
    """

    dataset: str
    kind: Literal["depth", "art"]
    request: Mapping[str, object]
    skipped: Mapping[str, int]
    shards: tuple[Shard, ...] = ()
    keys: Sequence[str] = ()
    scenes: Sequence[str] = ()
    splits: Sequence[str] = ()
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    shard: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    crc32: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    members: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def spans(self) -> NDArray[np.int64]:
        """(N, 2) first and past-the-last byte of each sample's members, headers between included.

        The members of a sample are neighbours in its tar, so this is one range read.
        """
        spans = np.empty((len(self), 2), np.int64)
        spans[:, 0] = np.iinfo(np.int64).max
        spans[:, 1] = 0
        for table in self.members.values():
            offset, length = table.T
            present = offset >= 0
            spans[present, 0] = np.minimum(spans[present, 0], offset[present])
            spans[present, 1] = np.maximum(spans[present, 1], (offset + length)[present])
        return spans

    def to_json(self) -> bytes:
        """The canonical bytes of ``index.json``, signed: equal content gives equal bytes."""
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
            "samples": {
                "key": list(self.keys),
                "scene": list(self.scenes),
                "split": list(self.splits),
                "height": self.sizes[:, 0].tolist(),
                "width": self.sizes[:, 1].tolist(),
                "shard": self.shard.tolist(),
                "crc32": self.crc32.tolist(),
                "members": {
                    ext: {"offset": table[:, 0].tolist(), "length": table[:, 1].tolist()}
                    for ext, table in self.members.items()
                },
            },
        }
        return sign(document)

    @staticmethod
    def from_json(data: bytes, source: str) -> "Index":
        """Parse and check an index that anybody may have written.

        Args:
            data: the bytes of ``index.json``.
            source: its path or URL, for messages.

        Raises:
            UserError: it is not an index, is of a newer version, is not what was written, or
                contradicts itself.
        """
        try:
            document = _checked(data)
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']!r} instead of {_FORMAT!r}")
            expected = _VERSION if "checksum" in document else _UNSIGNED_VERSION
            if document["version"] != expected:
                raise ValueError(
                    f"format version {document['version']!r}, this flatdepth reads {_VERSION}"
                )
            index = _parse(document)
            _check(index)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{source} is not a usable shard index ({what}); copy or pack it again"
            ) from error
        return index


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
    starts = np.cumsum([0, *(len(index.shards) for index in indices)])
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
        keys=[key for index in indices for key in index.keys],
        scenes=[scene for index in indices for scene in index.scenes],
        splits=[split for index in indices for split in index.splits],
        sizes=np.concatenate([index.sizes for index in indices]),
        shard=np.concatenate(
            [index.shard + start for index, start in zip(indices, starts, strict=False)]
        ),
        crc32=np.concatenate([index.crc32 for index in indices]),
        members={ext: np.concatenate([table(index, ext) for index in indices]) for ext in exts},
    )


def _parse(document: Mapping[str, object]) -> Index:
    rows = _mapping(document["samples"])
    return Index(
        dataset=_string(document["dataset"]),
        kind=document["kind"],  # type: ignore[arg-type]  # checked in _check
        request=_mapping(document["request"]),
        skipped={str(reason): _integer(n) for reason, n in _mapping(document["skipped"]).items()},
        shards=tuple(
            Shard(
                name=_string(shard["name"]),
                bytes=_integer(shard["bytes"]),
                sha256=_string(shard["sha256"]),
                samples=_integer(shard["samples"]),
            )
            for shard in _list(document["shards"])
        ),
        keys=[_string(key) for key in _list(rows["key"])],
        scenes=[_string(scene) for scene in _list(rows["scene"])],
        splits=[_string(split) for split in _list(rows["split"])],
        sizes=np.stack([_integers(rows["height"]), _integers(rows["width"])], axis=1),
        shard=_integers(rows["shard"]),
        crc32=_integers(rows["crc32"]),
        members={
            ext: np.stack([_integers(table["offset"]), _integers(table["length"])], axis=1)
            for ext, table in _mapping(rows["members"]).items()
        },
    )


def _mapping(value: object) -> dict:
    if not isinstance(value, dict):
        raise TypeError(f"an object was expected, not {value!r:.40}")
    return value


def _list(value: object) -> list:
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


def _integers(value: object) -> NDArray[np.int64]:
    return np.array([_integer(v) for v in _list(value)], dtype=np.int64)


def _check(index: Index) -> None:
    """Raise ValueError where an index contradicts itself or names a file outside its set."""
    n = len(index)
    if not is_dataset_name(index.dataset) or index.kind not in ("depth", "art"):
        raise ValueError(f"data set {index.dataset!r} of kind {index.kind!r}")
    if bad := [shard.name for shard in index.shards if not _SHARD_NAME.fullmatch(shard.name)]:
        raise ValueError(f"shard name {bad[0]!r}")
    arrays = (index.sizes, index.shard, index.crc32, *index.members.values())
    if {len(index.scenes), len(index.splits), *(len(array) for array in arrays)} != {n}:
        raise ValueError("columns of different lengths")
    if bad := [key for key in index.keys if not is_key(key)]:
        raise ValueError(f"key {bad[0]!r}")
    if len(set(index.keys)) != n:
        raise ValueError("a key twice")
    samples = [shard.samples for shard in index.shards]
    if index.shard.tolist() != np.repeat(np.arange(len(samples)), samples).tolist():
        raise ValueError("samples that do not follow the order of the shards")
    if (index.sizes < 1).any():
        raise ValueError("an image without pixels")
    ends = np.array([shard.bytes for shard in index.shards], np.int64)[index.shard]
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
