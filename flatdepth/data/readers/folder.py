"""Any RGB-D frames that lie in files: one image and one depth file per frame."""

import math
import warnings
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
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
    read_baseline,
    read_image,
    read_intrinsics,
    read_rgba_floats,
    relative_paths,
    sort_items,
    warn_of_unread,
)
from flatdepth.data.readers.labels import (
    DEFAULT_NAMES,
    Labels,
    Planes,
    check_names,
    forget_files,
    look_at_labels,
    read_labels,
    read_planes,
    with_labels,
)
from flatdepth.data.readers.patterns import (
    alone,
    beside,
    in_time,
    is_scene_rule,
    match,
    scene_of,
    wildcards,
)
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import camera_trouble, focal_from_mm, off_centre, sensor_sides
from flatdepth.types import DepthCodes, RawFrame

_NONE = -1
_ASSUMED_FOV_DEG = 60.0


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
    """Pattern of region maps that say where mirrors and pictures are: images or arrays of the
    depth's or the image's size whose numbers or colours ``region_names`` explains. Wildcards as for
    ``mask_glob``; a frame without a map is packed as one of which nothing is known."""
    polygon_glob: str = ""
    """Pattern of files of outlines, in place of region maps: LabelMe, COCO instances or CVAT for
    images. Its wildcards stand for the same text as the first ones of the images; without any it is
    one file for all."""
    region_names: str = DEFAULT_NAMES
    """What labels mean: ``mirror``, ``art`` (screens too), ``frame``, ``decoy`` (openings) or
    ``background``. Numbers or colours of maps (``1:mirror,2-9:art``, ``#ff0000:mirror``), names of
    outlines (``tv:art``) besides mirror, art, picture, painting, poster, screen, frame, opening and
    more. Others are background, counted when packing ends."""
    planes: Literal["auto", "none", "fit", "file"] = "auto"
    """Where the depth of labelled mirrors and pictures comes from. ``none``: that of the frame is
    true there; ``fit``: the plane that fits the depth around (or in) each; ``file``: planes of
    ``plane_glob``; ``auto``: ``fit`` for outlines, which are drawn where a sensor was fooled,
    ``none`` for region maps, which are rendered with the depth."""
    art_planes: Literal["inside", "ring"] = "inside"
    """Where planes of pictures are fitted. ``inside``: to their own depth, which a sensor measures,
    else around; ``ring``: around them, as those of mirrors always are."""
    bad_planes: Literal["ignore", "skip"] = "ignore"
    """What happens where no plane can be trusted. ``ignore``: the thing has no truth, and is
    named; ``skip``: the frame is left out."""
    plane_glob: str = ""
    """Pattern of Mirror3D's JSON files of planes, for ``planes file``. Wildcards as for
    ``mask_glob``; their unit is that of the depth file."""
    quantity: Literal["z", "distance", "disparity"] = "z"
    """``z``: depth along the optical axis; ``distance``: distance to the optical centre;
    ``disparity``: of a stereo camera in pixels, with its baseline in metres for ``depth_scale``, or
    where ``intrinsics_glob`` names OpenCV's XML with ``baselineLR`` the metres per unit of that."""
    intrinsics: tuple[float, ...] = ()
    """fx, fy, cx, cy in pixels, cx and cy for pixel centres at integers (OpenCV, TUM)."""
    half_pixel_centres: bool = False
    """cx and cy are for pixel centres at integer + 0.5 (the image's corner is 0, 0)."""
    intrinsics_glob: str = ""
    """Pattern of text files with intrinsics in place of ``intrinsics``, such as
    ``*/intrinsic/intrinsic_depth.txt``. Its wildcards stand for the same text as the first ones of
    the images, so a file is for a frame, for a scene, or without wildcards for all. It has 4
    numbers (fx fy cx cy), 6 (width and height before them), 11 (with distortion, ignored), a matrix
    of 3x3, 3x4 or 4x4, or JSON with such values (Record3D, Replica, Open3D,
    ``flatdepth pack export``, which also says where pixel centres are)."""
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
        images, depths = (len(wildcards(g)) for g in (self.image_glob, self.depth_glob))
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
                self.quantity in ("z", "distance", "disparity"),
                f"quantity: expected z, distance or disparity, found {self.quantity}",
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
                len(wildcards(self.intrinsics_glob)) <= images,
                f"intrinsics_glob: expected at most the {images} runs of wildcards of image_glob,"
                f" found {self.intrinsics_glob}",
            ),
            (
                len(wildcards(self.mask_glob)) <= depths,
                f"mask_glob: expected at most the {depths} runs of wildcards of depth_glob,"
                f" found {self.mask_glob}",
            ),
            *(
                (
                    len(wildcards(glob)) <= runs,
                    f"{name}: expected at most the {runs} runs of wildcards of {of}, found {glob}",
                )
                for name, glob, of, runs in (
                    ("region_glob", self.region_glob, "depth_glob", depths),
                    ("plane_glob", self.plane_glob, "depth_glob", depths),
                    ("polygon_glob", self.polygon_glob, "image_glob", images),
                )
            ),
            (
                not (self.region_glob and self.polygon_glob),
                "region_glob and polygon_glob are both given: leave one of them out",
            ),
            (
                (self.planes == "file") == bool(self.plane_glob),
                f"planes and plane_glob: expected file and a pattern, or neither, found"
                f" {self.planes} and {self.plane_glob or 'nothing'}",
            ),
            (
                self.planes in ("auto", "none") or bool(self.region_glob or self.polygon_glob),
                f"planes: {self.planes} needs the labels of region_glob or polygon_glob",
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
                is_scene_rule(self.scene_from),
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
        check_names(self.region_names, bool(self.polygon_glob))

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
        forget_files()
        tree = Tree(self.raw)
        paths = list(tree.walk())
        masks, regions, planes, polygons = (
            match(glob, paths)
            for glob in (self.mask_glob, self.region_glob, self.plane_glob, self.polygon_glob)
        )
        others = {*masks.values(), *regions.values(), *planes.values(), *polygons.values()}
        depths = match(self.depth_glob, set(paths).difference(others))
        mask_of = beside(depths, masks, self.mask_glob)
        region_of = beside(depths, regions, self.region_glob)
        plane_of = beside(depths, planes, self.plane_glob)
        images = match(self.image_glob, set(paths).difference(depths.values(), others))
        polygon_of = beside(images, polygons, self.polygon_glob)
        if self.pair_alone:
            depths = alone(images, depths)
        if self.pair_within_s > 0:
            depths = in_time(images, depths, self.pair_within_s)
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
            cameras = match(self.intrinsics_glob, paths)
        shared = len(wildcards(self.intrinsics_glob))
        if self.pair_within_s > 0 and shared == len(wildcards(self.image_glob)):
            cameras = in_time(images, cameras, self.pair_within_s)
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
                polygon=polygon_of.get(images[parts], ""),
                plane=plane_of.get(depths[parts], ""),
                intrinsics=cameras[parts[:shared]],
            )
            for parts in both - without - unmasked
        )
        self._warn(paths, items, {*images.values(), *depths.values(), *others})
        self._look_at_camera(items)
        look_at_labels(self.raw, items, self.region_glob or self.polygon_glob, self._look_at)
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
        K_px = self._intrinsics(item, picture, stored)
        valid = self._valid(item.files.get("mask"), codes)
        if self.quantity == "disparity":
            depth = self._of_disparity(codes, valid, K_px, item.files.get("intrinsics"))
        else:
            depth = self._with_meaning(codes, valid, url)
        raw = RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            depth=depth,
            K_px=K_px,
            split=item.split,
            meta=meta | relative_paths(Tree(self.raw), item.files),
        )
        return with_labels(
            raw,
            self._labels(item, picture, stored),
            planes=self._planes(),
            given=read_planes(item.files["plane"], self.depth_scale)
            if "plane" in item.files
            else (),
            art_inside=self.art_planes == "inside",
            skip_bad=self.bad_planes == "skip",
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
        return Item(
            key=make_key(image), scene=scene_of(image, self.scene_from, self.dataset), files=files
        )

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

    def _labels_of(self, item: Item, stored: Picture) -> Labels | None:
        """The labels of a frame, of the size of its map or its image; None if it has none."""
        path = Tree(self.raw).path(item.files["image"])
        size = (stored.height, stored.width)
        return read_labels(item.files, path, *size, self.region_names, self.depth_array)

    def _labels(self, item: Item, picture: Picture, stored: Picture) -> Labels | None:
        labels = self._labels_of(item, stored)
        if labels is not None and labels.region.shape == (stored.height, stored.width):
            return labels.resized(picture.height, picture.width)
        return labels

    def _look_at(self, item: Item) -> Labels | None:
        shape = self._codes(item.files["depth"]).shape
        return self._labels_of(item, read_image(item.files["image"], shape, self.image_bits))

    def _planes(self) -> Planes:
        if self.planes == "auto":
            return "fit" if self.polygon_glob else "none"
        return self.planes

    def _with_meaning(
        self, codes: NDArray[Any], valid: NDArray[np.bool_] | None, url: str
    ) -> DepthCodes:
        assert self.quantity != "disparity"
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
        return self._logarithmic(metres, self.quantity)

    def _of_disparity(
        self,
        codes: NDArray[Any],
        valid: NDArray[np.bool_] | None,
        K_px: Float64[np.ndarray, "3 3"],
        camera_url: str | None,
    ) -> DepthCodes:
        """z = fx * baseline / disparity; what is not finite and above 0 is unknown."""
        baseline_m = self.depth_scale * (read_baseline(camera_url) if camera_url else 1.0)
        disparity = codes.astype(np.float64)
        disparity[~((disparity > 0) & np.isfinite(disparity)) | (codes == self.hole)] = np.nan
        if valid is not None:
            disparity[~valid] = np.nan
        return self._logarithmic(K_px[0, 0] * baseline_m / disparity, "z")

    def _logarithmic(
        self, metres: Float64[np.ndarray, "h w"], quantity: Literal["z", "distance"]
    ) -> DepthCodes:
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
            quantity=quantity,
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
