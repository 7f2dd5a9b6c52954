"""JSON, YAML and XML that anybody may have written, edited or damaged."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any
from xml.etree import ElementTree

import yaml

MOST_VALUES = 100_000
"""What a YAML text may hold with its aliases written out; ours hold some 150."""


def parse_json(text: str | bytes) -> Any:
    """``json.loads``. Raises ValueError, in one line, for whatever is wrong with the text."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested without end") from error


def parse_yaml(text: bytes) -> Any:
    """``yaml.safe_load`` of UTF-8 that stays small when its aliases are followed.

    Raises:
        ValueError: in one line, whatever is wrong with the text.
    """
    try:
        document = yaml.safe_load(text.decode("utf-8-sig"))
        endless = len(list(islice(_values(document), MOST_VALUES))) == MOST_VALUES
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("nested without end") from error
    if endless:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
    return document


def parse_xml(text: bytes) -> ElementTree.Element:
    """The root of an XML text in UTF-8.

    Raises:
        ValueError: in one line, whatever is wrong with the text, or it declares a document type,
            whose entities could expand without end.
    """
    decoded = text.decode("utf-8-sig")
    if "<!DOCTYPE" in decoded:
        raise ValueError("it declares a document type; leave that out")
    try:
        return ElementTree.fromstring(decoded)
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from error


def _values(value: object) -> Iterator[object]:
    yield value
    inside = value.values() if isinstance(value, dict) else value
    if isinstance(inside, str | bytes) or not hasattr(inside, "__iter__"):
        return
    for inner in inside:
        yield from _values(inner)
