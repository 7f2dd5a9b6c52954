"""flatdepth: train monocular depth models not to be fooled by flat things that show a scene.

What ``__all__`` names is imported when it is first used, so that ``import flatdepth`` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatdepth.api import configure, evaluate, load, open_shards, train
    from flatdepth.augment import FlatPaste, Photometric
    from flatdepth.config import TrainConfig

__version__ = "0.1.0"

__all__ = [
    "FlatPaste",
    "Photometric",
    "TrainConfig",
    "configure",
    "evaluate",
    "load",
    "open_shards",
    "train",
]

_MODULES = {
    "FlatPaste": "flatdepth.augment",
    "Photometric": "flatdepth.augment",
    "TrainConfig": "flatdepth.config",
    "configure": "flatdepth.api",
    "evaluate": "flatdepth.api",
    "load": "flatdepth.api",
    "open_shards": "flatdepth.api",
    "train": "flatdepth.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'flatdepth' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
