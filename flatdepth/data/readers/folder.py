"""Any RGB-D frames that lie in files: one image and one depth file per frame."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from flatdepth.data.readers.base import MOST_OUTSIDE, Item, Listing, out_of_range
from flatdepth.data.readers.files import (
    Tree,
    check_same_size,
    fit_picture,
    make_key,
    pinhole,
    read_bytes,
    read_depth_image,
    read_hdf5,
    read_image,
    read_intrinsics,
    relative_paths,
    sort_items,
)
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import DepthCodes, RawFrame

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

    Depth files are 16-bit PNG, PGM or TIFF, float32 TIFF, ``.npy`` or ``.h5``/``.hdf5``. 16-bit
    codes are kept bit for bit, integers that fit 16 bits too; float32 and float64 become
    logarithmic 16-bit codes. In those what is not above 0 is unknown, and so are up to 1 % of the
    pixels if they lie outside of ``depth_range``.
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
    depth nearest in time, this far away at most; 0: by equal names."""
    hole: int = 0
    """The depth code that means "unknown"; -1: there is none. NaN is always unknown."""
    sky: int = _NONE
    """The depth code that means "sky or beyond range"; -1: there is none."""
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
    numbers (fx fy cx cy), 6 (width and height before them), or a matrix of 3x3, 3x4 or 4x4."""
    fov_deg: float = 0.0
    """Horizontal field of view in degrees, in place of ``intrinsics``; 0: unknown, 60 assumed."""
    resize_images: bool = False
    """Images of another size than their depth are resized to it (and encoded anew as JPEG), where
    the proportions agree to 2 %; ``intrinsics`` are those of the depth's size then."""
    scene_from: str = "parent"
    """What is a scene, the unit of splits: ``parent`` (an image's directory), a number n (its
    first n directories), ``file`` (each frame) or ``dataset`` (all frames)."""
    depth_array: str = "depth"
    """Name of the depth array in ``.h5`` files."""
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
                self.image_glob != self.depth_glob,
                f"image_glob and depth_glob are both {self.image_glob}",
            ),
            (
                0 < self.depth_scale < math.inf,
                f"depth_scale: expected metres per unit above 0, found {self.depth_scale}",
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
                0 <= self.pair_within_s <= 1e6,
                f"pair_within_s: expected 0 to 1e6, got {self.pair_within_s}",
            ),
            (0 <= self.fov_deg < 180, f"fov_deg: expected 0 to 180, found {self.fov_deg}"),
            (0 <= low < high, f"depth_range: expected 0 <= low < high, found {low}, {high}"),
            (
                self.scene_from in ("parent", "file", "dataset") or self.scene_from.isdecimal(),
                f"scene_from: expected parent, file, dataset or a number, found {self.scene_from}",
            ),
        ):
            if not good:
                raise UserError(message)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return self.depth_range

    def list(self) -> Listing:
        """Find the frames. Warns if the field of view is assumed.

        Files without a partner are excluded. Raises UserError if no image has one.
        """
        tree = Tree(self.raw)
        paths = list(tree.walk())
        depths = _match(self.depth_glob, paths)
        images = _match(self.image_glob, set(paths).difference(depths.values()))
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
        if not self._cameras_given():
            warnings.warn(
                f"{self.raw}: neither intrinsics nor fov_deg given, assuming a horizontal field"
                f" of view of {_ASSUMED_FOV_DEG:g} degrees",
                stacklevel=2,
            )
        cameras: dict[tuple[str, ...], str] = {(): ""}
        if self.intrinsics_glob:
            cameras = _match(self.intrinsics_glob, paths)
        shared = len(_wildcards(self.intrinsics_glob))
        without = {parts for parts in both if parts[:shared] not in cameras}
        if without == both:
            raise tree.layout_error(
                f"intrinsics {self.intrinsics_glob} for images {self.image_glob} (matched"
                f" {len(cameras)} files, none for an image; the wildcards must stand for the same"
                " text as the first ones of the images)"
            )
        items = [
            self._item(tree, images[parts], depths[parts], cameras[parts[:shared]])
            for parts in both - without
        ]
        excluded = [(images[parts], "no file of intrinsics") for parts in without]
        excluded += [(images[parts], "no depth file") for parts in images.keys() - both]
        excluded += [(depths[parts], "no image file") for parts in depths.keys() - both]
        return Listing(items=sort_items(items), excluded=tuple(sorted(excluded)))

    def read(self, item: Item) -> RawFrame:
        """Read one frame."""
        picture = read_image(item.files["image"])
        codes = self._read_depth(item.files["depth"])
        if self.resize_images and codes.ndim == 2:
            picture = fit_picture(picture, *codes.shape)
        fix = "; --resize_images true brings images to the depth's size"
        check_same_size(picture, codes, item.files["depth"], fix)
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            depth=self._with_meaning(codes, item.files["depth"]),
            K_px=self._intrinsics(item.files.get("intrinsics"), picture.width, picture.height),
            split=item.split,
            meta={
                "intrinsics_assumed": not self._cameras_given(),
                **relative_paths(Tree(self.raw), item.files),
            },
        )

    def _cameras_given(self) -> Sequence[str]:
        return [
            name for name in ("intrinsics", "intrinsics_glob", "fov_deg") if getattr(self, name)
        ]

    def _item(self, tree: Tree, image: str, depth: str, camera: str) -> Item:
        files = {"image": tree.url(image), "depth": tree.url(depth)}
        if camera:
            files["intrinsics"] = tree.url(camera)
        return Item(key=make_key(image), scene=self._scene(image), files=files)

    def _scene(self, image: str) -> str:
        directories = make_key(image).split("/")[:-1]
        if self.scene_from == "file":
            return make_key(image)
        if self.scene_from == "dataset":
            directories = []
        elif self.scene_from != "parent":
            directories = directories[: int(self.scene_from)]
        return "/".join(directories) or self.dataset

    def _read_depth(self, url: str) -> NDArray[Any]:
        extension = Tree(self.raw).path(url).rpartition(".")[2].lower()
        if extension in ("h5", "hdf5"):
            return read_hdf5(url, [self.depth_array])[0]
        if extension == "npy":
            return _read_npy(url)
        return read_depth_image(url)

    def _with_meaning(self, codes: NDArray[Any], url: str) -> DepthCodes:
        hole, sky = (None if code == _NONE else code for code in (self.hole, self.sky))
        if codes.dtype in (np.uint16, np.float16):
            return DepthCodes(
                codes=codes, quantity=self.quantity, scale_m=self.depth_scale, hole=hole, sky=sky
            )
        if codes.dtype not in (np.float32, np.float64):
            raise BadFrame("depth is neither 16-bit nor float", f"{url}: {codes.dtype}")
        metres = (codes * self.depth_scale).astype(np.float32)
        metres[metres <= 0] = np.nan
        if hole is not None:
            metres[codes == hole] = np.nan
        if sky is not None:
            metres[codes == sky] = np.inf
        low, high = self.depth_range
        known = np.isfinite(metres)
        outside = known & ((metres <= low) | (metres > high))
        if outside.sum() > MOST_OUTSIDE * known.sum():
            raise out_of_range(metres[known], self.depth_range)
        metres[outside] = np.nan
        logarithmic = encode_log_u16(metres, near_m=min(0.1, max(low, 1e-3)), far_m=max(1e3, high))
        return DepthCodes(
            codes=logarithmic.codes,
            quantity=self.quantity,
            hole=logarithmic.hole,
            sky=logarithmic.sky,
            log_range_m=logarithmic.log_range_m,
        )

    def _intrinsics(self, url: str | None, width: int, height: int) -> Float64[np.ndarray, "3 3"]:
        if not url and not self.intrinsics:
            fov = math.radians(self.fov_deg or _ASSUMED_FOV_DEG)
            focal = width / 2 / math.tan(fov / 2)
            return pinhole(focal, focal, width / 2, height / 2)
        K_px = read_intrinsics(url, width, height) if url else pinhole(*self.intrinsics)
        cx, cy = K_px[:2, 2].tolist()
        if not self.half_pixel_centres:
            K_px[:2, 2] += 0.5
        if not (0 < K_px[0, 2] < width and 0 < K_px[1, 2] < height):
            fix = f"see {url}" if url else "give --intrinsics of this size"
            raise BadFrame(
                "principal point outside of the image",
                f"cx {cx:g}, cy {cy:g} in {width}x{height}; {fix}",
            )
        return K_px


def _wildcards(glob: str) -> Sequence[str]:
    """The runs of wildcards of a pattern; each ``**/`` stands alone."""
    return _WILDCARDS.findall(glob)


def _match(glob: str, paths: Sequence[str] | set[str]) -> dict[tuple[str, ...], str]:
    """What each run of wildcards stands for -> path.

    The pattern's other text is fixed, so different paths never have the same parts.
    """
    literals = _WILDCARDS.split(glob)
    runs = [f"({_translate(run)})" for run in _wildcards(glob)]
    pattern = re.escape(literals[0])
    for run, literal in zip(runs, literals[1:], strict=True):
        pattern += run + re.escape(literal)
    matches = (re.fullmatch(pattern, path) for path in paths)
    return {match.groups(): match[0] for match in matches if match}


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


def _read_npy(url: str) -> NDArray[Any]:
    data = read_bytes(url)
    if not data.startswith(b"\x93NUMPY"):  # numpy would take it for a pickle and advise to load it
        raise BadFrame("depth unreadable", f"{url}: not an array as numpy.save writes it")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header is Python text: damage raises nearly anything
        raise BadFrame("depth unreadable", f"{url}: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.squeeze(axis=2 if array.shape[2] == 1 else 0)
    fits = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() < 2**16
    return array.astype(np.uint16) if fits else array
