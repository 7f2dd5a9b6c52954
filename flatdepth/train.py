"""``accelerate launch -m flatdepth.train``; not to be imported, it would hide the function."""

import sys

from flatdepth.cli import run_command
from flatdepth.commands.train import main

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
