"""Depth Anything V2 as transformers has it, to hold ours against.

It reads every file that ``depth_anything_v2`` reads. Predictions differ in one thing: off 518 x 518
pixels it resamples the position embedding otherwise (``flatdepth.models.huggingface``). Files are
taken for ours unless this network is asked for by name.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from flatdepth.models.depth_anything import ENCODERS, DepthAnythingV2
from flatdepth.models.huggingface import MODEL_TYPE, is_huggingface, size_config, to_huggingface
from flatdepth.models.port import PORT, UNREAD, TransformersNetwork

_SIZES = ("vitt", "vits", "vitb", "vitl")
"""Of the giant one, which is not published, transformers splits tensors besides renaming them."""


class DepthAnythingV2Port(TransformersNetwork):
    """Depth Anything V2 by transformers; ``DepthNetwork`` has its arguments."""

    name = "depth_anything_v2_port"
    title = "Depth Anything V2 (transformers)"
    architecture = DepthAnythingV2.architecture
    port_class = "DepthAnythingForDepthEstimation"
    model_type = MODEL_TYPE
    sizes: ClassVar = {name: size_config(ENCODERS[name]) for name in _SIZES}
    output_bias = f"{PORT}head.conv3.bias"
    exact = r"head\.conv3"
    unused = (PORT + UNREAD, f"{PORT}backbone.embeddings.mask_token")
    reads_files_of = ("depth_anything_v2",)

    def build(self, spec: Mapping[str, Any], encoder: bool, head: bool) -> None:
        super().build(spec, encoder, head)
        self.port.head.activation2 = nn.Identity()

    named = DepthAnythingV2.named
    configured = DepthAnythingV2.configured
    licence = DepthAnythingV2.licence

    @classmethod
    def as_in_files(
        cls, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], list[str]] | None:
        if is_huggingface(tensors):
            return tensors, []
        if "pretrained.cls_token" not in tensors:
            return None
        try:
            return to_huggingface(tensors), ["renamed the tensors to the names of transformers"]
        except KeyError:
            return None
