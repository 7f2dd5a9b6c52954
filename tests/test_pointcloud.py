"""Point clouds: projection there and back, planes kept and edges cut, PLY read independently."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.geometry import pixel_rays, project
from flatdepth.predict.pointcloud import (
    centred_pinhole,
    depth_edges,
    focal_from_fov,
    ply_bytes,
    unproject,
)

SHAPE = (24, 32)


def pixel_centres() -> tuple[np.ndarray, np.ndarray]:
    v, u = np.meshgrid(np.arange(SHAPE[0]) + 0.5, np.arange(SHAPE[1]) + 0.5, indexing="ij")
    return u, v


@settings(deadline=None)
@given(fov=st.floats(5, 170), width=st.integers(1, 5000))
def test_a_field_of_view_reaches_the_sides_of_the_image(fov: float, width: int) -> None:
    focal = focal_from_fov(fov, width)
    assert 2 * math.degrees(math.atan(width / 2 / focal)) == pytest.approx(fov)


def test_points_project_back_to_their_pixels() -> None:
    depth = np.random.default_rng(0).uniform(0.5, 9, SHAPE).astype(np.float32)
    K = np.array([[30.0, 0, 15.2], [0, 28.0, 12.9], [0, 0, 1]])
    points = unproject(depth, K).astype(np.float64)
    np.testing.assert_allclose(points[..., 2], -depth, rtol=1e-6)
    camera = points.reshape(-1, 3) * [1, -1, -1]
    u, v = pixel_centres()
    np.testing.assert_allclose(
        project(K, camera), np.stack([u.ravel(), v.ravel()], axis=1), atol=1e-4
    )


def test_viewers_show_points_upright_and_not_mirrored() -> None:
    points = unproject(np.full(SHAPE, 2.0, np.float32), centred_pinhole(30.0, *SHAPE))
    assert (np.diff(points[..., 0], axis=1) > 0).all()  # x grows to the right
    assert (np.diff(points[..., 1], axis=0) < 0).all()  # y grows upwards
    np.testing.assert_allclose(points[..., 2], -2.0)  # in front of a camera that looks along -z
    np.testing.assert_allclose(points[..., :2].mean(axis=(0, 1)), 0, atol=1e-6)


@settings(deadline=None)
@given(
    slope_u=st.floats(-1, 1),
    slope_v=st.floats(-1, 1),
    radius=st.integers(1, 6),
)
def test_planes_have_no_edges(slope_u: float, slope_v: float, radius: int) -> None:
    u, v = pixel_centres()
    rays = pixel_rays(centred_pinhole(20.0, *SHAPE), u, v)
    inverse = rays @ np.array([slope_u, slope_v, 1.0])
    inverse += max(0.0, 0.01 - float(inverse.min()))  # to 100 m, still a plane
    depth = (1 / inverse).astype(np.float32)
    assert not depth_edges(depth, ratio=0.05, radius=radius).any()


@settings(deadline=None)
@given(
    near=st.floats(0.5, 5),
    jump=st.floats(0.06, 4),
    column=st.integers(4, SHAPE[1] - 4),
    radius=st.integers(1, 3),
)
def test_jumps_are_cut_on_both_sides_and_nowhere_else(
    near: float, jump: float, column: int, radius: int
) -> None:
    depth = np.full(SHAPE, near, np.float32)
    depth[:, column:] = near * (1 + jump)
    expected = np.zeros(SHAPE, bool)
    expected[:, column - radius : column + radius] = True
    np.testing.assert_array_equal(depth_edges(depth, ratio=0.05, radius=radius), expected)
    np.testing.assert_array_equal(
        depth_edges(depth.T.copy(), ratio=0.05, radius=radius), expected.T
    )
    assert not depth_edges(depth, ratio=jump * 1.01, radius=radius).any()


@pytest.mark.parametrize("radius", [1, 2, 4, 8])
def test_a_blended_edge_is_cut_in_all_its_width(radius: int) -> None:
    """An edge that was enlarged by ``radius`` is a ramp of ``radius`` pixels between surfaces."""
    inverse = np.interp(np.arange(64), [30, 30 + radius], [1.0, 0.25])
    depth = np.repeat((1 / inverse).astype(np.float32)[None], 40, axis=0)
    edges = depth_edges(depth, ratio=0.05, radius=radius)
    assert edges[:, 30 : 31 + radius].all()
    assert not edges[:, : 30 - radius].any()
    assert not edges[:, 31 + 2 * radius :].any()


def test_an_image_smaller_than_the_window_has_no_edges() -> None:
    depth = np.array([[1.0, 2.0], [1.0, 2.0]], np.float32)
    assert not depth_edges(depth, ratio=0.05, radius=3).any()


def read_ply(data: bytes) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Comments, points and colours, parsed by what the header says and in no other way."""
    types = {"float": "<f4", "uchar": "u1"}
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    fields = [line.split()[1:] for line in lines if line.startswith("property")]
    layout = np.dtype([(name, types[kind]) for kind, name in fields])
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex "))
    assert len(body) == count * layout.itemsize
    vertices = np.frombuffer(body, layout)
    points = np.stack([vertices[name] for name in ("x", "y", "z")], axis=1)
    colours = np.stack([vertices[name] for name in ("red", "green", "blue")], axis=1)
    return [line for line in lines if line.startswith("comment")], points, colours


@pytest.mark.parametrize("count", [0, 1, 500])
def test_ply_files_hold_points_and_colours(count: int) -> None:
    draw = np.random.default_rng(count)
    points = draw.normal(size=(count, 3)).astype(np.float32)
    colours = draw.integers(0, 256, (count, 3), dtype=np.uint8)
    comments, read_points, read_colours = read_ply(
        ply_bytes(points, colours, ["metres", "x right"])
    )
    assert comments == ["comment metres", "comment x right"]
    np.testing.assert_array_equal(read_points, points)
    np.testing.assert_array_equal(read_colours, colours)
