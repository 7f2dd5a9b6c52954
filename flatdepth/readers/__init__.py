"""Raw data layouts as streams of ``RawFrame``: one reader per layout."""

from flatdepth.readers.art import ArtReader
from flatdepth.readers.folder import FolderReader
from flatdepth.readers.hypersim import HypersimReader
from flatdepth.readers.nyu import NyuReader
from flatdepth.readers.vkitti2 import VKitti2Reader

__all__ = ["ArtReader", "FolderReader", "HypersimReader", "NyuReader", "VKitti2Reader"]
