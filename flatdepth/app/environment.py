"""Where Gradio keeps its files, and what it is told; it reads both when it is imported."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def environment() -> Iterator[None]:
    """Within, Gradio keeps its files in a folder of its own, and heeds no variable but ours.

    Its variables could open folders, share the page or send figures of its use.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    with tempfile.TemporaryDirectory(prefix="flatdepth-") as folder:
        ours = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_EXAMPLES_CACHE": str(Path(folder, "examples")),
        }
        for name in before:
            del os.environ[name]
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                del os.environ[name]
            os.environ.update(before)
