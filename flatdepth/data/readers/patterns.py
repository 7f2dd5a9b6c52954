"""Patterns of file names with wildcards, and which files belong together by them."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from flatdepth.data.readers.files import make_key
from flatdepth.errors import UserError

_DIRECTORIES = r"(?:(?<=/)|^)\*\*/"
_WITHIN_NAME = r"\*+|\?|\[!?[^\]/]+\]"
_WILDCARDS = re.compile(f"{_DIRECTORIES}|(?:{_WITHIN_NAME})+")


def wildcards(glob: str) -> Sequence[str]:
    """The runs of wildcards of a pattern; each ``**/`` stands alone."""
    return _WILDCARDS.findall(glob)


def match(glob: str, paths: Collection[str]) -> dict[tuple[str, ...], str]:
    """What each run of wildcards stands for -> path.

    The pattern's other text is fixed, so different paths never have the same parts.
    """
    pattern = regex(glob)
    matches = (re.fullmatch(pattern, path) for path in paths)
    return {found.groups(): found[0] for found in matches if found}


def beside(
    files: Mapping[tuple[str, ...], str], others: Mapping[tuple[str, ...], str], glob: str
) -> dict[str, str]:
    """file -> the one of a pattern whose wildcards stand for the first ones of the file's."""
    runs = len(wildcards(glob))
    return {file: others[parts[:runs]] for parts, file in files.items() if parts[:runs] in others}


def regex(glob: str) -> str:
    """A pattern as a regular expression with a group for each run of wildcards."""
    literals = _WILDCARDS.split(glob)
    runs = [f"({_translate(run)})" for run in wildcards(glob)]
    pattern = re.escape(literals[0])
    for run, literal in zip(runs, literals[1:], strict=True):
        pattern += run + re.escape(literal)
    return pattern


def is_scene_rule(rule: str) -> bool:
    """Whether ``scene_of`` knows a rule."""
    named = rule in ("parent", "file", "dataset")
    return named or rule.isdecimal() or bool(wildcards(rule))


def scene_of(image: str, rule: str, dataset: str) -> str:
    """The scene of an image.

    Args:
        image: its path.
        rule: ``parent`` (its directory), a number n (its first n directories), ``file`` (itself),
            ``dataset``, or a pattern: the start of the path that it matches.
        dataset: the name for what has no directory.

    Raises:
        UserError: the pattern matches no start of the path.
    """
    directories = make_key(image).split("/")[:-1]
    if wildcards(rule):
        start = re.match(regex(rule), image)
        if start is None:
            raise UserError(f"scene_from: {rule} is no start of {image}")
        directories = [make_key(image)[: start.end()].rstrip("/")]
    elif rule == "file":
        return make_key(image)
    elif rule == "dataset":
        directories = []
    elif rule != "parent":
        directories = directories[: int(rule)]
    return "/".join(directories) or dataset


def alone(
    images: Mapping[tuple[str, ...], str], depths: Mapping[tuple[str, ...], str]
) -> dict[tuple[str, ...], str]:
    """The depth files under the parts of the images that they are alone with, or their own."""
    counts = [Counter(parts[:-1] for parts in files) for files in (images, depths)]
    image_of = {parts[:-1]: parts for parts in images}
    return {
        image_of[parts[:-1]] if all(n[parts[:-1]] == 1 for n in counts) else parts: path
        for parts, path in depths.items()
    }


def in_time(
    images: Mapping[tuple[str, ...], str], depths: Mapping[tuple[str, ...], str], limit_s: float
) -> dict[tuple[str, ...], str]:
    """The depth files under the parts of the images that they belong to, or under their own.

    Two files belong together if each is the other's nearest in time, by at most ``limit_s``. Files
    whose last part is no number keep their parts.
    """
    groups: dict[tuple[str, ...], tuple[dict[float, str], dict[float, str]]] = {}
    for role, files in enumerate((images, depths)):
        for parts in files:
            if re.fullmatch(r"\d+(\.\d+)?", parts[-1]):
                group = groups.setdefault(parts[:-1], ({}, {}))
                group[role][float(parts[-1])] = parts[-1]
    paired = dict(depths)
    for others, (image_names, depth_names) in groups.items():
        image_times, depth_times = (np.sort([*names]) for names in (image_names, depth_names))
        if not (len(image_times) and len(depth_times)):
            continue
        nearest = _nearest(depth_times, image_times)
        for image, depth in enumerate(nearest.tolist()):
            mutual = _nearest(image_times, depth_times[depth : depth + 1])[0] == image
            if mutual and abs(image_times[image] - depth_times[depth]) <= limit_s:
                path = paired.pop((*others, depth_names[depth_times[depth]]))
                paired[(*others, image_names[image_times[image]])] = path
    return paired


def _nearest(
    times: Float64[np.ndarray, " n"], wanted: Float64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """Which of the sorted ``times`` is nearest to each of ``wanted``; of two the earlier.

    Distances are compared in whole microseconds, so that 0.4 is as far from 0.2 as from 0.6.
    """
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = np.maximum(after - 1, 0)
    earlier, later = (np.round(1e6 * d) for d in (wanted - times[before], times[after] - wanted))
    return np.where(earlier <= later, before, after)


def _translate(run: str) -> str:
    """A run of wildcards as a regular expression without groups."""
    if run == "**/":
        return "(?:[^/]+/)*"
    pattern = ""
    for token in re.findall(_WITHIN_NAME, run):
        if token.startswith("*"):
            pattern += "[^/]*"
        elif token == "?":
            pattern += "[^/]"
        else:
            body = token[1:-1].replace("\\", r"\\")
            pattern += f"[^/{body[1:]}]" if body.startswith("!") else f"[{body}]"
    return pattern
