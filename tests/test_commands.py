"""One command: what it offers, what it imports, and that it is whole in a wheel."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flatdepth.__main__ import main, run
from flatdepth.cli import parse_config
from flatdepth.commands import COMMANDS
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.resources import config_file, demo_file
from tests.conftest import REPOSITORY, TinySets

SCRIPTS = {name: REPOSITORY / "tools" / f"{name}.py" for name in COMMANDS if name != "train"}
SCRIPTS["train"] = REPOSITORY / "train.py"


def python(code: str, folder: Path, packages: Path = REPOSITORY) -> str:
    """What a fresh interpreter prints that runs in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_a_module_and_a_script() -> None:
    modules = {path.stem for path in (REPOSITORY / "flatdepth" / "commands").glob("*.py")}
    assert modules - {"__init__"} == set(COMMANDS)
    scripts = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert scripts - {"figures", "render_rooms"} == set(COMMANDS) - {"train"}


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_overview_has_a_line_for_each(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


def test_the_overview_and_the_package_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, flatdepth\n"
        "assert not [name for name in sys.modules if name.startswith('flatdepth.')]\n"
        "import flatdepth.__main__ as command\n"
        "command.run(['--help'])\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'accelerate'} & set(sys.modules)))"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_program_as_it_was_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(script: str | None) -> str:
        monkeypatch.setattr(sys, "argv", ["bin/flatdepth", name, "--help"])
        if script is not None:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as end:
            main() if script is None else runpy.run_path(script, run_name="__main__")
        assert end.value.code == 0
        return capsys.readouterr().out

    command, script = said(None), said(str(SCRIPTS[name]))
    assert f"flatdepth {name}" in command and f"{name}.py" not in command
    assert f"python {SCRIPTS[name]}" in script and f"flatdepth {name}" not in script


def test_an_unknown_command_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"unknown command 'trian'; choose one of train, pack"):
        run(["trian"])


def test_a_config_that_is_there_goes_before_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = str(REPOSITORY / "configs" / "vits_indoor.yaml")
    names = ("vits_indoor", "vits_indoor.yaml", "configs/vits_indoor", "configs/vits_indoor.yaml")
    assert {config_file(name) for name in names} == {packaged}
    for name in ("mine.yaml", "other/vits_indoor.yaml", str(tmp_path / "vits_indoor.yaml")):
        assert config_file(name) == name
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vits_indoor.yaml").write_text("name: mine\n")
    for arguments in (["--config", names[3]], [f"--config={names[3]}"]):
        assert parse_config(TrainConfig, arguments, prog="", description=None).name == "mine"
    assert config_file("vits_indoor") == packaged


def test_a_demo_file_that_is_there_goes_before_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "shards/demo_art",
        "./shards/demo_art/",
        "shards/demo_vitt.safetensors",
        "shards/flatbench",
    ):
        assert Path(demo_file(name)) == REPOSITORY / name
    for name in ("shards/demo_pictures", "s3://shards/demo_art", "art/demo_art"):
        assert demo_file(name) == name
    (tmp_path / "shards" / "demo_art").mkdir(parents=True)
    assert demo_file("shards/demo_art") == "shards/demo_art"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of the clone holds, built where other data lie beside the demo."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, clone)
    for name in (
        "flatdepth",
        "configs",
        "shards/demo_art",
        "shards/rooms-train",
        "shards/flatbench",
    ):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, clone / name, ignore=ignore)
    for file in (REPOSITORY / "shards").glob("demo_*.safetensors"):
        shutil.copy(file, clone / "shards")
    (clone / "shards" / "mine").mkdir()
    (clone / "shards" / "mine" / "index.json").write_text("{}")
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    wheel = clone / "dist" / python(code, clone).splitlines()[-1]
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_a_wheel_holds_the_package_and_the_demo(installed: Path) -> None:
    def files(folder: Path, pattern: str) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}

    package = installed / "flatdepth"
    assert files(package, "*.py") == files(REPOSITORY / "flatdepth", "*.py")
    assert files(package / "configs", "*") == files(REPOSITORY / "configs", "*.yaml")
    assert {path.parts[0] for path in files(package / "shards", "*")} == {
        "demo_art",
        "demo_lite0.safetensors",
        "demo_vitt.safetensors",
        "flatbench",
        "rooms-train",
    }
    assert (package / "py.typed").is_file()
    assert "flatdepth = flatdepth.__main__:main" in next(
        installed.glob("*.dist-info/entry_points.txt")
    ).read_text("utf-8")
    assert {path.name for path in installed.iterdir()} == {
        "flatdepth",
        next(installed.glob("*.dist-info")).name,
    }


def test_a_wheel_trains_by_accelerate_in_an_empty_folder(
    installed: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    """The quickstart, its weights and its art are found in the package; the rooms are tiny ones."""
    code = f"""
import runpy, sys
import flatdepth
assert flatdepth.__path__ == [{str(installed / "flatdepth")!r}], flatdepth.__path__
sys.argv = [
    "accelerate", "--cpu", "--num_processes=1", "-m", "flatdepth.train", "--config=quickstart",
    "--data.train=[{{path: {tiny_sets.rooms}}}]", "--data.art=[shards/demo_art]",
    "--data.height=56", "--data.width=70", "--steps=2", "--eval.images=2", "--tracker=none",
]
runpy.run_module("accelerate.commands.launch", run_name="__main__")
"""
    first = python(code, tmp_path, installed).splitlines()[0]
    assert first.startswith("runs/quickstart: 1 process on cpu (")
    assert first.endswith("precision no")
    (run_folder,) = (tmp_path / "runs").glob("*/")
    metrics = json.loads((run_folder / "metrics.json").read_text("utf-8"))
    assert run_folder.name == "quickstart" and metrics["finished"]
    assert len(metrics["evaluations"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
