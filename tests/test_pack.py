"""Packing: determinism over workers and interruptions, parts, skips, verify, ls, export, CLI."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np
import pytest
from PIL import Image

from flatdepth.cli import run_command
from flatdepth.commands import pack as tool
from flatdepth.data.pack import check_frame, pack, part_name
from flatdepth.data.parts import merge
from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.sets import export, ls, verify
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME
from flatdepth.data.shards.codec import decode_frame, depth_metres
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.write import Output
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import DepthCodes, RawFrame
from tests.test_shards import K_PX, assert_same_frame, make_frame, write_set

ROOT = Path(__file__).parents[1]
SHARD_MB = 0.012


@dataclass(frozen=True)
class TinyReader:
    """Frames made up on the spot. ``raw`` is what must not matter: "" reads well, "stop-7" is
    interrupted at frame 7, "die-7" loses the process there, "slow" takes its time.
    """

    raw: str = ""
    count: int = 24
    bad: tuple[int, ...] = ()
    grade: Path = Path("fine")

    dataset = "tiny"
    depth_range_m = (0.1, 10.0)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    def list(self) -> Listing:
        frames = [make_frame(i) for i in range(self.count)]
        items = [Item(key=f.key, scene=f.scene, split=f.split) for f in frames]
        return Listing(items=items, excluded=[("scene_99/cam_00/0000", "flagged by its makers")])

    def read(self, item: Item) -> RawFrame:
        number = int(item.key.rsplit("/", 1)[1])
        if self.raw == f"stop-{number}":
            raise KeyboardInterrupt
        if self.raw == f"die-{number}":
            os._exit(1)
        if self.raw == "slow":
            time.sleep(0.1)
        if number in self.bad:
            raise BadFrame("image unreadable", f"frame {number}")
        return make_frame(number)


def pack_tiny(out: Path, raw: str = "", workers: int = 1, **options: object):
    reader = TinyReader(raw, bad=(3, 11, 23))
    return pack(reader, out, workers=workers, shard_mb=SHARD_MB, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "set"
    pack_tiny(out)
    return out


@pytest.fixture
def directory(tmp_path: Path, pristine: Path) -> Path:
    """A packed set that the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "set"))


class TestPack:
    def test_the_set_holds_the_readers_frames(self, pristine: Path) -> None:
        with ShardSet.open(pristine) as shards:
            assert len(shards.index.shards) > 2
            want = [make_frame(i) for i in range(24) if i not in (3, 11, 23)]
            assert list(shards.keys) == [frame.key for frame in want]
            for i, frame in enumerate(want):
                assert_same_frame(shards.read(i), frame)
        names = {path.name for path in pristine.iterdir()}
        assert names == {
            INDEX_NAME,
            COLUMNS_NAME,
            "skipped.jsonl",
            *(f"tiny-{k:06d}.tar" for k in range(len(names) - 3)),
        }

    def test_what_is_left_out_is_listed(self, pristine: Path) -> None:
        rows = [json.loads(line) for line in (pristine / "skipped.jsonl").read_text().splitlines()]
        assert [(row["key"], row["reason"], row["detail"]) for row in rows] == [
            ("scene_99/cam_00/0000", "flagged by its makers", ""),
            ("scene_00/cam_00/0003", "image unreadable", "frame 3"),
            ("scene_02/cam_00/0011", "image unreadable", "frame 11"),
            ("scene_05/cam_00/0023", "image unreadable", "frame 23"),
        ]

    def test_two_workers_write_the_same_bytes(self, tmp_path: Path, pristine: Path) -> None:
        summary = pack_tiny(tmp_path / "set", workers=2)
        assert contents(tmp_path / "set") == contents(pristine)
        assert (summary.frames, summary.scenes, summary.packed) == (21, 6, 21)
        assert summary.skipped == {"flagged by its makers": 1, "image unreadable": 3}
        assert "image unreadable       3" in str(summary)

    def test_a_remote_set_has_the_same_bytes(self, tmp_path: Path, pristine: Path) -> None:
        url = f"memory://{tmp_path.name}/set"
        pack(TinyReader(bad=(3, 11, 23)), url, workers=1, shard_mb=SHARD_MB)
        store = fsspec.filesystem("memory")
        found = {path.rsplit("/", 1)[1]: store.cat_file(path) for path in store.find(url)}
        assert found == contents(pristine)
        assert verify(url).damage == []
        assert "21" in ls(f"memory://{tmp_path.name}")

    @pytest.mark.parametrize("stop", [0, 1, 7, 12, 22, 23])
    def test_an_interrupted_pack_goes_on_to_the_same_bytes(
        self, tmp_path: Path, pristine: Path, stop: int
    ) -> None:
        out = tmp_path / "set"
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(out, raw=f"stop-{stop}")
        with pytest.raises(UserError, match="is not finished"):
            ShardSet.open(out)
        summary = pack_tiny(out)
        assert contents(out) == contents(pristine)
        assert summary.frames == 21

    def test_finished_shards_are_kept(self, tmp_path: Path) -> None:
        out = tmp_path / "set"
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(out, raw="stop-20")
        before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
        assert len(before) > 1
        summary = pack_tiny(out)
        assert summary.packed < 12
        assert {name: (out / name).stat().st_ino for name in before} == before

    def test_damage_between_runs_is_packed_again(self, tmp_path: Path, pristine: Path) -> None:
        out = tmp_path / "set"
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(out, raw="stop-20")
        shard = out / "tiny-000001.tar"
        shard.write_bytes(shard.read_bytes()[:5000])
        (out / ".pack" / "tiny-000003.tar.4711.tmp").write_bytes(b"half a shard")
        (out / ".pack" / "shard-000003.json.4711.tmp").write_bytes(b"half a record")
        pack_tiny(out)
        assert contents(out) == contents(pristine)

    def test_kill_9_loses_nothing(self, tmp_path: Path, pristine: Path) -> None:
        out = tmp_path / "set"
        code = (
            "import sys; from pathlib import Path; from tests.test_pack import pack_tiny;"
            "pack_tiny(Path(sys.argv[1]), raw='slow')"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        while len(list(out.glob("*.tar"))) < 2 or not list(out.glob(".pack/*.tar.*.tmp")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / INDEX_NAME).exists()
        pack_tiny(out)
        assert contents(out) == contents(pristine)

    def test_a_lost_worker_is_explained_and_resumed(self, tmp_path: Path, pristine: Path) -> None:
        out = tmp_path / "set"
        with pytest.raises(UserError, match="with fewer --workers to resume"):
            pack_tiny(out, raw="die-12", workers=2)
        pack_tiny(out)
        assert contents(out) == contents(pristine)

    def test_a_full_disk_is_explained_and_resumed(
        self, tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "set"
        genuine = Output.publish

        def publish(self: Output, file: object, name: str) -> None:
            if name == "tiny-000001.tar":
                raise OSError(errno.ENOSPC, "No space left on device")
            genuine(self, file, name)

        with monkeypatch.context() as patch:
            patch.setattr(Output, "publish", publish)
            with pytest.raises(UserError, match=r"no space left .* run the same command again"):
                pack_tiny(out)
        pack_tiny(out)
        assert contents(out) == contents(pristine)

    def test_nothing_usable(self, tmp_path: Path) -> None:
        reader = TinyReader(count=3, bad=(0, 1, 2))
        with pytest.raises(UserError, match=r"none of 4 frames can be used \(3: image unreadable"):
            pack(reader, tmp_path, workers=1)
        assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 4
        assert not (tmp_path / INDEX_NAME).exists()
        # other options are no longer refused
        assert pack(TinyReader(count=2), tmp_path, workers=1).frames == 2

    def test_the_summary_says_how_deep_it_is(self, tmp_path: Path) -> None:
        summary = pack(TinyReader(count=2), tmp_path, workers=1)
        with ShardSet.open(tmp_path) as shards:
            depths = [decode_frame(shards.read(i)).depth_m[::4, ::4] for i in range(2)]
        known = np.concatenate([depth[np.isfinite(depth)] for depth in depths])
        assert summary.depth_m == pytest.approx(np.percentile(known, (2, 50, 98)))
        assert f"{np.median(known):.3g}" in str(summary) and "(2 %, median, 98 %)" in str(summary)

    @pytest.mark.parametrize(
        "options",
        [
            {"workers": 0},
            {"part": (0, 2)},
            {"part": (3, 2)},
            {"shard_mb": 0.0},
            {"min_valid": 2.0},
            {"level": 40},
        ],
    )
    def test_wrong_options_name_the_flag(self, tmp_path: Path, options: dict) -> None:
        (name,) = options
        with pytest.raises(UserError, match=f"^--{name}(: expected| must be)"):
            pack(TinyReader(), tmp_path / "set", **options)
        assert not (tmp_path / "set").exists()


class TestRequest:
    def test_the_same_request_is_complete(self, directory: Path) -> None:
        before = contents(directory)
        times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
        summary = pack_tiny(directory, raw="elsewhere", workers=2)
        assert summary.already_complete
        assert "was complete" in str(summary)
        assert contents(directory) == before
        assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == times

    def test_another_request_is_refused(self, directory: Path) -> None:
        before = contents(directory)
        changed = r"a finished set .*options\.bad \[3, 11, 23\] -> \[\].* choose another --out"
        with pytest.raises(UserError, match=changed):
            pack(TinyReader(), directory, workers=1, shard_mb=SHARD_MB)
        with pytest.raises(UserError, match=r"shard_mb 0\.012 -> 0\.02"):
            pack(TinyReader(bad=(3, 11, 23)), directory, workers=1, shard_mb=0.02)
        assert contents(directory) == before

    def test_an_unfinished_set_is_resumed_by_its_own_request_only(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(tmp_path, raw="stop-20")
        before = contents(tmp_path)
        with pytest.raises(UserError, match=r"an unfinished set .*options\.bad"):
            pack(TinyReader(), tmp_path, workers=1, shard_mb=SHARD_MB)
        with pytest.raises(UserError, match=r"an unfinished set .*listing\.items 24 -> 25"):
            # An option may be the same while the raw data are not.
            pack(
                _Pretending(bad=(3, 11, 23)),
                tmp_path,
                workers=1,
                shard_mb=SHARD_MB,
            )
        assert contents(tmp_path) == before


class _Pretending(TinyReader):
    """A TinyReader whose raw layout has gained a frame."""

    def list(self) -> Listing:
        return replace(TinyReader.list(self), items=TinyReader(count=25).list().items)


_Pretending.__name__ = "TinyReader"


class TestParts:
    @pytest.mark.parametrize("n", [2, 3, 25])
    def test_parts_join_to_the_whole(self, tmp_path: Path, pristine: Path, n: int) -> None:
        for i in range(n, 0, -1):
            pack_tiny(tmp_path, part=(i, n))
        summary = merge([tmp_path], tmp_path)
        assert summary.frames == 21
        assert verify(tmp_path).damage == []
        with ShardSet.open(tmp_path) as got, ShardSet.open(pristine) as want:
            assert list(got.keys) == list(want.keys)
            for i in range(len(want)):
                assert got.read_bytes(i) == want.read_bytes(i)
            assert got.index.request == want.index.request
            assert got.index.skipped == want.index.skipped
        skipped = [(path / "skipped.jsonl").read_bytes() for path in (tmp_path, pristine)]
        assert skipped[0] == skipped[1]
        assert merge([tmp_path], tmp_path).already_complete
        assert pack_tiny(tmp_path).already_complete

    def test_parts_from_different_places(self, tmp_path: Path, pristine: Path) -> None:
        for i in (1, 2):
            pack_tiny(tmp_path / f"machine{i}", part=(i, 2))
        parts = [tmp_path / f"machine{i}" / part_name(i, 2) for i in (2, 1)]
        merge(parts, tmp_path / "joined")
        with ShardSet.open(tmp_path / "joined") as got, ShardSet.open(pristine) as want:
            assert list(got.keys) == list(want.keys)

    def test_what_does_not_fit_together_is_refused(self, tmp_path: Path) -> None:
        for i in (1, 3):
            pack_tiny(tmp_path, part=(i, 3))
        with pytest.raises(UserError, match="part 2/3 is missing; pack it with --part 2/3"):
            merge([tmp_path], tmp_path)
        with pytest.raises(UserError, match=r"holds parts of a set; join them with"):
            ShardSet.open(tmp_path)
        pack(TinyReader(), tmp_path, workers=1, shard_mb=SHARD_MB, part=(2, 3))
        with pytest.raises(UserError, match=r"options\.bad"):
            merge([tmp_path], tmp_path)
        first = tmp_path / part_name(1, 3)
        with pytest.raises(UserError, match="do not belong to one partition"):
            merge([first, first], tmp_path)
        pack_tiny(tmp_path, part=(1, 2))
        with pytest.raises(UserError, match="do not belong to one partition"):
            merge([first, tmp_path / part_name(1, 2)], tmp_path)
        write_set(str(tmp_path / "handmade"), [make_frame(0)])
        with pytest.raises(UserError, match="is not a part"):
            merge([tmp_path / "handmade"], tmp_path)
        with pytest.raises(UserError, match="there is no shard set at memory://"):
            merge([f"memory://{tmp_path.name}/parts"], tmp_path)

    def test_an_unfinished_part_is_refused(self, tmp_path: Path) -> None:
        pack_tiny(tmp_path, part=(1, 2))
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(tmp_path, raw="stop-20", part=(2, 2))
        with pytest.raises(UserError, match=r"part-0002-of-0002 is not finished"):
            merge([tmp_path], tmp_path)


def depth_of(frame: RawFrame, **changes: object) -> DepthCodes:
    assert frame.depth is not None
    return replace(frame.depth, **changes)


@dataclass(frozen=True)
class RenderedReader(TinyReader):
    max_constant_share: float = 0.3


class TestChecks:
    def check(self, frame: RawFrame, reader: TinyReader | None = None) -> str:
        """The reason why a frame is refused, "" if it is not."""
        try:
            check_frame(frame, reader or TinyReader())
        except BadFrame as error:
            return error.reason
        return ""

    def test_a_good_frame(self) -> None:
        assert self.check(make_frame(0)) == ""

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"image": b"no image"}, "image unreadable"),
            ({"width": 17}, "image size differs from its description"),
            (
                {"depth": depth_of(make_frame(0), codes=np.ones((12, 15), np.float16))},
                "depth and image differ in shape",
            ),
            (
                {"depth": depth_of(make_frame(0), codes=np.full((12, 16), np.nan, np.float16))},
                "too little valid depth",
            ),
            (
                {"depth": depth_of(make_frame(0), codes=np.full((12, 16), np.inf, np.float16))},
                "too little valid depth",
            ),
            ({"depth": depth_of(make_frame(0), scale_m=10.0)}, "depth out of range"),
            ({"depth": depth_of(make_frame(0), scale_m=0.01)}, "depth out of range"),
        ],
    )
    def test_unusable_frames(self, changes: dict, reason: str) -> None:
        assert self.check(make_frame(0, **changes)) == reason

    @pytest.mark.parametrize(("bad", "most"), [(-np.inf, 0), (-1.0, 0), (0.0, 0), (11.0, 1)])
    def test_how_many_depths_may_be_out_of_range(self, bad: float, most: int) -> None:
        """Of 192: none that no depth can be, 1 % of those beyond what was expected."""
        frame = make_frame(0)
        codes = depth_of(frame).codes.copy()
        for number in range(most + 1):
            assert self.check(replace(frame, depth=depth_of(frame, codes=codes))) == ""
            codes[5, number] = bad
        assert self.check(replace(frame, depth=depth_of(frame, codes=codes))) == (
            "depth out of range"
        )

    def test_the_least_share_of_valid_depth(self) -> None:
        frame = make_frame(0)
        codes = np.full((12, 16), np.nan, np.float16)
        codes[:2, :] = 2.0  # one sixth
        frame = replace(frame, depth=depth_of(frame, codes=codes))
        check_frame(frame, TinyReader(), min_valid=1 / 6)
        with pytest.raises(BadFrame, match=r"too little valid depth: 16\.67%"):
            check_frame(frame, TinyReader(), min_valid=0.17)

    @pytest.mark.parametrize(("rows", "reason"), [(4, "depth mostly constant"), (3, "")])
    def test_constant_renderings(self, rows: int, reason: str) -> None:
        frame = make_frame(0)
        codes = np.linspace(1, 3, 192).astype(np.float16).reshape(12, 16)
        codes[:rows] = 5.0
        frame = replace(frame, depth=depth_of(frame, codes=codes))
        assert self.check(frame, RenderedReader()) == reason
        assert self.check(frame, TinyReader()) == ""

    def test_a_reader_that_breaks_its_contract_is_loud(self) -> None:
        with pytest.raises(ValueError, match="gave no depth"):
            check_frame(make_frame(0, depth=None), TinyReader())


class TestVerify:
    def test_an_intact_set(self, pristine: Path) -> None:
        found = verify(pristine)
        assert found.damage == []
        assert sum(samples for _, samples, _ in found.shards) == 21
        assert str(found).count(" ok") == len(found.shards)

    def test_any_flipped_byte_is_found(self, directory: Path) -> None:
        with ShardSet.open(directory) as shards:
            index = shards.index
        path = directory / index.shards[0].name
        good = path.read_bytes()
        places = [(len(good) - 1, "")]  # the trailer
        for i in range(index.shards[0].samples):
            for table in index.members.values():
                offset, length = table[i].tolist()
                if offset >= 0:
                    places.append((offset + length // 2, index.keys[i]))
        for position, key in places:
            data = bytearray(good)
            data[position] ^= 1
            path.write_bytes(bytes(data))
            damage = verify(directory).damage
            assert [(shard, found) for shard, found, _ in damage] == [(path.name, key)]

    def test_a_flipped_header_byte_is_found(self, directory: Path) -> None:
        path = directory / "tiny-000000.tar"
        data = bytearray(path.read_bytes())
        data[3] ^= 1  # the first member's name
        path.write_bytes(bytes(data))
        assert [row[:2] for row in verify(directory).damage] == [("tiny-000000.tar", "")]

    def test_truncated_and_missing_shards(self, directory: Path) -> None:
        with ShardSet.open(directory) as shards:
            last = int(shards.index.shards[1].samples + shards.index.shards[0].samples) - 1
            key = shards.keys[last]
        path = directory / "tiny-000001.tar"
        path.write_bytes(path.read_bytes()[:-2000])
        (directory / "tiny-000002.tar").unlink()
        found = verify(directory)
        assert [row[:2] for row in found.damage] == [
            ("tiny-000001.tar", ""),
            ("tiny-000001.tar", key),
            ("tiny-000002.tar", ""),
        ]
        assert f"damaged: tiny-000001.tar, sample {key}: " in str(found)


class TestLooking:
    def test_ls_lists_the_sets_below(self, directory: Path) -> None:
        write_set(str(directory.parent / "deep" / "other"), [make_frame(1)])
        lines = ls(directory.parent).splitlines()
        header = ["set", "data set", "kind", "samples", "scenes", "splits", "size", "bytes/frame"]
        assert lines[0].split() == " ".join(header).split()
        rows = {line.split()[0]: line.split() for line in lines[1:]}
        size = sum(path.stat().st_size for path in directory.glob("*.tar"))
        assert rows[str(directory)] == [
            str(directory),
            *("tiny", "depth", "21", "6", "train:9", "val:12"),
            *(f"{size / 1e6:.1f}", "MB", f"{size / 21:.0f}"),
        ]
        assert rows[str(directory.parent / "deep" / "other")][3:5] == ["1", "1"]

    def test_ls_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there is no shard set"):
            ls(tmp_path)

    def test_export_writes_planar_millimetres(self, directory: Path, tmp_path: Path) -> None:
        message = export(directory, tmp_path / "plain")
        assert message.startswith("wrote 21 samples")
        with ShardSet.open(directory) as shards:
            for i in range(len(shards)):
                raw = shards.read(i)
                assert raw.depth is not None
                stored = tmp_path / "plain" / "image" / f"{raw.key}.{raw.image_ext}"
                assert stored.read_bytes() == raw.image
                camera = json.loads((tmp_path / "plain/camera" / f"{raw.key}.json").read_text())
                assert camera["K_px"] == K_PX.tolist()
                with Image.open(tmp_path / "plain/depth" / f"{raw.key}.png") as image:
                    codes = np.array(image)
                assert codes.dtype == np.uint16
                depth_m = depth_metres(raw.depth, K_PX)
                unknown = np.isnan(depth_m)
                assert (codes[unknown] == 0).all()
                assert np.abs(codes[~unknown] / 1000 - depth_m[~unknown]).max() <= 0.000501

    def test_export_saturates_and_says_so(self, tmp_path: Path) -> None:
        codes = np.full((12, 16), 2.0, np.float16)
        codes[0, :5] = [np.nan, np.inf, 70.0, 65.5, 0.0001]
        depth = DepthCodes(codes=codes)
        write_set(str(tmp_path / "set"), [make_frame(1, depth=depth)])
        message = export(tmp_path / "set", tmp_path / "mm")
        assert "1 pixels with known depth lie beyond 65.535 m" in message
        with Image.open(next((tmp_path / "mm/depth").rglob("*.png"))) as image:
            assert np.array(image)[0, :6].tolist() == [0, 65535, 65535, 65500, 1, 2000]
        message = export(tmp_path / "set", tmp_path / "coarse", codes_per_metre=256.0)
        assert message.startswith("wrote 1 samples")
        assert "; 0 pixels" in message
        with Image.open(next((tmp_path / "coarse/depth").rglob("*.png"))) as image:
            assert np.array(image)[0, 2] == 70 * 256
        with pytest.raises(UserError, match="is not empty"):
            export(tmp_path / "set", tmp_path / "mm")


REDWOOD = [
    "folder",
    f"--raw={ROOT / 'tests/data/rgbd'}",
    "--image_glob=redwood/image/*.jpg",
    "--depth_glob=redwood/depth/*.png",
    "--depth_scale=0.001",
    "--intrinsics=[525,525,319.5,239.5]",
    "--workers=1",
]


class TestCommandLine:
    def test_genuine_frames_from_raw_to_plain_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "set"
        assert tool.main([*REDWOOD, f"--out={out}"]) == 0
        assert "frames           1 in 1 scenes" in capsys.readouterr().out
        assert tool.main(["verify", str(out)]) == 0
        assert tool.main(["ls", str(tmp_path)]) == 0
        assert tool.main(["export", str(out), f"--out={tmp_path / 'plain'}"]) == 0
        (depth,) = (tmp_path / "plain/depth").rglob("*.png")
        with (
            Image.open(depth) as got,
            Image.open(ROOT / "tests/data/rgbd/redwood/depth/00005.png") as want,
        ):
            np.testing.assert_array_equal(np.array(got), np.array(want))
        (image,) = (tmp_path / "plain/image").rglob("*.jpg")
        genuine = ROOT / "tests/data/rgbd/redwood/image/00005.jpg"
        assert image.read_bytes() == genuine.read_bytes()
        shard = out / "folder-000000.tar"
        shard.write_bytes(shard.read_bytes()[:-1])
        capsys.readouterr()
        assert tool.main(["verify", str(out)]) == 1
        assert "damaged: folder-000000.tar" in capsys.readouterr().out

    def test_parts_and_merge(self, tmp_path: Path) -> None:
        for part in ("1/2", "2/2"):
            assert tool.main([*REDWOOD, f"--out={tmp_path}", f"--part={part}"]) == 0
        assert tool.main(["merge", str(tmp_path)]) == 0
        with ShardSet.open(tmp_path) as shards:
            assert len(shards) == 1

    @pytest.mark.parametrize("command", [*tool.READERS, tool.PHOTOS])
    def test_help_names_every_option(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            tool.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(f"--{name}" in text for name in ("out", "workers", "part", "shard_mb"))
        assert ("--raw" in text) == (command != "rooms")

    def test_overview(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert tool.main([]) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in [*tool.READERS, "photos", "merge", "ls"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["hypersin"], "unknown command 'hypersin'; choose one of hypersim, vkitti2"),
            (["art", "--out=x"], "raw"),
            (["art", "--raw=x", "--out=x", "--wrkers=3"], "--wrkers=3"),
            (["art", "--raw=x", "--out=x", "--workers=three"], "three"),
            (["art", "--raw=x", "--out=x", "--part=2"], "--part must be i/n, such as 1/4"),
            (["merge", "a", "b"], "need --out"),
            (["verify"], "dir"),
        ],
    )
    def test_mistakes_are_one_sentence(self, arguments: list[str], message: str) -> None:
        with pytest.raises(UserError) as error:
            tool.main(arguments)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_mistake_exits_with_2_and_no_traceback(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: tool.main(["verify", str(tmp_path)]))
        assert stop.value.code == 2
        text = capsys.readouterr().err
        assert text.startswith("error: there is no shard set at")
        assert text.count("\n") == 1
