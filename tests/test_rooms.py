"""Generated rooms and pictures: exact depth, cameras, light, determinism, and the two readers."""

import hashlib
import io
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flatdepth.data.readers.base import Reader
from flatdepth.data.readers.rooms import PicturesReader, RoomsReader
from flatdepth.data.shards.codec import decode_frame
from flatdepth.errors import UserError
from flatdepth.rooms.bodies import Block, Body
from flatdepth.rooms.camera import Camera
from flatdepth.rooms.colour import decode_srgb, encode_srgb
from flatdepth.rooms.frames import render_room, room_camera, room_scene
from flatdepth.rooms.lightmap import bake
from flatdepth.rooms.paint import Paint
from flatdepth.rooms.raycast import cast, depth_of
from flatdepth.rooms.scene import Emitter, Scene, Sky
from flatdepth.rooms.shade import shade
from flatdepth.rooms.styles import STYLES
from flatdepth.rooms.surfaces import Ball, Coat, Drum, Quad, Surface
from flatdepth.types import Frame

EAST, NORTH, UP = np.eye(3)
SOME_ROOMS = range(12)
SMALL = (42, 56)


@pytest.fixture(scope="module")
def frames() -> dict[tuple[int, int], Frame]:
    """Four views of each of some rooms."""
    pairs = [(scene, frame) for scene in SOME_ROOMS for frame in range(4)]
    return {(scene, frame): render_room(7, scene, frame, *SMALL) for scene, frame in pairs}


def uniform_sky(radiance: float) -> Sky:
    level = np.full(3, radiance)
    clear = np.zeros((256, 256), dtype=np.float32)
    return Sky(zenith=level, horizon=level, clouds=clear, haze_m=1e9)


def plain_paint(albedo: Sequence[float]) -> Paint:
    return Paint.from_texture(np.broadcast_to(np.array(albedo), (256, 256, 3)), 1.0)


def scene_of(*surfaces: Surface, **others: object) -> Scene:
    parts = {
        "bodies": (),
        "paints": (plain_paint((0.5, 0.5, 0.5)),),
        "sky": uniform_sky(1.0),
    }
    return Scene(surfaces=surfaces, **(parts | others))


def floor_quad(half: float, **coat: object) -> Quad:
    return Quad(
        corner=np.array([-half, -half, 0.0]),
        a=EAST,
        b=NORTH,
        size=(2 * half, 2 * half),
        coat=Coat(**coat),
    )


def rays_of(camera: Camera) -> np.ndarray:
    """World directions (H, W, 3) through pixel centres, from K_px and the rotation alone."""
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
    return pixels @ np.linalg.inv(camera.K_px).T @ camera.rotation.T


def slow_depth(scene: Scene, camera: Camera) -> np.ndarray:
    """Planar z by intersecting every ray with every surface through textbook vector algebra."""
    rays, origin = rays_of(camera), camera.position
    depth = np.full(rays.shape[:2], np.inf)
    for surface in scene.surfaces:
        if isinstance(surface, Quad):
            z = slow_quad(surface, origin, rays)
        elif isinstance(surface, Drum):
            z = slow_quadric(surface, origin - surface.base, rays, np.array([1.0, 1.0, 0.0]))
            height = origin[2] + z * rays[..., 2] - surface.base[2]
            z = np.where((height >= 0) & (height <= surface.height), z, np.inf)
        else:
            z = slow_quadric(surface, origin - surface.centre, rays, np.ones(3))
        depth = np.minimum(depth, z)
    return depth


def slow_quad(quad: Quad, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    normal = np.cross(quad.a, quad.b)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = ((quad.corner - origin) @ normal) / (rays @ normal)
        offset = origin + z[..., None] * rays - quad.corner
        s, t = offset @ quad.a, offset @ quad.b
        hit = (z > 0) & (rays @ normal < 0)
        if quad.disc:
            hit &= np.hypot(s / quad.size[0] - 0.5, t / quad.size[1] - 0.5) <= 0.5
        hit &= (s >= 0) & (s <= quad.size[0]) & (t >= 0) & (t <= quad.size[1])
        for s0, t0, s1, t1 in quad.holes:
            hit &= ~((s > s0) & (s < s1) & (t > t0) & (t < t1))
    return np.where(hit, z, np.inf)


def slow_quadric(
    solid: Drum | Ball, offset: np.ndarray, rays: np.ndarray, axes: np.ndarray
) -> np.ndarray:
    """Smaller positive root of |axes * (offset + z ray)|^2 = r^2."""
    depth = np.full(rays.shape[:2], np.inf)
    c = (axes * offset) @ offset - solid.radius**2
    for index in np.ndindex(depth.shape):
        a, b = (axes * rays[index]) @ rays[index], 2 * (axes * rays[index]) @ offset
        if b * b - 4 * a * c > 0:
            roots = np.roots([a, b, c]).real
            depth[index] = roots.min() if roots.min() > 0 else np.inf
    return depth


def test_pixel_centres_are_at_integer_plus_half() -> None:
    camera = Camera.looking(np.array([0.0, 0.0, 0.0]), yaw=0, pitch=0, fov=1.2, height=4, width=8)
    # A wall 3 m ahead whose left edge is seen at u = cx + 0.25.
    edge = 0.25 / camera.K_px[0, 0] * 3
    wall = Quad(corner=np.array([edge, 3, -9]), a=EAST, b=UP, size=(9, 18), coat=Coat())
    depth = depth_of(cast(scene_of(wall), camera, *camera.grid(1), np.float64)[1])
    assert np.isinf(depth[:, :4]).all()
    np.testing.assert_array_equal(depth[:, 4:], np.float32(3))


@settings(max_examples=60, deadline=None)
@given(
    place=st.tuples(*[st.floats(0.05, 0.95)] * 3),
    yaw=st.floats(-math.pi, math.pi),
    pitch=st.floats(-0.6, 0.6),
    fov=st.floats(0.5, 1.6),
    shape=st.sampled_from([(12, 16), (16, 12), (9, 9)]),
)
def test_box_depth_is_the_closed_form(
    place: tuple[float, float, float],
    yaw: float,
    pitch: float,
    fov: float,
    shape: tuple[int, int],
) -> None:
    size = np.array([4.0, 7.0, 2.7])
    camera = Camera.looking(
        np.array(place) * size, yaw=yaw, pitch=pitch, fov=fov, height=shape[0], width=shape[1]
    )
    _, inverse = cast(empty_room(size), camera, *camera.grid(1), np.float64)
    rays = rays_of(camera)
    with np.errstate(divide="ignore", over="ignore"):
        exits = np.abs((np.where(rays > 0, size, 0) - camera.position) / rays)
    np.testing.assert_allclose(1 / inverse, exits.min(axis=-1), rtol=1e-11)


def empty_room(size: np.ndarray) -> Scene:
    faces = [
        ((0, 0, 0), NORTH, UP, (size[1], size[2])),
        ((size[0], size[1], 0), -NORTH, UP, (size[1], size[2])),
        ((size[0], 0, 0), -EAST, UP, (size[0], size[2])),
        ((0, size[1], 0), EAST, UP, (size[0], size[2])),
        ((0, 0, 0), EAST, NORTH, (size[0], size[1])),
        ((0, 0, size[2]), NORTH, EAST, (size[1], size[0])),
    ]
    quads = [
        Quad(corner=np.array(c, dtype=float), a=a, b=b, size=extent, coat=Coat())
        for c, a, b, extent in faces
    ]
    return scene_of(*quads, shell_m=size)


@pytest.mark.parametrize("scene", [0, 3, 5])
def test_depth_equals_an_independent_ray_tracer(scene: int) -> None:
    frame = render_room(7, scene, 1, 24, 32)
    camera = room_camera(7, scene, 1, 24, 32)
    expected = slow_depth(room_scene(7, scene), camera)
    np.testing.assert_array_equal(np.isinf(frame.depth_m), np.isinf(expected))
    np.testing.assert_allclose(frame.depth_m, expected, rtol=1e-6)


def test_rooms_use_every_kind_of_surface() -> None:
    surfaces = [s for scene in SOME_ROOMS for s in room_scene(7, scene).surfaces]
    assert {type(s) for s in surfaces} == {Quad, Drum, Ball}
    quads = [s for s in surfaces if isinstance(s, Quad)]
    assert any(q.disc for q in quads)
    assert any(q.holes for q in quads)


def test_inverse_depth_is_affine_in_pixels_on_every_wall(
    frames: dict[tuple[int, int], Frame],
) -> None:
    fitted = 0
    for (scene, number), frame in frames.items():
        camera = room_camera(7, scene, number, *SMALL)
        ids, _ = cast(room_scene(7, scene), camera, *camera.grid(1), np.float64)
        for wall in range(6):
            v, u = np.nonzero(ids == wall)
            if len(u) < 20:
                continue
            design = np.column_stack([u + 0.5, v + 0.5, np.ones(len(u))])
            inverse = 1 / frame.depth_m[v, u].astype(np.float64)
            plane, *_ = np.linalg.lstsq(design, inverse)
            assert np.abs(design @ plane - inverse).max() < 1e-6
            fitted += 1
    assert fitted > 100


def test_depth_is_positive_or_sky_and_nothing_is_near(
    frames: dict[tuple[int, int], Frame],
) -> None:
    for frame in frames.values():
        assert not np.isnan(frame.depth_m).any()
        assert frame.depth_m.min() > 0.25
        assert frame.depth_m[np.isfinite(frame.depth_m)].max() < 200
    assert any(np.isinf(frame.depth_m).any() for frame in frames.values())


def test_cameras_are_inside_the_room_and_outside_of_things() -> None:
    for scene in SOME_ROOMS:
        room = room_scene(7, scene)
        assert room.shell_m is not None
        for number in range(4):
            position = room_camera(7, scene, number, *SMALL).position
            assert ((position > 0.4) & (position < room.shell_m - 0.4)).all()
            for body in room.bodies:
                local = body.into_frame(position)
                for block in body.blocks:
                    outside = np.maximum(block.low - local, local - block.high).max()
                    assert outside > 0.2


def test_walls_leave_room_for_pictures(frames: dict[tuple[int, int], Frame]) -> None:
    shares = []
    for scene, number in frames:
        camera = room_camera(7, scene, number, *SMALL)
        ids, _ = cast(room_scene(7, scene), camera, *camera.grid(1), np.float64)
        shares.append(np.isin(ids, range(4)).mean())
    assert np.mean(np.array(shares) > 0.25) >= 0.8


def test_views_and_rooms_and_seeds_differ(frames: dict[tuple[int, int], Frame]) -> None:
    other = render_room(8, 0, 0, *SMALL)
    pictures = [frame.image.tobytes() for frame in (*frames.values(), other)]
    assert len(set(pictures)) == len(pictures)
    depths = [frame.depth_m.tobytes() for frame in (*frames.values(), other)]
    assert len(set(depths)) == len(depths)


def digest(frame: Frame) -> str:
    return hashlib.sha256(frame.image.tobytes() + frame.depth_m.tobytes()).hexdigest()


def test_another_process_and_order_give_the_same_bits(
    frames: dict[tuple[int, int], Frame],
) -> None:
    pairs = [(2, 3), (0, 1), (2, 0)]
    code = (
        "import hashlib, json\n"
        "from flatdepth.data.readers.rooms import render_room\n"
        f"frames = [render_room(7, s, f, *{SMALL}) for s, f in {pairs}]\n"
        "print(json.dumps([hashlib.sha256(f.image.tobytes() + f.depth_m.tobytes()).hexdigest()"
        " for f in frames]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [digest(frames[pair]) for pair in pairs]


def test_resolution_changes_neither_camera_nor_geometry() -> None:
    coarse, fine = render_room(7, 1, 0, 20, 30), render_room(7, 1, 0, 60, 90)
    # The centre of a coarse pixel is the centre of the middle one of its 3x3 fine pixels.
    np.testing.assert_allclose(coarse.depth_m, fine.depth_m[1::3, 1::3], rtol=1e-6)
    np.testing.assert_allclose(fine.K_px[:2], 3 * coarse.K_px[:2], rtol=1e-12)


def test_float32_colour_rays_see_what_float64_depth_rays_see() -> None:
    for scene in range(4):
        camera = room_camera(7, scene, 0, 126, 168)
        room = room_scene(7, scene)
        fast, fast_inverse = cast(room, camera, *camera.grid(1), np.float32)
        exact, exact_inverse = cast(room, camera, *camera.grid(1), np.float64)
        same = fast == exact
        assert same.mean() > 0.995
        np.testing.assert_allclose(fast_inverse[same], exact_inverse[same], rtol=1e-3, atol=1e-6)


def test_open_ground_under_a_uniform_sky_receives_its_radiance() -> None:
    # Irradiance over pi below a uniform hemisphere of radiance L is L.
    scene = scene_of(floor_quad(5.0), sky=uniform_sky(0.7))
    np.testing.assert_allclose(bake(scene).values, 0.7, rtol=1e-5)


def small_lamp(height: float, **kind: bool) -> Emitter:
    side = 0.05
    return Emitter(
        corner=np.array([-side / 2, -side / 2, height]),
        a=side * NORTH,
        b=side * EAST,
        radiance=np.array([100.0, 200.0, 300.0]),
        **kind,
    )


@pytest.mark.parametrize("all_round", [False, True])
def test_small_lamp_follows_the_inverse_square_law(all_round: bool) -> None:
    height, area = 2.0, 0.05**2
    lamp = small_lamp(height, all_round=all_round)
    ground = floor_quad(3.0, spacing_m=0.25)
    scene = scene_of(ground, emitters=(lamp,), sky=uniform_sky(0.0))
    lit = lookup(scene, np.array([0.0, 1.0, 2.5]))
    x = np.array([0.0, 1.0, 2.5])
    square = x**2 + height**2
    cosine = height / np.sqrt(square)
    expected = area * cosine * (1 if all_round else cosine) / square / math.pi
    # Interpolation between baked points 0.25 m apart costs up to 1 %.
    np.testing.assert_allclose(lit, expected[:, None] * [100, 200, 300], rtol=0.02)


def lookup(scene: Scene, x: np.ndarray) -> np.ndarray:
    """Light of the first surface, a ``floor_quad(3)``, at (x, 0)."""
    light = bake(scene)
    return light.values[light.cell(0, x + 3.0, np.full_like(x, 3.0))]


def test_a_block_throws_a_shadow() -> None:
    block = Block(low=np.array([-0.3, -0.3, 0.9]), high=np.array([0.3, 0.3, 1.0]), paint=0)
    body = Body(x=0.0, y=0.0, yaw=0.7, blocks=(block,))
    lamp = small_lamp(2.0)
    ground = floor_quad(3.0, spacing_m=0.25)
    x = np.array([0.0, 2.5])
    dark = scene_of(ground, emitters=(lamp,), sky=uniform_sky(0.0), bodies=(body,))
    open_ = scene_of(ground, emitters=(lamp,), sky=uniform_sky(0.0))
    under, beside = lookup(dark, x) / lookup(open_, x)
    assert under.max() < 0.05  # what the block itself sends back
    np.testing.assert_allclose(beside, 1, rtol=0.05)


def test_radiance_is_albedo_times_light() -> None:
    albedo = (0.2, 0.4, 0.6)
    scene = scene_of(floor_quad(400.0, spacing_m=50.0), paints=(plain_paint(albedo),))
    camera = Camera.looking(
        np.array([0.0, 0.0, 2.0]), yaw=0.3, pitch=-1.2, fov=1.0, height=20, width=24
    )
    np.testing.assert_allclose(
        shade(scene, bake(scene), camera),
        np.broadcast_to(np.float32(albedo), (20, 24, 3)),
        rtol=1e-5,
    )


def test_far_texture_fades_to_its_mean_instead_of_flickering() -> None:
    checks = np.indices((256, 256)).sum(axis=0) % 2
    paint = Paint.from_texture(np.repeat(checks[..., None].astype(float), 3, axis=2), 1.0)
    scene = scene_of(floor_quad(400.0, spacing_m=50.0), paints=(paint,))
    camera = Camera.looking(
        np.array([0.0, 0.0, 20.0]), yaw=0.3, pitch=-1.2, fov=1.0, height=20, width=24
    )
    np.testing.assert_allclose(shade(scene, bake(scene), camera), 0.5, rtol=1e-5)


def test_paint_pyramid_keeps_the_mean() -> None:
    texture = np.random.default_rng(0).random((256, 256, 3))
    pyramid = Paint.from_texture(texture, 1.0).pyramid
    assert len(pyramid) == sum(4**k for k in range(9))
    start = 0
    for k in range(8, -1, -1):
        level = pyramid[start : start + 4**k]
        np.testing.assert_allclose(level.mean(axis=0), texture.mean(axis=(0, 1)), rtol=1e-5)
        start += 4**k


def test_srgb_transfer_function() -> None:
    # Middle grey: 18 % reflectance is code 118; code 128 is 21.6 % (IEC 61966-2-1).
    assert round(255 * float(encode_srgb(np.array(0.18)))) == 118
    assert float(decode_srgb(np.array(128 / 255))) == pytest.approx(0.2159, abs=1e-4)
    x = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(decode_srgb(encode_srgb(x)), x, atol=1e-8)


def test_rooms_reader_lists_every_view_once() -> None:
    reader: Reader = RoomsReader(scenes=12, frames_per_scene=3)
    items = reader.list().items
    keys = [item.key for item in items]
    assert len(keys) == len(set(keys)) == 36
    assert keys == sorted(keys)
    assert keys[11] == "room_0003/frame_02"
    assert all(item.key.startswith(item.scene + "/") for item in items)
    assert reader.kind == "depth"


def test_rooms_reader_gives_what_was_drawn() -> None:
    reader = pickle.loads(pickle.dumps(RoomsReader(scenes=3, height=60, width=84, seed=7)))
    item = reader.list().items[13]
    raw = reader.read(item)
    drawn = render_room(7, 2, 1, 60, 84)
    decoded = decode_frame(raw)
    assert (raw.key, raw.scene) == (drawn.key, drawn.scene) == ("room_0002/frame_01", "room_0002")
    assert np.array_equal(np.isinf(decoded.depth_m), np.isinf(drawn.depth_m))
    finite = np.isfinite(drawn.depth_m)
    np.testing.assert_allclose(decoded.depth_m[finite], drawn.depth_m[finite], rtol=7.1e-5)
    np.testing.assert_array_equal(raw.K_px, drawn.K_px)
    error = decoded.image.astype(float) - drawn.image
    assert np.sqrt(np.mean(error**2)) < 3
    low, high = reader.depth_range_m
    assert ((decoded.depth_m[finite] > low) & (decoded.depth_m[finite] <= high)).all()
    json.dumps(dict(raw.meta))


def test_jpeg_keeps_full_colour_resolution() -> None:
    raw = RoomsReader(height=24, width=32).read(RoomsReader().list().items[0])
    with Image.open(io.BytesIO(raw.image)) as image:
        assert image.size == (32, 24)
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3


def test_pictures_reader() -> None:
    reader: Reader = PicturesReader(pictures=24, height=48, width=64, seed=3)
    items = reader.list().items
    assert [items[0].key, items[7].key, items[7].scene] == [
        "picture_0000",
        "picture_0007",
        "picture_0007",
    ]
    raws = [reader.read(items[number]) for number in (1, 6, 11)]
    for raw in raws:
        assert raw.depth is None
        assert raw.K_px is None
        with Image.open(io.BytesIO(raw.image)) as image:
            assert image.size == (raw.width, raw.height)
        assert abs(raw.width * raw.height / (48 * 64) - 1) < 0.05
    assert reader.kind == "art"
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert reader.read(items[6]) == raws[1]


@pytest.mark.parametrize("style", list(STYLES))
def test_styles_keep_size_and_structure(style: str) -> None:
    image = render_room(7, 2, 0, 63, 84).image
    styled = STYLES[style](np.random.default_rng(5), Image.fromarray(image))
    assert styled.size == (84, 63)
    assert styled.mode == "RGB"
    grey = np.asarray(styled.convert("L"), dtype=float).ravel()
    original = np.asarray(Image.fromarray(image).convert("L"), dtype=float).ravel()
    assert grey.std() > 8
    assert np.corrcoef(grey, original)[0, 1] > 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoomsReader(scenes=0), "scenes: expected 1 to 1000000, got 0"),
        (lambda: RoomsReader(frames_per_scene=0), "frames_per_scene: expected 1 to 10000, got 0"),
        (lambda: RoomsReader(height=8), "height: expected 16 to 4096, got 8"),
        (lambda: RoomsReader(seed=-1), "seed: expected 0 to 9223372036854775807, got -1"),
        (lambda: PicturesReader(pictures=0), "pictures: expected 1 to 1000000, got 0"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]
