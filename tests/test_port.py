"""What all networks of transformers have in common; transformers' own classes are the reference."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flatdepth.cli import parse_config
from flatdepth.config import NETWORKS, DataConfig, ModelConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import load_weights, open_model, save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.export import export_weights
from flatdepth.models.network import UNITS, freeze, parameter_groups
from flatdepth.models.networks import make_network, network_class
from flatdepth.models.port import TransformersNetwork
from flatdepth.training import runlog
from flatdepth.training.loop import train
from flatdepth.training.memory import simulate
from tests.conftest import REPOSITORY, TinySets

transformers = pytest.importorskip("transformers")

TINY = [
    ("dpt", "tiny", "relative"),
    ("dpt", "tiny", "metric"),
    ("dpt", "tiny_swin2", "relative"),
    ("dpt", "tiny_vit", "relative"),
    ("dpt", "tiny_hybrid", "relative"),
    ("zoedepth", "tiny", "metric"),
    ("zoedepth", "tiny_k", "metric"),
    ("depth_anything_v2_port", "vitt", "metric"),
    ("depth_anything_v2_port", "vitt", "relative"),
]
each_network = pytest.mark.parametrize(("name", "encoder", "kind"), TINY)


def made(name: str, encoder: str, kind: Any, **changes: Any) -> TransformersNetwork:
    torch.manual_seed(0)
    model = make_network(name, encoder, kind=kind, **changes)
    assert isinstance(model, TransformersNetwork)
    return model


def picture(model: TransformersNetwork, rows: int = 2, columns: int = 3, images: int = 2) -> Tensor:
    side = model.multiple
    draw = torch.Generator().manual_seed(1)
    return torch.rand(images, 3, rows * side, columns * side, generator=draw)


def gradients(model: TransformersNetwork) -> dict[str, Tensor | None]:
    image = picture(model)
    prediction = model.train()(image)
    prediction.mul(image[:, :1]).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_network
def test_it_says_what_it_predicts_and_from_which_sides(name: str, encoder: str, kind: Any) -> None:
    model = made(name, encoder, kind, max_depth_m=15.0)
    facts = NETWORKS[name]
    assert (model.units, model.multiple) == (UNITS[kind], facts.multiple)
    prediction = model(picture(model))
    assert prediction.shape == (2, 1, 2 * model.multiple, 3 * model.multiple)
    assert prediction.dtype == torch.float32
    assert prediction.min() >= 0
    assert prediction.max() > prediction.min()
    if kind == "metric" and name != "zoedepth":
        assert prediction.max() <= 15
    with pytest.raises(ValueError, match=f"multiples of {model.multiple}"):
        model(torch.zeros(1, 3, model.multiple, model.multiple + 2))


def test_pictures_are_predicted_at_the_side_that_the_weights_were_trained_at() -> None:
    sides = {
        ("dpt", "beit_large_512"): 512,
        ("dpt", "swin2_tiny_256"): 256,
        ("dpt", "dpt_large"): 384,
        ("dpt", "dpt_hybrid"): 384,
        ("zoedepth", "beit_large_384_k"): 384,
        ("depth_anything_v2_port", "vits"): 518,
    }
    for (name, encoder), side in sides.items():
        with torch.device("meta"):
            model = made(name, encoder, NETWORKS[name].kinds[0])
        assert model.side == side
    model.trained_px = (280, 350)
    assert model.side == 280


@each_network
def test_all_that_trains_gets_a_gradient_and_nothing_else_does(
    name: str, encoder: str, kind: Any
) -> None:
    model = made(name, encoder, kind)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = gradients(model)
    unread = {n for n, g in found.items() if g is None or not g.any()}
    assert unread == {n for n in found if n.startswith(model.unused)}
    freeze(model, "none")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == unread


@each_network
def test_recomputation_changes_no_gradient_and_takes_place(
    name: str, encoder: str, kind: Any
) -> None:
    plain = gradients(made(name, encoder, kind))
    for checkpointing, head_passes in (("none", 1), ("encoder", 1), ("encoder+head", 2)):
        model = made(name, encoder, kind, checkpointing=checkpointing)
        fusion = model.port.neck.fusion_stage.layers[1]
        passes = [
            count_passes(first_linear(model.blocks)),
            count_passes(fusion.residual_layer2.convolution1),
        ]
        found = gradients(model)
        assert [len(p) for p in passes] == [1 if checkpointing == "none" else 2, head_passes]
        for parameter, gradient in plain.items():
            assert gradient is None or torch.equal(gradient, found[parameter]), parameter


def count_passes(module: nn.Module) -> list[None]:
    """A list that gets longer with every forward pass."""
    passes: list[None] = []
    module.register_forward_hook(lambda *_: passes.append(None))
    return passes


def first_linear(blocks: nn.ModuleList) -> nn.Module:
    return next(module for module in blocks.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize(("name", "encoder", "kind"), [*TINY, ("zoedepth", "tiny_nk", "metric")])
@torch.no_grad()
def test_a_picture_is_predicted_alike_in_any_batch_and_every_time(
    name: str, encoder: str, kind: Any
) -> None:
    model = made(name, encoder, kind).train()
    image = picture(model, images=3)
    together = model(image)
    assert torch.equal(model(image), together)
    alone = torch.cat([model(one[None]) for one in image])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4 * float(together.max()))
    torch.testing.assert_close(model.eval()(image), together, rtol=1e-4, atol=1e-4)


@each_network
def test_files_come_back_bit_for_bit_under_the_names_of_transformers(
    name: str, encoder: str, kind: Any, tmp_path: Path
) -> None:
    model = made(name, encoder, kind, max_depth_m=12.5).eval()
    _, safe = save_weights(model, tmp_path / "own")
    model.port.save_pretrained(tmp_path / "theirs")
    own, theirs = (open_names(path) for path in (safe, tmp_path / "theirs" / "model.safetensors"))
    assert own == theirs
    again, report = open_model(str(safe))
    assert report.matched == report.total
    assert type(again) is type(model)
    assert (again.encoder, again.kind) == (encoder, kind)
    assert kind == "relative" or again.max_depth_m == 12.5
    for parameter, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[parameter], tensor), parameter


def open_names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@each_network
def test_parts_freeze_and_every_trained_tensor_is_in_one_group(
    name: str, encoder: str, kind: Any
) -> None:
    model = made(name, encoder, kind)
    inside = {id(p) for p in getattr(model.port, model.encoder_prefix.split(".")[1]).parameters()}
    parameters = dict(model.named_parameters())
    for part, expected in (("encoder", False), ("head", True)):
        freeze(model, part)  # type: ignore[arg-type]
        trained = {n for n, p in parameters.items() if p.requires_grad}
        usable = {n for n in parameters if not n.startswith(model.unused)}
        assert trained == {n for n in usable if (id(parameters[n]) in inside) == expected}
    freeze(model, "none", 2)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert all(id(p) in frozen for block in model.blocks[:2] for p in block.parameters())
    assert not any(id(p) in frozen for p in model.blocks[2].parameters())
    stem = next(m for n, m in model.port.named_modules() if n.endswith("embeddings"))
    assert all(id(p) in frozen for p in stem.parameters())
    freeze(model, "none")
    groups = parameter_groups(model, 1e-4, 10.0, 0.01)
    grouped = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    (still,) = (group["params"] for group in groups if group["name"] == "encoder no decay")
    positions = ("relative_position_bias_table", "position_embeddings", "cls_token", "logit_scale")
    for parameter in parameters:
        if parameter.endswith(positions):
            assert any(parameters[parameter] is p for p in still), parameter  # type: ignore[attr-defined]


FOLDERS = [
    ("dpt", "tiny", (64, 96)),
    ("dpt", "tiny_swin2", (64, 96)),
    ("dpt", "tiny_vit", (96, 96)),
    ("dpt", "tiny_hybrid", (64, 64)),
    ("zoedepth", "tiny", (64, 96)),
    ("zoedepth", "tiny_k", (64, 96)),
    ("zoedepth", "tiny_nk", (64, 96)),
    ("depth_anything_v2_port", "vitt", (42, 70)),
]
"""Sides that transformers takes too."""


def theirs(name: str, encoder: str) -> Any:
    """transformers' own network of a size, at random, as ``from_pretrained`` has it."""
    torch.manual_seed(3)
    spec = json.loads(json.dumps(network_class(name).sizes[encoder]))  # type: ignore[attr-defined]
    if name == "depth_anything_v2_port":
        # Weights that predict something, and neither all 0 nor all of the largest.
        spec |= {"depth_estimation_type": "metric", "max_depth": 20, "initializer_range": 0.1}
    port = getattr(transformers, network_class(name).port_class)  # type: ignore[attr-defined]
    model = port(port.config_class(**spec))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("shard", [None, "100KB"])
@pytest.mark.parametrize(("name", "encoder", "size"), FOLDERS)
def test_a_published_folder_predicts_what_transformers_predicts(
    name: str, encoder: str, size: tuple[int, int], shard: str | None, tmp_path: Path
) -> None:
    reference = theirs(name, encoder)
    reference.save_pretrained(tmp_path / "hub", **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "hub" / "model.safetensors.index.json").is_file() == (shard is not None)
    far = {"max_depth_m": 10.0} if encoder == "tiny_k" else {}
    network = name if name == "depth_anything_v2_port" else None
    model, report = open_model(str(tmp_path / "hub"), network=network, **far)
    assert (model.name, model.encoder, report.matched) == (name, encoder, report.total)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    pixels = (image - model.image_mean) / model.image_std
    with torch.no_grad():
        wanted = reference(pixels).predicted_depth[:, None]
        assert wanted.std() > 1e-3
        torch.testing.assert_close(model(image), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "encoder", "kind"), [t for t in TINY if t[:3] != ("dpt", "tiny", "metric")]
)
def test_an_exported_folder_is_what_transformers_loads(
    name: str, encoder: str, kind: Any, tmp_path: Path
) -> None:
    model = made(name, encoder, kind, max_depth_m=10.0).eval()
    export_weights(model, tmp_path / "folder")
    loaded = transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path / "folder")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert list(processor.image_mean) == pytest.approx(list(model.mean))
    assert processor.ensure_multiple_of == model.multiple
    image = picture(model, rows=2, columns=2, images=1)
    with torch.no_grad():
        found = loaded.eval()((image - model.image_mean) / model.image_std).predicted_depth
        torch.testing.assert_close(found[:, None], model(image), rtol=1e-5, atol=1e-5)


def test_a_kind_that_transformers_does_not_predict_is_not_exported_as_a_folder(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"takes no such model, found metric dpt tiny of 20"):
        export_weights(made("dpt", "tiny", "metric"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["DPTForSemanticSegmentation"]},
            "DPTForDepthEstimation, found DPTForSem",
        ),
        ({"neck_hidden_sizes": [8, 8, 8, 8]}, "one of the sizes .*tiny.*, found other numbers"),
        ({"backbone_config": {"model_type": "dinov2"}}, "found other numbers"),
        ({"backbone_config": "beit"}, "found other numbers"),
    ],
)
def test_a_config_that_is_not_of_a_known_size_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    theirs("dpt", "tiny").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path))


def test_settings_that_are_no_architecture_may_differ(tmp_path: Path) -> None:
    theirs("dpt", "tiny").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"] |= {"drop_path_rate": 0.1, "layer_norm_eps": 1e-12}
    path.write_text(json.dumps(config))
    model, _ = open_model(str(tmp_path))
    image = picture(model)  # type: ignore[arg-type]
    assert torch.equal(model.train()(image), model(image))
    norms = [m for m in model.blocks.modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}


def test_tensors_that_older_files_hold_besides_are_left(tmp_path: Path) -> None:
    theirs("dpt", "tiny").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = "backbone.encoder.layer.0.attention.attention.relative_position_bias"
    assert f"{table}.relative_position_bias_table" in tensors
    tensors[f"{table}.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert "left 1 tensors that are computed" in str(open_model(str(tmp_path))[1])


def test_a_file_is_read_as_the_network_that_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = DepthAnythingV2("vitt", kind="relative").eval()
    _, safe = save_weights(ours, tmp_path / "ours")
    torch.save(ours.state_dict(), tmp_path / "official.pth")
    image = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    for file in (safe, tmp_path / "official.pth"):
        port, report = open_model(str(file), kind="relative", network="depth_anything_v2_port")
        assert (port.name, report.matched) == ("depth_anything_v2_port", report.total)
        with torch.no_grad():
            torch.testing.assert_close(port(image), ours(image), rtol=1e-4, atol=1e-5)
    assert type(open_model(str(safe))[0]) is DepthAnythingV2
    load_weights(made("depth_anything_v2_port", "vitt", "relative"), str(safe))
    with pytest.raises(UserError, match=r"expected tensors of DPT .*, found names such as depth_h"):
        open_model(str(safe), network="dpt")
    with pytest.raises(UserError, match=r"model.name: expected one of .*, found 'vitt'"):
        open_model(str(safe), network="vitt")
    with pytest.raises(UserError, match=r"network is depth_anything_v2 in the file but dpt in"):
        load_weights(made("dpt", "tiny", "relative"), str(safe))


def test_a_simulated_step_leaves_nothing_for_a_real_one() -> None:
    model = made("dpt", "tiny", "relative")
    image = picture(model)
    before = model(image)
    config = TrainConfig(
        batch=2,
        micro_batch=2,
        data=DataConfig(height=64, width=96),
        model=ModelConfig(name="dpt", encoder="tiny", kind="relative"),
    )
    assert simulate(config).peak.total > 0
    assert torch.equal(model(image), before)
    assert torch.equal(made("dpt", "tiny", "relative")(image), before)


def test_depth_is_not_rounded_to_half_precision() -> None:
    for name, encoder, kind in (("dpt", "tiny", "relative"), ("zoedepth", "tiny", "metric")):
        model = made(name, encoder, kind).eval()
        image = picture(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            prediction = model(image)
        with torch.no_grad():
            exact = model(image)
        far = prediction[prediction > 0]
        assert (far != far.bfloat16().float()).float().mean() > 0.9
        assert (prediction - exact).abs().mean() < 0.1 * exact.std()


def test_a_size_that_can_only_predict_is_not_trained() -> None:
    with pytest.raises(UserError, match=r"beit_large_384_nk can only predict; train one of beit_l"):
        ModelConfig(name="zoedepth", encoder="beit_large_384_nk", kind="metric")


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


READY = [("dpt_beit", "dpt", "relative"), ("zoedepth", "zoedepth", "metric")]


@pytest.mark.parametrize(("config", "name", "kind"), READY)
@pytest.mark.usefixtures("without_reports")
def test_its_ready_config_trains_and_a_resumed_run_is_the_uninterrupted_one(
    config: str, name: str, kind: str, tiny_sets: TinySets, tmp_path: Path
) -> None:
    def run(folder: Path) -> Path:
        shrunk = {
            "runs": folder,
            "steps": 4,
            "batch": 2,
            "micro_batch": 1,
            "precision": "no",
            "save_every": 2,
            "tracker": "none",
            "data.train": f"[{{path: {tiny_sets.rooms}}}]",
            "data.art": f"[{tiny_sets.pictures}]",
            "data.height": 64,
            "data.width": 96,
            "data.threads": 1,
            "model.encoder": "tiny",
            "model.checkpoint": "null",
            "optim.lr": 1e-4,
            "eval.every": 100,
            "eval.images": 1,
            "eval.pictures": 0,
        }
        if config == "dpt_beit":
            shrunk["optim.warmup"] = 1
        arguments = [f"--{key}={value}" for key, value in shrunk.items()]
        file = REPOSITORY / "configs" / f"{config}.yaml"
        train(
            parse_config(
                TrainConfig, [f"--config={file}", *arguments], prog="train.py", description=None
            )
        )
        return folder / config

    whole = run(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "half" / config)
    shutil.rmtree(tmp_path / "half" / config / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "half" / config / "weights")
    resumed = run(tmp_path / "half")
    models = [open_model(str(f / "weights" / "final.safetensors"))[0] for f in (whole, resumed)]
    assert [(model.name, model.kind, model.encoder) for model in models] == [
        (name, kind, "tiny")
    ] * 2
    states = [model.state_dict() for model in models]
    start = made(name, "tiny", kind).state_dict()
    assert any(not torch.equal(states[0][key], start[key]) for key in start)
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    assert (whole / "weights" / "final.md").read_text().count("multiples of 32") == 1


@pytest.mark.parametrize(("config", "name", "kind"), READY)
def test_the_head_of_its_ready_config_says_what_it_takes(config: str, name: str, kind: str) -> None:
    path = REPOSITORY / "configs" / f"{config}.yaml"
    head = path.read_text().split("name:")[0]
    for part in (
        f"--config configs/{path.name}",
        "Hardware:",
        "Expected memory:",
        "Licence",
        "'.[compare]'",
    ):
        assert part in head, part
    ready = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    assert (ready.model.name, ready.model.kind) == (name, kind)
    assert (ready.model.checkpoint or "").startswith("Intel/")


def test_without_transformers_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"model.name dpt needs .*pip install 'flatdepth\[compare\]'"
    ):
        made("dpt", "tiny", "relative")


def test_looking_for_the_network_of_a_file_does_not_import_transformers() -> None:
    code = (
        "import sys; from flatdepth.models.networks import CLASSES, network_class;"
        "print([network_class(name).renamed({}) for name in CLASSES]);"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
