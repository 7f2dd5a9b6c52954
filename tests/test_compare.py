"""Systems by name, on one scale, and the command that shows them side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flatdepth.commands.compare import main
from flatdepth.config import NETWORKS
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import open_model
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.preprocessing import PREPROCESSING, Preprocessing, preprocessing
from flatdepth.predict.predictor import PredictOptions
from flatdepth.predict.systems import (
    SYSTEMS,
    OpenedSystem,
    Settings,
    on_one_scale,
    open_system,
    predict_with,
)
from flatdepth.report.side_by_side import EXAMPLES, read_pictures
from tests.test_pointcloud import read_ply

CPU = torch.device("cpu")
VITT = "shards/demo_vitt.safetensors"


class Function(DepthNetwork):
    """A network that is any function of the image and the focal length."""

    def __init__(self, kind: Kind, function: object) -> None:
        nn.Module.__init__(self)
        self.kind, self.max_depth_m, self.function = kind, 80.0, function
        self.canonical_focal_px = self.calibration = None
        self.image_mean = torch.zeros(1)
        self.seen: list[tuple[int, ...]] = []

    multiple = 14  # type: ignore[assignment]

    def forward(self, image: Tensor, focal_px: Tensor | None = None) -> Tensor:
        self.seen.append(tuple(image.shape))
        return self.function(image, focal_px)  # type: ignore[operator]


def opened(
    label: str,
    kind: Kind,
    function: object = None,
    way: Preprocessing = PREPROCESSING["ours"],
) -> OpenedSystem:
    return OpenedSystem(
        label=label,
        network=Function(kind, function),
        kind=kind,
        preprocessing=way,
        weights="",
        licence="",
        note="",
        untrained=False,
    )


# Names.


def test_every_system_has_a_network_that_predicts_its_kind_and_a_preprocessing_that_fits() -> None:
    for name, facts in SYSTEMS.items():
        network = NETWORKS[facts.network]
        assert facts.kind in network.kinds, name
        way = preprocessing(facts.preprocessing, facts.size)
        assert all(side % network.multiple == 0 for side in way.size), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("depth_everything", "--model: expected one of depth_anything_v2, .* or LABEL=WEIGHTS"),
        ("midas_v21", "--model: midas_v21 is no hub id but a file .* give --model midas_v21=FILE"),
        ("mine=random", "--model mine=random: expected one of depth_anything_v2"),
        ("mine=no_such_file.pth", "no_such_file.pth: no such file"),
        ("depth_anything_v2=random:huge", "model.encoder: expected one of vitt, .* found 'huge'"),
    ],
)
def test_what_cannot_be_opened_is_named(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_system(given, Settings(), CPU)


def test_ours_are_seen_as_in_training_and_others_as_their_authors_do() -> None:
    ours = open_system(f"mine={VITT}", Settings(), CPU)
    assert ours.preprocessing == preprocessing("ours", 518) and not ours.untrained
    official = open_system("depth_anything_v2=random:vitt", Settings(), CPU)
    assert official.preprocessing == PREPROCESSING["depth_anything_v2"]
    assert official.untrained and official.kind == "relative"
    smaller = open_system(f"mine={VITT}", Settings(size=56), CPU)
    assert smaller.preprocessing.size == (56, 56)
    for name, taken in (("depth_anything_v2", 126), ("midas_v21_small", 128), ("resnet50", 128)):
        assert (
            min(open_system(f"{name}=random", Settings(size=128), CPU).preprocessing.size) == taken
        )
    with pytest.raises(UserError, match="--size: expected 8 to"):
        Settings(size=0)
    again = open_system("depth_anything_v2=random:vitt", Settings(), CPU)
    assert official.network is not None and again.network is not None
    for one, other in zip(official.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)


# Predictions.


def test_a_prediction_is_what_the_network_says_of_the_prepared_picture() -> None:
    """The mean of red at the input's size, times the mean focal length of its two sides."""
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    way = preprocessing("midas_v21_small", 64)
    system = opened("a", "affine", lambda x, f: x[:, :1] * f[:, None, None, None], way)
    found = predict_with(system, image, 45.0, Settings())
    pixels = torch.tensor(image).movedim(-1, 0)[None].float() / 255
    prepared = way.prepare(pixels)
    focal = 45 * (prepared.shape[-2] / 60 + prepared.shape[-1] / 90) / 2
    expected = way.restore(prepared[:, :1] * focal, 60, 90)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.shape == (60, 90)


@pytest.mark.parametrize("kind", ["metric", "relative", "affine"])
def test_tiles_are_for_every_kind(kind: Kind) -> None:
    ramp = np.linspace(30, 220, 200).astype(np.uint8)[None, :, None].repeat(150, 0).repeat(3, 2)
    system = opened("a", kind, lambda x, _: 1 + x[:, :1], preprocessing("ours", 56))
    found = predict_with(system, ramp, 100.0, Settings(tiles=True))
    np.testing.assert_allclose(found, 1 + ramp[..., 0] / 255, atol=0.02)
    assert isinstance(system.network, Function) and len(system.network.seen) > 3


def test_values_that_are_not_finite_are_refused() -> None:
    system = opened("broken", "relative", lambda x, _: x[:, :1] / 0)
    with pytest.raises(UserError, match="broken predicts values that are not finite"):
        predict_with(system, np.full((28, 28, 3), 9, np.uint8), 1.0, Settings())


# One scale.


def depth(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 5, (30, 40)).astype(np.float32)


def said(kind: Kind, truth_m: np.ndarray, scale: float, shift: float) -> np.ndarray:
    quantity = 1 / truth_m if kind == "relative" else truth_m
    return (scale * quantity + shift).astype(np.float32)


def test_scale_and_shift_are_fitted_to_the_truth_in_each_kind_s_own_quantity() -> None:
    truth_m = depth()
    holes = truth_m.copy()
    holes[:5] = np.nan
    systems = [opened(kind, kind) for kind in KINDS]
    maps = [said("metric", truth_m, 1.1, 0), *(said(k, truth_m, 3, 2) for k in KINDS[1:])]
    common = on_one_scale(maps, systems, holes)
    np.testing.assert_allclose(common.depths_m[0], 1.1 * truth_m, rtol=1e-6)
    for depth_m in common.depths_m[1:]:
        np.testing.assert_allclose(depth_m, truth_m, rtol=1e-4)
    assert list(common.alignments) == [
        "none (metric)",
        "scale and shift in inverse depth by least squares, to the truth",
        "scale and shift in depth by least squares, to the truth",
    ]


def test_without_truth_the_first_metric_system_is_the_scale() -> None:
    truth_m = depth(1)
    systems = [opened("r", "relative"), opened("m", "metric"), opened("a", "affine")]
    maps = [said("relative", truth_m, 7, 1), truth_m, said("affine", truth_m, 0.1, -1)]
    common = on_one_scale(maps, systems)
    for depth_m in common.depths_m:
        np.testing.assert_allclose(depth_m, truth_m, rtol=1e-4)
    assert [text.rpartition(", ")[2] for text in common.alignments] == [
        "to m",
        "none (metric)",
        "to m",
    ]


@pytest.mark.parametrize("kind", ["relative", "affine"])
def test_without_metres_depth_runs_from_1_to_10(kind: Kind) -> None:
    truth_m = depth(2)
    maps = [said(kind, truth_m, 5, 3), said(kind, truth_m, 0.2, -9)]
    common = on_one_scale(maps, [opened("a", kind), opened("b", kind)])
    first, second = common.depths_m
    assert np.percentile(first, 2) >= 1 - 1e-3 and np.percentile(first, 98) <= 10 + 1e-3
    np.testing.assert_allclose(first, second, rtol=1e-3)
    assert common.alignments[0] == "none: the others are fitted to it"


KINDS: Sequence[Kind] = ("metric", "relative", "affine")


# The command.


def test_the_default_pictures_hold_mirrors_art_and_a_mural() -> None:
    (url,) = EXAMPLES
    pictures = read_pictures([], Path("nowhere"), most=3, cameras=PredictOptions())
    assert [one.name.split()[-1] for one in pictures] == list(EXAMPLES[url])
    shards = ShardSet.open(url)
    for one, wanted in zip(pictures, (1, 2, 2), strict=True):
        assert one.region is not None and (one.region == wanted).mean() > 0.05
        assert one.name.split()[-1] in shards.keys


def test_the_command_writes_page_sheets_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "a b.png")
    out = tmp_path / "out"
    arguments = [
        f"--model=mine={VITT}",
        "--model=depth_anything_v2=random:vitt",
        "--input",
        "shards/flatbench",
        str(photos),
        "--images=2",
        "--size=56",
        "--write=npy,ply",
        f"--out={out}",
    ]
    main(arguments)
    assert capsys.readouterr().out.startswith("3 pictures by 2 systems; open ")
    document = json.loads((out / "compare.json").read_text())
    names = document["pictures"]
    assert len(names) == 3 and names[2] == "a b"
    mine, official = document["systems"]
    assert (mine["label"], mine["alignment"]) == ("mine", "none (metric)")
    assert official["untrained"] and "to the truth; " in official["alignment"]
    assert official["alignment"].endswith("to mine")
    assert 0 < mine["figures"]["background"]["abs_rel"] < 10
    page = (out / "compare.html").read_text()
    assert "random weights" in page.lower() and "a b" in page
    for stem in ("a_b", names[0].replace(" ", "_").replace("/", "_")):
        with Image.open(out / f"{stem}_sheet.png") as sheet:
            assert sheet.width > 1000
        for label in ("mine", "depth_anything_v2"):
            depth_m = np.load(out / f"{stem}_{label}_depth.npy")
            assert depth_m.dtype == np.float32 and np.isfinite(depth_m).all()
            _, points, _ = read_ply((out / f"{stem}_{label}_points.ply").read_bytes())
            assert 0 < len(points) <= depth_m.size

    with pytest.raises(UserError, match="would be overwritten; choose another --out"):
        main(arguments)
    with pytest.raises(UserError, match="--model: mine is given twice"):
        main([f"--model=mine={VITT}", f"--model=mine={VITT}", f"--out={tmp_path / 'two'}"])
    assert not (tmp_path / "two").exists()


def test_an_assumed_focal_length_is_said_where_metres_hang_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    arguments = ["--model=da3_metric=random", "--model=da3_mono=random", "--size=56"]
    arguments += ["--input", str(tmp_path / "photo.png")]
    main([*arguments, f"--out={tmp_path / 'assumed'}"])
    warned = capsys.readouterr().err
    guess = "focal length assumed for 1 of 1 pictures (--fov says it)"
    assert warned.count(guess) == 1 and f"warning: da3_metric: {guess}" in warned
    assert guess in (tmp_path / "assumed" / "compare.html").read_text()
    main([*arguments, f"--out={tmp_path / 'said'}", "--fov=70"])
    assert "assumed" not in capsys.readouterr().err


def test_the_network_itself_is_what_the_page_shows(tmp_path: Path) -> None:
    """The command's depth against the network called by hand, at the size of a frame's input."""
    main([f"--model=mine={VITT}", "--size=56", "--write=npy", f"--out={tmp_path}"])
    shards = ShardSet.open("shards/flatbench")
    key = EXAMPLES["shards/flatbench"][0]
    frame = shards.frame(list(shards.keys).index(key))
    model, _ = open_model(VITT)
    assert isinstance(model, DepthAnythingV2)
    way = preprocessing("ours", 56)
    image = torch.tensor(frame.image).movedim(-1, 0)[None].float() / 255
    with torch.no_grad():
        expected = way.restore(model(way.prepare(image)), *frame.depth_m.shape)[0, 0].numpy()
    name = f"{frame.dataset}_{frame.key}".replace("/", "_")
    np.testing.assert_allclose(np.load(tmp_path / f"{name}_mine_depth.npy"), expected, rtol=1e-5)
