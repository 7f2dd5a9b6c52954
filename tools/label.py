"""``flatdepth label`` as a script."""

import sys

from flatdepth.cli import run_command
from flatdepth.commands.label import main

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
