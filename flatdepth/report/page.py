"""One self-contained HTML page about one run, or several side by side.

``flatdepth.show.run_page`` writes a page about one run from its files alone, whenever it validates.
This one also shows what ``flatdepth.report.samples`` finds by judging the runs' weights again:
intervals, worst pictures, error and relief maps, point clouds. What it looks like is in
``flatdepth/show/templates/comparison.html``; here is what it says.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure as Plot
from PIL import Image

from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.judge.scoring import Domain, Figure, run_config
from flatdepth.judge.tables import figure_text
from flatdepth.models.checkpoint import read_weights
from flatdepth.models.surgery import diff, diff_chart
from flatdepth.report.preview import colour_residual
from flatdepth.report.samples import Exhibits, Shot
from flatdepth.show.clouds import cloud_json
from flatdepth.show.html import write_page
from flatdepth.show.pictures import (
    colour_depth,
    colour_error,
    colour_region,
    depth_limits,
    plot_style,
    svg,
)
from flatdepth.show.run_page import (
    NIGHT,
    REGION_NAMES,
    Label,
    Run,
    curves,
    definitions,
    facts,
    headline,
    lost,
    metric_label,
    read_run,
    region_label,
    remarks,
    stage_times,
    summary,
)
from flatdepth.training.memory import CONTEXT_BYTES, gib, simulate
from flatdepth.types import ALL_METRICS
from flatdepth.untrusted import parse_yaml

COLOURS = ("#2b66b1", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#5b8db8")
ERROR_LIMIT = 0.5
RELIEF_LIMIT = 0.2
_PANEL_PX = 360


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A run with its place in the page.

    Attributes:
        folder: the run directory.
        run: what it holds.
        config: its configuration, None if it was written by another version.
        label: how the page calls it.
        colour: of its curves and dots.
    """

    folder: Path
    run: Run
    config: TrainConfig | None
    label: str
    colour: str

    @property
    def headline(self) -> tuple[str, str, str]:
        return headline(self.run)


class _Panel(NamedTuple):
    name: str
    webp: bytes
    width: int
    height: int
    first_of_run: bool = False


def write_comparison(
    folders: Sequence[Path], out: Path, exhibits: Exhibits | None, *, why_not: str = ""
) -> Path:
    """Write the page.

    Args:
        folders: run directories.
        out: file to write.
        exhibits: the judgement of these runs in their order; None if there is none.
        why_not: why there is none, in a sentence.

    Raises:
        UserError: a directory is not that of a run, or ``out`` is a directory.
    """
    runs = [read_run(folder) for folder in folders]
    labels = _labels([run.name for run in runs])
    entries = [
        _Entry(
            folder=folder,
            run=run,
            config=run_config(str(folder / "weights" / "final.safetensors")),
            label=label,
            colour=COLOURS[number % len(COLOURS)],
        )
        for number, (folder, run, label) in enumerate(zip(folders, runs, labels, strict=True))
    ]
    domains = exhibits.verdict.domains if exhibits else ()
    return write_page(
        out,
        "comparison.html",
        entries=entries,
        notes=_notes(entries, why_not),
        conditions=exhibits.verdict.conditions() if exhibits else "",
        domains=[(d, _trained(entries, d), _extent(d), _judged(d)) for d in domains],
        figure_text=figure_text,
        verdict=_verdict,
        curves=curves(runs[0]) if len(runs) == 1 else _curves(entries),
        settings=_settings(entries),
        worst=[
            (region_label(region), [(_title(shot), shot.key, _panels(entries, shot)) for shot in s])
            for region, s in exhibits.worst.items()
        ]
        if exhibits
        else [],
        error_limit=f"{ERROR_LIMIT:.0%}",
        relief_limit=f"{RELIEF_LIMIT:.0%}",
        clouds=[(_title(shot), shot.key, _cloud(shot)) for shot in exhibits.clouds]
        if exhibits
        else [],
        layers=[(entry, _layer_change(entry)) for entry in entries],
        speed=_speed(entries),
        speed_curves=_speed_curves(entries),
        times=[(entry, bars) for entry in entries if (bars := stage_times(entry.run))],
        cards=[(domain.name, _cards(domain)) for domain in domains],
        validations=[(e, summary(e.run)) for e in entries if e.run.evaluations],
        metrics=definitions(),
    )


def _labels(names: Sequence[str]) -> list[str]:
    """The names, numbered where they repeat."""
    labels: list[str] = []
    for name in names:
        earlier = sum(other == name for other in names[: len(labels)])
        labels.append(f"{name} ({earlier + 1})" if earlier else name)
    return labels


def _notes(entries: Sequence[_Entry], why_not: str) -> list[str]:
    notes = [f"The weights were not judged again: {why_not}"] if why_not else []
    for entry in entries:
        prefix = f"{entry.label}: " if len(entries) > 1 else ""
        notes += [prefix + remark for remark in remarks(entry.run)]
    return notes


# Judgement


def _trained(entries: Sequence[_Entry], domain: Domain) -> list[str]:
    return [
        f"{entry.label} was trained on {count} of these {len(domain.frames)} frames."
        for entry, count in zip(entries, domain.trained, strict=True)
        if count
    ]


def _extent(domain: Domain) -> float:
    """The end of the scale on which AbsRel and its intervals are drawn."""
    found = [
        row["abs_rel"] for table in domain.tables for row in table.values() if "abs_rel" in row
    ]
    return max((max(f.value, *(f.interval or (0.0,))) for f in found), default=1.0)


def _judged(domain: Domain) -> list[tuple[str, Label, str]]:
    """(region, name, metric) of the rows of a table."""
    regions = [r for r in REGION_NAMES if any("abs_rel" in t.get(r, {}) for t in domain.tables)]
    rows = [(region, region_label(region), "abs_rel") for region in regions]
    return [*rows, ("flat", Label("Illusion gap"), "illusion_gap")]


def _verdict(figure: Figure, metric: str) -> str:
    """Of a difference: good or bad only if the interval leaves out 0."""
    if figure.interval is None or figure.interval[0] * figure.interval[1] <= 0:
        return "same"
    return "good" if (figure.value > 0) == (ALL_METRICS[metric].better == "higher") else "bad"


def _cards(domain: Domain) -> list[tuple[Label, int, list[tuple[str, list[Figure | None]]]]]:
    """Per region its name, how many images AbsRel is over, and all metrics of every run."""
    cards = []
    for region in REGION_NAMES:
        rows = [table.get(region, {}) for table in domain.tables]
        metrics = [metric for metric in ALL_METRICS if any(metric in row for row in rows)]
        count = rows[0]["abs_rel"].count if "abs_rel" in rows[0] else 0
        lines = [(metric_label(m), [row.get(m) for row in rows]) for m in metrics]
        if metrics:
            cards.append((region_label(region), count, lines))
    return cards


# Curves


class _Line(NamedTuple):
    """Points (step, value) of a run; ``smooth``: means over the last twentieth of the course."""

    entry: _Entry
    points: Sequence[tuple[float, float]]
    style: str = "-"
    smooth: bool = True


def _curves(entries: Sequence[_Entry]) -> dict[str, bytes]:
    losses = [
        _Line(e, [(r["step"], r["loss"]) for r in e.run.history if not lost(r)]) for e in entries
    ]
    errors = [
        _Line(
            entry,
            [
                (e.step, e.table[region]["abs_rel"])
                for e in entry.run.evaluations
                if "abs_rel" in e.table.get(region, {})
            ],
            style,
            smooth=False,
        )
        for entry in entries
        for region, style in (("flat", "o-"), ("background", "o--"))
    ]
    return _plot({"Training loss, smoothed": losses, "Validation AbsRel": errors})


def _speed_curves(entries: Sequence[_Entry]) -> dict[str, bytes]:
    return _plot(
        {
            title: [
                _Line(
                    entry,
                    [
                        (r["step"], factor * r[key])
                        for r in entry.run.history
                        if isinstance(r[key], int | float)
                    ],
                )
                for entry in entries
            ]
            for title, key, factor in (
                ("Images per second", "images_per_s", 1),
                ("Time waiting for data, in %", "data_wait_share", 100),
            )
        }
    )


def _plot(panels: Mapping[str, Sequence[_Line]]) -> dict[str, bytes]:
    """Media query -> SVG of two plots over the steps, by title; nothing if there are no points."""
    if not any(line.points for lines in panels.values() for line in lines):
        return {}
    return {media: _draw(panels, dark=media == NIGHT) for media in (NIGHT, "")}


def _draw(panels: Mapping[str, Sequence[_Line]], *, dark: bool) -> bytes:
    with matplotlib.rc_context(plot_style(dark)):
        plot = Plot(figsize=(10.2, 3.5), layout="constrained")
        for axes, (title, lines) in zip(plot.subplots(1, 2), panels.items(), strict=True):
            for entry, points, style, smooth in lines:
                steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
                values = _smooth(values) if smooth else values
                axes.plot(steps, values, style, color=entry.colour, label=entry.label, markersize=4)
            axes.set(title=title, xlabel="optimiser step")
            axes.grid(axis="y")
            if "loss" not in title:
                axes.set_ylim(bottom=0)
        if len(lines) > 1:
            plot.axes[0].legend(frameon=False)
        return svg(plot)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over the last twentieth of the course up to each place."""
    window = max(5, len(values) // 20)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


# Configuration


def _settings(entries: Sequence[_Entry]) -> list[tuple[str, list[str]]] | None:
    """The keys that differ between the runs, or of one run from the defaults; None: not known."""
    columns = [_flat(_parsed(entry.run.config)) for entry in entries]
    if not any(columns):
        return None
    if len(entries) == 1:
        columns.insert(0, _flat(json.loads(json.dumps(asdict(TrainConfig())))))
    keys = dict.fromkeys(key for column in reversed(columns) for key in column)
    rows = [(key, [column.get(key, "–") for column in columns]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        parsed = parse_yaml(text.encode())
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys with their values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


# Pictures


def _title(shot: Shot) -> str:
    return f"{shot.dataset} {shot.key}: {shot.plan or 'clean'}"


def _panels(entries: Sequence[_Entry], shot: Shot) -> list[_Panel]:
    """Image, truth and regions; then of every run prediction, error and relief."""
    low, high = depth_limits(shot.truth_m, shot.valid)
    panels = [
        _panel("image", shot.image),
        _panel("truth", colour_depth(shot.truth_m, low_m=low, high_m=high)),
    ]
    if shot.pasted:
        panels.append(_panel("regions", colour_region(shot.image, shot.region)))
    for number, (entry, depth_m) in enumerate(zip(entries, shot.depths_m, strict=True)):
        name = entry.label if len(entries) > 1 else "prediction"
        prediction = colour_depth(depth_m, low_m=low, high_m=high)
        error = colour_error(depth_m, shot.truth_m, shot.valid, ERROR_LIMIT)
        panels.append(_panel(name, prediction, first_of_run=True))
        panels.append(_panel(f"error, AbsRel {shot.errors[number]:.3f}", error))
        if (shot.owner >= 0).any():
            panels.append(_panel("relief", _relief(shot, number)))
    return panels


def _relief(shot: Shot, run: int) -> UInt8[np.ndarray, "h w 3"]:
    """The relief of the flat surfaces over the image, dimmed and grey."""
    relief = shot.relief(run)
    grey = (0.3 * shot.image.mean(axis=2, keepdims=True) + 90).astype(np.uint8)
    return np.where(np.isnan(relief)[..., None], grey, colour_residual(relief, RELIEF_LIMIT))


def _panel(name: str, panel: UInt8[np.ndarray, "h w 3"], *, first_of_run: bool = False) -> _Panel:
    picture = Image.fromarray(panel)
    picture.thumbnail((_PANEL_PX, 2 * _PANEL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85, method=4)
    return _Panel(name, buffer.getvalue(), panel.shape[1], panel.shape[0], first_of_run)


def _cloud(shot: Shot) -> str:
    maps = {str(number): depth_m for number, depth_m in enumerate((shot.truth_m, *shot.depths_m))}
    return cloud_json(shot.image, maps, shot.K_px)


# Layers and speed


def _layer_change(entry: _Entry) -> tuple[bytes | None, str]:
    """A chart of how far each layer moved from the start as PNG, or why there is none."""
    final = entry.folder / "weights" / "final.safetensors"
    start = None if entry.config is None else entry.config.model.checkpoint
    if not start or not final.is_file():
        why = "it has no final weights yet" if start else "it did not start from a checkpoint"
        return None, why
    try:
        return diff_chart(diff(read_weights(start), read_weights(str(final)))), ""
    except UserError as error:
        return None, str(error)


def _speed(entries: Sequence[_Entry]) -> list[tuple[str, list[str]]]:
    """The facts of every run, and what memory it needs."""
    columns = [{f"{n} {note}".strip(): text for n, text, note in facts(e.run)} for e in entries]
    for column, entry in zip(columns, entries, strict=True):
        if entry.config is not None:
            peak = simulate(entry.config).peak
            memory = f"{gib(peak.total)} + CUDA context {gib(CONTEXT_BYTES)}"
            parts = ", ".join(f"{name} {gib(size)}" for name, size in peak.parts.items() if size)
            column |= {"GPU memory, simulated": memory, "of which": parts}
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]
