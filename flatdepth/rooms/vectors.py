"""The world frame: right-handed, x (east) and y (north) horizontal, z up, metres."""

import math

import numpy as np
from jaxtyping import Float, Float64

Vector = Float[np.ndarray, "3"]
Vectors = Float[np.ndarray, "*n 3"]
Scalars = Float[np.ndarray, "*n"]

EAST, NORTH, UP = np.eye(3)


def turn_about_up(yaw: float) -> Float64[np.ndarray, "3 3"]:
    """The rotation by ``yaw`` radians, counter-clockwise seen from above."""
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
