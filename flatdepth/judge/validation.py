"""Validation: every image clean, and again with mirrors and art of a fixed seed; or, where its own
mirrors and pictures are labelled, by those.

Each validation image is evaluated exactly once over all ranks, at the network's input resolution,
and only per-image rows are gathered, so the figures depend neither on the number of devices nor on
the batch size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flatdepth.augment.draw.composite import paste
from flatdepth.config import TrainConfig
from flatdepth.data.frames import Corpus
from flatdepth.data.loader import (
    EVAL_AHEAD,
    Sample,
    in_order,
    to_device,
    truth_range_m,
    validation_sample,
    within_reach,
)
from flatdepth.judge.boundaries import boundary_f1
from flatdepth.judge.metrics import RegionTable, image_metrics, region_masks
from flatdepth.judge.protocol import align, own_alignment
from flatdepth.models.network import DepthNetwork
from flatdepth.models.precision import autocast
from flatdepth.show.pictures import (
    colour_depth,
    colour_error,
    colour_region,
    contact_sheet,
    depth_limits,
)
from flatdepth.types import Batch

ERROR_LIMIT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of one validation.

    Attributes:
        table: region -> metric -> value, as ``RegionTable.result`` gives it.
        sheet: contact sheet of a few pasted validation images; None off the main process.
    """

    table: Mapping[str, Mapping[str, float]]
    sheet: Image.Image | None


def protocol(config: TrainConfig) -> str:
    """The conditions of the figures, in one sentence."""
    alignment = {
        "metric": "no alignment",
        "relative": "scale and shift aligned in inverse depth by least squares over each image",
        "affine": "scale and shift aligned in depth by least squares over each image",
    }[config.model.kind]
    mirrors = {
        "surface": "",
        "ignore": "; mirrors have no truth",
        "virtual": "; truth in pasted mirrors is the scene that they show, behind their plane, and "
        "labelled mirrors have none",
    }[config.paste.mirror_target]
    canonical_px = config.model.canonical_focal_px
    at = "" if canonical_px is None else f" at a focal length of {canonical_px:g} px, in proportion"
    return (
        f"{config.model.kind} depth, {alignment}, {config.data.min_depth_m:g} to "
        f"{config.model.max_depth_m:g} m{at}, central view resized to {config.data.height} x "
        f"{config.data.width} px, no further crop; mean over images{mirrors}"
    )


@torch.no_grad()
def evaluate(
    model: DepthNetwork,
    corpus: Corpus,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    title: str,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model on the validation samples; collective over all ranks.

    Args:
        model: the bare model (not wrapped for data parallelism), on the accelerator's device.
        title: heading of the contact sheet.
        check: called after every batch, by all ranks; what it raises ends the validation.
    """
    places = corpus.val_places(config.eval.images)
    shown = _shown(places, corpus, config.eval.pictures)
    ranks = accelerator.num_processes
    rounds = -(-len(places) // ranks)
    # Where places run out a rank repeats one and does not count it: with FSDP all ranks must call
    # the model equally often.
    passes = (False,) if all(subset.is_labelled for subset in corpus.val) else (False, True)
    mine = [
        (accelerator.process_index + ranks * i, pasted) for i in range(rounds) for pasted in passes
    ]
    table, edges = RegionTable(), RegionTable(("boundary_f1",))
    rows: dict[int, _Row] = {}
    was_training = model.training
    model.eval()

    def load(task: tuple[int, bool]) -> Sample:
        subset, place = places[task[0] % len(places)]
        return validation_sample(corpus, config, corpus.val[subset], place, pasted=task[1])

    def is_labelled(number: int) -> bool:
        return corpus.val[places[number][0]].is_labelled

    samples = in_order(
        load, mine, threads=config.data.threads, ahead=EVAL_AHEAD * config.eval.batch
    )
    tasks = iter(mine)
    for chunk in _chunks(samples, config.eval.batch):
        chunk_tasks = [next(tasks) for _ in chunk]
        batch, pred_m = predict_depth(model, chunk, config, accelerator)
        for position, (number, pasted) in enumerate(chunk_tasks):
            labelled = chunk[position].is_labelled
            if number >= len(places) or (pasted and is_labelled(number)):
                continue
            one = slice(position, position + 1)
            _add(table, batch, pred_m, one, pasted or labelled, config)
            if not (pasted or labelled):
                _add_edges(edges, batch, pred_m, one, config)
            if (pasted or labelled) and number in shown and accelerator.is_main_process:
                rows[number] = _row(batch, pred_m, position, chunk[position])
        check()
    model.train(was_training)
    result = _whole(table, accelerator)
    for region, row in _whole(edges, accelerator).items():
        if region in result:
            result[region]["boundary_f1"] = row["boundary_f1"]
    sheet = _sheet(rows, title) if accelerator.is_main_process and rows else None
    return Evaluation(table=result, sheet=sheet)


def predict_depth(
    model: DepthNetwork, samples: list[Sample], config: TrainConfig, accelerator: Accelerator
) -> tuple[Batch, Float[Tensor, "b 1 h w"]]:
    """The pasted batch and the depth in metres that the model says, aligned unless it is metric."""
    depth_range_m = truth_range_m(config)
    batch, plans, _ = to_device(
        samples,
        accelerator.device,
        depth_range_m=depth_range_m,
    )
    batch = within_reach(paste(batch, plans, depth_range_m=depth_range_m), config.model)
    with autocast(accelerator):
        prediction = model(batch.image, batch.focal_px)
    pred_m = align(
        prediction.float(),
        batch.depth_m,
        batch.valid,
        kind=model.kind,
        alignment=own_alignment(model.kind),
        range_m=depth_range_m,
    )
    return batch, pred_m


def _shown(places: Sequence[tuple[int, int]], corpus: Corpus, most: int) -> set[int]:
    """Numbers of the places on the contact sheet: evenly spaced among those with flat things."""
    with_flat = [
        number
        for number, (subset, place) in enumerate(places)
        if corpus.val[subset].labelled[place] or not corpus.val[subset].is_labelled
    ]
    chosen = np.linspace(0, len(with_flat) - 1, min(most, len(with_flat))).round().astype(int)
    return {with_flat[i] for i in chosen.tolist()}


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _add(
    table: RegionTable,
    batch: Batch,
    pred_m: Tensor,
    one: slice,
    flat_known: bool,
    config: TrainConfig,
) -> None:
    masks = region_masks(batch.region[one], batch.valid[one], flat_known=flat_known)
    for name, mask in masks.items():
        values, pixels = image_metrics(
            pred_m[one],
            batch.depth_m[one],
            mask,
            min_m=config.data.min_depth_m,
            max_m=config.model.reach_m(float(batch.focal_px[one])),
        )
        table.add(batch.sample[one].cpu(), name, values.cpu(), pixels.cpu())


def _add_edges(
    table: RegionTable, batch: Batch, pred_m: Tensor, one: slice, config: TrainConfig
) -> None:
    score, pairs = boundary_f1(
        pred_m[one],
        batch.depth_m[one],
        batch.valid[one],
        min_m=config.data.min_depth_m,
        max_m=config.model.reach_m(float(batch.focal_px[one])),
    )
    table.add(batch.sample[one].cpu(), "clean", score[:, None].cpu(), pairs.cpu())


def _whole(table: RegionTable, accelerator: Accelerator) -> dict[str, dict[str, float]]:
    """The result of the tables of all ranks together."""
    keys, values = (part.to(accelerator.device) for part in table.state())
    keys = accelerator.gather(accelerator.pad_across_processes(keys, pad_index=-1))
    values = accelerator.gather(accelerator.pad_across_processes(values))
    whole = RegionTable(table.columns)
    whole.merge(keys.cpu(), values.cpu())
    return whole.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    panels: list[np.ndarray]
    title: str
    limits_m: tuple[float, float]


def _row(batch: Batch, pred_m: Tensor, position: int, sample: Sample) -> _Row:
    image = (batch.image[position].movedim(0, -1) * 255).round().to(torch.uint8).cpu().numpy()
    valid = batch.valid[position, 0].cpu().numpy()
    truth = np.where(valid, batch.depth_m[position, 0].cpu().numpy(), np.float32(np.nan))
    prediction = pred_m[position, 0].cpu().numpy()
    low, high = depth_limits(truth, valid)
    kinds = ", ".join(paste.describe() for paste in sample.plan)
    return _Row(
        panels=[
            image,
            colour_depth(truth, low_m=low, high_m=high),
            colour_depth(prediction, low_m=low, high_m=high),
            colour_error(prediction, truth, valid, ERROR_LIMIT),
            colour_region(image, batch.region[position, 0].cpu().numpy()),
        ],
        title=f"{sample.frame.dataset} {sample.frame.key}\n{kinds}",
        limits_m=(low, high),
    )


def _sheet(rows: Mapping[int, _Row], title: str) -> Image.Image:
    ordered = [rows[number] for number in sorted(rows)]
    return contact_sheet(
        [row.panels for row in ordered],
        ["image", "truth", "prediction", "relative error", "region"],
        [row.title for row in ordered],
        title=title,
        limits_m=[row.limits_m for row in ordered],
        error_limit=ERROR_LIMIT,
    )
