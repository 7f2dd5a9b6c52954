"""The loop: files of a run, exact resume after SIGKILL, ranks, accumulation, bad steps, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import flatdepth.train as loop
from flatdepth.cli import parse_config
from flatdepth.config import LossConfig, TrainConfig
from flatdepth.corpus import Corpus, open_corpus
from flatdepth.errors import UserError
from flatdepth.evaluate import align_inverse_depth, evaluate
from flatdepth.loader import in_order, training_samples
from flatdepth.losses import depth_loss
from flatdepth.models.checkpoint import load_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.train import (
    accumulation_steps,
    build_model,
    loss_weight,
    make_training_batch,
    train,
)
from tests.conftest import REPOSITORY, TinySets

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def read_config(path: Path, *overrides: str) -> TrainConfig:
    return parse_config(
        TrainConfig, [f"--config={path}", *overrides], prog="train.py", description=None
    )


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), f"--config={config}", *overrides]


def launch(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(config, *overrides),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(record["step"], record["loss"]) for record in history(run)]


@pytest.fixture(scope="module")
def whole_run(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing disturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    launch(tiny_sets.config(folder))
    return folder / "runs" / "tiny"


def test_a_run_leaves_what_is_documented(whole_run: Path) -> None:
    metrics = json.loads((whole_run / "metrics.json").read_text())
    assert metrics["finished"] is True
    assert [entry["step"] for entry in metrics["evaluations"]] == [0, 3, 6]
    assert [entry["label"] for entry in metrics["evaluations"]] == ["start", "step 3", "end"]
    for entry in metrics["evaluations"]:
        assert {"clean", "background", "flat"} <= entry["table"].keys()
        assert entry["table"]["clean"]["images"] == 3
    assert [record["step"] for record in history(whole_run)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(record["loss"]) for record in history(whole_run))
    assert len(list((whole_run / "pictures").glob("*.png"))) == 3
    assert (whole_run / "report.html").stat().st_size > 20_000
    assert read_config(whole_run / "config.yaml").steps == 6
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=20.0)
    assert load_weights(model, str(whole_run / "weights" / "final.pth")).matched > 0


@pytest.mark.parametrize("wait_for", ["step-00000002", ".step-00000004.tmp"])
def test_a_killed_run_resumes_bit_for_bit(
    tiny_sets: TinySets, whole_run: Path, tmp_path: Path, wait_for: str
) -> None:
    """SIGKILL after a checkpoint, and while one is being written."""
    config = tiny_sets.config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(
        command(config), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / wait_for).exists():
        if process.poll() is not None:  # so quick that it was through: nothing left to kill
            break
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = launch(config)
    assert "going on at step" in done.stdout or "is complete" in done.stdout
    assert losses(run) == losses(whole_run)
    ours, theirs = (load_file(r / "weights" / "final.safetensors") for r in (run, whole_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tables = [json.loads((r / "metrics.json").read_text())["evaluations"] for r in (run, whole_run)]
    assert tables[0] == tables[1]


def test_sigterm_saves_and_says_how_to_go_on(
    tiny_sets: TinySets, whole_run: Path, tmp_path: Path
) -> None:
    config = tiny_sets.config(tmp_path, save_every=100)
    run = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(
        command(config), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "to go on: accelerate launch train.py" in rest
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    launch(config)
    assert losses(run) == losses(whole_run)


def test_two_processes_give_the_losses_and_figures_of_one(
    tiny_sets: TinySets, whole_run: Path, tmp_path: Path
) -> None:
    config = tiny_sets.config(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
            *command(config)[1:],
        ],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout
    run = tmp_path / "runs" / "tiny"
    for (step, ours), (same_step, theirs) in zip(losses(run), losses(whole_run), strict=True):
        assert step == same_step
        assert ours == pytest.approx(theirs, rel=2e-4)
    first, whole = (
        json.loads((r / "metrics.json").read_text())["evaluations"][0]["table"]
        for r in (run, whole_run)
    )
    assert first.keys() == whole.keys()
    for region in whole:
        for metric, value in whole[region].items():
            assert first[region][metric] == pytest.approx(value, rel=1e-6), (region, metric)


def test_a_finished_run_is_not_trained_again(whole_run: Path) -> None:
    before = load_file(whole_run / "weights" / "final.safetensors")
    done = launch(whole_run / "config.yaml")
    assert "is complete at step 6" in done.stdout
    after = load_file(whole_run / "weights" / "final.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(history(whole_run)) == 6


def test_an_unsafe_change_on_resume_is_refused_by_name(whole_run: Path) -> None:
    done = subprocess.run(
        command(whole_run / "config.yaml", "--optim.lr=0.5"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 2
    assert "optim.lr=0.001, now it is 0.5" in done.stderr
    assert "Traceback" not in done.stderr
    refused = subprocess.run(
        command(whole_run / "config.yaml", "--resume=never"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert refused.returncode == 2
    assert "already exists and resume is 'never'" in refused.stderr


@pytest.fixture(scope="module")
def corpus(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    config = read_config(tiny_sets.config(tmp_path_factory.mktemp("corpus")))
    return open_corpus(config.data)


def test_ranks_load_disjoint_samples_that_make_up_the_step(
    corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, micro_batch=1))

    def keys(rank: int, ranks: int) -> list[str]:
        accumulation = config.batch // ranks
        stream = training_samples(
            corpus, config, first_step=3, rank=rank, ranks=ranks, accumulation=accumulation
        )
        found = [sample.frame.key for _ in range(accumulation) for sample in next(stream)]
        stream.close()
        return found

    alone = keys(0, 1)
    first, second = keys(0, 2), keys(1, 2)
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(alone)


def test_the_stream_is_the_same_from_any_step_and_with_any_threads(
    corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path))
    other = read_config(tiny_sets.config(tmp_path, data__threads=1, data__prefetch=1))

    def batches(settings: TrainConfig, first_step: int, count: int) -> list[torch.Tensor]:
        stream = training_samples(
            corpus, settings, first_step=first_step, rank=0, ranks=1, accumulation=2
        )
        device = torch.device("cpu")
        found = [make_training_batch(next(stream), settings, device).image for _ in range(count)]
        stream.close()
        return found

    whole = batches(config, 0, 6)
    part = batches(other, 2, 2)
    assert torch.equal(whole[4], part[0]) and torch.equal(whole[5], part[1])


def test_micro_batches_add_up_to_the_gradient_of_the_batch(
    corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """Images with very different numbers of valid pixels, in one batch of 4 or in 4 of 1."""
    config = read_config(tiny_sets.config(tmp_path, micro_batch=4))
    stream = training_samples(corpus, config, first_step=0, rank=0, ranks=1, accumulation=1)
    batch = make_training_batch(next(stream), config, torch.device("cpu"))
    stream.close()
    torch.manual_seed(0)
    model = build_model(config, Accelerator(cpu=True)).double()
    weight = loss_weight(batch, config.loss).double()
    weight[0, :, 10:] = 0
    weight[1, :, :, 3:] = 0

    def gradient(pieces: list[slice]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for piece in pieces:
            logits = model.depth_head(
                model.pretrained((batch.image[piece].double() - 0.45) / 0.22), (4, 5)
            )
            prediction = 20 * logits.sigmoid()
            truth = batch.depth_m[piece].double()
            value = depth_loss("metric", prediction, truth, weight[piece])
            (value.mean() / len(pieces)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together = gradient([slice(0, 4)])
    apart = gradient([slice(i, i + 1) for i in range(4)])
    for name, expected in together.items():
        # the position embedding is resized in float32, as the official code does
        limit = 1e-6 if name == "pretrained.pos_embed" else 1e-10
        assert 0 < expected.norm() < 1e3, name
        assert (apart[name] - expected).norm() <= limit * expected.norm(), name


def test_a_loss_that_is_not_finite_is_skipped_counted_and_finally_named(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(tiny_sets.config(tmp_path, max_bad_steps=3))
    calls = {"n": 0}

    def poisoned(*arguments: object) -> torch.Tensor:
        calls["n"] += 1
        value = depth_loss(*arguments)  # type: ignore[arg-type]
        return value * float("nan") if calls["n"] in (3, 7, 8) else value

    monkeypatch.setattr(loop, "depth_loss", poisoned)
    metrics = train(config)
    assert metrics["skipped_steps"] == 2
    run = tmp_path / "runs" / "tiny"
    records = history(run)
    assert [record["step"] for record in records if record["loss"] is None] == [2, 4]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(
        tensor.isfinite().all() for tensor in load_file(run / "weights/final.safetensors").values()
    )

    monkeypatch.setattr(loop, "depth_loss", lambda *a: depth_loss(*a) * float("nan"))
    with pytest.raises(UserError, match=r"3 optimiser steps in a row .* samples were room_"):
        train(read_config(tiny_sets.config(tmp_path, max_bad_steps=3, name="bad")))


def test_evaluation_does_not_depend_on_the_batch_size(
    corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    tables = []
    for batch in (1, 3):
        config = read_config(tiny_sets.config(tmp_path, eval__batch=batch))
        torch.manual_seed(0)
        model = build_model(config, accelerator)
        tables.append(evaluate(model, corpus, config, accelerator, title="t").table)
    for region, row in tables[0].items():
        assert row == pytest.approx(tables[1][region], rel=1e-5)


def test_a_run_that_does_not_improve_stops_early_and_keeps_its_best(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    """With a learning rate of almost nothing no validation is better than the first."""
    path = tiny_sets.config(
        tmp_path, optim__lr=1e-12, eval__every=1, eval__patience=2, precision="bf16"
    )
    metrics = train(read_config(path))
    assert metrics["finished"] is True
    assert [entry["step"] for entry in metrics["evaluations"]][-1] < 6
    assert metrics["best"]["step"] in [entry["step"] for entry in metrics["evaluations"]]
    run = tmp_path / "runs" / "tiny"
    assert (run / "weights" / "best.safetensors").exists()
    assert len(list((run / "checkpoints").glob("step-*"))) >= 1


def test_relative_training_runs_and_is_aligned_before_it_is_judged(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, model__kind="relative", steps=2))
    metrics = train(config)
    assert "aligned in inverse depth" in metrics["protocol"]
    assert all(0 < e["table"]["clean"]["abs_rel"] < 2 for e in metrics["evaluations"])


def test_alignment_recovers_a_planted_scale_and_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = 1 + 4 * torch.rand(2, 1, 20, 30, generator=generator)
    valid = torch.rand(2, 1, 20, 30, generator=generator) > 0.3
    inverse = 3.0 / truth + 0.7
    inverse[~valid] = torch.nan
    aligned = align_inverse_depth(inverse.nan_to_num(9.0), truth, valid, (0.1, 20.0))
    torch.testing.assert_close(aligned[valid], truth[valid], rtol=1e-5, atol=0)


def test_loss_weights_follow_regions_and_validity(
    corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, paste={"share": 1.0}))
    stream = training_samples(corpus, config, first_step=0, rank=0, ranks=1, accumulation=2)
    batch = make_training_batch(next(stream), config, torch.device("cpu"))
    stream.close()
    weight = loss_weight(batch, LossConfig(background=0.5, mirror=2.0, art=3.0, frame=0.0))
    expected = torch.zeros_like(weight)
    for region, value in ((0, 0.5), (1, 2.0), (2, 3.0)):
        expected[(batch.region == region) & batch.valid] = value
    assert torch.equal(weight, expected)
    assert len(batch.region.unique()) >= 3


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = read_config(tiny_sets.config(tmp_path))
    assert accumulation_steps(config, 2) == 1
    with pytest.raises(UserError, match="multiple of micro_batch x devices = 2 x 3 = 6, got 4"):
        accumulation_steps(config, 3)


def test_in_order_keeps_the_order_and_passes_errors_on() -> None:
    def work(task: int) -> int:
        time.sleep(0.002 * (task % 3))
        if task == 9:
            raise UserError("shard 9 is damaged")
        return task

    results = in_order(work, range(20), threads=4, ahead=5)
    assert [next(results) for _ in range(9)] == list(range(9))
    with pytest.raises(UserError, match="shard 9"):
        next(results)
