"""The gradient scaler of fp16: exact resume, and what overflows that no scale helps against."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import flatdepth.training.loop as loop
from flatdepth.bench import crash
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.training import runlog
from flatdepth.training.loop import build_model, train
from tests import step_probe
from tests.conftest import TinySets
from tests.test_train import BRIEF, fresh_accelerator, history, read_config, run_ranks

SCALER = {"init_scale": 2.0**127, "growth_interval": 2}
"""Overflows while the loss below is large, and grows every other step after that."""

SETTINGS: dict[str, object] = BRIEF | {
    "steps": 4,
    "save_every": 1,
    "loss": {"terms": {"silog": 8.0}},
}


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)


def saved(run: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / f"checkpoints/step-{step:08d}/scaler.pt")
    return state


def go_back(run: Path, step: int) -> None:
    """Delete the checkpoints after a step."""
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def test_sharded_ranks_go_on_with_scale_growth_and_moments_to_the_bit(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    """FSDP 2 on two ranks, from after one update, and from before any: only an overflow lies there.

    accelerate itself brings back the growth one step, or the scale one doubling, too far, and the
    moments' count one step where there were none.
    """
    config = read_config(tiny_sets.config(tmp_path, **SETTINGS))
    run = tmp_path / "runs" / "tiny"

    def trained(name: str) -> list[list[Any]]:
        run_ranks(step_probe.train_sharded_in_fp16, 2, config, SCALER, tmp_path / name)
        main, other = ((tmp_path / f"{name}.{rank}").read_text() for rank in (0, 1))
        assert main == other
        return [json.loads(line) for line in main.splitlines()]

    whole, weights, losses = trained("whole"), load_file(run / crash.FINAL), history(run)
    skipped = [record["step"] for record in losses if record["grad_norm"] is None]
    assert skipped in ([1], [1, 2])
    assert whole[0][1]["scale"] == 2.0**126 and whole[len(skipped)][1]["_growth_tracker"] == 1
    assert [saved(run, step) for step, _ in whole] == [state for _, state in whole]
    for step in (len(skipped) + 1, 1):
        go_back(run, step)
        assert trained(f"from {step}") == whole[step:]
        again = load_file(run / crash.FINAL)
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        for ours, theirs in zip(history(run), losses, strict=True):
            assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])


def test_one_process_goes_on_with_its_scaler_or_says_why_not(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without its scaler, and one of another precision, are refused in a sentence."""
    config = read_config(tiny_sets.config(tmp_path, **SETTINGS))
    run = tmp_path / "runs" / "tiny"

    def trained(settings: dict[str, float] | None) -> None:
        fresh_accelerator()
        with monkeypatch.context() as patch:
            if settings is not None:
                patch.setattr(loop, "make_accelerator", step_probe.scaled(**settings))
            train(config)

    trained(SCALER)
    end = saved(run, 4)
    for step in (3, 1):
        go_back(run, step)
        trained(SCALER)
        assert saved(run, 4) == end
    go_back(run, 3)
    with pytest.raises(UserError, match="was made with precision=fp16, now it is no; set it back"):
        trained(None)
    (run / "checkpoints/step-00000003/scaler.pt").unlink()
    with pytest.raises(UserError, match=r"step-00000003 is damaged: scaler\.pt is missing or"):
        trained(SCALER)
    shutil.rmtree(run)
    trained(None)
    with pytest.raises(UserError, match="was made with precision=no, now it is fp16; set it back"):
        trained(SCALER)


def test_activations_beyond_fp16_stop_the_run_and_bf16_is_the_way_out(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head times 2^20 before a layer that divides by as much: the same network otherwise."""
    scalers = []

    def large(config: TrainConfig, accelerator: Accelerator) -> DepthAnythingV2:
        model = build_model(config, accelerator)
        scratch = model.depth_head.scratch
        with torch.no_grad():
            scratch.output_conv1.weight *= 2.0**20
            scratch.output_conv2[0].weight /= 2.0**20
        scalers.append(accelerator.scaler)
        return model

    settings = BRIEF | {"steps": 3, "max_bad_steps": 2}
    monkeypatch.setattr(loop, "build_model", large)
    bf16 = settings | {"name": "bf16", "precision": "bf16"}
    metrics = train(read_config(tiny_sets.config(tmp_path, **bf16)))
    assert metrics["skipped_steps"] == 0 and scalers.pop() is None

    fresh_accelerator()
    monkeypatch.setattr(loop, "make_accelerator", step_probe.scaled(half=True, init_scale=8.0))
    with pytest.raises(
        UserError, match=r"2 optimiser steps in a row .* begin a new run with --precision bf16, or"
    ):
        train(read_config(tiny_sets.config(tmp_path, name="fp16", **settings)))
    assert [record["loss"] for record in history(tmp_path / "runs" / "fp16")] == [None]
    assert scalers.pop().get_scale() == 8.0
