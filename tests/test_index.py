"""The index of a shard set: columns, what opening one looks at, and earlier versions."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from flatdepth.bench.index import as_lists, measure_openings
from flatdepth.data.sets import reindex, verify
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME
from flatdepth.data.shards.index import (
    BLOCK,
    Categories,
    Index,
    Shard,
    Strings,
    checksum,
    concatenate,
    parsed_columns,
    sign,
)
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.write import Output, write_index
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY, TinySets, edit_index

Arrays = dict[str, np.ndarray]


@pytest.fixture
def directory(tiny_sets: TinySets, tmp_path: Path) -> Path:
    """A set that the test may damage."""
    return Path(shutil.copytree(tiny_sets.rooms, tmp_path / "set"))


def rewrite(directory: Path, change: Callable[[dict, Arrays], object]) -> None:
    """Change ``index.json`` and the columns, as somebody would who knows the format."""
    document = json.loads((directory / INDEX_NAME).read_bytes())
    columns = safetensors.numpy.load_file(directory / COLUMNS_NAME)
    columns = {name: column.copy() for name, column in columns.items()}
    change(document, columns)
    for name in document.get("columns", {}):
        document["columns"][name] = checksum(columns.get(name, np.zeros(1)))
    (directory / COLUMNS_NAME).write_bytes(safetensors.numpy.save(columns))
    (directory / INDEX_NAME).write_bytes(sign(document))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), st.data())
def test_strings_and_categories_are_the_lists_they_were_made_of(
    values: list[str], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(values)))
    for kind in (Strings, Categories):
        whole = kind.of(values)
        joined = kind.joined([kind.of(values[:cut]), kind.of(()), kind.of(values[cut:])])
        for one in (whole, joined):
            assert list(one) == values and one[1:-1] == values[1:-1] and len(one) == len(values)
            assert [one[-i] for i in range(1, len(values) + 1)] == values[::-1]
    names = Categories.of(values)
    assert names.isin(values[:cut]).tolist() == [value in values[:cut] for value in values]
    assert names.counts() == {value: values.count(value) for value in values}
    assert names.counts(slice(cut, None)) == {v: values[cut:].count(v) for v in values[cut:]}


def test_equal_content_gives_equal_bytes_and_comes_back(directory: Path) -> None:
    files = tuple((directory / name).read_bytes() for name in (INDEX_NAME, COLUMNS_NAME))
    read = Index.from_bytes(files[0], lambda _: parsed_columns(files[1]), "x")
    assert read.to_bytes() == files
    assert ShardSet.open(directory).index.to_bytes() == files
    parts = [replace(read, skipped={}), replace(read, skipped={"bad": 1})]
    both = concatenate(parts, {})
    assert list(both.keys) == [*read.keys, *read.keys] and both.skipped == {"bad": 1}
    assert both.shard_of(np.arange(len(both))).tolist() == [
        number for number, shard in enumerate(both.shards) for _ in range(shard.samples)
    ]


def test_rows_lie_in_their_shards_and_spans_hold_their_members(directory: Path) -> None:
    index = ShardSet.open(directory).index
    rows = [row for number in range(len(index.shards)) for row in index.rows_of(number)]
    assert rows == list(range(len(index)))
    for i in rows:
        start, end = index.span(i)
        places = [table[i].tolist() for table in index.members.values() if table[i, 0] >= 0]
        assert start == min(offset for offset, _ in places)
        assert end == max(offset + length for offset, length in places)


def at(path: str, value: object) -> Callable[[dict, Arrays], None]:
    """Set an entry of the document."""

    def change(document: dict, _: Arrays) -> None:
        *parents, last = path.split(".")
        for name in parents:
            document = document[int(name) if isinstance(document, list) else name]
        document[int(last) if isinstance(document, list) else last] = value

    return change


def column(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict, Arrays], None]:
    """Put another column in a column's place."""

    def change(_: dict, columns: Arrays) -> None:
        columns[name] = np.ascontiguousarray(make(columns[name]))

    return change


@pytest.mark.parametrize(
    "change",
    [
        at("format", "other"),
        at("version", 99),
        at("version", 1),
        at("kind", "pictures"),
        at("dataset", "../tiny"),
        at("shards.0.name", "../../etc/passwd"),
        at("shards.0.name", "/abs-000000.tar"),
        at("shards.0.samples", 1000),
        at("shards.0.samples", -1),
        at("shards.0.samples", 10**30),
        at("shards.0.bytes", "many"),
        at("shards", None),
        at("skipped", []),
        lambda document, _: document.pop("columns"),
        lambda _, columns: columns.pop("key.end"),
        lambda _, columns: columns.pop("scene.bytes"),
        lambda _, columns: columns.pop("member.json"),
        lambda document, _: document["blocks"].append(0),
        column("size", lambda x: x[:-1]),
        column("size", lambda x: x.astype(np.int64)),
        column("crc32", lambda x: x[:, None]),
        column("key.bytes", lambda x: x[:-1]),
        column("key.end", lambda x: x.astype(np.int32)),
        column("scene.code", lambda x: x + 100),
        column("scene.code", lambda x: x - 1),
        column("split.code", lambda x: x[:0]),
        column("member.json", lambda x: x[:, :1]),
    ],
)
def test_contradictions_are_refused(
    directory: Path, change: Callable[[dict, Arrays], object]
) -> None:
    rewrite(directory, change)
    with pytest.raises(UserError, match=r"index\.json is not a usable shard index"):
        ShardSet.open(directory)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}'])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(data)
    with pytest.raises(UserError, match=r"index\.json is not a usable shard index"):
        ShardSet.open(tmp_path)


def test_samples_are_counted_from_the_end_too(directory: Path) -> None:
    with ShardSet.open(directory) as shards:
        assert shards.read(-1).key == shards.keys[14] and shards.read_bytes(-15)
        assert shards.members(-2) == shards.members(13)
        for outside in (15, -16):
            with pytest.raises(IndexError):
                shards.read(outside)


def test_missing_and_foreign_columns_are_named(directory: Path) -> None:
    good = (directory / COLUMNS_NAME).read_bytes()
    for data in (b"", good[:-1], good + b"x", b"\xff" * 40):
        (directory / COLUMNS_NAME).write_bytes(data)
        with pytest.raises(UserError, match=r"usable shard index \(index\.safetensors is damaged"):
            ShardSet.open(directory)
    (directory / COLUMNS_NAME).unlink()
    with pytest.raises(UserError, match=r"cannot read .*index\.safetensors.*copy it there or pack"):
        ShardSet.open(directory)


def test_no_flipped_bit_of_the_columns_goes_unseen(directory: Path) -> None:
    """In some 40 bytes of every column: opening finds it, or reading every sample, and verify."""
    columns = safetensors.numpy.load_file(directory / COLUMNS_NAME)
    for name, values in columns.items():
        for place in range(0, values.nbytes, max(1, values.nbytes // 40)):
            own = {**columns, name: values.copy()}
            own[name].reshape(-1).view(np.uint8)[place] ^= 1 << place % 8
            (directory / COLUMNS_NAME).write_bytes(safetensors.numpy.save(own))
            try:
                shards = ShardSet.open(directory)
            except UserError:
                continue
            for i in (0, 14):
                with pytest.raises(UserError, match="rows 0 and on are damaged"):
                    shards.read(i)
    crc32 = columns["crc32"] ^ np.uint32(1)
    (directory / COLUMNS_NAME).write_bytes(safetensors.numpy.save({**columns, "crc32": crc32}))
    assert "index.safetensors: the checksum of rows 0 and on differs" in str(verify(directory))


def test_a_key_twice_is_found_by_verify(directory: Path) -> None:
    keys = ShardSet.open(directory).keys
    edit_index(directory, keys=Strings(np.full_like(keys.data, ord("k")), keys.ends))
    assert "index.safetensors: a key twice" in str(verify(directory))


def test_many_rows_have_a_checksum_per_block() -> None:
    n = 10_000
    crc32 = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32)
    index = Index(
        dataset="many",
        kind="art",
        request={},
        skipped={},
        shards=(Shard(name="many-000000.tar", bytes=10**6, sha256="", samples=n),),
        keys=Strings.of(f"k{i}" for i in range(n)),
        scenes=Categories.of([""] * n),
        splits=Categories.of([""] * n),
        sizes=np.ones((n, 2), np.int32),
        crc32=crc32,
    )
    document, columns = index.to_bytes()
    read = Index.from_bytes(document, lambda _: parsed_columns(columns), "x")
    assert [read.block_checksum(b) for b in range(3)] == list(read.blocks)
    for row in (0, BLOCK - 1, BLOCK, 2 * BLOCK, n - 1):
        other = crc32.copy()
        other[row] ^= 1
        changed = replace(read, crc32=other)
        differ = [b for b in range(3) if changed.block_checksum(b) != read.blocks[b]]
        assert differ == [row // BLOCK]


def set_of_version(directory: Path, version: int, **changes: object) -> Path:
    """Give a set the index of an earlier version, with entries of its samples changed."""
    document: dict = as_lists(ShardSet.open(directory).index, version)
    for path, value in changes.items():
        at(path.replace("__", "."), value)(document["samples"], {})
    data = sign(document) if version == 2 else json.dumps(document).encode()
    (directory / INDEX_NAME).write_bytes(data)
    (directory / COLUMNS_NAME).unlink()
    return directory


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_are_read_and_given_columns(directory: Path, version: int) -> None:
    files = {name: (directory / name).read_bytes() for name in (INDEX_NAME, COLUMNS_NAME)}
    set_of_version(directory, version)
    assert ShardSet.open(directory).index.to_bytes() == tuple(files.values())
    assert "wrote the index of 15 samples anew" in reindex(directory)
    assert {name: (directory / name).read_bytes() for name in files} == files
    assert "is of this version already" in reindex(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"key__0": "../../x"},
        {"key__1": "room_0000/frame_00"},
        {"key": []},
        {"shard__0": 1},
        {"height__0": 0},
        {"width__0": 1.5},
        {"crc32__0": 2**32},
        {"members__json__offset__0": -1},
        {"members__json__offset__0": 10**9},
        {"members__json__length__0": -5},
        {"members__json__length__0": 10**30},
        {"members__pickle": {"offset": [], "length": []}},
    ],
)
def test_contradictions_of_earlier_versions_are_refused(
    directory: Path, changes: Mapping[str, object]
) -> None:
    assert ShardSet.open(directory).keys[0] == "room_0000/frame_00"
    set_of_version(directory, 2, **changes)
    with pytest.raises(UserError, match=r"index\.json is not a usable shard index"):
        ShardSet.open(directory)


def test_columns_of_a_remote_set_are_downloaded_once(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/set"
    store.put(f"{directory}/*", f"{url}/")
    with ShardSet.open(url) as remote, ShardSet.open(directory) as local:
        assert [remote.read_bytes(i) for i in range(15)] == [local.read_bytes(i) for i in range(15)]
    (kept,) = (tmp_path / "cache").glob("index-*.safetensors")
    assert kept.read_bytes() == (directory / COLUMNS_NAME).read_bytes()
    store.rm(f"{url}/{COLUMNS_NAME}")
    assert len(ShardSet.open(url)) == 15
    edit_index(directory, splits=Categories.of(["val"] * 15))
    store.put(f"{directory}/*", f"{url}/")
    assert ShardSet.open(url).splits.counts() == {"val": 15}
    for kept in (tmp_path / "cache").glob("index-*.safetensors"):
        kept.write_bytes(kept.read_bytes().replace(b"room_0004/frame_02", b"room_0004/frame_20"))
    with pytest.raises(
        UserError, match=r"are damaged .*or delete the copy of its index in .*cache"
    ):
        ShardSet.open(url).read(0)
    assert " ok" in str(verify(url)) and "damaged" not in str(verify(url))
    monkeypatch.setenv("FLATDEPTH_CACHE", f"{directory / INDEX_NAME}/x")
    with pytest.raises(UserError, match="set FLATDEPTH_CACHE to a directory"):
        ShardSet.open(url)


def test_the_committed_sets_have_columns() -> None:
    for name in ("rooms-train", "flatbench", "demo_art"):
        assert (REPOSITORY / "shards" / name / COLUMNS_NAME).is_file()
        assert ShardSet.open(REPOSITORY / "shards" / name).index.blocks


def test_an_index_is_published_columns_first(tiny_sets: TinySets, tmp_path: Path) -> None:
    written: list[str] = []

    class Spy(Output):
        def write(self, name: str, data: bytes) -> None:
            written.append(name)
            super().write(name, data)

    write_index(Spy(str(tmp_path / "out")), ShardSet.open(tiny_sets.rooms).index)
    assert written == [COLUMNS_NAME, INDEX_NAME]


def test_a_large_set_is_opened_within_its_memory() -> None:
    """In an address space that the rows as Python objects would not fit into."""
    found = measure_openings(100_000)
    assert [(one.rows, one.samples, one.capped) for one in found] == [
        ("JSON", 100_000, False),
        ("columns", 100_000, True),
    ]
    assert found[1].index_mb < 0.2 * found[0].index_mb
