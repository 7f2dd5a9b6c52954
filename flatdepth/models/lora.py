"""Low-rank adapters (LoRA) on the encoder, through peft.

Hu et al. 2021: a linear layer ``W x`` becomes ``W x + (alpha / r) B A x`` with W frozen, A (r, in)
random and B (out, r) zero, so that training starts from exactly the model it had. The head is
trained as ever. Official key names come back when the adapters are merged.
"""

import torch
from torch import Tensor

from flatdepth.errors import import_extra
from flatdepth.models.network import DepthNetwork

_NAME = "default"


def add_lora(model: DepthNetwork, *, rank: int, alpha: float) -> None:
    """Put adapters on the encoder's linear layers (``adapted``); of it only they train from now on.

    The head trains if it did before.

    Args:
        rank: r.
        alpha: the adapters' output is multiplied by ``alpha / rank``.

    Raises:
        UserError: the package peft is missing.
    """
    peft = import_extra("peft", "model.lora_rank", "lora")
    head = [
        p for name, p in model.named_parameters() if p.requires_grad and not model.is_encoder(name)
    ]
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=model.adapted
    )
    peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for parameter in head:  # peft has frozen all that is no adapter
        parameter.requires_grad_(True)


@torch.no_grad()
def merged(model: DepthNetwork) -> DepthNetwork:
    """The model as official files hold it: itself, or a copy on the CPU with its adapters merged.

    ``W + (alpha / r) B A`` is added up apart from the model, which stays as it is: merging in place
    and taking it back would not give the same bits.
    """
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "base_layer")
    }
    if not layers:
        return model
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner = next((prefix for prefix in layers if name.startswith(prefix + ".")), None)
        if owner is None:
            state[name] = tensor
        elif name.startswith(f"{owner}.base_layer."):
            leaf = name.removeprefix(f"{owner}.base_layer.")
            if leaf == "weight":
                tensor = tensor + layers[owner].get_delta_weight(_NAME)
            state[f"{owner}.{leaf}"] = tensor
    with torch.random.fork_rng(devices=[]):  # a new model draws weights that nothing needs
        plain = model.like()
    plain.load_state_dict(state, strict=True)
    return plain


def unadapted(model: DepthNetwork) -> dict[str, Tensor]:
    """The state dict without the adapters, by the names that it had before them.

    Not copied: parameters are the model's own ``nn.Parameter``.
    """
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".lora_" not in name
    }
