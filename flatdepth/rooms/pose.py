"""Where a camera stands in a room, and where it looks."""

import math

import numpy as np

from flatdepth.rooms.camera import Camera
from flatdepth.rooms.scene import Scene
from flatdepth.rooms.streams import Rng

_CLEARANCE_M = 0.45  # from everything, which at 75 degrees leaves 0.3 m of planar depth
_ATTEMPTS = 400


def place_camera(rng: Rng, scene: Scene, height: int, width: int) -> Camera:
    """A camera in the free part of a room, with something to see.

    The view is at least 1 m deep in five directions, and in the middle one some share of the
    room's length that varies; after half of the attempts only the clearance is asked for.
    """
    assert scene.shell_m is not None
    wanted = rng.uniform(2.0, 0.75 * max(scene.shell_m[:2]))
    high, wide = height / max(height, width), width / max(height, width)
    corners = np.array([[0, 0], [-wide, -high], [-wide, high], [wide, -high], [wide, high]])
    spread = np.column_stack([0.35 * corners, np.ones(5)])
    for attempt in range(_ATTEMPTS):
        camera = Camera.looking(
            np.append(rng.uniform(0.5, scene.shell_m[:2] - 0.5), rng.uniform(1.1, 1.8)),
            yaw=rng.uniform(-math.pi, math.pi),
            pitch=math.radians(rng.uniform(-12, 4)),
            fov=math.radians(rng.uniform(55, 75)),
            height=height,
            width=width,
        )
        if scene.clearance(camera.position) < _CLEARANCE_M:
            continue
        sight = scene.sight(camera.position, spread @ camera.rotation.T)
        if attempt >= _ATTEMPTS // 2 or (sight.min() >= 1.0 and sight[0] >= wanted):
            return camera
    raise RuntimeError("no place for a camera in this room")
