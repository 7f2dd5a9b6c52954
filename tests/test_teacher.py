"""Photographs with the depth of a teacher: laws of its metres, planes where it is fooled, bytes."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.commands import pack as tool
from flatdepth.config import TrainConfig
from flatdepth.data.components import components
from flatdepth.data.pack import pack
from flatdepth.data.polygons import Outline, write_labelme
from flatdepth.data.readers.rooms import PicturesReader
from flatdepth.data.shards.codec import decode_frame
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import pixel_rays
from flatdepth.models.network import Kind
from flatdepth.predict import teacher
from flatdepth.predict.teacher import MEDIAN_M, PhotosReader, metres_of
from flatdepth.training import runlog
from flatdepth.training.loop import train
from flatdepth.types import Frame, RawFrame, Region
from tests.conftest import REPOSITORY, TinySets
from tests.test_predict import Stub

HEIGHT, WIDTH = 56, 84
MIRROR = (20, 10, 50, 40)
CPU = torch.device("cpu")


def wall(height: int, width: int) -> torch.Tensor:
    """Inverse depth that is affine in the pixels."""
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return 0.3 + 0.002 * u - 0.001 * v


def fooled(image: torch.Tensor) -> torch.Tensor:
    """1/m: a wall, and twice as deep where the picture is dark."""
    inverse = wall(*image.shape[-2:])
    return torch.where(image[:, :1] < 0.3, inverse / 2, inverse)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"weights")
    return path


def teach(monkeypatch: pytest.MonkeyPatch, kind: Kind = "metric") -> Stub:
    scale = 700.0

    def answer(image: torch.Tensor) -> torch.Tensor:
        inverse = fooled(image)
        return 1 / inverse if kind == "metric" else scale * inverse

    stub = Stub(answer, kind=kind, side=HEIGHT)
    monkeypatch.setattr(teacher, "_open_teacher", lambda *_: (stub, CPU))
    return stub


def photograph(path: Path, **options: object) -> None:
    """Grey, with a dark mirror; upright unless its EXIF data say otherwise."""
    pixels = np.full((HEIGHT, WIDTH, 3), 180, np.uint8)
    left, top, right, bottom = MIRROR
    pixels[top:bottom, left:right] = 20
    path.parent.mkdir(parents=True, exist_ok=True)
    orientation = options.pop("orientation", 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0xA405] = 28
    image = Image.fromarray(pixels)
    image = image.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else image
    image.save(path, exif=exif, **options)


def labelme(path: Path, label: str = "mirror") -> None:
    left, top, right, bottom = (float(side) for side in MIRROR)
    points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    one = Outline(label=label, parts=(points,))
    path.write_bytes(write_labelme([one], "1.jpg", WIDTH, HEIGHT))


def reader(raw: Path, weights: Path, **options: object) -> PhotosReader:
    return PhotosReader(str(raw), teacher=str(weights), **options)


def read(raw: Path, weights: Path, **options: object) -> tuple[RawFrame, Frame]:
    own = reader(raw, weights, **options)
    (item,) = own.list().items
    found = own.read(item)
    return found, decode_frame(found)


def test_metric_depth_is_inverted_and_its_end_is_sky() -> None:
    inverse = np.array([[0.5, 0.02, 1 / 79, 30.0]], np.float32)
    np.testing.assert_allclose(metres_of(inverse, "metric", 80.0), [[2, 50, np.inf, np.nan]])
    np.testing.assert_allclose(metres_of(inverse, "metric", 200.0)[0, :3], [2, 50, 79])


def test_relative_depth_has_its_median_at_3_m_and_keeps_planes() -> None:
    inverse = 40 * wall(HEIGHT, WIDTH).numpy()
    depth_m = metres_of(inverse, "relative", 0.0)
    assert np.median(depth_m) == pytest.approx(MEDIAN_M, rel=1e-3)
    np.testing.assert_allclose(depth_m * inverse, depth_m[0, 0] * inverse[0, 0], rtol=1e-6)
    np.testing.assert_array_equal(depth_m, metres_of(inverse * 2, "relative", 0.0))
    inverse[:5], inverse[5:9] = 0, -1
    inverse[9] = np.median(inverse[10:]) * MEDIAN_M / 300
    assert np.isposinf(metres_of(inverse, "relative", 0.0)[:10]).all()
    with pytest.raises(BadFrame, match="nowhere positive"):
        metres_of(-inverse.clip(0), "relative", 0.0)


@pytest.mark.filterwarnings("ignore:.*is relative")
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_a_labelled_mirror_has_the_plane_around_it(
    kind: Kind, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(monkeypatch, kind)
    photograph(tmp_path / "raw" / "1.png")
    labelme(tmp_path / "raw" / "1.json")
    raw, frame = read(tmp_path / "raw", weights, polygon_glob="**/*.json")
    assert frame.region is not None and frame.behind_m is not None
    left, top, right, bottom = MIRROR
    mirror = np.zeros((HEIGHT, WIDTH), bool)
    mirror[top:bottom, left:right] = True
    np.testing.assert_array_equal(frame.region == Region.MIRROR, mirror)
    truth = 1 / wall(HEIGHT, WIDTH).numpy()
    ratio = frame.depth_m / truth
    scale = 1.0 if kind == "metric" else np.median(ratio)
    np.testing.assert_allclose(ratio, scale, rtol=2e-4)
    np.testing.assert_allclose((frame.behind_m / truth)[mirror], 2 * scale, rtol=2e-4)
    assert raw.meta["teacher_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert (raw.meta["teacher"], raw.meta["teacher_kind"]) == ("w.safetensors", kind)
    plain, own = read(tmp_path / "raw", weights)
    assert plain.region is None and plain.things is None
    np.testing.assert_array_equal(own.depth_m, frame.behind_m)


def test_photographs_are_packed_upright_with_the_camera_of_their_lens(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned by EXIF: pixels, outlines and depth are those of the picture as it is shown."""
    teach(monkeypatch)
    found = []
    for name, orientation in (("upright", 1), ("turned", 6)):
        photograph(tmp_path / name / "1.jpg", orientation=orientation, quality=100, subsampling=0)
        labelme(tmp_path / name / "1.json")
        found.append(read(tmp_path / name, weights, polygon_glob="*.json", image_glob="*.jpg"))
    (raw, frame), (turned, other) = found
    assert raw.image == (tmp_path / "upright" / "1.jpg").read_bytes()
    assert turned.image_ext == "jpg" and (turned.width, turned.height) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(other.depth_m, frame.depth_m, rtol=1e-6)
    focal = 28 * np.hypot(HEIGHT, WIDTH) / np.hypot(36, 24)
    for one in (raw, turned):
        np.testing.assert_allclose(one.K_px, [[focal, 0, 42], [0, focal, 28], [0, 0, 1]])
        assert one.meta["camera"] == "focal length from EXIF" and not one.meta["intrinsics_assumed"]
    given, _ = read(tmp_path / "turned", weights, fov_deg=90.0)
    assert given.K_px is not None and given.K_px[0, 0] == pytest.approx(42)
    small, _ = read(tmp_path / "turned", weights, polygon_glob="**/*.json", max_side=42)
    assert small.K_px is not None and small.K_px[0, 0] == pytest.approx(focal / 2)
    assert small.region is not None and small.region.shape == (28, 42)
    assert int((small.region > 0).sum()) == 15 * 15


def test_other_formats_and_maps_are_taken(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    teach(monkeypatch)
    photograph(tmp_path / "raw" / "image" / "1.heic", quality=-1)
    left, top, right, bottom = MIRROR
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[top:bottom, left:right] = 255
    (tmp_path / "raw" / "mask").mkdir()
    Image.fromarray(numbers).save(tmp_path / "raw" / "mask" / "1.png")
    raw, frame = read(
        tmp_path / "raw",
        weights,
        image_glob="image/*.heic",
        region_glob="mask/*.png",
        region_names="255:mirror",
    )
    assert raw.image_ext == "jpg"
    np.testing.assert_allclose(frame.depth_m, 1 / wall(HEIGHT, WIDTH).numpy(), rtol=2e-4)


def test_bytes_are_the_same_again_and_damage_is_named(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teach(monkeypatch)
    for name in ("a", "b"):
        photograph(tmp_path / "raw" / f"{name}.jpg")
    (tmp_path / "raw" / "c.jpg").write_bytes(b"no picture")
    outs = [tmp_path / name for name in ("one", "other")]
    for out in outs:
        summary = pack(reader(tmp_path / "raw", weights), out, workers=1)
        assert (summary.frames, summary.damaged) == (2, 1)
    assert "left out c: image unreadable" in capsys.readouterr().err
    one, other = ({p.name: p.read_bytes() for p in sorted(out.iterdir())} for out in outs)
    assert one == other
    weights.write_bytes(b"others")
    with pytest.raises(UserError, match="teacher_sha256"):
        pack(reader(tmp_path / "raw", weights), outs[0], workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region_glob": "*.png", "polygon_glob": "*.json"}, "both given"),
        ({"polygon_glob": "*/*/*/*/*.json"}, "expected at most the 3 runs of wildcards"),
        ({"region_names": "tv:art"}, "labels are for the outlines"),
        ({"focal_mm": 28.0}, "--focal_mm and --sensor_mm: expected both"),
        ({"scene_from": "room"}, "scene_from: expected parent"),
        ({"max_side": -1}, "max_side: expected 0"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(
    options: dict[str, object], message: str, tmp_path: Path, weights: Path
) -> None:
    with pytest.raises(UserError, match=message):
        reader(tmp_path, weights, **options)


def test_what_cannot_teach_is_one_sentence(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        reader(tmp_path, tmp_path / "nowhere.pth")
    photograph(tmp_path / "raw" / "1.jpg")
    teach(monkeypatch, "affine")
    with pytest.raises(UserError, match="expected a metric or relative teacher, found an affine"):
        reader(tmp_path / "raw", weights).list()
    teach(monkeypatch, "relative")
    with pytest.warns(UserWarning, match="made up"):
        reader(tmp_path / "raw", weights).list()
    teach(monkeypatch)
    photograph(tmp_path / "other" / "1.png")
    with pytest.raises(UserError, match="expected photographs"):
        reader(tmp_path / "other", weights, image_glob="*.jpg").list()


def corners(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of an area in four slanted directions, around their outer corners."""
    rows, columns = np.nonzero(mask)
    found = []
    for right, down in ((0, 0), (1, 0), (1, 1), (0, 1)):
        u, v = columns + right, rows + down
        best = np.argmax((2 * right - 1) * u + (2 * down - 1) * v)
        found.append((u[best], v[best]))
    return np.array(found, np.float64)


def test_rendered_photographs_with_outlines_become_training_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of flatbench as JPEG with outlines, a real teacher, three steps of training."""
    raw = tmp_path / "raw"
    raw.mkdir()
    with ShardSet.open(REPOSITORY / "shards" / "flatbench") as bench:
        regions = ((i, bench.frame(i).region) for i in range(0, 40, 2))
        sizes = {i: (own == Region.MIRROR).sum() for i, own in regions if own is not None}
        labelled = [i for i, size in sizes.items() if size > 800][:3]
        for i in labelled:
            frame = bench.frame(i)
            assert frame.region is not None
            height, width = frame.region.shape
            Image.fromarray(frame.image).save(raw / f"{i}.jpg", quality=95)
            number = components((frame.region == Region.MIRROR).astype(np.uint8))
            largest = number == np.argmax(np.bincount(number[number > 0]))
            one = Outline(label="mirror", parts=(corners(largest),))
            (raw / f"{i}.json").write_bytes(write_labelme([one], f"{i}.jpg", width, height))
    out = tmp_path / "set"
    weights = REPOSITORY / "shards" / "demo_lite0.safetensors"
    command = ["photos", "--raw", str(raw), "--teacher", str(weights), "--out", str(out)]
    options = ["--polygon_glob=*.json", "--image_glob=*.jpg", "--size=168", "--fov_deg=60"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert tool.main([*command, *options]) == 0
    assert "with planes" in capsys.readouterr().out
    planar = 0
    with ShardSet.open(out) as shards:
        for i in range(len(shards)):
            frame, about = shards.frame(i), shards.read(i).meta
            rows, columns = np.nonzero(frame.region == Region.MIRROR)
            assert len(rows) > 400 and about["teacher_kind"] == "metric"
            depth_m = frame.depth_m[rows, columns].astype(np.float64)
            if np.isnan(depth_m).any():
                continue
            rays = pixel_rays(frame.K_px, columns + 0.5, rows + 0.5)
            plane, *_ = np.linalg.lstsq(rays, 1 / depth_m, rcond=None)
            np.testing.assert_allclose(depth_m * (rays @ plane), 1, atol=1e-4)
            planar += 1
    assert planar > 0
    pack(PicturesReader(pictures=2, height=84, width=112), str(tmp_path / "art"), workers=1)
    sets = TinySets(rooms=out, pictures=tmp_path / "art")
    config = sets.config(tmp_path, steps=3, eval__every=100, eval__pictures=0)
    monkeypatch.setattr(runlog, "write_report", lambda _: None)  # which takes longer than training
    train_config = parse_config(TrainConfig, [f"--config={config}"], prog="train", description=None)
    assert train(train_config)["finished"]
    history = (tmp_path / "runs" / "tiny" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history][-1] == 3
