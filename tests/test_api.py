"""import flatdepth: the same figures and the same mistakes as on the command line."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flatdepth
from flatdepth.cli import parse_config
from flatdepth.commands.predict import main as predict_command
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import Request, judge
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import Kind
from tests.conftest import TinySets

DEMO = "shards/demo_vitt.safetensors"
ORIENTATION, EXIF_IFD, FOCAL_35MM = 0x0112, 0x8769, 0xA405
HEIGHT, WIDTH = 45, 63


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of noise that lies on its side in its file and states its focal length."""
    pixels = np.random.default_rng(0).integers(0, 256, (WIDTH, HEIGHT, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif.get_ifd(EXIF_IFD)[FOCAL_35MM] = 28
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


@pytest.fixture(scope="module", params=["metric", "relative"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    return save_weights(DepthAnythingV2("vitt", kind=kind, max_depth_m=20.0), folder / "w")[1]


def test_everything_offered_is_there() -> None:
    assert set(flatdepth._MODULES) == set(flatdepth.__all__)
    for name in flatdepth.__all__:
        assert getattr(flatdepth, name).__module__.startswith(flatdepth._MODULES[name])
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        flatdepth.lod  # noqa: B018


def test_a_prediction_is_that_of_the_command(photo: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [f"--checkpoint={checkpoint}", "--write=npy", "--size=28", "--device=cpu"]
    assert predict_command([str(photo), f"--out={out}", *options]) == 0
    expected = np.load(out / "photo_depth.npy")
    model = flatdepth.load(checkpoint, device="cpu")
    with Image.open(photo) as opened:
        upright = np.asarray(opened.transpose(Image.Transpose.ROTATE_270))
        found = [model.predict(image, size=28) for image in (photo, str(photo), opened, upright)]
    for prediction in found:
        assert prediction.values.dtype == np.float32
        assert prediction.values.shape == (WIDTH, HEIGHT)[::-1]
        np.testing.assert_array_equal(prediction.values, expected)


def test_the_camera_is_known_only_if_somebody_says_it(photo: Path) -> None:
    model = flatdepth.load(DEMO, device="cpu")
    exif = model.predict(photo, size=14).camera
    assert exif is not None
    focal = 28 * np.hypot(HEIGHT, WIDTH) / np.hypot(36, 24)
    expected = [[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]]
    np.testing.assert_allclose(exif.K_px, expected)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert model.predict(pixels, size=14).camera is None
    given = model.predict(pixels, size=14, intrinsics=(50, 60, 31, 22)).camera
    assert given is not None
    np.testing.assert_array_equal(given.K_px, [[50, 0, 31.5], [0, 60, 22.5], [0, 0, 1]])
    millimetres = (4, 4, 31, 22)
    with pytest.raises(UserError, match="see 166 degrees"):
        model.predict(pixels, size=14, intrinsics=millimetres)
    insisted = model.predict(pixels, size=14, intrinsics=millimetres, unusual_camera=True).camera
    assert insisted is not None and insisted.K_px[0, 0] == 4


def test_tiles_refine_what_the_whole_picture_says() -> None:
    model = flatdepth.load(DEMO, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    whole, tiled = (model.predict(pixels, size=28, tiles=tiles).values for tiles in (False, True))
    assert whole.shape == tiled.shape and not np.array_equal(whole, tiled)
    assert tiled.min() > 0 and tiled.max() <= model.model.max_depth_m


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3)), r"expected uint8 of shape \(h, w, 3\), got float64 of shape"),
        (np.zeros((4, 5), np.uint8), r"got uint8 of shape \(4, 5\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got uint8 of shape \(0, 5, 3\)"),
        ("gone.jpg", "gone.jpg: the file cannot be read"),
        (__file__, "not an image"),
        (Image.new("F", (4, 5)), "image: the image holds floating-point values"),
    ],
)
def test_what_is_no_picture_is_named(image: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        flatdepth.load(DEMO, device="cpu").predict(image, size=14)  # type: ignore[arg-type]


def test_a_mistaken_option_is_named() -> None:
    with pytest.raises(UserError, match="expected a positive multiple of 14, got 15"):
        flatdepth.load(DEMO, device="cpu").predict(np.zeros((4, 5, 3), np.uint8), size=15)


def test_shards_are_opened(tiny_sets: TinySets) -> None:
    with flatdepth.open_shards(tiny_sets.rooms) as found, ShardSet.open(tiny_sets.rooms) as shards:
        assert list(found.keys) == list(shards.keys) and len(found) == 15
        assert found.read(3).image == shards.read(3).image
    with flatdepth.open_shards("shards/demo_art") as art:
        assert (art.kind, len(art)) == ("art", 5)


def test_training_takes_a_configuration_or_a_file(tiny_sets: TinySets, tmp_path: Path) -> None:
    path = tiny_sets.config(tmp_path)
    config = parse_config(flatdepth.TrainConfig, [f"--config={path}"], prog="", description=None)
    changes = {"steps": 2, "model.max_depth_m": 10.0, "eval.every": 2, "name": "file"}
    assert flatdepth.configure(path) == config
    assert flatdepth.configure(path, changes).eval.every == 2
    of_file = flatdepth.train(path, {**changes, "runs": tmp_path / "runs"})
    changed = dataclasses.replace(
        config,
        steps=2,
        name="object",
        model=dataclasses.replace(config.model, max_depth_m=10.0),
        eval=dataclasses.replace(config.eval, every=2),
    )
    of_object = flatdepth.train(changed)
    assert of_file["finished"] and of_file["name"] == "file"
    assert of_file["evaluations"] == of_object["evaluations"]
    assert (tmp_path / "runs" / "file" / "report.html").is_file()
    with pytest.raises(UserError, match=r"did you mean 'optim.lr'"):
        flatdepth.train(path, {"optim.lrr": 1e-3})
    with pytest.raises(UserError, match=r"overrides: expected none with a TrainConfig"):
        flatdepth.train(config, {"steps": 2})


def test_figures_are_those_of_the_judge(tiny_sets: TinySets) -> None:
    found = flatdepth.evaluate(
        DEMO, tiny_sets.rooms, paste_seed=1, art=tiny_sets.pictures, images=4, size=56
    )
    request = Request(
        checkpoints=(DEMO,),
        kinds=(None,),
        max_depths_m=(None,),
        trained_on=(None,),
        data=(str(tiny_sets.rooms),),
        art=(str(tiny_sets.pictures),),
        protocol=PROTOCOLS["none"],
        size=56,
        paste_seed=1,
        images=4,
    )
    expected = judge(request, torch.device("cpu"), lambda _done, _total: None)
    assert found.domains[0].tables == expected.domains[0].tables
    assert found.domains[0].tables[0]["flat"]["abs_rel"].count > 0
    with pytest.raises(UserError, match=r"protocol: expected one of none, .*, got 'kity'"):
        flatdepth.evaluate(DEMO, tiny_sets.rooms, protocol="kity")
