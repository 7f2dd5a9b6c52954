"""A small convolutional network: EfficientNet-Lite0 with the fusion head of Depth Anything V2.

For few images and small machines: it starts from weights that know ImageNet, and 1,000 images teach
it more than they teach a transformer of its size. Written from the paper (Tan and Le 2019,
"EfficientNet", whose B0 it is without squeeze-and-excitation, with ReLU6 and an unscaled stem) and
from the names and shapes of the published weights. The head reads maps at strides 4, 8, 16 and 32,
as MiDaS v2.1 small does (Ranftl et al. 2020).

Shapes: b batch, c channels, h and w pixels.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.depth_anything import Scratch, resize
from flatdepth.models.network import DepthNetwork, call, run_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks of one width; the first has the stride.

    Attributes:
        expand: factor by which a block's inner width is larger than its input's.
        is_taken: whether the head reads the last block's output.
    """

    expand: int
    channels: int
    blocks: int
    stride: int
    kernel: int
    is_taken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """The sizes of one model.

    Attributes:
        stem: channels of the first convolution.
        features: channels of the head's fusion path.
        out_channels: channels of the four maps that the head reads, fine to coarse.
    """

    stem: int
    stages: tuple[Stage, ...]
    features: int

    @property
    def out_channels(self) -> tuple[int, ...]:
        return tuple(stage.channels for stage in self.stages if stage.is_taken)


ENCODERS = {
    "lite0": EncoderSpec(
        stem=32,
        stages=(
            Stage(expand=1, channels=16, blocks=1, stride=1, kernel=3),
            Stage(expand=6, channels=24, blocks=2, stride=2, kernel=3, is_taken=True),
            Stage(expand=6, channels=40, blocks=2, stride=2, kernel=5, is_taken=True),
            Stage(expand=6, channels=80, blocks=3, stride=2, kernel=3),
            Stage(expand=6, channels=112, blocks=3, stride=1, kernel=5, is_taken=True),
            Stage(expand=6, channels=192, blocks=4, stride=2, kernel=5),
            Stage(expand=6, channels=320, blocks=1, stride=1, kernel=3, is_taken=True),
        ),
        features=64,
    )
}


class EfficientNetDepth(DepthNetwork):
    """EfficientNet-Lite and the fusion head; ``DepthNetwork`` has its arguments."""

    name = "efficientnet"
    title = "EfficientNet-Lite"
    architecture = "EfficientNet-Lite with the fusion head of Depth Anything V2"
    probed = True
    sizes = ENCODERS
    stem = ("stem.",)

    @staticmethod
    def parts(spec: EncoderSpec, encoder: bool, head: bool) -> tuple[nn.Module, nn.Module]:
        return EfficientNet(spec, recompute=encoder), FusionHead(spec, recompute=head)

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        size = (image.shape[-2], image.shape[-1])
        # Channels of a pixel side by side: 1.6 times as fast on a CPU as rows of one channel.
        image = image.contiguous(memory_format=torch.channels_last)
        return self.depth_head(self.pretrained(image), size)

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        del encoder
        return "apache-2.0", "Derived from EfficientNet-Lite's weights, which are Apache-2.0."

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        if "pretrained.stem.scale" in tensors:
            return dict(tensors), []
        if "_conv_stem.weight" not in tensors:
            return None
        own = {f"pretrained.{name}": t for name, t in from_efficientnet(tensors).items()}
        return own, ["renamed the tensors from the names of EfficientNet-Lite, norms in scales"]

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        return "lite0" if "pretrained.stem.scale" in tensors else None


class EfficientNet(nn.Module):
    """The encoder; ``forward`` takes a normalised image and returns the four maps, fine to coarse.

    There is no batch norm: a batch of one is what fits small GPUs, and samples must not depend on
    each other. What the running statistics of the published weights do is in the convolutions'
    scales and biases.
    """

    def __init__(self, spec: EncoderSpec, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem = ScaledConv(3, spec.stem, 3, stride=2)
        blocks: list[MBConv] = []
        self.taken: list[int] = []
        channels = spec.stem
        for stage in spec.stages:
            for number in range(stage.blocks):
                stride = stage.stride if number == 0 else 1
                blocks.append(MBConv(channels, stage.channels, stage.expand, stride, stage.kernel))
                channels = stage.channels
            if stage.is_taken:
                self.taken.append(len(blocks) - 1)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        x = F.relu6(self.stem(image))
        return run_blocks(self.blocks, x, self.taken, recompute=self.recompute)


class MBConv(nn.Module):
    """An inverted residual block (Sandler et al. 2018): widen, filter each channel, narrow."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = inputs * expand
        if expand > 1:
            self.expand = ScaledConv(inputs, inner, 1)
        self.depthwise = ScaledConv(inner, inner, kernel, stride=stride, groups=inner)
        self.project = ScaledConv(inner, outputs, 1, gain=1.0)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = F.relu6(self.expand(x)) if hasattr(self, "expand") else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.is_residual else y


class ScaledConv(nn.Module):
    """A convolution with a learned scale per output channel, padded as TensorFlow pads ("SAME").

    Output i of n samples every stride-th pixel of a padded image; of an odd number of padded pixels
    one more is on the right and below.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        gain: float = math.sqrt(2),
    ) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.scale = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=gain / math.sqrt(self.weight[0].numel()))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        kernel, stride = self.weight.shape[-1], self.stride
        weight = self.weight * self.scale[:, None, None, None]
        if stride == 1:
            return F.conv2d(x, weight, self.bias, padding=kernel // 2, groups=self.groups)
        height, width = (kernel - stride + -side % stride for side in x.shape[-2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, weight, self.bias, stride, groups=self.groups)


class FusionHead(nn.Module):
    """The fusion path of Depth Anything V2's head over maps at strides 4, 8, 16 and 32.

    ``forward`` takes the maps, fine to coarse, and the image's (height, width), and returns logits
    at its pixels. They are made at half of them and enlarged.
    """

    def __init__(self, spec: EncoderSpec, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.scratch = Scratch(spec.out_channels, spec.features)

    def forward(
        self, taken: list[Float[Tensor, "b _ _ _"]], size: tuple[int, int]
    ) -> Float[Tensor, "b 1 _ _"]:
        half = (size[0] // 2, size[1] // 2)
        sizes = [half, *((x.shape[-2], x.shape[-1]) for x in taken[:-1])]
        path: Tensor | None = None
        for level in (4, 3, 2, 1):
            x, own = taken[level - 1], sizes[level - 1]
            path = call(self._fuse, level, x, path, own, recompute=self.recompute)
        return resize(call(self._output, path, recompute=self.recompute), size)

    def _fuse(
        self,
        level: int,
        x: Float[Tensor, "b c h w"],
        path: Float[Tensor, "b c2 h w"] | None,
        size: tuple[int, int],
    ) -> Float[Tensor, "b c2 h2 w2"]:
        x = getattr(self.scratch, f"layer{level}_rn")(x)
        return getattr(self.scratch, f"refinenet{level}")(x, path, size)

    def _output(self, path: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
        return self.scratch.output_conv2(self.scratch.output_conv1(path))


_BLOCK_CONV = re.compile(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight")
_NORM_OF = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
NORM_EPS = 1e-3
"""Of the batch norms of published EfficientNets."""


def from_efficientnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder by our names, with the batch norms in scales and biases; no classifier.

    ``gamma (W x - mean) / sqrt(var + 1e-3) + beta`` is ``scale W x + bias``.

    Raises:
        UserError: a convolution's norm is missing, or blocks have squeeze-and-excitation.
    """
    if any("._se_" in name for name in tensors):
        raise UserError(
            "expected EfficientNet-Lite, found an EfficientNet with squeeze-and-excitation; take "
            "the weights of a Lite model"
        )
    found: dict[str, Tensor] = {}
    for name in tensors:
        if name == "_conv_stem.weight":
            own, norm = "stem", "_bn0"
        elif match := re.fullmatch(
            r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", name
        ):
            own = f"blocks.{match[1]}.{match[2]}"
            norm = f"_blocks.{match[1]}.{_NORM_OF[match[2]]}"
        else:
            continue
        found |= {
            f"{own}.{leaf}": t
            for leaf, t in folded(tensors, name.removesuffix(".weight"), norm).items()
        }
    return found


def folded(tensors: Mapping[str, Tensor], conv: str, norm: str) -> dict[str, Tensor]:
    """``weight``, ``scale`` and ``bias`` of a ``ScaledConv`` for a convolution and its batch norm.

    Raises:
        UserError: the norm is missing or has not one number per channel.
    """
    weight = tensors[f"{conv}.weight"]
    found = [
        tensors[name].float()
        for leaf in ("weight", "bias", "running_mean", "running_var")
        if (name := f"{norm}.{leaf}") in tensors and tensors[name].shape == weight.shape[:1]
    ]
    if len(found) < 4:
        raise UserError(
            f"expected beside {conv}.weight a norm {norm} with weight, bias, running_mean and "
            "running_var of as many channels; take the whole file"
        )
    gamma, beta, mean, var = found
    scale = gamma / (var + NORM_EPS).sqrt()
    return {"weight": weight, "scale": scale, "bias": beta - mean * scale}
