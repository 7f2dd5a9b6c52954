"""Hypersim (Roberts et al., 2021): synthetic interiors in the layout of the official download.

Depth is the distance to the optical centre in metres, float16, NaN where a ray hits nothing.
Facts from the dataset's own documentation and issues (apple/ml-hypersim).
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Float64, Integer, UInt8

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    Picture,
    Tree,
    check_same_size,
    encode_jpeg,
    pinhole,
    read_hdf5,
    read_image,
    read_table,
    relative_paths,
    sort_items,
)
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import DepthCodes, RawFrame

_SPLIT_CSV = "metadata_images_split_scene_v1.csv"
_CAMERA_CSV = "metadata_camera_parameters.csv"
_TABLE_DIRS = ("", "evermotion_dataset/analysis/", "contrib/mikeroberts3000/")
_LAYOUT = (
    "ai_VVV_NNN/images/scene_cam_XX_geometry_hdf5/frame.NNNN.depth_meters.hdf5"
    " (the layout of the official download)"
)

# apple/ml-hypersim issues 22 (broken cameras) and 7 (frame without geometry).
_BROKEN_CAMERAS = (("ai_004_009", "cam_01"), ("ai_038_007", "cam_00"))
_BROKEN_FRAMES = (("ai_006_001", 53),)

# The camera of scenes without a row in the camera table: 60 degrees over 1024x768 pixels.
_DEFAULT_CAMERA = (886.81, 1024, 768)


@dataclass(frozen=True, slots=True)
class HypersimReader:
    """Hypersim frames with the official partition and each scene's own camera.

    A scene ``ai_VVV_NNN`` is the unit of the official partition and of every split. Excluded are
    the frames that the official list does not release, and those known to be broken.
    """

    max_constant_share: ClassVar[float] = 0.3
    """Frames in which one depth covers more of the image are renders that failed."""
    raw: str
    """Directory or URL that holds the ``ai_VVV_NNN`` directories."""
    colour: Literal["preview", "hdf5"] = "preview"
    """``preview``: the rendered JPEG; ``hdf5``: the linear colours, tone-mapped as officially."""
    split_csv: str | None = None
    """The official split table; by default looked for in ``raw``."""
    camera_csv: str | None = None
    """The official table of camera parameters; by default looked for in ``raw``."""

    def __post_init__(self) -> None:
        if self.colour not in ("preview", "hdf5"):
            raise UserError(f"colour: expected preview or hdf5, found {self.colour}")

    @property
    def dataset(self) -> str:
        return "hypersim"

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, 65504.0)  # all that float16 can hold: outdoor views reach far

    def list(self) -> Listing:
        """Find the frames.

        Warns if the split table is missing (``split`` is then "") and if scenes have no row in
        the camera table (their intrinsics are then assumed). Raises UserError if no frame is
        found or a named table does not exist.
        """
        read_cameras.cache_clear()  # the file may have been mended since the last listing
        tree = Tree(self.raw)
        split_url = _find_table(tree, self.split_csv, _SPLIT_CSV)
        camera_url = _find_table(tree, self.camera_csv, _CAMERA_CSV)
        official = None if split_url is None else _read_splits(split_url)
        if official is None:
            warnings.warn(f"{self.raw}: no {_SPLIT_CSV}, so no official split", stacklevel=2)
        cameras = {} if camera_url is None else read_cameras(camera_url)

        items, excluded, scenes = [], [], []
        for scene in (name for name in tree.dirs() if re.fullmatch(r"ai_\d{3}_\d{3}", name)):
            scenes.append(scene)
            shared = {"cameras": camera_url} if camera_url is not None and scene in cameras else {}
            for camera, frame, files in _find_frames(tree, scene, self._sources()):
                key = f"{scene}/{camera}/{frame}"
                split, reason = _judge(scene, camera, int(frame), official)
                missing = [role for role in self._sources() if role not in files]
                if reason is None and missing:
                    reason = f"no {' and no '.join(missing)} file"
                if reason is not None:
                    excluded.append((key, reason))
                    continue
                files = {role: tree.url(path) for role, path in files.items()}
                items.append(Item(key=key, scene=scene, files=files | shared, split=split))
        if not items and not excluded:
            raise tree.layout_error(_LAYOUT)
        if not items:
            key, reason = excluded[0]
            raise UserError(
                f"{self.raw}: none of the {len(excluded)} frames can be used;"
                f" the first is {key}: {reason}"
            )
        _warn_of_default_camera([scene for scene in scenes if scene not in cameras])
        return Listing(items=sort_items(items), excluded=tuple(sorted(excluded)))

    def read(self, item: Item) -> RawFrame:
        """Read one frame; the distances stay the source's float16, bit for bit."""
        [codes] = read_hdf5(item.files["depth"], ["dataset"])
        if codes.dtype != np.float16:
            raise BadFrame("depth is not float16", f"{item.files['depth']}: {codes.dtype}")
        picture = self._read_picture(item.files)
        check_same_size(picture, codes, item.key)
        camera = None
        if "cameras" in item.files:
            camera = np.array(read_cameras(item.files["cameras"])[item.scene])
        paths = {role: item.files[role] for role in ("image", "depth")}
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            depth=DepthCodes(codes=codes, quantity="distance"),
            K_px=_intrinsics(camera, picture.width, picture.height),
            split=item.split,
            meta={
                "camera": item.key.split("/")[1],
                "camera_assumed": camera is None,
                **relative_paths(Tree(self.raw), paths),
            },
        )

    def _sources(self) -> dict[str, tuple[str, str]]:
        """role -> (directory suffix, file suffix)."""
        sources = {"depth": ("geometry_hdf5", "depth_meters.hdf5")}
        if self.colour == "preview":
            return sources | {"image": ("final_preview", "tonemap.jpg")}
        return sources | {
            "image": ("final_hdf5", "color.hdf5"),
            "entities": ("geometry_hdf5", "render_entity_id.hdf5"),
        }

    def _read_picture(self, files: Mapping[str, str]) -> Picture:
        if self.colour == "preview":
            return read_image(files["image"])
        [colour] = read_hdf5(files["image"], ["dataset"])
        [entities] = read_hdf5(files["entities"], ["dataset"])
        if colour.shape != (*entities.shape, 3) or entities.ndim != 2:
            raise BadFrame(
                "colour and entity ids differ in size",
                f"{files['image']}: {colour.shape} and {entities.shape}",
            )
        if not (entities != -1).any():
            raise BadFrame("nothing was rendered", files["entities"])
        return encode_jpeg(tone_map(colour.astype(np.float32), entities))


def sensor_intrinsics(
    M_cam_from_uv: Float64[np.ndarray, "3 3"], width: int, height: int
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, "3 3"]]:
    """Intrinsics of a possibly tilted sensor, and the rotation that squares it with the axes.

    Hypersim gives rays as ``M_cam_from_uv @ (u', v', 1)`` with u' = 2u/W - 1 to the right and
    v' = 1 - 2v/H upwards, in a camera frame with y up and z backwards. Most scenes have a
    tilt-shift camera: the third row of M is not constant, so depth along that frame's axis is
    not what a pinhole camera calls z, and 1/z of a flat wall would not be affine in pixels.

    z along the *sensor normal* obeys that law. Let P be the 3x3 matrix from the camera frame
    (y down, z forwards) to homogeneous pixels, the inverse of
    ``diag(1, -1, -1) @ M_cam_from_uv @ ndc_from_px``. Its RQ factors ``P ~ K_px @ R`` are an
    upper-triangular K_px (Hartley & Zisserman, Multiple View Geometry, section 6.2.4) and a
    rotation R from Hypersim's camera frame into one whose z axis is the sensor normal. R only
    turns the frame: distances along rays, planes and angles are what they were.

    Args:
        M_cam_from_uv: (3, 3), from the table of camera parameters.
        width, height: of the image in pixels.

    Returns:
        K_px (3, 3), positive diagonal, ``K_px[2, 2] = 1``, pixel centres at integer + 0.5 (there
        is skew if the sensor is tilted about both axes); and R (3, 3), a proper rotation.
    """
    ndc_from_px = np.array([[2 / width, 0, -1], [0, -2 / height, 1], [0, 0, 1]])
    rays_from_px = np.diag([1.0, -1.0, -1.0]) @ M_cam_from_uv @ ndc_from_px
    K, R = _rq(np.linalg.inv(rays_from_px))
    return K / K[2, 2], R


def tone_map(
    colour: Float[np.ndarray, "h w 3"], entities: Integer[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Linear colours to sRGB-like bytes, as the official preview does.

    One exposure per image puts the 90th percentile of the brightness of rendered pixels at 0.8
    after gamma 1/2.2; an image darker than 1e-4 becomes black.

    Args:
        colour: (H, W, 3) linear radiance; NaN counts as 0.
        entities: (H, W) entity ids, -1 where nothing was rendered; not all of them.
    """
    gamma, target, percentile, darkest = 1 / 2.2, 0.8, 90, 1e-4
    colour = np.nan_to_num(colour.astype(np.float32), nan=0.0)
    brightness = colour[entities != -1] @ np.array([0.3, 0.59, 0.11], np.float32)
    current = float(np.percentile(brightness, percentile))
    exposure = 0.0 if current < darkest else target ** (1 / gamma) / current
    mapped = np.maximum(exposure * colour, 0) ** gamma
    return (np.clip(mapped, 0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=4)
def read_cameras(url: str) -> Mapping[str, tuple[tuple[float, ...], ...]]:
    """scene -> M_cam_from_uv, 3x3, from the official table. Raises UserError if it is damaged."""
    columns = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    cameras = {}
    for row in read_table(url, ["scene_name", *columns]):
        try:
            values = [float(row[column]) for column in columns]
            if not np.linalg.cond(np.array(values).reshape(3, 3)) < 1e9:
                raise ValueError("its matrix has no inverse")
        except ValueError as error:
            raise UserError(f"{url}: bad camera of {row['scene_name']!r:.40}: {error}") from error
        cameras[row["scene_name"]] = tuple(tuple(values[i : i + 3]) for i in (0, 3, 6))
    return cameras


def _rq(
    matrix: Float64[np.ndarray, "3 3"],
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, "3 3"]]:
    """``matrix = K @ R``: K upper triangular with positive diagonal, R orthogonal.

    QR factorises from the first column on; reversing the rows before and the result after makes
    it start at the last row instead.
    """
    Q, U = np.linalg.qr(matrix[::-1].T)
    K, R = U.T[::-1, ::-1], Q.T[::-1]
    signs = np.sign(np.diag(K))
    return K * signs, signs[:, None] * R


def _intrinsics(
    camera: Float64[np.ndarray, "3 3"] | None, width: int, height: int
) -> Float64[np.ndarray, "3 3"]:
    if camera is not None:
        return sensor_intrinsics(camera, width, height)[0]
    focal, full_width, full_height = _DEFAULT_CAMERA
    return pinhole(focal * width / full_width, focal * height / full_height, width / 2, height / 2)


_Official = Mapping[tuple[str, str, int], tuple[str, str]]


def _read_splits(url: str) -> _Official:
    """(scene, camera, frame) -> (partition, why it must not be used or "")."""
    columns = (
        "scene_name",
        "camera_name",
        "frame_id",
        "included_in_public_release",
        "exclude_reason",
        "split_partition_name",
    )
    official = {}
    for row in read_table(url, columns):
        if not re.fullmatch(r"\d{1,9}", row["frame_id"]):
            raise UserError(f"{url}: frame_id: expected a number, found {row['frame_id']!r:.40}")
        reason = row["exclude_reason"]
        if not reason and row["included_in_public_release"] != "True":
            reason = "not in the public release"
        key = (row["scene_name"], row["camera_name"], int(row["frame_id"]))
        official[key] = (row["split_partition_name"], reason)
    return official


def _judge(
    scene: str, camera: str, frame: int, official: _Official | None
) -> tuple[str, str | None]:
    """The official partition of a frame, and why it is excluded (None: it is not)."""
    if (scene, camera) in _BROKEN_CAMERAS:
        return "", "known to be broken: camera (ml-hypersim issue 22)"
    if (scene, frame) in _BROKEN_FRAMES:
        return "", "known to be broken: geometry missing (ml-hypersim issue 7)"
    if official is None:
        return "", None
    split, reason = official.get((scene, camera, frame), ("", "not in the official split table"))
    return split, reason or None


def _find_table(tree: Tree, given: str | None, name: str) -> str | None:
    if given is not None:
        return given
    found = (place + name for place in _TABLE_DIRS if tree.is_file(place + name))
    path = next(found, None)
    return None if path is None else tree.url(path)


def _find_frames(
    tree: Tree, scene: str, sources: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(camera, frame, role -> path) for every frame that has a depth or an image file."""
    dirs = tree.dirs(f"{scene}/images")
    for camera in _cameras_in(dirs):
        frames: dict[str, dict[str, str]] = {}
        for role, (dir_suffix, file_suffix) in sources.items():
            directory = f"{scene}/images/scene_{camera}_{dir_suffix}"
            pattern = re.compile(rf"frame\.(\d+)\.{re.escape(file_suffix)}")
            for name in tree.files(directory):
                match = pattern.fullmatch(name)
                if match:
                    frames.setdefault(match[1], {})[role] = f"{directory}/{name}"
        for frame, files in sorted(frames.items()):
            if "depth" in files or "image" in files:
                yield camera, frame, files


def _cameras_in(dirs: Iterable[str]) -> list[str]:
    matches = (re.match(r"scene_(cam_\d+)_", name) for name in dirs)
    return sorted({match[1] for match in matches if match})


def _warn_of_default_camera(scenes: list[str]) -> None:
    if scenes:
        focal, width, height = _DEFAULT_CAMERA
        warnings.warn(
            f"no row in {_CAMERA_CSV} for {', '.join(scenes)}: assuming a focal length of {focal}"
            f" pixels at {width}x{height}; many scenes differ, so get the table",
            stacklevel=3,
        )
