"""One self-contained HTML page that tells how a training run went.

Everything is computed from the run directory, and the page holds nothing but what was written
there: no script, no link, no time stamp, so the same run gives the same bytes. Here is what it
says; what it looks like is in ``templates/run.html``.

A run directory holds ``metrics.json``, ``config.yaml``, ``history.jsonl`` and
``pictures/*.png``; the page says which of them are still missing.
"""

import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from PIL import Image

from flatdepth.errors import UserError
from flatdepth.pace import LOADER_STAGES, STEP_STAGES
from flatdepth.show.html import write_page
from flatdepth.show.pictures import FLAT_COLOUR, REGION_COLOURS, loss_curve
from flatdepth.types import ALL_METRICS, METRICS_FORMAT, Metric
from flatdepth.untrusted import parse_json

_HISTORY = ("step", "loss", "lr", "grad_norm", "images_per_s", "data_wait_share", "time", "loader")
_WEBP_LIMIT = (16383, 16383)
_RUN_FILES = ("metrics.json", "config.yaml", "history.jsonl")
NIGHT = "(prefers-color-scheme: dark)"
Better = Literal["lower", "higher"]


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


_STAGE_COLOURS = {
    "wait": "#d55e00",
    "copy": "#cc79a7",
    "paste": "#e69f00",
    "photometric": "#d8c93a",
    "teacher": "#7b5ea7",
    "forward": "#56b4e9",
    "loss": "#8a8f96",
    "backward": "#2f7fc1",
    "agree": "#b9bec4",
    "optimiser": "#2a9d78",
    "read": "#8a8f96",
    "decode": "#56b4e9",
    "plan": "#e69f00",
    "content": "#2a9d78",
}
"""Okabe and Ito's, which the colour-blind tell apart, and greys; for light and dark pages."""


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
    limit: str = ""
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
    record = read_run(run)
    return write_page(
        out or run / "report.html",
        "run.html",
        run=record,
        sentence=headline(record),
        remarks=remarks(record),
        regions=summary(record),
        curves=curves(record),
        times=stage_times(record),
        cards=_cards(record),
        metrics=definitions({n for r in _regions(record) for n in _metric_names(record, r)}),
        facts=facts(record),
    )


def read_run(run: Path, *, pictures: bool = True) -> Run:
    """What a run directory holds, its contact sheets only if they are wanted.

    Raises:
        UserError: as ``write_report``.
    """
    if not any((run / name).is_file() for name in _RUN_FILES):
        files = ", ".join(_RUN_FILES)
        found = f"holds none of {files}" if run.is_dir() else "is not a directory"
        raise UserError(f"{run} {found}; give the directory of a training run, such as runs/NAME")
    notes: list[str] = []
    history = _read_history(run / "history.jsonl", notes)
    sheets = _read_pictures(run / "pictures", notes) if pictures else []
    config = run / "config.yaml"
    if not config.is_file():
        notes.append("There is no config.yaml.")
    return _read_metrics(
        run,
        notes,
        history=history,
        pictures=sheets,
        config=config.read_text("utf-8", "replace") if config.is_file() else "",
    )


def _read_metrics(run: Path, notes: list[str], **parts: Any) -> Run:
    path = run / "metrics.json"
    if not path.is_file():
        return Run(run.resolve().name, notes=["There is no metrics.json yet.", *notes], **parts)
    try:
        record = parse_json(path.read_bytes())
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
            limit=str((record.get("pace") or {}).get("limit", "")),
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
            record = parse_json(line)
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


# What the pages say of a run, as plain data for the templates.


class Label(NamedTuple):
    """A name with the style of its dot, "" for none, and what it stands for."""

    text: str
    dot: str = ""
    about: str = ""


Cell = tuple[str, str, bool]
"""Exact number, how it is shown, whether it is the best."""


class Row(NamedTuple):
    """A figure in every evaluation, and its change over all of them; None where there is none.

    ``change`` is (text, "good", "bad" or "same").
    """

    label: Label
    cells: Sequence[Cell | None]
    change: tuple[str, str] | None


def remarks(run: Run) -> list[str]:
    """Sentences about what a run lacks."""
    if run.finished:
        return list(run.notes)
    last = f" Its last logged step is {run.history[-1]['step']:,}." if run.history else ""
    return [f"This run is not finished.{last}", *run.notes]


def _abs_rel(evaluation: Evaluation, region: str) -> float:
    return evaluation.table.get(region, {}).get("abs_rel", math.nan)


def headline(run: Run) -> tuple[str, str, str]:
    """The result in one sentence, whose second part is stressed."""
    if not run.evaluations:
        return "No evaluation has been written yet.", "", ""
    first, last = run.evaluations[0], run.evaluations[-1]
    start, end = (_abs_rel(evaluation, "flat") for evaluation in (first, last))
    others = "".join(
        f"; {words} {_course(first, last, region)}"
        for region, words in (("background", "background"), ("clean", "clean images"))
        if math.isfinite(_abs_rel(last, region))
    )
    lead = "AbsRel on mirrors and art "
    if not math.isfinite(end):
        return f"No mirror or art pixel was evaluated{others}.", "", ""
    if first is last or not math.isfinite(start):
        return f"{lead}is {_tidy(end)} in the evaluation “{last.label}”{others}.", "", ""
    if end == start:
        return f"{lead}stayed at {_tidy(end)}{others}.", "", ""
    strong = f"{'fell' if end < start else 'rose'} from {_tidy(start)} to {_tidy(end)}"
    return lead, strong, f" ({_percent(start, end)}){others}."


def _course(first: Evaluation, last: Evaluation, region: str) -> str:
    """``0.118 → 0.111 (−6 %)``, or the last value alone if there is nothing before it."""
    start, end = _abs_rel(first, region), _abs_rel(last, region)
    if first is last or not math.isfinite(start):
        return _tidy(end)
    return f"{_tidy(start)} → {_tidy(end)} ({_percent(start, end)})"


def summary(run: Run) -> dict[str, Row]:
    """AbsRel by region, and the illusion gap; nothing before the first evaluation."""
    if not run.evaluations:
        return {}
    rows = {
        region: _row(region_label(region), _values(run, region, "abs_rel"), "lower")
        for region in _regions(run)
    }
    gaps = [evaluation.illusion_gap for evaluation in run.evaluations]
    return rows | {"illusion_gap": _row(Label("Illusion gap"), gaps, "lower")}


def _cards(run: Run) -> list[tuple[Label, list[Row]]]:
    """All metrics of every region."""
    return [
        (
            region_label(region),
            [
                _row(
                    Label(metric_label(name)),
                    _values(run, region, name),
                    ALL_METRICS[name].better if name in ALL_METRICS else None,
                )
                for name in _metric_names(run, region)
            ],
        )
        for region in _regions(run)
    ]


def _regions(run: Run) -> list[str]:
    """The regions that were evaluated: known ones in their order, then any others."""
    found = dict.fromkeys(region for evaluation in run.evaluations for region in evaluation.table)
    return sorted(found, key=_rank(REGION_NAMES))


def _metric_names(run: Run, region: str) -> list[str]:
    """The metrics of a region: known ones in their order, then others, then the counts."""
    rows = [evaluation.table.get(region, {}) for evaluation in run.evaluations]
    found = sorted(dict.fromkeys(name for row in rows for name in row), key=_rank(ALL_METRICS))
    return sorted(found, key=("images", "pixels").__contains__)


def _rank(known: Iterable[str]) -> Callable[[str], int]:
    """A key to sort by that leaves what is not known in its order at the end."""
    places = {name: place for place, name in enumerate(known)}
    return lambda name: places.get(name, len(places))


def _values(run: Run, region: str, metric: str) -> list[float]:
    return [
        evaluation.table.get(region, {}).get(metric, math.nan) for evaluation in run.evaluations
    ]


def region_label(region: str) -> Label:
    text, about = REGION_NAMES.get(region, (region, ""))
    return Label(text, _DOTS.get(region, ""), about)


def metric_label(name: str) -> str:
    return ALL_METRICS[name].label if name in ALL_METRICS else name


def _row(label: Label, values: Sequence[float], better: Better | None) -> Row:
    change = None if better is None else _change(values[0], values[-1], better)
    return Row(label, cells(values, better), change)


def cells(values: Sequence[float], better: Better | None) -> list[Cell | None]:
    """The figures of one metric, the best marked if they differ; None for one that is missing."""
    finite = [value for value in values if math.isfinite(value)]
    best = math.nan
    if better is not None and len(set(finite)) > 1:
        best = max(finite) if better == "higher" else min(finite)
    decimals = _decimals(finite)
    return [_cell(value, decimals, value == best) for value in values]


def _cell(value: float, decimals: int, best: bool) -> Cell | None:
    if not math.isfinite(value):
        return None
    exact = repr(int(value)) if value.is_integer() else repr(value)
    return exact, _shown(value, decimals), best


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


def _change(start: float, end: float, better: Better) -> tuple[str, str] | None:
    if not (math.isfinite(start) and math.isfinite(end)):
        return None
    improved = (end > start) == (better == "higher")
    return _percent(start, end), "same" if start == end else "good" if improved else "bad"


def definitions(names: Collection[str] = ALL_METRICS.keys()) -> list[Metric]:
    """The known ones among these metrics."""
    return [metric for name, metric in ALL_METRICS.items() if name in names]


def curves(run: Run) -> dict[str, bytes]:
    """Media query -> the SVG of loss, learning rate and validations that is for it, "" for all."""
    if not run.history:
        return {}
    evaluations = [{"step": entry.step, "table": entry.table} for entry in run.evaluations]
    phone = "(max-width: 40rem)"
    return {
        media: loss_curve(run.history, evaluations, dark=NIGHT in media, narrow=phone in media)
        for media in (f"{phone} and {NIGHT}", phone, NIGHT, "")
    }


class Bar(NamedTuple):
    """Mean seconds by stage as a stacked bar: (label, width in %, milliseconds) of each."""

    title: str
    total: str
    parts: Sequence[tuple[Label, str, str]]


def stage_times(run: Run) -> list[Bar]:
    """Where the time of the steps went, and that of preparing samples; runs of old have neither."""
    found = (
        ("An optimiser step", _mean_stages(run, "time", STEP_STAGES), STEP_STAGES),
        ("A sample, beside the steps", _mean_stages(run, "loader", LOADER_STAGES), LOADER_STAGES),
    )
    return [
        Bar(
            title,
            _milliseconds(sum(means.values())),
            [
                (
                    Label(name, f"background: {_STAGE_COLOURS[name]}", about[name]),
                    f"{100 * value / sum(means.values()):.2f}",
                    _milliseconds(value),
                )
                for name, value in means.items()
            ],
        )
        for title, means, about in found
        if sum(means.values()) > 0
    ]


def _mean_stages(run: Run, key: str, names: Iterable[str]) -> dict[str, float]:
    """Mean seconds per record of the stages that took any time."""
    records = [record[key] for record in run.history if isinstance(record[key], dict)]
    sums = {name: sum(_seconds(record.get(name)) for record in records) for name in names}
    return {name: value / len(records) for name, value in sums.items() if value > 0}


def _seconds(value: object) -> float:
    known = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if known else 0.0  # type: ignore[arg-type]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(what, how much, what kind of figure it is) of those that are known."""
    known = (
        ("Duration", _duration(run.seconds), ""),
        ("Steps", f"{run.history[-1]['step']:,}" if run.history else "", ""),
        ("Skipped steps", f"{sum(map(lost, run.history)):,}" if run.history else "", ""),
        ("Images per second", _typical(run, "images_per_s", "{:,.1f}"), "(median)"),
        ("Waiting for data", _typical(run, "data_wait_share", "{:.1%} of the time"), "(median)"),
        ("Gradient norm", _typical(run, "grad_norm", "{:.3g}"), "(median)"),
        ("Device", run.device, ""),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items()), ""),
    )
    return [fact for fact in known if fact[1]]


def lost(record: Mapping[str, Any]) -> bool:
    """Whether a step was skipped, its loss not being finite."""
    loss = record["loss"]
    return not (isinstance(loss, (int, float)) and math.isfinite(loss))


def _typical(run: Run, key: str, form: str) -> str:
    values = [record[key] for record in run.history]
    known = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return form.format(median(known)) if known else ""


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{seconds:.1f} s"
