"""Depth Anything 3, its two networks of single images: DA3MONO and DA3METRIC.

The network of version 2 (``flatdepth.models.depth_anything``) with another end: the logit is log
depth, and a second stack of the head says where the sky is. Written from the paper (Lin et al.
2025, "Depth Anything 3") and from the names, shapes and settings of the published files; what else
differs from version 2 is the final norm's epsilon, and that the tensors which no forward pass reads
are left out. The networks of several views (DA3-SMALL to DA3-GIANT) are others.

Shapes: b batch, h and w pixels.
"""

import math
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.depth_anything import (
    ENCODERS,
    PATCH,
    SKY_STACK,
    DepthAnythingV2,
    DinoV2,
    DPTHead,
    EncoderSpec,
    output_stack,
    resize,
)
from flatdepth.models.network import Kind

LOG_LIMIT = 20.0
"""Logits count as at most this far from 0, which is 2e-9 to 5e8 m: float32 holds the squares of
such depths, and e^89 would be infinite. Beyond it there is no gradient."""

START_DEPTH = 2.0
"""About what a fresh head predicts at the canonical focal length."""

SKY = 0.3
"""From this value of the sky stack on a pixel is sky."""

SKY_PIXELS = 11
"""Sky is filled where there are at least so many pixels of it, and of the rest."""

SKY_PERCENTILE = 99

_KINDS: Mapping[str, Kind] = {
    "da3mono-large": "affine",
    "da3metric-large": "metric",
    "da3nested-giant-large": "metric",
}
"""What ``config.json`` calls the published files; of the third ``da3_metric`` in it is meant."""

_LARGE = "vitl"
"""The size of all of them."""

_ENCODER = re.compile(r"^(?:model\.)?(?:backbone|net)\.pretrained\.")
_HEAD = re.compile(r"^(?:model\.)?(?:all_heads\.)?head\.")
_OLDER_SKY = "output_conv2_additional.sky_mask."


class DepthAnything3(DepthAnythingV2):
    """Depth Anything 3 for single images; ``DepthNetwork`` has its arguments.

    Planar z, in metres (``metric``) or up to scale and shift (``affine``). Metres are
    ``exp(logit) * focal_px / 300`` (``canonical_focal_px``) with the focal length of the image that
    the network sees, after whatever cut and resized it. ``max_depth_m`` is no part of the formula:
    it only says how far truth counts.

    In evaluation mode the sky is filled as the original does it (``fill_sky``), in ``decode`` and
    so before the focal length counts; in training mode the loss sees the head itself, and the sky
    stack is not computed. That stack is never trained: it comes from the published file and goes
    into ours. What it reads, though, moves in training, so a training without any sky may wear it
    down. With a fresh head it says 0, which is no sky, for ever.
    """

    name = "depth_anything_3"
    title = "Depth Anything 3"
    architecture = "Depth Anything 3 architecture for single images"
    probed = False
    bounded = False
    sizes: ClassVar = {name: ENCODERS[name] for name in ("vitt", "vits", "vitb", _LARGE)}
    unused = (SKY_STACK,)

    @staticmethod
    def parts(spec: EncoderSpec, encoder: bool, head: bool) -> tuple[nn.Module, nn.Module]:
        dino = DinoV2(spec, recompute=encoder)
        del dino.mask_token
        dino.norm.eps = 1e-5
        return dino, SkyHead(spec, recompute=head)

    def decode(self, logits: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b 1 h w"]:
        depth = logits[:, :1].clamp(-LOG_LIMIT, LOG_LIMIT).exp()
        return depth if self.training else fill_sky(depth, logits[:, 1:] >= SKY)

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        if encoder != _LARGE:
            return None
        return "apache-2.0", (
            "The official DA3MONO-LARGE and DA3METRIC-LARGE weights are Apache-2.0, and so are "
            "weights derived from them; those in DA3NESTED files are CC-BY-NC-4.0."
        )

    @classmethod
    def named(cls, stem: str) -> Mapping[str, str] | None:
        name = stem.lower()  # of a renamed copy; on the hub all are called model.safetensors
        return {"encoder": _LARGE, "kind": _KINDS[name]} if name in _KINDS else None

    @classmethod
    def configured(cls, config: Mapping[str, object], source: str) -> Mapping[str, str] | None:
        name = str(config.get("model_name", ""))
        if name in _KINDS:
            return cls.named(name)
        if name.startswith("da3"):
            raise UserError(
                f"{source} is {name}, a network of several views; take "
                "depth-anything/DA3METRIC-LARGE or depth-anything/DA3MONO-LARGE"
            )
        return None

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        own = {
            _HEAD.sub("depth_head.", _ENCODER.sub("pretrained.", name)): tensor
            for name, tensor in tensors.items()
        }
        notes = []
        if any(_OLDER_SKY in name for name in own):
            own = {name.replace(_OLDER_SKY, "sky_output_conv2."): t for name, t in own.items()}
            notes.append("renamed the tensors from older names of Depth Anything 3")
            if own.pop("pretrained.camera_token", None) is not None:
                notes.append("left the camera token")
        return (own, notes) if any(name.startswith(SKY_STACK) for name in own) else None

    def published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        homes = {"pretrained": "model.backbone.pretrained", "depth_head": "model.head"}
        parts = {name: name.partition(".") for name in state}
        return {f"{homes[part]}.{rest}": state[name] for name, (part, _, rest) in parts.items()}

    def hub_config(self) -> Mapping[str, object] | None:
        if self.encoder != _LARGE:
            return None
        return {"model_name": f"da3{'metric' if self.kind == 'metric' else 'mono'}-large"}


class SkyHead(DPTHead):
    """The head with the sky stack beside the output stack.

    ``forward`` returns the logit (b, 1, h, w) in training mode, and the logit and the sky's value
    (b, 2, h, w) in evaluation mode.
    """

    def __init__(self, spec: EncoderSpec, *, recompute: bool = False) -> None:
        super().__init__(spec, recompute=recompute)
        del self.scratch.get_submodule("refinenet4").resConfUnit1
        self.scratch.add_module("sky_output_conv2", output_stack(spec.features))
        nn.init.zeros_(self.scratch.get_parameter("sky_output_conv2.2.weight"))
        bias = self.scratch.get_parameter("output_conv2.2.bias")
        nn.init.constant_(bias, math.log(START_DEPTH))

    def _output(
        self, path: Float[Tensor, "b c h w"], grid: tuple[int, int]
    ) -> Float[Tensor, "b _ h2 w2"]:
        x = resize(self.scratch.output_conv1(path), (PATCH * grid[0], PATCH * grid[1]))
        logit = self.scratch.output_conv2(x)
        if self.training:
            return logit
        return torch.cat((logit, self.scratch.get_submodule("sky_output_conv2")(x)), 1)


def fill_sky(
    depth: Float[Tensor, "b 1 h w"], is_sky: Bool[Tensor, "b 1 h w"]
) -> Float[Tensor, "b 1 h w"]:
    """Depth with the sky of each image at the 99th percentile of what is not sky.

    Where there are fewer than ``SKY_PIXELS`` of either kind an image stays as it is. The original
    takes the percentile over all images at once and, of more than 100,000 pixels, over as many at
    random.

    The percentile lies between the two values around place 0.99 (n - 1) of n in order, linearly.
    One way for all images, with or without sky, so that it goes into a graph.
    """
    sky = is_sky.flatten(1)
    rest = (~sky).sum(1)
    ordered = depth.flatten(1).masked_fill(sky, math.inf).sort(1).values
    hundredths = SKY_PERCENTILE * (rest - 1).clamp(min=0)
    low = hundredths // 100
    pair = torch.stack((low, (low + 1).clamp(max=sky.shape[1] - 1)), 1)
    below, above = ordered.gather(1, pair).unbind(1)
    far = below.lerp(above, (hundredths % 100).to(depth.dtype) / 100)
    fills = (rest >= SKY_PIXELS) & (sky.sum(1) >= SKY_PIXELS)
    place = (slice(None), None, None, None)
    return torch.where(is_sky & fills[place], far[place], depth)
