"""Collections of pictures (paintings, prints, posters): any image files below a directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from flatdepth.data.readers.base import Item, Listing
from flatdepth.data.readers.files import (
    EXTENSIONS,
    OTHER_IMAGES,
    Tree,
    ending,
    make_key,
    read_art,
    read_table,
    sort_items,
    warn_of_unread,
)
from flatdepth.errors import expect_within, printable
from flatdepth.types import RawFrame

_CREDITS = "CREDITS.tsv"


@dataclass(frozen=True, slots=True)
class ArtReader:
    """Pictures without depth; each one is its own scene.

    If a directory holds a ``CREDITS.tsv`` with the tab-separated columns ``file``, ``artist`` and
    ``title``, artist and title of its pictures go into ``meta``.
    """

    raw: str
    """Directory or URL; all images in it and below are taken."""
    max_side: int = 1024
    """Larger pictures are shrunk to this many pixels, since they are pasted small; 0: never."""
    dataset: str = "art"
    """Short name of the collection."""

    def __post_init__(self) -> None:
        expect_within("max_side", self.max_side, 0, 10**5)

    @property
    def kind(self) -> Literal["depth", "art"]:
        return "art"

    @property
    def depth_range_m(self) -> tuple[float, float]:
        return (0.0, float("inf"))

    def list(self) -> Listing:
        """Find the pictures. Warns of images in other formats.

        Raises UserError if there are no pictures or a credits file is damaged.
        """
        _read_credits.cache_clear()  # the file may have been mended since the last listing
        tree = Tree(self.raw)
        paths = dict.fromkeys(tree.walk())  # in order, with fast look-up
        items = []
        for path in paths:
            if ending(path) not in EXTENSIONS:
                continue
            key = make_key(path)
            files = {"image": tree.url(path)}
            directory, slash, _ = path.rpartition("/")
            credits_path = f"{directory}{slash}{_CREDITS}"
            if credits_path in paths:
                files["credits"] = tree.url(credits_path)
                _read_credits(files["credits"])
            items.append(Item(key=key, scene=key, files=files))
        if not items:
            raise tree.layout_error(f"image files ({', '.join(sorted(EXTENSIONS))})")
        warn_of_unread(self.raw, [path for path in paths if ending(path) in OTHER_IMAGES])
        return Listing(items=sort_items(items))

    def read(self, item: Item) -> RawFrame:
        """Read one picture. Raises BadFrame if it is damaged."""
        url = item.files["image"]
        picture = read_art(url, self.max_side)
        path = Tree(self.raw).path(url)
        meta: dict[str, object] = {"image": printable(path)}
        if "credits" in item.files:
            meta |= _read_credits(item.files["credits"]).get(path.rpartition("/")[2], {})
        return RawFrame(
            key=item.key,
            dataset=self.dataset,
            scene=item.scene,
            image=picture.image,
            image_ext=picture.image_ext,
            width=picture.width,
            height=picture.height,
            split=item.split,
            meta=meta,
        )


@lru_cache(maxsize=64)
def _read_credits(url: str) -> Mapping[str, Mapping[str, str]]:
    """file name -> artist and title."""
    rows = read_table(url, ("file", "artist", "title"), delimiter="\t")
    return {row["file"]: {"artist": row["artist"], "title": row["title"]} for row in rows}
