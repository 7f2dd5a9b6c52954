"""A network by its name."""

from importlib import import_module

from flatdepth.config import NETWORKS
from flatdepth.errors import UserError
from flatdepth.models.network import Checkpointing, DepthNetwork, Kind

CLASSES = {
    "depth_anything_v2": ("depth_anything", "DepthAnythingV2"),
    "depth_anything_3": ("depth_anything_3", "DepthAnything3"),
    "efficientnet": ("efficientnet", "EfficientNetDepth"),
    "midas_v21": ("midas", "MidasV21"),
    "resnet50": ("resnet", "ResNetDepth"),
    "dpt": ("dpt", "DPT"),
    "zoedepth": ("zoedepth", "ZoeDepth"),
    "marigold": ("marigold", "Marigold"),
    "depth_anything_v2_port": ("depth_anything_port", "DepthAnythingV2Port"),
}
"""Name -> module in ``flatdepth.models`` and class; imported only when asked for, because some need
packages that take seconds to import."""


def network_class(name: str) -> type[DepthNetwork]:
    """The class of a network.

    Raises:
        UserError: the name is unknown, or a package that it needs is not installed.
    """
    if name not in CLASSES:
        raise UserError(f"model.name: expected one of {', '.join(NETWORKS)}, found {name!r}")
    module, attribute = CLASSES[name]
    found: type[DepthNetwork] = getattr(import_module(f"flatdepth.models.{module}"), attribute)
    return found


def make_network(
    name: str,
    encoder: str,
    *,
    kind: Kind,
    max_depth_m: float = 20.0,
    canonical_focal_px: float | None = None,
    checkpointing: Checkpointing = "none",
) -> DepthNetwork:
    """A network with random weights.

    Args:
        name: a key of ``CLASSES``.
        encoder: one of its sizes.
        kind, max_depth_m, canonical_focal_px: as in ``DepthNetwork``.
        checkpointing: which activations are recomputed in the backward pass.

    Raises:
        UserError: as for ``network_class`` and ``DepthNetwork``.
    """
    make = network_class(name)
    return make(
        encoder,
        kind=kind,
        max_depth_m=max_depth_m,
        canonical_focal_px=canonical_focal_px,
        checkpointing=checkpointing,
    )
