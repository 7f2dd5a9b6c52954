"""Command lines built from configuration dataclasses by jsonargparse."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

from flatdepth.errors import UserError

Config = TypeVar("Config")


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults in the help, the description as it was written."""


def parse_config(
    kind: type[Config], arguments: Sequence[str], *, prog: str, description: str | None
) -> Config:
    """Build a configuration from ``--config FILE`` and ``--group.key value`` overrides.

    Raises:
        UserError: an unknown key, a value of the wrong type or one that the dataclass refuses.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        usage=f"{prog} [--config FILE] [--group.key VALUE ...] [--print_config]",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(kind)
    keys = sorted(vars(parser.get_defaults().as_flat()).keys() - {"config"})
    try:
        config = parser.instantiate(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        files = [arg for arg in arguments if arg.endswith((".yaml", ".yml", ".json"))]
        given = [arg.removeprefix("--").partition("=")[0] for arg in arguments if arg[:2] == "--"]
        in_file = files and not any(key in str(error) for key in given if key != "config")
        where = f"{files[-1].removeprefix('--config=')}: " if in_file else ""
        raise UserError(where + _one_sentence(str(error), keys, prog)) from error
    values = {name: value for name, value in vars(config).items() if name != "config"}
    return kind(**values)


def plain_text(message: str) -> str:
    """jsonargparse's message on one line, in plain words."""
    text = " ".join(message.split())
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = text.replace("typing.", "").replace("Expected a ", "expected ")
    text = text.replace("expected dot import path string: ", "expected {path: ...}, got ")
    return text.replace(". Got value: ", ", got ").rstrip(".")


def _one_sentence(message: str, keys: Sequence[str], prog: str) -> str:
    """jsonargparse's message as one line with the key, what was expected, and a suggestion."""
    text = plain_text(message)
    if text.startswith("data.train: ") and "not accepted" not in text:
        return f'{text}; as in --data.train "[{{path: shards/NAME}}]", see {prog} --help'
    unknown = re.search(r"(?:Option|arguments:|Key)\s+'?(?:--)?([\w.]+)'?", text)
    if unknown:
        leaves = {key.rpartition(".")[2]: key for key in keys} | {key: key for key in keys}
        near = difflib.get_close_matches(unknown[1], leaves, n=1, cutoff=0.5)
        if near:
            return f"{text}; did you mean '{leaves[near[0]]}'?"
    return f"{text}; see {prog} --help"
