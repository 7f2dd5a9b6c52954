"""From positions to batches: threads that read, decode and plan, and the copy to the device.

JPEG and zstd decoding, numpy and PIL release the interpreter lock for most of their time, so
threads in the training process keep up without pickling or shared memory. Results come in order.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8

from flatdepth.augment.composite import PasteBatch, stack_plans
from flatdepth.augment.layout import Paste, plan_pastes, thin_view
from flatdepth.augment.photometric import draw_photometric
from flatdepth.augment.rng import Draws
from flatdepth.config import DataConfig, PasteConfig, TrainConfig
from flatdepth.corpus import Corpus, Subset
from flatdepth.geometry import View, view_depth, view_image
from flatdepth.order import Order, rank_positions
from flatdepth.types import Batch, Frame, Region

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One frame with all that was decided about it on the CPU.

    Attributes:
        frame: at its source resolution.
        view: the crop, resize and flip to the network's input.
        plan: its pastes from back to front.
        pictures: per paste the picture it shows, (height, width, 3) uint8; None for mirrors.
        photometric: (6,) colour factors.
        identity: number of the frame in the run.
    """

    frame: Frame
    view: View
    plan: tuple[Paste, ...]
    pictures: tuple[UInt8[np.ndarray, "h w 3"] | None, ...]
    photometric: Float[torch.Tensor, " 6"]
    identity: int


def in_order(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, threads: int, ahead: int
) -> Iterator[Result]:
    """``map`` on a thread pool, with at most ``ahead`` results in flight, in the order of tasks."""
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
        executor.shutdown(wait=True, cancel_futures=True)


def training_samples(
    corpus: Corpus,
    config: TrainConfig,
    *,
    first_step: int,
    rank: int,
    ranks: int,
    accumulation: int,
) -> Generator[list[Sample], None, None]:
    """Endless micro-batches of one rank from an optimiser step on.

    A sample, its crop and its pastes are functions of (seed, position) and the configuration, so
    the stream can be entered at any step and does not depend on ranks or threads.
    """
    order = Order(
        sizes=tuple(len(subset) for subset in corpus.train),
        weights=corpus.weights,
        seed=config.seed,
    )

    def tasks() -> Iterator[tuple[int, int, int, int]]:
        step = first_step
        while True:
            for micro_step in range(accumulation):
                positions = rank_positions(
                    step,
                    micro_step,
                    micro_batch=config.micro_batch,
                    rank=rank,
                    ranks=ranks,
                    accumulation=accumulation,
                )
                draw = order.draw(positions)
                for set_, place, epoch in zip(draw.set, draw.index, draw.epoch, strict=True):
                    yield step, int(set_), int(place), int(epoch)
            step += 1

    def load(task: tuple[int, int, int, int]) -> Sample:
        step, set_, place, epoch = task
        return _training_sample(corpus, config, corpus.train[set_], place, epoch, step)

    samples = in_order(
        load,
        tasks(),
        threads=config.data.threads,
        ahead=config.data.prefetch * config.micro_batch,
    )
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == config.micro_batch:
            yield batch
            batch = []


def _training_sample(
    corpus: Corpus, config: TrainConfig, subset: Subset, place: int, epoch: int, step: int
) -> Sample:
    frame = subset.frame(place)
    identity = subset.identity(place)
    draws = Draws(config.seed, epoch, identity)
    view = random_view(frame.depth_m.shape, config.data, draws)
    colour = draw_photometric([draws], config.photometric)[0]
    pastes = config.paste if step >= config.paste.start_step else replace(config.paste, share=0.0)
    return _planned(frame, view, draws, colour, identity, corpus, config, pastes)


def validation_sample(
    corpus: Corpus, config: TrainConfig, subset: Subset, place: int, *, pasted: bool
) -> Sample:
    """The central view of a validation frame, clean or with the pastes of the validation seed."""
    frame = subset.frame(place)
    identity = subset.identity(place)
    view = central_view(frame.depth_m.shape, config.data)
    draws = Draws(config.eval.seed, 0, identity)
    neutral = draw_photometric([draws], replace(config.photometric, share=0.0))[0]
    pastes = replace(config.paste, share=1.0 if pasted else 0.0)
    return _planned(frame, view, draws, neutral, identity, corpus, config, pastes)


def _planned(
    frame: Frame,
    view: View,
    draws: Draws,
    colour: torch.Tensor,
    identity: int,
    corpus: Corpus,
    config: TrainConfig,
    pastes: PasteConfig,
) -> Sample:
    plan = plan_pastes(
        thin_view(frame, view),
        draws,
        pastes,
        picture_aspects=corpus.pictures.aspects,
        depth_range_m=(config.data.min_depth_m, config.model.max_depth_m),
    )
    pictures = tuple(
        corpus.pictures.stretched(paste.picture, view.height, view.width)
        if paste.kind is Region.ART
        else None
        for paste in plan
    )
    return Sample(
        frame=frame,
        view=view,
        plan=plan,
        pictures=pictures,
        photometric=colour,
        identity=identity,
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
) -> tuple[Batch, PasteBatch, Float[torch.Tensor, "b 6"]]:
    """Copy samples to a device and cut their views there.

    Args:
        depth_range_m: (near, far); depth outside is not valid.

    Returns:
        The clean batch, the plans to paste into it and the photometric factors.
    """
    images, depths = [], []
    for sample in samples:
        image = _copy(torch.from_numpy(np.ascontiguousarray(sample.frame.image)), device)
        depth = _copy(torch.from_numpy(np.ascontiguousarray(sample.frame.depth_m)), device)
        images.append(view_image(image.movedim(-1, 0).to(torch.float32) / 255, sample.view))
        depths.append(view_depth(depth, sample.view))
    depth_m = torch.stack(depths)[:, None]
    valid = depth_m.isfinite() & (depth_m >= depth_range_m[0]) & (depth_m <= depth_range_m[1])
    intrinsics = np.stack([sample.view.intrinsics(sample.frame.K_px) for sample in samples])
    batch = Batch(
        image=torch.stack(images),
        depth_m=torch.where(valid, depth_m, 0.0),
        valid=valid,
        region=torch.zeros_like(valid, dtype=torch.uint8),
        K_px=_copy(torch.from_numpy(intrinsics), device),
        sample=_copy(torch.tensor([sample.identity for sample in samples]), device),
    )
    view = samples[0].view
    plans = stack_plans(
        [sample.plan for sample in samples],
        [sample.pictures for sample in samples],
        intrinsics,
        height=view.height,
        width=view.width,
    )
    factors = torch.stack([sample.photometric for sample in samples])
    return batch, plans.to(device), _copy(factors, device)


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
