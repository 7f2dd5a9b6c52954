"""The loader against decoding alone and against WebDataset with a DataLoader, on the same shards.

Contenders take turns within one run. Each starts, gives ``WARM_UP`` samples that do not count, then
the timed ones, and ends, so that none works in the background of another.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import torch
import webdataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from flatdepth.bench.timing import environment
from flatdepth.cli import cpus, keep_freed_memory
from flatdepth.config import TrainConfig
from flatdepth.data.frames import Corpus, open_corpus
from flatdepth.data.loader import in_order, training_samples
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.webdataset import flatdepth_decoder
from flatdepth.errors import UserError

WARM_UP = 16
DISTINCT = 64
"""Samples that decoding alone keeps in memory."""

DECODING = "decoding only"
CLEAN = "loader, no pastes"
PASTED = "loader, pastes planned"
ONE_PROCESS = "... in 1 process"
PROCESSES = f"... in {cpus()} processes"
WEBDATASET = "WebDataset + DataLoader"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRates:
    """What the contenders take, on as many threads or worker processes; (25 %, median, 75 %).

    Attributes:
        rates: samples per second by contender.
        cpu_ms: CPU milliseconds per sample, workers included, by contender. On a machine that
            others use too these are the steadier figures.
        own_ms: those of the training process alone, which more workers do not share.
        to_decoding: rate of the loader without pastes to that of decoding alone in the same round.
        to_webdataset: the same to WebDataset + DataLoader.
        to_one_process: rate of as many processes as there are CPUs to that of one.
        wait_share: share of the time that a training of ``pace`` images/s waits for data.
        pace: images/s.
        environment: what the figures depend on.
    """

    rates: Mapping[str, tuple[float, float, float]]
    cpu_ms: Mapping[str, tuple[float, float, float]]
    own_ms: Mapping[str, tuple[float, float, float]]
    to_decoding: tuple[float, float, float]
    to_webdataset: tuple[float, float, float]
    to_one_process: tuple[float, float, float]
    wait_share: float
    pace: float
    environment: Mapping[str, object]


def measure_loader(config: TrainConfig, *, samples: int, rounds: int, pace: float) -> LoaderRates:
    """Time all contenders on the training sets of a configuration.

    Args:
        samples: timed per contender and round.
        rounds: of all contenders in turn.
        pace: images/s of the training whose waiting is measured.

    Raises:
        UserError: the data do not fit the configuration.
    """
    corpus = open_corpus(config.data)
    if len(corpus.train) < len(config.data.train):
        raise UserError(
            "data.train: the loaders are compared on sets with an index; name directories of sets"
        )
    no_pastes = dataclasses.replace(config.paste, share=0.0, stages=[])
    contenders: dict[str, Callable[[], Generator[object, None, None]]] = {
        DECODING: partial(_decode_only, corpus, config),
        CLEAN: partial(
            _loader, corpus, _with_processes(dataclasses.replace(config, paste=no_pastes), 0)
        ),
        PASTED: partial(_loader, corpus, _with_processes(config, 0)),
        ONE_PROCESS: partial(_loader, corpus, _with_processes(config, 1)),
        PROCESSES: partial(_loader, corpus, _with_processes(config, cpus())),
        WEBDATASET: _WebDataset(corpus, config, WARM_UP + samples),
    }
    names = list(contenders)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(_timed(contenders[name](), samples))
    seconds = {name: np.array(values)[:, 0] for name, values in found.items()}
    cpu_seconds = {name: np.array(values)[:, 1] for name, values in found.items()}
    own_seconds = {name: np.array(values)[:, 2] for name, values in found.items()}
    sizes = {
        tuple(size)
        for subset in corpus.train
        for size in np.unique(subset.shards.sizes, axis=0).tolist()
    }
    return LoaderRates(
        rates={name: _quartiles(samples / values) for name, values in seconds.items()},
        cpu_ms={name: _quartiles(1e3 * values / samples) for name, values in cpu_seconds.items()},
        own_ms={name: _quartiles(1e3 * values / samples) for name, values in own_seconds.items()},
        to_decoding=_quartiles(seconds[DECODING] / seconds[CLEAN]),
        to_webdataset=_quartiles(seconds[WEBDATASET] / seconds[CLEAN]),
        to_one_process=_quartiles(seconds[ONE_PROCESS] / seconds[PROCESSES]),
        wait_share=_wait_share(corpus, config, pace, samples),
        pace=pace,
        environment={
            **environment(torch.device("cpu")),
            "loader_threads": config.data.threads,
            "sizes": sorted(sizes),
        },
    )


def loader_rate(corpus: Corpus, config: TrainConfig, samples: int) -> float:
    """Samples per second that training would get, over ``samples`` of them."""
    return samples / _timed(_loader(corpus, config), samples)[0]


def _with_processes(config: TrainConfig, count: int) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, processes=count))


def _timed(stream: Generator[object, None, None], samples: int) -> tuple[float, float, float]:
    """Seconds of ``samples`` after the warm-up: wall, CPU, and CPU of this process alone."""
    for _ in itertools.islice(stream, WARM_UP):
        pass
    begin = np.array([time.perf_counter(), *_cpu_seconds()])
    for _ in itertools.islice(stream, samples):
        pass
    wall, cpu, own = np.array([time.perf_counter(), *_cpu_seconds()]) - begin
    stream.close()
    return wall, cpu, own


def _cpu_seconds() -> tuple[float, float]:
    """CPU time so far of this process with its living children, and of this process."""
    this = psutil.Process()
    own, *others = (sum(p.cpu_times()[:2]) for p in (this, *this.children(recursive=True)))
    return own + sum(others), own


def _decode_only(corpus: Corpus, config: TrainConfig) -> Generator[object, None, None]:
    """Frames decoded from bytes in memory on the loader's threads, for ever."""
    members = [
        _members(subset.shards, int(row))
        for subset in corpus.train
        for row in subset.rows[: max(1, DISTINCT // len(corpus.train))]
    ]
    yield from in_order(
        flatdepth_decoder,
        itertools.cycle(members),
        threads=config.data.threads,
        ahead=config.data.prefetch * config.micro_batch,
    )


def _members(shards: ShardSet, row: int) -> dict[str, object]:
    """A sample as WebDataset gives it before decoding."""
    return {"__key__": shards.keys[row], "__url__": shards.url, **shards.members(row)}


def _loader(corpus: Corpus, config: TrainConfig) -> Generator[object, None, None]:
    """Samples as training gets them, for ever."""
    accumulation = max(1, config.batch // config.micro_batch)
    stream = training_samples(
        corpus, config, first_step=0, rank=0, ranks=1, accumulation=accumulation
    )
    try:
        for batch in stream:
            yield from batch
    finally:
        stream.close()


class _WebDataset:
    """Frames decoded by WebDataset in the worker processes of a DataLoader.

    Shards are resampled, as WebDataset advises, so that every worker has work however few there
    are. Frames come as tensors in shared memory, one by one.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig, samples: int) -> None:
        shards = [
            subset.shards.shard_path(number)
            for subset in corpus.train
            for number in range(len(subset.shards.index.shards))
        ]
        workers = config.data.threads
        # Something is always left in the queues when the timing ends, as in the other contenders.
        per_worker = samples // workers + config.data.prefetch
        pipeline = webdataset.WebDataset(
            shards, resampled=True, shardshuffle=False, seed=config.seed
        )
        pipeline = pipeline.shuffle(DISTINCT).map(flatdepth_decoder).with_epoch(per_worker)
        self._loader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=config.data.prefetch,
            persistent_workers=True,
            multiprocessing_context="spawn",
            worker_init_fn=_start_worker,
        )

    def __call__(self) -> Generator[object, None, None]:
        iterator: Iterator[object] = iter(self._loader)
        try:
            yield from iterator
        finally:
            for _ in iterator:  # the workers' epoch ends before the next contender begins
                pass


def _start_worker(_number: int) -> None:
    """A worker has what flatdepth's programs have."""
    keep_freed_memory()


def _wait_share(corpus: Corpus, config: TrainConfig, pace: float, samples: int) -> float:
    """Share of the time that a training of ``pace`` images/s waits for its micro-batches.

    The training is a sleep, so the loader has all cores, as beside a GPU.
    """
    accumulation = max(1, config.batch // config.micro_batch)
    stream = training_samples(
        corpus, config, first_step=0, rank=0, ranks=1, accumulation=accumulation
    )
    next(stream)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(max(1, samples // config.micro_batch)):
        time.sleep(config.micro_batch / pace)
        asked = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - asked
    total = time.perf_counter() - begin
    stream.close()
    return waited / total


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return low, middle, high


def loader_text(config: TrainConfig, found: LoaderRates) -> str:
    """The rates and CPU times as a table, then the ratios."""
    width = max(len(name) for name in found.rates)
    sizes = ", ".join(f"{height} x {width}" for height, width in found.environment["sizes"])  # type: ignore[attr-defined]
    lines = [
        f"frames of {sizes}, {config.data.threads} threads or worker processes",
        f"{'':{width}}  {'samples/s':>9}  {'quartiles':>15}  {'CPU ms':>7}  {'quartiles':>13}",
    ]
    for name, (low, middle, high) in found.rates.items():
        cpu_low, cpu, cpu_high = found.cpu_ms[name]
        lines.append(
            f"{name:{width}}  {middle:9.1f}  {low:7.1f}-{high:7.1f}  "
            f"{cpu:7.1f}  {cpu_low:6.1f}-{cpu_high:6.1f}"
        )
    for name, ratio in ((DECODING, found.to_decoding), (WEBDATASET, found.to_webdataset)):
        cpu = found.cpu_ms[name][1] / found.cpu_ms[CLEAN][1]
        lines.append(
            f"{CLEAN}, to {name}: {ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f}); "
            f"by CPU time {cpu:.2f}"
        )
    plan_ms = found.cpu_ms[PASTED][1] - found.cpu_ms[CLEAN][1]
    low, middle, high = found.to_one_process
    own, cpu = found.own_ms[PROCESSES][1], found.cpu_ms[PROCESSES][1]
    lines += [
        f"pastes planned and shown: {plan_ms:.1f} ms of CPU per sample",
        f"{PROCESSES} to 1: {middle:.2f} ({low:.2f}-{high:.2f}); of {cpu:.1f} ms the training "
        f"itself takes {own:.1f}: on 16 cores, by arithmetic, {min(1e3 / own, 16e3 / cpu):.0f} "
        "samples/s",
    ]
    lines.append(f"a training of {found.pace:g} images/s waits {found.wait_share:.1%} of the time")
    return "\n".join(lines)
