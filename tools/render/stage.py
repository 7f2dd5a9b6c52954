"""What a view consists of: solids, lamps, openings, flat things, the camera."""

from dataclasses import dataclass, field

import numpy as np

from render.model import Colour, Model, Vector


@dataclass(frozen=True)
class Lamp:
    """A Blender light (``SUN``, ``AREA`` or ``POINT``) that is not seen itself.

    Attributes:
        power: watts; of a sun, watts per square metre.
        size: sides of an area, (radius, unused) of a point, in metres.
        aim: direction of its light.
    """

    kind: str
    place: Vector
    power: float
    colour: Colour
    aim: Vector = (0.0, 0.0, -1.0)
    size: tuple[float, float] = (0.05, 0.05)


@dataclass(frozen=True)
class Patch:
    """A rectangle in space: a corner and two sides, (3,) each, in metres."""

    corner: np.ndarray
    right: np.ndarray
    up: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        return self.corner + (self.right + self.up) / 2


@dataclass(frozen=True)
class FlatThing:
    """The pane of a mirror, picture or screen, and the number of its part in the model."""

    patch: Patch
    part: int


@dataclass(frozen=True)
class Camera:
    """A pinhole in the middle of its image.

    Attributes:
        eye: (3,) place in the room.
        axes: (3, 3) rows are its x (right), y (down) and z (forward) in the room.
        focal_px: in pixels of the image of ``width`` x ``height``.
    """

    eye: np.ndarray
    axes: np.ndarray
    focal_px: float
    width: int
    height: int

    @staticmethod
    def looking(
        eye: np.ndarray, yaw: float, pitch: float, fov: float, width: int, height: int
    ) -> "Camera":
        """Level camera; yaw from the room's x axis, pitch upwards, angles in radians."""
        forward = np.array(
            [np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)]
        )
        right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        focal_px = width / 2 / np.tan(fov / 2)
        axes = np.stack([right, np.cross(forward, right), forward])
        return Camera(eye, axes, float(focal_px), width, height)

    def small(self, width: int) -> "Camera":
        """The same view with fewer pixels."""
        scale = width / self.width
        return Camera(self.eye, self.axes, self.focal_px * scale, width, round(self.height * scale))

    def rays(self) -> np.ndarray:
        """(h, w, 3) directions through the pixels' centres, 1 along the optical axis."""
        u = (np.arange(self.width) + 0.5 - self.width / 2) / self.focal_px
        v = (np.arange(self.height) + 0.5 - self.height / 2) / self.focal_px
        across = np.stack(np.broadcast_arrays(u, v[:, None], 1.0), axis=-1)
        return across @ self.axes


@dataclass
class Stage:
    """Everything but the camera; ``floor`` is where it may stand: (x0, y0, x1, y1) and not in
    ``blocked`` ones."""

    model: Model = field(default_factory=Model)
    lamps: list[Lamp] = field(default_factory=list)
    openings: list[Patch] = field(default_factory=list)
    flat_things: list[FlatThing] = field(default_factory=list)
    floor: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    blocked: list[tuple[float, float, float, float]] = field(default_factory=list)
    horizon: Colour = (1.0, 1.0, 1.0)
    zenith: Colour = (0.3, 0.5, 1.0)
    sky_radiance: float = 1.0
    lamp_power: float = 0.0
