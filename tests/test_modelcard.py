"""The model card: header, recipe, figures and their protocol, licences, damaged runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import flatdepth
from flatdepth.config import DataConfig, ModelConfig, SetConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.models.card import model_card, read_run, write_model_card
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.types import METRICS_FORMAT as FORMAT

OFFICIAL = "depth-anything/Depth-Anything-V2-Metric-Hypersim-Small/depth_anything_v2_metric.pth"


def said(encoder: str = "vits", **more: str) -> dict[str, str]:
    metadata = {"format": "flatdepth", "encoder": encoder, "kind": "metric", "units": "m"}
    return {**metadata, "max_depth_m": "20.0", "version": flatdepth.__version__, **more}


def figures(abs_rel: float, delta1: float, images: int) -> dict[str, Any]:
    return {"abs_rel": abs_rel, "delta1": delta1, "images": images}


def write_run(folder: Path, checkpoint: str | None = OFFICIAL, encoder: str = "vits") -> Path:
    """The two files of a finished run of 400 steps, as training writes them."""
    config = TrainConfig(
        name="mirrors",
        steps=400,
        data=DataConfig(
            train=[SetConfig(path="/home/someone/data/rooms")], art=["/home/someone/pictures"]
        ),
        model=ModelConfig(encoder=encoder, checkpoint=checkpoint),
    )
    run = folder / "mirrors"
    run.mkdir(parents=True)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    (run / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    evaluations = [
        {
            "step": step, "label": label, "illusion_gap": gap,
            "table": {"flat": figures(flat, 0.5, 48), "clean": figures(clean, 0.9, 96)},
        }
        for step, label, gap, flat, clean in (
            (0, "start", 2.25, 0.4321, 0.1234), (400, "end", 1.5, 0.2468, 0.1235)
        )
    ]  # fmt: skip
    metrics = {
        "format": FORMAT, "name": "mirrors", "finished": True, "device": "one fast card",
        "protocol": "metric depth, no alignment, 0.1 to 20 m", "versions": {"torch": "2.15"},
        "evaluations": evaluations,
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def header(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(front)
    return parsed


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def card(tmp_path: Path) -> str:
    record = read_run(write_run(tmp_path))
    return model_card("final", said(run="mirrors", step="400"), run=record, layout="files")


def test_figures_stand_with_their_protocol(card: str) -> None:
    text = section(card, "Figures")
    assert "Protocol: metric depth, no alignment, 0.1 to 20 m." in text
    assert "| mirrors and art | 48 | 0.432 | 0.247 | 0.500 | 0.500 |" in text
    assert "| clean images | 96 | 0.123 | 0.123 | 0.900 | 0.900 |" in text
    assert "2.25 before, 1.50 after" in text
    assert "photographs of real mirrors" in text


def test_data_and_recipe_are_listed(card: str) -> None:
    """Nested settings too."""
    text = section(card, "Data and recipe")
    assert "Trained on `rooms`; pictures hung from `pictures`" in text
    assert f"started from `{OFFICIAL}`" in text
    for setting in ("steps 400", "lr 5e-06", "crop 0.7 to 1", "content (mirror 1, art 1, mural 0.3",
                    "lora_rank 0", "frozen_blocks 0", "hue 10"):  # fmt: skip
        assert setting in text, setting
    assert "flatdepth train --config config.yaml" in text


def test_no_local_path_is_published(card: str) -> None:
    assert "someone" not in card
    assert "/home" not in card


def test_the_header_is_what_the_hub_reads(card: str) -> None:
    assert {key: value for key, value in header(card).items() if key != "model-index"} == {
        "license": "apache-2.0",
        "pipeline_tag": "depth-estimation",
        "library_name": "flatdepth",
        "tags": ["depth-anything-v2", "monocular-depth", "flatdepth", "metric"],
        "base_model": "depth-anything/Depth-Anything-V2-Metric-Hypersim-Small",
    }
    for_hub = model_card("hf", said(), run=None, layout="transformers")
    assert header(for_hub)["library_name"] == "transformers"
    assert 'AutoModelForDepthEstimation.from_pretrained("hf")' in for_hub
    assert "open_model" in card


def test_the_model_index_holds_the_figures_of_these_weights(card: str, tmp_path: Path) -> None:
    """As the Hub's own library reads them back from a file, without a network."""
    path = tmp_path / "README.md"
    path.write_text(card, "utf-8")
    data = ModelCard.load(path).data
    assert data.model_name == "mirrors, final"
    found = {}
    for result in data.eval_results:
        assert (result.task_type, result.dataset_name) == ("depth-estimation", "rooms")
        found[result.dataset_config, result.metric_type] = (result.metric_name, result.metric_value)
    assert found == {
        ("flat", "abs_rel"): ("AbsRel on mirrors and art", 0.2468),
        ("flat", "delta1"): ("δ < 1.25 on mirrors and art", 0.5),
        ("clean", "abs_rel"): ("AbsRel on clean images", 0.1235),
        ("clean", "delta1"): ("δ < 1.25 on clean images", 0.9),
    }


@pytest.mark.parametrize(
    ("encoder", "checkpoint", "licence", "words"),
    [
        ("vits", OFFICIAL, "apache-2.0", "V2 Small weights are Apache-2.0"),
        ("vitb", OFFICIAL, "cc-by-nc-4.0", "V2 Base weights are CC-BY-NC-4.0"),
        ("vitl", "/local/start.pth", "cc-by-nc-4.0", "V2 Large weights are CC-BY-NC-4.0"),
        ("vitg", OFFICIAL, "cc-by-nc-4.0", "V2 Giant weights are CC-BY-NC-4.0"),
        ("vitl", None, "apache-2.0", "Not derived from official weights"),
        ("vitt", "/local/start.pth", "apache-2.0", "Not derived from official weights"),
    ],
)
def test_licences_of_the_base_weights(
    encoder: str, checkpoint: str | None, licence: str, words: str, tmp_path: Path
) -> None:
    record = read_run(write_run(tmp_path, checkpoint, encoder))
    card = model_card("final", said(encoder, step="400"), run=record, layout="files")
    assert header(card)["license"] == licence
    assert words in section(card, "Licence")


def test_without_a_run_the_licence_is_the_careful_one() -> None:
    card = model_card("x", said("vitl", converted_from="x.pth"), run=None, layout="files")
    assert header(card)["license"] == "cc-by-nc-4.0"
    assert "No validation is on record" in section(card, "Figures")
    assert "Trained with flatdepth" not in card
    assert "Data and recipe" not in card


def test_figures_of_another_step_are_not_borrowed(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path))
    card = model_card("best", said(step="300"), run=record, layout="files")
    assert "no validation at step 300" in section(card, "Figures")
    assert "0.247" not in card and "model-index" not in header(card)
    start = model_card("start", said(step="0"), run=record, layout="files")
    assert "| mirrors and art | 48 | 0.432 | 0.500 |" in section(start, "Figures")


def test_a_card_beside_the_weights_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, checkpoint=None, encoder="vitt")
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="relative")
    _, weights = save_weights(model, run / "weights" / "final", extra={"step": "400"})
    (run / "weights" / "final.md").write_text("an older card")
    path = write_model_card(weights, run)
    assert path == run / "weights" / "final.md"
    text = path.read_text("utf-8")
    assert "# mirrors, final" in text
    assert "relative inverse depth" in text
    bare = tmp_path / "bare.pth"
    torch.save({}, bare)
    with pytest.raises(UserError, match=r"bare\.pth has no metadata; export it"):
        write_model_card(bare, run)


def test_damaged_run_directories_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml; give a run directory"):
        read_run(tmp_path)
    for name, content, message in (
        ("config.yaml", "a: [", "does not hold the config"),
        ("config.yaml", "- 1", "does not hold the config"),
        ("metrics.json", "{", "does not hold the config"),
        ("metrics.json", "[]", "does not hold the config"),
    ):
        run = write_run(tmp_path / f"{name}{len(content)}{content[0]}")
        (run / name).write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_run(run)
        assert "\n" not in str(caught.value)
    run = write_run(tmp_path / "newer")
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}, this version reads {FORMAT}"):
        read_run(run)


def test_a_convolutional_network_is_not_called_depth_anything() -> None:
    card = model_card("final", said("lite0"), run=None, layout="files")
    assert "EfficientNet-Lite with the fusion head" in card and "architecture," not in card
    assert header(card)["tags"][0] == "efficientnet"
    assert header(card)["license"] == "apache-2.0"
