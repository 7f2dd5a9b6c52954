"""The demo shard sets of the quickstart, packed the first time they are asked for."""

from pathlib import Path

from flatdepth.data.pack import pack
from flatdepth.data.readers.rooms import PicturesReader

DEMO_SETS = {"demo_pictures": PicturesReader(pictures=48)}

DEMO_ART = ("shards/demo_art", "shards/demo_pictures")
"""The art of the quickstart."""


def ensure_demo(path: str) -> None:
    """Pack the demo set that ``path`` ends in, if it is one and is not there yet."""
    target = Path(path)
    reader = DEMO_SETS.get(target.name)
    if reader is not None and not (target / "index.json").exists():
        print(f"packing {target} (once) ...", flush=True)
        pack(reader, str(target))
