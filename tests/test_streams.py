"""WebDataset streams: the indexed loader's frames, shared out, mixed, held-out scenes left out."""

import dataclasses
import io
import itertools
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from accelerate.state import AcceleratorState, GradientState

from flatdepth.config import DataConfig, SetConfig, TrainConfig
from flatdepth.data import loader
from flatdepth.data.frames import open_corpus
from flatdepth.data.loader import Sample, training_samples
from flatdepth.data.order import Order, name_hash
from flatdepth.data.pack import pack
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.webdataset import flatdepth_decoder
from flatdepth.data.streams import Stream
from flatdepth.errors import UserError
from flatdepth.report.preview import seen_batches
from flatdepth.training import runlog
from flatdepth.training.loop import make_training_batch, train
from tests.conftest import TinySets
from tests.test_shards import make_frame, write_set
from tests.test_train import BRIEF, SMALL, read_config

unclosed = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 5 scenes of 3 frames, every frame in a shard of its own."""
    folder = tmp_path_factory.mktemp("many") / "rooms"
    reader = RoomsReader(scenes=5, frames_per_scene=3, height=84, width=112)
    pack(reader, str(folder), workers=1, shard_mb=1e-6)
    return folder


@pytest.fixture
def config(tiny_sets: TinySets, tmp_path: Path) -> TrainConfig:
    return read_config(tiny_sets.config(tmp_path, data__loader="webdataset", **SMALL))


def with_train(config: TrainConfig, *paths: str, **data: object) -> TrainConfig:
    """The configuration with other training sets; validation is on the tiny rooms."""
    (rooms,) = config.data.train
    changes = {"train": [SetConfig(path=path) for path in paths], "val": [rooms.path]} | data
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def clean(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, paste=dataclasses.replace(config.paste, share=0.0))


def take(
    config: TrainConfig, count: int, first_step: int = 0, rank: int = 0, ranks: int = 1
) -> list[Sample]:
    stream = training_samples(
        open_corpus(config.data),
        config,
        first_step=first_step,
        rank=rank,
        ranks=ranks,
        accumulation=config.batch // config.micro_batch // ranks,
    )
    samples = list(itertools.islice(itertools.chain.from_iterable(stream), count))
    stream.close()
    return samples


def keys(samples: list[Sample]) -> list[str]:
    return [sample.frame.key for sample in samples]


@unclosed
def test_a_pipeline_of_anybody_decodes_what_our_own_reading_gives(shards: Path) -> None:
    urls = str(shards / "rooms-{000000..000014}.tar")
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).map(flatdepth_decoder)
    with ShardSet.open(shards) as own:
        for i, sample in enumerate(pipeline):
            frame = loader.Subset(shards=own, rows=np.array([i]), first_identity=0).frame(0)
            for name in ("image", "depth_m", "K_px"):
                expected = getattr(frame, name)
                assert sample[name].dtype == expected.dtype
                np.testing.assert_array_equal(sample[name], expected)
            told = (sample["__key__"], sample["key"], sample["dataset"], sample["scene"])
            assert told == (own.keys[i], frame.key, "rooms", own.scenes[i])
    assert i == 14


def test_samples_are_those_of_the_indexed_loader(config: TrainConfig) -> None:
    """For the same frame and draws: mirrors only, since what else is shown comes from elsewhere."""
    mirrors = {"art": 0.0, "mural": 0.0, "screen": 0.0, "opening": 0.0, "empty": 0.0}
    content = dataclasses.replace(config.paste.content, **mirrors)
    config = dataclasses.replace(
        config, paste=dataclasses.replace(config.paste, share=1.0, content=content)
    )
    corpus = open_corpus(dataclasses.replace(config.data, loader="indexed"))
    (subset,) = corpus.train
    cpu, pasted = torch.device("cpu"), 0
    for position, sample in enumerate(take(config, 12)):
        place = [subset.identity(place) for place in range(len(subset))].index(sample.identity)
        step = position // config.batch
        twin = loader.training_sample(corpus, config, subset, place, position, step)
        ours, theirs = (make_training_batch([one], config, cpu) for one in (sample, twin))
        for name in ("image", "depth_m", "valid", "region", "K_px", "sample"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        pasted += len(sample.plan)
    assert pasted > 6


def test_a_pass_is_every_training_sample_once(config: TrainConfig, shards: Path) -> None:
    corpus = open_corpus(dataclasses.replace(config.data, loader="indexed"))
    (subset,) = corpus.train
    trained = {subset.shards.keys[row] for row in subset.rows}
    assert len(trained) == 12
    for path in (config.data.train[0].path, str(shards)):
        entry = SetConfig(path=path)
        one = dataclasses.replace(config, data=dataclasses.replace(config.data, train=[entry]))
        assert len(open_corpus(one.data).streams[0].urls) == (12 if path == str(shards) else 1)
        passes = np.array(keys(take(clean(one), 24))).reshape(2, 12)
        assert set(passes[0]) == set(passes[1]) == trained
        assert passes[0].tolist() != passes[1].tolist()


def test_a_list_without_index_leaves_official_parts_out(tmp_path: Path) -> None:
    parts = ["train", "val", "test", "", ""]
    frames = [make_frame(number, split=part) for number, part in enumerate(parts)]
    write_set(str(tmp_path), frames, shard_bytes=2**20)
    stream = Stream.of_list(str(tmp_path / "tiny-000000.tar"), resampled=False)
    windows = list(itertools.islice(stream.windows(0, 0, 1), 6))
    names = [frames[number].key for number in (0, 3, 4)]
    trained = {name: name_hash(f"tiny/{name}") for name in names}
    assert {window.frame(0).key: window.identity(0) for window in windows} == trained
    # a pass may deal a rank none of the tars with samples to train on
    write_set(str(tmp_path / "many"), frames[:4], shard_bytes=1)
    stream = Stream.of_list(str(tmp_path / "many/tiny-{000000..000003}.tar"), resampled=False)
    for rank in range(4):
        assert next(stream.windows(0, rank, 4)).frame(0).key in names


@pytest.mark.parametrize("source", ["shards", "pipe", "resampled"])
def test_ranks_share_a_pass(config: TrainConfig, shards: Path, source: str) -> None:
    """By shards where there are enough of them, else by samples."""
    (tar,) = Path(config.data.train[0].path).glob("*.tar")
    path = f"pipe:cat {tar}" if source == "pipe" else str(shards / "rooms-{000000..000014}.tar")
    config = clean(with_train(config, path, resampled=source == "resampled"))
    found = [keys(take(config, size, rank=rank, ranks=2)) for rank, size in ((0, 8), (1, 7))]
    if source == "resampled":
        assert len(set(found[0] + found[1])) < 15
        assert found[0][:7] != found[1]
    else:
        assert Counter(found[0] + found[1]).most_common(1)[0][1] == 1


def test_the_order_follows_from_seed_and_first_step_alone(
    config: TrainConfig, shards: Path
) -> None:
    config = clean(with_train(config, str(shards / "rooms-{000000..000014}.tar")))
    data = dataclasses.replace(config.data, threads=1, prefetch=1)
    alone = dataclasses.replace(config, data=data)
    first = keys(take(config, 20))
    assert keys(take(alone, 20)) == first
    assert keys(take(config, 20, first_step=2)) != first[8:] + first[:8]
    assert keys(take(dataclasses.replace(config, seed=1), 20)) != first


def test_sets_are_mixed_as_the_indexed_loader_mixes_them(config: TrainConfig) -> None:
    (rooms,) = config.data.train
    (tar,) = Path(rooms.path).glob("*.tar")
    entries = [SetConfig(path=rooms.path, weight=3.0), SetConfig(path=str(tar), weight=1.0)]
    config = clean(
        dataclasses.replace(config, data=dataclasses.replace(config.data, train=entries))
    )
    listed = [sample.identity >= 15 for sample in take(config, 40)]
    order = Order(sizes=(12, 15), weights=(3.0, 1.0), seed=config.seed)
    assert listed == order.draw(np.arange(40)).set.astype(bool).tolist()
    assert 0 < sum(listed) < 20


def test_other_frames_come_from_the_stream(config: TrainConfig) -> None:
    """Murals show frames of the training part that follow soon, not the frame alone."""
    stream = open_corpus(config.data).streams[0]
    window = next(stream.windows(0, 0, 1))
    shown = {window.frame(place).key for place in range(len(window))}
    assert len(shown) > 8
    assert shown <= set(stream.identities or ())


@pytest.fixture(autouse=True)
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)


def test_a_run_from_a_pipe_and_a_set_goes_on_with_a_note(
    tiny_sets: TinySets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tar,) = tiny_sets.rooms.glob("*.tar")
    train_on = [{"path": f"pipe:cat {tar}"}, {"path": str(tiny_sets.rooms)}]
    brief = BRIEF | {"data__loader": "webdataset", "data__train": train_on, "save_every": 1}
    config = read_config(tiny_sets.config(tmp_path, steps=2, **brief))
    assert train(config)["finished"]
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints/step-00000002")
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "begin anew" not in capsys.readouterr().out
    assert train(config)["finished"]
    assert "the WebDataset streams begin anew at step 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="only step 0 can be shown again, not 1"):
        next(seen_batches(config, 1))


def test_mistakes_are_sentences(config: TrainConfig, tiny_sets: TinySets, tmp_path: Path) -> None:
    (tar,) = tiny_sets.rooms.glob("*.tar")
    (art,) = tiny_sets.pictures.glob("*.tar")
    cut, foreign, empty = (tmp_path / f"{name}.tar" for name in ("cut", "foreign", "empty"))
    with ShardSet.open(tiny_sets.rooms) as rooms:
        offset, _ = rooms.index.members["depth.fdz"][7].tolist()
    cut.write_bytes(tar.read_bytes()[: offset + 100])
    with tarfile.open(foreign, "w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    tarfile.open(empty, "w").close()
    for path, message in {
        str(tmp_path / "no.tar"): r"cannot read .*no\.tar to its end \(FileNotFoundError: No such",
        f"pipe:cat {tmp_path}/no.tar 2>/dev/null": r"cannot read pipe:cat .*no\.tar .*to its end",
        str(cut): r"cannot read .*cut\.tar to its end \(ReadError: unexpected end of data",
        str(foreign): r"cannot read .*foreign\.tar to its end .*sample a has no \.json",
        str(empty): r"empty\.tar has no samples to train on for rank 0 of 1",
        str(art): r"sample .* is not a whole frame with depth \(no depth",
    }.items():
        with pytest.raises(UserError, match=message):
            take(with_train(config, path), 15)
    with pytest.raises(UserError, match=r"a\$\{B\}\.tar is no list of URLs \(missing environment"):
        open_corpus(with_train(config, "a${B}.tar").data)
    with pytest.raises(UserError, match="is no directory of a shard set"):
        open_corpus(with_train(config, str(tar), loader="indexed").data)
    with pytest.raises(UserError, match="no training set has an index with a second scene"):
        open_corpus(with_train(config, str(tar), val=[]).data)
    entry = SetConfig(path=str(tar), val_scenes=["room_0000"])
    with pytest.raises(UserError, match=r"val_scenes of .* needs an index"):
        open_corpus(dataclasses.replace(config.data, train=[entry], val=[str(tiny_sets.rooms)]))
    with pytest.raises(UserError, match=r"data\.resampled: the indexed loader goes through"):
        DataConfig(resampled=True)
    entry = SetConfig(path="x", shuffle_block=2)
    with pytest.raises(UserError, match=r"data\.train: .*leave shuffle_block out, or set data\."):
        DataConfig(loader="webdataset", train=[entry])
