"""Frames of generated rooms, with exact depth."""

import math
from functools import lru_cache

import numpy as np

from flatdepth.rooms.camera import Camera
from flatdepth.rooms.colour import develop
from flatdepth.rooms.interior import build_room
from flatdepth.rooms.lightmap import Lightmaps, bake
from flatdepth.rooms.pose import place_camera
from flatdepth.rooms.raycast import cast, depth_of
from flatdepth.rooms.scene import Scene
from flatdepth.rooms.shade import shade
from flatdepth.rooms.streams import Kind, stream
from flatdepth.types import Frame


def room_name(scene: int) -> str:
    """Name of a room as a scene of the data set: ``room_0003``."""
    return f"room_{scene:04d}"


def frame_key(scene: int, frame: int) -> str:
    """Key of a frame in the data set: ``room_0003/frame_02``."""
    return f"{room_name(scene)}/frame_{frame:02d}"


@lru_cache(maxsize=2)
def room_scene(seed: int, scene: int) -> Scene:
    """The room of a seed and scene index; the last few are kept."""
    rng = stream(Kind.ROOM, seed, scene)
    size = np.array([rng.uniform(3, 9), rng.uniform(4, 12), rng.uniform(2.4, 3.5)])
    return build_room(rng, size)


@lru_cache(maxsize=2)
def _room_light(seed: int, scene: int) -> Lightmaps:
    return bake(room_scene(seed, scene))


def room_camera(seed: int, scene: int, frame: int, height: int, width: int) -> Camera:
    """The camera of one frame, in the coordinates of ``room_scene``."""
    rng = stream(Kind.FRAME, seed, scene, frame)
    return place_camera(rng, room_scene(seed, scene), height, width)


def render_room(seed: int, scene: int, frame: int, height: int = 252, width: int = 336) -> Frame:
    """Draw one frame of one room.

    Args:
        seed, scene, frame: non-negative integers that decide everything but the resolution.
        height, width: in pixels.

    Returns:
        The frame with exact float32 depth: finite and positive, or +inf for the sky. Colours are
        averages of 2x2 rays per pixel; depth is that of the ray through the pixel's centre.
    """
    room = room_scene(seed, scene)
    camera = room_camera(seed, scene, frame, height, width)
    exposure = stream(Kind.EXPOSURE, seed, scene, frame).uniform(0.6, 1.3)
    radiance = shade(room, _room_light(seed, scene), camera)
    _, inverse = cast(room, camera, *camera.grid(1), np.float64)
    return Frame(
        image=develop(radiance, exposure=exposure),
        depth_m=depth_of(inverse),
        K_px=camera.K_px,
        key=frame_key(scene, frame),
        dataset="rooms",
        scene=room_name(scene),
        meta={"seed": seed, "camera": _describe(camera)},
    )


def _describe(camera: Camera) -> dict[str, object]:
    forward = camera.rotation[:, 2]
    return {
        "position_m": [round(float(x), 6) for x in camera.position],
        "yaw_deg": round(math.degrees(math.atan2(forward[0], forward[1])), 6),
        "pitch_deg": round(math.degrees(math.asin(forward[2])), 6),
    }
