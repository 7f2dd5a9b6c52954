"""Cameras, inverse-depth planes, views and depth resampling. Conventions: ``flatdepth.types``."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, UInt8
from torch import Tensor

from flatdepth.errors import UserError

NARROWEST_DEG, WIDEST_DEG = 3.0, 120.0
"""Fields of view of usual lenses, along the longer one of an image's angles."""
MOST_OBLONG = 1.2
"""Greatest ratio of the focal lengths of usual pixels."""
MOST_OFF_CENTRE = 0.15
"""Distance of a principal point from the middle, in widths or heights, that only crops exceed."""

EDGE_RATIO = 1.05
_NEXT = np.array([1, 2, 3, 0])
CORNERS = np.array([[-1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])


def cross(a: Float64[np.ndarray, " 3"], b: Float64[np.ndarray, " 3"]) -> Float64[np.ndarray, " 3"]:
    """Cross product of two vectors; ten times faster than numpy's of any number of them."""
    ax, ay, az = a.tolist()
    bx, by, bz = b.tolist()
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def pixel_rays(
    K_px: Float64[np.ndarray, "3 3"], u: Float64[np.ndarray, "..."], v: Float64[np.ndarray, "..."]
) -> Float64[np.ndarray, "... 3"]:
    """Rays ``K_px^-1 (u, v, 1)`` through pixel coordinates; the third component is 1."""
    return np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K_px).T


def camera_trouble(K_px: Float64[np.ndarray, "3 3"], height: int, width: int) -> str | None:
    """Why intrinsics cannot be those of an image of this size, with the fix; None if they can."""
    (fx, _, cx), (_, fy, cy) = K_px[:2].tolist()
    sides = ((fx, cx, width), (fy, cy, height))
    angles = (math.atan2(c, f) + math.atan2(size - c, f) for f, c, size in sides)
    fov_deg = math.degrees(max(angles))
    if not NARROWEST_DEG <= fov_deg <= WIDEST_DEG:
        found = f"see {fov_deg:.3g} degrees, where lenses see {NARROWEST_DEG:g} to {WIDEST_DEG:g}"
    elif max(fx, fy) > MOST_OBLONG * min(fx, fy):
        found = "differ by more than 20 %"
    else:
        return None
    return (
        f"focal lengths of {fx:g} and {fy:g} pixels {found} (image {width}x{height}); a focal"
        " length in millimetres needs the sensor's width, as --focal_mm 18 --sensor_mm 36x24;"
        " --unusual_camera true takes any camera"
    )


def off_centre(K_px: Float64[np.ndarray, "3 3"], height: int, width: int) -> str | None:
    """A remark on a principal point that only a crop of a larger picture has, else None."""
    cx, cy = K_px[:2, 2].tolist()
    if max(abs(cx / width - 0.5), abs(cy / height - 0.5)) <= MOST_OFF_CENTRE:
        return None
    return (
        f"the principal point {cx:g}, {cy:g} is far from the middle of {width}x{height} pixels,"
        " which is right for a crop of a larger picture only (said once)"
    )


def focal_from_mm(focal_mm: float, sensor_mm: str, height: int, width: int) -> float:
    """Focal length in pixels of an image of this size.

    The image shows the sensor's whole width or its whole height; its longer side lies along the
    sensor's.

    Args:
        sensor_mm: the sensor's width and height, such as ``36x24``, or its width alone.

    Raises:
        UserError: ``sensor_mm`` is no such text.
    """
    sides_px = sorted((height, width), reverse=True)
    return focal_mm * max(
        px / mm for px, mm in zip(sides_px, sensor_sides(sensor_mm), strict=False)
    )


def sensor_sides(text: str) -> list[float]:
    """The sides of a sensor in mm, the longer one first. Raises UserError if it is no size."""
    plain = text.lower().replace("mm", "").strip(" []()")
    parts = re.split(r"[x×*]", plain)
    parts = (
        [part.replace(",", ".") for part in parts]
        if len(parts) > 1
        else re.split(r"[,;\s]+", plain)
    )
    try:
        sides = sorted(map(float, parts), reverse=True)
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not 0 < sides[-1] <= sides[0] < math.inf:
        raise UserError(
            f"sensor_mm: expected width and height in mm, such as 36x24, found {text!r}"
        )
    return sides


def fit_plane(
    rays: Float64[np.ndarray, "n 3"], inverse_depth: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " 3"]:
    """Least-squares ``m`` (1/m) with ``inverse_depth = rays @ m``; the smallest such m if n < 3."""
    return np.linalg.lstsq(rays, inverse_depth, rcond=None)[0]


def fit_plane_trimmed(
    rays: Float64[np.ndarray, "n 3"], inverse_depth: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " 3"]:
    """``fit_plane`` without the points beyond three robust standard deviations, twice.

    The deviation is estimated from the median absolute residual (1.4826 MAD, Hampel 1974), so a
    minority of points of another surface, as at the foot of a wall, does not tilt the plane.
    """
    m = fit_plane(rays, inverse_depth)
    for _ in range(2):
        residual = np.abs(inverse_depth - rays @ m)
        kept = residual <= max(3 * 1.4826 * float(np.median(residual)), 1e-9)
        m = fit_plane(rays[kept], inverse_depth[kept])
    return m


def fit_planes_robust(
    rays: Float64[np.ndarray, "n 3"],
    inverse_depth: Float64[np.ndarray, " n"],
    triples: Float64[np.ndarray, "k 3 3"],
    triple_values: Float64[np.ndarray, "k 3"],
    *,
    tolerance: float,
    noise: float,
    refits: int = 3,
) -> tuple[Float64[np.ndarray, "k 3"], Bool[np.ndarray, "k n"]]:
    """Planes through k triples of points, each refitted to its own inliers.

    A point is an inlier if its 1/z is within ``tolerance * m.ray + noise`` of ``m.ray``. The limit
    is annealed from 2x to 1x over the refits (locally optimised RANSAC, Chum, Matas & Kittler
    2003).

    Args:
        rays: rays of all points with known depth.
        inverse_depth: their 1/z in 1/m.
        triples, triple_values: rays and 1/z of three points per hypothesis.
        tolerance: share of the depth that an inlier may deviate by.
        noise: what it may deviate by besides in 1/m, at any depth (a depth camera's disparity).

    Returns:
        The planes m and their inliers. Degenerate hypotheses have no inliers.
    """
    volume = np.linalg.det(triples)
    usable = np.abs(volume) > 1e-9
    planes = np.zeros((len(triples), 3))
    planes[usable] = np.linalg.solve(triples[usable], triple_values[usable][..., None])[..., 0]
    coarse = rays.astype(np.float32).T, inverse_depth.astype(np.float32)
    inliers = _inliers(planes, *coarse, 2 * tolerance, 2 * noise)
    outer = (rays[:, :, None] * rays[:, None, :]).reshape(-1, 9)
    moments = np.concatenate([outer, rays * inverse_depth[:, None]], axis=1)
    for factor in np.linspace(2.0, 1.0, refits):
        enough = inliers.sum(axis=1) >= 3
        sums = inliers[enough].astype(np.float64) @ moments
        normal = sums[:, :9].reshape(-1, 3, 3)
        normal += 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
        planes[enough] = np.linalg.solve(normal, sums[:, 9:, None])[..., 0]
        inliers = _inliers(planes, *coarse, factor * tolerance, factor * noise)
    return planes, inliers


def _inliers(
    planes: Float64[np.ndarray, "k 3"],
    rays: Float32[np.ndarray, "3 n"],
    inverse_depth: Float32[np.ndarray, " n"],
    tolerance: float,
    noise: float,
) -> Bool[np.ndarray, "k n"]:
    """In float32, whose errors are far below any tolerance, for its speed."""
    predicted = planes.astype(np.float32) @ rays
    slack = np.float32(tolerance) * predicted + np.float32(noise)
    inliers: np.ndarray = np.abs(inverse_depth - predicted) <= slack
    return inliers & (predicted > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """A planar rectangle in camera coordinates, in metres.

    Attributes:
        centre: (3,) its centre.
        right, up: (3,) orthonormal directions of its sides; ``right x up`` points towards the
            camera on the side that is seen.
        width, height: side lengths along ``right`` and ``up``.
    """

    centre: Float64[np.ndarray, " 3"]
    right: Float64[np.ndarray, " 3"]
    up: Float64[np.ndarray, " 3"]
    width: float
    height: float

    @property
    def plane(self) -> Float64[np.ndarray, " 3"]:
        """``m`` of the rectangle's plane, so that ``1/z = m . ray``."""
        normal = cross(self.right, self.up)
        return normal / (normal @ self.centre)

    def corners(self) -> Float64[np.ndarray, "4 3"]:
        """(4, 3) top left, top right, bottom right, bottom left, as the camera sees them."""
        sides = np.stack([0.5 * self.width * self.right, 0.5 * self.height * self.up])
        return self.centre + CORNERS @ sides

    def pixel_matrix(self, K_px: Float64[np.ndarray, "3 3"]) -> Float64[np.ndarray, "3 3"]:
        """A with ``A @ (u, v, 1) = (a, b, 1) / z``.

        ``a`` and ``b`` are the coordinates in metres from the centre along ``right`` and ``up`` of
        the point that the pixel sees on the rectangle's plane, z its planar depth in metres. So one
        product gives the place on the surface (the inverse homography) and, in its third row, the
        exact inverse depth. Derivation: X = z ray, a = right . (X - centre), m . X = 1, hence
        a/z = (right - (right . centre) m) . ray, and 1/z = m . ray.
        """
        m = self.plane
        rows = np.stack(
            [
                self.right - (self.right @ self.centre) * m,
                self.up - (self.up @ self.centre) * m,
                m,
            ]
        )
        return rows @ np.linalg.inv(K_px)


def project(
    K_px: Float64[np.ndarray, "3 3"], points: Float64[np.ndarray, "*n 3"]
) -> Float64[np.ndarray, "*n 2"]:
    """Pixel coordinates (u, v) of camera points in metres with z > 0."""
    image = points @ K_px.T
    return image[..., :2] / image[..., 2:]


def edge_lines(corners: Float64[np.ndarray, "4 2"]) -> Float64[np.ndarray, "4 3"]:
    """The edges of a convex quad as lines: products with (u, v, 1) are distances in pixels.

    Positive inside; in the order of the corners (from the first to the second comes first).
    """
    u, v = corners.T
    next_u, next_v = corners[_NEXT].T
    lines = np.stack([v - next_v, next_u - u, u * next_v - next_u * v], axis=1)
    inwards = np.sign(lines[:, 2].sum())  # twice the signed area
    return lines * (inwards / np.hypot(lines[:, 0], lines[:, 1]))[:, None]


def quad_area(corners: Float64[np.ndarray, "*n 4 2"]) -> Float64[np.ndarray, "*n"]:
    """Areas of simple quads in px^2: half the cross product of their diagonals."""
    first = corners[..., 2, :] - corners[..., 0, :]
    second = corners[..., 3, :] - corners[..., 1, :]
    cross_product = first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
    return np.asarray(0.5 * np.abs(cross_product))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A crop of a source image, resized, possibly mirrored left to right.

    Attributes:
        top, left, crop_height, crop_width: the crop in source pixels.
        height, width: the output size.
        flip: mirror the output left to right.
    """

    top: int
    left: int
    crop_height: int
    crop_width: int
    height: int
    width: int
    flip: bool = False

    def intrinsics(self, K_px: Float64[np.ndarray, "3 3"]) -> Float64[np.ndarray, "3 3"]:
        """Intrinsics of the output image.

        Mirroring turns x into -x in the camera frame, so fx stays positive, cx becomes W - cx and
        the skew changes its sign.
        """
        scale_u = self.width / self.crop_width
        scale_v = self.height / self.crop_height
        resize = np.array(
            [[scale_u, 0, -scale_u * self.left], [0, scale_v, -scale_v * self.top], [0, 0, 1.0]]
        )
        result = resize @ K_px
        if self.flip:
            result[0, 1:] *= -1
            result[0, 2] += self.width
        return result

    def source_pixels(
        self, u: Float64[np.ndarray, "..."], v: Float64[np.ndarray, "..."]
    ) -> tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]:
        """Source pixel coordinates of output pixel coordinates."""
        u = self.width - u if self.flip else u
        source_u = self.left + u * self.crop_width / self.width
        return source_u, self.top + v * self.crop_height / self.height

    def view_pixels(
        self, u: Float64[np.ndarray, "..."], v: Float64[np.ndarray, "..."]
    ) -> tuple[Float64[np.ndarray, "..."], Float64[np.ndarray, "..."]]:
        """Output pixel coordinates of source pixel coordinates."""
        out_u = (u - self.left) * self.width / self.crop_width
        out_u = self.width - out_u if self.flip else out_u
        return out_u, (v - self.top) * self.height / self.crop_height


def view_image(image: Float[Tensor, "3 h w"], view: View) -> Float[Tensor, "3 out_h out_w"]:
    """The view of an image, bilinear with the anti-aliasing filter scaled to the reduction."""
    from torchvision.transforms.v2 import functional as tv  # takes seconds, and packing needs none

    size = [view.height, view.width]
    crop = tv.resized_crop(
        image, view.top, view.left, view.crop_height, view.crop_width, size, antialias=True
    )
    return (tv.horizontal_flip(crop) if view.flip else crop).clamp(0, 1)


def view_depth(depth_m: Float[Tensor, "h w"], view: View) -> Float[Tensor, "out_h out_w"]:
    """The view of a planar depth map in metres (NaN unknown, +inf sky), by ``sample_depth``."""
    device = depth_m.device
    out_u = torch.arange(view.width, device=device, dtype=torch.float64) + 0.5
    out_v = torch.arange(view.height, device=device, dtype=torch.float64) + 0.5
    out_u = view.width - out_u if view.flip else out_u
    u = view.left + out_u * (view.crop_width / view.width)
    v = view.top + out_v * (view.crop_height / view.height)
    return sample_depth(depth_m, u[None, :], v[:, None])


def sample_depth(
    depth_m: Float[Tensor, "h w"], u: Float64[Tensor, "..."], v: Float64[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """A planar depth map in metres (NaN unknown, +inf sky) at pixel coordinates, which broadcast.

    Interpolates bilinearly in inverse depth, where planes are affine (bilinear interpolation of z
    errs by 2e-3 relative on a slanted plane), and takes the nearest pixel where the four
    neighbours are not all finite or differ by more than 5 %: depth edges stay sharp and nothing is
    invented between two surfaces.
    """
    height, width = depth_m.shape
    column, weight_u = _neighbours(u, width)
    row, weight_v = _neighbours(v, height)
    corners = torch.stack(
        [depth_m[row[j], column[i]] for j in (0, 1) for i in (0, 1)]
    )  # (4, ...): top left, top right, bottom left, bottom right
    smooth = corners.isfinite().all(0)
    smooth &= corners.amax(0) <= EDGE_RATIO * corners.amin(0)
    weights = torch.stack([weight_v[j] * weight_u[i] for j in (0, 1) for i in (0, 1)])
    blended = 1 / (weights.to(depth_m.dtype) / torch.where(smooth, corners, 1.0)).sum(0)
    nearest_row = (v.floor().long()).clamp(0, height - 1)
    nearest_column = (u.floor().long()).clamp(0, width - 1)
    return torch.where(smooth, blended, depth_m[nearest_row, nearest_column])


def view_region(region: UInt8[Tensor, "h w"], view: View) -> UInt8[Tensor, "out_h out_w"]:
    """The view of a region map: of every output pixel the region at its centre."""
    column, row = view.source_pixels(np.arange(view.width) + 0.5, np.arange(view.height) + 0.5)
    height, width = region.shape
    rows, columns = (
        torch.from_numpy(np.floor(x).astype(np.int64).clip(0, size - 1)).to(region.device)
        for x, size in ((row, height), (column, width))
    )
    return region[rows][:, columns]


def _neighbours(x: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Indices and weights of two neighbouring pixel centres; linear extrapolation at the border."""
    low = (x - 0.5).floor().clamp(0, size - 2)
    weight = x - 0.5 - low
    return (low.long(), low.long() + 1), (1 - weight, weight)
