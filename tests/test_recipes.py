"""Published sets of mirrors, pictures and glass, made small, packed as docs/datasets.md says."""

import json
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from flatdepth.commands import pack as tool
from flatdepth.data.shards.read import ShardSet
from flatdepth.predict import teacher
from flatdepth.types import Region
from tests.conftest import REPOSITORY
from tests.test_layouts import K, Maker
from tests.test_predict import Stub

HEIGHT, WIDTH = 42, 56
AREA = np.s_[10:30, 15:40]
WALL = np.array([0.05, -0.03, 0.4])

COMMANDS = {
    name: (command, licence)
    for name, command, licence in re.findall(
        r"^\| ([^|]+) \| `([^`]+)` \| ([^|]+) \|$",
        (REPOSITORY / "docs/datasets.md").read_text(),
        re.M,
    )
}


@dataclass(frozen=True)
class Labelled:
    """What a packed frame must be.

    Attributes:
        region: (H, W) values of ``Region``.
        inverse: (H, W) 1/z in 1/m where it is to be compared, else NaN.
        K_px: (3, 3), or None for a photograph.
    """

    region: np.ndarray
    inverse: np.ndarray
    K_px: np.ndarray | None = None


def area(value: int, kind: type = np.uint8) -> np.ndarray:
    values = np.zeros((HEIGHT, WIDTH), kind)
    values[AREA] = value
    return values


def inverse_depth(K_px: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    v, u = np.mgrid[:height, :width] + 0.5
    x, y = (u - K_px[0, 2]) / K_px[0, 0], (v - K_px[1, 2]) / K_px[1, 1]
    return np.stack([x, y, np.ones_like(u)], axis=-1) @ WALL


def teacher_plane(height: int, width: int) -> torch.Tensor:
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return 0.3 + 0.002 * u - 0.001 * v


def photo(region: Region, planar: bool = True) -> Labelled:
    """The teacher is fooled where a photograph is dark; a labelled mirror or picture is planar."""
    inverse = teacher_plane(HEIGHT, WIDTH).numpy().copy()
    if not planar:
        inverse[AREA] /= 2
    return Labelled(area(region), inverse)


def dark(make: Maker, name: str) -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), 180, np.uint8)
    pixels[AREA] = 10
    Image.fromarray(pixels).save(make.path(name), **({"quality": 100} if "jpg" in name else {}))


def save(make: Maker, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(make.path(name))


def mirage(make: Maker) -> dict[str, Labelled]:
    """A hole, a label that is none of its own and a shape of two points."""
    dark(make, "0001.jpg")
    dark(make, "0002.png")
    outer = [[15, 10], [40, 10], [40, 30], [15, 30]]
    inner = [[30, 12], [38, 12], [38, 20], [30, 20]]
    hidden = photo(Region.ART)
    region, inverse = hidden.region.copy(), hidden.inverse.copy()
    region[12:20, 30:38] = Region.BACKGROUND
    inverse[12:20, 30:38] = np.nan
    for name, polygons in (("0001", [outer]), ("0002", [inner, outer])):
        shapes = [{"label": "illu", "points": points} for points in polygons]
        shapes.append({"label": "illu", "points": [[1, 1], [2, 2]], "shape_type": "rectangle"})
        shapes[-1] |= {"points": [[1, 1]], "shape_type": "polygon"}
        shapes.append({"label": "car", "points": [[1, 1], [5, 1], [5, 5]]})
        make.text(f"{name}.json", json.dumps({"shapes": shapes, "imageData": None}))
    return {"0001": hidden, "0002": Labelled(region, inverse)}


def msd(make: Maker, folder: str = "mask", value: int = 255) -> dict[str, Labelled]:
    for split in ("train", "test"):
        dark(make, f"{split}/image/4009_640x512.jpg")
        save(make, f"{split}/{folder}/4009_640x512.png", area(value))
    save(make, "train/edge/4009_640x512.png", area(9))
    return {"train/image/4009_640x512": photo(Region.MIRROR)}


def rgbd_mirror(make: Maker) -> dict[str, Labelled]:
    save(make, "train/depth_normalized/4009_640x512.png", area(9, np.uint16))
    return msd(make, "mask_single")


def trans10k_1(make: Maker) -> dict[str, Labelled]:
    dark(make, "train/images/12.jpg")
    colours = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colours[AREA] = 255
    colours[35:40, 2:9] = (255, 0, 0)
    save(make, "train/masks/12_mask.png", colours)
    return {"train/images/12": photo(Region.DECOY, planar=False)}


def trans10k_2(make: Maker) -> dict[str, Labelled]:
    dark(make, "train/images/12.jpg")
    kinds = area(5)
    kinds[35:40, 2:9] = 7
    image = Image.fromarray(kinds, "P")
    image.putpalette([value % 256 for value in range(7, 775)])
    image.save(make.path("train/masks_12/12_mask.png"))
    return {"train/images/12": photo(Region.DECOY, planar=False)}


def mirror3d(
    make: Maker, places: dict[str, str], units: float, K_px: np.ndarray, size: tuple[int, int]
) -> Labelled:
    """A mirror that is deeper than its plane, which is stored of unit length with any sign."""
    height, width = size
    inverse = inverse_depth(K_px, *size)
    codes = (units / inverse).round().astype(np.uint16)
    mask = np.zeros(size, np.uint16)
    mask[60:200, 80:260], mask[60:200, 260:300] = 1, 2
    codes[mask > 0] += 900
    Image.new("RGB", (width, height), (90, 90, 90)).save(make.path(places["image"]), "PNG")
    save(make, places["depth"], codes)
    save(make, places["mask"], mask)
    four = np.array([*(WALL / units), -1.0])
    four /= -np.linalg.norm(four)
    normal = (WALL / np.linalg.norm(WALL)).tolist()
    plane = {"plane": four.tolist(), "normal": normal, "mask_id": 1}
    make.text(places["plane"], json.dumps([plane]))
    region = np.where(mask > 0, Region.MIRROR, Region.BACKGROUND)
    return Labelled(region, np.where(mask == 1, inverse, np.nan), K_px)


def mirror3d_nyu(make: Maker) -> dict[str, Labelled]:
    places = {
        "image": "mirror_color_images/45.jpg",
        "depth": "raw_sensorD/45.png",
        "mask": "mirror_instance_mask_precise/45.png",
        "plane": "mirror_plane/45.json",
    }
    K_px = K(519, 519, 304.5, 228.5)
    return {"mirror_color_images/45": mirror3d(make, places, 1000, K_px, (456, 608))}


def mirror3d_matterport(make: Maker) -> dict[str, Labelled]:
    name = "abc_i1_3"
    places = {
        "image": f"mirror_color_images/house/{name}.jpg",
        "depth": "raw_sensorD/house/abc_d1_3.png",
        "mask": f"mirror_instance_mask_precise/house/{name}.png",
        "plane": f"mirror_plane/house/{name}.json",
    }
    K_px = K(1074, 1074, 640.5, 512.5)
    found = mirror3d(make, places, 4000, K_px, (1024, 1280))
    return {f"mirror_color_images/house/{name}": found}


def booster(make: Maker) -> dict[str, Labelled]:
    """The rectified camera counts, not the raw one; baseline in mm; a pixel is occluded."""
    scene = "train/balanced/Bathroom"
    K_px = K(50.0, 50.0, 27.5, 20.5)
    inverse = inverse_depth(K_px)
    disparity = (50.0 * 0.08 * inverse).astype(np.float32)
    disparity[0, 0] = 0
    occlusion = np.full((HEIGHT, WIDTH), 255, np.uint8)
    occlusion[1, 1] = 0
    dark(make, f"{scene}/camera_00/im0.png")
    dark(make, f"{scene}/camera_00/im1.png")
    dark(make, f"{scene}/camera_02/im0.png")
    np.save(make.path(f"{scene}/disp_00.npy"), disparity)
    np.save(make.path(f"{scene}/disp_02.npy"), disparity)
    save(make, f"{scene}/mask_00.png", occlusion)
    save(make, f"{scene}/mask_cat.png", area(3) + np.uint8(0))
    matrix = "50. 0. 27. 0. 0. 50. 20. 0. 0. 0. 1. 0."
    make.text(
        f"{scene}/calib_00-02.xml",
        '<?xml version="1.0"?>\n<opencv_storage>\n<mtxL type_id="opencv-matrix"><rows>3</rows>'
        "<cols>3</cols><dt>d</dt><data>60. 0. 9. 0. 60. 9. 0. 0. 1.</data></mtxL>\n"
        '<proj_matL type_id="opencv-matrix"><rows>3</rows><cols>4</cols><dt>d</dt>\n<data>\n'
        f"{matrix}</data></proj_matL>\n<baselineLR>80.</baselineLR>\n</opencv_storage>",
    )
    inverse[0, 0] = inverse[1, 1] = np.inf
    return {f"{scene}/camera_00/im0": Labelled(area(Region.MIRROR), inverse, K_px)}


def illusion(make: Maker) -> dict[str, Labelled]:
    """PFM from the lowest row up, infinite where unknown; a mask that was a JPEG."""
    name = "room/poster/frame_7"
    size = (1080, 1920)
    K_px = K(1450.4127, 1450.4127, 938.8253, 547.9627)
    inverse = inverse_depth(K_px, *size)
    disparity = (1450.4127 * 0.06281671905517578 * inverse).astype("<f4")
    disparity[:20, :20] = np.inf
    Image.new("RGB", size[::-1], (120, 120, 120)).save(make.path(f"left/{name}.png"))
    Image.new("RGB", size[::-1], (120, 120, 120)).save(make.path(f"right/{name}.png"))
    make.path(f"disp/{name}.pfm").write_bytes(b"Pf\n1920 1080\n-1\n" + disparity[::-1].tobytes())
    mask = np.zeros(size, np.uint8)
    mask[400:640, 800:1200] = 255
    Image.fromarray(mask).save(make.path(f"mask/{name}.jpg"), quality=90)
    inverse[:20, :20] = np.inf
    region = np.where(mask > 0, Region.ART, Region.BACKGROUND)
    return {f"left/{name}": Labelled(region, inverse, K_px)}


def synmirror(make: Maker) -> dict[str, Labelled]:
    K_px = K(60.0, 60.0, 28.0, 21.0)
    inverse = inverse_depth(K_px)
    depth = (1 / inverse).astype(np.float32)
    depth[:5] = 1e10
    kinds = area(1, np.int64)
    kinds[12:20, 20:30] = 2
    about = {"cam2world": np.eye(4).tolist(), "cam_K": K(60.0, 60.0, 27.5, 20.5).tolist()}
    with h5py.File(make.path("hf-objaverse-v3/000-142/abc/0.hdf5"), "w") as file:
        colours = np.full((HEIGHT, WIDTH, 3), 99, np.uint8)
        file.create_dataset("colors", data=colours, compression="gzip")
        file.create_dataset("category_id_segmaps", data=kinds, compression="gzip")
        file.create_dataset("depth", data=depth, compression="gzip")
        file.create_dataset("cam_states", data=np.bytes_(json.dumps(about)))
    inverse[:5] = 0
    region = np.where(kinds == 1, Region.MIRROR, Region.BACKGROUND)
    return {"hf-objaverse-v3/000-142/abc/0": Labelled(region, inverse, K_px)}


MAKERS: dict[str, Callable[[Maker], dict[str, Labelled]]] = {
    "3D-Mirage": mirage,
    "MSD (MirrorNet)": msd,
    "PMD": lambda make: msd(make, value=1),
    "RGBD-Mirror (its depth is no metres)": rgbd_mirror,
    "Trans10K v1": trans10k_1,
    "Trans10K v2": trans10k_2,
    "Mirror3D, NYU": mirror3d_nyu,
    "Mirror3D, Matterport3D": mirror3d_matterport,
    "Booster, one illumination (to judge by)": booster,
    "3D Visual Illusion, real (to judge by)": illusion,
    "SynMirror (units are no metres)": synmirror,
}


def test_every_recipe_is_tried_and_has_a_licence() -> None:
    assert set(COMMANDS) == set(MAKERS)
    assert all(licence.strip() for _, licence in COMMANDS.values())


@pytest.mark.parametrize("name", MAKERS)
def test_a_published_set_is_packed_as_documented(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(image: torch.Tensor) -> torch.Tensor:
        inverse = teacher_plane(*image.shape[-2:])
        return 1 / torch.where(image[:, :1] < 0.35, inverse / 2, inverse)

    stub = Stub(answer, side=HEIGHT)
    monkeypatch.setattr(teacher, "_open_teacher", lambda *_: (stub, torch.device("cpu")))
    (tmp_path / "w.pth").write_bytes(b"")
    truths = MAKERS[name](Maker(tmp_path / "raw"))
    command = COMMANDS[name][0].replace("RAW", str(tmp_path / "raw"))
    command = command.replace("WEIGHTS", str(tmp_path / "w.pth"))
    arguments = [*shlex.split(command), "--out", str(tmp_path / "set"), "--workers", "1"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(field of view unknown|files left unread)")
        assert tool.main(arguments) == 0, capsys.readouterr().err
    with ShardSet.open(tmp_path / "set") as shards:
        assert set(shards.keys) == set(truths)
        for i, key in enumerate(shards.keys):
            truth, frame = truths[key], shards.frame(i)
            assert frame.region is not None
            wrong = (frame.region != truth.region).mean()
            assert wrong == 0 or ("Illusion" in name and wrong < 1e-3)
            compared = ~np.isnan(truth.inverse)
            assert compared.any()
            found = np.where(np.isnan(frame.depth_m), np.inf, 1 / frame.depth_m)
            np.testing.assert_allclose(found[compared], truth.inverse[compared], rtol=2e-3)
            if truth.K_px is not None:
                np.testing.assert_allclose(frame.K_px, truth.K_px, rtol=1e-9)
