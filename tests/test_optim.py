"""Optimisers: what tells their kinds apart, 8-bit against 32-bit moments, exact state, extras."""

import copy
import io
import sys
from typing import Literal

import pytest
import torch
from torch import Tensor

from flatdepth.config import OptimConfig
from flatdepth.errors import UserError
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import freeze
from flatdepth.training.optim import make_optimizer

CPU = torch.device("cpu")
KINDS: tuple[Literal["adamw", "adam", "adamw8bit"], ...] = ("adamw", "adam", "adamw8bit")
LR, DECAY = 1e-2, 0.1


def network() -> DepthAnythingV2:
    torch.manual_seed(0)
    return DepthAnythingV2("vitt", kind="metric")


def build(kind: Literal["adamw", "adam", "adamw8bit"], model: DepthAnythingV2):  # type: ignore[no-untyped-def]
    config = OptimConfig(kind=kind, lr=LR, head_lr_factor=1.0, weight_decay=DECAY)
    return make_optimizer(model, config, CPU)


def fake_gradients(model: DepthAnythingV2, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_gradient_shows_how_weights_decay(
    kind: Literal["adamw", "adam", "adamw8bit"],
) -> None:
    """Decoupled: w (1 - lr decay). As L2: Adam's first step, lr * sign(decay w), whatever decay."""
    model = network()
    weight, bias = model.pretrained.blocks[0].attn.qkv.weight, model.pretrained.norm.weight
    before, still = weight.detach().clone(), bias.detach().clone()
    optimizer = build(kind, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if kind == "adam":
        large = before.abs() > 1e-3  # where Adam's eps of 1e-8 is nothing beside the gradient
        expected = before - LR * before.sign()
        torch.testing.assert_close(weight[large], expected[large], rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(weight, before * (1 - LR * DECAY), rtol=1e-6, atol=1e-9)
    assert torch.equal(bias, still), "norms do not decay"


def test_8_bit_moments_follow_32_bit_ones_in_a_quarter_of_the_memory() -> None:
    models = {kind: network() for kind in ("adamw", "adamw8bit")}
    start = network().pretrained.blocks[0].mlp.fc1.weight.detach()
    sizes = {}
    for kind, model in models.items():
        optimizer = build(kind, model)  # type: ignore[arg-type]
        for step in range(5):
            fake_gradients(model, step)
            optimizer.step()
        state = optimizer.state[model.pretrained.blocks[0].mlp.fc1.weight]
        moments = [t for t in state.values() if isinstance(t, Tensor) and t.numel() >= 4096]
        sizes[kind] = sum(t.nbytes for t in moments)
    moved = [m.pretrained.blocks[0].mlp.fc1.weight.detach() - start for m in models.values()]
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()
    assert sizes["adamw"] == 2 * 4 * start.numel()
    assert sizes["adamw8bit"] == 2 * start.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_and_loaded_optimiser_goes_on_bit_for_bit(
    kind: Literal["adamw", "adam", "adamw8bit"],
) -> None:
    model = network()
    optimizer = build(kind, model)
    for step in range(2):
        fake_gradients(model, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(weights)
    other_optimizer = build(kind, other)
    other_optimizer.load_state_dict(state)
    for each, its in ((model, optimizer), (other, other_optimizer)):
        fake_gradients(each, 2)
        its.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_frozen_weights_are_not_handed_over() -> None:
    model = network()
    freeze(model, "encoder")
    handed = {id(p) for group in build("adamw", model).param_groups for p in group["params"]}
    assert handed == {id(p) for p in model.depth_head.parameters() if p.requires_grad}


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"adamw8bit needs .* bitsandbytes .*flatdepth\[8bit\]"):
        build("adamw8bit", network())


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_a_state_saved_on_a_cpu_leaves_a_gpus_optimiser_fused(
    kind: Literal["adamw", "adam"],
) -> None:
    """Which gradient scaling relies on. Fused optimisers work on a CPU too."""
    config = OptimConfig(kind=kind, lr=LR, head_lr_factor=1.0, weight_decay=DECAY)
    model, other = network(), network()
    plain, fused = (
        make_optimizer(one, config, torch.device(device))
        for one, device in ((model, "cpu"), (other, "cuda"))
    )
    fake_gradients(model, 0)
    plain.step()
    other.load_state_dict(model.state_dict())
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert all(group["fused"] for group in fused.param_groups)
    for one, optimizer in ((model, plain), (other, fused)):
        fake_gradients(one, 1)
        optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
