"""Adapters: an unchanged start, what trains, merging back into the official layout, exact bits."""

import copy
import sys

import pytest
import torch

from flatdepth.errors import UserError
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.lora import add_lora, merged
from flatdepth.models.network import UNUSED, freeze


def network() -> DepthAnythingV2:
    torch.manual_seed(0)
    return DepthAnythingV2("vitt", kind="metric", max_depth_m=80.0).eval()


@pytest.fixture
def adapted() -> DepthAnythingV2:
    """With adapters that do something, as after training."""
    model = network()
    add_lora(model, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


IMAGE = torch.rand(1, 3, 42, 56, generator=torch.Generator().manual_seed(2))


def test_training_starts_from_the_model_it_had() -> None:
    model = network()
    with torch.no_grad():
        before = model(IMAGE)
        add_lora(model, rank=4, alpha=8.0)
        assert torch.equal(model(IMAGE), before)


def test_adapters_and_head_train_and_nothing_else(adapted: DepthAnythingV2) -> None:
    adapted(IMAGE).mean().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    head = {f"depth_head.{name}" for name, _ in network().depth_head.named_parameters()}
    assert {name for name in trained if "lora_" not in name} == head - set(UNUSED)
    assert len(trained - head) == 2 * 4 * 6  # A and B of 4 layers in each of 6 blocks
    spec_rank = adapted.get_parameter("pretrained.blocks.0.attn.qkv.lora_A.default.weight")
    assert spec_rank.shape == (4, 128)


def test_a_frozen_head_stays_frozen() -> None:
    model = network()
    freeze(model, "head")
    add_lora(model, rank=4, alpha=8.0)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_merged_is_the_official_layout_of_the_same_function(adapted: DepthAnythingV2) -> None:
    plain = merged(adapted)
    assert plain.state_dict().keys() == network().state_dict().keys()
    assert plain.max_depth_m == 80.0
    with torch.no_grad():
        expected = adapted(IMAGE)
        torch.testing.assert_close(plain.eval()(IMAGE), expected, rtol=1e-5, atol=1e-5)
        assert (network()(IMAGE) - expected).abs().max() > 1e-2, "the adapters do nothing"


def test_one_layer_merged_by_hand(adapted: DepthAnythingV2) -> None:
    """W + (alpha / r) B A with alpha 8 and r 4."""
    layer = "pretrained.blocks.3.mlp.fc2"
    state = adapted.state_dict()
    a, b = (state[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
    expected = state[f"{layer}.base_layer.weight"].double() + 2.0 * b @ a
    found = merged(adapted).state_dict()
    torch.testing.assert_close(found[f"{layer}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found[f"{layer}.bias"], state[f"{layer}.base_layer.bias"])


def test_merging_touches_neither_the_model_nor_the_random_numbers(
    adapted: DepthAnythingV2,
) -> None:
    before = copy.deepcopy(adapted.state_dict())
    random = torch.get_rng_state()
    merged(adapted)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], t) for name, t in adapted.state_dict().items())
    plain = network()
    assert merged(plain) is plain


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.lora_rank needs .* peft .*flatdepth\[lora\]"):
        add_lora(network(), rank=4, alpha=8.0)
