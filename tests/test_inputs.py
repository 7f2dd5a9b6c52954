"""Pictures to predict on: orientation, modes, focal lengths, names, and every kind of damage."""

import io
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from flatdepth.errors import BadFrame, UserError, printable
from flatdepth.predict.inputs import Input, find_inputs, focal_from_exif, open_photo

pillow_heif.register_heif_opener()

# EXIF 2.32, tag 274: where the stored row 0 and the stored column 0 are in the upright picture.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores with this orientation, by the definition of the tag."""
    row_zero, column_zero = SIDES[orientation]
    image = upright if row_zero in ("top", "bottom") else upright.swapaxes(0, 1)
    image = image[::-1] if row_zero in ("bottom", "right") else image
    return image[:, ::-1] if column_zero in ("right", "bottom") else image


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.fixture
def upright() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {})]
)
def test_pictures_are_turned_upright(
    tmp_path: Path, upright: np.ndarray, orientation: int, name: str, options: dict[str, object]
) -> None:
    pixels = np.ascontiguousarray(stored(upright, orientation))
    path = save(tmp_path / name, pixels, exif=oriented(orientation), **options)
    np.testing.assert_array_equal(open_photo(path).image, upright)


@pytest.mark.parametrize("orientation", SIDES)
def test_jpeg_and_heic_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[32:, :48], upright[:32, 48:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    pixels = np.ascontiguousarray(stored(upright, orientation))
    exif = oriented(orientation).tobytes()
    # In HEIC the tag becomes boxes (irot, imir) that the decoder applies; it must count once.
    for name in ("a.jpg", "a.heic", "a.avif", "a.mpo"):
        image = open_photo(save(tmp_path / name, pixels, exif=exif, quality=95)).image
        assert image.shape == upright.shape, name
        for v, u in ((12, 20), (50, 20), (12, 80), (50, 80)):
            distance = np.abs(image[v, u].astype(int) - upright[v, u])
            assert distance.max() < 30, (name, v, u)


def test_an_mpo_shows_its_first_picture(tmp_path: Path) -> None:
    black, white = (Image.new("RGB", (20, 10), colour) for colour in ("black", "white"))
    path = save(tmp_path / "a.mpo", black, save_all=True, append_images=[white])
    assert open_photo(path).image.max() == 0


def test_colour_modes_become_rgb(tmp_path: Path, upright: np.ndarray) -> None:
    grey = upright[..., 0]
    repeated = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(open_photo(save(tmp_path / "l.png", grey)).image, repeated)
    deep = grey.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(open_photo(save(tmp_path / "i16.png", deep)).image, repeated)
    twelve = grey.astype(np.uint16) * 16 + 7
    path = save(tmp_path / "i12.png", twelve)
    np.testing.assert_array_equal(open_photo(path, image_bits=12).image, repeated)
    with pytest.raises(BadFrame, match=f"values up to {twelve.max()}, more than 8 bits"):
        open_photo(path, image_bits=8)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(open_photo(save(tmp_path / "1.png", bits)).image)) == {0, 255}
    palette = Image.fromarray(upright).quantize(200)
    np.testing.assert_array_equal(
        open_photo(save(tmp_path / "p.png", palette)).image, np.asarray(palette.convert("RGB"))
    )
    # Naive CMYK: channel = 255 - ink where black is 0.
    inks = np.concatenate([255 - upright, np.zeros((9, 14, 1), np.uint8)], axis=2)
    cmyk = Image.frombytes("CMYK", (14, 9), inks.tobytes())
    opened = open_photo(save(tmp_path / "c.tif", cmyk)).image
    assert np.abs(opened.astype(int) - upright).max() <= 1


def test_transparent_pixels_show_white(tmp_path: Path, upright: np.ndarray) -> None:
    alpha = np.zeros((9, 14, 1), np.uint8)
    alpha[:, 7:] = 255
    image = open_photo(save(tmp_path / "a.png", np.concatenate([upright, alpha], axis=2))).image
    assert (image[:, :7] == 255).all()
    np.testing.assert_array_equal(image[:, 7:], upright[:, 7:])


@settings(deadline=None)
@given(
    focal=st.floats(8, 800),
    height=st.integers(10, 5000),
    width=st.integers(10, 5000),
)
def test_focal_length_in_35_mm_film_keeps_the_diagonal_angle(
    focal: float, height: int, width: int
) -> None:
    focal_px = focal_from_exif({0xA405: focal}, height, width)
    assert focal_px is not None
    film = 2 * math.atan(math.hypot(36, 24) / 2 / focal)
    assert 2 * math.atan(math.hypot(height, width) / 2 / focal_px) == pytest.approx(film)


@pytest.mark.parametrize(("unit", "mm"), [(None, 25.4), (2, 25.4), (3, 10.0), (4, 1.0), (5, 1e-3)])
def test_focal_length_by_sensor_resolution(unit: int | None, mm: float) -> None:
    # A 23.6 mm wide sensor of 6000 px behind a 35 mm lens; the picture was halved since.
    details: dict[int, object] = {0x920A: IFDRational(35), 0xA20E: 6000 / 23.6 * mm, 0xA002: 6000}
    if unit is not None:
        details[0xA210] = unit
    expected = 35 / 23.6 * 6000
    assert focal_from_exif(details, 4000, 6000) == pytest.approx(expected)
    assert focal_from_exif(details, 2000, 3000) == pytest.approx(expected / 2)
    assert focal_from_exif(details, 3000, 2000) == pytest.approx(expected / 2)  # turned upright


@pytest.mark.parametrize(
    "details",
    [
        {},
        {0xA405: 0},
        {0xA405: -35},
        {0xA405: "wide"},
        {0xA405: 10**9},
        {0x920A: 35.0},
        {0x920A: 35.0, 0xA20E: IFDRational(0, 0)},
        {0x920A: 35.0, 0xA20E: 200.0, 0xA210: 99},
    ],
)
def test_senseless_focal_lengths_are_unknown(details: dict[int, object]) -> None:
    assert focal_from_exif(details, 300, 400) is None


def test_focal_length_is_read_from_files(tmp_path: Path, upright: np.ndarray) -> None:
    exif = oriented(6)
    exif.get_ifd(0x8769)[0xA405] = 26
    expected = 26 * math.hypot(9, 14) / math.hypot(36, 24)
    for name in ("a.jpg", "a.png", "a.webp"):
        photo = open_photo(save(tmp_path / name, upright, exif=exif))
        assert photo.focal_px == pytest.approx(expected), name
    big = np.zeros((64, 96, 3), np.uint8)
    photo = open_photo(save(tmp_path / "a.heic", big, exif=exif.tobytes()))
    assert photo.focal_px == pytest.approx(26 * math.hypot(64, 96) / math.hypot(36, 24))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_no_harm(tmp_path: Path, upright: np.ndarray) -> None:
    plain = open_photo(save(tmp_path / "plain.jpg", upright)).image
    for number, exif in enumerate([b"Exif\x00\x00junk", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"]):
        path = tmp_path / f"{number}.jpg"
        content = (tmp_path / "plain.jpg").read_bytes()
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        path.write_bytes(content[:2] + segment + content[2:])
        photo = open_photo(path)
        np.testing.assert_array_equal(photo.image, plain)
        assert photo.focal_px is None


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def test_damage_is_named(tmp_path: Path, upright: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(upright).save(buffer, "PNG")
    floats = io.BytesIO()
    Image.fromarray(upright[..., 0].astype(np.float32)).save(floats, "TIFF")
    cases = {
        b"": "the file is empty",
        b"not a picture": "not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not an image",
        b"\x00" * 300: "not an image",
        buffer.getvalue()[:200]: "the image is damaged",
        png_header(9, 9): "the image is damaged",
        png_header(9000, 9000): "the image has 9000 x 9000 pixels; shrink it to at most",
        png_header(60000, 60000): "the image is too large; shrink it to at most",
        floats.getvalue(): "floating-point",
        b"\x00\x00\x00\x18ftypheic" + b"\x00" * 50: "not an image",
    }
    for content, message in cases.items():
        path = tmp_path / "x.png"
        path.write_bytes(content)
        with pytest.raises(BadFrame) as caught:
            open_photo(path)
        assert message in caught.value.detail
        assert "\n" not in caught.value.detail


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFrame, match="the file cannot be read"):
        open_photo(tmp_path / "gone.png")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(found: list[Input]) -> list[str]:
    return [item.name for item in found]


def test_outputs_are_named_after_their_inputs(tmp_path: Path) -> None:
    touch(tmp_path, "p/a/1.jpg", "p/a/2.PNG", "p/b/1.jpg", "p/b/1.heic", "p/notes.txt", "q/1.jpg")
    touch(tmp_path, "p/a/1.gif", "p/b/2.GIF", "q/.notes.txt")
    touch(tmp_path, "p/.hidden.jpg", "p/.cache/1.jpg")
    out = tmp_path / "out"
    assert names(find_inputs([str(tmp_path / "q/1.jpg")], out)) == ["1"]
    with pytest.warns(
        UserWarning, match=r"/p: files left unread by their endings: 2 \.gif, 1 \.txt"
    ):
        found = find_inputs([str(tmp_path / "p")], out)
    assert names(found) == ["a/1", "a/2", "b/1.heic", "b/1.jpg"]
    assert names(find_inputs([str(tmp_path / "p" / "**" / "1.jpg")], out)) == ["a/1", "b/1"]
    both = [str(tmp_path / "q"), str(tmp_path / "p/a/1.jpg")]
    assert names(find_inputs(both, out)) == ["q/1", "p/a/1"]


def test_an_input_given_twice_is_done_once(tmp_path: Path) -> None:
    touch(tmp_path, "p/1.jpg")
    arguments = [str(tmp_path / "p/1.jpg"), str(tmp_path / "p"), str(tmp_path / "p" / "*.jpg")]
    assert names(find_inputs([*arguments, f"{tmp_path}/p/../p/1.jpg"], tmp_path / "o")) == ["1"]


def test_a_second_run_does_not_take_the_first_ones_outputs(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "depth/1_side.png")
    out = tmp_path / "depth"
    assert names(find_inputs([str(tmp_path)], out)) == ["1"]
    assert names(find_inputs([str(tmp_path / "**" / "*.*g")], out)) == ["1"]
    with pytest.raises(UserError, match="is also an input"):
        find_inputs([str(out)], out)


def test_brackets_in_folder_names_are_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "[raw] set/1.jpg", "[raw] set/2.jpg")
    assert names(find_inputs([str(tmp_path / "[raw] set")], tmp_path / "o")) == ["1", "2"]
    monkeypatch.chdir(tmp_path / "[raw] set")
    assert names(find_inputs(["*.jpg"], tmp_path / "o")) == ["1", "2"]


def test_patterns_never_lead_out_of_the_output_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg", "p/q/y.jpg")
    found = find_inputs([str(tmp_path / "p" / "*" / ".." / ".." / "*.jpg")], tmp_path / "o")
    assert names(found) == ["x"]


@settings(deadline=None)
@given(
    files=st.sets(
        st.tuples(
            st.sampled_from(["a", "b", "a/b", "."]),
            st.sampled_from(["x", "X", "x.jpg", "x_depth", "y"]),
            st.sampled_from([".jpg", ".png", ".JPG"]),
        ),
        min_size=1,
    )
)
def test_no_two_inputs_share_an_output_name(
    tmp_path_factory: pytest.TempPathFactory, files: set[tuple[str, str, str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    touch(root, *(f"{folder}/{stem}{suffix}" for folder, stem, suffix in files))
    found = names(find_inputs([str(root)], root / "out"))
    assert len(set(found)) == len(files)
    assert not any(name.startswith(("/", "..")) for name in found)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere.jpg", "no such file or folder"),
        ("*.jpg", "the pattern matches no file"),
        ("empty", "expected a folder with pictures"),
    ],
)
def test_an_argument_that_names_nothing_is_a_mistake(
    tmp_path: Path, argument: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_inputs([str(tmp_path / argument)], tmp_path / "out")


def test_a_folder_that_cannot_be_listed_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pictures would be left out in silence."""
    touch(tmp_path, "p/1.jpg", "p/closed/2.jpg")
    listed = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"p/closed: the folder cannot be read \(Permission"):
        find_inputs([str(tmp_path / "p")], tmp_path / "out")


def test_an_argument_of_any_length_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_inputs(["x" * 5000], tmp_path / "out")


def test_pipes_do_not_block(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")
    assert names(find_inputs([str(tmp_path)], tmp_path / "out")) == ["1"]


def test_names_are_printed_on_one_line() -> None:
    assert printable(Path("a\nb\x1b[31m/ü\udcff.jpg")) == "a\\nb\\x1b[31m/ü\\udcff.jpg"
