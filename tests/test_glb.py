"""Meshes: the container read by the specification alone, surfaces, jumps, thinning."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flatdepth.geometry import project
from flatdepth.predict.glb import glb_bytes
from flatdepth.predict.pointcloud import centred_pinhole
from tests.test_pointcloud import SHAPE, pixel_centres

K = np.array([[30.0, 0, 15.2], [0, 28.0, 12.9], [0, 0, 1]])


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def mesh(depth: np.ndarray, **options: Any) -> bytes:
    picture = np.zeros((*depth.shape, 3), np.uint8)
    options = {"K_px": K, "ratio": 0.05, "radius": 1} | options
    return glb_bytes(png(picture), depth.astype(np.float32), **options)


def chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary chunk, section 4.4 of the glTF 2.0 specification."""
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    found, place = [], 12
    while place < length:
        size, kind = struct.unpack_from("<I4s", data, place)
        assert size % 4 == 0
        found.append((kind, data[place + 8 : place + 8 + size]))
        place += 8 + size
    assert [kind for kind, _ in found] == [b"JSON", b"BIN\0"][: len(found)]
    return json.loads(found[0][1]), found[1][1] if len(found) > 1 else b""


def read_glb(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points (n, 3), texture coordinates (n, 2), triangles (t, 3), texture (h, w, 3)."""
    document, binary = chunks(data)
    assert document["asset"]["version"] == "2.0"
    assert 0 <= len(binary) - document["buffers"][0]["byteLength"] < 4

    def view(number: int) -> bytes:
        described = document["bufferViews"][number]
        assert described["byteOffset"] % 4 == 0
        return binary[described["byteOffset"] :][: described["byteLength"]]

    def accessor(number: int) -> np.ndarray:
        described = document["accessors"][number]
        columns = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[described["type"]]
        kind = {5125: "<u4", 5126: "<f4"}[described["componentType"]]
        values = np.frombuffer(view(described["bufferView"]), kind).reshape(-1, columns)
        assert len(values) == described["count"] > 0
        if "min" in described:
            np.testing.assert_array_equal(values.min(0), np.float32(described["min"]))
            np.testing.assert_array_equal(values.max(0), np.float32(described["max"]))
        return values

    node = document["nodes"][document["scenes"][document["scene"]]["nodes"][0]]
    primitive = document["meshes"][node["mesh"]]["primitives"][0]
    assert primitive.get("mode", 4) == 4  # triangles
    material = document["materials"][primitive["material"]]
    texture = document["textures"][material["pbrMetallicRoughness"]["baseColorTexture"]["index"]]
    source = document["images"][texture["source"]]
    assert source["mimeType"] == "image/png"
    attributes = primitive["attributes"]
    points, places = accessor(attributes["POSITION"]), accessor(attributes["TEXCOORD_0"])
    triangles = accessor(primitive["indices"]).reshape(-1, 3)
    assert len(points) == len(places) and set(np.unique(triangles)) == set(range(len(points)))
    with Image.open(io.BytesIO(view(source["bufferView"]))) as image:
        return points, places, triangles, np.asarray(image)


def smooth() -> np.ndarray:
    u, v = pixel_centres()
    return 2 + 0.01 * u + 0.003 * v + 0.05 * np.sin(u / 7)


def test_a_mesh_is_the_depth_map_under_its_picture() -> None:
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    depth = smooth().astype(np.float32)
    data = glb_bytes(png(picture), depth, K, ratio=0.05, radius=1)
    points, places, _, texture = read_glb(data)
    np.testing.assert_array_equal(texture, picture)
    np.testing.assert_allclose(points[:, 2], -depth.ravel(), rtol=1e-6)
    u, v = pixel_centres()
    pixels = np.stack([u.ravel(), v.ravel()], axis=1)
    np.testing.assert_allclose(project(K, points.astype(float) * [1, -1, -1]), pixels, atol=1e-4)
    np.testing.assert_allclose(places * [SHAPE[1], SHAPE[0]], pixels, atol=1e-4)


def test_triangles_tile_the_picture_and_face_the_camera() -> None:
    points, places, triangles, _ = read_glb(mesh(smooth()))
    a, b, c = (points[triangles[:, k]].astype(float) for k in range(3))
    towards = (np.cross(b - a, c - a) * -a).sum(axis=1)
    assert (towards > 0).all()
    corners = places[triangles].astype(float) * [SHAPE[1], SHAPE[0]]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    np.testing.assert_allclose(areas, 0.5, atol=1e-4)
    assert areas.sum() == pytest.approx((SHAPE[0] - 1) * (SHAPE[1] - 1), rel=1e-5)


@pytest.mark.parametrize("most", [1 << 20, 200, 60])
def test_no_triangle_spans_a_jump(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where pixels are thinned."""
    monkeypatch.setattr("flatdepth.predict.glb.MOST_VERTICES", most)
    depth = np.full(SHAPE, 2.0)
    depth[:, 17:] = 4.0
    points, _, triangles, _ = read_glb(mesh(depth))
    assert len(points) <= most
    z = -points[triangles][..., 2]
    assert (z == z[:, :1]).all()
    assert {2.0, 4.0} == set(z.ravel().tolist())


def test_what_is_infinitely_far_is_left_out() -> None:
    depth = smooth()
    depth[:10] = np.inf
    points, _, _, _ = read_glb(mesh(depth))
    assert np.isfinite(points).all() and len(points) <= (SHAPE[0] - 10) * SHAPE[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_without_a_triangle_the_scene_is_empty(shape: tuple[int, int]) -> None:
    document, binary = chunks(mesh(np.ones(shape), K_px=centred_pinhole(30.0, *shape)))
    assert document["scenes"] == [{}] and "meshes" not in document and not binary


def test_another_reader_finds_the_same_mesh(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    path = tmp_path / "a.glb"
    path.write_bytes(mesh(smooth()))
    scene = trimesh.load(path)
    (found,) = scene.geometry.values()
    points, places, triangles, _ = read_glb(path.read_bytes())
    np.testing.assert_allclose(found.vertices, points)
    np.testing.assert_array_equal(found.faces, triangles)
    np.testing.assert_allclose(found.visual.uv, places * [1, -1] + [0, 1], atol=1e-6)
