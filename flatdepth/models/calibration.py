"""Calibration of metric weights: a correction of their metres, and the record that it helped.

A network that is right but for its scale is put right by one factor, one that sees far things too
near by a scale and shift of inverse depth besides. Where the numbers come from is for
``flatdepth.judge.calibration``; weight files carry them as one JSON text.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from flatdepth.errors import UserError
from flatdepth.untrusted import parse_json

Form = Literal["scale", "scale-shift-inverse"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Depth times ``factor``, then inverse depth plus ``shift_per_m``.

    Attributes:
        factor: above 0.
        shift_per_m: in 1/m; 0 for a scale alone, which is computed without any inverse.
        far_m: with a shift, the depth in metres that nothing exceeds: an inverse depth below its
            inverse, or below 0, counts as that. None where there is no such end.
    """

    factor: float
    shift_per_m: float = 0.0
    far_m: float | None = None

    def __post_init__(self) -> None:
        far_m = math.inf if self.far_m is None else self.far_m
        if not (0 < self.factor < math.inf and math.isfinite(self.shift_per_m) and far_m > 0):
            raise UserError(
                "calibration: expected a factor above 0, a finite shift and a far end above 0 m, "
                f"found {self.factor}, {self.shift_per_m} and {self.far_m}; calibrate again"
            )

    def __call__(self, depth_m: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Corrected planar z in metres, in the same dtype."""
        scaled = depth_m * self.factor
        if self.shift_per_m == 0:
            return scaled
        least = 0.0 if self.far_m is None else 1 / self.far_m
        return (scaled.reciprocal() + self.shift_per_m).clamp_min(least).reciprocal()

    def __str__(self) -> str:
        shift = f", then 1/depth {self.shift_per_m:+.4g} per m" if self.shift_per_m else ""
        return f"depth x {self.factor:.4f}{shift}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What one half of the scenes says of a correction that was fitted on the other half.

    Attributes:
        scenes, images: in this half.
        fitted: the other half's correction.
        abs_rel, delta1: (before, after) it, means over this half's images.
    """

    scenes: int
    images: int
    fitted: Correction
    abs_rel: tuple[float, float]
    delta1: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A correction of some weights' metres with where it comes from.

    Attributes:
        form: what was fitted.
        correction: that of all images.
        halves: both halves of the scenes.
        is_applied: whether AbsRel improved in both; else the correction is on record only.
        sets, part, images: what it was fitted on.
        digests: of the sets' contents.
        protocol: crop and depth range, in words.
        input_px: shorter side of the network's input.
    """

    form: Form
    correction: Correction
    halves: tuple[HeldOut, HeldOut]
    is_applied: bool
    sets: tuple[str, ...]
    part: str
    images: int
    digests: tuple[str, ...]
    protocol: str
    input_px: int

    def text(self) -> str:
        """As JSON on one line; ``read`` is the inverse."""
        content = asdict(self)
        del content["is_applied"]
        return json.dumps({"applied": "yes" if self.is_applied else "no", **content})

    @classmethod
    def read(cls, text: str) -> "Calibration":
        """What ``text`` gave.

        Raises:
            UserError: the text is not of that form.
        """
        try:
            content: dict[str, Any] = parse_json(text)
            is_applied = {"yes": True, "no": False}[content["applied"]]
            first, second = (_half(half) for half in content["halves"])
            if content["form"] not in FORMS:
                raise ValueError(f"unknown form {content['form']}")
            return cls(
                form=content["form"],
                correction=_correction(content["correction"]),
                halves=(first, second),
                is_applied=is_applied,
                sets=tuple(str(name) for name in content["sets"]),
                part=str(content["part"]),
                images=int(content["images"]),
                digests=tuple(str(digest) for digest in content["digests"]),
                protocol=str(content["protocol"]),
                input_px=int(content["input_px"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(
                "calibration: expected what flatdepth checkpoint calibrate writes, found something "
                f"else ({type(error).__name__}: {error}); calibrate again"
            ) from error

    def __str__(self) -> str:
        return (
            f"{self.correction} ({self.form}, of {self.images} images of {', '.join(self.sets)}, "
            f"{self.part}, at {self.input_px} px)"
        )


def _correction(content: Mapping[str, Any]) -> Correction:
    far_m = content["far_m"]
    return Correction(
        factor=float(content["factor"]),
        shift_per_m=float(content["shift_per_m"]),
        far_m=None if far_m is None else float(far_m),
    )


def _half(content: Mapping[str, Any]) -> HeldOut:
    (abs_rel, abs_rel_after), (delta1, delta1_after) = content["abs_rel"], content["delta1"]
    return HeldOut(
        scenes=int(content["scenes"]),
        images=int(content["images"]),
        fitted=_correction(content["fitted"]),
        abs_rel=(float(abs_rel), float(abs_rel_after)),
        delta1=(float(delta1), float(delta1_after)),
    )
