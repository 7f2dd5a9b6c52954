"""Rays, planes, views and depth resampling against closed forms and float64 references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.geometry import (
    Rectangle,
    View,
    fit_plane,
    fit_planes_robust,
    pixel_rays,
    project,
    quad_area,
    view_depth,
    view_image,
)

K = np.array([[500.0, 0, 321.3], [0, 510.0, 238.9], [0, 0, 1]])


def orthonormal(seed: int, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """Right and up vectors of a rectangle turned by up to ``tilt`` radians from the image plane."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    angle = rng.uniform(-tilt, tilt)
    cross = np.cross(np.eye(3), axis)
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation @ [1.0, 0, 0], rotation @ [0, -1.0, 0]


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return u, v


def plane_depth(m: np.ndarray, K_px: np.ndarray, height: int, width: int) -> np.ndarray:
    u, v = grid(height, width)
    return 1 / (pixel_rays(K_px, u, v) @ m)


def test_pixel_rays_invert_the_projection() -> None:
    points = np.array([[0.3, -0.2, 2.0], [-1.0, 0.5, 7.0]])
    u, v = project(K, points).T
    rays = pixel_rays(K, u, v)
    np.testing.assert_allclose(rays * points[:, 2:], points, rtol=1e-12)
    assert (rays[:, 2] == 1).all()


@given(st.integers(0, 10_000), st.floats(0, 1.1), st.floats(0.3, 8.0))
def test_pixel_matrix_agrees_with_the_homography_route(seed: int, tilt: float, z: float) -> None:
    """z = s / (H^-1 p)_3 up to one scale, with H estimated from the four corners alone."""
    right, up = orthonormal(seed, tilt)
    rectangle = Rectangle(
        centre=np.array([0.1 * z, -0.05 * z, z]), right=right, up=up, width=0.4, height=0.3
    )
    corners = project(K, rectangle.corners())
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    rows = []
    for (s, t), (u, v) in zip(square, corners, strict=True):
        rows.append([s, t, 1, 0, 0, 0, -u * s, -u * t, -u])
        rows.append([0, 0, 0, s, t, 1, -v * s, -v * t, -v])
    homography = np.linalg.svd(np.array(rows))[2][-1].reshape(3, 3)
    inverse = np.linalg.inv(homography)

    inside = corners.mean(axis=0) + 0.4 * (corners - corners.mean(axis=0))
    homogeneous = np.concatenate([inside, np.ones((4, 1))], axis=1).T
    by_homography = inverse @ homogeneous
    by_plane = rectangle.pixel_matrix(K) @ homogeneous
    ratio = by_plane[2] / by_homography[2]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-7)
    place = by_homography[:2] / by_homography[2]
    a, b = by_plane[:2] / by_plane[2]
    np.testing.assert_allclose(a / rectangle.width + 0.5, place[0], atol=1e-7)
    np.testing.assert_allclose(0.5 - b / rectangle.height, place[1], atol=1e-7)


def test_a_rectangle_facing_the_camera_has_the_textbook_corners() -> None:
    rectangle = Rectangle(
        centre=np.array([0.0, 0, 2.0]),
        right=np.array([1.0, 0, 0]),
        up=np.array([0.0, -1, 0]),
        width=0.8,
        height=0.4,
    )
    corners = project(K, rectangle.corners())
    expected = [[221.3, 187.9], [421.3, 187.9], [421.3, 289.9], [221.3, 289.9]]
    np.testing.assert_allclose(corners, expected, atol=1e-9)
    assert quad_area(corners) == pytest.approx(200 * 102)
    np.testing.assert_allclose(rectangle.plane, [0, 0, 0.5])


def test_fit_plane_recovers_a_planted_plane() -> None:
    m = np.array([0.05, -0.11, 0.4])
    rays = pixel_rays(K, *(x.ravel()[::97] for x in grid(480, 640)))
    np.testing.assert_allclose(fit_plane(rays, rays @ m), m, rtol=1e-10)


def test_robust_fit_finds_the_wall_behind_clutter_and_noise() -> None:
    rng = np.random.default_rng(0)
    m = np.array([0.1, 0.02, 0.35])
    rays = pixel_rays(K, *(x.ravel()[::211] for x in grid(480, 640)))
    inverse = rays @ m * (1 + rng.normal(scale=0.003, size=len(rays)))
    clutter = rng.random(len(rays)) < 0.45
    inverse[clutter] *= rng.uniform(1.1, 3.0, clutter.sum())
    triples = rng.choice(len(rays), size=(64, 3))
    planes, inliers = fit_planes_robust(
        rays, inverse, rays[triples], inverse[triples], tolerance=0.02, noise=0.0
    )
    best = int(inliers.sum(axis=1).argmax())
    assert np.array_equal(inliers[best], ~clutter)
    np.testing.assert_allclose(rays @ planes[best], rays @ m, rtol=2e-3)


def test_degenerate_hypotheses_have_no_inliers() -> None:
    rays = pixel_rays(K, np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    planes, inliers = fit_planes_robust(
        rays, np.ones(3), rays[None], np.ones((1, 3)), tolerance=0.02, noise=0.0
    )
    assert np.isfinite(planes).all()
    assert not inliers.any()


VIEWS = st.builds(
    lambda top, left, height, width, flip: View(
        top=top, left=left, crop_height=50, crop_width=70, height=height, width=width, flip=flip
    ),
    st.integers(0, 40),
    st.integers(0, 50),
    st.integers(20, 110),
    st.integers(20, 110),
    st.booleans(),
)


@given(VIEWS)
def test_view_intrinsics_follow_the_pixels(view: View) -> None:
    """A pixel of the view and the source pixel that it shows see along the same ray."""
    u, v = np.array([0.5, 3.2, 19.0]), np.array([0.5, 7.7, 12.0])
    through_view = pixel_rays(view.intrinsics(K), u, v)
    through_source = pixel_rays(K, *view.source_pixels(u, v))
    mirrored = through_source * [-1 if view.flip else 1, 1, 1]
    np.testing.assert_allclose(through_view, mirrored, atol=1e-12)


@settings(deadline=None)
@given(VIEWS)
def test_view_depth_keeps_planes_exact(view: View) -> None:
    m = np.array([0.3, 0.1, 0.4])
    depth = torch.from_numpy(plane_depth(m, K, 100, 130).astype(np.float32))
    mirrored = m * [-1 if view.flip else 1, 1, 1]
    expected = plane_depth(mirrored, view.intrinsics(K), view.height, view.width)
    np.testing.assert_allclose(view_depth(depth, view).numpy(), expected, rtol=2e-6)


def test_view_depth_invents_nothing_at_edges_holes_and_sky() -> None:
    depth = torch.full((40, 60), 2.0)
    depth[:, 30:] = 5.0
    depth[10:20, :10] = torch.nan
    depth[30:, 40:] = torch.inf
    view = View(top=0, left=0, crop_height=40, crop_width=60, height=97, width=143)
    out = view_depth(depth, view)
    known = out[out.isfinite()]
    assert set(known.round(decimals=5).tolist()) == {2.0, 5.0}
    assert out.isnan().any() and out.isposinf().any()


def test_view_image_keeps_a_linear_ramp_in_place() -> None:
    """Resizing by half moves no pixel: the ramp's value stays its source coordinate."""
    ramp = (torch.arange(64, dtype=torch.float32) + 0.5) / 64
    image = ramp.expand(3, 48, 64).contiguous()
    view = View(top=0, left=0, crop_height=48, crop_width=64, height=24, width=32)
    expected = (torch.arange(32) + 0.5) / 32
    inner = slice(2, -2)
    torch.testing.assert_close(
        view_image(image, view)[0, 5, inner], expected[inner], atol=1e-6, rtol=0
    )
    flipped = View(top=0, left=0, crop_height=48, crop_width=64, height=24, width=32, flip=True)
    torch.testing.assert_close(view_image(image, flipped), view_image(image, view).flip(-1))
