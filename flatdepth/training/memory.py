"""How much GPU memory a training needs: simulated without a GPU, measured with one.

The simulation runs the real model, loss and optimiser on tensors without data (``FakeTensorMode``)
and counts what a caching allocator would hold. Every storage counts from the operation that makes
it to the moment nothing refers to it, rounded up to the 512-byte blocks of PyTorch's CUDA
allocator. Fake *CPU* tensors are used, because autograd needs a driver for CUDA ones;
``cuda_autocast`` gives them the types that autocast gives on CUDA.

What no count of tensors holds: the CUDA context (``CONTEXT_BYTES``), scratch memory inside kernels
(cuBLAS, cuDNN, attention), and the gaps in the allocator's segments. Each of several devices takes
as much, and what its communication library needs besides.
"""

import dataclasses
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flatdepth.cli import free_memory
from flatdepth.config import OptimConfig, TrainConfig
from flatdepth.errors import UserError, is_out_of_memory
from flatdepth.models.lora import add_lora
from flatdepth.models.network import (
    Checkpointing,
    DepthNetwork,
    freeze,
    nominal_focal,
    parameter_groups,
)
from flatdepth.models.networks import make_network
from flatdepth.models.precision import HALF
from flatdepth.training.ema import Ema
from flatdepth.training.losses import depth_loss, own_arguments
from flatdepth.training.optim import make_optimizer
from flatdepth.training.teacher import Lesson, Teacher, bare_network

GIB = 2**30
BLOCK = 512
CONTEXT_BYTES = GIB // 2
"""Rough size of a CUDA context with the kernels of one process; it depends on GPU and driver."""

NextBatch = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Gives image, truth in metres and weight of a micro-batch."""

ROUGH_BYTES_PER_PIXEL = 4000
"""Of a training's memory, per pixel of a micro-batch: by simulation 1000 to 12000."""

MARGIN = 0.05
"""Share of the simulated peak to leave for what the simulation does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The moment of the largest sum of live storages.

    Attributes:
        total: bytes.
        parts: bytes by category; they add up to ``total``.
        phase: a key of ``MemoryTracker.PHASES``.
        module: path of the module that was running.
        operation: the operation whose result was one too many.
    """

    total: int
    parts: Mapping[str, int]
    phase: str
    module: str
    operation: str


class MemoryTracker(TorchDispatchMode):
    """Counts the live storages of every tensor that is made while it is entered.

    A new storage belongs to the category of the phase it is made in (``PHASES``); ``label`` moves
    those that are known to be something else. Half-precision copies of weights are told apart
    by where they come from.
    """

    PHASES: Mapping[str, str] = {
        "setup": "weights",
        "batch": "batch",
        "teacher": "activations",
        "forward": "activations",
        "loss": "activations",
        "backward": "recomputed and temporary",
        "optimiser": "optimiser temporaries",
        "validation": "activations",
    }

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setup"
        self.module = ""
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = Peak(total=0, parts={}, phase="", module="", operation="")
        self.phase_peaks: Counter[str] = Counter()
        self._categories: dict[int, str] = {}

    def enter_phase(self, phase: str) -> None:
        """Begin a phase, a key of ``PHASES``."""
        self.phase, self.module = phase, ""

    def reset_peak(self) -> None:
        """Forget the peaks so far."""
        self.peak = dataclasses.replace(self.peak, total=0)
        self.phase_peaks.clear()

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Move the storages of known tensors to a category."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size = _blocks(storage.nbytes())
            self.live[self._categories[storage._cdata]] -= size
            self.live[category] += size
            self._categories[storage._cdata] = category

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        category = self.PHASES[self.phase]
        if func is torch.ops.aten._to_copy.default and self._category(args[0]) == "weights":
            category = "weights in half precision"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, category, func)
        return result

    def _category(self, tensor: Tensor) -> str | None:
        return self._categories.get(tensor.untyped_storage()._cdata)

    def _add(self, tensor: Tensor, category: str, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._categories:
            return
        size = _blocks(storage.nbytes())
        self._categories[key] = category
        self.live[category] += size
        self.total += size
        weakref.finalize(storage, self._free, key, size).atexit = False
        self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], self.total)
        if self.total > self.peak.total:
            self.peak = Peak(
                total=self.total,
                parts=dict(self.live),
                phase=self.phase,
                module=self.module,
                operation=str(func).removeprefix("aten.").rpartition(".")[0],
            )

    def _free(self, key: int, size: int) -> None:
        self.live[self._categories.pop(key)] -= size
        self.total -= size


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


WIDE = ("interpolate", "group_norm", "layer_norm")
"""Functions of the networks that autocast computes in float32 on CUDA and not on the CPU."""


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within, autocast on the CPU chooses the types that it chooses on CUDA.

    ``WIDE`` is replaced in ``torch.nn.functional``. A ``TorchFunctionMode`` would not do: it is off
    in a backward pass, and so in what that recomputes.
    """
    own = {name: getattr(F, name) for name in WIDE}
    try:
        for name, function in own.items():
            setattr(F, name, partial(_in_float32, function))
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


def _in_float32(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return function(x, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        return function(x.float(), *args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What one optimiser step of a configuration and one batch of its validation take on a GPU.

    Attributes:
        peak: the largest moment.
        phase_peaks: bytes at the largest moment of each phase.
    """

    peak: Peak
    phase_peaks: Mapping[str, int]


def simulate(config: TrainConfig) -> Simulation:
    """Simulate one optimiser step and one batch of validation, with the optimiser's state in place.

    The paste stage is left out: what it makes is gone before the forward pass, and is less.
    """
    cpu = torch.device("cpu")
    with torch.device("meta"):
        model = build_bare_model(config)
        network = bare_network(config, model)
    tracker = MemoryTracker()
    with FakeTensorMode(), tracker, cuda_autocast():
        _materialise(model)
        teacher = _materialised_teacher(network, config, model)
        if teacher is not None:
            held = {id(parameter) for parameter in model.parameters()}
            kept = [p for p in teacher.network.parameters() if id(p) not in held]
            tracker.label(kept, "teacher's weights")
        _report_modules(model, tracker)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: tracker.label([p.grad], "gradients")
                )
        ema = Ema(model, config.optim.ema)
        tracker.label(ema.state_dict().values(), "average of the weights")
        optimizer = _gpu_optimizer(model, config.optim)
        _fill_state(optimizer, tracker)
        tracker.reset_peak()

        def next_batch() -> tuple[Tensor, Tensor, Tensor]:
            tracker.enter_phase("batch")
            return _empty_batch(config, cpu)

        take_step(
            model,
            optimizer,
            config,
            next_batch,
            micro_steps=_micro_steps(config),
            enter=tracker.enter_phase,
            teacher=teacher,
        )
        tracker.enter_phase("validation")
        validate_once(model, config, cpu)
    return Simulation(peak=tracker.peak, phase_peaks=dict(tracker.phase_peaks))


def count_flops(config: TrainConfig) -> float:
    """Floating point operations per image of a forward and a backward pass.

    Counted are matrix products, convolutions and attention, a multiplication and an addition as
    two, and what checkpointing recomputes; with a teacher its forward pass too.
    """
    config = dataclasses.replace(config, precision="no")  # there is no autocast here
    with torch.device("meta"):
        model = build_bare_model(config)
        network = bare_network(config, model)
    counter = FlopCounterMode(display=False)
    with FakeTensorMode():
        _materialise(model)
        teacher = _materialised_teacher(network, config, model)
        image, truth_m, weight = _empty_batch(config, torch.device("cpu"), images=1)
        own = own_arguments(config.loss, truth_m, weight, [0])
        # A pass of its own: the counter keeps tensors alive that would be free without it.
        with counter:
            if teacher is not None:
                teacher.teach(image, nominal_focal(image), weight > 0)
            model(image, nominal_focal(image), *own).sum().backward()
    return float(counter.get_total_flops())


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Memory of two optimiser steps and one batch of validation on a GPU, in bytes.

    Attributes:
        allocated: largest sum of tensors.
        reserved: largest sum of the allocator's segments, which ``cap`` limits.
        device: in use on the GPU at the end, CUDA context and other processes included.
        cap: limit given to the allocator, or None.
    """

    allocated: int
    reserved: int
    device: int
    cap: int | None


def measure(
    config: TrainConfig, cap: int | None = None, next_batch: NextBatch | None = None
) -> Measurement:
    """Train and validate on the GPU, with the allocator limited to ``cap`` bytes.

    Args:
        next_batch: gives the micro-batches; None takes such without content.

    Raises:
        UserError: the GPU is smaller than ``cap``, or the steps need more.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    if cap is not None:
        if cap > total:
            raise UserError(f"--cap: expected at most the GPU's {gib(total)}, got {gib(cap)}")
        torch.cuda.set_per_process_memory_fraction(cap / total, device)
    torch.cuda.reset_peak_memory_stats(device)
    with out_of_memory_advised(config, cap):
        train_shortly(config, device, next_batch)
    free, _ = torch.cuda.mem_get_info(device)
    return Measurement(
        allocated=torch.cuda.max_memory_allocated(device),
        reserved=torch.cuda.max_memory_reserved(device),
        device=total - free,
        cap=cap,
    )


def train_shortly(
    config: TrainConfig, device: torch.device, next_batch: NextBatch | None = None
) -> None:
    """Two optimiser steps and one batch of validation, with random weights."""
    with device:
        model = build_bare_model(config)
        teacher = build_bare_teacher(config, model)
    optimizer = make_optimizer(model, config.optim, device)
    ema = Ema(model, config.optim.ema)
    # At a scale of 1 nothing overflows, so both steps are taken and the state is made.
    fp16 = config.precision == "fp16"
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=fp16)
    for _ in range(2):
        take_step(
            model,
            optimizer,
            config,
            next_batch or partial(_empty_batch, config, device),
            micro_steps=_micro_steps(config),
            enter=lambda _: None,
            scaler=scaler,
            teacher=teacher,
        )
        ema.update(1)
    validate_once(model, config, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One way to run a configuration.

    Attributes:
        checkpointing, micro_batch, eval_batch: values of ``model.checkpointing``, ``micro_batch``
            and ``eval.batch``.
        peak: simulated bytes.
        flops_per_image: of forward, recomputation and backward.
        fits: whether ``peak`` and a CUDA context fit the budget; tight if only without ``MARGIN``.
    """

    checkpointing: Checkpointing
    micro_batch: int
    eval_batch: int
    peak: int
    flops_per_image: float
    fits: Literal["yes", "tight", "no"]

    @property
    def flags(self) -> str:
        """The proposal as options of training."""
        return (
            f"--micro_batch {self.micro_batch} --model.checkpointing {self.checkpointing} "
            f"--eval.batch {self.eval_batch}"
        )

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The configuration with these values."""
        return dataclasses.replace(
            config,
            micro_batch=self.micro_batch,
            model=dataclasses.replace(config.model, checkpointing=self.checkpointing),
            eval=dataclasses.replace(config.eval, batch=self.eval_batch),
        )


def fit(config: TrainConfig, budget: int) -> list[Proposal]:
    """Simulate micro-batches of 1, 2, 4, ... and every kind of checkpointing on ``budget`` bytes.

    Micro-batches are divisors of ``batch``, so what is learned stays the same. The first that does
    not fit is listed too. Validation takes single images if ``eval.batch`` of them do not fit.
    """
    validation = simulate(config).phase_peaks["validation"]
    proposals = []
    for checkpointing in get_args(Checkpointing):
        proposal = Proposal(
            checkpointing=checkpointing,
            micro_batch=1,
            eval_batch=config.eval.batch if _fits(validation, budget) == "yes" else 1,
            peak=0,
            flops_per_image=0.0,
            fits="yes",
        )
        flops = count_flops(proposal.applied(config))
        while proposal.fits != "no" and config.batch % proposal.micro_batch == 0:
            peak = simulate(proposal.applied(config)).peak.total
            proposal = dataclasses.replace(
                proposal, peak=peak, flops_per_image=flops, fits=_fits(peak, budget)
            )
            proposals.append(proposal)
            proposal = dataclasses.replace(proposal, micro_batch=2 * proposal.micro_batch)
    return proposals


def _fits(peak: int, budget: int) -> Literal["yes", "tight", "no"]:
    room = budget - CONTEXT_BYTES
    if peak * (1 + MARGIN) <= room:
        return "yes"
    return "tight" if peak <= room else "no"


def choose(proposals: Sequence[Proposal]) -> Proposal | None:
    """The one that fits with the least computation, then the largest micro-batch.

    Where none fits with a margin, the smallest of those that fit without.
    """
    good = [proposal for proposal in proposals if proposal.fits == "yes"]
    tight = [proposal for proposal in proposals if proposal.fits == "tight"]
    if good:
        return min(good, key=lambda p: (p.flops_per_image, -p.micro_batch))
    return min(tight, key=lambda p: p.peak, default=None)


def expect_room(config: TrainConfig, device: torch.device) -> None:
    """Refuse a training that the memory of a machine without a GPU cannot hold.

    What may not fit is simulated, which takes seconds. A GPU refuses by itself.

    Raises:
        UserError: by the simulation it takes more than what is free.
    """
    if device.type != "cpu":
        return
    with torch.device("meta"):
        model = make_network(config.model.name, config.model.encoder, kind=config.model.kind)
    images = max(config.micro_batch, config.eval.batch)
    rough = images * config.data.height * config.data.width * ROUGH_BYTES_PER_PIXEL
    copies = 4 + (config.loss.teacher > 0)
    rough += sum(copies * parameter.nbytes for parameter in model.parameters())
    free = free_memory()
    if rough < free / 4:
        return
    simulation = simulate(config)
    need = max(simulation.peak.total, *simulation.phase_peaks.values())
    if need > free:
        raise UserError(
            f"micro_batch {config.micro_batch}, eval.batch {config.eval.batch} and images of "
            f"{config.data.height} x {config.data.width} px take {gib(need)} by simulation, but "
            f"{gib(free)} are free; lower them"
        )


@contextmanager
def out_of_memory_advised(config: TrainConfig, cap: int | None = None) -> Iterator[None]:
    """Turn running out of device memory within into a ``UserError`` that says what would fit.

    Args:
        cap: limit of the allocator in bytes; None takes what this process has and what is free.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error) or not torch.accelerator.is_available():
            raise
        if cap is None:
            free, _ = torch.accelerator.get_memory_info()
            cap = free + torch.accelerator.memory_reserved()
        print("out of GPU memory; simulating what would fit ...", file=sys.stderr)
        raise UserError(out_of_memory_advice(config, cap + CONTEXT_BYTES)) from error


def out_of_memory_advice(config: TrainConfig, budget: int) -> str:
    """One sentence: what to change so that a training that ran out of memory fits ``budget``.

    Args:
        budget: bytes for the CUDA context and everything else.
    """
    # What failed is not proposed again, even where the simulation says that it should have fitted.
    limit = min(budget, simulate(config).peak.total + CONTEXT_BYTES - 1)
    proposals = fit(config, limit)
    chosen = choose(proposals)
    failed = (
        f"out of GPU memory ({gib(budget)}) at micro_batch {config.micro_batch} with "
        f"model.checkpointing {config.model.checkpointing} and eval.batch {config.eval.batch}"
    )
    if chosen is not None:
        return f"{failed}; by simulation {gib(chosen.peak)} are enough with {chosen.flags}"
    least = min(proposals, key=lambda p: p.peak)
    return (
        f"{failed}; the least it can do with is {gib(least.peak)} and a CUDA context of "
        f"{gib(CONTEXT_BYTES)}, with {least.flags}; {_smaller(config)}"
    )


def _smaller(config: TrainConfig) -> str:
    """What takes less memory but changes what is learned."""
    ways = [
        ("--optim.kind adamw8bit", config.optim.kind != "adamw8bit"),
        ("--optim.ema 0", config.optim.ema > 0),
        ("--loss.teacher 0", config.loss.teacher > 0),
        ("a smaller --model.encoder", config.model.encoder != "vits"),
        ("--model.freeze encoder", config.model.freeze == "none" and not config.model.lora_rank),
        ("smaller --data.height and --data.width", True),
    ]
    *others, last = [way for way, is_left in ways if is_left]
    return f"take less with {', '.join(others)}{' or ' if others else ''}{last}"


def parse_bytes(text: str) -> int:
    """``"8GiB"``, ``"7.5 GB"`` or ``"900MiB"`` in bytes.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])(i?)B", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"expected an amount of memory such as 8GiB, got {text!r}")
    base = 1024 if match[3] else 1000
    return round(float(match[1]) * base ** {"M": 2, "G": 3}[match[2]])


def gib(size: float) -> str:
    """Bytes as text in GiB."""
    return f"{size / GIB:.2f} GiB"


def simulation_text(config: TrainConfig, result: Simulation) -> str:
    """The breakdown of a simulated peak as a table."""
    peak = result.peak
    rows = sorted(peak.parts.items(), key=lambda part: -part[1])
    rows = [(name, size) for name, size in rows if size >= 0.005 * GIB]
    rows += [("peak allocated", peak.total)]
    lines = [f"simulated: {_described(config)}", *_aligned(rows)]
    module = f", in {peak.module}" if peak.module else ""
    lines.append(f"the peak is in the {peak.phase} phase{module} ({peak.operation})")
    phases = ", ".join(f"{name} {gib(size)}" for name, size in result.phase_peaks.items())
    lines.append(f"peak by phase: {phases}")
    lines.append(
        f"not counted: the CUDA context (about {gib(CONTEXT_BYTES)}), scratch memory of kernels, "
        "gaps in the allocator's segments"
    )
    return "\n".join(lines)


def measurement_text(config: TrainConfig, result: Measurement) -> str:
    """A measurement as a table."""
    cap = "" if result.cap is None else f", allocator limited to {gib(result.cap)}"
    rows = [
        ("peak allocated", result.allocated),
        ("peak reserved", result.reserved),
        ("device, with the CUDA context", result.device),
    ]
    return "\n".join([f"measured: {_described(config)}{cap}", *_aligned(rows)])


def fit_text(config: TrainConfig, proposals: Sequence[Proposal], budget: int) -> str:
    """The proposals as a table, and the best as options of training."""
    lines = [
        f"{'model.checkpointing':20} {'micro_batch':>11} {'eval.batch':>10} {'GiB':>6} "
        f"{'TFLOP/image':>11}  "
        f"fits {gib(budget)} with a CUDA context of {gib(CONTEXT_BYTES)}"
    ]
    for p in proposals:
        tera = p.flops_per_image / 1e12
        lines.append(
            f"{p.checkpointing:20} {p.micro_batch:11d} {p.eval_batch:10d} {p.peak / GIB:6.2f} "
            f"{tera:11.3f}  {p.fits}"
        )
    chosen = choose(proposals)
    lines.append(f"nothing fits; {_smaller(config)}" if chosen is None else chosen.flags)
    return "\n".join(lines)


def _described(config: TrainConfig) -> str:
    return (
        f"{config.model.encoder}, {config.data.height} x {config.data.width}, "
        f"micro_batch {config.micro_batch}, precision {config.precision}, "
        f"checkpointing {config.model.checkpointing}, {config.optim.kind}, "
        f"{'with a teacher, ' if config.loss.teacher else ''}eval.batch {config.eval.batch}"
    )


def _aligned(rows: Iterable[tuple[str, int]]) -> list[str]:
    return [f"  {name:30} {size / GIB:6.2f} GiB" for name, size in rows]


def _micro_steps(config: TrainConfig) -> int:
    """From the second micro-batch on gradients are there before the forward pass; more add none."""
    return min(2, max(1, config.batch // config.micro_batch))


def build_bare_model(config: TrainConfig) -> DepthNetwork:
    """The model of a training with fresh weights, frozen as configured."""
    chosen = config.model
    model = make_network(
        chosen.name,
        chosen.encoder,
        kind=chosen.kind,
        max_depth_m=chosen.max_depth_m,
        canonical_focal_px=chosen.canonical_focal_px,
        checkpointing=chosen.checkpointing,
    )
    freeze(model, chosen.freeze, chosen.frozen_blocks)
    if chosen.lora_rank:
        add_lora(model, rank=chosen.lora_rank, alpha=chosen.lora_alpha)
    return model


def build_bare_teacher(config: TrainConfig, model: DepthNetwork) -> Teacher | None:
    """The teacher of a training whose model has fresh weights, on the current device."""
    network = bare_network(config, model)
    return None if network is None else Teacher(network, config, model)


def _materialised_teacher(
    network: DepthNetwork | None, config: TrainConfig, model: DepthNetwork
) -> Teacher | None:
    """The teacher of a model with fake tensors."""
    if network is None:
        return None
    _materialise(network)
    return Teacher(network, config, model)


def take_step(
    model: DepthNetwork,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    next_batch: NextBatch,
    *,
    micro_steps: int,
    enter: Callable[[str], None],
    scaler: torch.amp.GradScaler | None = None,
    teacher: Teacher | None = None,
) -> Tensor:
    """One optimiser step as ``training.loop`` takes it, without accelerate; returns its loss.

    Args:
        next_batch: gives image, truth in metres and weight of a micro-batch.
        micro_steps: micro-batches accumulated.
        enter: told teacher, forward, loss, backward and optimiser as they begin.
        scaler: of fp16 gradients.
        teacher: sees the image itself, and all pixels of it count.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    total = torch.zeros(())
    for _ in range(micro_steps):
        image, truth_m, weight = next_batch()
        own = own_arguments(config.loss, truth_m, weight, range(len(image)))
        lesson: Lesson | None = None
        if teacher is not None:
            enter("teacher")
            with _autocast(config, image.device):
                lesson = teacher.teach(image, nominal_focal(image), weight >= 0)
        enter("forward")
        with _autocast(config, image.device):
            prediction = model(image, nominal_focal(image), *own)
        enter("loss")
        losses = depth_loss(model.kind, prediction, truth_m, weight, config.loss)
        if lesson is not None:
            losses = losses + config.loss.teacher * lesson.loss(model.kind, prediction)
        loss = losses.mean() / micro_steps
        enter("backward")
        scaler.scale(loss).backward()
        total = total.to(loss.device) + loss.detach()
    enter("optimiser")
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=False)
    return total


@torch.no_grad()
def validate_once(model: DepthNetwork, config: TrainConfig, device: torch.device) -> None:
    """Predict one batch of a validation without content."""
    image, *_ = _empty_batch(config, device, images=config.eval.batch)
    with _autocast(config, device):
        model(image, nominal_focal(image))


def _autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """As ``flatdepth.training.launch.make_accelerator`` sets it."""
    dtype = HALF.get(config.precision, torch.float32)
    return torch.autocast(device.type, dtype, enabled=config.precision != "no", cache_enabled=False)


def _empty_batch(
    config: TrainConfig, device: torch.device, *, images: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, truth and weight without content, for ``take_step``; a micro-batch by default."""
    images = images or config.micro_batch
    size = (config.data.height, config.data.width)
    image = torch.zeros(images, 3, *size, device=device)
    truth_m = torch.ones(images, 1, *size, device=device)
    return image, truth_m, torch.ones_like(truth_m)


def _materialise(model: nn.Module) -> None:
    """Give a meta model fake tensors on the CPU; ``Module.to_empty`` cannot."""
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            fake = torch.empty(old.shape, dtype=old.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=old.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _report_modules(model: nn.Module, tracker: MemoryTracker) -> None:
    """Tell the tracker which module runs, forward (and again to recompute) and backward."""
    for path, module in model.named_modules():

        def enter(*_: object, path: str = path) -> None:
            tracker.module = path

        def enter_backward(
            _: nn.Module, __: object, output: object, enter: Callable[..., None] = enter
        ) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(enter)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(enter_backward)


def _gpu_optimizer(model: DepthNetwork, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a training on a GPU, for fake tensors."""
    if config.kind == "adamw8bit":
        return _AdamW8bitState(parameter_groups(model, config.lr, 1.0, 0.0), {})
    return make_optimizer(model, config, torch.device("cuda"))


class _AdamW8bitState(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit without its kernels, which take no fake tensors.

    Per element and moment one byte, per block of 256 elements one float32; tensors of less than
    4096 elements have float32 moments (bitsandbytes 0.50, ``Optimizer2State.init_state``). The
    kernel updates in place.
    """

    def step(self, _: object = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state, size = self.state[parameter], parameter.numel()
            for moment in () if state else ("1", "2"):
                if size < 4096:
                    state["state" + moment] = torch.empty(size, dtype=torch.float32)
                else:
                    state["state" + moment] = torch.empty(size, dtype=torch.uint8)
                    state["absmax" + moment] = torch.empty(-(-size // 256), dtype=torch.float32)


def _fill_state(optimizer: torch.optim.Optimizer, tracker: MemoryTracker) -> None:
    """Let the optimiser make its state in a step on gradients without content."""
    tracker.enter_phase("optimiser")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            tracker.label([parameter.grad], "gradients")
    optimizer.step()
    tracker.label(
        (leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)),
        "optimiser state",
    )
