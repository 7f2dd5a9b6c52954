"""Systems on a benchmark: predictions, figures with intervals, and the text of it."""

import platform
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from flatdepth.benchmarks.base import SCALED, Benchmark, Row, Sample, is_higher_better
from flatdepth.cli import versions
from flatdepth.data.readers.files import Tree
from flatdepth.errors import BadFrame, UserError
from flatdepth.judge.metrics import percentile_interval, scene_draws
from flatdepth.judge.scoring import Figure
from flatdepth.judge.tables import FORMAT, KIND, aligned, figure_text
from flatdepth.models.network import Kind
from flatdepth.predict.systems import SYSTEMS, OpenedSystem, Settings, open_system, predict_with

Draws = Mapping[str, Mapping[str, Float64[np.ndarray, " draws"]]]
"""Region -> column -> figure of each draw of scenes."""

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Region -> column -> value and interval."""


def run(
    benchmark: Benchmark,
    raw: str,
    checkpoints: Iterable[tuple[str, Kind | None, float | None]],
    settings: Settings,
    device: torch.device,
    progress: Callable[[int, int], None],
    *,
    images: int = 0,
    bootstrap: int = 2000,
) -> dict[str, Any]:
    """Predict and score every sample with every system; one network is in memory at a time.

    Args:
        raw: directory of the benchmark's data as downloaded and unpacked.
        checkpoints: weights or systems as ``open_system`` takes them, kind and greatest depth of
            each, None where the file says it.
        progress: called with (samples done, samples in all).
        images: most samples, evenly spaced; 0: all.
        bootstrap: resamples of the scenes.

    Returns:
        Everything in JSON values: conditions, figures, others' figures, and per system the rows
        that the figures are weighted means of. ``render`` makes text of it.

    Raises:
        UserError: the data or a system cannot be used.
    """
    torch.backends.cudnn.allow_tf32 = False  # figures shall not depend on the device
    samples, asked = open_samples(benchmark, raw, images), list(checkpoints)
    rows: dict[str, list[list[Row]]] = {}
    about = {}
    for number, (given, kind, max_depth_m) in enumerate(asked):
        label = chr(ord("A") + number)
        is_system = given in SYSTEMS or ("=" in given and not Path(given).exists())
        name = given if is_system else f"{label}={given}"
        system = open_system(name, settings, device, kind=kind, max_depth_m=max_depth_m)
        print(f"{label}: {system.weights}", file=sys.stderr)
        rows[label] = []
        for sample in samples:
            rows[label].append(score(sample, system, settings))
            progress(number * len(samples) + len(rows[label]), len(asked) * len(samples))
        size = "{} x {}".format(*system.preprocessing.size)
        about[label] = {
            "checkpoint": given,
            "weights": system.weights,
            "kind": system.kind,
            "licence": system.licence,
            "description": f"{given}: {system.predicts}, input of {size} px by its own rule",
        }
        del system
    scenes = [sample.scene for sample in samples]
    tables, differences = figures(benchmark, rows, scenes, bootstrap)
    return {
        "format": FORMAT,
        "kind": KIND,
        "benchmark": benchmark.name,
        "versions": versions() | {"python": platform.python_version()},
        "device": device.type,
        "protocol": benchmark.protocol,
        "samples": len(samples),
        "scenes": len(set(scenes)),
        "images": images,
        "size": settings.size,
        "interval": {"level": 0.95, "draws": bootstrap, "seed": 0, "over": "scenes"},
        "contenders": about,
        "things": benchmark.things,
        "units": dict(benchmark.units),
        "tables": tables,
        "differences": differences,
        "compared": [list(at) for at in benchmark.compared],
        "published": [list(one) for one in benchmark.published],
        "remark": benchmark.remark,
        "rows": {
            label: [
                [sample.name, sample.scene, row.region, row.weight, _finite(row.values)]
                for sample, of_sample in zip(samples, of_system, strict=True)
                for row in of_sample
            ]
            for label, of_system in rows.items()
        },
    }


def open_samples(benchmark: Benchmark, raw: str, most: int = 0) -> list[Sample]:
    """The samples of a raw directory, evenly spaced ones if there are more than ``most`` (0: all).

    Raises:
        UserError: the directory has another layout, or its lists are damaged.
    """
    tree = Tree(raw)
    try:
        found = benchmark.samples(tree)
    except BadFrame as error:
        raise UserError(f"--raw: {error}; download the file anew") from error
    if not found:
        trouble = tree.layout_error(f"{benchmark.layout}, of {benchmark.source}")
        raise UserError(f"--raw: {trouble}")
    count = min(most or len(found), len(found))
    return [found[i] for i in np.linspace(0, len(found) - 1, count).round().astype(int).tolist()]


def score(sample: Sample, system: OpenedSystem, settings: Settings) -> list[Row]:
    """What a system's predictions of a sample are worth.

    Raises:
        UserError: the sample's files are damaged; without it, it would be another benchmark.
    """
    try:
        case = sample.load()
        maps = [
            predict_with(system, shot.image, shot.focal_px, settings, at_network=shot.at_network)
            for shot in case.shots
        ]
        return list(case.score(maps, system.kind))
    except BadFrame as error:
        raise UserError(f"--raw: {sample.name}: {error}; download the file anew") from error


def figures(
    benchmark: Benchmark,
    rows: Mapping[str, Sequence[Sequence[Row]]],
    scenes: Sequence[str],
    draws: int,
) -> tuple[dict[str, Table], dict[str, Table]]:
    """(label -> figures, "B - A" -> differences from the first system, for those after it).

    Weighted means over all rows of a region, then ``Benchmark.finish``; intervals by drawing
    scenes with replacement, the same ones for every system.

    Args:
        rows: label -> per sample.
        scenes: per sample.
    """
    numbers = {scene: number for number, scene in enumerate(sorted(set(scenes)))}
    # The first draw has every scene once, and so the figures themselves.
    everything = np.ones((1, len(numbers)), np.int64)
    picks = np.concatenate([everything, scene_draws(len(numbers), draws, 0)])
    drawn: dict[str, Draws] = {}
    for label, of_system in rows.items():
        regions: dict[str, list[tuple[int, Row]]] = {}
        for scene, of_sample in zip(scenes, of_system, strict=True):
            for row in of_sample:
                regions.setdefault(row.region, []).append((numbers[scene], row))
        drawn[label] = {
            region: benchmark.finish(_means(found, picks)) for region, found in regions.items()
        }
    base, *others = drawn
    differences = {
        f"{label} - {base}": {
            region: {c: row[c] - drawn[base][region][c] for c in row}
            for region, row in drawn[label].items()
            if region in drawn[base]
        }
        for label in others
    }
    many = len(numbers) > 1
    return (
        {label: _table(one, many) for label, one in drawn.items()},
        {label: _table(one, many) for label, one in differences.items()},
    )


def _means(
    rows: Sequence[tuple[int, Row]], picks: Int64[np.ndarray, "draws scenes"]
) -> dict[str, Float64[np.ndarray, " draws"]]:
    """column -> weighted mean in each draw of scenes; NaN for a draw without the column."""
    result = {}
    for column in rows[0][1].values:
        weight, total = np.zeros((2, picks.shape[1]))
        for scene, row in rows:
            if np.isfinite(row.values[column]):
                weight[scene] += row.weight
                total[scene] += row.weight * row.values[column]
        drawn = picks @ weight
        result[column] = (picks @ total) / np.where(drawn > 0, drawn, np.nan)
    return result


def _table(drawn: Draws, many: bool) -> Table:
    return {
        region: {
            column: {
                "value": float(draws[0]),
                "interval": percentile_interval(draws[1:]) if many else None,
            }
            for column, draws in row.items()
            if np.isfinite(draws[0])
        }
        for region, row in drawn.items()
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def render(document: Mapping[str, Any]) -> str:
    """The protocol, the systems, all figures, and the published ones beside ours."""
    tables, differences = document["tables"], document["differences"]
    lines = [
        f"== {document['benchmark']}: {document['samples']} samples of {document['scenes']} scenes",
        textwrap.fill(document["protocol"], 100),
        *(f"  {label}  {about['description']}" for label, about in document["contenders"].items()),
        "[95 % intervals, bootstrap over scenes; differences are paired]. + : higher is better.",
    ]

    def name(column: str) -> str:
        unit = document["units"].get(column)
        return column + (f" [{unit}]" if unit else "") + " +" * is_higher_better(column)

    everything = [*tables.values(), *differences.values()]
    regions = dict.fromkeys(region for table in tables.values() for region in table)
    for region in regions:
        rows = next(filter(None, (_in(region, rows) for rows in document["rows"].values())))
        things = document["things"]
        over = f"{sum(row[3] for row in rows):g} {things}" if things else len(rows)
        body = [[f"{region} ({over})", *tables, *differences]]
        for column in dict.fromkeys(c for table in everything for c in table.get(region, {})):
            cells = (table.get(region, {}).get(column) for table in everything)
            signed = (number >= len(tables) for number in range(len(everything)))
            body.append([f"  {name(column)}", *map(_text, cells, signed)])
        lines += ["", *aligned(body)]
    body = [["", *(f"{region} {name(column)}" for region, column in document["compared"])]]
    for system, mark, values in document["published"]:
        body.append([f"{system} [{mark}]", *("-" if v is None else f"{v:g}" for v in values)])
    for label, table in tables.items():
        for suffix in ("", SCALED):
            found = [table.get(region + suffix, {}).get(c) for region, c in document["compared"]]
            if any(found) or not suffix:
                texts = ("-" if one is None else f"{one['value']:.4g}" for one in found)
                body.append([f"{label}{suffix}, here", *texts])
    lines += ["", "Published [P: by the authors, S: second-hand, not checked], and here:"]
    lines += [*aligned(body), document["remark"]]
    if document["images"]:
        lines.append("Only some of the images (--images): published rows do not compare.")
    return "\n".join(lines)


def _in(region: str, rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    return [row for row in rows if row[2] == region]


def _text(entry: Mapping[str, Any] | None, signed: bool) -> str:
    if entry is None:
        return "-"
    values = (entry["value"], *(entry["interval"] or ()))
    if 0 < max(map(abs, values)) < 1e-2:
        value, *interval = (f"{one:{'+' if signed else ''}.3e}" for one in values)
        return f"{value} [{', '.join(interval)}]" if interval else value
    return figure_text(Figure(**entry, count=0), signed) if any(values) else "0"
