"""A few steps of the real loop by one rank, written down: run by test_train.py in processes.

In float64, with a small network in place of the real one, so that nothing but the arithmetic of the
loop can differ between ways of splitting the same steps.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import AutocastKwargs, DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import flatdepth.training.loop as loop
from flatdepth.config import LossConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.models.network import DepthNetwork
from flatdepth.training import runlog
from flatdepth.training.launch import use_autocast_alone
from flatdepth.training.state import Progress
from flatdepth.training.teacher import Lesson, Teacher
from flatdepth.types import Batch, TrainingBatch


class Network(DepthNetwork):
    """Depth from an image by two convolutions, in float64."""

    multiple = 14

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.kind = "metric"
        self.pretrained = nn.Conv2d(3, 8, 5, padding=2)
        self.depth_head = nn.Conv2d(8, 1, 5, padding=2)
        self.double()

    def forward(self, image: Tensor, _focal_px: Tensor | None = None) -> Tensor:
        return 20 * self.depth_head(self.pretrained(image.double()).tanh()).sigmoid()


def become(rank: int, ranks: int, port: int) -> None:
    """What a launcher tells a process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*strides.*")
    runlog.write_report = lambda _: None


def train_rank(config: TrainConfig, rank: int, ranks: int, port: int) -> None:
    """Train as one of several ranks."""
    become(rank, ranks, port)
    loop.train(config)


def scaled(*, half: bool = False, **settings: float) -> Callable[..., Accelerator]:
    """``make_accelerator`` with the gradient scaler of fp16 on a CPU.

    A scale that is a power of two changes no bit of a gradient that it does not overflow.

    Args:
        half: whether the network computes in half precision too.
        settings: of the scaler.
    """
    original = loop.make_accelerator

    def make(config: TrainConfig, run: Path) -> Accelerator:
        accelerator = original(config, run)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        accelerator.autocast_handler = AutocastKwargs(enabled=half)
        accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
        return accelerator

    return make


def train_into_a_fault(
    config: TrainConfig, fault: str, out: Path, rank: int, ranks: int, port: int
) -> None:
    """Train until rank 1 meets a fault; every rank writes its ``UserError`` to ``out``.RANK.

    Args:
        fault: "damaged": a sample cannot be read; "nan": no loss is finite.
    """
    become(rank, ranks, port)
    whole = loop.depth_loss

    def faulty(*arguments: Any) -> Tensor:
        if fault == "damaged":
            raise UserError("a sample is damaged")
        return whole(*arguments) * torch.nan

    if rank == 1:
        loop.depth_loss = faulty
    try:
        loop.train(config)
    except UserError as error:
        Path(f"{out}.{rank}").write_text(str(error))


def train_sharded(config: TrainConfig, rank: int, ranks: int, port: int) -> None:
    """Train as one of several ranks that share the weights by FSDP 2.

    accelerate takes its FSDP settings from the launcher on GPUs only, so they are put in place.
    """
    become(rank, ranks, port)
    make_accelerator = loop.make_accelerator

    def make(config: TrainConfig, run: Path) -> Accelerator:
        accelerator = make_accelerator(config, run)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
            # what accelerate makes of fp16: the network would predict in half precision
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=torch.float16, output_dtype=torch.float16
            ),
        )
        use_autocast_alone(accelerator)
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return accelerator

    loop.make_accelerator = make
    loop.train(config)


def train_sharded_in_fp16(
    config: TrainConfig, settings: dict[str, float], out: Path, rank: int, ranks: int, port: int
) -> None:
    """``train_sharded`` with a gradient scaler of these settings.

    After every step each rank adds a line to ``out``.RANK: the step and the scaler's state.
    """
    scalers: list[torch.amp.GradScaler] = []
    make, count = scaled(**settings), loop.count_step

    def keep_scaler(config: TrainConfig, run: Path) -> Accelerator:
        accelerator = make(config, run)
        scalers.append(accelerator.scaler)
        return accelerator

    def write_down(progress: Progress, *arguments: Any) -> None:
        with Path(f"{out}.{rank}").open("a") as lines:
            lines.write(json.dumps([progress.step, scalers[0].state_dict()]) + "\n")
        count(progress, *arguments)

    loop.make_accelerator, loop.count_step = keep_scaler, write_down
    train_sharded(config, rank, ranks, port)


def probe_taught(
    config: TrainConfig,
    kept: dict[int, int],
    taught: dict[int, int],
    out: Path,
    rank: int,
    ranks: int,
    port: int,
) -> None:
    """``probe`` with a teacher of other weights.

    Args:
        taught: as ``kept``, of the pixels that the teacher's loss counts.
    """

    class Carved(Teacher):
        def lesson(self, batch: TrainingBatch) -> Lesson:
            whole = super().lesson(batch)
            weight = whole.weight.flatten(1)
            for row, identity in zip(weight, batch.sample.tolist(), strict=True):
                row[taught.get(identity, 61 * identity % 300) :] = 0
            return whole

    def open_teacher(config: TrainConfig, student: DepthNetwork, _: Accelerator) -> Teacher:
        torch.manual_seed(1)
        return Carved(Network(), config, student)

    loop.open_teacher = open_teacher
    probe(config, kept, out, rank, ranks, port)


def probe(
    config: TrainConfig, kept: dict[int, int], out: Path, rank: int, ranks: int, port: int
) -> None:
    """Train as one of several ranks; the main one writes down what came of it.

    Args:
        kept: from a sample's identity to the number of its pixels that keep their truth; samples
            that are not named keep some of theirs.
        out: without suffix. ``.gradients`` has what the first step clips, ``.weights`` the network
            at the end, ``.json`` the metrics (all in the formats of safetensors and JSON),
            ``.storages`` the number of memory blocks that gradients lie in throughout.
        port: free, the same for all ranks.
    """
    become(rank, ranks, port)
    torch.manual_seed(0)
    network = Network()
    whole_weight, clip = loop.loss_weight, Accelerator.clip_grad_norm_
    clipped, storages = 0, set()

    def carved(batch: Batch, settings: LossConfig) -> Tensor:
        storages.update(p.grad.untyped_storage().data_ptr() for p in network.parameters())
        weight = whole_weight(batch, settings).double().flatten(1)
        for row, identity in zip(weight, batch.sample.tolist(), strict=True):
            row[kept.get(identity, 1 + 97 * identity % 500) :] = 0
        return weight.view_as(batch.valid)

    def write_down(accelerator: Accelerator, parameters: Any, limit: float) -> Tensor:
        nonlocal clipped
        parameters = list(parameters)
        if clipped == 0 and accelerator.is_main_process:
            gradients = {str(i): p.grad.clone() for i, p in enumerate(parameters)}
            save_file(gradients, f"{out}.gradients")
        clipped += 1
        return clip(accelerator, parameters, limit)

    loop.loss_weight = carved
    loop.build_model = lambda *_: network
    loop._save_weights = lambda *_: None
    loop.write_model_card = lambda *_: None
    Accelerator.clip_grad_norm_ = write_down
    metrics = loop.train(config)
    if rank == 0:
        save_file({name: p.detach() for name, p in network.named_parameters()}, f"{out}.weights")
        Path(f"{out}.json").write_text(json.dumps(metrics))
        Path(f"{out}.storages").write_text(str(len(storages)))
