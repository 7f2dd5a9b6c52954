"""What all depth networks have in common, whatever their encoder."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatdepth.config import MAX_DEPTH_M
from flatdepth.errors import UserError, expect_within

PATCH = 14
"""Both sides of an image are multiples of it."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Kind = Literal["metric", "relative"]
Checkpointing = Literal["none", "encoder", "encoder+head"]

UNUSED = (
    "pretrained.mask_token",
    "depth_head.scratch.refinenet4.resConfUnit1.conv1.weight",
    "depth_head.scratch.refinenet4.resConfUnit1.conv1.bias",
    "depth_head.scratch.refinenet4.resConfUnit1.conv2.weight",
    "depth_head.scratch.refinenet4.resConfUnit1.conv2.bias",
)
"""Tensors of the official checkpoints that no forward pass reads, so they never get a gradient."""


class DepthNetwork(nn.Module):
    """An encoder ``pretrained`` and a ``depth_head`` that predict one value per pixel.

    Args:
        encoder: a key of ``sizes``.
        kind: ``"metric"`` predicts planar z in metres, ``"relative"`` inverse depth up to an
            unknown scale and shift. Both have the same tensors.
        max_depth_m: the metric prediction is ``max_depth_m * sigmoid(logit)``; it belongs to the
            weights (20 for the official indoor files, 80 for outdoor). Unused when relative.
        checkpointing: which activations are recomputed in the backward pass instead of kept: those
            inside each of the encoder's ``blocks``, and those of the head's five parts too.

    Raises:
        UserError: the encoder's name is unknown or ``max_depth_m`` is not positive.
    """

    image_mean: Tensor
    image_std: Tensor
    sizes: ClassVar[Mapping[str, Any]]
    """The numbers of every encoder of this architecture."""
    stem: ClassVar[tuple[str, ...]]
    """Names of the encoder's tensors before its blocks, or what they begin with."""

    def __init__(
        self,
        encoder: str,
        *,
        kind: Kind,
        max_depth_m: float = 20.0,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        if encoder not in self.sizes:
            raise UserError(f"encoder: expected one of {', '.join(self.sizes)}, found {encoder!r}")
        expect_within("max_depth_m", max_depth_m, *MAX_DEPTH_M)
        self.encoder = encoder
        self.kind: Kind = kind
        self.max_depth_m = float(max_depth_m)
        self.pretrained, self.depth_head = self.parts(
            self.sizes[encoder], checkpointing != "none", checkpointing == "encoder+head"
        )
        if kind == "relative":
            # A ReLU that starts at 0 or below passes no gradient.
            nn.init.ones_(self.get_parameter("depth_head.scratch.output_conv2.2.bias"))
        # Not persistent: the official checkpoints do not hold them.
        for name, value in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        freeze(self, "none")

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks, from the input on."""
        return cast(nn.ModuleList, self.pretrained.blocks)

    @property
    def units(self) -> Literal["m", "1/depth"]:
        """What a prediction is: metres, or inverse depth up to scale and shift."""
        return "m" if self.kind == "metric" else "1/depth"

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Predict one value per pixel, at the pixels' own centres.

        Args:
            image: sRGB in 0..1, h and w multiples of 14; ImageNet normalisation happens here.

        Returns:
            float32 whatever autocast does: metres in (0, max_depth_m), or inverse depth >= 0.

        Raises:
            ValueError: h or w is not a positive multiple of 14.
        """
        height, width = image.shape[-2:]
        if not height or not width or height % PATCH or width % PATCH:
            raise ValueError(f"image is {height}x{width}; both sides must be multiples of {PATCH}")
        # In half precision a sigmoid is exactly 0 below a logit of -18, and its logarithm -inf.
        logits = self.logits((image.float() - self.image_mean) / self.image_std).float()
        return logits.sigmoid() * self.max_depth_m if self.kind == "metric" else logits.relu()

    @staticmethod
    def parts(spec: Any, encoder: bool, head: bool) -> tuple[nn.Module, nn.Module]:
        """The encoder and the head of the given numbers, and whether each recomputes."""
        raise NotImplementedError

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """What the head says of a normalised image, before it becomes depth."""
        raise NotImplementedError


def freeze(
    model: DepthNetwork, what: Literal["none", "encoder", "head"], first_blocks: int = 0
) -> None:
    """Set which parameters train; replaces what an earlier call set.

    The tensors that no forward pass reads (``UNUSED``) are always frozen.

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
    prefixes: tuple[str, ...] = ()
    if what != "none":
        prefixes += ({"encoder": "pretrained.", "head": "depth_head."}[what],)
    if first_blocks:
        blocks = tuple(f"blocks.{index}." for index in range(first_blocks))
        prefixes += tuple(f"pretrained.{name}" for name in model.stem + blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in UNUSED and not name.startswith(prefixes))


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
    for part, module, part_lr in (
        ("encoder", model.pretrained, lr),
        ("head", model.depth_head, lr * head_lr_factor),
    ):
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        still = [(name, p) for name, p in trainable if _never_decays(name, p)]
        decaying = [(name, p) for name, p in trainable if not _never_decays(name, p)]
        for suffix, members, decay in (("", decaying, weight_decay), (" no decay", still, 0.0)):
            if members:
                params = [p for _, p in members]
                group = {"name": part + suffix, "params": params, "lr": part_lr}
                groups.append({**group, "weight_decay": decay})
    return groups


def _never_decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1 or name in ("cls_token", "pos_embed")


def call(function: Callable[..., Tensor], *args: object, recompute: bool) -> Tensor:
    """Call ``function``, recomputing its activations in the backward pass if asked."""
    if recompute:
        # Nothing in the model draws random numbers, so no generator state has to be kept.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
