"""The notebook: what is committed, and what it shows when it is run."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

import flatdepth
from flatdepth.data.shards.read import ShardSet
from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "finetune_on_your_photos.ipynb"
SMALL = """
HEIGHT, WIDTH = 56, 70
STEPS, BATCH, MICRO_BATCH = 3, 2, 2
IMAGES = 6
"""
FRAMES = {"redwood/image/00005", "slambook2_ch7/1", "slambook2_ch5/color/1"}
ABSOLUTE = re.compile(r"(?<![\w.~:/])(?:/(?:home|root|tmp|work|Users|mnt|opt|usr|var)/|[A-Z]:\\)")


@dataclass(frozen=True)
class Executed:
    """The notebook after it ran, and the folder that it wrote."""

    notebook: NotebookNode
    out: Path

    def outputs(self, cell: str) -> list[NotebookNode]:
        (found,) = [one for one in self.notebook.cells if one.id == cell]
        return list(found.outputs)

    def shown(self, cell: str, kind: str) -> str:
        """The one thing of a MIME type that a cell displays."""
        (found,) = [o.data[kind] for o in self.outputs(cell) if kind in o.get("data", {})]
        return str(found)


def committed() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executed]:
    """Run with its choices turned down, as papermill would: a cell after the one of the choices.

    A folder of the name that is asked for is there already.
    """
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "runs").mkdir()
    (folder / "runs" / "precious").touch()
    notebook = committed()
    (choices,) = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    small = f"{SMALL}OUT = {str(folder / 'runs')!r}"
    notebook.cells.insert(choices + 1, nbformat.v4.new_code_cell(small))
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    yield Executed(notebook, folder / "runs-2")
    assert [path.name for path in (folder / "runs").iterdir()] == ["precious"]


def test_it_is_committed_without_outputs_and_names_no_place_of_one_machine() -> None:
    notebook = committed()
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
    text = NOTEBOOK.read_text("utf-8")
    assert not ABSOLUTE.search(text) and str(REPOSITORY) not in text
    assert ABSOLUTE.search('raw = "/mnt/me/frames"') and not ABSOLUTE.search("docs/tmp/x, a/b")


def test_links_of_its_texts_are_there() -> None:
    texts = "\n".join(cell.source for cell in committed().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", texts)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_every_cell_runs_without_error_or_warning(executed: Executed) -> None:
    for cell in executed.notebook.cells:
        if cell.cell_type != "code":
            continue
        assert cell.execution_count, cell.id
        for output in cell.outputs:
            assert output.output_type != "error"
            assert not re.search("warning|error|traceback", output.get("text", ""), re.I), cell.id


def test_every_frame_is_in_a_set(executed: Executed) -> None:
    sets = [ShardSet.open(path) for path in sorted((executed.out / "shards").iterdir())]
    assert sorted(shards.dataset for shards in sets) == ["kinect", "redwood", "tum"]
    assert {key for shards in sets for key in shards.keys} == FRAMES
    assert sum(map(len, sets)) == len(FRAMES)


@pytest.mark.parametrize("cell", ["frames", "pastes", "look", "photos"])
def test_pictures_are_shown(executed: Executed, cell: str) -> None:
    assert len(executed.shown(cell, "image/png")) > 20_000


def test_the_curve_is_that_of_all_steps(executed: Executed) -> None:
    assert "<svg" in executed.shown("curve", "text/html")
    history = (executed.out / "training" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [1, 2, 3]


def test_weights_are_exported_and_are_not_those_of_the_start(executed: Executed) -> None:
    exported = flatdepth.load(executed.out / "export" / "my_depth.pth", device="cpu")
    final = flatdepth.load(executed.out / "training" / "weights" / "final.safetensors")
    start = flatdepth.load("shards/demo_lite0.safetensors", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (56, 70, 3), dtype=np.uint8)
    values = [model.predict(image, size=56).values for model in (start, final, exported)]
    np.testing.assert_allclose(values[1], values[2], rtol=1e-5)
    assert not np.allclose(values[0], values[1], rtol=1e-3)


def test_figures_are_those_of_the_evaluation(executed: Executed) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in executed.shown("figures", "text/markdown").splitlines()[2:]
    ]
    found = {(row[0], row[1], row[2]): (float(row[3]), float(row[4])) for row in rows}
    for region in ("mirror", "art", "background"):
        before, after = found["flatbench", region, "AbsRel"]
        assert before > 0 and after > 0 and before != after
    pasted = {key[1:] for key in found if key[0] != "flatbench"}
    assert pasted >= {(r, m) for r in ("mirror", "art") for m in ("AbsRel", "Relief")}
    document = json.loads((executed.out / "evaluation.json").read_text())
    (bench,) = [one for one in document["datasets"] if one["name"] == "flatbench"]
    values = [bench["tables"][label]["mirror"]["abs_rel"]["value"] for label in "AB"]
    assert found["flatbench", "mirror", "AbsRel"] == tuple(round(value, 3) for value in values)
