"""MiDaS v2.1 against its published module tree, written out in plain PyTorch with batch norms."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from flatdepth.errors import UserError
from flatdepth.models import midas
from flatdepth.models.checkpoint import load_weights, open_model, read_weights, save_weights
from flatdepth.models.efficientnet import Stage
from flatdepth.models.midas import LargeSpec, MidasV21, SmallSpec
from flatdepth.models.networks import network_class

STAGES = [(1, 24, 1, 3), (3, 32, 2, 3), (3, 48, 2, 5), (5, 96, 2, 3), (5, 136, 1, 5),
          (6, 232, 2, 5), (1, 384, 1, 3)]  # fmt: skip
"""Blocks, channels, stride and kernel of tf_efficientnet_lite3."""


class Unit(nn.Module):
    """ResidualConvUnit; in the large network the first ReLU works in place."""

    def __init__(self, channels: int, in_place: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(x))
        return self.conv2(self.relu(y)) + x


class Level(nn.Module):
    def __init__(self, channels: int, outputs: int | None) -> None:
        super().__init__()
        self.resConfUnit1 = Unit(channels, outputs is None)
        self.resConfUnit2 = Unit(channels, outputs is None)
        if outputs is not None:
            self.out_conv = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        if level is not None:
            x = x + self.resConfUnit1(level)
        x = self.resConfUnit2(x)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x) if hasattr(self, "out_conv") else x


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Same(nn.Conv2d):
    """Padded as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            missing = max(0, ((side + stride - 1) // stride - 1) * stride + kernel - side)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


class Inverted(nn.Module):
    """A block of geffnet, separable where it does not widen."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        depthwise = Same(inner, inner, kernel, stride, groups=inner, bias=False)
        if expand == 1:
            self.conv_dw, self.bn1 = depthwise, nn.BatchNorm2d(inner, eps=1e-3)
            self.conv_pw = Same(inner, outputs, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        else:
            self.conv_pw = Same(inputs, inner, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(inner, eps=1e-3)
            self.conv_dw, self.bn2 = depthwise, nn.BatchNorm2d(inner, eps=1e-3)
            self.conv_pwl = Same(inner, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv_pwl"):
            y = F.relu6(self.bn1(self.conv_pw(x)))
            y = self.bn3(self.conv_pwl(F.relu6(self.bn2(self.conv_dw(y)))))
        else:
            y = self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))
        return x + y if self.is_residual else y


class Published(nn.Module):
    """The whole network by its published names."""

    def __init__(self, encoder: list[nn.Module], channels: list[int], features: list[int]) -> None:
        super().__init__()
        self.pretrained, self.scratch = nn.Module(), nn.Module()
        is_small = features[0] != features[3]
        for level, (part, c, f) in enumerate(zip(encoder, channels, features, strict=True), 1):
            self.pretrained.add_module(f"layer{level}", part)
            rn = nn.Conv2d(c, f, 3, padding=1, bias=False)
            self.scratch.add_module(f"layer{level}_rn", rn)
            finer = features[max(level - 2, 0)]
            self.scratch.add_module(f"refinenet{level}", Level(f, finer if is_small else None))
        f = features[0]
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(f, f // 2, 3, padding=1),
            Twice(),
            nn.Conv2d(f // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (b, 3, h, w) -> inverse depth (b, 1, h, w)."""
        levels = []
        for level in (1, 2, 3, 4):
            x = getattr(self.pretrained, f"layer{level}")(x)
            levels.append(getattr(self.scratch, f"layer{level}_rn")(x))
        path = self.scratch.refinenet4(levels[3])
        for level in (3, 2, 1):
            path = getattr(self.scratch, f"refinenet{level}")(path, levels[level - 1])
        return self.scratch.output_conv(path)


def large(blocks: tuple[int, ...], width: int, groups: int, group: int, features: int) -> Published:
    def block(inputs: int, planes: int, stride: int) -> nn.Module:
        down = None
        if stride > 1 or inputs != 4 * planes:
            down = nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )
        return Bottleneck(inputs, planes, stride, down, groups, group)

    stages, inputs = [], width
    for stage, count in enumerate(blocks):
        row = []
        for number in range(count):
            row.append(block(inputs, width * 2**stage, 2 if stage and not number else 1))
            inputs = 4 * width * 2**stage
        stages.append(nn.Sequential(*row))
    stem = (
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )
    encoder = [nn.Sequential(*stem, stages[0]), *stages[1:]]
    return Published(encoder, [4 * width * 2**stage for stage in range(4)], 4 * [features])


def small(stem: int, stages: list[tuple[int, int, int, int]], features: int) -> Published:
    rows, inputs = [], stem
    for place, (count, channels, stride, kernel) in enumerate(stages):
        row = []
        for number in range(count):
            step, expand = (1 if number else stride), (6 if place else 1)
            row.append(Inverted(inputs, channels, step, kernel, expand))
            inputs = channels
        rows.append(nn.Sequential(*row))
    first = (Same(3, stem, 3, 2, bias=False), nn.BatchNorm2d(stem, eps=1e-3), nn.ReLU6())
    parts = [(*first, *rows[:2]), rows[2:3], rows[3:5], rows[5:]]
    encoder: list[nn.Module] = [nn.Sequential(*part) for part in parts]
    channels = [stages[place][1] for place in (1, 2, 4, 6)]
    return Published(encoder, channels, [features * 2**level for level in range(4)])


def full(encoder: str) -> Published:
    if encoder == "resnext101":
        return large((3, 4, 23, 3), 64, 32, 8, 256)
    return small(32, STAGES, 64)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The published sizes with fewer channels, so that tests take seconds."""
    spec = LargeSpec(blocks=(1, 2, 1, 1), width=8, groups=2, group_width=64, features=16)
    monkeypatch.setitem(midas.ENCODERS, "resnext101", spec)
    wide = midas.ENCODERS["lite3"]
    assert isinstance(wide, SmallSpec)
    stages = tuple(
        Stage(
            expand=stage.expand,
            channels=stage.channels // 4,
            blocks=stage.blocks,
            stride=stage.stride,
            kernel=stage.kernel,
            is_taken=stage.is_taken,
        )
        for stage in wide.stages
    )
    monkeypatch.setitem(midas.ENCODERS, "lite3", SmallSpec(stem=8, stages=stages, features=16))
    yield


def published(encoder: str, image: Tensor, near: float) -> Published:
    """Random weights and statistics of ``narrow`` size.

    Args:
        near: share of the image's pixels that are not at infinity.
    """
    torch.manual_seed(0)
    net = (
        large((1, 2, 1, 1), 8, 2, 64, 16)
        if encoder == "resnext101"
        else small(8, [(n, c // 4, s, k) for n, c, s, k in STAGES], 16)
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            # Branches that grow by their norms would make all else rounding errors.
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked += 7
    net.eval()
    last = net.scratch.output_conv[4]
    with torch.no_grad():
        nn.init.constant_(last.bias, 1e4)
        logits = net(normalised(image))
        last.bias -= torch.quantile(logits, 1 - near)
    return net


def normalised(image: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]


def picture() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def wrap(tensors: dict[str, Tensor], how: str) -> dict[str, object]:
    """What trainings save, with the moments of an optimiser, which are as many tensors again."""
    moments = {i: {"exp_avg": t.clone(), "step": 3} for i, t in enumerate(tensors.values())}
    return {
        "bare": tensors,
        "released": {"optimizer": {"state": moments, "param_groups": []}, "model": tensors},
        "parallel": {"epoch": 3, "model": {f"module.{n}": t for n, t in tensors.items()}},
        "lightning": {
            "state_dict": {
                **{f"net.{n}": t for n, t in tensors.items()},
                "loss.weight": torch.ones(3),
            },
            "callbacks": {},
        },
    }[how]


FILES = [("resnext101", "midas_v21_384.pt"), ("lite3", "midas_v21_small_256.pt")]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("how", ["bare", "released", "parallel", "lightning"])
@pytest.mark.parametrize(("encoder", "file"), FILES)
def test_published_files_predict_what_they_did(
    encoder: str, file: str, how: str, tmp_path: Path
) -> None:
    image = picture()
    net = published(encoder, image, near=0.6)
    torch.save(wrap(net.state_dict(), how), tmp_path / file)
    model, report = open_model(str(tmp_path / file))
    assert (model.name, model.encoder, model.kind) == ("midas_v21", encoder, "relative")
    assert report.matched == report.total and "names of MiDaS" in str(report)
    with torch.no_grad():
        found, wanted = model(image), net(normalised(image))
    assert 0.5 < float((wanted > 0).float().mean()) < 0.7
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.max())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("encoder", "file"), FILES)
def test_the_published_code_loads_what_is_saved_here(
    encoder: str, file: str, tmp_path: Path
) -> None:
    """As it does, strictly; and a second trip changes no bit."""
    image = picture()
    net = published(encoder, image, near=0.6)
    torch.save(net.state_dict(), tmp_path / file)
    model, _ = open_model(str(tmp_path / file))
    with torch.no_grad():
        model.get_parameter(model.output_bias).add_(0.25)
        for block in model.blocks:
            next(block.parameters()).mul_(1.01)
        pth, safe = save_weights(model, tmp_path / "tuned")
        again, _ = open_model(str(safe))
        assert torch.equal(again(image), model(image))
        net.load_state_dict(torch.load(pth, weights_only=True), strict=True)
        found, wanted = net(normalised(image)), model(image)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.max())


@pytest.mark.parametrize(
    ("encoder", "parameters"), [("resnext101", 105_362_945), ("lite3", 21_320_545)]
)
def test_full_sizes_have_the_published_names_and_shapes(encoder: str, parameters: int) -> None:
    with torch.device("meta"):
        net, model = full(encoder), MidasV21(encoder, kind="relative")
    wanted = {n: t.shape for n, t in net.state_dict().items() if not n.endswith("_tracked")}
    assert {n: t.shape for n, t in model.published(model.state_dict()).items()} == wanted
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_names_of_published_files_say_what_they_hold() -> None:
    names = {
        "midas_v21_384": "resnext101",
        "model-f6b98070": "resnext101",
        "midas_v21-f6b98070": "resnext101",
        "model-f46da743": "resnext101",
        "midas_v21_small_256": "lite3",
        "model-small-70d6b9c8": "lite3",
        "midas_v21_small-70d6b9c8": "lite3",
    }
    for stem, encoder in names.items():
        assert MidasV21.named(stem) == {"encoder": encoder, "kind": "relative"}
    assert MidasV21.named("dpt_large_384") is None
    assert MidasV21.licence("lite3") == MidasV21.licence("resnext101") != MidasV21.licence("tiny")


@pytest.mark.usefixtures("narrow")
def test_relative_weights_are_not_read_as_metres(tmp_path: Path) -> None:
    file = tmp_path / "midas_v21_384.pt"
    torch.save(published("resnext101", picture(), near=1.0).state_dict(), file)
    metric = MidasV21("resnext101", kind="metric", max_depth_m=40.0)
    before = {n: t.clone() for n, t in metric.state_dict().items()}
    with pytest.raises(UserError, match="weights of a relative model read as metric"):
        load_weights(metric, str(file))
    assert all(torch.equal(t, before[n]) for n, t in metric.state_dict().items())
    report = load_weights(metric, str(file), head="fresh")
    assert {n for n in before if n.startswith("depth_head.")} == {*report.fresh}


@pytest.mark.usefixtures("narrow")
def test_what_is_no_midas_file_is_named(tmp_path: Path) -> None:
    dpt = {"pretrained.model.cls_token": torch.zeros(1, 1, 8), "scratch.layer1_rn.weight": None}
    assert network_class("midas_v21").renamed(dpt) is None  # type: ignore[arg-type]
    tensors = published("lite3", picture(), near=1.0).state_dict()
    torch.save(tensors, tmp_path / "small.pt")
    assert read_weights(str(tmp_path / "small.pt")).encoder == "lite3"
    with pytest.raises(UserError, match="expected encoder resnext101, found lite3; set encoder to"):
        load_weights(MidasV21("resnext101", kind="relative"), str(tmp_path / "small.pt"))
    for spoilt in (None, torch.ones(3)):
        name = "pretrained.layer2.0.1.bn2.running_var"
        rest = {n: t for n, t in tensors.items() if n != name}
        torch.save(rest if spoilt is None else {**rest, name: spoilt}, tmp_path / "damaged.pt")
        with pytest.raises(UserError, match=r"beside layer2\.0\.1\.conv_dw\.weight a norm"):
            open_model(str(tmp_path / "damaged.pt"), kind="relative")
    torch.save({**tensors, "scratch.refinenet5.out_conv.bias": torch.ones(3)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"1 are unexpected \(.*refinenet5"):
        open_model(str(tmp_path / "more.pt"), kind="relative")
