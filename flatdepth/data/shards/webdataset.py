"""Frames out of WebDataset pipelines, anybody's and our own.

A sample's depth means nothing without its JSON, so it is decoded as a whole::

    webdataset.WebDataset(urls, shardshuffle=False).map(flatdepth_decoder)
"""

from collections.abc import Mapping
from typing import Any

from flatdepth.data.shards.codec import decode_frame
from flatdepth.data.shards.read import raw_frame
from flatdepth.errors import BadFrame, UserError
from flatdepth.types import Frame

_FIELDS = ("image", "depth_m", "K_px", "key", "dataset", "scene")


def frame_of(sample: Mapping[str, Any]) -> Frame:
    """Decode a sample.

    Args:
        sample: what WebDataset gives before any decoding: bytes by extension, beside ``__key__``
            and ``__url__``.

    Raises:
        UserError: it is damaged, no sample of a shard set, or a picture without depth.
    """
    parts = {ext: data for ext, data in sample.items() if isinstance(data, bytes)}
    try:
        return decode_frame(raw_frame(sample["__key__"], parts))
    except BadFrame as error:
        raise UserError(
            f"{sample['__url__']}: sample {sample['__key__']} is not a whole frame with depth "
            f"({error}); take a set of RGB-D frames that flatdepth pack wrote, or copy it again"
        ) from error


def flatdepth_decoder(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Decode a sample, for ``WebDataset.map``.

    Args:
        sample: as for ``frame_of``.

    Returns:
        ``__key__`` and ``__url__`` as they were; ``image`` (h, w, 3) uint8 sRGB; ``depth_m`` (h, w)
        float32 planar z in metres, NaN unknown, +inf sky; ``K_px`` (3, 3) float64 intrinsics;
        ``key``, ``dataset`` and ``scene``.

    Raises:
        UserError: as ``frame_of``.
    """
    frame = frame_of(sample)
    names = {name: sample[name] for name in ("__key__", "__url__")}
    return names | {name: getattr(frame, name) for name in _FIELDS}
