"""The model: official names and sizes, numbers against transformers, memory, first gradients."""

import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from flatdepth.errors import UserError
from flatdepth.models.depth_anything import (
    ENCODERS,
    DepthAnythingV2,
    EncoderSpec,
    resize_position_embedding,
)
from flatdepth.models.huggingface import to_huggingface
from flatdepth.models.network import UNUSED, freeze, parameter_groups

SMALL = EncoderSpec(
    embed_dim=48, depth=5, heads=3, taken=(0, 2, 3, 4), features=16, out_channels=(8, 12, 20, 24)
)
SMALL_SWIGLU = EncoderSpec(
    embed_dim=40, depth=4, heads=2, taken=(0, 1, 2, 3), features=12, out_channels=(8, 8, 16, 16),
    swiglu=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "small", SMALL)
    monkeypatch.setitem(ENCODERS, "small-swiglu", SMALL_SWIGLU)


def picture(seed: int, batch: int, height: int, width: int) -> Tensor:
    """Coarse shapes with fine noise, so that all levels of the head have something to see."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 7, generator=generator)
    fine = torch.rand(batch, 3, height, width, generator=generator)
    return 0.7 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * fine


@pytest.mark.parametrize(
    ("encoder", "tensors", "encoder_parameters", "parameters"),
    [
        ("vits", 239, 22_056_576, 24_785_089),
        ("vitb", 239, 86_580_480, 97_470_785),
        ("vitl", 407, 304_368_640, 335_315_649),
    ],
)
def test_counts_are_the_official_ones(
    encoder: str, tensors: int, encoder_parameters: int, parameters: int
) -> None:
    with torch.device("meta"):
        model = DepthAnythingV2(encoder, kind="metric")
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.pretrained.parameters()) == encoder_parameters
    assert sum(p.numel() for p in model.parameters()) == parameters


def official_shapes(
    dim: int, depth: int, c: int, outs: tuple[int, ...], swiglu_hidden: int | None
) -> dict[str, tuple[int, ...]]:
    """The layout of the official checkpoints, spelled out from their published key lists."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1370, dim),
        "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    if swiglu_hidden is None:
        layers |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    else:
        layers |= {"mlp.w12": (2 * swiglu_hidden, dim), "mlp.w3": (dim, swiglu_hidden)}
    for i in range(depth):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (dim,)
        for name in ("ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (dim,)
        for name, shape in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    shapes = {f"pretrained.{name}": shape for name, shape in shapes.items()}
    head: dict[str, tuple[int, ...]] = {}
    for i, out in enumerate(outs):
        head |= {f"projects.{i}.weight": (out, dim, 1, 1), f"projects.{i}.bias": (out,)}
        head[f"scratch.layer{i + 1}_rn.weight"] = (c, out, 3, 3)
        refine = f"scratch.refinenet{i + 1}"
        head |= {f"{refine}.out_conv.weight": (c, c, 1, 1), f"{refine}.out_conv.bias": (c,)}
        for unit in ("resConfUnit1", "resConfUnit2"):
            for conv in ("conv1", "conv2"):
                head[f"{refine}.{unit}.{conv}.weight"] = (c, c, 3, 3)
                head[f"{refine}.{unit}.{conv}.bias"] = (c,)
    for i, kernel in ((0, 4), (1, 2), (3, 3)):
        head[f"resize_layers.{i}.weight"] = (outs[i], outs[i], kernel, kernel)
        head[f"resize_layers.{i}.bias"] = (outs[i],)
    for name, shape in (
        ("output_conv1", (c // 2, c, 3, 3)),
        ("output_conv2.0", (32, c // 2, 3, 3)),
        ("output_conv2.2", (1, 32, 1, 1)),
    ):
        head |= {f"scratch.{name}.weight": shape, f"scratch.{name}.bias": shape[:1]}
    return shapes | {f"depth_head.{name}": shape for name, shape in head.items()}


@pytest.mark.parametrize(
    ("encoder", "dim", "depth", "features", "outs", "swiglu_hidden"),
    [
        ("vits", 384, 12, 64, (48, 96, 192, 384), None),
        ("vitb", 768, 12, 128, (96, 192, 384, 768), None),
        ("vitl", 1024, 24, 256, (256, 512, 1024, 1024), None),
        ("vitg", 1536, 40, 384, (1536, 1536, 1536, 1536), 4096),
    ],
)
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_names_and_shapes_are_the_official_ones(
    encoder: str,
    dim: int,
    depth: int,
    features: int,
    outs: tuple[int, ...],
    swiglu_hidden: int | None,
    kind: str,
) -> None:
    with torch.device("meta"):
        model = DepthAnythingV2(encoder, kind=kind)
    ours = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert ours == official_shapes(dim, depth, features, outs, swiglu_hidden)


def random_weights(model: DepthAnythingV2, seed: int) -> None:
    """Make every tensor matter, so that a swapped, unused or misread one changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.startswith("pretrained.") and p.ndim == 2:
            p.data = noise * 1.5 / math.sqrt(p.shape[1])
        elif p.ndim == 1 and name.endswith(("weight", "gamma")):
            p.data = 1 + 0.2 * noise
        elif p.ndim == 1:
            p.data = p.data + 0.1 * noise
        elif name.endswith(("pos_embed", "cls_token")):
            p.data = 0.5 * noise


def in_transformers(model: DepthAnythingV2, folder: Path) -> DepthAnythingForDepthEstimation:
    """The same weights in the transformers model, through a file of the published layout."""
    spec = ENCODERS[model.encoder]
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(
            hidden_size=spec.embed_dim,
            num_hidden_layers=spec.depth,
            num_attention_heads=spec.heads,
            image_size=518,
            use_swiglu_ffn=spec.swiglu,
            out_indices=[i + 1 for i in spec.taken],
            reshape_hidden_states=False,
        ),
        reassemble_hidden_size=spec.embed_dim,
        neck_hidden_sizes=list(spec.out_channels),
        fusion_hidden_size=spec.features,
        depth_estimation_type=model.kind,
        max_depth=int(model.max_depth_m) if model.kind == "metric" else 1,
    )
    config.save_pretrained(folder)
    save_file(to_huggingface(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    twin, info = DepthAnythingForDepthEstimation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return twin.eval()


def cubic_rows(n: int) -> Float[Tensor, "n 37"]:
    """Weights of bicubic interpolation (a = -0.75) from 37 samples to n, in float64.

    Output i sits at (i + 0.5) * 37 / (n + 0.1) - 0.5 in the input; borders repeat.
    """
    rows = torch.zeros(n, 37, dtype=torch.float64)
    a = -0.75
    for i in range(n):
        at = (i + 0.5) * 37 / (n + 0.1) - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - tap)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * (x**3 - 5 * x**2 + 8 * x - 4)
            rows[i, min(max(tap, 0), 36)] += weight
    return rows


def resampled(pos_embed: Tensor, rows: int, cols: int) -> Tensor:
    """The position embedding on another grid, by two float64 matrix products."""
    table = pos_embed[0, 1:].detach().double().reshape(37, 37, -1)
    table = torch.einsum("ri,cj,ijd->rcd", cubic_rows(rows), cubic_rows(cols), table)
    return torch.cat((pos_embed[:, :1].detach().double(), table.flatten(0, 1)[None]), dim=1)


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [("small", "metric"), ("small", "relative"), ("small-swiglu", "metric"), ("vits", "metric")],
)
def test_predictions_are_those_of_transformers(encoder: str, kind: str, tmp_path: Path) -> None:
    """Same weights, same picture, same numbers, with one thing matched by hand.

    Off the 37 x 37 grid transformers resamples the position embedding at n / 37, the official code
    and ours at (n + 0.1) / 37. The twin is therefore given the official embedding, computed by the
    independent float64 routine above; nothing else of it is touched, and nothing at 518 x 518.
    """
    torch.manual_seed(0)
    model = DepthAnythingV2(encoder, kind=kind).eval()
    random_weights(model, seed=1)
    twin = in_transformers(model, tmp_path)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # vits is there for its own numbers; at 518 x 518 it is slow.
    for height, width in ((252, 336),) if encoder == "vits" else ((518, 518), (252, 336)):
        image = picture(2, 1, height, width)
        if (height, width) != (518, 518):
            table = resampled(model.pretrained.pos_embed, height // 14, width // 14).float()
            twin.backbone.embeddings.interpolate_pos_encoding = lambda *_, table=table: table
        with torch.no_grad():
            ours = model(image)
            theirs = twin(pixel_values=(image - mean) / std).predicted_depth[:, None]
        assert ours.std() > 0.1
        assert (ours > 0).float().mean() > 0.5
        assert ours.max() < model.max_depth_m - 0.1
        assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("grid", [(9, 12), (18, 24), (36, 38), (37, 20), (50, 74)])
def test_position_embedding_is_resampled_at_the_official_positions(grid: tuple[int, int]) -> None:
    pos_embed = torch.randn(1, 1370, 8, generator=torch.Generator().manual_seed(0))
    ours = resize_position_embedding(pos_embed, grid)
    assert (ours - resampled(pos_embed, *grid)).abs().max() < 2e-5


def test_position_embedding_is_untouched_on_its_own_grid() -> None:
    pos_embed = torch.randn(1, 1370, 8)
    assert resize_position_embedding(pos_embed, (37, 37)) is pos_embed


def test_pictures_of_a_batch_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric").eval()
    images = picture(0, 3, 70, 98)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        assert (model(images) - alone).abs().max() < 1e-4


def gradients(model: DepthAnythingV2, image: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(image).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("encoder", ["vitt", "small-swiglu"])
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_only_the_unused_five_get_no_gradient(encoder: str, kind: str) -> None:
    torch.manual_seed(0)
    model = DepthAnythingV2(encoder, kind=kind)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(UNUSED)
    assert len(UNUSED) == 5
    # Thawed on purpose: nothing but their being unused may keep gradients from them.
    model.requires_grad_(True)
    without = {name for name, g in gradients(model, picture(0, 2, 42, 56)).items() if g is None}
    assert without == set(UNUSED)


class Saved:
    """A tensor that autograd keeps for the backward pass; lives as long as it is kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("what", ["none", "encoder"])
def test_recomputation_changes_memory_and_nothing_else(what: str) -> None:
    image = picture(0, 2, 56, 70)
    outputs, grads, kept = [], [], []
    for mode in ("none", "encoder", "encoder+head"):
        torch.manual_seed(0)
        model = DepthAnythingV2("vitt", kind="metric", checkpointing=mode)
        freeze(model, what)
        saved: weakref.WeakSet[Saved] = weakref.WeakSet()

        def pack(tensor: Tensor, saved: weakref.WeakSet[Saved] = saved) -> Saved:
            saved.add(entry := Saved(tensor))
            return entry

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
            output = model(image)
        storages = [entry.tensor.untyped_storage() for entry in saved]
        kept.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        outputs.append(output.detach())
        grads.append(gradients(model, image))
    for output, grad in zip(outputs[1:], grads[1:], strict=True):
        assert torch.equal(output, outputs[0])
        for name, g in grad.items():
            assert (g is None) == (grads[0][name] is None), name
            assert g is None or torch.equal(g, grads[0][name]), name
    if what == "none":
        assert kept[1] < 0.8 * kept[0]
        assert kept[2] < 0.3 * kept[1]
    else:
        assert kept[1] == kept[0]


def test_recomputation_rests_without_gradients() -> None:
    model = DepthAnythingV2("vitt", kind="metric", checkpointing="encoder+head")
    calls = []
    for block in model.pretrained.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(picture(0, 1, 28, 28))
    assert len(calls) == 6
    model(picture(0, 1, 28, 28)).sum().backward()
    assert len(calls) == 6 + 2 * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sigmoid_outlives_half_precision(dtype: torch.dtype) -> None:
    """With the last layer's weights at 0 the logit is its bias, and the depth a closed form."""
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=80.0)
    weight = model.get_parameter("depth_head.scratch.output_conv2.2.weight")
    bias = model.get_parameter("depth_head.scratch.output_conv2.2.bias")
    torch.nn.init.zeros_(weight)
    torch.nn.init.constant_(bias, -30.0)
    with torch.autocast("cpu", dtype):
        depth = model(picture(0, 1, 28, 42))
    assert depth.dtype == torch.float32
    expected = 80.0 / (1.0 + math.exp(30.0))
    assert torch.allclose(depth, torch.tensor(expected), rtol=1e-5, atol=0)
    depth.log().sum().backward()
    # d log(sigmoid(x)) / dx = 1 - sigmoid(x), about 1 for each of the pixels.
    assert torch.allclose(bias.grad, torch.tensor(28.0 * 42.0), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_predictions_under_autocast_are_close_and_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric").eval()
    image = picture(0, 1, 70, 98)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", dtype):
            rough = model(image)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_a_fresh_head_starts_mid_range_and_learns(kind: str, seed: int) -> None:
    """Nothing saturated, the picture visible in the output, every layer within reach."""
    torch.manual_seed(seed)
    model = DepthAnythingV2("vitt", kind=kind, max_depth_m=10.0)
    image = picture(seed, 2, 126, 168)
    output = model(image)
    if kind == "metric":
        assert output.min() > 1.0
        assert output.max() < 9.0
        assert abs(output.mean() - 5.0) < 1.5
    else:
        assert (output > 0).float().mean() > 0.99
        assert abs(output.mean() - 1.0) < 0.5
    assert output.std() > 0.05
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    (output * direction).mean().backward()
    top = model.get_parameter("depth_head.scratch.output_conv2.2.weight").grad.norm()
    for name, p in model.named_parameters():
        if name not in UNUSED and p.ndim > 1:
            assert 1e-4 * top < p.grad.norm() < 1e4 * top, name


def test_the_tiny_model_learns_a_scene_by_heart() -> None:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind="metric", max_depth_m=10.0)
    image = picture(0, 2, 56, 70)
    v = torch.linspace(0, 1, 56).view(1, 1, 56, 1)
    depth_m = 1.0 + 6.0 * v + 2.0 * image[:, :1]
    optimiser = torch.optim.AdamW(parameter_groups(model, 3e-4, 10.0, 0.01))
    losses = []
    for _ in range(40):
        loss = (model(image) - depth_m).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = DepthAnythingV2("vitt", kind="metric")
    groups = parameter_groups(model, lr=1e-4, head_lr_factor=10.0, weight_decay=0.05)
    torch.optim.AdamW(groups)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(name for name in names.values() if name not in UNUSED)
    for group in groups:
        for name in (names[id(p)] for p in group["params"]):
            head = name.startswith("depth_head.")
            assert group["lr"] == pytest.approx(1e-3 if head else 1e-4)
            matrix = name.endswith(".weight") and "norm" not in name
            assert group["weight_decay"] == (0.05 if matrix else 0.0), name
    assert [group["name"] for group in groups] == [
        "encoder", "encoder no decay", "head", "head no decay",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "first_blocks", "frozen"),
    [
        ("none", 0, ()),
        ("encoder", 0, ("pretrained.",)),
        ("head", 0, ("depth_head.",)),
        (
            "none",
            2,
            (
                "pretrained.cls_token",
                "pretrained.pos_embed",
                "pretrained.patch_embed.",
                "pretrained.blocks.0.",
                "pretrained.blocks.1.",
            ),
        ),
        ("head", 1, ("depth_head.", "pretrained.cls_token", "pretrained.pos_embed",
                     "pretrained.patch_embed.", "pretrained.blocks.0.")),
    ],
)  # fmt: skip
def test_freezing(what: str, first_blocks: int, frozen: tuple[str, ...]) -> None:
    model = DepthAnythingV2("vitt", kind="metric")
    freeze(model, "encoder")
    freeze(model, what, first_blocks)
    expected = {
        name
        for name, _ in model.named_parameters()
        if name not in UNUSED and not any(name.startswith(prefix) for prefix in frozen)
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    with_gradient = {
        name for name, g in gradients(model, picture(0, 1, 28, 42)).items() if g is not None
    }
    assert with_gradient == expected
    in_groups = sum(len(g["params"]) for g in parameter_groups(model, 1e-4, 1.0, 0.0))
    assert in_groups == len(expected)


def test_first_ten_blocks_are_not_the_first() -> None:
    """``blocks.1.`` must not match ``blocks.10.``."""
    with torch.device("meta"):
        model = DepthAnythingV2("vits", kind="metric")
    freeze(model, "none", first_blocks=2)
    assert model.get_parameter("pretrained.blocks.10.norm1.weight").requires_grad
    assert not model.get_parameter("pretrained.blocks.1.norm1.weight").requires_grad


def test_units() -> None:
    assert DepthAnythingV2("vitt", kind="metric").units == "m"
    assert DepthAnythingV2("vitt", kind="relative").units == "1/depth"


@pytest.mark.parametrize("size", [(27, 28), (28, 30), (0, 28)])
def test_sizes_that_are_no_multiple_of_14_are_refused(size: tuple[int, int]) -> None:
    model = DepthAnythingV2("vitt", kind="metric")
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of 14"):
        model(torch.zeros(1, 3, *size))


def test_mistakes_in_the_config_are_named() -> None:
    with pytest.raises(UserError, match=r"encoder: expected one of vitt, vits.*found 'vit-s'"):
        DepthAnythingV2("vit-s", kind="metric")
    with pytest.raises(UserError, match=r"max_depth_m: expected .* got 0"):
        DepthAnythingV2("vitt", kind="metric", max_depth_m=0.0)
    model = DepthAnythingV2("vitt", kind="metric")
    with pytest.raises(UserError, match=r"model.frozen_blocks: expected 0 to 6 for vitt, found 7"):
        freeze(model, "none", first_blocks=7)
