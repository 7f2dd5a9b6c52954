"""The Rerun viewer: what is logged to it, and mistakes."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flatdepth.commands import view
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.training import runlog
from flatdepth.training.loop import train
from tests.conftest import TinySets
from tests.test_preview import read_config

KINDS = "AnnotationContext DepthImage Image Pinhole Scalars SegmentationImage TextDocument"
Logged = tuple[str, tuple[Any, ...], dict[str, Any]]


class Recording:
    """Keeps what is logged, by timeline, place on it, and path."""

    def __init__(self, name: str) -> None:
        assert name == "flatdepth"
        self.logged: dict[tuple[str, int, str], Logged] = {}
        self.time = ("static", 0)
        latest.append(self)

    def save(self, path: str) -> None:
        Path(path).write_bytes(b"recording")

    def set_time(self, timeline: str, sequence: int) -> None:
        self.time = (timeline, sequence)

    def log(self, path: str, value: Logged, static: bool = False) -> None:
        self.logged[(*(("static", 0) if static else self.time), path)] = value

    def disconnect(self) -> None:
        self.time = ("ended", 0)

    def at(self, number: int) -> dict[str, Logged]:
        """What is logged of a picture."""
        return {p: v for (line, n, p), v in self.logged.items() if (line, n) == ("picture", number)}


latest: list[Recording] = []


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the viewer's package."""
    module = ModuleType("rerun")
    for kind in KINDS.split():
        setattr(module, kind, lambda *values, _kind=kind, **named: (_kind, values, named))
    module.ViewCoordinates = type("ViewCoordinates", (), {"RDF": "RDF"})  # type: ignore[attr-defined]
    module.RecordingStream = Recording  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rerun", module)
    latest.clear()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=20.0)
    return save_weights(model, tmp_path / "w")[1]


@pytest.mark.usefixtures("rerun")
def test_photographs_are_logged_with_their_camera_and_every_network(
    weights: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    out = tmp_path / "new" / "scenes.rrd"
    pictures = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    options = [f"--checkpoint={weights}"] * 2
    view.main([*pictures, *options, "--size=28", "--fov=90", f"--out={out}", "--device=cpu"])
    assert out.read_bytes() == b"recording"
    assert [path.name for path in out.parent.iterdir()] == ["scenes.rrd"]
    (recording,) = latest
    for number, name in enumerate(("a", "b")):
        logged = recording.at(number)
        kind, _, camera = logged["camera"]
        assert kind == "Pinhole" and camera["resolution"] == [40, 30]
        # a field of view of 90 degrees across 40 px, pixel centres at integer + 0.5
        expected = [[20, 0, 20], [0, 20, 15], [0, 0, 1]]
        np.testing.assert_allclose(camera["image_from_camera"], expected)
        np.testing.assert_array_equal(logged["camera/image"][1][0], pixels)
        assert logged["name"][1] == (name,)
        first, second = (logged[f"camera/depth_{n}"] for n in (1, 2))
        assert first[0] == "DepthImage" and first[2] == {"meter": 1.0}
        np.testing.assert_array_equal(first[1][0], second[1][0])
        assert first[1][0].shape == (30, 40) and (first[1][0] > 0).all()
    assert recording.logged["static", 0, "/"][0] == "AnnotationContext"
    with pytest.raises(UserError, match=r"scenes\.rrd exists; choose another --out"):
        view.main([*pictures, *options, f"--out={out}"])


@pytest.mark.usefixtures("rerun")
def test_a_run_is_logged_beside_its_truth_and_with_its_curves(
    tiny_sets: TinySets, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)
    config = read_config(tiny_sets.config(tmp_path), f"--model.checkpoint={weights}", "--steps=2")
    train(config)
    run = tmp_path / "runs" / "tiny"
    view.main([str(run), f"--out={tmp_path / 'run.rrd'}", "--size=56", "--device=cpu"])
    (recording,) = latest
    first = recording.at(0)
    truth, region = first["camera/truth"][1][0], first["camera/region"][1][0]
    assert truth.shape == region.shape == (56, 70) and np.isfinite(truth).all()
    assert (region > 0).any()
    assert not np.allclose(first["camera/before"][1][0], first["camera/after"][1][0])
    losses = {n: v[1][0] for (_, n, path), v in recording.logged.items() if path == "training/loss"}
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert losses == {entry["step"]: entry["loss"] for entry in history}
    with pytest.raises(UserError, match="is a run, which has its own; leave it out"):
        view.main([str(run), f"--checkpoint={weights}"])


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(UserError, match=r"pip install 'flatdepth\[rerun\]'"):
        view.main(["photo.jpg"])


@pytest.mark.usefixtures("rerun")
def test_weights_are_asked_for_and_what_cannot_be_read_is_named(
    weights: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    with pytest.raises(UserError, match="--checkpoint: expected weights"):
        view.main([str(bad)])
    with pytest.raises(UserError, match="a picture cannot be shown"):
        view.main([str(bad), f"--checkpoint={weights}", f"--out={tmp_path / 'x.rrd'}"])
    assert not list(tmp_path.glob("*.rrd*"))
