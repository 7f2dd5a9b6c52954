"""Published layouts, made small, packed by the commands of docs/datasets.md: values as made."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import OpenEXR
import pytest
import scipy.io
from PIL import Image

from flatdepth.commands import pack as tool
from flatdepth.data.pack import pack
from flatdepth.data.readers import FolderReader, ListReader, NyuReader, VKitti2Reader
from flatdepth.data.readers.files import read_intrinsics
from flatdepth.data.shards.codec import decode_frame
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import camera_trouble, focal_from_mm, off_centre, sensor_sides
from flatdepth.predict.predictor import PredictOptions, choose_camera
from tests.conftest import REPOSITORY

COMMANDS = dict(
    re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", (REPOSITORY / "docs/datasets.md").read_text(), re.M)
)
"""Data set -> its command."""


@dataclass(frozen=True)
class Truth:
    """What a packed frame must be: colour of its image, (H, W) depth in metres, (3, 3) K_px."""

    scene: str
    colour: int
    depth_m: np.ndarray
    K_px: np.ndarray
    split: str = ""


class Maker:
    """Writes files below a directory, each frame of its own colour and depth."""

    def __init__(self, root: Path) -> None:
        self.root, self.colour = root, 0

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def text(self, name: str, text: str) -> None:
        self.path(name).write_text(text)

    def image(self, name: str, height: int, width: int) -> int:
        self.colour += 30
        Image.new("RGB", (width, height), (self.colour,) * 3).save(self.path(name))
        return self.colour

    def codes(self, height: int, width: int, low: int = 500, high: int = 5000) -> np.ndarray:
        codes = np.random.default_rng(self.colour).integers(low, high, (height, width), np.uint16)
        codes[0, 0] = 0
        return codes

    def png(self, name: str, codes: np.ndarray) -> None:
        Image.fromarray(codes).save(self.path(name))


def K(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def metres(codes: np.ndarray, scale: float) -> np.ndarray:
    return np.where(codes == 0, np.nan, codes * scale)


def frame(
    make: Maker,
    image: str,
    depth: str,
    size: tuple[int, int],
    *,
    scene: str,
    K_px: np.ndarray,
    scale: float = 0.001,
    image_size: tuple[int, int] | None = None,
    split: str = "",
    sky: bool = False,
    **codes: int,
) -> Truth:
    """An image and a 16-bit PNG of (height, width), with a pixel unknown or of the sky."""
    colour = make.image(image, *(image_size or size))
    values = make.codes(*size, **codes)
    depth_m = metres(values, scale)
    if sky:
        values[0, 0], depth_m[0, 0] = 65535, np.inf
    make.png(depth, values)
    return Truth(scene, colour, depth_m, K_px, split)


def kitti(make: Maker) -> dict[str, Truth]:
    """Both eyes of a drive; lidar, so few pixels are known, here all."""
    drive = "2011_09_26_drive_0001_sync"
    return {
        f"2011_09_26/{drive}/{eye}/data/0000000005": frame(
            make,
            f"2011_09_26/{drive}/{eye}/data/0000000005.png",
            f"train/{drive}/proj_depth/groundtruth/{eye}/0000000005.png",
            (375, 1242),
            scene=f"2011_09_26/{drive}",
            K_px=K(721.5377, 721.5377, 610.0593, 173.354),
            scale=1 / 256,
            high=20000,
        )
        for eye in ("image_02", "image_03")
    }


def sun_rgbd(make: Maker) -> dict[str, Truth]:
    """Names of image and depth file may differ; codes are rotated left by three bits."""
    found = {}
    for place, image, depth in (
        ("kv1/NYUdata/NYU0001", "NYU0001", "NYU0001"),
        ("xtion/sun3ddata/hotel/room/0001", "0000001-000000000000", "0000002-000000033368"),
    ):
        colour = make.image(f"{place}/image/{image}.jpg", 427, 561)
        codes = make.codes(427, 561, high=9500)
        bits = (f"{code:016b}" for code in codes.ravel())
        turned = np.array([int(text[3:] + text[:3], 2) for text in bits], np.uint16)
        make.png(f"{place}/depth_bfx/{depth}.png", turned.reshape(codes.shape))
        make.text(f"{place}/intrinsics.txt", "518.8 0 284.5 \n0 519.4 208.7 \n0 0 1 ")
        make.text(f"{place}/extrinsics/20150118.txt", "1 0 0 0\n0 1 0 0\n0 0 1 0")
        scene = "/".join(place.split("/")[:3])
        K_px = K(518.8, 519.4, 285.0, 209.2)
        found[f"{place}/image/{image}"] = Truth(scene, colour, metres(codes, 0.001), K_px)
    return found


def scannet(make: Maker) -> dict[str, Truth]:
    make.text(
        "scene0000_00/intrinsic/intrinsic_depth.txt",
        "577.87 0 319.5 0\n0 577.87 239.5 0\n0 0 1 0\n0 0 0 1\n",
    )
    names = ("color/0.jpg", "depth/0.png")
    truth = frame(
        make,
        *(f"scene0000_00/{name}" for name in names),
        (480, 640),
        image_size=(968, 1296),
        scene="scene0000_00",
        K_px=K(577.87, 577.87, 320, 240),
    )
    return {"scene0000_00/color/0": truth}


def tum(make: Maker) -> dict[str, Truth]:
    scene = "rgbd_dataset_freiburg1_desk"
    names = ("rgb/1305031452.791720.png", "depth/1305031452.785093.png")
    K_px = K(517.3, 516.5, 319.1, 255.8)
    files = (f"{scene}/{name}" for name in names)
    truth = frame(make, *files, (480, 640), scene=scene, K_px=K_px, scale=1 / 5000, high=40000)
    return {f"{scene}/rgb/1305031452_791720": truth}


def arkit(make: Maker, images: str, size: tuple[int, int], k: int) -> dict[str, Truth]:
    """Times differ by a millisecond now and then, also those of the intrinsics."""
    video = "Training/40753679"
    folder, name = f"{video}/40753679_frames", "40753679_6791.16"
    four = [211.9 * k, 211.9 * k, 127.9 * k, 95.9 * k]
    camera = " ".join(map(str, [size[1], size[0], *four]))
    make.text(f"{folder}/{images}_intrinsics/{name}4.pincam", camera)
    truth = frame(
        make,
        f"{folder}/{images}/{name}5.png",
        f"{folder}/lowres_depth/{name}6.png",
        (192, 256),
        image_size=size,
        scene=video,
        K_px=K(211.9, 211.9, 127.9 + 0.5 / k, 95.9 + 0.5 / k),
    )
    return {f"{folder}/{images}/{name.replace('.', '_')}5": truth}


def arkit_small(make: Maker) -> dict[str, Truth]:
    return arkit(make, "lowres_wide", (192, 256), 1)


def arkit_full(make: Maker) -> dict[str, Truth]:
    return arkit(make, "wide", (1440, 1920), 7.5)


def record3d(make: Maker) -> dict[str, Truth]:
    """Intrinsics of the upright colour image, column by column; float32 depth in metres."""
    K_list = [720.0, 0, 0, 0, 720.0, 0, 359.5, 479.5, 1]
    about = {"w": 720, "h": 960, "dw": 192, "dh": 256, "K": K_list, "poses": [[0] * 7]}
    make.text("kitchen/metadata.json", json.dumps(about))
    colour = make.image("kitchen/rgb/0.jpg", 960, 720)
    depth_m = metres(make.codes(256, 192), 0.001).astype(np.float32)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"R": depth_m}).write(str(make.path("kitchen/depth/0.exr")))
    return {"kitchen/rgb/0": Truth("kitchen", colour, depth_m, K(192, 192, 96, 128))}


def stray(make: Maker) -> dict[str, Truth]:
    make.text("scan/camera_matrix.csv", "1500.0,0.0,959.5\n0.0,1500.0,719.5\n0.0,0.0,1.0")
    confidence = np.full((192, 256), 2, np.uint8)
    confidence[:20] = 0
    make.png("scan/confidence/000000.png", confidence)
    names = ("scan/rgb/000000.jpg", "scan/depth/000000.png")
    K_px = K(200, 200, 128, 96)
    truth = frame(make, *names, (192, 256), image_size=(1440, 1920), scene="scan", K_px=K_px)
    trusted = np.where(confidence > 0, truth.depth_m, np.float32(np.nan))
    return {"scan/rgb/000000": replace(truth, depth_m=trusted)}


def matterport(make: Maker) -> dict[str, Truth]:
    """Three cameras with their own intrinsics, each in six directions."""
    found = {}
    for camera, fx in ((0, 1076.5), (1, 1070.25)):
        lens = "0.22 -0.51 0.002 0.0003 0.31"
        make.text(
            f"scan/matterport_camera_intrinsics/pano_intrinsics_{camera}.txt",
            f"1280 1024 {fx} {fx} 629.5 522.5 {lens}",
        )
        key = f"scan/matterport_color_images/pano_i{camera}_3"
        found[key] = frame(
            make,
            f"{key}.jpg",
            f"scan/matterport_depth_images/pano_d{camera}_3.png",
            (1024, 1280),
            scene="scan",
            K_px=K(fx, fx, 630, 523),
            scale=0.00025,
            high=60000,
        )
    return found


def replica(make: Maker) -> dict[str, Truth]:
    camera = {"w": 1200, "h": 680, "fx": 600.0, "fy": 600.0, "cx": 599.5, "cy": 339.5}
    make.text("cam_params.json", json.dumps({"camera": {**camera, "scale": 6553.5}}))
    names = ("room0/results/frame000000.jpg", "room0/results/depth000000.png")
    options = {"scene": "room0", "K_px": K(600, 600, 600, 340)}
    truth = frame(make, *names, (680, 1200), scale=1 / 6553.5, high=60000, **options)
    return {"room0/results/frame000000": truth}


def tartanair(make: Maker, eye: str, size: tuple[int, int], write: Callable) -> dict[str, Truth]:
    """Metres as float32; the sky is far away."""
    place = "office/Easy/P000"
    key = f"{place}/image_{eye}/000000_{eye}"
    colour = make.image(f"{key}.png", *size)
    depth_m = metres(make.codes(*size), 0.01).astype(np.float32)
    truth = depth_m.copy()
    depth_m[:9], truth[:9] = 10000, np.inf
    write(make.path(f"{place}/depth_{eye}/000000_{eye}_depth"), np.nan_to_num(depth_m))
    return {key: Truth("office", colour, truth, K(320, 320, 320, size[0] / 2))}


def tartanair_1(make: Maker) -> dict[str, Truth]:
    return tartanair(make, "left", (480, 640), lambda path, z: np.save(f"{path}.npy", z))


def tartanair_2(make: Maker) -> dict[str, Truth]:
    """OpenCV writes the four bytes of a number as a pixel."""

    def write(path: Path, z: np.ndarray) -> None:
        assert cv2.imwrite(f"{path}.png", z.astype("<f4").view(np.uint8).reshape(*z.shape, 4))

    return tartanair(make, "lcam_front", (640, 640), write)


def vkitti(make: Maker) -> dict[str, Truth]:
    """One reader's layout without vkitti_2.0.3_textgt."""
    found = {}
    for camera in ("Camera_0", "Camera_1"):
        folder = "Scene01/clone/frames"
        found[f"Scene01/clone/{camera}/00000"] = frame(
            make,
            f"vkitti_2.0.3_rgb/{folder}/rgb/{camera}/rgb_00000.jpg",
            f"vkitti_2.0.3_depth/{folder}/depth/{camera}/depth_00000.png",
            (375, 1242),
            scene="Scene01",
            K_px=K(725.0087, 725.0087, 621, 187.5),
            scale=0.01,
            sky=True,
        )
    return found


def vkitti_list(make: Maker) -> dict[str, Truth]:
    """The paths of the published list are its authors'; "None" and empty lines are others'."""
    folder = "Scene01/clone/frames"
    found, lines = {}, ["", f"{folder}/rgb/none.jpg None"]
    published = "/mnt/bn/liheyang/DepthDatasets/vKitti2/"
    for camera, root in (("Camera_0", published), ("Camera_1", "")):
        key = f"{folder}/rgb/{camera}/rgb_00000"
        names = f"{key}.jpg", f"{folder}/depth/{camera}/depth_00000.png"
        options = {"scene": "Scene01", "K_px": K(725.0087, 725.0087, 621, 187.5), "split": "train"}
        found[key] = frame(make, *names, (375, 1242), scale=0.01, sky=True, **options)
        lines.append(" ".join(root + name for name in names))
    make.text("train.txt", "\n".join(lines))
    return found


def hypersim_list(make: Maker) -> dict[str, Truth]:
    """Distances to the optical centre in metres, float16."""
    images = "ai_003_010/images"
    key = f"{images}/scene_cam_00_final_preview/frame_0000_tonemap"
    names = (
        f"{images}/scene_cam_00_final_preview/frame.0000.tonemap.jpg",
        f"{images}/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5",
    )
    published = "/mnt/bn/liheyang/DepthDatasets/HyperSim/all"
    make.text("val.txt", " ".join(f"{published}/{name}" for name in names))
    colour = make.image(names[0], 768, 1024)
    distance = metres(make.codes(768, 1024), 0.001).astype(np.float16)
    with h5py.File(make.path(names[1]), "w") as file:
        file["dataset"] = distance
    y, x = np.mgrid[:768, :1024] - np.array([383.5, 511.5])[:, None, None]
    z = distance.astype(np.float64) * 886.81 / np.sqrt(x**2 + y**2 + 886.81**2)
    return {key: Truth("ai_003_010", colour, z, K(886.81, 886.81, 512, 384), "val")}


def nyu_list(make: Maker) -> dict[str, Truth]:
    """Lines with a leading slash and a focal length."""
    names = "kitchen_0028b/rgb_00045.jpg", "kitchen_0028b/sync_depth_00045.png"
    make.text("nyu_train.txt", f"/{names[0]} /{names[1]} 518.8579\n")
    options = {"scene": "kitchen_0028b", "K_px": K(518.8579, 518.8579, 320, 240), "split": "train"}
    return {"kitchen_0028b/rgb_00045": frame(make, *names, (480, 640), **options)}


def nyu(make: Maker) -> dict[str, Truth]:
    """MATLAB counts the axes from the other end; names of scenes are arrays of characters."""
    names = ("kitchen_0004a", "office_0002")
    codes = [make.codes(480, 640) for _ in names]
    with h5py.File(make.path("nyu_depth_v2_labeled.mat"), "w") as file:
        grey = np.stack([np.full((480, 640, 3), 60 + 60 * i, np.uint8) for i in range(2)])
        file["images"] = grey.transpose(0, 3, 2, 1)
        file["depths"] = np.stack([code.T / np.float32(1000) for code in codes])
        file["rawDepths"] = np.zeros((2, 640, 480), np.float32)
        references = [[]]
        for i, name in enumerate(names):
            file[f"#refs#/{i}"] = np.array([[ord(letter)] for letter in name], np.uint16)
            references[0].append(file[f"#refs#/{i}"].ref)
        file.create_dataset("scenes", data=references, dtype=h5py.ref_dtype)
    splits = {"trainNdxs": np.array([[2]]), "testNdxs": np.array([[1]])}
    scipy.io.savemat(make.path("splits.mat"), splits)
    K_px = K(518.86, 519.47, 325.08, 253.24)
    return {
        f"labelled/{i + 1:04d}": Truth(scene, 60 + 60 * i, metres(codes[i], 0.001), K_px, split)
        for i, (scene, split) in enumerate((("kitchen_0004", "test"), ("office_0002", "train")))
    }


MAKERS: dict[str, Callable[[Maker], dict[str, Truth]]] = {
    "Virtual KITTI 2": vkitti,
    "NYU Depth v2, labelled `.mat` (or FastDepth's h5)": nyu,
    "NYU Depth v2, lists with focal lengths": nyu_list,
    "Depth Anything V2's lists of Hypersim (cameras of tilted sensors need `hypersim`)": (
        hypersim_list
    ),
    "Depth Anything V2's lists of Virtual KITTI 2": vkitti_list,
    "KITTI, raw and annotated depth, per day and split": kitti,
    "SUN RGB-D": sun_rgbd,
    "ScanNet, exported": scannet,
    "TUM RGB-D (fr1)": tum,
    "ARKitScenes, small images": arkit_small,
    "ARKitScenes, full images": arkit_full,
    "Record3D, EXR and JPEG export": record3d,
    "Stray Scanner, frames of `rgb.mp4` in `rgb/`": stray,
    "Matterport3D": matterport,
    "Replica, as NICE-SLAM renders it": replica,
    "TartanAir": tartanair_1,
    "TartanAir V2": tartanair_2,
}


def test_every_command_is_tried() -> None:
    assert set(COMMANDS) == set(MAKERS) | {"Hypersim"}  # whose layout test_readers.py makes


@pytest.mark.filterwarnings("ignore:.*published intrinsics")
@pytest.mark.parametrize("name", MAKERS)
def test_a_published_layout_is_packed_as_documented(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truths = MAKERS[name](Maker(tmp_path / "raw"))
    command = COMMANDS[name]
    command = command.replace("RAW", str(tmp_path / "raw"))
    command = re.sub(r"^list ", f"list {tmp_path}/raw/", command)
    arguments = [*shlex.split(command), "--out", str(tmp_path / "set"), "--workers", "1"]
    assert tool.main(arguments) == 0, capsys.readouterr().err
    with ShardSet.open(tmp_path / "set") as shards:
        assert set(shards.keys) == set(truths)
        for i, key in enumerate(shards.keys):
            truth, raw = truths[key], shards.read(i)
            found = decode_frame(raw)
            assert (raw.scene, raw.split) == (truth.scene, truth.split)
            np.testing.assert_allclose(found.image.mean((0, 1)), truth.colour, atol=1)
            np.testing.assert_allclose(found.depth_m, truth.depth_m, rtol=8e-5)
            np.testing.assert_allclose(found.K_px, truth.K_px, rtol=1e-9)


# Scenes


def pack_folder(tmp_path: Path, paths: list[str], *options: str) -> list[str]:
    """The scenes of images at the paths (with ``*`` for the kind), in order."""
    make = Maker(tmp_path / "raw")
    for path in paths:
        make.image(f"{path}.png", 12, 16)
        make.png(f"{path}_depth.png", make.codes(12, 16))
    globs = ["--image_glob", "**/*.png", "--depth_glob", "**/*_depth.png", "--depth_scale", "0.001"]
    fixed = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "set"), "--workers", "1"]
    assert tool.main(["folder", *fixed, *globs, "--fov_deg", "60", *options]) == 0
    with ShardSet.open(tmp_path / "set") as shards:
        return list(shards.scenes)


EYES = [
    ("d/d_drive_1/image_02/data/0", "d/d_drive_1/image_03/data/0"),
    ("a/left/0", "a/right/0"),
    ("a/cam0/data/0", "a/cam1/data/0"),
    ("Camera_0/0", "Camera_1/0"),
    ("P0/image_lcam_front/0", "P0/image_rcam_front/0"),
]


@pytest.mark.parametrize("eyes", EYES)
def test_scenes_are_named_and_cameras_of_one_place_doubted(
    eyes: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = [path.rpartition("/")[0] for path in eyes]
    assert pack_folder(tmp_path, list(eyes)) == scenes
    said = capsys.readouterr().err
    assert f"folder: 2 frames of 2 scenes ({', '.join(scenes)})" in said
    assert f"the scenes {' and '.join(scenes)} look like cameras of one place" in said


def test_a_single_scene_is_doubted_and_places_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_folder(tmp_path / "1", ["rgb/kitchen_1", "rgb/kitchen_2"])
    assert "all frames are of one scene" in capsys.readouterr().err
    pack_folder(tmp_path / "alone", ["rgb/kitchen_1"])
    assert "of one scene" not in capsys.readouterr().err
    pack_folder(tmp_path / "2", ["kitchen_1/0", "kitchen_2/0", "scene_01/0", "scene_02/0"])
    said = capsys.readouterr().err
    assert "4 frames of 4 scenes (kitchen_1, kitchen_2, scene_01)" in said
    assert "warning" not in said


@pytest.mark.parametrize(
    ("pattern", "paths", "scenes"),
    [
        ("*/*_drive_*/", EYES[0], ["d/d_drive_1", "d/d_drive_1"]),
        ("**/rgb/*_", ("a/rgb/kitchen_1_7", "a/rgb/hall_2"), ["a/rgb/hall_", "a/rgb/kitchen_1_"]),
        ("[a-z]", ("ab/1", "ac/2", "b.c/3"), ["a", "a", "b"]),
        ("**/", ("b.c/d.e/3", "4"), ["folder", "b_c/d_e"]),
    ],
)
def test_a_scene_is_the_start_that_a_pattern_matches(
    pattern: str, paths: tuple[str, ...], scenes: list[str], tmp_path: Path
) -> None:
    assert pack_folder(tmp_path, list(paths), "--scene_from", pattern) == scenes


def test_a_scene_that_a_pattern_does_not_match_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scene_from: a/\*/ is no start of d/0\.png"):
        pack_folder(tmp_path, ["a/b/0", "d/0"], "--scene_from", "a/*/")


# Cameras


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("36x24", [36, 24]),
        ("24 × 36 mm", [36, 24]),
        ("23.5mm*15.6mm", [23.5, 15.6]),
        ("6,17x4,55", [6.17, 4.55]),
        ("[36, 24]", [36, 24]),
        ("36 24", [36, 24]),
        ("36", [36]),
    ],
)
def test_sensors_are_read_as_people_write_them(text: str, sides: list[float]) -> None:
    assert sensor_sides(text) == sides


@pytest.mark.parametrize(
    "text", ["", "full frame", '1/2.3"', "36x24x1", "0x0", "-36x24", "nanxnan"]
)
def test_what_is_no_sensor_is_named(text: str) -> None:
    with pytest.raises(
        UserError, match="sensor_mm: expected width and height in mm, such as 36x24"
    ):
        sensor_sides(text)


@pytest.mark.parametrize("size", [(4000, 6000), (6000, 4000), (3375, 6000), (4000, 5333)])
def test_millimetres_see_what_the_lens_sees(size: tuple[int, int]) -> None:
    """On 36 x 24 mm, 18 mm see 90 degrees along 36 mm; crops lose pixels, but none gets larger."""
    focal = focal_from_mm(18, "36x24", *size)
    pixels_per_mm = 6000 / 36 if size != (4000, 5333) else 4000 / 24
    assert focal == pytest.approx(18 * pixels_per_mm)
    assert focal_from_mm(18, "36", 4000, 6000) == pytest.approx(3000)


@pytest.mark.parametrize(
    ("camera", "size", "said"),
    [
        ((18, 18, 2000, 150), (300, 4000), "see 179 degrees, where lenses see 3 to 120"),
        ((4.2, 4.2, 320, 240), (480, 640), "see 178 degrees"),
        ((30000, 30000, 320, 240), (480, 640), "see 1.22 degrees"),
        ((525, 700, 320, 240), (480, 640), "differ by more than 20 %"),
        ((700, 525, 320, 240), (480, 640), "differ by more than 20 %"),
        ((525, 525, 320, 240), (480, 640), None),
        ((320, 384, 320, 240), (480, 640), None),
        ((721.5, 721.5, 609.6, 172.9), (375, 1242), None),
        ((300, 300, 600, 240), (480, 640), None),  # 63 degrees to the left, 8 to the right
        ((12000, 12000, 320, 240), (480, 640), None),  # 3.05 degrees
    ],
)
def test_cameras_that_cannot_be_are_told(
    camera: tuple[float, ...], size: tuple[int, int], said: str | None
) -> None:
    trouble = camera_trouble(K(*camera), *size)
    assert (trouble is None) if said is None else (said in str(trouble))
    options = {"intrinsics": tuple(c - 0.5 * (i > 1) for i, c in enumerate(camera))}
    if said:
        with pytest.raises(UserError, match="--focal_mm 18 --sensor_mm 36x24"):
            choose_camera(None, *size, PredictOptions(**options))
        options["unusual_camera"] = True
    np.testing.assert_allclose(
        choose_camera(None, *size, PredictOptions(**options)).K_px, K(*camera)
    )


def test_predict_takes_millimetres() -> None:
    camera = choose_camera(99.0, 600, 900, PredictOptions(focal_mm=18, sensor_mm="36x24"))
    np.testing.assert_allclose(camera.K_px, K(450, 450, 450, 300))
    with pytest.raises(UserError, match="see 150 degrees"):
        choose_camera(None, 600, 900, PredictOptions(fov_deg=150))
    choose_camera(50.0, 600, 900, PredictOptions())  # EXIF of a fisheye is no mistake
    for options in (
        {"focal_mm": 18.0},
        {"sensor_mm": "36x24"},
        {"focal_mm": -1.0, "sensor_mm": "36"},
    ):
        with pytest.raises(UserError, match="--focal_mm and --sensor_mm: expected both, above 0"):
            PredictOptions(**options)
    with pytest.raises(UserError, match="--focal_mm: --intrinsics or --fov says the same"):
        PredictOptions(focal_mm=18, sensor_mm="36x24", fov_deg=60)


def test_crops_are_remarked_on() -> None:
    assert off_centre(K(500, 500, 320 + 0.149 * 640, 240), 480, 640) is None
    assert "right for a crop" in str(off_centre(K(500, 500, 320 + 0.16 * 640, 240), 480, 640))
    assert "right for a crop" in str(off_centre(K(500, 500, 320, 240 - 0.16 * 480), 480, 640))


def rgbd(tmp_path: Path, **options: object) -> FolderReader:
    make = Maker(tmp_path)
    for name in "ab":
        make.image(f"rgb/{name}.png", 480, 640)
        make.png(f"depth/{name}.png", make.codes(480, 640))
    return FolderReader(str(tmp_path), "rgb/*.png", "depth/*.png", 0.001, **options)


def test_packing_refuses_millimetres_at_once_and_takes_them_with_the_sensor(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^intrinsics: focal lengths of 4\.2 and 4\.2 pixels see 178"
    ):
        rgbd(tmp_path, intrinsics=(4.2, 4.2, 320.0, 240.0)).list()
    assert len(
        rgbd(tmp_path, intrinsics=(4.2, 4.2, 320.0, 240.0), unusual_camera=True).list().items
    )
    reader = rgbd(tmp_path, focal_mm=18.0, sensor_mm="36x24")
    K_px = reader.read(reader.list().items[0]).K_px
    np.testing.assert_allclose(K_px, K(360, 360, 320, 240))  # 480 px on 24 mm
    with pytest.warns(UserWarning, match="principal point 120.5, 240.5 .* for a crop"):
        rgbd(tmp_path, intrinsics=(525.0, 525.0, 120.0, 240.0)).list()
    with pytest.raises(UserError, match="focal_mm and sensor_mm: expected both"):
        rgbd(tmp_path, focal_mm=18.0)


def test_a_file_of_intrinsics_that_cannot_be_costs_its_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgbd(tmp_path)
    Path(tmp_path, "a.txt").write_text("4.2 4.2 320 240")
    Path(tmp_path, "b.txt").write_text("525 525 320 240")
    reader = rgbd(tmp_path, intrinsics_glob="*.txt")
    assert pack(reader, tmp_path / "set", workers=1).skipped == {"camera cannot be": 1}
    assert "left out rgb/a: camera cannot be (focal lengths of 4.2" in capsys.readouterr().err
    insisting = replace(reader, unusual_camera=True)
    assert pack(insisting, tmp_path / "all", workers=1).frames == 2


# What the layouts need


def test_lists_say_what_they_lack(tmp_path: Path) -> None:
    make = Maker(tmp_path)
    for number, (text, said) in enumerate(
        (
            ("a.jpg b.png 5 6", r"found 'a\.jpg b\.png 5 6'"),
            ("a.jpg b.png -5", r"found 'a\.jpg b\.png -5'"),
            ("a.jpg", r"found 'a\.jpg'"),
            ("a.jpg None", "found none"),
        )
    ):
        make.text(f"{number}.txt", text)
        with pytest.raises(UserError, match=said):
            ListReader(str(tmp_path), 0.001, file=f"{tmp_path}/{number}.txt").list()
    with pytest.raises(UserError, match=r"gone\.txt: no list of images and depth files"):
        ListReader(str(tmp_path), 0.001, file=str(tmp_path / "gone.txt")).list()


def test_lists_assume_a_camera_where_they_state_none(tmp_path: Path) -> None:
    rgbd(tmp_path)
    Path(tmp_path, "all.txt").write_text(
        f"{tmp_path}/rgb/a.png {tmp_path}/depth/a.png\nrgb/b.png depth/b.png 5e2"
    )
    reader = ListReader(str(tmp_path), 0.001, file=str(tmp_path / "all.txt"), split="val")
    with pytest.warns(UserWarning, match="assuming a horizontal field of view of 60 degrees"):
        items = reader.list().items
    assert [item.split for item in items] == ["val", "val"]
    frames = [reader.read(item) for item in items]
    assert [frame.meta["intrinsics_assumed"] for frame in frames] == [True, False]
    assert frames[1].K_px[0, 0] == 500


@pytest.mark.filterwarnings("ignore:.*published intrinsics")
def test_published_intrinsics_are_for_the_published_size(tmp_path: Path) -> None:
    vkitti(Maker(tmp_path))
    for path in tmp_path.rglob("*_00000.*"):
        Image.open(path).resize((621, 187), Image.Resampling.NEAREST).save(path)
    reader = VKitti2Reader(str(tmp_path))
    with pytest.raises(BadFrame, match=r"no intrinsics: .* are for \(1242, 375\)"):
        reader.read(reader.list().items[0])


def test_the_labelled_frames_without_splits_or_damaged(tmp_path: Path) -> None:
    nyu(Maker(tmp_path))
    raw_depth = NyuReader(str(tmp_path), labelled_depth="rawDepths")
    assert np.isnan(decode_frame(raw_depth.read(raw_depth.list().items[0])).depth_m).all()
    Path(tmp_path, "splits.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"splits\.mat: expected trainNdxs and testNdxs"):
        NyuReader(str(tmp_path)).list()
    Path(tmp_path, "splits.mat").unlink()
    with pytest.warns(UserWarning, match="no splits.mat, so no official split"):
        assert {item.split for item in NyuReader(str(tmp_path)).list().items} == {""}
    Path(tmp_path, "nyu_depth_v2_labeled.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match="expected the labelled frames of NYU Depth V2"):
        NyuReader(str(tmp_path)).list()


@pytest.mark.parametrize(
    "text",
    [
        '{"w": 8, "h": 6, "K": [[5, 0, 3.5], [0, 5.5, 2.5], [0, 0, 1]]}',
        '{"width": 8, "height": 6, "intrinsic_matrix": [5, 0, 0, 0, 5.5, 0, 3.5, 2.5, 1]}',
        '{"camera": {"w": 8, "h": 6, "fx": 5.0, "fy": 5.5, "cx": 3.5, "cy": 2.5}}',
        '{"fx": 5.0, "fy": 5.5, "cx": 3.5, "cy": 2.5}',
        "8 6 5 5.5 3.5 2.5 0.1 0.2 0.3 0.4 0.5",
    ],
)
def test_intrinsics_are_read_from_json_and_with_distortion(text: str, tmp_path: Path) -> None:
    path = tmp_path / "camera"
    path.write_text(text)
    np.testing.assert_array_equal(read_intrinsics(str(path), 8, 6), K(5, 5.5, 3.5, 2.5))


@pytest.mark.parametrize("text", ["{", "{}", '{"K": [1, 2]}', '{"K": {"a": []}}', '{"camera": 3}'])
def test_json_without_intrinsics_is_a_bad_frame(text: str, tmp_path: Path) -> None:
    path = tmp_path / "camera"
    path.write_text(text)
    with pytest.raises(BadFrame, match="intrinsics unreadable"):
        read_intrinsics(str(path), 8, 6)


def test_only_what_is_alone_is_paired_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a/rgb/1", "a/d/9", "b/rgb/1", "b/rgb/2", "b/d/9", "c/rgb/1", "c/rgb/2", "c/d/2"):
        Maker(tmp_path).text(f"{name}.png", "")
    reader = FolderReader(str(tmp_path), "*/rgb/*.png", "*/d/*.png", 1.0, fov_deg=60.0)
    pairs = {
        item.key: item.files["depth"] for item in replace(reader, pair_alone=True).list().items
    }
    assert pairs == {"a/rgb/1": f"{tmp_path}/a/d/9.png", "c/rgb/2": f"{tmp_path}/c/d/2.png"}


@pytest.mark.parametrize("bits", ["rotated", "rgba"])
def test_bits_of_other_files_are_not_turned(bits: str, tmp_path: Path) -> None:
    make = Maker(tmp_path)
    make.image("rgb/1.png", 6, 8)
    Image.fromarray(np.ones((6, 8), np.float32)).save(make.path("depth/1.tif"))
    reader = FolderReader(
        str(tmp_path), "rgb/*.png", "depth/*.tif", 1.0, depth_bits=bits, fov_deg=60
    )
    with pytest.raises(BadFrame, match=r"depth is not (16-bit|RGBA)"):
        reader.read(reader.list().items[0])
