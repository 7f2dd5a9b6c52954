"""Pastes drawn flat, on the device: content, mat, frame, light and outline in their own plane.

A texture has its own pixels ("texels"), x to the right and y down, centres at integer + 0.5, as
many across the picture as ``Paste.picture_px``. ``composite`` warps it into the image once.
Outlines are signed distances in texels, so that edges are anti-aliased by interpolating them.

The outline of a paste is a box with elliptical corners and one straight cut per corner, which makes
rectangles, rounded rectangles, ellipses, arches, hexagons, octagons and diamonds.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from flatdepth.augment.plan.layout import Paste

COLUMNS = (
    *("centre_x", "centre_y", "half_x", "half_y", "frame_x", "frame_y", "picture_x", "picture_y"),
    *("top_x", "top_y", "bottom_x", "bottom_y", "cut_x", "cut_y", "cut", "framed", "hollow"),
    *("frame_r", "frame_g", "frame_b", "lip_r", "lip_g", "lip_b", "mat_r", "mat_g", "mat_b"),
    *("tint_r", "tint_g", "tint_b", "lip", "profile_a", "profile_b", "relief", "light"),
    *("falloff_x", "falloff_y", "glare", "glare_x", "glare_y", "glare_offset", "glare_width"),
    *("shadow", "shadow_x", "shadow_y", "shadow_soft", "edge"),
)
CHANNELS = 6  # red, green, blue, distance to the outline, to the frame's inner edge, shade
LIGHT_FROM = (-0.35, -0.94)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """The texels of one texture.

    Attributes:
        width, height: of the texture, margins for the frame and the shadow included.
        pad_x, pad_y: texels left and right of, above and below the picture.
        per_m: (x, y) texels per metre.
    """

    width: int
    height: int
    pad_x: int
    pad_y: int
    per_m: tuple[float, float]


def canvas(paste: Paste) -> Canvas:
    """How large a paste's texture is."""
    box, look = paste.picture_box, paste.look
    width, height = paste.picture_px
    per_m = (width / box.width, height / box.height)
    strength, shadow_x, shadow_y, soft = look.shadow
    reach_m = soft + max(abs(shadow_x), abs(shadow_y)) if strength else 0.0
    margin_m = look.frame_m + look.mat_m + reach_m
    pad_x, pad_y = (math.ceil(margin_m * scale) + 3 for scale in per_m)
    return Canvas(
        width=width + 2 * pad_x,
        height=height + 2 * pad_y,
        pad_x=pad_x,
        pad_y=pad_y,
        per_m=per_m,
    )


def look_row(paste: Paste) -> Float64[np.ndarray, " columns"]:
    """The numbers of ``COLUMNS`` for one paste, in texels."""
    look, size = paste.look, canvas(paste)
    per_x, per_y = size.per_m
    half_x = 0.5 * paste.rectangle.width * per_x
    half_y = 0.5 * paste.rectangle.height * per_y
    cut_x, cut_y, cut = look.cut
    steepness = math.hypot(cut_x / half_x, cut_y / half_y)
    unlimited = steepness == 0
    no_mat = look.mat_m == 0
    glare, glare_nx, glare_ny, glare_offset, glare_width = look.glare
    strength, shadow_x, shadow_y, soft = look.shadow
    values = {
        "centre_x": size.width / 2,
        "centre_y": size.height / 2,
        "half_x": half_x,
        "half_y": half_y,
        "frame_x": look.frame_m * per_x,
        "frame_y": look.frame_m * per_y,
        "picture_x": 1e6 if no_mat else paste.picture_px[0] / 2,
        "picture_y": 1e6 if no_mat else paste.picture_px[1] / 2,
        "top_x": look.radius_top[0] * half_x,
        "top_y": look.radius_top[1] * half_y,
        "bottom_x": look.radius_bottom[0] * half_x,
        "bottom_y": look.radius_bottom[1] * half_y,
        "cut_x": 0.0 if unlimited else cut_x / half_x / steepness,
        "cut_y": 0.0 if unlimited else cut_y / half_y / steepness,
        "cut": 1e6 if unlimited else cut / steepness,
        "framed": float(look.frame_m > 0),
        "hollow": float(paste.kind.is_decoy),
        "lip": look.lip,
        "profile_a": look.profile[0],
        "profile_b": look.profile[1],
        "relief": look.relief,
        "light": look.light,
        "falloff_x": look.falloff[0] / half_x,
        "falloff_y": look.falloff[1] / half_y,
        "glare": glare,
        "glare_x": glare_nx / half_x / glare_width,
        "glare_y": glare_ny / half_y / glare_width,
        "glare_offset": glare_offset / glare_width,
        "glare_width": glare_width,
        "shadow": strength,
        "shadow_x": shadow_x * per_x,
        "shadow_y": shadow_y * per_y,
        "shadow_soft": soft * math.sqrt(per_x * per_y),
        "edge": edge_texels(paste),
    }
    for name in ("frame", "lip", "mat"):
        for channel, value in zip("rgb", getattr(look, f"{name}_colour"), strict=True):
            values[f"{name}_{channel}"] = value
    for channel, value in zip("rgb", look.tint, strict=True):
        values[f"tint_{channel}"] = value
    return np.array([values[name] for name in COLUMNS])


def edge_texels(paste: Paste) -> float:
    """Width in texels of a linear ramp that is as soft as the photograph's edges."""
    return max(1.0, math.sqrt(12) * paste.look.sharpness_px)


def draw_textures(
    content: UInt8[Tensor, "n 4 h w"], looks: Float[Tensor, "n columns"]
) -> Float[Tensor, "n channels h w"]:
    """Draw N pastes flat.

    Args:
        content: pictures in the middle of their canvases, repeated beyond their borders, and
            grain, 128 for none; the canvases lie in the top left corners.
        looks: float32 rows of ``look_row``.

    Returns:
        float32 (N, 6, H, W): sRGB 0..1; signed distances to the outline and to the frame's inner
        edge in widths of an edge (``edge_texels``), positive inside, cut off at +-1; relative
        change of the light on the wall.
        Without a frame the second distance is 1 everywhere.
    """
    p = {name: looks[:, i, None, None] for i, name in enumerate(COLUMNS)}
    height, width = content.shape[-2:]
    x = torch.arange(width, device=content.device, dtype=torch.float32) + 0.5 - p["centre_x"]
    y = torch.arange(height, device=content.device, dtype=torch.float32)[:, None] + 0.5
    y = y - p["centre_y"]
    ax, ay = x.abs(), y.abs()
    outer = _inside(ax, ay, y, p)
    inner = _inside(ax, ay, y, _inset(p))
    inner = torch.where(p["framed"] > 0, inner, 1e6)

    values = content.to(torch.float32) / 255
    shown, grain = values[:, :3], values[:, 3:] - 128 / 255
    falloff = 1 + p["falloff_x"] * x + p["falloff_y"] * y
    across = p["glare_x"] * x + p["glare_y"] * y - p["glare_offset"]
    glare = p["glare"] * torch.exp(-across.square())
    picture = shown * (_rgb(p, "tint") * falloff[:, None])
    picture += glare[:, None] * (1 - picture)
    on_picture = (torch.minimum(p["picture_x"] - ax, p["picture_y"] - ay) / p["edge"] + 0.5).clamp(
        0, 1
    )
    lit = (p["light"] * falloff)[:, None]
    picture = torch.lerp(_rgb(p, "mat") * lit, picture, on_picture[:, None])

    band = (outer - inner).clamp_min(1e-6)
    depth_in = (outer / band).clamp(0, 1)
    on_lip = ((depth_in - 1 + p["lip"]) * band / p["edge"] + 0.5).clamp(0, 1) * (p["lip"] > 0)
    frame = torch.lerp(_rgb(p, "frame"), _rgb(p, "lip"), on_lip[:, None])
    slant = p["relief"] * _slant(x, y, ax, ay, p) * (p["profile_a"] + p["profile_b"] * depth_in)
    frame = frame * (lit * (1 + slant)[:, None])
    opaque = (inner / p["edge"] + 0.5).clamp(0, 1) * (1 - p["hollow"])
    drawn = shown.new_empty(len(content), CHANNELS, height, width)
    torch.clamp(torch.lerp(frame, picture, opaque[:, None]) + grain, 0, 1, out=drawn[:, :3])

    shifted_x, shifted_y = x - p["shadow_x"], y - p["shadow_y"]
    wall = _inside(shifted_x.abs(), shifted_y.abs(), shifted_y, p)
    dark = (0.5 + 0.5 * wall / p["shadow_soft"]).clamp(0, 1).square()
    torch.clamp(outer / p["edge"], -1, 1, out=drawn[:, 3])
    torch.clamp(inner / p["edge"], -1, 1, out=drawn[:, 4])
    torch.mul(-p["shadow"], dark, out=drawn[:, 5])
    return drawn


def _rgb(p: dict[str, Tensor], name: str) -> Tensor:
    return torch.stack([p[f"{name}_{channel}"] for channel in "rgb"], dim=1)


def _inset(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outline of the frame's inner edge."""
    moved = dict(p)
    for axis in "xy":
        moved[f"half_{axis}"] = p[f"half_{axis}"] - p[f"frame_{axis}"]
        for end in ("top", "bottom"):
            moved[f"{end}_{axis}"] = (p[f"{end}_{axis}"] - p[f"frame_{axis}"]).clamp_min(0)
    moved["cut"] = p["cut"] - torch.hypot(p["cut_x"] * p["frame_x"], p["cut_y"] * p["frame_y"])
    return moved


def _inside(ax: Tensor, ay: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Signed distance to an outline in texels, positive inside.

    Exact for straight edges. For elliptical corners to first order (Sampson distance): with
    e = |(x / r_x, y / r_y)|, the distance from e = 1 is (1 - e) / |grad e|.
    """
    radius_x = torch.where(y < 0, p["top_x"], p["bottom_x"])
    radius_y = torch.where(y < 0, p["top_y"], p["bottom_y"])
    round_x, round_y = radius_x.clamp_min(1e-3), radius_y.clamp_min(1e-3)
    ex = (ax - p["half_x"]) / round_x + 1
    ey = (ay - p["half_y"]) / round_y + 1
    e = torch.hypot(ex, ey)
    corner = e * (1 - e) / torch.hypot(ex / round_x, ey / round_y).clamp_min(1e-6)
    box = torch.minimum(p["half_x"] - ax, p["half_y"] - ay)
    in_corner = (ex > 0) & (ey > 0) & (radius_x > 0) & (radius_y > 0)
    distance = torch.where(in_corner, corner, box)
    return torch.minimum(distance, p["cut"] - p["cut_x"] * ax - p["cut_y"] * ay)


def _slant(x: Tensor, y: Tensor, ax: Tensor, ay: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Cosine between the light and the outward normal of the nearest side of the frame."""
    from_side = (p["half_x"] - ax) * p["frame_y"]
    from_top = (p["half_y"] - ay) * p["frame_x"]
    light_x, light_y = LIGHT_FROM[0] * x.sign(), LIGHT_FROM[1] * y.sign()
    # soft over the mitre
    across = torch.hypot(p["frame_x"], p["frame_y"]).clamp_min(1e-6) * p["edge"]
    return torch.lerp(light_y, light_x, ((from_top - from_side) / across + 0.5).clamp(0, 1))
