"""Packing in parts: many at a time here or on an engine, and joining them.

A part is a range of the listing, packed as a set of its own. The parts of ``pack_parts`` lie in
``.pack/`` of the set that they become, so they go away with it; those of ``pack --part i/n`` are
the user's and stay.
"""

import fnmatch
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from flatdepth.data.pack import (
    MOST_PARTS,
    Job,
    PackSummary,
    Part,
    Things,
    check_workers,
    fingerprint,
    finished_before,
    list_frames,
    nothing_usable,
    pack_part,
    part_name,
    read_skips,
    summary,
    worker_pool,
)
from flatdepth.data.progress import Progress
from flatdepth.data.readers.base import Reader
from flatdepth.data.shards import INDEX_NAME, SKIPPED_NAME, WORK_DIR
from flatdepth.data.shards.index import Index, concatenate
from flatdepth.data.shards.read import ShardSet, resolve
from flatdepth.data.shards.write import (
    Output,
    begin,
    begun_request,
    refuse_other_request,
    write_index,
)
from flatdepth.errors import UserError, expect_within

ENGINES = ("local", "ray")

FRAMES_PER_PART = 2048
"""Of a part whose size is not asked for: minutes of work, lost at most when a machine is."""

_COPIED_AT_ONCE = 64


def pack_parts(
    reader: Reader,
    out: str | os.PathLike[str],
    *,
    parts: int | None = None,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    shard_mb: float = 256,
    min_valid: float = 0.01,
    level: int = 12,
) -> PackSummary:
    """Pack a raw layout in parts, each as ``pack`` would with ``part=(i, parts)``, and join them.

    Called again it packs what is unfinished: a part that was interrupted goes on after its last
    finished shard. The bytes are those of the parts packed one by one and merged.

    Args:
        reader, out, shard_mb, min_valid, level: as for ``pack``.
        parts: how many; None: as many as an unfinished run in ``out`` has, else one per
            ``FRAMES_PER_PART`` frames.
        engine: "local": one part after the other, by a pool of processes; "ray": each a task of
            Ray.
        address: of a Ray cluster; None: Ray is started on this machine.
        workers: processes here, or parts at the same time on Ray; None: as many as there are CPUs.

    Raises:
        UserError: as in ``pack``; Ray is not installed, or does not answer.
    """
    started = time.monotonic()
    if engine not in ENGINES:
        raise UserError(f"--engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if address is not None and engine != "ray":
        raise UserError("--address is that of a Ray cluster; add --engine ray")
    if parts is not None:
        expect_within("--parts", parts, 1, MOST_PARTS)
    if engine == "local" or address is None:
        check_workers(workers)
    else:
        expect_within("--workers", 1 if workers is None else workers, 1, 10**5)
    job = Job(reader, shard_mb=shard_mb, min_valid=min_valid, level=level)
    request = job.request((1, 1))
    output = Output(os.fspath(out))
    if (index := finished_before(output, request)) is not None:
        return summary(output, index, 0, started)
    if engine == "ray":
        from flatdepth.data.engine import find_ray

        find_ray(address)
    listing = list_frames(reader)
    digest = fingerprint(listing)
    with output.lock(0.0):
        n = parts or _begun_parts(output) or -(-len(listing.items) // FRAMES_PER_PART)
        n = min(max(n, 1), MOST_PARTS)
        begin(output, {**request, "part": ["all", n], "listing": digest})
        places = [f"{output.url.rstrip('/')}/{WORK_DIR}/{part_name(i + 1, n)}" for i in range(n)]
        todo = [job.part(listing, (i + 1, n), place, digest) for i, place in enumerate(places)]
        packed, things = 0, Things()
        with Progress(reader.dataset, len(listing.items)) as progress:
            for more, found in _run(todo, job, engine, address, workers, progress):
                packed += more
                things.merge(found)
        index = _join(_open_parts(places), output)
    if warning := things.warning():
        print(warning, file=sys.stderr)
    return summary(output, index, packed, started, things=things)


def merge(
    directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> PackSummary:
    """Join the parts of one ``pack --part i/n`` into one set, in listing order.

    Shards are hard-linked where the file system can and copied otherwise, by an object store
    itself if all are in the same one; the parts stay.

    Args:
        directories: directories or URLs of the parts, or of what holds them.
        out: directory or URL of the joined set; may be the one that holds the parts.

    Raises:
        UserError: a part is missing, unfinished or of another request, or ``out`` holds a set.
    """
    started = time.monotonic()
    parts = _open_parts(_find_parts([os.fspath(directory) for directory in directories]))
    output = Output(os.fspath(out))
    if output.size(INDEX_NAME) is not None:
        index = _joined(parts)
        if ShardSet.open(out, check_sizes=False).index.to_bytes()[0] != index.to_bytes()[0]:
            raise UserError(f"{out} holds another finished set; choose another --out")
        return summary(output, index, 0, started)
    with output.lock(0.0):
        if (begun := begun_request(output)) is not None:
            wanted = {**_joined(parts).request, "part": begun.get("part")}
            refuse_other_request(output.url, begun, wanted, finished=False)
        index = _join(parts, output)
    return summary(output, index, len(index), started, things=Things())


def _run(
    parts: Sequence[Part],
    job: Job,
    engine: str,
    address: str | None,
    workers: int | None,
    progress: Progress,
) -> Iterator[tuple[int, Things]]:
    """Pack what is unfinished of some parts; what each call of ``pack_part`` gave."""
    todo = []
    for part in parts:
        if Output(part.url).size(INDEX_NAME) is None:
            todo.append(part)
        else:
            progress.earlier(len(part.items))
    if engine == "ray":
        from flatdepth.data.engine import run_on_ray

        yield from run_on_ray(todo, address=address, workers=workers, progress=progress)
        return
    with worker_pool(job, workers, sum(len(part.items) for part in todo)) as results:
        for part in todo:
            yield pack_part(part, results, progress, may_be_empty=True)


def _begun_parts(output: Output) -> int:
    """The number of parts of an unfinished run, 0 if there is none."""
    match (begun_request(output) or {}).get("part"):
        case ["all", int(n)]:
            return n
    return 0


# Joining.


def _find_parts(urls: Sequence[str]) -> list[str]:
    """The given parts, and those in the given directories."""
    found = []
    for url in urls:
        fs, root = resolve(url)
        fs.invalidate_cache()  # other processes have packed them
        try:
            names = [path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            names = []
        inside = sorted(fnmatch.filter(names, "part-*-of-*"))
        found += [f"{url.rstrip('/')}/{name}" for name in inside] or [url]
    return found


def _open_parts(urls: Sequence[str]) -> list[ShardSet]:
    """The parts of one request, all of them, in order."""
    parts = [ShardSet.open(url, use_cache=False) for url in urls]
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


def _joined(parts: Sequence[ShardSet]) -> Index:
    request: Mapping[str, object] = {**parts[0].index.request, "part": [1, 1]}
    return concatenate([part.index for part in parts], request)


def _join(parts: Sequence[ShardSet], output: Output) -> Index:
    """Publish the set that some parts make; what lies in its ``.pack/`` goes away after that.

    Raises:
        UserError: it would be empty.
    """
    index = _joined(parts)
    lists = [Output(part.url) for part in parts]
    if len(index) == 0:
        skips = [skip for one in lists for skip in read_skips(one)]
        raise UserError(nothing_usable(output, skips))
    fs, _ = resolve(parts[0].url)
    sources = [f"{part.root}/{shard.name}" for part in parts for shard in part.index.shards]
    names = [shard.name for shard in index.shards]
    with Progress(f"{index.dataset}, joining", len(names), unit="shard") as progress:
        for start in range(0, len(names), _COPIED_AT_ONCE):
            some = slice(start, start + _COPIED_AT_ONCE)
            output.adopt(fs, dict(zip(names[some], sources[some], strict=True)))
            progress.move(len(names[some]), 0, 0)
    output.write(SKIPPED_NAME, b"".join(one.read(SKIPPED_NAME) or b"" for one in lists))
    write_index(output, index)
    output.remove_work()
    return index
