"""From linear light with sRGB primaries to sRGB bytes and back."""

import numpy as np
from jaxtyping import Float32, Float64, UInt8

_TONE_RANGE = 8.0
_TONE_CODES = 65536


def encode_srgb(linear: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    """Linear light 0..1 to sRGB 0..1 (IEC 61966-2-1)."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decode_srgb(encoded: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    """sRGB 0..1 to linear light 0..1 (IEC 61966-2-1)."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def develop(
    radiance: Float32[np.ndarray, "h w 3"], *, exposure: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Linear radiance to sRGB bytes, exposed so that the picture's mean is a middle grey.

    Args:
        exposure: factor on that automatic exposure.
    """
    # The logarithmic mean, as a light meter weighs it: a bright window does not darken the room.
    sparse = radiance[::4, ::4].mean(axis=2)
    mean = float(np.exp(np.log(np.maximum(sparse, 1e-3)).mean()))
    gain = np.float32(exposure * 0.3 / mean)
    codes = np.clip(radiance * (gain * (_TONE_CODES / _TONE_RANGE)), 0, _TONE_CODES - 1)
    return _TONES.take(codes.astype(np.uint16))


def _tone_table() -> UInt8[np.ndarray, " codes"]:
    """A filmic shoulder (Narkowicz's fit of the ACES curve), then the sRGB transfer function."""
    x = (np.arange(_TONE_CODES) + 0.5) / _TONE_CODES * _TONE_RANGE
    y = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    return np.rint(255 * encode_srgb(y)).astype(np.uint8)


_TONES = _tone_table()
