"""What all depth networks have in common, whatever system of the field they are.

A network says what it predicts (``kind``), which sides it takes (``multiple``), how its input is
normalised and which of its parameters are its encoder; the rest of flatdepth asks for no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatdepth.config import MAX_DEPTH_M, NETWORKS, expect_canonical_focal, nearest_multiple
from flatdepth.errors import UserError, expect_within
from flatdepth.models.calibration import Calibration

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Kind = Literal["metric", "relative", "affine"]
"""``metric``: planar z in metres. ``relative``: inverse depth up to scale and shift. ``affine``:
planar z up to scale and shift."""

Units = Literal["m", "1/depth", "depth"]
UNITS: Mapping[Kind, Units] = {"metric": "m", "relative": "1/depth", "affine": "depth"}

Checkpointing = Literal["none", "encoder", "encoder+head"]

UNUSED = (
    "pretrained.mask_token",
    "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight",
    "depth_head.scratch.refinenet4.resConfUnit1.conv1.bias",
    "depth_head.scratch.refinenet4.resConfUnit1.conv2.weight",
    "depth_head.scratch.refinenet4.resConfUnit1.conv2.bias",
)
"""Tensors of Depth Anything's checkpoints that no forward pass reads, so they get no gradient."""


DEFAULT_SIDE = 518


@dataclass(frozen=True, slots=True)
class Supervision:
    """What a network's own loss is told of a micro-batch.

    Attributes:
        depth_m: (b, 1, h, w) planar z in metres.
        weight: (b, 1, h, w) of every pixel, 0 where there is no truth.
        seeds: per image an integer that all its random numbers follow from.
    """

    depth_m: Tensor
    weight: Tensor
    seeds: tuple[int, ...]


class Reach:
    """How far what predicts metres does.

    Attributes:
        max_depth_m: its largest depth, at the canonical focal length if there is one.
        canonical_focal_px: at which its metres are true; None if they hang on no focal length.
        calibration: what is made of its depth, or None.
    """

    max_depth_m: float
    canonical_focal_px: float | None
    calibration: Calibration | None

    @property
    def needs_focal(self) -> bool:
        """Whether a prediction in metres depends on the focal length."""
        return self.canonical_focal_px is not None

    def reach_m(self, focal_px: float) -> float:
        """What ``max_depth_m`` is in metres, in an image of that focal length in its own pixels."""
        far_m = self.max_depth_m
        if self.canonical_focal_px is not None:
            far_m *= focal_px / self.canonical_focal_px
        if self.calibration is not None:
            far_m = float(self.calibration.correction(torch.tensor(far_m)))
        return far_m


class DepthNetwork(Reach, nn.Module):
    """A network that predicts one value per pixel.

    A subclass gives the attributes below, ``build`` (or ``parts``), ``logits`` and, where it is not
    one of the two that all logits have, ``decode``. Its entry in ``config.NETWORKS`` says which
    sizes and kinds there are.

    Args:
        encoder: a key of ``sizes``.
        kind: what is predicted, one of the network's kinds.
        max_depth_m: the metric prediction of a logit is ``max_depth_m * sigmoid(logit)``; it
            belongs to the weights (20 for the official indoor files of Depth Anything V2, 80 for
            outdoor). Unused when not metric, or not ``bounded``. Where metres depend on the focal
            length it is canonical depth, as ``decode`` gives it.
        canonical_focal_px: the focal length in pixels of the input at which ``decode`` gives metres
            (``forward``); None is that of ``config.NETWORKS``, of most networks none.
        checkpointing: which activations are recomputed in the backward pass instead of kept: those
            inside each of the encoder's ``blocks``, and those of the head's parts too.

    Raises:
        UserError: the encoder's name is unknown, the network does not predict that kind,
            ``max_depth_m`` is not positive, or a canonical focal length does not go with the kind
            or is not the one that the network has.
    """

    image_mean: Tensor
    image_std: Tensor
    name: ClassVar[str]
    """Its key in ``config.NETWORKS``."""
    title: ClassVar[str]
    """What it is called."""
    architecture: ClassVar[str]
    """The same for a model card."""
    probed: ClassVar[bool] = False
    """Whether ``models.probe`` can tell its kinds apart by the signs of logits."""
    sizes: ClassVar[Mapping[str, Any]]
    """The numbers of every encoder of this architecture."""
    encoder_prefix: str = "pretrained."
    """What the names of the encoder's parameters begin with; all others are the head's."""
    head_prefix: ClassVar[tuple[str, ...]] = ("depth_head.",)
    """What the names of the head's begin with; empty where there is none to train anew."""
    block_prefix: str = "blocks."
    """Then that of its blocks, before their number."""
    stem: tuple[str, ...]
    """Names of the encoder's tensors before its blocks, or what they begin with."""
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")
    """Last parts of the names of embeddings, which have no weight decay."""
    unused: ClassVar[tuple[str, ...]] = UNUSED
    """Parameters that no forward pass reads, or that never train."""
    output_bias: ClassVar[str] = "depth_head.scratch.output_conv2.2.bias"
    """The bias of the logits."""
    adapted: ClassVar[str] = ""
    """Regular expression for the names of the encoder's linear layers that take adapters."""
    layout: ClassVar[Literal["diffusers"] | None] = None
    """The library whose folders ``write_layout`` writes, if any."""
    mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGENET_STD
    trained_px: tuple[int, int] | None = None
    """Rows and columns of the input that its weights were trained on, if they say it."""
    calibration: Calibration | None = None
    """What predictions in metres go through in evaluation mode, if anything."""
    bounded: bool = True
    """Whether metric weights mean nothing without ``max_depth_m``; if not, it limits the truth."""
    reads_files_of: ClassVar[tuple[str, ...]] = ()
    """Networks whose files this one reads too, but only if it is asked for by name."""

    def __init__(
        self,
        encoder: str,
        *,
        kind: Kind,
        max_depth_m: float = 20.0,
        canonical_focal_px: float | None = None,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        if encoder not in self.sizes:
            raise UserError(
                f"model.encoder: expected one of {', '.join(self.sizes)} for {self.name}, found "
                f"{encoder!r}"
            )
        if kind not in NETWORKS[self.name].kinds:
            raise UserError(
                f"model.kind: {self.name} predicts {' or '.join(NETWORKS[self.name].kinds)} depth, "
                f"found {kind!r}"
            )
        expect_within("max_depth_m", max_depth_m, *MAX_DEPTH_M)
        self.encoder = encoder
        self.kind: Kind = kind
        self.max_depth_m = float(max_depth_m)
        own_px = NETWORKS[self.name].canonical_focal_px if kind == "metric" else None
        if canonical_focal_px is not None and canonical_focal_px != own_px:
            expect_canonical_focal(self.name, kind, canonical_focal_px)
        self.canonical_focal_px = own_px if canonical_focal_px is None else canonical_focal_px
        self.build(self.sizes[encoder], checkpointing != "none", checkpointing == "encoder+head")
        if kind == "relative":
            # A ReLU that starts at 0 or below passes no gradient.
            nn.init.ones_(self.get_parameter(self.output_bias))
        # Not persistent: the official checkpoints do not hold them.
        for name, value in (("image_mean", self.mean), ("image_std", self.std)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        freeze(self, "none")

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks, from the input on."""
        return cast(
            nn.ModuleList, self.get_submodule((self.encoder_prefix + self.block_prefix).rstrip("."))
        )

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        """What the names of each block's parameters begin with."""
        start = self.encoder_prefix + self.block_prefix
        return tuple(f"{start}{index}." for index in range(len(self.blocks)))

    @property
    def multiple(self) -> int:
        """Both sides of an image are multiples of it."""
        return NETWORKS[self.name].multiple

    @property
    def units(self) -> Units:
        """What a prediction is: metres, inverse depth or depth up to scale and shift."""
        return UNITS[self.kind]

    def like(self) -> "DepthNetwork":
        """A network of the same kind and size with weights of its own."""
        other = type(self)(
            self.encoder,
            kind=self.kind,
            max_depth_m=self.max_depth_m,
            canonical_focal_px=self.canonical_focal_px,
        )
        other.trained_px = self.trained_px
        other.calibration = self.calibration
        other.adopt(self.said())
        return other

    @property
    def side(self) -> int:
        """The shorter side of its input in pixels: as in its training, else the one nearest 518."""
        size = DEFAULT_SIDE if self.trained_px is None else min(self.trained_px)
        return nearest_multiple(size, self.multiple)

    def computes_in_half(self, module: str) -> bool:  # noqa: ARG002
        """Whether autocast may compute the module of this name in half precision."""
        return True

    def is_encoder(self, parameter: str) -> bool:
        """Whether a parameter of this name is the encoder's."""
        return parameter.startswith(self.encoder_prefix)

    def forward(
        self,
        image: Float[Tensor, "b 3 h w"],
        focal_px: Float[Tensor, " b"] | None = None,
        truth: Supervision | None = None,
    ) -> Float[Tensor, "b 1 h w"] | Float[Tensor, " b"]:
        """Predict one value per pixel, at the pixels' own centres.

        With a canonical focal length f_c the metres of an image of focal length f are those of
        ``decode`` times f / f_c (Yin et al. 2023, "Metric3D", section 3.2, the canonical camera
        transform of labels): of a thing that is as large in pixels a longer lens is farther away.
        In evaluation mode metres then go through the ``calibration``.

        Args:
            image: sRGB in 0..1, h and w multiples of ``multiple``; normalisation happens here.
            focal_px: focal lengths in pixels of ``image``; only where ``needs_focal``.
            truth: asks for the network's own loss in place of a prediction. It is an argument, so
                that the call goes through whatever wraps the module.

        Returns:
            float32 whatever autocast does: metres above 0, inverse depth >= 0, or depth up to scale
            and shift; with ``truth`` the loss of every image, as of ``training.losses``.

        Raises:
            ValueError: h or w is not a positive multiple, or there is no focal length that is
                needed.
        """
        height, width = image.shape[-2:]
        if not height or not width or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"image is {height}x{width}; both sides must be multiples of {self.multiple}"
            )
        normalised = (image.float() - self.image_mean) / self.image_std
        if truth is not None:
            return self.own_loss(normalised, truth)
        # In half precision a sigmoid is exactly 0 below a logit of -18, and its logarithm -inf.
        depth = self.decode(self.logits(normalised).float())
        if self.canonical_focal_px is not None:
            if focal_px is None:
                raise ValueError(f"{self.name} predicts metres only with a focal length")
            depth = depth * (focal_px.to(depth) / self.canonical_focal_px)[:, None, None, None]
        if self.training or self.calibration is None:
            return depth
        return self.calibration.correction(depth)

    def build(self, spec: Any, encoder: bool, head: bool) -> None:
        """Make the modules of the given numbers; both flags say what recomputes."""
        self.pretrained, self.depth_head = self.parts(spec, encoder, head)

    @staticmethod
    def parts(spec: Any, encoder: bool, head: bool) -> tuple[nn.Module, nn.Module]:
        """The encoder and the head of the given numbers, and whether each recomputes."""
        raise NotImplementedError

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b _ h w"]:
        """What the head says of a normalised image, before ``decode`` makes depth of it."""
        raise NotImplementedError

    def own_loss(self, image: Float[Tensor, "b 3 h w"], truth: Supervision) -> Float[Tensor, " b"]:
        """The network's own loss of every normalised image, named in ``config.NETWORKS``."""
        raise NotImplementedError

    def said(self) -> dict[str, str]:
        """What a file has to say of the network besides size, kind and tensors, for ``adopt``."""
        return {}

    def adopt(self, said: Mapping[str, str]) -> None:
        """Take over what a file says of itself, as ``said`` gives it; what it leaves out stays.

        Raises:
            UserError: it says what cannot be; the network is unchanged then.
        """

    def begin_training(self, own_loss: bool) -> None:
        """Told before a training whether it is by the network's own loss; changes no weight."""

    def write_layout(self, folder: Path) -> None:
        """Write the weights into a new folder as the library ``layout`` reads them.

        Raises:
            UserError: the library cannot express the network.
        """
        raise NotImplementedError

    @classmethod
    def named(cls, stem: str) -> Mapping[str, str] | None:
        """What the name of a file, without suffix, says where it is one of the published files'.

        Of ``encoder``, ``kind`` and ``max_depth_m``; None for other names.
        """

    @classmethod
    def configured(cls, config: Mapping[str, object], source: str) -> Mapping[str, str] | None:
        """The same as a ``config.json`` beside the weights says it; None for another network's.

        Args:
            config: the content; of a pipeline of diffusers that of its ``model_index.json``.
            source: the file it describes; of a pipeline ``model_index.json`` itself.

        Raises:
            UserError: it is, but says what cannot be.
        """

    @classmethod
    def assembled(cls, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
        """What ``renamed`` gives, of the folder of a pipeline that ``configured`` knows."""
        raise NotImplementedError

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        """A file's tensors by the names in ``state_dict``, and what was done to them, in words.

        None if they are not this network's in any layout that it knows. Names that it does not have
        are kept, for the caller to complain about. Packages that take long to import may not be
        needed for None.
        """

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        """The key of ``sizes`` that tensors by the names in ``state_dict`` have, or None."""

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        """The hub's identifier of what weights derived from the published ones are licensed by, and
        a sentence that says why; None where nothing of that size is published."""

    def published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict by the names that files have."""
        return state

    def hub_config(self) -> Mapping[str, object] | None:
        """``config.json`` of the folder that the original code reads, with ``model.safetensors`` by
        the ``published`` names beside it; None where it reads none."""

    def decode(self, logits: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b 1 h w"]:
        """Logits in float32 as what the kind says, at the canonical focal length if one counts."""
        return logits.sigmoid() * self.max_depth_m if self.kind == "metric" else logits.relu()


def nominal_focal(image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Focal lengths for images without a camera where only time or memory counts: the width."""
    return torch.full((image.shape[0],), float(image.shape[-1]), device=image.device)


def freeze(
    model: DepthNetwork, what: Literal["none", "encoder", "head"], first_blocks: int = 0
) -> None:
    """Set which parameters train; replaces what an earlier call set.

    The network's ``unused`` are always frozen.

    Args:
        what: the part to freeze.
        first_blocks: freezes the encoder's stem (of a transformer the patch and position embedding
            and the class token) and that many blocks as well; 0 freezes none of them.

    Raises:
        UserError: ``first_blocks`` is negative or more than the encoder has.
    """
    depth = len(model.blocks)
    if not 0 <= first_blocks <= depth:
        raise UserError(
            f"model.frozen_blocks: expected 0 to {depth} for {model.encoder}, found {first_blocks}"
        )
    first: tuple[str, ...] = ()
    if first_blocks:
        stem = tuple(model.encoder_prefix + name for name in model.stem)
        first = stem + model.block_prefixes[:first_blocks]
    for name, parameter in model.named_parameters():
        part = "encoder" if model.is_encoder(name) else "head"
        frozen = part == what or name.startswith((*first, *model.unused))
        parameter.requires_grad_(not frozen)


def parameter_groups(
    model: DepthNetwork, lr: float, head_lr_factor: float, weight_decay: float
) -> list[dict[str, object]]:
    """The trainable parameters as groups for AdamW, in a fixed order.

    The head learns at ``lr * head_lr_factor``. Biases, norms, layer scales, the position embedding
    and the class token do not decay.

    Returns:
        One dict per non-empty group with ``name``, ``params``, ``lr`` and ``weight_decay``.
    """
    groups: list[dict[str, object]] = []
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for part, part_lr in (("encoder", lr), ("head", lr * head_lr_factor)):
        own = [(name, p) for name, p in trainable if model.is_encoder(name) == (part == "encoder")]
        decaying: list[nn.Parameter] = []
        still: list[nn.Parameter] = []
        for name, p in own:
            is_still = p.ndim == 1 or name.split(".")[-1] in model.undecayed
            (still if is_still else decaying).append(p)
        for suffix, members, decay in (("", decaying, weight_decay), (" no decay", still, 0.0)):
            if members:
                group = {"name": part + suffix, "params": members, "lr": part_lr}
                groups.append({**group, "weight_decay": decay})
    return groups


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, taken: Sequence[int], *, recompute: bool
) -> list[Tensor]:
    """The outputs of the blocks with the numbers ``taken``, run one after another from ``x``."""
    found = []
    for index, block in enumerate(blocks):
        x = call(block, x, recompute=recompute)
        if index in taken:
            found.append(x)
    return found


def call(function: Callable[..., Tensor], *args: object, recompute: bool) -> Tensor:
    """Call ``function``, recomputing its activations in the backward pass if asked."""
    if recompute:
        # Nothing in the model draws random numbers, so no generator state has to be kept.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
