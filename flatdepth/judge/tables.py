"""What an evaluation says: the table for the terminal and ``eval.json``."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flatdepth.cli import versions
from flatdepth.errors import UserError
from flatdepth.judge.metrics import RegionTable
from flatdepth.judge.protocol import describe_alignment
from flatdepth.judge.scoring import Contender, Domain, Figure, Request, Table, Verdict
from flatdepth.show.pictures import write_atomic
from flatdepth.types import ALL_METRICS, REGIONS
from flatdepth.untrusted import parse_json

FORMAT = 1
KIND = "flatdepth evaluation"

_UNITS = {"sq_rel": "m", "rmse": "m", "mae": "m", "plane_normal_angle_deg": "deg"}


def describe(contender: Contender, request: Request) -> str:
    """A contender in words: its file, its model and its alignment."""
    model = contender.model
    has_maximum = model.kind == "metric" and model.bounded
    depth = f" up to {model.max_depth_m:g} m" if has_maximum else ""
    if has_maximum and model.canonical_focal_px is not None:
        depth += f" at {model.canonical_focal_px:g} px"
    if model.calibration is not None:
        depth += f", calibrated: {model.calibration.correction}"
    alignment = describe_alignment(contender.alignment, request.fit)
    return f"{contender.source} ({model.encoder}, {model.kind}{depth}), {alignment}"


def render(verdict: Verdict) -> str:
    """All figures as aligned plain text: per data set its conditions, then a block per region."""
    blocks = [_domain(verdict, domain) for domain in verdict.domains]
    return "\n\n".join(blocks)


def _domain(verdict: Verdict, domain: Domain) -> str:
    request, contenders = verdict.request, verdict.contenders
    sizes = ", ".join(
        f"{_size(size)} (network input {_size(network)})" for size, network in domain.sizes.items()
    )
    lines = [
        f"== {domain.name}: {_count(len(domain.frames), 'frame')} of "
        f"{_count(domain.scenes, 'scene')}, compared at {sizes} px",
        verdict.conditions(),
    ]
    for contender, trained in zip(contenders, domain.trained, strict=True):
        lines.append(
            f"  {contender.label}  {describe(contender, request)}; {contender.mode(domain.name)}"
        )
        if trained:
            lines.append(
                f"     was trained on {trained} of these {len(domain.frames)} frames; --part val "
                "takes held-out scenes only"
            )
    lines.append(_reading(domain))
    heads = [contender.label for contender in contenders]
    heads += [f"{contender.label} - {contenders[0].label}" for contender in contenders[1:]]
    columns = [*domain.tables, *domain.differences]
    signed = [False] * len(domain.tables) + [True] * len(domain.differences)
    for region in REGIONS:
        if any(region in table for table in domain.tables):
            lines += ["", *_region(region, heads, columns, signed)]
    return "\n".join(lines)


def _reading(domain: Domain) -> str:
    if domain.scenes < 2:
        return "Means over images; one scene, so there are no intervals. + : higher is better."
    return (
        "Means over images [95 % intervals, bootstrap over scenes; differences are paired]. "
        "+ : higher is better."
    )


def _region(
    region: str, heads: Sequence[str], columns: Sequence[Table], signed: Sequence[bool]
) -> list[str]:
    metrics = [
        metric
        for metric in ALL_METRICS
        if any(metric in table.get(region, {}) for table in columns)
    ]
    rows = [[_name(metric)] for metric in metrics]
    for table, sign in zip(columns, signed, strict=True):
        row = table.get(region, {})
        for cells, metric in zip(rows, metrics, strict=True):
            cells.append(figure_text(row[metric], sign) if metric in row else "-")
    rows.insert(0, [f"{region} ({_over(columns[0].get(region, {}))})", *heads])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _name(metric: str) -> str:
    unit = f" [{_UNITS[metric]}]" if metric in _UNITS else ""
    sense = " +" if ALL_METRICS[metric].better == "higher" else ""
    return f"  {metric.removesuffix('_deg')}{unit}{sense}"


def figure_text(figure: Figure, signed: bool) -> str:
    """The value with its interval, to a digit that the interval's width gives a meaning."""
    sign = "+" if signed else ""
    largest = max(map(abs, (figure.value, *(figure.interval or ()))))
    digits = 4 if largest < 1 else max(0, 3 - math.floor(math.log10(largest)))
    text = f"{figure.value:{sign}.{digits}f}"
    if figure.interval is None:
        return text
    low, high = figure.interval
    return f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _over(row: Mapping[str, Figure]) -> str:
    """What the figures of a region are means over; all contenders see the same."""
    text = _count(row["abs_rel"].count, "image") if "abs_rel" in row else "no images"
    if "flatness_residual" in row:
        text += f", {_count(row['flatness_residual'].count, 'paste')}"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def as_json(verdict: Verdict, command: Sequence[str]) -> dict[str, Any]:
    """Everything in JSON values: conditions, figures, and the rows they can be recomputed from.

    ``rows`` of a data set hold per contender four tables with their columns: ``depth`` and
    ``ssim`` per (frame, region), ``boundary`` per clean frame, ``planes`` per paste, whose sample
    is 1024 times the frame plus the number of the paste. A mean is over the rows of a region with
    at least 64 pixels.
    """
    request = verdict.request
    return {
        "format": FORMAT,
        "kind": KIND,
        "command": list(command),
        "versions": versions() | {"python": platform.python_version()},
        "device": _device(verdict),
        "conditions": verdict.conditions(),
        "protocol": asdict(request.protocol),
        "fit": request.fit,
        "size": verdict.size,
        "part": request.part,
        "data": list(request.data),
        "paste_seed": request.paste_seed,
        "art": list(request.art),
        "images": request.images,
        "interval": {"level": 0.95, "draws": request.bootstrap, "seed": 0, "over": "scenes"},
        "contenders": [
            {
                "label": contender.label,
                "checkpoint": contender.source,
                "encoder": contender.model.encoder,
                "kind": contender.model.kind,
                "max_depth_m": contender.model.max_depth_m
                if contender.model.kind == "metric" and contender.model.bounded
                else None,
                "alignment": contender.alignment,
                "description": describe(contender, request),
            }
            for contender in verdict.contenders
        ],
        "datasets": [_domain_json(verdict, domain) for domain in verdict.domains],
    }


def _domain_json(verdict: Verdict, domain: Domain) -> dict[str, Any]:
    labels = [contender.label for contender in verdict.contenders]
    return {
        "name": domain.name,
        "scenes": domain.scenes,
        "sizes": [
            {"compared": list(size), "network": list(network)}
            for size, network in domain.sizes.items()
        ],
        "modes": {c.label: c.mode(domain.name) for c in verdict.contenders},
        "trained_frames": dict(zip(labels, domain.trained, strict=True)),
        "tables": {
            label: _table_json(table) for label, table in zip(labels, domain.tables, strict=True)
        },
        "differences": {
            f"{label} - {labels[0]}": _table_json(table)
            for label, table in zip(labels[1:], domain.differences, strict=True)
        },
        "frames": [
            {"frame": number, "key": key, "scene": scene}
            for number, (key, scene) in domain.frames.items()
        ],
        "rows": {
            label: {
                "depth": _rows_json(scores.depth),
                "ssim": _rows_json(scores.ssim),
                "boundary": _rows_json(scores.boundary),
                "planes": _rows_json(scores.planes),
            }
            for label, scores in zip(labels, domain.scores, strict=True)
        },
    }


def _table_json(table: Table) -> Mapping[str, Any]:
    return {
        region: {
            metric: {
                "value": figure.value,
                "interval": None if figure.interval is None else list(figure.interval),
            }
            | ({"count": figure.count} if figure.count else {})
            for metric, figure in row.items()
        }
        for region, row in table.items()
    }


def _rows_json(table: RegionTable) -> dict[str, Any]:
    keys, values = table.state()
    rows = [
        [sample, REGIONS[region], pixels, *row]
        for (sample, region, pixels), row in zip(keys.tolist(), values.tolist(), strict=True)
        if pixels
    ]
    return {"columns": ["sample", "region", "pixels", *table.columns], "rows": rows}


def _device(verdict: Verdict) -> str:
    device = verdict.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse an output that would replace something, before the work is done.

    Raises:
        UserError: the folder is missing, or the file exists and is not an evaluation that may be
            replaced.
    """
    if path.is_dir():
        raise UserError(f"--out: {path} is a directory; give the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"--out: the folder {path.parent} does not exist; make it first")
    if not path.exists():
        return
    if not _is_ours(path):
        raise UserError(f"--out: {path} exists and is no evaluation; choose another name")
    if not overwrite:
        raise UserError(
            f"--out: {path} holds an earlier evaluation; choose another name, or add --overwrite"
        )


def _is_ours(path: Path) -> bool:
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND


def read_json(path: Path) -> Mapping[str, Any]:
    """An evaluation that ``write_json`` wrote.

    Raises:
        UserError: it is none.
    """
    if not _is_ours(path):
        raise UserError(f"{path}: expected an evaluation, which flatdepth evaluate --out writes")
    document: Mapping[str, Any] = parse_json(path.read_bytes())
    return document


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Write an evaluation, whole or not at all."""
    write_atomic(path, json.dumps(document, allow_nan=False).encode())
