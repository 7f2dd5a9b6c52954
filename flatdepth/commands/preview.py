"""Show exactly what training sees at an optimiser step, as a contact sheet or an HTML page.

flatdepth preview --out sheet.png                               the quickstart's first batch
flatdepth preview --config FILE --seed 3 --rows 20 --out sheet.png
flatdepth preview --replay runs/NAME --step N --html page.html  what that run saw at step N
"""

import argparse
from pathlib import Path

from flatdepth.cli import Parser, as_called, called, number, parse_config
from flatdepth.config import TrainConfig
from flatdepth.errors import UserError
from flatdepth.resources import QUICKSTART
from flatdepth.show.pictures import save_png, write_atomic


def main(argv: list[str]) -> None:
    parser = own_options()
    own, others = parser.parse_known_args(argv)
    config = parse_config(
        TrainConfig,
        config_arguments(own.replay, others),
        prog=called("preview"),
        description=f"{as_called('preview', __doc__)}\n{parser.format_help().strip()}",
    )
    check_targets(own.out, own.html)
    from flatdepth.report.preview import preview_page, preview_rows, preview_sheet

    rows = preview_rows(config, own.step, own.rows)
    if own.out is not None:
        save_png(preview_sheet(rows, config), own.out)
        print(own.out)
    if own.html is not None:
        write_atomic(own.html, preview_page(rows, config).encode("utf-8", "replace"))
        print(own.html)


def own_options() -> Parser:
    """What is shown and where it goes; all other options are training's."""
    parser = Parser(prog=called("preview"), usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group("what to show")
    group.add_argument(
        "--step", type=number(0, 10**9), default=0, help="optimiser step, from 0 (default: 0)"
    )
    group.add_argument(
        "--rows",
        type=number(1, 1000),
        help="images from that step on (default: the batch of the step)",
    )
    group.add_argument("--out", type=Path, metavar="FILE.png", help="contact sheet to write")
    group.add_argument("--html", type=Path, metavar="FILE", help="HTML page to write")
    group.add_argument(
        "--replay", type=Path, metavar="RUN", help="run directory whose config.yaml is used"
    )
    return parser


def config_arguments(replay: Path | None, others: list[str]) -> list[str]:
    """The arguments that make the configuration; without any it is the quickstart's."""
    if replay is None:
        return others or [f"--config={QUICKSTART}"]
    config = replay / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"--replay: {replay} holds no config.yaml; give the directory of a training run, such "
            "as runs/NAME"
        )
    if others:
        raise UserError(
            f"--replay: expected no other configuration, got {others[0]}; to change something, use "
            f"--config {config}"
        )
    return [f"--config={config}"]


def check_targets(out: Path | None, html: Path | None) -> None:
    """Refuse what cannot be written before the work is done."""
    if out is None and html is None:
        raise UserError("nothing to write: name a contact sheet with --out or a page with --html")
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"--out: expected a name that ends in .png, got {out}")
    for option, path in (("--out", out), ("--html", html)):
        if path is not None and path.is_dir():
            raise UserError(f"{option}: {path} is a directory; give the name of a file to write")
