"""The loop: files of a run, exact resume after SIGKILL, ranks, accumulation, bad steps, signals."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import flatdepth.training.loop as loop
from flatdepth.bench import crash
from flatdepth.cli import parse_config
from flatdepth.config import DataConfig, LossConfig, SetConfig, TrainConfig
from flatdepth.data.frames import Corpus, open_corpus
from flatdepth.data.loader import in_order, training_samples
from flatdepth.data.order import Locality
from flatdepth.data.pack import pack
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.shards.index import Categories
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.judge.protocol import align_inverse_depth
from flatdepth.judge.validation import evaluate
from flatdepth.models.checkpoint import load_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.pace import LOADER_STAGES, STEP_STAGES
from flatdepth.show.run_page import write_report
from flatdepth.training import launch, runlog, stop
from flatdepth.training.launch import share_out
from flatdepth.training.loop import (
    build_model,
    loss_weight,
    make_training_batch,
    train,
)
from flatdepth.training.losses import depth_loss
from flatdepth.training.optim import make_optimizer
from flatdepth.training.state import (
    Progress,
    _own_sha256,
    count_step,
    newest_checkpoint,
    save_checkpoint,
    update_best,
)
from tests import step_probe
from tests.conftest import REPOSITORY, TinySets, edit_index

SMALL: dict[str, object] = {"data__height": 28, "data__width": 42}
"""Images as small as the network takes them."""

BRIEF: dict[str, object] = SMALL | {"eval__every": 100, "eval__images": 1, "eval__pictures": 0}
"""Besides, next to no validation."""


def read_config(path: Path, *overrides: str) -> TrainConfig:
    return parse_config(
        TrainConfig, [f"--config={path}", *overrides], prog="train.py", description=None
    )


def fresh_accelerator() -> None:
    """As between processes: accelerate keeps its state in the process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(record["step"], record["loss"]) for record in history(run)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes of ``crash.start`` have it: other numbers of threads add up otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than a tiny training; ``whole_run`` has one."""
    monkeypatch.setattr(runlog, "write_report", lambda _: None)


@pytest.fixture(scope="module")
def whole_run(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing disturbed; its report is drawn once, at the end."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_sets.config(folder, save_every=3, tracker="tensorboard", **SMALL)
    drawn: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "write_report", drawn.append)
        train(read_config(config))
    fresh_accelerator()
    assert len(drawn) == 4
    write_report(drawn[-1])
    return folder / "runs" / "tiny"


@pytest.fixture
def half_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was at step 3."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "weights")
    return run


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
    for record in map(json.loads, (whole_run / "history.jsonl").read_text().splitlines()):
        assert record["time"].keys() == STEP_STAGES.keys() - {"teacher"}
        assert record["loader"].keys() == LOADER_STAGES.keys()
        assert 0 < sum(record["time"].values()) <= 4 / record["images_per_s"] + 1e-5
        waited = record["data_wait_share"] * 4 / record["images_per_s"]
        assert record["time"]["wait"] >= waited - 1e-6
    assert metrics["pace"] is None  # too few steps to tell
    assert "Where the time went" in (whole_run / "report.html").read_text()
    assert len(list((whole_run / "pictures").glob("*.png"))) == 3
    assert (whole_run / "report.html").stat().st_size > 20_000
    assert read_config(whole_run / "config.yaml").steps == 6
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=20.0)
    assert load_weights(model, str(whole_run / "weights" / "final.pth")).matched > 0
    saved = sorted((whole_run / "weights").glob("*.safetensors"))
    assert {"final.safetensors"} <= {path.name for path in saved}
    assert all("AbsRel" in path.with_suffix(".md").read_text() for path in saved)


def test_tensorboard_gets_figures_and_pictures(whole_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (whole_run / "tracker" / "flatdepth").glob("events.*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    (loss, *_) = history(whole_run)
    assert events.Scalars("train/loss")[0].value == pytest.approx(loss["loss"], rel=1e-6)
    assert [e.step for e in events.Scalars("time/backward")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("time/loader/decode")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val/flat/abs_rel")] == [0, 3, 6]
    pictures = events.Images("val/pictures")
    assert [picture.step for picture in pictures] == [0, 3, 6]
    assert pictures[0].width > pictures[0].height > 28


def test_killed_runs_resume_bit_for_bit(tiny_sets: TinySets, tmp_path: Path) -> None:
    """At an instant, and inside a checkpoint's writing; ``tools/crash_test.py`` does many."""
    config = read_config(tiny_sets.config(tmp_path, name="crash", save_every=1, **BRIEF))
    folder, log = tmp_path / "trials", tmp_path / "log.txt"
    trials = list(crash.crash_trials(config, folder, trials=2, seed=1, log=log))
    assert [trial.differences for trial in trials] == [(), ()], log.read_text()
    assert not all(trial.ended for trial in trials)


def test_a_half_written_checkpoint_is_never_chosen(half_run: Path) -> None:
    good = newest_checkpoint(half_run)
    assert good is not None and good.name == "step-00000003"
    torn = good.with_name(".step-00000006.tmp")
    shutil.copytree(good, torn)
    (torn / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(half_run) == good


def test_a_difference_is_found_by_the_crash_test(whole_run: Path, half_run: Path) -> None:
    """Its comparison is not vacuous: one bit of one weight and one loss."""
    shutil.copytree(whole_run / "weights", half_run / "weights")
    expected = crash.fingerprint(whole_run)
    assert crash.fingerprint(half_run) == expected
    data = bytearray((half_run / crash.FINAL).read_bytes())
    data[-3] ^= 1
    (half_run / crash.FINAL).write_bytes(data)
    lines = (half_run / "history.jsonl").read_text().splitlines()
    (half_run / "history.jsonl").write_text("\n".join(lines[:-1]))
    found = crash.fingerprint(half_run)
    assert {name for name in expected if expected[name] != found[name]} == {"weights", "history"}


def test_sigterm_saves_and_says_how_to_go_on(
    tiny_sets: TinySets, whole_run: Path, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, save_every=100, **SMALL))
    run, log = tmp_path / "runs" / "tiny", tmp_path / "log.txt"
    process = crash.start(config, log)
    while not ((run / "history.jsonl").exists() and history(run)):
        assert process.exitcode is None, log.read_text()
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert "; give the same command again to go on" in log.read_text()
    (saved,) = (run / "checkpoints").glob("step-*")
    assert saved.name < "step-00000006"
    train(config)
    assert losses(run) == losses(whole_run)


def test_no_step_touches_the_environment(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that decodes a JPEG reads it at any time, and none may be changed under it."""
    written: list[object] = []
    make_batch, save, putenv = loop.make_training_batch, loop.save_checkpoint, os.putenv

    def first_batch(*arguments: Any) -> Any:
        monkeypatch.setattr(os, "putenv", lambda *pair: (written.append(pair), putenv(*pair)))
        return make_batch(*arguments)

    def last_step(*arguments: Any) -> Any:
        monkeypatch.setattr(os, "putenv", putenv)
        return save(*arguments)

    monkeypatch.setattr(loop, "make_training_batch", first_batch)
    monkeypatch.setattr(loop, "save_checkpoint", last_step)
    train(read_config(tiny_sets.config(tmp_path, save_every=100, **SMALL)))
    assert not written


def test_one_ctrl_c_that_comes_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to the ranks, and torchrun passes it on to them."""
    with stop.StopRequest(Accelerator(cpu=True)) as request:
        signal.raise_signal(signal.SIGINT)
        assert request.received
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("interrupted by the same Ctrl-C")
        monkeypatch.setattr(stop, "ONE_REQUEST_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_stop_in_the_last_step_leaves_the_end_to_do(
    tiny_sets: TinySets, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(tiny_sets.config(tmp_path, save_every=3, **SMALL))
    agree, calls, handlers = loop._agree, {"n": 0}, []

    def stopped(*arguments: Any) -> tuple[float, int, bool]:
        calls["n"] += 1
        return *agree(*arguments)[:2], calls["n"] == 6

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_agree", stopped)
        patch.setattr(
            runlog, "write_report", lambda _: handlers.append(signal.getsignal(signal.SIGTERM))
        )
        assert not train(config)["finished"]
    assert all(handler not in (signal.SIG_DFL, None) for handler in handlers), "while it is closed"
    fresh_accelerator()
    assert train(config)["finished"]
    assert crash.fingerprint(tmp_path / "runs" / "tiny") == crash.fingerprint(whole_run)


def test_a_run_belongs_to_one_training_at_a_time(tiny_sets: TinySets, tmp_path: Path) -> None:
    """And to nobody once that one was killed: then it is the configuration that is looked at."""
    config = read_config(tiny_sets.config(tmp_path, steps=1000, save_every=1, **BRIEF))
    run, log = tmp_path / "runs" / "tiny", tmp_path / "log.txt"
    process = crash.start(config, log)
    while newest_checkpoint(run) is None:
        assert process.exitcode is None, log.read_text()
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"another training is writing to .*tiny; stop it"):
        train(config)
    process.kill()
    process.join()
    fresh_accelerator()
    with pytest.raises(UserError, match="steps=1000, now it is 7"):
        train(dataclasses.replace(config, steps=7))


def test_a_run_goes_on_in_the_order_it_was_begun_in(half_run: Path) -> None:
    """A checkpoint of a version that knew one order only goes on in that one."""
    path = newest_checkpoint(half_run) / "state.json"
    document = json.loads(path.read_text())
    (entry,) = document["config"]["data"]["train"]
    assert (entry.pop("shuffle_block"), entry.pop("shuffle_window")) == (1, 64)
    document["sha256"] = _own_sha256(document)
    path.write_text(json.dumps(document))
    same = f"--runs={half_run.parent}"
    train(read_config(half_run / "config.yaml", same, "--steps=6"))
    fresh_accelerator()
    other = f"--data.train=[{{path: {entry['path']}, shuffle_block: 8}}]"
    with pytest.raises(UserError, match=r"was made with data.train=.*'shuffle_block': 1.*set it"):
        train(read_config(half_run / "config.yaml", same, other))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json"]
)
@pytest.mark.parametrize("way", ["missing", "cut", "bit", "zeros", "another run's"])
def test_a_damaged_checkpoint_is_named(half_run: Path, file: str, way: str) -> None:
    """Before anything is loaded, and with the one to go on from."""
    newest = newest_checkpoint(half_run)
    path = newest / file
    data = bytearray(path.read_bytes())
    if way == "bit":
        data[len(data) // 2] ^= 4
    other = {"cut": data[: len(data) // 2], "zeros": bytes(len(data)), "another run's": data[::-1]}
    path.unlink()
    if way != "missing":
        path.write_bytes(other.get(way, data))
    earlier = shutil.copytree(newest, newest.with_name("step-00000002"))
    message = rf"step-00000003 is damaged: {file} is missing or not as it was written; delete this"
    config = read_config(half_run / "config.yaml", f"--runs={half_run.parent}")
    with pytest.raises(UserError, match=f"{message} checkpoint to go on from step-00000002"):
        train(config)
    shutil.rmtree(earlier)
    fresh_accelerator()
    with pytest.raises(UserError, match="there is none before it; start a new run"):
        train(config)


@pytest.mark.parametrize("text", ["[]", "{}", "null", "[" * 100_000, '{"format": 2}', "\udc80"])
def test_a_state_of_another_form_is_named(half_run: Path, text: str) -> None:
    path = newest_checkpoint(half_run) / "state.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"step-00000003 is damaged: state.json"):
        train(read_config(half_run / "config.yaml", f"--runs={half_run.parent}"))


@pytest.mark.parametrize("line", [b"[]", b'{"loss": 1}', b"\xff\xfe", b'{"step": "x"}', b"{"])
def test_a_damaged_history_is_named_and_a_torn_end_is_not(half_run: Path, line: bytes) -> None:
    history = half_run / "history.jsonl"
    lines = history.read_bytes().splitlines(keepends=True)
    config = read_config(half_run / "config.yaml", f"--runs={half_run.parent}")
    history.write_bytes(lines[0] + line + b"\n" + lines[1])
    with pytest.raises(UserError, match=r"history.jsonl: line 2 is damaged; delete that line"):
        train(config)
    fresh_accelerator()
    history.write_bytes(b"".join(lines[:3]) + line)
    train(config)
    steps = [json.loads(text)["step"] for text in history.read_bytes().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_going_on_elsewhere_clears_up_and_logs_every_step_once(half_run: Path) -> None:
    """Under another name, with a checkpoint left half written at a step that is not saved now."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = half_run.rename(half_run.with_name("other"))
    shutil.copytree(newest_checkpoint(run), run / "checkpoints" / ".step-00000005.tmp")
    figures = run / "metrics.json"
    known = {"time": {"wait": 1.0}, "loader": {}, "limit": "told before"}
    figures.write_text(json.dumps(json.loads(figures.read_text()) | {"pace": known}))
    train(read_config(run / "config.yaml", f"--runs={run.parent}", "--name=other"))
    assert not list((run / "checkpoints").glob(".*"))
    assert json.loads(figures.read_text())["pace"] == known
    (folder,) = {path.parent for path in (run / "tracker" / "flatdepth").glob("events.*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("val/flat/abs_rel")] == [0, 3, 6]


def test_a_set_that_was_packed_anew_is_refused(tiny_sets: TinySets, tmp_path: Path) -> None:
    rooms = tmp_path / "rooms"
    settings = BRIEF | {"steps": 1, "data__train": [{"path": str(rooms)}]}
    for frames in (1, 2):
        reader = RoomsReader(scenes=2, frames_per_scene=frames, height=28, width=42)
        pack(reader, str(rooms), workers=1)
        config = read_config(tiny_sets.config(tmp_path, **settings))
        if frames == 1:
            train(config)
            shutil.rmtree(rooms)
            fresh_accelerator()
    with pytest.raises(UserError, match=r"was made with another .*rooms, which was packed anew"):
        train(config)


def test_metrics_name_the_best_of_the_validations_they_list(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def read(run: Path) -> None:
        metrics = json.loads((run / "metrics.json").read_text())
        values = [entry["table"]["flat"]["abs_rel"] for entry in metrics["evaluations"]]
        assert metrics["best"]["value"] == min(values)
        told.append(metrics["best"])

    monkeypatch.setattr(runlog, "write_report", read)
    train(read_config(tiny_sets.config(tmp_path, **SMALL | {"eval__every": 1, "steps": 2})))
    assert len(told) == 4 and told[0] != told[-1]


def test_what_fsdp_cannot_do_is_refused(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(version: int = 2, **settings: object) -> str:
        plugin = types.SimpleNamespace(fsdp_version=version)
        accelerator = types.SimpleNamespace(
            num_processes=1,
            distributed_type=DistributedType.FSDP,
            state=types.SimpleNamespace(fsdp_plugin=plugin),
        )
        monkeypatch.setattr(launch, "Accelerator", lambda **_: accelerator)
        with pytest.raises(UserError) as caught:
            launch.make_accelerator(read_config(tiny_sets.config(tmp_path, **settings)), tmp_path)
        return str(caught.value)

    assert "optim.ema does not work with FSDP" in refusal(optim__ema=0.9)
    assert "set it to adamw" in refusal(optim__kind="adamw8bit")
    assert "fsdp_version: 2" in refusal(version=1)


def test_a_fault_of_one_rank_is_told_by_all(tiny_sets: TinySets, tmp_path: Path) -> None:
    """What is bad is named by every rank, whichever met it; none is left waiting."""
    settings = BRIEF | {"micro_batch": 1, "max_bad_steps": 2}
    out = tmp_path / "said"
    for fault in ("nan", "damaged"):
        config = read_config(tiny_sets.config(tmp_path, name=fault, **settings))
        run_ranks(step_probe.train_into_a_fault, 2, config, fault, out)
        main, other = (Path(f"{out}.{rank}").read_text() for rank in (0, 1))
        if fault == "nan":
            assert main == other and main.count("room_") == config.batch
        else:
            assert other == "a sample is damaged" and "another one of the run has ended" in main


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may not grow beyond 1 MB while the second checkpoint is written."""
    config = read_config(tiny_sets.config(tmp_path, **BRIEF))
    run = tmp_path / "runs" / "tiny"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*arguments: Any) -> Path:
        if arguments[2].step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            return save_checkpoint(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", full)
        with pytest.raises(
            UserError, match=r"cannot write to .*; the last good one is .*step-00000002; free"
        ):
            train(config)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]
    fresh_accelerator()
    assert train(config)["finished"]
    assert not list((run / "checkpoints").glob(".*")), "the half-written one is gone"


@pytest.mark.parametrize(
    ("names", "takes_all"),
    [
        ({}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2"}, False),
        ({"OMP_NUM_THREADS": "1"}, False),
        (
            {
                "ACCELERATE_MIXED_PRECISION": "no",
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
            },
            False,
        ),
    ],
)
def test_a_launched_process_takes_all_cores_unless_told(
    names: dict[str, str], takes_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "cpus", lambda: 3)
    monkeypatch.setattr("psutil.cpu_count", lambda **_: 8)
    launch.use_all_cores()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == (3 if takes_all else 1)


def test_two_processes_go_on_with_what_one_began(whole_run: Path, half_run: Path) -> None:
    """By the documented command; the samples of the steps are the same, so the losses are."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", REPOSITORY / "train.py"),
            *(f"--config={half_run / 'config.yaml'}", f"--runs={half_run.parent}"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on at step 3 of 6" in done.stdout and "2 processes" in done.stdout
    for (step, ours), (same, theirs) in zip(losses(half_run), losses(whole_run), strict=True):
        assert step == same
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_sharded_ranks_train_stop_and_go_on_as_one_process_does(
    whole_run: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """FSDP 2 on two ranks: losses, figures with an odd number of images, weights, checkpoints."""
    config = read_config(tiny_sets.config(tmp_path, save_every=3, **SMALL))
    run = tmp_path / "runs" / "tiny"
    run_ranks(step_probe.train_sharded, 2, config)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    whole = losses(run)
    run_ranks(step_probe.train_sharded, 2, config)
    assert losses(run) == whole
    for (_, ours), (_, theirs) in zip(whole, losses(whole_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    first, same = (
        json.loads((r / "metrics.json").read_text())["evaluations"][0]["table"]
        for r in (run, whole_run)
    )
    assert all(first[region] == pytest.approx(same[region], rel=1e-5) for region in same)
    ours, theirs = (load_file(r / crash.FINAL) for r in (run, whole_run))
    assert ours.keys() == theirs.keys()
    assert all((ours[n] - theirs[n]).norm() <= 0.02 * theirs[n].norm() + 1e-3 for n in theirs)
    with pytest.raises(UserError, match="was made with FSDP"):
        train(config)


def test_ranks_go_on_bit_for_bit(tiny_sets: TinySets, tmp_path: Path) -> None:
    """A sum over more than two ranks depends on its order, which must not change on the way."""
    config = read_config(tiny_sets.config(tmp_path, steps=4, micro_batch=1, **BRIEF))
    run = tmp_path / "runs" / "tiny"
    run_ranks(step_probe.train_rank, 4, config)
    whole = load_file(run / crash.FINAL)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    run_ranks(step_probe.train_rank, 4, config)
    assert all(weight.equal(whole[name]) for name, weight in load_file(run / crash.FINAL).items())


def test_another_micro_batch_goes_on_with_the_same_steps(whole_run: Path, half_run: Path) -> None:
    """3 steps of 2 micro-batches lie behind, which is no multiple of the 4 that a step now has."""
    train(read_config(half_run / "config.yaml", f"--runs={half_run.parent}", "--micro_batch=1"))
    for (_, ours), (_, theirs) in zip(losses(half_run), losses(whole_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_finished_run_is_not_trained_again(whole_run: Path) -> None:
    before = crash.fingerprint(whole_run)
    assert train(read_config(whole_run / "config.yaml"))["finished"]
    assert crash.fingerprint(whole_run) == before


def test_an_unsafe_change_on_resume_is_refused_by_name(whole_run: Path) -> None:
    path = whole_run / "config.yaml"
    with pytest.raises(UserError, match=r"optim\.lr=0\.001, now it is 0\.5; set it back, or"):
        train(read_config(path, "--optim.lr=0.5"))
    fresh_accelerator()
    with pytest.raises(UserError, match=r"batch=4, now it is 8 \(and 1 more keys differ\)"):
        train(read_config(path, "--batch=8", "--eval.seed=3"))
    fresh_accelerator()
    with pytest.raises(UserError, match="already exists and resume is 'never'"):
        train(read_config(path, "--resume=never"))


def test_a_run_that_began_on_a_cpu_says_that_it_is_in_full_precision(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, steps=1, precision="fp16", **BRIEF))
    train(config)
    run = tmp_path / "runs" / "tiny"
    assert read_config(run / "config.yaml").precision == "no"
    state = json.loads((newest_checkpoint(run) / "state.json").read_text())
    assert state["config"]["precision"] == "no"


def test_a_tracker_that_is_not_installed_is_named(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        config = read_config(tiny_sets.config(tmp_path, tracker=name))
        with pytest.raises(UserError, match=rf"tracker: {name} needs .*; pip install {name}"):
            train(config)
        fresh_accelerator()


def test_a_run_that_goes_on_is_the_same_run_to_its_tracker(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, tracker="wandb"))

    def settings(run: str) -> dict[str, Any]:
        return runlog.tracker_settings(tmp_path / run, config, Progress())

    first = settings("a")["wandb"]
    assert settings("a")["wandb"] == first
    assert first["name"] == config.name and first["resume"] == "allow"
    # the same name in another directory is another run, also where runs are told apart by names
    assert settings("b")["wandb"]["id"] != first["id"]
    config = dataclasses.replace(config, tracker="trackio")
    names = {settings(run)["trackio"]["name"] for run in "aab"}
    assert len(names) == 2
    config = dataclasses.replace(config, tracker="none")
    assert settings("a") == {}


@pytest.fixture(scope="module")
def corpus(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    config = read_config(tiny_sets.config(tmp_path_factory.mktemp("corpus")))
    return open_corpus(config.data)


@pytest.fixture(params=["apart", "together"])
def ordered_corpus(corpus: Corpus, request: pytest.FixtureRequest) -> Corpus:
    """With the neighbours of its set apart, and kept together."""
    blocks = {"apart": 1, "together": 3}
    locality = (Locality(block=blocks[request.param], window=2),)
    return dataclasses.replace(corpus, locality=locality)


def test_ranks_load_disjoint_samples_that_make_up_the_step(
    ordered_corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    corpus = ordered_corpus
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
    ordered_corpus: Corpus, tiny_sets: TinySets, tmp_path: Path
) -> None:
    corpus = ordered_corpus
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


@pytest.fixture(scope="module")
def step_zero(corpus: Corpus, tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The first step's batch of 4, and how many of each image's pixels shall keep their truth."""
    config = read_config(tiny_sets.config(tmp_path_factory.mktemp("zero"), micro_batch=4))
    stream = training_samples(corpus, config, first_step=0, rank=0, ranks=1, accumulation=1)
    samples = next(stream)
    stream.close()
    batch = make_training_batch(samples, config, torch.device("cpu"))
    kept = dict(zip(batch.sample.tolist(), (0, 3, 70, 10**9), strict=True))
    weight = loss_weight(batch, config.loss).double().flatten(1)
    for row, pixels in zip(weight, kept.values(), strict=True):
        row[pixels:] = 0
    assert len(kept) == 4
    return batch, weight.view_as(batch.valid), kept


def run_ranks(target: Callable[..., None], ranks: int, *arguments: object) -> None:
    """Call ``target(*arguments, rank, ranks, port)`` in a process per rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        crash.CONTEXT.Process(target=target, args=(*arguments, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


Probe = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]


def probed(config: Path, kept: dict[int, int], out: Path, ranks: int) -> Probe:
    """(gradients of the first step, weights at the end, metrics) of a training by so many ranks."""
    run_ranks(step_probe.probe, ranks, read_config(config), kept, out)
    metrics = json.loads(Path(f"{out}.json").read_text())
    return load_file(f"{out}.gradients"), load_file(f"{out}.weights"), metrics


def probe_config(tiny_sets: TinySets, folder: Path, micro_batch: int) -> Path:
    return tiny_sets.config(folder, steps=3, eval__every=3, micro_batch=micro_batch)


@pytest.fixture(scope="module")
def together(step_zero, tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> Probe:  # type: ignore[no-untyped-def]
    """One rank, the whole batch in one piece."""
    folder = tmp_path_factory.mktemp("together")
    config = probe_config(tiny_sets, folder, micro_batch=4)
    return probed(config, step_zero[2], folder / "probe", ranks=1)


def test_a_step_takes_the_mean_over_images_with_truth(step_zero, together: Probe) -> None:  # type: ignore[no-untyped-def]
    """Images with 0, 3, 70 and all valid pixels, in float64, against autograd on all at once."""
    batch, weight, _ = step_zero
    torch.manual_seed(0)
    model = step_probe.Network()
    values = depth_loss("metric", model(batch.image), batch.depth_m, weight)
    (values[1:].sum() / 3).backward()
    assert values[0] == 0 and (values[1:] > 0).all()
    found, _, _ = together
    for i, parameter in enumerate(model.parameters()):
        assert (found[str(i)] - parameter.grad).norm() <= 1e-12 * parameter.grad.norm()
    assert len(found) == 4


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_micro_batches_make_no_difference(  # type: ignore[no-untyped-def]
    step_zero, together: Probe, tiny_sets: TinySets, tmp_path: Path, ranks: int
) -> None:
    """Micro-batches of 1: first gradients, weights after 3 steps, and every validation figure.

    With 3 validation images on 4 ranks one has none.
    """
    config = probe_config(tiny_sets, tmp_path, micro_batch=1)
    gradients, weights, metrics = probed(config, step_zero[2], tmp_path / "probe", ranks)
    for found, expected in ((gradients, together[0]), (weights, together[1])):
        assert found.keys() == expected.keys()
        for name in expected:
            assert (found[name] - expected[name]).norm() <= 1e-10 * expected[name].norm()
    for ours, theirs in zip(metrics["evaluations"], together[2]["evaluations"], strict=True):
        assert ours["table"].keys() == theirs["table"].keys()
        for region, row in theirs["table"].items():
            assert ours["table"][region] == pytest.approx(row, rel=1e-6), region
    # from the first micro-batch on all gradients lie in the one bucket that is exchanged
    assert int((tmp_path / "probe.storages").read_text()) == 1


def test_a_step_without_any_truth_changes_nothing(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(tiny_sets.config(tmp_path, steps=3, **BRIEF))
    calls = {"n": 0}

    def blind(*arguments: Any) -> torch.Tensor:
        calls["n"] += 1
        return loss_weight(*arguments) * (calls["n"] not in (5, 6))

    monkeypatch.setattr(loop, "loss_weight", blind)
    metrics = train(config)
    assert metrics["skipped_steps"] == 1
    assert history(tmp_path / "runs" / "tiny")[2]["loss"] is None
    first, second = (
        load_file(tmp_path / "runs/tiny" / name)
        for name in ("checkpoints/step-00000002/model.safetensors", "weights/final.safetensors")
    )
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_an_overflow_of_scaled_gradients_advances_the_samples_and_nothing_else(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a run without a scaler that leaves out the same steps: the same bits at the end.

    So moments, their step count, learning rate, warm-up and average skip them too, and gradients
    are clipped after they are unscaled.
    """
    settings = BRIEF | {
        "steps": 8,
        "optim": {"lr": 1e-3, "head_lr_factor": 1.0, "warmup": 3, "clip_norm": 0.05, "ema": 0.9},
        "loss": {"terms": {"silog": 8.0}},
    }
    fused = torch.device("cuda")  # the kernel that skips by itself; it runs on a CPU too
    monkeypatch.setattr(loop, "make_optimizer", lambda m, c, _: make_optimizer(m, c, fused))
    runs = {name: tmp_path / "runs" / name for name in ("scaled", "plain")}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_accelerator", step_probe.scaled(init_scale=2.0**127))
        skipped = train(read_config(tiny_sets.config(tmp_path, name="scaled", **settings)))
    steps = [r["step"] for r in history(runs["scaled"]) if r["grad_norm"] is None]
    assert 1 <= len(steps) <= 6
    assert skipped["skipped_steps"] == len(steps)
    assert all(r["loss"] is not None for r in history(runs["scaled"]))

    calls = {"n": 0}

    def poisoned(*arguments: Any) -> torch.Tensor:
        calls["n"] += 1
        return depth_loss(*arguments) * (torch.nan if -(-calls["n"] // 2) in steps else 1.0)

    fresh_accelerator()
    monkeypatch.setattr(loop, "depth_loss", poisoned)
    train(read_config(tiny_sets.config(tmp_path, name="plain", **settings)))
    ours, theirs = (load_file(run / "weights" / "final.safetensors") for run in runs.values())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for ours_, theirs_ in zip(*(history(run) for run in runs.values()), strict=True):
        assert ours_["lr"] == theirs_["lr"]
        if ours_["grad_norm"] is not None:
            assert ours_["grad_norm"] == theirs_["grad_norm"] > 0.05, "nothing was clipped"


def test_rates_averages_adapters_and_8_bit_moments_resume_bit_for_bit(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that has a state besides AdamW's, in one run that is broken off and one that is not."""
    options = BRIEF | {
        "steps": 4,
        "optim": {"kind": "adamw8bit", "lr": 1e-3, "ema": 0.9, "schedule": "cyclic", "cycle": 4},
        "model": {"encoder": "vitt", "checkpointing": "encoder", "lora_rank": 4},
        "loss": {"terms": {"silog": 1.0, "ranking": 0.1}},
    }
    runs = [tmp_path / "runs" / name for name in ("whole", "broken")]
    train(read_config(tiny_sets.config(tmp_path, name="whole", **options)))
    config = read_config(tiny_sets.config(tmp_path, name="broken", **options))
    calls = {"n": 0}

    def cut(*arguments: Any) -> torch.Tensor:
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
    assert losses(runs[0]) == losses(runs[1])
    for name in ("weights/final.safetensors", "checkpoints/step-00000004/ema.safetensors"):
        ours, theirs = (load_file(run / name) for run in runs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = DepthAnythingV2("vitt", kind="metric", max_depth_m=20.0)
    final = load_file(runs[0] / "weights" / "final.safetensors")
    assert final.keys() == plain.state_dict().keys()
    average = load_file(runs[0] / "checkpoints/step-00000004/ema.safetensors")
    own = load_file(runs[0] / "checkpoints/step-00000004/model.safetensors")
    name = "depth_head.scratch.output_conv1.weight"
    assert torch.equal(final[name], average[name]) and not torch.equal(final[name], own[name])


def table(flat: float, clean: float) -> dict[str, object]:
    return {"table": {"flat": {"abs_rel": flat}, "clean": {"abs_rel": clean}}}


def test_the_best_is_guarded_by_clean_images_and_staleness_is_counted(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    """clean_guard 0.05: clean error may rise from 0.100 to 0.105."""
    config = read_config(tiny_sets.config(tmp_path, model__checkpoint="some.pth"))
    progress = Progress()
    story = [
        (0.50, 0.100, True, 0),
        (0.40, 0.104, True, 0),
        (0.30, 0.106, False, 1),  # better, but clean images got too bad
        (0.40, 0.100, False, 2),  # no better than the best
        (float("nan"), 0.100, False, 3),
        (0.39, 0.105, True, 0),
    ]
    for step, (flat, clean, best, stale) in enumerate(story):
        progress.step = step
        progress.evaluations.append(table(flat, clean))
        assert update_best(progress, config) is best, step
        assert progress.stale == stale
    assert progress.best == {"value": 0.39, "step": 5}

    unguarded = dataclasses.replace(
        config, model=dataclasses.replace(config.model, checkpoint=None)
    )
    progress = Progress(evaluations=[table(0.5, 0.1), table(0.3, 9.0)])
    assert update_best(progress, unguarded)
    missing = Progress(evaluations=[{"table": {"clean": {"abs_rel": 0.1}}}])
    assert not update_best(missing, config) and missing.stale == 1


def test_higher_is_better_for_deltas(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = read_config(tiny_sets.config(tmp_path, eval__metric="flat.delta1"))
    progress = Progress()
    for value, best in ((0.5, True), (0.6, True), (0.55, False)):
        progress.evaluations.append({"table": {"flat": {"delta1": value}}})
        assert update_best(progress, config) is best


def test_updates_are_the_steps_that_were_taken(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = read_config(tiny_sets.config(tmp_path, max_bad_steps=3))
    progress = Progress()
    for taken, updates, bad in ((True, 1, 0), (False, 1, 1), (False, 1, 2), (True, 2, 0)):
        progress.step += 1
        count_step(progress, taken, ["a"], config)
        assert (progress.updates, progress.bad_steps) == (updates, bad)


def test_a_loss_that_is_not_finite_is_skipped_counted_and_finally_named(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(tiny_sets.config(tmp_path, max_bad_steps=3, **BRIEF))
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
        train(read_config(tiny_sets.config(tmp_path, max_bad_steps=3, name="bad", **BRIEF)))


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
    tiny_sets: TinySets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of almost nothing no validation is better than the first."""
    path = tiny_sets.config(
        tmp_path,
        optim__lr=1e-12,
        precision="bf16",
        **SMALL | {"eval__every": 1, "eval__patience": 2, "eval__pictures": 0},
    )
    metrics = train(read_config(path))
    assert metrics["finished"] is True
    last = metrics["evaluations"][-1]["step"]
    assert last < 6
    assert f"stopped early at step {last} of 6: 2 validations in a row" in capsys.readouterr().out
    assert metrics["best"]["step"] in [entry["step"] for entry in metrics["evaluations"]]
    run = tmp_path / "runs" / "tiny"
    assert (run / "weights" / "best.safetensors").exists()
    assert len(list((run / "checkpoints").glob("step-*"))) >= 1


def test_relative_training_runs_and_is_aligned_before_it_is_judged(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    config = read_config(tiny_sets.config(tmp_path, model__kind="relative", steps=2, **SMALL))
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


def with_parts(tiny_sets: TinySets, folder: Path, parts: Sequence[str]) -> DataConfig:
    """A set whose scenes have the given official parts, to train and to validate on."""
    scenes = ShardSet.open(tiny_sets.rooms).scenes
    numbers = {scene: number for number, scene in enumerate(sorted(scenes.names))}
    shutil.copytree(tiny_sets.rooms, folder)
    edit_index(folder, splits=Categories.of(parts[numbers[scene]] for scene in scenes))
    return DataConfig(train=[SetConfig(path=str(tiny_sets.rooms))], val=[str(folder)])


@pytest.mark.parametrize(
    ("parts", "validated"),
    [
        (("train", "train", "val", "val", "test"), {"val"}),
        (("train", "train", "train", "test", "test"), {"train"}),
        (("", "", "", "", ""), {""}),
    ],
)
def test_a_named_validation_set_keeps_its_test_part_to_itself(
    tiny_sets: TinySets, tmp_path: Path, parts: Sequence[str], validated: set[str]
) -> None:
    config = with_parts(tiny_sets, tmp_path / "set", parts)
    (subset,) = open_corpus(config).val
    assert {subset.shards.splits[row] for row in subset.rows} == validated
    assert len(subset) == 3 * sum(part in validated for part in parts)


def test_nothing_validates_on_what_it_trains_on(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = str(tiny_sets.rooms)
    monkeypatch.chdir(tiny_sets.rooms.parent)
    for again in (rooms + "/", tiny_sets.rooms.name):
        both = DataConfig(train=[SetConfig(path=rooms)], val=[again])
        with pytest.raises(
            UserError, match="is trained on too and has no official validation part"
        ):
            open_corpus(both)
    with pytest.raises(UserError, match="has only its official test part"):
        open_corpus(with_parts(tiny_sets, tmp_path / "set", ["test"] * 5))


def test_devices_share_a_batch_evenly_or_refuse_it(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = read_config(tiny_sets.config(tmp_path, batch=24, micro_batch=8))
    shared = [share_out(config, ranks) for ranks in (1, 2, 4, 12, 24)]
    assert [(one.micro_batch, pieces) for one, pieces in shared] == [
        (8, 3),
        (6, 2),
        (6, 1),
        (2, 1),
        (1, 1),
    ]
    with pytest.raises(UserError, match="multiple of the 5 devices, got 24; the next one is 25"):
        share_out(config, 5)


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
