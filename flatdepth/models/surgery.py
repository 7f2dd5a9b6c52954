"""Weight files looked into, compared and mixed."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.models.checkpoint import (
    CALIBRATION,
    WeightFile,
    calibration_of,
    describe,
    guess_kind,
)
from flatdepth.models.network import UNITS, DepthNetwork
from flatdepth.models.networks import network_class

_GROUPS = (
    (re.compile(r"pretrained\.(?:cls_token|pos_embed|mask_token)"), "tokens and positions"),
    (re.compile(r"pretrained\.patch_embed\."), "patch embed"),
    (re.compile(r"pretrained\.stem\."), "stem"),
    (re.compile(r"pretrained\.blocks\.(\d+)\."), "block {}"),
    (re.compile(r"pretrained\.norm\."), "final norm"),
    (re.compile(r"depth_head\.projects\."), "head projects"),
    (re.compile(r"depth_head\.resize_layers\."), "head resize_layers"),
    (re.compile(r"depth_head\.scratch\.layer\d_rn\."), "head layer_rn"),
    (re.compile(r"depth_head\.scratch\.refinenet(\d)\."), "head refinenet{}"),
    (re.compile(r"depth_head\.stages\.(\d)\."), "head stage {}"),
    (re.compile(r"depth_head\.(?:scratch\.output_conv|output\.)"), "head output"),
    (re.compile(r"port\.(?:backbone|dpt)\.(?:beit\.)?embeddings\."), "embeddings"),
    (re.compile(r"port\.(?:backbone|dpt)\.(?:beit\.|encoder\.)?layers?\.(\d+)\."), "block {}"),
    (re.compile(r"port\.(?:backbone|dpt)\."), "last norm"),
    (re.compile(r"port\.neck\.(?:reassemble_stage|convs)\."), "head neck"),
    (re.compile(r"port\.neck\.fusion_stage\.layers\.(\d)\."), "head fusion {}"),
    (re.compile(r"port\."), "head output"),
    (re.compile(r"depth_head\.scratch\.sky_"), "head sky"),
    (re.compile(r"unet\.(?:conv_in|time_embedding)\."), "UNet, input and time"),
    (re.compile(r"unet\.down_blocks\.(\d+)\."), "UNet, down {}"),
    (re.compile(r"unet\.mid_block\."), "UNet, middle"),
    (re.compile(r"unet\.up_blocks\.(\d+)\."), "UNet, up {}"),
    (re.compile(r"unet\.conv_(?:norm_)?out\."), "UNet, output"),
    (re.compile(r"vae\."), "VAE"),
)
"""Groups in the order of the data flow; refinenet4 comes before refinenet1."""

_ENCODER_COLOUR, _HEAD_COLOUR, _MUTED = "#2b66b1", "#d55e00", "#667080"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How a tensor, or a group of them, differs between two files A and B.

    Attributes:
        name: official name of the tensor, or the group's.
        parameters: numbers in it.
        norm: ``||A||``, the Euclidean norm.
        moved: ``||B - A||``.
    """

    name: str
    parameters: int
    norm: float
    moved: float

    @property
    def relative(self) -> float:
        """``||B - A|| / ||A||``; infinite where A is 0 and B is not, 0 where both are."""
        if self.norm == 0:
            return math.inf if self.moved else 0.0
        return self.moved / self.norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Two files of one architecture compared.

    Attributes:
        a, b: the files as they were given.
        tensors: every tensor but those that never train, in the order of the data flow.
        groups: the same by block and part of the head.
    """

    a: str
    b: str
    tensors: tuple[Change, ...]
    groups: tuple[Change, ...]

    @property
    def whole(self) -> Change:
        return _join("all", self.tensors)


def diff(a: WeightFile, b: WeightFile) -> Diff:
    """Compare two files tensor by tensor, in float64.

    The network's ``unused`` tensors are left out: training never moves them.

    Raises:
        UserError: the files do not hold the same tensors.
    """
    check_alike(a, b)
    changes = []
    unused = network_class(a.network).unused
    for name in sorted((n for n in a.tensors if not n.startswith(unused)), key=_position):
        before, after = a.tensors[name].double(), b.tensors[name].double()
        changes.append(
            Change(
                name=name,
                parameters=before.numel(),
                norm=float(torch.linalg.vector_norm(before)),
                moved=float(torch.linalg.vector_norm(after - before)),
            )
        )
    members: dict[str, list[Change]] = {}
    for change in changes:
        members.setdefault(_group(change.name), []).append(change)
    return Diff(
        a=a.source,
        b=b.source,
        tensors=tuple(changes),
        groups=tuple(_join(name, parts) for name, parts in members.items()),
    )


def blend(a: DepthNetwork, b: DepthNetwork, alpha: float) -> dict[str, Tensor]:
    """The state dict ``(1 - alpha) A + alpha B``: exactly A's at 0 and B's at 1.

    Interpolating a fine-tuned model with the one it started from trades what it learned for what
    it would forget (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3).

    Raises:
        UserError: ``alpha`` is outside 0..1, or the models differ in encoder, kind, maximum depth
            or canonical focal length.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected a share between 0 (A) and 1 (B), got {alpha}")
    of_a, of_b = describe(a), describe(b)
    for field in ("encoder", "kind", "max_depth_m", "canonical_focal_px"):
        if of_a.get(field) != of_b.get(field):
            raise UserError(
                f"A has {field} {of_a.get(field)} and B {of_b.get(field)}; blend two files of one "
                "encoder, kind, maximum depth and canonical focal length"
            )
    after = b.state_dict()
    # torch.lerp counts from the nearer end, so both ends are exact.
    return {
        name: torch.lerp(t.double(), after[name].double(), alpha).float()
        for name, t in a.state_dict().items()
    }


def check_alike(a: WeightFile, b: WeightFile) -> None:
    """Refuse files whose tensors cannot be compared one by one.

    Raises:
        UserError: another encoder, missing tensors or other shapes.
    """
    if a.size != b.size:
        shown = [
            f"{file.source} holds {file.encoder or 'an encoder of no known size'}"
            if file.size
            else f"{file.source} holds no encoder"
            for file in (a, b)
        ]
        raise UserError(f"{' and '.join(shown)}; give two files of one encoder")
    for one, other in ((a, b), (b, a)):
        if lone := [name for name in one.tensors if name not in other.tensors]:
            raise UserError(
                f"{other.source} lacks {len(lone)} tensors that {one.source} holds, such as "
                f"{lone[0]}; give two files with the same parts"
            )
    for name, tensor in a.tensors.items():
        if tensor.shape != b.tensors[name].shape:
            shapes = [list(file.tensors[name].shape) for file in (a, b)]
            raise UserError(
                f"{name} is {shapes[0]} in {a.source} but {shapes[1]} in {b.source}; give two "
                "files of one model"
            )


def diff_table(result: Diff, *, tensors: bool = False) -> str:
    """Groups, or every tensor, with norms and relative change, as text."""
    changes = [*(result.tensors if tensors else result.groups), result.whole]
    width = max(len(change.name) for change in changes)
    largest = max((c.relative for c in changes if math.isfinite(c.relative)), default=0.0)
    lines = [f"A: {result.a}", f"B: {result.b}", ""]
    lines.append(
        f"{'':<{width}}  {'parameters':>11}  {'||A||':>9}  {'||B-A||':>9}  {'relative':>9}"
    )
    for change in changes:
        bar = "#" * round(24 * change.relative / largest) if 0 < change.relative < math.inf else ""
        lines.append(
            f"{change.name:<{width}}  {change.parameters:>11,}  {change.norm:>9.4g}  "
            f"{change.moved:>9.4g}  {change.relative:>9.2%}  {bar}".rstrip()
        )
    return "\n".join(lines)


def diff_json(result: Diff) -> str:
    """Everything in ``result`` as JSON; a relative change from 0 is null."""

    def plain(change: Change) -> dict[str, object]:
        relative = change.relative if math.isfinite(change.relative) else None
        return {
            "name": change.name,
            "parameters": change.parameters,
            "norm": change.norm,
            "moved": change.moved,
            "relative": relative,
        }

    return json.dumps(
        {
            "a": result.a,
            "b": result.b,
            "whole": plain(result.whole),
            "groups": [plain(change) for change in result.groups],
            "tensors": [plain(change) for change in result.tensors],
        },
        indent=1,
        allow_nan=False,
    )


def diff_chart(result: Diff) -> bytes:
    """The relative change of every group as bars, as a PNG file; the encoder blue, the head red."""
    groups = result.groups
    shares = [g.relative if math.isfinite(g.relative) else 0.0 for g in groups]
    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 1.5 + 0.27 * len(groups)), dpi=130, layout="constrained")
        axes = figure.subplots()
        colours = [
            _HEAD_COLOUR if group.name.startswith("head") else _ENCODER_COLOUR for group in groups
        ]
        bars = axes.barh([group.name for group in groups], shares, color=colours, height=0.72)
        axes.bar_label(
            bars,
            [f"{g.relative:.2%}" if math.isfinite(g.relative) else "from 0" for g in groups],
            padding=4,
            color=_MUTED,
            fontsize=9,
        )
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.01)
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.set_xlabel("relative change  ||B − A|| / ||A||", color=_MUTED)
        figure.suptitle(
            f"Which layers moved\nA: {_short(result.a)}\nB: {_short(result.b)}",
            x=0.01,
            ha="left",
            fontsize=10.5,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def info(weights: WeightFile) -> str:
    """What a file holds, a line each: kind, encoder, depth range, keys, size.

    A whole model predicts a rendered room on the way, to say which kind its logits look like where
    the file does not say it or says the other.
    """
    said = weights.metadata or {}
    numbers = sum(t.numel() for t in weights.tensors.values())
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in weights.tensors.values())
    source = {
        "flatdepth": "its metadata",
        "transformers": "its config.json",
        "diffusers": "its model_index.json",
        "official": "its official name",
    }.get(said.get("format", ""))
    size = weights.size
    bounded = network_class(weights.network).bounded
    units = {str(kind): str(unit) for kind, unit in UNITS.items()}
    encoder = weights.encoder or (
        "none" if size is None else f"of no known size (width {size[0]}, {size[1]} blocks)"
    )
    rows = {
        "file": str(weights.path),
        "size": f"{weights.file_bytes / 1e6:.1f} MB",
        "encoder": encoder,
        "head": "yes" if weights.has_head else "none",
        "kind": f"{said['kind']} (by {source})" if "kind" in said else "not said by the file",
        "max_depth_m": said.get(
            "max_depth_m",
            "not said by the file"
            if said.get("kind", "metric") == "metric" and bounded
            else "none",
        ),
        "units": said.get("units") or units.get(said.get("kind", ""), "not said by the file"),
        "keys": f"{len(weights.tensors)} tensors, {numbers:,} parameters",
        "types": ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items()),
        "unwrapped": "; ".join(weights.unwrapped) or "nothing",
    }
    if weights.encoder is None:
        rows["fault"] = "not a file of Depth Anything V2: no encoder of a known size"
    elif not weights.has_head:
        rows["fault"] = "predicts nothing without a head; train one with model.head fresh"
    try:
        guess = guess_kind(weights)
        if guess is not None and guess != said.get("kind"):
            rows["kind"] += f"; its logits look {guess}"
    except UserError as error:
        rows["fault"] = str(error)
    known = {"format", "encoder", "kind", "max_depth_m", "units", CALIBRATION}
    rows |= {key: value for key, value in said.items() if key not in known}
    if recorded := calibration_of(said):
        rows[CALIBRATION] = f"{'' if recorded.is_applied else 'not applied: '}{recorded}"
    return "\n".join(f"{key:<12} {value}" for key, value in rows.items())


def keys(weights: WeightFile) -> str:
    """Every tensor with its shape and type, a line each, in the order of the data flow."""
    ordered = sorted(weights.tensors, key=_position)
    width = max(len(name) for name in ordered)
    return "\n".join(
        f"{name:<{width}}  {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in ((name, weights.tensors[name]) for name in ordered)
    )


def blended_metadata(a: str, b: str, alpha: float) -> Mapping[str, str]:
    """What a blend's file says about where it comes from."""
    return {"blend": f"{1 - alpha:g} x {Path(a).name} + {alpha:g} x {Path(b).name}"}


def _group(name: str) -> str:
    for pattern, label in _GROUPS:
        if match := pattern.match(name):
            return label.format(*match.groups())
    return name


def _position(name: str) -> tuple[int, int, str]:
    for index, (pattern, label) in enumerate(_GROUPS):
        if match := pattern.match(name):
            number = int(match[1]) if match.groups() else 0
            return index, -number if "refinenet" in label else number, name
    return len(_GROUPS), 0, name


def _join(name: str, parts: Iterable[Change]) -> Change:
    """One change for several: their norms add like the sides of a right angle."""
    parts = list(parts)
    return Change(
        name=name,
        parameters=sum(part.parameters for part in parts),
        norm=math.hypot(*(part.norm for part in parts)),
        moved=math.hypot(*(part.moved for part in parts)),
    )


def _short(path: str) -> str:
    return path if len(path) <= 90 else "…" + path[-89:]
