"""Published benchmarks: tiny trees in the authors' layouts, scores known in closed form."""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flatdepth.benchmarks import BENCHMARKS, mirage
from flatdepth.benchmarks.base import Benchmark, Row
from flatdepth.benchmarks.maps import nearest
from flatdepth.benchmarks.points import in_order
from flatdepth.benchmarks.run import figures, open_samples
from flatdepth.commands.evaluate import main
from flatdepth.data.readers.files import Tree
from flatdepth.errors import UserError
from flatdepth.models.checkpoint import save_weights
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.models.network import Kind
from flatdepth.models.preprocessing import preprocessing

RNG = np.random.default_rng(0)
Values = Mapping[str, Mapping[str, float]]


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(path)


def png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def scored(name: str, raw: Path, kind: Kind, *maps: np.ndarray, sample: int = 0) -> Values:
    """Region -> values that a prediction (one map per picture) of a sample gets."""
    case = BENCHMARKS[name].samples(Tree(str(raw)))[sample].load()
    rows = list(case.score([one.astype(np.float32) for one in maps], kind))
    assert len({row.region for row in rows}) == len(rows)
    return {row.region: row.values for row in rows}


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    return np.kron(values, np.ones((size, size)))


# --- Booster -----------------------------------------------------------------------------------

PRODUCT = 400.0 * 100.0
"""Focal length in px times baseline in mm: a disparity of 40 px is 1 m."""


def booster(folder: Path, disparity: np.ndarray, classes: np.ndarray, lights: int = 2) -> Path:
    for scene in ("Bath", "Room"):
        inside = folder / "train" / "balanced" / scene
        for light in range(lights):
            picture(inside / "camera_00" / f"im{light}.png", *disparity.shape[::-1])
        np.save(inside / "disp_00.npy", disparity.astype(np.float32))
        png(inside / "mask_cat.png", classes.astype(np.uint8))
        (inside / "calib_00-02.xml").write_text(
            '<?xml version="1.0"?>\n<opencv_storage>\n<mtxL type_id="opencv-matrix"><rows>3</rows>'
            "<cols>3</cols><dt>d</dt><data> 999. 0. 9. 0. 999. 9. 0. 0. 1.</data></mtxL>\n"
            '<proj_matL type_id="opencv-matrix">\n  <rows>3</rows>\n  <cols>4</cols>\n  <dt>d</dt>'
            "\n  <data>\n    4.0e+02 0. 32. 0. 0. 400. 24. 0. 0. 0. 1. 0.</data></proj_matL>\n"
            "<baselineLR>100.</baselineLR>\n</opencv_storage>\n"
        )
    return folder


def test_booster_undoes_what_a_kind_does_not_know(tmp_path: Path) -> None:
    disparity = blocks(RNG.uniform(30, 90, (12, 16)), 4)
    classes = np.zeros((48, 64))
    classes[:, 40:] = 3
    raw = booster(tmp_path, disparity, classes)
    depth_m = PRODUCT / disparity / 1000
    listed = BENCHMARKS["booster"].samples(Tree(str(raw)))
    assert [(one.name, one.scene) for one in listed] == [
        (f"{scene}/im{light}.png", scene) for scene in ("Bath", "Room") for light in (0, 1)
    ]
    exact: dict[Kind, np.ndarray] = {
        "relative": 3 * disparity - 17,
        "metric": depth_m,
        "affine": 0.2 * depth_m + 5,
    }
    for kind, prediction in exact.items():
        found = scored("booster", raw, kind, prediction)
        assert set(found) == {"all", "ToM", "other"}
        for values in found.values():
            assert values["mae"] == pytest.approx(0, abs=1e-2)
            assert values["delta1.05"] == 100
        assert found["all"]["soft_edge_error"] == pytest.approx(0, abs=1e-3)


def test_booster_of_a_constant_worked_by_hand(tmp_path: Path) -> None:
    """Disparities 40 and 80 are fitted by 60: 666.7 mm where 1000 and 500 are true."""
    disparity = np.full((48, 64), 40.0)
    disparity[:, 32:] = 80
    disparity[:, :4] = 0  # unknown
    disparity[:, 32:36] = 0
    classes = np.zeros((48, 64))
    classes[:, 32:] = 2
    found = scored("booster", booster(tmp_path, disparity, classes), "relative", 0 * disparity + 1)
    mae = {"all": 250, "ToM": 1000 / 6, "other": 1000 / 3}
    assert {name: values["mae"] for name, values in found.items()} == pytest.approx(mae, rel=1e-6)
    for values in found.values():
        assert values["abs_rel"] == pytest.approx(1 / 3, rel=1e-6)
    assert found["all"]["rmse"] == pytest.approx(math.sqrt((1000**2 + 500**2) / 18), rel=1e-6)
    assert found["all"]["delta1.25"] == 0
    assert math.isnan(found["all"]["soft_edge_error"])  # nothing known beside what is known


def test_booster_takes_negative_disparity_for_near(tmp_path: Path) -> None:
    """A line fitted to two levels runs below 0 at an outlier, which is then at 1 mm."""
    truth, seen = np.full((48, 64), 40.0), np.zeros((48, 64))
    truth[:, 32:], seen[:, 32:], seen[:, :8] = 400, 1, -2
    line = np.polyval(np.polyfit(seen.ravel(), truth.ravel(), 1), seen)
    assert (line[:, :8] < 0).all()
    depth_mm = np.where(line > 0, PRODUCT / line, 1.0)
    found = scored("booster", booster(tmp_path, truth, np.zeros((48, 64))), "relative", seen)
    assert found["all"]["mae"] == pytest.approx(np.abs(depth_mm - PRODUCT / truth).mean(), rel=1e-5)


# --- 3D Visual Illusion ------------------------------------------------------------------------

FOCAL, BASELINE = 1450.4127197265625, 0.06281671905517578


def illusions(folder: Path, depth_m: np.ndarray, mask: np.ndarray) -> Path:
    """Disparity as PFM, bottom row first; the mask as JPEG."""
    for scene in ("hall/0", "hall/1", "street/0"):
        for kind in ("left", "disp", "mask"):
            (folder / kind / scene).mkdir(parents=True)
        picture(folder / "left" / scene / "frame_7.png", *mask.shape[::-1])
        with np.errstate(divide="ignore"):
            disparity = (FOCAL * BASELINE / depth_m).astype("<f4")
        header = f"Pf\n{mask.shape[1]} {mask.shape[0]}\n-1\n".encode()
        (folder / "disp" / scene / "frame_7.pfm").write_bytes(header + disparity[::-1].tobytes())
        file = folder / "mask" / scene / "frame_7.jpg"
        Image.fromarray(mask.astype(np.uint8)).save(file, quality=100)
    return folder


def illusion_scene() -> tuple[np.ndarray, np.ndarray]:
    """Depth in 2 x 2 blocks, a picture in 8 x 8 ones, a strip that is too far, one not known."""
    depth_m = blocks(RNG.uniform(1.0, 2.0, (24, 32)), 2)
    mask = np.zeros((48, 64))
    mask[16:32, 16:48] = 255
    depth_m[:, :4], depth_m[:, 60:] = 7.0, np.inf
    return depth_m, mask


def test_illusions_aligns_each_kind_outside_the_illusion(tmp_path: Path) -> None:
    depth_m, mask = illusion_scene()
    raw = illusions(tmp_path, depth_m, mask)
    listed = BENCHMARKS["3d_visual_illusion"].samples(Tree(str(raw)))
    assert [one.scene for one in listed] == ["hall", "hall", "street"]
    finite = np.where(np.isinf(depth_m), 50.0, depth_m)
    for kind, prediction in (("relative", 3 / finite + 2), ("affine", 5 * finite + 1)):
        found = scored("3d_visual_illusion", raw, kind, prediction)  # type: ignore[arg-type]
        for name in ("illusion", "rest", "all"):
            assert found[name]["abs_rel"] == pytest.approx(0, abs=1e-5)
            assert (found[name]["bad2"], found[name]["delta1"]) == (0, 100)
    found = scored("3d_visual_illusion", raw, "metric", 1.1 * finite)
    assert found["illusion"]["abs_rel"] == pytest.approx(0.1, rel=1e-5)
    assert found["illusion, scaled"]["abs_rel"] == pytest.approx(0, abs=1e-5)


def test_illusions_counts_a_picture_that_is_not_a_plane(tmp_path: Path) -> None:
    """Right around it and 4 px of disparity (at half size) too near inside."""
    depth_m, mask = illusion_scene()
    raw = illusions(tmp_path, depth_m, mask)
    disparity = FOCAL * BASELINE / np.where(np.isinf(depth_m), 50.0, depth_m)
    found = scored("3d_visual_illusion", raw, "relative", disparity + 8 * (mask > 0))
    assert found["illusion"]["epe"] == pytest.approx(4, rel=1e-4)
    assert [found["illusion"][f"bad{n}"] for n in (2, 3, 5)] == [100, 100, 0]
    assert found["rest"]["epe"] == pytest.approx(0, abs=1e-3)
    share = (8 * 16) / (24 * 28)  # of the pixels with truth, at half size
    assert found["all"]["epe"] == pytest.approx(4 * share, rel=1e-3)


# --- ordinal -----------------------------------------------------------------------------------


def da_2k(folder: Path, drop: bool = False) -> Path:
    """Points as (row, column) in pictures of 40 x 30 px."""
    pairs = {
        "images/indoor/a.jpg": [
            {"point1": [0, 0], "point2": [0, 39], "closer_point": "point1"},
            {"point1": [29, 30], "point2": [0, 10], "closer_point": "point2"},
            {"point1": [3, 20], "point2": [3, 5], "closer_point": "point1"},
        ],
        "images/object/b.jpg": [
            {"point1": [9, 7], "point2": [29, 7], "closer_point": "point1"},
        ],
    }
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "annotations.json").write_text(json.dumps(pairs))
    for name in list(pairs)[: 1 if drop else 2]:
        picture(folder / name, 40, 30)
    return folder


def test_da_2k_worked_by_hand(tmp_path: Path) -> None:
    """Depth rises with the column: two of three right in a, a tie in b."""
    raw = da_2k(tmp_path / "DA-2K").parent
    depth_m = np.broadcast_to(np.arange(1.0, 41), (30, 40))
    two_thirds = pytest.approx(200 / 3)
    for kind, prediction in (("metric", depth_m), ("affine", -9 + depth_m), ("relative", -depth_m)):
        found = scored("da_2k", raw, kind, prediction)  # type: ignore[arg-type]
        assert found == {"indoor": {"accuracy": two_thirds}, "all": {"accuracy": two_thirds}}
    assert scored("da_2k", raw, "metric", depth_m, sample=1)["object"] == {"accuracy": 0}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_is_symmetric_and_blind_to_monotonic_changes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depth_m = rng.permutation(np.arange(1.0, 121)).reshape(10, 12)
    points = rng.integers(0, 10, (50, 2, 2))
    points = points[(points[:, 0] != points[:, 1]).any(axis=1)]
    found = in_order(depth_m, "metric", points)
    assert (found != in_order(depth_m, "metric", points[:, ::-1])).all()
    assert (found == in_order(1 / depth_m, "relative", points)).all()
    assert (found == in_order(np.log(depth_m), "affine", points)).all()
    expected = [depth_m[v0, u0] < depth_m[v1, u1] for (u0, v0), (u1, v1) in points.tolist()]
    assert found.tolist() == expected


@pytest.mark.parametrize("mark", [".", "/"])
def test_layered_depth_pools_tuples_and_leaves_out_what_is_not_real(
    tmp_path: Path, mark: str
) -> None:
    def one(*points: tuple[int, int], real: bool = True) -> dict[str, object]:
        return {f"p{i}": [u, v, 1] for i, (u, v) in enumerate(points, 1)} | {"is_real": real}

    first = {
        "pairs": [one((0, 0), (5, 0)), one((5, 3), (2, 0)), one((9, 9), (0, 40))],
        "trips": [one((0, 0), (5, 0), (9, 0)), one((0, 0), (1, 0), (0, 5), real=False)],
        "quads": [one((0, 0), (5, 0), (9, 0), (9, 5))],
    }
    picture(tmp_path / f"17{mark}image.png", 20, 10)
    layers = {"layer_first": first, "layer_all": {}}
    (tmp_path / f"17{mark}tuples.json").write_text(json.dumps(layers))
    depth_m = np.broadcast_to(np.arange(1.0, 21), (10, 20))
    raw = Tree(str(tmp_path))
    (sample,) = BENCHMARKS["layered_depth"].samples(raw)
    rows = {row.region: row for row in sample.load().score([depth_m], "metric")}
    accuracies = {region: row.values["accuracy"] for region, row in rows.items()}
    assert accuracies == {"pairs": 50, "triplets": 100, "quadruplets": 0}  # a tie at the end
    assert [row.weight for row in rows.values()] == [2, 1, 1]
    assert sample.name == "17"


# --- Mirror3D ----------------------------------------------------------------------------------


def mirror3d(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A slanted wall with a mirror whose raw depth is 1 m behind: (raw, wall in m, mask)."""
    wall_mm = np.broadcast_to(np.arange(1500, 1500 + 304), (228, 304)).astype(np.uint16)
    mask = np.zeros((228, 304), np.uint16)
    mask[50:150, 100:200] = 2
    sensor_mm = (wall_mm + 1000 * (mask > 0)).astype(np.uint16)
    lines = ["instance_id,sample_id,scene_id,split"]
    for name, split in (("45", "test"), ("664", "train"), ("7", "test")):
        picture(folder / "mirror_color_images" / f"{name}.jpg", 304, 228)
        png(folder / "mirror_instance_mask_precise" / f"{name}.png", mask)
        png(folder / "raw_sensorD" / f"{name}.png", sensor_mm)
        png(folder / "delta_depth_precise" / f"{name}.png", wall_mm - sensor_mm)
        lines += [f"1,{name},room_{name},{split}", f"2,{name},room_{name},{split}"]
    (folder / "nyu.csv").write_text("\n".join(lines))
    return folder, wall_mm / 1000, mask > 0


def test_mirror3d_takes_the_plane_for_truth_and_fits_outside_mirrors(tmp_path: Path) -> None:
    raw, wall_m, mask = mirror3d(tmp_path)
    listed = BENCHMARKS["mirror3d_nyu"].samples(Tree(str(raw)))
    assert [(one.name, one.scene) for one in listed] == [("45", "room_45"), ("7", "room_7")]
    fooled_m = wall_m + mask
    exact: dict[Kind, np.ndarray] = {
        "metric": wall_m,
        "relative": 2 / wall_m - 7,
        "affine": 9 * wall_m + 3,
    }
    for kind, prediction in exact.items():
        found = scored("mirror3d_nyu", raw, kind, prediction)
        assert found["mirror"]["rmse"] == pytest.approx(0, abs=1e-5)
        assert found["mirror, raw depth"]["rmse"] == pytest.approx(1, abs=1e-5)
        assert found["all"]["delta1.05"] == 100
    for kind, prediction in (("metric", fooled_m), ("relative", 2 / fooled_m - 7)):
        found = scored("mirror3d_nyu", raw, kind, prediction)  # type: ignore[arg-type]
        assert found["mirror"]["rmse"] == pytest.approx(1, abs=1e-5)
        assert found["rest"]["rmse"] == pytest.approx(0, abs=1e-5)
        share = nearest(mask, 480, 640).mean()
        assert found["all"]["rmse"] == pytest.approx(math.sqrt(share), rel=1e-5)


def test_mirror3d_scales_by_the_whole_image(tmp_path: Path) -> None:
    raw, wall_m, _ = mirror3d(tmp_path)
    found = scored("mirror3d_nyu", raw, "metric", 1.5 * wall_m)["mirror"]
    assert found["scaled_rmse"] == pytest.approx(0, abs=1e-5)
    assert found["abs_rel"] == pytest.approx(0.5, rel=1e-5)
    assert (found["delta1.25"], found["delta2"]) == (0, 100)


# --- 3D-Mirage ---------------------------------------------------------------------------------


def slow_relief(values: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values[mask], [0.01, 0.99])
    z = np.clip((values - low) / (high - low + 1e-6), 0, 1)
    height, width = z.shape
    bends = []
    for v in range(height):
        for u in range(width):
            if mask[v, u]:
                left, right = z[v, max(u - 1, 0)], z[v, min(u + 1, width - 1)]
                above, below = z[max(v - 1, 0), u], z[min(v + 1, height - 1), u]
                curved = (left - 2 * z[v, u] + right) ** 2 + (above - 2 * z[v, u] + below) ** 2
                bends.append(math.sqrt(curved + 1e-12))
    bends.sort(reverse=True)
    kept = [bend for bend in bends if bend >= np.quantile(bends, 0.1)]
    return sum(bends[: max(1, math.ceil(0.1 * len(bends)))]), sum(kept) / len(kept)


def test_relief_against_loops_over_pixels() -> None:
    for _ in range(3):
        values, mask = RNG.normal(size=(30, 41)), RNG.random((30, 41)) < 0.6
        assert mirage.relief(values, mask) == pytest.approx(slow_relief(values, mask), rel=1e-4)


def test_relief_of_a_plane_is_that_of_the_two_lines_where_it_is_clipped() -> None:
    """101 columns: the 1st and 99th percentile are those of columns 1 and 99, the slope 1/98."""
    ramp = np.broadcast_to(np.linspace(2.0, 5.0, 101), (40, 101))
    everywhere = np.ones(ramp.shape, bool)
    top, _ = mirage.relief(ramp, everywhere)
    assert top == pytest.approx(40 * 2 / 98, rel=1e-3)
    inner = everywhere.copy()
    inner[:, :5] = inner[:, -5:] = False
    held = np.broadcast_to(np.clip(np.linspace(-1, 1, 101), -0.9, 0.9), (40, 101))
    sizes = [mirage.relief(scale * held + 7, inner)[0] for scale in (1, 50)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)  # blind to scale and shift
    assert mirage.relief(np.full((40, 101), 3.0), everywhere) == pytest.approx(
        (404 * 1e-6, 1e-6), rel=1e-3
    )


def test_composites_worked_by_hand() -> None:
    """Crops with (x, y) = (3, 4) and (0, 0), and for ccs (1, 0) and (0, 3)."""
    means = {"s_full": 1.5, "s_crop": 2.0, "s_hypot": 2.5, "m_full": 0.5, "m_crop": 1.5}
    means["m_apart"] = 2.0
    found = mirage.composites({k: np.array([v]) for k, v in means.items()})
    assert found["dcs"].item() == 2.5 + 2.5
    assert found["ccs"].item() == pytest.approx((1 + 2) / math.sqrt(2))


def mirage_tree(folder: Path, count: int, corners: Sequence[Sequence[float]]) -> Path:
    for number in range(count):
        picture(folder / f"{number:04d}.jpg", 120, 90)
        shapes = [
            {"label": "illu", "points": [list(c) for c in corners], "shape_type": "polygon"},
            {"label": "illu", "points": [[1, 1], [5, 5]], "shape_type": "rectangle"},
            {"label": "other", "points": [[0, 0], [9, 0], [9, 9]]},
        ]
        (folder / f"{number:04d}.json").write_text(json.dumps({"shapes": shapes}))
    return folder


def test_mirage_splits_and_crops_by_the_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A polygon over everything: every draw is taken, picture after picture."""
    raw = mirage_tree(tmp_path, 20, [(-1, -1), (121, -1), (121, 91), (-1, 91)])
    found = mirage.samples(Tree(str(raw)))
    test = sorted(np.random.RandomState(1337).permutation(20)[:2].tolist())
    assert [one.name for one in found] == [f"{number:04d}.jpg" for number in test]
    assert "20 of 468 scenes" in capsys.readouterr().err
    draws = random.Random(1337)
    for sample in found:
        boxes = []
        for _ in range(4):
            w, h = int(120 * draws.uniform(0.35, 0.95)), int(90 * draws.uniform(0.35, 0.95))
            left, top = draws.randint(0, 120 - w), draws.randint(0, 90 - h)
            boxes.append((left, top, left + w, top + h))
        assert sample.load.args[2] == boxes  # type: ignore[attr-defined]


def test_mirage_falls_back_to_crops_around_a_small_outline(tmp_path: Path) -> None:
    raw = mirage_tree(tmp_path, 10, [(40, 30), (52, 30), (52, 40), (40, 40)])
    (sample,) = mirage.samples(Tree(str(raw)))
    boxes = sample.load.args[2]  # type: ignore[attr-defined]
    assert len(boxes) == 4
    for left, top, right, bottom in boxes:
        overlap = (min(right, 52) - max(left, 40)) * (min(bottom, 40) - max(top, 30))
        assert overlap >= 0.4 * (right - left) * (bottom - top) - 1e-9


def test_mirage_of_a_flat_map_and_of_a_map_with_relief_inside(tmp_path: Path) -> None:
    raw = mirage_tree(tmp_path, 10, [(20, 20), (100, 20), (100, 80), (20, 80)])
    (sample,) = mirage.samples(Tree(str(raw)))
    case = sample.load()
    assert [shot.image.shape for shot in case.shots] == [(480, 640, 3)] * 5
    assert all(shot.at_network for shot in case.shots)
    flat = [np.full((518, 686), 0.3, np.float32)] * 5
    bumpy = [one + RNG.normal(size=one.shape).astype(np.float32) for one in flat]
    for kind in ("relative", "metric"):
        level, rough = (list(case.score(maps, kind)) for maps in (flat, bumpy))  # type: ignore[arg-type]
        assert len(level) == len(rough) == 4
        for low, high in zip(level, rough, strict=True):
            assert low.values["s_hypot"] < 0.1 < 1000 < high.values["s_hypot"]
            assert low.values["m_apart"] < 1e-6


def test_a_crop_is_cut_from_the_map_of_the_whole_picture() -> None:
    """A map that is affine in its pixel indices keeps its values at the places of the crop."""
    v, u = np.mgrid[0:518, 0:686].astype(np.float64)
    found = mirage.cut(2 * u + 3 * v, (343, 259), (100, 50, 200, 150))
    v, u = np.mgrid[0:518, 0:686].astype(np.float64)
    expected = 2 * (200 + u * 200 / 685) + 3 * (100 + v * 200 / 517)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_region_masks_follow_opencv_and_their_holes() -> None:
    cv2 = pytest.importorskip("cv2")
    outer = np.array([(10, 8), (95, 14), (88, 70), (20, 80)], np.float32)
    hole = np.array([(40, 30), (60, 33), (55, 50)], np.float32)
    box = (5, 4, 110, 84)
    drawn = np.zeros(mirage.MAP, np.uint8)
    for ink, polygon in ((1, outer), (0, hole)):
        scale = np.array([686 / 105, 518 / 80], np.float32)
        corners = ((polygon - np.array([5, 4], np.float32)) * scale).astype(np.int32)
        cv2.fillPoly(drawn, [corners], ink)
    found = mirage.region_mask([hole, outer], box)
    assert (found & (drawn > 0)).sum() / (found | (drawn > 0)).sum() > 0.995
    assert not mirage.region_mask([outer, outer.copy()], box).any()  # each covers the other
    apart = mirage.region_mask([outer, hole + 60], box)
    assert apart.sum() > found.sum()


# --- what all share ----------------------------------------------------------------------------


def test_others_figures_stand_under_their_columns() -> None:
    assert set(BENCHMARKS) == {
        *("booster", "3d_visual_illusion", "3d_mirage", "layered_depth", "da_2k", "mirror3d_nyu")
    }
    for one in BENCHMARKS.values():
        assert all(len(row.figures) == len(one.compared) for row in one.published)


def pooled(rows: Iterable[Row]) -> float:
    kept = list(rows)
    return sum(r.weight * r.values["accuracy"] for r in kept) / sum(r.weight for r in kept)


def test_figures_are_pooled_paired_and_drawn_by_scene() -> None:
    benchmark = BENCHMARKS["da_2k"]
    weights = RNG.integers(1, 5, 40).tolist()
    accuracies = RNG.uniform(0, 100, 40).tolist()
    a = [[Row("all", {"accuracy": x}, w)] for x, w in zip(accuracies, weights, strict=True)]
    b = [[Row("all", {"accuracy": x + 2}, w)] for x, w in zip(accuracies, weights, strict=True)]
    scenes = [str(number // 4) for number in range(40)]
    tables, differences = figures(benchmark, {"A": a, "B": b}, scenes, 500)
    value = tables["A"]["all"]["accuracy"]
    assert value["value"] == pytest.approx(pooled(row for (row,) in a))
    assert value["interval"][0] < value["value"] < value["interval"][1]
    apart = differences["B - A"]["all"]["accuracy"]
    assert (apart["value"], *apart["interval"]) == pytest.approx((2, 2, 2))
    tables, _ = figures(benchmark, {"A": a}, ["one"] * 40, 500)
    assert tables["A"]["all"]["accuracy"]["interval"] is None


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_a_directory_of_another_layout_is_one_sentence(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no such directory; expected .*, of "):
        open_samples(benchmark, str(tmp_path / "missing"))
    (tmp_path / "something").mkdir()
    with pytest.raises(UserError, match=r"--raw: .*expected .* found something/"):
        open_samples(benchmark, str(tmp_path))


def weights(folder: Path, kind: Kind) -> str:
    torch.manual_seed(0)
    model = DepthAnythingV2("vitt", kind=kind, max_depth_m=10.0)
    return str(save_weights(model, folder / f"{kind}=0")[1])


def test_the_command_compares_systems_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = da_2k(tmp_path / "raw"), tmp_path / "eval.json"
    checkpoints = [weights(tmp_path, "metric"), weights(tmp_path, "relative")]
    arguments = [f"--checkpoint={one}" for one in checkpoints]
    main(["--benchmark=da_2k", f"--raw={raw}", *arguments, "--size=84", f"--out={out}"])
    text, document = capsys.readouterr().out, json.loads(out.read_text())
    assert "da_2k: 2 samples of 2 scenes" in text and "B - A" in text and "DA-V2 Small [P]" in text
    assert document["command"][:3] == ["flatdepth", "evaluate", "--benchmark=da_2k"]
    for label, kind in (("A", "metric"), ("B", "relative")):
        assert document["contenders"][label]["kind"] == kind
        rows = [row for row in document["rows"][label] if row[2] == "all"]
        mean = sum(weight * row["accuracy"] for *_, weight, row in rows) / 4
        assert document["tables"][label]["all"]["accuracy"]["value"] == pytest.approx(mean)
    again = ["--benchmark=da_2k", f"--raw={raw}", *arguments, f"--out={out}"]
    with pytest.raises(UserError, match="--overwrite"):
        main(again)


def test_a_region_that_only_the_second_system_has_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = illusions(tmp_path / "raw", *illusion_scene())
    kinds: tuple[Kind, ...] = ("relative", "metric")
    checkpoints = [f"--checkpoint={weights(tmp_path, kind)}" for kind in kinds]
    main(["--benchmark=3d_visual_illusion", f"--raw={raw}", *checkpoints, "--size=84"])
    text = capsys.readouterr().out
    assert "illusion, scaled (3)" in text and "B, scaled, here" in text
    assert "A, scaled, here" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark=da_2k", "--raw=x", "--paste=1"], "--paste: a benchmark has its own"),
        (["--benchmark=da_2k"], "needs --raw, a directory of depth-anything/DA-2K"),
        ([], "either --data with shard sets, or --benchmark"),
        (["--data=x", "--raw=y"], "either --data with shard sets, or --benchmark"),
        (["--benchmark=da_2k", "--raw=x"], "--raw: x: no such directory"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--checkpoint=dpt_large=random", *arguments])


def test_damage_ends_the_run_with_the_file(tmp_path: Path) -> None:
    raw = da_2k(tmp_path, drop=True)
    with pytest.raises(UserError, match=r"--raw: images/object/b.jpg: .*download the file anew"):
        main([f"--checkpoint={weights(tmp_path, 'metric')}", "--benchmark=da_2k", f"--raw={raw}"])


@pytest.mark.parametrize("name", ["depth_anything_v2", "marigold", "zoedepth", "dpt_square"])
def test_trimmed_predictions_show_the_picture_alone(name: str) -> None:
    """A white rim of the picture is the rim of what is kept: padding and mirrored rims are gone."""
    way = preprocessing(name)
    rows, columns = way.network_size(100, 131)
    picture = torch.zeros(1, 3, 100, 131)
    picture[..., 0, :] = picture[..., -1, :] = 1
    picture[..., 0] = picture[..., -1] = 1
    kept = way.trim(way.prepare(picture)[:, :1], 100, 131)
    assert kept.shape[-2] <= rows and kept.shape[-1] <= columns
    inner = kept[0, 0, 12:-12, 12:-12]
    assert inner.abs().max() < 0.05
    for rim in (kept[..., :5, :], kept[..., -5:, :], kept[..., :5], kept[..., -5:]):
        assert rim.max() > 0.2
