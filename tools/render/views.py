"""From (kind, scene, view) to a frame: the stage, a camera that looks well, image and truth."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from render import cycles, truth
from render.flat_things import add_flat_things
from render.interior import Room, furnished_room
from render.looks import Looks
from render.model import OPENING
from render.pictures import Pictures
from render.stage import Camera, Patch, Stage
from render.street import street

KINDS = ("train", "bench", "picture", "streets")

PICTURE_SEED = 5

NEAREST_M = 0.4
"""No surface is nearer to a camera."""


@dataclass(frozen=True)
class Settings:
    """How frames are rendered; with (kind, scene, view) it decides every one of their pixels.

    Attributes:
        device: of Cycles, such as ``CPU``.
        pictures: folder for the images that pictures and screens show, made as they are needed.
    """

    seed: int
    width: int
    height: int
    samples: int
    device: str
    pictures: Path


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
    """Render one frame of a kind of ``KINDS``.

    Raises:
        AssertionError: a pane of a bench frame is not flat, see ``truth.check_planes``.
    """
    for attempt in range(100):
        numbers = [settings.seed, KINDS.index(kind), scene, attempt]
        rng = np.random.default_rng([*numbers, 2 + view])
        stage = make_stage(kind, scene, numbers, settings)
        if kind == "bench" and not stage.flat_things:
            continue
        cycles.new_scene(settings.samples, settings.device)
        thing = cycles.mesh_of(stage.model.parts)
        solids = truth.Solids.of(thing, stage.model.parts)
        camera = find_camera(rng, stage, solids, settings, needs_opening=scene % 2 == 0)
        if camera is not None:
            return shoot(stage, solids, camera)
    raise AssertionError(f"{kind} {scene} {view}: no camera found")


def make_stage(kind: str, scene: int, numbers: list[int], settings: Settings) -> Stage:
    """The scene of the given random numbers. Every fifth of the bench, and every second one that
    pictures show, is a street."""
    looks = Looks(np.random.default_rng([*numbers, 1]), kind in ("bench", "picture"))
    folder = settings.pictures

    def photograph(number: int) -> np.ndarray:
        size = (280, 210) if number % 3 else (210, 280)
        shown = Settings(PICTURE_SEED, *size, settings.samples, settings.device, folder)
        return make_frame("picture", number, 0, shown).image

    def decorate(room: Room) -> None:
        add_flat_things(room, Pictures(folder, photograph), is_street)

    every = {"train": 0, "bench": 5, "picture": 2, "streets": 1}[kind]
    is_street = every > 0 and scene % every == every - 1
    if is_street:
        room = street(looks)
        if kind == "bench":
            decorate(room)
        return room.stage
    return furnished_room(looks, decorate if kind == "bench" else None).stage


def shoot(stage: Stage, solids: truth.Solids, camera: Camera) -> Frame:
    """Image and truth of what the Blender scene holds, then of it without its flat things."""
    cycles.place_camera(camera)
    cycles.light(stage)
    image, exposure = cycles.render(None)
    z, part = solids.cast(camera)
    truth.check_planes(stage.flat_things, camera, z, part)
    region, plain = truth.regions(stage, camera, z, part), None
    if stage.flat_things:
        rest = [part for part in stage.model.parts if not part.is_flat_thing]
        cycles.remove_mesh()
        without = truth.Solids.of(cycles.mesh_of(rest), rest)
        plain = (cycles.render(exposure)[0], without.cast(camera)[0].astype(np.float32))
    return Frame(image, z.astype(np.float32), region, camera, plain)


def find_camera(
    rng: np.random.Generator,
    stage: Stage,
    solids: truth.Solids,
    settings: Settings,
    needs_opening: bool,
) -> Camera | None:
    """The best of some cameras that stand free and look into the room, None if none does.

    With flat things in the room, one that sees one of them well, and an opening if one is needed.
    """
    best, found, things = -math.inf, None, stage.flat_things
    for _ in range(120 if things else 24):
        camera = some_camera(rng, stage, settings)
        if not stands_free(camera.eye, stage, solids):
            continue
        z, part = solids.cast(camera.small(40 if things else 20))
        score = interest(z, part)
        if things:
            areas = [(part == thing.part).mean() for thing in things]
            shows = [
                0.03 < area < 0.4 and area > 0.6 * seen_area(thing.patch, camera)
                for thing, area in zip(things, areas, strict=True)
            ]
            region = truth.regions(stage, camera.small(40), z, part)
            if not any(shows) or sum(areas) > 0.45:
                continue
            score += 0.3 * sum(shows) + 3 * min(sum(areas), 0.2)
            if needs_opening and stage.openings and (region == OPENING).mean() < 0.02:
                continue
        if score > best:
            best, found = score, camera
    return found


def seen_area(patch: Patch, camera: Camera) -> float:
    """Share of the image that a rectangle would cover if the image went on.

    inf if it is seen from a slant of more than 73 degrees, or not all of it is in front.
    """
    normal, away = np.cross(patch.right, patch.up), camera.eye - patch.centre
    is_slanted = normal @ away < 0.3 * np.linalg.norm(normal) * np.linalg.norm(away)
    corners = patch.corner + np.array(
        [0 * patch.right, patch.right, patch.right + patch.up, patch.up]
    )
    x, y, z = ((corners - camera.eye) @ camera.axes.T).T
    if is_slanted or z.min() < 0.05:
        return math.inf
    u, v = camera.focal_px * x / z, camera.focal_px * y / z
    area = abs(u @ np.roll(v, -1) - v @ np.roll(u, -1)) / 2
    return float(area / (camera.width * camera.height))


def some_camera(rng: np.random.Generator, stage: Stage, settings: Settings) -> Camera:
    """From anywhere, towards a flat thing or, without any, the opposite half of the floor."""
    x0, y0, x1, y1 = stage.floor
    eye = np.array([rng.uniform(x0, x1), rng.uniform(y0, y1), rng.uniform(1.0, 1.8)])
    aim = np.array([x0 + x1, y0 + y1]) - eye[:2]
    if stage.flat_things:
        aim = stage.flat_things[rng.integers(len(stage.flat_things))].patch.centre[:2]
    aim = aim + rng.normal(0, 0.6, 2)
    yaw = math.atan2(*(aim - eye[:2])[::-1])
    fov = math.radians(rng.uniform(45, 85))
    pitch = rng.normal(-0.08, 0.06)
    return Camera.looking(eye, yaw, pitch, fov, settings.width, settings.height)


def stands_free(eye: np.ndarray, stage: Stage, solids: truth.Solids) -> bool:
    x, y, _ = eye
    if any(a <= x <= c and b <= y <= d for a, b, c, d in stage.blocked):
        return False
    return solids.clearance(eye) > NEAREST_M


def interest(z: np.ndarray, part: np.ndarray) -> float:
    """Many things, far and near, and none that fills the view."""
    seen, counts = np.unique(part, return_counts=True)
    z = np.minimum(z, 10.0)
    things = 0.3 * np.log(len(seen)) - 1.5 * counts.max() / z.size
    return float(things + np.log(np.median(z)) - 2 * (z < 0.9).mean())
