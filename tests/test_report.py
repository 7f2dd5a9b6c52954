"""The HTML report: well-formed, self-contained, true to the JSON, safe against hostile names."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.errors import UserError
from flatdepth.judge.scoring import run_config
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.report.page import write_comparison
from flatdepth.report.samples import Exhibits, judge_runs
from flatdepth.show import run_page as report
from flatdepth.show.clouds import cloud_json
from flatdepth.show.run_page import write_report
from flatdepth.types import ALL_METRICS, METRICS, REGIONS, Region
from tests.browser import Browser
from tests.conftest import TinySets

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a report says; asserts on the way that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.values: list[list[list[float]]] = []
        self.best: list[float] = []
        self.verdicts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if attributes.get("class") in {"good", "bad", "same"} and "table" in self.open:
            self.verdicts.append(attributes["class"] or "")
        if tag == "table":
            self.tables.append([])
            self.values.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.values[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        elif tag == "data":
            value = float(attributes["value"] or "")
            self.values[-1][-1].append(value)
            if "b" in self.open:
                self.best.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def region_row(scale: float) -> dict[str, float]:
    """A row as training writes it; errors grow with ``scale``, accuracies fall."""
    errors = {m: scale * (1 + i / 7) for i, m in enumerate(METRICS) if METRICS[m].better == "lower"}
    shares = {
        m: 1 - scale / (i + 2) for i, m in enumerate(METRICS) if METRICS[m].better == "higher"
    }
    return errors | shares | {"images": 12, "pixels": 345_678}


def metrics() -> dict[str, Any]:
    def evaluation(label: str, step: int, scale: float) -> dict[str, Any]:
        table = {name: region_row(scale * (1 + i / 10)) for i, name in enumerate(REGIONS)}
        table["clean"] = region_row(0.1)
        return {"label": label, "step": step, "table": table, "illusion_gap": 3.5 * scale}

    return {
        "format": 1,
        "name": "demo",
        "finished": True,
        "protocol": "metric, no alignment",
        "seconds": 3723.4,
        "device": "cpu",
        "versions": {"torch": "2.11.0"},
        "evaluations": [
            evaluation("start", 0, 0.4),
            evaluation("20", 20, 0.0625),
            evaluation("end", 40, 0.125),
        ],
    }


def make_run(folder: Path, record: dict[str, Any] | None = None, *, history: bool = False) -> Path:
    """A run directory; without ``history`` the report has no curves, which take most time."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(record or metrics()))
    (folder / "config.yaml").write_text("seed: 7\nmodel:\n  encoder: vitt\n")
    lines = [
        {
            "step": step,
            "loss": None if step == 3 else 1 / step,
            "lr": 1e-4,
            "grad_norm": 1.0,
            "images_per_s": 20.0 + step,
            "data_wait_share": 0.03,
        }
        for step in range(1, 41)
    ]
    if history:
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pictures").mkdir()
    for index, name in enumerate(("0040_end", "0000_start", "0020_middle")):
        Image.new("RGB", (300 + index, 200), (40, 80, 120)).save(folder / f"pictures/{name}.png")
    return folder


def read(run: Path) -> Page:
    return Page(write_report(run).read_text("utf-8"))


def test_report_is_one_self_contained_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", history=True)
    before = set(run.rglob("*"))
    path = write_report(run)
    assert path == run / "report.html"
    assert set(run.rglob("*")) - before == {path}
    text = path.read_text("utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>")
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'")


def test_same_run_gives_the_same_bytes_and_out_is_respected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = write_report(run, tmp_path / "new" / "first.html").read_bytes()
    assert first == write_report(run, tmp_path / "second.html").read_bytes()
    assert not (run / "report.html").exists()


def test_images_decode_and_pictures_come_in_order(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run", history=True))
    sources = [attributes for tag, attributes in page.tags if tag in {"img", "source"}]
    assert len(sources) == 3 + 4
    widths = []
    for attributes in sources:
        uri = attributes.get("src") or attributes.get("srcset") or ""
        kind, data = re.fullmatch(r"data:image/([a-z+]+);base64,(.*)", uri).groups()
        content = base64.b64decode(data, validate=True)
        if kind == "webp":
            image = Image.open(io.BytesIO(content))
            image.load()
            assert (attributes["width"], attributes["height"]) == tuple(map(str, image.size))
            pixel = image.convert("RGB").getpixel((150, 100))
            assert max(abs(a - b) for a, b in zip(pixel, (40, 80, 120), strict=True)) <= 3
            widths.append(image.size[0])
        else:
            assert kind == "svg+xml" and b"<svg" in content
    assert widths == [301, 302, 300]
    order = [page.text.index(name) for name in ("0000_start", "0020_middle", "0040_end")]
    assert order == sorted(order)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_tables_hold_exactly_the_numbers_of_the_json(tmp_path: Path) -> None:
    record = metrics()
    page = read(make_run(tmp_path / "run", record))
    evaluations = record["evaluations"]
    order = ("flat", "mirror", "art", "frame", "decoy", "background", "clean")

    summary, *cards = page.values
    expected = [[e["table"][region]["abs_rel"] for e in evaluations] for region in order]
    assert summary == [[], *expected, [e["illusion_gap"] for e in evaluations]]
    assert len(cards) == len(order)
    for region, card in zip(order, cards, strict=True):
        names = (*METRICS, "images", "pixels")
        assert card == [[], *([e["table"][region][name] for e in evaluations] for name in names)]


def test_shown_figures_are_the_rounded_values(tmp_path: Path) -> None:
    record = metrics()
    record["evaluations"][1]["table"]["mirror"]["pixels"] = 2_345_678
    page = read(make_run(tmp_path / "run", record))
    for texts, values in zip(page.tables, page.values, strict=True):
        for row, numbers in zip(texts, values, strict=True):
            for shown, number in zip(row[1:], numbers, strict=False):
                digits, _, prefix = shown.replace(",", "").partition(" ")
                factor = {"": 1.0, "k": 1e3, "M": 1e6}[prefix]
                unit = factor * 10.0 ** -len(digits.partition(".")[2])
                assert abs(float(digits) * factor - number) <= 0.5001 * unit, (shown, number)
                assert unit <= 0.0101 * max(numbers) or float(digits) == number


def test_best_of_each_row_is_marked_and_ties_are_not(tmp_path: Path) -> None:
    record = metrics()
    page = read(make_run(tmp_path / "run", record))
    middle = record["evaluations"][1]  # the smallest errors and the largest shares
    order = ("flat", "mirror", "art", "frame", "decoy", "background")
    expected = [middle["table"][region]["abs_rel"] for region in order]
    expected.append(middle["illusion_gap"])
    for region in order:  # the clean images never change: no best
        expected += [middle["table"][region][name] for name in METRICS]
    assert page.best == expected


@pytest.mark.parametrize(("backwards", "verdict"), [(False, "good"), (True, "bad")])
def test_change_is_judged_by_the_sense_of_the_metric(
    tmp_path: Path, backwards: bool, verdict: str
) -> None:
    record = metrics()  # errors fall and shares rise, but for the clean images
    if backwards:
        record["evaluations"].reverse()
    page = read(make_run(tmp_path / "run", record))
    summary = [verdict] * 6 + ["same", verdict]
    cards = [verdict] * 6 * len(METRICS) + ["same"] * len(METRICS)
    assert page.verdicts == summary + cards


def test_columns_say_label_step_and_change(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run"))
    assert page.tables[0][0] == ["Region", "startstep 0", "20step 20", "endstep 40", "change"]
    flat = page.tables[0][1]
    assert flat[0] == "Mirrors and art" and flat[-1] == "−69\u202f%"  # 0.125 / 0.4 = 31.25 %
    clean = page.tables[0][7]
    assert clean[0] == "Clean images" and clean[-1] == "±0.0\u202f%"


@pytest.mark.parametrize(
    ("start", "end", "sentence"),
    [
        (0.4, 0.1, "AbsRel on mirrors and art fell from 0.400 to 0.100 (−75\u202f%)"),
        (0.1, 0.4, "AbsRel on mirrors and art rose from 0.100 to 0.400 (+300\u202f%)"),
        (0.25, 0.25, "AbsRel on mirrors and art stayed at 0.250"),
        (0.0, 0.25, "rose from 0 to 0.250 (from 0)"),
        (None, 0.25, "AbsRel on mirrors and art is 0.250 in the evaluation “end”"),
        (0.25, None, "No mirror or art pixel was evaluated"),
    ],
)
def test_headline_tells_the_result(
    tmp_path: Path, start: float | None, end: float | None, sentence: str
) -> None:
    record = metrics()
    first, last = record["evaluations"][0], record["evaluations"][-1]
    first["table"]["flat"]["abs_rel"], last["table"]["flat"]["abs_rel"] = start, end
    first["table"]["background"]["abs_rel"] = 0.2
    last["table"]["background"]["abs_rel"] = 0.19
    page = read(make_run(tmp_path / "run", record))
    assert sentence in page.text
    assert "; background 0.200 → 0.190 (−5.0\u202f%); clean images 0.100 → 0.100 (±0.0" in page.text


def test_regions_and_metrics_that_are_absent_or_unknown(tmp_path: Path) -> None:
    record = metrics()
    del record["evaluations"][1]["table"]["decoy"]
    record["evaluations"][2]["table"]["art"]["abs_rel"] = None
    for evaluation in record["evaluations"]:
        evaluation["table"]["glass"] = {"abs_rel": 0.5, "sharpness": 0.75}
    page = read(make_run(tmp_path / "run", record))
    rows = {row[0]: row[1:] for row in page.tables[0]}
    assert rows["Decoys"][1] == "–"
    assert rows["Art"][2:] == ["–", ""]
    assert rows["glass"][:3] == ["0.500"] * 3
    assert page.tables[-1][2] == ["sharpness", "0.750", "0.750", "0.750", ""]


def test_run_facts(tmp_path: Path) -> None:
    text = read(make_run(tmp_path / "run", history=True)).text
    for fact in (
        "Duration1 h 02 min",
        "Steps40",
        "Skipped steps1",
        "Images per second40.5 (median)",
        "Waiting for data3.0% of the time (median)",
        "Devicecpu",
        "torch 2.11.0",
        "metric, no alignment",
        "encoder: vitt",
    ):
        assert fact in text, fact


def test_the_time_of_steps_and_samples_is_shown(tmp_path: Path) -> None:
    """Means of what was logged; records without times do not count, damaged ones do no harm."""
    sentence = "the planner limits this run: its steps wait 34% of the time for samples; lower it"
    run = make_run(tmp_path / "run", metrics() | {"pace": {"limit": sentence}})
    times = [
        {"time": {"wait": 0.25, "forward": 0.5}, "loader": {"plan": 0.02, "decode": 0.0}},
        {"time": {"wait": 0.75, "forward": 0.5, "new": 9.0}, "loader": {"plan": 0.06}},
        {"time": {"wait": "x", "forward": -1.0, "copy": math.nan}, "loader": [1.0]},
        {},
    ]
    record = {"loss": 1.0, "lr": 1e-4}
    lines = [json.dumps({"step": n} | record | time) for n, time in enumerate(times, start=1)]
    (run / "history.jsonl").write_text("\n".join(lines))
    page = read(run)
    assert sentence[1:] in page.text
    bars = [a["aria-label"] for _, a in page.tags if a.get("class") == "bar"]
    assert bars == [
        "An optimiser step: wait 333 ms, forward 333 ms",
        "A sample, beside the steps: plan 40.0 ms",
    ]
    widths = [a["style"] for tag, a in page.tags if tag == "i" and "width" in (a["style"] or "")]
    assert [width.partition(";")[0] for width in widths if width] == [
        "width: 50.00%",
        "width: 50.00%",
        "width: 100.00%",
    ]
    (tmp_path / "old").mkdir()
    assert "Where the time went" not in read(make_run(tmp_path / "old" / "run", history=True)).text


HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'</td></style><script>"


def test_hostile_names_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    record = metrics() | {
        "name": HOSTILE,
        "protocol": HOSTILE,
        "device": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
    }
    record["evaluations"][0]["label"] = HOSTILE
    record["evaluations"][0]["table"][HOSTILE] = {HOSTILE: 1.0, "abs_rel": 2.0}
    plain = read(make_run(tmp_path / "plain"))
    run = make_run(tmp_path / "run", record)
    (run / "config.yaml").write_text(f"x: {HOSTILE}\n")
    name = "<b onclick=x>&quot;'\"><i>"
    (run / "pictures/0000_start.png").rename(run / f"pictures/{name}.png")
    damaged = "<b onclick=y>damaged"
    (run / f"pictures/{damaged}.png").write_bytes(b"nothing")
    page = read(run)
    assert page.text.count(HOSTILE) >= 9
    assert f"pictures/{damaged}.png is not a readable image." in page.text
    assert name in page.text
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not any("onerror" in a or "onclick" in a for _, a in page.tags)
    labels = [a.get("aria-label") for _, a in page.tags]
    assert name in labels


@pytest.mark.parametrize("kept", report._RUN_FILES)
def test_each_part_alone_gives_a_report_that_says_what_is_missing(
    tmp_path: Path, kept: str
) -> None:
    full = make_run(tmp_path / "full", history=True)
    run = tmp_path / "partial"
    run.mkdir()
    (full / kept).rename(run / kept)
    page = read(run)
    for name in report._RUN_FILES:
        assert (f"There is no {name}" in page.text) == (name != kept)
    assert "There are no pictures yet." in page.text
    if kept != "metrics.json":
        assert "partial" in page.text and "No evaluation has been written yet." in page.text
        assert "This run is not finished." in page.text


def test_unfinished_run_with_one_evaluation_torn_history_and_damaged_picture(
    tmp_path: Path,
) -> None:
    record = metrics() | {"finished": False}
    record["evaluations"] = record["evaluations"][:1]
    run = make_run(tmp_path / "run", record, history=True)
    lines = (run / "history.jsonl").read_text().splitlines()
    resumed = json.loads(lines[4]) | {"loss": None}
    torn = [*lines[:9], '{"step": 10, "lo', "7", '{"loss": 1}', json.dumps(resumed)]
    (run / "history.jsonl").write_text("\n".join(torn))
    (run / "pictures/0040_end.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    page = read(run)
    assert "This run is not finished. Its last logged step is 9." in page.text
    assert "3 unreadable lines of history.jsonl left out." in page.text
    assert "pictures/0040_end.png is not a readable image." in page.text
    assert "Skipped steps2" in page.text, "the record after the resume counts"
    assert "AbsRel on mirrors and art is 0.640 in the evaluation “start”" in page.text
    assert page.tables[0][0] == ["Region", "startstep 0"]
    assert page.best == []


def test_empty_evaluations_and_history(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics() | {"evaluations": [], "seconds": None})
    (run / "history.jsonl").write_text("")
    page = read(run)
    assert "No evaluation has been written yet." in page.text
    assert "history.jsonl has no record yet" in page.text
    assert page.tables == []


def test_a_directory_that_is_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of metrics\.json"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="name of an HTML file"):
        write_report(make_run(tmp_path / "run"), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        json.dumps({"format": 1}),
        json.dumps(metrics() | {"evaluations": 3}),
        json.dumps(metrics() | {"evaluations": [{"label": "a"}]}),
        json.dumps(metrics() | {"versions": []}),
        json.dumps(metrics() | {"seconds": "long"}),
        json.dumps(
            metrics()
            | {"evaluations": [{"label": "", "step": 0, "table": {"a": 1}, "illusion_gap": 1}]}
        ),
    ],
)
def test_damaged_metrics_are_a_user_error(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json is not a metrics file"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_metrics_of_another_format_are_a_user_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics() | {"format": 2})
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        write_report(run)


def test_every_metric_and_region_of_the_project_is_explained() -> None:
    assert {label for label, *_ in report.definitions()} == {m.label for m in ALL_METRICS.values()}
    assert set(report.REGION_NAMES) == set(REGIONS)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def real_runs(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished run directories with the same start, other settings and other weights."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    start = save_weights(DepthAnythingV2("vitt", kind="metric", max_depth_m=10.0), folder / "start")
    runs = []
    for number, name in enumerate(("first", "second")):
        run = make_run(folder / name, metrics() | {"name": name}, history=True)
        path = tiny_sets.config(
            run,
            name=name,
            model__checkpoint=str(start[1]),
            model__max_depth_m=10.0,
            optim__lr=(number + 1) * 1e-4,
            data__val_share=0.4,
        )
        config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
        path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
        torch.manual_seed(number)
        model = DepthAnythingV2("vitt", kind="metric", max_depth_m=10.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.01 + number / 10
        save_weights(model, run / "weights" / "final")
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def exhibits(real_runs: list[Path]) -> Exhibits:
    return judge_runs(
        real_runs,
        weights="final",
        images=3,
        size=None,
        worst=1,
        device=torch.device("cpu"),
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module")
def side_by_side(
    real_runs: list[Path], exhibits: Exhibits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("page") / "two.html"
    return write_comparison(real_runs, out, exhibits)


def test_runs_are_judged_on_what_the_first_one_holds_out(
    real_runs: list[Path], exhibits: Exhibits
) -> None:
    config = run_config(str(real_runs[0] / "weights" / "final.safetensors"))
    assert config is not None
    corpus = open_corpus(config.data)
    (domain,) = exhibits.verdict.domains
    held = {subset.identity(i) for subset in corpus.val for i in range(len(subset))}
    assert len(domain.frames) == 3 and set(domain.frames) < held and list(domain.trained) == [0, 0]
    keys = {key for key, _ in domain.frames.values()}
    for region, shots in exhibits.worst.items():
        for number in range(2):
            scores = domain.scores[number].depth
            rows, values = scores.state()
            own = (rows[:, 1] == REGIONS.index(region)) & (rows[:, 2] >= 64)
            found = {shot.errors[number] for shot in shots}
            assert found <= set(values[own, 0].tolist())
        largest = [max(shot.errors) for shot in shots]
        assert largest == sorted(largest, reverse=True)
        assert all(shot.key in keys and shot.pasted == (region != "clean") for shot in shots)
        everyone = torch.maximum(*(s.depth.state()[1][own, 0] for s in domain.scores))
        assert largest[0] == everyone.max().item()


def test_a_shot_shows_the_figures_it_was_chosen_for(exhibits: Exhibits) -> None:
    """AbsRel from the kept pictures is that of the table, and truth is flat where it should be."""
    for region in ("clean", "mirror", "art", "background"):
        for shot in exhibits.worst.get(region, ()):
            inside = shot.valid
            if region != "clean":
                inside = inside & (shot.region == Region[region.upper()])
            for depth_m, error in zip(shot.depths_m, shot.errors, strict=True):
                truth = shot.truth_m[inside]
                found = np.mean(np.abs(np.clip(depth_m[inside], 0.1, 10) - truth) / truth)
                assert found == pytest.approx(error, rel=1e-4)
            flat = dataclasses.replace(shot, depths_m=[shot.truth_m]).relief(0)
            assert np.array_equal(np.isfinite(flat), shot.owner >= 0)
            assert not np.isfinite(flat).any() or np.nanmax(np.abs(flat)) < 1e-5


def test_point_clouds_keep_depth_colour_and_rays(exhibits: Exhibits) -> None:
    """Decoded as the script does it, every point projects onto its pixel at its depth."""
    shot = exhibits.clouds[0]
    cloud = json.loads(
        cloud_json(shot.image, {"t": shot.truth_m, "a": shot.depths_m[0]}, shot.K_px)
    )
    shape = (cloud["height"], cloud["width"])
    step, (first, _) = cloud["step"], cloud["first"]
    v, u = np.mgrid[: shape[0], : shape[1]] * step + first
    for name, depth_m in (("t", shot.truth_m), ("a", shot.depths_m[0])):
        codes = np.frombuffer(base64.b64decode(cloud["maps"][name]), "<u2").reshape(shape)
        expected = depth_m[int(first) :: step, int(first) :: step]
        assert np.array_equal(codes == 0, ~np.isfinite(expected))
        error = np.abs(codes * cloud["unit"] - np.nan_to_num(expected))
        assert error.max() <= 0.51 * cloud["unit"] and cloud["unit"] < 1e-3
    rays = np.reshape(cloud["inverse"], (3, 3)) @ np.stack([u, v, np.ones_like(u)]).reshape(3, -1)
    again = shot.K_px @ rays
    assert np.allclose(again[:2] / again[2], np.stack([u, v]).reshape(2, -1))
    rgb = np.frombuffer(base64.b64decode(cloud["rgb"]), np.uint8).reshape(*shape, 3)
    assert np.array_equal(rgb, shot.image[int(first) :: step, int(first) :: step])


def test_the_page_holds_every_figure_and_difference(side_by_side: Path, exhibits: Exhibits) -> None:
    page = Page(side_by_side.read_text("utf-8"))
    (domain,) = exhibits.verdict.domains
    judged = page.values[0]
    order = [region for region in report.REGION_NAMES if region in domain.tables[0]]
    expected = [[table[region]["abs_rel"].value for table in domain.tables] for region in order]
    expected.append([table["flat"]["illusion_gap"].value for table in domain.tables])
    assert judged == [[], *expected]
    settings = {row[0]: row[1:] for row in page.tables[1][1:]}
    assert settings["optim.lr"] == ["0.0001", "0.0002"] and settings["name"] == ["first", "second"]
    assert set(settings) == {"name", "runs", "optim.lr"}
    for sentence in (
        "rooms: 3 frames of 2 scenes",
        "picture resized to a shorter side of 56 px",
        "GPU memory, simulated",
        "Images per second (median)40.540.5",
        "Every metric in every region, with intervals",
    ):
        assert sentence in page.text, sentence


def test_the_page_in_a_browser(browser: Browser, side_by_side: Path) -> None:
    """No complaint, nothing loaded from elsewhere, every image there, clouds that turn."""
    browser.open(side_by_side)
    pictures = browser.run(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
    )
    shots = side_by_side.read_text().count("<figcaption>relief</figcaption>")
    assert shots > 0 and len(pictures) > 20 and min(pictures) > 0
    ink = (
        "[...document.querySelectorAll('canvas')].map(c => { const d = new Uint32Array("
        "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
        "return [d.filter(x => x).length / d.length, d.reduce((a, x) => (a * 31 + x) | 0, 0)]; })"
    )
    before = browser.run(ink)
    assert len(before) % 3 == 0 and len(before) >= 6
    assert min(share for share, _ in before) > 0.05
    assert len({digest for _, digest in before[:3]}) == 3
    browser.run("document.querySelector('button[data-view=above]').click()")
    after = browser.run(ink)
    assert [a != b for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] * (
        len(before) - 3
    )
    box = browser.run(
        "(() => { const c = document.querySelectorAll('canvas')[4]; c.scrollIntoView();"
        "const b = c.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    for kind, x in (("mousePressed", 0), ("mouseMoved", 60), ("mouseReleased", 60)):
        browser.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=box[0] + x,
            y=box[1],
            button="left",
            buttons=0 if kind == "mouseReleased" else 1,
            clickCount=1,
        )
    dragged = browser.run(ink)
    assert [a != b for a, b in zip(after, dragged, strict=True)][:6] == [False] * 3 + [True] * 3
    wide = browser.run("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    assert browser.complaints() == []
    assert browser.requests() <= {"file", "data", "chrome"}  # its own pages


def test_the_policy_stops_a_foreign_script(browser: Browser, side_by_side: Path) -> None:
    page = side_by_side.read_text("utf-8")
    other = side_by_side.with_name("other.html")
    other.write_text(page.replace("</main>", "<script>document.title = 'owned'</script></main>"))
    browser.open(other)
    assert browser.run("document.title").startswith("first · second")
    assert len(browser.complaints()) == 1


def test_one_run_by_the_command_line_and_without_weights(
    real_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "report.py"))["main"]
    out = tmp_path / "one.html"
    main([str(real_runs[0]), "--out", str(out), "--images=1", "--worst=1"])
    assert capsys.readouterr().out.strip() == str(out)
    page = Page(out.read_text("utf-8"))
    assert "rooms: 1 frames of 1 scenes" in page.text
    settings = {row[0]: row[1:] for row in page.tables[1][1:]}
    assert settings["optim.lr"] == ["5e-06", "0.0001"] and "paste.share" not in settings

    bare = make_run(tmp_path / "bare")
    main([str(bare)])
    text = Page((bare / "report.html").read_text("utf-8")).text
    assert "The weights were not judged again: " in text and "holds no weights" in text
    main([str(bare), "--no_judging"])
    text = (bare / "report.html").read_text("utf-8")
    assert "The weights were not judged again: it was not asked for" in text
    with pytest.raises(UserError, match=r"bare holds no weights/final\.safetensors"):
        main([str(real_runs[0]), str(bare), "--out", str(out)])
    with pytest.raises(UserError, match="--out: name the file to write"):
        main([str(bare), str(bare)])
    with pytest.raises(UserError, match="--worst: expected 0 to 100, got '-1'"):
        main([str(bare), "--worst=-1"])


def test_hostile_names_are_shown_and_never_obeyed_side_by_side(tmp_path: Path) -> None:
    record = metrics() | {"name": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    run = make_run(tmp_path / "run", record, history=True)
    (run / "config.yaml").write_text(f"x: '{HOSTILE.replace(chr(39), '')}'\n")
    (run / "pictures" / "0000_start.png").rename(run / "pictures" / "<b onclick=x>.png")
    other = make_run(tmp_path / "other")
    page = Page(write_comparison([run, other], tmp_path / "page.html", None).read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in a or "onclick" in a for _, a in page.tags)
    assert page.text.count(HOSTILE) >= 4


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "report.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )


def test_command_line_says_one_sentence_about_a_mistake(tmp_path: Path) -> None:
    done = command(str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
