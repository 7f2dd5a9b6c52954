"""The tab that shows the runs of a directory as they go, and asks one to stop."""

import html
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import gradio as gr
import numpy as np
import psutil
from jaxtyping import UInt8
from PIL import Image

from flatdepth.app.events import listen
from flatdepth.errors import UserError
from flatdepth.show.html import data_uri
from flatdepth.show.pictures import loss_curve
from flatdepth.show.run_page import headline, read_run
from flatdepth.training.runlog import step_line
from flatdepth.training.stop import ask_to_stop, process_of
from flatdepth.untrusted import parse_json, parse_yaml

HEADERS = ("run", "state", "step", "loss", "images/s", "time left", "memory (RAM)")
REFRESH_SECONDS = 3.0
LINES = 20
"""Of the log."""
_DRAWN = 40
_TAIL_BYTES = 1 << 16
_RATE_OVER = 50
"""Steps whose median rate is told."""
_NONE = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands.

    Attributes:
        name: of its directory.
        state: in a word.
        step, steps: done and wanted.
        records: the last ones of its history.
        images_per_s: median of late.
        left_s: seconds to its end, if it is running.
        memory: of its process, in bytes.
        pid: of its process on this machine.
    """

    name: str
    state: str
    step: int
    steps: int
    records: Sequence[Mapping[str, Any]]
    images_per_s: float
    left_s: float | None
    memory: int | None
    pid: int | None

    def cells(self) -> list[str]:
        """As ``HEADERS`` say."""
        loss = _number(self.records[-1].get("loss")) if self.records else math.nan
        return [
            self.name,
            self.state,
            f"{self.step:,} of {self.steps:,}" if self.steps else f"{self.step:,}",
            f"{loss:.4f}" if math.isfinite(loss) else _NONE,
            f"{self.images_per_s:.1f}" if math.isfinite(self.images_per_s) else _NONE,
            _NONE if self.left_s is None else _time(self.left_s),
            _NONE if self.memory is None else f"{self.memory / 2**30:.2f} GiB",
        ]


def run_folders(runs: Path) -> dict[str, Path]:
    """The runs of a directory by name, the newest first; links do not count."""
    found = [
        folder
        for folder in (runs.iterdir() if runs.is_dir() else ())
        if (folder / "config.yaml").is_file() and not folder.is_symlink()
    ]
    return {one.name: one for one in sorted(found, key=_changed_at, reverse=True)}


def standing(run: Path) -> Standing:
    """Where a run stands, by its files and its process."""
    steps, batch = _plan(run / "config.yaml", _changed_at(run / "config.yaml"))
    records = _tail(run / "history.jsonl")
    step = int(records[-1]["step"]) if records else 0
    rates = [_number(one.get("images_per_s")) for one in records[-_RATE_OVER:]]
    known = [rate for rate in rates if rate > 0 and math.isfinite(rate)]
    rate = median(known) if known else math.nan
    process = process_of(run)
    memory, pid, left = None, None, None
    if isinstance(process, psutil.Process):
        state, pid = "running", process.pid
        try:
            memory = process.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            state, pid = "stopped", None
        if known and steps > step:
            left = (steps - step) * batch / rate
    elif process is not None:
        state = f"running on {process}"
    else:
        state = "finished" if _is_finished(run) else "stopped"
    return Standing(
        name=run.name,
        state=state,
        step=step,
        steps=steps,
        records=records,
        images_per_s=rate,
        left_s=left,
        memory=memory,
        pid=pid,
    )


def last_sheet(run: Path) -> tuple[str, UInt8[np.ndarray, "h w 3"]] | None:
    """The newest contact sheet and its name; None if there is none that can be read."""
    for path in sorted((run / "pictures").glob("*.png"), reverse=True):
        try:
            with Image.open(path, formats=("PNG",)) as image:
                return path.stem, np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return None


def log_tail(now: Standing) -> str:
    """The last lines of a run's log."""
    names = ("loss", "lr", "grad_norm", "images_per_s", "data_wait_share")
    lines = []
    for record in now.records[-LINES:]:
        values = {name: _number(record.get(name)) for name in names}
        if record.get("teacher") is not None:
            values["teacher"] = _number(record["teacher"])
        lines.append(step_line(int(record["step"]), now.steps, values))
    return "\n".join(lines) or "no step yet"


def curves(run: Path) -> str:
    """Loss and validations as HTML, for light and dark pages.

    Raises:
        UserError: its files cannot be understood.
    """
    about = read_run(run, pictures=False)
    if not about.history:
        return ""
    validations = [{"step": one.step, "table": one.table} for one in about.evaluations]
    drawn = []
    for dark in (False, True):
        picture = data_uri(loss_curve(about.history, validations, dark=dark), "image/svg+xml")
        drawn.append(
            f'<img class="curve on-{"dark" if dark else "light"}" src="{picture}" '
            'alt="loss, learning rate and validation AbsRel over the steps">'
        )
    sentence = html.escape("".join(headline(about)))
    return f"<p>{sentence}</p>{''.join(drawn)}"


def _tail(path: Path) -> list[Mapping[str, Any]]:
    """The last records of a history; of a line that is not whole nothing."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = parse_json(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        records.append(record)
    return records


@lru_cache(256)
def _plan(config: Path, changed_at: float) -> tuple[int, int]:
    """(steps, batch) of a version of a configuration; (0, 0) if it cannot be read."""
    del changed_at
    try:
        values = parse_yaml(config.read_bytes())
        return int(values["steps"]), int(values["batch"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return 0, 0


def _is_finished(run: Path) -> bool:
    try:
        return parse_json((run / "metrics.json").read_bytes())["finished"] is True
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{round(seconds)} s"


def tab(runs: Path, startup: list[Any]) -> None:
    """Lay the tab out. ``startup`` gets what is to be called when the page opens."""
    seen_table, seen_run, asked = gr.State(None), gr.State(None), gr.State([])
    table = gr.Dataframe(
        headers=list(HEADERS),
        interactive=False,
        wrap=False,
        label=f"Runs in {runs}",
        max_height=320,
        elem_id="runs",
        buttons=[],
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            chosen = gr.Dropdown([], label="Run", elem_id="run")
            state = gr.Markdown(elem_id="run_state")
            report = gr.DownloadButton("Save its report (HTML)", visible=False, size="sm")
            stop = gr.Button("Stop it …", variant="stop", visible=False, elem_id="stop", size="sm")
            with gr.Group(visible=False) as question:
                words = gr.Markdown(elem_id="question")
                with gr.Row():
                    yes = gr.Button("Stop it", variant="stop", elem_id="yes", min_width=80)
                    no = gr.Button("Let it run", min_width=80)
        with gr.Column(scale=5, min_width=300):
            graph = gr.HTML(elem_id="curves")
    log = gr.Textbox(
        label=f"Log: the last {LINES} steps", lines=8, max_lines=LINES, interactive=False,
        elem_id="log",
    )  # fmt: skip
    sheet = gr.Image(
        label="Contact sheet",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="captioned",
    )

    def overview(seen: Any, chosen: str | None) -> list[Any]:
        rows = [standing(folder).cells() for folder in run_folders(runs).values()]
        if rows == seen:
            return [gr.skip()] * 3
        names = [row[0] for row in rows]
        if seen is not None and names == [row[0] for row in seen]:
            return [rows, rows, gr.skip()]
        now = chosen if chosen in names else next(iter(names), None)
        return [rows, rows, gr.update(choices=names, value=now)]

    def folder_of(name: str | None) -> Path:
        found = run_folders(runs).get(name or "")
        if found is None:
            raise UserError(f"{runs} holds no run {name!r}; choose another one")
        return found

    def details(name: str | None, seen: Any) -> list[Any]:
        if not name:
            empty = f"There is no run in `{runs}` yet; `flatdepth train` makes one."
            return [None, empty, gr.update(visible=False), "", gr.update(visible=False), "", None]
        run = folder_of(name)
        now = standing(run)
        page = run / "report.html"
        # what takes long is drawn anew after a validation and every fortieth of the run
        slow = [name, _changed_at(page), now.step // max(1, now.steps // _DRAWN)]
        version = [*slow, now.step, now.state]
        if version == seen:
            return [gr.skip()] * 7
        about = f"**{now.state}**" + (f", process {now.pid}" if now.pid else "")
        quick = [version, about, gr.update(visible=now.pid is not None), log_tail(now)]
        if seen is not None and seen[: len(slow)] == slow:
            return [*quick, *[gr.skip()] * 3]
        last = last_sheet(run)
        return [
            *quick,
            gr.update(visible=page.is_file(), value=_copy(page) if page.is_file() else None),
            curves(run),
            gr.update(value=last[1], label=f"Contact sheet: {last[0]}") if last else None,
        ]

    def _copy(page: Path) -> str:
        folder = Path(tempfile.mkdtemp(dir=report.GRADIO_CACHE))
        return str(shutil.copyfile(page, folder / f"{page.parent.name}.html"))

    def ask(name: str | None) -> list[Any]:
        now = standing(folder_of(name))
        if now.pid is None:
            raise UserError(f"{now.name} is not running on this machine; there is nothing to stop")
        text = (
            f"Stop **{now.name}** (process {now.pid}) at step {now.step:,}? It saves a checkpoint "
            "after the step it is at, and the command that began it goes on from there."
        )
        return [gr.update(visible=True), text]

    def confirm(name: str | None, asked: list[int]) -> list[Any]:
        run = folder_of(name)
        if standing(run).pid in asked:  # a second Ctrl-C would not wait for the step
            raise UserError(f"{run.name} was asked before, and stops after the step it is at")
        asked = [*asked, ask_to_stop(run)]
        gr.Info(f"{run.name} was asked to stop, and does so after the step it is at")
        return [gr.update(visible=False), asked]

    parts = [seen_run, state, stop, log, report, graph, sheet]
    quiet = {"lane": "runs", "show_progress": "hidden"}
    timer = gr.Timer(REFRESH_SECONDS)
    listen([timer.tick], overview, [seen_table, chosen], [seen_table, table, chosen], **quiet)
    listen([timer.tick, chosen.change], details, [chosen, seen_run], parts, **quiet)
    listen([stop.click], ask, [chosen], [question, words], **quiet)
    listen([yes.click], confirm, [chosen, asked], [question, asked], **quiet)
    hidden = gr.update(visible=False)
    listen([no.click, chosen.change], lambda: hidden, [], [question], **quiet)
    startup.append((overview, [seen_table, chosen], [seen_table, table, chosen]))
