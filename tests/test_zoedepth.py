"""ZoeDepth: what is its own; test_port.py has the rest."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import load_weights, open_model
from flatdepth.models.zoedepth import SIZES, ZoeDepth
from tests.test_dpt import original as original_of_dpt

transformers = pytest.importorskip("transformers")


def reference(encoder: str, far: float = 10.0) -> Any:
    """transformers' own network of a size; the heads of NK keep their ranges."""
    torch.manual_seed(5)
    spec = json.loads(json.dumps(SIZES[encoder]))
    if len(spec["bin_configurations"]) == 1:
        spec["bin_configurations"][0] |= {"name": "nyu", "max_depth": far}
    model = transformers.ZoeDepthForDepthEstimation(transformers.ZoeDepthConfig(**spec))
    for parameter in model.parameters():
        if not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def pictures() -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.rand(2, 3, 64, 96, generator=draw) * torch.tensor([1.0, 0.1])[:, None, None, None]


@torch.no_grad()
def test_nk_chooses_a_head_for_every_picture(tmp_path: Path) -> None:
    theirs, image = reference("tiny_nk"), pictures()
    pixels = (image - 0.5) / 0.5
    first, second = (theirs(one[None]).domain_logits[0] for one in pixels)
    # Between the two pictures' preferences, so that each has its own.
    middle = ((first[0] - first[1]) + (second[0] - second[1])) / 2
    theirs.metric_head.mlp_classifier.linear2.bias[1] += middle
    chosen = [int(theirs(one[None]).domain_logits.argmax()) for one in pixels]
    assert sorted(chosen) == [0, 1]
    theirs.save_pretrained(tmp_path)
    model, _ = open_model(str(tmp_path))
    assert (model.encoder, model.max_depth_m) == ("tiny_nk", 80.0)
    alone = torch.cat([theirs(one[None]).predicted_depth for one in pixels])[:, None]
    torch.testing.assert_close(model(image), alone, rtol=1e-6, atol=1e-6)
    together = theirs(pixels).predicted_depth[:, None]
    assert not torch.allclose(together, alone, rtol=1e-3)


@torch.no_grad()
def test_bounded_centres_need_the_right_maximum_depth_and_10_metres_of_k_are_not_believed(
    tmp_path: Path,
) -> None:
    reference("tiny_k", far=10.0).save_pretrained(tmp_path / "mistaken")
    with pytest.raises(UserError, match="does not say its maximum depth; give --max_depth_m"):
        open_model(str(tmp_path / "mistaken"))
    model, _ = open_model(str(tmp_path / "mistaken"), max_depth_m=80.0)
    image, theirs = pictures(), reference("tiny_k", far=80.0)
    wanted = theirs((image - 0.5) / 0.5).predicted_depth[:, None]
    assert wanted.max() > 10
    torch.testing.assert_close(model(image), wanted, rtol=1e-6, atol=1e-6)
    theirs.save_pretrained(tmp_path / "right")
    assert open_model(str(tmp_path / "right"))[0].max_depth_m == 80.0
    with pytest.raises(UserError, match=r"max_depth_m is 80.0 in the file but 20.0 in the model"):
        load_weights(ZoeDepth("tiny_k", kind="metric"), str(tmp_path / "right"))


@torch.no_grad()
def test_centres_without_bound_are_the_same_for_any_maximum_depth(tmp_path: Path) -> None:
    theirs, image = reference("tiny"), pictures()
    theirs.save_pretrained(tmp_path)
    model = ZoeDepth("tiny", kind="metric", max_depth_m=40.0).eval()
    load_weights(model, str(tmp_path))
    wanted = theirs((image - 0.5) / 0.5).predicted_depth[:, None]
    torch.testing.assert_close(model(image), wanted, rtol=1e-6, atol=1e-6)


def original(model: Any) -> dict[str, Tensor]:
    """The tensors of transformers' network by the names of ZoeDepth, read from its live modules."""
    core = SimpleNamespace(
        config=SimpleNamespace(is_hybrid=False, backbone_config=model.config.backbone_config),
        backbone=model.backbone,
        neck=model.neck,
        head=SimpleNamespace(
            head={2 * k: getattr(model.relative_head, f"conv{k + 1}") for k in range(3)}
        ),
    )
    found = {f"core.core.{name}": tensor for name, tensor in original_of_dpt(core).items()}
    head = model.metric_head

    def keep(module: nn.Module, name: str) -> None:
        for leaf, tensor in module.named_parameters(recurse=False):
            found[f"{name}.{leaf}"] = tensor.detach()

    def keep_pair(module: nn.Module, name: str) -> None:
        keep(module.conv1, f"{name}._net.0")
        keep(module.conv2, f"{name}._net.2")

    keep(head.conv2, "conv2")
    keep_pair(head.seed_projector, "seed_projector")
    for index, projector in enumerate(head.projectors):
        keep_pair(projector, f"projectors.{index}")
    several = len(model.config.bin_configurations) > 1
    for domain in ("nyu", "kitti") if several else ("",):
        end = f".{domain}" if several else ""
        seed, attractors, binomial = (
            (
                head.seed_bin_regressors[domain],
                head.attractors[domain],
                head.conditional_log_binomial[domain],
            )
            if several
            else (head.seed_bin_regressor, head.attractors, head.conditional_log_binomial)
        )
        keep_pair(seed, f"seed_bin_regressors{end}" if several else "seed_bin_regressor")
        for index, attractor in enumerate(attractors):
            keep_pair(attractor, f"attractors{end}.{index}")
        for layer in (0, 2):
            keep(binomial.mlp[layer], f"conditional_log_binomial{end}.mlp.{layer}")
        for buffer in ("k_idx", "K_minus_1"):
            name = f"conditional_log_binomial{end}.log_binomial_transform.{buffer}"
            found[name] = torch.zeros(1)
    if several:
        keep(head.patch_transformer.embedding_convPxP, "patch_transformer.embedding_convPxP")
        for index, layer in enumerate(head.patch_transformer.transformer_encoder):
            name = f"patch_transformer.transformer_encoder.layers.{index}"
            attention = layer.self_attn
            parts = (attention.query, attention.key, attention.value)
            for leaf in ("weight", "bias"):
                rows = [getattr(part, leaf).detach() for part in parts]
                found[f"{name}.self_attn.in_proj_{leaf}"] = torch.cat(rows)
            keep(attention.out_proj, f"{name}.self_attn.out_proj")
            for part in ("linear1", "linear2", "norm1", "norm2"):
                keep(getattr(layer, part), f"{name}.{part}")
        keep(head.mlp_classifier.linear1, "mlp_classifier.0")
        keep(head.mlp_classifier.linear2, "mlp_classifier.2")
    return found


@pytest.mark.parametrize("encoder", ["tiny", "tiny_k", "tiny_nk"])
@torch.no_grad()
def test_an_original_file_predicts_what_transformers_predicts(encoder: str, tmp_path: Path) -> None:
    theirs, image = reference(encoder), pictures()[:1]
    torch.save({"model": original(theirs)}, tmp_path / "zoe.pt")
    model, report = open_model(str(tmp_path / "zoe.pt"), kind="metric", max_depth_m=10.0)
    assert (model.name, model.encoder, report.matched) == ("zoedepth", encoder, report.total)
    assert "from the names of ZoeDepth" in str(report)
    wanted = theirs((image - 0.5) / 0.5).predicted_depth[:, None]
    torch.testing.assert_close(model(image), wanted, rtol=1e-6, atol=1e-6)


def test_original_files_say_what_they_are_by_their_name() -> None:
    said = {f"ZoeD_M12_{name}": ZoeDepth.named(f"ZoeD_M12_{name}") for name in ("N", "K", "NK")}
    assert said == {
        "ZoeD_M12_N": {"encoder": "beit_large_384", "kind": "metric", "max_depth_m": "10.0"},
        "ZoeD_M12_K": {"encoder": "beit_large_384_k", "kind": "metric", "max_depth_m": "80.0"},
        "ZoeD_M12_NK": {"encoder": "beit_large_384_nk", "kind": "metric", "max_depth_m": "80.0"},
    }
    assert ZoeDepth.named("ZoeD_M12") is None


def test_published_sizes_have_as_many_parameters_as_is_known() -> None:
    with torch.device("meta"):
        sizes = {name: ZoeDepth(name, kind="metric") for name in SIZES if "large" in name}
    counts = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in sizes.items()}
    # 345 M by the README of the original for N
    assert counts["beit_large_384"] == pytest.approx(345, abs=1.5)
    assert counts["beit_large_384"] < counts["beit_large_384_k"] < counts["beit_large_384_nk"]
    for name, model in sizes.items():
        assert ZoeDepth.size_of(model.state_dict()) == name


def test_kind_and_range_by_config() -> None:
    def said(**config: object) -> dict[str, str] | None:
        found = ZoeDepth.configured({"model_type": "zoedepth", **config}, "config.json")
        return None if found is None else dict(found)

    nyu, kitti = (
        {"name": n, "n_bins": 64, "max_depth": d} for n, d in (("nyu", 10), ("kitti", 80))
    )
    core = {
        "backbone_config": {"model_type": "beit", "image_size": 384},
        "neck_hidden_sizes": [256, 512, 1024, 1024],
    }
    one = {**core, "bin_centers_type": "softplus", "num_patch_transformer_layers": None}
    assert said(**one, bin_configurations=[nyu]) == {
        "encoder": "beit_large_384", "kind": "metric", "max_depth_m": "10.0",
    }  # fmt: skip
    two = {**core, "bin_centers_type": "softplus", "num_patch_transformer_layers": 4}
    assert said(**two, bin_configurations=[nyu, kitti]) == {
        "encoder": "beit_large_384_nk", "kind": "metric", "max_depth_m": "80.0",
    }  # fmt: skip
    normed = {**one, "bin_centers_type": "normed"}
    assert said(**normed, bin_configurations=[nyu]) == {
        "encoder": "beit_large_384_k", "kind": "metric",
    }  # fmt: skip
    assert said(**core, bin_configurations="odd") == {"kind": "metric"}
    assert ZoeDepth.configured({"model_type": "dpt"}, "config.json") is None
