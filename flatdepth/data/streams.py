"""Training samples from plain WebDataset streams: tars read from end to end, by any command.

For stores without range requests, pipes and lists of URLs. WebDataset opens and reads them; what
it leaves to global random numbers and to the process group is decided here by seed and rank.
"""

import itertools
import json
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import webdataset
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from flatdepth.augment.rng import hash_words
from flatdepth.data.order import name_hash
from flatdepth.data.shards import JSON_EXT
from flatdepth.data.shards.webdataset import frame_of
from flatdepth.errors import UserError
from flatdepth.types import Frame

SHUFFLED = 256
"""Samples in the buffer that a stream is shuffled with."""

WINDOW = 16
"""Samples of a stream that wall paintings, screens and openings choose from."""


@dataclass(frozen=True, slots=True)
class Window:
    """A sample of a stream, at place 0, and those that come after it; used as a ``Subset`` is.

    Attributes:
        samples: (identity, bytes by extension) of each.
    """

    samples: tuple[tuple[int, Mapping[str, Any]], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def frame(self, place: int) -> Frame:
        """Decode the sample at a place."""
        return frame_of(self.samples[place][1])

    def identity(self, place: int) -> int:
        """Number of the sample in the run."""
        return self.samples[place][0]


def is_url_list(path: str) -> bool:
    """Whether an entry of ``data.train`` names tars or pipes instead of a set with an index."""
    return path.startswith("pipe:") or ".tar" in path.partition("?")[0].rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The tars of one entry of ``data.train``.

    Attributes:
        name: the entry's path.
        urls: tars as WebDataset opens them, at least one.
        identities: key -> number in the run of what may be trained on. None where there is no
            index: then it is all but official parts for validation and testing, and numbers are
            hashes of data set and key.
        resampled: whether shards are drawn with replacement instead of gone through.
    """

    name: str
    urls: Sequence[str]
    identities: Mapping[str, int] | None
    resampled: bool

    @classmethod
    def of_list(cls, path: str, resampled: bool) -> "Stream":
        """A stream of URLs in braces notation, joined by ``::``, without an index.

        Raises:
            UserError: braces do not match, or a variable of the environment is missing.
        """
        try:
            urls = expand_urls(path)
        except (AssertionError, ValueError) as error:
            raise UserError(f"data.train: {path} is no list of URLs ({error})") from error
        return cls(name=path, urls=urls, identities=None, resampled=resampled)

    def windows(self, seed: int, rank: int, ranks: int) -> Iterator[Window]:
        """The training samples of one rank without end, in an order that follows from the seed.

        Each pass goes through all shards, which are dealt to the ranks. Where there are fewer
        shards than ranks, each rank reads them all and keeps its share of the samples.

        Raises:
            UserError: something cannot be opened, is damaged, or has no samples to train on.
        """
        window: deque[tuple[int, Mapping[str, Any]]] = deque(maxlen=WINDOW)
        unread, found = set(self.urls), False
        for number in itertools.count():
            own = random.Random(hash_words(seed, number, rank))
            if self.resampled:
                urls, every = own.choices(self.urls, k=len(self.urls)), 1
            elif len(self.urls) >= ranks:
                dealt = random.Random(hash_words(seed, number)).sample(self.urls, len(self.urls))
                urls, every = dealt[rank::ranks], 1
            else:
                urls, every = list(self.urls), ranks
            entries = itertools.islice(self._read(urls), rank % every, None, every)
            for entry in webdataset.shuffle(SHUFFLED, rng=own)(entries):
                found = True
                window.append(entry)
                if len(window) == WINDOW:
                    yield Window(tuple(window))
            unread -= set(urls)
            if not found and not unread:
                raise UserError(
                    f"data.train: {self.name} has no samples to train on for rank {rank} of "
                    f"{ranks}; name tars that flatdepth pack wrote, with samples outside the "
                    "held-out scenes and official parts"
                )

    def _read(self, urls: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for url in urls:
            try:
                for sample in _samples(url):
                    identity = self._identity(sample)
                    if identity is not None:
                        yield identity, sample
            except Exception as error:  # tars, files and pipes fail in ways of their own
                reason = getattr(error, "strerror", None) or next(iter(error.args), "")
                raise UserError(
                    f"data.train: cannot read {url} to its end ({type(error).__name__}: {reason}); "
                    "see that it is there and is a whole tar of flatdepth pack"
                ) from error

    def _identity(self, sample: Mapping[str, Any]) -> int | None:
        """Number of a sample in the run; None if it is not to be trained on."""
        if self.identities is not None:
            return self.identities.get(sample["__key__"])
        if JSON_EXT not in sample:
            raise ValueError(f"sample {sample['__key__']} has no .{JSON_EXT}")
        about = json.loads(sample[JSON_EXT])
        if about["split"] not in ("", "train"):
            return None
        return name_hash(f"{about['dataset']}/{about['key']}")


def _samples(url: str) -> Iterator[Mapping[str, Any]]:
    """The samples of one tar or command as WebDataset gives them, closed at the end.

    A command is cut off where its tar ends; its exit status after that means nothing.
    """
    stream = webdataset.gopen(url)
    try:
        yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
    finally:
        with suppress(OSError):
            stream.close()
