"""Shard sets on http and s3: range reads, dropped connections, what is missing, training."""

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import training_samples
from flatdepth.data.shards import remote as ranges
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.remote import ATTEMPTS, Reading
from flatdepth.errors import UserError
from flatdepth.training.loop import make_training_batch
from flatdepth.types import Batch
from tests.conftest import TinySets


class Server(ThreadingHTTPServer):
    """Serves the files below a directory; can be told to hang up, or to ignore ranges."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.drops = 0
        self.stalls = 0
        self.closing = Event()
        self.ranges: list[str | None] = []
        self.knows_ranges = True


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        file = self.server.root / self.path.lstrip("/")
        if not file.is_file():
            self.send_response(404)
            body = b"<Error><Code>NoSuchKey</Code></Error>"  # as S3 says it
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        data = file.read_bytes()
        asked = self.headers.get("Range") if self.server.knows_ranges else None
        self.server.ranges.append(asked)
        if asked is not None:
            first, last = (int(n) for n in re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())  # type: ignore[union-attr]
            data = data[first : last + 1]
        if self.server.stalls:
            self.server.stalls -= 1
            self.server.closing.wait()
            self.close_connection = True
            return
        self.send_response(200 if asked is None else 206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.drops:
            self.server.drops -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        file = self.server.root / self.path.lstrip("/")
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tiny_sets: TinySets) -> Iterator[Server]:
    with Server(tiny_sets.rooms.parent) as served:
        thread = Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield served
        served.closing.set()
        served.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "FIRST_PAUSE_SECONDS", 0.001)


def same_samples(remote: ShardSet, local: ShardSet) -> None:
    assert list(remote.keys) == list(local.keys)
    for i in range(len(local)):
        assert remote.read_bytes(i) == local.read_bytes(i)


def test_http_samples_are_the_local_ones_in_one_range_request_each(
    server: Server, tiny_sets: TinySets
) -> None:
    with ShardSet.open(tiny_sets.rooms) as local, ShardSet.open(f"{server.url}/rooms") as remote:
        assert server.ranges == [None, None], "the index is read whole"
        same_samples(remote, local)
        spans = [local.index.span(i) for i in range(len(local))]
        assert server.ranges[2:] == [f"bytes={start}-{end - 1}" for start, end in spans]


def test_a_dropped_connection_is_tried_again(
    server: Server, tiny_sets: TinySets, capsys: pytest.CaptureFixture[str]
) -> None:
    server.drops = 2
    url, at_once = f"{server.url}/rooms/", Reading(outage_s=0)
    with ShardSet.open(tiny_sets.rooms) as local, ShardSet.open(url, reading=at_once) as remote:
        assert len(server.ranges) == 4
        server.drops = ATTEMPTS - 1
        assert remote.read_bytes(3) == local.read_bytes(3)
        assert len(server.ranges) == 4 + ATTEMPTS
        said = capsys.readouterr().err
        assert said.count("trying again") == 2 + 1, "one note of the range, however many attempts"
        server.drops = ATTEMPTS
        with pytest.raises(UserError, match=rf"cannot read shard http.*\({ATTEMPTS} attempts"):
            remote.read_bytes(3)


def test_a_server_that_has_answered_is_waited_for(server: Server, tiny_sets: TinySets) -> None:
    with (
        ShardSet.open(tiny_sets.rooms) as local,
        ShardSet.open(f"{server.url}/rooms") as remote,
    ):
        server.drops = ATTEMPTS
        with pytest.raises(UserError, match=r"cannot read shard"):
            remote.read_bytes(3)
        assert remote.read_bytes(3) == local.read_bytes(3)
        server.drops = 2 * ATTEMPTS
        assert remote.read_bytes(4) == local.read_bytes(4)
        assert server.drops == 0


def test_a_stalled_connection_is_given_up(
    server: Server, tiny_sets: TinySets, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = Reading(timeout_s=0.2)
    with (
        ShardSet.open(tiny_sets.rooms) as local,
        ShardSet.open(f"{server.url}/rooms", reading=reading) as remote,
    ):
        server.stalls = 2
        for i in range(4):
            assert remote.read_bytes(i) == local.read_bytes(i)
        assert server.stalls == 0
    said = capsys.readouterr().err
    assert said.startswith(f"note: {server.url}: a read failed (TimeoutError: no answer in")
    assert said.count("note: ") == 1


def test_what_is_missing_is_said_at_once(server: Server) -> None:
    with pytest.raises(UserError, match="there is no shard set at http"):
        ShardSet.open(f"{server.url}/nothing")
    assert server.ranges == []


def test_a_server_without_ranges_is_named(server: Server) -> None:
    server.knows_ranges = False
    with (
        ShardSet.open(f"{server.url}/rooms") as remote,
        pytest.raises(UserError, match="sends whole files instead of the range"),
    ):
        remote.read(0)


@pytest.mark.parametrize("processes", [0, 2])
def test_training_samples_do_not_depend_on_where_the_set_is(
    server: Server, tiny_sets: TinySets, tmp_path: Path, processes: int
) -> None:
    """With connections that drop now and then, on two threads; or read here for processes."""

    def batches(rooms: str, pictures: str, processes: int = 0) -> list[Batch]:
        path = tiny_sets.config(
            tmp_path,
            data__train=[{"path": rooms}],
            data__art=[pictures],
            data__processes=processes,
        )
        config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
        stream = training_samples(
            open_corpus(config.data), config, first_step=0, rank=0, ranks=1, accumulation=2
        )
        server.drops = 3
        cpu = torch.device("cpu")
        found = [make_training_batch(next(stream), config, cpu) for _ in range(3)]
        stream.close()
        return found

    remote = batches(f"{server.url}/rooms", f"{server.url}/pictures", processes)
    assert server.drops == 0
    local = batches(str(tiny_sets.rooms), str(tiny_sets.pictures))
    for ours, theirs in zip(remote, local, strict=True):
        assert torch.equal(ours.image, theirs.image) and torch.equal(ours.depth_m, theirs.depth_m)


@pytest.fixture
def s3_set(server: Server, tiny_sets: TinySets, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rooms in a bucket, which the server shows as S3 does: by path, with ranges."""
    server.root = tiny_sets.rooms.parents[1]
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{tiny_sets.rooms.parent.name}/rooms"


def test_s3_samples_are_the_local_ones(s3_set: str, tiny_sets: TinySets) -> None:
    with ShardSet.open(tiny_sets.rooms) as local, ShardSet.open(s3_set) as remote:
        same_samples(remote, local)
    other = s3_set.replace("rooms", "other")
    with pytest.raises(UserError, match=f"there is no shard set at {other}"):
        ShardSet.open(other)
