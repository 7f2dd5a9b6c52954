"""The stages as Kornia augmentations: alone, in a sequence, replayed, in other types."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from flatdepth.augment.draw.composite import as_params, from_params, paste
from flatdepth.augment.flat_paste import (
    FlatPaste,
    Pasted,
    intrinsics_to_keypoints,
    keypoints_to_intrinsics,
)
from flatdepth.augment.photometric import NEUTRAL, Photometric, photometric
from flatdepth.cli import parse_config
from flatdepth.config import ContentShares, PasteConfig, PhotometricConfig, TrainConfig
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import to_device, training_samples
from flatdepth.data.readers.rooms import render_room
from flatdepth.errors import UserError
from flatdepth.geometry import pixel_rays
from flatdepth.training.loop import make_training_batch
from flatdepth.types import Region
from tests.conftest import REPOSITORY, TinySets

README = (REPOSITORY / "README.md").read_text("utf-8")
ART = REPOSITORY / "tests" / "data" / "art"
SIZE = (112, 140)
CPU = torch.device("cpu")
MASKS = ["input", "mask", "mask", "mask", "keypoints"]


@pytest.fixture(scope="module")
def rooms() -> tuple[Tensor, Tensor, Tensor]:
    """Image, depth in metres and intrinsics of four rooms."""
    frames = [render_room(0, number, 0, *SIZE) for number in range(4)]
    image = torch.from_numpy(np.stack([frame.image for frame in frames])).movedim(-1, 1) / 255
    depth_m = torch.from_numpy(np.stack([frame.depth_m for frame in frames]))[:, None]
    K_px = torch.from_numpy(np.stack([frame.K_px for frame in frames]))
    return image, depth_m, K_px


def always(**changes: object) -> FlatPaste:
    config = dataclasses.replace(PasteConfig(), share=1.0, **changes)
    return FlatPaste(config)


def inverse_depth_residual(found: Pasted, row: int, region: Region) -> list[float]:
    """How far 1/z on a region is from affine in (u, v), relative; nothing if it is small."""
    height, width = found.depth_m.shape[-2:]
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    inside = (found.region[row, 0] == region) & found.valid[row, 0]
    inverse = 1 / found.depth_m[row, 0].double().numpy()[inside]
    if len(inverse) < 30:
        return []
    rays = np.stack([u, v, np.ones_like(u)], -1)[inside.numpy()]
    plane, *_ = np.linalg.lstsq(rays, inverse, rcond=None)
    return [float(np.abs(rays @ plane / inverse - 1).max())]


def test_a_strangers_batch_gets_planar_truth(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    image, depth_m, K_px = rooms
    torch.manual_seed(3)
    only_mirrors = ContentShares(art=0, mural=0, screen=0, opening=0, empty=0, mirror=1)
    found = always(max_pastes=1, content=only_mirrors)(image, depth_m, K_px)
    assert isinstance(found, Pasted)
    pasted = found.region != Region.BACKGROUND
    assert pasted.flatten(1).any(1).sum() >= 3
    residuals = [
        residual
        for row in range(len(image))
        for residual in inverse_depth_residual(found, row, Region.MIRROR)
    ]
    assert len(residuals) >= 3 and max(residuals) < 1e-5
    outside = ~pasted & found.valid
    assert torch.equal(found.depth_m[outside], depth_m[outside])
    changed = (found.image != image).any(1, keepdim=True)
    assert changed[pasted].double().mean() > 0.95


def test_pictures_of_a_folder_are_hung(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    only_art = ContentShares(art=1, mural=0, screen=0, opening=0, empty=0, mirror=0)
    config = dataclasses.replace(PasteConfig(), share=1.0, content=only_art)
    found = FlatPaste(config, pictures=ART)(*rooms)
    assert (found.region == Region.ART).sum() > 100
    without = FlatPaste(config)(*rooms)
    assert (without.region == Region.BACKGROUND).all()


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"pictures: {tmp_path} holds no picture; expected"):
        FlatPaste(pictures=tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"pictures: .*a\.png is no readable picture"):
        FlatPaste(pictures=str(tmp_path))


def test_parameters_given_back_replay_the_pastes(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    stage = always()
    first = stage(*rooms)
    params = stage._params
    assert all(isinstance(value, Tensor) for value in params.values())
    assert not torch.equal(stage(*rooms).image, first.image)
    for mine, other in zip(first, stage(*rooms, params=params), strict=True):
        assert torch.equal(mine, other)
    torch.manual_seed(5)
    drawn = stage.forward_parameters(rooms[0].shape)
    one, other = (stage(*rooms, params=drawn) for _ in range(2))
    assert torch.equal(one.image, other.image) and not torch.equal(one.image, rooms[0])


def test_virtual_images_are_replayed_behind_the_surface_and_change_no_picture(
    rooms: tuple[Tensor, Tensor, Tensor],
) -> None:
    torch.manual_seed(3)
    mirrors = ContentShares(art=0, mural=0, screen=0, opening=0, empty=0, mirror=1)
    stage = always(max_pastes=2, content=mirrors, mirror_target="virtual")
    found = stage(*rooms)
    for mine, other in zip(found, stage(*rooms, params=dict(stage._params)), strict=True):
        assert torch.equal(mine, other)
    drawn = {name: stage._params[name] for name in ("seed", "batch_prob")}
    surface = always(max_pastes=2, content=mirrors)(*rooms, params=drawn)
    assert torch.equal(found.image, surface.image) and torch.equal(found.region, surface.region)
    mirror = found.region == Region.MIRROR
    both = mirror & found.valid & surface.valid
    assert both.sum() > 0.5 * mirror.sum() > 500
    assert (found.depth_m[both] > 1.02 * surface.depth_m[both]).all()
    assert torch.equal(found.depth_m[~mirror], surface.depth_m[~mirror])
    assert len(inverse_depth_residual(surface, 0, Region.MIRROR)) <= 1


def test_probability_and_sameness_are_kornias(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    never = FlatPaste(p=0.0)(*rooms)
    assert torch.equal(never.image, rooms[0]) and (never.region == 0).all()
    stage = FlatPaste(p=0.5)
    gates = torch.cat([stage.forward_parameters((200, 3, 8, 8))["batch_prob"] for _ in range(5)])
    assert 0.44 < gates.mean() < 0.56
    seeds = FlatPaste(same_on_batch=True).forward_parameters((7, 3, 8, 8))["seed"]
    assert len(seeds) == 7 and len(seeds.unique()) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_keep_their_type_and_depth_its_precision(
    rooms: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    image, depth_m, K_px = rooms
    stage = always()
    expected = stage(image.to(dtype).float(), depth_m, K_px)
    with torch.autocast("cpu", torch.bfloat16):
        found = stage(image.to(dtype), depth_m, K_px, params=stage._params)
    assert found.image.dtype == dtype and found.depth_m.dtype == torch.float32
    assert torch.equal(found.image, expected.image.to(dtype))
    assert torch.equal(found.depth_m, expected.depth_m)


def test_one_image_may_come_without_a_batch(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    one = [x[1] for x in rooms]
    for keepdim, shape in ((False, (1, 3, *SIZE)), (True, (3, *SIZE))):
        found = FlatPaste(p=1.0, keepdim=keepdim)(*one)
        assert found.image.shape == shape and found.depth_m.shape[-2:] == SIZE
    assert (found.region > 0).any()


def test_plans_survive_as_tensors(tiny_sets: TinySets, tmp_path: Path) -> None:
    """As the loader makes them: what the training is given is what the plans say, bit for bit."""
    path = tiny_sets.config(tmp_path, batch=4, micro_batch=4, paste__share=1.0)
    config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    stream = training_samples(
        open_corpus(config.data), config, first_step=0, rank=0, ranks=1, accumulation=1
    )
    depth_range_m = (config.data.min_depth_m, config.model.max_depth_m)
    for samples in itertools.islice(stream, 3):
        batch, groups, factors = to_device(samples, CPU, depth_range_m=depth_range_m)
        assert groups
        again = from_params(as_params(groups))
        assert [group.images for group in again] == [group.images for group in groups]
        expected = paste(batch, groups, depth_range_m=depth_range_m)
        image = photometric(expected.image, factors)
        found = make_training_batch(samples, config, CPU)
        assert torch.equal(found.image, image)
        for name in ("depth_m", "valid", "region", "K_px", "sample"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    stream.close()


# in a sequence


def sequence(*steps: torch.nn.Module) -> K.AugmentationSequential:
    return K.AugmentationSequential(*steps, data_keys=MASKS)


def through(
    steps: K.AugmentationSequential, rooms: tuple[Tensor, Tensor, Tensor]
) -> tuple[Pasted, Float[Tensor, "b 3 3"]]:
    image, depth_m, K_px = rooms
    region = torch.zeros_like(depth_m, dtype=torch.uint8)
    points = intrinsics_to_keypoints(K_px.float())
    image, depth_m, valid, region, points = steps(image, depth_m, depth_m > 0, region, points)
    return Pasted(image, depth_m, valid, region), keypoints_to_intrinsics(points)


def test_a_sequence_pastes_as_the_stage_alone(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    stage = always()
    found, K_px = through(sequence(stage), rooms)
    torch.testing.assert_close(K_px, rooms[2].float(), atol=1e-4, rtol=0)
    params = {"seed": stage._params["seed"], "batch_prob": torch.ones(4)}
    expected = always()(*rooms[:2], K_px.double(), params=params)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), atol=1e-6, rtol=1e-6)
    assert (found.region > 0).any()


def test_a_sequence_replays(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    steps = sequence(K.RandomHorizontalFlip(p=0.5), always(), Photometric(p=1.0))
    first, _ = through(steps, rooms)
    image, depth_m, K_px = rooms
    region = torch.zeros_like(depth_m, dtype=torch.uint8)
    points = intrinsics_to_keypoints(K_px.float())
    again = steps(image, depth_m, depth_m > 0, region, points, params=steps._params)
    for mine, other in zip(first, again, strict=False):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_known_points_stay_where_their_pixels_are(
    rooms: tuple[Tensor, Tensor, Tensor], place: str
) -> None:
    """Points of the scene, projected by what comes out, meet their depth there; and the truth of
    pastes is planar for the camera that comes out."""
    geometric = (
        K.RandomHorizontalFlip(p=1.0),
        K.RandomCrop((84, 98), p=1.0, cropping_mode="slice"),
        K.RandomVerticalFlip(p=0.0),
    )
    only_mirrors = ContentShares(art=0, mural=0, screen=0, opening=0, empty=0, mirror=1)
    stage = always(max_pastes=1, content=only_mirrors)
    steps = {
        "before": (stage, *geometric),
        "after": (*geometric, stage),
        "both": (geometric[0], stage, geometric[1], K.ColorJitter(0.1, 0.1, 0.1, 0.0, p=1.0)),
    }[place]
    found, K_px = through(sequence(*steps), rooms)
    assert found.image.shape[-2:] == found.depth_m.shape[-2:] == (84, 98)
    image, depth_m, K_before = rooms
    for row in range(len(image)):
        v, u = np.mgrid[4 : SIZE[0] : 9, 4 : SIZE[1] : 9] + 0.5
        z = depth_m[row, 0].double().numpy()[v.astype(int), u.astype(int)]
        u, v, z = (x[z < 20] for x in (u, v, z))
        points = pixel_rays(K_before[row].numpy(), u, v) * z[..., None]
        projected = points @ K_px[row].double().numpy().T
        u2, v2 = projected[..., 0] / z, projected[..., 1] / z
        inside = (u2 > 0) & (u2 < 98) & (v2 > 0) & (v2 < 84)
        assert inside.sum() > 50
        np.testing.assert_allclose(u2[inside] % 1, 0.5, atol=2e-3)  # at pixel centres
        columns, lines = u2[inside].astype(int), v2[inside].astype(int)
        background = (found.region[row, 0] == 0)[lines, columns].numpy()
        seen = found.depth_m[row, 0][lines, columns].double().numpy()
        assert background.sum() > 20
        np.testing.assert_allclose(seen[background], z[inside][background], rtol=1e-6)
    residuals = [r for row in range(4) for r in inverse_depth_residual(found, row, Region.MIRROR)]
    assert len(residuals) >= 2 and max(residuals) < 1e-5


def test_what_a_sequence_must_hold_is_said(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    image, depth_m, _ = rooms
    steps = K.AugmentationSequential(always(), data_keys=["input", "mask"])
    with pytest.raises(ValueError, match=r"needs depth .* and intrinsics .*\['image', 'mask'\]"):
        steps(image, depth_m)
    turned = sequence(K.RandomRotation((20, 20), p=1.0), always())
    with pytest.raises(ValueError, match="rotated or sheared; put FlatPaste before"):
        through(turned, rooms)


def test_the_photometric_stage_is_an_augmentation(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    image = rooms[0]
    torch.manual_seed(1)
    stage = Photometric(p=0.5)
    changed = stage(image.expand(4, -1, -1, -1))
    params = stage._params
    assert params["factors"].shape == (4, len(NEUTRAL))
    assert torch.equal(changed, stage(image, params=params))
    untouched = params["batch_prob"] == 0
    assert 0 < untouched.sum() < 4
    assert torch.equal(changed[untouched], image[untouched])
    factors = params["factors"][~untouched]
    assert torch.equal(changed[~untouched], photometric(image[~untouched], factors))
    half = stage(image.half(), params=params)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), changed, atol=2e-2, rtol=0)
    same = Photometric(PhotometricConfig(share=1.0), same_on_batch=True)
    same(image)
    assert (same._params["factors"] == same._params["factors"][0]).all()


def test_the_readmes_loop_trains_a_strangers_model(
    rooms: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if "FlatPaste" in block)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 9, padding=4), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 9, padding=4)
    )
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": [rooms] * 12}
    first = (model(rooms[0]) - rooms[1]).abs()[rooms[1] < 20].mean()
    exec(code, names)
    assert not any(map(torch.equal, before, model.parameters()))
    assert names["loss"] < 0.8 * first
    assert (names["pasted"].region > 0).any()


def test_the_sequence_of_the_docs_keeps_all_together(rooms: tuple[Tensor, Tensor, Tensor]) -> None:
    text = (REPOSITORY / "docs" / "augmentation.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = dict(zip(("image", "depth_m", "K_px"), rooms, strict=True))
    exec(code, names)
    assert names["image"].shape == (4, 3, 98, 98) and names["depth_m"].shape == (4, 1, 98, 98)
    assert names["K_px"].shape == (4, 3, 3)
