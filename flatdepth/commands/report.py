"""Write one HTML page about a training run, or about several side by side.

flatdepth report runs/NAME                              writes runs/NAME/report.html
flatdepth report runs/A runs/B --out comparison.html    figures of B against those of A

The runs' weights are judged on what the first run holds out, clean and pasted. The page loads
nothing from anywhere; open it in any browser, or send it to somebody.
"""

from pathlib import Path

from flatdepth.cli import Parser, as_called, called, number
from flatdepth.errors import UserError
from flatdepth.models.precision import best_device


def main(argv: list[str]) -> None:
    chosen = options().parse_args(argv)
    if chosen.out is None and len(chosen.run) > 1:
        raise UserError("--out: name the file to write, because there are several runs")
    out = chosen.out or chosen.run[0] / "report.html"

    from flatdepth.data.progress import picture_progress
    from flatdepth.report.page import write_comparison
    from flatdepth.report.samples import Exhibits, judge_runs
    from flatdepth.show.run_page import read_run

    for run in chosen.run:
        read_run(run)
    exhibits: Exhibits | None = None
    why_not = "it was not asked for" if chosen.no_judging else ""
    if not chosen.no_judging:
        try:
            exhibits = judge_runs(
                chosen.run,
                weights=chosen.weights,
                images=chosen.images,
                size=chosen.size,
                worst=chosen.worst,
                device=best_device(),
                progress=picture_progress(),
            )
        except UserError as error:
            if len(chosen.run) > 1:
                raise
            why_not = str(error)
    print(write_comparison(chosen.run, out, exhibits, why_not=why_not))


def options() -> Parser:
    """The command line."""
    parser = Parser(prog=called("report"), description=as_called("report", __doc__))
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="run directories, such as runs/NAME")
    add("--out", type=Path, metavar="FILE", help="file to write (default: RUN/report.html)")
    add(
        "--weights",
        choices=("final", "best"),
        default="final",
        help="which weights are judged (default: final)",
    )
    add(
        "--images",
        type=number(0, 10**9),
        default=64,
        help="most held-out pictures per data set, evenly spaced; 0: all (default: 64)",
    )
    add(
        "--size",
        type=int,
        metavar="PX",
        help="shorter side of the network's input (default: that of the runs)",
    )
    add("--worst", type=number(0, 100), default=2, help="pictures to show per region (default: 2)")
    add(
        "--no_judging",
        action="store_true",
        help="use the runs' files alone: no intervals, worst pictures or point clouds",
    )
    return parser
