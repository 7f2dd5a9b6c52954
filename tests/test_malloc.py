"""Memory that arrays free stays with the process."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from flatdepth.cli import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        arrays = [np.ones(1 << 20, np.float32) for _ in range(3)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


def has_glibc() -> bool:
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


def page_faults(**variables: str) -> tuple[int, int]:
    """Page faults of 150 arrays of 4 MiB before and after ``keep_freed_memory``."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC_")}
    printed = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    before, after = (int(number) for number in printed.split())
    return before, after


@pytest.mark.skipif(not has_glibc(), reason="only glibc gives memory back so eagerly")
def test_arrays_take_the_memory_that_others_freed() -> None:
    before, after = page_faults()
    assert before > 1000
    assert after < before / 100


@pytest.mark.skipif(not has_glibc(), reason="only glibc gives memory back so eagerly")
def test_what_the_environment_says_stays() -> None:
    before, after = page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert after > before / 2
