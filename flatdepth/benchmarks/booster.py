"""Booster: transparent and mirror things in high resolution, truth by stereo on painted scenes.

Ramirez et al. 2022; the monocular protocol is that of Depth4ToM (Costanzino et al. 2023).
"""

import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from flatdepth.benchmarks.base import Benchmark, Case, Published, Row, Sample, Shot
from flatdepth.benchmarks.maps import (
    Map,
    bilinear,
    depth_errors,
    fit_line,
    inverse_depth,
    nearest,
)
from flatdepth.data.readers.files import Tree, damage_named, read_bytes, read_grey_image
from flatdepth.errors import BadFrame
from flatdepth.judge.boundaries import soft_edge_error
from flatdepth.models.network import Kind
from flatdepth.predict.inputs import open_photo

REDUCTION = 4
NEAR_MM, FAR_MM = 1.0, 10_000.0
RATIOS = {f"delta{r:.2f}": r for r in (1.25, 1.20, 1.15, 1.10, 1.05)}
CLASSES = {"all": (0, 1, 2, 3), "ToM": (2, 3), "other": (0, 1)}
"""Values of mask_cat.png; ToM: transparent or mirror."""


def samples(raw: Tree) -> Sequence[Sample]:
    return [
        Sample(f"{scene}/{name}", scene, partial(_load, raw, f"{top}{scene}", name))
        for top in ("train/balanced/", "balanced/", "train/", "")
        for scene in raw.dirs(top.rstrip("/"))
        for name in raw.files(f"{top}{scene}/camera_00")
        if re.fullmatch(r"im\d+\.png", name)
    ]


def _load(raw: Tree, folder: str, name: str) -> Case:
    url = raw.url(f"{folder}/disp_00.npy")
    with damage_named("disparity unreadable", url):
        disparity = np.load(io.BytesIO(read_bytes(url)), allow_pickle=False).astype(np.float32)
    classes = read_grey_image(raw.url(f"{folder}/mask_cat.png"), "mask")
    image = open_photo(Path(raw.url(f"{folder}/camera_00/{name}"))).image
    for what in (classes, disparity):
        if what.shape != image.shape[:2]:
            raise BadFrame("sizes differ", f"{folder}: {what.shape}, image {image.shape[:2]}")
    focal_px, baseline_mm = _calibration(raw.url(f"{folder}/calib_00-02.xml"))
    size = (image.shape[0] // REDUCTION, image.shape[1] // REDUCTION)
    truth = _Truth(
        nearest(disparity, *size) / REDUCTION,
        nearest(classes, *size),
        focal_px / REDUCTION * baseline_mm,
    )
    return Case([Shot(image, focal_px)], truth.score)


def _calibration(url: str) -> tuple[float, float]:
    """(focal length in px of the rectified left view, baseline in mm) of an OpenCV file."""
    with damage_named("calibration unreadable", url):
        text = read_bytes(url).decode()
        focal = re.search(r"<proj_matL\b.*?<data>\s*(\S+)", text, re.DOTALL)
        baseline = re.search(r"<baselineLR>\s*([^\s<]+)", text)
        if focal is None or baseline is None:
            raise ValueError("expected the nodes proj_matL and baselineLR")
        return float(focal[1]), float(baseline[1])


class _Truth:
    """Disparity in px at the reduced size (0: unknown), classes, and focal px times baseline mm."""

    def __init__(self, disparity: Map, classes: np.ndarray, product: float) -> None:
        known = (disparity >= product / FAR_MM) & (disparity <= product / NEAR_MM)
        self.disparity, self.known = np.where(known, disparity, 0).astype(np.float64), known
        self.classes, self.product = classes, product

    def score(self, maps: Sequence[Map], kind: Kind) -> Iterator[Row]:
        if not self.known.any():
            return
        p = inverse_depth(bilinear(maps[0], *self.known.shape), kind)
        with np.errstate(divide="ignore"):
            truth_mm = self.product / self.disparity
            if kind == "affine":
                depth_mm = fit_line(p, truth_mm, self.known)
            else:
                depth_mm = self.product / fit_line(p, self.disparity, self.known)
        depth_mm = np.clip(depth_mm, NEAR_MM, FAR_MM)
        for name, values in CLASSES.items():
            inside = self.known & np.isin(self.classes, values)
            if inside.any():
                found = depth_errors(depth_mm[inside], truth_mm[inside], RATIOS)
                if name == "all":
                    found["soft_edge_error"] = soft_edge_error(
                        self.product / depth_mm, self.disparity, self.known
                    )
                yield Row(name, found)


BOOSTER = Benchmark(
    name="booster",
    protocol=(
        "Booster, training split, balanced left views under every illumination (228 images of 38 "
        "scenes), as Depth4ToM evaluates monocular depth: truth reduced 4 times (nearest, 1028 x "
        "752 px), prediction brought there bilinearly; true depth of 1 mm to 10 m counts; scale "
        "and shift fitted by least squares to the disparity of all of it (inverse depth of metric "
        "systems; affine depth, which has no inverse, is fitted to the depth instead); depth "
        "brought into 1 mm to 10 m, negative disparity to 1 mm; ToM: transparent or mirror; see: "
        "soft edge error of SMD-Nets in px of disparity at the reduced size, not part of theirs; "
        "mean over images."
    ),
    layout="train/balanced/SCENE/camera_00/im0.png, disp_00.npy, mask_cat.png, calib_00-02.xml",
    source="the Booster data set of the University of Bologna (AMS Acta 6876)",
    samples=samples,
    units={"rmse": "mm", "mae": "mm", "soft_edge_error": "px", **dict.fromkeys(RATIOS, "%")},
    compared=[
        ("all", "rmse"),
        ("ToM", "rmse"),
        ("other", "rmse"),
        ("ToM", "abs_rel"),
        ("ToM", "delta1.05"),
    ],
    published=[
        Published("MiDaS", "S", (120.51, 140.31, 119.86, 0.12, 36.28)),
        Published("DPT-Large", "S", (100.68, 136.28, 95.63, 0.10, 37.70)),
        Published("DPT-Large, Depth4ToM", "S", (85.93, 83.06, 85.57, 0.06, None)),
    ],
    remark="Entries to the NTIRE challenges were trained on these scenes and do not compare.",
)
