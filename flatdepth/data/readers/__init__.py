"""Raw data layouts as streams of ``RawFrame``: one reader per layout."""

from flatdepth.data.readers.art import ArtReader
from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.readers.hypersim import HypersimReader
from flatdepth.data.readers.nyu import NyuReader
from flatdepth.data.readers.vkitti2 import VKitti2Reader

__all__ = ["ArtReader", "FolderReader", "HypersimReader", "NyuReader", "VKitti2Reader"]
