"""A plain baseline: ResNet-50 and five transposed convolutions, without skips between them.

Written from the papers (He et al. 2016, "Deep Residual Learning"; Xie et al. 2017, "ResNeXt", whose
grouped blocks MiDaS v2.1 has) and from the names and shapes of torchvision's weights, whose stride
is in the 3 x 3 convolution. The decoder only sees the map at stride 32, so edges are soft.

Shapes: b batch, c channels, h and w pixels.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flatdepth.models.network import DepthNetwork, call, run_blocks

EXPANSION = 4
"""Channels that a block gives, as a multiple of its stage's."""

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""What torchvision calls them; blocks are counted anew in each."""

START = 0.2
"""Share of the maximum depth that a new network predicts. The median pixel of the rendered rooms is
at 4 of 20 m; the half that a sigmoid starts from would be more than twice as far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetSpec:
    """The sizes of an encoder.

    Attributes:
        blocks: how many each of the four stages has; the strides are 4, 8, 16 and 32.
        width: channels of the stem and of the first stage, before ``EXPANSION``; doubled in each.
        groups: of a block's 3 x 3 convolution.
        group_width: channels of a group where ``width`` is 64; 64 with one group is ResNet.
    """

    blocks: tuple[int, int, int, int]
    width: int = 64
    groups: int = 1
    group_width: int = 64

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of the four stages' maps, fine to coarse."""
        return tuple(EXPANSION * self.width * 2**stage for stage in range(4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(ResNetSpec):
    """The sizes of one model.

    Attributes:
        decoder: channels after each transposed convolution but the last, multiples of 32.
    """

    decoder: tuple[int, int, int, int]


ENCODERS = {
    "tiny": Spec(blocks=(2, 1, 1, 1), width=8, decoder=(64, 64, 32, 32)),
    "resnet50": Spec(blocks=(3, 4, 6, 3), decoder=(512, 256, 128, 64)),
}


class ResNetDepth(DepthNetwork):
    """ResNet-50 and a decoder; ``DepthNetwork`` has its arguments.

    Weights may start from torchvision's ImageNet files (``resnet50-*.pth``), with a new head.
    """

    name = "resnet50"
    title = "ResNet-50 encoder-decoder"
    architecture = "ResNet-50 with a decoder of five transposed convolutions"
    probed = True
    sizes = ENCODERS
    stem = ("stem.",)
    unused = ()
    output_bias = "depth_head.output.bias"

    @staticmethod
    def parts(spec: Spec, encoder: bool, head: bool) -> tuple[nn.Module, nn.Module]:
        decoder = Decoder(spec.out_channels[-1], spec.decoder, recompute=head)
        return ResNet(spec, recompute=encoder), decoder

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        image = image.contiguous(memory_format=torch.channels_last)
        return self.depth_head(self.pretrained(image)[-1])

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        if encoder != "resnet50":
            return None
        return "bsd-3-clause", "Derived from torchvision's weights, which are BSD-3-Clause."

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        if "pretrained.stem.0.weight" in tensors:
            return dict(tensors), []
        if not {"conv1.weight", "layer1.0.conv1.weight"} <= tensors.keys():
            return None
        places = {"conv1.": "stem.0.", "bn1.": "stem.1."} | numbered(tensors, STAGES)
        own = {
            f"pretrained.{name}": tensor
            for name, tensor in renamed_places(tensors, places).items()
            if not name.startswith("fc.")
        }
        return own, ["renamed the tensors from the names of torchvision, without the classifier"]

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        return size_of_resnet(tensors, cls.sizes)


class ResNet(nn.Module):
    """The encoder; ``forward`` takes a normalised image and returns four maps, fine to coarse.

    ``blocks`` are those of all four stages in a row.
    """

    def __init__(self, spec: ResNetSpec, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem = nn.Sequential(
            conv(3, spec.width, 7, stride=2),
            FrozenNorm(spec.width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[Bottleneck] = []
        self.taken: list[int] = []
        channels = spec.width
        for stage, count in enumerate(spec.blocks):
            width = spec.width * 2**stage
            inner = width * spec.group_width // 64 * spec.groups
            for number in range(count):
                stride = 2 if stage and not number else 1
                outputs = EXPANSION * width
                blocks.append(Bottleneck(channels, inner, outputs, stride, spec.groups))
                channels = outputs
            self.taken.append(len(blocks) - 1)
        # A norm of fixed statistics normalises nothing, so n new branches would double what passes
        # through n times; scaled by 1 / sqrt(n) all of them together multiply it by e at most.
        with torch.no_grad():
            for block in blocks:
                block.conv3.weight /= math.sqrt(len(blocks))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        x = self.stem(image)
        return run_blocks(self.blocks, x, self.taken, recompute=self.recompute)


class Bottleneck(nn.Module):
    """A residual block: narrow, filter within groups, widen."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, inner, 1), FrozenNorm(inner)
        self.conv2 = conv(inner, inner, 3, stride=stride, groups=groups)
        self.bn2 = FrozenNorm(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), FrozenNorm(outputs)
        self.downsample = (
            nn.Sequential(conv(inputs, outputs, 1, stride=stride), FrozenNorm(outputs))
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = F.relu_(self.bn1(self.conv1(x)))
        y = F.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu_(y + self.downsample(x))


class FrozenNorm(nn.Module):
    """Batch norm of fixed statistics and fixed scale: ``weight (x - mean) / sqrt(var + eps) +
    bias`` per channel, all of them buffers.

    As ``torchvision.ops.FrozenBatchNorm2d``, but it stays in the type of its input: there,
    activations under autocast would be float32.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class Decoder(nn.Module):
    """Five transposed convolutions; each doubles the sides.

    With kernel 4, stride 2 and padding 1 every output pixel inside is made of 2 x 2 input pixels,
    so none stands out. ``forward`` takes the map at stride 32 and returns logits.
    """

    def __init__(self, inputs: int, channels: Sequence[int], *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.stages = nn.ModuleList(
            nn.Sequential(
                _double(before, after, gain=math.sqrt(2), bias=False),
                nn.GroupNorm(32, after),
                nn.ReLU(inplace=True),
            )
            for before, after in zip((inputs, *channels[:-1]), channels, strict=True)
        )
        self.output = _double(channels[-1], 1, gain=0.5)
        nn.init.constant_(self.get_parameter("output.bias"), math.log(START / (1 - START)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        for stage in self.stages:
            x = call(stage, x, recompute=self.recompute)
        return call(self.output, x, recompute=self.recompute)


def numbered(names: Iterable[str], stages: Sequence[str]) -> dict[str, str]:
    """What the names of the blocks in ``stages`` begin with, and what they do in ``ResNet``.

    Blocks are counted in each stage, as in ``layer2.0.``, and through all of them in ``blocks.3.``.
    """
    names, found = list(names), list[str]()
    for stage in stages:
        pattern = re.compile(rf"{re.escape(stage)}\.(\d{{1,3}})\.")
        numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
        found += [f"{stage}.{number}." for number in sorted(numbers)]
    return {place: f"blocks.{index}." for index, place in enumerate(found)}


def renamed_places(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors whose names begin otherwise, without the counters of batch norms.

    Args:
        places: what a name begins with -> what it shall begin with; others stay as they are.
    """
    own = {}
    for name, tensor in tensors.items():
        start = next((start for start in places if name.startswith(start)), "")
        if not name.endswith(".num_batches_tracked"):
            own[places.get(start, "") + name.removeprefix(start)] = tensor
    return own


def size_of_resnet(tensors: Mapping[str, Tensor], sizes: Mapping[str, ResNetSpec]) -> str | None:
    """The key of ``sizes`` of a ``ResNet`` below ``pretrained.``, or None."""
    first = tensors.get("pretrained.stem.0.weight")
    if first is None or not first.ndim:
        return None
    found = (len(numbered(tensors, ["pretrained.blocks"])), first.shape[0])
    known = {(sum(spec.blocks), spec.width): name for name, spec in sizes.items()}
    return known.get(found)


def conv(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    gain: float = math.sqrt(2),
) -> nn.Conv2d:
    """A convolution that multiplies the standard deviation by ``gain`` when it is new.

    Before or after a ReLU, which halves the mean square, sqrt(2) keeps it (He et al. 2015).
    """
    layer = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias
    )
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _double(inputs: int, outputs: int, *, gain: float, bias: bool = True) -> nn.ConvTranspose2d:
    """A transposed convolution of which every output sums 4 products per input channel."""
    layer = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(4 * inputs))
    return layer
