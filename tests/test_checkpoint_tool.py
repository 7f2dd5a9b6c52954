"""tools/checkpoint.py: round trips through transformers, planted changes, blends, damaged files."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from flatdepth.models.checkpoint import open_model, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import UNUSED, Kind
from tests.conftest import REPOSITORY, Tool, refused

DEMO = REPOSITORY / "shards" / "demo_vitt.safetensors"
TOOL = str(REPOSITORY / "tools" / "checkpoint.py")
SHIFT = 2.0
"""Added to the logits of the demo weights, turned, to play relative ones: they are above 0."""


def weights(kind: Kind = "metric", max_depth_m: float = 20.0) -> DepthAnythingV2:
    """The trained demo weights, as they are or with the logits' sign turned to be relative."""
    model = DepthAnythingV2("vitt", kind=kind, max_depth_m=max_depth_m).eval()
    state = load_file(DEMO)
    if kind == "relative":
        for leaf in ("weight", "bias"):
            state[f"depth_head.scratch.output_conv2.2.{leaf}"].neg_()
        state["depth_head.scratch.output_conv2.2.bias"] += SHIFT
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that several tests read: metric, relative and a fine-tuned metric one."""
    folder = tmp_path_factory.mktemp("store")
    save_weights(weights(), folder / "metric")
    save_weights(weights("relative"), folder / "relative")
    tuned = weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator)
    save_weights(tuned, folder / "tuned", extra={"run": "mirrors", "step": "400"})
    return folder


@pytest.fixture
def tool(tool: Tool) -> Tool:
    """``tools/checkpoint.py``."""
    return partial(tool, "checkpoint")


def rows(text: str) -> dict[str, str]:
    return {line[:12].strip(): line[13:] for line in text.splitlines()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# info


def test_info_says_what_the_metadata_say(tool: Tool, store: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = store / f"tuned{suffix}"
        code, out, _ = tool("info", path)
        shown = rows(out)
        assert code == 0
        assert shown["size"] == f"{path.stat().st_size / 1e6:.1f} MB"
        assert shown["kind"] == "metric (by its metadata)"
        assert (shown["encoder"], shown["max_depth_m"], shown["units"]) == ("vitt", "20.0", "m")
        assert shown["keys"] == "155 tensors, 1,893,441 parameters"
        assert (shown["run"], shown["step"]) == ("mirrors", "400")
        assert "fault" not in shown
    assert rows(tool("info", store / "relative.pth")[1])["units"] == "1/depth"


def test_info_explains_files_of_the_original_project(tool: Tool, tmp_path: Path) -> None:
    state = weights().state_dict()
    wrapped = {"model": {f"module.{n}": t.half() for n, t in state.items()}, "epoch": 7}
    torch.save(wrapped, tmp_path / "latest.pth")
    shown = rows(tool("info", tmp_path / "latest.pth")[1])
    assert shown["kind"] == "not said by the file; its logits look metric"
    assert shown["types"] == "155 float16"
    for note in ("took the entry 'model' and left 'epoch'", "took the prefix 'module.' off"):
        assert note in shown["unwrapped"]

    torch.save(weights("relative").state_dict(), tmp_path / "unknown.pth")
    shown = rows(tool("info", tmp_path / "unknown.pth")[1])
    assert shown["kind"] == "not said by the file; its logits look relative"

    encoder = {n.removeprefix("pretrained."): t for n, t in state.items() if "pretrained" in n}
    torch.save(encoder, tmp_path / "dinov2.pth")
    shown = rows(tool("info", tmp_path / "dinov2.pth")[1])
    assert (shown["encoder"], shown["head"]) == ("vitt", "none")
    assert "train one with model.head fresh" in shown["fault"]
    assert "plain DINOv2 encoder" in shown["unwrapped"]

    del state["pretrained.blocks.3.ls1.gamma"]
    torch.save(state, tmp_path / "short.pth")
    assert "1 tensors are missing" in rows(tool("info", tmp_path / "short.pth")[1])["fault"]
    torch.save({"fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    shown = rows(tool("info", tmp_path / "resnet.pth")[1])
    assert (shown["encoder"], shown["fault"].split(":")[0]) == (
        "none", "not a file of Depth Anything V2"
    )  # fmt: skip


def test_info_names_metadata_that_the_logits_gainsay(tool: Tool, tmp_path: Path) -> None:
    tensors = weights("relative").state_dict()
    save_file(tensors, tmp_path / "x.safetensors",
              {"format": "flatdepth", "kind": "metric", "max_depth_m": "20.0"})  # fmt: skip
    shown = rows(tool("info", tmp_path / "x.safetensors")[1])
    assert shown["kind"] == "metric (by its metadata); its logits look relative"


def test_info_lists_every_key_once(tool: Tool, store: Path) -> None:
    _, out, _ = tool("info", store / "metric.pth", "--keys")
    shapes = {n: str(list(t.shape)) for n, t in weights().state_dict().items()}
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.endswith("] float32")]
    assert len(lines) == len(shapes)
    assert {name: rest.removesuffix(" float32") for name, rest in lines} == shapes


# export


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_official_to_ours_to_transformers_and_back(tool: Tool, kind: Kind, tmp_path: Path) -> None:
    """The twin of transformers predicts the same at 518 x 518, and every tensor comes home."""
    model = weights(kind)
    official = model.state_dict()
    torch.save({"model": {f"module.{n}": t for n, t in official.items()}}, tmp_path / "o.pth")
    unsaid = ["--kind", kind] + (["--max_depth_m", "20"] if kind == "metric" else [])
    assert tool("export", tmp_path / "o.pth", tmp_path / "ours.safetensors", *unsaid)[0] == 0
    assert tool("export", tmp_path / "ours.safetensors", tmp_path / "hf")[0] == 0
    assert tool("export", tmp_path / "hf", tmp_path / "back.pth")[0] == 0
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), dict(official))
    said = json.loads((tmp_path / "back.json").read_text())
    assert (said["kind"], said.get("max_depth_m")) == (kind, "20.0" if kind == "metric" else None)

    twin, missing = AutoModelForDepthEstimation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(missing.values()), missing
    pixels = np.random.default_rng(0).integers(0, 256, (518, 518, 3), dtype=np.uint8)
    pixels[100:400, 150:300] = (200, 40, 90)
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "hf")(images=pixels, return_tensors="pt")
    with torch.no_grad():
        theirs = twin.eval()(**inputs).predicted_depth
        ours = model(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255)[:, 0]
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() <= 1e-4


def test_export_keeps_the_origin_and_writes_a_card(tool: Tool, store: Path, tmp_path: Path) -> None:
    tool("export", store / "tuned.pth", tmp_path / "new" / "a.safetensors")
    tool("export", tmp_path / "new" / "a.safetensors", tmp_path / "new" / "a.pth")
    tool("export", store / "metric.pth", tmp_path / "hf")
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert names == [
        "hf/README.md", "hf/config.json", "hf/model.safetensors", "hf/preprocessor_config.json",
        "new/a.json", "new/a.md", "new/a.pth", "new/a.safetensors",
    ]  # fmt: skip
    assert "run mirrors, step 400" in (tmp_path / "new" / "a.md").read_text("utf-8")
    assert "converted_from metric.pth" in (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert same(
        load_file(tmp_path / "new" / "a.safetensors"), load_file(store / "tuned.safetensors")
    )


def test_nothing_is_overwritten(tool: Tool, store: Path, tmp_path: Path) -> None:
    metric, tuned = store / "metric.safetensors", store / "tuned.safetensors"
    for name in ("a.pth", "a.safetensors", "folder", "d.png", "d.json", "b.md", "c.json"):
        (tmp_path / name).write_bytes(b"mine")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for arguments in (
        ["export", metric, tmp_path / "a.pth"],
        ["export", metric, tmp_path / "a.safetensors"],
        ["export", metric, tmp_path / "folder"],
        ["export", metric, tmp_path / "b.safetensors"],
        ["export", metric, tmp_path / "c.pth"],
        ["blend", metric, tuned, "--alpha", "0.5", tmp_path / "a.pth"],
        ["diff", metric, tuned, "--out", tmp_path / "d.png"],
        ["diff", metric, tuned, "--json", tmp_path / "d.json"],
    ):
        refused(tool, "would be overwritten; choose another name", *arguments)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_targets_that_cannot_be_written(tool: Tool, store: Path, tmp_path: Path) -> None:
    refused(tool, "found a name that ends in .h5", "export", store / "metric.pth", "a.h5")
    refused(tool, "are for .onnx and .pt2", "export", store / "metric.pth", "a.pth", "--half")
    save_weights(weights(max_depth_m=9.5), tmp_path / "half")
    half = tmp_path / "half.safetensors"
    said = "transformers takes Depth Anything V2 of whole metres only, found vitt of 9.5 m"
    refused(tool, said, "export", half, tmp_path / "x")
    code, out, _ = tool("verify", half)
    assert (code, "whole metres only: left out" in out) == (0, True)
    refused(tool, "holds no config.yaml", "export", half, tmp_path / "y.pth", "--run", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.json", "half.pth", half.name]


def test_shards_that_transformers_wrote_are_read(tool: Tool, store: Path, tmp_path: Path) -> None:
    assert tool("export", store / "metric.pth", tmp_path / "whole")[0] == 0
    theirs = AutoModelForDepthEstimation.from_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    model, report = open_model(str(tmp_path / "sharded"))
    assert report.metadata is not None and report.metadata["format"] == "transformers"
    assert (model.kind, model.max_depth_m) == ("metric", 20)
    assert same(model.state_dict(), weights().state_dict())


# diff


def test_diff_finds_the_layer_that_moved(tool: Tool, store: Path, tmp_path: Path) -> None:
    """Block 2 times 1.1 moves by 10 %, one bias of the head by 0.5, and the unused five never."""
    state = dict(weights().state_dict())
    for name in state:
        if name.startswith("pretrained.blocks.2.") or name in UNUSED:
            state[name] = state[name] * 1.1
    bias = "depth_head.scratch.output_conv1.bias"
    state[bias] = state[bias].clone()
    state[bias][3] += 0.5
    torch.save(state, tmp_path / "moved.pth")
    plot, table = tmp_path / "d.png", tmp_path / "d.json"
    code, out, _ = tool("diff", store / "metric.pth", tmp_path / "moved.pth", "--out", plot,
                        "--json", table)  # fmt: skip
    assert code == 0
    found = json.loads(table.read_text())
    groups = {group["name"]: group for group in found["groups"]}
    expected = [f"block {i}" for i in range(6)]
    assert [name for name in groups if name.startswith("block")] == expected
    before = {n: t.double().numpy() for n, t in weights().state_dict().items() if n not in UNUSED}
    assert groups["block 2"]["relative"] == pytest.approx(0.1, rel=1e-6)
    assert groups["head output"]["moved"] == pytest.approx(0.5, rel=1e-6)
    assert {n for n, g in groups.items() if g["moved"]} == {"block 2", "head output"}
    squares = sum(float(np.square(array).sum()) for array in before.values())
    assert found["whole"]["norm"] == pytest.approx(squares**0.5, rel=1e-9)
    assert found["whole"]["parameters"] == sum(array.size for array in before.values())
    assert {t["name"] for t in found["tensors"]} == before.keys()
    line = next(line for line in out.splitlines() if line.startswith("block 2"))
    assert line.split()[-2:] == ["10.00%", "#" * 24]
    image = np.asarray(Image.open(plot).convert("RGB"))
    blue = (image == (0x2B, 0x66, 0xB1)).all(-1)
    assert blue.any(1).sum() < 30, "one bar of one block"
    assert blue.any(0).sum() > 400

    _, out, _ = tool("diff", store / "metric.pth", tmp_path / "moved.pth", "--tensors")
    assert sum(line.startswith("pretrained.blocks.2.") for line in out.splitlines()) == 14


def test_diff_of_a_file_with_itself_and_of_strangers(
    tool: Tool, store: Path, tmp_path: Path
) -> None:
    code, out, _ = tool("diff", store / "metric.pth", store / "metric.safetensors")
    assert (code, out.splitlines()[-1].split()[-1]) == (0, "0.00%")
    encoder = {n: t for n, t in weights().state_dict().items() if n.startswith("pretrained.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, 384)}, tmp_path / "other.pth")
    metric = store / "metric.pth"
    refused(tool, "encoder.pth lacks 64 tensors", "diff", metric, tmp_path / "encoder.pth")
    refused(tool, "give two files of one encoder", "diff", metric, tmp_path / "other.pth")
    refused(tool, "a name that ends in .png", "diff", metric, metric, "--out", tmp_path / "d.jpg")


# blend


def test_blend_ends_are_exact_and_the_middle_is_the_mean(
    tool: Tool, store: Path, tmp_path: Path
) -> None:
    a, b = load_file(store / "metric.safetensors"), load_file(store / "tuned.safetensors")
    for alpha in ("0", "1", "0.5"):
        code, *_ = tool("blend", store / "metric.safetensors", store / "tuned.pth",
                        "--alpha", alpha, tmp_path / f"{alpha}.safetensors")  # fmt: skip
        assert code == 0
    assert same(load_file(tmp_path / "0.safetensors"), a)
    assert same(load_file(tmp_path / "1.safetensors"), b)
    for name, t in load_file(tmp_path / "0.5.safetensors").items():
        assert torch.equal(t, ((a[name].double() + b[name].double()) / 2).float()), name
    model, report = open_model(str(tmp_path / "0.5.safetensors"))
    assert (model.kind, model.max_depth_m) == ("metric", 20)
    assert "blend 0.5 x metric.safetensors + 0.5 x tuned.pth" in str(report)
    assert "a blend: 0.5 x metric" in (tmp_path / "0.5.md").read_text("utf-8")


def test_blend_needs_two_of_a_kind(tool: Tool, store: Path, tmp_path: Path) -> None:
    metric, out = store / "metric.pth", tmp_path / "out.pth"
    share = ["--alpha", "0.5", out]
    refused(tool, "A has kind metric and B relative", "blend", metric, store / "relative.pth",
            *share)  # fmt: skip
    save_weights(weights(max_depth_m=80.0), tmp_path / "far")
    refused(tool, "max_depth_m 20.0 and B 80.0", "blend", metric, tmp_path / "far.pth", *share)
    refused(tool, "expected 0.0 to 1.0, got '1.5'", "blend", metric, metric, "--alpha", 1.5, out)

    # One that does not say its kind is taken for the other's, if it predicts like it.
    torch.save(weights("relative").state_dict(), tmp_path / "unknown.pth")
    refused(tool, "relative model read as metric", "blend", metric, tmp_path / "unknown.pth",
            *share)  # fmt: skip
    torch.save(weights().state_dict(), tmp_path / "same.pth")
    assert not out.exists()
    assert tool("blend", tmp_path / "same.pth", metric, *share)[0] == 0
    assert same(torch.load(out, weights_only=True), load_file(store / "metric.safetensors"))


# verify


def test_verify_compares_one_forward_pass(tool: Tool, store: Path, tmp_path: Path) -> None:
    code, out, _ = tool("verify", store / "tuned.pth")
    assert code == 0
    assert out.count("equal to ") == 3
    assert "NOT" not in out
    # Constant logits 0 and log 3 are depths of 1/2 and 3/4 of 20 m: 5 m apart.
    for name, logit in (("half", 0.0), ("three_quarters", float(np.log(3)))):
        model = weights()
        with torch.no_grad():
            model.get_parameter("depth_head.scratch.output_conv2.2.weight").zero_()
            model.get_parameter("depth_head.scratch.output_conv2.2.bias").fill_(logit)
        save_weights(model, tmp_path / name)
    pair = (tmp_path / "half.pth", tmp_path / "three_quarters.pth")
    code, out, _ = tool("verify", *pair)
    assert (code, "NOT equal" in out, "largest difference 5 m" in out) == (1, True, True)
    assert tool("verify", *pair, "--tolerance", "5.1")[0] == 0
    refused(tool, "predicts m and the other 1/depth", "verify", store / "metric.pth",
            store / "relative.pth")  # fmt: skip


# Mistakes and damage


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def test_damaged_files_are_one_sentence_everywhere(
    tool: Tool, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = {
        suffix: (store / f"metric{suffix}").read_bytes() for suffix in (".pth", ".safetensors")
    }
    folder = Path("hf")
    tool("export", store / "metric.pth", folder)
    for name in ("config", "version1"):
        shutil.copytree(folder, name)
    Path("config/config.json").write_text("{")
    config = json.loads(Path("version1/config.json").read_text())
    config["backbone_config"]["out_indices"] = [3, 4, 5, 6]
    Path("version1/config.json").write_text(json.dumps(config))
    Path("empty_folder").mkdir()
    for suffix, content in whole.items():
        Path(f"empty{suffix}").touch()
        Path(f"cut{suffix}").write_bytes(content[: len(content) // 2])
        Path(f"picture{suffix}").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    Path("other_format.pth").write_bytes(whole[".safetensors"])
    Path("other_format.safetensors").write_bytes(whole[".pth"])
    Path("code.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    Path("code4.pth").write_bytes(pickle.dumps(Bomb(), protocol=4))
    torch.save({"model": Bomb()}, "zipped_code.pth")
    torch.save([1, 2], "list.pth")
    shutil.copy(store / "metric.pth", "sidecar.pth")
    Path("sidecar.json").write_text('{"format": "flatd')
    Path("weights.ckpt").touch()
    damaged = sorted(Path().glob("*.pth")) + sorted(Path().glob("*.safetensors"))
    damaged += [Path(name) for name in ("config", "version1", "empty_folder", "weights.ckpt")]
    damaged.append(Path("gone.pth"))
    assert len(damaged) == 18
    for path in damaged:
        for arguments in (
            ["info", path],
            ["export", path, "out.pth"],
            ["diff", store / "metric.pth", path],
            ["blend", path, store / "metric.pth", "--alpha", "0.5", "out.pth"],
            ["verify", store / "metric.pth", path],
        ):
            refused(tool, path.name.split(".")[0], *arguments)
    assert not Path("exploded").exists()
    assert not Path("out.pth").exists()


def test_wrong_usage_is_one_sentence(tool: Tool, store: Path) -> None:
    metric = store / "metric.pth"
    refused(tool, "the following arguments are required: COMMAND")
    refused(tool, "invalid choice: 'shrink'", "shrink", metric)
    refused(tool, "arguments are required: --alpha", "blend", metric, metric, "out.pth")
    blend = ("blend", metric, metric, "--alpha", "half", "out")
    refused(tool, "expected 0.0 to 1.0, got 'half'", *blend)
    refused(tool, "unrecognized arguments: --fast", "info", metric, "--fast")
    refused(tool, "leave kind out", "verify", metric, "--kind", "relative")
