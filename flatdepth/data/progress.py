"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


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
