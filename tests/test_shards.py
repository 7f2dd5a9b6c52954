"""Shard sets: standard tars, range reads, remote sets, key safety and damage."""

import io
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flatdepth.data.shards import INDEX_NAME, is_key
from flatdepth.data.shards import read as read_module
from flatdepth.data.shards.codec import decode_depth, depth_meta
from flatdepth.data.shards.index import Index
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.write import Output, SetWriter, Skip, encode_sample
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import DepthCodes, RawFrame
from tests.conftest import edit_index

K_PX = np.array([[30.0, 0.5, 8.25], [0.0, 31.0, 6.0], [0.0, 0.0, 1.0]])


def make_frame(i: int, key: str | None = None, **changes: object) -> RawFrame:
    """A small frame that differs from every other ``i``; 16x12, depth 1..3 m."""
    rng = np.random.default_rng(i)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG" if i % 3 else "WEBP", lossless=True)
    codes = rng.uniform(1, 3, (12, 16)).astype(np.float16)
    codes[0, i % 16] = np.nan
    fields = {
        "key": key or f"scene_{i // 4:02d}/cam_00/{i:04d}",
        "dataset": "tiny",
        "scene": f"scene_{i // 4:02d}",
        "image": buffer.getvalue(),
        "image_ext": "png" if i % 3 else "webp",
        "width": 16,
        "height": 12,
        "depth": DepthCodes(codes=codes, quantity="distance"),
        "K_px": K_PX,
        "split": "train" if i % 2 else "val",
        "meta": {"number": i, "source": f"raw/é{i}.png"},
    }
    return RawFrame(**(fields | changes))


def write_set(url: str, frames: list[RawFrame], shard_bytes: int = 12_000) -> Index:
    writer = SetWriter(
        Output(url), dataset="tiny", kind="depth", request={}, shard_bytes=shard_bytes
    )
    for item, frame in enumerate(frames):
        writer.add(item, encode_sample(frame))
    return writer.finish(len(frames))


def assert_same_frame(got: RawFrame, want: RawFrame) -> None:
    assert got.depth is not None
    assert want.depth is not None
    assert got.K_px is not None
    assert (got.depth.codes.view(np.uint16) == want.depth.codes.view(np.uint16)).all()
    assert depth_meta(got.depth) == depth_meta(want.depth)
    np.testing.assert_array_equal(got.K_px, want.K_px)
    names = ("key", "dataset", "scene", "image", "image_ext", "width", "height", "split", "meta")
    assert {n: getattr(got, n) for n in names} == {n: getattr(want, n) for n in names}


@pytest.fixture(scope="module")
def frames() -> list[RawFrame]:
    return [make_frame(i) for i in range(20)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, frames: list[RawFrame]) -> Path:
    path = tmp_path_factory.mktemp("pristine")
    write_set(str(path), frames)
    return path


@pytest.fixture
def directory(tmp_path: Path, pristine: Path) -> Path:
    """A set that the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "set"))


class TestReading:
    def test_frames_come_back_in_any_order(self, directory: Path, frames: list[RawFrame]) -> None:
        with ShardSet.open(directory) as shards:
            assert len(shards.index.shards) > 2
            assert len(shards) == len(frames)
            for i in np.random.default_rng(0).permutation(len(frames)):
                assert_same_frame(shards.read(i), frames[i])

    def test_columns(self, directory: Path, frames: list[RawFrame]) -> None:
        with ShardSet.open(directory / INDEX_NAME) as shards:
            assert (shards.dataset, shards.kind) == ("tiny", "depth")
            assert list(shards.keys) == [f.key for f in frames]
            assert list(shards.scenes) == [f.scene for f in frames]
            assert list(shards.splits) == [f.split for f in frames]
            assert shards.sizes.tolist() == [[12, 16]] * len(frames)

    def test_threads_read_what_one_thread_reads(self, directory: Path) -> None:
        with ShardSet.open(directory) as shards, ThreadPoolExecutor(8) as pool:
            numbers = list(range(len(shards))) * 20
            blobs = list(pool.map(shards.read_bytes, numbers))
            assert blobs == [shards.read_bytes(i) for i in numbers]

    def test_more_shards_than_descriptors(
        self, directory: Path, frames: list[RawFrame], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(read_module, "_MAX_DESCRIPTORS", 1)
        with ShardSet.open(directory) as shards:
            for i, frame in enumerate(frames):
                assert_same_frame(shards.read(i), frame)
            assert len(shards._descriptors) == 1

    def test_a_remote_set_has_the_same_bytes(
        self, directory: Path, frames: list[RawFrame], tmp_path: Path
    ) -> None:
        url = f"memory://{tmp_path.name}/set"
        write_set(url, frames)
        store = fsspec.filesystem("memory")
        names = sorted(path.rsplit("/", 1)[1] for path in store.find(url))
        assert names == sorted(path.name for path in directory.iterdir())
        for name in names:
            assert store.cat_file(f"{url}/{name}") == (directory / name).read_bytes()
        with ShardSet.open(url) as shards:
            for i, frame in enumerate(frames):
                assert_same_frame(shards.read(i), frame)
            store.pipe_file(f"{url}/tiny-000000.tar", b"short")
            with pytest.raises(UserError, match=r"tiny-000000\.tar is truncated"):
                shards.read(0)
            store.rm(f"{url}/tiny-000000.tar")
            with pytest.raises(UserError, match=r"cannot read shard .*tiny-000000\.tar"):
                shards.read(0)


# webdataset leaves its files to the garbage collector.
unclosed = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


class TestTars:
    @unclosed
    def test_webdataset_reads_the_same_bytes(self, directory: Path, frames: list[RawFrame]) -> None:
        urls = sorted(str(path) for path in directory.glob("*.tar"))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        with ShardSet.open(directory) as shards:
            assert [sample["__key__"] for sample in samples] == list(shards.keys)
            for i, sample in enumerate(samples):
                raw = shards.read(i)
                assert sample[raw.image_ext] == raw.image == frames[i].image
                about = json.loads(sample["json"])
                assert about["K_px"] == K_PX.tolist()
                assert raw.depth is not None
                codes = decode_depth(sample["depth.fdz"], about["depth"]).codes
                np.testing.assert_array_equal(
                    codes.view(np.uint16), raw.depth.codes.view(np.uint16)
                )

    def test_headers_say_nothing_about_the_machine(self, directory: Path) -> None:
        for path in directory.glob("*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    owner = (member.uid, member.gid, member.uname, member.gname)
                    assert (*owner, member.mtime, member.mode) == (0, 0, "", "", 0, 0o644)
                    assert member.pax_headers == {}

    def test_a_shard_is_what_tarfile_writes(self, tmp_path: Path, frames: list[RawFrame]) -> None:
        """The bytes of a plain USTAR archive, as sets have had them from the first version on."""
        write_set(str(tmp_path), frames, shard_bytes=2**30)
        oracle = io.BytesIO()
        with tarfile.open(fileobj=oracle, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for frame in frames:
                for ext, data in encode_sample(frame).members:
                    member = tarfile.TarInfo(f"{frame.key}.{ext}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            end = tar.offset + 2 * tarfile.BLOCKSIZE
        assert (tmp_path / "tiny-000000.tar").read_bytes() == oracle.getvalue()[:end]

    @pytest.mark.parametrize(
        "key",
        [
            "bücher/räume/0001",
            "/".join(["directory_with_a_long_name"] * 9) + "/0001",
            "x" * 120,
            "scene.v2/cam.left/0001",
        ],
    )
    @unclosed
    def test_unusual_keys(self, tmp_path: Path, key: str) -> None:
        frame = make_frame(0, key=key)
        write_set(str(tmp_path), [frame])
        (sample,) = webdataset.WebDataset([str(tmp_path / "tiny-000000.tar")], shardshuffle=False)
        assert sample["__key__"] == key
        assert sample["webp"] == frame.image
        with ShardSet.open(tmp_path) as shards:
            assert_same_frame(shards.read(0), frame)

    def test_shards_fill_up_to_the_limit(self, tmp_path: Path, frames: list[RawFrame]) -> None:
        limit = 12_000
        index = write_set(str(tmp_path), frames, shard_bytes=limit)
        trailer = 1024
        for shard, following in zip(index.shards, index.shards[1:], strict=False):
            assert shard.bytes - trailer <= limit
            with tarfile.open(tmp_path / following.name) as tar:
                key = tar.getnames()[0].split(".")[0]
                sizes = [m.size for m in tar if m.name.split(".")[0] == key]
            first = sum(512 + -(-size // 512) * 512 for size in sizes)
            assert shard.bytes - trailer + first > limit

    def test_a_sample_larger_than_a_shard_has_its_own(
        self, tmp_path: Path, frames: list[RawFrame]
    ) -> None:
        index = write_set(str(tmp_path), frames[:4], shard_bytes=1)
        assert [shard.samples for shard in index.shards] == [1, 1, 1, 1]


class TestKeys:
    @given(st.text(st.sampled_from("ab./\\:\n\0é\ud800"), max_size=9))
    def test_a_key_stays_below_its_root_and_names_one_sample(self, key: str) -> None:
        if not is_key(key):
            return
        path = PurePosixPath("/set", key)
        assert ".." not in path.parts
        assert str(path) == f"/set/{key}"
        assert webdataset.tariterators.base_plus_ext(f"{key}.depth.fdz") == (key, "depth.fdz")

    @pytest.mark.parametrize(
        "key", ["a", "a/b", "ai_001_001/cam_00/0000", "v1.2/x", "é/ü", "..a/b"]
    )
    def test_ordinary_keys(self, key: str) -> None:
        assert is_key(key)

    @pytest.mark.parametrize(
        "key",
        ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a/..", "a.b", "C:/a", "a\\b", "a\n"],
    )
    def test_dangerous_keys(self, key: str) -> None:
        assert not is_key(key)
        with pytest.raises(BadFrame, match="key cannot name a file"):
            encode_sample(replace(make_frame(0), key=key))

    def test_unusable_frames_are_bad(self) -> None:
        with pytest.raises(BadFrame, match="unsupported type"):
            encode_sample(make_frame(0, image_ext="gif"))
        for K_px in (K_PX.T, -K_PX, np.full((3, 3), np.nan), 2 * K_PX):
            with pytest.raises(BadFrame, match="intrinsics unusable"):
                encode_sample(make_frame(0, K_px=K_px))

    def test_a_data_set_name_must_name_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot name files"):
            SetWriter(Output(str(tmp_path)), dataset="../x", kind="art", request={}, shard_bytes=1)


class TestDamage:
    def test_a_truncated_shard_is_found_on_opening(self, directory: Path) -> None:
        path = directory / "tiny-000001.tar"
        path.write_bytes(path.read_bytes()[:-700])
        with pytest.raises(UserError, match=r"tiny-000001\.tar has \d+ bytes where its index"):
            ShardSet.open(directory)

    def test_a_missing_shard_is_found_on_opening(self, directory: Path) -> None:
        (directory / "tiny-000001.tar").unlink()
        with pytest.raises(UserError, match=r"tiny-000001\.tar is missing"):
            ShardSet.open(directory)

    def test_a_shard_truncated_later_is_found_on_reading(self, directory: Path) -> None:
        with ShardSet.open(directory) as shards:
            path = directory / shards.index.shards[-1].name
            path.write_bytes(path.read_bytes()[:1000])
            with pytest.raises(UserError, match=r"\.tar is truncated: sample scene_04/cam_00/0019"):
                shards.read(19)

    def test_a_damaged_member_names_shard_and_sample(self, directory: Path) -> None:
        with ShardSet.open(directory) as shards:
            for ext in ("depth.fdz", "json"):
                offset, length = shards.index.members[ext][6].tolist()
                path = directory / shards.index.shards[shards.index.shard_of(6)].name
                data = bytearray(path.read_bytes())
                data[offset + length // 2] ^= 0x80
                good = path.read_bytes()
                path.write_bytes(bytes(data))
                with pytest.raises(UserError, match=rf"{path.name}: sample {shards.keys[6]} is"):
                    shards.read(6)
                path.write_bytes(good)

    def test_no_flipped_bit_becomes_an_image(self, directory: Path) -> None:
        """At every eighth byte of a sample, pixels included: each is found, none decoded."""
        with ShardSet.open(directory) as shards:
            path = directory / shards.index.shards[shards.index.shard_of(6)].name
            good = path.read_bytes()
            start, end = shards.index.span(6)
            for position in range(start, end, 8):
                data = bytearray(good)
                data[position] ^= 1 << position % 8
                path.write_bytes(bytes(data))
                with pytest.raises(UserError, match=rf"{path.name}: sample {shards.keys[6]} is"):
                    shards.read(6)
            path.write_bytes(good)
            shards.read(6)

    def test_an_index_nested_without_end_is_no_index(self, directory: Path) -> None:
        (directory / INDEX_NAME).write_text("[" * 100_000)
        with pytest.raises(UserError, match="not a usable shard index"):
            ShardSet.open(directory)

    def test_another_samples_bytes_are_not_taken(
        self, directory: Path, frames: list[RawFrame]
    ) -> None:
        members = ShardSet.open(directory).index.members
        order = np.arange(len(frames))
        order[[1, 4]] = order[[4, 1]]
        edit_index(directory, members={ext: table[order] for ext, table in members.items()})
        with (
            ShardSet.open(directory) as shards,
            pytest.raises(UserError, match=f"sample {shards.keys[1]} is damaged"),
        ):
            shards.read(1)


class TestNoSet:
    def test_nothing_there(self, tmp_path: Path) -> None:
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(UserError, match=r"make one with: flatdepth pack"):
                ShardSet.open(place)

    def test_unfinished(self, tmp_path: Path) -> None:
        writer = SetWriter(
            Output(str(tmp_path)), dataset="tiny", kind="depth", request={}, shard_bytes=10_000
        )
        writer.add(0, encode_sample(make_frame(0)))
        with pytest.raises(UserError, match="is not finished; run the same pack command"):
            ShardSet.open(tmp_path)
        writer.abandon()

    def test_one_level_too_high(self, directory: Path) -> None:
        with pytest.raises(UserError, match=r"name one below it \(set\)"):
            ShardSet.open(directory.parent)

    def test_unknown_protocol(self) -> None:
        with pytest.raises(UserError, match="cannot open 'nope://x'"):
            ShardSet.open("nope://x")


def test_members_of_a_later_version_are_passed_over_with_a_note(
    directory: Path, frames: list[RawFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    members = ShardSet.open(directory).index.members
    edit_index(directory, members={**members, "later.bin": members["json"]})
    assert_same_frame(ShardSet.open(directory).read(3), frames[3])
    assert ".later.bin" in capsys.readouterr().err


def test_skips_are_listed_and_counted(tmp_path: Path) -> None:
    writer = SetWriter(
        Output(str(tmp_path)), dataset="tiny", kind="depth", request={}, shard_bytes=1
    )
    writer.skip(Skip(key="a", reason="bad", detail="first"))
    writer.add(1, encode_sample(make_frame(0)))
    writer.skip(Skip(key="b", reason="worse"))
    writer.add(3, encode_sample(make_frame(1)))
    writer.skip(Skip(key="c", reason="bad"))
    index = writer.finish(5)
    assert index.skipped == {"bad": 2, "worse": 1}
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"], row["detail"]) for row in rows] == [
        ("a", "bad", "first"),
        ("b", "worse", ""),
        ("c", "bad", ""),
    ]
