"""The recipes of docs/extending.md do what they say, run as they are printed."""

import importlib
import re
import runpy
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from flatdepth import config
from flatdepth.augment.draw.content import CONTENTS, make_content
from flatdepth.augment.draw.texture import draw_textures, look_row
from flatdepth.augment.plan.appearance import OUTLINES
from flatdepth.augment.plan.layout import Paste
from flatdepth.cli import parse_config
from flatdepth.config import ContentShares, LossConfig, ShapeShares, TrainConfig
from flatdepth.data.readers import READERS
from flatdepth.data.shards.codec import decode_frame
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.judge.metrics import FORMULAS, RegionTable, image_metrics
from flatdepth.models import depth_anything
from flatdepth.models.checkpoint import open_model, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import UNITS
from flatdepth.models.networks import CLASSES, network_class
from flatdepth.training import losses
from flatdepth.training.losses import depth_loss
from flatdepth.types import METRICS, Region
from tests import test_paste
from tests.conftest import REPOSITORY

Recipe = Callable[[str], ModuleType]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """Imports the code below a heading as a module; afterwards every table is as it was."""
    text = (REPOSITORY / "docs" / "extending.md").read_text("utf-8")
    tables = [
        *(READERS, CONTENTS, OUTLINES, config.LOSSES, losses.LOSSES, METRICS, FORMULAS),
        depth_anything.ENCODERS,
    ]
    before = [dict(table) for table in tables]
    names = {name: list(facts.encoders) for name, facts in config.NETWORKS.items()}

    def run(heading: str) -> ModuleType:
        (code,) = re.findall(rf"^## {heading}\n.*?^```python\n(.*?)^```", text, re.M | re.S)[:1]
        name = f"recipe_{heading.replace(' ', '_').lower()}"
        (tmp_path / f"{name}.py").write_text(code, "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    yield run
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]
    for network, encoders in names.items():
        config.NETWORKS[network].encoders[:] = encoders


def test_the_names_in_the_config_have_something_behind_them() -> None:
    assert list(config.NETWORKS) == list(CLASSES)
    for name, facts in config.NETWORKS.items():
        network = network_class(name)
        assert network.name == name and list(network.sizes) == facts.encoders
        assert set(facts.kinds) <= set(UNITS)
    assert list(config.LOSSES) == list(losses.LOSSES)
    assert list(METRICS) == list(FORMULAS)
    assert set(asdict(ContentShares())) == set(CONTENTS)
    assert set(asdict(ShapeShares())) == set(OUTLINES)


def test_a_reader(recipe: Recipe, tmp_path: Path) -> None:
    recipe("A reader")
    raw, out = tmp_path / "raw", tmp_path / "set"
    raw.mkdir()
    mm = np.random.default_rng(0).integers(500, 9000, (60, 80)).astype(np.uint16)
    mm[:9] = 0
    Image.new("RGB", (80, 60), (30, 90, 160)).save(raw / "one.jpg")
    Image.fromarray(mm).save(raw / "one.png")
    main = runpy.run_path(str(REPOSITORY / "tools" / "pack.py"))["main"]
    assert main(["mine", "--raw", str(raw), "--out", str(out), "--workers", "1"]) == 0
    with ShardSet.open(str(out)) as shards:
        frame = decode_frame(shards.read(0))
    assert (frame.key, frame.dataset) == ("one", "mine")
    np.testing.assert_array_equal(np.isnan(frame.depth_m), mm == 0)
    np.testing.assert_allclose(frame.depth_m[9:], mm[9:] / 1000, rtol=1e-6)


def planned(**changes: object) -> Paste:
    settings = replace(test_paste.ALWAYS, max_pastes=1, layout=test_paste.STANDING, **changes)
    (paste,) = test_paste.plan(test_paste.wall_frame(0), 4, settings)
    return paste


def test_a_content(recipe: Recipe) -> None:
    module = recipe("A content")
    others = dict.fromkeys(asdict(ContentShares()), 0.0)
    paste = planned(content=module.WithStripes(**others, stripes=1.0), framed=0.0, area=(0.2, 0.3))
    assert str(paste.kind) == "stripes" and paste.kind.region is Region.ART
    frame = test_paste.wall_frame(0)
    content = make_content(paste, frame, test_paste.WHOLE, test_paste.K, test_paste.SOURCES)
    assert content.picture is not None and content.picture.shape[1::-1] == paste.picture_px
    colours = {tuple(colour) for colour in content.picture.reshape(-1, 3).tolist()}
    assert colours == {(40, 60, 90), (230, 225, 210)}
    _, after = test_paste.shown_on([frame], [(paste,)], [[content]])
    inside = after.region == Region.ART
    m_px = paste.rectangle.plane @ np.linalg.inv(test_paste.K)
    v, u = (index.double().numpy() + 0.5 for index in inside[0, 0].nonzero(as_tuple=True))
    plane_m = 1 / (u * m_px[0] + v * m_px[1] + m_px[2])
    assert len(u) > 1000
    np.testing.assert_allclose(after.depth_m[inside], plane_m, rtol=1e-5)


def test_an_outline(recipe: Recipe) -> None:
    """As large as a rectangle with half circles for two of its sides."""
    module = recipe("An outline")
    others = dict.fromkeys(asdict(ShapeShares()), 0.0)
    paste = planned(
        shape=module.WithStadium(**others, stadium=1.0), framed=0.0, content=test_paste.MIRRORS
    )
    width, height = paste.rectangle.width, paste.rectangle.height
    across = 200
    size = (round(across * width / height), across)
    paste = test_paste.plain(paste, picture_px=size)
    blank = torch.zeros(1, 4, size[1] + 6, size[0] + 6, dtype=torch.uint8)
    distance = draw_textures(blank, torch.from_numpy(look_row(paste)[None]).float())[0, 3]
    area = float((distance + 0.5).clamp(0, 1).sum())
    short = min(size)
    expected = size[0] * size[1] - (1 - np.pi / 4) * short**2
    assert area == pytest.approx(expected, rel=5e-3)


def test_a_loss(recipe: Recipe) -> None:
    terms = LossConfig(terms={"silog": 1.0})
    with pytest.raises(UserError, match=r"loss\.terms: expected one of 'silog', .* got 'cube'"):
        LossConfig(terms={"cube": 1.0})
    recipe("A loss")
    rng = np.random.default_rng(0)
    pred, truth = (rng.uniform(1, 5, (2, 1, 6, 7)) for _ in range(2))
    weight = rng.integers(0, 3, pred.shape).astype(np.float64)
    truth[weight == 0] = np.nan
    error = np.abs(np.log(pred / truth)) ** 3
    expected = np.nansum(weight * error, (1, 2, 3)) / weight.sum((1, 2, 3))
    arguments = [torch.from_numpy(x) for x in (pred, truth, weight)]
    both = replace(terms, terms={"silog": 1.0, "cube": 2.0})
    found = depth_loss("metric", *arguments, both) - depth_loss("metric", *arguments, terms)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-9)
    with pytest.raises(UserError, match=r"loss\.terms: cube compare metres"):
        TrainConfig(loss=LossConfig(terms={"cube": 1.0}), model=config.ModelConfig(kind="relative"))


def test_a_metric(recipe: Recipe) -> None:
    recipe("A metric")
    truth = torch.linspace(1, 5, 120).reshape(1, 1, 10, 12)
    pred = truth * 1.25
    mask = torch.ones_like(truth, dtype=torch.bool)
    values, pixels = image_metrics(pred, truth, mask, min_m=0.1, max_m=20.0)
    expected = (0.2 / truth.double()).square().mean().sqrt()
    assert float(values[0, list(METRICS).index("rmse_inv")]) == pytest.approx(float(expected))
    table = RegionTable()
    table.add(torch.tensor([0]), "clean", values, pixels)
    assert table.result()["clean"]["rmse_inv"] == pytest.approx(float(expected))
    assert config.EvalConfig(metric="clean.rmse_inv").metric == "clean.rmse_inv"


def test_a_model(recipe: Recipe, tmp_path: Path) -> None:
    arguments = ["--model.encoder=vitxs"]
    with pytest.raises(UserError, match=r"expected one of 'vitt', .* got 'vitxs'"):
        parse_config(TrainConfig, arguments, prog="train.py", description=None)
    recipe("A model")
    parsed = parse_config(TrainConfig, arguments, prog="train.py", description=None)
    torch.manual_seed(0)
    model = DepthAnythingV2(parsed.model.encoder, kind="metric").eval()
    image = torch.rand(1, 3, 28, 42)
    _, path = save_weights(model, tmp_path / "weights")
    again, _ = open_model(str(path))
    with torch.no_grad():
        found = again(image)
        assert found.shape == (1, 1, 28, 42) and torch.equal(found, model(image))
