"""The frozen teacher: what it says, where it counts, what it is made of, and that it stays."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

import flatdepth.training.loop as loop
from flatdepth.bench import crash
from flatdepth.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, to_device, training_samples
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import load_weights, save_weights
from flatdepth.models.network import DepthNetwork, freeze
from flatdepth.models.networks import make_network
from flatdepth.training import runlog
from flatdepth.training.loop import make_training_batch, train
from flatdepth.training.losses import depth_loss
from flatdepth.training.teacher import (
    Teacher,
    as_truth,
    open_teacher,
    teacher_terms,
)
from flatdepth.types import Region, TrainingBatch
from tests import step_probe
from tests.conftest import REPOSITORY, TinySets
from tests.test_train import BRIEF, Probe, history, probe_config, read_config, run_ranks

CPU = torch.device("cpu")
IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
FOCAL_PX = torch.tensor([90.0, 110.0])


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)


def network(
    name: str = "depth_anything_v2", encoder: str = "vitt", kind: str = "metric", seed: int = 0
) -> DepthNetwork:
    torch.manual_seed(seed)
    return make_network(name, encoder, kind=kind)  # type: ignore[arg-type]


def weights(folder: Path, stem: str = "start", **chosen: Any) -> Path:
    """A weight file of a network with random weights."""
    return save_weights(network(**chosen), folder / stem, overwrite=True)[1]


def taught(start: Path, *, precision: str = "no", loss: LossConfig | None = None) -> TrainConfig:
    return TrainConfig(
        precision=precision,  # type: ignore[arg-type]
        data=DataConfig(height=28, width=42),
        model=ModelConfig(encoder="vitt", checkpoint=str(start)),
        loss=loss or LossConfig(teacher=1.0),
    )


def fresh_accelerator() -> None:
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def with_regions() -> TrainingBatch:
    """Random pictures of 28 x 42 pixels with a mirror, its frame, a decoy and a picture.

    Truth is known in the left half, and is 2 m.
    """
    generator = torch.Generator().manual_seed(3)
    image, photograph = torch.rand(2, 2, 3, 28, 42, generator=generator)
    region = torch.zeros(2, 1, 28, 42, dtype=torch.uint8)
    region[0, 0, 2:8, 15:25] = Region.MIRROR
    region[0, 0, 8:10, 15:25] = Region.FRAME
    region[1, 0, 5:9, 5:9] = Region.DECOY
    region[1, 0, 20:27, 30:40] = Region.ART
    valid = torch.zeros_like(region, dtype=torch.bool)
    valid[..., :21] = True
    return TrainingBatch(
        image=image,
        depth_m=2.0 * valid,
        valid=valid,
        region=region,
        K_px=torch.eye(3, dtype=torch.float64).expand(2, 3, 3),
        sample=torch.arange(2),
        photograph=photograph,
    )


# what it says, and where it counts


def test_the_loss_is_what_numpy_makes_of_two_predictions(tmp_path: Path) -> None:
    """silog over background pixels of a teacher that saw the photograph; no truth is needed."""
    config = taught(weights(tmp_path), loss=LossConfig(teacher=1.0, background=0.1))
    student = network()
    teacher = open_teacher(config, student, Accelerator(cpu=True))
    assert teacher is not None
    student = network(seed=5)
    batch = with_regions()
    prediction = student(batch.image)
    found = teacher.lesson(batch).loss("metric", prediction)

    assert batch.photograph is not None
    official = network(seed=9)
    load_weights(official, str(config.model.checkpoint))
    with torch.no_grad():
        target = official(batch.photograph).double().numpy()
    mine = prediction.detach().double().numpy()
    for image, region in enumerate(batch.region.numpy()):
        counts = region == 0
        assert 800 < counts.sum() < 28 * 42
        d = np.log(mine[image][counts]) - np.log(target[image][counts])
        v = np.mean(d**2) - 0.5 * np.mean(d) ** 2
        assert found[image].item() == pytest.approx(np.sqrt(v + 1e-6) - 1e-3, rel=1e-4)
        assert found[image] > 0.01


def test_only_the_student_gets_a_gradient(tmp_path: Path) -> None:
    student = network(seed=5)
    config = taught(weights(tmp_path))
    load_weights(student, str(config.model.checkpoint))
    teacher = open_teacher(config, student, Accelerator(cpu=True))
    assert teacher is not None
    with torch.no_grad():
        student.depth_head.get_parameter("scratch.output_conv2.2.bias").add_(0.5)
    batch = with_regions()
    lesson = teacher.lesson(batch)
    assert not lesson.truth_m.requires_grad
    lesson.loss("metric", student(batch.image)).sum().backward()
    mine = {id(p) for p in student.parameters() if p.requires_grad}
    assert not any(p.requires_grad or p.grad is not None for p in teacher.network.parameters())
    assert not any(id(p) in mine for p in teacher.network.parameters())
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def saying(teacher: Teacher, prediction: Tensor) -> Teacher:
    """The teacher with another prediction."""

    class Stub(torch.nn.Module):
        kind = teacher.network.kind

        def forward(self, *_: Tensor) -> Tensor:
            return prediction

    teacher.network = Stub()  # type: ignore[assignment]
    return teacher


def test_pastes_labels_and_what_is_no_depth_get_no_lesson(tmp_path: Path) -> None:
    config = taught(weights(tmp_path))
    teacher = open_teacher(config, network(), Accelerator(cpu=True))
    assert teacher is not None
    batch = with_regions()
    said = 1 + 4 * torch.rand(2, 1, 28, 42, generator=torch.Generator().manual_seed(1))
    mine = said.flip(-1)
    absurd = torch.zeros(28, 42)
    absurd.view(-1)[:6] = torch.tensor([0.0, torch.inf, torch.nan, -1.0, 0.05, 21.0])
    background = batch.region == Region.BACKGROUND
    excluded = ~background
    excluded[0, 0].view(-1)[:6] = True
    said[0, 0].view(-1)[:6] = absurd.view(-1)[:6]

    def answer(said: Tensor) -> tuple[Tensor, Tensor]:
        prediction = mine.clone().requires_grad_()
        loss = saying(teacher, said).lesson(batch).loss("metric", prediction)
        loss.sum().backward()
        assert prediction.grad is not None
        return loss.detach(), prediction.grad

    loss, gradient = answer(said)
    assert loss.isfinite().all() and (loss > 0.1).all()
    assert (gradient[excluded] == 0).all() and (gradient[~excluded] != 0).float().mean() > 0.99
    moved = torch.where(background, said, 3.0)
    moved[0, 0].view(-1)[:6] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(answer(moved), (loss, gradient), strict=True))
    said[1, 0, 15, 41] *= 1.5  # background without truth
    assert not batch.valid[1, 0, 15, 41] and answer(said)[0][1] != loss[1]


def test_the_teacher_sees_the_photograph(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Without pastes and change of colours; beside pastes that throw no light or shadow the student
    sees the same."""
    start = weights(tmp_path)
    options: dict[str, Any] = {
        "paste": {"share": 1.0, "shadow": 0.0, "content": {"screen": 0.0}},
        "photometric__share": 0.0,
        "micro_batch": 4,
        "model": {"encoder": "vitt", "checkpoint": str(start)},
    }
    config = read_config(tiny_sets.config(tmp_path, loss__teacher=1.0, **options))
    samples = first_samples(config)
    range_m = (config.data.min_depth_m, config.model.max_depth_m)
    plain, _, _ = to_device(samples, CPU, depth_range_m=range_m)
    batch = make_training_batch(samples, config, CPU)
    assert batch.photograph is not None
    assert torch.equal(batch.photograph, plain.image)
    pixels = (batch.region == Region.BACKGROUND).expand(-1, 3, -1, -1)
    assert 0.3 < pixels.float().mean() < 0.97
    assert torch.equal(batch.image[pixels], plain.image[pixels])
    assert not torch.equal(batch.image, plain.image)

    changed = read_config(
        tiny_sets.config(tmp_path, loss__teacher=1.0, **options | {"photometric__share": 1.0})
    )
    samples = first_samples(changed)
    batch = make_training_batch(samples, changed, CPU)
    assert batch.photograph is not None
    assert torch.equal(batch.photograph, plain.image)
    assert not torch.equal(batch.image[pixels], plain.image[pixels])
    alone = read_config(tiny_sets.config(tmp_path, loss__teacher=0.0, **options))
    assert make_training_batch(samples, alone, CPU).photograph is None


def first_samples(config: TrainConfig) -> list[Sample]:
    stream = training_samples(
        open_corpus(config.data), config, first_step=0, rank=0, ranks=1, accumulation=1
    )
    samples = next(stream)
    stream.close()
    return samples


# kinds


@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("metric", {}),
        ("metric", {"affine": 1.0}),
        ("relative", {}),
        ("affine", {}),
    ],
)
def test_a_student_that_says_the_same_loses_nothing(kind: str, terms: dict[str, float]) -> None:
    """Up to scale and shift where they are open: no loss, and next to no gradient."""
    generator = torch.Generator().manual_seed(2)
    said = 1 + 4 * torch.rand(2, 1, 20, 30, generator=generator)
    said[0, 0, :3] = 0.0  # sky of inverse depth, no metres, a depth like others
    range_m = (0.1, 20.0)
    truth_m, known = as_truth(kind, said, range_m)  # type: ignore[arg-type]
    assert known[1].all() and known[0, 0, 3:].all()
    assert bool(known[0, 0, :3].any()) == (kind == "affine")
    student = said if kind == "metric" else 3.0 * said + 0.7
    student = student.where(known, 9.0).requires_grad_()
    config = LossConfig(terms=terms)
    loss = depth_loss(kind, student, truth_m, known.float(), config)  # type: ignore[arg-type]
    assert loss.abs().max() < 2e-5
    other = student.detach().flip(-1)
    assert depth_loss(kind, other, truth_m, known.float(), config).min() > 0.05  # type: ignore[arg-type]


def test_relative_weights_teach_metres_their_shape_only() -> None:
    """``silog`` gives way to ``affine``; a metric student with 1/z = a v + b loses nothing."""
    generator = torch.Generator().manual_seed(2)
    said = torch.rand(2, 1, 20, 30, generator=generator) + 0.1
    silog = LossConfig(terms={"silog": 1.0})
    terms = teacher_terms("relative", "metric", silog, "weights.pth")
    assert terms.terms == {"affine": 1.0}
    truth_m, known = as_truth("relative", said, (0.1, 20.0))
    student_m = 1 / (0.3 * said + 0.2)
    assert depth_loss("metric", student_m, truth_m, known.float(), terms).max() < 1e-5
    assert depth_loss("metric", student_m, truth_m, known.float(), silog).min() > 0.05
    both = LossConfig(terms={"silog": 1.0, "ranking": 0.1})
    assert teacher_terms("relative", "metric", both, "w").terms == {"ranking": 0.1}
    assert teacher_terms("metric", "relative", both, "w") is both


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("affine", "metric"), ("affine", "relative"), ("relative", "affine")],
)
def test_what_cannot_be_compared_is_refused(teacher: str, student: str) -> None:
    with pytest.raises(
        UserError, match=rf"w\.pth predicts .*depth up to .* kind {student} cannot.* kind {student}"
    ):
        teacher_terms(teacher, student, LossConfig(), "w.pth")  # type: ignore[arg-type]


def test_weights_of_another_network_teach(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Relative EfficientNet, which leaves the student's start open; of other sides than 14 none."""
    other = weights(tmp_path, "other", name="efficientnet", encoder="lite0", kind="relative")
    options: dict[str, Any] = BRIEF | {"loss__teacher": 0.5, "steps": 1}
    model = {"encoder": "vitt", "teacher": str(other)}
    metrics = train(read_config(tiny_sets.config(tmp_path, **options, model=model)))
    (record,) = history(tmp_path / "runs" / "tiny")
    assert record["teacher"] > 0 and len(metrics["teacher"]) == 64
    midas = weights(tmp_path, "midas", name="midas_v21", encoder="tiny", kind="relative")
    fresh_accelerator()
    model["teacher"] = str(midas)
    with pytest.raises(UserError, match=r"multiples of 32, but data\.height is 28; .* as 224"):
        train(read_config(tiny_sets.config(tmp_path, name="b", **options, model=model)))


# what it is made of

STARTS: dict[str, dict[str, Any]] = {
    "all": {},
    "head": {"freeze": "encoder"},
    "later blocks": {"frozen_blocks": 2},
    "adapters": {"lora_rank": 4},
}


def kept_teacher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``train`` opens from now on: the teacher and its student."""
    kept: dict[str, Any] = {}

    def keep(config: TrainConfig, student: DepthNetwork, accelerator: Accelerator) -> Any:
        kept["student"] = student
        kept["teacher"] = open_teacher(config, student, accelerator)
        return kept["teacher"]

    monkeypatch.setattr(loop, "open_teacher", keep)
    return kept


@pytest.mark.parametrize("trained", STARTS)
def test_it_says_what_the_start_says_whatever_was_trained_since(
    trained: str, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = weights(tmp_path)
    model = {"encoder": "vitt", "checkpoint": str(start), **STARTS[trained]}
    kept = kept_teacher(monkeypatch)
    train(
        read_config(
            tiny_sets.config(tmp_path, loss__teacher=1.0, **BRIEF | {"steps": 2}, model=model)
        )
    )
    official = network(seed=9)
    load_weights(official, str(start))
    image = IMAGE[..., :28, :42]
    with torch.no_grad():
        assert torch.equal(kept["teacher"].network(image), official(image))
        assert not torch.equal(kept["student"](image), official(image))
    held = {id(p) for p in kept["student"].parameters()}
    copied = {n for n, p in kept["teacher"].network.named_parameters() if id(p) not in held}
    freeze(official, STARTS[trained].get("freeze", "none"), STARTS[trained].get("frozen_blocks", 0))
    expected = {n for n, p in official.named_parameters() if p.requires_grad}
    if trained == "adapters":
        expected = {n for n in expected if not official.is_encoder(n)}
    assert copied == expected


@pytest.mark.parametrize(
    ("name", "encoder", "kind"),
    [
        ("depth_anything_v2", "vitt", "metric"),
        ("depth_anything_v2", "vitt", "relative"),
        ("depth_anything_3", "vitt", "metric"),
        ("depth_anything_3", "vitt", "affine"),
        ("efficientnet", "lite0", "metric"),
        ("midas_v21", "tiny", "relative"),
        ("midas_v21", "lite3", "relative"),
        ("resnet50", "tiny", "metric"),
        ("dpt", "tiny", "relative"),
        ("dpt", "tiny_swin2", "relative"),
        ("dpt", "tiny_hybrid", "relative"),
        ("zoedepth", "tiny", "metric"),
        ("depth_anything_v2_port", "vitt", "metric"),
        ("marigold", "tiny", "affine"),
    ],
)
def test_half_precision_weights_change_no_bit_of_what_autocast_computes(
    name: str, encoder: str, kind: str
) -> None:
    if name == "marigold":
        pytest.importorskip("diffusers")
    student = network(name, encoder, kind)
    image = IMAGE[..., :56, :84] if student.multiple == 14 else IMAGE
    config = TrainConfig(
        precision="bf16",
        data=DataConfig(height=image.shape[-2], width=image.shape[-1]),
        model=ModelConfig(name=name, encoder=encoder, kind=kind, checkpoint="w"),  # type: ignore[arg-type]
        loss=LossConfig(teacher=1.0),
    )
    student.begin_training(own_loss=False)
    teacher = Teacher(student.like(), config, student)
    halved = sum(p.numel() for p in teacher.network.parameters() if p.dtype == torch.bfloat16)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert halved > (0.9 if name.startswith("depth_anything") else 0.1) * trained
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = student.train()(image, FOCAL_PX)
        assert torch.equal(teacher.network(image, FOCAL_PX), expected)
        assert expected.std() > 0


def test_nothing_of_it_is_saved(tiny_sets: TinySets, tmp_path: Path) -> None:
    """And the run is known by its digest, in the state and the metrics."""
    model = {"encoder": "vitt", "checkpoint": str(weights(tmp_path))}
    runs = {}
    for name, factor in (("alone", 0.0), ("taught", 1.0)):
        options = BRIEF | {"steps": 1, "name": name, "loss__teacher": factor, "model": model}
        metrics = train(read_config(tiny_sets.config(tmp_path, **options)))
        fresh_accelerator()
        checkpoint = tmp_path / "runs" / name / "checkpoints" / "step-00000001"
        state = json.loads((checkpoint / "state.json").read_text())
        assert metrics["teacher"] == (state["progress"]["teacher"] or None)
        assert re.fullmatch(r"[0-9a-f]{64}", metrics["teacher"] or "") or not factor
        runs[name] = [
            load_file(checkpoint / "model.safetensors").keys(),
            load_file(tmp_path / "runs" / name / "weights" / "final.safetensors").keys(),
            sorted(file.name for file in checkpoint.iterdir()),
            (checkpoint / "optimizer.bin").stat().st_size,
        ]
    assert runs["alone"] == runs["taught"]


# in the step


@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_a_teacher_without_weight_changes_no_bit(
    factor: float, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """At 0 it is not even looked for; at next to 0 it computes, and nothing else differs."""
    start = weights(tmp_path)
    model = {"encoder": "vitt", "checkpoint": str(start)}
    options: dict[str, Any] = BRIEF | {"steps": 3}
    train(read_config(tiny_sets.config(tmp_path, name="alone", **options, model=model)))
    fresh_accelerator()
    if factor == 0:
        model["teacher"] = "nowhere.pth"
    options["loss__teacher"] = factor
    train(read_config(tiny_sets.config(tmp_path, name="taught", **options, model=model)))
    ours, theirs = (load_file(tmp_path / "runs" / run / crash.FINAL) for run in ("taught", "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for record, plain in zip(
        history(tmp_path / "runs" / "taught"), history(tmp_path / "runs" / "alone"), strict=True
    ):
        assert (record["loss"], record["grad_norm"]) == (plain["loss"], plain["grad_norm"])
        assert ("teacher" in record) == (factor > 0) and "teacher" not in plain


@pytest.fixture(scope="module")
def step_zero(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The first step's batch of 4; pixels that keep their truth, and that keep their lesson."""
    folder = tmp_path_factory.mktemp("zero")
    options = {"loss__teacher": 0.5, "model__teacher": "other.pth"}
    config = read_config(tiny_sets.config(folder, micro_batch=4, **options))
    batch = make_training_batch(first_samples(config), config, CPU)
    samples = batch.sample.tolist()
    kept = dict(zip(samples, (0, 0, 70, 10**9), strict=True))
    lessons = dict(zip(samples, (0, 50, 0, 10**9), strict=True))
    assert len(kept) == 4
    return batch, kept, lessons


def taught_probe(
    folder: Path, tiny_sets: TinySets, ranks: int, micro_batch: int, zero: Any
) -> Probe:
    path = probe_config(tiny_sets, folder, micro_batch)
    text = path.read_text().replace("encoder: vitt", "encoder: vitt\n  teacher: other.pth")
    path.write_text(text + "loss:\n  teacher: 0.5\n")
    out = folder / "probe"
    run_ranks(step_probe.probe_taught, ranks, read_config(path), *zero[1:], out)
    metrics = json.loads(Path(f"{out}.json").read_text())
    return load_file(f"{out}.gradients"), load_file(f"{out}.weights"), metrics


@pytest.fixture(scope="module")
def together(step_zero, tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Probe:  # type: ignore[no-untyped-def]
    return taught_probe(tmp_path_factory.mktemp("together"), tiny_sets, 1, 4, step_zero)


def test_a_step_takes_the_mean_over_images_with_truth_or_lesson(  # type: ignore[no-untyped-def]
    step_zero, together: Probe
) -> None:
    """One image with neither, one with each alone, one with both; in float64, against autograd."""
    batch, kept, lessons = step_zero
    torch.manual_seed(0)
    student = step_probe.Network()
    torch.manual_seed(1)
    teacher = step_probe.Network()
    with torch.no_grad():
        said = teacher(batch.photograph)
    masks = []
    for counted, left in ((batch.valid, kept), (batch.region == 0, lessons)):
        mask = counted.double().flatten(1)
        for row, pixels in zip(mask, left.values(), strict=True):
            row[pixels:] = 0
        masks.append(mask.view_as(batch.valid))
    prediction = student(batch.image)
    truth_loss = depth_loss("metric", prediction, batch.depth_m, masks[0])
    lesson_loss = depth_loss("metric", prediction, said, masks[1])
    assert [bool(v > 0) for v in truth_loss] == [False, False, True, True]
    assert [bool(v > 0) for v in lesson_loss] == [False, True, False, True]
    ((truth_loss + 0.5 * lesson_loss).sum() / 3).backward()
    for i, parameter in enumerate(student.parameters()):
        assert (together[0][str(i)] - parameter.grad).norm() <= 1e-12 * parameter.grad.norm()
    assert len(together[0]) == 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_micro_batches_make_no_difference(  # type: ignore[no-untyped-def]
    step_zero, together: Probe, tiny_sets: TinySets, tmp_path: Path, ranks: int
) -> None:
    gradients, ends, _ = taught_probe(tmp_path, tiny_sets, ranks, 1, step_zero)
    for found, expected in ((gradients, together[0]), (ends, together[1])):
        assert found.keys() == expected.keys()
        for name in expected:
            assert (found[name] - expected[name]).norm() <= 1e-10 * expected[name].norm()


def test_the_log_tells_the_teachers_part(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``loss`` is that of the truth plus the factor times ``teacher``, image by image."""
    truths: list[float] = []

    def spy(*arguments: Any) -> Tensor:
        values = depth_loss(*arguments)
        truths.extend(values.tolist())
        return values

    monkeypatch.setattr(loop, "depth_loss", spy)
    model = {"encoder": "vitt", "checkpoint": str(weights(tmp_path))}
    options = BRIEF | {"steps": 2, "loss__teacher": 3.0, "model": model}
    train(read_config(tiny_sets.config(tmp_path, **options)))
    records = history(tmp_path / "runs" / "tiny")
    for record, values in zip(records, (truths[:4], truths[4:]), strict=True):
        assert record["loss"] == pytest.approx(np.mean(values) + 3 * record["teacher"], rel=1e-5)
    assert records[1]["teacher"] > 0
    said = f"teacher {records[1]['teacher']:.4f}  lr"
    assert said in capsys.readouterr().out


# going on


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_a_taught_run_that_was_broken_off_is_the_one_that_was_not(
    trained: str, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its teacher is the start again, not what the checkpoint has become."""
    model = {"encoder": "vitt", "checkpoint": str(weights(tmp_path)), **STARTS[trained]}
    options: dict[str, Any] = BRIEF | {"steps": 4, "loss__teacher": 2.0, "optim__ema": 0.9}
    options["model"] = model
    runs = [tmp_path / "runs" / name for name in ("whole", "broken")]
    train(read_config(tiny_sets.config(tmp_path, name="whole", **options)))
    config = read_config(tiny_sets.config(tmp_path, name="broken", **options))
    calls = {"n": 0}

    def cut(*arguments: Any) -> Tensor:
        calls["n"] += 1
        if calls["n"] == 6:
            raise InterruptedError
        return depth_loss(*arguments)

    fresh_accelerator()
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(loop, "depth_loss", cut)
        train(config)
    fresh_accelerator()
    train(config)
    (ours, theirs) = (load_file(run / crash.FINAL) for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours_, theirs_ = ([(r["loss"], r["teacher"]) for r in history(run)] for run in runs)
    assert ours_ == theirs_ and len(ours_) == 4


def test_another_teacher_is_refused_and_both_are_named(tiny_sets: TinySets, tmp_path: Path) -> None:
    start = weights(tmp_path)
    model = {"encoder": "vitt", "checkpoint": str(start)}
    options = BRIEF | {"steps": 2, "loss__teacher": 1.0, "model": model}
    config = read_config(tiny_sets.config(tmp_path, **options))
    first = train(config)["teacher"]
    shutil.rmtree(tmp_path / "runs" / "tiny" / "weights")
    weights(tmp_path, seed=4)
    fresh_accelerator()
    with pytest.raises(
        UserError, match=rf"step-00000002 was made with the teacher {first[:12]} .*start\.saf"
    ) as caught:
        train(config)
    (other,) = re.findall(r"now holds ([0-9a-f]{12});", str(caught.value))
    assert other != first[:12]


def test_runs_of_versions_without_teachers_go_on(tiny_sets: TinySets, tmp_path: Path) -> None:
    from flatdepth.training.state import _own_sha256, newest_checkpoint

    config = read_config(tiny_sets.config(tmp_path, **BRIEF | {"steps": 2}))
    train(config)
    path = newest_checkpoint(tmp_path / "runs" / "tiny") / "state.json"  # type: ignore[operator]
    document = json.loads(path.read_text())
    del document["progress"]["teacher"], document["config"]["loss"]["teacher"]
    document["config"]["model"].pop("teacher")
    path.write_text(json.dumps(document | {"sha256": _own_sha256(document)}))
    fresh_accelerator()
    assert train(config)["finished"]


def test_sharded_ranks_are_taught_as_one_process_is(tiny_sets: TinySets, tmp_path: Path) -> None:
    """FSDP 2 on two ranks: each has a teacher of its own, whole."""
    model = {"encoder": "vitt", "checkpoint": str(weights(tmp_path)), "frozen_blocks": 1}
    records = []
    for name in ("one", "two"):
        options = BRIEF | {"name": name, "steps": 3, "loss__teacher": 2.0, "model": model}
        config = read_config(tiny_sets.config(tmp_path, **options))
        if name == "one":
            train(config)
        else:
            run_ranks(step_probe.train_sharded, 2, config)
        records.append([(r["loss"], r["teacher"]) for r in history(tmp_path / "runs" / name)])
    assert len(records[0]) == 3
    for ours, theirs in zip(*records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# what it is for


def test_a_teacher_holds_against_labels_that_are_garbage(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth of another image, upside down: without a teacher the background drifts away."""
    start = REPOSITORY / "shards" / "demo_vitt.safetensors"
    make_batch: Callable[..., TrainingBatch] = make_training_batch

    def garbage(*arguments: Any) -> TrainingBatch:
        batch = make_batch(*arguments)
        depth_m, valid = (x.roll(1, 0).flip(-2) for x in (batch.depth_m, batch.valid))
        return dataclasses.replace(batch, depth_m=depth_m, valid=valid)

    monkeypatch.setattr(loop, "make_training_batch", garbage)
    official, after = (
        make_network("depth_anything_v2", "vitt", kind="metric", max_depth_m=80.0) for _ in range(2)
    )
    load_weights(official, str(start))
    config = read_config(tiny_sets.config(tmp_path, micro_batch=4, model__max_depth_m=80.0))
    images = make_batch(first_samples(config), config, CPU).image
    drift = {}
    for factor in (0.0, 100.0):
        options: dict[str, Any] = BRIEF | {"steps": 12, "paste__share": 0.0, "micro_batch": 4}
        options |= {"name": f"x{factor:g}", "loss__teacher": factor}
        options["model"] = {"encoder": "vitt", "checkpoint": str(start), "max_depth_m": 80.0}
        train(read_config(tiny_sets.config(tmp_path, **options)))
        fresh_accelerator()
        load_weights(after, str(tmp_path / "runs" / f"x{factor:g}" / crash.FINAL))
        with torch.no_grad():
            drift[factor] = (after(images) / official(images)).log().abs().mean().item()
    assert drift[0.0] > 0.1
    assert drift[100.0] < 0.3 * drift[0.0]


# what cannot be


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "starts with a random network, which is no teacher; give model.teacher .* or model"),
        ({"checkpoint": "w.pth", "head": "fresh"}, "a random head.* or set model.head to keep"),
    ],
)
def test_a_random_start_is_no_teacher(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(model=ModelConfig(**model), loss=LossConfig(teacher=1.0))
    TrainConfig(model=ModelConfig(**model, teacher="t.pth"), loss=LossConfig(teacher=1.0))


def test_a_loss_of_the_networks_own_has_no_teacher() -> None:
    with pytest.raises(UserError, match=r"loss\.teacher: .* not by diffusion; set it to 0"):
        LossConfig(terms={"diffusion": 1.0}, teacher=0.5)
