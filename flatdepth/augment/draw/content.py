"""What a paste shows, as pixels of the right size, made on the CPU in a loader thread.

A picture is cut from its source and reduced (anti-aliased, each axis by itself) to the size at
which it is seen, so the device has one bilinear warp to do and little is copied to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFilter

from flatdepth.augment.draw.stylise import Style, stylise
from flatdepth.augment.draw.texture import canvas
from flatdepth.augment.plan.appearance import Kind
from flatdepth.augment.plan.layout import CONTRAST, Paste
from flatdepth.augment.rng import Draws
from flatdepth.geometry import View, project, sample_depth, view_depth
from flatdepth.types import Frame, Region

GAP_BEHIND = 1.03
"""At least so many times as far away as the surface is what lies behind it."""

PICTURE_CACHE = 96
"""Pictures of a collection that are kept decoded."""

PICTURE_SIDE = 768


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Another scene seen through an opening: a part of the image, with its own depth.

    Attributes:
        left, top: of the part, in view pixels.
        image: (h, w, 3) uint8.
        depth_m: (h, w) float32 planar z in metres behind the opening's plane; NaN unknown.
    """

    left: int
    top: int
    image: UInt8[np.ndarray, "h w 3"]
    depth_m: Float32[np.ndarray, "h w"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflection:
    """The virtual image of a mirror over a part of the view, where that is the truth.

    Attributes:
        left, top: of the part, in view pixels.
        depth_m: (h, w) float32 planar z in metres behind the mirror's plane; NaN unknown.
    """

    left: int
    top: int
    depth_m: Float32[np.ndarray, "h w"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a paste shows: ``picture`` of (height, width) = ``Paste.picture_px``, or an opening.

    An empty frame, and an opening for which no scene fits, has neither. ``grain`` is the
    photograph's noise over the whole canvas, frame and mat included, 128 for none; None if it has
    none. ``reflection`` is the truth of a mirror's picture if that is not its surface.
    """

    grain: UInt8[np.ndarray, "canvas_h canvas_w"] | None = None
    picture: UInt8[np.ndarray, "h w 3"] | None = None
    opening: Opening | None = None
    reflection: Reflection | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where contents come from.

    Attributes:
        picture: picture of the art collection by its number, (h, w, 3) uint8.
        frame: any of the data set's frames by a number from 0 on, counted round and round.
    """

    picture: Callable[[int], UInt8[np.ndarray, "h w 3"]]
    frame: Callable[[int], Frame]


class Scene(NamedTuple):
    """A paste and what its content may be made from, as ``make_content`` is given them."""

    paste: Paste
    frame: Frame
    view: View
    K_px: np.ndarray
    sources: Sources
    mirror_target: str


def reduced(picture: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """A picture to hang, at ``PICTURE_SIDE`` pixels on its longer side if it is larger."""
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def true_depth(frame: Frame, mirror_target: str) -> Float32[np.ndarray, "h w"]:
    """The depth of a frame that is truth, (h, w) planar z in metres; NaN where there is none.

    On the frame's own labelled mirrors it is their surface. If ``mirror_target`` (as
    `paste.mirror_target`) is another there is none, but with ``virtual`` what was measured instead
    of the surface (``Frame.behind_m``).
    """
    if mirror_target == "surface" or frame.region is None:
        return frame.depth_m
    other: Float32[np.ndarray, "h w"] | np.float32 = np.float32(np.nan)
    if mirror_target == "virtual" and frame.behind_m is not None:
        other = frame.behind_m
    return np.where(frame.region == Region.MIRROR, other, frame.depth_m)


def make_content(
    paste: Paste,
    frame: Frame,
    view: View,
    K_px: np.ndarray,
    sources: Sources,
    mirror_target: str = "surface",
) -> Content:
    """Make what a paste into a view of ``frame`` with intrinsics ``K_px`` shows.

    ``mirror_target``, as `paste.mirror_target`, changes no picture.
    """
    grain = _grain(paste)
    scene = Scene(paste, frame, view, K_px, sources, mirror_target)
    shown = CONTENTS[paste.kind](scene)
    if shown is None or isinstance(shown, Opening):
        return Content(grain=grain, opening=shown)
    virtual = paste.kind is Kind.MIRROR and mirror_target == "virtual"
    return Content(
        grain=grain,
        picture=_worn(shown, paste),
        reflection=_reflection(scene) if virtual else None,
    )


def _mirrored(scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    assert scene.paste.portion is not None
    left, top, right, bottom = scene.paste.portion
    u, v = scene.view.source_pixels(np.array([left, right]), np.array([top, bottom]))
    return _softened(scene.frame.image, (u[0], v[0], u[1], v[1]), scene.paste)


def _reflection(scene: Scene) -> Reflection:
    """The scene behind a mirror's plane whose picture the mirror shows.

    The mirror's picture is the portion under a homography: a pixel p of the view shows the point q
    of the photograph with M p = q / z_surface(p), where M is ``Rectangle.pixel_matrix`` followed by
    the affine map from the rectangle to the portion. The linear map X' = s K^-1 M^-1 K X takes the
    photographed scene to one of which this camera's picture is just that: X = z(q) K^-1 q becomes
    s z(q) z_surface(p) K^-1 p, so

        z'(p) = s z(q) z_surface(p)

    and planes stay planes. With s the nearest point of the portion comes to lie ``GAP_BEHIND``
    times as far away as the surface.
    """
    paste = scene.paste
    assert paste.portion is not None
    left, top, right, bottom = _seen_part(paste, scene.view, scene.K_px)
    v, u = np.mgrid[top:bottom, left:right] + 0.5
    pixels = np.stack([u, v, np.ones_like(u)])
    a, b, inverse = np.tensordot(paste.rectangle.pixel_matrix(scene.K_px), pixels, axes=1)
    surface = np.divide(1.0, inverse, out=np.zeros_like(inverse), where=inverse > 0)
    box = paste.picture_box
    x = (0.5 + a * surface / box.width).clip(0, 1)
    y = (0.5 - b * surface / box.height).clip(0, 1)
    portion_left, portion_top, portion_right, portion_bottom = paste.portion
    source = scene.view.source_pixels(
        portion_left + x * (portion_right - portion_left),
        portion_top + y * (portion_bottom - portion_top),
    )
    depth_m = torch.from_numpy(np.ascontiguousarray(true_depth(scene.frame, scene.mirror_target)))
    depth = sample_depth(depth_m, *map(torch.from_numpy, source)).double().numpy()
    depth[~(np.isfinite(depth) & (depth > 0))] = np.nan
    if paste.depth_gradient is not None:
        surface = np.tensordot(paste.depth_gradient, pixels, axes=1)
    scale = GAP_BEHIND / np.fmin.reduce(depth, axis=None, initial=np.inf)
    return Reflection(left=left, top=top, depth_m=(scale * depth * surface).astype(np.float32))


def _another_frame(scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    return _filling(_deep_frame(scene.paste.draws, scene.sources).image, scene.paste)


def _reduced(
    source: UInt8[np.ndarray, "h w 3"],
    box: tuple[float, float, float, float],
    size: tuple[int, int],
) -> UInt8[np.ndarray, "out_h out_w 3"]:
    """A box (u0, v0, u1, v1) of an image in ``size``; mirrored if u0 > u1."""
    u0, v0, u1, v1 = box
    height, width = source.shape[:2]
    left, right = np.clip(sorted((u0, u1)), 0, width).tolist()
    top, bottom = np.clip((v0, v1), 0, height).tolist()
    image = Image.fromarray(source).resize(
        size, Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    result = np.asarray(image)
    return np.ascontiguousarray(result[:, ::-1]) if u0 > u1 else result


def _filling(
    source: UInt8[np.ndarray, "h w 3"], paste: Paste
) -> UInt8[np.ndarray, "out_h out_w 3"]:
    """The central part of a picture that fills the picture box without being stretched."""
    height, width = source.shape[:2]
    box = paste.picture_box
    aspect = box.width / box.height
    part_width = min(width, height * aspect)
    part_height = part_width / aspect
    left, top = (width - part_width) / 2, (height - part_height) / 2
    return _softened(source, (left, top, left + part_width, top + part_height), paste)


def _softened(
    source: UInt8[np.ndarray, "h w 3"], box: tuple[float, float, float, float], paste: Paste
) -> UInt8[np.ndarray, "out_h out_w 3"]:
    """A box of an image at the size of the picture, and as soft as the photograph around it.

    Its own softness, taken to be like the photograph's, shrinks with it; what is missing is added.
    """
    picture = _reduced(source, box, paste.picture_px)
    width, height = paste.picture_px
    shrunk = math.sqrt(abs(box[2] - box[0]) * abs(box[3] - box[1]) / (width * height))
    sigma = paste.look.sharpness_px * math.sqrt(max(0.0, 1 - 1 / shrunk**2))
    return _blurred(picture, sigma) if sigma > 0.2 else picture


def _blurred(picture: UInt8[np.ndarray, "h w 3"], sigma: float) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def _deep_frame(draws: Draws, sources: Sources) -> Frame:
    """Another frame, of two the one with more relative depth unless the first has enough."""
    found: list[tuple[float, int, Frame]] = []
    for attempt in range(2):
        frame = sources.frame(draws.child(200 + attempt).integer("frame", 2**31))
        depth = frame.depth_m[::8, ::8]
        depth = depth[np.isfinite(depth)]
        low, high = np.percentile(depth, (10, 90)) if depth.size else (1.0, 1.0)
        found.append((float(high / max(low, 1e-6)), -attempt, frame))
        if found[-1][0] >= CONTRAST:
            break
    return max(found, key=lambda entry: entry[:2])[2]


def _worn(picture: UInt8[np.ndarray, "h w 3"], paste: Paste) -> UInt8[np.ndarray, "h w 3"]:
    """Style, blur and dust."""
    look = paste.look
    if look.style is not Style.NONE:
        source = torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32)) / 255
        drawn = stylise(source, look.style)[0]
        picture = (drawn * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    if look.blur_px > 0:
        picture = _blurred(picture, look.blur_px)
    if look.dust <= 0:
        return picture
    bits = np.random.Philox(key=paste.draws.integer("dust", 2**31))
    coarse = (bits.random_raw(6 * 6) >> np.uint64(56)).astype(np.uint8).reshape(6, 6)
    veil = Image.fromarray(coarse).resize(paste.picture_px, Image.Resampling.BICUBIC)
    opacity = look.dust * np.asarray(veil, dtype=np.float32)[..., None] / 255
    dusty = picture + opacity * (np.array([196, 190, 180], dtype=np.float32) - picture)
    return np.clip(np.round(dusty), 0, 255).astype(np.uint8)


def _grain(paste: Paste) -> UInt8[np.ndarray, "canvas_h canvas_w"] | None:
    """Noise like the photograph's; none on a mirror's picture, which brings its own."""
    size, level = canvas(paste), 255 * paste.look.noise
    if level < 0.25:
        return None
    # eight bytes of each raw word: their sum is normal enough, its variance 8 (256^2 - 1) / 12
    bits = np.random.Philox(key=paste.draws.integer("grain", 2**31))
    raw = bits.random_raw(size.height * size.width).view(np.uint8)
    grain = raw.reshape(size.height, size.width, 8).sum(axis=-1, dtype=np.float32) - 8 * 127.5
    grain *= np.float32(level / math.sqrt(8 * 65535 / 12))
    if paste.kind is Kind.MIRROR:
        grain[size.pad_y : -size.pad_y, size.pad_x : -size.pad_x] = 0
    return np.clip(np.round(grain + 128), 0, 255).astype(np.uint8)


def _seen_part(paste: Paste, view: View, K_px: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the view's pixels around what is inside frame and mat."""
    corners = project(K_px, paste.picture_box.corners())
    size = np.array([view.width, view.height])
    first = (np.floor(corners.min(axis=0)).astype(int) - 1).clip(0, size)
    last = (np.ceil(corners.max(axis=0)).astype(int) + 1).clip(first, size)
    (left, top), (right, bottom) = first.tolist(), last.tolist()
    return left, top, right, bottom


def _opening(scene: Scene) -> Opening | None:
    """Another frame seen with the same camera, its scene scaled to begin behind the plane.

    A frame cut and resized so that its intrinsics become those of the view is what this camera
    would see there; making its scene s times as large changes nothing in the image, so its depth
    times s is exact. None if none of four frames reaches over the opening or has depth in it.
    """
    paste, K_px = scene.paste, scene.K_px
    left, top, right, bottom = _seen_part(paste, scene.view, K_px)
    if right - left < 2 or bottom - top < 2:
        return None
    for attempt in range(4):
        frame = scene.sources.frame(paste.draws.child(200 + attempt).integer("frame", 2**31))
        crop = _same_camera(frame, K_px, left, top, right, bottom)
        if crop is None:
            continue
        depth = _cut(frame.depth_m, crop)
        u = np.arange(left, right) + 0.5
        v = np.arange(top, bottom) + 0.5
        m_px = paste.rectangle.plane @ np.linalg.inv(K_px)
        surface = u[None, :] * m_px[0] + (v[:, None] * m_px[1] + m_px[2])
        known = np.isfinite(depth) & (surface > 0)
        if known.mean() < 0.5:
            continue
        scale = float((1 / (depth[known] * surface[known])).max())
        scale *= GAP_BEHIND * paste.draws.uniform("opening", 1.0, 1.3)
        box = (crop.left, crop.top, crop.left + crop.crop_width, crop.top + crop.crop_height)
        truth = true_depth(frame, scene.mirror_target)
        depth = depth if truth is frame.depth_m else _cut(truth, crop)
        return Opening(
            left=left,
            top=top,
            image=_reduced(frame.image, box, (right - left, bottom - top)),
            depth_m=np.where(np.isfinite(depth), depth * np.float32(scale), np.float32(np.nan)),
        )
    return None


def _cut(depth_m: Float32[np.ndarray, "h w"], crop: View) -> Float32[np.ndarray, "out_h out_w"]:
    return view_depth(torch.from_numpy(np.ascontiguousarray(depth_m)), crop).numpy()


def _same_camera(
    frame: Frame, K_px: np.ndarray, left: int, top: int, right: int, bottom: int
) -> View | None:
    """The crop of a frame that shows what a part of a view with intrinsics ``K_px`` would."""
    source = frame.K_px
    scale_u, scale_v = source[0, 0] / K_px[0, 0], source[1, 1] / K_px[1, 1]
    source_left = round(source[0, 2] + (left - K_px[0, 2]) * scale_u)
    source_top = round(source[1, 2] + (top - K_px[1, 2]) * scale_v)
    width, height = round((right - left) * scale_u), round((bottom - top) * scale_v)
    rows, columns = frame.depth_m.shape
    if source_left < 0 or source_top < 0 or width < 2 or height < 2:
        return None
    if source_left + width > columns or source_top + height > rows:
        return None
    return View(
        top=source_top,
        left=source_left,
        crop_height=height,
        crop_width=width,
        height=bottom - top,
        width=right - left,
    )


CONTENTS: dict[str, Callable[[Scene], UInt8[np.ndarray, "h w 3"] | Opening | None]] = {
    Kind.MIRROR: _mirrored,
    Kind.ART: lambda scene: _filling(scene.sources.picture(scene.paste.picture), scene.paste),
    Kind.MURAL: _another_frame,
    Kind.SCREEN: _another_frame,
    Kind.OPENING: _opening,
    Kind.EMPTY: lambda _: None,
}
"""Name in ``ContentShares`` -> what it shows: a picture of ``Paste.picture_px``, an opening, or
nothing."""
