"""What a measurement says: a figure, perhaps a goal and whether it is met; and the table of all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["figure", "met", "missed", "not judged", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is measured.
        part: the part of the list that it is of; set by the runner.
        measured: the figure; None where there is none.
        unit: of the figure and the goal.
        goal: such as ``"<= 6"``, or empty.
        status: a figure without goal; a goal met, missed or not judged (it is one for a GPU, and
            this was none); or that the part failed or was skipped.
        note: what else must be known.
    """

    name: str
    part: str = ""
    measured: float | None = None
    unit: str = ""
    goal: str = ""
    status: Status = "figure"
    note: str = ""


def figure(name: str, measured: float | None, unit: str = "", note: str = "") -> Row:
    """A figure without a goal."""
    return Row(name=name, measured=measured, unit=unit, note=note)


def at_most(name: str, measured: float | None, limit: float, unit: str = "", note: str = "") -> Row:
    """A figure that shall not be above ``limit``; None is not judged, and NaN missed."""
    met = None if measured is None else measured <= limit
    return _with_goal(name, measured, unit, f"<= {limit:g}", met, note)


def at_least(
    name: str, measured: float | None, limit: float, unit: str = "", note: str = ""
) -> Row:
    """A figure that shall not be below ``limit``; None is not judged, and NaN missed."""
    met = None if measured is None else measured >= limit
    return _with_goal(name, measured, unit, f">= {limit:g}", met, note)


def _with_goal(
    name: str, measured: float | None, unit: str, goal: str, met: bool | None, note: str
) -> Row:
    status: Status = "not judged" if met is None else "met" if met else "missed"
    return Row(name=name, measured=measured, unit=unit, goal=goal, status=status, note=note)


def number(value: float | None) -> str:
    """A figure with four significant digits; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size < 1e6 and (value == round(value) or size >= 1e4):
        return f"{value:.0f}"
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= size < 1e4 else f"{value:.2e}"


def table(rows: Sequence[Row]) -> str:
    """Every goal with what was measured, what failed or was skipped, and how many of each."""
    cells = [("part", "what", "goal", "measured", "", "")]
    cells += [
        (row.part, row.name, row.goal, f"{number(row.measured)} {row.unit}", row.status, row.note)
        for row in rows
        if row.status != "figure"
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: Sequence[Row]) -> str:
    """How many goals were met, and how many parts failed or were skipped."""
    count = {status: sum(row.status == status for row in rows) for status in get_args(Status)}
    judged = count["met"] + count["missed"]
    said = [f"{count['met']} of {judged} goals met"]
    said += [f"{count[s]} {s}" for s in ("not judged", "failed", "skipped") if count[s]]
    return ", ".join(said)
