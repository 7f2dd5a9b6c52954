"""3D-Mirage: relief in street art and pictures that are flat, without any depth truth.

The authors' repository (720336f) computes two figures of relief and of its change with context.
They are blind to whether depth is right: a constant map scores 0.
"""

import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32
from PIL import Image, ImageDraw

from flatdepth.benchmarks.base import Benchmark, Case, Published, Row, Sample, Shot
from flatdepth.benchmarks.maps import Map, bilinear, inverse_depth
from flatdepth.data.polygons import Outline, draw_outlines
from flatdepth.data.readers.files import Tree, damage_named, read_bytes
from flatdepth.models.network import Kind
from flatdepth.predict.inputs import open_photo
from flatdepth.predict.predictor import PredictOptions, choose_camera
from flatdepth.types import Region
from flatdepth.untrusted import parse_json

SEED, SCENES, TEST_SHARE, CROPS, COVERED = 1337, 468, 0.10, 4, 0.40
PICTURE = (640, 480)
"""(width, height) that pictures and crops are squeezed to."""

MAP = (518, 686)
"""(height, width) of Depth Anything V2's output on them, where relief is measured."""

Box = tuple[int, int, int, int]
Polygon = Float32[np.ndarray, "_ 2"]


def relief(values: Map, mask: Bool[np.ndarray, "h w"]) -> tuple[float, float]:
    """(s, m) of a map in a region: how much it bends, after stretching its range there to 0..1.

    z is the map from its 1st to its 99th percentile in the region, clipped to 0..1 (0 everywhere
    if the region has fewer than 32 pixels). Per pixel ``L = sqrt(z_uu^2 + z_vv^2 + 1e-12)`` with
    second differences [1, -2, 1], the borders of the map repeated. s is the **sum** of the highest
    tenth of L in the region, m the mean of L from its 10th percentile on.

    In float64, where theirs is float32: only maps that are flat to its rounding differ.

    Blind to scale and shift of the map, so a plane in inverse depth has second differences of 0
    whatever its tilt, but for the two lines where z is clipped. Neither is free of resolution: at
    twice the resolution L is 1/4 and pixels are 4 times as many where the map is smooth, so s
    stays and m falls to a quarter; at steps L stays and s doubles. Compare at one size only.

    Args:
        values: in any unit.
        mask: the region.
    """
    x, inside = torch.tensor(values, dtype=torch.float64), torch.tensor(mask)
    z = torch.zeros_like(x)
    if mask.sum() >= 32:
        low, high = (torch.quantile(x[inside], share) for share in (0.01, 0.99))
        z = ((x - low) / (high - low + 1e-6)).clamp(0, 1)
    wide = F.pad(z[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    z_uu = wide[1:-1, :-2] - 2 * z + wide[1:-1, 2:]
    z_vv = wide[:-2, 1:-1] - 2 * z + wide[2:, 1:-1]
    bend = (z_uu**2 + z_vv**2 + 1e-12).sqrt()[inside]
    top = bend.topk(max(1, math.ceil(0.10 * len(bend)))).values
    kept = bend[bend >= torch.quantile(bend, 0.10)]
    return float(top.sum()), float(kept.mean())


def composites(means: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """DCS and CCS from the means over crops of what ``_score`` gives.

    With (x, y) the relief of a crop in the map of the whole picture and in the map of the crop
    alone: DCS = hypot(mean x, mean y) + mean hypot(x, y) of s, and
    CCS = (|mean x - mean y| + mean |x - y|) / sqrt 2 of m; of each the two terms are given too.
    """
    dcs = np.hypot(means["s_full"], means["s_crop"])
    ccs = np.abs(means["m_full"] - means["m_crop"]) / math.sqrt(2)
    average = means["m_apart"] / math.sqrt(2)
    return {
        "dcs": dcs + means["s_hypot"],
        "dcs_cluster": dcs,
        "dcs_average": means["s_hypot"],
        "ccs": ccs + average,
        "ccs_cluster": ccs,
        "ccs_average": average,
    }


def samples(raw: Tree) -> Sequence[Sample]:
    names = raw.files()
    pictures = {
        name: polygons
        for name in names
        if name.lower().endswith((".png", ".jpg", ".jpeg"))
        and (about := f"{PurePosixPath(name).stem}.json") in names
        and (polygons := _polygons(raw.url(about)))
    }
    if pictures and len(pictures) != SCENES:
        found = f"{len(pictures)} of {SCENES} scenes, so the test split is not the authors'"
        print(f"warning: {raw.root}: {found}", file=sys.stderr)
    order = np.random.RandomState(SEED).permutation(len(pictures))
    test = set(order[: round(len(pictures) * TEST_SHARE)].tolist())
    draws, found_samples = random.Random(SEED), []
    for number, (name, polygons) in enumerate(pictures.items()):
        if number in test:
            path = Path(raw.url(name))
            height, width = open_photo(path).image.shape[:2]
            crops = _crops(width, height, polygons, draws)
            found_samples.append(Sample(name, name, partial(_load, path, polygons, crops)))
    return found_samples


def _polygons(url: str) -> list[Polygon]:
    """The outlines labelled "illu" of a LabelMe file, whatever their type, of 3 points or more."""
    with damage_named("outlines unreadable", url):
        shapes = parse_json(read_bytes(url)).get("shapes") or []
        points = [one["points"] for one in shapes if one.get("label") == "illu"]
        return [np.array(one, np.float32).reshape(-1, 2) for one in points if len(one) >= 3]


def _crops(width: int, height: int, polygons: Sequence[Polygon], draws: random.Random) -> list[Box]:
    """(left, top, right, bottom) of the crops of a picture, drawn as the authors draw them.

    A draw is taken if ``COVERED`` of it lies in an odd number of polygons; this area is counted in
    pixels, theirs is exact, and a draw this near to the limit (1e-4) may fall to the other side.
    """
    outline = Outline(label="illu", parts=tuple(one.astype(np.float64) for one in polygons))
    drawn = draw_outlines([outline], height, width, {"illu": Region.ART})[0] > 0
    areas = np.pad(drawn.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    corners = np.concatenate(list(polygons)).astype(np.float64)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)

    def anywhere(low: float, high: float) -> Box:
        w = max(2, int(width * draws.uniform(low, high)))
        h = max(2, int(height * draws.uniform(low, high)))
        x = draws.randint(0, max(0, width - w))
        y = draws.randint(0, max(0, height - h))
        return x, y, x + w, y + h

    def around() -> Box:
        factor = draws.uniform(1.0, 1.7)
        w, h = (max(2, int(side * factor)) for side in (right - left, bottom - top))
        u = (left + right) / 2 + draws.uniform(-0.15, 0.15) * width
        v = (top + bottom) / 2 + draws.uniform(-0.15, 0.15) * height
        return within(round(u - w / 2), round(v - h / 2), w, h)

    def within(x: float, y: float, w: float, h: float) -> Box:
        x0, y0 = max(0, min(x, width - 2)), max(0, min(y, height - 2))
        x1, y1 = max(x0 + 2, min(x + w, width)), max(y0 + 2, min(y + h, height))
        return round(x0), round(y0), round(x1), round(y1)

    found: list[Box] = []
    stages = (
        (400, partial(anywhere, 0.35, 0.95)),
        (8 * CROPS * 5, around),
        (2000, partial(anywhere, 0.5, 0.9)),
    )
    for tries, draw in stages:
        for _ in range(tries if len(found) < CROPS else 0):
            x0, y0, x1, y1 = box = draw()
            covered = areas[y1, x1] - areas[y0, x1] - areas[y1, x0] + areas[y0, x0]
            if covered >= COVERED * (x1 - x0) * (y1 - y0):
                found.append(box)
            if len(found) == CROPS:
                break
    found = found or [within(left, top, right - left, bottom - top)]
    return found + found[:1] * (CROPS - len(found))


def _load(path: Path, polygons: Sequence[Polygon], crops: Sequence[Box]) -> Case:
    photo = open_photo(path)
    height, width = photo.image.shape[:2]
    camera = choose_camera(photo.focal_px, height, width, PredictOptions())
    image = Image.fromarray(photo.image)
    shots = []
    for box in ((0, 0, width, height), *crops):
        squeezed = image.crop(box).resize(PICTURE, Image.Resampling.LANCZOS)
        scale = (PICTURE[0] / (box[2] - box[0]) + PICTURE[1] / (box[3] - box[1])) / 2
        shots.append(Shot(np.asarray(squeezed), camera.focal_px * scale, at_network=True))
    return Case(shots, partial(_score, (width, height), polygons, crops))


def _score(
    size: tuple[int, int],
    polygons: Sequence[Polygon],
    crops: Sequence[Box],
    maps: Sequence[Map],
    kind: Kind,
) -> Iterator[Row]:
    full, *alone = (bilinear(inverse_depth(one, kind), *MAP) for one in maps)
    for box, crop in zip(crops, alone, strict=True):
        mask = region_mask(polygons, box)
        if mask.sum() < 16:
            continue
        s_full, m_full = relief(cut(full, size, box), mask)
        s_crop, m_crop = relief(crop, mask)
        yield Row(
            "illusion",
            {
                "s_full": s_full,
                "s_crop": s_crop,
                "s_hypot": math.hypot(s_full, s_crop),
                "m_full": m_full,
                "m_crop": m_crop,
                "m_apart": abs(m_full - m_crop),
            },
        )


def cut(full: Map, size: tuple[int, int], box: Box) -> Map:
    """The part of a whole picture's map that a crop shows, at ``MAP``'s size.

    Sampled bilinearly from the first to the last of evenly spaced map coordinates, which run from
    the box's left edge to its right edge and take pixel centres for integers.

    Args:
        size: (width, height) of the picture that the box is in.
    """
    rows, columns = full.shape
    left, right = (edge * columns / size[0] for edge in box[::2])
    top, bottom = (edge * rows / size[1] for edge in box[1::2])
    u = torch.linspace(left, right, MAP[1], dtype=torch.float64)
    v = torch.linspace(top, bottom, MAP[0], dtype=torch.float64)
    grid_v, grid_u = torch.meshgrid(
        v / (rows - 1) * 2 - 1, u / (columns - 1) * 2 - 1, indexing="ij"
    )
    grid = torch.stack([grid_u, grid_v], dim=-1)[None]
    batch = torch.tensor(full, dtype=torch.float64)[None, None]
    sampled = F.grid_sample(batch, grid, "bilinear", "border", align_corners=True)
    return sampled[0, 0].numpy()


def region_mask(polygons: Sequence[Polygon], box: Box) -> Bool[np.ndarray, "_ _"]:
    """The polygons in a crop as a mask of ``MAP``'s size: their union without the holes.

    A polygon is a hole if another one, grown by 2 px, covers it; that is taken to be so if it
    holds all its corners. Corners are truncated to pixels and outlines drawn, as by OpenCV, whose
    rims are a pixel wider here and there.
    """
    left, top, right, bottom = box
    scale = np.array([MAP[1] / (right - left), MAP[0] / (bottom - top)], np.float32)
    canvas = Image.new("L", (MAP[1], MAP[0]))
    draw = ImageDraw.Draw(canvas)
    is_hole = [
        any(_covers(outer, inner) for outer in polygons if outer is not inner) for inner in polygons
    ]
    for ink in (1, 0):
        for polygon, hole in zip(polygons, is_hole, strict=True):
            if hole == (ink == 0):
                corners = ((polygon - np.array([left, top], np.float32)) * scale).astype(np.int32)
                draw.polygon([tuple(corner) for corner in corners.tolist()], ink, ink)
    return np.array(canvas) > 0


def _covers(outer: Polygon, inner: Polygon, reach: float = 2.0) -> bool:
    """Whether all corners of a polygon are inside another one or within ``reach`` of its edges."""
    a, p = outer.astype(np.float64), inner.astype(np.float64)[:, None]
    along = np.roll(a, -1, axis=0) - a
    share = ((p - a) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12)
    feet = a + share.clip(0, 1)[..., None] * along
    near = np.linalg.norm(p - feet, axis=-1).min(axis=1) <= reach
    above = a[:, 1] > p[..., 1]
    crosses = above != np.roll(above, -1, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = a[:, 0] + (p[..., 1] - a[:, 1]) * along[:, 0] / along[:, 1]
    inside = (crosses & (u > p[..., 0])).sum(axis=1) % 2 == 1
    return bool((near | inside).all())


MIRAGE = Benchmark(
    name="3d_mirage",
    protocol=(
        "3D-Mirage, test split (47 of 468 photographs by their seed, 4 crops each), as the "
        "authors' notebook: picture and crops squeezed to 640 x 480 px (Lanczos); maps are inverse "
        "depth as the network gives it, no alignment (metric: 1/z; affine: depth itself, which is "
        "curved where a plane recedes), at 686 x 518 px, which is Depth Anything V2's own size and "
        "what others are brought to bilinearly; dcs: relief in the picture and in the crop; ccs: "
        "its change with context, both over the crops. Sums over pixels: they compare at one "
        "resolution only. A constant map scores 0, so read them beside the figures of a benchmark "
        "with truth."
    ),
    layout="N.jpg or N.png and N.json (LabelMe, label illu) side by side",
    source="hdnndh/3D-Mirage on Hugging Face",
    samples=samples,
    finish=composites,
    compared=[("illusion", "dcs"), ("illusion", "ccs")],
    published=[
        Published("Depth Pro", "P", (649.1, 1.597e-3)),
        Published("Marigold", "P", (1427.0, 4.696e-3)),
        Published("ZoeDepth", "P", (589.3, 1.505e-3)),
        Published("MiDaS", "P", (670.2, 9.220e-4)),
        Published("DA-V2 Large", "P", (994.6, 1.466e-3)),
        Published("3D-Mirage", "P", (58.64, 1.907e-4)),
    ],
    remark="How maps of other systems than DA-V2 were brought to one size is not stated.",
)
