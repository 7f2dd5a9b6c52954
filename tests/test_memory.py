"""Simulated memory: against the CPU allocator, counted bytes and CUDA's types; its advice."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from flatdepth.cli import parse_config
from flatdepth.config import (
    NETWORKS,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from flatdepth.errors import UserError
from flatdepth.models.depth_anything import ENCODERS
from flatdepth.models.network import DepthNetwork
from flatdepth.models.networks import make_network
from flatdepth.training import memory
from flatdepth.training.ema import Ema
from flatdepth.training.memory import (
    BLOCK,
    CONTEXT_BYTES,
    GIB,
    MemoryTracker,
    Peak,
    Proposal,
    Simulation,
    build_bare_model,
    build_bare_teacher,
    choose,
    count_flops,
    cuda_autocast,
    fit,
    out_of_memory_advice,
    out_of_memory_advised,
    parse_bytes,
    simulate,
    take_step,
)
from flatdepth.training.optim import make_optimizer
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")


def tiny(
    *,
    checkpointing: str = "none",
    precision: str = "no",
    micro_batch: int = 2,
    eval_batch: int = 1,
    optim: str = "adamw",
    ema: float = 0.0,
    teacher: float = 0.0,
    lora_rank: int = 0,
) -> TrainConfig:
    return TrainConfig(
        batch=4,
        micro_batch=micro_batch,
        precision=precision,
        data=DataConfig(height=84, width=98),
        model=ModelConfig(
            encoder="vitt", checkpointing=checkpointing, lora_rank=lora_rank, checkpoint="start.pth"
        ),
        loss=LossConfig(teacher=teacher),
        optim=OptimConfig(kind=optim, ema=ema),
        eval=EvalConfig(batch=eval_batch),
    )


def bytes_of(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def taken(config: TrainConfig) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    """A real model and optimiser on the CPU after one step, and a function that takes another."""
    torch.manual_seed(0)
    model = build_bare_model(config)
    teacher = build_bare_teacher(config, model)
    optimizer = make_optimizer(model, config.optim, CPU)
    step = partial(
        take_step,
        model,
        optimizer,
        config,
        partial(memory._empty_batch, config, CPU),
        micro_steps=2,
        enter=lambda _: None,
        teacher=teacher,
    )
    step()
    return model, optimizer, step


def test_storages_count_from_their_making_to_their_last_reference() -> None:
    tracker = MemoryTracker()
    with tracker:
        tracker.enter_phase("forward")
        kept = torch.zeros(1000)  # 4000 bytes: 8 blocks
        view = kept[10:].view(2, -1)
        gone = torch.zeros(1)  # a block of its own
        del gone, kept  # the view keeps the storage
        tracker.enter_phase("backward")
        other = torch.ones(256) + 1  # two of 1024 bytes for a moment
        assert tracker.total == (8 + 2) * BLOCK
        tracker.label([other], "gradients")
        view.add_(1)
    assert dict(tracker.phase_peaks) == {"forward": 9 * BLOCK, "backward": 12 * BLOCK}
    assert tracker.peak.total == 12 * BLOCK == sum(tracker.peak.parts.values())
    assert (tracker.peak.phase, tracker.peak.operation) == ("backward", "add")
    assert {k: v for k, v in tracker.live.items() if v} == {
        "activations": 8 * BLOCK,
        "gradients": 2 * BLOCK,
    }
    del view, other
    assert tracker.total == 0


@pytest.mark.parametrize(
    ("checkpointing", "teacher"),
    [("none", 0.0), ("encoder", 0.0), ("encoder+head", 0.0), ("encoder", 1.0)],
)
def test_the_peak_is_that_of_the_cpu_allocator(checkpointing: str, teacher: float) -> None:
    """The profiler's record of every allocation of a real step, in float32, is the oracle.

    The kernels of the CPU take little scratch memory in float32, and autocast has no part in it.
    """
    config = tiny(checkpointing=checkpointing, teacher=teacher)
    model, optimizer, step = taken(config)
    held = bytes_of([*model.parameters(), *model.buffers()])
    if teacher:
        held += bytes_of(p for p in model.parameters() if p.requires_grad)
    held += bytes_of(t for state in optimizer.state.values() for t in state.values())
    held += bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert len(events) > 1000
    assert simulate(config).peak.total == pytest.approx(held + most, rel=0.01)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_what_stays_is_what_a_real_run_holds(kind: str) -> None:
    config = tiny(optim=kind, ema=0.99)
    model, optimizer, _ = taken(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for state in optimizer.state.values() for t in state.values()]
    state = list({id(t): t for t in state if isinstance(t, Tensor)}.values())
    expected = {
        "weights": [*model.parameters(), *model.buffers()],
        "gradients": trained,
        "optimiser state": state,
        "average of the weights": list(Ema(model, 0.99).state_dict().values()),
    }
    parts = simulate(config).peak.parts
    for name, tensors in expected.items():
        # Each tensor is rounded up to blocks; 8-bit AdamW has two tables of 1 KiB more.
        excess = parts[name] - bytes_of(tensors)
        assert -2048 <= excess < BLOCK * len(tensors), name


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_teacher_holds_in_half_precision_what_trains_and_shares_the_rest(lora_rank: int) -> None:
    """With adapters that is the head: norms, scales and embeddings stay in float32."""
    config = tiny(precision="fp16", teacher=1.0, lora_rank=lora_rank)
    with torch.device("meta"):
        plain = build_bare_model(tiny())
    wide = re.compile(r"norm|gamma|cls_token|pos_embed")
    copied = {
        name: parameter.numel() * (4 if wide.search(name) else 2)
        for name, parameter in plain.named_parameters()
        if parameter.requires_grad and not (lora_rank and plain.is_encoder(name))
    }
    assert len(copied) > 20
    found = simulate(config).peak.parts["teacher's weights"]
    assert 0 <= found - sum(copied.values()) < BLOCK * len(copied)


def test_a_teacher_is_gone_before_the_student_computes() -> None:
    """Of its forward pass nothing but the lesson is left: a depth and a weight per pixel."""
    config = tiny(teacher=1.0)
    alone, taught = (simulate(tiny(teacher=t)).phase_peaks for t in (0.0, 1.0))
    weights = simulate(config).peak.parts["teacher's weights"]
    lesson = 2 * 4 * config.micro_batch * config.data.height * config.data.width
    assert taught["forward"] - alone["forward"] == pytest.approx(weights + lesson, rel=0.01)
    assert taught["teacher"] < taught["forward"]


def test_a_teacher_costs_one_forward_pass() -> None:
    """A third of a training's operations: the backward pass has two products for each."""
    plain, taught = (count_flops(tiny(teacher=t)) for t in (0.0, 1.0))
    assert taught / plain == pytest.approx(4 / 3, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "encoder", "encoder+head"])
def test_activations_are_what_autograd_saves(checkpointing: str) -> None:
    config = tiny(checkpointing=checkpointing)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = -(-storage.nbytes() // BLOCK) * BLOCK
        return tensor

    tracker = MemoryTracker()
    with tracker:
        model = build_bare_model(config)
        tracker.enter_phase("batch")
        image, *_ = memory._empty_batch(config, CPU)
        tracker.enter_phase("forward")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(image)
        pack(output)
    for tensor in (image, *model.parameters(), *model.buffers()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert tracker.live["activations"] == sum(saved.values()) > 0


def module_types(
    make: Callable[[], DepthNetwork],
    given: Callable[[], tuple[object, ...]],
    device: str,
    dtype: torch.dtype,
) -> list[tuple[str, list[torch.dtype]]]:
    """Types of inputs and outputs of every module, by the autocast rules of a device.

    Args:
        make, given: the network, and what it is called with.
    """
    with torch.device("meta"):
        model = make()
    seen: list[tuple[str, list[torch.dtype]]] = []
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        memory._materialise(model)
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.append(
                    (name, [t.dtype for t in (*inputs, output) if isinstance(t, Tensor)])
                )
            )
        torch.set_autocast_enabled(device, True)  # torch.autocast refuses without a GPU
        torch.set_autocast_dtype(device, dtype)
        try:
            model(*given())
        finally:
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("depth_anything_v2", "vitt"),
        ("efficientnet", "lite0"),
        ("midas_v21", "tiny"),
        ("midas_v21", "lite3"),
        ("resnet50", "tiny"),
    ],
)
def test_simulated_types_are_those_of_cuda(name: str, encoder: str, dtype: torch.dtype) -> None:
    """Fake CUDA tensors go through CUDA's own autocast rules, GPU or not."""
    multiple = NETWORKS[name].multiple

    def make() -> DepthNetwork:
        return make_network(name, encoder, kind="metric")

    def given() -> tuple[object, ...]:
        return (torch.empty(1, 3, 2 * multiple, 3 * multiple),)

    on_cuda = module_types(make, given, "cuda", dtype)
    with cuda_autocast():
        simulated = module_types(make, given, "cpu", dtype)
    assert len(on_cuda) > 50 and any(dtype in types for _, types in on_cuda)
    assert simulated == on_cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recomputation_changes_no_gradient_under_autocast(dtype: torch.dtype) -> None:
    image = torch.rand(1, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    grads = []
    for checkpointing in ("none", "encoder", "encoder+head"):
        torch.manual_seed(0)
        model = build_bare_model(tiny(checkpointing=checkpointing))
        with torch.autocast("cpu", dtype, cache_enabled=False):
            prediction = model(image)
        prediction.log().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "limit_gib", "options"),
    [
        ("vitl_8gb", 6.0, ()),
        ("vitl_4gb", 4.0, ()),
        ("vitl_8gb", 6.5, ("--loss.teacher=1",)),
    ],
)
def test_the_large_model_fits_as_promised(
    name: str, limit_gib: float, options: tuple[str, ...]
) -> None:
    path = REPOSITORY / "configs" / f"{name}.yaml"
    arguments = [f"--config={path}", *options]
    config = parse_config(TrainConfig, arguments, prog="train.py", description=None)
    result = simulate(config)
    assert result.peak.total <= limit_gib * GIB
    # Weights and gradients of 335 million numbers are there at the peak, whatever else is.
    assert result.peak.total > 2 * 4 * 335e6
    assert result.peak.total == max(result.phase_peaks.values())


def test_validation_counts_too() -> None:
    small, large = (simulate(tiny(eval_batch=b)) for b in (1, 16))
    assert small.peak.phase != "validation"
    assert (large.peak.phase, large.peak.total) == ("validation", large.phase_peaks["validation"])


def test_recomputation_costs_one_more_pass_through_the_blocks() -> None:
    """Matrices of 12 d^2 and attention of 2 n d per token, two operations each."""
    plain, encoder = (count_flops(tiny(checkpointing=c)) for c in ("none", "encoder"))
    spec = ENCODERS["vitt"]
    n, d = 1 + 6 * 7, spec.embed_dim
    assert encoder - plain == spec.depth * n * (2 * 12 * d**2 + 2 * 2 * n * d)


def proposal(checkpointing: str, micro_batch: int, peak: int, flops: float, fits: str) -> Proposal:
    return Proposal(
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        eval_batch=1,
        peak=peak,
        flops_per_image=flops,
        fits=fits,
    )


def test_the_least_work_that_fits_is_chosen() -> None:
    none = proposal("none", 1, 700, 4.0, "tight")
    one = proposal("encoder", 1, 500, 5.0, "yes")
    two = proposal("encoder", 2, 600, 5.0, "yes")
    head = proposal("encoder+head", 4, 550, 5.2, "yes")
    assert choose([none, one, two, head]) == two
    assert choose([none, head]) == head
    assert choose([none, proposal("encoder", 2, 650, 5.0, "tight")]).peak == 650
    assert choose([proposal("none", 1, 900, 4.0, "no")]) is None


HELD = 3 * GIB
PER_IMAGE = {"none": GIB, "encoder": GIB // 2, "encoder+head": GIB // 4}


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the simulation, which takes seconds: memory and work by a formula."""

    def simulated(config: TrainConfig) -> Simulation:
        training = HELD + config.micro_batch * PER_IMAGE[config.model.checkpointing]
        validation = HELD + config.eval.batch * GIB // 8
        phases = {"backward": training, "validation": validation}
        phase = max(phases, key=lambda name: phases[name])
        peak = Peak(total=phases[phase], parts={}, phase=phase, module="", operation="")
        return Simulation(peak=peak, phase_peaks=phases)

    work = {"none": 4.0, "encoder": 5.0, "encoder+head": 5.25}
    monkeypatch.setattr(memory, "simulate", simulated)
    monkeypatch.setattr(memory, "count_flops", lambda config: work[config.model.checkpointing])


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("eval_batch", [1, 64])
@pytest.mark.parametrize("room_gib", [3.2, 3.3, 4.1, 4.6, 5.3, 100.0])
def test_proposals_keep_the_batch_and_fit_what_they_say(eval_batch: int, room_gib: float) -> None:
    config = tiny(eval_batch=eval_batch)
    budget = CONTEXT_BYTES + round(room_gib * GIB)
    proposals = fit(config, budget)
    assert {p.checkpointing for p in proposals} == PER_IMAGE.keys()
    assert {p.eval_batch for p in proposals} == {eval_batch if room_gib > 50 else 1}
    for one in proposals:
        assert config.batch % one.micro_batch == 0
        assert memory.simulate(one.applied(config)).peak.total == one.peak
        assert (one.fits == "no") == (CONTEXT_BYTES + one.peak > budget)
        assert one.fits != "yes" or CONTEXT_BYTES + 1.05 * one.peak <= budget
    for kind in PER_IMAGE:
        tried = [p for p in proposals if p.checkpointing == kind]
        assert [p.micro_batch for p in tried] == [1, 2, 4][: len(tried)]
        assert all(p.fits != "no" for p in tried[:-1])
        assert len(tried) == 3 or tried[-1].fits == "no"
    chosen = choose(proposals)
    assert (chosen is None) == (room_gib == 3.2)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize("room_gib", [3.3, 4.1, 5.3])
def test_advice_after_running_out_fits_what_there_is(
    room_gib: float,
    error: RuntimeError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(micro_batch=4, eval_batch=16)
    room = round(room_gib * GIB)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (room // 4, 8 * GIB))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda: room - room // 4)
    with (
        pytest.raises(UserError, match=r"micro_batch 4 with model\.checkpointing none") as caught,
        out_of_memory_advised(config),
    ):
        raise error
    assert "simulating" in capsys.readouterr().err
    flags = re.search(r"enough with (--.*)", str(caught.value))[1].split()
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    better = tiny(
        micro_batch=int(values["--micro_batch"]),
        checkpointing=values["--model.checkpointing"],
        eval_batch=int(values["--eval.batch"]),
    )
    assert memory.simulate(better).peak.total <= room


@pytest.mark.usefixtures("arithmetic")
def test_advice_never_repeats_what_failed() -> None:
    """With room for everything by the simulation, something smaller is proposed all the same."""
    advice = out_of_memory_advice(tiny(micro_batch=4), 100 * GIB)
    assert "enough with --micro_batch 2 --model.checkpointing none" in advice


@pytest.mark.usefixtures("arithmetic")
def test_advice_where_nothing_fits_names_what_is_left() -> None:
    advice = out_of_memory_advice(tiny(optim="adamw8bit"), CONTEXT_BYTES + GIB)
    assert "the least it can do with is 3.25 GiB" in advice and "--micro_batch 1" in advice
    assert "--model.freeze encoder" in advice and "adamw8bit" not in advice


def test_other_errors_pass_by() -> None:
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_advised(tiny()):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("7.5 GB", 7_500_000_000), ("900MiB", 900 * 2**20)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8", "8 G", "eight", "-1GiB", "0GiB", "8GiB!"])
def test_what_is_no_amount_is_named(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"such as 8GiB, got {text!r}")):
        parse_bytes(text)
