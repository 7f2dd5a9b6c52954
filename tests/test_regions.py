"""Frames whose own mirrors and pictures are labelled: packed, read, cut and judged by those."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import flatdepth
from flatdepth.augment.draw.content import true_depth
from flatdepth.augment.photometric import NEUTRAL
from flatdepth.augment.rng import Draws
from flatdepth.commands import pack as tool
from flatdepth.config import (
    ContentShares,
    DataConfig,
    EvalConfig,
    LossConfig,
    PasteConfig,
    SetConfig,
    TrainConfig,
)
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import (
    pasted_sample,
    to_device,
    training_samples,
    validation_sample,
)
from flatdepth.data.pack import pack
from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.sets import export, verify
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import View, view_region
from flatdepth.judge.validation import evaluate, protocol
from flatdepth.models.depth_anything import DepthAnythingV2
from flatdepth.report.preview import paste_owner
from flatdepth.training.loop import loss_weight, make_training_batch
from flatdepth.types import Region
from tests.conftest import REPOSITORY, TinySets

HEIGHT, WIDTH = 42, 56
NUMBERS = {0: "background", 7: "mirror", 9: "art", 200: "decoy"}


def write(raw: Path, scenes: int = 4, labelled: tuple[int, ...] = (1, 3)) -> None:
    """Scenes of one frame; those that are ``labelled`` have a region map."""
    draw = np.random.default_rng(0)
    for scene in range(scenes):
        folder = raw / f"scene{scene}"
        folder.mkdir(parents=True)
        Image.fromarray(draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / "c.png")
        codes = draw.integers(1000, 4000, (HEIGHT, WIDTH)).astype(np.uint16)
        Image.fromarray(codes).save(folder / "d.png")
        if scene in labelled:
            Image.fromarray(regions(scene)).save(folder / "r.png")


def regions(scene: int) -> np.ndarray:
    draw = np.random.default_rng(scene)
    return np.kron(draw.choice(list(NUMBERS), (6, 8)), np.ones((7, 7))).astype(np.uint8)


def reader(raw: Path, **options: object) -> FolderReader:
    names = ",".join(f"{number}:{name}" for number, name in NUMBERS.items())
    options = {"region_glob": "*/r.png", "region_names": names, "fov_deg": 60.0} | options
    return FolderReader(str(raw), "*/c.png", "*/d.png", 0.001, **options)


@pytest.fixture(scope="module")
def labelled_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regions")
    write(folder / "raw")
    pack(reader(folder / "raw"), folder / "set", workers=1)
    return folder / "set"


def test_region_maps_are_packed_bit_for_bit_where_there_are_some(
    labelled_set: Path, tmp_path: Path
) -> None:
    assert not verify(labelled_set).damage
    export(labelled_set, tmp_path / "files")
    with ShardSet.open(labelled_set) as shards:
        for number in range(4):
            found = shards.frame(number).region
            exported = tmp_path / "files" / "region" / f"{shards.keys[number]}.png"
            assert exported.exists() == (number in (1, 3))
            if number not in (1, 3):
                assert found is None
                continue
            wanted = regions(number)
            assert found is not None
            for code, name in NUMBERS.items():
                assert np.array_equal(found == Region[name.upper()], wanted == code)
            assert np.array_equal(np.asarray(Image.open(exported)), found)


def test_what_is_exported_can_be_packed_again(labelled_set: Path, tmp_path: Path) -> None:
    export(labelled_set, tmp_path / "files")
    again = FolderReader(
        str(tmp_path / "files"),
        "image/*/*.png",
        "depth/*/*.png",
        0.001,
        region_glob="region/*/*.png",
        intrinsics_glob="camera/*/*.json",
        dataset="again",
    )
    pack(again, tmp_path / "set", workers=1)
    with ShardSet.open(labelled_set) as first, ShardSet.open(tmp_path / "set") as second:
        for number in range(len(first)):
            one, other = first.frame(number), second.frame(number)
            np.testing.assert_allclose(other.K_px, one.K_px, rtol=1e-12)
            np.testing.assert_array_equal(other.depth_m, one.depth_m)
            np.testing.assert_array_equal(other.image, one.image)
            assert (one.region is None) == (other.region is None)
            if one.region is not None:
                np.testing.assert_array_equal(other.region, one.region)


def test_a_region_map_that_does_not_fit_is_a_bad_frame(tmp_path: Path) -> None:
    write(tmp_path / "raw", 1, (0,))
    place = tmp_path / "raw" / "scene0" / "r.png"
    own = reader(tmp_path / "raw")
    (item,) = own.list().items
    for content, reason in (
        (np.zeros((HEIGHT, WIDTH - 1), np.uint8), "regions and image differ in shape"),
        (np.full((HEIGHT, WIDTH), 256, np.uint16), "regions are not 8-bit"),
    ):
        Image.fromarray(content).save(place)
        with pytest.raises(UserError, match=reason):
            pack(own, tmp_path / reason.replace(" ", "_"), workers=1)
    place.write_bytes(b"junk")
    with pytest.raises(BadFrame, match="regions unreadable"):
        own.read(item)


@pytest.mark.parametrize("names", ["1", "1:window", "256:art", "x:art", "1:art,,2:mirror"])
def test_names_of_regions_that_are_none_are_one_sentence(tmp_path: Path, names: str) -> None:
    arguments = ["folder", "--raw=x", "--image_glob=*.jpg", "--depth_glob=*.png"]
    arguments += ["--depth_scale=1", f"--region_names={names}", f"--out={tmp_path}"]
    with pytest.raises(UserError, match="region_names: expected number:name"):
        tool.main(arguments)


@pytest.mark.parametrize("flip", [False, True])
def test_a_view_of_regions_has_what_lies_at_its_pixels_centres(flip: bool) -> None:
    region = torch.arange(12 * 16, dtype=torch.uint8).reshape(12, 16)
    view = View(top=2, left=3, crop_height=9, crop_width=12, height=3, width=4, flip=flip)
    found = view_region(region, view)
    wanted = region[2:11, 3:15][1::3, 1::3]  # the middle of each 3 x 3
    assert torch.equal(found, wanted.flip(1) if flip else wanted)
    whole = View(top=0, left=0, crop_height=12, crop_width=16, height=12, width=16)
    assert torch.equal(view_region(region, whole), region)


def test_labelled_frames_are_judged_by_their_labels_and_trained_with_them(
    labelled_set: Path,
) -> None:
    data = DataConfig(
        train=[SetConfig(path=str(labelled_set), val_scenes=["scene3"])], height=28, width=42
    )
    config = TrainConfig(data=data, batch=2, micro_batch=2)
    corpus = open_corpus(data)
    (held,) = corpus.val
    assert held.is_labelled and corpus.train[0].is_labelled
    cpu = torch.device("cpu")
    for pasted in (False, True):
        sample = validation_sample(corpus, config, held, 0, pasted=pasted)
        assert sample.is_labelled and not sample.plan
        batch, _, _ = to_device([sample], cpu, depth_range_m=(0.1, 20.0))
        assert torch.equal(
            batch.region[0, 0], view_region(torch.from_numpy(sample.frame.region), sample.view)
        )
        assert len(batch.region.unique()) == len(NUMBERS)
    stream = training_samples(corpus, config, first_step=0, rank=0, ranks=1, accumulation=1)
    seen = [sample.is_labelled for _ in range(3) for sample in next(stream)]
    stream.close()
    assert any(seen) and not all(seen)


def test_training_weighs_labelled_things_as_it_does_pasted_ones(labelled_set: Path) -> None:
    data = DataConfig(
        train=[SetConfig(path=str(labelled_set), val_scenes=["scene3"])], height=28, width=42
    )
    mirrors = ContentShares(art=0, mural=0, screen=0, opening=0, empty=0)
    pastes = PasteConfig(share=1.0, max_pastes=1, area=(0.03, 0.1), content=mirrors)
    config = TrainConfig(data=data, paste=pastes)
    corpus, cpu = open_corpus(data), torch.device("cpu")
    frame = corpus.val[0].frame(0)
    factors = np.array(list(NEUTRAL.values()))
    sample = validation_sample(corpus, config, corpus.val[0], 0, pasted=False)
    clean = make_training_batch([sample], config, cpu)
    assert torch.equal(clean.region[0, 0], view_region(torch.from_numpy(frame.region), sample.view))
    weight = loss_weight(clean, LossConfig(mirror=3.0, art=5.0))[clean.valid]
    assert torch.equal(weight == 3, clean.region[clean.valid] == Region.MIRROR)
    assert torch.equal(weight == 5, clean.region[clean.valid] == Region.ART)
    for seed in range(20):
        pasted = pasted_sample(
            corpus.val[0],
            0,
            sample.view,
            Draws(seed, 0, 0),
            config.paste,
            frame=frame,
            pictures=corpus.pictures,
            photometric=factors,
            depth_range_m=(0.1, 20.0),
        )
        if pasted.plan:
            break
    batch = make_training_batch([pasted], config, cpu)
    unchanged = batch.depth_m == clean.depth_m
    assert not unchanged.all()
    changed = batch.region != clean.region
    assert changed.any() and not (changed & (batch.region == Region.BACKGROUND)).any()
    owner = paste_owner([pasted], config, batch.region)
    assert (owner[unchanged] == -1).all() and (owner[changed] == 0).all()


def test_behind_a_labelled_mirror_is_what_the_source_measured(labelled_set: Path) -> None:
    with ShardSet.open(labelled_set) as shards:
        frame = next(f for f in map(shards.frame, range(len(shards))) if f.region is not None)
    behind = frame.depth_m + 7
    other = dataclasses.replace(frame, behind_m=behind)
    mirror = frame.region == Region.MIRROR
    for target, expected in (("surface", frame.depth_m), ("virtual", behind)):
        truth = true_depth(other, target)
        np.testing.assert_array_equal(truth[mirror], expected[mirror])
        np.testing.assert_array_equal(truth[~mirror], frame.depth_m[~mirror])
    assert np.isnan(true_depth(other, "ignore")[mirror]).all()


@pytest.mark.parametrize("target", ["ignore", "virtual"])
def test_labelled_mirrors_are_truth_only_as_surfaces(labelled_set: Path, target: str) -> None:
    data = DataConfig(
        train=[SetConfig(path=str(labelled_set), val_scenes=["scene3"])], height=28, width=42
    )
    seen = 0
    for share in (0.0, 1.0):
        batches, labels = {}, {}
        for own in ("surface", target):
            paste = PasteConfig(share=share, mirror_target=own)
            config = TrainConfig(data=data, batch=2, micro_batch=2, paste=paste)
            corpus = open_corpus(data)
            stream = training_samples(corpus, config, first_step=0, rank=0, ranks=1, accumulation=1)
            samples = [sample for _ in range(4) for sample in next(stream)]
            stream.close()
            batches[own] = make_training_batch(samples, config, torch.device("cpu"))
            labels[own], _, _ = to_device(samples, torch.device("cpu"), depth_range_m=(0.1, 20.0))
        mirror = labels[target].region == Region.MIRROR
        unpasted = batches["surface"].depth_m == labels["surface"].depth_m
        surface, other = (batches[own].valid & unpasted for own in ("surface", target))
        assert torch.equal(other, surface & ~mirror)
        seen += int((surface & mirror).sum())
    assert seen > 500


def test_validation_follows_the_target_of_mirrors_and_says_so_but_evaluation_does_not(
    labelled_set: Path,
) -> None:
    data = DataConfig(
        train=[SetConfig(path=str(labelled_set), val_scenes=["scene3"])], height=28, width=42
    )
    model = DepthAnythingV2("vitt", kind="metric").eval()
    words = {
        "surface": "",
        "ignore": "mirrors have no truth",
        "virtual": "labelled mirrors have none",
    }
    for target, word in words.items():
        paste = PasteConfig(mirror_target=target)
        config = TrainConfig(data=data, paste=paste, eval=EvalConfig(images=0, batch=1, pictures=0))
        table = evaluate(model, open_corpus(data), config, Accelerator(cpu=True), title="").table
        assert ("mirror" in table) == (target == "surface")
        assert {"art", "flat", "background"} <= set(table)
        assert protocol(config).endswith(word or "mean over images")
    weights = REPOSITORY / "shards" / "demo_vitt.safetensors"
    verdict = flatdepth.evaluate(weights, labelled_set, size=28)
    assert "mirror" in verdict.domains[0].tables[0]


def test_a_set_that_tells_what_is_flat_in_some_frames_is_judged_without_pastes(
    labelled_set: Path, tiny_sets: TinySets
) -> None:
    data = DataConfig(
        train=[SetConfig(path=str(tiny_sets.rooms))], val=[str(labelled_set)], height=28, width=42
    )
    config = TrainConfig(data=data, eval=EvalConfig(images=0, batch=3))
    model = DepthAnythingV2("vitt", kind="metric").eval()
    found = evaluate(model, open_corpus(data), config, Accelerator(cpu=True), title="")
    assert {found.table[region]["images"] for region in ("flat", "background", "clean")} == {2}
    assert [name for name, row in found.table.items() if "boundary_f1" in row] == ["clean"]
    assert found.sheet is not None
    weights = REPOSITORY / "shards" / "demo_vitt.safetensors"
    verdict = flatdepth.evaluate(weights, labelled_set, paste_seed=1, size=28)
    (table,) = verdict.domains[0].tables
    assert {table[region]["abs_rel"].count for region in ("flat", "background", "clean")} == {2}
