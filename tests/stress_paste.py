"""Random draws of the paste stage over extreme frames and settings.

python -m tests.stress_paste 10000

Of every draw: no exception, no NaN or infinity, image in 0..1, valid truth in range, the background
untouched, the plane under every hung and standing paste, and virtual images behind their mirrors.
"""

import dataclasses
import sys

import numpy as np
import torch
from tqdm import tqdm

from flatdepth.augment.draw.composite import PasteGroup, paste, stack_plans
from flatdepth.augment.draw.content import Content, Sources, make_content
from flatdepth.augment.plan.coarse import thin_view
from flatdepth.augment.plan.layout import plan_pastes
from flatdepth.augment.rng import Draws
from flatdepth.config import ContentShares, LayoutShares, PasteConfig, ShapeShares
from flatdepth.geometry import View, pixel_rays
from flatdepth.types import Batch, Frame, Region


def extreme_frame(rng: np.random.Generator) -> Frame:
    """A frame of an odd size, camera and depth: constant, unknown, noise, steps, planes, specks."""
    height, width = (int(x) for x in rng.integers(16, 120, 2))
    focal = float(np.exp(rng.uniform(np.log(0.2), np.log(20)))) * max(height, width)
    centre = rng.uniform(-0.2, 1.2, 2) * (width, height)
    K_px = np.array(
        [[focal, 0, centre[0]], [0, focal * rng.uniform(0.7, 1.4), centre[1]], [0, 0, 1.0]]
    )
    kind = rng.integers(7)
    scale = float(np.exp(rng.uniform(np.log(0.01), np.log(1000))))
    depth = np.full((height, width), scale)
    if kind == 1:
        depth[:] = np.nan
    elif kind == 2:
        depth[:] = np.inf
    elif kind == 3:
        depth = scale * rng.uniform(0.1, 2.0, (height, width))
    elif kind == 4:
        depth[:, rng.integers(width) :] *= 100
    elif kind == 5:
        v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
        inverse = pixel_rays(K_px, u, v) @ (rng.uniform(-1, 1, 3) + np.array([0, 0, 1.2])) / scale
        depth = np.where(inverse > 1e-6, 1 / np.maximum(inverse, 1e-6), np.inf)
    elif kind == 6:
        depth[:] = np.nan
        depth[rng.integers(height), rng.integers(width)] = scale
    if rng.random() < 0.4:
        depth[rng.random(depth.shape) < rng.uniform(0, 0.6)] = np.nan
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if rng.random() < 0.2:
        image[:] = rng.choice([0, 128, 255])
    return Frame(
        image=image,
        depth_m=depth.astype(np.float32),
        K_px=K_px,
        key="extreme",
        dataset="stress",
        scene="s",
    )


def extreme_config(rng: np.random.Generator) -> PasteConfig:
    """Settings at and between the ends of what they may be."""

    def end(low: float, high: float) -> float:
        return float(rng.choice([low, high, rng.uniform(low, high)]))

    def between(low: float, high: float) -> tuple[float, float]:
        first, second = sorted((end(low, high), end(low, high)))
        return first, second

    def shares(kind: type) -> object:
        names = [field.name for field in dataclasses.fields(kind)]
        chosen = {name: float(rng.random() < 0.4) for name in names}
        chosen[str(rng.choice(names))] = 1.0
        return kind(**chosen)

    area = between(1e-4, 1.0)
    return PasteConfig(
        share=1.0,
        max_pastes=int(rng.integers(1, 5)),
        area=area,
        max_area=max(end(0.1, 1.0), area[0]),
        content=shares(ContentShares),
        layout=shares(LayoutShares),
        shape=shares(ShapeShares),
        max_tilt_deg=end(0, 80),
        framed=end(0, 1),
        frame_width=between(0.0, 0.4),
        mat=end(0, 1),
        stylised=end(0, 1),
        glass=end(0, 1),
        worn=end(0, 1),
        shadow=end(0, 1),
        match_light=end(0, 1),
        match_sensor=end(0, 1),
        thickness_m=between(0.0, 1.0),
        plane_tolerance=end(1e-4, 0.2),
        depth_noise=end(0, 0.1),
        mirror_portion=between(0.05, 1.0),
        mirror_target=str(rng.choice(["surface", "ignore", "virtual"])),
    )


def check(seed: int) -> int:
    """One draw; returns how many pastes it had."""
    rng = np.random.default_rng(seed)
    frame, config = extreme_frame(rng), extreme_config(rng)
    rows, columns = frame.depth_m.shape
    top, left = int(rng.integers(rows - 8)), int(rng.integers(columns - 8))
    view = View(
        top=top,
        left=left,
        crop_height=int(rng.integers(8, rows - top + 1)),
        crop_width=int(rng.integers(8, columns - left + 1)),
        height=14 * int(rng.integers(1, 9)),
        width=14 * int(rng.integers(1, 9)),
        flip=bool(rng.random() < 0.5),
    )
    near = float(rng.choice([0.01, 0.1, 1.0]))
    depth_range_m = (near, near * float(rng.choice([1.5, 200.0])))
    thin = thin_view(frame, view)
    plan = plan_pastes(
        thin,
        Draws(seed, 0, 0),
        config,
        picture_aspects=np.array([0.05, 1.0, 30.0])[: rng.integers(4)],
        depth_range_m=depth_range_m,
    )
    sources = Sources(
        picture=lambda number: rng.integers(
            0, 256, (int(60 / (number + 1)), 90, 3), dtype=np.uint8
        ),
        frame=lambda number: extreme_frame(np.random.default_rng(number % 50)),
    )
    contents = [
        make_content(one, frame, view, thin.K_px, sources, config.mirror_target) for one in plan
    ]
    truth = rng.uniform(0, 2 * depth_range_m[1], (view.height, view.width)).astype(np.float32)
    valid = (truth >= depth_range_m[0]) & (truth <= depth_range_m[1])
    batch = Batch(
        image=torch.from_numpy(rng.random((1, 3, view.height, view.width), dtype=np.float32)),
        depth_m=torch.from_numpy(np.where(valid, truth, 0))[None, None],
        valid=torch.from_numpy(valid)[None, None],
        region=torch.zeros(1, 1, view.height, view.width, dtype=torch.uint8),
        K_px=torch.from_numpy(thin.K_px)[None],
        sample=torch.tensor([0]),
    )

    def stacked(contents: list[Content]) -> tuple[PasteGroup, ...]:
        return stack_plans(
            [plan],
            [contents],
            thin.K_px[None],
            height=view.height,
            width=view.width,
            mirror_target=config.mirror_target,
        )

    result = paste(batch, stacked(contents), depth_range_m=depth_range_m)
    assert result.image.isfinite().all() and result.depth_m.isfinite().all()
    assert result.image.min() >= 0 and result.image.max() <= 1
    known = result.depth_m[result.valid]
    assert ((known >= depth_range_m[0]) & (known <= depth_range_m[1])).all()
    background = result.region == Region.BACKGROUND
    assert torch.equal(result.depth_m[background], batch.depth_m[background])
    assert torch.equal(result.valid[background], batch.valid[background])
    flat = ~background & (result.region != Region.DECOY) & result.valid
    if config.mirror_target == "virtual":
        contents = [dataclasses.replace(content, reflection=None) for content in contents]
        surface = paste(batch, stacked(contents), depth_range_m=depth_range_m)
        assert torch.equal(result.image, surface.image)
        mirror = flat & (result.region == Region.MIRROR)
        assert (result.depth_m[mirror] > surface.depth_m[mirror]).all()
        flat &= ~mirror
    if flat.any() and all(one.layout != "legacy" for one in plan):
        v, u = np.meshgrid(np.arange(view.height) + 0.5, np.arange(view.width) + 0.5, indexing="ij")
        rays = pixel_rays(thin.K_px, u, v)
        off = np.min(
            [
                np.abs(result.depth_m[0, 0].numpy() * (rays @ one.rectangle.plane) - 1)
                for one in plan
            ],
            axis=0,
        )
        assert off[flat[0, 0].numpy()].max() <= 1e-5
    return len(plan)


def main() -> None:
    """Check as many draws as asked for."""
    count = int(sys.argv[1])
    torch.set_num_threads(1)
    pastes = 0
    for seed in tqdm(range(count), disable=None):
        try:
            pastes += check(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    print(f"{count} draws, {pastes} pastes: no exception, no NaN, truth on its planes")


if __name__ == "__main__":
    main()
