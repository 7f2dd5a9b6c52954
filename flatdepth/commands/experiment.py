"""Train variants of a configuration and judge them on real mirrors and pictures.

flatdepth experiment --config FILE
flatdepth experiment --config FILE --accelerate "--num_processes 2"

Every arm is trained with each seed, in RUNS/NAME/ARM-SEED, launched by accelerate, and judged on
the frames of the bench by their region maps. The same command goes on after an interruption; what
has finished is neither run nor judged again. At the end: a table, experiment.json, results.md,
ratios.svg, ratios_dark.svg and pictures.png in RUNS/NAME.
"""

import argparse
import json

from flatdepth.cli import Parser, as_called, called, parse_config


def main(argv: list[str]) -> None:
    parser = Parser(prog=called("experiment"), usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument(
        "--accelerate", default="", metavar="OPTIONS", help="options of accelerate launch"
    )
    own, others = parser.parse_known_args(argv)
    from tqdm import tqdm

    from flatdepth.judge.experiment import (
        ExperimentConfig,
        Judged,
        as_json,
        judge_run,
        markdown,
        outcomes,
        picture_sheet,
        planned,
        ratio_plot,
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
    write_atomic(folder / "results.md", f"{markdown(table)}\n".encode())
    for name, dark in (("ratios.svg", False), ("ratios_dark.svg", True)):
        write_atomic(folder / name, ratio_plot(table, dark=dark))
    firsts = {arm: files[0] for arm, files in weights.items()}
    save_png(picture_sheet(experiment, firsts, device), folder / "pictures.png")
    print(f"\n{markdown(table)}\n")
    print(folder / "experiment.json")
    print(folder / "pictures.png")
