"""Which samples a run trains on, validates on and hangs on the walls."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8
from PIL import Image

from flatdepth.augment.draw.content import PICTURE_CACHE, reduced
from flatdepth.config import DataConfig, SetConfig
from flatdepth.data.demo import ensure_demo
from flatdepth.data.order import Locality, scene_split
from flatdepth.data.shards import REGION_EXT
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.remote import Reading
from flatdepth.data.streams import Stream, is_url_list
from flatdepth.errors import UserError
from flatdepth.types import Frame


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Some samples of a shard set.

    Attributes:
        shards: the set.
        rows: (N,) samples of the set, ascending.
        first_identity: identity of the set's sample 0 in this run.
    """

    shards: ShardSet
    rows: Int64[np.ndarray, " n"]
    first_identity: int

    def __len__(self) -> int:
        return len(self.rows)

    def frame(self, place: int) -> Frame:
        """Read and decode the sample at a place of the subset."""
        return self.shards.frame(self.rows[place])

    @cached_property
    def labelled(self) -> Bool[np.ndarray, " n"]:
        """Which samples have a map of their own flat things."""
        regions = self.shards.index.members.get(REGION_EXT)
        return np.zeros(len(self), bool) if regions is None else regions[self.rows, 0] >= 0

    @cached_property
    def is_labelled(self) -> bool:
        """Whether any sample has one. The set is judged by these then, without pastes."""
        return bool(self.labelled.any())

    def identity(self, place: int) -> int:
        """Number of the sample in the run: the same for the same config, whatever the split."""
        return self.first_identity + int(self.rows[place])


class Pictures:
    """The pictures of all art sets, decoded on demand and kept while they fit the cache."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self._sets = sets
        self._starts = np.cumsum([0, *(len(shards) for shards in sets)])
        sizes = [shards.index.sizes for shards in sets]
        height, width = np.concatenate([np.zeros((0, 2)), *sizes]).T.astype(np.float64)
        self._aspects = width / height
        self._cached = lru_cache(maxsize=PICTURE_CACHE)(self._decode)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def aspects(self) -> Float64[np.ndarray, " pictures"]:
        """Width / height of every picture."""
        return self._aspects

    def picture(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        """A picture, reduced to ``PICTURE_SIDE`` pixels on its longer side if it is larger."""
        return self._cached(number)

    def _decode(self, number: int) -> np.ndarray:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        picture = self._sets[which].image(number - int(self._starts[which]))
        return reduced(Image.fromarray(picture))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The opened data of a run.

    Attributes:
        train: per training set with an index its training samples.
        weights: shares of the training sets in what is trained on.
        locality: per training set with an index, how long its neighbours stay together.
        streams: per training set its tars, if ``data.loader`` is webdataset; else none.
        val: the samples held out, or those of the validation sets.
        pictures: what can be hung.
        digests: per set's path a digest of its content.
    """

    train: tuple[Subset, ...]
    weights: tuple[float, ...]
    locality: tuple[Locality, ...]
    streams: tuple[Stream, ...]
    val: tuple[Subset, ...]
    pictures: Pictures
    digests: Mapping[str, str]

    def val_places(self, most: int) -> list[tuple[int, int]]:
        """(subset, place) of at most ``most`` validation samples, evenly spaced; 0: all."""
        ends = np.cumsum([len(subset) for subset in self.val])
        numbers = np.arange(ends[-1])
        if 0 < most < len(numbers):
            numbers = np.linspace(0, len(numbers) - 1, most).round().astype(np.int64)
        which = np.searchsorted(ends, numbers, side="right")
        places = numbers - np.concatenate([[0], ends])[which]
        return list(zip(which.tolist(), places.tolist(), strict=True))


def open_corpus(config: DataConfig) -> Corpus:
    """Open the shard sets of a run and split them; demo sets are packed on first use.

    The official split of a set is honoured: its ``train`` samples train and its ``val`` samples
    validate, ``test`` is never touched. Sets without one hold out whole scenes.

    Raises:
        UserError: no training set, a set of the wrong kind, nothing left to train or validate on,
            or a set that would validate on what it trains on.
    """
    if not config.train:
        raise UserError(
            "data.train: expected at least one shard set, found none; pack one with flatdepth pack "
            "and name it as [{path: shards/NAME}]"
        )
    streamed = config.loader == "webdataset"
    indexed = [entry for entry in config.train if not is_url_list(entry.path)]
    if listed := [entry.path for entry in config.train if is_url_list(entry.path) and not streamed]:
        raise UserError(
            f"data.train: {listed[0]} is no directory of a shard set; name that, or set "
            "data.loader to webdataset to read tars without an index"
        )
    reading = Reading(
        timeout_s=config.read_timeout_s,
        outage_s=60 * config.outage_minutes,
        cache_bytes=int(1e9 * config.cache_gb),
    )
    train_sets = [_open(entry.path, "depth", "data.train", reading) for entry in indexed]
    val_sets = [_open(path, "depth", "data.val", reading) for path in config.val]
    art_sets = [_open(path, "art", "data.art", reading) for path in config.art]
    starts = np.cumsum([0, *(len(shards) for shards in (*train_sets, *val_sets))])
    train: list[Subset] = []
    held_out: list[Subset] = []
    for entry, shards, start in zip(indexed, train_sets, starts, strict=False):
        in_train, in_val = _split(shards, config, entry)
        for chosen, subsets in ((in_train, train), (in_val, held_out)):
            rows = np.flatnonzero(chosen)
            subsets.append(Subset(shards=shards, rows=rows, first_identity=int(start)))
    for entry, subset in zip(indexed, train, strict=True):
        if len(subset) == 0:
            raise UserError(f"data.train: {entry.path} has no training samples in its split")
    if val_sets:
        trained_on = {shards.root for shards in train_sets}
        held_out = [
            Subset(shards=shards, rows=_to_validate(shards, trained_on), first_identity=int(start))
            for shards, start in zip(val_sets, starts[len(train_sets) :], strict=False)
        ]
    if sum(len(subset) for subset in held_out) == 0:
        raise UserError(
            "data.val: nothing to validate on, because no training set has an index with a second "
            'scene to hold out; name a validation set (--data.val "[shards/NAME]"), or pack with a '
            "--scene_from that tells scenes apart"
        )
    with_index = iter(train)
    return Corpus(
        train=tuple(train),
        weights=tuple(entry.weight for entry in config.train),
        locality=tuple(
            Locality(block=entry.shuffle_block, window=entry.shuffle_window) for entry in indexed
        ),
        streams=tuple(
            _stream(entry, None if is_url_list(entry.path) else next(with_index), config.resampled)
            for entry in config.train
            if streamed
        ),
        val=tuple(held_out),
        pictures=Pictures(art_sets),
        digests={
            path: content_digest(shards)
            for path, shards in zip(
                (*(entry.path for entry in indexed), *config.val, *config.art),
                (*train_sets, *val_sets, *art_sets),
                strict=True,
            )
        },
    )


def _open(path: str, kind: str, key: str, reading: Reading) -> ShardSet:
    ensure_demo(path)
    shards = ShardSet.open(path, reading=reading)
    if shards.index.kind != kind:
        raise UserError(
            f"{key}: expected a set of kind '{kind}', but {path} is of kind '{shards.index.kind}'"
        )
    return shards


def _stream(entry: SetConfig, subset: Subset | None, resampled: bool) -> Stream:
    """The tars of a training set, and what may be trained on where an index says it."""
    if subset is None:
        if entry.val_scenes:
            raise UserError(
                f"data.train: val_scenes of {entry.path} needs an index to find scenes in; name "
                "the directory of the set, or validate on data.val"
            )
        return Stream.of_list(entry.path, resampled)
    shards, first = subset.shards, subset.first_identity
    numbers = np.unique(shards.index.shard_of(subset.rows)).tolist()
    return Stream(
        name=entry.path,
        urls=[shards.shard_url(number) for number in numbers],
        identities={shards.keys[row]: first + row for row in subset.rows.tolist()},
        resampled=resampled,
    )


def content_digest(shards: ShardSet) -> str:
    """SHA-256 of the digests of a set's tars."""
    return sha256("".join(shard.sha256 for shard in shards.index.shards).encode()).hexdigest()


def _split(
    shards: ShardSet, config: DataConfig, entry: SetConfig
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which samples of a set train, and which validate."""
    splits, scenes = shards.splits, shards.scenes
    usable = ~splits.isin({"test"})
    if any(other.val_scenes for other in config.train):
        if unknown := sorted(set(entry.val_scenes) - set(scenes.names)):
            raise UserError(
                f"data.train: {entry.path} has no scene '{unknown[0]}' that its val_scenes name; "
                "take names from the set"
            )
        held = set(entry.val_scenes)
    elif (official := splits.counts().keys() - {""}) and (config.val or "val" in official):
        return splits.isin({"", "train"}), splits.isin({"val"})
    else:
        share = 0.0 if config.val else config.val_share
        held = scene_split(list(scenes.counts(usable)), share, config.split_seed)
    validates = scenes.isin(held)
    return usable & ~validates, usable & validates


def _to_validate(shards: ShardSet, trained_on: Set[str]) -> np.ndarray:
    """The samples of a set of ``data.val``: its official validation part, else all but ``test``."""
    official = shards.splits.counts().keys()
    if "val" in official:
        return np.flatnonzero(shards.splits.isin({"val"}))
    if shards.root in trained_on:
        raise UserError(
            f"data.val: {shards.url} is trained on too and has no official validation part; leave "
            "it out of data.val to have scenes of it held out, or name other sets"
        )
    if official == {"test"}:
        raise UserError(
            f"data.val: {shards.url} has only its official test part, which no training looks at; "
            "judge on it with flatdepth evaluate --part test"
        )
    return np.flatnonzero(~shards.splits.isin({"test"}))
