"""Calibration: one correction of a network's metres for a set, judged where it was not fitted.

Two fits, both in closed form, both with every image counting once whatever its pixels with truth.
Prediction p and truth t are planar z in metres over the pixels of an image that count, p brought
into the protocol's range.

``scale``
    The factor ``exp(mean over images of median over pixels of (ln t - ln p))``. Within an image the
    median: mirrors, pictures and holes of a sensor are a minority of its pixels, but wrong by
    factors, which would move a mean. Over images the mean: their scales differ without any of them
    being wrong.
``scale-shift-inverse``
    a and b of ``1/z = a / p + b`` with the least mean over images of the mean over pixels of
    ``(t (a / p + b) - 1)^2``: least squares with the weight t^2, so that what is small is the
    relative error, which is AbsRel's to first order, and not that of the nearest things.

The scenes are divided into two halves. Each half is judged with what was fitted on the other, and
only if AbsRel falls in both does the correction of all images count.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from flatdepth.data.frames import Subset, content_digest
from flatdepth.data.loader import Sample, in_order
from flatdepth.errors import UserError
from flatdepth.judge.metrics import image_metrics
from flatdepth.judge.scoring import (
    Contender,
    Request,
    alike,
    even_places,
    load_sample,
    look,
    open_pictures,
    open_subsets,
    run_size,
)
from flatdepth.models.calibration import Calibration, Correction, Form, HeldOut
from flatdepth.models.network import DepthNetwork
from flatdepth.models.precision import expect_room
from flatdepth.types import METRICS

LEAST_SPREAD = 1e-9
"""A set whose predictions differ by less than this share has no scale and shift."""


class Looked(NamedTuple):
    """One image: its scene with its set, and (1, 1, h, w) prediction, truth and what counts."""

    scene: tuple[str, str]
    pred_m: Tensor
    truth_m: Tensor
    counted: Tensor


def image_statistics(
    pred_m: Float64[np.ndarray, " n"], truth_m: Float64[np.ndarray, " n"], form: Form
) -> Float64[np.ndarray, " k"]:
    """All that a fit has to know of an image.

    Args:
        pred_m, truth_m: planar z in metres above 0 of the n > 0 pixels that count.

    Returns:
        ``scale``: the median of ln t - ln p. ``scale-shift-inverse``: the means of x^2, x t, t^2, x
        and t with x = t / p.
    """
    if form == "scale":
        return np.array([np.median(np.log(truth_m) - np.log(pred_m))])
    x, t = truth_m / pred_m, truth_m
    return np.array([(x * x).mean(), (x * t).mean(), (t * t).mean(), x.mean(), t.mean()])


def fitted(statistics: Float64[np.ndarray, "images k"], form: Form, far_m: float) -> Correction:
    """The correction that fits images of these statistics best.

    Args:
        far_m: beyond it nothing was fitted; the end of a correction with a shift.

    Raises:
        UserError: there is no image, the predictions are all the same, or the fit turns depth over.
    """
    if len(statistics) == 0:
        raise UserError("--data: expected images with depth to calibrate on, found none")
    means = statistics.mean(0)
    if form == "scale":
        return Correction(factor=math.exp(means[0]))
    xx, xt, tt, x, t = means.tolist()
    determinant = xx * tt - xt * xt
    if determinant <= LEAST_SPREAD * xx * tt:
        raise UserError(
            "--fit scale-shift-inverse: expected predictions and truth that vary, found one depth "
            "everywhere; take --fit scale"
        )
    a, b = (tt * x - xt * t) / determinant, (xx * t - xt * x) / determinant
    if a <= 0:
        raise UserError(
            f"--fit scale-shift-inverse: 1/z = {a:.3g} / prediction {b:+.3g} would turn near and "
            "far round; take --fit scale, or weights that see the shape of these scenes"
        )
    return Correction(factor=1 / a, shift_per_m=b, far_m=far_m)


def halves(scenes: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Scene -> 0 or 1: each scene by its name to the half that has fewer images so far.

    Args:
        scenes: that of every image.

    Raises:
        UserError: there is one scene, which cannot be both fitted on and held out.
    """
    names = sorted(set(scenes))
    if len(names) < 2:
        raise UserError(
            f"--data: expected images of two scenes or more, so that one half judges the other, "
            f"found {len(names)}; take --part all or more data"
        )
    sizes, found = [0, 0], {}
    for name in names:
        found[name] = half = int(sizes[1] < sizes[0])
        sizes[half] += scenes.count(name)
    return found


def calibrate(
    model: DepthNetwork,
    request: Request,
    form: Form,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Calibration:
    """Fit a correction of a metric network's metres and judge it on held-out scenes.

    The set is gone through twice, once to fit and once to judge, so nothing of it is kept. What is
    fitted and judged is the prediction at the truth's resolution; ``DepthNetwork`` corrects its own
    output, before that is resized, which at edges differs by what interpolation does.

    Args:
        model: in evaluation mode; a calibration that it has is left out and comes back.
        request: the sets, their part, protocol, size and so on; its one checkpoint is the model's.
        progress: called with (pictures done, pictures in all), each picture counting twice.

    Raises:
        UserError: the network does not predict metres, or data and options do not fit.
    """
    if model.kind != "metric":
        raise UserError(
            f"calibrate: expected metric weights, found {model.kind} ones, whose scale and shift "
            "differ from image to image; judge them with flatdepth evaluate --align"
        )
    subsets = open_subsets(request.data, request.part)
    size = request.size or run_size([_contender(model, request)])
    expect_room(request.batch, size, device)
    before = model.calibration
    model.to(device).calibration = None
    try:
        return _calibrate(model, request, form, device, subsets, size, progress)
    finally:
        model.calibration = before


def _calibrate(
    model: DepthNetwork,
    request: Request,
    form: Form,
    device: torch.device,
    subsets: Sequence[Subset],
    size: int,
    progress: Callable[[int, int], None],
) -> Calibration:
    far_m = request.protocol.range_m[1]
    total = 2 * sum(len(even_places(len(subset), request.images)) for subset in subsets)
    scenes: list[tuple[str, str]] = []
    rows: list[Float64[np.ndarray, " k"]] = []
    for done, image in enumerate(_images(model, request, subsets, size, device), start=1):
        inside = image.counted
        if inside.any():
            pred_m = image.pred_m[inside].double().nan_to_num(0).clamp(*request.protocol.range_m)
            truth_m = image.truth_m[inside].double()
            rows.append(image_statistics(pred_m.cpu().numpy(), truth_m.cpu().numpy(), form))
            scenes.append(image.scene)
        progress(done, total)
    half_of = halves(scenes)
    statistics = np.stack(rows)
    side = np.array([half_of[scene] for scene in scenes])
    corrections = [fitted(statistics[side != half], form, far_m) for half in (0, 1)]

    figures: list[list[tuple[float, ...]]] = [[], []]
    judged = _images(model, request, subsets, size, device)
    for done, image in enumerate(judged, start=total // 2 + 1):
        if image.counted.any():
            half = half_of[image.scene]
            after_m = corrections[half](image.pred_m.double())
            before, after = (_figures(pred, image, request) for pred in (image.pred_m, after_m))
            figures[half].append((*before, *after))
        progress(done, total)
    first, second = (
        _held_out(np.array(figures[half]), corrections[half], half_of, half) for half in (0, 1)
    )
    return Calibration(
        form=form,
        correction=fitted(statistics, form, far_m),
        halves=(first, second),
        is_applied=all(one.abs_rel[1] < one.abs_rel[0] for one in (first, second)),
        sets=tuple(dict.fromkeys(subset.shards.dataset for subset in subsets)),
        part=request.part,
        images=len(rows),
        digests=tuple(content_digest(subset.shards) for subset in subsets),
        protocol=str(request.protocol),
        input_px=size,
    )


def _contender(model: DepthNetwork, request: Request) -> Contender:
    (source,) = request.checkpoints
    return Contender(
        label="A", source=source, model=model, alignment="metric", trained_on=None, run=None
    )


def _images(
    model: DepthNetwork,
    request: Request,
    subsets: Sequence[Subset],
    size: int,
    device: torch.device,
) -> Iterator[Looked]:
    """Every image clean, as the protocol looks at it, with what the network says in metres."""
    contender, pictures = _contender(model, request), open_pictures(())
    for subset in subsets:
        places = even_places(len(subset), request.images)

        def load(place: int, subset: Subset = subset) -> Sample:
            return load_sample(request, subset, place, pictures, pasted=False)

        samples = in_order(load, places, threads=request.threads, ahead=4 * request.batch)
        for group in alike(((sample, False) for sample in samples), request.batch):
            alone = [sample for sample, _ in group]
            seen = look(alone, request, [contender], size, device)
            for position, sample in enumerate(alone):
                one = slice(position, position + 1)
                yield Looked(
                    scene=(subset.shards.dataset, sample.frame.scene),
                    pred_m=seen.depths_m[0][one],
                    truth_m=seen.batch.depth_m[one],
                    counted=seen.counted[one],
                )


def _figures(pred_m: Tensor, image: Looked, request: Request) -> tuple[float, float]:
    """AbsRel and delta1 of an image."""
    near, far = request.protocol.range_m
    values, _ = image_metrics(pred_m, image.truth_m, image.counted, min_m=near, max_m=far)
    by_name = dict(zip(METRICS, values[0].tolist(), strict=True))
    return by_name["abs_rel"], by_name["delta1"]


def _held_out(
    figures: Float64[np.ndarray, "images 4"],
    correction: Correction,
    half_of: dict[tuple[str, str], int],
    half: int,
) -> HeldOut:
    abs_rel, delta1, abs_rel_after, delta1_after = figures.mean(0).tolist()
    return HeldOut(
        scenes=sum(own == half for own in half_of.values()),
        images=len(figures),
        fitted=correction,
        abs_rel=(abs_rel, abs_rel_after),
        delta1=(delta1, delta1_after),
    )


def render(calibration: Calibration) -> str:
    """The figures as aligned plain text, and what follows from them."""
    rows: list[tuple[str, ...]] = [
        ("judged on", "fitted on the other half", "AbsRel", "after", "delta1", "after")
    ]
    for name, half in zip("AB", calibration.halves, strict=True):
        numbers = (f"{value:.4f}" for pair in (half.abs_rel, half.delta1) for value in pair)
        where = f"{name}: {half.images} images of {half.scenes} scenes"
        rows.append((where, str(half.fitted), *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    one, other = (half.fitted for half in calibration.halves)
    apart = f"{abs(math.log(one.factor / other.factor)):.1%} in the factor"
    if calibration.form == "scale-shift-inverse":
        apart += f" and {abs(one.shift_per_m - other.shift_per_m):.2g} per m in the shift"
    verdict = (
        "AbsRel falls on both halves; applied: yes"
        if calibration.is_applied
        else "AbsRel does not fall on both halves; applied: no, it is only on record"
    )
    return "\n".join(
        [
            *lines,
            f"the two fits differ by {apart}",
            f"all: {calibration}",
            verdict,
        ]
    )
