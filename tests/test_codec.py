"""Depth and image codec: bit-exactness, the log code's bound, metres, damage and size bombs."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flatdepth.data.shards import codec
from flatdepth.data.shards.codec import (
    MAX_PIXELS,
    decode_depth,
    decode_frame,
    decode_image,
    depth_meta,
    depth_metres,
    encode_depth,
    encode_log_u16,
)
from flatdepth.errors import BadFrame
from flatdepth.types import DepthCodes, RawFrame

HYPERSIM = (
    Path(__file__).parent
    / "data/hypersim/ai_037_002/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
)
K_PX = np.array([[400.0, 3.0, 310.5], [0.0, 390.0, 245.25], [0.0, 0.0, 1.0]])


def codes_of(array: np.ndarray, **meaning: object) -> DepthCodes:
    return DepthCodes(codes=array, **meaning)


def roundtrip(codes: DepthCodes) -> DepthCodes:
    return decode_depth(encode_depth(codes, level=1), depth_meta(codes))


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))


shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)
patterns = hnp.arrays(np.uint16, shapes) | st.builds(
    # Surfaces with steps: what the predictor is for.
    lambda shape, slope, start: (
        (np.arange(shape[0] * shape[1]) * slope + start).reshape(shape).astype(np.uint16)
    ),
    shapes,
    st.integers(-3, 3),
    st.integers(0, 65535),
)


class TestDepthPayload:
    @given(patterns, st.sampled_from([np.uint16, np.float16]))
    def test_every_pattern_comes_back(self, array: np.ndarray, dtype: type) -> None:
        codes = codes_of(array.view(dtype))
        assert_same_bits(roundtrip(codes).codes, codes.codes)

    @pytest.mark.parametrize("dtype", [np.uint16, np.float16])
    def test_all_65536_patterns_come_back(self, dtype: type) -> None:
        array = np.random.default_rng(0).permutation(65536).astype(np.uint16).reshape(256, 256)
        assert_same_bits(roundtrip(codes_of(array.view(dtype))).codes, array.view(dtype))
        assert_same_bits(roundtrip(codes_of(array.view(dtype).T)).codes, array.view(dtype).T.copy())

    @given(
        st.sampled_from(["z", "distance"]),
        st.floats(1e-6, 1e3),
        st.none() | st.integers(0, 65535),
        st.none() | st.integers(0, 65535),
        st.none() | st.tuples(st.floats(1e-3, 1.0), st.floats(2.0, 1e5)),
    )
    def test_the_meaning_comes_back(self, quantity, scale_m, hole, sky, log_range_m) -> None:
        codes = codes_of(
            np.zeros((2, 3), np.uint16),
            quantity=quantity,
            scale_m=scale_m,
            hole=hole,
            sky=sky,
            log_range_m=log_range_m,
        )
        back = roundtrip(codes)
        assert replace(back, codes=codes.codes) == codes

    @pytest.mark.parametrize("predictor", [0, 1])
    def test_payload_follows_the_documented_layout(self, predictor: int) -> None:
        rows = [[7, 5, 65535], [0, 40000, 40001]]
        flat = [code for row in rows for code in row]
        if predictor:
            steps = [(b - a) % 65536 for a, b in zip([0, *flat], flat, strict=False)]
            flat = [2 * d if d < 32768 else 2 * (65536 - d) - 1 for d in steps]
        planes = bytes(v & 255 for v in flat) + bytes(v >> 8 for v in flat)
        body = zstandard.ZstdCompressor().compress(planes)
        payload = b"FDZ1" + struct.pack("<BBII", 0, predictor, 2, 3) + body
        meta = depth_meta(codes_of(np.zeros((1, 1), np.uint16)))
        assert decode_depth(payload, meta).codes.tolist() == rows

    def test_the_predictor_is_used_where_it_helps(self) -> None:
        rng = np.random.default_rng(0)
        ramp = np.add.outer(np.arange(64) * 7, np.arange(64) * 3).astype(np.uint16)
        # Few, far apart values in random order: differences have more values than the codes.
        levels = rng.choice(np.array([0, 900, 4100, 31000, 65000], np.uint16), (64, 64))
        flags = [encode_depth(codes_of(array))[5] for array in (ramp, levels)]
        assert flags == [1, 0]

    def test_damage_is_never_silent(self) -> None:
        ramp = np.add.outer(np.arange(8) * 7, np.arange(9) * 3).astype(np.uint16)
        codes = codes_of(ramp)
        payload, meta = encode_depth(codes), depth_meta(codes)
        for end in range(len(payload)):
            with pytest.raises(BadFrame):
                decode_depth(payload[:end], meta)
        with pytest.raises(BadFrame):
            decode_depth(payload + b"x", meta)
        refused = 0
        for position in range(14, len(payload)):
            for bit in range(8):
                flipped = bytearray(payload)
                flipped[position] ^= 1 << bit
                try:
                    # A bit that zstd does not use may flip without changing the codes.
                    assert_same_bits(decode_depth(bytes(flipped), meta).codes, ramp)
                except BadFrame:
                    refused += 1
        assert refused >= 8 * (len(payload) - 14) - 8

    @pytest.mark.parametrize(
        ("height", "width", "content"),
        [
            (1 << 14, 1 << 13, 16),  # more pixels than allowed
            (0, 4, 0),
            (2, 4, 1 << 28),  # a frame that would unpack to 256 MB
            (2, 4, 15),
        ],
    )
    def test_bombs_and_lies_are_refused(self, height: int, width: int, content: int) -> None:
        body = zstandard.ZstdCompressor().compress(bytes(content))
        payload = b"FDZ1" + struct.pack("<BBII", 0, 0, height, width) + body
        with pytest.raises(BadFrame, match="depth unreadable"):
            decode_depth(payload, depth_meta(codes_of(np.zeros((1, 1), np.uint16))))

    def test_a_frame_of_unknown_size_is_refused(self) -> None:
        body = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(16))
        payload = b"FDZ1" + struct.pack("<BBII", 0, 0, 2, 4) + body
        with pytest.raises(BadFrame, match="depth unreadable"):
            decode_depth(payload, depth_meta(codes_of(np.zeros((1, 1), np.uint16))))

    @pytest.mark.parametrize(
        "change",
        [
            {"quantity": "speed"},
            {"scale_m": 0.0},
            {"scale_m": float("nan")},
            {"scale_m": None},
            {"hole": 10**400},
            {"sky": "much"},
            {"log_range_m": [1.0, 0.5]},
            {"log_range_m": [1.0]},
        ],
    )
    def test_an_unusable_meaning_is_refused(self, change: dict) -> None:
        codes = codes_of(np.zeros((2, 2), np.uint16))
        with pytest.raises(BadFrame, match="its description"):
            decode_depth(encode_depth(codes), depth_meta(codes) | change)

    def test_empty_depth_cannot_be_stored(self) -> None:
        with pytest.raises(ValueError, match="0x4"):
            encode_depth(codes_of(np.zeros((0, 4), np.uint16)))


class TestLogCode:
    @given(hnp.arrays(np.float32, shapes, elements=st.floats(0.125, 1000, width=32)))
    def test_relative_error_is_below_half_a_step(self, depth_m: np.ndarray) -> None:
        back = depth_metres(encode_log_u16(depth_m), K_PX)
        assert np.abs(back / depth_m.astype(np.float64) - 1).max() <= 7.1e-5

    def test_the_bound_holds_over_the_whole_range(self) -> None:
        depth_m = np.geomspace(0.1, 1000, 1 << 20).astype(np.float32).reshape(1024, 1024)
        codes = encode_log_u16(depth_m)
        back = depth_metres(codes, K_PX)
        assert np.abs(back / depth_m.astype(np.float64) - 1).max() <= 7.1e-5
        assert (np.diff(codes.codes.ravel().astype(int)) >= 0).all()
        assert (codes.codes.min(), codes.codes.max()) == (1, 65534)

    @given(st.floats(1e-4, 1.0), st.floats(1.5, 1e6))
    def test_other_ranges_have_their_own_bound(self, near_m: float, ratio: float) -> None:
        depth_m = np.geomspace(near_m * 1.001, near_m * ratio * 0.999, 500)[None].astype(np.float32)
        back = depth_metres(encode_log_u16(depth_m, near_m, near_m * ratio), K_PX)
        bound = np.expm1(np.log(ratio) / 65533 / 2) + 2e-7  # and float32 rounding twice
        assert np.abs(back / depth_m.astype(np.float64) - 1).max() <= bound

    def test_unknown_and_sky_have_codes_of_their_own(self) -> None:
        depth_m = np.array([[np.nan, np.inf, 0.1, 1000.0]], np.float32)
        codes = encode_log_u16(depth_m)
        assert codes.codes.tolist() == [[0, 65535, 1, 65534]]
        back = depth_metres(codes, K_PX)
        assert np.isnan(back[0, 0])
        assert back[0, 1] == np.inf

    @pytest.mark.parametrize("bad", [0.0, -1.0, 0.0999, 1001.0, -np.inf])
    def test_finite_depth_out_of_range_is_not_clipped(self, bad: float) -> None:
        depth_m = np.array([[1.0, bad, np.nan]], np.float32)
        with pytest.raises(BadFrame, match="depth out of range"):
            encode_log_u16(depth_m)


class TestMetres:
    @pytest.mark.parametrize("scale_m", [0.001, 0.01, 1 / 256, 1 / 5000])
    def test_integer_codes_scale_exactly(self, scale_m: float) -> None:
        array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        got = depth_metres(codes_of(array, scale_m=scale_m, hole=0, sky=65535), K_PX)
        want = (array.astype(np.float64) * scale_m).astype(np.float32)
        want[0, 0], want[-1, -1] = np.nan, np.inf
        np.testing.assert_array_equal(got, want)

    def test_float16_codes_are_values(self) -> None:
        array = np.array([[1.5, 0.0, np.nan, np.inf, 65504.0]], np.float16)
        got = depth_metres(codes_of(array, scale_m=2.0, hole=0, sky=65504), K_PX)
        np.testing.assert_array_equal(got, [[3.0, np.nan, np.nan, np.inf, np.inf]])

    def test_distance_becomes_planar_depth(self) -> None:
        rng = np.random.default_rng(0)
        array = rng.uniform(0.5, 60, (48, 64)).astype(np.float16)
        array[3, 4], array[5, 6] = np.nan, np.inf
        got = depth_metres(codes_of(array, quantity="distance"), K_PX)
        inverse = np.linalg.inv(K_PX)
        want = np.empty(array.shape)
        for j in range(48):
            for i in range(64):
                ray = inverse @ [i + 0.5, j + 0.5, 1.0]
                want[j, i] = float(array[j, i]) / np.linalg.norm(ray)
        np.testing.assert_allclose(got, want, rtol=5e-7)
        assert np.isnan(got[3, 4])
        assert got[5, 6] == np.inf

    def test_genuine_hypersim_frame(self) -> None:
        with h5py.File(HYPERSIM) as file:
            array = file["dataset"][:]
        codes = codes_of(array, quantity="distance")
        payload = encode_depth(codes)
        assert_same_bits(decode_depth(payload, depth_meta(codes)).codes, array)
        assert len(payload) < 160 * 1024
        # The formula of the data set's authors: distance / ||(x, y, f)|| * f on centred pixels.
        height, width = array.shape
        focal = 886.81
        x = np.linspace(-width / 2 + 0.5, width / 2 - 0.5, width)
        y = np.linspace(-height / 2 + 0.5, height / 2 - 0.5, height)[:, None]
        want = array.astype(np.float64) / np.sqrt(x**2 + y**2 + focal**2) * focal
        K_px = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        np.testing.assert_allclose(depth_metres(codes, K_px), want, rtol=5e-7)


def encode_image(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


class TestImage:
    @given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
    @settings(max_examples=25)
    def test_lossless_files_come_back(self, image: np.ndarray) -> None:
        for payload in (
            encode_image(Image.fromarray(image)),
            encode_image(Image.fromarray(image), "WEBP", lossless=True),
        ):
            np.testing.assert_array_equal(decode_image(payload), image)

    def test_grey_is_repeated(self) -> None:
        grey = RGB[..., 0]
        got = decode_image(encode_image(Image.fromarray(grey)))
        np.testing.assert_array_equal(got, np.repeat(grey[..., None], 3, axis=2))

    def test_palette(self) -> None:
        image = Image.fromarray(RGB).quantize(8)
        got = decode_image(encode_image(image))
        np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))

    def test_transparent_pixels_show_white(self) -> None:
        alpha = np.full((5, 7, 1), 255, np.uint8)
        alpha[0, 0] = 0
        got = decode_image(encode_image(Image.fromarray(np.concatenate([RGB, alpha], axis=2))))
        want = RGB.copy()
        want[0, 0] = 255
        np.testing.assert_array_equal(got, want)

    def test_16_bit_keeps_the_high_byte(self) -> None:
        grey = np.array([[0x1234, 0xFFFF], [0x00FF, 0x8001]], ">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in grey)
        got = decode_image(png(2, 2, 16, 0, rows))
        np.testing.assert_array_equal(got[..., 0], grey >> 8)
        np.testing.assert_array_equal(got[..., 2], grey >> 8)
        colour = np.array([[[0x1234, 0xFFFF, 0x00FF]]], ">u2")
        got = decode_image(png(1, 1, 16, 2, b"\0" + colour.tobytes()))
        assert got.tolist() == [[[0x12, 0xFF, 0x00]]]

    def test_cmyk_jpeg(self) -> None:
        flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        red = decode_image(encode_image(flat, "JPEG", quality=95))
        assert (red[..., 0] > 240).all()
        assert (red[..., 1:] < 15).all()

    def test_the_stored_grid_is_kept(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # "rotate by 90 degrees"
        payload = encode_image(Image.fromarray(RGB), exif=exif)
        np.testing.assert_array_equal(decode_image(payload), RGB)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_damaged_files_are_bad_frames(self, kind: str) -> None:
        payload = encode_image(Image.fromarray(np.tile(RGB, (20, 20, 1))), kind)
        for end in (0, 3, 30, len(payload) // 2):
            with pytest.raises(BadFrame, match="image unreadable"):
                decode_image(payload[:end])

    @pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
    def test_other_formats_are_refused(self, kind: str) -> None:
        with pytest.raises(BadFrame, match="image unreadable"):
            decode_image(encode_image(Image.fromarray(RGB), kind))

    @pytest.mark.parametrize("side", [8200, 10_000, 14_000, 60_000])
    def test_size_bombs_are_refused(self, side: int) -> None:
        assert side * side > MAX_PIXELS
        with pytest.raises(BadFrame, match="image too large"):
            decode_image(png(side, side, 8, 2, b""))

    def test_threads_agree(self) -> None:
        payloads = [
            encode_image(Image.fromarray(np.roll(np.tile(RGB, (30, 30, 1)), k, 0)), "JPEG")
            for k in range(8)
        ]
        with ThreadPoolExecutor(4) as pool:
            parallel = list(pool.map(decode_image, payloads * 4))
        for got, payload in zip(parallel, payloads * 4, strict=True):
            np.testing.assert_array_equal(got, decode_image(payload))


def jpeg_kinds() -> dict[str, bytes]:
    """A smooth picture with noise, of sides that no block size divides, as JPEGs of every kind."""
    draw = np.random.default_rng(1)
    waves = 128 + 90 * np.sin(np.add.outer(np.arange(61) / 9, np.arange(83) / 7))
    picture = (waves[..., None] + draw.normal(0, 20, (61, 83, 3))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(picture)
    kinds = {
        "4:4:4": encode_image(image, "JPEG", quality=95, subsampling=0),
        "4:2:2": encode_image(image, "JPEG", quality=90, subsampling=1),
        "4:2:0": encode_image(image, "JPEG", quality=75, subsampling=2),
        "best": encode_image(image, "JPEG", quality=100, subsampling=2),
        "coarse": encode_image(image, "JPEG", quality=3, subsampling=2),
        "progressive": encode_image(image, "JPEG", progressive=True),
        "restart markers": encode_image(image, "JPEG", restart_marker_blocks=3),
        "stored as RGB": encode_image(image, "JPEG", keep_rgb=True),
        "grey": encode_image(image.convert("L"), "JPEG"),
        "with metadata": encode_image(image, "JPEG", exif=Image.Exif(), icc_profile=bytes(300)),
        "a pixel": encode_image(image.crop((0, 0, 1, 1)), "JPEG"),
    }
    for name, factor in (
        ("4:1:1", cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
        ("4:4:0", cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
    ):
        options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
        kinds[name] = cv2.imencode(".jpg", picture, options)[1].tobytes()
    return kinds


class TestJpegPixels:
    """simplejpeg and Pillow carry a libjpeg-turbo each; whatever Pillow says is right."""

    @pytest.mark.parametrize("kind", jpeg_kinds())
    def test_they_are_pillows(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("simplejpeg")
        payload = jpeg_kinds()[kind]
        with Image.open(io.BytesIO(payload)) as image:
            assert codec._jpeg_pixels(payload, image) is not None
        got = decode_image(payload)
        assert got.flags.writeable and got.flags.c_contiguous
        monkeypatch.setattr(codec, "simplejpeg", None)
        np.testing.assert_array_equal(got, decode_image(payload))

    def test_a_size_that_only_one_of_them_reads_is_not_believed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a stand-in, as the two have not been seen to disagree."""
        payload = jpeg_kinds()["4:2:0"]
        want = decode_image(payload)

        def smaller(_: bytes, *, buffer: np.ndarray) -> np.ndarray:
            buffer[:] = 0
            return buffer[1:]

        monkeypatch.setattr(codec, "simplejpeg", SimpleNamespace(decode_jpeg=smaller))
        np.testing.assert_array_equal(decode_image(payload), want)


def raw_frame(**changes: object) -> RawFrame:
    fields = {
        "key": "a/0",
        "dataset": "test",
        "scene": "a",
        "image": encode_image(Image.fromarray(RGB)),
        "image_ext": "png",
        "width": 7,
        "height": 5,
        "depth": codes_of(np.full((5, 7), 2000, np.uint16), scale_m=0.001),
        "K_px": K_PX,
        "meta": {"camera": "c"},
    }
    return RawFrame(**(fields | changes))


class TestFrame:
    def test_image_depth_and_description(self) -> None:
        frame = decode_frame(raw_frame())
        np.testing.assert_array_equal(frame.image, RGB)
        np.testing.assert_array_equal(frame.depth_m, np.full((5, 7), 2, np.float32))
        assert (frame.key, frame.dataset, frame.scene, frame.meta) == (
            "a/0",
            "test",
            "a",
            {"camera": "c"},
        )
        assert frame.K_px is K_PX

    def test_shapes_must_agree(self) -> None:
        depth = codes_of(np.full((5, 6), 2000, np.uint16), scale_m=0.001)
        with pytest.raises(BadFrame, match="differ in shape"):
            decode_frame(raw_frame(depth=depth))

    def test_a_picture_is_not_a_frame(self) -> None:
        with pytest.raises(BadFrame, match="no depth or no intrinsics"):
            decode_frame(raw_frame(depth=None))
