"""Cross-validation: a run per fold of the scenes, and the spread of their figures.

Scenes are what is dealt, because frames of one scene resemble each other, and those of every data
set are dealt evenly, so each fold holds about the same share of each. A fold is a run like any
other, in ``RUNS/NAME-KIND/fold_K``; see ``judge.runs``.
"""

import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from flatdepth.config import DataConfig, SetConfig, TrainConfig
from flatdepth.data.demo import ensure_demo
from flatdepth.data.shards.read import ShardSet
from flatdepth.errors import UserError
from flatdepth.judge.runs import Planned, run_all
from flatdepth.show.pictures import FLAT_COLOUR, REGION_COLOURS
from flatdepth.types import ALL_METRICS, REGIONS

FORMAT = 1
KIND = "flatdepth cross-validation"

_SHOWN = ("abs_rel", "delta1", "silog", "illusion_gap")
_LABELS = {
    "abs_rel": "AbsRel",
    "delta1": "δ < 1.25 (higher is better)",
    "silog": "SILog",
    "illusion_gap": "Illusion gap",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What one run holds out.

    Attributes:
        name: of the run.
        title: what is held out, in words.
        data: what the run trains and validates on.
    """

    name: str
    title: str
    data: DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the folds.

    Attributes:
        mean: over the folds that have it, each counting once.
        deviation: sample standard deviation (n - 1), NaN for a single fold.
        values: per fold, NaN where it has none.
    """

    mean: float
    deviation: float
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Set:
    """A training set with its scenes, those of official test samples apart."""

    entry: SetConfig
    dataset: str
    scenes: Sequence[str]


def k_folds(config: TrainConfig, count: int) -> list[Fold]:
    """Deal the scenes of every set to ``count`` folds.

    They are dealt in an order that ``data.split_seed`` selects, and each set goes on where the one
    before it stopped: over all sets, and within each, folds differ by one scene at most.

    Raises:
        UserError: fewer than 2 folds, more than there are scenes, or a set of a single scene.
    """
    sets = _sets(config)
    _expect_scenes(sets)
    scenes = sum(len(one.scenes) for one in sets)
    if not 2 <= count <= scenes:
        raise UserError(
            f"--folds: expected 2 to {scenes}, the number of scenes of data.train, got {count}"
        )
    hands: list[list[list[str]]] = [[[] for _ in sets] for _ in range(count)]
    turn = 0
    for number, one in enumerate(sets):
        for scene in _shuffled(one.scenes, config.data.split_seed):
            hands[turn % count][number].append(scene)
            turn += 1
    return [
        _scene_fold(config, number, f"fold {number + 1}", hand) for number, hand in enumerate(hands)
    ]


def _shuffled(scenes: Sequence[str], seed: int) -> list[str]:
    """In an order that depends on seed and names alone, wherever it is computed."""
    return sorted(scenes, key=lambda scene: blake2b(f"{seed} {scene}".encode()).digest())


def scene_folds(config: TrainConfig) -> list[Fold]:
    """A fold per scene.

    Raises:
        UserError: a set has a single scene.
    """
    sets = _sets(config)
    _expect_scenes(sets)
    cases = [(number, scene) for number, one in enumerate(sets) for scene in one.scenes]
    return [
        _scene_fold(
            config,
            place,
            f"{sets[number].dataset} {scene}",
            [[scene] if other == number else [] for other in range(len(sets))],
        )
        for place, (number, scene) in enumerate(cases)
    ]


def dataset_folds(config: TrainConfig) -> list[Fold]:
    """A fold per data set, validated on all of its samples and trained on the other data sets.

    Raises:
        UserError: there is a single data set.
    """
    sets = _sets(config)
    names = list(dict.fromkeys(one.dataset for one in sets))
    if len(names) < 2:
        raise UserError(
            f"--leave-one-dataset-out: expected sets of two data sets or more in data.train, found "
            f"{', '.join(names)} alone"
        )
    return [
        Fold(
            name=f"fold_{number + 1}",
            title=name,
            data=dataclasses.replace(
                config.data,
                train=[one.entry for one in sets if one.dataset != name],
                val=[one.entry.path for one in sets if one.dataset == name],
            ),
        )
        for number, name in enumerate(names)
    ]


def _sets(config: TrainConfig) -> list[_Set]:
    if config.data.val or any(entry.val_scenes for entry in config.data.train):
        raise UserError(
            "data.val and val_scenes: expected neither, because cross-validation chooses what is "
            "held out; leave them out of the configuration"
        )
    sets = []
    for entry in config.data.train:
        ensure_demo(entry.path)
        shards = ShardSet.open(entry.path)
        scenes = sorted(shards.scenes.counts(~shards.splits.isin({"test"})))
        sets.append(_Set(entry=entry, dataset=shards.dataset, scenes=scenes))
    return sets


def _expect_scenes(sets: Sequence[_Set]) -> None:
    """Every set must have something left to train on when a scene of it is held out."""
    for one in sets:
        if len(one.scenes) < 2:
            raise UserError(
                f"data.train: {one.entry.path} has a single scene, which cannot be both held out "
                "and trained on; leave it out, or use --leave-one-dataset-out"
            )


def _scene_fold(
    config: TrainConfig, number: int, title: str, hand: Sequence[Sequence[str]]
) -> Fold:
    train = [
        dataclasses.replace(entry, val_scenes=sorted(scenes))
        for entry, scenes in zip(config.data.train, hand, strict=True)
    ]
    return Fold(
        name=f"fold_{number + 1}",
        title=title,
        data=dataclasses.replace(config.data, train=train),
    )


def run_folds(
    config: TrainConfig, folds: Sequence[Fold], folder: Path, launch: str
) -> list[Mapping[str, Any]]:
    """Train every fold that has not finished, and return what each one's metrics.json says.

    Args:
        config: of the folds, but for their data, name and place.
        folder: where the folds' runs and configurations go.
        launch: options for ``accelerate launch``.

    Raises:
        UserError: ``folder`` holds folds of another configuration, or a run did not finish.
    """
    runs = [
        Planned(
            title=f"{fold.name} of {len(folds)}: holds out {fold.title}",
            config=dataclasses.replace(config, name=fold.name, runs=str(folder), data=fold.data),
        )
        for fold in folds
    ]
    return run_all(runs, folder, launch)


def spreads(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Spread]]:
    """region -> metric -> spread over the folds' last validations."""
    tables = [record["evaluations"][-1]["table"] for record in records]
    result: dict[str, dict[str, Spread]] = {}
    for region in REGIONS:
        for metric in ALL_METRICS:
            values = [table.get(region, {}).get(metric, math.nan) for table in tables]
            known = [value for value in values if math.isfinite(value)]
            if known:
                result.setdefault(region, {})[metric] = Spread(
                    mean=statistics.fmean(known),
                    deviation=statistics.stdev(known) if len(known) > 1 else math.nan,
                    values=values,
                )
    return result


def render(folds: Sequence[Fold], table: Mapping[str, Mapping[str, Spread]], protocol: str) -> str:
    """The figures as aligned plain text, a row per metric and a column per region."""
    metrics = [metric for metric in ALL_METRICS if any(metric in row for row in table.values())]
    rows = [["", *table]]
    for metric in metrics:
        name = metric + (" +" if ALL_METRICS[metric].better == "higher" else "")
        rows.append([name, *(_cell(row.get(metric)) for row in table.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{len(folds)} folds; mean ± sample standard deviation over folds, at the end of each run",
        protocol,
        "+ : higher is better.",
        "",
    ]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    largest = max(abs(spread.mean), 1e-9)
    digits = 4 if largest < 1 else max(0, 3 - math.floor(math.log10(largest)))
    if math.isnan(spread.deviation):
        return f"{spread.mean:.{digits}f}"
    return f"{spread.mean:.{digits}f} ± {spread.deviation:.{digits}f}"


def as_json(
    config: TrainConfig,
    folds: Sequence[Fold],
    records: Sequence[Mapping[str, Any]],
    table: Mapping[str, Mapping[str, Spread]],
    command: Sequence[str],
) -> dict[str, Any]:
    """Everything in JSON values; figures that a fold does not have are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "format": FORMAT,
        "kind": KIND,
        "command": list(command),
        "name": config.name,
        "protocol": records[0]["protocol"],
        "versions": records[0]["versions"],
        "folds": [
            {
                "run": fold.name,
                "held_out": fold.title,
                "val": list(fold.data.val),
                "val_scenes": {entry.path: entry.val_scenes for entry in fold.data.train},
                "seconds": record["seconds"],
            }
            for fold, record in zip(folds, records, strict=True)
        ],
        "table": {
            region: {
                metric: {
                    "mean": spread.mean,
                    "deviation": number(spread.deviation),
                    "values": [number(value) for value in spread.values],
                }
                for metric, spread in row.items()
            }
            for region, row in table.items()
        },
    }


def chart(table: Mapping[str, Mapping[str, Spread]], title: str) -> bytes:
    """A panel per metric, a row per region: every fold a dot, the mean a line, its deviation a bar.

    Returns:
        a PNG file.
    """
    metrics = [metric for metric in _SHOWN if any(metric in row for row in table.values())]
    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.grid.axis": "x",
        "axes.axisbelow": True,
        "figure.constrained_layout.hspace": 0.04,
        "grid.color": "#e4e7eb",
        **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    }
    with matplotlib.rc_context(style):
        rows = [max(1, sum(metric in row for row in table.values())) for metric in metrics]
        figure = Figure(
            figsize=(8.5, 1.2 + sum(0.75 + 0.34 * count for count in rows)),
            dpi=130,
            layout="constrained",
        )
        panels = figure.subplots(
            len(metrics), 1, height_ratios=[0.75 + 0.34 * count for count in rows], squeeze=False
        )
        for axes, metric in zip(panels[:, 0], metrics, strict=True):
            regions = [region for region, row in table.items() if metric in row]
            for place, region in enumerate(regions):
                spread, colour = table[region][metric], _colour(region)
                values = np.array(spread.values)
                known = values[np.isfinite(values)]
                # spread by the number of the fold, so that equal dots do not hide each other
                lift = np.linspace(-0.16, 0.16, len(known)) if len(known) > 1 else np.zeros(1)
                if math.isfinite(spread.deviation):
                    axes.barh(
                        place,
                        2 * spread.deviation,
                        left=spread.mean - spread.deviation,
                        height=0.62,
                        color=colour,
                        alpha=0.18,
                    )
                axes.vlines(spread.mean, place - 0.31, place + 0.31, color=colour, linewidth=2.2)
                axes.scatter(known, place + lift, s=16, color=colour, zorder=3, linewidths=0)
            axes.set_yticks(range(len(regions)), regions)
            axes.set_ylim(len(regions) - 0.45, -0.55)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.set_title(_LABELS[metric])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color="#667080")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _colour(region: str) -> str:
    colours = {member.name.lower(): colour for member, colour in REGION_COLOURS.items()}
    colours["flat"] = FLAT_COLOUR
    return "#{:02x}{:02x}{:02x}".format(*colours.get(region, (102, 112, 128)))
