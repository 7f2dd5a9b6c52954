"""The list of GPU measurements: what fails costs one row, and a dry run has all of it."""

import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from flatdepth.bench.gpu import wheels
from flatdepth.bench.gpu.plan import PARTS
from flatdepth.bench.gpu.rows import Row, at_least, at_most, figure, number, summary, table
from flatdepth.bench.gpu.runner import Part, log_of, run_parts
from flatdepth.bench.gpu.settings import Settings
from flatdepth.commands.benchmark import main
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY, TinySets


@pytest.fixture
def settings(tiny_sets: TinySets, tmp_path: Path) -> Settings:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "demo_pictures").symlink_to(tiny_sets.pictures)
    return Settings(shards=shards, work=tmp_path / "work", dry=True)


def works(_: Settings) -> Iterator[Row]:
    print("printed by the part")
    yield at_most("error", 0.5, 1.0)
    yield at_least("speed", 0.5, 1.0)


def raises(_: Settings) -> Iterator[Row]:
    yield figure("before", 1.0)
    raise ValueError("of this\nkind")


def dies(how: int, _: Settings) -> Iterator[Row]:
    """By a signal, or with an exit code if ``how`` is negative; a child of it lives on."""
    yield figure("before", 1.0)
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    if how < 0:
        os._exit(-how)
    os.kill(os.getpid(), how)
    time.sleep(60)


def hangs(_: Settings) -> Iterator[Row]:
    yield figure("before", 1.0)
    child = os.fork()
    if child:
        yield figure("child", child)
    time.sleep(60)


def sees(settings: Settings) -> Iterator[Row]:
    yield figure("rows before", len(settings.done))


def test_a_part_that_fails_costs_its_own_row_only(settings: Settings, tmp_path: Path) -> None:
    parts = [
        Part(name="first", run=works, seconds=1),
        Part(name="raising", run=raises, seconds=1),
        Part(name="killed", run=partial(dies, signal.SIGKILL), seconds=1),
        Part(name="exiting", run=partial(dies, -3), seconds=1),
        Part(name="judged", run=works, seconds=1, on_gpu=False),
        Part(name="last", run=sees, seconds=1),
    ]
    out, said = tmp_path / "gpu.json", []

    def say(line: str) -> None:
        said.append(line)
        assert len(json.loads(out.read_text())["rows"]) == len(said)  # whole after every row

    rows = run_parts(parts, settings, seconds=60, out=out, say=say)
    found = [(row.part, row.name, row.status) for row in rows if row.name != "time"]
    assert found == [
        ("first", "error", "not judged"),
        ("first", "speed", "not judged"),
        ("raising", "before", "figure"),
        ("raising", "raised", "failed"),
        ("killed", "before", "figure"),
        ("killed", "died", "failed"),
        ("exiting", "before", "figure"),
        ("exiting", "died", "failed"),
        ("judged", "error", "met"),
        ("judged", "speed", "missed"),
        ("last", "rows before", "figure"),
    ]
    notes = {row.part: row.note for row in rows if row.status == "failed"}
    assert notes["raising"] == "ValueError: of this kind"
    assert notes["killed"].startswith("killed by SIGKILL; see ")
    assert notes["exiting"].startswith("exit code 3; see ")
    assert "printed by the part" in log_of(parts[0], settings).read_text()
    assert 'ValueError("of this\\nkind")' in log_of(parts[1], settings).read_text()
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == [r.name for r in rows]
    assert rows[-2].measured == len(rows) - 2


def test_what_takes_too_long_is_ended_with_all_its_processes(
    settings: Settings, tmp_path: Path
) -> None:
    parts = [
        Part(name="hanging", run=hangs, seconds=1),
        Part(name="after", run=works, seconds=1),
    ]
    rows = run_parts(parts, settings, seconds=3, out=tmp_path / "gpu.json", say=lambda _: None)
    statuses = {row.part: row for row in rows if row.status in ("failed", "skipped")}
    assert re.match("took longer than [23] s; see ", statuses["hanging"].note)
    assert statuses["after"].note == "needs about 0 s, 0 s were left"
    child = next(int(row.measured or 0) for row in rows if row.name == "child")
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in _state(child):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the part's own process lives on")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_parts_that_need_more_than_is_left_are_skipped(settings: Settings, tmp_path: Path) -> None:
    """Shorter ones behind them still run. Nothing here computes, so no GPU is missed."""
    parts = [
        Part(name="long", run=works, seconds=500),
        Part(name="short", run=works, seconds=10),
    ]
    told = Settings(shards=settings.shards, work=settings.work, dry=False)
    rows = run_parts(parts, told, seconds=60, out=tmp_path / "gpu.json", say=lambda _: None)
    found = [(row.part, row.status) for row in rows if row.name != "time"]
    assert found == [("long", "skipped"), ("short", "met"), ("short", "missed")]
    assert rows[0].note == "needs about 500 s, 60 s were left"


def test_a_goal_is_met_at_its_limit_and_never_by_what_is_no_number() -> None:
    cases = [(1.0, "met"), (0.0, "met"), (1.001, "missed"), (math.nan, "missed")]
    assert [at_most("x", value, 1).status for value, _ in cases] == [s for _, s in cases]
    cases = [(1.0, "met"), (0.0, "missed"), (1.001, "met"), (math.nan, "missed")]
    assert [at_least("x", value, 1).status for value, _ in cases] == [s for _, s in cases]
    assert at_most("x", None, 1).status == at_least("x", None, 1).status == "not judged"


def test_figures_are_rounded_for_reading() -> None:
    values = [None, 0.0, 20000.0, 0.123456, 123.456, 12345.678, 1.5e-7, 3e9, math.inf, math.nan]
    assert [number(value) for value in values] == [
        *("", "0", "20000", "0.1235", "123.5", "12346", "1.50e-07", "3.00e+09", "inf", "nan")
    ]


def test_the_table_has_every_goal_and_counts_them() -> None:
    rows = [
        at_most("memory", 5.7, 6, "GiB", "capped"),
        figure("rate", 3.0),
        at_least("MFU", 30, 40, "%"),
        Row(name="raised", part="step", status="failed", note="ValueError"),
    ]
    lines = table(rows).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["memory", "<=", "6", "5.700", "GiB", "met", "capped"],
        ["MFU", ">=", "40", "30", "%", "missed"],
        ["step", "raised", "failed", "ValueError"],
    ]
    assert lines[-1] == summary(rows) == "1 of 2 goals met, 1 failed"


def test_names_of_parts_are_their_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)


def tool(*arguments: str) -> int:
    return main(["gpu", *arguments])


def test_a_dry_run_has_the_whole_list(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "gpu.json"
    assert tool("--dry", f"--shards={settings.shards}", f"--out={out}") == 0
    rows = json.loads(out.read_text())["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == [part.name for part in PARTS]
    assert not [row for row in rows if row["status"] in ("failed", "skipped", "missed")]
    figures = {(row["part"], row["name"]): row for row in rows}
    assert figures["resume", "killed and gone on: losses"]["note"] == "equal to the last bit"
    assert figures["resume", "killed and gone on: what differs"]["measured"] == 0
    assert 11 <= figures["resume", "killed after step"]["measured"] <= 20
    assert figures["overflow", "planted overflow not skipped"]["note"] == "skipped: 5"
    assert figures["batches", "pixels"]["measured"] == 0
    assert 0 < figures["gradients", "4 x 1 to 1 x 4"]["measured"] < 1e-5
    assert figures["training", "without pastes: flat AbsRel"]["measured"] > 0
    printed = capsys.readouterr().out
    assert re.search(r"\n(\d+) of \1 goals met, \d+ not judged\n$", printed)


def test_without_a_gpu_the_dry_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="gpu needs a CUDA GPU; --dry runs the same list"):
        tool()


def test_results_are_not_written_over_others(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text("{}")
    with pytest.raises(UserError, match="exists; move it away, or name another file with --out"):
        tool("--dry", f"--out={out}")
    assert out.read_text() == "{}"


def test_wheels_are_what_the_machine_lacks() -> None:
    found = {line.partition("==")[0] for line in wheels.missing(REPOSITORY / "pyproject.toml")}
    lacks = {"kornia", "kornia-rs", "webdataset", "jsonargparse", "zstandard", "bitsandbytes"}
    assert lacks | {"docstring-parser", "typeshed-client", wheels.BUILD} <= found
    # what torch, accelerate and transformers bring themselves
    assert not found & {*wheels.PRESENT, "filelock", "fsspec", "huggingface-hub", "pyyaml", "tqdm"}
    assert not [name for name in found if name.startswith(("nvidia", "s3fs", "pytest"))]


def test_wheels_are_for_the_machine_and_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for pip, as tests have no network."""
    sizes = iter((1000, 61_000_000))

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--python-version=3.12" in command and "--only-binary=:all:" in command
        folder = next(a.removeprefix("--dest=") for a in command if a.startswith("--dest="))
        Path(folder, "some-1-py3-none-any.whl").write_bytes(bytes(next(sizes)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    folder = tmp_path / "wheels"
    lines = wheels.download(REPOSITORY / "pyproject.toml", folder)
    assert lines == (folder / "install.sh").read_text()
    assert [line.split()[:5] for line in lines.splitlines()] == [
        ["python", "-m", "pip", "install", "--no-index"]
    ] * 2
    with pytest.raises(UserError, match=r"holds 61\.0 MB of wheels, at most 60 MB"):
        wheels.download(REPOSITORY / "pyproject.toml", folder)


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such package\n")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(UserError, match="pip download failed: ERROR: no such package"):
        wheels.download(REPOSITORY / "pyproject.toml", tmp_path)
