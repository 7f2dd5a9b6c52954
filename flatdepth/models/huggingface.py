"""Folders that Hugging Face transformers loads, and its ``DepthAnythingForDepthEstimation``.

Names, tensors and the two JSON files of such a folder, without transformers itself. That class is
the same network under other names: queries, keys and values are three tensors instead of one, the
head's four levels of fusion are numbered from coarse to fine, and ``config.json`` says what the
official files leave to their reader: kind, maximum depth and which blocks the head reads.

One difference stays. Off the 37 x 37 patches of 518 x 518 pixels transformers resamples the
position embedding at n / 37, the original code and ours at (n + 0.1) / 37
(``resize_position_embedding``), so predictions are equal at 518 x 518 and only close elsewhere.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.models.depth_anything import ENCODERS, PATCH, EncoderSpec
from flatdepth.models.network import DepthNetwork
from flatdepth.models.port import TransformersNetwork

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"

MODEL_TYPE = "depth_anything"
_NETWORKS = ("depth_anything_v2", "depth_anything_v2_port")
IMAGE_SIZE = 518
_BICUBIC = 3

_ENCODER_PREFIXES = ("embeddings.", "encoder.layer.", "layernorm.")
_PREFIXES = (*(f"backbone.{prefix}" for prefix in _ENCODER_PREFIXES), "neck.", *_ENCODER_PREFIXES)
_OTHER_HEADS = ("head.head.", "metric_head.")
"""Of DPT and ZoeDepth, whose encoders and necks are named as Depth Anything's."""
_QKV = ("query", "key", "value")
_OURS = re.compile(r"pretrained\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_THEIRS = re.compile(
    r"(backbone\.encoder\.layer\.(\d+)\.attention\.attention)\.(?:query|key|value)\.(weight|bias)"
)


def is_huggingface(names: Mapping[str, object]) -> bool:
    """Whether tensors are named as transformers does, with or without a head of Depth Anything."""
    is_other = any(name.startswith(_OTHER_HEADS) for name in names)
    return not is_other and any(name.startswith(_PREFIXES) for name in names)


def to_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an official state dict; ``qkv`` becomes three.

    Raises:
        KeyError: a name is not one of Depth Anything V2.
    """
    names = _names(_depth(tensors, "pretrained.blocks."))
    renamed = {}
    for name, tensor in tensors.items():
        if match := _OURS.fullmatch(name):
            block, leaf = match.groups()
            layer = f"backbone.encoder.layer.{block}.attention.attention"
            for part, rows in zip(_QKV, tensor.chunk(3), strict=True):
                # A slice shares its memory with the rest, which safetensors refuses to write.
                renamed[f"{layer}.{part}.{leaf}"] = rows.clone()
        else:
            renamed[_rename(name, names) or names[name]] = tensor
    return renamed


def from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_huggingface``; the encoder may also stand alone (``Dinov2Model``).

    Names that Depth Anything does not have are kept, for the caller to complain about.
    """
    if any(name.startswith(_ENCODER_PREFIXES) for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    depth = _depth(tensors, "backbone.encoder.layer.")
    names = {theirs: ours for ours, theirs in _names(depth).items()}
    renamed = {}
    for name, tensor in tensors.items():
        if match := _THEIRS.fullmatch(name):
            layer, block, leaf = match.groups()
            rows = [tensors.get(f"{layer}.{part}.{leaf}") for part in _QKV]
            whole = [t for t in rows if t is not None and t.ndim and t.shape == tensor.shape]
            joined = len(whole) == len(_QKV)
            own = f"pretrained.blocks.{block}.attn.qkv.{leaf}" if joined else name
            renamed[own] = torch.cat(whole) if joined else tensor
        else:
            renamed[_rename(name, names) or name] = tensor
    return renamed


def takes(model: DepthNetwork) -> bool:
    """Whether transformers can express the model.

    That is Depth Anything V2 of whole metres, and what comes from there and predicts as it does
    there.
    """
    if model.name in _NETWORKS:
        return model.kind == "relative" or model.max_depth_m.is_integer()
    return isinstance(model, TransformersNetwork) and model.kind == model.port_kind


def model_config(model: DepthNetwork) -> dict[str, object]:
    """What ``config.json`` says about a model.

    Raises:
        UserError: transformers does not know the network or that kind of it, or the maximum depth
            is not a whole number of metres; it takes no other.
    """
    if not takes(model):
        of_depth_anything = model.name in _NETWORKS
        expected = (
            "Depth Anything V2 of whole metres only" if of_depth_anything else "no such model"
        )
        found = model.encoder if of_depth_anything else f"{model.kind} {model.name} {model.encoder}"
        raise UserError(
            f"transformers takes {expected}, found {found} of {model.max_depth_m} m; export to a "
            ".pth or .safetensors file instead"
        )
    if isinstance(model, TransformersNetwork) and model.name not in _NETWORKS:
        return model.port_config()
    return {
        "architectures": ["DepthAnythingForDepthEstimation"],
        "model_type": MODEL_TYPE,
        "depth_estimation_type": model.kind,
        "max_depth": int(model.max_depth_m) if model.kind == "metric" else 1,
        **size_config(ENCODERS[model.encoder]),
    }


def size_config(spec: EncoderSpec) -> dict[str, object]:
    """The numbers of a size as transformers' configuration names them."""
    return {
        "patch_size": PATCH,
        "reassemble_hidden_size": spec.embed_dim,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(spec.out_channels),
        "fusion_hidden_size": spec.features,
        "head_hidden_size": 32,
        "head_in_index": -1,
        "backbone_config": {
            "model_type": "dinov2",
            "hidden_size": spec.embed_dim,
            "num_hidden_layers": spec.depth,
            "num_attention_heads": spec.heads,
            "mlp_ratio": 4,
            "use_swiglu_ffn": spec.swiglu,
            "layer_norm_eps": 1e-6,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "out_indices": [index + 1 for index in spec.taken],
            "apply_layernorm": True,
            "reshape_hidden_states": False,
        },
    }


def preprocessor_config(model: DepthNetwork, height: int, width: int) -> dict[str, object]:
    """What ``preprocessor_config.json`` says: resize about to height x width, then normalise.

    The aspect ratio is kept and both sides become multiples of the network's.
    """
    zoe = model.name == "zoedepth"
    return {
        "image_processor_type": "ZoeDepthImageProcessor" if zoe else "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": model.multiple,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
        "do_pad": False,
    }


def read_config(config: Mapping[str, object], source: str) -> dict[str, str] | None:
    """Encoder, kind and maximum depth as ``config.json`` states them; None for other models.

    Raises:
        UserError: a value is not what transformers writes, or the head reads other blocks than
            that of Depth Anything V2, as version 1 does, whose tensors have the same names and
            shapes.
    """
    if config.get("model_type") != MODEL_TYPE:
        return None
    kind, far = config.get("depth_estimation_type", "relative"), config.get("max_depth", 1)
    if kind not in ("metric", "relative") or (
        kind == "metric" and not (isinstance(far, int | float) and 0 < far < math.inf)
    ):
        raise UserError(
            f"{source}: expected in {CONFIG} the depth_estimation_type metric or relative and a "
            f"positive number as max_depth, found {kind!r} and {far!r}; restore that file"
        )
    said = {"kind": str(kind)}
    if kind == "metric":
        said["max_depth_m"] = str(float(str(far)))
    backbone = config.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    size = (backbone.get("hidden_size", 384), backbone.get("num_hidden_layers", 12))
    for name, spec in ENCODERS.items():
        if (spec.embed_dim, spec.depth) == size:
            said["encoder"] = name
            read, expected = _blocks_read(backbone), [str(index + 1) for index in spec.taken]
            if read and read != expected:
                raise UserError(
                    f"{source}: its head reads the encoder after blocks {', '.join(read)}, that of "
                    f"Depth Anything V2 after {', '.join(expected)}; this looks like version 1, "
                    "take a V2 file"
                )
    return said


def _blocks_read(backbone: Mapping[str, object]) -> list[str]:
    """The blocks, counted from 1, after which the head reads; empty if the config leaves it out."""
    indices, features = backbone.get("out_indices"), backbone.get("out_features")
    if isinstance(indices, list):
        return [str(index) for index in indices]
    if isinstance(features, list):
        return [str(feature).removeprefix("stage") for feature in features]
    return []


def _depth(names: Mapping[str, object], prefix: str) -> int:
    numbers = [name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _rename(name: str, names: Mapping[str, str]) -> str | None:
    """By the whole name, else by all of it but ``.weight`` or ``.bias``."""
    if name in names:
        return names[name]
    stem, _, leaf = name.rpartition(".")
    return f"{names[stem]}.{leaf}" if stem in names else None


def _names(depth: int) -> dict[str, str]:
    """Official name -> name in transformers, of layers and lone tensors, but for ``qkv``."""
    names = {
        "pretrained.cls_token": "backbone.embeddings.cls_token",
        "pretrained.mask_token": "backbone.embeddings.mask_token",
        "pretrained.pos_embed": "backbone.embeddings.position_embeddings",
        "pretrained.patch_embed.proj": "backbone.embeddings.patch_embeddings.projection",
        "pretrained.norm": "backbone.layernorm",
        "depth_head.scratch.output_conv1": "head.conv1",
        "depth_head.scratch.output_conv2.0": "head.conv2",
        "depth_head.scratch.output_conv2.2": "head.conv3",
    }
    for i in range(depth):
        ours, theirs = f"pretrained.blocks.{i}", f"backbone.encoder.layer.{i}"
        names |= {f"{ours}.norm{k}": f"{theirs}.norm{k}" for k in (1, 2)}
        names |= {f"{ours}.ls{k}.gamma": f"{theirs}.layer_scale{k}.lambda1" for k in (1, 2)}
        names |= {f"{ours}.mlp.fc{k}": f"{theirs}.mlp.fc{k}" for k in (1, 2)}
        names[f"{ours}.mlp.w12"] = f"{theirs}.mlp.weights_in"
        names[f"{ours}.mlp.w3"] = f"{theirs}.mlp.weights_out"
        names[f"{ours}.attn.proj"] = f"{theirs}.attention.output.dense"
    for i in range(4):
        stage = f"neck.reassemble_stage.layers.{i}"
        names[f"depth_head.projects.{i}"] = f"{stage}.projection"
        names[f"depth_head.resize_layers.{i}"] = f"{stage}.resize"
        names[f"depth_head.scratch.layer{i + 1}_rn"] = f"neck.convs.{i}"
        ours, theirs = f"depth_head.scratch.refinenet{i + 1}", f"neck.fusion_stage.layers.{3 - i}"
        names[f"{ours}.out_conv"] = f"{theirs}.projection"
        for unit in (1, 2):
            for conv in (1, 2):
                names[f"{ours}.resConfUnit{unit}.conv{conv}"] = (
                    f"{theirs}.residual_layer{unit}.convolution{conv}"
                )
    return names
