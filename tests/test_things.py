"""Planes of labelled flat things, against planes that are known in closed form."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from flatdepth.data.shards import THING_EXT
from flatdepth.data.shards.codec import decode_frame, encode_log_u16
from flatdepth.data.shards.read import raw_frame
from flatdepth.data.shards.write import encode_sample
from flatdepth.data.things import fit_thing
from flatdepth.errors import BadFrame
from flatdepth.types import FlatThings, RawFrame, Region

HEIGHT, WIDTH = 120, 160
K_PX = np.array([[140.0, 0, 78], [0, 138, 63], [0, 0, 1]])
WALL = np.array([0.12, -0.03, 0.4])
FLOOR = np.array([0.0, 0.9, 0.05])
THING = np.zeros((HEIGHT, WIDTH), bool)
THING[30:80, 50:110] = True
NOTHING = np.zeros_like(THING)


def rays() -> np.ndarray:
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.stack([(u - 78) / 140, (v - 63) / 138, np.ones_like(u)], axis=-1)


def surface(m: np.ndarray) -> np.ndarray:
    """z in metres of a plane at every pixel, float64; +inf where it is not in front."""
    inverse = rays() @ m
    return np.where(inverse > 1e-6, 1 / np.maximum(inverse, 1e-6), np.inf)


def room() -> np.ndarray:
    """A wall and a floor; in the thing, which hangs on the wall, a scene behind it."""
    depth = np.minimum(surface(WALL), surface(FLOOR))
    depth[THING] *= 2.2
    return depth.astype(np.float32)


def test_the_plane_around_a_mirror_is_that_of_its_wall() -> None:
    found = fit_thing(room(), K_PX, THING, NOTHING)
    assert found is not None and found.trouble is None
    np.testing.assert_allclose(rays()[THING] @ found.m, rays()[THING] @ WALL, rtol=1e-6)
    assert found.residual < 1e-6 and found.uncertainty < 1e-5


def test_noise_and_what_stands_in_front_do_not_tilt_it() -> None:
    generator = np.random.default_rng(3)
    depth = room()
    depth *= generator.normal(1, 0.01, depth.shape).astype(np.float32)
    depth[60:110, 96:140] = 0.9
    depth[generator.random(depth.shape) < 0.2] = np.nan
    found = fit_thing(depth, K_PX, THING, NOTHING)
    assert found is not None and found.trouble is None
    np.testing.assert_allclose(rays()[THING] @ found.m, rays()[THING] @ WALL, rtol=6e-3)
    assert found.residual == pytest.approx(0.01, rel=0.2)
    assert 0.5 < found.share < 0.95


def test_a_picture_in_true_depth_is_fitted_inside() -> None:
    depth = np.full((HEIGHT, WIDTH), 7, np.float32)
    depth[THING] = surface(WALL)[THING]
    found = fit_thing(depth, K_PX, THING, NOTHING, inside=True)
    assert found is not None and found.trouble is None
    np.testing.assert_allclose(found.m, WALL, rtol=1e-5)
    around = fit_thing(depth, K_PX, THING, NOTHING)
    assert around is not None
    np.testing.assert_allclose(around.m, [0, 0, 1 / 7], atol=1e-6)


def test_frames_and_other_things_are_passed_over() -> None:
    depth = room()
    others = np.zeros_like(THING)
    others[:, 111:] = others[81:] = True
    depth[others] = np.random.default_rng(0).uniform(0.5, 9, int(others.sum())).astype(np.float32)
    found = fit_thing(depth, K_PX, THING, others)
    assert found is not None and found.share == pytest.approx(1)
    np.testing.assert_allclose(rays()[THING] @ found.m, rays()[THING] @ WALL, rtol=1e-6)


def test_what_no_plane_surrounds_is_not_trusted() -> None:
    depth = np.random.default_rng(1).uniform(1, 9, (HEIGHT, WIDTH)).astype(np.float32)
    found = fit_thing(depth, K_PX, THING, NOTHING)
    assert found is not None and "lies on one plane" in str(found.trouble)


def test_a_wall_seen_on_one_side_alone_is_too_far_extrapolated() -> None:
    depth = room() * np.random.default_rng(1).normal(1, 0.01, THING.shape).astype(np.float32)
    others = np.zeros_like(THING)
    others[:, 48:] = True
    found = fit_thing(depth, K_PX, THING, others)
    assert found is not None and "is known to" in str(found.trouble)


def test_a_plane_on_one_side_alone_may_be_that_of_something_else() -> None:
    """However exact the depth: a wardrobe's mirror beside a wall."""
    others = np.zeros_like(THING)
    others[:, 48:] = True
    found = fit_thing(room(), K_PX, THING, others)
    assert found is not None and found.uncertainty < 1e-3
    assert found.open_deg >= 180 and "on one side" in str(found.trouble)
    whole = fit_thing(room(), K_PX, THING, NOTHING)
    assert whole is not None and whole.open_deg < 90


def test_of_two_surfaces_within_the_tolerance_the_larger_is_found_exactly() -> None:
    """A plane between a wall and panels 3 % before it would reach more points of both."""
    depth = surface(WALL)
    columns = np.arange(WIDTH)[None] + np.zeros((HEIGHT, 1))
    depth = np.where((columns % 20 < 8) & ~THING, depth * 0.97, depth).astype(np.float32)
    found = fit_thing(depth, K_PX, THING, NOTHING)
    assert found is not None and found.trouble is None
    np.testing.assert_allclose(rays()[THING] @ found.m, rays()[THING] @ WALL, rtol=1e-5)
    assert found.residual < 1e-5


def test_nothing_is_said_without_depth_around() -> None:
    depth = np.where(THING, 3, np.nan).astype(np.float32)
    assert fit_thing(depth, K_PX, THING, NOTHING) is None


def test_the_scale_of_the_depth_does_not_matter() -> None:
    one, other = (
        fit_thing(room() * s, K_PX, THING, NOTHING) for s in (np.float32(1), np.float32(2))
    )
    assert one is not None and other is not None
    np.testing.assert_allclose(one.m, 2 * other.m, rtol=1e-6)


def labelled(planes: np.ndarray) -> RawFrame:
    region = np.where(THING, np.uint8(Region.MIRROR), np.uint8(0))
    region[100:110, 20:40] = Region.ART
    number = THING.astype(np.uint8)
    number[100:110, 20:40] = 2
    image = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(image, "PNG")
    return RawFrame(
        key="a/0",
        dataset="mine",
        scene="a",
        image=image.getvalue(),
        image_ext="png",
        width=WIDTH,
        height=HEIGHT,
        depth=encode_log_u16(np.minimum(room(), 90)),
        K_px=K_PX,
        region=region,
        things=FlatThings(number=number, planes=planes),
    )


def test_planes_come_back_bit_for_bit_and_replace_the_depth_there_alone() -> None:
    raw = labelled(np.array([WALL, [np.nan] * 3]))
    back = raw_frame("a/0", dict(encode_sample(raw).members))
    assert back.things is not None and raw.things is not None
    np.testing.assert_array_equal(back.things.number, raw.things.number)
    np.testing.assert_array_equal(back.things.planes, raw.things.planes)
    frame = decode_frame(back)
    np.testing.assert_allclose(frame.depth_m[THING], surface(WALL)[THING], rtol=2e-7)
    assert np.isnan(frame.depth_m[100:110, 20:40]).all()
    elsewhere = raw.things.number == 0
    assert frame.behind_m is not None
    np.testing.assert_array_equal(frame.depth_m[elsewhere], frame.behind_m[elsewhere])
    plain = decode_frame(dataclasses.replace(raw, things=None))
    np.testing.assert_array_equal(frame.behind_m, plain.depth_m)
    assert plain.behind_m is None


def test_things_that_are_no_map_or_no_planes_are_damage() -> None:
    parts = dict(encode_sample(labelled(np.array([WALL, WALL]))).members)
    about = json.loads(parts["json"])
    for rows in ([[1.0, 2.0]] * 2, [about["planes"][0]], "ab", [["x"] * 3] * 2):
        broken = parts | {"json": json.dumps(about | {"planes": rows}).encode()}
        with pytest.raises(BadFrame):
            raw_frame("a/0", broken)
    with pytest.raises(BadFrame, match="things unreadable"):
        raw_frame("a/0", parts | {THING_EXT: b"no png"})
