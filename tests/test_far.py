"""Sets behind slow, stalled and missing servers: bytes, order, limits and notes."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

from flatdepth.bench.far import LINES, Line, register
from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, expect_room_ahead, training_samples
from flatdepth.data.shards import cache, remote
from flatdepth.data.shards.ahead import ReadAhead
from flatdepth.data.shards.cache import PAGE, SAMPLES, SampleCache
from flatdepth.data.shards.index import Categories, Strings
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.remote import Ranges, Reading, Server
from flatdepth.data.shards.write import Output, write_index
from flatdepth.errors import UserError
from flatdepth.training.launch import make_accelerator
from tests.conftest import REPOSITORY, TinySets


@pytest.fixture(autouse=True)
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``far://`` without hosts, and pauses of milliseconds between attempts."""
    register()
    LINES.clear()
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote, "LONGEST_PAUSE_SECONDS", 0.02)
    yield
    LINES.clear()


def host(name: str, tiny_sets: TinySets, **line: Any) -> Line:
    LINES[name] = Line(directory=tiny_sets.rooms.parent, **line)
    return LINES[name]


def hanging(*numbers: int) -> Callable[[int], bool]:
    return lambda number: number in numbers


@pytest.fixture
def local(tiny_sets: TinySets) -> Iterator[ShardSet]:
    with ShardSet.open(tiny_sets.rooms) as shards:
        yield shards


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


# Slow and stalled servers.


def test_a_hanging_request_is_asked_again_and_the_first_answer_counts(
    tiny_sets: TinySets,
    local: ShardSet,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No answer ever comes to three of 100 requests."""
    monkeypatch.setattr(remote, "HEDGE_FLOOR_SECONDS", 0.5)
    line = host("slow", tiny_sets, hangs=hanging(40, 60, 80))
    shards = ShardSet.open("far://slow/rooms", reading=Reading(timeout_s=60))
    for turn in range(100):
        assert shards.read_bytes(turn % 15) == local.read_bytes(turn % 15)
    assert shards.ranges is not None
    server = shards.ranges.server
    assert server.requests == 100 and len(line.asked) == 100 + server.hedges
    assert 3 <= server.hedges <= 1 + 0.05 * 100
    assert notes(capsys) == []


def test_second_requests_keep_to_their_budget() -> None:
    for share, most in ((0.05, 51), (0.0, 0)):
        server = Server("far://x")
        sent = 0
        for _ in range(1000):
            server.asked(share)
            sent += server.may_hedge(share)
        assert sent == server.hedges == most
    server = Server("far://x")
    for _ in range(10_000):
        server.asked(0.05)
    assert sum(server.may_hedge(0.05) for _ in range(100)) == 10, "what was saved is bounded"


def test_a_second_request_comes_after_the_95th_percentile_of_its_like() -> None:
    server = Server("far://x")
    assert server.hedge_after_s(1000) == remote.UNKNOWN_SECONDS
    for n in range(200):
        server.answered(1 + n / 100, 1000)
        server.answered(0.001, 100_000)
    assert server.hedge_after_s(900) == pytest.approx(1 + 1.9)
    assert server.hedge_after_s(99_000) == remote.HEDGE_FLOOR_SECONDS


def test_a_stall_costs_one_note_however_many_reads_wait(
    tiny_sets: TinySets, local: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    line = host("away", tiny_sets)
    shards = ShardSet.open("far://away/rooms", reading=Reading(timeout_s=0.02, hedged=0.0))
    assert shards.read_bytes(0) == local.read_bytes(0)
    capsys.readouterr()
    away = range(len(line.asked), len(line.asked) + 60)
    line.hangs = away.__contains__
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shards.read_bytes, range(15)))
    assert found == [local.read_bytes(i) for i in range(15)]
    assert len(line.asked) >= 1 + 60 + 15
    (said,) = notes(capsys)
    assert said.startswith("note: far://away: a read failed (TimeoutError: no answer in ")
    assert said.endswith("; trying again, for 30 min at most")


def test_notes_grow_rare_and_the_return_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An outage of 20 minutes with a failure a second, on a made-up clock."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    server = Server("far://x")
    server.answered(0.1, 1000)
    for _ in range(1200):
        server.failed(OSError("gone"), 1800.0)
        now += 1
    server.answered(0.1, 1000)
    said = notes(capsys)
    assert (
        said[0] == "note: far://x: a read failed (OSError: gone); trying again, for 30 min at most"
    )
    assert said[1].startswith("note: far://x: 60 reads failed (OSError: gone); away for 1 min")
    assert said[-1] == "note: far://x answers again after 20 min"
    assert len(said) == 1 + 4 + 1, said


def test_what_stays_away_is_one_sentence(tiny_sets: TinySets) -> None:
    line = host("gone", tiny_sets)
    reading = Reading(timeout_s=0.01, outage_s=0.3, hedged=0.0)
    shards = ShardSet.open("far://gone/rooms", reading=reading)
    shards.read_bytes(0)
    line.hangs = lambda _: True
    with pytest.raises(UserError, match=r"^cannot read shard .*TimeoutError.* \(\d+ attempts\)$"):
        shards.read_bytes(1)


def test_no_waiting_cures_a_refusal(tiny_sets: TinySets) -> None:
    line = host("closed", tiny_sets)
    shards = ShardSet.open("far://closed/rooms")
    shards.read_bytes(0)
    refusal = OSError("401")
    refusal.status = 401  # type: ignore[attr-defined]

    def refuse(_: int) -> bool:
        raise refusal

    line.hangs = refuse
    with pytest.raises(UserError, match=r"401 \(5 attempts\)"):
        shards.read_bytes(1)


class Blocking(AbstractFileSystem):
    """Knows no other way than to block."""

    protocol = "blocking"
    cachable = False

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self.gate = gate
        self.calls = 0

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        self.calls += 1
        self.gate.wait()
        return path.encode() * (end - start)


def test_threads_do_not_pile_up_behind_a_server_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "_MOST_THREADS", 4)
    gate = threading.Event()
    fs = Blocking(gate)
    ranges = Ranges(fs, "x", Reading(timeout_s=0.01, outage_s=0.0))

    def read(start: int) -> bytes:
        try:
            return ranges.read("x", start, start + 3)
        except OSError as error:
            return str(error).encode()

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(read, range(12)))
    assert all(b"attempts" in text for text in said)
    assert fs.calls == 4 == sum(thread.name == "range" for thread in threading.enumerate())
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "range":
            thread.join()
    assert Ranges(fs, "x", Reading()).read("x", 0, 3) == b"xxx"
    assert len(notes(capsys)) == 1


@pytest.mark.parametrize("kind", ["far", "blocking"])
def test_the_interpreter_ends_while_a_read_hangs(kind: str, tiny_sets: TinySets) -> None:
    code = f"""
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from flatdepth.bench.far import FarFileSystem, LINES, Line
from flatdepth.data.shards.remote import Ranges, Reading
hung = threading.Event()
def hang(_):
    hung.set()
    return True
LINES["x"] = Line(directory=Path({str(tiny_sets.rooms.parent)!r}), hangs=hang)
fs = FarFileSystem()
if {kind!r} == "blocking":
    from fsspec.spec import AbstractFileSystem
    class Blocking(AbstractFileSystem):
        def cat_file(self, path, start=0, end=0):
            hung.set()
            threading.Event().wait()
    fs = Blocking()
name = {next(tiny_sets.rooms.glob("*.tar")).name!r}
ranges = Ranges(fs, "x/rooms", Reading(timeout_s=3600))
pool = ThreadPoolExecutor(2)
for start in (0, 10):
    pool.submit(ranges.read, "x/rooms/" + name, start, start + 5)
hung.wait()
print("ends")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=REPOSITORY
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def test_secrets_in_urls_are_not_printed(tiny_sets: TinySets) -> None:
    for url, shown in (
        ("https://me:pa%24s@host/sets?X-Sig=abc&k=v", "https://***@host/sets?***"),
        ("s3://bucket/rooms", "s3://bucket/rooms"),
        ("see https://a.b/c (x?)", "see https://a.b/c (x?)"),
    ):
        assert str(UserError(f"cannot open {url!r}")) == f"cannot open {shown!r}"
    host("me:secret@there", tiny_sets, hangs=lambda _: True)
    reading = Reading(timeout_s=0.01, outage_s=0.0)
    shards = ShardSet.open("far://me:secret@there/rooms", reading=reading)
    assert shards.ranges is not None and shards.ranges.server.name == "far://there"


# Reading ahead.


def test_neighbours_come_by_one_request_and_memory_is_bounded(
    tiny_sets: TinySets, local: ShardSet
) -> None:
    line = host("near", tiny_sets)
    shards = ShardSet.open("far://near/rooms")
    spans = [local.index.span(i) for i in range(15)]
    order = [3, 1, 2, 0, 14, 7, 12, 13, 4, 5, 6, 11, 10, 9, 8]
    ahead = ReadAhead(2)
    for i in ahead.through(iter(order), 8, lambda i: (shards, i)):
        assert shards.read_bytes(i) == local.read_bytes(i)
    assert {(a, b) for _, a, b in line.asked} == {
        (spans[0][0], spans[14][1]),  # 0 to 3, 7 and 12 to 14
        (spans[4][0], spans[11][1]),
    }
    assert ahead.room.held == 0
    ahead.close()

    line.asked.clear()
    most = max(b - a for a, b in spans) * 2
    ahead = ReadAhead(3, most)
    for i in ahead.through(iter(order * 3), 15, lambda i: (shards, i)):
        assert 0 <= ahead.room.held <= most
        assert shards.read_bytes(i) == local.read_bytes(i)
    assert ahead.room.held == 0
    ahead.close()


def test_far_neighbours_are_read_apart(
    tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatdepth.data.shards.ahead.GAP_BYTES", 2000)
    line = host("apart", tiny_sets)
    shards = ShardSet.open("far://apart/rooms")
    spans = [shards.index.span(i) for i in range(15)]
    ahead = ReadAhead(1)
    for i in ahead.through(iter([0, 1, 5, 6, 10]), 5, lambda i: (shards, i)):
        shards.read_bytes(i)
    assert {(a, b) for _, a, b in line.asked} == {
        (spans[0][0], spans[1][1]),
        (spans[5][0], spans[6][1]),
        spans[10],
    }
    ahead.close()


def test_what_was_announced_and_never_asked_for_is_given_up(
    tiny_sets: TinySets, local: ShardSet
) -> None:
    line = host("left", tiny_sets)
    beyond = local.index.span(12)[0]
    line.hangs = lambda number: line.asked[number][1] >= beyond
    shards = ShardSet.open("far://left/rooms", reading=Reading(timeout_s=3600, hedged=0.0))
    ahead = ReadAhead(2)
    before = threading.active_count()
    tasks = ahead.through(iter([0, 1, 2, 12, 13]), 3, lambda i: (shards, i))
    assert [next(tasks), next(tasks)] == [0, 1]
    assert shards.read_bytes(0) == local.read_bytes(0)
    ahead.close()
    while threading.active_count() > before:
        time.sleep(0.01)
    assert ahead.room.held == 0
    line.hangs = hanging()
    for i in range(15):
        assert shards.read_bytes(i) == local.read_bytes(i)


def test_a_server_that_cannot_send_ranges_is_still_named(tiny_sets: TinySets) -> None:
    """A range of another length is left to be read sample by sample."""

    host("cut", tiny_sets)
    shards = ShardSet.open("far://cut/rooms")
    fs = fsspec.filesystem("far")
    whole = type(fs)._cat_file

    async def cat(self: Any, path: str, **_: Any) -> bytes:
        return await whole(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fs), "_cat_file", cat)
        ahead = ReadAhead(1)
        with pytest.raises(UserError, match="sends whole files instead of the range"):
            for i in ahead.through(iter(range(4)), 4, lambda i: (shards, i)):
                shards.read_bytes(i)
        ahead.close()


# The cache.


def kept_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and path.name not in (".lock", ".count"):
                total += -(-path.stat().st_size // PAGE) * PAGE
        except FileNotFoundError:
            pass
    return total


WRITER = """
import random, sys, time
from pathlib import Path
from flatdepth.data.shards.cache import SampleCache
limit, seed, files = map(int, sys.argv[2:])
kept, rng = SampleCache(limit, Path(sys.argv[1])), random.Random(seed)
for n in range(files):
    name = f"{rng.randrange(256):02x}{seed}-{n}"
    kept.put(name, random.Random(name).randbytes(random.Random(name).randrange(1, 60000)))
"""


def writer(folder: Path, limit: int, seed: int, files: int) -> "subprocess.Popen[str]":
    arguments = [str(folder), str(limit), str(seed), str(files)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )


def whole(folder: Path) -> int:
    """How many files there are, all of them as they were written."""
    found = [path for path in folder.glob("??/*") if not path.name.endswith(".tmp")]
    for path in found:
        rng = random.Random(path.name)
        assert path.read_bytes() == random.Random(path.name).randbytes(rng.randrange(1, 60000))
    return len(found)


def test_two_processes_keep_to_one_limit(tmp_path: Path) -> None:
    limit = 2_000_000
    processes = [writer(tmp_path, limit, seed, 200) for seed in (1, 2)]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, kept_bytes(tmp_path))
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert 0.9 * limit < kept_bytes(tmp_path) <= limit and most <= limit
    assert whole(tmp_path) > 30
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_processes_leave_whole_files_and_the_limit(tmp_path: Path) -> None:
    limit = 1_000_000
    for seed, files in ((1, 3), (2, 6), (3, 9)):
        process = writer(tmp_path, limit, seed, 10**6)
        while not process.poll() and len(list(tmp_path.glob(f"??/??{seed}-*"))) < files:
            pass
        process.kill()
        process.communicate()
        assert whole(tmp_path) > 0
        for path in tmp_path.glob("??/*"):  # as if it lay there for years
            os.utime(path, (0, 0))
    (tmp_path / ".count").write_bytes(b"cut")
    before = kept_bytes(tmp_path)
    assert before <= limit
    fresh = SampleCache(limit, tmp_path)
    for n in range(40):
        fresh.put(f"00{n}", bytes(100_000))
        assert kept_bytes(tmp_path) <= limit
    assert fresh.get("000", 100_000, zlib.crc32(bytes(100_000))) == bytes(100_000)
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_this_run_has_read_stays_and_what_others_left_goes_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = SampleCache(10 * PAGE, tmp_path)
    for n in range(10):
        earlier.put(f"0{n}-old", bytes([n]) * PAGE)
        os.utime(tmp_path / f"0{n}" / f"0{n}-old", (1000 + n, 1000 + n))
    now = SampleCache(10 * PAGE, tmp_path)
    assert now.get("00-old", PAGE, zlib.crc32(bytes(PAGE))) == bytes(PAGE)
    for n in range(20):
        now.put(f"1{n:02}-new", bytes(PAGE))
        monkeypatch.setattr(now, "_no_room_until", 0.0)
        if n < 4:
            assert not now.holds(f"0{n + 1}-old") and now.holds(f"0{n + 5}-old")
    assert now.holds("00-old") and not any(now.holds(f"0{n}-old") for n in range(1, 10))
    assert [now.holds(f"1{n:02}-new") for n in range(20)] == [True] * 9 + [False] * 11


def test_samples_are_kept_by_content_and_damage_is_read_again(
    tiny_sets: TinySets, local: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    line, other = host("first", tiny_sets), host("second", tiny_sets)
    reading = Reading(cache_bytes=10**8)
    first = ShardSet.open("far://first/rooms", reading=reading)
    second = ShardSet.open("far://second/rooms", reading=reading)
    for shards in (first, second, first):
        for i in range(15):
            assert shards.read_bytes(i) == local.read_bytes(i)
    assert (len(line.asked), len(other.asked)) == (15, 0)
    folder = cache.cache_directory() / SAMPLES
    files = sorted(path for path in folder.glob("??/*"))
    assert len(files) == 15
    for path, damage in zip(files, (b"", b"x", None), strict=False):
        content = path.read_bytes()
        path.write_bytes(damage if damage is not None else content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        for i in range(15):
            assert second.read_bytes(i) == local.read_bytes(i)
    assert len(other.asked) == 3
    (said,) = notes(capsys)
    assert "is damaged; it is removed and its sample read again" in said
    ahead = ReadAhead(1)
    ahead.announce((second, i) for i in range(15))
    assert len(other.asked) == 3, "what is here is not read ahead"


def test_a_full_disk_costs_a_note(
    tiny_sets: TinySets, local: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may not become larger than 5 kB for a while."""
    host("full", tiny_sets)
    shards = ShardSet.open("far://full/rooms", reading=Reading(cache_bytes=10**8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        found = [shards.read_bytes(i) for i in range(15)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert found == [local.read_bytes(i) for i in range(15)]
    (said,) = notes(capsys)
    assert "cannot keep samples in" in said and "too large" in said
    folder = cache.cache_directory() / SAMPLES
    assert kept_bytes(folder) == 0


# All together.


def cut_set(local: ShardSet, samples: int, folder: Path) -> None:
    """A set of the first samples of another."""
    index, shard = local.index, local.index.shards[0]
    rows = slice(samples)
    folder.mkdir(parents=True)
    short = replace(
        index,
        shards=(replace(shard, samples=samples),),
        keys=Strings.of(index.keys[rows]),
        scenes=Categories.of(index.scenes[rows]),
        splits=Categories.of(index.splits[rows]),
        sizes=index.sizes[rows],
        crc32=index.crc32[rows],
        members={ext: table[rows] for ext, table in index.members.items()},
    )
    write_index(Output(str(folder)), short)
    (folder / shard.name).hardlink_to(local.shard_path(0))


def test_fifty_sets_with_a_stalled_server_among_them_train_in_exact_order(
    tiny_sets: TinySets, local: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slow first bytes everywhere, and one server that never answers its first requests."""
    sets = range(50)
    for n in sets:
        cut_set(local, 6 + n % 10, tmp_path / "sets" / f"set{n}")
        LINES[f"host{n}"] = Line(
            directory=tmp_path / "sets",
            median_s=0.001,
            slow_share=0.05,
            slow_s=0.05,
            seed=n,
            hangs=hanging(0, 1, 2) if n == 7 else hanging(),
        )

    def config(paths: Sequence[str], **data: object) -> TrainConfig:
        entries = [{"path": path, "weight": 1 + n % 7} for n, path in enumerate(paths)]
        path = tiny_sets.config(
            tmp_path,
            data__train=entries,
            data__art=[],
            data__val=[str(tiny_sets.rooms)],
            data__prefetch=4,
            paste__share=0.0,
            micro_batch=4,
            batch=4,
            **{f"data__{key}": value for key, value in data.items()},
        )
        return parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)

    def samples(chosen: TrainConfig, steps: int = 12) -> list[Sample]:
        corpus = open_corpus(chosen.data)
        stream = training_samples(corpus, chosen, first_step=3, rank=1, ranks=2, accumulation=1)
        found = [sample for batch in islice(stream, steps) for sample in batch]
        stream.close()
        return found

    here = samples(config([str(tmp_path / "sets" / f"set{n}") for n in sets]))
    urls = [f"far://host{n}/set{n}" for n in sets]
    chosen = config(urls, read_timeout_s=1.0, cache_gb=0.1)
    capsys.readouterr()
    for turn in range(2):
        there = samples(chosen)
        for ours, theirs in zip(there, here, strict=True):
            assert (ours.identity, ours.view, ours.loss_seed) == (
                theirs.identity,
                theirs.view,
                theirs.loss_seed,
            )
            assert np.array_equal(ours.frame.image, theirs.frame.image)
            assert np.array_equal(ours.frame.depth_m, theirs.frame.depth_m, equal_nan=True)
        stalled = [line for line in notes(capsys) if "host7" in line]
        assert len(stalled) == (turn == 0), stalled
    assert len({sample.identity for sample in here}) > 25
    assert 0 < kept_bytes(cache.cache_directory() / SAMPLES) <= 0.1e9


def test_memory_for_reading_ahead_is_counted(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host("counted", tiny_sets)

    def room(path: str, free: int) -> str:
        monkeypatch.setattr("flatdepth.data.loader.free_memory", lambda: free)
        file = tiny_sets.config(tmp_path, data__train=[{"path": path}], data__prefetch=1024)
        config = parse_config(TrainConfig, [f"--config={file}"], prog="train.py", description=None)
        try:
            expect_room_ahead(open_corpus(config.data), config)
        except UserError as error:
            return str(error)
        return ""

    at_home, at_far = str(tiny_sets.rooms), "far://counted/rooms"
    assert not room(at_home, 2 << 30) and not room(at_far, 2 << 30)
    assert not room(at_home, 600 << 20)
    assert "data.prefetch x micro_batch: expected at most" in room(at_far, 600 << 20)


def test_devices_wait_for_one_whose_server_is_away(tiny_sets: TinySets, tmp_path: Path) -> None:
    for path, minutes in (("far://x/rooms", 75), (str(tiny_sets.rooms), None)):
        file = tiny_sets.config(tmp_path, data__train=[{"path": path}], data__outage_minutes=45)
        config = parse_config(TrainConfig, [f"--config={file}"], prog="train.py", description=None)
        handler = make_accelerator(config, tmp_path).init_handler
        assert (handler and handler.timeout) == (minutes and timedelta(minutes=minutes))
