"""Experiments: what is planned, what is judged, and the figures against a slow twin."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.commands import experiment as tool
from flatdepth.config import LayoutShares, TrainConfig
from flatdepth.data.pack import pack
from flatdepth.data.readers.folder import FolderReader
from flatdepth.errors import UserError
from flatdepth.judge import runs as judge_runs
from flatdepth.judge.experiment import (
    PLAIN,
    ExperimentConfig,
    Judged,
    markdown,
    outcomes,
    planned,
    ratio_plot,
    read_rows,
    read_table,
)
from flatdepth.training.loop import train
from flatdepth.types import METRICS
from tests.conftest import REPOSITORY, TinySets

HEIGHT, WIDTH = 56, 70


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes with a mirror and a picture each, and the same walls without them."""
    folder = tmp_path_factory.mktemp("bench")
    draw = np.random.default_rng(0)
    for scene in range(3):
        place = folder / "raw" / f"room{scene}"
        place.mkdir(parents=True)
        region = np.zeros((HEIGHT, WIDTH), np.uint8)
        region[5:25, 5:30], region[30:50, 35:65] = 1, 2
        for name in ("0", f"0{PLAIN}"):
            pixels = draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{name}.jpg")
            codes = draw.integers(2000, 3000, (HEIGHT, WIDTH)).astype(np.uint16)
            Image.fromarray(codes).save(place / f"{name}.depth.png")
        Image.fromarray(region).save(place / "0.region.png")
    reader = FolderReader(
        str(folder / "raw"), "*/*.jpg", "*/*.depth.png", 0.001, region_glob="*/*.region.png",
        fov_deg=60.0, dataset="bench",
    )  # fmt: skip
    pack(reader, folder / "set", workers=1)
    return folder / "set"


def written(tiny_sets: TinySets, folder: Path, bench: Path, **changes: object) -> Path:
    base = tiny_sets.config(folder, steps=2, save_every=2, eval__every=2)
    document: dict[str, object] = {
        "name": "pastes",
        "runs": str(folder / "runs"),
        "base": str(base),
        "bench": [str(bench)],
        "seeds": 2,
        "arms": [
            {"name": "none", "set": {"paste.share": 0.0}},
            {"name": "ours", "set": {"paste.area": [0.1, 0.3]}, "seeds": 1},
        ],
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def read(path: Path) -> ExperimentConfig:
    return parse_config(ExperimentConfig, [f"--config={path}"], prog="x", description=None)


def test_every_arm_is_the_configuration_with_its_changes_and_seeds(
    tiny_sets: TinySets, bench: Path, tmp_path: Path
) -> None:
    experiment = read(written(tiny_sets, tmp_path, bench))
    arms = planned(experiment)
    named = {
        arm: [(run.config.name, run.config.seed) for run in runs] for arm, runs in arms.items()
    }
    assert named == {"none": [("none-0", 0), ("none-1", 1)], "ours": [("ours-0", 0)]}
    none, ours = arms["none"][0].config, arms["ours"][0].config
    assert (none.paste.share, ours.paste.share) == (0.0, TrainConfig().paste.share)
    assert ours.paste.area == (0.1, 0.3) and none.paste.area == TrainConfig().paste.area


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": [{"name": "one"}]}, "arms: expected two or more"),
        ({"arms": [{"name": "a"}, {"name": "A b"}]}, "small letters, digits and _, got 'A b'"),
        ({"arms": [{"name": "a"}, {"name": "b", "set": {"paste.shar": 1}}]}, "paste.share"),
        ({"arms": [{"name": "a"}, {"name": "b", "set": {"paste.share": 2}}]}, "paste.share: expec"),
        ({"protocol": "mine"}, "protocol: expected one of none, nyu-eigen"),
        ({"seeds": 0}, "seeds: expected 1 to 1000, got 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tiny_sets: TinySets, bench: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        planned(read(written(tiny_sets, tmp_path, bench, **changes)))


def test_no_arm_trains_on_the_bench(tiny_sets: TinySets, tmp_path: Path) -> None:
    path = written(tiny_sets, tmp_path, tiny_sets.rooms)
    with pytest.raises(UserError, match=r"bench: arm none trains on .*; name another set"):
        planned(read(path))


def test_an_experiment_trains_judges_and_goes_on(
    tiny_sets: TinySets,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched = []

    def launch(path: Path, _: str) -> None:
        launched.append(path.stem)
        train(parse_config(TrainConfig, [f"--config={path}"], prog="x", description=None))

    monkeypatch.setattr(judge_runs, "_launch", launch)
    path = written(tiny_sets, tmp_path, bench)
    tool.main([f"--config={path}"])
    assert launched == ["none-0", "none-1", "ours-0"]
    folder = tmp_path / "runs" / "pastes"
    document = json.loads((folder / "experiment.json").read_text())
    assert {*document["table"]["none"]} == {
        "flat", "mirror", "art", "wall", "background", "clean", "gap",
    }  # fmt: skip
    judged = read_rows(folder / "ours-0.judged.json")
    assert {key for key, region in judged.rows if region == "wall"} == {
        f"room{scene}/0{PLAIN}" for scene in range(3)
    }
    assert judged.rows["room0/0", "mirror"][-1] == 20 * 25
    assert judged.rows[f"room0/0{PLAIN}", "wall"][-1] == 20 * 25 + 20 * 30
    shown = capsys.readouterr().out
    assert (folder / "results.md").read_text().strip() in shown
    with Image.open(folder / "pictures.png") as sheet:
        assert sheet.width > 4 * 256
    table = read_table(folder / "experiment.json")
    assert f"{markdown(table)}\n" == (folder / "results.md").read_text()
    assert (folder / "ratios.svg").read_bytes() == ratio_plot(table)
    drawn = {path: path.read_bytes() for path in (*folder.glob("*.svg"), folder / "results.md")}
    for drawing in drawn:
        drawing.unlink()
    tool.main([f"--redraw={folder / 'experiment.json'}"])
    assert len(drawn) == 3 and drawn == {drawing: drawing.read_bytes() for drawing in drawn}
    before = (folder / "experiment.json").read_bytes()
    launched.clear()
    tool.main([f"--config={path}"])
    assert not launched and (folder / "experiment.json").read_bytes() == before
    (folder / "ours-0.judged.json").write_text("{}")
    with pytest.raises(UserError, match=r"ours-0\.judged\.json is damaged; delete it"):
        tool.main([f"--config={path}"])


def judged(values: dict[tuple[str, str], float]) -> Judged:
    place = list(METRICS).index("abs_rel")
    rows = {}
    for key, value in values.items():
        row = [0.0] * len(METRICS)
        row[place] = value
        rows[key] = [*row, 100]
    return Judged(rows=rows, scene_of={f"{s}/{i}": str(s) for s in range(3) for i in range(2)})


def test_means_seeds_and_ratios_are_those_of_a_slow_twin() -> None:
    draw = np.random.default_rng(0)
    keys = [(f"{s}/{i}", region) for s in range(3) for i in range(2) for region in ("flat", "wall")]
    arms = {
        "a": [judged(dict(zip(keys, draw.uniform(0.1, 1, 12), strict=True))) for _ in range(3)],
        "b": [judged(dict(zip(keys, draw.uniform(0.1, 1, 12), strict=True)))],
    }
    table = outcomes(arms)
    place = list(METRICS).index("abs_rel")

    def mean(arm: str, region: str, runs: list[int]) -> float:
        chosen = [
            arms[arm][r].rows[key, name][place]
            for r in runs
            for key, name in keys
            if name == region
        ]
        return sum(chosen) / len(chosen)

    for arm, runs in (("a", [0, 1, 2]), ("b", [0])):
        for region in ("flat", "wall"):
            found = table[arm][region]
            assert found.mean.value == pytest.approx(mean(arm, region, runs))
            assert found.seeds == pytest.approx([mean(arm, region, [run]) for run in runs])
            wanted = mean(arm, region, runs) / mean("a", region, [0, 1, 2])
            assert found.ratio.value == pytest.approx(wanted)
            low, high = found.mean.interval
            assert low <= found.mean.value <= high and found.frames == 6
        gap = mean(arm, "flat", runs) / mean(arm, "wall", runs)
        assert table[arm]["gap"].mean.value == pytest.approx(gap)
    assert table["a"]["flat"].ratio.interval == (1.0, 1.0)
    # three scenes: every mean of three drawn with replacement lies between the scenes' own means
    own = [
        np.mean([arms["b"][0].rows[f"{s}/{i}", "flat"][place] for i in range(2)]) for s in range(3)
    ]
    low, high = table["b"]["flat"].mean.interval
    assert min(own) - 1e-12 <= low < high <= max(own) + 1e-12
    drawn = ratio_plot(table).decode()
    assert ">flat<" in drawn and ">b<" in drawn and "AbsRel of a" in drawn
    assert ">clean<" not in drawn
    text = markdown(table)
    assert "| AbsRel | flat | wall | gap |" in text and " ± " in text
    assert not math.isnan(table["b"]["flat"].ratio.value)


def test_the_example_of_the_docs_is_an_experiment(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text("utf-8")
    (example,) = (part for part in text.split("```") if part.startswith("yaml\nname: decoys"))
    path = tmp_path / "decoys.yaml"
    path.write_text(example.removeprefix("yaml\n"))
    names = [run.config.name for runs in planned(read(path)).values() for run in runs]
    assert names == [f"{arm}-{seed}" for arm in ("ours", "no_decoys") for seed in range(3)] + [
        "no_pastes-0"
    ]


def test_the_table_of_the_docs_is_that_of_its_figures() -> None:
    folder = REPOSITORY / "docs" / "results"
    table = markdown(read_table(folder / "experiment.json"))
    assert table == (folder / "results.md").read_text("utf-8").strip()
    page = (REPOSITORY / "docs" / "results.md").read_text("utf-8")
    assert table in page and markdown(read_table(folder / "photos.json")) in page


def test_the_experiment_of_the_docs_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    arms = planned(read(REPOSITORY / "configs" / "experiments" / "pastes.yaml"))
    assert [len(runs) for runs in arms.values()] == [3, 3, 3] + [1] * 10
    pastes = {arm: runs[0].config.paste for arm, runs in arms.items()}
    ours = pastes["ours"]
    assert ours == TrainConfig().paste and pastes["no_pastes"].share == 0
    assert pastes["legacy"].layout == LayoutShares(hung=0, standing=0, legacy=1)
    assert pastes["gradient_label"] == replace(ours, layout=pastes["legacy"].layout)
    assert all(paste != ours for arm, paste in pastes.items() if arm != "ours")
    arms = planned(read(REPOSITORY / "configs" / "experiments" / "photos.yaml"))
    trained = {arm: [one.path for one in runs[0].config.data.train] for arm, runs in arms.items()}
    assert [arm for arm in arms if arms[arm][0].config.paste.share] == [*trained][2:]
    assert [arm for arm in arms if "runs/photos/masks" in trained[arm]] == [*trained][1::2]
    arms = planned(read(REPOSITORY / "configs" / "experiments" / "official.yaml"))
    assert [len(runs) for runs in arms.values()] == [3, 3]
    assert arms["ours"][0].config.data == arms["no_pastes"][0].config.data
