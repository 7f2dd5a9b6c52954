"""Shard sets for the Hugging Face Hub, with a card by which its viewer reads them."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from flatdepth.data.shards import (
    COLUMNS_NAME,
    DEPTH_EXT,
    INDEX_NAME,
    JSON_EXT,
    REGION_EXT,
    THING_EXT,
)
from flatdepth.data.shards.index import Index
from flatdepth.data.shards.read import ShardSet, resolve
from flatdepth.errors import UserError
from flatdepth.hub import CARD, Upload

_ABSOLUTE = re.compile(r"(?:[/~]|[A-Za-z]:[/\\]).*[/\\]")
_COLUMNS = {
    DEPTH_EXT: "depth in the codes of the source, which the JSON explains and flatdepth decodes",
    JSON_EXT: "camera in pixels (centres at integer + 0.5), size, scene, part; for flatdepth more",
    REGION_EXT: "mirrors, pictures and the like that are labelled, as numbers",
    THING_EXT: "which of them have a plane, as numbers of the rows in the JSON",
}
_IMAGE = "the picture, sRGB"
_TEMPLATES = Environment(
    loader=PackageLoader("flatdepth.data"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def shard_upload(
    url: str | os.PathLike[str], repo: str, *, licence: str, private: bool = False
) -> Upload:
    """A finished set on this machine as an upload: shards, index and card.

    Absolute paths among the options in the index are cut to their last part; everything else goes
    as it is. What was left out in packing is counted in the card and not named.

    Args:
        url: directory of the set.
        repo: id of the repository.
        licence: the hub's identifier.

    Raises:
        UserError: there is no finished set, it is elsewhere, or no repository can have that id.
    """
    if not isinstance(resolve(os.fspath(url))[0], LocalFileSystem):
        raise UserError(f"push sends local directories only; copy {url} to one first")
    with ShardSet.open(url) as shards:
        index = replace(shards.index, request=_public(shards.index.request))
        files: dict[str, Path | bytes] = {
            shard.name: Path(shards.root, shard.name) for shard in index.shards
        }
    document, columns = index.to_bytes()
    card = shard_card(index, repo, licence).encode()
    files |= {COLUMNS_NAME: columns, INDEX_NAME: document, CARD: card}
    return Upload(repo=repo, kind="dataset", files=files, private=private)


def shard_card(index: Index, repo: str, licence: str) -> str:
    """The card of a set as Markdown, with the header that the Hugging Face Hub reads."""
    is_depth = index.kind == "depth"
    counts = {ext: int((table[:, 0] >= 0).sum()) for ext, table in index.members.items()}
    header = DatasetCardData(
        license=licence,
        pretty_name=index.dataset,
        task_categories=["depth-estimation"] if is_depth else None,
        size_categories=size_category(len(index)),
        tags=["webdataset", "flatdepth"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
        dataset_info={"features": _features([ext for ext, n in counts.items() if n])},
    )
    splits = {name: n for name, n in index.splits.counts().items() if name}
    sizes = [f"{height} x {width}" for height, width in index.sizes.tolist()]
    options = dict(cast(Mapping[str, object], index.request.get("options", {})))
    text = _TEMPLATES.get_template("card.md").render(
        index=index,
        repo=repo,
        licence=licence,
        is_depth=is_depth,
        size=" and ".join(size for size, _ in Counter(sizes).most_common(3)),
        megabytes=sum(shard.bytes for shard in index.shards) / 1e6,
        splits=", ".join(f"{name} {n}" for name, n in sorted(splits.items())),
        columns=[(ext, _COLUMNS.get(ext, _IMAGE), n) for ext, n in counts.items() if n],
        left_out=", ".join(f"{n} ({reason})" for reason, n in sorted(index.skipped.items())),
        options=[
            (name, json.dumps(value, ensure_ascii=False))
            for name, value in sorted(options.items())
            if value not in ("", [], False)
        ],
    )
    return str(DatasetCard(f"---\n{header.to_yaml()}\n---\n\n{text}\n"))


def _features(exts: Sequence[str]) -> list[dict[str, Any]]:
    """The columns as ``datasets`` names their types.

    Without them it would take those of the first samples, and refuse a set where only some samples
    have, say, a map of regions.
    """
    about: list[dict[str, Any]] = [{"name": "K_px", "sequence": {"sequence": "float64"}}]
    about += [{"name": name, "dtype": "string"} for name in ("key", "scene", "split", "dataset")]
    about += [{"name": name, "dtype": "int64"} for name in ("height", "width")]
    special: dict[str, dict[str, Any]] = {
        DEPTH_EXT: {"dtype": "binary"},
        JSON_EXT: {"struct": about},
    }
    columns: list[dict[str, Any]] = [
        {"name": ext, **special.get(ext, {"dtype": "image"})} for ext in exts
    ]
    return columns + [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]


def size_category(samples: int) -> str:
    """The hub's class of size, such as ``1K<n<10K``."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    place = sum(samples >= 1000 * 10**k for k in range(len(names)))
    if place == len(names):
        return "n>1B"
    return f"{names[place - 1]}<n<{names[place]}" if place else "n<1K"


def _public(request: Mapping[str, object]) -> dict[str, Any]:
    """The request of an index without the directories of absolute paths."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(entry) for key, entry in value.items()}
        return _ABSOLUTE.sub("", value) if isinstance(value, str) else value

    return {name: cut(value) for name, value in request.items()}
