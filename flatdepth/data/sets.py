"""Looking after shard sets: checking, indexing anew, listing, exporting."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from flatdepth.cli import cpus
from flatdepth.data.pack import check_workers, megabytes, text_table
from flatdepth.data.progress import Progress
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME, WORK_DIR
from flatdepth.data.shards.codec import decode_frame, encode_map
from flatdepth.data.shards.index import BLOCK, Index, check_rows
from flatdepth.data.shards.read import ShardSet, resolve
from flatdepth.data.shards.write import Output, write_index
from flatdepth.errors import UserError, expect_within
from flatdepth.types import RawFrame


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
            rows.append((name, str(samples), megabytes(size), state))
        lines = [text_table(rows)]
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
    check_workers(workers)
    with ShardSet.open(url, check_sizes=False, use_cache=False) as shards:
        numbers = range(len(shards.index.shards))
        with (
            Progress(shards.dataset, len(shards)) as progress,
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
                megabytes(size),
                f"{size / len(shards):.0f}" if len(shards) else "-",
            )
        )
    return text_table(rows)


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
    check_workers(workers)
    root = Path(out)
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    with (
        ShardSet.open(url) as shards,
        Progress(shards.dataset, len(shards)) as progress,
        _threads(workers) as pool,
    ):

        def write(i: int) -> int:
            beyond = _export_sample(shards.read(i), root, codes_per_metre)
            progress.step()
            return beyond

        saturated = sum(pool.map(write, range(len(shards))))
        return (
            f"wrote {len(shards)} samples to {out}; {saturated} pixels with known depth lie "
            f"beyond {65535 / codes_per_metre:g} m and share code 65535 with the sky"
        )


@contextmanager
def _threads(workers: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool that is left at once where something goes wrong; what is not begun is dropped."""
    pool = ThreadPoolExecutor(workers or cpus())
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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


def _verify_shard(shards: ShardSet, number: int, progress: Progress) -> list[tuple[str, str, str]]:
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
        progress.step()
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
    found = sorted(
        path
        for path in fs.find(root)
        if path.endswith(f"/{INDEX_NAME}") and f"/{WORK_DIR}/" not in path
    )
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
