"""DPT: original files, by names built here from what MiDaS and timm call things; any sides."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import load_weights, open_model
from flatdepth.models.dpt import DPT, SIZES, from_midas

transformers = pytest.importorskip("transformers")

# Millions of parameters by the README of MiDaS, which counts what classifies pictures too.
PARAMETERS = {
    "dpt_large": 344,
    "dpt_hybrid": 123,
    "beit_large_512": 345,
    "beit_large_384": 344,
    "beit_base_384": 112,
    "swin2_large_384": 213,
    "swin2_base_384": 102,
    "swin2_tiny_256": 42,
}


def reference(encoder: str) -> Any:
    """transformers' own network of a size, with weights that predict something."""
    torch.manual_seed(5)
    config = transformers.DPTConfig(**json.loads(json.dumps(SIZES[encoder])))
    model = transformers.DPTForDepthEstimation(config)
    for parameter in model.parameters():
        if not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def original(model: Any) -> dict[str, Tensor]:
    """The tensors of transformers' network by the names of MiDaS, read from its live modules."""
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str) -> None:
        for leaf, tensor in module.named_parameters(recurse=False):
            found[f"{name}.{leaf}"] = tensor.detach()

    def joined(block: str, parts: list[nn.Module], bias: bool) -> None:
        found[f"{block}.attn.qkv.weight"] = torch.cat([p.weight.detach() for p in parts])
        if bias:
            found[f"{block}.attn.qkv.bias"] = torch.cat([p.bias.detach() for p in parts])
        else:
            found[f"{block}.attn.q_bias"] = parts[0].bias.detach()
            found[f"{block}.attn.v_bias"] = parts[2].bias.detach()

    root = "pretrained.model"
    config = model.config
    kind = "vit" if model.backbone is None else config.backbone_config.model_type
    if kind == "beit":
        beit = model.backbone.beit
        found[f"{root}.cls_token"] = beit.embeddings.cls_token.detach()
        keep(beit.embeddings.patch_embeddings.projection, f"{root}.patch_embed.proj")
        for index, block in enumerate(beit.layers):
            name, attention = f"{root}.blocks.{index}", block.attention
            joined(name, [attention.q_proj, attention.k_proj, attention.v_proj], bias=False)
            keep(attention.o_proj, f"{name}.attn.proj")
            table = block.relative_position_bias.relative_position_bias_table
            found[f"{name}.attn.relative_position_bias_table"] = table.detach()
            found[f"{name}.attn.relative_position_index"] = torch.zeros(3, 3, dtype=torch.long)
            found |= {f"{name}.gamma_{k}": getattr(block, f"lambda_{k}").detach() for k in (1, 2)}
            keep(block.layernorm_before, f"{name}.norm1")
            keep(block.layernorm_after, f"{name}.norm2")
            keep(block.mlp.fc1, f"{name}.mlp.fc1")
            keep(block.mlp.fc2, f"{name}.mlp.fc2")
        found[f"{root}.fc_norm.weight"] = torch.ones(3)
    elif kind == "swinv2":
        embeddings = model.backbone.embeddings
        keep(embeddings.patch_embeddings.projection, f"{root}.patch_embed.proj")
        keep(embeddings.norm, f"{root}.patch_embed.norm")
        for stage, layer in enumerate(model.backbone.encoder.layers):
            for index, block in enumerate(layer.blocks):
                name, attention = f"{root}.layers.{stage}.blocks.{index}", block.attention.self
                joined(name, [attention.query, attention.key, attention.value], bias=False)
                found[f"{name}.attn.logit_scale"] = attention.logit_scale.detach()
                for k in (0, 2):
                    position = attention.continuous_position_bias_mlp[k]
                    keep(position, f"{name}.attn.cpb_mlp.{k}")
                keep(block.attention.output.dense, f"{name}.attn.proj")
                keep(block.layernorm_before, f"{name}.norm1")
                keep(block.layernorm_after, f"{name}.norm2")
                keep(block.intermediate.dense, f"{name}.mlp.fc1")
                keep(block.output.dense, f"{name}.mlp.fc2")
                found[f"{name}.attn_mask"] = torch.zeros(2, 2)
            if layer.downsample is not None:
                keep(layer.downsample.reduction, f"{root}.layers.{stage}.downsample.reduction")
                keep(layer.downsample.norm, f"{root}.layers.{stage}.downsample.norm")
        found[f"{root}.norm.weight"] = torch.ones(3)
    else:
        embeddings = model.dpt.embeddings
        found[f"{root}.cls_token"] = embeddings.cls_token.detach()
        found[f"{root}.pos_embed"] = embeddings.position_embeddings.detach()
        if config.is_hybrid:
            keep(embeddings.projection, f"{root}.patch_embed.proj")
            bit, body = embeddings.backbone.bit, f"{root}.patch_embed.backbone"
            keep(bit.embedder.convolution, f"{body}.stem.conv")
            keep(bit.embedder.norm, f"{body}.stem.norm")
            for stage, group in enumerate(bit.encoder.stages):
                for index, block in enumerate(group.layers):
                    for part, module in block.named_modules():
                        keep(module, f"{body}.stages.{stage}.blocks.{index}.{part}")
        else:
            keep(embeddings.patch_embeddings.projection, f"{root}.patch_embed.proj")
        for index, block in enumerate(model.dpt.encoder.layer):
            name, attention = f"{root}.blocks.{index}", block.attention.attention
            joined(name, [attention.query, attention.key, attention.value], bias=True)
            keep(block.attention.output.dense, f"{name}.attn.proj")
            keep(block.layernorm_before, f"{name}.norm1")
            keep(block.layernorm_after, f"{name}.norm2")
            keep(block.intermediate.dense, f"{name}.mlp.fc1")
            keep(block.output.dense, f"{name}.mlp.fc2")
        keep(model.dpt.layernorm, f"{root}.norm")
    found |= {f"{root}.head.weight": torch.zeros(2, 3), f"{root}.head.bias": torch.zeros(2)}

    if model.neck.reassemble_stage is not None:
        stage_ = model.neck.reassemble_stage
        for index in range(2 if config.is_hybrid else 0, 4):
            name = f"pretrained.act_postprocess{index + 1}"
            keep(stage_.readout_projects[index][0], f"{name}.0.project.0")
            keep(stage_.layers[index].projection, f"{name}.3")
            keep(stage_.layers[index].resize, f"{name}.4")
    for level in (1, 2, 3, 4):
        keep(model.neck.convs[level - 1], f"scratch.layer{level}_rn")
        fusion, name = model.neck.fusion_stage.layers[4 - level], f"scratch.refinenet{level}"
        keep(fusion.projection, f"{name}.out_conv")
        for unit in (1, 2):
            for conv in (1, 2):
                module = getattr(getattr(fusion, f"residual_layer{unit}"), f"convolution{conv}")
                keep(module, f"{name}.resConfUnit{unit}.conv{conv}")
    for index in (0, 2, 4):
        keep(model.head.head[index], f"scratch.output_conv.{index}")
    return found


@pytest.mark.parametrize("encoder", ["tiny", "tiny_swin2", "tiny_vit", "tiny_hybrid"])
def test_an_original_file_predicts_what_transformers_predicts(encoder: str, tmp_path: Path) -> None:
    theirs = reference(encoder)
    torch.save(original(theirs), tmp_path / "midas.pt")
    model, report = open_model(str(tmp_path / "midas.pt"), kind="relative")
    assert (model.name, model.encoder, report.matched) == ("dpt", encoder, report.total)
    assert "renamed the tensors from the names of MiDaS" in str(report)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs((image - 0.5) / 0.5).predicted_depth[:, None]
        assert wanted.std() > 1e-3
        torch.testing.assert_close(model(image), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoder", PARAMETERS)
def test_the_original_names_of_every_published_size_are_known(encoder: str) -> None:
    with torch.device("meta"):
        theirs = reference(encoder)
        ours = DPT(encoder, kind="relative")
    renamed = DPT.renamed(original(theirs))
    assert renamed is not None
    shapes = {name: tensor.shape for name, tensor in renamed[0].items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert DPT.size_of(renamed[0]) == encoder
    millions = sum(p.numel() for p in theirs.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[encoder], rel=0.03)


@pytest.mark.parametrize(
    ("stem", "encoder"),
    [
        ("dpt_beit_large_512", "beit_large_512"),
        ("dpt_beit_base_384", "beit_base_384"),
        ("dpt_swin2_tiny_256", "swin2_tiny_256"),
        ("dpt_large_384", "dpt_large"),
        ("dpt_large-midas-2f21e586", "dpt_large"),
        ("dpt_hybrid_384", "dpt_hybrid"),
        ("dpt_hybrid-midas-501f0c75", "dpt_hybrid"),
    ],
)
def test_published_files_say_their_size_by_their_name(stem: str, encoder: str) -> None:
    assert DPT.named(stem) == {"encoder": encoder, "kind": "relative"}


def test_files_of_what_transformers_does_not_have_are_refused(tmp_path: Path) -> None:
    torch.save({"pretrained.model.norm.weight": torch.ones(1)}, tmp_path / "dpt_levit_224.pt")
    with pytest.raises(
        UserError, match=r"dpt_levit_224 holds a network that transformers does not"
    ):
        open_model(str(tmp_path / "dpt_levit_224.pt"))
    assert DPT.named("dpt_beit_large") is None


def test_damage_of_an_original_file_is_named(tmp_path: Path) -> None:
    tensors = original(reference("tiny"))
    del tensors["scratch.output_conv.4.bias"]
    tensors["pretrained.model.blocks.0.attn.qkv.weight"] = torch.zeros(95, 32)
    torch.save(tensors, tmp_path / "midas.pt")
    with pytest.raises(UserError, match=r"4 tensors are missing \(.*k_proj.*1 are unexpected"):
        open_model(str(tmp_path / "midas.pt"), kind="relative")


def test_relative_weights_start_a_metric_model_with_a_fresh_head(tmp_path: Path) -> None:
    torch.save(original(reference("tiny")), tmp_path / "midas.pt")
    model = DPT("tiny", kind="metric")
    before = model.port.head.head[0].weight.clone()
    report = load_weights(model, str(tmp_path / "midas.pt"), head="fresh")
    heads = [n for n, _ in model.named_parameters() if n.startswith(("port.neck.", "port.head."))]
    assert {*report.fresh} == {*heads}
    assert torch.equal(model.port.head.head[0].weight, before)


@pytest.mark.parametrize("encoder", ["tiny_vit", "tiny_hybrid"])
@torch.no_grad()
def test_vit_and_hybrid_take_any_sides_and_every_pixel_stays_where_it_is(encoder: str) -> None:
    """Without what attention and perceptrons add, a prediction depends on what is near."""
    torch.manual_seed(0)
    model = DPT(encoder, kind="relative").eval()
    for block in model.blocks:
        for dense in (block.attention.output.dense, block.output.dense):
            dense.weight.zero_()
    image = torch.rand(1, 3, 64, 256, generator=torch.Generator().manual_seed(1))
    changed = image.clone()
    changed[..., :16, 224:240] = 1 - changed[..., :16, 224:240]
    moved = (model(changed) - model(image)).abs()[0, 0]
    assert moved.max() > 0
    row, column = divmod(int(moved.argmax()), 256)
    assert (row < 32, column >= 192) == (True, True)
    # The group norms of hybrid know of all pixels, but little.
    assert moved[:, :96].max() < 0.1 * moved.max()


def test_what_is_no_file_of_dpt_is_left_to_others() -> None:
    assert DPT.renamed({"pretrained.cls_token": torch.zeros(1, 1, 8)}) is None
    assert from_midas({"pretrained.model.odd": torch.zeros(1)}).keys() == {"pretrained.model.odd"}
