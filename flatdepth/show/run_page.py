"""One self-contained HTML page that tells how a training run went.

Everything is computed from the run directory, and the page holds nothing but what was written
there: no script, no link, no time stamp, so the same run gives the same bytes. A content security
policy in the page forbids the browser to load anything that is not inside it.

A run directory holds ``metrics.json``, ``config.yaml``, ``history.jsonl`` and
``pictures/*.png``; the page says which of them are still missing.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from flatdepth.errors import UserError
from flatdepth.show.pictures import FLAT_COLOUR, REGION_COLOURS, loss_curve, write_atomic
from flatdepth.types import BETTER, METRICS_FORMAT

_HISTORY = ("step", "loss", "lr", "grad_norm", "images_per_s", "data_wait_share")
_WEBP_LIMIT = (16383, 16383)
_RUN_FILES = ("metrics.json", "config.yaml", "history.jsonl")


# name -> (label, definition); which way is better stands in flatdepth.types.BETTER.
METRIC_NAMES: Mapping[str, tuple[str, str]] = {
    "abs_rel": ("AbsRel", "mean of |p − t| / t"),
    "sq_rel": ("SqRel", "mean of (p − t)² / t, in metres"),
    "rmse": ("RMSE", "root of the mean of (p − t)², in metres"),
    "rmse_log": ("RMSE log", "root of the mean of d²"),
    "log10": ("log10", "mean of |log₁₀ p − log₁₀ t|"),
    "silog": ("SILog", "100 × standard deviation of d: the error that no scale can mend"),
    "mae": ("MAE", "mean of |p − t|, in metres"),
    "delta1": ("δ < 1.25", "share of pixels with max(p / t, t / p) < 1.25"),
    "delta2": ("δ < 1.25²", "share of pixels with max(p / t, t / p) < 1.25²"),
    "delta3": ("δ < 1.25³", "share of pixels with max(p / t, t / p) < 1.25³"),
    "delta105": ("δ < 1.05", "share of pixels with max(p / t, t / p) < 1.05"),
    "ssim": ("SSIM", "structural similarity of the depth maps, 11 × 11 windows; 1 is equal"),
    "flatness_residual": (
        "Relief",
        "RMS distance of 1/p from its best plane, over the mean of 1/p; 0 is flat",
    ),
    "plane_normal_angle_deg": (
        "Plane angle",
        "angle between the planes fitted to prediction and truth, in degrees",
    ),
    "illusion_gap": ("Illusion gap", "AbsRel on mirrors and art over AbsRel on the background"),
}
_COUNTS = ("images", "pixels")

REGION_NAMES: Mapping[str, tuple[str, str]] = {
    "flat": ("Mirrors and art", "all flat pastes; the truth is their surface"),
    "mirror": ("Mirrors", "the truth is the glass, not what it shows"),
    "art": ("Art", "paintings, posters and screens; the truth is their surface"),
    "frame": ("Frames", "the frames around the pastes"),
    "decoy": ("Decoys", "framed openings with real depth behind them; flat would be wrong"),
    "background": ("Background", "everything around the pastes"),
    "clean": ("Clean images", "images without any paste"),
}
# The colours of the curves and of the contact sheets.
_DOTS: Mapping[str, str] = {
    "flat": f"background: rgb{FLAT_COLOUR}",
    "background": "background: var(--muted)",
    "clean": "border-color: var(--muted)",
} | {member.name.lower(): f"background: rgb{colour}" for member, colour in REGION_COLOURS.items()}


@dataclass(frozen=True, slots=True)
class Evaluation:
    label: str
    step: int
    table: Mapping[str, Mapping[str, float]]
    illusion_gap: float


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds; ``notes`` are sentences about what it lacks."""

    name: str
    finished: bool = False
    protocol: str = ""
    seconds: float = math.nan
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()
    history: Sequence[Mapping[str, Any]] = ()
    config: str = ""
    pictures: Sequence[tuple[str, bytes, tuple[int, int]]] = ()
    notes: Sequence[str] = ()


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the run directory ``run`` and return its path.

    Args:
        run: a directory written by training, finished or not.
        out: where to write; ``<run>/report.html`` by default.

    Raises:
        UserError: if ``run`` is not a run directory, its ``metrics.json`` cannot be understood,
            or ``out`` is a directory.
    """
    target = out or run / "report.html"
    if target.is_dir():
        raise UserError(f"{target} is a directory; give the name of an HTML file to write")
    write_atomic(target, _page(read_run(run)).encode("utf-8", "replace"))
    return target


def read_run(run: Path) -> Run:
    if not any((run / name).is_file() for name in _RUN_FILES):
        files = ", ".join(_RUN_FILES)
        found = f"holds none of {files}" if run.is_dir() else "is not a directory"
        raise UserError(f"{run} {found}; give the directory of a training run, such as runs/NAME")
    notes: list[str] = []
    history = _read_history(run / "history.jsonl", notes)
    pictures = _read_pictures(run / "pictures", notes)
    config = run / "config.yaml"
    if not config.is_file():
        notes.append("There is no config.yaml.")
    return _read_metrics(
        run,
        notes,
        history=history,
        pictures=pictures,
        config=config.read_text("utf-8", "replace") if config.is_file() else "",
    )


def _read_metrics(run: Path, notes: list[str], **parts: Any) -> Run:
    path = run / "metrics.json"
    if not path.is_file():
        return Run(run.resolve().name, notes=["There is no metrics.json yet.", *notes], **parts)
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != METRICS_FORMAT:
            raise UserError(
                f"{path} has format {record['format']!r}, this version reads {METRICS_FORMAT}; "
                "use the flatdepth version that wrote it"
            )
        return Run(
            name=str(record["name"]),
            finished=bool(record["finished"]),
            protocol=str(record["protocol"]),
            seconds=_number(record["seconds"]),
            device=str(record["device"]),
            versions={str(name): str(text) for name, text in record["versions"].items()},
            evaluations=[_evaluation(entry) for entry in record["evaluations"]],
            notes=notes,
            **parts,
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not a metrics file of a training run ({reason}); restore it or train again"
        ) from error


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        label=str(entry["label"]),
        step=int(entry["step"]),
        table={
            str(region): {str(name): _number(value) for name, value in row.items()}
            for region, row in entry["table"].items()
        },
        illusion_gap=_number(entry["illusion_gap"]),
    )


def _read_history(path: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    """The records by step; of a step logged again after a resume the last record counts."""
    if not path.is_file():
        notes.append("There is no history.jsonl, hence no training curve.")
        return []
    records: dict[int, Mapping[str, Any]] = {}
    unreadable = 0
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (KeyError, TypeError, ValueError, OverflowError):
            unreadable += 1
        else:
            records[step] = {name: record.get(name) for name in _HISTORY}
    if unreadable:
        lines = "line" if unreadable == 1 else "lines"
        notes.append(f"{unreadable} unreadable {lines} of history.jsonl left out.")
    if not records:
        notes.append("history.jsonl has no record yet, hence no training curve.")
    return [records[step] for step in sorted(records)]


def _read_pictures(folder: Path, notes: list[str]) -> list[tuple[str, bytes, tuple[int, int]]]:
    """(name, WebP bytes, (width, height)) of each sheet; WebP is a fifth of the PNG's size."""
    pictures = []
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            notes.append(f"pictures/{path.name} is not a readable image.")
            continue
        picture.thumbnail(_WEBP_LIMIT)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=88, method=4)
        pictures.append((path.stem, buffer.getvalue(), picture.size))
    if not pictures:
        notes.append("There are no pictures yet.")
    return pictures


def _number(value: object) -> float:
    """A JSON number, NaN for null; anything else is an error."""
    if value is None:
        return math.nan
    if isinstance(value, (int, float)):
        return float(value)
    raise ValueError(f"{value!r} is not a number")


def _page(run: Run) -> str:
    sections = (
        section("AbsRel by region", summary(run)),
        section("Curves", curves(run)),
        section("Pictures", gallery(run)),
        section("All metrics by region", _metric_cards(run)),
        section("What the metrics mean", definitions(run)),
        section("The run", _facts(run)),
    )
    state = "finished" if run.finished else "not finished"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(run.name)} · flatdepth</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">flatdepth training run <span class="state">{state}</span></p>
<h1>{escape(run.name)}</h1>
<p class="headline">{headline(run)}</p>
{_tiles(run)}
{notes_html(run)}
</header>
{"".join(sections)}
{_config(run)}
</main>
</body>
</html>
"""


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def notes_html(run: Run) -> str:
    notes = list(run.notes)
    if not run.finished:
        last = f" Its last logged step is {run.history[-1]['step']:,}." if run.history else ""
        notes.insert(0, f"This run is not finished.{last}")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _abs_rel(evaluation: Evaluation, region: str) -> float:
    return evaluation.table.get(region, {}).get("abs_rel", math.nan)


def headline(run: Run) -> str:
    """The result in one sentence, as HTML."""
    if not run.evaluations:
        return "No evaluation has been written yet."
    first, last = run.evaluations[0], run.evaluations[-1]
    start, end = (_abs_rel(evaluation, "flat") for evaluation in (first, last))
    others = "; ".join(
        f"{words} {_course(first, last, region)}"
        for region, words in (("background", "background"), ("clean", "clean images"))
        if math.isfinite(_abs_rel(last, region))
    )
    if not math.isfinite(end):
        lead = "No mirror or art pixel was evaluated"
    elif first is last or not math.isfinite(start):
        lead = f"AbsRel on mirrors and art is {_tidy(end)} in the evaluation “{escape(last.label)}”"
    elif end == start:
        lead = f"AbsRel on mirrors and art stayed at {_tidy(end)}"
    else:
        verb = "fell" if end < start else "rose"
        lead = (
            f"AbsRel on mirrors and art <strong>{verb} from {_tidy(start)} to {_tidy(end)}</strong>"
            f" ({_percent(start, end)})"
        )
    return f"{lead}; {others}." if others else f"{lead}."


def _course(first: Evaluation, last: Evaluation, region: str) -> str:
    """``0.118 → 0.111 (−6 %)``, or the last value alone if there is nothing before it."""
    start, end = _abs_rel(first, region), _abs_rel(last, region)
    if first is last or not math.isfinite(start):
        return _tidy(end)
    return f"{_tidy(start)} → {_tidy(end)} ({_percent(start, end)})"


def _tiles(run: Run) -> str:
    if len(run.evaluations) < 2:
        return ""
    first, last = run.evaluations[0], run.evaluations[-1]
    tiles = []
    for region in ("flat", "background", "clean"):
        start, end = _abs_rel(first, region), _abs_rel(last, region)
        if math.isfinite(start) and math.isfinite(end):
            tiles.append(
                f'<div class="tile"><span>{REGION_NAMES[region][0]}</span>'
                f"<p><s>{_tidy(start)}</s> {_tidy(end)}</p>"
                f"{_change(start, end, higher_is_better=False)}</div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def summary(run: Run) -> str:
    if not run.evaluations:
        return ""
    rows = [
        (region_label(region), _values(run, region, "abs_rel"), False) for region in _regions(run)
    ]
    gap = [evaluation.illusion_gap for evaluation in run.evaluations]
    rows.append(("Illusion gap", gap, False))
    return _table("Region", rows, run.evaluations) + _protocol(run) + _SUMMARY_NOTE


def _metric_cards(run: Run) -> str:
    cards = []
    for region in _regions(run):
        rows: list[tuple[str, Sequence[float], bool | None]] = []
        for name in _metric_names(run, region):
            higher = BETTER[name] == "higher" if name in BETTER else None
            rows.append((metric_label(name), _values(run, region, name), higher))
        cards.append(
            f'<div class="card"><h3>{region_label(region)}</h3>'
            f"<p class='small'>{REGION_NAMES[region][1] if region in REGION_NAMES else ''}</p>"
            f"{_table('Metric', rows, run.evaluations)}</div>"
        )
    columns = len(run.evaluations)
    return f'<div class="cards" style="--columns: {columns}">{"".join(cards)}</div>' * bool(cards)


def _regions(run: Run) -> list[str]:
    """The regions that were evaluated: known ones in their order, then any others."""
    found = dict.fromkeys(region for evaluation in run.evaluations for region in evaluation.table)
    others = [name for name in found if name not in REGION_NAMES]
    return [*(name for name in REGION_NAMES if name in found), *others]


def _metric_names(run: Run, region: str) -> list[str]:
    """The metrics of a region: known ones in their order, then others, then the counts."""
    found = dict.fromkeys(
        name for evaluation in run.evaluations for name in evaluation.table.get(region, {})
    )
    known = [*METRIC_NAMES, *_COUNTS]
    return [
        *(name for name in METRIC_NAMES if name in found),
        *(name for name in found if name not in known),
        *(name for name in _COUNTS if name in found),
    ]


def _values(run: Run, region: str, metric: str) -> list[float]:
    return [
        evaluation.table.get(region, {}).get(metric, math.nan) for evaluation in run.evaluations
    ]


def region_label(region: str) -> str:
    label = escape(REGION_NAMES[region][0] if region in REGION_NAMES else region)
    style = _DOTS.get(region)
    return f'<i class="dot" style="{style}"></i>{label}' if style else label


def metric_label(name: str) -> str:
    return escape(METRIC_NAMES[name][0] if name in METRIC_NAMES else name)


def _table(
    corner: str,
    rows: Sequence[tuple[str, Sequence[float], bool | None]],
    evaluations: Sequence[Evaluation],
) -> str:
    """One column per evaluation, and the change from the first to the last.

    Args:
        corner: the heading of the first column.
        rows: (label as HTML, value per evaluation, whether higher is better; None: no verdict).
        evaluations: the columns.
    """
    compare = len(evaluations) > 1
    heads = "".join(
        f'<th scope="col">{escape(evaluation.label)}<small>step {evaluation.step:,}</small></th>'
        for evaluation in evaluations
    )
    change = '<th scope="col">change</th>' if compare else ""
    body = "".join(_row(label, values, better, compare) for label, values, better in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{corner} table"><table>'
        f'<thead><tr><th scope="col">{corner}</th>{heads}{change}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(label: str, values: Sequence[float], better: bool | None, compare: bool) -> str:
    finite = [value for value in values if math.isfinite(value)]
    best = math.nan
    if better is not None and len(set(finite)) > 1:
        best = max(finite) if better else min(finite)
    decimals = _decimals(finite)
    cells = "".join(_cell(value, decimals, value == best) for value in values)
    if compare:
        verdict = "" if better is None else _change(values[0], values[-1], higher_is_better=better)
        cells += f"<td>{verdict}</td>"
    return f'<tr><th scope="row">{label}</th>{cells}</tr>'


def _cell(value: float, decimals: int, best: bool) -> str:
    """A cell whose ``data`` element carries the exact number."""
    if not math.isfinite(value):
        return '<td class="none">–</td>'
    exact = repr(int(value)) if value.is_integer() else repr(value)
    number = f'<data value="{exact}">{_shown(value, decimals)}</data>'
    return f'<td class="best"><b>{number}</b></td>' if best else f"<td>{number}</td>"


def _shown(value: float, decimals: int) -> str:
    """``0.398``, ``1,234``, ``346 k``, ``2.56 M``: counts of pixels must not widen the table."""
    if value >= 1e6:
        return f"{value / 1e6:,.2f} M"
    return f"{value / 1e3:.0f} k" if value >= 1e5 else f"{value:,.{decimals}f}"


def _decimals(values: Sequence[float]) -> int:
    """Three significant digits of the largest value, at least 3 decimals below 10, none if whole.

    One number for a whole row keeps its decimal points in line.
    """
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0 or (largest > 1 and all(value.is_integer() for value in values)):
        return 0
    digits = 2 - math.floor(math.log10(largest))
    return min(6, max(3 if largest < 10 else 1, digits))


def _tidy(value: float) -> str:
    return f"{value:.{_decimals([value])}f}"


def _percent(start: float, end: float) -> str:
    """The relative change with a true minus sign and a narrow space: ``−71 %``."""
    if start == 0:
        return "from 0"
    share = 100 * (end - start) / abs(start)
    text = f"{abs(share):.1f}" if abs(share) < 9.95 else f"{abs(share):.0f}"
    sign = "±" if float(text) == 0 else "−" if share < 0 else "+"
    return f"{sign}{text}\u202f%"


def _change(start: float, end: float, *, higher_is_better: bool) -> str:
    if not (math.isfinite(start) and math.isfinite(end)):
        return ""
    verdict = "same" if start == end else "good" if (end > start) == higher_is_better else "bad"
    return f'<span class="{verdict}">{_percent(start, end)}</span>'


def definitions(run: Run) -> str:
    used = {name for region in _regions(run) for name in _metric_names(run, region)}
    items = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(definition)}; {BETTER[name]} is better</dd>"
        for name, (label, definition) in METRIC_NAMES.items()
        if name in used
    )
    if not items:
        return ""
    return (
        "<p class='small'>p is the predicted and t the true depth in metres, d = ln p − ln t. Each "
        "metric is taken over the valid pixels of a region in one image; the tables show its mean "
        "over the images, each counting once.</p>"
        f"<dl class='facts'>{items}</dl>{_protocol(run)}"
    )


def _protocol(run: Run) -> str:
    return f"<p class='small'><b>Protocol:</b> {escape(run.protocol)}</p>"


def curves(run: Run) -> str:
    if not run.history:
        return ""
    evaluations = [{"step": entry.step, "table": entry.table} for entry in run.evaluations]

    def source(*, dark: bool, narrow: bool) -> str:
        svg = loss_curve(run.history, evaluations, dark=dark, narrow=narrow)
        return data_uri("image/svg+xml", svg)

    phone, night = "(max-width: 40rem)", "(prefers-color-scheme: dark)"
    return (
        "<figure><picture>"
        f'<source media="{phone} and {night}" srcset="{source(dark=True, narrow=True)}">'
        f'<source media="{phone}" srcset="{source(dark=False, narrow=True)}">'
        f'<source media="{night}" srcset="{source(dark=True, narrow=False)}">'
        f'<img class="curves" src="{source(dark=False, narrow=False)}" '
        'alt="Training loss and learning rate; validation AbsRel by region">'
        "</picture><figcaption>Training: the loss of every logged step (thin) and smoothed "
        "(thick); vertical lines mark the evaluations. Validation: one marker per evaluation."
        "</figcaption></figure>"
    )


def gallery(run: Run) -> str:
    return "".join(
        f'<figure><div class="scroll sheet" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<img src="{data_uri("image/webp", data)}" width="{width}" height="{height}" '
        f'alt="Contact sheet {escape(name)}"></div>'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name, data, (width, height) in run.pictures
    )


def _facts(run: Run) -> str:
    facts = {
        "Duration": duration(run.seconds) if math.isfinite(run.seconds) else "",
        "Steps": f"{run.history[-1]['step']:,}" if run.history else "",
        "Skipped steps": f"{sum(lost(record) for record in run.history):,}" if run.history else "",
        "Images per second": typical(run, "images_per_s", "{:,.1f} (median)"),
        "Waiting for data": typical(run, "data_wait_share", "{:.1%} of the time (median)"),
        "Gradient norm": typical(run, "grad_norm", "{:.3g} (median)"),
        "Device": run.device,
        "Versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    items = "".join(
        f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text
    )
    return f"<dl class='facts'>{items}</dl>" if items else ""


def lost(record: Mapping[str, Any]) -> bool:
    loss = record["loss"]
    return not (isinstance(loss, (int, float)) and math.isfinite(loss))


def typical(run: Run, key: str, form: str) -> str:
    values = [record[key] for record in run.history]
    known = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return form.format(median(known)) if known else ""


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{seconds:.1f} s"


def _config(run: Run) -> str:
    if not run.config:
        return ""
    return (
        "<details><summary>Resolved config</summary>"
        f'<pre class="scroll" tabindex="0">{escape(run.config)}</pre></details>'
    )


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


_SUMMARY_NOTE = (
    "<p class='small'>Lower is better; shaded: the best of its row; change: relative, from the "
    "first evaluation to the last. Illusion gap: AbsRel on mirrors and art over AbsRel on the "
    "background; at 1 a picture of depth fools the model no more than the room itself.</p>"
)

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f7f8fa; --ink: #1f2328; --muted: #5c6670; --line: #dfe3e8;
  --best: #e3f1e7; --good: #1a7240; --bad: #b3372f; --note: #fff6de;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1b1f25; --ink: #e6e8eb; --muted: #98a1ad; --line: #2f363e;
    --best: #1c3527; --good: #6fcf97; --bad: #f08a80; --note: #2d2818;
  }
  .sheet img { filter: brightness(0.88); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 5rem; }
h1 {
  font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; letter-spacing: -0.015em;
  margin: 0.2rem 0 0.8rem; overflow-wrap: anywhere;
}
h2 { font-size: 1.2rem; margin: 0 0 0.9rem; letter-spacing: -0.005em; }
h3 { font-size: 1rem; margin: 0; }
section, details { margin-top: 2.6rem; padding-top: 1.6rem; border-top: 1px solid var(--line); }
p { margin: 0 0 0.6rem; }
.kicker { color: var(--muted); font-size: 0.85rem; margin: 0; }
.state {
  border: 1px solid var(--line); border-radius: 1rem; padding: 0.1rem 0.6rem; margin-left: 0.4rem;
  white-space: nowrap;
}
.headline { font-size: 1.15rem; max-width: 54rem; text-wrap: balance; }
.small, figcaption {
  color: var(--muted); font-size: 0.875rem; max-width: 56rem; text-wrap: pretty;
}
.notes {
  background: var(--note); border-radius: 0.5rem; margin: 1.2rem 0 0;
  padding: 0.7rem 1rem 0.7rem 2rem; font-size: 0.925rem;
}
.tiles {
  display: grid; gap: 0.8rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
}
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem; }
.tile { padding: 0.8rem 1.1rem; }
.tile span:first-child { color: var(--muted); font-size: 0.875rem; }
.tile p { font-size: 1.65rem; font-weight: 650; line-height: 1.25; margin: 0.1rem 0; }
.tile s { color: var(--muted); font-weight: 400; font-size: 1.1rem; text-decoration: none; }
.tile s::after { content: " →"; }
.tile p, td, th small { font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); } .same { color: var(--muted); }
/* The shadow at the right edge says that there is more; the first layer scrolls along and covers
   it at the end. */
.scroll {
  overflow-x: auto;
  background:
    linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, color-mix(in srgb, var(--ink) 22%, transparent), transparent)
      right / 0.8rem 100% no-repeat scroll;
}
.card { --page: var(--card); }
.scroll + .small { margin-top: 0.9rem; }
.scroll:focus-visible { outline: 2px solid var(--muted); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.925rem; min-width: 100%; }
th, td { padding: 0.34rem 0.7rem; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; border-bottom: 1px solid var(--line); font-weight: 600; }
th small { display: block; color: var(--muted); font-weight: 400; font-size: 0.78rem; }
tbody tr + tr > * { border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
tr > :first-child {
  text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--page);
  padding-left: 0.2rem;
}
td.best { background: var(--best); }
td.none { color: var(--muted); }
.dot {
  display: inline-block; width: 0.7em; height: 0.7em; border-radius: 0.2em; margin-right: 0.55em;
  border: 1px solid transparent;
}
.cards {
  display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(
    auto-fill, minmax(min(100%, calc(13.5rem + var(--columns) * 4.4rem)), 1fr));
}
.card { padding: 0.9rem 1.1rem; min-width: 0; }
.card .small { margin-bottom: 0.4rem; }
.card table { font-size: 0.875rem; }
.card th, .card td { padding-left: 0.5rem; padding-right: 0.5rem; }
figure { margin: 0 0 1.8rem; }
figure img { display: block; height: auto; max-width: 100%; }
.curves { width: 100%; }
.sheet { border: 1px solid var(--line); border-radius: 0.5rem; background: #fff; }
.sheet img { width: 100%; min-width: 60rem; }
figcaption { margin-top: 0.5rem; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.4rem; margin: 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts + .small { margin-top: 0.9rem; }
summary { font-size: 1.2rem; font-weight: 700; cursor: pointer; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem;
  padding: 0.9rem 1.1rem; font-size: 0.85rem; line-height: 1.5;
}
@media (max-width: 40rem) {
  main { padding-top: 1.5rem; }
  .card { padding: 0.8rem 0.7rem; }
  th, td, .card th, .card td { padding-left: 0.35rem; padding-right: 0.35rem; }
  table, .card table { font-size: 0.84rem; }
}
@media print {
  section { break-inside: avoid-page; }
  .scroll { overflow: visible; }
  .sheet img { min-width: 0; }
}
"""
