"""Calibration: fits against numpy in float64, halves by scene, files, and what reads them."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForDepthEstimation

from flatdepth.cli import run_command
from flatdepth.errors import UserError
from flatdepth.judge import calibration as calibrating
from flatdepth.judge.calibration import (
    Looked,
    calibrate,
    fitted,
    halves,
    image_statistics,
    render,
)
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import Request, judge
from flatdepth.models.calibration import Calibration, Correction, Form, HeldOut
from flatdepth.models.checkpoint import load_weights, open_model, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import DepthNetwork
from tests.conftest import REPOSITORY, TinySets
from tests.test_checkpoint_tool import weights as demo

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
SHIFTED = Correction(factor=1.25, shift_per_m=-0.01, far_m=80.0)


def record(correction: Correction, form: Form = "scale", is_applied: bool = True) -> Calibration:
    half = HeldOut(scenes=2, images=3, fitted=correction, abs_rel=(0.25, 0.125), delta1=(0.5, 0.75))
    return Calibration(
        form=form,
        correction=correction,
        halves=(half, half),
        is_applied=is_applied,
        sets=("rooms",),
        part="val",
        images=6,
        digests=("ab12",),
        protocol="every pixel",
        input_px=168,
    )


def request(checkpoint: str = "x", data: tuple[str, ...] = (), size: int | None = 56) -> Request:
    return Request(
        checkpoints=(checkpoint,), kinds=(None,), max_depths_m=(None,), trained_on=(None,),
        data=data, protocol=PROTOCOLS["none"], size=size, threads=1,
    )  # fmt: skip


def picture(size: int = 56) -> Tensor:
    return torch.from_numpy(RNG.random((2, 3, size, size))).float()


def tiny(**options: object) -> DepthAnythingV2:
    torch.manual_seed(0)
    return DepthAnythingV2("vitt", **{"kind": "metric", **options}).eval()  # type: ignore[arg-type]


# Fits.


def test_a_factor_is_found_exactly_whatever_a_minority_of_each_image_says() -> None:
    """Of every image 40 % are mirrors: their wild ratios do not move it, images of any size."""
    rows = []
    for pixels in (10, 1000, 37):
        pred = RNG.uniform(1, 9, pixels)
        truth = 1.7 * pred
        truth[: int(0.4 * pixels)] *= RNG.uniform(0.01, 0.5, int(0.4 * pixels))
        rows.append(image_statistics(pred, truth, "scale"))
    found = fitted(np.stack(rows), "scale", 80.0)
    assert found.factor == pytest.approx(1.7, rel=1e-12)
    assert (found.shift_per_m, found.far_m) == (0, None)


def test_every_image_counts_once_in_the_factor() -> None:
    """ln 2 over many pixels and ln 8 over few have the geometric mean 4."""
    many, few = RNG.uniform(1, 9, 5000), RNG.uniform(1, 9, 3)
    rows = [image_statistics(many, 2 * many, "scale"), image_statistics(few, 8 * few, "scale")]
    assert fitted(np.stack(rows), "scale", 80.0).factor == pytest.approx(4, rel=1e-12)


def test_scale_and_shift_are_the_weighted_least_squares_of_all_pixels() -> None:
    """All pixels at once by numpy's solver: the weight t^2 over the image's pixels, each once."""
    rows, design, wanted = [], [], []
    for pixels, a, b in ((400, 0.8, 0.02), (30, 0.9, 0.05), (77, 0.7, 0.01)):
        pred = RNG.uniform(1, 20, pixels)
        truth = 1 / ((a / pred + b) * np.exp(0.1 * RNG.standard_normal(pixels)))
        rows.append(image_statistics(pred, truth, "scale-shift-inverse"))
        root = truth / np.sqrt(pixels)
        design.append(np.stack([root / pred, root], axis=1))
        wanted.append(root / truth)
    (a, b), *_ = np.linalg.lstsq(np.concatenate(design), np.concatenate(wanted), rcond=None)
    found = fitted(np.stack(rows), "scale-shift-inverse", 80.0)
    assert (found.factor, found.shift_per_m) == pytest.approx((1 / a, b), rel=1e-9)
    assert found.far_m == 80


def test_fits_that_mean_nothing_are_refused() -> None:
    same = np.full(50, 3.0)
    rows = image_statistics(same, same, "scale-shift-inverse")[None]
    with pytest.raises(UserError, match="found one depth everywhere; take --fit scale"):
        fitted(rows, "scale-shift-inverse", 80.0)
    near = np.linspace(1, 5, 50)
    rows = image_statistics(near, near[::-1].copy(), "scale-shift-inverse")[None]
    with pytest.raises(UserError, match="would turn near and far round"):
        fitted(rows, "scale-shift-inverse", 80.0)
    with pytest.raises(UserError, match="expected images with depth"):
        fitted(np.zeros((0, 1)), "scale", 80.0)


@given(factor=st.floats(0.1, 10), shift=st.floats(-0.5, 0.5), depth=st.floats(0.1, 79))
def test_a_correction_is_its_formula_and_ends_far_away(
    factor: float, shift: float, depth: float
) -> None:
    correction = Correction(factor=factor, shift_per_m=shift, far_m=80.0)
    inverse = 1 / (factor * depth) + shift
    wanted = 1 / max(inverse, 1 / 80) if shift else factor * depth
    found = correction(torch.tensor(depth, dtype=torch.float64))
    assert float(found) == pytest.approx(wanted, rel=1e-9)


# Halves.


def test_halves_keep_scenes_whole_and_are_about_as_large() -> None:
    counts = RNG.integers(1, 9, 25)
    scenes = [("set", f"{name}") for name, count in enumerate(counts) for _ in range(count)]
    found = halves(scenes)
    assert found == halves(scenes[::-1])
    sizes = [sum(found[scene] == half for scene in scenes) for half in (0, 1)]
    assert sum(sizes) == counts.sum()
    assert abs(sizes[0] - sizes[1]) <= counts.max()
    assert halves([("a", "1"), ("b", "1")]) == {("a", "1"): 0, ("b", "1"): 1}
    with pytest.raises(UserError, match=r"two scenes or more.*found 1; take --part all"):
        halves([("set", "one")] * 9)


def looked(factors: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scene -> what its truth is of the prediction, two images each, one pixel without truth."""

    def images(*_: object) -> Iterator[Looked]:
        for name, factor in factors.items():
            for seed in range(2):
                pred = 1 + 4 * torch.rand(1, 1, 6, 7, generator=torch.Generator().manual_seed(seed))
                counted = torch.ones(1, 1, 6, 7, dtype=torch.bool)
                counted[..., 0, 0] = False
                truth = (factor * pred).where(counted, torch.tensor(torch.nan))
                yield Looked(("set", name), pred, truth, counted)

    monkeypatch.setattr(calibrating, "_images", images)


def test_what_helps_on_both_halves_is_applied(
    monkeypatch: pytest.MonkeyPatch, tiny_sets: TinySets
) -> None:
    looked({"a": 1.2, "b": 1.3, "c": 1.2, "d": 1.3}, monkeypatch)
    model = tiny()
    model.calibration = before = record(SHIFTED)
    found = calibrate(model, request(data=(str(tiny_sets.rooms),)), "scale", CPU)
    assert model.calibration is before
    # a and c are one half and b and d the other
    assert [half.fitted.factor for half in found.halves] == pytest.approx([1.3, 1.2], rel=1e-6)
    for half, own, fit in zip(found.halves, (1.2, 1.3), (1.3, 1.2), strict=True):
        assert half.abs_rel == pytest.approx((1 - 1 / own, abs(fit / own - 1)), rel=1e-5)
        assert half.delta1 == (float(own < 1.25), 1)
        assert (half.scenes, half.images) == (2, 4)
    assert found.correction.factor == pytest.approx((1.2 * 1.3) ** 0.5, rel=1e-6)
    assert (found.is_applied, found.images, found.part) == (True, 8, "all")
    assert "the two fits differ by 8.0% in the factor" in render(found)
    assert "applied: yes" in render(found)


def test_what_helps_on_one_half_only_is_not(
    monkeypatch: pytest.MonkeyPatch, tiny_sets: TinySets
) -> None:
    looked({"a": 1.1, "b": 2.0}, monkeypatch)
    found = calibrate(tiny(), request(data=(str(tiny_sets.rooms),)), "scale", CPU)
    assert found.halves[0].abs_rel[1] > found.halves[0].abs_rel[0]
    assert found.halves[1].abs_rel[1] < found.halves[1].abs_rel[0]
    assert not found.is_applied
    assert "applied: no" in render(found)


def test_only_metres_are_calibrated(tiny_sets: TinySets) -> None:
    with pytest.raises(UserError, match=r"found relative ones.*flatdepth evaluate --align"):
        calibrate(tiny(kind="relative"), request(data=(str(tiny_sets.rooms),)), "scale", CPU)


# Files.


@pytest.mark.parametrize("correction", [Correction(factor=0.7), SHIFTED])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_carries_its_calibration(
    correction: Correction, suffix: str, tmp_path: Path
) -> None:
    model = tiny()
    image = picture()
    with torch.no_grad():
        raw = model(image)
    model.calibration = record(correction)
    save_weights(model, tmp_path / "model")
    opened, report = open_model(str(tmp_path / f"model{suffix}"))
    assert opened.calibration == model.calibration
    assert f"Calibrated: {model.calibration}." in str(report) and "ab12" not in str(report)
    with torch.no_grad():
        inverse = 1 / (correction.factor * raw.double()) + correction.shift_per_m
        torch.testing.assert_close(opened(image).double(), 1 / inverse, rtol=1e-5, atol=0)
        assert torch.equal(opened.train()(image), raw)  # a loss sees the network itself
    assert opened.eval().reach_m(50.0) == pytest.approx(
        1 / (1 / (20 * correction.factor) + correction.shift_per_m), rel=1e-5
    )


def test_what_did_not_help_is_read_and_not_applied(tmp_path: Path) -> None:
    text = record(SHIFTED, is_applied=False).text()
    _, safe = save_weights(tiny(), tmp_path / "model", extra={"calibration": text})
    model, report = open_model(str(safe))
    assert model.calibration is None
    assert "Not calibrated: depth x 1.25" in str(report)
    assert "did not help on both halves of the scenes" in str(report)


def test_training_starts_without_it_and_says_so(tmp_path: Path) -> None:
    model = tiny()
    model.calibration = record(SHIFTED)
    _, safe = save_weights(model, tmp_path / "model")
    start = tiny()
    report = load_weights(start, str(safe))
    assert start.calibration is None
    assert "Its calibration (depth x 1.25" in str(report)
    assert "is left out: calibrate anew what is trained." in str(report)


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: said.pop("correction"),
        lambda said: said.update(applied="perhaps"),
        lambda said: said.update(halves=[]),
        lambda said: said["correction"].update(factor=-1),
        lambda said: said["correction"].update(shift_per_m="much"),
        lambda said: said.update(form="cubic"),
    ],
)
def test_damaged_records_are_one_sentence(damage: object, tmp_path: Path) -> None:
    said = json.loads(record(SHIFTED).text())
    damage(said)  # type: ignore[operator]
    extra = {"calibration": json.dumps(said)}
    _, safe = save_weights(tiny(), tmp_path / "model", extra=extra)
    with pytest.raises(UserError, match=r"model\.safetensors: its metadata are damaged") as caught:
        open_model(str(safe))
    assert "\n" not in str(caught.value)


# Other code.


def tool(*arguments: object) -> int:
    main = runpy.run_path(str(REPOSITORY / "tools" / "checkpoint.py"))["main"]
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main([str(argument) for argument in arguments]))
    return int(caught.value.code or 0)


def test_a_factor_goes_into_the_maximum_depth_for_the_original_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its formula, the sigmoid times max_depth, with the numbers of the .pth alone."""
    model = demo()
    image = picture()
    with torch.no_grad():
        share = model.logits((image - model.image_mean) / model.image_std).sigmoid()
        raw = model(image)
    model.calibration = record(Correction(factor=1.3))
    _, safe = save_weights(model, tmp_path / "model")
    assert tool("export", safe, tmp_path / "other.pth") == 0
    assert "note: calibrated: max_depth_m is 26 instead of 20" in capsys.readouterr().out
    said = json.loads((tmp_path / "other.json").read_text())
    assert "calibration" not in said
    torch.testing.assert_close(share * float(said["max_depth_m"]), 1.3 * raw, rtol=1e-6, atol=0)
    with torch.no_grad():
        ours = open_model(str(tmp_path / "other.pth"))[0](image)
    torch.testing.assert_close(ours, 1.3 * raw, rtol=1e-6, atol=0)
    assert tool("verify", safe, tmp_path / "other.pth", "--tolerance", "1e-4") == 0


def test_transformers_predicts_calibrated_metres_where_they_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, image = demo(), picture(518)[:1]
    with torch.no_grad():
        raw = model(image)[:, 0]
    model.calibration = record(Correction(factor=1.5))
    _, safe = save_weights(model, tmp_path / "model")
    assert tool("export", safe, tmp_path / "hf") == 0
    assert "max_depth_m is 30 instead of 20" in capsys.readouterr().out
    twin = AutoModelForDepthEstimation.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        normalised = (image - model.image_mean) / model.image_std
        theirs = twin(pixel_values=normalised).predicted_depth
    torch.testing.assert_close(theirs, 1.5 * raw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("correction", "form", "name"),
    [
        (Correction(factor=1.37), "scale", "folder"),  # no whole metres
        (SHIFTED, "scale-shift-inverse", "folder"),
        (SHIFTED, "scale-shift-inverse", "other.pth"),
    ],
)
def test_what_other_code_cannot_know_is_said_and_stays_for_ours(
    correction: Correction,
    form: Form,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, image = demo(), picture()
    model.calibration = record(correction, form)
    _, safe = save_weights(model, tmp_path / "model")
    assert tool("export", safe, tmp_path / name) == 0
    said = capsys.readouterr().out
    assert f"note: only flatdepth reads the calibration ({correction}); other code" in said
    again, _ = open_model(str(tmp_path / name))
    assert again.max_depth_m == 20
    with torch.no_grad():
        torch.testing.assert_close(again(image), model(image))


def test_a_blend_is_not_calibrated(tmp_path: Path) -> None:
    model = demo()
    model.calibration = record(Correction(factor=1.3))
    _, safe = save_weights(model, tmp_path / "model")
    out = tmp_path / "blend.safetensors"
    assert tool("blend", safe, safe, "--alpha", 0.5, out) == 0
    assert open_model(str(out))[0].calibration is None


# The command.


def test_a_wrong_scale_is_put_right(
    tiny_sets: TinySets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo weights under three times their maximum depth, on rooms like those they know; the
    figures before are those of an evaluation, the file predicts what the correction says."""
    _, wrong = save_weights(demo(max_depth_m=240.0), tmp_path / "wrong")
    old = wrong.read_bytes()
    out = tmp_path / "new" / "right.safetensors"
    common = ("calibrate", wrong, "--data", tiny_sets.rooms, "--part", "all", "--size", 84)
    assert tool(*common, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "applied: yes" in printed
    model, report = open_model(str(out))
    found = model.calibration
    assert found is not None
    assert found.correction.factor == pytest.approx(1 / 3, rel=0.2)
    assert (found.sets, found.part, found.images) == (("rooms",), "all", 15)
    assert str(found) in str(report)

    verdict = judge(request(str(wrong), (str(tiny_sets.rooms),), 84), CPU, lambda *_: None)
    for metric, pairs in (
        ("abs_rel", [half.abs_rel for half in found.halves]),
        ("delta1", [half.delta1 for half in found.halves]),
    ):
        counts = [half.images for half in found.halves]
        mean = np.average([before for before, _ in pairs], weights=counts)
        figure = verdict.domains[0].tables[0]["clean"][metric]
        assert (figure.value, figure.count) == (pytest.approx(mean, rel=1e-9), sum(counts))

    image = picture(84)
    with torch.no_grad():
        raw = open_model(str(wrong))[0](image)
        torch.testing.assert_close(model(image), found.correction(raw), rtol=1e-6, atol=0)

    assert wrong.read_bytes() == old
    assert tool(*common, "--out", out) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert tool(*common, "--out", wrong, "--overwrite") == 2
    assert "is the file to calibrate" in capsys.readouterr().err
    assert tool(*common, "--out", tmp_path / "right.pth") == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    # again, from the calibrated file: what it says of itself is left out of the fit
    again = ("calibrate", out, *common[2:], "--out", tmp_path / "again.safetensors")
    assert tool(*again) == 0
    assert open_model(str(tmp_path / "again.safetensors"))[0].calibration == found
    assert tool("info", out) == 0
    assert f"calibration  {found}" in capsys.readouterr().out

    predicted(tmp_path, wrong, out, found)


def predicted(folder: Path, wrong: Path, right: Path, found: Calibration) -> None:
    """``flatdepth predict`` with the file, with it uncalibrated, and with the old file."""
    main = runpy.run_path(str(REPOSITORY / "tools" / "predict.py"))["main"]
    pixels = RNG.integers(0, 256, (84, 112, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")

    def depth(name: str, checkpoint: Path, *more: str) -> np.ndarray:
        options = ["--out", str(folder / name), "--write", "npy", "--size", "84", *more]
        assert main([str(folder / "a.png"), "--checkpoint", str(checkpoint), *options]) == 0
        found: np.ndarray = np.load(folder / name / "a_depth.npy")
        return found

    before, after = depth("before", wrong), depth("after", right)
    np.testing.assert_allclose(after, found.correction.factor * before, rtol=1e-5)
    np.testing.assert_array_equal(depth("off", right, "--no_calibration"), before)


def test_what_does_not_help_is_written_and_predicts_as_before(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked({"a": 1.1, "b": 2.0}, monkeypatch)
    _, old = save_weights(tiny(), tmp_path / "old")
    out = tmp_path / "new.safetensors"
    assert tool("calibrate", old, "--data", tiny_sets.rooms, "--part", "all", "--out", out) == 0
    with safe_open(out, framework="pt") as file:
        said = json.loads(file.metadata()["calibration"])
    assert said["applied"] == "no"
    assert said["correction"]["factor"] == pytest.approx((1.1 * 2.0) ** 0.5, rel=1e-6)
    image = picture()
    models: list[DepthNetwork] = [open_model(str(path))[0] for path in (old, out)]
    with torch.no_grad():
        assert torch.equal(models[0](image), models[1](image))
