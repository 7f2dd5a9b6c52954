"""Measure flatdepth against simpler ways of doing the same, interleaved, as ratios.

python tools/benchmark.py paste [--batch 4] [--size 518] [--rounds 20] [--out FILE.json]
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import kornia
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flatdepth.augment.composite import paste, stack_plans
from flatdepth.augment.layout import Paste, plan_pastes, thin_view
from flatdepth.augment.photometric import draw_photometric, photometric
from flatdepth.augment.rng import Draws
from flatdepth.benchmark import as_json, compare, environment, table
from flatdepth.config import PasteConfig, PhotometricConfig
from flatdepth.errors import run_command
from flatdepth.geometry import View, project
from flatdepth.readers.rooms import render_room
from flatdepth.types import Batch, Frame, Region

RANGE_M = (0.1, 20.0)


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("paste", help="the paste stage, one layer of art per image")
    sub.add_argument("--batch", type=int, default=4, help="images per batch")
    sub.add_argument("--size", type=int, default=518, help="height and width in pixels")
    sub.add_argument("--rounds", type=int, default=20, help="timed rounds")
    sub.add_argument("--out", type=Path, help="write the figures as JSON")
    chosen = parser.parse_args(sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings = compare(
        paste_contenders(chosen.batch, chosen.size, device),
        baseline="grid_sample",
        rounds=chosen.rounds,
        device=device,
    )
    facts = environment(device)
    print(f"{chosen.batch} x 3 x {chosen.size} x {chosen.size}, {facts['device']}, one layer")
    print(table(timings))
    if chosen.out:
        chosen.out.write_text(json.dumps({"environment": facts, "timings": as_json(timings)}))


def paste_contenders(
    batch: int, size: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The stage, its parts and two yardsticks on the same rooms, each a call without arguments."""
    config = PasteConfig(share=1.0, max_pastes=1, mirror=0.0)
    frames = [render_room(0, number, 0, size, size) for number in range(batch)]
    view = View(top=0, left=0, crop_height=size, crop_width=size, height=size, width=size)
    plans = [_plan(frame, view, number, config) for number, frame in enumerate(frames)]
    art = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stacked = stack_plans(
        plans,
        [[art] * len(plan) for plan in plans],
        np.stack([frame.K_px for frame in frames]),
        height=size,
        width=size,
    ).to(device)
    clean = _batch(frames, device)
    draws = [Draws(0, 0, number) for number in range(batch)]
    factors = draw_photometric(draws, PhotometricConfig(share=1.0)).to(device)
    grid = F.affine_grid(
        torch.eye(2, 3)[None].repeat(batch, 1, 1), [batch, 3, size, size], align_corners=False
    )
    grid = grid.to(device)
    texture = torch.from_numpy(art).movedim(-1, 0)[None].float().repeat(batch, 1, 1, 1) / 255
    naive = _naive_kornia(clean, texture.to(device), frames, plans)
    return {
        "grid_sample": lambda: F.grid_sample(clean.image, grid, align_corners=False),
        "paste": lambda: paste(clean, stacked, depth_range_m=RANGE_M),
        "paste + photometric": lambda: photometric(
            paste(clean, stacked, depth_range_m=RANGE_M).image, factors
        ),
        "kornia, straightforward": lambda: naive(False),
        "kornia, + ColorJitter": lambda: naive(True),
        "plan (CPU, per batch)": lambda: [
            _plan(frame, view, number, config) for number, frame in enumerate(frames)
        ],
    }


def _plan(frame: Frame, view: View, number: int, config: PasteConfig) -> tuple[Paste, ...]:
    return plan_pastes(
        thin_view(frame, view),
        Draws(0, 0, number),
        config,
        picture_aspects=np.array([1.0]),
        depth_range_m=RANGE_M,
    )


def _batch(frames: list[Frame], device: torch.device) -> Batch:
    images = torch.from_numpy(np.stack([frame.image for frame in frames])).movedim(-1, 1)
    depth = torch.from_numpy(np.stack([frame.depth_m for frame in frames]))[:, None]
    valid = depth.isfinite() & (depth >= RANGE_M[0]) & (depth <= RANGE_M[1])
    return Batch(
        image=(images.float() / 255).contiguous().to(device),
        depth_m=torch.where(valid, depth, 0.0).to(device),
        valid=valid.to(device),
        region=torch.zeros_like(valid, dtype=torch.uint8).to(device),
        K_px=torch.from_numpy(np.stack([frame.K_px for frame in frames])).to(device),
        sample=torch.arange(len(frames), device=device),
    )


def _naive_kornia(
    clean: Batch, texture: Tensor, frames: list[Frame], plans: list[tuple[Paste, ...]]
) -> Callable[[bool], object]:
    """What one would write first: warp art, art mask and frame mask, blend, depth by a warp."""
    height, width = clean.image.shape[-2:]
    device = clean.image.device
    whole = torch.tensor([[0.0, 0], [width, 0], [width, height], [0, height]], device=device)
    whole = whole.repeat(len(frames), 1, 1) - 0.5
    quads = [
        [torch.from_numpy(project(frame.K_px, part.corners())).float() for part in parts]
        for frame, parts in (
            (frame, (plan[0].rectangle, plan[0].content))
            for frame, plan in zip(frames, plans, strict=True)
        )
    ]
    outer = torch.stack([quad[0] for quad in quads]).to(device) - 0.5
    inner = torch.stack([quad[1] for quad in quads]).to(device) - 0.5
    ones = torch.ones_like(clean.depth_m)
    planes = np.stack(
        [
            plan[0].rectangle.plane @ np.linalg.inv(f.K_px)
            for f, plan in zip(frames, plans, strict=True)
        ]
    )
    plane = torch.from_numpy(planes).float().to(device)
    jitter = kornia.augmentation.ColorJitter(0.2, 0.2, 0.2, 0.0, p=1.0)

    def run(with_jitter: bool) -> object:
        size = (height, width)
        to_outer = kornia.geometry.get_perspective_transform(whole, outer)
        to_inner = kornia.geometry.get_perspective_transform(whole, inner)
        art = kornia.geometry.warp_perspective(texture, to_inner, size, align_corners=True)
        mask = kornia.geometry.warp_perspective(ones, to_inner, size, align_corners=True)
        frame = kornia.geometry.warp_perspective(ones, to_outer, size, align_corners=True)
        image = clean.image * (1 - frame) + 0.3 * frame
        image = image * (1 - mask) + art * mask
        uv = kornia.geometry.create_meshgrid(
            height, width, normalized_coordinates=False, device=device
        )
        uv1 = torch.cat([uv + 0.5, torch.ones_like(uv[..., :1])], dim=-1)
        inverse = torch.einsum("bc,nhwc->bhw", plane, uv1)[:, None]
        depth = torch.where(frame > 0.5, 1 / inverse.clamp_min(1e-6), clean.depth_m)
        region = torch.where(mask > 0.5, int(Region.ART), torch.where(frame > 0.5, 3, 0))
        return (jitter(image) if with_jitter else image), depth, region

    return run


if __name__ == "__main__":
    run_command(main)
