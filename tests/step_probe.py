"""One optimiser step of the real loop, its gradients written down: run by test_train.py.

``python tests/step_probe.py CONFIG KEPT OUT``, alone or under a launcher. KEPT is a JSON object
from a sample's identity to the number of its pixels that keep their truth. OUT gets the gradients
that the step clips, and the mean loss. In float64, with a small network in place of the real one,
so that nothing but the arithmetic of the loop can differ.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

import flatdepth.train as loop
from flatdepth.cli import parse_config
from flatdepth.config import LossConfig, TrainConfig
from flatdepth.types import Batch


class Network(nn.Module):
    """Depth from an image by two convolutions, in float64."""

    kind = "metric"

    def __init__(self) -> None:
        super().__init__()
        self.pretrained = nn.Conv2d(3, 8, 5, padding=2)
        self.depth_head = nn.Conv2d(8, 1, 5, padding=2)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return 20 * self.depth_head(self.pretrained(image.double()).tanh()).sigmoid()


class Done(Exception):
    """The step has been written down."""


def probe(
    config: TrainConfig,
    kept: dict[int, int],
    out: Path,
    patch: Callable[[object, str, Any], None] = setattr,
) -> None:
    """Run ``train`` up to the clipping of its first step."""
    whole_weight, agree = loop.loss_weight, loop._agree
    mean_loss = math.nan

    def carved(batch: Batch, settings: LossConfig) -> Tensor:
        weight = whole_weight(batch, settings).double().flatten(1)
        for row, identity in zip(weight, batch.sample.tolist(), strict=True):
            row[kept[identity] :] = 0
        return weight.view_as(batch.valid)

    def overhear(*arguments: Any) -> tuple[float, int, bool]:
        nonlocal mean_loss
        agreed = agree(*arguments)
        mean_loss = agreed[0]
        return agreed

    def write_down(accelerator: Accelerator, parameters: Any, _: float) -> Tensor:
        if accelerator.is_main_process:
            tensors = {str(i): p.grad.contiguous() for i, p in enumerate(parameters)}
            save_file(tensors | {"loss": torch.tensor(mean_loss)}, out)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        raise Done

    patch(loop, "loss_weight", carved)
    patch(loop, "build_model", lambda *_: Network())
    patch(loop, "update_best", lambda *_: False)
    patch(loop, "_agree", overhear)
    patch(Accelerator, "clip_grad_norm_", write_down)
    try:
        loop.train(config)
    except Done:
        return


if __name__ == "__main__":
    settings = parse_config(TrainConfig, [f"--config={sys.argv[1]}"], prog="", description=None)
    probe(settings, {int(k): n for k, n in json.loads(sys.argv[2]).items()}, Path(sys.argv[3]))
