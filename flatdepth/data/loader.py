"""From positions to batches: threads that read, decode and plan, and the copy to the device.

JPEG and zstd decoding, numpy and PIL release the interpreter lock for most of their time, so
threads in the training process keep up without pickling or shared memory. Planning does not: where
that sets the pace, each thread has a process that does its work. Results come in order.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from threadpoolctl import ThreadpoolController

from flatdepth.augment.draw.composite import PasteGroup, stack_plans
from flatdepth.augment.draw.content import Content, Sources, make_content, true_depth
from flatdepth.augment.photometric import NEUTRAL, draw_photometric
from flatdepth.augment.plan.coarse import thin_view
from flatdepth.augment.plan.layout import Paste, is_pasted, plan_pastes
from flatdepth.augment.rng import Draws, hash_words
from flatdepth.cli import free_memory, keep_freed_memory, local_ranks
from flatdepth.config import MAX_DEPTH_M, DataConfig, ModelConfig, PasteConfig, TrainConfig
from flatdepth.data.frames import Corpus, Pictures, Subset, open_corpus
from flatdepth.data.order import Order, rank_draw
from flatdepth.data.shards.ahead import AHEAD_BYTES, ReadAhead
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.streams import Window
from flatdepth.data.workers import Workers
from flatdepth.errors import UserError
from flatdepth.geometry import View, view_depth, view_image, view_region
from flatdepth.pace import Lane, add, preparing, stage
from flatdepth.types import Batch, Frame

Task = TypeVar("Task")
Result = TypeVar("Result")
AnyBatch = TypeVar("AnyBatch", bound=Batch)
Timed = tuple[Window, float]

FRAME_BYTES = 8
"""Per pixel of a prepared sample: colours, depth, and one for what else there is."""

PROCESS_BYTES = 400 * 10**6
"""What a process that prepares samples takes."""

EVAL_AHEAD = 4
"""Validation batches prepared ahead."""

LOOKED_UP = 1024
"""Positions whose samples are looked up together, for speed."""

DEALT = 1 << 14
"""The same where all ranks' samples of a step are looked up to be dealt out."""

ANNOUNCED = 256
"""Samples on servers that are announced together; so many at least are known ahead of use."""

READERS = 2
"""Requests ahead of use per loader thread, of samples on servers."""

_PLANNING = threading.Lock()
"""One thread plans at a time: small numpy calls of several would pass the interpreter's lock to and
fro at every array, which costs 20 % with 4 threads and 24 % with 8."""


@runtime_checkable
class Frames(Protocol):
    """Where samples come from; ``Subset`` and ``Window`` are such."""

    def __len__(self) -> int: ...

    def frame(self, place: int) -> Frame: ...

    def identity(self, place: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One frame with all that was decided about it on the CPU.

    Attributes:
        frame: at its source resolution.
        view: the crop, resize and flip to the network's input.
        plan: its pastes from back to front.
        contents: per paste what it shows.
        mirror_target: which truth mirrors have, as `paste.mirror_target`.
        photometric: (10,) factors of ``draw_photometric``.
        identity: number of the frame in the run.
        loss_seed: what random numbers of a loss follow from, below 2^32.
        seconds: that it took, by ``pace.LOADER_STAGES``.
    """

    frame: Frame
    view: View
    plan: tuple[Paste, ...]
    contents: tuple[Content, ...]
    mirror_target: str
    photometric: Float64[np.ndarray, " 10"]
    identity: int
    loss_seed: int
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def is_labelled(self) -> bool:
        """Whether the frame's own flat things are known; it is judged by those, without pastes."""
        return self.frame.region is not None


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """``map`` on a thread pool, with at most ``ahead`` results in flight, in the order of tasks.

    numpy's OpenBLAS is kept to one thread meanwhile: its own threads would wait for those here, at
    twice the CPU time.
    """
    blas = ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(work, task))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # without waiting: a read may hang, and what is not asked for any more has no end
        executor.shutdown(wait=False, cancel_futures=True)
        blas.restore_original_limits()


def training_samples(
    corpus: Corpus,
    config: TrainConfig,
    *,
    first_step: int,
    rank: int,
    ranks: int,
    accumulation: int,
) -> Generator[list[Sample], None, None]:
    """Endless micro-batches of one rank from an optimiser step on; see ``expect_room_ahead``.

    A sample, its crop and its pastes are functions of (seed, position) and the configuration, so
    the stream can be entered at any step and does not depend on ranks, threads or processes.
    Samples of WebDataset streams are functions of (seed, first step, rank, ranks): a position says
    which stream is read on, and how it is drawn.
    """
    expect_room_ahead(corpus, config)
    sizes = (1,) * len(corpus.streams) or tuple(len(subset) for subset in corpus.train)
    order = Order(
        sizes=sizes,
        weights=corpus.weights,
        seed=config.seed,
        locality=() if corpus.streams else corpus.locality,
    )
    stream_seed = hash_words(config.seed, first_step)
    streams = [stream.windows(stream_seed, rank, ranks) for stream in corpus.streams]
    reader = ThreadPoolExecutor(1, thread_name_prefix="stream")
    count = config.data.processes
    ahead = ReadAhead(READERS * (count or config.data.threads))

    per_step = accumulation * config.micro_batch
    steps = max(1, DEALT // (per_step * ranks) if order.is_local else LOOKED_UP // per_step)

    def tasks() -> Iterator[_Task]:
        for first in itertools.count(first_step, steps):
            draw = rank_draw(
                order,
                first,
                steps,
                micro_batch=config.micro_batch,
                rank=rank,
                ranks=ranks,
                accumulation=accumulation,
            )
            samples = zip(draw.set.tolist(), draw.index.tolist(), draw.epoch.tolist(), strict=True)
            for number, (set_, place, epoch) in enumerate(samples):
                window = reader.submit(_timed, streams[set_]) if streams else None
                yield _Task(first + number // per_step, set_, place, epoch, window)

    def sample_of(task: _Task) -> tuple[ShardSet, int]:
        subset = corpus.train[task.set]
        return subset.shards, int(subset.rows[task.place])

    is_remote = not streams and is_any_remote(corpus)
    workers = Workers(partial(_in_process, config, dict(corpus.digests)), count) if count else None
    prepare = workers or partial(_prepare, corpus, config)

    def load(task: _Task) -> Sample:
        if isinstance(task.window, Future):
            window, read_s = task.window.result()
            task = task._replace(window=window, read_s=read_s)
        elif workers is not None and is_remote:
            shards, row = sample_of(task)
            if shards.ranges is not None:  # read here, where it is read ahead
                begin = time.perf_counter()
                blob = shards.read_bytes(row)
                task = task._replace(blob=blob, read_s=time.perf_counter() - begin)
        return prepare(task)

    samples = in_order(
        load,
        ahead.through(tasks(), ANNOUNCED, sample_of) if is_remote else tasks(),
        threads=count or config.data.threads,
        ahead=config.data.prefetch * config.micro_batch,
    )

    def micro_batches() -> Generator[list[Sample], None, None]:
        batch: list[Sample] = []
        try:
            with closing(samples):
                for sample in samples:
                    batch.append(sample)
                    if len(batch) == config.micro_batch:
                        yield batch
                        batch = []
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            ahead.close()
            if workers is not None:
                workers.close()

    return micro_batches()


def _timed(stream: Iterator[Window]) -> Timed:
    begin = time.perf_counter()
    return next(stream), time.perf_counter() - begin


class _Task(NamedTuple):
    """A sample to prepare: step, number of the training set, place in it, and epoch.

    ``window`` is what a stream gives instead of the place, ``blob`` the sample's bytes if they are
    read already, ``read_s`` the seconds that either took.
    """

    step: int
    set: int
    place: int
    epoch: int
    window: Window | Future[Timed] | None = None
    blob: bytes | None = None
    read_s: float = 0.0


def _prepare(corpus: Corpus, config: TrainConfig, task: _Task) -> Sample:
    if isinstance(task.window, Window):
        frames: Frames = task.window
    else:
        frames = subset = corpus.train[task.set]
        if task.blob is not None:
            subset.shards.hand(int(subset.rows[task.place]), task.blob)
    with preparing() as seconds:
        add("read", task.read_s)
        sample = training_sample(corpus, config, frames, task.place, task.epoch, task.step)
    return replace(sample, seconds=seconds)


def _in_process(config: TrainConfig, digests: Mapping[str, str]) -> Callable[[_Task], Sample]:
    """``_prepare`` for a process of its own, which opens the corpus once more."""
    keep_freed_memory()
    corpus = open_corpus(config.data)
    if corpus.digests != digests:
        raise UserError("data: a shard set was changed while the run began; start it again")
    return partial(_prepare, corpus, config)


def lanes(config: TrainConfig) -> tuple[Lane, ...]:
    """Who prepares the samples of a training, for ``pace.limit``."""
    data = config.data
    streamed = data.loader == "webdataset"
    ahead = data.prefetch * config.micro_batch
    kind, count = ("processes", data.processes) if data.processes else ("threads", data.threads)
    workers = Lane(
        "a loader process" if data.processes else "a loader thread",
        min(count, ahead),
        ("decode", "plan", "content") if streamed else ("read", "decode", "plan", "content"),
        "raise data.prefetch" if ahead < count else f"raise data.{kind}",
    )
    reader = Lane("the one thread that reads streams", 1, ("read",), "")
    planner = Lane("the one thread that plans", 1, ("plan",), "set data.processes")
    return (reader,) * streamed + (planner,) * (not data.processes) + (workers,)


def expect_room_ahead(corpus: Corpus, config: TrainConfig) -> None:
    """Refuse to prepare more samples ahead than half of the free memory holds.

    Raises:
        UserError: it does not hold as many of the largest frames with what their pastes show, or
            the processes that prepare them.
    """
    frame_px = max(
        int(subset.shards.sizes[subset.rows].prod(axis=1, dtype=np.int64).max())
        for subset in (*corpus.train, *corpus.val)
        if len(subset)
    )
    shown_px = config.data.height * config.data.width * config.paste.max_pastes
    room = free_memory() // 2 // local_ranks()
    if config.data.processes * PROCESS_BYTES > room:
        raise UserError(
            f"data.processes: expected at most the {room // PROCESS_BYTES} that half of the free "
            f"memory holds, got {config.data.processes}; lower it"
        )
    room -= config.data.processes * PROCESS_BYTES
    room = max(0, room - AHEAD_BYTES * is_any_remote(corpus))
    most = room // (FRAME_BYTES * (frame_px + shown_px))
    for keys, ahead in (
        ("data.prefetch x micro_batch", config.data.prefetch * config.micro_batch),
        (f"eval.batch x {EVAL_AHEAD}", config.eval.batch * EVAL_AHEAD),
    ):
        if ahead > most:
            raise UserError(
                f"{keys}: expected at most the {most} samples that half of the free memory holds, "
                f"got {ahead}; lower it"
            )


def is_any_remote(corpus: Corpus) -> bool:
    """Whether a set that is trained on is read from a server."""
    return any(subset.shards.ranges is not None for subset in corpus.train)


def training_sample(
    corpus: Corpus, config: TrainConfig, subset: Frames, place: int, epoch: int, step: int
) -> Sample:
    """The sample that training makes of a frame of a subset in an epoch, by a step's settings."""
    frame = subset.frame(place)
    draws = Draws(config.seed, epoch, subset.identity(place))
    view = random_view(frame.depth_m.shape, config.data, draws)
    return pasted_sample(
        subset,
        place,
        view,
        draws,
        config.paste.at(step),
        frame=frame,
        pictures=corpus.pictures,
        photometric=draw_photometric(draws, config.photometric),
        depth_range_m=_view_range_m(frame, view, config),
    )


def validation_sample(
    corpus: Corpus, config: TrainConfig, subset: Subset, place: int, *, pasted: bool
) -> Sample:
    """The central view of a validation frame, clean or with the pastes of the validation seed.

    There are no pastes in a set whose own flat things are labelled.
    """
    frame = subset.frame(place)
    view = central_view(frame.depth_m.shape, config.data)
    return pasted_sample(
        subset,
        place,
        view,
        Draws(config.eval.seed, 0, subset.identity(place)),
        replace(config.paste, share=1.0 if pasted and not subset.is_labelled else 0.0, stages=[]),
        frame=frame,
        pictures=corpus.pictures,
        depth_range_m=_view_range_m(frame, view, config),
    )


def truth_range_m(config: TrainConfig) -> tuple[float, float]:
    """(near, far) in metres of the truth that is valid in images of some camera.

    Where far depends on the focal length, ``within_reach`` has the last word.
    """
    model = config.model
    far_m = model.max_depth_m if model.canonical_focal_px is None else MAX_DEPTH_M[1]
    return config.data.min_depth_m, far_m


def within_reach(batch: AnyBatch, model: ModelConfig) -> AnyBatch:
    """The batch without truth beyond what a network can say of each image (``reach_m``)."""
    if model.canonical_focal_px is None:
        return batch
    far_m = model.reach_m(1.0) * batch.focal_px[:, None, None, None]
    valid = batch.valid & (batch.depth_m <= far_m)
    return replace(batch, valid=valid, depth_m=torch.where(valid, batch.depth_m, 0.0))


def _view_range_m(frame: Frame, view: View, config: TrainConfig) -> tuple[float, float]:
    """(near, far) in metres of the truth that is valid in a view."""
    if config.model.canonical_focal_px is None:
        return truth_range_m(config)
    focal_px = float(view.intrinsics(frame.K_px).diagonal()[:2].mean())
    return config.data.min_depth_m, config.model.reach_m(focal_px)


def pasted_sample(
    subset: Frames,
    place: int,
    view: View,
    draws: Draws,
    pastes: PasteConfig,
    *,
    frame: Frame,
    pictures: Pictures,
    photometric: Float64[np.ndarray, " 10"] | None = None,
    depth_range_m: tuple[float, float],
) -> Sample:
    """A view of a frame with its pastes and what they show.

    Args:
        subset, place: where the frame comes from; wall paintings and screens show others of it.
        draws: random numbers of the pastes.
        pastes: settings of the step.
        frame: the frame itself.
        pictures: the art collection.
        photometric: factors; None changes nothing.
        depth_range_m: (near, far) that truth must lie in.
    """
    plan: tuple[Paste, ...] = ()
    contents: tuple[Content, ...] = ()
    if is_pasted(draws, pastes):
        thin = thin_view(frame, view)
        with _PLANNING, stage("plan"):
            plan = plan_pastes(
                thin, draws, pastes, picture_aspects=pictures.aspects, depth_range_m=depth_range_m
            )
        sources = Sources(
            picture=pictures.picture,
            frame=lambda number: subset.frame(number % len(subset)),
        )
        with stage("content"):
            contents = tuple(
                make_content(paste, frame, view, thin.K_px, sources, pastes.mirror_target)
                for paste in plan
            )
    if photometric is None:
        photometric = np.array(list(NEUTRAL.values()))
    return Sample(
        frame=frame,
        view=view,
        plan=plan,
        contents=contents,
        mirror_target=pastes.mirror_target,
        photometric=photometric,
        identity=subset.identity(place),
        loss_seed=draws.integer("loss", 1 << 32),
    )


def random_view(shape: tuple[int, int], config: DataConfig, draws: Draws) -> View:
    """A random crop of the input's aspect, flipped at random."""
    height, width = shape
    largest = min(height / config.height, width / config.width)
    side = draws.uniform("crop", *config.crop) * largest
    crop_height = max(2, min(height, round(config.height * side)))
    crop_width = max(2, min(width, round(config.width * side)))
    return View(
        top=draws.integer("crop top", height - crop_height + 1),
        left=draws.integer("crop left", width - crop_width + 1),
        crop_height=crop_height,
        crop_width=crop_width,
        height=config.height,
        width=config.width,
        flip=draws.uniform("flip") < config.flip,
    )


def central_view(shape: tuple[int, int], config: DataConfig) -> View:
    """The largest central crop of the input's aspect."""
    height, width = shape
    side = min(height / config.height, width / config.width)
    crop_height = min(height, round(config.height * side))
    crop_width = min(width, round(config.width * side))
    return View(
        top=(height - crop_height) // 2,
        left=(width - crop_width) // 2,
        crop_height=crop_height,
        crop_width=crop_width,
        height=config.height,
        width=config.width,
    )


def to_device(
    samples: Sequence[Sample],
    device: torch.device,
    *,
    depth_range_m: tuple[float, float],
) -> tuple[Batch, tuple[PasteGroup, ...], Float[torch.Tensor, "b 10"]]:
    """Copy samples to a device and cut their views there.

    Args:
        depth_range_m: (near, far); depth outside is not valid, nor is that on labelled mirrors
            unless their surface is the truth (``true_depth``).

    Returns:
        The batch as it was photographed, the pastes to put into it, and the photometric factors,
        which stay on the CPU.
    """
    images, depths, regions = [], [], []
    for sample in samples:
        image = _copy(torch.from_numpy(np.ascontiguousarray(sample.frame.image)), device)
        truth = true_depth(sample.frame, sample.mirror_target)
        depth = _copy(torch.from_numpy(np.ascontiguousarray(truth)), device)
        images.append(view_image(image.movedim(-1, 0).to(torch.float32) / 255, sample.view))
        depths.append(view_depth(depth, sample.view))
        regions.append(_region(sample, device))
    depth_m = torch.stack(depths)[:, None]
    valid = depth_m.isfinite() & (depth_m >= depth_range_m[0]) & (depth_m <= depth_range_m[1])
    intrinsics = np.stack([sample.view.intrinsics(sample.frame.K_px) for sample in samples])
    batch = Batch(
        image=torch.stack(images),
        depth_m=torch.where(valid, depth_m, 0.0),
        valid=valid,
        region=torch.stack(regions)[:, None],
        K_px=_copy(torch.from_numpy(intrinsics), device),
        sample=_copy(torch.tensor([sample.identity for sample in samples]), device),
    )
    view = samples[0].view
    groups = stack_plans(
        [sample.plan for sample in samples],
        [sample.contents for sample in samples],
        intrinsics,
        height=view.height,
        width=view.width,
        mirror_target=samples[0].mirror_target,
        together=1 if device.type == "cpu" else len(samples),
    )
    factors = torch.from_numpy(np.stack([sample.photometric for sample in samples]))
    return batch, tuple(group.to(device) for group in groups), factors


def _region(sample: Sample, device: torch.device) -> UInt8[torch.Tensor, "h w"]:
    """The regions that are labelled in the view of a frame; background where none are."""
    labelled = sample.frame.region
    if labelled is None:
        size = (sample.view.height, sample.view.width)
        return torch.zeros(size, dtype=torch.uint8, device=device)
    return view_region(_copy(torch.from_numpy(labelled), device), sample.view)


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
