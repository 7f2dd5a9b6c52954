"""Evaluate checkpoints on shard sets under a named protocol, side by side.

flatdepth evaluate --checkpoint C --data SHARDS [--protocol P] [--paste SEED] --out eval.json
flatdepth evaluate --checkpoint A --checkpoint B --data SHARDS --part val --paste 1
flatdepth evaluate --checkpoint C --data SHARDS --align metric --align median --align scale
flatdepth evaluate --benchmark booster --raw DIR --checkpoint dpt_large --checkpoint C

Every picture is evaluated clean and, with --paste, again with mirrors and art pasted into it.
Figures are means over images, with 95 % intervals from resampling the scenes; those of several
checkpoints come from the same pictures, so that their differences are paired.

With --benchmark it is a published test, under the protocol of its authors and beside the figures
that they print. A checkpoint may then also be a system of flatdepth compare (NAME, NAME=WEIGHTS),
and everything sees pictures as its authors resize them.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from flatdepth.cli import Parser, as_called, called, number
from flatdepth.config import MAX_DEPTH_M, SEED
from flatdepth.errors import UserError
from flatdepth.judge.protocol import ALIGNMENTS, FITS, PROTOCOLS
from flatdepth.models.precision import best_device

Value = TypeVar("Value")

_NOT_FOR_BENCHMARKS = (
    *("data", "part", "paste", "art", "trained_on"),
    *("protocol", "range", "align", "fit", "batch", "threads"),
)


def main(argv: list[str]) -> None:
    chosen = options().parse_args(argv)

    from flatdepth.data.demo import DEMO_ART
    from flatdepth.data.progress import picture_progress
    from flatdepth.judge.scoring import Request, judge
    from flatdepth.judge.tables import as_json, check_target, render, write_json

    if chosen.out is not None:
        check_target(chosen.out, chosen.overwrite)
    if chosen.benchmark is not None:
        _benchmark(chosen, argv)
        return
    if chosen.data is None or chosen.raw is not None:
        raise UserError("give either --data with shard sets, or --benchmark with its --raw")
    protocol = PROTOCOLS[chosen.protocol]
    if chosen.range is not None:
        protocol = dataclasses.replace(protocol, range_m=tuple(chosen.range))
    count = len(chosen.checkpoint)
    request = Request(
        checkpoints=tuple(chosen.checkpoint),
        kinds=per_checkpoint(chosen.kind, count, "--kind"),
        max_depths_m=per_checkpoint(chosen.max_depth_m, count, "--max_depth_m"),
        trained_on=per_checkpoint(chosen.trained_on, count, "--trained_on"),
        data=tuple(chosen.data),
        art=() if chosen.paste is None else tuple(chosen.art or DEMO_ART),
        part=chosen.part,
        protocol=protocol,
        alignments=tuple(chosen.align),
        fit=chosen.fit,
        size=chosen.size,
        paste_seed=chosen.paste,
        images=chosen.images,
        batch=chosen.batch,
        threads=chosen.threads,
        bootstrap=chosen.bootstrap,
    )
    device = best_device()
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
    verdict = judge(request, device, picture_progress())
    print(render(verdict))
    if chosen.out is not None:
        write_json(as_json(verdict, ["flatdepth", "evaluate", *argv]), chosen.out)
        print(f"\n{chosen.out}")


def _benchmark(chosen: argparse.Namespace, argv: list[str]) -> None:
    from flatdepth.benchmarks import BENCHMARKS
    from flatdepth.benchmarks.run import render, run
    from flatdepth.data.progress import picture_progress
    from flatdepth.judge.tables import write_json
    from flatdepth.predict.systems import Settings

    benchmark = BENCHMARKS[chosen.benchmark]
    if chosen.raw is None:
        raise UserError(
            f"--benchmark {benchmark.name} needs --raw, a directory of {benchmark.source}"
        )
    plain = options().parse_args(["--checkpoint", "-"])
    for name in _NOT_FOR_BENCHMARKS:
        if getattr(chosen, name) != getattr(plain, name):
            raise UserError(f"--{name}: a benchmark has its own protocol; leave --{name} out")
    count = len(chosen.checkpoint)
    kinds = per_checkpoint(chosen.kind, count, "--kind")
    depths_m = per_checkpoint(chosen.max_depth_m, count, "--max_depth_m")
    document = run(
        benchmark,
        chosen.raw,
        zip(chosen.checkpoint, kinds, depths_m, strict=True),
        Settings(size=chosen.size),
        best_device(),
        picture_progress(),
        images=chosen.images,
        bootstrap=chosen.bootstrap,
    )
    print(render(document))
    if chosen.out is not None:
        write_json({"command": ["flatdepth", "evaluate", *argv], **document}, chosen.out)
        print(f"\n{chosen.out}")


def options() -> Parser:
    """The command line."""
    from flatdepth.benchmarks import BENCHMARKS

    parser = Parser(prog=called("evaluate"), description=as_called("evaluate", __doc__))
    add = parser.add_argument_group("what is evaluated").add_argument
    add(
        "--checkpoint",
        action="append",
        required=True,
        metavar="FILE",
        help="weight file, its folder or a hub id; repeat it to compare several with the first",
    )
    add(
        "--kind",
        action="append",
        choices=("metric", "relative", "affine"),
        help="what a file predicts that does not say so; once for all files, or once for each",
    )
    add(
        "--max_depth_m",
        action="append",
        type=number(*MAX_DEPTH_M),
        metavar="METRES",
        help="largest depth of a metric file that does not say so; once for all, or once for each",
    )
    add(
        "--trained_on",
        action="append",
        type=names,
        metavar="NAMES",
        help="data sets that a file was trained on, as in hypersim,vkitti2 (none: ''), if its run "
        "does not say so; once for all files, or once for each",
    )
    add("--data", action="extend", nargs="+", metavar="SHARDS", help="shard sets")
    add("--benchmark", choices=tuple(BENCHMARKS), help="a published test in place of shard sets")
    add("--raw", metavar="DIR", help="its data, as downloaded and unpacked (docs/benchmarks.md)")
    add(
        "--part",
        choices=("all", "train", "val", "test"),
        default="all",
        help="which part of the sets: the official one, else train and val by held-out scenes "
        "as in training (default: all)",
    )
    add("--images", type=int, default=0, help="most images per set, evenly spaced (default: all)")
    add(
        "--paste",
        type=number(*SEED),
        metavar="SEED",
        help="evaluate every picture again with pastes of this seed",
    )
    add(
        "--art",
        action="extend",
        nargs="+",
        metavar="SHARDS",
        help="sets of pictures to paste (default: those of the quickstart)",
    )
    add = parser.add_argument_group("how").add_argument
    add(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="none",
        help="crop and depth range by name (default: none)",
    )
    add(
        "--range",
        type=float,
        nargs=2,
        metavar=("NEAR", "FAR"),
        help="depth range in metres in place of the protocol's",
    )
    add(
        "--align",
        action="append",
        choices=ALIGNMENTS,
        default=[],
        help="how predictions are aligned with the truth of each image; repeat it to compare "
        "several (default: metric for metric files, scale-shift-inverse for relative ones)",
    )
    add(
        "--fit",
        choices=FITS,
        default="least-squares",
        help="how alignments are fitted: least squares, or least absolute deviations "
        "(default: least-squares)",
    )
    add(
        "--size",
        type=int,
        metavar="PX",
        help="shorter side of the network's input, a multiple of 14 (default: that of the run "
        "which made the checkpoint, else 518)",
    )
    add("--batch", type=int, default=4, help="pictures per forward pass (default: 4)")
    add("--threads", type=int, default=2, help="threads that read and plan (default: 2)")
    add("--bootstrap", type=int, default=2000, help="resamples of the scenes (default: 2000)")
    add = parser.add_argument_group("where it goes").add_argument
    add("--out", type=Path, metavar="FILE", help="JSON file with all figures and rows")
    add("--overwrite", action="store_true", help="replace an earlier evaluation at --out")
    return parser


def names(text: str) -> frozenset[str]:
    """A list of names separated by commas."""
    return frozenset(name for name in text.split(",") if name)


def per_checkpoint(
    values: Sequence[Value] | None, count: int, option: str
) -> tuple[Value | None, ...]:
    """One value per checkpoint from an option given never, once, or once for each."""
    if not values:
        return (None,) * count
    if len(values) not in (1, count):
        raise UserError(
            f"{option}: expected once, or once for each of the {count} checkpoints, got "
            f"{len(values)} times"
        )
    return tuple(values) * (count if len(values) == 1 else 1)
