"""The pixels of the paste stage: one fused projective warp per layer, in float32 on the device.

Everything a layer needs per pixel is affine in (u, v): where on the surface the pixel looks times
its inverse depth, the inverse depth itself (so truth is exact by construction) and the distances to
the edges. Contents are sampled once, from a mip atlas, so that minified contents do not alias. No
random number is drawn here, nothing is read back to the host, and there is no loop over samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from flatdepth.augment.layout import MIP_LEVELS, Paste
from flatdepth.geometry import edge_lines, project
from flatdepth.types import Batch, Region

_BEVEL = (0.14, -0.05, -0.16, 0.05)  # top, right, bottom, left: light from above left


@dataclass(frozen=True, slots=True, kw_only=True)
class PasteBatch:
    """The plans of a batch as tensors; K is the largest number of pastes in one image.

    Attributes:
        lines: (K, B, 11, 3) float32, products with (u - W/2, v - H/2, 1): 0-1 the place in the
            atlas (normalised -1..1) divided by z, 2 the inverse depth in 1/m, 3-6 the distances to
            the outer edges and 7-10 to the content's edges in pixels (top, right, bottom, left).
        bounds: (K, B, 4) normalised atlas coordinates (left, top, right, bottom) of the outermost
            texel centres of the content's source.
        region: (K, B) uint8, ``Region`` of the content; 0 where there is no paste.
        front: (K, B) background nearer than ``front`` times the surface's depth stays in front; 0
            lets nothing through.
        tint: (K, B, 3) factor on the content's colour.
        frame_colour: (K, B, 3) sRGB 0..1.
        picture: (K, B, 3, H, W) uint8 pictures stretched to the size of the image, zeros where
            there is none; None if the batch has no art.
    """

    lines: Float[Tensor, "k b 11 3"]
    bounds: Float[Tensor, "k b 4"]
    region: UInt8[Tensor, "k b"]
    front: Float[Tensor, "k b"]
    tint: Float[Tensor, "k b 3"]
    frame_colour: Float[Tensor, "k b 3"]
    picture: UInt8[Tensor, "k b 3 h w"] | None

    def to(self, device: torch.device) -> "PasteBatch":
        """The same plans on another device, copied without blocking from pinned memory."""
        moved = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                value = value.pin_memory() if device.type == "cuda" else value
                value = value.to(device, non_blocking=True)
            moved[entry.name] = value
        return PasteBatch(**moved)


def stack_plans(
    plans: Sequence[Sequence[Paste]],
    pictures: Sequence[Sequence[UInt8[np.ndarray, "h w 3"] | None]],
    K_px: Float64[np.ndarray, "b 3 3"],
    *,
    height: int,
    width: int,
) -> PasteBatch:
    """Turn the plans of B images into tensors on the CPU.

    Args:
        plans: per image its pastes from back to front.
        pictures: per paste its picture, stretched to (height, width, 3) uint8, None for a mirror.
        K_px: intrinsics of the images.
        height, width: size of the images in pixels.
    """
    layers, batch = max((len(plan) for plan in plans), default=0), len(plans)
    lines = np.zeros((layers, batch, 11, 3))
    lines[..., 3:, 2] = -1.0
    lines[..., 2, 2] = 1.0
    bounds = np.zeros((layers, batch, 4))
    region = np.zeros((layers, batch), dtype=np.uint8)
    front = np.zeros((layers, batch))
    tint = np.ones((layers, batch, 3))
    frame_colour = np.zeros((layers, batch, 3))
    any_picture = any(picture is not None for row in pictures for picture in row)
    picture_px = (
        np.zeros((layers, batch, 3, height, width), dtype=np.uint8) if any_picture else None
    )
    from_centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
    for number, (plan, row) in enumerate(zip(plans, pictures, strict=True)):
        for layer, (paste, picture) in enumerate(zip(plan, row, strict=True)):
            place = (layer, number)
            to_atlas, bounds[place] = _atlas_map(paste, height, width)
            lines[place] = _paste_lines(paste, to_atlas, K_px[number]) @ from_centre
            region[place] = int(paste.kind)
            front[place] = paste.front
            tint[place] = paste.gain * np.asarray(paste.tint)
            frame_colour[place] = paste.gain * np.asarray(paste.frame_colour)
            if picture is not None and picture_px is not None:
                picture_px[place] = picture.transpose(2, 0, 1)
    return PasteBatch(
        lines=_float32(lines),
        bounds=_float32(bounds),
        region=torch.from_numpy(region),
        front=_float32(front),
        tint=_float32(tint),
        frame_colour=_float32(frame_colour),
        picture=None if picture_px is None else torch.from_numpy(picture_px),
    )


def _paste_lines(
    paste: Paste, to_atlas: NDArray[np.float64], K_px: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``PasteBatch.lines`` of one paste, for products with (u, v, 1)."""
    content = paste.content
    to_unit = np.array([[1 / content.width, 0, 0.5], [0, -1 / content.height, 0.5], [0, 0, 1.0]])
    outlines = [edge_lines(project(K_px, part.corners())) for part in (paste.rectangle, content)]
    return np.concatenate([to_atlas @ to_unit @ content.pixel_matrix(K_px), *outlines])


def _float32(array: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _atlas_boxes(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of each mip level: level 0, and the others stacked beside it."""
    boxes = [(0, 0, width, height)]
    top = 0
    for level in range(1, MIP_LEVELS):
        boxes.append((width, top, max(1, width >> level), max(1, height >> level)))
        top += boxes[-1][3]
    return boxes


def _atlas_map(
    paste: Paste, height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From (s, t) on the content to normalised atlas coordinates, and the bounds of its level."""
    boxes = _atlas_boxes(height, width)
    atlas_width, atlas_height = boxes[0][2] + boxes[1][2], height
    box_left, box_top, box_width, box_height = boxes[paste.level]
    left, top, right, bottom = paste.portion
    to_pixels = np.array(
        [
            [box_width * (right - left), 0, box_left + box_width * left],
            [0, box_height * (bottom - top), box_top + box_height * top],
            [0, 0, 1.0],
        ]
    )
    normalise = np.array([[2 / atlas_width, 0, -1], [0, 2 / atlas_height, -1], [0, 0, 1.0]])
    corners = np.array(
        [
            [box_left + 0.5, box_left + box_width - 0.5],
            [box_top + 0.5, box_top + box_height - 0.5],
            [1.0, 1.0],
        ]
    )
    bounds = (normalise @ corners)[:2]
    return normalise @ to_pixels, np.concatenate([bounds[:, 0], bounds[:, 1]])


def mip_atlas(source: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h atlas_w"]:
    """The source and its box-filtered reductions by 2, 4 and 8 in one image."""
    height, width = source.shape[-2:]
    boxes = _atlas_boxes(height, width)
    atlas = source.new_zeros((*source.shape[:2], height, boxes[0][2] + boxes[1][2]))
    level = source
    for left, top, box_width, box_height in boxes:
        if level.shape[-2:] != (box_height, box_width):
            level = F.interpolate(level, (box_height, box_width), mode="area")
        atlas[..., top : top + box_height, left : left + box_width] = level
    return atlas


@torch.no_grad()
def paste(batch: Batch, plans: PasteBatch, *, depth_range_m: tuple[float, float]) -> Batch:
    """Paste the planned mirrors and art into a batch, with their exact planar truth.

    Outside the pastes image, depth and valid are bit-identical to the input. A pixel belongs to a
    paste if its centre lies inside the projected outline (and nothing of the scene is in front of
    it); the edge is feathered inwards over one pixel.

    Args:
        batch: float32 images and depth on any device.
        plans: on the same device.
        depth_range_m: (near, far); truth outside is not valid.

    Returns:
        A new batch; ``depth_m`` on a paste is the planar depth of its surface in metres.
    """
    image, depth, valid, region = batch.image, batch.depth_m, batch.valid, batch.region
    height, width = image.shape[-2:]
    device = image.device
    u = torch.arange(width, device=device, dtype=torch.float32) + (0.5 - width / 2)
    v = torch.arange(height, device=device, dtype=torch.float32) + (0.5 - height / 2)
    bevel = torch.tensor(_BEVEL, device=device)
    with torch.autocast(device.type, enabled=False):
        for layer in range(plans.lines.shape[0]):
            lines = plans.lines[layer][..., None]
            affine = lines[:, :, 0] * u
            affine = affine[:, :, None, :] + (lines[:, :, 1] * v + lines[:, :, 2])[..., None]
            inverse_depth = affine[:, 2:3]
            outer, side = affine[:, 3:7].min(dim=1, keepdim=True)
            inner = affine[:, 7:11].amin(dim=1, keepdim=True)
            z = inverse_depth.clamp_min(1e-9).reciprocal()
            in_front = batch.valid & (batch.depth_m < plans.front[layer][:, None, None, None] * z)
            cover = (outer > 0) & ~in_front

            place = (affine[:, :2] * z).movedim(1, -1)
            bounds = plans.bounds[layer][:, None, None, :]
            place = torch.minimum(torch.maximum(place, bounds[..., :2]), bounds[..., 2:])
            atlas = mip_atlas(_sources(batch.image, plans, layer))
            content = F.grid_sample(atlas, place, padding_mode="border", align_corners=False)
            content = content * plans.tint[layer][..., None, None]
            frame = plans.frame_colour[layer][..., None, None] * (1 + bevel[side])
            colour = torch.lerp(frame, content, inner.clamp(0, 1)).clamp(0, 1)
            image = torch.where(cover, torch.lerp(image, colour, outer.clamp(0, 1)), image)

            depth = torch.where(cover, z, depth)
            in_range = (z >= depth_range_m[0]) & (z <= depth_range_m[1])
            valid = torch.where(cover, in_range, valid)
            kind = plans.region[layer][:, None, None, None]
            kind = torch.where(inner > 0, kind, torch.full_like(kind, int(Region.FRAME)))
            region = torch.where(cover, kind, region)
    return replace(batch, image=image, depth_m=depth, valid=valid, region=region)


def _sources(image: Tensor, plans: PasteBatch, layer: int) -> Tensor:
    """What each sample's paste shows: the image itself for mirrors, else its picture."""
    if plans.picture is None:
        return image
    is_mirror = (plans.region[layer] == int(Region.MIRROR))[:, None, None, None]
    return torch.where(is_mirror, image, plans.picture[layer].to(torch.float32) / 255)
