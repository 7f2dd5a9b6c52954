"""Packing in parts: here, on Ray, and one by one give the same bytes; kills, mistakes, stops."""

import os
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from flatdepth.commands import pack as tool
from flatdepth.data import engine
from flatdepth.data.pack import Job, fingerprint, list_frames, pack, pack_part, part_name
from flatdepth.data.parts import merge, pack_parts
from flatdepth.data.progress import Progress
from flatdepth.data.readers.base import Item
from flatdepth.data.sets import ls, verify
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.types import RawFrame
from tests.test_pack import SHARD_MB, TinyReader, contents

PARTS = 3
"""Of eight frames each."""


@dataclass(frozen=True)
class WatchedReader(TinyReader):
    """Notes in the directory ``raw`` which process reads which frame. A file kill-7 there names a
    directory: reading frame 7 ends the process once, and lists what was half-written. A file
    wrong-7 makes it a mistake of the user.
    """

    bad: tuple[int, ...] = (3, 11, 23)

    def read(self, item: Item) -> RawFrame:
        number = int(item.key.rsplit("/", 1)[1])
        place = Path(self.raw)
        with (place / "read").open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        kill = place / f"kill-{number}"
        if kill.exists():
            written = Path(kill.read_text()).glob("**/*.tar.*.tmp")
            (place / "half").write_text("".join(path.name for path in written))
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (place / f"wrong-{number}").exists():
            raise UserError("the camera of this layout is unknown; give --intrinsics")
        return TinyReader.read(TinyReader(bad=self.bad), item)

    def reads(self) -> list[tuple[int, int]]:
        """(frame, process) in the order of time."""
        lines = (Path(self.raw) / "read").read_text().splitlines()
        return [(int(number), int(pid)) for number, pid in map(str.split, lines)]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """Ray, started once as the command starts it."""
    with engine.running_ray(None, 2):
        yield


@pytest.fixture
def reader(tmp_path: Path) -> WatchedReader:
    (tmp_path / "raw").mkdir()
    return WatchedReader(str(tmp_path / "raw"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the parts as ``--part i/n`` makes them, and in ``set`` what they join to."""
    directory = tmp_path_factory.mktemp("merged")
    (directory / "raw").mkdir()
    for i in range(1, PARTS + 1):
        reader = WatchedReader(str(directory / "raw"))
        pack(reader, directory, workers=1, shard_mb=SHARD_MB, part=(i, PARTS))
    merge([directory], directory / "set")
    return directory


def in_parts(reader: TinyReader, out: Path | str, **options: object):
    return pack_parts(reader, out, **{"parts": PARTS, "shard_mb": SHARD_MB, **options})


class Store(DirFileSystem):
    """The local files as an object store, which all processes share."""

    protocol = "store"

    def __init__(self, **options: object) -> None:
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True), **options)
        self.path = ""


fsspec.register_implementation("store", Store)


def in_store(directory: Path) -> str:
    return f"store://{directory}"


class TestHere:
    def test_the_bytes_are_those_of_parts_merged(
        self, tmp_path: Path, reader: WatchedReader, merged: Path
    ) -> None:
        mine = tmp_path / "set" / part_name(1, 2)
        pack(reader, tmp_path / "set", workers=1, part=(1, 2))
        before = contents(mine)
        summary = in_parts(reader, tmp_path / "set", workers=1)
        assert (summary.frames, summary.packed, summary.damaged) == (21, 21, 3)
        assert contents(mine) == before, "parts of the user are not touched"
        shutil.rmtree(mine)
        assert contents(tmp_path / "set") == contents(merged / "set")
        assert in_parts(reader, tmp_path / "set", workers=1).already_complete

    def test_only_what_is_unfinished_is_packed_again(
        self, tmp_path: Path, reader: WatchedReader, merged: Path
    ) -> None:
        wrong = Path(reader.raw) / "wrong-22"
        wrong.touch()
        with pytest.raises(UserError, match="give --intrinsics"):
            in_parts(reader, tmp_path / "set", workers=1)
        with pytest.raises(UserError, match="is not finished; run the same pack command again"):
            ShardSet.open(tmp_path / "set")
        for i in (1, 2):
            part = tmp_path / "set" / ".pack" / part_name(i, PARTS)
            assert contents(part) == contents(merged / part_name(i, PARTS))
        with pytest.raises(UserError, match=r'part \["all", 3\] -> \["all", 4\]'):
            in_parts(reader, tmp_path / "set", workers=1, parts=4)
        with pytest.raises(UserError, match=r'part \["all", 3\] -> \[1, 1\]'):
            pack(reader, tmp_path / "set", workers=1, shard_mb=SHARD_MB)
        wrong.unlink()
        summary = in_parts(reader, tmp_path / "set", workers=1, parts=None)
        assert contents(tmp_path / "set") == contents(merged / "set")
        assert summary.packed < 8
        times = Counter(number for number, _ in reader.reads())
        assert all(times[i] == 1 for i in range(18)) and times[22] == 2

    def test_on_object_stores(self, tmp_path: Path, reader: WatchedReader, merged: Path) -> None:
        url = f"memory://{tmp_path.name}/set"
        in_parts(reader, url, workers=1)
        store = fsspec.filesystem("memory")
        found = {path.rsplit("/", 1)[1]: store.cat_file(path) for path in store.find(url)}
        assert found == contents(merged / "set")
        assert verify(url).damage == [] and "21" in ls(f"memory://{tmp_path.name}")
        for i in range(1, PARTS + 1):
            pack(reader, f"{url}2", workers=1, shard_mb=SHARD_MB, part=(i, PARTS))
        merge([f"{url}2"], f"{url}2")
        merge([f"{url}2"], tmp_path / "down")
        assert contents(tmp_path / "down") == contents(merged / "set")
        merge([merged], f"{url}3")
        for number in (2, 3):
            files = store.glob(f"{url}{number}/*.*")
            assert {path.rsplit("/", 1)[1]: store.cat_file(path) for path in files} == found

    def test_nothing_usable(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none of 4 frames can be used \(3: image unreadable"):
            in_parts(TinyReader(count=3, bad=(0, 1, 2)), tmp_path, workers=1)
        assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]
        assert in_parts(TinyReader(count=2), tmp_path, workers=1).frames == 2

    def test_a_part_is_packed_by_one_process_at_a_time(self, tmp_path: Path) -> None:
        job = Job(TinyReader(), shard_mb=SHARD_MB)
        listing = list_frames(job.reader)
        part = job.part(listing, (2, PARTS), str(tmp_path / "set"), fingerprint(listing))
        begun, go_on, packed = Event(), Event(), []

        def results(items: object) -> Iterator[object]:
            begun.set()
            go_on.wait()
            return map(job, items)

        def run() -> None:
            with Progress("tiny", 8) as progress:
                count, _ = pack_part(part, results, progress, may_be_empty=True, patience_s=60)
            packed.append(count)

        threads = [Thread(target=run) for _ in range(2)]
        threads[0].start()
        begun.wait()
        threads[1].start()
        with pytest.raises(UserError, match=r"another process is packing into .*set; wait for it"):
            pack_part(part, results, Progress("tiny", 8), may_be_empty=True)
        go_on.set()
        for thread in threads:
            thread.join()
        assert packed == [8, 0]

    def test_merging_minds_an_unfinished_run(self, tmp_path: Path, merged: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            in_parts(TinyReader("stop-20"), tmp_path, workers=1)
        with pytest.raises(UserError, match=r"an unfinished set .*reader"):
            merge([merged], tmp_path)


@pytest.mark.usefixtures("ray_here")
class TestOnRay:
    @pytest.mark.parametrize("where", [str, in_store])
    def test_the_bytes_are_those_of_parts_merged(
        self,
        tmp_path: Path,
        reader: WatchedReader,
        merged: Path,
        where: type,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        summary = in_parts(reader, where(tmp_path / "set"), engine="ray")
        assert contents(tmp_path / "set") == contents(merged / "set")
        assert (summary.frames, summary.packed, summary.damaged) == (21, 21, 3)
        assert sorted(number for number, _ in reader.reads()) == list(range(24))
        assert os.getpid() not in {pid for _, pid in reader.reads()}
        said = capsys.readouterr().err
        for number in (3, 11, 23):
            assert said.count(f"{number:04d}: image unreadable (frame {number})") == 1

    def test_kill_9_costs_a_part_its_unfinished_shard(
        self,
        tmp_path: Path,
        reader: WatchedReader,
        merged: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (Path(reader.raw) / "kill-14").write_text(str(tmp_path / "set"))
        in_parts(reader, tmp_path / "set", engine="ray")
        assert contents(tmp_path / "set") == contents(merged / "set")
        assert ".tar." in (Path(reader.raw) / "half").read_text()
        times = Counter(number for number, _ in reader.reads())
        again = sorted(number for number, n in times.items() if n == 2)
        assert set(times.values()) == {1, 2} and again[-1] == 14
        assert again == list(range(again[0], 15)) and again[0] > 8
        assert len({pid for number, pid in reader.reads() if number in again}) == 2
        assert "part-0002-of-0003: going on after" in capsys.readouterr().err

    def test_a_mistake_comes_through_and_what_was_done_stays(
        self, tmp_path: Path, reader: WatchedReader, merged: Path
    ) -> None:
        wrong = Path(reader.raw) / "wrong-22"
        wrong.touch()
        with pytest.raises(UserError, match=r"^the camera of this layout is unknown; give"):
            in_parts(reader, tmp_path / "set", engine="ray", workers=1)
        for i in (1, 2):
            part = tmp_path / "set" / ".pack" / part_name(i, PARTS)
            assert contents(part) == contents(merged / part_name(i, PARTS))
        wrong.unlink()
        in_parts(reader, tmp_path / "set", engine="ray", parts=None)
        assert contents(tmp_path / "set") == contents(merged / "set")
        times = Counter(number for number, _ in reader.reads())
        assert all(times[i] == 1 for i in range(16))


class TestMistakes:
    def test_ray_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=r"pip install 'flatdepth\[ray\]'"):
            in_parts(TinyReader(), tmp_path, engine="ray")

    def test_nothing_listens_at_the_address(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"^--address 127.0.0.1:{port}: Ray does not answer"):
            in_parts(TinyReader(), tmp_path, engine="ray", address=f"127.0.0.1:{port}")

    def test_a_machine_that_does_not_see_the_data_is_named(self, tmp_path: Path) -> None:
        job = Job(TinyReader(str(tmp_path)))
        part = job.part(job.reader.list(), (1, 1), str(tmp_path), {})
        assert engine._visible(part) == [str(tmp_path)] * 2
        shutil.rmtree(tmp_path)
        with pytest.raises(UserError, match=rf"{socket.gethostname()} does not see {tmp_path}"):
            engine._pack_there(part, 0, None, str(Path.cwd()), [str(tmp_path)])

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--parts=0"], "--parts: expected 1 to "),
            (["--parts=100000"], "--parts: expected 1 to "),
            (["--parts=2", "--part=1/2"], "--part packs one part"),
            (["--parts=2", "--address=auto"], "add --engine ray"),
            (["--engine=ray", "--workers=1000000", "--address=auto"], "--workers: expected 1 to "),
            (["--engine=slurm"], "slurm"),
        ],
    )
    def test_options_that_cannot_be(self, tmp_path: Path, options: list[str], said: str) -> None:
        with pytest.raises(UserError, match=said):
            tool.main(["rooms", "--out", str(tmp_path / "set"), *options])
        assert not (tmp_path / "set").exists()
