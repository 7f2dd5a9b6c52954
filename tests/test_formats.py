"""Files of every format: depth, masks and images made here are read as they were written."""

import dataclasses
import io
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter

import fsspec
import h5py
import numpy as np
import OpenEXR
import pytest
from PIL import Image

from flatdepth.data.pack import check_frame
from flatdepth.data.readers import ArtReader, files
from flatdepth.data.readers.arrays import read_array
from flatdepth.data.readers.base import Item
from flatdepth.data.shards.codec import decode_image, depth_metres
from flatdepth.data.shards.write import encode_sample
from flatdepth.errors import BadFrame, UserError
from tests.test_inputs import stored
from tests.test_readers import (
    CODES,
    RGB,
    exif,
    folder,
    image_bytes,
    npy,
    one_frame,
    pgm,
    read_all,
    write,
)

METRES = (CODES / 655.35).astype(np.float32)


def npz(compressed=True, **arrays):
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def exr(path, compression=OpenEXR.ZIP_COMPRESSION, **channels):
    made = path.parent / f"{path.name}.exr"
    header = {"compression": compression, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, channels).write(str(made))
    return made.read_bytes()


def pfm(values):
    """Portable float map: grey, little-endian, the lowest row first."""
    return b"Pf\n8 6\n-1.0\n" + values[::-1].astype("<f4").tobytes()


def metres(frame):
    return depth_metres(frame.depth, frame.K_px)


# Depth


@pytest.mark.parametrize("compressed", [True, False])
def test_npz_depth_is_the_named_array_or_the_only_one(tmp_path, compressed):
    only = npz(compressed, anything=CODES)
    two = npz(compressed, colour=RGB, deep=CODES)
    for content, name in ((only, "depth"), (two, "deep")):
        frame = one_frame(tmp_path, "1.npz", content, depth_array=name)
        np.testing.assert_array_equal(frame.depth.codes, CODES)
    with pytest.raises(BadFrame, match="no array 'depth', found colour, deep; name one with"):
        one_frame(tmp_path, "1.npz", two)


def test_exr_depth_is_read_bit_for_bit(tmp_path):
    half = METRES.astype(np.float16)
    frame = one_frame(tmp_path, "1.exr", exr(tmp_path, V=half), depth_scale=1)
    np.testing.assert_array_equal(frame.depth.codes, half)
    whole = exr(tmp_path, Z=CODES.astype(np.uint32))
    np.testing.assert_array_equal(one_frame(tmp_path, "1.exr", whole).depth.codes, CODES)
    others = {"A": -METRES, "R": METRES, "G": METRES, "B": METRES}
    for channels, options in (
        ({"Z": METRES, "R": -METRES}, {}),
        (others, {}),
        ({"View.Depth.Z": METRES, "V": -METRES}, {"depth_array": "View.Depth.Z"}),
        ({"odd": METRES}, {}),
    ):
        path = tmp_path / "depth" / "1.exr"
        write(path, exr(tmp_path, **channels))
        np.testing.assert_array_equal(read_array(str(path), *options.values() or ["depth"]), METRES)
        frame = one_frame(tmp_path, "1.exr", path.read_bytes(), depth_scale=1, **options)
        np.testing.assert_allclose(metres(frame), METRES, rtol=8e-5)
    with pytest.raises(BadFrame, match="no array 'depth', found G, H; name one"):
        one_frame(tmp_path, "1.exr", exr(tmp_path, G=METRES, H=METRES))


def test_exr_that_is_damaged_or_too_large_is_refused(tmp_path, capfd):
    whole = exr(tmp_path, Z=METRES, compression=OpenEXR.NO_COMPRESSION)
    window = whole.index(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    huge = bytearray(whole)
    struct.pack_into("<4i", huge, window, 0, 0, 99_999, 99_999)
    for content in (whole[:-9], whole[: len(whole) // 2], b"", bytes(huge)):
        with pytest.raises(BadFrame, match="depth unreadable"):
            one_frame(tmp_path, "1.exr", content)
    with pytest.raises(BadFrame, match="announces 1 channels of 10000000000 pixels"):
        one_frame(tmp_path, "1.exr", bytes(huge))
    assert capfd.readouterr().out == ""


def test_exr_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UserError, match=r"\.exr files needs the package OpenEXR.*flatdepth\[exr\]"):
        one_frame(tmp_path, "1.exr", b"any")


def test_pfm_and_32_bit_tiff_are_depth(tmp_path):
    frame = one_frame(tmp_path, "1.pfm", pfm(METRES), depth_scale=1)
    np.testing.assert_allclose(metres(frame), METRES, rtol=8e-5)
    frame = one_frame(tmp_path, "1.tif", image_bytes(CODES.astype(np.int32), "TIFF"))
    np.testing.assert_array_equal(frame.depth.codes, CODES)


GREY = (CODES >> 8).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.png", image_bytes(GREY)),
        ("1.tif", image_bytes(GREY, "TIFF")),
        ("1.pgm", b"P5 8 6 255\n" + GREY.tobytes()),
        ("1.npy", npy(GREY)),
        ("1.npz", npz(depth=GREY)),
    ],
)
def test_8_bit_depth_is_refused_unless_it_is_asked_for(tmp_path, name, content):
    with pytest.raises(BadFrame, match=r"not 16-bit: .*--depth_8bit true takes them"):
        one_frame(tmp_path, name, content)
    with pytest.warns(UserWarning, match=r"in steps of 0\.02 m, up to 5\.1 m"):
        frame = one_frame(tmp_path, name, content, depth_8bit=True, depth_scale=0.02)
    np.testing.assert_array_equal(frame.depth.codes, GREY)
    np.testing.assert_allclose(metres(frame)[GREY > 0], 0.02 * GREY[GREY > 0], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:depth_8bit")
@pytest.mark.parametrize(
    "content",
    [
        image_bytes(GREY, "JPEG"),
        image_bytes(Image.fromarray(RGB).convert("P")),
        b"P2 8 6 9\n" + b"5 " * 48,
    ],
)
def test_values_that_a_format_does_not_keep_are_no_depth(tmp_path, content):
    with pytest.raises(BadFrame, match=r"depth is not a grey image: .*expected PNG, TIFF"):
        one_frame(tmp_path, depth=content, depth_8bit=True)


# Masks

HALF = np.indices(CODES.shape)[1] % 3


@pytest.mark.parametrize(
    ("name", "content", "options", "valid"),
    [
        ("1.npy", npy((HALF > 0).astype(np.float64)), {}, HALF > 0),
        ("1.npy", npy(HALF > 1), {}, HALF > 1),
        ("1.npz", npz(mask=HALF), {}, HALF > 0),
        ("1.png", image_bytes(HALF.astype(np.uint8)), {"mask_min": 2}, HALF > 1),
        ("1.png", image_bytes((HALF > 0).astype(np.uint8) * 255), {}, HALF > 0),
        ("1.png", image_bytes(Image.fromarray(HALF > 0)), {}, HALF > 0),
    ],
)
@pytest.mark.parametrize("kind", ["png", "npy", "half"])
def test_depth_outside_of_its_mask_is_unknown(tmp_path, kind, name, content, options, valid):
    write(tmp_path / "mask" / name, content)
    depth = {
        "png": image_bytes(CODES),
        "npy": npy(np.where(valid, METRES, 1e9)),  # garbage outside does not count as out of range
        "half": npy(METRES.astype(np.float16)),
    }[kind]
    frame = one_frame(
        tmp_path,
        "1.png" if kind == "png" else "1.npy",
        depth,
        depth_scale=1 / 655.35 if kind == "png" else 1,
        mask_glob=f"mask/*.{name[2:]}",
        **options,
    )
    np.testing.assert_array_equal(np.isfinite(metres(frame)), valid)
    np.testing.assert_allclose(metres(frame)[valid], METRES[valid], rtol=1e-3)
    assert frame.meta["mask"] == f"mask/{name}"


def test_codes_without_a_hole_get_a_free_one_for_masked_pixels(tmp_path):
    codes = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    codes[0, 7] = 8  # 7 is free
    write(tmp_path / "mask.png", image_bytes(np.tile(np.uint8([0, 255]), (256, 128))))
    image = image_bytes(np.zeros((256, 256, 3), np.uint8))
    options = {"image": image, "mask_glob": "mask.png", "hole": -1, "sky": 0, "mask_min": 300}
    frame = one_frame(tmp_path, depth=image_bytes(codes), **options | {"mask_min": 1})
    assert frame.depth.hole == 2  # 0 means sky, 1 is a depth; even columns are masked
    np.testing.assert_array_equal(frame.depth.codes[:, 1::2], codes[:, 1::2])
    assert np.isnan(metres(frame)[:, ::2]).all() and np.isfinite(metres(frame)[:, 1::2]).all()
    write(tmp_path / "mask.png", image_bytes(np.full((256, 256), 255, np.uint8)))
    codes[0, 7] = 7
    with pytest.raises(BadFrame, match="no code is free for masked pixels"):
        one_frame(tmp_path, depth=image_bytes(codes), **options | {"mask_min": 1})


def test_masks_belong_to_their_depth_and_frames_without_one_are_named(tmp_path):
    """As DIODE names them; and with times (TUM), where the image is called something else."""
    for number in (1, 2, 3):
        write(tmp_path / f"in/{number}.png", image_bytes())
        write(tmp_path / f"in/{number}_depth.npy", npy(METRES[..., None]))
    for number in (1, 2):
        write(tmp_path / f"in/{number}_depth_mask.npy", npy((number == HALF).astype(np.float64)))
    options = {"image_glob": "*/*.png", "depth_glob": "*/*_depth.npy", "depth_scale": 1}
    reader = folder(tmp_path, **options, mask_glob="*/*_depth_mask.npy")
    assert reader.list().excluded == (("in/3.png", "no mask file"),)
    for number, frame in enumerate(read_all(reader).values(), 1):
        np.testing.assert_array_equal(np.isfinite(metres(frame)), number == HALF)
    with pytest.raises(UserError, match=r"masks \*/\*.tif .*matched 0 files, none for a depth"):
        dataclasses.replace(reader, mask_glob="*/*.tif").list()
    with pytest.raises(UserError, match="mask_glob: expected at most the 2 runs of wildcards"):
        dataclasses.replace(reader, mask_glob="*/*/*.npy")
    write(tmp_path / "in/1_depth_mask.npy", npy(HALF[1:]))
    with pytest.raises(BadFrame, match="mask and depth differ in size"):
        read_all(reader)
    write(tmp_path / "tum/rgb/10.02.png", image_bytes())
    write(tmp_path / "tum/depth/10.00.png", image_bytes(CODES))
    write(tmp_path / "tum/mask/10.00.png", image_bytes((HALF > 0).astype(np.uint8)))
    options = {"image_glob": "rgb/*.png", "depth_glob": "depth/*.png", "mask_glob": "mask/*.png"}
    [frame] = read_all(folder(tmp_path / "tum", **options, pair_within_s=0.03)).values()
    np.testing.assert_array_equal(np.isfinite(metres(frame)), HALF > 0)


# Images


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_the_depth_says_whether_an_image_is_turned(tmp_path, format, orientation):
    """The size of the depth decides; half turns, mirrors and squares leave it open."""
    shown = np.zeros((32, 64, 3), np.uint8)
    shown[:16, 32:] = [255, 0, 0]
    depth = np.full((32, 64), 2000, np.uint16)
    pixels = np.ascontiguousarray(stored(shown, orientation))
    options = {"image_name": f"1.{'jpg' if format == 'JPEG' else format.lower()}"}
    options["image"] = image_bytes(pixels, format, exif=exif(orientation), quality=95)
    if orientation < 5:
        with pytest.raises(BadFrame, match=f"rotated by EXIF: .*orientation {orientation}, and"):
            one_frame(tmp_path, depth=image_bytes(depth), **options)
        return
    for resize in (False, True):
        small = depth[::2, ::2] if resize else depth
        frame = one_frame(tmp_path, depth=image_bytes(small), resize_images=resize, **options)
        assert (frame.height, frame.width) == small.shape
        assert (frame.image_ext, frame.meta["image_turned_from_orientation"]) == (
            "jpg",
            orientation,
        )
        expected = shown[::2, ::2] if resize else shown
        error = np.abs(decode_image(frame.image).astype(int) - expected)
        assert np.median(error) < 8 and (error > 60).mean() < 0.1
        # With the depth of the sensor, which knows nothing of tags, it stays as it is stored.
        frame = one_frame(
            tmp_path,
            depth=image_bytes(np.ascontiguousarray(small.T)),
            resize_images=resize,
            **options,
        )
        assert "image_turned_from_orientation" not in frame.meta
        error = np.abs(decode_image(frame.image).astype(int) - stored(expected, orientation))
        assert np.median(error) < 8 and (error > 60).mean() < 0.1
    square = {"image": image_bytes(pixels[:32, :32], "JPEG", exif=exif(orientation))}
    with pytest.raises(BadFrame, match="the depth's size does not tell"):
        one_frame(tmp_path, depth=image_bytes(depth[:, :32]), **options | square)


def test_grey_of_12_bits_keeps_its_contrast(tmp_path):
    grey = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (48, 1))
    depth = image_bytes(np.full((48, 64), 2000, np.uint16))
    with pytest.warns(UserWarning, match="values up to 4095 only.* 12 bits, give --image_bits"):
        dim = one_frame(tmp_path, depth=depth, image=image_bytes(grey))
    assert decode_image(dim.image).max() == 15 and dim.image_ext == "png"
    for format in ("PNG", "TIFF"):
        image = image_bytes(grey, format)
        frame = one_frame(tmp_path, depth=depth, image=image, image_bits=12)
        shown = decode_image(frame.image).astype(int)
        assert np.abs(shown - (grey >> 4)[..., None]).max() < 6
    image = image_bytes(grey + np.uint16(1))
    with pytest.raises(BadFrame, match="values up to 4096, more than 12 bits"):
        one_frame(tmp_path, depth=depth, image=image, image_bits=12)
    frame = one_frame(tmp_path, depth=image_bytes(CODES), image_bits=12)  # colour stays
    assert frame.image == image_bytes()


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_avif_and_heic_become_jpeg_in_every_reader(tmp_path, format):
    pixels = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 1, 3))
    content = image_bytes(pixels, format, quality=95)
    name = f"1.{format.lower()}"
    depth = image_bytes(np.full((48, 64), 2000, np.uint16))
    frame = one_frame(tmp_path, depth=depth, image_name=name, image=content)
    [picture] = read_all(ArtReader(str(tmp_path / "color"))).values()
    assert frame.image == picture.image and frame.image_ext == "jpg"
    assert np.abs(decode_image(frame.image).astype(int) - pixels).mean() < 3


def test_images_of_other_formats_are_counted(tmp_path):
    for name in ("a.png", "b.GIF", "c.gif", "sub/d.jxl", "notes.txt"):
        write(tmp_path / name, image_bytes())
    write(tmp_path / "a.npy", npy(CODES))
    said = "left unread by their endings: 2 .gif, 1 .jxl"
    with pytest.warns(UserWarning, match=said) as art:
        ArtReader(str(tmp_path)).list()
    with pytest.warns(UserWarning, match=said) as frames:
        folder(tmp_path, image_glob="*.png", depth_glob="*.npy").list()
    assert len(art) == len(frames) == 1


# Headers that lie


def lying(content):
    """The content with each number of its head replaced by others, and with every byte."""
    numbers = (b"0", b"-1", b"9" * 10, b"9" * 5000, b"0x" + b"f" * 3000, b"(" * 400)
    for found in re.finditer(rb"\d+", content[:128]):
        for number in numbers:
            yield content[: found.start()] + number + content[found.end() :]
    draw = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(content)
        for place in draw.integers(0, min(len(content), 200), draw.integers(1, 4)).tolist():
            value = draw.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1])
            changed[place : place + 4] = struct.pack("<>"[draw.integers(2)] + "I", value)
        yield bytes(changed)


def test_headers_that_lie_give_a_frame_or_a_bad_frame(tmp_path):
    contents = {
        "color.jpg": image_bytes(format="JPEG", exif=exif(6), comment=b"words"),
        "color.png": image_bytes(CODES),
        "color.webp": image_bytes(format="WEBP", exif=exif(6)),
        "color.avif": image_bytes(format="AVIF", exif=exif(6)),
        "color.tif": image_bytes(format="TIFF", exif=exif(6), compression="tiff_lzw"),
        "color.bmp": image_bytes(format="BMP"),
        "color.ppm": image_bytes(format="PPM"),
        "depth.png": image_bytes(CODES),
        "depth.tif": image_bytes(CODES, "TIFF", compression="tiff_lzw"),
        "depth.pgm": pgm(CODES),
        "depth.pfm": pfm(METRES),
        "depth.npy": npy(CODES),
        "depth.npz": npz(False, depth=CODES),
        "depth.exr": exr(tmp_path, Z=METRES),
    }
    memory = fsspec.filesystem("memory")
    refused = Counter()
    for name, whole in contents.items():
        role, _, ext = name.partition(".")
        for number, content in enumerate(lying(whole)):
            files = {"color": image_bytes(), "depth": image_bytes(CODES)} | {role: content}
            paths = {key: f"lie/{key}.{ext if key == role else 'png'}" for key in files}
            for key, path in paths.items():
                memory.pipe(f"/{path}", files[key])
            urls = {"image": f"memory://{paths['color']}", "depth": f"memory://{paths['depth']}"}
            reader = folder("memory://lie", resize_images=number % 2 == 0)
            try:
                frame = reader.read(Item(key="1", scene="1", files=urls))
                check_frame(frame, reader)
                encode_sample(frame, level=1)
            except BadFrame as error:
                assert len(str(error)) < 1000
                refused[name] += 1
    assert all(refused[name] > 10 for name in contents), refused


def test_bombs_are_refused_before_they_expand(tmp_path, monkeypatch):
    """A chunk of HDF5, a tile of a TIFF, a member of a zip archive that expand to far more."""
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr("flatdepth.data.readers.arrays.MAX_BYTES", 1 << 20)
    monkeypatch.setattr(files, "MAX_PIXELS", 1 << 18)
    bomb = zlib.compress(bytes(8 << 20))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        dataset = file.create_dataset("depth", (6, 8), "u2", chunks=(6, 8), compression="gzip")
        dataset.id.write_direct_chunk((0, 0), bomb)
    with pytest.raises(BadFrame, match="expands to more than 96 bytes"):
        one_frame(tmp_path, "1.h5", buffer.getvalue())
    tags = [(256, 8), (257, 6), (258, 16), (259, 8), (262, 1), (277, 1)]
    tags += [(322, 2048), (323, 2048), (324, 8), (325, len(bomb))]
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + rows + bytes(4)
    tiff = b"II*\0" + struct.pack("<I", 8 + len(bomb)) + bomb + directory
    with pytest.raises(BadFrame, match="tiles of 2048x2048 pixels"):
        one_frame(tmp_path, "1.tif", tiff)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("depth.npy", npy(CODES) + bytes(8 << 20))
    with pytest.raises(BadFrame, match=r"depth\.npy announces 8388832 bytes"):
        one_frame(tmp_path, "1.npz", buffer.getvalue())


def test_float_depth_beyond_every_float32_is_out_of_range_and_no_sky(tmp_path):
    with pytest.raises(BadFrame, match="depth out of range"):
        one_frame(tmp_path, "1.npy", npy(METRES.astype(np.float64) * 1e300), depth_scale=1.0)
