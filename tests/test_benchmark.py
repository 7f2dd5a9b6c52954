"""Benchmarks: fair turns, times that add up, contenders that do the same work, mistakes named."""

import io
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatdepth.bench import decode as benchmark_decode
from flatdepth.bench import loader as benchmark_loader
from flatdepth.bench import step as benchmark_step
from flatdepth.bench.loader import CLEAN, DECODING, PASTED, WEBDATASET, measure_loader
from flatdepth.bench.step import known_peak_tflops, measure_steps, step_text
from flatdepth.bench.timing import compare, table
from flatdepth.cli import parse_config
from flatdepth.commands.benchmark import main
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.shards.codec import decode_image
from flatdepth.data.shards.webdataset import flatdepth_decoder
from flatdepth.errors import UserError
from flatdepth.pace import STEP_STAGES
from flatdepth.training.memory import count_flops
from tests.conftest import TinySets

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_sets: TinySets, tmp_path: Path) -> TrainConfig:
    path = tiny_sets.config(tmp_path)
    return parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)


def test_contenders_take_turns_and_ratios_are_within_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that slows down every round by more than the contenders differ."""
    now, calls = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def work(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds * 2.0 ** (len(calls) // 3)
        calls.append(name)

    contenders = {name: partial(work, name, s) for name, s in (("a", 1.0), ("b", 3.0), ("c", 0.5))}
    timings = compare(contenders, baseline="a", rounds=4, device=CPU)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 4 + 2
    assert set(rounds) == {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")}
    assert {t.name: t.ratio for t in timings} == {
        name: pytest.approx((r, r, r)) for name, r in (("a", 1.0), ("b", 3.0), ("c", 0.5))
    }
    # Rounds 2 to 5 take 4, 8, 16 and 32 seconds; the first two are not counted.
    assert timings[0].ms == pytest.approx((7e3, 12e3, 20e3))
    assert [line.split()[0] for line in table(timings).splitlines()[1:]] == ["a", "b", "c"]


def test_steps_are_split_into_the_stages_of_training(config: TrainConfig) -> None:
    times = measure_steps(config, steps=2, device=CPU, peak_tflops=0.5)
    stages = [name for name in STEP_STAGES if name not in ("teacher", "agree")]
    assert sorted(times.stages) == sorted(stages)
    assert all(0 < low <= middle <= high for low, middle, high in times.stages.values())
    assert times.images_per_s == pytest.approx(1e3 * config.batch / times.step_ms[1])
    # Of two values the median is the mean, and means add up.
    assert sum(middle for _, middle, _ in times.stages.values()) == pytest.approx(times.step_ms[1])
    assert times.data_wait_share == pytest.approx(times.stages["wait"][1] / times.step_ms[1])
    assert times.tflop_per_image == pytest.approx(count_flops(config) / 1e12)
    assert times.mfu == pytest.approx(times.images_per_s * times.tflop_per_image / 0.5)
    assert f"MFU {times.mfu:.1%} of 0.5 TFLOP/s" in step_text(config, times)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("x86_64", None),
    ],
)
def test_peaks_are_those_of_the_very_device(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak


def test_loader_contenders_decode_the_same_frames(config: TrainConfig) -> None:
    """Decoding alone and WebDataset give what the loader's own reading gives, bit for bit."""
    subset = open_corpus(config.data).train[0]
    for place in (0, len(subset) - 1):
        frame = subset.frame(place)
        members = benchmark_loader._members(subset.shards, int(subset.rows[place]))
        decoded = flatdepth_decoder(members)
        np.testing.assert_array_equal(decoded["image"], frame.image)
        np.testing.assert_array_equal(decoded["depth_m"], frame.depth_m)


def test_every_loader_contender_gives_the_samples_it_is_timed_for(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for DataLoader and our own processes, which take seconds to start."""
    given: Counter[str] = Counter()

    def counted(name: str, stream: Iterable[object]) -> Iterator[object]:
        for sample in stream:
            given[name] += 1
            yield sample

    def stand_in(_: object, *, num_workers: int, **__: object) -> list[None]:
        assert num_workers == config.data.threads
        return [None] * (benchmark_loader.WARM_UP + 6 + 1)

    timed = benchmark_loader._timed
    streams = itertools.count()
    monkeypatch.setattr(
        benchmark_loader,
        "_timed",
        lambda stream, samples: timed(counted(f"stream {next(streams)}", stream), samples),
    )
    monkeypatch.setattr(benchmark_loader, "DataLoader", stand_in)
    monkeypatch.setattr(benchmark_loader, "_with_processes", lambda config, _: config)
    found = measure_loader(config, samples=6, rounds=2, pace=1e3)
    assert (
        set(found.rates)
        == set(found.cpu_ms)
        == {
            *(DECODING, CLEAN, PASTED, WEBDATASET),
            *(benchmark_loader.ONE_PROCESS, benchmark_loader.PROCESSES),
        }
    )
    assert all(0 < low <= middle <= high for low, middle, high in found.rates.values())
    assert list(given.values()) == [benchmark_loader.WARM_UP + 6] * 6 * 2
    assert 0 <= found.wait_share <= 1
    text = benchmark_loader.loader_text(config, found)
    assert "frames of 84 x 112, 2 threads" in text and WEBDATASET in text


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
def test_decoders_take_the_same_files_and_differences_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one that is off by two in every seventh value, and one that knows no grey."""

    def off(payload: bytes) -> np.ndarray:
        pixels = decode_image(payload).astype(np.int16)
        steps = pixels.reshape(-1)[::7]
        steps += np.where(steps < 128, 2, -2).astype(np.int16)
        return pixels.astype(np.uint8)

    def without_grey(payload: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(payload)) as image:
            if image.mode == "L":
                raise ValueError("grey")
        return decode_image(payload)

    real = benchmark_decode.decoders
    monkeypatch.setattr(
        benchmark_decode, "decoders", lambda: {**real(), "off": off, "no grey": without_grey}
    )
    out = tmp_path / "figures.json"
    pixels = np.random.default_rng(0).integers(0, 256, (28, 35, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    tool(monkeypatch, "decode", str(tmp_path), "--rounds=1", "--threads", "1", "2", f"--out={out}")
    found = json.loads(out.read_text())["decodings"]
    assert [one["kind"] for one in found] == ["as they are", *benchmark_decode.KINDS]
    for one in found:
        taken = {name for name in one["differences"] if name not in ("off", "no grey")}
        assert {benchmark_decode.PILLOW, benchmark_decode.OURS, "kornia_rs"} <= taken
        assert all(one["differences"][name]["largest"] == 0 for name in taken)
        assert one["differences"]["off"] == {
            "largest": 2,
            "mean": pytest.approx(2 / 7),
            "share": pytest.approx(1 / 7),
        }
        assert ("no grey" in one["differences"]) == (one["kind"] != "grey")
        assert list(one["timings"]) == ["1", "2"]
        for timings in one["timings"].values():
            assert [timing["name"] for timing in timings] == list(one["differences"])
    assert "off up to 2, mean 0.286, 14.3% of them" in capsys.readouterr().out


def test_pictures_to_decode_are_named_where_they_are_not_there(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "x", "does not exist"), (tmp_path, "no JPEG at")):
        with pytest.raises(UserError, match=message):
            benchmark_decode.pictures([path])
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.jpg: image unreadable.*leave it out"):
        benchmark_decode.pictures([tmp_path])
    assert len(benchmark_decode.pictures([])) == 9


def tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", *arguments])
    main(list(arguments))


def test_the_tool_prints_and_writes_figures(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tiny_sets.config(tmp_path), tmp_path / "figures.json"
    tool(monkeypatch, "memory", f"--config={path}", "--batch=2", f"--out={out}")
    figures = json.loads(out.read_text())
    total = figures["simulated"]["peak"]["total"]
    assert total == sum(figures["simulated"]["peak"]["parts"].values())
    printed = capsys.readouterr().out
    assert f"peak allocated                 {total / 2**30:6.2f} GiB" in printed
    assert "vitt, 56 x 70, micro_batch 2" in printed
    monkeypatch.setattr(benchmark_step, "WARM_UP", 0)
    tool(monkeypatch, "step", "--steps=1", f"--config={path}", "--batch=2", f"--out={out}")
    assert json.loads(out.read_text())["images_per_s"] > 0
    assert "MFU: unknown device, name its peak with --peak_tflops" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paste", "--bach", "2"], "--bach; see python tools/benchmark.py paste --help"),
        (["step", "--steps", "0"], "--steps: expected 1 to 100000, got '0'"),
        (["memory", "--fit", "8"], "expected an amount of memory such as 8GiB, got '8'"),
        (["gpu", "--minuets", "2"], "--minuets; see python tools/benchmark.py gpu --help"),
        (["loader", "--rounds", "many"], "--rounds: expected 1 to 100000, got 'many'"),
        (["step", "--optim.learning_rate", "1"], "optim.learning_rate"),
        ([], "command"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        tool(monkeypatch, *arguments)
    assert message in str(caught.value)


def test_a_cap_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--cap needs a CUDA GPU; without one, use --fit"):
        tool(monkeypatch, "memory", "--cap", "8GiB")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"paste needs the package cv2 .*\[benchmark\]"):
        tool(monkeypatch, "paste")


def test_a_slow_server_is_read_in_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "remote.json"
    arguments = ["--samples=32", "--rounds=1", "--median_ms=1", "--slow_share=0", f"--out={out}"]
    assert main(["remote", *arguments]) == 0
    figures = json.loads(out.read_text())
    names = ["one by one", "hedged", "hedged, read ahead", "kept on this machine"]
    assert [timing["name"] for timing in figures["timings"]] == names
    asked = figures["asked"]
    assert asked["one by one"] == 1 and asked["kept on this machine"] == 0
    assert 0 < asked["hedged, read ahead"] < 0.5
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name} ") == 2 for name in names if name != "hedged")
