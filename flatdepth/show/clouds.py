"""Point clouds to turn in a web page, as data for the one script ``templates/clouds.js``.

Every view of a group shows another depth map of one picture from the same side, so that surfaces
can be compared. The points are drawn into a canvas with a depth buffer of their own, which works
where a browser has no WebGL.
"""

import base64
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Float64, UInt8

MOST_COLUMNS = 200
_CODES = 65535


def cloud_json(
    image: UInt8[np.ndarray, "h w 3"],
    depths_m: Mapping[str, Float32[np.ndarray, "h w"]],
    K_px: Float64[np.ndarray, "3 3"],
) -> str:
    """A picture and its depth maps, thinned to ``MOST_COLUMNS``, for ``templates/clouds.js``.

    Depth is kept as 16-bit codes of 1/65535 of the farthest one, 0 where it is not known.

    Args:
        image: uint8 sRGB.
        depths_m: name -> planar z in metres; not finite or <= 0 where it is not known.
        K_px: intrinsics of the picture, pixel centres at integers + 0.5.
    """
    step = -(-image.shape[1] // MOST_COLUMNS)
    half = (step - 1) // 2
    rows, columns = (slice(half, None, step) for _ in range(2))
    thin = {name: depth_m[rows, columns] for name, depth_m in depths_m.items()}
    known = {name: np.isfinite(z) & (z > 0) for name, z in thin.items()}
    every = np.concatenate([z[known[name]] for name, z in thin.items()])
    far = float(every.max()) if every.size else 1.0
    height, width = next(iter(thin.values())).shape
    codes = {
        name: np.where(known[name], np.clip(np.rint(z / far * _CODES), 1, _CODES), 0)
        for name, z in thin.items()
    }
    inverse = np.linalg.inv(K_px)
    return json.dumps(
        {
            "width": width,
            "height": height,
            # pixel (column, row) of the thinned maps -> ray (x, y, 1)
            "first": [half + 0.5, half + 0.5],
            "step": step,
            "inverse": inverse.ravel().tolist(),
            "unit": far / _CODES,
            "pivot": float(np.median(every)) if every.size else 1.0,
            "rgb": _text(image[rows, columns]),
            "maps": {name: _text(code.astype("<u2")) for name, code in codes.items()},
        },
        allow_nan=False,
    ).replace("</", "<\\/")


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
