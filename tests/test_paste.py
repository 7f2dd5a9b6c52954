"""The paste stage: exact planar truth, untouched background, sensible places, determinism."""

import dataclasses

import kornia
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flatdepth.augment.draw.composite import paste, stack_plans
from flatdepth.augment.draw.content import (
    GAP_BEHIND,
    Content,
    Opening,
    Sources,
    make_content,
)
from flatdepth.augment.draw.stylise import Style
from flatdepth.augment.draw.texture import CHANNELS, draw_textures, look_row
from flatdepth.augment.plan.appearance import Kind
from flatdepth.augment.plan.coarse import ThinView, thin_view
from flatdepth.augment.plan.layout import Paste, plan_pastes
from flatdepth.augment.plan.sensor import sharpness_and_noise
from flatdepth.augment.reference import paste_reference
from flatdepth.augment.rng import Draws
from flatdepth.config import ContentShares, LayoutShares, PasteConfig, PasteStage, ShapeShares
from flatdepth.errors import UserError
from flatdepth.geometry import Rectangle, View, edge_lines, pixel_rays, project, quad_area
from flatdepth.types import Batch, Frame, Region
from tests.stress_paste import check

HEIGHT, WIDTH = 140, 196
RANGE_M = (0.1, 20.0)
K = np.array([[170.0, 0, 98.0], [0, 170.0, 70.0], [0, 0, 1]])
ALWAYS = PasteConfig(share=1.0, max_pastes=3)
HUNG = LayoutShares(hung=1.0, standing=0.0)
STANDING = LayoutShares(hung=0.0, standing=1.0)
MIRRORS = ContentShares(art=0, mural=0, screen=0, opening=0, empty=0)
PICTURES = ContentShares(mirror=0, mural=0, screen=0, opening=0, empty=0)
RECTANGLES = ShapeShares(rounded=0, ellipse=0, arch=0, polygon=0)
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


SOURCES = Sources(picture=picture, frame=lambda number: wall_frame(number % 7))


def contents(
    frame: Frame, pastes: tuple[Paste, ...], mirror_target: str = "surface"
) -> list[Content]:
    return [make_content(one, frame, WHOLE, K, SOURCES, mirror_target) for one in pastes]


def pasted(
    frames: list[Frame],
    plans: list[tuple[Paste, ...]],
    mirror_target: str = "surface",
    together: int = 1,
) -> tuple[Batch, Batch]:
    shown = [contents(frame, one, mirror_target) for frame, one in zip(frames, plans, strict=True)]
    return shown_on(frames, plans, shown, mirror_target, together)


def shown_on(
    frames: list[Frame],
    plans: list[tuple[Paste, ...]],
    shown: list[list[Content]],
    mirror_target: str = "surface",
    together: int = 1,
) -> tuple[Batch, Batch]:
    stacked = stack_plans(
        plans,
        shown,
        np.stack([K] * len(plans)),
        height=HEIGHT,
        width=WIDTH,
        mirror_target=mirror_target,
        together=together,
    )
    batch = clean_batch(frames)
    return batch, paste(batch, stacked, depth_range_m=RANGE_M)


def plain(one: Paste, **changes: object) -> Paste:
    """A paste without light, shadow and wear."""
    look = dataclasses.replace(
        one.look,
        tint=(1.0, 1.0, 1.0),
        light=1.0,
        falloff=(0.0, 0.0),
        glare=(0.0, 1.0, 0.0, 0.0, 1.0),
        shadow=(0.0, 0.0, 0.0, 1.0),
        style=Style.NONE,
        blur_px=0.0,
        dust=0.0,
        sharpness_px=0.0,
        noise=0.0,
    )
    return dataclasses.replace(one, look=look, **changes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_truth_lies_on_the_plane_and_the_background_is_untouched(
    seed: int, clutter: bool, holes: bool
) -> None:
    frame = wall_frame(seed, clutter=clutter, holes=holes)
    pastes = plan(frame, seed, dataclasses.replace(ALWAYS, shadow=0.0))
    pastes = tuple(one for one in pastes if one.look.shadow[0] >= 0)  # no glowing screens
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
        corners = project(K, top.rectangle.corners())
        inside = (pixels @ edge_lines(corners).T).min(axis=-1) > 0.01
        # interpolated distances cut a corner by a fraction of a texel
        inside &= np.linalg.norm(pixels[:, :, None, :2] - corners, axis=-1).min(axis=-1) > 1.5
        drawn = inside & (region != Region.BACKGROUND) & (region != Region.DECOY)
        truth = 1 / (pixel_rays(K, u, v) @ top.rectangle.plane)
        own = np.abs(after.depth_m[0, 0].numpy() / truth - 1) <= 1e-5
        if top.look.radius_top == (0.0, 0.0) and top.look.cut[0] == 0:
            assert own[drawn].all()
        else:  # what a round paste leaves of its rectangle may show another paste
            assert own[drawn].mean() > 0.5 or not drawn.any()
        if top.layout == "standing":
            known = inside & before.valid[0, 0].numpy()
            assert (truth[known] < before.depth_m[0, 0].numpy()[known]).all()


def test_region_and_edges_agree_with_the_projected_quad() -> None:
    frame = wall_frame(3)
    config = dataclasses.replace(
        ALWAYS, max_pastes=1, layout=STANDING, framed=1.0, content=MIRRORS, shape=RECTANGLES
    )
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
    """Our texture and warp against kornia's perspective warp of the same picture."""
    frame = wall_frame(5, clutter=False)
    config = dataclasses.replace(
        ALWAYS,
        max_pastes=1,
        layout=STANDING,
        framed=0.0,
        content=PICTURES,
        shape=RECTANGLES,
        area=(0.4, 0.4),
        max_tilt_deg=30.0,
    )
    (only,) = plan(frame, 1, config)
    smooth = np.indices((HEIGHT, WIDTH)).sum(axis=0)[..., None] * np.array([0.5, 0.4, 0.3])
    smooth = (smooth + np.array([0, 30, 60])).astype(np.uint8)
    only = plain(only, picture_px=(WIDTH, HEIGHT))
    _, after = shown_on([frame], [(only,)], [[Content(picture=smooth)]])

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
    inside &= (edge > 2.0)[None, None]
    assert inside.float().mean() > 0.25
    torch.testing.assert_close(after.image[inside], reference[inside], atol=2e-4, rtol=0)


def test_a_mirror_shows_the_other_half_flipped() -> None:
    frame = wall_frame(7, clutter=False)
    u_ramp = np.tile(((np.arange(WIDTH) + 0.5) / WIDTH * 255)[None, :, None], (HEIGHT, 1, 3))
    frame = dataclasses.replace(frame, image=u_ramp.astype(np.uint8))
    config = dataclasses.replace(
        ALWAYS, max_pastes=1, content=MIRRORS, framed=0.0, worn=0.0, shape=RECTANGLES
    )
    sides = set()
    for identity in range(12):
        pastes = tuple(plain(one) for one in plan(frame, identity, config))
        _, after = pasted([frame], [pastes])
        mirror = after.region[0, 0] == Region.MIRROR
        rows = torch.nonzero(mirror.any(1)).flatten()
        row = int(rows[len(rows) // 2])
        columns = torch.nonzero(mirror[row]).flatten()[2:-2]
        shown = after.image[0, 0, row, columns]
        on_left = float(project(K, pastes[0].rectangle.corners())[:, 0].mean()) < WIDTH / 2
        sides.add(on_left)
        assert (shown.diff() < 1e-3).all(), "the ramp must fall from left to right in a mirror"
        assert (shown > 0.49).all() if on_left else (shown < 0.51).all()
    assert sides == {True, False}


def test_hung_pastes_lie_on_the_wall_by_their_thickness() -> None:
    hung = 0
    for seed in range(30):
        frame = wall_frame(seed)
        config = dataclasses.replace(ALWAYS, layout=HUNG, max_pastes=1, thickness_m=(0.03, 0.03))
        for one in plan(frame, seed, config):
            if one.layout != "hung":
                continue
            hung += 1
            rng = np.random.default_rng(seed)  # as in wall_frame
            yaw, distance = rng.uniform(-0.8, 0.8), rng.uniform(2.0, 5.0)
            normal = np.array([np.sin(yaw), 0.0, np.cos(yaw)])
            own = one.rectangle.plane / np.linalg.norm(one.rectangle.plane)
            assert np.degrees(np.arccos(np.clip(own @ normal, -1, 1))) < 0.5
            gap = distance - one.rectangle.corners() @ normal
            np.testing.assert_allclose(gap, 0.03, atol=0.003)
            assert abs(one.rectangle.right[1]) < np.sin(np.deg2rad(4.0))
    assert hung >= 20


def test_up_is_against_the_floor_and_not_the_cameras() -> None:
    """A camera rolled by 15 degrees: pictures hang plumb in the room, not in the image."""
    roll = np.deg2rad(15.0)
    turn = np.array(
        [[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1.0]]
    )
    wall, floor = turn @ np.array([0.2, 0.0, 0.3]), turn @ np.array([0.0, 1 / 1.2, 0.0])
    depth = 1 / np.maximum(np.maximum(rays() @ wall, rays() @ floor), 1e-2)
    frame = dataclasses.replace(wall_frame(0), depth_m=depth.astype(np.float32))
    config = dataclasses.replace(ALWAYS, layout=HUNG, max_pastes=1)
    hung = [one for i in range(12) for one in plan(frame, i, config) if one.layout == "hung"]
    assert len(hung) >= 6
    for one in hung:
        plumb = one.rectangle.up @ (turn @ np.array([0.0, -1.0, 0.0]))
        assert plumb > np.cos(np.deg2rad(4.0))


def test_nothing_is_hung_on_the_back_of_a_chair() -> None:
    frame = wall_frame(0, clutter=False, holes=False)
    depth = np.full((HEIGHT, WIDTH), 6.0, dtype=np.float32)
    rng = np.random.default_rng(3)
    rough = np.kron(rng.uniform(4.0, 9.0, (HEIGHT // 7, WIDTH // 7)), np.ones((7, 7)))
    depth[:] = rough
    depth[40:100, 70:130] = 1.5  # 0.5 m across
    frame = dataclasses.replace(frame, depth_m=depth)
    config = dataclasses.replace(ALWAYS, layout=HUNG, max_pastes=1, area=(0.01, 0.1))
    for identity in range(20):
        assert all(one.layout != "hung" for one in plan(frame, identity, config))


@pytest.mark.parametrize("depth_test", [True, False])
def test_what_is_nearer_than_a_hung_paste_stays_in_front(depth_test: bool) -> None:
    frame = wall_frame(0, clutter=False, holes=False)
    wall = frame.depth_m.astype(np.float64)
    wall[:, 94:102] = 0.8
    frame = dataclasses.replace(frame, depth_m=wall.astype(np.float32))
    config = dataclasses.replace(
        ALWAYS,
        layout=HUNG,
        max_pastes=1,
        area=(0.1, 0.2),
        content=MIRRORS,
        depth_test=depth_test,
    )
    pole_crossed = 0
    for identity in range(40):
        pastes = plan(frame, identity, config)
        if not pastes or pastes[0].layout != "hung":
            continue
        before, after = pasted([frame], [pastes])
        region = after.region[0, 0].numpy()
        crosses = (region[:, 93] != 0) & (region[:, 102] != 0)
        pole_crossed += bool(crosses.any())
        if not depth_test:
            assert (region[crosses, 94:102] != Region.BACKGROUND).all()
            continue
        assert (region[:, 94:102] == Region.BACKGROUND).all()
        assert torch.equal(after.image[..., 94:102], before.image[..., 94:102])
    assert pole_crossed >= 2


def test_specks_of_depth_noise_bite_no_holes() -> None:
    frame = wall_frame(0, clutter=False, holes=False)
    config = dataclasses.replace(ALWAYS, layout=HUNG, max_pastes=1, content=MIRRORS)
    pastes = next(p for i in range(20) if (p := plan(frame, i, config)) and p[0].layout == "hung")
    _, whole = pasted([frame], [pastes])
    specks = frame.depth_m.copy()
    specks[np.random.default_rng(0).random(specks.shape) < 0.03] = 0.5
    noisy = dataclasses.replace(frame, depth_m=specks)
    _, after = shown_on([noisy], [pastes], [contents(frame, pastes)])
    assert torch.equal(after.region, whole.region)


def test_nothing_is_hung_where_no_plane_is() -> None:
    rng = np.random.default_rng(0)
    frame = wall_frame(0)
    blobs = np.kron(rng.uniform(1.0, 4.0, (HEIGHT // 7, WIDTH // 7)), np.ones((7, 7)))
    frame = dataclasses.replace(frame, depth_m=blobs.astype(np.float32))
    for identity in range(20):
        assert not plan(frame, identity, dataclasses.replace(ALWAYS, layout=HUNG))
        both = dataclasses.replace(ALWAYS, layout=LayoutShares(hung=1.0, standing=1e-9))
        assert {one.layout for one in plan(frame, identity, both)} == {"standing"}


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
    config = dataclasses.replace(ALWAYS, stylised=0.5)
    plans = [plan(frame, number, config) for number, frame in enumerate(frames)]
    assert len({len(one) for one in plans}) > 1
    _, together = pasted(frames, plans, together=len(frames))
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
    config = dataclasses.replace(ALWAYS, share=0.5, max_pastes=2, area=(0.03, 0.1), layout=STANDING)
    counts = [len(plan(frame, identity, config)) for identity in range(300)]
    assert abs(np.mean([count > 0 for count in counts]) - 0.5) < 3.3 * 0.5 / np.sqrt(300)
    assert set(counts) == {0, 1, 2}
    kinds = ContentShares(mirror=0, mural=0)
    drawn = dataclasses.replace(ALWAYS, content=kinds, layout=STANDING)
    seen = {one.kind for identity in range(40) for one in plan(frame, identity, drawn)}
    assert seen == {Kind.ART, Kind.SCREEN, Kind.OPENING, Kind.EMPTY}
    nothing = plan_pastes(
        thin(frame),
        Draws(0),
        dataclasses.replace(ALWAYS, content=PICTURES),
        picture_aspects=np.zeros(0),
        depth_range_m=RANGE_M,
    )
    assert nothing == ()


def test_all_pastes_together_keep_the_largest_area() -> None:
    config = dataclasses.replace(
        ALWAYS, max_pastes=6, area=(0.05, 0.2), max_area=0.3, layout=STANDING
    )
    largest = 0.0
    for identity in range(40):
        pastes = plan(wall_frame(identity), identity, config)
        areas = [quad_area(project(K, one.rectangle.corners())) for one in pastes]
        largest = max(largest, sum(areas) / (HEIGHT * WIDTH))
    assert 0.25 < largest < 0.3 * 1.1


def test_a_curriculum_changes_the_settings_at_its_steps() -> None:
    config = PasteConfig(
        share=0.0,
        stages=[
            PasteStage(step=10, share=0.3, area=(0.01, 0.02)),
            PasteStage(step=20, share=0.6, max_pastes=5, max_area=0.5),
        ],
    )
    assert config.at(9) == config
    assert (config.at(10).share, config.at(19).area) == (0.3, (0.01, 0.02))
    last = config.at(1000)
    assert (last.share, last.area, last.max_pastes, last.max_area) == (0.6, (0.01, 0.02), 5, 0.5)
    with pytest.raises(UserError, match=r"paste\.stages: expected ascending steps"):
        PasteConfig(stages=[PasteStage(step=2), PasteStage(step=1)])
    with pytest.raises(UserError, match=r"paste\.share"):
        PasteConfig(stages=[PasteStage(step=2, share=1.5)])


def only_of(kind: Kind, identity: int = 0, **changes: object) -> tuple[Frame, Paste]:
    """A frame without holes and one plain paste of a kind on it."""
    shares = {name: float(name == kind) for name in Kind}
    for number in range(identity, identity + 30):
        frame = wall_frame(number, clutter=False, holes=False)
        config = dataclasses.replace(
            ALWAYS, max_pastes=1, content=ContentShares(**shares), area=(0.1, 0.2), **changes
        )
        pastes = plan(frame, number, config)
        if pastes and pastes[0].layout == "hung":
            return frame, plain(pastes[0])
    raise AssertionError("no wall")


def test_an_empty_frame_leaves_the_scene_inside_untouched() -> None:
    frame, one = only_of(Kind.EMPTY)
    before, after = pasted([frame], [(one,)])
    hole = after.region == Region.DECOY
    assert hole.sum() > 200 and (after.region == Region.FRAME).sum() > 50
    assert torch.equal(after.depth_m[hole], before.depth_m[hole])
    assert torch.equal(after.valid[hole], before.valid[hole])
    assert torch.equal(
        after.image[hole.expand_as(after.image)], before.image[hole.expand_as(before.image)]
    )


def test_a_mirror_seen_through_an_empty_frame_stays_a_mirror() -> None:
    frame, mirror = only_of(Kind.MIRROR, framed=1.0)
    board = mirror.rectangle
    nearer = dataclasses.replace(
        mirror,
        kind=Kind.EMPTY,
        rectangle=dataclasses.replace(
            board,
            centre=0.9 * board.centre,
            width=0.9 * board.width,
            height=0.9 * board.height,
        ),
    )
    _, behind = pasted([frame], [(mirror,)])
    _, after = pasted([frame], [(mirror, nearer)])
    _, ignored = pasted([frame], [(mirror, nearer)], "ignore")
    seen = (after.region == Region.MIRROR) & (behind.region == Region.MIRROR)
    assert torch.equal(seen, after.region == Region.MIRROR) and seen.sum() > 200
    assert torch.equal(after.depth_m[seen], behind.depth_m[seen])
    assert not ignored.valid[seen].any()
    assert not (after.region == Region.DECOY).any()


def test_an_opening_shows_another_scene_with_its_own_depth_behind_the_plane() -> None:
    frame, one = only_of(Kind.OPENING)
    content = make_content(one, frame, WHOLE, K, SOURCES)
    assert isinstance(content.opening, Opening)
    _, after = shown_on([frame], [(one,)], [[content]])
    hole = (after.region == Region.DECOY)[0, 0].numpy()
    assert hole.sum() > 200
    v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    plane = 1 / (pixel_rays(K, u, v) @ one.rectangle.plane)
    truth = after.depth_m[0, 0].numpy()
    valid = hole & after.valid[0, 0].numpy()
    assert valid.sum() > 0.5 * hole.sum()
    assert (truth[valid] > 1.02 * plane[valid]).all()
    # the same camera and the same view: the other frame's own pixels, its depth times one number
    number = one.draws.child(200).integer("frame", 2**31) % 7
    other = wall_frame(number)
    ratio = truth[valid] / other.depth_m[valid]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    image = after.image[0].movedim(0, -1).numpy()
    deep = valid & (np.abs(truth - np.median(truth)) >= 0)
    inner = deep & (after.region[0, 0].roll(2, 0) == Region.DECOY).numpy()
    inner &= (after.region[0, 0].roll(-2, 0) == Region.DECOY).numpy()
    inner &= (after.region[0, 0].roll(2, 1) == Region.DECOY).numpy()
    inner &= (after.region[0, 0].roll(-2, 1) == Region.DECOY).numpy()
    np.testing.assert_allclose(image[inner], other.image[inner] / 255, atol=1e-5)


def test_ignored_mirrors_have_no_truth_but_their_frames_do() -> None:
    frame, one = only_of(Kind.MIRROR, framed=1.0)
    _, kept = pasted([frame], [(one,)])
    _, ignored = pasted([frame], [(one,)], "ignore")
    mirror, wood = kept.region == Region.MIRROR, kept.region == Region.FRAME
    assert kept.valid[mirror].all() and not ignored.valid[mirror].any()
    assert torch.equal(ignored.valid[~mirror], kept.valid[~mirror])
    assert ignored.valid[wood].all()
    assert torch.equal(ignored.image, kept.image)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
@example(108933)  # a mirror seen through an empty frame
def test_the_target_of_mirrors_changes_no_picture_and_nothing_but_mirrors(seed: int) -> None:
    frame = wall_frame(seed)
    layouts = LayoutShares(hung=0.6, standing=0.3, legacy=0.1)
    pastes = plan(frame, seed, dataclasses.replace(ALWAYS, layout=layouts))
    _, surface = pasted([frame], [pastes])
    mirror = surface.region == Region.MIRROR
    for target in ("ignore", "virtual"):
        _, other = pasted([frame], [pastes], target)
        assert torch.equal(other.image, surface.image)
        assert torch.equal(other.region, surface.region)
        assert torch.equal(other.depth_m[~mirror], surface.depth_m[~mirror])
        assert torch.equal(other.valid[~mirror], surface.valid[~mirror])
        behind = other.valid & mirror
        assert target == "virtual" or not behind.any()
        assert (other.depth_m[behind] > 1.02 * surface.depth_m[behind]).all()


def frontal_mirror(z_m: float) -> tuple[Frame, Paste]:
    """A mirror that faces the camera at a depth, and shows a part of the view's right half."""
    frame, one = only_of(Kind.MIRROR, framed=0.0, shape=RECTANGLES)
    board = Rectangle(
        centre=np.array([-42 / K[0, 0], 0.0, 1.0]) * z_m,
        right=np.array([1.0, 0.0, 0.0]),
        up=np.array([0.0, -1.0, 0.0]),
        width=0.4 * z_m,
        height=0.6 * z_m,
    )
    return frame, dataclasses.replace(
        one, rectangle=board, front=0.0, picture_px=(68, 102), portion=(180.0, 20.0, 110.0, 125.0)
    )


@pytest.mark.parametrize("shown_m", [0.5, 4.0])
def test_what_a_frontal_mirror_shows_begins_behind_it_and_keeps_its_proportions(
    shown_m: float,
) -> None:
    frame, one = frontal_mirror(3.0)
    depth = np.full((HEIGHT, WIDTH), shown_m, dtype=np.float32)
    flat = dataclasses.replace(frame, depth_m=depth)
    _, after = pasted([flat], [(one,)], "virtual")
    mirror = after.region == Region.MIRROR
    assert mirror.sum() == 68 * 102
    np.testing.assert_allclose(after.depth_m[mirror], 3.0 * GAP_BEHIND, rtol=1e-6)
    depth[:, 145:] *= 2  # 35 of the portion's 70 pixels, which a mirror shows on its left
    _, after = pasted([dataclasses.replace(flat, depth_m=depth)], [(one,)], "virtual")
    row = after.depth_m[0, 0, 70][mirror[0, 0, 70]]
    np.testing.assert_allclose(row[:34], 6.0 * GAP_BEHIND, rtol=1e-6)
    np.testing.assert_allclose(row[34:], 3.0 * GAP_BEHIND, rtol=1e-6)


def homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """H with ``H (u, v, 1) ~ (u', v', 1)`` through four points (direct linear transform)."""
    rows = []
    for (u, v), (x, y) in zip(source, target, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
    return np.append(np.linalg.solve(rows, target.ravel()), 1.0).reshape(3, 3)


CUT = View(top=9, left=14, crop_height=120, crop_width=168, height=HEIGHT, width=WIDTH, flip=True)


def seen_in_a_mirror(
    frame: Frame, identity: int, view: View
) -> tuple[Batch, np.ndarray, np.ndarray, np.ndarray]:
    """A standing mirror with its virtual image as truth; where its pixels look and its plane.

    Returns:
        The batch, and of every pixel of the mirror its depth on the mirror's plane in metres and
        the source pixel coordinates (u, v) that it shows, by the mirror's corners alone.
    """
    config = dataclasses.replace(
        ALWAYS,
        max_pastes=1,
        layout=STANDING,
        content=MIRRORS,
        shape=RECTANGLES,
        area=(0.1, 0.3),
    )
    view_thin = thin_view(frame, view)
    (one,) = plan_pastes(
        view_thin, Draws(0, 0, identity), config, picture_aspects=ASPECTS, depth_range_m=RANGE_M
    )
    shown = make_content(one, frame, view, view_thin.K_px, SOURCES, "virtual")
    groups = stack_plans(
        [(one,)],
        [(shown,)],
        view_thin.K_px[None],
        height=HEIGHT,
        width=WIDTH,
        mirror_target="virtual",
    )
    batch = paste(clean_batch([frame]), groups, depth_range_m=(1e-3, 1e3))
    row, column = np.nonzero((batch.region == Region.MIRROR)[0, 0].numpy())
    pixels = np.stack([column + 0.5, row + 0.5, np.ones(len(row))])
    left, top, right, bottom = one.portion
    portion = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    H = homography(project(view_thin.K_px, one.picture_box.corners()), portion)
    place = H @ pixels
    u, v = view.source_pixels(*(place[:2] / place[2]))
    box = one.rectangle
    normal = np.cross(box.right, box.up)
    surface = (normal @ box.centre) / (normal @ np.linalg.inv(view_thin.K_px) @ pixels)
    return batch, surface, u, v


@pytest.mark.parametrize("view", [WHOLE, CUT])
def test_a_virtual_image_is_the_photographs_depth_where_the_mirror_looks(view: View) -> None:
    """Against the scene's own formula, at places found by a homography through four corners."""
    inverse = {
        "wall": lambda u, v: pixel_rays(K, u, v) @ np.array([0.1, 0.0, 0.3]),
        "floor": lambda u, v: pixel_rays(K, u, v) @ np.array([0.0, 1 / 1.4, 0.0]),
    }
    grid = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    depth = 1 / np.maximum(inverse["wall"](*grid), inverse["floor"](*grid))
    frame = dataclasses.replace(wall_frame(0), depth_m=depth.astype(np.float32))
    tilts = []
    for identity in range(12):
        batch, surface, u, v = seen_in_a_mirror(frame, identity, view)
        mirror = batch.region == Region.MIRROR
        assert batch.valid[mirror].all() and len(u) > 1000
        truth = batch.depth_m[mirror].double().numpy()
        assert (truth > surface).all()
        wall, floor = inverse["wall"](u, v), inverse["floor"](u, v)
        # off the crease, where four pixels around are on one plane
        one_plane = np.abs(wall - floor) > 2 / K[0, 0]
        scale = (truth * np.maximum(wall, floor) / surface)[one_plane]
        assert len(scale) > 500
        np.testing.assert_allclose(scale, scale[0], rtol=2e-6)
        nearest = np.maximum(wall, floor).max()
        assert (
            abs(scale[0] / (GAP_BEHIND * nearest) - 1) < 2e-2
        )  # the nearest one may lie between pixels
        tilts.append(np.ptp(surface) / surface.min())
    assert max(tilts) > 0.3


def test_a_wall_seen_in_a_tilted_mirror_is_still_a_plane() -> None:
    inverse = rays() @ np.array([-0.15, 0.05, 0.3])
    frame = dataclasses.replace(wall_frame(0), depth_m=(1 / inverse).astype(np.float32))
    for identity in range(8):
        batch, surface, *_ = seen_in_a_mirror(frame, identity, WHOLE)
        mirror = batch.region == Region.MIRROR
        seen = 1 / batch.depth_m[mirror].double().numpy()
        own = rays()[mirror[0, 0].numpy()]
        fit, *_ = np.linalg.lstsq(own, seen, rcond=None)
        np.testing.assert_allclose(own @ fit, seen, rtol=3e-6)
        assert np.ptp(seen * surface) > 0.01  # and not the mirror's own


@pytest.mark.parametrize("unknown", [np.nan, np.inf])
def test_a_mirror_has_no_truth_where_the_depth_of_what_it_shows_is_unknown(unknown: float) -> None:
    frame = wall_frame(2, holes=False)
    depth = frame.depth_m.copy()
    depth[np.random.default_rng(0).random(depth.shape) < 0.2] = unknown
    frame = dataclasses.replace(frame, depth_m=depth)
    batch, _, u, v = seen_in_a_mirror(frame, 3, WHOLE)
    known = np.isfinite(depth[np.floor(v).astype(int), np.floor(u).astype(int)])
    away = np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.49  # from pixels' borders by more than rounding
    valid = batch.valid[batch.region == Region.MIRROR].numpy()
    assert np.array_equal(valid[away], known[away])
    assert 0.7 < valid.mean() < 0.9
    nothing = dataclasses.replace(frame, depth_m=np.full_like(depth, unknown))
    (one,) = plan(frame, 3, dataclasses.replace(ALWAYS, max_pastes=1, content=MIRRORS))
    _, after = pasted([nothing], [(one,)], "virtual")
    mirror = after.region == Region.MIRROR
    assert mirror.any() and not after.valid[mirror].any()


@pytest.mark.parametrize("kind", [Kind.MIRROR, Kind.OPENING])
def test_labelled_mirrors_seen_in_mirrors_and_openings_have_no_truth_but_their_surface(
    kind: Kind,
) -> None:
    frame, one = only_of(kind, framed=1.0)
    corners = project(K, one.picture_box.corners())
    shows = corners
    if one.portion is not None:
        left, top, right, bottom = one.portion
        shows = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    half = int(shows[:, 1].mean())
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[:half] = Region.MIRROR
    frame = dataclasses.replace(frame, region=labels)
    labelled = Sources(
        picture=picture,
        frame=lambda number: dataclasses.replace(wall_frame(number % 7), region=labels),
    )
    known = {}
    for target in ("surface", "ignore", "virtual"):
        content = make_content(one, frame, WHOLE, K, labelled, target)
        _, after = shown_on([frame], [(one,)], [[content]], target)
        inside = after.region[0, 0] == kind.region
        rows, columns = np.nonzero(inside.numpy())
        pixels = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))])
        place = homography(corners, shows) @ pixels
        row = place[1] / place[2]
        valid = after.valid[0, 0][inside].numpy()
        known[target] = [valid[row < half - 0.01].mean(), valid[row > half + 0.01].mean()]
    assert min(known["surface"]) > 0.4
    assert known["virtual"][0] == 0 and known["virtual"][1] > 0.4
    assert known["ignore"] == ([0, 0] if kind is Kind.MIRROR else known["virtual"])


def test_a_shadow_darkens_the_wall_and_nothing_in_front_of_it() -> None:
    frame, one = only_of(Kind.MIRROR)
    grey = np.full_like(frame.image, 180)
    depth = frame.depth_m.copy()
    corners = project(K, one.rectangle.corners())
    column = int(corners[:, 0].mean())
    depth[:, column : column + 12] = 0.6
    frame = dataclasses.replace(frame, image=grey, depth_m=depth)
    side = 0.05 * min(one.rectangle.width, one.rectangle.height)
    shaded = dataclasses.replace(
        one, look=dataclasses.replace(one.look, shadow=(0.5, 0.0, side, side))
    )
    before, after = pasted([frame], [(shaded,)])
    background = after.region == Region.BACKGROUND
    change = (after.image - before.image)[:, :1]
    assert (change[background] <= 0).all()
    darkest = float(change[background].min())
    assert -0.5 * 180 / 255 - 1e-6 <= darkest < -0.1
    assert torch.equal(
        after.image[..., column : column + 12], before.image[..., column : column + 12]
    )
    assert torch.equal(after.depth_m[background], before.depth_m[background])


def texture_of(shape: str) -> tuple[torch.Tensor, Paste]:
    shares = {name: float(name == shape) for name in dataclasses.asdict(ShapeShares())}
    config = dataclasses.replace(
        ALWAYS,
        max_pastes=1,
        layout=STANDING,
        framed=0.0,
        content=MIRRORS,
        shape=ShapeShares(**shares),
    )
    (one,) = plan(wall_frame(0), 4, config)
    one = plain(one, picture_px=(240, 200))
    row = torch.from_numpy(look_row(one)[None]).float()
    blank = torch.zeros(1, 4, 206, 246, dtype=torch.uint8)
    texture = draw_textures(blank, row)
    assert texture.shape == (1, CHANNELS, 206, 246)
    return texture[0, 3], one


@pytest.mark.parametrize("shape", ["rectangle", "rounded", "ellipse", "arch"])
def test_outlines_have_the_area_of_their_shape(shape: str) -> None:
    distance, one = texture_of(shape)
    a, b = 120.0, 100.0
    lost = 0.0  # by a pair of elliptical corners: (4 - pi) / 2 of the product of their radii
    for radius in (one.look.radius_top, one.look.radius_bottom):
        lost += (4 - np.pi) / 2 * radius[0] * a * radius[1] * b
    # distances are exact at the outline, so the clipped ramp integrates to the area
    area = float((distance + 0.5).clamp(0, 1).sum())
    assert abs(area / (4 * a * b - lost) - 1) < 2e-3


def test_polygons_have_the_area_of_their_kind() -> None:
    a, b = 120.0, 100.0
    expected = {(1.0, 0.5, 1.0): 3.0, (1.0, 1.0, 2**0.5): 8 * (2**0.5 - 1), (1.0, 1.0, 1.0): 2.0}
    seen = set()
    shares = ShapeShares(rectangle=0, rounded=0, ellipse=0, arch=0, polygon=1)
    config = dataclasses.replace(
        ALWAYS, max_pastes=1, layout=STANDING, framed=0.0, content=MIRRORS, shape=shares
    )
    for identity in range(30):
        (one,) = plan(wall_frame(0), identity, config)[:1] or (None,)
        if one is None:
            continue
        one = plain(one, picture_px=(240, 200))
        row = torch.from_numpy(look_row(one)[None]).float()
        texture = draw_textures(torch.zeros(1, 4, 206, 246, dtype=torch.uint8), row)
        area = float((texture[0, 3] + 0.5).clamp(0, 1).sum())
        assert abs(area / (expected[one.look.cut] * a * b) - 1) < 3e-3
        seen.add(one.look.cut)
    assert seen == set(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9))
def test_extreme_frames_and_settings_break_nothing(seed: int) -> None:
    check(seed)


def test_legacy_depth_falls_linearly_from_the_deepest_corner() -> None:
    frame = wall_frame(11, clutter=False, holes=False)
    config = dataclasses.replace(
        ALWAYS,
        max_pastes=1,
        layout=LayoutShares(hung=0, standing=0, legacy=1),
        content=MIRRORS,
        shape=RECTANGLES,
    )
    (one,) = plan(frame, 2, config)
    _, after = pasted([frame], [(one,)])
    drawn = (after.region != Region.BACKGROUND)[0, 0].numpy()
    depth = after.depth_m[0, 0].numpy()[drawn]
    v, u = np.nonzero(drawn)
    design = np.stack([u + 0.5, v + 0.5, np.ones(len(u))], 1)
    fit, *_ = np.linalg.lstsq(design, depth.astype(np.float64), rcond=None)
    np.testing.assert_allclose(design @ fit, depth, rtol=1e-5)
    corners = project(K, one.rectangle.corners())
    at = np.concatenate([corners, np.ones((4, 1))], 1) @ fit
    deepest = int(at.argmax())
    near = np.round(corners[deepest] - 0.5).astype(int).clip(0, [WIDTH - 1, HEIGHT - 1])
    assert abs(at[deepest] / frame.depth_m[near[1], near[0]] - 1) < 0.1
    assert abs(at[(deepest + 2) % 4] / frame.depth_m[drawn].min() - 1) < 0.1
    assert at.argmin() == (deepest + 2) % 4


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
    layouts = LayoutShares(hung=0.6, standing=0.3, legacy=0.1)
    shapes = ShapeShares(rectangle=1, rounded=1, ellipse=1, arch=1, polygon=1)
    shares = ContentShares(mural=1, screen=1, opening=1, empty=1)
    config = dataclasses.replace(
        ALWAYS, layout=layouts, shape=shapes, content=shares, mat=0.5, glass=0.5, stylised=0.3
    )
    pastes = plan(frame, seed, config)
    target = ("surface", "ignore", "virtual")[seed % 3]
    shown = contents(frame, pastes, target)
    before, after = shown_on([frame], [pastes], [shown], target)
    image, depth, valid, region = paste_reference(
        before.image[0].movedim(0, -1).numpy(),
        before.depth_m[0, 0].numpy(),
        before.valid[0, 0].numpy(),
        pastes,
        shown,
        K,
        depth_range_m=RANGE_M,
        mirror_target=target,
    )
    # a pixel centre within float32 rounding of an edge may fall on either side of it
    same = after.region[0, 0].numpy() == region
    assert (~same).sum() <= 2
    np.testing.assert_allclose(after.depth_m[0, 0].numpy()[same], depth[same], rtol=1e-5)
    assert np.array_equal(after.valid[0, 0].numpy()[same], valid[same])
    ours = after.image[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(ours[same], image[same], atol=1e-4)


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.2, 1.8])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_sharpness_and_noise_of_a_photograph_are_measured(sigma: float, noise: float) -> None:
    rng = np.random.default_rng(5)
    blocks = np.kron(rng.integers(40, 220, (16, 20)), np.ones((20, 20)))
    blurred = torch.from_numpy(blocks)[None, None]
    blurred = kornia.filters.gaussian_blur2d(blurred, (15, 15), (sigma, sigma))[0, 0].numpy()
    noisy = blurred + rng.normal(0, noise, blocks.shape)
    image = np.repeat(np.clip(np.round(noisy), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    found_sigma, found_noise = sharpness_and_noise(image)
    assert abs(found_sigma / sigma - 1) < 0.2
    assert abs(255 * found_noise - noise) < 0.4


def test_a_paste_has_the_noise_of_its_photograph() -> None:
    rng = np.random.default_rng(2)
    frame = wall_frame(4, clutter=False, holes=False)
    grey = np.clip(128 + rng.normal(0, 6, (HEIGHT, WIDTH, 1)), 0, 255).repeat(3, axis=2)
    frame = dataclasses.replace(frame, image=grey.astype(np.uint8))
    config = dataclasses.replace(
        ALWAYS, max_pastes=1, layout=STANDING, content=PICTURES, framed=0.0, area=(0.4, 0.4)
    )
    (one,) = plan(frame, 3, dataclasses.replace(config, shape=RECTANGLES))
    level = one.look.noise
    assert abs(255 * level - 6) < 1
    one = dataclasses.replace(plain(one), look=dataclasses.replace(plain(one).look, noise=level))
    width, height = one.picture_px
    content = dataclasses.replace(
        make_content(one, frame, WHOLE, K, SOURCES),
        picture=np.full((height, width, 3), 128, np.uint8),
    )
    _, after = shown_on([frame], [(one,)], [[content]])
    shown = after.image[0, 0][(after.region == Region.ART)[0, 0]]
    # a bilinear warp at about one texel per pixel leaves 2/3 of white noise's deviation
    assert 0.5 * level < float(shown.std()) < 1.0 * level
