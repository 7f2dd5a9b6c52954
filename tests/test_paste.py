"""The paste stage: exact planar truth, untouched background, sensible places, determinism."""

import dataclasses

import kornia
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatdepth.augment.composite import mip_atlas, paste, stack_plans
from flatdepth.augment.layout import Paste, ThinView, plan_pastes, thin_view
from flatdepth.augment.photometric import draw_photometric, photometric
from flatdepth.augment.reference import paste_reference
from flatdepth.augment.rng import Draws
from flatdepth.config import PasteConfig, PhotometricConfig
from flatdepth.geometry import Rectangle, View, edge_lines, pixel_rays, project
from flatdepth.types import Batch, Frame, Region

HEIGHT, WIDTH = 140, 196
RANGE_M = (0.1, 20.0)
K = np.array([[170.0, 0, 98.0], [0, 170.0, 70.0], [0, 0, 1]])
ALWAYS = PasteConfig(share=1.0, max_pastes=3)
ASPECTS = np.array([0.7, 1.0, 1.6])


def rays(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return pixel_rays(K, u, v)


def wall_frame(seed: int, *, clutter: bool = True, holes: bool = True) -> Frame:
    """A slanted wall and a floor, with a box in front and holes like a depth camera's."""
    rng = np.random.default_rng(seed)
    yaw = rng.uniform(-0.8, 0.8)
    wall = np.array([np.sin(yaw), 0.0, np.cos(yaw)]) / rng.uniform(2.0, 5.0)
    floor = np.array([0.0, 1.0, 0.0]) / 1.4
    inverse = np.maximum(np.maximum(rays() @ wall, rays() @ floor), 1e-2)
    if clutter:
        inverse[60:, 20:60] = np.maximum(inverse[60:, 20:60], 0.7)
    depth = (1 / inverse).astype(np.float32)
    if holes:
        depth[rng.random(depth.shape) < 0.15] = np.nan
    image = rng.integers(0, 256, (HEIGHT // 7, WIDTH // 7, 3), dtype=np.uint8)
    image = np.kron(image, np.ones((7, 7, 1), dtype=np.uint8))
    return Frame(image=image, depth_m=depth, K_px=K, key=str(seed), dataset="t", scene="s")


WHOLE = View(top=0, left=0, crop_height=HEIGHT, crop_width=WIDTH, height=HEIGHT, width=WIDTH)


def thin(frame: Frame) -> ThinView:
    return thin_view(frame, WHOLE)


def plan(frame: Frame, identity: int, config: PasteConfig = ALWAYS) -> tuple[Paste, ...]:
    draws = Draws(0, 0, identity)
    return plan_pastes(thin(frame), draws, config, picture_aspects=ASPECTS, depth_range_m=RANGE_M)


def clean_batch(frames: list[Frame]) -> Batch:
    depth = torch.from_numpy(np.stack([frame.depth_m for frame in frames]))[:, None]
    valid = depth.isfinite() & (depth >= RANGE_M[0]) & (depth <= RANGE_M[1])
    images = torch.from_numpy(np.stack([frame.image for frame in frames]))
    return Batch(
        image=images.movedim(-1, 1).float() / 255,
        depth_m=torch.where(valid, depth, 0.0),
        valid=valid,
        region=torch.zeros_like(valid, dtype=torch.uint8),
        K_px=torch.from_numpy(np.stack([frame.K_px for frame in frames])),
        sample=torch.arange(len(frames)),
    )


def picture(number: int) -> np.ndarray:
    rng = np.random.default_rng(1000 + number)
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def pasted(frames: list[Frame], plans: list[tuple[Paste, ...]]) -> tuple[Batch, Batch]:
    pictures = [
        [picture(p.picture) if p.kind is Region.ART else None for p in one] for one in plans
    ]
    stacked = stack_plans(plans, pictures, np.stack([K] * len(plans)), height=HEIGHT, width=WIDTH)
    batch = clean_batch(frames)
    return batch, paste(batch, stacked, depth_range_m=RANGE_M)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_truth_lies_on_the_plane_and_the_background_is_untouched(
    seed: int, clutter: bool, holes: bool
) -> None:
    frame = wall_frame(seed, clutter=clutter, holes=holes)
    pastes = plan(frame, seed)
    before, after = pasted([frame], [pastes])
    region = after.region[0, 0].numpy()
    background = torch.from_numpy(region == Region.BACKGROUND)[None, None]
    assert torch.equal(after.depth_m[background], before.depth_m[background])
    assert torch.equal(after.valid[background], before.valid[background])
    everywhere = background.expand_as(after.image)
    assert torch.equal(after.image[everywhere], before.image[everywhere])
    assert after.image.isfinite().all() and after.depth_m.isfinite().all()
    assert after.image.min() >= 0 and after.image.max() <= 1

    # the topmost paste is whole: every pixel of it is on its plane
    if pastes:
        top = pastes[-1]
        v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
        inside = (pixels @ edge_lines(project(K, top.rectangle.corners())).T).min(axis=-1) > 1e-3
        drawn = inside & (region != Region.BACKGROUND)
        truth = 1 / (pixel_rays(K, u, v) @ top.rectangle.plane)
        deviation = np.abs(after.depth_m[0, 0].numpy()[drawn] / truth[drawn] - 1)
        assert deviation.max(initial=0) <= 1e-5
        if not top.hung:
            assert drawn[inside].all()
            known = inside & before.valid[0, 0].numpy()
            assert (truth[known] < before.depth_m[0, 0].numpy()[known]).all()


def test_region_and_edges_agree_with_the_projected_quad() -> None:
    frame = wall_frame(3)
    config = dataclasses.replace(ALWAYS, max_pastes=1, hung=0.0, framed=1.0, art=0.0)
    (only,) = plan(frame, 1, config)
    _, after = pasted([frame], [(only,)])
    corners = project(K, only.rectangle.corners())
    inside = np.array(
        [
            [_inside(corners, column + 0.5, row + 0.5) for column in range(WIDTH)]
            for row in range(HEIGHT)
        ]
    )
    region = after.region[0, 0].numpy()
    assert np.array_equal(region != Region.BACKGROUND, inside)
    assert set(np.unique(region)) == {Region.BACKGROUND, Region.MIRROR, Region.FRAME}


def _inside(corners: np.ndarray, u: float, v: float) -> bool:
    """Even-odd rule, an independent test of a point in a polygon."""
    crossings = 0
    for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (v0 > v) != (v1 > v):
            crossings += u < u0 + (v - v0) * (u1 - u0) / (v1 - v0)
    return crossings % 2 == 1


def test_art_is_warped_as_kornia_warps_it() -> None:
    """Our fused warp against kornia's perspective warp of the same picture."""
    frame = wall_frame(5, clutter=False)
    config = dataclasses.replace(
        ALWAYS, max_pastes=1, hung=0.0, framed=0.0, mirror=0.0, area=(0.5, 0.5), max_tilt_deg=30.0
    )
    (only,) = plan(frame, 1, config)
    smooth = np.indices((HEIGHT, WIDTH)).sum(axis=0)[..., None] * np.array([0.5, 0.4, 0.3])
    smooth = (smooth + np.array([0, 30, 60])).astype(np.uint8)
    only = dataclasses.replace(only, gain=1.0, tint=(1.0, 1.0, 1.0), level=0)
    stacked = stack_plans([(only,)], [[smooth]], K[None], height=HEIGHT, width=WIDTH)
    after = paste(clean_batch([frame]), stacked, depth_range_m=RANGE_M)

    source = torch.tensor([[[0.0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT]]])
    target = torch.from_numpy(project(K, only.rectangle.corners())[None]).float()
    # kornia counts pixel centres at integers, we at integers + 0.5
    matrix = kornia.geometry.get_perspective_transform(source - 0.5, target - 0.5)
    image = torch.from_numpy(smooth).movedim(-1, 0)[None].float() / 255
    reference = kornia.geometry.warp_perspective(
        image, matrix, (HEIGHT, WIDTH), padding_mode="border", align_corners=True
    )
    inside = (after.region == Region.ART).expand_as(reference).clone()
    distance = torch.from_numpy(
        np.stack([*np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)], -1)
    )
    homogeneous = torch.cat([distance, torch.ones_like(distance[..., :1])], dim=-1)
    edge = (
        homogeneous @ torch.from_numpy(edge_lines(project(K, only.rectangle.corners()))).T
    ).amin(-1)
    inside &= (edge > 1.0)[None, None]
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(after.image[inside], reference[inside], atol=2e-4, rtol=0)


def test_a_mirror_shows_the_other_half_flipped() -> None:
    frame = wall_frame(7, clutter=False)
    u_ramp = np.tile(((np.arange(WIDTH) + 0.5) / WIDTH * 255)[None, :, None], (HEIGHT, 1, 3))
    frame = dataclasses.replace(frame, image=u_ramp.astype(np.uint8))
    config = dataclasses.replace(ALWAYS, max_pastes=1, art=0.0, framed=0.0)
    sides = set()
    for identity in range(12):
        pastes = plan(frame, identity, config)
        _, after = pasted([frame], [pastes])
        mirror = after.region[0, 0] == Region.MIRROR
        rows = torch.nonzero(mirror.any(1)).flatten()
        row = int(rows[len(rows) // 2])
        columns = torch.nonzero(mirror[row]).flatten()[2:-2]
        shown = after.image[0, 0, row, columns] / pastes[0].tint[0]
        on_left = float(project(K, pastes[0].rectangle.corners())[:, 0].mean()) < WIDTH / 2
        sides.add(on_left)
        assert (shown.diff() < 1e-3).all(), "the ramp must fall from left to right in a mirror"
        assert (shown > 0.49).all() if on_left else (shown < 0.51).all()
    assert sides == {True, False}


def test_hung_pastes_lie_on_the_wall_by_their_thickness() -> None:
    hung = 0
    for seed in range(30):
        frame = wall_frame(seed)
        config = dataclasses.replace(ALWAYS, hung=1.0, max_pastes=1, thickness_m=(0.03, 0.03))
        for one in plan(frame, seed, config):
            if not one.hung:
                continue
            hung += 1
            rng = np.random.default_rng(seed)  # as in wall_frame
            yaw, distance = rng.uniform(-0.8, 0.8), rng.uniform(2.0, 5.0)
            normal = np.array([np.sin(yaw), 0.0, np.cos(yaw)])
            own = one.rectangle.plane / np.linalg.norm(one.rectangle.plane)
            assert np.degrees(np.arccos(np.clip(own @ normal, -1, 1))) < 0.5
            gap = distance - one.rectangle.corners() @ normal
            np.testing.assert_allclose(gap, 0.03, atol=0.003)
            assert abs(one.rectangle.right[1]) < np.sin(np.deg2rad(2.1))
    assert hung >= 20


def test_what_is_nearer_than_a_hung_paste_stays_in_front() -> None:
    frame = wall_frame(0, clutter=False, holes=False)
    wall = frame.depth_m.astype(np.float64)
    wall[:, 94:102] = 0.8
    frame = dataclasses.replace(frame, depth_m=wall.astype(np.float32))
    config = dataclasses.replace(ALWAYS, hung=1.0, max_pastes=1, area=(0.1, 0.2))
    pole_crossed = 0
    for identity in range(40):
        pastes = plan(frame, identity, config)
        if not pastes or not pastes[0].hung:
            continue
        _, after = pasted([frame], [pastes])
        region = after.region[0, 0].numpy()
        assert (region[:, 94:102] == Region.BACKGROUND).all()
        pole_crossed += bool((region[:, 93] != 0).any() and (region[:, 102] != 0).any())
    assert pole_crossed >= 2


def test_nothing_is_hung_where_no_plane_is() -> None:
    rng = np.random.default_rng(0)
    frame = wall_frame(0)
    blobs = np.kron(rng.uniform(1.0, 4.0, (HEIGHT // 7, WIDTH // 7)), np.ones((7, 7)))
    frame = dataclasses.replace(frame, depth_m=blobs.astype(np.float32))
    config = dataclasses.replace(ALWAYS, hung=1.0)
    for identity in range(20):
        assert all(not one.hung for one in plan(frame, identity, config))


@pytest.mark.parametrize("fill", [np.nan, np.inf, 3.0, 1e-3, 1e4])
def test_constant_and_unknown_depth_never_break_the_stage(fill: float) -> None:
    frame = wall_frame(1)
    frame = dataclasses.replace(frame, depth_m=np.full((HEIGHT, WIDTH), fill, np.float32))
    for identity in range(10):
        _, after = pasted([frame], [plan(frame, identity)])
        assert after.image.isfinite().all() and after.depth_m.isfinite().all()
        on_paste = (after.region != Region.BACKGROUND) & after.valid
        assert ((after.depth_m[on_paste] >= 0.1) & (after.depth_m[on_paste] <= 20)).all()


def test_a_picture_depends_on_its_identity_and_not_on_its_batch() -> None:
    frames = [wall_frame(seed) for seed in range(6)]
    plans = [plan(frame, number) for number, frame in enumerate(frames)]
    _, together = pasted(frames, plans)
    order = [4, 0, 5]
    _, some = pasted([frames[i] for i in order], [plans[i] for i in order])
    for position, number in enumerate(order):
        _, alone = pasted([frames[number]], [plans[number]])
        for name in ("image", "depth_m", "valid", "region"):
            whole = getattr(together, name)[number]
            assert torch.equal(whole, getattr(some, name)[position])
            assert torch.equal(whole, getattr(alone, name)[0])


def test_shares_and_counts_follow_the_config() -> None:
    frame = wall_frame(2)
    config = dataclasses.replace(ALWAYS, share=0.5, max_pastes=2)
    counts = [len(plan(frame, identity, config)) for identity in range(300)]
    assert abs(np.mean([count > 0 for count in counts]) - 0.5) < 3.3 * 0.5 / np.sqrt(300)
    assert set(counts) == {0, 1, 2}
    no_mirror = dataclasses.replace(ALWAYS, mirror=0.0)
    kinds = {one.kind for identity in range(20) for one in plan(frame, identity, no_mirror)}
    assert kinds == {Region.ART}
    nothing = plan_pastes(
        thin(frame),
        Draws(0),
        no_mirror,
        picture_aspects=np.zeros(0),
        depth_range_m=RANGE_M,
    )
    assert nothing == ()


def test_mip_levels_keep_the_mean_and_shrink_detail() -> None:
    source = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    atlas = mip_atlas(source)
    assert torch.equal(atlas[..., :96], source)
    level1, level3 = atlas[..., :32, 96:144], atlas[..., 48:56, 96:108]
    torch.testing.assert_close(level1.mean(), source.mean())
    torch.testing.assert_close(level3.mean((-1, -2)), source.mean((-1, -2)))
    assert level3.std() < 0.2 * source.std()


def test_photometric_is_neutral_without_share_and_bounded_with_it() -> None:
    image = torch.rand(4, 3, 20, 30, generator=torch.Generator().manual_seed(1))
    draws = [Draws(0, 0, i) for i in range(4)]
    neutral = draw_photometric(draws, PhotometricConfig(share=0.0))
    torch.testing.assert_close(photometric(image, neutral), image, atol=1e-6, rtol=0)
    factors = draw_photometric(draws, PhotometricConfig(share=1.0))
    changed = photometric(image, factors)
    assert changed.min() >= 0 and changed.max() <= 1
    assert (changed - image).abs().mean() > 0.01
    assert torch.equal(photometric(image[1:2], factors[1:2]), changed[1:2])


def test_photometric_noise_has_the_stated_deviation() -> None:
    image = torch.full((1, 3, 128, 128), 0.5)
    factors = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.05, 77.0]], dtype=torch.float64)
    noise = photometric(image, factors) - image
    assert noise.mean().abs() < 3.3 * 0.05 / np.sqrt(noise.numel())
    assert abs(float(noise.std()) / 0.05 - 1) < 0.02


def test_rectangle_corners_turn_clockwise_in_the_image() -> None:
    for identity in range(20):
        for one in plan(wall_frame(4), identity):
            u, v = project(K, one.rectangle.corners()).T
            assert float(u @ np.roll(v, -1) - v @ np.roll(u, -1)) > 0
            assert isinstance(one.rectangle, Rectangle)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_the_fast_stage_equals_the_slow_reference(seed: int) -> None:
    frame = wall_frame(seed)
    pastes = plan(frame, seed)
    before, after = pasted([frame], [pastes])
    pictures = [picture(p.picture) if p.kind is Region.ART else None for p in pastes]
    image, depth, valid, region = paste_reference(
        before.image[0].movedim(0, -1).numpy(),
        before.depth_m[0, 0].numpy(),
        before.valid[0, 0].numpy(),
        pastes,
        pictures,
        K,
        depth_range_m=RANGE_M,
    )
    # a pixel centre within float32 rounding of an edge may fall on either side of it
    same = after.region[0, 0].numpy() == region
    assert (~same).sum() <= 2
    np.testing.assert_allclose(after.depth_m[0, 0].numpy()[same], depth[same], rtol=1e-5)
    assert np.array_equal(after.valid[0, 0].numpy()[same], valid[same])
    ours = after.image[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(ours[same], image[same], atol=1e-4)
