"""Write the HTML report of a training run: ``python tools/report.py runs/NAME``."""

import argparse
from pathlib import Path

from flatdepth.errors import run_command
from flatdepth.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the HTML report of a training run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/NAME")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/report.html)")
    arguments = parser.parse_args()
    print(write_report(arguments.run, arguments.out))


if __name__ == "__main__":
    run_command(main)
