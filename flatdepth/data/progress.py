"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, runtime_checkable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


@runtime_checkable
class Report(Protocol):
    """Is told how packing goes on."""

    def say(self, message: str) -> None:
        """A line for the user."""

    def earlier(self, frames: int, left_out: int = 0) -> None:
        """Frames of an earlier run, and how many had been left out by then."""

    def step(self, *, left_out: bool = False) -> None:
        """One more frame."""


class Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere. Counts are thread-safe."""

    def __init__(self, name: str, total: int, unit: str = "frame") -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = self._earlier = self._left_out = 0
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._name, unit=self._unit, smoothing=0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, message: str) -> None:
        """A line that does not break the bar."""
        with self._lock:
            tqdm.write(message, file=sys.stderr)

    def earlier(self, frames: int, left_out: int = 0) -> None:
        """Count frames of an earlier run, which are no part of the rate."""
        self.move(frames, frames, left_out)

    def step(self, *, left_out: bool = False) -> None:
        """Count one frame."""
        self.move(1, 0, int(left_out))

    def move(self, done: int, earlier: int, left_out: int) -> None:
        """Count more frames, or fewer: how many are done, earlier than this run, and left out."""
        with self._lock:
            self._done += done
            self._earlier += earlier
            self._left_out += left_out
            if self._bar is not None:
                if self._left_out:
                    self._bar.set_postfix(skipped=self._left_out, refresh=False)
                self._bar.initial = self._earlier
                self._bar.update(done)
            elif (now := time.monotonic()) - self._printed >= 5 and self._done > self._earlier:
                self._printed = now
                rate = (self._done - self._earlier) / (now - self._started)
                left = (self._total - self._done) / rate
                print(
                    f"{self._name}: {self._done}/{self._total} {self._unit}s, {rate:.1f}/s, "
                    f"{left / 60:.1f} min left"
                    + (f", {self._left_out} left out" if self._left_out else ""),
                    file=sys.stderr,
                    flush=True,
                )


def picture_progress() -> Callable[[int, int], None]:
    """A function to call with (pictures done, pictures in all)."""
    if sys.stderr.isatty():
        bar = tqdm(unit="picture", dynamic_ncols=True, leave=False)

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return move
    printed = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            print(f"{done} of {total} pictures", file=sys.stderr, flush=True)

    return tell
