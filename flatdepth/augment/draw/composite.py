"""The paste stage on the device: textures warped into the batch, with the exact truth.

Everything a layer needs per pixel is affine in (u, v): where on the surface the pixel looks times
its inverse depth, and the inverse depth itself, so the truth is exact by construction. Each layer
works on one window per image, of the same size for the whole batch, around its paste. No random
number is drawn here and nothing is read back to the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from flatdepth.augment.draw.content import Content, Opening, Reflection
from flatdepth.augment.draw.texture import COLUMNS, Canvas, canvas, draw_textures, look_row
from flatdepth.augment.plan.appearance import Kind
from flatdepth.augment.plan.layout import Paste
from flatdepth.geometry import Rectangle, project
from flatdepth.types import Batch, Region

ON_WALL = 0.06
_ROUND_TO = 8
_MARGIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One paste of each image of a batch of B; where an image has none, ``lines`` sees nothing.

    Attributes:
        windows: per image (top, left) of its window; (height, width) is the size of all.
        canvases: per image (height, width) of its texture in texels.
        spreads: per image (width, height) of ``Paste.spread_px``.
        lines: (B, 4, 3) float32, products with (u - W/2, v - H/2, 1): 0-1 the place in the texture
            (normalised -1..1) divided by z, 2 the inverse depth in 1/m, 3 the depth in metres of a
            legacy paste.
        centre: (B, 2) float32, u - W/2 and v - H/2 of the centre of the window's first pixel.
        region: (B, 1, 1, 1) uint8, region inside the frame.
        front: (B, 1, 1, 1) background nearer than ``front`` times the surface's depth stays in
            front.
        empty, opening, beyond, ignored, gradient: (B, 1, 1, 1) bool: an empty frame, an opening, a
            scene behind the plane as truth (in an opening or a mirror), a mirror without truth, a
            legacy depth.
        scene: (B, 3, height, width) uint8, what is behind an opening; None if there is none.
        scene_depth_m: (B, 1, height, width) float32, depth behind the plane, 0 unknown; None if
            there is none.
    """

    windows: tuple[tuple[int, int], ...]
    height: int
    width: int
    canvases: tuple[tuple[int, int], ...]
    spreads: tuple[tuple[int, int], ...]
    lines: Float[Tensor, "b 4 3"]
    centre: Float[Tensor, "b 2"]
    region: UInt8[Tensor, "b 1 1 1"]
    front: Float[Tensor, "b 1 1 1"]
    empty: Tensor
    opening: Tensor
    beyond: Tensor
    ignored: Tensor
    gradient: Tensor
    scene: Tensor | None
    scene_depth_m: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PasteGroup:
    """The plans of B images of a batch as tensors, in K layers from back to front.

    Attributes:
        images: which images.
        content: (K * B, 4, h, w) uint8, the pictures on their canvases and the grain, layer by
            layer.
        looks: (K * B, C) float32, ``texture.look_row`` of each.
        layers: K layers.
    """

    images: slice
    content: UInt8[Tensor, "n 4 h w"]
    looks: Float[Tensor, "n c"]
    layers: tuple[Layer, ...]

    def to(self, device: torch.device) -> "PasteGroup":
        """The same plans on another device, copied without blocking from pinned memory."""
        layers = tuple(_moved(layer, device) for layer in self.layers)
        return replace(_moved(self, device), layers=layers)


def _moved(value: Any, device: torch.device) -> Any:
    tensors = {}
    for entry in fields(value):
        tensor = getattr(value, entry.name)
        if isinstance(tensor, Tensor):
            copied = device.type == "cuda" and tensor.device.type == "cpu"
            pinned = tensor.pin_memory() if copied else tensor
            tensors[entry.name] = pinned.to(device, non_blocking=copied)
    return replace(value, **tensors)


def as_params(groups: Sequence[PasteGroup]) -> dict[str, Tensor]:
    """Groups as tensors by name, as Kornia's parameters are; ``from_params`` turns them back.

    Sizes and places that decide what runs are int64 on the CPU, so nobody waits to read them.
    """
    params: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        params[f"paste{number}.images"] = torch.tensor([group.images.start, group.images.stop])
        for name in ("content", "looks"):
            params[f"paste{number}.{name}"] = getattr(group, name)
        for place, layer in enumerate(group.layers):
            for entry in fields(Layer):
                value = getattr(layer, entry.name)
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    params[f"paste{number}.{place}.{entry.name}"] = tensor
    return params


def from_params(params: Mapping[str, Tensor]) -> tuple[PasteGroup, ...]:
    """The groups that ``as_params`` took apart; other parameters are passed over."""
    groups: list[PasteGroup] = []
    while (own := f"paste{len(groups)}.") + "images" in params:
        layers: list[Layer] = []
        while (prefix := f"{own}{len(layers)}.") + "lines" in params:
            values: dict[str, Any] = {
                entry.name: params.get(prefix + entry.name) for entry in fields(Layer)
            }
            for name in ("windows", "canvases", "spreads"):
                values[name] = tuple(map(tuple, values[name].tolist()))
            for name in ("height", "width"):
                values[name] = int(values[name])
            layers.append(Layer(**values))
        group = PasteGroup(
            images=slice(*params[own + "images"].tolist()),
            content=params[own + "content"],
            looks=params[own + "looks"],
            layers=tuple(layers),
        )
        groups.append(group)
    return tuple(groups)


def stack_plans(
    plans: Sequence[Sequence[Paste]],
    contents: Sequence[Sequence[Content]],
    K_px: Float64[np.ndarray, "b 3 3"],
    *,
    height: int,
    width: int,
    mirror_target: str = "surface",
    together: int = 1,
) -> tuple[PasteGroup, ...]:
    """Turn the plans of a batch of images into tensors on the CPU.

    Args:
        plans: per image its pastes from back to front.
        contents: per paste what it shows.
        K_px: intrinsics of the images.
        height, width: size of the images in pixels.
        mirror_target: as `paste.mirror_target`; what is virtual was made with the contents.
        together: images that are worked on at once. They share the size of textures and windows,
            so one by one is least work, and all at once the fewest kernels; the result is the same.
    """
    return tuple(
        _group(
            slice(first, first + together),
            plans[first : first + together],
            contents[first : first + together],
            K_px[first : first + together],
            image_size=(height, width),
            ignore_mirrors=mirror_target == "ignore",
        )
        for first in range(0, len(plans), together)
        if any(plans[first : first + together])
    )


def _group(
    images: slice,
    plans: Sequence[Sequence[Paste]],
    contents: Sequence[Sequence[Content]],
    K_px: NDArray[np.float64],
    *,
    image_size: tuple[int, int],
    ignore_mirrors: bool,
) -> PasteGroup:
    depth = max(len(plan) for plan in plans)
    sizes = [canvas(paste) for plan in plans for paste in plan]
    slot = (max(size.height for size in sizes), max(size.width for size in sizes))
    count = depth * len(plans)
    content = np.zeros((count, 4, *slot), dtype=np.uint8)
    content[:, 3] = 128
    looks = np.zeros((count, len(COLUMNS)))
    looks[:, [COLUMNS.index(name) for name in ("half_x", "half_y", "shadow_soft", "edge")]] = 1.0
    layers = []
    for number in range(depth):
        row = [plan[number] if number < len(plan) else None for plan in plans]
        shown = [own[number] if number < len(own) else None for own in contents]
        layers.append(
            _layer(row, shown, K_px, image_size=image_size, ignore_mirrors=ignore_mirrors)
        )
        for sample, (paste, own_content) in enumerate(zip(row, shown, strict=True)):
            if paste is None or own_content is None:
                continue
            place = number * len(plans) + sample
            looks[place] = look_row(paste)
            if own_content.picture is not None:
                size = canvas(paste)
                padded = np.pad(
                    own_content.picture,
                    ((size.pad_y, size.pad_y), (size.pad_x, size.pad_x), (0, 0)),
                    mode="edge",
                )
                content[place, :3, : size.height, : size.width] = padded.transpose(2, 0, 1)
            if own_content.grain is not None:
                rows, columns = own_content.grain.shape
                content[place, 3, :rows, :columns] = own_content.grain
    return PasteGroup(
        images=images,
        content=torch.from_numpy(content),
        looks=_float32(looks),
        layers=tuple(layers),
    )


def _layer(
    row: Sequence[Paste | None],
    shown: Sequence[Content | None],
    K_px: NDArray[np.float64],
    *,
    image_size: tuple[int, int],
    ignore_mirrors: bool,
) -> Layer:
    height, width = image_size
    batch = len(row)
    boxes = [
        None if paste is None else _bounds(paste, K_px[sample], image_size)
        for sample, paste in enumerate(row)
    ]
    window_height = min(height, _rounded_up(max(b[2] - b[0] for b in boxes if b is not None)))
    window_width = min(width, _rounded_up(max(b[3] - b[1] for b in boxes if b is not None)))
    windows = tuple(
        (0, 0)
        if box is None
        else (min(box[0], height - window_height), min(box[1], width - window_width))
        for box in boxes
    )
    canvases = [(1, 1)] * batch
    lines = np.zeros((batch, 4, 3))
    lines[:, 2, 2] = -1.0
    region = np.zeros(batch, dtype=np.uint8)
    front = np.zeros(batch)
    flags = np.zeros((5, batch), dtype=bool)
    scene = np.zeros((batch, 3, window_height, window_width), dtype=np.uint8)
    scene_depth = np.zeros((batch, 1, window_height, window_width), dtype=np.float32)
    from_centre = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
    for sample, (paste, content) in enumerate(zip(row, shown, strict=True)):
        if paste is None or content is None:
            continue
        size = canvas(paste)
        canvases[sample] = (size.height, size.width)
        lines[sample] = _lines(paste, K_px[sample]) @ from_centre
        region[sample] = int(paste.kind.region)
        front[sample] = paste.front
        opening = content.opening
        behind = opening or content.reflection
        flags[:, sample] = (
            paste.kind.is_decoy and opening is None,
            opening is not None,
            behind is not None,
            ignore_mirrors and paste.kind is Kind.MIRROR,
            paste.depth_gradient is not None,
        )
        if opening is not None:
            _put(scene[sample], opening.image.transpose(2, 0, 1), opening, windows[sample])
        if behind is not None:
            known = np.nan_to_num(behind.depth_m, nan=0.0, posinf=0.0)
            _put(scene_depth[sample], known[None], behind, windows[sample])
    offset = np.array([[left - width / 2 + 0.5, top - height / 2 + 0.5] for top, left in windows])

    def per_image(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values)[:, None, None, None]

    empty, opening_flag, beyond, ignored, gradient = map(per_image, flags)
    return Layer(
        windows=windows,
        height=window_height,
        width=window_width,
        canvases=tuple(canvases),
        spreads=tuple((0, 0) if paste is None else paste.spread_px for paste in row),
        lines=_float32(lines),
        centre=_float32(offset),
        region=per_image(region),
        front=per_image(front.astype(np.float32)),
        empty=empty,
        opening=opening_flag,
        beyond=beyond,
        ignored=ignored,
        gradient=gradient,
        scene=torch.from_numpy(scene) if opening_flag.any() else None,
        scene_depth_m=torch.from_numpy(scene_depth) if beyond.any() else None,
    )


def _put(
    target: NDArray[Any],
    source: NDArray[Any],
    part: Opening | Reflection,
    window: tuple[int, int],
) -> None:
    """Copy (C, h, w) from its place in the view to its place in a window."""
    top, left = part.top - window[0], part.left - window[1]
    rows = slice(max(top, 0), min(top + source.shape[1], target.shape[1]))
    columns = slice(max(left, 0), min(left + source.shape[2], target.shape[2]))
    target[:, rows, columns] = source[
        :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]


def _lines(paste: Paste, K_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """``Layer.lines`` of one paste, for products with (u, v, 1)."""
    size = canvas(paste)
    per_x, per_y = size.per_m
    to_texels = np.array([[per_x, 0, size.width / 2], [0, -per_y, size.height / 2], [0, 0, 1.0]])
    normalise = np.array([[2 / size.width, 0, -1], [0, 2 / size.height, -1], [0, 0, 1.0]])
    place = normalise @ to_texels @ paste.rectangle.pixel_matrix(K_px)
    return np.concatenate([place, [paste.depth_gradient or (0.0, 0.0, 0.0)]])


def _bounds(
    paste: Paste, K_px: NDArray[np.float64], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a paste with its shadow in the image, margins included."""
    height, width = image_size
    size: Canvas = canvas(paste)
    whole = Rectangle(
        centre=paste.rectangle.centre,
        right=paste.rectangle.right,
        up=paste.rectangle.up,
        width=size.width / size.per_m[0],
        height=size.height / size.per_m[1],
    )
    corners = whole.corners()
    if corners[:, 2].min() < 0.05 * paste.rectangle.centre[2]:
        return 0, 0, height, width
    points = project(K_px, corners)
    margin = np.array(paste.spread_px) + _MARGIN
    left, top = np.floor(points.min(axis=0)).astype(int) - margin
    right, bottom = np.ceil(points.max(axis=0)).astype(int) + margin
    return (
        int(np.clip(top, 0, height - 1)),
        int(np.clip(left, 0, width - 1)),
        int(np.clip(bottom, 1, height)),
        int(np.clip(right, 1, width)),
    )


def _rounded_up(size: int) -> int:
    return -(-size // _ROUND_TO) * _ROUND_TO


def _float32(array: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


@torch.no_grad()
def paste(
    batch: Batch, groups: Sequence[PasteGroup], *, depth_range_m: tuple[float, float]
) -> Batch:
    """Paste the planned mirrors, pictures and decoys into a batch, with their exact truth.

    Outside the pastes depth and valid are bit-identical to the input, and so is the image where no
    shadow falls. A pixel belongs to a paste if its centre lies inside the projected outline and
    nothing of the scene is in front of it (sharp corners lose a fraction of a texel); the edge is
    feathered inwards, as wide as the photograph's own edges are.

    Args:
        batch: float32 images and depth on any device.
        groups: of ``stack_plans``, on the same device.
        depth_range_m: (near, far); truth outside is not valid.

    Returns:
        A new batch; ``depth_m`` on a paste is the planar depth of its surface in metres, behind an
        opening that of the scene seen through it, in a mirror with a reflection that of its virtual
        image.
    """
    result = replace(
        batch,
        image=batch.image.clone(),
        depth_m=batch.depth_m.clone(),
        valid=batch.valid.clone(),
        region=batch.region.clone(),
    )
    with torch.autocast(batch.image.device.type, enabled=False):
        for group in groups:
            before, after = (_part(whole, group.images) for whole in (batch, result))
            textures = draw_textures(group.content, group.looks).chunk(len(group.layers))
            for layer, texture in zip(group.layers, textures, strict=True):
                _paste_layer(before, after, layer, texture, depth_range_m)
    return result


def _part(batch: Batch, images: slice) -> Batch:
    """Some images of a batch, as views."""
    return replace(batch, **{x.name: getattr(batch, x.name)[images] for x in fields(batch)})


def _paste_layer(
    before: Batch,
    result: Batch,
    layer: Layer,
    texture: Float[Tensor, "b c h w"],
    depth_range_m: tuple[float, float],
) -> None:
    image, depth, valid, region = (
        _windows(x, layer) for x in (result.image, result.depth_m, result.valid, result.region)
    )
    scene_m, known = _windows(before.depth_m, layer), _windows(before.valid, layer)
    height, width = image.shape[-2:]
    u = torch.arange(width, device=image.device, dtype=torch.float32) + layer.centre[:, :1]
    v = torch.arange(height, device=image.device, dtype=torch.float32) + layer.centre[:, 1:]
    lines = layer.lines[..., None]
    across = lines[:, :, 0] * u[:, None]
    down = lines[:, :, 1] * v[:, None] + lines[:, :, 2]
    affine = across[:, :, None, :] + down[..., None]
    inverse = affine[:, 2:3]
    z = inverse.clamp_min(1e-9).reciprocal()
    place = (affine[:, :2] * z).movedim(1, -1)
    # each from its own canvas, so that a picture's bits do not depend on its batch
    drawn = _together(
        [
            _sampled(own[None, :, :rows, :columns], at[None])
            for own, at, (rows, columns) in zip(texture, place, layer.canvases, strict=True)
        ]
    )
    colour, outer, inner, shade = drawn[:, :3], drawn[:, 3:4], drawn[:, 4:5], drawn[:, 5:6]

    nearer = known & (scene_m < layer.front * z)
    in_front = _majority(
        _together([_spread(own[None], by) for own, by in zip(nearer, layer.spreads, strict=True)])
    )
    seen = (outer > 0) & (inverse > 0) & (in_front <= 0.5)
    hole = inner > 0
    cover = seen & ~(layer.empty & hole)
    weight = outer.clamp(0, 1) * (1.25 - 2.5 * in_front).clamp(0, 1)
    weight = torch.where(layer.empty, weight * (-inner).clamp(0, 1), weight)
    truth = torch.where(layer.gradient, affine[:, 3:4], z)
    if layer.scene is not None:
        behind = layer.scene.to(torch.float32) / 255
        mix = (inner + 0.5).clamp(0, 1) * layer.opening
        colour = torch.lerp(colour, behind, mix)
    if layer.scene_depth_m is not None:
        truth = torch.where(layer.beyond & hole, layer.scene_depth_m, truth)

    on_wall = (~known | ((scene_m * inverse - 1).abs() < ON_WALL)) & (inverse > 0)
    # where something in front covers the paste, it covers the shadow
    on_wall &= (outer <= 0) | (in_front == 0)
    lit = image * (1 + shade * on_wall)
    image = torch.lerp(lit.clamp(0, 1), colour, weight * cover)
    in_range = (truth >= depth_range_m[0]) & (truth <= depth_range_m[1])
    valid = torch.where(cover, in_range & ~(layer.ignored & hole), valid)
    depth = torch.where(cover, torch.where(truth > 0, truth, 0.0), depth)
    kind = torch.where(hole, layer.region, torch.full_like(layer.region, int(Region.FRAME)))
    # through an empty frame one sees what is behind it: a mirror stays a mirror
    through = layer.empty & hole & (region != int(Region.BACKGROUND))
    region = torch.where(seen & ~through, kind, region)
    for whole, part in zip(
        (result.image, result.depth_m, result.valid, result.region),
        (image, depth, valid, region),
        strict=True,
    ):
        _put_windows(whole, part, layer)


def _sampled(
    texture: Float[Tensor, "1 c h w"], place: Float[Tensor, "1 rows columns 2"]
) -> Float[Tensor, "1 c rows columns"]:
    """``grid_sample`` of one image; on a CPU, where it only shares out batches, in equal bands."""
    rows, columns = place.shape[1:3]
    bands = 1
    if place.device.type == "cpu":
        bands = max(n for n in range(1, torch.get_num_threads() + 1) if rows % n == 0)
    drawn = F.grid_sample(
        texture.expand(bands, -1, -1, -1),
        place.view(bands, rows // bands, columns, 2),
        padding_mode="border",
        align_corners=False,
    )
    return drawn.transpose(0, 1).reshape(1, -1, rows, columns)


def _windows(x: Tensor, layer: Layer) -> Tensor:
    """The windows of a layer, (B, C, height, width)."""
    return _together(
        [
            own[None, :, top : top + layer.height, left : left + layer.width]
            for own, (top, left) in zip(x, layer.windows, strict=True)
        ]
    )


def _together(images: list[Tensor]) -> Tensor:
    return images[0] if len(images) == 1 else torch.cat(images)


def _put_windows(x: Tensor, windows: Tensor, layer: Layer) -> None:
    for own, window, (top, left) in zip(x, windows, layer.windows, strict=True):
        own[:, top : top + layer.height, left : left + layer.width] = window


def _spread(mask: Tensor, by: tuple[int, int]) -> Tensor:
    """All pixels within ``by`` (width, height) of one that is set."""
    if by == (0, 0):
        return mask
    kernel = (2 * by[1] + 1, 2 * by[0] + 1)
    return F.max_pool2d(mask.float(), kernel, stride=1, padding=(by[1], by[0])) > 0


def _majority(mask: Tensor) -> Tensor:
    """Share of the 5 x 5 neighbourhood that is set, in the image's windows.

    A depth camera's noise is single pixels, its objects are larger; above one half a pixel counts,
    and the share softens the edge.
    """
    height, width = mask.shape[-2:]
    padded = F.pad(mask.to(torch.uint8), (2, 2, 2, 2))
    rows = sum(padded[..., i : i + height, :] for i in range(1, 5)) + padded[..., :height, :]
    total = sum(rows[..., i : i + width] for i in range(1, 5)) + rows[..., :width]
    ones = torch.ones(1, device=mask.device)
    return total / (_reach(height, ones)[:, None] * _reach(width, ones))


def _reach(length: int, ones: Tensor) -> Tensor:
    """How many of the five pixels around each of ``length`` exist."""
    place = torch.arange(length, device=ones.device)
    return ones + place.clamp(max=2) + (length - 1 - place).clamp(max=2)
