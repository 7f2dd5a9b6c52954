"""Damaged input: 200 seeded files to predict and pack, arrays to the readers, shards to verify.

Everywhere the same law: each bad file is named in one line, none ends the run, the good ones are
all done, the exit code says so, and memory stays bounded whatever a header announces.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import pillow_heif
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import ArrayLike
from PIL import Image

from flatdepth.commands import pack as tool
from flatdepth.data.pack import pack
from flatdepth.data.readers.art import ArtReader
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.sets import verify
from flatdepth.data.shards import COLUMNS_NAME, INDEX_NAME
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY, edit_index
from tests.test_predict import command, run

pillow_heif.register_heif_opener()

WEIGHTS = REPOSITORY / "shards" / "demo_vitt.safetensors"
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "TIFF": "tif", "BMP": "bmp"}
KINDS["PPM"] = "ppm"
HEIGHT, WIDTH = 30, 40


def encoded(kind: str, seed: int, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), kind, **options)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by its header (bits per sample, colour type) and further chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (header, *chunks, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + check
    return content


def announcing(width: int, height: int) -> dict[str, bytes]:
    """Files that announce a size and hold next to nothing."""
    nothing = (b"IDAT", zlib.compress(bytes(99)))
    fields = (60, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)
    files = {
        "png": png(width, height, 8, 2, nothing),
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", *fields) + bytes(9),
        "ppm": f"P6 {width} {height} 255 ".encode() + bytes(9),
    }
    jpeg = bytearray(encoded("JPEG", 0))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    tiff = bytearray(encoded("TIFF", 0))
    (directory,) = struct.unpack_from("<I", tiff, 4)
    for tag, value in ((0, width), (1, height)):
        struct.pack_into("<HHII", tiff, directory + 2 + 12 * tag, 256 + tag, 4, 1, value)
    return files | {"jpg": bytes(jpeg), "tif": bytes(tiff)}


def bombs() -> dict[str, bytes]:
    """Small files that would fill the memory: pixels beyond the limit, or text of 200 MB."""
    files = {}
    sizes = ((60_000, 60_000), (2**30, 2**30), (9000, 9000), (2**31 - 1, 1), (1, 2**26 + 1))
    for width, height in sizes:
        for suffix, content in announcing(width, height).items():
            if suffix != "jpg" or min(width, height) > 8192:
                files[f"huge_{suffix}_{width}x{height}.{suffix}"] = content
    packed = zlib.compress(bytes(200_000_000), 1)
    files["rows.png"] = png(9000, 9000, 8, 2, (b"IDAT", packed))
    files["text.png"] = png(9, 9, 8, 2, (b"zTXt", b"a\0\0" + packed))
    return files


def damaged_files(seed: int) -> dict[str, bytes]:
    """200 files that hold no usable picture, by name (bytes that are no UTF-8 are surrogates)."""
    draw = np.random.default_rng(seed)
    files = bombs()
    for kind, suffix in KINDS.items():
        for number in range(16):
            content = encoded(kind, number)
            cut = int(draw.uniform(0.005, 0.9) * len(content))
            files[f"truncated_{suffix}{number}.{suffix}"] = content[:cut]
        files[f"empty_{suffix}.{suffix}"] = b""
        files[f"zeros_{suffix}.{suffix}"] = bytes(5000)
        files[f"headless_{suffix}.{suffix}"] = encoded(kind, 0)[40:]
        for number in range(3):
            files[f"random_{suffix}{number}.{suffix}"] = draw.bytes(2000)
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    others = [
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
        saved(Image.new("RGB", (9, 9)), "ICO"),
        b"%PDF-1.7\n1 0 obj\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"PK\x03\x04" * 99,
        b"#!/bin/sh\nexit 1\n",
        b"\x93NUMPY\x01\x00",
        "Ümläute\n".encode(),
        b"\n" * 10,
    ]
    files |= {f"other{number}.jpg": content for number, content in enumerate(others)}
    for name in ("odd\nname\x1b[31m.png", "caf\udce9.png", "-rf.png", "two  words.png", "日本.png"):
        files[name] = b"junk"
    for number in range(200 - len(files)):
        files[f"cut{number}.jpg"] = encoded("JPEG", 50 + number)[: 30 + 20 * number]
    assert len(files) == 200
    return files


def decodes(data: bytes) -> bool:
    """Whether Pillow itself reads a picture."""
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return False
    return True


def good_files() -> dict[str, bytes]:
    """Pictures in unusual modes and formats, all of them fine."""
    draw = np.random.default_rng(3)
    grey = draw.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    colour = Image.fromarray(draw.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    rgba = colour.copy()
    rgba.putalpha(Image.fromarray(grey))
    palette = colour.quantize(16)
    more = {"save_all": True, "append_images": [rgba.rotate(180), rgba]}
    rows16 = draw.bytes(HEIGHT * (1 + WIDTH * 6)).translate(bytes(256))  # filter 0, black
    ycc = saved(colour.convert("YCbCr"), "TIFF")
    return {
        "bits.png": saved(Image.fromarray(grey).convert("1"), "PNG"),
        "grey.jpg": saved(Image.fromarray(grey), "JPEG"),
        "grey16.png": saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "grey16_tif.tif": saved(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "grey32.tif": saved(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
        "rgb16.png": png(WIDTH, HEIGHT, 16, 2, (b"IDAT", zlib.compress(rows16))),
        "grey_alpha.png": saved(Image.fromarray(grey).convert("LA"), "PNG"),
        "palette.png": saved(palette, "PNG"),
        "see_through.png": saved(palette, "PNG", transparency=3),
        "rgba.png": saved(rgba, "PNG"),
        "rgba_webp.webp": saved(rgba, "WEBP"),
        "rgba_tif.tif": saved(rgba, "TIFF"),
        "cmyk.jpg": saved(colour.convert("CMYK"), "JPEG"),
        "cmyk_tif.tif": saved(colour.convert("CMYK"), "TIFF"),
        **({"ycc.tif": ycc} if decodes(ycc) else {}),  # Pillow 12.3 does not, 13 does
        "animated.png": saved(rgba, "PNG", **more),
        "animated_webp.webp": saved(rgba, "WEBP", **more),
        "pages.tif": saved(rgba, "TIFF", **more),
        "progressive.jpg": saved(colour, "JPEG", progressive=True, exif=b"Exif\0\0junk"),
        "bmp.bmp": saved(colour, "BMP"),
        "ppm.ppm": saved(colour, "PPM"),
        "UPPER.JPG": saved(colour, "JPEG"),
        "grün ß.jpg": saved(colour, "JPEG"),
        "th\udce8.jpg": saved(colour, "JPEG"),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 200 damaged files, the good ones, and directories named as pictures."""
    folder = tmp_path_factory.mktemp("damaged")
    write(folder, damaged_files(7) | good_files())
    (folder / "directory.png").mkdir()
    (folder / "full.jpg").mkdir()
    (folder / "full.jpg" / "inside.jpg").write_bytes(encoded("JPEG", 1))
    return folder


GOOD = len(good_files()) + 1


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# Predict.


def test_predict_names_200_damaged_files_and_does_the_others(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "in")
    heic = {f"heic{cut}.heic": encoded("HEIF", cut)[: 8 + 150 * cut] for cut in range(5)}
    links = {"broken_link.jpg": folder / "nowhere.jpg", "loop.png": folder / "loop.png"}
    write(folder, heic)
    for name, target in links.items():
        (folder / name).symlink_to(target)
    bad = {*damaged_files(7), *heic, *links}
    options = ["--checkpoint", WEIGHTS, "--size", 14, "--device", "cpu", "--write", "npy"]
    code, text, errors = command(monkeypatch, capsys, folder, *options, "--out", tmp_path / "out")
    assert code == 1
    assert text == f"{GOOD} predicted, {len(bad)} skipped; outputs in {tmp_path / 'out'}\n"
    assert len(list((tmp_path / "out").rglob("*.npy"))) == GOOD
    lines = [line for line in errors.splitlines() if line.endswith("; skipped")]
    assert set(errors.splitlines()) - set(lines) == {
        line for line in errors.splitlines() if "tensors" in line or line.endswith(" images")
    }
    named = {line.split("/in/")[1].split(": ", 1)[0] for line in lines}
    assert len(lines) == len(bad)
    assert named == {"".join(c if c.isprintable() else ascii(c)[1:-1] for c in n) for n in bad}
    for line in lines:
        assert line.isprintable() and " object at 0x" not in line
        assert len(line.split(": ", 1)[1]) > 25, line


def test_flipped_bits_never_stop_a_prediction(tmp_path: Path) -> None:
    """Whether a flipped bit does harm depends on where; the file is done or named, never lost."""
    draw = np.random.default_rng(11)
    for kind in (*KINDS, "HEIF"):
        for number in range(12):
            content = bytearray(encoded(kind, number))
            for place in draw.integers(0, min(len(content), 400), 4):
                content[place] ^= 1 << int(draw.integers(8))
            write(tmp_path / "in", {f"{kind}{number}.png": bytes(content)})
    summary = run(tmp_path / "in", tmp_path / "out", write=("npy",))
    assert len(summary.written) + len(summary.skipped) == 96
    assert len(summary.skipped) > 10


# Pack.


def packed(
    out: Path, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, list[dict[str, str]], list[str]]:
    """Exit code of pack.py, the rows of its list of what was left out, and the lines it said."""
    capsys.readouterr()
    code = tool.main([*map(str, arguments), f"--out={out}", "--workers=1", "--level=1"])
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out ")]
    return code, rows, said


def assert_each_is_named(rows: list[dict[str, str]], said: list[str]) -> None:
    """One printable line for each, with its key and what is wrong."""
    assert said == [f"left out {row['key']}: {row['reason']} ({row['detail']})" for row in rows]
    for line in said:
        assert line.isprintable() and " object at 0x" not in line, line


def test_pack_art_names_200_damaged_files_and_packs_the_others(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, said = packed(tmp_path / "set", capsys, "art", f"--raw={pictures}")
    assert (code, len(rows)) == (1, 200)
    assert_each_is_named(rows, said)
    stems = (re.sub(r"\.[^.]*$", "", name) for name in damaged_files(7))
    assert {row["key"] for row in rows} == {re.sub(r"[^\w-]", "_", s) for s in stems}
    assert verify(tmp_path / "set").damage == []
    with ShardSet.open(tmp_path / "set") as shards:
        assert len(shards) == GOOD
        assert {tuple(size) for size in shards.sizes.tolist()} == {(HEIGHT, WIDTH)}
    code, _, said = packed(tmp_path / "set", capsys, "art", f"--raw={pictures}")
    assert (code, said) == (1, [])  # nothing is done again; the answer is as it was


def test_pack_folder_names_200_damaged_pairs_and_packs_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the pairs have a damaged image, the others a damaged depth map."""
    metres = np.random.default_rng(0).integers(500, 5000, (HEIGHT, WIDTH)).astype(np.uint16)
    depth = saved(Image.fromarray(metres), "PNG")
    drawn = saved(Image.fromarray(metres.astype(np.uint8)), "PNG")
    not_depth = [
        drawn,
        saved(Image.fromarray(metres.astype(np.uint8)).convert("P"), "PNG"),
        saved(Image.fromarray(metres[:9]), "PNG"),
        saved(Image.fromarray(0 * metres), "PNG"),
        saved(Image.fromarray(0 * metres + 1), "PNG"),
        b"P5 40 30 65535\n" + bytes(99),
        b"P5 99999999 99999999 65535\n" + bytes(99),
        b"P5 40 30 255\n" + bytes(1200),
    ]
    damaged = list(damaged_files(8).values())
    for number, content in enumerate(damaged[:100]):
        write(tmp_path / "raw", {f"image/{number}.png": content, f"depth/{number}.png": depth})
    for number, content in enumerate([*not_depth, *damaged[100 : 200 - len(not_depth)]], 100):
        image = encoded("PNG", number)
        write(tmp_path / "raw", {f"image/{number}.png": image, f"depth/{number}.png": content})
    good = [content for content in good_files().values() if content[:2] != b"BM"]
    for number, image in enumerate(good, 200):
        write(tmp_path / "raw", {f"image/{number}.png": image, f"depth/{number}.png": depth})
    (tmp_path / "raw" / "image" / "directory.png").mkdir()
    globs = ["--image_glob=image/*.png", "--depth_glob=depth/*.png", "--fov_deg=60"]
    code, rows, said = packed(
        tmp_path / "s", capsys, "folder", f"--raw={tmp_path / 'raw'}", *globs,
        "--depth_scale=0.001",
    )  # fmt: skip
    assert code == 1
    assert {row["key"] for row in rows} == {f"image/{number}" for number in range(200)}
    assert_each_is_named(rows, said)
    assert verify(tmp_path / "s").damage == []
    with ShardSet.open(tmp_path / "s") as shards:
        assert set(shards.keys) == {f"image/{number}" for number in range(200, 200 + len(good))}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EISDIR])
def test_a_file_that_the_disk_refuses_is_one_bad_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(tmp_path / "raw", {f"{name}.png": encoded("PNG", 0) for name in "abc"})
    opened = LocalFileSystem._open

    def refuse(fs: LocalFileSystem, path: str, *args: object, **options: object) -> object:
        if path.endswith("b.png"):
            raise OSError(number, os.strerror(number), path)
        return opened(fs, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "_open", refuse)
    summary = pack(ArtReader(str(tmp_path / "raw")), tmp_path / "set", workers=1)
    assert (summary.frames, summary.damaged) == (2, 1)
    assert summary.skipped == {"file unreadable": 1}


def test_a_refusal_that_is_not_of_the_file_stays_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection must not end in a set without its frames."""
    fs = MemoryFileSystem()
    fs.pipe(f"/{tmp_path.name}/a.png", encoded("PNG", 0))

    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(errno.EACCES, "expired credentials")

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    with pytest.raises(PermissionError, match="expired"):
        pack(ArtReader(f"memory://{tmp_path.name}"), tmp_path / "set", workers=1)


def test_memory_is_bounded_whatever_a_header_announces(tmp_path: Path) -> None:
    """Bombs of 2**60 pixels, 200 MB of text and a sparse file of 100 GB: below 300 MB more."""
    write(tmp_path / "raw", bombs())
    write(tmp_path / "raw", {"good.png": encoded("PNG", 0)})
    with (tmp_path / "raw" / "sparse.png").open("wb") as file:
        file.write(encoded("PNG", 0))
        file.truncate(100 << 30)
    code = """
import resource, sys
from pathlib import Path
from flatdepth.data.pack import pack
from flatdepth.data.readers.art import ArtReader
from tests.test_predict import run
def peak():
    unit = 1 if sys.platform == "linux" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
raw, before = Path(sys.argv[1]), peak()
summary = run(raw, raw.parent / "out", write=("npy",))
packed = pack(ArtReader(str(raw)), raw.parent / "set", workers=1)
print(len(summary.written), packed.frames, packed.damaged, (peak() - before) // 1024)
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "raw")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    written, frames, damaged, growth_mb = map(int, found.stdout.split())
    assert (written, frames, damaged) == (1, 1, len(bombs()) + 1)
    assert growth_mb < 300


# Arrays.


def hdf5(**arrays: ArrayLike) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) else None)
    return buffer.getvalue()


def damaged_arrays(whole: bytes, seed: int) -> dict[str, bytes]:
    """40 files that do not hold the arrays of ``whole``."""
    draw = np.random.default_rng(seed)
    files = {
        "empty": b"",
        "zeros": bytes(4000),
        "magic": whole[:8],
        "text": b"dataset\n1.0 2.0\n",
        "png": encoded("PNG", 0),
        "npz": npz(np.ones((2, 2))),
        "zip": b"PK\x03\x04" * 50,
        "none": hdf5(),
        "other": hdf5(elsewhere=np.ones((HEIGHT, WIDTH), np.float32)),
        "words": hdf5(dataset="deep", rgb="red", depth="far"),
        "huge": huge_hdf5(),
        "integers": hdf5(**dict.fromkeys(("dataset", "rgb", "depth"), np.ones((9, 9), np.int64))),
    }
    files |= {f"random{n}": b"\x89HDF\r\n\x1a\n" + draw.bytes(900) for n in range(8)}
    cuts = [int(cut) for cut in draw.uniform(0.01, 0.9, 20) * len(whole)]
    return files | {f"cut{n}": whole[:cut] for n, cut in enumerate(cuts)}


def npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, depth=array)
    return buffer.getvalue()


def huge_hdf5() -> bytes:
    """Arrays of 10**10 values, none of them stored."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in ("dataset", "rgb", "depth"):
            file.create_dataset(name, (100_000, 100_000), np.float32, chunks=(100, 100))
    return buffer.getvalue()


def nyu_layout(root: Path, seed: int) -> tuple[list[str], list[str]]:
    """An NYU directory of bad and good h5 files: the keys of both."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)
    good = hdf5(rgb=rgb, depth=rng.uniform(1, 5, (HEIGHT, WIDTH)).astype(np.float32))
    bad = damaged_arrays(good, seed)
    write(root / "train" / "kitchen_0001a", {f"{name}.h5": data for name, data in bad.items()})
    write(root / "train" / "kitchen_0001a", {f"good{number}.h5": good for number in range(3)})
    keys = [f"train/kitchen_0001a/{name}" for name in [*bad, "good0", "good1", "good2"]]
    return keys[:-3], keys[-3:]


def hypersim_layout(root: Path, seed: int) -> tuple[list[str], list[str]]:
    """A Hypersim directory with damaged and good distances, images all fine: the keys of both."""
    rng = np.random.default_rng(seed)
    good = hdf5(dataset=rng.uniform(1, 5, (HEIGHT, WIDTH)).astype(np.float16))
    contents = [*damaged_arrays(good, seed).values(), good, good]
    places = root / "ai_001_001" / "images"
    for number, content in enumerate(contents):
        write(
            places,
            {
                f"scene_cam_00_geometry_hdf5/frame.{number:04d}.depth_meters.hdf5": content,
                f"scene_cam_00_final_preview/frame.{number:04d}.tonemap.jpg": encoded("JPEG", 0),
            },
        )
    keys = [f"ai_001_001/cam_00/{number:04d}" for number in range(len(contents))]
    return keys[:-2], keys[-2:]


@pytest.mark.filterwarnings("ignore:.*(no official split|no row in)")
@pytest.mark.parametrize(("name", "layout"), [("nyu", nyu_layout), ("hypersim", hypersim_layout)])
def test_damaged_hdf5_files_are_named_and_the_good_ones_packed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    layout: Callable[[Path, int], tuple[list[str], list[str]]],
) -> None:
    bad, good = layout(tmp_path / "raw", 5)
    assert len(bad) == 40
    code, rows, said = packed(tmp_path / "set", capsys, name, f"--raw={tmp_path / 'raw'}")
    assert code == 1
    assert {row["key"] for row in rows} == set(bad)
    assert_each_is_named(rows, said)
    with ShardSet.open(tmp_path / "set") as shards:
        assert list(shards.keys) == good


def test_damaged_npy_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    depth = np.random.default_rng(0).uniform(1, 5, (HEIGHT, WIDTH)).astype(np.float32)
    whole = npy(depth)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }"
    contents = list(damaged_arrays(whole, 3).values())
    contents += [npy(np.array([{}], object), pickled=True), npy(np.array(["x"])), npy(depth * 1j)]
    for size in (10**5, 10**9):
        text = (header % (size, size)).encode() + b"\n"
        contents.append(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(99))
    for number, content in enumerate([*contents, whole]):
        image = encoded("JPEG", number)
        write(tmp_path / "raw", {f"{number:02d}.jpg": image, f"{number:02d}.npy": content})
    code, rows, said = packed(
        tmp_path / "set", capsys, "folder", f"--raw={tmp_path / 'raw'}",
        "--image_glob=*.jpg", "--depth_glob=*.npy", "--depth_scale=1", "--fov_deg=60",
    )  # fmt: skip
    assert code == 1
    assert [row["key"] for row in rows] == [f"{number:02d}" for number in range(len(contents))]
    assert_each_is_named(rows, said)


def npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


# Shards.


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "set"
    pack(RoomsReader(scenes=1, frames_per_scene=3, height=28, width=42), out, workers=1)
    return out


def damage(data: bytes, draw: np.random.Generator, way: str) -> bytes:
    """The same bytes, damaged; never equal to ``data``."""
    place = int(draw.integers(len(data)))
    length = int(draw.integers(1, 600))
    match way:
        case "flip":
            flipped = bytes([data[place] ^ (1 << int(draw.integers(8)))])
            return data[:place] + flipped + data[place + 1 :]
        case "cut":
            return data[:place]
        case "zero":
            nothing = bytes(len(data[place : place + length]))
            zeroed = data[:place] + nothing + data[place + length :]
            return zeroed if zeroed != data else data[:-1]
        case "noise":
            return data[:place] + draw.bytes(length) + data[place + length :]
        case "insert":
            return data[:place] + draw.bytes(length) + data[place:]
    raise ValueError(way)


@pytest.mark.parametrize("way", ["flip", "cut", "zero", "noise", "insert"])
def test_damaged_shards_and_indices_are_found(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """40 times each way: exit code 1 with lines of damage, or one sentence about the index."""
    draw = np.random.default_rng(len(way))
    (tar,) = shards.glob("*.tar")
    indices = (INDEX_NAME, COLUMNS_NAME)
    contents = {name: (shards / name).read_bytes() for name in (tar.name, *indices)}
    copy = shutil.copytree(shards, tmp_path / "set")
    for number in range(40):
        name = indices[number % 8 // 4] if number % 4 == 0 else tar.name
        write(copy, contents | {name: damage(contents[name], draw, way)})
        try:
            code = tool.main(["verify", str(copy), "--workers=1"])
        except UserError as error:
            assert name in indices
            assert "\n" not in str(error) and INDEX_NAME in str(error)
            continue
        text = capsys.readouterr().out
        lines = [line for line in text.splitlines() if line.startswith("damaged: ")]
        assert name != INDEX_NAME
        assert code == 1 and lines
        assert ("DAMAGED" if name == tar.name else COLUMNS_NAME) in text
        assert all(line.isprintable() for line in lines)


def test_an_index_that_announces_endless_shards_is_damage(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(shards, tmp_path / "set")
    index = ShardSet.open(copy).index
    endless = {ext: np.where([False, True], 2**59, table) for ext, table in index.members.items()}
    shards_ = (dataclasses.replace(index.shards[0], bytes=2**60), *index.shards[1:])
    edit_index(copy, shards=shards_, members=endless)
    with contextlib.suppress(UserError):
        assert tool.main(["verify", str(copy)]) == 1
        assert "damaged: " in capsys.readouterr().out
