"""Shard sets: standard WebDataset tars with an index that makes every sample a range read.

A shard set is one directory (or URL prefix)::

    index.json              written last: a set without it is unfinished; signed, see ``index``
    index.safetensors       one row per sample, in columns that are mapped into memory
    <dataset>-000000.tar    <key>.jpg|png|webp, <key>.depth.fdz, <key>.json, <key>.region.png where
                            flat things are labelled, <key>.thing.png where planes are given for
                            them, then the next key
    skipped.jsonl           one line per frame left out, with the reason

The tars are byte-deterministic and carry no path to trust: a member name is a key and an
extension, and only the extensions above are ever decoded.
"""

import re

INDEX_NAME = "index.json"
COLUMNS_NAME = "index.safetensors"
SKIPPED_NAME = "skipped.jsonl"
WORK_DIR = ".pack"
DEPTH_EXT = "depth.fdz"
JSON_EXT = "json"
REGION_EXT = "region.png"
THING_EXT = "thing.png"
IMAGE_EXTS = ("jpg", "png", "webp")
KNOWN_EXTS = {JSON_EXT, DEPTH_EXT, REGION_EXT, THING_EXT, *IMAGE_EXTS}

_FORBIDDEN = r"/\\:\x00-\x1f\x7f\ud800-\udfff"
_KEY = re.compile(rf"(?!.*(?:^|/)\.{{1,2}}/)(?:[^{_FORBIDDEN}]+/)*[^.{_FORBIDDEN}]+")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9]{6,}\.tar")
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def is_key(key: str) -> bool:
    """Whether ``key`` is safe as a tar member and file name: relative, its last part dotless."""
    return _KEY.fullmatch(key) is not None


def is_dataset_name(name: str) -> bool:
    """Whether ``name`` can begin a shard's file name."""
    return _DATASET.fullmatch(name) is not None


def is_shard_name(name: str) -> bool:
    """Whether ``name`` can be a shard's file name, in the directory of its set."""
    return _SHARD_NAME.fullmatch(name) is not None


def shard_name(dataset: str, number: int) -> str:
    """The file name of a data set's shard ``number``, counted from 0."""
    return f"{dataset}-{number:06d}.tar"
