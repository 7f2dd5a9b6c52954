"""What must hold of MiDaS v2.1 and ResNet-50 as of every network, and their ready configs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import open_model, save_weights
from flatdepth.models.export import export_weights
from flatdepth.models.network import DepthNetwork, freeze, parameter_groups
from flatdepth.models.networks import make_network
from flatdepth.training import runlog
from flatdepth.training.loop import train
from flatdepth.training.memory import GIB, simulate
from tests.conftest import REPOSITORY, TinySets

CASES = [
    ("midas_v21", "tiny", "relative"),
    ("midas_v21", "tiny", "metric"),
    ("midas_v21", "lite3", "relative"),
    ("resnet50", "tiny", "metric"),
    ("resnet50", "tiny", "relative"),
]
every_case = pytest.mark.parametrize(("name", "encoder", "kind"), CASES)

UNUSED = {
    f"depth_head.scratch.refinenet4.resConfUnit1.conv{n}.{leaf}"
    for n in (1, 2)
    for leaf in ("weight", "bias")
}
"""Of MiDaS: the coarsest level has no path to be added to."""


def network(name: str, encoder: str, kind: str, **changes: object) -> DepthNetwork:
    torch.manual_seed(0)
    return make_network(name, encoder, kind=kind, **changes)  # type: ignore[arg-type]


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@every_case
def test_it_predicts_what_it_says_it_does(name: str, encoder: str, kind: str) -> None:
    model = network(name, encoder, kind, max_depth_m=40.0)
    found = model(images()).detach()
    assert found.shape == (2, 1, 64, 96) and found.dtype == torch.float32
    assert model.multiple == 32 and model.units == {"metric": "m", "relative": "1/depth"}[kind]
    assert float(found.min()) >= 0 and float(found.max()) < (40 if kind == "metric" else 1e3)
    with pytest.raises(ValueError, match="64x80; both sides must be multiples of 32"):
        model(torch.zeros(1, 3, 64, 80))
    with pytest.raises(UserError, match=f"{name} predicts .* depth, found 'affine'"):
        network(name, encoder, "affine")


@every_case
def test_every_parameter_that_trains_gets_a_gradient(name: str, encoder: str, kind: str) -> None:
    model = network(name, encoder, kind)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == (
        UNUSED if name == "midas_v21" else set()
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()(images()).square().mean().backward()
    for parameter, value in model.named_parameters():
        moved = value.grad is not None and float(value.grad.abs().sum()) > 0
        assert moved == value.requires_grad, parameter
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@every_case
def test_recomputation_changes_no_gradient(name: str, encoder: str, kind: str) -> None:
    gradients = []
    for checkpointing in ("none", "encoder", "encoder+head"):
        model = network(name, encoder, kind, checkpointing=checkpointing)
        model(images()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@every_case
def test_samples_do_not_depend_on_each_other(name: str, encoder: str, kind: str) -> None:
    model, image = network(name, encoder, kind).train(), images(3)
    with torch.no_grad():
        alone = torch.cat([model(image[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(model(image), alone, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone[0], alone[1], rtol=1e-4)


@every_case
def test_files_come_back_bit_for_bit(name: str, encoder: str, kind: str, tmp_path: Path) -> None:
    model = network(name, encoder, kind, max_depth_m=40.0).eval()
    draw = torch.Generator().manual_seed(2)
    for buffer in model.pretrained.buffers():  # as no new network has them
        buffer.mul_(0.9 + 0.2 * torch.rand(buffer.shape, generator=draw))
    pth, safe = save_weights(model, tmp_path / "weights")
    wrapped = {f"module.net.{n}": t for n, t in torch.load(pth, weights_only=True).items()}
    torch.save({"step": 3, "ema": wrapped}, tmp_path / "wrapped.pth")
    shutil.copy(pth.with_suffix(".json"), tmp_path / "wrapped.json")
    for path in (pth, safe, tmp_path / "wrapped.pth"):
        again, _ = open_model(str(path))
        assert (again.name, again.encoder, again.kind) == (name, encoder, kind)
        assert again.max_depth_m == (40.0 if kind == "metric" else 20.0)
        wanted = model.state_dict()
        assert all(torch.equal(t, wanted[n]) for n, t in again.state_dict().items())
        with torch.no_grad():
            assert torch.equal(again(images()), model(images()))
    assert export_weights(model, tmp_path / "export" / "exported.pth") == 0
    assert (
        "MiDaS" in (card := (tmp_path / "export" / "exported.md").read_text()) or "ResNet" in card
    )


@every_case
def test_parts_freeze_and_train_at_their_rates(name: str, encoder: str, kind: str) -> None:
    model = network(name, encoder, kind)
    unused = UNUSED if name == "midas_v21" else set()
    parameters = {n: p for n, p in model.named_parameters() if n not in unused}
    inside = {n for n in parameters if n.startswith("pretrained.")}

    def training() -> set[str]:
        return {n for n, p in parameters.items() if p.requires_grad}

    freeze(model, "encoder")
    assert training() == parameters.keys() - inside
    freeze(model, "head")
    assert training() == inside
    freeze(model, "none", 2)
    early = ("pretrained.stem.", "pretrained.blocks.0.", "pretrained.blocks.1.")
    assert training() == {n for n in parameters if not n.startswith(early)}
    assert any(n.startswith(early[0]) for n in parameters)
    with pytest.raises(UserError, match=f"expected 0 to {len(model.blocks)} for {encoder}"):
        freeze(model, "none", len(model.blocks) + 1)
    groups = parameter_groups(model, 1e-4, 10.0, 0.01)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert rates.keys() == {id(parameters[n]) for n in training()}
    for n in training():
        assert rates[id(parameters[n])] == pytest.approx(1e-4 if n in inside else 1e-3)


def losses_of(run: Path) -> list[float]:
    lines = (run / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def ready(tiny_sets: TinySets, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A ready config made small: its losses, optimiser and kind, on tiny sets and networks."""

    def read(name: str, *changes: str) -> TrainConfig:
        arguments = [
            f"--config={REPOSITORY / 'configs' / name}.yaml",
            f"--runs={tmp_path / 'runs'}",
            f"--data.train=[{{path: {tiny_sets.rooms}}}]",
            f"--data.art=[{tiny_sets.pictures}]",
            "--data.height=64",
            "--data.width=96",
            "--data.threads=1",
            "--model.encoder=tiny",
            "--model.checkpoint=null",
            "--precision=no",
            "--steps=4",
            "--batch=4",
            "--micro_batch=2",
            "--save_every=2",
            "--tracker=none",
            "--eval.images=2",
            "--eval.batch=2",
            "--eval.pictures=0",
        ]
        return parse_config(TrainConfig, [*arguments, *changes], prog="train.py", description=None)

    return read


@pytest.mark.parametrize("name", ["midas_v21", "resnet50"])
def test_its_ready_config_trains_and_goes_on_bit_for_bit(
    name: str, ready: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)
    config = ready(name)
    train(config)
    run = tmp_path / "runs" / name
    whole = load_file(run / "weights" / "final.safetensors")
    losses = losses_of(run)
    start = network(name, "tiny", config.model.kind)
    freeze(start, "none", config.model.frozen_blocks)
    trained, _ = open_model(str(run / "weights" / "final.safetensors"))
    assert len(losses) == 4 and trained.kind == config.model.kind
    for parameter, value in start.named_parameters():
        moved = not torch.equal(trained.get_parameter(parameter), value)
        assert moved == value.requires_grad, parameter
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "weights")
    train(config)
    again = load_file(run / "weights" / "final.safetensors")
    assert losses_of(run) == losses
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[tensor], again[tensor]) for tensor in whole)


@pytest.mark.parametrize("name", ["midas_v21", "resnet50"])
def test_its_ready_config_says_the_memory_that_it_takes(name: str) -> None:
    path = REPOSITORY / "configs" / f"{name}.yaml"
    config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    said = re.search(r"Expected memory: ([\d.]+) GiB", path.read_text())
    assert said and float(said[1]) == pytest.approx(simulate(config).peak.total / GIB, abs=0.02)


@pytest.mark.parametrize("name", ["midas_v21", "resnet50"])
def test_recomputing_the_head_too_takes_less_in_the_simulation(
    name: str, ready: Callable[..., TrainConfig]
) -> None:
    """In half precision, of which some operations are in float32, also when they are repeated."""
    most, less = (
        simulate(ready(name, "--precision=fp16", f"--model.checkpointing={what}", "--eval.batch=1"))
        for what in ("none", "encoder+head")
    )
    assert less.phase_peaks["forward"] < most.phase_peaks["forward"]
