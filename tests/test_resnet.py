"""ResNet-50 against torchvision's, its decoder against plain operations, and how it starts."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import WeightFile, _load, load_weights, open_model
from flatdepth.models.midas import MidasV21
from flatdepth.models.networks import make_network
from flatdepth.models.probe import probe_image
from flatdepth.models.resnet import Decoder, FrozenNorm, ResNetDepth


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """torchvision's network with statistics that a training might have left."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def maps(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of torchvision's four stages."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    found = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        found.append(x)
    return found


@pytest.mark.parametrize("how", ["bare", "module", "lightning"])
def test_torchvisions_files_start_the_encoder(trained: nn.Module, how: str, tmp_path: Path) -> None:
    tensors = trained.state_dict()
    content: dict[str, object] = {
        "bare": tensors,
        "module": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "lightning": {"state_dict": {f"model.{n}": t for n, t in tensors.items()}, "epoch": 90},
    }[how]
    path = tmp_path / "resnet50-0676ba61.pth"
    torch.save(content, path)
    torch.manual_seed(1)
    model = ResNetDepth("resnet50", kind="metric").eval()
    head = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("depth_head.")}
    report = load_weights(model, str(path), head="fresh")
    assert "names of torchvision" in str(report) and {*report.fresh} == head.keys()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in head.items())
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for found, wanted in zip(model.pretrained(image), maps(trained, image), strict=True):
            assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.max())
    with pytest.raises(UserError, match="holds no depth head"):
        open_model(str(path))


def test_its_encoder_is_as_large_as_torchvisions() -> None:
    with torch.device("meta"):
        model = ResNetDepth("resnet50", kind="metric")
    norms = sum(
        2 * module.weight.numel() for module in model.modules() if type(module) is FrozenNorm
    )
    assert sum(p.numel() for p in model.pretrained.parameters()) + norms == 23_508_032
    widths = (2048, 512, 256, 128, 64, 1)
    convolutions = sum(16 * a * b for a, b in pairwise(widths))
    decoder = sum(p.numel() for p in model.depth_head.parameters())
    assert decoder == convolutions + 2 * (512 + 256 + 128 + 64) + 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("resnet101", r"260 are unexpected \(pretrained\.blocks\.16"),
        ("wide_resnet50_2", r"differ \(pretrained\.blocks\.0\.conv1"),
        ("resnet34", "are missing"),
    ],
)
def test_other_resnets_are_refused(name: str, fault: str) -> None:
    with torch.device("meta"):
        model = ResNetDepth("resnet50", kind="metric")
        tensors = getattr(torchvision.models, name)().state_dict()
    renamed = ResNetDepth.renamed(tensors)
    assert renamed is not None and (ResNetDepth.size_of(renamed[0]) is None) == (
        name == "resnet101"
    )
    weights = WeightFile(
        source="FILE",
        path=Path("FILE"),
        network="resnet50",
        tensors=renamed[0],
        unwrapped=(),
        metadata=None,
    )
    with pytest.raises(UserError, match=fault):
        _load(model, weights, "fresh")


def test_midas_starts_from_torchvisions_resnext_too() -> None:
    """Its encoder is the same network by other names."""
    with torch.device("meta"):
        names = torchvision.models.resnext101_32x8d().state_dict()
        model = MidasV21("resnext101", kind="relative")
    renamed = ResNetDepth.renamed(names)
    assert renamed is not None
    wanted = {n: t.shape for n, t in model.state_dict().items() if n.startswith("pretrained.")}
    assert {n: t.shape for n, t in renamed[0].items()} == wanted


def test_the_decoder_is_five_transposed_convolutions() -> None:
    torch.manual_seed(0)
    decoder = Decoder(96, (64, 64, 32, 32))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = dict(decoder.named_parameters())
    x = wanted = torch.randn(2, 96, 2, 3)
    for stage in range(4):
        at = f"stages.{stage}"
        wanted = F.conv_transpose2d(wanted, weights[f"{at}.0.weight"], stride=2, padding=1)
        grouped = wanted.unflatten(1, (32, -1)).flatten(2)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        wanted = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(wanted.shape)
        scale, shift = weights[f"{at}.1.weight"], weights[f"{at}.1.bias"]
        wanted = (wanted * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    wanted = F.conv_transpose2d(
        wanted, weights["output.weight"], weights["output.bias"], stride=2, padding=1
    )
    found = decoder(x)
    assert found.shape == (2, 1, 64, 96)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_pixel_of_a_transposed_convolution_stands_out() -> None:
    """Of equal input and equal weights all pixels inside are equal: no chessboard."""
    decoder = Decoder(32, (32, 32, 32, 32))
    nn.init.ones_(decoder.output.weight)
    inside = decoder.output(torch.ones(1, 32, 5, 7))[..., 1:-1, 1:-1]
    assert inside.shape[-2:] == (8, 12) and float(inside.max() - inside.min()) == 0


@pytest.mark.parametrize("name", ["resnet50", "midas_v21"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_new_network_starts_sane(name: str, seed: int) -> None:
    """Nothing explodes or vanishes on the way, and neither a sigmoid nor a ReLU is saturated."""
    encoder = {"resnet50": "resnet50", "midas_v21": "lite3"}[name]
    torch.manual_seed(seed)
    metric = make_network(name, encoder, kind="metric", max_depth_m=20.0).eval()
    image = probe_image(32)
    with torch.no_grad():
        for taken in metric.pretrained((image - metric.image_mean) / metric.image_std):
            assert 0.1 < float(taken.square().mean()) < 30
        share = metric(image) / 20
        relative = make_network(name, encoder, kind="relative").eval()
        relative.load_state_dict(metric.state_dict())
        nn.init.ones_(relative.get_parameter(relative.output_bias))
        assert float((relative(image) > 0).float().mean()) > 0.95
    start = 0.2 if name == "resnet50" else 0.5
    assert abs(float(share.median()) - start) < 0.12
    assert float(share.min()) > 0.01 and float(share.max()) < 0.95
