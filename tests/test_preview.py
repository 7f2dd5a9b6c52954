"""The preview: the very batches of training, exact residuals, a readable sheet and page, errors."""

import base64
import dataclasses
import io
import re
import runpy
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import flatdepth.training.loop as loop
from flatdepth.augment.plan.appearance import Kind
from flatdepth.cli import parse_config
from flatdepth.commands.preview import config_arguments
from flatdepth.config import PasteStage, TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, training_samples
from flatdepth.errors import UserError
from flatdepth.geometry import edge_lines, pixel_rays, project
from flatdepth.report.preview import (
    COLUMN_NAMES,
    Row,
    Seen,
    colour_residual,
    plane_residual,
    preview_page,
    preview_rows,
    preview_sheet,
    seen_batches,
)
from flatdepth.show.pictures import UNKNOWN_COLOUR
from flatdepth.types import Batch, Region
from tests.conftest import REPOSITORY, TinySets

CPU = torch.device("cpu")
K = np.array([[90.0, 0.0, 35.0], [0.0, 95.0, 28.0], [0.0, 0.0, 1.0]])
PASTED = {
    "share": 1.0,
    "max_pastes": 3,
    "area": [0.05, 0.3],
    "max_area": 0.8,
    "layout": {"hung": 0.3, "standing": 0.7},
    "content": {"opening": 0, "empty": 0},
    "shape": {"rounded": 0, "ellipse": 0, "arch": 0, "polygon": 0},
}


def read_config(path: Path, *overrides: str) -> TrainConfig:
    return parse_config(
        TrainConfig, [f"--config={path}", *overrides], prog="preview.py", description=None
    )


def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the preview.py command."""
    monkeypatch.setattr(sys, "argv", ["preview.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "tools" / "preview.py"), run_name="__main__")
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def assert_same_batch(ours: Batch, theirs: Batch) -> None:
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def take(config: TrainConfig, step: int, count: int) -> list[Seen]:
    batches = seen_batches(config, step)
    seen = list(islice(batches, count))
    batches.close()
    return seen


@pytest.fixture(scope="module")
def config(tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return read_config(tiny_sets.config(tmp_path_factory.mktemp("preview"), paste=PASTED))


@pytest.fixture(scope="module")
def rows(config: TrainConfig) -> list[Row]:
    return preview_rows(config, 0, 12)


@pytest.fixture(scope="module")
def trained(
    tiny_sets: TinySets, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Batch]]:
    """The directory of a finished run, and every batch that its model was trained on."""
    path = tiny_sets.config(
        tmp_path_factory.mktemp("replayed"),
        paste={**PASTED, "share": 0.0, "stages": [{"step": 1, "share": 1.0}]},
        steps=3,
        save_every=3,
        eval={"images": 1, "pictures": 1},
    )
    batches: list[Batch] = []

    def spy(samples: list[Sample], config: TrainConfig, device: torch.device, *enter: Any) -> Batch:
        assert device == CPU
        batches.append(spied(samples, config, device, *enter))
        return batches[-1]

    spied = loop.make_training_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(loop, "make_training_batch", spy)
        loop.train(read_config(path))
    assert len(batches) == 6
    return path.parent / "runs" / "tiny", batches


def test_a_step_is_shown_bit_for_bit_whatever_the_devices_and_threads(config: TrainConfig) -> None:
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=1))
    ours = [seen.batch for seen in take(config, 4, 4)]
    stream = training_samples(
        open_corpus(other.data), other, first_step=4, rank=0, ranks=1, accumulation=2
    )
    for batch, samples in zip(ours, stream, strict=False):
        assert_same_batch(batch, loop.make_training_batch(samples, other, CPU))
    stream.close()

    # the images of step 4, whose batch is 4, on two devices of micro-batch 2
    for rank in (0, 1):
        stream = training_samples(
            open_corpus(other.data), other, first_step=4, rank=rank, ranks=2, accumulation=1
        )
        assert_same_batch(ours[rank], loop.make_training_batch(next(stream), other, CPU))
        stream.close()


def test_a_finished_run_is_replayed_bit_for_bit(trained: tuple[Path, list[Batch]]) -> None:
    run, batches = trained
    config = read_config(run / "config.yaml")
    for step in (0, 1, 2):
        seen = take(config, step, 2)
        assert [one.step for one in seen] == [step, step]
        for one, batch in zip(seen, batches[2 * step : 2 * step + 2], strict=True):
            assert_same_batch(one.batch, batch)
    assert all((one.owner == -1).all() for one in take(config, 0, 2))
    assert any((one.owner >= 0).any() for one in take(config, 1, 2))


def test_rows_run_over_steps(config: TrainConfig, rows: list[Row]) -> None:
    assert [row.step for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row.step for row in preview_rows(config, 1, 3)] == [1, 1, 1]
    alone = preview_rows(config, 1, None)
    assert [row.sample.frame.key for row in alone] == [row.sample.frame.key for row in rows[4:8]]
    assert np.array_equal(alone[0].image, rows[4].image)


def test_each_pixel_belongs_to_the_topmost_paste_there(rows: list[Row]) -> None:
    overlapping = 0
    for row in rows:
        assert np.array_equal(row.owner >= 0, row.region != Region.BACKGROUND)
        height, width = row.owner.shape
        v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
        K_px = row.sample.view.intrinsics(row.sample.frame.K_px)
        outlines = [project(K_px, paste.rectangle.corners()) for paste in row.sample.plan]
        distances = [(pixels @ edge_lines(corners).T).min(axis=-1) for corners in outlines]
        standing = [paste.layout == "standing" for paste in row.sample.plan]
        for number, distance in enumerate(distances):
            assert (distance[row.owner == number] > -1e-3).all()
            above = [other for other in range(number + 1, len(distances)) if standing[other]]
            for other in above:
                overlapping += int(((distance > 0) & (distances[other] > 0)).sum())
                assert not (row.owner[distances[other] > 1e-3] == number).any()
    assert overlapping > 0


def test_pastes_are_flat_to_rounding_and_a_bent_one_is_not(rows: list[Row]) -> None:
    pasted = [row for row in rows if row.sample.plan]
    assert len(pasted) >= 8
    for row in pasted:
        assert row.worst() < 1e-5
        assert np.array_equal(np.isfinite(row.residual), (row.owner >= 0) & ~np.isnan(row.depth_m))

    row = max(pasted, key=lambda row: int((row.owner == 0).sum()))
    column = np.nonzero(row.owner == 0)[1]
    across = (np.arange(row.owner.shape[1]) - column.mean()) / (np.ptp(column) / 2)
    bent_m = np.where(row.owner == 0, row.depth_m * (1 + 0.01 * across**2), row.depth_m)
    K_px = row.sample.view.intrinsics(row.sample.frame.K_px)
    known = np.isfinite(row.depth_m)
    bent = np.abs(plane_residual(bent_m.astype(np.float32), known, row.owner, K_px))
    assert np.nanmax(bent[row.owner == 0]) > 2e-3
    assert np.nanmax(bent[row.owner > 0], initial=0) < 1e-5


def test_a_paste_seen_through_an_empty_frame_keeps_its_pixels_and_its_plane(
    tiny_sets: TinySets, tmp_path: Path
) -> None:
    pasted = {**PASTED, "content": {"opening": 0, "empty": 2, "mural": 0, "screen": 0}}
    path = tiny_sets.config(tmp_path, paste={**pasted, "layout": {"hung": 0, "standing": 1}})
    through = 0
    for row in preview_rows(read_config(path), 0, 24):
        empty = np.array([one.kind is Kind.EMPTY for one in row.sample.plan] + [False])
        flat = (row.region != Region.BACKGROUND) & (row.region != Region.DECOY)
        assert np.array_equal(row.owner >= 0, row.region != Region.BACKGROUND)
        assert empty[row.owner[row.region == Region.DECOY]].all()
        assert not row.worst() >= 1e-5
        outlines = [
            project(row.sample.view.intrinsics(row.sample.frame.K_px), paste.rectangle.corners())
            for paste in row.sample.plan
        ]
        v, u = np.meshgrid(*(np.arange(n) + 0.5 for n in row.owner.shape), indexing="ij")
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
        for number in np.nonzero(empty)[0]:
            inside = (pixels @ edge_lines(outlines[number]).T).min(axis=-1) > 0
            through += int((inside & flat & (row.owner < number)).sum())
    assert through > 100


@given(st.integers(0, 10**6))
def test_the_residual_is_zero_on_planes_and_half_of_a_step(seed: int) -> None:
    """Two pastes on planes of their own; then one half of the second is 1 % nearer.

    No affine function follows a step, so its best fit misses one of the sides by half of it.
    """
    rng = np.random.default_rng(seed)
    v, u = np.meshgrid(np.arange(56) + 0.5, np.arange(70) + 0.5, indexing="ij")
    rays = pixel_rays(K, u, v)
    planes = np.array([0, 0, 1]) + rng.uniform(-0.8, 0.8, (2, 3)) * [1, 1, 0.5]
    owner = np.full((56, 70), -1)
    owner[5:30, 4:30], owner[20:50, 35:65] = 0, 1
    inverse = (rays * planes[owner]).sum(axis=-1)
    valid = rng.random((56, 70)) > 0.2
    residual = plane_residual((1 / inverse).astype(np.float32), valid, owner, K)
    assert np.array_equal(np.isfinite(residual), valid & (owner >= 0))
    assert np.nanmax(np.abs(residual)) < 3e-7

    inverse[:, 50:] *= 1.01
    residual = np.abs(plane_residual((1 / inverse).astype(np.float32), valid, owner, K))
    assert np.nanmax(residual[owner == 0]) < 3e-7
    assert 0.004 < np.nanmax(residual[owner == 1]) < 0.02


def test_a_virtual_image_is_not_asked_to_be_flat(config: TrainConfig) -> None:
    paste = dataclasses.replace(config.paste, mirror_target="virtual")
    rows = preview_rows(dataclasses.replace(config, paste=paste), 0, 12)
    seen = 0
    for row in rows:
        mirror = row.region == Region.MIRROR
        planar = (row.owner >= 0) & ~mirror & ~np.isnan(row.depth_m)
        assert np.array_equal(np.isfinite(row.residual), planar)
        assert not planar.any() or row.worst() < 1e-5
        seen += int((mirror & ~np.isnan(row.depth_m)).sum())
    assert seen > 1000


def test_residual_colours() -> None:
    residual = np.array([[np.nan, 0.0, -1e-4, 1.0, 5e-5, -5e-5]])
    unknown, zero, limit, beyond, half, other_half = colour_residual(residual, 1e-4)[0].tolist()
    assert tuple(unknown) == UNKNOWN_COLOUR
    assert sum(zero) < 15 < sum(half) < sum(limit)
    assert limit == beyond
    assert half == other_half


def test_a_panel_of_the_sheet_is_the_image_itself(tiny_sets: TinySets, tmp_path: Path) -> None:
    large = {"height": 196, "width": 266}
    path = tiny_sets.config(tmp_path)
    config = read_config(path, *(f"--data.{key}={value}" for key, value in large.items()))
    rows = preview_rows(config, 0, 2)
    sheet = np.asarray(preview_sheet(rows, config))
    for row in rows:
        found = [line.tobytes().find(row.image[0].tobytes()) for line in sheet]
        top = next(number for number, start in enumerate(found) if start >= 0)
        left = found[top] // 3
        assert np.array_equal(sheet[top : top + 196, left : left + 266], row.image)


def test_titles_say_what_is_shown(config: TrainConfig, rows: list[Row]) -> None:
    row = next(row for row in rows if len(row.sample.plan) == 2)
    first, second, third = row.title().splitlines()
    assert first == f"rooms {row.sample.frame.key}"
    assert second == ", ".join(f"{p.layout} {p.kind.value}" for p in row.sample.plan)
    assert re.fullmatch(r"max \d\.\de-0\d", third)
    stages = [PasteStage(step=3, share=1.0)]
    later = dataclasses.replace(
        config, paste=dataclasses.replace(config.paste, share=0.0, stages=stages)
    )
    clean = preview_rows(later, 2, 1)[0]
    assert clean.title().endswith("clean")
    assert np.isnan(clean.worst())
    assert "step 2, seed 0 (no pastes at this step)" in preview_page([clean], later)
    assert "a clean image" in preview_page([clean], later)


def test_the_page_holds_every_panel_without_loss(config: TrainConfig, rows: list[Row]) -> None:
    page = preview_page(rows, config)
    assert page == preview_page(rows, config)
    assert page.count('<section class="card">') == len(rows)
    assert page.count("<tbody><tr>") == sum(bool(row.sample.plan) for row in rows)
    assert page.count('<tr><th scope="row">') == sum(len(row.sample.plan) for row in rows)
    encoded = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    panels = [panel for row in rows for panel in row.panels()]
    assert len(encoded) == len(panels) == len(rows) * len(COLUMN_NAMES)
    for data, panel in zip(encoded, panels, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), panel)


def test_the_page_loads_nothing_and_runs_nothing(config: TrainConfig, rows: list[Row]) -> None:
    hostile = '"><script src=https://example.org/x.js></script>'
    frame = dataclasses.replace(rows[0].sample.frame, key=hostile, dataset=hostile, scene=hostile)
    row = dataclasses.replace(rows[0], sample=dataclasses.replace(rows[0].sample, frame=frame))
    page = preview_page([row], dataclasses.replace(config, name="<script>"))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "&lt;script src=https://example.org/x.js&gt;" in page


def test_the_tool_writes_a_sheet_and_a_page(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny_sets.config(tmp_path)
    out, html = tmp_path / "new" / "sheet.png", tmp_path / "page.html"
    overrides = ("--seed", "3", "--paste.share=1", "--batch", 6)
    code, said, errors = run_tool(
        monkeypatch,
        capsys,
        *("--config", path, "--step", 1, "--out", out, "--html", html, *overrides),
    )
    assert (code, said.split(), errors) == (0, [str(out), str(html)], "")
    expected = read_config(path, "--seed=3", "--paste.share=1", "--batch=6")
    rows = preview_rows(expected, 1, None)
    assert html.read_text("utf-8") == preview_page(rows, expected)
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(preview_sheet(rows, expected)))


def test_the_tool_replays_a_run(
    trained: tuple[Path, list[Batch]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, batches = trained
    html = tmp_path / "page.html"
    code, _, errors = run_tool(
        monkeypatch, capsys, "--replay", run, "--step", 2, "--html", html, "--rows", 1
    )
    assert (code, errors) == (0, "")
    data = re.findall(r'src="data:image/webp;base64,([^"]+)"', html.read_text("utf-8"))[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        shown = np.asarray(image.convert("RGB")).astype(np.float64) / 255
    seen = batches[4].image[0].movedim(0, -1).numpy()
    assert np.abs(shown - seen).max() <= 0.5 / 255 + 1e-6


def test_without_a_config_it_is_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (argument,) = config_arguments(None, [])
    assert argument == f"--config={REPOSITORY / 'configs' / 'quickstart.yaml'}"
    code, said, _ = run_tool(monkeypatch, capsys, "--help")
    assert code == 0
    assert "--replay RUN" in said and "--paste.share" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a contact sheet with --out or a page with --html"),
        (["--out", "sheet.jpg"], "--out: expected a name that ends in .png, got sheet.jpg"),
        (["--html", "."], "--html: . is a directory; give the name of a file to write"),
        (["--out"], "argument --out: expected one argument; see python "),
        (["--out=x.png", "--rows=0"], "--rows: expected 1 to 1000, got '0'"),
        (["--out=x.png", "--rows=two"], "argument --rows: expected 1 to 1000, got 'two'"),
        (["--out=x.png", "--step=6"], "--step: expected 0 to 5 (steps: 6, counted from 0), got 6"),
        (["--out=x.png", "--step=-1"], "--step: expected 0 to 1000000000, got '-1'"),
        (["--out=x.png", "--paste.shre=1"], "did you mean 'paste.share'?"),
        (["--out=x.png", "--row=2"], "--row"),
        (["--out=x.png", "--data.train=[]"], "data.train: expected at least one shard set"),
        (["--out=x.png", "--replay=nowhere"], "--replay: nowhere holds no config.yaml"),
        (["--out=x.png", "--replay=."], "--replay: expected no other configuration, got --config"),
    ],
)
def test_mistakes_are_one_sentence_with_exit_code_2(
    tiny_sets: TinySets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    path = tiny_sets.config(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, said, errors = run_tool(monkeypatch, capsys, f"--config={path}", *arguments)
    assert (code, said) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "x.png").exists()


def test_the_data_of_a_run_must_still_be_there(tiny_sets: TinySets, tmp_path: Path) -> None:
    path = tiny_sets.config(tmp_path, data={"train": [{"path": str(tmp_path / "gone")}]})
    with pytest.raises(UserError, match="gone"):
        preview_rows(read_config(path), 0, 1)
