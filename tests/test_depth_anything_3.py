"""Depth Anything 3: the published network written out, its files, sky, focal lengths, training."""

import json
import math
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import flatdepth
from flatdepth.cli import parse_config, run_command
from flatdepth.config import TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import training_samples
from flatdepth.errors import UserError
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import (
    Contender,
    Request,
    load_sample,
    look,
    open_pictures,
    open_subsets,
)
from flatdepth.models.card import model_card
from flatdepth.models.checkpoint import (
    describe,
    load_weights,
    open_model,
    read_weights,
    save_weights,
)
from flatdepth.models.depth_anything import ENCODERS, DepthAnythingV2, EncoderSpec
from flatdepth.models.depth_anything_3 import DepthAnything3, fill_sky
from flatdepth.models.export import export_weights
from flatdepth.models.lora import add_lora, merged
from flatdepth.models.network import Kind, freeze, parameter_groups
from flatdepth.predict.systems import Settings, open_system, predict_with
from flatdepth.training import runlog
from flatdepth.training.loop import make_training_batch, train
from flatdepth.training.memory import GIB, simulate
from flatdepth.training.state import newest_checkpoint
from tests.conftest import REPOSITORY, TinySets
from tests.test_depth_anything import gradients, official_shapes, picture, resampled

TINY = ENCODERS["vitt"]
CPU = torch.device("cpu")
SKY = "depth_head.scratch.sky_output_conv2."


# The published network, from its names and settings alone.


def published_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    """Those of version 2 without what it never reads, with the sky's, by the names of the hub."""
    shapes = official_shapes(spec.embed_dim, spec.depth, spec.features, spec.out_channels, None)
    shapes |= {
        f"{SKY}0.weight": (32, spec.features // 2, 3, 3), f"{SKY}0.bias": (32,),
        f"{SKY}2.weight": (1, 32, 1, 1), f"{SKY}2.bias": (1,),
    }  # fmt: skip
    return {
        name.replace("pretrained.", "model.backbone.pretrained.", 1).replace(
            "depth_head.", "model.head.", 1
        ): shape
        for name, shape in shapes.items()
        if "mask_token" not in name and "refinenet4.resConfUnit1" not in name
    }


def published(seed: int = 0, spec: EncoderSpec = TINY) -> dict[str, Tensor]:
    """Random tensors that all change the output; tokens so small that epsilons do too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in published_shapes(spec).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("weight", "gamma")) and len(shape) == 1:
            tensors[name] = 1 + 0.2 * noise
        elif len(shape) == 1:
            tensors[name] = 0.1 * noise
        else:
            tensors[name] = noise / math.sqrt(noise[0].numel())
        if name.endswith(("gamma", "pos_embed", "cls_token")) or "patch_embed" in name:
            tensors[name] *= 0.05
    tensors["model.head.scratch.output_conv2.2.weight"] *= 0.5  # depths of a few metres
    return tensors


def stacks(
    tensors: dict[str, Tensor], image: Tensor, spec: EncoderSpec = TINY
) -> tuple[Tensor, Tensor]:
    """Canonical depth and the sky's value (b, h, w) in float64, before any filling."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    rows, cols = image.shape[-2] // 14, image.shape[-1] // 14

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = t[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, t.get(f"{name}.bias"), stride, padding)

    def resize(x: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=True)

    def residual(x: Tensor, name: str) -> Tensor:
        return conv(conv(x.clamp(min=0), f"{name}.conv1").clamp(min=0), f"{name}.conv2") + x

    # encoder
    at = "model.backbone.pretrained."
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()
    x = (image.double() - mean[:, None, None]) / std[:, None, None]
    x = F.conv2d(x, t[f"{at}patch_embed.proj.weight"], t[f"{at}patch_embed.proj.bias"], 14)
    x = torch.cat((t[f"{at}cls_token"].expand(len(x), -1, -1), x.flatten(2).mT), 1)
    table = t[f"{at}pos_embed"]
    x = x + (table if (rows, cols) == (37, 37) else resampled(table, rows, cols))
    taken = []
    for index in range(spec.depth):
        block = f"{at}blocks.{index}."
        q, k, v = (
            part.unflatten(-1, (spec.heads, -1)).transpose(1, 2)
            for part in affine(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
        )
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        mixed = affine(mixed.transpose(1, 2).flatten(2), f"{block}attn.proj")
        x = x + t[f"{block}ls1.gamma"] * mixed
        inner = affine(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")
        inner = inner * (1 + (inner / math.sqrt(2)).erf()) / 2
        x = x + t[f"{block}ls2.gamma"] * affine(inner, f"{block}mlp.fc2")
        if index in spec.taken:
            tokens = norm(x, f"{at}norm", 1e-5)[:, 1:]
            taken.append(tokens.mT.unflatten(-1, (rows, cols)))

    # head
    at = "model.head."
    levels = [conv(x, f"{at}projects.{i}") for i, x in enumerate(taken)]
    for i, stride in ((0, 4), (1, 2)):
        name = f"{at}resize_layers.{i}"
        levels[i] = F.conv_transpose2d(levels[i], t[f"{name}.weight"], t[f"{name}.bias"], stride)
    levels[3] = conv(levels[3], f"{at}resize_layers.3", 2)
    at = "model.head.scratch."
    levels = [conv(x, f"{at}layer{i}_rn") for i, x in enumerate(levels, start=1)]
    path: Tensor | None = None
    for i in (4, 3, 2, 1):
        unit = f"{at}refinenet{i}"
        x = levels[i - 1]
        if path is not None:
            x = path + residual(x, f"{unit}.resConfUnit1")
        x = residual(x, f"{unit}.resConfUnit2")
        finer = levels[i - 2].shape[-2:] if i > 1 else (8 * rows, 8 * cols)
        path = conv(resize(x, *finer), f"{unit}.out_conv")
    x = resize(conv(path, f"{at}output_conv1"), 14 * rows, 14 * cols)
    ends = [
        conv(conv(x, f"{at}{stack}.0").clamp(min=0), f"{at}{stack}.2")[:, 0]
        for stack in ("output_conv2", "sky_output_conv2")
    ]
    return ends[0].exp(), ends[1].clamp(min=0)


def filled(depth: Tensor, sky: Tensor) -> Tensor:
    """Images (h, w) with the sky at a percentile, each by itself."""
    out = depth.clone()
    for one, its_sky in zip(out, sky >= 0.3, strict=True):
        if min(int(its_sky.sum()), int((~its_sky).sum())) > 10:
            one[its_sky] = float(np.percentile(one[~its_sky].numpy(), 99))
    return out


def tiny(kind: Kind = "metric", **options: object) -> DepthAnything3:
    torch.manual_seed(0)
    return DepthAnything3("vitt", kind=kind, **options)  # type: ignore[arg-type]


def loaded(seed: int = 0, kind: Kind = "metric") -> DepthAnything3:
    model = tiny(kind).eval()
    renamed = DepthAnything3.renamed(published(seed))
    assert renamed is not None
    model.load_state_dict(renamed[0])
    return model


@pytest.mark.parametrize("size", [(126, 168), (98, 56), (14, 42)])
def test_predictions_are_those_of_the_published_network(size: tuple[int, int]) -> None:
    """Every layer written out in float64, the sky and the focal length at the end."""
    model, tensors = loaded(), published()
    images, focal_px = picture(1, 3, *size), torch.tensor([180.0, 300.0, 750.0])
    depth, sky = stacks(tensors, images)
    share = float((sky >= 0.3).double().mean())
    assert 0.01 < share < 0.99
    clear = (sky - 0.3).abs() > 1e-4  # in float32 too
    assert clear.double().mean() > 0.99
    wanted = filled(depth, sky) * (focal_px / 300)[:, None, None]
    with torch.no_grad():
        found = model(images, focal_px)[:, 0]
        raw = model.train()(images, focal_px)[:, 0]
    assert found.dtype == torch.float32
    assert wanted.std() > 0.05
    assert ((found - wanted).abs() / wanted)[clear].max() < 1e-5
    unfilled = depth * (focal_px / 300)[:, None, None]
    assert ((raw - unfilled).abs() / unfilled).max() < 1e-5
    assert (wanted != unfilled).any()


def test_depth_up_to_scale_and_shift_needs_no_focal_length() -> None:
    model, images = loaded(kind="affine"), picture(1, 2, 70, 98)
    depth, sky = stacks(published(), images)
    wanted, clear = filled(depth, sky), (sky - 0.3).abs() > 1e-4
    with torch.no_grad():
        assert ((model(images)[:, 0] - wanted).abs() / wanted)[clear].max() < 1e-5
        assert torch.equal(model(images), model(images, torch.tensor([100.0, 900.0])))


def test_names_shapes_and_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = DepthAnything3("vitl", kind="metric")
    state = model.published(model.state_dict())
    assert {n: tuple(t.shape) for n, t in state.items()} == published_shapes(ENCODERS["vitl"])
    assert len(state) == 406
    assert sum(p.numel() for p in model.parameters()) == 334_171_394


# Sky.


def test_the_sky_of_each_image_is_a_percentile_of_all_its_other_pixels() -> None:
    """Also where there are more than the 100,000 pixels that the original draws at random."""
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(3, 1, 400, 500, generator=generator) + torch.arange(3.0).view(3, 1, 1, 1)
    is_sky = torch.rand(3, 1, 400, 500, generator=generator) < torch.tensor([0.3, 0.0, 0.9]).view(
        3, 1, 1, 1
    )
    found = fill_sky(depth, is_sky)
    assert torch.equal(found[~is_sky], depth[~is_sky])
    assert torch.equal(found[1], depth[1])
    for one, its_depth, its_sky in zip(found, depth, is_sky, strict=True):
        if its_sky.any():
            far = np.percentile(its_depth[~its_sky].numpy().astype(np.float64), 99)
            np.testing.assert_allclose(one[its_sky], far, rtol=1e-6)
    assert torch.equal(fill_sky(depth[2:], is_sky[2:]), found[2:])


@pytest.mark.parametrize(("sky", "fills"), [(10, False), (11, True), (89, True), (90, False)])
def test_less_than_eleven_pixels_of_a_kind_fill_nothing(sky: int, fills: bool) -> None:
    depth = torch.arange(1.0, 101.0).view(1, 1, 10, 10)
    found = fill_sky(depth, depth <= sky)
    assert torch.equal(found, depth) != fills


def test_a_fresh_head_sees_no_sky(tmp_path: Path) -> None:
    model = tiny().eval()
    image, focal_px = picture(0, 2, 70, 98), torch.full((2,), 300.0)
    with torch.no_grad():
        raw = model.train()(image, focal_px)
        assert torch.equal(model.eval()(image, focal_px), raw)
    # nor does one that replaces the head of a file that sees some
    save_file(published(), tmp_path / "model.safetensors")
    load_weights(model, str(tmp_path / "model.safetensors"), head="fresh")
    assert torch.equal(model.get_parameter(f"{SKY}2.weight"), torch.zeros(1, 32, 1, 1))
    with torch.no_grad():
        filled_depth = model(image, focal_px)
        assert torch.equal(model.train()(image, focal_px), filled_depth)


# Depth from logits.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["metric", "affine"])
def test_a_fresh_network_starts_at_a_few_metres_and_learns(kind: Kind, seed: int) -> None:
    torch.manual_seed(seed)
    model = DepthAnything3("vitt", kind=kind)
    output = model(picture(seed, 2, 126, 168), torch.full((2,), 300.0))
    assert 1 < output.log().mean().exp() < 3
    assert output.min() > 0.3 and output.max() < 20 and output.std() > 0.05
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    (output * direction).mean().backward()
    top = model.get_parameter("depth_head.scratch.output_conv2.2.weight").grad.norm()
    for name, p in model.named_parameters():
        if p.requires_grad and p.ndim > 1:
            assert 1e-4 * top < p.grad.norm() < 1e4 * top, name


@pytest.mark.parametrize(("logit", "depth"), [(500.0, math.exp(20)), (-500.0, math.exp(-20))])
def test_depth_neither_overflows_nor_vanishes(logit: float, depth: float) -> None:
    model = tiny("affine")
    with torch.no_grad():
        model.get_parameter("depth_head.scratch.output_conv2.2.bias").fill_(logit)
        found = model(picture(0, 1, 28, 28))
    torch.testing.assert_close(found, torch.full_like(found, depth))
    assert found.square().isfinite().all() and (found.square() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exp_outlives_half_precision(dtype: torch.dtype) -> None:
    """e^12 is more than float16 can say."""
    model = tiny("affine")
    with torch.no_grad():
        model.get_parameter("depth_head.scratch.output_conv2.2.weight").zero_()
        model.get_parameter("depth_head.scratch.output_conv2.2.bias").fill_(12.0)
    with torch.autocast("cpu", dtype):
        found = model(picture(0, 1, 28, 28))
    torch.testing.assert_close(found, torch.full_like(found, math.exp(12)))


def test_what_it_predicts_and_needs() -> None:
    metric, affine = tiny("metric"), tiny("affine")
    assert (metric.units, metric.needs_focal) == ("m", True)
    assert (affine.units, affine.needs_focal) == ("depth", False)
    image = torch.zeros(1, 3, 28, 42)
    with pytest.raises(ValueError, match="depth_anything_3 predicts metres only with a focal"):
        metric(image)
    with pytest.raises(ValueError, match="28x30; both sides must be multiples of 14"):
        affine(image[..., :30])
    with pytest.raises(UserError, match="depth_anything_3 predicts metric or affine depth, found"):
        tiny("relative")
    # the maximum depth is a range to judge in, nothing of the network's
    near, far = tiny(max_depth_m=1.0).eval(), tiny(max_depth_m=80.0).eval()
    focal_px = torch.tensor([900.0])
    with torch.no_grad():
        assert torch.equal(near(image, focal_px), far(image, focal_px))
        assert near(image, focal_px).max() > 1


# Training it.


def test_only_the_sky_gets_no_gradient() -> None:
    model = tiny("affine")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{SKY}{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")}
    model.requires_grad_(True)
    without = {name for name, g in gradients(model, picture(0, 2, 42, 56)).items() if g is None}
    assert without == frozen


def test_recomputation_changes_nothing() -> None:
    image, focal_px = picture(0, 2, 56, 70), torch.tensor([50.0, 90.0])
    found = []
    for checkpointing in ("none", "encoder", "encoder+head"):
        model = tiny(checkpointing=checkpointing)
        model(image, focal_px).log().square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(gradient.abs().sum() > 0 for gradient in found[-1].values())
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@pytest.mark.parametrize("training", [False, True])
def test_pictures_of_a_batch_do_not_touch_each_other(training: bool) -> None:
    model, images = loaded().train(training), picture(0, 3, 70, 98)
    focal_px = torch.tensor([50.0, 90.0, 300.0])
    with torch.no_grad():
        together = model(images, focal_px)
        alone = torch.cat([model(images[i : i + 1], focal_px[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_adapters_train_and_merge_into_published_names() -> None:
    pytest.importorskip("peft")
    model, image = loaded(kind="affine").train(), picture(0, 1, 28, 42)
    add_lora(model, rank=2, alpha=4.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    model(image).log().square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and not any("sky" in n for n in trained)
    assert all(model.get_parameter(name).grad is not None for name in trained)
    plain = merged(model)
    assert plain.published(plain.state_dict()).keys() == published().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain.train()(image), model(image))
        assert not torch.allclose(plain(image), loaded(kind="affine").train()(image))


@pytest.mark.parametrize(
    ("what", "first_blocks", "frozen"),
    [
        ("none", 0, (SKY,)),
        ("encoder", 0, (SKY, "pretrained.")),
        ("head", 0, ("depth_head.",)),
        (
            "none",
            1,
            (
                SKY, "pretrained.cls_token", "pretrained.pos_embed", "pretrained.patch_embed.",
                "pretrained.blocks.0.",
            ),
        ),
    ],
)  # fmt: skip
def test_parts_freeze_and_the_rest_is_in_one_group_each(
    what: str, first_blocks: int, frozen: tuple[str, ...]
) -> None:
    model = tiny()
    freeze(model, what, first_blocks)  # type: ignore[arg-type]
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1e-4, 10.0, 0.01)
    grouped = [names[id(p)] for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(grouped) == len({*grouped})
    assert {*grouped} == {name for name in names.values() if not name.startswith(frozen)}


# Files.


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hub(folder: Path, name: str | None, tensors: dict[str, Tensor] | None = None) -> str:
    """A folder as the hub has it; its config.json says ``name``."""
    folder.mkdir()
    save_file(tensors or published(), folder / "model.safetensors", {"format": "pt"})
    if name is not None:
        config = {"model_name": name, "config": {"net": {"name": "vitl"}}}
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def large_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """All published files are of one size, which takes 1.3 GB; let that be small."""
    monkeypatch.setattr(DepthAnything3, "sizes", {"vitl": TINY})


@pytest.mark.usefixtures("large_is_tiny")
@pytest.mark.parametrize(
    ("name", "kind"), [("da3metric-large", "metric"), ("da3mono-large", "affine")]
)
def test_a_folder_of_the_hub_says_what_it_is(name: str, kind: Kind, tmp_path: Path) -> None:
    source = hub(tmp_path / "hub", name)
    model, report = open_model(source)
    assert isinstance(model, DepthAnything3)
    assert (model.encoder, model.kind, model.training) == ("vitl", kind, False)
    assert same(model.published(model.state_dict()), published())
    assert report.unwrapped == () and "The file says" in str(report)
    other: Kind = "affine" if kind == "metric" else "metric"
    with pytest.raises(UserError, match=f"kind is {kind} in the file but {other} in the model; "):
        load_weights(DepthAnything3("vitl", kind=other), source)


def test_a_file_that_does_not_say_its_kind_has_to_be_told(tmp_path: Path) -> None:
    source = hub(tmp_path / "hub", None)
    with pytest.raises(UserError) as caught:
        open_model(source)
    assert str(caught.value) == (
        f"{source} does not say its kind; give --kind metric, or --kind affine"
    )
    for kind in ("metric", "affine"):
        model, _ = open_model(source, kind=kind)  # type: ignore[arg-type]
        assert (model.kind, model.max_depth_m) == (kind, 1e5 if kind == "metric" else 20.0)
        load_weights(tiny(kind), source)  # type: ignore[arg-type]


@pytest.mark.usefixtures("large_is_tiny")
def test_a_copy_that_is_named_as_its_repository_says_what_it_is(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "DA3MONO-LARGE.pth")
    model, report = open_model(str(tmp_path / "DA3MONO-LARGE.pth"))
    assert model.kind == "affine" and "Its official name says" in str(report)


def test_networks_of_several_views_are_named(tmp_path: Path) -> None:
    source = hub(tmp_path / "hub", "da3-large")
    with pytest.raises(UserError, match=r"is da3-large, a network of several views; take "):
        read_weights(source)


def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that the authors' own files had."""
    renamed = {
        name.replace("model.backbone.", "net.")
        .replace("model.head.", "all_heads.head.")
        .replace("sky_output_conv2", "output_conv2_additional.sky_mask"): t
        for name, t in tensors.items()
    }
    return {**renamed, "net.pretrained.camera_token": torch.zeros(1, 2, 128)}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in tensors.items()}


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): t for name, t in tensors.items()}


def nested(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network beside one of several views, whose head has no sky."""
    other = {
        name: t + 1
        for name, t in prefixed(bare(tensors), "model.da3.").items()
        if "sky" not in name
    }
    return other | prefixed(bare(tensors), "model.da3_metric.")


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = DepthAnything3.renamed(tensors)
    assert renamed is not None
    return renamed[0]


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda t: t, ()),
        (bare, ()),
        (ours, ()),
        (lambda t: prefixed(ours(t), "module."), ("took the prefix 'module.' off every name",)),
        (
            lambda t: {"state_dict": prefixed(t, "module."), "epoch": 3},
            (
                "took the entry 'state_dict' and left 'epoch'",
                "took the prefix 'module.' off every name",
            ),
        ),
        (
            lambda t: {"model": prefixed(t, "_orig_mod.")},
            ("took the entry 'model'", "took the prefix '_orig_mod.' off every name"),
        ),
        (
            lambda t: {"state_dict": prefixed(t, "net.")},
            ("took the entry 'state_dict'", "took the prefix 'net.' off every name"),
        ),
        (
            nested,
            (
                "took the prefix 'model.da3_metric.' off every name and left "
                "model.da3.backbone.pretrained.cls_token, model.da3.backbone.pretrained.pos_embed, "
                "model.da3.backbone.pretrained.patch_embed.proj.weight, ...",
            ),
        ),
        (
            older,
            ("renamed the tensors from older names of Depth Anything 3", "left the camera token"),
        ),
        (
            lambda t: prefixed(older(t), "module."),
            (
                "took the prefix 'module.' off every name",
                "renamed the tensors from older names of Depth Anything 3",
                "left the camera token",
            ),
        ),
    ],
    ids=["hub", "network", "ours", "ours-ddp", "ddp", "compiled", "lightning", "nested", "older",
         "older-ddp"],
)  # fmt: skip
def test_it_is_found_in_every_layout(
    wrap: Callable[[dict[str, Tensor]], object], notes: tuple[str, ...], tmp_path: Path
) -> None:
    torch.save(wrap(published(3)), tmp_path / "weights.pth")
    weights = read_weights(str(tmp_path / "weights.pth"))
    assert (weights.network, weights.encoder, weights.has_head) == (
        "depth_anything_3",
        "vitt",
        True,
    )
    assert weights.unwrapped == notes
    model, _ = open_model(str(tmp_path / "weights.pth"), kind="affine")
    assert same(model.published(model.state_dict()), published(3))


def test_an_average_of_it_goes_first(tmp_path: Path) -> None:
    torch.save({"model": published(3), "model_ema": published(4)}, tmp_path / "last.pth")
    weights = read_weights(str(tmp_path / "last.pth"))
    assert same(dict(weights.tensors), ours(published(4)))
    assert weights.unwrapped[0] == "of the networks model, model_ema took model_ema"


def test_version_2_and_3_are_told_apart(tmp_path: Path) -> None:
    second = DepthAnythingV2("vitt", kind="relative").state_dict()
    wrapped = prefixed(second, "model.backbone.") | {"model.head.weight": torch.zeros(2)}
    for name, tensors, network in (
        ("second.pth", second, "depth_anything_v2"),
        ("wrapped.pth", wrapped, "depth_anything_v2"),
        ("third.pth", published(), "depth_anything_3"),
        ("ours.pth", ours(published()), "depth_anything_3"),
    ):
        torch.save(tensors, tmp_path / name)
        weights = read_weights(str(tmp_path / name))
        assert (weights.network, weights.encoder) == (network, "vitt")
        make = DepthAnythingV2 if network.endswith("3") else DepthAnything3
        with pytest.raises(
            UserError, match=f"does not fit vitt: .*; it looks like {network}, so set model.name to"
        ):
            load_weights(make("vitt", kind="metric"), str(tmp_path / name))


@pytest.mark.parametrize("kind", ["metric", "affine"])
def test_our_files_have_the_names_of_the_hub_and_come_back(kind: Kind, tmp_path: Path) -> None:
    model = loaded(seed=5, kind=kind)
    image, focal_px = picture(0, 1, 42, 56), torch.tensor([70.0])
    for path in save_weights(model, tmp_path / "rooms", extra={"step": "3"}):
        flat = torch.load(path) if path.suffix == ".pth" else load_file(path)
        assert same(flat, published(5))
        again, report = open_model(str(path))
        assert isinstance(again, DepthAnything3)
        assert same(again.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(again(image, focal_px), model(image, focal_px))
        assert report.unwrapped == ()
        assert report.metadata is not None
        assert {"network": "depth_anything_3", "kind": kind}.items() <= report.metadata.items()
        assert "max_depth_m" not in report.metadata
        load_weights(tiny(kind, max_depth_m=7.0), str(path))


@pytest.mark.usefixtures("large_is_tiny")
@pytest.mark.parametrize("kind", ["metric", "affine"])
def test_a_folder_is_written_as_the_original_code_reads_it(kind: Kind, tmp_path: Path) -> None:
    source, _ = open_model(hub(tmp_path / "hub", None), kind=kind)
    assert export_weights(source, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said == {"model_name": f"da3{'metric' if kind == 'metric' else 'mono'}-large"}
    assert same(load_file(tmp_path / "out" / "model.safetensors"), published())
    again, _ = open_model(str(tmp_path / "out"))
    assert again.kind == kind
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'DepthAnything3.from_pretrained("out")' in card and "apache-2.0" in card
    assert ("over 300: metres" in card) == (kind == "metric")


def test_sizes_that_the_original_code_does_not_have_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"depth_anything_3 vitt.*; export to a .pth or"):
        export_weights(tiny(), tmp_path / "out")


@pytest.mark.parametrize("kind", ["metric", "affine"])
def test_cards_say_what_is_predicted(kind: Kind) -> None:
    said = {**describe(tiny(kind)), "encoder": "vitl"}
    card = model_card("mirrors", said, run=None, layout="files")
    words = {"metric": "planar depth in metres.", "affine": "known up to scale and shift."}
    assert f"it predicts {'' if kind == 'metric' else 'planar depth, '}{words[kind]}" in card
    assert ("model(image, focal_px)" in card) == (kind == "metric")
    assert "DA3METRIC-LARGE weights are Apache-2.0" in card
    in_folder = model_card("mirrors", said, run=None, layout="hub")
    assert "library_name: flatdepth" in card and "library_name: flatdepth" in in_folder


def test_the_checkpoint_tool_takes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(REPOSITORY / "tools" / "checkpoint.py"))["main"]

    def tool(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        assert not caught.value.code, err
        return out

    a = hub(tmp_path / "hub", None)
    moved = loaded()
    with torch.no_grad():
        moved.get_parameter("pretrained.blocks.2.mlp.fc1.weight").mul_(1.25)
    b = save_weights(moved, tmp_path / "b")[1]
    lines = {line[:12].strip(): line[13:] for line in tool("info", b).splitlines()}
    assert (lines["kind"], lines["max_depth_m"]) == ("metric (by its metadata)", "none")
    assert (lines["network"], lines["unwrapped"]) == ("depth_anything_3", "nothing")
    table = tool("diff", a, b)
    assert "sky" not in table and "refinenet4" in table
    changed = [line for line in table.splitlines() if "#" in line]
    assert [line.split("  ")[0] for line in changed] == ["block 2", "all"]
    assert tool("verify", b).count("equal to copy") == 2
    tool("blend", a, b, tmp_path / "mean.safetensors", "--alpha", "0.5")
    mean = load_file(tmp_path / "mean.safetensors")
    name = "model.backbone.pretrained.blocks.2.mlp.fc1.weight"
    torch.testing.assert_close(mean.pop(name), 1.125 * published()[name])
    assert all(torch.equal(t, published()[other]) for other, t in mean.items())


# Focal lengths.


def test_predict_warns_of_an_assumed_focal_length_and_metres_follow_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(REPOSITORY / "tools" / "predict.py"))["main"]
    _, weights = save_weights(loaded(), tmp_path / "metric")
    _, mono = save_weights(loaded(kind="affine"), tmp_path / "mono")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def predict(out: str, checkpoint: Path, *arguments: object) -> tuple[np.ndarray, str]:
        common = ["--checkpoint", checkpoint, "--out", tmp_path / out, "--write", "npy"]
        common += ["--size", 28, "--device", "cpu"]
        main([str(argument) for argument in (tmp_path / "a.png", *common, *arguments)])
        return np.load(tmp_path / out / "a_depth.npy"), capsys.readouterr().err

    assumed, warning = predict("assumed", weights)
    assert "assumed to be 60 degrees; its metres are wrong by as much" in warning
    wide, silence = predict("wide", weights, "--fov", 60)
    assert "warning" not in silence
    np.testing.assert_array_equal(assumed, wide)
    half = math.degrees(2 * math.atan(math.tan(math.radians(30)) / 2))
    narrow, _ = predict("narrow", weights, "--fov", half)
    np.testing.assert_allclose(narrow, 2 * wide, rtol=1e-5)
    _, silence = predict("mono", mono)
    assert "warning" not in silence
    focal_px = torch.tensor([21 / math.tan(math.radians(30))])
    with torch.no_grad():
        own = loaded()(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255, focal_px)[0, 0]
    np.testing.assert_allclose(wide, own, rtol=1e-5)


def test_the_import_warns_of_an_assumed_focal_length(tmp_path: Path) -> None:
    predictor = flatdepth.load(save_weights(loaded(), tmp_path / "metric")[1], device="cpu")
    image = np.zeros((28, 42, 3), np.uint8)
    with pytest.warns(UserWarning, match="the focal length is unknown; a view of 60 degrees"):
        assumed = predictor.predict(image, size=28)
    focal = 21 / math.tan(math.radians(30))
    said = predictor.predict(image, size=28, intrinsics=(focal, focal, 20.5, 13.5))
    np.testing.assert_allclose(assumed.values, said.values, rtol=1e-5)


@pytest.mark.usefixtures("large_is_tiny")
def test_it_is_a_system_of_the_field_on_its_own_input(tmp_path: Path) -> None:
    source = hub(tmp_path / "hub", "da3metric-large")
    system = open_system(f"da3_metric={source}", Settings(), CPU)
    assert system.predicts == "planar depth along the optical axis, in metres"
    assert system.preprocessing.network_size(480, 640) == (378, 504)
    assert not system.untrained and isinstance(system.network, DepthAnything3)
    settings = Settings(size=56)
    system = open_system(f"da3_metric={source}", settings, CPU)
    image = np.random.default_rng(0).integers(0, 256, (48, 56, 3), dtype=np.uint8)
    assert system.preprocessing.network_size(48, 56) == (42, 56)
    one, two = (predict_with(system, image, focal, settings) for focal in (300.0, 600.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5)
    with torch.no_grad():
        prepared = system.preprocessing.prepare(torch.from_numpy(image).movedim(-1, 0)[None] / 255)
        own = open_model(source)[0](prepared, torch.tensor([300 * (42 / 48 + 1) / 2]))
    np.testing.assert_allclose(one, system.preprocessing.restore(own, 48, 56)[0, 0], rtol=1e-5)


def test_evaluation_scales_the_focal_length_to_the_network(tiny_sets: TinySets) -> None:
    """With a logit of 0 the depth is the focal length in pixels of the network's input over 300."""
    model = tiny().eval()
    with torch.no_grad():
        model.get_parameter("depth_head.scratch.output_conv2.2.weight").zero_()
        model.get_parameter("depth_head.scratch.output_conv2.2.bias").zero_()
    request = Request(
        checkpoints=("x",), kinds=(None,), max_depths_m=(None,), trained_on=(None,),
        data=(str(tiny_sets.rooms),), art=(), part="all", protocol=PROTOCOLS["none"],
    )  # fmt: skip
    contender = Contender(
        label="A", source="x", model=model, alignment="metric", trained_on=None, run=None
    )
    (subset,) = open_subsets(request.data, "all")
    sample = load_sample(request, subset, 0, open_pictures(request.art), pasted=False)
    fx, fy = sample.frame.K_px[0, 0], sample.frame.K_px[1, 1]
    for size, network in ((84, (84, 112)), (42, (42, 56)), (28, (28, 42))):
        seen = look([sample], request, [contender], size, CPU)
        assert seen.network == network
        focal = (fx + fy) / 2 * (network[0] / 84 + network[1] / 112) / 2
        torch.testing.assert_close(
            seen.depths_m[0], torch.full_like(seen.depths_m[0], focal / 300), rtol=1e-5, atol=0
        )


def losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records]


def config(tiny_sets: TinySets, folder: Path, name: str, *overrides: str) -> TrainConfig:
    """The ready config, shrunk, from a published tiny file that does not say its kind."""
    if not (folder / "hub").exists():
        hub(folder / "hub", None)
    return parse_config(
        TrainConfig,
        [
            f"--config={REPOSITORY / 'configs' / name}.yaml", f"--runs={folder / 'runs'}",
            f"--data.train=[{{path: {tiny_sets.rooms}}}]", f"--data.art=[{tiny_sets.pictures}]",
            "--data.height=28", "--data.width=42", "--data.threads=2", "--model.encoder=vitt",
            f"--model.checkpoint={folder / 'hub'}", "--steps=4", "--batch=4", "--micro_batch=2",
            "--precision=no", "--save_every=2", "--eval.every=4", "--eval.images=2",
            "--eval.pictures=0", "--tracker=none", "--optim.lr=1e-4", "--optim.warmup=0",
            *overrides,
        ],
        prog="train.py",
        description=None,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["da3_metric", "da3_mono"])
def test_the_ready_config_trains_and_goes_on_bit_for_bit(
    name: str, tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)
    whole = config(tiny_sets, tmp_path, name, "--name=whole")
    metrics = train(whole)
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert metrics["finished"]
    runs = tmp_path / "runs"
    shutil.copytree(runs / "whole", runs / "half")
    shutil.rmtree(runs / "half" / "checkpoints" / "step-00000004")
    shutil.rmtree(runs / "half" / "weights")
    newest = newest_checkpoint(runs / "half")
    assert newest is not None and newest.name == "step-00000002"
    train(config(tiny_sets, tmp_path, name, "--name=half"))
    ours, theirs = (losses(runs / run) for run in ("half", "whole"))
    assert ours == theirs and len(ours) == 4
    final = load_file(runs / "whole" / "weights" / "final.safetensors")
    assert same(load_file(runs / "half" / "weights" / "final.safetensors"), final)
    start = published()
    assert final.keys() == start.keys()
    still = {key for key in final if torch.equal(final[key], start[key])}
    assert still == {key for key in final if "sky_output_conv2" in key}
    model, _ = open_model(str(runs / "whole" / "weights" / "final.safetensors"))
    assert model.kind == whole.model.kind
    assert "Apache-2.0" in (runs / "whole" / "weights" / "final.md").read_text()


def test_training_on_crops_sees_the_focal_length_of_the_resized_crop(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)
    chosen = config(
        tiny_sets, tmp_path, "da3_metric", "--data.crop=[0.4, 0.9]", "--steps=2", "--name=crops"
    )
    stream = training_samples(
        open_corpus(chosen.data), chosen, first_step=0, rank=0, ranks=1, accumulation=2
    )
    wanted = []
    for _ in range(4):
        samples = next(stream)
        for sample in samples:
            K, view = sample.frame.K_px, sample.view
            zoom = (view.width / view.crop_width, view.height / view.crop_height)
            wanted.append((K[0, 0] * zoom[0] + K[1, 1] * zoom[1]) / 2)
        batch = make_training_batch(samples, chosen, CPU)
        np.testing.assert_allclose(batch.focal_px, wanted[-len(samples) :], rtol=1e-6)
    stream.close()
    assert max(wanted) > 1.3 * min(wanted)
    seen: list[float] = []
    own = DepthAnything3.forward

    def forward(self: DepthAnything3, image: Tensor, focal_px: Tensor | None = None) -> Tensor:
        if self.training and focal_px is not None:
            seen.extend(focal_px.tolist())
        return own(self, image, focal_px)

    monkeypatch.setattr(DepthAnything3, "forward", forward)
    train(chosen)
    np.testing.assert_allclose(seen, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "repository"), [("da3_metric", "DA3METRIC-LARGE"), ("da3_mono", "DA3MONO-LARGE")]
)
def test_the_ready_configs_say_what_they_need(name: str, repository: str) -> None:
    path = REPOSITORY / "configs" / f"{name}.yaml"
    found = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    assert found.model.checkpoint == f"depth-anything/{repository}"
    said = DepthAnything3.configured({"model_name": f"{repository.lower()}"}, "x")
    assert said == {"encoder": found.model.encoder, "kind": found.model.kind}
    header = path.read_text().split("name:")[0]
    for part in (f"--config configs/{path.name}", "Hardware:", "Licence", "Apache-2.0"):
        assert part in header
    if name == "da3_metric":
        peak = simulate(found).peak.total
        assert f"{peak / GIB:.2f} GiB" in header
