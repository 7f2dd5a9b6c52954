"""The optimiser of a run: what it is made of, and which extra packages it needs."""

from typing import Any

import torch

from flatdepth.config import OptimConfig
from flatdepth.errors import UserError, import_extra
from flatdepth.models.network import DepthNetwork, parameter_groups


def make_optimizer(
    model: DepthNetwork, config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The configured optimiser over the model's trainable parameters.

    On CUDA, AdamW and Adam are fused: one kernel per group, no copy of the gradients, and an fp16
    step that overflowed is skipped on the device. 8-bit AdamW keeps both moments in blocks of 8-bit
    codes with one float32 scale each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
    Quantization"); tensors of less than 4096 elements keep 32 bits. It runs on CPU too.

    Args:
        model: with ``requires_grad`` set for what shall be trained.
        config: kind, learning rates and weight decay.
        device: where the parameters are, or will be when the optimiser first steps.

    Raises:
        UserError: ``adamw8bit`` is asked for and the package bitsandbytes is missing, or nothing
            is left to train.
    """
    groups = parameter_groups(model, config.lr, config.head_lr_factor, config.weight_decay)
    if not groups:
        raise UserError(
            f"model.freeze and model.frozen_blocks leave nothing of {model.name} to train; freeze "
            "less"
        )
    if config.kind == "adamw8bit":
        bitsandbytes = import_extra("bitsandbytes", "optim.kind: adamw8bit", "8bit")
        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups)
        return optimizer
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    optimizer = kinds[config.kind](groups, fused=True if device.type == "cuda" else None)
    optimizer.register_load_state_dict_pre_hook(_as_made)
    return optimizer


def _as_made(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, but fused as the optimiser is and not as on the device that it is from."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    return state | {"param_groups": [saved | {"fused": own["fused"]} for saved, own in groups]}
