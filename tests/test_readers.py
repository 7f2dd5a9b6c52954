"""Raw layouts become frames: codes bit for bit, intrinsics by laws, damage and mix-ups refused."""

import dataclasses
import io
import json
import pickle
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flatdepth.data.readers import (
    ArtReader,
    FolderReader,
    HypersimReader,
    NyuReader,
    SynMirrorReader,
    VKitti2Reader,
)
from flatdepth.data.readers.base import Item, Reader
from flatdepth.data.readers.files import Tree, make_key
from flatdepth.data.readers.hypersim import read_cameras, sensor_intrinsics, tone_map
from flatdepth.data.readers.patterns import in_time
from flatdepth.data.shards import is_key
from flatdepth.data.shards.codec import decode_frame, decode_image, depth_metres
from flatdepth.errors import BadFrame, UserError

DATA = Path(__file__).parent / "data"
HYPERSIM_DEPTH = Path("images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5")
PLAIN_M = np.array([[np.tan(np.pi / 6), 0, 0], [0, 0.75 * np.tan(np.pi / 6), 0], [0, 0, -1]])

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
CODES = np.random.default_rng(1).integers(1, 65535, (6, 8), dtype=np.uint16)


def image_bytes(pixels=RGB, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def read_all(reader):
    return {item.key: reader.read(item) for item in reader.list().items}


def folder(root, **options):
    defaults = {"image_glob": "color/*", "depth_glob": "depth/*", "depth_scale": 0.001}
    defaults |= {"fov_deg": 60.0, "unusual_camera": True}  # for 500 px are much for 8
    return FolderReader(str(root), **(defaults | options))


def one_frame(root, depth_name="1.png", depth=None, image_name="1.png", image=None, **options):
    """The only frame of a folder with one image and one depth file."""
    write(root / "color" / image_name, image_bytes() if image is None else image)
    if depth is not None:
        write(root / "depth" / depth_name, depth)
    globs = {
        "image_glob": f"color/*.{image_name.rpartition('.')[2]}",
        "depth_glob": f"depth/*.{depth_name.rpartition('.')[2]}",
    }
    [frame] = read_all(folder(root, **globs, **options)).values()
    return frame


# Hypersim


@pytest.fixture(scope="session")
def hypersim(tmp_path_factory):
    """The genuine depth frame with a grey picture in place of its preview."""
    root = tmp_path_factory.mktemp("hypersim") / "raw"
    shutil.copytree(DATA / "hypersim", root)
    preview = image_bytes(np.full((768, 1024), 128, np.uint8), "JPEG")
    write(root / "ai_037_002/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg", preview)
    return root


def floor_points(root, unit_rays=True):
    """(N, 3) points of the lowest rows, where the genuine frame shows nothing but bare floor."""
    [raw] = read_all(HypersimReader(str(root))).values()
    v, u = np.mgrid[700:768, 0:1024:4] + 0.5
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(raw.K_px).T
    if unit_rays:
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return (rays * raw.depth.codes[700:, ::4, None].astype(np.float64)).reshape(-1, 3)


def plane_residuals_m(points):
    """Distances from the plane that most points lie on to 1 mm: RANSAC, then least squares."""
    rng = np.random.default_rng(0)
    best = np.zeros(len(points), bool)
    for _ in range(200):
        a, b, c = points[rng.choice(len(points), 3, replace=False)]
        normal = np.cross(b - a, c - a)
        near = np.abs((points - a) @ normal) < 1e-3 * np.linalg.norm(normal)
        best = max(best, near, key=np.count_nonzero)
    centre = points[best].mean(0)
    normal = np.linalg.svd(points[best] - centre, full_matrices=False)[2][2]
    return (points - centre) @ normal


def test_the_genuine_floor_is_flat_with_the_camera_of_its_scene(hypersim, tmp_path):
    right = plane_residuals_m(floor_points(hypersim))
    assert np.sqrt(np.mean(right**2)) < 0.25e-3  # float16 rounding of 3 m at this slant: 0.2 mm
    assert np.abs(right).max() < 1e-3

    shutil.copytree(hypersim, tmp_path / "raw")
    (tmp_path / "raw/metadata_camera_parameters.csv").unlink()
    with pytest.warns(UserWarning, match="no row in metadata_camera_parameters.csv for ai_037_002"):
        assumed = plane_residuals_m(floor_points(tmp_path / "raw"))
    assert np.sqrt(np.mean(assumed**2)) > 1.5e-3

    as_plain_z = plane_residuals_m(floor_points(hypersim, unit_rays=False))
    assert np.sqrt(np.mean(as_plain_z**2)) > 25e-3


def test_hypersim_codes_are_the_bits_of_the_file(hypersim):
    raw = read_all(HypersimReader(str(hypersim)))["ai_037_002/cam_00/0000"]
    with h5py.File(DATA / "hypersim/ai_037_002" / HYPERSIM_DEPTH) as file:
        expected = file["dataset"][()]
    assert raw.depth.codes.dtype == np.float16
    assert raw.depth.codes.tobytes() == expected.tobytes()
    assert (raw.depth.quantity, raw.depth.scale_m) == ("distance", 1.0)
    assert (raw.scene, raw.split, raw.meta["camera"]) == ("ai_037_002", "train", "cam_00")
    assert raw.meta["depth"] == f"ai_037_002/{HYPERSIM_DEPTH.as_posix()}"


@settings(deadline=None)  # the machine may be busy
@given(
    shift=st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3)),
    tilt=st.tuples(st.floats(-0.4, 0.4), st.floats(-0.4, 0.4)),
    size=st.tuples(st.integers(16, 2048), st.integers(16, 2048)),
)
def test_sensor_intrinsics_factorise_any_tilted_camera(shift, tilt, size):
    """K R = P up to scale, R a rotation, and 1/z of any plane affine in pixels."""
    M = PLAIN_M.copy()
    M[:2, 2] = shift
    M[2, :2] = tilt
    width, height = size
    K, R = sensor_intrinsics(M, width, height)

    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(R) == pytest.approx(1)
    np.testing.assert_allclose(np.tril(K, -1), 0, atol=1e-12)
    assert K[2, 2] == 1
    assert (np.diag(K) > 0).all()

    u, v = np.random.default_rng(0).uniform(0, 1, (2, 20)) * [[width], [height]]
    ndc = np.stack([2 * u / width - 1, 1 - 2 * v / height, np.ones_like(u)])
    given_rays = np.diag([1.0, -1.0, -1.0]) @ M @ ndc  # to y down, z forwards, by hand
    our_rays = np.linalg.inv(K) @ np.stack([u, v, np.ones_like(u)])
    turned = R @ given_rays
    np.testing.assert_allclose(our_rays, turned / turned[2], atol=1e-9)

    normal = np.array([0.3, -0.5, 0.8])
    t = 4 / (normal @ given_rays)  # where the rays meet a plane, in the given frame
    z = (R @ (given_rays * t))[2]
    columns = np.stack([u / width, v / height, np.ones_like(u)], 1)
    affine = columns @ np.linalg.lstsq(columns, 1 / z, rcond=None)[0]
    np.testing.assert_allclose(affine, 1 / z, atol=1e-9)


def test_sensor_intrinsics_of_an_upright_camera_are_the_textbook_ones():
    K, R = sensor_intrinsics(PLAIN_M, 1024, 768)
    np.testing.assert_allclose(K, [[886.81, 0, 512], [0, 886.81, 384], [0, 0, 1]], atol=2e-4)
    np.testing.assert_allclose(R, np.eye(3), atol=1e-12)


def test_sensor_intrinsics_of_a_genuine_tilted_camera_have_square_pixels():
    """Not built in anywhere: a wrong axis or order of factors gives oblong or skewed pixels."""
    cameras = read_cameras(str(DATA / "hypersim/metadata_camera_parameters.csv"))
    K, R = sensor_intrinsics(np.array(cameras["ai_037_002"]), 1024, 768)
    assert K[0, 0] == pytest.approx(K[1, 1], rel=1e-9)
    assert K[0, 1] == pytest.approx(0, abs=1e-9)
    assert 0.5 < np.degrees(np.arccos(R[2, 2])) < 0.6


def make_hypersim(root, frames, rows=None):
    """Frames (scene, camera, number) with depth and preview, and a split table of ``rows``."""
    for scene, camera, number in frames:
        images = root / scene / "images"
        write_h5(
            images / f"scene_{camera}_geometry_hdf5/frame.{number:04d}.depth_meters.hdf5",
            dataset=np.full((6, 8), 2, np.float16),
        )
        write(
            images / f"scene_{camera}_final_preview/frame.{number:04d}.tonemap.jpg",
            image_bytes(format="JPEG"),
        )
    if rows is not None:
        header = (
            "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,"
            "split_partition_name"
        )
        table = "\n".join([header, *rows]) + "\n"
        write(
            root / "evermotion_dataset/analysis/metadata_images_split_scene_v1.csv", table.encode()
        )


@pytest.mark.filterwarnings("ignore:no row in metadata_camera")
def test_hypersim_honours_the_official_lists(tmp_path):
    frames = [("ai_001_001", "cam_00", n) for n in range(5)]
    broken = [
        ("ai_004_009", "cam_01", 0),
        ("ai_038_007", "cam_00", 3),
        ("ai_006_001", "cam_00", 53),
    ]
    kept = [("ai_004_009", "cam_00", 0), ("ai_006_001", "cam_00", 5)]
    make_hypersim(
        tmp_path,
        [*frames, *broken, *kept],
        [
            "ai_001_001,cam_00,0,True,,train",
            "ai_001_001,cam_00,1,False,CONTENT FLAGGED FOR REMOVAL,",
            "ai_001_001,cam_00,2,False,,train",
            "ai_001_001,cam_00,4,True,,train",
            *(f"{s},{c},{n},True,,val" for s, c, n in broken + kept),
        ],
    )
    (tmp_path / "ai_001_001/images/scene_cam_00_final_preview/frame.0004.tonemap.jpg").unlink()
    listing = HypersimReader(str(tmp_path)).list()
    assert [(item.key, item.scene, item.split) for item in listing.items] == [
        ("ai_001_001/cam_00/0000", "ai_001_001", "train"),
        ("ai_004_009/cam_00/0000", "ai_004_009", "val"),
        ("ai_006_001/cam_00/0005", "ai_006_001", "val"),
    ]
    assert dict(listing.excluded) == {
        "ai_001_001/cam_00/0001": "CONTENT FLAGGED FOR REMOVAL",
        "ai_001_001/cam_00/0002": "not in the public release",
        "ai_001_001/cam_00/0003": "not in the official split table",
        "ai_001_001/cam_00/0004": "no image file",
        "ai_004_009/cam_01/0000": "known to be broken: camera (ml-hypersim issue 22)",
        "ai_006_001/cam_00/0053": "known to be broken: geometry missing (ml-hypersim issue 7)",
        "ai_038_007/cam_00/0003": "known to be broken: camera (ml-hypersim issue 22)",
    }


def test_hypersim_without_tables_warns_and_assumes_a_scaled_camera(tmp_path):
    make_hypersim(tmp_path, [("ai_001_001", "cam_00", 0), ("ai_001_001", "cam_01", 0)])
    with pytest.warns(UserWarning) as caught:
        frames = read_all(HypersimReader(str(tmp_path)))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2  # not one per camera or frame
    assert "no official split" in messages[0]
    assert "ai_001_001" in messages[1]
    frame = frames["ai_001_001/cam_01/0000"]
    assert frame.split == ""
    assert frame.meta["camera_assumed"] is True
    expected = [[886.81 / 128, 0, 4], [0, 886.81 / 128, 3], [0, 0, 1]]
    np.testing.assert_allclose(frame.K_px, expected, rtol=1e-12)


def test_hypersim_tables_named_by_option(hypersim, tmp_path):
    make_hypersim(tmp_path, [("ai_037_002", "cam_00", 0)])
    reader = HypersimReader(
        str(tmp_path),
        split_csv=str(hypersim / "metadata_images_split_scene_v1.csv"),
        camera_csv=str(hypersim / "metadata_camera_parameters.csv"),
    )
    [frame] = read_all(reader).values()
    assert frame.split == "train"
    assert frame.meta["camera_assumed"] is False
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file"):
        dataclasses.replace(reader, split_csv=str(tmp_path / "nowhere.csv")).list()


def test_tone_map_laws():
    rng = np.random.default_rng(0)
    colour = rng.lognormal(0, 1, (40, 50, 1)).astype(np.float32) * np.ones(3, np.float32)
    entities = np.zeros((40, 50), np.int32)
    entities[:, :10] = -1
    colour[:, :10] *= 1000  # the sky behind a window must not set the exposure
    mapped = tone_map(colour, entities)
    # The mapping is monotonic, so the percentile of grey pixels goes where it was sent.
    assert np.percentile(mapped[:, 10:, 0], 90) == pytest.approx(0.8 * 255, abs=1)
    assert (mapped[:, :10] == 255).mean() > 0.9
    # A brighter lamp changes nothing, and 2^-2.2 of the light is half the value.
    np.testing.assert_array_equal(tone_map(colour * 4, entities), mapped)
    pixels = np.array([[[1.0, 1, 1], [0.5**2.2, 0.5**2.2, 0.5**2.2]]], np.float32).repeat(20, 0)
    white, half = tone_map(pixels, np.zeros((20, 2), np.int32))[0, :, 0].astype(int)
    assert (white, half) == (204, 102)
    assert not tone_map(colour * 1e-9, entities).any()
    colour[0, 20] = np.nan
    assert not tone_map(colour, entities)[0, 20].any()


@pytest.mark.filterwarnings("ignore:.*(no official split|no row in)")
def test_hypersim_linear_colours(tmp_path):
    make_hypersim(tmp_path, [("ai_001_001", "cam_00", 0)])
    reader = HypersimReader(str(tmp_path), colour="hdf5")
    with pytest.raises(UserError, match="no image and no entities file"):
        reader.list()
    images = tmp_path / "ai_001_001/images"
    colour = np.full((6, 8, 3), 0.25, np.float16)
    write_h5(images / "scene_cam_00_final_hdf5/frame.0000.color.hdf5", dataset=colour)
    ids = images / "scene_cam_00_geometry_hdf5/frame.0000.render_entity_id.hdf5"
    write_h5(ids, dataset=np.ones((6, 8), np.int32))
    [frame] = read_all(reader).values()
    assert frame.image_ext == "jpg"
    assert np.abs(decode_image(frame.image).astype(int) - 204).max() <= 1
    write_h5(ids, dataset=np.full((6, 8), -1, np.int32))
    with pytest.raises(BadFrame, match="nothing was rendered"):
        read_all(reader)


# Virtual KITTI 2


def make_vkitti2(
    rgb, depth, text, scene="Scene01", variant="clone", cameras=(0, 1), numbers=(0, 1)
):
    rows = ["frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]"]
    for number in numbers:
        for camera in cameras:
            frames = f"{scene}/{variant}/frames"
            image = rgb / f"{frames}/rgb/Camera_{camera}/rgb_{number:05d}.jpg"
            write(image, image_bytes(format="JPEG"))
            codes = CODES.copy()
            codes[0, 0] = 65535
            write(
                depth / f"{frames}/depth/Camera_{camera}/depth_{number:05d}.png", image_bytes(codes)
            )
            rows.append(f"{number} {camera} {725 + number}.0087 725.0087 620.5 187")
    write(text / scene / variant / "intrinsic.txt", ("\n".join(rows) + "\n").encode())


def test_vkitti2_reads_codes_and_intrinsics(tmp_path):
    make_vkitti2(tmp_path, tmp_path, tmp_path)
    frames = read_all(VKitti2Reader(str(tmp_path)))
    assert list(frames) == [f"Scene01/clone/Camera_{c}/0000{n}" for c in (0, 1) for n in (0, 1)]
    frame = frames["Scene01/clone/Camera_1/00001"]
    assert (frame.scene, frame.split, frame.meta["camera"]) == ("Scene01", "", "Camera_1")
    np.testing.assert_array_equal(frame.depth.codes.ravel()[1:], CODES.ravel()[1:])
    np.testing.assert_allclose(frame.K_px, [[726.0087, 0, 621], [0, 725.0087, 187.5], [0, 0, 1]])
    depth_m = decode_frame(frame).depth_m
    assert np.isposinf(depth_m[0, 0])
    np.testing.assert_allclose(depth_m.ravel()[1:], CODES.ravel()[1:] / 100, rtol=1e-6)
    assert frame.image == image_bytes(format="JPEG")


def test_vkitti2_archives_side_by_side_give_the_same_frames(tmp_path):
    make_vkitti2(*[tmp_path / "one"] * 3)
    make_vkitti2(
        *(tmp_path / "split" / f"vkitti_2.0.3_{part}" for part in ("rgb", "depth", "textgt"))
    )
    one = read_all(VKitti2Reader(str(tmp_path / "one")))
    split = read_all(VKitti2Reader(str(tmp_path / "split")))
    assert list(one) == list(split)
    for key, frame in one.items():
        np.testing.assert_array_equal(frame.depth.codes, split[key].depth.codes)
        np.testing.assert_array_equal(frame.K_px, split[key].K_px)


def test_vkitti2_options_and_incomplete_frames(tmp_path):
    for scene, variant in (("Scene01", "clone"), ("Scene01", "fog"), ("Scene20", "clone")):
        make_vkitti2(tmp_path, tmp_path, tmp_path, scene, variant)
    reader = VKitti2Reader(str(tmp_path), variants="clone, fog", cameras="1")
    keys = [item.key for item in reader.list().items]
    assert len(keys) == 6
    assert all("/Camera_1/" in key for key in keys)
    assert {item.scene for item in reader.list().items} == {"Scene01", "Scene20"}
    with pytest.raises(UserError, match="variants: no rain; found clone, fog"):
        VKitti2Reader(str(tmp_path), variants="rain").list()

    frames = tmp_path / "Scene20/clone/frames"
    (frames / "depth/Camera_1/depth_00001.png").unlink()
    assert reader.list().excluded == (("Scene20/clone/Camera_1/00001", "no depth file"),)
    write(tmp_path / "Scene20/clone/intrinsic.txt", b"frame cameraID fx fy cx cy\n")
    [item] = [item for item in reader.list().items if item.scene == "Scene20"]
    with pytest.raises(UserError, match=r"expected the columns frame, cameraID, K\[0,0\]"):
        reader.read(item)


# NYU


def test_nyu_reads_both_depth_types_and_the_official_split(tmp_path):
    rgb = np.full((3, 6, 8), [[[200]], [[50]], [[100]]], np.uint8)
    metres = np.random.default_rng(0).uniform(0.5, 10, (6, 8)).astype(np.float32)
    metres[2, 3] = 0
    write_h5(tmp_path / "train/basement_0001a/00001.h5", rgb=rgb, depth=metres)
    write_h5(tmp_path / "train/basement_0001b/00001.h5", rgb=rgb, depth=metres)
    write_h5(tmp_path / "val/official/00017.h5", rgb=rgb, depth=(CODES // 8))
    frames = read_all(NyuReader(str(tmp_path)))
    assert [(f.key, f.scene, f.split) for f in frames.values()] == [
        ("train/basement_0001a/00001", "basement_0001", "train"),
        ("train/basement_0001b/00001", "basement_0001", "train"),
        ("val/official/00017", "official", "test"),
    ]
    floats, codes = frames["train/basement_0001a/00001"], frames["val/official/00017"]
    decoded = decode_frame(floats)
    assert np.isnan(decoded.depth_m[2, 3])
    known = metres > 0
    np.testing.assert_allclose(decoded.depth_m[known], metres[known], rtol=8e-5)
    assert np.abs(decoded.image.astype(int) - [200, 50, 100]).max() <= 2
    np.testing.assert_array_equal(codes.depth.codes, CODES // 8)
    assert (codes.depth.scale_m, codes.depth.hole) == (0.001, 0)
    # The toolbox: x = (column - cx) z / fx with columns from 1, at which flatdepth's u is 0.5.
    ray = np.linalg.inv(codes.K_px) @ [0.5, 0.5, 1]
    np.testing.assert_allclose(ray[:2], [(1 - 325.58) / 518.86, (1 - 253.74) / 519.47])


def test_nyu_refuses_other_arrays(tmp_path):
    rgb = np.zeros((3, 6, 8), np.uint8)
    for name, arrays in {
        "image is not 3xHxW uint8": {"rgb": rgb.transpose(1, 2, 0), "depth": CODES},
        "depth is neither float32 nor uint16": {"rgb": rgb, "depth": CODES.astype(np.float64)},
        "image and depth differ in size": {"rgb": rgb, "depth": CODES[:, 1:]},
        "HDF5 unreadable: .*no dataset depth": {"rgb": rgb},
    }.items():
        write_h5(tmp_path / "train/kitchen_0001/00001.h5", **arrays)
        with pytest.raises(BadFrame, match=name):
            read_all(NyuReader(str(tmp_path)))


# Any folder


@pytest.mark.parametrize(
    ("layout", "globs", "depth_scale", "key", "scene"),
    [
        ("redwood", ("image/*.jpg", "depth/*.png"), 0.001, "image/00005", "image"),
        ("slambook2_ch5", ("color/*.png", "depth/*.pgm"), 0.001, "color/1", "color"),
        ("slambook2_ch7", ("*[0-9].png", "*_depth.png"), 1 / 5000, "1", "tum"),
        ("slambook2_ch7", ("*.png", "*_depth.png"), 1 / 5000, "1", "tum"),
    ],
)
def test_folder_reads_genuine_frames(layout, globs, depth_scale, key, scene):
    root = DATA / "rgbd" / layout
    reader = FolderReader(
        str(root), *globs, depth_scale, intrinsics=(525, 520, 319.5, 239.5), dataset="tum"
    )
    listing = reader.list()
    assert listing.excluded == ()
    [item] = listing.items
    frame = reader.read(item)
    assert (frame.key, frame.scene, frame.dataset) == (key, scene, "tum")
    assert frame.image == (root / frame.meta["image"]).read_bytes()
    np.testing.assert_array_equal(frame.K_px, [[525, 0, 320], [0, 520, 240], [0, 0, 1]])
    decoded = decode_frame(frame)
    assert decoded.depth_m.shape == decoded.image.shape[:2] == (480, 640)
    # Metres of a room, and holes where the sensor saw nothing.
    assert 1 < np.nanmedian(decoded.depth_m) < 4
    assert np.isnan(decoded.depth_m).sum() == (frame.depth.codes == 0).sum() > 0


def test_pgm_codes_are_the_bytes_of_the_file():
    root = DATA / "rgbd/slambook2_ch5"
    [frame] = read_all(folder(root, image_glob="color/*.png", depth_glob="depth/*.pgm")).values()
    expected = (root / "depth/1.pgm").read_bytes()[-2 * 640 * 480 :]
    assert frame.depth.codes.astype(">u2").tobytes() == expected


NUMBERS = st.lists(st.integers(0, 1200), min_size=1, max_size=8, unique=True)


@settings(deadline=None)  # the machine may be busy
@given(images=NUMBERS, depths=NUMBERS)
@pytest.mark.parametrize(
    "layout",
    [
        ("color/*.png", "depth/*.png", "color/{}.png", "depth/{}.png"),
        ("*[0-9].png", "*_depth.png", "{}.png", "{}_depth.png"),
        ("*.png", "*_depth.png", "{}.png", "{}_depth.png"),
        ("[0-9]*.png", "d[0-9]*.png", "{}.png", "d{}.png"),
        ("*/rgb/*.png", "*/d/*.png", "s1/rgb/{}.png", "s1/d/{}.png"),
        ("**/rgb/*.png", "**/d/*.png", "a/b/rgb/{}.png", "a/b/d/{}.png"),
        ("**/*.png", "**/d*.png", "a/{}.png", "a/d{}.png"),
    ],
)
def test_folder_pairs_equal_numbers_only(layout, images, depths):
    image_glob, depth_glob, image_name, depth_name = layout
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for number in images:
        fs.pipe(f"/raw/{image_name.format(number)}", b"")
    for number in depths:
        fs.pipe(f"/raw/{depth_name.format(number)}", b"")
    reader = FolderReader("memory://raw", image_glob, depth_glob, 1.0, fov_deg=60)
    both = set(images) & set(depths)
    if not both:
        with pytest.raises(UserError, match="no pair"):
            reader.list()
        return
    listing = reader.list()
    pairs = {(item.files["image"], item.files["depth"]) for item in listing.items}
    assert pairs == {
        (f"memory://raw/{image_name.format(n)}", f"memory://raw/{depth_name.format(n)}")
        for n in both
    }
    assert len(listing.items) == len(both)
    assert len(listing.excluded) == len(set(images) ^ set(depths))


def test_folder_wildcards_do_not_run_into_each_other(tmp_path):
    """1/12 and 11/2 have the same digits but are different frames."""
    for scene, number in ((1, 12), (11, 2), (11, 12)):
        write(tmp_path / f"{scene}/rgb/{number}.png", b"")
    for scene, number in ((11, 2), (1, 12)):
        write(tmp_path / f"{scene}/d/{number}.png", b"")
    listing = folder(tmp_path, image_glob="*/rgb/*.png", depth_glob="*/d/*.png").list()
    assert [item.key for item in listing.items] == ["1/rgb/12", "11/rgb/2"]
    assert listing.excluded == (("11/rgb/12.png", "no depth file"),)


@pytest.mark.parametrize(
    ("scene_from", "scene"),
    [
        ("parent", "b1/r2/rgb"),
        ("1", "b1"),
        ("2", "b1/r2"),
        ("file", "b1/r2/rgb/0"),
        ("dataset", "folder"),
    ],
)
def test_folder_scene_is_the_chosen_part_of_the_path(tmp_path, scene_from, scene):
    for name in ("rgb", "d"):
        write(tmp_path / f"b1/r2/{name}/0.png", b"")
    globs = {"image_glob": "**/rgb/*.png", "depth_glob": "**/d/*.png"}
    [item] = folder(tmp_path, **globs, scene_from=scene_from).list().items
    assert item.scene == scene


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def hdf5(array):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("depth", data=array, chunks=(3, 8), compression="gzip")
    return buffer.getvalue()


def pgm(codes, header=b"P5\n# by hand\n8 6\n65535\n"):
    return header + codes.astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.png", image_bytes(CODES)),
        ("1.tif", image_bytes(CODES, "TIFF")),
        ("1.pgm", pgm(CODES)),
        ("1.pgm", pgm(CODES % 4000, b"P5 8 6 4095\n")),
        ("1.npy", npy(CODES)),
        ("1.npy", npy(CODES.astype(">u2"))),
        ("1.npy", npy((CODES / 6553.5).astype(np.float16))),
    ],
)
def test_folder_keeps_16_bit_codes(tmp_path, name, content):
    frame = one_frame(tmp_path, name, content, sky=int(CODES[0, 0]))
    expected = CODES % 4000 if b"4095" in content[:12] else CODES
    if frame.depth.codes.dtype == np.float16:
        expected = (CODES / 6553.5).astype(np.float16)
    np.testing.assert_array_equal(frame.depth.codes, expected)
    assert (frame.depth.scale_m, frame.depth.hole, frame.depth.sky) == (0.001, 0, CODES[0, 0])


@pytest.mark.parametrize("kind", ["npy", "h5", "tiff"])
def test_folder_encodes_float32_depth(tmp_path, kind):
    values = np.random.default_rng(0).uniform(500, 9000, (6, 8)).astype(np.float32)
    values[0, :3] = [0, np.nan, 65000]
    if kind == "h5":
        write_h5(tmp_path / "depth/1.h5", d=values)
        content = None
    else:
        content = npy(values) if kind == "npy" else image_bytes(values, "TIFF")
    options = {"sky": 65000, "quantity": "distance", "depth_array": "d"}
    frame = one_frame(tmp_path, f"1.{kind}", content, **options)
    assert frame.depth.quantity == "distance"
    depth_m = decode_frame(dataclasses.replace(frame, depth=as_z(frame.depth))).depth_m
    assert np.isnan(depth_m[0, :2]).all()
    assert np.isposinf(depth_m[0, 2])
    np.testing.assert_allclose(depth_m.ravel()[3:], values.ravel()[3:] / 1000, rtol=8e-5)


def as_z(depth):
    return dataclasses.replace(depth, quantity="z")


def test_folder_intrinsics(tmp_path):
    depth = image_bytes(CODES)
    given = (500.0, 510.0, 3.5, 2.5)
    frame = one_frame(tmp_path, depth=depth, fov_deg=0.0, intrinsics=given)
    np.testing.assert_array_equal(frame.K_px, [[500, 0, 4], [0, 510, 3], [0, 0, 1]])
    options = {"fov_deg": 0.0, "intrinsics": given, "half_pixel_centres": True}
    frame = one_frame(tmp_path, depth=depth, **options)
    np.testing.assert_array_equal(frame.K_px, [[500, 0, 3.5], [0, 510, 2.5], [0, 0, 1]])
    # The rays through the left and right edge of the image enclose the field of view.
    with pytest.warns(UserWarning, match="assuming a horizontal field of view of 60 degrees"):
        frame = one_frame(tmp_path, depth=depth, fov_deg=0.0)
    assert frame.meta["intrinsics_assumed"] is True
    for fov, K in ((60, frame.K_px), (90, one_frame(tmp_path, depth=depth, fov_deg=90.0).K_px)):
        left, right = np.linalg.inv(K) @ [0, 3, 1], np.linalg.inv(K) @ [8, 3, 1]
        cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        assert np.degrees(np.arccos(cosine)) == pytest.approx(fov)
        assert K[0, 0] == K[1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth_scale": 0.0}, "depth_scale: expected metres per unit, 1e-9 to 1e6, found 0.0"),
        ({"intrinsics": (1.0, 2.0)}, "intrinsics: expected fx,fy,cx,cy, found 2 numbers"),
        ({"intrinsics": (1.0, 1.0, 0.0, 0.0)}, "intrinsics and fov_deg are both given"),
        ({"intrinsics_glob": "*.txt"}, "intrinsics_glob and fov_deg are both given"),
        (
            {"intrinsics_glob": "*/*.txt", "fov_deg": 0.0},
            "expected at most the 1 runs of wildcards",
        ),
        ({"fov_deg": 180.0}, "fov_deg: expected 0 to 180"),
        ({"scene_from": "mother"}, "scene_from: expected parent, file, dataset or a number"),
        ({"depth_glob": "depth/*/*"}, "expected as many runs of wildcards in both, found 1"),
        ({"depth_glob": "color/*"}, "image_glob and depth_glob are both"),
        ({"depth_range": (2.0, 1.0)}, "depth_range: expected 0 <= low < high"),
    ],
)
def test_folder_refuses_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        folder("raw", **options)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("1.png", image_bytes(RGB), "depth is not a grey image"),
        ("1.png", image_bytes(RGB[..., 0]), "depth is not 16-bit"),
        ("1.pgm", b"P5 8 6 255\n" + bytes(48), "depth is not 16-bit"),
        ("1.pgm", pgm(CODES)[:-1], "depth unreadable"),
        ("1.pgm", b"P5 8 x", "depth unreadable"),
        ("1.png", image_bytes(CODES)[:-30], "depth unreadable"),
        ("1.png", image_bytes(CODES[1:]), "image and depth differ in size"),
        ("1.npy", npy(CODES)[:-1], "depth unreadable"),
        ("1.npy", npy(np.array([{}])), "depth unreadable"),
        ("1.npy", npy(CODES.astype(np.int32) + 2**16), "depth is neither 16-bit nor float"),
        ("1.npy", npy(CODES[:-1]), "image and depth differ in size"),
        ("1.h5", b"not HDF5", "HDF5 unreadable"),
    ],
)
def test_folder_refuses_damaged_depth(tmp_path, name, content, reason):
    with pytest.raises(BadFrame) as caught:
        one_frame(tmp_path, name, content)
    assert caught.value.reason == reason
    assert name in caught.value.detail


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 300), min_size=1, max_size=12, unique=True),
)
@example([4], [2, 6])
def test_files_are_paired_by_time_with_their_nearest(image_times, depth_times):
    """Against all pairs: nearest of each other, at most 0.2 s apart; ties go to the earlier."""

    def named(times, folder):
        return {("a", f"{time / 10:.1f}"): f"{folder}/{time}" for time in times}

    images, depths = named(image_times, "rgb"), named(depth_times, "depth")
    found = in_time(images, depths, 0.2 + 1e-9)
    assert sorted(found.values()) == sorted(depths.values())
    pairs = {
        (int(images[parts].split("/")[1]), int(path.split("/")[1]))
        for parts, path in found.items()
        if parts in images
    }

    def nearest(time, times):
        return min(times, key=lambda other: (abs(other - time), other))

    assert pairs == {
        (image, depth)
        for image in image_times
        for depth in depth_times
        if abs(image - depth) <= 2
        and nearest(image, depth_times) == depth
        and nearest(depth, image_times) == image
    }


def test_folder_pairs_a_tum_sequence_by_time(tmp_path):
    for number, time in enumerate((1305031452.791720, 1305031452.823674, 1305031453.5)):
        write(tmp_path / f"rgb/{time:.6f}.png", image_bytes(np.full((6, 8, 3), number, np.uint8)))
    for number, time in enumerate((1305031452.785093, 1305031452.829, 1305031459.0)):
        write(tmp_path / f"depth/{time:.6f}.png", image_bytes(Image.fromarray(CODES + number)))
    globs = {"image_glob": "rgb/*.png", "depth_glob": "depth/*.png"}
    with pytest.raises(UserError, match="or for times with --pair_within_s"):
        folder(tmp_path, **globs).list()
    reader = folder(tmp_path, **globs, pair_within_s=0.02)
    assert [reason for _, reason in reader.list().excluded] == ["no image file", "no depth file"]
    frames = list(read_all(reader).values())
    assert [int(frame.depth.codes[0, 0]) - int(CODES[0, 0]) for frame in frames] == [0, 1]
    assert [decode_image(frame.image)[0, 0, 0] for frame in frames] == [0, 1]


@pytest.mark.parametrize("shape", [(6, 8, 1), (1, 6, 8), (6, 8)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_folder_takes_whole_numbers_that_fit_16_bits_as_they_are(tmp_path, dtype, shape):
    frame = one_frame(tmp_path, "1.npy", npy(CODES.astype(dtype).reshape(shape)))
    np.testing.assert_array_equal(frame.depth.codes, CODES)
    assert frame.depth.codes.dtype == np.uint16 and frame.depth.scale_m == 0.001


def test_stray_depths_of_a_float_array_become_unknown_and_many_are_refused(tmp_path):
    """Of 192 pixels one may lie outside of the range; what is not above 0 never counts."""
    metres = np.full((12, 16), 2.5)
    metres[0, :5] = (-1, 0, -np.inf, np.nan, 0.01)
    image = image_bytes(np.zeros((12, 16, 3), np.uint8))
    frame = one_frame(tmp_path, "1.npy", npy(metres), image=image, depth_scale=1)
    found = depth_metres(frame.depth, frame.K_px)
    assert np.isnan(found[0, :5]).all() and np.isnan(found).sum() == 5
    np.testing.assert_allclose(found[1:], 2.5, rtol=1e-4)
    metres[1, :4] = 1e4
    with pytest.raises(
        BadFrame, match=r"out of range: found 0.01..10000 m, expected \(0.05, 200\]"
    ):
        one_frame(tmp_path, "1.npy", npy(metres), image=image, depth_scale=1)
    with pytest.raises(BadFrame, match="1000 times too large: check the metres per unit"):
        one_frame(tmp_path, "1.npy", npy(np.full((12, 16), 2500.0)), image=image, depth_scale=1)


def test_folder_brings_images_to_the_size_of_their_depth(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 65).astype(np.uint8)[None, :, None], (48, 1, 3))
    png = image_bytes(Image.fromarray(CODES))
    frame = one_frame(tmp_path, depth=png, image=image_bytes(ramp), resize_images=True)
    assert (frame.width, frame.height, frame.image_ext) == (8, 6, "jpg")
    assert frame.K_px[0, 2] == 4.0  # the field of view is that of the depth's width
    shrunk = decode_image(frame.image)[3, :, 0].astype(float)
    np.testing.assert_allclose(shrunk, (np.arange(8) + 0.5) * 255 / 8, atol=12)
    with pytest.raises(BadFrame, match="--resize_images true brings images"):
        one_frame(tmp_path, depth=png, image=image_bytes(ramp))
    with pytest.raises(BadFrame, match="differ in proportions: image 60x48, depth 8x6"):
        one_frame(tmp_path, depth=png, image=image_bytes(ramp[:, :60]), resize_images=True)


def test_intrinsics_of_another_size_are_refused(tmp_path):
    png = image_bytes(Image.fromarray(CODES))
    with pytest.raises(BadFrame, match=r"cx 319\.5, cy 239\.5 in 8x6; give --intrinsics"):
        one_frame(tmp_path, depth=png, fov_deg=0.0, intrinsics=(525, 525, 319.5, 239.5))


MATRIX = "500 0.5 3.5\n0 510 2.5\n0 0 1\n"
MATRIX_4 = "500, 0.5, 3.5, 0;\n0, 510, 2.5, 0;\n0, 0, 1, 0;\n0, 0, 0, 1\n"


@pytest.mark.parametrize(
    ("text", "skew"),
    [
        ("500 510 3.5 2.5", 0.0),
        ("8 6 500 510 3.5 2.5", 0.0),  # ARKit's .pincam
        (MATRIX, 0.5),
        ("[[500. 0.5 3.5]\n [0. 510. 2.5]\n [0. 0. 1.]]", 0.5),
        ("500 0.5 3.5 0\n0 510 2.5 0\n0 0 1 0", 0.5),
        (MATRIX_4, 0.5),  # ScanNet's
    ],
)
def test_folder_reads_intrinsics_from_files(tmp_path, text, skew):
    write(tmp_path / "camera.txt", text.encode())
    for half, shift in ((False, 0.5), (True, 0.0)):
        frame = one_frame(
            tmp_path,
            depth=image_bytes(CODES),
            fov_deg=0.0,
            intrinsics_glob="camera.txt",
            half_pixel_centres=half,
        )
        expected = [[500, skew, 3.5 + shift], [0, 510, 2.5 + shift], [0, 0, 1]]
        np.testing.assert_array_equal(frame.K_px, expected)
        assert frame.meta["intrinsics"] == "camera.txt"
        assert frame.meta["intrinsics_assumed"] is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"500 510 3.5", "expected 4 or 6 numbers or a matrix of 3x3, 3x4 or 4x4, found 3"),
        (b"P2: 500 510 3.5 2.5", "could not convert string to float: 'P2:'"),
        (b"640 480 500 510 3.5 2.5", "640x480 for 8x6"),
        (b"-500 510 3.5 2.5", "no intrinsics"),
        (b"500 510 nan 2.5", "no intrinsics"),
        (b"500 510 319.5 239.5", "cx 319.5, cy 239.5 in 8x6; see .*camera.txt"),
        (b"\xff\xfe", "camera.txt: 'utf-8' codec"),
        (b"1 " * 40_000, "expected 4 or 6 numbers"),
        (bytes(2**24 + 1), "camera.txt: more than 16777216 bytes"),
    ],
)
def test_folder_refuses_intrinsics_that_are_none(tmp_path, text, said):
    write(tmp_path / "camera.txt", text)
    with pytest.raises(BadFrame, match=said):
        one_frame(tmp_path, depth=image_bytes(CODES), fov_deg=0.0, intrinsics_glob="camera.txt")


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("*/camera.txt", {"a/camera.txt": 500, "b/camera.txt": 700}),
        ("*/camera/*.txt", {"a/camera/1.txt": 500, "a/camera/2.txt": 500, "b/camera/1.txt": 700}),
    ],
)
def test_intrinsics_are_of_a_scene_or_of_a_frame(tmp_path, pattern, files):
    for scene, number in (("a", 1), ("a", 2), ("b", 1), ("c", 1)):
        write(tmp_path / f"{scene}/color/{number}.png", image_bytes(RGB))
        write(tmp_path / f"{scene}/depth/{number}.png", image_bytes(CODES))
    for name, focal in files.items():
        write(tmp_path / name, f"{focal} {focal} 3.5 2.5".encode())
    globs = {"image_glob": "*/color/*.png", "depth_glob": "*/depth/*.png"}
    options = globs | {"intrinsics_glob": pattern}
    reader = folder(str(tmp_path), **options, fov_deg=0.0)
    listing = reader.list()
    focals = {item.key: reader.read(item).K_px[0, 0] for item in listing.items}
    assert focals == {"a/color/1": 500, "a/color/2": 500, "b/color/1": 700}
    assert listing.excluded == (("c/color/1.png", "no file of intrinsics"),)
    with pytest.raises(UserError, match=r"matched 0 files, none for an image"):
        folder(str(tmp_path), **options | {"intrinsics_glob": "*/none.txt"}, fov_deg=0.0).list()


def test_hdf5_that_points_elsewhere_or_explodes_is_refused(tmp_path):
    write_h5(tmp_path / "secret.h5", depth=CODES)
    path = tmp_path / "depth/1.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "depth")
        file.create_dataset("raw", (6, 8), "u2", external=[(str(tmp_path / "secret.h5"), 0, 96)])
        source = h5py.VirtualSource(str(tmp_path / "secret.h5"), "depth", (6, 8))
        layout = h5py.VirtualLayout((6, 8), "u2")
        layout[:] = source
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("bomb", (1 << 20, 1 << 20), "u2", chunks=(64, 64))
        file.create_group("group")
    for name in ("link", "raw", "virtual", "bomb", "group", "absent"):
        with pytest.raises(BadFrame, match="HDF5 unreadable"):
            one_frame(tmp_path, "1.h5", depth_array=name)


# Images


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


GREY, PALETTE = Image.fromarray(RGB[..., 0]), Image.fromarray(RGB).convert("P")
ALPHA = Image.fromarray(np.dstack([RGB, RGB[..., 0]]))
PASSED = [
    ("jpg", image_bytes(format="JPEG", exif=exif(1))),
    ("jpg", image_bytes(Image.fromarray(RGB).convert("CMYK"), "JPEG")),
    ("jpg", image_bytes(GREY, "JPEG")),
    ("jpg", image_bytes(format="MPO", save_all=True, append_images=[GREY])),
    ("png", image_bytes()),
    ("png", image_bytes(CODES)),
    ("png", image_bytes(PALETTE)),
    ("png", image_bytes(ALPHA)),
    ("webp", image_bytes(format="WEBP")),
]
ENCODED = [
    ("bmp", image_bytes(format="BMP")),
    ("ppm", image_bytes(format="PPM")),
    ("tif", image_bytes(format="TIFF")),
    ("tiff", image_bytes(CODES, "TIFF")),
]


@pytest.mark.parametrize(("ext", "content"), PASSED)
def test_files_that_shards_hold_are_passed_through(tmp_path, ext, content):
    # By content, not by name: a PNG called .jpg stays a PNG.
    frame = one_frame(tmp_path, depth=image_bytes(CODES), image_name="1.jpg", image=content)
    assert (frame.image, frame.image_ext) == (content, ext)
    [picture] = read_all(ArtReader(str(tmp_path / "color"))).values()
    assert (picture.image, picture.image_ext) == (content, ext)
    assert decode_image(frame.image).shape == (frame.height, frame.width, 3) == (6, 8, 3)


@pytest.mark.parametrize(("ext", "content"), ENCODED)
def test_other_files_become_jpeg_with_full_colour(tmp_path, ext, content):
    name = f"1.{ext}"
    frame = one_frame(tmp_path, depth=image_bytes(CODES), image_name=name, image=content)
    [picture] = read_all(ArtReader(str(tmp_path / "color"))).values()
    assert frame.image == picture.image
    with Image.open(io.BytesIO(frame.image)) as image:
        assert image.format == "JPEG"
        assert [(h, v) for _, h, v, _ in image.layer] == [(1, 1)] * 3
    expected = RGB if ext != "tiff" else np.repeat((CODES >> 8).astype(np.uint8)[..., None], 3, 2)
    error = decode_image(frame.image).astype(float) - expected
    assert np.sqrt(np.mean(error**2)) < 6  # noise is the worst case for JPEG


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_a_rotated_picture_is_turned_upright(tmp_path, format):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, 32:] = [255, 0, 0]  # red at the top right
    # Orientation 6: turned a quarter clockwise to be shown, so the red goes to the bottom right.
    content = image_bytes(pixels, format, exif=exif(6))
    write(tmp_path / f"1.{'jpg' if format == 'JPEG' else format[:3].lower()}", content)
    [picture] = read_all(ArtReader(str(tmp_path))).values()
    assert (picture.width, picture.height) == (32, 64)
    shown = decode_image(picture.image)
    assert shown[48, 24].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert max(shown[16, 8]) < 4
    with Image.open(io.BytesIO(picture.image)) as image:
        assert image.getexif().get(0x0112, 1) == 1


# Art


def test_art_of_the_test_data_with_credits():
    pictures = read_all(ArtReader(str(DATA / "art")))
    assert len(pictures) == 5
    for picture in pictures.values():
        assert picture.depth is None
        assert picture.K_px is None
        assert picture.scene == picture.key
        assert decode_image(picture.image).shape == (picture.height, picture.width, 3)
        assert max(picture.width, picture.height) <= 1024
        assert picture.meta["artist"]
    scream = pictures["jcjohnson_neural-style__the_scream"]
    assert scream.meta["artist"] == "Edvard Munch (d.1944)"
    assert (scream.width, scream.height, scream.image_ext) == (804, 1024, "jpg")  # from 1200x1528
    hibiscus = pictures["wuffs__hibiscus_regular"]
    assert hibiscus.image == (DATA / "art/wuffs__hibiscus.regular.png").read_bytes()


def test_art_shrinks_like_a_sharp_low_pass_filter(tmp_path):
    """Stripes too fine for half the size vanish (no moire), coarser ones keep their contrast."""
    x = np.arange(1200)
    for name, cycles_per_pixel in (("fine", 0.4), ("coarse", 0.15)):
        stripes = 128 + 100 * np.sin(2 * np.pi * cycles_per_pixel * x)
        pixels = np.broadcast_to(stripes[:, None], (601, 1200, 3)).astype(np.uint8)
        write(tmp_path / f"{name}.png", image_bytes(pixels))
    small = {k: decode_image(p.image) for k, p in read_all(ArtReader(str(tmp_path), 600)).items()}
    assert small["fine"].shape == (300, 600, 3)
    contrast = 100 / np.sqrt(2)
    assert small["fine"][:, 20:-20].std() < 0.02 * contrast
    assert small["coarse"].std() > 0.95 * contrast
    assert (
        read_all(ArtReader(str(tmp_path), 0))["fine"].image == (tmp_path / "fine.png").read_bytes()
    )


def test_art_finds_pictures_below_and_leaves_the_rest(tmp_path):
    for name in ("b/x.PNG", "a.jpeg", "b/.hidden.png", "b/notes.txt", "b/ü x.v2.bmp"):
        write(tmp_path / name, image_bytes(format="BMP" if name.endswith("bmp") else "PNG"))
    write(tmp_path / "b/CREDITS.tsv", b"title\tartist\tfile\nX\tSomeone\tx.PNG\n")
    pictures = read_all(ArtReader(str(tmp_path), dataset="walls"))
    assert list(pictures) == ["a", "b/x", "b/ü_x_v2"]
    assert all(picture.dataset == "walls" for picture in pictures.values())
    assert pictures["b/x"].meta == {"image": "b/x.PNG", "artist": "Someone", "title": "X"}
    assert pictures["a"].meta == {"image": "a.jpeg"}
    write(tmp_path / "b/CREDITS.tsv", b"name\tartist\n")
    with pytest.raises(UserError, match="expected the columns file, artist, title, found name"):
        ArtReader(str(tmp_path)).list()


# What all readers share


def test_files_whose_names_give_one_key_are_numbered(tmp_path):
    for name in ("a b.png", "a_b.jpg", "a_b-2.png", "a.b.png", "图一.png", "图二.png"):
        write(tmp_path / name, image_bytes())
    found = {item.key: item.files["image"] for item in ArtReader(str(tmp_path)).list().items}
    names = {key: path.rpartition("/")[2] for key, path in found.items()}
    assert names == {
        "a_b": "a b.png",
        "a_b-2": "a_b-2.png",
        "a_b-3": "a.b.png",
        "a_b-4": "a_b.jpg",
        "图一": "图一.png",
        "图二": "图二.png",
    }


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(min_size=1).filter(lambda t: "/" not in t), min_size=1, max_size=4))
def test_keys_are_safe_tar_member_names(parts):
    assume(not parts[-1].startswith("."))
    key = make_key("/".join(parts))
    assert is_key(key)
    assert make_key(key) == key
    assert key.count("/") == len(parts) - 1


ALL = [
    HypersimReader("nowhere/x"),
    VKitti2Reader("nowhere/x"),
    NyuReader("nowhere/x"),
    folder("nowhere/x"),
    SynMirrorReader("nowhere/x"),
    ArtReader("nowhere/x"),
]


@pytest.mark.filterwarnings("ignore:.*no official split")
@pytest.mark.parametrize("reader", ALL, ids=lambda reader: type(reader).__name__)
def test_readers_are_frozen_picklable_and_say_what_they_expected(reader: Reader, tmp_path):
    assert pickle.loads(pickle.dumps(reader)) == reader
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        reader.raw = "elsewhere"
    fields = dataclasses.fields(reader)
    assert fields[0].name == "raw"
    low, high = reader.depth_range_m
    assert 0 <= low < high
    with pytest.raises(UserError, match="nowhere/x: no such directory; expected "):
        reader.list()
    write(tmp_path / "odd.txt", b"")
    with pytest.raises(UserError, match=r"expected .*, found odd\.txt"):
        dataclasses.replace(reader, raw=str(tmp_path)).list()
    with pytest.raises(UserError, match="Protocol not known: xyz"):
        dataclasses.replace(reader, raw="xyz://bucket").list()


@pytest.mark.filterwarnings("ignore:.*(no official split|no row in)")
def test_any_file_system_gives_the_same_frames(hypersim, tmp_path):
    """memory:// and a zip archive hold what the directory holds; only the root differs."""
    make_vkitti2(*[tmp_path / "vkitti2"] * 3)
    write_h5(tmp_path / "nyu/train/den_0001/1.h5", rgb=np.zeros((3, 6, 8), np.uint8), depth=CODES)
    shutil.copytree(hypersim, tmp_path / "hypersim")
    shutil.copytree(DATA / "rgbd/redwood", tmp_path / "redwood")
    shutil.copytree(DATA / "art", tmp_path / "art")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(tmp_path.rglob("*")):
            name = path.relative_to(tmp_path).as_posix()
            if path.is_file() and path.suffix != ".zip":
                archive.write(path, name)
                memory.pipe(f"/raw/{name}", path.read_bytes())
    readers = {
        "vkitti2": VKitti2Reader("x"),
        "nyu": NyuReader("x"),
        "hypersim": HypersimReader("x"),
        "redwood": folder("x", image_glob="image/*.jpg", depth_glob="depth/*.png"),
        "art": ArtReader("x"),
    }
    for name, reader in readers.items():
        roots = (tmp_path / name, f"memory://raw/{name}", f"zip://{name}::{tmp_path}/all.zip")
        local, *others = (read_all(dataclasses.replace(reader, raw=str(root))) for root in roots)
        assert local
        for other in others:
            assert list(other) == list(local)
            for key, frame in local.items():
                assert other[key].image == frame.image
                assert other[key].meta == frame.meta
                json.dumps(dict(frame.meta), allow_nan=False)
                if frame.depth is not None:
                    np.testing.assert_array_equal(other[key].depth.codes, frame.depth.codes)
                    np.testing.assert_array_equal(other[key].K_px, frame.K_px)


def test_a_bare_zip_is_a_root_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "art.zip", "w") as archive:
        archive.writestr("sub/1.png", image_bytes())
    root = f"zip://::{tmp_path}/art.zip"
    [picture] = read_all(ArtReader(root)).values()
    assert (picture.key, picture.meta["image"]) == ("sub/1", "sub/1.png")
    assert Tree(root).path(Tree(root).url("sub/1.png")) == "sub/1.png"


def test_a_missing_file_is_one_bad_frame(tmp_path):
    write(tmp_path / "1.png", image_bytes())
    reader = ArtReader(str(tmp_path))
    [item] = reader.list().items
    (tmp_path / "1.png").unlink()
    with pytest.raises(BadFrame) as caught:
        reader.read(item)
    assert caught.value.reason == "file missing"


def png_header(width, height):
    """A PNG that claims a size and holds almost nothing."""
    content = bytearray(image_bytes())
    content[16:24] = width.to_bytes(4) + height.to_bytes(4)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    return bytes(content)


@pytest.mark.parametrize("size", [(9000, 9000), (10_000, 10_000), (60_000, 60_000)])
def test_size_bombs_are_refused_unread(tmp_path, size):
    for role in ("image", "depth"):
        with pytest.raises(BadFrame, match=f"{role} too large"):
            content = {"image": image_bytes(), "depth": image_bytes(CODES), role: png_header(*size)}
            one_frame(tmp_path, **content)


FUZZED = {
    "color.jpg": image_bytes(format="JPEG"),
    "color.png": image_bytes(),
    "color.webp": image_bytes(format="WEBP"),
    "color.avif": image_bytes(format="AVIF"),
    "color.tif": image_bytes(format="TIFF"),
    "color.bmp": image_bytes(format="BMP"),
    "depth.png": image_bytes(CODES),
    "depth.tif": image_bytes(CODES, "TIFF"),
    "depth.pgm": pgm(CODES),
    "depth.npy": npy(CODES),
    "depth.h5": hdf5(CODES),
}


@pytest.mark.parametrize("name", FUZZED)
@settings(deadline=None)  # the machine may be busy
@given(data=st.data())
def test_damaged_bytes_give_a_frame_or_a_bad_frame(name, data):
    content = bytearray(FUZZED[name])
    content = content[: data.draw(st.integers(0, len(content)))]
    positions = st.integers(0, max(0, len(content) - 1))
    for position, value in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)))):
        content[position : position + 1] = [value]
    role, _, ext = name.partition(".")
    files = {"color": ("1.png", image_bytes()), "depth": ("1.png", image_bytes(CODES))}
    files[role] = (f"1.{ext}", bytes(content))
    memory = fsspec.filesystem("memory")
    for directory, (file, payload) in files.items():
        memory.pipe(f"/fuzz/{directory}/{file}", payload)
    urls = [f"memory://fuzz/{directory}/{file}" for directory, (file, _) in files.items()]
    item = Item(key="1", scene="1", files=dict(zip(("image", "depth"), urls, strict=True)))
    try:
        frame = folder("memory://fuzz").read(item)
    except BadFrame:
        return
    assert frame.depth.codes.shape == (frame.height, frame.width)


def test_warnings_of_decoders_stay_out_of_the_way(tmp_path):
    """Damaged metadata of a picture that decodes is nobody's business."""
    content = image_bytes(
        format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\xff\xff"
    )
    write(tmp_path / "1.jpg", content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [picture] = read_all(ArtReader(str(tmp_path))).values()
    assert picture.image == content
