"""How the C library treats memory that arrays have freed."""

import ctypes
import os
import sys

KEEP_BYTES = 1 << 28
"""Free memory at the top of a heap that is kept for the next arrays; there is a heap per thread."""

LARGEST_KEPT_BYTES = 1 << 25
"""Larger arrays go back to the system when they are freed. glibc allows no more than this."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Make glibc keep what arrays free instead of giving it back at once; elsewhere do nothing.

    Images and depth maps come and go at a rate at which the system's clearing of their pages takes
    longer than decoding them. What the user has set in the environment stays as it is.

    Source: mallopt(3), Linux man-pages.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
