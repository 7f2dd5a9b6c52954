"""Weight files: round trips, every recognised layout, every refusal by its message."""

import argparse
import copy
import json
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from accelerate import Accelerator
from huggingface_hub.errors import RemoteEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import flatdepth
from flatdepth.__main__ import run
from flatdepth.config import DataConfig, ModelConfig, SetConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import (
    INDEX,
    load_weights,
    open_model,
    read_metadata,
    read_weights,
    save_weights,
)
from flatdepth.models.depth_anything import ENCODERS, DepthAnythingV2, EncoderSpec
from flatdepth.models.huggingface import to_huggingface
from flatdepth.training.loop import build_model
from tests.conftest import REPOSITORY, TinySets

IMAGES = str(REPOSITORY / "tests" / "data" / "rgbd" / "redwood" / "image")

TOTAL = 155
"""Tensors of ``vitt``: 5 + 6 blocks of 14 + 2 of the final norm + 64 of the head."""


SMALL = EncoderSpec(
    embed_dim=48, depth=5, heads=3, taken=(0, 2, 3, 4), features=16, out_channels=(8, 8, 8, 8)
)


@pytest.fixture(autouse=True)
def _small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "small", SMALL)


def make(seed: int = 0, encoder: str = "vitt", **options: object) -> DepthAnythingV2:
    return copy.deepcopy(_made(seed, encoder, **options))


@cache
def _made(seed: int, encoder: str, **options: object) -> DepthAnythingV2:
    torch.manual_seed(seed)
    return DepthAnythingV2(encoder, **{"kind": "metric", **options})


def state(seed: int = 0, encoder: str = "vitt") -> dict[str, Tensor]:
    """A plain state dict that differs from the initialisation in every tensor."""
    return dict(_state(seed, encoder))


@cache
def _state(seed: int, encoder: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(t.shape, generator=generator)
        for name, t in make(encoder=encoder).state_dict().items()
    }


def holds(model: DepthAnythingV2, tensors: dict[str, Tensor]) -> bool:
    """Whether the model's tensors are these, bit for bit; others are not looked at."""
    own = model.state_dict()
    return all(torch.equal(own[name], t) for name, t in tensors.items())


def encoder_of(tensors: dict[str, Tensor], prefix: str = "pretrained.") -> dict[str, Tensor]:
    return {
        prefix + name.removeprefix("pretrained."): t
        for name, t in tensors.items()
        if name.startswith("pretrained.")
    }


def refused(
    match: str, source: Path | str, model: DepthAnythingV2 | None = None, **options: str
) -> None:
    """Loading must fail with this message and leave the model alone."""
    model = model or make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match=match) as caught:
        load_weights(model, str(source), **options)
    assert Path(source).name.split(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert holds(model, before)


ANY_MODEL = make()
"""For loads that never reach the model."""


# Round trips.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("kind", "units"), [("metric", "m"), ("relative", "1/depth")])
def test_saving_and_loading_is_bit_exact(
    suffix: str, kind: str, units: str, tmp_path: Path
) -> None:
    model = make(0, kind=kind, max_depth_m=80.0)
    model.load_state_dict(state(7))
    stem = tmp_path / "runs" / "best.v1"
    paths = save_weights(model, stem, extra={"step": "1200"})
    assert paths == (tmp_path / "runs/best.v1.pth", tmp_path / "runs/best.v1.safetensors")
    path = tmp_path / f"runs/best.v1{suffix}"

    other = make(1, kind=kind, max_depth_m=80.0)
    report = load_weights(other, str(path))
    assert holds(other, state(7))
    metadata = {
        "format": "flatdepth",
        "network": "depth_anything_v2",
        "encoder": "vitt",
        "kind": kind,
        "units": units,
        "version": flatdepth.__version__,
        "step": "1200",
    }
    if kind == "metric":
        metadata["max_depth_m"] = "80.0"
    assert report.metadata == metadata
    assert read_metadata(path) == metadata
    assert (report.matched, report.total, report.fresh, report.unwrapped) == (TOTAL, TOTAL, (), ())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_say_the_size_that_they_were_trained_at(suffix: str, tmp_path: Path) -> None:
    model = make(0, kind="metric", max_depth_m=80.0)
    save_weights(model, tmp_path / "unknown")
    model.trained_px = (168, 224)
    save_weights(model, tmp_path / "known")
    unknown, _ = open_model(str(tmp_path / f"unknown{suffix}"))
    known, report = open_model(str(tmp_path / f"known{suffix}"))
    assert (unknown.trained_px, unknown.side) == (None, 518)
    assert (known.trained_px, known.side) == ((168, 224), 168)
    assert report.metadata is not None and report.metadata["input_px"] == "168 x 224"
    assert known.like().trained_px == (168, 224)


def test_saved_files_are_plain_and_complete(tmp_path: Path) -> None:
    """What the original code does: ``load_state_dict(torch.load(path), strict=True)``."""
    model = make()
    pth, safe = save_weights(model, tmp_path / "model")
    for tensors in (torch.load(pth, weights_only=True), load_file(safe)):
        assert type(tensors) is dict
        assert {type(t) for t in tensors.values()} == {Tensor}
        assert not any(t.requires_grad for t in tensors.values())
        assert list(tensors.keys() ^ model.state_dict().keys()) == []
        make(1).load_state_dict(tensors, strict=True)
    with safetensors.safe_open(safe, framework="pt") as file:
        assert file.metadata()["format"] == "flatdepth"
    assert json.loads((tmp_path / "model.json").read_text())["encoder"] == "vitt"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.json",
        "model.pth",
        "model.safetensors",
    ]
    (tmp_path / "ordinary").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    pth, safe = save_weights(make(0), tmp_path / "model")
    old = pth.read_bytes()
    with pytest.raises(UserError, match=r"model\.json.*model\.pth.*overwrite=True"):
        save_weights(make(1), tmp_path / "model")
    assert pth.read_bytes() == old
    safe.unlink()
    pth.unlink()
    with pytest.raises(UserError, match=r"model\.json would be overwritten"):
        save_weights(make(1), tmp_path / "model")
    save_weights(make(1), tmp_path / "model", overwrite=True)
    assert holds(make(1), torch.load(pth, weights_only=True))


def test_an_interrupted_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save_weights(make(0), tmp_path / "model", extra={"step": "1"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def break_off(_tensors: object, path: Path, _metadata: object) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_weights(make(1), tmp_path / "model", extra={"step": "2"}, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert holds(make(0), torch.load(paths[0], weights_only=True))


def test_extra_metadata_may_not_redefine_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="redefines kind"):
        save_weights(make(), tmp_path / "model", extra={"kind": "relative"})
    assert list(tmp_path.iterdir()) == []


# Layouts that are understood.


def in_wrapper(tensors: dict[str, Tensor]) -> object:
    prefixed = {f"module.{name}": t for name, t in tensors.items()}
    return {"model": prefixed, "optimizer": {"state": {}}, "epoch": 3, "previous_best": {"d1": 0.9}}


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda tensors: tensors, ()),
        (
            lambda tensors: {f"module.{name}": t for name, t in tensors.items()},
            ("took the prefix 'module.' off every name",),
        ),
        (
            lambda tensors: {f"module._orig_mod.{name}": t for name, t in tensors.items()},
            ("took the prefix 'module._orig_mod.' off every name",),
        ),
        (lambda tensors: {"state_dict": tensors}, ("took the entry 'state_dict'",)),
        (
            in_wrapper,
            (
                "took the entry 'model' and left 'optimizer', 'epoch', 'previous_best'",
                "took the prefix 'module.' off every name",
            ),
        ),
    ],
    ids=["flat", "ddp", "compiled-ddp", "state_dict", "official-training"],
)
def test_wrappers_are_taken_off_and_reported(
    wrap: Callable[[dict[str, Tensor]], object], notes: Sequence[str], tmp_path: Path
) -> None:
    torch.save(wrap(state(3)), tmp_path / "latest.pth")
    model = make()
    report = load_weights(model, str(tmp_path / "latest.pth"))
    assert holds(model, state(3))
    assert report.unwrapped == tuple(notes)
    assert report.metadata is None
    assert (report.matched, report.total) == (TOTAL, TOTAL)
    text = str(report)
    assert "\n" not in text
    assert "loaded 155 of 155 tensors" in text
    assert "latest.pth" in text
    assert all(note in text for note in notes)


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in tensors.items()}


LIGHTNING = {"epoch": 1, "loops": {}, "optimizer_states": [], "hyper_parameters": {"lr": 0.1}}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
LOSS = {"loss.lpips.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("file", "wrap", "notes"),
    [
        (
            "epoch=1-step=20.ckpt",
            lambda t: {**LIGHTNING, "state_dict": prefixed(t, "model.") | LOSS},
            (
                "took the entry 'state_dict' and left 'epoch', 'loops', 'optimizer_states', ...",
                "took the prefix 'model.' off every name and left loss.lpips.weight",
            ),
        ),
        (
            "last.ckpt",
            lambda t: {"state_dict": prefixed(to_huggingface(t), "net._orig_mod."), **LIGHTNING},
            (
                "took the entry 'state_dict' and left 'epoch', 'loops', 'optimizer_states', ...",
                "took the prefix 'net._orig_mod.' off every name",
                "renamed the tensors from the layout of transformers",
            ),
        ),
        *(
            (
                "last.pt",
                lambda t, entry=entry: {"optimizer": OPTIMIZER, entry: t},
                (f"took the entry {entry!r} and left 'optimizer'",),
            )
            for entry in ("ema", "model_ema", "teacher", "student", "params", "weights")
        ),
        (
            "pytorch_model.bin",
            lambda t: {"trainer": {"state": {"network": prefixed(t, "depth_anything.")}}},
            (
                "took the entry 'trainer'",
                "took the entry 'state'",
                "took the entry 'network'",
                "took the prefix 'depth_anything.' off every name",
            ),
        ),
        ("mixed.pth", lambda t: {"epoch": 3, **t}, ("left 'epoch'",)),
    ],
)
def test_the_network_is_found_in_what_trainings_save(
    file: str,
    wrap: Callable[[dict[str, Tensor]], object],
    notes: Sequence[str],
    tmp_path: Path,
) -> None:
    torch.save(wrap(state(3)), tmp_path / file)
    weights = read_weights(str(tmp_path / file))
    assert weights.unwrapped == tuple(notes)
    assert weights.tensors.keys() == state(3).keys()
    assert all(torch.equal(weights.tensors[name], t) for name, t in state(3).items())


def compiled_inside(model: DepthAnythingV2) -> nn.Module:
    model.pretrained.blocks[1] = torch.compile(model.pretrained.blocks[1])
    return model


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.compile, compiled_inside])
def test_what_torch_puts_around_modules_is_taken_off(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = make()
    model.load_state_dict(state(3))
    torch.save(wrap(model).state_dict(), tmp_path / "last.pth")
    weights = read_weights(str(tmp_path / "last.pth"))
    assert weights.tensors.keys() == state(3).keys()
    assert all(torch.equal(weights.tensors[name], t) for name, t in state(3).items())


@pytest.mark.parametrize(
    ("networks", "taken"),
    [
        (("model", "ema"), "ema"),
        (("state_dict_ema", "state_dict"), "state_dict_ema"),
        (("teacher", "student"), "student"),
        (("params", "teacher", "swa_params"), "swa_params"),
        (("generator", "model"), "generator"),
    ],
)
def test_of_several_networks_one_is_preferred_and_named(
    networks: Sequence[str], taken: str, tmp_path: Path
) -> None:
    seeds = {name: seed for seed, name in enumerate(networks, start=3)}
    content = {name: state(seed) for name, seed in seeds.items()}
    # A network without a head, such as one that features are compared with, never goes first.
    torch.save({"ema_features": encoder_of(state(9)), **content}, tmp_path / "last.pth")
    model = make()
    report = load_weights(model, str(tmp_path / "last.pth"))
    assert holds(model, state(seeds[taken]))
    assert f"of the networks {', '.join(networks)} took {taken}; took the entry" in str(report)


def test_networks_side_by_side_in_one_dict_are_told_apart(tmp_path: Path) -> None:
    both = prefixed(state(3), "model.") | prefixed(state(4), "model_ema.module.")
    torch.save({"state_dict": both}, tmp_path / "last.ckpt")
    weights = read_weights(str(tmp_path / "last.ckpt"))
    assert all(torch.equal(weights.tensors[name], t) for name, t in state(4).items())
    assert weights.unwrapped[0] == (
        "of the networks state_dict.model, state_dict.model_ema.module took "
        "state_dict.model_ema.module"
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    half = {name: t.to(dtype) for name, t in state(4).items()}
    path = tmp_path / f"half{suffix}"
    torch.save(half, path) if suffix == ".pth" else save_file(half, path)
    model = make()
    report = load_weights(model, str(path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert holds(model, {name: t.float() for name, t in half.items()})
    assert report.unwrapped == (f"converted 155 tensors from {dtype} to torch.float32",)


def test_a_plain_dinov2_encoder_needs_a_fresh_head(tmp_path: Path) -> None:
    path = tmp_path / "dinov2_pretrain.pth"
    torch.save(encoder_of(state(5), prefix=""), path)
    refused("plain DINOv2 encoder.* holds no depth head.*head='fresh'", path)
    model = make()
    head = {name: t for name, t in make().state_dict().items() if name.startswith("depth_head.")}
    report = load_weights(model, str(path), head="fresh")
    assert holds(model, encoder_of(state(5)))
    assert holds(model, head)
    assert set(report.fresh) == set(head)
    assert report.matched + len(report.fresh) == report.total == TOTAL
    assert report.unwrapped == (
        "put the prefix 'pretrained.' before every name of a plain DINOv2 encoder",
    )
    assert f"{len(head)} kept their initialisation" in str(report)


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_the_layout_of_transformers_is_read(kind: str, tmp_path: Path) -> None:
    source = make(3, kind=kind)
    path = tmp_path / "somewhere.safetensors"
    save_file(to_huggingface(source.state_dict()), path, {"format": "pt"})
    model = make(4, kind=kind)
    report = load_weights(model, str(path))
    assert holds(model, source.state_dict())
    assert report.unwrapped == ("renamed the tensors from the layout of transformers",)


def test_the_teacher_of_dinov2_is_an_encoder(tmp_path: Path) -> None:
    teacher = encoder_of(state(5), "backbone.") | {"dino_head.mlp.0.weight": torch.zeros(2)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    model = make()
    report = load_weights(model, str(tmp_path / "teacher_checkpoint.pth"), head="fresh")
    assert holds(model, encoder_of(state(5)))
    assert "'backbone.' off every name and left dino_head.mlp.0.weight" in str(report)


def test_the_encoder_of_transformers_needs_a_fresh_head(tmp_path: Path) -> None:
    """``Dinov2Model``, as in facebook/dinov2-small."""
    path = tmp_path / "model.safetensors"
    theirs = to_huggingface(encoder_of(state(5)))
    save_file({name.removeprefix("backbone."): t for name, t in theirs.items()}, path)
    refused("layout of transformers.* holds no depth head", path)
    model = make()
    load_weights(model, str(path), head="fresh")
    assert holds(model, encoder_of(state(5)))


def test_a_fresh_head_leaves_out_the_head_of_the_file(tmp_path: Path) -> None:
    torch.save(state(6), tmp_path / "model.pth")
    model = make()
    head = {name: t for name, t in make().state_dict().items() if name.startswith("depth_head.")}
    report = load_weights(model, str(tmp_path / "model.pth"), head="fresh")
    assert holds(model, encoder_of(state(6)))
    assert holds(model, head)
    assert set(report.fresh) == set(head)


# Refusals.


def test_a_missing_head_is_explained(tmp_path: Path) -> None:
    torch.save(encoder_of(state()), tmp_path / "encoder.pth")
    refused("holds no depth head .*head='fresh'", tmp_path / "encoder.pth")


def test_another_encoder_is_named(tmp_path: Path) -> None:
    """Only widths and block counts are looked at, so the big file can be a thin one."""
    thin = {f"pretrained.blocks.{i}.norm1.bias": torch.zeros(1) for i in range(24)}
    torch.save({**thin, "pretrained.cls_token": torch.zeros(1, 1, 1024)}, tmp_path / "l.pth")
    message = (
        r"expected encoder vitt \(width 128, 6 blocks\), found vitl \(width 1024, 24 blocks\); "
        "set encoder to vitl"
    )
    refused(message, tmp_path / "l.pth")
    refused(message, tmp_path / "l.pth", head="fresh")
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, 100)}, tmp_path / "odd.pth")
    refused(r"found one of no known size \(width 100, 0 blocks\)", tmp_path / "odd.pth")
    torch.save(state(encoder="small"), tmp_path / "small.pth")
    refused("found small", tmp_path / "small.pth")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("backbone.embeddings.cls_token", ()),
        ("neck.convs.0.weight", (3,)),
        ("embeddings.patch_embeddings.projection.weight", (3,)),
        ("encoder.layer.0.norm1.weight", (3,)),
        ("encoder.layer.0.attention.attention.query.weight", ()),
    ],
)
def test_part_of_the_transformers_layout_is_refused_by_official_names(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape)}, tmp_path / "part.safetensors", {"format": "pt"})
    refused(
        r"part\.safetensors .*\(renamed the tensors from the layout of transformers\)",
        tmp_path / "part.safetensors",
    )


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors["pretrained.blocks.3.ls1.gamma"]


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["pretrained.register_tokens"] = torch.zeros(1, 4, 128)


def reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors["pretrained.pos_embed"] = torch.zeros(1, 257, 128)


def quantise_one(tensors: dict[str, Tensor]) -> None:
    name = "depth_head.scratch.output_conv1.weight"
    tensors[name] = tensors[name].to(torch.int8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_one, r"1 tensors are missing \(pretrained\.blocks\.3\.ls1\.gamma\)"),
        (add_one, r"1 are unexpected \(pretrained\.register_tokens\)"),
        (
            reshape_one,
            r"1 differ \(pretrained\.pos_embed: expected float32\[1, 1370, 128\], "
            r"found float32\[1, 257, 128\]\)",
        ),
        (quantise_one, r"output_conv1\.weight: expected float32\[16, 32, 3, 3\], found int8"),
    ],
)
def test_one_wrong_tensor_is_enough(
    spoil: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    tensors = state()
    spoil(tensors)
    torch.save(tensors, tmp_path / "spoilt.pth")
    refused(message, tmp_path / "spoilt.pth")


def test_a_strange_file_matches_nothing(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    message = r"none of its 2 tensors .*expected names such as pretrained.*found conv1\.weight"
    refused(message, tmp_path / "resnet.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a dict of named tensors, found an empty dict"),
        ([torch.zeros(2)], "expected a dict of named tensors, found list"),
        ({"epoch": 3, "weights": {}}, "found a dict of 'epoch': int, 'weights': dict"),
    ],
)
def test_other_contents_are_named(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    refused(message, tmp_path / "other.pth")


def test_the_metric_models_of_version_1_are_not_taken_for_version_2(tmp_path: Path) -> None:
    """Their tensors are named alike inside ZoeDepth's ``core.core``; their head reads others."""
    torch.save({"model": prefixed(state(), "core.core.")}, tmp_path / "indoor.pt")
    refused(r"none of its 155 tensors .* found core\.core\.pretrained", tmp_path / "indoor.pt")


def test_dicts_that_hold_themselves_are_looked_into_once(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content |= {"model": content, "copy": {"model": content}}
    torch.save(content, tmp_path / "ring.pth")
    refused(
        "expected a dict of named tensors, found a dict of 'model': dict", tmp_path / "ring.pth"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_program_is_not_run(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    refused("is a TorchScript program.*save that alone", tmp_path / "script.pt")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    message = r"holds getattr besides tensors.*could run code.*save its state dict alone"
    refused(message, tmp_path / "bomb.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    refused(message, tmp_path / "bare.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            {"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1e-4)},
            [],
            "holds argparse.Namespace besides tensors, and only tensors are loaded because "
            "anything else could run code; where you trust the file, save its state dict alone, as "
            "in torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')",
        ),
        ({"epoch": 3}, [], "found a dict of 'epoch': int; save the model's state dict"),
        ("relative", ["--kind=metric", "--max_depth_m=20"], "a relative model read as metric"),
        ("metric", ["--kind=relative"], "a metric model read as relative; set kind to metric"),
    ],
)
def test_every_command_refuses_a_file_by_the_same_sentence(
    content: object, options: list[str], message: str, tmp_path: Path, tiny_sets: TinySets
) -> None:
    if isinstance(content, str):
        content = constant({"relative": 8.8, "metric": -2.6}[content])
    file = str(tmp_path / "last.ckpt")
    torch.save(content, file)
    said = dict(option.removeprefix("--").split("=") for option in options)
    model = ModelConfig(encoder="vitt", checkpoint=file, kind=said.get("kind", "metric"))
    config = TrainConfig(data=DataConfig(train=[SetConfig(path="none")]), model=model)
    calls: list[Callable[[], object]] = [
        lambda: build_model(config, Accelerator(cpu=True)),
        lambda: run(["predict", "--checkpoint", file, IMAGES, f"--out={tmp_path}/out", *options]),
        lambda: run(["evaluate", "--checkpoint", file, f"--data={tiny_sets.rooms}", *options]),
        lambda: run(["checkpoint", "verify", file, *options]),
    ]
    refusals = []
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        refusals.append(str(caught.value))
    assert len(set(refusals)) == 1, refusals
    assert message in refusals[0]
    assert "\n" not in refusals[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_unreadable(suffix: str, tmp_path: Path) -> None:
    paths = save_weights(make(), tmp_path / "cut")
    path = next(path for path in paths if path.suffix == suffix)
    path.write_bytes(path.read_bytes()[:5000])
    refused("cannot be read .*fetch or save it again", path)


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".pth", ".safetensors"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_in_one_sentence(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_weights(ANY_MODEL, str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    refused("no such file; give a weight file or a hub id", tmp_path / "gone.pth")
    refused("no such file", "weights/gone.pth")
    refused("no such file", "gone")
    refused("expected one .* in it, found no weight file; name the file as in", tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    refused(r"ends in \.safetensors, \.pth, .*\.ckpt.*found model\.onnx", tmp_path / "model.onnx")


# The constant prediction of weights that are read as the other kind.


def constant(logit: float, encoder: str = "vitt") -> dict[str, Tensor]:
    """A model whose every logit is ``logit``."""
    tensors = dict(make(encoder=encoder).state_dict())
    tensors["depth_head.scratch.output_conv2.2.weight"] = torch.zeros(1, 32, 1, 1)
    tensors["depth_head.scratch.output_conv2.2.bias"] = torch.tensor([logit])
    return tensors


@pytest.mark.parametrize("name", ["unknown.pth", "model.safetensors"])
def test_relative_weights_read_as_metric_are_refused(name: str, tmp_path: Path) -> None:
    """8.8 is the published logit of Depth Anything Small; the sigmoid's depth is 19.997 m."""
    path = tmp_path / name
    torch.save(constant(8.8), path) if path.suffix == ".pth" else save_file(constant(8.8), path)
    message = r"predicts 20\.0 of 20 m, .* of a relative model read as metric; set kind to relative"
    refused(message, path)
    load_weights(make(kind="relative"), str(path))
    load_weights(make(), str(path), head="fresh")


def test_metric_weights_read_as_relative_are_refused(tmp_path: Path) -> None:
    """-2.6 is the published logit of the metric indoor Small: 20 m x sigmoid = 1.4 m."""
    torch.save(constant(-2.6), tmp_path / "metric.pth")
    message = r"predicts 0 at 100\.0% of the pixels .* of a metric model read as relative"
    refused(message, tmp_path / "metric.pth", make(kind="relative"))
    load_weights(make(kind="relative"), str(tmp_path / "metric.pth"), head="fresh")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    torch.save(constant(float("nan")), tmp_path / "broken.pth")
    refused("predicts values that are not finite", tmp_path / "broken.pth")


@pytest.mark.parametrize("max_depth_m", [5.0, 20.0, 80.0])
def test_a_wrong_maximum_depth_is_doubted(max_depth_m: float, tmp_path: Path) -> None:
    """Trained weights without their metadata, whose maximum is 80 m."""
    path = tmp_path / "unknown.safetensors"
    save_file(load_file(REPOSITORY / "shards" / "demo_vitt.safetensors"), path)
    report = load_weights(make(max_depth_m=max_depth_m), str(path))
    if max_depth_m == 80:
        assert report.doubts == ()
    else:
        assert len(report.doubts) == 1
        assert f"check that max_depth_m {max_depth_m:g} is what" in report.doubts[0]
        assert "Doubtful: it predicts a median of" in str(report)


def test_our_own_metadata_is_believed(tmp_path: Path) -> None:
    """A model in training may predict anything; it still loads."""
    model = make()
    model.load_state_dict(constant(8.8))
    paths = save_weights(model, tmp_path / "early")
    for path in paths:
        assert load_weights(make(), str(path)).doubts == ()


# The model that a file holds.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_a_file_of_ours_says_all_that_its_model_needs(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    save_weights(make(2, kind=kind, max_depth_m=35.0), tmp_path / "model")
    model, _ = open_model(str(tmp_path / f"model{suffix}"))
    assert (model.encoder, model.kind, model.training) == ("vitt", kind, False)
    assert kind == "relative" or model.max_depth_m == 35
    assert holds(model, make(2, kind=kind).state_dict())


def test_what_a_file_does_not_say_has_to_be_given(tmp_path: Path) -> None:
    """And no argument may gainsay what the file says."""
    path, whole = tmp_path / "unknown.pth", constant(-1.5)
    torch.save(whole, path)
    for options, message in (
        ({}, "does not say its kind, and its logits look metric; give --kind metric"),
        ({"kind": "metric"}, "does not say its maximum depth; give --max_depth_m"),
        ({"kind": "relative"}, "metric model read as relative"),
        ({"kind": "metric", "max_depth_m": -1.0}, "max_depth_m: expected 0.01 to 100000.0, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(str(path), **options)
    model, _ = open_model(str(path), kind="metric", max_depth_m=20.0)
    assert holds(model, whole)
    said = str(save_weights(make(max_depth_m=80.0), tmp_path / "model")[0])
    for options, message in (
        ({"kind": "relative"}, "says that its kind is metric, so relative would misread it"),
        ({"max_depth_m": 20.0}, r"says that its max_depth_m is 80\.0, so 20\.0 would misread it"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(said, **options)
    assert open_model(said, kind="metric", max_depth_m=80.0)[0].max_depth_m == 80


def test_files_that_are_no_whole_model_are_not_opened(tmp_path: Path) -> None:
    for name, tensors, message in (
        ("encoder.pth", encoder_of(state()), "holds no depth head and so predicts nothing"),
        ("dino.pth", encoder_of(state(), ""), "plain DINOv2.* holds no depth head"),
        ("resnet.pth", {"fc.bias": torch.zeros(2)}, "expected an encoder .* found no encoder"),
        (
            "huge.pth",
            {"pretrained.cls_token": torch.zeros(1, 1, 9)},
            r"found one of width and depth \(9, 0\)",
        ),
    ):
        torch.save(tensors, tmp_path / name)
        with pytest.raises(UserError, match=message):
            open_model(str(tmp_path / name), kind="relative")


def test_the_official_names_say_what_the_files_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model plays vits; only its name says that it is metric, and up to how far."""
    monkeypatch.setitem(ENCODERS, "vits", SMALL)
    monkeypatch.delitem(ENCODERS, "small")
    for name, kind, far in (
        ("depth_anything_v2_metric_hypersim_vits.pth", "metric", 20),
        ("depth_anything_v2_metric_vkitti_vits.pth", "metric", 80),
        ("depth_anything_v2_vits.pth", "relative", None),
        ("depth_anything_v2_metric_hypersim_vits_fp16.safetensors", "metric", 20),
    ):
        path = tmp_path / name
        tensors = {n: t.clone() for n, t in make(0, "vits", kind=kind).state_dict().items()}
        torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)
        model, report = open_model(str(path))
        assert (model.kind, far is None or model.max_depth_m == far) == (kind, True)
        assert "Its official name says: " in str(report)
    wrong = str(tmp_path / "depth_anything_v2_metric_vkitti_vits.pth")
    report = load_weights(make(0, "vits"), wrong)
    assert "max_depth_m is 80.0 by the file's official name but 20.0" in report.doubts[0]
    assert "Doubtful: max_depth_m is 80.0" in str(report)
    assert open_model(wrong, max_depth_m=20.0)[1].doubts == report.doubts
    with pytest.raises(UserError, match=r"found vits \(width 48, 5 blocks\); set encoder to vits"):
        load_weights(make(), wrong)
    torch.save(constant(8.8, "vits"), wrong)
    with pytest.raises(UserError, match="weights of a relative model read as metric"):
        open_model(wrong)
    torch.save(tensors, tmp_path / "depth_anything_vits14.pth")
    with pytest.raises(UserError, match="a file of Depth Anything version 1"):
        open_model(str(tmp_path / "depth_anything_vits14.pth"))


# Folders.


def shard(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors as two files and their index; gives which file each is in."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = dict(zip(names, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True))
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    places = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_a_folder_means_what_its_index_names(tmp_path: Path) -> None:
    shard(tmp_path, state(3))
    for source in (tmp_path, tmp_path / INDEX):
        weights = read_weights(str(source))
        assert weights.tensors.keys() == state(3).keys()
        assert all(torch.equal(weights.tensors[name], t) for name, t in state(3).items())
        sizes = [path.stat().st_size for path in tmp_path.glob("*-of-*")]
        assert weights.file_bytes == sum(sizes)
    save_file(state(4), tmp_path / "model.safetensors")
    weights = read_weights(str(tmp_path))
    assert all(torch.equal(weights.tensors[name], t) for name, t in state(4).items())


def test_a_folder_with_one_weight_file_means_that(tmp_path: Path) -> None:
    torch.save(state(3), tmp_path / "last.ckpt")
    (tmp_path / "hparams.yaml").touch()
    assert read_weights(str(tmp_path)).path == tmp_path / "last.ckpt"


FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / FIRST).unlink(), f"{FIRST}, which {INDEX} names, is missing"),
        (lambda folder: (folder / FIRST).write_bytes(b"x"), f"{FIRST} cannot be read"),
        (
            lambda folder: save_file({"other": torch.zeros(1)}, folder / FIRST),
            f"{FIRST} and {INDEX} do not name the same tensors",
        ),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
            "names of .safetensors files in its own folder, found '../a.safetensors' for a",
        ),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "a.pth"}}'),
            "found 'a.pth' for a",
        ),
        (lambda folder: (folder / INDEX).write_text("[1]"), "weight_map .* found none"),
        (lambda folder: (folder / INDEX).write_text("[" * 10**5), "cannot be read"),
        (
            lambda folder: (folder / INDEX).write_bytes(b" " * (2**24 + 1)),
            "larger than 16 MiB",
        ),
    ],
)
def test_a_damaged_index_is_one_sentence(
    spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    shard(folder, state(3))
    save_file(state(3), tmp_path / "a.safetensors")
    spoil(folder)
    refused(message, folder)


# Metadata.


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"kind": "depth"}, "kind depth, max_depth_m None"),
        ({"kind": "metric"}, "kind metric, max_depth_m None"),
        ({"kind": "metric", "max_depth_m": "far"}, "kind metric, max_depth_m far"),
        ({"kind": "metric", "max_depth_m": "-1"}, "kind metric, max_depth_m -1"),
    ],
)
def test_damaged_metadata_is_refused(said: dict[str, str], shown: str, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model.safetensors", {"format": "flatdepth", **said})
    refused(f"expected in its metadata the kind .* found {shown}", tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "relative"}, "kind is metric in the file but relative in the model"),
        ({"max_depth_m": 20}, r"max_depth_m is 80\.0 in the file but 20\.0 in the model"),
        ({"encoder": "small"}, "encoder is vitt in the file but small in the model"),
    ],
)
def test_metadata_must_agree(
    suffix: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_weights(make(max_depth_m=80.0), tmp_path / "model")
    model = make(**{"max_depth_m": 80.0, **options})
    refused(message, tmp_path / f"model{suffix}", model)


def test_a_fresh_head_needs_only_the_encoder_to_agree(tmp_path: Path) -> None:
    """Kind and maximum depth say what a head's output means, and that head is not loaded."""
    source = make(0, kind="relative")
    _, safe = save_weights(source, tmp_path / "model")
    model = make(1, kind="metric", max_depth_m=80.0)
    report = load_weights(model, str(safe), head="fresh")
    assert holds(model, encoder_of(source.state_dict()))
    assert report.metadata is not None
    assert report.metadata["kind"] == "relative"
    refused("encoder is vitt in the file", safe, make(encoder="small"), head="fresh")


def test_files_of_others_have_no_metadata(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "other.safetensors", {"format": "pt", "encoder": "vitl"})
    assert read_metadata(tmp_path / "other.safetensors") is None
    assert load_weights(make(), str(tmp_path / "other.safetensors")).metadata is None
    torch.save(state(), tmp_path / "other.pth")
    assert read_metadata(tmp_path / "other.pth") is None
    for foreign in ('{"lr": 1e-4}', "[1, 2]"):
        (tmp_path / "other.json").write_text(foreign)
        assert read_metadata(tmp_path / "other.pth") is None
    (tmp_path / "other.json").write_text('{"format": "flatd')
    refused(r"other\.json cannot be read", tmp_path / "other.pth")


# The hub, played by a folder.


class Hub:
    """Answers like the hub's client for repositories that are folders: root/org/name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list_repo_files(self, repo: str) -> list[str]:
        folder = self.root / repo
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def hf_hub_download(self, repo: str, file: str) -> str:
        path = self.root / repo / file
        if not path.is_file():
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    client = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", client.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", client.hf_hub_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub/org/depth").mkdir(parents=True)
    return tmp_path / "hub/org/depth"


def test_the_only_weight_file_of_a_repository_is_taken(hub: Path) -> None:
    (hub / "README.md").touch()
    torch.save(state(8), hub / "official.pth")
    model = make()
    report = load_weights(model, "org/depth")
    assert holds(model, state(8))
    assert report.source == "org/depth"
    assert report.metadata is None
    save_file(state(9), hub / "model.safetensors")
    load_weights(model, "org/depth")
    assert holds(model, state(9))
    load_weights(model, "org/depth/official.pth")
    assert holds(model, state(8))


def test_the_sidecar_comes_along_from_the_hub(hub: Path) -> None:
    save_weights(make(max_depth_m=80.0), hub / "fine" / "model")
    report = load_weights(make(max_depth_m=80.0), "org/depth/fine/model.pth")
    assert report.metadata is not None
    assert report.metadata["max_depth_m"] == "80.0"
    refused("max_depth_m is 80.0 in the file", "org/depth/fine/model.pth")


def test_all_files_of_an_index_come_along_from_the_hub(hub: Path) -> None:
    shard(hub, state(8))
    weights = read_weights("org/depth")
    assert all(torch.equal(weights.tensors[name], t) for name, t in state(8).items())
    (hub / "model-00002-of-00002.safetensors").unlink()
    refused(r"model-00002-of-00002\.safetensors, which .* names, is missing", "org/depth")


def test_a_choice_of_files_is_left_to_the_user(hub: Path) -> None:
    refused("found no weight file; name the file as in org/depth/FILE", "org/depth")
    for name in ("s.safetensors", "b.safetensors", "l.pth"):
        (hub / name).touch()
    refused(r"found b\.safetensors, l\.pth, s\.safetensors; name the file", "org/depth")


def test_an_unreachable_hub_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own offline switch: its real errors, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for source in ("org/depth", "org/depth/model.pth"):
        refused("neither a local file nor to be had from the Hugging Face Hub", source)
