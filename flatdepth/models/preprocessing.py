"""How each depth system brings a picture to its network's input and a prediction back.

Published weights show what they can do on the input they were made for: its size, its aspect and
the filter of its resampling. Everything here is sRGB in 0..1 before normalisation, which networks
do themselves (``flatdepth.models.network``).

Pixel centres lie at integers + 0.5 (``flatdepth.types``). Resampling with aligned corners lays the
outermost centres of both maps on each other instead, and so moves what is at a border by half the
difference of their pixels, nothing in the middle. Systems that align them one way only, ours
among them, return a prediction stretched or shrunk about its middle by that much.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flatdepth.config import MOST_SIDE
from flatdepth.errors import UserError, expect_within

Rule = Literal["lower", "upper", "minimal", "exact", "longer", "longer_twice"]
Resample = Literal[
    "bilinear", "bilinear_corners", "bilinear_antialias", "bicubic", "bicubic_antialias", "area"
]

_ALIGN_CORNERS, _ANTIALIAS = "_corners", "_antialias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """The size of a network's input, and the resampling to it and back.

    Rules, of which the first three keep the aspect but for the rounding of each side to the nearest
    multiple (half a multiple to the even one):

    ``lower``
        The larger of the two scales, so that both sides reach ``size``.
    ``upper``
        The smaller one, so that both stay within it.
    ``minimal``
        The one nearer to 1, the rows' if both are as near.
    ``exact``
        ``size`` itself, whatever the aspect.
    ``longer``
        The longer side becomes ``size``, the other is rounded down to whole pixels. Then the last
        row and column are repeated up to a multiple; ``restore`` cuts this padding off.
    ``longer_twice``
        The longer side becomes ``size``, the other is rounded to whole pixels (half a pixel to the
        even one). A second resampling brings both to the nearest multiple (half a multiple up).

    No side is ever less than a pixel or a multiple, where originals fail on very long pictures.
    Their clauses for roundings beyond a bound never apply, for ``size`` is made of multiples.

    Resampling, by ``F.interpolate`` but for the last:

    ``bilinear``, ``bicubic``
        Without a filter for reductions; cubic with a = -0.75, as OpenCV's INTER_CUBIC.
    ``bilinear_corners``
        With aligned corners.
    ``bilinear_antialias``, ``bicubic_antialias``
        With the filter widened to the reduction, cubic with a = -0.5, as Pillow and torchvision.
    ``area``
        The mean over the area of each new pixel, as OpenCV's INTER_AREA; ``bicubic`` if a side
        grows.

    Attributes:
        size: rows and columns, multiples of ``multiple``. Rules of the longer side know one side
            only, so both are the same.
        multiple: both sides of the input are multiples of it.
        most_aspect: in ``lower`` the longer side ends at this many times ``size``'s shorter one;
            the other is less than ``size`` then.
        reflect: mirror 3 sqrt(side / 2) pixels (rounded down) outwards at each end of a side before
            it is resampled, of a side below 5 pixels all but the outermost; ``restore`` cuts them
            off.
        eight_bit: the original resamples 8-bit pixels, so results are rounded to 1/255 (equal to
            the original's but for the last digit or two of its fixed-point arithmetic).
        resample, resample_back: of the picture and of the prediction.

    Raises:
        UserError: a side of ``size`` is no positive multiple of ``multiple``, or too large.
    """

    size: tuple[int, int]
    rule: Rule
    multiple: int
    most_aspect: float = math.inf
    reflect: bool = False
    eight_bit: bool = False
    resample: Resample
    resample_back: Resample

    def __post_init__(self) -> None:
        for side in self.size:
            expect_within("size", side, self.multiple, MOST_SIDE)
            if side % self.multiple:
                raise UserError(
                    f"size: expected a multiple of {self.multiple}, got {side}; the nearest is "
                    f"{_nearest(side, self.multiple)}"
                )

    def with_size(self, size: int, multiple: int | None = None) -> "Preprocessing":
        """The same with another size, given as its shorter side; the longer keeps the aspect.

        Args:
            size: in pixels, a multiple of ``multiple``.
            multiple: the new one; None keeps what is.

        Raises:
            UserError: as the class.
        """
        multiple = self.multiple if multiple is None else multiple
        short = min(self.size)
        rows, columns = (
            size if side == short else _nearest(side * size / short, multiple) for side in self.size
        )
        return replace(self, size=(rows, columns), multiple=multiple)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the network's input for a picture of this size."""
        rows, columns = self._sizes(height, width)[-1]
        return rows + -rows % self.multiple, columns + -columns % self.multiple

    def focal_scale(self, height: int, width: int) -> float:
        """What a focal length in pixels of a picture of this size becomes, as a multiple of it.

        The mean of both sides' factors, as a focal length is that of fx and fy.
        """
        rows, columns = self.network_size(height, width)
        return (rows / height + columns / width) / 2

    def prepare(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 rows columns"]:
        """Pictures as the network's input, of ``network_size``, in their own dtype.

        Args:
            image: sRGB in 0..1.

        Returns:
            sRGB in 0..1, but that bicubic resampling overshoots at edges, which is kept where the
            original does not work on 8-bit pixels.
        """
        height, width = image.shape[-2:]
        top, left = self._mirrored(height), self._mirrored(width)
        if self.reflect:
            image = F.pad(image, (left, left, top, top), mode="reflect")
        sizes = self._sizes(height, width)
        if self.eight_bit and self.resample.endswith(_ANTIALIAS):
            # torchvision on a CPU, as Pillow, rounds between its horizontal and vertical pass.
            sizes = [(image.shape[-2], sizes[0][1]), *sizes]
        for size in sizes:
            image = _resample(image, size, self.resample)
            if self.eight_bit:
                image = (255 * image).round() / 255
            if self.eight_bit or self.resample != "bicubic":
                image = image.clamp(0, 1)
        bottom, right = (-side % self.multiple for side in image.shape[-2:])
        return F.pad(image, (0, right, 0, bottom), mode="replicate")

    def restore(
        self, prediction: Float[Tensor, "b 1 rows columns"], height: int, width: int
    ) -> Float[Tensor, "b 1 {height} {width}"]:
        """Predictions at their picture's size, in the same quantity, without the padding.

        Bicubic resampling overshoots at edges, so depth may leave the network's range; it is not
        clipped here.

        Args:
            prediction: of ``network_size(height, width)``.
            height, width: of the picture.

        Raises:
            ValueError: the prediction has another size.
        """
        found, expected = tuple(prediction.shape[-2:]), self.network_size(height, width)
        if found != expected:
            raise ValueError(f"prediction is {found}, expected {expected} for {height}x{width}")
        rows, columns = self._sizes(height, width)[-1]
        top, left = self._mirrored(height), self._mirrored(width)
        padded = (height + 2 * top, width + 2 * left)
        whole = _resample(prediction[..., :rows, :columns], padded, self.resample_back)
        return whole[..., top : top + height, left : left + width]

    def trim(
        self, prediction: Float[Tensor, "b 1 rows columns"], height: int, width: int
    ) -> Float[Tensor, "b 1 _ _"]:
        """Predictions at the network's own resolution, without the padding.

        Args:
            prediction: of ``network_size(height, width)``.
            height, width: of the picture.
        """
        ends = []
        for size, side in zip(self._sizes(height, width)[-1], (height, width), strict=True):
            margin = self._mirrored(side)
            cut = round(size * margin / (side + 2 * margin))
            ends.append(slice(cut, size - cut))
        return prediction[..., ends[0], ends[1]]

    def _mirrored(self, side: int) -> int:
        """Pixels that are mirrored outwards at each end of a side."""
        return min(int(3 * math.sqrt(side / 2)), side - 1) if self.reflect else 0

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns after each resampling of a picture of this size."""
        if self.rule == "exact":
            return [self.size]
        height, width = height + 2 * self._mirrored(height), width + 2 * self._mirrored(width)
        (rows, columns), longer = self.size, max(height, width)
        if self.rule == "longer":
            return [(max(1, height * rows // longer), max(1, width * rows // longer))]
        if self.rule == "longer_twice":
            tall, wide = (max(1, round(side * (rows / longer))) for side in (height, width))
            return [(tall, wide), (self._nearest_or_up(tall), self._nearest_or_up(wide))]
        scales = (rows / height, columns / width)
        if self.rule == "lower":
            scale = min(max(scales), self.most_aspect * min(self.size) / longer)
        elif self.rule == "upper":
            scale = min(scales)
        else:
            scale = min(scales, key=lambda one: abs(1 - one))
        return [(_nearest(height * scale, self.multiple), _nearest(width * scale, self.multiple))]

    def _nearest_or_up(self, side: int) -> int:
        return max(1, (2 * side + self.multiple) // (2 * self.multiple)) * self.multiple


def _nearest(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def _resample(
    values: Float[Tensor, "b c h w"], size: tuple[int, int], resample: Resample
) -> Float[Tensor, "b c rows columns"]:
    height, width = values.shape[-2:]
    if resample == "area":
        if size[0] <= height and size[1] <= width:
            rows, columns = _box_means(values, height, size[0]), _box_means(values, width, size[1])
            return rows @ values @ columns.T
        resample = "bicubic"
    return F.interpolate(
        values,
        size,
        mode=resample.removesuffix(_ALIGN_CORNERS).removesuffix(_ANTIALIAS),
        align_corners=resample.endswith(_ALIGN_CORNERS),
        antialias=resample.endswith(_ANTIALIAS),
    )


def _box_means(like: Tensor, source: int, target: int) -> Float[Tensor, "{target} {source}"]:
    """The matrix that takes means over ``target`` equal parts of ``source`` pixels.

    A pixel that two parts share counts in each by the share of its width that lies in it.
    """
    edges = torch.arange(target + 1, device=like.device) * source  # in 1/target of a pixel
    pixels = torch.arange(source + 1, device=like.device) * target
    last = torch.minimum(edges[1:, None], pixels[1:])
    first = torch.maximum(edges[:-1, None], pixels[:-1])
    return (last - first).clamp(min=0).to(like.dtype) / source


PREPROCESSING: Mapping[str, Preprocessing] = {
    "ours": Preprocessing(
        size=(518, 518),
        rule="lower",
        multiple=14,
        most_aspect=4,
        resample="bilinear_antialias",
        resample_back="bilinear_corners",
    ),
    "depth_anything_v2": Preprocessing(
        size=(518, 518),
        rule="lower",
        multiple=14,
        resample="bicubic",
        resample_back="bilinear_corners",
    ),
    "depth_anything_v2_hf": Preprocessing(
        size=(518, 518),
        rule="minimal",
        multiple=14,
        eight_bit=True,
        resample="bicubic_antialias",
        resample_back="bicubic",
    ),
    "depth_anything_3": Preprocessing(
        size=(504, 504),
        rule="longer_twice",
        multiple=14,
        eight_bit=True,
        resample="area",
        resample_back="bilinear",
    ),
    "midas_v21": Preprocessing(
        size=(384, 384), rule="upper", multiple=32, resample="bicubic", resample_back="bicubic"
    ),
    "midas_v21_small": Preprocessing(
        size=(256, 256), rule="upper", multiple=32, resample="bicubic", resample_back="bicubic"
    ),
    "dpt": Preprocessing(
        size=(384, 384), rule="minimal", multiple=32, resample="bicubic", resample_back="bicubic"
    ),
    "dpt_square": Preprocessing(
        size=(384, 384), rule="exact", multiple=32, resample="bicubic", resample_back="bicubic"
    ),
    "dpt_hf": Preprocessing(
        size=(384, 384),
        rule="exact",
        multiple=32,
        eight_bit=True,
        resample="bilinear_antialias",
        resample_back="bicubic",
    ),
    "dpt_swin2_hf": Preprocessing(
        size=(384, 384),
        rule="exact",
        multiple=32,
        eight_bit=True,
        resample="bicubic_antialias",
        resample_back="bicubic",
    ),
    "zoedepth": Preprocessing(
        size=(384, 512),
        rule="minimal",
        multiple=32,
        reflect=True,
        resample="bilinear_corners",
        resample_back="bicubic",
    ),
    "marigold": Preprocessing(
        size=(768, 768),
        rule="longer",
        multiple=8,
        resample="bilinear_antialias",
        resample_back="bilinear",
    ),
    "resnet50": Preprocessing(
        size=(224, 224),
        rule="lower",
        multiple=32,
        most_aspect=4,
        resample="bilinear_antialias",
        resample_back="bilinear_corners",
    ),
}
"""By system, at the sizes of their code or their hub.

``ours`` and ``resnet50``
    What flatdepth's own networks are trained on, and what ``flatdepth.predict`` does.
``depth_anything_v2``, ``depth_anything_v2_hf``
    Its own code (``image2tensor``, ``infer_image``), and transformers' ``DPTImageProcessor`` with
    the settings of the hub.
``depth_anything_3``
    ``InputProcessor`` with its defaults. It leaves the prediction at the network's size; the way
    back is the one that moves nothing.
``midas_v21``, ``midas_v21_small``, ``dpt``, ``dpt_square``
    ``midas.model_loader`` and ``run.py``. ``dpt`` is for ViT, hybrid, Next-ViT and BEiT (of which
    one has size 512), ``dpt_square`` for Swin, Swin2 (of which the tiny one has 256) and LeViT
    (224).
``dpt_hf``, ``dpt_swin2_hf``
    transformers with the settings of the hub, which give up the aspect: ViT, hybrid and BEiT; and
    Swin2.
``zoedepth``
    transformers' ``ZoeDepthImageProcessor`` with the settings of the hub, as ``infer`` of its own
    code, each without the second prediction of the mirrored picture.
``marigold``
    diffusers' ``MarigoldImageProcessor``. Its own code resamples 8-bit pixels, and filters on the
    way back, which differs only for pictures that were enlarged.
"""


def preprocessing(name: str, size: int | None = None, multiple: int | None = None) -> Preprocessing:
    """The preprocessing of a system, perhaps with another size.

    Args:
        name: a key of ``PREPROCESSING``.
        size: the shorter side of the new size; None is the system's own.
        multiple: what the network's sides must be multiples of; None is the system's own.

    Raises:
        UserError: the name is unknown, or the size is no positive multiple, or too large.
    """
    if name not in PREPROCESSING:
        raise UserError(
            f"preprocessing: expected one of {', '.join(PREPROCESSING)}, found {name!r}"
        )
    found = PREPROCESSING[name]
    return found.with_size(min(found.size) if size is None else size, multiple)
