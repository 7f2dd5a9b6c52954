"""Every ready config: its header, and a model and optimiser built from it without memory."""

import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from flatdepth.cli import parse_config
from flatdepth.config import TrainConfig
from flatdepth.models import depth_anything
from flatdepth.models.depth_anything import ENCODERS
from flatdepth.models.lora import add_lora
from flatdepth.models.network import freeze
from flatdepth.models.networks import make_network, network_class
from flatdepth.training.launch import share_out
from flatdepth.training.optim import make_optimizer
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
FILES = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "recipes").glob("*.yaml")])
PREFIXES = ("vits_", "vitb_", "vitl_", "midas_v21", "resnet50")
GPU_FILES = [path for path in FILES if path.stem.startswith(PREFIXES)]

# What is trained, counted from the facts of the official models: encoder and head sizes without the
# five unused tensors (encoder - d, head - 2 * (9 f^2 + f)).
ALL = {
    "vits": 22_056_576 - 384 + 2_728_513 - 2 * (9 * 64**2 + 64),
    "vitb": 86_580_480 - 768 + 10_890_305 - 2 * (9 * 128**2 + 128),
    "vitl": 304_368_640 - 1024 + 30_947_009 - 2 * (9 * 256**2 + 256),
}
HEAD = {
    "vits": 2_728_513 - 2 * (9 * 64**2 + 64),
    "vitl": 30_947_009 - 2 * (9 * 256**2 + 256),
}
# norms 2 * 2 d, layer scales 2 d, biases 9 d, matrices 12 d^2
BLOCK_S = 2 * 2 * 384 + 2 * 384 + 9 * 384 + 12 * 384**2
STEM_S = 384 + 1370 * 384 + 3 * 14 * 14 * 384 + 384
RANK = 16
ADAPTERS_L = 24 * RANK * (1024 + 3072 + 1024 + 1024 + 1024 + 4096 + 4096 + 1024)
# convolutions of torchvision's ResNet-50: all but norms (two numbers a channel) and classifier, and
# those of the stem and its first stage
RESNET = 25_557_032 - 1000 * 2049 - 2 * 26_560
FROZEN = 3 * 64 * 7**2 + 3 * (9 * 64**2 + 64 * 256) + 64 * (64 + 256) + 2 * 256 * 64
DECODER = 16 * (2048 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64) + 2 * 960 + 1
EXPECTED = {
    "vits_indoor": ALL["vits"],
    "vits_outdoor": ALL["vits"],
    "vits_lidar": ALL["vits"],
    "vits_relative": ALL["vits"],
    "vitb_indoor": ALL["vitb"],
    "vitl_8gb": ALL["vitl"],
    "vitl_4gb": ALL["vitl"],
    "vitl_relative": ALL["vitl"],
    "vitl_lora": HEAD["vitl"] + ADAPTERS_L,
    "vits_head_only": HEAD["vits"],
    "vits_encoder_frozen": HEAD["vits"],
    "midas_v21": 105_362_945 - 2 * 101_440 - 2 * (9 * 256**2 + 256),
    "resnet50": RESNET - FROZEN + DECODER,
    "vits_first_blocks_frozen": ALL["vits"] - STEM_S - 8 * BLOCK_S,
}


def read(path: Path) -> TrainConfig:
    return parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds_its_model_and_optimiser(path: Path) -> None:
    config = read(path)
    chosen = config.model
    if chosen.name == "marigold":
        pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = make_network(
            chosen.name, chosen.encoder, kind=chosen.kind, max_depth_m=chosen.max_depth_m
        )
        freeze(model, chosen.freeze, chosen.frozen_blocks)
        if chosen.lora_rank:
            add_lora(model, rank=chosen.lora_rank, alpha=chosen.lora_alpha)
    optimizer = make_optimizer(model, config.optim, torch.device("cpu"))
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == EXPECTED.get(path.stem, trained)
    assert share_out(config, 1) == (config, config.batch // config.micro_batch)


def test_every_expectation_is_of_a_file() -> None:
    assert {path.stem for path in GPU_FILES} == EXPECTED.keys()


@pytest.mark.parametrize("path", GPU_FILES, ids=lambda path: path.stem)
def test_its_header_says_how_to_run_it_and_its_weights_are_of_its_kind(path: Path) -> None:
    config = read(path)
    header = path.read_text().split("name:")[0]
    for part in (f"--config configs/{path.name}", "Hardware:", "Expected memory:", "Licence"):
        assert part in header, part
    if config.optim.kind == "adamw8bit":
        assert "'.[8bit]'" in header
    if config.model.lora_rank:
        assert "'.[lora]'" in header
    chosen = config.model
    assert chosen.checkpoint is not None
    said = network_class(chosen.name).named(Path(chosen.checkpoint).stem)
    if said is None:  # weights of an encoder alone
        assert chosen.head == "fresh" and chosen.checkpoint.startswith(chosen.encoder)
        return
    assert said["encoder"] == chosen.encoder
    if chosen.head == "keep":
        assert said["kind"] == chosen.kind
        assert chosen.kind != "metric" or float(said["max_depth_m"]) == chosen.max_depth_m


@pytest.mark.parametrize(
    ("name", "kind", "machines"),
    [
        ("one_gpu", "NO", 1),
        ("multi_gpu", "MULTI_GPU", 1),
        ("fsdp", "FSDP", 1),
        ("two_nodes", "MULTI_GPU", 2),
    ],
)
def test_accelerate_takes_its_launch_config(
    name: str, kind: str, machines: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.distributed_type == kind and config.num_machines == machines
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), *(["--machine_rank", "1"] * (machines > 1)), "train.py"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPUs that are not there
        arguments, _, _ = _validate_launch_command(arguments)
    assert "defaults used instead" not in caplog.text
    assert arguments.num_processes == config.num_processes
    assert arguments.use_fsdp == (kind == "FSDP")
    header = path.read_text().split("compute_environment")[0]
    assert f"--config_file configs/accelerate/{name}.yaml" in header
    if kind == "FSDP":
        assert hasattr(depth_anything, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])


def test_the_8_and_4_gb_recipes_save_memory_as_they_say() -> None:
    eight, four = (read(REPOSITORY / "configs" / f"vitl_{n}gb.yaml") for n in (8, 4))
    for config in (eight, four):
        assert config.precision == "fp16"
        assert (config.batch, config.micro_batch) == (16, 1)
        assert config.model.freeze == "none" and ENCODERS[config.model.encoder].depth == 24
    assert (eight.optim.kind, eight.model.checkpointing) == ("adamw", "encoder")
    assert (four.optim.kind, four.model.checkpointing) == ("adamw8bit", "encoder+head")
