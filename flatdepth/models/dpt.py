"""DPT, the transformers of MiDaS v3 and v3.1 (Ranftl et al. 2021; Birkl et al. 2023, "MiDaS v3.1").

The port is transformers' ``DPTForDepthEstimation``. Files of the original projects (``.pt`` of
isl-org/MiDaS and isl-org/DPT, by timm's names) are renamed by what both lists of names say.

Where predictions are not those of transformers: files of the hub say a layer norm epsilon of 1e-12
for ViT and BEiT, which the weights were not trained with (``flatdepth.models.port``); the
difference is some 1e-6 of the prediction. transformers takes ViT and hybrid at squares only,
because it does not tell the neck the grid of patches; here it is told, and they take the sides that
the original takes. Other differences between port and original vanish for multiples of 32.

MiDaS does not trust Swin 2 in fp16; take bf16.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.port import PORT, UNREAD, TransformersNetwork

PATCH = 16
"""Side in pixels of a token of ViT and of hybrid."""


def beit(image: int, width: int, depth: int, heads: int, neck: list[int]) -> dict[str, Any]:
    """The configuration of a DPT whose encoder is BEiT and is read at each quarter of its depth.

    Args:
        image: side in pixels of the pictures whose grid the position bias has.
        width, depth, heads: of the encoder.
        neck: channels of the four maps that the head reads, fine to coarse.
    """
    return {
        "backbone_config": {
            "model_type": "beit",
            "image_size": image,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "use_relative_position_bias": True,
            "reshape_hidden_states": False,
            "out_features": [f"stage{depth * part // 4}" for part in (1, 2, 3, 4)],
            "drop_path_rate": 0.0,
            "layer_norm_eps": 1e-6,
        },
        "neck_hidden_sizes": neck,
    }


def _swin2(
    image: int,
    width: int,
    depths: list[int],
    heads: int,
    window: int,
    pretrained: list[int],
) -> dict[str, Any]:
    return {
        "backbone_config": {
            "model_type": "swinv2",
            "image_size": image,
            "embed_dim": width,
            "depths": depths,
            "num_heads": [heads * 2**stage for stage in range(4)],
            "window_size": window,
            "pretrained_window_sizes": pretrained,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "drop_path_rate": 0.0,
        },
        "neck_hidden_sizes": [width * 2**stage for stage in range(4)],
    }


def _vit(width: int, depth: int, heads: int, neck: list[int], **more: Any) -> dict[str, Any]:
    return {
        "is_hybrid": False,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "neck_hidden_sizes": neck,
        "layer_norm_eps": 1e-6,
        **more,
    }


def tiny(spec: dict[str, Any]) -> dict[str, Any]:
    """A configuration for tests, whose random weights are large enough for its few channels."""
    own: dict[str, Any] = {"fusion_hidden_size": 16, "initializer_range": 0.15}
    if encoder := spec.get("backbone_config"):
        own["backbone_config"] = {"initializer_range": 0.15, **encoder}
    return {**spec, **own}


_LARGE = [256, 512, 1024, 1024]
_WINDOWS = [12, 12, 12, 6]
_HYBRID: dict[str, Any] = {"is_hybrid": True, "reassemble_factors": [1, 1, 1, 0.5]}
_BIT = {
    "model_type": "bit",
    "global_padding": "SAME",
    "layer_type": "bottleneck",
    "depths": [1, 1, 1],
    "hidden_sizes": [32, 64, 128],
    "embedding_size": 32,
    "num_groups": 8,
    "out_features": ["stage1", "stage2", "stage3"],
    "embedding_dynamic_padding": True,
}
_TINY_VIT = {"image_size": 64, "backbone_out_indices": [0, 1, 2, 3]}
_TINY_HYBRID = {**_HYBRID, "backbone_config": _BIT, "backbone_featmap_shape": [1, 128, 4, 4]}

SIZES: dict[str, dict[str, Any]] = {
    "dpt_large": _vit(1024, 24, 16, _LARGE, backbone_out_indices=[5, 11, 17, 23]),
    "dpt_hybrid": _vit(768, 12, 12, [256, 512, 768, 768], **_HYBRID),
    "beit_large_512": beit(512, 1024, 24, 16, _LARGE),
    "beit_large_384": beit(384, 1024, 24, 16, _LARGE),
    "beit_base_384": beit(384, 768, 12, 12, [96, 192, 384, 768]),
    "swin2_large_384": _swin2(384, 192, [2, 2, 18, 2], 6, 24, _WINDOWS),
    "swin2_base_384": _swin2(384, 128, [2, 2, 18, 2], 4, 24, _WINDOWS),
    "swin2_tiny_256": _swin2(256, 96, [2, 2, 6, 2], 3, 16, [0, 0, 0, 0]),
    "tiny": tiny(beit(64, 32, 4, 2, [8, 8, 16, 16])),
    "tiny_swin2": tiny(_swin2(64, 8, [1, 1, 2, 1], 1, 4, [0, 0, 0, 0])),
    "tiny_vit": tiny(_vit(32, 4, 2, [8, 8, 16, 16], **_TINY_VIT)),
    "tiny_hybrid": tiny(_vit(32, 4, 2, [32, 64, 16, 16], **_TINY_VIT, **_TINY_HYBRID)),
}
"""The published sizes, by the names of their files, and tiny ones of each encoder for tests."""

PUBLISHED = re.compile(
    r"(?P<vit>dpt_(?:large|hybrid))(?:_384|-midas-[0-9a-f]{8})"
    r"|dpt_(?P<size>beit_(?:large_512|large_384|base_384)|swin2_(?:large_384|base_384|tiny_256))"
)
"""What the original files are called, without suffix."""
WITHOUT_PORT = re.compile(r"dpt_(?:swin_large_384|next_vit_large_384|levit_224)")


class DPT(TransformersNetwork):
    """DPT; ``DepthNetwork`` has its arguments.

    A relative one predicts what the original does. A metric one has the sigmoid of all metric
    networks here in the place of the last ReLU, so it starts with a new head (``model.head:
    fresh``).
    """

    name = "dpt"
    title = "DPT (MiDaS v3, v3.1)"
    architecture = "DPT of MiDaS"
    port_class = "DPTForDepthEstimation"
    model_type = "dpt"
    port_kind = "relative"
    sizes = SIZES
    output_bias = f"{PORT}head.head.4.bias"
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    exact = r"head\.head\.4"
    unused = (PORT + UNREAD, f"{PORT}dpt.layernorm.")  # the head reads no output of ViT's last norm

    def build(self, spec: Mapping[str, Any], encoder: bool, head: bool) -> None:
        super().build(spec, encoder, head)
        self.port.head.head[5] = nn.Identity()
        if self.port.config.is_hybrid:
            embeddings = self.port.dpt.embeddings
            embeddings.forward = partial(embeddings.forward, interpolate_pos_encoding=True)

    def predicted(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
        config = self.port.config
        if self.port.backbone is not None:
            return super().predicted(image)
        found = self.port.dpt(image, output_hidden_states=True)
        taken = [found.hidden_states[1 + index] for index in config.backbone_out_indices]
        if config.is_hybrid:
            taken[:2] = found.intermediate_activations
        fused = self.port.neck(taken, image.shape[-2] // PATCH, image.shape[-1] // PATCH)
        return self.port.head(fused)

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        if encoder.startswith("tiny"):
            return None
        return "mit", "The weights of MiDaS are MIT-licensed, and so are weights derived from them."

    @classmethod
    def named(cls, stem: str) -> Mapping[str, str] | None:
        if WITHOUT_PORT.fullmatch(stem):
            raise UserError(
                f"{stem} holds a network that transformers does not have, and that is taken from "
                "there; take dpt_beit, dpt_swin2, dpt_large or dpt_hybrid"
            )
        name = PUBLISHED.fullmatch(stem)
        if name is None:
            return None
        return {"encoder": name["vit"] or name["size"], "kind": "relative"}

    @classmethod
    def meaning(cls, config: Mapping[str, Any]) -> dict[str, str]:
        del config
        return {"kind": "relative"}

    @classmethod
    def as_in_files(
        cls, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], list[str]] | None:
        if any(name.startswith("pretrained.model.") for name in tensors):
            return from_midas(tensors), ["renamed the tensors from the names of MiDaS"]
        return (tensors, []) if "head.head.0.weight" in tensors else None


_RENAMED = (
    # neck and head
    *((rf"^scratch\.layer{i + 1}_rn\.", f"neck.convs.{i}.") for i in range(4)),
    *((rf"^scratch\.refinenet{4 - i}\.", f"neck.fusion_stage.layers.{i}.") for i in range(4)),
    (r"\.resConfUnit(\d)\.conv(\d)\.", r".residual_layer\1.convolution\2."),
    (r"\.out_conv\.", ".projection."),
    (r"^scratch\.output_conv\.", "head.head."),
    *((rf"^pretrained\.act_postprocess{i + 1}\.", f"REASSEMBLE.{i}.") for i in range(4)),
    (r"^REASSEMBLE\.(\d)\.0\.project\.", r"neck.reassemble_stage.readout_projects.\1."),
    (r"^REASSEMBLE\.(\d)\.3\.", r"neck.reassemble_stage.layers.\1.projection."),
    (r"^REASSEMBLE\.(\d)\.4\.", r"neck.reassemble_stage.layers.\1.resize."),
    # embeddings
    (r"^pretrained\.model\.patch_embed\.backbone\.", "BIT."),
    (r"^BIT\.stem\.conv\.", "BIT.embedder.convolution."),
    (r"^BIT\.stem\.norm\.", "BIT.embedder.norm."),
    (r"^BIT\.stages\.(\d+)\.blocks\.", r"BIT.encoder.stages.\1.layers."),
    (r"^BIT\.", "dpt.embeddings.backbone.bit."),
    (r"^pretrained\.model\.patch_embed\.proj\.", "ENCODER.embeddings.PATCHES.projection."),
    (r"^pretrained\.model\.patch_embed\.norm\.", "ENCODER.embeddings.norm."),
    (r"^pretrained\.model\.pos_embed$", "ENCODER.embeddings.position_embeddings"),
    (r"^pretrained\.model\.cls_token$", "ENCODER.embeddings.cls_token"),
    # blocks
    (r"^pretrained\.model\.norm\.", "ENCODER.layernorm."),
    (r"^pretrained\.model\.layers\.(\d+)\.", r"ENCODER.encoder.layers.\1."),
    (r"^pretrained\.model\.blocks\.(\d+)\.", r"ENCODER.encoder.layer.\1."),
    (r"\.((?:layer|blocks)\.\d+)\.norm1\.", r".\1.layernorm_before."),
    (r"\.((?:layer|blocks)\.\d+)\.norm2\.", r".\1.layernorm_after."),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.attn\.q\.", ".attn.query."),
    (r"\.attn\.k\.", ".attn.key."),
    (r"\.attn\.v\.", ".attn.value."),
    (r"\.attn\.cpb_mlp\.", ".attn.continuous_position_bias_mlp."),
    (r"\.attn\.(relative_position_bias)_", r".attn.\1.\1_"),
    (r"\.(layers\.\d+\.blocks\.\d+)\.attn\.", r".\1.attention.self."),
    (r"\.(layer\.\d+)\.attn\.", r".\1.attention.attention."),
)
"""From names of MiDaS and timm to those of transformers' files: patterns, one after another."""


def from_midas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an original file by the names of transformers' files.

    ``qkv`` becomes three; what classifies pictures is left out. Names that DPT does not have are
    kept, for the caller to complain about.
    """
    is_vit = "pretrained.model.pos_embed" in tensors
    is_hybrid = any(".patch_embed.backbone." in name for name in tensors)
    encoder = "dpt" if is_vit else "backbone"
    # BEiT and Swin 2 have a last norm that MiDaS does not run and transformers does not have.
    left = ("head.", "fc_norm.") if is_vit else ("head.", "fc_norm.", "norm.")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.removeprefix("pretrained.model.").startswith(left):
            continue
        parts = {name: tensor}
        if ".attn.qkv." in name and tensor.ndim and len(tensor) % 3 == 0:
            rows = zip("qkv", tensor.chunk(3), strict=True)
            parts = {name.replace(".qkv.", f".{part}."): own for part, own in rows}
        for own, part_tensor in parts.items():
            for pattern, new in _RENAMED:
                own = re.sub(pattern, new, own)
            own = own.replace("ENCODER.", f"{encoder}.")
            own = own.replace("PATCHES.", "" if is_hybrid else "patch_embeddings.")
            found[own] = part_tensor
    return found
