"""An exact ray caster for scenes of rectangles, discs, drums and balls: what ``rooms`` draws with.

World frame
    Right-handed, x and y horizontal, z up, metres.

Camera
    ``ray_matrix = R K_px^-1`` takes a pixel ``(u, v, 1)`` to a world direction whose component
    along the optical axis is 1. A point on the ray is ``position + z * direction``, so the ray
    parameter *is* planar depth, and for a plane its inverse is affine in ``(u, v)``.

Drawing
    ``cast`` finds the nearest surface and its inverse depth on any grid of pixel coordinates: in
    float64 at pixel centres for depth, in float32 on a finer grid for colour. ``shade`` looks up
    a mip-mapped texture and a baked lightmap there. Light is baked once per scene: area lights
    with shadows, the sun, and one bounce gathered over the hemisphere (further bounces as a gain).

Colours are linear light with sRGB primaries; only ``develop`` makes sRGB bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Float64, Int16, UInt8
from numpy.typing import NDArray

Points = NDArray[np.floating]

TEXTURE_SIZE = 256
_LEVELS = int(math.log2(TEXTURE_SIZE)) + 1
_NEAR_M = 0.05  # in front of which nothing is drawn; cameras keep farther away from everything
_SKIN_M = 0.004  # light is gathered this far off a surface, so that it does not shadow itself
_LIGHTMAP_REFINE = 8  # lightmap cells per baked interval, so that looking up the nearest is enough
_GATHER_RAYS = 40
_EMITTER_RAYS = 32  # shared by all area lights


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint:
    """A tileable albedo texture with its mip pyramid.

    Attributes:
        pyramid: (P, 3) float32, all levels from the finest down, each in row-major order.
        period_m: the side of one tile.
    """

    pyramid: Float32[np.ndarray, "p 3"]
    period_m: float

    @classmethod
    def from_texture(cls, texture: Float[np.ndarray, "t t 3"], period_m: float) -> "Paint":
        level = texture.astype(np.float32)
        levels = [level.reshape(-1, 3)]
        while len(level) > 1:
            half = level[0::2] + level[1::2]
            level = (half[:, 0::2] + half[:, 1::2]) * np.float32(0.25)
            levels.append(level.reshape(-1, 3))
        return cls(pyramid=np.concatenate(levels), period_m=period_m)

    @property
    def mean(self) -> Float32[np.ndarray, "3"]:
        """The coarsest level: the average albedo."""
        return self.pyramid[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLight:
    """Unshadowed light by orientation, for what is lit by itself or seen through a window.

    Attributes:
        ambient: (3,) irradiance over pi from above; half of it arrives from below.
        sun: (3,) irradiance over pi of a surface facing ``direction``.
        direction: (3,) unit vector towards the sun.
    """

    ambient: Points
    sun: Points
    direction: Points

    def at(self, normals: Points) -> Points:
        """Irradiance over pi (..., 3) for unit normals (..., 3)."""
        facing = np.maximum(normals @ self.direction, 0)[..., None]
        return self.ambient * (0.75 + 0.25 * normals[..., 2:]) + self.sun * facing


@dataclass(frozen=True, slots=True, kw_only=True)
class Coat:
    """How a surface looks, whatever its shape.

    Attributes:
        paint: index into ``Scene.paints``.
        light: its light if that is not to be baked.
        spacing_m: distance between baked points.
        hazy: whether aerial perspective applies.
    """

    paint: int = 0
    light: OpenLight | None = None
    spacing_m: float = 0.3
    hazy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quad:
    """A rectangle (or the ellipse in it), seen only from the side its normal ``a x b`` points to.

    Attributes:
        corner: (3,) the point ``(s, t) = (0, 0)``.
        a, b: (3,) orthonormal directions of s and t.
        size: lengths along a and b.
        holes: rectangles ``(s0, t0, s1, t1)`` cut out.
        disc: keep only the inscribed ellipse.
        coat: how it looks.
    """

    corner: Points
    a: Points
    b: Points
    size: tuple[float, float]
    coat: Coat
    holes: tuple[tuple[float, float, float, float], ...] = ()
    disc: bool = False

    def at(self, s: Points, t: Points) -> tuple[Points, Points]:
        """Points and normals at surface coordinates."""
        points = self.corner + s[..., None] * self.a + t[..., None] * self.b
        return points, np.broadcast_to(np.cross(self.a, self.b), points.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drum:
    """The side of an upright cylinder, seen from outside.

    Attributes:
        base: (3,) centre of the lower rim.
        radius, height: in metres.
        coat: how it looks.
    """

    base: Points
    radius: float
    height: float
    coat: Coat

    @property
    def size(self) -> tuple[float, float]:
        return 2 * math.pi * self.radius, self.height

    @property
    def bounds(self) -> tuple[Points, Points]:
        r = np.array([self.radius, self.radius, 0.0])
        return self.base - r, self.base + r + [0.0, 0.0, self.height]

    def at(self, s: Points, t: Points) -> tuple[Points, Points]:
        """Points and normals at arc length s around and height t."""
        angle = s / self.radius
        normals = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
        return self.base + self.radius * normals + t[..., None] * np.array([0.0, 0, 1]), normals

    def coordinates(self, points: Points) -> tuple[Points, Points]:
        """Surface coordinates (s, t) of points on it."""
        x, y, z = np.moveaxis(points - self.base, -1, 0)
        return (np.arctan2(y, x) % (2 * math.pi)) * self.radius, z

    def distance(self, point: Points) -> float:
        """From a point outside to the solid cylinder."""
        x, y, z = point - self.base
        return math.hypot(max(math.hypot(x, y) - self.radius, 0), z - min(max(z, 0), self.height))

    def inverse_depth(self, origin: Points, rays: Points) -> Points:
        """1/z of the front hit of each ray, 0 where it misses."""
        o = origin - self.base
        a = rays[..., 0] ** 2 + rays[..., 1] ** 2
        b = rays[..., 0] * o[0] + rays[..., 1] * o[1]
        z = _first_root(a, b, o[0] ** 2 + o[1] ** 2 - self.radius**2)
        height = o[2] + z * rays[..., 2]
        return np.where((height >= 0) & (height <= self.height), 1 / z, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ball:
    """A sphere.

    Attributes:
        centre: (3,).
        radius: in metres.
        coat: how it looks.
    """

    centre: Points
    radius: float
    coat: Coat

    @property
    def size(self) -> tuple[float, float]:
        return 2 * math.pi * self.radius, math.pi * self.radius

    @property
    def bounds(self) -> tuple[Points, Points]:
        return self.centre - self.radius, self.centre + self.radius

    def at(self, s: Points, t: Points) -> tuple[Points, Points]:
        """Points and normals at arc lengths s (longitude) and t (from the lowest point up)."""
        longitude, polar = s / self.radius, t / self.radius
        ring = np.sin(polar)
        normals = np.stack(
            [ring * np.cos(longitude), ring * np.sin(longitude), -np.cos(polar)], axis=-1
        )
        return self.centre + self.radius * normals, normals

    def coordinates(self, points: Points) -> tuple[Points, Points]:
        """Surface coordinates (s, t) of points on it."""
        x, y, z = np.moveaxis((points - self.centre) / self.radius, -1, 0)
        longitude = np.arctan2(y, x) % (2 * math.pi)
        return longitude * self.radius, np.arccos(np.clip(-z, -1, 1)) * self.radius

    def distance(self, point: Points) -> float:
        """From a point outside to the ball."""
        return float(np.linalg.norm(point - self.centre)) - self.radius

    def inverse_depth(self, origin: Points, rays: Points) -> Points:
        """1/z of the front hit of each ray, 0 where it misses."""
        o = origin - self.centre
        a = np.einsum("...i,...i->...", rays, rays)
        return 1 / _first_root(a, rays @ o, float(o @ o) - self.radius**2)


Surface = Quad | Drum | Ball


def _first_root(a: Points, half_b: Points, c: float) -> Points:
    """The smaller root of ``a z^2 + 2 half_b z + c`` for a camera outside (c > 0), else +inf."""
    discriminant = half_b**2 - a * c
    hit = (discriminant > 0) & (half_b < 0)
    # c / (larger numerator) instead of (smaller numerator) / a: no cancellation far away.
    return np.where(hit, c / (np.sqrt(np.maximum(discriminant, 0)) - half_b + ~hit), np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A box that stops light, in the frame of its ``Body``."""

    low: Points
    high: Points
    paint: int


@dataclass(frozen=True, kw_only=True)
class Body:
    """One piece of furniture: blocks that turn together around a vertical axis.

    Attributes:
        x, y, yaw: where its frame is and how it is turned, metres and radians.
        blocks: boxes in that frame.
    """

    x: float
    y: float
    yaw: float
    blocks: tuple[Block, ...]

    @cached_property
    def low(self) -> Points:
        return np.min([block.low for block in self.blocks], axis=0)

    @cached_property
    def high(self) -> Points:
        return np.max([block.high for block in self.blocks], axis=0)

    def into_frame(self, points: Points) -> Points:
        """World points to the body's frame."""
        return self.turn(points - np.array([self.x, self.y, 0.0]))

    def turn(self, directions: Points) -> Points:
        """World directions to the body's frame."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return directions @ np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])

    def distance(self, point: Points) -> float:
        """From a world point to the nearest block, 0 inside."""
        p = self.into_frame(point)
        return min(
            float(np.linalg.norm(p - np.clip(p, block.low, block.high))) for block in self.blocks
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitter:
    """A rectangular area light.

    Attributes:
        corner, a, b: a corner and the two full edge vectors; light leaves on the ``a x b`` side.
        radiance: (3,) linear light.
        all_round: shine equally in all directions instead, as a globe of that size does.
    """

    corner: Points
    a: Points
    b: Points
    radiance: Points
    all_round: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sun:
    """A parallel light.

    Attributes:
        direction: (3,) unit vector towards the sun.
        irradiance: (3,) on a surface that faces it.
    """

    direction: Points
    irradiance: Points


@dataclass(frozen=True, slots=True, kw_only=True)
class Sky:
    """What is seen and received where nothing is hit.

    Attributes:
        zenith, horizon: (3,) radiance.
        clouds: (T, T) tileable cover in 0..1, on a plane overhead.
        haze_m: distance over which hazy surfaces fade to the horizon's colour by 1/e.
    """

    zenith: Points
    horizon: Points
    clouds: Float32[np.ndarray, "t t"]
    haze_m: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything a camera can see, and the light in it.

    Attributes:
        surfaces: drawn; when ``shell_m`` is set the first six are the inner faces of the box
            ``[0, shell_m]`` in the order x=0, x=max, y=0, y=max, floor, ceiling.
        bodies: what stops light.
        paints: textures that surfaces and blocks refer to.
        emitters, sun, sky: the lights.
        shell_m: (3,) size of the closed room around the scene, or None outdoors.
    """

    surfaces: tuple[Surface, ...]
    bodies: tuple[Body, ...]
    paints: tuple[Paint, ...]
    sky: Sky
    emitters: tuple[Emitter, ...] = ()
    sun: Sun | None = None
    shell_m: Points | None = None

    @cached_property
    def quads(self) -> "_QuadTable":
        return _QuadTable.of(self.surfaces)

    @cached_property
    def curved(self) -> tuple[tuple[int, Drum | Ball], ...]:
        return tuple((i, s) for i, s in enumerate(self.surfaces) if isinstance(s, Drum | Ball))

    def clearance(self, point: Points) -> float:
        """Distance from a point to the nearest body, drum or ball."""
        solids = [*self.bodies, *(surface for _, surface in self.curved)]
        return min((solid.distance(point) for solid in solids), default=math.inf)

    def sight(self, origin: Points, rays: Points) -> Points:
        """Parameter (n,) of the first body or wall along world directions (n, 3)."""
        rays = rays.astype(np.float32)
        origins = np.broadcast_to(origin.astype(np.float32), rays.shape)
        t, _ = _first_hit(self.bodies, origins, rays)
        if self.shell_m is not None:
            t = np.minimum(t, _shell_exit(self.shell_m, origins, rays)[0])
        return t

    @cached_property
    def atlas(self) -> Float32[np.ndarray, "n 3"]:
        return np.concatenate([paint.pyramid for paint in self.paints])

    @cached_property
    def atlas_offsets(self) -> list[int]:
        """Where each paint starts in the atlas."""
        ends = np.cumsum([len(paint.pyramid) for paint in self.paints])
        return [0, *ends[:-1].tolist()]

    @cached_property
    def lightmaps(self) -> "_Lightmaps":
        return _bake(self)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera.

    Attributes:
        position: (3,) in the world.
        rotation: (3, 3) camera to world.
        K_px: (3, 3) intrinsics, pixel centres at integer + 0.5.
        height, width: image size in pixels.
    """

    position: Float64[np.ndarray, "3"]
    rotation: Float64[np.ndarray, "3 3"]
    K_px: Float64[np.ndarray, "3 3"]
    height: int
    width: int

    @classmethod
    def looking(
        cls,
        position: Points,
        *,
        yaw: float,
        pitch: float,
        fov: float,
        height: int,
        width: int,
    ) -> "Camera":
        """Level camera. Angles in radians; yaw 0 looks along +y, positive turns towards +x.

        Args:
            fov: field of view along the longer side of the image.
        """
        sin_y, cos_y, sin_p, cos_p = math.sin(yaw), math.cos(yaw), math.sin(pitch), math.cos(pitch)
        forward = np.array([cos_p * sin_y, cos_p * cos_y, sin_p])
        right = np.array([cos_y, -sin_y, 0.0])
        focal = max(height, width) / (2 * math.tan(fov / 2))
        K_px = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
        rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
        return cls(
            position=position,
            rotation=rotation,
            K_px=K_px,
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

    def project(self, points: Points) -> tuple[Points, Points]:
        """World points to pixel coordinates (..., 2) and planar depth; in front only."""
        local = (points - self.position) @ self.rotation
        z = local[..., 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            uv = (local @ self.K_px.T)[..., :2] / z[..., None]
        return uv, z


@dataclass(frozen=True, kw_only=True)
class _QuadTable:
    """All quads of a scene as arrays, so that projecting them is a handful of operations."""

    ids: NDArray[np.int64]
    corner: Points
    a: Points
    b: Points
    normal: Points
    size: Points
    quads: tuple[Quad, ...]

    @classmethod
    def of(cls, surfaces: Sequence[Surface]) -> "_QuadTable":
        pairs = [(i, s) for i, s in enumerate(surfaces) if isinstance(s, Quad)]
        quads = tuple(quad for _, quad in pairs)
        a, b = np.array([q.a for q in quads]), np.array([q.b for q in quads])
        return cls(
            ids=np.array([i for i, _ in pairs]),
            corner=np.array([q.corner for q in quads]),
            a=a,
            b=b,
            normal=np.cross(a, b),
            size=np.array([q.size for q in quads], dtype=np.float64),
            quads=quads,
        )

    def coefficients(self, camera: Camera) -> tuple[Points, Points, Points, Points]:
        """(N, 3) rows that are affine in (u, v, 1): 1/z, s/z and t/z; and the (N,) distances.

        With ray d and plane n.X = n.c: 1/z = n.d / n.(c-o), s/z = a.(o-c)/z + a.d.
        """
        offset = camera.position - self.corner
        distance = np.einsum("ni,ni->n", self.normal, offset)
        to_pixel = camera.ray_matrix
        with np.errstate(divide="ignore"):
            w = (self.normal @ to_pixel) / -distance[:, None]
        s = np.einsum("ni,ni->n", self.a, offset)[:, None] * w + self.a @ to_pixel
        t = np.einsum("ni,ni->n", self.b, offset)[:, None] * w + self.b @ to_pixel
        return w, s, t, distance

    def windows(self, camera: Camera) -> tuple[Points, Points]:
        """(N, 2) lowest and highest (u, v) of the part in front; low > high if there is none."""
        along_a, along_b = self.a * self.size[:, :1], self.b * self.size[:, 1:]
        corners = np.stack(
            [
                self.corner,
                self.corner + along_a,
                self.corner + along_a + along_b,
                self.corner + along_b,
            ],
            axis=1,
        )
        return _pixel_bounds(camera, corners, np.roll(corners, -1, axis=1))


def _pixel_bounds(camera: Camera, starts: Points, ends: Points) -> tuple[Points, Points]:
    """Bounds (N, 2) in pixels of polygons given by their edges (N, E, 3), clipped in front."""
    z0 = (starts - camera.position) @ camera.rotation[:, 2]
    z1 = (ends - camera.position) @ camera.rotation[:, 2]
    crosses = (z0 < _NEAR_M) != (z1 < _NEAR_M)
    share = np.where(crosses, (_NEAR_M - z0) / np.where(crosses, z1 - z0, 1.0), 0.0)
    points = np.concatenate([starts, starts + share[..., None] * (ends - starts)], axis=1)
    keep = np.concatenate([z0 >= _NEAR_M, crosses], axis=1)[..., None]
    uv, _ = camera.project(points)
    return np.where(keep, uv, np.inf).min(axis=1), np.where(keep, uv, -np.inf).max(axis=1)


def _box_edges(low: Points, high: Points) -> tuple[Points, Points]:
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    steps = np.abs(corners[:, None] - corners).sum(axis=2)
    starts, ends = np.nonzero(np.triu(steps == 1))
    points = low + corners * (high - low)
    return points[None, starts], points[None, ends]


def cast(
    scene: Scene,
    camera: Camera,
    u: Float64[np.ndarray, " w"],
    v: Float64[np.ndarray, " h"],
    dtype: type[np.float32] | type[np.float64],
) -> tuple[Int16[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """The nearest surface along the ray through each (u, v).

    Args:
        u, v: increasing pixel coordinates of the columns and rows.
        dtype: precision of the result and the tests.

    Returns:
        Surface index (-1: none) and inverse planar depth in 1/m (0: none).
    """
    ids = np.full((len(v), len(u)), -1, dtype=np.int16)
    inverse = np.zeros((len(v), len(u)), dtype=dtype)
    # Neighbouring faces overlap by a hair, so that rounding leaves no crack between them.
    slack = 1e-4 if dtype is np.float32 else 1e-9
    table = scene.quads
    w, s, t, distance = table.coefficients(camera)
    low, high = table.windows(camera)
    columns = np.searchsorted(u, np.stack([low[:, 0] - 1, high[:, 0] + 1]))
    rows = np.searchsorted(v, np.stack([low[:, 1] - 1, high[:, 1] + 1]))
    seen = (distance > 1e-9) & (columns[0] < columns[1]) & (rows[0] < rows[1])
    for i in np.flatnonzero(seen):
        window = np.s_[rows[0, i] : rows[1, i], columns[0, i] : columns[1, i]]
        plane = _AffineGrid(u[window[1]], v[window[0]], dtype)
        quad = table.quads[i]
        depth = plane(w[i])
        hit = depth > inverse[window]
        hit &= _inside(plane, quad, w[i], s[i], t[i], slack)
        for s0, t0, s1, t1 in quad.holes:
            hole = plane(s[i] - s0 * w[i]) > 0
            hole &= plane(s1 * w[i] - s[i]) > 0
            hole &= plane(t[i] - t0 * w[i]) > 0
            hole &= plane(t1 * w[i] - t[i]) > 0
            hit &= ~hole
        np.copyto(inverse[window], depth, where=hit)
        np.copyto(ids[window], np.int16(table.ids[i]), where=hit)
    for index, surface in scene.curved:
        low, high = _pixel_bounds(camera, *_box_edges(*surface.bounds))
        row = slice(*np.searchsorted(v, [low[0, 1] - 1, high[0, 1] + 1]))
        column = slice(*np.searchsorted(u, [low[0, 0] - 1, high[0, 0] + 1]))
        if row.start < row.stop and column.start < column.stop:
            rays = _rays(camera, *np.broadcast_arrays(u[column], v[row, None]))
            depth = surface.inverse_depth(camera.position, rays)
            hit = depth > inverse[row, column]
            np.copyto(inverse[row, column], depth, where=hit, casting="same_kind")
            np.copyto(ids[row, column], np.int16(index), where=hit)
    return ids, inverse


def _inside(
    plane: "_AffineGrid", quad: Quad, w: Points, s: Points, t: Points, slack: float
) -> NDArray[np.bool_]:
    """Whether s and t are within the quad, tested on s/z and t/z to stay affine."""
    size_s, size_t = quad.size
    if quad.disc:
        across, along = plane(s * 2 / size_s - w), plane(t * 2 / size_t - w)
        return across**2 + along**2 <= plane(w) ** 2
    inside = plane(s + slack * w) >= 0
    inside &= plane((size_s + slack) * w - s) >= 0
    inside &= plane(t + slack * w) >= 0
    inside &= plane((size_t + slack) * w - t) >= 0
    return inside


@dataclass(frozen=True, slots=True)
class _AffineGrid:
    """Evaluates q . (u, v, 1) over a grid as a sum of a column and a row."""

    u: Points
    v: Points
    dtype: type

    def __call__(self, q: Points) -> NDArray[np.floating]:
        row = (q[0] * self.u + q[2]).astype(self.dtype)
        return np.add.outer((q[1] * self.v).astype(self.dtype), row)


def _rays(camera: Camera, u: Points, v: Points) -> Points:
    """World directions (..., 3) of planar depth 1 through pixels."""
    m = camera.ray_matrix
    return u[..., None] * m[:, 0] + v[..., None] * m[:, 1] + m[:, 2]


def depth_of(inverse: Float64[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """Planar z in metres from inverse depth, +inf where nothing was hit."""
    with np.errstate(divide="ignore"):
        return (1 / inverse).astype(np.float32)


def shade(scene: Scene, camera: Camera, *, samples: int = 2) -> Float32[np.ndarray, "h w 3"]:
    """Radiance per pixel, averaged over ``samples x samples`` rays."""
    u, v = camera.grid(samples)
    ids, inverse = cast(scene, camera, u, v, np.float32)
    radiance = _surface_radiance(scene, camera, u, v, ids.ravel(), inverse.ravel())
    # Highlights are cut before averaging: an edge against a bright window stays smooth.
    np.minimum(radiance, 4.0, out=radiance)
    fine = radiance.reshape(camera.height, samples, camera.width, samples, 3)
    total = sum(fine[:, i, :, j] for i in range(samples) for j in range(samples))
    return np.asarray(total, dtype=np.float32) / np.float32(samples**2)


def _surface_radiance(
    scene: Scene,
    camera: Camera,
    u: Points,
    v: Points,
    ids: NDArray[np.int16],
    inverse: NDArray[np.float32],
) -> Float32[np.ndarray, "n 3"]:
    order = np.argsort(ids, kind="stable")
    bounds = np.searchsorted(ids[order], np.arange(-1, len(scene.surfaces) + 1))
    texel = np.zeros(ids.size, dtype=np.int32)
    cell = np.zeros(ids.size, dtype=np.int32)
    w, s, t, _ = scene.quads.coefficients(camera)
    offsets = scene.atlas_offsets
    row_of = dict(zip(scene.quads.ids.tolist(), range(len(w)), strict=True))
    # A sample's footprint on a plane grows with z^1.5 (z for scale, half a power for the slant).
    focal = float(camera.K_px[0, 0]) * len(u) / camera.width
    with np.errstate(divide="ignore"):
        footprint = -1.5 * np.log2(inverse) - np.float32(math.log2(focal))
    for index, surface in enumerate(scene.surfaces):
        pixels = order[bounds[index + 1] : bounds[index + 2]]
        if not pixels.size:
            continue
        uu, vv = (u[pixels % len(u)]).astype(np.float32), v[pixels // len(u)].astype(np.float32)
        depth = 1 / inverse[pixels]
        at_s: Points
        at_t: Points
        if isinstance(surface, Quad):
            i = row_of[index]
            at_s, at_t = _affine(s[i], uu, vv) * depth, _affine(t[i], uu, vv) * depth
            slant = 0.5 * math.log2(_facing(camera, scene.quads, i))
        else:
            points = camera.position + depth[:, None] * _rays(camera, uu, vv)
            at_s, at_t = surface.coordinates(points)
            slant = 0.5 * math.log2(float(depth.mean()))
        paint = scene.paints[surface.coat.paint]
        level = footprint[pixels] - np.float32(slant + math.log2(paint.period_m / TEXTURE_SIZE))
        # Every surface shows its own part of the texture.
        shift = index * 0.618 * paint.period_m
        texel[pixels] = _texel(at_s + shift, at_t + shift, level, paint.period_m)
        texel[pixels] += offsets[surface.coat.paint]
        cell[pixels] = scene.lightmaps.cell(index, at_s, at_t)
    radiance = scene.atlas.take(texel, axis=0)
    radiance *= scene.lightmaps.values.take(cell, axis=0)
    _fade(scene, radiance, ids, inverse)
    missed = order[bounds[0] : bounds[1]]
    if missed.size:
        rays = _rays(camera, u[missed % len(u)], v[missed // len(u)])
        radiance[missed] = _sky_radiance(scene.sky, rays)
    return radiance


def _affine(q: Points, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.float32]:
    q32 = q.astype(np.float32)
    total = q32[0] * u
    total += q32[1] * v
    total += q32[2]
    return total


def _facing(camera: Camera, table: _QuadTable, i: int) -> float:
    """The camera's distance from the plane: depth / distance is the slant's stretch."""
    return max(float(table.normal[i] @ (camera.position - table.corner[i])), 1e-3)


def _texel(s: Points, t: Points, level: Points, period_m: float) -> NDArray[np.int32]:
    """Index into a paint's pyramid of the texel at (s, t) metres on the given mip level."""
    lod = np.clip(np.rint(level), 0, _LEVELS - 1).astype(np.int32)
    scale = TEXTURE_SIZE / period_m
    column = np.floor(s * scale).astype(np.int32) & (TEXTURE_SIZE - 1)
    row = np.floor(t * scale).astype(np.int32) & (TEXTURE_SIZE - 1)
    return _LEVEL_STARTS[lod] + (((row >> lod) << (_LEVELS - 1 - lod)) + (column >> lod))


_LEVEL_STARTS = np.concatenate(
    [[0], np.cumsum([(TEXTURE_SIZE >> k) ** 2 for k in range(_LEVELS - 1)])]
).astype(np.int32)


def _sky_radiance(sky: Sky, rays: Points) -> NDArray[np.float32]:
    """Radiance (n, 3) of the sky along world directions (n, 3)."""
    up = rays[:, 2] / np.linalg.norm(rays, axis=1)
    height = np.clip(up, 0, 1)[:, None] ** 0.5
    clear = sky.horizon + (sky.zenith - sky.horizon) * height
    # Clouds lie on a plane overhead, so that they shrink towards the horizon.
    overhead = 40 * rays[:, :2] / np.maximum(rays[:, 2:], 0.02 * np.abs(rays).max())
    column, row = (np.floor(overhead).astype(np.int64) % len(sky.clouds)).T
    cover = sky.clouds[row, column] * np.clip((up - 0.02) * 8, 0, 1)
    white = np.maximum(sky.horizon, sky.zenith).max() * 1.15
    return (clear + (white - clear) * cover[:, None]).astype(np.float32)


def _fade(
    scene: Scene,
    radiance: NDArray[np.float32],
    ids: NDArray[np.int16],
    inverse: NDArray[np.float32],
) -> None:
    """Aerial perspective: hazy surfaces fade to the horizon's colour, in place."""
    hazy = np.array([*(surface.coat.hazy for surface in scene.surfaces), False])
    pixels = np.flatnonzero(hazy[ids])
    if pixels.size:
        share = 1 - np.exp(-1 / (inverse[pixels] * np.float32(scene.sky.haze_m)))
        horizon = scene.sky.horizon.astype(np.float32)
        radiance[pixels] += share[:, None] * (horizon - radiance[pixels])


def develop(
    radiance: Float32[np.ndarray, "h w 3"], *, exposure: float = 1.0
) -> UInt8[np.ndarray, "h w 3"]:
    """Linear radiance to sRGB bytes, exposed so that the picture's mean is a middle grey.

    Args:
        exposure: factor on that automatic exposure.
    """
    # The logarithmic mean, as a light meter weighs it: a bright window does not darken the room.
    sparse = radiance[::4, ::4].mean(axis=2)
    mean = float(np.exp(np.log(np.maximum(sparse, 1e-3)).mean()))
    gain = np.float32(exposure * 0.3 / mean)
    codes = np.clip(radiance * (gain * (len(_TONES) / _TONE_RANGE)), 0, len(_TONES) - 1)
    return _TONES.take(codes.astype(np.uint16))


_TONE_RANGE = 8.0


def _tone_table() -> NDArray[np.uint8]:
    """A filmic shoulder (Narkowicz's fit of the ACES curve), then the sRGB transfer function."""
    x = (np.arange(65536) + 0.5) / 65536 * _TONE_RANGE
    y = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    return np.rint(255 * encode_srgb(y)).astype(np.uint8)


def encode_srgb(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light 0..1 to sRGB 0..1 (IEC 61966-2-1)."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decode_srgb(encoded: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB 0..1 to linear light 0..1 (IEC 61966-2-1)."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


_TONES = _tone_table()


@dataclass(frozen=True, kw_only=True)
class _Lightmaps:
    """Irradiance over pi of every surface on a grid of cells.

    Attributes:
        values: (L, 3) float32, the surfaces one after the other, rows of constant t.
        starts: (N,) where each surface begins.
        cells: (N, 2) number of cells along s and t.
        sizes: (N, 2) lengths along s and t.
    """

    values: NDArray[np.float32]
    starts: list[int]
    cells: list[tuple[int, int]]
    sizes: list[tuple[float, float]]

    def cell(
        self, index: int, s: NDArray[np.floating], t: NDArray[np.floating]
    ) -> NDArray[np.int32]:
        """Index into ``values`` of the cells at surface coordinates."""
        (columns, rows), (size_s, size_t) = self.cells[index], self.sizes[index]
        column = np.clip(s * (columns / size_s), 0, columns - 1).astype(np.int32)
        row = np.clip(t * (rows / size_t), 0, rows - 1).astype(np.int32)
        return self.starts[index] + row * columns + column


@dataclass(frozen=True, kw_only=True)
class _Nodes:
    """The points at which light is computed, all surfaces one after the other.

    Attributes:
        points, normals: (N, 3) float32.
        grids: per surface (first node, nodes along t, nodes along s); zero nodes if its light is
            fixed.
    """

    points: NDArray[np.float32]
    normals: NDArray[np.float32]
    grids: list[tuple[int, int, int]]


def _place_nodes(surfaces: Sequence[Surface]) -> _Nodes:
    points: list[Points] = [np.zeros((0, 3))]
    normals: list[Points] = [np.zeros((0, 3))]
    grids = []
    start = 0
    for surface in surfaces:
        if surface.coat.light is not None:
            grids.append((start, 0, 0))
            continue
        s, t = (_node_line(length, surface.coat.spacing_m) for length in surface.size)
        at, normal = surface.at(*np.meshgrid(s, t))
        points.append((at + _SKIN_M * normal).reshape(-1, 3))
        normals.append(normal.reshape(-1, 3))
        grids.append((start, len(t), len(s)))
        start += len(s) * len(t)
    return _Nodes(
        points=np.concatenate(points).astype(np.float32),
        normals=np.concatenate(normals).astype(np.float32),
        grids=grids,
    )


def _node_line(length: float, spacing: float) -> Points:
    if length < 0.4 * spacing:
        return np.array([length / 2])
    inset = min(0.01, 0.1 * length)
    return np.linspace(inset, length - inset, min(max(round(length / spacing) + 1, 2), 96))


def _bake(scene: Scene) -> _Lightmaps:
    nodes = _place_nodes(scene.surfaces)
    direct = _direct_light(scene, nodes)
    bounced = _bounced_light(scene, nodes, direct)
    gain = 1.0
    if scene.shell_m is not None:
        shell = scene.surfaces[:6]
        albedo = np.mean([scene.paints[surface.coat.paint].mean for surface in shell])
        bounced /= 1 - albedo  # the geometric series of all further bounces
        end = nodes.grids[6][0]
        gain = 1 / float((direct + bounced)[:end].mean())  # a lit room has irradiance around pi
    values, starts, cells, total = [], [], [], 0
    for surface, (start, rows, columns) in zip(scene.surfaces, nodes.grids, strict=True):
        if surface.coat.light is not None:
            grid = _open_grid(surface, surface.coat.light)
        else:
            span = np.s_[start : start + rows * columns]
            soft = bounced[span].reshape(rows, columns, 3)
            if min(rows, columns) > 3:
                soft = _blur(_blur(soft))
            grid = _refine(direct[span].reshape(rows, columns, 3) + soft) * np.float32(gain)
        values.append(grid.reshape(-1, 3))
        starts.append(total)
        cells.append((grid.shape[1], grid.shape[0]))
        total += grid.shape[0] * grid.shape[1]
    return _Lightmaps(
        values=np.concatenate(values),
        starts=starts,
        cells=cells,
        sizes=[surface.size for surface in scene.surfaces],
    )


def _open_grid(surface: Surface, light: OpenLight) -> NDArray[np.float32]:
    cells = (1, 1) if isinstance(surface, Quad) else (16, 8)
    s, t = ((np.arange(n) + 0.5) / n * size for n, size in zip(cells, surface.size, strict=True))
    _, normals = surface.at(*np.meshgrid(s, t))
    return light.at(normals).astype(np.float32)


def _blur(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """A 3x3 binomial filter: the gather uses few rays, and bounced light is smooth."""
    padded = np.pad(grid, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / np.float32(16)


def _refine(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bilinear interpolation to cells finer than the baked points."""
    rows, columns = (_interpolation(n) for n in grid.shape[:2])
    return np.einsum("rj,jsc->rsc", rows, np.einsum("sk,jkc->jsc", columns, grid))


def _interpolation(nodes: int) -> NDArray[np.float32]:
    """(cells, nodes) weights of linear interpolation at cell centres."""
    if nodes == 1:
        return np.ones((1, 1), dtype=np.float32)
    cells = (nodes - 1) * _LIGHTMAP_REFINE
    at = (np.arange(cells) + 0.5) / _LIGHTMAP_REFINE
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(nodes))).astype(np.float32)


def _direct_light(scene: Scene, nodes: _Nodes) -> NDArray[np.float32]:
    """(N, 3) irradiance over pi from area lights and the sun, with shadows."""
    light = np.zeros_like(nodes.points)
    side = round(min(max(math.sqrt(_EMITTER_RAYS / max(len(scene.emitters), 1)), 2), 4))
    steps = (np.arange(side) + 0.5) / side
    for emitter in scene.emitters:
        normal = np.cross(emitter.a, emitter.b)
        area = float(np.linalg.norm(normal))
        facing = (normal / area).astype(np.float32)
        for i, alpha in enumerate(steps):
            for j, beta in enumerate(steps):
                # A sheared lattice: no two samples share a row, which softens shadow steps.
                shifted = (beta + (i / side - 0.5) / side) % 1
                sheared = (alpha + (j / side - 0.5) / side) % 1
                sample = emitter.corner + sheared * emitter.a + shifted * emitter.b
                to_light = sample.astype(np.float32) - nodes.points
                square = np.maximum(np.einsum("ni,ni->n", to_light, to_light), 0.04)
                leaving = np.sqrt(square) if emitter.all_round else -(to_light @ facing)
                arriving = np.maximum(np.einsum("ni,ni->n", to_light, nodes.normals), 0)
                weight = area / side**2 * np.maximum(leaving, 0) * arriving / square**2
                lit = np.flatnonzero(weight > 0)
                blocked, _ = _first_hit(scene.bodies, nodes.points[lit], to_light[lit])
                weight[lit[blocked < 1]] = 0
                light += weight[:, None] * emitter.radiance.astype(np.float32)
    if scene.sun is not None:
        light += _sunlight(scene, scene.sun, nodes)
    return light / np.float32(math.pi)


def _sunlight(scene: Scene, sun: Sun, nodes: _Nodes) -> NDArray[np.float32]:
    direction = sun.direction.astype(np.float32)
    weight = np.maximum(nodes.normals @ direction, 0)
    lit = np.flatnonzero(weight > 0)
    towards = np.broadcast_to(direction, (len(lit), 3))
    blocked, _ = _first_hit(scene.bodies, nodes.points[lit], towards)
    dark = np.isfinite(blocked)
    if scene.shell_m is not None:
        exit_t, face = _shell_exit(scene.shell_m, nodes.points[lit], towards)
        through = _through_hole(scene, face, nodes.points[lit] + exit_t[:, None] * towards)
        dark |= ~through
    weight[lit[dark]] = 0
    return weight[:, None] * sun.irradiance.astype(np.float32)


def _bounced_light(scene: Scene, nodes: _Nodes, direct: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, 3) mean radiance arriving from other surfaces and the open sky, cosine-weighted."""
    local = _cosine_directions(_GATHER_RAYS)
    albedo = np.array([paint.mean for paint in scene.paints])
    typical = direct.mean(axis=0)
    # With few rays, the small bright patch around a lamp would leave spots on the walls.
    reflected = np.minimum(direct, 2.5 * typical)
    gathered = np.zeros_like(direct)
    chunk = 400  # keeps the rays of a step in the processor's cache
    for first in range(0, len(direct), chunk):
        span = np.s_[first : first + chunk]
        frames = _tangent_frames(nodes.normals[span])
        rays = np.einsum("kj,nij->nki", local, frames).reshape(-1, 3)
        origins = np.repeat(nodes.points[span], _GATHER_RAYS, axis=0)
        t, paint = _first_hit(scene.bodies, origins, rays)
        radiance = albedo[paint] * typical
        if scene.shell_m is None:
            seen, distant = _open_air(scene.sky, typical, rays), np.full_like(t, np.inf)
        else:
            distant, face = _shell_exit(scene.shell_m, origins, rays)
            seen = _shell_radiance(
                scene, nodes, reflected, albedo, face, origins + distant[:, None] * rays
            )
        radiance = np.where((t < distant)[:, None], radiance, seen)
        # Nearby surfaces are themselves in a corner that one bounce does not reach.
        nearness = np.minimum(1, np.minimum(t, distant) / np.float32(0.5)) ** np.float32(0.4)
        radiance *= nearness[:, None]
        gathered[span] = radiance.reshape(-1, _GATHER_RAYS, 3).mean(axis=1)
    return gathered


def _open_air(sky: Sky, typical: NDArray[np.float32], rays: NDArray[np.float32]) -> Points:
    up = np.clip(rays[:, 2:], 0, 1)
    above = sky.horizon + (sky.zenith - sky.horizon) * up
    return np.where(rays[:, 2:] > 0, above, 0.25 * typical).astype(np.float32)


def _shell_radiance(
    scene: Scene,
    nodes: _Nodes,
    direct: NDArray[np.float32],
    albedo: NDArray[np.float32],
    face: NDArray[np.int8],
    points: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What the walls, floor and ceiling send back; nothing through an opening (an emitter)."""
    radiance = np.zeros_like(points)
    for index in range(6):
        rays = np.flatnonzero(face == index)
        quad = scene.surfaces[index]
        assert isinstance(quad, Quad)
        s, t = _quad_coordinates(quad, points[rays])
        start, rows, columns = nodes.grids[index]
        column = np.clip(np.rint(s * ((columns - 1) / quad.size[0])), 0, columns - 1)
        row = np.clip(np.rint(t * ((rows - 1) / quad.size[1])), 0, rows - 1)
        node = (start + row * columns + column).astype(np.int64)
        radiance[rays] = albedo[quad.coat.paint] * direct[node]
        for s0, t0, s1, t1 in quad.holes:
            radiance[rays[(s > s0) & (s < s1) & (t > t0) & (t < t1)]] = 0
    return radiance


def _through_hole(
    scene: Scene, face: NDArray[np.int8], points: NDArray[np.float32]
) -> NDArray[np.bool_]:
    through = np.zeros(len(points), dtype=bool)
    for index in range(6):
        quad = scene.surfaces[index]
        assert isinstance(quad, Quad)
        s, t = _quad_coordinates(quad, points)
        for s0, t0, s1, t1 in quad.holes:
            through |= (face == index) & (s > s0) & (s < s1) & (t > t0) & (t < t1)
    return through


def _quad_coordinates(quad: Quad, points: NDArray[np.float32]) -> tuple[Points, Points]:
    offset = points - quad.corner.astype(np.float32)
    return offset @ quad.a.astype(np.float32), offset @ quad.b.astype(np.float32)


def _shell_exit(
    shell_m: Points, origins: NDArray[np.float32], rays: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Ray parameter (n,) and face (n,) at which rays leave the box [0, shell_m]."""
    wall = np.where(rays > 0, shell_m.astype(np.float32), np.float32(0))
    t = np.abs((wall - origins) / np.where(np.abs(rays) < 1e-9, np.float32(1e-9), rays))
    axis = t.argmin(axis=1)
    row = np.arange(len(t))
    return t[row, axis], (2 * axis + (rays[row, axis] > 0)).astype(np.int8)


def _first_hit(
    bodies: Sequence[Body], origins: NDArray[np.float32], rays: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Ray parameter (n,) of the nearest block, inf if none, and the paint of that block."""
    t = np.full(len(rays), np.inf, dtype=np.float32)
    paint = np.zeros(len(rays), dtype=np.int16)
    for first in range(0, len(rays), _CHUNK):
        span = np.s_[first : first + _CHUNK]
        starts, steps = np.ascontiguousarray(origins[span].T), np.ascontiguousarray(rays[span].T)
        for body in bodies:
            _hit_body(body, starts, steps, t[span], paint[span])
    return t, paint


_CHUNK = 8192  # rays that stay in the processor's cache while all bodies are tried


def _hit_body(
    body: Body,
    starts: NDArray[np.float32],
    steps: NDArray[np.float32],
    t: NDArray[np.float32],
    paint: NDArray[np.int16],
) -> None:
    """Lower t, and set paint, where rays (3, n) hit a block of the body first."""
    c, s = np.float32(math.cos(body.yaw)), np.float32(math.sin(body.yaw))
    x, y = starts[0] - np.float32(body.x), starts[1] - np.float32(body.y)
    start = np.stack([c * x + s * y, c * y - s * x, starts[2]])
    inverse = np.stack([c * steps[0] + s * steps[1], c * steps[1] - s * steps[0], steps[2]])
    inverse[np.abs(inverse) < 1e-9] = 1e-9
    np.reciprocal(inverse, out=inverse)
    enter, leave = _slab(start, inverse, body.low, body.high)
    near = np.flatnonzero((enter < leave) & (leave > 0) & (enter < t))
    if not near.size:
        return
    start, inverse = start[:, near], inverse[:, near]
    for block in body.blocks:
        enter, leave = _slab(start, inverse, block.low, block.high)
        hit = (enter < leave) & (leave > 0) & (enter < t[near])
        t[near[hit]] = np.maximum(enter[hit], 0)
        paint[near[hit]] = block.paint


def _slab(
    start: NDArray[np.float32], inverse: NDArray[np.float32], low: Points, high: Points
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where rays (3, n) enter and leave an axis-aligned box."""
    at_low = (low.astype(np.float32)[:, None] - start) * inverse
    at_high = (high.astype(np.float32)[:, None] - start) * inverse
    enter, leave = np.minimum(at_low, at_high), np.maximum(at_low, at_high)
    return (
        np.maximum(np.maximum(enter[0], enter[1]), enter[2]),
        np.minimum(np.minimum(leave[0], leave[1]), leave[2]),
    )


def _cosine_directions(n: int) -> NDArray[np.float32]:
    """(n, 3) directions around +z with density cosine / pi: a Fibonacci spiral lifted up."""
    k = np.arange(n)
    radius = np.sqrt((k + 0.5) / n)
    angle = k * math.pi * (3 - math.sqrt(5))
    columns = [radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - radius**2)]
    return np.stack(columns, axis=1).astype(np.float32)


def _tangent_frames(normals: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 3, 3) rotations whose last column is the normal."""
    helper = np.where(np.abs(normals[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    first = np.cross(helper, normals)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(normals, first), normals], axis=2).astype(np.float32)
