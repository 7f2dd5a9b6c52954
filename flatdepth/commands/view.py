"""Show pictures and what networks say of them in the Rerun viewer (extra rerun), as points to turn.

flatdepth view photo.jpg folder --checkpoint FILE [--checkpoint FILE]
flatdepth view runs/NAME [--out scenes.rrd]

A run is shown on pictures of its own validation, before (the weights it started from) and after,
beside the truth, and its curves over the steps. --out writes a recording in place of opening the
viewer; open it with: rerun scenes.rrd. The viewer sends anonymous figures of its use unless told
not to: rerun analytics disable.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from flatdepth.cli import Parser, as_called, called, number
from flatdepth.errors import BadFrame, UserError, import_extra
from flatdepth.models.precision import chosen_device


def main(argv: list[str]) -> None:
    chosen = parser().parse_args(argv)
    rerun = import_extra("rerun", "flatdepth view", "rerun")
    if chosen.out is not None and chosen.out.exists() and not chosen.overwrite:
        raise UserError(f"{chosen.out} exists; choose another --out or add --overwrite")
    recording = rerun.RecordingStream("flatdepth")
    count = _log(rerun, recording, chosen)
    print(f"{count} pictures{f' in {chosen.out}' if chosen.out else ''}")


def _log(rerun: Any, recording: Any, chosen: argparse.Namespace) -> int:
    from flatdepth.api import configure
    from flatdepth.models.onnx_depth import open_depth
    from flatdepth.predict.inputs import find_inputs
    from flatdepth.predict.predictor import PredictOptions
    from flatdepth.report.rerun_view import (
        log_history,
        log_scenes,
        photographs,
        validation_scenes,
    )

    options = PredictOptions(size=chosen.size, fov_deg=chosen.fov)
    run = Path(chosen.inputs[0])
    weights = run / "weights" / "final.safetensors"
    config = None
    if len(chosen.inputs) == 1 and (run / "config.yaml").is_file():
        config = configure(run / "config.yaml")
        if chosen.checkpoint:
            raise UserError(f"--checkpoint: {run} is a run, which has its own; leave it out")
        start = config.model.checkpoint
        sources = ({"before": start} if start else {}) | {"after": str(weights)}
        scenes = validation_scenes(config)
    elif chosen.checkpoint:
        sources = {f"depth_{n}": source for n, source in enumerate(chosen.checkpoint, 1)}
        scenes = photographs(find_inputs(chosen.inputs, Path("-")), options)
    else:
        raise UserError("--checkpoint: expected weights to predict with; name a file or a hub id")
    device = chosen_device(chosen.device)
    models = {}
    for name, source in sources.items():
        models[name], report = open_depth(source, device)
        print(report, file=sys.stderr)
    temporary = None
    if chosen.out is None:
        recording.spawn()
    else:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = chosen.out.with_name(f".{chosen.out.name}.tmp")
        recording.save(str(temporary))
    try:
        count = log_scenes(rerun, recording, scenes, models, options, device)
        if config is not None:
            log_history(rerun, recording, run)
        recording.disconnect()
        if temporary is not None:
            temporary.replace(chosen.out)
    except BadFrame as error:
        raise UserError(f"a picture cannot be shown: {error.detail}; leave it out") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return count


def parser() -> Parser:
    """The options."""
    result = Parser(prog=called("view"), description=as_called("view", __doc__))
    add = result.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="a run directory; or images, folders, patterns")
    add("--checkpoint", action="append", default=[], metavar="FILE", help="weights, repeatable")
    add("--out", type=Path, metavar="FILE.rrd", help="write a recording, open no viewer")
    add("--overwrite", action="store_true", help="replace an earlier recording")
    add(
        "--size",
        type=int,
        help="shorter side of the network's input in px (default: as in training, else 518)",
    )
    add("--fov", type=number(1.0, 170.0), metavar="DEG", help="horizontal field of view of images")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    return result
