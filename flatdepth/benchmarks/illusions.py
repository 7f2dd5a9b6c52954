"""3D Visual Illusion: pictures and screens that deceive, truth by lidar (Yao et al. 2025)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool

from flatdepth.benchmarks.base import SCALED, Benchmark, Case, Published, Row, Sample, Shot
from flatdepth.benchmarks.maps import LEAST, Map, bilinear, depth_errors, nearest
from flatdepth.data.readers.files import Tree, read_depth_image
from flatdepth.errors import BadFrame
from flatdepth.models.network import Kind
from flatdepth.predict.inputs import open_photo

FOCAL_PX, BASELINE_M = 1450.4127197265625, 0.06281671905517578
"""Of the one camera, at its full size."""

RANGE_M = (0.3, 5.0)
DELTAS = {"delta1": 1.25, "delta2": 1.25**2, "delta3": 1.25**3}
BADS = (2, 3, 5)


def samples(raw: Tree) -> Sequence[Sample]:
    tops = [top for top in ("", "test/", "real/test/") if raw.dirs(f"{top}left")]
    return [
        Sample(path, PurePosixPath(path).parts[0], partial(_load, raw, top, path))
        for top in tops[:1]
        for path in (found.removeprefix(f"{top}left/") for found in raw.walk(f"{top}left"))
        if path.endswith(".png")
    ]


def _load(raw: Tree, top: str, path: str) -> Case:
    stem = path.removesuffix(".png")
    image = open_photo(Path(raw.url(f"{top}left/{path}"))).image
    disparity = read_depth_image(raw.url(f"{top}disp/{stem}.pfm"))
    mask = open_photo(Path(raw.url(f"{top}mask/{stem}.jpg"))).image[..., 0]
    for what in (disparity, mask):
        if what.shape != image.shape[:2]:
            raise BadFrame("sizes differ", f"{path}: {what.shape}, image {image.shape[:2]}")
    height, width = (side // 2 for side in mask.shape)
    truth = (nearest(disparity, height, width) / 2, nearest(mask, height, width))
    return Case([Shot(image, FOCAL_PX)], partial(_score, *truth))


def _score(disparity: Map, mask: np.ndarray, maps: Sequence[Map], kind: Kind) -> Iterator[Row]:
    p = bilinear(maps[0], *mask.shape).astype(np.float64)
    product = FOCAL_PX / 2 * BASELINE_M
    near, far = RANGE_M
    with np.errstate(divide="ignore", invalid="ignore"):
        truth_m = product / disparity.astype(np.float64)
    valid = (disparity > 0) & np.isfinite(disparity) & (truth_m > near) & (truth_m < far)
    valid &= (p > 0) | (kind == "affine")
    regions = {"illusion": valid & (mask == 255), "rest": valid & (mask == 0), "all": valid}
    rest = regions["rest"]
    if not rest.any():
        return
    with np.errstate(divide="ignore"):
        if kind == "relative":
            depths = {"": 1 / _spread_aligned(p, 1 / np.where(valid, truth_m, 1), rest)}
        elif kind == "affine":
            depths = {"": _spread_aligned(p, truth_m, rest)}
        else:
            depths = {"": p, SCALED: p * (truth_m[rest].mean() / p[rest].mean())}
    for suffix, depth_m in depths.items():
        found = np.clip(depth_m, near, far)
        for name, inside in regions.items():
            if inside.any():
                off_px = np.abs(product / found[inside] - disparity[inside])
                bads = {f"bad{n}": 100 * float((off_px > n).mean()) for n in BADS}
                errors = depth_errors(found[inside], truth_m[inside], DELTAS)
                yield Row(name + suffix, {"epe": float(off_px.mean()), **bads, **errors})


def _spread_aligned(p: Map, target: Map, mask: Bool[np.ndarray, "_ _"]) -> Map:
    """p with the median, and the mean deviation from it, that the target has over the mask."""
    (p_middle, p_spread), (t_middle, t_spread) = (_middle(x[mask]) for x in (p, target))
    return t_spread / max(p_spread, LEAST**2) * (p - p_middle) + t_middle


def _middle(x: np.ndarray) -> tuple[float, float]:
    median = float(np.median(x))
    return median, float(np.abs(x - median).mean())


ILLUSIONS = Benchmark(
    name="3d_visual_illusion",
    protocol=(
        "3D Visual Illusion, real test set (617 frames of 72 scenes), as its authors' evaluator in "
        "StereoSimulator: truth and mask halved (nearest, 960 x 540 px), prediction brought there "
        "bilinearly; true depth of 0.3 to 5 m and predictions above 0 count; illusion: mask 255, "
        "rest: mask 0; relative predictions get the median and mean absolute deviation of the "
        "rest's inverse depth, affine ones those of its depth, metric ones nothing, or (scaled) "
        "the rest's mean; depth brought into 0.3 to 5 m; epe, bad in px of disparity at half size; "
        "mean over frames, those without a region left out of it."
    ),
    layout="left/SCENE/.../frame_N.png, disp/ with .pfm and mask/ with .jpg of the same names",
    source="AdamYao/3D_Visual_Illusion_Depth_Estimation_Real on Hugging Face",
    samples=samples,
    units={
        "epe": "px",
        "rmse": "m",
        "mae": "m",
        **dict.fromkeys([*DELTAS, *(f"bad{n}" for n in BADS)], "%"),
    },
    compared=[
        ("illusion", column)
        for column in ("epe", "bad2", "bad3", "bad5", "abs_rel", "rmse", "delta1")
    ],
    published=[
        Published("DA-V2 (affine)", "P", (5.81, 61.45, 43.18, 30.57, 0.14, 0.15, 92.86)),
        Published("Metric3D (none)", "P", (12.46, 94.11, 91.14, 82.05, 0.34, 0.29, 48.97)),
        Published("Depth Pro (none)", "P", (12.26, 87.08, 80.60, 62.43, 0.28, 0.25, 65.92)),
        Published("DA-V2 metric (scaled)", "P", (5.23, 56.82, 45.50, 28.89, 0.17, 0.15, 93.70)),
        Published("Metric3D (scaled)", "P", (5.70, 66.26, 50.92, 40.43, 0.17, 0.17, 94.80)),
        Published("Depth Pro (scaled)", "P", (4.36, 44.98, 34.98, 24.70, 0.09, 0.10, 93.83)),
        Published("3DVI, stereo and VLM", "P", (1.77, 26.72, 15.73, 3.60, 0.03, 0.08, 99.60)),
        Published("3D-Mirage", "P", (1.75, 26.67, 15.52, 6.59, 0.03, 0.06, 99.50)),
    ],
    remark=(
        "As 3D-Mirage's README prints them; its own row is aligned otherwise (code not published), "
        "and an earlier version of the evaluator had other camera constants."
    ),
)
