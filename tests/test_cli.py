"""Config and command lines: every knob reachable, every mistake one sentence with exit code 2."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from flatdepth.cli import parse_config, run_command
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from tests.conftest import REPOSITORY, TinySets


def parse(*arguments: str) -> TrainConfig:
    return parse_config(TrainConfig, arguments, prog="train.py", description=None)


def run_train(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the train.py command."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_ready_config_parses_and_says_what_it_is(path: Path) -> None:
    config = parse(f"--config={path}")
    assert config.name == path.stem
    header = path.read_text().split("name:")[0]
    assert header.startswith("# ")
    assert "Hardware:" in header


def test_overrides_win_over_the_file_and_the_file_over_defaults() -> None:
    path = REPOSITORY / "configs" / "quickstart.yaml"
    config = parse(f"--config={path}", "--paste.area=[0.1,0.2]", "--steps=7", "--data.val=[x,y]")
    assert (config.steps, config.paste.area, config.data.val) == (7, (0.1, 0.2), ["x", "y"])
    assert config.model.encoder == yaml.safe_load(path.read_text())["model"]["encoder"]
    assert config.optim.weight_decay == TrainConfig().optim.weight_decay


def test_the_whole_config_survives_being_written_and_read(tmp_path: Path) -> None:
    config = parse(
        "--paste.share=0.25", "--data.train=[{path: a, weight: 2}]", "--model.head=fresh"
    )
    path = tmp_path / "config.yaml"
    plain = dataclasses.asdict(config)
    plain["data"]["crop"] = list(plain["data"]["crop"])
    for key, value in plain["paste"].items():
        plain["paste"][key] = list(value) if isinstance(value, tuple) else value
    path.write_text(yaml.safe_dump(plain))
    assert parse(f"--config={path}") == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=abc"], "steps: expected int, got abc"),
        (["--paste.shar=0.3"], "did you mean 'paste.share'?"),
        (["--stps=3"], "did you mean 'steps'?"),
        (["--model.encoder=vitx"], "'vitt', 'vits', 'vitb', 'vitl', 'vitg'"),
        (["--data.height=500"], "data.height: expected a positive multiple of 14, got 500"),
        (["--paste.share=3"], "paste.share: expected 0 to 1, got 3"),
        (["--paste.area=[0.4,0.1]"], "paste.area: expected two numbers in [0.0001, 1]"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (
            ["--data.train=[shards/x]"],
            'got shards/x; as in --data.train "[{path: shards/NAME}]"',
        ),
        (["--data.train=[{path: a, wieght: 2}]"], "'wieght' is not accepted"),
        (["--name=a/b"], "name: expected a plain directory name, got 'a/b'"),
        (["--model.max_depth_m=0.05"], "data.min_depth_m (0.1) must be below model.max_depth_m"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in ("stps: 3", "paste:\n  share: [1", "data:\n  train: [{path: a, wieght: 2}]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"mine\.yaml: "):
            parse(f"--config={path}")


def test_train_reports_mistakes_without_a_traceback(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_sets.config(tmp_path)
    missing = tmp_path / "missing"
    cases = [
        ("--max_bad_steps=0", "max_bad_steps: expected 1 to 1000000000, got 0"),
        (f"--data.val=[{missing}]", str(missing)),
        ("--data.train=[]", "data.train: expected at least one shard set"),
        (f"--data.art=[{tiny_sets.rooms}]", "expected a set of kind 'art'"),
        (f"--model.checkpoint={missing}.pth", "missing.pth"),
        ("--eval.metric=flat.abs", "eval.metric: expected REGION.METRIC"),
    ]
    for argument, message in cases:
        code, _, errors = run_train(monkeypatch, capsys, f"--config={config}", argument)
        assert code == 2, errors
        assert errors.startswith("error: ") and message in errors
        assert "Traceback" not in errors


def test_help_documents_the_knobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run_train(monkeypatch, capsys, "--help")
    assert code == 0
    for expected in ("--paste.area", "as a share of the image (log-uniform)", "default: 0.8"):
        assert expected in " ".join(text.split())
    _, printed, _ = run_train(monkeypatch, capsys, "--print_config")
    assert yaml.safe_load(printed)["paste"]["share"] == 0.8


def test_what_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    def main() -> None:
        (tmp_path / "file" / "below").mkdir()

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path / 'file' / 'below'}: Not a directory; name another place\n"
    with pytest.raises(OSError, match="no place"):
        run_command(lambda: (_ for _ in ()).throw(OSError("no place")))
