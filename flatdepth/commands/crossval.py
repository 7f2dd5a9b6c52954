"""Train and validate once per fold of the scenes: mean and deviation of every figure.

flatdepth crossval --config FILE --folds 5
flatdepth crossval --config FILE --leave-one-scene-out
flatdepth crossval --config FILE --leave-one-dataset-out --accelerate "--num_processes 2"

Every fold is a run of its own, launched by accelerate, in RUNS/NAME-KIND/fold_K. Folds hold whole
scenes, of every data set an even share. The same command goes on after an interruption; finished
folds are not run again. At the end: a table, crossval.json and crossval.png.
"""

import argparse
import json
from pathlib import Path

from flatdepth.cli import Parser, as_called, called, number, parse_config
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError


def main(argv: list[str]) -> None:
    parser = own_options()
    own, others = parser.parse_known_args(argv)
    config = parse_config(
        TrainConfig,
        others,
        prog=called("crossval"),
        description=f"{as_called('crossval', __doc__)}\n{parser.format_help().strip()}",
    )
    ways = [own.folds is not None, own.leave_one_scene_out, own.leave_one_dataset_out]
    if sum(ways) != 1:
        raise UserError(
            "expected one of --folds K, --leave-one-scene-out and --leave-one-dataset-out, got "
            f"{sum(ways)}"
        )
    from flatdepth.judge.crossval import (
        as_json,
        chart,
        dataset_folds,
        k_folds,
        render,
        run_folds,
        scene_folds,
        spreads,
    )
    from flatdepth.show.pictures import write_atomic

    if own.folds is not None:
        folds, kind = k_folds(config, own.folds), f"{own.folds}-folds"
    elif own.leave_one_scene_out:
        folds, kind = scene_folds(config), "scenes"
    else:
        folds, kind = dataset_folds(config), "datasets"
    folder = Path(config.runs) / f"{config.name}-{kind}"
    records = run_folds(config, folds, folder, own.accelerate)
    table = spreads(records)
    document = as_json(config, folds, records, table, ["flatdepth", "crossval", *argv])
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomic(folder / "crossval.json", text.encode())
    title = f"{config.name}: {len(folds)} folds, mean (line) ± deviation (bar), a dot per fold"
    write_atomic(folder / "crossval.png", chart(table, title))
    print(f"\n{render(folds, table, records[0]['protocol'])}\n")
    print(folder / "crossval.json")
    print(folder / "crossval.png")


def own_options() -> Parser:
    """How scenes are held out; all other options are training's."""
    parser = Parser(prog=called("crossval"), usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group("what is held out")
    group.add_argument(
        "--folds", type=number(1, 10**6), metavar="K", help="K even shares of the scenes"
    )
    group.add_argument("--leave-one-scene-out", action="store_true", help="each scene once")
    group.add_argument("--leave-one-dataset-out", action="store_true", help="each data set once")
    group.add_argument(
        "--accelerate",
        default="",
        metavar="OPTIONS",
        help='options of accelerate launch, as in "--num_processes 2"',
    )
    return parser
