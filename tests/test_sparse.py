"""Pastes in streets of which only a lidar's returns are known, and boards on the ground."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.augment.draw.composite import as_params, from_params, paste, stack_plans
from flatdepth.augment.draw.content import Content, Sources, make_content
from flatdepth.augment.plan.coarse import thin_view
from flatdepth.augment.plan.layout import Paste, plan_pastes
from flatdepth.augment.reference import paste_reference
from flatdepth.augment.rng import Draws
from flatdepth.config import LayoutShares, PasteConfig
from flatdepth.geometry import View, pixel_rays, project
from flatdepth.types import Batch, Frame, Region

HEIGHT, WIDTH = 375, 700  # KITTI's camera, its image cut at the sides
K = np.array([[721.5, 0, 350.0], [0, 721.5, 172.9], [0, 0, 1]])
CAMERA_M = 1.65
RANGE_M = (0.1, 80.0)
WHOLE = View(top=0, left=0, crop_height=HEIGHT, crop_width=WIDTH, height=HEIGHT, width=WIDTH)
HUNG = PasteConfig(
    share=1.0,
    max_pastes=2,
    area=(0.01, 0.2),
    depth_noise=0.0005,
    layout=LayoutShares(hung=1.0, standing=0.0),
)
STANDING = dataclasses.replace(HUNG, layout=LayoutShares(hung=0.0, standing=1.0))
GROUND = np.array([0.0, 1 / CAMERA_M, 0.0])


def facades(seed: int) -> np.ndarray:
    """(3, 3) planes in 1/m of the walls left, right and across a street's end."""
    rng = np.random.default_rng(seed)
    yaw, left, right, end = rng.uniform((-0.5, 4.0, 4.0, 15.0), (0.5, 9.0, 9.0, 40.0))
    along, across = (
        np.array([np.sin(yaw), 0, np.cos(yaw)]),
        np.array([np.cos(yaw), 0, -np.sin(yaw)]),
    )
    return np.stack([-across / left, across / right, along / end])


def rays() -> np.ndarray:
    v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    return pixel_rays(K, u, v)


def street(seed: int, *, cars: bool = False) -> Frame:
    """Ground between facades, and on request a post and a car's side in front of them."""
    inverse = np.maximum((rays() @ facades(seed).T).max(axis=-1), rays() @ GROUND)
    if cars:
        inverse[:330, 380:400] = 1 / 3.5
        inverse[190:300, 100:330] = 1 / 4.5
    image = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    depth = (1 / inverse).astype(np.float32)
    return Frame(image=image, depth_m=depth, K_px=K, key=str(seed), dataset="t", scene="s")


def scanned(frame: Frame, seed: int = 0, noise_m: float = 0.0) -> Frame:
    """What a lidar of 64 beams from -24.8 to 2 degrees every 0.16 degrees knows of a frame."""
    rng = np.random.default_rng(seed)
    up, right = np.meshgrid(
        np.deg2rad(np.linspace(-24.8, 2.0, 64)), np.deg2rad(np.arange(-50, 50, 0.16)), indexing="ij"
    )
    beams = np.stack([np.cos(up) * np.sin(right), -np.sin(up), np.cos(up) * np.cos(right)], -1)
    column, row = np.floor(project(K, beams)).astype(int).reshape(-1, 2).T
    seen = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    row, column = row[seen], column[seen]
    depth = np.full((HEIGHT, WIDTH), np.nan, np.float32)
    depth[row, column] = frame.depth_m[row, column] + rng.normal(0, noise_m, len(row))
    return dataclasses.replace(frame, depth_m=depth)


def plan(frame: Frame, identity: int, config: PasteConfig = HUNG) -> tuple[Paste, ...]:
    return plan_pastes(
        thin_view(frame, WHOLE),
        Draws(0, 0, identity),
        config,
        picture_aspects=np.array([0.7, 1.0, 1.6]),
        depth_range_m=RANGE_M,
    )


SOURCES = Sources(
    picture=lambda number: street(number).image,
    frame=lambda number: scanned(street(number % 5)),
)


def contents(frame: Frame, pastes: tuple[Paste, ...]) -> list[Content]:
    return [make_content(one, frame, WHOLE, K, SOURCES) for one in pastes]


def pasted(frame: Frame, pastes: tuple[Paste, ...], shown: list[Content]) -> tuple[Batch, Batch]:
    depth = torch.from_numpy(frame.depth_m)[None, None]
    valid = depth.isfinite()
    before = Batch(
        image=torch.from_numpy(frame.image).movedim(-1, 0)[None].float() / 255,
        depth_m=torch.where(valid, depth, 0.0),
        valid=valid,
        region=torch.zeros_like(valid, dtype=torch.uint8),
        K_px=torch.from_numpy(K)[None],
        sample=torch.tensor([0]),
    )
    groups = stack_plans([pastes], [shown], K[None], height=HEIGHT, width=WIDTH)
    groups = from_params(as_params(groups))
    return before, paste(before, groups, depth_range_m=RANGE_M)


def test_posters_hang_on_the_facades_that_a_lidar_sees() -> None:
    hung = []
    for seed in range(30):
        frame = scanned(street(seed), seed, noise_m=0.02)
        assert 0.04 < np.isfinite(frame.depth_m).mean() < 0.07
        pastes = plan(frame, seed, dataclasses.replace(HUNG, thickness_m=(0.04, 0.04)))
        hung += [(seed, one) for one in pastes if one.layout == "hung"]
    assert len(hung) >= 25
    angles = []
    for seed, one in hung:
        walls = facades(seed)
        distance = 1 / np.linalg.norm(walls, axis=1)
        normals = walls * distance[:, None]
        own = one.rectangle.plane / np.linalg.norm(one.rectangle.plane)
        wall = int(np.argmax(normals @ own))
        angles.append(np.degrees(np.arccos(min(normals[wall] @ own, 1.0))))
        gap = distance[wall] - one.rectangle.centre @ normals[wall]
        assert abs(gap - min(0.04, 0.02 * distance[wall])) < 0.02
        corners = one.rectangle.corners()
        assert corners[:, 1].max() < CAMERA_M + 0.02
        assert max(one.rectangle.width, one.rectangle.height) <= 6.0
    # 2 cm of noise on some 30 returns over 1 m: 0.02 / (0.29 sqrt(30)) is 0.7 degrees
    assert np.median(angles) < 0.2 and max(angles) < 2.0


@pytest.mark.parametrize("is_sparse", [True, False])
def test_boards_stand_on_the_ground_and_in_front_of_what_they_cover(is_sparse: bool) -> None:
    boards = 0
    for seed in range(20):
        whole = street(seed, cars=True)
        for one in plan(scanned(whole) if is_sparse else whole, seed, STANDING):
            boards += 1
            height = CAMERA_M - one.rectangle.corners()[2:, 1]  # of the ends of its lower edge
            assert (height > 0).all() and (height < 0.03 * CAMERA_M).all()
            assert max(one.rectangle.width, one.rectangle.height) <= 6.0
    assert boards >= 20


def test_a_board_hovers_where_no_ground_is_seen() -> None:
    wall = dataclasses.replace(street(0), depth_m=np.full((HEIGHT, WIDTH), 5.0, np.float32))
    for frame in (wall, scanned(wall)):
        (one, *_) = plan(frame, 0, STANDING)
        assert one.layout == "standing" and one.rectangle.corners()[:, 2].max() < 5.0


def test_no_paste_covers_what_stands_in_front_between_the_returns() -> None:
    crossed = covered = 0
    for seed in range(40):
        whole = street(seed, cars=True)
        frame = scanned(whole, seed)
        pastes = tuple(one for one in plan(frame, seed) if one.layout == "hung")
        shown = contents(frame, pastes)
        before, after = pasted(frame, pastes, shown)
        drawn = (after.region != Region.BACKGROUND)[0, 0].numpy()
        for one in pastes:
            a, b, surface = one.rectangle.pixel_matrix(K) @ (rays() @ K.T).reshape(-1, 3).T
            inside = (np.abs(a) < one.rectangle.width / 2 * surface) & (surface > 0)
            inside &= np.abs(b) < one.rectangle.height / 2 * surface
            in_front = (1 / whole.depth_m.ravel() > 1.05 * surface) & inside
            crossed += int(in_front.sum())
            covered += int((in_front & drawn.ravel()).sum())
        background = torch.from_numpy(~drawn)[None, None]
        assert torch.equal(after.depth_m[background], before.depth_m[background])
        assert torch.equal(after.valid[background], before.valid[background])
    assert crossed > 5000 and covered == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_truth_on_a_paste_is_dense_and_planar_where_the_scene_is_not(seed: int) -> None:
    frame = scanned(street(seed, cars=bool(seed % 2)), seed, noise_m=0.02)
    config = dataclasses.replace(
        HUNG, max_pastes=1, layout=LayoutShares(hung=0.7, standing=0.3), shadow=0.0
    )
    pastes = plan(frame, seed, config)
    shown = contents(frame, pastes)
    before, after = pasted(frame, pastes, shown)
    image, depth, valid, region = paste_reference(
        before.image[0].movedim(0, -1).numpy(),
        before.depth_m[0, 0].numpy(),
        before.valid[0, 0].numpy(),
        pastes,
        shown,
        K,
        depth_range_m=RANGE_M,
    )
    same = after.region[0, 0].numpy() == region
    assert (~same).sum() <= 2
    np.testing.assert_allclose(after.depth_m[0, 0].numpy()[same], depth[same], rtol=1e-5)
    np.testing.assert_allclose(after.image[0].movedim(0, -1).numpy()[same], image[same], atol=1e-4)
    assert np.array_equal(after.valid[0, 0].numpy()[same], valid[same])
    on_paste = np.isin(after.region[0, 0].numpy(), [Region.MIRROR, Region.ART, Region.FRAME])
    for one in pastes:
        assert after.valid[0, 0].numpy()[on_paste].all()
        truth = 1 / (rays() @ one.rectangle.plane)
        np.testing.assert_allclose(
            after.depth_m[0, 0].numpy()[on_paste], truth[on_paste], rtol=1e-5
        )


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_cell_of_sparse_depth_is_its_known_pixel_nearest_to_the_centre(
    seed: int, flip: bool
) -> None:
    rng = np.random.default_rng(seed)
    top, left = rng.integers(0, 100, 2)
    view = View(
        top=int(top),
        left=int(left),
        crop_height=int(rng.integers(100, HEIGHT - top)),
        crop_width=int(rng.integers(100, WIDTH - left)),
        height=14 * int(rng.integers(10, 40)),
        width=14 * int(rng.integers(10, 40)),
        flip=flip,
    )
    depth = (1 / (rays() @ np.array([0.02, 0.01, 0.1]))).astype(np.float32)
    depth[rng.random(depth.shape) > 0.03] = np.nan
    thin = thin_view(dataclasses.replace(street(0), depth_m=depth), view)
    assert thin.is_sparse
    m = np.array([-0.02 if flip else 0.02, 0.01, 0.1])
    known = np.isfinite(thin.inverse_depth)
    np.testing.assert_allclose(thin.inverse_depth[known], thin.rays[known] @ m, rtol=1e-6)
    row, column = np.nonzero(np.isfinite(depth))
    places = np.stack(view.view_pixels(column + 0.5, row + 0.5), axis=1) / thin.cell
    chosen = np.stack([thin.u, thin.v], axis=1) / thin.cell
    for cell in range(len(known)):
        centre = np.array([cell % thin.columns, cell // thin.columns]) + 0.5
        off = np.abs(places - centre)
        distance = np.linalg.norm(off[off.max(axis=1) < 0.5 - 1e-9], axis=1)
        assert known[cell] or len(distance) == 0
        if known[cell]:
            own = chosen[cell] - centre
            assert np.abs(own).max() < 0.5 + 1e-9
            assert np.linalg.norm(own) <= distance.min(initial=1.0) + 1e-5


def test_a_sparse_image_does_not_depend_on_its_batch() -> None:
    frames = [scanned(street(seed, cars=True), seed) for seed in (2, 3)]
    plans = [plan(frame, number) for number, frame in enumerate(frames)]
    shown = [contents(frame, own) for frame, own in zip(frames, plans, strict=True)]
    batches = [pasted(*one) for one in zip(frames, plans, shown, strict=True)]
    names = [entry.name for entry in dataclasses.fields(Batch)]
    befores = [before for before, _ in batches]
    whole = Batch(**{name: torch.cat([getattr(x, name) for x in befores]) for name in names})
    groups = stack_plans(plans, shown, np.stack([K, K]), height=HEIGHT, width=WIDTH, together=2)
    result = paste(whole, groups, depth_range_m=RANGE_M)
    for number, (_, alone) in enumerate(batches):
        for name in ("image", "depth_m", "valid", "region"):
            assert torch.equal(getattr(result, name)[number], getattr(alone, name)[0])


def test_what_the_sensor_could_see_follows_its_beams() -> None:
    thin = thin_view(scanned(street(1)), WHOLE)
    angle = np.degrees(np.arctan2(-thin.rays[:, 1], np.hypot(thin.rays[:, 0], 1)))
    assert (thin.expected[angle > 3.0] == 0).all()
    assert (thin.expected[angle < 1.0] > 0.9).all()
    across, down = thin.gap_px
    assert 721.5 * np.deg2rad(0.16) <= across <= 4 and 5 <= down <= 7
    dense = thin_view(street(1), WHOLE)
    assert dense.gap_px == (0.0, 0.0) and (dense.expected == 1).all()
