"""Graphs: what ONNX Runtime and torch.export make of a network is what the network predicts."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.models import graph
from flatdepth.models.calibration import Calibration, Correction, HeldOut
from flatdepth.models.checkpoint import open_model, save_weights
from flatdepth.models.depth_anything import _resize_by_matrices, resize_position_embedding
from flatdepth.models.depth_anything_3 import SKY
from flatdepth.models.graph import export_graph
from flatdepth.models.network import DepthNetwork
from flatdepth.models.networks import make_network
from flatdepth.models.onnx_depth import OnnxDepth
from tests.conftest import REPOSITORY, Tool, refused

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CPU = torch.device("cpu")
FRAMES = REPOSITORY / "tests" / "data" / "rgbd" / "redwood" / "image"
DEMO = REPOSITORY / "shards" / "demo_vitt.safetensors"


@pytest.fixture(autouse=True, scope="module")
def no_shape_checks() -> Iterator[None]:
    """Sizes of a graph that is being made are no numbers, and checks would make them such."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def network(name: str, encoder: str, kind: str, **options: float) -> DepthNetwork:
    """A network of random weights whose prediction varies, for small pictures."""
    torch.manual_seed(0)
    model = make_network(name, encoder, kind=kind, **options).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
        if name == "depth_anything_3":  # whose fresh head sees no sky; now in a third of all pixels
            sky = "depth_head.scratch.sky_output_conv2.2."
            model.get_parameter(f"{sky}weight").normal_(std=3.0)
            found = model.logits(given(model, 2, 5, 6)["image"])[:, 1]
            model.get_parameter(f"{sky}bias").add_(SKY - found.quantile(2 / 3))
        if name == "depth_anything_v2":
            model.get_parameter("pretrained.pos_embed").normal_()
    model.trained_px = (3 * model.multiple, 4 * model.multiple)
    return model


def given(model: DepthNetwork, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Pictures of so many multiples, each with another focal length."""
    generator = torch.Generator().manual_seed(batch + rows)
    size = (rows * model.multiple, columns * model.multiple)
    coarse = torch.rand(batch, 3, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    focal = {"focal_px": 100.0 + 50 * torch.arange(batch)} if model.needs_focal else {}
    return {"image": image, **focal}


def by_runtime(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What ONNX Runtime itself says, without anything of flatdepth."""
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in inputs.items()})[0])


def far_apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert expected.std() > 1e-3 * expected.abs().mean()
    return float((found - expected).abs().max() / expected.abs().mean())


@torch.no_grad()
def agrees(model: DepthNetwork, run: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """At sizes and batches that the graph was not made with, one of them the smallest."""
    for batch, rows, columns in ((1, 5, 3), (3, 3, 4), (2, 4, 7)):
        inputs = given(model, batch, rows, columns)
        assert far_apart(run(inputs), model(**inputs)) < 1e-4, (batch, rows, columns)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (13, 18), (37, 20), (37, 37), (60, 41)])
def test_position_embeddings_of_a_graph_are_those_of_the_network(grid: tuple[int, int]) -> None:
    pos_embed = torch.randn(1, 1 + 37 * 37, 4, generator=torch.Generator().manual_seed(0))
    expected = resize_position_embedding(pos_embed, grid)
    found = _resize_by_matrices(pos_embed, grid)
    if grid == (37, 37):
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() < 2e-5


CASES = [
    ("depth_anything_v2", "vitt", "relative"),
    ("depth_anything_3", "vitt", "affine"),
    ("efficientnet", "lite0", "metric"),
    ("midas_v21", "tiny", "relative"),
    ("resnet50", "tiny", "metric"),
]
Graphs = Callable[[str, str, str], tuple[DepthNetwork, Path]]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """A network and its ONNX file, made once."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def made(name: str, encoder: str, kind: str) -> tuple[DepthNetwork, Path]:
        model, file = network(name, encoder, kind), folder / f"{name}_{encoder}_{kind}.onnx"
        export_graph(model, file, extra={"run": "mirrors"})
        return model, file

    return made


@pytest.mark.parametrize(("name", "encoder", "kind"), CASES)
def test_onnx_takes_any_batch_and_size(name: str, encoder: str, kind: str, graphs: Graphs) -> None:
    model, file = graphs(name, encoder, kind)
    agrees(model, lambda inputs: by_runtime(file, inputs))
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["image"]
    expected = "inverse_depth" if kind == "relative" else "depth"
    assert [one.name for one in session.get_outputs()] == [expected]


def test_the_grid_of_the_training_is_left_as_it_is(graphs: Graphs) -> None:
    """At 518 x 518 the network does not resample the position embedding, at 518 x 504 it does."""
    model, file = graphs(*CASES[0])
    for columns in (36, 37):
        inputs = given(model, 1, 37, columns)
        with torch.no_grad():
            assert far_apart(by_runtime(file, inputs), model(**inputs)) < 2e-5


@pytest.mark.parametrize(("name", "encoder", "kind"), CASES[::4])
def test_a_program_takes_any_batch_and_size(
    name: str, encoder: str, kind: str, tmp_path: Path
) -> None:
    model = network(name, encoder, kind)
    export_graph(model, tmp_path / "a.pt2")
    said = {"flatdepth.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=said).module()
    agrees(model, lambda inputs: program(**inputs))
    assert json.loads(said["flatdepth.json"])["kind"] == kind
    assert str(REPOSITORY).encode() not in (tmp_path / "a.pt2").read_bytes()


def test_the_sky_is_filled_in_the_graph_too(graphs: Graphs) -> None:
    model, file = graphs("depth_anything_3", "vitt", "metric")
    inputs = given(model, 2, 5, 6)
    with torch.no_grad():
        raw = model.train()(**inputs)
        expected = model.eval()(**inputs)
    assert 0.05 < (raw != expected).float().mean() < 0.95
    agrees(model, lambda inputs: by_runtime(file, inputs))


def calibration(correction: Correction) -> Calibration:
    half = HeldOut(scenes=1, images=1, fitted=correction, abs_rel=(0.2, 0.1), delta1=(0.5, 0.6))
    return Calibration(
        form="scale-shift-inverse", correction=correction, halves=(half, half), is_applied=True,
        sets=("rooms",), part="val", images=2, digests=("0",), protocol="none", input_px=84,
    )  # fmt: skip


def test_range_calibration_and_focal_length_are_inside(tmp_path: Path) -> None:
    model = network("depth_anything_v2", "vitt", "metric", max_depth_m=7.0, canonical_focal_px=50.0)
    model.calibration = calibration(Correction(factor=0.8, shift_per_m=0.05, far_m=9.0))
    export_graph(model, tmp_path / "a.onnx")
    inputs = given(model, 2, 4, 5)
    with torch.no_grad():
        logits = model.logits((inputs["image"] - model.image_mean) / model.image_std).double()
    canonical = 7 / (1 + (-logits).exp()) * (inputs["focal_px"].double() / 50)[:, None, None, None]
    expected = 1 / (1 / (0.8 * canonical) + 0.05).clamp(min=1 / 9)
    assert far_apart(by_runtime(tmp_path / "a.onnx", inputs).double(), expected) < 1e-4
    agrees(model, lambda inputs: by_runtime(tmp_path / "a.onnx", inputs))
    read = OnnxDepth(tmp_path / "a.onnx", CPU)
    assert read.needs_focal
    assert read.reach_m(123.0) == pytest.approx(model.reach_m(123.0), rel=1e-6)


def test_the_metadata_say_what_it_is_and_no_local_path(graphs: Graphs) -> None:
    _, file = graphs(*CASES[0])
    said = {p.key: p.value for p in onnx.load(file).metadata_props}
    wanted = {
        "format": "flatdepth", "network": "depth_anything_v2", "encoder": "vitt",
        "kind": "relative", "units": "1/depth", "multiple": "14", "side_px": "42",
        "run": "mirrors", "precision": "float32", "input_px": "42 x 56",
    }  # fmt: skip
    assert wanted.items() <= said.items()
    parity = json.loads(said["parity"])
    shown = [f"{size}, batch {batch}" for size in ("182 x 252", "42 x 42") for batch in (1, 3)]
    assert [one["shown"] for one in parity] == shown
    assert max(one["largest"] for one in parity) < 1e-4
    assert str(REPOSITORY).encode() not in file.read_bytes()


def test_float16_is_half_as_large_and_says_its_own_figure(graphs: Graphs, tmp_path: Path) -> None:
    model, file = graphs(*CASES[0])
    half = export_graph(model, tmp_path / "h.onnx", precision="float16")
    assert (tmp_path / "h.onnx").stat().st_size / file.stat().st_size < 0.55
    assert 1e-5 < max(p.largest for p in half) < 0.05
    inputs = given(model, 2, 4, 5)
    found = by_runtime(tmp_path / "h.onnx", inputs)
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert 1e-5 < far_apart(found, model(**inputs)) < 0.05
    assert next(model.parameters()).dtype == torch.float32


# Command lines.


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo weights, as if trained at 84 x 112 px."""
    model, _ = open_model(str(DEMO))
    model.trained_px = (84, 112)
    return save_weights(model, tmp_path_factory.mktemp("weights") / "w")[1]


@pytest.fixture(scope="module")
def exported(weights: Path) -> Path:
    model, _ = open_model(str(weights))
    export_graph(model, weights.with_suffix(".onnx"))
    return weights.with_suffix(".onnx")


def test_predictions_from_onnx_are_those_of_the_weights(
    tool: Tool, weights: Path, exported: Path, tmp_path: Path
) -> None:
    maps = {}
    for source in (weights, exported):
        out_folder = tmp_path / source.suffix[1:]
        arguments = (FRAMES, "--checkpoint", source, "--out", out_folder, "--write", "npy,ply")
        code, _, err = tool("predict", *arguments, "--device", "cpu")
        assert code == 0, err
        maps[source.suffix] = [np.load(f) for f in sorted(out_folder.rglob("*_depth.npy"))]
    assert len(maps[".onnx"]) == len(list(FRAMES.glob("*.jpg"))) > 0
    for found, expected in zip(maps[".onnx"], maps[".safetensors"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert "by ONNX Runtime on CPUExecutionProvider" in err


def test_onnx_is_evaluated_as_the_weights(
    tool: Tool, weights: Path, exported: Path, tmp_path: Path
) -> None:
    code, out, err = tool(
        "evaluate", "--checkpoint", weights, "--checkpoint", exported, "--data",
        REPOSITORY / "shards" / "flatbench", "--images", 4, "--bootstrap", 10,
        "--out", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0, err
    assert "shorter side of 84 px" in out
    document = json.loads((tmp_path / "e.json").read_text())
    first, second = document["datasets"][0]["tables"].values()
    values = [
        [figure["value"] for region in table.values() for figure in region.values()]
        for table in (first, second)
    ]
    assert len(values[0]) > 10
    assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5, nan_ok=True)


def test_int8_needs_pictures_and_linear_layers(tool: Tool, weights: Path, tmp_path: Path) -> None:
    quantise = ("--quantise", "dynamic")
    refused(tool, "--pictures to measure", "checkpoint", "export", weights,
            tmp_path / "q.onnx", *quantise)  # fmt: skip
    picture = ("--pictures", FRAMES)
    lite0 = REPOSITORY / "shards" / "demo_lite0.safetensors"
    refused(tool, "EfficientNet-Lite has no linear layers", "checkpoint", "export", lite0,
            tmp_path / "q.onnx", *quantise, *picture)  # fmt: skip
    assert not list(tmp_path.iterdir())
    code, out, err = tool("checkpoint", "export", weights, tmp_path / "q.onnx", *quantise, *picture)
    assert code == 0, err
    parity = json.loads(OnnxDepth(tmp_path / "q.onnx", CPU).metadata["parity"])
    pictures = {p["shown"]: p["mean"] for p in parity if "batch" not in p["shown"]}
    assert sorted(pictures) == sorted(f.stem for f in FRAMES.glob("*.jpg"))
    assert all(f"{mean:7.1e}" in out for mean in pictures.values())
    assert 1e-4 < max(pictures.values()) < 0.5


# Mistakes.


def test_nothing_is_overwritten_unasked_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = network("resnet50", "tiny", "metric"), tmp_path / "a.pt2"
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match="would be overwritten; choose another name or add"):
        export_graph(model, file)
    monkeypatch.setattr(graph, "LIMITS", {"float32": -1.0})
    with pytest.raises(UserError, match=r"differs from the network by .* nothing is written"):
        export_graph(model, file, overwrite=True)
    assert file.read_bytes() == b"mine"
    monkeypatch.undo()
    export_graph(model, file, overwrite=True)
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_size > 1000


def test_files_of_others_and_damage_are_one_sentence(tool: Tool, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["image"], ["depth"])
    image, depth = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 3, "h", "w"])
        for name in ("image", "depth")
    )
    opset = onnx.helper.make_opsetid("", 18)
    foreign = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [image], [depth]), opset_imports=[opset], ir_version=10
    )
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"\x00" * 100)
    for name, message in (
        ("foreign", "expected an ONNX file that flatdepth checkpoint export wrote"),
        ("damaged", "cannot be read as ONNX"),
        ("gone", "no such file"),
    ):
        refused(tool, message, "predict", FRAMES, "--checkpoint", tmp_path / f"{name}.onnx",
                "--out", tmp_path / "o")  # fmt: skip
    onnx.helper.set_model_props(foreign, {"format": "flatdepth", "kind": "relative"})
    onnx.save(foreign, tmp_path / "half_said.onnx")
    refused(tool, "its metadata are damaged", "predict", FRAMES, "--checkpoint",
            tmp_path / "half_said.onnx", "--out", tmp_path / "o")  # fmt: skip
    refused(tool, "leave --kind and --max_depth_m out", "predict", FRAMES, "--checkpoint",
            tmp_path / "foreign.onnx", "--out", tmp_path / "o", "--kind", "metric")  # fmt: skip


def test_what_does_not_go_into_a_graph_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("resnet50", "tiny", "metric")
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x: decode(x) * float(x.mean()))
    with pytest.raises(UserError, match=r"ResNet-50 encoder-decoder \(tiny\) does not go into"):
        export_graph(model, tmp_path / "a.onnx")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'flatdepth\[onnx\]'"):
        export_graph(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
