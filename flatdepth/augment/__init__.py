"""The paste stage: mirrors and art with exact planar truth; and what a camera does to an image.

``FlatPaste`` and ``Photometric`` are Kornia augmentations for anybody's training loop.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatdepth.augment.flat_paste import (
        FlatPaste,
        intrinsics_to_keypoints,
        keypoints_to_intrinsics,
    )
    from flatdepth.augment.photometric import Photometric

__all__ = ["FlatPaste", "Photometric", "intrinsics_to_keypoints", "keypoints_to_intrinsics"]


def __getattr__(name: str) -> Any:
    """Import the stages when they are asked for: kornia takes seconds, and planning needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flatdepth.augment import flat_paste, photometric

    return getattr(photometric if name == "Photometric" else flat_paste, name)
