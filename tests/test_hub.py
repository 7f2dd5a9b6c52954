"""Uploads to the Hub, to one on this machine: bytes, cards, licences, what is refused."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from flatdepth.cli import run_command
from flatdepth.commands import checkpoint, evaluate, pack
from flatdepth.data import sets
from flatdepth.data.publish import shard_upload, size_category
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.hub import Upload
from flatdepth.models.card import checked_licence, read_run
from flatdepth.models.checkpoint import open_model, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.export import export_weights, largest_difference
from tests.conftest import REPOSITORY, TinySets, edit_index
from tests.fake_hub import READER, WRITER, FakeHub
from tests.test_modelcard import OFFICIAL, write_run

# of huggingface_hub itself, which calls its HTTP client so
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "someone/mirrors-vitt"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The one that huggingface_hub talks to, with a token that may write."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # HF_ENDPOINT is read on import
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def network() -> DepthAnythingV2:
    """The trained demo weights."""
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=20.0).eval()
    model.load_state_dict(load_file(REPOSITORY / "shards" / "demo_vitt.safetensors"))
    return model


def weights_of_a_run(folder: Path, start: str | None = None) -> Path:
    run = write_run(folder, start, "vitt")
    return save_weights(
        network(), run / "weights" / "final", extra={"run": "mirrors", "step": "400"}
    )[1]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return weights_of_a_run(tmp_path)


def push(*arguments: object) -> None:
    checkpoint.main(["push", *map(str, arguments)])


def received(hub: FakeHub, repo: str, folder: Path) -> Path:
    """The repository's files in a new folder."""
    for name, content in hub.files[repo].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# Weights.


def test_weights_of_a_run_arrive_byte_for_byte(hub: FakeHub, weights: Path) -> None:
    push(weights, REPO, "--yes")
    files = hub.files[REPO]
    assert files.keys() == {"final.safetensors", "config.yaml", "README.md"}
    assert files["final.safetensors"] == weights.read_bytes()
    assert not hub.private[REPO]
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "depth-estimation")
    assert {(r.dataset_config, r.metric_type): r.metric_value for r in data.eval_results} == {
        ("flat", "abs_rel"): 0.2468, ("flat", "delta1"): 0.5,
        ("clean", "abs_rel"): 0.1235, ("clean", "delta1"): 0.9,
    }  # fmt: skip
    assert f'open_model("{REPO}/final.safetensors")' in files["README.md"].decode()


def test_the_config_keeps_its_values_and_no_local_path(hub: FakeHub, weights: Path) -> None:
    push(weights, REPO, "--yes")
    config = yaml.safe_load(hub.files[REPO]["config.yaml"])
    run = read_run(weights.parent.parent).config
    assert config["optim"] == run["optim"] and config["steps"] == 400
    assert config["data"]["train"][0] == {**run["data"]["train"][0], "path": "rooms"}
    assert not any(b"/home" in hub.files[REPO][name] for name in ("config.yaml", "README.md"))


def test_an_exported_folder_arrives_as_transformers_loads_it(hub: FakeHub, tmp_path: Path) -> None:
    export_weights(network(), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    push(tmp_path / "out", REPO, "--licence", "MIT", "--private", "--yes")
    assert hub.private[REPO]
    there = received(hub, REPO, tmp_path / "there")
    assert {path.name for path in there.iterdir()} == {
        "config.json", "preprocessor_config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    assert largest_difference(open_model(str(there))[0], network()) == 0
    theirs = AutoModelForDepthEstimation.from_pretrained(there).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (518, 518, 3), dtype=np.uint8)
    inputs = AutoImageProcessor.from_pretrained(there)(images=pixels, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**inputs).predicted_depth
        own = network()(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255)[:, 0]
    np.testing.assert_allclose(found, own, atol=1e-4)
    card = ModelCard.load(there / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert f'from_pretrained("{REPO}")' in card.text


def test_pickles_are_sent_on_demand_only(hub: FakeHub, weights: Path) -> None:
    with pytest.raises(UserError, match=r"final\.pth is a pickle.*--pth"):
        push(weights.with_suffix(".pth"), REPO, "--yes")
    push(weights, REPO, "--pth", "--yes")
    for suffix in (".pth", ".json", ".safetensors"):
        file = weights.with_suffix(suffix)
        assert hub.files[REPO][file.name] == file.read_bytes()
    weights.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"final\.json is missing"):
        push(weights, REPO, "--pth", "--yes")


def test_without_yes_all_is_shown_and_nothing_sent(
    hub: FakeHub, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(weights, REPO)
    shown = capsys.readouterr().out
    assert not hub.calls
    assert f"{weights.stat().st_size:,}  final.safetensors" in shown
    push(weights, REPO, "--yes")
    assert hub.files[REPO]["README.md"].decode() in shown
    assert "Nothing was sent" in shown and "Nothing was sent" not in capsys.readouterr().out


def test_evaluations_stand_in_the_model_index(
    hub: FakeHub, weights: Path, tiny_sets: TinySets, tmp_path: Path
) -> None:
    judged = tmp_path / "eval.json"
    options = ("--images=2", "--size=56", "--align=median", "--protocol=none", f"--out={judged}")
    evaluate.main([f"--checkpoint={weights}", f"--data={tiny_sets.rooms}", *options])
    push(weights, REPO, "--eval", judged, "--yes")
    data = ModelCard(hub.files[REPO]["README.md"].decode()).data
    (domain,) = json.loads(judged.read_text())["datasets"]
    (table,) = domain["tables"].values()
    found = {
        (one.dataset_config, one.metric_type): one.metric_value
        for one in data.eval_results
        if one.metric_args == {"protocol": "none"} and one.dataset_name == domain["name"]
    }
    assert found == {
        (region, metric): table[region][metric]["value"]
        for region in table
        for metric in ("abs_rel", "delta1")
    }
    other = shutil.copy(weights, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"the evaluation is of .*final\.safetensors, not of"):
        push(other, REPO, "--licence=mit", "--eval", judged)
    with pytest.raises(UserError, match=r"README\.md: expected an evaluation"):
        push(weights, REPO, "--eval", "README.md")


# Licences.

V2 = "depth_anything_v2"


@pytest.mark.parametrize("encoder", ["vitb", "vitl", "vitg"])
def test_no_licence_is_laxer_than_the_base(encoder: str) -> None:
    for laxer in ("apache-2.0", "mit", "cc-by-4.0", "openrail++"):
        with pytest.raises(UserError, match=f"--licence {re.escape(laxer)} permits what cc-by-nc"):
            checked_licence(laxer, V2, encoder, None)
    for kept in (None, "cc-by-nc-4.0", "cc-by-nc-sa-4.0"):
        assert checked_licence(kept, V2, encoder, None) == kept


def test_a_stricter_licence_may_be_chosen() -> None:
    assert checked_licence("cc-by-nc-4.0", V2, "vits", None) == "cc-by-nc-4.0"
    assert checked_licence("gpl-3.0", "midas_v21", "midas_v21_384", None) == "gpl-3.0"
    with pytest.raises(UserError, match="openrail"):
        checked_licence("mit", "marigold", "sd2", None)


def test_own_beginnings_bind_nobody_and_unknown_ones_have_to_be_told(tmp_path: Path) -> None:
    own = read_run(write_run(tmp_path / "own", None, "vitl"))
    assert checked_licence("mit", V2, "vitl", own) == "mit"
    assert checked_licence(None, V2, "vitl", own) is None
    with pytest.raises(UserError, match="cc-by-nc"):
        started = read_run(write_run(tmp_path / "started", OFFICIAL, "vitl"))
        checked_licence("mit", V2, "vitl", started)
    weights = weights_of_a_run(tmp_path / "local", "/some/where.pth")
    with pytest.raises(UserError, match="no licence that is known here; give theirs"):
        push(weights, REPO)
    push(weights, REPO, "--licence=cc-by-4.0")


# What is refused.


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command line says."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: checkpoint.main(["push", *map(str, arguments)]))
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    return error[0]


def test_refusals_of_the_hub_are_one_sentence(
    hub: FakeHub,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    assert f"may not write to {REPO}" in refused(capsys, weights, REPO, "--yes")
    hub.add(REPO, private=False)
    assert f"may not write to {REPO}" in refused(capsys, weights, REPO, "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert f"{hub.url} does not accept the token" in refused(capsys, weights, REPO, "--yes")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the Hub was found" in refused(capsys, weights, REPO, "--yes")
    assert hub.files == {REPO: {}}


def test_what_was_to_be_private_is_not_sent_to_a_public_repository(
    hub: FakeHub, weights: Path
) -> None:
    hub.add(REPO, private=False)
    with pytest.raises(UserError, match="exists and is public, so nothing was sent"):
        push(weights, REPO, "--private", "--yes")
    assert not hub.files[REPO]


def test_files_that_are_there_are_replaced_on_demand_only(hub: FakeHub, weights: Path) -> None:
    hub.add(REPO, private=False)
    hub.files[REPO] = {"README.md": b"edited on the site", ".gitattributes": b"lfs"}
    with pytest.raises(UserError, match=r"has README\.md, so nothing was sent; add --overwrite"):
        push(weights, REPO, "--yes")
    assert hub.files[REPO]["README.md"] == b"edited on the site"
    push(weights, REPO, "--yes", "--overwrite")
    assert b"license: apache-2.0" in hub.files[REPO]["README.md"]
    assert hub.files[REPO][".gitattributes"] == b"lfs"


def test_without_a_connection_it_says_so(
    hub: FakeHub,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "could not be sent to http://127.0.0.1:9 (ConnectError" in refused(
        capsys, weights, REPO, "--yes"
    )
    assert not hub.calls


@pytest.mark.parametrize("repo", ["mirrors", "a/b/c", "so--me/one", "some one/x", "/x", "x/.."])
def test_only_repositories_that_can_be_are_named(repo: str) -> None:
    with pytest.raises(UserError, match="expected a repository of the Hub as in OWNER/NAME"):
        Upload(repo=repo, kind="model", files={}, private=False)


def test_weights_that_do_not_say_what_they_are_stay_here(tmp_path: Path, weights: Path) -> None:
    official = shutil.copy(weights.with_suffix(".pth"), tmp_path / "depth_anything_v2_vits.pth")
    with pytest.raises(UserError, match="does not say what it holds"):
        push(official, REPO)
    with pytest.raises(UserError, match="the weights come from the run mirrors"):
        run = write_run(tmp_path / "second", None, "vitt")
        config = (run / "config.yaml").read_text().replace("name: mirrors", "name: windows")
        (run / "config.yaml").write_text(config)
        push(weights, REPO, "--run", run)


# Shard sets.


def test_a_set_arrives_whole(hub: FakeHub, tiny_sets: TinySets, tmp_path: Path) -> None:
    pack.main(["push", str(tiny_sets.rooms), "someone/rooms", "--licence=CC-BY-4.0", "--yes"])
    there = received(hub, "datasets/someone/rooms", tmp_path / "there")
    names = {path.name for path in tiny_sets.rooms.iterdir()} - {"skipped.jsonl"}
    assert {path.name for path in there.iterdir()} == names | {"README.md"}
    for name in names:
        assert (there / name).read_bytes() == (tiny_sets.rooms / name).read_bytes(), name
    assert not sets.verify(there, workers=1).damage


def test_the_card_of_a_set_says_what_the_hub_asks(tiny_sets: TinySets) -> None:
    upload = shard_upload(tiny_sets.rooms, "someone/rooms", licence="cc-by-4.0")
    card = DatasetCard(bytes(upload.files["README.md"]).decode())  # type: ignore[arg-type]
    assert card.data.to_dict() == {
        "license": "cc-by-4.0",
        "pretty_name": "rooms",
        "task_categories": ["depth-estimation"],
        "size_categories": "n<1K",
        "tags": ["webdataset", "flatdepth"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}
        ],
        "dataset_info": card.data.dataset_info,
    }
    columns = [column["name"] for column in card.data.dataset_info["features"]]
    assert sorted(columns) == ["__key__", "__url__", "depth.fdz", "jpg", "json"]
    assert "15 frames with depth of 5 scenes, 84 x 112 pixels" in card.text
    assert "in 1 WebDataset shard (" in card.text and "parts" not in card.text
    assert "| `depth.fdz` |" in card.text and card.text.count("| 15 |") == 3
    pictures = shard_upload(tiny_sets.pictures, "someone/art", licence="cc0-1.0")
    card = DatasetCard(bytes(pictures.files["README.md"]).decode())  # type: ignore[arg-type]
    assert card.data.task_categories is None
    assert "4 pictures without depth" in card.text and "--data.art" in card.text


@pytest.mark.parametrize(
    ("samples", "category"),
    [
        (1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**4, "10K<n<100K"),
        (10**6 - 1, "100K<n<1M"), (10**9 - 1, "100M<n<1B"), (10**9, "n>1B"),
    ],
)  # fmt: skip
def test_size_categories_are_the_hubs(samples: int, category: str) -> None:
    assert size_category(samples) == category


def test_no_absolute_path_of_the_packing_is_published(tiny_sets: TinySets, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_sets.rooms, tmp_path / "copy"))
    options = {"file": "/home/someone/lists/train.txt", "image_glob": "*/*.jpg"}
    request = ShardSet.open(copy).index.request
    edit_index(copy, request={**request, "options": options})
    upload = shard_upload(copy, "someone/rooms", licence="mit")
    sent = json.loads(bytes(upload.files["index.json"]))  # type: ignore[arg-type]
    assert sent["request"]["options"] == {"file": "train.txt", "image_glob": "*/*.jpg"}
    assert upload.files["index.safetensors"] == (copy / "index.safetensors").read_bytes()
    assert b"/home" not in bytes(upload.files["README.md"])  # type: ignore[arg-type]


def test_what_cannot_be_sent_of_sets_is_one_sentence(tiny_sets: TinySets) -> None:
    with pytest.raises(UserError, match="licence"):
        pack.main(["push", str(tiny_sets.rooms), "someone/rooms"])
    with pytest.raises(UserError, match="push sends local directories only"):
        pack.main(["push", "memory://rooms", "someone/rooms", "--licence=mit"])


def test_the_library_of_the_hub_reads_the_samples(hub: FakeHub, tmp_path: Path) -> None:
    """By the card alone, of a set where only some samples have a map of regions."""
    datasets = pytest.importorskip("datasets")
    bench = REPOSITORY / "shards" / "flatbench"
    pack.main(["push", str(bench), "someone/bench", "--licence=mit", "--yes"])
    there = received(hub, "datasets/someone/bench", tmp_path / "there")
    samples = iter(datasets.load_dataset(str(there), split="train", streaming=True))
    with ShardSet.open(bench) as shards:
        for i in range(4):
            sample, raw = next(samples), shards.members(i)
            assert sample["__key__"] == shards.keys[i]
            assert sample["depth.fdz"] == raw["depth.fdz"]
            np.testing.assert_array_equal(np.asarray(sample["jpg"]), shards.image(i))
            np.testing.assert_array_equal(sample["json"]["K_px"], shards.frame(i).K_px)
            assert (sample["region.png"] is None) == (raw.get("region.png") is None)
        assert {"region.png" in shards.members(i) for i in range(4)} == {True, False}
