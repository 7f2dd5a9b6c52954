"""What a photograph itself says of the camera it was taken with."""

import math

import numpy as np
from jaxtyping import UInt8

ROWS, COLUMNS = 192, 384
"""The largest part of an image that is looked at."""


def sharpness_and_noise(image: UInt8[np.ndarray, "h w 3"]) -> tuple[float, float]:
    """Blur of the edges and noise, measured in the middle of the green channel.

    The blur of the steepest pixels follows from how much their gradient falls when the image is
    blurred by 1 pixel more (Zhuo and Sim 2011, eq. 6), less 0.5 pixels squared for the central
    difference itself. The noise is the response to a second-difference mask that smooth images
    do not answer and whose norm is 6 (Immerkaer 1996), by the median instead of the mean, so that
    edges do not count.

    Returns:
        Gaussian sigma of the edges in pixels, 0 to 2; standard deviation of the noise in units of
        the full range. Both 0 if the image is too small to tell.
    """
    height, width = image.shape[:2]
    rows, columns = min(height // 3, ROWS), min(width // 2, COLUMNS)
    top, left = (height - rows) // 2, (width - columns) // 2
    green = image[top : top + rows, left : left + columns, 1]
    if min(green.shape) < 16:
        return 0.0, 0.0
    green = green.astype(np.float32)
    second = green[:-2] - 2 * green[1:-1] + green[2:]
    response = second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:]
    noise = 1.4826 * float(np.median(np.abs(response))) / 6
    before, after = _steepness(green)[4:-4, 4:-4], _steepness(_blurred(green))
    steep = before >= max(float(np.quantile(before, 0.98)), 6 * noise + 4)
    if not steep.any():
        return 0.0, noise / 255
    ratio = before[steep] / np.maximum(after[steep], 1e-3)
    variance = 1 / max(float(np.median(ratio)) ** 2 - 1, 0.1) - 0.5
    return math.sqrt(min(max(variance, 0.0), 4.0)), noise / 255


def _blurred(image: np.ndarray) -> np.ndarray:
    """Convolved with a Gaussian of sigma 1, four pixels smaller on each side."""
    taps = np.exp(-0.5 * np.arange(-4, 5, dtype=np.float32) ** 2)
    taps /= taps.sum()
    height, width = (size - 8 for size in image.shape)
    down = sum(tap * image[i : i + height] for i, tap in enumerate(taps.tolist()))
    return sum(tap * down[:, i : i + width] for i, tap in enumerate(taps.tolist()))


def _steepness(image: np.ndarray) -> np.ndarray:
    return np.hypot(*np.gradient(image))
