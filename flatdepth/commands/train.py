"""Train a depth model that flat pictures of scenes do not fool.

flatdepth train                              the quickstart, on CPU or GPU
flatdepth train --config FILE --name NAME    your own run
flatdepth train --help                       every knob

On several GPUs: accelerate launch -m flatdepth.train --config FILE
"""

from flatdepth.cli import as_called, called, end_soon, parse_config
from flatdepth.config import TrainConfig
from flatdepth.resources import QUICKSTART


def main(argv: list[str]) -> None:
    """Parse the command line and train."""
    config = parse_config(
        TrainConfig,
        argv or [f"--config={QUICKSTART}"],
        prog=called("train"),
        description=as_called("train", __doc__),
    )
    from flatdepth.training.loop import train

    if not train(config)["finished"]:
        end_soon(0)
