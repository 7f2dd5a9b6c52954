"""From (kind, scene, view) to a frame: the stage, a camera that looks well, image and truth."""

import math
from dataclasses import dataclass

import numpy as np

from render import cycles, truth
from render.interior import furnished_room
from render.looks import Looks
from render.stage import Camera, Stage

KINDS = ("train", "bench", "picture")

NEAREST_M = 0.4
"""No surface is nearer to a camera."""


@dataclass(frozen=True)
class Settings:
    """How frames are rendered; with (kind, scene, view) it decides every one of their pixels."""

    seed: int
    width: int
    height: int
    samples: int
    device: str


@dataclass(frozen=True)
class Frame:
    """Image (h, w, 3) uint8, depth_m (h, w) float32 planar z, region (h, w) uint8, and the plain
    twin's image and depth, if there is one."""

    image: np.ndarray
    depth_m: np.ndarray
    region: np.ndarray
    camera: Camera
    plain: tuple[np.ndarray, np.ndarray] | None = None


def make_frame(kind: str, scene: int, view: int, settings: Settings) -> Frame:
    """Render one frame."""
    attempt = 0
    while True:
        numbers = [settings.seed, KINDS.index(kind), scene, attempt]
        rng = np.random.default_rng(numbers)
        stage = furnished_room(Looks(rng, kind != "train")).stage
        cycles.new_scene(settings.samples, settings.device)
        parts = stage.model.parts
        solids = truth.Solids.of(cycles.mesh_of(parts), parts)
        camera = find_camera(np.random.default_rng([*numbers, view]), stage, solids, settings)
        if camera is not None:
            break
        attempt += 1
    cycles.place_camera(camera)
    cycles.light(stage)
    image, _ = cycles.render(None)
    z, part = solids.cast(camera)
    return Frame(image, z.astype(np.float32), truth.regions(stage, camera, z, part), camera)


def find_camera(
    rng: np.random.Generator, stage: Stage, solids: truth.Solids, settings: Settings
) -> Camera | None:
    """The best of some cameras that stand free and look into the room, None if none does."""
    best, found = -math.inf, None
    for _ in range(24):
        camera = some_camera(rng, stage, settings)
        if not stands_free(camera.eye, stage, solids):
            continue
        score = interest(camera.small(20), solids)
        if score > best:
            best, found = score, camera
    return found


def some_camera(rng: np.random.Generator, stage: Stage, settings: Settings) -> Camera:
    """From anywhere, towards a place in the opposite half of the floor."""
    x0, y0, x1, y1 = stage.floor
    eye = np.array([rng.uniform(x0, x1), rng.uniform(y0, y1), rng.uniform(1.0, 1.8)])
    aim = np.array([x0 + x1, y0 + y1]) - eye[:2] + rng.normal(0, 0.6, 2)
    yaw = math.atan2(*(aim - eye[:2])[::-1])
    fov = math.radians(rng.uniform(45, 85))
    pitch = rng.normal(-0.08, 0.06)
    return Camera.looking(eye, yaw, pitch, fov, settings.width, settings.height)


def stands_free(eye: np.ndarray, stage: Stage, solids: truth.Solids) -> bool:
    x, y, _ = eye
    if any(a <= x <= c and b <= y <= d for a, b, c, d in stage.blocked):
        return False
    return solids.clearance(eye) > NEAREST_M


def interest(camera: Camera, solids: truth.Solids) -> float:
    """Many things, far and near, and none that fills the view."""
    z, part = solids.cast(camera)
    seen, counts = np.unique(part, return_counts=True)
    z = np.minimum(z, 10.0)
    return 0.04 * len(seen) - counts.max() / z.size + np.log(np.median(z)) - 2 * (z < 0.9).mean()
