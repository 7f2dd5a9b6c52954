"""Any RGB-D frames that lie in files: one image and one depth file per frame."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from numpy.typing import NDArray

from flatdepth.data.readers.arrays import read_array, read_depth_array
from flatdepth.data.readers.base import MOST_OUTSIDE, Item, Listing, out_of_range
from flatdepth.data.readers.files import (
    OTHER_IMAGES,
    Picture,
    Tree,
    check_same_size,
    ending,
    fit_picture,
    grey_maximum,
    make_key,
    pinhole,
    read_image,
    read_intrinsics,
    read_rgba_floats,
    relative_paths,
    sort_items,
    warn_of_unread,
)
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import camera_trouble, focal_from_mm, off_centre, sensor_sides
from flatdepth.types import DepthCodes, RawFrame, Region

_NONE = -1
_ASSUMED_FOV_DEG = 60.0
_DIRECTORIES = r"(?:(?<=/)|^)\*\*/"
_WITHIN_NAME = r"\*+|\?|\[!?[^\]/]+\]"
_WILDCARDS = re.compile(f"{_DIRECTORIES}|(?:{_WITHIN_NAME})+")


@dataclass(frozen=True, slots=True)
class FolderReader:
    """RGB-D frames found by two patterns.

    An image and a depth file belong together if their wildcards stand for the same text, each
    run of wildcards for itself: ``color/*.png`` with ``depth/*.pgm`` pairs ``color/12.png`` with
    ``depth/12.pgm`` and not with ``depth/112.pgm``; ``*/rgb/*.png`` goes with ``*/depth/*.png``,
    and ``*.png`` with ``*_depth.png`` (what the depth pattern matches is never an image).
    ``*``, ``?`` and ``[...]`` stay within one directory, ``**/`` is any number of directories.

    Depth files are 16-bit PNG, PGM or TIFF, float32 TIFF or PFM, ``.npy``, ``.npz``, ``.h5``,
    ``.hdf5`` or ``.exr``. 16-bit codes are kept bit for bit, integers that fit 16 bits too; float32
    and float64 become logarithmic 16-bit codes. In those what is not above 0 is unknown, and so
    are up to 1 % of the pixels if they lie outside of ``depth_range``.

    An image that its EXIF data rotate is kept as it is stored if the depth has the proportions of
    that, and turned upright (and encoded anew as JPEG) if it has those of the upright image; the
    intrinsics are those of the depth then. Where both are the same, as for half a turn, a mirror
    or a square, the frame is left out.
    """

    raw: str
    """Directory or URL that the patterns start from."""
    image_glob: str
    """Pattern of the colour images, such as ``color/*.png``."""
    depth_glob: str
    """Pattern of the depth files, such as ``depth/*.png``."""
    depth_scale: float
    """Metres per unit of depth: 0.001 for millimetres, 0.0002 for TUM files, 1 for metres."""
    pair_within_s: float = 0.0
    """Where the last wildcard stands for the time of a file in seconds (TUM): pair images with the
    depth (and the intrinsics) nearest in time, this far away at most; 0: by equal names."""
    pair_alone: bool = False
    """Pair an image and a depth file, whatever their last wildcards stand for, if there are no
    others with the same text for the wildcards before (SUN RGB-D: one of each per directory)."""
    hole: int = 0
    """The depth code that means "unknown"; -1: there is none. NaN is always unknown."""
    sky: int = _NONE
    """The depth code that means "sky or beyond range"; -1: there is none. In float files all that
    is not below it (TartanAir)."""
    depth_bits: Literal["plain", "rotated", "rgba"] = "plain"
    """``rotated``: 16-bit codes are rotated left by 3 bits (SUN RGB-D); ``rgba``: the channels of
    a PNG are the bytes of a float32 (TartanAir V2)."""
    depth_8bit: bool = False
    """Take depth of 8 bits too, which most often is a drawing of depth."""
    mask_glob: str = ""
    """Pattern of masks that say where depth is valid: grey images, ``.npy`` or ``.npz``. Its
    wildcards stand for the same text as the first ones of the depth files, so a mask is for a
    frame, for a scene, or without wildcards for all. Depth without a mask is excluded."""
    mask_min: float = 1.0
    """Mask values from this one on are valid: 1 is all but 0; 2 is ARKit's high confidence."""
    region_glob: str = ""
    """Pattern of region maps that say where mirrors and pictures are: grey images of the depth's
    size whose numbers ``region_names`` explains. Wildcards as for ``mask_glob``; a frame without a
    map is packed as one of which nothing is known."""
    region_names: str = "1:mirror,2:art,3:frame,4:decoy"
    """What the numbers of region maps mean: ``mirror``, ``art`` (screens too), ``frame`` or
    ``decoy`` (openings); 0 is background, and so is what is left out here."""
    quantity: Literal["z", "distance"] = "z"
    """``z``: depth along the optical axis; ``distance``: distance to the optical centre."""
    intrinsics: tuple[float, ...] = ()
    """fx, fy, cx, cy in pixels, cx and cy for pixel centres at integers (OpenCV, TUM)."""
    half_pixel_centres: bool = False
    """cx and cy are for pixel centres at integer + 0.5 (the image's corner is 0, 0)."""
    intrinsics_glob: str = ""
    """Pattern of text files with intrinsics in place of ``intrinsics``, such as
    ``*/intrinsic/intrinsic_depth.txt``. Its wildcards stand for the same text as the first ones of
    the images, so a file is for a frame, for a scene, or without wildcards for all. It has 4
    numbers (fx fy cx cy), 6 (width and height before them), 11 (with distortion, ignored), a matrix
    of 3x3, 3x4 or 4x4, or JSON with such values (Record3D, Replica, Open3D)."""
    fov_deg: float = 0.0
    """Horizontal field of view in degrees, in place of ``intrinsics``; 0: unknown, 60 assumed."""
    focal_mm: float = 0.0
    """Focal length in millimetres, in place of ``intrinsics``; needs ``sensor_mm``."""
    sensor_mm: str = ""
    """Width and height of the sensor in millimetres, such as 36x24, or its width alone."""
    unusual_camera: bool = False
    """Take intrinsics of any field of view and any ratio of fx and fy."""
    resize_images: bool = False
    """Images of another size than their depth are resized to it (and encoded anew as JPEG), where
    the proportions agree to 2 %."""
    intrinsics_of: Literal["depth", "image"] = "depth"
    """With ``resize_images``: which of the two sizes the intrinsics are for."""
    image_bits: int = 16
    """Bits of 16-bit grey images: 12 for sensors that write 0 to 4095. Such images are encoded
    anew as JPEG, and refused if a value has more bits."""
    scene_from: str = "parent"
    """What is a scene, the unit of splits: ``parent`` (an image's directory), a number n (its
    first n directories), ``file`` (each frame), ``dataset`` (all frames), or a pattern: the start
    of the path that it matches, so that KITTI's ``*/*_drive_*/`` has both eyes in one scene."""
    depth_array: str = "depth"
    """Name of the depth array in ``.h5`` files and in ``.npz`` files with several, and of the
    channel in ``.exr`` files (else Z, V, Y, R or the only one)."""
    depth_range: tuple[float, float] = (0.05, 200.0)
    """Depths in metres outside of this range show a mistake; packing skips frames with more than
    1 % of them."""
    dataset: str = "folder"
    """Short name of the data set."""

    def __post_init__(self) -> None:
        images, depths = (len(_wildcards(g)) for g in (self.image_glob, self.depth_glob))
        low, high = self.depth_range
        for good, message in (
            (
                images == depths,
                "image_glob and depth_glob: expected as many runs of wildcards in both, found"
                f" {images} in {self.image_glob} and {depths} in {self.depth_glob}",
            ),
            (
                not self.image_glob or self.image_glob != self.depth_glob,
                f"image_glob and depth_glob are both {self.image_glob}",
            ),
            (
                1e-9 <= self.depth_scale <= 1e6,
                f"depth_scale: expected metres per unit, 1e-9 to 1e6, found {self.depth_scale}",
            ),
            (
                self.quantity in ("z", "distance"),
                f"quantity: expected z or distance, found {self.quantity}",
            ),
            (
                len(self.intrinsics) in (0, 4),
                f"intrinsics: expected fx,fy,cx,cy, found {len(self.intrinsics)} numbers",
            ),
            (
                all(focal > 0 for focal in self.intrinsics[:2]),
                f"intrinsics: expected fx and fy above 0, found {self.intrinsics[:2]}",
            ),
            (
                len(self._cameras_given()) < 2,
                f"{' and '.join(self._cameras_given())} are both given: leave one of them out",
            ),
            (
                len(_wildcards(self.intrinsics_glob)) <= images,
                f"intrinsics_glob: expected at most the {images} runs of wildcards of image_glob,"
                f" found {self.intrinsics_glob}",
            ),
            (
                len(_wildcards(self.mask_glob)) <= depths,
                f"mask_glob: expected at most the {depths} runs of wildcards of depth_glob,"
                f" found {self.mask_glob}",
            ),
            (
                len(_wildcards(self.region_glob)) <= depths,
                f"region_glob: expected at most the {depths} runs of wildcards of depth_glob,"
                f" found {self.region_glob}",
            ),
            (
                8 <= self.image_bits <= 16,
                f"image_bits: expected 8 to 16, found {self.image_bits}",
            ),
            (
                0 <= self.pair_within_s <= 1e6,
                f"pair_within_s: expected 0 to 1e6, got {self.pair_within_s}",
            ),
            (0 <= self.fov_deg < 180, f"fov_deg: expected 0 to 180, found {self.fov_deg}"),
            (
                0 <= low < high <= 1e6,
                f"depth_range: expected 0 <= low < high <= 1e6, found {low}, {high}",
            ),
            (
                self.scene_from in ("parent", "file", "dataset")
                or self.scene_from.isdecimal()
                or bool(_wildcards(self.scene_from)),
                "scene_from: expected parent, file, dataset or a number, or a pattern with"
                f" wildcards, found {self.scene_from}",
            ),
            (
                0 <= self.focal_mm <= 1e5 and bool(self.focal_mm) == bool(self.sensor_mm),
                "focal_mm and sensor_mm: expected both, above 0, such as 18 and 36x24, found"
                f" {self.focal_mm:g} and {self.sensor_mm or 'nothing'}",
            ),
        ):
            if not good:
                raise UserError(message)
        if self.sensor_mm:
            sensor_sides(self.sensor_mm)
        _region_table(self.region_names)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return self.depth_range

    def list(self) -> Listing:
        """Find the frames. Warns of what is assumed, looks wrong or is not read.

        Files without a partner are excluded. Raises UserError if no image has one.
        """
        tree = Tree(self.raw)
        paths = list(tree.walk())
        masks, regions = (_match(glob, paths) for glob in (self.mask_glob, self.region_glob))
        beside = {*masks.values(), *regions.values()}
        depths = _match(self.depth_glob, set(paths).difference(beside))
        mask_of = _by_depth(depths, masks, self.mask_glob)
        region_of = _by_depth(depths, regions, self.region_glob)
        images = _match(self.image_glob, set(paths).difference(depths.values(), beside))
        if self.pair_alone:
            depths = _alone(images, depths)
        if self.pair_within_s > 0:
            depths = _in_time(images, depths, self.pair_within_s)
        both = images.keys() & depths.keys()
        if not both:
            raise tree.layout_error(
                f"images {self.image_glob} with depth {self.depth_glob}"
                f" (matched {len(images)} and {len(depths)} files, no pair; patterns start from"
                " --raw, and their wildcards must stand for the same text in both, or for times"
                " with --pair_within_s)"
            )
        cameras: dict[tuple[str, ...], str] = {(): ""}
        if self.intrinsics_glob:
            cameras = _match(self.intrinsics_glob, paths)
        shared = len(_wildcards(self.intrinsics_glob))
        if self.pair_within_s > 0 and shared == len(_wildcards(self.image_glob)):
            cameras = _in_time(images, cameras, self.pair_within_s)
        without = {parts for parts in both if parts[:shared] not in cameras}
        if without == both:
            raise tree.layout_error(
                f"intrinsics {self.intrinsics_glob} for images {self.image_glob} (matched"
                f" {len(cameras)} files, none for an image; the wildcards must stand for the same"
                " text as the first ones of the images)"
            )
        unmasked = {parts for parts in both if self.mask_glob and depths[parts] not in mask_of}
        if unmasked == both:
            raise tree.layout_error(
                f"masks {self.mask_glob} for depth files {self.depth_glob} (matched {len(masks)}"
                " files, none for a depth file; the wildcards must stand for the same text as the"
                " first ones of the depth files)"
            )
        items = sort_items(
            self._item(
                tree,
                image=images[parts],
                depth=depths[parts],
                mask=mask_of.get(depths[parts], ""),
                region=region_of.get(depths[parts], ""),
                intrinsics=cameras[parts[:shared]],
            )
            for parts in both - without - unmasked
        )
        self._warn(paths, items, {*images.values(), *depths.values(), *beside})
        self._look_at_camera(items)
        excluded = [(images[parts], "no file of intrinsics") for parts in without]
        excluded += [(images[parts], "no mask file") for parts in unmasked - without]
        excluded += [(images[parts], "no depth file") for parts in images.keys() - both]
        excluded += [(depths[parts], "no image file") for parts in depths.keys() - both]
        return Listing(items=items, excluded=tuple(sorted(excluded)))

    def read(self, item: Item) -> RawFrame:
        """Read one frame."""
        url = item.files["depth"]
        codes = self._codes(url)
        picture = stored = read_image(item.files["image"], codes.shape, self.image_bits)
        if self.resize_images:
            picture = fit_picture(picture, *codes.shape)
        fix = "; --resize_images true brings images to the depth's size"
        check_same_size(picture, codes, url, fix)
        meta: dict[str, object] = {
            "intrinsics_assumed": not (self._cameras_given() or item.focal_px)
        }
        if picture.turned_from != 1:
            meta["image_turned_from_orientation"] = picture.turned_from
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            depth=self._with_meaning(codes, self._valid(item.files.get("mask"), codes), url),
            K_px=self._intrinsics(item, picture, stored),
            split=item.split,
            meta=meta | relative_paths(Tree(self.raw), item.files),
            region=self._region(item.files.get("region")),
        )

    def _cameras_given(self) -> Sequence[str]:
        names = ("intrinsics", "intrinsics_glob", "fov_deg", "focal_mm")
        return [name for name in names if getattr(self, name)]

    def _look_at_camera(self, items: Sequence[Item]) -> None:
        """Say what is odd about the first frame's camera, before anything is packed.

        Raises UserError if the options give one that cannot be.
        """
        if not self._cameras_given() and not all(item.focal_px for item in items):
            warnings.warn(
                f"{self.raw}: neither intrinsics nor fov_deg given, assuming a horizontal field"
                f" of view of {_ASSUMED_FOV_DEG:g} degrees",
                stacklevel=3,
            )
        try:
            frame = self.read(items[0])
        except BadFrame:
            return  # packing lists it
        assert frame.K_px is not None
        trouble = camera_trouble(frame.K_px, frame.height, frame.width)
        of_options = not (self.intrinsics_glob or items[0].focal_px)
        if trouble and of_options and not self.unusual_camera:
            raise UserError(f"{', '.join(self._cameras_given())}: {trouble}")
        if remark := off_centre(frame.K_px, frame.height, frame.width):
            warnings.warn(f"{self.raw}: {remark}", stacklevel=3)

    def _item(self, tree: Tree, image: str, **others: str) -> Item:
        paths = {"image": image, **others}
        files = {role: tree.url(path) for role, path in paths.items() if path}
        return Item(key=make_key(image), scene=self._scene(image), files=files)

    def _warn(self, paths: Sequence[str], items: Sequence[Item], matched: Set[str]) -> None:
        """Of steps that are coarse, of grey that is dim, and of images in other formats."""
        warn_of_unread(
            self.raw,
            [path for path in paths if ending(path) in OTHER_IMAGES and path not in matched],
        )
        if self.depth_8bit:
            step = f"{self.depth_scale:g}"
            warnings.warn(
                f"depth_8bit: 8-bit depth comes in steps of {step} m, up to"
                f" {255 * self.depth_scale:g} m, at the depth_scale of {step}",
                stacklevel=3,
            )
        if not items or self.image_bits < 16:
            return
        with suppress(BadFrame):  # packing will name it
            largest = grey_maximum(items[len(items) // 2].files["image"])
            if 0 < largest < 4096:
                warnings.warn(
                    f"{self.raw}: a 16-bit grey image has values up to {largest} only, and will be"
                    f" nearly black; if they have {10 if largest < 1024 else 12} bits, give"
                    " --image_bits",
                    stacklevel=3,
                )

    def _scene(self, image: str) -> str:
        directories = make_key(image).split("/")[:-1]
        if _wildcards(self.scene_from):
            start = re.match(_regex(self.scene_from), image)
            if start is None:
                raise UserError(f"scene_from: {self.scene_from} is no start of {image}")
            directories = [make_key(image)[: start.end()].rstrip("/")]
        elif self.scene_from == "file":
            return make_key(image)
        elif self.scene_from == "dataset":
            directories = []
        elif self.scene_from != "parent":
            directories = directories[: int(self.scene_from)]
        return "/".join(directories) or self.dataset

    def _codes(self, url: str) -> NDArray[Any]:
        """The codes of a depth file, their bits in order."""
        if self.depth_bits == "rgba":
            return read_rgba_floats(url)
        codes = read_depth_array(url, self.depth_array, self.depth_8bit)
        if self.depth_bits == "plain":
            return codes
        if codes.dtype != np.uint16:
            raise BadFrame("depth is not 16-bit", f"{url}: {codes.dtype}")
        return (codes >> 3) | (codes << 13)

    def _valid(self, mask_url: str | None, codes: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Where the mask of a depth map says that it is valid; None if it has no mask."""
        if mask_url is None:
            return None
        mask = read_array(mask_url, self.depth_array, role="mask")
        if mask.shape != codes.shape:
            sizes = f"{mask_url}: mask of shape {mask.shape}, depth of shape {codes.shape}"
            raise BadFrame("mask and depth differ in size", sizes)
        return mask >= self.mask_min

    def _region(self, url: str | None) -> NDArray[np.uint8] | None:
        """The region map of a frame in numbers of ``Region``; None if it has none."""
        if url is None:
            return None
        numbers = read_array(url, self.depth_array, role="regions")
        if numbers.dtype != np.uint8:
            raise BadFrame("regions are not 8-bit", f"{url}: {numbers.dtype}")
        return _region_table(self.region_names)[numbers]

    def _with_meaning(
        self, codes: NDArray[Any], valid: NDArray[np.bool_] | None, url: str
    ) -> DepthCodes:
        hole, sky = (None if code == _NONE else code for code in (self.hole, self.sky))
        if codes.dtype not in (np.uint16, np.float16, np.float32, np.float64):
            raise BadFrame("depth is neither 16-bit nor float", f"{url}: {codes.dtype}")
        if valid is not None:
            codes, hole = _mask_out(codes, valid, hole, sky)
        if codes.dtype in (np.uint16, np.float16):
            return DepthCodes(
                codes=codes, quantity=self.quantity, scale_m=self.depth_scale, hole=hole, sky=sky
            )
        with np.errstate(all="ignore"):
            metres = codes.astype(np.float64) * self.depth_scale  # no overflow, which would be sky
        metres[metres <= 0] = np.nan
        if hole is not None:
            metres[codes == hole] = np.nan
        if sky is not None:
            metres[codes >= sky] = np.inf
        low, high = self.depth_range
        known = np.isfinite(metres)
        outside = known & ((metres <= low) | (metres > high))
        if outside.sum() > MOST_OUTSIDE * known.sum():
            raise out_of_range(metres[known], self.depth_range)
        metres[outside] = np.nan
        logarithmic = encode_log_u16(
            metres.astype(np.float32), near_m=min(0.1, max(low, 1e-3)), far_m=max(1e3, high)
        )
        return DepthCodes(
            codes=logarithmic.codes,
            quantity=self.quantity,
            hole=logarithmic.hole,
            sky=logarithmic.sky,
            log_range_m=logarithmic.log_range_m,
        )

    def _intrinsics(
        self, item: Item, picture: Picture, stored: Picture
    ) -> Float64[np.ndarray, "3 3"]:
        """Those of ``picture``, which is ``stored`` or was made of it by resizing."""
        url = item.files.get("intrinsics")
        of = stored if self.intrinsics_of == "image" else picture
        shift = 0.0 if self.half_pixel_centres else 0.5
        if url or self.intrinsics:
            K_px = read_intrinsics(url, of.width, of.height) if url else pinhole(*self.intrinsics)
            K_px[:2, 2] += shift
        else:
            focal = item.focal_px or self._focal(of)
            K_px = pinhole(focal, focal, of.width / 2, of.height / 2)
        if not (0 < K_px[0, 2] < of.width and 0 < K_px[1, 2] < of.height):
            cx, cy = (K_px[:2, 2] - shift).tolist()
            fix = f"see {url}" if url else "give --intrinsics of this size"
            raise BadFrame(
                "principal point outside of the image",
                f"cx {cx:g}, cy {cy:g} in {of.width}x{of.height}; {fix}",
            )
        K_px[:2] *= [[picture.width / of.width], [picture.height / of.height]]
        return K_px

    def _focal(self, of: Picture) -> float:
        if self.focal_mm:
            return focal_from_mm(self.focal_mm, self.sensor_mm, of.height, of.width)
        fov = math.radians(self.fov_deg or _ASSUMED_FOV_DEG)
        return of.width / 2 / math.tan(fov / 2)


def _by_depth(
    depths: Mapping[tuple[str, ...], str], others: Mapping[tuple[str, ...], str], glob: str
) -> dict[str, str]:
    """depth file -> the file of a pattern whose wildcards stand for the first ones of the depth."""
    runs = len(_wildcards(glob))
    return {
        depth: others[parts[:runs]] for parts, depth in depths.items() if parts[:runs] in others
    }


def _region_table(names: str) -> UInt8[np.ndarray, " 256"]:
    """The ``Region`` of every number in a map. Raises UserError if ``names`` does not say it."""
    table = np.zeros(256, np.uint8)
    for entry in names.split(","):
        number, _, name = entry.strip().partition(":")
        if (
            not number.isdecimal()
            or int(number[:4]) > 255
            or name.upper() not in Region.__members__
        ):
            known = ", ".join(region.name.lower() for region in Region)
            raise UserError(
                f"region_names: expected number:name, such as 1:mirror,2:art, with numbers of 0 to"
                f" 255 and names of {known}, found {entry.strip()!r}"
            )
        table[int(number)] = Region[name.upper()]
    return table


def _mask_out(
    codes: NDArray[Any], valid: NDArray[np.bool_], hole: int | None, sky: int | None
) -> tuple[NDArray[Any], int | None]:
    """Depth that is unknown outside of a mask, and the code that means so: a free one if need be.

    Raises BadFrame if 16-bit codes have no such code and none is free.
    """
    if codes.dtype.kind == "f":
        return np.where(valid, codes, codes.dtype.type(np.nan)), hole
    if hole is None or not 0 <= hole < 65536:
        used = np.bincount(codes[valid], minlength=65536)
        if sky is not None and 0 <= sky < 65536:
            used[sky] += 1
        if used.all():
            raise BadFrame("no code is free for masked pixels", "each of the 65536 means a depth")
        hole = int(used.argmin())
    return np.where(valid, codes, np.uint16(hole)), hole


def _wildcards(glob: str) -> Sequence[str]:
    """The runs of wildcards of a pattern; each ``**/`` stands alone."""
    return _WILDCARDS.findall(glob)


def _match(glob: str, paths: Collection[str]) -> dict[tuple[str, ...], str]:
    """What each run of wildcards stands for -> path.

    The pattern's other text is fixed, so different paths never have the same parts.
    """
    pattern = _regex(glob)
    matches = (re.fullmatch(pattern, path) for path in paths)
    return {match.groups(): match[0] for match in matches if match}


def _regex(glob: str) -> str:
    """A pattern as a regular expression with a group for each run of wildcards."""
    literals = _WILDCARDS.split(glob)
    runs = [f"({_translate(run)})" for run in _wildcards(glob)]
    pattern = re.escape(literals[0])
    for run, literal in zip(runs, literals[1:], strict=True):
        pattern += run + re.escape(literal)
    return pattern


def _alone(
    images: Mapping[tuple[str, ...], str], depths: Mapping[tuple[str, ...], str]
) -> dict[tuple[str, ...], str]:
    """The depth files under the parts of the images that they are alone with, or their own."""
    counts = [Counter(parts[:-1] for parts in files) for files in (images, depths)]
    image_of = {parts[:-1]: parts for parts in images}
    return {
        image_of[parts[:-1]] if all(n[parts[:-1]] == 1 for n in counts) else parts: path
        for parts, path in depths.items()
    }


def _in_time(
    images: Mapping[tuple[str, ...], str], depths: Mapping[tuple[str, ...], str], limit_s: float
) -> dict[tuple[str, ...], str]:
    """The depth files under the parts of the images that they belong to, or under their own.

    Two files belong together if each is the other's nearest in time, by at most ``limit_s``. Files
    whose last part is no number keep their parts.
    """
    groups: dict[tuple[str, ...], tuple[dict[float, str], dict[float, str]]] = {}
    for role, files in enumerate((images, depths)):
        for parts in files:
            if re.fullmatch(r"\d+(\.\d+)?", parts[-1]):
                group = groups.setdefault(parts[:-1], ({}, {}))
                group[role][float(parts[-1])] = parts[-1]
    paired = dict(depths)
    for others, (image_names, depth_names) in groups.items():
        image_times, depth_times = (np.sort([*names]) for names in (image_names, depth_names))
        if not (len(image_times) and len(depth_times)):
            continue
        nearest = _nearest(depth_times, image_times)
        for image, depth in enumerate(nearest.tolist()):
            mutual = _nearest(image_times, depth_times[depth : depth + 1])[0] == image
            if mutual and abs(image_times[image] - depth_times[depth]) <= limit_s:
                path = paired.pop((*others, depth_names[depth_times[depth]]))
                paired[(*others, image_names[image_times[image]])] = path
    return paired


def _nearest(
    times: Float64[np.ndarray, " n"], wanted: Float64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """Which of the sorted ``times`` is nearest to each of ``wanted``; of two the earlier.

    Distances are compared in whole microseconds, so that 0.4 is as far from 0.2 as from 0.6.
    """
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = np.maximum(after - 1, 0)
    earlier, later = (np.round(1e6 * d) for d in (wanted - times[before], times[after] - wanted))
    return np.where(earlier <= later, before, after)


def _translate(run: str) -> str:
    """A run of wildcards as a regular expression without groups."""
    if run == "**/":
        return "(?:[^/]+/)*"
    pattern = ""
    for token in re.findall(_WITHIN_NAME, run):
        if token.startswith("*"):
            pattern += "[^/]*"
        elif token == "?":
            pattern += "[^/]"
        else:
            body = token[1:-1].replace("\\", r"\\")
            pattern += f"[^/{body[1:]}]" if body.startswith("!") else f"[{body}]"
    return pattern
