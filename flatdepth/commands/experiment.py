"""Train variants of a configuration and judge them on real mirrors and pictures.

flatdepth experiment --config FILE
flatdepth experiment --config FILE --accelerate "--num_processes 2"
flatdepth experiment --redraw runs/NAME/experiment.json

Every arm is trained with each seed, in RUNS/NAME/ARM-SEED, launched by accelerate, and judged on
the frames of the bench by their region maps. The same command goes on after an interruption; what
has finished is neither run nor judged again. At the end: a table, experiment.json, results.md,
ratios.svg, ratios_dark.svg and pictures.png in RUNS/NAME. The first four can be made again from
experiment.json alone, beside it.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flatdepth.cli import Parser, as_called, called, parse_config

if TYPE_CHECKING:
    from flatdepth.judge.experiment import Outcome


def main(argv: list[str]) -> None:
    parser = Parser(prog=called("experiment"), usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument(
        "--accelerate", default="", metavar="OPTIONS", help="options of accelerate launch"
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="FILE", help="an experiment.json: its table and plots again"
    )
    own, others = parser.parse_known_args(argv)
    if own.redraw is not None:
        from flatdepth.judge.experiment import read_table

        write_table(read_table(own.redraw), own.redraw.parent)
        return
    from tqdm import tqdm

    from flatdepth.judge.experiment import (
        ExperimentConfig,
        Judged,
        as_json,
        judge_run,
        outcomes,
        picture_sheet,
        planned,
        read_rows,
        write_rows,
    )
    from flatdepth.judge.runs import run_all
    from flatdepth.models.precision import best_device
    from flatdepth.show.pictures import save_png, write_atomic

    experiment = parse_config(
        ExperimentConfig,
        others,
        prog=called("experiment"),
        description=f"{as_called('experiment', __doc__)}\n{parser.format_help().strip()}",
    )
    arms, folder, device = planned(experiment), experiment.folder, best_device()
    run_all([run for runs in arms.values() for run in runs], folder, own.accelerate)
    weights = {
        arm: [folder / run.config.name / "weights" / "final.safetensors" for run in runs]
        for arm, runs in arms.items()
    }
    judged: dict[str, list[Judged]] = {arm: [] for arm in weights}
    for arm, files in weights.items():
        for file in files:
            kept = folder / f"{file.parent.parent.name}.judged.json"
            if not kept.exists():
                with tqdm(desc=f"judging {file.parent.parent.name}", disable=None) as bar:
                    write_rows(judge_run(experiment, file, device, bar.update), kept)
            judged[arm].append(read_rows(kept))
    table = outcomes(judged)
    document = as_json(experiment, table, ["flatdepth", "experiment", *argv])
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomic(folder / "experiment.json", text.encode())
    firsts = {arm: files[0] for arm, files in weights.items()}
    save_png(picture_sheet(experiment, firsts, device), folder / "pictures.png")
    write_table(table, folder)
    print(folder / "experiment.json")
    print(folder / "pictures.png")


def write_table(table: "Mapping[str, Mapping[str, Outcome]]", folder: Path) -> None:
    """Print the table, and write it and its plots to ``folder``."""
    from flatdepth.judge.experiment import markdown, ratio_plot
    from flatdepth.show.pictures import write_atomic

    write_atomic(folder / "results.md", f"{markdown(table)}\n".encode())
    for name, dark in (("ratios.svg", False), ("ratios_dark.svg", True)):
        write_atomic(folder / name, ratio_plot(table, dark=dark))
    print(f"\n{markdown(table)}\n")
