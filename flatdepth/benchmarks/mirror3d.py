"""Mirror3D on NYU Depth V2: the plane of real mirrors, annotated by hand (Tan et al. 2021)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from flatdepth.benchmarks.base import Benchmark, Case, Published, Row, Sample, Shot
from flatdepth.benchmarks.maps import Map, depth_errors, nearest
from flatdepth.data.readers.files import Tree, read_depth_image, read_grey_image, read_table
from flatdepth.judge.protocol import align, own_alignment
from flatdepth.models.network import Kind
from flatdepth.predict.inputs import open_photo

FOCAL_PX = 519.0
HEIGHT, WIDTH = 480, 640
RANGE_M = (1e-3, 10.0)
RATIOS = {f"delta{r:.3g}": r for r in (1.05, 1.10, 1.25)}
RATIOS |= {"delta2": 1.25**2, "delta3": 1.25**3}


def samples(raw: Tree) -> Sequence[Sample]:
    if not raw.is_file("nyu.csv"):
        return []
    rows = read_table(raw.url("nyu.csv"), ["sample_id", "scene_id", "split"])
    test = {row["sample_id"]: row["scene_id"] for row in rows if row["split"] == "test"}
    return [Sample(name, scene, partial(_load, raw, name)) for name, scene in sorted(test.items())]


def _load(raw: Tree, name: str) -> Case:
    image = open_photo(Path(raw.url(f"mirror_color_images/{name}.jpg"))).image
    sensor_mm = read_depth_image(raw.url(f"raw_sensorD/{name}.png"))
    # Differences below 0 are stored modulo 2^16, and so is their sum right.
    refined_mm = sensor_mm + read_depth_image(raw.url(f"delta_depth_precise/{name}.png"))
    mask = read_grey_image(raw.url(f"mirror_instance_mask_precise/{name}.png"), "mask")
    mirror = nearest(mask, HEIGHT, WIDTH) > 0
    truths = {
        suffix: nearest(codes, HEIGHT, WIDTH) / 1000
        for suffix, codes in (("", refined_mm), (", raw depth", sensor_mm))
    }

    def score(maps: Sequence[Map], kind: Kind) -> Iterator[Row]:
        for suffix, truth_m in truths.items():
            yield from _compare(maps[0], truth_m, mirror, kind, suffix)

    return Case([Shot(image, FOCAL_PX)], score)


def _compare(
    prediction: Map, truth_m: Map, mirror: Bool[np.ndarray, "h w"], kind: Kind, suffix: str
) -> Iterator[Row]:
    near, far = RANGE_M
    valid = truth_m > near
    aligned = align(
        _batch(nearest(prediction, HEIGHT, WIDTH).astype(np.float64)),
        _batch(np.where(valid, truth_m, 1.0)),
        _batch(valid & ~mirror),
        kind=kind,
        alignment=own_alignment(kind),
        range_m=RANGE_M,
    )[0, 0].numpy()
    found = np.maximum(np.where(np.isinf(aligned), far, aligned), near).astype(np.float64)
    scale = (found[valid] * truth_m[valid]).sum() / (found[valid] ** 2).sum()
    for name, region in (("mirror", mirror), ("rest", ~mirror), ("all", mirror | True)):
        inside = valid & region
        if inside.any():
            p_m, t_m = found[inside], truth_m[inside]
            errors = depth_errors(p_m, t_m, RATIOS)
            errors["scaled_rmse"] = float(np.sqrt(((scale * p_m - t_m) ** 2).mean()))
            yield Row(name + suffix, errors)


def _batch(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[None, None]


MIRROR3D_NYU = Benchmark(
    name="mirror3d_nyu",
    protocol=(
        "Mirror3D, NYU test split (55 images with mirrors): truth, mask and prediction brought to "
        "640 x 480 px (nearest); true depth above 1 mm counts; metric predictions as they are, "
        "relative and affine ones with scale and shift fitted by least squares in their own "
        "quantity outside the mirrors, which is not part of the authors' protocol; truth is the "
        "depth with mirrors refined to planes (precise masks), and the sensor's raw depth for "
        "comparison; scaled_rmse: after one scale fitted to the whole image; mean over images. "
        "Left out: SSIM, which the authors compute across the edge of the mask, and images without "
        "mirror pixels, which their script counts as perfect."
    ),
    layout=(
        "nyu.csv (from docs/metadata of the repository), mirror_color_images/ID.jpg, and "
        "raw_sensorD/, delta_depth_precise/ and mirror_instance_mask_precise/ with ID.png"
    ),
    source="Mirror3D of Simon Fraser University (3dlg-hcvc/mirror3d on GitHub), and NYU Depth V2",
    samples=samples,
    units={**dict.fromkeys(("rmse", "mae", "scaled_rmse"), "m"), **dict.fromkeys(RATIOS, "%")},
    compared=[("mirror", "rmse")],
    published=[
        Published("sensor depth -> with Mirror3DNet: before", "S", (1.272,)),
        Published("sensor depth -> with Mirror3DNet: after", "S", (0.766,)),
        Published("BTS", "S", (0.903,)),
        Published("BTS with Mirror3DNet", "S", (0.567,)),
    ],
    remark="All metric and trained on NYU: no row compares with a relative or zero-shot system.",
)
