"""Experiments: variants of one training, judged on frames with known mirrors and pictures.

A variant (an arm) is a configuration that differs in a few keys; each has trainings of several
seeds. All are judged on the same frames (``Frame.region`` says what is flat there), so that
differences between arms are paired. A frame that shows the same view without its flat things, under
the key of the labelled one and ``PLAIN``, tells how well the same wall is read where nothing hangs
on it.
"""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float64
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from flatdepth.cli import parse_config, versions
from flatdepth.config import TrainConfig
from flatdepth.data.frames import Subset
from flatdepth.data.loader import Sample, in_order, to_device
from flatdepth.errors import UserError, expect_within
from flatdepth.judge.metrics import (
    image_metrics,
    percentile_interval,
    region_masks,
    scene_draws,
)
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.runs import Planned
from flatdepth.judge.scoring import (
    Request,
    load_sample,
    look,
    open_contenders,
    open_pictures,
    open_subsets,
    run_size,
)
from flatdepth.show.pictures import (
    colour_depth,
    contact_sheet,
    depth_limits,
    plot_style,
    svg,
    write_atomic,
)
from flatdepth.types import METRICS, Region
from flatdepth.untrusted import parse_json

FORMAT = 1
KIND = "flatdepth experiment"
PLAIN = "_plain"
REGIONS = ("flat", "mirror", "art", "wall", "background", "frame", "decoy", "clean")
"""As elsewhere, and ``wall``: where a labelled frame is flat, in that without flat things."""

PLOTTED = ("flat", "gap", "background", "clean", "decoy")
_DOT = "#d55e00"

MIN_PIXELS = 64
_ABS_REL = list(METRICS).index("abs_rel")
DRAWS = 2000
_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A variant of the training."""

    name: str
    """Letters, digits and _; its runs are called NAME-SEED."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of the training's configuration that differ, such as `paste.share: 0`."""
    seeds: int | None = None
    """How many of the experiment's seeds it is trained with; null: all."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"arms: expected a name of small letters, digits and _, got {self.name!r}"
            )
        expect_within(f"arms.{self.name}.seeds", 1 if self.seeds is None else self.seeds, 1, 1000)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What is trained, and on what it is judged."""

    name: str
    """Everything is in `runs`/`name`."""
    base: str
    """Configuration of all arms: a file, or the name of a packaged one."""
    arms: list[Arm]
    """The variants; the others are compared with the first."""
    bench: list[str]
    """Shard sets of frames with region maps; no arm is trained on them."""
    seeds: int = 1
    """Trainings per arm, with `seed` 0, 1, ..."""
    protocol: str = "none"
    """Which pixels count, as in flatdepth evaluate."""
    size: int | None = None
    """Shorter side of the network's input in judging; null: as in training."""
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"arms: expected two or more of different names, got {names}")
        if self.protocol not in PROTOCOLS:
            raise UserError(
                f"protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol}"
            )
        expect_within("seeds", self.seeds, 1, 1000)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


def planned(experiment: ExperimentConfig) -> dict[str, list[Planned]]:
    """arm -> its trainings, one per seed.

    Raises:
        UserError: a key of an arm is unknown or its value cannot be, or it trains on the bench.
    """
    result: dict[str, list[Planned]] = {}
    for arm in experiment.arms:
        changes = [f"--{key}={json.dumps(value)}" for key, value in arm.set.items()]
        for seed in range(min(arm.seeds or experiment.seeds, experiment.seeds)):
            name = f"{arm.name}-{seed}"
            arguments = [f"--config={experiment.base}", *changes, f"--seed={seed}"]
            config = dataclasses.replace(
                parse_config(TrainConfig, arguments, prog=f"arm {arm.name}", description=None),
                name=name,
                runs=str(experiment.folder),
            )
            if both := {entry.path for entry in config.data.train} & {*experiment.bench}:
                raise UserError(f"bench: arm {arm.name} trains on {min(both)}; name another set")
            result.setdefault(arm.name, []).append(Planned(title=name, config=config))
    return result


Rows = dict[tuple[str, str], list[float]]
"""(key of a frame, region) -> ``METRICS`` and the number of pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One run on the bench.

    Attributes:
        rows: the figures of every frame.
        scene_of: key of a frame -> scene.
    """

    rows: Rows
    scene_of: Mapping[str, str]


def judge_run(
    experiment: ExperimentConfig, weights: Path, device: torch.device, step: Callable[[], None]
) -> Judged:
    """The figures of one run's weights on every frame of the bench.

    Args:
        step: called after every frame.

    Raises:
        UserError: a set or the weights cannot be used.
    """
    request = _request(experiment, weights)
    contenders = open_contenders(request, device)
    size = request.size or run_size(contenders)
    near, far = request.protocol.range_m
    rows: Rows = {}
    scene_of: dict[str, str] = {}
    for sample, partner in bench_frames(request):
        seen = look([sample], request, contenders, size, device)
        masks = region_masks(seen.batch.region, seen.counted, flat_known=sample.is_labelled)
        if partner is not None:
            batch, _, _ = to_device([partner], device, depth_range_m=(near, far))
            masks |= {"wall": region_masks(batch.region, seen.counted, flat_known=True)["flat"]}
        key = sample.frame.key
        scene_of[key] = sample.frame.scene
        for region, mask in masks.items():
            values, pixels = image_metrics(
                seen.depths_m[0], seen.batch.depth_m, mask, min_m=near, max_m=far
            )
            if pixels[0] >= MIN_PIXELS:
                rows[key, region] = [*values[0].tolist(), int(pixels[0])]
        step()
    return Judged(rows=rows, scene_of=scene_of)


def bench_frames(request: Request) -> Iterator[tuple[Sample, Sample | None]]:
    """Every frame of the bench, those without flat things with the labelled one that they pair."""
    pictures = open_pictures(())
    for subset in open_subsets(request.data, "all"):
        place_of = {subset.shards.keys[row]: place for place, row in enumerate(subset.rows)}

        def load(
            place: int, subset: Subset = subset, place_of: Mapping[str, int] = place_of
        ) -> tuple[Sample, Sample | None]:
            key = subset.shards.keys[subset.rows[place]]
            partner = place_of.get(key.removesuffix(PLAIN)) if key.endswith(PLAIN) else None
            one, other = (
                None if p is None else load_sample(request, subset, p, pictures, pasted=False)
                for p in (place, partner)
            )
            assert one is not None
            if other is not None and not other.is_labelled:
                other = None
            return one, other

        yield from in_order(load, range(len(subset)), threads=request.threads, ahead=8)


def _request(experiment: ExperimentConfig, weights: Path) -> Request:
    return Request(
        checkpoints=(str(weights),),
        kinds=(None,),
        max_depths_m=(None,),
        trained_on=(None,),
        data=tuple(experiment.bench),
        protocol=PROTOCOLS[experiment.protocol],
        size=experiment.size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval over scenes (None if there are fewer than two)."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An arm in one region.

    Attributes:
        mean: AbsRel, the mean over the arm's runs and then over frames.
        seeds: the mean over frames of each run.
        ratio: the mean over that of the first arm, paired by frame.
        frames: how many have the region.
    """

    mean: Estimate
    seeds: Sequence[float]
    ratio: Estimate
    frames: int


def outcomes(arms: Mapping[str, Sequence[Judged]]) -> dict[str, dict[str, Outcome]]:
    """arm -> region -> how it did; ``gap`` is AbsRel on ``flat`` over that on ``wall``.

    Intervals are those of scenes drawn with replacement (cluster bootstrap, Davison and Hinkley
    1997, section 3.8), the same draws for all arms. Runs of an arm are averaged per frame, so
    intervals are about the frames; ``seeds`` shows how far trainings differ.
    """
    scene_of = next(iter(arms.values()))[0].scene_of
    scenes = sorted(set(scene_of.values()))
    number = {scene: i for i, scene in enumerate(scenes)}
    # the figure itself, then the draws
    weights = np.vstack([np.ones(len(scenes)), scene_draws(len(scenes), DRAWS, seed=0)])

    def means(runs: Sequence[Judged], region: str) -> Float64[np.ndarray, " draws"]:
        sums = np.zeros((2, len(scenes)))
        for key, scene in scene_of.items():
            values = [run.rows[key, region][_ABS_REL] for run in runs if (key, region) in run.rows]
            if values:
                sums[:, number[scene]] += statistics.fmean(values), 1
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.divide(*(weights @ sums.T).T)

    def estimate(values: Float64[np.ndarray, " draws"]) -> Estimate:
        interval = percentile_interval(values[1:]) if len(scenes) > 1 else None
        return Estimate(value=float(values[0]), interval=interval)

    result: dict[str, dict[str, Outcome]] = {}
    base: dict[str, np.ndarray] = {}
    for arm, runs in arms.items():
        own = {region: means(runs, region) for region in REGIONS}
        own["gap"] = own["flat"] / own["wall"]
        base = base or own
        result[arm] = {
            region: Outcome(
                mean=estimate(values),
                seeds=[float(means([run], region)[0]) for run in runs if region != "gap"],
                ratio=estimate(values / base[region]),
                frames=sum((key, region) in runs[0].rows for key in scene_of),
            )
            for region, values in own.items()
            if math.isfinite(values[0])
        }
    return result


def markdown(table: Mapping[str, Mapping[str, Outcome]]) -> str:
    """AbsRel by arm and region as a Markdown table, and the ratios to the first arm."""
    names = [name for name in (*REGIONS, "gap") if any(name in row for row in table.values())]
    lines = ["| AbsRel | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, row in table.items():
        lines.append(f"| {arm} | " + " | ".join(_mean(row.get(name)) for name in names) + " |")
    lines += ["", "| of the first | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, row in [*table.items()][1:]:
        lines.append(f"| {arm} | " + " | ".join(_ratio(row.get(name)) for name in names) + " |")
    return "\n".join(lines)


def _mean(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    spread = f" ± {statistics.stdev(outcome.seeds):.4f}" if len(outcome.seeds) > 1 else ""
    return f"{outcome.mean.value:.4f}{spread}"


def _ratio(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    low, high = outcome.ratio.interval or (math.nan, math.nan)
    return f"{outcome.ratio.value:.3f} ({low:.3f} to {high:.3f})"


def as_json(
    experiment: ExperimentConfig,
    table: Mapping[str, Mapping[str, Outcome]],
    command: Sequence[str],
) -> dict[str, Any]:
    """Everything in JSON values."""
    return {
        "format": FORMAT,
        "kind": KIND,
        "command": list(command),
        "versions": versions(),
        "experiment": dataclasses.asdict(experiment),
        "protocol": str(PROTOCOLS[experiment.protocol]),
        "table": {
            arm: {region: dataclasses.asdict(outcome) for region, outcome in row.items()}
            for arm, row in table.items()
        },
    }


def read_table(path: Path) -> dict[str, dict[str, Outcome]]:
    """The table of an experiment.json. Raises UserError if the file is none."""

    def estimate(own: Mapping[str, Any]) -> Estimate:
        low, high = own["interval"] or (math.nan, math.nan)
        interval = None if own["interval"] is None else (float(low), float(high))
        return Estimate(value=float(own["value"]), interval=interval)

    try:
        document = parse_json(path.read_bytes())
        if (document["kind"], document["format"]) != (KIND, FORMAT):
            raise ValueError(path)
        return {
            arm: {
                region: Outcome(
                    mean=estimate(own["mean"]),
                    seeds=own["seeds"],
                    ratio=estimate(own["ratio"]),
                    frames=own["frames"],
                )
                for region, own in row.items()
            }
            for arm, row in document["table"].items()
        }
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected the experiment.json of flatdepth experiment") from error


def ratio_plot(table: Mapping[str, Mapping[str, Outcome]], *, dark: bool = False) -> bytes:
    """AbsRel over that of the first arm, a panel per region, as an SVG file.

    A dot per arm with its 95 % interval over scenes, on a logarithmic axis; left of 1 is better.
    """
    first, *others = table
    names = [name for name in PLOTTED if name in table[first]]
    with matplotlib.rc_context(plot_style(dark)):
        layout = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.06, wspace=0.03)
        figure = Figure(figsize=(2.0 + 1.9 * len(names), 1.0 + 0.26 * len(others)), layout=layout)
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, region in zip(panels, names, strict=True):
            axes.axvline(1.0, color="#8c959f", linewidth=1.0, linestyle="--")
            for place, arm in enumerate(others):
                if region not in table[arm]:
                    continue
                ratio = table[arm][region].ratio
                low, high = ratio.interval or (ratio.value, ratio.value)
                axes.plot([low, high], [place, place], color=_DOT, linewidth=1.6, alpha=0.6)
                axes.plot([ratio.value], [place], "o", color=_DOT, markersize=5)
            axes.set_title(region)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis="x")
            axes.set_yticks(range(len(others)), others)
            axes.tick_params(axis="y", length=0)
        panels[0].set_ylim(len(others) - 0.5, -0.5)
        figure.supxlabel(f"AbsRel / AbsRel of {first}", fontsize=9.5)
        return svg(figure)


def write_rows(judged: Judged, path: Path) -> None:
    """Keep what a run was judged to be, so that it need not be judged again."""
    rows = [[key, region, *values] for (key, region), values in judged.rows.items()]
    document = {"columns": [*METRICS, "pixels"], "scene_of": judged.scene_of, "rows": rows}
    write_atomic(path, json.dumps(document, allow_nan=False).encode())


def read_rows(path: Path) -> Judged:
    """Undo ``write_rows``. Raises UserError if the file is damaged."""
    try:
        document = parse_json(path.read_bytes())
        rows = {(key, region): values for key, region, *values in document["rows"]}
        return Judged(rows=rows, scene_of=document["scene_of"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; delete it to judge that run again") from error


def picture_sheet(
    experiment: ExperimentConfig, weights: Mapping[str, Path], device: torch.device, most: int = 10
) -> Image.Image:
    """Labelled frames of the bench with the truth and what one run of every arm says.

    For looking at, predictions are scaled to the truth's median outside the flat things.
    """
    request = _request(experiment, next(iter(weights.values())))
    samples = [sample for sample, _ in bench_frames(request) if sample.is_labelled]
    chosen = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    panels: list[list[np.ndarray]] = [[] for _ in chosen]
    limits = []
    for path in weights.values():
        own = _request(experiment, path)
        contenders = open_contenders(own, device)
        size = own.size or run_size(contenders)
        for row, place in zip(panels, chosen.tolist(), strict=True):
            seen = look([samples[place]], own, contenders, size, device)
            truth = torch.where(seen.batch.valid, seen.batch.depth_m, math.nan)[0, 0].cpu().numpy()
            low, high = depth_limits(truth, np.isfinite(truth))
            # Wider, so that what is read too near or too far can still be told apart.
            low, high = low / 1.2, high * 1.5
            if not row:
                row += [samples[place].frame.image, colour_depth(truth, low_m=low, high_m=high)]
                limits.append((low, high))
            depth = seen.depths_m[0][0, 0].float().cpu().numpy()
            background = seen.batch.region[0, 0].cpu().numpy() == Region.BACKGROUND
            known = background & np.isfinite(truth) & np.isfinite(depth)
            scale = float(np.median(truth[known]) / np.median(depth[known])) if known.any() else 1.0
            row.append(colour_depth(scale * depth, low_m=low, high_m=high))
    return contact_sheet(
        panels,
        ["image", "truth", *weights],
        [samples[place].frame.key for place in chosen.tolist()],
        title=f"{experiment.name} (predictions scaled to the truth's median)",
        regions=False,
        limits_m=limits,
    )
