"""tools/evaluate.py: figures against direct sums, rows that reproduce them, modes and mistakes."""

import json
import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatdepth.augment.draw.composite import paste
from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, to_device
from flatdepth.data.shards.codec import decode_frame
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.judge.boundaries import boundary_f1
from flatdepth.judge.metrics import image_metrics, region_masks
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import Request, load_sample, open_pictures, open_subsets, paste_owner
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import Kind
from flatdepth.types import METRICS, Batch, Region
from tests.conftest import REPOSITORY, TinySets

RANGE_M = PROTOCOLS["none"].range_m
FRAMES, SCENES = 15, 5
PASTED = range(0, FRAMES, 2)


def weights(folder: Path, seed: int, kind: Kind = "metric", name: str = "") -> str:
    """A file of random weights; the head's gain is raised so that pictures differ."""
    torch.manual_seed(seed)
    model = DepthAnythingV2("vitt", kind=kind, max_depth_m=10.0)
    return str(save_weights(model, folder / (name or f"{kind}{seed}"))[1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        "a": weights(folder, 0),
        "b": weights(folder, 1),
        "relative": weights(folder, 2, "relative"),
    }


Evaluate = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def evaluate(tiny_sets: TinySets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run the tool on the tiny rooms; gives eval.json and what stands on the terminal."""
    main = runpy.run_path(str(REPOSITORY / "tools" / "evaluate.py"))["main"]

    def run(*arguments: str, data: Path = tiny_sets.rooms) -> tuple[dict[str, Any], str]:
        out = tmp_path / "eval.json"
        common = [f"--data={data}", f"--art={tiny_sets.pictures}", f"--out={out}", "--overwrite"]
        main([*common, "--size=84", "--bootstrap=200", *arguments])
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_clean_figures_are_the_direct_means(
    evaluate: Evaluate, tiny_sets: TinySets, checkpoints: dict[str, str]
) -> None:
    """At 84 x 112 px nothing is resized: model(image) against depth, frame by frame."""
    document, text = evaluate("--checkpoint", checkpoints["a"])
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=10.0).eval()
    shards = ShardSet.open(tiny_sets.rooms)
    rows: list[list[float]] = []
    edges: list[float] = []
    for i in range(len(shards)):
        frame = decode_frame(shards.read(i))
        image = torch.from_numpy(frame.image).movedim(-1, 0)[None].float() / 255
        depth = torch.from_numpy(frame.depth_m)[None, None]
        valid = depth.isfinite() & (depth >= RANGE_M[0]) & (depth <= RANGE_M[1])
        with torch.no_grad():
            prediction = model(image)
        values, _ = image_metrics(prediction, depth, valid, min_m=RANGE_M[0], max_m=RANGE_M[1])
        rows.append(values[0].tolist())
        score, pairs = boundary_f1(prediction, depth, valid, min_m=RANGE_M[0], max_m=RANGE_M[1])
        edges += [score.item()] if pairs.item() >= 64 else []
    clean = document["datasets"][0]["tables"]["A"]["clean"]
    for metric, column in zip(METRICS, zip(*rows, strict=True), strict=True):
        assert clean[metric]["value"] == pytest.approx(np.mean(column), rel=1e-4), metric
        assert clean[metric]["count"] == FRAMES
        low, high = clean[metric]["interval"]
        assert low <= clean[metric]["value"] <= high
    assert clean["boundary_f1"]["value"] == pytest.approx(np.mean(edges), rel=1e-4)
    assert clean["boundary_f1"]["count"] == len(edges) > 0
    assert f"rooms: {FRAMES} frames of {SCENES} scenes, compared at 84 x 112" in text
    assert "protocol none: no crop; true depth of 0.001 to 80 m" in text
    assert "no alignment (metric); metric, domain not known" in text


def test_every_figure_can_be_computed_from_the_rows(
    evaluate: Evaluate, checkpoints: dict[str, str]
) -> None:
    document, text = evaluate("--checkpoint", checkpoints["a"], "--paste=1")
    dataset = document["datasets"][0]
    rows, table = dataset["rows"]["A"], dataset["tables"]["A"]
    assert {frame["frame"] for frame in dataset["frames"]} == set(range(FRAMES))
    assert {"clean", "background", "flat"} < set(table)
    means: dict[str, dict[str, float]] = {}
    for part in ("depth", "ssim", "boundary", "planes"):
        columns = rows[part]["columns"]
        for region in table:
            kept = [row for row in rows[part]["rows"] if row[1] == region and row[2] >= 64]
            for index, metric in enumerate(columns[3:], start=3):
                if kept:
                    mean = math.fsum(row[index] for row in kept) / len(kept)
                    means.setdefault(region, {})[metric] = mean
    means["flat"]["illusion_gap"] = means["flat"]["abs_rel"] / means["background"]["abs_rel"]
    found = {r: {m: figure["value"] for m, figure in row.items()} for r, row in table.items()}
    assert found == means
    assert {"flatness_residual", "plane_normal_angle_deg", "ssim"} <= set(found["flat"])
    assert [r for r in found if "boundary_f1" in found[r]] == ["clean"]
    for region in table:
        assert f"\n{region} (" in text
    assert document["paste_seed"] == 1 and document["command"][:2] == ["flatdepth", "evaluate"]


def test_a_checkpoint_beside_itself_and_another(
    evaluate: Evaluate, checkpoints: dict[str, str]
) -> None:
    same = checkpoints["a"]
    document, text = evaluate(
        *("--checkpoint", same, "--checkpoint", same, "--checkpoint", checkpoints["b"]),
        *("--paste=1", "--images=4"),
    )
    dataset = document["datasets"][0]
    assert dataset["tables"]["A"] == dataset["tables"]["B"] != dataset["tables"]["C"]
    for row in dataset["differences"]["B - A"].values():
        assert all(f["value"] == 0 and f["interval"] in (None, [0, 0]) for f in row.values())
    difference = dataset["differences"]["C - A"]["clean"]["abs_rel"]["value"]
    tables = dataset["tables"]
    expected = tables["C"]["clean"]["abs_rel"]["value"] - tables["A"]["clean"]["abs_rel"]["value"]
    assert difference == pytest.approx(expected, abs=1e-15)
    assert "C - A" in text


def test_the_same_command_gives_the_same_bytes_and_batches_do_not_matter(
    evaluate: Evaluate, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("--checkpoint", checkpoints["a"], "--paste=3", "--images=4")
    evaluate(*arguments)
    first = (tmp_path / "eval.json").read_bytes()
    evaluate(*arguments)
    assert (tmp_path / "eval.json").read_bytes() == first
    one = json.loads(first)["datasets"][0]["tables"]["A"]
    other = evaluate(*arguments, "--batch=3", "--threads=1")[0]["datasets"][0]["tables"]["A"]
    assert one.keys() == other.keys()
    for region, row in one.items():
        for metric, figure in row.items():
            assert other[region][metric]["value"] == pytest.approx(figure["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "modes", "alignment"),
    [
        ("a", ["--trained_on=hypersim,rooms"], "metric, in-domain", "no alignment (metric)"),
        ("a", ["--trained_on="], "metric, zero-shot", "no alignment (metric)"),
        (
            "relative",
            ["--trained_on=rooms", "--fit=robust"],
            "relative, in-domain",
            "scale and shift in inverse depth by least absolute deviations",
        ),
        (
            "relative",
            ["--trained_on=nyu"],
            "relative, zero-shot",
            "scale and shift in inverse depth by least squares",
        ),
        ("a", ["--align=median"], "relative, domain not known", "scaled by the ratio of medians"),
    ],
)
def test_modes_and_alignment_stand_with_the_figures(
    evaluate: Evaluate,
    checkpoints: dict[str, str],
    checkpoint: str,
    arguments: list[str],
    modes: str,
    alignment: str,
) -> None:
    document, text = evaluate("--checkpoint", checkpoints[checkpoint], "--images=1", *arguments)
    assert document["datasets"][0]["modes"] == {"A": modes}
    assert f"{alignment}; {modes}" in text


def test_alignments_beside_each_other(evaluate: Evaluate, checkpoints: dict[str, str]) -> None:
    """What an alignment minimises or keeps is seen in the figures."""
    names = ["metric", "median", "scale", "scale-shift-depth", "scale-shift-inverse"]
    document, _ = evaluate(
        *("--checkpoint", checkpoints["a"], "--images=3"), *(f"--align={name}" for name in names)
    )
    assert [c["alignment"] for c in document["contenders"]] == names
    clean = {
        name: {m: f["value"] for m, f in table["clean"].items()}
        for name, table in zip(names, document["datasets"][0]["tables"].values(), strict=True)
    }
    assert clean["scale"]["rmse"] < clean["metric"]["rmse"]
    assert clean["scale-shift-depth"]["rmse"] <= clean["scale"]["rmse"] * (1 + 1e-9)
    assert clean["median"]["silog"] == pytest.approx(clean["metric"]["silog"], rel=1e-5)


def test_one_scene_has_no_intervals(evaluate: Evaluate, checkpoints: dict[str, str]) -> None:
    document, text = evaluate("--checkpoint", checkpoints["a"], "--images=1", "--range", "0.2", "9")
    row = document["datasets"][0]["tables"]["A"]["clean"]
    assert {json.dumps(figure["interval"]) for figure in row.values()} == {"null"}
    assert "one scene, so there are no intervals" in text
    assert "true depth of 0.2 to 9 m" in text


def test_a_run_says_its_size_its_data_and_what_it_was_trained_on(
    evaluate: Evaluate,
    tiny_sets: TinySets,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    path = tiny_sets.config(run)
    config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    trained = len(open_corpus(config.data).train[0])
    file = weights(run / "weights", 0, name="final")
    main = runpy.run_path(str(REPOSITORY / "tools" / "evaluate.py"))["main"]
    out = tmp_path / "all.json"
    main(["--checkpoint", file, "--data", str(tiny_sets.rooms), "--out", str(out)])
    document = json.loads(out.read_text())
    dataset = document["datasets"][0]
    assert document["size"] == 56 and dataset["sizes"][0]["network"] == [56, 70]
    assert dataset["modes"] == {"A": "metric, in-domain"}
    assert dataset["trained_frames"] == {"A": trained}
    assert f"was trained on {trained} of these {FRAMES} frames" in capsys.readouterr().out
    document, text = evaluate("--checkpoint", file, "--part=val")
    dataset = document["datasets"][0]
    assert dataset["trained_frames"] == {"A": 0} and "was trained on" not in text
    assert len(dataset["frames"]) == FRAMES - trained


@pytest.fixture(scope="module")
def pasted(tiny_sets: TinySets) -> list[tuple[Sample, Batch]]:
    """Every second tiny frame as the tool pastes into it."""
    request = Request(
        checkpoints=(),
        kinds=(),
        max_depths_m=(),
        trained_on=(),
        data=(str(tiny_sets.rooms),),
        protocol=PROTOCOLS["none"],
        paste_seed=1,
    )
    (subset,) = open_subsets(request.data, "all")
    pictures = open_pictures([str(tiny_sets.pictures)])
    samples = [load_sample(request, subset, i, pictures, pasted=True) for i in PASTED]
    return [(sample, made(sample)) for sample in samples]


def made(sample: Sample) -> Batch:
    batch, plans, _ = to_device([sample], torch.device("cpu"), depth_range_m=RANGE_M)
    return paste(batch, plans, depth_range_m=RANGE_M)


def test_pastes_are_told_apart(pasted: list[tuple[Sample, Batch]]) -> None:
    """Every flat pixel belongs to the last paste that reaches it when it is pasted alone."""
    several = 0
    for sample, batch in pasted:
        expected = torch.full_like(batch.region, -1, dtype=torch.int64)
        for number in range(len(sample.plan)):
            one = slice(number, number + 1)
            alone = replace(sample, plan=sample.plan[one], contents=sample.contents[one])
            expected[made(alone).region != Region.BACKGROUND] = number
        flat = batch.valid & ((batch.region == Region.MIRROR) | (batch.region == Region.ART))
        owner = paste_owner(batch.depth_m, batch.K_px, sample.plan)
        assert (owner[flat] == expected[flat]).all()
        several += len(expected[flat].unique()) > 1
    assert several


def test_decoys_are_a_region_of_their_own(pasted: list[tuple[Sample, Batch]]) -> None:
    """Inside openings and empty frames truth is not the plane, and no flat figure counts them."""
    seen = 0
    for sample, batch in pasted:
        masks = region_masks(batch.region, batch.valid, flat_known=True)
        parts = [masks[r.name.lower()] for r in Region]
        assert (sum(part.int() for part in parts) == batch.valid.int()).all()
        decoy = masks["decoy"]
        if not decoy.any():
            continue
        seen += 1
        assert any(one.kind.is_decoy for one in sample.plan)
        assert not (decoy & (masks["flat"] | masks["background"])).any()
        owner = paste_owner(batch.depth_m, batch.K_px, sample.plan)
        assert (owner[decoy] == -1).double().mean() > 0.95
    assert seen


def test_mistakes_are_one_sentence(
    evaluate: Evaluate, checkpoints: dict[str, str], tiny_sets: TinySets, tmp_path: Path
) -> None:
    a, relative = checkpoints["a"], checkpoints["relative"]
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(Path(a).with_suffix(".pth"), weights_only=True), bare)
    cases = [
        (["--checkpoint", str(bare)], "bare.pth does not say its kind"),
        (["--checkpoint", str(tmp_path / "none.pth")], "none.pth"),
        (["--checkpoint", a, "--protocol=nyu-eigen"], "expected frames of 480 x 640 px"),
        (["--checkpoint", a, "--protocol=kitti"], "--protocol: invalid choice"),
        (["--checkpoint", relative, "--align=median"], "inverse depth up to scale and shift"),
        (["--checkpoint", a, "--part=test"], "has no samples marked test"),
        (["--checkpoint", a, "--size=100"], "--size: expected a positive multiple of 14, got 100"),
        (["--checkpoint", a, "--range", "5", "2"], "--range: expected 0 < NEAR < FAR"),
        (["--checkpoint", a, "--batch=0"], "--batch: expected 1 to 1024, got 0"),
        (["--checkpoint", a, *["--kind=metric"] * 3], "--kind: expected once, or once for each"),
        (["--checkpoint", a, f"--data={tiny_sets.pictures}"], "expected a set of kind 'depth'"),
        (["--checkpoint", a, "--paste=1", f"--art={tiny_sets.rooms}"], "kind 'art'"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError) as caught:
            evaluate(*arguments)
        assert message in str(caught.value), arguments
        assert "\n" not in str(caught.value)


def test_nothing_is_overwritten_unasked(
    checkpoints: dict[str, str], tiny_sets: TinySets, tmp_path: Path
) -> None:
    main = runpy.run_path(str(REPOSITORY / "tools" / "evaluate.py"))["main"]
    out = tmp_path / "eval.json"
    command = ["--checkpoint", checkpoints["a"], "--data", str(tiny_sets.rooms), "--images=1"]
    command += ["--size=84", "--out", str(out)]
    out.write_text('{"my": "notes"}')
    for extra in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="is no evaluation; choose another name"):
            main([*command, *extra])
    assert out.read_text() == '{"my": "notes"}'
    out.unlink()
    main(command)
    with pytest.raises(UserError, match=r"an earlier evaluation; .* add --overwrite"):
        main(command)
    main([*command, "--overwrite"])
    with pytest.raises(UserError, match="is a directory"):
        main([*command[:-1], str(tmp_path)])
    with pytest.raises(UserError, match="does not exist; make it first"):
        main([*command[:-1], str(tmp_path / "missing" / "eval.json")])
