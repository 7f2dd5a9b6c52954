"""The packing engine: raw layouts to shard sets, and looking after shard sets.

``pack`` reads frames in a process pool, checks them and writes them in listing order, so that
the bytes do not depend on the number of workers or on interruptions.
"""

import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from multiprocessing import parent_process
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tqdm import tqdm

from flatdepth.cli import free_memory
from flatdepth.data.readers.base import MOST_OUTSIDE, Item, Listing, Reader, out_of_range
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME, JSON_EXT, SKIPPED_NAME, WORK_DIR
from flatdepth.data.shards.codec import (
    decode_frame,
    decode_image,
    encode_map,
)
from flatdepth.data.shards.index import BLOCK, Index, canonical_json, check_rows, concatenate
from flatdepth.data.shards.read import ShardSet, resolve
from flatdepth.data.shards.write import (
    Output,
    Sample,
    SetWriter,
    Skip,
    encode_sample,
    refuse_other_request,
    skip_lines,
    write_index,
)
from flatdepth.errors import BadFrame, UserError, expect_within, printable
from flatdepth.geometry import camera_trouble
from flatdepth.types import DepthCodes, RawFrame
from flatdepth.untrusted import parse_json

LOOKED_AT = 16
"""Frames of a packed set whose depths are summed up."""

_CAMERA_PART = re.compile(
    r"(?i)(?<![^/])(?:(?:image|color|colour|rgb|frame)s?(?:_\w*cam\w*)?|left|right|cam(?:era)?"
    r"|(?:image|color|colour|rgb|cam|camera)s?[_-]?(?:left|right|\d{1,2}))(?![^/])"
)
"""A part of a path that names a camera of several, such as image_02, right, cam0 and Camera_1."""
WORKER_BYTES = 200 * 10**6
"""What a process that packs takes at least."""

_AHEAD = 4  # items in flight per worker: hides uneven reading times, bounds memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSummary:
    """What ``pack`` or ``merge`` did.

    Attributes:
        out: directory of the set.
        dataset: its short name.
        frames, scenes, shards, bytes: what the set holds, earlier runs included.
        skipped: reason -> number of frames left out.
        damaged: how many of these were read and could not be used; the others are ruled out by
            the dataset's own lists.
        packed: frames packed by this run.
        seconds: how long this run took.
        already_complete: the set was finished before and nothing was done.
        depth_m: 2 %, median and 98 % of the depths of some frames; None for pictures.
        things: what this run found of labelled mirrors and pictures.
    """

    out: str
    dataset: str
    frames: int
    scenes: int
    shards: int
    bytes: int
    skipped: Mapping[str, int]
    damaged: int
    packed: int
    seconds: float
    already_complete: bool
    depth_m: tuple[float, float, float] | None
    things: "Things"

    def __str__(self) -> str:
        rows = [
            ("set", self.out),
            ("frames", f"{self.frames} in {self.scenes} scenes"),
            ("shards", f"{self.shards}, {_megabytes(self.bytes)}"),
            ("bytes per frame", f"{self.bytes / self.frames:.0f}" if self.frames else "-"),
            ("left out", str(sum(self.skipped.values()))),
        ]
        if self.depth_m is not None:
            near, middle, far = (f"{depth:.3g}" for depth in self.depth_m)
            rows.insert(2, ("depth", f"{near} .. {middle} .. {far} m (2 %, median, 98 %)"))
        rows += [(f"  {reason}", str(n)) for reason, n in _most_frequent(self.skipped)]
        if self.skipped:
            rows.append(("listed in", f"{self.out.rstrip('/')}/{SKIPPED_NAME}"))
        if self.already_complete:
            rows.append(("state", "was complete, nothing done (raw data added since is not in it)"))
        else:
            if self.things.planes or self.things.without:
                rows.append(("flat things", str(self.things)))
            rate = self.packed / max(self.seconds, 1e-9)
            rows.append(("this run", f"{self.packed} frames, {rate:.1f}/s"))
        return _text_table(rows)


@dataclass(slots=True)
class Things:
    """What is said of labelled mirrors and pictures in the ``meta`` of samples.

    Attributes:
        planes: of how many a plane is known.
        residuals: of those that were fitted.
        without: of how many none can be trusted.
        unknown: label that is not understood -> frames that have it.
    """

    planes: int = 0
    residuals: list[float] = field(default_factory=list)
    without: int = 0
    unknown: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        middle = f", median residual {np.median(self.residuals):.2%}" if self.residuals else ""
        without = f"; {self.without} without, no truth there" if self.without else ""
        return f"{self.planes} with planes{middle}{without}"

    def add(self, sample: Sample) -> list[str]:
        """Count those of a sample. Returns a clause about each whose plane is not known."""
        meta: dict[str, Any] = parse_json(dict(sample.members)[JSON_EXT])["meta"]
        self.unknown.update(meta.get("labels_unknown", {}).keys())
        troubles = []
        for number, thing in enumerate(meta.get("things", ()), start=1):
            if "trouble" in thing:
                troubles.append(f"{thing['region']} {number}: {thing['trouble']}")
            elif "region" in thing:
                self.planes += 1
                self.residuals += [thing["residual"]] if "residual" in thing else []
        self.without += len(troubles)
        return troubles

    def warning(self) -> str:
        """One line about labels that are not understood, "" if all are."""
        if not self.unknown:
            return ""
        listed = ", ".join(f"{label} ({n})" for label, n in _most_frequent(self.unknown))
        return (
            f"warning: labels that are not understood, in so many frames: {printable(listed)}; they"
            " are taken for background, see --region_names"
        )


def pack(
    reader: Reader,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    part: tuple[int, int] = (1, 1),
    shard_mb: float = 256,
    min_valid: float = 0.01,
    level: int = 12,
) -> PackSummary:
    """Pack a raw layout into a shard set.

    Frames that cannot be used are named on standard error and left out, counted and listed in
    ``skipped.jsonl`` (those that the dataset's own lists rule out without a detail). An
    interrupted run goes on after its last finished shard when it is called again and gives the
    same bytes as an uninterrupted one.

    Args:
        reader: the raw layout; its dataclass fields but ``raw`` are recorded as the request.
        out: directory or fsspec URL of the set; must not be shared by runs at the same time.
        workers: processes that read and encode; None: one per CPU; 1: this process.
        part: (i, n): pack only the i-th of n equal ranges of the listing, 1 <= i <= n, into
            ``out/part-i-of-n``; ``merge`` joins them.
        shard_mb: no shard grows past this many MB (10**6 bytes), unless one sample alone does.
        min_valid: least share of pixels with known, finite depth.
        level: zstd level of the depth payloads, 1..22.

    Raises:
        UserError: a wrong option, a directory that holds another set, an unusable raw layout, no
            usable frame at all, a full disk, or a worker that the system ended.
    """
    started = time.monotonic()
    _check_options(workers, part, shard_mb, min_valid, level)
    out = os.fspath(out)
    target = out if part[1] == 1 else f"{out.rstrip('/')}/{part_name(*part)}"
    request: dict[str, object] = {
        "reader": type(reader).__name__,
        "options": _options(reader),
        "shard_mb": shard_mb,
        "min_valid": min_valid,
        "level": level,
        "part": list(part),
    }
    output = Output(target)
    if output.size(INDEX_NAME) is not None:
        index = ShardSet.open(target, check_sizes=False).index
        refuse_other_request(target, index.request, request, finished=True)
        output.remove_work()
        return _summary(output, index, 0, started)
    listing = reader.list()
    _check_listing(listing)
    if reader.kind == "depth" and listing.items:
        _say_scenes(reader, listing.items)
    request["listing"] = _fingerprint(listing)
    writer = SetWriter(
        output,
        dataset=reader.dataset,
        kind=reader.kind,
        request=request,
        shard_bytes=int(shard_mb * 1e6),
    )
    first, last = _range_of_part(len(listing.items), part)
    if writer.next_item == 0 and part[0] == 1:
        for key, reason in listing.excluded:
            writer.skip(Skip(key=key, reason=reason))
    begin = first + writer.next_item
    if writer.frames:
        print(f"{target}: going on after {writer.frames} packed frames", file=sys.stderr)
    before = writer.frames
    things = Things()
    try:
        with (
            _Progress(reader.dataset, last - first, writer.next_item) as progress,
            _results(reader, listing.items, range(begin, last), workers, min_valid, level) as got,
        ):
            for number, result in got:
                if isinstance(result, Skip):
                    writer.skip(result)
                    progress.say(f"left out {result.key}: {result.reason} ({result.detail})")
                else:
                    writer.add(number - first, result)
                    for trouble in things.add(result):
                        progress.say(f"no truth at a flat thing of {result.key}: {trouble}")
                progress.step(writer.skipped)
        if writer.frames == 0 and part[1] == 1:
            raise UserError(_nothing_usable(output, writer.skips))
        index = writer.finish(last - first)
        if warning := things.warning():
            print(warning, file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left for {target}; free some and run the same command again to resume"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was ended by the system, most likely for lack of memory; run the "
            "same command again with fewer --workers to resume"
        ) from error
    finally:
        writer.abandon()
    return _summary(output, index, writer.frames - before, started, things=things)


def part_name(i: int, n: int) -> str:
    """Directory of part ``i`` of ``n`` below the output directory."""
    return f"part-{i:04d}-of-{n:04d}"


def merge(
    directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> PackSummary:
    """Join the parts of one ``pack --part i/n`` into one set, in listing order.

    Shards are hard-linked where the file system can and copied otherwise; the parts stay.

    Args:
        directories: local directories of the parts, or directories that hold them.
        out: local directory of the joined set; may be the one that holds the parts.

    Raises:
        UserError: a part is missing, unfinished or of another request, or ``out`` holds a set.
    """
    started = time.monotonic()
    for place in (*directories, out):
        if not isinstance(resolve(os.fspath(place))[0], LocalFileSystem):
            raise UserError(f"merge works on local directories only; copy {place} to one first")
    parts = _open_parts([Path(directory) for directory in directories])
    request = {**parts[0].index.request, "part": [1, 1]}
    index = concatenate([part.index for part in parts], request)
    output = Output(os.fspath(out))
    if output.size(INDEX_NAME) is not None:
        if ShardSet.open(out, check_sizes=False).index.to_bytes()[0] != index.to_bytes()[0]:
            raise UserError(f"{out} holds another finished set; choose another --out")
        return _summary(output, index, 0, started)
    sources = [Path(part.url, shard.name) for part in parts for shard in part.index.shards]
    for source, shard in zip(sources, index.shards, strict=True):
        _link(source, Path(out, shard.name))
    lines = b"".join(Path(part.url, SKIPPED_NAME).read_bytes() for part in parts)
    output.write(SKIPPED_NAME, lines)
    write_index(output, index)
    output.remove_work()
    return _summary(output, index, len(index), started, things=Things())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What ``verify`` found: (shard, samples, bytes) of each shard, (shard, key, what) of damage.

    ``key`` is "" where the damage is not inside a sample.
    """

    shards: Sequence[tuple[str, int, int]]
    damage: Sequence[tuple[str, str, str]]

    def __str__(self) -> str:
        damaged = Counter(shard for shard, _, _ in self.damage)
        rows = [("shard", "samples", "size", "state")]
        for name, samples, size in self.shards:
            state = f"DAMAGED ({damaged[name]})" if name in damaged else "ok"
            rows.append((name, str(samples), _megabytes(size), state))
        lines = [_text_table(rows)]
        lines += [
            f"damaged: {shard}" + (f", sample {key}" if key else "") + f": {what}"
            for shard, key, what in self.damage
        ]
        return "\n".join(lines)


def verify(url: str | os.PathLike[str], workers: int | None = None) -> Verification:
    """Check every byte of a set: sizes, SHA-256, tar headers against the index, all decoding.

    Args:
        url: directory or fsspec URL of the set.
        workers: threads, one shard each; None: one per CPU.

    Raises:
        UserError: there is no finished set or its index is unusable.
    """
    _check_workers(workers)
    with ShardSet.open(url, check_sizes=False, use_cache=False) as shards:
        numbers = range(len(shards.index.shards))
        with (
            _Progress(shards.dataset, len(shards), 0) as progress,
            _threads(workers) as pool,
        ):
            found = list(pool.map(lambda n: _verify_shard(shards, n, progress), numbers))
        found.append(_index_damage(shards.index))
        return Verification(
            shards=[(shard.name, shard.samples, shard.bytes) for shard in shards.index.shards],
            damage=[damage for group in found for damage in group],
        )


def reindex(url: str | os.PathLike[str]) -> str:
    """Write the index of a set anew, as this version does; the shards stay. Returns what was done.

    Raises:
        UserError: there is no finished set, or its index is unusable.
    """
    with ShardSet.open(url, check_sizes=False) as shards:
        index, output = shards.index, Output(os.fspath(url))
        document, _ = index.to_bytes()
        if output.read(INDEX_NAME) == document:
            return f"{url}: the index is of this version already"
        write_index(output, index)
    return f"{url}: wrote the index of {len(index)} samples anew, with columns in {COLUMNS_NAME}"


def ls(url: str | os.PathLike[str]) -> str:
    """A table of the shard set at a path or URL, or of all sets below it.

    Raises:
        UserError: there is none.
    """
    sets = [ShardSet.open(found, check_sizes=False) for found in _find_sets(os.fspath(url))]
    if not sets:
        ShardSet.open(url)  # says what is there instead
    rows = [("set", "data set", "kind", "samples", "scenes", "splits", "size", "bytes/frame")]
    for shards in sets:
        size = sum(shard.bytes for shard in shards.index.shards)
        splits = shards.splits.counts()
        rows.append(
            (
                shards.url,
                shards.dataset,
                shards.kind,
                str(len(shards)),
                str(len(shards.scenes.names)),
                " ".join(f"{name or '-'}:{n}" for name, n in sorted(splits.items())) or "-",
                _megabytes(size),
                f"{size / len(shards):.0f}" if len(shards) else "-",
            )
        )
    return _text_table(rows)


def export(
    url: str | os.PathLike[str],
    out: str | os.PathLike[str],
    codes_per_metre: float = 1000.0,
    workers: int | None = None,
) -> str:
    """Write a set as plain files for other tools.

    ``image/<key>.jpg|png|webp`` is the stored image; ``depth/<key>.png`` is planar z as 16-bit
    PNG, ``code = round(z * codes_per_metre)``, 0 where unknown and 65535 for sky and for
    everything too far to code (with 1000 codes per metre from 65.535 m on: treat 65535 as unknown
    unless you need the sky); ``region/<key>.png`` the regions, where there are some, as numbers of
    ``flatdepth.types.Region``; ``camera/<key>.json`` holds the intrinsics with the pixel centres of
    ``flatdepth.types`` (integer + 0.5).

    Returns:
        One sentence that says what was written, with the number of saturated pixels.

    Raises:
        UserError: there is no set, a sample is damaged, or ``out`` is not empty.
    """
    expect_within("--codes_per_metre", codes_per_metre, 1e-3, 1e6)
    _check_workers(workers)
    root = Path(out)
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    with (
        ShardSet.open(url) as shards,
        _Progress(shards.dataset, len(shards), 0) as progress,
        _threads(workers) as pool,
    ):

        def write(i: int) -> int:
            beyond = _export_sample(shards.read(i), root, codes_per_metre)
            progress.step(0)
            return beyond

        saturated = sum(pool.map(write, range(len(shards))))
        return (
            f"wrote {len(shards)} samples to {out}; {saturated} pixels with known depth lie "
            f"beyond {65535 / codes_per_metre:g} m and share code 65535 with the sky"
        )


def check_frame(raw: RawFrame, reader: Reader, min_valid: float = 0.01) -> None:
    """Check that a frame can be trained on.

    Readers of rendered data may have an attribute ``max_constant_share``: a frame in which one
    value makes up more than that share of the valid depth is a failed rendering.

    Raises:
        BadFrame: image or depth do not decode, differ in shape from each other, the regions or what
            the reader says, the camera cannot be (unless the reader's ``unusual_camera`` is true),
            or the depth is mostly unknown, out of range or constant.
        ValueError: the reader breaks its contract (its kind and the frame's members differ).
    """
    if reader.kind == "art":
        if raw.depth is not None:
            raise ValueError(f"{raw.key}: a reader of art gave depth")
        _check_size(raw, decode_image(raw.image))
        return
    if raw.depth is None or raw.K_px is None:
        raise ValueError(f"{raw.key}: a reader of depth gave no depth or intrinsics")
    trouble = camera_trouble(raw.K_px, raw.height, raw.width)
    if trouble and not getattr(reader, "unusual_camera", False):
        raise BadFrame("camera cannot be", trouble)
    frame = decode_frame(raw)
    _check_size(raw, frame.image)
    _check_depth(raw.depth, frame.depth_m, reader, min_valid)


def _check_size(raw: RawFrame, image: np.ndarray) -> None:
    if image.shape[:2] != (raw.height, raw.width):
        raise BadFrame(
            "image size differs from its description",
            f"{image.shape[1]}x{image.shape[0]}, described as {raw.width}x{raw.height}",
        )


def _check_depth(codes: DepthCodes, depth_m: np.ndarray, reader: Reader, min_valid: float) -> None:
    low_m, high_m = reader.depth_range_m
    known = ~np.isnan(depth_m) & ~np.isposinf(depth_m)
    share = known.mean()
    if share < min_valid or share == 0:
        raise BadFrame("too little valid depth", f"{share:.2%} of the pixels")
    valid_m = depth_m[known]
    outside = (valid_m <= low_m) | (valid_m > high_m)
    if (valid_m <= 0).any() or outside.mean() > MOST_OUTSIDE:
        raise out_of_range(valid_m, reader.depth_range_m)
    max_share: float | None = getattr(reader, "max_constant_share", None)
    if max_share is not None:
        counts = np.bincount(codes.codes.view(np.uint16)[known])
        if (constant := counts.max() / valid_m.size) > max_share:
            raise BadFrame("depth mostly constant", f"one value has {constant:.0%} of the pixels")


# Reading in parallel. Workers keep their reader, so that what it caches is read once.


@dataclass(frozen=True, slots=True)
class _Job:
    reader: Reader
    min_valid: float
    level: int

    def __call__(self, item: Item) -> Sample | Skip:
        try:
            raw = self.reader.read(item)
            check_frame(raw, self.reader, self.min_valid)
            return encode_sample(raw, self.level)
        except BadFrame as error:
            detail = printable(error.detail or "no more is known")
            return Skip(key=item.key, reason=error.reason, detail=detail)
        except Exception as error:
            error.add_note(f"while packing {item.key}")
            raise


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _worker_job
    _worker_job = job
    # A signal may reach the whole process group; the parent alone decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot stop its pool, whose workers would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(item: Item) -> Sample | Skip:
    assert _worker_job is not None
    return _worker_job(item)


@contextmanager
def _results(
    reader: Reader,
    items: Sequence[Item],
    numbers: range,
    workers: int | None,
    min_valid: float,
    level: int,
) -> Iterator[Iterator[tuple[int, Sample | Skip]]]:
    """(number, result) of ``items[number]`` for the given numbers, in order."""
    job = _Job(reader, min_valid, level)
    workers = min(workers or cpus(), max(len(numbers), 1))
    if workers == 1:
        yield ((number, job(items[number])) for number in numbers)
        return
    # spawn: fork would copy threads and locks of libraries in unknown states.
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    try:
        todo = (items[number] for number in numbers)
        yield zip(numbers, _in_order(pool, todo, _AHEAD * workers), strict=True)
    except KeyboardInterrupt:
        for worker in set(multiprocessing.active_children()).difference(others):
            worker.kill()  # it would end what it has begun, which may take long
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: Executor, items: Iterator[Item], ahead: int) -> Iterator[Sample | Skip]:
    pending: deque[Future[Sample | Skip]] = deque(
        pool.submit(_work, item) for item in islice(items, ahead)
    )
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(_work, item) for item in islice(items, 1))


@contextmanager
def _threads(workers: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool that is left at once where something goes wrong; what is not begun is dropped."""
    pool = ThreadPoolExecutor(workers or cpus())
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cpus() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere. Counts are thread-safe."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._first = name, total, done, done
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "_Progress":
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, initial=self._done, desc=self._name, unit="frame", smoothing=0.1
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, message: str) -> None:
        """A line that does not break the bar."""
        with self._lock:
            tqdm.write(message, file=sys.stderr)

    def step(self, skipped: int) -> None:
        with self._lock:
            self._done += 1
            if self._bar is not None:
                if skipped:
                    self._bar.set_postfix(skipped=skipped, refresh=False)
                self._bar.update()
            elif (now := time.monotonic()) - self._printed >= 5:
                self._printed = now
                rate = (self._done - self._first) / (now - self._started)
                left = (self._total - self._done) / rate
                print(
                    f"{self._name}: {self._done}/{self._total} frames, {rate:.1f}/s, "
                    f"{left / 60:.1f} min left" + (f", {skipped} left out" if skipped else ""),
                    file=sys.stderr,
                    flush=True,
                )


# The request, and which items it means.


def _check_options(
    workers: int | None, part: tuple[int, int], shard_mb: float, min_valid: float, level: int
) -> None:
    _check_workers(workers)
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part must be i/n with 1 <= i <= n, not {part[0]}/{part[1]}")
    expect_within("--part", part[1], 1, 9999)
    expect_within("--shard_mb", shard_mb, 1e-6, 1e6)
    expect_within("--min_valid", min_valid, 0, 1)
    expect_within("--level", level, 1, 22)


def _check_workers(workers: int | None) -> None:
    room = max(cpus(), free_memory() // WORKER_BYTES)
    expect_within("--workers", 1 if workers is None else workers, 1, min(room, 1024))


def _options(reader: Reader) -> dict[str, object]:
    """The reader's options as JSON values.

    Without ``raw``: the same data in another place is the same request.
    """
    values = {f.name: getattr(reader, f.name) for f in fields(reader) if f.name != "raw"}  # type: ignore[arg-type]
    as_json: dict[str, object] = json.loads(
        # Paths become strings, and so do the non-finite numbers that JSON does not have.
        json.dumps(values, default=str),
        parse_constant=str,
    )
    return as_json


def _check_listing(listing: Listing) -> None:
    keys = [item.key for item in listing.items]
    if any(a >= b for a, b in pairwise(keys)):
        raise ValueError("a reader must list its items sorted by key, without duplicates")


def _say_scenes(reader: Reader, items: Sequence[Item]) -> None:
    """Name some scenes, the unit of splits, and say on standard error what is odd about them."""
    scenes = list(dict.fromkeys(item.scene for item in items))
    some = ", ".join(printable(scene) for scene in scenes[:: max(1, len(scenes) // 3)][:3])
    print(
        f"{reader.dataset}: {len(items)} frames of {len(scenes)} scenes ({some})", file=sys.stderr
    )
    fix = "; see --scene_from" if hasattr(reader, "scene_from") else ""
    if len(items) > len(scenes) == 1 and not any(item.split for item in items):
        print(
            "warning: all frames are of one scene, so none can be held out for validation" + fix,
            file=sys.stderr,
        )
    places: dict[str, str] = {}
    for scene in scenes:
        other = places.setdefault(_CAMERA_PART.sub("*", scene), scene)
        if other != scene:
            print(
                f"warning: the scenes {printable(other)} and {printable(scene)} look like cameras"
                f" of one place, which a split would part{fix}",
                file=sys.stderr,
            )
            return


def _fingerprint(listing: Listing) -> dict[str, object]:
    rows = [[item.key, item.scene, item.split] for item in listing.items]
    digest = hashlib.sha256(canonical_json([rows, [list(row) for row in listing.excluded]]))
    return {"items": len(rows), "sha256": digest.hexdigest()}


def _range_of_part(items: int, part: tuple[int, int]) -> tuple[int, int]:
    i, n = part
    return (i - 1) * items // n, i * items // n


def _nothing_usable(output: Output, skips: list[Skip]) -> str:
    output.write(SKIPPED_NAME, skip_lines(skips))
    output.remove_work()  # there is nothing to resume, and other options shall not be refused
    if not skips:
        return "the raw layout holds no frame"
    (reason, n), *_ = _most_frequent(Counter(skip.reason for skip in skips))
    example = next(skip for skip in skips if skip.reason == reason)
    detail = f", such as {example.key}: {example.detail}" if example.detail else ""
    return (
        f"none of {len(skips)} frames can be used ({n}: {reason}{detail}); "
        f"all are listed in {output.url}/{SKIPPED_NAME}"
    )


def _summary(
    output: Output, index: Index, packed: int, started: float, *, things: Things | None = None
) -> PackSummary:
    """What was done; without ``things`` nothing, for the set was complete."""
    try:
        lines = (output.read(SKIPPED_NAME) or b"").splitlines()
        damaged = sum(bool(parse_json(line)["detail"]) for line in lines)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{output.url}/{SKIPPED_NAME} is damaged; delete it (it only lists what was left out), "
            "or copy it again"
        ) from error
    return PackSummary(
        out=output.url,
        dataset=index.dataset,
        frames=len(index),
        scenes=len(index.scenes.names),
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        skipped=index.skipped,
        damaged=damaged,
        packed=packed,
        seconds=time.monotonic() - started,
        already_complete=things is None,
        depth_m=_depths(output.url, index) if index.kind == "depth" and len(index) else None,
        things=things or Things(),
    )


def _depths(url: str, index: Index) -> tuple[float, float, float]:
    """2 %, median and 98 % of the known depths of evenly spaced frames of a set, in metres."""
    with ShardSet(url, *resolve(url), index) as shards:
        places = np.unique(np.linspace(0, len(shards) - 1, LOOKED_AT).round().astype(int))
        frames = [shards.frame(place) for place in places]
    some = [frame.depth_m[::4, ::4] for frame in frames]
    known = np.concatenate([depth[np.isfinite(depth)] for depth in some])
    if len(known) == 0:
        return math.nan, math.nan, math.nan
    near, middle, far = np.percentile(known, (2, 50, 98)).tolist()
    return near, middle, far


# Parts.


def _open_parts(directories: list[Path]) -> list[ShardSet]:
    """The parts of one request, all of them, in order."""
    found = []
    for directory in directories:
        inside = sorted(directory.glob("part-*-of-*"))
        found += inside if inside else [directory]
    parts = [ShardSet.open(path) for path in found]
    if not parts:
        raise UserError("name the directories of the parts to merge")
    numbers = [_part_of(part) for part in parts]
    for part in parts:
        wanted = {**parts[0].index.request, "part": part.index.request["part"]}
        refuse_other_request(part.url, part.index.request, wanted, finished=True)
    n = numbers[0][1]
    if any(number[1] != n for number in numbers) or len(set(numbers)) != len(numbers):
        raise UserError(
            f"the parts {', '.join(f'{i}/{m}' for i, m in sorted(numbers))} do not belong to one "
            "partition; name each part of one partition once"
        )
    if missing := sorted(set(range(1, n + 1)) - {i for i, _ in numbers}):
        raise UserError(f"part {missing[0]}/{n} is missing; pack it with --part {missing[0]}/{n}")
    order = sorted(range(len(parts)), key=lambda k: numbers[k])
    return [parts[k] for k in order]


def _part_of(part: ShardSet) -> tuple[int, int]:
    match part.index.request.get("part"):
        case [int(i), int(n)]:
            return i, n
    raise UserError(f"{part.url} is not a part: it was not made by flatdepth pack --part i/n")


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


# Checking.


def _index_damage(index: Index) -> list[tuple[str, str, str]]:
    """What is wrong with the rows of an index, which opening it did not look at."""
    damaged = [b for b, one in enumerate(index.blocks) if index.block_checksum(b) != one]
    if damaged:
        rows = ", ".join(f"{block * BLOCK} and on" for block in damaged[:3])
        return [(COLUMNS_NAME, "", f"the checksum of rows {rows} differs")]
    try:
        check_rows(index)
    except ValueError as error:
        return [(COLUMNS_NAME, "", str(error))]
    return []


def _verify_shard(shards: ShardSet, number: int, progress: _Progress) -> list[tuple[str, str, str]]:
    shard = shards.index.shards[number]
    rows = shards.index.rows_of(number)
    expected = {
        f"{shards.keys[i]}.{ext}": (int(table[i, 0]), int(table[i, 1]))
        for i in rows
        for ext, table in shards.index.members.items()
        if table[i, 0] >= 0
    }
    broken = ""
    try:
        with shards.open_shard(number) as file:
            size, sha256 = _digest(file)
            file.seek(0)
            if _tar_listing(file) != expected:
                broken = "tar headers differ from the index"
    except tarfile.TarError as error:
        broken = f"not a whole tar ({error})"
    except OSError as error:
        return [(shard.name, "", f"cannot be read ({error})")]
    damage = []
    for i in rows:
        end = shards.index.span(i)[1]
        beyond = end > size  # not read: a damaged index may announce any length
        what = f"ends at byte {end} of {size}" if beyond else _sample_damage(shards, i)
        if what:
            damage.append((shard.name, shards.keys[i], what))
        progress.step(0)
    if size != shard.bytes:
        broken = f"{size} bytes instead of {shard.bytes}"
    elif not broken and not damage and sha256 != shard.sha256:
        broken = "SHA-256 differs outside the samples' bytes"
    return ([(shard.name, "", broken)] if broken else []) + damage


def _digest(file: io.IOBase) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    size, sha256 = 0, hashlib.sha256()
    while block := file.read(1 << 22):
        size += len(block)
        sha256.update(block)
    return size, sha256.hexdigest()


def _tar_listing(file: io.IOBase) -> dict[str, tuple[int, int]]:
    """Member name -> offset and length, from the headers."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def _sample_damage(shards: ShardSet, i: int) -> str:
    """What is wrong with a sample's bytes, "" if nothing."""
    try:
        image = shards.image(i) if shards.kind == "art" else shards.frame(i).image
        if image.shape[:2] != tuple(shards.sizes[i].tolist()):
            return "image size differs from the index"
    except UserError as error:
        return str(error)
    return ""


# Finding and exporting.


def _find_sets(url: str) -> list[str]:
    """Directories at and below ``url`` that hold an index; nothing below one is looked at."""
    fs, root = resolve(url)
    if isinstance(fs, LocalFileSystem):
        return [str(path) for path in _find_local_sets(Path(url))]
    found = sorted(path for path in fs.find(root) if path.endswith(f"/{INDEX_NAME}"))
    return [fs.unstrip_protocol(path.removesuffix(f"/{INDEX_NAME}")) for path in found]


def _find_local_sets(directory: Path) -> list[Path]:
    if (directory / INDEX_NAME).is_file():
        return [directory]
    if not directory.is_dir():
        return []
    below = sorted(path for path in directory.iterdir() if path.is_dir() and path.name != WORK_DIR)
    return [found for path in below for found in _find_local_sets(path)]


def _export_sample(raw: RawFrame, root: Path, codes_per_metre: float) -> int:
    """Write a sample's files; the number of pixels with known depth beyond the codes."""
    _write_file(root / "image" / f"{raw.key}.{raw.image_ext}", raw.image)
    if raw.depth is None or raw.K_px is None:
        return 0
    depth_m = decode_frame(raw).depth_m
    unknown = np.isnan(depth_m)
    scaled = np.rint(np.where(unknown, 0, depth_m).astype(np.float64) * codes_per_metre)
    codes = np.clip(scaled, 1, 65535).astype(np.uint16)
    codes[unknown] = 0
    _write_file(root / "depth" / f"{raw.key}.png", _png16(codes))
    if raw.region is not None:
        _write_file(root / "region" / f"{raw.key}.png", encode_map(raw.region))
    _write_file(root / "camera" / f"{raw.key}.json", _camera_json(raw, codes_per_metre))
    return int(((scaled >= 65535) & np.isfinite(scaled)).sum())


def _png16(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(codes).save(buffer, "PNG")
    return buffer.getvalue()


def _camera_json(raw: RawFrame, codes_per_metre: float) -> bytes:
    assert raw.K_px is not None
    about = {
        "K_px": raw.K_px.tolist(),
        "pixel_centres": "integer + 0.5",
        "width": raw.width,
        "height": raw.height,
        "depth": "planar z",
        "codes_per_metre": codes_per_metre,
        "scene": raw.scene,
        "split": raw.split,
    }
    return json.dumps(about, indent=2).encode() + b"\n"


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Words.


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _most_frequent(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda row: (-row[1], row[0]))


def _text_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
