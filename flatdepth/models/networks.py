"""A network by the name of its encoder."""

from flatdepth.models import efficientnet
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.efficientnet import EfficientNetDepth
from flatdepth.models.network import Checkpointing, DepthNetwork, Kind


def make_network(
    encoder: str, *, kind: Kind, max_depth_m: float = 20.0, checkpointing: Checkpointing = "none"
) -> DepthNetwork:
    """A network with random weights.

    Args:
        encoder: a key of the ``ENCODERS`` of ``depth_anything`` or ``efficientnet``.
        kind, max_depth_m: as in ``DepthNetwork``.
        checkpointing: which activations are recomputed in the backward pass.

    Raises:
        UserError: the encoder's name is unknown or ``max_depth_m`` is not positive.
    """
    make = EfficientNetDepth if encoder in efficientnet.ENCODERS else DepthAnythingV2
    return make(encoder, kind=kind, max_depth_m=max_depth_m, checkpointing=checkpointing)
