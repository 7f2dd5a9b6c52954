"""A frozen teacher: what a network says of the photograph, kept where nothing was pasted.

Training on pastes moves the whole network, and what it knew of the background fades. The teacher, a
network that does not train (the one that the run starts from, unless other weights are given), sees
each image without pastes and with its colours unchanged; its depth is the truth of one more loss of
the student, which sees the pasted and changed image, on the pixels that both show. That is
self-distillation from a weak to a strong view (Sohn et al. 2020, FixMatch), of depth instead of
labels.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Bool, Float
from torch import Tensor, nn

from flatdepth.config import LOSSES, NETWORKS, LossConfig, TrainConfig, nearest_multiple
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import WeightFile, model_of, read_weights
from flatdepth.models.lora import unadapted
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.networks import make_network
from flatdepth.models.precision import HALF
from flatdepth.training.losses import depth_loss
from flatdepth.types import Region, TrainingBatch

CAST = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers whose weights autocast turns into half precision before anything else is done to them."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the teacher says of a micro-batch.

    Attributes:
        truth_m: (b, 1, h, w) planar z in metres, or what stands for it up to the scale and shift
            that the kind of the teacher leaves open; at least float32.
        weight: (b, 1, h, w) float32, 1 where it counts and 0 elsewhere.
        terms: the losses that compare it.
    """

    truth_m: Float[Tensor, "b 1 h w"]
    weight: Float[Tensor, "b 1 h w"]
    terms: LossConfig

    def loss(self, kind: Kind, prediction: Float[Tensor, "b 1 h w"]) -> Float[Tensor, " b"]:
        """What a student's prediction of its kind differs by, as ``losses.depth_loss``."""
        return depth_loss(kind, prediction, self.truth_m, self.weight, self.terms)


class Teacher:
    """A network that does not train, and how its predictions are compared.

    What of the network is the student's and does not train there either is shared with it; the
    rest of its weights lie in half precision where autocast would make them so for every
    prediction, which then is the same to the last bit.

    Args:
        network: of the architecture; its weights count with ``model.teacher``, else the student's.
        config: of the training. ``model.teacher`` says whose weights the teacher has.
        student: with the weights that training starts from.
        share: whether parameters that do not train are the student's own. Not where a wrapper
            takes them apart (FSDP).
        digest: of its weights, as ``weights_digest``; empty where they have no content.

    Raises:
        UserError: a prediction of the network's kind says nothing about the student's, or it does
            not take the training's images.
    """

    def __init__(
        self,
        network: DepthNetwork,
        config: TrainConfig,
        student: DepthNetwork,
        *,
        share: bool = True,
        digest: str = "",
    ) -> None:
        source = config.model.teacher or str(config.model.checkpoint)
        self.network = network
        self.digest = digest
        self._terms = teacher_terms(network.kind, student.kind, config.loss, source)
        self._config = config
        both = math.lcm(network.multiple, student.multiple)
        for side in ("height", "width"):
            size = getattr(config.data, side)
            if size % network.multiple:
                raise UserError(
                    f"model.teacher: {source} takes sides that are multiples of "
                    f"{network.multiple}, but data.{side} is {size}; take a multiple of {both} for "
                    f"both networks, such as {nearest_multiple(size, both)}, or another teacher"
                )
        own = config.model.teacher is None
        _fill(
            network,
            unadapted(student if own else network),
            share=own and share,
            half=HALF.get(config.precision),
        )
        network.train()  # as losses see it: Depth Anything 3 fills the sky in evaluation mode

    @torch.no_grad()
    def teach(
        self,
        image: Float[Tensor, "b 3 h w"],
        focal_px: Float[Tensor, " b"],
        where: Bool[Tensor, "b 1 h w"],
    ) -> Lesson:
        """Predict photographs; within the run's autocast.

        Args:
            image, focal_px: as of ``DepthNetwork.forward``, without pastes.
            where: the pixels that may count. Those of which the teacher says that they are sky, or
                nothing that is a depth, do not.
        """
        model = self._config.model
        far_m = torch.full_like(focal_px, model.reach_m(1.0))
        if model.canonical_focal_px is not None:
            far_m = far_m * focal_px
        prediction = self.network(image, focal_px)
        range_m = (self._config.data.min_depth_m, far_m[:, None, None, None])
        truth_m, known = as_truth(self.network.kind, prediction, range_m)
        return Lesson(truth_m, (known & where).float(), self._terms)

    def lesson(self, batch: TrainingBatch) -> Lesson:
        """``teach`` on the background of a training's batch, with or without truth.

        The shadow of a paste on the wall beside it changes no depth, so the teacher's counts there.
        On what is labelled as flat in the photograph it does not: there the teacher may be fooled.

        Raises:
            ValueError: the batch was made without its photographs.
        """
        if batch.photograph is None:
            raise ValueError("the batch was made without its photographs")
        return self.teach(batch.photograph, batch.focal_px, batch.region == Region.BACKGROUND)


def open_teacher(
    config: TrainConfig, student: DepthNetwork, accelerator: Accelerator
) -> Teacher | None:
    """The teacher of a run, on its device; None without one, and then nothing is read.

    Args:
        student: with the weights that training starts from, before anything wraps it.

    Raises:
        UserError: as for ``Teacher``, or its weights cannot be had or read.
    """
    if not config.loss.teacher:
        return None
    share = accelerator.distributed_type != DistributedType.FSDP
    with torch.random.fork_rng(devices=[]):  # a new network draws weights that nothing needs
        if config.model.teacher is None:
            network, said = student.like(), f"{config.model.checkpoint} as it is"
            digest = weights_digest(unadapted(student))
        else:
            weights = read_weights(config.model.teacher)
            kind, max_depth_m = _unsaid(weights, config)
            network, report = model_of(weights, kind=kind, max_depth_m=max_depth_m)
            said, digest = str(report), weights_digest(network.state_dict())
    teacher = Teacher(network, config, student, share=share, digest=digest)
    network.to(accelerator.device)
    accelerator.print(f"teacher: {said}")
    return teacher


def bare_network(config: TrainConfig, student: DepthNetwork) -> DepthNetwork | None:
    """A network like the teacher's with fresh weights, for ``Teacher`` where only size counts.

    None without a teacher. The weights of another teacher are read once, for their size.
    """
    if not config.loss.teacher:
        return None
    if config.model.teacher is None:
        return student.like()
    with torch.device("cpu"):
        name, encoder, said = _facts(config.model.teacher)
    return make_network(name, encoder, kind=said or config.model.kind)


@cache
def _facts(source: str) -> tuple[str, str, Kind | None]:
    """Network, encoder and kind of weights, the kind if they say it."""
    weights = read_weights(source)
    if weights.encoder is None:
        model_of(weights)  # says what is wrong
    return weights.network, str(weights.encoder), cast(Kind, (weights.metadata or {}).get("kind"))


def _unsaid(weights: WeightFile, config: TrainConfig) -> tuple[Kind | None, float | None]:
    """Kind and maximum depth for a teacher's file that does not say them: the student's."""
    said = weights.metadata or {}
    takes = config.model.kind in NETWORKS[weights.network].kinds
    kind = config.model.kind if "kind" not in said and takes else None
    is_metric = said.get("kind", kind) == "metric"
    return kind, config.model.max_depth_m if is_metric and "max_depth_m" not in said else None


def teacher_terms(teacher: Kind, student: Kind, config: LossConfig, source: str) -> LossConfig:
    """The loss that compares a student with a teacher: that of the training, as far as it can be.

    Relative weights say nothing about metres. What of the training's terms compares the shape of
    inverse depth remains then, or else ``affine`` takes their place.

    Raises:
        UserError: what the teacher leaves open cannot be left open in the student: depth up to
            scale and shift has no inverse, and inverse depth up to scale and shift none either.
    """
    if teacher != student and (teacher == "affine" or (teacher, student) == ("relative", "affine")):
        what = "depth" if teacher == "affine" else "inverse depth"
        raise UserError(
            f"model.teacher: {source} predicts {what} up to scale and shift, which a model of kind "
            f"{student} cannot be compared with; take metric weights or ones of kind {student}"
        )
    if teacher == "relative" and student == "metric":
        shapes = {name: f for name, f in config.terms.items() if LOSSES[name] == "shape"}
        return replace(config, terms=shapes or {"affine": 1.0})
    return config


def as_truth(
    kind: Kind, prediction: Float[Tensor, "b 1 h w"], range_m: tuple[float, float | Tensor]
) -> tuple[Float[Tensor, "b 1 h w"], Bool[Tensor, "b 1 h w"]]:
    """A teacher's prediction as the truth of a loss, and where it is one.

    ``metric``: metres within ``range_m``, whose end may be one per image, as truth itself is.
    ``relative``: the inverse, where it is above 0 (0 is sky). ``affine``: brought to 1 to 2 over
    each image, which a loss that leaves scale and shift open does not see, because only depth above
    0 has the inverse that losses take.
    """
    known = prediction.isfinite()
    if kind == "affine":
        low = prediction.where(known, torch.inf).amin((1, 2, 3), keepdim=True)
        high = prediction.where(known, -torch.inf).amax((1, 2, 3), keepdim=True)
        return 1 + (prediction - low) / (high - low).clamp(min=1e-12), known
    if kind == "relative":
        known = known & (prediction > 0)
        return torch.where(known, prediction, 1.0).reciprocal(), known
    near, far = range_m
    return prediction, known & (prediction >= near) & (prediction <= far)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


@torch.no_grad()
def _fill(
    network: DepthNetwork,
    state: Mapping[str, Tensor],
    *,
    share: bool,
    half: torch.dtype | None,
) -> None:
    """Give a network frozen weights: those of ``state`` that do not train themselves, or copies.

    Args:
        half: of the copies of what autocast would cast; None keeps their type.
    """
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        casts = half is not None and type(module) in CAST and network.computes_in_half(path)
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            weight = state[prefix + name]
            if not share or weight.requires_grad:
                dtype = half if casts else weight.dtype
                weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
            setattr(module, name, weight)
    for name, buffer in network.named_buffers():
        if name in state:
            buffer.copy_(state[name])
