"""Readers that draw what they give: rooms with exact depth, and pictures to hang in them."""

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flatdepth.config import SEED
from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.shards.codec import encode_log_u16
from flatdepth.errors import expect_within
from flatdepth.rooms.frames import frame_key, render_room, room_name
from flatdepth.rooms.pictures import render_picture
from flatdepth.types import RawFrame


def _jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class RoomsReader:
    """Generated rooms with exact depth; each room is one scene."""

    raw: str = ""
    """Unused: there is nothing to read."""
    scenes: int = 40
    """Number of rooms."""
    frames_per_scene: int = 6
    """Views of each room."""
    height: int = 252
    """Of the images, in pixels."""
    width: int = 336
    """Of the images, in pixels."""
    seed: int = 0
    """Decides all rooms; rooms of different seeds have nothing in common."""
    dataset: str = "rooms"
    """Short name of the data set."""

    def __post_init__(self) -> None:
        expect_within("scenes", self.scenes, 1, 10**6)
        expect_within("frames_per_scene", self.frames_per_scene, 1, 10**4)
        expect_within("height", self.height, 16, 4096)
        expect_within("width", self.width, 16, 4096)
        expect_within("seed", self.seed, *SEED)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "depth"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.1, 200.0)

    def list(self) -> Listing:
        """Name the frames: ``room_0003/frame_02``."""
        pairs = [(s, f) for s in range(self.scenes) for f in range(self.frames_per_scene)]
        items = [Item(key=frame_key(s, f), scene=room_name(s)) for s, f in pairs]
        return Listing(items=sorted(items, key=lambda item: item.key))

    def read(self, item: Item) -> RawFrame:
        """Draw one frame."""
        room, view = item.key.split("/")
        frame = render_room(
            self.seed,
            int(room.removeprefix("room_")),
            int(view.removeprefix("frame_")),
            self.height,
            self.width,
        )
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=_jpeg(frame.image),
            image_ext="jpg",
            width=self.width,
            height=self.height,
            depth=encode_log_u16(frame.depth_m),
            K_px=frame.K_px,
            split=item.split,
            meta=frame.meta,
        )


@dataclass(frozen=True, slots=True)
class PicturesReader:
    """Generated pictures that look deep: rooms, corridors, streets, landscapes, in six styles."""

    raw: str = ""
    """Unused: there is nothing to read."""
    pictures: int = 24
    """Number of pictures; 24 have every motif in every style."""
    height: int = 252
    """Together with ``width``: pixels per picture; aspect ratios vary."""
    width: int = 336
    """See ``height``."""
    seed: int = 0
    """Decides all pictures."""
    dataset: str = "pictures"
    """Short name of the collection."""

    def __post_init__(self) -> None:
        expect_within("pictures", self.pictures, 1, 10**6)
        expect_within("height", self.height, 16, 4096)
        expect_within("width", self.width, 16, 4096)
        expect_within("seed", self.seed, *SEED)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "art"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, math.inf)

    def list(self) -> Listing:
        """Name the pictures: ``picture_0007``, each its own scene."""
        keys = sorted(f"picture_{index:04d}" for index in range(self.pictures))
        return Listing(items=[Item(key=key, scene=key) for key in keys])

    def read(self, item: Item) -> RawFrame:
        """Draw one picture."""
        number = int(item.key.removeprefix("picture_"))
        image, meta = render_picture(self.seed, number, self.height, self.width)
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=_jpeg(image),
            image_ext="jpg",
            width=image.shape[1],
            height=image.shape[0],
            split=item.split,
            meta={"seed": self.seed, **meta},
        )
