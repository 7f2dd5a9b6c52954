"""How tasks elsewhere tell of their progress. It imports next to nothing, for speed there."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

_SECONDS_BETWEEN_REPORTS = 0.5

Counts = tuple[int, int, int]
"""Frames done, done earlier, left out."""


class Board:
    """Gathers what tasks tell until it is taken."""

    def __init__(self) -> None:
        self._counts: dict[int, Counts] = {}
        self._lines: list[str] = []

    def post(self, number: int, counts: Counts, lines: Sequence[str]) -> None:
        """The counts of a part since its present try began, and new lines."""
        self._counts[number] = counts
        self._lines += lines

    def take(self) -> tuple[dict[int, Counts], list[str]]:
        """What is new."""
        taken = self._counts, self._lines
        self._counts, self._lines = {}, []
        return taken


class Reporter:
    """A ``Report`` of one part that goes to a board twice a second."""

    def __init__(self, board: Any, number: int) -> None:
        self._board, self._number = board, number
        self._counts: Counter[str] = Counter()
        self._lines: list[str] = []
        self._sent = time.monotonic()

    def say(self, message: str) -> None:
        self._lines.append(message)

    def earlier(self, frames: int, left_out: int = 0) -> None:
        self._counts.update(done=frames, earlier=frames, left_out=left_out)

    def step(self, *, left_out: bool = False) -> None:
        self._counts.update(done=1, left_out=left_out)
        if time.monotonic() - self._sent > _SECONDS_BETWEEN_REPORTS:
            self.send()

    def send(self) -> Any:
        """Post what is known; a reference to wait for."""
        counts, lines = self._counts, self._lines
        self._sent, self._lines = time.monotonic(), []
        return self._board.post.remote(
            self._number, (counts["done"], counts["earlier"], counts["left_out"]), lines
        )
