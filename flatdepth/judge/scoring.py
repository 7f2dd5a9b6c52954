"""The figures of one or several checkpoints on shard sets, under one protocol.

Frames are compared at their own resolution: pastes are made there, the network sees the picture
resized, and its prediction is brought back up. All contenders see the same pictures, so their
differences are paired. Every image is reduced on its own (``flatdepth.judge.metrics``), which makes
the figures independent of order and batch size.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from flatdepth.augment.draw.composite import paste
from flatdepth.augment.plan.layout import Paste
from flatdepth.augment.rng import Draws
from flatdepth.cli import parse_config
from flatdepth.config import (
    LEAST_SIDE,
    MICRO_BATCH,
    MOST_SIDE,
    SEED,
    DataConfig,
    PasteConfig,
    SetConfig,
    TrainConfig,
    expect_multiple,
    nearest_multiple,
)
from flatdepth.data.demo import ensure_demo
from flatdepth.data.frames import Pictures, Subset, open_corpus
from flatdepth.data.loader import Sample, in_order, pasted_sample, to_device
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError, expect_within, is_out_of_memory
from flatdepth.judge.boundaries import boundary_f1
from flatdepth.judge.metrics import (
    RegionTable,
    bootstrap_means,
    flatness_residual,
    image_metrics,
    mean_over,
    percentile_interval,
    plane_normal_angle_deg,
    region_masks,
    ssim_map,
)
from flatdepth.judge.protocol import (
    Alignment,
    Fit,
    Protocol,
    align,
    own_alignment,
)
from flatdepth.models.network import DepthNetwork, Kind
from flatdepth.models.onnx_depth import OnnxDepth, open_depth
from flatdepth.models.precision import expect_room
from flatdepth.models.preprocessing import preprocessing
from flatdepth.types import METRICS, Batch, Region

Part = Literal["all", "train", "val", "test"]

PLANE_METRICS = ("flatness_residual", "plane_normal_angle_deg")
DEFAULT_SIZE = 518

_PLANE_TOLERANCE = 1e-5
_MOST_PASTES = 1 << 10
"""Pastes of one image are numbered below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is evaluated, and how.

    Attributes:
        checkpoints: weight files or hub ids.
        kinds, max_depths_m: per checkpoint, None where the file says it.
        trained_on: per checkpoint the names of the data sets it was trained on, None if that is
            for its run's config.yaml to say.
        data: shard sets of frames.
        art: shard sets of pictures to paste.
        part: which samples of the sets; ``val`` and ``train`` of a set without an official split
            are those of a training run with the default split.
        protocol, alignments, fit: as in ``judge.protocol``. No alignment means each kind's
            own: none for metric models, scale and shift in inverse depth for relative ones.
        size: shorter side of the network's input in pixels; None: that of the checkpoints'
            training, else 518.
        paste_seed: seed of the pastes; None: clean images only.
        images: most images per set, evenly spaced; 0: all.
        batch: images per forward pass.
        threads: that read, decode and plan.
        bootstrap: resamples of the scenes.
    """

    checkpoints: tuple[str, ...]
    kinds: tuple[Kind | None, ...]
    max_depths_m: tuple[float | None, ...]
    trained_on: tuple[frozenset[str] | None, ...]
    data: tuple[str, ...]
    art: tuple[str, ...] = ()
    part: Part = "all"
    protocol: Protocol
    alignments: tuple[Alignment, ...] = ()
    fit: Fit = "least-squares"
    size: int | None = None
    paste_seed: int | None = None
    images: int = 0
    batch: int = 4
    threads: int = 2
    bootstrap: int = 2000

    def __post_init__(self) -> None:
        expect_within("--images", self.images, 0, 10**9)
        expect_within("--batch", self.batch, *MICRO_BATCH)
        expect_within("--threads", self.threads, 1, 256)
        expect_within("--bootstrap", self.bootstrap, 1, 10**5)
        expect_within("--paste", self.paste_seed or 0, *SEED)
        expect_within(
            "--size", LEAST_SIDE if self.size is None else self.size, LEAST_SIDE, MOST_SIDE
        )
        near, far = self.protocol.range_m
        if not 0 < near < far < math.inf:
            raise UserError(f"--range: expected 0 < NEAR < FAR in metres, got {near:g} {far:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One checkpoint under one alignment.

    Attributes:
        label: ``A``, ``B``, ...: how tables call it.
        source: the checkpoint.
        model: in evaluation mode, on the device.
        alignment: how its prediction is aligned.
        trained_on: names of the data sets it was trained on, None if not known.
        run: the configuration of the run that made it, None if not known.
    """

    label: str
    source: str
    model: DepthNetwork | OnnxDepth
    alignment: Alignment
    trained_on: frozenset[str] | None
    run: TrainConfig | None

    def mode(self, dataset: str) -> str:
        """Metric or relative evaluation, and whether the data set is known to the weights."""
        quantity = "metric" if self.alignment == "metric" else "relative"
        if self.trained_on is None:
            return f"{quantity}, domain not known"
        return f"{quantity}, {'in-domain' if dataset in self.trained_on else 'zero-shot'}"


@dataclass(frozen=True, slots=True)
class Scores:
    """The rows of one contender on one data set.

    Attributes:
        depth: ``METRICS`` per (image, region).
        ssim: per (image, region); pixels are those whose whole window counts.
        boundary: per clean image; pixels are pairs of neighbours.
        planes: ``PLANE_METRICS`` per paste; a sample is ``plane_id(image, paste)``.
    """

    depth: RegionTable = field(default_factory=lambda: RegionTable(METRICS))
    ssim: RegionTable = field(default_factory=lambda: RegionTable(("ssim",)))
    boundary: RegionTable = field(default_factory=lambda: RegionTable(("boundary_f1",)))
    planes: RegionTable = field(default_factory=lambda: RegionTable(PLANE_METRICS))

    def tables(self) -> tuple[RegionTable, ...]:
        return self.depth, self.ssim, self.boundary, self.planes


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A mean and its 95 % interval over scenes (None if there are fewer than two scenes).

    Attributes:
        value: the mean.
        interval: (low, high).
        count: images it is over; pastes for ``PLANE_METRICS``; 0 for a difference.
    """

    value: float
    interval: tuple[float, float] | None
    count: int


Table = Mapping[str, Mapping[str, Figure]]
"""region -> metric -> figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One data set of an evaluation.

    Attributes:
        name: of the data set.
        frames: identity -> (key, scene) of the evaluated frames.
        sizes: (height, width) of what was compared -> (height, width) of the (first) network's
            input.
        scores, tables: per contender.
        differences: per contender from the second on, its figures minus the first's.
        trained: per contender how many of the frames it was trained on; None if not known.
    """

    name: str
    frames: Mapping[int, tuple[str, str]]
    sizes: Mapping[tuple[int, int], tuple[int, int]]
    scores: Sequence[Scores]
    tables: Sequence[Table]
    differences: Sequence[Table]
    trained: Sequence[int | None]

    @property
    def scenes(self) -> int:
        return len({scene for _, scene in self.frames.values()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All figures of a request.

    Attributes:
        request: what was asked.
        size: shorter side of the network's input in pixels.
        contenders: in the order of the request.
        domains: by data set, in the order of the request.
        device: where the networks computed.
    """

    request: Request
    size: int
    device: torch.device
    contenders: Sequence[Contender]
    domains: Sequence[Domain]

    def _multiples(self) -> str:
        """What the sides of the inputs are multiples of, in words."""
        found = sorted({contender.model.multiple for contender in self.contenders})
        return " or ".join(map(str, found)) + (" as it takes them" if len(found) > 1 else "")

    def conditions(self) -> str:
        """Protocol, resolution and means in one sentence."""
        return (
            f"{self.request.protocol}; picture resized to a shorter side of {self.size} px "
            "(antialiased bilinear, longer side to the nearest multiple of "
            f"{self._multiples()}), prediction brought "
            "to the truth's resolution (bilinear, corners aligned); means over images"
        )


def judge(
    request: Request,
    device: torch.device,
    progress: Callable[[int, int], None],
    *,
    subsets: Sequence[Subset] | None = None,
) -> Verdict:
    """Evaluate all checkpoints on all sets.

    Args:
        progress: called with (pictures done, pictures in all).
        subsets: the samples; None: those that ``request.data`` and ``request.part`` name.

    Raises:
        UserError: a checkpoint, set or option does not fit.
    """
    contenders = open_contenders(request, device)
    size = request.size or run_size(contenders)
    expect_room(request.batch, size, device)
    if subsets is None:
        subsets = open_subsets(request.data, request.part)
    pictures = open_pictures(request.art)
    places = [even_places(len(subset), request.images) for subset in subsets]
    pasted = (False,) if request.paste_seed is None else (False, True)
    tasks_of = [
        [(place, p) for place in chosen for p in pasted if not (p and subset.is_labelled)]
        for subset, chosen in zip(subsets, places, strict=True)
    ]
    total, done = sum(map(len, tasks_of)), 0

    books: dict[str, _Book] = {}
    for subset, chosen, tasks in zip(subsets, places, tasks_of, strict=True):
        name = subset.shards.dataset
        book = books.setdefault(name, _Book(scores=[Scores() for _ in contenders]))

        def load(task: tuple[int, bool], subset: Subset = subset) -> Sample:
            return load_sample(request, subset, task[0], pictures, pasted=task[1])

        samples = in_order(load, tasks, threads=request.threads, ahead=4 * request.batch)
        numbered = zip(samples, (with_pastes for _, with_pastes in tasks), strict=True)
        for group in alike(numbered, request.batch):
            _score(group, request, contenders, size, book, device)
            done += len(group)
            progress(done, total)
        book.trained.append([_trained_rows(c, subset, chosen) for c in contenders])
    domains = [_domain(name, book, request, len(contenders)) for name, book in books.items()]
    return Verdict(
        request=request, size=size, device=device, contenders=contenders, domains=domains
    )


def open_contenders(request: Request, device: torch.device) -> list[Contender]:
    """Load every checkpoint once and pair it with its alignments.

    Raises:
        UserError: a file cannot be used, or an alignment does not fit its kind.
    """
    contenders: list[Contender] = []
    for source, kind, max_depth_m, names in zip(
        request.checkpoints, request.kinds, request.max_depths_m, request.trained_on, strict=True
    ):
        model, report = open_depth(source, device, kind=kind, max_depth_m=max_depth_m)
        print(report, file=sys.stderr)
        run = run_config(source)
        known = names if names is not None else _run_datasets(run)
        if request.size is not None:
            expect_multiple("--size", request.size, model.multiple)
        own = own_alignment(model.kind)
        for alignment in request.alignments or (own,):
            if model.kind != "metric" and alignment != own:
                what = "inverse depth" if model.kind == "relative" else "depth"
                raise UserError(
                    f"--align: {source} predicts {what} up to scale and shift, which "
                    f"{alignment} cannot align; leave --align out, or give {own}"
                )
            contenders.append(
                Contender(
                    label=_label(len(contenders)),
                    source=source,
                    model=model,
                    alignment=alignment,
                    trained_on=known,
                    run=run,
                )
            )
    return contenders


def run_config(source: str) -> TrainConfig | None:
    """The configuration of the training run that a file ``RUN/weights/NAME`` belongs to."""
    path = Path(source)
    config = path.parent.parent / "config.yaml"
    if path.parent.name != "weights" or not config.is_file():
        return None
    try:
        return parse_config(TrainConfig, [f"--config={config}"], prog="train.py", description=None)
    except UserError:  # written by another version
        return None


def open_subsets(paths: Sequence[str], part: Part) -> list[Subset]:
    """The chosen part of every set; samples are numbered over the whole sets.

    Raises:
        UserError: a set cannot be opened, holds no depth, or has nothing in this part.
    """
    subsets: list[Subset] = []
    first = 0
    for path in paths:
        shards = _open(path, "depth", "--data")
        subsets.append(Subset(shards=shards, rows=_rows(shards, path, part), first_identity=first))
        first += len(shards)
    return subsets


def open_pictures(paths: Sequence[str]) -> Pictures:
    """The pictures that can be pasted."""
    return Pictures([_open(path, "art", "--art") for path in paths])


def _open(path: str, kind: str, option: str) -> ShardSet:
    ensure_demo(path)
    shards = ShardSet.open(path)
    if shards.kind != kind:
        raise UserError(
            f"{option}: expected a set of kind '{kind}', but {path} is of kind '{shards.kind}'"
        )
    return shards


def _rows(shards: ShardSet, path: str, part: Part) -> Int64[np.ndarray, " n"]:
    everything = np.arange(len(shards))
    if part == "all":
        return everything
    official = shards.splits.counts().keys() - {""}
    if official:
        rows = np.flatnonzero(shards.splits.isin({part}))
    elif part == "test":
        rows = everything[:0]
    else:
        corpus = open_corpus(DataConfig(train=[SetConfig(path=path)]))
        rows = (corpus.train if part == "train" else corpus.val)[0].rows
    if len(rows) == 0:
        found = ", ".join(sorted(official)) or "none"
        raise UserError(
            f"--part: {path} has no samples marked {part} (official parts: {found}); take another "
            "part, or all"
        )
    return rows


def _run_datasets(run: TrainConfig | None) -> frozenset[str] | None:
    """Names of the data sets of a run, None if they are not all at hand."""
    if run is None:
        return None
    try:
        return frozenset(ShardSet.open(entry.path).dataset for entry in run.data.train)
    except UserError:
        return None


def _trained_rows(contender: Contender, subset: Subset, places: Sequence[int]) -> int | None:
    """How many of these samples the contender's run was trained on, None if not known."""
    if contender.run is None or _run_datasets(contender.run) is None:
        return None
    here = Path(subset.shards.url).resolve()
    rows = {int(subset.rows[place]) for place in places}
    trained: set[int] = set()
    for other in open_corpus(contender.run.data).train:
        if Path(other.shards.url).resolve() == here:
            trained |= set(other.rows.tolist())
    return len(rows & trained)


def run_size(contenders: Sequence[Contender]) -> int:
    """Shorter side of the input in the contenders' training, in pixels; 518 where none is known.

    Raises:
        UserError: they differ.
    """
    trained = {c.source: c.model.trained_px for c in contenders if c.model.trained_px}
    in_runs = {c.source: (c.run.data.height, c.run.data.width) for c in contenders if c.run}
    sizes = {source: min(size) for source, size in {**in_runs, **trained}.items()}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{source}: {size}" for source, size in sizes.items())
        raise UserError(
            f"the checkpoints were trained at different sizes ({found}); choose one with --size"
        )
    return next(iter(sizes.values()), DEFAULT_SIZE)


def _label(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    letters = chr(ord("A") + number % 26)
    return letters if number < 26 else _label(number // 26 - 1) + letters


def even_places(count: int, most: int) -> list[int]:
    """At most so many of the places of a set, evenly spaced; 0: all."""
    if most == 0 or count <= most:
        return list(range(count))
    return np.linspace(0, count - 1, most).round().astype(int).tolist()


def load_sample(
    request: Request, subset: Subset, place: int, pictures: Pictures, *, pasted: bool
) -> Sample:
    """A frame at its own resolution as the protocol looks at it, with pastes or without.

    There are no pastes in a set whose own flat things are labelled.
    """
    frame = subset.frame(place)
    return pasted_sample(
        subset,
        place,
        request.protocol.view(*frame.depth_m.shape),
        Draws(request.paste_seed or 0, 0, subset.identity(place)),
        PasteConfig(share=1.0 if pasted and not subset.is_labelled else 0.0),
        frame=frame,
        pictures=pictures,
        depth_range_m=request.protocol.range_m,
    )


@dataclass(slots=True, kw_only=True)
class _Book:
    """What is gathered about one data set."""

    scores: list[Scores]
    frames: dict[int, tuple[str, str]] = field(default_factory=dict)
    sizes: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    trained: list[list[int | None]] = field(default_factory=list)


def alike(samples: Iterable[tuple[Sample, bool]], most: int) -> Iterator[list[tuple[Sample, bool]]]:
    """Consecutive samples of the same size, at most ``most`` together."""
    for _, run in groupby(samples, key=lambda one: (one[0].view.height, one[0].view.width)):
        group: list[tuple[Sample, bool]] = []
        for one in run:
            group.append(one)
            if len(group) == most:
                yield group
                group = []
        if group:
            yield group


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Pictures with what every contender says about them.

    Attributes:
        batch: the pictures at their own resolution, pasted.
        counted: the pixels that count.
        network: (height, width) of the first contender's input.
        depths_m: per contender the aligned depth in metres, at the pictures' resolution.
    """

    batch: Batch
    counted: Bool[Tensor, "b 1 h w"]
    network: tuple[int, int]
    depths_m: Sequence[Float[Tensor, "b 1 h w"]]


@torch.no_grad()
def look(
    samples: Sequence[Sample],
    request: Request,
    contenders: Sequence[Contender],
    size: int,
    device: torch.device,
) -> Seen:
    """Paste into samples of one size, and predict with every contender.

    Args:
        size: shorter side of the network's input in pixels.

    Raises:
        UserError: the GPU's memory is full.
    """
    batch, plans, _ = to_device(samples, device, depth_range_m=request.protocol.range_m)
    batch = paste(batch, plans, depth_range_m=request.protocol.range_m)
    height, width = batch.image.shape[-2:]
    counted = batch.valid & request.protocol.mask(height, width).to(device)
    depths_m: list[Tensor] = []
    networks: list[tuple[int, int]] = []
    torch.backends.cudnn.allow_tf32 = False  # figures shall not depend on the device
    for model, its_contenders in groupby(contenders, key=lambda contender: contender.model):
        side = nearest_multiple(size, model.multiple)
        way = preprocessing("ours", side, model.multiple)
        rows, columns = way.network_size(height, width)
        networks.append((rows, columns))
        resized = way.prepare(batch.image)
        focal_px = batch.focal_px * way.focal_scale(height, width)
        try:
            prediction = way.restore(model(resized, focal_px), height, width)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the GPU's memory is full with {len(resized)} images of {columns} x {rows} px; "
                "lower --batch or --size"
            ) from error
        depths_m += [
            align(
                prediction,
                batch.depth_m,
                counted,
                kind=model.kind,
                alignment=contender.alignment,
                fit=request.fit,
                range_m=request.protocol.range_m,
            )
            for contender in its_contenders
        ]
    return Seen(batch=batch, counted=counted, network=networks[0], depths_m=depths_m)


def _score(
    group: list[tuple[Sample, bool]],
    request: Request,
    contenders: Sequence[Contender],
    size: int,
    book: _Book,
    device: torch.device,
) -> None:
    seen = look([sample for sample, _ in group], request, contenders, size, device)
    batch = seen.batch
    height, width = batch.image.shape[-2:]
    book.sizes[height, width] = seen.network
    for position, (sample, pasted) in enumerate(group):
        one = slice(position, position + 1)
        book.frames[sample.identity] = (sample.frame.key, sample.frame.scene)
        for scores, pred_m in zip(book.scores, seen.depths_m, strict=True):
            image = _Image(
                identity=sample.identity,
                pred_m=pred_m[one],
                truth_m=batch.depth_m[one],
                region=batch.region[one],
                counted=seen.counted[one],
                K_px=batch.K_px[one],
                range_m=request.protocol.range_m,
            )
            _add_regions(scores, image, flat_known=pasted or sample.is_labelled)
            _add_planes(scores, image, sample.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """One picture with everything that is compared; tensors have a batch axis of 1."""

    identity: int
    pred_m: Tensor
    truth_m: Tensor
    region: Tensor
    counted: Tensor
    K_px: Tensor
    range_m: tuple[float, float]


def _add_regions(scores: Scores, image: _Image, *, flat_known: bool) -> None:
    near, far = image.range_m
    number = torch.tensor([image.identity])
    similarity, complete = ssim_map(
        image.pred_m, image.truth_m, image.counted, min_m=near, max_m=far
    )
    for name, mask in region_masks(image.region, image.counted, flat_known=flat_known).items():
        values, pixels = image_metrics(image.pred_m, image.truth_m, mask, min_m=near, max_m=far)
        scores.depth.add(number, name, values.cpu(), pixels.cpu())
        mean, pixels = mean_over(similarity, mask & complete)
        scores.ssim.add(number, name, mean[:, None].cpu(), pixels.cpu())
    if not flat_known:
        score, pairs = boundary_f1(
            image.pred_m, image.truth_m, image.counted, min_m=near, max_m=far
        )
        scores.boundary.add(number, "clean", score[:, None].cpu(), pairs.cpu())


def _add_planes(scores: Scores, image: _Image, plan: Sequence[Paste]) -> None:
    near, far = image.range_m
    owner = paste_owner(image.truth_m, image.K_px, plan)
    for number in range(len(plan)):
        of_paste = image.counted & (owner == number)
        for region in (Region.MIRROR, Region.ART):
            mask = of_paste & (image.region == region)
            if not mask.any():
                continue
            residual = flatness_residual(image.pred_m, image.K_px, mask, min_m=near, max_m=far)
            angle = plane_normal_angle_deg(
                image.pred_m, image.truth_m, image.K_px, mask, min_m=near, max_m=far
            )
            values = torch.stack([residual, angle], dim=1).cpu()
            pixels = mask.sum((1, 2, 3)).cpu()
            sample = torch.tensor([plane_id(image.identity, number)])
            for name in (region.name.lower(), "flat"):
                scores.planes.add(sample, name, values, pixels)


def paste_owner(
    depth_m: Float[Tensor, "1 1 h w"], K_px: Float64[Tensor, "1 3 3"], plan: Sequence[Paste]
) -> Int64[Tensor, "1 1 h w"]:
    """The number of the paste whose surface each pixel shows, -1 where it shows none.

    A pixel shows a paste if it lies inside its rectangle and its true depth is on its plane to
    1e-5; of several the last one, which is on top.
    """
    height, width = depth_m.shape[-2:]
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    pixels = np.stack([u, v, np.ones_like(u)])
    depth = depth_m[0, 0].double().cpu().numpy()
    owner = np.full((height, width), -1, dtype=np.int64)
    for number, one in enumerate(plan):
        box = one.rectangle
        matrix = box.pixel_matrix(K_px[0].cpu().numpy())
        x, y, inverse = np.tensordot(matrix, pixels, 1) * depth
        on_plane = np.abs(inverse - 1) < _PLANE_TOLERANCE
        owner[on_plane & (np.abs(x) <= box.width / 2) & (np.abs(y) <= box.height / 2)] = number
    return torch.from_numpy(owner)[None, None].to(depth_m.device)


def plane_id(image: int, number: int) -> int:
    """The sample id of a paste."""
    return image * _MOST_PASTES + number


def _domain(name: str, book: _Book, request: Request, contenders: int) -> Domain:
    scene_of = {identity: scene for identity, (_, scene) in book.frames.items()}
    scenes = sorted(set(scene_of.values()))
    draws = [_bootstrap(scores, scene_of, scenes, request.bootstrap) for scores in book.scores]
    means = [_means(scores) for scores in book.scores]
    tables = [
        {
            region: {
                metric: Figure(
                    value=value, interval=_interval(one_draws, region, metric), count=count
                )
                for metric, (value, count) in row.items()
            }
            for region, row in one_means.items()
        }
        for one_means, one_draws in zip(means, draws, strict=True)
    ]
    first, first_draws = means[0], draws[0]
    differences = []
    for one_means, one_draws in zip(means[1:], draws[1:], strict=True):
        paired = {
            region: {m: row[m] - first_draws[region][m] for m in row if m in first_draws[region]}
            for region, row in one_draws.items()
            if region in first_draws
        }
        differences.append(
            {
                region: {
                    metric: Figure(
                        value=value - first[region][metric][0],
                        interval=_interval(paired, region, metric),
                        count=0,
                    )
                    for metric, (value, _) in row.items()
                    if metric in first[region]
                }
                for region, row in one_means.items()
                if region in first
            }
        )
    trained = [
        None if any(n is None for n in column) else sum(n or 0 for n in column)
        for column in ([row[i] for row in book.trained] for i in range(contenders))
    ]
    return Domain(
        name=name,
        frames=book.frames,
        sizes=book.sizes,
        scores=book.scores,
        tables=tables,
        differences=differences,
        trained=trained,
    )


def _means(scores: Scores) -> dict[str, dict[str, tuple[float, int]]]:
    """region -> metric -> (mean, images or pastes)."""
    merged: dict[str, dict[str, tuple[float, int]]] = {}
    for table in scores.tables():
        for region, row in table.result().items():
            count = int(row["images"])
            merged.setdefault(region, {}).update(
                {m: (v, count) for m, v in row.items() if m not in ("images", "pixels")}
            )
    return merged


def _bootstrap(
    scores: Scores, scene_of: Mapping[int, str], scenes: Sequence[str], draws: int
) -> dict[str, dict[str, np.ndarray]]:
    """region -> metric -> resampled means; all tables see the same resamples."""
    planes = {key: scene_of[key // _MOST_PASTES] for key in scores.planes.state()[0][:, 0].tolist()}
    merged: dict[str, dict[str, np.ndarray]] = {}
    for table in scores.tables():
        own = planes if table is scores.planes else scene_of
        for region, row in bootstrap_means(table, own, scenes, draws=draws).items():
            merged.setdefault(region, {}).update(row)
    return merged


def _interval(
    draws: Mapping[str, Mapping[str, np.ndarray]], region: str, metric: str
) -> tuple[float, float] | None:
    values = draws.get(region, {}).get(metric)
    return None if values is None else percentile_interval(values)
