"""Cross-validation: who is held out, what is run again, mean and deviation, table and plot."""

import json
import math
import runpy
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.pack import pack
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.errors import UserError
from flatdepth.judge import runs as judge_runs
from flatdepth.judge.crossval import (
    Fold,
    chart,
    dataset_folds,
    k_folds,
    render,
    scene_folds,
    spreads,
)
from flatdepth.training.loop import train
from tests.conftest import REPOSITORY, TinySets, edit_index

SCENES, FRAMES = 5, 15


@pytest.fixture(scope="module")
def more_rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set, of another data set and 3 scenes."""
    folder = tmp_path_factory.mktemp("more") / "more"
    pack(RoomsReader(scenes=3, frames_per_scene=1, height=28, width=42), str(folder), workers=1)
    edit_index(folder, dataset="halls")
    return folder


def config_of(tiny_sets: TinySets, folder: Path, *paths: Path, **overrides: object) -> TrainConfig:
    sets = [{"path": str(path)} for path in paths or (tiny_sets.rooms,)]
    path = tiny_sets.config(folder, data__train=sets, **overrides)
    return parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)


def held(fold: Fold) -> list[tuple[str, str]]:
    """(set, scene) of what a fold's run really validates on."""
    corpus = open_corpus(fold.data)
    found = []
    for subset in corpus.val:
        scenes = {subset.shards.index.scenes[row] for row in subset.rows}
        found += [(subset.shards.url, scene) for scene in sorted(scenes)]
    for left, val in zip(corpus.train, corpus.val, strict=False):
        if left.shards.url == val.shards.url:
            scenes = left.shards.index.scenes
            assert not {scenes[r] for r in left.rows} & {scenes[r] for r in val.rows}
            assert len(left.rows) + len(val.rows) == len(left.shards)
    return found


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_scene_is_held_out_once_and_sets_are_dealt_evenly(
    tiny_sets: TinySets, more_rooms: Path, tmp_path: Path, count: int
) -> None:
    config = config_of(tiny_sets, tmp_path, tiny_sets.rooms, more_rooms)
    folds = [held(fold) for fold in k_folds(config, count)]
    everything = [entry for fold in folds for entry in fold]
    assert len(everything) == len(set(everything)) == SCENES + 3
    for part in ([len(fold) for fold in folds], *per_set(folds)):
        assert max(part) - min(part) <= 1


def per_set(folds: list[list[tuple[str, str]]]) -> list[list[int]]:
    counts = [Counter(path for path, _ in fold) for fold in folds]
    paths = {path for count in counts for path in count}
    return [[count[path] for count in counts] for path in sorted(paths)]


def test_folds_depend_on_the_seed_alone(tiny_sets: TinySets, tmp_path: Path) -> None:
    config = config_of(tiny_sets, tmp_path)
    assert k_folds(config, 2) == k_folds(config, 2)
    other = config_of(tiny_sets, tmp_path, data__split_seed=3)
    assert [held(f) for f in k_folds(config, 2)] != [held(f) for f in k_folds(other, 2)]


def test_leave_one_out(tiny_sets: TinySets, more_rooms: Path, tmp_path: Path) -> None:
    config = config_of(tiny_sets, tmp_path, tiny_sets.rooms, more_rooms)
    scenes = [held(fold) for fold in scene_folds(config)]
    assert [len(fold) for fold in scenes] == [1] * (SCENES + 3)
    assert len({fold[0] for fold in scenes}) == SCENES + 3
    rooms, halls = dataset_folds(config)
    assert (rooms.title, halls.title) == ("rooms", "halls")
    for fold, left, out in (
        (rooms, more_rooms, tiny_sets.rooms),
        (halls, tiny_sets.rooms, more_rooms),
    ):
        corpus = open_corpus(fold.data)
        assert [Path(s.shards.url).resolve() for s in corpus.train] == [left.resolve()]
        assert [Path(s.shards.url).resolve() for s in corpus.val] == [out.resolve()]
        assert len(corpus.val[0]) == len(corpus.val[0].shards)


def record(*errors: float) -> dict[str, Any]:
    """metrics.json with two validations; the last one counts."""
    row = {"abs_rel": errors[-1], "delta1": 1 - errors[-1], "images": 3, "pixels": 99}
    last = {"clean": row, "flat": row | {"illusion_gap": 2 * errors[-1]}}
    first = {"clean": row | {"abs_rel": 9.0}}
    return {"evaluations": [{"table": first}, {"table": last}]}


def test_mean_and_sample_deviation() -> None:
    table = spreads([record(0.1), record(0.2), record(0.6)])
    spread = table["clean"]["abs_rel"]
    assert spread.values == [0.1, 0.2, 0.6]
    assert spread.mean == pytest.approx(0.3)
    assert spread.deviation == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert table["flat"]["illusion_gap"].mean == pytest.approx(0.6)
    assert "images" not in table["clean"]
    alone = spreads([record(0.1)])["clean"]["abs_rel"]
    assert alone.mean == 0.1 and math.isnan(alone.deviation)


def test_a_region_that_a_fold_lacks_counts_where_it_is() -> None:
    without = record(0.1)
    del without["evaluations"][-1]["table"]["flat"]
    spread = spreads([without, record(0.2), record(0.4)])["flat"]["abs_rel"]
    assert math.isnan(spread.values[0]) and spread.mean == pytest.approx(0.3)
    text = render([], {"flat": {"abs_rel": spread}}, "protocol")
    assert "abs_rel  0.3000 ± 0.1414" in text


@pytest.fixture
def command(tiny_sets: TinySets, tmp_path: Path) -> Callable[..., Path]:
    main = runpy.run_path(str(REPOSITORY / "tools" / "crossval.py"))["main"]
    path = tiny_sets.config(
        tmp_path,
        steps=1,
        save_every=1,
        eval__every=5,
        eval__pictures=0,
        batch=1,
        micro_batch=1,
        data__height=28,
        data__width=28,
    )

    def run(*arguments: str) -> Path:
        main([f"--config={path}", *arguments])
        return tmp_path / "runs" / "tiny-2-folds"

    return run


def test_two_folds_through_accelerate(
    command: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two real runs, one in this process; what finished is not run again, what did not is."""
    launch = judge_runs._launch

    def launch_or_train(path: Path, options: str) -> None:
        if path.stem == "fold_2":
            launch(path, options)
            return
        config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
        train(config)

    monkeypatch.setattr(judge_runs, "_launch", launch_or_train)
    folder = command("--folds=2", "--accelerate=--cpu --num_processes 1")
    text = capfd.readouterr().out
    document = json.loads((folder / "crossval.json").read_text())
    runs = [json.loads((folder / f"fold_{k}" / "metrics.json").read_text()) for k in (1, 2)]
    assert sum(run["evaluations"][-1]["table"]["clean"]["images"] for run in runs) == FRAMES
    values = [run["evaluations"][-1]["table"]["clean"]["abs_rel"] for run in runs]
    figure = document["table"]["clean"]["abs_rel"]
    assert figure["values"] == values
    assert figure["mean"] == pytest.approx(statistics.fmean(values))
    assert figure["deviation"] == pytest.approx(statistics.stdev(values))
    assert f"{figure['mean']:.4f} ± {figure['deviation']:.4f}" in text
    with Image.open(folder / "crossval.png") as image:
        assert image.format == "PNG" and image.width > 800

    launched: list[str] = []
    monkeypatch.setattr(judge_runs, "_launch", lambda path, _: launched.append(path.name))
    before = (folder / "crossval.json").read_bytes()
    command("--folds=2", "--accelerate=--cpu --num_processes 1")
    assert launched == [] and (folder / "crossval.json").read_bytes() == before
    metrics = folder / "fold_2" / "metrics.json"
    metrics.write_text(json.dumps(runs[1] | {"finished": False}))
    with pytest.raises(UserError, match=r"fold_2 has not finished; give the same command again"):
        command("--folds=2")
    assert launched == ["fold_2.yaml"]
    with pytest.raises(UserError, match=r"fold_1.yaml belongs to .* other settings"):
        command("--folds=2", "--optim.lr=2e-4")


def test_mistakes_are_one_sentence(
    command: Callable[..., Path], tiny_sets: TinySets, tmp_path: Path
) -> None:
    for arguments, message in (
        ([], "expected one of --folds K, .*, got 0"),
        (["--folds=2", "--leave-one-scene-out"], "expected one of .*, got 2"),
        (["--folds=1"], "--folds: expected 2 to 5, the number of scenes of data.train, got 1"),
        (["--folds=6"], "--folds: expected 2 to 5"),
        (["--folds=x"], "--folds: expected 1 to 1000000, got 'x'"),
        (["--leave-one-dataset-out"], "found rooms alone"),
        (["--folds=2", f'--data.val=["{tiny_sets.rooms}"]'], "data.val and val_scenes: expected"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            command(*arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_named_scenes_must_exist(tiny_sets: TinySets, tmp_path: Path) -> None:
    sets = [{"path": str(tiny_sets.rooms), "val_scenes": ["cellar"]}]
    path = tiny_sets.config(tmp_path, data__train=sets)
    config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    with pytest.raises(UserError, match="has no scene 'cellar' that its val_scenes name"):
        open_corpus(config.data)


def test_chart_is_deterministic() -> None:
    table = spreads([record(0.1), record(0.2), record(0.6)])
    assert chart(table, "title") == chart(table, "title") != chart(table, "other")
