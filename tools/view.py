"""``flatdepth view`` as a script."""

import sys

from flatdepth.cli import run_command
from flatdepth.commands.view import main

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
