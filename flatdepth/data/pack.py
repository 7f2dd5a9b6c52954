"""Packing: raw layouts to shard sets.

``pack`` reads frames in a process pool, checks them and writes them in listing order, so that
the bytes do not depend on the number of workers or on interruptions.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from multiprocessing import parent_process
from typing import Any

import numpy as np

from flatdepth.cli import cpus, free_memory
from flatdepth.data.progress import Progress, Report
from flatdepth.data.readers.base import MOST_OUTSIDE, Item, Listing, Reader, out_of_range
from flatdepth.data.shards import INDEX_NAME, JSON_EXT, SKIPPED_NAME
from flatdepth.data.shards.codec import (
    decode_frame,
    decode_image,
)
from flatdepth.data.shards.index import Index, canonical_json
from flatdepth.data.shards.read import ShardSet, resolve
from flatdepth.data.shards.write import (
    Output,
    Sample,
    SetWriter,
    Skip,
    encode_sample,
    refuse_other_request,
    skip_lines,
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
MOST_PARTS = 9999

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
            ("shards", f"{self.shards}, {megabytes(self.bytes)}"),
            ("bytes per frame", f"{self.bytes / self.frames:.0f}" if self.frames else "-"),
            ("left out", str(sum(self.skipped.values()))),
        ]
        if self.depth_m is not None:
            near, middle, far = (f"{depth:.3g}" for depth in self.depth_m)
            rows.insert(2, ("depth", f"{near} .. {middle} .. {far} m (2 %, median, 98 %)"))
        rows += [(f"  {reason}", str(n)) for reason, n in most_frequent(self.skipped)]
        if self.skipped:
            rows.append(("listed in", f"{self.out.rstrip('/')}/{SKIPPED_NAME}"))
        if self.already_complete:
            rows.append(("state", "was complete, nothing done (raw data added since is not in it)"))
        else:
            if self.things.planes or self.things.without:
                rows.append(("flat things", str(self.things)))
            rate = self.packed / max(self.seconds, 1e-9)
            rows.append(("this run", f"{self.packed} frames, {rate:.1f}/s"))
        return text_table(rows)


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

    def merge(self, other: "Things") -> None:
        """Count those of another part as well."""
        self.planes += other.planes
        self.residuals += other.residuals
        self.without += other.without
        self.unknown.update(other.unknown)

    def warning(self) -> str:
        """One line about labels that are not understood, "" if all are."""
        if not self.unknown:
            return ""
        listed = ", ".join(f"{label} ({n})" for label, n in most_frequent(self.unknown))
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
        out: directory or fsspec URL of the set; must not be shared by runs at the same time, which
            is noticed in local directories only.
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
    check_workers(workers)
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part must be i/n with 1 <= i <= n, not {part[0]}/{part[1]}")
    expect_within("--part", part[1], 1, MOST_PARTS)
    job = Job(reader, shard_mb=shard_mb, min_valid=min_valid, level=level)
    out = os.fspath(out)
    target = out if part[1] == 1 else f"{out.rstrip('/')}/{part_name(*part)}"
    output = Output(target)
    if (index := finished_before(output, job.request(part))) is not None:
        return summary(output, index, 0, started)
    listing = list_frames(reader)
    one = job.part(listing, part, target, fingerprint(listing))
    with (
        worker_pool(job, workers, len(one.items)) as results,
        Progress(reader.dataset, len(one.items)) as progress,
    ):
        packed, things = pack_part(one, results, progress, may_be_empty=part[1] > 1)
    index = ShardSet.open(target, check_sizes=False).index
    if warning := things.warning():
        print(warning, file=sys.stderr)
    return summary(output, index, packed, started, things=things)


def part_name(i: int, n: int) -> str:
    """Directory of part ``i`` of ``n`` below the output directory."""
    return f"part-{i:04d}-of-{n:04d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A range of a listing on its way into a set: all that any process needs to pack it.

    Attributes:
        url: directory of the set.
        job: how frames are read and encoded.
        request: what the set records.
        items: the frames.
        excluded: (key, reason) of frames that go before them into the list of what is left out.
    """

    url: str
    job: "Job"
    request: Mapping[str, object]
    items: Sequence[Item]
    excluded: Sequence[tuple[str, str]]


def pack_part(
    part: Part,
    results: "Results",
    progress: Report,
    *,
    may_be_empty: bool,
    patience_s: float = 0.0,
) -> tuple[int, Things]:
    """Pack a part, from its start or where an earlier run was cut off.

    Args:
        part: what to pack; done already if its set is finished.
        results: gives the samples of items, in order.
        progress: is told of every frame.
        may_be_empty: whether it is no mistake if none of the frames can be used.
        patience_s: how long to wait for another process that is packing the same part.

    Returns:
        The number of frames packed by this call, and what it found in them.

    Raises:
        UserError: as in ``pack``, or another process keeps packing the part.
    """
    output, things = Output(part.url), Things()
    with output.lock(patience_s), _explained(part.url):
        if output.size(INDEX_NAME) is not None:
            output.remove_work()
            progress.earlier(len(part.items))
            return 0, things
        writer = SetWriter(
            output,
            dataset=part.job.reader.dataset,
            kind=part.job.reader.kind,
            request=part.request,
            shard_bytes=int(part.job.shard_mb * 1e6),
        )
        if writer.next_item == 0:
            for key, reason in part.excluded:
                writer.skip(Skip(key=key, reason=reason))
        before = writer.frames
        if before:
            progress.say(f"{part.url}: going on after {before} packed frames")
        progress.earlier(writer.next_item, writer.skipped)
        try:
            rest = part.items[writer.next_item :]
            for number, result in enumerate(results(rest), start=writer.next_item):
                if isinstance(result, Skip):
                    writer.skip(result)
                    progress.say(f"left out {result.key}: {result.reason} ({result.detail})")
                else:
                    writer.add(number, result)
                    for trouble in things.add(result):
                        progress.say(f"no truth at a flat thing of {result.key}: {trouble}")
                progress.step(left_out=isinstance(result, Skip))
            if writer.frames == 0 and not may_be_empty:
                raise UserError(nothing_usable(output, writer.skips))
            writer.finish(len(part.items))
        finally:
            writer.abandon()
    return writer.frames - before, things


@contextmanager
def _explained(target: str) -> Iterator[None]:
    """Within, a full disk and a lost worker are sentences."""
    try:
        yield
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
class Job:
    """How a reader's frames become samples, and sets of them.

    Raises:
        UserError: a number is out of its range.
    """

    reader: Reader
    shard_mb: float = 256
    min_valid: float = 0.01
    level: int = 12

    def __post_init__(self) -> None:
        expect_within("--shard_mb", self.shard_mb, 1e-6, 1e6)
        expect_within("--min_valid", self.min_valid, 0, 1)
        expect_within("--level", self.level, 1, 22)

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

    def request(self, part: tuple[int, int]) -> dict[str, object]:
        """What part i of n records, the listing apart."""
        return {
            "reader": type(self.reader).__name__,
            "options": _options(self.reader),
            "shard_mb": self.shard_mb,
            "min_valid": self.min_valid,
            "level": self.level,
            "part": list(part),
        }

    def part(
        self, listing: Listing, part: tuple[int, int], url: str, digest: Mapping[str, object]
    ) -> Part:
        """Part i of n of a listing with that ``fingerprint``, to be packed into ``url``."""
        i, n = part
        count = len(listing.items)
        return Part(
            url=url,
            job=self,
            request={**self.request(part), "listing": digest},
            items=listing.items[(i - 1) * count // n : i * count // n],
            excluded=listing.excluded if i == 1 else (),
        )


Results = Callable[[Sequence[Item]], Iterator[Sample | Skip]]
"""Gives the results of items, in order."""

_worker_job: Job | None = None


def _start_worker(job: Job) -> None:
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
def worker_pool(job: Job, workers: int | None, frames: int) -> Iterator[Results]:
    """Within, what gives the results of items from a pool of processes.

    Args:
        job: what they do.
        workers: how many; None: one per CPU; 1: this process.
        frames: how many items there are to come; there are no more workers than that.
    """
    workers = min(workers or cpus(), max(frames, 1))
    if workers == 1:
        yield lambda items: map(job, items)
        return
    # spawn: fork would copy threads and locks of libraries in unknown states.
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    try:
        yield lambda items: _in_order(pool, iter(items), _AHEAD * workers)
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


# The request, and which items it means.


def check_workers(workers: int | None) -> None:
    """Raise UserError for a number of processes or threads that this machine cannot have."""
    room = max(cpus(), free_memory() // WORKER_BYTES)
    expect_within("--workers", 1 if workers is None else workers, 1, min(room, 1024))


def finished_before(output: Output, request: Mapping[str, object]) -> Index | None:
    """The index of the set if it was finished before, else None.

    Raises:
        UserError: it is a set of another request.
    """
    if output.size(INDEX_NAME) is None:
        return None
    index = ShardSet.open(output.url, check_sizes=False).index
    refuse_other_request(output.url, index.request, request, finished=True)
    output.remove_work()
    return index


def list_frames(reader: Reader) -> Listing:
    """The frames of a raw layout; what is odd about their scenes goes to standard error."""
    listing = reader.list()
    keys = [item.key for item in listing.items]
    if any(a >= b for a, b in pairwise(keys)):
        raise ValueError("a reader must list its items sorted by key, without duplicates")
    if reader.kind == "depth" and listing.items:
        _say_scenes(reader, listing.items)
    return listing


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


def fingerprint(listing: Listing) -> dict[str, object]:
    """What tells one listing from another."""
    rows = [[item.key, item.scene, item.split] for item in listing.items]
    digest = hashlib.sha256(canonical_json([rows, [list(row) for row in listing.excluded]]))
    return {"items": len(rows), "sha256": digest.hexdigest()}


def nothing_usable(output: Output, skips: list[Skip]) -> str:
    """List what was left out, which is everything, and say so."""
    output.write(SKIPPED_NAME, skip_lines(skips))
    output.remove_work()  # there is nothing to resume, and other options shall not be refused
    if not skips:
        return "the raw layout holds no frame"
    (reason, n), *_ = most_frequent(Counter(skip.reason for skip in skips))
    example = next(skip for skip in skips if skip.reason == reason)
    detail = f", such as {example.key}: {example.detail}" if example.detail else ""
    return (
        f"none of {len(skips)} frames can be used ({n}: {reason}{detail}); "
        f"all are listed in {output.url}/{SKIPPED_NAME}"
    )


def read_skips(output: Output) -> list[Skip]:
    """What ``skipped.jsonl`` lists; nothing if there is none."""
    try:
        lines = (output.read(SKIPPED_NAME) or b"").splitlines()
        return [Skip(**parse_json(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{output.url}/{SKIPPED_NAME} is damaged; delete it (it only lists what was left out), "
            "or copy it again"
        ) from error


def summary(
    output: Output, index: Index, packed: int, started: float, *, things: Things | None = None
) -> PackSummary:
    """What was done; without ``things`` nothing, for the set was complete."""
    return PackSummary(
        out=output.url,
        dataset=index.dataset,
        frames=len(index),
        scenes=len(index.scenes.names),
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        skipped=index.skipped,
        damaged=sum(bool(skip.detail) for skip in read_skips(output)),
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


# Words.


def megabytes(size: int) -> str:
    """A size in words."""
    return f"{size / 1e6:.1f} MB"


def most_frequent(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Names and counts, the largest count first."""
    return sorted(counts.items(), key=lambda row: (-row[1], row[0]))


def text_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
