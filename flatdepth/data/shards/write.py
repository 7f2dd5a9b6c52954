"""Writing shard sets: byte-deterministic tars, an index, and restarts that lose nothing.

While a set is being packed its directory holds ``.pack/`` with the request, the shard being
written and one record per finished shard. ``index.json`` appears last and ``.pack/`` goes away.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from webdataset import TarWriter

from flatdepth.data.shards import (
    COLUMNS_NAME,
    DEPTH_EXT,
    IMAGE_EXTS,
    INDEX_NAME,
    JSON_EXT,
    REGION_EXT,
    SKIPPED_NAME,
    THING_EXT,
    WORK_DIR,
    is_dataset_name,
    is_key,
    shard_name,
)
from flatdepth.data.shards.codec import depth_meta, encode_depth, encode_map
from flatdepth.data.shards.index import (
    Categories,
    Index,
    Shard,
    Strings,
    canonical_json,
    concatenate,
    parsed_columns,
)
from flatdepth.data.shards.read import is_intrinsics, resolve
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import RawFrame
from flatdepth.untrusted import parse_json

_REQUEST = f"{WORK_DIR}/request.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One frame ready for a tar.

    Attributes:
        key, scene, split: as in ``RawFrame``.
        height, width: of the image, in pixels.
        members: (extension, bytes) in tar order.
    """

    key: str
    scene: str
    split: str
    height: int
    width: int
    members: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A frame left out: its key, a reason shared by all frames with the same trouble, detail."""

    key: str
    reason: str
    detail: str = ""


def encode_sample(raw: RawFrame, level: int = 12) -> Sample:
    """The tar members of a frame: image bytes untouched, depth codes bit for bit, JSON.

    Args:
        raw: the frame.
        level: zstd level of the depth payload, 1..22.

    Raises:
        BadFrame: its key, image type or intrinsics cannot be stored.
    """
    if not is_key(raw.key):
        raise BadFrame("key cannot name a file", repr(raw.key))
    if raw.image_ext not in IMAGE_EXTS:
        raise BadFrame("image of an unsupported type", f".{raw.image_ext}")
    if raw.K_px is not None and not is_intrinsics(raw.K_px):
        raise BadFrame("intrinsics unusable", f"{raw.K_px.tolist()}")
    about = {
        "key": raw.key,
        "dataset": raw.dataset,
        "scene": raw.scene,
        "split": raw.split,
        "width": raw.width,
        "height": raw.height,
        "K_px": None if raw.K_px is None else raw.K_px.tolist(),
        "depth": None if raw.depth is None else depth_meta(raw.depth),
        "meta": dict(raw.meta),
    }
    if raw.things is not None:
        about["planes"] = [
            plane.tolist() if np.isfinite(plane).all() else None for plane in raw.things.planes
        ]
    members = [(raw.image_ext, raw.image), (JSON_EXT, canonical_json(about))]
    if raw.depth is not None:
        members.append((DEPTH_EXT, encode_depth(raw.depth, level)))
    if raw.region is not None:
        members.append((REGION_EXT, encode_map(raw.region)))
    if raw.things is not None:
        members.append((THING_EXT, encode_map(raw.things.number)))
    return Sample(
        key=raw.key,
        scene=raw.scene,
        split=raw.split,
        height=raw.height,
        width=raw.width,
        members=tuple(sorted(members)),
    )


class Output:
    """A directory, local or at an fsspec URL, in which files appear whole or not at all.

    Local files are written under a temporary name, fsynced and renamed; object stores publish
    an upload when it is complete.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = resolve(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        try:
            self._fs.makedirs(self._root, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the output directory {url}: {error}") from error

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, None if there is none."""
        try:
            return int(self._fs.size(self._path(name)))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None if there is none."""
        try:
            data: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return data

    def write(self, name: str, data: bytes) -> None:
        """Publish a small file."""
        if not self._local:
            self._fs.pipe_file(self._path(name), data)
            return
        with self.temporary(name) as file:
            file.write(data)
            self.publish(file, name)

    def temporary(self, name: str) -> IO[bytes]:
        """A new local file to fill, for ``publish``."""
        if not self._local:
            return tempfile.NamedTemporaryFile(prefix="flatdepth-", delete=False)
        work = Path(self._path(WORK_DIR))
        work.mkdir(exist_ok=True)
        return (work / f"{Path(name).name}.{os.getpid()}.tmp").open("wb")

    def publish(self, file: IO[bytes], name: str) -> None:
        """Make a temporary file durable and give it its name."""
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if self._local:
            Path(file.name).replace(self._path(name))
            _sync_directory(Path(self._path(name)).parent)
        else:
            self._fs.put_file(file.name, self._path(name))
            Path(file.name).unlink()

    @contextmanager
    def lock(self, patience_s: float) -> Iterator[None]:
        """Within, no other process packs into this directory. Object stores have no such lock:
        there, two of the same request write the same bytes.

        Raises:
            UserError: another process is still at it after so many seconds.
        """
        if not self._local:
            yield
            return
        work = Path(self._path(WORK_DIR))
        lock = FileLock(work / "lock")
        until = time.monotonic() + patience_s
        while not lock.is_locked:
            work.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=max(until - time.monotonic(), 0.0))
            except FileNotFoundError:
                pass  # the other one has finished, and has taken it away
            except Timeout as error:
                raise UserError(
                    f"another process is packing into {self.url}; wait for it, or choose another "
                    "--out"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def adopt(self, fs: AbstractFileSystem, names: Mapping[str, str]) -> None:
        """Give finished files of another set a name here as well.

        By hard links where the file system can, by an object store's own copies, else by their
        bytes.

        Args:
            fs: where they are.
            names: name here -> path there.
        """
        if self._local and isinstance(fs, LocalFileSystem):
            for name, source in names.items():
                _link(Path(source), Path(self._path(name)))
        elif fs == self._fs:
            fs.copy(list(names.values()), [self._path(name) for name in names])
        else:
            for name, source in names.items():
                with fs.open(source, "rb") as file, self.temporary(name) as copy:
                    shutil.copyfileobj(file, copy, 1 << 22)
                    self.publish(copy, name)

    def discard_temporaries(self) -> None:
        """Delete what an interrupted run left half-written."""
        if self._local:
            for path in Path(self._path(WORK_DIR)).glob("*.tmp"):
                path.unlink()

    def remove_work(self) -> None:
        """Delete ``.pack/`` once the index is published."""
        if self._local:
            shutil.rmtree(self._path(WORK_DIR), ignore_errors=True)
        elif self._fs.exists(self._path(WORK_DIR)):
            self._fs.rm(self._path(WORK_DIR), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class SetWriter:
    """Writes one shard set from items numbered 0, 1, ..., and goes on where a run was cut off.

    The bytes depend on the samples and ``shard_bytes`` alone. A shard is closed by the first
    sample that would take it past ``shard_bytes``; a sample is never split.

    Attributes:
        next_item: the first item to pass to ``add`` or ``skip``: 0, or where finished shards end.
        frames, skipped: number of samples written and items left out so far, earlier runs included.
    """

    def __init__(
        self,
        out: Output,
        *,
        dataset: str,
        kind: Literal["depth", "art"],
        request: Mapping[str, object],
        shard_bytes: int,
    ) -> None:
        """Begin or resume a set.

        Raises:
            UserError: the directory holds an unfinished set of another request.
        """
        if not is_dataset_name(dataset):
            raise UserError(
                f"data set name {dataset!r} cannot name files; use letters, digits, '-' and '_'"
            )
        self._out = out
        self._dataset = dataset
        self._kind = kind
        self._request = request
        self._shard_bytes = shard_bytes
        self._open: _OpenShard | None = None
        self._skips: list[Skip] = []
        begin(out, request)
        out.discard_temporaries()
        self._records = self._find_records()
        self.next_item = self._records[-1].next_item if self._records else 0
        self.frames = sum(len(record.index) for record in self._records)
        self.skipped = sum(len(record.skips) for record in self._records)

    def add(self, item: int, sample: Sample) -> None:
        """Append the sample of item number ``item``; items come in order."""
        blob, members = _tar_members(sample)
        if self._open is not None and self._open.bytes + len(blob) > self._shard_bytes:
            self._close_shard(next_item=item)
        if self._open is None:
            name = shard_name(self._dataset, len(self._records))
            self._open = _OpenShard(name, self._out.temporary(name))
        self._open.append(sample, blob, members)
        self.frames += 1

    def skip(self, skip: Skip) -> None:
        """Note that the next item is left out."""
        self._skips.append(skip)
        self.skipped += 1

    def finish(self, next_item: int) -> Index:
        """Close the last shard, publish ``skipped.jsonl`` and then the index."""
        if self._open is not None:
            self._close_shard(next_item)
        rest = Index(
            dataset=self._dataset,
            kind=self._kind,
            request={},
            skipped=Counter(skip.reason for skip in self._skips),
        )
        index = concatenate([*(record.index for record in self._records), rest], self._request)
        self._out.write(SKIPPED_NAME, skip_lines(self.skips))
        write_index(self._out, index)
        self._out.remove_work()
        return index

    def abandon(self) -> None:
        """Drop the unfinished shard; the finished ones stay for the next run."""
        if self._open is not None:
            self._open.file.close()
            Path(self._open.file.name).unlink(missing_ok=True)
            self._open = None

    @property
    def skips(self) -> list[Skip]:
        """The items left out so far, in order."""
        return [skip for record in self._records for skip in record.skips] + self._skips

    def _close_shard(self, next_item: int) -> None:
        assert self._open is not None
        shard = self._open.close()
        self._out.publish(self._open.file, shard.name)
        record = _Record(
            next_item=next_item,
            skips=tuple(self._skips),
            index=self._open.index(shard, self._dataset, self._kind, self._skips),
        )
        self._out.write(_record_name(len(self._records)), record.to_bytes())
        self._records.append(record)
        self._open = None
        self._skips = []

    def _find_records(self) -> "list[_Record]":
        """Records of the finished shards up to the first that is missing, damaged or of another
        size; that shard is packed again."""
        records: list[_Record] = []
        while (data := self._out.read(_record_name(len(records)))) is not None:
            record = _Record.from_bytes(data, f"{self._out.url}/{_record_name(len(records))}")
            if record is None:
                break
            (shard,) = record.index.shards
            if self._out.size(shard.name) != shard.bytes:
                break
            records.append(record)
        return records


def begin(out: Output, request: Mapping[str, object]) -> None:
    """Record a request in the directory of a set, or find it recorded.

    Raises:
        UserError: the directory holds an unfinished set of another request.
    """
    begun = begun_request(out)
    if begun is None:
        out.write(_REQUEST, canonical_json(request))
    else:
        refuse_other_request(out.url, begun, request, finished=False)


def begun_request(out: Output) -> dict[str, object] | None:
    """The request of an unfinished set, None if there is none."""
    data = out.read(_REQUEST)
    try:
        return None if data is None else dict(parse_json(data))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{out.url}/{_REQUEST} is damaged; delete {out.url}/{WORK_DIR} to pack the set from "
            "its start"
        ) from error


def refuse_other_request(
    url: str, found: Mapping[str, object], wanted: Mapping[str, object], *, finished: bool
) -> None:
    """Raise UserError if a directory was packed, or begun, with other options.

    Only the options that ``wanted`` states are compared.
    """
    old, new = _flat(found), _flat(json.loads(canonical_json(wanted)))
    changed = [
        f"{name} {json.dumps(old.get(name))} -> {json.dumps(new[name])}"
        for name in sorted(new)
        if old.get(name) != new[name]
    ]
    if changed:
        state = "a finished set" if finished else "an unfinished set"
        raise UserError(
            f"{url} holds {state} packed with other options or raw data ({'; '.join(changed)}); "
            "choose another --out, repeat the earlier options, or delete that directory first"
        )


def write_index(output: Output, index: Index) -> None:
    """Publish an index, ``index.json`` last."""
    document, columns = index.to_bytes()
    output.write(COLUMNS_NAME, columns)
    output.write(INDEX_NAME, document)


def skip_lines(skips: list[Skip]) -> bytes:
    """The bytes of ``skipped.jsonl``."""
    rows = ({"key": s.key, "reason": s.reason, "detail": s.detail} for s in skips)
    return b"".join(
        json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n" for row in rows
    )


class _OpenShard:
    """A tar being written, with the rows of its index."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = name
        self.file = file
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._samples: list[Sample] = []
        self._members: list[dict[str, tuple[int, int]]] = []
        self._crc32: list[int] = []

    def append(self, sample: Sample, blob: bytes, members: Mapping[str, tuple[int, int]]) -> None:
        start = min(offset for offset, _ in members.values())
        end = max(offset + length for offset, length in members.values())
        self._samples.append(sample)
        self._members.append({ext: (self.bytes + o, n) for ext, (o, n) in members.items()})
        self._crc32.append(zlib.crc32(blob[start:end]))
        self._write(blob)

    def close(self) -> Shard:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        return Shard(
            name=self.name,
            bytes=self.bytes,
            sha256=self._sha256.hexdigest(),
            samples=len(self._samples),
        )

    def index(
        self, shard: Shard, dataset: str, kind: Literal["depth", "art"], skips: list[Skip]
    ) -> Index:
        exts = sorted({ext for members in self._members for ext in members})
        return Index(
            dataset=dataset,
            kind=kind,
            request={},
            skipped=Counter(skip.reason for skip in skips),
            shards=(shard,),
            keys=Strings.of(s.key for s in self._samples),
            scenes=Categories.of(s.scene for s in self._samples),
            splits=Categories.of(s.split for s in self._samples),
            sizes=np.array([(s.height, s.width) for s in self._samples], np.int32),
            crc32=np.array(self._crc32, np.uint32),
            members={
                ext: np.array([m.get(ext, (-1, 0)) for m in self._members], np.int64)
                for ext in exts
            },
        )

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A finished shard: its index, the items left out before its end, and where to go on."""

    next_item: int
    skips: tuple[Skip, ...]
    index: Index

    def to_bytes(self) -> bytes:
        head = {
            "next_item": self.next_item,
            "skips": [[skip.key, skip.reason, skip.detail] for skip in self.skips],
        }
        content = b"".join((json.dumps(head).encode(), b"\n", *self.index.to_bytes()))
        return hashlib.sha256(content).hexdigest().encode() + b"\n" + content

    @staticmethod
    def from_bytes(data: bytes, source: str) -> "_Record | None":
        """The record in its bytes, None if these are not what was written."""
        sha256, _, content = data.partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != sha256:
            return None
        first, index, columns = content.split(b"\n", 2)
        head = json.loads(first)
        return _Record(
            next_item=head["next_item"],
            skips=tuple(Skip(key=k, reason=r, detail=d) for k, r, d in head["skips"]),
            index=Index.from_bytes(index + b"\n", lambda _: parsed_columns(columns), source),
        )


def _record_name(number: int) -> str:
    return f"{WORK_DIR}/shard-{number:06d}.json"


def _tar_members(sample: Sample) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A sample's part of a tar, without owner or time, and where in it each member lies."""
    blob = io.BytesIO()
    members = {}
    tar = TarWriter(
        blob, user="", group="", mode=0o644, mtime=0, encoder=False, format="PAX_FORMAT"
    )
    with tar:
        for ext, data in sample.members:
            tar.write({"__key__": sample.key, ext: data})
            end = tar.tarstream.offset
            members[ext] = (end - len(data) - -len(data) % tarfile.BLOCKSIZE, len(data))
    return blob.getvalue()[:end], members


def _flat(request: Mapping[str, object]) -> dict[str, object]:
    """``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``, so that messages name single options."""
    flat: dict[str, object] = {}
    for name, value in request.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    """Give a finished shard a second name; copy it where hard links do not reach."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    temporary.replace(target)
