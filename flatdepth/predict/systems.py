"""The depth systems of the field, opened by name, each on the input it was made for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from flatdepth.config import LEAST_SIDE, MAX_DEPTH_M, MOST_SIDE, NETWORKS, nearest_multiple
from flatdepth.errors import UserError, expect_within
from flatdepth.judge.protocol import align, describe_alignment, own_alignment
from flatdepth.models.checkpoint import open_model
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.networks import make_network
from flatdepth.models.preprocessing import Preprocessing, preprocessing
from flatdepth.predict.outputs import QUANTITIES
from flatdepth.predict.predictor import predict_tiled

RANDOM = "random"
"""In place of weights: none at all, with ``random:SIZE`` of that size."""

_TILES_AT_ONCE = 4
RANGE_M = (1e-3, MAX_DEPTH_M[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """A published system.

    Attributes:
        network: its key in ``config.NETWORKS``.
        kind: what it predicts.
        preprocessing: its key in ``models.preprocessing.PREPROCESSING``.
        weights: hub id; None where there is only a file to download.
        size: of its input, where it is not that of its preprocessing.
        licence: of the published weights.
        note: what else to know of it.
    """

    network: str
    kind: Kind
    preprocessing: str
    weights: str | None = None
    size: int | None = None
    licence: str
    note: str = ""


_DAV2 = SystemFacts(
    network="depth_anything_v2",
    kind="relative",
    preprocessing="depth_anything_v2",
    licence="Apache-2.0",
)
_UNSTATED = "not stated; its base is Apache-2.0"
_HUB = "depth-anything/Depth-Anything-V2"
_DA3 = SystemFacts(
    network="depth_anything_3",
    kind="affine",
    preprocessing="depth_anything_3",
    licence="Apache-2.0",
)
_DPT = SystemFacts(network="dpt", kind="relative", preprocessing="dpt", licence="MIT")
_CARD = "see its card"
_MARIGOLD = SystemFacts(
    network="marigold", kind="affine", preprocessing="marigold", licence="RAIL++-M"
)

SYSTEMS: Mapping[str, SystemFacts] = {
    "depth_anything_v2": replace(_DAV2, weights=f"{_HUB}-Small-hf"),
    "depth_anything_v2_large": replace(_DAV2, weights=f"{_HUB}-Large-hf", licence="CC-BY-NC-4.0"),
    "depth_anything_v2_indoor": replace(
        _DAV2,
        kind="metric",
        weights=f"{_HUB}-Metric-Indoor-Small-hf",
        licence=_UNSTATED,
    ),
    "depth_anything_v2_outdoor": replace(
        _DAV2,
        kind="metric",
        weights=f"{_HUB}-Metric-Outdoor-Small-hf",
        licence=_UNSTATED,
    ),
    "depth_anything_v2_port": replace(
        _DAV2,
        network="depth_anything_v2_port",
        preprocessing="depth_anything_v2_hf",
        weights=f"{_HUB}-Small-hf",
        note="the class of transformers",
    ),
    "da3_mono": replace(_DA3, weights="depth-anything/DA3MONO-LARGE"),
    "da3_metric": replace(
        _DA3,
        kind="metric",
        weights="depth-anything/DA3METRIC-LARGE",
        note="metres hang on the focal length",
    ),
    "midas_v21": SystemFacts(
        network="midas_v21", kind="relative", preprocessing="midas_v21", licence="MIT"
    ),
    "midas_v21_small": SystemFacts(
        network="midas_v21", kind="relative", preprocessing="midas_v21_small", licence="MIT"
    ),
    "dpt_large": replace(_DPT, weights="Intel/dpt-large", licence=_CARD),
    "dpt_hybrid": replace(_DPT, weights="Intel/dpt-hybrid-midas", licence=_CARD),
    "dpt_beit_large_512": replace(_DPT, weights="Intel/dpt-beit-large-512", size=512),
    "dpt_beit_large_384": replace(_DPT, weights="Intel/dpt-beit-large-384"),
    "dpt_swin2_large_384": replace(
        _DPT, weights="Intel/dpt-swinv2-large-384", preprocessing="dpt_square"
    ),
    "dpt_swin2_tiny_256": replace(
        _DPT, weights="Intel/dpt-swinv2-tiny-256", preprocessing="dpt_square", size=256
    ),
    "zoedepth": SystemFacts(
        network="zoedepth",
        kind="metric",
        preprocessing="zoedepth",
        weights="Intel/zoedepth-nyu",
        licence="MIT",
    ),
    "marigold": replace(_MARIGOLD, weights="prs-eth/marigold-depth-v1-1"),
    "marigold_e2e": replace(
        _MARIGOLD,
        weights="GonzaloMG/marigold-e2e-ft-depth",
        licence="not stated",
        note="one step, no noise",
    ),
    "resnet50": SystemFacts(
        network="resnet50", kind="metric", preprocessing="resnet50", licence="of its training"
    ),
}
"""Name in ``--model`` -> what is known of it."""


@runtime_checkable
class Sampler(Protocol):
    """A network that may take several steps and the mean of several predictions."""

    def sample(self, image: Tensor, *, steps: int | None, ensemble: int, seed: int) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How systems predict.

    Attributes:
        size: shorter side of the networks' input, of which each takes its nearest multiple; None:
            each one's own.
        tiles: refine with tiles at the picture's own resolution (``predict_tiled``).
        steps, ensemble, seed: of diffusion; steps None: as the weights say.
    """

    size: int | None = None
    tiles: bool = False
    steps: int | None = None
    ensemble: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size is not None:
            expect_within("--size", self.size, LEAST_SIDE, MOST_SIDE)
        expect_within("--steps", 1 if self.steps is None else self.steps, 1, 1000)
        expect_within("--ensemble", self.ensemble, 1, 100)
        expect_within("--seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSystem:
    """A system that is ready to predict.

    Attributes:
        label: as it was given.
        network: in evaluation mode, on its device; None once it is no longer needed.
        kind: what it predicts.
        preprocessing: of its input.
        weights: where they come from, in words.
        licence: in words.
        note: in words, or "".
        untrained: whether the weights are random.
    """

    label: str
    network: DepthNetwork | None
    kind: Kind
    preprocessing: Preprocessing
    weights: str
    licence: str
    note: str
    untrained: bool

    @property
    def predicts(self) -> str:
        """What a prediction is, in words."""
        return QUANTITIES[self.kind]

    def without_network(self) -> "OpenedSystem":
        """The same without what takes memory."""
        return replace(self, network=None)


def open_system(
    given: str,
    settings: Settings,
    device: torch.device,
    *,
    kind: Kind | None = None,
    max_depth_m: float | None = None,
) -> OpenedSystem:
    """Open a system that is given as ``NAME``, ``NAME=WEIGHTS`` or ``LABEL=WEIGHTS``.

    Args:
        given: a key of ``SYSTEMS``, perhaps with other weights, or any label with weights that say
            what they are. Weights are a file, folder or hub id, or ``RANDOM``.
        kind, max_depth_m: as in ``open_model``.

    Raises:
        UserError: the name is unknown and there are no weights, or they cannot be used.
    """
    label, _, weights = given.partition("=")
    facts = SYSTEMS.get(label)
    source = weights or (facts.weights if facts else None)
    if source is None:
        what = (
            f"{label} is no hub id but a file to download; give --model {label}=FILE"
            if facts
            else f"expected one of {', '.join(SYSTEMS)}, or LABEL=WEIGHTS, got {given!r}"
        )
        raise UserError(f"--model: {what}")
    word, _, encoder = source.partition(":")
    untrained = word == RANDOM
    if untrained:
        network = _random(label, facts, encoder)
        said: Mapping[str, str] = {}
    else:
        network, report = open_model(
            source,
            kind=kind,
            max_depth_m=max_depth_m,
            network=facts.network if facts else None,
        )
        said = report.metadata or {}
    ours = said.get("format") == "flatdepth"
    way = _preprocessing(network, facts, settings, ours=ours)
    note = facts.note if facts else ""
    if network.calibration is not None:
        note = f"calibrated: {network.calibration.correction}"
    return OpenedSystem(
        label=label,
        network=network.eval().to(device),
        kind=network.kind,
        preprocessing=way,
        weights="none: random" if untrained else source,
        licence=facts.licence if facts and not weights else "that of these weights",
        note=note,
        untrained=untrained,
    )


def _random(label: str, facts: SystemFacts | None, encoder: str) -> DepthNetwork:
    """A network without training; the smallest size unless one is named."""
    if facts is None:
        raise UserError(f"--model {label}={RANDOM}: expected one of {', '.join(SYSTEMS)}")
    sizes = NETWORKS[facts.network].encoders
    tiny = next((size for size in sizes if size in ("tiny", "vitt")), sizes[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_network(facts.network, encoder or tiny, kind=facts.kind)


def _preprocessing(
    network: DepthNetwork, facts: SystemFacts | None, settings: Settings, *, ours: bool
) -> Preprocessing:
    """That of the system; what flatdepth trained sees pictures as in its training."""
    if facts is None:
        facts = next((f for f in SYSTEMS.values() if f.network == network.name), None)
    size = None if settings.size is None else nearest_multiple(settings.size, network.multiple)
    if ours or facts is None:
        return preprocessing("ours", size or network.side, network.multiple)
    return preprocessing(facts.preprocessing, size or facts.size)


@torch.inference_mode()
def predict_with(
    system: OpenedSystem,
    image: UInt8[np.ndarray, "h w 3"],
    focal_px: float,
    settings: Settings,
    *,
    at_network: bool = False,
) -> Float32[np.ndarray, "_ _"]:
    """What a system says of one picture, at its size, in the quantity of its kind.

    Args:
        focal_px: in pixels of the picture.
        at_network: at the resolution of the network's input instead.

    Raises:
        UserError: the prediction is not finite.
    """
    network, way = system.network, system.preprocessing
    assert network is not None
    device = network.image_mean.device
    height, width = image.shape[:2]
    if settings.tiles:
        field = predict_tiled(network, image, way, device, focal_px, _TILES_AT_ONCE)
        found = 1 / field if network.kind == "metric" else field
    else:
        pixels = torch.tensor(image, device=device).movedim(-1, 0)[None].float() / 255
        prepared = way.prepare(pixels)
        if isinstance(network, Sampler):
            raw = network.sample(
                prepared, steps=settings.steps, ensemble=settings.ensemble, seed=settings.seed
            )
        else:
            scaled = focal_px * way.focal_scale(height, width)
            raw = network(prepared, pixels.new_tensor([scaled]))
        bring = way.trim if at_network else way.restore
        found = bring(raw.float(), height, width)[0, 0].cpu().numpy()
    if not np.isfinite(found).all():
        raise UserError(f"{system.label} predicts values that are not finite; take other weights")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Predictions of one picture on one scale.

    Attributes:
        depths_m: per system planar z, in metres if there was truth or a metric system.
        alignments: what was done to each, in words.
    """

    depths_m: Sequence[Float32[np.ndarray, "h w"]]
    alignments: Sequence[str]


def on_one_scale(
    predictions: Sequence[Float32[np.ndarray, "h w"]],
    systems: Sequence[OpenedSystem],
    truth_m: Float32[np.ndarray, "h w"] | None = None,
    valid: Bool[np.ndarray, "h w"] | None = None,
) -> Common:
    """Bring what systems say of one picture to depth that can be compared.

    What is known up to scale and shift is fitted, in its own quantity: to the truth, else to the
    first system that predicts metres, else to the first system, whose 2nd and 98th percentile are
    taken for 10 and 1 (of depth), or 1/10 and 1 (of inverse depth).

    Args:
        predictions: per system, as ``predict_with`` gives them.
        truth_m, valid: planar z in metres and where it counts, if it is known.
    """
    kinds: list[Kind] = [system.kind for system in systems]
    target, where, whose = truth_m, valid, "the truth"
    if target is None:
        first = kinds.index("metric") if "metric" in kinds else 0
        target, whose = _as_depth(predictions[first], kinds[first]), systems[first].label
        where = np.ones(target.shape, bool)
    elif where is None:
        where = np.isfinite(target) & (target > 0)
    depths_m, alignments = [], []
    for system, kind, prediction in zip(systems, kinds, predictions, strict=True):
        own = own_alignment(kind)
        one = align(
            _map(prediction),
            _map(np.where(where, target, 1)),
            _map(where),
            kind=kind,
            alignment=own,
            range_m=RANGE_M,
        )
        depths_m.append(one[0, 0].numpy().astype(np.float32))
        if kind == "metric":
            alignments.append("none (metric)")
        elif truth_m is None and system.label == whose:
            alignments.append("none: the others are fitted to it")
        else:
            alignments.append(f"{describe_alignment(own, 'least-squares')}, to {whose}")
    return Common(depths_m=depths_m, alignments=alignments)


def _map(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)[None, None]


def _as_depth(prediction: Float32[np.ndarray, "h w"], kind: Kind) -> Float32[np.ndarray, "h w"]:
    """Depth from one prediction alone, between 1 and 10 if it has no unit."""
    if kind == "metric":
        return prediction
    low, high = (float(q) for q in np.percentile(prediction, (2, 98)))
    share = ((prediction - low) / max(high - low, 1e-12)).clip(0, 1)
    if kind == "affine":
        return (1 + 9 * share).astype(np.float32)
    return (1 / (0.1 + 0.9 * share)).astype(np.float32)
