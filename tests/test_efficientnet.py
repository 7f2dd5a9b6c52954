"""The convolutional network: published names and sizes, and numbers against a plain reference."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import load_weights, open_model, save_weights
from flatdepth.models.efficientnet import ENCODERS, EfficientNetDepth
from flatdepth.models.network import UNUSED, freeze, parameter_groups

STRIDES = [stage.stride if first == 0 else 1 for stage in ENCODERS["lite0"].stages
           for first in range(stage.blocks)]  # fmt: skip


def published(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by the names of the published weights, with running statistics."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def conv(name: str, norm: str, out: int, inputs: int, kernel: int) -> None:
        size = inputs * kernel * kernel
        tensors[f"{name}.weight"] = torch.randn(out, inputs, kernel, kernel, generator=draw)
        tensors[f"{name}.weight"] *= (2 / size) ** 0.5
        for leaf, low, high in (
            ("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 2.0),
        ):  # fmt: skip
            tensors[f"{norm}.{leaf}"] = low + (high - low) * torch.rand(out, generator=draw)
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    number, channels = 0, 32
    for stage in ENCODERS["lite0"].stages:
        for _ in range(stage.blocks):
            block, inner = f"_blocks.{number}.", channels * stage.expand
            if stage.expand > 1:
                conv(f"{block}_expand_conv", f"{block}_bn0", inner, channels, 1)
            conv(f"{block}_depthwise_conv", f"{block}_bn1", inner, 1, stage.kernel)
            conv(f"{block}_project_conv", f"{block}_bn2", stage.channels, inner, 1)
            number, channels = number + 1, stage.channels
    conv("_conv_head", "_bn1", 1280, 320, 1)
    tensors["_fc.weight"] = torch.zeros(1000, 1280)
    return tensors


def reference(tensors: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """Outputs of all blocks, each layer written out with its batch norm."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = tensors[f"{conv}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        pads = []
        for side in (x.shape[3], x.shape[2]):
            outputs = (side + stride - 1) // stride
            missing = max(0, (outputs - 1) * stride + kernel - side)
            pads += [missing // 2, missing - missing // 2]
        x = F.conv2d(F.pad(x, pads), weight, None, stride, groups=groups)
        own = [
            tensors[f"{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(x, *own, training=False, eps=1e-3)

    x, found = F.relu6(layer(image, "_conv_stem", "_bn0", 2)), []
    for number, stride in enumerate(STRIDES):
        block, y = f"_blocks.{number}.", x
        if f"{block}_expand_conv.weight" in tensors:
            y = F.relu6(layer(y, f"{block}_expand_conv", f"{block}_bn0"))
        y = F.relu6(layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        y = layer(y, f"{block}_project_conv", f"{block}_bn2")
        x = y + x if y.shape == x.shape else y
        found.append(x)
    return found


def model(**changes: object) -> EfficientNetDepth:
    torch.manual_seed(0)
    return EfficientNetDepth("lite0", kind="metric", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(168, 224), (98, 126), (14, 14)])
def test_published_weights_say_what_they_said(tmp_path: Path, size: tuple[int, int]) -> None:
    tensors = published()
    torch.save(tensors, tmp_path / "efficientnet-lite0.pth")
    ours = model()
    report = load_weights(ours, str(tmp_path / "efficientnet-lite0.pth"), head="fresh")
    assert "from the names of EfficientNet-Lite" in str(report)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = ours.pretrained(image), reference(tensors, image)
    for map_, place in zip(found, (2, 4, 10, 15), strict=True):
        torch.testing.assert_close(map_, wanted[place], rtol=1e-4, atol=1e-4)
    assert ours(image.sigmoid()).shape == (2, 1, *size)


def test_its_encoder_has_as_many_parameters_as_the_published_one() -> None:
    # 4,652,008 without the classifier, the last convolution and its norm
    wanted = 4_652_008 - 1281 * 1000 - (320 * 1280 + 2 * 1280)
    assert sum(p.numel() for p in model().pretrained.parameters()) == wanted


def test_files_come_back_and_name_what_they_hold(tmp_path: Path) -> None:
    first = model(max_depth_m=80.0).eval()
    _, safe = save_weights(first, tmp_path / "rooms")
    again, _ = open_model(str(safe))
    image = torch.rand(1, 3, 28, 42)
    assert isinstance(again, EfficientNetDepth) and again.max_depth_m == 80.0
    assert torch.equal(again(image), first(image))
    wrapped = {f"net.{name}": tensor for name, tensor in first.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pth")
    again, _ = open_model(str(tmp_path / "wrapped.pth"), kind="metric", max_depth_m=80.0)
    assert torch.equal(again(image), first(image))
    with pytest.raises(UserError, match=r"encoder is vitt in the file but lite0 in the model; set"):
        load_weights(model(), "shards/demo_vitt.safetensors", head="fresh")
    tensors = published() | {"_blocks.0._se_reduce.weight": torch.zeros(1)}
    torch.save(tensors, tmp_path / "b0.pth")
    with pytest.raises(UserError, match=r"found an EfficientNet with squeeze-and-excitation"):
        load_weights(model(), str(tmp_path / "b0.pth"), head="fresh")


def test_a_sample_does_not_depend_on_its_batch_and_recomputation_changes_nothing() -> None:
    image = torch.rand(3, 3, 28, 42)
    gradients = []
    for checkpointing in ("none", "encoder+head"):
        own = model(checkpointing=checkpointing)
        torch.testing.assert_close(own(image)[1:2], own(image[1:2]), rtol=1e-5, atol=1e-6)
        own(image).mean().backward()
        gradients.append({n: p.grad for n, p in own.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_parts_freeze_and_every_trained_tensor_is_in_one_group() -> None:
    own = model()
    freeze(own, "none", 3)
    frozen = {name for name, p in own.named_parameters() if not p.requires_grad}
    assert frozen == {*UNUSED} & {name for name, _ in own.named_parameters()} | {
        f"pretrained.{name}"
        for name, _ in own.pretrained.named_parameters()
        if name.startswith(("stem.", "blocks.0.", "blocks.1.", "blocks.2."))
    }
    groups = parameter_groups(own, 1e-4, 10.0, 0.01)
    grouped = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(grouped) == len({*grouped})
    assert {*grouped} == {id(p) for p in own.parameters() if p.requires_grad}
