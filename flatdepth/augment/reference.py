"""The paste stage again: slow, in numpy float64, by other routes; what tests hold ``composite`` to.

A pixel's ray is cut with the plane and the point measured in metres along the paste's sides
(composite has one affine form for both); the texture is drawn from the look itself, in metres, and
sampled point by point; the whole image is worked on, not a window.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from flatdepth.augment.draw.content import Content
from flatdepth.augment.plan.layout import Paste
from flatdepth.geometry import pixel_rays
from flatdepth.types import Region


def paste_reference(
    image: Float32[np.ndarray, "h w 3"],
    depth_m: Float32[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    plan: Sequence[Paste],
    contents: Sequence[Content],
    K_px: Float64[np.ndarray, "3 3"],
    *,
    depth_range_m: tuple[float, float],
    mirror_target: str = "surface",
) -> tuple[
    Float64[np.ndarray, "h w 3"],
    Float64[np.ndarray, "h w"],
    Bool[np.ndarray, "h w"],
    UInt8[np.ndarray, "h w"],
]:
    """Paste one image's plan; arguments and results as in ``composite.paste``, for one sample."""
    height, width = depth_m.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    rays = pixel_rays(K_px, u, v)
    out_image, out_depth, out_valid = image.astype(float), depth_m.astype(float), valid.copy()
    region = np.zeros((height, width), dtype=np.uint8)
    for paste, content in zip(plan, contents, strict=True):
        box = paste.rectangle
        normal = np.cross(box.right, box.up)
        towards = rays @ normal
        z = (normal @ box.centre) / np.where(towards == 0, np.inf, towards)
        facing = (towards * (normal @ box.centre)) > 0
        points = z[..., None] * rays - box.centre
        a, b = points @ box.right, -(points @ box.up)
        drawn = _drawn(paste, content, np.where(facing, a, 1e9), np.where(facing, b, 1e9))
        colour, outer, inner, shade = drawn[..., :3], drawn[..., 3], drawn[..., 4], drawn[..., 5]

        near = valid & (depth_m < paste.front * np.where(facing, z, 1e9))
        across, down = paste.spread_px
        spread = np.zeros_like(near)
        padded = np.pad(near, ((down, down), (across, across)))
        for i in range(2 * down + 1):
            for j in range(2 * across + 1):
                spread |= padded[i : i + height, j : j + width]
        in_front = _mean_of_25(spread)
        seen = (outer > 0) & facing & (in_front <= 0.5)
        hole = inner > 0
        is_empty = paste.kind.is_decoy and content.opening is None
        cover = seen & ~(hole & is_empty)
        weight = np.clip(outer, 0, 1) * np.clip(1.25 - 2.5 * in_front, 0, 1)
        if is_empty:
            weight = weight * np.clip(-inner, 0, 1)
        truth = z
        if paste.depth_gradient is not None:
            truth = np.stack([u, v, np.ones_like(u)], -1) @ paste.depth_gradient
        if content.opening is not None:
            opening = content.opening
            rows = slice(opening.top, opening.top + opening.image.shape[0])
            columns = slice(opening.left, opening.left + opening.image.shape[1])
            scene, scene_m = np.zeros_like(out_image), np.zeros_like(out_depth)
            scene[rows, columns] = opening.image / 255
            scene_m[rows, columns] = np.nan_to_num(opening.depth_m, nan=0.0, posinf=0.0)
            colour = colour + np.clip(inner + 0.5, 0, 1)[..., None] * (scene - colour)
            truth = np.where(hole, scene_m, truth)
        if content.reflection is not None:
            virtual = content.reflection
            behind = np.zeros_like(out_depth)
            for (row, column), own in np.ndenumerate(virtual.depth_m):
                behind[virtual.top + row, virtual.left + column] = own if np.isfinite(own) else 0.0
            truth = np.where(hole, behind, truth)

        with np.errstate(divide="ignore"):
            on_wall = facing & (~valid | (np.abs(depth_m / z - 1) < 0.06))
        on_wall &= (outer <= 0) | (in_front == 0)
        lit = np.clip(out_image * (1 + shade * on_wall)[..., None], 0, 1)
        blended = lit + weight[..., None] * (colour - lit)
        out_image = np.where(cover[..., None], blended, lit)
        in_range = (truth >= depth_range_m[0]) & (truth <= depth_range_m[1])
        if mirror_target == "ignore" and paste.kind.region is Region.MIRROR:
            in_range = in_range & ~hole
        out_valid = np.where(cover, in_range, out_valid)
        out_depth = np.where(cover, np.maximum(truth, 0), out_depth)
        kind = np.where(hole, int(paste.kind.region), int(Region.FRAME))
        through = is_empty & hole & (region != Region.BACKGROUND)
        region = np.where(seen & ~through, kind, region).astype(np.uint8)
    return out_image, out_depth, out_valid, region


def _mean_of_25(mask: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    total, count = np.zeros((height, width)), np.zeros((height, width))
    padded, there = np.pad(mask.astype(float), 2), np.pad(np.ones((height, width)), 2)
    for i in range(5):
        for j in range(5):
            total += padded[i : i + height, j : j + width]
            count += there[i : i + height, j : j + width]
    return total / count


def _drawn(paste: Paste, content: Content, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The texture at points (a, b) in metres right of and below the paste's centre, bilinear."""
    picture_width, picture_height = paste.picture_px
    box = paste.picture_box
    per_a, per_b = picture_width / box.width, picture_height / box.height
    strength, shadow_x, shadow_y, soft = paste.look.shadow
    reach = soft + max(abs(shadow_x), abs(shadow_y)) if strength else 0.0
    margin = paste.look.frame_m + paste.look.mat_m + reach
    pad_x, pad_y = math.ceil(margin * per_a) + 3, math.ceil(margin * per_b) + 3
    width, height = picture_width + 2 * pad_x, picture_height + 2 * pad_y
    texture = _texture(paste, content, width, height, pad_x, pad_y, per_a, per_b)
    column = np.clip(a * per_a + width / 2, 0.5, width - 0.5) - 0.5
    row = np.clip(b * per_b + height / 2, 0.5, height - 0.5) - 0.5
    i0, j0 = np.floor(column).astype(int), np.floor(row).astype(int)
    i1, j1 = np.minimum(i0 + 1, width - 1), np.minimum(j0 + 1, height - 1)
    x, y = (column - i0)[..., None], (row - j0)[..., None]
    upper = texture[j0, i0] * (1 - x) + texture[j0, i1] * x
    lower = texture[j1, i0] * (1 - x) + texture[j1, i1] * x
    return upper * (1 - y) + lower * y


def _texture(
    paste: Paste,
    content: Content,
    width: int,
    height: int,
    pad_x: int,
    pad_y: int,
    per_a: float,
    per_b: float,
) -> np.ndarray:
    look = paste.look
    edge = max(1.0, math.sqrt(12) * look.sharpness_px)
    grain = np.zeros((height, width))
    if content.grain is not None:
        grain = (content.grain.astype(float) - 128) / 255
    half_a, half_b = paste.rectangle.width / 2, paste.rectangle.height / 2
    b, a = np.meshgrid(
        (np.arange(height) + 0.5 - height / 2) / per_b,
        (np.arange(width) + 0.5 - width / 2) / per_a,
        indexing="ij",
    )
    outer = _distance(paste, a, b, 0.0, per_a, per_b)
    inner = np.full_like(a, 1e6)
    if look.frame_m > 0:
        inner = _distance(paste, a, b, look.frame_m, per_a, per_b)

    falloff = 1 + look.falloff[0] * a / half_a + look.falloff[1] * b / half_b
    picture = np.zeros((height, width, 3))
    if content.picture is not None:
        rows = np.clip(np.arange(height) - pad_y, 0, content.picture.shape[0] - 1)
        columns = np.clip(np.arange(width) - pad_x, 0, content.picture.shape[1] - 1)
        picture = content.picture[rows][:, columns] / 255
    picture = picture * np.array(look.tint) * falloff[..., None]
    strength, glare_x, glare_y, offset, spread = look.glare
    band = (glare_x * a / half_a + glare_y * b / half_b - offset) / spread
    glare = strength * np.exp(-(band**2))[..., None]
    picture = picture + glare * (1 - picture)
    lit = look.light * falloff[..., None]
    if look.mat_m > 0:
        box = paste.picture_box
        inside = np.minimum(
            (box.width / 2 - np.abs(a)) * per_a, (box.height / 2 - np.abs(b)) * per_b
        )
        share = np.clip(inside / edge + 0.5, 0, 1)[..., None]
        picture = picture * share + np.array(look.mat_colour) * lit * (1 - share)

    band = np.maximum(outer - inner, 1e-6)
    t = np.clip(outer / band, 0, 1)
    frame = np.array(look.frame_colour)
    if look.lip > 0:
        on_lip = np.clip((t - (1 - look.lip)) * band / edge + 0.5, 0, 1)[..., None]
        frame = frame * (1 - on_lip) + np.array(look.lip_colour) * on_lip
    # distance from the mitre's line in texels, positive nearer to a vertical side
    frame_x, frame_y = look.frame_m * per_a, look.frame_m * per_b
    mitre = (half_b - np.abs(b)) * per_b * frame_x - (half_a - np.abs(a)) * per_a * frame_y
    mitre = mitre / max(math.hypot(frame_x, frame_y), 1e-6)
    at_side = np.clip(mitre / edge + 0.5, 0, 1)
    facing_light = -0.35 * np.sign(a) * at_side - 0.94 * np.sign(b) * (1 - at_side)
    slant = look.relief * facing_light * (look.profile[0] + look.profile[1] * t)
    frame = frame * lit * (1 + slant)[..., None]
    opaque = np.zeros_like(a) if paste.kind.is_decoy else np.clip(inner / edge + 0.5, 0, 1)
    colour = np.clip(frame + opaque[..., None] * (picture - frame) + grain[..., None], 0, 1)

    shade, shadow_a, shadow_b, soft = look.shadow
    wall = _distance(paste, a - shadow_a, b - shadow_b, 0.0, per_a, per_b)
    dark = np.clip(0.5 + 0.5 * wall / (soft * math.sqrt(per_a * per_b)), 0, 1) ** 2
    edges = [np.clip(outer / edge, -1, 1), np.clip(inner / edge, -1, 1), -shade * dark]
    return np.concatenate([colour, np.stack(edges, -1)], -1)


def _distance(
    paste: Paste, a: np.ndarray, b: np.ndarray, inset_m: float, per_a: float, per_b: float
) -> np.ndarray:
    """Signed distance in texels from the outline moved inwards by ``inset_m``, positive inside."""
    look = paste.look
    full = np.array([paste.rectangle.width / 2 * per_a, paste.rectangle.height / 2 * per_b])
    inset = inset_m * np.array([per_a, per_b])
    half = full - inset
    x, y = np.abs(a) * per_a, np.abs(b) * per_b
    distance = np.minimum(half[0] - x, half[1] - y)
    for radii, end in ((look.radius_top, b < 0), (look.radius_bottom, b >= 0)):
        radius = np.maximum(np.array(radii) * full - inset, 0.0)
        if radius.min() <= 0:
            continue
        dx, dy = x - (half[0] - radius[0]), y - (half[1] - radius[1])
        corner = end & (dx > 0) & (dy > 0)
        # f(dx, dy) = |(dx / r_x, dy / r_y)| is 1 on the ellipse: (1 - f) / |grad f|
        f = np.sqrt((dx / radius[0]) ** 2 + (dy / radius[1]) ** 2)
        gradient = np.sqrt((dx / radius[0] ** 2) ** 2 + (dy / radius[1] ** 2) ** 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            rounded = f * (1 - f) / gradient
        distance = np.where(corner, rounded, distance)
    cut_x, cut_y, cut = look.cut
    if cut_x or cut_y:
        normal = np.array([cut_x, cut_y]) / full
        length = float(np.hypot(*normal))
        normal /= length
        line = cut / length - float(np.hypot(*(normal * inset)))
        distance = np.minimum(distance, line - normal[0] * x - normal[1] * y)
    return distance
