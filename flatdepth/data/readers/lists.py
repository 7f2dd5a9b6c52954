"""RGB-D frames named by a text file, as Depth Anything V2's metric training has them."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flatdepth.data.readers.base import Listing
from flatdepth.data.readers.files import Tree, read_bytes, sort_items
from flatdepth.data.readers.folder import FolderReader
from flatdepth.errors import BadFrame, UserError


@dataclass(frozen=True, slots=True)
class ListReader(FolderReader):
    """RGB-D frames of a list: ``image depth [focal]`` per line, separated by spaces.

    The focal length is in pixels, with the principal point in the middle of the image; it counts
    where no ``intrinsics`` are given. Files and the other options are as for ``folder``. Lines with
    ``None`` for the depth (KITTI) are excluded.
    """

    raw: str
    """Directory or URL that the paths of the list start from, with a leading slash or without."""
    file: str = field(kw_only=True)
    """Path or URL of the list; its place may also be right behind the command."""
    split: Literal["name", "train", "val", "test", "none"] = field(default="name", kw_only=True)
    """Partition of its frames; ``name``: the one that the name of the list has in it, if any."""

    listed_root: str = field(default="", kw_only=True)
    """What the list has in place of ``raw`` at the start of its paths."""

    image_glob: str = field(default="", init=False)
    depth_glob: str = field(default="", init=False)
    intrinsics_glob: str = field(default="", init=False)
    mask_glob: str = field(default="", init=False)
    region_glob: str = field(default="", init=False)
    polygon_glob: str = field(default="", init=False)
    plane_glob: str = field(default="", init=False)
    planes: Literal["auto", "none", "fit", "file"] = field(default="auto", init=False)
    art_planes: Literal["inside", "ring"] = field(default="inside", init=False)
    bad_planes: Literal["ignore", "skip"] = field(default="ignore", init=False)
    pair_within_s: float = field(default=0.0, init=False)
    pair_alone: bool = field(default=False, init=False)

    def list(self) -> Listing:
        """Find the frames. Warns if the field of view is assumed.

        Raises UserError if the list is unreadable, a line is none, or there are no frames.
        """
        try:
            text = read_bytes(self.file).decode("utf-8-sig")
        except (BadFrame, UnicodeDecodeError) as error:
            raise UserError(f"{self.file}: no list of images and depth files ({error})") from error
        named = re.search("train|val|test", self.file.rpartition("/")[2])
        splits = {"name": named[0] if named else "", "none": ""}
        split = splits.get(self.split, self.split)
        tree = Tree(self.raw)
        items, excluded = [], []
        for line in dict.fromkeys(text.splitlines()):
            if not line.strip():
                continue
            image, depth, focal_px = self._parse(line)
            if depth == "None":
                excluded.append((image, "no depth file"))
            else:
                item = self._item(tree, image=image, depth=depth)
                items.append(replace(item, split=split, focal_px=focal_px))
        if not items:
            raise UserError(f"{self.file}: expected lines of image and depth file, found none")
        sorted_items = sort_items(items)
        self._look_at_camera(sorted_items)
        return Listing(items=sorted_items, excluded=tuple(sorted(excluded)))

    def _parse(self, line: str) -> tuple[str, str, float]:
        """Image and depth below ``raw``, and the focal length in pixels, 0 if there is none."""
        root = self.listed_root or f"{Path(self.raw).absolute()}/"
        try:
            words = line.split()
            image, depth, focal_px = words if len(words) == 3 else [*words, "0"]
            image, depth = (path.removeprefix(root).lstrip("/") for path in (image, depth))
            if not (image and depth and 0 <= float(focal_px) < math.inf):
                raise ValueError
        except ValueError as error:
            raise UserError(
                f"{self.file}: expected image, depth and, if known, a focal length in pixels, found"
                f" {line!r}"
            ) from error
        return image, depth, float(focal_px)
