"""Pinhole cameras in the world frame."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from flatdepth.rooms.vectors import Scalars, Vector, Vectors


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera.

    ``ray_matrix = rotation K_px^-1`` takes a pixel ``(u, v, 1)`` to a world direction whose
    component along the optical axis is 1. A point on the ray is ``position + z * direction``, so
    the ray parameter is planar depth.

    Attributes:
        position: in the world.
        rotation: camera to world.
        K_px: intrinsics, pixel centres at integer + 0.5.
        height, width: image size in pixels.
    """

    position: Vector
    rotation: Float64[np.ndarray, "3 3"]
    K_px: Float64[np.ndarray, "3 3"]
    height: int
    width: int

    @classmethod
    def looking(
        cls, position: Vector, *, yaw: float, pitch: float, fov: float, height: int, width: int
    ) -> "Camera":
        """Level camera. Angles in radians; yaw 0 looks along +y, positive turns towards +x.

        Args:
            fov: field of view along the longer side of the image.
        """
        sin_y, cos_y, sin_p, cos_p = math.sin(yaw), math.cos(yaw), math.sin(pitch), math.cos(pitch)
        forward = np.array([cos_p * sin_y, cos_p * cos_y, sin_p])
        right = np.array([cos_y, -sin_y, 0.0])
        focal = max(height, width) / (2 * math.tan(fov / 2))
        return cls(
            position=position,
            rotation=np.stack([right, np.cross(forward, right), forward], axis=1),
            K_px=np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]]),
            height=height,
            width=width,
        )

    @cached_property
    def ray_matrix(self) -> Float64[np.ndarray, "3 3"]:
        """Takes (u, v, 1) to a world direction of planar depth 1."""
        return self.rotation @ np.linalg.inv(self.K_px)

    def grid(self, samples: int) -> tuple[Float64[np.ndarray, " w"], Float64[np.ndarray, " h"]]:
        """u and v at the centres of ``samples x samples`` cells per pixel (1: pixel centres)."""
        u = (np.arange(self.width * samples) + 0.5) / samples
        v = (np.arange(self.height * samples) + 0.5) / samples
        return u, v

    def rays(self, u: Scalars, v: Scalars) -> Vectors:
        """World directions of planar depth 1 through pixels."""
        m = self.ray_matrix
        return u[..., None] * m[:, 0] + v[..., None] * m[:, 1] + m[:, 2]

    def project(self, points: Vectors) -> Float64[np.ndarray, "*n 2"]:
        """Pixel coordinates (u, v) of world points in front of the camera."""
        local = (points - self.position) @ self.rotation
        with np.errstate(divide="ignore", invalid="ignore"):
            return (local @ self.K_px.T)[..., :2] / local[..., 2:]
