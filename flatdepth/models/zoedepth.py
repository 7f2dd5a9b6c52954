"""ZoeDepth: metric bins on DPT with BEiT (Bhat et al. 2023, "ZoeDepth").

The port is transformers' ``ZoeDepthForDepthEstimation``, with what it keeps of the original: both
kinds of attractors use the strength 300 whatever the configuration says, and the bounded ones lack
a normalisation, as the weights were trained. Original files (``ZoeD_M12_N.pt``) are renamed.

``beit_large_384`` is N (rooms, 10 m; bin centres without bound, so a prediction may exceed
``max_depth_m``), ``beit_large_384_k`` is K (streets, 80 m; centres within ``max_depth_m``),
``beit_large_384_nk`` has the heads of both and chooses one. transformers chooses for a whole batch
at once; here each picture is predicted by itself, so that it does not depend on its neighbours. The
choice has no gradient, hence NK is for prediction only.

Padding and resizing belong to the preprocessing; the network takes any multiples of 32.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatdepth.models.dpt import beit, from_midas, tiny
from flatdepth.models.port import PORT, TransformersNetwork

N_BINS = 64
PUBLISHED = re.compile("ZoeD_M12_(N|K|NK)")
"""What the original files are called, without suffix."""
BIN_RANGES_NK = {"nyu": 10.0, "kitti": 80.0}
"""Maximum depth of the heads of NK, in metres."""


def _zoe(core: Mapping[str, Any], centres: str = "softplus", **more: Any) -> dict[str, Any]:
    return {
        **core,
        "bin_centers_type": centres,
        "bin_configurations": [{"n_bins": N_BINS, "min_depth": 1e-3, "max_depth": 10.0}],
        "num_patch_transformer_layers": None,
        **more,
    }


_TWO_HEADS: dict[str, Any] = {
    "bin_configurations": [
        {"name": name, "n_bins": N_BINS, "min_depth": 1e-3, "max_depth": far}
        for name, far in BIN_RANGES_NK.items()
    ],
    "num_patch_transformer_layers": 4,
    "patch_transformer_hidden_size": 128,
    "patch_transformer_intermediate_size": 1024,
    "patch_transformer_num_attention_heads": 4,
}
_LARGE = beit(384, 1024, 24, 16, [256, 512, 1024, 1024])
_TINY = {
    **tiny(beit(64, 32, 4, 2, [8, 8, 16, 16])),
    "bottleneck_features": 16,
    "num_relative_features": 8,
    "bin_embedding_dim": 16,
    "num_attractors": [4, 2, 2, 1],
}

SIZES: dict[str, dict[str, Any]] = {
    "beit_large_384": _zoe(_LARGE),
    "beit_large_384_k": _zoe(_LARGE, "normed"),
    "beit_large_384_nk": _zoe(_LARGE, **_TWO_HEADS),
    "tiny": _zoe(_TINY),
    "tiny_k": _zoe(_TINY, "normed"),
    "tiny_nk": _zoe(_TINY, **_TWO_HEADS),
}
"""The published networks, and tiny ones for tests."""


class ZoeDepth(TransformersNetwork):
    """ZoeDepth; ``DepthNetwork`` has its arguments."""

    name = "zoedepth"
    title = "ZoeDepth"
    architecture = "ZoeDepth"
    port_class = "ZoeDepthForDepthEstimation"
    model_type = "zoedepth"
    port_kind = "metric"
    sizes = SIZES
    head_prefix = (f"{PORT}neck.", f"{PORT}relative_head.", f"{PORT}metric_head.")
    output_bias = f"{PORT}relative_head.conv3.bias"
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    recomputed = (
        r"neck\.fusion_stage\.layers\.\d|relative_head|metric_head\.attractors\.\d"
        r"|metric_head\.conditional_log_binomial"
    )
    exact = "metric_head"

    def build(self, spec: Mapping[str, Any], encoder: bool, head: bool) -> None:
        super().build(spec, encoder, head)
        self.bounded = spec["bin_centers_type"] == "normed"
        # A ReLU that starts at 0 or below passes no gradient.
        nn.init.ones_(self.port.relative_head.conv3.bias)

    def predicted(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
        if len(self.port.config.bin_configurations) == 1:
            return super().predicted(image)
        return torch.cat([super(ZoeDepth, self).predicted(one[None]) for one in image])

    def decode(self, logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        return logits

    @classmethod
    def make_port(cls, spec: Mapping[str, Any], max_depth_m: float) -> Any:
        heads = spec["bin_configurations"]
        if len(heads) == 1:
            spec = {**spec, "bin_configurations": [{**heads[0], "max_depth": max_depth_m}]}
        return super().make_port(spec, max_depth_m)

    @classmethod
    def named(cls, stem: str) -> Mapping[str, str] | None:
        name = PUBLISHED.fullmatch(stem)
        if name is None:
            return None
        encoder, far = {
            "N": ("beit_large_384", 10.0),
            "K": ("beit_large_384_k", 80.0),
            "NK": ("beit_large_384_nk", max(BIN_RANGES_NK.values())),
        }[name[1]]
        return {"encoder": encoder, "kind": "metric", "max_depth_m": str(far)}

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        if encoder.startswith("tiny"):
            return None
        return (
            "mit",
            "The weights of ZoeDepth are MIT-licensed, and so are weights derived from them.",
        )

    @classmethod
    def meaning(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """Kind and maximum depth by ``config.json``; the farthest of several heads.

        A head of K is called nyu and said to end at 10 m in the files of the hub, which is N's; the
        maximum depth is left unsaid there.
        """
        found = config.get("bin_configurations")
        heads = (
            [head for head in found if isinstance(head, dict)] if isinstance(found, list) else []
        )
        depths = [head.get("max_depth") for head in heads]
        far = [float(depth) for depth in depths if isinstance(depth, int | float)]
        is_mistaken = config.get("bin_centers_type") == "normed" and far == [10.0]
        said = {"kind": "metric"}
        return said if is_mistaken or not far else said | {"max_depth_m": str(max(far))}

    @classmethod
    def as_in_files(
        cls, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], list[str]] | None:
        if any(name.startswith(f"{_CORE}pretrained.model.") for name in tensors):
            return from_zoedepth(tensors), ["renamed the tensors from the names of ZoeDepth"]
        return (tensors, []) if any(name.startswith("metric_head.") for name in tensors) else None


_CORE = "core.core."
_RENAMED = (
    (r"^(.*)\._net\.0\.", r"\1.conv1."),
    (r"^(.*)\._net\.2\.", r"\1.conv2."),
    (r"^mlp_classifier\.0\.", "mlp_classifier.linear1."),
    (r"^mlp_classifier\.2\.", "mlp_classifier.linear2."),
    (r"\.transformer_encoder\.layers\.", ".transformer_encoder."),
    (r"^", "metric_head."),
)
"""From names of the original's heads to those of transformers' files, one after another."""


def from_zoedepth(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an original file by the names of transformers' files.

    Names that ZoeDepth does not have are kept, for the caller to complain about.
    """
    core = {n.removeprefix(_CORE): t for n, t in tensors.items() if n.startswith(_CORE)}
    found = {}
    for name, tensor in from_midas(core).items():
        for number, layer in enumerate((0, 2, 4), start=1):
            name = name.replace(f"head.head.{layer}.", f"relative_head.conv{number}.")
        found[name] = tensor
    for name, tensor in tensors.items():
        if name.startswith(_CORE):
            continue
        parts = {name: tensor}
        if ".self_attn.in_proj_" in name and tensor.ndim and len(tensor) % 3 == 0:
            rows = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            parts = {name.replace("in_proj_", f"{part}."): own for part, own in rows}
        for own, part_tensor in parts.items():
            for pattern, new in _RENAMED:
                own = re.sub(pattern, new, own)
            found[own] = part_tensor
    return found
