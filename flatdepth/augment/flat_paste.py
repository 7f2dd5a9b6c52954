"""The paste stage as a Kornia augmentation, for anybody's training loop."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt8
from kornia.augmentation import RandomTransplantation
from kornia.augmentation._2d.mix.base import MixAugmentationBaseV2
from kornia.constants import DataKey
from PIL import Image, ImageOps
from torch import Tensor

from flatdepth.augment.draw.composite import (
    PasteGroup,
    as_params,
    from_params,
    paste,
    stack_plans,
)
from flatdepth.augment.draw.content import PICTURE_CACHE, Content, Sources, make_content, reduced
from flatdepth.augment.photometric import draw_seeds
from flatdepth.augment.plan.coarse import thin_view
from flatdepth.augment.plan.layout import Paste, plan_pastes
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig
from flatdepth.errors import UserError
from flatdepth.geometry import View
from flatdepth.types import Batch, Frame

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
_PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF")


@runtime_checkable
class PictureSource(Protocol):
    """Pictures to hang: their shapes, and each of them by its number."""

    @property
    def aspects(self) -> Float64[np.ndarray, " pictures"]:
        """Width / height of every picture."""

    def picture(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        """A picture in sRGB."""


class PictureFolder:
    """The picture files of a folder and those below it, decoded on demand.

    Raises:
        UserError: the folder holds none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(
            file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES
        )
        if not self._files:
            raise UserError(
                f"pictures: {folder} holds no picture; expected files with "
                f"{', '.join(PICTURE_SUFFIXES)}"
            )
        sizes = [self._open(file).size for file in self._files]
        self._aspects = np.array([width / height for width, height in sizes])
        self.picture = lru_cache(maxsize=PICTURE_CACHE)(self._decode)

    @property
    def aspects(self) -> Float64[np.ndarray, " pictures"]:
        """Width / height of every picture."""
        return self._aspects

    @staticmethod
    def _open(file: Path) -> Image.Image:
        try:
            return ImageOps.exif_transpose(Image.open(file, formats=_PICTURE_FORMATS))
        except Exception as error:  # Pillow's decoders answer damage with many types of exception
            raise UserError(f"pictures: {file} is no readable picture; remove it") from error

    def _decode(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        return reduced(self._open(self._files[number]).convert("RGB"))


class Pasted(NamedTuple):
    """What ``FlatPaste`` makes of a batch.

    Attributes:
        image: (b, 3, h, w) sRGB 0..1, of the type that was given.
        depth_m: (b, 1, h, w) float32 planar z in metres, 0 where there is no truth.
        valid: (b, 1, h, w) bool, where there is truth.
        region: (b, 1, h, w) uint8, values of ``flatdepth.types.Region``.
    """

    image: Float[Tensor, "b 3 h w"]
    depth_m: Float[Tensor, "b 1 h w"]
    valid: Bool[Tensor, "b 1 h w"]
    region: Tensor


class FlatPaste(RandomTransplantation):
    """Hang mirrors, pictures and decoys on the walls of a batch, with their exact planar depth.

    ``FlatPaste()(image, depth_m, K_px)`` returns a ``Pasted``. In Kornia's
    ``AugmentationSequential`` the image is the ``"input"``, the first ``"mask"`` the depth in
    metres (0 or NaN: unknown, inf: sky), a second one ``valid`` and a third one ``region``, and
    the intrinsics are ``"keypoints"`` (``intrinsics_to_keypoints``), so that flips, crops and
    resizes before and after keep all of it together::

        AugmentationSequential(
            RandomHorizontalFlip(), FlatPaste(), data_keys=["input", "mask", "keypoints"]
        )

    Walls are found in the depth on the CPU, some 10 ms per image; a training whose loader plans
    ahead gives the plans as ``params`` (``composite.as_params``), and then nothing is waited for.
    Parameters are a dictionary of tensors; given back they replay the same pastes.

    It is the one kind of Kornia augmentation whose parameters may depend on all inputs, and is
    therefore a ``RandomTransplantation``, of which it keeps nothing else.

    Args:
        config: what is pasted, how large and how often; the defaults if None.
        pictures: a folder of pictures to hang, or an object with their ``aspects`` and
            ``picture(number)``. Without, the pastes are mirrors, and wall paintings, screens and
            openings that show other images of the batch.
        depth_range_m: (near, far) in metres; other depth is no truth.
        p: share of the images that get pastes; None takes ``config.share``.
        same_on_batch: one seed for all images of a batch; what hangs where still depends on each.
        keepdim: give back (3, h, w) for (3, h, w).
    """

    def __init__(
        self,
        config: PasteConfig | None = None,
        *,
        pictures: str | Path | PictureSource | None = None,
        depth_range_m: tuple[float, float] = (0.1, 20.0),
        p: float | None = None,
        same_on_batch: bool = False,
        keepdim: bool = False,
    ) -> None:
        config = config or PasteConfig()
        share = config.share if p is None else p
        MixAugmentationBaseV2.__init__(
            self, p=share, p_batch=1.0, same_on_batch=same_on_batch, keepdim=keepdim
        )
        self._config = replace(config, share=1.0, stages=[])
        self._range_m = depth_range_m
        if isinstance(pictures, str | Path):
            pictures = PictureFolder(Path(pictures))
        self._pictures: PictureSource | None = pictures
        self._masks: tuple[Tensor, ...] = ()

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """A seed per image, (b,) int64, from torch's random generator of the CPU."""
        return {"seed": draw_seeds(batch_shape[0], same_on_batch=self.same_on_batch)}

    def params_from_input(
        self,
        *input: Any,
        data_keys: Sequence[Any],
        params: dict[str, Tensor],
        extra_args: Mapping[Any, Mapping[str, Any]] | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Complete the parameters of a container by plans for what it holds; Kornia calls this.

        Raises:
            ValueError: the container has no depth or no intrinsics.
        """
        by_key = list(zip(data_keys, input, strict=True))
        self._masks = tuple(value for key, value in by_key if key == DataKey.MASK)
        self._params = params
        if "depth_m" in params:
            return params
        images = [value for key, value in by_key if key == DataKey.INPUT]
        points = [value for key, value in by_key if key == DataKey.KEYPOINTS]
        if not self._masks or not points:
            raise ValueError(
                "FlatPaste needs depth in metres as the first 'mask' and intrinsics as 'keypoints' "
                f"(intrinsics_to_keypoints); got {[key.name.lower() for key in data_keys]}"
            )
        K_px = keypoints_to_intrinsics(getattr(points[0], "data", points[0]))
        # the mirror image of a scene has positive focal lengths too, and the same depth
        K_px[:, :, :2] = K_px[:, :, :2].abs()
        valid = self._masks[1] > 0.5 if len(self._masks) > 1 else None
        return self._planned(images[0], self._masks[0], K_px, valid, params)

    def forward(  # type: ignore[override]
        self,
        *input: Tensor,
        params: dict[str, Tensor] | None = None,
        data_keys: Sequence[Any] | None = None,
        **_: Any,
    ) -> Pasted | Tensor:
        """Paste into a batch.

        Args:
            input: image, depth_m, K_px and perhaps valid, (b, 3, h, w), (b, 1, h, w), (b, 3, 3) and
                (b, 1, h, w), or all without b. Within a container it is one of them.
            params: of an earlier call, or with the plans of ``composite.as_params``.
            data_keys: of the one input within a container; None for a direct call.
        """
        if data_keys is not None:
            return self._one(input[0], DataKey.get(data_keys[0]), params or {})
        single = input[0].ndim == 3
        image, depth_m, K_px, *rest = (x[None] if single else x for x in input)
        valid = rest[0] if rest else None
        params = self.forward_parameters(image.shape) if params is None else dict(params)
        if "paste0.images" not in params and "seed" in params:
            params = self._planned(image, depth_m, K_px, valid, params)
        else:
            params |= self._scene(depth_m, valid)
        self._params = params
        found = self._paste(image, params)
        if single and self.keepdim:
            found = Pasted(*(x[0] for x in found))
        return found

    def transform_keypoint(
        self,
        input: Tensor,
        params: Mapping[str, Tensor],  # noqa: ARG002
        flags: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        """Pastes do not move the camera."""
        return input

    def _one(self, value: Tensor, key: Any, params: Mapping[str, Tensor]) -> Tensor:
        """One input of a container; masks are told apart by which of the container's they are."""
        if key == DataKey.INPUT:
            return self._paste(value, params).image
        role = next(i for i, mask in enumerate(self._masks) if mask is value)
        if role >= 3:
            return value
        # depth, valid and region do not depend on colours
        blank = value.new_zeros(len(value), 3, *value.shape[-2:])
        found = self._paste(blank, params)
        return (found.depth_m, found.valid, found.region)[role].to(value.dtype)

    def _paste(self, image: Tensor, params: Mapping[str, Tensor]) -> Pasted:
        depth_m, valid = params["depth_m"], params["valid"]
        batch = Batch(
            image=image.float(),
            depth_m=depth_m,
            valid=valid,
            region=torch.zeros_like(valid, dtype=torch.uint8),
            K_px=depth_m.new_zeros(len(depth_m), 3, 3, dtype=torch.float64),
            sample=torch.arange(len(depth_m), device=depth_m.device),
        )
        groups = tuple(group.to(image.device) for group in from_params(params))
        pasted = paste(batch, groups, depth_range_m=self._range_m)
        return Pasted(pasted.image.to(image.dtype), pasted.depth_m, pasted.valid, pasted.region)

    def _scene(self, depth_m: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        """Depth before pasting, 0 where it is no truth, and where it is one."""
        depth_m = depth_m.float()
        near, far = self._range_m
        known = (depth_m >= near) & (depth_m <= far)
        if valid is not None:
            known &= valid.bool()
        return {"depth_m": torch.where(known, depth_m, 0.0), "valid": known}

    def _planned(
        self,
        image: Tensor,
        depth_m: Tensor,
        K_px: Tensor,
        valid: Tensor | None,
        params: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The parameters with the scene and the plans for it."""
        params |= self._scene(depth_m, valid)
        pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
        truth = torch.where(params["valid"] | depth_m.isinf(), depth_m.float(), torch.nan)
        frames = [
            Frame(key=str(number), dataset="", scene="", image=colours, depth_m=z, K_px=K)
            for number, (colours, z, K) in enumerate(
                zip(
                    pixels.movedim(1, -1).cpu().numpy(),
                    truth[:, 0].cpu().numpy(),
                    K_px.double().cpu().numpy(),
                    strict=True,
                )
            )
        ]
        params |= as_params(self._groups(frames, params, image.device))
        return params

    def _groups(
        self, frames: Sequence[Frame], params: Mapping[str, Tensor], device: torch.device
    ) -> tuple[PasteGroup, ...]:
        gates, seeds = params["batch_prob"].tolist(), params["seed"].tolist()
        planned = [
            self._plan(frame, [*frames[number + 1 :], *frames[:number]], Draws(seed))
            if gate > 0.5
            else ((), ())
            for number, (frame, gate, seed) in enumerate(zip(frames, gates, seeds, strict=True))
        ]
        height, width = frames[0].depth_m.shape
        return stack_plans(
            [plan for plan, _ in planned],
            [contents for _, contents in planned],
            np.stack([frame.K_px for frame in frames]),
            height=height,
            width=width,
            mirror_target=self._config.mirror_target,
            together=1 if device.type == "cpu" else len(frames),
        )

    def _plan(
        self, frame: Frame, others: Sequence[Frame], draws: Draws
    ) -> tuple[tuple[Paste, ...], tuple[Content, ...]]:
        height, width = frame.depth_m.shape
        view = View(top=0, left=0, crop_height=height, crop_width=width, height=height, width=width)
        thin = thin_view(frame, view)
        plan = plan_pastes(
            thin,
            draws,
            self._config,
            picture_aspects=np.zeros(0) if self._pictures is None else self._pictures.aspects,
            depth_range_m=self._range_m,
        )
        others = others or [frame]
        sources = Sources(
            picture=_no_picture if self._pictures is None else self._pictures.picture,
            frame=lambda number: others[number % len(others)],
        )
        return plan, tuple(
            make_content(own, frame, view, thin.K_px, sources, self._config.mirror_target)
            for own in plan
        )


def _no_picture(number: int) -> UInt8[np.ndarray, "h w 3"]:
    raise AssertionError(f"picture {number} was drawn from none")


def intrinsics_to_keypoints(K_px: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b 3 2"]:
    """A camera as points that geometric augmentations carry along with its picture.

    The principal point, and the points one focal length to the right of it and below it. Kornia
    counts pixel centres at integers, ``K_px`` at integers + 0.5.
    """
    centre = K_px[:, :2, 2] - 0.5
    return torch.stack([centre, centre + K_px[:, :2, 0], centre + K_px[:, :2, 1]], dim=1)


def keypoints_to_intrinsics(points: Float[Tensor, "b 3 2"]) -> Float[Tensor, "b 3 3"]:
    """The camera that ``intrinsics_to_keypoints`` took apart; a flipped one has a focal length < 0.

    Raises:
        ValueError: the camera was turned or sheared, so its rows are no longer image axes.
    """
    centre = points[:, 0]
    across, down = points[:, 1] - centre, points[:, 2] - centre
    skewed = torch.maximum(across[:, 1].abs(), down[:, 0].abs())
    if bool((skewed > 1e-3 * across[:, 0].abs()).any()):
        raise ValueError("the camera was rotated or sheared; put FlatPaste before such a step")
    K_px = points.new_zeros(len(points), 3, 3)
    K_px[:, 0, 0], K_px[:, 1, 1], K_px[:, 2, 2] = across[:, 0], down[:, 1], 1.0
    K_px[:, :2, 2] = centre + 0.5
    return K_px
