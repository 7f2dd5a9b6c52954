"""Metres at a canonical focal length: the law, files, the reach of truth, mixed cameras."""

import dataclasses
import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flatdepth.cli import parse_config
from flatdepth.config import ModelConfig, TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import to_device, training_samples, validation_sample, within_reach
from flatdepth.errors import UserError
from flatdepth.judge import validation
from flatdepth.judge.boundaries import boundary_f1
from flatdepth.judge.validation import protocol
from flatdepth.models.card import model_card
from flatdepth.models.checkpoint import describe, load_weights, open_model, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.depth_anything_3 import DepthAnything3
from flatdepth.models.efficientnet import EfficientNetDepth
from flatdepth.models.export import export_weights, for_original_code
from flatdepth.models.network import DepthNetwork
from flatdepth.models.preprocessing import preprocessing
from flatdepth.models.surgery import blend
from flatdepth.predict.predictor import predict_field
from flatdepth.training import runlog
from flatdepth.training.loop import make_training_batch, train
from flatdepth.training.losses import silog_loss
from flatdepth.types import Batch
from tests.conftest import TinySets
from tests.test_checkpoint_tool import weights as demo

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
PICTURE = torch.from_numpy(RNG.random((2, 3, 56, 70))).float()


def tiny(focal_px: float | None = 500.0, **options: object) -> DepthAnythingV2:
    torch.manual_seed(0)
    options = {"kind": "metric", "canonical_focal_px": focal_px, **options}
    return DepthAnythingV2("vitt", **options).eval()  # type: ignore[arg-type]


def flat(focal_px: float) -> DepthAnythingV2:
    """A network whose own output is half of 20 m everywhere, whatever it sees."""
    model = tiny(focal_px)
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            model.get_parameter(f"depth_head.scratch.output_conv2.2.{leaf}").zero_()
    return model


# The law.


def test_metres_are_those_of_the_network_times_the_focal_length_over_its_own() -> None:
    plain, canonical = tiny(None), tiny(500.0)
    focal_px = torch.tensor([500.0, 1000.0])
    with torch.no_grad():
        own, found = plain(PICTURE), canonical(PICTURE, focal_px)
    assert torch.equal(found, own * torch.tensor([1.0, 2.0])[:, None, None, None])
    assert (plain.needs_focal, canonical.needs_focal) == (False, True)
    assert canonical.reach_m(1000.0) == 40
    with pytest.raises(ValueError, match="predicts metres only with a focal length"):
        canonical(PICTURE)


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.25])
def test_a_picture_and_its_camera_resized_mean_the_same_metres(scale: float) -> None:
    """The network sees the same input; its own output, here 10 m everywhere, is the same too."""
    model, way = flat(200.0), preprocessing("ours", 28)
    for factor in (1.0, scale):
        image = np.zeros((round(112 * factor), round(168 * factor), 3), np.uint8)
        (field,) = predict_field(model, [image], way, CPU, [400.0 * factor])
        # 400 px of a picture of 112 x 168 are 100 of an input of 28 x 42
        np.testing.assert_allclose(1 / field, 10 * 100 / 200, rtol=1e-6)


def test_of_one_network_it_is_the_apparent_size_that_means_metres() -> None:
    """A thing of S metres that is a pixels wide is S f_c / a away for a network that knows it, and
    S f / a away for a camera of focal length f: enlarged with its camera it stays where it is."""

    class Knows(EfficientNetDepth):
        def logits(self, image: Tensor) -> Tensor:
            width_px = (image[:, :1] > 0).sum(-1, keepdim=True).clamp_min(1)
            canonical_m = 0.5 * 300 / width_px
            return torch.logit(canonical_m / self.max_depth_m).expand_as(image[:, :1])

    model = Knows("lite0", kind="metric", canonical_focal_px=300.0).eval()
    for scale in (1, 2, 4):
        image = torch.zeros(1, 3, 14 * scale, 56 * scale)
        image[..., 7 * scale : 21 * scale] = 1
        with torch.no_grad():
            found = model(image, torch.tensor([90.0 * scale]))
        torch.testing.assert_close(found, torch.full_like(found, 0.5 * 90 / 14))


def test_what_cannot_have_one_is_refused() -> None:
    """By the configuration and, from wherever a number comes, by the network."""
    for message, kind, focal_px in (
        ("only metres depend on the focal length and the kind is relative", "relative", 500.0),
        ("model.canonical_focal_px: expected 1 to", "metric", 0.0),
        ("model.canonical_focal_px: expected 1 to", "metric", math.nan),
    ):
        with pytest.raises(UserError, match=message):
            tiny(focal_px, kind=kind)
        with pytest.raises(UserError, match=message):
            ModelConfig(kind=kind, canonical_focal_px=focal_px)  # type: ignore[arg-type]
    own = r"depth_anything_3 has its own, 300\.0, got 500\.0; leave it out"
    with pytest.raises(UserError, match=own):
        DepthAnything3("vitt", kind="metric", canonical_focal_px=500.0)
    with pytest.raises(UserError, match=own):
        ModelConfig(name="depth_anything_3", encoder="vitt", canonical_focal_px=500.0)


# Files.


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "folder"])
def test_files_say_it(name: str, tmp_path: Path) -> None:
    model, focal_px = demo(), torch.tensor([90.0, 700.0])
    model.canonical_focal_px = 640.0
    if name == "folder":
        export_weights(model, tmp_path / name)
    else:
        save_weights(model, tmp_path / "model")
    again, report = open_model(str(tmp_path / name))
    assert again.canonical_focal_px == 640
    assert not report.doubts and "canonical_focal_px 640.0" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(again(PICTURE, focal_px), model(PICTURE, focal_px))
    assert again.like().canonical_focal_px == 640


def test_depth_anything_3_says_nothing_new() -> None:
    model = DepthAnything3("vitt", kind="metric")
    assert (model.canonical_focal_px, model.needs_focal) == (300, True)
    assert "canonical_focal_px" not in describe(model)
    assert model.like().canonical_focal_px == 300
    assert DepthAnything3("vitt", kind="affine").canonical_focal_px is None


def test_weights_of_another_focal_length_are_doubted_and_right_where_they_can_be(
    tmp_path: Path,
) -> None:
    focal_px = torch.tensor([500.0, 500.0])
    _, without = save_weights(tiny(None), tmp_path / "without")
    _, at_500 = save_weights(tiny(500.0), tmp_path / "at_500")
    with torch.no_grad():
        wanted = tiny(None)(PICTURE)
        model = tiny(500.0)
        report = load_weights(model, str(without))
        assert "Doubtful: the weights were trained without canonical_focal_px" in str(report)
        assert torch.equal(model(PICTURE, focal_px), wanted)
        model = tiny(None)
        report = load_weights(model, str(at_500))
        assert "right in images of 500 px only, so set it to 500" in report.doubts[0]
        assert torch.equal(model(PICTURE), wanted)
    with pytest.raises(UserError, match=r"is 500 in the file but 250 in the model.*factor of 2;"):
        load_weights(tiny(250.0), str(at_500))
    assert not load_weights(tiny(250.0), str(at_500), head="fresh").doubts
    assert not load_weights(tiny(500.0), str(at_500)).doubts


def test_weights_of_others_are_probed_as_they_are(tmp_path: Path) -> None:
    """A maximum depth four times too small is doubted with a canonical focal length as without."""
    save_file(demo().state_dict(), tmp_path / "theirs.safetensors")
    for focal_px in (None, 77.0):
        model = DepthAnythingV2(
            "vitt", kind="metric", max_depth_m=20.0, canonical_focal_px=focal_px
        )
        doubts = load_weights(model, str(tmp_path / "theirs.safetensors")).doubts
        assert "check that max_depth_m 20 is what" in doubts[-1]


@pytest.mark.parametrize("value", ["-3", "nan", "far"])
def test_damaged_metadata_are_one_sentence(value: str, tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "model")
    sidecar = tmp_path / "model.json"
    said = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**said, "canonical_focal_px": value}))
    with pytest.raises(UserError, match=r"model\.pth: its metadata are damaged"):
        open_model(str(tmp_path / "model.pth"))


def test_the_original_code_is_told_and_so_is_the_reader_of_the_card(tmp_path: Path) -> None:
    model = tiny(500.0)
    for target in (tmp_path / "x.pth", tmp_path / "folder"):
        same, (note,) = for_original_code(model, target)
        assert same is model
        assert "multiply depth by the focal length in pixels of the input over 500" in note
    assert for_original_code(model, tmp_path / "x.safetensors") == (model, [])
    assert for_original_code(tiny(None), tmp_path / "x.pth")[1] == []
    assert for_original_code(DepthAnything3("vitt", kind="metric"), tmp_path / "x.pth")[1] == []
    card = model_card("x", describe(model), run=None, layout="files")
    assert "up to 20 m at a focal length of 500 pixels" in card
    assert "model(image, focal_px)" in card


def test_blends_are_of_one_focal_length() -> None:
    with pytest.raises(UserError, match=r"A has canonical_focal_px 500\.0 and B None"):
        blend(tiny(500.0), tiny(None), 0.5)


# Training.


def config(sets: TinySets, folder: Path, *arguments: str) -> TrainConfig:
    path = sets.config(folder)
    return parse_config(
        TrainConfig, [f"--config={path}", *arguments], prog="train.py", description=None
    )


def test_truth_ends_where_the_network_does_in_each_image() -> None:
    depth_m = torch.linspace(0.5, 40, 2 * 6 * 7).view(6, 7, 2).movedim(-1, 0)[:, None].contiguous()
    K_px = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    K_px[0, 0, 0], K_px[0, 1, 1] = 90.0, 110.0
    K_px[1, 0, 0], K_px[1, 1, 1] = 380.0, 420.0
    valid = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    valid[:, :, 0, 0] = False
    batch = Batch(
        image=torch.zeros(2, 3, 6, 7),
        depth_m=depth_m,
        valid=valid,
        region=torch.zeros(2, 1, 6, 7, dtype=torch.uint8),
        K_px=K_px,
        sample=torch.arange(2),
    )
    model = ModelConfig(max_depth_m=10.0, canonical_focal_px=200.0)
    found = within_reach(batch, model)
    for i, far_m in enumerate((10 * 100 / 200, 10 * 400 / 200)):
        assert torch.equal(found.valid[i], valid[i] & (depth_m[i] <= far_m))
        assert 0 < found.valid[i].sum() < valid[i].sum()
    assert torch.equal(found.depth_m, torch.where(found.valid, depth_m, 0.0))
    assert within_reach(batch, ModelConfig(max_depth_m=10.0)) is batch


def test_batches_hold_truth_up_to_the_reach_of_their_cameras(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    """Crops give a set of one camera many focal lengths; without pastes truth is the set's own."""
    chosen = config(
        tiny_sets,
        tmp_path,
        "--model.canonical_focal_px=100",
        "--model.max_depth_m=3",
        "--data.crop=[0.4, 1]",
        "--paste.share=0",
    )
    corpus = open_corpus(chosen.data)
    stream = training_samples(corpus, chosen, first_step=0, rank=0, ranks=1, accumulation=2)
    beyond = 0
    for _ in range(4):
        samples = next(stream)
        batch = make_training_batch(samples, chosen, CPU)
        whole, _, _ = to_device(samples, CPU, depth_range_m=(chosen.data.min_depth_m, 1e5))
        far_m = 3 * batch.focal_px[:, None, None, None] / 100
        assert torch.equal(batch.valid, whole.valid & (whole.depth_m <= far_m))
        beyond += int((batch.valid & (batch.depth_m > 3)).sum())
    stream.close()
    assert beyond  # a longer lens reaches farther than max_depth_m
    assert "to 3 m at a focal length of 100 px, in proportion" in protocol(chosen)


def test_pastes_hang_where_the_network_can_see_them(tiny_sets: TinySets, tmp_path: Path) -> None:
    """With a reach of 1.5 m nothing hangs on walls behind it, with one of 60 m something does."""
    hung = []
    for focal_px in ("200", "5"):
        chosen = config(
            tiny_sets, tmp_path, f"--model.canonical_focal_px={focal_px}", "--paste.layout.hung=1",
            "--model.max_depth_m=3", "--data.min_depth_m=0.1",
        )  # fmt: skip
        corpus = open_corpus(chosen.data)
        samples = [
            validation_sample(corpus, chosen, corpus.val[0], place, pasted=True)
            for place in range(3)
        ]
        hung.append(sum(len(sample.plan) for sample in samples))
    assert hung[0] < hung[1]


def test_a_run_with_it_leaves_weights_that_say_it(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)
    chosen = config(
        tiny_sets, tmp_path, "--model.canonical_focal_px=64", "--steps=2", "--optim.ema=0.9"
    )
    seen: list[float] = []
    own = DepthAnythingV2.forward

    def forward(self: DepthAnythingV2, image: Tensor, focal_px: Tensor | None = None) -> Tensor:
        assert focal_px is not None
        assert self.canonical_focal_px == 64
        seen.extend(focal_px.tolist())
        return own(self, image, focal_px)

    monkeypatch.setattr(DepthAnythingV2, "forward", forward)
    far_m: list[float] = []

    def edges(*maps: Tensor, min_m: float, max_m: float) -> tuple[Tensor, Tensor]:
        far_m.append(max_m)
        return boundary_f1(*maps, min_m=min_m, max_m=max_m)

    monkeypatch.setattr(validation, "boundary_f1", edges)
    metrics = train(chosen)
    assert far_m and {round(x * 64 / 20, 3) for x in far_m} <= {round(x, 3) for x in seen}
    assert len(seen) > 8 and min(seen) > 0
    assert "20 m at a focal length of 64 px" in metrics["protocol"]
    weights = tmp_path / "runs" / "tiny" / "weights" / "final.safetensors"
    assert open_model(str(weights))[0].canonical_focal_px == 64
    assert "at a focal length of 64 pixels" in weights.with_suffix(".md").read_text("utf-8")


class Pixelwise(EfficientNetDepth):
    """Depth from a pixel's brightness alone."""

    sizes: ClassVar = {"lite0": None}
    output_bias = "depth_head.2.bias"

    @staticmethod
    def parts(*_: object) -> tuple[nn.Module, nn.Module]:
        head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 1, 1))
        return nn.ModuleDict({"blocks": nn.ModuleList()}), head

    def logits(self, image: Tensor) -> Tensor:
        found: Tensor = self.depth_head(image)
        return found


def trained_error(canonical_focal_px: float | None) -> float:
    """RMS log error after a training on two cameras that see one canonical scene."""
    torch.manual_seed(0)
    model: DepthNetwork = Pixelwise(
        "lite0", kind="metric", max_depth_m=20.0, canonical_focal_px=canonical_focal_px
    )
    focal_px = torch.tensor([100.0, 400.0])
    image = torch.rand(2, 3, 14, 14)
    canonical_m = 1 + 3 * image.mean(1, keepdim=True)  # at 200 px
    truth_m = canonical_m * (focal_px / 200)[:, None, None, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(300):
        loss = silog_loss(model(image, focal_px), truth_m, torch.ones_like(truth_m), lam=0.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return float(loss.mean().detach())


def test_cameras_of_two_focal_lengths_are_learned_together_only_with_it() -> None:
    """Pixels do not tell the cameras apart: without, the best is the geometric mean of both truths,
    wrong by half of ln 4."""
    without, with_it = trained_error(None), trained_error(200.0)
    assert without == pytest.approx(math.log(4) / 2, rel=0.05)
    assert with_it < 0.05
    assert trained_error(200.0) == with_it


def test_memory_and_resume_know_the_key(tiny_sets: TinySets, tmp_path: Path) -> None:
    chosen = config(tiny_sets, tmp_path, "--model.canonical_focal_px=64")
    assert dataclasses.asdict(chosen)["model"]["canonical_focal_px"] == 64
    assert config(tiny_sets, tmp_path).model.canonical_focal_px is None
