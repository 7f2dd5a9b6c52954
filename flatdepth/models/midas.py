"""MiDaS v2.1: ResNeXt-101 or EfficientNet-Lite3 with a fusion head, relative or metric.

Written from the paper (Ranftl et al. 2020, "Towards Robust Monocular Depth Estimation") and from
the key names and shapes of the published files, which load here; what is saved here has their names
too, and the original code loads it with ``strict=True``: its counters of batches, which are missing
(``num_batches_tracked``), PyTorch adds to a plain dict. Batch norms are of fixed statistics. The
small network has them in scales and biases (``efficientnet``); in a file these are norms of mean 0
and variance ``1 - eps``.

The published ReLU at the end is ``decode``'s.

Shapes: b batch, c channels, h and w pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flatdepth.models.depth_anything import ResidualConv, resize
from flatdepth.models.efficientnet import NORM_EPS, EfficientNet, Stage, folded
from flatdepth.models.efficientnet import EncoderSpec as SmallSpec
from flatdepth.models.network import DepthNetwork, call
from flatdepth.models.resnet import (
    ResNet,
    ResNetSpec,
    conv,
    numbered,
    renamed_places,
    size_of_resnet,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeSpec(ResNetSpec):
    """The sizes of one model with a ResNeXt.

    Attributes:
        features: channels of the head's fusion path.
    """

    features: int


ENCODERS: dict[str, LargeSpec | SmallSpec] = {
    "tiny": LargeSpec(blocks=(2, 1, 2, 1), width=8, groups=4, group_width=32, features=16),
    "lite3": SmallSpec(
        stem=32,
        stages=(
            Stage(expand=1, channels=24, blocks=1, stride=1, kernel=3),
            Stage(expand=6, channels=32, blocks=3, stride=2, kernel=3, is_taken=True),
            Stage(expand=6, channels=48, blocks=3, stride=2, kernel=5, is_taken=True),
            Stage(expand=6, channels=96, blocks=5, stride=2, kernel=3),
            Stage(expand=6, channels=136, blocks=5, stride=1, kernel=5, is_taken=True),
            Stage(expand=6, channels=232, blocks=6, stride=2, kernel=5),
            Stage(expand=6, channels=384, blocks=1, stride=1, kernel=3, is_taken=True),
        ),
        features=64,
    ),
    "resnext101": LargeSpec(blocks=(3, 4, 23, 3), groups=32, group_width=8, features=256),
}

OFFICIAL_NAMES = {
    "midas_v21_384": "resnext101",
    "midas_v21-f6b98070": "resnext101",
    "model-f6b98070": "resnext101",
    "model-f46da743": "resnext101",
    "midas_v21_small_256": "lite3",
    "midas_v21_small-70d6b9c8": "lite3",
    "model-small-70d6b9c8": "lite3",
}
"""What the published files are called, without suffix; f46da743 is version 2, the same network."""

_LARGE_STAGES = ("layer1.4", "layer2", "layer3", "layer4")
_LARGE_STEM = {"layer1.0.": "stem.0.", "layer1.1.": "stem.1."}
_SMALL_STAGES = ("layer1.3", "layer1.4", "layer2.0", "layer3.0", "layer3.1", "layer4.0", "layer4.1")
_FIRST_BLOCK = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
_OTHER_BLOCKS = {
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "project": ("conv_pwl", "bn3"),
}
"""Our convolution -> theirs and its norm, in the blocks of the first stage and in the others."""


class MidasV21(DepthNetwork):
    """MiDaS v2.1; ``DepthNetwork`` has its arguments."""

    name = "midas_v21"
    title = "MiDaS v2.1"
    architecture = "MiDaS v2.1 architecture"
    probed = True
    sizes = ENCODERS
    stem = ("stem.",)
    output_bias = "depth_head.scratch.output_conv.4.bias"

    @staticmethod
    def parts(
        spec: LargeSpec | SmallSpec, encoder: bool, head: bool
    ) -> tuple[nn.Module, nn.Module]:
        if isinstance(spec, SmallSpec):
            # those of the finest level, doubled from each to the next coarser one
            features = [spec.features * 2**level for level in range(4)]
            small = FusionHead(spec.out_channels, features, is_small=True, recompute=head)
            return EfficientNet(spec, recompute=encoder), small
        large = FusionHead(spec.out_channels, 4 * [spec.features], is_small=False, recompute=head)
        return ResNet(spec, recompute=encoder), large

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        image = image.contiguous(memory_format=torch.channels_last)
        return self.depth_head(self.pretrained(image))

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        if encoder not in OFFICIAL_NAMES.values():
            return None
        return (
            "mit",
            "The published MiDaS v2.1 weights are MIT, and so are weights derived from them.",
        )

    @classmethod
    def named(cls, stem: str) -> Mapping[str, str] | None:
        if stem not in OFFICIAL_NAMES:
            return None
        return {"encoder": OFFICIAL_NAMES[stem], "kind": "relative"}

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        if "pretrained.layer1.0.weight" not in tensors:
            return None
        encoder, rest = _parted(tensors)
        if "layer1.3.0.conv_dw.weight" in encoder:
            encoder = _from_small(encoder)
        else:
            encoder = renamed_places(encoder, _LARGE_STEM | numbered(encoder, _LARGE_STAGES))
        own = {f"pretrained.{name}": tensor for name, tensor in encoder.items()}
        head = renamed_places(rest, {"scratch.": "depth_head.scratch."})
        return own | head, ["renamed the tensors from the names of MiDaS"]

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        if "pretrained.stem.scale" in tensors:
            return "lite3"
        large = {name: spec for name, spec in cls.sizes.items() if isinstance(spec, LargeSpec)}
        return size_of_resnet(tensors, large)

    def published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        spec, (encoder, head) = self.sizes[self.encoder], _parted(state)
        if isinstance(spec, SmallSpec):
            places = _places(_SMALL_STAGES, [stage.blocks for stage in spec.stages])
            encoder = _to_small(encoder, places)
        else:
            places = _places(_LARGE_STAGES, spec.blocks)
            blocks = {f"blocks.{index}.": place for index, place in enumerate(places)}
            stem = {ours: theirs for theirs, ours in _LARGE_STEM.items()}
            encoder = renamed_places(encoder, stem | blocks)
        return {
            **{f"pretrained.{name}": tensor for name, tensor in encoder.items()},
            **renamed_places(head, {"depth_head.scratch.": "scratch."}),
        }


class FusionHead(nn.Module):
    """Fuses maps at strides 32, 16, 8 and 4 from coarse to fine; each fusion doubles the sides.

    ``forward`` takes the maps, fine to coarse, and returns logits (b, 1, h, w) at the image's
    pixels. It runs in five parts, four fusions and the output, which are the units of
    recomputation.

    Args:
        inputs: channels of the maps, fine to coarse.
        features: those of the fusion path at each.
        is_small: whether it is the head of the small network.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        features: Sequence[int],
        *,
        is_small: bool,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.scratch = nn.ModuleDict()
        finer = (features[0], *features[:-1])
        for level in (1, 2, 3, 4):
            c = features[level - 1]
            self.scratch[f"layer{level}_rn"] = conv(inputs[level - 1], c, 3, gain=1.0)
            outputs = finer[level - 1] if is_small else None
            self.scratch[f"refinenet{level}"] = Fusion(c, outputs)
        c = features[0]
        self.scratch["output_conv"] = nn.Sequential(
            conv(c, c // 2, 3, bias=True, gain=1.0),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv(c // 2, 32, 3, bias=True, gain=1.0),
            nn.ReLU(),
            # What comes here is about 10 in size; the logits start near their bias all the same.
            conv(32, 1, 1, bias=True, gain=0.03),
        )

    def forward(self, taken: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b 1 h w"]:
        path: Tensor | None = None
        for level in (4, 3, 2, 1):
            path = call(self._fuse, level, taken[level - 1], path, recompute=self.recompute)
        return call(self._output, path, recompute=self.recompute)

    def _fuse(
        self, level: int, x: Float[Tensor, "b c h w"], path: Float[Tensor, "b c2 h w"] | None
    ) -> Float[Tensor, "b c3 h2 w2"]:
        return self.scratch[f"refinenet{level}"](self.scratch[f"layer{level}_rn"](x), path)

    def _output(self, path: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.scratch["output_conv"](path)


class Fusion(nn.Module):
    """Adds a level to the coarser path, refines the sum and doubles its sides.

    Args:
        outputs: channels of the next finer level, to which the small network goes over; None: the
            large one, which has as many in all, and whose units rectify what they are beside.
    """

    def __init__(self, channels: int, outputs: int | None) -> None:
        super().__init__()
        unit = RectifiedConv if outputs is None else ResidualConv
        self.resConfUnit1, self.resConfUnit2 = unit(channels), unit(channels)
        self.out_conv = (
            nn.Identity() if outputs is None else conv(channels, outputs, 1, bias=True, gain=1.0)
        )

    def forward(
        self, level: Float[Tensor, "b c h w"], path: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b c2 h2 w2"]:
        x = level if path is None else path + self.resConfUnit1(level)
        # Published is resize, then out_conv; they commute, as in Depth Anything's fusion.
        x = self.out_conv(self.resConfUnit2(x))
        return resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))


class RectifiedConv(ResidualConv):
    """Two 3 x 3 convolutions beside a ReLU: the published unit's first ReLU works in place, and so
    on what is added in the end too."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(F.relu(x))


def _small_layers(places: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Our convolution of the small encoder -> theirs and its norm, for blocks at these places."""
    layers = {"stem": ("layer1.0", "layer1.1")}
    for index, place in enumerate(places):
        block = _FIRST_BLOCK if place.startswith(_SMALL_STAGES[0]) else _OTHER_BLOCKS
        for own, (convolution, norm) in block.items():
            layers[f"blocks.{index}.{own}"] = (place + convolution, place + norm)
    return layers


def _from_small(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The small encoder by our names, its norms in scales and biases; other names are kept."""
    layers = _small_layers([*numbered(tensors, _SMALL_STAGES)])
    found: dict[str, Tensor] = {}
    for own, (convolution, norm) in layers.items():
        if f"{convolution}.weight" in tensors:
            parts = folded(tensors, convolution, norm)
            found |= {f"{own}.{leaf}": tensor for leaf, tensor in parts.items()}
    known = {f"{part}." for pair in layers.values() for part in pair}
    rest = {n: t for n, t in tensors.items() if n[: n.rfind(".") + 1] not in known}
    return found | rest


def _to_small(tensors: Mapping[str, Tensor], places: Sequence[str]) -> dict[str, Tensor]:
    """The inverse of ``_from_small``: scales and biases as norms that change nothing else."""
    found: dict[str, Tensor] = {}
    for own, (convolution, norm) in _small_layers(places).items():
        weight, scale, bias = (tensors[f"{own}.{leaf}"] for leaf in ("weight", "scale", "bias"))
        found |= {
            f"{convolution}.weight": weight,
            f"{norm}.weight": scale,
            f"{norm}.bias": bias,
            f"{norm}.running_mean": torch.zeros_like(bias),
            f"{norm}.running_var": torch.full_like(bias, 1 - NORM_EPS),
        }
    return found


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors below ``pretrained.``, without it, and the others."""
    start = "pretrained."
    inside = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    return inside, {n: t for n, t in tensors.items() if not n.startswith(start)}


def _places(stages: Sequence[str], counts: Sequence[int]) -> list[str]:
    """What the published names of all blocks begin with, in order."""
    pairs = zip(stages, counts, strict=True)
    return [f"{stage}.{number}." for stage, count in pairs for number in range(count)]
