"""Shared data: a few tiny rooms and pictures, packed once for the whole test run."""

import os
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from flatdepth.cli import run_command
from flatdepth.data.pack import pack
from flatdepth.data.readers.rooms import PicturesReader, RoomsReader
from flatdepth.data.shards.read import ShardSet
from flatdepth.data.shards.write import Output, write_index

REPOSITORY = Path(__file__).parents[1]

# the tests' tensors are small: more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@dataclass(frozen=True)
class TinySets:
    """Directories of a set of rooms (5 scenes of 3 frames, 84 x 112 px) and one of pictures."""

    rooms: Path
    pictures: Path

    def config(self, folder: Path, **overrides: object) -> Path:
        """Write the config file of a run of a few seconds; its runs go to ``folder``/runs."""
        values: dict[str, object] = {
            "name": "tiny",
            "runs": str(folder / "runs"),
            "steps": 6,
            "batch": 4,
            "micro_batch": 2,
            "precision": "no",
            "save_every": 2,
            "keep": 10,
            "log_every": 1,
            "tracker": "none",
            "data": {
                "train": [{"path": str(self.rooms)}],
                "art": [str(self.pictures)],
                "height": 56,
                "width": 70,
                "threads": 2,
            },
            "model": {"encoder": "vitt", "checkpointing": "none"},
            "optim": {"lr": 1e-3, "head_lr_factor": 1.0},
            "eval": {"every": 3, "images": 0, "batch": 2, "pictures": 2},
        }
        for key, value in overrides.items():
            group, _, name = key.partition("__")
            if name:
                values.setdefault(group, {})[name] = value  # type: ignore[attr-defined]
            else:
                values[group] = value
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


def edit_index(folder: Path, **changes: object) -> None:
    """Write the index of a set anew with other values in it."""
    index = ShardSet.open(folder, check_sizes=False).index
    write_index(Output(str(folder)), replace(index, **changes))  # type: ignore[arg-type]


Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    """Run a tool as its command line does; gives exit code, terminal and error output."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        main = runpy.run_path(str(REPOSITORY / "tools" / f"{name}.py"))["main"]
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def refused(tool: Tool, message: str, *arguments: object) -> None:
    """One sentence that holds ``message``, exit code 2."""
    code, _, err = tool(*arguments)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err, err


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is kept of remote sets must not outlive a test."""
    monkeypatch.setenv("FLATDEPTH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state in the process; a test must not inherit another's precision."""
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> TinySets:
    folder = tmp_path_factory.mktemp("sets")
    rooms, pictures = folder / "rooms", folder / "pictures"
    pack(RoomsReader(scenes=5, frames_per_scene=3, height=84, width=112), str(rooms), workers=1)
    pack(PicturesReader(pictures=4, height=84, width=112), str(pictures), workers=1)
    return TinySets(rooms=rooms, pictures=pictures)
