"""One self-contained HTML page about one run, or several side by side.

``flatdepth.show.run_page`` writes a page about one run from its files alone, whenever it validates.
This one also shows what ``flatdepth.report.samples`` finds by judging the runs' weights again:
intervals, worst pictures, error and relief maps, point clouds. The page loads nothing: a content
security policy lets it run the one script that is in it, by its hash.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from jaxtyping import UInt8
from matplotlib.axes import Axes
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
from flatdepth.show.clouds import SCRIPT, cloud_json
from flatdepth.show.pictures import (
    colour_depth,
    colour_error,
    colour_region,
    depth_limits,
    write_atomic,
)
from flatdepth.show.run_page import (
    METRIC_NAMES,
    REGION_NAMES,
    STYLE,
    Run,
    curves,
    data_uri,
    duration,
    gallery,
    headline,
    lost,
    metric_label,
    read_run,
    region_label,
    section,
    summary,
    typical,
)
from flatdepth.training.memory import CONTEXT_BYTES, gib, simulate
from flatdepth.types import BETTER

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
    if out.is_dir():
        raise UserError(f"{out} is a directory; give the name of an HTML file to write")
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
    write_atomic(out, _page(entries, exhibits, why_not).encode("utf-8", "replace"))
    return out


def _labels(names: Sequence[str]) -> list[str]:
    """The names, numbered where they repeat."""
    labels: list[str] = []
    for name in names:
        earlier = sum(other == name for other in names[: len(labels)])
        labels.append(f"{name} ({earlier + 1})" if earlier else name)
    return labels


def _page(entries: Sequence[_Entry], exhibits: Exhibits | None, why_not: str) -> str:
    judged = exhibits is not None
    parts = (
        section("On held-out scenes", _judgement(entries, exhibits) if exhibits else ""),
        section("Curves", _curves(entries)),
        section(_config_title(entries), _config_diff(entries)),
        section("Worst pictures by region", _worst(entries, exhibits) if exhibits else ""),
        section("Point clouds", _clouds(entries, exhibits) if exhibits else ""),
        section("Which layers moved", _layers(entries)),
        section("Speed and memory", _speed(entries)),
        section("Contact sheets", _sheets(entries)),
        section("All metrics", _all_metrics(entries, exhibits) if exhibits else ""),
        section("Validation during training", _validation(entries)),
        section("What the metrics mean", _definitions()),
    )
    script = SCRIPT if judged else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    title = " · ".join(entry.label for entry in entries)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)} · flatdepth</title>
<style>{STYLE}{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">{_kicker(entries)}</p>
<h1>{_heading(entries)}</h1>
{_headlines(entries)}
{_notes(entries, why_not)}
</header>
{"".join(parts)}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _kicker(entries: Sequence[_Entry]) -> str:
    if len(entries) > 1:
        return f"flatdepth, {len(entries)} training runs side by side"
    state = "finished" if entries[0].run.finished else "not finished"
    return f'flatdepth training run <span class="state">{state}</span>'


def _heading(entries: Sequence[_Entry]) -> str:
    if len(entries) == 1:
        return escape(entries[0].label)
    return ' <span class="versus">vs</span> '.join(map(_name, entries))


def _name(entry: _Entry) -> str:
    return f'<i class="run" style="background: {entry.colour}"></i>{escape(entry.label)}'


def _headlines(entries: Sequence[_Entry]) -> str:
    if len(entries) == 1:
        return f'<p class="headline">{headline(entries[0].run)}</p>'
    items = "".join(f"<dt>{_name(e)}</dt><dd>{headline(e.run)}</dd>" for e in entries)
    return f'<dl class="facts headlines">{items}</dl>'


def _notes(entries: Sequence[_Entry], why_not: str) -> str:
    notes = [f"The weights were not judged again: {why_not}"] if why_not else []
    for entry in entries:
        prefix = f"{entry.label}: " if len(entries) > 1 else ""
        if not entry.run.finished:
            notes.append(f"{prefix}This run is not finished.")
        notes += [prefix + note for note in entry.run.notes]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


# Judgement


def _judgement(entries: Sequence[_Entry], exhibits: Exhibits) -> str:
    verdict = exhibits.verdict
    return (
        "".join(_domain_table(entries, domain) for domain in verdict.domains)
        + f"<p class='small'><b>Protocol:</b> {escape(verdict.conditions())}.</p>"
        + (
            "<p class='small'>AbsRel, lower is better: dots are means over images, lines their "
            "95 % intervals from resampling the scenes. A difference whose interval leaves out 0 "
            "is coloured; all runs saw the same pictures.</p>"
        )
    )


def _domain_table(entries: Sequence[_Entry], domain: Domain) -> str:
    regions = [r for r in REGION_NAMES if any("abs_rel" in t.get(r, {}) for t in domain.tables)]
    rows = [(region, "abs_rel", region_label(region)) for region in regions]
    rows.append(("flat", "illusion_gap", "Illusion gap"))
    figures = [
        [table.get(region, {}).get(metric) for table in domain.tables] for region, metric, _ in rows
    ]
    extent = max(
        (max([f.value, *(f.interval or ())]) for row in figures[:-1] for f in row if f),
        default=1.0,
    )
    heads = "".join(f'<th scope="col">{_name(entry)}</th>' for entry in entries)
    heads += "".join(
        f'<th scope="col">{escape(entry.label)} − {escape(entries[0].label)}</th>'
        for entry in entries[1:]
    )
    body = ""
    for (region, metric, label), row in zip(rows, figures, strict=True):
        cells = "".join(f"<td>{_interval(figure)}</td>" for figure in row)
        for table in domain.differences:
            cells += f"<td>{_difference(table.get(region, {}).get(metric), metric)}</td>"
        plot = "" if metric == "illusion_gap" else _forest(entries, row, extent)
        body += f'<tr><th scope="row">{label}</th><td class="forest">{plot}</td>{cells}</tr>'
    frames, scenes = len(domain.frames), domain.scenes
    trained = "".join(
        f"<li>{escape(entry.label)} was trained on {count} of these {frames} frames.</li>"
        for entry, count in zip(entries, domain.trained, strict=True)
        if count
    )
    return (
        f"<h3>{escape(domain.name)}: {frames} frames of {scenes} scenes</h3>"
        + (f"<ul class='notes'>{trained}</ul>" if trained else "")
        + '<div class="scroll" tabindex="0" role="region" aria-label="Judgement table"><table>'
        '<thead><tr><th scope="col">Region</th>'
        f'<th scope="col" class="forest">0 to {extent:.2g}</th>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _interval(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    text, _, interval = figure_text(figure, False).partition(" ")
    small = f"<small>{escape(interval)}</small>" if interval else ""
    return f'<data value="{figure.value!r}">{text}</data>{small}'


def _difference(figure: Figure | None, metric: str) -> str:
    if figure is None:
        return "–"
    verdict = "same"
    if figure.interval is not None and figure.interval[0] * figure.interval[1] > 0:
        verdict = "good" if (figure.value > 0) == (BETTER[metric] == "higher") else "bad"
    text, _, interval = figure_text(figure, True).replace("-", "−").partition(" ")
    small = f"<small>{escape(interval)}</small>" if interval else ""
    return f'<span class="{verdict}">{text}{small}</span>'


def _forest(entries: Sequence[_Entry], row: Sequence[Figure | None], extent: float) -> str:
    """Means and intervals as dots and lines, a lane per run, from 0 to ``extent``."""
    lanes = ""
    for entry, figure in zip(entries, row, strict=True):
        if figure is None:
            lanes += '<div class="lane"></div>'
            continue
        low, high = figure.interval or (figure.value, figure.value)
        x, left, right = (100 * value / extent for value in (figure.value, low, high))
        lanes += (
            f'<div class="lane" style="--run: {entry.colour}">'
            f'<i style="left: {left:.2f}%; width: {right - left:.2f}%"></i>'
            f'<b style="left: {x:.2f}%"></b></div>'
        )
    return lanes


def _all_metrics(entries: Sequence[_Entry], exhibits: Exhibits) -> str:
    blocks = ""
    heads = "".join(f'<th scope="col">{_name(entry)}</th>' for entry in entries)
    for domain in exhibits.verdict.domains:
        cards = ""
        for region in REGION_NAMES:
            rows = [table.get(region, {}) for table in domain.tables]
            metrics = [metric for metric in METRIC_NAMES if any(metric in row for row in rows)]
            if not metrics:
                continue
            body = "".join(
                f'<tr><th scope="row">{metric_label(metric)}</th>'
                + "".join(f"<td>{_interval(row.get(metric))}</td>" for row in rows)
                + "</tr>"
                for metric in metrics
            )
            counted = rows[0].get("abs_rel")
            count = f"{counted.count} images; " if counted else ""
            cards += (
                f'<div class="card"><h3>{region_label(region)}</h3>'
                f"<p class='small'>{count}{REGION_NAMES[region][1]}</p>"
                '<div class="scroll" tabindex="0" role="region" aria-label="Metric table"><table>'
                f'<thead><tr><th scope="col">Metric</th>{heads}</tr></thead>'
                f"<tbody>{body}</tbody></table></div></div>"
            )
        title = f"<h3>{escape(domain.name)}</h3>" if len(exhibits.verdict.domains) > 1 else ""
        blocks += f'{title}<div class="cards" style="--columns: {len(entries) + 1}">{cards}</div>'
    title = "Every metric in every region, with intervals"
    return f"<details><summary>{title}</summary>{blocks}</details>"


def _definitions() -> str:
    items = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(definition)}; {BETTER[name]} is better</dd>"
        for name, (label, definition) in METRIC_NAMES.items()
    )
    return (
        "<p class='small'>p is the predicted and t the true depth in metres, d = ln p − ln t. A "
        "metric is taken over the pixels of a region in one image; figures are means over images."
        f"</p><dl class='facts'>{items}</dl>"
    )


# Curves


def _curves(entries: Sequence[_Entry]) -> str:
    if len(entries) == 1:
        return curves(entries[0].run)
    if not any(entry.run.history or entry.run.evaluations for entry in entries):
        return ""
    return _themed(
        lambda dark: _overlay(entries, dark=dark),
        "Training loss and validation AbsRel of every run",
        "Training loss, smoothed, and AbsRel of the validations during training: mirrors and art "
        "(solid), background (dashed).",
    )


def _themed(draw: Callable[[bool], bytes], alt: str, caption: str) -> str:
    light, dark = (data_uri("image/svg+xml", draw(night)) for night in (False, True))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="curves" src="{light}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _overlay(entries: Sequence[_Entry], *, dark: bool) -> bytes:
    def draw(training: Axes, validation: Axes) -> None:
        for entry in entries:
            losses = [(r["step"], r["loss"]) for r in entry.run.history if not lost(r)]
            _course(training, entry, losses)
            for region, style in (("flat", "o-"), ("background", "o--")):
                course = [
                    (e.step, e.table[region]["abs_rel"])
                    for e in entry.run.evaluations
                    if "abs_rel" in e.table.get(region, {})
                ]
                if course:
                    validation.plot(
                        *zip(*course, strict=True), style, color=entry.colour, markersize=4
                    )
        training.set_title("Training loss, smoothed")
        validation.set_title("Validation AbsRel")
        validation.set_ylim(bottom=0)
        if training.lines:
            training.legend(frameon=False)

    return _two_panels(draw, dark=dark)


def _course(axes: Axes, entry: _Entry, points: Sequence[tuple[float, float]]) -> None:
    """A smoothed line of (step, value)."""
    if points:
        steps, values = np.array(points, dtype=np.float64).T
        axes.plot(steps, _smooth(values), color=entry.colour, label=entry.label)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over the last twentieth of the course up to each place."""
    window = max(5, len(values) // 20)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _two_panels(draw: Callable[[Axes, Axes], None], *, dark: bool) -> bytes:
    """Two plots over the steps, side by side, as SVG; the same drawing gives the same bytes."""
    ink, muted, grid = (
        ("#e6e8eb", "#98a1ad", "#2d333b") if dark else ("#1f2328", "#667080", "#e4e7eb")
    )
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "flatdepth",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": muted,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": grid,
        "text.color": ink,
        "axes.titlecolor": ink,
        "axes.labelcolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
    }
    with matplotlib.rc_context(style):
        plot = Plot(figsize=(10.2, 3.5), layout="constrained")
        left, right = plot.subplots(1, 2)
        draw(left, right)
        for axes in (left, right):
            axes.set_xlabel("optimiser step")
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        plot.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


# Configuration


def _config_title(entries: Sequence[_Entry]) -> str:
    return "What was set" if len(entries) == 1 else "What differs"


def _config_diff(entries: Sequence[_Entry]) -> str:
    """The keys that differ between the runs, or of one run from the defaults."""
    flats = [_flat(_parsed(entry.run.config)) for entry in entries]
    columns, heads = flats, [_name(entry) for entry in entries]
    if len(entries) == 1:
        defaults = _flat(json.loads(json.dumps(asdict(TrainConfig()))))
        columns, heads = [defaults, flats[0]], ["default", "this run"]
    keys = dict.fromkeys(key for column in reversed(columns) for key in column)
    differing = [key for key in keys if len({column.get(key) for column in columns}) > 1]
    if not any(flats):
        return ""
    note = "All keys are equal." if not differing else ""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f"<td class='value'>{escape(column.get(key, '–'))}</td>" for column in columns)
        + "</tr>"
        for key in differing
    )
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Configuration"><table>'
        f'<thead><tr><th scope="col">Key</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    full = "".join(
        f"<details class='inner'><summary>Resolved config of {escape(entry.label)}</summary>"
        f'<pre class="scroll" tabindex="0">{escape(entry.run.config)}</pre></details>'
        for entry in entries
        if entry.run.config
    )
    return (f"<p>{note}</p>" if note else table) + full


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
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


def _worst(entries: Sequence[_Entry], exhibits: Exhibits) -> str:
    blocks = ""
    for region in exhibits.worst:
        rows = "".join(_shot(entries, shot) for shot in exhibits.worst[region])
        blocks += f"<h3>{region_label(region)}</h3>{rows}"
    ramp = (
        "<p class='small'>Depth: red is near, violet far, the same colours for truth and "
        f"predictions. Error: |p − t| / t from 0 (black) to {ERROR_LIMIT:.0%} (pale). Relief: how "
        "far the predicted surface of each mirror and picture is from the plane that fits it best, "
        f"from 0 (black) to {RELIEF_LIMIT:.0%} (pale). Grey is not counted.</p>"
    )
    return ramp + blocks


def _shot(entries: Sequence[_Entry], shot: Shot) -> str:
    """Image, truth and regions on the left; on the right a row per run."""
    low, high = depth_limits(shot.truth_m, shot.valid)
    figures = _panel(shot, "image", shot.image)
    figures += _panel(shot, "truth", colour_depth(shot.truth_m, low_m=low, high_m=high))
    if shot.pasted:
        figures += _panel(shot, "regions", colour_region(shot.image, shot.region))
    for number, (entry, depth_m) in enumerate(zip(entries, shot.depths_m, strict=True)):
        name = entry.label if len(entries) > 1 else "prediction"
        prediction = colour_depth(depth_m, low_m=low, high_m=high)
        error = colour_error(depth_m, shot.truth_m, shot.valid, ERROR_LIMIT)
        figures += _panel(shot, name, prediction, first_of_run=True)
        figures += _panel(shot, f"error, AbsRel {shot.errors[number]:.3f}", error)
        if (shot.owner >= 0).any():
            figures += _panel(shot, "relief", _relief(shot, number))
    return f'<p class="small">{escape(_shot_title(shot))}</p><div class="shot">{figures}</div>'


def _relief(shot: Shot, run: int) -> UInt8[np.ndarray, "h w 3"]:
    """The relief of the flat surfaces over the image, dimmed and grey."""
    relief = shot.relief(run)
    grey = (0.3 * shot.image.mean(axis=2, keepdims=True) + 90).astype(np.uint8)
    return np.where(np.isnan(relief)[..., None], grey, colour_residual(relief, RELIEF_LIMIT))


def _shot_title(shot: Shot) -> str:
    return f"{shot.dataset} {shot.key}: {shot.plan or 'clean'}"


def _panel(
    shot: Shot, name: str, panel: UInt8[np.ndarray, "h w 3"], *, first_of_run: bool = False
) -> str:
    height, width = panel.shape[:2]
    return (
        f'<figure{" class=first" if first_of_run else ""}><img src="{_webp(panel)}" '
        f'width="{width}" height="{height}" alt="{escape(name)} of {escape(shot.key)}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )


def _webp(panel: UInt8[np.ndarray, "h w 3"]) -> str:
    picture = Image.fromarray(panel)
    picture.thumbnail((_PANEL_PX, 2 * _PANEL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85, method=4)
    return data_uri("image/webp", buffer.getvalue())


def _clouds(entries: Sequence[_Entry], exhibits: Exhibits) -> str:
    return (
        "<p class='small'>Drag to turn; + and −, or the wheel after a click, to zoom; arrow keys "
        "turn too. Seen from above, a mirror that is taken for a room stands out behind its wall."
        "</p>" + "".join(_cloud(entries, shot) for shot in exhibits.clouds)
    )


def _cloud(entries: Sequence[_Entry], shot: Shot) -> str:
    names = ["truth", *(entry.label for entry in entries)]
    maps = {str(number): depth_m for number, depth_m in enumerate((shot.truth_m, *shot.depths_m))}
    views = "".join(
        f'<figure><canvas data-map="{number}" tabindex="0" role="img" '
        f'aria-label="Point cloud of {escape(shot.key)}: {escape(name)}"></canvas>'
        f"<figcaption>{escape(name if number == 0 or len(entries) > 1 else 'prediction')}"
        "</figcaption></figure>"
        for number, name in enumerate(names)
    )
    buttons = "".join(
        f'<button type="button" data-view="{view}">{text}</button>'
        for view, text in (("front", "Front"), ("side", "Side"), ("above", "From above"))
    )
    return (
        f'<div class="cloud"><p class="small">{escape(_shot_title(shot))} {buttons}</p>'
        f'<div class="views">{views}</div>'
        f'<script type="application/json">{cloud_json(shot.image, maps, shot.K_px)}</script></div>'
    )


def _sheets(entries: Sequence[_Entry]) -> str:
    blocks = ""
    for entry in entries:
        if entry.run.pictures:
            title = f"<h3>{_name(entry)}</h3>" if len(entries) > 1 else ""
            blocks += title + gallery(entry.run)
    return blocks


# Layers, speed, validations


def _layers(entries: Sequence[_Entry]) -> str:
    blocks = ""
    for entry in entries:
        title = f"<h3>{_name(entry)}</h3>" if len(entries) > 1 else ""
        blocks += f"<div>{title}{_layer_change(entry)}</div>"
    return f'<div class="charts">{blocks}</div>'


def _layer_change(entry: _Entry) -> str:
    final = entry.folder / "weights" / "final.safetensors"
    start = None if entry.config is None else entry.config.model.checkpoint
    if not start or not final.is_file():
        why = "it has no final weights yet" if start else "it did not start from a checkpoint"
        return f"<p class='small'>Nothing to compare: {why}.</p>"
    try:
        chart = diff_chart(diff(read_weights(start), read_weights(str(final))))
    except UserError as error:
        return f"<p class='small'>Nothing to compare: {escape(str(error))}.</p>"
    return (
        f'<figure class="chart"><img src="{data_uri("image/png", chart)}" '
        f'alt="Relative change of every layer of {escape(entry.label)}"></figure>'
    )


def _speed(entries: Sequence[_Entry]) -> str:
    columns = [_facts(entry) for entry in entries]
    names = dict.fromkeys(name for facts in columns for name in facts)
    heads = "".join(f'<th scope="col">{_name(entry)}</th>' for entry in entries)
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f"<td class='value'>{escape(facts.get(name, '–'))}</td>" for facts in columns)
        + "</tr>"
        for name in names
    )
    plot = ""
    if any(entry.run.history for entry in entries):
        plot = _themed(
            lambda dark: _speed_plot(entries, dark=dark),
            "Images per second and share of time waiting for data",
            "Over the steps of the run, smoothed.",
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Speed and memory"><table>'
        f'<thead><tr><th scope="col"></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        + plot
    )


def _facts(entry: _Entry) -> dict[str, str]:
    run = entry.run
    facts = {
        "Duration": duration(run.seconds) if math.isfinite(run.seconds) else "",
        "Steps": f"{run.history[-1]['step']:,}" if run.history else "",
        "Skipped steps": f"{sum(map(lost, run.history)):,}" if run.history else "",
        "Images per second (median)": typical(run, "images_per_s", "{:,.1f}"),
        "Waiting for data (median)": typical(run, "data_wait_share", "{:.1%}"),
        "Device": run.device,
    }
    if entry.config is not None:
        peak = simulate(entry.config).peak
        parts = ", ".join(f"{name} {gib(size)}" for name, size in peak.parts.items() if size)
        facts["GPU memory, simulated"] = f"{gib(peak.total)} + CUDA context {gib(CONTEXT_BYTES)}"
        facts["of which"] = parts
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return {name: text for name, text in facts.items() if text}


def _speed_plot(entries: Sequence[_Entry], *, dark: bool) -> bytes:
    def draw(speed: Axes, wait: Axes) -> None:
        for axes, key, title in (
            (speed, "images_per_s", "Images per second"),
            (wait, "data_wait_share", "Share of time waiting for data"),
        ):
            for entry in entries:
                known = [r for r in entry.run.history if isinstance(r[key], int | float)]
                _course(axes, entry, [(r["step"], r[key]) for r in known])
            axes.set_title(title)
            axes.set_ylim(bottom=0)
        wait.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        if len(entries) > 1 and speed.lines:
            speed.legend(frameon=False)

    return _two_panels(draw, dark=dark)


def _validation(entries: Sequence[_Entry]) -> str:
    blocks = ""
    for entry in entries:
        table = summary(entry.run)
        if table:
            title = f"<h3>{_name(entry)}</h3>" if len(entries) > 1 else ""
            blocks += title + table
    return blocks


_STYLE = """
.run { display: inline-block; width: 0.62em; height: 0.62em; border-radius: 50%;
  margin-right: 0.4em; }
.versus { color: var(--muted); font-weight: 400; font-size: 0.7em; margin: 0 0.15em; }
.headlines { margin-top: 0.6rem; font-size: 1.02rem; }
.headlines dt { color: var(--ink); font-weight: 600; }
h3 { margin: 1.6rem 0 0.6rem; }
section > h3:first-of-type { margin-top: 0; }
.card h3 { margin: 0; }
td small { display: block; color: var(--muted); font-size: 0.78rem; }
th.forest { text-align: left; font-weight: 400; color: var(--muted); }
td.forest { width: 34%; min-width: 11rem; vertical-align: middle; }
.lane { position: relative; height: 0.8rem; border-left: 1px solid var(--line); }
.lane i, .lane b { position: absolute; top: 50%; background: var(--run); border-radius: 1rem; }
.lane i { height: 3px; margin-top: -1.5px; opacity: 0.5; }
.lane b { width: 9px; height: 9px; margin: -4.5px; }
td.value { text-align: left; white-space: normal; overflow-wrap: anywhere; max-width: 34rem;
  vertical-align: top; }
tr:has(td.value) > th { vertical-align: top; }
table:has(td.value) thead th { text-align: left; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { font-size: 0.92em; }
.shot, .views { display: grid; gap: 0.6rem; margin: 0.3rem 0 1.5rem; }
.shot { grid-template-columns: repeat(6, 1fr); }
.views { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.shot figure, .views figure { margin: 0; min-width: 0; }
.shot img, canvas { display: block; width: 100%; border-radius: 0.35rem; }
.shot figcaption, .views figcaption { margin-top: 0.2rem; font-size: 0.8rem; }
.first { grid-column-start: 4; }
@media (max-width: 56rem) {
  .shot { grid-template-columns: repeat(3, 1fr); }
  .first { grid-column-start: 1; }
}
canvas { background: #10131a; cursor: grab; touch-action: none; }
canvas:active { cursor: grabbing; }
canvas:focus-visible, button:focus-visible { outline: 2px solid var(--muted); outline-offset: 2px; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 1rem; padding: 0.1rem 0.8rem; margin-left: 0.4rem; cursor: pointer; }
.charts { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.charts h3 { margin-top: 0; }
.chart img { max-width: min(100%, 46rem); border-radius: 0.5rem; }
.scroll + figure { margin-top: 1.4rem; }
section details { margin-top: 0.8rem; padding-top: 0; border: 0; }
section summary { font-size: 1rem; font-weight: 500; color: var(--muted); }
section details[open] summary { margin-bottom: 0.8rem; }
"""
