"""Can a network tell where something was pasted?

flatdepth borders --config FILE [--images 400] [--out DIR]

Trains a small classifier on patches of 32 x 32 pixels of luminance astride the outlines of pastes
and astride edges of the clean images, and tests it on scenes that it has not seen: 50 % would be
chance. Three ways of pasting: naive (a hard mask), flatdepth, and flatdepth with its photometric
stage. Takes every option of training for the data and the pastes; --out writes the figures and a
picture of the patches of each way.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from flatdepth.bench.borders import PATCH_PX, classify, gather, patch_sheet
from flatdepth.cli import Parser, as_called, called, number, parse_config
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.show.pictures import save_png


def main(argv: list[str]) -> None:
    """Parse the command line, gather patches, classify, print."""
    parser = Parser(prog=called("borders"), description=as_called("borders", __doc__))
    parser.add_argument(
        "--images", type=number(1, 10**5), default=400, help="training images to look at"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="figures and pictures, a new folder"
    )
    own, others = parser.parse_known_args(argv)
    config = parse_config(TrainConfig, others, prog=called("borders"), description=None)
    if own.out is not None and own.out.exists():
        raise UserError(f"--out: {own.out} exists; choose a new folder")
    with tqdm(total=own.images, desc="patches", unit=" images", disable=None) as bar:
        found = gather(config, own.images, lambda done, _: bar.update(done - bar.n))
    figures = {}
    for way, patches in found.items():
        result = classify(patches, config.seed)
        figures[way] = asdict(result)
        print(
            f"{way:24} {result.accuracy:6.1%} +- {result.spread:.1%} of {result.patches} patches "
            f"({result.folds} folds of scenes)"
        )
        if own.out is not None:
            own.out.mkdir(parents=True, exist_ok=True)
            save_png(patch_sheet(patches), own.out / f"{way.replace(' ', '_')}.png")
    if own.out is not None:
        facts = {"patch_px": PATCH_PX, "torch": torch.__version__, "ways": figures}
        (own.out / "borders.json").write_text(json.dumps(facts, indent=1))
