"""Raw data layouts as streams of ``RawFrame``: one reader per layout, listed in ``READERS``."""

from flatdepth.data.readers.art import ArtReader
from flatdepth.data.readers.folder import FolderReader
from flatdepth.data.readers.hypersim import HypersimReader
from flatdepth.data.readers.lists import ListReader
from flatdepth.data.readers.nyu import NyuReader
from flatdepth.data.readers.rooms import RoomsReader
from flatdepth.data.readers.synmirror import SynMirrorReader
from flatdepth.data.readers.vkitti2 import VKitti2Reader

__all__ = [
    "READERS",
    "ArtReader",
    "FolderReader",
    "HypersimReader",
    "ListReader",
    "NyuReader",
    "SynMirrorReader",
    "VKitti2Reader",
]

READERS: dict[str, tuple[type, str]] = {
    "hypersim": (HypersimReader, "Hypersim as downloaded (rendered rooms, float16 distances)"),
    "vkitti2": (VKitti2Reader, "Virtual KITTI 2 as downloaded (rendered streets, cm)"),
    "nyu": (NyuReader, "NYU Depth V2 (Kinect, h5 files or the labelled .mat)"),
    "folder": (FolderReader, "any image and depth files, paired by two patterns"),
    "list": (ListReader, "image and depth files, paired by the lines of a text file"),
    "synmirror": (SynMirrorReader, "SynMirror (rendered mirrors, HDF5 files of BlenderProc)"),
    "art": (ArtReader, "a directory of pictures, to hang on walls"),
    "rooms": (RoomsReader, "rooms generated on the spot, no raw data needed"),
}
"""Command of the packing tool -> the reader, whose fields are its options, and what it packs."""
