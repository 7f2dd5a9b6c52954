"""Labels of mirrors, pictures and screens as readers find them: regions, and planes where wanted.

A label is a number or colour of a map, or an outline with a name. ``RegionNames`` says what each
means; ``with_labels`` gives every mirror and picture a plane, fitted to the depth or read.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from flatdepth.data.annotations import OutlineFile, parse_outlines
from flatdepth.data.components import components
from flatdepth.data.polygons import MOST_THINGS, NAMES, Outline, draw_outlines, unknown_labels
from flatdepth.data.readers.arrays import ARRAY_ENDINGS, read_array
from flatdepth.data.readers.base import Item
from flatdepth.data.readers.files import Tree, damage_named, ending, read_bytes, read_label_image
from flatdepth.data.shards.codec import depth_metres
from flatdepth.data.things import GAP, RING, PlaneFit, fit_thing
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import pixel_rays
from flatdepth.types import FlatThings, RawFrame, Region
from flatdepth.untrusted import parse_json

DEFAULT_NAMES = "1:mirror,2:art,3:frame,4:decoy"

PIECE = 0.05
"""Share of a larger area below which a smaller one beside it is a piece of that."""

OUTLINE_FILES = 4
"""Files of outlines that a process keeps."""

Planes = Literal["none", "fit", "file"]

LOOKED_AT = 4
"""Frames whose labels are looked at before packing."""

_ENTRY = re.compile(
    r"(?P<low>\d{1,3})(?:-(?P<high>\d{1,3}))?|#(?P<colour>[0-9a-f]{6})|(?P<label>.+)"
)
_THINGS = (Region.MIRROR, Region.ART)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionNames:
    """What labels mean.

    Attributes:
        numbers: (256,) uint8, the ``Region`` of each number in a map.
        entries: (256,) uint8, which entry of the list names it, from 1; 0: none does.
        colours: 0xRRGGBB -> entry from 1 and region; empty: maps have numbers.
        labels: name in lower case -> region.
        own_labels: whether some of these are the user's.
    """

    numbers: UInt8[np.ndarray, " 256"]
    entries: UInt8[np.ndarray, " 256"]
    colours: Mapping[int, tuple[int, Region]]
    labels: Mapping[str, Region]
    own_labels: bool


@lru_cache(maxsize=8)
def parse_names(text: str) -> RegionNames:
    """Read ``1:mirror,2-9:art,#ff0000:frame,wall mirror:mirror``.

    Raises:
        UserError: an entry says nothing, or there are more than 255.
    """
    numbers, named = np.zeros((2, 256), np.uint8)
    colours: dict[int, tuple[int, Region]] = {}
    labels = dict(NAMES)
    entries = [entry.strip() for entry in text.split(",")]
    own_labels = False
    for place, entry in enumerate(entries, start=1):
        key, _, name = entry.rpartition(":")
        found = _ENTRY.fullmatch(key.strip().lower())
        region = Region.__members__.get(name.strip().upper())
        low = int(found["low"] or 0) if found else 0
        high = int(found["high"] or low) if found else 0
        if found is None or region is None or not low <= high <= 255 or place > 255:
            known = ", ".join(region.name.lower() for region in Region)
            raise UserError(
                "region_names: expected number:name, such as 1:mirror,2:art, with numbers of 0 to"
                " 255 or from-to, colours such as #ff0000 or labels of outlines, and names of"
                f" {known}, found {entry!r}"
            )
        if found["colour"]:
            colours[int(found["colour"], 16)] = (place, region)
        elif found["label"]:
            labels[found["label"]] = region
            own_labels = True
        else:
            numbers[low : high + 1], named[low : high + 1] = region, place
            labels |= {str(number): region for number in range(low, high + 1)}
    return RegionNames(
        numbers=numbers, entries=named, colours=colours, labels=labels, own_labels=own_labels
    )


def check_names(text: str, outlined: bool) -> None:
    """Raise UserError if ``parse_names`` would, or labels are named where nothing is outlined."""
    if parse_names(text).own_labels and not outlined:
        raise UserError(
            f"region_names: expected number:name or #rrggbb:name for maps, found {text!r}; labels"
            " are for the outlines of polygon_glob"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels of a photograph.

    Attributes:
        region: (H, W) uint8, values of ``Region``.
        source: (H, W) uint8, the numbers of a map, or those of the mirrors and pictures that are
            outlined (``draw_outlines``); 0 elsewhere.
        parts: (H, W) uint8, of a map the entry of ``RegionNames`` that names each pixel, 0 if none
            does: connected areas of one value are one thing. Else ``source``.
        is_outlined: whether ``source`` numbers things.
        unknown: labels that are not understood -> pixels or outlines that have them.
    """

    region: UInt8[np.ndarray, "h w"]
    source: UInt8[np.ndarray, "h w"]
    parts: UInt8[np.ndarray, "h w"]
    is_outlined: bool
    unknown: Mapping[str, int]

    def resized(self, height: int, width: int) -> "Labels":
        """At another size of the same proportions, each pixel by the one under its centre."""
        old_height, old_width = self.region.shape
        if (old_height, old_width) == (height, width):
            return self
        rows = ((np.arange(height) + 0.5) * old_height / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * old_width / width).astype(np.int64)
        grid = np.ix_(rows, columns)
        return replace(
            self, region=self.region[grid], source=self.source[grid], parts=self.parts[grid]
        )

    def numbered(self, by_source: bool) -> Int64[np.ndarray, "h w"]:
        """The mirrors and pictures by numbers from 1; 0 elsewhere.

        Args:
            by_source: every number of a map stands for another thing.
        """
        if self.is_outlined:
            return self.source.astype(np.int64)
        parts = self.source if by_source else self.parts
        return components(np.where(np.isin(self.region, _THINGS), parts, np.uint8(0)))


def read_labels_of_map(url: str, array: str, names: RegionNames) -> Labels:
    """Labels from a map: an image (JPEG's values too) or an array of numbers, or one of colours.

    Args:
        url: of the file.
        array: name of the array in a file of several.
        names: with colours, the map is read as these.

    Raises:
        BadFrame: the file is missing or damaged, or has numbers beyond 255.
    """
    if ending(url) in ARRAY_ENDINGS:
        values = read_array(url, array, role="regions")
    else:
        values = read_label_image(url, bool(names.colours))
    return labels_of_map(values, names, url)


def labels_of_map(values: np.ndarray, names: RegionNames, url: str) -> Labels:
    """``read_labels_of_map`` for (H, W) integers: numbers, or 0xRRGGBB if ``names`` has colours."""
    if values.dtype.kind not in "biu" or (
        not names.colours and not 0 <= values.min() <= values.max() <= 255
    ):
        found = f"{values.dtype} of {values.min()} to {values.max()}"
        raise BadFrame("regions are not 8-bit", f"{url}: {found}, expected 0 to 255")
    if names.colours:
        kinds, index = np.unique(values, return_inverse=True)
        meanings = [names.colours.get(int(kind), (0, Region.BACKGROUND)) for kind in kinds]
        table = np.array(meanings, np.uint8)[index.reshape(values.shape)]
        parts, region = np.ascontiguousarray(np.moveaxis(table, -1, 0))
        unnamed = {f"#{int(k):06x}": k for k in kinds if int(k) not in names.colours and k}
        source = parts
    else:
        source = values.astype(np.uint8)
        region, parts = names.numbers[source], names.entries[source]
        unnamed = {str(k): k for k in np.unique(source).tolist() if k and not names.entries[k]}
    return Labels(
        region=region,
        source=source,
        parts=parts,
        is_outlined=False,
        unknown={label: int((values == value).sum()) for label, value in unnamed.items()},
    )


@lru_cache(maxsize=OUTLINE_FILES)
def _outline_file(url: str) -> OutlineFile:
    return parse_outlines(read_bytes(url))


forget_files = _outline_file.cache_clear
"""To be called before files are read that may have changed."""


def read_outlines(url: str, image: str, height: int, width: int) -> list[Outline] | None:
    """The outlines of a photograph; None if the file does not know it.

    Raises:
        BadFrame: the file is missing or damaged, or for a photograph of another size.
    """
    with damage_named("outlines unreadable", url):
        return _outline_file(url).outlines(image, height, width)


def read_labels(
    files: Mapping[str, str], image: str, height: int, width: int, names: str, array: str
) -> Labels | None:
    """The labels of a photograph from its file of the role ``region`` or ``polygon``.

    Args:
        files: role -> path or URL.
        image: '/'-separated path of the photograph.
        height, width: of the photograph in pixels; outlines are of this size.
        names: as ``parse_names`` takes them.
        array: name of the array of a map in a file of several.

    Returns:
        None if there is no such file or it does not know the photograph.

    Raises:
        BadFrame: the file is damaged or does not fit the photograph.
    """
    if "region" in files:
        return read_labels_of_map(files["region"], array, parse_names(names))
    if "polygon" not in files:
        return None
    outlines = read_outlines(files["polygon"], image, height, width)
    if outlines is None:
        return None
    return labels_of_outlines(outlines, height, width, parse_names(names))


def look_at_labels(
    raw: str, items: Sequence[Item], glob: str, read: Callable[[Item], Labels | None]
) -> None:
    """Look at the labels of some frames, before anything is packed.

    Args:
        raw: where the files are, for messages.
        glob: pattern of the files of labels; "": there are none to look at.
        read: gives the labels of a frame.

    Raises:
        UserError: no frame has a file of labels or is in one. A warning says if none of the labels
            found is understood.
    """
    if not glob:
        return
    labelled = [item for item in items if {"region", "polygon"} & set(item.files)]
    shared = {item.files.get("polygon", "") for item in labelled}
    if len(shared) <= OUTLINE_FILES:  # which say themselves of what they are
        labelled = [item for item in labelled if _is_known(item, Tree(raw))]
    if not labelled:
        raise UserError(
            f"{raw}: {glob} has labels of none of the {len(items)} frames; its wildcards must stand"
            " for the same text as theirs, and the paths in a file for all must be the ends of"
            " their images' paths"
        )
    found: list[Labels] = []
    for item in labelled[:: max(1, len(labelled) // LOOKED_AT)][:LOOKED_AT]:
        with suppress(BadFrame):  # packing will name it
            labels = read(item)
            found += [] if labels is None else [labels]
    unknown = Counter[str]()
    for labels in found:
        unknown.update(labels.unknown.keys())
    if unknown and not any(labels.region.any() for labels in found):
        some = ", ".join(label for label, _ in unknown.most_common(6))
        warnings.warn(
            f"{raw}: in {len(found)} frames looked at, none of the labels of {glob} is understood"
            f" ({some}); if one is to be, name it, as in --region_names"
            f" {unknown.most_common(1)[0][0]!r}:mirror",
            stacklevel=3,
        )


def _is_known(item: Item, tree: Tree) -> bool:
    """Whether the file of labels of a frame has some of it, or is damaged, which packing says."""
    if "polygon" not in item.files:
        return True
    try:
        return _outline_file(item.files["polygon"]).knows(tree.path(item.files["image"]))
    except BadFrame:
        return True


def labels_of_outlines(
    outlines: Sequence[Outline], height: int, width: int, names: RegionNames
) -> Labels:
    """Labels from outlines. Raises BadFrame as ``draw_outlines`` does."""
    region, number = draw_outlines(outlines, height, width, names.labels)
    unknown = unknown_labels(outlines, names.labels)
    return Labels(region=region, source=number, parts=number, is_outlined=True, unknown=unknown)


def with_labels(
    raw: RawFrame,
    labels: Labels | None,
    *,
    planes: Planes,
    given: Sequence[Mapping[str, Any]] = (),
    art_inside: bool,
    skip_bad: bool,
) -> RawFrame:
    """A frame with its labels.

    Args:
        raw: with depth and intrinsics.
        labels: of its size; None: nothing is known.
        planes: ``none``: its depth is true where the labels are; ``fit``: planes are fitted to the
            depth around each thing; ``file``: they are ``given``.
        given: what ``read_planes`` gave.
        art_inside: pictures are fitted to their own depth first, which a sensor measures.
        skip_bad: a thing without a trustworthy plane costs the frame, not the thing's depth alone.

    Returns:
        ``raw`` with ``region``, ``things`` unless planes are none, and in ``meta`` what is said of
        each thing (``things``) and the labels that are not understood (``labels_unknown``).

    Raises:
        BadFrame: there are more than ``MOST_THINGS`` things, or with ``skip_bad`` one has no plane.
    """
    if labels is None:
        return raw
    if labels.region.shape != (raw.height, raw.width):
        shapes = f"{labels.region.shape} and {(raw.height, raw.width)}"
        raise BadFrame("regions and image differ in shape", shapes)
    meta = dict(raw.meta)
    if labels.unknown:
        meta["labels_unknown"] = dict(labels.unknown)
    number = labels.numbered(by_source=planes == "file") if planes != "none" else None
    if number is None or not number.any():
        return replace(raw, region=labels.region, meta=meta)
    assert raw.depth is not None and raw.K_px is not None
    count = int(number.max())
    if count > MOST_THINGS:
        raise BadFrame("too many flat things", f"{count} separate ones, at most {MOST_THINGS}")
    depth_m = depth_metres(raw.depth, raw.K_px)
    pieces = set() if labels.is_outlined or planes == "file" else _pieces(number, labels.parts)
    found = np.full((count, 3), np.nan)
    about: list[dict[str, object]] = []
    for one in range(1, count + 1):
        thing = number == one
        if one in pieces or not thing.any():  # which lies wholly behind others
            about.append({"from": "nothing"})
            continue
        is_art = bool((labels.region[thing] == Region.ART).mean() > 0.5)
        if planes == "fit":
            others = (labels.region != Region.BACKGROUND) & ~thing
            m, said = _fitted(depth_m, raw.K_px, thing, others, is_art and art_inside)
        else:
            m, said = _given(given, raw.K_px, thing, int(labels.source[thing].max()))
        about.append({"region": "art" if is_art else "mirror"} | said)
        if "trouble" not in said:
            found[one - 1] = m
        elif skip_bad:
            raise BadFrame("plane of a flat thing not known", f"thing {one}: {said['trouble']}")
    things = FlatThings(number=number.astype(np.uint8), planes=found)
    return replace(raw, region=labels.region, things=things, meta=meta | {"things": about})


def _pieces(number: Int64[np.ndarray, "h w"], parts: UInt8[np.ndarray, "h w"]) -> set[int]:
    """Areas of less than ``PIECE`` of another of the same label within whose ring they lie.

    They are cut off by what stands in front, such as the legs of a chair before a mirror, and what
    surrounds them is that.
    """
    places = []
    for one in range(1, int(number.max()) + 1):
        rows, columns = np.nonzero(number == one)
        box = np.array([rows.min(), columns.min(), -rows.max(), -columns.max()])
        places.append((one, int(parts[rows[0], columns[0]]), len(rows), box))
    found = set()
    for one, part, area, box in places:
        for _, other_part, other_area, other in places:
            corner = np.concatenate([box[2:] + other[:2], other[2:] + box[:2]])
            near = corner.max() <= RING * np.sqrt(other_area)
            if part == other_part and area < PIECE * other_area and near:
                found.add(one)
    return found


def read_planes(url: str, metres_per_unit: float) -> list[dict[str, Any]]:
    """The planes of a frame in Mirror3D's JSON.

    A list of ``{"plane": [a, b, c, d], "mask_id": number}``: the plane a x + b y + c z + d = 0, x
    right, y down, z forward, in the units of the depth file. So its code has it; what its
    documentation says of the axes contradicts its own example.

    Returns:
        ``mask_id`` and ``m`` (3,) in 1/m of each, ``m = -(a, b, c) / d / metres_per_unit``.

    Raises:
        BadFrame: the file is missing or no such list.
    """
    found = []
    payload = read_bytes(url)
    with damage_named("planes unreadable", url):
        for entry in parse_json(payload):
            a, b, c, d = (float(value) for value in entry["plane"])
            m = np.array([a, b, c]) / -d / metres_per_unit
            if not np.isfinite(m).all():
                raise ValueError(f"no plane: {entry['plane']!r:.100}")
            found.append({"mask_id": int(entry["mask_id"]), "m": m})
    return found


def _fitted(
    depth_m: np.ndarray,
    K_px: Float64[np.ndarray, "3 3"],
    thing: Bool[np.ndarray, "h w"],
    others: Bool[np.ndarray, "h w"],
    inside: bool,
) -> tuple[Float64[np.ndarray, " 3"], dict[str, object]]:
    """Plane of a thing and what is said of it; from around it where the inside gives none."""
    rows, columns = (np.flatnonzero(thing.any(axis=axis)) for axis in (1, 0))
    margin = int((RING + GAP) * np.sqrt(thing.sum())) + 5
    top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
    window = np.s_[top : int(rows[-1]) + margin + 1, left : int(columns[-1]) + margin + 1]
    K_window = K_px - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
    fit, place = None, ""
    for place in ("inside", "ring") if inside else ("ring",):
        fit = fit_thing(
            depth_m[window], K_window, thing[window], others[window], inside=place == "inside"
        )
        if fit is not None and fit.trouble is None:
            break
    if fit is None:
        return np.full(3, np.nan), {"from": place, "trouble": "too little is known around it"}
    return fit.m, {"from": place} | _figures(fit)


def _figures(fit: PlaneFit) -> dict[str, object]:
    figures: dict[str, object] = {
        name: float(f"{getattr(fit, name):.4g}") for name in ("residual", "share", "uncertainty")
    }
    return figures if fit.trouble is None else figures | {"trouble": fit.trouble}


def _given(
    planes: Sequence[Mapping[str, Any]],
    K_px: Float64[np.ndarray, "3 3"],
    thing: Bool[np.ndarray, "h w"],
    mask_id: int,
) -> tuple[Float64[np.ndarray, " 3"], dict[str, object]]:
    found = [entry["m"] for entry in planes if entry["mask_id"] == mask_id]
    if len(found) != 1:
        nothing = f"the file has {len(found)} planes for mask_id {mask_id}"
        return np.full(3, np.nan), {"from": "file", "trouble": nothing}
    rows, columns = np.nonzero(thing)
    behind = (pixel_rays(K_px, columns + 0.5, rows + 0.5) @ found[0] <= 0).any()
    said: dict[str, object] = {"from": "file"}
    return found[0], said | ({"trouble": "its plane is not in front of it"} if behind else {})
