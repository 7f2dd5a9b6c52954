"""Virtual KITTI 2 (Cabon et al., 2020): synthetic streets, 16-bit PNG depth in centimetres."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    Tree,
    check_same_size,
    pinhole,
    read_depth_image,
    read_image,
    read_table,
    relative_paths,
    sort_items,
)
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import DepthCodes, RawFrame

_SKY = 65535
_COLUMNS = ("frame", "cameraID", "K[0,0]", "K[1,1]", "K[0,2]", "K[1,2]")
_PUBLISHED = (725.0087, 725.0087, 620.5, 187.0)
_PUBLISHED_SIZE = (1242, 375)
_LAYOUT = (
    "SceneXX/<variant>/frames/rgb/Camera_Y/rgb_NNNNN.jpg, in the directory itself or in"
    " vkitti_2.0.3_rgb/ (with vkitti_2.0.3_depth/ and vkitti_2.0.3_textgt/ beside it)"
)


@dataclass(frozen=True, slots=True)
class VKitti2Reader:
    """Virtual KITTI 2 frames with per-frame intrinsics.

    All variants (weather, angle) and both cameras of ``SceneXX`` show the same streets, so the
    scene is the unit of every split. There is no official partition.

    ``intrinsic.txt`` counts pixel centres at integers: its cx = 620.5 and cy = 187 are the middle
    of 1242x375 pixels, (W - 1)/2 and (H - 1)/2. Both get +0.5 here. Where the file is missing, the
    published values are taken, which are the same for all frames.
    """

    raw: str
    """Directory or URL with the ``SceneXX`` directories or the unpacked archives."""
    variants: str = ""
    """Comma-separated variants to keep (``clone,fog``); empty: all."""
    cameras: str = ""
    """Comma-separated cameras to keep (``0`` or ``0,1``); empty: all."""

    @property
    def dataset(self) -> str:
        return "vkitti2"

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, 655.34)

    def list(self) -> Listing:
        """Find the frames. Warns if intrinsics are missing. Raises UserError if there are none."""
        _read_intrinsics.cache_clear()  # the file may have been mended since the last listing
        tree = Tree(self.raw)
        rgb, depth, text = (_part(tree, part) for part in ("rgb", "depth", "textgt"))
        places = [
            (scene, variant, camera.removeprefix("Camera_"))
            for scene in tree.dirs(rgb)
            if re.fullmatch(r"Scene\d+", scene)
            for variant in tree.dirs(f"{rgb}{scene}")
            for camera in tree.dirs(f"{rgb}{scene}/{variant}/frames/rgb")
        ]
        if not places:
            raise tree.layout_error(_LAYOUT)
        variants = _choose("variants", self.variants, {variant for _, variant, _ in places})
        cameras = _choose("cameras", self.cameras, {camera for _, _, camera in places})

        items, excluded = [], []
        for scene, variant, camera in places:
            if variant not in variants or camera not in cameras:
                continue
            intrinsics = f"{text}{scene}/{variant}/intrinsic.txt"
            stated = {"intrinsics": tree.url(intrinsics)} if tree.is_file(intrinsics) else {}
            rgb_dir = f"{rgb}{scene}/{variant}/frames/rgb/Camera_{camera}"
            depth_dir = f"{depth}{scene}/{variant}/frames/depth/Camera_{camera}"
            images = _numbered(tree.files(rgb_dir), r"rgb_(\d+)\.jpg")
            depths = _numbered(tree.files(depth_dir), r"depth_(\d+)\.png")
            for number in sorted(images.keys() | depths.keys()):
                key = f"{scene}/{variant}/Camera_{camera}/{number}"
                if number not in images or number not in depths:
                    role = "image" if number not in images else "depth"
                    excluded.append((key, f"no {role} file"))
                    continue
                files = {
                    "image": tree.url(f"{rgb_dir}/{images[number]}"),
                    "depth": tree.url(f"{depth_dir}/{depths[number]}"),
                    **stated,
                }
                items.append(Item(key=key, scene=scene, files=files))
        if not items:
            raise tree.layout_error(f"depth beside the images: {_LAYOUT}")
        if unstated := sum("intrinsics" not in item.files for item in items):
            warnings.warn(
                f"{self.raw}: {unstated} frames without intrinsic.txt (vkitti_2.0.3_textgt.tar)"
                " get the published intrinsics: fx = fy = 725.0087, cx = 620.5, cy = 187",
                stacklevel=2,
            )
        return Listing(items=sort_items(items), excluded=tuple(sorted(excluded)))

    def read(self, item: Item) -> RawFrame:
        """Read one frame; depth stays in centimetres with 65535 for the sky."""
        picture = read_image(item.files["image"])
        codes = read_depth_image(item.files["depth"])
        if codes.dtype != np.uint16:
            raise BadFrame("depth is not 16-bit", item.files["depth"])
        check_same_size(picture, codes, item.key)
        _, variant, camera, _ = item.key.split("/")
        fx, fy, cx, cy = _row(item, (picture.width, picture.height))
        paths = {role: item.files[role] for role in ("image", "depth")}
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            depth=DepthCodes(codes=codes, scale_m=0.01, sky=_SKY),
            K_px=pinhole(fx, fy, cx + 0.5, cy + 0.5),
            split=item.split,
            meta={"camera": camera, "variant": variant, **relative_paths(Tree(self.raw), paths)},
        )


def _row(item: Item, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy of a frame of this width and height, for pixel centres at integers."""
    if "intrinsics" not in item.files:
        if size != _PUBLISHED_SIZE:
            detail = f"{item.key} has {size}, the published ones are for {_PUBLISHED_SIZE}"
            raise BadFrame("no intrinsics", detail)
        return _PUBLISHED
    _, _, camera, number = item.key.split("/")
    row = _read_intrinsics(item.files["intrinsics"]).get(
        (int(number), int(camera.removeprefix("Camera_")))
    )
    if row is None:
        raise BadFrame("no intrinsics", f"{item.key} is not in {item.files['intrinsics']}")
    return row


def _part(tree: Tree, part: str) -> str:
    """The prefix of the paths of one archive: its own directory if there is one."""
    own = [name for name in tree.dirs() if re.fullmatch(rf"vkitti_[\d.]+_{part}", name)]
    return f"{own[-1]}/" if own else ""


def _choose(option: str, wanted: str, found: set[str]) -> set[str]:
    if not wanted:
        return found
    names = {name.strip() for name in wanted.split(",")}
    if not names <= found:
        raise UserError(
            f"{option}: no {', '.join(sorted(names - found))}; found {', '.join(sorted(found))}"
        )
    return names


def _numbered(names: list[str], pattern: str) -> dict[str, str]:
    matches = (re.fullmatch(pattern, name) for name in names)
    return {match[1]: match[0] for match in matches if match}


@lru_cache(maxsize=128)
def _read_intrinsics(url: str) -> Mapping[tuple[int, int], tuple[float, float, float, float]]:
    """(frame, camera) -> fx, fy, cx, cy as written in ``intrinsic.txt``."""
    intrinsics = {}
    for row in read_table(url, _COLUMNS, delimiter=" "):
        try:
            frame, camera = int(row["frame"]), int(row["cameraID"])
            fx, fy, cx, cy = (float(row[column]) for column in _COLUMNS[2:])
        except ValueError as error:
            raise UserError(f"{url}: bad row {list(row.values())!r:.200}: {error}") from error
        intrinsics[frame, camera] = (fx, fy, cx, cy)
    return intrinsics
