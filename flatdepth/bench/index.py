"""What it takes to open a shard set of many samples, with columns and with rows in JSON.

Each contender opens a made-up set in a process of its own: the index first, then the corpus of a
training. Its shards are files of holes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatdepth.config import DataConfig, SetConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME, shard_name
from flatdepth.data.shards.index import Categories, Index, Shard, Strings, sign
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.write import Output, write_index
from flatdepth.resources import ROOT

PER_SHARD = 2000
PER_SCENE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What opening took.

    Attributes:
        rows: "columns" or "JSON".
        samples: of the set.
        bytes: of the index.
        index_s, corpus_s: seconds for the index, and for the corpus with its split.
        index_mb, corpus_mb: by how many MB the process grew; pages of a mapped file, which the
            system takes back when it needs them, are not counted.
        capped: whether the index was opened with an address space no larger than that of the
            process before, the index mapped twice (as safetensors does for a moment) and 200 MB.
    """

    rows: str
    samples: int
    bytes: int
    index_s: float
    corpus_s: float
    index_mb: float
    corpus_mb: float
    capped: bool


def measure_openings(samples: int) -> list[Opening]:
    """Open a set with columns, and one with rows in JSON, of at most a million samples each; then
    that of all samples with columns.
    """
    small = min(samples, 10**6)
    cases = [("JSON", small), ("columns", small), *([("columns", samples)] * (samples > small))]
    found = []
    for rows, n in tqdm(cases, desc="sets", disable=None, leave=False):
        with made_up_set(n, rows) as folder:
            code = f"from flatdepth.bench.index import open_here; open_here({str(folder)!r})"
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
        figures = json.loads(done.stdout.splitlines()[-1])
        found.append(Opening(rows=rows, samples=n, **figures))
    return found


def made_up_index(samples: int) -> Index:
    """An index of frames with camera, depth and image, of 100 frames per scene."""
    numbers = range(samples)
    lengths = np.full((samples, 3), (40_000, 700, 60_000), np.int64)
    ends = np.cumsum(lengths + 512, axis=1) + (np.arange(samples) % PER_SHARD)[:, None] * 102_400
    shards = [
        Shard(
            name=shard_name("many", number),
            bytes=PER_SHARD * 102_400,
            sha256=f"{number:064x}",
            samples=min(PER_SHARD, samples - number * PER_SHARD),
        )
        for number in range(-(-samples // PER_SHARD))
    ]
    return Index(
        dataset="many",
        kind="depth",
        request={},
        skipped={},
        shards=tuple(shards),
        keys=Strings.of(f"scene_{i // PER_SCENE:06d}/cam_00/frame_{i:08d}" for i in numbers),
        scenes=Categories.of(f"scene_{i // PER_SCENE:06d}" for i in numbers),
        splits=Categories(np.zeros(samples, np.int32), ("",)),
        sizes=np.full((samples, 2), (768, 1024), np.int32),
        crc32=np.random.default_rng(0).integers(0, 2**32, samples, dtype=np.uint32),
        members={
            ext: np.stack([ends[:, k] - lengths[:, k], lengths[:, k]], axis=1)
            for k, ext in enumerate(("depth.fdz", "json", "jpg"))
        },
    )


def as_lists(index: Index, version: int) -> dict[str, object]:
    """The document of version 1 or 2, whose rows were lists in ``index.json``."""
    document = json.loads(index.to_bytes()[0])
    for name in ("checksum", "columns", "blocks", "members"):
        del document[name]
    return document | {
        "version": version,
        "samples": {
            "key": list(index.keys),
            "scene": list(index.scenes),
            "split": list(index.splits),
            "height": index.sizes[:, 0].tolist(),
            "width": index.sizes[:, 1].tolist(),
            "shard": index.shard_of(np.arange(len(index))).tolist(),
            "crc32": index.crc32.tolist(),
            "members": {
                ext: {"offset": table[:, 0].tolist(), "length": table[:, 1].tolist()}
                for ext, table in index.members.items()
            },
        },
    }


@contextmanager
def made_up_set(samples: int, rows: str) -> Iterator[Path]:
    """A directory that looks like a set of so many samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = made_up_index(samples)
        if rows == "JSON":
            (folder / INDEX_NAME).write_bytes(sign(as_lists(index, 2)))
        else:
            write_index(Output(name), index)
        for shard in index.shards:
            with (folder / shard.name).open("wb") as file:
                file.truncate(shard.bytes)
        yield folder


def open_here(folder: str) -> None:
    """Open a set in this process and print the figures as JSON."""
    import resource

    files = (Path(folder, name) for name in (INDEX_NAME, COLUMNS_NAME))
    size = sum(file.stat().st_size for file in files if file.is_file())
    space = _status_mb("VmSize") * 1e6 + 2 * size + 200e6
    is_columns = Path(folder, COLUMNS_NAME).is_file()
    if is_columns:
        resource.setrlimit(resource.RLIMIT_AS, (int(space), resource.RLIM_INFINITY))
    start, grown = time.perf_counter(), _status_mb("RssAnon")
    shards = ShardSet.open(folder)
    index_s, index_mb = time.perf_counter() - start, _status_mb("RssAnon") - grown
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    del shards
    start, grown = time.perf_counter(), _status_mb("RssAnon")
    corpus = open_corpus(DataConfig(train=[SetConfig(path=folder)]))
    figures = {
        "bytes": size,
        "index_s": index_s,
        "corpus_s": time.perf_counter() - start,
        "index_mb": index_mb,
        "corpus_mb": _status_mb("RssAnon") - grown,
        "capped": is_columns,
    }
    del corpus
    print(json.dumps(figures))


def _status_mb(name: str) -> float:
    """A figure of this process in MB, as Linux gives it."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def openings_text(found: list[Opening]) -> str:
    """A table."""
    head = f"{'rows in':8} {'samples':>10} {'index MB':>9} {'open s':>7} {'MB':>7}"
    lines = [f"{head} {'corpus s':>9} {'MB':>7}"]
    for one in found:
        lines.append(
            f"{one.rows:8} {one.samples:10,} {one.bytes / 1e6:9.1f} {one.index_s:7.2f} "
            f"{one.index_mb:7.1f} {one.corpus_s:9.2f} {one.corpus_mb:7.1f}"
        )
    return "\n".join(lines)
