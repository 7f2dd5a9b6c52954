"""Networks of Hugging Face transformers, wrapped: their modules, their files, nothing of them anew.

A family is a class ``...ForDepthEstimation`` of transformers and the configuration of every
published size. Three settings differ from what a ``config.json`` may say, because they are wrong
for training or for the published weights: no dropout and no stochastic depth, and layer norms of
ViT and BEiT with the epsilon 1e-6 that the networks were trained with (transformers: 1e-12).

Names: a file holds tensors by the names that ``save_pretrained`` writes, which stay the same from
version to version; those of the live modules do not (BEiT and DINOv2 in transformers 5.23), so
``renamed`` and ``published`` translate by transformers' own table.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cache
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from flatdepth.errors import UserError, import_extra
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.networks import network_class

PORT = "port."
"""What the names of all parameters begin with."""

UNREAD = "neck.fusion_stage.layers.0.residual_layer1."
"""Of the deepest fusion, which has no coarser path to add; no forward pass reads it."""

_ALIKE = 0.9
"""Share of a size's tensors whose shapes a file must have to be of that size."""

_CONSTANTS = re.compile(
    r"\.(?:relative_position_index|relative_coords_table|attn_mask|k_idx|[kK]_minus_1)$"
)
"""Buffers that older files hold and that are computed now."""

_FREE = {"drop_path_rate", "layer_norm_eps", "initializer_range", "bin_configurations"}
"""Settings in which a ``config.json`` may differ from a size."""


class TransformersNetwork(DepthNetwork):
    """A network that transformers has; ``DepthNetwork`` has its arguments.

    A subclass names the class and gives ``sizes``: the arguments of its configuration, by size.
    """

    port_class: ClassVar[str]
    """The class in transformers."""
    model_type: ClassVar[str]
    """What ``config.json`` calls it."""
    port_kind: ClassVar[Kind]
    """What it predicts there."""
    recomputed: ClassVar[str] = r"neck\.fusion_stage\.layers\.\d|head"
    """Modules, as a pattern of their whole names, that recompute with ``encoder+head``."""
    exact: ClassVar[str]
    """Modules that compute in float32 whatever autocast does: half precision would round what they
    return to steps that show in depth."""
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    head_prefix: ClassVar[tuple[str, ...]] = (f"{PORT}neck.", f"{PORT}head.")
    undecayed = ("cls_token", "position_embeddings", "relative_position_bias_table", "logit_scale")
    unused: ClassVar[tuple[str, ...]] = (PORT + UNREAD,)

    def build(self, spec: Mapping[str, Any], encoder: bool, head: bool) -> None:
        self.port = self.make_port(spec, self.max_depth_m)
        modules = dict(self.port.named_modules())
        # The encoder comes first, and its blocks are its first list outside of the embeddings.
        lists = (name for name, module in modules.items() if isinstance(module, nn.ModuleList))
        blocks = next(name for name in lists if "embeddings" not in name)
        stem = next(name for name in modules if name.endswith("embeddings"))
        prefix = blocks.split(".")[0] + "."
        self.encoder_prefix = PORT + prefix
        self.block_prefix = blocks.removeprefix(prefix) + "."
        self.stem = (stem.removeprefix(prefix) + ".",)
        for module in modules.values():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if encoder:
            newer = "activation_checkpointing_enable"  # transformers 6 has no other
            switch = getattr(self.port, newer, None) or self.port.gradient_checkpointing_enable
            switch({"use_reentrant": False, "preserve_rng_state": False})
        for name, module in modules.items():
            if re.fullmatch(self.exact, name):
                _compute_in_float32(module)
            if head and re.fullmatch(self.recomputed, name):
                _recompute(module)
        self._position_index: dict[tuple[int, int], Tensor] = {}
        _share_position_index(modules.values(), self._position_index)

    @property
    def side(self) -> int:
        """The shorter side of its input in pixels: as in its training, else the published one."""
        if self.trained_px is not None:
            return super().side
        config = self.port.config
        return int(getattr(config.backbone_config, "image_size", None) or config.image_size)

    def computes_in_half(self, module: str) -> bool:
        return re.match(rf"{re.escape(PORT)}(?:{self.exact})(?:\.|$)", module) is None

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        self._position_index.clear()
        return self.predicted(image)[:, None]

    def predicted(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b h w"]:
        """What the port says of a normalised image."""
        return self.port(pixel_values=image).predicted_depth

    def port_config(self) -> dict[str, object]:
        """What ``config.json`` says of the model."""
        said = json.loads(self.port.config.to_json_string())
        return {**said, "architectures": [self.port_class]}

    @classmethod
    def make_port(cls, spec: Mapping[str, Any], max_depth_m: float) -> Any:
        """The port of a size with random weights.

        Args:
            spec: a value of ``sizes``.
            max_depth_m: for networks whose modules know it.

        Raises:
            UserError: transformers is not installed.
        """
        del max_depth_m
        transformers = import_extra("transformers", f"model.name {cls.name}", "compare")
        port = getattr(transformers, cls.port_class)
        return port(port.config_class(**deepcopy(dict(spec))))

    @classmethod
    def configured(cls, config: Mapping[str, object], source: str) -> Mapping[str, str] | None:
        if config.get("model_type") != cls.model_type:
            return None
        made_for = config.get("architectures")
        if isinstance(made_for, list) and cls.port_class not in made_for:
            raise UserError(
                f"{source}: expected in config.json a {cls.port_class}, found "
                f"{', '.join(map(str, made_for))}; take weights that predict depth"
            )
        sizes = [name for name, spec in cls.sizes.items() if _agree(spec, config)]
        if not sizes:
            raise UserError(
                f"{source}: expected in config.json a {cls.title} of one of the sizes "
                f"{', '.join(cls.sizes)}, found other numbers; take published weights or what was "
                "trained from them"
            )
        said = cls.meaning(config)
        # Nothing is said where the numbers leave it open: the tensors know.
        return {"encoder": sizes[0], **said} if len(sizes) == 1 else said

    @classmethod
    def meaning(cls, config: Mapping[str, Any]) -> dict[str, str]:
        """Kind and maximum depth by a ``config.json`` of the family."""
        raise NotImplementedError

    @classmethod
    def as_in_files(
        cls, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], list[str]] | None:
        """Tensors by the names of transformers' files, and what was done; None if not of these."""
        raise NotImplementedError

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        found = cls.as_in_files(tensors)
        if found is None:
            return None
        tensors, notes = found
        kept = {name: t for name, t in tensors.items() if not _CONSTANTS.search(f".{name}")}
        if left := len(tensors) - len(kept):
            notes = [*notes, f"left {left} tensors that are computed"]
        size = cls.size_of(kept)
        names = {} if size is None else _file_names(cls.name, size)
        live = {file: own for own, file in names.items()}
        return {PORT + live.get(name, name): t for name, t in kept.items()}, notes

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        """By the shapes of all tensors, whatever their names."""
        found = Counter(tuple(tensor.shape) for tensor in tensors.values())
        wanted = {size: _shapes(cls.name, size) for size in cls.sizes}
        best = max(wanted, key=lambda size: (found & wanted[size]).total())
        alike = (found & wanted[best]).total() >= _ALIKE * wanted[best].total()
        return best if alike else None

    def published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        names = _file_names(self.name, self.encoder)
        return {names[name.removeprefix(PORT)]: tensor for name, tensor in state.items()}


def _agree(spec: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` contradicts none of the numbers of a size."""
    for key, own in spec.items():
        if key in _FREE or key not in config:
            continue
        said = config[key]
        if isinstance(own, Mapping):
            if not (isinstance(said, Mapping) and _agree(own, said)):
                return False
        elif said != own:
            return False
    return True


@cache
def _meta_port(network: str, size: str) -> Any:
    """The port of a size without memory."""
    wrapped = cast(type[TransformersNetwork], network_class(network))
    with torch.device("meta"):
        return wrapped.make_port(wrapped.sizes[size], 1.0)


@cache
def _shapes(network: str, size: str) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(tensor.shape) for tensor in _meta_port(network, size).state_dict().values()
    )


@cache
def _file_names(network: str, size: str) -> Mapping[str, str]:
    """Name of a live tensor -> its name in files, as ``save_pretrained`` has it."""
    from transformers.core_model_loading import revert_weight_conversion

    port = _meta_port(network, size)
    live = list(port.state_dict())
    # A number in the place of each tensor shows where it went.
    numbers = {name: torch.tensor(number, device="cpu") for number, name in enumerate(live)}
    return {live[int(n)]: name for name, n in revert_weight_conversion(port, numbers).items()}


def _compute_in_float32(module: nn.Module) -> None:
    forward = module.forward

    def exact(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            args, kwargs = tree_map(_widened, (args, kwargs))
            return forward(*args, **kwargs)

    module.forward = exact


def _widened(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if is_half else value


def _recompute(module: nn.Module) -> None:
    forward: Callable[..., Any] = module.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    module.forward = recomputed


def _share_position_index(
    modules: Iterable[nn.Module], shared: dict[tuple[int, int], Tensor]
) -> None:
    """Let the blocks of BEiT take the index of their position bias from ``shared``.

    transformers keeps it for the life of the process and on the CPU, so every block copies it to
    the GPU, and a simulated forward pass (``training.memory``) would leave a tensor without content
    for the next real one. Here it is made once per forward pass.
    """
    name = "generate_relative_position_index"
    for module in modules:
        found = inspect.getattr_static(type(module), name, None)
        if not isinstance(found, staticmethod):
            continue
        make = inspect.unwrap(found.__func__)

        def index(
            window: tuple[int, int], make: Callable[..., Tensor] = make, module: nn.Module = module
        ) -> Tensor:
            if window not in shared:
                shared[window] = make(window).to(next(module.parameters()).device)
            return shared[window]

        setattr(module, name, index)
