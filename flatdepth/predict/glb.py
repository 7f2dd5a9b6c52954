"""Depth maps to textured meshes in binary glTF 2.0, which browsers, Blender and phones open.

The container is that of the glTF 2.0 specification, section 4.4: 12 bytes of header, a chunk of
JSON, a chunk of binary data, both padded to 4 bytes, all numbers little-endian.
"""

import json
import math
import struct
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

import flatdepth
from flatdepth.predict.pointcloud import depth_edges, unproject

MOST_VERTICES = 1 << 20
"""Of larger pictures every second, third and so on pixel is one; the texture keeps them all."""

_FLOAT, _UINT32 = 5126, 5125
_UNLIT = "KHR_materials_unlit"


def glb_bytes(
    png: bytes,
    depth_m: Float32[np.ndarray, "h w"],
    K_px: Float64[np.ndarray, "3 3"],
    *,
    ratio: float,
    radius: int,
) -> bytes:
    """A picture on the surface that its depth makes, in metres: x right, y up, z to the viewer.

    The camera is at the origin and looks along -z. Vertices are pixel centres; as in the point
    cloud those at jumps in depth are left out, and with them the triangles across. The material is
    unlit where the viewer can, so that the picture's own light stays.

    Args:
        png: the picture, as a PNG file.
        depth_m: planar z, positive; left out where it is not finite.
        ratio, radius: see ``depth_edges``; the radius is at least the distance of two vertices.
    """
    height, width = depth_m.shape
    step = math.ceil(math.sqrt(depth_m.size / MOST_VERTICES))
    rows, columns = (np.arange((step - 1) // 2, side, step) for side in (height, width))
    grid = np.ix_(rows, columns)
    cut = depth_edges(depth_m, ratio=ratio, radius=max(radius, step)) | ~np.isfinite(depth_m)
    kept = ~cut[grid].ravel()
    number = np.arange(kept.size).reshape(len(rows), len(columns))
    a, b, c, d = number[:-1, :-1], number[:-1, 1:], number[1:, :-1], number[1:, 1:]
    # counterclockwise for the camera, which is glTF's front
    corners = [np.stack(three, axis=-1).reshape(-1, 3) for three in ((a, c, b), (b, c, d))]
    triangles = np.concatenate(corners)
    used, places = np.unique(triangles[kept[triangles].all(axis=1)], return_inverse=True)
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"flatdepth {flatdepth.__version__}"},
        "scene": 0,
        "scenes": [{}],
    }
    if not used.size:  # accessors may not be empty
        return _container(document, b"")
    points = unproject(depth_m, K_px)[grid].reshape(-1, 3)[used]
    v, u = np.meshgrid((rows + 0.5) / height, (columns + 0.5) / width, indexing="ij")
    texture = np.stack([u, v], axis=-1).reshape(-1, 2)[used]
    numbers = (places.astype("<u4"), points.astype("<f4"), texture.astype("<f4"))
    parts = [*(values.tobytes() for values in numbers), png + bytes(-len(png) % 4)]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    primitive = {"attributes": {"POSITION": 1, "TEXCOORD_0": 2}, "indices": 0, "material": 0}
    colour = {"baseColorTexture": {"index": 0}, "metallicFactor": 0}
    limits = {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
    accessors: list[dict[str, Any]] = [
        {"componentType": _UINT32, "type": "SCALAR", "count": places.size},
        {"componentType": _FLOAT, "type": "VEC3", "count": used.size, **limits},
        {"componentType": _FLOAT, "type": "VEC2", "count": used.size},
    ]
    document |= {
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [
            {"pbrMetallicRoughness": colour, "doubleSided": True, "extensions": {_UNLIT: {}}}
        ],
        "extensionsUsed": [_UNLIT],
        "textures": [{"source": 0}],
        "images": [{"bufferView": 3, "mimeType": "image/png"}],
        "accessors": [{"bufferView": k, **one} for k, one in enumerate(accessors)],
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": len(part)}
            for start, part in zip(starts, parts, strict=False)
        ],
        "buffers": [{"byteLength": starts[-1]}],
    }
    return _container(document, b"".join(parts))


def _container(document: dict[str, Any], binary: bytes) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    chunks = [(b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", binary)]
    body = b"".join(struct.pack("<I4s", len(data), kind) + data for kind, data in chunks if data)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body
