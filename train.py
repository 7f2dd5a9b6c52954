"""Train a depth model that flat pictures of scenes do not fool.

accelerate launch train.py                              the quickstart, on CPU or GPU
accelerate launch train.py --config FILE --name NAME    your own run
python train.py --help                                  every knob
"""

import sys
from pathlib import Path

from flatdepth.cli import parse_config, run_command
from flatdepth.config import TrainConfig

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main() -> None:
    arguments = sys.argv[1:] or [f"--config={QUICKSTART}"]
    config = parse_config(TrainConfig, arguments, prog="train.py", description=__doc__)
    from flatdepth.training.loop import train

    train(config)


if __name__ == "__main__":
    run_command(main)
