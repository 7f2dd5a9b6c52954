"""The paste stage, its parts and three yardsticks as contenders of ``flatdepth.bench.timing``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import kornia
import numpy as np
import torch
import torch.nn.functional as F

from flatdepth.augment.draw.composite import PasteGroup, as_params, stack_plans
from flatdepth.augment.draw.content import Content, Sources, make_content
from flatdepth.augment.flat_paste import FlatPaste, Pasted
from flatdepth.augment.photometric import Photometric, draw_photometric
from flatdepth.augment.plan.coarse import ThinView, thin_view
from flatdepth.augment.plan.layout import Paste, plan_pastes
from flatdepth.augment.rng import Draws
from flatdepth.config import ContentShares, PasteConfig, PhotometricConfig, ShapeShares
from flatdepth.data.readers.rooms import render_room
from flatdepth.geometry import View, project
from flatdepth.types import Batch, Frame, Region

Value = TypeVar("Value")

RANGE_M = (0.1, 20.0)
FRAME_GREY = 0.3
JITTER = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """One image with the one paste that every contender puts into it."""

    frame: Frame
    thin: ThinView
    paste: Paste
    art: np.ndarray

    @property
    def quads(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the frame and of the picture in it, (4, 2) in pixels."""
        rectangles = (self.paste.rectangle, self.paste.picture_box)
        outer, inner = (project(self.frame.K_px, r.corners()) for r in rectangles)
        return outer, inner

    @property
    def inverse_depth_px(self) -> np.ndarray:
        """1/z of the paste's plane is the product of this with (u, v, 1)."""
        return self.paste.rectangle.plane @ np.linalg.inv(self.frame.K_px)


def paste_contenders(
    batch: int, size: int, area: tuple[float, float], device: torch.device
) -> dict[str, Callable[[], object]]:
    """One framed picture per image of a batch of rooms, by the stage and by simpler means.

    Returns:
        Calls without arguments. Of the stage there are the part on the device, that part with the
        photometric stage, and the two parts of a loader thread, which run beside the training:
        the plan, and the picture at its size with all tensors. The yardsticks get their corners,
        planes and decoded pictures for nothing: a bare ``grid_sample`` of the batch; kornia's
        warp_perspective of art, mask and border with blending; and the same with OpenCV image by
        image on the CPU; both also with a colour jitter.
    """
    config = PasteConfig(
        share=1.0,
        max_pastes=1,
        area=area,
        content=ContentShares(mirror=0, mural=0, screen=0, opening=0, empty=0),
        shape=ShapeShares(rounded=0, ellipse=0, arch=0, polygon=0),
        framed=1.0,
        mat=0.0,
        stylised=0.0,
    )
    view = View(top=0, left=0, crop_height=size, crop_width=size, height=size, width=size)
    art = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    scenes = [_scene(number, view, config, art) for number in range(batch)]
    clean = _batch([scene.frame for scene in scenes], device)
    together = 1 if device.type == "cpu" else batch
    stacked = [group.to(device) for group in _prepare(scenes, view, together)]
    always = PhotometricConfig(share=1.0)
    drawn = [draw_photometric(Draws(0, 0, number), always) for number in range(batch)]
    factors = torch.from_numpy(np.stack(drawn))
    stage, params = FlatPaste(p=1.0, depth_range_m=RANGE_M), as_params(stacked)
    camera = Photometric(p=1.0)

    def pasted() -> Pasted:
        found = stage(clean.image, clean.depth_m, clean.K_px, clean.valid, params=params)
        assert isinstance(found, Pasted)
        return found

    identity = torch.eye(2, 3)[None].repeat(batch, 1, 1)
    grid = F.affine_grid(identity, [batch, 3, size, size], align_corners=False).to(device)
    by_kornia = _by_kornia(clean, scenes)
    return {
        "grid_sample": lambda: F.grid_sample(clean.image, grid, align_corners=False),
        "paste": pasted,
        "paste + photometric": lambda: camera(
            pasted().image, params={"factors": factors, "batch_prob": torch.ones(batch)}
        ),
        "plan (loader thread)": lambda: [_scene(i, view, config, art, s) for i, s in _each(scenes)],
        "pictures (loader thread)": lambda: _prepare(scenes, view, together),
        "kornia": lambda: by_kornia(False),
        "kornia + ColorJitter": lambda: by_kornia(True),
        "OpenCV": lambda: [_by_opencv(scene, False) for scene in scenes],
        "OpenCV + jitter": lambda: [_by_opencv(scene, True) for scene in scenes],
    }


def _each(scenes: list[_Scene]) -> list[tuple[int, Frame]]:
    return [(number, scene.frame) for number, scene in enumerate(scenes)]


def _scene(
    number: int, view: View, config: PasteConfig, art: np.ndarray, frame: Frame | None = None
) -> _Scene:
    frame = frame or render_room(0, number, 0, view.height, view.width)
    thin = thin_view(frame, view)
    for attempt in range(100):
        plan = plan_pastes(
            thin,
            Draws(0, attempt, number),
            config,
            picture_aspects=np.array([1.0]),
            depth_range_m=RANGE_M,
        )
        if plan:
            return _Scene(frame=frame, thin=thin, paste=plan[0], art=art)
    raise RuntimeError(f"no place for a paste in room {number}")


def _always(value: Value) -> Callable[[int], Value]:
    return lambda _: value


def _prepare(scenes: list[_Scene], view: View, together: int) -> tuple[PasteGroup, ...]:
    contents: list[list[Content]] = []
    for scene in scenes:
        sources = Sources(picture=_always(scene.art), frame=_always(scene.frame))
        thin = scene.thin
        contents.append([make_content(scene.paste, scene.frame, view, thin.K_px, sources)])
    return stack_plans(
        [(scene.paste,) for scene in scenes],
        contents,
        np.stack([scene.frame.K_px for scene in scenes]),
        height=view.height,
        width=view.width,
        together=together,
    )


def _batch(frames: list[Frame], device: torch.device) -> Batch:
    images = torch.from_numpy(np.stack([frame.image for frame in frames])).movedim(-1, 1)
    depth = torch.from_numpy(np.stack([frame.depth_m for frame in frames]))[:, None]
    valid = depth.isfinite() & (depth >= RANGE_M[0]) & (depth <= RANGE_M[1])
    batch = Batch(
        image=(images.float() / 255).contiguous(),
        depth_m=torch.where(valid, depth, 0.0),
        valid=valid,
        region=torch.zeros_like(valid, dtype=torch.uint8),
        K_px=torch.from_numpy(np.stack([frame.K_px for frame in frames])),
        sample=torch.arange(len(frames)),
    )
    names = ("image", "depth_m", "valid", "region", "K_px", "sample")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in names})


def _by_kornia(clean: Batch, scenes: list[_Scene]) -> Callable[[bool], object]:
    """What one would write first: warp art, its mask and the frame's, blend, depth by its plane."""
    height, width = clean.image.shape[-2:]
    device = clean.image.device
    whole = torch.tensor([[0.0, 0], [width, 0], [width, height], [0, height]], device=device)
    whole = whole.repeat(len(scenes), 1, 1) - 0.5
    outer, inner = (
        torch.from_numpy(np.stack(corners)).float().to(device) - 0.5
        for corners in zip(*(scene.quads for scene in scenes), strict=True)
    )
    art = torch.from_numpy(np.stack([scene.art for scene in scenes])).movedim(-1, 1)
    texture = (art.float() / 255).contiguous().to(device)
    ones = torch.ones_like(clean.depth_m)
    planes = np.stack([scene.inverse_depth_px for scene in scenes])
    plane = torch.from_numpy(planes).float().to(device)
    jitter = kornia.augmentation.ColorJitter(JITTER, JITTER, JITTER, 0.0, p=1.0)

    def run(with_jitter: bool) -> object:
        size = (height, width)
        to_outer = kornia.geometry.get_perspective_transform(whole, outer)
        to_inner = kornia.geometry.get_perspective_transform(whole, inner)
        art = kornia.geometry.warp_perspective(texture, to_inner, size, align_corners=True)
        mask = kornia.geometry.warp_perspective(ones, to_inner, size, align_corners=True)
        frame = kornia.geometry.warp_perspective(ones, to_outer, size, align_corners=True)
        image = clean.image * (1 - frame) + FRAME_GREY * frame
        image = image * (1 - mask) + art * mask
        uv = kornia.geometry.create_meshgrid(
            height, width, normalized_coordinates=False, device=device
        )
        uv1 = torch.cat([uv + 0.5, torch.ones_like(uv[..., :1])], dim=-1)
        inverse = torch.einsum("bc,nhwc->bhw", plane, uv1)[:, None]
        depth = torch.where(frame > 0.5, 1 / inverse.clamp_min(1e-6), clean.depth_m)
        region = torch.where(
            mask > 0.5, int(Region.ART), torch.where(frame > 0.5, int(Region.FRAME), 0)
        )
        return (jitter(image) if with_jitter else image), depth, region

    return run


def _by_opencv(scene: _Scene, with_jitter: bool) -> object:
    """The same image by image on the CPU, in uint8 as offline scripts do it."""
    import cv2

    height, width = scene.frame.depth_m.shape
    size = (width, height)
    whole = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) - 0.5
    outer, inner = ((quad - 0.5).astype(np.float32) for quad in scene.quads)
    to_outer, to_inner = (cv2.getPerspectiveTransform(whole, quad) for quad in (outer, inner))
    opaque = np.full((height, width), 255, np.uint8)
    art = cv2.warpPerspective(scene.art, to_inner, size, flags=cv2.INTER_LINEAR)
    mask = cv2.warpPerspective(opaque, to_inner, size, flags=cv2.INTER_LINEAR)
    frame = cv2.warpPerspective(opaque, to_outer, size, flags=cv2.INTER_LINEAR)
    image = scene.frame.image.astype(np.float32)
    for layer, alpha in ((np.full_like(art, round(255 * FRAME_GREY)), frame), (art, mask)):
        share = (alpha / np.float32(255))[..., None]
        image = image * (1 - share) + layer * share
    v, u = np.meshgrid(
        np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), indexing="ij"
    )
    mx, my, m0 = scene.inverse_depth_px.astype(np.float32).tolist()
    inverse = mx * (u + 0.5) + my * (v + 0.5) + m0
    depth = np.where(frame > 127, 1 / np.maximum(inverse, 1e-6), scene.frame.depth_m)
    region = np.where(mask > 127, int(Region.ART), np.where(frame > 127, int(Region.FRAME), 0))
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return (_jitter(pixels) if with_jitter else pixels), depth, region


def _jitter(image: np.ndarray) -> np.ndarray:
    """Brightness, contrast and saturation, one after the other, of an (h, w, 3) uint8 image."""
    import cv2

    brighter = cv2.convertScaleAbs(image, alpha=1 + JITTER)
    mean = float(cv2.cvtColor(brighter, cv2.COLOR_RGB2GRAY).mean())
    contrast = cv2.convertScaleAbs(brighter, alpha=1 - JITTER, beta=JITTER * mean)
    grey = cv2.cvtColor(cv2.cvtColor(contrast, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(contrast, 1 + JITTER, grey, -JITTER, 0)
