"""The command ``flatdepth``, also ``python -m flatdepth``."""

import sys
from importlib import import_module

import flatdepth
from flatdepth.cli import run_command
from flatdepth.commands import COMMANDS
from flatdepth.errors import UserError

OVERVIEW = """\
usage: flatdepth COMMAND ...

Train monocular depth models not to be fooled by mirrors, paintings and screens.

{commands}

flatdepth train without options runs the quickstart. flatdepth COMMAND --help says more.
"""


def main() -> None:
    """Run the command that the command line names, and exit."""
    run_command(lambda: run(sys.argv[1:]))


def run(argv: list[str]) -> int | None:
    """Run a command and return its exit code; only its own module is imported.

    Raises:
        UserError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
        print(OVERVIEW.format(commands=rows), end="")
        return 0
    if argv[0] == "--version":
        print(f"flatdepth {flatdepth.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; choose one of {', '.join(COMMANDS)}")
    code: int | None = import_module(f"flatdepth.commands.{argv[0]}").main(argv[1:])
    return code


if __name__ == "__main__":
    main()
